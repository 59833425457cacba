"""The table of networks: ours first, then torchvision's, then timm's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
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

    The network remembers its name and arguments, if these are numbers, words and lists of them, so that a checkpoint
    says how to build it; see :func:`recorded`.

    Args:
        name: One of :func:`list_models`, e.g. ``"vgg16-rni"``, ``"resnet56"``; else a torchvision classification
            model; else a timm model.
        num_classes: Outputs of the classifier.  torchvision refuses pretrained ``weights`` of another number.
        kw: Passed on: ``in_channels`` and ``bound`` for ours, ``weights`` for torchvision's, ...

    Raises:
        ValueError: No such network.
    """
    model = _create(name, num_classes=num_classes, **kw)
    arguments = {key: value for key, value in kw.items() if not _is_about_weights(key)}
    if len(arguments) < len(kw):  # what torchvision sets along with weights
        arguments |= {key: getattr(model, key) for key in ("transform_input", "aux_logits") if hasattr(model, key)}
    if hasattr(model, "transform_input"):
        arguments["init_weights"] = False  # they take long to draw
    recording = {"name": name, "arguments": {"num_classes": num_classes, **arguments}}
    if is_plain(recording["arguments"]):
        model._architecture = recording
    return model


def recorded(model: nn.Module) -> dict[str, Any] | None:
    """``{"name": ..., "arguments": {...}}`` of the :func:`create` that made ``model``; None if it was made otherwise.

    Weights are no part of it, nor what was done to the network since.
    """
    return vars(model).get("_architecture")


def is_plain(arguments: Mapping[str, Any]) -> bool:
    """Whether arguments are numbers, words, None and lists of these, and none makes a network fetch or read weights."""
    return not any(_is_about_weights(key) for key in arguments) and all(map(_is_value, arguments.values()))


def _is_value(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_value, value))
    if isinstance(value, str):
        return re.fullmatch(r"[\w.+-]{0,64}", value, re.ASCII) is not None
    if type(value) is int:
        return abs(value) < 1 << 63
    return value is None or type(value) is bool or (type(value) is float and math.isfinite(value))


def _is_about_weights(argument: str) -> bool:
    return argument in ("weights", "weights_backbone", "progress", "checkpoint_path", "cache_dir") or (
        argument.startswith("pretrained")
    )


def _create(name: str, **kw: Any) -> nn.Module:
    if fn := MODELS.get(name.replace("_", "-")):
        return fn(**kw)
    if name in _torchvision():
        return torchvision.models.get_model(name, **kw)
    if find_spec("timm"):
        import timm

        if timm.is_model(name):
            return timm.create_model(name, **kw)
        missing = ""
    else:
        missing = " (timm's networks need: pip install timm)"
    raise ValueError(f"models.create: unknown model {name!r}{missing}{did_you_mean(name, list_models())}")


def list_models() -> list[str]:
    """Names of our networks and torchvision's classifiers, sorted.  timm keeps its own ``timm.list_models()``."""
    return sorted({*MODELS, *_torchvision()})


def _torchvision() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)  # classifiers only, not segmentation, video, ...
