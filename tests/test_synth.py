"Samples: decided by seed, split and index alone, drawn in training fonts, from settings that are checked."

import hashlib
import json
from dataclasses import replace
import pytest
from khmer_ocr.synth.degradation import PRESETS
from khmer_ocr.synth.fonts import find_fonts, manifest
from khmer_ocr.synth.generator import DRAWING_VERSION, MIXES, LineGenerator, Recipe, sample_rng
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import normalise

lines = [
    f'{t} {i}'
    for i in range(60)
    for t in ('ព្រះរាជាណាចក្រកម្ពុជា', 'ស្ត្រីខ្មែរ', 'ឆ្នាំ ២០២៥ "ថ្មី"', 'តម្លៃ - ៥.០០០ រៀល...', 'Khmer OCR ភ្នំពេញ')
]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    d = tmp_path_factory.mktemp('corpus')
    for s in ('train', 'val', 'test'):
        (d / f'{s}.txt').write_text(''.join(normalise(l) + '\n' for l in lines), encoding='utf-8')
    return str(d)


def test_validation_images_do_not_depend_on_what_is_asked_for(corpus):
    r = Recipe(corpus=corpus)
    a, b = LineGenerator(r)('val', 3), LineGenerator(replace(r, preset='hard', styles=0.9))('val', 3)
    assert (a.image == b.image).all() and a.meta == b.meta and a.meta['ops'] == []


def test_every_sample_is_its_own(corpus):
    s = LineGenerator(Recipe(corpus=corpus, random_text=True))
    images = [s('train', i).image.tobytes() for i in range(40)]
    assert len(set(images)) == 40
    assert s('train', 7).image.tobytes() == images[7]
    assert sample_rng(1, 'train', 5).integers(1 << 60) != sample_rng(1, 'test', 5).integers(1 << 60)


def test_labels_are_normal_and_drawn_in_training_fonts(corpus):
    s = LineGenerator(Recipe(corpus=corpus, random_text=True))
    held = {f.family for f in find_fonts() if f.split == 'heldout'}
    for i in range(60):
        x = s('train', i)
        assert x.text == normalise(x.text) and not any(
            x.meta['font'].startswith(h) and not x.meta['font'].startswith(h + ' OS') for h in held
        ), x.meta


def test_faults(corpus):
    for f, why in (
        (lambda: Recipe.from_dict(dict(presett='hard')), 'preset'),
        (lambda: Recipe.from_dict(dict(preset='hrad')), 'hard'),
        (lambda: Recipe.from_dict(dict(size=[50, 20])), 'size'),
        (lambda: LineGenerator(Recipe(corpus=corpus, families=('Nonesuch',))), 'Nonesuch'),
        (lambda: sample_rng(1, 'dev', 0), 'dev'),
    ):
        with pytest.raises(KhmerOCRError, match=why):
            f()


@pytest.mark.parametrize(
    'bad',
    [
        dict(seed='x'),
        dict(seed=-1),
        dict(common=5),
        dict(styles=True),
        dict(wording=3),
        dict(wording=dict(lengths=[1])),
        dict(wording=dict(blank=2)),
        dict(augment='no'),
        dict(families='Moul'),
        dict(size=[13]),
        dict(size=[13, 'a']),
        dict(preset=3),
    ],
)
def test_recipe_values_of_the_wrong_kind(bad):
    with pytest.raises(KhmerOCRError, match='(?i)' + next(iter(bad))) as e:
        Recipe.from_dict(bad)
    assert '\n' not in str(e.value)


# what `digest` gave for each preset when DRAWING_VERSION was last raised
# fmt: off
DIGESTS = dict(
    clean='e3f7b16b246dbbf4919c322b', light='cd95c661a090bff69ea1e610',
    document='736a6e932796a9bcd47cdc72', hard='584b3610f5c05a12b69c1ba4',
    scan='8c174f0dd5ed9e05e4374d98', photo='148799860018d30f3c643152',
    buoy2022='d1db9aa79dc370bad19df973', mixed='9c8e8fbc2deaafda8527e3be',
    robust='206f564db079783815c29d53',
)
# fmt: on
FEW = [normalise(l) for l in lines[:5]]


@pytest.fixture(scope='module')
def embedded_fonts(tmp_path_factory):
    "A font folder that knows the embedded font alone, as every machine has it"
    folder = tmp_path_factory.mktemp('fonts')
    rows = [row for row in manifest() if row['kind'] == 'pip']
    (folder / 'manifest.json').write_text(json.dumps(rows))
    return str(folder)


def digest(preset, fonts):
    "SHA-256 (24 digits) of a few samples of both kinds, with their labels and notes"
    generator = LineGenerator(Recipe(fonts=fonts, preset=preset, augment_val=True, styles=0.3), texts=FEW)
    sha = hashlib.sha256()
    for split, n in (('train', 30), ('val', 8)):
        for sample in (generator(split, i) for i in range(n)):
            notes = json.dumps([sample.image.shape, sample.text, sample.meta], ensure_ascii=False, sort_keys=True)
            sha.update(sample.image.tobytes() + notes.encode())
    return sha.hexdigest()[:24]


def test_every_preset_has_a_digest():
    assert DIGESTS.keys() == {*PRESETS, *MIXES}


@pytest.mark.parametrize('preset', DIGESTS)
def test_a_seed_gives_the_bytes_of_this_drawing_version(preset, embedded_fonts):
    assert digest(preset, embedded_fonts) == DIGESTS[preset], (
        f'samples of the preset {preset} have changed since DRAWING_VERSION {DRAWING_VERSION}: '
        'if that is meant, raise DRAWING_VERSION in synth.generator and put the new digests here'
    )
