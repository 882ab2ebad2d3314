"Networks drawn from a forward pass: shapes and sources by hand, a network left as it was, arrows in the picture"

import io, pytest, torch
import torch.nn.functional as F
from torch import nn
from khmer_ocr.reporting.networks import draw_network, layer_table, trace_layers
from khmer_ocr.generative.dcgan import Discriminator, Generator
from khmer_ocr.generative.pix2pix import PatchGAN, Pix2PixConfig, make_generator
from khmer_ocr.generative.vae import VAE, VAEConfig


def unet(size=32, **kw):
    return make_generator(Pix2PixConfig(resolution=size, ngf=4, **kw))


def mask(size=32, n=1):
    return torch.rand(n, 1, size, size).round()


class Skips(nn.Module):
    "a -> b -> c, where c gets a (through much that is no layer) and b; d gets a constant alone"

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, 2, 1)
        self.c = nn.Conv2d(6, 5, 1)
        self.d = nn.Linear(4, 5, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.start = nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        a = F.leaky_relu(self.norm(self.a(x)), inplace=True)
        b = self.b(a)
        c = self.c(torch.cat([F.avg_pool2d(a, 2).sigmoid() * 2, b], 1))
        return c + self.d(self.start)[..., None, None]


class Wide(nn.Module):
    "A short skip over wide layers, which rises high"

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 2048, 1)
        self.b = nn.Conv2d(2048, 2048, 1, groups=2048)
        self.c = nn.Conv2d(2048, 2048, 1, groups=2048)
        self.d = nn.Conv2d(2048, 2048, 1, groups=2048)

    def forward(self, x):
        a = self.a(x)
        return self.d(a + self.c(self.b(a)))


def test_shapes_sources_and_parameters_by_hand():
    got = trace_layers(Skips(), torch.zeros(3, 2, 8, 6))
    assert [(l.name, l.kind, l.shape, l.parameters, l.sources) for l in got] == [
        ('input', 'input', (2, 8, 6), 0, ()),
        ('a', 'convolution', (3, 8, 6), 2 * 3 * 9 + 3, (0,)),
        ('b', 'strided', (3, 4, 3), 3 * 3 * 9 + 3, (1,)),
        ('c', 'convolution', (5, 4, 3), 6 * 5 + 5, (1, 2)),
        ('d', 'linear', (5,), 20, ()),
    ]


def test_a_layer_hears_the_nearest_only():
    net = nn.Sequential(
        nn.Linear(2, 3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(3, 4),
        nn.Unflatten(1, (4, 1, 1)),
        nn.ConvTranspose2d(4, 2, 4),
        nn.Tanh(),
    )
    got = trace_layers(net, torch.zeros(2, 2))
    assert [l.sources for l in got] == [(), (0,), (1,), (2,)]
    assert [l.kind for l in got[1:]] == ['linear', 'linear', 'transposed']
    assert got[-1].shape == (2, 4, 4)


def test_a_layer_used_twice_stands_there_twice():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    got = trace_layers(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(1, 2, 5, 5))
    assert [l.sources for l in got] == [(), (0,), (1,)]
    assert layer_table(nn.Sequential(conv, conv), torch.zeros(1, 2, 5, 5)).rows[-1][-1] == 2 * 2 * 9 + 2


@pytest.mark.parametrize('size', (32, 64, 128))
def test_every_level_of_a_unet_has_its_partner(size):
    got = trace_layers(unet(size), mask(size))
    n = (len(got) - 1) // 2
    assert 2**n == size
    assert got[n].shape[1:] == (1, 1)
    assert got[-1].shape == (3, size, size)
    assert [l.sources for l in got[: n + 2]] == [()] + [(i,) for i in range(n + 1)]
    for i in range(2, n + 1):
        assert got[n + i].sources == (n + 1 - i, n + i - 1)  # what is joined is of one size
        assert got[n + 1 - i].shape[1:] == got[n + i - 1].shape[1:]


def test_styles_and_several_inputs():
    got = trace_layers(unet(style=5), mask(), torch.zeros(1, 5))
    assert [l.name for l in got[:2]] == ['input 1', 'input 2']
    assert any(1 in l.sources for l in got[2:])
    assert any(l.sources == (0,) for l in got[2:])


@pytest.mark.parametrize(
    'net, x',
    [
        (Generator(10, 1, 32, 4), torch.zeros(2, 10, 1, 1)),
        (Discriminator(1, 32, 4), torch.zeros(2, 1, 32, 32)),
        (PatchGAN(4), torch.zeros(1, 4, 64, 64)),
        (VAE(VAEConfig(resolution=32, latent=4, width=4)), torch.zeros(1, 3, 32, 32)),
    ],
)
def test_the_painters_can_be_drawn(net, x):
    args = (x, mask()) if isinstance(net, VAE) else (x,)
    got = trace_layers(net, *args)
    assert len(got) > 4
    assert all(l.sources for l in got[len(args) :])
    assert draw_network(net, *args, title='x').axes[0].get_title(loc='left') == 'x'


def test_the_network_is_left_as_it_was():
    net = Skips().train()
    net.norm.eval()
    net.b.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.ones(1, 2, 8, 8)
    with torch.no_grad():
        got = trace_layers(net, x)
    assert got[3].sources == (1, 2)  # frozen layers and no_grad do not hide the way
    assert net.training
    assert not net.norm.training
    assert net.a.training
    assert not any(p.grad is not None for p in net.parameters())
    assert not x.requires_grad
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(RuntimeError):
        trace_layers(net, torch.ones(1, 7, 8, 8))
    assert net.training
    assert not net.norm.training
    assert not any(m._forward_hooks for m in net.modules())


def test_forgotten_activations_do_not_hide_the_way():
    assert [l.sources for l in trace_layers(unet(checkpointing=True), mask())] == [
        l.sources for l in trace_layers(unet(), mask())
    ]


def test_table_counts_all():
    net = unet()
    rows = layer_table(net, mask()).rows
    assert rows[1] == ('downs.0.0', 'strided', '4 x 16 x 16', 4 * 16 + 4)
    assert rows[-1] == ('all', '', '', sum(p.numel() for p in net.parameters()))
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters())
    assert norms > 0
    assert sum(r[3] for r in rows[:-1]) == rows[-1][3] - norms


# --- the picture


def boxes(fig):
    return [p for p in fig.axes[0].patches if type(p).__name__ == 'Rectangle']


def arrows(fig):
    return [p for p in fig.axes[0].patches if type(p).__name__ == 'FancyArrowPatch']


@pytest.mark.parametrize(
    'net, x',
    [
        (unet(), mask()),
        (unet(attention=True), mask()),
        (unet(128), mask(128)),
        (unet(form='double'), mask()),
        (Skips(), torch.zeros(1, 2, 8, 6)),
        (Wide(), torch.zeros(1, 1, 4, 4)),
        (nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3)),
    ],
)
def test_every_arrow_stays_in_the_picture(net, x):
    got, fig = trace_layers(net, x), draw_network(net, x)
    ax = fig.axes[0]
    fig.savefig(io.BytesIO())  # which lays it out
    assert len(boxes(fig)) == len(got)
    assert len(arrows(fig)) == sum(len(l.sources) for l in got)
    whole = ax.get_window_extent()
    for p in ax.patches:
        b = p.get_window_extent()
        assert b.y1 <= whole.y1 + 1, p
        assert b.y0 >= whole.y0 - 1, p
        assert b.x0 >= whole.x0 - 1, p
        assert b.x1 <= whole.x1 + 1, p
    xs = [b.get_x() for b in boxes(fig)]
    assert xs == sorted(xs)
    assert all(a.get_x() + a.get_width() < b.get_x() for a, b in zip(boxes(fig), boxes(fig)[1:]))


def test_boxes_show_size_and_channels():
    fig = draw_network(unet(64), mask(64))
    b = boxes(fig)
    assert all(x.get_height() > y.get_height() for x, y in zip(b[1:6], b[2:7]))
    assert b[3].get_width() > b[1].get_width()
    said = [t.get_text() for t in fig.axes[0].texts]
    assert said[::2][:4] == ['1', '4', '8', '16']
    assert said[1::2][:4] == ['64', '32', '16', '8']
    assert [t.get_text() for t in draw_network(Skips(), torch.zeros(1, 2, 8, 6)).axes[0].texts][1::2] == [
        '8 x 6',
        '8 x 6',
        '4 x 3',
        '4 x 3',
        'numbers',
    ]
    assert {t.get_text() for t in fig.axes[0].get_legend().get_texts()} == {
        'input',
        'convolution',
        'strided',
        'transposed',
    }
