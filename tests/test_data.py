"Batches and preprocessing: the same stream for any number of workers, and one road for every kind of image file."

import io
import tarfile
import warnings
from functools import partial
from itertools import islice
import numpy as np
import pytest
from conftest import TINY_LOOP, TINY_NETWORK, write_corpus
from PIL import Image, TiffImagePlugin
from torch.utils.data import DataLoader
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.data import datasets
from khmer_ocr.data.batching import BatchPools, bucket_batches, collate, cut_widths, padding
from khmer_ocr.data.datasets import (
    LineFolder,
    LineSource,
    OnTheFlyDataset,
    ShardedDataset,
    SyntheticImageDataset,
    SyntheticImageGenerator,
    check_labels,
    open_lines,
    read_labels,
)
from khmer_ocr.data.images import read_image
from khmer_ocr.data.mixing import (
    Curriculum,
    DataConfig,
    MixedSource,
    MultiScale,
    read_stages,
    rescale_line,
    training_source,
)
from khmer_ocr.data.preprocessing import line_box, normalise_line, preprocess, trim, trim_box
from khmer_ocr.models.ctc import CTCConfig
from khmer_ocr.models.zoo import train_recogniser
from khmer_ocr.synth.generator import LineGenerator, Recipe
from khmer_ocr.text.khmer import Charset, charset, normalise
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.settings import TrainConfig

texts = ('ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា ព្រះមហាក្សត្រ', 'ភ្នំពេញ', 'តើអ្នកសុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')
texts = [normalise(t) for t in texts]
recipe = Recipe(random_text=True, seed=9)


def assert_same(a, b):
    "The same batches"
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x['texts'] == y['texts']
        assert x['images'].equal(y['images'])
        assert x['widths'].equal(y['widths'])


def some_batches(source, n, **kw):
    return list(islice(source.stream(**kw), n))


def labels_of(lines):
    return [text for _, text in lines]


def on_the_fly(**kw):
    return OnTheFlyDataset(recipe, texts=texts, **kw)


def test_workers_do_not_matter():
    stream = partial(some_batches, on_the_fly(), 9, batch_size=4, pool=4)
    alone = stream()
    assert_same(alone, stream(workers=1))
    assert_same(alone, stream(workers=2))


@pytest.mark.parametrize('step', [1, 2, 5, 6, 13, 40])
def test_stream_starts_anywhere(step):
    stream = BatchPools(on_the_fly(), 2, 4, recipe.seed)
    assert_same(list(islice(stream.batches(), step, step + 3)), list(islice(stream.batches(step), 3)))


def test_padding_waste_is_small():
    long = [normalise(' '.join(np.random.default_rng(i).choice(texts, 1 + i % 6))) for i in range(60)]
    batches = BatchPools(OnTheFlyDataset(recipe, texts=long), 32, 32, recipe.seed)[2]
    sizes = [len(b['texts']) for b in batches]
    assert len(batches) == 32
    assert sum(sizes) == 32 * 32
    assert 16 <= min(sizes) and max(sizes) <= 40
    assert padding(batches) < 0.08
    lines = []
    for b in batches:
        lines += [(image[0, :, :width].numpy(), '') for image, width in zip(b['images'], b['widths'])]
    assert padding(batches) < padding(bucket_batches(lines, 32))


@pytest.mark.parametrize('size, batches', [(1, 1), (1, 7), (2, 3), (7, 5), (30, 4), (64, 2), (97, 3)])
def test_cuts_are_whole(size, batches):
    widths = np.sort(np.random.default_rng(size).integers(8, 2000, size * batches))
    cuts = cut_widths(widths, batches)
    assert len(cuts) == batches
    assert (cuts[0][0], cuts[-1][1]) == (0, len(widths))
    assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
    assert all(max(1, size // 2) <= b - a <= max(1, size * 5 // 4) for a, b in cuts)

    def area(cuts):
        return sum((b - a) * -(-widths[b - 1] // 16) * 16 for a, b in cuts)

    assert area(cuts) <= area([(i * size, i * size + size) for i in range(batches)])


# on the fly
def test_an_ordinary_loader_gives_the_same_epochs_with_any_workers():
    "Also with workers that stay: they must learn of the new epoch"
    made = {}
    for workers in (0, 1, 2):
        lines = on_the_fly(train_samples_per_epoch=8)
        spawn = dict(multiprocessing_context='spawn', persistent_workers=True) if workers else {}
        loader = DataLoader(lines, batch_size=3, collate_fn=collate, num_workers=workers, **spawn)
        for epoch in (0, 1):
            lines.set_epoch(epoch)
            made[workers, epoch] = list(loader)
    for epoch in (0, 1):
        assert_same(made[0, epoch], made[1, epoch])
        assert_same(made[0, epoch], made[2, epoch])
    assert [b['texts'] for b in made[0, 0]] != [b['texts'] for b in made[0, 1]]


def test_epochs_differ_repeat_and_resume():
    lines = on_the_fly(train_samples_per_epoch=6)
    again = on_the_fly(train_samples_per_epoch=6)
    epochs = []
    for epoch in range(3):
        lines.set_epoch(epoch)
        epochs.append(list(lines))
    assert [len(e) for e in epochs] == [6] * 3
    images = [image for e in epochs for image, _ in e]
    with_ink = [image.tobytes() for image in images if image.min() < 250]
    assert len(set(with_ink)) == len(with_ink)
    again.set_epoch(2)
    resumed = list(DataLoader(again, batch_size=3, collate_fn=collate, sampler=range(2, 6)))
    assert_same(resumed, [collate(epochs[2][2:5]), collate(epochs[2][5:])])
    with pytest.raises(IndexError):
        lines[6]
    with pytest.raises(KhmerOCRError, match='from 1 up'):
        OnTheFlyDataset(recipe, 0)


def test_stream_and_epochs_are_the_same_lines():
    lines = on_the_fly(train_samples_per_epoch=8)
    streamed = [t for b in some_batches(lines, 4, batch_size=4, pool=2) for t in b['texts']]
    in_epochs = []
    for epoch in (0, 1):
        lines.set_epoch(epoch)
        in_epochs += labels_of(lines)
    assert sorted(streamed) == sorted(in_epochs)


# sets from disk
@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "The same 10 lines as files and as shards of 4"
    folder = tmp_path_factory.mktemp('sets')
    lines = [text + ending for ending in 'កខ' for text in texts]
    write_corpus(folder / 'corpus', lines, lines, lines)
    maker = SyntheticImageGenerator(Recipe(corpus=str(folder / 'corpus'), fonts=None))
    maker.generate(folder / 'set', max_lines=10, progress=False)
    (folder / 'shards').mkdir()
    images = sorted((folder / 'set/train/images').glob('*.png'))
    for k in range(0, 10, 4):
        with tarfile.open(folder / f'shards/train-{k:06d}.tar', 'w') as tar:
            for image in images[k : k + 4]:
                add_sample(tar, image, folder / f'set/train/labels/{image.stem}.txt')
    return folder


def add_sample(tar, image, label):
    "A sample of a shard, as WebDataset has it"
    for ending, data in (('png', image.read_bytes()), ('txt', label.read_bytes()), ('json', b'{}')):
        info = tarfile.TarInfo(f'{image.stem}.{ending}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def test_shards_hold_the_same_lines(sets):
    files = open_lines(sets / 'set')
    shards = open_lines(sets / 'shards')
    assert isinstance(shards, ShardedDataset)
    assert len(files) == len(shards) == 10
    for (image, text), (image2, text2) in zip(files, shards):
        assert text == text2
        assert (image == image2).all()
    assert labels_of(open_lines(sets / 'shards', limit=5)) == labels_of(files)[:5]


def test_every_epoch_of_shards_has_every_line_in_an_order_of_its_own(sets):
    shards = open_lines(sets / 'shards')
    epochs = [labels_of(shards.fetch(10 * e, 10 * e + 10)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(labels_of(shards))
    assert epochs[0] != epochs[1] != labels_of(shards.fetch(10, 20, seed=1))


@pytest.mark.parametrize('kind', ['set', 'shards'])
def test_streams_of_sets_start_anywhere_with_any_workers(sets, kind):
    def stream(n, **kw):
        return some_batches(open_lines(sets / kind), n, batch_size=3, pool=4, **kw)

    whole = stream(14)
    for step in (1, 5, 9):
        assert_same(whole[step : step + 4], stream(4, step=step))
    for workers in (2,) if kind == 'set' else (1, 2):
        assert_same(whole[:9], stream(9, workers=workers))


def test_shards_are_read_once_per_pool(sets, monkeypatch):
    "Random order, and yet no shard is opened again and again"
    opened = []
    read_shard = datasets.read_shard
    lines = open_lines(sets / 'shards')
    monkeypatch.setattr(datasets, 'read_shard', lambda path: opened.append(path) or read_shard(path))
    lines.fetch(0, 10)
    assert sorted(opened) == lines.shards


def test_bad_shards(sets, tmp_path):
    with pytest.raises(KhmerOCRError, match='no shards'):
        ShardedDataset(tmp_path)
    (tmp_path / 'a.tar').write_bytes(next((sets / 'shards').glob('*.tar')).read_bytes()[:700])
    with pytest.raises(KhmerOCRError, match='a.tar'):
        ShardedDataset(tmp_path)
    (tmp_path / 'shards.jsonl').write_text('{"name": "b.tar", "samples": 3}\n')
    with pytest.raises(KhmerOCRError, match='b.tar is missing'):
        ShardedDataset(tmp_path)


def test_the_names_of_the_founding_documents(sets):
    lines = SyntheticImageDataset(sets / 'set', 'val', max_samples=4)
    assert len(lines) == 4
    assert lines[0][1] == normalise(texts[0] + 'ក')
    assert lines.metadata()['split'] == 'val'
    raw = SyntheticImageDataset(sets / 'set', 'val', raw=True)[0][0]
    assert (raw == read_image(sets / 'set/val/images/val_000000.png')).all()
    with pytest.raises(KhmerOCRError, match='khmer-ocr generate'):
        SyntheticImageDataset(sets / 'nothing')
    with pytest.raises(KhmerOCRError, match='Unknown split'):
        SyntheticImageDataset(sets / 'set', 'valid')
    maker = SyntheticImageGenerator()
    samples = list(maker.images(texts, 'val'))
    again = list(maker.images(texts, 'val'))
    assert [s.text for s in samples] == texts
    assert all((x.image == y.image).all() for x, y in zip(samples, again))
    assert not any(s.meta['ops'] for s in samples)
    assert maker.statistics(sets / 'set')['total_images'] == 30


@pytest.fixture
def line():
    return LineGenerator(Recipe(size=(28, 28)), texts)('val', 1).image


def variants(line):
    "The line as (name of a file, Pillow image, options of its `save`)"
    grey = Image.fromarray(line)
    ink = Image.new('RGBA', grey.size, (0, 0, 0, 0))
    ink.putalpha(Image.fromarray(255 - line))
    deep = Image.fromarray(line.astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    yield 'grey.png', grey, {}
    yield 'rgb.png', grey.convert('RGB'), {}
    yield 'palette.png', grey.convert('P'), {}
    yield 'palette.gif', grey, {}
    yield 'ink_on_nothing.png', ink, {}
    yield 'grey_alpha.png', grey.convert('LA'), {}
    yield 'deep.png', deep, {}
    yield 'deep.tif', deep, {}
    yield 'cmyk.tif', grey.convert('CMYK'), {}
    yield 'lossless.webp', grey, dict(lossless=True)
    yield 'high.jpg', grey, dict(quality=98)
    yield 'turned.jpg', grey.transpose(Image.Transpose.ROTATE_90), dict(quality=98, exif=turned)
    yield 'turned.tif', grey.transpose(Image.Transpose.ROTATE_90), dict(exif=turned)
    yield 'plain.bmp', grey, {}
    yield 'dark.png', Image.fromarray(255 - line), {}


def test_every_file_type_is_prepared_alike(line, tmp_path):
    want = preprocess(line).astype(int)
    for name, image, options in variants(line):
        image.save(tmp_path / name, **options)
        got = preprocess(read_image(tmp_path / name)).astype(int)
        assert got.shape == want.shape, name
        assert np.abs(got - want).mean() < 2, name


def test_reading_leaves_pillow_as_it_was(line, tmp_path, monkeypatch):
    "Its switches are those of whoever imports this package, also after an error; large scans open all the same"
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    for name, image, options in variants(line):
        image.save(tmp_path / name, **options)
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            read_image(tmp_path / name)
        assert (Image.MAX_IMAGE_PIXELS, TiffImagePlugin.READ_LIBTIFF) == (1000, False), name
    (tmp_path / 'text.png').write_text('hello')
    with pytest.raises(KhmerOCRError):
        read_image(tmp_path / 'text.png')
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize('margins', [(0, 0, 0, 0), (70, 40, 90, 30), (3, 60, 0, 400)])
def test_the_box_tells_what_was_cut_off(line, margins):
    top, bottom, left, right = margins
    image = np.pad(line, ((top, bottom), (left, right)), constant_values=255)
    normalised = normalise_line(image)
    x0, y0, x1, y1 = line_box(image)
    assert (x0, y0, x1, y1) == trim_box(normalised)
    assert (normalised[y0:y1, x0:x1] == trim(normalised)).all()
    ink = normalised < 128
    assert ink[y0:y1, x0:x1].sum() > 0.99 * ink.sum()
    height, width = y1 - y0, x1 - x0
    assert preprocess(image).shape == (40, max(8, round(width * 40 / height)))


def test_an_image_without_ink_is_its_own_box():
    assert trim_box(np.full((20, 50), 255, np.uint8)) == (0, 0, 50, 20)


def test_black_and_white_file(line, tmp_path):
    Image.fromarray(line).convert('1', dither=Image.Dither.NONE).save(tmp_path / 'bw.png')
    got = preprocess(read_image(tmp_path / 'bw.png')).astype(int)
    want = preprocess(np.where(line > 127, 255, 0).astype(np.uint8))
    assert np.abs(got - want).mean() < 2


def test_training_and_reading_prepare_alike(line, tmp_path):
    "What the stream feeds to the network is what a file of the same image becomes"
    generator = LineGenerator(recipe, texts)
    for i in range(12):
        image = generator('train', i).image
        Image.fromarray(image).save(tmp_path / f'{i}.png')
        assert (preprocess(read_image(tmp_path / f'{i}.png')) == preprocess(image)).all()


def test_label_files(line, tmp_path):
    Image.fromarray(line).save(tmp_path / 'a.png')
    (tmp_path / 'labels.tsv').write_text('a.png\tក“ខ”\na.png\tគ\n', encoding='utf-8-sig')
    assert [t for _, t, _ in read_labels(tmp_path)] == ['ក"ខ"', 'គ']
    assert [len(b['texts']) for b in LineFolder(tmp_path).batches(1)] == [1, 1]
    (tmp_path / 'labels.tsv').write_bytes('a.png\tក\n'.encode('utf-16'))
    with pytest.raises(KhmerOCRError, match='UTF-8'):
        read_labels(tmp_path)
    (tmp_path / 'labels.tsv').write_text('path\ttext\n')
    with pytest.raises(KhmerOCRError, match='no labelled lines'):
        read_labels(tmp_path)


def test_bad_files(tmp_path):
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'text.png').write_text('hello')
    (tmp_path / 'd').mkdir()
    Image.new('L', (50, 20)).save(tmp_path / 'cut.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'cut.png').read_bytes()[:40])
    for name in ('empty.png', 'text.png', 'cut.png', 'd', 'nothing.png'):
        with pytest.raises(KhmerOCRError, match=name) as e:
            read_image(tmp_path / name)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('scale, kind', [(4, np.uint16), (16, np.uint16), (64, np.uint16), (1 / 255, np.float32)])
def test_fewer_bits_in_a_deep_file(line, tmp_path, scale, kind):
    "10, 12 and 14 bits in 16, and floats up to 1, are full greys and no blank page; what is no number is ink"
    deep = (line.astype(np.float64) * scale).round(4).astype(kind)
    if kind is np.float32:
        deep[0, 0] = np.nan
    Image.fromarray(deep).save(tmp_path / 'deep.tif')
    assert np.abs(read_image(tmp_path / 'deep.tif')[1:].astype(int) - line[1:]).max() <= 1


def test_label_columns_go_by_name(tmp_path):
    (tmp_path / 'labels.tsv').write_text('split\tpath\ttext\nval\ta.png\tក\n\nval\tb c.png\t"ខ\n', encoding='utf-8')
    assert read_labels(tmp_path) == [
        (tmp_path / 'a.png', 'ក', dict(split='val')),
        (tmp_path / 'b c.png', '"ខ', dict(split='val')),
    ]
    (tmp_path / 'labels.tsv').write_text('path\tsplit\na.png\tval\n')
    with pytest.raises(KhmerOCRError, match='no column "text"'):
        read_labels(tmp_path)
    (tmp_path / 'labels.tsv').write_text('path\ttext\n\na.png\n')
    with pytest.raises(KhmerOCRError, match='line 3'):
        read_labels(tmp_path)
    (tmp_path / 'labels.tsv').write_text('a.png\t' + 'ក' * 200_000, encoding='utf-8')
    assert len(read_labels(tmp_path)[0][1]) == 200_000


# training on all of them
class StopBefore(Callback):
    def __init__(self, step):
        self.step = step

    def before_batch(self, learn):
        if learn.step == self.step:
            raise CancelFit


LOOP = dict(TINY_LOOP, batch_size=4, eval_every=3, save_every=3, threads=1)


def train_here(out, data, config, **kw):
    network = CTCConfig(**TINY_NETWORK)
    return train_recogniser('ctc', out, recipe, config, network, data, pool=4, texts=texts, verbose=False, **kw)


def assert_same_run(a, b):
    for name in ('latest.safetensors', 'history.csv'):
        assert (a / name).read_bytes() == (b / name).read_bytes(), (a.name, name)


@pytest.mark.parametrize('kind', ['onthefly', 'shards'])
def test_training_resumes_in_the_middle_of_an_epoch(sets, tmp_path, kind):
    "Stopped after step 4 of epochs of 3 steps and resumed, with or without a worker: the bytes of a run in one go"
    config = TrainConfig(steps=6, **LOOP)
    data = kind if kind == 'onthefly' else sets / kind
    train_here(tmp_path / 'whole', data, config)
    workers = 1 if kind == 'onthefly' else 0
    learn = train_here(tmp_path / 'cut', data, config, callbacks=[StopBefore(3)], workers=workers)
    assert learn.step == 4
    learn = train_here(tmp_path / 'cut', data, config, resume='latest')
    assert 0 < learn.logs['padding'] < 1
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


# mixing, stages, sizes
def own_lines(folder):
    "A user's labelled lines"
    folder.mkdir(exist_ok=True)
    generator = LineGenerator(Recipe(size=(24, 24)), texts)
    for i in range(7):
        image = np.pad(generator('val', i).image, 4, constant_values=255)
        Image.fromarray(image).save(folder / f'{i}.png')
    table = ''.join(f'{i}.png\t{texts[i % 5]}{i}\n' for i in range(7))
    (folder / 'labels.tsv').write_text(table, encoding='utf-8')
    return folder


stages = [
    dict(steps=4, preset='clean', wording=dict(lengths=[1.0, 0, 0, 0], blank=0.0)),
    dict(share=0.25, preset='light'),
    {},
]


def everything(folder):
    config = DataConfig(mix=0.5, scale=0.2)
    curriculum = read_stages(stages, recipe)
    return training_source(own_lines(folder), recipe, config, curriculum, 240, 8, charset=charset(), texts=texts)


def test_the_stream_of_everything_starts_anywhere_with_any_workers(tmp_path):
    def stream(n, **kw):
        return some_batches(everything(tmp_path / 'a'), n, batch_size=4, pool=4, **kw)

    whole = stream(24)
    for workers, step in ((0, 7), (1, 0), (2, 13)):
        assert_same(whole[step : step + 9], stream(9, step=step, workers=workers))
    labels = [t for b in whole[:20] for t in b['texts']]
    own = [t for t in labels if t[-1] in '0123456' and t[:-1] in texts]
    assert len(own) == 40  # half of 20 batches of 4


def test_mixed_lines_are_all_lines_of_both():
    class NamedLines(LineSource):
        def __init__(self, name):
            self.path = name

        def fetch(self, a, b, seed):
            return [(None, (self.path, i)) for i in range(a, b)]

    cuts = [0, 1, 5, 6, 50, 333, 1000]
    for share in (0.1, 1 / 3, 0.5, 0.9):
        mixed = MixedSource(NamedLines('own'), NamedLines('drawn'), share)
        got = []
        for a, b in zip(cuts, cuts[1:]):
            got += labels_of(mixed.fetch(a, b))
        drawn = int(1000 * share)
        assert sorted(got) == [('drawn', i) for i in range(drawn)] + [('own', i) for i in range(1000 - drawn)]


def test_stages_begin_where_they_are_said_to():
    read = read_stages(stages, recipe)
    curriculum = Curriculum(read, 240, 8, texts=texts)
    assert curriculum.ends == [32, 92, float('inf')]
    for stage, (a, b) in zip(read, ((0, 32), (32, 92), (92, 110))):
        alone = OnTheFlyDataset(stage.recipe, texts=texts)
        for (image, text), n in zip(curriculum.fetch(a, b)[::9], range(a, b, 9)):
            image2, text2 = alone.sample(n)
            assert text == text2
            assert (image == image2).all()
    assert curriculum.sources[0]._generator is None  # its lines are behind: its memory is free again


def test_the_last_stage_lasts_to_the_end_whatever_it_says():
    read = read_stages([dict(steps=3), dict(share=0.5), dict(share=1)], recipe)
    assert Curriculum(read, 100, 4, texts=texts).ends == [12, 62, float('inf')]


@pytest.mark.parametrize(
    'bad, word',
    [
        ([dict(share=0.6), dict(share=0.4), {}], 'leave something'),
        ([{}, {}], 'neither steps nor share'),
        ([dict(steps=-1), {}], 'from 0 up'),
        ([dict(steps=1, share=0.1), {}], 'give one'),
        ([dict(steps=1, seed=3), {}], 'cannot change seed'),
        ([dict(steps=1, wording=dict(lenghts=[1, 0, 0, 0])), {}], 'did you mean lengths'),
        ([dict(preset='lihgt', steps=2), {}], 'did you mean light'),
    ],
)
def test_stages_are_checked(bad, word):
    with pytest.raises(KhmerOCRError, match=word):
        read_stages(bad, recipe)


@pytest.mark.parametrize('seed', range(6))
def test_no_ink_is_cut_off_at_any_size(seed):
    rng = np.random.default_rng(seed)
    generator = LineGenerator(Recipe(preset='clean', augment=False, random_text=True, seed=seed), texts)
    for i in range(6):
        raw = generator('train', i).image
        line = preprocess(raw)
        for scale in (0.75, 1.1, 1.25):
            rescaled = rescale_line(raw, scale, float(rng.random()))
            grown = rescaled.shape[1] / line.shape[1]
            assert rescaled.shape[0] == 40
            ink = (line < 128).sum()
            if scale > 1 and ink > 50:
                assert (rescaled < 128).sum() > 0.8 * ink * grown**2
            if scale < 1:
                assert abs(grown - scale) < 0.1


def test_sizes_differ_from_line_to_line_and_by_seed():
    def widths(seed):
        source = OnTheFlyDataset(Recipe(random_text=True, seed=seed), texts=texts, raw=True)
        scaled = MultiScale(source, 0.3)
        return [scaled.rescaled(box, n).shape[1] for n in range(12)]

    box = np.pad(np.zeros((30, 90), np.uint8), 12, constant_values=255)
    assert widths(1) == widths(1) != widths(2)
    assert len(set(widths(1))) > 3


def test_labels_of_shards_are_checked_and_left_out(sets):
    lines = open_lines(sets / 'shards')
    few = Charset(sorted(set(''.join(labels_of(lines))) - set('?២')))
    with pytest.raises(KhmerOCRError, match=r'4 of 10 labels .*U\+003F'):
        check_labels(lines, few)
    assert check_labels(lines, few, skip=True) == 4
    left = [t for t in labels_of(open_lines(sets / 'shards')) if set(t) <= set(few.symbols)]
    assert labels_of(lines) == left
    assert len(lines) == len(left) == 6
    for epoch in range(2):
        assert sorted(labels_of(lines.fetch(6 * epoch, 6 * epoch + 6))) == sorted(left)
    whole = some_batches(lines, 5, batch_size=2, pool=2)
    assert_same(whole, some_batches(lines, 5, batch_size=2, pool=2, workers=1))


def test_training_on_everything_resumes_to_the_same_bytes(tmp_path):
    "Own lines, drawn ones by stages, several sizes, accumulated batches: stopped inside a stage and resumed"
    config = TrainConfig(steps=9, accumulate=2, ema=0.9, label_smoothing=0.05, **LOOP)

    def train(out, **kw):
        return train_here(tmp_path / out, everything(tmp_path / 'lines'), config, **kw)

    train('whole')
    assert train('cut', callbacks=[StopBefore(4)]).step == 5
    train('cut', resume='latest', workers=1)
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut')
