"""A gate on each channel, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.ops.channel_gate import channel_gate


class Gate(nn.Module):
    """Multiplies each channel by ``weight``, ones at first; importance measures are made of its gradients.

    The weight does not train by default: its gradient is a score, and an optimizer would move it by weight decay alone.

    Args:
        num_features: Channels C.
        trainable: Let ``weight`` require a gradient.
        device, dtype: Of ``weight``.

    Attributes:
        weight: Parameter, (C,).  0 removes the channel.
        gate_grad, gate_abs: None, or buffers (N, C) that each backward overwrites with the per-sample sums of
            :func:`fastprune.ops.channel_gate`.  Not part of the state.
        gate_slots: None, or a function of x that each forward which autograd records calls for such buffers.

    Source: Molchanov et al., CVPR 2019, arXiv:1906.10771; Theis et al., 2018, arXiv:1801.05787.
    """

    gate_grad: Tensor | None = None
    gate_abs: Tensor | None = None
    gate_slots: Callable[[Tensor], dict[str, Tensor]] | None = None

    def __init__(
        self, num_features: int, *, trainable: bool = False, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype), requires_grad=trainable)

    @property
    def num_features(self) -> int:
        """Channels: those of ``weight``, which shrinks when channels are removed."""
        return len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``, (N, C, *spatial), in its dtype, whatever that of the weight (autocast)."""
        weight = self.weight if self.weight.dtype in (x.dtype, torch.float32) else self.weight.to(x.dtype)
        if not torch.is_grad_enabled():  # without a backward the buffers need not fit this batch
            return channel_gate(x, weight)
        if self.gate_slots is not None:
            return channel_gate(x, weight, **self.gate_slots(x))
        return channel_gate(x, weight, gate_grad=self.gate_grad, gate_abs=self.gate_abs)

    def extra_repr(self) -> str:
        return f"{self.num_features}" + (", trainable=True" if self.weight.requires_grad else "")
