"""What a channel is really worth: the loss without it, and the derivatives of the loss by gates, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.correlation import kendall, pearson, spearman
from fastprune.errors import DataError
from fastprune.gates import GateSpec, find_gates
from fastprune.graph import trace
from fastprune.hessian import hessian_diagonal
from fastprune.nn import unfuse

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def explicit_gates(model: nn.Module, gates: Mapping[str, GateSpec], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply, while the context lasts, what the places of some gates return.

    Args:
        model: Without fused norms, see :func:`fastprune.nn.unfuse`: a gate multiplies what some module returns.
        gates: Found on this very model.
        values: Gate name to a factor per channel, (C,), or per sample and channel, (N, C); with or without autograd.
    """
    places: dict[str, list[tuple[GateSpec, int]]] = {}
    for name in values:
        for i, site in enumerate(gates[name].sites):
            places.setdefault(site.module, []).append((gates[name], i))

    def multiply(uses: list[tuple[GateSpec, int]], out: Tensor) -> Tensor:
        for gate, i in uses:
            site, value = gate.sites[i], values[gate.name]
            position, channel = (t.to(out.device) for t in site.index)
            factor = value.new_ones(*value.shape[:-1], site.width)
            factor = factor.index_copy(-1, position, value.index_select(-1, channel))
            out = out * factor.reshape(*factor.shape, *(1,) * (out.dim() - 2))
        return out

    handles = [
        model.get_submodule(module).register_forward_hook(lambda m, args, out, uses=uses: multiply(uses, out))
        for module, uses in places.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unfused(
    model: nn.Module, names: Sequence[str], example_inputs: Any, **options: bool
) -> tuple[nn.Module, dict[str, GateSpec]]:
    """A copy whose gates multiply the outputs of modules, and the gates of these names on it."""
    model = unfuse(copy.deepcopy(model))
    gates = find_gates(model, trace(model, example_inputs), **options)
    return model, {name: gates[name] for name in names}


class LossChanges(NamedTuple):
    """Loss without a channel minus loss with all, by gate.

    per_batch: (B, C), float64.
    mean: (C,), over all samples.
    """

    per_batch: dict[str, Tensor]
    mean: dict[str, Tensor]


@torch.no_grad()
def loss_without(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    loss: Loss = F.cross_entropy,
    example_inputs: Any = None,
    *,
    images: int = 1024,
    stem: bool = False,
    branches: bool = False,
) -> LossChanges:
    """Remove each channel by itself and see what the loss becomes, in eval mode, on a copy of the model.

    Several channels are tried in one forward: the batch is repeated, and each copy lacks another channel.

    Args:
        model: Left as it is.
        names: Gates, as :func:`fastprune.gates.find_gates` calls them.
        batches: (inputs, targets), on the model's device.
        loss: Mean over a batch of (outputs, targets).
        example_inputs: To trace the model; None: two samples of the first batch.
        images: At most so many samples in one forward.
        stem, branches: As in ``find_gates``.

    Raises:
        DataError: There are no batches.

    Source: the oracle of Molchanov et al., CVPR 2019, arXiv:1906.10771.
    """
    batches = _listed(batches)
    model, gates = unfused(model, names, _example(batches, example_inputs), stem=stem, branches=branches)
    model.eval()
    channels = [(name, c) for name, gate in gates.items() for c in range(gate.size)]
    rows = []
    for x, y in batches:
        full, changes, at_once = loss(model(x), y).double(), [], max(1, images // len(x))
        for start in range(0, len(channels), at_once):
            some = channels[start : start + at_once]
            values: dict[str, Tensor] = {}
            for j, (name, c) in enumerate(some):
                if name not in values:
                    values[name] = x.new_ones(len(some), len(x), gates[name].size)
                values[name][j, :, c] = 0
            with explicit_gates(model, gates, {name: v.flatten(0, 1) for name, v in values.items()}):
                out = model(x.repeat(len(some), *(1,) * (x.dim() - 1)))
            without = torch.vmap(loss, in_dims=(0, None))(out.unflatten(0, (len(some), len(x))), y)
            changes.append(without.double() - full)
        rows.append(torch.cat(changes))
    weights = torch.tensor([float(len(x)) for x, _ in batches], dtype=torch.float64, device=rows[0].device)
    table = torch.stack(rows)
    mean = (table * weights[:, None]).sum(0) / weights.sum()
    sizes = [gate.size for gate in gates.values()]
    return LossChanges(
        dict(zip(gates, table.split(sizes, dim=1), strict=True)), dict(zip(gates, mean.split(sizes), strict=True))
    )


def gate_hessian(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    loss: Loss = F.cross_entropy,
    example_inputs: Any = None,
    *,
    chunk: int = 64,
    stem: bool = False,
    branches: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First and second derivative of the loss by each gate, (C,) by gate; the second is the Hessian's exact diagonal.

    Evaluated in the model's mode (batch norm in training mode normalises by the batch, and the derivatives see it) on a
    copy; the mean over the batches.

    Args:
        chunk: Rows of the Hessian made together.
        Others as :func:`loss_without`.
    """
    batches = _listed(batches)
    model, gates = unfused(model, names, _example(batches, example_inputs), stem=stem, branches=branches)
    like = next(p for p in model.parameters() if p.is_floating_point())
    totals = None
    for x, y in batches:
        ones = {name: torch.ones(g.size, dtype=like.dtype, device=like.device) for name, g in gates.items()}
        values = {name: v.requires_grad_() for name, v in ones.items()}

        def evaluate(x=x, y=y, values=values) -> Tensor:
            with explicit_gates(model, gates, values):
                return loss(model(x), y)

        with torch.enable_grad():
            first = torch.autograd.grad(evaluate(), list(values.values()))
            second = hessian_diagonal(evaluate, list(values.values()), chunk)
        now = [t.detach() / len(batches) for t in (*first, *second)]
        totals = now if totals is None else [a + b for a, b in zip(totals, now, strict=True)]
    return dict(zip(gates, totals[: len(gates)], strict=True)), dict(zip(gates, totals[len(gates) :], strict=True))


def correlations(scores: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """How well ``scores`` rank channels as ``truth`` does: by group, and under ``"all"`` over all groups together.

    Returns: Group to ``{"spearman", "kendall", "pearson"}``, each from -1 to 1.
    """
    rows = {name: (scores[name], truth[name]) for name in truth}
    rows["all"] = tuple(torch.cat([side[name].cpu() for name in truth]) for side in (scores, truth))
    return {
        name: {f.__name__: float(f(a.cpu(), b.cpu())) for f in (spearman, kendall, pearson)}
        for name, (a, b) in rows.items()
        if len(a) > 1
    }


def _listed(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    batches = list(batches)
    if not batches:
        raise DataError("expected batches of (inputs, targets) to measure the loss on, got none")
    return batches


def _example(batches: list[tuple[Tensor, Tensor]], example_inputs: Any) -> Any:
    return batches[0][0][:2] if example_inputs is None else example_inputs
