"Tokenizers: each gives back what it encodes, keeps its numbers in a checkpoint, refuses by name what it cannot write"

import json

import numpy as np
import pytest
import torch

from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.models.attention_training import as_targets
from khmer_ocr.text.khmer import COENG, charset, clusters, normalise, random_runs
from khmer_ocr.text.rules import rule_line
from khmer_ocr.text.tokenizers import (
    TOKENIZERS,
    ClusterTokenizer,
    SubscriptTokenizer,
    SymbolTokenizer,
    frequent_clusters,
    make_tokenizer,
    tokenizer_from_dict,
    train_subwords,
)
from khmer_ocr.training.checkpoints import load_weights, save_checkpoint

lines = [rule_line(np.random.default_rng(i)) for i in range(600)]


def make(kind, algorithm='bpe'):
    return make_tokenizer(kind, lines if algorithm == 'bpe' else lines[:100], size=400, algorithm=algorithm)


four = {k: make(k) for k in TOKENIZERS}
each = pytest.mark.parametrize('t', four.values(), ids=four)


@each
def test_what_is_encoded_comes_back(t):
    cs, rng = charset(), np.random.default_rng(5)
    wild = [s for s in map(normalise, random_runs(2000, rng)) if set(s) <= set(cs.symbols)]
    # no normal form at all: still nothing may be lost
    noise = [''.join(rng.choice(list(cs.symbols), int(n))) for n in rng.integers(0, 30, 500)]
    assert len(wild) > 500
    for s in ['', ' ', '  a  b  ', 'ក', COENG, 'ស្ត្រី', *lines, *wild, *noise, *cs.symbols]:
        ids = t.encode(s)
        assert t.decode(ids) == s
        assert ''.join(t.split(s)) == s
        assert all(0 < i < len(t) for i in ids)


@each
def test_ids_are_whole_and_distinct(t):
    assert len(t) == len(t.units) == len(set(t.units))
    assert (t.units[0], t.blank, t.end) == ('', 0, 0)
    assert isinstance(t.encode('កា')[0], int) and set(charset().symbols) <= set(t.units)
    ids, n = as_targets(t, ['ខ្មែរ', 'ក'])
    assert ids.dtype == torch.int64 and ids.shape == (2, int(n.max()) + 1)
    assert ids[1, n[1] :].eq(t.end).all()


@each
def test_it_goes_through_a_checkpoint(t, tmp_path):
    save_checkpoint(tmp_path / 'a.safetensors', {'w': torch.zeros(1)}, dict(targets=t.to_dict()))
    again = tokenizer_from_dict(load_weights(tmp_path / 'a.safetensors')[1]['targets'])
    assert type(again) is type(t) and again.units == t.units and again.charset == t.charset
    assert all(again.encode(s) == t.encode(s) for s in lines[:200])
    assert again.to_dict() == t.to_dict()


@each
def test_unknown_characters_are_named_in_one_line(t):
    for s, name in (('ក漢', 'U+6F22'), ('a▁b', 'U+2581'), ('ក\n', 'U+000A')):
        with pytest.raises(KhmerOCRError, match=name.replace('+', r'\+')) as e:
            t.encode(s)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind,algorithm', [*((k, 'bpe') for k in TOKENIZERS), ('subwords', 'unigram')])
def test_the_same_lines_give_the_same_bytes(kind, algorithm):
    first, second = (json.dumps(make(kind, algorithm=algorithm).to_dict()) for _ in range(2))
    assert first == second


def test_subscripts_are_the_units_of_the_readers():
    assert make('subscripts').units == SubscriptTokenizer(charset()).units


def test_numbers_are_those_of_the_checkpoints_that_exist():
    "The networks that ship name units by number: 183 characters from 1, then 49 subscripts; Buoy's from 2"
    subscripts = SubscriptTokenizer(charset())
    assert subscripts.units[:4] == ('', 'ក', 'ខ', 'គ') and subscripts.units[184:186] == ('្ក', '្ខ')
    assert len(subscripts) == 1 + 183 + 49
    buoy = SymbolTokenizer(charset('buoy2022'))
    assert buoy.units[:4] == ('', '', '០', '១') and len(buoy) == 117
    assert buoy.encode('ក') == charset('buoy2022').encode('ក')


def test_symbols_have_an_end_of_their_own():
    buoy = SymbolTokenizer(charset('buoy2022'))
    ids, n = as_targets(buoy, ['កខ', 'ក'])
    assert (buoy.blank, buoy.end) == (0, 1)
    assert ids.tolist() == [[*buoy.encode('កខ'), 1], [*buoy.encode('ក'), 1, 1]] and n.tolist() == [2, 1]
    again = tokenizer_from_dict(buoy.to_dict())
    assert again.units == buoy.units and again.charset == buoy.charset and again.end == 1
    assert len(SymbolTokenizer(charset())) == len(charset()) + 2  # a charset without <sos> and <eos> gets them


def test_clusters_by_frequency_and_longest_match():
    assert frequent_clusters(['ខេគីកាកា', 'គី'], 9) == ['កា', 'គី', 'ខេ']
    t = ClusterTokenizer(charset(), ['ស្ត', 'ស្ត្រ', 'កា'])
    assert t.split('ស្ត្រីស្តាកាំ') == ['ស្ត្រ', 'ី', 'ស្ត', 'ា', 'កា', 'ំ']
    assert t.split('ស្ក្រ') == ['ស', '្ក', '្រ']
    assert t.units[: len(t.small)] == t.small.units == SubscriptTokenizer(charset()).units
    big = make_tokenizer('clusters', lines, size=10**6)
    for line in lines:
        assert all(len(c) == 1 or c in big.units for c in clusters(line))
        assert len(big.encode(line)) == len(clusters(line))


def test_a_small_corpus_has_fewer_pieces():
    for algorithm in ('unigram', 'bpe'):
        for texts in (['ក'], ['កា', 'ខា'], ['a b']):
            t = make_tokenizer('subwords', texts, size=5000, algorithm=algorithm)
            assert len(charset()) < len(t) < 300
            assert all(t.decode(t.encode(c)) == c for c in charset().symbols)


def test_digits_stay_alone():
    for algorithm in ('unigram', 'bpe'):
        t = make_tokenizer('subwords', ['ឆ្នាំ២០២៦ 2026'] * 50 + lines[:100], size=400, algorithm=algorithm)
        assert t.split('២០២៦2026') == list('២០២៦2026')
        assert not [u for u in t.units if len(u) > 1 and set(u) & set('0123456789០១២៣៤៥៦៧៨៩')]


def test_a_charset_from_the_texts():
    t = make_tokenizer('characters', ['ab', 'bc '], symbols=None)
    assert t.units == ('', ' ', 'a', 'b', 'c')
    t = make_tokenizer('subwords', ['the cat sat on the mat', 'the hat'] * 20, symbols=None, size=40, algorithm='bpe')
    assert t.decode(t.encode('the mat')) == 'the mat' and len(t.encode('the')) < 3
    # a line that the charset cannot write is left out
    assert make_tokenizer('clusters', ['កា', 'カ'], size=5).inventory == ('កា',)


def test_mistakes_get_one_line():
    good = make('subwords').to_dict()
    for call, say in (
        (lambda: make_tokenizer('subword', lines), 'did you mean subwords'),
        (lambda: make_tokenizer('clusters'), 'give the lines'),
        (lambda: make_tokenizer('characters', symbols=None), 'give the lines'),
        (lambda: make_tokenizer('subwords', ['カ']), 'No line'),
        (lambda: make_tokenizer('subwords', lines, size=50), 'cannot hold'),
        (lambda: train_subwords(lines, charset(), 400, 'bp'), 'did you mean bpe'),
        (lambda: tokenizer_from_dict({}), 'None'),
        (lambda: tokenizer_from_dict(dict(kind='clusters', symbols=['a'])), 'damaged'),
        (lambda: tokenizer_from_dict(good | dict(model='?')), 'damaged'),
        (lambda: tokenizer_from_dict(good | dict(model='AAAA')), 'damaged'),
        (lambda: tokenizer_from_dict(good | dict(symbols=['é'])), 'another charset'),
    ):
        with pytest.raises(KhmerOCRError, match=say) as e:
            call()
        assert '\n' not in str(e.value)


def test_a_charset_with_specials():
    for k in TOKENIZERS:
        t = make_tokenizer(k, ['កា ខា', 'ស្ត្រី'] * 40, symbols='buoy2022', size=200, algorithm='bpe')
        assert t.decode(t.encode('ស្ត្រី កា')) == 'ស្ត្រី កា'
        assert len(t.units) == len(set(t.units))
