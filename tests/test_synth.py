"Sets: the same bytes for any number of workers and after any kill, verified by their own record."
import hashlib, json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest
from khmer_ocr.corpus import load_lines
from khmer_ocr.fonts import find_fonts
from khmer_ocr.synth import Recipe, Synth, sample_rng
from khmer_ocr.sets import CHUNK, _put, generate_set, make_validation_set, validate_validation_set, verify_set
from khmer_ocr.text import KhmerOCRError, normalise

lines = [f'{t} {i}' for i in range(60) for t in ('ព្រះរាជាណាចក្រកម្ពុជា', 'ស្ត្រីខ្មែរ', 'ឆ្នាំ ២០២៥ "ថ្មី"', 'តម្លៃ - ៥.០០០ រៀល...', 'Khmer OCR ភ្នំពេញ')]

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    d = tmp_path_factory.mktemp('corpus')
    for s in ('train', 'val', 'test'): (d/f'{s}.txt').write_text(''.join(normalise(l)+'\n' for l in lines), encoding='utf-8')
    return str(d)

def tree(folder): return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob('*')) if p.is_file() and p.name != 'run.json'}

def test_two_workers_make_the_bytes_of_one(corpus, tmp_path):
    for w in (1, 2): generate_set(Recipe(corpus=corpus), tmp_path/f'w{w}', max_lines=CHUNK+20, splits=('train',), workers=w, progress=False)
    one, two = tree(tmp_path/'w1'), tree(tmp_path/'w2')
    assert one == two and len(one) > 2*(CHUNK+20)

def test_killed_run_ends_with_the_same_bytes(corpus, tmp_path):
    code = f'from khmer_ocr.sets import *; from khmer_ocr.synth import Recipe; generate_set(Recipe(corpus={corpus!r}), {str(tmp_path/"killed")!r}, max_lines=280, splits=("train", "val"), progress=False)'
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL)
    while p.poll() is None and len(list((tmp_path/'killed').glob('train/images/*.png'))) < 40: time.sleep(.01)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    made = len(list((tmp_path/'killed').glob('*/images/*.png')))
    assert 0 < made < 560
    (tmp_path/'killed/train/images/.train_000077.png.999').write_bytes(b'half')        # what a kill in the middle of a write leaves
    for d in ('killed', 'whole'): generate_set(Recipe(corpus=corpus), tmp_path/d, max_lines=280, splits=('train', 'val'), progress=False)
    assert tree(tmp_path/'killed') == tree(tmp_path/'whole')
    assert verify_set(tmp_path/'killed') == []
    assert generate_set(Recipe(corpus=corpus), tmp_path/'killed', max_lines=280, splits=('train', 'val'), progress=False)['images_made'] == 0

def test_layout_of_the_seed(corpus, tmp_path):
    generate_set(Recipe(corpus=corpus), tmp_path, max_lines=2, progress=False)
    for s in ('train', 'val', 'test'):
        assert (tmp_path/s/'images'/f'{s}_000001.png').exists() and (tmp_path/s/'labels'/f'{s}_000001.txt').exists()
        assert json.loads((tmp_path/s/'metadata.json').read_text())['augmented'] in ([True, False] if s == 'train' else [False])
    assert set(json.loads((tmp_path/'generation_metadata.json').read_text())) >= {'recipe', 'versions', 'fonts', 'corpus', 'splits'}

def test_validation_images_do_not_depend_on_what_is_asked_for(corpus):
    r = Recipe(corpus=corpus)
    a, b = Synth(r)('val', 3), Synth(replace(r, preset='hard', styles=.9))('val', 3)
    assert (a.image == b.image).all() and a.meta == b.meta and a.meta['ops'] == []

def test_every_sample_is_its_own(corpus):
    s = Synth(Recipe(corpus=corpus, random_text=True))
    images = [s('train', i).image.tobytes() for i in range(40)]
    assert len(set(images)) == 40
    assert s('train', 7).image.tobytes() == images[7]
    assert sample_rng(1, 'train', 5).integers(1 << 60) != sample_rng(1, 'test', 5).integers(1 << 60)

def test_labels_are_normal_and_drawn_in_training_fonts(corpus):
    s, held = Synth(Recipe(corpus=corpus, random_text=True)), {f.family for f in find_fonts() if f.split == 'heldout'}
    for i in range(60):
        x = s('train', i)
        assert x.text == normalise(x.text) and not any(x.meta['font'].startswith(h) and not x.meta['font'].startswith(h+' OS') for h in held), x.meta

def test_validation_set(corpus, tmp_path):
    for d, w in (('a', 1), ('b', 2)): make_validation_set(tmp_path/d, num_samples=30, random_seed=5, corpus=corpus, workers=w, progress=False)
    assert tree(tmp_path/'a') == tree(tmp_path/'b')
    assert validate_validation_set(tmp_path/'a') == []
    texts = (tmp_path/'a/validation_texts.txt').read_text(encoding='utf-8').splitlines()
    assert len(set(texts)) == 30 and set(texts) <= set(load_lines(corpus, 'val'))
    next((tmp_path/'a/images').iterdir()).write_bytes(b'')
    assert len(validate_validation_set(tmp_path/'a')) == 1

def test_faults(corpus, tmp_path):
    for f, why in ((lambda: Recipe.from_dict(dict(presett='hard')), 'preset'), (lambda: Recipe.from_dict(dict(preset='hrad')), 'hard'), (lambda: Recipe.from_dict(dict(size=[50, 20])), 'size'),
            (lambda: generate_set(Recipe(corpus=str(tmp_path/'none')), tmp_path/'x'), 'khmer-ocr corpus'), (lambda: generate_set(Recipe(corpus=corpus), tmp_path/'x', max_lines=0), 'max-lines'),
            (lambda: Synth(Recipe(corpus=corpus, families=('Nonesuch',))), 'Nonesuch'), (lambda: verify_set(tmp_path/'none'), 'khmer-ocr generate'), (lambda: sample_rng(1, 'dev', 0), 'dev')):
        with pytest.raises(KhmerOCRError, match=why): f()
    assert not (tmp_path/'x').exists()
    generate_set(Recipe(corpus=corpus), tmp_path/'set', max_lines=3, splits=('val',), progress=False)
    before = tree(tmp_path/'set')
    with pytest.raises(KhmerOCRError, match='seed: 42 there, 43 now'): generate_set(Recipe(corpus=corpus, seed=43), tmp_path/'set', max_lines=3, splits=('val',), progress=False)
    assert tree(tmp_path/'set') == before

@pytest.mark.parametrize('bad', [dict(seed='x'), dict(seed=-1), dict(common=5), dict(styles=True), dict(wording=3), dict(wording=dict(lengths=[1])), dict(wording=dict(blank=2)), dict(augment='no'), dict(families='Moul'), dict(size=[13]), dict(size=[13, 'a']), dict(preset=3)])
def test_recipe_values_of_the_wrong_kind(bad):
    with pytest.raises(KhmerOCRError, match='(?i)' + next(iter(bad))) as e: Recipe.from_dict(bad)
    assert '\n' not in str(e.value)

def test_making_a_set_again_repairs_it(corpus, tmp_path):
    make = lambda n=5: generate_set(Recipe(corpus=corpus), tmp_path/'set', max_lines=n, splits=('val',), progress=False)
    make(); whole = tree(tmp_path/'set')
    (tmp_path/'set/val/images/val_000003.png').unlink(); (tmp_path/'set/val/labels/val_000001.txt').write_bytes(b'\xff')
    assert len(verify_set(tmp_path/'set')) == 2
    make(); assert verify_set(tmp_path/'set') == [] and tree(tmp_path/'set') == whole
    with pytest.raises(KhmerOCRError, match='larger set'): make(2)       # it would leave three images behind
    assert tree(tmp_path/'set') == whole
    (tmp_path/'set/val/metadata.json').write_text('{')
    with pytest.raises(KhmerOCRError, match='damaged'): verify_set(tmp_path/'set')

def test_a_stopped_validation_set_is_not_mixed_with_another(corpus, tmp_path):
    make = lambda seed: make_validation_set(tmp_path/'v', num_samples=5, random_seed=seed, corpus=corpus, progress=False)
    make(1); whole = tree(tmp_path/'v')
    for f in ('metadata.json', 'samples.jsonl', 'validation_texts.txt'): (tmp_path/'v'/f).unlink()      # as a kill leaves it
    with pytest.raises(KhmerOCRError, match='another validation set'): make(2)
    make(1); assert tree(tmp_path/'v') == whole

def test_progress_is_plain_lines_off_a_terminal(corpus, tmp_path, capfd):
    generate_set(Recipe(corpus=corpus), tmp_path, max_lines=3, splits=('val',))
    out, err = capfd.readouterr()
    assert out == '' and '\r' not in err and [l for l in err.splitlines() if '3/3' in l]

def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path/'a.png').mkdir()
    with pytest.raises(KhmerOCRError, match='Cannot write .*a.png'): _put(tmp_path/'a.png', b'x')
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']
