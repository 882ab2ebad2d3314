"""Distillation: any shape of teacher, several teachers, resume to the same weights, plans and settings
with a teacher, mistakes in one line."""

import json
import numpy as np
import pytest
import torch
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header, load_ctc
from khmer_ocr.models.ctc_training import CTCLoss
from khmer_ocr.models.zoo import train_recogniser
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.data.batching import collate
from khmer_ocr.models.distillation import DistillationLoss, DistillationConfig
from khmer_ocr.models.distillation import EnsembleMember, unit_columns
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.models.training_request import read_training_config
from khmer_ocr.models.release import run_plan, make_card, read_plan
from khmer_ocr.models.attention import Seq2Seq, make_units
from khmer_ocr.models.attention_training import seq2seq_variant
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset, normalise

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រ', 'ភ្នំពេញ', 'សុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
tiny = CTCConfig(channels=(4, 4, 4, 4, 8), hidden=8, layers=1)
units = SubscriptTokenizer(charset(tiny.charset))


def lines():
    return collate(
        [
            (np.random.default_rng(i).integers(0, 255, (40, 60 + 30 * i)).astype(np.uint8), t)
            for i, t in enumerate(texts)
        ]
    )


def net(seed, **kw):
    torch.manual_seed(seed)
    return CTCNet(len(units), CTCConfig(**(dict(channels=(4, 4, 4, 4, 8), hidden=8, layers=1) | kw))).eval()


def teacher(network, own=units):
    return EnsembleMember(network, own, units)


def checkpoint(path, seed=0, **kw):
    n = net(seed, **kw)
    save_checkpoint(path, n.state_dict(), header(n.config, units))
    return str(path)


@pytest.mark.parametrize(
    'shape',
    [dict(), dict(height=48), dict(stride=2), dict(stride=8), dict(height=32, stride=8), dict(encoder='attention')],
)
def test_teachers_of_any_shape(shape):
    "Height, stride and outputs of the teacher may differ: the loss is finite and the student gets a gradient"
    student = net(1)
    loss = DistillationLoss(CTCLoss(units), [teacher(net(2, **shape))])(student, lines())
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.classifier.weight.grad.abs().sum() > 0


def test_padding_teaches_nothing():
    "More white behind the lines changes nothing: frames behind a line do not count"
    plain = lines()
    wide = lines()
    wide['images'] = torch.nn.functional.pad(wide['images'], (0, 64), value=255)
    student = net(1, encoder='conv', layers=0)
    loss = DistillationLoss(CTCLoss(units), [teacher(net(2, encoder='conv', layers=0))], share=1.0)
    with torch.no_grad():
        assert torch.isclose(loss(student, plain), loss(student, wide), rtol=1e-4)


def test_two_teachers_are_their_mean():
    "Two teachers give the mean of their probabilities"
    a, b = (teacher(net(i)) for i in (2, 3))

    def probs(*teachers):
        return DistillationLoss(CTCLoss(units), teachers).teacher_probs(lines(), 30)

    assert torch.allclose(probs(a, b), (probs(a) + probs(b)) / 2, atol=1e-6)
    assert torch.allclose(probs(a, b).sum(-1), torch.ones(4, 30), atol=1e-4)


def test_units_go_by_name():
    "Units are matched by name, whatever their order, and a missing one is named"
    small = SubscriptTokenizer(charset('buoy2022'))
    extra = [u for u in small.units if u not in units.units]
    if extra:
        with pytest.raises(KhmerOCRError, match='no unit for'):
            unit_columns(units, small)
    at = unit_columns(units, units)
    assert at[0] == 0
    assert at.tolist() == list(range(len(units)))
    with pytest.raises(KhmerOCRError, match='no unit for'):
        unit_columns(make_units(seq2seq_variant('buoy2022').config), units)


def test_a_teacher_needs_a_ctc_head():
    "Without a CTC head there are no frames to teach, and that is said in one line"
    config = seq2seq_variant('buoy2022').config
    own_units = make_units(config)
    with pytest.raises(KhmerOCRError, match='without a CTC head'):
        teacher(Seq2Seq(len(own_units), config), own_units)


class StopAt(Callback):
    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step == self.n:
            raise CancelFit


def test_resumed_training_ends_with_the_same_weights(tmp_path):
    "A run with a teacher that was cut ends with the weights of a whole one"
    teaching = DistillationConfig((checkpoint(tmp_path / 'teacher.safetensors'),), 0.6, 2.0, 0.5)
    loop = TrainConfig(
        steps=4, batch_size=2, log_every=1, eval_every=100, save_every=100, precision='32-true', tensorboard=False
    )

    def go(out, **kw):
        train_recogniser(
            'ctc',
            tmp_path / out,
            Recipe(random_text=True, seed=4),
            loop,
            tiny,
            texts=texts,
            pool=2,
            verbose=False,
            teacher=teaching,
            **kw,
        )

    go('whole')
    go('parts', callbacks=[StopAt(2)])
    go('parts', resume='latest')
    a, b = (load_ctc(tmp_path / p / 'latest.safetensors') for p in ('whole', 'parts'))
    assert all(torch.equal(v, b[0].state_dict()[k]) for k, v in a[0].state_dict().items())
    assert a[2]['teacher'].endswith('teacher.safetensors: share 0.6, temperature 2, words 0.5')
    assert str(tmp_path.parent) not in a[2]['teacher']


def test_plans_with_teachers(tmp_path):
    "A stage with a teacher runs, and its card names the teacher"
    plan = dict(
        name='a',
        kind='ctc',
        model=dict(channels=[4, 4, 4, 4, 8], hidden=8, layers=1),
        train=dict(batch_size=2, precision='32-true', tensorboard=False),
        stage=[
            dict(name='one', train=dict(steps=1)),
            dict(name='two', train=dict(steps=1), distil=dict(teachers=[checkpoint(tmp_path / 't.safetensors')])),
        ],
    )

    def write(**change):
        path = tmp_path / 'plan.json'
        path.write_text(json.dumps(plan | change), encoding='utf-8')
        return path

    made = read_plan(write())
    assert made.stages[0].request.distil is None
    assert made.stages[1].request.distil.share == 0.5
    card = make_card(made, run_plan(made, tmp_path / 'models', texts=texts, verbose=False, pool=2), {})
    assert 'teacher' not in card['stages'][0]
    assert 't.safetensors' in card['stages'][1]['teacher']
    with pytest.raises(KhmerOCRError, match='only CTC readers'):
        read_plan(write(kind='seq2seq', model={}))
    with pytest.raises(KhmerOCRError, match='did you mean teachers'):
        read_plan(write(distil=dict(teacher='best')))


@pytest.mark.parametrize(
    'table, words',
    [
        ('teachers = ["bset"]', "'bset'"),
        ('teacher = "best"', 'did you mean teachers'),
        ('share = 2.0', 'from 0 to 1'),
        ('teachers = []', 'list of model names'),
    ],
)
def test_settings_with_teachers(tmp_path, table, words):
    "Wrong values of [distil] are named in one line"
    settings = tmp_path / 's.toml'
    settings.write_text(f'[distil]\n{table}\n', encoding='utf-8')
    with pytest.raises(KhmerOCRError) as e:
        read_training_config(settings, steps=1).distil(CTCLoss(units))
    assert words in str(e.value)
    assert '\n' not in str(e.value)


def test_only_a_ctc_recogniser_has_a_teacher(tmp_path):
    "Other kinds refuse a teacher before anything is trained"
    settings = tmp_path / 's.toml'
    settings.write_text('[distil]\nteachers = ["best"]\n', encoding='utf-8')
    with pytest.raises(KhmerOCRError, match='Only a CTC reader'):
        read_training_config(settings, 'seq2seq', steps=1)
    assert read_training_config(None, 'seq2seq', steps=1).distil is None
