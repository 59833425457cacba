"""What a pruning method is, and how one is made by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastprune.errors import did_you_mean
from fastprune.graph import ChannelGraph, Group, trace
from fastprune.select import keep_masks

METHODS: dict[str, type[Method]] = {}
IDS: dict[int, str] = {}  # the numbers that Taylor's authors give their criteria
Ratio = float | Mapping[str, float]


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
    name: str | int, model: nn.Module, example_inputs: Any, ratio: Ratio = 0.5, scope: str | None = None, **options: Any
) -> Method:
    """Make a pruning method for ``model``.

    Args:
        name: One of :data:`METHODS`; of Taylor's criteria also their number, such as 22.
        model: Traced once with ``example_inputs``.  Methods on gates make each ``nn.BatchNorm2d`` that has a gate a
            :class:`fastprune.nn.BatchNormAct2d`, in place and with the same function; else it is unchanged.
        example_inputs: A tensor or a tuple of arguments for ``model``, on its device.
        ratio: Share of the channels to remove, 0 <= ratio < 1; or shares by group, see ``fastprune.select.keep_masks``.
        scope: ``"global"`` ranks all channels together, ``"local"`` within each group; None: as the method's authors.
        options: Fields of the method's ``Options``.

    Raises:
        ValueError: Unknown method or option, a value out of range, or a model the method does not fit.
    """
    name = IDS.get(name, name)
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) if isinstance(name, str) else f"; known numbers: {sorted(IDS)}"
        raise ValueError(f"create: unknown method {name!r}{hint}")
    cls = METHODS[name]
    known = [f.name for f in fields(cls.Options)]
    for option in options:
        if option not in known:
            raise ValueError(f"create: method {name!r} has no option {option!r}{did_you_mean(option, known)}")
    graph = trace(model, example_inputs)
    return cls(model, graph, ratio, scope or cls.scope, cls.Options(**options), example_inputs)


@dataclass(frozen=True)
class Options:
    """What every method has; methods add fields of their own."""

    coupled: bool = False  # also groups that several convolutions write, such as residual streams
    min_keep: int = 3  # channels that stay in any group


class Method:
    """One pruning method on one model.  Subclasses override the hooks they need.

    ``prepare`` once; then per step ``penalty`` before the backward, and inside :meth:`step` ``after_backward``, the
    optimizer's step, ``after_step``.  ``scores`` rank the channels of ``groups``.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = Options
    scope: str = "global"

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, ratio: Ratio, scope: str, options: Any, example_inputs: Any
    ) -> None:
        self.model, self.graph, self.example_inputs = model, graph, example_inputs
        self.ratio, self.scope, self.options = ratio, scope, options
        self.steps = 0  # optimizer steps made
        self._no_penalty = torch.zeros(())  # made once: a step should launch no more than it must
        self.groups: dict[str, Group] = {
            key: group
            for key, group in graph.groups.items()
            if (options.coupled or not group.coupled) and self.prunable(group)
        }
        if not self.groups:
            raise ValueError(
                f"{self.name}: no group of channels it can prune in {type(model).__name__}; {self.hint(graph)}"
            )
        self._keep_masks({key: torch.zeros(group.size) for key, group in self.groups.items()})  # bad ratios show now
        self.prepare()

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
            self._no_penalty = self._no_penalty.to(device)
        return self._no_penalty

    def after_backward(self) -> None:
        """Gradients are ready: read them for scores, or edit them."""

    def after_step(self) -> None:
        """Weights are updated."""

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor | None = None) -> None:
        """In place of ``optimizer.step()``; ``loss``, a scalar, for methods that decide by it."""
        self.after_backward()
        optimizer.step()
        self.after_step()
        self.steps += 1

    def scores(self) -> dict[str, Tensor]:
        """Per group (C,), floating point, without autograd; higher = keep."""
        raise NotImplementedError

    def keep_masks(self) -> dict[str, Tensor]:
        """Per group bool (C,), True = keep, by ``ratio`` and ``scope``; what ``fastprune.compact`` takes."""
        return self._keep_masks(self.scores())

    def _keep_masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        return keep_masks(scores, self.ratio, scope=self.scope, min_keep=self.options.min_keep)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides model and optimizer."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
