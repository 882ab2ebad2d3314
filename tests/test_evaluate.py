"The report about a reader: standard sets, own sets, other engines and weights; hidden lines stay hidden"

import json, re, shutil
import numpy as np
import pytest
from typer.testing import CliRunner
from khmer_ocr.cli.app import app
from khmer_ocr.evaluation.benchmark import (
    DEGRADATIONS,
    FIXED_SETS,
    EvalSet,
    EvaluatedSet,
    standard_sets,
    held_out_fonts,
    evaluate_set,
    score_set,
    open_set,
    set_parts,
    pool_sets,
    rank_engines_by_part,
    real_lines,
    publishable,
)
from khmer_ocr.data.images import read_image
from khmer_ocr.evaluation.error_analysis import (
    TextDiff,
    ConfusionExamples,
    WorstLines,
    cluster_pairs,
    cluster_places,
    confusion_spots,
    worst_lines,
)
from khmer_ocr.evaluation.engines import EngineResult, available_engines
from khmer_ocr.inference.reader import Reader, Prediction
from khmer_ocr.reporting.html import outside_references
from khmer_ocr.reporting.runs import run_notebook
from khmer_ocr.synth.store import generate_set
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import clusters, fold_lookalikes, normalise, random_runs, strip_spaces

# Texts that stand nowhere else, so that finding them means that they leaked
SECRETS = ['សម្ងាត់បំផុតទីមួយ ឋឹឍឺ', 'ឯកសារលាក់លៀមលេខពីរ ឡែឈោ', 'កុំបង្ហាញបន្ទាត់នេះ ឰឮឪ']


@pytest.fixture(scope='module')
def model(tiny):
    return str(tiny / 'model/best.safetensors')


@pytest.fixture(scope='module')
def hidden(tiny, tmp_path_factory):
    "Labelled lines with part and kind, and secret texts and file names"
    d = tmp_path_factory.mktemp('hidden')
    (d / 'lines').mkdir()
    rows = ['path\ttext\tkind\tpart']
    for i, t in enumerate(SECRETS):
        shutil.copy(tiny / f'set/test/images/test_{i:06d}.png', d / f'lines/secretfile{i}.png')
        rows.append(f'lines/secretfile{i}.png\t{t}\t{"letter" if i else "speech"}\t{"val" if i < 2 else "test"}')
    (d / 'labels.tsv').write_text('\n'.join(rows), encoding='utf-8')
    return d


def leaks(folder, readings=()) -> list:
    "Secret clusters, file names and readings in any text file of a report"
    pieces = (
        {p for s in SECRETS for p in (s, strip_spaces(s), *s.split(), ''.join(clusters(s)[:4]))}
        | {'secretfile'}
        | {r for r in readings if len(r) > 3}
    )
    texts = {
        p.name: p.read_text(encoding='utf-8') for p in folder.rglob('*') if p.suffix in ('.html', '.json', '.ipynb')
    }
    assert {'report.html', 'metrics.json', 'run.ipynb', 'run.json'} <= set(texts)
    found = []
    for name, text in texts.items():
        found += [(name, s) for s in pieces if s in text or json.dumps(s)[1:-1] in text]
    return found


def expected():
    "Names of the standard sets with the fonts that are installed"
    if held_out_fonts():
        return [*FIXED_SETS, *DEGRADATIONS, *(f'{d}_heldout' for d in DEGRADATIONS)]
    return [*(f for f in FIXED_SETS if f != 'heldout'), *DEGRADATIONS]


def test_a_report_on_the_standard_sets_with_hidden_real_lines(tiny, model, hidden, tmp_path, monkeypatch):
    monkeypatch.setenv('KHMER_OCR_REAL_LINES', str(hidden))
    run = run_notebook(
        'evaluate',
        dict(
            model=model,
            against=[str(tiny / 'model/latest.safetensors')],
            lines=2,
            fixed_lines=3,
            corpus=str(tiny / 'corpus'),
            peers=[],
            worst=5,
        ),
        tmp_path / 'report',
    )
    m, page = run.metrics, (run.folder / 'report.html').read_text(encoding='utf-8')
    own = expected()
    assert list(m['scores']) == [
        *own,
        'real',
        'real test',
        'real val',
        'real test letter',
        'real val letter',
        'real val speech',
    ]
    assert [m['scores'][n]['lines'] for n in own] == [3 if n in FIXED_SETS else 2 for n in own]
    assert m['scores']['real']['lines'] == 3
    assert m['lines'] == sum(m['scores'][n]['lines'] for n in own) + 3
    assert all(
        {
            'cer',
            'cer_folded',
            'cer_nospace',
            'cluster',
            'exact',
            'wer',
            'bleu',
            'low',
            'high',
            'runs',
            'ece_lines',
            'area',
            'reject_1pc',
        }
        <= set(s)
        for s in m['scores'].values()
    )
    assert all(s['low'] <= s['cer_folded'] <= s['high'] for s in m['scores'].values())
    assert set(m['classes']) == {'battery', 'real'}
    assert list(m['against']['latest']) == [*own, 'real']
    assert m['ranked']['real val speech'][1]['engine'] == 'khmer_ocr latest'
    texts = [
        r.text for r in Reader.load(model).read([read_image(hidden / f'lines/secretfile{i}.png') for i in range(3)])
    ]
    assert leaks(run.folder, texts) == []
    assert outside_references(page) == []
    assert page.count('max-height:52px') == 5
    assert 'fixed validation set' in page
    assert not [
        p for p in run.folder.rglob('*') if p.suffix == '.json' and str(hidden) in p.read_text(encoding='utf-8')
    ]


@pytest.mark.parametrize('shown', [True, False])
def test_show_lines_off_shows_no_line(model, hidden, tmp_path, shown):
    run = run_notebook('evaluate', dict(model=model, data=str(hidden), peers=[], show_lines=shown), tmp_path / 'report')
    assert list(run.metrics['scores']) == [
        'data',
        'data test',
        'data val',
        'data test letter',
        'data val letter',
        'data val speech',
    ]
    found, page = leaks(run.folder), (run.folder / 'report.html').read_text(encoding='utf-8')
    if shown:
        assert {'report.html', 'run.ipynb'} <= {name for name, _ in found}
        assert 'max-height:52px' in page
    else:
        assert found == []
        assert 'max-height:52px' not in page
        assert page.count('none to show') >= 2
        assert run.metrics['confusions'] == []


def test_other_engines_read_the_same_lines(tiny, model, tmp_path):
    m = run_notebook('evaluate', dict(model=model, data=str(tiny / 'set'), peer_lines=2), tmp_path / 'report').metrics
    assert [r['engine'] for r in m['ranked'].get('data', [])][:1] == ['khmer_ocr best'][: len(available_engines())]
    assert len(m['ranked'].get('data', [])) == (1 + len(available_engines()) if available_engines() else 0)
    assert m['scores']['data']['lines'] == 4
    with pytest.raises(KhmerOCRError, match='No engine called'):
        run_notebook('evaluate', dict(model=model, data=str(tiny / 'set'), peers=['nobody']), tmp_path / 'r')


def test_equal_runs_write_equal_metrics(tiny, model, tmp_path):
    params = dict(model=model, data=str(tiny / 'set'), peers=[])
    written = []
    for _ in range(2):
        run = run_notebook('evaluate', params, tmp_path / 'report')
        written.append((run.folder / 'metrics.json').read_bytes())
    assert written[0] == written[1]


def test_shards_files_splits_and_tables_are_all_taken(tiny, tmp_path):
    generate_set(Recipe(corpus=str(tiny / 'corpus')), tmp_path / 'shards', max_lines=4, format='shards', progress=False)
    a, b = open_set(tiny / 'set', tmp_path), open_set(tmp_path / 'shards', tmp_path / 'room')
    assert a.truths == b.truths
    assert a.metadata == b.metadata
    assert all((read_image(p) == read_image(q)).all() for p, q in zip(a.paths, b.paths))
    assert (
        open_set(tmp_path / 'shards/val', tmp_path / 'room', limit=2).truths
        == open_set(tiny / 'set/val', tmp_path, limit=2).truths
    )
    for bad in (tmp_path / 'nothing', tmp_path):
        with pytest.raises(KhmerOCRError) as e:
            open_set(bad, tmp_path)
        assert '\n' not in str(e.value)


def test_the_standard_sets_are_the_same_each_time(tiny, tmp_path):
    a, b = (standard_sets(tmp_path / k, 2, corpus=tiny / 'corpus') for k in 'ab')
    assert [s.name for s in a] == expected()
    for s, t in zip(a, b):
        assert s.truths == t.truths
        assert s.metadata == t.metadata
        assert [p.read_bytes() for p in s.paths] == [p.read_bytes() for p in t.paths]
    assert all(not f['ops'] for s in a for f in s.metadata if s.name.startswith(('clean', 'fixed', 'heldout')))
    assert any(f['ops'] for f in a[-1].metadata)
    with pytest.raises(KhmerOCRError, match='from 1 up'):
        standard_sets(tmp_path / 'c', -1, corpus=tiny / 'corpus')


def test_real_lines_are_never_shown(hidden, monkeypatch):
    monkeypatch.setenv('KHMER_OCR_REAL_LINES', str(hidden))
    real = real_lines()
    assert not real.shown
    assert not real.subset([0]).shown
    assert set(set_parts(real)) == {'real test', 'real val', 'real test letter', 'real val letter', 'real val speech'}
    j = EvaluatedSet(real, [Prediction('ខុស', 0.5, (('ខ', 0.5, 0, 9), ('ុ', 0.5, 9, 10), ('ស', 0.5, 10, 19)))] * 3)
    own = EvaluatedSet(EvalSet('own', real.paths, ['ក'] * 3, [{}] * 3), j.readings)
    assert publishable([j, own]) == [own]
    assert worst_lines([j]) == []
    assert confusion_spots([j], 9.0) == {}
    assert confusion_spots([own], 9.0)
    assert confusion_spots([own]) == {}
    assert not pool_sets([j, own], 'x').lines.shown
    for piece in (WorstLines([j]), ConfusionExamples([j])):
        assert 'img' not in piece._repr_html_()
        assert 'ខ' not in piece._repr_html_() + repr(piece)
    assert WorstLines([own])._repr_html_().count('<img') == 3
    monkeypatch.delenv('KHMER_OCR_REAL_LINES')
    assert real_lines() is None


def test_a_difference_never_splits_a_cluster_and_loses_nothing():
    rng = np.random.default_rng(4)
    texts = [t for t in map(normalise, random_runs(200, rng)) if t]
    for t in texts:
        read = normalise(''.join(c for c in t if rng.random() > 0.2))
        pairs = cluster_pairs(t, read)
        assert ''.join(a for a, *_ in pairs) == t
        assert ''.join(b for _, b, _ in pairs) == read
        whole = set(clusters(t)) | {''}
        assert all(a in whole for a, *_ in pairs)
        marks = re.findall('<span[^>]*>([^<]*)</span>', TextDiff(t, read).line(0, 'x'))
        assert all(
            m == '∅' or clusters(m)[0] in {c.replace(' ', '␣') for c in whole} or '&' in m or '␣' in m for m in marks
        )
        assert not any(same and fold_lookalikes(a) != fold_lookalikes(b) for a, b, same in pairs)


def test_places_of_a_real_reader_lie_on_the_image_in_order(tiny):
    reader, line_set = Reader.load('fast'), open_set(tiny / 'set', tiny)
    for p, r in zip(line_set.paths, evaluate_set(reader, line_set).readings):
        places, w = cluster_places(r), read_image(p).shape[1]
        assert [c for c, *_ in places] == [fold_lookalikes(c) or c for c in clusters(strip_spaces(r.text))]
        assert all(0 <= a < b <= w for _, a, b in places)
        assert all(x[1] <= y[1] for x, y in zip(places, places[1:]))


def test_scores_agree_with_their_parts(tiny):
    j = evaluate_set(Reader.load('fast'), open_set(tiny / 'set', tiny))
    m = score_set(j)
    same = score_set(EvaluatedSet(j.lines, [Prediction(t, 1.0) for t in j.lines.truths]))
    assert same['cer'] == same['ece_lines'] == same['area'] == same['reject_1pc'] == 0 == same['runs']
    assert 'ece_symbols' not in same
    assert 'ece_symbols' in m
    worse = score_set(EvaluatedSet(j.lines, [Prediction('', 0.5)] * 4))
    assert worse['cer'] == 1
    assert worse['reject_1pc'] == 1
    assert worse['dropped'] == sum(len(strip_spaces(fold_lookalikes(t))) > 5 for t in j.lines.truths)
    rows = rank_engines_by_part([EngineResult('a', j.texts, 1.0), EngineResult('b', [''] * 4, 1.0)], j.lines)['data']
    assert rows[0]['cer_folded'] == m['cer_folded']
    assert rows[1]['behind_ours']['difference'] == pytest.approx(1 - m['cer_folded'])


# the command
def ok(*args):
    "What the command prints; it must succeed"
    r = CliRunner().invoke(app, [str(a) for a in args])
    assert r.exit_code == 0, r.output
    return r.stdout


def refused(*args):
    "The one line with which the command refuses"
    r = CliRunner().invoke(app, [str(a) for a in args])
    assert r.exit_code == 1, r.stderr
    assert len(r.stderr.strip().splitlines()) == 1, r.stderr
    assert r.stderr.startswith('khmer-ocr: '), r.stderr
    return r.stderr


def test_the_command_on_shards_with_other_weights(tiny, model, tmp_path):
    generate_set(Recipe(corpus=str(tiny / 'corpus')), tmp_path / 'shards', max_lines=4, format='shards', progress=False)
    printed = ok('evaluate', tmp_path / 'shards', '--model', model, '--against', tiny / 'model/latest.safetensors')
    assert 'lost' not in printed
    assert 'folded' in printed
    assert 'latest' in printed
    shards, files = (
        json.loads(ok('evaluate', d, '--model', model, '--json')) for d in (tmp_path / 'shards', tiny / 'set')
    )
    assert shards == files
    assert list(shards) == ['scores']
    assert (
        json.loads(ok('evaluate', tmp_path / 'shards', '--model', model, '--limit', 2, '--json'))['scores']['data'][
            'lines'
        ]
        == 2
    )


def test_the_command_prints_numbers_only(hidden, model):
    printed = ok('evaluate', hidden, '--model', model, '--against', 'fast') + ok(
        'evaluate', hidden, '--model', model, '--json'
    )
    assert 'data val letter' in printed
    assert not [s for s in SECRETS if s in printed]
    assert 'secretfile' not in printed


def test_the_command_writes_the_report(hidden, model, tmp_path):
    printed = ok('evaluate', hidden, '--model', model, '--report', tmp_path / 'r', '--hide-lines')
    assert printed.splitlines()[-1] == str(tmp_path / 'r/report.html')
    assert leaks(tmp_path / 'r') == []
    assert json.loads((tmp_path / 'r/metrics.json').read_text(encoding='utf-8'))['scores']['data']['lines'] == 3


def test_what_cannot_be_evaluated_is_one_line(tiny, model, tmp_path):
    (tmp_path / 'x.tar').write_bytes(b'x' * 99)
    assert 'x.tar' in refused('evaluate', tmp_path, '--model', model)
    assert 'No engine called' in refused('evaluate', tiny / 'set', '--model', model, '--peers', 'nobody')
    assert 'fsat' in refused('evaluate', tiny / 'set', '--model', 'fsat')
    assert 'fsat' in refused('evaluate', tiny / 'set', '--model', 'fsat')
    assert 'none.safetensors' in refused(
        'evaluate', tiny / 'set', '--against', tmp_path / 'none.safetensors', '--model', model
    )
    assert 'corpus' in refused('evaluate', 'battery', '--model', model, '--corpus', tmp_path / 'nothing')
