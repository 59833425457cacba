"""Pruning by the magnitude of weights in one shot, and what the growing methods share with it.

| name   | removed are, of each layer                                                                             |
|--------|--------------------------------------------------------------------------------------------------------|
| l1     | the filters (channels, weights) with the smallest mean absolute weight, Li et al., ICLR 2017,           |
|        | arXiv:1608.08710, counted as GReg's authors do (arXiv:2012.09243)                                       |
| max    | those with the largest                                                                                 |
| random | any                                                                                                    |

``group`` says what lives or dies together: ``"filter"``, output channels, scored and regularised where they are made;
``"channel"``, the same channels, where they are read; ``"weight"``, single weights of every convolution and linear
layer; ``"2:4"`` and the like, the 2 largest of each 4 neighbours along the input channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.budget import Budget
from fastprune.errors import did_you_mean
from fastprune.graph import ChannelGraph, Group
from fastprune.methods.base import Method, Options, register
from fastprune.ops import filter_norm
from fastprune.ratios import Ratio, constrained, inherited
from fastprune.select import (
    LIMITS,
    SCOPES,
    Limits,
    Ranking,
    pick,
    pick_array,
    pick_arrays_globally,
    pick_globally,
    ranked_array,
)

GROUPS = ("filter", "channel", "weight")
_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class MagnitudeOptions(Options):
    min_keep: int = 1
    group: str = "filter"  # "filter", "channel", "weight" or "N:M"
    limit: str = "greg"  # who counts: "greg" leaves one, "tpp" half a percent, of which it rounds down the removed
    same: str | tuple = ()  # layers that get the keep-mask of the first: "a,b/c,d" or tuples of names and patterns
    inherit: Any = None  # a checkpoint, model or keep-masks to take ratios or indices from, instead of ``ratio``
    inherit_what: str = "ratio"  # "ratio" or "index"
    seed: int = 42  # of method "random"


class Rows(NamedTuple):
    """Indices of one dimension of one parameter that are channels: number of the channel of each, -1 = of none."""

    name: str
    dim: int
    channel: np.ndarray


class MagnitudeMethod(Method):
    """Scores are mean absolute weights; from them keep-masks are chosen, by layer (``scope="local"``) or over all.

    With ``group="weight"`` and ``"N:M"`` nothing gets smaller: ``weight_masks()`` says which weights stay,
    ``keep_masks()`` keeps every channel, and :meth:`cut` zeroes and holds them.
    """

    Options = MagnitudeOptions
    scope = "local"
    order: ClassVar[str] = "min"
    finished = True  # there is nothing to wait for

    # What is scored

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
        if options.group not in GROUPS and not _PATTERN.fullmatch(options.group):
            raise ValueError(
                f"{self.name}: group must be 'filter', 'channel', 'weight' or 'N:M', got {options.group!r}"
            )
        self.pattern = tuple(int(n) for n in options.group.split(":")) if ":" in options.group else None
        if self.pattern and not 0 < self.pattern[0] < self.pattern[1]:
            raise ValueError(f"{self.name}: group N:M keeps N of M weights, 0 < N < M, got {options.group!r}")
        self.by_weight = options.group == "weight" or self.pattern is not None
        self.weights = _weights(model) if self.by_weight else {}
        asked = {"a target": budget, "max_ratio": options.max_ratio, "round_to": options.round_to}
        asked = [what for what, value in asked.items() if value is not None]
        if asked and self.by_weight:
            raise ValueError(f"{self.name}: {asked[0]} is for groups of channels, got group={options.group!r}")
        if options.inherit is not None and (budget is not None or (asked and options.inherit_what == "index")):
            raise ValueError(f"{self.name}: expected {asked[0]} or inherit, which says what goes; got both")
        super().__init__(model, graph, ratio, scope, options, example_inputs, budget)

    def layers(self) -> list[str]:
        return list(self.weights) if self.by_weight else super().layers()

    def leave(self, names: set[str]) -> None:
        super().leave(names)
        self.weights = {name: w for name, w in self.weights.items() if name not in names}

    def sizes(self) -> dict[str, int]:
        """Layer to the number of its channels, or weights."""
        if self.by_weight:
            return {name: w.numel() for name, w in self.weights.items()}
        return {name: group.size for name, group in self.groups.items()}

    def prepare(self) -> None:
        o = self.options
        self._same = constrained(o.same, self.sizes()) if o.same else []
        self._inherited: dict[str, Tensor] = {}
        if o.inherit is not None:
            if self.by_weight:
                raise ValueError(f"{self.name}: inherit works with groups of channels, got group={o.group!r}")
            taken = inherited(o.inherit, self.model, self.graph, self.layers(), o.inherit_what)
            if o.inherit_what == "index":
                self._inherited = taken
            else:
                self.ratio = taken
        if self.by_weight:
            return
        numbers, self._bases, base = {}, {}, 0
        for name, group in self.groups.items():
            self._bases[name] = base
            for key in self._where(group):
                _enter(numbers, self.model, group, key, base)
            base += group.size
        self.rows = [Rows(*key, channel) for key, channel in numbers.items()]
        self._elements = self._sum(
            [self._parameter(r).numel() / len(r.channel) * np.ones(len(r.channel)) for r in self.rows]
        )

    def _where(self, group: Group) -> list[tuple[str, int]]:
        """The dimensions of weights that hold the filters, or the columns, of the group's channels."""
        filters = self.options.group == "filter"
        dims = []
        for name in (*group.convs, *group.depthwise) if filters else group.consumers:
            transposed = getattr(self.model.get_submodule(name), "transposed", False)
            key = (f"{name}.weight", int(transposed == filters))
            if key in group.index:
                dims.append(key)
        return dims

    def prunable(self, group: Group) -> bool:
        return self.by_weight or bool(self._where(group))

    def _parameter(self, rows: Rows) -> nn.Parameter:
        return self.model.get_parameter(rows.name)

    def _sum(self, values: list[np.ndarray]) -> np.ndarray:
        """Values per row, in the order of ``rows``, to sums per channel over all groups, (K,)."""
        total = np.zeros(sum(group.size for group in self.groups.values()))
        for rows, v in zip(self.rows, values, strict=True):
            mine = rows.channel >= 0
            total += np.bincount(rows.channel[mine], v[mine], len(total))
        return total

    @torch.no_grad()
    def magnitudes(self) -> np.ndarray:
        """Mean absolute weight of each channel of all groups, concatenated, (K,), float64, on the host."""
        norms: dict[int, np.ndarray] = {}
        for dim in {rows.dim for rows in self.rows}:
            weights = [self._parameter(rows) for rows in self.rows if rows.dim == dim]
            norms[dim] = filter_norm(weights, "l1", dim).cpu().numpy().astype(np.float64)
        values, at = [], dict.fromkeys(norms, 0)
        for rows in self.rows:
            start, at[rows.dim] = at[rows.dim], at[rows.dim] + len(rows.channel)
            values.append(norms[rows.dim][start : at[rows.dim]])
        return self._sum(values) / self._elements

    def split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """(K,) to one (C,) per group."""
        return {name: values[base : base + self.groups[name].size] for name, base in self._bases.items()}

    def scores(self) -> dict[str, Tensor]:
        """Mean absolute weight of each channel, (C,) float64 by group, on the CPU; with weights: their absolute values,
        flat, by layer."""
        if self.by_weight:
            return {name: w.detach().abs().flatten() for name, w in self.weights.items()}
        return {name: torch.from_numpy(values) for name, values in self.split(self.magnitudes()).items()}

    # What is chosen

    def check_ratio(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"{self.name}: unknown scope {self.scope!r}{did_you_mean(str(self.scope), SCOPES)}")
        if self.options.limit not in LIMITS:
            raise ValueError(
                f"{self.name}: unknown limit {self.options.limit!r}{did_you_mean(self.options.limit, LIMITS)}"
            )
        if self.options.min_keep < 1:
            raise ValueError(f"{self.name}: min_keep must be at least 1, got {self.options.min_keep}")
        if self.budget is not None:
            super().check_ratio()
        elif not self.by_weight:
            self.limits()

    def limits(self) -> Limits:
        bounds = super().limits()
        most = [LIMITS[self.options.limit](int(n)) for n in bounds.size]
        return bounds._replace(least=np.maximum(bounds.least, bounds.size - np.array(most, np.int64)))

    def keep_masks(self) -> dict[str, Tensor]:
        """Per group bool (C,), True = keep; all True with single weights."""
        if self.by_weight:
            return {name: torch.ones(group.size, dtype=torch.bool) for name, group in self.groups.items()}
        return {name: torch.from_numpy(keep) for name, keep in self.choose_channels(self.magnitudes()).items()}

    @torch.no_grad()
    def weight_masks(self) -> dict[str, Tensor]:
        """Name of each weight of all layers with a ratio to bool of its shape, True = stays.

        Raises:
            ValueError: ``group`` is not ``"weight"`` or ``"N:M"``.
        """
        if not self.by_weight:
            raise ValueError(f"{self.name}: weight_masks needs group='weight' or 'N:M'; use keep_masks()")
        if self.pattern is None:
            chosen = self.choose(self.scores(), pick, pick_globally)
            return {f"{name}.weight": chosen[name].view(w.shape) for name, w in self.weights.items()}
        ratios = self.ratio if isinstance(self.ratio, dict) else dict.fromkeys(self.weights, self.ratio)
        masks = {}
        for name, w in self.weights.items():
            layer, m = self.model.get_submodule(name), self.pattern[1]
            dim = int(not getattr(layer, "transposed", False))  # of the input channels
            inputs = w.shape[dim] // (1 if dim else layer.groups)  # that a filter reads
            if ratios[name] == 0:
                masks[f"{name}.weight"] = torch.ones_like(w, dtype=torch.bool)
            elif inputs % m == 0:
                masks[f"{name}.weight"] = n_of_m(w.transpose(1, dim), *self.pattern).transpose(1, dim).contiguous()
            elif isinstance(self.ratio, dict):
                raise ValueError(
                    f"{self.name}: group {self.options.group!r} needs a multiple of {m} input channels, "
                    f"{name} has {inputs}; give it ratio 0"
                )
            else:  # one ratio for all: layers that cannot have the pattern, such as the first, stay whole
                masks[f"{name}.weight"] = torch.ones_like(w, dtype=torch.bool)
        return masks

    def choose_channels(self, magnitudes: np.ndarray) -> dict[str, np.ndarray]:
        """Keep-masks from magnitudes, (K,); in NumPy, since greg-2 asks for them at every update, and a call of PyTorch
        per layer would cost more than the update."""
        scores, o = self.split(magnitudes), self.options
        if self.budget is None and o.max_ratio is None and o.round_to is None:
            return self.choose(scores, pick_array, pick_arrays_globally)
        ranking, bounds = Ranking(self._places(scores), self.scope, self._same), self.limits()
        if self.budget is not None:
            return ranking.masks(self.budget.widths(ranking, bounds))
        keep = self.choose(scores, pick_array, pick_arrays_globally)
        return ranking.masks(bounds.allowed(np.array([keep[name].sum() for name in ranking.names])))

    def _places(self, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """When each channel goes, of all or of its layer, as ``pick_arrays_globally`` or ``pick_array`` order them."""
        together = np.concatenate([np.zeros(0), *scores.values()])
        if np.isnan(together).any():
            bad = next(name for name, score in scores.items() if np.isnan(score).any())
            raise ValueError(f"{self.name}: NaN weights in {bad}; a loss or a gradient overflowed")
        if self.scope == "global":
            return self.split(_inverse(ranked_array(together, self.order, self.options.seed)))
        return {name: _inverse(ranked_array(v, self.order, self.options.seed)) for name, v in scores.items()}

    def choose(self, scores: dict[str, Any], pick: Callable, pick_globally: Callable) -> dict[str, Any]:
        """Keep-masks from scores, by ratio, scope, count rule and constraints."""
        o = self.options
        if self._inherited:  # of channels only
            keep = {name: mask.numpy().copy() for name, mask in self._inherited.items()}
        elif self.scope == "global" and not isinstance(self.ratio, dict):
            keep = pick_globally(scores, self.ratio, self.order, min_keep=o.min_keep, seed=o.seed)
        else:
            ratios = self.ratio if isinstance(self.ratio, dict) else dict.fromkeys(scores, self.ratio)
            args = self.order, o.limit, o.seed, o.min_keep
            keep = {name: pick(score, ratios[name], *args) for name, score in scores.items()}
        for first, *others in self._same:
            keep |= {name: deepcopy(keep[first]) for name in others}
        return keep

    # What is zeroed

    def cut(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero what is not kept, in the model and the optimizer's state, and hold it at zero in every ``step``."""
        if self.by_weight:
            named = dict(self.model.named_parameters())
            self.hold({named[name]: mask for name, mask in self.weight_masks().items()}, optimizer)
        else:
            keep = self.keep_masks()
            self.graph.mask_(self.model, keep)
            self.hold(self.masks(self.graph.kept(keep)), optimizer)


def _inverse(permutation: np.ndarray) -> np.ndarray:
    places = np.empty(len(permutation))
    places[permutation] = np.arange(len(permutation))
    return places


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers by layer, each once."""
    named = {id(p): name for name, p in model.named_parameters()}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    found = [(name, m.weight) for name, m in model.named_modules() if isinstance(m, kinds)]
    return {name: w for name, w in found if named.get(id(w)) == f"{name}.weight"}


def _enter(
    numbers: dict[tuple[str, int], np.ndarray], model: nn.Module, group: Group, key: tuple[str, int], base: int
) -> None:
    """Write the numbers of the group's channels, from ``base`` on, where they are in a parameter."""
    position, channel = group.index[key]
    size = model.get_parameter(key[0]).shape[key[1]]
    numbers.setdefault(key, np.full(size, -1))[position.numpy()] = channel.numpy() + base


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the ``n`` largest magnitudes of each ``m`` neighbours along the input channels, (N, C, ...) -> bool.

    Sparse tensor cores want it along what a convolution sums over; in channels_last that is the input channels.
    """
    blocks = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, m))
    order = blocks.argsort(stable=True, dim=-1, descending=True)
    stays = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return stays.flatten(-2).movedim(-1, 1).contiguous()


@register("l1")
class L1(MagnitudeMethod):
    """Smallest mean absolute weight first."""


@register("max")
class Max(MagnitudeMethod):
    """Largest mean absolute weight first: a check that magnitude means something."""

    order = "max"


@register("random")
class Random(MagnitudeMethod):
    """Any, by ``seed``."""

    order = "rand"
