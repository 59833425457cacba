"""Carrying channel labels through the ops of a forward pass: the tracer, and one rule per kind of op.

A label is an integer that names one index of one dimension of one parameter or buffer; :mod:`fastprune.graph` says
what becomes of them.  Every labelled tensor has at most one vector of labels per axis.  An op whose rule is missing, or
fails, freezes the labels that reach it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune.surgery import map_tensors


class Row(NamedTuple):
    """The labels ``start .. start + size - 1`` are the indices of dimension ``dim`` of the tensor called ``name``."""

    name: str
    dim: int
    start: int
    size: int


WEIGHT, COMPUTED, DATA, NOISE = "weight", "computed", "data", "noise"


@dataclass
class Marks:
    """What the tracer knows of a tensor; kept as an attribute of the tensor, so it lives exactly as long.

    axes: axis -> labels along it, int64, (size of the axis,).  Axes of size 1 and axes not followed are absent.
    kind: WEIGHT: stored, possibly moved or scaled, so a masked index is exactly zero.  COMPUTED: made from weights in
        another way, where it need not be.  DATA: depends on the input.  NOISE: random numbers, of whatever shape the
        tensor they meet has (the masks of channel-wise dropout).
    used: some op has read it.
    is_sum: the sum of two activations, as at the end of a residual block, or a pointwise function of one.
    squashed: a sigmoid of something, as the factors of squeeze and excitation.
    """

    axes: dict[int, Tensor]
    kind: str
    used: bool = False
    is_sum: bool = False
    squashed: bool = False


UNMARKED = Marks({}, COMPUTED)
ATTRIBUTE = "_fastprune_marks"


class Call:
    """One op as it ran.

    Attributes:
        name: Qualified name without overload, such as "aten::add".
        ins: The tensors among its arguments, in order, lists flattened.
        outs: The tensors it returned.
    """

    def __init__(self, func: Any, args: tuple, kwargs: dict, out: Any):
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out
        self.name: str = func._schema.name
        self.ins = _flat(args) + _flat(kwargs.values()) if kwargs else _flat(args)
        self.outs = [out] if isinstance(out, Tensor) else _flat(out) if isinstance(out, (tuple, list)) else []

    def arg(self, name: str, default: Any = None) -> Any:
        """Value of the schema argument ``name``, or ``default`` if the op was called without it or has none."""
        if name in self.kwargs:
            return self.kwargs[name]
        i = _positions(self.func).get(name, len(self.args))
        return self.args[i] if i < len(self.args) else default


@cache
def _positions(func: Any) -> dict[str, int]:
    return {a.name: i for i, a in enumerate(func._schema.arguments)}


def _flat(values: Any) -> list[Tensor]:
    flat = []
    for v in values:
        if isinstance(v, Tensor):
            flat.append(v)
        elif isinstance(v, (tuple, list)):
            flat += [t for t in v if isinstance(t, Tensor)]
    return flat


Rule = Callable[["Tracer", Call], None]


class Tracer(TorchDispatchMode):
    """Carries labels through the ops of a forward pass and collects the equalities.  Rules call its public methods."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would wrap our handler to keep the compiler out of it, and import the compiler, a second, for that
        return False

    def __init__(self, strict: bool):
        super().__init__()
        self.strict = strict
        self.stored: dict[str, Tensor] = {}
        self.foreign: list[Tensor] = []  # others that outlive the forward and carry marks, such as step counters
        self.rows: list[Row] = []
        self.starts: list[int] = []  # of the rows
        self.next_label = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (K,) each: labels that must be equal
        self.reasons: dict[int, str] = {}  # a label of its own for every act of freezing -> why
        self.constants: dict[int, str] = {}  # the same for channels that are none, such as padding
        self.roles: dict[tuple[str, int], None] = {}  # (role, row number), in order of the forward
        self.norm_after: dict[int, int] = {}  # row number of a producer -> row number of the norm's parameter
        self.norm_means: set[int] = set()
        self.outputs: dict[str, list[tuple[Tensor, bool, Marks] | None]] = {}  # by module, one entry a call
        self.assumed = False  # that some view or split gets its sizes from the tensor
        self.unknown: dict[str, str] = {}  # op -> what is the matter with it

    # Setting up

    def add(self, name: str, t: Tensor, dims: int) -> None:
        """Give each index of the first ``dims`` dimensions of a parameter or buffer a label of its own."""
        axes = {}
        for dim, size in enumerate(t.shape[:dims]):
            if size > 1:
                axes[dim] = torch.arange(self.next_label, self.next_label + size)
                self.rows.append(Row(name, dim, self.next_label, size))
                self.starts.append(self.next_label)
                self.next_label += size
        self.stored[name] = t
        setattr(t, ATTRIBUTE, Marks(axes, WEIGHT))

    def add_input(self, t: Tensor) -> None:
        """Declare a tensor an input of the model."""
        setattr(t, ATTRIBUTE, Marks({}, DATA))

    def finish(self) -> set[str]:
        """Take the marks off what stays behind.  Returns: names of parameters and buffers that no op has read."""
        unread = {name for name, t in self.stored.items() if not self._marks(t).used}
        for t in (*self.stored.values(), *self.foreign):
            t.__dict__.pop(ATTRIBUTE, None)
        return unread

    # For rules

    def output(self, name: str, out: Any) -> None:
        """Note what a module returned: the labels of its channels, and whether it is the end of a residual block."""
        marks = getattr(out, ATTRIBUTE, None)
        channels = marks.axes.get(1) if marks is not None and out.dim() > 1 else None
        # marks live as long as their tensor, and here longer: the same marks are the same tensor
        self.outputs.setdefault(name, []).append(None if channels is None else (channels, marks.is_sum, marks))

    def axes(self, t: Tensor) -> dict[int, Tensor]:
        """Labels of ``t``: axis -> int64 vector, one label per index.  Axes that are not followed are absent."""
        return self._marks(t).axes

    def kind(self, t: Tensor) -> str:
        """WEIGHT, COMPUTED, DATA or NOISE."""
        return self._marks(t).kind

    def label(self, t: Tensor, axes: dict[int, Tensor | None]) -> None:
        """Set the labels of an op's output; None and axes of size 1 are dropped."""
        marks = getattr(t, ATTRIBUTE)
        marks.axes = {a: v for a, v in axes.items() if v is not None and t.shape[a] > 1}

    def equal(self, a: Tensor, b: Tensor) -> None:
        """The labels ``a`` and ``b`` (broadcast against each other) live or die together."""
        if a.dim() > 1 or a.shape != b.shape:
            a, b = (t.reshape(-1) for t in torch.broadcast_tensors(a, b))
        self.pairs.append((a, b))

    def freeze(self, labels: Tensor | None, why: str) -> None:
        """These labels can never be removed."""
        if labels is not None:
            self.reasons[self.next_label] = why
            self.equal(labels, torch.tensor([self.next_label]))
            self.next_label += 1

    def freeze_all(self, tensors: list[Tensor], why: str) -> None:
        """No label of these tensors can ever be removed."""
        for t in tensors:
            for labels in self.axes(t).values():
                self.freeze(labels, why)

    def constant(self, size: int, why: str) -> Tensor:
        """Labels for ``size`` indices that never go away, such as padding channels: (size,)."""
        self.constants[self.next_label] = why
        self.next_label += 1
        return torch.full((size,), self.next_label - 1)

    def tie(self, *ends: tuple[Tensor | None, int], why: str = "") -> Tensor | None:
        """Equate the labels along one axis each of several tensors; freeze them if one of the tensors has none there.

        Returns: The labels of the first labelled end, or None.
        """
        found, bare = [], False
        for t, axis in ends:
            if t is not None and t.shape[axis] > 1:
                labels = self.axes(t).get(axis % t.dim())
                bare |= labels is None
                if labels is not None:
                    found.append(labels)
        for labels in found[1:]:
            self.equal(found[0], labels)
        if not found:
            return None
        if bare:
            self.freeze(found[0], why or "it meets the model's input or a constant of fixed size")
        return found[0]

    def move(
        self, call: Call, run: Callable[[Tensor], Any], *, free: int | None = None, skip: Set[int] = frozenset()
    ) -> None:
        """Carry labels through data movement: ``run`` does to a tensor of labels what the op did to its first argument.

        An axis that ends up spread over several (channels viewed as (groups, channels / groups)) must stay rectangular
        to be viewed back, so the labels are tied along all of them but one: ``free``, by default the longest, since
        short ones (groups, radix, heads) are written into the code as numbers.  Axes in ``skip`` are not carried.
        """
        x, axes = call.ins[0], [{} for _ in call.outs]
        for axis, labels in self.axes(x).items():
            if axis in skip:
                continue
            spread = labels.view([-1 if d == axis else 1 for d in range(x.dim())]).expand(x.shape)
            moved = run(spread)
            for mine, full in zip(axes, [moved] if isinstance(moved, Tensor) else moved, strict=True):
                at, vector = self._settle(full, free)
                if at is None:
                    self.freeze(vector, "the model ties all its channels into one")
                elif at in mine:
                    self.freeze(vector, f"two kinds of channels share an axis after {call.name}")
                    self.freeze(mine[at], f"two kinds of channels share an axis after {call.name}")
                else:
                    mine[at] = vector
        for t, mine in zip(call.outs, axes, strict=True):
            self.label(t, mine)

    def role(self, role: str, labels: Tensor | None) -> int:
        """Note what an op does with a parameter dimension.

        "producer", "consumer", "depthwise", "norm", "stem"; "factor": its outputs scale other channels; "last": its
        outputs come, possibly through a norm and pointwise ops, to a consumer.
        """
        row = -1 if labels is None else self.row(labels)
        if row >= 0:
            self.roles[role, row] = None
        return row

    def row(self, labels: Tensor) -> int:
        """Number of the row the labels belong to; -1 if they come from several."""
        first, last = int(labels[0]), int(labels[-1])
        row = bisect_right(self.starts, first) - 1
        return row if row >= 0 and last < self.rows[row].start + self.rows[row].size else -1

    # Inside

    def _marks(self, t: Tensor) -> Marks:
        return getattr(t, ATTRIBUTE, UNMARKED)

    def _settle(self, full: Tensor, free: int | None) -> tuple[int | None, Tensor]:
        """The one axis along which a tensor of labels varies, and its labels; ties the others."""
        varying = []
        for d in range(full.dim()):
            first = full.narrow(d, 0, 1)
            if full.shape[d] == 1 or full.stride(d) == 0 or torch.equal(full, first.expand_as(full)):
                full = first
            else:
                varying.append(d)
        if not varying:
            return None, full.reshape(-1)
        kept = free if free in varying else max(varying, key=lambda d: (full.shape[d], d))
        for d in varying:
            if d != kept:
                first = full.narrow(d, 0, 1)
                if self.strict and free is None:
                    self.freeze(full, "a view takes its channel axis apart, by numbers that may be fixed")
                else:
                    self.assumed |= free is None
                    self.equal(full, first)
                full = first
        return kept, full.reshape(-1)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, out)
        rule, kinds, followed = _rule_of(func), set(), False
        for t in call.ins:
            marks = self._marks(t)
            marks.used = True
            kinds.add(marks.kind)
            followed |= bool(marks.axes)
        kind = self._kind_of(call, rule, kinds, followed)
        for t in call.outs:
            known = getattr(t, ATTRIBUTE, None)
            if known is None:
                setattr(t, ATTRIBUTE, Marks({}, kind))
                if any(t is given for given in call.ins):  # changed in place, and not made while we watched
                    self.foreign.append(t)
            else:  # an in-place op
                known.kind = kind
        if followed:
            self._apply(rule, call)
            is_sum, squashed = self._is_sum(rule, call), self._is_squashed(rule, call)
            for t in call.outs:
                getattr(t, ATTRIBUTE).is_sum = is_sum
                getattr(t, ATTRIBUTE).squashed = squashed
        return out

    def _is_sum(self, rule: Rule | None, call: Call) -> bool:
        streams = [self._marks(t) for t in call.ins if self.kind(t) == DATA and 1 in self.axes(t)]
        if len(streams) == 2:
            return call.name.rstrip("_") in ("aten::add", "fastprune::batch_norm_act")
        return rule is pointwise and len(streams) == 1 and streams[0].is_sum

    def _is_squashed(self, rule: Rule | None, call: Call) -> bool:
        if call.name.rstrip("_") in ("aten::sigmoid", "aten::hardsigmoid"):
            return True
        return rule in (_copy, _view, _moved) and self._marks(call.ins[0]).squashed

    def read(self, labels: Tensor | None) -> None:
        """Note that a layer reads these channels: whatever wrote them was the last to do so."""
        if labels is not None:
            for row in {bisect_right(self.starts, label) - 1 for label in labels.tolist()}:
                self.roles["last", row] = None

    @staticmethod
    def _kind_of(call: Call, rule: Rule | None, kinds: set[str], followed: bool) -> str:
        if kinds == {NOISE} or (call.name in _RANDOM and not followed and WEIGHT not in kinds):
            return NOISE
        if DATA in kinds:
            return DATA
        keeps_zeros = rule in _KEEPS_ZEROS or (call.name == "aten::masked_fill" and call.arg("value") == 0)
        return WEIGHT if WEIGHT in kinds and keeps_zeros else COMPUTED

    def _apply(self, rule: Rule | None, call: Call) -> None:
        if rule is None:
            why = "has no rule"
        else:
            try:
                return rule(self, call)
            except Exception as e:  # a form of the op its rule did not foresee: leave its channels alone, and say so
                why = f"was called in a way its rule does not cover ({type(e).__name__}: {e})"
        self.unknown.setdefault(call.name, why)
        self.freeze_all(call.ins + call.outs, f"it reaches {call.name}, which {why}")
        for t in call.outs:
            self.label(t, {})
        return None


# Rules --------------------------------------------------------------------------------------------------------------


def pointwise(tracer: Tracer, call: Call) -> None:
    """Rule of ops that work index by index on broadcast operands: what meets is tied.  Also for users' own ops."""
    axes = {}
    for d in {a - t.dim() for t in call.ins for a in tracer.axes(t)}:  # counted from the end, as broadcasting does
        ends = [(t, d) for t in call.ins if t.dim() >= -d and not _follows(tracer, t, d)]
        axes[d] = tracer.tie(*ends, why=f"{call.name} joins it with the input or a constant of fixed size")
    for t in call.outs:
        for d, labels in axes.items():
            if t.dim() < -d or t.shape[d] != len(labels):
                raise ValueError(f"{call.name} returned {tuple(t.shape)}, which its operands do not broadcast to")
        tracer.label(t, {t.dim() + d: labels for d, labels in axes.items()})


def _follows(tracer: Tracer, t: Tensor, axis: int) -> bool:
    """An axis that takes its size from the tensor it meets: expanded from 1, or random numbers."""
    return t.dim() + axis not in tracer.axes(t) and (t.stride(axis) == 0 or tracer.kind(t) == NOISE)


def _copy(tracer: Tracer, call: Call) -> None:
    """Same values, same shape; a weight stays a weight."""
    for t in call.outs:
        tracer.label(t, tracer.axes(call.ins[0]))


def _like(tracer: Tracer, call: Call) -> None:
    """Same shape, other values."""
    _copy(tracer, call)


def _product(tracer: Tracer, call: Call) -> None:
    """Multiplication: pointwise, and a masked weight times anything is still zero."""
    pointwise(tracer, call)
    streams = [t for t in call.ins if tracer.kind(t) == DATA and t.dim() > 1 and 1 in tracer.axes(t)]
    if len(streams) == 2 and streams[0].dim() == streams[1].dim():
        # squeeze and excitation: one value per channel, or a sigmoid, scales the other
        factor, scaled = sorted(streams, key=lambda t: (t.numel(), not tracer._marks(t).squashed))
        rows = [tracer.row(tracer.axes(t)[1]) for t in (factor, scaled)]
        if (factor.numel() < scaled.numel() or tracer._marks(factor).squashed) and rows[0] != rows[1]:
            tracer.role("factor", tracer.axes(factor)[1])
            tracer.label(call.out, tracer.axes(call.out) | {1: tracer.axes(scaled)[1]})


def _moved(tracer: Tracer, call: Call) -> None:
    """Data movement that keeps every index and never depends on how many there are."""
    tracer.move(call, lambda labels: call.func(labels, *call.args[1:], **call.kwargs))


def _view(tracer: Tracer, call: Call) -> None:
    # labels are expanded, which view may refuse; the numbers in the call are the real shape's
    tracer.move(call, lambda labels: labels.reshape(call.out.shape))


def _pixel_shuffle(tracer: Tracer, call: Call) -> None:
    # (C r r, H, W) -> (C, H r, W r): the r r channels under one output channel go together
    tracer.move(call, lambda labels: call.func(labels, *call.args[1:]), free=call.out.dim() - 3)


def _channel_shuffle(tracer: Tracer, call: Call) -> None:
    x, groups = call.ins[0], call.arg("groups")
    if 1 in tracer.axes(x):
        by_group = tracer.axes(x)[1].view(groups, -1)
        tracer.equal(by_group, by_group[:1])
    tracer.move(call, lambda labels: call.func(labels, groups))


def _cut(tracer: Tracer, call: Call) -> None:
    """slice, select, split, unbind, roll, index: exact along other axes; along channels only equal pieces survive."""
    x = call.ins[0]
    pieces = {}
    for axis in _cut_axes(call) & tracer.axes(x).keys():
        labels = tracer.axes(x)[axis]
        sizes = {t.shape[axis] for t in call.outs if t.dim() == x.dim()}
        if call.name == "aten::split" and len(sizes) == 1 and not tracer.strict:
            # chunk(2) of whatever is left gives equal halves only if the halves lose the same channels
            tracer.assumed = True
            parts = labels.view(len(call.outs), -1)
            tracer.equal(parts, parts[:1])
            pieces[axis] = parts[0]
        elif call.name != "aten::slice" or sizes != {x.shape[axis]}:
            tracer.freeze(labels, f"{call.name} takes fixed positions out of its channels")
    rest = map_tensors(Tensor.cpu, call.args[1:])  # indices, for the labels are on the CPU
    tracer.move(call, lambda labels: call.func(labels, *rest, **call.kwargs), skip=pieces.keys())
    for t in call.outs:
        tracer.label(t, tracer.axes(t) | pieces)


def _cut_axes(call: Call) -> set[int]:
    rank = call.ins[0].dim()
    if call.name == "aten::index":
        return {a for a, i in enumerate(call.arg("indices")) if i is not None}
    dims = call.arg("dims") if call.name == "aten::roll" else [call.arg("dim", 0)]
    return {d % rank for d in dims} if dims else set(range(rank))  # roll without dims rolls the flattened tensor


def _cat(tracer: Tracer, call: Call) -> None:
    out = call.out
    tensors = [t for t in call.ins if t.dim() == out.dim()]  # cat accepts and ignores (0,) among tensors of any rank
    dim = call.arg("dim", 0) % out.dim()
    axes = {a: tracer.tie(*((t, a) for t in tensors)) for a in range(out.dim()) if a != dim}
    if any(dim in tracer.axes(t) for t in tensors):
        why = "it is joined with channels of the input or a constant"
        parts = [(tracer.axes(t).get(dim), t.shape[dim]) for t in tensors]
        axes[dim] = torch.cat([tracer.constant(size, why) if p is None else p for p, size in parts])
    tracer.label(out, axes)


def _stack(tracer: Tracer, call: Call) -> None:
    dim = call.arg("dim", 0) % call.out.dim()
    axes = {a: tracer.tie(*((t, a) for t in call.ins)) for a in range(call.ins[0].dim())}
    tracer.label(call.out, {a + (a >= dim): v for a, v in axes.items()})


def _pad(tracer: Tracer, call: Call) -> None:
    x, pad = call.ins[0], call.arg("pad")
    axes = {}
    for axis, labels in tracer.axes(x).items():
        i = 2 * (x.dim() - 1 - axis)  # the list starts with the last axis
        before, after = pad[i : i + 2] if i < len(pad) else (0, 0)
        if min(before, after) < 0:
            tracer.freeze(labels, "a negative padding cuts fixed positions out of its channels")
            continue
        why = "it is added to channels of zero padding"
        axes[axis] = torch.cat([tracer.constant(before, why), labels, tracer.constant(after, why)])
    tracer.label(call.out, axes)


def _contract(tracer: Tracer, x: Tensor, x_axis: int, w: Tensor, w_axis: int) -> None:
    """A sum over products of ``x`` and ``w``: exact for a masked channel if its slice of the weight is exactly zero."""
    labels = tracer.tie((x, x_axis), (w, w_axis))
    if tracer.kind(w) == WEIGHT:
        tracer.role("consumer", tracer.axes(w).get(w_axis % w.dim()))
        tracer.read(tracer.axes(x).get(x_axis % x.dim()))
    else:
        made = "computed from other weights" if tracer.kind(w) == COMPUTED else "an activation itself"
        tracer.freeze(labels, f"it is multiplied by something that is {made}, where a removed channel need not be zero")


def _convolution(tracer: Tracer, call: Call) -> None:
    x, w, bias = call.arg("input"), call.arg("weight"), call.arg("bias")
    groups, transposed = call.arg("groups"), call.arg("transposed")
    rows, columns = (1, 0) if transposed else (0, 1)
    for axis, labels in tracer.axes(w).items():
        if axis > 1:
            tracer.freeze(labels, "it is the extent of a convolution's kernel")
    if groups == 1:
        _contract(tracer, x, 1, w, columns)
        out = tracer.tie((w, rows), (bias, 0))
        tracer.role("producer", tracer.axes(w).get(rows))
        if 1 not in tracer.axes(x):
            tracer.role("stem", tracer.axes(w).get(rows))
    elif transposed:
        tracer.freeze_all(call.ins, "grouped transposed convolution has no rule")
        out = None
    else:
        out = _grouped(tracer, x, w, bias, groups)
    for axis, labels in tracer.axes(x).items():
        if axis > 1:
            tracer.freeze(labels, "a convolution slides over it")
    tracer.label(call.out, {0: tracer.axes(x).get(0), 1: out})


def _grouped(tracer: Tracer, x: Tensor, w: Tensor, bias: Tensor | None, groups: int) -> Tensor | None:
    ins, out = tracer.axes(x).get(1), tracer.tie((w, 0), (bias, 0))
    if w.shape[1] == 1:
        tracer.role("depthwise", tracer.axes(w).get(0))
    else:
        tracer.role("producer", tracer.axes(w).get(0))
    if ins is None or out is None:
        tracer.freeze_all(
            [t for t in (x, w, bias) if t is not None],
            "a grouped convolution reads the input, or channels tied into one",
        )
        return out
    by_group = out.view(groups, -1)
    if w.shape[1] == 1:  # depthwise: a group goes with its input channel
        tracer.equal(by_group, ins.view(groups, 1))
        return out
    # The number of groups stays, and all groups must stay equally wide.
    by_input = ins.view(groups, -1)
    tracer.equal(by_group, by_group[:1])
    tracer.equal(by_input, by_input[:1])
    columns = tracer.axes(w).get(1)
    if columns is None or tracer.kind(w) != WEIGHT:
        for labels in (ins, columns):
            tracer.freeze(labels, "it is read by a grouped convolution whose weight is computed")
    else:
        tracer.equal(by_input[0], columns)
        tracer.role("consumer", columns)
        tracer.read(ins)
    return out


def _matmul(tracer: Tracer, call: Call) -> None:
    """mm, bmm, addmm, baddbmm: (..., n, k) @ (..., k, m)."""
    bias, a, b = call.ins if len(call.ins) == 3 else (None, *call.ins)
    n, k, m = a.dim() - 2, a.dim() - 1, a.dim() - 1
    if tracer.kind(a) == WEIGHT and tracer.kind(b) == DATA:
        _contract(tracer, b, n, a, k)
        tracer.role("producer", tracer.axes(a).get(n))
    else:
        _contract(tracer, a, k, b, n)
        tracer.role("producer", tracer.axes(b).get(m) if tracer.kind(b) == WEIGHT else None)
        if k not in tracer.axes(a) and tracer.kind(b) == WEIGHT:
            tracer.role("stem", tracer.axes(b).get(m))
    axes = {n: tracer.axes(a).get(n), m: tracer.axes(b).get(m)}
    if a.dim() == 3:
        axes[0] = tracer.tie((a, 0), (b, 0))
    tracer.label(call.out, axes)
    if bias is not None:
        for axis in range(call.out.dim()):
            if axis in tracer.axes(call.out) and bias.dim() + axis >= call.out.dim():
                tracer.tie((call.out, axis), (bias, axis - call.out.dim()))


def _norm_parameters(tracer: Tracer, x: Tensor, tensors: list[Tensor | None], mean: Tensor | None) -> None:
    channels = tracer.tie((x, 1), *((t, 0) for t in tensors))
    for t in tensors:
        row = -1 if t is None else tracer.role("norm", tracer.axes(t).get(0))
        if row >= 0 and channels is not None:
            tracer.norm_after.setdefault(tracer.row(channels), row)
        if row >= 0 and t is mean:
            tracer.norm_means.add(row)


def _batch_norm(tracer: Tracer, call: Call) -> None:
    x, mean = call.arg("input"), call.arg("running_mean")
    _norm_parameters(tracer, x, [call.arg("weight"), call.arg("bias"), mean, call.arg("running_var")], mean)
    for axis, labels in tracer.axes(x).items():
        if axis != 1:
            tracer.freeze(labels, "batch norm averages over it")
    tracer.label(call.outs[0], tracer.axes(x))


def _batch_norm_act(tracer: Tracer, call: Call) -> None:
    """Our fused batch norm: outputs y, stats (2, C) and the ReLU mask, which only the backward reads."""
    x, residual, mean = call.arg("x"), call.arg("residual"), call.arg("running_mean")
    _norm_parameters(tracer, x, [call.arg("weight"), call.arg("bias"), mean, call.arg("running_var")], mean)
    axes = {a: tracer.tie((x, a), (residual, a)) for a in range(x.dim())}
    for axis, labels in axes.items():
        if axis != 1:
            tracer.freeze(labels, "batch norm averages over it")
    y, stats, _ = call.outs
    tracer.label(y, axes)
    tracer.label(stats, {1: axes[1]})


def _channel_gate(tracer: Tracer, call: Call) -> None:
    """Our gate: index by index, with one gate entry a channel."""
    x = call.arg("x")
    tracer.label(call.out, tracer.axes(x) | {1: tracer.tie((x, 1), (call.arg("gate"), 0))})


def _group_norm(tracer: Tracer, call: Call) -> None:
    x, weight, bias, groups = (call.arg(n) for n in ("input", "weight", "bias", "group"))
    _norm_parameters(tracer, x, [weight, bias], None)
    if groups < x.shape[1]:
        tracer.freeze(tracer.axes(x).get(1), "group norm averages over it")
    tracer.label(call.outs[0], tracer.axes(x))


def _layer_norm(tracer: Tracer, call: Call) -> None:
    x, rank = call.arg("input"), len(call.arg("normalized_shape"))
    for t in (call.arg("weight"), call.arg("bias")):
        for axis in range(rank if t is not None else 0):
            tracer.tie((x, axis - rank), (t, axis))
    for axis, labels in tracer.axes(x).items():
        if axis >= x.dim() - rank:
            tracer.freeze(labels, "layer norm averages over it")
    tracer.label(call.outs[0], tracer.axes(x))


def _resample(tracer: Tracer, call: Call) -> None:
    """Pooling, interpolation, reflection padding, grid sampling: the channel axis passes, the windowed axes do not."""
    x = call.ins[0]
    windowed = next(n for n in (1, 2, 3) if f"{n}d" in call.name)
    axes = dict(tracer.axes(x))
    for axis in [a for a in axes if a >= x.dim() - windowed]:
        tracer.freeze(axes.pop(axis), f"{call.name} slides over it")
    tracer.freeze_all(call.ins[1:], f"{call.name} reads it as coordinates")
    for t in call.outs:
        tracer.label(t, axes)


def _reduce(tracer: Tracer, call: Call) -> None:
    x, dim = call.ins[0], call.arg("dim")
    dims = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = {d % x.dim() for d in dims}
    axes = {}
    for axis, labels in tracer.axes(x).items():
        if axis in dims:
            tracer.freeze(labels, f"{call.name} reduces over it")
        elif call.outs[0].dim() == x.dim():
            axes[axis] = labels
        else:
            axes[axis - sum(d < axis for d in dims)] = labels
    for t in call.outs:
        tracer.label(t, axes)


def _along(tracer: Tracer, call: Call) -> None:
    """softmax, cumsum: the other axes pass."""
    x, axes = call.ins[0], dict(tracer.axes(call.ins[0]))
    tracer.freeze(axes.get(call.arg("dim") % max(x.dim(), 1)), f"{call.name} runs over it")
    for t in call.outs:
        tracer.label(t, axes)


def _glu(tracer: Tracer, call: Call) -> None:
    x, dim = call.ins[0], call.arg("dim", -1) % call.ins[0].dim()
    axes = dict(tracer.axes(x))
    if dim in axes:
        halves = axes[dim].view(2, -1)
        tracer.equal(halves[0], halves[1])
        axes[dim] = halves[0]
    tracer.label(call.out, axes)


def _attention(tracer: Tracer, call: Call) -> None:
    tracer.freeze_all(call.ins, "attention has no rule: its products and its scale depend on the number of channels")


def _restride(tracer: Tracer, call: Call) -> None:
    # adaptive pooling of a channels_last tensor rewrites the strides of its (N, C, 1, 1) output, in the same order
    same = tuple(call.arg("size")) == tuple(call.out.shape) and call.out.is_contiguous()
    if not (same and call.func._schema.is_mutable):
        tracer.freeze_all(call.ins, f"{call.name} reads memory by stride")
        tracer.label(call.out, {})


def _nothing(tracer: Tracer, call: Call) -> None:
    """The output has a size of its own, or is a plain number: no label gets through."""


def _table(rule: Rule, names: str, namespace: str = "aten") -> dict[str, Rule]:
    return {f"{namespace}::{name}": rule for name in names.split()}


_RULES: dict[str, Rule] = {
    **_table(_copy, "clone detach alias contiguous _to_copy lift_fresh"),
    **_table(_like, "empty_like zeros_like ones_like full_like rand_like randn_like"),
    **_table(_product, "mul"),
    **_table(
        pointwise,
        "copy relu relu6 sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu silu gelu elu celu mish softplus "
        "log_sigmoid_forward threshold prelu _prelu_kernel rrelu_with_noise lerp addcmul addcdiv where clamp "
        "masked_fill dropout native_dropout _fused_dropout bernoulli fill zero uniform normal random",
    ),
    **_table(_view, "view _unsafe_view reshape _reshape_alias"),
    **_table(_moved, "permute transpose t unsqueeze squeeze expand repeat flip pixel_unshuffle"),
    **_table(_pixel_shuffle, "pixel_shuffle"),
    **_table(_channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_table(_cut, "slice select split split_with_sizes unbind roll index index_select"),
    **_table(_cat, "cat"),
    **_table(_stack, "stack"),
    **_table(_pad, "constant_pad_nd"),
    **_table(_convolution, "convolution"),
    **_table(_matmul, "mm bmm addmm baddbmm"),
    **_table(
        _batch_norm,
        "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update",
    ),
    **_table(_batch_norm_act, "batch_norm_act", "fastprune"),
    **_table(_channel_gate, "channel_gate", "fastprune"),
    **_table(_group_norm, "native_group_norm"),
    **_table(_layer_norm, "native_layer_norm"),
    **_table(
        _resample,
        "max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d max_pool3d_with_indices adaptive_max_pool2d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d "
        "upsample_nearest1d upsample_linear1d upsample_nearest3d upsample_trilinear3d "
        "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d "
        "grid_sampler_2d",
    ),
    **_table(
        _reduce,
        "mean sum prod amax amin max min var std var_mean std_mean norm linalg_vector_norm argmax argmin any all "
        "logsumexp",
    ),
    **_table(_along, "_softmax _log_softmax cumsum"),
    **_table(_glu, "glu"),
    **_table(
        _attention,
        "_native_multi_head_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _transformer_encoder_layer_fwd",
    ),
    **_table(_restride, "as_strided"),
    **_table(_nothing, "new_zeros new_ones new_empty new_full new_empty_strided _local_scalar_dense is_same_size"),
}
# ops that draw numbers into a tensor of any shape
_RANDOM = frozenset(f"aten::{name}" for name in "bernoulli bernoulli_ uniform_ normal_ rand randn".split())
# ops that leave an exactly zero weight exactly zero
_KEEPS_ZEROS = frozenset({_copy, _product, _view, _moved, _cut, _cat, _stack, _pixel_shuffle, _channel_shuffle})


@cache
def _rule_of(func: Any) -> Rule | None:
    """The rule of an op or, for an in-place op, of its functional form; pointwise if PyTorch tags it so."""
    name = func._schema.name
    functional = name.rstrip("_")
    for known in (name, functional):
        if known in _RULES:
            return _RULES[known]
    namespace, base = functional.split("::")
    packet = getattr(torch.ops.aten, base, None) if namespace == "aten" else None
    overloads = [func] + [getattr(packet, o) for o in packet.overloads()] if packet is not None else [func]
    return pointwise if any(torch.Tag.pointwise in o.tags for o in overloads) else None


def register_rule(op_name: str, rule: Rule) -> None:
    """Teach :func:`trace` an op of your own, so that its channels are no longer frozen.

    Args:
        op_name: Qualified name without overload, such as ``"mylib::swish"``.
        rule: ``rule(tracer, call)``, run after the op.  ``call`` has ``ins``, ``outs`` and ``arg(name)``; the tracer
            has ``axes(t)``, ``tie((t, axis), ...)``, ``freeze(labels, why)`` and ``label(out, {axis: labels})``.
            :func:`pointwise` is a ready rule for ops that work index by index.

    Raises:
        ValueError: ``op_name`` is not of the form ``namespace::name``.
    """
    if op_name.count("::") != 1 or "." in op_name:
        raise ValueError(f"register_rule: expected an op name such as 'mylib::swish' without overload, got {op_name!r}")
    _RULES[op_name] = rule
    _rule_of.cache_clear()
