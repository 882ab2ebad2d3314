"The seq2seq reader: the paper's size, padding, CTC's vote against brute force, the guard, training that resumes, frozen encoders, checkpoints of others."

import itertools, math
import numpy as np, pytest, torch
from dataclasses import replace
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.models.ctc_training import train_ctc
from khmer_ocr.data.batching import as_input, collate
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.text.metrics import lost_runs
from khmer_ocr.models.attention import Seq2Seq, Seq2SeqConfig, load_seq2seq, make_units
from khmer_ocr.models.attention_training import Seq2SeqLoss, guided_attention_loss, read_lines, seq2seq_preset, train_seq2seq
from khmer_ocr.text.tokenizers import Symbols, as_targets, end_id
from khmer_ocr.models.decoding import (
    beam_search,
    ctc_align,
    ctc_begin,
    ctc_extend,
    ctc_frames,
    ctc_prefix_scores,
    ctc_whole,
    ctc_fallback,
    has_diverged,
    greedy_decode,
)
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset, normalise

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រ', 'ភ្នំពេញ', 'សុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
ctc = CTCConfig(channels=(4, 4, 4, 4, 8), hidden=8, layers=2)
buoy = Seq2SeqConfig(channels=(4,) * 7, narrow=4, frames=6, hidden=8, attention=6)
joint = Seq2SeqConfig(encoder='ctc', ctc=ctc, hidden=8, attention=6, embedding=4, location=5, ctc_weight=0.3)
both = pytest.mark.parametrize(
    'config',
    (buoy, replace(buoy, ctc_weight=0.3, units='subscripts', charset='khmer-latin'), joint),
    ids=('buoy', 'buoy+ctc', 'on ctc'),
)


def loop(steps, **kw):
    return TrainConfig(
        steps=steps,
        batch_size=2,
        log_every=1,
        eval_every=100,
        save_every=100,
        precision='32-true',
        tensorboard=False,
        **kw,
    )


def train(out, config, steps=6, recipe=Recipe(random_text=True, seed=4), more={}, **kw):
    return train_seq2seq(out, recipe, loop(steps, **more), config, texts=texts, pool=2, verbose=False, **kw)


def weights(path):
    return load_seq2seq(path)[0].state_dict()


def lines(height, *widths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 255, (height, w)).astype(np.uint8), '') for w in widths]


class StopAt(Callback):
    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step == self.n:
            raise CancelFit


def test_the_paper_s_network():
    net = Seq2Seq(117)
    assert len(make_units(Seq2SeqConfig())) == 117 and sum(p.numel() for p in net.parameters()) == 9_938_222
    for w in (8, 40, 333, 1200):
        with torch.no_grad():
            seen = net.eval().encoder.look(torch.zeros(1, 1, 32, w), torch.tensor([w]))
        assert (
            seen.shape[:3] == (1, 512, 1) and seen.shape[3] == net.encoder.lengths(torch.tensor([w])) == -(-w // 4) - 1
        )
    assert [c.bias is not None for c in net.encoder.convs] == [True] * 7


@pytest.mark.parametrize('more', (dict(), dict(ctc_weight=0.3), dict(embedding=5, location=3)), ids=str)
def test_padding_changes_nothing(more):
    "Logits, CTC's logits, looks and texts of a line: alone, or beside a longer one"
    torch.manual_seed(0)
    config = replace(buoy, **more)
    net = Seq2Seq(20, config).eval()
    for n in net.encoder.norms:
        if hasattr(n, 'running_mean'):
            n.running_mean.normal_()
            n.bias.data.normal_()  # norms that turn white into something
    items = lines(32, 37, 90, 161)
    many = collate(items)
    ids = torch.randint(2, 20, (3, 6))
    with torch.inference_mode():
        x = as_input(many['images'])
        logits, heard, _, looks = net(x, many['widths'], ids)
        memory = net.encode(x, many['widths'])
        wrote = greedy_decode(net, memory, 1, 9)
        found = beam_search(net, memory, 1, limit=9)
        for i, item in enumerate(items):
            one = collate([item])
            y = as_input(one['images'])
            a, b, _, seen = net(y, one['widths'], ids[i : i + 1])
            assert torch.allclose(a[0], logits[i], atol=1e-5) and torch.allclose(
                seen[0], looks[i, :, : seen.shape[-1]], atol=1e-5
            )
            m = net.encode(y, one['widths'])
            n = int(m.lengths[0])
            if heard is not None:
                assert torch.allclose(b[0, :n], heard[i, :n], atol=1e-5)
            w = greedy_decode(net, m, 1, 9)[0]
            assert (
                w.ids == wrote[i].ids
                and torch.allclose(w.looks, wrote[i].looks, atol=1e-5)
                and beam_search(net, m, 1, limit=9)[0].ids == found[i].ids
            )


def test_what_stands_in_the_padding_is_not_looked_at():
    torch.manual_seed(0)
    net = Seq2Seq(20, joint).eval()
    items = lines(40, 64, 128)
    b = collate(items)
    with torch.no_grad():
        m = net.encode(as_input(b['images']), b['widths'])
        other = m.values.clone()
        other[0, 16:] = 7.0
        far = m._replace(values=other, keys=net.key(other))
        for k in (m, far):
            assert greedy_decode(net, k, 0, 5)[0].looks.shape[1] == 16
        assert greedy_decode(net, m, 0, 5)[0].probs == greedy_decode(net, far, 0, 5)[0].probs
        assert torch.equal(
            ctc_whole(ctc_begin(ctc_frames(net.ctc_logits(m), m.lengths)))[0],
            ctc_whole(ctc_begin(ctc_frames(net.ctc_logits(far), m.lengths)))[0],
        )


def alignments(p):
    "Probability of each text by listing all alignments; p (T, V)"
    said = {}
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        t = tuple(k for k, _ in itertools.groupby(path) if k)
        said[t] = said.get(t, 0) + math.prod(float(p[i, k]) for i, k in enumerate(path))
    return said


def test_ctc_prefix_scores_against_all_alignments():
    torch.manual_seed(1)
    logits = torch.randn(3, 5, 3)
    lengths = torch.tensor([5, 3, 1])
    logp = ctc_frames(logits, lengths)
    truth = [alignments(logits[b, :n].double().softmax(-1)) for b, n in enumerate(lengths.tolist())]
    for text in ((1, 1, 2), (2, 1, 2), (2, 2, 1)):
        r, last = ctc_begin(logp), torch.zeros(3, 1, dtype=torch.long)
        for i, u in enumerate(text):
            got = ctc_prefix_scores(logp, r, last, torch.tensor([[[1, 2]]]).expand(3, 1, 2)).exp()[:, 0]
            want = [[sum(v for t, v in said.items() if t[: i + 1] == (*text[:i], c)) for c in (1, 2)] for said in truth]
            assert np.allclose(got, want, atol=1e-9) and np.allclose(
                ctc_whole(r).exp()[:, 0], [said.get(text[:i], 0) for said in truth], atol=1e-9
            )
            new = torch.full((3, 1), u)
            r, last = ctc_extend(logp, r, last, new), new


def test_prefix_scores_hold_over_long_lines():
    "Sums of thousands of nats lose no digits: the same in many frames as the loss that PyTorch knows"
    torch.manual_seed(2)
    logits = 9 * torch.randn(1, 400, 12)
    ids = torch.randint(1, 12, (1, 60))
    logp = ctc_frames(logits, torch.tensor([400]))
    r, last = ctc_begin(logp), torch.zeros(1, 1, dtype=torch.long)
    for u in ids[0]:
        new = u.view(1, 1)
        r, last = ctc_extend(logp, r, last, new), new
    want = -torch.nn.functional.ctc_loss(
        logp.transpose(0, 1), ids, torch.tensor([400]), torch.tensor([60]), reduction='none'
    )
    assert abs(float(ctc_whole(r)) - float(want)) < 1e-6


def test_beam_with_ctc_of_full_weight_finds_the_likeliest_text_of_ctc():
    torch.manual_seed(4)
    net = Seq2Seq(4, replace(joint, ctc_weight=0.5)).eval()
    with torch.inference_mode():
        m = net.encode(torch.rand(1, 1, 40, 20), torch.tensor([20]))
        logits = 4 * torch.randn(1, 5, 4)
        logp = ctc_frames(logits, m.lengths)
        found = beam_search(net, m, 0, beam=300, wide=4, limit=5, alpha=0.0, ctc=logp, weight=1.0)[0]
    said = alignments(logits[0].double().softmax(-1))
    assert tuple(found.ids) == max(said, key=said.get)


def test_length_normalisation_lets_longer_texts_win():
    torch.manual_seed(0)
    net = Seq2Seq(6, joint).eval()
    with torch.inference_mode():
        m = net.encode(torch.rand(1, 1, 40, 40), torch.tensor([40]))
        n = [len(beam_search(net, m, 0, beam=6, limit=8, alpha=a)[0].ids) for a in (0.0, 1.0, 3.0)]
    assert n == sorted(n) and n[0] < n[2]


def test_guard_lets_no_run_through():
    rng = np.random.default_rng(0)
    line = ''.join(rng.choice(list('កខគឃងចឆជឈញដឋឌឍណតថទធន'), 80))
    for n in (6, 9, 30):
        for at in (0, 20, 80 - n):
            dropped, twice = line[:at] + line[at + n :], line[: at + n] + line[at:]
            misread = dropped.replace(dropped[5], 'អ')
            for bad in (dropped, twice, misread):
                assert lost_runs([bad], [line]) and has_diverged(bad, line)
            assert lost_runs([t for (t,) in ctc_fallback([(dropped,), (twice,)], [(line,), (line,)])], [line] * 2) == []
    assert (
        not has_diverged(line, line)
        and not has_diverged(line[:40] + 'អ' + line[41:], line)
        and not has_diverged('', '')
        and has_diverged('', line)
    )


@both
def test_resumed_training_ends_with_the_same_weights(tmp_path, config):
    config = replace(config, forcing_end=0.3)
    train(tmp_path / 'whole', config)
    train(tmp_path / 'parts', config, callbacks=[StopAt(3)])
    train(tmp_path / 'parts', config, resume='latest')
    a, b = weights(tmp_path / 'whole/latest.safetensors'), weights(tmp_path / 'parts/latest.safetensors')
    assert all(torch.equal(a[k], b[k]) for k in a)


@both
def test_each_reader_reads_in_each_way(tmp_path, config):
    learn = train(tmp_path / 'm', config, 1, validation=[collate([(lines(config.height, 80)[0][0], texts[1])])])
    net, units, head = load_seq2seq(tmp_path / 'm/latest.safetensors')
    assert (
        head['model'] == 'seq2seq'
        and head['height'] == config.height
        and Seq2SeqConfig(**head['config']) == config
        and head['charset'] == list(units.charset.symbols)
    )
    batches = [collate(lines(config.height, 80, 33)), collate(lines(config.height, 8))]
    for decoder in ('greedy', 'beam') + (('ctc',) if net.hears else ()):
        read, sure = read_lines(net, units, batches, decoder)
        assert len(read) == len(sure) == 3 and all(0 <= c <= 1 for c in sure)
        assert (read, sure) == read_lines(net, units, batches, decoder)
    if not net.hears:
        with pytest.raises(KhmerOCRError, match='no CTC head'):
            read_lines(net, units, batches, 'ctc')


def test_a_trained_ctc_reader_becomes_the_encoder_and_stays_frozen(tmp_path):
    train_ctc(tmp_path / 'ctc', Recipe(random_text=True, seed=4), loop(2), ctc, texts=texts, pool=2, verbose=False)
    first = tmp_path / 'ctc/latest.safetensors'
    p = seq2seq_preset('joint', 3, first)
    assert p.config.ctc == ctc and p.train.freeze == ('encoder',) and p.train.steps == 3
    seen = []

    class Look(Callback):
        def after_loss(self, learn):
            seen.append(
                (
                    learn.net.encoder.training,
                    learn.net.training,
                    [b for b in learn.net.encoder.parameters() if b.grad is not None],
                )
            )

    train(
        tmp_path / 'joint', replace(joint, ctc=ctc), 3, more=dict(freeze=('encoder',)), init=first, callbacks=[Look()]
    )
    from khmer_ocr.models.ctc import load_ctc

    was, (net, units, _) = load_ctc(first)[0].state_dict(), load_seq2seq(tmp_path / 'joint/latest.safetensors')
    assert seen == [(False, True, [])] * 3 and all(torch.equal(was[k], v) for k, v in net.encoder.state_dict().items())
    batch = collate(lines(40, 90, 60))
    from khmer_ocr.models.ctc_training import read_batches

    assert (
        read_lines(net, units, [batch], 'ctc')[0] == read_batches(load_ctc(first)[0], units, [batch])[0]
    )  # its own head, word for word


def test_ctc_weight_moves_the_encoder_s_head():
    torch.manual_seed(0)
    units = make_units(replace(buoy, ctc_weight=0.3))
    batch = collate([(lines(32, 200)[0][0], 'កខ')])
    for w in (0.3, 1.0):
        net = Seq2Seq(len(units), replace(buoy, ctc_weight=w))
        Seq2SeqLoss(units, net.config)(net, batch).backward()
        assert net.head.weight.grad.abs().sum() > 0 and (net.name.weight.grad.abs().sum() > 0) == (w < 1)


def test_label_smoothing_and_forcing_are_settings(tmp_path):
    units = make_units(buoy)
    torch.manual_seed(0)
    net = Seq2Seq(len(units), buoy).eval()
    batch = collate([(lines(32, 200)[0][0], 'កខ')])
    with torch.no_grad():
        net.name.bias[5] = 9.0
    assert Seq2SeqLoss(units, buoy)(net, batch) != Seq2SeqLoss(units, buoy, smoothing=0.2)(net, batch)
    losses = [h['loss'] for h in train(tmp_path / 'a', replace(buoy, forcing_start=1.0, forcing_end=0.0), 8).history]
    assert (
        losses[0] == train(tmp_path / 'b', buoy, 8).history[0]['loss']
        and losses[-1] != train(tmp_path / 'b', buoy, 8).history[-1]['loss']
    )


def test_units():
    s = Symbols(charset('buoy2022'))
    assert s.charset == charset('buoy2022') and end_id(s) == 1 and end_id(SubscriptTokenizer(charset())) == 0
    for t in texts:
        assert s.decode(s.encode(t)) == t
    with pytest.raises(KhmerOCRError, match='U\\+0061'):
        s.encode('a')


def test_bad_settings_and_foreign_checkpoints(tmp_path):
    for bad, word in (
        (dict(encoder='vit'), 'buoy2022, ctc'),
        (dict(location=2), 'odd'),
        (dict(ctc_weight=2), 'ctc_weight'),
        (dict(channels=(1, 2)), 'seven'),
        (dict(units='words'), 'symbols, subscripts'),
    ):
        with pytest.raises(KhmerOCRError, match=word):
            Seq2SeqConfig(**bad)
    save_checkpoint(tmp_path / 'gan.safetensors', {'w': torch.ones(2)}, dict(model='dcgan'))
    with pytest.raises(KhmerOCRError, match='dcgan'):
        load_seq2seq(tmp_path / 'gan.safetensors')
    with pytest.raises(KhmerOCRError, match='dcgan'):
        train(tmp_path / 'm', joint, 1, init=tmp_path / 'gan.safetensors')
    save_checkpoint(
        tmp_path / 'c.safetensors', CTCNet(len(SubscriptTokenizer(charset())), ctc).state_dict(), header(ctc, SubscriptTokenizer(charset()))
    )
    with pytest.raises(KhmerOCRError, match='cannot start'):
        train(tmp_path / 'm', buoy, 1, init=tmp_path / 'c.safetensors')
    with pytest.raises(KhmerOCRError, match='does not fit'):
        train(tmp_path / 'm', replace(joint, ctc=replace(ctc, hidden=9)), 1, init=tmp_path / 'c.safetensors')
    with pytest.raises(KhmerOCRError, match='did you mean joint'):
        seq2seq_preset('jont')
    assert not (tmp_path / 'm').exists()


def test_lines_that_the_charset_cannot_write_are_left_out(tmp_path):
    (tmp_path / 'train.txt').write_text('OCR ខ្មែរ\nភ្នំពេញ\nកម្ពុជា\n', encoding='utf-8')
    recipe = Recipe(corpus=str(tmp_path), families=('Noto Sans Khmer',))
    learn = train_seq2seq(tmp_path / 'm', recipe, loop(3), buoy, pool=2, verbose=False)
    assert learn.step == 3
    (tmp_path / 'train.txt').write_text('OCR\n', encoding='utf-8')
    with pytest.raises(KhmerOCRError, match='No line'):
        train_seq2seq(tmp_path / 'n', recipe, loop(1), buoy, pool=2, verbose=False)


def test_guide_pulls_the_eye_to_where_ctc_hears():
    "With a frozen encoder, only the guide's gradient says where to look; and the loss of the guide alone falls"
    torch.manual_seed(0)
    config = replace(joint, guide=1.0, ctc_weight=0.5)
    units = make_units(config)
    net = Seq2Seq(len(units), config)
    net.encoder.requires_grad_(False)
    batch = collate([(i, t) for (i, _), t in zip(lines(40, 120, 160), ('កខគ', 'ខកខក'))])

    def strays():
        ids, n = as_targets(units, batch['texts'])
        _, heard, frames, looks = net(as_input(batch['images']), batch['widths'], ids)
        return guided_attention_loss(looks, ctc_align(ctc_frames(heard, frames), ids[:, :-1], n), n)

    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    first = strays().item()
    for _ in range(40):
        opt.zero_grad()
        strays().backward()
        opt.step()
    last = strays().item()
    assert last < 0.9 * first, (first, last)
    assert (
        Seq2SeqLoss(units, config)(net, batch).item()
        > Seq2SeqLoss(units, replace(config, guide=0.0))(net, batch).item()
    )
    empty = collate([(np.zeros((40, 60), np.uint8), '')])
    assert torch.isfinite(Seq2SeqLoss(units, config)(net, empty))
