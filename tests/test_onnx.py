"ONNX and INT8: the logits and texts of torch, the same bytes twice, the command, and errors in one line"

import subprocess, sys
from dataclasses import asdict
import cv2, numpy as np, pytest, torch
from khmer_ocr.inference.onnx import OnnxNet, OnnxReader, export_onnx, open_reader, quantise, write_program
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.inference.reader import Reader
from khmer_ocr.models.attention import Seq2Seq, make_units
from khmer_ocr.models.attention_training import seq2seq_variant
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset

pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
units = SubscriptTokenizer(charset('khmer-latin'))


def checkpoint(path, **kw):
    torch.manual_seed(3)
    n = CTCNet(len(units), CTCConfig(**(dict(channels=(8, 8, 8, 8, 16), hidden=8, layers=1) | kw)))
    save_checkpoint(path, n.state_dict(), header(n.config, units))
    return path


def image(i, width=160):
    return np.random.default_rng(i).integers(0, 255, (40, width)).astype(np.uint8)


@pytest.mark.parametrize(
    'shape',
    [
        dict(),
        dict(layers=2),
        dict(stride=8, height=48),
        dict(stride=2),
        dict(res_blocks=(1, 1, 1)),
        dict(encoder='conv', block_type='large', res_blocks=(0, 1, 0)),
        dict(layers=0),
    ],
)
def test_the_same_logits(tmp_path, shape):
    path = checkpoint(tmp_path / 'a.safetensors', **shape)
    size = export_onnx(path, tmp_path / 'a.onnx')
    assert size == (tmp_path / 'a.onnx').stat().st_size
    reader = Reader.load(path, dtype=torch.float32)
    onnx_net = OnnxNet(tmp_path / 'a.onnx')
    assert onnx_net.config == reader.net.config
    for lines, width in ((1, 16), (3, 333), (2, 2048)):
        x = torch.rand(lines, 1, reader.height, width)
        with torch.inference_mode():
            assert torch.allclose(reader.net(x), onnx_net(x), atol=1e-4)


@pytest.mark.parametrize('options', [dict(), dict(decoder='beam'), dict(decoder='beam', lm='ngram')])
def test_the_same_texts_and_places(tmp_path, options):
    export_onnx('fast', tmp_path / 'fast.onnx')
    images = [image(i, 60 + 300 * i) for i in range(9)]  # the widest go in windows
    a = Reader.load('fast', dtype=torch.float32, **options).read(images)
    b = open_reader(tmp_path / 'fast.onnx', **options).read(images)
    assert [r.text for r in a] == [r.text for r in b]
    assert np.allclose([r.confidence for r in a], [r.confidence for r in b], atol=1e-3)
    assert [[c[2:] for c in r.chars] for r in a] == [[c[2:] for c in r.chars] for r in b]


def test_int8(tmp_path):
    "A fifth of the size or so, close logits, one line as among many, and the same bytes twice"
    path = checkpoint(tmp_path / 'a.safetensors', channels=(16, 32, 32, 32, 64), hidden=48)
    batches = [np.random.default_rng(i).random((4, 1, 40, 160)).astype(np.float32) for i in range(3)]
    for name in ('a', 'b'):
        export_onnx(path, tmp_path / f'{name}.onnx')
        quantise(tmp_path / f'{name}.onnx', tmp_path / f'{name}8.onnx', batches)
    assert (tmp_path / 'a.onnx').read_bytes() == (tmp_path / 'b.onnx').read_bytes()
    assert (tmp_path / 'a8.onnx').read_bytes() == (tmp_path / 'b8.onnx').read_bytes()
    assert (tmp_path / 'a8.onnx').stat().st_size < 0.45 * (tmp_path / 'a.onnx').stat().st_size
    a, b = OnnxNet(tmp_path / 'a.onnx'), OnnxNet(tmp_path / 'a8.onnx')
    assert b.header['arithmetic'] == 'int8'
    assert b.header['charset'] == a.header['charset']
    x = torch.from_numpy(batches[0])
    assert np.corrcoef(a(x).flatten(), b(x).flatten())[0, 1] > 0.95


def test_a_program_without_torch_and_library(tmp_path):
    export_onnx('fast', tmp_path / 'fast.onnx')
    write_program(tmp_path / 'fast.onnx', tmp_path / 'fast.py')
    images = [image(i, 200) for i in range(2)]
    files = [str(tmp_path / f'{i}.png') for i in range(2)]
    for file, im in zip(files, images):
        cv2.imwrite(file, im)
    code = (
        'import sys, runpy; sys.modules["torch"] = sys.modules["khmer_ocr"] = None; sys.argv = sys.argv[1:]; '
        'runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    command = [sys.executable, '-I', '-c', code, str(tmp_path / 'fast.py'), *files]
    p = subprocess.run(command, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert [''.join(l.split()) for l in p.stdout.split('\n')[:-1]] == [
        ''.join(r.text.split()) for r in OnnxReader(tmp_path / 'fast.onnx').read(images)
    ]


def test_what_cannot_be_exported_or_opened_is_one_line(tmp_path):
    config = seq2seq_variant('buoy2022').config
    its_units = make_units(config)
    save_checkpoint(
        tmp_path / 's.safetensors',
        Seq2Seq(len(its_units), config).state_dict(),
        dict(
            model='seq2seq',
            config=asdict(config),
            charset=list(its_units.charset.symbols),
            height=config.height,
            preprocess='khmer_ocr.data.prepare/2',
            normal_form='khmer_ocr.text.normalise/1',
        ),
    )
    (tmp_path / 'bad.onnx').write_bytes(b'nothing')
    for call, words in (
        (lambda: export_onnx(tmp_path / 's.safetensors', tmp_path / 's.onnx'), 'attention'),
        (
            lambda: export_onnx(checkpoint(tmp_path / 't.safetensors', encoder='attention'), tmp_path / 't.onnx'),
            'attention',
        ),
        (lambda: open_reader(tmp_path / 'bad.onnx'), 'damaged'),
        (lambda: open_reader(tmp_path / 'none.onnx'), 'does not exist'),
        (lambda: export_onnx('fsat', tmp_path / 'x.onnx'), "'fsat'"),
    ):
        with pytest.raises(KhmerOCRError, match=words) as e:
            call()
        assert '\n' not in str(e.value)
    assert not list(tmp_path.glob('[stx].onnx'))


def test_a_foreign_file_and_an_old_one(tmp_path):
    import json, onnx

    export_onnx(checkpoint(tmp_path / 'a.safetensors'), tmp_path / 'a.onnx')
    model = onnx.load(tmp_path / 'a.onnx')
    entry = model.metadata_props[0]
    entry.value = json.dumps(json.loads(entry.value) | dict(preprocess='khmer_ocr.data.prepare/1: old'))
    (tmp_path / 'old.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(KhmerOCRError, match='export it again'):
        OnnxReader(tmp_path / 'old.onnx')
    del model.metadata_props[:]
    (tmp_path / 'foreign.onnx').write_bytes(model.SerializeToString())
    with pytest.raises(KhmerOCRError, match='none of khmer_ocr'):
        OnnxReader(tmp_path / 'foreign.onnx')


def test_the_command(tmp_path):
    def run(*args):
        command = [sys.executable, '-c', 'from khmer_ocr.cli.app import app; app()', *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)

    p = run('export', 'int8', 'fast', '--out', tmp_path / 'fast.onnx', '--program')
    assert p.returncode == 0, p.stderr
    assert '1.9 MB' in p.stdout, p.stderr
    assert all(l.startswith('warning: no fonts') for l in p.stderr.splitlines()), p.stderr
    cv2.imwrite(str(tmp_path / 'a.png'), image(1, 200))
    assert (tmp_path / 'fast.py').exists()
    p = run('read', '--line', '--model', tmp_path / 'fast.onnx', tmp_path / 'a.png')
    assert p.returncode == 0
    assert p.stdout.count('\n') == 1
    p = run('export', 'onnx', 'fast', '--out', tmp_path / 'fast.bin')
    assert p.returncode == 1
    assert 'end in .onnx' in p.stderr
    assert p.stderr.count('\n') == 1
