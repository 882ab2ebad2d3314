"The command: each happy path on a tiny set, and every kind of bad input: one clear line, exit 1, nothing half-written."

import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from typer.testing import CliRunner
from conftest import make_tiny
from khmer_ocr.cli.app import app

command = [sys.executable, '-c', 'from khmer_ocr.cli.app import app; app()']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp('tiny'))


@pytest.fixture
def model(tiny):
    return str(tiny / 'model/best.safetensors')


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def ok(*args):
    r = call(*args)
    assert r.exit_code == 0, r.stderr
    return r.stdout


def refused(*args, code=1, word=''):
    "One line on stderr (warnings about fonts aside) and nothing on stdout"
    r = call(*args)
    lines = [l for l in r.stderr.splitlines() if not l.startswith('warning:')]
    assert r.exit_code == code and r.stdout == '' and word in r.stderr, (r.exit_code, r.stdout, r.stderr)
    assert len(lines) == 1 if code == 1 else 1 <= len(lines) <= 3, lines
    assert 'Traceback' not in r.stderr and '─' not in r.stderr
    return lines[0]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


# the command line itself
def test_help_and_version_are_fast():
    t = time.perf_counter()
    out = subprocess.run([*command, '--help'], capture_output=True, text=True)
    t = time.perf_counter() - t
    assert out.returncode == 0 and 'Commands:' in out.stdout and t < 5
    modules = subprocess.run(
        [sys.executable, '-c', 'import khmer_ocr.cli.app, sys; print(*sys.modules)'], capture_output=True, text=True
    ).stdout.split()
    assert not {'torch', 'cv2', 'matplotlib', 'numpy', 'PIL'} & set(modules)
    assert ok('--version').startswith('khmer-ocr ') and 'Usage:' in ok()


@pytest.mark.parametrize(
    'name', ['read', 'fonts', 'corpus', 'generate', 'validation-set', 'train', 'evaluate', 'gan', 'run', 'check']
)
def test_every_command_has_help(name):
    assert ok(name, '--help').startswith(f'Usage: khmer-ocr {name}')


@pytest.mark.parametrize(
    'args',
    [
        ('raed',),
        ('read',),
        ('read', 'x.png', '--fromat', 'text'),
        ('evaluate',),
        ('fonts', 'list', 'more'),
        ('gan',),
        ('gan', 'trian'),
        ('gan', 'train'),
    ],
)
def test_wrong_usage_is_2_in_three_lines(args):
    refused(*args, code=2)


@pytest.mark.parametrize(
    'args, word',
    [
        (('read', 'x.png', '--format', 'txet'), 'did you mean text?'),
        (('read', 'x.png', '--decoder', 'best'), 'ctc'),
        (('generate', '--max-lines', 'ten'), '--max-lines'),
        (('generate', '--max-lines', '0'), 'from 1 up'),
        (('corpus', '--licence', 'opn'), 'did you mean open?'),
        (('train', '--model', 'rnn'), 'ctc'),
        (('train', '--batch-size', 'big'), 'or auto'),
        (('fonts', 'instal'), 'did you mean install?'),
        (('check', 'dat'), 'did you mean data?'),
        (('generate', '--preset', 'ducument'), 'did you mean document?'),
    ],
)
def test_unknown_option_values(args, word):
    refused(*args, word=word)


def test_debug_shows_the_traceback():
    r = call('--debug', 'fonts', 'instal')
    assert r.exit_code == 1 and 'Traceback' in r.stderr and r.stderr.splitlines()[-1].startswith('khmer-ocr: ')
    assert 'Traceback' in call('fonts', 'instal', '--debug').stderr


# read
@pytest.fixture
def images(tmp_path):
    "Two good lines, and every kind of bad one"
    rng = np.random.default_rng(0)
    for n in ('a', 'b'):
        Image.fromarray(np.where(rng.random((40, 200)) < 0.2, 0, 255).astype(np.uint8)).save(tmp_path / f'{n}.png')
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / 'dot.png')
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:300])
    return tmp_path


def test_read_line_is_one_line_per_image_in_order(images, model):
    paths = [images / f'{n}.png' for n in ('b', 'text', 'dot', 'empty', 'a', 'nothing', 'cut', 'b')]
    r = call('read', '--line', '--model', model, *paths)
    lines = r.stdout.split('\n')
    assert (
        r.exit_code == 1
        and len(lines) == len(paths) + 1
        and lines[0] == lines[7]
        and lines[1] == lines[2] == lines[3] == lines[5] == ''
    )
    said = r.stderr.splitlines()
    assert len(said) == 5 and [Path(l.split()[1].rstrip(':')).name for l in said] == [
        'text.png',
        'dot.png',
        'empty.png',
        'nothing.png',
        'cut.png',
    ]


def test_read_line_json(images, model):
    r = call('read', '--line', '--format', 'json', '--model', model, images / 'a.png', images / 'text.png')
    rows = [json.loads(l) for l in r.stdout.splitlines()]
    assert (
        [Path(o['path']).name for o in rows] == ['a.png', 'text.png']
        and 'error' in rows[1]
        and 0 <= rows[0]['confidence'] <= 1
    )


@pytest.mark.parametrize(
    'bad, word',
    [
        ('text', 'cannot be read as an image'),
        ('empty', 'empty'),
        ('nothing', 'no such file'),
        ('cut', 'cannot be read'),
    ],
)
def test_bad_pages(images, model, bad, word):
    refused('read', '--model', model, images / f'{bad}.png', word=word)


def test_read_a_folder_and_write_files(images, model, tmp_path):
    for n in ('text', 'empty', 'cut', 'dot'):
        (images / f'{n}.png').unlink()
    out = images / 'out'
    assert ok('read', '--model', model, images, '--out', out) == ''
    assert files(out) == ['a.txt', 'b.txt']
    page = json.loads(ok('read', '--model', model, images / 'a.png', '--format', 'json'))
    assert page['pages'][0]['page'].endswith('a.png')


def test_read_without_images_or_model(images, tmp_path, model):
    (images / 'none').mkdir()
    refused('read', images / 'none', word='has no images')
    refused('read', images / 'a.png', '--model', 'fats', word='Unknown model')
    refused('read', images / 'a.png', '--model', images / 'nothing.safetensors', word='not found')
    refused('read', images / 'a.png', '--model', images / 'a.png', word='a.png')
    refused('read', images / 'a.png', '--model', model, '--out', images / 'b.png', word='is a file')


def test_bad_checkpoints(images, model, tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / 'cut.safetensors').write_bytes(Path(model).read_bytes()[:2000])
    save_file({'x': torch.zeros(3)}, tmp_path / 'foreign.safetensors')
    (tmp_path / 'void.safetensors').touch()
    for n, word in (('cut', 'truncated'), ('foreign', 'not a checkpoint'), ('void', 'truncated')):
        refused('read', '--line', images / 'a.png', '--model', tmp_path / f'{n}.safetensors', word=word)


def test_a_pipe_that_closes_is_silent(images, model):
    many = [str(images / 'a.png')] * 600
    p = subprocess.Popen(
        [*command, 'read', '--line', '--model', model, *many], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    p.stdout.close()
    assert p.stderr.read() == b'' and p.wait() != 0


# sets
def test_generate_stats_verify(tiny, tmp_path):
    out = tmp_path / 'set'
    said = ok('generate', '--corpus', tiny / 'corpus', '--out', out, '--max-lines', 3, '--seed', 7)
    assert (
        'Total images: 9' in said
        and said.startswith('=== Synthetic Image Statistics ===')
        and said == ok('generate', '--out', out, '--stats')
    )
    assert json.loads(ok('generate', '--out', out, '--stats', '--json'))['total_images'] == 9
    assert 'as recorded' in ok('generate', '--out', out, '--verify')
    (out / 'val/labels/val_000001.txt').write_text('x')
    r = call('generate', '--out', out, '--verify')
    assert r.exit_code == 1 and 'val_000001.txt has changed' in r.stderr
    refused('generate', '--corpus', tiny / 'corpus', '--out', out, '--max-lines', 3, '--seed', 8, word='another recipe')


def test_generate_without_corpus_or_fonts(tiny, tmp_path, monkeypatch):
    refused('generate', '--corpus', tmp_path / 'none', '--out', tmp_path / 'set', word='run `khmer-ocr corpus`')
    refused('generate', '--out', tmp_path / 'set', '--stats', word='No generated set')
    refused('generate', '--out', tmp_path / 'set', '--verify', word='No generated set')
    (tmp_path / 'fonts').mkdir()
    (tmp_path / 'fonts/manifest.json').write_text('[]')
    monkeypatch.setenv('KHMER_OCR_FONTS', str(tmp_path / 'fonts'))
    refused('generate', '--corpus', tiny / 'corpus', '--out', tmp_path / 'set', word='khmer-ocr fonts install')
    assert not (tmp_path / 'set').exists()


def test_settings_files(tiny, tmp_path):
    (tmp_path / 'r.toml').write_text('sead = 3')
    (tmp_path / 'bad.toml').write_text('= =')
    (tmp_path / 'r.json').write_text('{"seed": 3, // why not\n "size": [20, 20]}')
    go = ('generate', '--corpus', tiny / 'corpus', '--out', tmp_path / 'set', '--max-lines', 1, '--config')
    refused(*go, tmp_path / 'r.toml', word='did you mean seed')
    refused(*go, tmp_path / 'bad.toml', word='not valid TOML')
    refused(*go, tmp_path / 'none.toml', word='none.toml')
    assert not (tmp_path / 'set').exists()
    ok(*go, tmp_path / 'r.json')
    assert json.loads((tmp_path / 'set/generation_metadata.json').read_text())['recipe']['size'] == [20, 20]


def test_validation_set(tiny, tmp_path):
    out, go = tmp_path / 'fixed', ('validation-set', '--corpus', tiny / 'corpus')
    refused('validation-set', '--validate-only', '--output-dir', out, word='Fixed validation set not found')
    refused(*go, '--num-samples', 9999, '--output-dir', out, word='20 lines')
    assert not out.exists()
    assert '5 images' in ok(*go, '--num-samples', 5, '--output-dir', out) and 'as recorded' in ok(
        'validation-set', '--validate-only', '--output-dir', out
    )


def test_corpus(tiny, tmp_path):
    assert 'total' in ok('corpus', '--source', tiny / 'text.txt', '--out', tmp_path / 'c', '--limit', 30)
    assert files(tmp_path / 'c') == ['corpus.json', 'test.txt', 'train.txt', 'val.txt']
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'folder').mkdir()
    for bad in ('empty.txt', 'folder'):
        refused('corpus', '--source', tmp_path / bad, '--out', tmp_path / 'd', word=bad)
    refused('corpus', '--source', 'rdlab-sentence', '--out', tmp_path / 'd', word='did you mean rdlab-sentences')
    assert not (tmp_path / 'd').exists()


def test_fonts():
    assert 'Noto Sans Khmer' in ok('fonts') and json.loads(ok('fonts', 'list', '--json'))[0]['family']


# training and judging
def settings(path, **train):
    model = '[model]\nchannels = [8, 8, 8, 8, 16]\nhidden = 8\nlayers = 1\n'
    path.write_text(
        '[train]\nprecision = "32-true"\ntensorboard = false\n'
        + ''.join(f'{k} = {v}\n' for k, v in train.items())
        + model
    )
    return path


def test_train_and_resume(tiny, tmp_path):
    out = tmp_path / 'run'
    go = (
        'train',
        '--config',
        settings(tmp_path / 's.toml'),
        '--corpus',
        tiny / 'corpus',
        '--validation-dir',
        tiny / 'set/val',
        '--out',
        out,
        '--batch-size',
        2,
    )
    assert '2 steps done' in ok(*go, '--steps', 2)
    assert {'best.safetensors', 'latest.safetensors', 'history.csv'} <= set(files(out))
    refused(*go, '--steps', 2, word='--resume latest')
    assert '3 steps done' in ok(*go, '--steps', 3, '--resume', 'latest')
    refused(*go[:-4], '--out', tmp_path / 'other', '--resume', 'latest', word='No training run')


def test_train_on_a_set(tiny, tmp_path):
    out = ok(
        'train',
        '--config',
        settings(tmp_path / 's.toml'),
        '--data',
        tiny / 'set/train',
        '--max-samples',
        3,
        '--num-epochs',
        2,
        '--batch-size',
        2,
        '--validation-dir',
        'none',
        '--out',
        tmp_path / 'run',
    )
    assert '2 steps done' in out


def test_train_on_shards_and_whole_sets(tiny, tmp_path):
    ok('generate', '--corpus', tiny / 'corpus', '--out', tmp_path / 'shards', '--max-lines', 4, '--format', 'shards')
    for k, d in enumerate((tmp_path / 'shards', tiny / 'set')):
        out = ok(
            'train',
            '--config',
            settings(tmp_path / 's.toml'),
            '--data',
            d,
            '--num-epochs',
            1,
            '--batch-size',
            2,
            '--threads',
            1,
            '--validation-dir',
            tmp_path / 'shards/val',
            '--out',
            tmp_path / f'run{k}',
        )
        assert '2 steps done' in out
    a, b = ((tmp_path / f'run{k}/history.csv').read_text().splitlines()[0] for k in (0, 1))
    assert a == b


def test_a_failed_start_leaves_nothing(tmp_path):
    (tmp_path / 'labels.tsv').write_text('path\ttext\nx.png\tក\n', encoding='utf-8')
    refused(
        'train',
        '--data',
        tmp_path,
        '--max-samples',
        1,
        '--steps',
        2,
        '--batch-size',
        1,
        '--validation-dir',
        'none',
        '--out',
        tmp_path / 'run',
        word='x.png',
    )
    assert files(tmp_path) == ['labels.tsv']


def test_settings_are_read_without_torch(tmp_path):
    (tmp_path / 'r.toml').write_text('seed = 3')
    code = (
        'import sys; from khmer_ocr.cli.common import merge_settings; '
        f'assert merge_settings({str(tmp_path / "r.toml")!r}) == dict(seed=3); assert "torch" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_bad_training(tiny, tmp_path):
    go = ('train', '--corpus', tiny / 'corpus', '--steps', 1, '--out', tmp_path / 'run')
    refused(*go, '--validation-dir', 'none', '--config', settings(tmp_path / 's.toml', stepz=3), word='stepz')
    (tmp_path / 't.toml').write_text('[trian]\nsteps = 2')
    refused(*go, '--config', tmp_path / 't.toml', word='did you mean train')
    refused(*go, '--validation-dir', tmp_path / 'none', word='none')
    refused(
        *go[:1],
        '--corpus',
        tmp_path / 'none',
        '--steps',
        1,
        '--out',
        tmp_path / 'run',
        '--validation-dir',
        'none',
        word='run `khmer-ocr corpus`',
    )
    refused(*go, '--data', tmp_path / 'none', '--validation-dir', 'none', word='none')
    (tmp_path / 'x.safetensors').write_bytes(b'x' * 50)
    refused(*go, '--resume', tmp_path / 'x.safetensors', '--validation-dir', 'none', word='x.safetensors')


def own_lines(folder, texts=('កខ', 'គឃង', 'ភ្នំពេញ', '១២៣', 'ខ្មែរ', 'សាលារៀន')):
    "A labels.tsv as a user may have it"
    folder.mkdir()
    for i in range(len(texts)):
        Image.fromarray(
            np.where(np.random.default_rng(i).random((40, 90 + 20 * i)) < 0.2, 0, 255).astype(np.uint8)
        ).save(folder / f'{i}.png')
    (folder / 'labels.tsv').write_text(''.join(f'{i}.png\t{t}\n' for i, t in enumerate(texts)), encoding='utf-8')
    return folder


def tuning(tiny, model, tmp_path, *more):
    go = (
        'train',
        '--corpus',
        tiny / 'corpus',
        '--data',
        tmp_path / 'mine',
        '--mix',
        0.5,
        '--init',
        model,
        '--batch-size',
        2,
        '--steps',
        4,
        '--threads',
        1,
        '--validation-dir',
        tiny / 'set/val',
        '--validation-samples',
        2,
    )
    (tmp_path / 't.toml').write_text('[train]\nprecision = "32-true"\ntensorboard = false\nsave_every = 2\n')
    return (*go, '--config', tmp_path / 't.toml', *more)


def test_fine_tuning_on_own_lines(tiny, model, tmp_path):
    "Own and drawn lines, from trained weights, part of them frozen, at several sizes; resumed to the same bytes"
    from khmer_ocr.training.checkpoints import load_checkpoint

    own_lines(tmp_path / 'mine')
    go = tuning(
        tiny, model, tmp_path, '--freeze', 'backbone', '--scale', 0.2, '--keep-best', 1, '--logs', tmp_path / 'logs'
    )
    assert '4 steps done' in ok(*go, '--out', tmp_path / 'whole')
    a, b = load_checkpoint(model)[0], load_checkpoint(tmp_path / 'whole/best.safetensors')
    assert all(a[k].equal(v) for k, v in b[0].items() if k.startswith('backbone.')) and not a[
        'classifier.weight'
    ].equal(b[0]['classifier.weight'])
    assert b[1]['settings']['lr'] == 5e-4 and b[1]['config']['hidden'] == 8 and 'share of 0.5' in b[1]['recipe']['data']
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    shutil.copytree(tmp_path / 'logs/whole', tmp_path / 'logs/cut')
    ok(*go, '--out', tmp_path / 'cut', '--resume', 'latest')
    assert (tmp_path / 'logs/whole/history.csv').exists() and list((tmp_path / 'whole').glob('step-*'))


def test_tuning_stopped_and_resumed_is_tuning(tiny, model, tmp_path):
    own_lines(tmp_path / 'mine')
    go = [*tuning(tiny, model, tmp_path, '--patience', 1)]
    # `stop_at` above any score ends the first run at its first evaluation, at step 2
    (tmp_path / 't.toml').write_text((tmp_path / 't.toml').read_text() + 'eval_every = 2\n')
    ok(*go, '--out', tmp_path / 'whole', '--patience', 9)
    assert '2 steps done' in ok(*go, '--out', tmp_path / 'cut', '--stop-at', 99)
    ok(*go, '--out', tmp_path / 'cut', '--resume', 'latest', '--patience', 9)
    from khmer_ocr.training.checkpoints import load_checkpoint

    a, b = (load_checkpoint(tmp_path / k / 'latest.safetensors') for k in ('whole', 'cut'))
    assert (
        all(v.equal(b[0][k]) for k, v in a[0].items())
        and (tmp_path / 'whole/history.csv').read_bytes() == (tmp_path / 'cut/history.csv').read_bytes()
    )


def test_labels_that_the_reader_has_no_letters_for(tiny, model, tmp_path):
    own_lines(tmp_path / 'mine', ('កខ', 'ក漢', 'គឃ字ង'))
    go = tuning(tiny, model, tmp_path, '--out', tmp_path / 'run')
    line = refused(*go, word='2 of 3 labels')
    assert '漢 (U+6F22)' in line and '1.png' in line and not (tmp_path / 'run').exists()
    r = call(*go, '--skip-unknown')
    assert r.exit_code == 0 and r.stderr.splitlines()[0].startswith('2 lines are left out')


def test_a_curriculum_from_a_file_and_from_an_option(tiny, tmp_path):
    from khmer_ocr.training.checkpoints import load_checkpoint

    settings(tmp_path / 's.toml')
    text = (tmp_path / 's.toml').read_text()
    (tmp_path / 's.toml').write_text(
        text
        + '[[curriculum]]\nsteps = 2\npreset = "light"\nwording = {lengths = [1, 0, 0, 0]}\n'
        + '[[curriculum]]\nshare = 0.25\npreset = "clean"\n[[curriculum]]\n'
    )
    go = (
        'train',
        '--corpus',
        tiny / 'corpus',
        '--steps',
        8,
        '--batch-size',
        2,
        '--threads',
        1,
        '--validation-dir',
        'none',
        '--config',
    )
    ok(*go, tmp_path / 's.toml', '--out', tmp_path / 'a')
    assert (
        load_checkpoint(tmp_path / 'a/latest.safetensors')[1]['recipe']['data']
        == 'onthefly, by stages: light to line 4; clean to line 8; mixed'
    )
    (tmp_path / 'b.json').write_text(
        json.dumps(dict(train=dict(tensorboard=False), model=dict(channels=[8, 8, 8, 8, 16], hidden=8, layers=1)))
        + '// gently'
    )
    ok(*go, tmp_path / 'b.json', '--out', tmp_path / 'b', '--gentle-start', 3)
    assert 'light to line 6; mixed' in load_checkpoint(tmp_path / 'b/latest.safetensors')[1]['recipe']['data']
    (tmp_path / 's.toml').write_text(text + '[[curriculum]]\nsteps = 2\nprset = "light"\n[[curriculum]]\n')
    refused(*go, tmp_path / 's.toml', '--out', tmp_path / 'c', word='did you mean preset')
    (tmp_path / 's.toml').write_text(text + '[data]\nmixx = 0.5\n')
    refused(*go, tmp_path / 's.toml', '--out', tmp_path / 'c', word='did you mean mix')
    assert not (tmp_path / 'c').exists()


def test_train_the_attention_reader(tiny, model, tmp_path):
    "From nothing with the settings of the paper, and as a decoder upon a CTC reader that stays as it is"
    from khmer_ocr.training.checkpoints import load_checkpoint

    (tmp_path / 's.toml').write_text(
        '[train]\ntensorboard = false\nprecision = "32-true"\n[model]\nchannels = [4, 4, 4, 4, 4, 4, 4]\n'
        'narrow = 4\nframes = 4\nhidden = 8\nattention = 4\n'
    )
    go = (
        'train',
        '--model',
        'seq2seq',
        '--corpus',
        tiny / 'corpus',
        '--steps',
        2,
        '--batch-size',
        2,
        '--threads',
        1,
        '--validation-dir',
        'none',
    )
    ok(
        *go,
        '--settings',
        'buoy2022',
        '--config',
        tmp_path / 's.toml',
        '--out',
        tmp_path / 'a',
        '--mix',
        0.5,
        '--data',
        tiny / 'set',
        '--skip-unknown',
    )
    kept = load_checkpoint(tmp_path / 'a/latest.safetensors')[1]
    assert kept['model'] == 'seq2seq' and (
        kept['settings']['lr'],
        kept['settings']['optimizer'],
        kept['settings']['steps'],
    ) == (1e-6, 'adam', 2)
    ok(*go, '--init', model, '--out', tmp_path / 'b')
    a, (b, head) = load_checkpoint(model)[0], load_checkpoint(tmp_path / 'b/best.safetensors')
    assert head['settings']['freeze'] == ['encoder'] and any(
        k.startswith('encoder.') and v.equal(a[k.removeprefix('encoder.')])
        for k, v in b.items()
        if k.removeprefix('encoder.') in a
    )
    refused(*go, '--settings', 'bouy2022', '--out', tmp_path / 'c', word='did you mean buoy2022')
    refused('train', '--settings', 'joint', '--out', tmp_path / 'c', word='belongs to --model seq2seq')
    assert not (tmp_path / 'c').exists()


def test_automatic_batch_size_stays_with_the_run(tiny, tmp_path, monkeypatch):
    from khmer_ocr.models import training_request
    from khmer_ocr.training.checkpoints import load_checkpoint

    go = (
        'train',
        '--config',
        settings(tmp_path / 's.toml'),
        '--corpus',
        tiny / 'corpus',
        '--batch-size',
        'auto',
        '--threads',
        1,
        '--validation-dir',
        'none',
        '--out',
        tmp_path / 'run',
        '--steps',
    )
    monkeypatch.setattr(training_request, 'free_memory', lambda device='cpu': 12 * 2**20)
    ok(*go, 1)
    n = load_checkpoint(tmp_path / 'run/latest.safetensors')[1]['settings']['batch_size']
    assert 1 <= n < 64
    monkeypatch.setattr(training_request, 'free_memory', lambda device='cpu': 2**40)
    monkeypatch.setenv('WORLD_SIZE', '2')
    refused(*go, 2, '--resume', 'latest', word='for one process')
    monkeypatch.delenv('WORLD_SIZE')
    ok(*go, 2, '--resume', 'latest')
    assert load_checkpoint(tmp_path / 'run/latest.safetensors')[1]['settings']['batch_size'] == n


def test_bad_tuning(tiny, model, tmp_path):
    own_lines(tmp_path / 'mine')
    go = tuning(tiny, model, tmp_path, '--out', tmp_path / 'run')
    refused(*go, '--freeze', 'backbon', word='did you mean backbone')
    refused(*go, '--mix', '1.5', word="'mix' is 1.5")
    refused(*go, '--precision', '8-bit', word='bf16-mixed')
    refused(
        'train',
        '--mix',
        0.5,
        '--corpus',
        tiny / 'corpus',
        '--validation-dir',
        'none',
        '--steps',
        1,
        '--out',
        tmp_path / 'run',
        word='give the folder of a set',
    )
    refused(*(a if a != model else 'fats' for a in go), word='Unknown model')
    assert not (tmp_path / 'run').exists()


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_sigterm_to_the_whole_group_stops_and_saves(tiny, tmp_path):
    "As torchrun and batch systems send it: the worker lives until its parent has finished the step"
    go = (
        'train',
        '--config',
        settings(tmp_path / 's.toml', log_every=1),
        '--corpus',
        tiny / 'corpus',
        '--workers',
        '1',
        '--batch-size',
        '2',
        '--threads',
        '1',
        '--validation-dir',
        'none',
        '--out',
        tmp_path / 'run',
        '--steps',
        '100000',
    )
    p = subprocess.Popen(
        [*command, *map(str, go)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / 'run/history.csv').exists() and p.poll() is None:
        time.sleep(0.1)
    os.killpg(p.pid, signal.SIGTERM)
    out, err = p.communicate(timeout=120)
    assert (
        p.returncode == 130
        and out == ''
        and err.splitlines()[-1].startswith('khmer-ocr: stopped at step')
        and 'Traceback' not in err
        and 'rror' not in err
    ), err
    assert (tmp_path / 'run/latest.safetensors').exists()


@pytest.mark.skipif(os.name == 'nt', reason='gloo')
def test_train_under_torchrun(tiny, tmp_path):
    "Two processes: one writes and speaks, and the result is that of one process with twice the batches"
    from test_training import torchrun
    from khmer_ocr.training.callbacks import read_history

    net = '[model]\nchannels = [8, 8, 8, 8, 16]\nhidden = 8\nlayers = 1\ndropout = 0.0\n'
    for name, k in (('two', 1), ('one', 2)):
        (tmp_path / f'{name}.toml').write_text(
            f'[train]\nprecision = "32-true"\ntensorboard = false\nlog_every = 1\naccumulate = {k}\n{net}'
        )

    def words(name):
        return [
            'train',
            '--config',
            tmp_path / f'{name}.toml',
            '--corpus',
            tiny / 'corpus',
            '--steps',
            '4',
            '--batch-size',
            '2',
            '--threads',
            '1',
            '--validation-dir',
            'none',
            '--out',
            tmp_path / name,
        ]

    r = torchrun('--no-python', *command, *words('two'))
    assert r.returncode == 0 and r.stdout.count('4 steps done') == 1, r.stderr
    ok(*words('one'))
    for a, b in zip(*(read_history(tmp_path / k / 'history.csv') for k in ('one', 'two')), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)


def test_evaluate(tiny, model, tmp_path):
    assert 'folded' in ok('evaluate', tiny / 'set', '--model', model)
    assert json.loads(ok('evaluate', tiny / 'set/val', '--model', model, '--json'))['scores']['data']['lines'] == 4
    (tmp_path / 'labels.tsv').write_text('path\ttext\nx.png\tក\n', encoding='utf-8')
    (tmp_path / 'empty.tsv').touch()
    refused('evaluate', tmp_path / 'labels.tsv', '--model', model, word='x.png')
    refused('evaluate', tmp_path / 'empty.tsv', '--model', model, word='empty.tsv')
    refused('evaluate', tmp_path / 'nothing', '--model', model, word='nothing')


def test_run(tiny, tmp_path):
    rows = [line.split('  ', 1) for line in ok('run').splitlines()]
    assert {name: about.strip() for name, about in rows}['corpus'].startswith('Making the corpus')
    assert 'max_lines (int)' in ok('run', 'generate', '--help-notebook')
    refused('run', 'genrate', word='did you mean generate')
    refused('run', 'generate', '-p', 'max_line', '3', word='did you mean max_lines')
    refused('run', 'generate', '-p', 'seed', word='a name and a value')
    r = call(
        'run',
        'corpus',
        '-p',
        'sources',
        tiny / 'text.txt',
        '-p',
        'out',
        tmp_path / 'c',
        '-p',
        'limit=20',
        '--out',
        tmp_path / 'report',
        '--json',
    )
    assert r.exit_code == 0 and json.loads(r.stdout)['lines'] > 5 and (tmp_path / 'report/report.html').exists()


def test_run_of_a_fine_tuning(tiny, model, tmp_path):
    own_lines(tmp_path / 'mine', ('កខ', 'ក漢', 'គឃង'))
    p = dict(
        data=tmp_path / 'mine',
        mix=0.5,
        skip_unknown='true',
        corpus=tiny / 'corpus',
        validation=tiny / 'set/val',
        validation_samples=2,
        model_dir=tmp_path / 'model',
        init=model,
        freeze='["backbone"]',
        steps=2,
        batch_size=2,
        gentle_start=1,
        scale=0.2,
        keep_best=1,
    )
    r = call(
        'run',
        'train_ocr',
        *(a for k, v in p.items() for a in ('-p', f'{k}={v}')),
        '--out',
        tmp_path / 'report',
        '--json',
    )
    assert r.exit_code == 0, r.stderr
    assert json.loads(r.stdout)['left_out'] == 1 and list((tmp_path / 'model').glob('step-000002-cer-*'))


def test_check():
    assert ok('check', 'data').endswith('all is well\n')


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_ctrl_c_is_one_line_and_130(tiny, tmp_path):
    (tmp_path / 'corpus').mkdir()
    for s in ('train', 'val', 'test'):
        (tmp_path / 'corpus' / f'{s}.txt').write_text(
            (tiny / 'text.txt').read_text(encoding='utf-8') * 200, encoding='utf-8'
        )
    p = subprocess.Popen(
        [*command, 'generate', '--corpus', tmp_path / 'corpus', '--out', tmp_path / 'set'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # whoever runs the tests in the background has it ignored
    while not list(tmp_path.glob('set/train/images/*.png')) and p.poll() is None:
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert (
        p.returncode == 130
        and out == ''
        and err.splitlines()[-1].startswith('khmer-ocr: stopped')
        and 'Traceback' not in err
    )


def test_folders_that_are_files_and_families_that_are_not(tmp_path, tiny, model):
    (tmp_path / 'f').write_text('x')
    refused(
        'generate', '--corpus', tiny / 'corpus', '--max-lines', 1, '--out', tmp_path / 'f', word='a folder is wanted'
    )
    refused('fonts', 'install', '--folder', tmp_path / 'f', word='is a file')
    refused('fonts', '--family', 'Nonesuch', word='Nonesuch')
    refused('read', '--model', tmp_path, tmp_path / 'f', word='is a folder, not a checkpoint')
    for args in (
        ('generate', '--seed'),
        ('validation-set', '--random-seed'),
        ('train', '--seed'),
        ('train', '--workers'),
        ('corpus', '--seed'),
    ):
        refused(*args, '-1', word=f"'{args[-1]}': Input should be greater than or equal to 0")


def test_an_unwritable_home_is_no_news(tmp_path, model):
    Image.new('L', (90, 30), 255).save(tmp_path / 'a.png')
    r = subprocess.run(
        [*command, 'read', '--line', '--model', model, str(tmp_path / 'a.png')],
        capture_output=True,
        text=True,
        env=os.environ | dict(HOME='/proc', MPLCONFIGDIR=''),
    )
    assert (r.returncode, r.stdout, r.stderr) == (0, '\n', '')


# gan
small_nets = dict(
    pix2pix='ngf = 4\nndf = 4\nsave_every = 2\nsteps = 2\n',
    vae='width = 4\nlatent = 6\nsave_every = 2\nsteps = 2\n',
    hybrid='ngf = 4\nndf = 4\nwidth = 4\nlatent = 6\nsave_every = 2\nsteps = 2\n',
    dcgan='width = 4\nd_width = 4\nz_dim = 5\n',
)
on_cpu = ('--device', 'cpu', '--precision', '32-true')


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    from khmer_ocr.synth.fonts import find_fonts
    from khmer_ocr.generative.pairs import rendered_pairs, save_pairs

    d = tmp_path_factory.mktemp('pages')
    save_pairs(
        d,
        rendered_pairs(
            ['ភ្នំពេញ', 'សាលា'],
            [next(f for f in find_fonts() if f.name == 'Noto Sans Khmer Variable Regular')],
            6,
            seed=2,
            shape=(72, 90),
            size=(16, 20),
        ),
    )
    return d


@pytest.mark.parametrize('kind', ['pix2pix', 'vae', 'hybrid'])
def test_gan_trains_resumes_and_paints(kind, pages, tmp_path):
    (tmp_path / 'c.toml').write_text(small_nets[kind])
    args = (
        'gan',
        'train',
        kind,
        '--data',
        pages,
        '--out',
        tmp_path / 'm',
        '--config',
        tmp_path / 'c.toml',
        '--image-size',
        32,
        '--num-epochs',
        1,
        *on_cpu,
    )
    said = ok(*args)
    assert (
        '5 pages to learn from, 1 to measure on. The guide says pix2pix' in said
        and f'learned:{tmp_path / "m" / "painter.safetensors"}' in said
    )
    before = (tmp_path / 'm' / 'painter.safetensors').read_bytes()
    ok(*args, '--resume', 'latest')
    assert (tmp_path / 'm' / 'painter.safetensors').read_bytes() == before
    paint = (
        'gan',
        'generate',
        kind,
        '--model',
        tmp_path / 'm' / 'painter.safetensors',
        '--masks',
        pages / 'masks',
        '--num',
        2,
        '--device',
        'cpu',
    )
    for where in 'ab':
        assert '12 images in' in ok(*paint, '--out', tmp_path / where)
    a, b = files(tmp_path / 'a'), files(tmp_path / 'b')
    assert (
        a == b
        and len([f for f in a if f.startswith('images/')]) == 12
        and all((tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in a if '.' in f)
    )
    assert (
        ok(
            'generate',
            '--preset',
            f'learned:{tmp_path / "m" / "painter.safetensors"}',
            '--corpus',
            make_lines(tmp_path),
            '--max-lines',
            2,
            '--out',
            tmp_path / 'set',
        )
        and len(list((tmp_path / 'set').rglob('*.png'))) == 6
    )


def make_lines(folder):
    (folder / 'corpus').mkdir()
    for s in ('train', 'val', 'test'):
        (folder / 'corpus' / f'{s}.txt').write_text('ភ្នំពេញ\nសាលា\nជាតិ\n', encoding='utf-8')
    return folder / 'corpus'


def test_gan_dcgan_from_good_images(pages, tmp_path):
    (tmp_path / 'c.json').write_text('{"width": 4, "d_width": 4, "z_dim": 5, "snapshot_every": 1}')
    shutil.copytree(pages / 'images', tmp_path / 'd' / 'good')
    args = (
        'gan',
        'train',
        'dcgan',
        '--data',
        tmp_path / 'd',
        '--out',
        tmp_path / 'm',
        '--config',
        tmp_path / 'c.json',
        '--image-size',
        16,
        '--batch-size',
        4,
        '--num-epochs',
        1,
        *on_cpu,
    )
    assert 'Loss_D' in ok(*args) and (tmp_path / 'm' / 'network-snapshot-000001.safetensors').exists()
    assert '3 images in' in ok(
        'gan',
        'generate',
        'dcgan',
        '--model',
        tmp_path / 'm' / 'generator_model.safetensors',
        '--num',
        3,
        '--out',
        tmp_path / 'o',
    ) and files(tmp_path / 'o') == [f'synthetic_{i}.png' for i in range(3)]


@pytest.mark.parametrize('kind', ['pix2pix', 'dcgan'])
def test_gan_settings_of_the_file_hold_where_the_command_line_is_silent(kind, pages, tmp_path):
    from khmer_ocr.training.checkpoints import load_checkpoint

    name = 'resolution = 64' if kind == 'pix2pix' else 'image_size = 64'
    (tmp_path / 'c.toml').write_text(
        f'{name}\nprecision = "32-true"\ndevice = "cpu"\nseed = 7\nbatch_size = 2\nlr = 0.001\n'
        + ('ngf = 4\nndf = 4\nsteps = 1\n' if kind == 'pix2pix' else 'width = 4\nd_width = 4\nz_dim = 5\nepochs = 1\n')
    )
    for more, want in (
        ((), (64, 7, 2, 1e-3)),
        (('--image-size', 32, '--seed', 8, '--batch-size', 4, '--lr', 0.002), (32, 8, 4, 2e-3)),
    ):
        ok(
            'gan',
            'train',
            kind,
            '--data',
            pages / 'images',
            '--config',
            tmp_path / 'c.toml',
            '--out',
            tmp_path / str(len(more)),
            *more,
        )
        h = load_checkpoint(next((tmp_path / str(len(more))).rglob('latest.safetensors')))[1]
        t = h.get('train') or h['settings']
        assert (
            h['config'].get('resolution') or h['config']['image_size'],
            t['seed'],
            t['batch_size'],
            t['lr'],
            t['precision'],
            t['device'],
        ) == (*want, '32-true', 'cpu')


@pytest.mark.parametrize(
    'args, word',
    [
        (('train', 'dcgan', '--data', '{t}/none'), 'No images found in'),
        (('train', 'dcgan', '--masks', '{t}/one'), 'is not for a dcgan'),
        (('generate', 'dcgan', '--model', '{t}/bad.toml', '--masks', '{t}/one'), 'is not for a dcgan'),
        (('train', 'vae', '--data', '{t}/one', '--masks', '{t}/none'), 'No images found in'),
        (('train', 'pixpix'), 'did you mean pix2pix?'),
        (('train', 'vae', '--data', '{t}/one', '--config', '{t}/bad.toml'), 'did you mean width?'),
        (('train', 'vae', '--data', '{t}/one', '--image-size', '48'), 'power of two'),
        (('train', 'hybrid', '--data', '{t}/one', '--resume', 'x.safetensors'), "resume='latest'"),
        (('generate', 'vae', '--masks', '{t}/one'), 'train one with khmer-ocr gan train vae'),
        (('generate', 'vae', '--model', '{t}/bad.toml'), 'no masks to make pages of'),
        (('generate', 'vae', '--model', '{t}/bad.toml', '--masks', '{t}/one'), 'bad.toml'),
        (('train', 'vae', '--device', 'tpu'), 'auto, cpu or cuda'),
    ],
)
def test_gan_bad_input(args, word, pages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'one').mkdir()
    shutil.copy(next((pages / 'images').iterdir()), tmp_path / 'one')
    (tmp_path / 'bad.toml').write_text('widht = 4\n')
    before = files(tmp_path)
    r = call('gan', *(a.format(t=tmp_path) for a in args))
    said = [l for l in r.stderr.splitlines() if not l.startswith('warning:')]
    assert r.exit_code == 1 and len(said) == 1 and word in said[0] and files(tmp_path) == before
