"The tools that all rooms share: whole files, locks, settings, random streams, packages"

import os
import re
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from khmer_ocr.core.config import (
    check_above,
    check_at_least,
    check_below,
    check_choices,
    check_ranges,
    configure,
    normalised_by,
    read_settings,
    setting_error,
)
from khmer_ocr.core.errors import KhmerOCRError, suggest
from khmer_ocr.core.files import (
    block_signals,
    folder_lock,
    make_folder,
    open_atomic,
    package_folder,
    project_root,
    write_atomic,
)
from khmer_ocr.core.packages import FetchError, download, error_line, find_program, read_archive, run_client
from khmer_ocr.core.rng import Stream, named_rng, stream_rng, text_hash

root = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks of POSIX')


def names(folder):
    return sorted(p.name for p in Path(folder).rglob('*'))


# ---- files


def test_write_atomic(tmp_path):
    path = tmp_path / 'new' / 'file.txt'
    write_atomic(path, 'ក\n')
    write_atomic(str(path), b'x')
    assert path.read_bytes() == b'x' and names(path.parent) == ['file.txt']
    with pytest.raises(KhmerOCRError, match='is a file or below one'):
        write_atomic(path / 'below a file', 'x')
    with pytest.raises(TypeError):
        write_atomic(path, 5)
    assert path.read_bytes() == b'x' and names(path.parent) == ['file.txt']


def test_write_atomic_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomic('a.txt', 'ក', sync=False)
    assert (tmp_path / 'a.txt').read_text(encoding='utf-8') == 'ក' and names(tmp_path) == ['a.txt']


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'a.bin'
    write_atomic(path, b'old')
    with pytest.raises(KeyboardInterrupt):
        with open_atomic(path) as f:
            f.write(b'half of the new')
            raise KeyboardInterrupt
    assert path.read_bytes() == b'old' and names(tmp_path) == ['a.bin']


def test_a_folder_in_the_way_is_one_line(tmp_path):
    (tmp_path / 'a.png').mkdir()
    with pytest.raises(KhmerOCRError, match='a.png') as e:
        write_atomic(tmp_path / 'a.png', b'x')
    assert '\n' not in str(e.value) and names(tmp_path) == ['a.png']


@posix
def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    code = f'''
import os, sys
from khmer_ocr.core.files import folder_lock
lock = folder_lock({str(tmp_path)!r})
lock.__enter__()
print("held", flush=True)
sys.stdin.read()
'''
    env = os.environ | dict(PYTHONPATH=str(root))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder = subprocess.Popen([sys.executable, '-c', code], env=env, **pipes)
    try:
        assert holder.stdout.readline() == b'held\n'
        with pytest.raises(KhmerOCRError, match='Another run is at work'):
            folder_lock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.communicate()
    with folder_lock(tmp_path):
        assert names(tmp_path) == []  # nothing was left behind


@posix
def test_a_lock_opens_when_its_block_fails(tmp_path):
    with pytest.raises(ValueError):
        with folder_lock(tmp_path / 'new'):
            raise ValueError
    with folder_lock(tmp_path / 'new'):
        pass


@posix
@pytest.mark.parametrize('chosen', [(), (signal.SIGINT,)])
def test_signals_wait_for_the_end_of_the_block(chosen):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with block_signals(*chosen):
            signal.raise_signal(signal.SIGINT)
            reached.append('end of the block')
    assert reached == ['end of the block']
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@posix
def test_blocks_of_signals_may_be_nested():
    with pytest.raises(KeyboardInterrupt):
        with block_signals():
            with block_signals(signal.SIGINT):
                signal.raise_signal(signal.SIGINT)
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_the_project_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(root / 'nbs' / '01_core')
    assert project_root('data/sources.json') == project_root('fonts/manifest.json') == root
    monkeypatch.chdir(tmp_path)  # elsewhere: beside the package
    assert project_root('data/sources.json') == package_folder().parent == root
    assert project_root('no/such/file') is None


def test_a_nearer_project_comes_first(tmp_path, monkeypatch):
    write_atomic(tmp_path / 'data' / 'sources.json', '{}')
    make_folder(tmp_path / 'deep' / 'below')
    monkeypatch.chdir(tmp_path / 'deep' / 'below')
    assert project_root('data/sources.json') == tmp_path.resolve()


# ---- settings


@dataclass(frozen=True)
class Toy:
    hidden: int = 160
    channels: tuple[int, ...] = (32, 64)
    name: str = ''
    dropout: float = 0.1
    fast: bool = False
    anything: object = None

    def __post_init__(self):
        check_ranges(self, dict(hidden=(1, 4096), dropout=(0, 0.99)))


@pytest.mark.parametrize(
    'given, says',
    [
        (dict(hiden=1), "Unknown setting 'hiden' in Toy; did you mean hidden?"),
        (dict(zebra=1), "Unknown setting 'zebra' in Toy: known are hidden, channels, "),
        (dict(hidden='many'), "Setting 'hidden' must be int, not 'many'"),
        (dict(hidden=True), "Setting 'hidden' must be int, not True"),
        (dict(hidden=1.5), "Setting 'hidden' must be int, not 1.5"),
        (dict(fast=1), "Setting 'fast' must be bool, not 1"),
        (dict(channels=3), "Setting 'channels' must be tuple, not 3"),
        (dict(hidden=0), "Setting 'hidden' is 0: it must be from 1 to 4096"),
        (dict(dropout=float('nan')), "Setting 'dropout' is nan: it must be from 0 to 0.99"),
        ([1], 'Toy settings must be a table of names and values, not [1]'),
    ],
)
def test_a_wrong_setting_is_one_line(given, says):
    with pytest.raises(KhmerOCRError, match=re.escape(says)) as e:
        configure(Toy, given)
    assert '\n' not in str(e.value)


def test_the_kind_of_settings_is_named():
    with pytest.raises(KhmerOCRError, match="Unknown recipe setting 'hiden'; did you mean hidden"):
        configure(Toy, dict(hiden=1), 'recipe')
    with pytest.raises(KhmerOCRError, match='^Recipe settings must be a table'):
        configure(Toy, None, 'recipe')


def test_lists_become_tuples_and_numbers_stay_what_they_are():
    made = configure(Toy, dict(channels=[1, 2], dropout=0, anything=[3]))
    assert made == Toy(channels=(1, 2), dropout=0, anything=(3,))
    assert hash(made) == hash(Toy(channels=(1, 2), dropout=0, anything=(3,)))


@dataclass
class Limits:
    steps: float = 1
    share: float = 0.5
    rate: float = 0.1
    mode: object = 'min'


@pytest.mark.parametrize(
    'check, limits, good, bad, says',
    [
        (check_at_least, dict(steps=1), dict(steps=1), dict(steps=0), "Setting 'steps' is 0: it must be at least 1"),
        (check_below, dict(share=1), dict(share=0.99), dict(share=1), "Setting 'share' is 1: it must be below 1"),
        (check_above, dict(rate=0), dict(rate=1e-9), dict(rate=0), "Setting 'rate' is 0: it must be above 0"),
        (check_choices, dict(mode=(2, 4)), dict(mode=4), dict(mode=3), "Setting 'mode' is 3: it must be one of 2, 4"),
    ],
)
def test_limits(check, limits, good, bad, says):
    check(Limits(**good), limits)
    with pytest.raises(KhmerOCRError, match=re.escape(says)):
        check(Limits(**bad), limits)
    if check is not check_choices:
        with pytest.raises(KhmerOCRError, match='is nan'):
            check(Limits(**dict.fromkeys(bad, float('nan'))), limits)


def test_an_impossible_tuple_is_shown_as_the_list_that_a_file_has():
    assert str(setting_error('size', (8, 4), 'two sizes')) == "Setting 'size' is [8, 4]: it must be two sizes"


def with_parts(values):
    size = values['size']
    return values | dict(size=tuple(size) if isinstance(size, (list, tuple)) else (size, size))


@normalised_by(with_parts)
@dataclass(frozen=True)
class Crop:
    size: tuple = (256, 256)
    flips: bool = False


def test_values_are_normalised_before_a_frozen_dataclass_is_made():
    assert Crop(8) == Crop([8, 8]) == Crop(size=(8, 8)) == configure(Crop, dict(size=[8, 8]))
    assert replace(Crop(8), flips=True) == Crop(8, True)
    assert replace(Crop(), size=4).size == (4, 4)
    with pytest.raises(TypeError, match='sise'):
        Crop(sise=3)


def test_settings_files(tmp_path):
    (tmp_path / 'a.json').write_text('{"a": "//no comment", // a comment\n "b": [1]}')
    (tmp_path / 'a.toml').write_text('a = 1\n[b]\nc = 2\n')
    (tmp_path / 'list.json').write_text('[1]')
    (tmp_path / 'bad.json').write_text('{')
    assert read_settings(tmp_path / 'a.json') == dict(a='//no comment', b=[1])
    assert read_settings(tmp_path / 'a.toml') == dict(a=1, b=dict(c=2))
    for name, says in (
        ('list.json', 'must hold named values'),
        ('bad.json', 'not valid JSON'),
        ('none', 'Cannot read'),
    ):
        with pytest.raises(KhmerOCRError, match=says):
            read_settings(tmp_path / name)


def test_suggestions():
    assert suggest('bacth', ['batch', 'epochs']) == '; did you mean batch?'
    assert suggest('', ['batch']) == suggest('zebra', []) == ''


# ---- random streams


def test_no_number_of_a_stream_is_used_twice():
    "An IntEnum makes a second name for one number an alias, without a word"
    assert len(Stream.__members__) == len({int(s) for s in Stream.__members__.values()})


def test_streams_keep_their_numbers():
    "A set on a disk can be made again only while these numbers stay"
    numbers = {s.name: int(s) for s in Stream}
    frozen = dict(TRAIN_SAMPLES=0, VAL_SAMPLES=1, TEST_SAMPLES=2, BATCH_POOLS=10, LINE_ORDER=11, LINE_SCALE=12)
    frozen |= dict(HIDDEN_SPANS=13, PARAGRAPHS=14, TEACHER_FORCING=15, PAIR_CROPS=19, VALIDATION_LINES=77)
    assert frozen.items() <= numbers.items()


def test_a_stream_is_philox_with_the_seed_the_stream_and_the_place():
    expected = np.random.Generator(np.random.Philox(key=[7, 11], counter=[0, 0, 2, 5]))
    assert stream_rng(7, Stream.LINE_ORDER, 5, 2).integers(2**60) == expected.integers(2**60)
    expected = np.random.Generator(np.random.Philox(key=[7, 77]))
    assert stream_rng(7, Stream.VALIDATION_LINES).integers(2**60) == expected.integers(2**60)
    expected = np.random.Generator(np.random.Philox(key=[7, text_hash('rules')]))
    assert named_rng(7, 'rules').integers(2**60) == expected.integers(2**60)


def test_nobody_makes_a_stream_of_its_own():
    "Every generator from a seed and a stream comes from the register; a key without a seed is a constant"
    own = []
    for path in sorted((root / 'khmer_ocr').rglob('*.py')):
        if path.parent.name != 'core' and path.name != '_modidx.py':
            own += re.findall(r'Philox\(key=\[.*', path.read_text(encoding='utf-8'))
    assert own == []


# ---- packages


def test_a_client_that_fails_is_one_line(tmp_path):
    code = 'import sys; sys.exit("warning: x\\nerror: first\\nerror: second")'
    for last, says in ((False, 'error: first'), (True, 'error: second')):
        with pytest.raises(FetchError) as e:
            run_client([sys.executable, '-c', code], tmp_path, last=last)
        assert str(e.value) == says and e.value.missing == ''
    with pytest.raises(FetchError) as e:
        run_client(['no-such-client'], tmp_path)
    assert e.value.missing == 'no-such-client'


def test_what_a_client_says():
    assert error_line('E: Unable to locate package toy\nW: x') == 'E: Unable to locate package toy'
    assert error_line(' \n') == ''


def test_programs_beside_this_python_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert Path(find_program(Path(sys.executable).name)).parent == Path(sys.executable).parent


def test_no_network_is_one_line(tmp_path):
    with pytest.raises(FetchError, match='No matching distribution'):
        download('pip', 'toy', '1', tmp_path, ['--no-index'])


def test_only_files_that_are_wanted_are_read(tmp_path):
    (tmp_path / 'a.ttf').write_bytes(b'font')
    with tarfile.open(tmp_path / 'toy.tgz', 'w:gz') as tar:
        tar.add(tmp_path / 'a.ttf', 'package/a.ttf')
        tar.add(tmp_path / 'a.ttf', '../../outside.ttf')
        tar.add(tmp_path, 'package/folder.ttf', recursive=False)
    found = read_archive(tmp_path / 'toy.tgz', lambda path: path.startswith('package/') and path.endswith('.ttf'))
    assert found == {'package/a.ttf': b'font'}
    assert not (tmp_path.parent.parent / 'outside.ttf').exists()
