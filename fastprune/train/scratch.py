"""A pruned shape with fresh weights: how good is what pruning found, without what training had put there?"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


def from_scratch(model: nn.Module, seed: int = 0, init: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Copy ``model`` with fresh weights and statistics; nothing is rewound, only the shape stays.

    Every module's ``reset_parameters`` runs, then ``init``: by default the one that the network was made with, for
    networks of :mod:`fastprune.models`, else none.  Modules with parameters but without ``reset_parameters`` need an
    ``init``.

    Args:
        model: Of any shape, usually the result of :func:`fastprune.compact`; left as it is.
        seed: Of the weights; sets PyTorch's global seed.
        init: Called with the copy; writes the weights in place.

    Returns: The copy, in training mode.

    Raises:
        ValueError: A module's parameters have no initialisation.

    Source: "scratch" in Crowley et al., 2018, arXiv:1810.04622.
    """
    torch.manual_seed(seed)
    fresh = copy.deepcopy(model).train()
    init = init or getattr(model, "init_weights", None)
    for name, m in fresh.named_modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
        elif m._parameters and init is None and type(m).__name__ != "Gate":
            raise ValueError(
                f"from_scratch: {name or 'the model'} ({type(m).__name__}) has parameters but no reset_parameters; "
                "give init=, a function that initialises the model"
            )
    if init is not None:
        init(fresh)
    return fresh
