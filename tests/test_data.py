"Batches and preprocessing: the same stream for any number of workers, and one road for every kind of image file."
from itertools import islice
import numpy as np
import pytest
from PIL import Image
from khmer_ocr.data import HEIGHT, LineFolder, OnTheFly, bucket_batches, prepare, read_image, read_labels
from khmer_ocr.synth import Recipe, Synth
from khmer_ocr.text import KhmerOCRError, normalise

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា ព្រះមហាក្សត្រ', 'ភ្នំពេញ', 'តើអ្នកសុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
recipe = Recipe(random_text=True, seed=9)

def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b): assert x['texts'] == y['texts'] and (x['images'] == y['images']).all() and (x['widths'] == y['widths']).all()

def test_workers_do_not_matter():
    streams = [list(islice(OnTheFly(recipe, 4, 4, texts=texts).batches(workers=w), 9)) for w in (0, 1, 2)]
    same(streams[0], streams[1]); same(streams[0], streams[2])

@pytest.mark.parametrize('step', [1, 2, 5, 6, 13, 40])
def test_stream_starts_anywhere(step):
    stream = OnTheFly(recipe, 2, 4, texts=texts)
    same(list(islice(stream.batches(), step, step+3)), list(islice(stream.batches(step), 3)))

def test_padding_waste_is_small():
    long = [normalise(' '.join(np.random.default_rng(i).choice(texts, 1+i % 6))) for i in range(60)]
    batches = OnTheFly(recipe, 64, 32, texts=long)[5]
    assert len(batches) == 32
    assert 1 - sum(int(b['widths'].sum()) for b in batches)/sum(b['images'].numel()/HEIGHT for b in batches) < .1

@pytest.fixture
def line(): return Synth(Recipe(size=(28, 28)), texts)('val', 1).image

def variants(im, d):
    g = Image.fromarray(im); rgba = g.convert('RGBA'); rgba.putalpha(Image.fromarray(255-im)); ink = Image.new('RGBA', g.size, (0, 0, 0, 0)); ink.putalpha(Image.fromarray(255-im))
    exif = Image.Exif(); exif[0x0112] = 6
    yield 'grey.png', lambda p: g.save(p)
    yield 'rgb.png', lambda p: g.convert('RGB').save(p)
    yield 'palette.png', lambda p: g.convert('P').save(p)
    yield 'palette.gif', lambda p: g.save(p)
    yield 'ink_on_nothing.png', lambda p: ink.save(p)
    yield 'grey_alpha.png', lambda p: g.convert('LA').save(p)
    yield 'deep.png', lambda p: Image.fromarray(im.astype(np.uint16)*257).save(p)
    yield 'deep.tif', lambda p: Image.fromarray(im.astype(np.uint16)*257).save(p)
    yield 'cmyk.tif', lambda p: g.convert('CMYK').save(p)
    yield 'lossless.webp', lambda p: g.save(p, lossless=True)
    yield 'high.jpg', lambda p: g.save(p, quality=98)
    yield 'turned.jpg', lambda p: g.transpose(Image.Transpose.ROTATE_90).save(p, quality=98, exif=exif)
    yield 'plain.bmp', lambda p: g.save(p)
    yield 'dark.png', lambda p: Image.fromarray(255-im).save(p)

def test_every_file_type_is_prepared_alike(line, tmp_path):
    want = prepare(line).astype(int)
    for name, save in variants(line, tmp_path):
        save(tmp_path/name); got = prepare(read_image(tmp_path/name)).astype(int)
        assert got.shape == want.shape and np.abs(got-want).mean() < 2, name

def test_black_and_white_file(line, tmp_path):
    Image.fromarray(line).convert('1', dither=Image.Dither.NONE).save(tmp_path/'bw.png')
    assert np.abs(prepare(read_image(tmp_path/'bw.png')).astype(int)-prepare(np.where(line > 127, 255, 0).astype(np.uint8))).mean() < 2

def test_training_and_reading_prepare_alike(line, tmp_path):
    "What the stream feeds to the network is what a file of the same image becomes"
    s = Synth(recipe, texts)
    for i in range(12):
        im = s('train', i).image; Image.fromarray(im).save(tmp_path/f'{i}.png')
        assert (prepare(read_image(tmp_path/f'{i}.png')) == prepare(im)).all()

def test_label_files(line, tmp_path):
    Image.fromarray(line).save(tmp_path/'a.png')
    (tmp_path/'labels.tsv').write_text('a.png\tក“ខ”\na.png\tគ\n', encoding='utf-8-sig')
    assert [t for _, t, _ in read_labels(tmp_path)] == ['ក"ខ"', 'គ']
    assert [len(b['texts']) for b in LineFolder(tmp_path).batches(1)] == [1, 1]
    (tmp_path/'labels.tsv').write_bytes('a.png\tក\n'.encode('utf-16'))
    with pytest.raises(KhmerOCRError, match='UTF-8'): read_labels(tmp_path)
    (tmp_path/'labels.tsv').write_text('path\ttext\n')
    with pytest.raises(KhmerOCRError, match='no labelled lines'): read_labels(tmp_path)

def test_bad_files(tmp_path):
    (tmp_path/'empty.png').touch(); (tmp_path/'text.png').write_text('hello'); (tmp_path/'d').mkdir()
    Image.new('L', (50, 20)).save(tmp_path/'cut.png'); (tmp_path/'cut.png').write_bytes((tmp_path/'cut.png').read_bytes()[:40])
    for n in ('empty.png', 'text.png', 'cut.png', 'd', 'nothing.png'):
        with pytest.raises(KhmerOCRError, match=n) as e: read_image(tmp_path/n)
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('scale, kind', [(4, np.uint16), (16, np.uint16), (64, np.uint16), (1/255, np.float32)])
def test_fewer_bits_in_a_deep_file(line, tmp_path, scale, kind):
    "10, 12 and 14 bits in 16, and floats up to 1, are full greys and no blank page; what is no number is ink"
    a = (line.astype(np.float64)*scale).round(4).astype(kind)
    if kind is np.float32: a[0, 0] = np.nan
    Image.fromarray(a).save(tmp_path/'deep.tif')
    assert np.abs(read_image(tmp_path/'deep.tif')[1:].astype(int)-line[1:]).max() <= 1

def test_label_columns_go_by_name(tmp_path):
    (tmp_path/'labels.tsv').write_text('split\tpath\ttext\nval\ta.png\tក\n\nval\tb c.png\t"ខ\n', encoding='utf-8')
    assert read_labels(tmp_path) == [(tmp_path/'a.png', 'ក', dict(split='val')), (tmp_path/'b c.png', '"ខ', dict(split='val'))]
    (tmp_path/'labels.tsv').write_text('path\tsplit\na.png\tval\n')
    with pytest.raises(KhmerOCRError, match='no column "text"'): read_labels(tmp_path)
    (tmp_path/'labels.tsv').write_text('path\ttext\n\na.png\n')
    with pytest.raises(KhmerOCRError, match='line 3'): read_labels(tmp_path)
    (tmp_path/'labels.tsv').write_text('a.png\t' + 'ក'*200_000, encoding='utf-8')
    assert len(read_labels(tmp_path)[0][1]) == 200_000
