"""Wide residual networks for 32x32 images, norm before convolution, in reduced depths, widths and bottlenecks.

Zagoruyko and Komodakis, arXiv:1605.07146, as Crowley et al., arXiv:1810.04622, prune and reduce them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprune.models.layers import init_fan_out, initialise, norm
from fastprune.models.registry import register


class PreActBlock(nn.Module):
    """Norm-ReLU-3x3-norm-ReLU-3x3 plus the shortcut: ``x`` itself, or where shapes differ a 1x1 convolution of
    relu(bn1(x)).  ``mid`` channels lie between the convolutions."""

    def __init__(self, cin: int, mid: int, cout: int, stride: int, bound: str | None) -> None:
        super().__init__()
        self.bn1 = norm(cin, bound)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(cin, mid, 3, stride, padding=1, bias=False)
        self.bn2 = norm(mid, bound)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(mid, cout, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(cin, cout, 1, stride, bias=False) if cin != cout or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(a))))
        return out + (x if self.shortcut is None else self.shortcut(a))


class WideResNet(nn.Module):
    """Stem of 16 channels, three stages of ``(depth - 4) / 6`` blocks with 16, 32 and 64 times ``width`` channels,
    norm, ReLU, global average pool, one linear layer.

    Input (N, in_channels, H, W), output (N, num_classes).  Fractional widths round down, to at least 1 channel.
    """

    def __init__(
        self, depth: int, width: float, bottle_mult: float, num_classes: int, in_channels: int, bound: str | None
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet: depth must be 6 n + 4 with n >= 1 (10, 16, 22, ..., 40), got {depth}")
        if not (width > 0 and bottle_mult > 0):
            raise ValueError(f"WideResNet: width and bottle_mult must be above 0, got {width} and {bottle_mult}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        cin = 16
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            cout = max(1, int(8 * 2**stage * width))
            mid = max(1, int(cout * bottle_mult))
            blocks = [PreActBlock(cin, mid, cout, stride, bound)]
            blocks += [PreActBlock(cout, mid, cout, 1, bound) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            cin = cout
        self.bn = norm(cin, bound)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(cin, num_classes)
        initialise(self, init_fan_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.pool(self.relu(self.bn(x))), 1))


@register
def wrn_40_2(
    num_classes: int = 10,
    in_channels: int = 3,
    bound: str | None = None,
    depth: int = 40,
    width: float = 2.0,
    bottle_mult: float = 1.0,
) -> WideResNet:
    """Crowley et al.'s WRN-40-2 and its reduced family: ``depth``, ``width`` and the width of the middle of each block
    as a factor of the block's width, ``bottle_mult``, may be lowered."""
    return WideResNet(depth, width, bottle_mult, num_classes, in_channels, bound)
