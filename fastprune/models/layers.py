"""What the CIFAR networks share: the choice of norm and the initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from fastprune import nn as fpnn


def norm(channels: int, bound: str | None) -> nn.BatchNorm2d:
    """``bound="sigmoid"``: scale sigmoid(w), no shift (RNI, arXiv:2204.06404); None: ordinary batch norm."""
    if bound not in (None, "sigmoid"):
        raise ValueError(f"models: bound must be 'sigmoid' or None, got {bound!r}")
    return fpnn.SigmoidBatchNorm2d(channels) if bound else nn.BatchNorm2d(channels)


def initialise(model: nn.Module, init: Callable[[nn.Module], None]) -> None:
    """Initialise ``model``, which remembers how, for :func:`fastprune.train.from_scratch`."""
    model.init_weights = init
    init(model)


def init_he(model: nn.Module) -> None:
    """Kaiming-normal (fan in) convolutions and linear layers; all else as PyTorch."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(m.weight)


def init_rni(model: nn.Module) -> None:
    """RNI's initialisation.

    Convolution N(0, sqrt(2 / (k k Cout))), linear N(0, 0.01), their biases 0; batch norm scale 0.5, shift 0;
    sigmoid norm w ~ N(0, 1), drawn after all others.
    """
    bounded = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0.0, 0.01)
            nn.init.zeros_(m.bias)
        elif getattr(m, "bound", None) == "sigmoid":
            bounded.append(m)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.constant_(m.weight, 0.5)
            nn.init.zeros_(m.bias)
    for m in bounded:
        nn.init.normal_(m.weight)


def init_fan_out(model: nn.Module) -> None:
    """Wide ResNet's and DenseNet's initialisation as Crowley et al., arXiv:1810.04622, train them.

    Convolution N(0, sqrt(2 / (k k Cout))); linear as PyTorch, its bias 0; norms as they come (scale 1, shift 0).
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
        elif isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
