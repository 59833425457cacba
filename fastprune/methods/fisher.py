"""Fisher pruning with mask blocks, and the two baselines of its authors (arXiv:1810.04622, arXiv:1801.05787).

| name             | score of a channel                                                             |
|------------------|--------------------------------------------------------------------------------|
| fisher           | mean over the steps since the last cut of 1/2 mean_n g_n^2, g_n the gradient   |
|                  | that a mask on the channel gets from sample n                                  |
| maskblock-l1     | sum of abs(weight) over the filter; ``signed=True``: of the weight itself, as  |
|                  | the authors' code has it, which replays their published curves                 |
| maskblock-random | uniform noise                                                                  |

Masked are the channels between the two convolutions of a block: groups that one convolution writes, a norm follows and
one convolution reads.  The authors cut one channel every 100 steps over the whole network: ``per_cut=1``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastprune.gates import GateSums
from fastprune.graph import ChannelGraph, Group
from fastprune.methods.base import register
from fastprune.methods.taylor import RandomOptions, TaylorGatePerSample, TaylorOptions, TaylorRandom, TaylorWeightAbs
from fastprune.ops import filter_norm


@dataclass(frozen=True)
class FisherOptions(TaylorOptions):
    coupled: bool = False
    frequency: int = 100
    momentum: float = 0.0


class _MaskBlock:
    """Which groups are masked, and how often the authors cut."""

    first_extra = 0

    def prunable(self, group: Group) -> bool:
        masked = len(group.convs) == len(group.consumers) == 1 and group.convs[0] in self.graph.norm_after
        return masked and super().prunable(group)

    def prepare(self) -> None:
        if self.options.variant != "paper":
            raise ValueError(
                f"{self.name}: variant belongs to Taylor's criteria; leave it out, got {self.options.variant!r}"
            )
        super().prepare()

    def hint(self, graph: ChannelGraph) -> str:
        return "it masks channels that one convolution writes, a norm follows and one convolution reads"


@register("fisher")
class Fisher(_MaskBlock, TaylorGatePerSample):
    """Half the mean squared gradient of a mask, an estimate of what the loss gains when the channel goes."""

    Options = FisherOptions

    def reduce(self, sums: GateSums) -> Tensor:
        return sums.squares / (2 * sums.samples)


@dataclass(frozen=True)
class MaskBlockL1Options(FisherOptions):
    signed: bool = False


@register("maskblock-l1")
class MaskBlockL1(_MaskBlock, TaylorWeightAbs):
    """L1 norm of the filter."""

    Options = MaskBlockL1Options

    def measure(self) -> Tensor:
        return self.add_up(filter_norm(self._tensors, "sum" if self.options.signed else "l1"))


@dataclass(frozen=True)
class MaskBlockRandomOptions(FisherOptions, RandomOptions):
    pass


@register("maskblock-random")
class MaskBlockRandom(_MaskBlock, TaylorRandom):
    """Uniform noise."""

    Options = MaskBlockRandomOptions
