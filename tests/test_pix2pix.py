"Pix2Pix: shapes, losses by hand, progressive growing, resuming to the same bits, tiles without seams, and errors."

import math
import numpy as np
import pytest
import torch
from dataclasses import asdict, replace
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.generative.artifacts import checkerboard_strength
from khmer_ocr.training.callbacks import Callback, CancelFit, read_history
from khmer_ocr.training.checkpoints import load_checkpoint, save_checkpoint
from khmer_ocr.generative.pairs import CropConfig, PairBatches, rendered_pairs
from khmer_ocr.generative.pix2pix import (
    AttentionGate,
    PatchGAN,
    Pix2Pix,
    Pix2PixConfig,
    StyleModulation,
    feature_matching_loss,
    l1_loss,
    make_generator,
    pix2pix_phases,
)
from khmer_ocr.generative.pix2pix_training import (
    LinearDecay,
    ResolutionStage,
    check_stages,
    load_pix2pix,
    similarity,
    train_at_resolution,
    train_pix2pix,
)
from khmer_ocr.generative.tiling import generate_tiled
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.core.config import configure
from khmer_ocr.training.memory import kept_bytes

noto = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')
words = ['ភ្នំពេញ', 'សាលា', 'ខ្មែរ', 'ជាតិ']
toy = Pix2PixConfig(resolution=32, ngf=4, ndf=4)
quick = dict(verbose=False, precision='32-true', device='cpu', tensorboard=False, log_every=1)


@pytest.fixture(scope='module')
def pages():
    return rendered_pairs(words, [noto], 3, seed=2, shape=(72, 90), size=(16, 20))


def error(f):
    with pytest.raises(KhmerOCRError) as e:
        f()
    assert '\n' not in str(e.value)
    return str(e.value)


def count(net):
    return sum(p.numel() for p in net.parameters())


def meta(**kw):
    with torch.device('meta'):
        return make_generator(Pix2PixConfig(**kw))


class StopAt(Callback):
    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step == self.n:
            raise CancelFit


# --- networks


def test_shapes_of_the_founding_document():
    "At 256 pixels the stride form goes down to 1024 features at one pixel, the double form to 1024 at 16 x 16"
    net = meta()
    x = torch.empty(1, 1, 256, 256, device='meta')
    inner = []
    for d in net.downs:
        d.register_forward_hook(lambda m, i, o: inner.append(tuple(o.shape)))
    assert net(x).shape == (1, 3, 256, 256)
    assert inner[-1] == (1, 1024, 1, 1)
    assert [s[2] for s in inner] == [128, 64, 32, 16, 8, 4, 2, 1]
    discriminator = PatchGAN(8)
    assert [discriminator(torch.zeros(2, 4, s, s)).shape for s in (256, 128, 64)] == [
        (2, 1, 30, 30),
        (2, 1, 14, 14),
        (2, 1, 6, 6),
    ]
    assert [f.shape[1] for f in discriminator.features(torch.zeros(1, 4, 64, 64))] == [8, 16, 32, 64]
    assert all(isinstance(m, (nn.Conv2d, nn.LeakyReLU)) for m in net.downs[-1])  # no norm at one pixel
    double = meta(form='double')
    mid = []
    double.downs[-1].register_forward_hook(lambda m, i, o: mid.append(tuple(o.shape)))
    assert double(x).shape == (1, 3, 256, 256)
    assert mid == [(1, 1024, 16, 16)]


def test_sizes_and_work():
    "Parameters and operations of the full-size networks are those that the notebook and the README state"
    assert abs(count(meta(bottleneck=512, smooth=0)) - 54.4e6) < 0.05e6
    assert abs(count(meta(smooth=0)) - 62.8e6) < 0.05e6
    assert abs(count(meta(ngf=128, bottleneck=1024, smooth=0)) - 217.6e6) < 0.2e6
    assert abs(count(meta(form='double', smooth=0)) - 31e6) < 0.1e6

    def work(**kw):
        with FlopCounterMode(display=False) as f, torch.no_grad():
            meta(**kw)(torch.empty(1, 1, 256, 256, device='meta'))
        return f.get_total_flops() / 1e9

    assert abs(work(smooth=0) - 12.05) < 0.05
    assert abs(work(form='double', smooth=0) - 96.2) < 0.2


@pytest.mark.parametrize('size', (32, 64, 128))
def test_depth_follows_the_resolution(size):
    "A network for squares of 2**n pixels has n levels, and refuses a size that it cannot halve so often"
    net = make_generator(Pix2PixConfig(resolution=size, ngf=2)).train()
    assert len(net.downs) == int(math.log2(size))
    assert net(torch.rand(1, 1, size, size)).shape == (1, 3, size, size)  # a batch of one, in training mode
    assert 'multiples of' in error(lambda: net(torch.rand(1, 1, size, size - 2)))


def test_every_weight_is_used():
    "In every form of the generator each parameter gets a gradient"
    for kw in (
        dict(),
        dict(attention=True),
        dict(form='double', attention=True),
        dict(style=3),
        dict(norm='batch'),
        dict(norm='none'),
    ):
        net = make_generator(replace(toy, **kw))
        net(torch.rand(2, 1, 32, 32).round()).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters()), kw


def test_instance_norm_is_instance_norm():
    "GroupNorm with one channel a group gives what instance normalisation gives"
    norm = make_generator(toy).downs[1][2]
    x = torch.randn(2, 8, 6, 6)
    assert isinstance(norm, nn.GroupNorm)
    nn.init.ones_(norm.weight)
    assert norm(x).allclose(nn.functional.instance_norm(x), atol=1e-5)


def test_attention_gate_lets_through_a_share():
    "A gate scales the skip connection by one factor in 0..1 per pixel, which the signal decides"
    gate = AttentionGate(6)
    skip, signal = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    share = gate(skip, signal) / skip
    assert (share > 0).all()
    assert (share < 1).all()
    assert share.std(1).max() < 1e-4  # one factor per pixel
    assert not gate(skip, signal).equal(gate(skip, -signal))


def test_style_changes_the_page_and_takes_a_gradient():
    "Another code gives another page, none means zeros, and every number of a code has a gradient"
    torch.manual_seed(0)
    net = make_generator(replace(toy, style=5)).eval()
    m = torch.rand(2, 1, 32, 32).round()
    z = torch.randn(2, 5, requires_grad=True)
    assert not net(m, z).equal(net(m))
    assert net(m).equal(net(m, torch.zeros(2, 5)))
    net(m, z).square().sum().backward()
    assert (z.grad != 0).all()


def test_resize_convolution_leaves_fewer_dots():
    "Untrained, resize-convolutions leave less than half the checkerboard of transposed ones"

    def untrained(smooth):
        torch.manual_seed(0)
        net = make_generator(Pix2PixConfig(resolution=128, ngf=8, smooth=smooth)).eval()
        with torch.no_grad():
            return checkerboard_strength(
                net((nn.functional.avg_pool2d(torch.rand(6, 1, 136, 136), 9, 1) > 0.5).float())
            ).item()

    assert untrained(0) > 2 * untrained(4)


def test_activations_forgotten_gradients_kept(pages):
    "With checkpointing fewer activations are kept, and the gradients are the same"

    def one(**kw):
        torch.manual_seed(0)
        c = replace(toy, **kw)
        net, b = Pix2Pix(c), PairBatches(pages, 2, CropConfig(32))[0]

        def f(m, b):
            return pix2pix_phases(c)[1](m, b)

        torch.manual_seed(1)
        kept = kept_bytes(net, f, b)
        torch.manual_seed(1)
        f(net, b).backward()
        return kept, [p.grad for p in net.generator.parameters()]

    for form in ('stride', 'double'):
        (a, ga), (b, gb) = one(form=form), one(form=form, checkpointing=True)
        assert b < 0.8 * a
        assert all(x.allclose(y, atol=1e-5) for x, y in zip(ga, gb))


# --- losses


def test_losses_by_hand(pages):
    "The losses of both phases are those of the formulas, for every kind of loss"
    b = PairBatches(pages, 2, CropConfig(32))[0]
    for ls, fm, sn in ((False, 0.0, False), (True, 3.0, False), (False, 0.0, True)):
        torch.manual_seed(0)
        c = replace(toy, dropout=0.0, use_least_squares=ls, features=fm, use_spectral_norm=sn, lambda_l1=50.0)
        net = Pix2Pix(c).eval()
        made = net.generator(b['mask'])
        real, fake = (net.discriminator(torch.cat([b['mask'], x], 1)) for x in (b['image'], made))
        d = (
            ((real - 1) ** 2).mean() + (fake**2).mean()
            if ls
            else (1 + (-real).exp()).log().mean() + (1 + fake.exp()).log().mean()
        )
        g = (((fake - 1) ** 2).mean() if ls else (1 + (-fake).exp()).log().mean()) + 50 * (
            made - b['image']
        ).abs().mean()
        if fm:
            fs = [net.discriminator.features(torch.cat([b['mask'], x], 1)) for x in (made, b['image'])]
            g = g + fm * sum((x - y).abs().mean() for x, y in zip(*fs)) / 4
        phases = pix2pix_phases(c)
        assert abs(phases[0](net, b).item() - d.item()) < 1e-5
        assert abs(phases[1](net, b).item() - g.item()) < 1e-4
        phases[1](net, b).backward()
        assert all(p.grad is not None for p in net.generator.parameters())


def test_l1_of_means_lets_grain_pass():
    "With `l1_pool`, grain finer than the window costs nothing, and a wrong tone costs the same"
    board = torch.ones(1, 3, 8, 8)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1.0

    def net(k):
        return Pix2Pix(replace(toy, l1_pool=k))

    plain = torch.full((1, 3, 8, 8), 0.25)
    assert l1_loss(net(1), board, plain * 0, None).item() == 1.0
    assert l1_loss(net(2), board, plain * 0, None).item() == 0.0
    assert l1_loss(net(4), board, plain, None).item() == pytest.approx(0.25)
    assert 'l1_pool' in error(lambda: replace(toy, l1_pool=0))


def test_noise_of_a_style_is_given_or_drawn_and_unknown_without():
    "Given noise decides the image; else torch draws it; a network without styles has none"
    torch.manual_seed(0)
    net = make_generator(replace(toy, style=5)).eval()
    m, z, w = torch.rand(2, 1, 32, 32).round(), torch.randn(2, 5), torch.randn(2, 3, 32, 32)
    assert net(m, z, w).equal(net(m, z, w))
    assert not net(m, z).equal(net(m, z))
    assert not net(m, z, w).equal(net(m, z, w * 0))
    torch.manual_seed(3)
    a = net(m, z)
    torch.manual_seed(3)
    assert net(m, z).equal(a)
    assert make_generator(toy).eval().modulation is None


def test_grain_of_every_size_has_no_lattice():
    "Grain of each size has the strength that was asked for, mean 0, and no checkerboard"
    torch.manual_seed(0)
    modulation, noise = StyleModulation(3, [4]), torch.randn(16, 3, 128, 128)
    z = torch.zeros(16, 3)
    with torch.no_grad():
        for k in range(4):
            modulation.noise_strength.bias.zero_()[3 * k : 3 * k + 3] = 0.5
            g = modulation.grain(z, noise)
            assert g.std().item() == pytest.approx(0.5, rel=0.05)
            assert checkerboard_strength(g).item() < 1.5
            assert g.mean().abs() < 0.05
        lattice = nn.functional.interpolate(nn.functional.avg_pool2d(noise, 4) * 4, scale_factor=4.0).abs()
        assert checkerboard_strength(lattice * (torch.arange(128) % 4 == 0)).item() > 1.5


def test_spectral_norm_takes_the_place_of_norms():
    "With spectral normalisation the discriminator has no other norms, and its matrices have norm 1"
    net = Pix2Pix(replace(toy, use_spectral_norm=True)).train()
    assert not any(isinstance(m, nn.GroupNorm) for m in net.discriminator.modules())
    assert any(isinstance(m, nn.GroupNorm) for m in Pix2Pix(toy).discriminator.modules())
    for _ in range(30):
        net.discriminator(torch.randn(1, 4, 32, 32))
    convs = [m for m in net.discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 5
    assert all(abs(torch.linalg.matrix_norm(m.weight.flatten(1), 2) - 1) < 0.1 for m in convs)


def test_feature_matching_is_zero_for_the_real_image_alone(pages):
    "Features of the real image cost nothing, those of another one something"
    b = PairBatches(pages, 2, CropConfig(32))[0]
    net = Pix2Pix(toy)
    assert feature_matching_loss(net, b['image'], b['image'], b['mask']) == 0
    assert feature_matching_loss(net, b['image'] * 0.5, b['image'], b['mask']) > 0


# --- growing


def test_growing_network():
    "A network in a coarse stage uses its inner levels alone; while fading in it mixes the coarse and the fine image"
    torch.manual_seed(0)
    net = make_generator(Pix2PixConfig(resolution=64, ngf=4, dropout=0.0), stages=2).eval()
    g = net.heads
    m = torch.rand(1, 1, 64, 64).round()
    half, small = (nn.functional.avg_pool2d(m, k) for k in (2, 4))
    g.move_to(1, 1.0)
    coarse = net(half)
    assert coarse.shape[-1] == 32
    g.move_to(0, 0.0)
    assert net(m).allclose(
        nn.functional.interpolate(coarse, scale_factor=2.0), atol=1e-5
    )  # not yet faded in: the old image, doubled
    g.move_to(0, 1.0)
    full = net(m)
    g.move_to(0, 0.999)
    assert net(m).allclose(full, atol=0.01)
    assert not net(m).equal(full)
    g.move_to(2, 1.0)
    assert net(small).shape[-1] == 16
    coarse = net(small)
    g.move_to(1, 0.0)
    assert net(half).allclose(nn.functional.interpolate(coarse, scale_factor=2.0), atol=1e-5)
    used = []
    for at in ((2, 1.0), (1, 0.5), (0, 1.0)):
        net.zero_grad()
        g.move_to(*at)
        net(nn.functional.avg_pool2d(m, 2 ** at[0]) if at[0] else m).sum().backward()
        used.append(sum(p.grad is not None for p in net.downs.parameters()))
    assert used[0] < used[1] < used[2]
    assert 'coarser stages' in error(lambda: make_generator(toy, 5))
    assert "form='stride'" in error(lambda: make_generator(replace(toy, form='double'), 1))


def test_stages_of_one_run(tmp_path, pages):
    "The stage and the mixture follow from the step, in the network and in its average"
    seen = []

    class Record(Callback):
        order = 50

        def before_batch(self, learn):
            seen.append((learn.net.position, learn.ema.position))

        def after_loss(self, learn):
            seen[-1] += (learn.loss_fn[1].start.shape[-1],) if learn.phase else ()

    c = replace(toy, resolution=64)
    data = PairBatches(pages[:2], 4, CropConfig(64))
    per = len(data)
    train_pix2pix(
        tmp_path,
        data,
        c,
        stages=[ResolutionStage(32, 2), ResolutionStage(64, 4, 2)],
        ema=0.9,
        callbacks=[Record()],
        **quick,
    )
    assert per == 1
    want = [(1, 1.0), (1, 1.0), (0, 0.0), (0, 0.5), (0, 1.0), (0, 1.0)]
    assert [s[0] for s in seen] == want
    assert [s[1] for s in seen] == want
    assert [s[2] for s in seen] == [32, 32, 64, 64, 64, 64]
    assert [r['resolution'] for r in read_history(tmp_path / 'speed.csv')] == [32, 32, 64, 64, 64, 64]


def test_one_resolution_after_the_other(tmp_path, pages):
    torch.manual_seed(0)
    net, data = Pix2Pix(replace(toy, resolution=64), stages=1), PairBatches(pages, 4, CropConfig(64))
    first = {k: v.clone() for k, v in net.state_dict().items()}
    train_at_resolution(net, tmp_path / '32', data, resolution=32, epochs=1, ema=0.0, **quick)
    assert net.position == (1, 1.0)
    assert net.state_dict()['generator.downs.0.0.weight'].equal(first['generator.downs.0.0.weight'])
    assert not net.state_dict()['generator.downs.3.1.weight'].equal(first['generator.downs.3.1.weight'])
    train_at_resolution(net, tmp_path / '64', data, resolution=64, epochs=2, fade_in_epochs=1, ema=0.0, **quick)
    assert net.position == (0, 1.0)
    assert not net.state_dict()['generator.downs.0.0.weight'].equal(first['generator.downs.0.0.weight'])
    assert 'its stages are 32, 64' in error(lambda: train_at_resolution(net, tmp_path / 'no', data, 128, 1))
    assert 'must double' in error(lambda: check_stages([ResolutionStage(32), ResolutionStage(32)], toy))
    assert 'too small' in error(lambda: check_stages([ResolutionStage(16), ResolutionStage(32)], toy))
    assert 'at least one' in error(lambda: check_stages([ResolutionStage(32, 0)], toy))
    assert 'must double' in error(lambda: check_stages([], toy))


# --- training


@pytest.mark.parametrize('progressive', (False, True))
def test_resume_to_the_same_bits(tmp_path, pages, progressive):
    "A run that is cut and resumed ends with the files of one that was not; another seed gives others"
    c = replace(
        toy,
        resolution=64 if progressive else 32,
        diffaug='color,translation,cutout',
        r1=1.0,
        features=1.0,
        attention=True,
        use_spectral_norm=not progressive,
    )
    data = PairBatches(pages[:2], 4, CropConfig(c.resolution))
    stages = [ResolutionStage(32, 3), ResolutionStage(64, 4, 2)] if progressive else [ResolutionStage(32, 2)]

    def run(name, **kw):
        return train_pix2pix(tmp_path / name, data, c, stages=stages, held_out=pages[2:], ema=0.9, **quick, **kw)

    whole = run('whole')
    half = whole.step // 3
    run('cut', callbacks=[StopAt(half)])
    assert load_checkpoint(tmp_path / 'cut' / 'latest.safetensors')[1]['step'] == half < whole.step
    run('cut', resume='latest')
    for f in ('latest.safetensors', 'generator.safetensors', 'best.safetensors', 'history.csv', 'statistics.csv'):
        assert (tmp_path / 'cut' / f).read_bytes() == (tmp_path / 'whole' / f).read_bytes(), f
    run('twin')
    assert (tmp_path / 'twin' / 'latest.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'latest.safetensors'
    ).read_bytes()
    run('other', seed=1)
    assert (tmp_path / 'other' / 'generator.safetensors').read_bytes() != (
        tmp_path / 'whole' / 'generator.safetensors'
    ).read_bytes()
    names = load_checkpoint(tmp_path / 'whole' / 'latest.safetensors')[0].keys()
    assert all(
        any(n.startswith(p) for n in names)
        for p in ('model.generator.', 'model.discriminator.', 'ema.generator.', 'opt.0.')
    )


def test_settings_reach_the_learner(tmp_path, pages):
    "Settings of the loop and the fall of the rate arrive where training uses them"
    data = PairBatches(pages, 1, CropConfig(32))
    rates = []

    class Record(Callback):
        order = 60

        def before_batch(self, learn):
            rates.append((learn.lr, learn.opt.param_groups[0]['lr'], learn.opt.param_groups[1]['lr']))

    learn = train_pix2pix(
        tmp_path,
        data,
        toy,
        epochs=2,
        accumulate=3,
        clip=0.5,
        lr=1e-3,
        callbacks=[Record()],
        **(quick | dict(precision='bf16-mixed')),
    )
    n = 2 * (len(data) // 3)
    want = [1e-3 * min(1.0, (n - i) / (n / 2)) for i in range(n)]
    assert learn.step == n == len(rates)
    assert learn.taken == 3 * n
    for (a, b, c), w in zip(rates, want):
        assert abs(a - w) < 1e-12
        assert a == b == c
    assert learn.config.clip == 0.5
    assert learn.config.precision == 'bf16-mixed'
    assert all(p.dtype == torch.float32 for p in learn.net.parameters())
    b = learn.opt.param_groups[0]['betas']
    assert b == (0.5, 0.999)
    assert [LinearDecay(1.0).factor(i, 10) for i in (0, 9)] == [1.0, 1.0]


@pytest.mark.parametrize(
    'kw, stages',
    [
        (dict(), ()),
        (dict(form='double'), ()),
        (dict(resolution=64), (ResolutionStage(32, 3), ResolutionStage(64, 4, 2))),
    ],
)
def test_styles_come_with_the_batch(tmp_path, pages, kw, stages):
    c = replace(toy, style=2, **kw)
    data = PairBatches(pages[:2], 4, CropConfig(c.resolution))
    seen = []

    def styles(batch):
        seen.append(len(batch['image']))
        return torch.stack([batch['image'].mean((1, 2, 3)), batch['mask'].mean((1, 2, 3))], 1)

    def run(name, styles, **more):
        return train_pix2pix(
            tmp_path / name,
            data,
            c,
            4,
            stages,
            styles=styles,
            held_out=pages[2:],
            ema=0.9,
            **quick | dict(precision='bf16-mixed') | more,
        )

    learn = run('a', styles, callbacks=[StopAt(2)])
    assert set(seen) == {4}
    assert len(seen) > 2
    assert all(
        (learn.opt.optimizer.state[p]['exp_avg'] != 0).any()
        for p in learn.net.generator.modulation.paper_and_ink.parameters()
    )
    run('a', styles, resume='latest')
    run('b', styles)
    run('without', None)
    files = [(tmp_path / n / 'generator.safetensors').read_bytes() for n in ('a', 'b', 'without')]
    assert files[0] == files[1] != files[2]


def test_fewer_pages_than_a_batch(tmp_path, pages):
    "One page is enough for batches of sixteen crops"
    learn = train_pix2pix(tmp_path, pages[:1], toy, epochs=2, batch_size=16, **quick)
    assert learn.step == 2
    assert (tmp_path / 'samples' / 'epoch-0002.png').exists()


def test_a_generator_of_one_s_own(tmp_path, pages):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.attention, self.decoder = (
                nn.Conv2d(1, 4, 3, padding=1),
                AttentionGate(4),
                nn.Conv2d(4, 3, 3, padding=1),
            )

        def forward(self, x):
            h = self.encoder(x)
            return torch.tanh(self.decoder(self.attention(h, h)))

    torch.manual_seed(0)
    own = Own()
    before = own.encoder.weight.clone()
    train_pix2pix(tmp_path, pages, toy, epochs=1, generator=own, ema=0.0, **quick)
    assert not own.encoder.weight.equal(before)
    back = load_pix2pix(tmp_path / 'generator.safetensors', generator=Own())
    assert back.encoder.weight.equal(own.encoder.weight)
    assert 'trained with the generator Own' in error(lambda: load_pix2pix(tmp_path / 'generator.safetensors'))
    assert 'it must be (1, 3, 32, 32)' in error(
        lambda: train_pix2pix(tmp_path / 'x', pages, toy, generator=nn.Conv2d(1, 1, 1), **quick)
    )
    assert 'Progressive' in error(
        lambda: train_pix2pix(
            tmp_path / 'x',
            pages,
            replace(toy, resolution=64),
            stages=[ResolutionStage(32), ResolutionStage(64)],
            generator=Own(),
            **quick,
        )
    )


def test_checkpoints_open_and_faults_are_one_line(tmp_path, pages):
    learn = train_pix2pix(tmp_path, pages, toy, epochs=1, ema=0.5, **quick)
    m = torch.rand(1, 1, 32, 32).round()
    with torch.no_grad():
        want = learn.ema.generator.eval()(m)
        for f in ('generator', 'best', 'latest'):
            assert load_pix2pix(tmp_path / f'{f}.safetensors')(m).equal(want), f
        torch.save(learn.ema.generator.state_dict(), tmp_path / 'g.pth')
        assert load_pix2pix(tmp_path / 'g.pth', toy)(m).equal(want)
    assert 'do not fit' in error(lambda: load_pix2pix(tmp_path / 'g.pth', replace(toy, ngf=5)))
    torch.save(learn.ema.generator, tmp_path / 'evil.pth')
    assert 'without running code' in error(lambda: load_pix2pix(tmp_path / 'evil.pth', toy))
    torch.save(dict(epoch=3, weights={}), tmp_path / 'more.pth')
    assert 'no state dict' in error(lambda: load_pix2pix(tmp_path / 'more.pth', toy))
    assert 'not found' in error(lambda: load_pix2pix(tmp_path / 'no.pth'))
    assert 'not found' in error(lambda: load_pix2pix(tmp_path / 'no.safetensors'))
    save_checkpoint(tmp_path / 'ctc.safetensors', dict(w=torch.ones(1)), dict(model='ctc'))
    assert 'not of pix2pix' in error(lambda: load_pix2pix(tmp_path / 'ctc.safetensors'))
    for bad in (
        dict(form='unet'),
        dict(norm='layer'),
        dict(resolution=48),
        dict(dropout=1.0),
        dict(levels=6),
        dict(ngf=0),
        dict(lambda_l1=-1.0),
    ):
        error(lambda: replace(toy, **bad))
    assert 'did you mean' in error(lambda: configure(Pix2PixConfig, dict(lambda_L1=1.0)))
    assert 'give crops of that size' in error(
        lambda: train_pix2pix(tmp_path / 'x', PairBatches(pages, 1, CropConfig(48)), toy, **quick)
    )
    assert not (tmp_path / 'x').exists()


def test_nan_keeps_the_last_good_checkpoint(tmp_path, pages):
    "A loss that is no number ends the run in one line, and leaves finite weights on disk"
    data = PairBatches(pages, 1, CropConfig(32))
    good = data.batches

    def with_nan(n=0):
        for i, b in enumerate(good(n), n):
            yield dict(b, image=b['image'] * math.nan) if i >= 6 else b

    data.batches = with_nan
    assert 'lower lr' in error(lambda: train_pix2pix(tmp_path, data, toy, epochs=9, save_every=2, **quick))
    tensors, header = load_checkpoint(tmp_path / 'latest.safetensors')
    assert header['step'] >= 6
    assert all(v.isfinite().all() for k, v in tensors.items() if v.is_floating_point())


def test_out_of_memory_names_the_settings(tmp_path, pages):
    "Where memory is short even for one square, the error names the settings of Pix2Pix that help"

    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, m):
            if torch.is_grad_enabled() and m.shape[0]:
                raise torch.OutOfMemoryError('CUDA out of memory')
            return torch.tanh(m + self.w)

    e = error(lambda: train_pix2pix(tmp_path, pages, toy, epochs=1, batch_size=2, generator=Huge(), **quick))
    assert 'Out of memory at step 1' in e
    assert 'set checkpointing to True (now False)' in e
    assert 'ngf (now 4)' in e


def test_memorises_one_pair(tmp_path):
    "A small network learns one page nearly by heart, better than two flat colours would do"
    (page,) = rendered_pairs(
        words,
        [noto],
        1,
        seed=5,
        shape=(64, 64),
        size=(18, 20),
        degradation=[('paper', 1.0), ('contrast', 1.0), ('light', 1.0)],
    )
    c = Pix2PixConfig(
        resolution=64, ngf=12, ndf=8, dropout=0.0, smooth=1, use_spectral_norm=True, use_least_squares=True
    )
    train_pix2pix(tmp_path, [page], c, epochs=200, lr=2e-3, ema=0.98, samples_every=1000, **quick)
    image = generate_tiled(load_pix2pix(tmp_path / 'generator.safetensors'), page.mask, tile=64, overlap=0)

    def as_tensor(a):
        return torch.from_numpy(a).float().permute(2, 0, 1)[None] / 127.5 - 1

    assert similarity(as_tensor(image), as_tensor(page.image)) > 0.95
    flat = (
        np.where(page.mask[..., None] > 0, page.image[page.mask > 0].mean(0), page.image[page.mask == 0].mean(0))
        .round()
        .astype(np.uint8)
    )
    assert similarity(as_tensor(flat), as_tensor(page.image)) < 0.9  # two flat colours would not have done


OLD_NAMES = dict(
    heads='growing',
    from_mask='enter',
    to_rgb='leave',
    modulation='tuning',
    paper_and_ink='both',
    noise_strength='strengths',
)


def with_old_names(weights):
    "A state dict of a Pix2Pix with the names that its parameters had before"
    return {'.'.join(OLD_NAMES.get(part, part) for part in key.split('.')): v for key, v in weights.items()}


@pytest.mark.parametrize('kw, stages', [(dict(style=3), 1), (dict(style=3, form='double'), 0)])
def test_generators_saved_by_earlier_versions_open(tmp_path, kw, stages):
    "Weights with the names of earlier versions give the same images"
    config = replace(toy, **kw)
    torch.manual_seed(0)
    net = Pix2Pix(config, stages=stages).eval()
    old = with_old_names(net.state_dict())
    assert any('tuning.both' in key for key in old)
    header = dict(model='pix2pix', config=asdict(config), stages=stages, generator='UNet', kind='weights')
    whole, alone = tmp_path / 'latest.safetensors', tmp_path / 'generator.safetensors'
    save_checkpoint(whole, {f'model.{key}': v for key, v in old.items()}, header | dict(kind='training'))
    generator = {key.removeprefix('generator.'): v for key, v in old.items() if key.startswith('generator.')}
    save_checkpoint(alone, generator, header)
    mask, style, noise = torch.rand(1, 1, 32, 32).round(), torch.randn(1, 3), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for path in (whole, alone):
            assert load_pix2pix(path)(mask, style, noise).equal(net.generator(mask, style, noise))
    again = Pix2Pix(config, stages=stages)
    again.load_state_dict(old)  # as a resumed training does
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))


def test_no_batch_is_kept_on_the_network(pages):
    "A step leaves no attribute of its batch on the network"
    net = Pix2Pix(replace(toy, style=2))
    batch = PairBatches(pages, 2, CropConfig(32))[0] | dict(style=torch.randn(2, 2))
    before = set(vars(net))
    pix2pix_phases(net.config)[1](net, batch)
    assert set(vars(net)) == before


# --- pages


def test_tiles_equal_the_whole_for_a_small_receptive_field():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, 3, 5, padding=2), nn.Tanh())
    mask = np.random.default_rng(0).integers(0, 2, (97, 301)).astype(np.uint8) * 255
    with torch.no_grad():
        whole = (
            (net(torch.from_numpy(mask).float()[None, None] / 255)[0].permute(1, 2, 0).numpy() + 1) * 127.5
        ).round()
    for tile, overlap, b in ((64, 32, 1), (80, 36, 7), (100, 33, 3)):
        got = generate_tiled(net, mask, tile, overlap, b)
        assert got.shape == (97, 301, 3)
        assert got.dtype == np.uint8
        assert np.abs(got[4:-4, 4:-4].astype(int) - whole[4:-4, 4:-4]).max() <= 1
    rough = generate_tiled(net, mask, 32, 0)
    assert np.abs(rough[4:-4, 4:-4].astype(int) - whole[4:-4, 4:-4]).max() > 3  # without overlap it does not


class ToneByInk(nn.Module):
    "A grey for each square that depends on all of its mask, as norms and bottlenecks do"

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, m):
        return (m.mean((1, 2, 3), keepdim=True) * 4 - 1).clamp(-1, 1).expand(-1, 3, *m.shape[2:]) * self.w


def test_squares_of_different_tone_fade_into_each_other():
    mask = np.zeros((64, 640), np.uint8)
    mask[:, 200:330] = 255
    mask[::3, 450:] = 255

    def steps(overlap):
        return np.abs(np.diff(generate_tiled(ToneByInk(), mask, 64, overlap)[32, :, 0].astype(int))).max()

    assert steps(0) > 200
    assert steps(32) < 20


@pytest.mark.parametrize('shape', ((1, 1), (40, 3000), (300, 20), (256, 256), (257, 511)))
def test_any_size_of_page(shape):
    "A page smaller than a square, or of an odd size, comes out in its own size"
    net = make_generator(replace(toy, ngf=2))
    mask = (np.indices(shape).sum(0) % 7 == 0).astype(np.uint8) * 255
    got = generate_tiled(net, mask, 32, 8, 8)
    assert got.shape == (*shape, 3)
    assert (got == generate_tiled(net, mask, 32, 8, 8)).all()
    assert np.abs(got.astype(int) - generate_tiled(net, mask, 32, 8, 3)).max() <= 1
    assert 'half the tile' in error(lambda: generate_tiled(net, mask, 32, 17))
    assert 'height and width' in error(lambda: generate_tiled(net, mask[None], 32, 8))


def test_noise_by_seed_and_the_rest_untouched():
    torch.manual_seed(0)
    net = make_generator(Pix2PixConfig(resolution=32, ngf=8)).train()
    mask = np.kron(np.eye(4), np.ones((20, 20))).astype(np.uint8) * 255
    state = torch.get_rng_state()
    a, b, c, plain = (
        generate_tiled(net, mask, 32, 8, noise=n, seed=s) for n, s in ((True, 1), (True, 1), (True, 2), (False, 1))
    )
    assert (a == b).all()
    assert (a != c).any()
    assert (a != plain).any()
    assert net.training
    assert torch.get_rng_state().equal(state)


def test_generates_with_weights_of_16_bits():
    torch.manual_seed(0)
    net = make_generator(Pix2PixConfig(resolution=32, ngf=8)).eval()
    mask = np.kron(np.eye(4), np.ones((20, 20))).astype(np.uint8) * 255
    full, half = (
        generate_tiled(net, mask, 32, 8).astype(int),
        generate_tiled(net.to(torch.bfloat16), mask, 32, 8).astype(int),
    )
    assert np.abs(full - half).max() < 12
    assert np.abs(full - half).mean() < 2 < full.std()
