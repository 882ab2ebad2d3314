"The CTC recogniser: training that resumes, weights to start from, former names, outputs per frame, foreign files."

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from conftest import draw_line
from khmer_ocr.core.config import configure
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.data.batching import as_input, collate
from khmer_ocr.inference.reader import Reader
from khmer_ocr.models.ctc import CTCConfig, CTCNet, grow, header, init_from_checkpoint, load_ctc
from khmer_ocr.models.ctc_training import CTCLoss, FrameDistillationLoss, read_batches
from khmer_ocr.models.decoding import greedy_ctc
from khmer_ocr.models.release import export_weights
from khmer_ocr.models.zoo import available_models, train_recogniser
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.text.khmer import charset, normalise
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.checkpoints import load_checkpoint, save_checkpoint
from khmer_ocr.training.settings import TrainConfig

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រ', 'ភ្នំពេញ', 'សុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
tiny = CTCConfig(channels=(4, 4, 4, 4, 8), hidden=8, layers=2)
units = SubscriptTokenizer(charset())
former_settings = dict(res_blocks='blocks', block_type='block', encoder='reading', outputs_per_frame='outputs')
former_parts = dict(backbone='look', res_blocks='more', encoder='read', classifier='name')
former_details = {'.projection.': '.enter.', '.local_conv.': '.near.', '.mlp.': '.mix.'}


def loop(steps, **kw):
    quiet = dict(log_every=1, eval_every=100, save_every=100, precision='32-true', tensorboard=False)
    return TrainConfig(steps=steps, batch_size=2, **quiet, **kw)


def train(out, steps=6, config=tiny, loop_settings=None, **kw):
    recipe = Recipe(random_text=True, seed=4)
    settings = loop(steps, **(loop_settings or {}))
    return train_recogniser('ctc', out, recipe, settings, config, texts=texts, pool=2, verbose=False, **kw)


def weights(path):
    return load_ctc(path)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def noise(*widths, height=40, seed=0):
    rng = np.random.default_rng(seed)
    return collate([(rng.integers(0, 255, (height, w)).astype(np.uint8), '') for w in widths])


def former_name(name):
    "The name that a tensor had before the parts were renamed"
    prefix, _, rest = name.partition('.') if name.startswith(('model.', 'ema.')) else ('', '', name)
    part, _, detail = rest.partition('.')
    if part not in former_parts:
        return name
    old = f'{former_parts[part]}.{detail}'
    if part == 'encoder':
        for new, former in former_details.items():
            old = old.replace(new, former)
    return f'{prefix}.{old}' if prefix else old


def with_former_names(path, out):
    "A copy of a checkpoint in which parts and settings have the names of earlier versions"
    tensors, head = load_checkpoint(path)
    config = {former_settings.get(k, k): v for k, v in head['config'].items()}
    renamed = {former_name(k): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_checkpoint(out, renamed, head | dict(config=config))
    return out


class StopAt(Callback):
    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step == self.n:
            raise CancelFit


def test_resumed_training_ends_with_the_same_weights(tmp_path):
    train(tmp_path / 'whole')
    train(tmp_path / 'parts', callbacks=[StopAt(3)])
    train(tmp_path / 'parts', resume='latest')
    assert same(weights(tmp_path / 'whole/latest.safetensors'), weights(tmp_path / 'parts/latest.safetensors'))


def test_a_training_checkpoint_with_former_names_resumes_to_the_same_weights(tmp_path):
    train(tmp_path / 'whole')
    train(tmp_path / 'old', callbacks=[StopAt(3)])
    latest = tmp_path / 'old/latest.safetensors'
    with_former_names(latest, latest)
    train(tmp_path / 'old', resume='latest')
    assert same(weights(tmp_path / 'whole/latest.safetensors'), weights(latest))
    assert all(not k.startswith(('model.look', 'ema.look')) for k in load_checkpoint(latest)[0])


def test_warm_restart_begins_with_the_weights(tmp_path):
    train(tmp_path / 'a', 2)
    got = {}

    class Capture(Callback):
        def before_fit(self, learn):
            got.update({k: v.clone() for k, v in learn.model.state_dict().items()})

    train(tmp_path / 'b', 1, init=tmp_path / 'a/latest.safetensors', callbacks=[Capture()])
    got = {k.removeprefix('_forward_module.'): v for k, v in got.items()}
    assert same(weights(tmp_path / 'a/latest.safetensors'), got)


@pytest.mark.parametrize('part', ['backbone', 'look'])
def test_parts_may_be_given_by_present_and_former_names(tmp_path, part):
    "To start from, and to freeze"
    train(tmp_path / 'a', 1)
    first = tmp_path / 'a/latest.safetensors'
    train(tmp_path / 'b', 2, loop_settings=dict(freeze=(part,)), init=first, parts=(part,))
    before = load_ctc(first)[0]
    after = load_checkpoint(tmp_path / 'b/latest.safetensors')[0]
    for name, w in before.backbone.named_parameters():
        assert torch.equal(w, after[f'model.backbone.{name}'])
    assert not torch.equal(before.classifier.weight, after['model.classifier.weight'])


@pytest.mark.parametrize('name', sorted(available_models()))
def test_weights_with_former_names_read_the_same_to_the_last_bit(tmp_path, name):
    old = with_former_names(available_models()[name], tmp_path / 'old.safetensors')
    assert same(weights(available_models()[name]), weights(old))
    lines = [draw_line(t) for t in (*texts, ' '.join(texts * 12))]
    for decoder in ('greedy', 'beam'):
        new = Reader.load(available_models()[name], decoder=decoder, dtype=torch.float32).read(lines)
        assert new == Reader.load(old, decoder=decoder, dtype=torch.float32).read(lines)
        assert all(prediction.text and prediction.chars for prediction in new)


def test_shipped_weights_have_the_present_names():
    for path in available_models().values():
        with open(path, 'rb') as f:
            size = int.from_bytes(f.read(8), 'little')
            file_header = json.loads(f.read(size))
        head = json.loads(file_header.pop('__metadata__')['khmer_ocr'])
        assert {k.split('.')[0] for k in file_header} <= {*former_parts}
        assert not set(former_settings.values()) & set(head['config'])


@pytest.mark.parametrize('encoder', ['lstm', 'attention', 'conv'])
def test_every_encoder_opens_with_former_names(tmp_path, encoder):
    config = replace(tiny, encoder=encoder, res_blocks=(1, 0, 1), block_type='large')
    net = CTCNet(len(units), config).eval()
    save_checkpoint(tmp_path / 'new.safetensors', net.state_dict(), header(config, units))
    old = with_former_names(tmp_path / 'new.safetensors', tmp_path / 'old.safetensors')
    opened, _, head = load_ctc(old)
    assert same(net.state_dict(), opened.state_dict())
    assert opened.config == config
    assert set(head['config']) == set(asdict(config))


def test_settings_by_former_names():
    given = dict(reading='conv', blocks=[0, 1, 0], block='large', outputs=2)
    want = CTCConfig(encoder='conv', res_blocks=(0, 1, 0), block_type='large', outputs_per_frame=2)
    assert configure(CTCConfig, given) == want
    with pytest.raises(KhmerOCRError, match='encoder'):
        configure(CTCConfig, dict(reading='gru'))


def test_padding_reaches_no_further_than_the_windows_of_the_convolutions():
    "White on the right of a line changes only the last frames before the LSTM, not those further in"
    torch.manual_seed(0)
    net = CTCNet(50, tiny).eval()
    image = np.random.default_rng(0).integers(0, 255, (40, 160)).astype(np.uint8)
    alone = collate([(image, '')])
    beside = collate([(image, ''), (np.full((40, 320), 255, np.uint8), '')])
    with torch.inference_mode():
        frames = net.conv_features(as_input(alone['images']))
        padded = net.conv_features(as_input(beside['images']))[:1]
    assert torch.allclose(frames[..., :30], padded[..., :30], atol=1e-6)
    assert frames.shape[-1] == 40


def test_units_round_trip():
    for name in ('khmer-latin', 'buoy2022'):
        tokenizer = SubscriptTokenizer(charset(name))
        for t in texts:
            assert tokenizer.decode(tokenizer.encode(t)) == t
    assert len(units.encode('្ត្រ')) == 2
    with pytest.raises(KhmerOCRError, match='U\\+6F22'):
        units.encode('ក漢')


def test_loss_is_finite_where_a_line_has_too_few_frames():
    too_narrow = (np.zeros((40, 8), np.uint8), texts[0] * 4)
    batch = collate([too_narrow, (np.zeros((40, 200), np.uint8), texts[1])])
    loss = CTCLoss(units)(CTCNet(len(units), tiny), batch)
    assert loss.isfinite()
    assert loss > 0


def test_greedy_drops_repeats_and_blanks():
    logits = torch.full((1, 7, 4), -9.0)
    logits[0, range(7), [1, 1, 0, 1, 2, 2, 3]] = 9.0
    ((ids, confidences, at),) = greedy_ctc(logits, [7])
    assert ids == [1, 1, 2, 3]
    assert at == [0, 3, 4, 6]
    assert all(0.99 < c <= 1 for c in confidences)


def test_two_outputs_per_frame_are_laid_one_behind_the_other():
    torch.manual_seed(0)
    net = CTCNet(9, replace(tiny, outputs_per_frame=2)).eval()
    batch = noise(61, 100)
    with torch.inference_mode():
        x = as_input(batch['images'])
        logits = net(x, batch['widths'])
        scores = net.classifier(net.features(x, batch['widths']))
    assert net.classifier.out_features == 18
    assert net.lengths(batch['widths']).tolist() == [32, 50]
    assert logits.shape[1] == 2 * scores.shape[1]
    assert torch.equal(logits[:, 0::2], scores[..., :9])
    assert torch.equal(logits[:, 1::2], scores[..., 9:])


def test_outputs_per_frame_must_divide_the_stride():
    assert CTCConfig(outputs_per_frame=4).output_stride == 1
    for bad in (dict(stride=2, outputs_per_frame=4), dict(outputs_per_frame=3), dict(outputs_per_frame=0)):
        with pytest.raises(KhmerOCRError, match='outputs_per_frame'):
            CTCConfig(**bad)


def test_the_loss_counts_all_outputs_of_a_frame():
    "16 px are 4 frames: too few for 6 units, unless a frame writes two of them"
    batch = collate([(np.zeros((40, 16), np.uint8), texts[1])])
    assert len(units.encode(texts[1])) == 6
    losses = []
    for n in (1, 2):
        net = CTCNet(len(units), replace(tiny, outputs_per_frame=n))
        losses.append(CTCLoss(units, outputs_per_frame=n)(net, batch).item())
    assert losses[0] == 0 < losses[1]


def test_a_teacher_with_one_output_teaches_a_student_with_two():
    torch.manual_seed(0)
    teacher = CTCNet(len(units), tiny)
    student = CTCNet(len(units), replace(tiny, outputs_per_frame=2))
    batch = noise(80)
    loss = FrameDistillationLoss(CTCLoss(units, outputs_per_frame=2), teacher, share=1.0)
    p = loss.teacher_probs(batch, student.lengths(80))
    with torch.inference_mode():
        own = teacher(as_input(batch['images']), batch['widths']).softmax(-1)
    assert torch.equal(p, own[:, : p.shape[1] // 2].repeat_interleave(2, 1))  # each of the teacher's frames twice
    assert loss(student, batch).isfinite()


def test_positions_of_a_network_with_two_outputs_are_in_pixels(tmp_path):
    "The second half of a line's outputs lies in the second half of the picture"
    config = replace(tiny, outputs_per_frame=2)
    torch.manual_seed(0)
    net = CTCNet(len(units), config).eval()
    with torch.no_grad():
        net.classifier.weight.mul_(30)
    reader = Reader(net, units, header(config, units), dtype=torch.float32)
    image = np.random.default_rng(0).integers(0, 255, (40, 400)).astype(np.uint8)
    (prediction,) = reader.read([image])
    assert reader.stride == 2
    assert len(prediction.chars) > 3
    ends = [x1 for *_, x1 in prediction.chars]
    assert max(ends) > 300
    assert max(ends) <= 400


def test_a_network_with_two_outputs_trains_saves_and_grows(tmp_path):
    config = replace(tiny, outputs_per_frame=2)
    train(tmp_path / 'm', 2, config)
    net, _, head = load_ctc(tmp_path / 'm/latest.safetensors')
    assert net.config == config
    assert head['config']['outputs_per_frame'] == 2
    batch = noise(90, 60)
    assert len(read_batches(net, units, [batch])[0]) == 2
    large = grow(net, replace(config, hidden=9))
    x = as_input(batch['images'])
    with torch.inference_mode():
        assert torch.allclose(net(x), large(x), atol=1e-5)
    with pytest.raises(KhmerOCRError, match='only grow'):
        grow(net, replace(config, outputs_per_frame=4))
    with pytest.raises(KhmerOCRError, match='that fits'):
        init_from_checkpoint(CTCNet(len(units), tiny), tmp_path / 'm/latest.safetensors', ['classifier'])


def test_foreign_checkpoints(tmp_path):
    "Other kinds and a file that was cut are refused, and nothing is written"
    save_checkpoint(tmp_path / 'gan.safetensors', {'w': torch.ones(2)}, dict(model='dcgan'))
    with pytest.raises(KhmerOCRError, match='dcgan'):
        load_ctc(tmp_path / 'gan.safetensors')
    with pytest.raises(KhmerOCRError, match='holds no reader'):
        export_weights(tmp_path / 'gan.safetensors', tmp_path / 'out.safetensors')
    assert not (tmp_path / 'out.safetensors').exists()
    train(tmp_path / 'm', 1)
    whole = (tmp_path / 'm/latest.safetensors').read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KhmerOCRError, match='truncated'):
        load_ctc(tmp_path / 'cut.safetensors')
