"""VGG for small images, Simonyan and Zisserman, arXiv:1409.1556, in the variants the pruning papers train."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastprune.models.layers import init_he, init_rni, initialise, norm
from fastprune.models.registry import register

_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_VGG19 = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4)
_SMALL = (32, 32, "M", 64, 64, "M", 128, 128)


class VGG(nn.Module):
    """Convolutions (3x3), norm, ReLU; "M" is a 2x2 max-pool; then ``pool`` and one linear layer.

    Input (N, in_channels, H, W), output (N, num_classes).  ``bias`` is the convolutions'.
    """

    def __init__(
        self,
        plan: tuple[int | str, ...],
        pool: nn.Module,
        num_classes: int,
        in_channels: int,
        bound: str | None,
        bias: bool = True,
        init: Callable[[nn.Module], None] = init_rni,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for item in plan:
            if item == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, item, 3, padding=1, bias=bias), norm(item, bound), nn.ReLU(inplace=True)]
                width = item
        self.features = nn.Sequential(*layers)
        self.pool = pool
        self.classifier = nn.Linear(width, num_classes)
        initialise(self, init)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def _scaled(plan: tuple[int | str, ...], width: float) -> tuple[int | str, ...]:
    return tuple(item if item == "M" else max(1, round(item * width)) for item in plan)


@register
def vgg16_rni(num_classes: int = 10, in_channels: int = 3, bound: str | None = None, width: float = 1.0) -> VGG:
    """RNI's VGG-16 (arXiv:2204.06404): torchvision's vgg16_bn features, convolution bias included, the last max-pool
    left out, 2x2 average pool, one linear layer, no dropout.  32x32 images.  ``width`` scales all layers."""
    return VGG(_scaled(_VGG16, width), nn.AvgPool2d(2), num_classes, in_channels, bound)


@register
def vgg19(num_classes: int = 10, in_channels: int = 3, bound: str | None = None, width: float = 1.0) -> VGG:
    """VGG-19 as GReg (arXiv:2012.09243) and TPP train it on CIFAR: convolutions without bias, the last max-pool left
    out, global average pool, one linear layer, Kaiming-normal (fan in).  ``width`` scales all layers.  Torchvision's
    VGG-19, with its three linear layers, is ``vgg19_bn``."""
    return VGG(_scaled(_VGG19, width), nn.AdaptiveAvgPool2d(1), num_classes, in_channels, bound, False, init_he)


@register
def vgg_small(num_classes: int = 10, in_channels: int = 1, bound: str | None = None) -> VGG:
    """Six convolutions in the same style for 8x8 to 32x32 images: the quickstart's network, 288 thousand weights."""
    return VGG(_SMALL, nn.AdaptiveAvgPool2d(1), num_classes, in_channels, bound)
