"A tiny world for tests: corpus, set, and the checkpoint of a network that has hardly learned anything."

import numpy as np
from khmer_ocr.text.rules import rule_line
from khmer_ocr.models.ctc import CTCConfig
from khmer_ocr.models.ctc_training import train_ctc
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.synth.store import generate_set

net = CTCConfig(channels=(8, 8, 8, 8, 16), hidden=8, layers=1)
loop = dict(batch_size=2, log_every=1, precision='32-true', tensorboard=False)


def make_tiny(folder, model=True):
    "text.txt, corpus/, set/ and model/ in `folder`"
    rng = np.random.default_rng(0)
    lines = [rule_line(rng) for _ in range(60)]
    (folder / 'text.txt').write_text('\n'.join(lines), encoding='utf-8')
    (folder / 'corpus').mkdir()
    for i, s in enumerate(('train', 'val', 'test')):
        (folder / 'corpus' / f'{s}.txt').write_text(
            ''.join(l + '\n' for l in lines[20 * i : 20 * i + 20]), encoding='utf-8'
        )
    generate_set(Recipe(corpus=str(folder / 'corpus')), folder / 'set', max_lines=4, progress=False)
    if model:
        train_ctc(
            folder / 'model',
            Recipe(corpus=str(folder / 'corpus'), random_text=True),
            TrainConfig(steps=2, eval_every=2, save_every=2, **loop),
            net,
            validation=folder / 'set/val',
            pool=1,
            verbose=False,
        )
    return folder
