"Plans and cards of the weights that ship: they fit the weights, older plans are read, and bad plans get one line."

import json
from dataclasses import asdict
from pathlib import Path
import pytest
import khmer_ocr
from khmer_ocr.training.checkpoints import load_weights
from khmer_ocr.models.zoo import available_models
from khmer_ocr.models.release import run_plan, available_plans, read_plan
from khmer_ocr.core.errors import KhmerOCRError

weights = Path(khmer_ocr.__file__).parent / 'weights'
good = dict(name='a', kind='ctc', stage=[dict(name='one', train=dict(steps=2))])


def write(tmp_path, **change):
    (tmp_path / 'plan.json').write_text(json.dumps(good | change), encoding='utf-8')
    return tmp_path / 'plan.json'


@pytest.mark.parametrize('name', sorted(available_models()))
def test_three_files(name):
    "Each reader that ships has a plan and a card that speak of the same network"
    plan = read_plan(name)
    card = json.loads((weights / f'{name}.json').read_text(encoding='utf-8'))
    _, head = load_weights(available_models()[name])
    planned = json.loads(json.dumps(asdict(plan.stages[-1].request.config)))
    assert planned == planned | head['config']
    assert card['name'] == head['name'] == plan.name == name
    assert [s['train']['steps'] for s in card['stages']] == [s.request.train.steps for s in plan.stages]
    assert card['samples'] == sum(s['train']['steps'] * s['train']['batch_size'] for s in card['stages'])
    assert (weights / f'{name}.md').read_text(encoding='utf-8').startswith(f'# {name}\n')
    assert not plan.start or plan.start in available_models()


def test_every_plan_has_weights():
    "Each plan that ships stands beside the weights it makes, and the other way round"
    assert set(available_plans()) == set(available_models())


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(kind='lstm'), ['kind of model', 'ctc']),
        (dict(stage=[]), ['at least one']),
        (dict(stages=[1]), ["'stages'", 'stage']),
        (dict(train=dict(stpes=3)), ["'stpes'", 'steps']),
        (dict(model=dict(widht=3)), ["'widht'"]),
        (dict(recipe=dict(preset='rainy')), ['rainy']),
        (dict(stage=[dict(name='one', seed=3)]), ["'seed'", 'one']),
        (dict(model=dict(hidden=0)), ['hidden']),
        (dict(stage=[dict(name='one', keep=0.5)]), ['keep', 'came before']),
        (dict(start='fast', stage=[dict(name='one', keep=1)]), ['keep', 'below 1']),
    ],
)
def test_bad_plans(tmp_path, change, words):
    "Unknown tables, settings and values are refused in one line that names them"
    with pytest.raises(KhmerOCRError) as e:
        read_plan(write(tmp_path, **change))
    assert '\n' not in str(e.value)
    assert all(w in str(e.value) for w in words)


def test_older_plans(tmp_path):
    "`model` for the kind and `settings` for the network mean what `kind` and `model` mean today"
    stage = dict(name='one', train=dict(steps=2))
    new = dict(name='a', kind='ctc', model=dict(hidden=9), stage=[stage | dict(model=dict(layers=1))])
    old = dict(name='a', model='ctc', settings=dict(hidden=9), stage=[stage | dict(settings=dict(layers=1))])
    plans = []
    for i, tables in enumerate((new, old)):
        path = tmp_path / f'{i}.json'
        path.write_text(json.dumps(tables), encoding='utf-8')
        plans.append(read_plan(path))
    assert plans[0] == plans[1]
    assert (plans[0].stages[0].request.config.hidden, plans[0].stages[0].request.config.layers) == (9, 1)


def test_missing_start(tmp_path):
    "Weights to start from that are not there are named, and nothing is trained"
    plan = read_plan(write(tmp_path, start=str(tmp_path / 'none.safetensors')))
    with pytest.raises(KhmerOCRError, match='none.safetensors'):
        run_plan(plan, tmp_path / 'models', texts=['កក'], verbose=False)
    assert not (tmp_path / 'models/1_one/latest.safetensors').exists()
