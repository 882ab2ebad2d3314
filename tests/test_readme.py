"""README.md is made from nbs/index.ipynb; what README and the pages of docs/ link to and name is there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
PAGES = [root / 'README.md', root / 'CONTRIBUTING.md', *sorted((root / 'docs').glob('*.md'))]
FOUNDING = (root / 'docs/founding_documents.md').read_text(encoding='utf-8')
NAMES = sorted(
    set(re.findall(r'`((?:text|synth|training|data|models|generative|inference|experiments)\.\w+)', FOUNDING))
)


def text(path):
    return path.read_text(encoding='utf-8')


def test_readme_is_in_sync():
    subprocess.run([sys.executable, root / 'tools/readme.py', '--check'], check=True)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_exist(page):
    for link in re.findall(r'\]\(([^)#\s]+)', text(page)):
        if not re.match(r'\w+:', link):
            assert (page.parent / link).exists(), link


def test_every_library_notebook_is_linked_from_the_readme():
    readme = text(root / 'README.md')
    for notebook in sorted((root / 'nbs').glob('[0-9]*/[0-9]*.ipynb')):
        assert f'({notebook.relative_to(root)})' in readme, notebook.name


def test_every_run_notebook_is_named_in_the_readme():
    readme = text(root / 'README.md')
    for notebook in sorted((root / 'nbs/runs').glob('*.ipynb')):
        assert f'`{notebook.stem}`' in readme, notebook.name


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'inference.py'])
def test_names_of_the_founding_documents_are_there(name):
    room, attribute = name.split('.')
    assert hasattr(importlib.import_module(f'khmer_ocr.{room}'), attribute)


def test_rooms_are_listed_in_their_order():
    sys.path.insert(0, str(root / 'tools'))
    import rooms

    listed = re.findall(r'^\| `(\w+)` \|', text(root / 'CONTRIBUTING.md'), re.M)
    assert listed == list(rooms.ROOMS)
