"""RNI's optimizer and schedule (arXiv:2204.06404, their code)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import MultiStepLR


def param_groups(model: nn.Module, lr: float, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
    """Up to three groups: weights; norms; bounded norms, which learn ten times as fast and do not decay.

    A decay would pull a bounded scale towards sigmoid(0) = 0.5 instead of towards 0, and the sigmoid's slope of at most
    1/4 asks for the larger step.
    """
    bounded, norms = [], []
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            (bounded if getattr(m, "bound", None) else norms).extend(m.parameters(recurse=False))
    taken = {id(p) for p in (*bounded, *norms)}
    groups = [
        {"name": "weights", "params": [p for p in model.parameters() if id(p) not in taken]},
        {"name": "norms", "params": norms},
        {"name": "bounded norms", "params": bounded, "lr": 10 * lr, "weight_decay": 0.0},
    ]
    return [{"lr": lr, "weight_decay": weight_decay, **group} for group in groups if group["params"]]


def sgd(model: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 1e-4) -> torch.optim.SGD:
    """SGD with Nesterov momentum on :func:`param_groups`."""
    return torch.optim.SGD(param_groups(model, lr, weight_decay), lr, momentum, nesterov=True, foreach=True)


def multistep(optimizer: torch.optim.Optimizer, epochs: int, gamma: float = 0.1) -> MultiStepLR:
    """Learning rate times ``gamma`` after half and after three quarters of the epochs."""
    return MultiStepLR(optimizer, [-(-epochs // 2), -(-3 * epochs // 4)], gamma)
