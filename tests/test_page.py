"Finding lines on pages"

import cv2, numpy as np, pytest
from PIL import Image
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.inference.deskew import rotate
from khmer_ocr.inference.documents import open_pages
from khmer_ocr.inference.page import Box, crop_line, find_lines, page_text, read_page, straighten
from khmer_ocr.synth.rendering import render
from khmer_ocr.core.errors import KhmerOCRError

text = [
    'មនុស្សម្នាក់ៗមានសិទ្ធិទទួលការអប់រំ។ ការអប់រំត្រូវឥតបង់ថ្លៃ',
    'យ៉ាងហោចណាស់ក៏ការអប់រំបឋមសិក្សា និងការអប់រំជាមូលដ្ឋាន។',
    'ការអប់រំបឋមសិក្សាគឺជាកាតព្វកិច្ច ហើយការអប់រំបច្ចេកទេស',
    'និងវិជ្ជាជីវៈត្រូវផ្តល់ឱ្យ។',
    'ស្ត្រីខ្មែរ',
]
fonts = find_fonts()
font_of_pip = next(
    f for f in fonts if f.name.startswith('Noto Sans Khmer') and f.axes
)  # the one face that is always there


def typeset(rows, w=900, h=600, font=font_of_pip):
    "White page and the true ink boxes of `rows` (text, x, baseline, size)"
    page = np.full((h, w), 255, np.uint8)
    boxes = []
    for s, x, base, size in rows:
        line = render(s, font, size)
        height, width = line.ink.shape
        y = base - line.baseline
        at = np.s_[y : y + height, x : x + width]
        page[at] = np.minimum(page[at], 255 - line.ink)
        boxes.append((x, y, x + width, y + height))
    return page, boxes


def overlap(b, t):
    "Intersection over union of a `Box` and a true box"
    x0, y0, x1, y1 = t
    w = min(b.x1, x1) - max(b.x0, x0)
    h = min(b.y1, y1) - max(b.y0, y0)
    if w <= 0 or h <= 0:
        return 0
    return w * h / (b.width * b.height + (x1 - x0) * (y1 - y0) - w * h)


def matches(boxes, true, least=0.7):
    return len(boxes) == len(true) and all(overlap(b, t) > least for b, t in zip(boxes, true))


plain = [f for f in fonts if f.split != 'latin'][:4]


@pytest.mark.parametrize('font', plain, ids=[f.name for f in plain])
@pytest.mark.parametrize('size', [14, 22, 40])
def test_single_column(font, size):
    rows = [(t, 30 + (2 * size if i == 0 else 0), 3 * size + round(1.9 * size * i), size) for i, t in enumerate(text)]
    page, true = typeset(rows, 1800, 600, font)
    assert matches(find_lines(page), true)


@pytest.mark.parametrize('angle', [-4.2, -1, 0.4, 3])
def test_skew(angle):
    page, true = typeset([(t, 40, 80 + 42 * i, 22) for i, t in enumerate(text)], h=400)
    got = straighten(rotate(page, angle))
    assert abs(got.angle + angle) < 0.2
    assert len(got.boxes) == len(true)
    for b, t in zip(got.boxes, true):
        assert abs(b.width - (t[2] - t[0])) < 16


@pytest.mark.parametrize(
    'change',
    [
        lambda p: 255 - p,
        lambda p: (p * np.linspace(1, 0.35, p.shape[1])).astype(np.uint8),
        lambda p: (150 + p * 0.3).astype(np.uint8),
        lambda p: np.clip(p + np.random.default_rng(0).normal(0, 18, p.shape), 0, 255).astype(np.uint8),
    ],
    ids=['inverted', 'shadow', 'faint', 'noise'],
)
def test_conditions(change):
    page, true = typeset([(t, 40, 80 + 42 * i, 22) for i, t in enumerate(text)], h=400)
    # strong noise leaves specks at the ends of lines: a short line's box grows by a third of its height
    assert matches(find_lines(change(page)), true, 0.55)


def test_headings_and_gaps():
    rows = (
        [(text[4], 350, 70, 44), (text[4], 40, 150, 22), (text[4], 650, 150, 22)]
        + [(t, 40, 220 + 42 * i, 22) for i, t in enumerate(text)]
        + [('ហត្ថលេខា', 60, 520, 22), ('ប្រធាន', 700, 520, 22)]
    )
    page, true = typeset(rows)
    assert matches(find_lines(page), true)


def test_columns():
    column = [text[3], text[4] + text[4], text[3], text[4] + text[4], text[3]]
    rows = [(text[0], 60, 60, 30)] + [
        (t, x, 140 + 40 * i + (7 if x > 100 else 0), 20) for x in (40, 330) for i, t in enumerate(column)
    ]
    page, true = typeset(rows)
    assert matches(find_lines(page), true)


def test_pictures_and_rules():
    page, true = typeset([(t, 250, 80 + 42 * i, 22) for i, t in enumerate(text)])
    cv2.rectangle(page, (5, 5), (894, 594), 0, 3)
    cv2.line(page, (20, 500), (880, 500), 0, 2)
    cv2.circle(page, (120, 150), 70, 0, 4)
    cv2.circle(page, (120, 150), 30, 0, -1)
    assert matches(find_lines(page), true)


@pytest.mark.parametrize(
    'page',
    [np.full((300, 200), v, np.uint8) for v in (0, 130, 255)]
    + [
        np.zeros((1, 1), np.uint8),
        np.zeros((1, 900), np.uint8),
        np.random.default_rng(0).integers(230, 256, (200, 200), dtype=np.uint8),
    ],
)
def test_nothing_there(page):
    assert find_lines(page) == []


def test_noise_does_not_break():
    rng = np.random.default_rng(1)
    for shape in ((3, 3), (40, 40), (300, 17), (17, 300), (200, 300)):
        assert all(isinstance(b, Box) for b in find_lines(rng.integers(0, 256, shape, dtype=np.uint8)))


def test_wrong_image():
    with pytest.raises(KhmerOCRError, match='grey uint8'):
        find_lines(np.zeros((4, 4, 3), np.uint8))


def test_crop_masks_neighbours():
    page, true = typeset([(t, 40, 60 + 27 * i, 22) for i, t in enumerate(text[:4])], h=200)
    got = straighten(page)
    assert len(got.boxes) == 4
    for b in got.boxes:
        raw, clean = crop_line(got, b, mask=False), crop_line(got, b)
        assert raw.shape == clean.shape == (b.height, b.width)
        assert (clean >= raw).all()
        np.testing.assert_array_equal(crop_line(page, b), raw)


def test_reading_order_and_text():
    class Fake:
        def read(self, images):
            return [type('R', (), dict(text=f'line{i}'))() for i in range(len(images))]

    page, _ = typeset([(text[0], 40, 80, 22), (text[4], 40, 140, 22), (text[4], 600, 140, 22)], h=250)
    assert page_text(read_page(Fake(), page)) == 'line0\nline1\tline2'


def test_open_pages(tmp_path):
    page, _ = typeset([(t, 40, 80 + 42 * i, 22) for i, t in enumerate(text)], h=400)
    im, other = Image.fromarray(page), Image.fromarray(255 - page)
    for ext in ('tiff', 'pdf'):
        im.save(tmp_path / f'two.{ext}', save_all=True, append_images=[other])
        assert [n[-1] for n, _ in open_pages(tmp_path / f'two.{ext}')] == ['1', '2']
    im.convert('RGB').save(tmp_path / 'one.jpg')
    ((_, a),) = open_pages(tmp_path / 'one.jpg')
    assert a.shape == page.shape
    assert len(find_lines(a)) == 5
    (_, a), _ = open_pages(tmp_path / 'two.pdf', dpi=144)
    assert abs(a.shape[0] - 2 * page.shape[0]) <= 2
    assert a.dtype == np.uint8
    (tmp_path / 'a.png').write_text('no image')
    (tmp_path / 'b.pdf').write_text('no pdf')
    (tmp_path / 'c.pdf').write_bytes(b'%PDF-1.7\nbroken')
    (tmp_path / 'd.pdf').touch()
    (tmp_path / 'e.tif').write_bytes(b'II*\0broken')
    for n in ('a.png', 'b.pdf', 'c.pdf', 'd.pdf', 'e.tif', 'none.png', '.'):
        with pytest.raises(KhmerOCRError) as e:
            list(open_pages(tmp_path / n))
        assert '\n' not in str(e.value)
