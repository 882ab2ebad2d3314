"SyntheticDataGenerator, the founding document's examples as tests, the choice of a model, masks, and sets of pairs."

import shutil
import numpy as np
import pytest
import torch
from torch import nn
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.generative.pairs import (
    ImagePair,
    PairBatches,
    as_batch,
    create_synthetic_dataloader,
    ink_iou,
    read_pairs,
    rendered_pairs,
    save_pairs,
)
from khmer_ocr.generative.pix2pix import AttentionGate
from khmer_ocr.generative.synthetic_data import SyntheticDataGenerator, as_mask, load_mask
from khmer_ocr.generative.tiling import generate_tiled
from khmer_ocr.generative.trained_generator import (
    FixedStyle,
    choose_model,
    generate_samples,
    load_trained_generator,
    save_trained_generator,
)
from khmer_ocr.generative.vae_training import encode_styles
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.training.checkpoints import load_checkpoint, save_checkpoint

noto = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')
words = ['ភ្នំពេញ', 'សាលា', 'ខ្មែរ', 'ជាតិ សាសនា']
quick = dict(verbose=False, precision='32-true', tensorboard=False)
small = dict(image_size=(32, 32), device='cpu', ngf=4, ndf=4)


def error(f):
    with pytest.raises(KhmerOCRError) as e:
        f()
    assert '\n' not in str(e.value)
    return str(e.value)


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
    "The number of pages decides between the kinds as in the document"
    assert choose_model(n).model == model


@pytest.mark.parametrize('need, model', [('fidelity', 'pix2pix'), ('diversity', 'vae'), ('balanced', 'hybrid')])
def test_choice_by_need_says_what_the_number_says(need, model):
    "A need goes before the number, and the reason says when the number would choose otherwise"
    for n in (3, 8, 20):
        c = choose_model(n, need)
        by_size = choose_model(n).model
        assert c.model == model
        assert need in c.why
        assert (f'it would be {by_size}' in c.why) == (by_size != model)
        assert str(c).startswith(f'{model}: ')
    assert 'did you mean diversity' in error(lambda: choose_model(4, 'divercity'))
    assert 'at least one page' in error(lambda: choose_model(0))


# --- the founding document's examples


def test_examples_of_the_document(tmp_path, data, pix2pix, capsys):
    dataloader = create_synthetic_dataloader(
        images_dir=data / 'images', masks_dir=data / 'masks', batch_size=4, image_size=(32, 32)
    )
    generator = SyntheticDataGenerator(
        model_type='pix2pix', device='cuda', image_size=(32, 32), out_dir=tmp_path / 'm', ngf=4, ndf=4
    )
    warning = capsys.readouterr().err
    assert torch.cuda.is_available() or warning == 'warning: no GPU was found, the CPU is used\n'
    generator.train_pix2pix(dataloader=dataloader, num_epochs=1, lr=0.0002, lambda_l1=100.0, **quick)
    original_masks = [load_mask(p) for p in sorted((data / 'masks').glob('*.png'))]
    mask_tensors = [torch.from_numpy(mask).float() for mask in original_masks]
    torch.save(generator.trained.net.state_dict(), tmp_path / 'generator_final.pth')
    synthetic_data = generator.generate_synthetic_data(
        input_masks=mask_tensors,
        num_variations=2,
        output_dir=tmp_path / 'synthetic_output',
        model_path=tmp_path / 'generator_final.pth',
    )
    assert len(synthetic_data) == 6
    assert len(list((tmp_path / 'synthetic_output' / 'images').glob('*.png'))) == 6
    high_quality_samples = []
    for mask in original_masks[:1]:
        candidates = pix2pix.generate_variations(mask, num_candidates=3)
        quality = [ink_iou(c, mask) for c in candidates]
        high_quality_samples += [c for c, q in zip(candidates, quality) if q > min(quality)]
        untrained = [ink_iou(c, mask) for c in generator.generate_variations(mask, num_candidates=3)]
        assert min(quality) > max(untrained)
    assert len(high_quality_samples) == 2
    generator.visualize_generation(
        input_mask=original_masks[0], num_samples=2, save_path=tmp_path / 'training_progress.png'
    )
    generator.plot_training_curves(show_discriminator=True, show_generator=True, save_path=tmp_path / 'loss_curves.png')
    h, w = original_masks[0].shape
    assert load_mask(tmp_path / 'training_progress.png').shape == (h + 4, 3 * (w + 2) + 2)
    assert (tmp_path / 'loss_curves.png').stat().st_size > 1000


def test_remedies_of_the_document_for_unstable_training_poor_images_and_little_memory(tmp_path, loader):
    generator = SyntheticDataGenerator(
        model_type='pix2pix', learning_rate=0.0001, lambda_l1=200.0, out_dir=tmp_path, **small
    )
    generator.use_spectral_norm = True
    learn = generator.train_pix2pix(loader, 1, **quick)
    assert learn.config.lr == 1e-4
    assert learn.net.config.lambda_l1 == 200.0
    assert learn.net.config.use_spectral_norm
    assert any('parametrizations' in k for k in learn.net.discriminator.state_dict())
    learn = generator.train_pix2pix(num_epochs=2, lambda_l1=50.0, use_least_squares=True, **quick)  # the same data
    assert learn.net.config.lambda_l1 == 50.0
    assert learn.net.config.loss == 'lsgan'
    assert learn.config.steps == 2 * len(loader)
    g = SyntheticDataGenerator(batch_size=2, gradient_accumulation=4, out_dir=tmp_path / 'b', **small)
    learn = g.train_pix2pix(loader.pairs, 1, **quick)
    assert learn.config.accumulate == 4
    assert g.pairs.batch_size == 2
    assert learn.config.steps == max(1, len(g.pairs) // 4)


def test_progressive_calls(tmp_path, loader):
    "Three calls double the resolution up to the full one, and the result makes pages of any size"
    generator = SyntheticDataGenerator(out_dir=tmp_path, **small | dict(image_size=(128, 128), ngf=2, ndf=2))
    data = PairBatches(loader.pairs, 2, type(loader.crops)(128))
    seen = []
    for resolution in (32, 64, 128):
        learn = generator.train_at_resolution(
            resolution=resolution, epochs=2, fade_in_epochs=1, dataloader=data, **quick
        )
        seen.append((generator.progressive.position[0], learn.logs['resolution'], generator.trained.resolution))
    assert seen == [(2, 32, 32), (1, 64, 64), (0, 128, 128)]
    assert generator.progressive.position == (0, 1.0)
    assert generator.generate_variations(loader.pairs[0].mask, 1)[0].shape == loader.pairs[0].image.shape
    assert 'does not lead to' in error(
        lambda: SyntheticDataGenerator(out_dir=tmp_path / 'x', **small).train_at_resolution(24, 1, 0, loader)
    )


def test_custom_generator_with_attention(tmp_path, loader):
    "A generator of the user is trained in place, and its file opens again in an empty one"

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
    "Every checkpoint is scored, and training stops after `patience` of them without a better score"
    g = SyntheticDataGenerator(out_dir=tmp_path, **small)
    learn = g.train_pix2pix(loader, 50, lr=1e-9, patience=2, save_every=2, eval_every=2, ema=0.0, **quick)
    assert learn.stopping.startswith('no better score')
    assert learn.step < learn.config.steps
    rows = [r for r in learn.history if 'ssim' in r]
    assert [r['step'] for r in rows] == list(range(2, learn.step + 1, 2))
    held = g.train_pix2pix(
        loader, 1, held_out=rendered_pairs(words, [noto], 1, seed=9, shape=(72, 90), size=(16, 18)), **quick
    )
    assert held.metrics['l1'] != learn.metrics['l1']


def test_resumed_to_the_same_bits(tmp_path, loader):
    "Two steps and two more after a resume end with the weights of four at once"

    def run(name, *resumes):
        for steps, resume in resumes:
            SyntheticDataGenerator(out_dir=tmp_path / name, **small).train_pix2pix(
                loader, 2, resume=resume, eval_every=99, save_every=2, steps=steps, decay=1.0, **quick
            )
        return load_checkpoint(tmp_path / name / 'pix2pix' / 'latest.safetensors')[0]

    a, b = run('whole', (4, None)), run('parts', (2, None), (4, 'latest'))
    assert a.keys() == b.keys()
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(model_type='pixpix'), 'did you mean pix2pix?'),
        (dict(image_size=(256, 128)), 'must be a square'),
        (dict(image_size=48), 'power of two'),
        (dict(nfg=3), 'did you mean ngf?'),
        (dict(device='tpu'), 'auto, cpu or cuda'),
        (dict(lambda_l1=-1), 'at least 0'),
    ],
)
def test_bad_settings(kw, word):
    "A wrong setting is one line that names it, when the object is made"
    assert word in error(lambda: SyntheticDataGenerator(**kw))


def test_bad_data(tmp_path, data, loader, pix2pix):
    "Data that cannot be trained on is refused in one line"
    g = SyntheticDataGenerator(out_dir=tmp_path / 'm', **small)
    assert 'nothing to train on' in error(lambda: g.train_pix2pix())
    assert 'give one of create_synthetic_dataloader' in error(lambda: g.train_pix2pix('folder'))
    assert 'no trained generator yet' in error(lambda: g.generate_variations(np.zeros((9, 9))))
    assert 'train first' in error(lambda: g.plot_training_curves())
    (tmp_path / 'none').mkdir()
    assert f'No images found in {tmp_path / "none"}' in error(
        lambda: create_synthetic_dataloader(tmp_path / 'none', data / 'masks')
    )
    assert 'no masks' in error(lambda: pix2pix.generate_synthetic_data([], output_dir=tmp_path / 'o'))
    assert 'at least 1' in error(lambda: pix2pix.generate_variations(np.ones((9, 9)), 0))
    save_checkpoint(tmp_path / 'ctc.safetensors', dict(w=torch.ones(1)), dict(model='ctc'))
    assert 'makes no pages of masks' in error(lambda: load_trained_generator(tmp_path / 'ctc.safetensors'))
    assert not (tmp_path / 'm').exists()
    assert not (tmp_path / 'o').exists()


# --- masks and their images


def test_masks_of_every_form():
    "Arrays and tensors of truth values, 0..1 or 0..255 become the same mask, and other values are refused"
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
        assert (as_mask(form) == m).all()
        assert as_mask(form).dtype == np.uint8
    for bad in (np.zeros((3, 5, 7)), np.zeros((0, 4)), m * 3.0, m - 1.0, m * np.nan):
        error(lambda: as_mask(bad))


def test_iou_by_hand():
    "1 for the same ink, 1/3 for squares that share a half, 0 for blank paper"
    m = np.zeros((60, 60), np.uint8)
    m[20:40, 10:30] = 255
    other = np.zeros_like(m)
    other[20:40, 20:40] = 255
    assert ink_iou(255 - m, m) == 1.0
    assert ink_iou(255 - other, m) == pytest.approx(1 / 3, abs=0.02)
    assert ink_iou(np.full((60, 60, 3), 255, np.uint8), m) == 0.0


def test_images_depend_on_seed_and_number_alone(pix2pix, loader):
    "Image i is the same however many are made, and another seed gives another"
    m = loader.pairs[0].mask
    a = pix2pix.generate_variations(m, 3, seed=5)
    assert all((x == y).all() for x, y in zip(a, pix2pix.generate_variations(m, 2, seed=5)))
    assert (a[0] != a[1]).any()
    assert (a[0] != pix2pix.generate_variations(m, 1, seed=6)[0]).any()
    assert a[0].shape == (*m.shape, 3)
    assert a[0].dtype == np.uint8


def test_what_is_written_is_a_set_of_pairs(pix2pix, loader, tmp_path):
    masks = [p.mask for p in loader.pairs[:2]]
    for where in ('a', 'b'):
        made = pix2pix.generate_synthetic_data(masks, 2, tmp_path / where)
    back = read_pairs(tmp_path / 'a' / 'images', tmp_path / 'a' / 'masks')
    assert [p.group for p in back] == ['mask0000', 'mask0000', 'mask0001', 'mask0001']
    for p, q in zip(made, back):
        assert (p.image == q.image).all()
        assert (p.mask == q.mask).all()
    files = sorted(p.relative_to(tmp_path / 'a') for p in (tmp_path / 'a').rglob('*') if p.is_file())
    assert all((tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files)
    assert len(files) == 9


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
    assert learn.config.lr == 1e-3
    assert learn.loss_fn.config.beta == 2.0
    assert learn.loss_fn.config.latent == 6
    assert vae_generator.vae.codes.shape == (64, 6)
    assert (vae_generator.trained.kind, vae_generator.trained.style) == ('vae', 6)
    assert {'mse', 'ssim', 'kl', 'active'} <= set(learn.metrics)
    assert learn is vae_generator.learner
    assert vae_generator.train_vae(num_epochs=1, **quick).loss_fn.config.beta == 1.0  # the same data, beta as it was
    vae_generator.plot_training_curves(save_path=tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 1000


def test_plain_vae_varies_by_its_own_random_numbers(tmp_path, loader):
    "Without style codes two images of one mask differ, and repeat by their number"
    g = SyntheticDataGenerator('vae', image_size=(64, 64), device='cpu', out_dir=tmp_path, form='plain', **tiny_style)
    g.train_vae(PairBatches(loader.pairs, 2, type(loader.crops)(64)), 1, **quick)
    m = loader.pairs[0].mask
    a, b = g.generate_variations(m, 2)
    assert a.shape == (*m.shape, 3)
    assert (a != b).any()
    assert (a == g.generate_variations(m, 1)[0]).all()
    assert g.trained.style == 0
    assert g.trained.codes is None


def test_hybrid_uses_the_styles_of_its_vae(hybrid, coloured):
    "Of five images three are of Pix2Pix and two of the VAE, those with the best ink, in papers of several colours"
    p, m = hybrid.trained, coloured[0].mask
    assert (p.kind, p.style, p.vae.kind, p.net.config.style, hybrid.vae.net.plain) == ('hybrid', 6, 'vae', 6, False)
    assert p.codes is p.vae.codes
    images = hybrid.generate_variations(m, 5, seed=1)
    alone = [generate_samples(q, m, 2 * n, 1) for q, n in ((p, 3), (p.vae, 2))]
    assert len(images) == 5
    assert all(
        any((im == c).all() for c in alone[k >= 3]) for k, im in enumerate(images)
    )  # three of Pix2Pix, two of the VAE
    left = [min(ink_iou(im, m) for im in images[:3]), max(sorted(ink_iou(c, m) for c in alone[0])[:3])]
    assert left[0] >= left[1]
    papers = np.array([np.median(generate_samples(p, m, 1, s)[0].reshape(-1, 3), 0) for s in range(8)])
    real = np.array([np.median(q.image.reshape(-1, 3), 0) for q in coloured])
    assert papers.std(0).mean() > 0.2 * real.std(0).mean()  # one mask, papers of several colours


def test_codes_of_light_and_brown_pages_give_light_and_brown_paper(hybrid, coloured):
    "The code of a page decides the tone of the paper"
    light, brown = (
        encode_styles(hybrid.vae.net, as_batch([(p.image[:32, :32], p.mask[:32, :32])])['image'])[0]
        for p in coloured[:2]
    )
    m = coloured[4].mask
    tone = [float(np.median(generate_one(hybrid.trained, m, z)[..., 2])) for z in (light, brown)]
    assert tone[0] > tone[1] + 20


def generate_one(generator, mask, z):
    return generate_tiled(FixedStyle(generator, z), mask, generator.resolution, generator.resolution // 4)


def test_a_generator_saved_whole_makes_the_same_images_and_nothing_else_is_needed(hybrid, coloured, tmp_path):
    "The file alone gives the images again, but for the rounding of float16"
    shutil.copy(hybrid.out_dir / 'painter.safetensors', tmp_path / 'p.safetensors')
    m = coloured[0].mask
    g = SyntheticDataGenerator('hybrid', out_dir=tmp_path / 'x', **small, **tiny_style).load(tmp_path / 'p.safetensors')
    assert g.trained.codes.equal(hybrid.trained.codes)
    for a, b in zip(g.generate_variations(m, 2), hybrid.generate_variations(m, 2)):
        assert np.abs(a.astype(int) - b).max() <= 3  # float16
    again = load_trained_generator(tmp_path / 'p.safetensors')
    assert again.kind == 'hybrid'
    assert again.vae.net.config.latent == 6
    assert 'make one of' in error(lambda: SyntheticDataGenerator('vae').load(tmp_path / 'p.safetensors'))
    save_trained_generator(tmp_path / 'v.safetensors', hybrid.trained.vae)
    v = load_trained_generator(tmp_path / 'v.safetensors')
    assert v.kind == 'vae'
    assert v.codes.equal(again.codes)


def test_hybrid_wants_its_vae_first_and_each_model_its_own_training(loader, hybrid):
    "A call that does not fit the model is one line that says what to call"
    assert 'call train_vae first' in error(
        lambda: SyntheticDataGenerator('hybrid', **small, **tiny_style).train_pix2pix(loader, 1)
    )
    assert "model_type='vae'" in error(lambda: SyntheticDataGenerator('vae').train_pix2pix(loader))
    assert "model_type='pix2pix'" in error(lambda: SyntheticDataGenerator('pix2pix').train_vae(loader))
    assert 'did you mean width' in error(lambda: SyntheticDataGenerator('vae', widht=3))
    assert 'VAEConfig' in error(lambda: SyntheticDataGenerator('vae', ngf=3))
    assert 'form' in error(lambda: SyntheticDataGenerator('vae', form='stride'))
    assert SyntheticDataGenerator('hybrid', form='double').network == dict(form='double')


def test_fewer_pages_than_a_batch(tmp_path, loader):
    "One page is enough for batches of eight crops"
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
        assert g.learner.step >= 1
        assert len(g.generate_variations(loader.pairs[0].mask, 2)) == 2
