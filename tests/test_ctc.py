"The CTC reader: resume to the same weights, warm restart, checkpoints of others refused."

import pytest, torch
from khmer_ocr.models.ctc import CTCConfig, CTCNet, load_ctc
from khmer_ocr.models.ctc_training import CTCLoss, train_ctc
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.models.decoding import greedy_ctc
from khmer_ocr.models.release import release
from khmer_ocr.data.batching import as_input, collate
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset, normalise
import numpy as np

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រ', 'ភ្នំពេញ', 'សុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]
tiny = CTCConfig(channels=(4, 4, 4, 4, 8), hidden=8, layers=2)


def loop(steps, **kw):
    return TrainConfig(
        steps=steps,
        batch_size=2,
        log_every=1,
        eval_every=100,
        save_every=100,
        precision='32-true',
        tensorboard=False,
        **kw,
    )


def train(out, steps=6, **kw):
    return train_ctc(out, Recipe(random_text=True, seed=4), loop(steps), tiny, texts=texts, pool=2, verbose=False, **kw)


def weights(path):
    return load_ctc(path)[0].state_dict()


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
    a, b = weights(tmp_path / 'whole/latest.safetensors'), weights(tmp_path / 'parts/latest.safetensors')
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_warm_restart_begins_with_the_weights(tmp_path):
    train(tmp_path / 'a', 2)
    got = {}

    class Look(Callback):
        def before_fit(self, learn):
            got.update({k: v.clone() for k, v in learn.model.state_dict().items()})

    train(tmp_path / 'b', 1, init=tmp_path / 'a/latest.safetensors', callbacks=[Look()])
    want = weights(tmp_path / 'a/latest.safetensors')
    assert got and all(torch.equal(want[k.removeprefix('_forward_module.')], v) for k, v in got.items())


def test_padding_reaches_no_further_than_the_windows_of_the_convolutions():
    "White on the right of a line changes only the last frames before the LSTM, not those further in"
    torch.manual_seed(0)
    net = CTCNet(50, tiny).eval()
    im = np.random.default_rng(0).integers(0, 255, (40, 160)).astype(np.uint8)
    a, b = collate([(im, '')]), collate([(im, ''), (np.full((40, 320), 255, np.uint8), '')])
    with torch.inference_mode():
        fa, fb = net.look(as_input(a['images'])), net.look(as_input(b['images']))[:1]
    assert torch.allclose(fa[..., :30], fb[..., :30], atol=1e-6) and fa.shape[-1] == 40


def test_units_round_trip():
    for name in ('khmer-latin', 'buoy2022'):
        u = SubscriptTokenizer(charset(name))
        for t in texts:
            assert u.decode(u.encode(t)) == t
    assert len(SubscriptTokenizer(charset()).encode('្ត្រ')) == 2
    with pytest.raises(KhmerOCRError, match='U\\+6F22'):
        SubscriptTokenizer(charset()).encode('ក漢')


def test_loss_is_finite_where_a_line_has_too_few_frames():
    u = SubscriptTokenizer(charset())
    net = CTCNet(len(u), tiny)
    loss = CTCLoss(u)(
        net, collate([(np.zeros((40, 8), np.uint8), texts[0] * 4), (np.zeros((40, 200), np.uint8), texts[1])])
    )
    assert loss.isfinite() and loss > 0


def test_greedy_drops_repeats_and_blanks():
    x = torch.full((1, 7, 4), -9.0)
    x[0, range(7), [1, 1, 0, 1, 2, 2, 3]] = 9.0
    ((ids, conf, at),) = greedy_ctc(x, [7])
    assert ids == [1, 1, 2, 3] and at == [0, 3, 4, 6] and all(0.99 < c <= 1 for c in conf)


def test_foreign_checkpoints(tmp_path):
    save_checkpoint(tmp_path / 'gan.safetensors', {'w': torch.ones(2)}, dict(model='dcgan'))
    with pytest.raises(KhmerOCRError, match='dcgan'):
        load_ctc(tmp_path / 'gan.safetensors')
    with pytest.raises(KhmerOCRError, match='holds no reader'):
        release(tmp_path / 'gan.safetensors', tmp_path / 'out.safetensors')
    assert not (tmp_path / 'out.safetensors').exists()
    train(tmp_path / 'm', 1)
    whole = (tmp_path / 'm/latest.safetensors').read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KhmerOCRError, match='truncated'):
        load_ctc(tmp_path / 'cut.safetensors')
