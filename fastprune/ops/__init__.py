"""Every op as a function; the backend that runs it is chosen in :mod:`fastprune.backends`."""

from fastprune.ops.batch_norm_act import batch_norm_act
from fastprune.ops.channel_gate import channel_gate
from fastprune.ops.filter_norm import filter_norm
from fastprune.ops.gate_sums import gate_sums
from fastprune.ops.gram_penalty import GramPlan, gram_penalty, gram_plan, orthogonality_penalty
from fastprune.ops.growing_sgd import grow_grads, growing_sgd, hold
from fastprune.ops.masked_conv2d import live_channels, masked_conv2d
from fastprune.ops.scale_penalty import scale_penalty
from fastprune.ops.weight_taylor import weight_taylor

__all__ = [
    "GramPlan",
    "batch_norm_act",
    "channel_gate",
    "filter_norm",
    "gate_sums",
    "gram_penalty",
    "gram_plan",
    "grow_grads",
    "growing_sgd",
    "hold",
    "live_channels",
    "masked_conv2d",
    "orthogonality_penalty",
    "scale_penalty",
    "weight_taylor",
]
