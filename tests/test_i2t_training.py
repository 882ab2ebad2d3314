"""The words of founding document 003 at the command: its dataset, its settings file, its options;
two steps, resumed; one clear line for everything that is wrong."""

import json
import shutil
import pytest
from typer.testing import CliRunner
from conftest import make_tiny
from khmer_ocr.cli.app import app
from khmer_ocr.cli.common import resolve_aliases
from khmer_ocr.data.i2t import export_i2t
from khmer_ocr.models.i2t_training import (
    EXAMPLE_CONFIG,
    I2TConfig,
    loop_settings,
    memory_line,
    image_to_text_config,
    read_i2t_config,
    warmup_share,
)
from khmer_ocr.models import training_request
from khmer_ocr.training.checkpoints import load_checkpoint
from khmer_ocr.training.learner import Learner
from khmer_ocr.training.callbacks import read_history
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.models.transformer_training import image_to_text_variant

config = '''{
  "mixed_precision": false,          // 32 bits
  "gradient_accumulation_steps": 2,
  "micro_batch_size": 2, "warmup_steps": 1, "early_stopping_patience": 7,
  "size": "tiny", "d_model": 16, "label_smoothing": 0.1, "dropout": 0.0, "max_grad_norm": 1.0
}'''


@pytest.fixture(scope='module')
def i2t(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp('tiny'), model=False)
    export_i2t(Recipe(corpus=str(folder / 'corpus')), folder / 'i2t_dataset', max_lines=4, progress=False)
    (folder / 'config').mkdir()
    (folder / 'config/config.json').write_text(config, encoding='utf-8')
    return folder


@pytest.fixture
def own(i2t, tmp_path):
    "A copy that may be spoilt"
    shutil.copytree(i2t / 'i2t_dataset', tmp_path / 'i2t_dataset')
    return tmp_path / 'i2t_dataset'


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def train(folder, model, *more, steps=2, config='config/config.json'):
    return call(
        'train',
        '--model',
        'vision-text',
        '--data_folder',
        folder / 'i2t_dataset',
        '--model_folder',
        model,
        '--config',
        folder / config,
        '--corpus',
        folder / 'corpus',
        '--steps',
        steps,
        '--threads',
        1,
        *more,
    )


def refused(r, *words):
    "Exit 1, one line on stderr, nothing on stdout"
    lines = [l for l in r.stderr.splitlines() if not l.startswith('warning:')]
    assert (
        r.exit_code == 1
        and len(lines) == 1
        and r.stdout == ''
        and lines[0].startswith('khmer-ocr: ')
        and 'Traceback' not in r.stderr
    ), (r.exit_code, r.stdout, r.stderr)
    for w in words:
        assert w in lines[0], lines[0]


# training
@pytest.fixture(scope='module')
def trained(i2t):
    "Four steps in one go"
    r = train(i2t, i2t / 'models/whole', steps=4)
    assert r.exit_code == 0, r.stderr
    return i2t / 'models/whole', r


def test_training_says_what_the_document_says(trained):
    "The summary of each evaluation has the document's lines, and the checkpoint the file's settings"
    folder, r = trained
    assert 'Epoch 4 Results:\n   Train Loss: ' in r.stdout
    assert '4 steps done' in r.stdout
    for word in (
        'Val Accuracy: ',
        'Val CER: ',
        'Val WER: ',
        'Val BLEU: ',
        'Process Memory: ' if 'GPU Memory' not in r.stdout else 'GPU Memory: ',
        'Waiting for data: ',
    ):
        assert f'   {word}' in r.stdout
    assert f"New best CER: {read_history(folder / 'history.csv')[-1]['cer']:.3f}" in r.stdout
    head = load_checkpoint(folder / 'best.safetensors')[1]
    assert head['model'] == 'vision_text'
    assert head['config']['encoder_width'] == 16
    assert head['settings']['accumulate'] == 2
    assert head['settings']['precision'] == '32-true'
    assert head['settings']['warmup'] == 0.25


def test_resume_latest_gives_the_same_history(i2t, trained, tmp_path):
    "Killed at the third of four steps: the save of the second is where it goes on"
    whole, _ = trained
    out = tmp_path / 'cut'
    with pytest.MonkeyPatch.context() as m:
        run_length = training_request.run_length
        m.setattr(training_request, 'run_length', lambda *a: run_length(*a) | dict(save_every=2))
        step = Learner.one_step

        def dies(self):
            if self.step == 2:
                raise MemoryError
            return step(self)

        m.setattr(Learner, 'one_step', dies)
        r = train(i2t, out, steps=4)
        assert r.exit_code == 1 and load_checkpoint(out / 'latest.safetensors')[1]['step'] == 2, r.stderr
    refused(train(i2t, out, steps=4), '--resume latest')
    r = train(i2t, out, '--resume_from_checkpoint', 'latest', steps=4)
    assert r.exit_code == 0, r.stderr
    assert (out / 'history.csv').read_bytes() == (whole / 'history.csv').read_bytes()
    assert (
        load_checkpoint(out / 'latest.safetensors')[1]['metrics']
        == load_checkpoint(whole / 'latest.safetensors')[1]['metrics']
    )


def test_workers_and_checkpointing_change_nothing(i2t, trained, tmp_path):
    "Processes that load the images, and activations that are computed again: the losses stay"
    (tmp_path / 'c.json').write_text(
        config.replace('"size"', '"gradient_checkpointing": true, "num_workers": 1, "size"'), encoding='utf-8'
    )
    r = train(i2t, tmp_path / 'out', '--config', tmp_path / 'c.json', steps=4)
    assert r.exit_code == 0, r.stderr
    assert load_checkpoint(tmp_path / 'out/best.safetensors')[1]['config']['checkpointing']
    for a, b in zip(read_history(tmp_path / 'out/history.csv'), read_history(trained[0] / 'history.csv')):
        assert a['loss'] == pytest.approx(b['loss'], abs=1e-4)
    speed = (tmp_path / 'out/speed.csv').read_text().splitlines()
    assert 'memory_mb' in speed[0]
    assert 'waiting' in speed[0]
    assert len(speed) > 1


def test_the_folder_reads(i2t, trained):
    "The folder of a run reads by its name, in the words of the document too"
    folder, _ = trained
    image = i2t / 'i2t_dataset/val/images/val_000000.png'
    a = call('read', '--line', '--model_folder', folder, '--input_image', image)
    b = call('read', '--line', '--model', folder / 'best.safetensors', image)
    assert a.exit_code == b.exit_code == 0 and a.stdout == b.stdout and a.stdout.count('\n') == 1, a.stderr


def test_options_win_over_the_file(i2t, tmp_path):
    "What the command line says counts more than the settings file"
    r = train(
        i2t,
        tmp_path / 'out',
        '--batch-size',
        4,
        '--precision',
        'bf16-mixed',
        '--lr',
        0.01,
        '--validation-dir',
        'none',
        steps=2,
    )
    assert r.exit_code == 0, r.stderr
    s = load_checkpoint(tmp_path / 'out/latest.safetensors')[1]['settings']
    assert (s['batch_size'], s['precision'], s['lr'], s['accumulate'], s['steps']) == (4, 'bf16-mixed', 0.01, 2, 2)


# what is wrong
def test_missing_lists(i2t, own, tmp_path):
    "A folder without its list of lines gets one line that names the file"
    (own / 'val/val.json').unlink()
    refused(train(i2t, tmp_path / 'out', '--data_folder', own), 'val.json')
    (own / 'train/train.json').unlink()
    refused(train(i2t, tmp_path / 'out', '--data_folder', own), 'train.json')
    refused(train(i2t, tmp_path / 'out', '--data_folder', own.parent / 'nothing'), 'nothing')
    assert not (tmp_path / 'out').exists()


def test_unknown_characters(i2t, own, tmp_path):
    "Characters outside the charset are named with their image; if asked for, their lines are left out"
    p = own / 'train/train.json'
    rows = json.loads(p.read_text(encoding='utf-8'))
    rows[2]['text'] += '漢字'
    p.write_text(json.dumps(rows), encoding='utf-8')
    refused(
        train(i2t, tmp_path / 'out', '--data_folder', own),
        '漢 (U+6F22)',
        '字 (U+5B57)',
        rows[2]['image'],
        '--skip-unknown',
    )
    assert not (tmp_path / 'out').exists()
    r = train(i2t, tmp_path / 'out', '--data_folder', own, '--skip-unknown', '--validation-dir', 'none')
    assert r.exit_code == 0
    assert '1 lines are left out' in r.stderr


def test_missing_and_broken_images(i2t, own, tmp_path):
    "An image that is missing or empty is named"
    first, second = sorted((own / 'train/images').iterdir())[:2]
    first.unlink()
    refused(train(i2t, tmp_path / 'out', '--data_folder', own), '1 of 4 images are missing', first.name)
    second.rename(first)
    second.write_bytes(b'')
    refused(train(i2t, tmp_path / 'out', '--data_folder', own), second.name, 'empty')


@pytest.mark.parametrize(
    'text, words',
    [
        ('{"d_model": 16,}', ('not valid JSON',)),
        ('{"d_modle": 16}', ('did you mean d_model?',)),
        ('{"warmup_step": 8}', ('did you mean warmup_steps?',)),
        ('{"d_model": "wide"}', ('must be int',)),
        ('{"d_model": 17}', ('multiple of 16',)),
        ('{"dropout": 1.5}', ('dropout', 'below 1')),
        ('{"mixed_precision": 1}', ('must be bool',)),
        ('{"warmup_steps": 8000}', ('warmup_steps', '2 steps')),
        ('[1]', ('named values',)),
        ('{"gradient_accumulation_steps": 0}', ('at least 1',)),
        ('{"size": "huge"}', ('tiny, small, base',)),
        ('{"image_size": 50}', ('multiple of 16',)),
        ('{"epochs": 3}', ('num_epochs',)),
    ],
)
def test_bad_settings_files(i2t, tmp_path, text, words):
    "Unknown names, wrong types and impossible values of a file are named in one line"
    (tmp_path / 'config.json').write_text(text, encoding='utf-8')
    refused(train(i2t, tmp_path / 'out', '--config', tmp_path / 'config.json'), *words)
    assert not (tmp_path / 'out').exists()


def test_settings_files_with_the_wrong_company(i2t, tmp_path):
    "The document's file with another kind of model, or with a variant, is refused"
    go = (
        'train',
        '--config',
        i2t / 'config/config.json',
        '--corpus',
        i2t / 'corpus',
        '--out',
        tmp_path / 'out',
        '--steps',
        2,
    )
    refused(call(*go), '--model vision-text')
    refused(call(*go, '--model', 'vision-text', '--settings', 'tiny'), '--variant tiny')
    refused(
        call(
            'train',
            '--model',
            'vision-text',
            '--variant',
            'tny',
            '--out',
            tmp_path / 'out',
            '--steps',
            2,
            '--corpus',
            i2t / 'corpus',
        ),
        'did you mean tiny?',
    )
    (tmp_path / 't.toml').write_text('[model]\nencodr_width = 16')
    refused(
        call(*go[:1], '--model', 'vision-text', '--config', tmp_path / 't.toml', *go[3:]), 'did you mean encoder_width?'
    )
    refused(train(i2t, tmp_path / 'none', '--resume_from_checkpoint', 'latest'), 'No training run')


# the command that writes the layout
def test_generate_i2t(i2t, tmp_path):
    "The command writes the layout, counts its lines, and finds a file that was changed"
    go = ('generate', '--format', 'i2t', '--out', tmp_path / 'd')
    r = call(*go, '--corpus', i2t / 'corpus', '--max-lines', 3)
    assert r.exit_code == 0 and 'train: 3 lines' in r.stdout, r.stderr
    assert json.loads(call(*go, '--stats', '--json').stdout)['val']['lines'] == 3
    assert 'as recorded' in call(*go, '--verify').stdout
    again = call('generate', '--format', 'i2t', '--out', tmp_path / 'e', '--from', i2t / 'set', '--json')
    assert json.loads(again.stdout)['images_made'] == 8, again.stderr
    refused(call('generate', '--from', i2t / 'set', '--out', tmp_path / 'f'), '--format i2t')
    refused(
        call('generate', '--format', 'i2t', '--from', tmp_path / 'no', '--out', tmp_path / 'g'), 'no labelled lines'
    )
    (tmp_path / 'd/val/images/val_000001.png').unlink()
    r = call(*go, '--verify')
    assert r.exit_code == 1
    assert 'val_000001.png' in r.stderr


# pieces
def test_words_of_the_document():
    "The option words of the document become those of the command, and other words stay"
    assert resolve_aliases(
        ['train', '--data_folder', 'a', '--model_folder=b', '--steps', '3', '--resume_from_checkpoint=latest']
    ) == ['train', '--data', 'a', '--out=b', '--steps', '3', '--resume=latest']
    assert resolve_aliases(['read', '--model_folder', 'm', '--input_image', 'x.png']) == [
        'read',
        '--model',
        'm',
        'x.png',
    ]
    assert resolve_aliases(['read', '--input_image=x.png']) == ['read', 'x.png']
    assert resolve_aliases(['fonts', '--data_folder']) == ['fonts', '--data_folder']
    assert resolve_aliases([]) == []


def test_the_example_is_the_default(tmp_path):
    "The printed example has the default of every setting that it names"
    (tmp_path / 'c.json').write_text(EXAMPLE_CONFIG, encoding='utf-8')
    assert read_i2t_config(tmp_path / 'c.json') == I2TConfig()
    assert image_to_text_config(I2TConfig()) == image_to_text_variant('small').config


def test_the_documents_own_values():
    "The settings exactly as the document prints them"
    c = read_i2t_config(
        dict(
            mixed_precision=True,
            gradient_accumulation_steps=4,
            max_grad_norm=1.0,
            image_size=384,
            early_stopping_patience=7,
            warmup_steps=8000,
            label_smoothing=0.1,
            dropout=0.1,
        )
    )
    loop = TrainConfig(**loop_settings(c, 100_000))
    net = image_to_text_config(c)
    assert (loop.accumulate, loop.clip, loop.patience, loop.label_smoothing, loop.warmup, loop.schedule) == (
        4,
        1.0,
        7,
        0.1,
        0.08,
        'cosine',
    )
    assert (net.height, net.stem, net.dropout, net.rows) == (384, 'patches', 0.1, 24)
    wider = read_i2t_config(dict(d_model=768))
    assert loop_settings(wider)['lr'] < loop.lr  # "larger d_model = smaller LR"
    with pytest.raises(KhmerOCRError, match='set it to 100'):
        warmup_share(c, 1000)
    assert 'Memory: ' in memory_line()
