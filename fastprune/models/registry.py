"""The table of networks: ours first, then torchvision's, then timm's."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torchvision.models
from torch import nn

from fastprune.errors import did_you_mean

MODELS: dict[str, Callable[..., nn.Module]] = {}


def register(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make ``fn(num_classes=10, **kw) -> nn.Module`` known by its own name, underscores written as hyphens."""
    name = fn.__name__.replace("_", "-")
    if name in MODELS:
        raise ValueError(f"models.register: {name!r} is already taken by {MODELS[name].__module__}")
    MODELS[name] = fn
    return fn


def create(name: str, num_classes: int = 10, **kw: Any) -> nn.Module:
    """Build a network, freshly initialised from the global random state.

    Args:
        name: One of :func:`list_models`, e.g. ``"vgg16-rni"``, ``"resnet56"``; else a torchvision classification
            model; else a timm model.
        num_classes: Outputs of the classifier.  torchvision refuses pretrained ``weights`` of another number.
        kw: Passed on: ``in_channels`` and ``bound`` for ours, ``weights`` for torchvision's, ...

    Raises:
        ValueError: No such network.
    """
    if fn := MODELS.get(name.replace("_", "-")):
        return fn(num_classes=num_classes, **kw)
    if name in _torchvision():
        return torchvision.models.get_model(name, num_classes=num_classes, **kw)
    if find_spec("timm"):
        import timm

        if timm.is_model(name):
            return timm.create_model(name, num_classes=num_classes, **kw)
        missing = ""
    else:
        missing = " (timm's networks need: pip install timm)"
    raise ValueError(f"models.create: unknown model {name!r}{missing}{did_you_mean(name, list_models())}")


def list_models() -> list[str]:
    """Names of our networks and torchvision's classifiers, sorted.  timm keeps its own ``timm.list_models()``."""
    return sorted({*MODELS, *_torchvision()})


def _torchvision() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)  # classifiers only, not segmentation, video, ...
