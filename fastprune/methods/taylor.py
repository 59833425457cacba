"""Importance by Taylor expansion: the eleven criteria of Molchanov et al., CVPR 2019, arXiv:1906.10771, and the oracle.

With g the gradient of a gate of value 1 on a channel (see :mod:`fastprune.gates`), :math:`g_n` its part from sample n,
H the Hessian's diagonal, and W, gamma, beta a filter and the scale and shift of its norm:

| id | name                   | criterion of a step (higher = keep)                                       |
|----|------------------------|---------------------------------------------------------------------------|
| 0  | taylor-weight          | sum over the filter of (W dW)^2                                           |
| 1  | taylor-random          | uniform noise                                                             |
| 2  | taylor-weight-norm     | sum W^2                                                                   |
| 3  | taylor-weight-abs      | sum abs(W)                                                                |
| 6  | taylor-output          | mean over samples of abs(mean over pixels of z dz), over the layer's norm |
| 10 | obd                    | H / 2                                                                     |
| 11 | taylor-gate-so         | (-g + H / 2)^2                                                            |
| 22 | taylor-gate            | g^2 = (sum_n g_n)^2                                                       |
| 23 | taylor-gate-persample  | sum_n g_n^2                                                               |
| 30 | bn-scale               | abs(gamma)                                                                |
| 31 | bn-taylor              | (gamma dgamma)^2                                                          |
| 40 | oracle                 | (change of the loss without the channel)^2                                |

Where several places or layers carry the channels of a group (the blocks of a residual stage), gate gradients are added
up before squaring, the other criteria after.

``variant="code"`` follows the authors' released code where it departs from the paper: 6 takes the absolute value before
the mean over pixels; 10 is H instead of H / 2; every criterion is divided by 3, that of the second and third skip gate
by the number of blocks of their stage (ResNet-34, 50 and 101; 3 in others), and gates also sit on what each block of
two 3x3 convolutions adds to its stream.  The paper divides that of a skip gate by its number of uses.  31 leaves out
the shift in both unless ``shift=True`` adds (beta dbeta)^2, as the paper means it.  0 and 31 use the weights of before
the optimizer's step, to which the gradients belong; theirs are from after it (the same without weight decay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.cutting import load_config
from fastprune.gates import GateSpec, GateStatistics, GateSums, find_gates
from fastprune.graph import ChannelGraph, Group
from fastprune.methods.base import IDS, create, register
from fastprune.methods.iterative import IterativeMethod, IterativeOptions
from fastprune.ops import filter_norm, gate_sums, weight_taylor
from fastprune.oracle import gate_hessian, loss_without

Batches = Iterable[tuple[Tensor, Tensor]]
VARIANTS = ("paper", "code")
# Blocks per stage of the networks whose skip gates the authors' code knows.
_STAGES = {(3, 4, 6, 3), (3, 4, 23, 3)}


@dataclass(frozen=True)
class TaylorOptions(IterativeOptions):
    coupled: bool = True  # residual streams, by skip gates
    stem: bool = False  # the convolution that reads the image, unless it is part of a stream
    variant: str = "paper"  # or "code"


class _Taylor(IterativeMethod):
    Options = TaylorOptions
    first_extra = 1

    @cached_property
    def gates(self) -> dict[str, GateSpec]:
        """All gates of the model; those of ``groups``, and branches, are ranked."""
        if self.options.variant not in VARIANTS:
            raise ValueError(f"{self.name}: variant must be 'paper' or 'code', got {self.options.variant!r}")
        found = find_gates(self.model, self.graph, stem=self.options.stem, branches=self._branches)
        kept = self.__dict__.get("groups")  # a second look, at the smaller model: no group joins
        return found if kept is None else {n: g for n, g in found.items() if n in kept or g.kind == "branch"}

    @property
    def _branches(self) -> bool:
        return self.options.variant == "code" and self.options.coupled

    def prunable(self, group: Group) -> bool:
        return group.name in self.gates

    def prepare(self) -> None:
        self.gates = {n: g for n, g in self.gates.items() if n in self.groups or g.kind == "branch"}
        super().prepare()
        self.resized()

    def units(self) -> dict[str, int]:
        return {name: gate.size for name, gate in self.gates.items()}

    def owners(self) -> dict[str, str]:
        inside = {norm: name for name, group in self.graph.groups.items() for norm in group.norms}
        return {name: inside[name] if gate.kind == "branch" else name for name, gate in self.gates.items()}

    def resized(self) -> None:
        del self.gates
        self._divisor = self._divisors()

    def dead(self) -> dict[str, dict[int, Tensor]]:
        plan, owners = super().dead(), self.owners()
        for name, gate in self.gates.items():
            if gate.kind == "branch" and not self._keep[name].all():
                position, channel = self.graph.groups[owners[name]].index[f"{name}.weight", 0]
                gone = position[~self._keep[name][channel]]
                for tensor, p in self.model.get_submodule(name).named_parameters(name):
                    dims = plan.setdefault(tensor, {})
                    stays = dims.get(0, torch.arange(len(p)))
                    dims[0] = stays[~torch.isin(stays, gone)]
        return plan

    def _divisors(self) -> Tensor | None:
        """(K,): what each criterion is divided by; None for 1 everywhere."""
        skips = [gate for gate in self.gates.values() if gate.kind == "skip"]
        by_name = dict.fromkeys(self.gates, 1)
        if self.options.variant == "code":
            by_name = dict.fromkeys(self.gates, 3)
            if tuple(len(gate.sites) for gate in skips) in _STAGES:
                by_name |= {gate.name: len(gate.sites) for gate in skips[1:3]}
        else:
            by_name |= {gate.name: len(gate.sites) for gate in skips}
        if set(by_name.values()) == {1}:
            return None
        sizes = torch.tensor([gate.size for gate in self.gates.values()])
        divisors = torch.tensor([float(by_name[name]) for name in self.gates], dtype=torch.float64)
        return divisors.repeat_interleave(sizes).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def criterion(self) -> Tensor:
        return self.measure() if self._divisor is None else self.measure() / self._divisor

    def measure(self) -> Tensor:
        """Before the divisor, (K,) float64."""
        raise NotImplementedError

    def after_last_cut(self, optimizer: torch.optim.Optimizer) -> None:
        """The authors start the optimizer's momentum anew once."""
        for state in optimizer.state.values():
            state.pop("momentum_buffer", None)


# Criteria of gates -----------------------------------------------------------------------------------------------


class _Gate(_Taylor):
    pixel_magnitudes = False

    def resized(self) -> None:
        if getattr(self, "_statistics", None) is not None:
            self._statistics.close()
        super().resized()
        self._statistics = GateStatistics(self.model, self.gates, pixel_magnitudes=self._pixels)
        if self.finished:
            self._statistics.close()

    @property
    def _pixels(self) -> bool:
        return self.pixel_magnitudes and self.options.variant == "code"

    def penalty(self) -> Tensor:
        return super().penalty() if self.finished else self._statistics.penalty()

    def after_last_cut(self, optimizer: torch.optim.Optimizer) -> None:
        self._statistics.close()
        super().after_last_cut(optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.finished:
            self._statistics.close()

    def measure(self) -> Tensor:
        sums = self._statistics.take()
        if sums is None:
            raise ValueError(
                f"{self.name}: step() without a backward of the model it was made for, so there are no gate gradients; "
                "for a copy of the model make a new method"
            )
        return self.reduce(sums)

    def reduce(self, sums: GateSums) -> Tensor:
        raise NotImplementedError


@register("taylor-gate", 22)
class TaylorGate(_Gate):
    """Square of the gate's gradient: the authors' best."""

    def reduce(self, sums: GateSums) -> Tensor:
        return sums.gradient.square()


@register("taylor-gate-persample", 23)
class TaylorGatePerSample(_Gate):
    """Sum over samples of the squared gradient."""

    def reduce(self, sums: GateSums) -> Tensor:
        return sums.squares


@register("taylor-output", 6)
class TaylorOutput(_Gate):
    """Mean magnitude of activation times gradient, normalised by layer (Molchanov et al., 2017, arXiv:1611.06440)."""

    pixel_magnitudes = True

    def resized(self) -> None:
        super().resized()
        sizes = [gate.size for gate in self.gates.values()]
        count = sum(sizes)
        # row per layer, padded with the zero behind the last channel
        rows = torch.full((len(sizes), max(sizes)), count)
        for row, values in zip(rows, torch.arange(count).split(sizes), strict=True):
            row[: len(values)] = values
        layers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self._rows, self._layer = rows.to(self._device), layers.to(self._device)
        self._padded = torch.zeros(count + 1, dtype=torch.float64, device=self._device)
        self._mean = self._padded[:-1]
        self._shape: tuple[list[int], int] | None = None

    def reduce(self, sums: GateSums) -> Tensor:
        if (shape := (self._statistics.pixels(), sums.samples)) != self._shape:
            self._shape = shape
            pixels = torch.tensor(shape[0], dtype=torch.float64, device=self._device)
            self._share = 1 / (shape[1] * pixels[self._layer])
        torch.mul(sums.pixel_magnitudes if self._pixels else sums.magnitudes, self._share, out=self._mean)
        norms = self._padded[self._rows].norm(dim=1)
        return self._mean / (norms + 1e-8)[self._layer]


# Criteria of weights and norms -----------------------------------------------------------------------------------


class _Parameters(_Taylor):
    """Of the weights of the convolutions, or of the norms, that write the channels."""

    def tensors(self, gate: GateSpec) -> list[tuple[str, int]]:
        """Name and dimension of what the criterion of a gate is made of."""
        return [(f"{conv}.weight", _rows(self.model.get_submodule(conv))) for conv in self._convs(gate)]

    def _convs(self, gate: GateSpec) -> list[str]:
        if gate.kind == "branch":
            return [conv for conv, norm in self.graph.norm_after.items() if norm == gate.name]
        return list(self.graph.groups[gate.name].convs)

    def resized(self) -> None:
        super().resized()
        named, owners = dict(self.model.named_parameters()), self.owners()
        self._tensors: list[Tensor] = []
        columns, channels, start, base = [], [], 0, 0
        for gate in self.gates.values():
            for name, dim in self.tensors(gate):
                index = self.graph.groups[owners[gate.name]].index[name, dim]
                columns.append(start + index.position)
                channels.append(base + index.channel)
                self._tensors.append(named[name])
                start += named[name].shape[dim]
            base += gate.size
        channel, order = torch.cat(channels).sort(stable=True)
        self._columns = torch.cat(columns)[order].to(self._device)
        self._offsets = F.pad(torch.bincount(channel, minlength=base).cumsum(0), (1, 0)).to(self._device)

    def add_up(self, rows: Tensor) -> Tensor:
        """From one value per row of all tensors to one per channel, in a fixed order."""
        return gate_sums(rows[None], self._columns, self._offsets)[0]


def _rows(conv: nn.Module) -> int:
    return 1 if getattr(conv, "transposed", False) else 0


class _Weights(_Parameters):
    def prunable(self, group: Group) -> bool:  # the ops take filters along dimension 0
        return super().prunable(group) and not any(_rows(self.model.get_submodule(conv)) for conv in group.convs)


@register("taylor-weight", 0)
class TaylorWeight(_Weights):
    """Products of weight and gradient, squared, summed over the filter."""

    def after_backward(self) -> None:
        self._now = self.add_up(weight_taylor(self._tensors))

    def measure(self) -> Tensor:
        return self._now


@register("taylor-weight-norm", 2)
class TaylorWeightNorm(_Weights):
    """Sum of the squared weights of the filter."""

    per_step = False
    kind = "sum_squares"

    def measure(self) -> Tensor:
        return self.add_up(filter_norm(self._tensors, self.kind))


@register("taylor-weight-abs", 3)
class TaylorWeightAbs(TaylorWeightNorm):
    """Sum of the magnitudes of the weights of the filter."""

    kind = "l1"


class _Norms(_Parameters):
    def prunable(self, group: Group) -> bool:
        return super().prunable(group) and all(self._norm(conv) for conv in group.convs)

    def _norm(self, conv: str) -> str | None:
        norm = self.graph.norm_after.get(conv)
        fits = norm is not None and isinstance(m := self.model.get_submodule(norm), _BatchNorm) and m.weight is not None
        return norm if fits else None

    def tensors(self, gate: GateSpec) -> list[tuple[str, int]]:
        return [(f"{self._norm(conv)}.weight", 0) for conv in self._convs(gate)]

    def hint(self, graph: ChannelGraph) -> str:
        return "its criterion is the scale of a batch norm behind each convolution"

    def resized(self) -> None:
        super().resized()
        self._modules = [
            self.model.get_submodule(name.rpartition(".")[0])
            for gate in self.gates.values()
            for name, _ in self.tensors(gate)
        ]


@register("bn-scale", 30)
class BNScale(_Norms):
    """Magnitude of the norm's scale."""

    per_step = False

    def measure(self) -> Tensor:
        scales = [getattr(m, "scale", m.weight) for m in self._modules]  # a bounded norm's is the sigmoid
        return self.add_up(torch.cat(scales).abs())


@dataclass(frozen=True)
class BNTaylorOptions(TaylorOptions):
    shift: bool = False  # add (beta dbeta)^2


@register("bn-taylor", 31)
class BNTaylor(_Norms):
    """Scale times its gradient, squared."""

    Options = BNTaylorOptions

    def after_backward(self) -> None:
        self._now = self.add_up(self._squares("weight"))
        if self.options.shift:
            self._now = self._now + self.add_up(self._squares("bias"))

    def _squares(self, name: str) -> Tensor:
        parameters = [getattr(m, name) for m in self._modules]
        if missing := [i for i, p in enumerate(parameters) if p is None or p.grad is None]:
            raise ValueError(f"{self.name}: a norm has no gradient of its {name} ({len(missing)} of {len(parameters)})")
        return (torch.cat(parameters) * torch.cat([p.grad for p in parameters])).square()

    def measure(self) -> Tensor:
        return self._now


@dataclass(frozen=True)
class RandomOptions(TaylorOptions):
    seed: int = 0


@register("taylor-random", 1)
class TaylorRandom(_Taylor):
    """Uniform noise: what every criterion must beat."""

    Options = RandomOptions
    per_step = False
    on_host = alike = True
    _device = torch.device("cpu")  # where cuts are chosen

    def measure(self) -> Tensor:
        # for the channels that the model had at the start, so that the draw does not depend on what is left of it
        generator = torch.Generator().manual_seed(self.options.seed + self.steps)
        noise = torch.rand(sum(self._sizes.values()), dtype=torch.float64, generator=generator)
        parts = zip(noise.split(list(self._sizes.values())), self._alive.values(), strict=True)
        return torch.cat([part[alive] for part, alive in parts])


# Criteria that need data of their own ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions(TaylorOptions):
    data: Batches | None = None  # batches of (inputs, targets), read anew for each evaluation
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy  # mean over the batch


class _OnData(_Taylor):
    """Evaluated on ``data``: when scores are asked for or, with ``per_cut``, at the first step of each window."""

    Options = DataOptions
    per_step = False
    on_host = True

    def prepare(self) -> None:
        if self.options.data is None:
            raise ValueError(f"{self.name}: expected data=batches of (inputs, targets) to evaluate on, got None")
        super().prepare()
        self._window: tuple[int, Tensor] | None = None

    def criterion(self) -> Tensor:
        if self.cuts is None:
            return super().criterion()
        if self._window is None or self._window[0] != self.cuts.windows:
            self._window = self.cuts.windows, super().criterion()
        return self._window[1]

    def _follow(self, keep: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        self._window = None
        super()._follow(keep, optimizer)

    def _join(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[name].double() for name in self.gates])


class Curvature(_OnData):
    """Made of the loss's first and second derivative by each gate."""

    def measure(self) -> Tensor:
        return self.combine(*self.derivatives())

    def derivatives(self) -> tuple[Tensor, Tensor]:
        """First and second, (K,) float64 each, the gates' channels in order."""
        gradients, hessians = gate_hessian(
            self.model, list(self.gates), self.options.data, self.options.loss, self.example_inputs,
            stem=self.options.stem, branches=self._branches,
        )  # fmt: skip
        return self._join(gradients), self._join(hessians)

    def combine(self, gradient: Tensor, hessian: Tensor) -> Tensor:
        raise NotImplementedError


@register("obd", 10)
class OBD(Curvature):
    """Optimal brain damage (LeCun et al., 1989): half the Hessian's diagonal, exactly."""

    def combine(self, gradient: Tensor, hessian: Tensor) -> Tensor:
        return hessian if self.options.variant == "code" else hessian / 2


@register("taylor-gate-so", 11)
class TaylorGateSecondOrder(Curvature):
    """Square of the second-order expansion of the loss without the channel."""

    def combine(self, gradient: Tensor, hessian: Tensor) -> Tensor:
        return (hessian / 2 - gradient).square()


@register("oracle", 40)
class Oracle(_OnData):
    """The change of the loss when the channel is removed, squared; ``variant="code"``: summed magnitudes by batch."""

    def measure(self) -> Tensor:
        changes = loss_without(
            self.model, list(self.gates), self.options.data, self.options.loss, self.example_inputs,
            stem=self.options.stem, branches=self._branches,
        )  # fmt: skip
        if self.options.variant == "code":
            return self._join({name: change.abs().sum(0) for name, change in changes.per_batch.items()})
        return self._join(changes.mean).square()


def from_config(
    config: str | Path | Mapping[str, Any], model: nn.Module, example_inputs: Any, **options: Any
) -> _Taylor:
    """Make the method that a configuration file of the authors' code asks for (``configs/*.json``, as it is).

    Args:
        config: Path of the JSON file, or a dict of its keys; see :func:`fastprune.cutting.load_config`.
        model, example_inputs: As in :func:`fastprune.create`.
        options: Further options of the method, such as ``variant="code"``, over those of the file.

    Raises:
        ValueError: A key is unknown, or asks for something that is not here.
    """
    number, schedule, seed = load_config(config)
    if number not in IDS:
        raise ValueError(f"from_config: expected a method of {sorted(IDS)}, got {number!r}")
    fields = ("frequency", "per_cut", "max_removed", "max_cuts", "momentum", "start_after", "loss_threshold", "only")
    options = {name: getattr(schedule, name) for name in fields} | options
    if IDS[number] == "taylor-random":
        options.setdefault("seed", seed)
    return create(number, model, example_inputs, **options)
