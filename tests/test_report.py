"A report is one file that needs nothing but itself."

import re
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from khmer_ocr.reporting.html import font_css, outside_references, write_report
from khmer_ocr.core.errors import KhmerOCRError


def report(tmp_path, *cells):
    nbformat.write(new_notebook(cells=list(cells)), tmp_path / 'run.ipynb')
    return write_report(tmp_path / 'run.ipynb', tmp_path / 'report.html').read_text(encoding='utf-8')


def test_nothing_from_outside(tmp_path):
    page = report(
        tmp_path,
        new_markdown_cell(
            '# ខ្មែរ\n\n[link](https://example.org), $x^2$, ![a](data:image/png;base64,AAAA)\n\n'
            '```mermaid\ngraph TD\n```'
        ),
        new_code_cell(
            '1', outputs=[new_output('execute_result', data={'text/html': '<b>bold</b>', 'text/plain': 'plain'})]
        ),
    )
    assert outside_references(page) == []
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//|url\(["\']?(https?:)?//|@import', page)
    assert '<script' not in page
    assert '<link' not in page
    assert '<iframe' not in page
    assert 'example.org' in page
    assert '<b>bold</b>' in page


def test_font_is_inside_and_code_is_folded(tmp_path):
    page = report(tmp_path, new_markdown_cell('# A run'), new_code_cell('x = 1'))
    assert 'font/woff2;base64,' in page
    assert font_css() in page
    assert len(page) < 100_000
    assert '<details class="code">' in page
    assert '<details open' not in page
    assert '<title>A run</title>' in page


def test_an_outside_picture_is_refused(tmp_path):
    with pytest.raises(KhmerOCRError, match='example.org/x.png'):
        report(tmp_path, new_markdown_cell('![x](https://example.org/x.png)'))
    assert not (tmp_path / 'report.html').exists()


def test_progress_on_stderr_stays_out(tmp_path):
    page = report(
        tmp_path,
        new_code_cell(
            '1',
            outputs=[
                new_output('stream', name='stderr', text='50% it/s'),
                new_output('stream', name='stdout', text='kept'),
            ],
        ),
    )
    assert '50% it/s' not in page
    assert 'kept' in page


@pytest.mark.parametrize('content', ['', 'text', '{}', '[]', '{"cells": 3}'])
def test_what_is_no_notebook_is_refused(tmp_path, content):
    (tmp_path / 'run.ipynb').write_text(content)
    with pytest.raises(KhmerOCRError, match='run.ipynb') as e:
        write_report(tmp_path / 'run.ipynb', tmp_path / 'report.html')
    assert '\n' not in str(e.value)
    assert not (tmp_path / 'report.html').exists()
