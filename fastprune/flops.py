"""Multiply-accumulates and parameters of a network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.graph import call, undisturbed


def flops(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Count the multiply-accumulates of all convolutions and linear layers, per sample, and all parameters.

    A layer costs ``weight.numel() * Hout * Wout``; biases, norms, activations, pooling and products without a weight
    (attention) are not counted.  Published "FLOPs" are sometimes twice this number.  A transposed convolution uses its
    weight once per *input* position, a linear layer once per position of everything between batch and features.

    Args:
        model: Run once in eval mode and left as it was.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments, batch first.

    Returns: ``{"macs": int, "params": int, "layers": [...]}``.  ``params`` counts every parameter, shared ones once.
        ``layers`` has one row per run of a convolution or linear layer, in the order they ran: ``name``, ``kind``
        (class name), ``out_channels``, ``in_channels``, ``groups``, ``macs``, ``params`` (weight and bias; 0 where the
        layer ran before) and ``output_shape`` (tuple, with batch).
    """
    layers: list[dict[str, Any]] = []
    counted: set[int] = set()

    def record(name: str, m: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(m, nn.Linear):
            channels, groups, uses = (m.out_features, m.in_features), 1, math.prod(out.shape[1:-1])
        else:
            spatial = len(m.kernel_size)
            channels, groups = (m.out_channels, m.in_channels), m.groups
            uses = math.prod((inputs[0] if m.transposed else out).shape[-spatial:])
        params = sum(p.numel() for p in m.parameters(recurse=False) if id(p) not in counted)
        counted.update(id(p) for p in m.parameters(recurse=False))
        layers.append({
            "name": name, "kind": type(m).__name__, "out_channels": channels[0], "in_channels": channels[1],
            "groups": groups, "macs": m.weight.numel() * uses, "params": params, "output_shape": tuple(out.shape),
        })  # fmt: skip

    hooks = [
        m.register_forward_hook(lambda m, inputs, out, name=name: record(name, m, inputs, out))
        for name, m in model.named_modules()
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))
    ]
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            call(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "macs": sum(layer["macs"] for layer in layers),
        "params": sum(p.numel() for p in model.parameters()),
        "layers": layers,
    }
