"Self-training: which lines are believed, labels as files, rounds that are resumed to the same weights, mistakes in one line."

import cv2, numpy as np, pytest, torch
from khmer_ocr.experiments.self_training import line_confidence, most_confident, self_train, write_pseudo_labels
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header, load_ctc
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.data.datasets import LineFolder, read_labels
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.inference.reader import Prediction
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset, normalise
from khmer_ocr.training.settings import TrainConfig

texts = [normalise(t) for t in ('ព្រះរាជាណាចក្រ', 'ភ្នំពេញ', 'សុខសប្បាយទេ?', 'ឆ្នាំ២០២៥')]


def pages(folder, n=6):
    folder.mkdir()
    paths = [folder / f'{i}.png' for i in range(n)]
    for i, p in enumerate(paths):
        cv2.imwrite(str(p), np.random.default_rng(i).integers(0, 255, (40, 80 + 20 * i)).astype(np.uint8))
    return paths


class Says:
    def __init__(self, *readings):
        self.readings = list(readings)

    def read(self, images, batch_size=32):
        return [self.readings.pop(0) for _ in images]


def sure(c, text='ក'):
    return Prediction(text, c, tuple((u, c, 0, 1) for u in text))


def test_believed_are_the_surest_that_say_something():
    said = [sure(0.5), Prediction('', 1.0), sure(0.9, 'កខ'), Prediction(' ', 0.99), Prediction('គ', 0.8), sure(0.7)]
    assert (
        most_confident(said, 0.5) == [2, 4]
        and most_confident(said, 1.0) == [0, 2, 4, 5]
        and most_confident([], 0.5) == []
    )
    assert line_confidence(Prediction('ក', 0.0, (('ក', 0.0, 0, 1),))) > 0
    for keep in (0, -1, 1.5):
        with pytest.raises(KhmerOCRError, match='above 0'):
            most_confident(said, keep)


def test_labels_as_files(tmp_path):
    paths = pages(tmp_path / 'a')
    (tmp_path / 'a/bad.png').write_bytes(b'x')
    n = write_pseudo_labels(
        Says(*(sure(c) for c in (0.1, 0.9, 0.2, 0.8, 0.3, 0.7))),
        [*paths, tmp_path / 'a/bad.png'],
        tmp_path / 'deep/er/labels.tsv',
        0.5,
    )
    rows = read_labels(tmp_path / 'deep/er/labels.tsv')
    assert n == 3 and [p.resolve() for p, *_ in rows] == [paths[i] for i in (1, 3, 5)]
    assert [f['confidence'] for *_, f in rows] == ['0.9000', '0.8000', '0.7000'] and len(
        LineFolder(tmp_path / 'deep/er')
    ) == 3
    with pytest.raises(KhmerOCRError, match='None of the 6 lines') as e:
        write_pseudo_labels(Says(*[Prediction('', 1.0)] * 6), paths, tmp_path / 'no/labels.tsv')
    assert '\n' not in str(e.value) and not (tmp_path / 'no').exists()


class StopAt(Callback):
    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step == self.n:
            raise CancelFit


def test_rounds_are_resumed(tmp_path):
    units = SubscriptTokenizer(charset('khmer-latin'))
    torch.manual_seed(0)
    net = CTCNet(len(units), CTCConfig(channels=(4, 4, 4, 4, 8), hidden=8, layers=1))
    net.classifier.bias.data[5] = 4.0
    save_checkpoint(tmp_path / 'a.safetensors', net.state_dict(), header(net.config, units))
    paths = pages(tmp_path / 'p')
    loop = TrainConfig(
        steps=3,
        batch_size=2,
        lr=1e-4,
        log_every=1,
        eval_every=100,
        save_every=100,
        precision='32-true',
        tensorboard=False,
    )
    go = lambda out, **kw: self_train(
        tmp_path / 'a.safetensors',
        paths,
        tmp_path / out,
        Recipe(random_text=True, seed=4),
        loop,
        keep=(0.5, 1.0),
        texts=texts,
        pool=2,
        verbose=False,
        **kw,
    )
    whole = go('whole')
    assert whole == tmp_path / 'whole/round2/best.safetensors'
    with pytest.raises(KhmerOCRError, match='Round 1 stopped at step 2'):
        go('parts', callbacks=[StopAt(2)])
    a, b = (load_ctc(p)[0].state_dict() for p in (whole, go('parts')))
    assert all(torch.equal(a[k], b[k]) for k in a)
    before = (tmp_path / 'whole/round1/best.safetensors').stat().st_mtime_ns
    go('whole')
    assert (tmp_path / 'whole/round1/best.safetensors').stat().st_mtime_ns == before
    assert [len(read_labels(tmp_path / f'whole/round{n}')) for n in (1, 2)] == [3, 6]
