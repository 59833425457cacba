"""Fully connected networks, for studies of what pruning does to the gradient's way through the layers."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fastprune.models.layers import initialise
from fastprune.models.registry import register


class MLP(nn.Module):
    """``depth`` linear layers of ``hidden`` features, with nothing or a ReLU between them.

    Input (N, ...) of ``in_features`` numbers per sample, which are flattened; output (N, num_classes).
    """

    def __init__(self, in_features: int, hidden: int, depth: int, num_classes: int, act: str, orthogonal: bool) -> None:
        super().__init__()
        if act not in ("linear", "relu"):
            raise ValueError(f"MLP: act must be 'linear' or 'relu', got {act!r}")
        if min(in_features, hidden, depth) < 1:
            raise ValueError(
                f"MLP: in_features, hidden and depth must be at least 1, got {in_features}, {hidden}, {depth}"
            )
        layers: list[nn.Module] = []
        for rows, columns in pairwise([in_features, *[hidden] * (depth - 1), num_classes]):
            layers += [nn.Linear(rows, columns), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*(m for m in layers[:-1] if act == "relu" or isinstance(m, nn.Linear)))
        if orthogonal:
            initialise(self, init_orthogonal)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


def init_orthogonal(model: nn.Module) -> None:
    """Orthonormal rows, or columns where there are fewer, in each linear layer; biases 0.

    Every singular value of a linear network's Jacobian is then 1, if no layer is wider than the one before, or none
    narrower (Saxe et al., arXiv:1312.6120).
    """
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.orthogonal_(m.weight)
            nn.init.zeros_(m.bias)


@register
def mlp_7_linear(
    num_classes: int = 10,
    in_features: int = 784,
    hidden: int = 100,
    depth: int = 7,
    act: str = "linear",
    orthogonal: bool = False,
) -> MLP:
    """TPP's linear network (arXiv:2207.12534): 784 inputs, six layers of 100 and one of ``num_classes`` features, no
    activation.  ``act="relu"`` puts ReLUs between them; ``orthogonal`` replaces PyTorch's initialisation by
    :func:`init_orthogonal`."""
    return MLP(in_features, hidden, depth, num_classes, act, orthogonal)
