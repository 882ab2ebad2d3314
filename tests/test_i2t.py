"The dataset layout of founding document 003: any source, any interruption, every fault of a list."

import json
import signal
import subprocess
import sys
import time
from itertools import islice
import pytest
from conftest import folder_content
from khmer_ocr.data.datasets import LineFolder, OnTheFlyDataset, check_labels, open_lines
from khmer_ocr.data.mixing import MixedSource
from khmer_ocr.synth.set_layouts import CHUNK
from khmer_ocr.data.i2t import I2TDataset, check_i2t, export_i2t, i2t_stats, split_lines
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.text.khmer import charset
from khmer_ocr.core.errors import KhmerOCRError


@pytest.fixture
def recipe(tiny_data):
    return Recipe(corpus=str(tiny_data / 'corpus'))


def labels_of(lines):
    return [text for _, text in lines]


def test_the_layout_is_that_of_the_document(recipe, tmp_path):
    made = export_i2t(recipe, tmp_path / 'i2t', max_lines=dict(train=6, val=3), progress=False)
    assert (made['train']['lines'], made['val']['lines'], made['images_made']) == (6, 3, 9)
    for split, n in (('train', 6), ('val', 3)):
        folder = tmp_path / 'i2t' / split
        rows = json.loads((folder / f'{split}.json').read_text(encoding='utf-8'))
        assert [sorted(r) for r in rows] == [['image', 'text']] * n
        assert all((folder / 'images' / r['image']).is_file() for r in rows)
        assert not (folder / 'parts').exists()
    assert check_i2t(tmp_path / 'i2t', charset()) == []


def test_the_same_bytes_again_and_with_workers(recipe, tmp_path):
    for name, workers in (('a', 1), ('b', 1), ('c', 2)):
        export_i2t(recipe, tmp_path / name, max_lines=5, workers=workers, progress=False)
    assert folder_content(tmp_path / 'a') == folder_content(tmp_path / 'b') == folder_content(tmp_path / 'c')


EXPORT = """
from khmer_ocr.data.i2t import export_i2t
from khmer_ocr.synth.generator import Recipe
export_i2t(Recipe(**{settings!r}), {out!r}, max_lines=dict(train={n}, val=2), progress=False)
"""


def test_a_killed_export_goes_on_to_the_same_bytes(tiny_data, tmp_path):
    settings = dict(corpus=str(tiny_data / 'corpus'), random_text=True, preset='clean')
    drawn = Recipe(**settings)
    n = 2 * CHUNK + 20
    program = EXPORT.format(settings=settings, out=str(tmp_path / 'cut'), n=n)
    p = subprocess.Popen([sys.executable, '-c', program])
    part = tmp_path / 'cut/train/parts/000000.json'
    while not part.exists() and p.poll() is None:
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    if p.returncode != 0:
        assert not (tmp_path / 'cut/train/train.json').exists()
    done = len(list((tmp_path / 'cut/train/parts').glob('*.json')))
    made = export_i2t(drawn, tmp_path / 'cut', max_lines=dict(train=n, val=2), progress=False)['images_made']
    assert 1 <= done <= 3
    assert made == n + 2 - min(n, done * CHUNK)
    export_i2t(drawn, tmp_path / 'whole', max_lines=dict(train=n, val=2), progress=False)
    assert folder_content(tmp_path / 'cut') == folder_content(tmp_path / 'whole')


def test_another_source_never_mixes_with_what_is_there(recipe, tiny_data, tmp_path):
    export_i2t(recipe, tmp_path / 'i2t', max_lines=3, progress=False)
    before = folder_content(tmp_path / 'i2t')
    for data, kw in (
        (recipe, dict(max_lines=4)),
        (Recipe(corpus=recipe.corpus, seed=7), dict(max_lines=3)),
        (tiny_data / 'set', {}),
    ):
        with pytest.raises(KhmerOCRError, match='something else'):
            export_i2t(data, tmp_path / 'i2t', progress=False, **kw)
    assert folder_content(tmp_path / 'i2t') == before
    (tmp_path / 'own/train').mkdir(parents=True)
    (tmp_path / 'own/train/train.json').write_text('[]')
    with pytest.raises(KhmerOCRError, match='something else'):
        export_i2t(recipe, tmp_path / 'own', max_lines=3, progress=False)
    assert (tmp_path / 'own/train/train.json').read_text() == '[]'


def test_a_set_that_earlier_code_began_is_continued(recipe, tmp_path):
    "Its note has a hash of source text where today's has a version of the drawing; images are the same bytes"
    export_i2t(recipe, tmp_path / 'i2t', max_lines=3, progress=False)
    whole = folder_content(tmp_path / 'i2t/train/images')
    note = tmp_path / 'i2t/train/source.json'
    about = json.loads(note.read_text(encoding='utf-8'))
    assert about.pop('drawing') == 1
    about['code'] = 'fca941bc304466ba75e62bcbcecd4a41563892a25835ab9623f1ddcdd7842ab7'
    note.write_text(json.dumps(about, ensure_ascii=False, indent=1, sort_keys=True), encoding='utf-8')
    assert export_i2t(recipe, tmp_path / 'i2t', max_lines=3, progress=False)['images_made'] == 0
    assert folder_content(tmp_path / 'i2t/train/images') == whole
    about['code'] = 'another'
    note.write_text(json.dumps(about, ensure_ascii=False), encoding='utf-8')
    with pytest.raises(KhmerOCRError, match='something else than these lines'):
        export_i2t(recipe, tmp_path / 'i2t', max_lines=3, progress=False)


def test_every_reader_of_lines_takes_it(recipe, tmp_path):
    export_i2t(recipe, tmp_path / 'i2t', max_lines=4, progress=False)
    for path, split in (
        (tmp_path / 'i2t', 'train'),
        (tmp_path / 'i2t/train', 'train'),
        (tmp_path / 'i2t/val', 'val'),
        (tmp_path / 'i2t/val/val.json', 'val'),
    ):
        a = open_lines(path)
        b = I2TDataset(tmp_path / 'i2t', split)
        assert labels_of(a) == labels_of(b)
        assert all((x == y).all() for (x, _), (y, _) in zip(a, b))
    assert len(open_lines(tmp_path / 'i2t', limit=2)) == 2
    drawn = OnTheFlyDataset(Recipe(random_text=True), texts=['ក'])
    mixed = MixedSource(open_lines(tmp_path / 'i2t'), drawn, 0.25)
    assert labels_of(mixed.fetch(0, 8)).count('ក') == 2

    def stream(step):
        return [b['texts'] for b in islice(open_lines(tmp_path / 'i2t').stream(2, pool=2, step=step), 3)]

    assert stream(0)[1:] == stream(1)[:2]


def test_one_text_lies_on_one_side(tiny_data, tmp_path):
    rows = open_lines(tiny_data / 'set/train').rows
    table = ''.join(f'{path}\t{text}\n' for path, text, _ in rows[:4] * 3)
    (tmp_path / 'labels.tsv').write_text(table, encoding='utf-8')
    made = export_i2t(tmp_path, tmp_path / 'i2t', val=0.25, progress=False)
    assert (made['train']['lines'], made['val']['lines'], made['val']['in_train']) == (9, 3, 0)
    cuts = {tuple(split_lines(LineFolder(tmp_path), 0.25, seed)['val']) for seed in range(8)}
    assert len(cuts) > 1
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one/labels.tsv').write_text(f'{rows[0][0]}\tក\n', encoding='utf-8')
    with pytest.raises(KhmerOCRError, match='two are needed'):
        export_i2t(tmp_path / 'one', tmp_path / 'x', progress=False)


def test_a_source_with_a_missing_image_says_which(tiny_data, tmp_path):
    (tmp_path / 'labels.tsv').write_text('a.png\tក\nb.png\tខ\n', encoding='utf-8')
    with pytest.raises(KhmerOCRError, match=r'[ab]\.png is missing'):
        export_i2t(tmp_path, tmp_path / 'i2t', progress=False)
    lists = [tmp_path / 'i2t' / split / f'{split}.json' for split in ('train', 'val')]
    assert not all(path.exists() for path in lists)


# faults of a list
faults = [
    ('{"image": "a.png", "text": "x"}', 'a list is wanted'),
    ('[{"image": "a.png", "text": "x"}', 'line 1, column 33'),
    ('[\n {"image": "a.png"}\n]', 'entry 1 has no "text"'),
    ('[{"text": "x"}]', 'entry 1 has no "image"'),
    ('[{"image": 3, "text": "x"}]', 'entry 1 has no "image"'),
    ('[null]', 'entry 1'),
    ('[]', 'no labelled lines'),
    ('', 'line 1, column 1'),
    ('[{"image": "../../a.png", "text": "x"}]', 'outside images/'),
    ('[{"image": "/etc/passwd", "text": "x"}]', 'outside images/'),
    ('[{"image": "x/../../a.png", "text": "x"}]', 'outside images/'),
    ('[{"image": "gone.png", "text": "x"}]', 'gone.png'),
    ('[{"image": "a.png", "text": "x"}, {"image": "a.png", "text": "x"}]', 'entry 2 names the image of entry 1'),
    ('[' * 100_000, 'not JSON'),
]


@pytest.mark.parametrize('text, error', faults, ids=range(len(faults)))
def test_faults_of_a_list_are_one_line(tiny_data, tmp_path, text, error):
    (tmp_path / 'train/images').mkdir(parents=True)
    (tmp_path / 'train/images/a.png').write_bytes(open_lines(tiny_data / 'set/train').rows[0][0].read_bytes())
    (tmp_path / 'train/train.json').write_text(text, encoding='utf-8')
    with pytest.raises(KhmerOCRError) as e:
        open_lines(tmp_path)
    message = str(e.value)
    assert error in message
    assert 'train.json' in message
    assert '\n' not in message


def test_not_utf8_and_missing(tmp_path):
    with pytest.raises(KhmerOCRError, match='no folder train/'):
        I2TDataset(tmp_path)
    (tmp_path / 'train/images').mkdir(parents=True)
    with pytest.raises(KhmerOCRError, match='train.json is missing'):
        I2TDataset(tmp_path)
    with pytest.raises(KhmerOCRError, match='train.json'):
        open_lines(tmp_path)
    (tmp_path / 'train/train.json').write_bytes('[{"image": "a.png", "text": "ក"}]'.encode('utf-16'))
    with pytest.raises(KhmerOCRError, match='UTF-8'):
        I2TDataset(tmp_path)
    assert len(check_i2t(tmp_path)) == 2


def test_unknown_characters_are_named_with_their_place(recipe, tmp_path):
    export_i2t(recipe, tmp_path / 'i2t', max_lines=3, progress=False)
    path = tmp_path / 'i2t/train/train.json'
    rows = json.loads(path.read_text(encoding='utf-8'))
    rows[1]['text'] += '漢'
    path.write_text(json.dumps(rows), encoding='utf-8')
    with pytest.raises(KhmerOCRError) as e:
        check_labels(open_lines(tmp_path / 'i2t'), charset())
    assert '漢 (U+6F22)' in str(e.value)
    assert rows[1]['image'] in str(e.value)
    lines = open_lines(tmp_path / 'i2t')
    assert check_labels(lines, charset(), skip=True) == 1
    assert len(lines) == 2
    assert i2t_stats(tmp_path / 'i2t')['train']['lines'] == 3
