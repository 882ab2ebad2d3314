"Self-training: which lines are kept, labels as files, rounds that are resumed to the same weights, one-line errors."

import cv2
import numpy as np
import pytest
import torch

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


def noise_images(folder, n=6):
    folder.mkdir()
    paths = [folder / f'{i}.png' for i in range(n)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 255, (40, 80 + 20 * i))
        cv2.imwrite(str(path), noise.astype(np.uint8))
    return paths


class FixedReader:
    "A reader that gives these predictions, one after the other"

    def __init__(self, *predictions):
        self.predictions = list(predictions)

    def read(self, images, batch_size=32):
        return [self.predictions.pop(0) for _ in images]


def with_confidence(c, text='ក'):
    return Prediction(text, c, tuple((unit, c, 0, 1) for unit in text))


six = [
    with_confidence(0.5),
    Prediction('', 1.0),
    with_confidence(0.9, 'កខ'),
    Prediction(' ', 0.99),
    Prediction('គ', 0.8),
    with_confidence(0.7),
]


@pytest.mark.parametrize('keep, kept', [(0.5, [2, 4]), (1.0, [0, 2, 4, 5])])
def test_the_most_confident_lines_with_text_are_kept(keep, kept):
    assert most_confident(six, keep) == kept


def test_confidence_of_a_line():
    assert most_confident([], 0.5) == []
    assert line_confidence(Prediction('', 1.0)) == 0
    assert line_confidence(Prediction('ក', 0.0, (('ក', 0.0, 0, 1),))) > 0


@pytest.mark.parametrize('keep', (0, -1, 1.5))
def test_a_share_that_cannot_be_kept(keep):
    with pytest.raises(KhmerOCRError, match='above 0'):
        most_confident(six, keep)


def test_labels_as_files(tmp_path):
    paths = noise_images(tmp_path / 'a')
    bad = tmp_path / 'a/bad.png'
    bad.write_bytes(b'x')
    reader = FixedReader(*(with_confidence(c) for c in (0.1, 0.9, 0.2, 0.8, 0.3, 0.7)))
    labels = tmp_path / 'deep/er/labels.tsv'
    assert write_pseudo_labels(reader, [*paths, bad], labels, 0.5) == 3
    rows = read_labels(labels)
    assert [path.resolve() for path, *_ in rows] == [paths[i] for i in (1, 3, 5)]
    assert [columns['confidence'] for *_, columns in rows] == ['0.9000', '0.8000', '0.7000']
    assert len(LineFolder(tmp_path / 'deep/er')) == 3


def test_lines_without_text_give_no_labels(tmp_path):
    paths = noise_images(tmp_path / 'a')
    reader = FixedReader(*[Prediction('', 1.0)] * 6)
    with pytest.raises(KhmerOCRError, match='None of the 6 lines') as e:
        write_pseudo_labels(reader, paths, tmp_path / 'no/labels.tsv')
    assert '\n' not in str(e.value)
    assert not (tmp_path / 'no').exists()


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
    paths = noise_images(tmp_path / 'p')
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

    def run(out, **kwargs):
        return self_train(
            tmp_path / 'a.safetensors',
            paths,
            tmp_path / out,
            Recipe(random_text=True, seed=4),
            loop,
            keep=(0.5, 1.0),
            texts=texts,
            pool=2,
            verbose=False,
            **kwargs,
        )

    whole = run('whole')
    assert whole == tmp_path / 'whole/round2/best.safetensors'
    with pytest.raises(KhmerOCRError, match='Round 1 stopped at step 2'):
        run('parts', callbacks=[StopAt(2)])
    expected = load_ctc(whole)[0].state_dict()
    resumed = load_ctc(run('parts'))[0].state_dict()
    assert all(torch.equal(weight, resumed[name]) for name, weight in expected.items())
    first_round = tmp_path / 'whole/round1/best.safetensors'
    before = first_round.stat().st_mtime_ns
    run('whole')
    assert first_round.stat().st_mtime_ns == before  # a finished round is not done again
    assert [len(read_labels(tmp_path / f'whole/round{n}')) for n in (1, 2)] == [3, 6]
