"""Gates: where a factor on every channel of a group would sit in a network, and the gradients it would get.

A gate is a factor of 1 on each channel of a group: behind the norm of a convolution inside a block, or, shared by all
blocks, at the end of every block that adds to a residual stream.  Its gradient says how much the loss would change if
the channel went away.  The factors are imagined: nothing is multiplied, the batch norm's own backward yields
S[n, c] = sum over pixels of dz z for each sample (see :func:`fastprune.ops.batch_norm_act`).  Where there is no norm of
ours, a probe on a module's output (:func:`fastprune.ops.channel_gate`) takes the sums; explicit
:class:`fastprune.nn.Gate` modules go before both.

Source: gates, Molchanov et al., CVPR 2019, arXiv:1906.10771; Theis et al., 2018, arXiv:1801.05787.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastprune.errors import GraphError
from fastprune.graph import ChannelGraph, Group, Index
from fastprune.nn import BatchNormAct2d, Gate
from fastprune.nn.convert import convert_plain
from fastprune.ops import channel_gate, gate_sums
from fastprune.parallel import mean_over_processes, processes


class Site(NamedTuple):
    """One place a gate is used at: the channels ``index.channel`` are at ``index.position`` of a module's output.

    ``behind`` is "norm" for a batch norm's output before residual and activation, "module" for what a module returns;
    ``width`` the number of channels there.
    """

    module: str
    behind: str
    width: int
    index: Index


@dataclass(frozen=True)
class GateSpec:
    """A gate on each channel of a group.

    Attributes:
        name: That of the group; for a branch the name of its norm.
        size: Number of channels.
        kind: "block": one place; "skip": the ends of the blocks on a residual stream; "branch": what one block adds to
            the stream, which can be silenced but not removed.
        sites: Where it is used; the gradient is the sum over them.
    """

    name: str
    size: int
    kind: str
    sites: tuple[Site, ...]


def find_gates(
    model: nn.Module, graph: ChannelGraph, *, stem: bool = False, branches: bool = False
) -> dict[str, GateSpec]:
    """Find the place of a gate for every group of channels.

    Args:
        model: The traced model.  An ``nn.BatchNorm2d`` that gets a gate becomes a ``BatchNormAct2d``, in place and with
            the same function.
        graph: Its channel graph.
        stem: Also the group that reads the network's input, unless it is a residual stream; the authors leave it alone.
        branches: Also what each block of two wide convolutions adds to its stream, as the authors have it in ResNet-34.

    Returns: Gate by name, in the order of the groups, branches last.  Groups without a place for a gate are left out:
        the module that returns them runs several times, or they lie along another dimension than 1.
    """
    explicit = [name for name, m in model.named_modules() if isinstance(m, Gate)]
    ends = [name for name, out in graph.outputs.items() if out.is_sum]
    gates = {}
    for group in graph.groups.values():
        coupled = sum(conv not in graph.factors for conv in group.convs) > 1
        kind = "skip" if coupled else "block"
        sites = _sites(model, graph, group, explicit, ends if coupled or group.depthwise else [])
        if not sites:
            continue
        if group.convs[0] in graph.stems and not stem and kind == "block" and sites[0].module not in explicit:
            continue
        gates[group.name] = GateSpec(group.name, group.size, kind, sites)
    if branches:
        for group in graph.groups.values():
            for conv in group.convs if group.coupled else ():
                norm, wide = graph.norm_after.get(conv), max(model.get_submodule(conv).weight.shape[2:], default=1) > 1
                if wide and conv not in graph.stems and norm in graph.outputs and _silenceable(model, norm):
                    gates[norm] = GateSpec(norm, group.size, "branch", (_site(model, graph, group, norm, True),))
    return gates


def _silenceable(model: nn.Module, norm: str) -> bool:
    """Whether zeros in scale and shift make the norm return zeros; a bounded scale would be 0.5."""
    module = model.get_submodule(norm)
    return getattr(module, "weight", None) is not None and getattr(module, "bound", None) is None


def _sites(
    model: nn.Module, graph: ChannelGraph, group: Group, explicit: list[str], ends: list[str]
) -> tuple[Site, ...]:
    for candidates in (explicit, ends):
        sites = [_site(model, graph, group, name, False) for name in candidates if name in graph.outputs]
        if found := tuple(site for site in sites if len(site.index.position)):
            return found
    # Each convolution that writes the channels, behind its norm where it has one.  Not those that only scale them; and
    # before a depthwise convolution the gradient would vanish, as the norm behind that takes any factor out again.
    writers = [conv for conv in group.convs if conv not in graph.factors] or group.convs
    if group.depthwise and len(writers) == 1:
        writers = [conv for conv in (*writers, *group.depthwise) if conv in graph.last] or writers
    sites = []
    for conv in writers:
        norm = graph.norm_after.get(conv, conv)
        name = norm if norm in graph.outputs else conv
        if name not in graph.outputs:
            return ()
        if name == conv:  # an activation in place behind it changes nothing about the gradient, but the tensor
            name = graph.outputs[conv].last
        sites.append(_site(model, graph, group, name, name == norm))
    return tuple(sites) if all(len(site.index.position) for site in sites) else ()


def _site(model: nn.Module, graph: ChannelGraph, group: Group, name: str, behind_norm: bool) -> Site:
    behind = "norm" if behind_norm and convert_plain(model.get_submodule(name)) else "module"
    channels = graph.outputs[name].channels
    return Site(name, behind, len(channels), group.where(channels))


class GateSums(NamedTuple):
    """What the gates got since the last :meth:`GateStatistics.take`, float64, (K,) each, gates in order.

    gradient: sum over samples (and uses) of the per-sample gradients.
    squares: sum over samples of their squares.
    magnitudes: sum over samples of their absolute values.
    pixel_magnitudes: sum over samples and pixels of abs(dz z); None unless asked for.
    samples: Number of samples; under data parallelism a scalar tensor.
    """

    gradient: Tensor
    squares: Tensor
    magnitudes: Tensor
    pixel_magnitudes: Tensor | None
    samples: int | Tensor


class GateStatistics:
    """Collects the gate gradients of a model, per sample, in every backward; two runs agree bit for bit.

    All norms write into one (N, T) buffer, and one launch at the end of the backward sums it: no activation is kept,
    nothing waits for the device, and the number of operators does not depend on the depth.

    Between two backwards the model runs once, all gates with one batch size, and each gets a gradient; else
    :meth:`take` says what is wrong.

    Args:
        model: Its modules get slots (those without a norm of ours a forward hook) until :meth:`close`,
            until it loses channels, or until it gets others from another GateStatistics.
        gates: From :func:`find_gates`.
        pixel_magnitudes: Also make the sums of abs(dz z), which costs arithmetic in the backward.
    """

    def __init__(self, model: nn.Module, gates: Mapping[str, GateSpec], *, pixel_magnitudes: bool = False) -> None:
        if not gates:
            raise ValueError("GateStatistics: expected at least one gate, got none")
        self.gates = dict(gates)
        self._parameters = [p for p in model.parameters() if p.is_floating_point()]
        self._modules: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._slot_of: dict[str, _Slots] = {}
        self._kinds = ("grad", "abs") if pixel_magnitudes else ("grad",)
        self._columns, self._offsets, self._width = self._plan(model)
        self._buffers: list[Tensor] = []  # (N, T), one per kind
        self._rows: dict[int, _Rows] = {}  # by batch size
        self._pending: _Rows | None = None  # written by a forward and backward since the last collect
        self._seen: dict[int, Any] = {}  # module number -> weak reference to what it got in the pending forward
        self._fault: str | None = None  # why the sums of the pending forward would be wrong
        self._sums: list[tuple[tuple[Tensor, ...], int]] = []  # of each backward, and its number of samples

    def _plan(self, model: nn.Module) -> tuple[Tensor, Tensor, int]:
        """Hand out columns to places; the columns of each gate's channels, as :func:`gate_sums` takes them."""
        places: dict[str, dict[str, tuple[int, int]]] = {}  # module -> argument -> first column and how many
        width, base, channels, columns = 0, 0, [], []
        for gate in self.gates.values():
            for site in gate.sites:
                mine = places.setdefault(site.module, {})
                if site.behind not in mine:
                    mine[site.behind] = (width, site.width)
                    width += site.width
                columns.append(mine[site.behind][0] + site.index.position)
                channels.append(base + site.index.channel)
            base += gate.size
        for module in model.modules():
            if (slots := getattr(module, "gate_slots", None)) is not None:
                slots.statistics.close()
        for name, mine in places.items():
            self._attach(name, model.get_submodule(name), mine)
        channel, order = torch.cat(channels).sort(stable=True)
        uses = torch.bincount(channel, minlength=base)
        offsets = torch.cat([uses.new_zeros(1), uses.cumsum(0)])
        device = self._parameters[0].device
        return torch.cat(columns)[order].to(device), offsets.to(device), width

    def _attach(self, name: str, module: nn.Module, places: dict[str, tuple[int, int]]) -> None:
        arguments = {"norm": "gate", "module": "gate"}
        if isinstance(module, BatchNormAct2d):
            arguments["module"] = "out"
        elif not isinstance(module, Gate):
            self._hooks.append(module.register_forward_hook(_probe))
        places = {arguments[behind]: at for behind, at in places.items()}
        self._slot_of[name] = module.gate_slots = _Slots(self, len(self._modules), places)
        self._modules.append(module)

    def close(self) -> None:
        """Take everything off the model again."""
        for handle in self._hooks:
            handle.remove()
        for module in self._modules:
            del module.gate_slots
        self._modules, self._hooks, self._pending, self._rows, self._buffers = [], [], None, {}, []

    def penalty(self) -> Tensor:
        """Zero, (), to be added to the loss: its backward makes the sums at the end of each backward.

        So several backwards between two :meth:`take` (gradient accumulation) add up.  Without it only the last counts.
        """
        # one that trains, for autograd.grad(loss, parameters) comes by no other leaf
        anchor = next((p for p in self._parameters if p.requires_grad), None)
        if anchor is None:
            anchor = self._parameters[0].new_zeros((), requires_grad=True)
        return _AtTheEnd.apply(anchor, self.collect)

    def collect(self) -> None:
        """Sum what the last backward wrote; nothing if there was none."""
        rows, self._pending = self._pending, None
        if rows is None:
            return
        sums = gate_sums(rows.buffers[0], self._columns, self._offsets)
        if len(self._kinds) > 1:
            sums = (*sums, gate_sums(rows.buffers[1], self._columns, self._offsets)[0])
        self._sums.append((sums, rows.samples))

    def take(self) -> GateSums | None:
        """The sums since the last call; None without a backward in between.

        Under ``torch.distributed`` all processes must call it: the sums are over their samples, for the mean of their
        losses.

        Raises:
            GraphError: :meth:`close` was called, the model lost channels since the gates were found or got another
                GateStatistics, or the forward was not as the class expects.
        """
        if not self._modules:
            raise GraphError(
                "GateStatistics: the model lost channels since its gates were found, or got others; find them again"
            )
        self.collect()
        taken, self._sums = self._sums, []
        fault, self._fault = self._fault, None
        if taken and fault:
            raise GraphError(f"GateStatistics: {fault}")
        if not taken:
            return None
        sums, samples = [_total(parts) for parts in zip(*(t[0] for t in taken), strict=True)], sum(t[1] for t in taken)
        if (world := processes()) > 1:
            sizes = [len(part) for part in sums]
            *sums, count = mean_over_processes(torch.cat([*sums, sums[0].new_full((1,), samples)])).split([*sizes, 1])
            sums[1] = sums[1] / world
            samples = count[0] * world
        return GateSums(*sums[:3], sums[3] if len(sums) > 3 else None, samples)

    def per_sample(self) -> Tensor:
        """Per-sample gradients of the last backward, (N, K), float32 or float64, if nobody has summed them yet."""
        if self._pending is None:
            raise ValueError("per_sample: expected a backward since the last collect, and penalty() not in its loss")
        taken = self._pending.buffers[0].index_select(1, self._columns)
        gate = torch.repeat_interleave(self._offsets.diff())
        return taken.new_zeros(len(taken), len(self._offsets) - 1).index_add_(1, gate, taken)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """(K,) values in the order of the gates, by gate."""
        return dict(zip(self.gates, values.split([gate.size for gate in self.gates.values()]), strict=True))

    def pixels(self) -> list[int]:
        """Of each gate: pixels of a channel at its first place in the last forward."""
        return [self._slot_of[gate.sites[0].module].pixels for gate in self.gates.values()]

    def _slots(self, slots: _Slots, x: Tensor) -> dict[str, Tensor]:
        """Buffers for one module in this forward.  The views are made once per batch size: no operator runs here."""
        if any(width != x.shape[1] for _, width in slots.places.values()):
            self.close()  # the model was compacted since; it trains on without us
            return {}
        slots.pixels = math.prod(x.shape[2:])
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # promote_types is an operator
        self._follow(slots.number, x, dtype)
        rows = self._rows.get(len(x))
        if rows is None or rows.buffers[0].dtype != dtype or rows.buffers[0].device != x.device:
            rows = self._grow(len(x), dtype, x.device)
        self._pending = rows
        views = rows.views.get(slots.number)
        if views is None:
            views = rows.views[slots.number] = {
                f"{argument}_{kind}": buffer[:, at : at + width]
                for argument, (at, width) in slots.places.items()
                for kind, buffer in zip(self._kinds, rows.buffers, strict=True)
            }
        return views

    def _follow(self, number: int, x: Tensor, dtype: torch.dtype) -> None:
        """Notice where a new forward begins, and what would make the sums wrong."""
        if torch._C._current_graph_task_id() != -1:
            return  # checkpointing runs a part of the forward again
        pending, before = self._pending, self._seen.get(number)
        if pending is None or before is not None:
            if pending is not None and before() is not None:  # not yet freed by a backward
                self._fault = "expected one forward per backward, got two; evaluate under no_grad"
            else:
                self._fault = None if not self._sums else self._fault
            if pending is not None and pending.samples != len(x):
                self._clear()  # a forward without a backward, or of which nobody wants the sums
            self._seen = {}
        elif (pending.samples, pending.buffers[0].dtype, pending.buffers[0].device) != (len(x), dtype, x.device):
            self._fault = (
                f"expected one batch size, dtype and device at all gates, got {pending.samples} "
                f"{pending.buffers[0].dtype} {pending.buffers[0].device} and {len(x)} {dtype} {x.device}"
            )
        self._seen[number] = weakref.ref(x)
        module = self._modules[number]
        if not (x.requires_grad or any(p.requires_grad for p in module.parameters(recurse=False))):
            self._fault = "a gate gets no gradient: all before it is frozen; let the network's input require one"

    def _grow(self, samples: int, dtype: torch.dtype, device: torch.device) -> _Rows:
        have = self._buffers[0] if self._buffers else None
        if have is None or len(have) < samples or have.dtype != dtype or have.device != device:
            self._buffers = [torch.zeros(samples, self._width, dtype=dtype, device=device) for _ in self._kinds]
            self._rows, self._pending = {}, None
            self._columns, self._offsets = self._columns.to(device), self._offsets.to(device)
        rows = self._rows[samples] = _Rows(samples, [buffer[:samples] for buffer in self._buffers], {})
        return rows

    def _clear(self) -> None:
        for buffer in self._buffers:
            buffer.zero_()


def _total(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class _Rows(NamedTuple):
    """The buffers as a batch of a certain size uses them."""

    samples: int
    buffers: list[Tensor]  # (samples, T) per kind
    views: dict[int, dict[str, Tensor]]  # by number of the module


@dataclass
class _Slots:
    """What a module calls for its buffers.  A copy of the module has none: it is another model's."""

    statistics: GateStatistics
    number: int
    places: dict[str, tuple[int, int]]
    pixels: int = 0

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        return self.statistics._slots(self, x)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def _nothing() -> None:
    return None


def _probe(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
    """Forward hook: let the backward take the sums on the way; nothing is kept that the next layer would not keep."""
    slots = getattr(module, "gate_slots", None)
    if slots is None or not torch.is_grad_enabled():
        return None
    return channel_gate(out, **slots(out))


class _AtTheEnd(torch.autograd.Function):
    """Zero whose backward calls a function when the whole backward is done."""

    @staticmethod
    def forward(ctx, anchor: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return anchor.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, None]:
        torch.autograd.Variable._execution_engine.queue_callback(ctx.function)
        return None, None
