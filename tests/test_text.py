"Properties of the normal form, clusters, look-alikes and charsets that must hold for any text"

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import (
    COENG,
    CONSONANTS,
    INDEPENDENT,
    Charset,
    charset,
    clusters,
    fold_lookalikes,
    normalise,
    random_runs,
)
from khmer_ocr.text.khmer import _coeng_alone, _invisible


@pytest.fixture(scope='module')
def runs():
    return random_runs(40_000, np.random.default_rng(7))


def test_idempotent(runs):
    for f in (normalise, fold_lookalikes):
        assert [s for s in runs if f(f(s)) != f(s)] == []


def test_idempotent_on_any_unicode():
    rng = np.random.default_rng(1)
    pools = [range(0x20, 0x250), range(0x300, 0x370), range(0x2000, 0x2070), range(0x1780, 0x1800), range(0x0, 0x30)]
    for _ in range(5000):
        chosen = [pools[rng.integers(len(pools))] for _ in range(rng.integers(1, 10))]
        s = ''.join(chr(pool[rng.integers(len(pool))]) for pool in chosen)
        assert normalise(normalise(s)) == normalise(s), ascii(s)


def test_label_promises(runs):
    for s in map(normalise, runs):
        assert not s.endswith(COENG)
        assert not _coeng_alone.search(s)
        assert not set(s) & set(_invisible)
        assert s == ' '.join(s.split())


def test_nothing_but_order_for_plain_marks():
    "Where a run has nothing to drop or join, the same code points come out, in order"
    for s in ('កាំ', 'ស្រ្តី', 'ក់ា', 'ពី៉', 'ព្រះ'):
        assert sorted(normalise(s)) == sorted(s)


@pytest.mark.parametrize(
    'raw, normal',
    [
        ('ស្រ្តី', 'ស្ត្រី'),
        ('ស្ដ្រី', 'ស្ត្រី'),
        ('កេា', 'កោ'),
        ('កេី', 'កើ'),
        ('កំា', 'កាំ'),
        ('សុី', 'ស៊ី'),
        ('ញុំាង', 'ញ៉ាំង'),
        ('ប៊ុី', 'ប៊ុី'),
        ('\u17a3', 'អ'),
        ('\u17a4', 'អា'),
        ('\u17a8', 'ឧក'),
        ('ក\u17b4', 'ក'),
        ('\u17d8', '។ល។'),
        ('ក្', 'ក'),
        ('ក្\u200bត', 'ក្ត'),
        ('ក្ ត', 'ក ត'),
        ('់់ក', '់់ក'),
        ('“ក” – ‘ខ’…', '"ក" - \'ខ\'...'),
        ('e\u0301', 'é'),
        ('\u00a0ក\u2003\nខ\t', 'ក ខ'),
        ('', ''),
        ('វប្បធម៌', 'វប្បធម៌'),
    ],
)
def test_cases(raw, normal):
    assert normalise(raw) == normal


def test_clusters_lose_nothing(runs):
    for s in runs:
        assert ''.join(clusters(s)) == s
        assert all(len(c) == 1 or c[0] in CONSONANTS + INDEPENDENT + '\u17a3\u17a4\u17a8' for c in clusters(s))


def test_every_normal_khmer_run_encodes(runs):
    c = charset()
    for s in map(normalise, runs):
        if not c.unknown(s):
            assert c.decode(c.encode(s)) == s
    assert {x for s in map(normalise, runs) for x in c.unknown(s)} <= set('ៜ៝')  # two archaic signs


def test_charsets():
    c = charset()
    buoy = charset('buoy2022')
    assert len(c) == 183 and len(buoy) == 117
    assert c == charset('khmer-latin') and c != buoy and hash(c) == hash(charset())
    assert all(len(s) == 1 for s in c.symbols)
    assert buoy.symbols[:2] == ('<sos>', '<eos>')
    assert buoy.decode([0, 2, 1]) == '០'
    assert c.encode('') == [] and c.decode([]) == ''
    assert c.decode(np.array([0, 1])) == 'កខ'


@pytest.mark.parametrize(
    'act, message',
    [
        (lambda: charset('buoy'), 'did you mean buoy2022?'),
        (lambda: Charset('aa'), 'more than once'),
        (lambda: Charset(''), 'empty'),
        (lambda: Charset(['a', '']), 'empty'),
        (lambda: charset().encode('ក\u200b'), 'U+200B ZERO WIDTH SPACE'),
        (lambda: charset().encode('\x00'), 'U+0000'),
        (lambda: charset().encode('漢字仮名交文'), 'and 1 more'),
        (lambda: charset().decode([183]), 'number 183'),
        (lambda: charset().decode([-1]), 'number -1'),
    ],
)
def test_faults(act, message):
    with pytest.raises(KhmerOCRError) as e:
        act()
    assert message in str(e.value) and '\n' not in str(e.value)


def test_normalising_is_fast():
    lines = ['ព្រះរាជាណាចក្រកម្ពុជា ជាតិ សាសនា', 'ស្រ្តីខ្មែរ\u200bម្នាក់ "២០២៥"'] * 50_000
    start = time.process_time()
    for line in lines:
        normalise(line)
    assert time.process_time() - start < 10  # about one second on an idle core


@pytest.mark.parametrize(
    'module, heavy',
    [
        ('text', ('torch', 'numpy', 'matplotlib')),
        ('text.khmer', ('torch', 'numpy', 'matplotlib')),
        ('text.tokenizers', ('torch', 'sentencepiece', 'matplotlib')),
        ('text.metrics', ('torch', 'matplotlib')),
        ('text.corpus', ('torch', 'matplotlib')),
        ('text.sampler', ('torch', 'matplotlib')),
    ],
)
def test_imports_stay_light(module, heavy):
    "A command that only looks at text need not wait for PyTorch"
    code = f'import sys, khmer_ocr.{module}; sys.exit(any(m in sys.modules for m in {heavy}))'
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    assert subprocess.run([sys.executable, '-c', code], env=env).returncode == 0
