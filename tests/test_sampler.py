"Drawing text: lengths and kinds in their shares, whole clusters, rare things to their floor, the generator decides."

from collections import Counter

import numpy as np
import pytest

from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import clusters, normalise
from khmer_ocr.text.rules import rule_line
from khmer_ocr.text.sampler import (
    BANDS,
    LINE_KINDS,
    Sampler,
    TextConfig,
    line_kind,
    random_excerpt,
    rare_clusters,
    swap_lookalike,
    symbol_deficits,
)


def rng(a, i=0):
    return np.random.Generator(np.random.Philox(key=[a, i]))


made = rng(1)
prose = ['មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងសមភាពក្នុងផ្នែកសេចក្តីថ្លៃថ្នូរនិងសិទ្ធិ']
prose += ['ហើយគប្បីប្រព្រឹត្តចំពោះគ្នាទៅវិញទៅមកក្នុងស្មារតីរាប់អានគ្នាជាបងប្អូន']
lines = [rule_line(made) for _ in range(3000)] + [normalise(t) for t in prose] * 400
lines += [' '.join(lines[-2:])] * 400


@pytest.fixture(scope='module')
def drawn():
    draw = Sampler(lines)
    return [draw(rng(7, i)) for i in range(8000)]


def test_lengths_are_balanced(drawn):
    n = [sum(a <= len(t) <= b for t in drawn) / len(drawn) for a, b in BANDS]
    assert abs(n[0] - n[2]) < 0.06 and abs(n[0] - TextConfig().lengths[0]) < 0.06, n
    assert max(map(len, drawn)) <= 112


def test_kinds_in_their_shares(drawn):
    n = Counter(map(line_kind, drawn))
    assert all(abs(n[k] / len(drawn) - s) < 0.06 for k, s in zip(LINE_KINDS, TextConfig().kinds)), n
    assert abs(n['blank'] / len(drawn) - TextConfig().blank) < 0.005


def test_labels_are_in_normal_form_and_cut_between_clusters(drawn):
    assert all(normalise(t) == t for t in drawn)
    known = set().union(*map(clusters, lines))
    draw = Sampler(lines)
    assert all(set(clusters(draw(rng(8, i)))) <= known for i in range(2000))


def test_a_scarce_symbol_reaches_its_floor():
    floor = 0.02
    lacks = symbol_deficits(lines, floor)
    symbol = max(lacks, key=lacks.get)
    assert lacks[symbol] > 0.7 * floor
    shares = []
    for f in (floor, 0.0):
        draw = Sampler(lines, TextConfig(floor=f, rare=0.0))
        shares.append(np.mean([symbol in draw(rng(9, i)) for i in range(6000)]))
    assert shares[0] > 0.7 * floor and shares[1] < 0.5 * floor, (symbol, shares)


def test_rare_clusters_are_drawn_for_their_own_sake():
    rare = rare_clusters(lines, 20)
    draw = Sampler(lines, TextConfig(rare=0.5))
    draw._rare = list(rare.items())
    drawn = set().union(*(clusters(draw(rng(10, i))) for i in range(4000)))
    assert np.mean([c in drawn for c in rare]) > 0.9
    for cluster, where in rare.items():
        assert all(cluster in lines[i] for i in where)


def test_the_generator_decides(drawn):
    s = Sampler(lines)
    assert [s(rng(7, i)) for i in (5, 3, 900)] == [drawn[i] for i in (5, 3, 900)]


def test_an_excerpt_keeps_its_anchor():
    for i in range(2000):
        r = rng(11, i)
        text = lines[int(r.integers(len(lines)))]
        n = int(r.integers(1, 40))
        at = int(r.integers(len(text)))
        excerpt = random_excerpt(text, n, r, (at, at + 1))
        parts = clusters(text)
        ends = np.cumsum([len(c) for c in parts])
        anchored = parts[int(np.searchsorted(ends, at, side='right'))]
        assert anchored.strip() in excerpt, (text, n, at, excerpt)
        assert len(excerpt) <= n or len(clusters(excerpt)) == 1, (text, n, at, excerpt)


def test_a_swapped_lookalike_is_one_character_and_leaves_the_line_well_formed():
    changed = 0
    for i in range(2000):
        text = lines[i]
        swapped = swap_lookalike(text, rng(12, i))
        changed += swapped != text
        assert normalise(swapped) == swapped and len(swapped) == len(text)
        assert sum(a != b for a, b in zip(text, swapped)) <= 1
    assert changed > 1000


def test_nothing_to_draw_from():
    with pytest.raises(KhmerOCRError, match='khmer-ocr corpus'):
        Sampler([])
