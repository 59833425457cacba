"""Pruning by the scales of batch norms: RNI (arXiv:2204.06404) and the two baselines of its authors.

| name     | penalty on the scales of all norms     | score of a channel | scope  | norms              |
|----------|----------------------------------------|--------------------|--------|--------------------|
| rni      | reg_weight * sum s (1 - ln s),         | sigmoid(w)         | global | SigmoidBatchNorm2d |
|          | s = sigmoid(w + b)                     |                    |        |                    |
| slimming | reg_weight * sum of abs(w)             | abs(w)             | global | BatchNorm2d        |
| ucs      | none                                   | abs(w)             | local  | BatchNorm2d        |

``slimming`` is Liu et al., ICCV 2017, arXiv:1708.06519; RNI's authors call it l1.  Penalised are all norms, scored only
those of groups that one convolution writes: in a residual network the first norm of each block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune import backends
from fastprune.graph import ChannelGraph, Group
from fastprune.methods.base import Method, Options, register
from fastprune.methods.penalty import penalty_of
from fastprune.ops.scale_penalty import value_and_grad


@dataclass(frozen=True)
class RNIOptions(Options):
    reg_weight: float = 1e-4  # of the penalty in the loss
    b: float = 3.0  # shift inside the penalty; the larger, the fewer channels it pushes


@dataclass(frozen=True)
class SlimmingOptions(Options):
    reg_weight: float = 1e-4  # of the penalty in the loss


class _ScaleMethod(Method):
    kind = "l1"
    shift = 0.0
    bound: str | None = None

    def _fits(self, m: nn.Module) -> bool:
        return isinstance(m, _BatchNorm) and m.weight is not None and getattr(m, "bound", None) == self.bound

    def _norms(self, group: Group) -> dict[str, nn.Module]:
        """The norms that scale this group's channels, by the names of their weights."""
        named = {f"{name}.weight": self.model.get_submodule(name) for name in group.norms}
        return {name: m for name, m in named.items() if (name, 0) in group.index and self._fits(m)}

    def prunable(self, group: Group) -> bool:
        return bool(self._norms(group))

    def hint(self, graph: ChannelGraph) -> str:
        if not any(self._fits(m) for m in self.model.modules()):
            if self.bound:
                return "it has no sigmoid norm; call fastprune.nn.convert_batchnorm(model, bound='sigmoid') first"
            return "it has no ordinary batch norm with a weight"
        return super().hint(graph)

    def prepare(self) -> None:
        norms = [m for m in self.model.modules() if self._fits(m)]
        # A frozen scale cannot be pushed; a shared one counts once.
        self._scales = list(dict.fromkeys(m.weight for m in norms if m.weight.requires_grad))

    def penalty(self) -> Tensor:
        """``reg_weight`` times the penalty over the scales of all norms.

        Its backward adds to every scale's ``.grad`` at the end of the backward pass, in one call whatever the depth.
        So ``torch.autograd.grad`` does not see it; :func:`fastprune.ops.scale_penalty` is the same in plain autograd.
        """
        if not self._scales:
            return super().penalty()
        scales = self._scales
        with torch.no_grad():
            value, grad = value_and_grad(scales, self.kind, self.shift, backends.select("scale_penalty", None, *scales))
            grads = grad.split([w.numel() for w in scales])
        return penalty_of(value, scales, grads, self.options.reg_weight)

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Of each channel; the mean over the norms, where several scale it."""
        return {
            key: torch.stack(
                [group.per_channel(name, 0, self.score(m.weight.detach())) for name, m in self._norms(group).items()]
            ).mean(0)
            for key, group in self.groups.items()
        }

    def score(self, weight: Tensor) -> Tensor:
        return weight.abs()


@register("rni")
class RNI(_ScaleMethod):
    """Receding neuron importances: bounded scales, a penalty that pushes only the unimportant ones."""

    Options = RNIOptions
    kind, bound = "rni", "sigmoid"

    @property
    def shift(self) -> float:
        return self.options.b

    def score(self, weight: Tensor) -> Tensor:
        return weight.sigmoid()  # b shifts the penalty only


@register("slimming")
class Slimming(_ScaleMethod):
    """Network slimming: L1 on the scales."""

    Options = SlimmingOptions


@register("ucs")
class UCS(_ScaleMethod):
    """Uniform channel scaling: no penalty, the same share of every layer."""

    scope = "local"

    def penalty(self) -> Tensor:
        return Method.penalty(self)
