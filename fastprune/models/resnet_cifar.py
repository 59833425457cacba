"""ResNet for 32x32 images, He et al., arXiv:1512.03385 section 4.2, shortcuts without weights (option A)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastprune.models.layers import init_he, init_rni, initialise, norm
from fastprune.models.registry import register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions.  The shortcut takes every ``stride``-th pixel and pads zero channels on both sides."""

    def __init__(self, cin: int, cout: int, stride: int, bound: str | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False)
        self.bn1 = norm(cout, bound)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.bn2 = norm(cout, bound)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride, self.pad = stride, (cout - cin) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return self.relu2(out + x)


class ResNetCIFAR(nn.Module):
    """Stem, three stages of ``blocks`` blocks with 16, 32 and 64 channels, global average pool, one linear layer.

    Input (N, in_channels, H, W), output (N, num_classes).  ``stem_relu=False`` is RNI's network: their stem ends in the
    norm.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int, bound: str | None, stem_relu: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16, bound)
        self.relu = nn.ReLU(inplace=True) if stem_relu else nn.Identity()
        self.layer1 = self._stage(16, 16, 1, blocks, bound)
        self.layer2 = self._stage(16, 32, 2, blocks, bound)
        self.layer3 = self._stage(32, 64, 2, blocks, bound)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(cin: int, cout: int, stride: int, blocks: int, bound: str | None) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(cin, cout, stride, bound), *(BasicBlock(cout, cout, 1, bound) for _ in range(blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))).flatten(1))


def _rni(blocks: int, num_classes: int, in_channels: int, bound: str | None) -> ResNetCIFAR:
    model = ResNetCIFAR(blocks, num_classes, in_channels, bound, stem_relu=False)
    initialise(model, init_rni)
    return model


def _he(blocks: int, num_classes: int, in_channels: int, bound: str | None) -> ResNetCIFAR:
    model = ResNetCIFAR(blocks, num_classes, in_channels, bound, stem_relu=True)
    initialise(model, init_he)
    return model


@register
def resnet56_rni(num_classes: int = 10, in_channels: int = 3, bound: str | None = None) -> ResNetCIFAR:
    """RNI's ResNet-56 (arXiv:2204.06404): no ReLU after the stem's norm, their initialisation."""
    return _rni(9, num_classes, in_channels, bound)


@register
def resnet20(num_classes: int = 10, in_channels: int = 3, bound: str | None = None) -> ResNetCIFAR:
    """He et al.'s ResNet-20, Kaiming-normal initialisation: the small brother, for trials and tests."""
    return _he(3, num_classes, in_channels, bound)


@register
def resnet56(num_classes: int = 10, in_channels: int = 3, bound: str | None = None) -> ResNetCIFAR:
    """He et al.'s ResNet-56 as GReg (arXiv:2012.09243) trains it: ReLU after the stem, Kaiming-normal (fan in)."""
    return _he(9, num_classes, in_channels, bound)


@register
def resnet110(num_classes: int = 10, in_channels: int = 3, bound: str | None = None) -> ResNetCIFAR:
    """He et al.'s ResNet-110, Kaiming-normal initialisation."""
    return _he(18, num_classes, in_channels, bound)
