"The language model against one that counts in dictionaries, the search against all paths, files of the same bytes."

import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import khmer_ocr
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.data.batching import collate
from khmer_ocr.experiments.lm_tuning import (
    compare_predictions,
    decode_frames,
    frame_log_probs,
    tune_lm_weights,
    unpredictable_lines,
)
from khmer_ocr.models.ctc import CTCConfig, CTCNet
from khmer_ocr.models.decoding import align_frames, beam_line, ctc_beam_search, greedy_ctc, prefix_beam
from khmer_ocr.models.language_model import NGramModel
from khmer_ocr.text.khmer import Charset, charset
from khmer_ocr.text.rules import rule_line
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.training.checkpoints import save_checkpoint

abc = SubscriptTokenizer(Charset('abcde'))
three = SubscriptTokenizer(Charset('abc'))
units = SubscriptTokenizer(charset())


@pytest.fixture(scope='module')
def lines():
    rng = np.random.default_rng(5)
    return [rule_line(rng) for _ in range(400)]


def random_lines(n, seed=0):
    "Lines over abcde with some order in them"
    rng = np.random.default_rng(seed)

    def letter(i):
        return 'abcde'[int((i + rng.integers(3)) ** 2 % 5)]

    return [''.join(map(letter, range(rng.integers(1, 9)))) for _ in range(n)]


class DictionaryModel:
    "Interpolated modified Kneser-Ney straight from Chen and Goodman (1999), with dictionaries; shares in steps of 1/16"

    def __init__(self, lines, units, order, cuts):
        self.n = len(units)
        self.order = order
        runs = self.count_runs([[0, *units.encode(line), 0] for line in lines])
        before = defaultdict(set)
        for run in runs:
            if len(run) > 1:
                before[run[1:]].add(run[0])
        self.share = defaultdict(dict)
        for k in range(1, order + 1):
            level = {}
            for run in runs:
                if len(run) == k:
                    shorter = k < order and (run[0] or k == 1)
                    level[run] = len(before[run]) if shorter else runs[run]
            self.add_shares(level, runs, cuts[k - 1])

    def count_runs(self, lines):
        runs = Counter()
        for ids in lines:
            for k in range(1, self.order + 1):
                first = 1 if k == 1 else 0  # the first 0 ends no line
                runs.update(tuple(ids[i : i + k]) for i in range(first, len(ids) - k + 1))
        return runs

    def add_shares(self, level, runs, cut):
        discounts = self.discounts(Counter(level.values()))
        total = Counter()
        for run, count in level.items():
            total[run[:-1]] += count
        for run, count in level.items():
            share = (count - discounts[min(count, 3)]) / total[run[:-1]]
            if runs[run] >= cut:
                code = math.ceil(-16 * math.log(share)) if share > 0 else None
                self.share[run[:-1]][run[-1]] = 0 if code is None else math.exp(-code / 16)

    @staticmethod
    def discounts(n):
        if all(n[i] for i in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            exact = [0, *(i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3))]
            if min(exact) >= 0:
                return exact
        return [0, 0.5, 1, 1.5]

    def p(self, history):
        history = tuple(history)[max(0, len(history) - self.order + 1) :]
        lower = self.p(history[1:]) if history else [1 / self.n] * self.n
        share = self.share[history]
        left = 1 - sum(share.values())
        return [share.get(unit, 0) + left * lower[unit] for unit in range(self.n)]


@pytest.mark.parametrize('order,cuts,n', [(1, (1,), 40), (2, (1, 1), 40), (3, (1, 1, 1), 500), (4, (1, 2, 2, 3), 500)])
def test_the_table_gives_the_probabilities_of_the_dictionaries(order, cuts, n):
    text = random_lines(n)
    lm = NGramModel.train(text, abc, order, cuts)
    true = DictionaryModel(text, abc, order, cuts)
    for length in range(4):
        for history in itertools.product(range(6), repeat=length):
            if 0 not in history[1:]:
                assert np.abs(np.exp(lm.log_probs(history)) - true.p(history)).max() < 1e-12, history


def test_probabilities_add_up_to_one(lines):
    lm = NGramModel.train(lines, units, order=6, cuts=(1, 1, 2, 2, 3, 3))
    histories = np.random.default_rng(0).integers(1, len(units), (200, 5)).tolist()
    for line in lines[:60]:
        ids = [0, *units.encode(line)]
        histories += [ids[max(0, end - 6) : end] for end in range(len(ids) + 1)]
    for history in histories:
        p = np.exp(lm.log_probs(history))
        assert abs(p.sum() - 1) < 1e-6
        assert p.min() > 0
    assert max(left.max() for left in lm.left) <= 1
    assert min(left.min() for left in lm.left) > 0


def one_by_one(lm, line):
    "-log p of all units and of the end of a line, asked for one after the other"
    ids = [0, *units.encode(line), 0]
    return [-lm.log_probs(ids[:i])[ids[i]] for i in range(1, len(ids))]


def test_whole_files_have_the_likelihood_of_one_unit_after_the_other(lines):
    lm = NGramModel.train(lines[:300], units, order=5, cuts=(1, 1, 1, 2))
    want = []
    for line in lines[300:320]:
        want += one_by_one(lm, line)
    assert np.abs(lm.negative_log_likelihood(lines[300:320]) - want).max() < 1e-9
    assert lm.perplexity(lines[:100]) < lm.perplexity(lines[300:]) < len(units) / 2


def test_the_same_text_gives_the_same_bytes(lines, tmp_path):
    sizes = [NGramModel.train(lines, units, order=4, cuts=(1,)).save(tmp_path / f'{k}.safetensors') for k in 'ab']
    data = (tmp_path / 'a.safetensors').read_bytes()
    assert sizes == [len(data), len(data)]
    assert data == (tmp_path / 'b.safetensors').read_bytes()
    opened = NGramModel.load(tmp_path / 'a.safetensors', units)
    opened.save(tmp_path / 'c.safetensors')
    assert (tmp_path / 'c.safetensors').read_bytes() == data
    assert len(data) < 3 * sum(len(k) for k in opened.keys) + 5000


def test_a_model_opens_as_it_was_saved(lines, tmp_path):
    lm = NGramModel.train(lines, units, order=4, cuts=(1,))
    lm.save(tmp_path / 'a.safetensors')
    opened = NGramModel.load(tmp_path / 'a.safetensors', units)
    assert (lm.negative_log_likelihood(lines) == opened.negative_log_likelihood(lines)).all()
    assert opened.about['cuts'] == [1, 1, 1, 1]
    with pytest.raises(KhmerOCRError, match='233 units, not for the 6'):
        NGramModel.load(tmp_path / 'a.safetensors', abc)


def test_files_that_hold_no_language_model(lines, tmp_path):
    NGramModel.train(lines, units, order=4, cuts=(1,)).save(tmp_path / 'a.safetensors')
    data = (tmp_path / 'a.safetensors').read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(data[:-100])
    save_checkpoint(tmp_path / 'other.safetensors', dict(w=torch.zeros(1)), dict(model='dcgan'))
    for name, word in (('cut', 'truncated'), ('other', 'not a language model'), ('none', 'not found')):
        with pytest.raises(KhmerOCRError, match=word):
            NGramModel.load(tmp_path / f'{name}.safetensors')


@pytest.mark.parametrize(
    'settings, word',
    [
        (dict(order=0), 'from 1 to 21'),
        (dict(order=22), 'from 1 to 21'),
        (dict(order=3, cuts=(2, 1)), 'none smaller'),
        (dict(cuts=(0,)), 'from 1 up'),
    ],
)
def test_settings_that_cannot_be_trained(settings, word):
    with pytest.raises(KhmerOCRError, match=word):
        NGramModel.train(['ab'], abc, **settings)


def test_text_that_cannot_be_trained_on():
    for empty in ([], ['']):
        with pytest.raises(KhmerOCRError, match='at least one line'):
            NGramModel.train(empty, abc)
    with pytest.raises(KhmerOCRError, match='LATIN CAPITAL'):
        NGramModel.train(['Z'], abc)


def all_texts(log_probs):
    "Text -> log of the sum over all paths, and (log p, path) of its best one"
    total = {}
    best = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        ids = tuple(k for k, _ in itertools.groupby(path) if k)
        log_p = float(log_probs[range(len(log_probs)), path].sum())
        total[ids] = np.logaddexp(total.get(ids, -np.inf), log_p)
        best[ids] = max(best.get(ids, (-np.inf, ())), (log_p, path))
    return total, best


def random_frames(T, n, seed):
    return np.log(np.random.default_rng(seed).dirichlet(np.full(n, 0.6), T))


def assert_same_scores(got, want):
    assert got.keys() == want.keys()
    assert max(abs(got[k] - want[k]) for k in got) < 1e-9


exact = dict(beam=10**6, least=0.0, top=99)


@pytest.mark.parametrize('seed', range(6))
def test_search_finds_what_all_paths_give(seed):
    frames = random_frames(6, 4, seed)
    total, _ = all_texts(frames)
    found = ctc_beam_search(frames, **exact)
    assert_same_scores({tuple(ids): score for ids, score in found}, total)
    assert found[0][0] == list(max(total, key=total.get))


@pytest.mark.parametrize('seed', range(6))
def test_search_with_a_model_finds_what_all_paths_give(seed):
    lm = NGramModel.train(['abc', 'cab', 'bca', 'abba'], three, 3, (1,))
    frames = random_frames(5, 4, seed)
    want = {}
    for ids, score in all_texts(frames)[0].items():
        lm_score = sum(lm.log_probs((0, *ids[:i]))[u] for i, u in enumerate(ids))
        want[ids] = score + 0.7 * lm_score + 0.4 * len(ids)
    settings = dict(lm=lm, alpha=0.7, beta=0.4, **exact)
    assert_same_scores({tuple(ids): score for ids, score in ctc_beam_search(frames, **settings)}, want)
    ids, score, at = prefix_beam(frames, **settings)
    assert ids == list(max(want, key=want.get))
    assert abs(score - max(want.values())) < 1e-9
    assert len(at) == len(ids)


def test_joining_frames_changes_nothing():
    "Frames that leave one unit only are joined: the sums are as if the others had probability 0"
    p = np.full((9, 4), 1e-6)
    p[range(9), [0, 0, 2, 2, 2, 0, 0, 1, 1]] = 1
    p[3] = np.random.default_rng(1).dirichlet(np.ones(4))
    frames = np.log(p / p.sum(1, keepdims=True))
    without_rare = np.where(frames >= math.log(1e-3), frames, -np.inf)
    total = {k: v for k, v in all_texts(without_rare)[0].items() if v > -np.inf}
    found = ctc_beam_search(frames, beam=10**6, least=1e-3, top=99)
    assert_same_scores({tuple(ids): score for ids, score in found}, total)


@pytest.mark.parametrize('seed', range(4))
def test_units_stand_where_the_best_path_has_them(seed):
    frames = random_frames(6, 3, seed)
    for ids, (_, path) in all_texts(frames)[1].items():
        runs = [list(run) for unit, run in itertools.groupby(range(6), lambda t: path[t]) if unit]
        peaks = [max(run, key=lambda t: frames[t, unit]) for run, unit in zip(runs, ids)]
        assert align_frames(frames, ids) == peaks


def test_a_clear_line_is_decoded_as_greedily():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 1, (4, 30, 20)), dtype=torch.float32)
    logits[torch.arange(4)[:, None], torch.arange(30), torch.tensor(rng.integers(0, 20, (4, 30)))] += 14
    for line, (want, want_confidences, want_at) in zip(logits, greedy_ctc(logits, [30] * 4)):
        ids, confidences, at = beam_line(line.log_softmax(-1).numpy(), beam=4)
        assert (ids, at) == (want, want_at)
        assert np.allclose(confidences, want_confidences, atol=1e-6)


def test_the_form_of_a_decoded_line():
    "Units, confidences and frames are lists of one length, frames rise, and an empty line gives empty lists"
    assert beam_line(np.zeros((0, 20), np.float32)) == ([], [], [])
    ids, confidences, at = beam_line(random_frames(12, 20, 3), beam=8)
    assert len(ids) == len(confidences) == len(at) > 0
    assert at == sorted(set(at))
    assert all(0 <= c <= 1 for c in confidences)


def test_a_wider_beam_is_not_worse():
    lm = NGramModel.train(random_lines(200), abc, 3, (1,))
    scores = []
    for seed in range(20):
        frames = random_frames(15, 6, seed)
        found = [ctc_beam_search(frames, beam, lm, 0.5, 0.3, least=0.0, top=99) for beam in (1, 8, 200)]
        scores.append([texts[0][1] for texts in found])
    mean = np.mean(scores, 0)
    assert (mean[1:] >= mean[:-1]).all()
    assert mean[2] > mean[0]


def test_wrong_use():
    "A model for other units, an empty beam and too many units for the frames are refused in words"
    frames = random_frames(5, 6, 0)
    lm = NGramModel.train(['ab'], three, 2, (1,))
    with pytest.raises(KhmerOCRError, match='knows 4 units and the reader 6'):
        ctc_beam_search(frames, lm=lm)
    with pytest.raises(KhmerOCRError, match='at least 1'):
        ctc_beam_search(frames, beam=0)
    with pytest.raises(KhmerOCRError, match='do not fit on 5 frames'):
        align_frames(frames, [1] * 6)


def test_frames_of_a_network():
    "Each line has its frames without padding, as log-probabilities, and they decode as the network does"
    torch.manual_seed(0)
    net = CTCNet(len(units), CTCConfig(channels=(8, 8, 8, 8, 16), hidden=8, layers=1)).eval()
    rng = np.random.default_rng(0)
    batch = collate([(rng.integers(0, 255, (40, w)).astype(np.uint8), 'ក') for w in (50, 121)])
    frames, texts = frame_log_probs(net, [batch])
    assert texts == ['ក', 'ក']
    assert [f.shape for f in frames] == [(13, len(units)), (31, len(units))]
    assert all(abs(np.exp(f).sum(1) - 1).max() < 1e-5 for f in frames)
    greedy = [greedy_ctc(torch.tensor(f)[None], [len(f)])[0][0] for f in frames]
    assert decode_frames(frames, units, 0) == [units.decode(ids) for ids in greedy]


def test_a_model_helps_with_what_it_knows_and_hurts_elsewhere():
    "A larger weight mends texts of the known kind and spoils the others"
    lm = NGramModel.train(['aba'] * 20, three, 3, (1,))
    p = [[0.01, 0.97, 0.01, 0.01], [0.01, 0.01, 0.45, 0.53], [0.01, 0.97, 0.01, 0.01]]  # a, c rather than b, a
    frames = np.log(np.array(p))
    assert decode_frames([frames], three, 0) == decode_frames([frames], three) == ['aca']
    assert decode_frames([frames], three, lm=lm) == ['aba']
    sets = dict(known=([frames], ['aba']), odd=(3 * [frames], ['aca', 'aca', 'aba']))
    rows = {r['alpha']: (r['known'], round(r['odd'], 3)) for r in tune_lm_weights(sets, three, lm, (0.0, 0.3), (0.0,))}
    assert rows == {0.0: (1 / 3, 0.111), 0.3: (0.0, 0.222)}
    assert compare_predictions(['aca', 'aca'], ['aba', 'aba'], ['aba', 'aca']) == dict(better=[0], worse=[1])


def test_unpredictable_lines_can_be_written_and_are_not_guessed(lines):
    odd = unpredictable_lines(30, units, 3)
    lm = NGramModel.train(lines, units, 4, (1,))
    for kind in odd.values():
        assert len(kind) == 30
        assert all(line and not units.charset.unknown(line) for line in kind)
        assert lm.perplexity(kind) > 2 * lm.perplexity(lines)


def test_the_model_that_ships():
    "It knows real text, is surprised by random lines, and stays under 3 MB"
    lm = NGramModel.load(units=units)
    odd = unpredictable_lines(20, units, 9)
    assert lm.order == 6
    assert lm.perplexity(['ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា ព្រះមហាក្សត្រ']) < 6
    assert min(lm.perplexity(kind) for kind in odd.values()) > 12
    assert (Path(khmer_ocr.__file__).parent / 'language_model/ngram.safetensors').stat().st_size < 3e6
