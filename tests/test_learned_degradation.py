"A trained generator as a degradation: shapes, seeds, batches, processes, labels that stay true, the preset `learned`."

import os
import pickle
import shutil
import numpy as np
import pytest
import torch
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.generative.dcgan import DCGANConfig, TextureBank, procedural_paper, train_dcgan
from khmer_ocr.generative.learned_degradation import (
    LearnedDegradation,
    ink_preserved,
    line_mask,
    line_to_tiles,
    optimise_for_inference,
    tiles_to_line,
)
from khmer_ocr.generative.pairs import ImagePair, rendered_pairs
from khmer_ocr.generative.synthetic_data import SyntheticDataGenerator
from khmer_ocr.generative.trained_generator import load_trained_generator, save_trained_generator
from khmer_ocr.inference.reader import Reader
from khmer_ocr.synth.degradation import open_learned, preset as open_preset
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.synth.generator import LineGenerator, Recipe
from khmer_ocr.synth.records import provenance
from khmer_ocr.synth.rendering import render
from khmer_ocr.synth.store import generate_set, verify_set
from khmer_ocr.text.metrics import score
from khmer_ocr.training.checkpoints import load_checkpoint, save_checkpoint

noto = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')
words = ['ភ្នំពេញ', 'សាលា', 'ខ្មែរ', 'ជាតិ សាសនា']
quick = dict(verbose=False, precision='32-true', tensorboard=False)
small = dict(image_size=(32, 32), device='cpu', ngf=4, ndf=4, batch_size=4)


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
def pages():
    return rendered_pairs(words, [noto], 3, seed=2, shape=(72, 90), size=(16, 20))


@pytest.fixture(scope='module')
def model(tmp_path_factory, pages):
    "The file of a Pix2Pix generator"
    g = SyntheticDataGenerator('pix2pix', out_dir=tmp_path_factory.mktemp('pix2pix'), **small)
    g.train_pix2pix(pages, 30, lr=0.002, ema=0.9, **quick)
    return g.out_dir / 'pix2pix' / 'generator.safetensors'


@pytest.fixture(scope='module')
def hybrid(tmp_path_factory, pages):
    "A hybrid trained on pages with light and with brown paper"
    brown = [ImagePair((p.image * [0.8, 0.6, 0.4]).astype(np.uint8), p.mask, p.name + 'b', p.group) for p in pages]
    out_dir = tmp_path_factory.mktemp('hybrid')
    g = SyntheticDataGenerator('hybrid', out_dir=out_dir, latent_dim=6, width=4, **small)
    g.train([*pages, *brown], 25, lr=0.004, **quick)
    return g


def test_a_line_to_tiles_and_back_is_unchanged():
    "Cutting a line into squares and joining them loses nothing, whatever its size"
    for h, w, tile in ((1, 1, 32), (16, 5, 32), (10, 300, 64), (40, 700, 256), (240, 300, 256)):
        line = rng(h).integers(0, 256, (h, w)).astype(np.uint8)
        tiles, starts = line_to_tiles(line, tile, tile // 4)
        assert tiles.shape[1:] == (tile, tile)
        assert (tiles_to_line(tiles, starts, (h, w), tile // 4) == line).all()
    assert len(line_to_tiles(np.zeros((40, 700), np.uint8), 256, 64)[0]) == 1  # four pieces, one square


def test_lines_keep_shape_and_type_and_follow_the_seed(model):
    "The seed decides the result; the line that was given stays as it was"
    f = LearnedDegradation(model)
    line = text_line(words[3], 12)
    a = f(line, rng(1))
    assert a.shape == line.shape
    assert a.dtype == np.uint8
    assert (a == f(line, rng(1))).all()
    assert (a != line).any()
    assert f.__name__ == 'learned'
    for shape in ((1, 1), (3, 200), (200, 9), (33, 60)):
        im = np.full(shape, 255, np.uint8)
        im[shape[0] // 2 :] = 0
        before = im.copy()
        out = f(im, rng(0))
        assert out.shape == shape
        assert out.dtype == np.uint8
        assert (im == before).all()


def test_many_is_one_by_one(model):
    "Many lines give the bytes of one at a time, whatever the number of threads"
    f = LearnedDegradation(model, batch_size=3)
    lines = [text_line(t, s) for s in (10, 14) for t in words]
    together = f.many(lines, [rng(k) for k in range(len(lines))])
    assert all((a == f(im, rng(k))).all() for k, (im, a) in enumerate(zip(lines, together)))
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert (f(lines[0], rng(0)) == together[0]).all()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n)


def test_can_be_pickled_for_a_worker_process(model):
    "Path and settings are pickled, not the weights, and the copy gives the same"
    f = LearnedDegradation(model, batch_size=2, min_correlation=0.4)
    g = pickle.loads(pickle.dumps(f))
    line = text_line(words[0], 12)
    assert (g.min_correlation, len(pickle.dumps(f)) < 1000) == (0.4, True)
    assert (g(line, rng(0)) == f(line, rng(0))).all()


def test_a_line_whose_ink_would_vanish_is_returned_unchanged(model):
    "Ink that is not where the mask has it is found out, and the clean line comes back"
    line = text_line(words[0], 12)
    m = line_mask(line)
    assert ink_preserved(255 - m, m, 0.5)
    assert not ink_preserved(np.full_like(m, 200), m, 0.5)
    assert not ink_preserved(m, m, 0.5)
    assert ink_preserved(np.full_like(m, 9), m * 0, 0.5)
    f = LearnedDegradation(model, min_correlation=2.0)
    assert (f(line, rng(0)) == line).all()


def test_soft_ink_of_a_line():
    "The mask of a line goes from its lightest level to its darkest; a blank line has no ink"
    line = np.array([[250, 150, 50]], np.uint8).repeat(2, 0)
    assert line_mask(line).tolist() == [[0, 128, 255]] * 2
    assert not line_mask(np.full((3, 3), 255, np.uint8)).any()


def test_texture_bank_and_dcgan_lie_under_the_line(tmp_path):
    "A bank or a DCGAN becomes the paper under the line, and ink stays black"
    papers = [p[..., 0] for p in procedural_paper(4, 32)]
    TextureBank(papers).save(tmp_path / 'bank.safetensors')
    line = text_line(words[0])
    f = LearnedDegradation(tmp_path / 'bank.safetensors')
    assert (f(line, rng(3)) == TextureBank(papers)(line, rng(3))).all()
    assert (f.many([line] * 2, [rng(3), rng(4)])[0] == f(line, rng(3))).all()
    train_dcgan(
        tmp_path / 'd',
        [p[..., None] for p in papers],
        DCGANConfig(image_size=32, width=2, d_width=2, z_dim=4, epochs=1, batch_size=4),
        verbose=False,
        device='cpu',
        tensorboard=False,
    )
    out = LearnedDegradation(tmp_path / 'd' / 'generator_model.safetensors')(line, rng(0))
    assert out.shape == line.shape
    assert out[line == 0].max() == 0


def test_compiled_gives_the_same_and_goes_on_without_a_compiler(model, capsys):
    "A failing compiler costs one warning and no image"
    m = (torch.rand(1, 1, 32, 32) > 0.7).float()
    plain = optimise_for_inference(load_trained_generator(model))
    eager = optimise_for_inference(load_trained_generator(model), compiled=True, backend='eager')
    with torch.inference_mode():
        assert eager(m).equal(plain(m))
        assert capsys.readouterr().err == ''

        def broken(graph, inputs):
            raise RuntimeError('no compiler here')

        none = optimise_for_inference(load_trained_generator(model), compiled=True, backend=broken)
        assert none(m).equal(plain(m))
        assert none(m).equal(plain(m))
    assert capsys.readouterr().err.count('goes on without') == 1
    assert next(plain.net.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert not next(plain.net.parameters()).requires_grad


def test_the_label_stays_true(tmp_path):
    "The shipped recogniser reads degraded lines nearly as well as clean ones"
    pages = rendered_pairs(
        words,
        [noto],
        3,
        seed=1,
        shape=(160, 200),
        size=(20, 24),
        degradation=[('weight', 1.0), ('contrast', 1.0), ('fibres', 1.0), ('noise', 1.0)],
    )
    g = SyntheticDataGenerator(out_dir=tmp_path, image_size=(64, 64), device='cpu', ngf=12, ndf=8, batch_size=4)
    g.train_pix2pix(pages, 20, lr=0.002, ema=0.9, samples_every=1000, **quick)
    texts = words * 2
    lines = [text_line(t, s) for s in (22, 28) for t in words]
    degraded = LearnedDegradation(tmp_path / 'pix2pix' / 'generator.safetensors', min_correlation=-1.0).many(
        lines, [rng(k) for k in range(len(lines))]
    )
    reader = Reader.load('fast')

    def cer(ims):
        return score([r.text for r in reader.read(ims)], texts, extras=False)['cer']

    assert cer(degraded) <= cer(lines) + 0.1
    assert cer([np.full_like(im, 255) for im in lines]) > 0.9
    assert np.mean([(a != b).mean() for a, b in zip(lines, degraded)]) > 0.5


@pytest.mark.parametrize('which', ['hybrid', 'vae'])
def test_generators_with_styles_as_operations(which, hybrid, tmp_path):
    "A VAE and a hybrid give several papers, and many lines at once those of one by one"
    if which == 'vae':
        save_trained_generator(tmp_path / 'p.safetensors', hybrid.trained.vae)
    f = LearnedDegradation(
        hybrid.out_dir / 'painter.safetensors' if which == 'hybrid' else tmp_path / 'p.safetensors',
        batch_size=3,
        min_correlation=-1.0,
    )
    lines = [text_line(t, 12) for t in words]
    many = f.many(lines, [rng(k) for k in range(4)])
    assert all((f(im, rng(k)) == o).all() for k, (im, o) in enumerate(zip(lines, many)))
    assert len({int(np.median(f(lines[0], rng(k)))) for k in range(6)}) > 2  # several papers


# --- the preset `learned` in the data factory


def recipe(folder, model):
    for s in ('train', 'val', 'test'):
        (folder / f'{s}.txt').write_text(''.join(f'{w} {i}\n' for i in range(8) for w in words), encoding='utf-8')
    return Recipe(corpus=str(folder), preset=f'learned:{model}')


def test_preset_learned_in_a_set(model, tmp_path):
    "A set with the preset is the same with one worker and with two; only its images differ from the clean set"
    r = recipe(tmp_path, model)
    for w in (1, 2):
        generate_set(r, tmp_path / f'w{w}', max_lines=12, splits=('train',), workers=w, progress=False)
    files = {
        p.relative_to(tmp_path / 'w1') for p in (tmp_path / 'w1').rglob('*') if p.is_file() and p.name != 'run.json'
    }
    assert len(files) > 24
    assert all((tmp_path / 'w1' / f).read_bytes() == (tmp_path / 'w2' / f).read_bytes() for f in files)
    assert verify_set(tmp_path / 'w1') == []
    s = LineGenerator(r)('train', 3)
    clean = LineGenerator(type(r)(corpus=r.corpus, preset='clean'))('train', 3)
    assert s.text == clean.text
    assert s.image.shape != clean.image.shape or (s.image != clean.image).any()


def test_the_model_is_part_of_what_a_set_is_made_of_wherever_it_lies(model, tmp_path):
    "Provenance has the digest of the model, not its path, and another model is refused"
    shutil.copy(model, tmp_path / 'moved.safetensors')
    a, b = (provenance(LineGenerator(recipe(tmp_path, m))) for m in (model, tmp_path / 'moved.safetensors'))
    assert a == b
    assert a['recipe']['preset'] == 'learned'
    assert len(a['look']['model']) == 64
    assert 'look' not in provenance(LineGenerator(type(recipe(tmp_path, model))(corpus=str(tmp_path))))
    generate_set(recipe(tmp_path, model), tmp_path / 'set', max_lines=2, splits=('val',), progress=False)
    w, h = load_checkpoint(model)
    other = tmp_path / 'other.safetensors'
    save_checkpoint(other, {k: v * 1.01 if v.is_floating_point() else v for k, v in w.items()}, h)
    assert 'look' in error(
        lambda: generate_set(recipe(tmp_path, other), tmp_path / 'set', max_lines=3, splits=('val',), progress=False)
    )


def test_a_model_trained_again_is_opened_again(model, hybrid, tmp_path):
    "A file that has changed is read anew, one that has not is kept"
    shutil.copy(model, f := tmp_path / 'm.safetensors')
    a, first = open_learned('learned', str(f)), provenance(LineGenerator(recipe(tmp_path, f)))['look']
    assert open_learned('learned', str(f)) is a
    shutil.copy(hybrid.out_dir / 'painter.safetensors', f)
    os.utime(f, ns=(1, 1))
    assert open_learned('learned', str(f)).generator.kind == 'hybrid'
    assert provenance(LineGenerator(recipe(tmp_path, f)))['look']['model'] != first['model']


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
    "A wrong preset is one line with what to do"
    assert word in error(lambda: open_preset(preset))
