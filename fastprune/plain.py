"""Networks without us: everything of ours becomes ``torch.nn``, and batch norms go into the layers before them.

Both work in place and keep modules, names, parameter objects and users' hooks; both prepare everything first, so that a
model is either changed as promised or not at all.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune import backends
from fastprune.errors import GraphError
from fastprune.nn import BatchNormAct2d, Gate, MaskedConv2d, SigmoidBatchNorm2d, SyncBatchNormAct2d, unfuse
from fastprune.nn.fuse import _Fused, trace_forwards
from fastprune.surgery import (
    TOLERANCE,
    call,
    check_plain,
    distance,
    first_shapes,
    keep_lists,
    leaves,
    map_tensors,
    record_keep,
)

_OURS = (BatchNormAct2d, MaskedConv2d, Gate)
_EXACT = (*_OURS, SigmoidBatchNorm2d, SyncBatchNormAct2d)
_ATTRIBUTES = ("act", "bound", "gate_grad", "gate_abs", "process_group", "_live", "_seen")  # what ours add to torch's
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def to_plain(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Make ``model`` a network of ``torch.nn`` modules (and its own) that does not need fastprune, in place.

    =============================================== ================================================================
    ours                                            becomes
    =============================================== ================================================================
    forwards rewritten by ``convert_batchnorm``     the original ones: adds and ReLUs run on their own again
    ``BatchNormAct2d``, ``SigmoidBatchNorm2d``,     ``nn.BatchNorm2d`` with sigmoid(weight) as weight and zeros for a
    ``SyncBatchNormAct2d``                          missing shift; statistics are those of one process
    one made with ``act="relu"``                    ``nn.Sequential`` of ``norm`` and ``act``: ``bn.weight`` is now
                                                    ``bn.norm.weight``
    one that is called with ``residual=``           the same as a ``torch.fx.GraphModule``, which adds in between
    ``MaskedConv2d``                                ``nn.Conv2d`` with zeros where the masks were False, which training
                                                    will move
    ``Gate``                                        ``nn.Identity``; factors other than 1 go into the layer before
    gate statistics of a method, our hooks          nothing; a pruning method still at work ends
    =============================================== ================================================================

    The function stays the same in eval and training mode, running statistics included, up to rounding.  Modules,
    parameters and buffers stay the same objects, with the exceptions in the table, and ``state_dict`` keys too, plus
    the new ``bias`` of norms without a shift.  An optimizer stays valid for all parameters whose values stay: not for
    the weights of bounded norms, which are other numbers now, and it does not have the new shifts.  Make a new one.

    The record of what was cut (:func:`fastprune.surgery.keep_lists`) stays on the modules; it is plain data.

    A network of :mod:`fastprune.models` keeps its class, whose code is plain PyTorch but lives here: its ``state_dict``
    and exported files need no fastprune, a pickle does.

    Args:
        model: Any module in either mode; may itself be one of ours.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments: the result is then proven, on
            float64 copies in eval mode.  Needed where gates hold other factors than 1.

    Returns: ``model``, the same object, unless it is itself a module that has to be replaced.

    Raises:
        ValueError: The model is compiled or distributed, or gates need ``example_inputs``.
        GraphError: Something cannot be made plain (it is named), or the proof fails.  Nothing was changed.
    """
    check_plain(model, "to_plain")
    return _make_plain(model, _plan(model, example_inputs))


def fold(model: nn.Module, example_inputs: Any) -> nn.Module:
    r"""Fold batch norms into the convolutions and linear layers before them, for inference, in place.

    .. math:: w' = w \frac{\gamma}{\sqrt{v + \epsilon}}, \quad
        b' = (b - \mu) \frac{\gamma}{\sqrt{v + \epsilon}} + \beta

    The norm becomes ``nn.Identity`` (timm's norms with an activation inside: the activation), the layer gets a bias.
    Calls :func:`to_plain` first.  ``Conv1d`` to ``Conv3d``, their transposed kinds and ``Linear``, grouped or not.

    Which layer a norm belongs to is not guessed from names or order.  One eager forward is watched op by op, and a norm
    goes into a layer if it reads exactly what that layer's convolution returns, nothing else reads that, neither runs
    twice or shares a parameter or is looked at by hooks, and the norm uses its running statistics.  Then float64 copies
    with random statistics are compared, norm by norm, before and after.

    Args:
        model: In eval mode.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments; a batch of 2 small images does.

    Returns: ``model``, the same object (unless :func:`to_plain` has to replace it).

    Raises:
        ValueError: The model is in training mode, compiled or distributed.
        GraphError: :func:`to_plain` refuses, or no float64 copy of the model runs.  Nothing was changed.

    Warns:
        UserWarning: Once, naming the norms that stay and why.
    """
    check_plain(model, "fold")
    if model.training:
        raise ValueError(
            "fold: expected a model in eval mode, got one in training mode; folded norms cannot be trained. "
            "Call model.eval() first"
        )
    plan = _plan(model, example_inputs)
    trial = _float64(_make_plain(_copied(model, "fold"), plan), "fold")
    folds = _proven(trial, _find_folds(trial, example_inputs), example_inputs)
    model = _make_plain(model, plan)
    _fold(model, folds.into)
    if folds.left:
        some = [f"{name or 'the model'} ({why})" for name, why in list(folds.left.items())[:8]]
        more = [f"and {len(folds.left) - 8} more"] if len(folds.left) > 8 else []
        stay = "1 norm stays" if len(folds.left) == 1 else f"{len(folds.left)} norms stay"
        warnings.warn(f"fold: {stay}: {', '.join(some + more)}", stacklevel=2)
    return model


# --- what is ours ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What :func:`to_plain` has to find out before it changes anything; modules by name."""

    tails: dict[str, bool]  # norms with an act of their own or a residual; whether they are called with a residual
    gates: dict[str, str | None]  # gate to the layer that takes its factors; None: all are 1


def _plan(model: nn.Module, example_inputs: Any) -> _Plan:
    _refuse(model)
    gates: dict[str, str | None] = {name: None for name, m in model.named_modules() if isinstance(m, Gate)}
    telling = [name for name in gates if (model.get_submodule(name).weight != 1).any()]
    if telling and example_inputs is None:
        raise ValueError(
            f"to_plain: expected example_inputs, because {telling[0]!r} holds other factors than 1, which go into the "
            "layer before it"
        )
    calls = _traced_calls(model)
    if example_inputs is None or not any(isinstance(m, (*_OURS, _Fused)) for m in model.modules()):
        return _Plan(_tails(model, calls), gates)
    reference = _float64(_copied(model, "to_plain"), "to_plain").eval()
    calls += _watched_calls(unfuse(copy.deepcopy(reference)), example_inputs)
    plan = _Plan(_tails(model, calls), gates)
    trial = _make_plain(copy.deepcopy(reference), _Plan(plan.tails, {}))
    plan.gates.update(_find_gates(trial, telling, example_inputs))
    trial = _make_plain(trial, _Plan({}, plan.gates))
    gap = distance(_outputs(trial, example_inputs, "to_plain"), _outputs(reference, example_inputs, "to_plain"))
    if not gap <= TOLERANCE:
        raise GraphError(f"to_plain: the plain model computes something else (relative difference {gap:.1e})")
    return plan


def _refuse(model: nn.Module) -> None:
    """Raise if a module is ours but more than we know how to replace."""
    holders = _holders(model)
    for name, m in model.named_modules():
        module, why = type(m).__module__, None
        if not isinstance(m, _OURS):
            if module.split(".")[0] == "fastprune" and not module.startswith("fastprune.models."):
                why = "has no torch.nn counterpart"
        elif type(m) not in _EXACT or "forward" in vars(m):
            why = "has code of its own (a subclass, a parametrization, or a replaced forward); remove it first"
        elif "weight" not in m._parameters:
            why = "computes its weight (torch.nn.utils.prune or weight_norm); remove that first"
        elif m.weight is not None and any(not _alike(m, other) for other in holders[_storage(m.weight)]):
            why = "shares its weight with a module of another kind; give it its own"
        if why:
            raise GraphError(f"to_plain: {name or 'the model'!r} ({type(m).__name__}) {why}")


def _alike(m: nn.Module, other: nn.Module) -> bool:
    """Whether what is done to the weight of ``m`` is right for ``other``, too."""
    if isinstance(m, Gate):
        return True
    if isinstance(m, MaskedConv2d):
        return other is m or not any(b is not None for b in m._buffers.values())
    return not m.bound or getattr(other, "bound", None) == m.bound


_Call = tuple[str, frozenset[str], bool]  # norm, names of the arguments it was given, whether residual is a tensor


def _traced_calls(model: nn.Module) -> list[_Call]:
    """How norms are called in all forwards that torch.fx can trace."""
    fused = {m: type(m) for m in model.modules()}
    unfuse(model)
    try:
        traces, _ = trace_forwards(model)
    finally:
        for m, cls in fused.items():
            m.__class__ = cls
    names, calls = {m: name for name, m in model.named_modules()}, []
    for trace in traces.values():
        for node, m in trace.calls():
            if isinstance(m, BatchNormAct2d):
                calls.append(_called(names[m], node.args, node.kwargs, fx.Node))
    return calls


def _watched_calls(model: nn.Module, example_inputs: Any) -> list[_Call]:
    """How norms are called in one forward."""
    names, calls, forward = {m: name for name, m in model.named_modules()}, [], BatchNormAct2d.forward

    def watched(self: BatchNormAct2d, *args: Any, **kwargs: Any) -> Tensor:
        if self in names:
            calls.append(_called(names[self], args, kwargs, Tensor))
        return forward(self, *args, **kwargs)

    BatchNormAct2d.forward = watched
    try:
        _outputs(model, example_inputs, "to_plain")
    finally:
        BatchNormAct2d.forward = forward
    return calls


def _called(name: str, args: tuple, kwargs: Mapping[str, Any], tensor: type) -> _Call:
    given = dict(zip(("x", "residual", "act"), args, strict=False)) | dict(kwargs)
    return name, frozenset(given), isinstance(given.get("residual"), tensor)


def _tails(model: nn.Module, calls: Iterable[_Call]) -> dict[str, bool]:
    """Norms that have an act of their own or get a residual from the code around them; whether the latter."""
    residuals: dict[str, bool] = {}
    for name, given, residual in calls:
        if given - {"x", "residual"} or ("residual" in given) != residual:
            what = ", ".join(sorted(given - {"x"}))
        elif residuals.setdefault(name, residual) != residual:
            what = "a residual in one place and without in another"
        else:
            continue
        raise GraphError(f"to_plain: {name!r} is called with {what}; write the add or the ReLU out")
    tails = {}
    for name, m in model.named_modules():
        if isinstance(m, BatchNormAct2d) and (m.act or residuals.get(name)):
            tails[name] = residuals.get(name, False)
            if any(not _is_ours(hook) for hooks in _HOOKS for hook in getattr(m, hooks).values()):
                raise GraphError(f"to_plain: {name!r} adds or activates and has hooks; remove them first")
    return tails


@torch.no_grad()
def _make_plain(model: nn.Module, plan: _Plan) -> nn.Module:
    unfuse(model)
    named = dict(model.named_modules())
    for m in named.values():
        _leave_no_hook(m)
    bounded = {id(m.weight): m.weight for m in named.values() if isinstance(m, BatchNormAct2d) and m.bound}
    for weight in bounded.values():  # once each, however many norms share it
        weight.copy_(weight.double().sigmoid())
        weight.grad = None
    for name, m in named.items():
        if isinstance(m, BatchNormAct2d):
            act = m.act
            _plain_norm(m)
            if name in plan.tails:
                model = _replace(model, m, _with_tail(m, plan.tails[name], act))
        elif isinstance(m, MaskedConv2d):
            _plain_conv(m)
    for name, layer in plan.gates.items():
        gate = named[name]
        if layer is not None:
            _scale_outputs(model.get_submodule(layer), gate.weight.double())
        model = _replace(model, gate, nn.Identity())
    return model


def _plain_norm(m: BatchNormAct2d) -> None:
    if m.weight is not None and m.bias is None:
        m.bias = nn.Parameter(torch.zeros_like(m.weight), requires_grad=m.weight.requires_grad)
        _note_bias(m, m, "weight")
    _become(m, nn.BatchNorm2d)


def _plain_conv(m: MaskedConv2d) -> None:
    if m.weight_mask is not None:
        m.weight.masked_fill_(~m.weight_mask, 0)
    if m.out_mask is not None:
        m.weight[~m.out_mask] = 0
        if m.bias is not None:
            m.bias[~m.out_mask] = 0
    if m.in_mask is not None:
        columns = m.in_mask.view(m.groups, -1).repeat_interleave(m.out_channels // m.groups, dim=0)
        m.weight.masked_fill_(~columns[:, :, None, None], 0)
    for name in ("in_mask", "out_mask", "weight_mask"):
        del m._buffers[name]
    _become(m, nn.Conv2d)


def _become(m: nn.Module, cls: type[nn.Module]) -> None:
    for name in _ATTRIBUTES:
        vars(m).pop(name, None)
    m.__class__ = cls


def _with_tail(norm: nn.BatchNorm2d, residual: bool, act: str | None) -> nn.Module:
    """``norm``, then the add, then the ReLU, as one module."""
    parts = {"norm": norm} | ({"act": nn.ReLU()} if act else {})
    if not residual:
        whole: nn.Module = nn.Sequential()
        for name, m in parts.items():
            whole.add_module(name, m)
    else:
        graph = fx.Graph()
        x, other = graph.placeholder("x"), graph.placeholder("residual")
        y = graph.call_function(operator.add, (graph.call_module("norm", (x,)), other))
        graph.output(graph.call_module("act", (y,)) if act else y)
        whole = fx.GraphModule(parts, graph, "NormAddAct" if act else "NormAdd")
    for m in (whole, *parts.values()):
        m.training = norm.training
    return whole


def _leave_no_hook(m: nn.Module) -> None:
    if (slots := vars(m).get("gate_slots")) is not None:
        slots.statistics.close()
    vars(m).pop("gate_slots", None)  # of a copy it is None
    for kind in _HOOKS:
        hooks = getattr(m, kind)
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _is_ours(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0] == "fastprune"


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` is; returns the model, which may be ``new``."""
    new.training = old.training
    for m in list(model.modules()):
        for name, child in m._modules.items():
            if child is old and m is not new:
                m._modules[name] = new
    return new if model is old else model


def _note_bias(m: nn.Module, like: nn.Module, leaf: str) -> None:
    """Let the keep-lists say of the new bias of ``m`` what they say of a vector of ``like`` with the same channels."""
    if leaf in (kept := keep_lists(like)):
        record_keep(m, "bias", first_shapes(like)[leaf], kept[leaf])


# --- who reads what ----------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """What a layer returned, and who read it: the op, and the name of the module that ran it."""

    layer: str
    out: Tensor  # kept, so that nobody else gets its storage
    readers: list[tuple[str, str]] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """Follows one forward op by op: who reads what the layers of ``model`` return, and who reads parameters.

    Tensors are told apart by their storage, so a view counts as the tensor itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {m: name for name, m in model.named_modules()}
        self.modules = {name: m for m, name in self.names.items()}
        self.made: dict[int, _Made] = {}
        self.fed: dict[str, list[_Made | None]] = {}  # norm -> whose output it got; a storage may be used again
        self.reads: Counter[int] = Counter()  # of parameters' and buffers' storages, views aside
        self.state = {_storage(t) for m in self.names for t in _own_tensors(m)}
        self.running: list[str] = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        keys = {_storage(t) for t in leaves((args, kwargs or {}))}
        name, op = self.running[-1], getattr(func, "overloadpacket", func).__name__
        for key in keys:
            if key in self.made:
                self.made[key].readers.append((op, name))
            if key in self.state and not getattr(func, "is_view", False):
                self.reads[key] += 1
        m = self.modules.get(name)
        if isinstance(m, _BatchNorm) and "batch_norm" in op:
            self.fed.setdefault(name, []).append(self.made.get(_storage(args[0])))
            self._note(name, m, keys, leaves(out)[0])
        elif isinstance(m, _ConvNd | nn.Linear) and op in ("convolution", "addmm", "mm"):
            self._note(name, m, keys, out)
        return out

    def _note(self, name: str, m: nn.Module, keys: set[int], out: Tensor) -> None:
        weight = m._parameters.get("weight")
        if weight is None or _storage(weight) in keys:  # the layer's own, not one made from it
            self.made[_storage(out)] = _Made(name, out)

    @contextmanager
    def on(self) -> Iterator[None]:
        def enter(m: nn.Module, args: Any) -> None:
            self._meet(m, args)
            self.running.append(self.names.get(m, self.running[-1]))

        def leave(m: nn.Module, args: Any, out: Any) -> None:
            self.running.pop()
            self._meet(m, out)

        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()

    def _meet(self, m: nn.Module, value: Any) -> None:
        if m in self.names and _hooked(m):
            self.read_by(value, "a hook", self.names[m])

    def read_by(self, value: Any, what: str, name: str) -> None:
        for t in leaves(value):
            if made := self.made.get(_storage(t)):
                made.readers.append((what, name))


def _watch(model: nn.Module, example_inputs: Any) -> _Watch:
    watch = _Watch(model)
    with torch.no_grad(), backends.force("eager"), watch.on():
        out = call(model, _doubled(example_inputs))
    watch.read_by(out, "the caller", "")
    return watch


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _own_tensors(m: nn.Module) -> list[Tensor]:
    return [t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Storage to the modules with a parameter or buffer in it."""
    holders: dict[int, list[nn.Module]] = {}
    for m in model.modules():
        for t in _own_tensors(m):
            holders.setdefault(_storage(t), []).append(m)
    return holders


def _hooked(m: nn.Module) -> bool:
    return any(getattr(m, hooks) for hooks in _HOOKS)


def _shared(watch: _Watch, holders: Mapping[int, list[nn.Module]], m: nn.Module) -> bool:
    """Whether anything but one call of ``m`` uses its parameters and statistics."""
    mine = [t for name, t in (*m._parameters.items(), *m._buffers.items()) if t is not None]
    mine = [t for t in mine if t is not getattr(m, "num_batches_tracked", None)]  # the only one a forward does not read
    return any(len(holders[_storage(t)]) > 1 or watch.reads[_storage(t)] != 1 for t in mine)


def _find_gates(model: nn.Module, gates: Iterable[str], example_inputs: Any) -> dict[str, str]:
    """The layer whose output a gate, and nobody else, reads."""
    if not gates:
        return {}
    watch, holders, found = _watch(model, example_inputs), _holders(model), {}
    for made in watch.made.values():
        readers = {name for _, name in made.readers}
        layer = model.get_submodule(made.layer)
        if len(readers) == 1 and layer._parameters.get("weight") is not None and not _hooked(layer):
            if not _shared(watch, holders, layer):
                found[readers.pop()] = made.layer
    for gate in gates:
        m = model.get_submodule(gate)
        if gate not in found or _hooked(m) or len(holders[_storage(m.weight)]) > 1:
            raise GraphError(
                f"to_plain: {gate!r} holds other factors than 1, and no convolution, linear layer or batch norm "
                "gives its output to it alone; set its weight to 1 or multiply in the model itself"
            )
    return {gate: found[gate] for gate in gates}


# --- folding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folds:
    """Norm to the layer it goes into, and norm to why it stays."""

    into: dict[str, str]
    left: dict[str, str]


def _find_folds(model: nn.Module, example_inputs: Any) -> _Folds:
    watch, holders, folds = _watch(model, example_inputs), _holders(model), _Folds({}, {})
    for name, m in model.named_modules():
        if isinstance(m, _BatchNorm):
            layer, why = _layer_before(name, m, watch, holders)
            if layer is not None:
                folds.into[name] = layer
            else:
                folds.left[name] = why
    return folds


def _layer_before(
    name: str, norm: _BatchNorm, watch: _Watch, holders: Mapping[int, list[nn.Module]]
) -> tuple[str | None, str]:
    """The layer a norm can be folded into, or None and why there is none."""
    inputs = watch.fed.get(name, [])
    if len(inputs) != 1:
        return None, f"ran {len(inputs)} times" if inputs else "did not run"
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return None, "uses the batch's statistics"
    made = inputs[0]
    layer = watch.modules[made.layer] if made else None
    if not isinstance(layer, _ConvNd | nn.Linear):
        return None, "reads no layer's output"
    if "weight" not in layer._parameters:
        return None, f"{made.layer} computes its weight"
    others = [f"{op} in {at or 'the model'}" for op, at in made.readers if at != name or "batch_norm" not in op]
    if others:
        return None, f"{made.layer} is also read by {others[0]}"
    if _hooked(norm) or _hooked(layer):
        return None, f"it or {made.layer} has hooks"
    if _shared(watch, holders, norm) or _shared(watch, holders, layer):
        return None, f"it or {made.layer} runs twice or shares parameters"
    return made.layer, ""


def _proven(model: nn.Module, folds: _Folds, example_inputs: Any) -> _Folds:
    """Leave out what does not compute the same on a float64 ``model``, whose statistics are stirred for it."""
    generator = torch.Generator().manual_seed(0)
    for name in folds.into:
        _stir(model.get_submodule(name), generator)
    expected = _outputs(model, example_inputs, "fold", folds.into)

    def gap(into: dict[str, str]) -> float:
        trial = copy.deepcopy(model)
        _fold(trial, into)
        try:
            return distance(_outputs(trial, example_inputs, "fold", folds.into), expected)
        except GraphError:  # the code around a norm needs it to be one
            return float("inf")

    if gap(folds.into) <= TOLERANCE:
        return folds
    good = {norm: layer for norm, layer in folds.into.items() if gap({norm: layer}) <= TOLERANCE}
    if (worst := gap(good)) > TOLERANCE:
        raise GraphError(f"fold: the folded model computes something else (relative difference {worst:.1e})")
    code = "the code around it or its layer does more with it"
    return _Folds(good, folds.left | {norm: code for norm in folds.into.keys() - good.keys()})


@torch.no_grad()
def _fold(model: nn.Module, into: Mapping[str, str]) -> None:
    for name, layer in into.items():
        norm, m = model.get_submodule(name), model.get_submodule(layer)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        if m.bias is None:
            m.bias = nn.Parameter(torch.zeros_like(norm.running_mean, dtype=m.weight.dtype))
            m.bias.requires_grad_(m.weight.requires_grad)
            _note_bias(m, norm, "running_mean")
        _scale_outputs(m, scale, shift)
        left = [child for child in norm.children() if type(child) is not nn.Identity]  # timm's drop and act
        if type(norm) in _NORMS:
            left = []
        _replace(model, norm, left[0] if len(left) == 1 else nn.Sequential(*left) if left else nn.Identity())


def _scale_outputs(m: nn.Module, scale: Tensor, shift: Tensor | float = 0.0) -> None:
    """Multiply what ``m`` returns by ``scale`` and add ``shift``, both (C,) of float64, through weight and bias."""
    columns = scale
    if getattr(m, "transposed", False):  # (in, out / groups, ...)
        columns = scale.view(m.groups, 1, -1).expand(-1, m.in_channels // m.groups, -1).reshape(m.in_channels, -1)
    columns = columns.view(*columns.shape, *[1] * (m.weight.dim() - columns.dim()))
    m.weight.copy_(m.weight.double() * columns)
    m.weight.grad = None
    if m.bias is not None:
        m.bias.copy_(m.bias.double() * scale + shift)
        m.bias.grad = None


# --- float64 copies ----------------------------------------------------------------------------------------------


def _copied(model: nn.Module, function: str) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as e:
        raise GraphError(f"{function}: the proof needs a deep copy of the model ({type(e).__name__}: {e})") from e


def _float64(model: nn.Module, function: str) -> nn.Module:
    try:
        return model.double()
    except Exception as e:
        raise GraphError(f"{function}: the proof needs the model in float64 ({type(e).__name__}: {e})") from e


def _doubled(example_inputs: Any) -> Any:
    return map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t.detach(), example_inputs)


@torch.no_grad()
def _outputs(model: nn.Module, example_inputs: Any, function: str, names: Iterable[str] = ()) -> list[Tensor]:
    """What the named modules return, in that order, then the model; seeded.

    Raises:
        GraphError: The model does not run, or its output is not finite.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, m: nn.Module, args: Any, out: Tensor) -> None:
        seen[name] = out.clone()  # an activation in place may follow

    hooks = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            torch.manual_seed(0)
            out = leaves(call(model, _doubled(example_inputs)))
    except Exception as e:
        raise GraphError(f"{function}: a float64 copy of the model does not run ({type(e).__name__}: {e})") from e
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [*(seen[name] for name in names if name in seen), *out]
    if not all(t.isfinite().all() for t in outputs if t.is_floating_point()):
        raise GraphError(f"{function}: the model's output is not finite on example_inputs; a proof would say nothing")
    return outputs


def _stir(norm: _BatchNorm, generator: torch.Generator) -> None:
    """Random statistics and parameters of the order of what is there: fresh ones, 0 and 1, would hide mistakes."""

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)

    with torch.no_grad():
        norm.running_mean.add_(0.3 * norm.running_var.sqrt() * noise(norm.running_mean))
        norm.running_var.mul_(1 + 0.5 * noise(norm.running_var).tanh())
        for p in (norm.weight, norm.bias):
            if p is not None:
                p.add_(0.3 * noise(p))
