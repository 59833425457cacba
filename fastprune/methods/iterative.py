"""Cutting in many small steps while the network trains, and making it smaller on the way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprune.compact import compact
from fastprune.cutting import CutSchedule, IterativeCuts
from fastprune.methods.base import Method, Options
from fastprune.parallel import mean_over_processes, same_masks
from fastprune.surgery import Copies, shrink


@dataclass(frozen=True)
class IterativeOptions(Options):
    """``per_cut=0``: nothing is cut on the way, ``keep_masks()`` chooses once from the scores, by ``ratio``."""

    min_keep: int = 1
    per_cut: int = 0  # channels each cut removes, over the whole network
    frequency: int = 30  # optimizer steps between two cuts
    max_removed: int | None = None  # channels in all; None: the share `ratio` of those it can prune
    max_cuts: int | None = None
    momentum: float = 0.9  # of the scores from cut to cut; 0: each cut sees its own window only
    group_size: int = 1  # channels of a layer that are cut together, neighbours in the order of their scores
    start_after: int = 0  # steps before the first window
    loss_threshold: float | None = None  # a cut that is due is left out while the mean loss of its window is above
    only: str | None = None  # cut this group alone
    shrink_every: int = 10  # cuts between two physical removals of what they masked; 0: mask only


class IterativeMethod(Method):
    """A method whose channels have a criterion that is collected step by step, and cuts by it when due.

    Subclasses give ``units``, name to number of channels (the prunable groups, unless more can be silenced), and
    ``criterion``, (K,), float64, the channels of the units in order: higher = keep.  What a cut removed is zero at
    once, in the parameters and in the optimizer's state, and held at zero; nothing comes back.  With ``shrink_every``
    the model (and the optimizer's state) gets physically smaller, which gives the same masks but for rounding.  From
    then on ``keep_masks`` refers to the smaller model, ``survivors`` to the one the run started with.  With a target in
    MACs or parameters the first cut that reaches it is the last one.

    Under ``torch.distributed`` all processes call ``step`` alike: they average the criterion, so that all cut the same,
    which each cut checks.  ``DistributedDataParallel`` cannot follow a model that gets smaller: wrap the model anew
    whenever ``graph`` has become another object, as :func:`fastprune.train.fit` does, or set ``shrink_every=0``.
    """

    Options = IterativeOptions
    first_extra = 0  # steps that the first window is longer
    per_step = True  # the criterion belongs to a step; else it can be made at any time
    on_host = False  # the criterion is made between the steps, and not a part of one that is captured
    alike = False  # it is the same in all processes anyhow

    def prepare(self) -> None:
        self._sum: Tensor | None = None  # of the criterion since the last cut, for one cut at the end
        self._count = 0
        self._cuts_since_shrink = 0
        units = self.units()
        self._keep = {name: torch.ones(size, dtype=torch.bool) for name, size in units.items()}
        self._alive = {name: torch.arange(size) for name, size in units.items()}  # numbers in the original model
        self._sizes = dict(units)
        self.cuts = None
        if self.options.per_cut:
            if self.options.round_to is not None:
                raise ValueError(f"{self.name}: round_to is for one cut at the end; with per_cut take group_size")
            if self.budget is not None and self.budget.limit is None:
                raise ValueError(
                    f"{self.name}: with per_cut expected target_macs or target_params; a latency would have to be "
                    "measured after every cut"
                )
            floors = dict(zip(self.groups, self.limits().least.tolist(), strict=True))
            self.cuts = IterativeCuts(units, self._schedule(sum(units.values())), floors)
        self.finished = self.cuts is not None and (self.cuts.finished or self._within_budget())

    def _schedule(self, total: int) -> CutSchedule:
        o, limit = self.options, self.options.max_removed
        if limit is None and self.budget is not None:
            limit = total
        elif limit is None:
            if not isinstance(self.ratio, float | int):
                raise ValueError(f"{self.name}: with per_cut expected one ratio or max_removed, got ratio={self.ratio}")
            limit = int(self.ratio * total)
        return CutSchedule(
            frequency=o.frequency,
            per_cut=o.per_cut,
            max_removed=limit,
            max_cuts=o.max_cuts,
            momentum=o.momentum,
            group_size=o.group_size,
            start_after=o.start_after,
            loss_threshold=o.loss_threshold,
            only=o.only,
            min_keep=o.min_keep,
            first_extra=self.first_extra,
        )

    def units(self) -> dict[str, int]:
        """What is ranked: name to number of channels of the model as it is."""
        return {name: group.size for name, group in self.groups.items()}

    def criterion(self) -> Tensor:
        """Of this step, after the optimizer's step, (K,)."""
        raise NotImplementedError

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        ema: Copies = None,
    ) -> None:
        """As :meth:`Method.step`; ``ema``, averaged copies of the model, get smaller along with it, as by ``compact``.

        Raises:
            ValueError: An enabled ``scaler``, or no loss where ``loss_threshold`` wants it.
        """
        self.update()
        self.launch(optimizer, loss, scaler)
        self.advance(optimizer, ema=ema)

    def launch(
        self, optimizer: torch.optim.Optimizer, loss: Tensor | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        if scaler is not None and scaler.is_enabled():
            raise ValueError(
                f"{self.name}: its scores are made of gradients, which a GradScaler scales; use bfloat16 without one"
            )
        if self.options.loss_threshold is None or self.cuts is None:
            loss = None
        elif loss is None:
            raise ValueError(f"{self.name}: loss_threshold needs the loss; call step(optimizer, loss)")
        super().launch(optimizer)
        if self._collects and not self.on_host:
            self._collect()
        if self._collects and loss is not None:
            self.cuts.accumulate_loss(mean_over_processes(loss))

    def advance(self, optimizer: torch.optim.Optimizer, *, ema: Copies = None) -> None:
        super().advance(optimizer)
        if not self._collects:
            return
        if self.on_host:
            self._collect()
        if self.cuts is None:
            self._count += 1
            return
        self.cuts.count()
        if self.cuts.due:
            self._cut(self.cuts.cut(), optimizer, ema)

    def structure(self) -> tuple:
        total = None if self.cuts is None else self.cuts.totals
        return *super().structure(), self.finished, id(self._sum), *map(id, total or ())

    @property
    def _collects(self) -> bool:
        return not self.finished and (self.cuts is not None or self.per_step)

    @torch.no_grad()
    def _collect(self) -> None:
        """Take in the criterion of this step."""
        criterion = self.criterion() if self.alike else mean_over_processes(self.criterion())
        if self.cuts is not None:
            self.cuts.accumulate(criterion)
        else:
            self._sum = criterion.clone() if self._sum is None else self._sum.add_(criterion)

    def scores(self) -> dict[str, Tensor]:
        """Of the last cut, of all steps so far, or of now, (C,) float64 by group."""
        if self.cuts is not None:
            average = self.cuts.averaged
        elif self.per_step:
            average = None if self._sum is None else self._sum / self._count
        else:
            with torch.no_grad():
                average = self.criterion()
        if average is None:
            what = "cut" if self.cuts is not None else "step"
            raise ValueError(f"{self.name}: there are no scores before the first {what}; train with method.step")
        return {name: score for name, score in self._split(average).items() if name in self.groups}

    def keep_masks(self) -> dict[str, Tensor]:
        """With ``per_cut``: what the cuts left of the model as it is now; else chosen once from the scores."""
        if self.cuts is None:
            return super().keep_masks()
        return {name: self._keep[name].clone() for name in self.groups}

    def survivors(self) -> dict[str, Tensor]:
        """Per unit bool over the channels that the model had at the start, True = still there."""
        return {
            name: torch.zeros(self._sizes[name], dtype=torch.bool).index_fill_(0, alive[self._keep[name]], True)
            for name, alive in self._alive.items()
        }

    def parameters_left(self) -> int:
        """``nn.Parameter`` elements that stay once what was cut is removed."""
        return self.graph.parameters_after(self.model, self.keep_masks())

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._keep, values.split([len(k) for k in self._keep.values()]), strict=True))

    # Cutting

    @torch.no_grad()
    def _cut(self, keep: dict[str, Tensor], optimizer: torch.optim.Optimizer, ema: Copies) -> None:
        if not same_masks(keep.values(), next(self.model.parameters()).device):
            raise ValueError(f"{self.name}: the processes chose different channels; start all with the same weights")
        for name, mask in keep.items():
            self._keep[name] = mask.cpu()
        self._mask(optimizer)
        self._cuts_since_shrink += 1
        self.finished = self.cuts.finished or self._within_budget()
        if self.finished and self.budget is not None and not self._within_budget():
            warnings.warn(
                f"{self.name}: the schedule allows no further cut, though {self.budget.name} is not reached; see "
                "max_removed, max_cuts, group_size and only",
                stacklevel=3,
            )
        every = self.options.shrink_every
        if every and (self._cuts_since_shrink >= every or self.finished):
            self._shrink(optimizer, ema)
        if self.finished:
            self.after_last_cut(optimizer)

    def _within_budget(self) -> bool:
        return self.budget is not None and self.budget.reached({name: self._keep[name] for name in self.groups})

    def after_last_cut(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing will be cut any more."""

    def dead(self) -> dict[str, dict[int, Tensor]]:
        """Tensor name -> dim -> indices that stay, for all that the cuts so far set to zero."""
        return self.graph.kept({name: self._keep[name] for name in self.groups})

    @torch.no_grad()
    def _mask(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero what is cut, in model and optimizer, and see to it that it stays so."""
        self.graph.mask_(self.model, {name: self._keep[name] for name in self.groups})
        self.hold(self.masks(self.dead()), optimizer)

    def _shrink(self, optimizer: torch.optim.Optimizer, ema: Copies) -> None:
        keep = {name: self._keep[name] for name in self.groups if not self._keep[name].all()}
        self._cuts_since_shrink = 0
        if keep:
            compact(self.model, keep, self.example_inputs, optimizer=optimizer, ema=ema, graph=self.graph)
            self._follow(keep, optimizer)

    def _follow(self, keep: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Bring graph, groups and state in line with a model that was cut down to ``keep``.

        Without an optimizer it was cut down to a saved state, which brings its own ``cuts``.
        """
        owner = self.owners()
        self.graph = self.graph.after(keep)
        if self.budget is not None:
            self.budget.look_at(self.graph)
        self.groups = {name: self.graph.groups[name] for name in self.groups}
        stays = {name: keep[owner[name]] for name in self._keep if owner[name] in keep}
        for name, mask in stays.items():
            self._alive[name], self._keep[name] = self._alive[name][mask], self._keep[name][mask]
        if self.cuts is not None and optimizer is not None:
            self.cuts.shrink(stays)
        self.resized()
        self._mask(optimizer)

    def owners(self) -> dict[str, str]:
        """The group whose channels each unit has."""
        return {name: name for name in self._keep}

    def resized(self) -> None:
        """The model got smaller: sizes and indices taken from it are out of date."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"finished": self.finished, "count": self._count}
        state |= {"alive": _cloned(self._alive), "keep": _cloned(self._keep), "since_shrink": self._cuts_since_shrink}
        state |= {"sum": None if self._sum is None else self._sum.clone()}
        return state | {"cuts": None if self.cuts is None else self.cuts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also makes the model as small as it was; load its own state after this."""
        super().load_state_dict(state)
        gone = {}
        for name, alive in state["alive"].items():
            if name in self.groups and len(alive) != self.groups[name].size:
                gone[name] = torch.zeros(self.groups[name].size, dtype=torch.bool).index_fill_(0, alive, True)
        if gone:
            shrink(self.model, self.graph.kept(gone), None)
            self._follow(gone, None)
        self._alive, self._keep = _cloned(state["alive"]), _cloned(state["keep"])
        self._sum = None if state["sum"] is None else state["sum"].clone()
        self.finished, self._count, self._cuts_since_shrink = state["finished"], state["count"], state["since_shrink"]
        if self.cuts is not None:
            self.cuts.load_state_dict(state["cuts"])
        self._mask(None)


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in tensors.items()}
