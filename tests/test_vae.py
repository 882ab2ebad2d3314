"The VAE: shapes of both forms, losses by hand, resuming to the same bits, seeds, the use of codes, and errors."

import math
import numpy as np
import pytest
import torch
from dataclasses import replace
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.generative.artifacts import pair_distance
from khmer_ocr.training.callbacks import Callback, CancelFit, read_history
from khmer_ocr.training.checkpoints import load_checkpoint, save_checkpoint
from khmer_ocr.generative.pairs import CropConfig, PairBatches, as_batch, rendered_pairs
from khmer_ocr.generative.tiling import generate_tiled
from khmer_ocr.generative.pix2pix_training import similarity
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.core.config import configure
from khmer_ocr.generative.vae_training import (
    ELBO,
    FixedStyleVAE,
    interpolate,
    load_vae,
    reconstruct,
    sample,
    encode_styles,
    train_vae,
)
from khmer_ocr.generative.vae import (
    VAE,
    VAEConfig,
    active_units,
    beta_at,
    colour_stats,
    synthesise_grain,
    kl_loss,
    kl_per_unit,
    reparameterise,
    starlet,
    starlet_norms,
    log_band_std,
)

noto = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')
words = ['ភ្នំពេញ', 'សាលា', 'ខ្មែរ', 'ជាតិ']
toy = VAEConfig(resolution=32, width=4, latent=8, bands=2)
forms = dict(style=toy, conditional=replace(toy, conditional=True), plain=replace(toy, resolution=64, form='plain'))
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
        return VAE(VAEConfig(**kw))


def batch(pages, config, n=4, seed=1):
    return PairBatches(pages, n, CropConfig(config.resolution), seed)[0]


class StopAt(Callback):
    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step == self.n:
            raise CancelFit


# --- networks


def test_shapes_of_the_founding_document():
    "Codes of 512, features of 256 x 16 x 16, images of the size of the mask; grain only where it is asked for"
    net = meta(form='plain')
    mask, z = torch.empty(1, 1, 256, 256, device='meta'), torch.empty(1, 512, device='meta')
    assert [t.shape for t in net.encode(mask)] == [(1, 512)] * 2
    assert net.decoder.start(z).shape == (1, 256, 16, 16)
    assert net.decode(z).shape == (1, 3, 256, 256)
    net, image = meta(), torch.empty(1, 3, 256, 256, device='meta')
    assert net.decoder.downs(mask).shape == (1, 256, 16, 16)
    made, mu, logvar, scales = net(image, mask)
    assert (made.shape, mu.shape, logvar.shape, scales.shape) == (
        (1, 3, 256, 256),
        (1, 512),
        (1, 512),
        (1, 5, 3, 256, 256),
    )
    assert meta(bands=0)(image, mask)[3] is None
    assert meta(texture=0.0)(image, mask)[3] is None
    assert net.decode(z, torch.empty(1, 1, 48, 2000, device='meta')).shape == (1, 3, 48, 2000)


def test_sizes():
    "A network at full size has the stated number of parameters; a conditional encoder has one input channel more"
    assert count(meta()) == 2_679_994
    assert count(meta(form='plain')) == 40_994_435
    in_first_layer = 32 * 16
    share_of_ink = 256
    assert count(meta(conditional=True)) - count(meta()) == in_first_layer + share_of_ink


@pytest.mark.parametrize('name', forms)
def test_every_weight_is_used(name, pages):
    "In every form each parameter gets a finite gradient"
    torch.manual_seed(0)
    c = forms[name]
    net = VAE(c)
    b = batch(pages, c)
    ELBO(c)(net, b).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_an_untrained_decoder_ignores_the_code():
    "At the start the code changes hardly anything, and its distribution is near N(0, 1)"
    torch.manual_seed(0)
    net = VAE(replace(toy, latent=512))
    m = torch.rand(1, 1, 32, 32).round()
    with torch.no_grad():
        a, s = net.mean_and_grain(torch.randn(16, 512), m.expand(16, -1, -1, -1))
    assert a.std(0).max() < 0.1
    assert s.std(0).max() < 0.01
    with torch.no_grad():
        mu, logvar = net.encode(torch.rand(16, 3, 32, 32) * 2 - 1)
    assert mu.abs().max() < 0.5
    assert logvar.abs().max() < 0.5  # so the divergence is small at first


def test_the_code_holds_no_positions():
    "An image moved round its edges has the same colours, and nearly the same strengths"
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    m = torch.rand(2, 1, 64, 64).round()

    def to(t):
        return t.roll((8, 14), (2, 3))

    assert colour_stats(to(x)).allclose(colour_stats(x))
    assert colour_stats(to(x), to(m)).allclose(colour_stats(x, m), atol=1e-5)
    assert colour_stats(x).shape == (2, 12)
    assert colour_stats(x, m).shape == (2, 13)
    assert (log_band_std(to(x), 3) - log_band_std(x, 3)).abs().max() < 0.1
    assert log_band_std(x, 3).shape == (2, 9)


def test_starlet_bands():
    "The bands and the smooth rest add up to the image, and white noise has the strengths of the book"
    torch.manual_seed(0)
    x = torch.randn(1, 1, 128, 128)
    b = starlet(x, 4)
    assert b.shape == (1, 4, 1, 128, 128)
    assert b.std((0, 2, 3, 4)).allclose(starlet_norms(4), rtol=0.15)
    assert starlet(torch.ones(1, 1, 40, 40), 3).abs().max() < 1e-6  # nothing in what is even, up to the edge
    made = synthesise_grain(torch.full((1, 4, 3, 128, 128), -30.0), torch.randn(1, 3, 128, 128))
    assert made.abs().max() < 1e-8


# --- losses


def test_reparameterisation_by_hand():
    "z is mu + sigma * eps, and its gradient is 1 for mu and eps / 2 for the log-variance"

    def g():
        return torch.Generator().manual_seed(3)

    mu, logvar = torch.zeros(4, 5, requires_grad=True), torch.zeros(4, 5, requires_grad=True)
    z = reparameterise(mu, logvar, g())
    eps = torch.randn(4, 5, generator=g())
    assert z.equal(eps)
    assert reparameterise(mu + 1, logvar + math.log(4), g()).allclose(1 + 2 * eps)
    z.sum().backward()
    assert mu.grad.equal(torch.ones(4, 5))
    assert logvar.grad.allclose(eps / 2)


def test_divergence_and_free_bits():
    "The divergence is that of torch.distributions; below the free bits it has no gradient"
    mu, logvar = (
        torch.tensor([[1.0, 0.0, 3.0], [1.0, 0.0, 1.0]]),
        torch.tensor([[0.0, math.log(2), 0.0], [0.0, math.log(2), 0.0]]),
    )
    assert kl_per_unit(mu, logvar).allclose(torch.tensor([0.5, (2 - math.log(2) - 1) / 2, 2.5]))
    p, q = torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    assert kl_per_unit(mu, logvar).allclose(torch.distributions.kl_divergence(p, q).mean(0))
    assert abs(kl_loss(mu, logvar).item() - (0.5 + (1 - math.log(2)) / 2 + 2.5)) < 1e-6
    assert abs(kl_loss(mu, logvar, 1.0).item() - (1 + 1 + 2.5)) < 1e-6
    mu.requires_grad_()
    kl_loss(mu, logvar, 1.0).backward()
    assert mu.grad[:, 0].eq(0).all()
    assert mu.grad[:, 2].ne(0).all()  # nothing to be won below the free bits


def test_beta_rises_and_stays():
    "Beta rises in a straight line over the warm-up and then keeps its value"
    c = VAEConfig(beta=4.0, warmup=0.5)
    assert [beta_at(s, 40, c) for s in (0, 5, 10, 20, 39)] == [0.0, 1.0, 2.0, 4.0, 4.0]
    assert beta_at(0, 40, replace(c, warmup=0.0)) == 4.0
    assert beta_at(0, 1, c) == 0.0
    assert beta_at(39, 40, replace(c, warmup=1.0)) < 4.0


def test_active_units():
    "A unit counts as active when its mean varies over the data by more than 0.01"
    torch.manual_seed(0)
    mu = torch.randn(200, 6) * torch.tensor([1.0, 0.5, 0.2, 0.05, 0.01, 0.0]) + 7
    assert active_units(mu) == 3
    assert active_units(mu, 1e-3) == 4
    assert active_units(mu[:1]) == 0


@pytest.mark.parametrize('name', forms)
def test_loss_by_hand(name, pages):
    "The loss and its parts are those of the formulas, for every form"
    torch.manual_seed(0)
    c = replace(forms[name], beta=3.0, free_bits=0.01, texture=0.5)
    net = VAE(c).eval()
    b = batch(pages, c)
    loss = ELBO(c)
    got = loss(net, b)
    mu, logvar = net.encode(b['mask'] if net.plain else b['image'], b['mask'])
    made, scales = net.mean_and_grain(mu, b['mask'])
    want = ((made - b['image']) ** 2).sum() / 4 + 3 * ((mu**2 + logvar.exp() - logvar - 1) / 2).mean(0).clamp_min(
        0.01
    ).sum()
    if scales is not None:
        axes = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
        axes = axes / axes.norm(dim=1, keepdim=True)
        bands = starlet(torch.einsum('oc,bchw->bohw', axes, b['image'] - made), 2)
        floor = (starlet_norms(2) * 2 / 255 / 12**0.5)[:, None, None, None]
        want = want + 0.5 * (scales + (bands**2 + floor**2) / (2 * (2 * scales).exp())).sum() / 4
    assert abs(got.item() - want.item()) < 1e-4 * abs(want.item())
    assert abs(loss.measured['mse'].item() - ((made - b['image']) ** 2).mean().item()) < 1e-5
    kl = (mu**2 + logvar.exp() - logvar - 1) / 2
    assert abs(loss.measured['kl'].item() - kl.mean(0).sum().item()) < 1e-5


def test_the_mean_is_shaped_by_the_squared_error_alone(pages):
    "The weight of the grain changes the gradient of the grain and not that of the mean image"
    grads = []
    for texture in (0.1, 9.0):
        torch.manual_seed(0)
        c = replace(toy, texture=texture)
        net = VAE(c)
        torch.manual_seed(1)
        ELBO(c)(net, batch(pages, c)).backward()
        grads.append(
            (net.decoder.colours.weight.grad, net.decoder.out.weight.grad[:3], net.decoder.out.weight.grad[3:])
        )
    assert grads[0][0].equal(grads[1][0])
    assert grads[0][1].equal(grads[1][1])
    assert not grads[0][2].allclose(grads[1][2])


# --- training


@pytest.mark.parametrize('name', forms)
def test_resume_to_the_same_bits(name, tmp_path, pages):
    "A run that is cut and resumed ends with the files of one that was not; another seed gives others"
    c = replace(forms[name], free_bits=0.05)
    data = PairBatches(pages[:2], 2, CropConfig(c.resolution))

    def run(to, **kw):
        return train_vae(
            tmp_path / to, data, c, epochs=2 if c.resolution < 64 else 6, held_out=pages[2:], ema=0.9, **quick, **kw
        )

    whole = run('whole')
    at = whole.step // 2 - 1
    run('cut', callbacks=[StopAt(at)])
    assert load_checkpoint(tmp_path / 'cut' / 'latest.safetensors')[1]['step'] == at < whole.step
    run('cut', resume='latest')
    for f in ('latest.safetensors', 'vae.safetensors', 'best.safetensors', 'history.csv', 'elbo.csv'):
        assert (tmp_path / 'cut' / f).read_bytes() == (tmp_path / 'whole' / f).read_bytes(), f
    run('twin')
    assert (tmp_path / 'twin' / 'latest.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'latest.safetensors'
    ).read_bytes()
    run('other', seed=1)
    assert (tmp_path / 'other' / 'vae.safetensors').read_bytes() != (
        tmp_path / 'whole' / 'vae.safetensors'
    ).read_bytes()
    rows = read_history(tmp_path / 'cut' / 'elbo.csv')
    assert [r['step'] for r in rows] == list(range(1, whole.step + 1))
    assert [r['beta'] for r in rows] == [beta_at(i, whole.step, c) for i in range(whole.step)]
    assert {'mse', 'ssim', 'kl', 'active'} <= read_history(tmp_path / 'cut' / 'history.csv')[-1].keys()
    assert list((tmp_path / 'cut' / 'samples').glob('*.png'))


def test_collapse_shows_and_free_bits_prevent_it(tmp_path, pages):
    "A beta far too large leaves no active unit; with free bits some stay active"
    for name, bits in dict(collapsed=0.0, freed=2.0).items():
        train_vae(
            tmp_path / name,
            pages,
            replace(toy, beta=1e4, warmup=0.0, free_bits=bits),
            epochs=10,
            batch_size=2,
            lr=2e-3,
            **quick | dict(log_every=30),
        )
    collapsed, freed = (read_history(tmp_path / n / 'elbo.csv')[-1] for n in ('collapsed', 'freed'))
    assert collapsed['active'] == 0
    assert collapsed['kl'] < 0.2
    assert freed['active'] > 0
    assert freed['kl'] > 5 * collapsed['kl']


def test_fewer_pages_than_a_batch(tmp_path, pages):
    "One page is enough for batches of sixteen crops"
    learn = train_vae(tmp_path, pages[:1], toy, epochs=2, batch_size=16, **quick)
    assert learn.step == 2
    assert (tmp_path / 'samples' / 'epoch-0002.png').exists()


def test_memorises_one_pair(tmp_path):
    "A small VAE learns one page nearly by heart, better than two flat colours would do"
    (page,) = rendered_pairs(
        words,
        [noto],
        1,
        seed=5,
        shape=(64, 64),
        size=(18, 20),
        degradation=[('paper', 1.0), ('contrast', 1.0), ('light', 1.0)],
    )
    train_vae(
        tmp_path,
        [page],
        VAEConfig(resolution=64, width=12, latent=8, bands=0),
        epochs=300,
        batch_size=1,
        lr=4e-3,
        samples_every=1000,
        **quick | dict(log_every=100),
    )
    b = as_batch([(page.image, page.mask)])
    vae = load_vae(tmp_path / 'vae.safetensors')
    assert similarity(reconstruct(vae, b['image'], b['mask']), b['image']) > 0.95
    ink, paper = (page.image[w].mean(0) for w in (page.mask > 0, page.mask == 0))
    flat = np.where(page.mask[..., None] > 0, ink, paper).round().astype(np.uint8)
    assert similarity(as_batch([(flat, page.mask)])['image'], b['image']) < 0.9  # two flat colours would not have done
    image = generate_tiled(FixedStyleVAE(vae, encode_styles(vae, b['image'])), page.mask, tile=64, overlap=0)
    assert similarity(as_batch([(image, page.mask)])['image'], b['image']) > 0.9  # padded by paper, it is the same page


# --- what is done with codes


@pytest.mark.parametrize('name', forms)
def test_samples_codes_and_reconstructions(name, pages):
    "Shapes, ranges and seeds of sampling, reconstructing and interpolating; the global random state stays"
    torch.manual_seed(0)
    c = forms[name]
    vae = VAE(c).eval()
    b = batch(pages, c)
    s = c.resolution
    for p in vae.parameters():
        p.data += 0.02 * torch.randn_like(p)  # as if it had learnt to use its code
    state = torch.get_rng_state()
    m = b['mask'][:1]
    samples = sample(vae, m, 11, seed=1)
    assert samples.shape == (11, 3, s, s)
    assert samples.dtype == torch.float32
    assert samples.min() >= -1
    assert samples.max() <= 1
    assert samples.equal(sample(vae, m[0], 11, seed=1))
    assert samples.equal(sample(vae, m[0, 0], 11, seed=1))
    assert not samples.equal(sample(vae, m, 11, seed=2))
    assert sample(vae, m, 3, seed=1, spread=0.0).shape[0] == 3
    assert pair_distance(samples) > 0
    codes = encode_styles(vae, b['mask'] if vae.plain else b['image'], b['mask'])
    assert codes.shape == (4, 8)
    kept = reconstruct(vae, b['image'], b['mask'])
    assert kept.shape == (4, 3, s, s)
    assert kept.equal(reconstruct(vae, b['image'], b['mask']))
    rough = reconstruct(vae, b['image'], b['mask'], grain=True, seed=1)
    assert rough.equal(reconstruct(vae, b['image'], b['mask'], grain=True, seed=1))
    assert rough.equal(kept) == vae.plain
    way = interpolate(vae, m, codes[0], codes[1:2], n=5, seed=4)
    assert way.shape == (5, 3, s, s)
    assert way.equal(interpolate(vae, m, codes[0], codes[1], n=5, seed=4))
    with torch.no_grad():
        ends = [
            vae.decode(codes[i : i + 1], m, torch.randn(1, 3, s, s, generator=torch.Generator().manual_seed(4)))
            for i in (0, 1)
        ]
    assert way[:1].allclose(ends[0], atol=1e-5)
    assert way[-1:].allclose(ends[1], atol=1e-5)
    assert torch.get_rng_state().equal(state)
    assert vae.generate(b['mask']).shape == (4, 3, s, s)
    if vae.plain:
        assert sample(vae, None, 2).shape == (2, 3, s, s)


def test_a_style_fits_pages_of_any_size():
    "A fixed style fills any page; its grain depends on the seed, its mean does not"
    torch.manual_seed(0)
    vae = VAE(toy).eval()
    z = torch.randn(8)
    for shape in ((1, 1), (40, 700), (97, 33)):
        mask = (np.indices(shape).sum(0) % 7 == 0).astype(np.uint8) * 255
        a, b, mean = (
            generate_tiled(FixedStyleVAE(vae, z, g), mask, 32, 8, seed=s) for g, s in ((True, 1), (True, 2), (False, 1))
        )
        assert a.shape == (*shape, 3)
        assert (a == generate_tiled(FixedStyleVAE(vae, z), mask, 32, 8, seed=1)).all()
        assert (mean == generate_tiled(FixedStyleVAE(vae, z, False), mask, 32, 8, seed=5)).all()
        assert shape == (1, 1) or (a != b).any() and (a != mean).any()


# --- faults


def test_bad_settings_are_refused():
    "A setting out of range is an error that says so, and a misspelt one suggests the right name"
    for bad in (
        dict(form='vq'),
        dict(latent=0),
        dict(width=0),
        dict(beta=-1.0),
        dict(beta=math.nan),
        dict(free_bits=-1.0),
        dict(warmup=1.5),
        dict(resolution=48),
        dict(resolution=16),
        dict(bands=6),
        dict(form='plain', resolution=32),
        dict(form='plain', resolution=64, conditional=True),
    ):
        assert 'Setting' in error(lambda: replace(toy, **bad)), bad
    assert 'did you mean' in error(lambda: configure(VAEConfig, dict(latnt=5)))


def test_faults_are_one_line(tmp_path, pages):
    "Wrong arguments, crops and files are one-line errors, and nothing is written"
    torch.manual_seed(0)
    style, told, plain = (VAE(c).eval() for c in forms.values())
    b = batch(pages, toy)
    m = b['mask'][:1]
    z = torch.zeros(1, 8)
    assert 'give one beside the code' in error(lambda: sample(style, None, 1))
    assert 'at least one' in error(lambda: sample(style, m, 0))
    assert 'One mask' in error(lambda: sample(style, b['mask'], 2))
    assert 'One mask' in error(lambda: interpolate(style, b['mask'], z, z))
    assert 'multiples of 16' in error(lambda: style.decode(z, m[..., :20]))
    assert 'at least 16' in error(lambda: style.decode(z, m[..., :8]))
    assert 'conditional=True' in error(lambda: encode_styles(told, b['image']))
    assert '3 channels' in error(lambda: encode_styles(style, m))
    assert 'at least 32 x 32' in error(lambda: encode_styles(style, b['image'][..., :16]))
    assert 'not 1 x 32 x 32' in error(lambda: sample(plain, m, 1))
    assert 'form=style' in error(lambda: FixedStyleVAE(plain, z))
    assert '5 numbers' in error(lambda: FixedStyleVAE(style, torch.zeros(5)))
    assert 'no pairs' in error(lambda: train_vae(tmp_path / 'x', [], toy, **quick))
    assert 'give crops of that size' in error(
        lambda: train_vae(tmp_path / 'x', PairBatches(pages, 1, CropConfig(48)), toy, **quick)
    )
    save_checkpoint(tmp_path / 'ctc.safetensors', dict(w=torch.ones(1)), dict(model='ctc'))
    assert 'not of a VAE' in error(lambda: load_vae(tmp_path / 'ctc.safetensors'))
    assert 'not found' in error(lambda: load_vae(tmp_path / 'no.safetensors'))
    assert not (tmp_path / 'x').exists()


def test_every_checkpoint_opens(tmp_path, pages):
    "The averaged weights, the best and the latest checkpoint give the same images after one epoch"
    learn = train_vae(tmp_path, pages, toy, epochs=1, ema=0.5, **quick)
    m = batch(pages, toy)['mask'][:1]
    want = sample(learn.ema.eval(), m, 2)
    for f in ('vae', 'best', 'latest'):
        assert sample(load_vae(tmp_path / f'{f}.safetensors'), m, 2).equal(want), f


def test_nan_keeps_the_last_good_checkpoint(tmp_path, pages):
    "A loss that is no number ends the run in one line, and leaves finite weights on disk"
    data = PairBatches(pages, 1, CropConfig(32))
    good = data.batches

    def with_nan(n=0):
        for i, b in enumerate(good(n), n):
            yield dict(b, image=b['image'] * math.nan) if i >= 6 else b

    data.batches = with_nan
    e = error(lambda: train_vae(tmp_path, data, toy, epochs=9, save_every=2, **quick))
    assert 'lower lr' in e
    assert 'lower texture (now 0.02) or raise beta (now 1)' in e
    tensors, header = load_checkpoint(tmp_path / 'latest.safetensors')
    assert header['step'] >= 6
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())


def test_out_of_memory_names_the_settings(tmp_path, pages, monkeypatch):
    "Where memory is short even for one square, the error names the settings of the VAE that help"

    def full(self, z, mask=None):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(VAE, 'mean_and_grain', full)
    e = error(lambda: train_vae(tmp_path, pages, toy, epochs=1, batch_size=2, **quick))
    assert 'Out of memory at step 1, even with one square at a time' in e
    assert 'lower width (now 4) or resolution (now 32)' in e
