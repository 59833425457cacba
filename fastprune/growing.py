"""How the coefficients of growing L2 regularisation develop, layer by layer: GReg-1, GReg-2, FixReg and TPP.

Pure bookkeeping on the host, in NumPy: it sees one magnitude per channel at each update and yields one coefficient per
channel.  The coefficient is an additional weight decay.

Sources: Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, arXiv:2012.09243; Wang and Fu,
"Trainability Preserving Neural Pruning", ICLR 2023, arXiv:2207.12534; both as their authors run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastprune.errors import did_you_mean

KINDS = ("greg-1", "greg-2", "fixed", "tpp")


@dataclass(frozen=True)
class Growth:
    """The schedule.  A coefficient is an extra weight decay; an update happens every ``update_interval`` steps.

    ``greg-1``: what is cut gets ``reg_step`` more at each update, until it exceeds ``reg_limit``, or every layer's
    magnitude ratio has reached ``ratio_limit``.  ``greg-2``: all get ``pick_step`` more until ``pick_limit``; then each
    layer picks what it cuts, which grows on by ``reg_step`` while the kept get ``kept_reg``; a layer stops by its own
    magnitude ratio.  ``fixed``: ``reg_limit`` at once, for ``fixed_steps`` steps.  ``tpp``: in closed form, and with
    any ``power`` of the steps, until ``reg_limit`` is reached when linear growth by ``reg_step`` reaches it.
    """

    kind: str
    update_interval: int = 10
    reg_step: float = 1e-4
    reg_limit: float = 1.0
    pick_step: float = 1e-5
    pick_limit: float = 1e-2
    kept_reg: float = -1e-4
    ratio_limit: float | None = 1000.0  # None: magnitudes are not looked at
    fixed_steps: int = 10000
    power: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Growth: unknown kind {self.kind!r}{did_you_mean(self.kind, KINDS)}")
        for name in ("update_interval", "power"):
            if getattr(self, name) < 1:
                raise ValueError(f"Growth: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("reg_step", "reg_limit", "pick_step", "pick_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Growth: {name} must be above 0, got {getattr(self, name)}")


class GrowingCoefficients:
    """Coefficients of all channels of all layers, concatenated: (K,).

    Call :meth:`update` when :meth:`due`; afterwards ``reg`` holds what to apply until the next update.

    Args:
        growth: The schedule.
        sizes: Layer to its number of channels.  Layers with nothing to cut are to be left out.
        cut: Bool (K,), True = to be removed; None with ``greg-2``, which picks for itself.
        dtype: Of the coefficients: NumPy's float32 or float64.  It matters: float32 sums of 1e-4 exceed 1.0 after
            10000 additions, float64 ones after 10001.

    Attributes:
        reg: (K,), the coefficient of each channel.
        cut: Bool (K,), None until picked.
        ratios: (layers,), the running mean (0.9 old + 0.1 new) of mean kept over mean cut magnitude; nan before the
            first update.
        finished_at: (layers,), step of the update that was a layer's last, -1 before.
        picked_at: Step of the update at which ``greg-2`` picked, -1 before.
    """

    def __init__(
        self, growth: Growth, sizes: Mapping[str, int], cut: np.ndarray | None = None, dtype: Any = np.float32
    ) -> None:
        self.growth, self.sizes, self.dtype = growth, dict(sizes), np.dtype(dtype).type
        if (cut is None) != (growth.kind == "greg-2"):
            raise ValueError(f"GrowingCoefficients: {growth.kind} {'needs' if cut is None else 'picks its own'} cut")
        self._layer = np.repeat(np.arange(len(sizes)), list(self.sizes.values()))  # of each channel
        self.level = np.zeros(len(sizes), self.dtype)  # coefficient of what is cut; of all before picking
        self.ratios = np.full(len(sizes), np.nan)
        self.finished_at = np.full(len(sizes), -1)
        self.picked_at = -1
        self.reg = np.zeros(len(self._layer), self.dtype)
        self.cut = None
        if cut is not None:
            self._set_cut(cut)

    def _set_cut(self, cut: np.ndarray) -> None:
        if cut.shape != self._layer.shape or cut.dtype != bool:
            raise ValueError(f"GrowingCoefficients: expected bool ({len(self._layer)},), got {cut.dtype} {cut.shape}")
        self.cut = cut

    @property
    def finished(self) -> bool:
        """No layer's coefficients change any more."""
        return bool((self.finished_at >= 0).all())

    def due(self, step: int) -> bool:
        """Whether ``update`` is to be called in ``step``, before the weights are updated."""
        return step % self.growth.update_interval == 0 and not self.finished

    def update(self, step: int, magnitudes: np.ndarray | None = None, picked: np.ndarray | None = None) -> None:
        """Let the coefficients grow.

        Args:
            step: Optimizer steps made so far.
            magnitudes: (K,), of the weights as they are; None if ``ratio_limit`` is.
            picked: With ``greg-2``, what would be cut if it were picked now, bool (K,).
        """
        g, growing = self.growth, self.finished_at < 0
        before = self.ratios.copy()
        if g.ratio_limit is not None:
            fresh = self._magnitude_ratios(magnitudes, self.cut if self.cut is not None else picked)
            mixed = np.where(np.isnan(before), fresh, 0.9 * before + 0.1 * fresh)
            self.ratios = np.where(growing, mixed, before)
        if g.kind == "tpp":
            last = g.update_interval * g.reg_limit / g.reg_step  # the step in which it reaches the limit
            self.level[growing] = g.reg_limit * (step / last) ** g.power
            done = self.level >= g.reg_limit
        elif g.kind == "fixed":
            self.level[growing] = g.reg_limit
            done = np.full(len(growing), step > g.fixed_steps)
        elif g.kind == "greg-1":
            self.level[growing] += self.dtype(g.reg_step)
            done = (self.level > g.reg_limit) | self._all_apart(before)
        elif self.cut is None:
            self.level += self.dtype(g.pick_step)
            self.reg[:] = self.level[self._layer]
            if self.level.max() >= g.pick_limit:  # what stays gets kept_reg with the next update
                self._set_cut(picked)
                self.picked_at = step
                whole = np.bincount(self._layer, picked, len(growing)) == 0
                self.reg[whole[self._layer]] = 0
                self.finished_at[whole | self._done_2()] = step
            return
        else:
            self.level[growing] += self.dtype(g.reg_step)
            done = self._done_2()
        kept = g.kept_reg if g.kind == "greg-2" else 0.0
        moves = growing[self._layer]  # a layer that has finished keeps what it has
        self.reg[moves] = np.where(self.cut, self.level[self._layer], self.dtype(kept))[moves]
        self.finished_at[growing & done] = step

    def _done_2(self) -> np.ndarray:
        g = self.growth
        apart = self.ratios >= g.ratio_limit if g.ratio_limit is not None else np.zeros(len(self.ratios), bool)
        return (self.level > g.reg_limit) | apart

    def _all_apart(self, before: np.ndarray) -> np.ndarray:
        """Whether every layer's ratio has reached the limit, as seen by each layer in its turn.

        The authors go through the layers one by one: a layer sees the new ratios of those before it and its own, and of
        those behind it what they were at the last update, if there was one.
        """
        if self.growth.ratio_limit is None:
            return np.zeros(len(before), bool)
        now = self.ratios >= self.growth.ratio_limit
        last = np.isnan(before) | (before >= self.growth.ratio_limit)
        behind = np.append(np.logical_and.accumulate(last[::-1])[::-1][1:], True)
        return np.logical_and.accumulate(now) & behind

    def _magnitude_ratios(self, magnitudes: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """Mean kept over mean cut magnitude, per layer."""
        count, layers = len(self.sizes), self._layer
        with np.errstate(divide="ignore", invalid="ignore"):
            means = [
                np.bincount(layers, magnitudes * chosen, count) / np.bincount(layers, chosen, count)
                for chosen in (~cut, cut)
            ]
            return np.where(np.isnan(means[1]), np.inf, means[0] / means[1])  # nothing cut: infinitely far apart

    def state_dict(self) -> dict[str, Any]:
        """All of it, in numbers, lists and strings."""
        return {
            "level": self.level.tolist(),
            "reg": self.reg.tolist(),
            "ratios": self.ratios.tolist(),
            "finished_at": self.finished_at.tolist(),
            "picked_at": self.picked_at,
            "cut": None if self.cut is None else self.cut.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue bit for bit.

        Raises:
            ValueError: The state is of other layers.
        """
        if len(state["reg"]) != len(self.reg) or len(state["level"]) != len(self.level):
            raise ValueError(
                f"GrowingCoefficients: expected the state of {len(self.reg)} channels in {len(self.level)} layers, "
                f"got {len(state['reg'])} in {len(state['level'])}"
            )
        self.level, self.reg = np.array(state["level"], self.dtype), np.array(state["reg"], self.dtype)
        self.ratios, self.finished_at = np.array(state["ratios"]), np.array(state["finished_at"], int)
        self.picked_at = state["picked_at"]
        self.cut = None if state["cut"] is None else np.array(state["cut"], bool)
