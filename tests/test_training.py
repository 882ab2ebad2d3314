"Settings that act in the loop: float16, memory, freezing, the best few, stopping, weights of samples, processes."

import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch import nn
from khmer_ocr.training import learner as learner_module
from khmer_ocr.training.callbacks import Callback, CancelFit, read_history
from khmer_ocr.training.learner import Learner
from khmer_ocr.training.checkpoints import load_checkpoint, load_weights
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.training.settings import TrainConfig, lr_at
from khmer_ocr.training.memory import auto_batch_size, kept_bytes, split_batch
from khmer_ocr.core.config import configure


class Net(nn.Module):
    "Convolution, norm and recurrence; `norm=False` for sums that must come out equal"

    def __init__(self, norm=True):
        super().__init__()
        normalise = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), normalise, nn.ReLU())
        self.encoder = nn.LSTM(6, 6, batch_first=True)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x):
        frames, _ = self.encoder(self.backbone(x).mean(2).transpose(1, 2))
        return self.classifier(frames)


def batches(n, size=lambda n: 4):
    while True:
        rng = torch.Generator().manual_seed(n)
        k = size(n)
        n += 1
        x = torch.rand(k, 1, 6, 8, generator=rng)
        y = torch.randint(5, (k, 8), generator=rng)
        yield dict(x=x, y=y, texts=['a'] * k)


def batches_of_8(n):
    return batches(n, lambda n: 8)


def loss(model, b):
    return nn.functional.cross_entropy(model(b['x']).flatten(0, 1), b['y'].flatten())


def evaluate(model):
    return dict(cer=loss(model, next(batches(10**6))), exact=0.5)


def equal(a, b):
    return all(v.equal(w) for v, w in zip(a.state_dict().values(), b.state_dict().values()))


def near(a, b, eps=1e-5):
    return all(torch.allclose(v, w, atol=eps) for v, w in zip(a.state_dict().values(), b.state_dict().values()))


def run(
    folder, loss=loss, source=batches, norm=True, callbacks=(), resume=None, evaluate=evaluate, verbose=False, **kw
):
    torch.manual_seed(0)
    every = dict(eval_every=3, save_every=4, log_every=1)
    settings = dict(steps=12, batch_size=4, tensorboard=False, precision='32-true') | every | kw
    config = TrainConfig(**settings)
    return Learner(Net(norm), loss, source, config, folder, callbacks, evaluate, verbose=verbose).fit(resume)


class At(Callback):
    def __init__(self, step, error=CancelFit):
        self.step, self.error = step, error

    def before_batch(self, learn):
        if learn.step == self.step:
            raise self.error


# float16
def loud(model, b):
    return loss(model, b) * 3e5  # its gradients do not fit into 16 bits at the first scale


def test_float16_finds_its_scale_and_resumes_with_it(tmp_path):
    settings = dict(precision='16-mixed', steps=24, accumulate=2)
    whole = run(tmp_path / 'whole', loud, **settings)
    assert 0 < whole.skipped < 20
    assert whole.scaler.get_scale() < 2**16
    assert math.isfinite(whole.metrics['cer'])
    run(tmp_path / 'cut', loud, callbacks=[At(6)], **settings)
    assert load_checkpoint(tmp_path / 'cut/latest.safetensors')[1]['run']['scaler']['scale'] < 2**16
    run(tmp_path / 'cut', loud, resume='latest', **settings)
    for f in ('latest.safetensors', 'history.csv'):
        assert (tmp_path / 'cut' / f).read_bytes() == (tmp_path / 'whole' / f).read_bytes()


def test_float16_gives_up_on_a_loss_that_is_no_number(tmp_path):
    with pytest.raises(KhmerOCRError, match='10 steps in a row'):
        run(tmp_path, lambda m, b: loss(m, b) * math.nan, precision='16-mixed', steps=40)


def test_precision_is_what_was_asked_for(tmp_path):
    for p in ('16-mixed', 'bf16-mixed', '32-true'):
        assert run(tmp_path / p, precision=p, steps=1).fabric._precision.precision == p


# memory
class Machine:
    "A loss that runs out of memory above `most` samples, in one of the ways of PyTorch"

    def __init__(self, most, error=lambda: torch.OutOfMemoryError('CUDA out of memory'), after=0):
        self.most = most
        self.error = error
        self.after = after  # so many calls go well
        self.calls = []

    def __call__(self, model, b):
        n = len(b['x'])
        self.calls.append(n)
        out = loss(model, b)
        if n > self.most and len(self.calls) > self.after:
            raise self.error()
        return out


ways = [
    lambda: torch.OutOfMemoryError('CUDA out of memory'),
    MemoryError,
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize('error', ways)
def test_out_of_memory_goes_on_with_the_same_gradient(tmp_path, error, capsys):
    whole = run(tmp_path / 'whole', norm=False, source=batches_of_8, accumulate=2)
    small = Machine(2, error, after=9)
    learn = run(tmp_path / 'small', small, batches_of_8, norm=False, accumulate=2, verbose=True)
    assert (learn.split, learn.step) == (4, 12)
    assert learn.taken == whole.taken == 24
    assert max(small.calls[-20:]) == 2
    assert near(learn.net, whole.net)
    assert near(learn.ema, whole.ema)
    losses = [[r['loss'] for r in read_history(tmp_path / k / 'history.csv')] for k in ('whole', 'small')]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    messages = [line for line in capsys.readouterr().err.splitlines() if 'out of memory' in line]
    assert len(messages) == 2
    assert 'in 2 parts' in messages[0]
    assert 'in 4 parts' in messages[1]


def test_a_second_attempt_leaves_no_trace_of_the_first(tmp_path):
    "Running statistics, gradients and random numbers: a run that starts in parts ends with the same bits"

    class Start(Callback):
        def before_fit(self, learn):
            learn.split = 2

    a = run(tmp_path / 'a', Machine(2))
    b = run(tmp_path / 'b', callbacks=[Start()])
    assert equal(a.net, b.net)
    assert equal(a.ema, b.ema)


def test_a_resumed_run_keeps_its_parts(tmp_path):
    run(tmp_path / 'whole', Machine(2))
    run(tmp_path / 'cut', Machine(2), callbacks=[At(5)])
    assert load_checkpoint(tmp_path / 'cut/latest.safetensors')[1]['run']['split'] == 2
    machine = Machine(2)
    run(tmp_path / 'cut', machine, resume='latest')
    assert set(machine.calls) == {2}
    assert (tmp_path / 'cut/latest.safetensors').read_bytes() == (tmp_path / 'whole/latest.safetensors').read_bytes()


def test_too_little_memory_for_one_sample_and_other_errors(tmp_path):
    with pytest.raises(KhmerOCRError, match='even with one sample'):
        run(tmp_path / 'a', Machine(0))
    with pytest.raises(RuntimeError, match='shapes'):
        run(tmp_path / 'b', Machine(0, lambda: RuntimeError('shapes cannot be multiplied')))


def test_several_processes_cannot_split_batches_by_themselves(tmp_path):
    learn = run(tmp_path, steps=1)
    learn.fabric = SimpleNamespace(world_size=2, device=torch.device('cpu'))
    with pytest.raises(KhmerOCRError, match='halve batch_size .now 4. and double accumulate'):
        learn.split_batches(4)


def test_parts_of_every_kind_of_batch():
    x = torch.arange(10)
    for parts in (1, 2, 3, 7, 10, 99):
        got, shares = zip(*split_batch((x, dict(t=list('abcdefghij'), k=3), 'name'), parts))
        assert torch.cat([tensor for tensor, _, _ in got]).equal(x)
        assert sum((d['t'] for _, d, _ in got), []) == list('abcdefghij')
        assert all(d['k'] == 3 and name == 'name' for _, d, name in got)
        assert len(got) == min(parts, 10) if parts != 7 else len(got) == 5
        assert sum(shares) == pytest.approx(1)


def test_automatic_batch_size_grows_with_memory():
    net = Net()
    batch = next(batches(0))
    sizes = [auto_batch_size(net, loss, batch, memory, 64) for memory in (0, 10**4, 10**5, 10**6, 10**9)]
    assert (sizes[0], sizes[-1]) == (1, 64)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    small = kept_bytes(net, loss, next(batches(0, lambda n: 256)))
    assert kept_bytes(net, loss, next(batches(0, lambda n: 512))) > 1.8 * small


# weights of samples
def test_every_sample_weighs_the_same(tmp_path):
    "Batches of 2 and 6 lines, one step: by sample it is one batch of 8, by batch it is not"

    def two_or_six(n):
        return batches(n, lambda n: (2, 6)[n % 2])

    def joined(n):
        while True:
            a = next(two_or_six(2 * n))
            b = next(two_or_six(2 * n + 1))
            n += 1
            yield {k: torch.cat([a[k], b[k]]) if k != 'texts' else a[k] + b[k] for k in a}

    halves = dict(norm=False, source=two_or_six, batch_size=4, accumulate=2, steps=5)
    want = run(tmp_path / 'a', norm=False, source=joined, batch_size=8, steps=5)
    by_sample = run(tmp_path / 'b', loss_reduction='sample', **halves)
    by_batch = run(tmp_path / 'c', **halves)
    assert near(want.net, by_sample.net)
    assert not near(want.net, by_batch.net, 1e-4)


def test_the_old_name_of_loss_reduction_is_understood():
    assert configure(TrainConfig, dict(weigh='sample')) == TrainConfig(loss_reduction='sample')


# freezing
def test_frozen_parts_keep_their_bytes(tmp_path):
    torch.manual_seed(0)
    before = Net().state_dict()
    learn = run(tmp_path, freeze=('backbone',))
    best, _ = load_weights(tmp_path / 'best.safetensors')
    for tensors in (learn.net.state_dict(), learn.ema.state_dict(), best):
        for name, v in before.items():
            assert tensors[name].equal(v) == name.startswith('backbone.'), name
    assert not learn.net.backbone[1].training
    assert learn.net.encoder.training


def test_freezing_what_is_not_there(tmp_path):
    with pytest.raises(KhmerOCRError, match="no part 'backbon'.*did you mean backbone"):
        run(tmp_path / 'a', freeze=('backbon',))
    with pytest.raises(KhmerOCRError, match='nothing to train'):
        run(tmp_path / 'b', freeze=('backbone', 'encoder', 'classifier'))
    with pytest.raises(KhmerOCRError, match='list of names'):
        configure(TrainConfig, dict(freeze=[3]))
    assert not (tmp_path / 'a').exists()
    assert not (tmp_path / 'b').exists()
    run(tmp_path / 'c', freeze=('encoder',), steps=4)
    with pytest.raises(KhmerOCRError, match='other parts frozen'):
        run(tmp_path / 'c', resume='latest')


# which weights, and when to stop
def scores(values):
    "An evaluation that gives these, one after the other"
    it = iter(values)
    return lambda model: dict(cer=next(it))


def test_the_best_few(tmp_path):
    run(tmp_path, evaluate=scores([0.5, 0.2, 0.4, 0.3]), keep_best=2)
    assert sorted(p.name for p in tmp_path.glob('step-*')) == [
        'step-000006-cer-0.200000.safetensors',
        'step-000012-cer-0.300000.safetensors',
    ]
    _, best = load_checkpoint(tmp_path / 'best.safetensors')
    _, second = load_checkpoint(tmp_path / 'step-000012-cer-0.300000.safetensors')
    assert (best['step'], second['kind']) == (6, 'weights')


def test_a_death_while_saving_leaves_the_old_ones(tmp_path, monkeypatch):
    real = learner_module.save_checkpoint

    def dies(path, *rest):
        if 'step-000009' in str(path):
            raise OSError('no space')
        real(path, *rest)

    monkeypatch.setattr(learner_module, 'save_checkpoint', dies)
    with pytest.raises(OSError):
        run(tmp_path, evaluate=scores([0.5, 0.4, 0.3, 0.2]), keep_best=2)
    assert [p.name[:11] for p in sorted(tmp_path.glob('step-*'))] == ['step-000003', 'step-000006']


def test_the_best_few_after_a_restart(tmp_path):
    run(tmp_path / 'whole', keep_best=2)
    run(tmp_path / 'cut', keep_best=2, callbacks=[At(7)])
    run(tmp_path / 'cut', keep_best=2, resume='latest')

    def weights(folder):
        return {p.name: p.read_bytes() for p in folder.glob('*.safetensors')}

    assert len(weights(tmp_path / 'cut')) == 4
    assert weights(tmp_path / 'whole') == weights(tmp_path / 'cut')


def test_a_run_stops_at_its_target(tmp_path):
    learn = run(tmp_path / 'a', evaluate=scores([0.5, 0.009, 0.001, 0.0]), stop_at=0.01)
    assert learn.step == 6
    assert learn.stopping.startswith('cer 0.009')
    assert load_checkpoint(tmp_path / 'a/latest.safetensors')[1]['step'] == 6
    rising = dict(stop_at=0.95, metric='exact', mode='max')
    assert run(tmp_path / 'b', evaluate=lambda model: dict(cer=1.0, exact=0.97), **rising).step == 3


def test_patience_counts_the_score_that_decides(tmp_path):
    learn = run(tmp_path, evaluate=scores([0.5, 0.4, 0.45, 0.4, 0.1]), patience=2, steps=15)
    assert learn.step == 12 and learn.best == 0.4


def test_patience_survives_a_restart(tmp_path):
    run(tmp_path, evaluate=scores([0.5, 0.6]), patience=2, steps=15, callbacks=[At(6)], save_every=1)
    assert run(tmp_path, evaluate=scores([0.6, 0.1]), patience=2, steps=15, resume='latest').step == 9


@pytest.mark.parametrize('name', ['adamw', 'adam'])
def test_optimisers(tmp_path, name):
    learn = run(tmp_path, optimizer=name, weight_decay=0.5, steps=2)
    assert type(learn.opt.optimizer).__name__.lower() == name
    decay = max(g['weight_decay'] for g in learn.opt.param_groups)
    assert decay == (0.5 if name == 'adamw' else 0)


def test_logs_in_a_folder_of_their_own(tmp_path):
    run(tmp_path / 'models/mine', logs=str(tmp_path / 'logs'), tensorboard=True, steps=3)
    names = {p.name.split('.')[0] for p in (tmp_path / 'logs/mine').iterdir()}
    assert {'history', 'speed'} <= names
    assert sorted(p.name for p in (tmp_path / 'models/mine').iterdir()) == ['best.safetensors', 'latest.safetensors']
    if 'events' not in names:
        pytest.skip('TensorBoard is not installed')


def test_checkpoints_of_the_version_before_can_be_resumed(tmp_path):
    run(tmp_path, steps=4)
    path = tmp_path / 'latest.safetensors'
    tensors, header = load_checkpoint(path)
    del header['run']['split'], header['settings']['freeze']
    learner_module.save_checkpoint(path, tensors, {k: v for k, v in header.items() if k != 'format'})
    assert run(tmp_path, resume='latest').step == 12


# a run of the version of November 2026, when callbacks had no keys: of 12 steps 7 were made
def curve(n):
    while True:
        x = torch.rand(8, 1, generator=torch.Generator().manual_seed(n))
        n += 1
        yield x, torch.sin(3 * x)


def curve_loss(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def curve_error(model):
    return dict(error=curve_loss(model, next(curve(10**6))))


def test_a_run_from_before_the_keys_resumes_to_the_same_curve(tmp_path):
    "`old_run` holds its checkpoint and history, and the history of the same run in one go"
    old = Path(__file__).parent / 'old_run'
    for name in ('latest.safetensors', 'history.csv'):
        shutil.copy(old / name, tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 1))
    stopping = dict(patience=3, stop_at=1e-9)
    every = dict(eval_every=4, save_every=4, log_every=5)
    config = TrainConfig(steps=12, ema=0.9, precision='32-true', tensorboard=False, **every, **stopping)
    learn = Learner(net, curve_loss, curve, config, tmp_path, evaluate=curve_error, verbose=False).fit('latest')
    assert learn.step == 12
    assert (tmp_path / 'history.csv').read_bytes() == (old / 'whole.csv').read_bytes()
    keys = {type(cb).__name__: cb.key for cb in learn.callbacks if cb.key}
    assert keys == dict(History='History', EarlyStop='EarlyStop', StopAtTarget='Enough')
    _, header = load_checkpoint(tmp_path / 'latest.safetensors')
    assert header['run']['callbacks'].keys() == {'History', 'EarlyStop'}  # the target is no state


def test_the_state_of_a_renamed_callback_is_found_by_its_key(tmp_path):
    class Before(Callback):
        seen = 0

        def state(self):
            return dict(seen=self.seen)

        def load_state(self, state):
            self.seen = state.get('seen', 0)

        def after_step(self, learn):
            self.seen += 1

    class Renamed(Before):
        key = 'Before'

    run(tmp_path, callbacks=[Before()], steps=4)
    renamed = Renamed()
    run(tmp_path, callbacks=[renamed], resume='latest')
    assert renamed.seen == 12


# several processes
script = '''
import sys; sys.path.insert(0, {tests!r})
from test_training import run
run({out!r}, norm=False, ema=.9, clip=.5, eval_every=4, threads=1)
'''


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def torchrun(*args, n=2, **kw):
    "Two processes on this machine, over gloo"
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(n)]
    address = ['--master_addr', '127.0.0.1', '--master_port', str(free_port())]
    command = [*start, *address, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **kw)


@pytest.mark.skipif(os.name == 'nt', reason='gloo')
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    (tmp_path / 'go.py').write_text(script.format(tests=str(Path(__file__).parent), out=str(tmp_path / 'two')))
    r = torchrun(tmp_path / 'go.py')
    assert r.returncode == 0, r.stderr
    one = run(tmp_path / 'one', norm=False, ema=0.9, clip=0.5, eval_every=4, accumulate=2)
    rows_of_one = read_history(tmp_path / 'one/history.csv')
    rows_of_two = read_history(tmp_path / 'two/history.csv')
    assert len(rows_of_one) == len(rows_of_two) == 12
    for a, b in zip(rows_of_one, rows_of_two):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    two, _ = load_weights(tmp_path / 'two/latest.safetensors')
    assert all(torch.allclose(v, two[k], atol=1e-5) for k, v in one.ema.state_dict().items())


@pytest.mark.parametrize('d', (128, 768))
def test_the_transformer_s_rate_is_tied_to_its_width(d):
    "Vaswani et al. 2017, formula 3: d_model^-0.5 * min(step^-0.5, step * warmup^-1.5), steps from 1"
    c = TrainConfig(steps=1000, warmup=0.2, schedule='noam', lr=2.0, d_model=d)
    for step in (1, 50, 200, 201, 1000):
        assert lr_at(step - 1, c) == pytest.approx(2 * d**-0.5 * min(step**-0.5, step * 200**-1.5))
    with pytest.raises(KhmerOCRError, match='d_model'):
        TrainConfig(d_model=0)
