"""From scores to keep-masks: the share to remove, ranked over the whole network or group by group.

Two rules by ratio.  :func:`keep_masks` cuts at a quantile of the scores: Receding Neuron Importances, arXiv
2204.06404, which is Network Slimming's (Liu et al., ICCV 2017, arXiv 1708.06519) with a floor of three channels per
layer.  :func:`pick` and :func:`pick_globally` remove a counted number of the lowest, highest or random ones: GReg,
arXiv 2012.09243, and TPP, arXiv 2207.12534.

A third one searches: :class:`Ranking` puts all channels into the order in which they go and finds how many have to,
for whatever must fit (see :mod:`fastprune.budget`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import did_you_mean

SCOPES = ("global", "local")
ORDERS = ("min", "max", "rand")
LIMITS = {"greg": lambda n: n - 1, "tpp": lambda n: int(0.995 * n)}  # the most that may go of n


class Limits(NamedTuple):
    """Widths that groups may get, int64 (G,) each: ``least`` channels or more, a multiple of ``step`` unless whole."""

    size: np.ndarray
    least: np.ndarray
    step: np.ndarray

    def allowed(self, n: np.ndarray) -> np.ndarray:
        """The nearest width that each group may get, the wider of two; never decreases with ``n``."""
        n = np.maximum(n, self.least)
        below = n // self.step * self.step
        above = np.minimum(below + self.step, self.size)
        return np.where((n == self.size) | (below < self.least) | (above - n <= n - below) & (n > below), above, below)

    def wider(self, n: np.ndarray) -> np.ndarray:
        """The next width after ``n``; ``size`` stays."""
        return np.minimum((n // self.step + 1) * self.step, self.size)


def limits(
    sizes: Mapping[str, int],
    min_keep: int,
    max_ratio: float | Mapping[str, float] | None = None,
    round_to: int | Mapping[str, int] | None = None,
) -> Limits:
    """The widths that each group may get.

    Args:
        sizes: Group name to its number of channels.
        min_keep: Channels that stay in every group; a smaller group stays whole.
        max_ratio: Largest share that may go, 0 <= max_ratio <= 1, of every group or by group name or glob pattern, the
            exact name before patterns, patterns in their order; None, or no match: no such limit.
        round_to: The number of kept channels is a multiple of it, unless all are kept, or the group has fewer; a dict
            by group name where it differs, see :func:`fastprune.budget.steps`.

    Raises:
        ValueError: A value out of range, or a pattern that matches no group.
    """
    if min_keep < 1:
        raise ValueError(f"keep_masks: min_keep must be at least 1, got {min_keep}")
    asked = max_ratio if isinstance(max_ratio, Mapping) else {} if max_ratio is None else {"*": max_ratio}
    for pattern, r in asked.items():
        if isinstance(r, bool) or not isinstance(r, Real) or not 0 <= r <= 1:
            raise ValueError(
                f"keep_masks: expected 0 <= max_ratio <= 1 (the most that may go) for {pattern!r}, got {r!r}"
            )
    most = _by_name(sizes, asked, 1.0) if isinstance(max_ratio, Mapping) else dict.fromkeys(sizes, asked.get("*", 1.0))
    steps = round_to if isinstance(round_to, Mapping) else dict.fromkeys(sizes, 1 if round_to is None else round_to)
    for step in steps.values():
        if isinstance(step, bool) or not isinstance(step, Integral) or step < 1:
            raise ValueError(f"keep_masks: round_to must be a whole number of at least 1, got {step!r}")
    size = np.array([*sizes.values()], np.int64)
    # 0.29 * 100 is 28.999999999999996
    floors = [max(min_keep, n - math.floor(most[name] * n + 1e-9)) for name, n in sizes.items()]
    step = np.array([steps.get(name, 1) for name in sizes], np.int64)
    return Limits(size, np.minimum(np.array(floors, np.int64), size), np.where(step <= size, step, 1))


def keep_masks(
    scores: Mapping[str, Tensor],
    ratio: float | Mapping[str, float],
    scope: str = "global",
    min_keep: int = 3,
    *,
    max_ratio: float | Mapping[str, float] | None = None,
    round_to: int | Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Choose the channels to keep.

    The threshold is the ``ratio`` quantile of all scores (``scope="global"``) or of the group's own (``"local"``), with
    NumPy's linear interpolation; a channel stays if its score is strictly greater.  The ``min_keep`` best channels of a
    group stay in any case; among equal scores the lower index does.  A ratio of 0 keeps everything.

    The authors' code compares ``>=`` when it counts the survivors and ``>`` when it keeps them, so that scores tied
    with the threshold can leave fewer than three; here the floor always holds.

    Args:
        scores: Group name to scores, (C,), any floating dtype and device; higher = keep.
        ratio: Share to remove, 0 <= ratio < 1.  Or a dict of ratios by group name or glob pattern, such as
            ``{"layer1.*": 0.5, "conv1": 0.2}``: then each group is ranked by itself whatever the scope, the exact name
            goes before patterns, patterns in their order, and a group that none matches is kept whole.
        scope: Rank all channels against each other, or each group's on its own.
        min_keep: Channels that stay in every group; a smaller group is kept whole.
        max_ratio: Largest share of a group that may go, one for all or by group name or glob pattern.
        round_to: Kept channels become the nearest multiple of it; see :func:`limits`.

    Returns: Group name to a bool vector, (C,), True = keep, on the device of its scores.

    Raises:
        ValueError: NaN scores, a ratio outside [0, 1), an unknown scope, or a name or pattern that matches no group.
    """
    if scope not in SCOPES:
        raise ValueError(f"keep_masks: unknown scope {scope!r}{did_you_mean(str(scope), SCOPES)}")
    ratios = _ratios(scores, ratio)
    for name, score in scores.items():
        if score.dim() != 1 or score.numel() == 0 or not score.is_floating_point():
            got = f"{score.dtype} {tuple(score.shape)}"
            raise ValueError(f"keep_masks: expected floating scores of shape (C,) for {name}, got {got}")
    bounds = limits({name: len(score) for name, score in scores.items()}, min_keep, max_ratio, round_to)
    if not scores:
        return {}

    # float64 holds every narrower score exactly, so that the threshold does not depend on the dtype
    exact = {name: score.detach().double() for name, score in scores.items()}
    device = next(iter(exact.values())).device
    everything = torch.cat([score.to(device) for score in exact.values()])
    if everything.isnan().any():  # the only synchronisation
        bad = next(name for name, score in exact.items() if score.isnan().any())
        raise ValueError(f"keep_masks: NaN scores in {bad}; a loss or a gradient overflowed")

    shared = None
    if scope == "global" and not isinstance(ratio, Mapping):
        shared = _quantile(everything.sort().values, ratio)
    keep = {}
    for i, (name, score) in enumerate(exact.items()):
        if ratios[name] == 0:
            keep[name] = torch.ones_like(score, dtype=torch.bool)
            continue
        ranked, order = score.sort(descending=True, stable=True)
        threshold = _quantile(ranked.flip(0), ratios[name]) if shared is None else shared.to(score.device)
        # the best come first, so keeping them too changes nothing unless too few pass
        position = torch.arange(len(score), device=score.device)
        stays = (ranked > threshold) | (position < int(bounds.least[i]))
        if bounds.step[i] > 1:
            stays = position < int(bounds.allowed(int(stays.sum()))[i])
        keep[name] = torch.empty_like(stays).scatter_(0, order, stays)
    return keep


def _quantile(ascending: Tensor, q: float) -> Tensor:
    """``numpy.quantile(ascending, q)``, rounding included; an infinite neighbour gives the lower value, not NaN."""
    at = (len(ascending) - 1) * q
    i = math.floor(at)
    t = at - i
    low, high = ascending[i], ascending[min(i + 1, len(ascending) - 1)]
    gap = high - low
    between = high - gap * (1 - t) if t >= 0.5 else low + gap * t
    return torch.where(gap.isfinite(), between, low)


def _ratios(scores: Mapping[str, Tensor], ratio: float | Mapping[str, float]) -> dict[str, float]:
    """The ratio of every group."""
    asked = ratio if isinstance(ratio, Mapping) else {"*": ratio}
    for pattern, r in asked.items():
        if not isinstance(r, Real) or not 0 <= r < 1:
            where = f" for {pattern!r}" if isinstance(ratio, Mapping) else ""
            raise ValueError(f"keep_masks: expected 0 <= ratio < 1{where} (the share removed), got {r!r}")
    return _by_name(scores, asked, 0.0) if isinstance(ratio, Mapping) else dict.fromkeys(scores, ratio)


def _by_name(names: Mapping[str, object], asked: Mapping[str, float], default: float) -> dict[str, float]:
    """What was asked for each name: exact names go before patterns, patterns in their order."""
    for pattern in asked:
        if pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"keep_masks: {pattern!r} matches no group{did_you_mean(pattern, names)}")
    return {
        name: asked[name] if name in asked else next((r for p, r in asked.items() if fnmatchcase(name, p)), default)
        for name in names
    }


class Ranking:
    """All channels of all groups in the order in which they go; in NumPy, for searches.

    With scope "global" the lowest value goes first; of equal ones that which ranks lower within its group, relative to
    the group's size, so that scores without any information give every layer the same share.  With "local" that
    relative rank is all that counts: every group loses the same share.

    Args:
        values: Group name to (C,), float; higher = keep, of equal ones within a group the lower index.
        scope: ``"global"`` or ``"local"``.
        tied: Lists of groups of one size that lose the same channels, those that are worst by the first one's values.

    Attributes:
        names: Of the groups.
        sizes: Their numbers of channels, int64 (G,).

    Raises:
        ValueError: NaN values, or an unknown scope.
    """

    def __init__(self, values: Mapping[str, np.ndarray], scope: str, tied: Sequence[Sequence[str]] = ()) -> None:
        if scope not in SCOPES:
            raise ValueError(f"keep_masks: unknown scope {scope!r}{did_you_mean(str(scope), SCOPES)}")
        for name, v in values.items():
            if np.isnan(v).any():
                raise ValueError(f"keep_masks: NaN scores in {name}; a loss or a gradient overflowed")
        self.names = list(values)
        self.sizes = np.array([len(v) for v in values.values()], np.int64)
        number = {name: i for i, name in enumerate(self.names)}
        self._leader = np.arange(len(self.names))
        for first, *others in tied:
            self._leader[[number[name] for name in others]] = number[first]
        ranks = {name: _rank(v) for name, v in values.items()}
        self._rank = np.concatenate([np.zeros(0, int), *(ranks[self.names[i]] for i in self._leader)])
        self._group = np.repeat(np.arange(len(self.names)), self.sizes)
        share = (self._rank + 0.5) / self.sizes[self._group]
        flat = np.concatenate([np.zeros(0), *values.values()]) if scope == "global" else np.zeros(len(share))
        leads = (self._leader == np.arange(len(self.names)))[self._group]
        order = np.lexsort((-share, flat))
        self._order = self._group[order[leads[order]]]  # group of each channel that goes
        self._place = np.full(len(flat), -1)
        self._place[order[leads[order]]] = np.arange(len(self._order))
        self._start = np.cumsum(self.sizes) - self.sizes

    def widths(self, gone: int) -> np.ndarray:
        """Channels that each group has left once the first ``gone`` of all are removed: int64 (G,)."""
        lost = np.bincount(self._order[:gone], minlength=len(self.names))
        return (self.sizes - lost)[self._leader]

    def stays(self, widths: np.ndarray) -> np.ndarray:
        """Bool over all channels, groups in their order: the best ``widths`` of each group."""
        return self._rank < widths[self._group]

    def masks(self, widths: np.ndarray) -> dict[str, np.ndarray]:
        """The same by group."""
        ends = self._start + self.sizes
        stays = self.stays(widths)
        return {name: stays[a:b] for name, a, b in zip(self.names, self._start, ends, strict=True)}

    def largest(self, limits: Limits, fits: Callable[[np.ndarray], bool]) -> np.ndarray | None:
        """Widths of the largest network that fits: as few channels go, in order, as must; None if none fits.

        Limits are applied to the widths behind each number of channels gone.  What they leave of the budget is then
        filled up, the best removed channels first, by at most one more step of each group.

        Args:
            limits: In the order of ``names``.
            fits: Whether a network of these widths, int64 (G,), fits; a narrower one of a fitting one must fit too.
        """
        low, high = 0, len(self._order)
        if not fits(limits.allowed(self.widths(high))):
            return None
        while low < high:
            middle = (low + high) // 2
            if fits(limits.allowed(self.widths(middle))):
                high = middle
            else:
                low = middle + 1
        widths = limits.allowed(self.widths(high))
        # the best removed channel of each group that leads and has lost any
        best = np.flatnonzero((self._rank == widths[self._group]) & (self._place >= 0))
        for i in best[np.argsort(-self._place[best])]:
            more = np.where(self._leader == self._group[i], limits.wider(widths), widths)
            if fits(more):
                widths = more
        return widths


def _rank(values: np.ndarray) -> np.ndarray:
    """0 for the highest value, of equal ones for the lower index: (C,)."""
    rank = np.empty(len(values), int)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return rank


def number_removed(ratio: float, size: int, limit: str = "greg") -> int:
    """How many of ``size`` channels or weights go at a ratio: ``min(ceil(ratio * size), most)``.

    ``most`` is ``size - 1`` for ``limit="greg"`` and ``int(0.995 * size)`` for ``"tpp"``.  The product is not rounded
    before the ceiling, as the published counts want it: ``0.07 * 100`` is 7.000000000000001, so 8 of 100 go.
    """
    if limit not in LIMITS:
        raise ValueError(f"number_removed: unknown limit {limit!r}{did_you_mean(str(limit), LIMITS)}")
    return min(math.ceil(_checked_ratio("number_removed", ratio) * size), LIMITS[limit](size))


def pick(
    scores: Tensor, ratio: float, order: str = "min", limit: str = "greg", seed: int = 42, min_keep: int = 1
) -> Tensor:
    """Choose the channels of one layer by number, as GReg and TPP do.

    Args:
        scores: (C,), any floating dtype and device; the authors' is the mean magnitude of each filter.
        ratio: Share to remove, 0 <= ratio < 1; :func:`number_removed` says how many that is.
        order: ``"min"`` removes the lowest scores, ``"max"`` the highest, ``"rand"`` the first channels of
            ``np.random.RandomState(seed).permutation(C)`` whatever their scores: layers of one width lose the same
            ones.  Among equal scores "min" removes the lower index and "max" the higher.
        limit: Most that may go: ``"greg"`` or ``"tpp"``.
        seed: Of ``order="rand"``.
        min_keep: Channels that stay in any case; a smaller layer is kept whole.

    Returns: A bool vector, (C,), True = keep, on the device of ``scores``.

    Raises:
        ValueError: NaN scores, wrong shape or dtype, a ratio outside [0, 1), an unknown order or limit.

    Source: Wang et al., ICLR 2021, arXiv:2012.09243; Wang and Fu, ICLR 2023, arXiv:2207.12534.
    """
    _check_scores("pick", {"scores": scores}, order)
    most = max(0, len(scores) - min_keep)
    removed = _ranked(scores, order, seed)[: min(number_removed(ratio, len(scores), limit), most)]
    return torch.ones_like(scores, dtype=torch.bool).index_fill_(0, removed, False)


def pick_array(
    scores: np.ndarray, ratio: float, order: str = "min", limit: str = "greg", seed: int = 42, min_keep: int = 1
) -> np.ndarray:
    """:func:`pick` for scores that are on the host, (C,) -> bool (C,), without a call of PyTorch."""
    if np.isnan(scores).any():
        raise ValueError("pick: NaN scores; a loss or a gradient overflowed")
    count = min(number_removed(ratio, len(scores), limit), max(0, len(scores) - min_keep))
    keep = np.ones(len(scores), bool)
    keep[ranked_array(scores, order, seed)[:count]] = False
    return keep


def pick_arrays_globally(
    scores: Mapping[str, np.ndarray], ratio: float, order: str = "min", min_keep: int = 1, seed: int = 42
) -> dict[str, np.ndarray]:
    """:func:`pick_globally` for scores that are on the host, each (C,), without a call of PyTorch."""
    sizes = [len(score) for score in scores.values()]
    together = np.concatenate([np.zeros(0), *scores.values()])
    if np.isnan(together).any():
        bad = next(name for name, score in scores.items() if np.isnan(score).any())
        raise ValueError(f"pick_globally: NaN scores in {bad}; a loss or a gradient overflowed")
    ranked, group_of = ranked_array(together, order, seed), np.repeat(np.arange(len(sizes)), sizes)
    floor = np.zeros(len(together), bool)
    for i in range(len(sizes)):
        floor[ranked[group_of[ranked] == i][-min_keep:]] = True
    keep = np.ones(len(together), bool)
    keep[ranked[~floor[ranked]][: math.ceil(ratio * len(together))]] = False
    return dict(zip(scores, np.split(keep, np.cumsum(sizes)[:-1]), strict=True))


def ranked_array(scores: np.ndarray, order: str, seed: int) -> np.ndarray:
    """Indices in the order in which they go."""
    if order == "rand":
        return np.random.RandomState(seed).permutation(len(scores))
    lowest_first = np.argsort(scores, kind="stable")
    return lowest_first if order == "min" else lowest_first[::-1]


def pick_globally(
    scores: Mapping[str, Tensor], ratio: float, order: str = "min", min_keep: int = 1, seed: int = 42
) -> dict[str, Tensor]:
    """Choose the channels of all layers together: ``ceil(ratio * total)`` go, ranked against each other.

    In every group the ``min_keep`` channels that would go last stay, and others go in their place; only if these
    floors leave too few does less go than asked.

    Args:
        scores: Group name to scores, (C,), on one device.
        ratio: Share of all channels to remove, 0 <= ratio < 1.
        order: As in :func:`pick`; ties are broken by the order of the groups, then as there.
        min_keep: Channels that stay in every group; a smaller group is kept whole.
        seed: Of ``order="rand"``.

    Returns: Group name to a bool vector, (C,), True = keep.

    Raises:
        ValueError: As :func:`pick`, or ``min_keep`` below 1.
    """
    if min_keep < 1:
        raise ValueError(f"pick_globally: min_keep must be at least 1, got {min_keep}")
    _check_scores("pick_globally", scores, order)
    if not scores:
        return {}
    sizes = [len(score) for score in scores.values()]
    # float64 holds every narrower score exactly, so that layers of different dtypes can be ranked
    ranked = _ranked(torch.cat([score.detach().double() for score in scores.values()]), order, seed)
    group_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(ranked.device)
    floor = torch.zeros(sum(sizes), dtype=torch.bool, device=ranked.device)
    for i in range(len(sizes)):
        floor[ranked[group_of[ranked] == i][-min_keep:]] = True
    removed = ranked[~floor[ranked]][: math.ceil(_checked_ratio("pick_globally", ratio) * sum(sizes))]
    keep = torch.ones(sum(sizes), dtype=torch.bool, device=ranked.device).index_fill_(0, removed, False)
    return dict(zip(scores, keep.split(sizes), strict=True))


def _ranked(scores: Tensor, order: str, seed: int) -> Tensor:
    """Indices in the order in which they go."""
    if order == "rand":
        return torch.from_numpy(np.random.RandomState(seed).permutation(len(scores))).to(scores.device)
    lowest_first = scores.detach().sort(stable=True).indices
    return lowest_first if order == "min" else lowest_first.flip(0)


def _checked_ratio(who: str, ratio: float) -> float:
    if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(f"{who}: expected 0 <= ratio < 1 (the share removed), got {ratio!r}")
    return ratio


def _check_scores(who: str, scores: Mapping[str, Tensor], order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"{who}: unknown order {order!r}{did_you_mean(str(order), ORDERS)}")
    for name, score in scores.items():
        if score.dim() != 1 or not score.is_floating_point():
            got = f"{score.dtype} {tuple(score.shape)}"
            raise ValueError(f"{who}: expected floating scores of shape (C,) for {name}, got {got}")
    if scores and torch.cat([score.isnan() for score in scores.values()]).any():  # the only synchronisation
        bad = next(name for name, score in scores.items() if score.isnan().any())
        raise ValueError(f"{who}: NaN scores in {bad}; a loss or a gradient overflowed")
