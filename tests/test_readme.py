"README.md is made from nbs/index.ipynb, and what it links to is there."

import re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def test_readme_is_in_sync():
    subprocess.run([sys.executable, root / 'tools/readme.py', '--check'], check=True)


def test_readme_links_exist():
    for link in re.findall(r'\]\(([^)#]+)', (root / 'README.md').read_text()):
        if not re.match(r'\w+:', link):
            assert (root / link).exists(), link
