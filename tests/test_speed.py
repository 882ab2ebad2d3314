"""Measuring speed, with no test that depends on a real clock: networks by name, the modes and what they leave alone,
turns and medians under a fake clock, the ceiling's arithmetic, memory of a process, and faults in one line."""

import json, numpy as np, pytest, torch
from types import SimpleNamespace
from torch import nn
from khmer_ocr.experiments import generator_speed as speed
from khmer_ocr.generative.pix2pix import PatchGAN
from khmer_ocr.experiments.generator_speed import (
    NETWORKS,
    RUN_MODES,
    RunMode,
    in_fresh_process,
    calibrations,
    compiler,
    generating_mb,
    time_in_turns,
    ssim_to_exact,
    measure,
    make_network,
    count_flops,
    peak_mb,
    prepare_run,
    torch_threads,
    training_mb,
)
from khmer_ocr.core.errors import KhmerOCRError

toy = dict(size=64, width=8, latent=16)
plain = [w for w in RUN_MODES if not w.compiled]


def error(f):
    with pytest.raises(KhmerOCRError) as e:
        f()
    assert '\n' not in str(e.value)
    return str(e.value)


class FakeClock:
    "A clock that moves only when told"

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(speed.time, 'perf_counter', lambda: self.now)

    def work(self, *durations, name='', log=None):
        ds = iter(durations)

        def f():
            if log is not None:
                log.append(name)
            self.now += next(ds)

        return f


# --- networks


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_make_images_and_are_always_the_same(name):
    "A network of one name has the same weights and inputs each time, and making it leaves the random state alone"
    state = torch.get_rng_state()
    (net, start) = make_network(name, 3, **toy)
    (twin, again) = make_network(name, 3, **toy)
    with torch.no_grad():
        out = net(*start)
        out2 = twin(*again)
    assert out.shape == ((3, 1, 32, 32) if name == 'dcgan' else (3, 3, 64, 64))
    assert out.equal(out2)
    assert not out[0].equal(out[1])
    assert out.abs().max() <= 1
    assert not net.training
    assert torch.get_rng_state().equal(state)


def test_full_sizes():
    "At full size the networks have about as many parameters as their notebooks say"
    count = {
        k: sum(p.numel() for p in make_network(k, device='meta')[0].parameters()) / 1e6
        for k in ('pix2pix', 'pix2pix, double convolutions', 'hybrid', 'dcgan')
    }
    assert 30 < count['pix2pix, double convolutions'] < 36
    assert count['hybrid'] > count['pix2pix'] > 50
    assert 3 < count['dcgan'] < 5
    assert "did you mean pix2pix?" in error(lambda: make_network('pixtopix'))
    assert 'power of two' in error(lambda: make_network('pix2pix', size=48))


def test_masks_look_like_text_and_codes_have_their_length():
    "Inputs are masks of 0 and 1 with some ink, codes of the length asked for, and noise"
    _, (z, mask, noise) = make_network('vae', 2, **toy)
    assert z.shape == (2, 16)
    assert noise.shape == (2, 3, 64, 64)
    assert 0.1 < mask.mean() < 0.5
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert [x.shape for x in make_network('hybrid', 2, **toy)[1]] == [(2, 1, 64, 64), (2, 16), (2, 3, 64, 64)]
    assert len(make_network('pix2pix', 2, **toy)[1]) == 1


def test_grain_and_code_change_the_image():
    "Each input of a network has an influence on its image"
    for name, k in (('vae', 0), ('vae', 1), ('vae', 2), ('hybrid', 0), ('hybrid', 1), ('vae, plain', 0), ('dcgan', 0)):
        net, start = make_network(name, 1, **toy)
        other = [s * -1 + 0.5 if i == k else s for i, s in enumerate(start)]
        with torch.no_grad():
            assert not net(*start).equal(net(*other)), (name, k)


# --- ways


def test_each_mode_has_one_thing_more_than_one_before():
    "A mode differs from an earlier one in one option, so its gain can be told"
    on = [{k for k in ('bf16', 'channels_last', 'inference', 'compiled') if getattr(w, k)} for w in RUN_MODES]
    assert on[0] == set()
    assert len({w.name for w in RUN_MODES}) == len(RUN_MODES)
    for i in range(1, len(on)):
        assert any(on[j] < on[i] and len(on[i] - on[j]) == 1 for j in range(i))


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.seen = []

    def forward(self, x, z):
        self.seen.append(
            (
                x.dtype,
                x.is_contiguous(memory_format=torch.channels_last),
                torch.is_inference_mode_enabled(),
                torch.is_grad_enabled(),
                z.dtype,
                self.conv.weight.dtype,
                self.training,
            )
        )
        return self.conv(x) + z.sum()


@pytest.mark.parametrize('way', plain)
def test_a_mode_is_what_it_says(way):
    "dtype, layout and inference mode are those of the mode, and the given network stays as it was"
    Spy.__deepcopy__ = lambda self, memo: SpyCopy(self)
    net = Spy().train()
    x = torch.rand(2, 1, 8, 8)
    z = torch.rand(2, 3)
    out = prepare_run(net, way, [x, z])()
    t = torch.bfloat16 if way.bf16 else torch.float32
    assert SpyCopy.last.seen == [(t, True, way.inference, False, t, t, False)]
    assert out.dtype == t  # one channel is channels last in any layout
    assert not net.seen
    assert net.training
    assert net.conv.weight.dtype == torch.float32
    assert net.conv.weight.requires_grad
    assert x.dtype == torch.float32


class SpyCopy(Spy):
    def __init__(self, other):
        super().__init__()
        SpyCopy.last = self


def test_channels_last_changes_layout_alone():
    "The memory layout changes and the result does not"
    net = nn.Conv2d(3, 4, 3)
    seen = []
    net.register_forward_hook(
        lambda m, i, o: seen.append(
            (
                i[0].is_contiguous(memory_format=torch.channels_last),
                m.weight.is_contiguous(memory_format=torch.channels_last),
            )
        )
    )
    x = torch.rand(2, 3, 8, 8)
    a, b = (prepare_run(net, w, [x])() for w in (RunMode('a'), RunMode('b', channels_last=True)))
    assert seen == [(False, False), (True, True)]
    assert a.allclose(b, atol=1e-6)


@pytest.mark.parametrize('name', ('pix2pix', 'vae', 'hybrid', 'dcgan'))
def test_all_modes_make_the_same_image(name):
    "Every mode gives an image like the exact one"
    net, start = make_network(name, **toy)
    exact = prepare_run(net, plain[0], start)()
    assert all(ssim_to_exact(exact, prepare_run(net, w, start)()) > 0.97 for w in plain[1:])


def test_similarity_by_the_range_of_the_exact_one():
    "The similarity does not depend on the scale of the values"
    x = torch.rand(1, 3, 32, 32) * 1e-3
    assert ssim_to_exact(x, x) == pytest.approx(1)
    assert ssim_to_exact(x, x.flip(-1)) < 0.3
    assert ssim_to_exact(x, x.flip(-1)) == pytest.approx(ssim_to_exact(x * 1e3, x.flip(-1) * 1e3), abs=1e-3)
    assert ssim_to_exact(x * 0 + 0.5, x * 0 + 0.5) == pytest.approx(1)
    assert ssim_to_exact(x, x.bfloat16()) > 0.9


# --- turns


def test_turns_under_a_clock_of_the_test(monkeypatch):
    "The works alternate, and the first call of each is not counted"
    log = []
    c = FakeClock(monkeypatch)
    t = time_in_turns(
        dict(a=c.work(9, 1, 2, 3, name='a', log=log), b=c.work(7, 5, 5, 50, name='b', log=log)), rounds=3, seconds=1e9
    )
    assert ''.join(log) == 'ab' * 4
    assert t['a'].tolist() == [1, 2, 3]
    assert t['b'].tolist() == [5, 5, 50]  # the first call is not counted


@pytest.mark.parametrize('seconds, rounds, made', [(0.0, 9, 3), (4.5, 9, 5), (1e9, 9, 9), (1e9, 2, 2), (0.0, 1, 1)])
def test_no_round_begins_after_its_time(monkeypatch, seconds, rounds, made):
    "Three rounds at least are made, and none begins when the time is over"
    c = FakeClock(monkeypatch)
    assert len(time_in_turns(dict(a=c.work(*[1.0] * 20)), rounds, seconds)['a']) == made


def test_threads_are_put_back():
    "The number of threads is as before, also after an error"
    was = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        with torch_threads(was + 1):
            assert torch.get_num_threads() == was + 1
            1 / 0
    assert torch.get_num_threads() == was
    with torch_threads(0):
        assert torch.get_num_threads() == was


# --- the ceiling


def test_operations_by_hand():
    "A convolution and a linear layer have the operations of the formula"
    assert count_flops(nn.Conv2d(3, 5, 3, padding=1, bias=False), [torch.zeros(2, 3, 8, 8)]) == 2 * 2 * 5 * 3 * 9 * 64
    assert count_flops(nn.Linear(5, 7, bias=False), [torch.zeros(3, 5)]) == 2 * 3 * 5 * 7
    net = PatchGAN(4)
    assert count_flops(net, [torch.zeros(4, 4, 64, 64)]) == 4 * count_flops(net, [torch.zeros(1, 4, 64, 64)])


def test_calibrations_count_what_they_do():
    "The stated operations of a calibration are those that it does"
    from torch.utils.flop_counter import FlopCounterMode

    for name, (f, n) in calibrations(side=8).items():
        with FlopCounterMode(display=False) as c:
            f()
        assert c.get_total_flops() == n > 0, name


def test_measure_by_hand(monkeypatch):
    "Times by the fake clock: rates, ratios round by round, shares and ceiling must follow"
    net = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    x = torch.rand(4, 1, 16, 16)
    need = count_flops(net, [x])
    done = SimpleNamespace(rounds=None)

    def fake(work, rounds, seconds):
        done.rounds = rounds, seconds
        return dict(
            fp32=np.array([2.0, 4.0, 8.0]),
            quick=np.array([1.0, 1.0, 4.0]),
            convolution=np.array([1.0, 1.0, 1.0]),
            product=np.array([3.0, 0.5, 0.5]),
        )

    monkeypatch.setattr(speed, 'time_in_turns', fake)
    monkeypatch.setattr(
        speed, 'calibrations', lambda d, s: dict(convolution=(lambda: 0, need * 8), product=(lambda: 0, need * 8))
    )
    a, b = measure(net, [x], [RunMode('fp32', inference=False), RunMode('quick')], 3, 7.0)
    assert done.rounds == (3, 7.0)
    assert (a['samples_per_s'], a['ratio'], a['share']) == (1.0, 1.0, need / 4 / (need * 16))
    assert b['samples_per_s'] == 4.0
    assert b['ratio'] == 2.0
    assert (b['low'], b['high']) == (2.0, 3.0)
    assert a['ceiling'] == b['ceiling'] == 64.0
    assert b['share'] == 1 / 16 == b['samples_per_s'] / b['ceiling']
    assert b['ssim'] == pytest.approx(1)
    assert b['gflop'] == need / 4e9
    assert json.dumps([a, b])


def test_a_mode_without_compiler_is_left_out(monkeypatch):
    "A failing compiler is a row that says so; a fault of the network is raised"

    def broken(*a, **kw):
        def f(*x):
            raise RuntimeError('no compiler\nand a long story')

        return f

    monkeypatch.setattr(torch, 'compile', broken)
    net = nn.Conv2d(1, 1, 3, padding=1)
    x = [torch.rand(1, 1, 16, 16)]
    c = RunMode('c', compiled=True)
    rows = measure(net, x, [RunMode('a'), c, RunMode('b', bf16=True)], rounds=1, side=8)
    assert [r['way'] for r in rows] == ['a', 'c', 'b']
    assert rows[1] == dict(way='c', failed='RuntimeError: no compiler')
    assert 'what the others are compared with' in error(lambda: measure(net, x, [c, RunMode('a')], rounds=1, side=8))
    with pytest.raises(RuntimeError):
        measure(
            net, [torch.rand(1, 2, 16, 16)], [RunMode('a')], rounds=1, side=8
        )  # a fault of the network is not hidden


def test_compiler_in_one_line(monkeypatch):
    "The version of the compiler is one line, and so is its absence"
    assert compiler()
    assert '\n' not in compiler()
    monkeypatch.setattr(speed.subprocess, 'run', lambda *a, **kw: 1 / 0)
    assert compiler() == 'none (ZeroDivisionError)'


# --- memory


def test_memory_of_a_process_of_its_own():
    "The memory of a measurement does not include that of the process that asks"
    assert peak_mb() > 10
    bulk = np.ones(400 * 2**17)
    here = peak_mb()
    assert here > 400
    assert bulk[0] == 1  # 400 MB, which the child must not inherit
    before, peak = in_fresh_process(generating_mb, 'pix2pix', 1, True, dict(size=64, width=4, latent=16))
    assert 10 < before <= peak
    assert before < here
    before, peak = in_fresh_process(training_mb, 'hybrid', 2, dict(size=64, width=4, latent=4), 'cpu', '32-true')
    assert 10 < before < peak
    assert 'did you mean pix2pix?' in error(lambda: in_fresh_process(generating_mb, 'pixtopix', 1, False, {}))


@pytest.mark.parametrize('name', [n for n in NETWORKS if n != 'dcgan' and n != 'hybrid'])
def test_every_generator_trains_for_its_memory(name):
    "A training step of each network runs, and its memory is counted"
    before, after = training_mb(name, 2, dict(size=64, width=4, latent=4), 'cpu', '32-true')
    assert before > 0
    assert after > before - 1  # the kernel counts in lumps
