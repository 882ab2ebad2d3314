"""The notebooks and an API reference as a site of static pages, searchable and offline: python tools/docs.py [--check]

Every library notebook becomes a page (nbconvert), every room an API page made from the docments of what it exports
(nbdev's `show_doc`), `docs/*.md` are taken as they are, and MkDocs with the theme Material builds `_docs/`. Nothing is
fetched when a page is opened: the Khmer font is a file of the site. `--check` only looks at the site that is there: for
links that lead nowhere and for anything that is loaded from outside."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import rooms
from nbconvert import MarkdownExporter
from nbdev.showdoc import show_doc

root = Path(__file__).resolve().parents[1]
source, site = root / '_docs_src', root / '_docs'
SHIM = (
    'iframe-worker',
    '1.0.4',
)  # of npm: search in pages that are opened as files; the theme would load it from outside
SHIM_URL = 'https://unpkg.com/iframe-worker/shim'
FONT = 'NotoSansKhmer.ttf'

CSS = f"""
@font-face {{ font-family: "Noto Sans Khmer"; src: url("{FONT}"); }}
:root {{ --md-text-font: "Noto Sans Khmer"; }}
body, input {{ font-family: system-ui, sans-serif, "Noto Sans Khmer"; }}
code, pre, kbd, pre code {{
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace, "Noto Sans Khmer" !important;
}}
"""

CONFIG = dict(
    site_name='khmer_ocr',
    site_url='',
    docs_dir=str(source),
    site_dir=str(site),
    use_directory_urls=False,
    theme=dict(
        name='material',
        font=False,
        features=['navigation.indexes', 'navigation.top', 'toc.follow', 'content.code.copy', 'search.highlight'],
        palette=[
            dict(
                media='(prefers-color-scheme: light)',
                scheme='default',
                toggle=dict(icon='material/brightness-7', name='Dark'),
            ),
            dict(
                media='(prefers-color-scheme: dark)',
                scheme='slate',
                toggle=dict(icon='material/brightness-4', name='Light'),
            ),
        ],
    ),
    plugins=['search', 'offline'],
    extra_css=['khmer.css'],
    markdown_extensions=[
        'tables',
        'admonition',
        'pymdownx.highlight',
        'pymdownx.superfences',
        dict(toc=dict(permalink=True)),
    ],
)


def readable(cell) -> bool:
    "Is a cell worth a place on a page? Hidden cells, directives alone and the export call are not"
    text = cell.source.strip()
    return bool(text) and not re.match(r'#\|\s*(hide|default_exp)\b', text) and 'nbdev_export(' not in text


def notebook_page(path: Path, target: Path):
    "A notebook as Markdown, its pictures beside it"
    nb = nbformat.read(path, as_version=4)
    nb.metadata['language_info'] = dict(name='python')  # for colours
    nb.cells = [cell for cell in nb.cells if readable(cell)]
    for cell in nb.cells:
        if cell.cell_type == 'code':
            cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    body, resources = MarkdownExporter().from_notebook_node(nb, dict(output_files_dir=f'{target.stem}_files'))
    body = re.sub(r'\]\(([^)#:\s]+)\.ipynb', lambda link: f']({page_of(path.parent, link[1])}', body)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(body, encoding='utf-8')
    for name, data in resources['outputs'].items():
        picture = target.parent / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(data)


def page_of(folder: Path, link: str) -> str:
    "The page that a link to a notebook (without its suffix) means"
    return f'{link}.md' if (folder / f'{link}.ipynb').exists() else link


@contextmanager
def parsing_once():
    "`show_doc` finds a class by parsing its whole module, each time: parse each module once"
    parse = ast.parse
    ast.parse = lru_cache(256)(parse)
    try:
        yield
    finally:
        ast.parse = parse


def api_page(room: str) -> str:
    "Signatures, docments and docstrings of what a room exports, as Markdown"
    lines = [f'# {room}: reference', '', f'{rooms.ROOMS[room][0].upper()}{rooms.ROOMS[room][1:]}.', '']
    folder = next((root / 'nbs').glob(f'[0-9][0-9]_{room}')).name
    for module in rooms.modules(room):
        notebook = next((root / 'nbs' / folder).glob(f'[0-9][0-9]*_{module.stem}.ipynb'))
        loaded = importlib.import_module(f'khmer_ocr.{room}.{module.stem}')
        lines += [f'## {module.stem}', '', f'{loaded.__doc__ or ""} ([notebook](../{folder}/{notebook.stem}.md))', '']
        for name in rooms.exported(module):
            lines += [symbol_text(name, getattr(loaded, name)), '']
    return '\n'.join(lines)


def shown(symbol) -> str:
    "What nbdev's `show_doc` says of a symbol, without its rule and its link to a host"
    text = re.sub(r'^\[source\].*$', '', show_doc(symbol)._repr_markdown_(), flags=re.M)
    return re.sub(r'^---\n*', '', text.strip()).strip()


def symbol_text(name: str, symbol) -> str:
    "The reference of one name: its docments where it can be called, else its value in a line"
    if not callable(symbol):
        value = re.sub(r'\s+', ' ', repr(symbol))
        return f'### {name}\n\n```python\n{name} = {value[:300]}{" ..." if len(value) > 300 else ""}\n```'
    text = shown(symbol)
    methods = (
        [value for key, value in vars(symbol).items() if not key.startswith('_')] if isinstance(symbol, type) else []
    )
    for method in methods:
        if callable(method) and getattr(method, '__doc__', None):
            text += '\n\n' + shown(method).replace('### ', '#### ', 1)
    return text


def write_sources():
    "Everything that MkDocs needs, in a folder that is made anew"
    from khmer_ocr.reporting.figures import khmer_font_file

    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    shutil.copy(khmer_font_file(), source / FONT)
    (source / 'khmer.css').write_text(CSS, encoding='utf-8')
    nav = [dict(Home='index.md')]
    notebook_page(root / 'nbs/index.ipynb', source / 'index.md')
    for page in sorted((root / 'docs').glob('*.md')):
        shutil.copy(page, source / page.name)
        nav.append(page.name)
    for folder in sorted((root / 'nbs').glob('[0-9][0-9]_*')):
        pages = []
        for notebook in sorted(folder.glob('[0-9]*.ipynb')):
            page = f'{folder.name}/{notebook.stem}.md'
            notebook_page(notebook, source / page)
            pages.append(page)
        room = folder.name[3:]
        (source / 'reference').mkdir(exist_ok=True)
        with parsing_once():
            reference = api_page(room)
        (source / f'reference/{room}.md').write_text(reference, encoding='utf-8')
        nav.append({room: [*pages, dict(reference=f'reference/{room}.md')]})
    pages = []
    for notebook in sorted((root / 'nbs/runs').glob('*.ipynb')):
        pages.append(f'runs/{notebook.stem}.md')
        notebook_page(notebook, source / pages[-1])
    nav.append(dict(runs=pages))
    mend_root_links()
    (root / '_mkdocs.json').write_text(json.dumps(CONFIG | dict(nav=nav), ensure_ascii=False), encoding='utf-8')


def mend_root_links():
    "Links of the front page and of docs/ to files of the repository that are no pages of the site become plain text"
    for page in [source / 'index.md', *(source / p.name for p in (root / 'docs').glob('*.md'))]:
        text = page.read_text(encoding='utf-8')
        text = re.sub(r'\]\((?:\.\./)*docs/([\w.-]+\.md)', r'](\1', text)
        text = re.sub(r'\]\((?:\.\./)*nbs/([\w./-]+)\.ipynb', r'](\1.md', text)
        text = re.sub(r'\[([^\]]+)\]\((?!\w+:|#)([^)#]+)[^)]*\)', keep_if_there(page), text)
        page.write_text(text, encoding='utf-8')


def keep_if_there(page: Path):
    "For `re.sub`: a link stays when its file is part of the site"
    return lambda link: link[0] if (page.parent / unquote(link[2])).exists() else link[1]


class Links(HTMLParser):
    "Collects what a page links to, what it loads, and the anchors that it has"

    def __init__(self):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs:
            self.anchors.add(attrs['id'])
        if tag == 'a' and attrs.get('href'):
            self.links.append(attrs['href'])
        loads = attrs.get('src') or (attrs.get('href') if tag == 'link' and attrs.get('rel') != 'canonical' else None)
        if loads:
            self.loaded.append(loads)


def parse(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text(encoding='utf-8'))
    return links


def dead_links() -> list[str]:
    "What is wrong with the site: links and anchors that lead nowhere, and anything loaded from outside"
    pages = {path.resolve(): parse(path) for path in site.rglob('*.html') if path.name != '404.html'}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(site)
        wrong += [f'{name} loads {url}' for url in page.loaded if urlsplit(url).netloc]
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                wrong.append(f'{name} links to {url}')
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors | {'__comments'}
            ):
                wrong.append(f'{name} links to {url}: no such heading')
    return sorted(set(wrong))


def add_shim():
    "The script that search needs in pages opened as files becomes a file of the site"
    from khmer_ocr.core.packages import download, read_archive

    with tempfile.TemporaryDirectory() as folder:
        archive = download('npm', *SHIM, folder)
        files = read_archive(archive, lambda name: name == 'package/shim/index.js')
    (site / 'iframe-worker.js').write_bytes(files['package/shim/index.js'])
    for page in site.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        up = '../' * len(page.relative_to(site).parent.parts)
        page.write_text(text.replace(SHIM_URL, f'{up}iframe-worker.js'), encoding='utf-8')


def build():
    write_sources()
    program = [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--config-file', str(root / '_mkdocs.json')]
    subprocess.run(program, cwd=root, check=True)
    add_shim()


if __name__ == '__main__':
    if '--check' not in sys.argv:
        build()
        print(f'{sum(1 for _ in site.rglob("*.html"))} pages: open {site.relative_to(root)}/index.html')
    if problems := dead_links():
        sys.exit('\n'.join(problems[:30]))
