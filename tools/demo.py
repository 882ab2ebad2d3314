"""make demo: the whole way, from fonts and text to a page that is read and scored.

What an earlier run left behind is used again, so a second run is short. `python tools/demo.py --quick` does everything
on a very small scale (for tests)."""

import argparse
import io
import json
import os
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

root = Path(__file__).resolve().parents[1]
os.environ['PATH'] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ.get('PATH', '')]
)  # npm of the pip package, for fetching
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.text.khmer import clusters
from khmer_ocr.core.files import write_atomic


def say(*words):
    print(*words, flush=True)


def step(n, name):
    "A heading; gives a function that prints how it ended and how long it took"
    say(f'\n[{n}/7] {name}')
    t = time.perf_counter()
    return lambda text: say(f'      {text} ({time.perf_counter() - t:.0f} s)')


# 1
def get_fonts():
    from khmer_ocr.synth.fonts import find_fonts, install_fonts

    done = step(1, 'Fonts: fetching what is missing')
    try:
        fonts = install_fonts()
    except KhmerOCRError as e:
        say(f'      {e}\n      going on with the fonts that are here')
        fonts = find_fonts()
    done(f'{len(fonts)} faces of {len({f.family for f in fonts})} families')
    return fonts


# 2
def get_corpus(folder, limit):
    from khmer_ocr.text.corpus import build_corpus, corpus_stats, stats_table

    done = step(2, 'Corpus: Khmer text from packages and rules')
    there = (folder / 'corpus.json').exists()
    stats = corpus_stats(folder) if there else build_corpus(folder, limit=limit)
    say('\n'.join('      ' + l for l in stats_table(stats).splitlines()))
    done(f'{stats["lines"]:,} lines in {folder}' + (', there already' if there else ''))


# 3
def fresh_lines(corpus, data, lines, fixed):
    from khmer_ocr.synth.generator import Recipe
    from khmer_ocr.synth.store import generate_set, make_validation_set

    before = (data / 'validation' / 'metadata.json').exists()
    stats = generate_set(
        Recipe(corpus=str(corpus), preset='light', size=(18.0, 32.0)),
        data / 'set',
        max_lines=lines,
        splits=('train',),
        workers=os.cpu_count() or 1,
    )
    make_validation_set(data / 'validation', num_samples=fixed, corpus=corpus)
    return stats, before and not stats['images_made']


def make_lines(corpus, data, models, lines, fixed):
    from khmer_ocr.synth.store import format_stats

    done = step(3, f'Images: {lines:,} labelled lines to train on, {fixed:,} fixed ones to judge by')
    try:
        stats, there = fresh_lines(corpus, data, lines, fixed)
    except KhmerOCRError as e:
        if 'holds' not in str(e):
            raise
        say('      fonts or text have changed since the last demo: making everything anew')
        for old in (data, models):
            shutil.rmtree(old, ignore_errors=True)
        stats, there = fresh_lines(corpus, data, lines, fixed)
    say('\n'.join('      ' + l for l in format_stats(stats).splitlines() if l))
    done(f'in {data}' + (', there already' if there else ''))


# 4
def loss_text(metrics):
    return f'loss {metrics["first_loss"]:.2f} -> {metrics["last_loss"]:.2f}'


def train_small(corpus, data, models, reports, steps):
    from khmer_ocr.reporting.runs import run_notebook

    done = step(4, 'Training: a small network learns from those lines')
    report, latest = reports / 'training' / 'report.html', models / 'latest.safetensors'
    if report.exists() and latest.exists() and (reports / 'training' / 'metrics.json').exists():
        metrics = json.loads((reports / 'training' / 'metrics.json').read_text())
        if metrics['steps'] >= steps:
            return done(f'there already: {loss_text(metrics)} (delete {models} to train again)')
    run = run_notebook(
        'train_ocr',
        dict(
            data=str(data / 'set/train'),
            corpus=str(corpus),
            validation=str(data / 'validation'),
            validation_samples=100,
            model_dir=str(models),
            steps=steps,
            batch_size=16,
            channels=[16, 24, 32, 48, 96],
            hidden=64,
            layers=1,
            lr=0.004,
            eval_every=max(1, steps // 5),
            ema=0.98,
            threads=1,
            resume=latest.exists(),
        ),
        reports / 'training',
        echo=True,
    )
    wrong = 100 * run.metrics['scores']['cer_folded']
    done(f'{loss_text(run.metrics)}, {wrong:.0f} % of the characters wrong after this much training')


# 5
def score_text(scores):
    wrong, exact = 100 * scores['cer_folded'], 100 * scores['exact']
    return f'{wrong:.2f} % of the characters wrong, {exact:.0f} % of the lines without any error'


def evaluate(data, reports, model):
    from khmer_ocr.reporting.runs import run_notebook

    done = step(5, f'Evaluation: the weights that ship ({model}) on the fixed lines')
    run = run_notebook(
        'evaluate', dict(model=model, data=str(data / 'validation'), peers=[]), reports / 'evaluation', echo=True
    )
    done(score_text(run.metrics['scores']['data']))


# 6
def page_font(fonts):
    "A text face that no training has seen, or the one that pip brought"
    from khmer_ocr.reporting.figures import khmer_font_file

    unseen = [f for f in fonts if f.family == 'Koh Santepheap' and f.style == 'Regular' and not f.axes]
    if unseen:
        return unseen[0].path, unseen[0].name + ', which no training has seen'
    return str(khmer_font_file()), 'Noto Sans Khmer'


def page_lines(corpus):
    "Paragraphs to typeset, and what they are"
    from khmer_ocr.text.corpus import load_lines
    from khmer_ocr.text.sources import udhr_lines

    try:
        return udhr_lines(), 'the Universal Declaration of Human Rights'
    except KhmerOCRError as e:
        say(f'      {e}\n      taking lines of the corpus that no training uses')
        return load_lines(corpus, 'test')[:60], 'test lines of the corpus'


def wrap(text, width, measure):
    "Lines no wider than `width`: broken at a space where one is near, else between two clusters"
    lines, line = [], ''
    for c in clusters(text):
        if line and measure(line + c) > width:
            head, _, tail = line.rpartition(' ')
            if len(head) < 0.6 * len(line):
                head, tail = line, ''
            lines.append(head.strip())
            line = tail
        line += c
    return [l for l in lines + [line.strip()] if l]


def typeset(paragraphs, font, pdf_path, size=13):
    "One A4 page by fpdf2 (its own shaping and layout); gives the lines that are on it"
    from fpdf import FPDF
    from fontTools.ttLib import TTFont

    known = set(TTFont(font).getBestCmap()) | {32}
    pdf = FPDF(format='A4')
    pdf.set_auto_page_break(False)
    pdf.add_page()
    pdf.add_font('page', fname=font)
    pdf.set_creation_date(datetime(2025, 1, 1, tzinfo=timezone.utc))  # the same bytes every time
    pdf.set_text_shaping(True)
    out, y = [], 22.0
    for i, p in enumerate(o for o in paragraphs if set(map(ord, o)) <= known):
        pt = size + 5 * (i == 0)
        pdf.set_font('page', size=pt)
        for line in wrap(p, 166, pdf.get_string_width):
            if y > 272:
                break
            pdf.set_xy(22, y)
            pdf.cell(166, pt * 0.62, line)
            out.append(line)
            y += pt * 0.62
        y += 1.8
        if y > 272:
            break
    write_atomic(pdf_path, bytes(pdf.output()))
    return out


def rasterise(pdf_path, png_path, dpi=150):
    "The first page as a grey PNG, by pdfium"
    import pypdfium2

    pdf = pypdfium2.PdfDocument(str(pdf_path))
    image = pdf[0].render(scale=dpi / 72, grayscale=True).to_pil()
    buf = io.BytesIO()
    image.save(buf, format='PNG')
    write_atomic(png_path, buf.getvalue())
    pdf.close()


def make_page(fonts, corpus, data):
    done = step(6, 'Page: typeset by fpdf2, turned into pixels by pdfium')
    font, name = page_font(fonts)
    paragraphs, what = page_lines(corpus)
    lines = typeset(paragraphs, font, data / 'page.pdf')
    rasterise(data / 'page.pdf', data / 'page.png')
    write_atomic(data / 'page.txt', '\n'.join(lines) + '\n')
    done(f'{what}, {len(lines)} lines in {name}, at 150 dots per inch: {data / "page.png"}')


# 7
def read_it(data, models, reports, model):
    from khmer_ocr.reporting.runs import run_notebook

    done = step(7, 'Reading the page')
    run = run_notebook(
        'demo',
        dict(
            samples=str(data / 'set/train'),
            training=str(models),
            evaluation=str(reports / 'evaluation'),
            page=str(data / 'page.png'),
            truth=str(data / 'page.txt'),
            model=model,
        ),
        reports,
    )
    done(f'{run.metrics["lines_found"]} lines found')
    return run


def main():
    p = argparse.ArgumentParser(description='Watch the whole project work, on this machine.')
    p.add_argument('--quick', action='store_true', help='a very small scale, for tests')
    p.add_argument('--model', default='best', help='weights that read: a name or a checkpoint')
    p.add_argument('--folder', default=str(root), help='where data/, models/ and reports/ go')
    a = p.parse_args()
    os.chdir(root)
    start = time.perf_counter()
    base = Path(os.path.relpath(a.folder))
    corpus, data = base / 'data/processed', base / 'data/demo'
    models, reports = base / 'models/demo', base / 'reports/demo'
    fonts = get_fonts()
    get_corpus(corpus, 600 if a.quick else None)
    make_lines(corpus, data, models, *((24, 8) if a.quick else (2000, 300)))
    train_small(corpus, data, models, reports, 4 if a.quick else 800)
    evaluate(data, reports, a.model)
    make_page(fonts, corpus, data)
    run = read_it(data, models, reports, a.model)
    say(f'\n{" what was read ":-^55}\n{(reports / "page.txt").read_text(encoding="utf-8").rstrip()}\n{"-" * 55}')
    s, f = run.metrics['page'], run.metrics['fixed']
    wrong = f'{100 * s["cer_folded"]:.2f} % of {s["chars"]:,} characters wrong (without spaces, look-alikes folded)'
    say(f'the page:        {wrong}; {100 * s["cer"]:.2f} % with every space and mark')
    say(f'the fixed lines: {score_text(f)}')
    say(f'all of it took {time.perf_counter() - start:.0f} s; the report: {run.folder / "report.html"}')


if __name__ == '__main__':
    try:
        main()
    except KhmerOCRError as e:
        sys.exit(f'demo: {e}')
    except KeyboardInterrupt:
        sys.exit('demo: stopped; what is finished will be used again')
