"""Growing regularisation: an L2 penalty that grows until what is to go has gone (ICLR 2021, arXiv:2012.09243).

| name    | what gets the growing penalty                                                                         |
|---------|-------------------------------------------------------------------------------------------------------|
| greg-1  | the filters with the smallest mean absolute weight, chosen at the start                                |
| greg-2  | all filters, until the response separates them; then those with the smallest mean absolute weight,     |
|         | while the others get a small negative penalty                                                          |
| fix-reg | as greg-1, but the full penalty from the start: the baseline that growing is held against              |

A run has three phases: ``"grow"``, an update of the coefficients every ``update_interval`` steps; ``"stabilize"``,
``stabilize`` steps with the coefficients as they are; ``"done"``, what was chosen is zeroed and held at zero, ready for
:func:`fastprune.compact.compact`.  The coefficient is an additional weight decay: it acts on the gradient, behind the
loss, whatever the optimizer makes of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastprune.graph import Group
from fastprune.growing import GrowingCoefficients, Growth
from fastprune.methods.base import register
from fastprune.methods.magnitude import MagnitudeMethod, MagnitudeOptions, _enter
from fastprune.parallel import processes, same_in_all_processes
from fastprune.surgery import Copies


@dataclass(frozen=True)
class GrowingOptions(MagnitudeOptions):
    update_interval: int = 10  # steps between two updates of the coefficients; the authors take 5 on ImageNet
    stabilize: int = 10000  # steps with the final coefficients before the cut; the authors take 40000 on ImageNet
    reg_step: float = 1e-4  # what the coefficient grows by
    reg_limit: float = 1.0  # where it stops growing
    log_every: int = 0  # updates between two entries of ``log``; 0: none


@dataclass(frozen=True)
class GReg1Options(GrowingOptions):
    ratio_limit: float | None = 1000.0  # mean kept over mean cut magnitude at which growing may stop early


@dataclass(frozen=True)
class GReg2Options(GReg1Options):
    pick_step: float = 1e-5  # growth of all coefficients before the choice
    pick_limit: float = 1e-2  # coefficient at which the choice is made
    kept_reg: float = -1e-4  # of what stays, after the choice; the paper has minus the weight decay


@dataclass(frozen=True)
class FixRegOptions(GrowingOptions):
    fixed_steps: int = 10000


class GrowingMethod(MagnitudeMethod):
    """A method that drives what it will cut to zero before it cuts.

    Attributes:
        finished: Everything chosen is zero and held there.
        log: With ``log_every``: dicts of ``step``, ``level`` (layers,), the coefficient of what is cut, ``ratios``
            (layers,), the running magnitude ratios (nan with methods that do not look at them), and ``magnitudes``
            (K,), the mean absolute weight per channel (None with single weights).
    """

    Options = GrowingOptions
    kind: ClassVar[str] = "greg-1"
    picks_later: ClassVar[bool] = False
    _chosen: dict[str, Tensor] | None = None  # keep-masks, once they are final

    def prepare(self) -> None:
        super().prepare()
        o = self.options
        if o.stabilize < 0 or o.log_every < 0:
            raise ValueError(f"{self.name}: stabilize and log_every must not be negative")
        self.finished = False
        self.stable_since = -1  # step in which the coefficients stopped growing
        self.log: list[dict[str, Any]] = []
        self._grown = -1  # step of the last look at the coefficients
        self._compared = False  # with the other processes
        self._chosen = None if self.picks_later else self._choose_now()
        sizes, cut = self._growing_sizes()
        weights = self.weights.values() if self.by_weight else map(self._parameter, self.rows)
        wide = any(w.dtype == torch.float64 for w in weights)
        self.growth = GrowingCoefficients(
            self._schedule(), sizes, None if self.picks_later else cut, np.float64 if wide else np.float32
        )
        self._spread_coefficients()
        if self.growth.finished:  # nothing to cut
            self.stable_since = 0

    def _schedule(self) -> Growth:
        o = self.options
        names = Growth.__dataclass_fields__.keys() & o.__dataclass_fields__.keys()
        fields = {name: getattr(o, name) for name in names}
        if self.by_weight or "ratio_limit" not in fields:  # the authors do not look at the ratios of single weights
            fields["ratio_limit"] = None
        return Growth(self.kind, **fields)

    # What will be cut

    def _choose_now(self) -> dict[str, Tensor]:
        return self.weight_masks() if self.by_weight else super().keep_masks()

    def keep_masks(self) -> dict[str, Tensor]:
        """Per group bool (C,), True = keep; before ``greg-2`` has chosen, what it would choose now."""
        if self.by_weight:
            return super().keep_masks()
        chosen = self._chosen if self._chosen is not None else self._choose_now()
        return {name: mask.clone() for name, mask in chosen.items()}

    def weight_masks(self) -> dict[str, Tensor]:
        if self._chosen is None or not self.by_weight:
            return super().weight_masks()
        return {name: mask.clone() for name, mask in self._chosen.items()}

    def _growing_sizes(self) -> tuple[dict[str, int], np.ndarray]:
        """Layers that lose something, or may, with their sizes, and what goes; of single weights a number per fate."""
        chosen = self._chosen if self._chosen is not None else self._choose_now()
        # how many go is the same whenever a layer chooses for itself
        ranked_together = self.scope == "global" and isinstance(self.ratio, (int, float)) and self.ratio > 0
        ranked_together |= self.budget is not None
        if self.picks_later and ranked_together and self.pattern is None and not self._inherited:
            self._growing = list(chosen)
        else:
            self._growing = [name for name, mask in chosen.items() if not mask.all()]
        if self.by_weight:
            return dict.fromkeys(self._growing, 2), np.tile([True, False], len(self._growing))
        goes = np.concatenate([np.zeros(0, bool), *((~chosen[name]).numpy() for name in self._growing)])
        return {name: self.groups[name].size for name in self._growing}, goes

    # Coefficients

    def _spread_coefficients(self) -> None:
        """Make the tensors that hold the coefficients of each parameter; ``reg`` refers to them."""
        dtype = torch.from_numpy(self.growth.reg).dtype
        device = next(self.model.parameters()).device
        if self.by_weight:
            parameters = list(map(self.model.get_parameter, self._growing))
            flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=device)
            parts = flat.split([p.numel() for p in parameters])
            self._reg = {p: part.view(p.shape) for p, part in zip(parameters, parts, strict=True)}
            self._flat, self._keep_flat = flat, None
            return
        numbers: dict[tuple[str, int], np.ndarray] = {}
        base = 0
        for name in self._growing:
            group = self.groups[name]
            for key in self._regularised(group):
                _enter(numbers, self.model, group, key, base)
            base += group.size
        self._row_channel = np.concatenate([np.zeros(0, int), *numbers.values()])
        # and one more, the weight of a penalty, so that an update is one copy
        self._flat = torch.zeros(len(self._row_channel) + 1, dtype=dtype, device=device)
        *parts, last = self._flat.split([*(len(channel) for channel in numbers.values()), 1])
        self._penalty_factor = last.view(())
        self._reg = {}
        for (name, dim), part in zip(numbers, parts, strict=True):
            p = self.model.get_parameter(name)
            self._reg[p] = part.view([-1 if d == dim else 1 for d in range(p.dim())])

    def _penalty_weight(self) -> float:
        """What ``_penalty_factor`` holds on the device, where a captured step reads it."""
        return 0.0

    def _regularised(self, group: Group) -> list[tuple[str, int]]:
        """Dimensions of parameters whose entries along a channel get its coefficient."""
        return self._where(group)

    def _grow(self) -> None:
        """The update of this step, if one is due, once."""
        if self._grown == self.steps or self.finished:
            return
        self._grown = self.steps
        if not self.growth.due(self.steps):
            return
        magnitudes = picked = None
        every = self.options.log_every
        logged = every > 0 and self.steps // self.options.update_interval % every == 0
        if not self.by_weight and (self.growth.growth.ratio_limit is not None or self.picks_later or logged):
            magnitudes = self.magnitudes()
        if self.growth.cut is None:
            picked = self._tentative(magnitudes)
        if magnitudes is not None:
            magnitudes = self._of_growing(magnitudes)
        self.growth.update(self.steps, magnitudes, picked)
        if self.growth.picked_at == self.steps:
            self._chosen = self._choose_now()
        self._write_coefficients()
        if self.growth.finished:
            self.stable_since = self.steps
        if logged:
            entry = {"step": self.steps, "level": self.growth.level.tolist(), "ratios": self.growth.ratios.tolist()}
            self.log.append(entry | {"magnitudes": None if magnitudes is None else magnitudes.tolist()})

    def _of_growing(self, values: np.ndarray) -> np.ndarray:
        """(K,) over all groups to those that lose something."""
        parts = [values[self._bases[name] : self._bases[name] + self.groups[name].size] for name in self._growing]
        return np.concatenate([np.zeros(0), *parts])

    def _tentative(self, magnitudes: np.ndarray | None) -> np.ndarray:
        """What would be cut if it were chosen now."""
        if self.by_weight:
            return np.tile([True, False], len(self._growing))
        keep = self.choose_channels(magnitudes)
        return np.concatenate([np.zeros(0, bool), *(~keep[name] for name in self._growing)])

    @torch.no_grad()
    def _write_coefficients(self) -> None:
        if not self._growing:
            return
        if not self.by_weight:
            reg = np.append(self.growth.reg, self.growth.dtype(0))[self._row_channel]  # -1 finds the 0
            reg = torch.from_numpy(np.append(reg, self.growth.dtype(self._penalty_weight())))
            if self._flat.is_cuda:
                reg = reg.pin_memory()  # from there the copy waits for nothing
            self._flat.copy_(reg, non_blocking=True)
        elif self._chosen is None:
            self._flat.fill_(float(self.growth.level[0]))
        else:
            if self._keep_flat is None:
                self._keep_flat = torch.cat([self._chosen[name].flatten() for name in self._growing])
            cut, kept = self.growth.reg[:2].tolist()  # all layers alike: nothing stops one before the others
            self._flat.fill_(cut).masked_fill_(self._keep_flat, kept)
        self.reg = self._reg

    # A step

    @property
    def phase(self) -> str:
        """``"grow"``, ``"stabilize"`` or ``"done"``."""
        return "done" if self.finished else "grow" if self.stable_since < 0 else "stabilize"

    def update(self) -> None:
        super().update()
        if not self._compared:
            self._compare_processes()
        self._grow()

    def _compare_processes(self) -> None:
        """Once: processes that hold different channels at zero would train different networks."""
        self._compared = True
        if processes() == 1 or not self._chosen:
            return
        masks = torch.cat([mask.flatten().cpu() for mask in self._chosen.values()])
        if not same_in_all_processes(masks.to(next(self.model.parameters()).device, torch.uint8)):
            raise ValueError(
                f"{self.name}: the processes chose different channels; make the method after DistributedDataParallel, "
                "which gives all of them the same weights"
            )

    def advance(self, optimizer: torch.optim.Optimizer, *, ema: Copies = None) -> None:
        super().advance(optimizer)
        if self.phase == "stabilize" and self.steps - 1 - self.stable_since >= self.options.stabilize:
            self.reg = {}
            self.cut(optimizer)
            self.finished = True

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"finished": self.finished, "stable_since": self.stable_since}
        state |= {"growth": self.growth.state_dict(), "log": list(self.log)}
        chosen = None if self._chosen is None else {name: mask.clone() for name, mask in self._chosen.items()}
        return state | {"chosen": chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        mine = {name: mask.shape for name, mask in (self._chosen or self._choose_now()).items()}
        theirs = {name: mask.shape for name, mask in (state["chosen"] or {}).items()}
        if theirs and theirs != mine:
            odd = next(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
            here, there = (tuple(shapes.get(odd, ())) for shapes in (mine, theirs))
            raise ValueError(
                f"{self.name}: expected a state of this model's layers; {odd} has {here} channels here, {there} there"
            )
        self._chosen = None
        if state["chosen"] is not None:
            where = {name: w.device for name, w in self.model.named_parameters()} if self.by_weight else {}
            self._chosen = {name: mask.to(where.get(name, "cpu")) for name, mask in state["chosen"].items()}
        sizes, cut = self._growing_sizes()
        self.growth = GrowingCoefficients(self._schedule(), sizes, None if self.picks_later else cut, self.growth.dtype)
        self.growth.load_state_dict(state["growth"])
        self.finished, self.stable_since, self.log = state["finished"], state["stable_since"], list(state["log"])
        self._grown = -1
        self._spread_coefficients()
        if self.finished:
            self.cut()
        elif self.steps:
            self._write_coefficients()


@register("greg-1")
class GReg1(GrowingMethod):
    """Choose first, then push."""

    Options = GReg1Options


@register("greg-2")
class GReg2(GrowingMethod):
    """Push all, choose by the response, then push on."""

    Options = GReg2Options
    kind = "greg-2"
    picks_later = True


@register("fix-reg")
class FixReg(GrowingMethod):
    """Push at full strength from the start."""

    Options = FixRegOptions
    kind = "fixed"
