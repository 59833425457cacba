"""When and what to cut while training: the iterative rule of Taylor pruning, on any criteria.

Every ``frequency`` steps the criteria, averaged over the window and then over cuts, rank all channels together; the
lowest ``per_cut`` go.

Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.errors import did_you_mean


@dataclass(frozen=True, kw_only=True)
class CutSchedule:
    """How often and how much to cut.

    Attributes:
        max_removed: Channels after which nothing more is removed.  Exact ties with the threshold go together and may
            exceed it, in the authors' code too.
        frequency: Steps between two cuts, over which criteria are averaged.
        per_cut: Channels to remove in one cut.
        max_cuts: Stop after so many; None: stop when ``max_removed`` are gone.
        momentum: Share of the old scores in the new ones, over cuts; 0 = off.
        group_size: Cut this many channels of a layer at a time: neighbours in ascending order of score, a group's value
            being the sum.  The authors' count takes a last, smaller group of a layer for a whole one, so that cutting
            may stop short of ``max_removed``.
        start_after: Steps before the first window; their criteria are not used.
        loss_threshold: A due cut is skipped, and its window discarded, if the window's mean loss is above this.
        only: Cut in this layer only (name, or number in order): the others are not ranked at all.
        first_extra: Steps that the first window is longer than the others: 1 in the authors' code.
        min_keep: Channels that stay in every layer; the group they are in stays whole.  The authors have no such
            floor (0), and can lose a layer.
    """

    max_removed: int
    frequency: int = 30
    per_cut: int = 100
    max_cuts: int | None = None
    momentum: float = 0.9
    group_size: int = 1
    start_after: int = 0
    loss_threshold: float | None = None
    only: str | int | None = None
    first_extra: int = 1
    min_keep: int = 1

    def __post_init__(self) -> None:
        least = {"max_removed": 0, "frequency": 1, "per_cut": 1, "max_cuts": 0, "group_size": 1, "start_after": 0}
        for name, low in {**least, "min_keep": 0}.items():
            value = getattr(self, name)
            if name == "max_cuts" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"CutSchedule: {name} must be an integer of at least {low}, got {value!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"CutSchedule: expected 0 <= momentum < 1, got {self.momentum!r}")
        if self.per_cut < self.group_size:
            raise ValueError(
                f"CutSchedule: per_cut={self.per_cut} is less than one group of group_size={self.group_size}, "
                "so that nothing would ever be cut"
            )


class IterativeCuts:
    """The state of a cutting schedule: running scores and what has been removed.

    Call :meth:`add` at each step and, whenever :attr:`due`, :meth:`cut`.  :meth:`add` is :meth:`accumulate` and
    :meth:`accumulate_loss`, which only launch work on fixed tensors, and :meth:`count` on the host.  Ranking removed
    channels first, with value 0, makes the choice the same whether they are still there, masked, or physically gone
    (:meth:`shrink`).  Between cuts nothing waits for the device.  Under data parallelism reduce the criteria over the
    processes before ``add``.

    Args:
        sizes: Layer name to its number of channels, in the order of a flat vector.
        schedule: See :class:`CutSchedule`.
        floors: Layer name to channels that stay there in any case, where more than ``min_keep``.

    Attributes:
        sizes: As now, after shrinking.
        cuts: Cuts made, also those that removed nothing.
        removed: Channels removed so far.
        windows: Windows closed so far, with or without a cut.
        averaged: None before the first cut, else the scores it ranked by, (sum of sizes,), float64.
        threshold: Of the last cut: groups of this value and below went; -inf if none could.
    """

    def __init__(
        self, sizes: Mapping[str, int], schedule: CutSchedule, floors: Mapping[str, int] | None = None
    ) -> None:
        if not sizes or any(not isinstance(c, int) or c < 1 for c in sizes.values()):
            raise ValueError(f"IterativeCuts: expected the number of channels of at least one layer, got {dict(sizes)}")
        self.sizes, self.schedule, self.floors = dict(sizes), schedule, dict(floors or {})
        names = list(sizes)
        only = schedule.only
        if isinstance(only, int):
            if not 0 <= only < len(names):
                raise ValueError(f"IterativeCuts: only={only}, but the layers are numbered 0 to {len(names) - 1}")
            only = names[only]
        if only is not None and only not in sizes:
            raise ValueError(f"IterativeCuts: only={only!r} is no layer{did_you_mean(only, names)}")
        self._ranked = names if only is None else [only]
        self._keep = {name: torch.ones(c, dtype=torch.bool) for name, c in sizes.items()}
        self._gone = dict.fromkeys(sizes, 0)  # channels that no longer exist; _keep holds the others
        self.cuts, self.windows, self.removed, self.threshold, self.averaged = 0, 0, 0, -math.inf, None
        self._exhausted = False  # a cut found nothing: what stays is protected, or less than a group
        self._steps = 0  # all
        self._window = 0  # steps in _total and _loss
        self._first = True  # the window is the first one
        self._total = self._loss = None

    @property
    def finished(self) -> bool:
        """Nothing will be cut any more."""
        s = self.schedule
        return self.removed >= s.max_removed or self._exhausted if s.max_cuts is None else self.cuts >= s.max_cuts

    @property
    def due(self) -> bool:
        """Time to call :meth:`cut`.  Counts on the host."""
        return self._window >= self.schedule.frequency + self.schedule.first_extra * self._first and not self.finished

    def add(self, criteria: Mapping[str, Tensor] | Tensor, loss: Tensor | float | None = None) -> None:
        """Take one step's criteria in.

        Args:
            criteria: Layer name to (C,), or all in one vector in the order of ``sizes``; higher = keep.  Any floating
                dtype; summed in float64 on their device.
            loss: Of this step, scalar; needed with ``loss_threshold``.

        Raises:
            ValueError: Layers or shapes differ from ``sizes``, or the loss is missing.
        """
        flat = self._flat(criteria)
        if loss is None and self.schedule.loss_threshold is not None:
            raise ValueError("IterativeCuts.add: loss_threshold is set, so the loss of each step is needed, got None")
        self.accumulate(flat)
        if loss is not None:
            self.accumulate_loss(loss)
        self.count()

    def accumulate(self, criteria: Mapping[str, Tensor] | Tensor) -> None:
        """The device's part of :meth:`add`, criteria."""
        flat = self._flat(criteria)
        if self.finished:
            return
        if self._total is None:
            self._total = torch.zeros_like(flat, dtype=torch.float64)
        self._total = self._total.to(flat.device).add_(flat.detach())  # it moves after loading a state only

    def accumulate_loss(self, loss: Tensor | float) -> None:
        """The device's part of :meth:`add`, loss."""
        if self.finished:
            return
        loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss)
        if self._loss is None:
            self._loss = torch.zeros_like(loss, dtype=torch.float64)
        self._loss = self._loss.to(loss.device).add_(loss)

    def count(self) -> None:
        """The host's part of :meth:`add`."""
        self._steps += 1
        if self.finished:
            return
        if self._steps <= self.schedule.start_after:
            self._clear()
        else:
            self._window += 1

    @property
    def totals(self) -> tuple[Tensor | None, Tensor | None]:
        """What criteria and losses are added up in."""
        return self._total, self._loss

    def _clear(self) -> None:
        """In place: who captured a step goes on with the same tensors."""
        for total in (self._total, self._loss):
            if total is not None:
                total.zero_()

    def cut(self) -> dict[str, Tensor]:
        """Close the window and choose: layer name to bool (C,), True = keep, on the device of the criteria.

        Copies scores to the host once; the choice is made there, alike on every device.

        Raises:
            ValueError: Nothing was added since the last cut, or a score is not finite (the state stays as it was).
        """
        if not self._window:
            raise ValueError("IterativeCuts.cut: no criteria since the last cut; call add() at each step")
        s, device = self.schedule, self._total.device
        loss = self._total.new_zeros(1) if self._loss is None else self._loss.to(device).view(1)
        total = torch.cat((self._total, loss)).cpu()
        loss, fresh = total[-1].item() / self._window, total[:-1] / self._window
        if s.loss_threshold is None or loss <= s.loss_threshold:
            for name, score in self._split(fresh).items():
                if name in self._ranked and not score[self._keep[name]].isfinite().all():
                    raise ValueError(
                        f"IterativeCuts.cut: a score of {name} is not finite; a loss or gradient overflowed"
                    )
            mixed = self.averaged is not None and s.momentum > 0
            self.averaged = s.momentum * self.averaged + (1 - s.momentum) * fresh if mixed else fresh
            before = self.removed
            self._choose()
            self._exhausted = self.removed == before
            self.cuts += 1
        self._first, self._window = False, 0
        self._clear()
        self.windows += 1
        return {name: keep.to(device) for name, keep in self._keep.items()}

    def shrink(self, keep: Mapping[str, Tensor]) -> None:
        """Forget channels, because the model has physically lost them.

        Args:
            keep: Layer name to bool (C,), True = still there; layers left out stay whole.

        Raises:
            ValueError: A mask does not fit, or drops a channel that no cut removed.
        """
        for name, stays in keep.items():
            if name not in self.sizes:
                raise ValueError(f"IterativeCuts.shrink: {name!r} is no layer{did_you_mean(name, self.sizes)}")
            if stays.dtype != torch.bool or stays.shape != (self.sizes[name],):
                raise ValueError(
                    f"IterativeCuts.shrink: expected bool ({self.sizes[name]},) for {name}, "
                    f"got {stays.dtype} {tuple(stays.shape)}"
                )
            if (self._keep[name] & ~stays.cpu()).any():
                raise ValueError(f"IterativeCuts.shrink: {name} loses channels that no cut removed")
        stays = {n: keep[n].cpu() if n in keep else torch.ones(c, dtype=torch.bool) for n, c in self.sizes.items()}
        flat = torch.cat(list(stays.values()))
        self.averaged = None if self.averaged is None else self.averaged[flat]
        self._total = None if self._total is None else self._total[flat.to(self._total.device)]
        for name, mask in stays.items():
            self._gone[name] += int((~mask).sum())
            self._keep[name] = self._keep[name][mask]
            self.sizes[name] = int(mask.sum())

    def state_dict(self) -> dict[str, Any]:
        """All of it but the schedule, in tensors, numbers and dicts."""
        return {
            "sizes": dict(self.sizes),
            "gone": dict(self._gone),
            "keep": {name: keep.clone() for name, keep in self._keep.items()},
            "cuts": self.cuts,
            "exhausted": self._exhausted,
            "windows": self.windows,
            "removed": self.removed,
            "threshold": self.threshold,
            "averaged": _clone(self.averaged),
            "steps": self._steps,
            "window": self._window,
            "first": self._first,
            "total": _clone(self._total) if self._window else None,
            "loss": _clone(self._loss) if self._window else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue bit for bit.  The sizes may be those of a model shrunk since this object was made.

        Raises:
            ValueError: The state is of other layers.
        """
        was = {name: c + state["gone"].get(name, 0) for name, c in state["sizes"].items()}
        now = {name: c + self._gone[name] for name, c in self.sizes.items()}
        if list(was) != list(now) or (was != now and state["sizes"] != self.sizes):
            raise ValueError(f"IterativeCuts.load_state_dict: expected the state of layers {now}, got {was}")
        self.sizes, self._gone = dict(state["sizes"]), dict(state["gone"])
        self._keep = {name: keep.cpu().clone() for name, keep in state["keep"].items()}
        self.cuts, self.windows, self._exhausted = state["cuts"], state["windows"], state["exhausted"]
        self.removed, self.threshold = state["removed"], state["threshold"]
        self._steps, self._window, self._first = state["steps"], state["window"], state["first"]
        self.averaged = None if state["averaged"] is None else state["averaged"].cpu().clone()
        self._total, self._loss = _clone(state["total"]), _clone(state["loss"])

    def _flat(self, criteria: Mapping[str, Tensor] | Tensor) -> Tensor:
        if isinstance(criteria, Mapping):
            got = {name: tuple(c.shape) for name, c in criteria.items()}
            if got != {name: (c,) for name, c in self.sizes.items()}:
                raise ValueError(f"IterativeCuts.add: expected criteria of {self.sizes} channels, got shapes {got}")
            return torch.cat([criteria[name] for name in self.sizes])
        if criteria.shape != (sum(self.sizes.values()),):
            raise ValueError(
                f"IterativeCuts.add: expected ({sum(self.sizes.values())},) criteria, got {tuple(criteria.shape)}"
            )
        return criteria

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.sizes, flat.split(list(self.sizes.values())), strict=True))

    def _choose(self) -> None:
        s, scores = self.schedule, self._split(self.averaged)
        values, members = {}, {}
        for name in self._ranked:
            keep, gone = self._keep[name], self._gone[name]
            values[name], members[name] = channel_groups(scores[name], s.group_size, keep, gone)
            if floor := min(max(s.min_keep, self.floors.get(name, 0)), int(keep.sum())):  # the best come last
                values[name][(gone + len(keep) - floor) // s.group_size :] = math.inf
        # Removed groups must come first.  They do with value 0, as the authors have it, unless a score is negative.
        if any((v < 0).any() for v in values.values()):
            for name in self._ranked:
                empty = (self._gone[name] + int((~self._keep[name]).sum())) // s.group_size
                values[name][: empty if self._keep[name].any() else None] = -math.inf
        ranking = torch.cat(list(values.values())).sort().values
        last = min((self.removed + s.per_cut) // s.group_size, s.max_removed // s.group_size, len(ranking)) - 1
        self.threshold = ranking[last].item() if last >= 0 else -math.inf
        for name in self._ranked:
            falls = members[name][(values[name] <= self.threshold) & values[name].isfinite()].flatten()
            self._keep[name][falls[falls >= 0]] = False
        self.removed = sum(self._gone[n] + int((~self._keep[n]).sum()) for n in self._ranked)


def channel_groups(scores: Tensor, group_size: int, keep: Tensor | None = None, gone: int = 0) -> tuple[Tensor, Tensor]:
    """Group the channels of one layer: in ascending order of score, ``group_size`` neighbours at a time.

    Args:
        scores: (C,).
        group_size: Channels in a group; the last group may have fewer.
        keep: Bool (C,); channels that are False come first, with a score of 0.  None: all are kept.
        gone: Further channels, before all others, that no longer exist.

    Returns: The sums of the groups' scores, (G,), ascending if no score is negative, and the numbers of their channels,
        int64 (G, group_size), with -1 for those that are gone and to fill the last group.

    Source: Taylor pruning's code; its comments speak of the average, it takes the sum.
    """
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep
    order = scores.masked_fill(~keep, -math.inf).argsort(stable=True)
    missing = -(gone + len(order)) % group_size
    members = torch.cat((order.new_full((gone,), -1), order, order.new_full((missing,), -1))).view(-1, group_size)
    padded = torch.cat((scores.masked_fill(~keep, 0), scores.new_zeros(1)))  # -1 reads the zero at the end
    return padded[members].sum(1), members


def _clone(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()


# Keys of the authors' JSON to fields of CutSchedule.
_FIELDS = {
    "prune_neurons_max": "max_removed",
    "frequency": "frequency",
    "prune_per_iteration": "per_cut",
    "maximum_pruning_iterations": "max_cuts",
    "pruning_momentum": "momentum",
    "start_pruning_after_n_iterations": "start_after",
    "pruning_threshold": "loss_threshold",
}
_REQUIRED = ("method", "frequency", "prune_per_iteration", "maximum_pruning_iterations", "prune_neurons_max")
# The one value of each that we have the behaviour of, and what another one would ask for.
_ONLY = {
    "starting_neuron": (0, "a count of removed channels to start from"),
    "rank_neurons_equally": (False, "ranking by order within the layer"),
    "push_group_down": (False, "shrinking a group before it is cut"),
    "do_iterative_pruning": (True, "cutting everything at once; use fastprune.keep_masks"),
    "fixed_criteria": (False, "criteria computed once"),
}
_UNREAD = ("use_momentum", "pruning_silent", "l2_normalization_per_layer")


def load_config(config: str | Path | Mapping[str, Any]) -> tuple[int, CutSchedule, int]:
    """Read a configuration of the authors' code (NVlabs/Taylor_pruning, ``configs/*.json``) as it is.

    ``use_momentum``, ``pruning_silent`` and ``l2_normalization_per_layer`` are accepted and ignored, since their code
    never reads them: momentum is on if ``pruning_momentum`` is above 0.  ``fixed_layer`` is -1 for none, or the number
    of a layer.  The floor of one channel per layer, which the authors do not have, stays on; replace it with
    ``dataclasses.replace(schedule, min_keep=0)`` to get their masks where a layer vanishes.

    Args:
        config: Path of a JSON file, or the same as a dict.

    Returns: Number of the method, the schedule, and the seed (0 if absent).

    Raises:
        ValueError: Not such a file, a key that is unknown or missing, or a behaviour that is not here.
    """
    if not isinstance(config, Mapping):
        try:
            config = json.loads(Path(config).read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"load_config: cannot read {config} as JSON: {e}") from e
        if not isinstance(config, Mapping):
            raise ValueError(f"load_config: expected a JSON object, got {type(config).__name__}")
    known = {*_FIELDS, *_REQUIRED, *_ONLY, *_UNREAD, "fixed_layer", "seed"}
    for key in config:
        if key not in known:
            raise ValueError(f"load_config: unknown key {key!r}{did_you_mean(key, known)}")
    if missing := [key for key in _REQUIRED if key not in config]:
        raise ValueError(f"load_config: missing {', '.join(missing)}")
    for key, (value, meaning) in _ONLY.items():
        if config.get(key, value) != value:
            raise ValueError(f"load_config: {key}={config[key]!r} ({meaning}) is not supported, only {value!r} is")
    for key in ("method", "seed", "fixed_layer"):
        if not isinstance(config.get(key, 0), int):
            raise ValueError(f"load_config: {key} must be an integer, got {config[key]!r}")
    fields = {field: config[key] for key, field in _FIELDS.items() if key in config}
    fields["momentum"] = max(0.0, fields.get("momentum", 0.0))
    layer = config.get("fixed_layer", -1)
    return config["method"], CutSchedule(**fields, only=None if layer < 0 else layer), config.get("seed", 0)
