"""Which channels of a network live or die together, found by watching one real forward pass.

Every index of every dimension of every parameter and floating-point buffer gets an integer label.  A
:class:`TorchDispatchMode` then watches an eager forward on example inputs and, for each ATen op,

- carries labels through data movement by running the very same op on tensors of labels (view, permute, cat, ...),
- records which labels the op forces to be equal (add, mul, norms, convolution, ...) as pairs for a union-find.

Connected labels are one *channel*: positions in many tensors that can only be removed together.  Channels that touch
the same tensors form a :class:`Group`.  A channel that reaches an op without a rule, the model's output, or anything
that would make the masked network differ from the shrunk one (a layer norm or a softmax over channels, an attention
product) is frozen: it stays, and :attr:`ChannelGraph.frozen` says why.  So a gap in the rules costs pruning, never
correctness.

There is no symbolic tracing: control flow, hooks and custom modules run as they are, on the model itself.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastprune import backends
from fastprune.errors import GraphError, did_you_mean
from fastprune.labels import NUMBER, Row, Tracer
from fastprune.nn import MaskedConv2d, SyncBatchNormAct2d
from fastprune.rules import pointwise, register_rule, rule_of
from fastprune.surgery import TOLERANCE, call, check_plain, compare, leaves, map_tensors, number

__all__ = ["ChannelGraph", "Group", "Index", "pointwise", "register_rule", "trace"]

Keep = Mapping[str, Tensor]


class Index(NamedTuple):
    """Where the channels of a group sit along one dimension of one tensor: two int64 vectors of equal length.

    ``position[i]`` belongs to channel ``channel[i]`` of the group; positions ascend.  A convolution's rows have one
    position per channel; a linear layer behind a flatten has H*W of them.
    """

    position: Tensor
    channel: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that touch the same tensors and are chosen independently of one another.

    Attributes:
        name: Module name of the first producing convolution or linear layer (``#2``, ... if it feeds several groups).
        size: Number of channels.
        convs: Modules whose output rows are these channels, in module order, depthwise convolutions excluded.
        depthwise: Depthwise convolutions the channels run through.
        norms: Batch and group norms with a scale, shift or statistic per channel, in module order.
        consumers: Modules that read the channels as input features.
    """

    name: str
    size: int
    convs: tuple[str, ...]
    depthwise: tuple[str, ...]
    norms: tuple[str, ...]
    consumers: tuple[str, ...]
    rows: tuple[Row, ...] = field(repr=False, compare=False)  # the tensor dimensions it touches
    channel_of: np.ndarray = field(repr=False, compare=False)  # of the graph
    base: int = field(repr=False, compare=False)  # number of its first channel there

    @cached_property
    def index(self) -> dict[tuple[str, int], Index]:
        """``(tensor name, dim) -> Index`` for every parameter and buffer that shrinks with the group."""
        index = {}
        for row in self.rows:
            index[row.name, row.dim] = self.where(self.channel_of[row.start : row.start + row.size])
        return index

    def where(self, channels: np.ndarray) -> Index:
        """Where the group's channels are in a vector of the graph's channel numbers, such as ``Output.channels``."""
        channel = channels - self.base
        position = np.flatnonzero((channel >= 0) & (channel < self.size))
        return Index(torch.from_numpy(position), torch.from_numpy(channel[position]))

    @property
    def coupled(self) -> bool:
        """More than one convolution or linear layer produces the channels, as on a residual stream."""
        return len(self.convs) > 1

    def per_channel(self, tensor: str, dim: int, values: Tensor) -> Tensor:
        """Sum ``values``, one per index of ``dim`` of the named tensor, over the positions of each channel: (size,)."""
        position, channel = (i.to(values.device) for i in self.index[tensor, dim])
        return values.new_zeros(self.size).index_add_(0, channel, values[position])


class Output(NamedTuple):
    """Channels of what a module returns: number of the channel over all groups per index, int64, -1 = frozen.

    ``is_sum``: it ends a residual block, as the sum of two activations or a pointwise function of it.  ``last``: the
    last module to return the same tensor, which it may have changed in place.
    """

    channels: np.ndarray
    is_sum: bool
    last: str


@dataclass(frozen=True)
class ChannelGraph:
    """The groups of a model.  Plain data: holds no module and no parameter.

    Attributes:
        groups: Group by name, in module order of the first producing layer.
        frozen: What was left alone and why: layer name, or name of an op without a rule, to one line of text.
        norm_after: Convolution or linear layer to the first norm that reads exactly its output channels.
        train_error: Why the forward in training mode could not run, or None if it did.
        stems: Convolutions and linear layers that read the network's input.
        factors: Convolutions and linear layers whose outputs scale other channels, as in squeeze and excitation.
        last: Those whose outputs, normed and activated, are what other layers read; of an expansion with a depthwise
            convolution behind it only the latter.
        outputs: Module that runs once and returns a tensor of prunable channels, to these channels.
    """

    groups: dict[str, Group]
    frozen: dict[str, str]
    norm_after: dict[str, str]
    train_error: str | None
    stems: frozenset[str]
    factors: frozenset[str]
    last: frozenset[str]
    outputs: dict[str, Output] = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    channel_of: np.ndarray = field(repr=False)  # per label: number of its channel, counted over all groups; -1 = frozen
    norm_means: frozenset[str] = field(repr=False)  # names of running means, which mask_ zeroes

    def check_keep(self, keep: Keep) -> dict[str, Tensor]:
        """Validate keep-masks and return them on the CPU.

        Args:
            keep: Group name to a bool vector, (size,), True = keep.  Groups left out are kept whole.

        Raises:
            ValueError: Unknown group, wrong dtype or shape, or a group with nothing left.
        """
        checked = {}
        for name, mask in keep.items():
            if name not in self.groups:
                why = f" It was left alone: {self.frozen[name]}." if name in self.frozen else ""
                raise ValueError(f"keep: unknown group {name!r}{did_you_mean(name, self.groups)}.{why}")
            size = self.groups[name].size
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (size,):
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"keep[{name!r}]: expected a bool tensor of shape ({size},), True = keep; got {got}")
            checked[name] = mask.detach().cpu()
            if not checked[name].any():
                raise ValueError(f"keep[{name!r}] removes all {size} channels; keep at least one")
        return checked

    def kept(self, keep: Keep) -> dict[str, dict[int, Tensor]]:
        """Indices that stay, for every tensor that gets smaller: ``{tensor name: {dim: int64 indices, ascending}}``.

        Integers in modules that count channels, such as ``layer1.0.width``, are among them, with dimension -1.
        """
        checked = self.check_keep(keep)
        masks = [checked[g.name].numpy() if g.name in checked else np.ones(g.size, bool) for g in self.groups.values()]
        stays = np.concatenate([*masks, [True]])[self.channel_of]  # frozen labels are -1 and find the last True
        plan: dict[str, dict[int, Tensor]] = {}
        for row in self.rows:
            mine = stays[row.start : row.start + row.size]
            if not mine.all():
                plan.setdefault(row.name, {})[row.dim] = torch.from_numpy(np.flatnonzero(mine))
        return plan

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers of ``model`` by name, checked to be the ones this graph was traced on.

        Raises:
            GraphError: A tensor is missing or has another shape, for example because the model was compacted since.
        """
        tensors = dict(_named_tensors(model))
        for row in self.rows:
            if row.dim == NUMBER:
                if (got := number(model, row.name)) != row.size:
                    raise GraphError(
                        f"the graph was traced on another model: expected {row.name} to be {row.size}, got {got}; "
                        "trace the model again"
                    )
                continue
            t = tensors.get(row.name)
            if t is None or t.dim() <= row.dim or t.shape[row.dim] != row.size:
                got = "no such tensor" if t is None else tuple(t.shape)
                raise GraphError(
                    f"the graph was traced on another model: expected {row.name} with {row.size} along dimension "
                    f"{row.dim}, got {got}; trace the model again"
                )
        return tensors

    def parameters_after(self, model: nn.Module, keep: Keep) -> int:
        """Elements of all ``nn.Parameter`` of the model that :func:`fastprune.compact.compact` makes with ``keep``."""
        plan, count = self.kept(keep), 0
        for name, p in model.named_parameters():
            left = dict(enumerate(p.shape)) | {dim: len(stays) for dim, stays in plan.get(name, {}).items()}
            count += math.prod(left.values())
        return count

    def after(self, keep: Keep) -> ChannelGraph:
        """The graph of the model that :func:`fastprune.compact.compact` makes with ``keep``, without tracing again."""
        checked = self.check_keep(keep)
        masks = [checked[g.name].numpy() if g.name in checked else np.ones(g.size, bool) for g in self.groups.values()]
        stays = np.concatenate([*masks, [True]])
        number = np.append(np.cumsum(stays[:-1]) - 1, -1)  # old number of a channel -> new one; frozen ones stay -1
        labels = stays[self.channel_of]
        before = np.concatenate([[0], np.cumsum(labels)])
        rows = {
            r: r._replace(start=int(before[r.start]), size=int(before[r.start + r.size] - before[r.start]))
            for r in self.rows
        }
        channel_of, groups, base = number[self.channel_of[labels]], {}, 0
        for group, mask in zip(self.groups.values(), masks, strict=True):
            touched = tuple(rows[r] for r in group.rows)
            size = int(mask.sum())
            groups[group.name] = replace(group, size=size, rows=touched, channel_of=channel_of, base=base)
            base += size
        outputs = {name: o._replace(channels=number[o.channels[stays[o.channels]]]) for name, o in self.outputs.items()}
        return replace(self, groups=groups, outputs=outputs, rows=tuple(rows.values()), channel_of=channel_of)

    @torch.no_grad()
    def mask_(self, model: nn.Module, keep: Keep) -> None:
        r"""Zero, in place, every parameter entry that :func:`fastprune.compact.compact` would remove.

        The masked model then computes exactly what the shrunk one does, although a removed channel is in general *not*
        zero where it is consumed: batch norm turns a zero channel into its bias, or with a scale bounded by a sigmoid
        into :math:`-\mu\,\sigma(0)/\sqrt{v+\epsilon}`, where :math:`\sigma(0) = 0.5`, and gates and softplus make
        constants out of zeros.  It does not matter because the *input slices of all consumers* are zeroed too: whatever
        value arrives there is multiplied by 0.  Every path of a channel ends in such a slice, else the graph would have
        frozen it: channels that meet other channels without a weight in between (layer norm, softmax, products of two
        activations, the output) never get into a group.  Rows, biases, affine parameters and running means go to zero
        as well, so that norms, weight decay and statistics of the masked model tell the truth about what is left.
        Running variances stay: a variance of zero would be a lie.

        Args:
            model: The traced model, or a copy of it.
            keep: Group name to a bool vector, (size,), True = keep.
        """
        tensors = self.tensors(model)
        parameters = {name for name, _ in model.named_parameters()}
        for name, dims in self.kept(keep).items():
            if name not in parameters and name not in self.norm_means:
                continue
            t = tensors[name]
            for dim, stay in dims.items():
                gone = torch.ones(t.shape[dim], dtype=torch.bool).index_fill_(0, stay, False).nonzero().squeeze(1)
                t.index_fill_(dim, gone.to(t.device), 0)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# Running the model --------------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back training flags, buffers (same objects, bit for bit) and random state of Python, NumPy and PyTorch."""
    modules = list(model.modules())
    training = [m.training for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules if m._buffers]
    values = {id(b): b.detach().clone() for _, mine in buffers for b in mine.values() if b is not None}
    python, numpy = random.getstate(), np.random.get_state()
    devices = {t.device.index for _, t in _named_tensors(model) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for m, was in zip(modules, training, strict=True):
                m.training = was
            with torch.no_grad():
                for m, mine in buffers:
                    m._buffers.update(mine)
                    for b in mine.values():
                        if b is not None:
                            # an observer of quantisation is empty until its first batch
                            b.resize_(values[id(b)].shape).copy_(values[id(b)])


# From labels to groups ----------------------------------------------------------------------------------------------


def trace(model: nn.Module, example_inputs: Any, *, strict: bool | None = None) -> ChannelGraph:
    """Find the channel groups of ``model`` by running it once in eval mode and, if it can, once in training mode.

    The model is not changed: buffers, training flags and random state are restored, gradients are not touched.
    Training mode is run too because auxiliary heads only exist there; a failure there (batch norm over a single value)
    is kept in :attr:`ChannelGraph.train_error`.

    Args:
        model: Any eager module on any device; not the result of ``torch.compile``.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments; a batch of 2 small images does.
        strict: True freezes channel axes that a view or a split takes apart; False assumes that the code derives the
            new sizes from the tensor (``x.chunk(2, 1)``, ``x.view(n, groups, c // groups, h, w)``), as most does.
            None assumes so too, but where there is such an axis removes a part of everything from a float64 copy to see
            whether it holds, and assumes nothing of the classes of modules where it does not.

    Returns: The graph; group order is module order of the first producing layer.

    Raises:
        GraphError: The model does not run on ``example_inputs``, or returns no tensor.
        ValueError: The model is compiled, distributed, or has parameters not yet initialised.

    Warns:
        UserWarning: Once, naming every op without a rule and every layer that never ran.
    """
    check_plain(model, "trace")
    refused: set[type] = {nn.MultiheadAttention}  # widths and heads are written into it
    sealed: set[type] = set()
    tracer, graph, idle = _trace(model, example_inputs, bool(strict), refused, sealed)
    # modules that only touch what is frozen anyway need no proof
    touched = [labels for path in tracer.assumed for labels in tracer.touched.get(path, ())]
    doubtful = strict is None and bool(touched) and bool((graph.channel_of[torch.cat(touched).numpy()] >= 0).any())
    while doubtful and (where := _fails_in(model, graph, example_inputs, bool(tracer.assumed))) is not None:
        suspects = _suspects(tracer, where)
        refused |= suspects
        culprit = _culprit(model, where, sealed)
        doubtful = bool(suspects) or culprit not in sealed
        sealed |= set() if suspects else {culprit}
        tracer, graph, idle = _trace(model, example_inputs, not doubtful, refused, sealed)
    if tracer.unknown:
        ops = "; ".join(f"{op} {why}" for op, why in tracer.unknown.items())
        warnings.warn(f"trace: {ops}; the channels that reach it stay unpruned (see register_rule)", stacklevel=2)
    if idle:
        also = f"; the forward in training mode failed ({graph.train_error})" if graph.train_error else ""
        warnings.warn(
            f"trace: {', '.join(sorted(idle))} never ran{also}; what runs only in training or on other inputs may not "
            "fit the pruned model: give example_inputs that it runs on",
            stacklevel=2,
        )
    return graph


def _trace(
    model: nn.Module, example_inputs: Any, strict: bool, refused: Set[type], sealed: Set[type]
) -> tuple[Tracer, ChannelGraph, set[str]]:
    """Watch the model once; also returns the modules none of whose parameters an op has read."""
    tracer = Tracer(rule_of, strict=strict, refused=refused, sealed=sealed)
    convs = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    masks = {id(b) for m in convs if isinstance(m, MaskedConv2d) for b in m.buffers(recurse=False)}  # cut like weights
    kernels = {id(m.weight) for m in convs} | masks
    with torch.inference_mode(False), undisturbed(model), torch.no_grad():  # in it, ops would stay whole
        try:
            for name, t in _named_tensors(model):
                if t.is_floating_point() or id(t) in masks:
                    # the extent of a kernel is not a channel axis, and following it would only cost time
                    tracer.add(name, t, dims=2 if id(t) in kernels else t.dim())
            train_error = _watch(tracer, model, example_inputs)
        finally:
            unread = tracer.finish()
    owners = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
    idle = set(owners.values()) - {owner for name, owner in owners.items() if name not in unread}
    return tracer, _assemble(tracer, model, train_error), idle


def _fails_in(model: nn.Module, graph: ChannelGraph, example_inputs: Any, assumed: bool) -> str | None:
    """First module that computes something else in the model without some of each group, taken at random, than in the
    masked model; None if there is none.  Of equal groups each loses another number, else equal widths would stay
    equal, as code may rely on."""
    generator = torch.Generator().manual_seed(0)
    keep, left_of = {}, {}
    for name, group in graph.groups.items():
        left = left_of[group.size] = left_of.get(group.size, group.size // 2) % (group.size - 1) + 1
        stays = torch.randperm(group.size, generator=generator)[:left]
        keep[name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, stays, True)
    try:
        trains = graph.train_error is None
        found = compare(model, graph.kept(keep), lambda copy: graph.mask_(copy, keep), example_inputs, training=trains)
    except GraphError:  # nothing can be proved about this model
        return ""
    if not found.what and found.gap > TOLERANCE and assumed:
        return ""  # the code insists on float32: what is assumed of it cannot be told from rounding
    return found.module if found.what else None


def _suspects(tracer: Tracer, where: str) -> set[type]:
    """Classes of the modules nearest to ``where`` of whose code something was assumed, in it or before it ran."""
    started, within = tracer.entered.get(where, 0), where
    while True:
        near = {
            cls
            for path, (cls, step) in tracer.assumed.items()
            if (not within or f"{path}.".startswith(f"{within}.")) and (within == where or step <= started)
        }
        if near or not within:
            return near
        within = within.rpartition(".")[0]


def _culprit(model: nn.Module, where: str, sealed: Set[type]) -> type:
    """Class of the innermost module around ``where`` that is not PyTorch's and not sealed; the model's if none is."""
    while where:
        cls = type(model.get_submodule(where))
        if cls not in sealed and not cls.__module__.startswith("torch.nn."):
            return cls
        where = where.rpartition(".")[0]
    return type(model)


def _watch(tracer: Tracer, model: nn.Module, example_inputs: Any) -> str | None:
    for training in (False, True):
        # aliases, so that no mark stays on the caller's tensors
        inputs = map_tensors(lambda t: t.detach(), example_inputs)
        for t in leaves(inputs):
            tracer.add_input(t)
        model.train(training)
        tracer.running = []
        try:
            # masked_conv2d in eager is made of ops that have rules, masks included
            noted = _modules_noted(tracer, model, outputs=not training)
            sync_alone = SyncBatchNormAct2d.each_alone()
            with tracer, noted, _unfused_attention(), backends.force("eager", "masked_conv2d"), sync_alone:
                out = call(model, inputs)
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"  # PyTorch lists all overloads
            if not training:
                raise GraphError(f"trace: the model does not run on example_inputs: {reason}") from e
            return reason
        outputs = leaves(out)
        if not outputs:
            raise GraphError(f"trace: expected the model to return tensors, got {type(out).__name__}")
        tracer.freeze_all(outputs, "it is an output of the model")
    return None


@contextmanager
def _modules_noted(tracer: Tracer, model: nn.Module, outputs: bool) -> Iterator[None]:
    names = {id(m): name for name, m in model.named_modules()}

    def enter(m: nn.Module, args: Any) -> None:
        tracer.enter(names.get(id(m), ""), m, leaves(args))

    def leave(m: nn.Module, _: Any, out: Any) -> None:
        tracer.running.pop()
        if outputs and id(m) in names:
            tracer.output(names[id(m)], out)

    # for all modules at once: a module with a hook of its own might take another way (see fastprune.nn.fuse)
    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Transformer layers run as the ops they are made of, which compute the same."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _components(size: int, pairs: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Smallest label connected to each label: (size,)."""
    root = np.arange(size)
    if not pairs:
        return root
    a, b = (torch.cat(side).numpy() for side in zip(*pairs, strict=True))
    while len(a):
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
        # hook the larger root of each edge under the smallest it meets, then flatten the trees
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root != (above := root[root])).any():
            root = above
    return root


_ROLES = ("producer", "depthwise", "norm", "consumer")  # as in Group


def _assemble(tracer: Tracer, model: nn.Module, train_error: str | None) -> ChannelGraph:
    """Solve the equalities, bundle the channels that touch the same rows into groups, name what is left."""
    rows, total = tracer.rows, tracer.next_label
    owner = [r.name.rpartition(".")[0] for r in rows]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    place = [(order.get(name, -1), r) for r, name in enumerate(owner)]  # sorts rows by module, then parameter
    having: dict[str, set[int]] = {role: set() for role in (*_ROLES, "stem", "factor", "last", "product")}
    for role, r in tracer.roles:
        having[role].add(r)

    root = _components(total, tracer.pairs)
    why: dict[int, str] = {}  # root of a frozen channel -> the first reason to freeze it
    for label, reason in (tracer.reasons | tracer.constants).items():
        why.setdefault(int(root[label]), reason)

    bundles = []  # (sort key, rows touched, producing rows by module order, roots in the order of the first producer)
    for touched, roots in _by_signature(rows, root, np.fromiter(why, int, len(why))):
        makers = sorted(having["producer"].intersection(touched), key=place.__getitem__)
        if not makers:
            why |= dict.fromkeys(roots, "no convolution or linear layer produces it")
        elif (having["consumer"] | having["product"]).isdisjoint(touched):
            why |= dict.fromkeys(roots, "no convolution or linear layer reads it")
        elif len(roots) == 1:
            why[roots[0]] = "the model ties all its channels into one"
        else:
            lead = rows[makers[0]]
            seen, first = np.unique(root[lead.start : lead.start + lead.size], return_index=True)
            at = first[np.searchsorted(seen, roots)]
            bundles.append(((*place[makers[0]], at.min()), touched, makers, np.array(roots)[np.argsort(at)]))
    bundles.sort(key=lambda b: b[0])

    number = np.full(total, -1)  # root -> number of the channel, counted over all groups
    if bundles:
        channels = np.concatenate([roots for *_, roots in bundles])
        number[channels] = np.arange(len(channels))
    channel_of = number[root]

    def modules(role: str, touched: list[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(owner[r] for r in sorted(having[role].intersection(touched), key=place.__getitem__)))

    groups: dict[str, Group] = {}
    base = 0
    for _, touched, makers, roots in bundles:
        name, again = owner[makers[0]], 2
        while name in groups:
            name, again = f"{owner[makers[0]]}#{again}", again + 1
        roles = (modules(role, touched) for role in _ROLES)
        groups[name] = Group(name, len(roots), *roles, tuple(rows[r] for r in touched), channel_of, base)
        base += len(roots)

    frozen = {op: f"{what}; the channels that reach it are left alone" for op, what in tracer.unknown.items()}
    made = having["producer"] | having["depthwise"]
    for r in sorted(made, key=place.__getitem__):
        row = rows[r]
        stuck = np.flatnonzero(channel_of[row.start : row.start + row.size] < 0)
        if len(stuck):
            part = f" ({len(stuck)} of {row.size} channels)" if len(stuck) < row.size else ""
            frozen.setdefault(owner[r], why[int(root[row.start + stuck[0]])] + part)
    for name, m in model.named_modules():
        width = m.out_channels if isinstance(m, nn.modules.conv._ConvNd) else getattr(m, "out_features", 0)
        if width == 1:
            frozen.setdefault(name, "it has a single output channel")
    norm_after = {owner[r]: owner[norm] for r, norm in tracer.norm_after.items() if r in made}
    means = frozenset(rows[r].name for r in tracer.norm_means)
    stems, factors, last = (frozenset(owner[r] for r in having[role]) for role in ("stem", "factor", "last"))
    outputs = _outputs(tracer, channel_of)
    return ChannelGraph(
        groups, frozen, norm_after, train_error, stems, factors, last, outputs, tuple(rows), channel_of, means
    )


def _outputs(tracer: Tracer, channel_of: np.ndarray) -> dict[str, Output]:
    """Of modules that ran once; where several return one tensor as it is, only the innermost ends the block."""
    outputs, ends, last = {}, set(), {}
    for name, calls in tracer.outputs.items():  # children come before their parents
        if len(calls) != 1 or calls[0] is None:
            continue
        labels, is_sum, marks = calls[0]
        channels = channel_of[labels.numpy()]
        if (channels >= 0).any():
            outputs[name] = Output(channels, is_sum and id(marks) not in ends, name)
            ends |= {id(marks)} if is_sum else set()
            last[id(marks), is_sum] = name
    return {
        name: out._replace(last=last[id(tracer.outputs[name][0][2]), tracer.outputs[name][0][1]])
        for name, out in outputs.items()
    }


def _by_signature(rows: list[Row], root: np.ndarray, frozen: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Bundle the channels that are not frozen by the set of rows they touch: (row numbers, roots) per bundle."""
    row_of = np.full(len(root), -1)
    for i, row in enumerate(rows):
        row_of[row.start : row.start + row.size] = i
    is_frozen = np.zeros(len(root), bool)
    is_frozen[frozen] = True
    alive = np.flatnonzero(~is_frozen[root] & (row_of >= 0))
    if not len(alive):
        return []
    pairs = np.sort(root[alive] * len(rows) + row_of[alive])
    channel, row = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], len(rows))
    cuts = (np.flatnonzero(np.diff(channel)) + 1).tolist()
    bundles: dict[bytes, tuple[list[int], list[int]]] = {}
    for start, stop in zip([0, *cuts], [*cuts, len(row)], strict=True):
        mine = row[start:stop]
        bundles.setdefault(mine.tobytes(), (mine.tolist(), []))[1].append(int(channel[start]))
    return list(bundles.values())
