"""DenseNet-BC for 32x32 images, Huang et al., arXiv:1608.06993, as Crowley et al., arXiv:1810.04622, prune it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprune.models.layers import init_fan_out, initialise, norm
from fastprune.models.registry import register


class DenseLayer(nn.Module):
    """Norm-ReLU-1x1-norm-ReLU-3x3; its ``growth`` channels are appended to the input's."""

    def __init__(self, cin: int, mid: int, growth: int, bound: str | None) -> None:
        super().__init__()
        self.bn1 = norm(cin, bound)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(cin, mid, 1, bias=False)
        self.bn2 = norm(mid, bound)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(mid, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))
        return torch.cat((x, out), 1)


class Transition(nn.Sequential):
    """Norm-ReLU-1x1, then 2x2 average pool."""

    def __init__(self, cin: int, cout: int, bound: str | None) -> None:
        super().__init__()
        self.bn = norm(cin, bound)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(cin, cout, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNetCIFAR(nn.Module):
    """Stem of ``2 growth`` channels, three dense blocks of ``(depth - 4) / 6`` layers, transitions that keep
    ``1 - reduction`` of the channels between them, norm, ReLU, global average pool, one linear layer.

    Input (N, in_channels, H, W), output (N, num_classes).  Fractional widths round down, to at least 1 channel.
    """

    def __init__(
        self,
        depth: int,
        growth: int,
        reduction: float,
        bottle_mult: float,
        num_classes: int,
        in_channels: int,
        bound: str | None,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"DenseNetCIFAR: depth must be 6 n + 4 with n >= 1 (10, 16, ..., 100), got {depth}")
        if growth < 1 or not bottle_mult > 0 or not 0 <= reduction < 1:
            raise ValueError(
                "DenseNetCIFAR: expected growth >= 1, bottle_mult > 0 and 0 <= reduction < 1, "
                f"got {growth}, {bottle_mult} and {reduction}"
            )
        mid = max(1, int(growth * bottle_mult))
        width = 2 * growth
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        for stage in (1, 2, 3):
            layers = (depth - 4) // 6
            dense = [DenseLayer(width + i * growth, mid, growth, bound) for i in range(layers)]
            self.add_module(f"dense{stage}", nn.Sequential(*dense))
            width += layers * growth
            if stage < 3:
                kept = max(1, int(width * (1 - reduction)))
                self.add_module(f"trans{stage}", Transition(width, kept, bound))
                width = kept
        self.bn = norm(width, bound)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        initialise(self, init_fan_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.fc(torch.flatten(self.pool(self.relu(self.bn(x))), 1))


@register
def densenet_bc_100(
    num_classes: int = 10,
    in_channels: int = 3,
    bound: str | None = None,
    depth: int = 100,
    growth: int = 12,
    reduction: float = 0.5,
    bottle_mult: float = 4.0,
) -> DenseNetCIFAR:
    """Crowley et al.'s DenseNet-BC-100 with growth 12 and its reduced family.  The 1x1 convolution of a layer has
    ``bottle_mult * growth`` channels."""
    return DenseNetCIFAR(depth, growth, reduction, bottle_mult, num_classes, in_channels, bound)
