"The language model against a model that counts in dictionaries, the search against all paths, files that are the same bytes."

import itertools, math
from collections import Counter, defaultdict
from pathlib import Path
import numpy as np, pytest, torch
import khmer_ocr
from khmer_ocr.text.rules import rule_line
from khmer_ocr.models.ctc import CTCConfig, CTCNet
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.models.decoding import greedy_ctc
from khmer_ocr.data.batching import collate
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.models.language_model import NGram
from khmer_ocr.models.decoding import align_frames, beam_line, ctc_beam_search, prefix_beam
from khmer_ocr.experiments.lm_tuning import changes, decode, frame_log_probs, unpredictable_lines, weigh
from khmer_ocr.text.khmer import Charset, charset
from khmer_ocr.core.errors import KhmerOCRError

abc, units = SubscriptTokenizer(Charset('abcde')), SubscriptTokenizer(charset())


@pytest.fixture(scope='module')
def lines():
    rng = np.random.default_rng(5)
    return [rule_line(rng) for _ in range(400)]


def random_lines(n, seed=0):
    "Lines over abcde with some order in them"
    rng = np.random.default_rng(seed)
    return [''.join('abcde'[int((i + rng.integers(3)) ** 2 % 5)] for i in range(rng.integers(1, 9))) for _ in range(n)]


class Dictionary:
    "Interpolated modified Kneser-Ney straight from Chen and Goodman (1999), with dictionaries; shares in steps, as the table has them"

    def __init__(self, lines, units, order, cuts, step=1 / 16):
        n, self.n, self.order = Counter(), len(units), order
        for s in lines:
            x = [0, *units.encode(s), 0]
            for k in range(1, order + 1):
                for i in range(len(x) - k + 1):
                    if k > 1 or i:
                        n[tuple(x[i : i + k])] += 1
        before = defaultdict(set)
        for g in n:
            if len(g) > 1:
                before[g[1:]].add(g[0])
        c = {g: (len(before[g]) if len(g) < order and (g[0] or len(g) == 1) else n[g]) for g in n}
        self.share = defaultdict(dict)
        for k in range(1, order + 1):
            level = {g: v for g, v in c.items() if len(g) == k}
            of = Counter(level.values())
            d = [0, 0.5, 1, 1.5]
            if all(of[i] for i in (1, 2, 3, 4)):
                y = of[1] / (of[1] + 2 * of[2])
                exact = [0, *(i - (i + 1) * y * of[i + 1] / of[i] for i in (1, 2, 3))]
                if min(exact) >= 0:
                    d = exact
            total = Counter()
            for g, v in level.items():
                total[g[:-1]] += v
            for g, v in level.items():
                a = (v - d[min(v, 3)]) / total[g[:-1]]
                if n[g] >= cuts[k - 1]:
                    self.share[g[:-1]][g[-1]] = math.exp(-step * math.ceil(-math.log(a) / step)) if a > 0 else 0

    def p(self, h):
        h = tuple(h)[max(0, len(h) - self.order + 1) :]
        lower = self.p(h[1:]) if h else [1 / self.n] * self.n
        left = 1 - sum(self.share[h].values())
        return [self.share[h].get(w, 0) + left * lower[w] for w in range(self.n)]


@pytest.mark.parametrize('order,cuts,n', [(1, (1,), 40), (2, (1, 1), 40), (3, (1, 1, 1), 500), (4, (1, 2, 2, 3), 500)])
def test_as_with_dictionaries(order, cuts, n):
    text = random_lines(n)
    lm, true = NGram.train(text, abc, order, cuts), Dictionary(text, abc, order, cuts)
    for h in itertools.chain(
        [()],
        itertools.product(range(6), repeat=1),
        itertools.product(range(6), repeat=2),
        itertools.product(range(6), repeat=3),
    ):
        if 0 in h[1:]:
            continue
        assert np.abs(np.exp(lm.logp(h)) - true.p(h)).max() < 1e-12, h


def test_probabilities_add_up_to_one(lines):
    lm = NGram.train(lines, units, order=6, cuts=(1, 1, 2, 2, 3, 3))
    rng = np.random.default_rng(0)
    ids = [[0, *units.encode(s)] for s in lines]
    histories = [i[max(0, e - 6) : e] for i in ids[:60] for e in range(len(i) + 1)] + rng.integers(
        1, len(units), (200, 5)
    ).tolist()
    for h in histories:
        p = np.exp(lm.logp(h))
        assert abs(p.sum() - 1) < 1e-6 and p.min() > 0
    assert max(s.max() for s in lm.left) <= 1 and min(s.min() for s in lm.left) > 0


def test_surprise_is_that_of_one_after_the_other(lines):
    lm = NGram.train(lines[:300], units, order=5, cuts=(1, 1, 1, 2))
    got = lm.surprise(lines[300:320])
    want = []
    for s in lines[300:320]:
        x = [0, *units.encode(s), 0]
        want += [-lm.logp(x[:i])[x[i]] for i in range(1, len(x))]
    assert np.abs(got - want).max() < 1e-9
    assert lm.perplexity(lines[:100]) < lm.perplexity(lines[300:]) < len(units) / 2


def test_files(lines, tmp_path):
    a, b = (NGram.train(lines, units, order=4, cuts=(1,)).save(tmp_path / f'{k}.safetensors') for k in 'ab')
    data = (tmp_path / 'a.safetensors').read_bytes()
    assert a == b == len(data) and data == (tmp_path / 'b.safetensors').read_bytes()
    lm, back = NGram.train(lines, units, order=4, cuts=(1,)), NGram.load(tmp_path / 'a.safetensors', units)
    assert (lm.surprise(lines) == back.surprise(lines)).all() and back.about['cuts'] == [1, 1, 1, 1]
    back.save(tmp_path / 'c.safetensors')
    assert (tmp_path / 'c.safetensors').read_bytes() == data
    runs = sum(len(k) for k in lm.keys)
    assert a < 3 * runs + 5000  # bytes
    (tmp_path / 'cut.safetensors').write_bytes(data[:-100])
    save_checkpoint(tmp_path / 'other.safetensors', dict(w=torch.zeros(1)), dict(model='ctc'))
    for name, word in (('cut', 'truncated'), ('other', 'not a language model'), ('none', 'not found')):
        with pytest.raises(KhmerOCRError, match=word):
            NGram.load(tmp_path / f'{name}.safetensors')
    with pytest.raises(KhmerOCRError, match='233 units, not for the 6'):
        NGram.load(tmp_path / 'a.safetensors', abc)


def test_what_cannot_be_trained():
    for how, word in (
        (dict(order=0), 'from 1 to 21'),
        (dict(order=22), 'from 1 to 21'),
        (dict(order=3, cuts=(2, 1)), 'none smaller'),
        (dict(cuts=(0,)), 'from 1 up'),
    ):
        with pytest.raises(KhmerOCRError, match=word):
            NGram.train(['ab'], abc, **how)
    for none in ([], ['']):
        with pytest.raises(KhmerOCRError, match='at least one line'):
            NGram.train(none, abc)
    with pytest.raises(KhmerOCRError, match='LATIN CAPITAL'):
        NGram.train(['Z'], abc)


def all_texts(f):
    "Text -> log of the sum over all paths, and its best path"
    total, path = {}, {}
    for way in itertools.product(range(f.shape[1]), repeat=len(f)):
        ids = tuple(k for k, _ in itertools.groupby(way) if k)
        l = float(f[range(len(f)), way].sum())
        total[ids] = np.logaddexp(total.get(ids, -np.inf), l)
        path[ids] = max(path.get(ids, (-np.inf, ())), (l, way))
    return total, path


def frames_of(T, n, seed):
    return np.log(np.random.default_rng(seed).dirichlet(np.full(n, 0.6), T))


exact = dict(beam=10**6, least=0.0, top=99)


@pytest.mark.parametrize('seed', range(6))
def test_search_finds_what_all_paths_give(seed):
    f = frames_of(6, 4, seed)
    total, _ = all_texts(f)
    got = {tuple(i): s for i, s in ctc_beam_search(f, **exact)}
    assert got.keys() == total.keys() and max(abs(got[k] - total[k]) for k in got) < 1e-9
    assert ctc_beam_search(f, **exact)[0][0] == list(max(total, key=total.get))


@pytest.mark.parametrize('seed', range(6))
def test_search_with_a_model_finds_what_all_paths_give(seed):
    three = SubscriptTokenizer(Charset('abc'))
    lm = NGram.train(['abc', 'cab', 'bca', 'abba'], three, 3, (1,))
    f = frames_of(5, 4, seed)
    total, _ = all_texts(f)
    says = lambda ids: sum(lm.logp((0, *ids[:i]))[u] for i, u in enumerate(ids))
    want = {k: v + 0.7 * says(k) + 0.4 * len(k) for k, v in total.items()}
    got = {tuple(i): s for i, s in ctc_beam_search(f, lm=lm, alpha=0.7, beta=0.4, **exact)}
    assert got.keys() == want.keys() and max(abs(got[k] - want[k]) for k in got) < 1e-9
    ids, value, at = prefix_beam(f, lm=lm, alpha=0.7, beta=0.4, **exact)
    assert ids == list(max(want, key=want.get)) and abs(value - max(want.values())) < 1e-9 and len(at) == len(ids)


def test_joining_frames_changes_nothing():
    "Frames that leave one unit only are joined: the sums are as if the others had probability 0"
    rng = np.random.default_rng(1)
    p = np.full((9, 4), 1e-6)
    for t, u in enumerate([0, 0, 2, 2, 2, 0, 0, 1, 1]):
        p[t, u] = 1
    p[3] = rng.dirichlet(np.ones(4))
    f = np.log(p / p.sum(1, keepdims=True))
    cut = np.where(f >= math.log(1e-3), f, -np.inf)
    total = {k: v for k, v in all_texts(cut)[0].items() if v > -np.inf}
    got = {tuple(i): s for i, s in ctc_beam_search(f, beam=10**6, least=1e-3, top=99)}
    assert got.keys() == total.keys() and max(abs(got[k] - total[k]) for k in got) < 1e-9


@pytest.mark.parametrize('seed', range(4))
def test_places_are_those_of_the_best_path(seed):
    f = frames_of(6, 3, seed)
    _, path = all_texts(f)
    for ids, (_, way) in path.items():
        at = align_frames(f, ids)
        runs = [list(g) for k, g in itertools.groupby(range(6), lambda t: way[t]) if k]
        assert at == [max(r, key=lambda t: f[t, u]) for r, u in zip(runs, ids)]


def test_a_line_as_the_greedy_reading_gives_it():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 1, (4, 30, 20)), dtype=torch.float32)
    logits[torch.arange(4)[:, None], torch.arange(30), torch.tensor(rng.integers(0, 20, (4, 30)))] += 14
    for l, want in zip(logits, greedy_ctc(logits, [30] * 4)):
        ids, conf, at = beam_line(l.log_softmax(-1).numpy(), beam=4)
        assert ids == want[0] and at == want[2] and np.allclose(conf, want[1], atol=1e-6)
    assert beam_line(np.zeros((0, 20), np.float32)) == ([], [], [])
    ids, conf, at = beam_line(frames_of(12, 20, 3), beam=8)
    assert len(ids) == len(conf) == len(at) and at == sorted(set(at)) and all(0 <= c <= 1 for c in conf)


def test_a_wider_beam_is_not_worse():
    lm = NGram.train(random_lines(200), abc, 3, (1,))
    values = []
    for seed in range(20):
        f = frames_of(15, 6, seed)
        values.append([ctc_beam_search(f, b, lm, 0.5, 0.3, least=0.0, top=99)[0][1] for b in (1, 8, 200)])
    assert (np.mean(values, 0)[1:] >= np.mean(values, 0)[:-1]).all() and np.mean(values, 0)[2] > np.mean(values, 0)[0]


def test_wrong_use():
    f = frames_of(5, 6, 0)
    lm = NGram.train(['ab'], SubscriptTokenizer(Charset('abc')), 2, (1,))
    with pytest.raises(KhmerOCRError, match='knows 4 units and the reader 6'):
        ctc_beam_search(f, lm=lm)
    with pytest.raises(KhmerOCRError, match='at least 1'):
        ctc_beam_search(f, beam=0)
    with pytest.raises(KhmerOCRError, match='do not fit on 5 frames'):
        align_frames(f, [1] * 6)


def test_frames_of_a_network():
    torch.manual_seed(0)
    net = CTCNet(len(units), CTCConfig(channels=(8, 8, 8, 8, 16), hidden=8, layers=1)).eval()
    rng = np.random.default_rng(0)
    batch = collate([(rng.integers(0, 255, (40, w)).astype(np.uint8), 'ក') for w in (50, 121)])
    frames, texts = frame_log_probs(net, [batch])
    assert texts == ['ក', 'ក'] and [f.shape for f in frames] == [(13, len(units)), (31, len(units))]
    assert all(abs(np.exp(f).sum(1) - 1).max() < 1e-5 for f in frames)
    assert decode(frames, units, 0) == [
        units.decode(i)
        for i, *_ in greedy_ctc(torch.tensor(frames[0])[None], [13]) + greedy_ctc(torch.tensor(frames[1])[None], [31])
    ]


def test_advice_helps_what_it_knows_and_hurts_what_it_does_not():
    three = SubscriptTokenizer(Charset('abc'))
    lm = NGram.train(['aba'] * 20, three, 3, (1,))
    f = np.log(
        np.array([[0.01, 0.97, 0.01, 0.01], [0.01, 0.01, 0.45, 0.53], [0.01, 0.97, 0.01, 0.01]])
    )  # a, then c rather than b, a
    assert decode([f], three, 0) == ['aca'] == decode([f], three) and decode([f], three, lm=lm) == ['aba']
    rows = weigh(dict(known=([f], ['aba']), odd=([f, f, f], ['aca', 'aca', 'aba'])), three, lm, (0.0, 0.3), (0.0,))
    assert {r['alpha']: (r['known'], round(r['odd'], 3)) for r in rows} == {0.0: (1 / 3, 0.111), 0.3: (0.0, 0.222)}
    assert changes(['aca', 'aca'], ['aba', 'aba'], ['aba', 'aca']) == dict(better=[0], worse=[1])


def test_odd_lines_can_be_written_and_are_not_guessed(lines):
    odd = unpredictable_lines(30, units, 3)
    lm = NGram.train(lines, units, 4, (1,))
    assert all(not units.charset.unknown(s) and s for v in odd.values() for s in v) and {
        len(v) for v in odd.values()
    } == {30}
    assert min(lm.perplexity(v) for v in odd.values()) > 2 * lm.perplexity(lines)


def test_the_model_that_ships():
    lm = NGram.load(units=units)
    prose, odd = ['ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា ព្រះមហាក្សត្រ'], unpredictable_lines(20, units, 9)
    assert lm.order == 6 and lm.perplexity(prose) < 6 and min(lm.perplexity(v) for v in odd.values()) > 12
    assert (Path(khmer_ocr.__file__).parent / 'language_model/ngram.safetensors').stat().st_size < 3e6
