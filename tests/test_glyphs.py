"""No label is paired with an image that lacks one of its glyphs: every line drawn for a sample is checked by another
route, the font's character map as fontTools reads it and a second shaping. KHMER_OCR_MANY=50000 raises the number of
samples."""

import os
from collections import Counter
from functools import lru_cache
from pathlib import Path
import numpy as np
import pytest
import uharfbuzz as hb
from fontTools.ttLib import TTFont
from khmer_ocr.synth import generator as S
from khmer_ocr.text.rules import rule_line
from khmer_ocr.synth.rendering import render, runs
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import clusters, normalise, strip_spaces

MANY = int(os.environ.get('KHMER_OCR_MANY', 600))
CORPUS = Path(__file__).parent.parent / 'data/processed'


@lru_cache(maxsize=None)
def cmap(path):
    return frozenset(map(chr, TTFont(path, lazy=True, fontNumber=0).getBestCmap()))


@lru_cache(maxsize=None)
def shaper(path, axes):
    font = hb.Font(hb.Face(hb.Blob(Path(path).read_bytes())))
    if axes:
        font.set_variations(dict(axes))
    return font


def check(text, font, latin, line):
    "AssertionError if something of `text` is not in the ink of `line`"
    drawn = 0
    for a, b, f, script in runs(text, font, latin):
        assert set(text[a:b]) <= cmap(f.path), f'{f.name} has no {set(text[a:b]) - cmap(f.path)}'
        buf, shape = hb.Buffer(), shaper(f.path, f.axes)
        buf.add_str(text[a:b])
        buf.script, buf.direction, buf.language = script, 'ltr', 'km' if script == 'Khmr' else 'en'
        hb.shape(shape, buf)
        gids, circle = [i.codepoint for i in buf.glyph_infos], shape.get_nominal_glyph(0x25CC)
        assert 0 not in gids and (circle not in gids or '\u25cc' in text)
        drawn += sum(bool(e.width and e.height) for e in map(shape.get_glyph_extents, gids) if e)
    assert len(line.glyphs) == drawn, f'{drawn} glyphs have an outline, {len(line.glyphs)} were drawn'
    assert ''.join(b[0] for b in line.boxes) == ''.join(c for c in text if not c.isspace())
    owners = {i for i, *_ in line.glyphs}
    for n, c in zip(
        np.cumsum([0, *map(len, cs := clusters(text))]), cs
    ):  # each cluster owns ink, unless the shaper drew it as one piece with its neighbour
        if c.strip() and not any(int(n) <= i < n + len(c) for i in owners):
            assert len(line.boxes) < len([c for c in cs if c.strip()])
    for c, x0, y0, x1, y1 in line.boxes:
        assert c and line.ink[y0:y1, x0:x1].any()


def says(label, pieces):
    "Whether the label is what the first pieces say, or these and one of the later lines"
    bare = strip_spaces(label)
    for m in range(1, len(pieces) + 1):
        head = strip_spaces(normalise(''.join(pieces[:m])))
        if bare == head or any(bare == head + strip_spaces(normalise(p)) for p in pieces[m:]):
            return True
    return False


@pytest.mark.parametrize('held_out', [False, True])
def test_no_label_without_its_glyphs(held_out, monkeypatch):
    rng, drawn, fonts = np.random.default_rng(5), [], Counter()
    texts = None if (CORPUS / 'train.txt').exists() else [normalise(rule_line(rng)) for _ in range(400)]
    try:
        synth = S.LineGenerator(
            S.Recipe(corpus=str(CORPUS), random_text=True, common=0.0, styles=0.2, held_out=held_out, seed=77),
            texts=texts,
        )
    except KhmerOCRError:
        pytest.skip('no held-out fonts here')

    def recorded(text, font, size, *, latin=None, **style):
        line = render(text, font, size, latin=latin, **style)
        drawn.append((text, font, latin, line))
        return line

    draw = S._draw_sample

    def afresh(*args):
        drawn.clear()
        return draw(*args)

    monkeypatch.setattr(S, 'render', recorded)
    monkeypatch.setattr(S, '_draw_sample', afresh)
    n = MANY // 4 if held_out else MANY - MANY // 4
    blank = 0
    for i in range(n):
        sample = synth('train' if i % 4 else 'val', i)
        if not sample.text:
            blank += 1
            continue
        for d in drawn:
            try:
                check(*d)
            except AssertionError as e:
                raise AssertionError(f'sample {i}, {d[1].name}, {d[0]!r}: {e}') from None
        assert says(sample.text, [d[0] for d in drawn]), (i, sample.text, [d[0] for d in drawn])
        fonts[sample.meta['font']] += 1
    assert sum(fonts.values()) + blank == n
    if n >= 20 * len(synth.fonts):
        assert len(fonts) == len(synth.fonts), {f.name for f in synth.fonts} - set(fonts)
    print(f'{n} samples ({blank} blank), {len(fonts)} faces, no label lacked a glyph')


def test_the_check_notices(monkeypatch):
    "a line drawn without one of its glyphs, and a label that says more than was drawn"
    from khmer_ocr.synth.fonts import find_fonts

    font = next(f for f in find_fonts() if f.split != 'latin')
    line = render('ខ្មែរ ក', font, 24)
    check('ខ្មែរ ក', font, None, line)
    line.placed.pop(0)
    with pytest.raises(AssertionError, match='outline'):
        check('ខ្មែរ ក', font, None, line)
    assert says('ខ្មែរ ក', ['ខ្មែរ ', 'ក', 'អ'])
    assert not says('ខ្មែរ ក', ['ខ្មែ'])
    assert says('ក ខ គ', ['ក ', 'ខ', 'ឃ', 'គ'])
