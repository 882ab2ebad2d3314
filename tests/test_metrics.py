"Metrics: hand-made cases, agreement with torchmetrics, faults, sums that add up"

from itertools import groupby

import editdistance
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error, multiclass_accuracy
from torchmetrics.text import CharErrorRate, WordErrorRate

from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import CONSONANTS, charset, clusters, fold_lookalikes, normalise, random_runs
from khmer_ocr.text.metrics import (
    CER,
    CLASSES,
    WER,
    ClusterErrorRate,
    accuracy,
    align,
    align_gaps,
    bootstrap,
    calibration,
    class_errors,
    confusions,
    line_edits,
    lost_runs,
    paired_bootstrap,
    rejection,
    score,
    symbol_class,
    symbols,
    unit_hits,
)


@pytest.fixture(scope='module')
def lines():
    rng = np.random.default_rng(11)
    truths = [t for t in map(normalise, random_runs(600, rng)) if t]
    return [normalise(''.join(c for c in t if rng.random() > 0.15)) for t in truths], truths


def test_torchmetrics_agrees(lines):
    assert abs(CER()(*lines) - CharErrorRate()(*lines).item()) < 1e-6
    assert abs(WER()(*lines) - WordErrorRate()(*lines).item()) < 1e-6


def test_accuracy_is_that_of_torchmetrics(lines):
    preds, truths = lines
    read = ''.join(p.ljust(len(t), '\0')[: len(t)] for p, t in zip(preds, truths))
    read, true = (torch.tensor([ord(c) for c in s]) for s in (read, ''.join(truths)))
    expected = multiclass_accuracy(read, true, num_classes=0x2000, average='micro').item()
    assert accuracy(preds, truths) == expected


def test_calibration_error_is_that_of_torchmetrics():
    rng = np.random.default_rng(0)
    conf = rng.beta(5, 1.5, 4000)
    correct = rng.random(4000) < conf**2
    expected = binary_calibration_error(torch.tensor(conf), torch.tensor(correct).int(), n_bins=10).item()
    assert abs(calibration(conf, correct)['ece'] - expected) < 1e-5


@pytest.mark.parametrize('metric', [CER(), CER('nospace'), CER('folded'), ClusterErrorRate(), WER()])
def test_perfect_symmetric_and_whole(metric, lines):
    preds, truths = lines
    assert metric(truths, truths) == 0
    parts = CER(metric.mode) if isinstance(metric, CER) else type(metric)()
    for i in range(0, len(truths), 97):
        parts.update(preds[i : i + 97], truths[i : i + 97])
    metric.reset()
    assert parts.compute() == metric(preds, truths)


def test_spelling_is_no_error():
    assert score(['ស្រ្តី កេា'], ['ស្ត្រី កោ'])['cer'] == 0
    s = score(['ប៉ំក'], ['បុំ ក'])
    assert s['cer'] > s['cer_nospace'] > s['cer_folded'] == 0


def test_score_keys_and_ranges(lines):
    s = score(*lines)
    assert list(s) == 'cer cer_nospace cer_folded cluster exact wer bleu accuracy lines chars'.split()
    assert s['lines'] == len(lines[1]) and s['chars'] == sum(map(len, lines[1]))
    assert all(0 <= s[k] <= 1 for k in ('exact', 'bleu', 'accuracy'))
    rates = score(*lines, extras=False)
    assert 'bleu' not in rates and all(rates[k] == s[k] for k in rates)


def test_blank_lines_count_what_is_read_into_them():
    assert score(['កខ', 'ក'], ['', 'ក'])['cer'] == 2
    assert score(['', 'ក'], ['', 'ក'])['exact'] == 1
    assert score([''], ['កខ'])['cer'] == 1 and score([''], ['កខ'])['accuracy'] == 0


def test_alignment_adds_up(lines):
    for p, t in zip(*lines):
        pairs = align(clusters(t), clusters(p))
        assert ''.join(a for a, _ in pairs) == t
        assert ''.join(b for _, b in pairs) == p
        assert sum(a != b for a, b in pairs) == editdistance.eval(clusters(p), clusters(t))
    assert confusions(*lines, units=list).total() == sum(editdistance.eval(p, t) for p, t in zip(*lines))
    assert confusions(lines[1], lines[1]) == {}


def test_calibration_edges():
    c = calibration([0.0, 1.0], [False, True])
    assert c == dict(ece=0, confidence=[0, 1], accuracy=[0, 1], count=[1, 1])
    assert calibration(np.full(10, 0.75), np.ones(10))['ece'] == 0.25


@pytest.mark.parametrize(
    'act, message',
    [
        (lambda: score(['ក'], []), '1 readings cannot be compared with 0'),
        (lambda: score([], []), 'no true text'),
        (lambda: score([''], ['']), 'no true text'),
        (lambda: accuracy([], []), 'no true text'),
        (lambda: CER('x'), 'no mode'),
        (lambda: calibration([], []), 'got 0 for 0'),
        (lambda: calibration([float('nan')], [1]), 'from 0 to 1'),
    ],
)
def test_faults(act, message):
    with pytest.raises(KhmerOCRError) as e:
        act()
    assert message in str(e.value) and '\n' not in str(e.value)


def test_parts_of_a_set_make_one_number(lines):
    "As for a run of several processes, each of which measures its own lines"
    whole, parts = CER(), [CER() for _ in range(3)]
    whole.update(*lines)
    for i, part in enumerate(parts):
        part.update(*[side[i::3] for side in lines])
    assert len({part.compute() for part in parts}) == 3  # the parts differ
    merged = CER()
    for part in parts:
        merged.merge_state(part)
    assert (merged.edits, merged.total) == (whole.edits, whole.total)
    assert merged.compute() == whole.compute()


def test_a_call_gives_the_rate_of_its_own_lines_and_counts_them():
    metric = CER()
    assert metric('កគ', 'កខ') == 1 / 2
    assert metric('កខគឃងចឆជ', 'កខគឃងចឆជ') == 0
    assert metric.compute() == 1 / 10
    metric.reset()
    with pytest.raises(KhmerOCRError, match='no true text'):
        metric.compute()


def test_symbol_classes_cover_the_charset():
    letters = [c for c in charset('khmer-latin').symbols if len(c) == 1]
    assert set(map(symbol_class, letters)) == set(CLASSES)
    assert symbol_class('\u17d2ក') == 'subscripts' and symbol_class('é') == 'other'


def test_class_errors_add_up(lines):
    by = class_errors(*lines)
    assert sum(c['symbols'] for c in by.values()) == sum(len(symbols(fold_lookalikes(t))) for t in lines[1])
    assert all(c['hits'] + c['substitutions'] + c['drops'] == c['symbols'] for c in by.values())
    edits = 0
    for p, t in zip(*lines):
        edits += editdistance.eval(symbols(fold_lookalikes(p)), symbols(fold_lookalikes(t)))
    assert sum(c['substitutions'] + c['drops'] + c['insertions'] for c in by.values()) == edits
    perfect = class_errors(lines[1], lines[1])
    assert all(c['error'] == 0 and c['hits'] == c['symbols'] for c in perfect.values())


def test_gaps_are_as_cheap_and_as_few_as_can_be(lines):
    def gaps(pairs):
        sides = [(not true, not read) for true, read in pairs]
        return sum(1 for side, _ in groupby(sides) if any(side))

    for p, t in list(zip(*lines))[:200]:
        few = align_gaps(t, p)
        assert ''.join(a for a, _ in few) == t and ''.join(b for _, b in few) == p
        assert sum(a != b for a, b in few) == editdistance.eval(p, t)
        assert gaps(few) <= gaps(align(t, p))


@pytest.mark.parametrize('cut', [6, 7, 15])
def test_every_run_that_is_cut_out_or_written_twice_is_found(cut):
    rng = np.random.default_rng(cut)
    for _ in range(40):
        t = ''.join(rng.choice(list(CONSONANTS), 40))
        k = int(rng.integers(40 - cut))
        dropped, twice = lost_runs([t[:k] + t[k + cut :], t[: k + cut] + t[k:]], [t, t])
        assert (dropped['kind'], dropped['length']) == ('dropped', cut)
        assert (twice['kind'], twice['length']) == ('repeated', cut)
        assert abs(dropped['at'] - k) <= 3  # where the ends of what was cut are alike, several places are right
    assert lost_runs([t], [t]) == []


def test_five_are_no_run_and_scattered_losses_are_none():
    t = 'កខគឃងចឆជឈញដឋឌឍណតថទធន'
    assert lost_runs([t[5:], t[::2], t[:10] + 'មយរលវសហឡអប'], [t, t, t]) == []
    assert [r['kind'] for r in lost_runs([t + t[:6], t + 'x' * 6], [t, t])] == ['repeated', 'inserted']
    assert lost_runs([t[:4] + ' ' + t[10:]], [t], n=7) == []
    assert lost_runs([t[:4] + t[10:]], [t], n=6)[0]['at'] == 4


def test_bootstrap_by_brute_force(lines):
    edits, lengths = line_edits(*lines)
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(1000):
        drawn = rng.integers(len(edits), size=len(edits))
        rates.append(edits[drawn].sum() / lengths[drawn].sum())
    assert np.allclose(bootstrap(edits, lengths), np.quantile(rates, [0.025, 0.975]))
    one = bootstrap(edits, lengths, level=0.5)
    whole = bootstrap(edits, lengths)
    assert whole[0] < one[0] < one[1] < whole[1]


def test_bootstrap_of_many_lines_goes_in_portions():
    edits, lengths = np.random.default_rng(0).binomial(30, 0.1, 30_000), np.full(30_000, 30)
    low, high = bootstrap(edits, lengths, rounds=200)
    assert low < edits.sum() / lengths.sum() < high
    assert high - low < 0.002
    both = paired_bootstrap(edits, edits + (np.arange(30_000) % 30 == 0), lengths, rounds=100)
    assert both['low'] <= both['difference'] <= both['high']
    assert both['better'] == 1
    assert abs(both['difference'] - 1 / 900) < 1e-12


def test_rejection_ends_at_the_plain_rate_and_no_curve_beats_the_oracle(lines):
    edits, lengths = line_edits(*lines)
    rng = np.random.default_rng(2)
    for conf in (rng.random(len(edits)), -edits, np.ones(len(edits)), -edits / np.maximum(lengths, 1)):
        r = rejection(conf, edits, lengths, targets=(0.5, 0.0))
        assert abs(r['error'][-1] - edits.sum() / lengths.sum()) < 1e-12
        assert r['kept'][-1] == 1 and len(r['kept']) <= 101
        assert r['area'] >= r['best_area'] - 0.02 and r['reject'][0.5] == 0
    assert rejection(np.ones(3), [0, 0, 9], [9, 9, 9], targets=(0.1,))['reject'] == {0.1: 1.0}


def test_unit_hits_fit_the_reading(lines):
    for p, t in list(zip(*lines))[:100]:
        hits = unit_hits(symbols(p), t)
        assert len(hits) == len(symbols(p)) and sum(hits) <= len(symbols(t))
        assert all(unit_hits(symbols(t), t))
