"""Carrying channel labels through the ops of a forward pass: what is known of a tensor, and the tracer.

A label is an integer that names one index of one dimension of one parameter or buffer; :mod:`fastprune.graph` says
what becomes of them.  Every labelled tensor has at most one vector of labels per axis.  What an op does with them is
told by its rule in :mod:`fastprune.rules`; an op whose rule is missing, or fails, freezes the labels that reach it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune.surgery import NUMBER, SIZED, SIZES


class Row(NamedTuple):
    """The labels ``start .. start + size - 1`` are the indices of dimension ``dim`` of the tensor called ``name``.

    With ``dim`` :data:`NUMBER`, ``name`` is an integer in a module, such as ``layer1.0.width`` or
    ``blocks.1.splits[0]``, and ``size`` its value: so many channels it stands for, and the labels are theirs.
    """

    name: str
    dim: int
    start: int
    size: int


WEIGHT, CONSTANT, DATA, NOISE = "weight", "constant", "data", "noise"


@dataclass
class Marks:
    """What the tracer knows of a tensor; kept as an attribute of the tensor, so it lives exactly as long.

    axes: axis -> labels along it, int64, (size of the axis,).  Axes of size 1 and axes not followed are absent.
    kind: WEIGHT: made from parameters and buffers.  DATA: depends on the input.  NOISE: random numbers, of whatever
        shape the tensor they meet has (the masks of channel-wise dropout).  CONSTANT: made from nothing we know.
    zero: in a masked model it is exactly zero wherever one of its labels is masked.  Parameters are; what is added to
        them, or a batch norm without its shift masked, ends it.
    used: some op has read it.
    is_sum: the sum of two activations, as at the end of a residual block, or a pointwise function of one.
    squashed: a sigmoid of something, as the factors of squeeze and excitation.
    """

    axes: dict[int, Tensor]
    kind: str
    zero: bool = False
    used: bool = False
    is_sum: bool = False
    squashed: bool = False


UNMARKED = Marks({}, CONSTANT)
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
# layers that compare the width of their inputs with a number of their own, which surgery leaves alone
CHECKED = (nn.MultiheadAttention, nn.RNNBase)
# ops that draw numbers into a tensor of any shape
RANDOM = frozenset(f"aten::{name}" for name in "bernoulli bernoulli_ uniform_ normal_ rand randn".split())


class Tracer(TorchDispatchMode):
    """Carries labels through the ops of a forward pass and collects the equalities.  Rules call its public methods.

    Args:
        rule_of: Rule of an op, or None.
        strict: Assume nothing of the model's code (see :meth:`assume`).
        refused: Classes of modules of whose code nothing is assumed.
        sealed: Classes of modules whose own code freezes all that it touches.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would wrap our handler to keep the compiler out of it, and import the compiler, a second, for that
        return False

    def __init__(
        self,
        rule_of: Callable[[Any], Rule | None],
        *,
        strict: bool,
        refused: Set[type] = frozenset(),
        sealed: Set[type] = frozenset(),
    ):
        super().__init__()
        self.rule_of, self.strict, self.refused, self.sealed = rule_of, strict, refused, sealed
        self.stored: dict[str, Tensor] = {}
        self.foreign: list[Tensor] = []  # others that outlive the forward and carry marks, such as step counters
        self.rows: list[Row] = []
        self.starts: list[int] = []  # of the rows
        self._starts = torch.empty(0)  # the same, up to date when its length is
        self.next_label = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (K,) each: labels that must be equal
        self.reasons: dict[int, str] = {}  # a label of its own for every act of freezing -> why
        self.constants: dict[int, str] = {}  # the same for channels that are none, such as padding
        self.roles: dict[tuple[str, int], None] = {}  # (role, row number), in order of the forward
        self.norm_after: dict[int, int] = {}  # row number of a producer -> row number of the norm's parameter
        self.norm_means: set[int] = set()
        self.outputs: dict[str, list[tuple[Tensor, bool, Marks] | None]] = {}  # by module, one entry a call
        self.running: list[tuple[str, nn.Module]] = []  # the modules now in their forward, outermost first
        self.entered: dict[str, int] = {}  # module -> how many had been entered when it first was
        self.assumed: dict[str, tuple[type, int]] = {}  # module of whose code something is assumed -> class, the same
        self.touched: dict[str, list[Tensor]] = {}  # module -> labels of its inputs, and of what its own code reads
        self.numbers: dict[str, Tensor] = {}  # name of an integer in a module -> labels
        self.unknown: dict[str, str] = {}  # op -> what is the matter with it

    # Setting up

    def add(self, name: str, t: Tensor, dims: int) -> None:
        """Give each index of the first ``dims`` dimensions of a parameter or buffer a label of its own."""
        axes = {dim: self._row(name, dim, size) for dim, size in enumerate(t.shape[:dims]) if size > 1}
        self.stored[name] = t
        setattr(t, ATTRIBUTE, Marks(axes, WEIGHT, zero=True))

    def add_input(self, t: Tensor) -> None:
        """Declare a tensor an input of the model."""
        setattr(t, ATTRIBUTE, Marks({}, DATA))

    def enter(self, name: str, m: nn.Module, inputs: list[Tensor]) -> None:
        """Note that a module begins to run."""
        self.running.append((name, m))
        if isinstance(m, CHECKED):
            self.freeze_all(inputs, f"{type(m).__name__} checks how many there are")
        self._touch(inputs)
        self.entered.setdefault(name, len(self.entered))

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
        """WEIGHT, CONSTANT, DATA or NOISE."""
        return self._marks(t).kind

    def zero(self, t: Tensor) -> bool:
        """Whether a masked model's ``t`` is exactly zero wherever one of its labels is masked."""
        return self._marks(t).zero

    def is_sum(self, t: Tensor) -> bool:
        """Whether ``t`` is the sum of two activations, or a pointwise function of one."""
        return self._marks(t).is_sum

    def squashed(self, t: Tensor) -> bool:
        """Whether ``t`` is a sigmoid of something."""
        return self._marks(t).squashed

    def label(
        self,
        t: Tensor,
        axes: dict[int, Tensor | None],
        *,
        zero: bool = False,
        is_sum: bool = False,
        squashed: bool = False,
    ) -> None:
        """Set what is known of an op's output: its labels (None and axes of size 1 are dropped), and see Marks."""
        marks = getattr(t, ATTRIBUTE)
        marks.axes = {a: v for a, v in axes.items() if v is not None and t.shape[a] > 1}
        marks.zero, marks.is_sum, marks.squashed = zero, is_sum, squashed

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

    def assume(self) -> bool:
        """Whether something may be assumed of the code that runs: that a size in it is taken from the tensor or from
        an integer of its module, or that no factor in it depends on the number of channels.

        What is assumed is proved before anybody relies on it; see :func:`fastprune.graph.trace`.
        """
        path, module = self.running[-1] if self.running else ("", None)
        if self.strict or type(module) in self.refused:
            return False
        self.assumed.setdefault(path, (type(module), len(self.entered)))
        return True

    def counts(self, labels: Tensor) -> bool:
        """Whether the code that runs reads integers of its module equal to the number of ``labels``.

        From now on they follow them.
        """
        path, module = self.running[-1] if self.running else ("", None)
        names = list(_integers(module, len(labels))) if module is not None and len(labels) > 1 else []
        read = _read_by_running_code(module) if names else ()
        names = [name for name in names if name.partition("[")[0] in read]
        if isinstance(module, SIZED) and not SIZES.isdisjoint(names) and _has_tensors(module):
            return True  # surgery keeps it right
        if not names or not self.assume():
            return False
        for name in (f"{path}.{name}" if path else name for name in names):
            if name not in self.numbers:
                self.numbers[name] = self._row(name, NUMBER, len(labels))
            self.equal(self.numbers[name], labels)
        return True

    def spells_out(self, size: int) -> bool:
        """Whether this very number stands in the code that runs, as a literal or as a constant of its file."""
        return any(
            size in _literals(frame.f_code.co_consts)
            or size in _literals(frame.f_globals.get(name) for name in frame.f_code.co_names)
            for frame in _running_frames()
            if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "fastprune")
        )

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
        zero, squashed = self.zero(x), self.squashed(x)
        for t, mine in zip(call.outs, axes, strict=True):
            self.label(t, mine, zero=zero, squashed=squashed)

    def role(self, role: str, labels: Tensor | None) -> int:
        """Note what an op does with a parameter dimension.

        "producer", "consumer", "depthwise", "norm", "stem"; "factor": its outputs scale other channels; "last": its
        outputs come, possibly through a norm and pointwise ops, to a consumer; "product": to another activation.
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

    def read(self, labels: Tensor | None, role: str = "last") -> None:
        """Note that a layer reads these channels: whatever wrote them was the last to do so."""
        if labels is not None:
            if len(self._starts) != len(self.starts):
                self._starts = torch.tensor(self.starts)
            rows = torch.searchsorted(self._starts, labels.contiguous(), right=True).unique()
            self.roles.update(dict.fromkeys((role, row - 1) for row in rows.tolist()))

    # Inside

    def _marks(self, t: Tensor) -> Marks:
        return getattr(t, ATTRIBUTE, UNMARKED)

    def _row(self, name: str, dim: int, size: int) -> Tensor:
        """Labels of a new row: (size,)."""
        self.rows.append(Row(name, dim, self.next_label, size))
        self.starts.append(self.next_label)
        self.next_label += size
        return torch.arange(self.next_label - size, self.next_label)

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
                if free is None and not self.assume():
                    self.freeze(full, "a view takes its channel axis apart, by numbers that may be fixed")
                else:
                    self.equal(full, first)
                full = first
        return kept, full.reshape(-1)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, out)
        kinds, followed = set(), False
        for t in call.ins:
            marks = self._marks(t)
            marks.used = True
            kinds.add(marks.kind)
            followed |= bool(marks.axes)
        kind = self._kind_of(call, kinds, followed)
        for t in call.outs:
            known = getattr(t, ATTRIBUTE, None)
            if known is None:
                setattr(t, ATTRIBUTE, Marks({}, kind))
                if any(t is given for given in call.ins):  # changed in place, and not made while we watched
                    self.foreign.append(t)
            else:  # an in-place op
                known.kind = kind
        if followed:
            self._apply(call)
        return out

    @staticmethod
    def _kind_of(call: Call, kinds: set[str], followed: bool) -> str:
        if kinds == {NOISE} or (call.name in RANDOM and not followed and WEIGHT not in kinds):
            return NOISE
        return DATA if DATA in kinds else WEIGHT if WEIGHT in kinds else CONSTANT

    def _touch(self, tensors: list[Tensor]) -> None:
        if self.running:
            path, module = self.running[-1]
            mine = self.touched.setdefault(path, [])
            for t in tensors:
                mine += self.axes(t).values()
            if type(module) in self.sealed:
                self.freeze_all(tensors, f"the code of {type(module).__name__} relies on how many there are")

    def _apply(self, call: Call) -> None:
        rule = self.rule_of(call.func)
        self._touch(call.ins)
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


def _has_tensors(m: nn.Module) -> bool:
    return any(t is not None for t in (*m._parameters.values(), *m._buffers.values()))


def _integers(m: nn.Module, value: int) -> Iterator[str]:
    """Attributes of ``m``, and entries of lists and tuples among them, that are this very integer."""
    for name, v in vars(m).items():
        if name.startswith("_"):
            continue
        if type(v) is int and v == value:
            yield name
        elif type(v) in (list, tuple):
            yield from (f"{name}[{i}]" for i, entry in enumerate(v) if type(entry) is int and entry == value)


def _running_frames() -> Iterator[FrameType]:
    """The code that called the op we are at, innermost first, up to the call of the module."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not Tracer.__torch_dispatch__.__code__:
        frame = frame.f_back
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        yield frame
        frame = frame.f_back


def _read_by_running_code(m: nn.Module) -> set[str]:
    """Names of attributes in the functions of ``m`` that are running: those with it among their variables."""
    names: set[str] = set()
    for frame in _running_frames():
        if any(v is m for v in frame.f_locals.values()):
            names.update(frame.f_code.co_names)
    return names


def _literals(constants: Iterable[Any]) -> Iterator[int]:
    for value in constants:
        if type(value) is int:
            yield value
        elif isinstance(value, tuple):
            yield from _literals(value)
