"""What a pruning method is, and how one is made by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from fastprune import ops
from fastprune.budget import Budget, steps
from fastprune.errors import did_you_mean
from fastprune.graph import ChannelGraph, Group, trace
from fastprune.optim import GrowingSGD
from fastprune.ratios import Ratio, left_alone, resolve, skipped
from fastprune.select import Limits, Ranking, keep_masks, limits
from fastprune.surgery import Copies, Plan

_TYPES = {"bool": bool, "int": Integral, "float": Real, "str": str, "tuple": Sequence, "None": type(None)}
METHODS: dict[str, type[Method]] = {}
IDS: dict[int, str] = {}  # the numbers that Taylor's authors give their criteria


def register(name: str, number: int | None = None) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make the method known to :func:`create`, recipes and the command line under ``name``."""

    def wrap(cls: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"methods.register: {name!r} is already taken by {METHODS[name].__module__}")
        METHODS[name] = cls
        cls.name = name
        if number is not None:
            IDS[number] = name
        return cls

    return wrap


def create(
    name: str | int,
    model: nn.Module,
    example_inputs: Any,
    ratio: Ratio | None = None,
    scope: str | None = None,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_latency_ms: float | None = None,
    latency_inputs: Any = None,
    **options: Any,
) -> Method:
    """Make a pruning method for ``model``.

    Args:
        name: One of :data:`METHODS`; of Taylor's criteria also their number, such as 22.
        model: Traced once with ``example_inputs``.  Methods on gates make each ``nn.BatchNorm2d`` that has a gate a
            :class:`fastprune.nn.BatchNormAct2d`, in place and with the same function; else it is unchanged.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments for ``model``, on its device.
        ratio: Share of the channels to remove, 0 <= ratio < 1; or shares by stage, layer index, name or pattern, see
            :mod:`fastprune.ratios`.  None: 0.5, unless there is a target.
        target_macs, target_params: In place of a ratio: what the pruned model may have at most of multiply-accumulates
            or of parameters; a share of the model's if at most 1, else a number.
        target_latency_ms: In place of a ratio: what a forward may take, in eval mode and without gradients, on
            ``latency_inputs`` (None: ``example_inputs``) and their device; see :class:`fastprune.budget.Budget`.
        scope: ``"global"`` ranks all channels together, ``"local"`` within each group; None: as the method's authors.
        options: Fields of the method's ``Options``.

    Raises:
        ValueError: Unknown method or option, a value out of range, a model the method does not fit, or a target that
            nothing reaches; the message gives the least that is reached.
    """
    name = IDS.get(name, name)
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) if isinstance(name, str) else f"; known numbers: {sorted(IDS)}"
        raise ValueError(f"create: unknown method {name!r}{hint}")
    cls = METHODS[name]
    known = {f.name: f.type for f in fields(cls.Options)}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"create: method {name!r} has no option {option!r}{did_you_mean(option, known)}")
        if not _has_type(value, known[option]):
            raise ValueError(f"create: option {option!r} of {name!r} must be {known[option]}, got {value!r}")
    targets = {"target_macs": target_macs, "target_params": target_params, "target_latency_ms": target_latency_ms}
    asked = [target for target, value in targets.items() if value is not None]
    if asked and ratio is not None:
        raise ValueError(f"create: expected a ratio or a target, got ratio={ratio!r} and {asked[0]}")
    if latency_inputs is not None and target_latency_ms is None:
        raise ValueError("create: latency_inputs goes with target_latency_ms; leave it out")
    graph, budget = trace(model, example_inputs), None
    if asked:
        budget = Budget(graph, model, example_inputs, **targets, latency_inputs=latency_inputs)
    elif ratio is None:
        ratio = 0.5
    return cls(model, graph, ratio, scope or cls.scope, cls.Options(**options), example_inputs, budget)


@dataclass(frozen=True)
class Options:
    """What every method has; methods add fields of their own."""

    coupled: bool = False  # also groups that several convolutions write, such as residual streams
    min_keep: int = 3  # channels that stay in any group
    max_ratio: float | dict[str, float] | None = None  # largest share of a group that may go; or by name or pattern
    round_to: int | None = None  # kept channels of a layer are a multiple of it, unless it has fewer or keeps all
    skip: str | tuple[str, ...] = ()  # layers left alone: "stage.block.conv" prefixes or glob patterns of names


class Method:
    """One pruning method on one model.  Subclasses override the hooks they need.

    ``prepare`` once; then per step ``penalty`` before the backward, and :meth:`step`, which is ``update`` on the host,
    ``launch`` (``after_backward``, the optimizer's step, ``after_step``) on the device, and ``advance`` on the host.
    ``scores`` rank the channels of ``groups``.

    What ``penalty`` and ``launch`` hand to the device is the same in every step, as long as :meth:`structure` is: they
    read nothing back and decide nothing, and what changes lies in tensors that ``update`` and ``advance`` rewrite in
    place.  So a step can be captured and replayed, see :mod:`fastprune.capture`.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = Options
    scope: str = "global"

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        ratio: Ratio | None,
        scope: str,
        options: Any,
        example_inputs: Any,
        budget: Budget | None = None,
    ) -> None:
        self.model, self.graph, self.example_inputs = model, graph, example_inputs
        self.scope, self.options, self.budget = scope, options, budget
        self.steps = 0  # optimizer steps made
        self.reg: dict[Tensor, Tensor] = {}  # parameter -> extra weight decay, broadcastable to it
        self.held: dict[Tensor, Tensor] = {}  # parameter -> bool, broadcastable to it; False = zero, and stays so
        self._no_penalty = torch.zeros((), device=next(model.parameters()).device)  # made once, not in every step
        self.groups: dict[str, Group] = {
            key: group
            for key, group in graph.groups.items()
            if (options.coupled or not group.coupled) and self.prunable(group)
        }
        if options.skip:
            self.leave(skipped(options.skip, model, self.layers()))
        if not self.layers():
            raise ValueError(
                f"{self.name}: no group of channels it can prune in {type(model).__name__}; {self.hint(graph)}"
            )
        self.ratio = None  # there is a budget instead
        if budget is None:
            self.ratio = resolve(ratio, model, self.layers(), reasons=left_alone(graph, self.layers()))
        self.check_ratio()  # bad ratios, and targets out of reach, show now
        self.prepare()

    def layers(self) -> list[str]:
        """Names of what has a ratio of its own."""
        return list(self.groups)

    def leave(self, names: set[str]) -> None:
        """Leave these layers out."""
        self.groups = {key: group for key, group in self.groups.items() if key not in names}

    def check_ratio(self) -> None:
        if self.budget is None:
            self._keep_masks({key: torch.zeros(group.size) for key, group in self.groups.items()})
        else:
            zeros = {key: np.zeros(group.size) for key, group in self.groups.items()}
            self.budget.check(Ranking(zeros, self.scope), self.limits())

    def prunable(self, group: Group) -> bool:
        """Whether this method can score ``group``."""
        return True

    def hint(self, graph: ChannelGraph) -> str:
        """What to do when no group is prunable."""
        return "option coupled=True includes residual streams" if graph.groups else "the channel graph found none"

    def prepare(self) -> None:
        """Once, before the first step."""

    def penalty(self) -> Tensor:
        """To be added to the loss: scalar, zero if the method has none."""
        device = next(self.model.parameters()).device
        if self._no_penalty.device != device:
            self._no_penalty = torch.zeros((), device=device)
        return self._no_penalty

    def update(self) -> None:
        """On the host, before the device's work of a step; once a step, and :meth:`step` calls it at the latest."""
        if self.held and not fits(*next(iter(self.held.items()))):
            self.held = {}  # the caller has removed it, see fastprune.compact

    def after_backward(self) -> None:
        """Gradients are ready: read them for scores, or edit them."""

    def after_step(self) -> None:
        """Weights are updated."""

    def advance(self, optimizer: torch.optim.Optimizer, *, ema: Copies = None) -> None:
        """On the host, when the device's work of a step is handed over: count, and cut when due."""
        self.steps += 1

    def structure(self) -> tuple:
        """Equal in two steps whose ``penalty`` and ``launch`` hand the device the same work on the same tensors."""
        return tuple(map(id, (*self.reg, *self.reg.values(), *self.held, *self.held.values())))

    def step(
        self, optimizer: torch.optim.Optimizer, loss: Tensor | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """In place of ``optimizer.step()``, or of ``scaler.step(optimizer)``.

        Args:
            optimizer: With :class:`fastprune.optim.GrowingSGD` regularisation, update and hold are one launch; with any
                other one there is a launch before and one after it.
            loss: Scalar, for methods that decide by it.
            scaler: Gradients are scaled by it; call ``scaler.update()`` afterwards, as ever.

        Raises:
            ValueError: A regularisation, and an optimizer other than ours with ``maximize=True``.
        """
        self.update()
        self.launch(optimizer, loss, scaler)
        self.advance(optimizer)

    def launch(
        self, optimizer: torch.optim.Optimizer, loss: Tensor | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """The device's work of :meth:`step`."""
        self.after_backward()
        ours = isinstance(optimizer, GrowingSGD)
        if ours:  # a frozen parameter may be none of the optimizer's
            optimizer.constrain(*({p: t for p, t in of.items() if p.requires_grad} for of in (self.reg, self.held)))
        elif self.reg:
            if any(group.get("maximize") for group in optimizer.param_groups):
                raise ValueError(
                    f"{self.name}: with maximize=True, {type(optimizer).__name__} would grow what is to shrink; "
                    "minimise the negative loss, or use fastprune.optim.GrowingSGD"
                )
            if scaler is not None and not _unscaled(scaler, optimizer):
                scaler.unscale_(optimizer)
            for params in alike(p for p in self.reg if p.grad is not None):
                ops.grow_grads(params, [p.grad for p in params], [self.reg[p] for p in params])
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        if self.held and not ours:
            self._zero_held()
        self.after_step()

    @torch.no_grad()
    def hold(self, keep: Mapping[Tensor, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero what ``keep`` marks False, and see to it that each step leaves it so.

        Args:
            keep: Parameter to a bool tensor that broadcasts to it, copied; replaces what was held before.
            optimizer: Its state is zeroed there too.
        """
        like = {id(p): (t.shape, t.device) for p, t in self.held.items()}
        if like == {id(p): (t.shape, t.device) for p, t in keep.items()}:
            for p, stays in keep.items():
                self.held[p].copy_(stays)  # in place, so that a captured step need not be captured anew
        else:
            self.held = {p: t.clone() for p, t in keep.items()}
        for p, stays in self.held.items():
            for entry in optimizer.state.get(p, {}).values() if optimizer is not None else ():
                if isinstance(entry, Tensor) and entry.shape == p.shape:
                    entry.masked_fill_(~stays, 0)
        self._zero_held()

    def _zero_held(self) -> None:
        for params in alike(self.held):
            ops.hold(params, [self.held[p] for p in params])

    def masks(self, plan: Plan) -> dict[Tensor, Tensor]:
        """Parameter to bool, broadcastable to it: what a plan of indices that stay means for each parameter."""
        named, masks = dict(self.model.named_parameters()), {}
        for name, dims in plan.items():
            if name not in named:
                continue
            p = named[name]
            mask = torch.ones([1] * p.dim(), dtype=torch.bool, device=p.device)
            for dim, stays in dims.items():
                line = torch.zeros(p.shape[dim], dtype=torch.bool, device=p.device)
                line.index_fill_(0, stays.to(p.device), True)
                mask = mask & line.view([-1 if d == dim else 1 for d in range(p.dim())])
            masks[p] = mask
        return masks

    def scores(self) -> dict[str, Tensor]:
        """Per group (C,), floating point, without autograd; higher = keep."""
        raise NotImplementedError

    def keep_masks(self) -> dict[str, Tensor]:
        """Per group bool (C,), True = keep, by ``ratio`` or target, and ``scope``; what ``fastprune.compact`` takes."""
        return self._keep_masks(self.scores())

    def _keep_masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.budget is None:
            o = self.options
            step = None if o.round_to is None else steps(self.graph, o.round_to)
            return keep_masks(scores, self.ratio, self.scope, o.min_keep, max_ratio=o.max_ratio, round_to=step)
        ranking = Ranking({name: score.double().cpu().numpy() for name, score in scores.items()}, self.scope)
        masks = ranking.masks(self.budget.widths(ranking, self.limits()))
        return {name: torch.from_numpy(mask).to(scores[name].device) for name, mask in masks.items()}

    def limits(self) -> Limits:
        """The widths that the groups may get, by the options ``min_keep``, ``max_ratio`` and ``round_to``."""
        o, sizes = self.options, {name: group.size for name, group in self.groups.items()}
        step = None if o.round_to is None else steps(self.graph, o.round_to)
        return limits(sizes, o.min_keep, o.max_ratio, step)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides model and optimizer."""
        return {"steps": self.steps} | ({} if self.budget is None else {"budget": self.budget.limit})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if self.budget is not None and "budget" in state:  # what a latency was found to mean
            self.budget.limit = state["budget"]


def _has_type(value: Any, annotation: str) -> bool:
    """Whether it is one of the simple types that the annotation names; a type that is not simple may be anything."""
    names = [part.strip().partition("[")[0] for part in annotation.split("|")]
    if isinstance(value, bool) and not set(names).isdisjoint(_TYPES):
        return "bool" in names  # though Python counts it as an int
    return any(name not in _TYPES or isinstance(value, _TYPES[name]) for name in names)


def fits(p: Tensor, part: Tensor) -> bool:
    """Whether ``part`` broadcasts to ``p``."""
    return all(n in (1, size) for n, size in zip(part.shape, p.shape, strict=True))


def _unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether there is nothing to do, or the caller has done it, to clip gradients; a second time would raise."""
    return not scaler.is_enabled() or scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED


def alike(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters by device and dtype: a launch takes one of each."""
    lists: dict[tuple, list[Tensor]] = {}
    for p in params:
        lists.setdefault((p.device, p.dtype), []).append(p)
    return list(lists.values())
