"The judge of painted sets: every measure by hand, what must not change it, the tricks that must not win, standard errors against a second way to compute them, and errors in one line."

import cv2, math, numpy as np, pytest
from dataclasses import replace
from types import SimpleNamespace
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.generative.pairs import ImagePair, rendered_pairs, sauvola
from khmer_ocr.generative.quality import (
    KID_FLOOR,
    LOOK_FEATURES,
    Anchors,
    anchored,
    check_images,
    coverage,
    distances,
    flat_colours,
    geometric_mean,
    evaluate_images,
    kid,
    look_features,
    mask_iou,
    no_grid,
    novelty,
    paper_of,
    paste_baseline,
    realism,
    same_mask,
    score_table,
    spread,
    stacked,
    standardise,
    text_kept,
    tiles,
    two_colours,
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
    A, B = tiles(pages[:8], 128, 64), tiles(pages[8:], 128, 64, seed=1)
    images, masks = stacked(B)
    return SimpleNamespace(train=pages[:8], A=A, B=B, images=images, masks=masks, anchors=Anchors(A, B))


def judge(w, made, **kw):
    return evaluate_images(made, w.masks, w.A, w.B, anchors=w.anchors, **kw)


# --- tiles and baselines


def test_tiles_depend_on_seed_and_number_and_spread_over_pages(pages):
    a = tiles(pages[:3], 96, 7, seed=4)
    assert [t.group for t in a] == [f'page000{i % 3}' for i in range(7)] and len({t.name for t in a}) == 7
    assert (
        all((x.image == y.image).all() for x, y in zip(a, tiles(pages[:3], 96, 3, seed=4)))
        and not (a[0].image == tiles(pages[:3], 96, 1, seed=5)[0].image).all()
    )
    assert (
        all((t.mask > 0).mean() >= 0.03 and t.image.shape == (96, 96, 3) for t in a)
        and not (a[0].image == a[3].image).all()
    )
    assert tiles([replace(pages[0], group='book')], 96, 1)[0].group == 'book'
    for i, t in enumerate(a):
        assert any(
            (pages[i % 3].image[y : y + 96, x : x + 96] == t.image).all()
            and (pages[i % 3].mask[y : y + 96, x : x + 96] == t.mask).all()
            for y, x in np.argwhere((pages[i % 3].image[:165, :205] == t.image[0, 0]).all(-1))
        )
    assert 'no square of 96 px with 90% ink' in error(
        lambda: tiles(pages[:1], 96, 1, min_ink=0.9)
    ) and 'no pages' in error(lambda: tiles([]))


def toy_page(paper, ink, side=64, noise=0.0, seed=0):
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : -side // 4] = 255
    image = (
        np.where(mask[..., None] > 0, ink, paper) + rng(seed).normal(0, noise, (side, side, 1))
        if noise
        else np.where(mask[..., None] > 0, ink, paper)
    )
    return ImagePair(image.clip(0, 255).round().astype(np.uint8), mask, f'toy{seed}')


def test_two_colours_are_medians():
    p = toy_page((200, 190, 180), (30, 20, 10))
    p.image[0, :8] = 0
    p.image[20, 20:24] = 255  # a few stains move no median
    paper, ink = two_colours(p)
    assert paper.tolist() == [200, 190, 180] and ink.tolist() == [30, 20, 10]
    assert (
        two_colours(replace(p, mask=p.mask * 0))[1].tolist() == [0, 0, 0]
        and two_colours(replace(p, mask=p.mask * 0 + 255))[0].tolist() == [255] * 3
    )


def test_flat_colours_are_flat():
    ps = [toy_page((200, 190, 180), (30, 20, 10)), toy_page((150, 150, 150), (0, 0, 90))]
    masks = (rng().random((12, 32, 32)) < 0.2).astype(np.uint8) * 255
    made = flat_colours(masks, ps, 3)
    pairs = {(tuple(i[m == 0][0].tolist()), tuple(i[m > 0][0].tolist())) for i, m in zip(made, masks)}
    assert pairs == {((200, 190, 180), (30, 20, 10)), ((150, 150, 150), (0, 0, 90))} and all(
        len(np.unique(i[m == v].reshape(-1, 3), axis=0)) == 1 for i, m in zip(made, masks) for v in (0, 255)
    )
    assert (
        (made == flat_colours(masks, ps, 3)).all()
        and (made[:3] == flat_colours(masks[:3], ps, 3)).all()
        and (made != flat_colours(masks, ps, 4)).any()
    )


def test_paper_without_its_ink():
    p = toy_page((200, 190, 180), (30, 20, 10), noise=6.0, seed=1)
    got = paper_of(p).astype(float)
    ink = p.mask > 0
    far = cv2.dilate(p.mask, np.ones((9, 9), np.uint8)) == 0
    assert (got[far] == p.image[far]).all() and (np.abs(got[ink].mean(0) - [200, 190, 180]) < 2).all()
    assert 0.6 < got[ink].std(0).mean() / p.image[far].std(0).mean() < 1.4  # with its grain
    assert (got == paper_of(p)).all() and 'has no paper' in error(lambda: paper_of(replace(p, mask=p.mask * 0 + 255)))


def test_pasted_takes_ink_and_paper_of_two_pages():
    ps = [toy_page((200, 200, 200), (30, 0, 0)), toy_page((100, 160, 220), (0, 0, 90))]
    masks = np.zeros((16, 48, 48), np.uint8)
    masks[:, 16:32, 16:32] = 255
    made = paste_baseline(masks, ps)
    assert {(tuple(i[0, 0].tolist()), tuple(i[24, 24].tolist())) for i in made} == {
        ((200, 200, 200), (0, 0, 90)),
        ((100, 160, 220), (30, 0, 0)),
    }  # never both of one page
    edge = made[0, 24, 12:20, 0].astype(int)
    assert len(set(edge.tolist())) > 3  # soft
    assert set(np.unique(paste_baseline(masks, ps, soft=0)[..., 0]).tolist()) <= {200, 100, 30, 0}
    assert (made == paste_baseline(masks, ps, papers=[paper_of(p) for p in ps])).all() and (
        made[:4] == paste_baseline(masks[:4], ps)
    ).all()
    assert paste_baseline(np.zeros((1, 200, 150), np.uint8), ps).shape == (1, 200, 150, 3)  # larger than the page
    assert 'fewer than two' in error(lambda: paste_baseline(masks, ps[:1]))


# --- the measures by hand


def test_iou_is_that_of_the_binarised(world):
    got = mask_iou(world.images, world.masks)
    for i in (0, 5):
        found = sauvola(cv2.cvtColor(world.images[i], cv2.COLOR_RGB2GRAY)) > 0
        m = world.masks[i] > 0
        assert got[i] == pytest.approx((found & m).sum() / (found | m).sum())
    assert (
        0.5 < np.median(got) < 1
        and 'do not belong together' in error(lambda: mask_iou(world.images[:3], world.masks))
        and 'do not belong' in error(lambda: mask_iou(world.images, world.masks[:, :9]))
    )


def stripes(dark, light, side=64):
    return np.repeat(
        np.where(np.arange(side)[:, None] % 16 < 5, dark, light).astype(np.uint8)[..., None].repeat(side, 1), 3, -1
    )


def looks(*images):
    return [dict(zip(LOOK_FEATURES, f)) for f in look_features(np.stack(images))]


def test_features_say_what_they_are_named():
    plain, grey = looks(stripes(0, 255), stripes(60, 180))
    assert len(LOOK_FEATURES) == 28 == len(set(LOOK_FEATURES))
    lab = lambda v: cv2.cvtColor(np.full((1, 1, 3), v / 255, np.float32), cv2.COLOR_RGB2LAB)[0, 0, 0]
    assert [grey[k] for k in ('paper_L', 'ink_L', 'contrast')] == pytest.approx(
        [lab(180), lab(60), lab(180) - lab(60)], abs=0.05
    ) and [grey[k] for k in ('paper_a', 'paper_b', 'ink_a')] == pytest.approx([0] * 3, abs=0.2)
    tint = stripes(60, 180)
    tint[..., 2] -= 40
    (yellow,) = looks(tint)
    assert yellow['paper_b'] > 10 and yellow['ink_b'] > 10
    noise = rng().normal(0, 8, (64, 64, 1))
    fine = (stripes(60, 180) + noise).clip(0, 255).astype(np.uint8)
    coarse = (stripes(60, 180) + cv2.GaussianBlur(noise, (0, 0), 3)[..., None] * 8).clip(0, 255).astype(np.uint8)
    a, b = looks(fine, coarse)
    assert (
        a['noise_1'] > b['noise_1'] + 1
        and b['noise_4'] > a['noise_4']
        and b['noise_4'] > b['noise_1']
        and a['paper_std_L'] > grey['paper_std_L'] + 2
    )
    assert (
        a['kurtosis_1'] < grey['kurtosis_1']
        and abs(math.exp(looks((120 + noise * np.ones(3)).astype(np.uint8))[0]['kurtosis_1']) - 3) < 0.6
    )  # noise has 3
    (soft,) = looks(cv2.GaussianBlur(fine, (0, 0), 2))
    assert (
        soft['edge'] < a['edge'] - 0.2
        and soft['spectrum_1'] < a['spectrum_1'] - 1
        and soft['spectrum_5'] > a['spectrum_5'] - 1
    )
    assert np.isfinite(look_features(np.full((2, 64, 64, 3), 7, np.uint8))).all()
    assert 'too small' in error(lambda: look_features(np.zeros((1, 63, 90, 3), np.uint8))) and look_features(
        np.zeros((1, 64, 90, 3), np.uint8)
    ).shape == (1, 28)


def test_features_of_a_tile_are_its_own(world):
    f = look_features(world.images[:6])
    assert np.allclose(f, np.concatenate([look_features(world.images[i : i + 1]) for i in range(6)])) and np.allclose(
        f, look_features(world.images[:6, :, ::-1]), atol=0.35
    )  # mirrored: the same look


def test_standard_units():
    ref = np.array([[0.0, 5.0], [2.0, 5.0]])
    assert (
        standardise(np.array([[3.0, 5.0], [99.0, 5.0], [-99.0, 5.001]]), ref).tolist()
        == [[2, 0], [5, 0], [-5, pytest.approx(1)]]
        and distances(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])).item() == 5
    )


def test_kid_against_loops_and_in_expectation():
    a, b = rng(1).normal(size=(5, 3)), rng(2).normal(size=(4, 3))
    k = lambda x, y: (sum(p * q for p, q in zip(x, y)) / 3 + 1) ** 3
    within = lambda s: np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
    assert (
        kid(a, b)
        == pytest.approx(within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b]))
        == pytest.approx(kid(b, a))
        == pytest.approx(kid(a[::-1], b))
    )
    same = [kid(*rng(s).normal(size=(2, 20, 4))) for s in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5 and min(same) < 0  # unbiased
    assert 'two images on each side' in error(lambda: kid(a, b[:1]))


def test_realism_by_hand():
    assert [realism(k, 2.0, 200.0) for k in (1.0, 2.0, 20.0, 200.0, 999.0)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert (
        realism(-1.0, -2.0, 10.0) == 1
        and realism(1.0, -2.0, KID_FLOOR * 100) == pytest.approx(0.5)
        and math.isnan(realism(1.0, 9.0, 9.0))
    )


def test_coverage_by_hand_and_against_loops():
    line = np.array([[0.0], [1.0], [3.0], [10.0]])
    assert (
        coverage(line, np.array([[4.5]]), 1) == 0.5
        and coverage(line, np.array([[2.5]]), 1, [0, 0, 1, 2]) == 0.75
        and coverage(line, line, 1) == 1
        and coverage(line, line + 1e3, 1) == 0
    )
    real, made = rng(0).normal(size=(20, 3)), rng(1).normal(size=(6, 3))
    d = lambda x, y: np.linalg.norm(x - y)
    for groups in (None, np.arange(20) // 4):
        own = np.arange(20) if groups is None else groups
        want = np.mean(
            [
                min(d(r, m) for m in made) <= sorted(d(r, real[j]) for j in range(20) if own[j] != own[i])[2]
                for i, r in enumerate(real)
            ]
        )
        assert coverage(real, made, 3, groups) == want
    assert (
        'two groups' in error(lambda: coverage(line, line, 1, ['a'] * 4))
        and 'more tiles' in error(lambda: coverage(line, line, 4))
        and error(lambda: coverage(line, line, 0))
    )


def test_spread_and_novelty_by_hand():
    assert (
        spread(np.array([[0.0], [1.0], [3.0]])) == 2
        and spread(np.ones((3, 2))) == 0
        and novelty(np.array([[0.0], [5.0], [9.0]]), np.array([[1.0], [7.0]])) == 2
    )
    assert 'two images' in error(lambda: spread(np.ones((1, 2))))


def dotted(images, period=4, by=5.0):
    yy, xx = np.mgrid[: images.shape[1], : images.shape[2]]
    return (images + by * ((yy % period == 0) & (xx % period == 0))[..., None]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('period', (2, 4, 8))
def test_grid_is_a_gate_and_real_grids_are_forgiven(world, period):
    train = stacked(world.A)[0]
    dots = dotted(world.images, period, 8.0)
    assert (
        no_grid(world.images, train, world.images) == 1
        and no_grid(dots, train, world.images) == 0
        and no_grid(dots, train, dots) == 1
    )
    assert 'at least 8' in error(lambda: no_grid(dots[:7], train)) and 'at least one set' in error(
        lambda: no_grid(dots)
    )


def test_text_by_hand():
    masks = [np.full((4, n), 255, np.uint8) for n in (8, 9)]
    seen = {'clean': ['កខគឃ', 'ងចឆជ'], 'made': ['កខគ', 'ងចឆជ']}

    def read(images):
        return seen['clean' if images[0].max() == 0 else 'made']  # ink is black on the clean line

    made = [np.full((4, n, 3), 90, np.uint8) for n in (8, 9)]
    assert (
        text_kept(read, made, masks) == pytest.approx(1 - 1 / 8)
        and text_kept(read, made, masks, ['កខគង', 'ងចឆជ']) == 1 - (1 / 8 - 1 / 8)
        and text_kept(read, made, masks, ['កខគ', 'ងចឆជ']) == 1
    )  # better than clean is no better than 1
    seen['made'] = ['ក' * 40] * 2
    assert text_kept(read, made, masks) == 0
    assert '2 painted lines and 1 masks' in error(lambda: text_kept(read, made, masks[:1])) and 'with 1 texts' in error(
        lambda: text_kept(read, made, masks, ['ក'])
    )


def test_mean():
    assert (
        geometric_mean([0.5, 0.5, 2.0]) == pytest.approx(0.5 ** (1 / 3))
        and geometric_mean([1, 0, 1]) == 0 == geometric_mean([math.nan, 0])
        and math.isnan(geometric_mean([1, math.nan]))
        and geometric_mean([0.3]) == pytest.approx(0.3)
    )
    raw, real = (
        dict(iou=0.4, kid=20.0, coverage=0.3, spread=6.0, novelty=0.0),
        dict(iou=0.8, kid=2.0, kid_flat=200.0, coverage=0.6, spread=3.0, novelty=4.0),
    )
    assert anchored(raw, real) == pytest.approx(dict(M=0.5, R=0.5, C=0.5, D=1.0, N=0.0))


# --- the judge


def test_real_pages_are_the_yardstick(world):
    got = judge(world, world.images)
    assert [got[k] for k in (*'MRCDNG', 'mean')] == pytest.approx([1] * 7) and 'T' not in got and 'D_same' not in got
    assert got['raw']['iou'] == got['real']['iou'] and max(got['error'].values()) < 1e-6


def test_tricks_do_not_win(world):
    flat, paste, train = flat_colours(world.masks, world.train), paste_baseline(world.masks, world.train), stacked(world.A)[0]
    got = {
        k: judge(world, v)
        for k, v in dict(
            flat=flat,
            paste=paste,
            other=np.roll(world.images, 1, 0),
            dots=dotted(world.images),
            train=train,
            look=paste_baseline(world.masks, world.train[:1] * 2),
            image=np.repeat(paste[:1], 64, 0),
        ).items()
    }
    flat = got['flat']
    assert flat['M'] == 1 and flat['R'] < 0.1 and flat['C'] < 0.1 and flat['G'] == 1 and flat['mean'] < 0.4
    assert got['other']['M'] < 0.2 and min(got['other'][k] for k in 'RCDNG') > 0.99
    assert (
        got['dots']['G'] == 0 == got['dots']['mean'] and min(got['dots'][k] for k in 'MRCDN') > 0.85
    )  # which no other measure minds
    assert got['train']['N'] == 0 == got['train']['mean'] and got['train']['R'] == got['train']['C'] == 1
    assert (
        got['look']['C'] < 0.5
        and got['look']['D'] < 0.7 < got['paste']['D']
        and got['image']['D'] == 0 == got['image']['mean']
    )
    assert (
        flat['mean'] < got['look']['mean'] < got['paste']['mean'] <= 1
        and got['dots']['raw']['grid'] > got['paste']['raw']['grid'] + 0.3
    )


def test_judgement_repeats_and_does_not_mind_the_order(world):
    paste = paste_baseline(world.masks, world.train)
    a = judge(world, paste)
    order = rng().permutation(64)
    b = evaluate_images(
        list(paste[order]), world.masks[order], world.A, world.B, [world.B[i].group for i in order]
    )  # computes its own anchors
    for k in (*'MRCDNG', 'mean'):
        assert a[k] == pytest.approx(b[k])
    assert a['error'] == pytest.approx(b['error']) and a['real'] == pytest.approx(b['real'])


def test_standard_errors_against_judging_anew(world):
    paste = paste_baseline(world.masks, world.train)
    a = judge(world, paste, text=0.5)
    found = []
    for side in 'ab':
        for g in sorted({t.group for t in (world.A if side == 'a' else world.B)}):
            keep = [i for i, t in enumerate(world.B) if side == 'a' or t.group != g]
            A = [t for t in world.A if side == 'b' or t.group != g]
            got = evaluate_images(
                paste[keep], world.masks[keep], A, [world.B[i] for i in keep], text=0.5, anchors=smaller(world, A, keep)
            )
            found.append((side, [got[k] for k in (*'MRCDN', 'mean')]))
    want = (
        sum(
            7 / 8 * ((v := np.array([f for s, f in found if s == side])) - v.mean(0)).__pow__(2).sum(0) for side in 'ab'
        )
        ** 0.5
    )
    assert (
        [a['error'][k] for k in (*'MRCDN', 'mean')] == pytest.approx(want.tolist(), abs=1e-6)
        and a['T'] == 0.5
        and a['mean'] == pytest.approx((a['M'] * a['R'] * a['C'] * a['D'] * a['N'] * 0.5) ** (1 / 7))
    )


def smaller(world, A, keep):
    "Anchors of fewer tiles, with the flat colours they had"
    out = Anchors(A, [world.B[i] for i in keep])
    out.flat = world.anchors.flat[keep]
    out.raw = out.measure(out.b, out.iou)
    return out


def test_a_set_that_fails_outright_is_surely_zero(world):
    got = judge(world, dotted(world.images))
    assert got['mean'] == 0 == got['error']['mean']


def test_looks_of_one_mask(world):
    flat, m = flat_colours(world.masks[:1].repeat(6, 0), world.train), world.masks[:1]
    same = lambda l: same_mask(l, world.anchors)
    assert same(np.repeat(world.images[:2, None], 3, 1)) == 0 < same([flat[:3], flat[3:]]) < 1 and judge(
        world, world.images, looks=[flat]
    )['D_same'] == pytest.approx(same([flat]))
    assert same([flat]) == pytest.approx(
        min(1, spread(standardise(look_features(flat), world.anchors.a)) / world.anchors.raw['spread'])
    ) and 'D_same' not in judge(world, world.images)
    assert (
        'like the real tiles' in error(lambda: same(np.zeros((1, 2, 64, 64, 3), np.uint8)))
        and 'like the real tiles' in error(lambda: same(flat))
        and 'at least two' in error(lambda: same(flat[None, :1]))
    )


def test_the_table():
    judged = {
        'a': dict(M=0.5, mean=0.25, error=dict(M=0.125, mean=0.0625)),
        'b': dict(M=1.0, mean=1.0, T=0.9, D_same=0.0),
    }
    assert score_table(judged) == [
        ['', 'M', 'T', 'mean', 'D_same'],
        ['a', '0.50 ± 0.12', '', '0.25 ± 0.06', ''],
        ['b', '1.00', '0.90', '1.00', '0.00'],
    ]
    assert score_table(judged, errors=False)[1] == ['a', '0.50', '', '0.25', '']


def test_what_cannot_be_judged(world):
    im = world.images
    assert (
        'as_uint8' in error(lambda: check_images(im.astype(np.float32)))
        and 'grey images' in error(lambda: check_images(im[..., 0]))
        and 'different sizes' in error(lambda: check_images([im[0], im[0, :9]]))
        and 'too few' in error(lambda: check_images([]))
    )
    assert (
        'on both sides' in error(lambda: Anchors(world.A, world.A[:8] + world.B))
        and '2 training pages'
        in error(lambda: Anchors([t for t in world.A if t.group in ('page0000', 'page0001')], world.B))
        and 'and 1 held out' in error(lambda: Anchors(world.A, world.B[::8]))
    )
    flat = [replace(t, image=i) for t, i in zip(world.B, flat_colours(world.masks, world.train))]
    assert 'cannot serve as a yardstick' in error(lambda: Anchors(world.A, flat))
    assert (
        'at least 8' in error(lambda: judge(world, im[:7]))
        and 'both must be of one size' in error(lambda: judge(world, im[:, :100]))
        and 'belong together'
        in error(lambda: evaluate_images(im, world.masks[:9], world.A, world.B, anchors=world.anchors))
    )
    assert 'name the page of each mask' in error(
        lambda: evaluate_images(im[:9], world.masks[:9], world.A, world.B, anchors=world.anchors)
    )
