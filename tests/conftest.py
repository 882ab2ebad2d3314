"What several test files share: a tiny corpus, set and model; drawing a line; running the command."

import signal
from pathlib import Path

import numpy as np
import pytest

TINY_NETWORK = dict(channels=(8, 8, 8, 8, 16), hidden=8, layers=1)  # for a CTCConfig
TINY_LOOP = dict(batch_size=2, log_every=1, precision='32-true', tensorboard=False)  # for a TrainConfig

# a shell that starts a job in the background lets it ignore Ctrl-C, which some tests send
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_tiny(folder, model=True):
    "text.txt, corpus/, set/ and, if asked for, model/ (a recogniser after two steps) in `folder`"
    from khmer_ocr.synth.generator import Recipe
    from khmer_ocr.synth.store import generate_set
    from khmer_ocr.text.rules import rule_line

    rng = np.random.default_rng(0)
    lines = [rule_line(rng) for _ in range(60)]
    (folder / 'text.txt').write_text('\n'.join(lines), encoding='utf-8')
    write_corpus(folder / 'corpus', lines[:20], lines[20:40], lines[40:])
    generate_set(Recipe(corpus=str(folder / 'corpus')), folder / 'set', max_lines=4, progress=False)
    if model:
        train_tiny(folder / 'model', folder / 'corpus', folder / 'set/val')
    return folder


def write_corpus(folder, train, val, test):
    "A corpus folder of these lines"
    folder.mkdir()
    for split, lines in dict(train=train, val=val, test=test).items():
        (folder / f'{split}.txt').write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')


def train_tiny(out, corpus, validation):
    "Two steps of a recogniser that is too small to learn anything"
    from khmer_ocr.models.ctc import CTCConfig
    from khmer_ocr.models.zoo import train_recogniser
    from khmer_ocr.synth.generator import Recipe
    from khmer_ocr.training.settings import TrainConfig

    recipe = Recipe(corpus=str(corpus), random_text=True)
    config = TrainConfig(steps=2, eval_every=2, save_every=2, **TINY_LOOP)
    network = CTCConfig(**TINY_NETWORK)
    train_recogniser('ctc', out, recipe, config, network, validation=validation, pool=1, verbose=False)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A folder with text.txt, corpus/, set/ and model/, one for each test file"
    return make_tiny(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='module')
def tiny_data(tmp_path_factory):
    "The same without a model"
    return make_tiny(tmp_path_factory.mktemp('tiny'), model=False)


def draw_line(text, size=32, margin=8, font=None):
    "uint8 (H, W), dark ink on white; without `font` the first of the training fonts"
    from khmer_ocr.synth.fonts import find_fonts
    from khmer_ocr.synth.rendering import render

    font = font or find_fonts(split='train')[0]
    return 255 - np.pad(render(text, font, size).ink, margin)


def run_command(*args):
    "The result of `khmer-ocr args`, in this process"
    from typer.testing import CliRunner
    from khmer_ocr.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in args])


def command_succeeds(*args):
    "What the command prints; it must succeed"
    result = run_command(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def command_refuses(*args):
    "The one line with which the command refuses"
    result = run_command(*args)
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('khmer-ocr: '), result.stderr
    return result.stderr


def folder_content(folder):
    "Relative path -> bytes of every file below `folder`"
    files = [p for p in sorted(Path(folder).rglob('*')) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
