"Metrics: hand-made cases, agreement with torchmetrics, faults, and one number from two processes"
import numpy as np
import pytest
import torch
from torchmetrics.text import CharErrorRate, WordErrorRate

from khmer_ocr.metrics import *
from khmer_ocr.text import KhmerOCRError, clusters, normalise, random_runs


@pytest.fixture(scope='module')
def lines():
    rng = np.random.default_rng(11)
    truths = [t for t in map(normalise, random_runs(600, rng)) if t]
    return [normalise(''.join(c for c in t if rng.random() > .15)) for t in truths], truths


def test_torchmetrics_agrees(lines):
    assert abs(CER()(*lines) - CharErrorRate()(*lines)) < 1e-6
    assert abs(WER()(*lines) - WordErrorRate()(*lines)) < 1e-6


@pytest.mark.parametrize('metric', [CER(), CER('nospace'), CER('folded'), ClusterErrorRate(), WER()])
def test_perfect_symmetric_and_whole(metric, lines):
    preds, truths = lines
    assert metric(truths, truths) == 0
    parts = type(metric)(**({'mode': metric.mode} if hasattr(metric, 'mode') else {}))
    for i in range(0, len(truths), 97): parts.update(preds[i:i+97], truths[i:i+97])
    metric.reset(); assert parts.compute() == metric(preds, truths)


def test_spelling_is_no_error():
    assert score(['ស្រ្តី កេា'], ['ស្ត្រី កោ'])['cer'] == 0
    s = score(['ប៉ំក'], ['បុំ ក'])
    assert s['cer'] > s['cer_nospace'] > s['cer_folded'] == 0


def test_score_keys_and_ranges(lines):
    s = score(*lines)
    assert list(s) == ['cer', 'cer_nospace', 'cer_folded', 'cluster', 'exact', 'wer', 'bleu', 'accuracy', 'lines', 'chars']
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
    c = calibration([0., 1.], [False, True])
    assert c == dict(ece=0, confidence=[0, 1], accuracy=[0, 1], count=[1, 1])
    assert calibration(np.full(10, .75), np.ones(10))['ece'] == .25


@pytest.mark.parametrize('act, message', [
    (lambda: score(['ក'], []), '1 readings cannot be compared with 0'), (lambda: score([], []), 'no true text'), (lambda: score([''], ['']), 'no true text'),
    (lambda: accuracy([], []), 'no true text'), (lambda: CER('x'), 'no mode'), (lambda: calibration([], []), 'got 0 for 0'), (lambda: calibration([float('nan')], [1]), 'from 0 to 1')])
def test_faults(act, message):
    with pytest.raises(KhmerOCRError) as e: act()
    assert message in str(e.value) and '\n' not in str(e.value)


def _process(rank, store, lines, queue):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    metric = CER()
    metric.update(*[side[rank::2] for side in lines])
    queue.put((rank, metric.compute().item()))
    torch.distributed.destroy_process_group()


def test_two_processes_make_one_number(lines, tmp_path):
    if not torch.distributed.is_gloo_available(): pytest.skip('no gloo')
    context = torch.multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    workers = [context.Process(target=_process, args=(r, tmp_path/'store', lines, queue)) for r in range(2)]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert [w.exitcode for w in workers] == [0, 0]
    assert {rate for _, rate in (queue.get(), queue.get())} == {CER()(*lines).item()}
