"Drawing text: lengths and kinds in their shares, whole clusters, rare things to their floor, the generator decides."

from collections import Counter
import numpy as np
import pytest
from khmer_ocr.text.rules import rule_line
from khmer_ocr.text.sampler import BANDS, KINDS, Sampler, TextConfig, kind, rare_clusters, stretch, symbol_deficits, twin
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import clusters, normalise


def rng(a, i=0):
    return np.random.Generator(np.random.Philox(key=[a, i]))


made = rng(1)
lines = [rule_line(made) for _ in range(3000)] + [
    normalise(t)
    for t in (
        'មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងសមភាពក្នុងផ្នែកសេចក្តីថ្លៃថ្នូរនិងសិទ្ធិ',
        'ហើយគប្បីប្រព្រឹត្តចំពោះគ្នាទៅវិញទៅមកក្នុងស្មារតីរាប់អានគ្នាជាបងប្អូន',
    )
] * 400
lines += [' '.join(lines[-2:])] * 400


@pytest.fixture(scope='module')
def drawn():
    s = Sampler(lines)
    return [s(rng(7, i)) for i in range(8000)]


def test_lengths_are_balanced(drawn):
    n = [sum(a <= len(t) <= b for t in drawn) / len(drawn) for a, b in BANDS]
    assert abs(n[0] - n[2]) < 0.06 and abs(n[0] - TextConfig().lengths[0]) < 0.06, n
    assert max(map(len, drawn)) <= 112


def test_kinds_in_their_shares(drawn):
    n = Counter(map(kind, drawn))
    assert all(abs(n[k] / len(drawn) - s) < 0.06 for k, s in zip(KINDS, TextConfig().kinds)), n
    assert abs(n['blank'] / len(drawn) - TextConfig().blank) < 0.005


def test_labels_are_in_normal_form_and_cut_between_clusters(drawn):
    assert all(normalise(t) == t for t in drawn)
    known = {c for l in lines for c in clusters(l)}
    plain = Sampler(lines)
    assert all(set(clusters(plain(rng(8, i)))) <= known for i in range(2000))


def test_a_scarce_symbol_reaches_its_floor():
    floor = 0.02
    lacks = symbol_deficits(lines, floor)
    symbol = max(lacks, key=lacks.get)
    assert lacks[symbol] > 0.7 * floor
    with_floor, without = (Sampler(lines, TextConfig(floor=f, rare=0.0)) for f in (floor, 0.0))
    n, m = (np.mean([symbol in s(rng(9, i)) for i in range(6000)]) for s in (with_floor, without))
    assert n > 0.7 * floor and m < 0.5 * floor, (symbol, n, m)


def test_rare_clusters_are_drawn_for_their_own_sake():
    rare = rare_clusters(lines, 20)
    s = Sampler(lines, TextConfig(rare=0.5))
    s._rare = list(rare.items())
    n = Counter(c for i in range(4000) for c in clusters(s(rng(10, i))))
    assert np.mean([c in n for c in rare]) > 0.9
    assert all(c in lines[i] for c, w in rare.items() for i in w)


def test_the_generator_decides(drawn):
    s = Sampler(lines)
    assert [s(rng(7, i)) for i in (5, 3, 900)] == [drawn[i] for i in (5, 3, 900)]


def test_stretch_keeps_its_anchor():
    for i in range(2000):
        r = rng(11, i)
        t = lines[int(r.integers(len(lines)))]
        n = int(r.integers(1, 40))
        at = int(r.integers(len(t)))
        cut = stretch(t, n, r, (at, at + 1))
        cluster = next(c for c, e in zip(clusters(t), np.cumsum([len(c) for c in clusters(t)])) if at < e)
        assert cluster.strip() in cut and (len(cut) <= n or len(clusters(cut)) == 1), (t, n, at, cut)


def test_twins_differ_in_one_character_and_stay_well_formed():
    changed = 0
    for i in range(2000):
        t = lines[i]
        u = twin(t, rng(12, i))
        changed += u != t
        assert normalise(u) == u and len(u) == len(t) and sum(a != b for a, b in zip(t, u)) <= 1
    assert changed > 1000


def test_nothing_to_draw_from():
    with pytest.raises(KhmerOCRError, match='khmer-ocr corpus'):
        Sampler([])
