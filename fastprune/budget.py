"""Keep-masks for a budget: so many multiply-accumulates, parameters or milliseconds, instead of a share of channels.

What a network costs with any choice of channels follows from the channel graph alone: a weight has a row or a column
for each channel it touches.  :class:`Costs` counts that without running or cutting anything, so a search over the
threshold of the scores takes milliseconds.  Milliseconds of latency do not follow from anything; there a few networks
of the same family are really made, and measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.compact import compact
from fastprune.errors import GraphError
from fastprune.flops import flops
from fastprune.graph import ChannelGraph, Group, Keep
from fastprune.latency import Stopwatch, relative
from fastprune.parallel import mean_over_processes
from fastprune.select import Limits, Ranking, limits

CANDIDATES = 8  # networks that are made and measured for a latency, besides the smallest
_WHAT = {"macs": "multiply-accumulates", "params": "parameters"}


@dataclass(frozen=True)
class Use:
    """One run of a convolution or linear layer: ``macs = weight.numel() * times``.

    ``module`` is named if its output has a channel axis that the weight does not make, as of a linear layer on tokens
    that channels went into: the times then shrink with that axis, and are given without it.
    """

    weight: str
    times: int
    module: str | None


def uses(graph: ChannelGraph, model: nn.Module, example_inputs: Any) -> list[Use]:
    """How often each weight is used, from one forward of the model as it is; cutting channels does not change it.

    Raises:
        GraphError: A layer computes its weight from nothing of its own that has the weight's shape.
    """
    found = []
    names = {id(t): name for named in (model.named_buffers(), model.named_parameters()) for name, t in named}
    for layer in flops(model, example_inputs)["layers"]:
        module, shape = model.get_submodule(layer["name"]), layer["output_shape"]
        weight = names.get(id(module.weight)) or next(  # parametrised: something it is made from has its shape
            (names[id(t)] for t in (*module.parameters(), *module.buffers()) if t.shape == module.weight.shape), None
        )
        if weight is None:
            raise GraphError(
                f"budget: cannot count {layer['name']}, whose weight is no parameter nor made from one of its shape; "
                "ask for a ratio instead"
            )
        times, spread = layer["macs"] // module.weight.numel(), None
        out = graph.outputs.get(layer["name"])
        if isinstance(module, nn.Linear) and len(shape) > 2 and out is not None:
            times, spread = times // shape[1], layer["name"]
        found.append(Use(weight, times, spread))
    return found


class Costs:
    """MACs and parameters of a model as functions of the channels that stay, exactly as ``fp.flops`` counts them.

    Args:
        graph: Of this very model.
        model: Only shapes are read.
        used: See :func:`uses`; those of a larger model, before channels were cut, serve as well.

    Raises:
        GraphError: The graph is not of this model.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, used: Sequence[Use]) -> None:
        tensors = graph.tensors(model)
        self.groups = {name: group.size for name, group in graph.groups.items()}
        self._total = sum(self.groups.values())
        lines: dict[bytes, int] = {}  # channels along a dimension -> its number; many tensors share one
        channels: list[np.ndarray] = []

        def line(of: np.ndarray) -> int:
            key = of.tobytes()
            if key not in lines:
                lines[key] = len(lines)
                channels.append(of)
            return lines[key]

        dims: dict[str, dict[int, int]] = {}  # tensor -> dimension -> number of its line
        for row in graph.rows:
            of = graph.channel_of[row.start : row.start + row.size]
            if (of >= 0).any():
                dims.setdefault(row.name, {})[row.dim] = line(of)

        def term(name: str, times: int, more: list[int]) -> tuple[int, list[int]]:
            """A number of elements as a fixed factor times the lengths of lines."""
            mine = dims.get(name, {})
            fixed = math.prod(n for d, n in enumerate(tensors[name].shape) if d not in mine)
            return times * fixed, [*mine.values(), *more]

        macs = []
        for use in used:
            along = [] if use.module is None else [line(graph.outputs[use.module].channels)]
            macs.append(term(use.weight, use.times, along))
        self._macs = _table(macs, len(lines))
        self._params = _table([term(name, 1, []) for name, _ in model.named_parameters()], len(lines))
        self._starts = np.cumsum([0, *map(len, channels)])[:-1]
        self._channels = np.concatenate([np.zeros(0, np.int64), *channels])

    def of(self, keep: Keep) -> dict[str, int]:
        """``{"macs": ..., "params": ...}`` of the model that :func:`fastprune.compact` makes with ``keep``."""
        parts = [
            keep[name].detach().cpu().numpy() if name in keep else np.ones(n, bool) for name, n in self.groups.items()
        ]
        lengths = self.lengths(np.concatenate([np.zeros(0, bool), *parts]))
        return {what: self.count(what, lengths) for what in _WHAT}

    def lengths(self, stays: np.ndarray) -> np.ndarray:
        """How long each dimension is once only these channels, bool over all groups, stay; a 1 at the end."""
        extended = np.append(stays, True).astype(np.int64)  # frozen indices are -1 and find the last
        counts = np.add.reduceat(extended[self._channels], self._starts) if len(self._starts) else np.zeros(0, np.int64)
        return np.append(counts, 1)

    def count(self, what: str, lengths: np.ndarray) -> int:
        """``"macs"`` or ``"params"``."""
        factors, rows = self._macs if what == "macs" else self._params
        return int((factors * lengths[rows].prod(1)).sum())


def _table(terms: list[tuple[int, list[int]]], dummy: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors (T,) and numbers of lines (T, D), filled up with the dummy, whose length is 1."""
    width = max([len(rows) for _, rows in terms], default=0)
    rows = np.array([[*r, *[dummy] * (width - len(r))] for _, r in terms], np.int64).reshape(len(terms), width)
    return np.array([factor for factor, _ in terms], np.int64), rows


def steps(graph: ChannelGraph, round_to: int) -> dict[str, int]:
    """Channels of each group that make up a multiple of ``round_to`` in the layers that write them.

    One channel of a grouped convolution with 32 groups stands for 32 of its filters: with ``round_to=8`` its step is 1.
    """
    if isinstance(round_to, bool) or not isinstance(round_to, Integral) or round_to < 1:
        raise ValueError(f"keep_masks: round_to must be a whole number of at least 1, got {round_to!r}")
    return {name: int(round_to) // math.gcd(round_to, _filters(group)) for name, group in graph.groups.items()}


def _filters(group: Group) -> int:
    """The greatest number that divides the filters per channel in every layer that writes the group."""
    makers = set(group.convs)
    dims: dict[str, int] = {}  # dimension 0, or 1 of a transposed convolution, whose 0 is another group's
    for row in group.rows:
        if row.name.rpartition(".")[0] in makers:
            dims[row.name] = min(row.dim, dims.get(row.name, row.dim))
    return math.gcd(*(int(n) for key in dims.items() for n in np.unique(np.bincount(group.index[key].channel))))


class Budget:
    """What a pruned network may cost at most, and the search for the largest one that does not cost more.

    Exactly one target is given.  MACs and parameters: a share of the dense model if at most 1, else a number.

    Args:
        graph: Of ``model``.
        model: The dense model.
        example_inputs: As for :func:`fastprune.graph.trace`.
        target_macs: Of all convolutions and linear layers for one sample, as :func:`fastprune.flops` counts.
        target_params: Of all parameters.
        target_latency_ms: Of a forward in eval mode, without gradients, on the device of ``latency_inputs``.
        latency_inputs: What the latency is measured on; None: ``example_inputs``.

    Attributes:
        target: Name and value of what was asked for.
        dense: MACs and parameters of ``model``.
        measured: With a latency, once it was searched: one dict per network tried, ``macs``, ``ms``, and
            ``dense_ms`` of the dense model, timed in turn with it.

    Raises:
        ValueError: None or several targets, or one that is not a positive number.
        GraphError: A layer whose MACs cannot be counted.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        example_inputs: Any,
        *,
        target_macs: float | None = None,
        target_params: float | None = None,
        target_latency_ms: float | None = None,
        latency_inputs: Any = None,
    ) -> None:
        given = {"target_macs": target_macs, "target_params": target_params, "target_latency_ms": target_latency_ms}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "budget: expected one of target_macs, target_params and target_latency_ms, "
                f"got {' and '.join(given) or 'none'}"
            )
        (self.name, value), *_ = given.items()
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            share = "" if self.name == "target_latency_ms" else ", at most 1 for a share of the model's"
            raise ValueError(f"budget: expected {self.name} to be a finite number above 0{share}, got {value!r}")
        if latency_inputs is not None and target_latency_ms is None:
            raise ValueError("budget: latency_inputs goes with target_latency_ms; leave it out")
        self.target = given
        self.model, self.example_inputs, self.latency_inputs = model, example_inputs, latency_inputs
        self.uses = uses(graph, model, example_inputs)
        self.look_at(graph)
        self.dense = self.costs.of({})
        self.what = "params" if target_params is not None else "macs"
        self.measured: list[dict[str, float]] = []
        self.latency_ms = None if target_latency_ms is None else float(value)
        self.limit: float | None = None  # MACs or parameters; with a latency known once it was searched
        if self.latency_ms is None:
            self.limit = value * self.dense[self.what] if value <= 1 else value

    def look_at(self, graph: ChannelGraph) -> None:
        """Count by the graph of the model as it is now, after channels were removed."""
        self.graph, self.costs = graph, Costs(graph, self.model, self.uses)

    def reached(self, keep: Keep) -> bool:
        """Whether the model without the channels that ``keep`` marks False is within the budget."""
        return self.costs.of(keep)[self.what] <= self.limit

    def widths(self, ranking: Ranking, allowed: Limits) -> np.ndarray:
        """Channels of each group of the largest network within the budget: int64 (G,).

        With a latency the first call measures; later ones keep to the MACs that were found.

        Raises:
            ValueError: The limits on the groups, and what the graph leaves alone, make every network larger.
        """
        if self.limit is None:
            self.limit = self._search_latency(ranking, allowed)
        found = self._largest(ranking, allowed, self.limit)
        if found is None:
            raise ValueError(self._unreachable(ranking, allowed))
        return found

    def check(self, ranking: Ranking, allowed: Limits) -> None:
        """Raise what :meth:`widths` would raise, without measuring anything."""
        if self.limit is not None and self._count(ranking)(self._smallest(ranking, allowed)) > self.limit:
            raise ValueError(self._unreachable(ranking, allowed))

    def _smallest(self, ranking: Ranking, allowed: Limits) -> np.ndarray:
        return allowed.allowed(np.zeros_like(ranking.sizes))

    def _largest(self, ranking: Ranking, allowed: Limits, limit: float) -> np.ndarray | None:
        count = self._count(ranking)
        return ranking.largest(allowed, lambda widths: count(widths) <= limit)

    def _count(self, ranking: Ranking) -> Callable[[np.ndarray], int]:
        """Widths to what they cost."""
        base = dict(zip(self.costs.groups, np.cumsum([0, *self.costs.groups.values()]), strict=False))
        where = np.concatenate([
            np.zeros(0, int), *(base[name] + np.arange(n) for name, n in zip(ranking.names, ranking.sizes, strict=True))
        ])  # fmt: skip
        stays = np.ones(sum(self.costs.groups.values()), bool)

        def count(widths: np.ndarray) -> int:
            stays[where] = ranking.stays(widths)
            return self.costs.count(self.what, self.costs.lengths(stays))

        return count

    def _unreachable(self, ranking: Ranking, allowed: Limits) -> str:
        least = self._count(ranking)(self._smallest(ranking, allowed))
        return (
            f"budget: {self.name} asks for {self.limit:,.12g} {_WHAT[self.what]}, but the smallest network that "
            f"min_keep, max_ratio, round_to, the groups left out and the layers left alone allow has {least:,} "
            f"({least / self.dense[self.what]:.4f} of the dense one); ask for more, or loosen them"
        )

    # Latency

    def _search_latency(self, ranking: Ranking, allowed: Limits) -> float:
        """MACs of the largest network that meets the latency, by bisection; each candidate is made and measured."""
        inputs = self.example_inputs if self.latency_inputs is None else self.latency_inputs
        watch = Stopwatch.of(inputs)
        dense = watch.placed(copy.deepcopy(self.model))
        reference: list[float] = []

        def meets(widths: np.ndarray) -> bool:
            keep = {name: torch.from_numpy(mask) for name, mask in ranking.masks(widths).items()}
            # cut where the graph was traced; the proof is compact's, for the one network that is chosen
            small = compact(copy.deepcopy(self.model), keep, self.example_inputs, check=False, graph=self.graph)
            dense_ms, share = relative(watch, dense, watch.placed(small), inputs)
            reference.append(dense_ms)
            # the machine drifts: the dense model, timed in turn, carries the scale
            ms = share * float(np.median(reference))
            macs = self._count(ranking)(widths)
            self.measured.append({"macs": macs, "ms": ms, "dense_ms": dense_ms})
            return ms <= self.latency_ms

        smallest = self._smallest(ranking, allowed)
        if not meets(smallest):
            self._agreed(math.nan)  # or others would wait for this process
            best = min(entry["ms"] for entry in self.measured)
            raise ValueError(
                f"budget: target_latency_ms={self.latency_ms:g} cannot be reached: the smallest network that min_keep, "
                f"max_ratio, round_to and the groups left out allow takes {best:.4g} ms "
                f"(the dense one {reference[-1]:.4g} ms) here; ask for more, or loosen them"
            )
        if meets(ranking.sizes):
            return self._agreed(self.dense["macs"])
        low, high, tried = self.measured[0]["macs"], self.dense["macs"], smallest
        found = low
        for _ in range(CANDIDATES):
            widths = self._largest(ranking, allowed, (low + high) / 2)
            if widths is None or (widths == tried).all():
                break
            tried = widths
            if meets(widths):
                found = low = self.measured[-1]["macs"]
            else:
                high = self.measured[-1]["macs"]
        return self._agreed(found)

    def _agreed(self, macs: float) -> float:
        """The mean of all processes: their clocks differ, their masks must not."""
        device = next(self.model.parameters()).device
        agreed = float(mean_over_processes(torch.tensor(float(macs), dtype=torch.float64, device=device)))
        if math.isnan(agreed) and not math.isnan(macs):
            raise ValueError(f"budget: target_latency_ms={self.latency_ms:g} cannot be reached in another process")
        return agreed


def keep_masks(
    scores: Mapping[str, Tensor],
    graph: ChannelGraph,
    model: nn.Module,
    example_inputs: Any,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_latency_ms: float | None = None,
    latency_inputs: Any = None,
    scope: str = "global",
    min_keep: int = 3,
    max_ratio: float | Mapping[str, float] | None = None,
    round_to: int | None = None,
) -> dict[str, Tensor]:
    """Choose the channels of the largest network within a budget that a threshold over the scores gives.

    Args:
        scores: Group name to scores, (C,), any floating dtype and device; higher = keep.  Groups left out stay whole.
            Ranked against each other with scope "global", so then they must be comparable between groups.
        graph: Of ``model``.
        model: Not changed.
        example_inputs: As for :func:`fastprune.graph.trace`.
        target_macs, target_params, target_latency_ms, latency_inputs: See :class:`Budget`; exactly one target.
        scope: ``"global"``: one threshold for all groups.  ``"local"``: one share of every group.
        min_keep, max_ratio, round_to: See :func:`fastprune.select.limits`; where a channel stands for several filters,
            as of grouped convolutions, it is the layer's width that ``round_to`` divides.

    Returns: Group name to a bool vector, (C,), True = keep, on the device of its scores.

    Raises:
        ValueError: Wrong or NaN scores, an unknown group, a value out of range, or a target that no choice of channels
            reaches; the message gives the least that one does.
        GraphError: A layer whose MACs cannot be counted.
    """
    budget = Budget(
        graph, model, example_inputs, target_macs=target_macs, target_params=target_params,
        target_latency_ms=target_latency_ms, latency_inputs=latency_inputs,
    )  # fmt: skip
    for name, score in scores.items():
        size = graph.groups[name].size if name in graph.groups else score.numel()
        if score.shape != (size,) or not score.is_floating_point():
            got = f"{score.dtype} {tuple(score.shape)}"
            raise ValueError(f"keep_masks: expected floating scores of shape ({size},) for {name}, got {got}")
    graph.check_keep({name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()})
    values = {name: score.detach().double().cpu().numpy() for name, score in scores.items()}
    ranking = Ranking(values, scope)
    step = None if round_to is None else steps(graph, round_to)
    sizes = {name: len(v) for name, v in values.items()}
    masks = ranking.masks(budget.widths(ranking, limits(sizes, min_keep, max_ratio, step)))
    return {name: torch.from_numpy(mask).to(scores[name].device) for name, mask in masks.items()}
