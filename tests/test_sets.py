"Sets: the same bytes for any number of workers and after any kill, verified by their own record."

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import psutil
import pytest
from khmer_ocr.text.corpus import load_lines
from khmer_ocr.core.files import folder_lock, write_atomic
from khmer_ocr.synth import records
from khmer_ocr.synth.records import checked_bytes, write_checked
from khmer_ocr.synth.set_layouts import PngLayout, ShardLayout, read_shard
from khmer_ocr.synth.store import generate_set, make_validation_set, validate_validation_set, verify_set
from khmer_ocr.synth.generator import DRAWING_VERSION, Recipe
from khmer_ocr.synth.workers import PlainProgress
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import normalise

lines = [
    f'{t} {i}'
    for i in range(60)
    for t in ('ព្រះរាជាណាចក្រកម្ពុជា', 'ស្ត្រីខ្មែរ', 'ឆ្នាំ ២០២៥ "ថ្មី"', 'តម្លៃ - ៥.០០០ រៀល...', 'Khmer OCR ភ្នំពេញ')
]
posix = pytest.mark.skipif(os.name == 'nt', reason='signals and mounts')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    d = tmp_path_factory.mktemp('corpus')
    for s in ('train', 'val', 'test'):
        (d / f'{s}.txt').write_text(''.join(normalise(l) + '\n' for l in lines), encoding='utf-8')
    return str(d)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(PngLayout, 'chunk', 10)
    monkeypatch.setattr(ShardLayout, 'chunk', 10)


def tree(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob('*'))
        if p.is_file() and p.name != 'run.json'
    }


def make(corpus, out, n=25, splits=('train', 'val'), **kw):
    return generate_set(Recipe(corpus=corpus), out, max_lines=n, splits=splits, progress=False, **kw)


# ---- what a set is


def test_two_workers_make_the_bytes_of_one(corpus, tmp_path, small_chunks):
    for w in (1, 2, 3):
        make(corpus, tmp_path / f'w{w}', 35, ('train',), workers=w)
    one = tree(tmp_path / 'w1')
    assert one == tree(tmp_path / 'w2') == tree(tmp_path / 'w3') and len(one) == 2 * 35 + 3


def test_layout_of_the_seed(corpus, tmp_path):
    generate_set(Recipe(corpus=corpus), tmp_path, max_lines=2, progress=False)
    for s in ('train', 'val', 'test'):
        assert {p.name for p in (tmp_path / s).iterdir()} == {'images', 'labels', 'metadata.json', 'samples.jsonl'}
        assert (tmp_path / s / 'images' / f'{s}_000001.png').exists() and (
            tmp_path / s / 'labels' / f'{s}_000001.txt'
        ).exists()
        assert json.loads((tmp_path / s / 'metadata.json').read_text())['augmented'] in (
            [True, False] if s == 'train' else [False]
        )
    assert set(json.loads((tmp_path / 'generation_metadata.json').read_text())) >= {
        'recipe',
        'versions',
        'fonts',
        'corpus',
        'splits',
        'drawing',
    }
    row = json.loads((tmp_path / 'train/samples.jsonl').read_text(encoding='utf-8').splitlines()[0])
    assert set(row) >= {'name', 'text', 'font', 'size', 'ops', 'sha256', 'bytes'}


def test_numbers_per_split_and_texts_at_random(corpus, tmp_path):
    st = generate_set(
        Recipe(corpus=corpus), tmp_path / 'a', max_lines=dict(train=3, val=1), progress=False, splits=('train', 'val')
    )
    assert {k: s['images'] for k, s in st['splits'].items()} == dict(train=3, val=1)
    (tmp_path / 'c').mkdir()
    for s in ('train', 'val', 'test'):
        (tmp_path / 'c' / f'{s}.txt').write_text(normalise(lines[0]) + '\n', encoding='utf-8')
    r = Recipe(corpus=str(tmp_path / 'c'), random_text=True)
    assert (
        generate_set(r, tmp_path / 'b', max_lines=7, splits=('train',), progress=False)['total_images'] == 7
    )  # more than there are lines
    assert (
        generate_set(replace(r, random_text=False), tmp_path / 'd', max_lines=7, splits=('train',), progress=False)[
            'total_images'
        ]
        == 1
    )


def test_a_split_may_follow_later_and_a_set_may_grow(corpus, tmp_path, small_chunks):
    make(corpus, tmp_path / 'a', 5, ('val',))
    make(corpus, tmp_path / 'a', 12, ('train',))
    make(corpus, tmp_path / 'a', 25)
    make(corpus, tmp_path / 'b', 25)
    assert tree(tmp_path / 'a') == tree(tmp_path / 'b') and verify_set(tmp_path / 'a') == []


def test_faults_of_the_caller(corpus, tmp_path):
    (tmp_path / 'file').write_text('')
    for f, why in (
        (lambda: generate_set(Recipe(corpus=str(tmp_path / 'none')), tmp_path / 'x'), 'khmer-ocr corpus'),
        (lambda: make(corpus, tmp_path / 'x', 0), 'max-lines'),
        (lambda: make(corpus, tmp_path / 'x', dict(trian=3)), 'did you mean train'),
        (lambda: make(corpus, tmp_path / 'x', 3, format='tar'), 'choose from png, shards'),
        (lambda: verify_set(tmp_path / 'none'), 'khmer-ocr generate'),
        (lambda: make(corpus, tmp_path / 'file'), 'a folder is wanted'),
        (lambda: list(read_shard(tmp_path / 'none.tar')), 'No shard'),
        (lambda: list(read_shard(tmp_path / 'file')), 'not a whole shard'),
        (lambda: make_validation_set(tmp_path / 'x', 5, corpus=corpus, augmented='buoy'), 'did you mean buoy2022'),
    ):
        with pytest.raises(KhmerOCRError, match=why) as e:
            f()
        assert '\n' not in str(e.value)
    assert not (tmp_path / 'x').exists()


def test_another_recipe_is_refused_with_what_differs(corpus, tmp_path):
    make(corpus, tmp_path / 'set', 3, ('val',))
    before = tree(tmp_path / 'set')

    def go(**kw):
        return generate_set(
            replace(Recipe(corpus=corpus), **kw), tmp_path / 'set', max_lines=3, splits=('val',), progress=False
        )

    with pytest.raises(KhmerOCRError, match='seed: 42 there, 43 now'):
        go(seed=43)
    with pytest.raises(KhmerOCRError, match='preset: .mixed. there, .light. now'):
        go(preset='light')
    with pytest.raises(KhmerOCRError, match='layout'):
        make(corpus, tmp_path / 'set', 3, ('val',), format='shards')
    with pytest.raises(KhmerOCRError, match='larger set'):
        make(corpus, tmp_path / 'set', 2, ('val',))  # it would leave an image behind
    shutil.copytree(corpus, tmp_path / 'corpus')
    (tmp_path / 'corpus/val.txt').write_text('កក\n' * 3, encoding='utf-8')
    with pytest.raises(KhmerOCRError, match='corpus.val'):
        go(corpus=str(tmp_path / 'corpus'))
    assert tree(tmp_path / 'set') == before


def test_progress_is_plain_lines_off_a_terminal(corpus, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(PngLayout, 'chunk', 1)
    monkeypatch.setattr(PlainProgress, 'every', 0)
    for _ in range(2):
        generate_set(Recipe(corpus=corpus), tmp_path, max_lines=3, splits=('val',))
    out, err = capfd.readouterr()
    printed = [l for l in err.splitlines() if not l.startswith('warning: no fonts')]
    assert out == '' and '\r' not in err and len(printed) == 4
    assert (
        printed[0].startswith('val: 1/3 images, ')
        and printed[0].endswith(' left')
        and ' a second' in printed[0]
        and printed[2].startswith('val: 3/3 images')
        and printed[3] == 'val: 3/3 images, there already'
    )


def test_two_runs_do_not_share_a_folder(corpus, tmp_path):
    with folder_lock(tmp_path), pytest.raises(KhmerOCRError, match='Another run is at work'):
        make(corpus, tmp_path)
    make(corpus, tmp_path, 1)


def test_any_executor(corpus, tmp_path, small_chunks):
    make(corpus, tmp_path / 'one')
    with ThreadPoolExecutor(3) as pool:
        make(corpus, tmp_path / 'threads', executor=pool)
    assert tree(tmp_path / 'one') == tree(tmp_path / 'threads')


def test_a_dask_cluster(corpus, tmp_path):
    distributed = pytest.importorskip('distributed')
    make(corpus, tmp_path / 'one', 300)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        make(corpus, tmp_path / 'dask', 300, executor=client.get_executor())
    assert tree(tmp_path / 'one') == tree(tmp_path / 'dask')


# ---- shards


def test_shards_hold_the_same_samples(corpus, tmp_path, small_chunks):
    make(corpus, tmp_path / 'png')
    st = make(corpus, tmp_path / 'tar', format='shards')
    assert verify_set(tmp_path / 'tar') == [] and st['splits']['train'] | dict(bytes=0, disk_bytes=0) == dict(
        images=25, labels=25, bytes=0, disk_bytes=0
    )
    assert sorted(p.name for p in (tmp_path / 'tar/train').iterdir()) == [
        'metadata.json',
        'shards.jsonl',
        *(f'train-{i:06d}.tar' for i in range(3)),
    ]
    samples = [s for p in sorted((tmp_path / 'tar/train').glob('*.tar')) for s in read_shard(p)]
    assert [s[0] for s in samples] == [f'train_{i:06d}' for i in range(25)]
    rows = [json.loads(l) for l in (tmp_path / 'png/train/samples.jsonl').read_text(encoding='utf-8').splitlines()]
    for (name, png, text, notes), r in zip(samples, rows):
        assert (
            png == (tmp_path / f'png/train/images/{name}.png').read_bytes()
            and text == (tmp_path / f'png/train/labels/{name}.txt').read_text(encoding='utf-8')
            and notes == r
        )
    a, b = (json.loads((tmp_path / d / 'train/metadata.json').read_text()) for d in ('png', 'tar'))
    assert all(a[k] == b[k] for k in ('num_samples', 'fonts_used', 'degraded', 'redrawn', 'augmented'))


def test_shards_resume_grow_and_are_verified(corpus, tmp_path, small_chunks):
    def go(out, n=25):
        return make(corpus, out, n, ('train',), format='shards')

    go(tmp_path / 'whole')
    go(tmp_path / 'a', 13)
    assert go(tmp_path / 'a')['images_made'] == 15  # the shard of 3 and the one after it
    assert tree(tmp_path / 'a') == tree(tmp_path / 'whole') and go(tmp_path / 'a')['images_made'] == 0
    tar = tmp_path / 'a/train/train-000001.tar'
    data = tar.read_bytes()
    tar.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    assert verify_set(tmp_path / 'a') == [f'{tar} has changed']
    tar.write_bytes(data[:3000])
    with pytest.raises(KhmerOCRError, match='not a whole shard'):
        list(read_shard(tar))
    assert (
        len(verify_set(tmp_path / 'a')) == 1
        and go(tmp_path / 'a')['images_made'] == 10
        and tree(tmp_path / 'a') == tree(tmp_path / 'whole')
    )


# ---- verify finds each planted fault, and making the set again repairs it


def flip(p):
    d = bytearray(p.read_bytes())
    d[len(d) // 2] ^= 1
    p.write_bytes(d)


def swap(a, b):
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def edit(p, old, new):
    t = p.read_text(encoding='utf-8')
    assert old in t
    p.write_text(t.replace(old, new, 1), encoding='utf-8')


def reseal(p, **kw):
    "An edit by someone who knows of the checksum"
    p.write_bytes(checked_bytes(json.loads(p.read_text(encoding='utf-8')) | kw))


faults = {
    'a missing image': (lambda d: (d / 'train/images/train_000003.png').unlink(), 'train_000003.png is missing'),
    'a missing label': (lambda d: (d / 'val/labels/val_000003.txt').unlink(), 'val_000003.txt is missing'),
    'a truncated PNG': (
        lambda d: (p := d / 'train/images/train_000004.png').write_bytes(p.read_bytes()[:-20]),
        'train_000004.png has changed',
    ),
    'an empty PNG': (lambda d: (d / 'train/images/train_000004.png').write_bytes(b''), 'train_000004.png has changed'),
    'one flipped byte': (lambda d: flip(d / 'val/images/val_000007.png'), 'val_000007.png has changed'),
    'one flipped byte of a label': (lambda d: flip(d / 'val/labels/val_000007.txt'), 'val_000007.txt has changed'),
    'swapped labels': (
        lambda d: swap(d / 'train/labels/train_000001.txt', d / 'train/labels/train_000002.txt'),
        'train_000001.txt has changed',
    ),
    'swapped images': (
        lambda d: swap(d / 'train/images/train_000001.png', d / 'train/images/train_000002.png'),
        'train_000002.png has changed',
    ),
    'a missing split': (lambda d: shutil.rmtree(d / 'val'), 'val is missing'),
    'a missing record': (lambda d: (d / 'val/samples.jsonl').unlink(), 'samples.jsonl'),
    'a missing metadata.json': (lambda d: (d / 'val/metadata.json').unlink(), 'metadata.json is missing'),
    'a missing generation_metadata.json': (
        lambda d: (d / 'generation_metadata.json').unlink(),
        'generation_metadata.json is missing',
    ),
    'edited samples.jsonl': (
        lambda d: edit(d / 'train/samples.jsonl', '"font": "', '"font": "The '),
        'samples.jsonl was edited',
    ),
    'a damaged samples.jsonl': (lambda d: edit(d / 'train/samples.jsonl', '{', ''), 'samples.jsonl is damaged'),
    'edited metadata.json': (
        lambda d: edit(d / 'train/metadata.json', '"redrawn": ', '"redrawn": 1'),
        'metadata.json was edited',
    ),
    'a space in metadata.json': (lambda d: edit(d / 'train/metadata.json', '\n', '\n '), 'metadata.json was edited'),
    'metadata.json edited with care': (lambda d: reseal(d / 'train/metadata.json', num_samples=26), '26 samples'),
    'metadata.json of another set': (lambda d: reseal(d / 'train/metadata.json', provenance={}), 'not of the set'),
    'edited generation_metadata.json': (
        lambda d: edit(d / 'generation_metadata.json', '"seed": 42', '"seed": 43'),
        'generation_metadata.json was edited',
    ),
    'generation_metadata.json edited with care': (
        lambda d: reseal(d / 'generation_metadata.json', recipe={}),
        'not of the set',
    ),
    'broken JSON': (lambda d: (d / 'generation_metadata.json').write_text('{'), 'generation_metadata.json is damaged'),
}

extra = (
    'a.txt',
    'train/a.png',
    'train/images/train_000025.png',
    'train/labels/train_000000.png',
    'val/images/.hidden',
    'val/parts/000000.jsonl',
    'train/parts.txt',
    'test/images/test_000000.png',
    'deep/er/file',
    'val/images/sub/val_000000.png',
)


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    d = tmp_path_factory.mktemp('whole') / 'set'
    make(corpus, d)
    return d


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / 'set')


@pytest.mark.parametrize('name', faults)
def test_verify_finds(name, copy, whole, corpus):
    plant, message = faults[name]
    plant(copy)
    problems = verify_set(copy)
    assert any(message in p for p in problems), problems
    assert not any('\n' in p for p in problems)
    if 'with care' in name or 'another set' in name:
        return  # what was sealed anew is believed by the next run, which then refuses it as another recipe
    make(corpus, copy, repair=True)
    assert verify_set(copy) == [] and tree(copy) == tree(whole)


@pytest.mark.parametrize('name', extra)
def test_verify_finds_an_extra_file(name, copy):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b'x')
    problems = verify_set(copy)
    assert len(problems) == 1 and ('does not belong to the set' in problems[0] or 'left of a run' in problems[0])


def test_verify_finds_an_extra_folder(copy):
    (copy / 'val/images/empty').mkdir()
    assert verify_set(copy) == [f'{copy}/val/images/empty does not belong to the set']


def test_a_second_run_looks_at_sizes_and_repair_at_bytes(copy, corpus):
    flip(copy / 'val/images/val_000007.png')
    (copy / 'val/images/val_000001.png').write_bytes(b'')
    assert make(corpus, copy)['images_made'] == 25  # the empty image's chunk, by which the other is repaired too
    flip(copy / 'val/images/val_000007.png')
    assert make(corpus, copy)['images_made'] == 0 and len(verify_set(copy)) == 1
    assert make(corpus, copy, repair=True)['images_made'] == 25 and verify_set(copy) == []


# ---- stopped, in any way


def test_what_a_kill_in_the_middle_of_a_write_leaves_is_swept_up(copy, whole, corpus):
    for p in (
        '.generation_metadata.json.9',
        '.run.json.9',
        'train/.samples.jsonl.77',
        'train/.metadata.json.77',
        'train/images/.train_000003.png.1234',
        'val/labels/.val_000003.txt.5',
    ):
        (copy / p).write_bytes(b'half')
    (copy / 'val/parts').mkdir()
    (copy / 'val/parts/.000000.jsonl.5').write_bytes(b'half')
    assert len(verify_set(copy)) == 7
    assert make(corpus, copy)['images_made'] == 0 and verify_set(copy) == [] and tree(copy) == tree(whole)


child = '''import sys
from khmer_ocr.synth.set_layouts import PngLayout, ShardLayout
PngLayout.chunk = ShardLayout.chunk = 10
from khmer_ocr.cli.app import app
app(['generate', '--corpus', sys.argv[1], '--out', sys.argv[2], '--max-lines', '150', *sys.argv[3:]])'''


def complaints(err):
    "What is no progress, nor the warning where only the embedded font is there"
    return [l for l in err.splitlines() if not l.startswith(('train: ', 'val: ', 'test: ', 'warning: no fonts'))]


def start(corpus, out, *more, **kw):
    return subprocess.Popen(
        [sys.executable, '-c', child, corpus, str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
        **kw,
    )


def wait_a_while(p, out, rng) -> bool:
    "Until some time has passed, or some more images are there; False if the run ended before"

    def count():
        return len(list(out.glob('*/images/*.png')))

    until, enough = time.monotonic() + rng.uniform(0.1, 1.5), count() + rng.randint(1, 60)
    by_time = rng.random() < 0.5
    while p.poll() is None:
        if time.monotonic() > until if by_time else count() >= enough:
            return True
        time.sleep(0.005)
    return False


def kill(p, rng):
    "kill -9 of the run, or of one of its workers, which ends the run with one line"
    own = psutil.Process(p.pid).children(recursive=True)
    workers = [c for c in own if 'spawn_main' in ' '.join(c.cmdline())]
    if workers and rng.random() < 0.3:
        rng.choice(workers).kill()
        _, err = p.communicate(timeout=60)
        printed = complaints(err)
        assert (
            p.returncode == 0 or p.returncode == 1 and len(printed) == 1 and 'worker process was killed' in printed[0]
        ), err
    else:
        p.kill()
        p.communicate()
    assert not psutil.wait_procs(own, timeout=10)[1], 'a worker survived its parent'


def test_a_worker_killed_between_two_splits_is_one_line_too(corpus, tmp_path):
    class Broken(Executor):
        def submit(self, *args):
            raise BrokenExecutor('a child process terminated abruptly')

    with pytest.raises(KhmerOCRError, match='worker process was killed'):
        generate_set(Recipe(corpus=corpus), tmp_path / 'set', max_lines=3, executor=Broken(), progress=False)


@posix
def test_killed_at_twenty_random_moments(corpus, tmp_path):
    rng, kills, go = random.Random(20), 0, lambda out: start(corpus, out, '--workers', '2')
    assert go(tmp_path / 'whole').wait() == 0
    whole = tree(tmp_path / 'whole')
    seen = []
    while kills < 20:
        p = go(tmp_path / 'set')
        if wait_a_while(p, tmp_path / 'set', rng):
            kills += 1
            seen.append(len(list(tmp_path.glob('set/*/images/*.png'))))
            try:
                kill(p, rng)
                continue
            except psutil.NoSuchProcess:
                pass  # it ended that very moment
        assert p.wait() == 0 and tree(tmp_path / 'set') == whole
        shutil.rmtree(tmp_path / 'set')  # all done: from the beginning
    assert go(tmp_path / 'set').wait() == 0
    assert tree(tmp_path / 'set') == whole and verify_set(tmp_path / 'set') == []
    print('killed at', seen, 'images')


@posix
@pytest.mark.parametrize(
    'command',
    [
        ('generate', '--max-lines', '60', '--format', 'shards', '--out'),
        ('validation-set', '--num-samples', '150', '--augmented', '--output-dir'),
    ],
    ids=lambda c: c[0],
)
def test_killed_shards_and_validation_sets(corpus, tmp_path, command):
    code = (
        child[: child.index('app([')] + f"app([{command[0]!r}, '--corpus', sys.argv[1], *{command[1:]!r}, sys.argv[2]])"
    )

    def go(out):
        return subprocess.Popen(
            [sys.executable, '-c', code, corpus, str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    rng, out = random.Random(3), tmp_path / 'set'
    for k in range(4):
        p, n = go(out), len(list(out.rglob('parts/*.jsonl')))
        while p.poll() is None and len(list(out.rglob('parts/*.jsonl'))) <= n:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        p.kill()
        p.wait()
    for d in (out, tmp_path / 'whole'):
        assert go(d).wait() == 0
    assert tree(out) == tree(tmp_path / 'whole')
    assert (verify_set if command[0] == 'generate' else validate_validation_set)(out) == []


@posix
@pytest.mark.parametrize('more', [('--workers', '2'), ('--workers', '1'), ('--format', 'shards')], ids=str)
def test_ctrl_c_in_a_terminal_is_one_line_and_resumes(corpus, tmp_path, more):
    p = start(
        corpus,
        tmp_path / 'set',
        *more,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob('set/train/parts/*.jsonl')) and p.poll() is None:
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and complaints(err) == [
        'khmer-ocr: stopped; what was finished stays, and the same command goes on from there'
    ], err
    for d in ('set', 'whole'):
        assert start(corpus, tmp_path / d, *more).wait() == 0
    assert tree(tmp_path / 'set') == tree(tmp_path / 'whole')


@pytest.fixture
def disk(tmp_path):
    "A disk of 400 kB"
    d = tmp_path / 'disk'
    d.mkdir()

    def mount(*args):
        return (
            shutil.which('mount') and not subprocess.run(['mount', *args, str(d)], stderr=subprocess.DEVNULL).returncode
        )

    if os.name == 'nt' or not mount('-t', 'tmpfs', '-o', 'size=400k', 'tmpfs'):
        pytest.skip('no right to mount a small disk')
    yield d, lambda how: mount('-o', f'remount,{how}')
    subprocess.run(['umount', '-l', str(d)])


@pytest.mark.parametrize('more', [('--workers', '1'), ('--workers', '2'), ('--format', 'shards')], ids=str)
@pytest.mark.parametrize(
    'why, broken, mended',
    [('No space left on device', 'size=400k', 'size=20m'), ('Read-only file system', 'ro', 'rw,size=20m')],
    ids=['full', 'read-only'],
)
def test_disk_full_or_read_only_is_one_line_and_resumes(corpus, tmp_path, disk, more, why, broken, mended):
    d, remount = disk
    assert remount(broken)
    p = start(corpus, d / 'set', *more)
    out, err = p.communicate(timeout=60)
    printed = complaints(err)
    assert (
        p.returncode == 1
        and len(printed) == 1
        and printed[0].startswith('khmer-ocr: Cannot write')
        and why in printed[0]
    ), err
    assert not [f for f in d.rglob('.*')]
    assert remount(mended)
    for out in (d / 'set', tmp_path / 'whole'):
        p = start(corpus, out, *more)
        assert p.communicate(timeout=60) and p.returncode == 0
    assert tree(d / 'set') == tree(tmp_path / 'whole')


@posix
def test_a_limit_on_files_is_one_line(corpus, tmp_path):
    import resource

    p = start(corpus, tmp_path / 'set', preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
    out, err = p.communicate(timeout=60)
    assert p.returncode == 1 and 'Cannot write' in err and 'Traceback' not in err


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / 'a.png').mkdir()
    with pytest.raises(KhmerOCRError, match='a.png'):
        write_atomic(tmp_path / 'a.png', b'x')
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']


# ---- the fixed validation set


def test_validation_set(corpus, tmp_path, small_chunks):
    for w in (1, 2, 3):
        make_validation_set(tmp_path / f'{w}', num_samples=30, random_seed=5, corpus=corpus, workers=w, progress=False)
    assert tree(tmp_path / '1') == tree(tmp_path / '2') == tree(tmp_path / '3')
    assert {p.name for p in (tmp_path / '1').iterdir()} == {
        'images',
        'labels',
        'metadata.json',
        'samples.jsonl',
        'validation_texts.txt',
        'run.json',
    }
    assert validate_validation_set(tmp_path / '1') == []
    texts = (tmp_path / '1/validation_texts.txt').read_text(encoding='utf-8').splitlines()
    assert len(set(texts)) == 30 and set(texts) <= set(load_lines(corpus, 'val'))


def test_augmented_validation_set(corpus, tmp_path, small_chunks):
    for w in (1, 2):
        make_validation_set(
            tmp_path / f'{w}', num_samples=30, corpus=corpus, augmented='buoy2022', workers=w, progress=False
        )
    make_validation_set(tmp_path / 'plain', num_samples=30, corpus=corpus, progress=False)
    assert tree(tmp_path / '1') == tree(tmp_path / '2') and validate_validation_set(tmp_path / '1') == []
    rows, plain = (
        [json.loads(l) for l in (tmp_path / d / 'samples.jsonl').read_text(encoding='utf-8').splitlines()]
        for d in ('1', 'plain')
    )
    joined = [r for r in rows if 'joined' in r['ops']]
    assert 3 < len(joined) < 28 and sum(bool(r['ops']) for r in rows) > 25 and not any(r['ops'] for r in plain)
    for r, q in zip(rows, plain):
        assert r['font'] == q['font'] and (
            len(r['text']) > len(q['text']) if 'joined' in r['ops'] else r['text'] == q['text']
        )
    assert (tmp_path / '1/validation_texts.txt').read_text(encoding='utf-8').splitlines() == [r['text'] for r in rows]
    with pytest.raises(KhmerOCRError, match='augment_val'):
        make_validation_set(tmp_path / '1', num_samples=30, corpus=corpus, progress=False)


def test_the_validation_set_does_not_depend_on_the_processor(corpus, tmp_path):
    plain = dict(
        OPENCV_CPU_DISABLE='AVX512-SKX,AVX2,AVX,FP16', OPENCV_IPP='disabled', NPY_DISABLE_CPU_FEATURES='X86_V4 X86_V3'
    )  # an old x86; without meaning elsewhere
    for d, env in (('new', {}), ('old', plain)):
        code = (
            'from khmer_ocr.synth.store import make_validation_set; '
            f'make_validation_set({str(tmp_path / d)!r}, 40, corpus={corpus!r}, progress=False)'
        )
        subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code], env=os.environ | env, check=True, capture_output=True
        )
    assert tree(tmp_path / 'new') == tree(tmp_path / 'old')


def test_sets_of_an_earlier_version(corpus, tmp_path):
    make_validation_set(tmp_path / 'v', 5, corpus=corpus, progress=False)
    make(corpus, tmp_path / 's', 2)
    for p in (tmp_path / 'v/metadata.json', tmp_path / 's/generation_metadata.json'):
        d = json.loads(p.read_text())
        del d['checksum']
        d.get('provenance', d)['version'] = 1
        p.write_text(json.dumps(d))
    (tmp_path / 's/train/metadata.json').unlink()
    (tmp_path / 's/val/metadata.json').unlink()
    for f, why in (
        (lambda: validate_validation_set(tmp_path / 'v'), 'earlier version'),
        (lambda: verify_set(tmp_path / 's'), 'earlier version'),
        (lambda: make(corpus, tmp_path / 's', 2), 'version: 1 there, 2 now'),
        (
            lambda: make_validation_set(tmp_path / 'v', 5, corpus=corpus, progress=False),
            'another validation set .version: 1 there, 2 now',
        ),
    ):
        with pytest.raises(KhmerOCRError, match=why):
            f()


def recorded_by_code(folder, code):
    "Turn the records of a set into those of a time when a hash of source text stood in place of DRAWING_VERSION"
    for path in (folder / 'generation_metadata.json', *folder.glob('*/metadata.json')):
        record = json.loads(path.read_text())
        made_of = record.get('provenance', record)
        assert made_of.pop('drawing') == DRAWING_VERSION
        made_of['code'] = code
        write_checked(path, record)


def test_a_set_of_the_last_code_before_versions_is_verified_and_goes_on(corpus, tmp_path, small_chunks):
    (code,) = records._DRAWING_OF_CODE
    make(corpus, tmp_path / 'set', 12)
    recorded_by_code(tmp_path / 'set', code)
    assert verify_set(tmp_path / 'set') == []
    before = tree(tmp_path / 'set')
    assert make(corpus, tmp_path / 'set', 12)['images_made'] == 0
    assert tree(tmp_path / 'set') == before  # its records stay as they were
    assert make(corpus, tmp_path / 'set', 25)['images_made'] == 30
    assert verify_set(tmp_path / 'set') == []
    make(corpus, tmp_path / 'whole', 25)
    images = {path: sha for path, sha in tree(tmp_path / 'whole').items() if not path.endswith('metadata.json')}
    assert images.items() <= tree(tmp_path / 'set').items()


def test_a_set_of_unknown_code_is_verified_but_not_completed(corpus, tmp_path):
    make(corpus, tmp_path / 'set', 3)
    recorded_by_code(tmp_path / 'set', 'c0ffee' * 10 + '0000')
    before = tree(tmp_path / 'set')
    assert verify_set(tmp_path / 'set') == []
    with pytest.raises(KhmerOCRError, match=r'drawn by earlier code \(c0ffeec0\), which may draw other images') as e:
        make(corpus, tmp_path / 'set', 5)
    assert '\n' not in str(e.value)
    assert tree(tmp_path / 'set') == before


def test_a_model_recorded_by_code_is_known_by_its_version():
    (code,) = records._LEARNED_OF_CODE
    old = dict(look=dict(model='m', code=code, torch='2'))
    assert records.with_versions(old) == dict(look=dict(model='m', version=1, torch='2'))
    assert old['look']['code'] == code  # the record itself is not changed


validation_faults = {
    'a flipped byte': (lambda d: flip(d / 'images/val_000001.png'), 1),
    'a text': (lambda d: edit(d / 'validation_texts.txt', '\n', '\n\n'), 1),
    'no texts': (lambda d: (d / 'validation_texts.txt').unlink(), 1),
    'an extra file': (lambda d: (d / 'labels/x').write_text(''), 1),
    'swapped labels': (lambda d: swap(d / 'labels/val_000001.txt', d / 'labels/val_000002.txt'), 2),
    'edited metadata': (lambda d: edit(d / 'metadata.json', '"redrawn": ', '"redrawn": 1'), 1),
    'edited record': (lambda d: edit(d / 'samples.jsonl', '"attempts": 1', '"attempts": 2'), 1),
    'no metadata': (lambda d: (d / 'metadata.json').unlink(), 1),
}


@pytest.mark.parametrize('name', validation_faults)
def test_validate_only_finds_and_making_it_again_repairs(name, corpus, tmp_path):
    def go():
        return make_validation_set(tmp_path / 'v', num_samples=5, corpus=corpus, progress=False)

    go()
    whole = tree(tmp_path / 'v')
    plant, n = validation_faults[name]
    plant(tmp_path / 'v')
    assert len(validate_validation_set(tmp_path / 'v')) == n, validate_validation_set(tmp_path / 'v')
    (tmp_path / 'v/labels/x').unlink(missing_ok=True)
    go()
    assert validate_validation_set(tmp_path / 'v') == [] and tree(tmp_path / 'v') == whole


def test_a_stopped_validation_set_is_not_mixed_with_another(corpus, tmp_path):
    def go(seed):
        return make_validation_set(tmp_path / 'v', num_samples=5, random_seed=seed, corpus=corpus, progress=False)

    go(1)
    whole = tree(tmp_path / 'v')
    (tmp_path / 'v/parts').mkdir()
    (tmp_path / 'v/parts/provenance.json').write_bytes(
        checked_bytes(json.loads((tmp_path / 'v/metadata.json').read_text())['provenance'])
    )
    for f in ('metadata.json', 'samples.jsonl', 'validation_texts.txt'):
        (tmp_path / 'v' / f).unlink()  # as a kill leaves it
    with pytest.raises(KhmerOCRError, match='another validation set'):
        go(2)
    go(1)
    assert tree(tmp_path / 'v') == whole


# ---- the commands


def call(*args):
    from typer.testing import CliRunner
    from khmer_ocr.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_commands(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    r = call('generate', '--corpus', corpus, '--out', 'set', '--max-lines', '4,2,1', '--json')
    assert r.exit_code == 0 and {k: s['images'] for k, s in json.loads(r.stdout)['splits'].items()} == dict(
        train=4, val=2, test=1
    )
    assert call('generate', '--out', 'set', '--stats').stdout.splitlines()[:3] == [
        '=== Synthetic Image Statistics ===',
        'Output directory: set',
        'Total images: 7',
    ]
    flip(tmp_path / 'set/train/images/train_000001.png')
    r = call('generate', '--out', 'set', '--verify')
    assert r.exit_code == 1 and 'train_000001.png has changed' in r.stderr and '--repair' in r.stderr
    r = call('generate', '--out', 'set', '--verify', '--json')
    assert r.exit_code == 1 and [Path(p.split()[0]).name for p in json.loads(r.stdout)['problems']] == [
        'train_000001.png'
    ]
    assert (
        call('generate', '--corpus', corpus, '--out', 'set', '--max-lines', '4,2,1', '--repair').exit_code == 0
        and call('generate', '--out', 'set', '--verify').exit_code == 0
    )
    assert (
        call(
            'generate',
            '--corpus',
            corpus,
            '--out',
            'tar',
            '--max-lines',
            3,
            '--format',
            'shards',
            '--random-text',
            '--seed',
            7,
        ).exit_code
        == 0
        and (tmp_path / 'tar/train/train-000000.tar').exists()
    )
    for bad in ('4,2', 'ten', '0', '4,,1', '-3', '1.5'):
        r = call('generate', '--max-lines', bad)
        assert (
            r.exit_code == 1
            and '--max-lines takes a whole number from 1 up' in r.stderr
            and 'Traceback' not in r.stderr
        )
    r = call('generate', '--format', 'shrads')
    assert r.exit_code == 1 and 'did you mean shards?' in r.stderr


def test_the_validation_set_commands(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    go = ('validation-set', '--corpus', corpus, '--num-samples', 5)
    assert (
        call(*go).exit_code == 0
        and call(*go, '--augmented').exit_code == 0
        and call(*go, '--preset', 'light', '--output-dir', 'light').exit_code == 0
    )
    for d, preset in (
        ('data/validation_fixed', 'clean'),
        ('data/validation_augmented', 'buoy2022'),
        ('light', 'light'),
    ):
        assert (
            json.loads((tmp_path / d / 'metadata.json').read_text())['provenance']['recipe']['preset'] == preset
            and call('validation-set', '--validate-only', '--output-dir', d).exit_code == 0
        )
    assert (
        json.loads(call(*go, '--json').stdout)['num_samples'] == 5
        and json.loads(call('validation-set', '--validate-only', '--json').stdout)['problems'] == []
    )
    assert 'data/validation_augmented: every file' in call('validation-set', '--validate-only', '--augmented').stdout
    flip(tmp_path / 'light/images/val_000001.png')
    assert call('validation-set', '--validate-only', '--output-dir', 'light').exit_code == 1
    assert (
        call(*go, '--preset', 'light', '--output-dir', 'light').exit_code == 0
        and call('validation-set', '--validate-only', '--output-dir', 'light').exit_code == 0
    )
