"""What each kind of op does with the channel labels of its arguments: one rule per kind, and the table of ops."""

from __future__ import annotations

from collections.abc import Set
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.labels import DATA, NOISE, WEIGHT, Call, Rule, Tracer
from fastprune.surgery import map_tensors


def pointwise(tracer: Tracer, call: Call) -> None:
    """Rule of ops that work index by index on broadcast operands: what meets is tied.  Also for users' own ops."""
    axes = {}
    for d in {a - t.dim() for t in call.ins for a in tracer.axes(t)}:  # counted from the end, as broadcasting does
        ends = [(t, d) for t in call.ins if t.dim() >= -d and not _follows(tracer, t, d)]
        axes[d] = tracer.tie(*ends, why=f"{call.name} joins it with the input or a constant of fixed size")
    name = call.name.rstrip("_")
    streams = [t for t in call.ins if tracer.kind(t) == DATA and 1 in tracer.axes(t)]
    is_sum = name == "aten::add" if len(streams) == 2 else len(streams) == 1 and tracer.is_sum(streams[0])
    zero, squashed = _stays_zero(tracer, call, name, axes.keys()), name in _SIGMOIDS
    for t in call.outs:
        for d, labels in axes.items():
            if t.dim() < -d or t.shape[d] != len(labels):
                raise ValueError(f"{call.name} returned {tuple(t.shape)}, which its operands do not broadcast to")
        tracer.label(t, {t.dim() + d: v for d, v in axes.items()}, zero=zero, is_sum=is_sum, squashed=squashed)


def _stays_zero(tracer: Tracer, call: Call, name: str, axes: Set[int]) -> bool:
    """Whether a pointwise op's result is exactly zero where an operand with all of its labels is."""
    zeros = [tracer.zero(t) and all(t.dim() + d in tracer.axes(t) for d in axes) for t in call.ins]
    if name == "aten::mul":
        return any(zeros)
    if name in ("aten::add", "aten::sub"):
        return all(zeros) and len(zeros) == 2  # else a number is added
    if name == "aten::div":
        return zeros[0] and not any(zeros[1:])
    if name == "aten::masked_fill" and call.arg("value") != 0:
        return False
    return zeros[0] and name in _ZERO_AT_ZERO


def _follows(tracer: Tracer, t: Tensor, axis: int) -> bool:
    """An axis that takes its size from the tensor it meets: expanded from 1, or random numbers."""
    if t.dim() + axis in tracer.axes(t) or not (t.stride(axis) == 0 or tracer.kind(t) == NOISE):
        return False
    return not tracer.spells_out(t.shape[axis])


def _copy(tracer: Tracer, call: Call) -> None:
    """Same values, same shape."""
    x = call.ins[0]
    zero, squashed = tracer.zero(x), tracer.squashed(x)
    for t in call.outs:
        tracer.label(t, tracer.axes(x), zero=zero, squashed=squashed)


def _like(tracer: Tracer, call: Call) -> None:
    """Same shape, other values."""
    tracer.label(call.out, tracer.axes(call.ins[0]))


def _product(tracer: Tracer, call: Call) -> None:
    """Multiplication: pointwise; and where one activation scales the channels of another, they are the other's."""
    squashed = {id(t): tracer.squashed(t) for t in call.ins}  # before: it may be in place
    streams = [t for t in call.ins if tracer.kind(t) == DATA and t.dim() > 1 and 1 in tracer.axes(t)]
    channels = {id(t): tracer.axes(t)[1] for t in streams}
    pointwise(tracer, call)
    if len(streams) == 2 and streams[0].dim() == streams[1].dim():
        # squeeze and excitation: one value per channel, or a sigmoid, scales the other
        factor, scaled = sorted(streams, key=lambda t: (t.numel(), not squashed[id(t)]))
        rows = [tracer.row(channels[id(t)]) for t in (factor, scaled)]
        if (factor.numel() < scaled.numel() or squashed[id(factor)]) and rows[0] != rows[1]:
            tracer.role("factor", channels[id(factor)])
            out = tracer.axes(call.out) | {1: channels[id(scaled)]}
            tracer.label(call.out, out, zero=tracer.zero(call.out), is_sum=tracer.is_sum(call.out))


def _moved(tracer: Tracer, call: Call) -> None:
    """Data movement that keeps every index and never depends on how many there are."""
    tracer.move(call, lambda labels: call.func(labels, *call.args[1:], **call.kwargs))


def _view(tracer: Tracer, call: Call) -> None:
    # labels are expanded, which view may refuse; the numbers in the call are the real shape's
    tracer.move(call, lambda labels: labels.reshape(call.out.shape))
    for labels in tracer.axes(call.out).values():  # the new shape may have been given as numbers
        if not tracer.counts(labels) and tracer.spells_out(len(labels)) and not tracer.assume():
            tracer.freeze(labels, "a view gives its size as a number that may be fixed")


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
    """select, unbind, roll, index: exact along other axes."""
    for axis in _cut_axes(call) & tracer.axes(call.ins[0]).keys():
        tracer.freeze(tracer.axes(call.ins[0])[axis], f"{call.name} takes fixed positions out of its channels")
    rest = map_tensors(Tensor.cpu, call.args[1:])  # indices, for the labels are on the CPU
    tracer.move(call, lambda labels: call.func(labels, *rest, **call.kwargs))


def _pieces(tracer: Tracer, call: Call) -> None:
    """slice, split: along channels too, where the code is known to follow when there are fewer."""
    x = call.ins[0]
    axis = call.arg("dim", 0) % x.dim()
    labels = tracer.axes(x).get(axis)
    parts = None if labels is None else _parts(tracer, call, labels)
    if labels is not None and parts is None:
        tracer.freeze(labels, f"{call.name} takes fixed positions out of its channels")
    zero = tracer.zero(x)
    tracer.move(call, lambda labels: call.func(labels, *call.args[1:], **call.kwargs), skip={axis} if parts else set())
    for t, part in zip(call.outs, parts or (), strict=False):
        tracer.label(t, tracer.axes(t) | {axis: part}, zero=zero)


def _parts(tracer: Tracer, call: Call, labels: Tensor) -> list[Tensor] | None:
    """Labels of what a slice or a split makes of an axis of channels; None if the numbers in the call may be fixed."""
    if call.name == "aten::slice":
        start, end = call.arg("start") or 0, call.arg("end")
        part = labels[start : end : call.arg("step", 1)]
        if len(part) == len(labels):
            return [part]
        # "so many from the front", "all but so many from the back"
        cuts = [at for at in (start, end) if at and abs(at) < len(labels)]
        known = [_is_known(tracer, labels[:at] if at > 0 else labels[at:]) for at in cuts]
        return [part] if all(known) and call.arg("step", 1) == 1 else None
    sizes = [t.shape[call.arg("dim", 0)] for t in call.outs]
    parts = list(labels.split(sizes))
    if call.name == "aten::split":
        # chunk(2) of whatever is left gives equal halves only if the halves lose the same channels
        if len(set(sizes)) > 1 or not tracer.assume():
            return None
        tracer.counts(labels)
        tracer.counts(parts[0])
        for part in parts[1:]:
            tracer.equal(parts[0], part)
        return [parts[0]] * len(parts)
    known = [tracer.counts(part) for part in parts]  # one that is not may be the rest
    return parts if known.count(False) <= 1 and len(parts) > 1 else None


def _is_known(tracer: Tracer, labels: Tensor) -> bool:
    """Whether the code will cut off these channels when there are fewer: padding stays, numbers follow."""
    return all(label in tracer.constants for label in labels.tolist()) or tracer.counts(labels)


def _cut_axes(call: Call) -> set[int]:
    rank = call.ins[0].dim()
    if call.name == "aten::index":
        return {a for a, i in enumerate(call.arg("indices")) if i is not None}
    dims = call.arg("dims") if call.name == "aten::roll" else [call.arg("dimension", call.arg("dim", 0))]
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
    tracer.label(out, axes, zero=all(tracer.zero(t) for t in tensors if tracer.axes(t)))


def _stack(tracer: Tracer, call: Call) -> None:
    dim = call.arg("dim", 0) % call.out.dim()
    axes = {a: tracer.tie(*((t, a) for t in call.ins)) for a in range(call.ins[0].dim())}
    zero = all(tracer.zero(t) for t in call.ins if tracer.axes(t))
    tracer.label(call.out, {a + (a >= dim): v for a, v in axes.items()}, zero=zero)


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
    tracer.label(call.out, axes, zero=tracer.zero(x) and not call.arg("value"))


def _contract(tracer: Tracer, x: Tensor, x_axis: int, w: Tensor, w_axis: int) -> None:
    """A sum over products of ``x`` and ``w``: exact for a masked channel if one of them is exactly zero there."""
    ins, columns = tracer.axes(x).get(x_axis % x.dim()), tracer.axes(w).get(w_axis % w.dim())
    labels, is_weight = tracer.tie((x, x_axis), (w, w_axis)), tracer.kind(w) == WEIGHT
    if not (is_weight and tracer.zero(w)) and ins is not None and columns is not None:
        if not (tracer.zero(x) or tracer.zero(w)):
            made = "computed from other weights" if is_weight else "an activation itself"
            why = f"it is multiplied by something that is {made}, where a removed channel need not be zero"
            tracer.freeze(labels, why)
        elif not tracer.assume():  # products of queries and keys are scaled by the root of their number
            tracer.freeze(labels, "it is summed over in a product of activations that depends on how many there are")
    if is_weight:
        tracer.role("consumer", columns)
        tracer.read(ins)
    else:
        for mine in (ins, columns):
            tracer.read(mine, "product")


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
    zero = tracer.zero(w) and (bias is None or tracer.zero(bias)) and 0 not in tracer.axes(x)
    tracer.label(call.out, {0: tracer.axes(x).get(0), 1: out}, zero=zero)


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
        module = tracer.running[-1][1] if tracer.running else None
        is_layer = isinstance(module, nn.modules.conv._ConvNd) and module.groups == groups  # which surgery keeps right
        if not is_layer and not tracer.counts(ins) and not tracer.assume():
            tracer.freeze(ins, "it is read by a convolution of as many groups, by a number that may be fixed")
        return out
    # The number of groups stays, and all groups must stay equally wide.
    by_input = ins.view(groups, -1)
    tracer.equal(by_group, by_group[:1])
    tracer.equal(by_input, by_input[:1])
    columns = tracer.axes(w).get(1)
    if columns is None or not tracer.zero(w) or tracer.kind(w) != WEIGHT:
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
    labelled = {axis for axis, labels in axes.items() if labels is not None}
    # a row of a makes rows, a column of b columns; either makes a matrix of a batch zero
    zeros = [tracer.zero(a)] * (n in labelled) + [tracer.zero(b)] * (m in labelled)
    if a.dim() == 3 and 0 in labelled:
        zeros.append(any(tracer.zero(t) and 0 in tracer.axes(t) for t in (a, b)))
    if bias is not None:
        zeros.append(tracer.zero(bias) and all(bias.dim() + d - call.out.dim() in tracer.axes(bias) for d in labelled))
    tracer.label(call.out, axes, zero=all(zeros))
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
    weights = tracer.kind(x) == WEIGHT
    _norm_parameters(tracer, x, [call.arg("weight"), call.arg("bias"), mean, call.arg("running_var")], mean)
    for axis, labels in tracer.axes(x).items():
        if axis != 1:
            tracer.freeze(labels, "weights are standardised over it" if weights else "batch norm averages over it")
    affine = [call.arg("weight"), call.arg("bias")]
    zero = all(t is not None and tracer.zero(t) and tracer.axes(t) for t in affine) and tracer.axes(x).keys() == {1}
    tracer.label(call.outs[0], tracer.axes(x), zero=zero)


def _batch_norm_act(tracer: Tracer, call: Call) -> None:
    """Our fused batch norm: outputs y, stats (2, C) and the ReLU mask, which only the backward reads."""
    x, residual, mean = call.arg("x"), call.arg("residual"), call.arg("running_mean")
    _norm_parameters(tracer, x, [call.arg("weight"), call.arg("bias"), mean, call.arg("running_var")], mean)
    axes = {a: tracer.tie((x, a), (residual, a)) for a in range(x.dim())}
    for axis, labels in axes.items():
        if axis != 1:
            tracer.freeze(labels, "batch norm averages over it")
    y, stats, _ = call.outs
    tracer.label(y, axes, is_sum=residual is not None and 1 in axes)
    tracer.label(stats, {1: axes[1]})


def _channel_gate(tracer: Tracer, call: Call) -> None:
    """Our gate: index by index, with one gate entry a channel."""
    x = call.arg("x")
    axes = tracer.axes(x) | {1: tracer.tie((x, 1), (call.arg("gate"), 0))}
    tracer.label(call.out, axes, zero=tracer.zero(x), is_sum=tracer.is_sum(x))


def _group_norm(tracer: Tracer, call: Call) -> None:
    """Groups go as a whole; of channels in one group none can, for their statistics are the group's."""
    x, weight, bias, groups = (call.arg(n) for n in ("input", "weight", "bias", "group"))
    _norm_parameters(tracer, x, [weight, bias], None)
    labels = tracer.axes(x).get(1)
    if labels is not None and groups < len(labels):
        by_group = labels.view(groups, -1)
        is_layer = weight is not None and isinstance(tracer.running[-1][1], nn.GroupNorm)  # which surgery keeps right
        if groups > 1 and (is_layer or tracer.counts(by_group[:, 0])):
            tracer.equal(by_group, by_group[:, :1])
        else:
            tracer.freeze(labels, "group norm averages over it")
    elif labels is not None and weight is None:
        tracer.counts(labels)  # one group per channel, and no parameter that says how many
    zero = all(t is not None and tracer.zero(t) for t in (weight, bias)) and tracer.axes(x).keys() == {1}
    tracer.label(call.outs[0], tracer.axes(x), zero=zero)


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
    zero = tracer.zero(x)
    for t in call.outs:
        tracer.label(t, axes, zero=zero)


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
    zero = tracer.zero(x) and call.name in ("aten::mean", "aten::sum")
    for t in call.outs:
        tracer.label(t, axes, zero=zero)


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
    tracer.label(call.out, axes, zero=tracer.zero(x))


def _attention(tracer: Tracer, call: Call) -> None:
    """softmax(q k^T scale) v with q (N, H, L, E), k (N, H, S, E), v (N, H, S, V)."""
    q, k, v = (call.arg(name) for name in ("query", "key", "value"))
    tracer.freeze_all(
        [t for t in call.ins if all(t is not known for known in (q, k, v))], "attention reads it as a mask"
    )
    tracer.freeze(tracer.tie((k, 2), (v, 2)), "attention averages over it")
    if call.arg("scale") is None:
        for t in (q, k):
            tracer.freeze(tracer.axes(t).get(3), "the scale of attention depends on how many there are")
    else:
        _contract(tracer, q, 3, k, 3)
    axes = {0: tracer.tie((q, 0), (k, 0), (v, 0)), 1: tracer.tie((q, 1), (k, 1), (v, 1)), 2: tracer.axes(q).get(2)}
    tracer.label(call.outs[0], axes | {3: tracer.axes(v).get(3)}, zero=tracer.zero(v) and axes[2] is None)


def _fused_layer(tracer: Tracer, call: Call) -> None:
    tracer.freeze_all(call.ins, "a fused layer reads it")


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
    **_table(_cut, "select unbind roll index index_select unfold"),
    **_table(_pieces, "slice split split_with_sizes"),
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
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
    ),
    **_table(_fused_layer, "_native_multi_head_attention _transformer_encoder_layer_fwd"),
    **_table(_restride, "as_strided"),
    **_table(_nothing, "new_zeros new_ones new_empty new_full new_empty_strided _local_scalar_dense is_same_size"),
}
_SIGMOIDS = frozenset({"aten::sigmoid", "aten::hardsigmoid"})
# pointwise ops whose result is zero where their first operand is
_ZERO_AT_ZERO = frozenset(
    f"aten::{name}"
    for name in "relu relu6 hardswish leaky_relu silu gelu elu celu mish tanh prelu _prelu_kernel "
    "rrelu_with_noise masked_fill dropout native_dropout _fused_dropout neg abs sign sqrt square sin".split()
)


@cache
def rule_of(func: Any) -> Rule | None:
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
    """Teach :func:`fastprune.graph.trace` an op of your own, so that its channels are no longer frozen.

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
    rule_of.cache_clear()
