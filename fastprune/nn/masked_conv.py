"""Convolution with masks on its channels and weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.ops.masked_conv2d import Live, live_channels, masked_conv2d

_CHANNELS = ("in_mask", "out_mask")
_MASKS = (*_CHANNELS, "weight_mask")


class MaskedConv2d(nn.Conv2d):
    """``nn.Conv2d`` that neither reads nor computes its dead channels; see :func:`fastprune.ops.masked_conv2d`.

    Parameters and their ``state_dict`` keys are those of ``nn.Conv2d``.  Masks are assigned, ``conv.out_mask = keep``,
    and looked up on the host then and there: no step synchronises, and ``torch.compile`` takes them as fixed.  They are
    buffers, in the ``state_dict`` once set; loading a state that has masks sets them.

    Args:
        in_channels, ...: As ``nn.Conv2d``, every ``padding_mode`` included.

    Attributes:
        in_mask, out_mask: (in_channels,), (out_channels,), bool, True = live; None: all are, and what a mask without
            a dead channel turns into.
        weight_mask: Shape of ``weight``, bool, True = live; None: all are.
    """

    in_mask: Tensor | None
    out_mask: Tensor | None
    weight_mask: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in _MASKS:
            self.register_buffer(name, None)
        self._look_up()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> MaskedConv2d:
        """A masked convolution on the parameters (the same objects) of ``conv``."""
        new = cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation),
            *(conv.groups, conv.bias is not None, conv.padding_mode),
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._stamp() != self._seen:  # edited in place, or copied
            self._look_up()
        weight, bias, padding = self.weight, self.bias, self.padding
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = (None if t is None else _lowered(t, dtype) for t in (x, weight, bias))
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), 0
        return masked_conv2d(
            *(x, weight, bias),
            in_mask=self._live[0],
            out_mask=self._live[1],
            weight_mask=self.weight_mask,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        masks = [(name, getattr(self, name)) for name in _MASKS]
        return super().extra_repr() + "".join(f", {n}={int(m.sum())}/{m.numel()}" for n, m in masks if m is not None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MASKS:
            shapes = (self.in_channels,), (self.out_channels,), tuple(self.weight.shape)
            shape = shapes[_MASKS.index(name)]
            if value is not None and (value.shape != shape or value.dtype != torch.bool):
                got = f"{tuple(value.shape)} {value.dtype}"
                raise ValueError(f"MaskedConv2d: expected {name} {shape} bool, True = live, or None; got {got}")
            value = value if value is None else value.to(self.weight.device)
        super().__setattr__(name, value)
        if name in _MASKS:
            self._look_up()

    def _look_up(self) -> None:
        """Find the live channels.  Called whenever masks or their device may have changed."""
        self._live: tuple[Live | None, ...] = tuple(self._live_of(name) for name in _CHANNELS)
        self._seen = self._stamp()

    def _live_of(self, name: str) -> Live | None:
        mask = getattr(self, name)
        if mask is None or mask.is_meta:
            return None
        live = live_channels(mask)
        if len(live.channels) < len(mask):
            return live
        self._buffers[name] = None
        return None

    def _stamp(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(None if m is None else (id(m), m._version) for m in (self.in_mask, self.out_mask))

    def _apply(self, fn: Any, recurse: bool = True) -> MaskedConv2d:
        super()._apply(fn, recurse)
        self._look_up()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _MASKS:
            mask = state_dict.get(prefix + name)
            if mask is not None and getattr(self, name) is None:
                self.register_buffer(name, torch.ones_like(mask, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._look_up()


def _lowered(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to the operands of a convolution."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
