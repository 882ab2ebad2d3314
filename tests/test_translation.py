"""Parallel text: number words both ways, real dates, names of the gazetteer, held-out combinations that stay out,
English labels under Khmer images, and a recogniser that writes English."""

import calendar
import datetime
import itertools
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.experiments import parallel_text
from khmer_ocr.experiments.parallel_text import (
    NUMBER_LIMIT,
    RULES,
    SentencePair,
    SentencePairs,
    english_words,
    khmer_value,
    khmer_words,
    pair_split,
)
from khmer_ocr.experiments.translation import (
    ENGLISH,
    KhmerTexts,
    ParallelLines,
    english_tokenizer,
    parallel_batches,
    train_translator,
    translation_scores,
    translator_variant,
)
from khmer_ocr.inference.reader import Reader
from khmer_ocr.models.transformer import ImageToText
from khmer_ocr.models.transformer_training import init_image_to_text, load_image_to_text
from khmer_ocr.models.zoo import available_models, train_recogniser
from khmer_ocr.synth.generator import LineGenerator, Recipe
from khmer_ocr.text.khmer import charset, normalise
from khmer_ocr.text.rules import lunar_year
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.checkpoints import save_checkpoint

# fmt: off
edges = [
    0, 9, 10, 19, 20, 21, 99, 100, 101, 110, 999, 1000, 1001, 9999, 10_000, 10_001, 99_999, 100_000, 999_999, 10**6,
    10**6 + 1, 10**9, 10**11, NUMBER_LIMIT - 1,
]
# fmt: on
to_latin_digits = str.maketrans('០១២៣៤៥៦៧៨៩', '0123456789')


def sample(n=4000, top=10**6 + 1):
    return np.random.default_rng(1).integers(0, top, n).tolist()


english_small = '''zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen'''.split()
english_tens = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()


def english_value(words):
    "English words back to a number, by another way than they were made"
    small = {word: n for n, word in enumerate(english_small)}
    small |= {word: 10 * n for n, word in enumerate(english_tens, 2)}
    large = dict(thousand=10**3, million=10**6, billion=10**9)
    total = part = 0
    for word in words.replace('-', ' ').split():
        if word == 'hundred':
            part *= 100
        elif word in large:
            total += part * large[word]
            part = 0
        else:
            part += small[word]
    return total + part


def test_number_words_both_ways():
    for n in itertools.chain(range(2001), edges, sample(), sample(500, NUMBER_LIMIT)):
        words = khmer_words(n)
        assert khmer_value(words) == n
        assert normalise(words) == words
        assert english_value(english_words(n)) == n
    assert len({khmer_words(n) for n in range(20_000)}) == 20_000


@pytest.mark.parametrize(
    'n,words',
    [
        (5, 'ប្រាំ'),
        (7, 'ប្រាំពីរ'),
        (8, 'ប្រាំបី'),
        (9, 'ប្រាំបួន'),
        (11, 'ដប់មួយ'),
        (20, 'ម្ភៃ'),
        (30, 'សាមសិប'),
        (44, 'សែសិបបួន'),
        (55, 'ហាសិបប្រាំ'),
        (66, 'ហុកសិបប្រាំមួយ'),
        (70, 'ចិតសិប'),
        (80, 'ប៉ែតសិប'),
        (90, 'កៅសិប'),
        (105, 'មួយរយប្រាំ'),
        (2005, 'ពីរពាន់ប្រាំ'),
        (10_500, 'មួយម៉ឺនប្រាំរយ'),
        (100_000, 'មួយសែន'),
        (1_250_000, 'មួយលានពីរសែនប្រាំម៉ឺន'),
        (25 * 10**6, 'ម្ភៃប្រាំលាន'),
        (10**9, 'មួយពាន់លាន'),
    ],
)
def test_number_words_that_people_write(n, words):
    assert khmer_words(n) == words
    assert khmer_value(words) == n


@pytest.mark.parametrize('wrong', [-1, NUMBER_LIMIT, 1.5, '5', True, None])
def test_what_is_no_number(wrong):
    for in_words in (khmer_words, english_words):
        with pytest.raises(KhmerOCRError, match='whole number'):
            in_words(wrong)


@pytest.mark.parametrize('wrong', ['', 'ពាន់', 'មួយពាន់ ', 'ពីរមួយ', 'two', 'លានលាន'])
def test_words_that_are_no_number(wrong):
    with pytest.raises(KhmerOCRError, match='no Khmer number'):
        khmer_value(wrong)


splits = ('train', 'val', 'test')


def first_pairs(split, rule, n=1500):
    pairs = SentencePairs(split, (rule,), seed=7)
    return [pairs[i] for i in range(n)]


pairs = {split: {rule: first_pairs(split, rule) for rule in RULES} for split in splits}


def all_pairs(rule):
    return itertools.chain.from_iterable(pairs[split][rule] for split in splits)


@pytest.mark.parametrize('rule', RULES)
def test_pairs_are_in_normal_form_and_can_be_written(rule):
    khmer_symbols = frozenset(charset().symbols)
    english_symbols = frozenset(ENGLISH.symbols)
    for pair in all_pairs(rule):
        assert normalise(pair.khmer) == pair.khmer
        assert normalise(pair.english) == pair.english
        assert khmer_symbols.issuperset(pair.khmer)
        assert english_symbols.issuperset(pair.english)
        assert 0 < len(pair.khmer) <= 110
        assert pair.english
        assert pair.rule == rule


@pytest.mark.parametrize('split', splits)
def test_pairs_belong_to_the_split_that_was_asked_for(split):
    for rule in RULES:
        assert {pair_split(pair) for pair in pairs[split][rule]} == {split}


@pytest.mark.parametrize('rule', RULES)
def test_one_khmer_line_has_one_english(rule):
    known = {}
    for pair in all_pairs(rule):
        assert known.setdefault(pair.khmer, pair.english) == pair.english


months = '|'.join(calendar.month_name[1:])


def days(split):
    found = (re.search(rf'\d+ (?:{months})', pair.english) for pair in pairs[split]['dates'])
    return {match[0] for match in found}


def moons(split):
    found = (re.search(r'\d+\w\w w\w+ day of \w+', pair.english) for pair in pairs[split]['lunar'])
    return {match[0] for match in found}


def ranges(split):
    found = set()
    for pair in pairs[split]['numbers'] + pairs[split]['money']:
        digits = re.sub(r'\D', '', pair.english) or str(english_value(pair.english))
        if len(digits) > 2:
            found.add((len(digits), digits[:3]))
    return found


def streets(split):
    found = (re.search(r'(Street \d+|\w+ Boulevard).*Khan ([\w ]+)', p.english) for p in pairs[split]['addresses'])
    return {match.groups() for match in found if match}


def villages(split):
    found = (re.match(r'(.*\d), (.* District),', pair.english) for pair in pairs[split]['addresses'])
    return {match.groups() for match in found if match}


@pytest.mark.parametrize('combinations', (days, moons, ranges, streets, villages))
def test_held_out_combinations_by_the_english_alone(combinations):
    "Not by the keys: what a person would compare"
    found = {split: combinations(split) for split in splits}
    assert min(len(some) for some in found.values()) > 15
    for a, b in itertools.combinations(splits, 2):
        assert not found[a] & found[b], (a, b)


def english_vocabulary(split):
    words = set()
    for rule in RULES:
        for pair in pairs[split][rule]:
            words.update(re.findall('[A-Za-z]+', pair.english))
    return words


def test_the_parts_of_what_is_held_out_are_in_training():
    assert english_vocabulary('val') | english_vocabulary('test') <= english_vocabulary('train')


def date_of(english):
    "(datetime.date, weekday or None)"
    weekday, day, month, year, buddhist = re.search(r'(?:(\w+day), )?(\d+) ([A-Z]\w+) (\d+)( BE)?$', english).groups()
    year = int(year) - (543 if buddhist else 0)
    return datetime.date(year, list(calendar.month_name).index(month), int(day)), weekday


def test_dates_are_of_the_calendar():
    with_weekday = 0
    for pair in pairs['train']['dates']:
        date, weekday = date_of(pair.english)
        if weekday:
            assert calendar.day_name[date.weekday()] == weekday
            assert parallel_text._khmer_weekdays[date.weekday()] in pair.khmer
            with_weekday += 1
        in_digits = re.search(r'(\d\d)[/.-](\d\d)[/.-](\d{4})$', pair.khmer.translate(to_latin_digits))
        if in_digits:
            assert [int(part) for part in in_digits.groups()] == [date.day, date.month, date.year]
        else:
            assert f'ខែ{parallel_text._khmer_months[date.month - 1]} ' in pair.khmer
        in_words = re.search('ទី([ក-៓]+) ខែ[ក-៓]+ ឆ្នាំ([ក-៓]+)$', pair.khmer)
        if in_words:
            assert [khmer_value(words) for words in in_words.groups()] == [date.day, date.year]
    assert with_weekday > 100


def test_years_of_the_lunar_calendar():
    "2025 was the year of the Snake, seventh of its decade, 2569; 2012 the Dragon, fourth, 2556"
    assert lunar_year(2025) == 'ឆ្នាំម្សាញ់ សប្តស័ក ព.ស. ២៥៦៩'
    assert lunar_year(2012) == 'ឆ្នាំរោង ចត្វាស័ក ព.ស. ២៥៥៦'


khmer_animals = 'ជូត ឆ្លូវ ខាល ថោះ រោង ម្សាញ់ មមី មមែ វក រកា ច កុរ'.split()
khmer_decade = 'ឯកស័ក ទោស័ក ត្រីស័ក ចត្វាស័ក បញ្ចស័ក ឆស័ក សប្តស័ក អដ្ឋស័ក នព្វស័ក សំរឹទ្ធិស័ក'.split()
english_lunar = re.compile(r'\w+, (\d+)\w+ (\w+) day of (\w+), Year of the (\w+), (\d+)\w+ of the decade, (\d+) BE$')


def test_lunar_dates_say_the_same_in_both_languages():
    animals = dict(zip(khmer_animals, parallel_text._animals))
    for pair in pairs['train']['lunar']:
        khmer_animal, khmer_year, khmer_era = re.search(r'ឆ្នាំ(\S+) (\S+) ព\.ស\. (\S+)$', pair.khmer).groups()
        day, phase, month, animal, year, era = english_lunar.search(pair.english).groups()
        assert animals[khmer_animal] == animal
        assert khmer_decade.index(khmer_year) + 1 == int(year)
        assert khmer_era.translate(to_latin_digits) == era
        assert int(day) <= (15 if phase == 'waxing' else 14)
        assert ('កើត' in pair.khmer) == (phase == 'waxing')
        assert parallel_text._lunar_months[re.search('ខែ(\\S+)', pair.khmer)[1]] == month


def value_of_sum(khmer):
    "(kind, the number that the Khmer of a sum of money says); no number where it is in words"
    text = khmer.translate(to_latin_digits)
    units = dict(ម៉ឺន=10**4, សែន=10**5, លាន=10**6)
    in_units = re.search('([0-9]+) ?(ម៉ឺន|សែន|លាន)', text)
    if in_units:
        return in_units[2], int(in_units[1]) * units[in_units[2]]
    in_digits = re.search('[0-9][0-9.,]*', text)
    if in_digits:
        return 'digits', int(re.sub('[.,]', '', in_digits[0]))
    return 'words', None


def test_sums_of_money():
    kinds = set()
    for pair in pairs['train']['money']:
        n = int(re.sub(r'\D', '', pair.english))
        kind, value = value_of_sum(pair.khmer)
        kinds.add(kind)
        assert value == n or (kind == 'words' and khmer_words(n) in pair.khmer)
        assert pair.english.endswith('riels') == ('៛' in pair.khmer or 'រៀល' in pair.khmer)
        assert pair.english.endswith('US dollars') == ('អាមេរិក' in pair.khmer)
    assert kinds == {'ម៉ឺន', 'សែន', 'លាន', 'digits', 'words'}


def gazetteer_names():
    for khan, quarters in parallel_text._khans:
        yield khan
        yield from (quarter for quarter, _ in quarters)
    for place in parallel_text._communes:
        yield from place


def test_names_of_places():
    for name in gazetteer_names():
        assert normalise(name.khmer) == name.khmer
        assert re.fullmatch("[A-Z][A-Za-z' ]+", name.english)


province_address = re.compile(r'(No\. \d+|National Road [1-8]), .+ Commune, .+ District, .+ Province')
capital_address = re.compile(r'(No\. \d+, )?(Street \d+|.+ Boulevard), Sangkat .+, Khan [^,]+(, Phnom Penh)?')


def test_addresses():
    for pair in pairs['train']['addresses'][:400]:
        if 'Province' in pair.english:
            assert province_address.fullmatch(pair.english)
            assert 'ខេត្ត' in pair.khmer
        else:
            assert capital_address.fullmatch(pair.english)
            assert ('រាជធានីភ្នំពេញ' in pair.khmer) == pair.english.endswith('Phnom Penh')


def test_pairs_by_seed_split_and_number():
    a = SentencePairs(seed=3)
    assert [a[i] for i in (5, 0, 5)] == [SentencePairs(seed=3)[i] for i in (5, 0, 5)]
    assert len({a[5], SentencePairs(seed=4)[5], SentencePairs('val', seed=3)[5]}) == 3
    assert pickle.loads(pickle.dumps(a))[9] == a[9]
    assert [a[i].rule for i in range(5)] == list(RULES)
    assert len(KhmerTexts(a)) == len(a)
    assert pair_split(SentencePair('', '')) == 'train'


def keyless_pair(rng):
    return SentencePair('ក', 'a')


def test_pairs_that_cannot_be_made():
    with pytest.raises(KhmerOCRError, match='did you mean dates'):
        SentencePairs(rules=('dats',))
    with pytest.raises(KhmerOCRError, match='keys'):
        SentencePairs('val', dict(x=keyless_pair))[0]
    with pytest.raises(IndexError):
        SentencePairs(length=3)[3]


recipe = Recipe(families=('Noto Sans Khmer',), preset='document', seed=2)


def test_images_of_khmer_with_english_labels():
    lines = ParallelLines(recipe, SentencePairs())
    image, text = lines.sample(4)
    assert text == SentencePairs()[4].english
    assert image.shape[0] == 40
    assert image.dtype == np.uint8
    again, same_text = pickle.loads(pickle.dumps(lines)).sample(4)
    assert (again == image).all()
    assert same_text == text
    batch = next(lines.stream(4, pool=1))
    assert set(batch['texts']) <= {SentencePairs()[i].english for i in range(4)}


@pytest.mark.parametrize('split', ('val', 'train'))
def test_batches_have_the_first_pairs(split):
    batches = parallel_batches(recipe, SentencePairs('test'), 7, 48, 4, split)
    texts = [text for batch in batches for text in batch['texts']]
    assert sorted(texts) == sorted(SentencePairs('test')[i].english for i in range(7))
    assert batches[0]['images'].shape[2] == 48


def test_a_second_line_is_never_joined():
    rough = replace(recipe, preset='buoy2022')  # joins half of the lines
    lines = ParallelLines(rough, SentencePairs(length=6, rules=('numbers',)))
    plain = super(ParallelLines, lines)
    joined = [i for i in range(12) if plain.sample(i)[1] != lines.pairs[i % 6].khmer]
    assert joined
    for i in range(12):
        assert lines.sample(i)[1] == lines.pairs[i % 6].english


def test_scores():
    half = translation_scores(['a b c d e', 'x'], ['a b c d e', 'y'])
    assert half['exact'] == 0.5
    assert half['lines'] == 2
    assert 0 < half['bleu'] < 1
    assert translation_scores(['a b c d'] * 2, ['a b c d'] * 2) == dict(exact=1.0, bleu=1.0, cer=0.0, lines=2)
    with pytest.raises(KhmerOCRError, match='at least one'):
        translation_scores([], [])


@pytest.mark.parametrize('kind', ('subwords', 'characters'))
def test_english_can_be_written(kind):
    tokenizer = english_tokenizer(SentencePairs(), 300, kind, 150)
    assert len(tokenizer) <= 150
    for rule in RULES:
        for split in splits:
            for pair in pairs[split][rule][:100]:
                assert tokenizer.decode(tokenizer.encode(pair.english)) == pair.english
    assert tokenizer.to_dict() == english_tokenizer(SentencePairs(), 300, kind, 150).to_dict()


@pytest.fixture(scope='module')
def tokenizer():
    return english_tokenizer(SentencePairs(), 200, size=120)


def tiny_variant(**loop):
    "A decoder that is too small to learn anything, on the stem of `fast`"
    variant = translator_variant(available_models()['fast'], decoder_width=16, encoder_width=16, decoder_depth=1)
    loop = dict(batch_size=2, save_every=1, log_every=1, precision='32-true', tensorboard=False) | loop
    return variant._replace(recipe=recipe, train=replace(variant.train, **loop))


def train_cached(out, variant, tokenizer, validation):
    fast = available_models()['fast']
    train_translator(out, fast, tokenizer, variant, SentencePairs(), 4, validation, verbose=False)


def train_on_fresh_images(out, variant, tokenizer, validation):
    train_recogniser(
        'vision_text',
        out,
        recipe,
        variant.train,
        variant.config,
        data=ParallelLines(recipe, SentencePairs()),
        init=available_models()['fast'],
        tokenizer=tokenizer,
        pool=1,
        verbose=False,
        validation=validation,
    )


@pytest.mark.parametrize('train', (train_cached, train_on_fresh_images))
def test_a_recogniser_that_writes_english(train, tokenizer, tmp_path):
    "Trained for two steps with a frozen stem, stored, opened by its folder, and read with"
    variant = tiny_variant(steps=2, eval_every=2)
    validation = parallel_batches(recipe, SentencePairs('val'), 2)
    train(tmp_path / 'm', variant, tokenizer, validation)
    net, units, header = load_image_to_text(tmp_path / 'm/best.safetensors')
    assert units.units == tokenizer.units
    assert header['targets']['kind'] == 'subwords'
    assert not net.has_ctc_head
    fresh = ImageToText(len(tokenizer), variant.config)
    init_image_to_text(fresh, available_models()['fast'])
    for name, weight in fresh.encoder.stem.state_dict().items():
        assert torch.equal(weight, net.encoder.stem.state_dict()[name])
    draw = LineGenerator(replace(recipe, random_text=False), KhmerTexts(SentencePairs('test')))
    predictions = Reader.load(tmp_path / 'm').read([draw('val', i).image for i in range(3)])
    assert len(predictions) == 3
    assert all(set(prediction.text) <= set(ENGLISH.symbols) for prediction in predictions)


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def after_step(self, learn):
        if learn.step == self.step:
            raise CancelFit


def test_an_interrupted_training_goes_on_to_the_same_weights(tokenizer, tmp_path):
    variant = tiny_variant(steps=6, eval_every=100)

    def run(out, **kwargs):
        fast = available_models()['fast']
        train_translator(tmp_path / out, fast, tokenizer, variant, SentencePairs(), 4, verbose=False, **kwargs)
        return load_image_to_text(tmp_path / out / 'latest.safetensors')[0].state_dict()

    whole = run('a')
    run('b', callbacks=[StopAt(3)])
    resumed = run('b', resume='latest')
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_a_variant_needs_a_ctc_recogniser_and_known_settings(tmp_path):
    save_checkpoint(tmp_path / 'a.safetensors', {'w': torch.zeros(1)}, dict(model='other'))
    with pytest.raises(KhmerOCRError, match='other'):
        translator_variant(tmp_path / 'a.safetensors')
    with pytest.raises(KhmerOCRError, match='decodr_width'):
        translator_variant(available_models()['fast'], decodr_width=3)
