"Reading lines: order, width, memory, bad input; with the weights that ship, or an untrained network without them"

import subprocess, sys, textwrap
import numpy as np, pytest, torch
from PIL import Image
from typer.testing import CliRunner
from khmer_ocr.cli.app import app
from khmer_ocr.models import zoo
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header, load_ctc
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.data.batching import collate
from khmer_ocr.data.preprocessing import preprocess
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.training.checkpoints import load_weights, save_checkpoint
from khmer_ocr.models.language_model import NGramModel
from khmer_ocr.inference.reader import Prediction, Reader, read_files
from khmer_ocr.models.decoding import DECODERS
from khmer_ocr.models.acceleration import prepare_for_inference
from khmer_ocr.models.zoo import checkpoint_path, available_models, open_model
from khmer_ocr.synth.rendering import render
from khmer_ocr.models.attention import Seq2Seq, Seq2SeqConfig, make_units
from khmer_ocr.models.attention_training import read_lines
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset
from khmer_ocr.models.transformer import ImageToText, ImageToTextConfig
from khmer_ocr.models.transformer_training import image_to_text_header


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    if 'fast' in available_models():
        return available_models()['fast']
    torch.manual_seed(0)
    units, path = SubscriptTokenizer(charset()), tmp_path_factory.mktemp('weights') / 'random.safetensors'
    net = CTCNet(len(units))
    for n, p in net.named_parameters():
        if 'weight_ih' in n or n == 'classifier.weight':
            torch.nn.init.normal_(p, std=0.5)  # so that it reads more than one text
    save_checkpoint(path, net.state_dict(), header(net.config, units))
    return path


@pytest.fixture(scope='module')
def reader(weights):
    return Reader.load(weights)


def scribble(width, seed=0, height=48):
    "Something with the density of text"
    rng = np.random.default_rng(seed)
    im = np.full((height, width), 235, np.uint8)
    for x in range(12, width - 20, 16):
        for _ in range(3):
            a, b = rng.integers(10, 30), rng.integers(2, 10)
            im[a : a + b, x + rng.integers(0, 6) : x + rng.integers(7, 13)] = 30
    return im


@pytest.fixture(scope='module')
def lines():
    return [scribble(int(w), i) for i, w in enumerate([300, 90, 1200, 301, 20, 640, 299, 2000, 150])]


def same(a, b):
    return a.text == b.text and abs(a.confidence - b.confidence) < 0.05


def test_order_and_batches(reader, lines):
    "A line reads the same alone, in any order and in any batch"
    whole = reader.read(lines)
    assert len(whole) == len(lines)
    assert all(isinstance(r, Prediction) for r in whole)
    for size in (1, 3):
        assert all(map(same, reader.read(lines, size), whole))
    assert all(map(same, reader.read(lines[::-1]), whole[::-1]))
    assert same(reader.read([lines[2]])[0], whole[2])
    assert reader.read([]) == []


def test_chars(reader, lines):
    for im, r in zip(lines, reader.read(lines)):
        xs = [x for *_, a, b in r.chars for x in (a, b)]
        assert xs == sorted(xs)
        assert all(0 <= x <= im.shape[1] for x in xs)
        assert 0 <= r.confidence <= 1
        assert len(r.char_confidences) == len(r.chars)


@pytest.mark.parametrize(
    'image',
    [np.full((40, 300), v, np.uint8) for v in (0, 128, 255)]
    + [np.zeros((1, 1), np.uint8), np.full((1, 500), 255, np.uint8), np.full((500, 1), 255, np.uint8)],
)
def test_blank(reader, image):
    assert reader.read([image])[0] == Prediction('', 1.0)


@pytest.mark.parametrize('shape', [(1, 1), (1, 400), (400, 1), (2, 3), (700, 20), (3, 5000)])
def test_odd_shapes(reader, shape):
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert isinstance(reader.read([noise])[0].text, str)


@pytest.mark.parametrize(
    'bad', [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8), 'line.png', None]
)
def test_not_a_line(reader, bad):
    with pytest.raises(KhmerOCRError, match='image 1'):
        reader.read([scribble(60), bad])


def frames(reader, line):
    "Outputs of the network for each frame of a prepared line: in windows, and whole"
    with torch.inference_mode():
        ((_, cut),) = reader._line_outputs([line], 32)
        (whole,) = reader.decoder.forward(*reader._batch_input([line], -(-line.shape[1] // 64) * 64))
    return cut[0], whole[0]


def test_windows(reader):
    "Cut into windows, a line of 3,000 px gives the outputs that it gives whole"
    cut, whole = frames(reader, preprocess(scribble(3900))[:, :3000])
    assert len(cut) == len(whole) == 750
    assert (cut == whole).mean() > 0.97


KINDS = dict(
    stride2=dict(stride=2),
    stride8=dict(stride=8, height=48),
    attention=dict(encoder='attention', layers=2),
    convolutions=dict(encoder='conv', layers=2),
    res_blocks=dict(res_blocks=(1, 1, 1)),
    large=dict(res_blocks=(1, 1, 2), block_type='large', layers=0),
    low=dict(height=32, encoder='attention'),
)


@pytest.fixture(scope='module', params=KINDS.values(), ids=KINDS)
def kind(request, tmp_path_factory):
    "A reader of every kind of network, from a file, with random weights that give many texts"
    torch.manual_seed(1)
    units, path = SubscriptTokenizer(charset()), tmp_path_factory.mktemp('kind') / 'toy.safetensors'
    net = CTCNet(len(units), CTCConfig(**dict(channels=(8, 8, 16, 16, 32), hidden=16, layers=1) | request.param))
    for n, p in net.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    save_checkpoint(path, net.state_dict(), header(net.config, units))
    return Reader.load(path, dtype=torch.float32)


def test_kinds_of_network(kind, lines):
    "Alone or in a batch, in any order, a line reads the same; its characters lie on it"
    whole = kind.read(lines)

    def close(a, b):
        return a.text == b.text and abs(a.confidence - b.confidence) < 1e-3

    assert len({r.text for r in whole}) > 3
    assert kind.stride == kind.net.config.stride
    assert all(map(close, kind.read(lines, 1), whole))
    assert all(map(close, kind.read(lines[::-1], 4)[::-1], whole))
    for im, r in zip(lines, whole):
        xs = [x for *_, a, b in r.chars for x in (a, b)]
        assert xs == sorted(xs)
        assert all(0 <= x <= im.shape[1] for x in xs)


def test_kinds_of_network_in_windows(kind):
    line = preprocess(scribble(round(3900 * 40 / kind.height)), kind.height)
    line = np.ascontiguousarray(np.hstack([line] * 2)[:, :2900])
    cut, whole = frames(kind, line)
    assert len(cut) == len(whole) == -(-2900 // kind.stride)
    inside = slice(0, 1600 // kind.stride)  # in the first window and kept from it
    if kind.net.config.encoder == 'conv':
        assert (cut == whole).mean() > 0.99
    else:
        assert (cut[inside] == whole[inside]).mean() > 0.8


def test_padding_does_not_matter(kind):
    "The network is told how wide a line is: with attention, paper behind its end changes nothing"
    if kind.net.config.encoder != 'attention':
        pytest.skip('an LSTM reads the padding too: lines go in buckets')
    line = preprocess(scribble(300), kind.height)
    with torch.inference_mode():
        (a, p), (b, q) = (kind.decoder.forward(*kind._batch_input([line], w))[0] for w in (320, 960))
    assert (a == b).mean() > 0.99
    assert np.abs(p - q).max() < 0.05


# ways from scores to text


def strong(net, std=0.5):
    "Random weights large enough that the network gives many texts"
    for n, p in net.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=std)
    return net.eval()


@pytest.fixture(
    scope='module',
    params=['buoy2022', 'buoy2022 with CTC', 'on a CTC encoder', 'image to text', 'image to text in patches'],
)
def writer(request, tmp_path_factory):
    "Checkpoint of a reader with attention"
    torch.manual_seed(2)
    small = dict(hidden=16, attention=16)
    path = tmp_path_factory.mktemp('writer') / 'toy.safetensors'
    if 'text' in request.param:
        config, units = (
            ImageToTextConfig(
                channels=(8, 8, 16, 16),
                encoder_depth=2,
                encoder_width=16,
                encoder_heads=2,
                decoder_depth=2,
                decoder_width=16,
                decoder_heads=2,
                stem='patches' if 'patches' in request.param else 'conv',
            ),
            SubscriptTokenizer(charset()),
        )
        save_checkpoint(
            path, strong(ImageToText(len(units), config), 0.3).state_dict(), image_to_text_header(config, units)
        )
        return path
    config = (
        Seq2SeqConfig(
            **small, encoder='ctc', ctc=CTCConfig(channels=(8, 8, 16, 16, 32), hidden=16, layers=1), ctc_weight=0.3
        )
        if 'encoder' in request.param
        else Seq2SeqConfig(**small, encoder_hidden=16, ctc_weight=0.3 if 'with' in request.param else 0)
    )
    units = make_units(config)
    net = strong(Seq2Seq(len(units), config), 0.3)
    save_checkpoint(path, net.state_dict(), header(config, units, model='seq2seq'))
    return path


def test_readers_that_write(writer, lines):
    "Each decoder: the same alone and in a batch, characters on the line, and the texts of training's own reading"
    net, units, head = open_model(writer)
    some = [scribble(w, i) for i, w in enumerate((200, 90, 201, 20))]
    for decoder in DECODERS:
        if decoder == 'ctc' and not net.has_ctc_head:
            continue
        reader = Reader.load(writer, decoder=decoder)
        whole = reader.read(some)
        assert (
            [r.text for r in whole]
            == [reader.read([im])[0].text for im in some]
            == [r.text for r in reader.read(some[::-1], 2)[::-1]]
        )
        assert decoder == 'beam' or whole[0].text
        assert all(0 <= r.confidence <= 1 for r in whole)
        for im, r in zip(some, whole):
            xs = [x for *_, a, b in r.chars for x in (a, b)]
            assert xs == sorted(xs)
            assert all(0 <= x <= im.shape[1] for x in xs)
        line = np.ascontiguousarray(
            preprocess(scribble(900), reader.height)[:, :320]
        )  # as wide as its bucket: both sides pad nothing
        with torch.inference_mode():
            ((_, output),) = reader._line_outputs([line], 1)
        assert (
            units.decode(reader.decoder.decode(*output)[0])
            == read_lines(net, units, [collate([(line, '')])], decoder)[0][0]
        )


def test_wide_lines_of_readers_that_write(writer):
    "Windows are joined by the frames of the units: none is lost and none comes twice"
    reader = Reader.load(writer)
    line = np.ascontiguousarray(np.hstack([preprocess(scribble(1500, i), reader.height) for i in range(4)])[:, :3500])
    with torch.inference_mode():
        ((_, (ids, conf, at, _)),) = reader._line_outputs([line], 32)
        pieces = [
            reader.decoder.forward(
                *reader._batch_input([np.ascontiguousarray(line[:, x0:x1])], -(-(x1 - x0) // 64) * 64)
            )[0]
            for x0, x1 in ((0, 2048), (1536, 3500))
        ]
    left, right = (p[2] + f for p, f in zip(pieces, (0, 1536 // reader.stride)))
    cut = 1792 // reader.stride
    assert list(at) == [*left[left < cut], *right[right >= cut]]
    assert len(ids) == len(conf) == len(at)


def test_decoders_of_a_ctc_reader(weights, lines):
    a, b, c = (Reader.load(weights, decoder=d).read(lines) for d in (None, 'ctc', 'greedy'))
    assert a == b == c
    beam = Reader.load(weights, decoder='beam')
    whole = beam.read(lines)
    assert all(map(same, whole, [beam.read([im])[0] for im in lines]))
    if 'fast' in available_models():
        text = 'ព្រះរាជាណាចក្រកម្ពុជា'
        line = 255 - np.pad(render(text, find_fonts(split='train')[0], 32).ink, 8)
        assert beam.read([line])[0].text == text
    for im, r in zip(lines, whole):
        xs = [x for *_, p, q in r.chars for x in (p, q)]
        assert xs == sorted(xs)
        assert all(0 <= x <= im.shape[1] for x in xs)
        assert 0 <= r.confidence <= 1
    assert beam.read([np.full((40, 300), 255, np.uint8)]) == [Prediction('', 1.0)]


def test_a_language_model_is_used(weights, tmp_path):
    "The decoder asks the model for probabilities; a model of other units or another kind is refused"
    units = open_model(weights)[1]
    lm = NGramModel.train(['កម្ពុជា'] * 50, units, order=4, cuts=(1,))
    lm.save(tmp_path / 'lm.safetensors')
    asked = []

    class Spy:
        n, order = lm.n, lm.order

        def probs(self, h):
            asked.append(h)
            return lm.probs(h)

        def context(self, h):
            return lm.context(h)

    reader = Reader.load(weights, lm=tmp_path / 'lm.safetensors')
    assert reader.decoder.lm.n == len(units)
    reader.decoder.lm = Spy()
    reader.read([scribble(400)])
    assert len(asked) > 3
    other = NGramModel.train(['ab'], SubscriptTokenizer(type(units.charset)(('a', 'b'))), order=2, cuts=(1,))
    other.save(tmp_path / 'other.safetensors')
    with pytest.raises(KhmerOCRError, match='units'):
        Reader.load(weights, decoder='beam', lm=tmp_path / 'other.safetensors')
    with pytest.raises(KhmerOCRError, match='not a language model'):
        Reader.load(weights, lm=weights)
    with pytest.raises(KhmerOCRError, match='not found'):
        Reader.load(weights, lm='no_such_model')


def test_combinations_that_do_not_exist(weights, writer):
    net, units, _ = open_model(writer)
    for call, says in (
        (lambda: Reader.load(weights, decoder='baem'), 'did you mean beam'),
        (lambda: Reader.load(weights, decoder='ctc', lm='x'), 'not decoder ctc'),
        (lambda: Reader.load(writer, lm='x'), 'not a reader that writes'),
    ):
        with pytest.raises(KhmerOCRError, match=says) as e:
            call()
        assert '\n' not in str(e.value)
    if not net.has_ctc_head:
        with pytest.raises(KhmerOCRError, match='no CTC head'):
            Reader.load(writer, decoder='ctc')


@pytest.mark.parametrize('decoder', ['greedy', 'beam'])
def test_wide_memory(weights, tmp_path, decoder):
    "A line 20,000 px wide takes hardly more memory than one of 2,000"
    code = textwrap.dedent('''
        import sys, resource, numpy as np
        from khmer_ocr.inference.reader import Reader
        r, rng = Reader.load(sys.argv[1], decoder=sys.argv[2]), np.random.default_rng(0)
        line = np.where(rng.random((40, 20000)) < .2, 30, 235).astype(np.uint8)
        r.read([line[:, :2000]]*4); a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        r.read([line]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)''')
    out = subprocess.run(
        [sys.executable, '-c', code, str(weights), decoder], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) / 1024 < 400  # MB


def test_precisions(weights):
    "bfloat16 and float32 agree; folding the norms changes nothing"
    net, units, head = load_ctc(weights)
    line = torch.from_numpy(preprocess(scribble(600))[None, None]).float() / 255
    with torch.inference_mode():
        plain, folded = net(line).softmax(-1), prepare_for_inference(net)(line).softmax(-1)
        half = prepare_for_inference(net, torch.bfloat16)(line.bfloat16()).softmax(-1)
    assert (plain - folded).abs().max() < 1e-3
    assert (plain - half).abs().mean() < 0.01


def test_threads(reader):
    before = torch.get_num_threads()
    reader.read([scribble(100)])
    assert torch.get_num_threads() == before


def test_loading(weights, tmp_path):
    data = weights.read_bytes()
    for name, content, why in (
        ('cut', data[:5000], 'truncated'),
        ('half', data[: len(data) // 2], 'truncated'),
        ('empty', b'', 'truncated'),
        ('text', b'hello', 'truncated'),
    ):
        f = tmp_path / f'{name}.safetensors'
        f.write_bytes(content)
        with pytest.raises(KhmerOCRError, match=why):
            Reader.load(f)
    from safetensors.torch import save_file

    save_file({'a': torch.zeros(2)}, foreign := tmp_path / 'foreign.safetensors')
    with pytest.raises(KhmerOCRError, match='not a checkpoint'):
        Reader.load(foreign)
    with pytest.raises(KhmerOCRError, match='not found'):
        Reader.load(tmp_path / 'none.safetensors')
    with pytest.raises(KhmerOCRError, match='Unknown model'):
        Reader.load('fsat')


def test_best_is_the_default(monkeypatch, tmp_path):
    for known, first in ((dict(best='b', fast='f'), 'b'), (dict(fast='f'), 'f')):
        monkeypatch.setattr(zoo, 'available_models', lambda: known)
        assert checkpoint_path() == first
    monkeypatch.setattr(zoo, 'available_models', dict)
    with pytest.raises(KhmerOCRError, match='no weights are installed'):
        Reader.load()


@pytest.mark.parametrize(
    'change, says',
    [
        (
            dict(preprocess='khmer_ocr.data.prepare/1: grey, dark on light'),
            'preprocess khmer_ocr.data.prepare/1, but this version',
        ),
        (dict(preprocess=None), 'preprocess None, but'),
        (dict(normal_form='other/7'), 'normal_form other/7, but'),
        (dict(height=48), 'says height 48, but'),
        (dict(model='pix2pix'), 'reads no lines'),
    ],
)
def test_other_preparation_is_refused(weights, tmp_path, change, says):
    "A checkpoint is not read in another way than it was trained"
    tensors, head = load_weights(weights)
    save_checkpoint(tmp_path / 'other.safetensors', tensors, head | change)
    with pytest.raises(KhmerOCRError, match=says) as e:
        Reader.load(tmp_path / 'other.safetensors')
    assert '\n' not in str(e.value)
    save_checkpoint(tmp_path / 'same.safetensors', tensors, head)
    open_model(tmp_path / 'same.safetensors')


def test_files(reader, tmp_path):
    "One bad file among many is reported in its place, the rest are read"
    for i in range(5):
        Image.fromarray(scribble(100 + 40 * i, i)).save(tmp_path / f'{i}.png')
    (tmp_path / '2.png').write_text('no image')
    (tmp_path / '3.png').write_bytes(b'')
    paths = [tmp_path / f'{i}.png' for i in range(6)]
    got = list(read_files(reader, iter(paths), portion=2))
    assert [p for p, _ in got] == paths
    assert [isinstance(r, KhmerOCRError) for _, r in got] == [False, False, True, True, False, True]
    assert same(got[4][1], reader.read([scribble(260, 4)])[0])


def test_the_command_takes_a_decoder(weights, writer, tmp_path):
    "`read --decoder` and `--lm`: one line an image, one line of complaint"

    def call(*args):
        return CliRunner().invoke(app, ['read', '--line', *map(str, args)])

    for i in range(2):
        Image.fromarray(scribble(100 + 40 * i, i)).save(tmp_path / f'{i}.png')
    files = [tmp_path / '0.png', tmp_path / '1.png']
    printed = {}
    for decoder in DECODERS:
        r = call('--model', weights, '--decoder', decoder, *files)
        printed[decoder] = r.stdout
        assert r.exit_code == 0
        assert r.stdout == ''.join(
            x.text + '\n' for x in Reader.load(weights, decoder=decoder).read([scribble(100), scribble(140, 1)])
        )
    assert printed['ctc'] == printed['greedy'] == call('--model', weights, *files).stdout
    assert call('--model', writer, *files).stdout.count('\n') == 2
    for args, says in (
        (('--model', writer, '--lm', 'ngram'), 'not a reader that writes'),
        (('--model', weights, '--decoder', 'greedy', '--lm', 'ngram'), 'not decoder greedy'),
        (('--model', weights, '--lm', tmp_path / 'none.safetensors'), 'not found'),
        (('--decoder', 'bema'), 'did you mean beam'),
    ):
        r = call(*args, *files)
        assert r.exit_code == 1, r.stderr
        assert says in r.stderr, r.stderr
        assert r.stderr.count('\n') == 1, r.stderr
        assert not r.stdout, r.stderr


def check_attention_map(reader, im):
    units, shares = reader.attention_map(im)
    (r,) = reader.read([im])
    assert shares.shape == (len(units), im.shape[1])
    assert units == [u for u, *_ in r.chars]
    assert np.allclose(shares.sum(1), 1, atol=1e-3)
    assert (shares >= 0).all()


def test_attention_maps(weights, lines):
    "One row for each unit that is read; rows sum to 1 and mark the place of the unit, on wide lines too"
    reader = Reader.load(weights)
    for im in (lines[0], lines[1], 255 - lines[3]):
        check_attention_map(reader, im)
    check_attention_map(Reader.load(weights, decoder='beam'), lines[1])
    wide = np.hstack([scribble(1500, i) for i in range(3)])
    units, shares = reader.attention_map(wide)
    assert shares.shape[1] == wide.shape[1]
    assert shares[-1].argmax() > 3000
    assert np.allclose(shares.sum(1), 1, atol=1e-3)
    assert reader.attention_map(np.full((40, 300), 255, np.uint8))[0] == []
    if 'fast' not in available_models():
        return
    font = find_fonts(split='train')[0]
    line = 255 - np.pad(render('ព្រះរាជាណាចក្រកម្ពុជា', font, 32).ink, 8)  # a line that it can read
    for row, (_, _, x0, x1) in zip(reader.attention_map(line)[1], reader.read([line])[0].chars):
        assert x0 - 8 <= row.argmax() <= x1 + 8


@pytest.mark.parametrize('decoder', ('greedy', 'beam'))
def test_attention_maps_of_a_decoder(writer, decoder):
    check_attention_map(Reader.load(writer, decoder=decoder), scribble(100))
