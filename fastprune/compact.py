"""Make a network physically smaller, and prove that the small one computes what the masked one did."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastprune.errors import GraphError
from fastprune.graph import ChannelGraph, Keep, trace
from fastprune.surgery import Copies, Optimizers, check_plain, compare, shrink


def compact(
    model: nn.Module,
    keep: Keep,
    example_inputs: Any,
    *,
    optimizer: Optimizers = None,
    ema: Copies = None,
    check: bool = True,
    graph: ChannelGraph | None = None,
) -> nn.Module:
    """Remove, in place, the channels that ``keep`` marks False.

    Parameters stay the same objects (their data is swapped), so hooks, tied weights, optimizer parameter groups,
    ``requires_grad`` and memory formats survive.  Gradients, buffers, running statistics, the size attributes of
    PyTorch's layers (``out_channels``, ``groups``, ``num_features``, ...), every tensor of the parameter's shape in the
    optimizer's state and averaged copies of the model follow.  So learning rate schedulers, a ``GradScaler`` and
    gradients being accumulated go on.  Everything is prepared first and swapped last: if anything raises, model,
    optimizers and copies are untouched.

    Args:
        model: Any module that :func:`fastprune.graph.trace` can watch.
        keep: Group name to a bool vector, (C,), True = keep.  Groups left out stay whole.
        example_inputs: As for ``trace``: a tensor, a tuple of positional or a dict of keyword arguments.
        optimizer: One or several, whose state is cut along with the parameters, so that the next step is the masked
            model's: every optimizer of ``torch.optim`` but LBFGS and Adafactor, :class:`fastprune.optim.GrowingSGD`,
            and others that keep tensors of the parameter's shape.  (Muon keeps its momentum, but its step depends on
            the whole matrix.)
        ema: One or several modules that hold a copy of the model, cut in the same way, buffers included:
            ``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEmaV3`` or your own.
        check: Prove the result first, on float64 copies (see :func:`prove`); memory for two float64 models.
        graph: The graph of this very model, if known, for example traced with ``strict=True``; traced here otherwise.

    Returns: ``model`` itself.

    Raises:
        ValueError: A keep-mask is malformed, an optimizer's state has a form that cannot be cut, ``ema`` holds no copy
            of the model, or the model is compiled or distributed: wrap what comes out.
        GraphError: The shrunk model does not compute what the masked one does; the message names the first layer.
    """
    check_plain(model, "compact")
    if graph is None:
        graph = trace(model, example_inputs)
    graph.tensors(model)
    plan = graph.kept(keep)
    if check:
        prove(model, graph, keep, example_inputs)
    shrink(model, plan, optimizer, ema)
    return model


def prove(model: nn.Module, graph: ChannelGraph, keep: Keep, example_inputs: Any) -> float:
    """Check that removing channels gives what masking them gives; the model itself is not touched.

    Runs ``graph.mask_`` on one float64 copy and the removal on another, in eval mode, and compares every layer and the
    outputs.  Affine parameters, biases, running statistics and all-zero weights of the copies are randomised first: at
    initialisation many are 0 or 1, or tiny like layer scales, and would hide a mistake.  If the model can be trained on
    ``example_inputs``, the shrunk copy must run in training mode, too.

    Returns: Largest difference of any layer or output, divided by its largest value.

    Raises:
        GraphError: The copies differ by more than rounding, or cannot be made or run.
    """
    plan = graph.kept(keep)
    try:
        trains = graph.train_error is None
        found = compare(model, plan, lambda copy: graph.mask_(copy, keep), example_inputs, training=trains)
    except GraphError as e:
        raise GraphError(f"compact: {e}; check=False skips the proof") from e
    if found.what:
        raise GraphError(
            f"compact: without the channels, {found.what}; nothing was changed.  "
            "If its code relies on fixed channel counts, pass graph=trace(..., strict=True) or leave the group whole"
        )
    return found.gap
