"Drawing with the embedded font: the exact box, boxes of clusters, and every refusal; offline"

import numpy as np
import pytest
from khmer_ocr.synth.fonts import Font, find_fonts
from khmer_ocr.synth.rendering import RenderError, hconcat, latin_scale, render, runs, GlyphCache, _caches
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import clusters
from khmer_ocr.synth import rendering as R

LINES = [
    'ព្រះរាជាណាចក្រកម្ពុជា ស្ត្រីខ្មែរ ២០២៥។',
    'ភ្នំពេញ ថ្ងៃទី១២ ខែឧសភា (2025)',
    'ជំងឺ COVID-19 នៅ Siem Reap',
    'ង៉ាវ ប៊ិច ស៊ើប ក៏ ឥឡូវ',
    'ៗ',
    '12:30',
]


@pytest.fixture(scope='module')
def noto():
    return next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')


@pytest.mark.parametrize('size', [12, 24, 33.5, 90])
@pytest.mark.parametrize('text', LINES)
def test_exact_box_and_clusters(noto, text, size):
    line = render(text, noto, size)
    ink = line.ink
    assert ink.dtype == np.uint8 and ink.ndim == 2
    for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert edge.any()
    assert ''.join(b[0] for b in line.boxes) == text.replace(' ', '')
    assert [b[0] for b in line.boxes] == [c for c in clusters(text) if c != ' ']
    for _, x0, y0, x1, y1 in line.boxes:
        assert 0 <= x0 < x1 <= ink.shape[1] and 0 <= y0 < y1 <= ink.shape[0] and ink[y0:y1, x0:x1].any()
    assert min(b[1] for b in line.boxes) == 0 and max(b[3] for b in line.boxes) == ink.shape[1]


def test_same_ink_again_and_after_the_caches_are_gone(noto):
    first = render(LINES[0], noto, 24).ink
    _caches.clear()
    GlyphCache.total_bytes = 0
    assert (render(LINES[0], noto, 24).ink == first).all()


def test_glyph_cache_is_bounded(noto, monkeypatch):
    _caches.clear()
    GlyphCache.total_bytes = 0
    monkeypatch.setattr(R, '_cache_limit', 40_000)
    for size in range(12, 60):
        render(LINES[0], noto, size)
    assert len(_caches) < 20 and GlyphCache.total_bytes < 200_000
    assert GlyphCache.total_bytes == sum(R._glyph_bytes(g) for p in _caches.values() for g in p.values())


def test_weight_changes_ink(noto):
    fonts = {f.style: f for f in find_fonts() if f.axes}
    light, bold = (render(LINES[0], fonts[s], 40).ink for s in ('Variable Light', 'Variable Bold'))
    assert bold.astype(float).sum() > 1.2 * light.astype(float).sum()
    assert (
        render(LINES[0], fonts['ExtraCondensed Regular'], 40).ink.shape[1]
        < 0.85 * render(LINES[0], noto, 40).ink.shape[1]
    )


def test_vowel_before_its_consonant(noto):
    "េ is typed after ក and drawn to its left: the shaped word is wider than the letter, and starts with the vowel"
    line = render('កេ', noto, 48)
    assert len(line.boxes) == 1 and [i for i, *_ in line.glyphs] == [0, 0]
    alone = render('ក', noto, 48).ink
    assert (line.ink[-alone.shape[0] :, -alone.shape[1] :] == alone).mean() > 0.95


@pytest.mark.parametrize(
    'text, why',
    [
        ('', 'empty'),
        ('  ', 'empty'),
        ('ក្', 'no letter below it'),
        ('ក្ ខ', 'no letter below it'),
        ('្ក', 'no letter to sit on'),
        ('ា', 'no letter to sit on'),
        ('ក ិ', 'U\\+17B7 KHMER VOWEL SIGN I'),
        ('ខ្មែរ 漢', 'U\\+6F22 CJK UNIFIED'),
        ('ក\nខ', 'U\\+000A'),
    ],
)
def test_refusals(noto, text, why):
    with pytest.raises(RenderError, match=why) as e:
        render(text, noto, 24)
    assert isinstance(e.value, KhmerOCRError) and '\n' not in str(e.value)


@pytest.mark.parametrize('size', [0, 1, 5.9, 301, -3, float('nan'), float('inf')])
def test_size_out_of_range(noto, size):
    with pytest.raises(RenderError, match='out of range'):
        render('ក', noto, size)


def test_broken_font_file(tmp_path):
    file = tmp_path / 'broken.ttf'
    file.write_bytes(b'no font at all')
    with pytest.raises(KhmerOCRError, match='broken.ttf is not a font file.*fonts install'):
        render('ក', Font('Broken', 'Regular', str(file), '', '', 'user'), 24)
    with pytest.raises(KhmerOCRError, match='gone.ttf cannot be opened'):
        render('ក', Font('Gone', 'Regular', str(tmp_path / 'gone.ttf'), '', '', 'user'), 24)


def test_runs(noto):
    text = 'តម្លៃ 12 USD (A4) 5%'
    assert ''.join(text[a:b] for a, b, *_ in runs(text, noto)) == text
    assert [(text[a:b], s) for a, b, _, s in runs(text, noto)] == [
        ('តម្លៃ 12 ', 'Khmr'),
        ('USD (A4', 'Latn'),
        (') 5%', 'Khmr'),
    ]


def test_latin_font_draws_latin_runs(noto):
    latin = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Black')
    plain, mixed = render('កម្ពុជា ABC', noto, 40), render('កម្ពុជា ABC', noto, 40, latin=latin)
    assert latin_scale(noto, latin) == pytest.approx(1, abs=0.1)
    assert plain.boxes[0][3] == mixed.boxes[0][3] and plain.boxes[-1] != mixed.boxes[-1]


def test_spacing_and_space(noto):
    text = 'ខ្មែរ ក ខ'
    plain, spaced, wide = render(text, noto, 30), render(text, noto, 30, spacing=5), render(text, noto, 30, space=3)
    gaps = len(clusters(text)) - 1
    assert abs(spaced.ink.shape[1] - plain.ink.shape[1] - 5 * gaps) <= 1
    assert wide.ink.shape[1] > plain.ink.shape[1] + 20
    assert len(spaced.boxes) == len(plain.boxes)


def test_every_font_draws_every_cluster():
    "all faces that are here: no box lost, no refusal, in text that they cover"
    for f in find_fonts():
        if f.split == 'latin':
            continue
        for text in ('ស្ត្រីខ្មែរ ព្រះពុទ្ធសាសនា', 'ង៉ាវ ប៊ិច ស៊ើប ១២៣៤ ៛'):
            assert ''.join(b[0] for b in render(text, f, 20).boxes) == text.replace(' ', ''), f.name


@pytest.mark.parametrize('size', [14, 24, 37.5])
def test_abreast_in_one_font_is_the_whole_line(size):
    "cut anywhere between clusters, in every face: the same boxes to a pixel, the same pen, (nearly) the same ink"
    for f in find_fonts()[::3]:
        if f.split == 'latin':
            continue
        for text in LINES[:2]:
            cs, whole = clusters(text), render(text, f, size)
            cuts = [i for i in range(1, len(cs)) if cs[i] != ' ' and i % 3 == 0]
            pieces = [''.join(cs[a:b]) for a, b in zip([0, *cuts], [*cuts, len(cs)])]
            line = hconcat([render(p, f, size) for p in pieces])
            assert line.text == text and line.baseline == whole.baseline and line.ink.shape[0] == whole.ink.shape[0]
            assert [b[0] for b in line.boxes] == [b[0] for b in whole.boxes]
            assert abs(line.advance - whole.advance) < 1, f.name  # a face may kern over the cut
            assert abs(line.ink.shape[1] - whole.ink.shape[1]) <= 2 and abs(line.left - whole.left) <= 1
            assert all(abs(a - b) <= 2 for p, q in zip(line.boxes, whole.boxes) for a, b in zip(p[1:], q[1:])), f.name
            assert abs(int(line.ink.sum()) - int(whole.ink.sum())) < 0.02 * whole.ink.sum()


def test_abreast_gaps_and_baseline(noto):
    a, b = render('ខ្មែរ ', noto, 40), render('ស្ត្រី', noto, 24)
    near, far = hconcat([a, b]), hconcat([a, b], [10])
    assert (
        near.text == 'ខ្មែរ ស្ត្រី'
        and near.baseline == max(a.baseline, b.baseline)
        and far.advance == near.advance + 10 == a.advance + b.advance + 10
    )
    assert far.ink.shape[1] - near.ink.shape[1] == 10 == far.boxes[-1][1] - near.boxes[-1][1]
    for _, x0, y0, x1, y1 in far.boxes:
        assert far.ink[y0:y1, x0:x1].any()
    assert (hconcat([a]).ink == a.ink).all() and hconcat([a]).boxes == a.boxes
    for bad in ([], [1, 2]):
        with pytest.raises(RenderError, match='2 pieces have 1 gaps'):
            hconcat([a, b], bad)
    with pytest.raises(RenderError, match='no piece'):
        hconcat([])


@pytest.mark.parametrize('stride', [56, 64, 112])
def test_height_of_the_columns_does_not_matter(noto, stride):
    whole = render(LINES[0], noto, 24)
    (placed, _), (h, w) = R._place_glyphs(LINES[0], noto, 24, None, 0.0, 1.0, stride), whole.ink.shape
    assert (R._blit(placed, -whole.left, -whole.baseline, w, h, stride) == whole.ink).all()
    assert whole.ink.flags.c_contiguous and whole.ink.flags.writeable


def test_line_higher_than_its_columns(monkeypatch):
    "is placed anew on higher ones (faces that tower are not among the embedded ones)"
    text, place, strides = 'ស្ត្រី ញ្ញុំ', R._place_glyphs, []
    monkeypatch.setattr(R, '_place_glyphs', lambda *args: strides.append(args[-1]) or place(*args))
    lines = [render(text, f, 24) for f in find_fonts() if f.split != 'latin']
    high = sum(l.ink.shape[0] > 56 for l in lines)
    assert strides.count(56) == len(lines) and strides.count(112) == high
    for l in lines:
        assert all(l.ink[y0:y1, x0:x1].any() for _, x0, y0, x1, y1 in l.boxes) and l.ink[0].any() and l.ink[-1].any()
    if len(lines) > 40:
        assert high
