"The attention recogniser: the paper's size, padding, CTC prefixes against all alignments, training, checkpoints."

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from khmer_ocr.core.config import configure
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.data.batching import as_input, collate
from khmer_ocr.models.attention import Seq2Seq, Seq2SeqConfig, load_seq2seq, make_units
from khmer_ocr.models.attention_training import (
    Seq2SeqLoss,
    as_targets,
    guided_attention_loss,
    read_lines,
    seq2seq_variant,
)
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header, load_ctc
from khmer_ocr.models.ctc_training import read_batches
from khmer_ocr.models.decoding import (
    beam_search,
    ctc_align,
    ctc_empty_prefix,
    ctc_extend_prefix,
    ctc_fallback,
    ctc_log_probs,
    ctc_prefix_scores,
    ctc_text_score,
    greedy_decode,
    has_diverged,
)
from khmer_ocr.models.zoo import train_recogniser
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.text.khmer import charset, normalise
from khmer_ocr.text.metrics import lost_runs
from khmer_ocr.text.tokenizers import SubscriptTokenizer, SymbolTokenizer
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.checkpoints import load_checkpoint, save_checkpoint
from khmer_ocr.training.settings import TrainConfig

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រ', 'ភ្នំពេញ', 'សុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
ctc = CTCConfig(channels=(4, 4, 4, 4, 8), hidden=8, layers=2)
buoy = Seq2SeqConfig(channels=(4,) * 7, projection=4, encoder_hidden=6, hidden=8, attention=6)
joint = Seq2SeqConfig(encoder='ctc', ctc=ctc, hidden=8, attention=6, embedding=4, location=5, ctc_weight=0.3)
both = pytest.mark.parametrize(
    'config',
    (buoy, replace(buoy, ctc_weight=0.3, units='subscripts', charset='khmer-latin'), joint),
    ids=('buoy', 'buoy+ctc', 'on ctc'),
)


def loop(steps, **kw):
    quiet = dict(log_every=1, eval_every=100, save_every=100, precision='32-true', tensorboard=False)
    return TrainConfig(steps=steps, batch_size=2, **quiet, **kw)


def train(out, config, steps=6, recipe=None, settings=None, **kw):
    recipe = recipe or Recipe(random_text=True, seed=4)
    train_config = loop(steps, **(settings or {}))
    return train_recogniser('seq2seq', out, recipe, train_config, config, texts=texts, pool=2, verbose=False, **kw)


def train_encoder(out):
    "A CTC recogniser after two steps"
    recipe = Recipe(random_text=True, seed=4)
    train_recogniser('ctc', out, recipe, loop(2), ctc, texts=texts, pool=2, verbose=False)
    return out / 'latest.safetensors'


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    "Number of parameters, of units and of frames are those of Buoy 2022"
    net = Seq2Seq(117).eval()
    assert len(make_units(Seq2SeqConfig())) == 117
    assert sum(p.numel() for p in net.parameters()) == 9_938_222
    for w in (8, 40, 333, 1200):
        width = torch.tensor([w])
        with torch.no_grad():
            frames = net.encoder.conv_features(torch.zeros(1, 1, 32, w), width)
        assert frames.shape == (1, 512, 1, -(-w // 4) - 1)
        assert net.encoder.lengths(width) == -(-w // 4) - 1
    assert all(conv.bias is not None for conv in net.encoder.convs)


@pytest.mark.parametrize('more', (dict(), dict(ctc_weight=0.3), dict(embedding=5, location=3)), ids=str)
def test_padding_changes_nothing(more):
    "Logits, CTC's logits, attentions and texts of a line: alone, or beside a longer one"
    torch.manual_seed(0)
    net = Seq2Seq(20, replace(buoy, **more)).eval()
    for norm in net.encoder.norms:
        if hasattr(norm, 'running_mean'):
            norm.running_mean.normal_()
            norm.bias.data.normal_()  # so that white becomes something
    items = lines(32, 37, 90, 161)
    batch = collate(items)
    ids = torch.randint(2, 20, (3, 6))
    together = outputs(net, batch, ids)
    for i, item in enumerate(items):
        alone = outputs(net, collate([item]), ids[i : i + 1])
        n = alone['frames'][0]
        assert torch.allclose(alone['logits'][0], together['logits'][i], atol=1e-5)
        width = alone['attentions'].shape[-1]
        assert torch.allclose(alone['attentions'][0], together['attentions'][i, :, :width], atol=1e-5)
        if net.has_ctc_head:
            assert torch.allclose(alone['ctc'][0, :n], together['ctc'][i, :n], atol=1e-5)
        written = alone['greedy'][0]
        assert written.ids == together['greedy'][i].ids
        assert torch.allclose(written.attentions, together['greedy'][i].attentions, atol=1e-5)
        assert alone['beam'][0].ids == together['beam'][i].ids


@torch.inference_mode()
def outputs(net, batch, ids):
    "All that a network gives for a batch"
    x = as_input(batch['images'])
    logits, by_ctc, frames, attentions = net(x, batch['widths'], ids)
    memory = net.encode(x, batch['widths'])
    return dict(
        logits=logits,
        ctc=by_ctc,
        frames=frames.tolist(),
        attentions=attentions,
        greedy=greedy_decode(net, memory, 1, 9),
        beam=beam_search(net, memory, 1, limit=9),
    )


def test_padding_gets_no_attention():
    torch.manual_seed(0)
    net = Seq2Seq(20, joint).eval()
    batch = collate(lines(40, 64, 128))
    with torch.no_grad():
        memory = net.encode(as_input(batch['images']), batch['widths'])
        values = memory.values.clone()
        values[0, 16:] = 7.0
        other = memory._replace(values=values, keys=net.key(values))
        a, b = (greedy_decode(net, m, 0, 5)[0] for m in (memory, other))
        by_ctc = [ctc_log_probs(net.ctc_logits(m), m.lengths) for m in (memory, other)]
    assert a.attentions.shape[1] == b.attentions.shape[1] == 16
    assert a.probs == b.probs
    empty = [ctc_text_score(ctc_empty_prefix(log_probs))[0] for log_probs in by_ctc]
    assert torch.equal(*empty)


def alignments(p):
    "Probability of each text by listing all alignments; p (T, V)"
    by_text = {}
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        text = tuple(k for k, _ in itertools.groupby(path) if k)
        by_text[text] = by_text.get(text, 0) + math.prod(float(p[i, k]) for i, k in enumerate(path))
    return by_text


def begins_with(by_text, prefix):
    return sum(p for text, p in by_text.items() if text[: len(prefix)] == prefix)


def test_ctc_prefix_scores_against_all_alignments():
    torch.manual_seed(1)
    logits = torch.randn(3, 5, 3)
    lengths = torch.tensor([5, 3, 1])
    log_probs = ctc_log_probs(logits, lengths)
    truth = [alignments(logits[b, :n].double().softmax(-1)) for b, n in enumerate(lengths.tolist())]
    units = torch.tensor([[[1, 2]]]).expand(3, 1, 2)
    for text in ((1, 1, 2), (2, 1, 2), (2, 2, 1)):
        state = ctc_empty_prefix(log_probs)
        last = torch.zeros(3, 1, dtype=torch.long)
        for i, u in enumerate(text):
            prefix = text[:i]
            got = ctc_prefix_scores(log_probs, state, last, units).exp()[:, 0]
            want = [(begins_with(t, (*prefix, 1)), begins_with(t, (*prefix, 2))) for t in truth]
            assert np.allclose(got, want, atol=1e-9)
            assert np.allclose(ctc_text_score(state).exp()[:, 0], [t.get(prefix, 0) for t in truth], atol=1e-9)
            new = torch.full((3, 1), u)
            state = ctc_extend_prefix(log_probs, state, last, new)
            last = new


def test_prefix_scores_hold_over_long_lines():
    "Sums of thousands of nats lose no digits: the same in many frames as PyTorch's own loss"
    torch.manual_seed(2)
    logits = 9 * torch.randn(1, 400, 12)
    ids = torch.randint(1, 12, (1, 60))
    log_probs = ctc_log_probs(logits, torch.tensor([400]))
    state = ctc_empty_prefix(log_probs)
    last = torch.zeros(1, 1, dtype=torch.long)
    for u in ids[0]:
        new = u.view(1, 1)
        state = ctc_extend_prefix(log_probs, state, last, new)
        last = new
    sizes = torch.tensor([400]), torch.tensor([60])
    loss = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), ids, *sizes, reduction='none')
    assert abs(float(ctc_text_score(state)) + float(loss)) < 1e-6


def test_beam_with_ctc_of_full_weight_finds_the_likeliest_text_of_ctc():
    torch.manual_seed(4)
    net = Seq2Seq(4, replace(joint, ctc_weight=0.5)).eval()
    with torch.inference_mode():
        memory = net.encode(torch.rand(1, 1, 40, 20), torch.tensor([20]))
        logits = 4 * torch.randn(1, 5, 4)
        by_ctc = ctc_log_probs(logits, memory.lengths)
        found = beam_search(net, memory, 0, beam=300, wide=4, limit=5, alpha=0.0, ctc=by_ctc, weight=1.0)[0]
    by_text = alignments(logits[0].double().softmax(-1))
    assert tuple(found.ids) == max(by_text, key=by_text.get)


def test_length_normalisation_lets_longer_texts_win():
    torch.manual_seed(0)
    net = Seq2Seq(6, joint).eval()
    with torch.inference_mode():
        memory = net.encode(torch.rand(1, 1, 40, 40), torch.tensor([40]))
        n = [len(beam_search(net, memory, 0, beam=6, limit=8, alpha=a)[0].ids) for a in (0.0, 1.0, 3.0)]
    assert n == sorted(n)
    assert n[0] < n[2]


def test_the_fallback_lets_no_lost_run_through():
    rng = np.random.default_rng(0)
    line = ''.join(rng.choice(list('កខគឃងចឆជឈញដឋឌឍណតថទធន'), 80))
    for n, at in itertools.product((6, 9, 30), (0, 20, None)):
        at = 80 - n if at is None else at
        dropped = line[:at] + line[at + n :]
        twice = line[: at + n] + line[at:]
        misread = dropped.replace(dropped[5], 'អ')
        for bad in (dropped, twice, misread):
            assert lost_runs([bad], [line])
            assert has_diverged(bad, line)
        kept = ctc_fallback([(dropped,), (twice,)], [(line,), (line,)])
        assert kept == [(line,), (line,)]


def test_single_mistakes_are_no_divergence():
    line = normalise('ព្រះរាជាណាចក្រកម្ពុជា') * 4
    assert not has_diverged(line, line)
    assert not has_diverged(line[:40] + 'អ' + line[41:], line)
    assert not has_diverged('', '')
    assert has_diverged('', line)


@both
def test_resumed_training_ends_with_the_same_weights(tmp_path, config):
    config = replace(config, forcing_end=0.3)
    train(tmp_path / 'whole', config)
    train(tmp_path / 'parts', config, callbacks=[StopAt(3)])
    train(tmp_path / 'parts', config, resume='latest')
    assert same(weights(tmp_path / 'whole/latest.safetensors'), weights(tmp_path / 'parts/latest.safetensors'))


former_parts = dict(classifier='name', ctc_head='head', init_state='start', location_kernel='shift')
former_encoders = dict(
    buoy2022={'encoder.projection': 'encoder.enter', 'encoder.rnn': 'encoder.read'},
    ctc={
        'encoder.backbone': 'encoder.look',
        'encoder.res_blocks': 'encoder.more',
        'encoder.encoder': 'encoder.read',
        'encoder.classifier': 'encoder.name',
    },
)


def with_former_names(path):
    "Rewrite a checkpoint with the names that parts and settings had in earlier versions"
    tensors, head = load_checkpoint(path)
    config = dict(head['config'])
    for new, old in dict(projection='narrow', encoder_hidden='frames').items():
        config[old] = config.pop(new)
    if config['ctc']:
        inner = dict(config['ctc'])
        inner['reading'] = inner.pop('encoder')
        config['ctc'] = inner
    renamed = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition('.') if name.startswith(('model.', 'ema.')) else ('', '', name)
        for new, old in (former_parts | former_encoders[config['encoder']]).items():
            if rest.startswith(new + '.'):
                rest = old + rest.removeprefix(new)
                break
        renamed[f'{prefix}.{rest}' if prefix else rest] = tensor
    assert renamed.keys() != tensors.keys()
    save_checkpoint(path, renamed, head | dict(config=config))


@both
def test_training_checkpoints_with_former_names_resume_and_open(tmp_path, config):
    train(tmp_path / 'whole', config)
    train(tmp_path / 'parts', config, callbacks=[StopAt(3)])
    latest = tmp_path / 'parts/latest.safetensors'
    before = weights(latest)
    with_former_names(latest)
    assert same(before, weights(latest))
    assert load_seq2seq(latest)[0].config == config
    train(tmp_path / 'parts', config, resume='latest')
    assert same(weights(tmp_path / 'whole/latest.safetensors'), weights(latest))


def test_settings_by_former_names():
    assert configure(Seq2SeqConfig, dict(narrow=8, frames=16)) == Seq2SeqConfig(projection=8, encoder_hidden=16)
    ctc_settings = dict(reading='conv', blocks=[0, 1, 0])
    config = configure(Seq2SeqConfig, dict(encoder='ctc', ctc=ctc_settings))
    assert config.ctc == CTCConfig(encoder='conv', res_blocks=(0, 1, 0))


@both
def test_each_recogniser_reads_in_each_way(tmp_path, config):
    labelled = collate([(lines(config.height, 80)[0][0], texts[1])])
    train(tmp_path / 'm', config, 1, validation=[labelled])
    net, units, head = load_seq2seq(tmp_path / 'm/latest.safetensors')
    assert head['model'] == 'seq2seq'
    assert head['height'] == config.height
    assert Seq2SeqConfig(**head['config']) == config
    assert head['charset'] == list(units.charset.symbols)
    batches = [collate(lines(config.height, 80, 33)), collate(lines(config.height, 8))]
    for decoder in ('greedy', 'beam') + (('ctc',) if net.has_ctc_head else ()):
        read, confidences = read_lines(net, units, batches, decoder)
        assert len(read) == len(confidences) == 3
        assert all(0 <= c <= 1 for c in confidences)
        assert (read, confidences) == read_lines(net, units, batches, decoder)
    if not net.has_ctc_head:
        with pytest.raises(KhmerOCRError, match='no CTC head'):
            read_lines(net, units, batches, 'ctc')


def test_the_joint_settings_are_built_on_a_ctc_recogniser(tmp_path):
    config, train_config, _ = seq2seq_variant('joint', 3, train_encoder(tmp_path / 'ctc'))
    assert config.ctc == ctc
    assert train_config.freeze == ('encoder',)
    assert train_config.steps == 3


def test_a_trained_ctc_recogniser_becomes_the_encoder_and_stays_frozen(tmp_path):
    first = train_encoder(tmp_path / 'ctc')
    seen = []

    class Watch(Callback):
        def after_loss(self, learn):
            gradients = [p for p in learn.net.encoder.parameters() if p.grad is not None]
            seen.append((learn.net.encoder.training, learn.net.training, gradients))

    freeze = dict(freeze=('encoder',))
    train(tmp_path / 'joint', joint, 3, settings=freeze, init=first, callbacks=[Watch()])
    assert seen == [(False, True, [])] * 3
    before = load_ctc(first)[0]
    net, units, _ = load_seq2seq(tmp_path / 'joint/latest.safetensors')
    assert same(before.state_dict(), net.encoder.state_dict())
    batch = collate(lines(40, 90, 60))
    by_own_head = read_lines(net, units, [batch], 'ctc')[0]
    assert by_own_head == read_batches(before, units, [batch])[0]


def test_ctc_weight_moves_the_encoder_s_head():
    torch.manual_seed(0)
    units = make_units(replace(buoy, ctc_weight=0.3))
    batch = collate([(lines(32, 200)[0][0], 'កខ')])
    for w in (0.3, 1.0):
        net = Seq2Seq(len(units), replace(buoy, ctc_weight=w))
        Seq2SeqLoss(units, net.config)(net, batch).backward()
        assert net.ctc_head.weight.grad.abs().sum() > 0
        assert (net.classifier.weight.grad.abs().sum() > 0) == (w < 1)


def test_label_smoothing_changes_the_loss():
    units = make_units(buoy)
    torch.manual_seed(0)
    net = Seq2Seq(len(units), buoy).eval()
    batch = collate([(lines(32, 200)[0][0], 'កខ')])
    with torch.no_grad():
        net.classifier.bias[5] = 9.0
    assert Seq2SeqLoss(units, buoy)(net, batch) != Seq2SeqLoss(units, buoy, smoothing=0.2)(net, batch)


def test_less_teacher_forcing_changes_later_steps_only(tmp_path):
    forced = [h['loss'] for h in train(tmp_path / 'b', buoy, 8).history]
    falling = [h['loss'] for h in train(tmp_path / 'a', replace(buoy, forcing_end=0.0), 8).history]
    assert falling[0] == forced[0]
    assert falling[-1] != forced[-1]


def test_units():
    "Texts come back from their ids, and a character outside the charset is named by its code point"
    symbols = SymbolTokenizer(charset('buoy2022'))
    assert symbols.charset == charset('buoy2022')
    assert (symbols.end, SubscriptTokenizer(charset()).end) == (1, 0)
    for t in texts:
        assert symbols.decode(symbols.encode(t)) == t
    with pytest.raises(KhmerOCRError, match='U\\+0061'):
        symbols.encode('a')


@pytest.mark.parametrize(
    'settings, word',
    [
        (dict(encoder='vit'), 'buoy2022, ctc'),
        (dict(location=2), 'odd'),
        (dict(ctc_weight=2), 'ctc_weight'),
        (dict(channels=(1, 2)), 'seven'),
        (dict(units='words'), 'symbols, subscripts'),
        (dict(encoder='ctc', ctc=dict(outputs_per_frame=2)), 'outputs_per_frame'),
    ],
)
def test_settings_that_make_no_network(settings, word):
    "The error names the setting or what it may be"
    with pytest.raises(KhmerOCRError, match=word):
        Seq2SeqConfig(**settings)


def test_foreign_checkpoints(tmp_path):
    "Other kinds and other sizes are refused before anything is written"
    gan = tmp_path / 'gan.safetensors'
    save_checkpoint(gan, {'w': torch.ones(2)}, dict(model='dcgan'))
    with pytest.raises(KhmerOCRError, match='dcgan'):
        load_seq2seq(gan)
    with pytest.raises(KhmerOCRError, match='dcgan'):
        train(tmp_path / 'm', joint, 1, init=gan)
    units = SubscriptTokenizer(charset())
    encoder = tmp_path / 'c.safetensors'
    save_checkpoint(encoder, CTCNet(len(units), ctc).state_dict(), header(ctc, units))
    with pytest.raises(KhmerOCRError, match='cannot start'):
        train(tmp_path / 'm', buoy, 1, init=encoder)
    with pytest.raises(KhmerOCRError, match='does not fit'):
        train(tmp_path / 'm', replace(joint, ctc=replace(ctc, hidden=9)), 1, init=encoder)
    assert not (tmp_path / 'm').exists()


def test_a_misspelt_variant_gets_a_hint():
    with pytest.raises(KhmerOCRError, match='did you mean joint'):
        seq2seq_variant('jont')


def test_lines_that_the_charset_cannot_write_are_left_out(tmp_path):
    (tmp_path / 'train.txt').write_text('OCR ខ្មែរ\nភ្នំពេញ\nកម្ពុជា\n', encoding='utf-8')
    recipe = Recipe(corpus=str(tmp_path), families=('Noto Sans Khmer',))
    quiet = dict(pool=2, verbose=False)
    assert train_recogniser('seq2seq', tmp_path / 'm', recipe, loop(3), buoy, **quiet).step == 3
    (tmp_path / 'train.txt').write_text('OCR\n', encoding='utf-8')
    with pytest.raises(KhmerOCRError, match='No line'):
        train_recogniser('seq2seq', tmp_path / 'n', recipe, loop(1), buoy, **quiet)


def guided_setup():
    torch.manual_seed(0)
    config = replace(joint, guide=1.0, ctc_weight=0.5)
    units = make_units(config)
    net = Seq2Seq(len(units), config)
    net.encoder.requires_grad_(False)
    images = [image for image, _ in lines(40, 120, 160)]
    return net, units, collate(list(zip(images, ('កខគ', 'ខកខក'))))


def test_guided_attention_moves_to_where_ctc_finds_the_units():
    "With a frozen encoder, the loss of the guide alone falls"
    net, units, batch = guided_setup()

    def guide_loss():
        ids, n = as_targets(units, batch['texts'])
        _, by_ctc, frames, attentions = net(as_input(batch['images']), batch['widths'], ids)
        at = ctc_align(ctc_log_probs(by_ctc, frames), ids[:, :-1], n)
        return guided_attention_loss(attentions, at, n)

    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    first = guide_loss().item()
    for _ in range(40):
        optimiser.zero_grad()
        guide_loss().backward()
        optimiser.step()
    assert guide_loss().item() < 0.9 * first


def test_the_guide_is_part_of_the_loss_and_harmless_for_empty_lines():
    net, units, batch = guided_setup()
    without = Seq2SeqLoss(units, replace(net.config, guide=0.0))
    assert Seq2SeqLoss(units, net.config)(net, batch).item() > without(net, batch).item()
    empty = collate([(np.zeros((40, 60), np.uint8), '')])
    assert torch.isfinite(Seq2SeqLoss(units, net.config)(net, empty))
