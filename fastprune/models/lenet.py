"""LeNet for small images, LeCun et al., 1998, with the gates of Taylor pruning."""

from __future__ import annotations

from torch import Tensor, nn

from fastprune.models.registry import register
from fastprune.nn import Gate


class GatedLeNet(nn.Module):
    """Two times 5x5 convolution, gate, ReLU, 2x2 max-pool; linear layer, gate, ReLU; linear layer.

    Without norms there is nothing whose backward would yield gate gradients, so the gates are modules: before the ReLU,
    as the method places them.  They stay at 1 until a channel is cut.  Input (N, in_channels, image_size, image_size),
    output (N, num_classes).
    """

    def __init__(self, widths: tuple[int, int, int], num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2  # no padding
        if side < 1:
            raise ValueError(f"GatedLeNet: image_size must be at least 16, got {image_size}")
        first, second, hidden = widths
        self.conv1, self.gate1 = nn.Conv2d(in_channels, first, 5), Gate(first)
        self.conv2, self.gate2 = nn.Conv2d(first, second, 5), Gate(second)
        self.fc1, self.gate3 = nn.Linear(second * side * side, hidden), Gate(hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.relu1, self.relu2, self.relu3 = (nn.ReLU(inplace=True) for _ in range(3))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.gate1(self.conv1(x))))
        x = self.pool(self.relu2(self.gate2(self.conv2(x)))).flatten(1)
        return self.fc2(self.relu3(self.gate3(self.fc1(x))))


@register
def lenet_taylor(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 32, widths: tuple[int, int, int] = (16, 32, 120)
) -> GatedLeNet:
    """LeNet with gates (Molchanov et al., arXiv:1906.10771): ``in_channels=3, image_size=32`` for CIFAR,
    ``in_channels=1, image_size=28`` for MNIST.  PyTorch's initialisation."""
    return GatedLeNet(widths, num_classes, in_channels, image_size)
