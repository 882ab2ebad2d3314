"Parallel text: number words both ways, real dates, names of the gazetteer, held-out combinations that stay out, English labels under Khmer pictures, and a reader that answers in English."

import calendar, datetime, itertools, pickle, re
from dataclasses import replace
import numpy as np, pytest, torch
import khmer_ocr.translate as module
from khmer_ocr.text.rules import lunar_year
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.checkpoints import save_checkpoint
from khmer_ocr.inference.reader import Reader
from khmer_ocr.models.zoo import available_models
from khmer_ocr.synth.generator import Recipe, LineGenerator
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import charset, normalise
from khmer_ocr.experiments.translation import (
    ENGLISH,
    RULES,
    TOP,
    KhmerSide,
    Pair,
    Pairs,
    ParallelLines,
    english_targets,
    english_words,
    khmer_value,
    khmer_words,
    parallel_batches,
    side,
    train_translator,
    translation_scores,
    translator_preset,
)
from khmer_ocr.models.transformer import ImageToText
from khmer_ocr.models.transformer_training import load_image_to_text, init_image_to_text
from khmer_ocr.models.zoo import train_recogniser

edges = [
    0,
    9,
    10,
    19,
    20,
    21,
    99,
    100,
    101,
    110,
    999,
    1000,
    1001,
    9999,
    10_000,
    10_001,
    99_999,
    100_000,
    999_999,
    10**6,
    10**6 + 1,
    10**9,
    10**11,
    TOP - 1,
]


def sample(n=4000, top=10**6 + 1):
    return np.random.default_rng(1).integers(0, top, n).tolist()


def english_value(words):
    "English words back to a number, by another way than they were made"
    small = {
        english: n
        for n, english in enumerate(
            'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen'.split()
        )
    }
    small |= {t: 10 * n for n, t in enumerate('twenty thirty forty fifty sixty seventy eighty ninety'.split(), 2)}
    total = part = 0
    for w in words.replace('-', ' ').split():
        if w == 'hundred':
            part *= 100
        elif w in ('thousand', 'million', 'billion'):
            total += part * dict(thousand=10**3, million=10**6, billion=10**9)[w]
            part = 0
        else:
            part += small[w]
    return total + part


def test_number_words_both_ways():
    for n in itertools.chain(range(2001), edges, sample(), sample(500, TOP)):
        words = khmer_words(n)
        assert khmer_value(words) == n and normalise(words) == words and english_value(english_words(n)) == n
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
    assert khmer_words(n) == words and khmer_value(words) == n


def test_what_is_no_number():
    for wrong in (-1, TOP, 1.5, '5', True, None):
        for f in (khmer_words, english_words):
            with pytest.raises(KhmerOCRError, match='whole number'):
                f(wrong)
    for wrong in ('', 'ពាន់', 'មួយពាន់ ', 'ពីរមួយ', 'two', 'លានលាន'):
        with pytest.raises(KhmerOCRError, match='no Khmer number'):
            khmer_value(wrong)


pairs = {s: {r: [Pairs(s, (r,), seed=7)[i] for i in range(1500)] for r in RULES} for s in ('train', 'val', 'test')}


@pytest.mark.parametrize('rule', RULES)
def test_pairs_are_in_normal_form_and_can_be_written(rule):
    known, english = frozenset(charset().symbols), frozenset(ENGLISH.symbols)
    for s in pairs:
        for p in pairs[s][rule]:
            assert normalise(p.khmer) == p.khmer and known.issuperset(p.khmer) and p.khmer and len(p.khmer) <= 110
            assert (
                normalise(p.english) == p.english
                and english.issuperset(p.english)
                and p.english
                and p.rule == rule
                and side(p) == s
            )


@pytest.mark.parametrize('rule', RULES)
def test_one_khmer_line_has_one_english(rule):
    known = {}
    for s in pairs:
        for p in pairs[s][rule]:
            assert known.setdefault(p.khmer, p.english) == p.english


def test_held_out_combinations_by_the_english_alone():
    "Not by the keys: what a person would compare"
    months = '|'.join(calendar.month_name[1:])

    def days(s):
        return {m for p in pairs[s]['dates'] for m in re.findall(rf'(\d+ (?:{months}))', p.english)}

    def moons(s):
        return {re.search(r'\d+\w\w w\w+ day of \w+', p.english)[0] for p in pairs[s]['lunar']}

    def ranges(s):
        return {
            (len(d), d[:3])
            for r in ('numbers', 'money')
            for p in pairs[s][r]
            for d in (re.sub(r'\D', '', p.english) or str(english_value(p.english)),)
            if len(d) > 2
        }

    def streets(s):
        return {
            (m[1], m[2])
            for p in pairs[s]['addresses']
            if (m := re.search(r'(Street \d+|\w+ Boulevard).*Khan ([\w ]+)', p.english))
        }

    def villages(s):
        return {(m[1], m[2]) for p in pairs[s]['addresses'] if (m := re.match(r'(.*\d), (.* District),', p.english))}

    for of in (days, moons, ranges, streets, villages):
        assert all(len(of(s)) > 15 for s in pairs), of
        for a, b in itertools.combinations(pairs, 2):
            assert not of(a) & of(b), (of, a, b)


def test_the_parts_of_what_is_held_out_are_in_training():
    words = {w for r in RULES for p in pairs['train'][r] for w in re.findall('[A-Za-z]+', p.english)}
    assert {
        w for s in ('val', 'test') for r in RULES for p in pairs[s][r] for w in re.findall('[A-Za-z]+', p.english)
    } <= words


def test_dates_are_of_the_calendar():
    latin = str.maketrans('០១២៣៤៥៦៧៨៩', '0123456789')
    seen = 0
    for p in pairs['train']['dates']:
        m = re.search(r'(?:(\w+day), )?(\d+) ([A-Z]\w+) (\d+)( BE)?$', p.english)
        y = int(m[4]) - (543 if m[5] else 0)
        day = datetime.date(y, [*calendar.month_name].index(m[3]), int(m[2]))
        if m[1]:
            assert calendar.day_name[day.weekday()] == m[1] and module._weekdays[day.weekday()] in p.khmer
            seen += 1
        if d := re.search(r'(\d\d)[/.-](\d\d)[/.-](\d{4})$', p.khmer.translate(latin)):
            assert (int(d[1]), int(d[2]), int(d[3])) == (day.day, day.month, day.year)
        else:
            assert f'ខែ{module._months[day.month - 1]} ' in p.khmer
        if d := re.search('ទី([ក-៓]+) ខែ[ក-៓]+ ឆ្នាំ([ក-៓]+)$', p.khmer):
            assert (khmer_value(d[1]), khmer_value(d[2])) == (day.day, day.year)
    assert seen > 100


def test_lunar_years_fit_together():
    "2025 was the year of the Snake, seventh of its decade, 2569; 2012 the Dragon, fourth, 2556"
    assert lunar_year(2025) == 'ឆ្នាំម្សាញ់ សប្តស័ក ព.ស. ២៥៦៩' and lunar_year(2012) == 'ឆ្នាំរោង ចត្វាស័ក ព.ស. ២៥៥៦'
    khmer = dict(zip('ជូត ឆ្លូវ ខាល ថោះ រោង ម្សាញ់ មមី មមែ វក រកា ច កុរ'.split(), module._animals))
    years = dict(zip('ឯកស័ក ទោស័ក ត្រីស័ក ចត្វាស័ក បញ្ចស័ក ឆស័ក សប្តស័ក អដ្ឋស័ក នព្វស័ក សំរឹទ្ធិស័ក'.split(), range(1, 11)))
    for p in pairs['train']['lunar']:
        a, s, be = re.search(r'ឆ្នាំ(\S+) (\S+) ព\.ស\. (\S+)$', p.khmer).groups()
        m = re.search(
            r'(\w+), (\d+)\w+ (\w+) day of (\w+), Year of the (\w+), (\d+)\w+ of the decade, (\d+) BE$', p.english
        )
        assert (
            khmer[a] == m[5]
            and years[s] == int(m[6])
            and be.translate(str.maketrans('០១២៣៤៥៦៧៨៩', '0123456789')) == m[7]
        )
        assert (
            int(m[2]) <= (15 if m[3] == 'waxing' else 14)
            and ('កើត' in p.khmer) == (m[3] == 'waxing')
            and module._moons[re.search('ខែ(\\S+)', p.khmer)[1]] == m[4]
        )


def test_sums_of_money():
    latin = str.maketrans('០១២៣៤៥៦៧៨៩', '0123456789')
    kinds = set()
    for p in pairs['train']['money']:
        n = int(re.sub(r'\D', '', p.english))
        k = p.khmer.translate(latin)
        if m := re.search('([0-9]+) ?(ម៉ឺន|សែន|លាន)', k):
            assert int(m[1]) * dict(ម៉ឺន=10**4, សែន=10**5, លាន=10**6)[m[2]] == n
            kinds.add(m[2])
        elif m := re.search('[0-9][0-9.,]*', k):
            assert int(re.sub('[.,]', '', m[0])) == n
            kinds.add('digits')
        else:
            assert khmer_words(n) in k
            kinds.add('words')
        assert p.english.endswith('riels') == ('៛' in k or 'រៀល' in k) and p.english.endswith('US dollars') == (
            'អាមេរិក' in k
        )
    assert kinds == {'ម៉ឺន', 'សែន', 'លាន', 'digits', 'words'}


def test_names_of_places():
    assert all(normalise(n) == n for (khan, _), qs in module._quarters for n in (khan, *(q for q, *_ in qs)))
    assert all(normalise(k) == k and re.fullmatch("[A-Z][A-Za-z' ]+", e) for place in module._country for k, e in place)
    for p in pairs['train']['addresses'][:400]:
        if 'Province' in p.english:
            assert (
                re.fullmatch(r"(No\. \d+|National Road [1-8]), .+ Commune, .+ District, .+ Province", p.english)
                and 'ខេត្ត' in p.khmer
            )
        else:
            assert re.fullmatch(
                r"(No\. \d+, )?(Street \d+|.+ Boulevard), Sangkat .+, Khan [^,]+(, Phnom Penh)?", p.english
            ) and ('រាជធានីភ្នំពេញ' in p.khmer) == p.english.endswith('Phnom Penh')


def test_pairs_by_seed_side_and_number():
    a = Pairs(seed=3)
    assert [a[i] for i in (5, 0, 5)] == [Pairs(seed=3)[i] for i in (5, 0, 5)] and a[5] != Pairs(seed=4)[5] != Pairs(
        'val', seed=3
    )[5]
    assert pickle.loads(pickle.dumps(a))[9] == a[9] and [a[i].rule for i in range(5)] == list(RULES)
    for f, say in (
        (lambda: Pairs(rules=('dats',)), 'did you mean dates'),
        (lambda: Pairs('val', dict(x=lambda rng: Pair('ក', 'a')))[0], 'keys'),
    ):
        with pytest.raises(KhmerOCRError, match=say):
            f()
    with pytest.raises(IndexError):
        Pairs(length=3)[3]
    assert len(KhmerSide(a)) == len(a) and side(Pair('', '')) == 'train'


recipe = Recipe(families=('Noto Sans Khmer',), preset='document', seed=2)


def test_pictures_of_khmer_with_english_labels():
    lines = ParallelLines(recipe, Pairs())
    image, text = lines.sample(4)
    assert text == Pairs()[4].english and image.shape[0] == 40 and image.dtype == np.uint8
    again = pickle.loads(pickle.dumps(lines)).sample(4)
    assert (again[0] == image).all() and again[1] == text
    b = next(lines.stream(4, pool=1))
    assert set(b['texts']) <= {Pairs()[i].english for i in range(4)}
    for split in ('val', 'train'):
        bs = parallel_batches(recipe, Pairs('test'), 7, 48, 4, split)
        assert (
            sorted(t for b in bs for t in b['texts']) == sorted(Pairs('test')[i].english for i in range(7))
            and bs[0]['images'].shape[2] == 48
        )


def test_a_second_line_is_never_joined():
    rough = replace(recipe, preset='buoy2022')  # joins half of the lines
    lines = ParallelLines(rough, Pairs(length=6, rules=('numbers',)))
    plain = super(ParallelLines, lines)
    joined = [i for i in range(12) if plain.sample(i)[1] != lines.pairs[i % 6].khmer]
    assert joined and all(lines.sample(i)[1] == lines.pairs[i % 6].english for i in range(12))


def test_scores():
    s = translation_scores(['a b c d e', 'x'], ['a b c d e', 'y'])
    assert s['exact'] == 0.5 and s['lines'] == 2 and 0 < s['bleu'] < 1
    assert translation_scores(['a b c d'] * 2, ['a b c d'] * 2) == dict(exact=1.0, bleu=1.0, cer=0.0, lines=2)
    with pytest.raises(KhmerOCRError, match='at least one'):
        translation_scores([], [])


@pytest.mark.parametrize('kind', ('subwords', 'characters'))
def test_english_can_be_written(kind):
    t = english_targets(Pairs(), 300, kind, 150)
    assert (
        all(t.decode(t.encode(p.english)) == p.english for s in pairs for r in RULES for p in pairs[s][r][:100])
        and len(t) <= 150
    )
    assert t.to_dict() == english_targets(Pairs(), 300, kind, 150).to_dict()


@pytest.mark.parametrize('once', (True, False), ids=('the eye looks once', 'it looks each time'))
def test_a_reader_that_answers_in_english(once, tmp_path):
    "Trained for two steps with the eye left alone, stored, opened by its folder, and read with"
    eye = available_models()['fast']
    p = translator_preset(eye, 2, decoder_width=16, encoder_width=16, decoder_depth=1)
    t = english_targets(Pairs(), 200, size=120)
    loop = replace(
        p.train, batch_size=2, save_every=1, eval_every=2, log_every=1, precision='32-true', tensorboard=False
    )
    val = parallel_batches(recipe, Pairs('val'), 2)
    if once:
        train_translator(tmp_path / 'm', eye, t, p._replace(train=loop, recipe=recipe), Pairs(), 4, val, verbose=False)
    else:
        train_recogniser(
            'vision_text',
            tmp_path / 'm',
            recipe,
            loop,
            p.config,
            data=ParallelLines(recipe, Pairs()),
            init=eye,
            targets=t,
            pool=1,
            verbose=False,
            validation=val,
        )
    net, units, head = load_image_to_text(tmp_path / 'm/best.safetensors')
    assert units.units == t.units and head['targets']['kind'] == 'subwords' and not net.has_ctc_head
    fresh = ImageToText(len(t), p.config)
    init_image_to_text(fresh, eye)
    assert all(
        torch.equal(v, net.state_dict()['encoder.stem.' + k]) for k, v in fresh.encoder.stem.state_dict().items()
    )
    images = [LineGenerator(replace(recipe, random_text=False), KhmerSide(Pairs('test')))('val', i).image for i in range(3)]
    said = Reader.load(tmp_path / 'm').read(images)
    assert len(said) == 3 and all(set(r.text) <= set(ENGLISH.symbols) for r in said)


class StopAt(Callback):
    def __init__(self, n):
        self.n = n

    def after_step(self, learn):
        if learn.step == self.n:
            raise CancelFit


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    eye = available_models()['fast']
    p = translator_preset(eye, 6, decoder_width=16, encoder_width=16, decoder_depth=1)
    t = english_targets(Pairs(), 200, size=120)
    p = p._replace(
        recipe=recipe,
        train=replace(
            p.train, batch_size=2, save_every=1, eval_every=100, log_every=1, precision='32-true', tensorboard=False
        ),
    )

    def run(out, **kw):
        train_translator(tmp_path / out, eye, t, p, Pairs(), 4, verbose=False, **kw)
        return load_image_to_text(tmp_path / out / 'latest.safetensors')[0].state_dict()

    whole = run('a')
    run('b', callbacks=[StopAt(3)])
    again = run('b', resume='latest')
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def test_the_preset_refuses_what_is_no_eye(tmp_path):
    save_checkpoint(tmp_path / 'a.safetensors', {'w': torch.zeros(1)}, dict(model='other'))
    with pytest.raises(KhmerOCRError, match='other'):
        translator_preset(tmp_path / 'a.safetensors')
    with pytest.raises(KhmerOCRError, match='decodr_width'):
        translator_preset(available_models()['fast'], decodr_width=3)
