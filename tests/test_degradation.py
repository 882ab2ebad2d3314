"Degradations: presets keep their bytes, and whatever an operation does, the text can still be read."

import hashlib
from functools import partial
import cv2
import numpy as np
import pytest
from khmer_ocr.synth.degradation import OPERATIONS
from khmer_ocr.synth.degradation import PRESETS, degrade
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.synth.rendering import render


def strokes(w=260, h=40, seed=5):
    "Something like writing, made by NumPy alone: bars and arcs with soft edges, dark on light"
    rng = np.random.Generator(np.random.Philox(key=seed))
    y, x = np.mgrid[:h, :w].astype(np.float64)
    d = np.full((h, w), 99.0)
    for cx in range(10, w - 8, 14):
        r = rng.integers(4, 10)
        d = np.minimum(
            d,
            np.minimum(
                abs(np.hypot(x - cx, y - 20) - r), np.where(abs(y - 20) < 2 * r, abs(x - cx - rng.integers(-4, 5)), 99)
            ),
        )
    return np.clip(80 * (d - 0.6), 0, 255).astype(np.uint8)


def written(text, size=24):
    "A rendered line in the face that is always there, with a margin"
    font = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')
    return 255 - np.pad(render(text, font, size).ink, ((5, 5), (8, 8)))


plain, second = strokes(), strokes(180, 30, 6)
line, other = written('ស្ត្រីកម្ពុជា ថ្ងៃទី១២ ខែមករា ឆ្នាំ២០២៥'), written('ព្រះរាជាណាចក្រ')


def operation(name):
    return OPERATIONS[name](second) if name in ('neighbours', 'joined') else OPERATIONS[name]


FROZEN = dict(
    clean='2526b2d5c124df5791c09915',
    light='f52dd21cb2d39a000437dc0c',
    document='1cafa2084983478828f6197e',
    hard='7aac830f54f56993bbfad53a',
    scan='4c5a949d3947ee4b0b816389',
    photo='a4f1a4a1e1d017be6b5a3328',
    buoy2022='acc2482a1b198c380b60db61',
)


@pytest.mark.parametrize('name', FROZEN)
def test_presets_that_weights_were_trained_on_keep_their_bytes(name):
    h = hashlib.sha256()
    for seed in range(120):
        for near in (second, None):
            image, done = degrade(plain, np.random.Generator(np.random.Philox(key=seed)), name, near, near)
            h.update(image.tobytes() + repr((image.shape, done)).encode())
    assert h.hexdigest()[:24] == FROZEN[name], (
        f'preset {name} gives other images than it gave the weights: add an operation or a preset, do not change one'
    )


@pytest.mark.parametrize('name', OPERATIONS)
@pytest.mark.parametrize('shape', [(1, 1), (3, 200), (300, 60), (120, 3), (40, 5000)])
def test_any_shape_stays_an_image(name, shape):
    image = np.full(shape, 255, np.uint8)
    image[shape[0] // 2] = 0
    image[:, shape[1] // 2 : shape[1] // 2 + 9] = 40
    for seed in range(4 if image.size > 9999 else 20):
        before = image.copy()
        out = operation(name)(image, np.random.default_rng(seed))
        assert out.dtype == np.uint8 and out.ndim == 2 and out.size
        assert (image == before).all(), 'the input was written to'


MAY_DO_NOTHING = {'neighbours', 'margins'}  # by chance both edges stay free, or the margin rounds to nothing


@pytest.mark.parametrize('name', OPERATIONS)
def test_a_function_of_its_seed_that_changes_the_image(name):
    changed, seen = 0, set()
    for seed in range(20):
        a, b = (operation(name)(line, np.random.default_rng(seed)) for _ in range(2))
        assert a.shape == b.shape and (a == b).all()
        changed += a.shape != line.shape or (a != line).any()
        seen.add(a.tobytes())
    assert changed >= (15 if name in MAY_DO_NOTHING else 20) and (len(seen) > 9 or name == 'invert')


def likeness(image, reference, piece=40, reach=24):
    "Mean correlation of the reference's pieces with the best place for them nearby in `image`"
    a = cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_REPLICATE).astype(np.float32)
    found = []
    for x in range(0, reference.shape[1] - piece + 1, piece):
        p = reference[4:-4, x : x + piece].astype(np.float32)
        found.append(cv2.matchTemplate(a, p, cv2.TM_CCOEFF_NORMED).max())
    return float(np.mean(found))


RESIZED = {'resample', 'dpi', 'chat', 'skew'}  # compared after a return to the old size


def legible(name, out):
    if name in RESIZED:
        out = cv2.resize(out, line.shape[::-1])
    return likeness(255 - out if name == 'invert' else out, line)


@pytest.mark.parametrize('name', OPERATIONS)
def test_the_text_can_still_be_seen(name):
    got = [legible(name, operation(name)(line, np.random.default_rng(seed))) for seed in range(40)]
    assert min(got) > 0.5 and np.mean(got) > 0.7


def test_a_stranger_is_not_like_the_line():
    assert likeness(cv2.resize(other, line.shape[::-1]), line) < 0.5


@pytest.mark.parametrize('name', PRESETS)
def test_presets_run_and_record(name):
    rng = partial(np.random.Philox, key=3)
    a, b = (degrade(line, np.random.Generator(rng()), name, other, other) for _ in range(2))
    assert (a[0] == b[0]).all() and a[1] == b[1] and set(a[1]) <= set(OPERATIONS)
    alone = [degrade(line, np.random.default_rng(k), name)[1] for k in range(30)]
    assert not {'joined', 'neighbours'} & {op for ops in alone for op in ops}


def test_joined_lines_stand_side_by_side():
    both = OPERATIONS['joined'](other)(line, np.random.default_rng(0))
    assert (
        both.shape[1] > line.shape[1] + other.shape[1]
        and likeness(both[:, : line.shape[1]], line) > 0.99
        and likeness(both[:, -other.shape[1] :], other) > 0.99
    )
