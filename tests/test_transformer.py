"""The image-to-text transformer: padding, batches, the cache, checkpointing and the gate by equality;
beam search against brute force; training, starting points, checkpoints, settings."""

import itertools
import math
import numpy as np
import pytest
import torch
from dataclasses import asdict, replace
from pathlib import Path
import khmer_ocr
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header, load_ctc
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.data.datasets import LineSource
from khmer_ocr.data.batching import as_input, collate
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.models.decoding import (
    beam_search,
    ctc_empty_prefix,
    ctc_extend_prefix,
    ctc_log_probs,
    ctc_text_score,
    greedy_decode,
)
from khmer_ocr.models.attention_training import read_lines
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.text.tokenizers import make_tokenizer
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset, normalise
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.core.config import configure
from khmer_ocr.training.memory import kept_bytes
from khmer_ocr.models.transformer_training import (
    ParagraphSource,
    ImageToTextLoss,
    evaluate_image_to_text,
    load_image_to_text,
    init_image_to_text,
    image_to_text_header,
    image_to_text_variant,
)
from khmer_ocr.models.zoo import train_recogniser
from khmer_ocr.models.transformer import ImageToText, ImageToTextConfig, shift_right, output_tokenizer

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រ', 'ភ្នំពេញ', 'សុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
reader = CTCConfig(channels=(4, 4, 4, 4, 8), hidden=8, layers=2, res_blocks=(1, 1, 1))
tiny = ImageToTextConfig(
    channels=(4, 4, 8, 8),
    encoder_depth=2,
    encoder_width=16,
    encoder_heads=2,
    decoder_depth=3,
    decoder_width=16,
    decoder_heads=2,
    mlp_ratio=2,
    cross_layers=(0, 2),
)
kinds = dict(
    plain=dict(),
    relative=dict(positions='relative', reach=6),
    patches=dict(stem='patches'),
    far=dict(stem='patches', positions='relative', patch=(24, 4)),
    table=dict(stem='patches', positions='learned', reach=12),
    convolutions=dict(stem='ctc', ctc=reader),
    large=dict(stem='ctc', ctc=replace(reader, block_type='large')),
    stride2=dict(stem='ctc', ctc=replace(reader, stride=2)),
    stride8=dict(stem='ctc', ctc=replace(reader, stride=8)),
    reader=dict(stem='reader', ctc=reader, encoder_depth=0),
    itself=dict(stem='reader', ctc=reader, ctc_head='stem'),
    everywhere=dict(cross_layers='all', gate=False),
    mute=dict(ctc_weight=0.0),
)
each = pytest.mark.parametrize('kind', kinds)


def net_of(kind, n=20, seed=0):
    torch.manual_seed(seed)
    net = ImageToText(n, replace(tiny, **kinds[kind])).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_()
            m.bias.data.normal_()  # norms that turn white into something
    return net


def lines(height, *widths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 255, (height, w)).astype(np.uint8), '') for w in widths]


def loop(steps, **kw):
    return TrainConfig(
        **(
            dict(
                steps=steps,
                batch_size=2,
                log_every=1,
                eval_every=100,
                save_every=100,
                precision='32-true',
                tensorboard=False,
                label_smoothing=0.1,
            )
            | kw
        )
    )


def train(out, config=tiny, steps=4, more=None, **kw):
    return train_recogniser(
        'vision_text',
        out,
        Recipe(random_text=True, seed=4),
        loop(steps, **(more or {})),
        config,
        **(dict(texts=texts, pool=2, verbose=False) | kw),
    )


def weights(path):
    return load_image_to_text(path)[0].state_dict()


@each
def test_padding_changes_nothing(kind):
    "Logits, CTC's logits, attentions and texts of a line: alone, beside a longer one, in a wider picture"
    net = net_of(kind)
    c = net.config
    items = lines(c.height, 8, 37, 90, 161)
    many = collate(items)
    ids = torch.randint(1, 20, (4, 6))
    with torch.inference_mode():
        x = as_input(many['images'])
        logits, heard, n, _ = net(x, many['widths'], ids)
        memory = net.encode(x, many['widths'])
        wrote = greedy_decode(net, memory, 0, 9)
        found = beam_search(net, memory, 0, limit=9)
        for i, (image, _) in enumerate(items):
            for extra in (0, 50):
                y = torch.nn.functional.pad(as_input(torch.from_numpy(image)[None, None]), (0, extra))
                w = torch.tensor([image.shape[1]])
                a, b, m, _ = net(y, w, ids[i : i + 1])
                assert torch.allclose(a[0], logits[i], atol=1e-5)
                assert m == n[i] == -(-image.shape[1] // c.stride)
                if heard is not None:
                    assert torch.allclose(b[0, :m], heard[i, :m], atol=1e-5)
                alone = net.encode(y, w)
                got = greedy_decode(net, alone, 0, 9)[0]
                assert got.ids == wrote[i].ids
                assert torch.allclose(got.attentions, wrote[i].attentions, atol=1e-5)
                assert beam_search(net, alone, 0, limit=9)[0].ids == found[i].ids


@each
def test_the_cache_changes_nothing(kind):
    "Unit by unit with kept keys and values: the logits of the whole text at once, for several texts of a line too"
    net = net_of(kind, seed=1)
    b = collate(lines(net.config.height, 64, 120))
    x = as_input(b['images'])
    w = b['widths']
    ids = torch.randint(1, 20, (2, 3, 8))
    with torch.inference_mode():
        memory = net.encode(x, w)
        state = net.begin(memory)
        outs = []
        attentions = []
        state = state._replace(s=state.s.expand(-1, 3, *state.s.shape[2:]), prev=state.prev.expand(-1, 3))
        for u in range(8):
            state, out = net.step(memory, state)
            outs.append(net.classifier(out))
            attentions.append(state.attention)
            state = state._replace(prev=ids[..., u])
        for k in range(3):
            assert torch.allclose(torch.stack(outs, 2)[:, k], net(x, w, ids[:, k])[0], atol=1e-5)
        shown = net.decode(memory, shift_right(ids[:, 0])[:, None], show=True).attention[:, 0]
    assert torch.allclose(torch.stack(attentions, 2)[:, 0], shown, atol=1e-5)
    assert torch.allclose(shown.sum(-1), torch.ones(2, 8), atol=1e-5)
    assert state.s.shape == (2, 3, 3, 2, 8, 16)
    assert len(memory.keys) == len(net.config.cross_layer_numbers)


def test_later_units_change_nothing_before_them():
    "The causal mask: logits before a changed unit stay the same to the bit, those behind it do not"
    net = net_of('plain')
    b = collate(lines(48, 64))
    x = as_input(b['images'])
    a = torch.randint(1, 20, (1, 8))
    other = a.clone()
    other[:, 5:] = 3
    with torch.inference_mode():
        p = net(x, b['widths'], a)[0]
        q = net(x, b['widths'], other)[0]
    assert torch.equal(p[:, :6], q[:, :6])
    assert not torch.equal(p[:, 6:], q[:, 6:])


@pytest.mark.parametrize('kind', ('plain', 'relative', 'patches', 'reader', 'everywhere'))
def test_checkpointing_changes_nothing_but_memory(kind):
    "The gradient is the same with layers computed again, and fewer bytes are kept for it"
    units = output_tokenizer(tiny)
    batch = collate([(i, t) for (i, _), t in zip(lines(replace(tiny, **kinds[kind]).height, 64, 90), ('កខ', 'គឃង'))])

    def gradients(again):
        torch.manual_seed(0)
        net = ImageToText(len(units), replace(tiny, **kinds[kind], guide=0.5, checkpointing=again)).train()
        loss = ImageToTextLoss(units, net.config)
        torch.manual_seed(1)
        loss(net, batch).backward()
        got = [p.grad.clone() for p in net.parameters()]  # with dropout
        return got, kept_bytes(net, loss, batch)

    (plain, kept), (again, less) = gradients(False), gradients(True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again))
    assert less < 0.95 * kept


def test_the_gate():
    "Shut: the picture has no say. Open: the units before have none but by where to look. Half open: as without a gate"
    net = net_of('plain')
    b = collate(lines(48, 64, 64))
    x = as_input(b['images'])
    w = b['widths']
    ids = torch.randint(1, 20, (1, 8)).expand(2, 8)

    def set_gates(v):
        for i in net.config.cross_layer_numbers:
            torch.nn.init.zeros_(net.decoder[i].gate.weight)
            torch.nn.init.constant_(net.decoder[i].gate.bias, v)

    with torch.inference_mode():
        gates = net.decode(net.encode(x, w), shift_right(ids)[:, None], show=True).gates
        assert gates.shape == (2, 1, 8, 2)
        assert ((0 < gates) & (gates < 1)).all()
        assert gates.std() > 0
        p = net(x, w, ids)[0]
        assert not torch.allclose(p[0], p[1], atol=1e-5)
    set_gates(-1e4)
    with torch.inference_mode():
        p = net(x, w, ids)[0]
        assert torch.equal(p[0], p[1])
        assert not torch.equal(p[0, 1], p[0, 2])
    set_gates(1e4)
    with torch.inference_mode():
        layer = net.decoder[0]
        h = torch.randn(2, 1, 5, 16)
        m = net.encode(x, w)
        heard, _ = layer.self_attend(layer.norms[0](h), None)
        seen, _ = layer.cross_attend(layer.norms[1](h + heard), m.keys[0], m.mask)
        got = layer(h, None, m.keys[0], m.mask)[0]
        inside = h + 2 * seen
        assert torch.allclose(got, inside + layer.mlp(layer.norms[-1](inside)), atol=1e-5)
    set_gates(0.0)
    half = net_of('plain')
    half.load_state_dict(net.state_dict())
    plain = ImageToText(20, replace(tiny, gate=False)).eval()
    plain.load_state_dict({k: v for k, v in half.state_dict().items() if '.gate.' not in k})
    with torch.inference_mode():
        assert torch.allclose(half(x, w, ids)[0], plain(x, w, ids)[0], atol=1e-5)  # half open: plain addition
    assert net_of('everywhere').decoder[0].gate is None
    assert not hasattr(net_of('plain').decoder[1], 'cross_query')  # has no cross-attention


def test_beam_search_finds_the_best_text():
    "A beam wide enough for all texts finds the one with the best score, with CTC and without"
    torch.manual_seed(1)
    toy = ImageToText(4, tiny).eval()
    toy.classifier.weight.data *= 6
    b = collate(lines(48, 40))
    with torch.inference_mode():
        memory = toy.encode(as_input(b['images']), b['widths'])
        heard = ctc_log_probs(3 * toy.ctc_logits(memory), memory.lengths)

        def judge(text, weight):
            logp = toy.classifier(toy.decode(memory, torch.tensor([[[0, *text]]])).hidden)[0, 0].log_softmax(-1)
            total = float(logp[range(len(text) + 1), [*text, 0]].sum())
            r = ctc_empty_prefix(heard)
            last = torch.zeros(1, 1, dtype=torch.long)
            for u in text:
                r = ctc_extend_prefix(heard, r, last, torch.tensor([[u]]))
                last = torch.tensor([[u]])
            return ((1 - weight) * total + weight * float(ctc_text_score(r))) / ((6 + len(text)) / 6)

        every = [t for n in range(4) for t in itertools.product((1, 2, 3), repeat=n)]
        for weight in (0.0, 0.4, 0.8):
            found = beam_search(toy, memory, 0, beam=27, wide=4, limit=3, ctc=heard, weight=weight)[0]
            assert tuple(found.ids) == max(every, key=lambda t: judge(t, weight))
            logp = toy.classifier(toy.decode(memory, torch.tensor([[[0, *found.ids]]])).hidden)[0, 0].softmax(-1)
            assert found.probs == pytest.approx(logp[range(len(found.ids) + 1), [*found.ids, 0]].tolist(), abs=1e-4)


def test_the_loss():
    "The parts of the loss by hand: cross-entropy of the units and one end, smoothed or not, CTC beside it"
    units = output_tokenizer(tiny)
    torch.manual_seed(0)
    net = ImageToText(len(units), tiny).eval()
    batch = collate([(i, t) for (i, _), t in zip(lines(48, 64, 90), ('កខ', 'គ'))])

    def value(ctc_weight, smoothing=0.0):
        loss = ImageToTextLoss(units, replace(tiny, ctc_weight=ctc_weight), smoothing)
        return loss(net, batch).item()

    assert value(0.25) == pytest.approx(0.75 * value(0.0) + 0.25 * value(1.0), rel=1e-5)
    ids = torch.tensor([[*units.encode('កខ'), 0], [*units.encode('គ'), 0, 0]])
    wanted = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    with torch.inference_mode():
        p = net(as_input(batch['images']), batch['widths'], ids)[0].log_softmax(-1)
    nll = -p.gather(2, ids[..., None])[..., 0][wanted].mean().item()
    even = -p.mean(-1)[wanted].mean().item()
    assert value(0.0) == pytest.approx(nll, rel=1e-5)
    assert value(0.0, 0.1) == pytest.approx(0.9 * nll + 0.1 * even, rel=1e-5)


def test_training_resumes_to_the_same_weights(tmp_path):
    "A run that was cut ends with the weights of a run that was not"

    class Stop(Callback):
        def after_step(self, learn):
            if learn.step == 2:
                raise CancelFit

    config = replace(tiny, guide=0.5)
    whole = train(tmp_path / 'a', config)
    train(tmp_path / 'b', config, callbacks=[Stop()])
    train(tmp_path / 'b', config, resume='latest')
    a = weights(tmp_path / 'a/latest.safetensors')
    b = weights(tmp_path / 'b/latest.safetensors')
    assert all(a[k].equal(b[k]) for k in a)
    assert math.isfinite(whole.history[-1]['loss'])


def test_it_learns(tmp_path):
    "A batch by heart"
    batch = collate([(i, t) for (i, _), t in zip(lines(48, 64, 72, 80, 88), ('កខគ', 'ឃង', 'ចឆជឈ', 'កង'))])

    class Four(LineSource):
        def fetch(self, a, b, seed=None):
            return [
                (batch['images'][n % 4, 0, :, : int(batch['widths'][n % 4])].numpy(), batch['texts'][n % 4])
                for n in range(a, b)
            ]

    learn = train(
        tmp_path,
        replace(tiny, dropout=0.0),
        150,
        dict(batch_size=4, lr=5e-3, ema=0.0, eval_every=150, label_smoothing=0.0),
        data=Four(),
        validation=[batch],
        texts=None,
    )
    assert learn.metrics['exact'] == 1.0
    assert learn.metrics['cer'] == 0.0
    net, units, head = load_image_to_text(tmp_path / 'best.safetensors')
    for decoder in ('greedy', 'beam'):
        assert read_lines(net, units, [batch], decoder, guarded=False)[0] == batch['texts']
    assert head['model'] == 'vision_text'
    assert head['height'] == 48
    assert head['stride'] == 4


@pytest.mark.parametrize('kind', ('characters', 'clusters', 'subwords'))
def test_other_targets_travel_in_the_checkpoint(kind, tmp_path):
    "Units that were learned from text open with the checkpoint and read the same"
    config = replace(tiny, targets=kind, vocabulary=250)
    train(tmp_path, config, 1)
    net, units, head = load_image_to_text(tmp_path / 'latest.safetensors')
    assert head['targets']['kind'] == kind
    assert all(units.decode(units.encode(t)) == t for t in texts)
    assert net.n_units == len(units)
    mine = make_tokenizer('characters')
    train(tmp_path / 'own', steps=1, tokenizer=mine)
    assert load_image_to_text(tmp_path / 'own/latest.safetensors')[1].units == mine.units


@pytest.mark.parametrize('stem', ('ctc', 'reader'))
def test_starting_from_a_ctc_reader(stem, tmp_path):
    "The stem gets the weights of a CTC recogniser, and one of another shape is refused"
    units = SubscriptTokenizer(charset())
    torch.manual_seed(3)
    net = CTCNet(len(units), reader).eval()
    save_checkpoint(tmp_path / 'c.safetensors', net.state_dict(), header(reader, units))
    p = image_to_text_variant('tiny', 1, tmp_path / 'c.safetensors', stem)
    assert p.config.ctc == reader
    assert p.config.height == 40
    assert p.config.stem == stem
    train(
        tmp_path / 't',
        replace(tiny, stem=stem, ctc=reader),
        1,
        dict(freeze=('encoder.stem',), ema=0.0),
        init=tmp_path / 'c.safetensors',
    )
    got = weights(tmp_path / 't/latest.safetensors')
    was = net.state_dict()
    assert got['encoder.stem.backbone.0.0.weight'].equal(was['backbone.0.0.weight'])
    assert ('encoder.stem.encoder.weight_ih_l0' in got) == (stem == 'reader')
    with pytest.raises(KhmerOCRError, match="'ctc'"):
        train(tmp_path / 'u', init=tmp_path / 'c.safetensors')
    with pytest.raises(KhmerOCRError, match='does not fit'):
        train(
            tmp_path / 'u',
            replace(tiny, stem=stem, ctc=replace(reader, hidden=12, channels=(8,) * 5)),
            init=tmp_path / 'c.safetensors',
        )


@pytest.mark.parametrize('name', ('fast', 'best'))
def test_the_stem_of_a_shipped_reader_sees_what_it_saw(name):
    "The stem computes the features of the network that it was taken from"
    path = Path(khmer_ocr.__path__[0]) / f'weights/{name}.safetensors'
    if not path.exists():
        pytest.skip('no weights are installed')
    net, units, _ = load_ctc(path)
    seeing = ImageToText(len(units), image_to_text_variant('tiny', ctc=path).config).eval()
    init_image_to_text(seeing, path)
    image, _ = lines(40, 203)[0]
    x = as_input(torch.from_numpy(image)[None, None])
    w = torch.tensor([203])
    with torch.inference_mode():
        assert torch.allclose(seeing.encoder.stem(x, w)[0].squeeze(2).transpose(1, 2), net.features(x), atol=1e-4)


def test_starting_from_its_own_kind(tmp_path):
    "Parts or all of a checkpoint; parts that are not there and other sizes get one line"
    train(tmp_path / 'a', steps=1, more=dict(schedule='noam', lr=1.0))
    path = tmp_path / 'a/latest.safetensors'
    was = weights(path)
    net = ImageToText(len(output_tokenizer(tiny)), tiny)
    assert load_image_to_text(path)[2]['train']['d_model'] == 16  # the transformer's rate goes by the decoder's width
    init_image_to_text(net, path, ('encoder.layers', 'classifier'))
    now = net.state_dict()
    assert now['classifier.weight'].equal(was['classifier.weight'])
    assert now['encoder.layers.1.proj.weight'].equal(was['encoder.layers.1.proj.weight'])
    assert not now['embed.weight'].equal(was['embed.weight'])
    init_image_to_text(net, path)
    assert all(net.state_dict()[k].equal(was[k]) for k in was)
    for parts, says in ((('neck',), 'no part'), ((), 'does not fit')):
        with pytest.raises(KhmerOCRError, match=says):
            init_image_to_text(ImageToText(9, tiny), path, parts)
    with pytest.raises(KhmerOCRError, match='Backbone not found'):
        train(tmp_path / 'b', replace(tiny, backbone='nowhere'))


@pytest.mark.parametrize(
    'wrong,says',
    (
        (dict(cross_layers=(1, 0)), 'rising'),
        (dict(cross_layers=(3,)), '0 to 2'),
        (dict(cross_layers=()), 'at least one'),
        (dict(cross_layers='some'), "'all'"),
        (dict(stem='vit'), 'conv, patches, ctc, reader'),
        (dict(positions='none'), 'sinusoidal'),
        (dict(height=40), 'multiple of 16'),
        (dict(stem='patches', patch=(20, 4)), 'divide'),
        (dict(patch=(4,)), 'two numbers'),
        (dict(channels=(1, 2)), 'four numbers'),
        (dict(encoder_width=18), 'multiple of 4'),
        (dict(decoder_heads=3), '3 heads'),
        (dict(dropout=1.0), 'dropout'),
        (dict(guide=1.0, ctc_weight=0.0), 'CTC head'),
        (dict(ctc=CTCConfig()), 'left away'),
        (dict(stem='ctc', ctc=CTCConfig(encoder='conv')), 'lstm'),
        (dict(targets='words'), 'subwords'),
        (dict(decoder_depth=0), 'decoder_depth'),
    ),
)
def test_wrong_settings(wrong, says):
    "Settings that make no network are refused in one line that names the setting"
    with pytest.raises(KhmerOCRError, match=says) as e:
        replace(tiny, **wrong)
    assert '\n' not in str(e.value)


def test_settings():
    with pytest.raises(KhmerOCRError, match='did you mean'):
        configure(ImageToTextConfig, dict(encoder_dpth=2))
    for name in ('tiny', 'small', 'base', 'seed003'):
        p = image_to_text_variant(name, 10)
        assert p.train.label_smoothing == 0.1
        assert p.config.dropout == 0.1
        assert ImageToTextConfig(**asdict(p.config)) == p.config
    with torch.device('meta'):
        assert sum(q.numel() for q in ImageToText(183, image_to_text_variant('small').config).parameters()) < 10e6
    assert image_to_text_variant('seed003').config.height == 384
    assert image_to_text_variant('seed003').config.rows == 24
    with pytest.raises(KhmerOCRError, match='did you mean'):
        image_to_text_variant('smal')


FORMER_PARTS = (  # (part today, part in checkpoints of earlier versions)
    ('encoder.stem.convs.', 'encoder.stem.look.'),
    ('encoder.stem.projection.', 'encoder.stem.look.'),
    ('encoder.stem.backbone.', 'encoder.stem.look.'),
    ('encoder.stem.res_blocks.', 'encoder.stem.more.'),
    ('encoder.stem.encoder.', 'encoder.stem.read.'),
    ('encoder.input_proj.', 'encoder.enter.'),
    ('encoder.positions.horizontal', 'encoder.place.across'),
    ('encoder.positions.vertical', 'encoder.place.down'),
    ('encoder.positions.', 'encoder.place.'),
    ('.cross_query.', '.query.'),
    ('.cross_kv.', '.keys.'),
    ('.cross_proj.', '.take.'),
    ('.proj.', '.out.'),
    ('.mlp.', '.mix.'),
    ('classifier.', 'name.'),
    ('ctc_head.', 'head.'),
)


def former_name(name):
    for today, former in FORMER_PARTS:
        name = name.replace(today, former)
    return name


@each
def test_checkpoints_of_earlier_versions_open(kind, tmp_path):
    "With the former names of parts and settings: the same weights and settings"
    units = output_tokenizer(tiny)
    net = net_of(kind, len(units))
    head = image_to_text_header(net.config, units)
    former = {today: old for old, today in ImageToTextConfig.old_names.items()}
    config = {former.get(k, k): v for k, v in head['config'].items()}
    if config['ctc']:
        former = {today: old for old, today in CTCConfig.old_names.items()}
        config['ctc'] = {former.get(k, k): v for k, v in config['ctc'].items()}
    weights = {former_name(name): w for name, w in net.state_dict().items()}
    assert not set(weights) & {name for name in net.state_dict() if '.proj.' in name or '.mlp.' in name}
    save_checkpoint(tmp_path / 'old.safetensors', weights, head | dict(config=config))
    opened, _, _ = load_image_to_text(tmp_path / 'old.safetensors')
    assert opened.config == net.config
    assert all(w.equal(opened.state_dict()[name]) for name, w in net.state_dict().items())


def test_evaluation_and_foreign_files(tmp_path):
    "Scores have their names, and files of other kinds are refused in one line"
    units = output_tokenizer(tiny)
    net = net_of('plain', len(units))
    batch = collate([(i, 'កខ') for i, _ in lines(48, 64, 90)])
    assert set(evaluate_image_to_text(net, units, [batch], 'x_')) == {
        'x_cer',
        'x_cer_raw',
        'x_exact',
        'x_wer',
        'x_bleu',
        'x_nats',
        'x_ctc_cer',
    }
    silent = ImageToText(len(units), replace(tiny, ctc_weight=0.0))
    assert 'ctc_cer' not in evaluate_image_to_text(silent, units, [batch])
    with pytest.raises(KhmerOCRError, match='no CTC head'):
        read_lines(silent, units, [batch], 'ctc')
    save_checkpoint(
        tmp_path / 'x.safetensors', net.state_dict(), image_to_text_header(replace(tiny, decoder_depth=4), units)
    )
    with pytest.raises(KhmerOCRError, match='does not fit'):
        load_image_to_text(tmp_path / 'x.safetensors')
    save_checkpoint(tmp_path / 'y.safetensors', net.state_dict(), dict(model='dcgan'))
    with pytest.raises(KhmerOCRError, match='dcgan'):
        load_image_to_text(tmp_path / 'y.safetensors')


def test_blocks(tmp_path):
    "Lines below each other: the same from any start, as many labels as lines, and a network learns from them"

    class Lines(LineSource):
        path = 'here'

        def fetch(self, a, b, seed=None):
            return [(lines(24, 60 + 20 * (n % 3), seed=n)[0][0], texts[n % 4]) for n in range(a, b)]

    blocks = ParagraphSource(Lines(), 3, 64)
    some = blocks.fetch(0, 8)
    assert all((a[0] == b[0]).all() and a[1] == b[1] for a, b in zip(some, blocks.fetch(0, 3) + blocks.fetch(3, 8)))
    assert all(im.shape[0] == 64 for im, _ in some)
    for n, (_, label) in enumerate(some):
        k = len(label.split())
        assert label == ' '.join(texts[i % 4] for i in range(3 * n, 3 * n + k))
        assert 1 <= k <= 3
    assert len({len(t.split()) for _, t in some}) > 1
    learn = train(tmp_path, replace(tiny, height=64, stem='patches', patch=(16, 16), ctc_weight=0.0), 2, data=blocks)
    assert learn.step == 2


def test_a_reader_keeps_its_own_ctc_head_and_it_stays_as_it_was(tmp_path):
    "A CTC head on a frozen stem gives the same logits after a training of the rest"
    units = SubscriptTokenizer(charset('khmer-latin'))
    torch.manual_seed(0)
    old = CTCNet(len(units), reader).eval()
    save_checkpoint(tmp_path / 'reader.safetensors', old.state_dict(), header(reader, units))
    config = replace(tiny, stem='reader', ctc=reader, ctc_head='stem')
    net = ImageToText(len(units), config)
    init_image_to_text(net, tmp_path / 'reader.safetensors')
    x = torch.rand(2, 1, config.height, 64)
    w = torch.tensor([64, 64])
    with torch.no_grad():
        assert torch.allclose(net.eval().ctc_logits(net.encode(x, w)), old(x), atol=1e-5)
    batch = dict(collate([(np.full((config.height, 64), 255, np.uint8), texts[1])]), texts=[texts[1]])
    got = evaluate_image_to_text(net, units, [batch])
    assert got['nats'] > 0
    assert 'ctc_cer' in got
    assert ImageToTextLoss(units, config)(net, batch).item() > 0
    with pytest.raises(KhmerOCRError, match='ctc_head'):
        replace(tiny, ctc_head='stem')
    with pytest.raises(KhmerOCRError, match='ctc_head'):
        replace(config, ctc_weight=0.0)
