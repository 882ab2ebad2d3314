"Other engines that read or draw: their answers, the errors of those that fail, and how lines are compared"

import json, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image, features
from khmer_ocr.experiments import pillow_baseline, renderers
from khmer_ocr.evaluation import engines
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.synth.rendering import render
from khmer_ocr.core.errors import KhmerOCRError

texts = ['ស្ត្រីខ្មែរ', 'ព្រះរាជាណាចក្រកម្ពុជា', 'ភ្នំពេញ ឆ្នាំ២០២៥']
font = next(f for f in find_fonts(split='train') if f.style in ('Regular', 'Variable Regular'))
kiri = next(p for p in renderers.OTHER_RENDERERS if p.name == 'kiri-ocr')
raqm = pytest.mark.skipif(not features.check('raqm'), reason='this Pillow has no Raqm')


def fake(folder, monkeypatch, script, home='kiri'):
    "An environment whose Python is a shell script; $1 to $3 are `-I -c DRIVER`, its arguments begin at $4"
    program = folder / home / 'bin/python'
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv('KHMER_OCR_PEERS', str(folder))


def test_only_installed_renderers_are_listed(tmp_path, monkeypatch):
    monkeypatch.delenv('KHMER_OCR_PEERS', raising=False)
    assert all(not p.home for p in renderers.installed_renderers())
    monkeypatch.setenv('KHMER_OCR_PEERS', str(tmp_path / 'nowhere'))
    assert kiri not in renderers.installed_renderers()
    fake(tmp_path, monkeypatch, 'exit 0')
    assert kiri in renderers.installed_renderers()
    assert len([p for p in renderers.installed_renderers() if p.home]) == 1


def test_a_renderer_gets_its_arguments_and_its_answer_counts(tmp_path, monkeypatch):
    script = 'echo noise; cp "$4" "$8/got.txt"; echo "$5 $6 $7 $9" >> "$8/got.txt"; '
    fake(tmp_path, monkeypatch, script + 'echo \'{"seconds": 0.5, "version": "9.9"}\'')
    out = tmp_path / 'out'
    out.mkdir()
    assert renderers.draw_with_renderer(kiri, texts, font, 24, 'degraded', out, seed=3) == (0.5, '9.9')
    arguments = f'{Path(font.path).resolve()} 24 {kiri.written} 3\n'
    assert (out / 'got.txt').read_text(encoding='utf-8') == '\n'.join(texts) + arguments


@pytest.mark.parametrize(
    'script, says',
    [
        ('echo "ImportError: no glue" >&2; exit 1', 'kiri-ocr failed: ImportError: no glue'),
        ('exit 3', 'kiri-ocr failed: exit 3'),
        ('echo hello', 'kiri-ocr failed'),
        ('echo "[1]"', 'kiri-ocr failed'),
    ],
)
def test_a_failing_renderer_is_one_line(tmp_path, monkeypatch, script, says):
    fake(tmp_path, monkeypatch, script)
    with pytest.raises(KhmerOCRError, match=says) as e:
        renderers.draw_with_renderer(kiri, texts, font, 24, 'bare', tmp_path)
    assert '\n' not in str(e.value)


def test_the_folder_of_environments_may_be_relative(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, 'echo \'{"seconds": 1, "version": "1"}\'')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('KHMER_OCR_PEERS', '.')
    assert renderers.draw_with_renderer(kiri, texts, font, 24, 'bare', tmp_path) == (1.0, '1')


def test_unknown_recipe_is_named(tmp_path):
    with pytest.raises(KhmerOCRError, match='did you mean kiri'):
        renderers.install_renderers(tmp_path, ['kirii'])
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_missing_renderer_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv('KHMER_OCR_PEERS', raising=False)
    with pytest.raises(KhmerOCRError, match='KHMER_OCR_PEERS'):
        renderers.draw_with_renderer(kiri, texts, font, 24, 'bare', tmp_path)


def test_the_table_names_missing_renderers(monkeypatch):
    monkeypatch.delenv('KHMER_OCR_PEERS', raising=False)
    monkeypatch.setenv('PATH', '')
    jobs = renderers.renderer_jobs(texts, font, peer_lines=1)
    rows = renderers.drawing_table({font.family: renderers.time_renderers(jobs, rounds=1)})
    assert {r['who'] for r in rows if r['work'] == 'not installed'} == {p.name for p in renderers.OTHER_RENDERERS}
    assert [r[f'× {font.family}'] for r in rows if r['who'] == 'khmer_ocr'] == [1, 1, 1, 1]


def test_inspections_in_several_fonts_are_added_up():
    found = dict(lines=3, right=2, cut=1, same_bytes=True, version='1')
    inspected = {'a': {'kiri-ocr': found}, 'b': {'kiri-ocr': found | dict(same_bytes=False)}}
    row = {'who': 'kiri-ocr', 'version': '1', 'right': '4 of 6', 'cut': '2 of 6', 'same bytes': 'no', 'note': kiri.note}
    assert renderers.inspection_table(inspected) == [row]


def test_drivers_are_python():
    for p in renderers.OTHER_RENDERERS:
        compile(p.driver, p.name, 'exec')


def test_agreement_at_other_sizes_and_its_faults():
    ink = render(texts[1], font, 48).ink
    for size in (20, 24, 31, 96):
        share, lack = renderers.ink_agreement(255 - np.pad(render(texts[1], font, size).ink, 5), ink)
        assert share > 0.93, size
        assert abs(lack) <= 4, size
    share, lack = renderers.ink_agreement(255 - ink, ink)
    assert share == 1  # a row of the faintest ink may not count
    assert abs(lack) <= 1
    assert renderers.ink_agreement(255 - ink[:-9], ink)[1] >= 8  # cut below
    assert renderers.ink_agreement(255 - render(texts[0] + texts[2], font, 48).ink, ink)[0] < 0.8  # another line
    for empty in (np.full((30, 100), 255, np.uint8), np.zeros((9, 9), np.uint8)):
        assert 0 <= renderers.ink_agreement(empty, ink)[0] < 0.8


def pillow_ink(weight):
    "Share of dark pixels in a line of this weight"
    face = next(f for f in find_fonts() if f.name == f'Noto Sans Khmer Variable {weight}')
    line = pillow_baseline.pillow_line(texts[0], pillow_baseline.pillow_face(face, 48))
    return (np.asarray(line) < 128).mean()


@raqm
def test_the_pillow_baseline_repeats_and_takes_variable_fonts(tmp_path):
    for k in 'ab':
        (tmp_path / k).mkdir()
        pillow_baseline.draw_pillow(texts, font, 24, 'written', tmp_path / k)
    assert renderers._digest(tmp_path / 'a') == renderers._digest(tmp_path / 'b')
    for t in texts:
        drawn = np.asarray(pillow_baseline.pillow_line(t, pillow_baseline.pillow_face(font, 48)))
        share, _ = renderers.ink_agreement(drawn, render(t, font, 48).ink)
        assert share > 0.9
    assert pillow_ink('Black') > 1.3 * pillow_ink('Light')


@raqm
def test_the_pillow_baseline_takes_lines_of_all_sizes():
    from PIL import Image

    for h, w in ((1, 1), (3, 200), (14, 9), (300, 60)):
        im = Image.new('L', (w, h), 255)
        im.putpixel((0, h // 2), 0)
        for op, _ in pillow_baseline.pillow_operations(im):
            for seed in range(3):
                out = op(im, np.random.default_rng(seed))
                assert out.mode == 'L'
                assert min(out.size) > 0


@pytest.mark.parametrize('peer', renderers.OTHER_RENDERERS, ids=lambda p: p.name)
def test_installed_peers_draw(peer):
    if not renderers._program(peer):
        pytest.skip('not installed')
    seen = renderers.inspect_drawing(renderers.all_renderers()[peer.name], texts, font)
    assert seen['lines'] == 3
    assert seen['missing'] == 0
    assert seen['right'] == (3 if peer.name != 'trdg' else 0)


# readers


@pytest.fixture
def lines(tmp_path):
    "Three rendered lines as files"
    paths = [tmp_path / f'{i}.png' for i in range(3)]
    for p, t in zip(paths, texts):
        Image.fromarray(255 - np.pad(render(t, font, 32).ink, 8)).save(p)
    return paths


WRITES = (
    'printf \'{"text": "a"}\\n{"text": "b"}\\n{"text": ""}\\n\' > "$5"; echo noise; '
    'echo \'{"seconds": 0.5, "version": "9.9"}\''
)


def test_only_installed_readers_are_listed(tmp_path, monkeypatch):
    def here(*folder):
        return [name for name in engines.available_engines(*folder) if not name.startswith('Tesseract ')]

    monkeypatch.delenv('KHMER_OCR_PEERS', raising=False)
    assert here() == []
    fake(tmp_path, monkeypatch, 'exit 0', 'netra-ocr')
    assert here() == ['netra-ocr'] == here(tmp_path)
    assert here(tmp_path / 'nowhere') == []
    monkeypatch.setenv('PATH', '')
    assert engines.available_engines() == ['netra-ocr']


def test_a_reader_gets_the_paths_and_its_texts_count(tmp_path, monkeypatch, lines):
    fake(tmp_path, monkeypatch, f'cp "$4" "{tmp_path}/asked.json"; {WRITES}', 'kiri-ocr')
    run = engines.run_engine('kiri-ocr', lines)
    assert run.engine == 'kiri-ocr 9.9'
    assert run.texts == ['a', 'b', '']
    assert run.cpu_seconds == 0.5
    assert run.lines_per_cpu_second == 6
    assert json.loads((tmp_path / 'asked.json').read_text()) == [str(p) for p in lines]


@pytest.mark.parametrize(
    'script, says',
    [
        ('echo "some" >&2; echo "ImportError: no glue" >&2; exit 1', 'kiri-ocr failed: ImportError: no glue'),
        ('exit 3', 'kiri-ocr failed: exit 3'),
        ('echo "{}"', 'kiri-ocr failed'),
        ('echo \'{"seconds": 1, "version": "1"}\'', 'it read 0 of 3 lines'),
        (WRITES.replace('{"text": "b"}', ''), 'it read 0 of 3'),
        (WRITES.replace('{"text": "b"}\\n', ''), 'it read 2 of 3'),
    ],
)
def test_a_failing_reader_is_one_line(tmp_path, monkeypatch, lines, script, says):
    fake(tmp_path, monkeypatch, script, 'kiri-ocr')
    with pytest.raises(KhmerOCRError, match=says) as e:
        engines.run_engine('kiri-ocr', lines)
    assert '\n' not in str(e.value)


def test_unknown_and_missing_readers(tmp_path, monkeypatch, lines):
    monkeypatch.delenv('KHMER_OCR_PEERS', raising=False)
    with pytest.raises(KhmerOCRError, match="Unknown engine 'netra'.* did you mean netra-ocr"):
        engines.run_engine('netra', lines)
    with pytest.raises(KhmerOCRError, match='KHMER_OCR_PEERS'):
        engines.run_engine('netra-ocr', lines)
    with pytest.raises(KhmerOCRError, match='did you mean kiri'):
        engines.install_engines(tmp_path / 'homes', ['kiri-orc'])
    assert not (tmp_path / 'homes').exists()
    with pytest.raises(KhmerOCRError, match='tesseract'):
        engines.run_engine('Tesseract no_such_model', lines)


# without torch, which takes long to import and has nothing to do here
BEGIN = engines._BEGIN.replace('import torch\ntorch.set_num_threads(1)\n', '')


def drive(tmp_path, read, paths, first=''):
    "Answer and texts of a driver that reads by the expression `read`, run by our own Python"
    asked = tmp_path / 'paths.json'
    answers = tmp_path / 'texts.jsonl'
    asked.write_text(json.dumps(paths))
    driver = BEGIN + f"{first}\nfinish('torch', lambda some: {read})"
    answer = engines.ask_engine('toy', sys.executable, driver, [str(asked), str(answers)])
    return answer, [json.loads(line)['text'] for line in answers.read_text().splitlines()]


def test_a_driver_reads_what_can_be_read(tmp_path):
    answer, got = drive(tmp_path, '[p.upper() if p != "bad" else 1/0 for p in some]', ['a', 'bad', 'c'])
    assert BEGIN != engines._BEGIN
    assert got == ['A', '', 'C']
    assert isinstance(answer['seconds'], float)
    assert answer['version'].startswith('2.')
    with pytest.raises(KhmerOCRError, match='toy failed: ZeroDivisionError') as e:
        drive(tmp_path, '1/0', ['a', 'b'])
    assert '\n' not in str(e.value)
    with pytest.raises(KhmerOCRError, match='toy failed: ValueError'):
        drive(tmp_path, '["too", "many", "texts"]', ['a', 'b'])


def test_a_driver_times_the_reading_alone(tmp_path):
    "Only the reading counts: not what came before, nor the line that is read to warm up"
    answer, _ = drive(
        tmp_path,
        '[now.append(now[-1]+1) or p for p in some]',
        ['a', 'b', 'c', 'd'],
        'now = [7]; time.process_time = lambda: now[-1]',
    )
    assert answer['seconds'] == 4


@pytest.mark.parametrize('name', engines.READ_RECIPES)
def test_installed_readers_read(name, lines):
    if not engines.engine_python(name):
        pytest.skip('not installed')
    run = engines.run_engine(name, lines)
    assert len(run.texts) == 3
    assert run.cpu_seconds > 0
    assert engines.compare_engines([run], texts)[0]['CER folded, no spaces %'] < 60
