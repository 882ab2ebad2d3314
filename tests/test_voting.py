"Votes and means of readers: alignment, votes, readers without letters, wide lines, errors in one line"

import numpy as np, pytest, torch
from khmer_ocr.text.rules import rule_line
from khmer_ocr.models.ctc import CTCConfig, CTCNet, header
from khmer_ocr.text.tokenizers import SubscriptTokenizer
from khmer_ocr.inference.voting import (
    NULL,
    FileFunctionReader,
    MeanProbabilityReader,
    Rover,
    Candidate,
    vote_column,
    confusion_network,
    vote,
    split_prediction,
)
from khmer_ocr.inference.reader import Reader, Prediction
from khmer_ocr.models.attention import Seq2Seq, make_units
from khmer_ocr.models.attention_training import seq2seq_variant
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset, clusters, normalise

units = SubscriptTokenizer(charset('khmer-latin'))


def net(seed, **kw):
    torch.manual_seed(seed)
    return CTCNet(len(units), CTCConfig(**(dict(channels=(4, 4, 4, 4, 8), hidden=8, layers=1) | kw))).eval()


def reader(seed, **kw):
    n = net(seed, **kw)
    return Reader(n, units, header(n.config, units), dtype=torch.float32)


def image(i, width=160):
    return np.random.default_rng(i).integers(0, 255, (40, width)).astype(np.uint8)


texts = [normalise(rule_line(np.random.default_rng(i))) for i in range(30)]


def spoilt(text, rng, n=3):
    c = clusters(text)
    for _ in range(n):
        i = int(rng.integers(len(c)))
        how = rng.integers(3)
        if how == 0:
            c[i] = 'ខ'
        elif how == 1:
            c.insert(i, 'ឃ')
        elif len(c) > 1:
            del c[i]
    return ''.join(c)


def test_the_network_holds_every_reading():
    rng = np.random.default_rng(0)
    for t in texts:
        readings = [split_prediction(Prediction(spoilt(t, rng), 0.5)) for _ in range(4)]
        columns = confusion_network(readings)
        for k, reading in enumerate(readings):
            assert ''.join(column[k].text for column in columns) == ''.join(c.text for c in reading)


def test_three_readers_with_mistakes_in_other_places_are_right_together():
    rng = np.random.default_rng(1)
    errors = dict(alone=0, together=0)
    for t in texts:
        three = [Prediction(spoilt(t, rng, 1), 0.5) for _ in range(3)]
        errors['alone'] += three[0].text != t
        errors['together'] += vote(three, alpha=1.0).text != t
    assert errors['together'] <= errors['alone'] / 4
    assert errors['alone'] > 15


@pytest.mark.parametrize(
    'column, settings, winner',
    [
        ([Candidate('ក', 0.4), Candidate('ក', 0.4), Candidate('ខ', 0.9)], dict(alpha=1.0), 'ក'),
        ([Candidate('ក', 0.4), Candidate('ក', 0.4), Candidate('ខ', 0.9)], dict(alpha=0.0), 'ខ'),
        ([Candidate('ក', 0.4), NULL, NULL], dict(alpha=1.0), ''),
        ([Candidate('ក', 0.4), NULL], dict(null_confidence=0.3), 'ក'),
        ([Candidate('ក', 0.4), NULL], dict(null_confidence=0.6), ''),
    ],
)
def test_votes_and_confidences_decide_a_column(column, settings, winner):
    assert vote_column(column, **settings).text == winner


def test_readings_of_odd_text():
    "Units that begin with a subscript, spaces, and letters that normalising has moved"
    for r in (
        Prediction('្ម', 0.5, (('្ម', 0.5, 0, 9),)),
        Prediction('ក ខ', 0.5),
        Prediction('កា', 0.5, (('ា', 0.5, 0, 3), ('ក', 0.5, 3, 9))),
        Prediction('', 1.0),
    ):
        assert ''.join(w.text for w in split_prediction(r)) == r.text
        assert vote([r, r, r]).text == r.text


def test_equal_readers_vote_as_one():
    a = reader(1)
    images = [image(i) for i in range(5)]
    assert Rover([a, a]).read(images) == [Rover([a, a]).read([im])[0] for im in images]
    outside = FileFunctionReader(lambda paths: [r.text for r in a.read([image(i) for i in range(len(paths))])], 0.4)
    assert [(r.text, r.confidence) for r in outside.read(images)] == [(r.text, 0.4) for r in a.read(images)]
    assert Rover([a, outside]).read([]) == []
    with pytest.raises(KhmerOCRError, match='at least one'):
        Rover([])


def test_the_mean_of_a_reader_and_its_double_is_the_reader():
    a, wide = reader(1), [image(i, 100 + 400 * i) for i in range(8)]  # the last ones go in windows
    one, two = a.read(wide), MeanProbabilityReader([a, a]).read(wide)
    assert [r.text for r in one] == [r.text for r in two]
    assert np.allclose([r.confidence for r in one], [r.confidence for r in two], atol=1e-4)
    for r, s in zip(one, two):
        assert [c[2:] for c in r.chars] == [c[2:] for c in s.chars]


@pytest.mark.parametrize(
    'shape', [dict(stride=2), dict(stride=8), dict(height=48), dict(height=32, stride=8), dict(encoder='attention')]
)
def test_readers_of_any_shape_have_a_mean(shape):
    a, b = reader(1), reader(2, **shape)
    for pair in ((a, b), (b, a)):
        m = MeanProbabilityReader(list(pair))
        x = torch.rand(2, 1, m.height, 96)
        with torch.inference_mode():
            p = m.net(x, torch.tensor([96, 64])).exp()
        assert p.shape == (2, m.net.lengths(96), len(units))
        assert torch.allclose(p.sum(-1), torch.ones(p.shape[:2]), atol=1e-3)
        assert [r.text for r in m.read([image(0), image(1, 90)])] == [
            m.read([im])[0].text for im in (image(0), image(1, 90))
        ]


def test_readers_that_cannot_be_averaged():
    config = seq2seq_variant('buoy2022').config
    theirs = make_units(config)
    writes = Reader(Seq2Seq(len(theirs), config), theirs, dict(height=config.height))
    with pytest.raises(KhmerOCRError, match='vote on texts'):
        MeanProbabilityReader([reader(1), writes])
    with pytest.raises(KhmerOCRError, match='as many numbers'):
        MeanProbabilityReader([reader(1), reader(2)], [1, -1])
    latin = SubscriptTokenizer(charset('buoy2022'))
    n = CTCNet(len(latin), net(0).config).eval()
    with pytest.raises(KhmerOCRError, match='no unit for'):
        MeanProbabilityReader([reader(1), Reader(n, latin, header(n.config, latin))])
