"""What adversarial trainings share, and the DCGAN: shapes, losses, resumed runs, class balance, bad data in one line"""

import math, re, subprocess, sys
import cv2, numpy as np, pytest, torch
from pathlib import Path
from torch import nn
from khmer_ocr.generative import dcgan
from khmer_ocr.generative.dcgan import (
    DCGANConfig,
    Discriminator,
    Generator,
    TextureBank,
    TextureBatches,
    balance_classes,
    generate,
    load_discriminator,
    load_generator,
    make_gan,
    make_phases,
    count_missing,
    latent_noise,
    procedural_paper,
    progression,
    read_textures,
    texture_bank,
    train_dcgan,
)
from khmer_ocr.synth.degradation import degrade
from khmer_ocr.generative.adversarial import (
    GAN,
    DiscriminatorPhase,
    GeneratorPhase,
    GANStatistics,
    diffaugment,
    discriminator_loss,
    gan_learner,
    generator_loss,
    r1_penalty,
    gan_optimizer,
)
from khmer_ocr.generative.artifacts import checkerboard_strength, save_image, has_checkerboard, write_png
from khmer_ocr.training.checkpoints import load_checkpoint, load_weights
from khmer_ocr.training.callbacks import read_history
from khmer_ocr.reporting.runs import run_notebook
from khmer_ocr.core.errors import KhmerOCRError
from khmer_ocr.training.settings import TrainConfig
from khmer_ocr.core.config import configure

tiny = dict(
    image_size=16, width=4, d_width=4, z_dim=8, batch_size=4, epochs=6, sample_every=2, stats_every=2, snapshot_every=3
)
quiet = dict(verbose=False, device='cpu', tensorboard=False)
papers = procedural_paper(8, 24)


def train(folder, resume=None, images=papers, **kw):
    return train_dcgan(folder, images, DCGANConfig(**{**tiny, **kw}), resume=resume, **quiet)


def one_line(f, words):
    with pytest.raises(KhmerOCRError) as e:
        f()
    assert words in str(e.value)
    assert '\n' not in str(e.value)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    d = tmp_path_factory.mktemp('run')
    return train(d / 'whole'), d / 'whole'


# the network of founding document 004


def test_layer_progression_and_parameters():
    "Shapes and parameters at full size are those of the founding document"
    up = [(100, 1, 1), (512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32), (32, 64, 64), (1, 128, 128)]
    assert progression(Generator(100, 1), torch.randn(1, 100, 1, 1)) == up
    assert progression(Discriminator(1), torch.randn(1, 1, 128, 128)) == [*up[:0:-1], (1, 1, 1)]
    assert sum(p.numel() for p in Generator(100, 1).parameters()) == 3_606_976  # 3.6 M
    assert progression(Generator(100, 3), torch.randn(1, 100, 1, 1))[-1] == (3, 128, 128)


def test_ranges_of_both_ends():
    "Images lie in -1..1, probabilities in 0..1"
    with torch.no_grad():
        x = Generator()(5 * torch.randn(2, 100, 1, 1))
        p = Discriminator()(x)
    assert -1 <= x.min()
    assert x.max() <= 1
    assert p.shape == (2, 1, 1, 1)
    assert 0 <= p.min()
    assert p.max() <= 1


def test_initialisation():
    "Convolutions begin with N(0, 0.02), norms with N(1, 0.02) and no shift"
    torch.manual_seed(0)
    g = Generator()
    for m in g.modules():
        if isinstance(m, nn.ConvTranspose2d):
            assert abs(m.weight.std().item() - 0.02) < 0.001
            assert abs(m.weight.mean().item()) < 0.002
        if isinstance(m, nn.BatchNorm2d):
            assert abs(m.weight.mean().item() - 1) < 0.02
            assert m.weight.std() > 0.01
            assert not m.bias.any()


def test_constants_are_the_defaults():
    "The constants of the module and the defaults of the settings have the values of the document"
    c = DCGANConfig()
    documented = dict(batch_size=64, image_size=128, channels=1, z_dim=100, lr=0.0002, beta1=0.5, epochs=250)
    for name, value in documented.items():
        assert getattr(dcgan, name.upper()) == value, name
        assert getattr(c, name) == value, name


# losses and phases


def test_losses_by_hand():
    "Each loss gives the value of its formula, and an unknown name is an error"
    real = torch.tensor([0.0, math.log(3)])
    fake = torch.tensor([0.0, -math.log(3)])  # probabilities 1/2, 3/4 and 1/2, 1/4
    assert discriminator_loss('bce', real, fake).item() == pytest.approx(-math.log(1 / 2) - math.log(3 / 4))
    assert generator_loss('bce', fake).item() == pytest.approx(-(math.log(1 / 2) + math.log(1 / 4)) / 2)
    assert discriminator_loss('lsgan', torch.tensor([0.5]), torch.tensor([0.25])).item() == pytest.approx(0.25 + 0.0625)
    assert discriminator_loss('hinge', torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0])).item() == pytest.approx(
        0.25 + 0.5
    )
    assert generator_loss('hinge', torch.tensor([2.0, 4.0])).item() == -3
    one_line(lambda: generator_loss('bse', fake), 'did you mean bce?')


def test_one_step_by_hand(tmp_path):
    "The learner's step is that of the tutorial: the discriminator down both losses, then the generator, by Adam"
    c = DCGANConfig(**tiny | dict(epochs=1))
    images = papers[:4]
    learn = train_dcgan(tmp_path, images, c, **quiet)
    net = make_gan(c)
    x = TextureBatches(images, c).batch(0)
    torch.manual_seed(c.seed)
    adam = {
        k: torch.optim.Adam(getattr(net, k).parameters(), 2e-4, (0.5, 0.999)) for k in ('generator', 'discriminator')
    }
    bce = nn.BCELoss()
    (one, zero) = (torch.full((4, 1, 1, 1), v) for v in (1.0, 0.0))
    made = net.generator(torch.randn(4, 8, 1, 1)).detach()
    d_loss = bce(net.discriminator(x), one) + bce(net.discriminator(made), zero)
    d_loss.backward()
    adam['discriminator'].step()
    g_loss = bce(net.discriminator(net.generator(torch.randn(4, 8, 1, 1))), one)
    net.zero_grad()
    g_loss.backward()
    adam['generator'].step()
    assert learn.losses == pytest.approx([d_loss.item(), g_loss.item()], rel=1e-5)
    for (k, a), b in zip(learn.net.state_dict().items(), net.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-6), k


def test_each_phase_trains_its_own_network():
    "The phase of the discriminator gives the generator no gradient"
    c = DCGANConfig(**tiny)
    net = make_gan(c)
    x = TextureBatches(papers, c).batch(0)
    d, g = make_phases(c)
    d(net, x).backward()
    assert all(p.grad is None for p in net.generator.parameters())
    assert (d.parts, g.parts) == (('discriminator',), ('generator',))
    assert len(make_phases(DCGANConfig(**tiny, critic_steps=3))) == 4


def test_r1_by_hand_and_only_where_asked():
    "R1 adds gamma / 2 times the squared gradient at the real images"
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    assert r1_penalty((2 * x).sum((1, 2, 3)), x).item() == pytest.approx(4 * 16)
    c = DCGANConfig(**tiny)
    net = make_gan(c).eval()
    batch = TextureBatches(papers, c).batch(0)

    def loss(**kw):
        torch.manual_seed(1)
        torch.rand(())
        return DiscriminatorPhase(**kw)(net, batch).item()

    with_r1 = DiscriminatorPhase(r1=10.0, r1_every=1)
    torch.manual_seed(1)
    got = with_r1(net, batch).item()
    without = loss()
    y = batch.clone().requires_grad_()
    penalty = r1_penalty(net.discriminate(y), y).item()
    assert penalty > 0
    assert got == pytest.approx(without + 5 * penalty, rel=1e-4)


def test_two_time_scales():
    "The discriminator has its own factor on the rate"
    net = make_gan(DCGANConfig(**tiny))
    opt = gan_optimizer((0.5, 0.999), dict(discriminator=4.0))(net, TrainConfig())
    assert [g['scale'] for g in opt.param_groups] == [1.0, 4.0]
    assert opt.defaults['betas'] == (0.5, 0.999)


def test_noise_on_the_discriminators_input_fades():
    "The noise is there at the start and gone at the end"
    c = DCGANConfig(**tiny)
    net = make_gan(c).eval()
    x = TextureBatches(papers, c).batch(0)
    phase = GeneratorPhase(noise=0.5)
    with torch.no_grad():
        assert not phase.augmented_logits(net, x).equal(net.discriminate(x))
        phase.progress = 1.0
        assert phase.augmented_logits(net, x).equal(net.discriminate(x))


def test_pairs_are_augmented_together():
    "Translation moves image and mask alike; colour and cutout leave the mask as it is"
    image = torch.zeros(6, 3, 32, 32)
    mask = torch.zeros(6, 1, 32, 32)
    mask[:, :, 10:20, 12:15] = 1
    image[mask.expand_as(image) > 0] = -1.0
    torch.manual_seed(0)
    moved, moved_mask = diffaugment(image, 'translation', mask)
    assert ((moved < 0) == (moved_mask > 0)).all()
    assert not moved_mask.equal(mask)
    _, same = diffaugment(image, 'color,cutout', mask)
    assert same.equal(mask)


def test_a_conditional_training_uses_the_same_phases(tmp_path):
    "Pairs: the generator starts from the mask, and the discriminator sees mask and image"

    class FixedImages(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, mask):
            return self.conv(mask).tanh()

    torch.manual_seed(0)
    net = GAN(FixedImages(), nn.Conv2d(4, 1, 4, 2))
    mask = (torch.rand(4, 1, 16, 16) > 0.8).float()
    image = (0.8 - 1.6 * mask).expand(4, 3, 16, 16)

    def l1(net, made, image, condition):
        return (made - image).abs().mean()

    gan_learner(
        net,
        [DiscriminatorPhase('lsgan', 'translation'), GeneratorPhase('lsgan', 'translation', extra=[('L1', 100.0, l1)])],
        lambda n: iter([(image, mask)] * 200),
        tmp_path,
        [GANStatistics(10, say=None)],
        steps=60,
        lr=2e-2,
        precision='32-true',
        **quiet,
    ).fit()
    rows = read_history(tmp_path / 'statistics.csv')
    assert rows[-1]['L1'] < rows[0]['L1'] / 2
    assert {'Loss_D', 'Loss_G', 'D_x', 'D_G_z1', 'D_G_z2', 'ratio', 'gan'} <= set(rows[0])


# training


def test_what_a_run_leaves_behind(run):
    "Files, samples and rows of statistics have the names and steps of the settings"
    learn, d = run
    assert learn.step == 12
    assert {p.name for p in d.iterdir()} >= {
        'generator_model.safetensors',
        'discriminator_model.safetensors',
        'network-snapshot-000003.safetensors',
        'network-snapshot-000012.safetensors',
        'statistics.csv',
        'latest.safetensors',
    }
    assert sorted(p.name for p in (d / 'samples').iterdir()) == ['epoch-0002.png', 'epoch-0004.png', 'epoch-0006.png']
    assert [r['step'] for r in read_history(d / 'statistics.csv')] == [1, 2, 4, 6, 8, 10, 12]
    header = load_checkpoint(d / 'generator_model.safetensors')[1]
    assert header['model'] == 'dcgan'
    assert configure(DCGANConfig, header['config']) == DCGANConfig(**tiny)


@pytest.mark.parametrize(
    'kw',
    [
        {},
        dict(diffaug='color,translation,cutout', ema=0.9, r1=1.0, noise=0.1, critic_steps=2, resize_conv=True),
        dict(loss='hinge', spectral=True, d_rate=2.0, clip=1.0, channels=3, d_width=6),
    ],
)
def test_resumed_to_the_same_bits(tmp_path, kw):
    "A run that goes on from a snapshot ends with the files of one that was not stopped"
    images = procedural_paper(8, 24, kw.get('channels', 1))
    train(tmp_path / 'a', images=images, **kw)
    (tmp_path / 'b').mkdir()
    snap = tmp_path / 'b' / 'network-snapshot-000006.safetensors'
    for name in (snap.name, 'statistics.csv'):
        (tmp_path / 'b' / name).write_bytes((tmp_path / 'a' / name).read_bytes())
    train(tmp_path / 'b', resume=snap, images=images, **kw)
    for name in (
        'generator_model.safetensors',
        'discriminator_model.safetensors',
        'network-snapshot-000012.safetensors',
        'statistics.csv',
        'samples/epoch-0006.png',
    ):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), name


def test_seeds(run, tmp_path):
    "The seed decides weights, order and noise: the same one gives the same bits, another one others"
    same = train(tmp_path / 'same')
    other = train(tmp_path / 'other', seed=7)
    _, d = run
    assert (tmp_path / 'same' / 'generator_model.safetensors').read_bytes() == (
        d / 'generator_model.safetensors'
    ).read_bytes()
    a = same.net.state_dict()
    b = other.net.state_dict()
    assert not a['generator.main.0.weight'].equal(b['generator.main.0.weight'])


def test_statistics_line_and_that_measuring_leaves_no_trace(run, tmp_path, capsys):
    "The line has the form of the tutorial, and more measuring gives the same weights"
    learn, _ = run
    train_dcgan(tmp_path, papers, DCGANConfig(**tiny | dict(stats_every=1)), device='cpu', tensorboard=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    losses = r'Loss_D: \d+\.\d{4}\tLoss_G: \d+\.\d{4}'
    probabilities = r'D\(x\): [01]\.\d{4}\tD\(G\(z\)\): [01]\.\d{4} / [01]\.\d{4}'
    assert re.fullmatch(rf'\[5/6\]\[1/2\]\t{losses}\t{probabilities}', lines[-1])
    assert load_weights(tmp_path / 'generator_model.safetensors')[0]['main.0.weight'].equal(
        learn.net.generator.main[0].weight
    )


def test_the_second_number_is_after_the_generators_update(tmp_path):
    "With a discriminator that stands still, the generator's step raises the probability that it gives"
    c = DCGANConfig(**tiny | dict(lr=2e-3, d_rate=1e-9, epochs=10))
    train_dcgan(tmp_path, papers, c, **quiet)
    rows = read_history(tmp_path / 'statistics.csv')
    assert all(r['D_G_z2'] > r['D_G_z1'] for r in rows)


def test_spectral_norm_and_options_are_built():
    "Spectral normalisation replaces the norms; `resize_conv` replaces transposed convolutions"
    net = Discriminator(1, 16, 4, spectral_norm=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    for _ in range(60):
        net(torch.randn(2, 1, 16, 16))
    w = net.main[2].weight
    assert torch.linalg.matrix_norm(w.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    assert not any(isinstance(m, nn.ConvTranspose2d) for m in list(Generator(resize_conv=True).main)[1:])


# data


def write(folder, n, size=20, channels=1, start=0):
    for i, im in enumerate(procedural_paper(n, size, channels)):
        write_png(folder / f'{start + i}.png', im[..., 0] if channels == 1 else im)


def test_bad_data_in_one_line(tmp_path):
    "Missing or broken images and wrong settings are one line, and nothing is written"
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.png').write_bytes(b'no image')
    one_line(lambda: train(tmp_path / 'x', images=str(tmp_path / 'empty')), 'No images found in')
    one_line(lambda: train(tmp_path / 'x', images=str(tmp_path / 'nowhere')), 'No images found in')
    one_line(lambda: train(tmp_path / 'x', images=str(tmp_path / 'broken')), 'a.png')
    one_line(lambda: train(tmp_path / 'x', images=[]), 'No images')
    one_line(lambda: configure(DCGANConfig, dict(difaug='color')), 'did you mean diffaug?')
    one_line(lambda: DCGANConfig(image_size=100), 'power of two')
    assert not (tmp_path / 'x').exists()


def test_a_single_image_and_fewer_than_a_batch(tmp_path):
    "One image, or three, can be trained on"
    write(tmp_path / 'one' / 'good', 1, 40)
    learn = train(tmp_path / 'm', images=str(tmp_path / 'one'), epochs=2)
    assert learn.step == 2
    assert all(map(math.isfinite, learn.losses))
    write(tmp_path / 'three', 3, 40)
    assert train(tmp_path / 'n', images=str(tmp_path / 'three'), epochs=2).step == 2


def test_any_size_grey_or_colour(tmp_path):
    "Images of any size, grey or in colour, become batches of the channels asked for"
    write(tmp_path, 1, 10)
    write(tmp_path, 1, 50, 3, start=1)
    write_png(tmp_path / 'wide.png', np.full((30, 200), 90, np.uint8))
    for c in (1, 3):
        x = TextureBatches(read_textures(tmp_path, c), DCGANConfig(image_size=16, batch_size=3, channels=c)).batch(0)
        assert x.shape == (3, c, 16, 16)
        assert -1 <= x.min()
        assert x.max() <= 1


def test_every_image_comes_once_an_epoch():
    "Each epoch has every image once, in another order"
    data = TextureBatches([np.full((16, 16, 1), 20 * k, np.uint8) for k in range(10)], DCGANConfig(**tiny))
    seen = [round((v.item() + 1) * 127.5 / 20) for n in range(5) for v in data.batch(n)[:, 0, 0, 0]]
    assert sorted(seen) == sorted([*range(10)] * 2)
    assert seen[:10] != seen[10:]


def test_class_balance(run, tmp_path):
    "As many images are made as the smaller class lacks, and none of the larger one"
    _, d = run
    write(tmp_path / 'good', 5)
    write(tmp_path / 'bad', 2)
    assert count_missing(tmp_path) == dict(good=0, bad=3)
    made = balance_classes(tmp_path, d / 'generator_model.safetensors', tmp_path)
    assert [p.parent.name for p in made] == ['bad'] * 3
    assert count_missing(tmp_path) == dict(good=0, bad=0)
    assert len(read_textures(tmp_path)) == len(read_textures(tmp_path, kind='bad')) == 5


# making images


def test_images_depend_on_seed_and_number_alone(run, tmp_path):
    "Image i is the same in any batch, but for the rounding of sums"
    _, d = run
    model = d / 'generator_model.safetensors'
    a = generate(model, 9, tmp_path / 'a', seed=3, batch_size=4)
    b = generate(model, 9, tmp_path / 'b', seed=3, batch_size=4)
    c = generate(model, 4, tmp_path / 'c', seed=3, start=5)
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
    assert [p.name for p in c] == [f'synthetic_{i}.png' for i in range(5, 9)]

    def read(p):
        return cv2.imread(str(p), cv2.IMREAD_UNCHANGED).astype(int)

    assert all(abs(read(x) - read(y)).max() <= 1 for x, y in zip(a[5:], c))
    assert read(a[0]).shape == (16, 16)
    assert any((read(x) != read(a[0])).any() for x in a[1:])
    assert latent_noise(3, 8, 1)[2].equal(latent_noise(1, 8, 1, start=2)[0])


def test_state_dicts_of_others(tmp_path):
    "Weights of another program load in order whatever their names, and a file that runs code is refused"
    g = Generator(12, 3, 32, 4).eval()
    d = Discriminator(3, 32, 4).eval()
    torch.save({f'model.{k}': v for k, v in g.state_dict().items()}, tmp_path / 'g.pth')
    torch.save(d.state_dict(), tmp_path / 'd.pth')
    z = torch.randn(2, 12, 1, 1)
    net, c = load_generator(tmp_path / 'g.pth')
    assert net(z).equal(g(z))
    assert c.z_dim == 12
    assert load_discriminator(tmp_path / 'd.pth')[0](g(z)).equal(d(g(z)))
    one_line(lambda: load_generator(tmp_path / 'd.pth'), 'no such part')

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'touched',)

    torch.save(Evil(), tmp_path / 'evil.pth')
    one_line(lambda: load_generator(tmp_path / 'evil.pth'), 'without running code')
    assert not (tmp_path / 'touched').exists()


def test_snapshot_and_models_load(run):
    "Model, snapshot and latest checkpoint of one step give the same generator"
    learn, d = run
    z = latent_noise(2, 8)
    nets = [
        load_generator(d / f)[0]
        for f in ('generator_model.safetensors', 'network-snapshot-000012.safetensors', 'latest.safetensors')
    ]
    with torch.no_grad():
        assert all(n(z).equal(nets[0](z)) for n in nets)
    one_line(lambda: load_generator(d / 'discriminator_model.safetensors'), 'no generator')


def test_grid_writer(tmp_path):
    "Images stand in rows with black lines between them, -1 black and 1 white"
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 3, 4)
    save_image(x, tmp_path / 'g.png', nrow=3, padding=1)
    got = cv2.imread(str(tmp_path / 'g.png'), cv2.IMREAD_UNCHANGED)
    assert got.shape == (2 * 4 + 1, 3 * 5 + 1)
    assert got[1, [1, 6, 11]].tolist() == [0, 64, 128]
    assert got[5, [1, 6, 11]].tolist() == [191, 255, 0]


def test_a_checkerboard_is_found_and_resize_convolution_has_none():
    "Transposed convolutions leave dots that the measure finds, beside data that has none"
    torch.manual_seed(0)
    start = latent_noise(32)
    with torch.no_grad():
        dotted = Generator()(start)
        smooth = Generator(resize_conv=True)(start)
    real = torch.from_numpy(np.stack(procedural_paper(32))).permute(0, 3, 1, 2) / 127.5 - 1
    assert has_checkerboard(dotted, real)
    assert not has_checkerboard(smooth, real)
    assert checkerboard_strength(dotted) > 2 + checkerboard_strength(smooth)
    weak = real.clone()
    weak[:, :, ::4, ::4] += 0.05
    assert has_checkerboard(weak, real)
    assert not has_checkerboard(weak, weak)


def test_bank_as_a_background(run, tmp_path):
    "A bank is an operation of `degrade`: it repeats by the seed, and ink stays black"
    _, d = run
    bank = texture_bank(d / 'generator_model.safetensors', 4)
    line = np.full((40, 300), 255, np.uint8)
    line[10:30, 50:250] = 0
    out = degrade(line, np.random.default_rng(1), [(bank, 1.0)])
    assert out[1] == ['texture']
    assert out[0].shape == line.shape
    assert out[0].dtype == np.uint8
    assert (out[0] == degrade(line, np.random.default_rng(1), [(bank, 1.0)])[0]).all()
    assert not out[0][10:30, 50:250].any()
    assert out[0][:8].std() > 0
    bank.save(tmp_path / 'b.safetensors')
    assert (
        TextureBank(tmp_path / 'b.safetensors')(line, np.random.default_rng(1)) == bank(line, np.random.default_rng(1))
    ).all()
    assert bank(np.full((7, 5), 255, np.uint8), np.random.default_rng(0)).shape == (7, 5)


# the run notebooks


def test_run_train(run, tmp_path):
    "The run notebook trains on a folder and reports its measures"
    write(tmp_path / 'data' / 'good', 5)
    d = tmp_path / 'model'
    m = run_notebook(
        'train_dcgan',
        dict(
            data=str(tmp_path / 'data'),
            model_dir=str(d),
            image_size=16,
            width=4,
            d_width=4,
            z_dim=8,
            batch_size=4,
            epochs=2,
            sample_every=1,
            evaluated=8,
            diffaug='color',
            ema=0.9,
            device='cpu',
        ),
        tmp_path / 'report',
    ).metrics
    assert m['steps'] == 4
    assert m['images'] == 5
    assert {'diversity', 'grid', 'distance'} <= set(m['scores'])
    assert (d / 'generator_model.safetensors').exists()


def test_run_inference(run, tmp_path):
    "The run notebook writes images, a bank, and the probabilities of the discriminator"
    _, d = run
    m = run_notebook(
        'dcgan_inference',
        dict(
            model=str(d / 'generator_model.safetensors'),
            discriminator=str(d / 'discriminator_model.safetensors'),
            samples=9,
            images=str(tmp_path / 'out'),
            bank=str(tmp_path / 'bank.safetensors'),
        ),
        tmp_path / 'report',
    ).metrics
    assert m['written'] == 9 == len(list((tmp_path / 'out').glob('synthetic_*.png')))
    assert 0 < m['scores']['p_real'] < 1
    assert len(TextureBank(tmp_path / 'bank.safetensors').textures) == 9


def test_run_explore(tmp_path):
    "The run notebook trains each variant and measures it"
    m = run_notebook(
        'dcgan_explore',
        dict(
            papers=4,
            variants={'plain': {}, 'hinge': {'loss': 'hinge', 'spectral': True}},
            image_size=16,
            width=4,
            d_width=4,
            batch_size=4,
            epochs=1,
            evaluated=8,
            model_dir=str(tmp_path / 'm'),
            device='cpu',
        ),
        tmp_path / 'report',
    ).metrics
    assert set(m['scores']) == {'plain', 'hinge'}
    assert m['images'] == dict(paper=4)


# as a program


def test_main(tmp_path, monkeypatch):
    "`main()` trains with the constants of the module and writes both networks"
    write(tmp_path / 'data' / 'good', 2)
    for k, v in dict(
        BATCH_SIZE=2, IMAGE_SIZE=16, EPOCHS=1, DATA_DIR=tmp_path / 'data', MODEL_SAVE_DIR=tmp_path / 'm'
    ).items():
        monkeypatch.setattr(dcgan, k, v)
    assert dcgan.main(width=4, d_width=4).step == 1
    assert (tmp_path / 'm' / 'generator_model.safetensors').exists()


def test_program_without_data_says_so_in_one_line(tmp_path):
    "The module as a program ends with one line and writes nothing"
    r = subprocess.run(
        [sys.executable, '-m', 'khmer_ocr.generative.dcgan'], cwd=tmp_path, capture_output=True, text=True
    )
    assert r.returncode == 1
    assert r.stderr.startswith('No images found in')
    assert r.stderr.count('\n') == 1
    assert not any(tmp_path.iterdir())
