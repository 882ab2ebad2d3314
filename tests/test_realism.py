"The one face of the generators, founding document 002 as code, a choice that explains itself, and a learned look as a degradation whose label stays true."

import pickle, numpy as np, pytest, torch
from torch import nn
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.training.checkpoints import load_checkpoint, save_checkpoint
from khmer_ocr.generative.pairs import ImagePair, PairBatches, read_pairs, rendered_pairs, save_pairs
from khmer_ocr.generative.pix2pix import AttentionGate
from khmer_ocr.generative.learned_degradation import LearnedDegradation, _true, fold, optimise_for_inference, line_mask, unfold
from khmer_ocr.generative.painter import Look, choose_model, open_painter
from khmer_ocr.generative.synthetic_data import (
    SyntheticDataGenerator,
    as_mask,
    ink_iou,
    load_mask,
    paint_looks,
)
from khmer_ocr.generative.pairs import create_synthetic_dataloader
from khmer_ocr.synth.rendering import render
from khmer_ocr.core.errors import KhmerOCRError

noto = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')
words = ['ភ្នំពេញ', 'សាលា', 'ខ្មែរ', 'ជាតិ សាសនា']
quick = dict(verbose=False, precision='32-true', tensorboard=False)
small = dict(image_size=(32, 32), device='cpu', ngf=4, ndf=4)


def error(f):
    with pytest.raises(KhmerOCRError) as e:
        f()
    assert '\n' not in str(e.value)
    return str(e.value)


def rng(k):
    return np.random.default_rng(k)


def text_line(t, size=20):
    return 255 - np.pad(render(t, noto, size).ink, 5)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    save_pairs(folder, rendered_pairs(words, [noto], 3, seed=2, shape=(72, 90), size=(16, 20)))
    return folder


@pytest.fixture(scope='module')
def loader(data):
    return create_synthetic_dataloader(
        images_dir=data / 'images', masks_dir=data / 'masks', batch_size=4, image_size=(32, 32)
    )


@pytest.fixture(scope='module')
def pix2pix(tmp_path_factory, loader):
    g = SyntheticDataGenerator(model_type='pix2pix', out_dir=tmp_path_factory.mktemp('models'), **small)
    g.train_pix2pix(dataloader=loader, num_epochs=30, lr=0.002, lambda_l1=100.0, ema=0.9, **quick)
    return g


# --- which model


@pytest.mark.parametrize(
    'n, model', [(1, 'vae'), (3, 'vae'), (4, 'vae'), (5, 'pix2pix'), (14, 'pix2pix'), (15, 'hybrid'), (200, 'hybrid')]
)
def test_choice_by_size(n, model):
    assert choose_model(n).model == model


@pytest.mark.parametrize('need, model', [('fidelity', 'pix2pix'), ('diversity', 'vae'), ('balanced', 'hybrid')])
def test_choice_by_need_says_what_the_number_says(need, model):
    for n in (3, 8, 20):
        c = choose_model(n, need)
        by_size = choose_model(n).model
        assert (
            c.model == model
            and need in c.why
            and (f'it would be {by_size}' in c.why) == (by_size != model)
            and str(c).startswith(f'{model}: ')
        )
    assert 'did you mean diversity' in error(lambda: choose_model(4, 'divercity')) and 'at least one page' in error(
        lambda: choose_model(0)
    )


# --- the founding document's examples


def test_examples_of_the_document(tmp_path, data, capsys):
    dataloader = create_synthetic_dataloader(
        images_dir=data / 'images', masks_dir=data / 'masks', batch_size=4, image_size=(32, 32)
    )
    generator = SyntheticDataGenerator(
        model_type='pix2pix', device='cuda', image_size=(32, 32), out_dir=tmp_path / 'm', ngf=4, ndf=4
    )
    said = capsys.readouterr().err
    assert torch.cuda.is_available() or said == 'warning: no GPU was found, the CPU is used\n'
    generator.train_pix2pix(dataloader=dataloader, num_epochs=1, lr=0.0002, lambda_l1=100.0, **quick)
    original_masks = [load_mask(p) for p in sorted((data / 'masks').glob('*.png'))]
    mask_tensors = [torch.from_numpy(mask).float() for mask in original_masks]
    torch.save(generator.painter.net.state_dict(), tmp_path / 'generator_final.pth')
    synthetic_data = generator.generate_synthetic_data(
        input_masks=mask_tensors,
        num_variations=2,
        output_dir=tmp_path / 'synthetic_output',
        model_path=tmp_path / 'generator_final.pth',
    )
    assert len(synthetic_data) == 6 and len(list((tmp_path / 'synthetic_output' / 'images').glob('*.png'))) == 6
    high_quality_samples = []
    for mask in original_masks[:1]:
        candidates = generator.generate_variations(mask, num_candidates=3)
        high_quality_samples += [c for c in candidates if ink_iou(c, mask) >= 0]
    assert len(high_quality_samples) == 3
    generator.visualize_generation(
        input_mask=original_masks[0], num_samples=2, save_path=tmp_path / 'training_progress.png'
    )
    generator.plot_training_curves(show_discriminator=True, show_generator=True, save_path=tmp_path / 'loss_curves.png')
    assert (
        load_mask(tmp_path / 'training_progress.png').shape
        == (original_masks[0].shape[0] + 4, 3 * (original_masks[0].shape[1] + 2) + 2)
        and (tmp_path / 'loss_curves.png').stat().st_size > 1000
    )


def test_unstable_poor_and_small_as_the_document_mends_them(tmp_path, loader):
    generator = SyntheticDataGenerator(
        model_type='pix2pix', learning_rate=0.0001, lambda_l1=200.0, out_dir=tmp_path, **small
    )
    generator.use_spectral_norm = True
    learn = generator.train_pix2pix(loader, 1, **quick)
    assert (
        learn.config.lr == 1e-4
        and learn.net.config.lambda_l1 == 200.0
        and learn.net.config.use_spectral_norm
        and any('parametrizations' in k for k in learn.net.discriminator.state_dict())
    )
    learn = generator.train_pix2pix(num_epochs=2, lambda_l1=50.0, use_least_squares=True, **quick)  # the same data
    assert (
        learn.net.config.lambda_l1 == 50.0
        and learn.net.config.loss == 'lsgan'
        and learn.config.steps == 2 * len(loader)
    )
    g = SyntheticDataGenerator(batch_size=2, gradient_accumulation=4, out_dir=tmp_path / 'b', **small)
    learn = g.train_pix2pix(loader.pairs, 1, **quick)
    assert learn.config.accumulate == 4 and g.pairs.batch_size == 2 and learn.config.steps == max(1, len(g.pairs) // 4)


def test_progressive_calls(tmp_path, loader):
    generator = SyntheticDataGenerator(out_dir=tmp_path, **small | dict(image_size=(128, 128), ngf=2, ndf=2))
    data = PairBatches(loader.pairs, 2, type(loader.crops)(128))
    seen = []
    for resolution in (32, 64, 128):
        learn = generator.train_at_resolution(
            resolution=resolution, epochs=2, fade_in_epochs=1, dataloader=data, **quick
        )
        seen.append(
            (generator.growing.generator.growing.at[0], learn.shown['resolution'], generator.painter.resolution)
        )
    assert seen == [(2, 32, 32), (1, 64, 64), (0, 128, 128)] and generator.growing.generator.growing.at == (0, 1.0)
    assert generator.generate_variations(loader.pairs[0].mask, 1)[0].shape == loader.pairs[0].image.shape
    assert 'does not lead to' in error(
        lambda: SyntheticDataGenerator(out_dir=tmp_path / 'x', **small).train_at_resolution(24, 1, 0, loader)
    )


def test_custom_generator_with_attention(tmp_path, loader):
    class CustomGenerator(nn.Module):
        def __init__(self, input_nc=1, output_nc=3, ngf=4):
            super().__init__()
            self.encoder, self.attention_gates, self.decoder = (
                nn.Conv2d(input_nc, ngf, 3, padding=1),
                AttentionGate(ngf),
                nn.Conv2d(ngf, output_nc, 3, padding=1),
            )

        def forward(self, x):
            h = self.encoder(x)
            return torch.tanh(self.decoder(self.attention_gates(h, h)))

    own = CustomGenerator()
    before = own.attention_gates.map.weight.clone()
    g = SyntheticDataGenerator(generator=own, out_dir=tmp_path, **small)
    g.train_pix2pix(loader, 1, **quick)
    assert not own.attention_gates.map.weight.equal(before)
    g2 = SyntheticDataGenerator(generator=CustomGenerator(), out_dir=tmp_path / '2', **small).load(
        tmp_path / 'pix2pix' / 'generator.safetensors'
    )
    m = loader.pairs[0].mask
    assert (g.generate_variations(m, 1)[0] == g2.generate_variations(m, 1)[0]).all()


def test_quality_at_each_checkpoint_and_stop_on_convergence(tmp_path, loader):
    g = SyntheticDataGenerator(out_dir=tmp_path, **small)
    learn = g.train_pix2pix(loader, 50, lr=1e-9, patience=2, save_every=2, eval_every=2, ema=0.0, **quick)
    assert learn.stopping.startswith('no better score') and learn.step < learn.config.steps
    rows = [r for r in learn.history if 'ssim' in r]
    assert [r['step'] for r in rows] == list(range(2, learn.step + 1, 2))
    held = g.train_pix2pix(
        loader, 1, held_out=rendered_pairs(words, [noto], 1, seed=9, shape=(72, 90), size=(16, 18)), **quick
    )
    assert held.metrics['l1'] != learn.metrics['l1']


def test_resumed_to_the_same_bits(tmp_path, loader):
    def run(name, *resumes):
        for steps, resume in resumes:
            SyntheticDataGenerator(out_dir=tmp_path / name, **small).train_pix2pix(
                loader, 2, resume=resume, eval_every=99, save_every=2, steps=steps, decay=1.0, **quick
            )
        return load_checkpoint(tmp_path / name / 'pix2pix' / 'latest.safetensors')[0]

    a, b = run('whole', (4, None)), run('parts', (2, None), (4, 'latest'))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(model_type='pixpix'), 'did you mean pix2pix?'),
        (dict(image_size=(256, 128)), 'must be a square'),
        (dict(image_size=48), 'power of two'),
        (dict(nfg=3), 'did you mean ngf?'),
        (dict(device='tpu'), 'auto, cpu or cuda'),
        (dict(lambda_l1=-1), 'must not be negative'),
    ],
)
def test_bad_settings(kw, word):
    assert word in error(lambda: SyntheticDataGenerator(**kw))


def test_bad_data(tmp_path, data, loader, pix2pix):
    g = SyntheticDataGenerator(out_dir=tmp_path / 'm', **small)
    assert 'nothing to train on' in error(
        lambda: g.train_pix2pix()
    ) and 'give one of create_synthetic_dataloader' in error(lambda: g.train_pix2pix('folder'))
    assert 'no trained generator yet' in error(
        lambda: g.generate_variations(np.zeros((9, 9)))
    ) and 'train first' in error(lambda: g.plot_training_curves())
    (tmp_path / 'none').mkdir()
    assert f'No images found in {tmp_path / "none"}' in error(
        lambda: create_synthetic_dataloader(tmp_path / 'none', data / 'masks')
    )
    assert 'no masks to paint' in error(
        lambda: pix2pix.generate_synthetic_data([], output_dir=tmp_path / 'o')
    ) and 'at least 1' in error(lambda: pix2pix.generate_variations(np.ones((9, 9)), 0))
    save_checkpoint(tmp_path / 'ctc.safetensors', dict(w=torch.ones(1)), dict(model='ctc'))
    assert 'paints no pages' in error(lambda: open_painter(tmp_path / 'ctc.safetensors'))
    assert not (tmp_path / 'm').exists() and not (tmp_path / 'o').exists()


# --- masks and looks


def test_masks_of_every_form():
    m = np.zeros((5, 7), np.uint8)
    m[2] = 255
    for form in (
        m,
        m > 0,
        m / 255.0,
        torch.from_numpy(m),
        torch.from_numpy(m).float(),
        torch.from_numpy(m)[None].float() / 255,
        m[None, None],
    ):
        assert (as_mask(form) == m).all() and as_mask(form).dtype == np.uint8
    for bad in (np.zeros((3, 5, 7)), np.zeros((0, 4)), m * 3.0, m - 1.0, m * np.nan):
        error(lambda: as_mask(bad))


def test_iou_by_hand():
    m = np.zeros((60, 60), np.uint8)
    m[20:40, 10:30] = 255
    other = np.zeros_like(m)
    other[20:40, 20:40] = 255
    assert (
        ink_iou(255 - m, m) == 1.0
        and ink_iou(255 - other, m) == pytest.approx(1 / 3, abs=0.02)
        and ink_iou(np.full((60, 60, 3), 255, np.uint8), m) == 0.0
    )


def test_looks_depend_on_seed_and_number_alone(pix2pix, loader):
    m = loader.pairs[0].mask
    a = pix2pix.generate_variations(m, 3, seed=5)
    assert (
        all((x == y).all() for x, y in zip(a, pix2pix.generate_variations(m, 2, seed=5)))
        and (a[0] != a[1]).any()
        and (a[0] != pix2pix.generate_variations(m, 1, seed=6)[0]).any()
    )
    assert a[0].shape == (*m.shape, 3) and a[0].dtype == np.uint8


def test_what_is_written_is_a_set_of_pairs(pix2pix, loader, tmp_path):
    masks = [p.mask for p in loader.pairs[:2]]
    for where in ('a', 'b'):
        made = pix2pix.generate_synthetic_data(masks, 2, tmp_path / where)
    back = read_pairs(tmp_path / 'a' / 'images', tmp_path / 'a' / 'masks')
    assert [p.group for p in back] == ['mask0000', 'mask0000', 'mask0001', 'mask0001'] and all(
        (p.image == q.image).all() and (p.mask == q.mask).all() for p, q in zip(made, back)
    )
    files = sorted(p.relative_to(tmp_path / 'a') for p in (tmp_path / 'a').rglob('*') if p.is_file())
    assert (
        all((tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files) and len(files) == 9
    )


# --- as a degradation


@pytest.fixture(scope='module')
def model(pix2pix):
    return pix2pix.out_dir / 'pix2pix' / 'generator.safetensors'


def test_folding_and_unfolding_changes_nothing():
    for h, w, tile in ((1, 1, 32), (16, 5, 32), (10, 300, 64), (40, 700, 256), (240, 300, 256)):
        line = rng(h).integers(0, 256, (h, w)).astype(np.uint8)
        tiles, starts = fold(line, tile, tile // 4)
        assert tiles.shape[1:] == (tile, tile) and (unfold(tiles, starts, (h, w), tile // 4) == line).all()
    assert len(fold(np.zeros((40, 700), np.uint8), 256, 64)[0]) == 1  # four pieces, one square


def test_lines_keep_shape_and_type_and_follow_the_seed(model):
    f = LearnedDegradation(model)
    line = text_line(words[3], 12)
    a = f(line, rng(1))
    assert (
        a.shape == line.shape
        and a.dtype == np.uint8
        and (a == f(line, rng(1))).all()
        and (a != line).any()
        and f.__name__ == 'learned'
    )
    for shape in ((1, 1), (3, 200), (200, 9), (33, 60)):
        im = np.full(shape, 255, np.uint8)
        im[shape[0] // 2 :] = 0
        before = im.copy()
        out = f(im, rng(0))
        assert out.shape == shape and out.dtype == np.uint8 and (im == before).all()


def test_many_is_one_by_one(model):
    f = LearnedDegradation(model, batch_size=3)
    lines = [text_line(t, s) for s in (10, 14) for t in words]
    together = f.many(lines, [rng(k) for k in range(len(lines))])
    assert all((a == f(im, rng(k))).all() for k, (im, a) in enumerate(zip(lines, together)))
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert (f(lines[0], rng(0)) == together[0]).all() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n)


def test_survives_the_way_to_a_worker(model):
    f = LearnedDegradation(model, batch_size=2, least=0.4)
    g = pickle.loads(pickle.dumps(f))
    line = text_line(words[0], 12)
    assert (g.least, len(pickle.dumps(f)) < 1000) == (0.4, True) and (g(line, rng(0)) == f(line, rng(0))).all()


def test_a_line_whose_ink_would_vanish_is_handed_on(model):
    line = text_line(words[0], 12)
    m = line_mask(line)
    assert (
        _true(255 - m, m, 0.5)
        and not _true(np.full_like(m, 200), m, 0.5)
        and not _true(m, m, 0.5)
        and _true(np.full_like(m, 9), m * 0, 0.5)
    )
    f = LearnedDegradation(model, least=2.0)
    assert (f(line, rng(0)) == line).all()


def test_soft_ink_of_a_line():
    line = np.array([[250, 150, 50]], np.uint8).repeat(2, 0)
    assert line_mask(line).tolist() == [[0, 128, 255]] * 2 and not line_mask(np.full((3, 3), 255, np.uint8)).any()


def test_texture_bank_and_dcgan_as_a_look(tmp_path):
    from khmer_ocr.generative.dcgan import DCGANConfig, TextureBank, procedural_paper, train_dcgan

    papers = [p[..., 0] for p in procedural_paper(4, 32)]
    TextureBank(papers).save(tmp_path / 'bank.safetensors')
    line = text_line(words[0])
    f = LearnedDegradation(tmp_path / 'bank.safetensors')
    assert (f(line, rng(3)) == TextureBank(papers)(line, rng(3))).all() and (
        f.many([line] * 2, [rng(3), rng(4)])[0] == f(line, rng(3))
    ).all()
    train_dcgan(
        tmp_path / 'd',
        [p[..., None] for p in papers],
        DCGANConfig(image_size=32, width=2, d_width=2, z_dim=4, epochs=1, batch_size=4),
        verbose=False,
        device='cpu',
        tensorboard=False,
    )
    out = LearnedDegradation(tmp_path / 'd' / 'generator_model.safetensors')(line, rng(0))
    assert out.shape == line.shape and out[line == 0].max() == 0


def test_compiled_paints_the_same_and_goes_on_without_a_compiler(model, capsys):
    m = (torch.rand(1, 1, 32, 32) > 0.7).float()
    plain = optimise_for_inference(open_painter(model))
    eager = optimise_for_inference(open_painter(model), compiled=True, backend='eager')
    with torch.inference_mode():
        assert eager(m).equal(plain(m)) and capsys.readouterr().err == ''

        def broken(graph, inputs):
            raise RuntimeError('no compiler here')

        none = optimise_for_inference(open_painter(model), compiled=True, backend=broken)
        assert none(m).equal(plain(m)) and none(m).equal(plain(m))
    assert capsys.readouterr().err.count('painting goes on without') == 1
    assert (
        next(plain.net.parameters()).is_contiguous(memory_format=torch.channels_last)
        and not next(plain.net.parameters()).requires_grad
    )


def test_the_label_stays_true(tmp_path):
    from khmer_ocr.text.metrics import score
    from khmer_ocr.inference.reader import Reader

    pages = rendered_pairs(
        words,
        [noto],
        3,
        seed=1,
        shape=(160, 200),
        size=(20, 24),
        look=[('weight', 1.0), ('contrast', 1.0), ('fibres', 1.0), ('noise', 1.0)],
    )
    g = SyntheticDataGenerator(out_dir=tmp_path, image_size=(64, 64), device='cpu', ngf=12, ndf=8, batch_size=4)
    g.train_pix2pix(pages, 20, lr=0.002, ema=0.9, samples_every=1000, **quick)
    texts = words * 2
    lines = [text_line(t, s) for s in (22, 28) for t in words]
    painted = LearnedDegradation(tmp_path / 'pix2pix' / 'generator.safetensors', least=-1.0).many(
        lines, [rng(k) for k in range(len(lines))]
    )
    reader = Reader.load('fast')
    cer = lambda ims: score([r.text for r in reader.read(ims)], texts, extras=False)['cer']
    assert (
        cer(painted) <= cer(lines) + 0.1
        and cer([np.full_like(im, 255) for im in lines]) > 0.9
        and np.mean([(a != b).mean() for a, b in zip(lines, painted)]) > 0.5
    )


# --- styles: the VAE and the hybrid

tiny_style = dict(latent_dim=6, width=4)


@pytest.fixture(scope='module')
def coloured(loader):
    "The same pages on light and on brown paper"

    def brown(p):
        return ImagePair((p.image * np.array([0.8, 0.6, 0.4])).astype(np.uint8), p.mask, p.name + 'b', p.group)

    return [q for p in loader.pairs for q in (p, brown(p))]


@pytest.fixture(scope='module')
def hybrid(tmp_path_factory, coloured):
    g = SyntheticDataGenerator('hybrid', out_dir=tmp_path_factory.mktemp('hybrid'), **small, **tiny_style)
    g.train(coloured, 25, lr=0.004, **quick)
    return g


def test_vae_as_the_document_trains_it(tmp_path, loader, coloured, capsys):
    vae_generator = SyntheticDataGenerator(
        model_type='vae', device='cuda', latent_dim=6, image_size=(32, 32), out_dir=tmp_path, width=4
    )
    learn = vae_generator.train_vae(dataloader=loader, num_epochs=1, lr=0.001, beta=2.0, **quick)
    capsys.readouterr()
    assert (
        learn.config.lr == 1e-3
        and learn.loss_fn.config.beta == 2.0
        and learn.loss_fn.config.latent == 6
        and vae_generator.vae.codes.shape == (64, 6)
    )
    assert (vae_generator.painter.kind, vae_generator.painter.style) == ('vae', 6) and {
        'mse',
        'ssim',
        'kl',
        'active',
    } <= set(learn.metrics)
    assert (
        learn is vae_generator.run and vae_generator.train_vae(num_epochs=1, **quick).loss_fn.config.beta == 1.0
    )  # the same data, beta as it was
    vae_generator.plot_training_curves(save_path=tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 1000


def test_plain_vae_paints_by_its_own_chance(tmp_path, loader):
    g = SyntheticDataGenerator('vae', image_size=(64, 64), device='cpu', out_dir=tmp_path, form='plain', **tiny_style)
    g.train_vae(PairBatches(loader.pairs, 2, type(loader.crops)(64)), 1, **quick)
    m = loader.pairs[0].mask
    a, b = g.generate_variations(m, 2)
    assert (
        a.shape == (*m.shape, 3)
        and (a != b).any()
        and (a == g.generate_variations(m, 1)[0]).all()
        and g.painter.style == 0
        and g.painter.codes is None
    )


def test_hybrid_paints_with_the_styles_of_its_vae(hybrid, coloured):
    p, m = hybrid.painter, coloured[0].mask
    assert (p.kind, p.style, p.other.kind, p.net.config.style, hybrid.vae.net.plain) == (
        'hybrid',
        6,
        'vae',
        6,
        False,
    ) and p.codes is p.other.codes
    looks = hybrid.generate_variations(m, 5, seed=1)
    alone = [paint_looks(q, m, 2 * n, 1) for q, n in ((p, 3), (p.other, 2))]
    assert len(looks) == 5 and all(
        any((im == c).all() for c in alone[k >= 3]) for k, im in enumerate(looks)
    )  # three of Pix2Pix, two of the VAE
    left = [min(ink_iou(im, m) for im in looks[:3]), max(sorted(ink_iou(c, m) for c in alone[0])[:3])]
    assert left[0] >= left[1]
    papers = np.array([np.median(paint_looks(p, m, 1, s)[0].reshape(-1, 3), 0) for s in range(8)])
    real = np.array([np.median(q.image.reshape(-1, 3), 0) for q in coloured])
    assert papers.std(0).mean() > 0.2 * real.std(0).mean()  # one mask, papers of several colours


def test_codes_of_light_and_brown_pages_differ_and_are_painted(hybrid, coloured):
    from khmer_ocr.generative.pairs import as_batch
    from khmer_ocr.generative.vae_training import style_of

    light, brown = (
        style_of(hybrid.vae.net, as_batch([(p.image[:32, :32], p.mask[:32, :32])])['image'])[0] for p in coloured[:2]
    )
    m = coloured[4].mask
    tone = [float(np.median(paint_one(hybrid.painter, m, z)[..., 2])) for z in (light, brown)]
    assert tone[0] > tone[1] + 20


def paint_one(painter, mask, z):
    from khmer_ocr.generative.tiling import paint

    return paint(Look(painter, z), mask, painter.resolution, painter.resolution // 4)


def test_a_painter_saved_whole_paints_the_same_and_nothing_else_is_needed(hybrid, coloured, tmp_path):
    import shutil

    shutil.copy(hybrid.out_dir / 'painter.safetensors', tmp_path / 'p.safetensors')
    m = coloured[0].mask
    g = SyntheticDataGenerator('hybrid', out_dir=tmp_path / 'x', **small, **tiny_style).load(tmp_path / 'p.safetensors')
    assert (
        g.painter.codes.equal(hybrid.painter.codes)
        and max(
            np.abs(a.astype(int) - b).max()
            for a, b in zip(g.generate_variations(m, 2), hybrid.generate_variations(m, 2))
        )
        <= 3
    )  # float16
    again = open_painter(tmp_path / 'p.safetensors')
    assert again.kind == 'hybrid' and again.other.net.config.latent == 6
    assert 'make one of' in error(lambda: SyntheticDataGenerator('vae').load(tmp_path / 'p.safetensors'))
    from khmer_ocr.generative.painter import save_painter

    save_painter(tmp_path / 'v.safetensors', hybrid.painter.other)
    v = open_painter(tmp_path / 'v.safetensors')
    assert v.kind == 'vae' and v.codes.equal(again.codes)


def test_hybrid_wants_its_vae_first_and_each_model_its_own_training(loader, hybrid):
    assert 'call train_vae first' in error(
        lambda: SyntheticDataGenerator('hybrid', **small, **tiny_style).train_pix2pix(loader, 1)
    )
    assert "model_type='vae'" in error(
        lambda: SyntheticDataGenerator('vae').train_pix2pix(loader)
    ) and "model_type='pix2pix'" in error(lambda: SyntheticDataGenerator('pix2pix').train_vae(loader))
    assert (
        'did you mean width' in error(lambda: SyntheticDataGenerator('vae', widht=3))
        and 'VAEConfig' in error(lambda: SyntheticDataGenerator('vae', ngf=3))
        and 'form' in error(lambda: SyntheticDataGenerator('vae', form='stride'))
    )
    assert SyntheticDataGenerator('hybrid', form='double').network == dict(form='double')


@pytest.mark.parametrize('which', ['hybrid', 'vae'])
def test_styled_looks_as_operations(which, hybrid, tmp_path):
    from khmer_ocr.generative.painter import save_painter

    if which == 'vae':
        save_painter(tmp_path / 'p.safetensors', hybrid.painter.other)
    f = LearnedDegradation(
        hybrid.out_dir / 'painter.safetensors' if which == 'hybrid' else tmp_path / 'p.safetensors',
        batch_size=3,
        least=-1.0,
    )
    lines = [text_line(t, 12) for t in words]
    many = f.many(lines, [rng(k) for k in range(4)])
    assert all((f(im, rng(k)) == o).all() for k, (im, o) in enumerate(zip(lines, many)))
    assert len({int(np.median(f(lines[0], rng(k)))) for k in range(6)}) > 2  # several papers


def test_fewer_pages_than_a_batch(tmp_path, loader):
    for kind in ('vae', 'hybrid'):
        g = SyntheticDataGenerator(
            kind,
            batch_size=8,
            out_dir=tmp_path / kind,
            device='cpu',
            image_size=32,
            **tiny_style,
            **dict(ngf=4, ndf=4) if kind == 'hybrid' else {},
        )
        g.train(loader.pairs[:1], 1, **quick)
        assert g.run.step >= 1 and len(g.generate_variations(loader.pairs[0].mask, 2)) == 2


# --- the preset `learned` in the data factory


def recipe(folder, model):
    from khmer_ocr.synth.generator import Recipe

    for s in ('train', 'val', 'test'):
        (folder / f'{s}.txt').write_text(''.join(f'{w} {i}\n' for i in range(8) for w in words), encoding='utf-8')
    return Recipe(corpus=str(folder), preset=f'learned:{model}')


def test_preset_learned_in_a_set(model, tmp_path):
    from khmer_ocr.synth.store import generate_set, verify_set
    from khmer_ocr.synth.generator import LineGenerator

    r = recipe(tmp_path, model)
    for w in (1, 2):
        generate_set(r, tmp_path / f'w{w}', max_lines=12, splits=('train',), workers=w, progress=False)
    files = {
        p.relative_to(tmp_path / 'w1') for p in (tmp_path / 'w1').rglob('*') if p.is_file() and p.name != 'run.json'
    }
    assert (
        len(files) > 24
        and all((tmp_path / 'w1' / f).read_bytes() == (tmp_path / 'w2' / f).read_bytes() for f in files)
        and verify_set(tmp_path / 'w1') == []
    )
    s = LineGenerator(r)('train', 3)
    clean = LineGenerator(type(r)(corpus=r.corpus, preset='clean'))('train', 3)
    assert s.text == clean.text and (s.image.shape != clean.image.shape or (s.image != clean.image).any())


def test_the_model_is_part_of_what_a_set_is_made_of_wherever_it_lies(model, tmp_path):
    import shutil
    from khmer_ocr.synth.store import generate_set
    from khmer_ocr.synth.records import provenance
    from khmer_ocr.synth.generator import LineGenerator

    shutil.copy(model, tmp_path / 'moved.safetensors')
    a, b = (provenance(LineGenerator(recipe(tmp_path, m))) for m in (model, tmp_path / 'moved.safetensors'))
    assert (
        a == b
        and a['recipe']['preset'] == 'learned'
        and len(a['look']['model']) == 64
        and 'look' not in provenance(LineGenerator(type(recipe(tmp_path, model))(corpus=str(tmp_path))))
    )
    generate_set(recipe(tmp_path, model), tmp_path / 'set', max_lines=2, splits=('val',), progress=False)
    w, h = load_checkpoint(model)
    other = tmp_path / 'other.safetensors'
    save_checkpoint(other, {k: v * 1.01 if v.is_floating_point() else v for k, v in w.items()}, h)
    assert 'look' in error(
        lambda: generate_set(recipe(tmp_path, other), tmp_path / 'set', max_lines=3, splits=('val',), progress=False)
    )


def test_a_model_trained_again_is_opened_again(model, hybrid, tmp_path):
    import os, shutil
    from khmer_ocr.synth.degradation import open_look
    from khmer_ocr.synth.records import provenance
    from khmer_ocr.synth.generator import LineGenerator

    shutil.copy(model, f := tmp_path / 'm.safetensors')
    a, first = open_look('learned', str(f)), provenance(LineGenerator(recipe(tmp_path, f)))['look']
    assert open_look('learned', str(f)) is a
    shutil.copy(hybrid.out_dir / 'painter.safetensors', f)
    os.utime(f, ns=(1, 1))
    assert (
        open_look('learned', str(f)).painter.kind == 'hybrid'
        and provenance(LineGenerator(recipe(tmp_path, f)))['look']['model'] != first['model']
    )


@pytest.mark.parametrize(
    'preset, word',
    [
        ('learned', 'add its file'),
        ('learned:', 'add its file'),
        ('lerned:x', 'did you mean learned'),
        ('learned:none.safetensors', 'not found'),
    ],
)
def test_learned_preset_faults(preset, word, tmp_path):
    from khmer_ocr.synth.degradation import preset as open_preset

    assert word in error(lambda: open_preset(preset))
