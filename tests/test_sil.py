"Compare `normalise` with SIL's khnormal, as PyPI's khmerspell carries it: every difference has a reason"

import importlib
import importlib.util
import pickle
import re
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from khmer_ocr.text.khmer import difference, normalise, random_runs

pytest.importorskip('khmerspell', reason='khmerspell 0.1.1 (SIL khnormal) is not installed')


@pytest.fixture(scope='module')
def khnormal():
    "khnormal with its two calls re.sub(..., re.X) mended in memory: the fourth argument means flags, not a count"
    module = importlib.import_module('khmerspell.khnormal')
    module.re = types.SimpleNamespace(X=re.X, sub=lambda pattern, new, s, flags=0: re.sub(pattern, new, s, flags=flags))
    return module.khnormal


def test_every_difference_is_explained(khnormal):
    found = Counter(difference(s, khnormal) for s in random_runs(20_000, np.random.default_rng(2026)))
    print(dict(found))
    assert found['unexplained'] == 0 and found[''] > 10_000
    assert found['choice of shifter'] + found['second pass needed'] < 100


def test_same_on_legal_syllables(khnormal):
    "base, robat or subscripts, shifter, vowel, signs in order: neither changes them (but for subscript DA)"
    rng = np.random.default_rng(5)
    letters = [chr(c) for c in [*range(0x1780, 0x17A3), *range(0x17A5, 0x17A8), *range(0x17A9, 0x17B4)] if c != 0x178A]

    def pick(chars, p):
        return str(rng.choice(list(chars))) if rng.random() < p else ''

    for _ in range(5000):
        vowel = pick([chr(c) for c in range(0x17B6, 0x17C6)], 0.7)
        subscripts = ''.join('\u17d2' + str(rng.choice(letters)) for _ in range(rng.integers(3)))
        if '\u17d2រ' in subscripts[:2]:
            subscripts = subscripts[:2]
        shifter = pick('\u17c9\u17ca', 0.1)
        s = (
            str(rng.choice(letters))
            + subscripts
            + shifter
            + vowel
            + (pick('\u17c6\u17cb\u17cd\u17cf', 0.3) if vowel != '\u17bb' else '')
            + pick('\u17c7', 0.1)
        )
        assert normalise(s) == s == khnormal(s), s


def test_real_words(khnormal):
    spec = importlib.util.find_spec('rdlab_dataset')
    if not spec:
        pytest.skip('rdlab_dataset 0.4.4 (real words) is not installed')

    class Plain(pickle.Unpickler):
        def find_class(self, *name):
            raise ValueError(f'{name} in a list of strings')

    with open(Path(spec.origin).parent / 'data/wild_khmer_data.pkl', 'rb') as f:
        words = Plain(f).load()
    found = Counter(difference(s, khnormal) for s in words[::40] if isinstance(s, str))
    print(dict(found))
    assert found['unexplained'] == 0 and found[''] > 0.98 * found.total()
