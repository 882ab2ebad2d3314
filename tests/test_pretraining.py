"""Pretraining: masks and the loss on them, runs that resume, backbones by name,
and vision transformers of two families against a reference written here."""

import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataclasses import replace
from pathlib import Path
from safetensors.torch import save_file
from khmer_ocr.data.datasets import LineSource
from khmer_ocr.data.batching import as_input, collate
from khmer_ocr.training.callbacks import Callback, CancelFit
from khmer_ocr.training.checkpoints import load_weights
from khmer_ocr.models.pretraining import (
    MaskedLoss,
    mask_spans,
    import_vit,
    load_backbone,
    pretrain,
    save_backbone,
    with_backbone,
)
from khmer_ocr.synth.generator import Recipe
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.models.transformer import ImageToText, ImageToTextConfig
from khmer_ocr.models.transformer_training import load_image_to_text, init_image_to_text
from khmer_ocr.models.zoo import train_recogniser

tiny = ImageToTextConfig(
    channels=(4, 4, 8, 8),
    encoder_depth=2,
    encoder_width=16,
    encoder_heads=2,
    decoder_depth=1,
    decoder_width=16,
    decoder_heads=2,
    mlp_ratio=2,
)
texts = ['ខ្មែរ', 'ភ្នំពេញ', 'កម្ពុជា']


def loop(steps, **kw):
    return TrainConfig(
        **(
            dict(
                steps=steps,
                batch_size=2,
                log_every=1,
                eval_every=100,
                save_every=100,
                precision='32-true',
                tensorboard=False,
            )
            | kw
        )
    )


def run(out, method, steps=4, config=tiny, **kw):
    return pretrain(
        out, method, Recipe(random_text=True, seed=4), loop(steps), config, texts=texts, pool=2, verbose=False, **kw
    )


class StopAt(Callback):
    def after_step(self, learn):
        if learn.step == 2:
            raise CancelFit


def test_which_columns_are_masked():
    "The wanted share of each line, none behind its end, the same for the same step"
    for seed in range(20):
        rng = np.random.default_rng(seed)
        widths = rng.integers(8, 500, 5).tolist()
        h = mask_spans(widths, rng)
        for row, w in zip(h.numpy(), widths):
            assert 0.4 * w <= row.sum() < 0.4 * w + 32
            assert not row[w:].any()
    assert not mask_spans([100], np.random.default_rng(0), share=0.0).any()


def test_the_loss_counts_only_masked_columns():
    "The loss by hand, and masked columns are covered in the input"
    rng = np.random.default_rng(0)
    batch = collate([(rng.integers(0, 255, (48, w)).astype(np.uint8), '') for w in (64, 90)])
    loss = MaskedLoss(seed=3)
    h = loss.mask(batch)
    seen = []

    def model(x, widths):
        seen.append(x)
        return torch.full((2, 1, 48, 96), 0.25)

    got = loss(model, batch)
    x = as_input(batch['images'])
    assert got == pytest.approx(float((x - 0.25).square().mean((1, 2))[h].mean()))
    assert (seen[0].permute(0, 3, 1, 2)[h] == 0.5).all()
    assert torch.equal(seen[0].permute(0, 3, 1, 2)[~h], x.permute(0, 3, 1, 2)[~h])
    loss.step = 1
    assert not loss.mask(batch).equal(h)


@pytest.mark.parametrize('method', ('masked', 'ctc'))
def test_runs_resume_and_become_backbones(method, tmp_path, monkeypatch):
    "A cut run ends with the weights of a whole one, and its encoder opens as a backbone"
    monkeypatch.chdir(tmp_path)
    run('a', method)
    run('b', method, callbacks=[StopAt()])
    run('b', method, resume='latest')
    a = load_weights('a/latest.safetensors')[0]
    b = load_weights('b/latest.safetensors')[0]
    assert a.keys() == b.keys()
    assert all(a[k].equal(b[k]) for k in a)
    assert save_backbone('a/latest.safetensors', 'mine') == Path('models/backbones/mine.safetensors')
    vit, head = load_backbone('mine')
    assert head['model'] == 'backbone'
    assert head['way'] == method
    assert not vit.training
    assert all(v.equal(a['encoder.' + k]) for k, v in vit.state_dict().items())
    config = with_backbone(replace(tiny, encoder_depth=4, decoder_depth=2), 'mine')
    assert (config.backbone, config.encoder_depth, config.decoder_depth) == ('mine', 2, 2)
    train_recogniser(
        'vision_text',
        'c',
        Recipe(random_text=True),
        replace(loop(1), ema=0.0, freeze=('encoder',)),
        config,
        texts=texts,
        pool=1,
        verbose=False,
    )
    net, _, _ = load_image_to_text('c/latest.safetensors')
    assert all(v.equal(a['encoder.' + k]) for k, v in net.encoder.state_dict().items())  # frozen: as pretrained
    run('d', method, 1, init='mine')
    save_backbone('c/latest.safetensors', tmp_path / 'again.safetensors')
    assert load_backbone(tmp_path / 'again.safetensors')[0].norm.weight.equal(vit.norm.weight)


@pytest.mark.parametrize('stem', ('conv', 'patches'))
def test_filling_in_is_learned(stem, tmp_path):
    "On a few lines the error in masked columns falls well below that of the start"
    rng = np.random.default_rng(0)
    lines = [
        np.repeat(rng.integers(0, 2, (48, 1)).astype(np.uint8) * 255, 64, 1) for _ in range(4)
    ]  # stripes: every column tells of the others

    class Stripes(LineSource):
        def fetch(self, a, b, seed=None):
            return [(lines[n % 4], '') for n in range(a, b)]

    config = replace(tiny, stem=stem, patch=(48, 4), dropout=0.0, encoder_width=32)
    batch = collate([(l, '') for l in lines])
    learn = pretrain(
        tmp_path,
        'masked',
        train=loop(200, lr=4e-3, batch_size=4, eval_every=200, ema=0.9),
        config=config,
        data=Stripes(),
        validation=[batch],
        pool=4,
        verbose=False,
    )
    assert learn.metrics['pixels'] < 0.1  # a prediction of grey would be .25


def test_faults(tmp_path, monkeypatch):
    "What cannot be pretrained or opened gets one line"
    monkeypatch.chdir(tmp_path)
    run('a', 'masked', 1)
    save_backbone('a/latest.safetensors', 'mine')
    backbone = 'models/backbones/mine.safetensors'
    for call, says in (
        (lambda: run('b', 'both'), 'masked or ctc'),
        (lambda: load_backbone('yours'), 'Backbone not found'),
        (lambda: load_backbone('a/latest.safetensors'), 'not a backbone'),
        (lambda: run('b', 'masked', 1, replace(tiny, encoder_depth=3), init='mine'), 'with_backbone'),
        (lambda: init_image_to_text(ImageToText(9, replace(tiny, encoder_depth=3)), backbone), 'does not fit'),
        (lambda: init_image_to_text(ImageToText(9, replace(tiny, encoder_depth=1)), backbone), 'does not fit'),
        (lambda: save_backbone(backbone, 'x'), "'backbone'"),
    ):
        with pytest.raises(KhmerOCRError, match=says) as e:
            call()
        assert '\n' not in str(e.value)


# vision transformers of others

D = 32  # width
H = 4  # heads
P = 8  # px, side of a patch
G = 5  # side of the grid
L = 2  # layers


def foreign(family, seed=0):
    "Random weights of a small vision transformer in the names of a family"
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g) * 0.2

    if family == 'timm':
        t = {
            'cls_token': r(1, 1, D),
            'pos_embed': r(1, 1 + G * G, D),
            'patch_embed.proj.weight': r(D, 3, P, P),
            'patch_embed.proj.bias': r(D),
            'norm.weight': 1 + r(D),
            'norm.bias': r(D),
            'head.weight': r(10, D),
            'head.bias': r(10),
        }
        for i in range(L):
            for part, s in (
                ('norm1', (D,)),
                ('attn.qkv', (3 * D, D)),
                ('attn.proj', (D, D)),
                ('norm2', (D,)),
                ('mlp.fc1', (4 * D, D)),
                ('mlp.fc2', (D, 4 * D)),
            ):
                t |= {f'blocks.{i}.{part}.weight': r(*s), f'blocks.{i}.{part}.bias': r(s[0])}
        return t
    t = {
        'vit.embeddings.cls_token': r(1, 1, D),
        'vit.embeddings.position_embeddings': r(1, 1 + G * G, D),
        'vit.embeddings.patch_embeddings.projection.weight': r(D, 3, P, P),
        'vit.embeddings.patch_embeddings.projection.bias': r(D),
        'vit.layernorm.weight': 1 + r(D),
        'vit.layernorm.bias': r(D),
        'classifier.weight': r(10, D),
        'classifier.bias': r(10),
        'vit.pooler.dense.weight': r(D, D),
        'vit.pooler.dense.bias': r(D),
    }
    for i in range(L):
        for part, s in (
            ('layernorm_before', (D,)),
            ('layernorm_after', (D,)),
            *((f'attention.attention.{p}', (D, D)) for p in ('query', 'key', 'value')),
            ('attention.output.dense', (D, D)),
            ('intermediate.dense', (4 * D, D)),
            ('output.dense', (D, 4 * D)),
        ):
            t |= {f'vit.encoder.layer.{i}.{part}.weight': r(*s), f'vit.encoder.layer.{i}.{part}.bias': r(s[0])}
    return t


def reference_block(x, t, family, i):
    "One layer of a vision transformer (Dosovitskiy et al. 2021), written out, on x (T, D)"

    def at(part):
        return t[f'{pre}.{part}.weight'], t[f'{pre}.{part}.bias']

    def norm(x, wb):
        std = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)
        return (x - x.mean(-1, keepdim=True)) / std * wb[0] + wb[1]

    def linear(x, wb):
        return x @ wb[0].T + wb[1]

    if family == 'timm':
        pre = f'blocks.{i}'
        names = ('norm1', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
        qkv = linear(norm(x, at('norm1')), at('attn.qkv'))
        q = qkv[:, :D]
        k = qkv[:, D : 2 * D]
        v = qkv[:, 2 * D :]
    else:
        pre = f'vit.encoder.layer.{i}'
        names = ('layernorm_before', 'attention.output.dense', 'layernorm_after', 'intermediate.dense', 'output.dense')
        q, k, v = (
            linear(norm(x, at('layernorm_before')), at(f'attention.attention.{p}')) for p in ('query', 'key', 'value')
        )
    heads = []
    for h in range(H):
        s = slice(h * D // H, (h + 1) * D // H)
        w = torch.exp(q[:, s] @ k[:, s].T / math.sqrt(D // H))
        heads.append((w / w.sum(-1, keepdim=True)) @ v[:, s])
    x = x + linear(torch.cat(heads, -1), at(names[1]))
    m = linear(norm(x, at(names[2])), at(names[3]))
    return x + linear(m * 0.5 * (1 + torch.erf(m / math.sqrt(2))), at(names[4]))


def reference_tokens(image, t, family):
    "Patches of an RGB picture (3, GP, GP), normalised, with their positions, without the token of the whole"
    w, b, p = (
        (t[k] for k in ('patch_embed.proj.weight', 'patch_embed.proj.bias', 'pos_embed'))
        if family == 'timm'
        else (
            t[f'vit.embeddings.{k}']
            for k in ('patch_embeddings.projection.weight', 'patch_embeddings.projection.bias', 'position_embeddings')
        )
    )
    rows = [
        [(w * image[None, :, r * P : r * P + P, c * P : c * P + P]).sum((1, 2, 3)) + b for c in range(G)]
        for r in range(G)
    ]
    return torch.stack([v for row in rows for v in row]) + p[0, 1:]


@pytest.mark.parametrize('family', ('timm', 'huggingface'))
def test_a_foreign_vision_transformer(family, tmp_path):
    "One layer, and the whole encoder on a square picture, as in the reference"
    t = foreign(family)
    save_file(t, tmp_path / 'vit.safetensors')
    path = import_vit(tmp_path / 'vit.safetensors', tmp_path / 'mine.safetensors', heads=H, height=G * P, columns=G)
    vit, head = load_backbone(path)
    x = torch.randn(1, 7, D)
    with torch.no_grad():
        for i in range(L):
            assert torch.allclose(
                vit.layers[i](x, torch.ones(1, 1, 1, 7, dtype=torch.bool))[0],
                reference_block(x[0], t, family, i),
                atol=1e-4,
            )
        ink = torch.rand(1, 1, G * P, G * P)
        h = reference_tokens(((1 - ink[0]) - 0.5).expand(3, -1, -1) / 0.5, t, family)
        for i in range(L):
            h = reference_block(h, t, family, i)
        norm = 'norm' if family == 'timm' else 'vit.layernorm'
        h = F.layer_norm(h, (D,), t[norm + '.weight'], t[norm + '.bias'], 1e-6)
        assert torch.allclose(vit(ink, torch.tensor([G * P]))[0][0], h, atol=1e-3)
    config = with_backbone(tiny, path)
    assert (config.encoder_depth, config.encoder_width, config.encoder_heads, config.patch, config.positions) == (
        L,
        D,
        H,
        (P, P),
        'learned',
    )


def test_positions_are_interpolated_and_lines_are_read(tmp_path):
    "An imported encoder has positions for six rows and keeps them, frozen, while a decoder is trained on lines"
    save_file(foreign('timm'), tmp_path / 'vit.safetensors')
    path = import_vit(tmp_path / 'vit.safetensors', tmp_path / 'wide.safetensors', heads=H, height=48, columns=30)
    config = with_backbone(tiny, path)
    assert config.rows == 6
    assert config.stride == P
    train_recogniser(
        'vision_text',
        tmp_path / 't',
        Recipe(random_text=True),
        replace(loop(1), ema=0.0, freeze=('encoder',)),
        config,
        texts=texts,
        pool=1,
        verbose=False,
    )
    assert load_image_to_text(tmp_path / 't/latest.safetensors')[0].encoder.positions.table.equal(
        load_backbone(path)[0].positions.table
    )


@pytest.mark.parametrize(
    'change,says',
    (
        (lambda t: t | {'blocks.0.ls1.gamma': torch.ones(D)}, 'ls1.gamma'),
        (lambda t: {k: v for k, v in t.items() if 'patch' not in k}, 'no patch embedding'),
        (lambda t: {k: v for k, v in t.items() if 'pos' not in k}, 'no learned positions'),
        (lambda t: t | {'norm.weight': torch.ones(D + 1)}, 'does not fit'),
        (lambda t: {k: v for k, v in t.items() if k != 'blocks.1.norm2.bias'}, 'does not fit'),
    ),
)
def test_files_that_are_none(change, says, tmp_path):
    "Files that hold no plain vision transformer are refused in one line, and nothing is written"
    save_file(change(foreign('timm')), tmp_path / 'vit.safetensors')
    with pytest.raises(KhmerOCRError, match=says) as e:
        import_vit(tmp_path / 'vit.safetensors', tmp_path / 'x.safetensors', heads=H)
    assert '\n' not in str(e.value)
    assert not (tmp_path / 'x.safetensors').exists()


def test_other_faults_of_foreign_files(tmp_path):
    "A height that the patches do not divide, and files that cannot be read, get one line"
    save_file(foreign('timm'), tmp_path / 'vit.safetensors')
    (tmp_path / 'text.safetensors').write_text('hello')
    for call, says in (
        (
            lambda: import_vit(tmp_path / 'vit.safetensors', tmp_path / 'x.safetensors', heads=H, height=50),
            'multiple of 8',
        ),
        (lambda: import_vit(tmp_path / 'none.safetensors', tmp_path / 'x.safetensors'), 'cannot be read'),
        (lambda: import_vit(tmp_path / 'text.safetensors', tmp_path / 'x.safetensors'), 'cannot be read'),
        (lambda: import_vit(tmp_path / 'vit.safetensors', tmp_path / 'x.safetensors', heads=5), 'heads'),
    ):
        with pytest.raises(KhmerOCRError, match=says) as e:
            call()
        assert '\n' not in str(e.value)
