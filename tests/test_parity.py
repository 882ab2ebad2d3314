"Training and reading see the same: a line in any kind of file reaches the network as the same pixels"

import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Callable
import numpy as np
import pytest
import torch
from PIL import Image, features
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header, load_ctc
from khmer_ocr.models.ctc_training import CTCLoss, read_batches
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.data.datasets import OnTheFlyDataset, open_lines
from khmer_ocr.data.batching import as_input, collate
from khmer_ocr.data.preprocessing import preprocess
from khmer_ocr.data.images import read_image
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.inference.documents import open_pages
from khmer_ocr.inference.reader import Reader, read_files
from khmer_ocr.models.zoo import available_models
from khmer_ocr.synth.rendering import render
from khmer_ocr.models.attention import Seq2Seq, Seq2SeqConfig, make_units
from khmer_ocr.models.attention_training import read_lines
from khmer_ocr.synth.store import generate_set
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.text.khmer import charset
from conftest import make_tiny

text = 'ព្រះរាជាណាចក្រកម្ពុជា'


def drawn() -> np.ndarray:
    "A line with grey edges, on paper that is not quite white"
    font = next(f for f in find_fonts(split='train') if f.style in ('Regular', 'Variable Regular'))
    return (
        np.clip(245 - 0.9 * np.pad(render(text, font, 40).ink.astype(float), ((9, 12), (30, 17))), 0, 255)
        .round()
        .astype(np.uint8)
    )


@dataclass
class Case:
    file: str
    make: Callable  # grey uint8 (H, W) -> Pillow image
    options: dict = None  # of `save`
    exact: bool = True  # the pixels of the plain PNG come back
    needs: str = ''  # a codec of Pillow


L = Image.fromarray


def mode(m):
    return lambda g: L(g).convert(m)


def sixteen(g):
    return L((g.astype(np.uint16) * 257))


def alpha(m, ink):
    "Ink in the alpha channel alone; its colour is black, or dark noise"

    def make(g):
        noise = (
            np.random.default_rng(0).integers(0, 90, (*g.shape, 3), dtype=np.uint8)
            if ink
            else np.zeros((*g.shape, 3), np.uint8)
        )
        return L(np.dstack([noise // 9, 255 - g])).convert(m)

    return make


def palette(g):
    return L(g).quantize(64)


def clear_palette(g):
    "A palette in which the paper is transparent and red"
    im = Image.fromarray(np.where(g < 128, 1, 0).astype(np.uint8), 'P')
    im.putpalette([255, 0, 0, 10, 10, 10])
    im.info['transparency'] = 0
    return im


TURNS = {
    1: None,
    2: 'FLIP_LEFT_RIGHT',
    3: 'ROTATE_180',
    4: 'FLIP_TOP_BOTTOM',
    5: 'TRANSPOSE',
    6: 'ROTATE_90',
    7: 'TRANSVERSE',
    8: 'ROTATE_270',
}


def turned(k):
    "Stored as a camera held in that way stores it: the tag says how to turn it back"
    return lambda g: L(g) if k == 1 else L(g).transpose(Image.Transpose[TURNS[k]])


def exif(k):
    e = Image.Exif()
    e[0x112] = k
    return e


CASES = dict(
    png=Case('png', L),
    jpg=Case('jpg', L, dict(quality=90), False),
    tif=Case('tif', L),
    tif_lzw=Case('tif', L, dict(compression='tiff_lzw')),
    bmp=Case('bmp', L),
    gif=Case('gif', L),
    tif_pages=Case('tif', L, dict(save_all=True, append_images=[Image.new('L', (300, 80), 99)])),
    tif_group4=Case('tif', mode('1'), dict(compression='group4'), False),
    webp=Case('webp', L, dict(lossless=True), needs='webp'),
    webp_lossy=Case('webp', L, dict(quality=80), False, 'webp'),
    jp2=Case('jp2', L, needs='jpg_2000'),
    ppm=Case('ppm', mode('RGB')),
    pgm=Case('pgm', L),
    pbm=Case('pbm', mode('1'), exact=False),
    one_bit=Case('png', mode('1'), exact=False),
    sixteen_bits=Case('png', sixteen),
    sixteen_bits_tif=Case('tif', sixteen),
    sixteen_bits_pgm=Case('pgm', sixteen),
    long_tif=Case('tif', lambda g: L(g.astype(np.int32))),
    float_tif=Case('tif', lambda g: L(g.astype(np.float32))),
    float_unit_tif=Case('tif', lambda g: L(g.astype(np.float32) / 255)),
    palette=Case('png', palette, exact=False),
    palette_gif=Case('gif', palette, exact=False),
    rgb=Case('png', mode('RGB')),
    rgba=Case('png', mode('RGBA')),
    la=Case('png', mode('LA')),
    cmyk_tif=Case('tif', mode('CMYK'), exact=False),
    cmyk_jpg=Case('jpg', mode('CMYK'), dict(quality=95), False),
    ycbcr=Case('jpg', mode('YCbCr'), dict(quality=95), False),
    ycbcr_tif=Case('tif', mode('YCbCr'), exact=False),
    lab=Case('tif', mode('LAB'), exact=False),
    alpha_rgba=Case('png', alpha('RGBA', False), exact=False),
    alpha_noise=Case('png', alpha('RGBA', True), exact=False),
    alpha_la=Case('png', alpha('LA', False), exact=False),
    alpha_webp=Case('webp', alpha('RGBA', False), dict(lossless=True), False, 'webp'),
    clear_palette=Case('png', clear_palette, exact=False),
    clear_gif=Case('gif', clear_palette, exact=False),
    inverted=Case('png', lambda g: L(255 - g), exact=False),
    inverted_rgb=Case('bmp', lambda g: L(255 - g).convert('RGB'), exact=False),
    inverted_one_bit=Case('png', lambda g: L(255 - g).convert('1'), exact=False),
    inverted_sixteen=Case('tif', lambda g: sixteen(255 - g), exact=False),
    inverted_jpg=Case('jpg', lambda g: L(255 - g), dict(quality=90), False),
    **{f'exif{k}_lzw': Case('tif', turned(k), dict(exif=exif(k), compression='tiff_lzw')) for k in (3, 6, 7)},
    **{
        f'exif{k}_{end}': Case(
            end, turned(k), dict(exif=exif(k)) | (dict(quality=95) if end == 'jpg' else {}), end != 'jpg'
        )
        for k in TURNS
        for end in ('jpg', 'png', 'tif')
    },
)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    if 'fast' in available_models():
        return available_models()['fast']
    torch.manual_seed(0)
    net = CTCNet(len(units := SubscriptTokenizer(charset())))
    save_checkpoint(
        path := tmp_path_factory.mktemp('weights') / 'random.safetensors', net.state_dict(), header(net.config, units)
    )
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "All cases as files, each in a folder of its own with a labels.tsv; {name: folder}"
    root, grey, out = tmp_path_factory.mktemp('lines'), drawn(), {}
    for name, c in CASES.items():
        if c.needs and not features.check(c.needs):
            continue
        (out.setdefault(name, root / name)).mkdir()
        c.make(grey).save(root / name / f'line.{c.file}', **(c.options or {}))
        (root / name / 'labels.tsv').write_text(f'path\ttext\nline.{c.file}\t{text}\n', encoding='utf-8')
    return out


def line_of(folder):
    return next(p for p in folder.iterdir() if p.stem == 'line')


class Seen:
    "What a network is given: `with Seen(net) as seen: ...; seen.calls`"

    def __init__(self, net):
        self.net, self.calls = net, []

    def __enter__(self):
        self.hook = self.net.register_forward_pre_hook(
            lambda m, args: self.calls.append((args[0].clone(), args[1].clone()))
        )
        return self

    def __exit__(self, *_):
        self.hook.remove()


class EncoderInput:
    "What the encoder of a network is given: `with EncoderInput(net) as seen: ...; seen.calls`"

    def __init__(self, net):
        self.net, self.calls = net, []

    def __enter__(self):
        encode = self.net.encode

        def watched(x, widths):
            self.calls.append((x.clone(), widths.clone()))
            return encode(x, widths)

        self.net.encode = watched
        return self

    def __exit__(self, *_):
        del self.net.encode


def same_input(trained, read):
    "One line in two batches of its own: equal to the last bit, and nothing but paper behind it"
    (a, m), (b, n) = trained, read
    assert (
        a.dtype == b.dtype == torch.float32 and len(a) == len(b) == 1 and int(m) == int(n) and a.shape[2] == b.shape[2]
    )
    w = int(m)
    assert w > 40 and torch.equal(a[..., :w], b[..., :w])
    assert not a[..., w:].any() and not b[..., w:].any()


@pytest.fixture(scope='module')
def pair(weights):
    "The network as it is trained, its units, and the reader of the same weights in the same precision"
    net, units, head = load_ctc(weights)
    return net, units, Reader(net, units, head, dtype=torch.float32)


@pytest.mark.parametrize('name', CASES)
def test_same_pixels(name, folder, pair):
    "From the file to the network: by the loss in training, by the evaluation beside it, and by the reader"
    if name not in folder:
        pytest.skip(f'Pillow has no {CASES[name].needs} here')
    net, units, reader = pair
    (batch,) = open_lines(folder[name], reader.height).batches()
    learning = copy.deepcopy(net).train()  # training moves the statistics of its norms
    with torch.no_grad(), Seen(learning) as training:
        CTCLoss(units, net.config.stride)(learning, batch)
    with Seen(net) as evaluating:
        wanted, _ = read_batches(net, units, [batch])
    with Seen(reader.net) as reading:
        ((_, got),) = read_files(reader, [line_of(folder[name])])
    same_input(training.calls[0], reading.calls[0])
    same_input(evaluating.calls[0], reading.calls[0])
    assert got.text == wanted[0]
    if CASES[name].exact:
        plain = as_input(torch.from_numpy(preprocess(drawn(), reader.height)))
        assert torch.equal(reading.calls[0][0][0, 0, :, : plain.shape[1]], plain)


def test_same_text_from_the_command(folder, pair, weights):
    "One call of `read --line` for all files: what training would have read, and what stands there"
    net, units, _ = pair
    wanted = [read_batches(net, units, open_lines(f, net.config.height).batches())[0][0] for f in folder.values()]
    p = subprocess.run(
        [
            sys.executable,
            '-c',
            'from khmer_ocr.cli.app import app; app()',
            'read',
            '--line',
            '--model',
            str(weights),
            *(str(line_of(f)) for f in folder.values()),
        ],
        capture_output=True,
        text=True,
        encoding='utf-8',
    )
    assert p.returncode == 0, p.stderr
    got = dict(zip(folder, p.stdout.split('\n')[:-1], strict=True))
    assert got == dict(zip(folder, wanted))
    if weights == available_models().get('fast'):
        assert {n for n, t in got.items() if t != text} <= {
            'one_bit',
            'pbm',
            'tif_group4',
            'inverted_one_bit',
        }  # dithered to black and white, it is a hard line


def test_pages_too(folder):
    "A page is opened as a line is, on its side or not, and the second page of a file is another"
    for name, f in folder.items():
        pages = list(open_pages(line_of(f)))
        assert np.array_equal(pages[0][1], read_image(line_of(f))) and len(pages) == (2 if name == 'tif_pages' else 1)
        assert abs(pages[0][1].shape[1] / pages[0][1].shape[0] - drawn().shape[1] / drawn().shape[0]) < 0.01, name


@pytest.mark.parametrize(
    'kw',
    [
        dict(stride=2),
        dict(stride=8, height=48),
        dict(encoder='attention', height=32),
        dict(encoder='conv', res_blocks=(0, 1, 1), block_type='large'),
    ],
    ids=str,
)
def test_other_networks_get_the_same(kw, folder):
    "Height and stride come from the checkpoint, not from a constant"
    torch.manual_seed(0)
    units = SubscriptTokenizer(charset())
    net = CTCNet(len(units), CTCConfig(**dict(channels=(8, 8, 8, 8, 16), hidden=8, layers=1) | kw)).eval()
    reader = Reader(net, units, header(net.config, units), dtype=torch.float32)
    for name in ('png', 'exif6_jpg', 'inverted', 'alpha_la'):
        (batch,) = open_lines(folder[name], net.config.height).batches()
        with Seen(net) as evaluating:
            wanted, _ = read_batches(net, units, [batch])
        with Seen(reader.net) as reading:
            ((_, got),) = read_files(reader, [line_of(folder[name])])
        same_input(evaluating.calls[0], reading.calls[0])


@pytest.mark.parametrize(
    'kw',
    [
        dict(encoder_hidden=16, ctc_weight=0.3),
        dict(encoder='ctc', ctc=CTCConfig(channels=(8, 8, 8, 8, 16), hidden=8, layers=1, height=48)),
    ],
    ids=['buoy2022', 'ctc'],
)
def test_readers_that_write_get_the_same(kw, folder):
    torch.manual_seed(0)
    config = Seq2SeqConfig(hidden=16, attention=16, **kw)
    units = make_units(config)
    net = Seq2Seq(len(units), config).eval()
    reader = Reader(net, units, header(config, units, model='seq2seq'), decoder='greedy')
    assert reader.dtype == torch.float32
    for name in ('png', 'sixteen_bits', 'exif6_tif', 'inverted_rgb', 'alpha_la'):
        (batch,) = open_lines(folder[name], config.height).batches()
        with EncoderInput(net) as training:
            read_lines(net, units, [batch])
        with EncoderInput(reader.net) as reading:
            list(read_files(reader, [line_of(folder[name])]))
        same_input(training.calls[0], reading.calls[0])


def test_lines_made_on_the_fly_and_lines_of_sets(pair, tmp_path):
    "The training stream, a set and shards give the network what the reader gives it for the same images"
    net, units, reader = pair
    make_tiny(tmp_path, model=False)
    recipe = Recipe(corpus=str(tmp_path / 'corpus'), random_text=True)

    def check(prepared, label, image):
        batch = collate([(prepared, label)])
        with Seen(net) as a:
            read_batches(net, units, [batch])
        with Seen(reader.net) as b:
            reader.read([image])
        same_input(a.calls[0], b.calls[0])

    fly, raw = (OnTheFlyDataset(recipe, 6, texts=[text, text * 2], raw=r) for r in (False, True))
    for i in range(6):
        check(*fly[i], raw[i][0])
    for form in ('files', 'shards'):
        generate_set(
            replace(recipe, random_text=False),
            tmp_path / form,
            max_lines=3,
            progress=False,
            **(dict(format='shards') if form == 'shards' else {}),
        )
        a, b = open_lines(tmp_path / form), open_lines(tmp_path / form)
        b.raw = True
        for i in range(len(a)):
            check(*a[i], b[i][0])
