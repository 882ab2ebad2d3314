"What the learner promises: the same bits after any interruption, and one clear line for what is wrong."

import csv
import math
import os
import re
import signal
import time
import pytest
import torch
from torch import nn
from khmer_ocr.training.callbacks import Callback, CancelFit, Progress
from khmer_ocr.training.learner import Learner
from khmer_ocr.training.settings import TrainConfig, lr_at
from khmer_ocr.core.config import configure
from khmer_ocr.training.checkpoints import load_checkpoint, load_weights, save_checkpoint
from khmer_ocr.core.errors import KhmerOCRError


class Net(nn.Module):
    "Everything that has a state of its own: convolution, running statistics, dropout, recurrence"

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        frames, _ = self.rnn(self.conv(x).mean(2).transpose(1, 2))
        return self.head(frames)


def batches(n):
    while True:
        rng = torch.Generator().manual_seed(n)
        n += 1
        x = torch.rand(4, 1, 8, 12, generator=rng)
        yield dict(x=x, y=torch.randint(5, (4, 12), generator=rng))


def epoch_of_three(n):
    "A source that ends; it draws from torch's global generator when it is opened, as DataLoader does"
    torch.rand(1)
    for i in range(n % 3, 3):
        yield next(batches(i))


def loss(model, b):
    return nn.functional.cross_entropy(model(b['x']).flatten(0, 1), b['y'].flatten())


def evaluate(model):
    return dict(loss=loss(model, next(batches(10**6))))


def learner(folder, callbacks=(), source=batches, **kw):
    torch.manual_seed(0)
    settings = dict(steps=12, eval_every=4, save_every=4, log_every=5, tensorboard=False) | kw
    header = dict(charset='កខ')
    return Learner(Net(), loss, source, TrainConfig(**settings), folder, callbacks, evaluate, header, verbose=False)


class At(Callback):
    def __init__(self, step, do):
        self.step, self.do = step, do

    def after_loss(self, learn):
        if learn.step == self.step and not learn.stopping:
            self.do(learn)


def die(learn):
    raise RuntimeError('power cut')


def cancel(learn):
    raise CancelFit


def ctrl_c(learn):
    os.kill(os.getpid(), signal.SIGINT)


def sigterm(learn):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    'kw,source',
    [
        (dict(), epoch_of_three),
        (dict(precision='bf16-mixed', channels_last=True, accumulate=2), batches),
        (dict(ema=0.0, schedule='onecycle', clip=0.0), batches),
    ],
)
@pytest.mark.parametrize('how,at,kept', [(die, 7, 4), (cancel, 5, 6), (ctrl_c, 6, 7), (sigterm, 6, 7), (die, 8, 8)])
def test_resume_is_bit_equal(tmp_path, kw, how, at, kept, source):
    learner(tmp_path / 'whole', source=source, **kw).fit()
    try:
        learner(tmp_path / 'cut', [At(at, how)], source, **kw).fit()
    except RuntimeError:
        pass
    assert load_checkpoint(tmp_path / 'cut' / 'latest.safetensors')[1]['step'] == kept
    learner(tmp_path / 'cut', source=source, **kw).fit('latest')
    for f in ('best.safetensors', 'latest.safetensors', 'history.csv'):
        assert (tmp_path / 'cut' / f).read_bytes() == (tmp_path / 'whole' / f).read_bytes(), f


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    learner(tmp_path).fit()
    before = (tmp_path / 'latest.safetensors').read_bytes()
    learner(tmp_path).fit('latest')
    assert (tmp_path / 'latest.safetensors').read_bytes() == before


def test_best_is_the_average_with_the_header(tmp_path):
    learn = learner(tmp_path).fit()
    tensors, header = load_checkpoint(tmp_path / 'best.safetensors')
    assert (header['charset'], header['kind']) == ('កខ', 'weights')
    assert header['metrics']['valid_loss'] == min(r['valid_loss'] for r in learn.history if 'valid_loss' in r)
    assert tensors.keys() == Net().state_dict().keys()
    weights, _ = load_weights(tmp_path / 'latest.safetensors')
    assert learn.averaged is learn.ema
    assert all(weights[k].equal(v) for k, v in learn.averaged.state_dict().items())


def test_without_an_average_the_weights_themselves_are_used(tmp_path):
    learn = learner(tmp_path, ema=0.0).fit()
    assert learn.averaged is learn.net
    weights, _ = load_weights(tmp_path / 'latest.safetensors')
    assert all(weights[k].equal(v) for k, v in learn.net.state_dict().items())


def test_broken_batches_are_skipped(tmp_path):
    def poisoned(n):
        for i, b in enumerate(batches(n), n):
            yield {**b, 'x': b['x'] * math.nan} if i in (2, 6) else b

    learn = learner(tmp_path, source=poisoned).fit()
    assert learn.skipped == learn.history[-1]['skipped'] == 2
    assert all(v.isfinite().all() for v in learn.net.state_dict().values())
    assert math.isfinite(learn.metrics['valid_loss'])


def test_ten_broken_batches_end_the_run(tmp_path):
    def poisoned(n):
        return ({**b, 'x': b['x'] * math.nan} for b in batches(n))

    with pytest.raises(KhmerOCRError, match='10 steps in a row'):
        learner(tmp_path, source=poisoned).fit()


def test_no_data_leaves_nothing(tmp_path):
    with pytest.raises(KhmerOCRError, match='No data'):
        learner(tmp_path / 'run', source=lambda n: iter([]), tensorboard=True).fit()
    assert not (tmp_path / 'run').exists()


def test_waiting_and_the_logs_of_callbacks(tmp_path, capsys):
    "The share of waiting is that of a source that sleeps; numbers of callbacks stand beside it, in file and log"

    def slow(n):
        for b in batches(n):
            time.sleep(0.05)
            yield b

    class LogPadding(Callback):
        def after_loss(self, learn):
            learn.logs['padding'] = 0.25

    learn = learner(tmp_path, [LogPadding()], slow, steps=10, log_every=5)
    progress = next(cb for cb in learn.callbacks if isinstance(cb, Progress))
    progress.verbose = True
    progress.every = 0.0
    learn.fit()
    with (tmp_path / 'speed.csv').open() as f:
        rows = list(csv.DictReader(f))
    assert [float(r['padding']) for r in rows] == [0.25] * 2
    assert 0.3 < float(rows[-1]['waiting']) <= 1
    log = capsys.readouterr().err
    assert 'padding 0.25' in log
    assert re.search(r'waiting \d+\.\d%', log)
    assert 'waited for data' in log


def test_unknown_metric_is_named(tmp_path):
    with pytest.raises(KhmerOCRError, match='did you mean valid_loss'):
        learner(tmp_path, metric='valid_los').fit()


@pytest.mark.parametrize(
    'given, error',
    [
        (dict(stepz=3), 'steps'),
        (dict(lr='fast'), 'must be float'),
        (dict(steps=True), 'must be int'),
        (dict(mode='low'), 'one of'),
        (dict(steps=0), 'at least 1'),
        (dict(ema=1.0), 'below 1'),
    ],
)
def test_settings_are_checked(given, error):
    with pytest.raises(KhmerOCRError, match=error):
        configure(TrainConfig, given)


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100)
    rates = [lr_at(i, config) for i in range(100)]
    assert max(rates) == pytest.approx(config.lr)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < config.lr / 100


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b'',
        lambda data: b'PK\x03\x04' + data,
        lambda data: b'\xff' * 64,
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / 'a.safetensors'
    save_checkpoint(path, dict(w=torch.ones(100)), {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KhmerOCRError, match='truncated or no safetensors'):
        load_checkpoint(path)


def test_wrong_checkpoints(tmp_path):
    with pytest.raises(KhmerOCRError, match='is a folder'):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / 'o.safetensors', nn.Linear(2, 2).state_dict(), {})
    with pytest.raises(KhmerOCRError, match='cannot be resumed'):
        learner(tmp_path).fit(tmp_path / 'o.safetensors')
    learner(tmp_path / 'a').fit()
    small = Learner(nn.Linear(2, 2), loss, batches, TrainConfig(tensorboard=False), tmp_path / 'b', verbose=False)
    with pytest.raises(KhmerOCRError, match='another model'):
        small.fit(tmp_path / 'a' / 'latest.safetensors')
