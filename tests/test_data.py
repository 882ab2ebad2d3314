"Batches and preprocessing: the same stream for any number of workers, and one road for every kind of image file."

import io, tarfile
from itertools import islice
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from khmer_ocr.data.datasets import (
    LineFolder,
    OnTheFly,
    OnTheFlyDataset,
    ShardedDataset,
    SyntheticImageDataset,
    SyntheticImageGenerator,
)
from khmer_ocr.data.mixing import Curriculum, DataConfig, MixedSource, MultiScale, at_scale, read_stages, training_source
from khmer_ocr.data.batching import bucket_batches, collate, cut_widths, padding
from khmer_ocr.data.datasets import check_labels, open_lines, read_labels
from khmer_ocr.data.preprocess import preprocess
from khmer_ocr.data.images import read_image
from khmer_ocr.synth.generator import Recipe, LineGenerator
from khmer_ocr.text.khmer import Charset, charset, normalise
from khmer_ocr.core.errors import KhmerOCRError

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា ព្រះមហាក្សត្រ', 'ភ្នំពេញ', 'តើអ្នកសុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
recipe = Recipe(random_text=True, seed=9)


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x['texts'] == y['texts'] and (x['images'] == y['images']).all() and (x['widths'] == y['widths']).all()


def test_workers_do_not_matter():
    streams = [list(islice(OnTheFly(recipe, 4, 4, texts=texts).batches(workers=w), 9)) for w in (0, 1, 2)]
    same(streams[0], streams[1])
    same(streams[0], streams[2])


@pytest.mark.parametrize('step', [1, 2, 5, 6, 13, 40])
def test_stream_starts_anywhere(step):
    stream = OnTheFly(recipe, 2, 4, texts=texts)
    same(list(islice(stream.batches(), step, step + 3)), list(islice(stream.batches(step), 3)))


def test_padding_waste_is_small():
    long = [normalise(' '.join(np.random.default_rng(i).choice(texts, 1 + i % 6))) for i in range(60)]
    batches = OnTheFly(recipe, 32, 32, texts=long)[2]
    assert (
        len(batches) == 32
        and sum(len(b['texts']) for b in batches) == 32 * 32
        and all(16 <= len(b['texts']) <= 40 for b in batches)
    )
    assert padding(batches) < 0.08
    assert padding(batches) < padding(
        bucket_batches([(im[0, :, :w].numpy(), '') for b in batches for im, w in zip(b['images'], b['widths'])], 32)
    )


@pytest.mark.parametrize('size, batches', [(1, 1), (1, 7), (2, 3), (7, 5), (30, 4), (64, 2), (97, 3)])
def test_cuts_are_whole(size, batches):
    w = np.sort(np.random.default_rng(size).integers(8, 2000, size * batches))
    cuts = cut_widths(w, batches)
    assert (
        len(cuts) == batches
        and cuts[0][0] == 0
        and cuts[-1][1] == len(w)
        and all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
    )
    assert all(max(1, size // 2) <= b - a <= max(1, size * 5 // 4) for a, b in cuts)
    area = lambda c: sum((b - a) * -(-w[b - 1] // 16) * 16 for a, b in c)
    assert area(cuts) <= area([(i * size, i * size + size) for i in range(batches)])


# on the fly
def loaded(lines, workers, **kw):
    return list(
        DataLoader(
            lines,
            batch_size=3,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context='spawn' if workers else None,
            **kw,
        )
    )


def test_an_ordinary_loader_gives_the_same_epochs_with_any_workers():
    made = {}
    for w in (0, 1, 2):
        lines = OnTheFlyDataset(recipe, train_samples_per_epoch=8, texts=texts)
        loader = DataLoader(
            lines,
            batch_size=3,
            collate_fn=collate,
            num_workers=w,
            multiprocessing_context='spawn' if w else None,
            persistent_workers=w > 0,
        )
        for e in (0, 1):
            lines.set_epoch(e)
            made[w, e] = list(loader)  # workers that stay must hear of the new epoch
    for e in (0, 1):
        same(made[0, e], made[1, e])
        same(made[0, e], made[2, e])
    assert made[0, 0][0]['texts'] + made[0, 0][1]['texts'] != made[0, 1][0]['texts'] + made[0, 1][1]['texts']


def test_epochs_differ_repeat_and_resume():
    lines, again = (OnTheFlyDataset(recipe, train_samples_per_epoch=6, texts=texts) for _ in range(2))
    epochs = []
    for e in range(3):
        lines.set_epoch(e)
        epochs.append(list(lines))
    assert [len(e) for e in epochs] == [6] * 3
    assert len({im.tobytes() for e in epochs for im, _ in e if im.min() < 250}) == sum(
        im.min() < 250 for e in epochs for im, _ in e
    )
    again.set_epoch(2)
    same(loaded(again, 0, sampler=range(2, 6)), [collate(epochs[2][2:5]), collate(epochs[2][5:])])
    with pytest.raises(IndexError):
        lines[6]
    with pytest.raises(KhmerOCRError, match='from 1 up'):
        OnTheFlyDataset(recipe, 0)


def test_stream_and_epochs_are_the_same_lines():
    lines = OnTheFlyDataset(recipe, train_samples_per_epoch=8, texts=texts)
    streamed = sorted(t for b in islice(lines.stream(4, pool=2), 4) for t in b['texts'])
    both = []
    for e in (0, 1):
        lines.set_epoch(e)
        both += [t for _, t in lines]
    assert streamed == sorted(both)


# sets from disk
@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "The same 10 lines as files and as shards of 4"
    d = tmp_path_factory.mktemp('sets')
    (d / 'corpus').mkdir()
    for k in ('train', 'val', 'test'):
        (d / 'corpus' / f'{k}.txt').write_text('\n'.join(t + n for n in 'កខ' for t in texts), encoding='utf-8')
    maker = SyntheticImageGenerator(Recipe(corpus=str(d / 'corpus'), fonts=None))
    maker.generate(d / 'set', max_lines=10, progress=False)
    (d / 'shards').mkdir()
    names = sorted((d / 'set/train/images').glob('*.png'))
    for k in range(0, 10, 4):
        with tarfile.open(d / f'shards/train-{k:06d}.tar', 'w') as t:
            for p in names[k : k + 4]:
                for ext, data in (
                    ('png', p.read_bytes()),
                    ('txt', (d / f'set/train/labels/{p.stem}.txt').read_bytes()),
                    ('json', b'{}'),
                ):
                    info = tarfile.TarInfo(f'{p.stem}.{ext}')
                    info.size = len(data)
                    t.addfile(info, io.BytesIO(data))
    return d


def test_shards_hold_the_same_lines(sets):
    a, b = open_lines(sets / 'set'), open_lines(sets / 'shards')
    assert isinstance(b, ShardedDataset) and len(a) == len(b) == 10
    for (im, t), (im2, t2) in zip(a, b):
        assert t == t2 and (im == im2).all()
    assert [t for _, t in open_lines(sets / 'shards', limit=5)] == [t for _, t in a][:5]
    for e in range(3):
        assert sorted(t for _, t in b.take(10 * e, 10 * e + 10)) == sorted(t for _, t in a)
    assert [t for _, t in b.take(0, 10)] != [t for _, t in b.take(10, 20)] != [t for _, t in b.take(10, 20, seed=1)]


@pytest.mark.parametrize('kind', ['set', 'shards'])
def test_streams_of_sets_start_anywhere_with_any_workers(sets, kind):
    whole = list(islice(open_lines(sets / kind).stream(3, pool=4), 14))
    for step in (1, 5, 9):
        same(whole[step : step + 4], list(islice(open_lines(sets / kind).stream(3, pool=4, step=step), 4)))
    for w in (2,) if kind == 'set' else (1, 2):
        same(whole[:9], list(islice(open_lines(sets / kind).stream(3, pool=4, workers=w), 9)))


def test_shards_are_read_once_per_pool(sets, monkeypatch):
    "Random order, and yet no shard is opened again and again"
    import khmer_ocr.data as data

    opened = []
    real = data.read_shard
    lines = open_lines(sets / 'shards')
    monkeypatch.setattr(data, 'read_shard', lambda p: opened.append(p) or real(p))
    lines.take(0, 10)
    assert len(opened) == 3


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
    assert len(lines) == 4 and lines[0][1] == normalise(texts[0] + 'ក') and lines.metadata()['split'] == 'val'
    raw = SyntheticImageDataset(sets / 'set', 'val', raw=True)[0][0]
    assert (raw == read_image(sets / 'set/val/images/val_000000.png')).all()
    with pytest.raises(KhmerOCRError, match='khmer-ocr generate'):
        SyntheticImageDataset(sets / 'nothing')
    with pytest.raises(KhmerOCRError, match='Unknown split'):
        SyntheticImageDataset(sets / 'set', 'valid')
    maker = SyntheticImageGenerator()
    a, b = (list(maker.images(texts, 'val')) for _ in range(2))
    assert (
        [s.text for s in a] == texts
        and all((x.image == y.image).all() for x, y in zip(a, b))
        and not any(s.meta['ops'] for s in a)
    )
    assert maker.statistics(sets / 'set')['total_images'] == 30


@pytest.fixture
def line():
    return LineGenerator(Recipe(size=(28, 28)), texts)('val', 1).image


def variants(im, d):
    g = Image.fromarray(im)
    rgba = g.convert('RGBA')
    rgba.putalpha(Image.fromarray(255 - im))
    ink = Image.new('RGBA', g.size, (0, 0, 0, 0))
    ink.putalpha(Image.fromarray(255 - im))
    exif = Image.Exif()
    exif[0x0112] = 6
    yield 'grey.png', lambda p: g.save(p)
    yield 'rgb.png', lambda p: g.convert('RGB').save(p)
    yield 'palette.png', lambda p: g.convert('P').save(p)
    yield 'palette.gif', lambda p: g.save(p)
    yield 'ink_on_nothing.png', lambda p: ink.save(p)
    yield 'grey_alpha.png', lambda p: g.convert('LA').save(p)
    yield 'deep.png', lambda p: Image.fromarray(im.astype(np.uint16) * 257).save(p)
    yield 'deep.tif', lambda p: Image.fromarray(im.astype(np.uint16) * 257).save(p)
    yield 'cmyk.tif', lambda p: g.convert('CMYK').save(p)
    yield 'lossless.webp', lambda p: g.save(p, lossless=True)
    yield 'high.jpg', lambda p: g.save(p, quality=98)
    yield 'turned.jpg', lambda p: g.transpose(Image.Transpose.ROTATE_90).save(p, quality=98, exif=exif)
    yield 'plain.bmp', lambda p: g.save(p)
    yield 'dark.png', lambda p: Image.fromarray(255 - im).save(p)


def test_every_file_type_is_prepared_alike(line, tmp_path):
    want = preprocess(line).astype(int)
    for name, save in variants(line, tmp_path):
        save(tmp_path / name)
        got = preprocess(read_image(tmp_path / name)).astype(int)
        assert got.shape == want.shape and np.abs(got - want).mean() < 2, name


def test_black_and_white_file(line, tmp_path):
    Image.fromarray(line).convert('1', dither=Image.Dither.NONE).save(tmp_path / 'bw.png')
    assert (
        np.abs(
            preprocess(read_image(tmp_path / 'bw.png')).astype(int)
            - preprocess(np.where(line > 127, 255, 0).astype(np.uint8))
        ).mean()
        < 2
    )


def test_training_and_reading_prepare_alike(line, tmp_path):
    "What the stream feeds to the network is what a file of the same image becomes"
    s = LineGenerator(recipe, texts)
    for i in range(12):
        im = s('train', i).image
        Image.fromarray(im).save(tmp_path / f'{i}.png')
        assert (preprocess(read_image(tmp_path / f'{i}.png')) == preprocess(im)).all()


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
    for n in ('empty.png', 'text.png', 'cut.png', 'd', 'nothing.png'):
        with pytest.raises(KhmerOCRError, match=n) as e:
            read_image(tmp_path / n)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('scale, kind', [(4, np.uint16), (16, np.uint16), (64, np.uint16), (1 / 255, np.float32)])
def test_fewer_bits_in_a_deep_file(line, tmp_path, scale, kind):
    "10, 12 and 14 bits in 16, and floats up to 1, are full greys and no blank page; what is no number is ink"
    a = (line.astype(np.float64) * scale).round(4).astype(kind)
    if kind is np.float32:
        a[0, 0] = np.nan
    Image.fromarray(a).save(tmp_path / 'deep.tif')
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
def test_training_resumes_in_the_middle_of_an_epoch(sets, tmp_path):
    "Stopped at step 4 of epochs of 3 steps and resumed, with or without a worker: the same bytes as a run that was not stopped"
    from khmer_ocr.models.ctc import CTCConfig
    from khmer_ocr.models.ctc_training import train_ctc
    from khmer_ocr.training.callbacks import Callback, CancelFit
    from khmer_ocr.training.settings import TrainConfig

    class Stop(Callback):
        def before_batch(self, learn):
            if learn.step == 3:
                raise CancelFit

    loop = TrainConfig(
        steps=6,
        batch_size=4,
        eval_every=3,
        save_every=3,
        log_every=1,
        precision='32-true',
        tensorboard=False,
        threads=1,
    )

    def go(out, data, **kw):
        return train_ctc(
            tmp_path / out,
            recipe,
            loop,
            CTCConfig(channels=(8, 8, 8, 8, 16), hidden=8, layers=1),
            data,
            pool=4,
            texts=texts,
            verbose=False,
            **kw,
        )

    for k, data in enumerate(('onthefly', sets / 'shards')):
        go(f'whole{k}', data)
        assert go(f'cut{k}', data, callbacks=[Stop()], workers=1 - k).step == 4
        learn = go(f'cut{k}', data, resume='latest')
        assert 0 < learn.shown['padding'] < 1
        for f in ('latest.safetensors', 'history.csv'):
            assert (tmp_path / f'whole{k}' / f).read_bytes() == (tmp_path / f'cut{k}' / f).read_bytes(), (data, f)


# mixing, stages, sizes
def mine(d):
    "A user's labelled lines"
    d.mkdir(exist_ok=True)
    for i in range(7):
        Image.fromarray(np.pad(255 - LineGenerator(Recipe(size=(24, 24)), texts)('val', i).image, 4) ^ 255).save(d / f'{i}.png')
    (d / 'labels.tsv').write_text(''.join(f'{i}.png\t{texts[i % 5]}{i}\n' for i in range(7)), encoding='utf-8')
    return d


stages = [
    dict(steps=4, preset='clean', wording=dict(lengths=[1.0, 0, 0, 0], blank=0.0)),
    dict(share=0.25, preset='light'),
    {},
]


def everything(d):
    return training_source(
        mine(d), recipe, DataConfig(mix=0.5, scale=0.2), read_stages(stages, recipe), 240, 8, charset=charset(), texts=texts
    )


def test_the_stream_of_everything_starts_anywhere_with_any_workers(tmp_path):
    whole = list(islice(everything(tmp_path / 'a').stream(4, pool=4), 24))
    for w, step in ((0, 7), (1, 0), (2, 13)):
        same(
            whole[step : step + 9], list(islice(everything(tmp_path / 'a').stream(4, pool=4, step=step, workers=w), 9))
        )
    own = [t for b in whole[:20] for t in b['texts'] if t[-1].isdigit() and t[-1] in '0123456' and t[:-1] in texts]
    assert len(own) == 40  # half of 20 batches of 4


def test_mixed_lines_are_all_lines_of_both():
    class Named(LineFolder):
        def __init__(self, name):
            self.path, self.name = name, name

        def take(self, a, b, seed):
            return [(None, (self.name, i)) for i in range(a, b)]

    for share in (0.1, 1 / 3, 0.5, 0.9):
        mixed, cuts = MixedSource(Named('own'), Named('drawn'), share), [0, 1, 5, 6, 50, 333, 1000]
        got = [t for a, b in zip(cuts, cuts[1:]) for _, t in mixed.take(a, b)]
        n = round(1000 * share)
        assert (
            sorted(got)
            == sorted(
                [('drawn', i) for i in range(int(1000 * share))] + [('own', i) for i in range(1000 - int(1000 * share))]
            )
            and abs(n - int(1000 * share)) <= 1
        )


def test_stages_begin_where_they_are_said_to():
    c = Curriculum(read_stages(stages, recipe), 240, 8, texts=texts)
    assert c.ends == [32, 92, float('inf')]
    for k, (a, b) in enumerate(((0, 32), (32, 92), (92, 110))):
        want = OnTheFlyDataset(read_stages(stages, recipe)[k].recipe, texts=texts)
        for (x, t), n in zip(c.take(a, b)[::9], range(a, b, 9)):
            y, u = want.sample(n)
            assert t == u and (x == y).all()
    assert c.sources[0]._synth is None  # behind us: its memory is free again
    assert (
        len(read_stages([dict(steps=3), dict(share=0.5), dict(share=1)], recipe)) == 3
    )  # the last lasts to the end, whatever it says


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
    rng, synth = (
        np.random.default_rng(seed),
        LineGenerator(Recipe(preset='clean', augment=False, random_text=True, seed=seed), texts),
    )
    for i in range(6):
        raw = synth('train', i).image
        one = preprocess(raw)
        for s in (0.75, 1.1, 1.25):
            im = at_scale(raw, s, float(rng.random()))
            assert im.shape[0] == 40
            if s > 1 and (one < 128).sum() > 50:
                assert (im < 128).sum() > 0.8 * (one < 128).sum() * (
                    im.shape[1] / one.shape[1]
                ) ** 2  # as much ink as there must be
            if s < 1:
                assert abs(im.shape[1] / one.shape[1] - s) < 0.1


def test_sizes_differ_from_line_to_line_and_by_seed():
    a, b = (MultiScale(OnTheFlyDataset(Recipe(random_text=True, seed=k), texts=texts, raw=True), 0.3) for k in (1, 2))
    blank = np.pad(np.zeros((30, 90), np.uint8), 12, constant_values=255)
    widths = [[s.sized(blank, n).shape[1] for n in range(12)] for s in (a, a, b)]
    assert widths[0] == widths[1] != widths[2] and len(set(widths[0])) > 3


def test_labels_of_shards_are_checked_and_left_out(sets):
    lines = open_lines(sets / 'shards')
    few = Charset(sorted(set(''.join(t for _, t in lines)) - set('?២')))
    with pytest.raises(KhmerOCRError, match=r'4 of 10 labels .*U\+003F'):
        check_labels(lines, few)
    assert check_labels(lines, few, skip=True) == 4 and len(lines) == 6
    want = sorted(t for _, t in open_lines(sets / 'shards') if set(t) <= set(few.symbols))
    for e in range(2):
        assert sorted(t for _, t in lines.take(6 * e, 6 * e + 6)) == want
    assert [t for _, t in lines] == [t for _, t in open_lines(sets / 'shards') if t in want]
    whole = list(islice(lines.stream(2, pool=2), 5))
    same(whole, list(islice(lines.stream(2, pool=2, workers=1), 5)))


def test_training_on_everything_resumes_to_the_same_bytes(tmp_path):
    "Own lines, drawn ones by stages, several sizes, accumulated batches, averaged weights: stopped at a step inside a stage and resumed"
    from khmer_ocr.models.ctc import CTCConfig
    from khmer_ocr.models.ctc_training import train_ctc
    from khmer_ocr.training.callbacks import Callback, CancelFit
    from khmer_ocr.training.settings import TrainConfig

    class Stop(Callback):
        def before_batch(self, learn):
            if learn.step == 4:
                raise CancelFit

    loop = TrainConfig(
        steps=9,
        batch_size=4,
        accumulate=2,
        ema=0.9,
        eval_every=3,
        save_every=3,
        log_every=1,
        precision='32-true',
        tensorboard=False,
        threads=1,
        label_smoothing=0.05,
    )

    def go(out, **kw):
        return train_ctc(
            tmp_path / out,
            recipe,
            loop,
            CTCConfig(channels=(8, 8, 8, 8, 16), hidden=8, layers=1),
            everything(tmp_path / 'lines'),
            pool=4,
            verbose=False,
            **kw,
        )

    go('whole')
    assert go('cut', callbacks=[Stop()]).step == 5
    go('cut', resume='latest', workers=1)
    for f in ('latest.safetensors', 'history.csv'):
        assert (tmp_path / 'whole' / f).read_bytes() == (tmp_path / 'cut' / f).read_bytes(), f
