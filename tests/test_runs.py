"Every run notebook executes with tiny parameters, and leaves a report that refers to nothing outside itself."

import importlib.util, json, re
from pathlib import Path
import nbformat, pytest
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


LINES_OF_THE_PAGE = ['ព្រះរាជាណាចក្រកម្ពុជា', 'ជាតិ សាសនា ព្រះមហាក្សត្រ', 'ឆ្នាំ២០២៥']


def demo_page(folder):
    "A page as the demo makes it, with its text"
    from khmer_ocr.reporting.figures import khmer_font_file

    spec = importlib.util.spec_from_file_location('demo', root / 'tools/demo.py')
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    lines = demo.typeset(LINES_OF_THE_PAGE, str(khmer_font_file()), folder / 'page.pdf')
    demo.rasterise(folder / 'page.pdf', folder / 'page.png', dpi=72)
    (folder / 'page.txt').write_text('\n'.join(lines), encoding='utf-8')


def release_plan(folder):
    "A plan of two stages, of which the second has a larger network"
    train = dict(batch_size=2, log_every=1, precision='32-true', tensorboard=False)
    stages = [
        dict(name='one', train=dict(steps=2)),
        dict(name='two', train=dict(steps=1), settings=dict(res_blocks=[1, 0, 0])),
    ]
    plan = dict(name='toy', model='ctc', summary='a toy', settings=tiny_network, train=train, stage=stages)
    (folder / 'plan.json').write_text(json.dumps(plan))


def trained_dcgan(folder):
    "A DCGAN of procedural paper after one epoch"
    papers = procedural_paper(4, 16, 1)
    train_dcgan(folder / 'models', papers, DCGANConfig(**dcgan), device='cpu', tensorboard=False, verbose=False)


def trained_generators(folder):
    "A Pix2Pix and a VAE after one epoch"
    pairs = rendered_pairs(['ភ្នំពេញ', 'សាលារៀន'], find_fonts(split='train')[:1], 2, shape=(90, 120))
    loop = dict(epochs=1, verbose=False, precision='32-true', device='cpu', tensorboard=False)
    train_pix2pix(folder / 'plain', pairs, Pix2PixConfig(resolution=64, ngf=4, ndf=4), **loop)
    train_vae(folder / 'styled', pairs, VAEConfig(resolution=64, latent=4, width=4), **loop)


prepare = dict(demo=demo_page, release=release_plan, dcgan_inference=trained_dcgan, judge_looks=trained_generators)
tiny_network = dict(channels=[8, 8, 8, 8, 16], hidden=8, layers=1)
pages = dict(pages=3, page_size=160, batch_size=2, epochs=1, evaluated=8, device='cpu', precision='32-true', ema=0.9)
dcgan = dict(image_size=16, width=4, d_width=4, z_dim=8, batch_size=4, epochs=1)


def parameters(name, t, d):
    "Tiny parameters of a run, with the data of `t` and results in `d`"
    if name in prepare:
        prepare[name](d)
    return dict(
        train_dcgan=dict(papers=4, model_dir=str(d / 'models'), evaluated=8, device='cpu', **dcgan),
        dcgan_explore=dict(
            papers=4,
            variants={'plain': {}},
            model_dir=str(d / 'models'),
            evaluated=8,
            device='cpu',
            **{k: v for k, v in dcgan.items() if k != 'z_dim'},
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
            models=[str(p) for p in (*d.glob('plain/generator.safetensors'), *d.glob('styled/vae*.safetensors'))][:2],
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
            **tiny_network,
        ),
        seq2seq_curves=dict(
            corpus=str(t / 'corpus'),
            model_dir=str(d / 'curves'),
            steps=2,
            batch_size=2,
            evaluated=2,
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
            candidates={'a': tiny_network, 'b': tiny_network | dict(layers=0)},
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
            evaluated=2,
            evaluations=1,
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
            reader=str(t / 'model/best.safetensors'),
            families=[],
            evaluated=2,
            batch_size=2,
            width_of_model=16,
            model_dir=str(d / 'models'),
            precision='32-true',
        ),
        gallery=dict(
            texts=['ឆ្នាំ២០២៥', 'ព្រះរាជាណាចក្រកម្ពុជា'],
            size=18.0,
            variants=1,
            shown=2,
            model=str(t / 'model/best.safetensors'),
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
    steps = {name: runs[0]['steps'] for name, runs in m['progressive'].items()}
    assert steps['in stages'] == steps['full size, same steps'] > steps['full size, same cost'] > 0
    assert facts['times']['squares_per_second'] > 0
    assert page.count('<img') >= 10
    assert 'same cost' in page


def check_speed(m, facts, page):
    rows = m['results']
    assert len(rows) == 2 * 2 * 5
    ways = {'fp32', 'fp32, inference mode', 'fp32, channels last', 'bf16', 'bf16, channels last'}
    assert {r['way'] for r in rows} == ways
    assert m['failed'] == []
    assert all(r['samples_per_s'] > 0 and r['ceiling'] > 0 and r['ssim'] > 0.9 for r in rows)
    assert all(r['ratio'] == 1 == r['low'] for r in rows if r['way'] == 'fp32')
    assert [(b['network'], b['batch'], b['claimed']) for b in m['beside']] == [('pix2pix', 2, 12)]
    fastest = max(r['samples_per_s'] for r in rows if (r['network'], r['threads']) == ('pix2pix', 2))
    assert m['beside'][0]['measured'] == pytest.approx(fastest, rel=0.01)
    assert len(m['generating_mb']) == 2 * 2
    assert [(r['network'], r['batch']) for r in m['training_mb']] == [('pix2pix', 1), ('hybrid', 1)]
    assert m['costs']['hybrid']['parameters'] > m['costs']['pix2pix']['parameters']
    assert 'not measured' in page


def check_generators(m, facts, page):
    measured = m['measured']
    plain = 'plain/generator'
    styled = next(k for k in measured if k.startswith('styled/'))
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
    judge_looks=check_generators,
    train_pix2pix=check_pix2pix,
    release=check_release,
    corpus=check_corpus,
    generate=check_generate,
    validation_set=check_validation,
)


@pytest.mark.parametrize('name', available_runs())
def test_run(name, tiny, tmp_path):
    "A run leaves metrics, figures and a page of its own; when it ran stands in run.json alone"
    params = parameters(name, tiny, tmp_path)
    run = run_notebook(name, params, tmp_path / 'report')
    page = (run.folder / 'report.html').read_text(encoding='utf-8')
    assert run.metrics
    assert outside_references(page) == []
    assert 'http://' not in page.split('</head>')[0]
    assert list((run.folder / 'figures').glob('*.png'))
    assert not (run.folder / 'times.json').exists()
    facts = json.loads((run.folder / 'run.json').read_text(encoding='utf-8'))
    if name in checks:
        checks[name](run.metrics, facts, page)
    assert facts['started'][:10] not in (run.folder / 'run.ipynb').read_text(encoding='utf-8')
    assert facts['host']
    assert facts['versions']['khmer_ocr']


@pytest.mark.parametrize('name', available_runs())
def test_committed_without_outputs_and_defines_nothing(name):
    nb = nbformat.read(run_folder() / f'{name}.ipynb', as_version=4)
    for cell in nb.cells:
        assert not cell.get('outputs'), name
        if cell.cell_type == 'code':
            assert not re.search(r'^ *(def|class) ', cell.source, re.M), name
    parameters = run_parameters(name)
    assert parameters
    assert all(p.help for p in parameters)
    assert parameters[-1].name == 'out_dir'


def files_without_footer(folder):
    "Name -> bytes of a run's files; the foot of the page, with time and speed, is left out"
    files = [p for p in folder.rglob('*') if p.is_file()]
    return {p.name: re.sub(b'<footer.*?</footer>', b'', p.read_bytes(), flags=re.S) for p in files}


def test_equal_runs_are_equal_but_for_run_json(tiny, tmp_path):
    params = parameters('generate', tiny, tmp_path)
    first = files_without_footer(run_notebook('generate', params, tmp_path / 'report').folder)
    again = files_without_footer(run_notebook('generate', params, tmp_path / 'report').folder)
    assert first.keys() == again.keys()
    for name in first.keys() - {'run.json'}:
        assert again[name] == first[name], name


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
    "Files and shards give the same numbers; a changed byte is found"
    params = parameters('generate', tiny, tmp_path)
    metrics = {}
    for layout in ('png', 'shards'):
        changed = dict(format=layout, out=str(tmp_path / layout))
        metrics[layout] = run_notebook('generate', params | changed, tmp_path / f'report_{layout}').metrics
    for key in ('font_lines', 'operations', 'images_with_symbol', 'images'):
        assert metrics['png'][key] == metrics['shards'][key], key
    assert metrics['shards']['splits']['train']['images'] == 4
    png = next((tmp_path / 'png/train/images').glob('*.png'))
    data = bytearray(png.read_bytes())
    data[-20] ^= 1
    png.write_bytes(data)  # of the same size
    with pytest.raises(KhmerOCRError, match=f'generate failed: 1 problem.*{png.name}'):
        run_notebook('generate', params | dict(out=str(tmp_path / 'png')), tmp_path / 'r')


def test_an_augmented_validation_set(tiny, tmp_path):
    params = parameters('validation_set', tiny, tmp_path) | dict(augmented='scan')
    metrics = run_notebook('validation_set', params, tmp_path / 'r').metrics
    assert metrics['augmented']
    assert sum(metrics['operations'].values()) > 0


def test_tiles_are_not_shown_by_default(tmp_path):
    "Without `shown` the page has measures only, and without a reader no `text_kept`"
    params = dict(pages=6, page_size=160, tiles=18, tile=64, reader='')
    run = run_notebook('judge_looks', params, tmp_path / 'report')
    assert {p.name for p in (run.folder / 'figures').glob('*.png')} == {'measures.png', 'statistics.png'}
    assert 'text_kept' not in run.metrics['measured']['pasted']
    assert set(run.metrics['measured']) == {'real', 'flat colours', 'pasted'}
    with pytest.raises(KhmerOCRError, match='standard error'):
        run_notebook('judge_looks', params | dict(pages=3), tmp_path / 'few')
