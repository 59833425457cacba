"""Networks for the tests of the channel graph: one small module per pattern, and torchvision's families."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fastprune import nn as fpnn

Builder = Callable[[], nn.Module]
PATTERNS: dict[str, Builder] = {}


def pattern(build: Builder) -> Builder:
    """Register a network of 3x16x16 images; every one has a convolution called ``first`` and returns logits."""
    PATTERNS[build.__name__] = build
    return build


def conv_bn(cin: int, cout: int, k: int = 3, **options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, k, padding=k // 2, **options), nn.BatchNorm2d(cout), nn.ReLU())


class Net(nn.Module):
    """``first`` (8 channels), whatever ``middle`` is, global pooling, ``fc``."""

    def __init__(self, middle: nn.Module, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.middle = middle
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(F.relu(self.bn(self.first(x)))).mean((2, 3)))


class Lambda(nn.Module):
    """A function of x and of the modules given by name."""

    def __init__(self, function: Callable, **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, m in modules.items():
            setattr(self, name, m)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class OptionA(nn.Module):
    """CIFAR ResNet with shortcuts of stride slicing and zero channels: 6 -> 10 -> 14 channels."""

    class Block(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(cout)
            self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(cout)
            self.stride, self.pad = stride, (cout - cin) // 2

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            if self.pad:
                x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
            return F.relu(out + x)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(self.Block(6, 6, 1), self.Block(6, 6, 1))
        self.layer2 = nn.Sequential(self.Block(6, 10, 2), self.Block(10, 10, 1))
        self.layer3 = nn.Sequential(self.Block(10, 14, 2), self.Block(14, 14, 1))
        self.fc = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn(self.first(x))))))
        return self.fc(x.mean((2, 3)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(14), nn.Conv2d(14, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        return torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)


def _shuffle(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return m.conv(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def _chunk(m: nn.Module, x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return m.conv(torch.cat([a, b.sigmoid()], 1))


def _squeeze_excite(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(x * m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid())


option_a = pattern(OptionA)


@pattern
def flatten_into_linear():
    net = nn.Sequential()
    net.first = nn.Conv2d(3, 8, 3, padding=1)
    net.pool = nn.AdaptiveAvgPool2d((3, 2))
    net.flat = nn.Flatten()
    net.hidden = nn.Linear(48, 12)
    net.act = nn.GELU()
    net.fc = nn.Linear(12, 5)
    return net


@pattern
def residual():
    return Net(Lambda(lambda m, x: F.relu(m.body(x) + x), body=nn.Sequential(conv_bn(8, 6), conv_bn(6, 8))), 8)


@pattern
def dense():
    return Net(DenseBlock(), 20)


@pattern
def depthwise():
    return Net(nn.Sequential(conv_bn(8, 8, groups=8), conv_bn(8, 24, groups=8), conv_bn(24, 7, 1)), 7)


@pattern
def grouped():
    return Net(nn.Sequential(conv_bn(8, 24, 1), conv_bn(24, 18, groups=3), conv_bn(18, 7, 1)), 7)


@pattern
def grouped_down_to_one_channel_each():
    return Net(nn.Sequential(conv_bn(8, 6, 1), conv_bn(6, 6, groups=3), conv_bn(6, 7, 1)), 7)


@pattern
def squeeze_excite():
    m = Lambda(_squeeze_excite, down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), out=nn.Conv2d(8, 7, 1))
    return Net(m, 7)


@pattern
def transposed_and_prelu():
    return Net(nn.Sequential(nn.ConvTranspose2d(8, 10, 2, 2), nn.PReLU(10), nn.Conv2d(10, 7, 1)), 7)


@pattern
def pixel_shuffle():
    return Net(nn.Sequential(nn.Conv2d(8, 24, 3), nn.PixelShuffle(2), nn.Conv2d(6, 7, 1)), 7)


@pattern
def pixel_unshuffle():
    return Net(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, 7, 1)), 7)


@pattern
def channel_shuffle_by_view():
    return Net(Lambda(_shuffle, conv=nn.Conv2d(8, 7, 1)), 7)


@pattern
def channel_shuffle_module():
    return Net(nn.Sequential(nn.Conv2d(8, 12, 1), nn.ChannelShuffle(3), nn.Conv2d(12, 7, 1)), 7)


@pattern
def chunk():
    return Net(Lambda(_chunk, conv=nn.Conv2d(8, 7, 1)), 7)


@pattern
def glu():
    return Net(nn.Sequential(nn.Conv2d(8, 12, 1), nn.GLU(1), nn.Conv2d(6, 7, 1)), 7)


@pattern
def instance_norm():
    return Net(nn.Sequential(nn.Conv2d(8, 10, 3), nn.InstanceNorm2d(10, affine=True), nn.Conv2d(10, 7, 1)), 7)


@pattern
def group_norm_of_one_channel_each():
    return Net(nn.Sequential(nn.Conv2d(8, 10, 3), nn.GroupNorm(10, 10), nn.Conv2d(10, 7, 1)), 7)


@pattern
def group_norm_of_several_channels_each():
    return Net(nn.Sequential(nn.Conv2d(8, 12, 3), nn.GroupNorm(6, 12), nn.ReLU(), nn.Conv2d(12, 7, 1)), 7)


@pattern
def masked_weight():
    def run(m, x):
        return m.out(F.conv2d(x, m.conv.weight * m.conv.weight.detach().abs().gt(0.01), m.conv.bias, padding=1))

    return Net(Lambda(run, conv=nn.Conv2d(8, 10, 3, padding=1), out=nn.Conv2d(10, 7, 1)), 7)


@pattern
def spatial_gate_expanded():
    def run(m, x):
        return m.out(x * m.gate(x).sigmoid().expand_as(x))

    return Net(Lambda(run, gate=nn.Conv2d(8, 1, 3, padding=1), out=nn.Conv2d(8, 7, 1)), 7)


@pattern
def zeros_joined_on():
    def run(m, x):
        x = torch.cat([x, torch.zeros(len(x), 2, *x.shape[2:], dtype=x.dtype)], 1)
        return m.out(x + m.conv(x))

    return Net(Lambda(run, conv=nn.Conv2d(10, 10, 3, padding=1), out=nn.Conv2d(10, 7, 1)), 7)


@pattern
def shared_convolution():
    """One weight used twice: rows and columns of the same tensor are one group."""

    def run(m, x):
        return m.out(F.relu(m.conv(F.relu(m.conv(x)))))

    return Net(Lambda(run, conv=nn.Conv2d(8, 8, 3, padding=1), out=nn.Conv2d(8, 7, 1)), 7)


@pattern
def layer_scale_and_dropout():
    def run(m, x):
        return m.out(m.scale * m.drop(m.conv(x)) + x)

    scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
    return Net(
        Lambda(run, conv=nn.Conv2d(8, 8, 3, padding=1), drop=nn.Dropout2d(), scale=scale, out=nn.Conv2d(8, 7, 1)), 7
    )


@pattern
def mlp_on_tokens():
    def run(m, x):
        tokens = x.flatten(2).transpose(1, 2)  # (N, H*W, C)
        return m.down(F.gelu(m.up(tokens))).transpose(1, 2).unflatten(2, (16, 16))

    return Net(Lambda(run, up=nn.Linear(8, 12), down=nn.Linear(12, 7)), 7)


@pattern
def bounded_norms():
    """Our batch norms: a removed channel leaves them as a constant that is not zero."""
    return Net(
        nn.Sequential(
            nn.Conv2d(8, 10, 3), fpnn.BatchNormAct2d(10, act="relu", bound="sigmoid"),
            nn.Conv2d(10, 12, 3), fpnn.SigmoidBatchNorm2d(12), nn.Softplus(), nn.Conv2d(12, 7, 1),
        ),
        7,
    )  # fmt: skip


@pattern
def bounded_norm_with_residual():
    def run(m, x):
        return m.out(m.norm(m.conv(x), x))

    norm = fpnn.BatchNormAct2d(8, act="relu")
    return Net(Lambda(run, conv=nn.Conv2d(8, 8, 3, padding=1), norm=norm, out=nn.Conv2d(8, 7, 1)), 7)


class Hierarchical(nn.Module):
    """Res2Net: pieces of a width written into the module, each convolved on top of the one before."""

    def __init__(self, cin: int = 8) -> None:
        super().__init__()
        self.width = 4
        self.up = conv_bn(cin, 12, 1)
        self.convs = nn.ModuleList([conv_bn(4, 4), conv_bn(4, 4)])
        self.down = nn.Conv2d(12, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.up(x), self.width, 1)
        a = self.convs[0](a)
        return self.down(torch.cat([a, self.convs[1](a + b), c], 1))


class CrossStage(nn.Module):
    """CSP: halves, by half of a number in the module."""

    def __init__(self) -> None:
        super().__init__()
        self.expand_chs = 12
        self.up, self.block, self.out = nn.Conv2d(8, 12, 1), conv_bn(6, 6), nn.Conv2d(12, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).split(self.expand_chs // 2, dim=1)
        return self.out(torch.cat([a, self.block(b)], 1))


class Mixed(nn.Module):
    """MixNet: pieces of unequal width, from a list; each piece loses what it likes."""

    def __init__(self, kind: type = list) -> None:
        super().__init__()
        self.splits = kind([5, 3])
        self.convs = nn.ModuleList([conv_bn(5, 5, groups=5), conv_bn(3, 3, 1, groups=3)])
        self.out = nn.Conv2d(8, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.splits, 1)
        return self.out(torch.cat([conv(p) for conv, p in zip(self.convs, pieces, strict=True)], 1))


class DualPath(nn.Module):
    """DPN: so many channels are added, the rest is joined on."""

    def __init__(self) -> None:
        super().__init__()
        self.added = 6
        self.wide, self.body, self.out = nn.Conv2d(8, 9, 1), conv_bn(8, 10), nn.Conv2d(13, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        s, y = self.wide(x), self.body(x)
        return self.out(torch.cat([s[:, : self.added] + y[:, : self.added], s[:, self.added :], y[:, self.added :]], 1))


class Blur(nn.Module):
    """BlurPool: a fixed depthwise kernel, with as many groups as the module was told of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([0.25, 0.5, 0.25])) / 4)
        self.kernel = self.kernel.repeat(channels, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel, stride=2, groups=self.channels)


class StandardisedConv(nn.Conv2d):
    """Weights standardised per row: rows can go, but a masked column would shift the mean of all rows."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Attention(nn.Module):
    """Heads of sizes written into the module, and scaled by a number fixed when it was built."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 6
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 20)
        self.out = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k = (m(tokens).view(n, h * w, self.heads, self.head_dim).transpose(1, 2) for m in (self.q, self.k))
        v = self.v(tokens).view(n, h * w, self.heads, -1).transpose(1, 2)
        y = (q @ k.transpose(2, 3) * self.scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (h, w))


class SelectiveKernels(nn.Module):
    """Two branches, mixed channel by channel by a softmax over the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(8, 6), conv_bn(8, 6, 5)])
        self.reduce, self.select, self.out = conv_bn(6, 4, 1), nn.Conv2d(4, 12, 1), nn.Conv2d(6, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([branch(x) for branch in self.branches], 1)
        gate = self.select(self.reduce(x.sum(1).mean((2, 3), keepdim=True)))
        return self.out((x * gate.view(len(x), 2, -1, 1, 1).softmax(1)).sum(1))


class TwoHeads(nn.Module):
    """An auxiliary head that only runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 8, 3), conv_bn(8, 10)
        self.fc, self.aux = nn.Linear(10, 5), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        early = F.relu(self.first(x))
        y = self.fc(self.body(early).mean((2, 3)))
        return (y, self.aux(early.mean((2, 3)))) if self.training else y


@pattern
def hierarchical_split():
    return Net(Hierarchical(), 7)


@pattern
def cross_stage_split():
    return Net(CrossStage(), 7)


@pattern
def mixed_split():
    return Net(nn.Sequential(Mixed(), nn.Conv2d(7, 8, 1), Mixed(tuple)), 7)


@pattern
def dual_path():
    return Net(DualPath(), 7)


@pattern
def blur_pool():
    return Net(nn.Sequential(Blur(8), nn.Conv2d(8, 7, 1)), 7)


@pattern
def standardised_rows():
    return Net(nn.Sequential(nn.Conv2d(8, 8, 1), StandardisedConv(8, 10, 3), nn.ReLU(), nn.Conv2d(10, 7, 1)), 7)


@pattern
def heads():
    return Net(Attention(), 7)


@pattern
def selective_kernels():
    return Net(SelectiveKernels(), 7)


@pattern
def auxiliary_head():
    return TwoHeads()


@pattern
def reparameterised_branches():
    """RepVGG: 3x3, 1x1 and identity, each with a norm of its own, added up."""

    def run(m, x):
        return m.out(F.relu(m.wide(x) + m.narrow(x) + m.same(x)))

    wide, narrow = (nn.Sequential(nn.Conv2d(8, 8, k, padding=k // 2), nn.BatchNorm2d(8)) for k in (3, 1))
    return Net(Lambda(run, wide=wide, narrow=narrow, same=nn.BatchNorm2d(8), out=nn.Conv2d(8, 7, 1)), 7)


@pattern
def computed_weight():
    """A weight that is not zero where masked, on an input that is."""

    def run(m, x):
        return m.out(F.conv2d(x, m.conv.weight.sigmoid()))

    return Net(Lambda(run, conv=nn.Conv2d(8, 10, 3), out=nn.Conv2d(10, 7, 1)), 7)


@pattern
def one_weight_in_two_layers():
    tied = Lambda(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv2d(8, 8, 3, padding=1), b=nn.Conv2d(8, 8, 3, padding=1))
    tied.b.weight = tied.a.weight
    return Net(nn.Sequential(tied, nn.Conv2d(8, 7, 1)), 7)


def _torchvision(name: str, **options) -> Builder:
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=10, **options)


def _convnext() -> nn.Module:
    blocks = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([blocks(16, 32, 1), blocks(32, None, 1)], num_classes=10)


def _resnet(block: str, **options) -> Builder:
    resnet = torchvision.models.resnet
    return lambda: resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], num_classes=10, **options)


# Smallest member of each family; the two ResNets are torchvision's with fewer blocks.
FAMILIES: dict[str, Builder] = {
    "resnet18": _torchvision("resnet18"),
    "resnet-bottleneck-wide": _resnet("Bottleneck", width_per_group=96),
    "resnext": _resnet("Bottleneck", groups=8, width_per_group=4),
    "densenet121": _torchvision("densenet121"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "googlenet": _torchvision("googlenet", init_weights=False),
    "squeezenet1_1": _torchvision("squeezenet1_1"),
    "shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "mnasnet0_5": _torchvision("mnasnet0_5"),
    "convnext": _convnext,
}


def uneven_keep(graph, seed: int = 0) -> dict[str, Tensor]:
    """Keep about half of each group, at least one and not all, at indices without a pattern."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, group in graph.groups.items():
        stays = torch.randperm(group.size, generator=generator)[: max(1, group.size // 2)]
        keep[name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, stays, True)
    return keep


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Make every constant matter: random affine parameters, biases and running statistics."""
    for p in model.parameters():
        if p.dim() < 2 or not p.any() or p.abs().max() < 1e-3:
            p.copy_(torch.rand_like(p) + 0.2)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.3 * torch.randn_like(b))
        elif name.endswith("running_var"):
            b.copy_(torch.rand_like(b) + 0.5)
    return model
