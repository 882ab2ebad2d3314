"Every run notebook executes with tiny parameters, and leaves a report that refers to nothing outside itself."

import importlib.util, json, re
from pathlib import Path
import nbformat, pytest
from conftest import make_tiny
from khmer_ocr.generative.dcgan import DCGANConfig, procedural_paper, train_dcgan
from khmer_ocr.synth.fonts import find_fonts
from khmer_ocr.generative.pairs import rendered_pairs
from khmer_ocr.generative.quality import MEASURES
from khmer_ocr.generative.pix2pix import Pix2PixConfig
from khmer_ocr.generative.pix2pix_training import train_pix2pix
from khmer_ocr.reporting.html import outside_references
from khmer_ocr.reporting.runs import available_runs, run_folder, run_notebook, run_parameters
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.generative.vae import VAEConfig
from khmer_ocr.generative.vae_training import train_vae

root = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp('tiny'))


def demo_page(folder):
    "A page as the demo makes it"
    spec = importlib.util.spec_from_file_location('demo', root / 'tools/demo.py')
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    from khmer_ocr.reporting.figures import khmer_font_file

    lines = demo.typeset(
        ['ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា ព្រះមហាក្សត្រ', 'ឆ្នាំ២០២៥'], str(khmer_font_file()), folder / 'page.pdf'
    )
    demo.rasterise(folder / 'page.pdf', folder / 'page.png', dpi=72)
    (folder / 'page.txt').write_text('\n'.join(lines), encoding='utf-8')


pages = dict(pages=3, page_size=160, batch_size=2, epochs=1, evaluated=8, device='cpu', precision='32-true', ema=0.9)
painter = dict(image_size=16, width=4, d_width=4, z_dim=8, batch_size=4, epochs=1)


def parameters(name, t, d):
    if name == 'demo':
        demo_page(d)
    if name == 'release':
        (d / 'plan.json').write_text(
            json.dumps(
                dict(
                    name='toy',
                    model='ctc',
                    summary='a toy',
                    settings=dict(channels=[8, 8, 8, 8, 16], hidden=8, layers=1),
                    train=dict(batch_size=2, log_every=1, precision='32-true', tensorboard=False),
                    stage=[
                        dict(name='one', train=dict(steps=2)),
                        dict(name='two', train=dict(steps=1), settings=dict(res_blocks=[1, 0, 0])),
                    ],
                )
            )
        )
    if name == 'dcgan_inference':
        train_dcgan(
            d / 'models',
            procedural_paper(4, 16, 1),
            DCGANConfig(**painter),
            device='cpu',
            tensorboard=False,
            verbose=False,
        )
    if name == 'judge_looks':
        own, few = (
            rendered_pairs(['ភ្នំពេញ', 'សាលារៀន'], find_fonts(split='train')[:1], 2, shape=(90, 120)),
            dict(epochs=1, verbose=False, precision='32-true', device='cpu', tensorboard=False),
        )
        train_pix2pix(d / 'plain', own, Pix2PixConfig(resolution=64, ngf=4, ndf=4), **few)
        train_vae(d / 'styled', own, VAEConfig(resolution=64, latent=4, width=4), **few)
    return dict(
        train_dcgan=dict(papers=4, model_dir=str(d / 'models'), evaluated=8, device='cpu', **painter),
        dcgan_explore=dict(
            papers=4,
            variants={'plain': {}},
            model_dir=str(d / 'models'),
            evaluated=8,
            device='cpu',
            **{k: v for k, v in painter.items() if k != 'z_dim'},
        ),
        dcgan_inference=dict(model=str(d / 'models/generator_model.safetensors'), samples=4, images=str(d / 'out')),
        train_pix2pix=dict(
            model_dir=str(d / 'models'), resolution=64, ngf=4, ndf=4, compare_progressive=True, **pages | dict(epochs=4)
        ),
        train_vae=dict(
            model_dir=str(d / 'models'),
            resolution=64,
            latent=8,
            width=4,
            styles=3,
            evaluated_masks=2,
            **pages | dict(epochs=4),
        ),
        generator_speed=dict(
            networks=['pix2pix', 'hybrid'],
            size=64,
            width=8,
            latent=8,
            batches=[2],
            thread_counts=[1, 2],
            compiled=False,
            rounds=1,
            training_batches=[1],
            calibration=8,
            claims={'pix2pix': [12, 8.2]},
            device='cpu',
        ),
        judge_looks=dict(
            pages=6,
            page_size=160,
            models=[str(d / 'plain/generator.safetensors'), str(next((d / 'styled').glob('vae*.safetensors')))]
            if name == 'judge_looks'
            else [],
            tiles=18,
            tile=64,
            styles=2,
            varied_masks=2,
            lines=2,
            shown=True,
        ),
        corpus=dict(out=str(d / 'corpus'), sources=[str(t / 'text.txt')], limit=40, drawn=30, shown=1),
        generate=dict(corpus=str(t / 'corpus'), out=str(d / 'set'), max_lines=4, shown=2),
        validation_set=dict(corpus=str(t / 'corpus'), out=str(d / 'fixed'), num_samples=5, shown=2),
        train_ocr=dict(
            corpus=str(t / 'corpus'),
            validation=str(t / 'set/val'),
            validation_samples=2,
            model_dir=str(d / 'model'),
            steps=2,
            batch_size=2,
            channels=[8, 8, 8, 8, 16],
            hidden=8,
            layers=1,
        ),
        seq2seq_curves=dict(
            corpus=str(t / 'corpus'),
            model_dir=str(d / 'curves'),
            steps=2,
            batch_size=2,
            judged=2,
            evaluations=1,
            families=[],
            lengths=[1.0, 0.0, 0.0, 0.0],
            channels=[4] * 7,
            hidden=8,
        ),
        benchmark=dict(
            data=str(t / 'set/val'),
            models=str(t / 'model/best.safetensors'),
            limit=3,
            rendered=5,
            peer_lines=2,
            rounds=1,
        ),
        evaluate=dict(model=str(t / 'model/best.safetensors'), data=str(t / 'set'), lines=3, peers=[]),
        language_model=dict(
            corpus=str(t / 'corpus'),
            model=str(t / 'model/best.safetensors'),
            order=3,
            cuts=[1],
            beam=2,
            alphas=[0.3],
            betas=[0.5],
            real=str(t / 'set/val'),
            clean_set=str(t / 'set/val'),
            hard_set=str(t / 'set/test'),
            limit=2,
            odd=1,
            texts=10,
        ),
        release=dict(
            plan=str(d / 'plan.json'),
            corpus=str(t / 'corpus'),
            validation=str(t / 'set/val'),
            validation_samples=2,
            model_dir=str(d / 'models'),
            lines=2,
        ),
        candidates=dict(
            candidates={
                'a': dict(channels=[8, 8, 8, 8, 16], hidden=8, layers=1),
                'b': dict(channels=[8, 8, 8, 8, 16], hidden=8, layers=0),
            },
            trunk='',
            corpus=str(t / 'corpus'),
            model_dir=str(d / 'models'),
            steps=2,
            batch_size=2,
            lines=2,
            precision='32-true',
        ),
        translate=dict(
            rules=['dates', 'money'],
            model_dir=str(d / 'translate'),
            lines=4,
            steps=2,
            batch_size=2,
            judged=2,
            looks=1,
            width=16,
            depth=1,
            vocabulary=120,
            families=['Noto Sans Khmer'],
            precision='32-true',
        ),
        seed_claims=dict(
            corpus=str(t / 'corpus'),
            size='tiny',
            block=False,
            lines=2,
            width=64,
            rounds=1,
            workers=[0, 1],
            load_batches=1,
            pair_steps=1,
            number_steps=2,
            eyes=str(t / 'model/best.safetensors'),
            families=[],
            judged=2,
            batch_size=2,
            width_of_model=16,
            model_dir=str(d / 'models'),
            precision='32-true',
        ),
        gallery=dict(
            texts=['ឆ្នាំ២០២៥', 'ព្រះរាជាណាចក្រកម្ពុជា'], size=18.0, fates=1, shown=2, model=str(t / 'model/best.safetensors')
        ),
        demo=dict(
            samples=str(t / 'set/train'),
            training=str(t / 'model'),
            evaluation='',
            page=str(d / 'page.png'),
            truth=str(d / 'page.txt'),
            model=str(t / 'model/best.safetensors'),
            shown=2,
        ),
    )[name]


def check_corpus(m, facts, page):
    assert m['lines'] == m['train'] + m['val'] + m['test'] == sum(s['lines'] for s in m['sources'].values())
    assert m['on_both_sides'] == 0
    assert m['left_out'] == sum(sum(s['dropped'].values()) for s in m['sources'].values())
    assert len(m['symbols']) == 183
    assert sum(m['drawn']['kinds'].values()) == m['drawn']['labels'] == 30
    assert abs(sum(m['drawn']['stated_kinds'].values()) - 1) < 1e-4
    assert {'building_seconds', 'lines_per_second', 'drawing_seconds'} == set(facts['times'])
    assert 'building seconds' in page


def check_generate(m, facts, page):
    assert m['images'] == 12
    assert m['problems'] == 0
    assert m['bytes'] == sum(s['bytes'] for s in m['splits'].values())
    assert all(s['images'] == s['labels'] == 4 == sum(s['kinds'].values()) for s in m['splits'].values())
    assert sum(m['font_lines'].values()) == 4
    assert facts['times']['images_made'] == 12
    assert 'images per second' in page
    assert page.count('<figure') == 4


def check_validation(m, facts, page):
    assert m['images'] == 5 == sum(m['fonts'].values())
    assert m['problems'] == 0
    assert m['fingerprint'] in page
    assert m['also_in_training'] == 0
    assert not m['augmented']


def check_release(m, facts, page):
    assert m['samples'] == 6
    assert sum(n > 0 for n in m['files'].values()) == 3
    assert {'fixed', 'photo'} <= set(m['scores'])
    assert 'What it was measured at' in page


def check_pix2pix(m, facts, page):
    assert (m['pages'], m['held_out'], m['own_pages']) == (2, 1, True)
    assert m['steps'] > 0
    assert m['scores']['real']['ssim'] > 0.999
    assert m['scores']['generated']['ssim'] < 0.9
    assert m['scores']['real']['l1'] == 0 < m['scores']['two flat colours']['l1']
    assert set(m['distance']) == {'generated', 'real'}
    assert m['best']['ssim'] > 0
    whole, same, cheap = (
        m['progressive'][k][0]['steps'] for k in ('in stages', 'full size, same steps', 'full size, same cost')
    )
    assert whole == same > cheap > 0
    assert facts['times']['squares_per_second'] > 0
    assert page.count('<img') >= 10
    assert 'same cost' in page


def check_speed(m, facts, page):
    rows = m['results']
    assert len(rows) == 2 * 2 * 5
    assert {r['way'] for r in rows} == {
        'fp32',
        'fp32, inference mode',
        'fp32, channels last',
        'bf16',
        'bf16, channels last',
    }
    assert m['failed'] == []
    assert all(r['samples_per_s'] > 0 and r['ceiling'] > 0 and r['ssim'] > 0.9 for r in rows)
    assert all(r['ratio'] == 1 == r['low'] for r in rows if r['way'] == 'fp32')
    assert [(b['network'], b['batch'], b['claimed']) for b in m['beside']] == [('pix2pix', 2, 12)]
    assert m['beside'][0]['measured'] == pytest.approx(
        max(r['samples_per_s'] for r in rows if (r['network'], r['threads']) == ('pix2pix', 2)), rel=0.01
    )
    assert len(m['generating_mb']) == 2 * 2
    assert [(r['network'], r['batch']) for r in m['training_mb']] == [('pix2pix', 1), ('hybrid', 1)]
    assert m['costs']['hybrid']['parameters'] > m['costs']['pix2pix']['parameters']
    assert 'not asked for' in page


def check_looks(m, facts, page):
    measured = m['measured']
    plain, styled = 'plain/generator', next(k for k in measured if k.startswith('styled/'))
    assert set(measured) == {'real', 'flat colours', 'pasted', plain, styled}
    assert m['own_pages']
    assert m['groups'] == {'A': 3, 'B': 3}
    assert m['tiles'] == 18
    for k in (*MEASURES, 'no_checkerboard'):
        assert abs(measured['real'][k] - 1) < 1e-6, k
    assert 'text_kept' not in measured['real']
    assert measured['flat colours']['mask_iou'] == 1
    assert measured['flat colours']['realism'] < 0.2
    assert all(0 <= v['text_kept'] <= 1 for k, v in measured.items() if k != 'real')
    assert measured['flat colours']['text_kept'] > 0.6
    assert {k for k, v in measured.items() if 'diversity_same_mask' in v} == {styled}
    assert measured[styled]['diversity_same_mask'] > 0
    assert m['models'][plain]['kind'] == 'pix2pix'
    assert m['models'][styled] == {'kind': 'vae', 'style': 4, 'resolution': 64}
    assert page.count('<img') == 4
    assert '±' in page
    assert str(Path.cwd()) not in page


def check_vae(m, facts, page):
    assert (m['pages'], m['held_out'], m['own_pages'], m['form']) == (2, 1, True, 'style')
    assert m['steps'] > 0
    assert m['scores']['real']['l1'] == 0
    assert m['scores']['real']['ssim'] > 0.999
    assert m['scores']['mean']['ssim'] < 0.9
    assert {'loss', 'beta', 'mse', 'kl', 'active'} <= m['last'].keys()
    assert m['last']['beta'] == 1
    assert m['best']['ssim'] > 0
    assert 0 <= m['active'] <= 8
    assert set(m['distance']) == {'sampled', 'real'}
    assert set(m['diversity']) == {'pixels', 'style'}
    assert all(v > 0 for v in m['diversity'].values())
    assert 0 <= m['text_kept']['sampled'] <= 1
    assert 0.3 < m['text_kept']['real'] <= 1
    assert m['parameters']['encoder'] > 0 < m['parameters']['decoder']
    assert facts['times']['squares_per_second'] > 0
    assert page.count('<img') >= 11
    assert 'learnt by heart' in page


checks = dict(
    train_vae=check_vae,
    generator_speed=check_speed,
    judge_looks=check_looks,
    train_pix2pix=check_pix2pix,
    release=check_release,
    corpus=check_corpus,
    generate=check_generate,
    validation_set=check_validation,
)


@pytest.mark.parametrize('name', available_runs())
def test_run(name, tiny, tmp_path):
    params = parameters(name, tiny, tmp_path)
    run = run_notebook(name, params, tmp_path / 'report')
    page = (run.folder / 'report.html').read_text(encoding='utf-8')
    assert run.metrics
    assert outside_references(page) == []
    assert 'http://' not in page.split('</head>')[0]
    assert list((run.folder / 'figures').glob('*.png'))
    assert not (run.folder / 'times.json').exists()
    checks.get(name, lambda *_: None)(
        run.metrics, facts := json.loads((run.folder / 'run.json').read_text(encoding='utf-8')), page
    )
    assert facts['started'][:10] not in (run.folder / 'run.ipynb').read_text(encoding='utf-8')
    assert facts['host']
    assert facts['versions']['khmer_ocr']


@pytest.mark.parametrize('name', available_runs())
def test_committed_without_outputs_and_defines_nothing(name):
    nb = nbformat.read(run_folder() / f'{name}.ipynb', as_version=4)
    for c in nb.cells:
        assert not c.get('outputs'), name
        assert not any(l.startswith(('def ', 'class ')) for l in c.source.splitlines() if c.cell_type == 'code'), name
    ps = run_parameters(name)
    assert ps
    assert all(p.help for p in ps)
    assert ps[-1].name == 'out_dir'


def test_equal_runs_are_equal_but_for_run_json(tiny, tmp_path):
    params = parameters('generate', tiny, tmp_path)
    read = lambda p: re.sub(
        b'<footer.*?</footer>', b'', p.read_bytes(), flags=re.S
    )  # the foot of the page says when and how fast
    first = {
        p.name: read(p) for p in run_notebook('generate', params, tmp_path / 'report').folder.rglob('*') if p.is_file()
    }
    b = run_notebook('generate', params, tmp_path / 'report').folder
    for p in b.rglob('*'):
        if p.is_file() and p.name != 'run.json':
            assert read(p) == first[p.name], p


def test_bad_parameters_touch_nothing(tmp_path):
    for params, word in ((dict(max_line=3), 'did you mean max_lines'), (dict(max_lines='few'), 'whole number')):
        with pytest.raises(KhmerOCRError, match=word):
            run_notebook('generate', params, tmp_path / 'x')
    with pytest.raises(KhmerOCRError, match='did you mean generate'):
        run_notebook('genrate')
    assert not (tmp_path / 'x').exists()


def test_a_failing_cell_is_one_line_and_leaves_the_notebook(tmp_path):
    with pytest.raises(KhmerOCRError, match='Corpus files not found') as e:
        run_notebook('generate', dict(corpus=str(tmp_path / 'none'), out=str(tmp_path / 'set')), tmp_path / 'r')
    assert '\n' not in str(e.value)
    assert [p.name for p in (tmp_path / 'r').iterdir()] == ['run.ipynb']


def test_shards_and_a_damaged_set(tiny, tmp_path):
    params = parameters('generate', tiny, tmp_path)
    a, b = (
        run_notebook('generate', params | dict(format=f, out=str(tmp_path / f)), tmp_path / f'report_{f}').metrics
        for f in ('png', 'shards')
    )
    assert all(a[k] == b[k] for k in ('font_lines', 'operations', 'images_with_symbol', 'images'))
    assert b['splits']['train']['images'] == 4
    png = next((tmp_path / 'png/train/images').glob('*.png'))
    data = bytearray(png.read_bytes())
    data[-20] ^= 1
    png.write_bytes(data)  # of the same size
    with pytest.raises(KhmerOCRError, match=f'generate failed: 1 problem.*{png.name}'):
        run_notebook('generate', params | dict(out=str(tmp_path / 'png')), tmp_path / 'r')


def test_an_augmented_validation_set(tiny, tmp_path):
    m = run_notebook(
        'validation_set', parameters('validation_set', tiny, tmp_path) | dict(augmented='scan'), tmp_path / 'r'
    ).metrics
    assert m['augmented']
    assert sum(m['operations'].values()) > 0


def test_measuring_data_is_not_shown_unasked(tmp_path):
    run = run_notebook('judge_looks', dict(pages=6, page_size=160, tiles=18, tile=64, reader=''), tmp_path / 'report')
    assert {p.name for p in (run.folder / 'figures').glob('*.png')} == {'measures.png', 'statistics.png'}
    assert 'text_kept' not in run.metrics['measured']['pasted']
    assert set(run.metrics['measured']) == {'real', 'flat colours', 'pasted'}
    with pytest.raises(KhmerOCRError, match='standard error'):
        run_notebook('judge_looks', dict(pages=3, page_size=160, tiles=18, tile=64, reader=''), tmp_path / 'few')
