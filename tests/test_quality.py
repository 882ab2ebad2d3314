"""Measures of generated sets: each by hand, what must not change it, the tricks that must not win, standard errors
against a second way to compute them, and errors in one line."""

import cv2, math, numpy as np, pytest
from dataclasses import replace
from types import SimpleNamespace
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.generative.pairs import ImagePair, rendered_pairs, sauvola
from khmer_ocr.generative.quality import (
    KID_FLOOR,
    MEASURES,
    STYLE_FEATURES,
    ReferenceSet,
    relative_to_reference,
    check_images,
    coverage,
    distances,
    flat_colours,
    geometric_mean,
    evaluate_images,
    kid,
    style_features,
    mask_iou,
    no_checkerboard,
    novelty,
    remove_ink,
    paste_baseline,
    realism,
    diversity_same_mask,
    measure_table,
    mean_pair_distance,
    stack_tiles,
    standardise,
    text_kept,
    cut_tiles,
    median_colours,
)
from khmer_ocr.core.errors import KhmerOCRError

words = ['ភ្នំពេញ', 'សាលារៀន', 'ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា', 'ព្រះមហាក្សត្រ', 'ឆ្នាំ ២០២៥']
noto = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')


def error(f):
    with pytest.raises(KhmerOCRError) as e:
        f()
    assert '\n' not in str(e.value)
    return str(e.value)


def rng(k=0):
    return np.random.default_rng(k)


@pytest.fixture(scope='module')
def pages():
    return rendered_pairs(words, [noto], 16, seed=1, shape=(260, 300), size=(20, 30))


@pytest.fixture(scope='module')
def world(pages):
    A = cut_tiles(pages[:8], 128, 64)
    B = cut_tiles(pages[8:], 128, 64, seed=1)
    images, masks = stack_tiles(B)
    return SimpleNamespace(train=pages[:8], A=A, B=B, images=images, masks=masks, reference=ReferenceSet(A, B))


def evaluate(w, made, **kw):
    return evaluate_images(made, w.masks, w.A, w.B, reference=w.reference, **kw)


# --- tiles and baselines


def _lies_in(tile, page):
    "Is a tile of 96 x 96 px, with its mask, a piece of the page?"
    corners = np.argwhere((page.image[:165, :205] == tile.image[0, 0]).all(-1))
    for y, x in corners:
        place = np.s_[y : y + 96, x : x + 96]
        if (page.image[place] == tile.image).all() and (page.mask[place] == tile.mask).all():
            return True
    return False


def test_tiles_depend_on_seed_and_number_and_spread_over_pages(pages):
    "Tile i is a piece of page i modulo the number of pages, with enough ink, the same in any number of tiles"
    a = cut_tiles(pages[:3], 96, 7, seed=4)
    assert [t.group for t in a] == [f'page000{i % 3}' for i in range(7)]
    assert len({t.name for t in a}) == 7
    assert all((x.image == y.image).all() for x, y in zip(a, cut_tiles(pages[:3], 96, 3, seed=4)))
    assert not (a[0].image == cut_tiles(pages[:3], 96, 1, seed=5)[0].image).all()
    assert all((t.mask > 0).mean() >= 0.03 and t.image.shape == (96, 96, 3) for t in a)
    assert not (a[0].image == a[3].image).all()
    assert cut_tiles([replace(pages[0], group='book')], 96, 1)[0].group == 'book'
    for i, t in enumerate(a):
        assert _lies_in(t, pages[i % 3])
    assert 'no square of 96 px with 90% ink' in error(lambda: cut_tiles(pages[:1], 96, 1, min_ink=0.9))
    assert 'no pages' in error(lambda: cut_tiles([]))


def toy_page(paper, ink, side=64, noise=0.0, seed=0):
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : -side // 4] = 255
    image = (
        np.where(mask[..., None] > 0, ink, paper) + rng(seed).normal(0, noise, (side, side, 1))
        if noise
        else np.where(mask[..., None] > 0, ink, paper)
    )
    return ImagePair(image.clip(0, 255).round().astype(np.uint8), mask, f'toy{seed}')


def test_median_colours_are_medians():
    "A few stains do not change the colours; a page without ink has black ink"
    p = toy_page((200, 190, 180), (30, 20, 10))
    p.image[0, :8] = 0
    p.image[20, 20:24] = 255  # a few stains move no median
    paper, ink = median_colours(p)
    assert paper.tolist() == [200, 190, 180]
    assert ink.tolist() == [30, 20, 10]
    assert median_colours(replace(p, mask=p.mask * 0))[1].tolist() == [0, 0, 0]
    assert median_colours(replace(p, mask=p.mask * 0 + 255))[0].tolist() == [255] * 3


def test_flat_colours_are_flat():
    "Paper and ink have one colour each, both of one page"
    ps = [toy_page((200, 190, 180), (30, 20, 10)), toy_page((150, 150, 150), (0, 0, 90))]
    masks = (rng().random((12, 32, 32)) < 0.2).astype(np.uint8) * 255
    made = flat_colours(masks, ps, 3)
    pairs = {(tuple(i[m == 0][0].tolist()), tuple(i[m > 0][0].tolist())) for i, m in zip(made, masks)}
    assert pairs == {((200, 190, 180), (30, 20, 10)), ((150, 150, 150), (0, 0, 90))}
    for image, mask in zip(made, masks):
        for level in (0, 255):
            colours = np.unique(image[mask == level].reshape(-1, 3), axis=0)
            assert len(colours) == 1
    assert (made == flat_colours(masks, ps, 3)).all()
    assert (made[:3] == flat_colours(masks[:3], ps, 3)).all()
    assert (made != flat_colours(masks, ps, 4)).any()


def test_paper_without_its_ink():
    "Where ink was there is paper of the same colour and grain, and the rest of the page is as before"
    p = toy_page((200, 190, 180), (30, 20, 10), noise=6.0, seed=1)
    got = remove_ink(p).astype(float)
    ink = p.mask > 0
    far = cv2.dilate(p.mask, np.ones((9, 9), np.uint8)) == 0
    assert (got[far] == p.image[far]).all()
    assert (np.abs(got[ink].mean(0) - [200, 190, 180]) < 2).all()
    assert 0.6 < got[ink].std(0).mean() / p.image[far].std(0).mean() < 1.4  # with its grain
    assert (got == remove_ink(p)).all()
    assert 'has no paper' in error(lambda: remove_ink(replace(p, mask=p.mask * 0 + 255)))


def test_pasted_takes_ink_and_paper_of_two_pages():
    "The ink is of one page and the paper of another, with a soft edge"
    ps = [toy_page((200, 200, 200), (30, 0, 0)), toy_page((100, 160, 220), (0, 0, 90))]
    masks = np.zeros((16, 48, 48), np.uint8)
    masks[:, 16:32, 16:32] = 255
    made = paste_baseline(masks, ps)
    paper_and_ink = {(tuple(i[0, 0].tolist()), tuple(i[24, 24].tolist())) for i in made}
    assert paper_and_ink == {((200, 200, 200), (0, 0, 90)), ((100, 160, 220), (30, 0, 0))}  # never both of one page
    edge = made[0, 24, 12:20, 0].astype(int)
    assert len(set(edge.tolist())) > 3  # soft
    assert set(np.unique(paste_baseline(masks, ps, soft=0)[..., 0]).tolist()) <= {200, 100, 30, 0}
    assert (made == paste_baseline(masks, ps, papers=[remove_ink(p) for p in ps])).all()
    assert (made[:4] == paste_baseline(masks[:4], ps)).all()
    assert paste_baseline(np.zeros((1, 200, 150), np.uint8), ps).shape == (1, 200, 150, 3)  # larger than the page
    assert 'fewer than two' in error(lambda: paste_baseline(masks, ps[:1]))


# --- the measures by hand


def test_iou_is_that_of_the_binarised(world):
    "The measure is the intersection over union of what Sauvola finds and the mask"
    got = mask_iou(world.images, world.masks)
    for i in (0, 5):
        found = sauvola(cv2.cvtColor(world.images[i], cv2.COLOR_RGB2GRAY)) > 0
        m = world.masks[i] > 0
        assert got[i] == pytest.approx((found & m).sum() / (found | m).sum())
    assert 0.5 < np.median(got) < 1
    assert 'do not belong together' in error(lambda: mask_iou(world.images[:3], world.masks))
    assert 'do not belong' in error(lambda: mask_iou(world.images, world.masks[:, :9]))


def stripes(dark, light, side=64):
    return np.repeat(
        np.where(np.arange(side)[:, None] % 16 < 5, dark, light).astype(np.uint8)[..., None].repeat(side, 1), 3, -1
    )


def features_of(*images):
    return [dict(zip(STYLE_FEATURES, f)) for f in style_features(np.stack(images))]


def test_features_say_what_they_are_named():
    "Colour, noise, kurtosis, edges and spectrum change the features that are named after them"
    plain, grey = features_of(stripes(0, 255), stripes(60, 180))
    assert len(STYLE_FEATURES) == 28 == len(set(STYLE_FEATURES))

    def lab(v):
        return cv2.cvtColor(np.full((1, 1, 3), v / 255, np.float32), cv2.COLOR_RGB2LAB)[0, 0, 0]

    assert [grey[k] for k in ('paper_L', 'ink_L', 'contrast')] == pytest.approx(
        [lab(180), lab(60), lab(180) - lab(60)], abs=0.05
    )
    assert [grey[k] for k in ('paper_a', 'paper_b', 'ink_a')] == pytest.approx([0] * 3, abs=0.2)
    tint = stripes(60, 180)
    tint[..., 2] -= 40
    (yellow,) = features_of(tint)
    assert yellow['paper_b'] > 10
    assert yellow['ink_b'] > 10
    noise = rng().normal(0, 8, (64, 64, 1))
    fine = (stripes(60, 180) + noise).clip(0, 255).astype(np.uint8)
    coarse = (stripes(60, 180) + cv2.GaussianBlur(noise, (0, 0), 3)[..., None] * 8).clip(0, 255).astype(np.uint8)
    a, b = features_of(fine, coarse)
    assert a['noise_1'] > b['noise_1'] + 1
    assert b['noise_4'] > a['noise_4']
    assert b['noise_4'] > b['noise_1']
    assert a['paper_std_L'] > grey['paper_std_L'] + 2
    assert a['kurtosis_1'] < grey['kurtosis_1']
    assert (
        abs(math.exp(features_of((120 + noise * np.ones(3)).astype(np.uint8))[0]['kurtosis_1']) - 3) < 0.6
    )  # noise has 3
    (soft,) = features_of(cv2.GaussianBlur(fine, (0, 0), 2))
    assert soft['edge'] < a['edge'] - 0.2
    assert soft['spectrum_1'] < a['spectrum_1'] - 1
    assert soft['spectrum_5'] > a['spectrum_5'] - 1
    assert np.isfinite(style_features(np.full((2, 64, 64, 3), 7, np.uint8))).all()
    assert 'too small' in error(lambda: style_features(np.zeros((1, 63, 90, 3), np.uint8)))
    assert style_features(np.zeros((1, 64, 90, 3), np.uint8)).shape == (1, 28)


def test_features_of_a_tile_are_its_own(world):
    "The features of a tile do not depend on the other tiles, and hardly on its mirror image"
    f = style_features(world.images[:6])
    assert np.allclose(f, np.concatenate([style_features(world.images[i : i + 1]) for i in range(6)]))
    # mirrored: the same style
    assert np.allclose(f, style_features(world.images[:6, :, ::-1]), atol=0.35)


def test_standard_units():
    "Features are standard deviations of the reference, cut off at 5"
    ref = np.array([[0.0, 5.0], [2.0, 5.0]])
    assert standardise(np.array([[3.0, 5.0], [99.0, 5.0], [-99.0, 5.001]]), ref).tolist() == [
        [2, 0],
        [5, 0],
        [-5, pytest.approx(1)],
    ]
    assert distances(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])).item() == 5


def test_kid_against_loops_and_in_expectation():
    "KID is the sum over pairs, symmetric, and 0 in the mean for one distribution"
    a = rng(1).normal(size=(5, 3))
    b = rng(2).normal(size=(4, 3))

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y)) / 3 + 1) ** 3

    def within(s):
        return np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])

    between = np.mean([k(x, y) for x in a for y in b])
    assert kid(a, b) == pytest.approx(within(a) + within(b) - 2 * between)
    assert kid(b, a) == pytest.approx(kid(a, b))
    assert kid(a[::-1], b) == pytest.approx(kid(a, b))
    same = [kid(*rng(s).normal(size=(2, 20, 4))) for s in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5
    assert min(same) < 0  # unbiased
    assert 'two images on each side' in error(lambda: kid(a, b[:1]))


def test_realism_by_hand():
    "1 at the distance of real pages, 0 at that of flat colours, between them by the logarithm"
    assert [realism(k, 2.0, 200.0) for k in (1.0, 2.0, 20.0, 200.0, 999.0)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert realism(-1.0, -2.0, 10.0) == 1
    assert realism(1.0, -2.0, KID_FLOOR * 100) == pytest.approx(0.5)
    assert math.isnan(realism(1.0, 9.0, 9.0))


def test_coverage_by_hand_and_against_loops():
    "Coverage is the share of balls with a made tile in them, with neighbours from other groups"
    line = np.array([[0.0], [1.0], [3.0], [10.0]])
    assert coverage(line, np.array([[4.5]]), 1) == 0.5
    assert coverage(line, np.array([[2.5]]), 1, [0, 0, 1, 2]) == 0.75
    assert coverage(line, line, 1) == 1
    assert coverage(line, line + 1e3, 1) == 0
    real = rng(0).normal(size=(20, 3))
    made = rng(1).normal(size=(6, 3))

    def d(x, y):
        return np.linalg.norm(x - y)

    for groups in (None, np.arange(20) // 4):
        own = np.arange(20) if groups is None else groups
        want = np.mean(
            [
                min(d(r, m) for m in made) <= sorted(d(r, real[j]) for j in range(20) if own[j] != own[i])[2]
                for i, r in enumerate(real)
            ]
        )
        assert coverage(real, made, 3, groups) == want
    assert 'two groups' in error(lambda: coverage(line, line, 1, ['a'] * 4))
    assert 'more tiles' in error(lambda: coverage(line, line, 4))
    assert error(lambda: coverage(line, line, 0))


def test_pair_distance_and_novelty_by_hand():
    "The mean over pairs and the median to the nearest tile are those of the definition"
    assert mean_pair_distance(np.array([[0.0], [1.0], [3.0]])) == 2
    assert mean_pair_distance(np.ones((3, 2))) == 0
    assert novelty(np.array([[0.0], [5.0], [9.0]]), np.array([[1.0], [7.0]])) == 2
    assert 'two images' in error(lambda: mean_pair_distance(np.ones((1, 2))))


def dotted(images, period=4, by=5.0):
    yy, xx = np.mgrid[: images.shape[1], : images.shape[2]]
    return (images + by * ((yy % period == 0) & (xx % period == 0))[..., None]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('period', (2, 4, 8))
def test_checkerboard_is_a_gate_and_those_of_the_data_are_allowed(world, period):
    "Dots give 0, unless the real images have them too"
    train = stack_tiles(world.A)[0]
    dots = dotted(world.images, period, 8.0)
    assert no_checkerboard(world.images, train, world.images) == 1
    assert no_checkerboard(dots, train, world.images) == 0
    assert no_checkerboard(dots, train, dots) == 1
    assert 'at least 8' in error(lambda: no_checkerboard(dots[:7], train))
    assert 'at least one set' in error(lambda: no_checkerboard(dots))


def test_text_kept_by_hand():
    "Only errors beyond those on the clean lines count"
    masks = [np.full((4, n), 255, np.uint8) for n in (8, 9)]
    seen = {'clean': ['កខគឃ', 'ងចឆជ'], 'made': ['កខគ', 'ងចឆជ']}

    def read(images):
        return seen['clean' if images[0].max() == 0 else 'made']  # ink is black on the clean line

    made = [np.full((4, n, 3), 90, np.uint8) for n in (8, 9)]
    assert text_kept(read, made, masks) == pytest.approx(1 - 1 / 8)
    assert text_kept(read, made, masks, ['កខគង', 'ងចឆជ']) == 1 - (1 / 8 - 1 / 8)
    assert text_kept(read, made, masks, ['កខគ', 'ងចឆជ']) == 1  # better than clean is no better than 1
    seen['made'] = ['ក' * 40] * 2
    assert text_kept(read, made, masks) == 0
    assert '2 generated lines and 1 masks' in error(lambda: text_kept(read, made, masks[:1]))
    assert 'with 1 texts' in error(lambda: text_kept(read, made, masks, ['ក']))


def test_geometric_mean_and_relative_measures():
    "One zero makes the mean zero, and each measure is divided by that of real pages"
    assert geometric_mean([0.5, 0.5, 2.0]) == pytest.approx(0.5 ** (1 / 3))
    assert geometric_mean([1, 0, 1]) == 0 == geometric_mean([math.nan, 0])
    assert math.isnan(geometric_mean([1, math.nan]))
    assert geometric_mean([0.3]) == pytest.approx(0.3)
    raw = dict(iou=0.4, kid=20.0, coverage=0.3, pair_distance=6.0, novelty=0.0)
    real = dict(iou=0.8, kid=2.0, kid_flat=200.0, coverage=0.6, pair_distance=3.0, novelty=4.0)
    assert relative_to_reference(raw, real) == pytest.approx(
        dict(mask_iou=0.5, realism=0.5, coverage=0.5, diversity=1.0, novelty=0.0)
    )


# --- all measures together


def test_real_pages_are_the_reference(world):
    "Held-out pages get 1 in every measure, without an error"
    got = evaluate(world, world.images)
    assert [got[k] for k in (*MEASURES, 'no_checkerboard', 'mean')] == pytest.approx([1] * 7)
    assert 'text_kept' not in got
    assert 'diversity_same_mask' not in got
    assert got['raw']['iou'] == got['real']['iou']
    assert max(got['error'].values()) < 1e-6


def test_tricks_do_not_win(world):
    "Each trick fails in the measure that is made for it, and none passes all"
    flat = flat_colours(world.masks, world.train)
    paste = paste_baseline(world.masks, world.train)
    train = stack_tiles(world.A)[0]
    got = {
        k: evaluate(world, v)
        for k, v in dict(
            flat=flat,
            paste=paste,
            other=np.roll(world.images, 1, 0),
            dots=dotted(world.images),
            train=train,
            style=paste_baseline(world.masks, world.train[:1] * 2),
            image=np.repeat(paste[:1], 64, 0),
        ).items()
    }
    flat = got['flat']
    assert flat['mask_iou'] == 1
    assert flat['realism'] < 0.1
    assert flat['coverage'] < 0.1
    assert flat['no_checkerboard'] == 1
    assert flat['mean'] < 0.4
    assert got['other']['mask_iou'] < 0.2
    assert min(got['other'][k] for k in (*MEASURES[1:], 'no_checkerboard')) > 0.99
    assert got['dots']['no_checkerboard'] == 0 == got['dots']['mean']
    assert min(got['dots'][k] for k in MEASURES) > 0.85  # which no other measure minds
    assert got['train']['novelty'] == 0 == got['train']['mean']
    assert got['train']['realism'] == got['train']['coverage'] == 1
    assert got['style']['coverage'] < 0.5
    assert got['style']['diversity'] < 0.7 < got['paste']['diversity']
    assert got['image']['diversity'] == 0 == got['image']['mean']
    assert flat['mean'] < got['style']['mean'] < got['paste']['mean'] <= 1
    assert got['dots']['raw']['checkerboard'] > got['paste']['raw']['checkerboard'] + 0.3


def test_the_measures_repeat_and_the_order_does_not_matter(world):
    "Tiles in another order, with a reference of their own, get the same measures and errors"
    paste = paste_baseline(world.masks, world.train)
    a = evaluate(world, paste)
    order = rng().permutation(64)
    b = evaluate_images(
        list(paste[order]), world.masks[order], world.A, world.B, [world.B[i].group for i in order]
    )  # computes its own anchors
    for k in (*MEASURES, 'no_checkerboard', 'mean'):
        assert a[k] == pytest.approx(b[k])
    assert a['error'] == pytest.approx(b['error'])
    assert a['real'] == pytest.approx(b['real'])


def test_standard_errors_against_measuring_anew(world):
    "The jackknife gives what leaving each page out and measuring again gives"
    paste = paste_baseline(world.masks, world.train)
    a = evaluate(world, paste, text_score=0.5)
    found = []
    for side in 'ab':
        for g in sorted({t.group for t in (world.A if side == 'a' else world.B)}):
            keep = [i for i, t in enumerate(world.B) if side == 'a' or t.group != g]
            A = [t for t in world.A if side == 'b' or t.group != g]
            got = evaluate_images(
                paste[keep],
                world.masks[keep],
                A,
                [world.B[i] for i in keep],
                text_score=0.5,
                reference=smaller(world, A, keep),
            )
            found.append((side, [got[k] for k in (*MEASURES, 'mean')]))
    want = (
        sum(
            7 / 8 * ((v := np.array([f for s, f in found if s == side])) - v.mean(0)).__pow__(2).sum(0) for side in 'ab'
        )
        ** 0.5
    )
    assert [a['error'][k] for k in (*MEASURES, 'mean')] == pytest.approx(want.tolist(), abs=1e-6)
    assert a['text_kept'] == 0.5
    product = a['mask_iou'] * a['realism'] * a['coverage'] * a['diversity'] * a['novelty'] * 0.5
    assert a['mean'] == pytest.approx(product ** (1 / 7))


def smaller(world, A, keep):
    "The reference of fewer tiles, with the flat colours it had"
    out = ReferenceSet(A, [world.B[i] for i in keep])
    out.flat_features = world.reference.flat_features[keep]
    out.raw = out.measure(out.held_out_features, out.held_out_iou)
    return out


def test_a_set_that_fails_outright_is_surely_zero(world):
    "A mean of 0 by the gate has a standard error of 0"
    got = evaluate(world, dotted(world.images))
    assert got['mean'] == 0 == got['error']['mean']


def test_variations_of_one_mask(world):
    "Equal variations have diversity 0, others their mean distance relative to that of real tiles"
    flat = flat_colours(world.masks[:1].repeat(6, 0), world.train)

    def same(l):
        return diversity_same_mask(l, world.reference)

    assert same(np.repeat(world.images[:2, None], 3, 1)) == 0 < same([flat[:3], flat[3:]]) < 1
    assert evaluate(world, world.images, variations=[flat])['diversity_same_mask'] == pytest.approx(same([flat]))
    features = standardise(style_features(flat), world.reference.train_features)
    by_hand = mean_pair_distance(features) / world.reference.raw['pair_distance']
    assert same([flat]) == pytest.approx(min(1, by_hand))
    assert 'diversity_same_mask' not in evaluate(world, world.images)
    assert 'like the real tiles' in error(lambda: same(np.zeros((1, 2, 64, 64, 3), np.uint8)))
    assert 'like the real tiles' in error(lambda: same(flat))
    assert 'at least two' in error(lambda: same(flat[None, :1]))


def test_the_table():
    "A row for each set, and a column for each measure that any set has"
    evaluated = {
        'a': dict(mask_iou=0.5, mean=0.25, error=dict(mask_iou=0.125, mean=0.0625)),
        'b': dict(mask_iou=1.0, mean=1.0, text_kept=0.9, diversity_same_mask=0.0),
    }
    assert measure_table(evaluated) == [
        ['', 'mask_iou', 'text_kept', 'mean', 'diversity_same_mask'],
        ['a', '0.50 ± 0.12', '', '0.25 ± 0.06', ''],
        ['b', '1.00', '0.90', '1.00', '0.00'],
    ]
    assert measure_table(evaluated, errors=False)[1] == ['a', '0.50', '', '0.25', '']


def test_what_cannot_be_measured(world):
    "Images and pages that do not fit are one-line errors"
    im = world.images
    assert 'as_uint8' in error(lambda: check_images(im.astype(np.float32)))
    assert 'grey images' in error(lambda: check_images(im[..., 0]))
    assert 'different sizes' in error(lambda: check_images([im[0], im[0, :9]]))
    assert 'too few' in error(lambda: check_images([]))
    assert 'on both sides' in error(lambda: ReferenceSet(world.A, world.A[:8] + world.B))
    assert '2 training pages' in error(
        lambda: ReferenceSet([t for t in world.A if t.group in ('page0000', 'page0001')], world.B)
    )
    assert 'and 1 held out' in error(lambda: ReferenceSet(world.A, world.B[::8]))
    flat = [replace(t, image=i) for t, i in zip(world.B, flat_colours(world.masks, world.train))]
    assert 'cannot serve as a reference' in error(lambda: ReferenceSet(world.A, flat))
    assert 'at least 8' in error(lambda: evaluate(world, im[:7]))
    assert 'both must be of one size' in error(lambda: evaluate(world, im[:, :100]))
    assert 'belong together' in error(
        lambda: evaluate_images(im, world.masks[:9], world.A, world.B, reference=world.reference)
    )
    assert 'name the page of each mask' in error(
        lambda: evaluate_images(im[:9], world.masks[:9], world.A, world.B, reference=world.reference)
    )
