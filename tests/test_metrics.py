"Metrics: hand-made cases, agreement with torchmetrics, faults, and one number from two processes"

import numpy as np
import pytest
import torch
from torchmetrics.text import CharErrorRate, WordErrorRate

from khmer_ocr.text.metrics import *
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import clusters, normalise, random_runs


@pytest.fixture(scope='module')
def lines():
    rng = np.random.default_rng(11)
    truths = [t for t in map(normalise, random_runs(600, rng)) if t]
    return [normalise(''.join(c for c in t if rng.random() > 0.15)) for t in truths], truths


def test_torchmetrics_agrees(lines):
    assert abs(CER()(*lines) - CharErrorRate()(*lines)) < 1e-6
    assert abs(WER()(*lines) - WordErrorRate()(*lines)) < 1e-6


@pytest.mark.parametrize('metric', [CER(), CER('nospace'), CER('folded'), ClusterErrorRate(), WER()])
def test_perfect_symmetric_and_whole(metric, lines):
    preds, truths = lines
    assert metric(truths, truths) == 0
    parts = type(metric)(**({'mode': metric.mode} if hasattr(metric, 'mode') else {}))
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
    assert list(s) == [
        'cer',
        'cer_nospace',
        'cer_folded',
        'cluster',
        'exact',
        'wer',
        'bleu',
        'accuracy',
        'lines',
        'chars',
    ]
    assert s['lines'] == len(lines[1]) and s['chars'] == sum(map(len, lines[1]))
    assert all(0 <= s[k] <= 1 for k in ('exact', 'bleu', 'accuracy'))
    rates = score(*lines, extras=False)
    assert 'bleu' not in rates and all(rates[k] == s[k] for k in rates)


def test_blank_lines_count_what_is_read_into_them():
    assert score(['កខ', 'ក'], ['', 'ក'])['cer'] == 2
    assert score(['', 'ក'], ['', 'ក'])['exact'] == 1
    assert score([''], ['កខ'])['cer'] == 1 and score([''], ['កខ'])['accuracy'] == 0


def test_alignment_adds_up(lines):
    import editdistance

    for p, t in zip(*lines):
        pairs = align(clusters(t), clusters(p))
        assert ''.join(a for a, _ in pairs) == t and ''.join(b for _, b in pairs) == p
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


def _process(rank, store, lines, queue):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    metric = CER()
    metric.update(*[side[rank::2] for side in lines])
    queue.put((rank, metric.compute().item()))
    torch.distributed.destroy_process_group()


def test_two_processes_make_one_number(lines, tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip('no gloo')
    context = torch.multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    workers = [context.Process(target=_process, args=(r, tmp_path / 'store', lines, queue)) for r in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    assert {rate for _, rate in (queue.get(), queue.get())} == {CER()(*lines).item()}


def test_symbol_classes_cover_the_charset():
    from khmer_ocr.text.khmer import charset

    letters = [c for c in charset('khmer-latin').symbols if len(c) == 1]
    assert not [c for c in letters if symbol_class(c) == 'other'] and set(map(symbol_class, letters)) == set(CLASSES)
    assert symbol_class('\u17d2ក') == 'subscripts' and symbol_class('é') == 'other'


def test_class_errors_add_up(lines):
    import editdistance
    from khmer_ocr.text.khmer import fold

    by = class_errors(*lines)
    assert sum(c['symbols'] for c in by.values()) == sum(len(symbols(fold(t))) for t in lines[1])
    assert all(c['hits'] + c['substitutions'] + c['drops'] == c['symbols'] for c in by.values())
    assert sum(c[k] for c in by.values() for k in ('substitutions', 'drops', 'insertions')) == sum(
        editdistance.eval(symbols(fold(p)), symbols(fold(t))) for p, t in zip(*lines)
    )
    perfect = class_errors(lines[1], lines[1])
    assert all(c['error'] == 0 and c['hits'] == c['symbols'] for c in perfect.values())


def test_gaps_are_as_cheap_and_as_few_as_can_be(lines):
    import editdistance
    from itertools import groupby

    gaps = lambda pairs: sum(1 for k, _ in groupby(pairs, lambda o: (not o[0], not o[1])) if any(k))
    for p, t in list(zip(*lines))[:200]:
        plain, few = align(t, p), align_gaps(t, p)
        assert ''.join(a for a, _ in few) == t and ''.join(b for _, b in few) == p
        assert sum(a != b for a, b in few) == editdistance.eval(p, t) and gaps(few) <= gaps(plain)


@pytest.mark.parametrize('cut', [6, 7, 15])
def test_every_run_that_is_cut_out_or_said_twice_is_found(cut):
    from khmer_ocr.text.khmer import CONSONANTS

    rng = np.random.default_rng(cut)
    for _ in range(40):
        t = ''.join(rng.choice(list(CONSONANTS), 40))
        k = int(rng.integers(40 - cut))
        dropped, twice = lost_runs([t[:k] + t[k + cut :], t[: k + cut] + t[k:]], [t, t])
        assert (dropped['kind'], dropped['length'], twice['kind'], twice['length']) == ('dropped', cut, 'repeated', cut)
        assert abs(dropped['at'] - k) <= 3  # where the ends of what was cut are alike, the place is a matter of taste
    assert lost_runs([t], [t]) == []


def test_five_are_no_run_and_scattered_losses_are_none():
    t = 'កខគឃងចឆជឈញដឋឌឍណតថទធន'
    assert lost_runs([t[5:], t[::2], t[:10] + 'មយរលវសហឡអប'], [t, t, t]) == []
    assert [r['kind'] for r in lost_runs([t + t[:6], t + 'x' * 6], [t, t])] == ['repeated', 'inserted']
    assert lost_runs([t[:4] + ' ' + t[10:]], [t], n=7) == [] and lost_runs([t[:4] + t[10:]], [t], n=6)[0]['at'] == 4


def test_bootstrap_by_brute_force(lines):
    edits, lengths = line_edits(*lines)
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(1000):
        d = rng.integers(len(edits), size=len(edits))
        rates.append(edits[d].sum() / lengths[d].sum())
    assert np.allclose(bootstrap(edits, lengths), np.quantile(rates, [0.025, 0.975]))
    one = bootstrap(edits, lengths, level=0.5)
    whole = bootstrap(edits, lengths)
    assert whole[0] < one[0] < one[1] < whole[1]


def test_bootstrap_of_many_lines_goes_in_portions():
    edits, lengths = np.random.default_rng(0).binomial(30, 0.1, 30_000), np.full(30_000, 30)
    low, high = bootstrap(edits, lengths, rounds=200)
    assert low < edits.sum() / lengths.sum() < high and high - low < 0.002
    both = paired_bootstrap(edits, edits + (np.arange(30_000) % 30 == 0), lengths, rounds=100)
    assert (
        both['low'] <= both['difference'] <= both['high']
        and both['better'] == 1
        and abs(both['difference'] - 1 / 900) < 1e-12
    )


def test_rejection_ends_at_the_plain_rate_and_no_curve_beats_the_oracle(lines):
    edits, lengths = line_edits(*lines)
    rng = np.random.default_rng(2)
    for conf in (rng.random(len(edits)), -edits, np.ones(len(edits)), -edits / np.maximum(lengths, 1)):
        r = rejection(conf, edits, lengths, targets=(0.5, 0.0))
        assert (
            abs(r['error'][-1] - edits.sum() / lengths.sum()) < 1e-12 and r['kept'][-1] == 1 and len(r['kept']) <= 101
        )
        assert r['area'] >= r['best_area'] - 0.02 and r['reject'][0.5] == 0
    assert rejection(np.ones(3), [0, 0, 9], [9, 9, 9], targets=(0.1,))['reject'] == {0.1: 1.0}


def test_unit_hits_fit_the_reading(lines):
    for p, t in list(zip(*lines))[:100]:
        hits = unit_hits(symbols(p), t)
        assert len(hits) == len(symbols(p)) and sum(hits) <= len(symbols(t))
        assert all(unit_hits(symbols(t), t))
