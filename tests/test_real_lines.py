"Real lines that may not be published: KHMER_OCR_REAL_LINES names a folder with labels.tsv (path, text, kind, part)"

import csv, os
from collections import defaultdict
from pathlib import Path
import pytest
from khmer_ocr.text.metrics import score
from khmer_ocr.inference.reader import Reader, Prediction, read_files
from khmer_ocr.models.zoo import available_models

folder = os.environ.get('KHMER_OCR_REAL_LINES')


@pytest.mark.skipif(not folder, reason='KHMER_OCR_REAL_LINES is not set')
def test_shipped_weights_read_real_lines():
    assert 'fast' in available_models(), 'no weights ship as `fast`'
    with open(Path(folder) / 'labels.tsv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f, delimiter='\t', quoting=csv.QUOTE_NONE))
    read = [r for _, r in read_files(Reader.load('fast'), [Path(folder) / r['path'] for r in rows])]
    assert all(isinstance(r, Prediction) for r in read)
    kinds = defaultdict(list)
    for row, r in zip(rows, read):
        for k in ('all', row['kind'], 'part ' + row['part']):
            kinds[k].append((r.text, row['text']))
    cer = {k: score(*map(list, zip(*v)))['cer_folded'] for k, v in kinds.items()}
    print({k: f'{v:.2%}' for k, v in cer.items()})
    assert cer['all'] <= 0.02, cer
