"README.md from nbs/index.ipynb, without Quarto: python tools/readme.py [--check]"

import re
import sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]


def readme() -> str:
    "Markdown of the notebook: hidden cells left out, directives stripped, links made relative to the root"
    nb = nbformat.read(root / 'nbs/index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if c.source.strip() and not re.match(r'#\|\s*hide\s*$', c.source, re.M)]
    for c in nb.cells:
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M) if c.cell_type == 'code' else c.source
    text, resources = MarkdownExporter().from_notebook_node(nb)
    assert not resources['outputs'], 'index.ipynb has a picture as output: save it in a folder and link it'
    text = re.sub(r'\]\(\.\./', '](', text)
    text = re.sub(r'\]\((\w[\w./]*\.ipynb)', r'](nbs/\1', text)
    return '<!-- made from nbs/index.ipynb by tools/readme.py -->\n\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    path, new = root / 'README.md', readme()
    if '--check' not in sys.argv:
        path.write_text(new, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != new:
        sys.exit('README.md is not in sync with nbs/index.ipynb: run `make readme`')
