"""Pairs of page and mask: Sauvola against the formula pixel by pixel, folders and what goes wrong in them, splits by
group, crops that keep image and mask together, batches by number."""

import cv2, math, numpy as np, pytest, torch
from itertools import islice
from PIL import Image
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.generative.pairs import (
    CropConfig,
    ImagePair,
    PairBatches,
    as_uint8,
    create_synthetic_dataloader,
    crop,
    image_files,
    random_crop,
    read_colour,
    read_groups,
    read_pairs,
    rendered_pairs,
    sauvola,
    save_pairs,
    typeset_page,
    split_pairs,
)
from khmer_ocr.core.errors import KhmerOCRError

texts = ['ភ្នំពេញ', 'សាលារៀន', 'ជាតិ សាសនា', 'ឆ្នាំ ២០២៥']
noto = next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')


def coded(h=90, w=120, name='p', group=''):
    "A page whose mask is its red channel: a crop shows if both were cut at one place; green and blue are coordinates"
    mask = np.random.default_rng(h).integers(0, 2, (h, w)).astype(np.uint8) * 255
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    return ImagePair(np.stack([mask, y, x], -1), mask, name, group)


def error(f):
    with pytest.raises(KhmerOCRError) as e:
        f()
    assert '\n' not in str(e.value)
    return str(e.value)


def test_sauvola_is_the_formula():
    "The threshold of each pixel is that of the formula over its window"
    g = np.random.default_rng(0).integers(0, 256, (23, 31)).astype(np.uint8)
    r = 3
    k = 0.3
    R = 100.0
    p = np.pad(g.astype(float), r, mode='symmetric')
    for y in range(23):
        for x in range(31):
            w = p[y : y + 2 * r + 1, x : x + 2 * r + 1]
            T = w.mean() * (1 + k * (w.std() / R - 1))
            if abs(T - g[y, x]) > 1e-6:
                assert (sauvola(g, 7, k, R)[y, x] == 255) == (g[y, x] < T)
    assert 'window' in error(lambda: sauvola(g, 1))
    assert error(lambda: sauvola(g, 9, 2.0))


def test_rendered_pairs_repeat_and_stay_over_their_masks():
    "Page i is the same in any set, and its ink lies where the mask says; what moves ink is refused"
    a = rendered_pairs(texts, [noto], 4, seed=3, shape=(200, 240))
    b = rendered_pairs(texts, [noto], 2, seed=3, shape=(200, 240))
    for p, q in zip(a, b):
        assert (p.image == q.image).all()
        assert (p.mask == q.mask).all()
        assert p.text == q.text
    assert not (a[0].image == rendered_pairs(texts, [noto], 1, seed=4, shape=(200, 240))[0].image).all()
    clean = rendered_pairs(texts, [noto], 3, shape=(200, 240), degradation=())
    for p in clean:
        dark = (
            p.image.astype(float).mean(-1) < (p.image.max() * 0.9 + p.image.min()) / 2
        )  # without damage the mask is found by a threshold
        assert (dark & (p.mask > 0)).sum() / (dark | (p.mask > 0)).sum() > 0.9
        assert set(p.text.split('\n')) <= set(texts)
    (line,) = rendered_pairs(texts, [noto], 1, shape=None)
    assert line.text in texts
    assert line.mask.shape[0] < 120
    assert 'moves the ink' in error(lambda: rendered_pairs(texts, [noto], 3, degradation=[('margins', 1.0)]))
    assert 'No line' in error(lambda: rendered_pairs(texts, [noto], 1, shape=(12, 12)))


def test_lines_that_do_not_fit_are_not_set():
    "A page has whole lines only, and the text names those"
    ink, text = typeset_page(texts, noto, 20, (90, 300))
    assert text == '\n'.join(texts[:2])  # and no half line is there
    whole, _ = typeset_page(texts[:2], noto, 20, (90, 300))
    assert (ink == whole).all()


def test_folders_round_trip_in_any_polarity(tmp_path):
    "Pairs that are written are read again, also from masks with black ink"
    pairs = [coded(40, 50, 'a', 'x'), coded(60, 50, 'b', 'y')]
    for p in pairs:
        p.mask[:] = 0
        p.mask[5:9, 5:30] = 255
    save_pairs(tmp_path, pairs)
    back = read_pairs(tmp_path / 'images', tmp_path / 'masks')
    assert [(p.name, p.group) for p in back] == [('a', 'x'), ('b', 'y')]
    for p, q in zip(pairs, back):
        assert (p.image == q.image).all()
        assert (p.mask == q.mask).all()
    (tmp_path / 'dark').mkdir()
    for p in pairs:
        cv2.imwrite(str(tmp_path / 'dark' / f'{p.name}.bmp'), 255 - p.mask)
    assert all((p.mask == q.mask).all() for p, q in zip(pairs, read_pairs(tmp_path / 'images', tmp_path / 'dark')))
    assert (read_pairs(tmp_path / 'images', tmp_path / 'dark', ink='light')[0].mask == 255 - pairs[0].mask).all()
    assert "'ink'" in error(lambda: read_pairs(tmp_path / 'images', tmp_path / 'dark', ink='black'))
    alone = read_pairs(tmp_path / 'images', window=9, k=0.3)
    assert (alone[0].mask == sauvola(cv2.cvtColor(pairs[0].image, cv2.COLOR_RGB2GRAY), 9, 0.3)).all()


def test_colour_and_its_exceptions(tmp_path):
    "Transparent is white, grey has three channels, and a turned photograph is set upright"
    Image.new('RGBA', (8, 6), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
    Image.new('L', (8, 6), 77).save(tmp_path / 'grey.png')
    im = Image.new('RGB', (8, 6), (10, 200, 30))
    ex = Image.Exif()
    ex[274] = 6
    im.save(tmp_path / 'turned.jpg', exif=ex)
    assert (read_colour(tmp_path / 'clear.png') == 255).all()
    assert (read_colour(tmp_path / 'grey.png') == 77).all()
    assert read_colour(tmp_path / 'grey.png').shape == (6, 8, 3)
    assert read_colour(tmp_path / 'turned.jpg').shape == (8, 6, 3)
    assert abs(read_colour(tmp_path / 'turned.jpg')[0, 0].astype(int) - (10, 200, 30)).max() < 4


def test_faults_are_one_line_each(tmp_path):
    "Each mistake with folders, masks and settings is one line that names the file or the setting"
    save_pairs(tmp_path, [coded(name='a'), coded(name='b')])
    images = tmp_path / 'images'
    masks = tmp_path / 'masks'
    assert 'No images found in' in error(lambda: create_synthetic_dataloader(tmp_path / 'none', masks))
    (tmp_path / 'void').mkdir()
    assert f'No images found in {tmp_path / "void"}' in error(
        lambda: create_synthetic_dataloader(tmp_path / 'void', masks)
    )
    assert 'No images found in' in error(lambda: create_synthetic_dataloader(images, tmp_path / 'void'))
    (masks / 'b.png').rename(masks / 'c.png')
    e = error(lambda: read_pairs(images, masks))
    assert 'Unpaired names: b of' in e
    assert 'c of' in e
    (masks / 'c.png').unlink()
    cv2.imwrite(str(masks / 'b.png'), np.zeros((90, 121), np.uint8))
    assert '121 x 90 pixels' in error(lambda: read_pairs(images, masks))
    (masks / 'b.png').write_bytes(b'')
    assert 'is empty' in error(lambda: read_pairs(images, masks))
    (images / 'b.png').write_bytes(b'text')
    assert 'cannot be read as an image' in error(lambda: read_pairs(images))
    cv2.imwrite(str(images / 'a.jpg'), np.zeros((9, 9), np.uint8))
    assert 'the same name' in error(lambda: image_files(images))
    (tmp_path / 'manifest.csv').write_text('name,book\na,1\n')
    assert 'must have the columns' in error(lambda: read_groups(images))
    assert 'no pairs' in error(lambda: PairBatches([]))
    assert "'batch_size'" in error(lambda: PairBatches([coded()], 0))
    for bad in (
        dict(size=4),
        dict(zoom=(2.0, 1.0)),
        dict(zoom=(0.0, 1.0)),
        dict(tries=0),
        dict(min_ink=2.0),
        dict(anywhere=-1.0),
    ):
        error(lambda: CropConfig(**bad))


def test_groups_stay_on_one_side():
    "Pages of one group are all for training or all held out; one group cannot be split"
    pairs = [coded(name=str(i), group='abc'[i // 3] if i < 9 else '') for i in range(12)]
    for seed in range(8):
        train, held = split_pairs(pairs, 0.3, seed)
        assert len(train) + len(held) == 12
        assert train
        assert held
        assert not {p.group or p.name for p in train} & {p.group or p.name for p in held}
        assert [p.name for p in held] == [p.name for p in split_pairs(pairs, 0.3, seed)[1]]
    assert 'cannot be split' in error(lambda: split_pairs(pairs[:3]))


def test_crops_keep_image_and_mask_together():
    "A crop is one piece of the page with its own mask, from anywhere on it, mirrored only if asked"
    page = coded()
    seen = set()
    for seed in range(60):
        im, m = random_crop(page, np.random.default_rng(seed), CropConfig((32, 48), flips=True))
        assert im.shape == (32, 48, 3)
        assert (im[..., 0] == m).all()
        dx = np.diff(im[0, :, 2].astype(int))
        assert abs(dx[0]) == 1
        assert (dx == dx[0]).all()  # one piece of the page, perhaps mirrored
        seen.add((int(im[0, 0, 1]), int(im[0, 0, 2]), int(dx[0])))
    assert len(seen) > 50
    assert {s[2] for s in seen} == {1, -1}
    for s in range(30):
        image, _ = random_crop(page, np.random.default_rng(s), CropConfig(32))
        left, right = image[0, :2, 2].astype(int)
        assert right - left == 1  # mirrors are off
    corners = set()
    for s in range(40):
        image, _ = random_crop(page, np.random.default_rng(s), CropConfig((89, 119), tries=1))
        corners.add(tuple(image[0, 0, 1:].tolist()))
    assert len(corners) == 4  # the last row and column are reached


def test_small_pages_are_reflected():
    "A page smaller than the crop is continued by its reflection, the mask too"
    page = coded(10, 9)
    im, m = crop(page, 0, 0, 40, 33)
    assert im.shape == (40, 33, 3)
    assert (im[..., 0] == m).all()
    assert (m == np.pad(page.mask, ((0, 30), (0, 24)), mode='reflect')).all()


def test_zoom_makes_letters_larger():
    "Zoomed twofold, a crop has half as many edges"
    page = ImagePair(
        np.zeros((400, 400, 3), np.uint8),
        np.kron(np.indices((50, 50)).sum(0) % 2, np.ones((8, 8))).astype(np.uint8) * 255,
    )

    def edges(z):
        _, mask = random_crop(page, np.random.default_rng(0), CropConfig(96, zoom=(z, z)))
        steps = np.diff((mask > 127).astype(int), axis=1)
        return (steps != 0).sum(1).mean()

    assert abs(edges(2.0) * 2 - edges(1.0)) < 2
    assert abs(edges(0.5) / 2 - edges(1.0)) < 2


def test_some_crops_come_from_anywhere():
    "The share `anywhere` ignores the ink; without it hardly any crop is blank"
    page = ImagePair(np.zeros((64, 64 * 9, 3), np.uint8), np.zeros((64, 64 * 9), np.uint8))
    page.mask[:, : 64 * 3] = 255  # a third has ink

    def blank(**kw):
        return np.mean(
            [not random_crop(page, np.random.default_rng(s), CropConfig(64, **kw))[1].any() for s in range(400)]
        )

    assert blank(anywhere=1.0) > 0.45
    assert 0.03 < blank(anywhere=0.15) < 0.35
    assert blank(anywhere=0.0, tries=12) < 0.02


def test_batches_go_by_number_and_seed():
    "Batch n is the same however it is reached, and the mask matches the image"
    data = PairBatches([coded(), coded(70, 64)], 3, CropConfig(32), seed=5)
    all_of = list(islice(data.batches(0), 6))
    for n in (0, 2, 5):
        got = next(data.batches(n))
        assert all(got[k].equal(all_of[n][k]) for k in ('image', 'mask'))
    assert not all_of[0]['image'].equal(all_of[1]['image'])
    assert not all_of[0]['image'].equal(PairBatches([coded(), coded(70, 64)], 3, CropConfig(32), seed=6)[0]['image'])
    b = all_of[0]
    assert (b['image'].shape, b['mask'].shape) == ((3, 3, 32, 32), (3, 1, 32, 32))
    assert b['image'].dtype == b['mask'].dtype == torch.float32
    assert ((b['image'][:, :1] + 1) / 2).allclose(b['mask'], atol=1e-6)  # red is the mask: -1..1 against 0..1
    crops = round(90 * 120 / 1024) + round(70 * 64 / 1024)
    assert len(data) == math.ceil(crops / 3)
    assert len(list(data)) == len(data)
    assert (as_uint8(b['image'][:, :1]) == as_uint8(b['mask'] * 2 - 1)).all()


def test_the_function_of_the_founding_document(tmp_path):
    "The call of the document gives batches of the size that was asked for"
    save_pairs(tmp_path, [coded(name='a'), coded(50, 40, name='b')])
    loader = create_synthetic_dataloader(
        images_dir=str(tmp_path / 'images'), masks_dir=str(tmp_path / 'masks'), batch_size=4, image_size=(64, 32)
    )
    assert next(iter(loader))['image'].shape == (4, 3, 64, 32)
    assert next(loader.batches(9))['image'].equal(loader[9]['image'])
    assert 'Unknown setting' in error(lambda: create_synthetic_dataloader(tmp_path / 'images', flip=True))
    one = create_synthetic_dataloader(tmp_path / 'images', tmp_path / 'masks', 16, (32, 32))
    assert next(one.batches(0))['mask'].shape[0] == 16  # fewer pages than a batch
