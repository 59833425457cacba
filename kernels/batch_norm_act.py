"""Batch norm with scale ``w`` or ``sigmoid(w)``, residual add and ReLU: forward and backward.

Three paths, chosen by :func:`fastprune.kernels._bn_geometry.choose`:

    one launch      small layers: a program owns its channels from sums to output
    slabs           large layers, one launch too: teams of programs work slab by slab of channels, each small enough to
                    stay in L2 between its sums and its output (_bn_slab.py)
    three launches  where no slab of whole channels fits L2 (_bn_split.py)
        sums        partial sums, split so that few large planes and many small ones both fill the GPU
        finalise    partials -> statistics and running statistics | dweight, dbias and two coefficients per channel
        apply       one elementwise pass

Both layouts go through the same kernels, in two views of x:

    sums       tiles (n, c, s) of planes.  An NCHW plane that does not start on a vector (7 x 7) is read from the
               vector before it and the foreign elements are dropped after the load: 16-byte loads for any C and S.
    apply      a matrix whose columns repeat the channels, (N, C * S) for NCHW, (N * S, C) for channels_last: what
               belongs to a column is loaded once and reused down the rows.  Rows are joined until vectors fit.
               One launch and slabs apply over planes, slabs over the matrix where planes lie off the vectors.

Each program sums ``x - k`` and ``(x - k)^2`` with k the mean of its first tile.  That tile alone adds ``tile * (k -
mean)^2`` to the sum of squares, so what cancels is at most the number of tiles of a program, whatever the data.
Partials are joined by Chan's formula in float64.  No atomics in sums, fixed chunks: two runs agree bit for bit (the
chunks of slabs depend on the GPU's multiprocessors and L2).

Traffic in bytes per element of x, for items of b bytes (:func:`traffic` has it per call):

    ==============  ==========================  =====================================================
    path            forward: training, + add    backward: training, + add (a residual and a ReLU)
    ==============  ==========================  =====================================================
    one, slabs      2 b (x, y), 3 b             3 b (dy, x, dx), 5 b (dy, x, y, dx, dresidual)
    three launches  3 b (x twice), 4 b          5 b (dy and x twice), 7 b (x and dresidual once more)
    ==============  ==========================  =====================================================

In eval the forward moves 2 b, with a residual 3 b.  A gate sum writes 4 bytes per plane; sums of dy * y find y read
already, or without a ReLU read it once.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._bn_geometry import (
    INTERPRETER,
    SLAB_SHARE,
    Device,
    Slab,
    _fused,
    _matrix,
    _split,
    choose,
    device_of,
    finalise_config,
    slab_plan,
)
from ._bn_slab import COUNTER_STRIDE, _bwd_slab_kernel, _slab_kernel
from ._bn_split import (
    _apply_kernel,
    _bwd_apply_kernel,
    _bwd_finalise_kernel,
    _bwd_fused_kernel,
    _bwd_sums_kernel,
    _finalise_kernel,
    _fused_kernel,
    _sums_kernel,
)  # fmt: skip


def _sizes(op: str, x: Tensor) -> tuple[int, int, int, bool]:
    """N, C, S = H * W, and whether channels are innermost."""
    N, C, H, W = x.shape
    S = H * W
    if max(N, C) * S > 2**30:
        raise ValueError(f"{op}: expected N * H * W and C * H * W up to 2^30, got {tuple(x.shape)}; split the batch")
    if x.is_contiguous():
        return N, C, S, S == 1  # 1 x 1 planes: the same memory, and channels make the longer runs
    if x.is_contiguous(memory_format=torch.channels_last):
        return N, C, S, True
    raise ValueError(f"{op}: expected x contiguous or channels_last, got strides {x.stride()}; call .contiguous()")


def _team(slab: Slab, x: Tensor) -> tuple:
    """Arguments of a slab kernel: its counters, sizes and teams."""
    counters = x.new_zeros((slab.blocks, COUNTER_STRIDE), dtype=torch.int32)  # a launch of its own, without a sync
    return counters, *slab.sizes, slab.teams, slab.parts_n, slab.parts_s


def _gate_buffers(gates: tuple, parts: int, N: int, repeat: int, C: int) -> tuple[tuple, int]:
    """Where a kernel writes sums per sample, and the stride of their rows.

    That is where they belong if they are whole and lie alike, as columns of one matrix do; else (parts, N, repeat, C).
    """
    strides = {t.stride(0) for t in gates if t is not None} or {0}
    if parts * repeat == 1 and len(strides) == 1:
        return gates, strides.pop()
    return tuple(None if t is None else t.new_empty((parts, N, repeat, C)) for t in gates), repeat * C


def _join_parts(sums: tuple, gates: tuple) -> None:
    for part, whole in zip(sums, gates, strict=True):
        if part is not whole:
            torch.sum(part, (0, 2), out=whole)


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    training: bool, momentum: float | None, eps: float, sigmoid: bool, relu: bool, save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward; arguments and results as in :mod:`fastprune.ops.batch_norm_act`.

    The mask is always empty: backward rereads y, which costs no memory, as the next layer keeps it anyway.
    """
    N, C, S, channels_last = _sizes("batch_norm_act", x)
    y = torch.empty_like(x)
    stats = x.new_empty((2, C), dtype=torch.float32)
    mask = x.new_empty((0,), dtype=torch.uint8)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("batch_norm_act: eval mode needs running_mean and running_var; pass both, or training=True")
    if x.numel() == 0:  # as torch: the batch is counted, the running statistics stay
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return y, stats.zero_(), mask
    size = x.element_size()
    cumulative = momentum is None and num_batches_tracked is not None
    momentum = 0.0 if momentum is None else momentum
    m = N * S
    divisors = (1 / m, m / (m - 1) if m > 1 else float("nan"))  # of the mean and variance; nan is PyTorch's answer too
    with torch.cuda.device_of(x):
        grid, sizes, cfg = _matrix(N, C, S, channels_last, size)
        if not training:
            _apply_kernel[grid](
                x, residual, y, weight, bias, stats, running_mean, running_var, *sizes, eps, sigmoid, relu, **cfg
            )
            return y, stats, mask
        # Cumulative averages need the count before any program writes it, hence more than one launch.
        path = choose(N, C, S, channels_last, size, "forward", device_of(x), cumulative=cumulative)
        if isinstance(path, Slab):
            if cumulative:
                num_batches_tracked.add_(1)
            partials = x.new_empty((path.blocks, 3, path.members, path.config["BLOCK_C"]), dtype=torch.float64)
            _slab_kernel[(path.programs,)](
                x, residual, y, weight, bias, running_mean, running_var, num_batches_tracked, stats, partials,
                *_team(path, x), momentum, eps, *divisors, sigmoid, relu, cumulative, COUNTER_STRIDE, **path.config,
                launch_cooperative_grid=True,
            )  # fmt: skip
            return y, stats, mask
        if path == "one launch":
            grid, sizes, cfg = _fused(N, C, S, channels_last, size, False)
            _fused_kernel[grid](
                x, residual, y, weight, bias, running_mean, running_var, num_batches_tracked, stats, *sizes,
                momentum, eps, *divisors, sigmoid, relu, **cfg,
            )  # fmt: skip
            return y, stats, mask
        part_grid, part_sizes, part_cfg, repeat = _split(N, C, S, channels_last, size, False)
        P = part_grid[1] * part_grid[2] * repeat
        partials = x.new_empty((3, P, C), dtype=torch.float64)
        _sums_kernel[part_grid](x, num_batches_tracked, partials, *part_sizes, **part_cfg)
        final = finalise_config(P, C)
        _finalise_kernel[(triton.cdiv(C, final["BLOCK_C"]),)](
            partials,
            stats,
            running_mean,
            running_var,
            num_batches_tracked,
            P,
            C,
            momentum,
            eps,
            *divisors,
            cumulative,
            **final,
        )
        _apply_kernel[grid](x, residual, y, weight, bias, stats, None, None, *sizes, eps, sigmoid, relu, **cfg)
    return y, stats, mask


def batch_norm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, y: Tensor | None,
    mask: Tensor | None, gate_grad: Tensor | None, gate_abs: Tensor | None, out_grad: Tensor | None,
    out_abs: Tensor | None, training: bool, eps: float, sigmoid: bool, relu: bool, need_dx: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward; arguments and results as in :mod:`fastprune.ops.batch_norm_act`.

    ``y`` is given when a residual was added before the ReLU (else the forward is redone to judge the ReLU), and for
    ``out_grad`` and ``out_abs``.
    """
    N, C, S, channels_last = _sizes("batch_norm_act_backward", x)
    if mask is not None and mask.numel():
        raise ValueError("batch_norm_act_backward: expected y, got mask bits, which another backend's forward saved")
    dx = torch.empty_like(x) if need_dx else x.new_empty((0,))
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty((0,))
    dweight = x.new_empty((0,)) if weight is None else torch.empty_like(weight)
    dbias = x.new_empty((0,)) if bias is None else torch.empty_like(bias)
    if x.numel() == 0:
        for t in (gate_grad, gate_abs, out_grad, out_abs):
            if t is not None:
                t.zero_()
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    size = x.element_size()
    gates = (gate_grad, gate_abs, out_grad, out_abs)
    if y is None and (out_grad is not None or out_abs is not None):
        raise ValueError("batch_norm_act_backward: expected y, for out_grad and out_abs, got None")
    y = y if relu or out_grad is not None or out_abs is not None else None
    dweight_or_none = None if weight is None else dweight
    dbias_or_none = None if bias is None else dbias
    dz = dresidual if need_dresidual else None
    per_sample = any(t is not None for t in gates)
    with torch.cuda.device_of(x):
        path = choose(
            N, C, S, channels_last, size, "gates" if per_sample else "backward", device_of(x),
            judged_by_y=relu and y is not None, add=need_dresidual, need_dx=need_dx,
        )  # fmt: skip
        if isinstance(path, Slab):
            sums, stride = _gate_buffers(gates, path.parts_s, N, 1, C)
            partials = x.new_empty((path.blocks, 2, path.members, path.config["BLOCK_C"]), dtype=torch.float32)
            _bwd_slab_kernel[(path.programs,)](
                dy, x, y, dx, dz, weight, bias, stats, dweight_or_none, dbias_or_none, *sums, stride,
                x.new_empty((2, C), dtype=torch.float32), partials, *_team(path, x), 1 / (N * S),
                training, sigmoid, relu, per_sample, COUNTER_STRIDE, **path.config, launch_cooperative_grid=True,
            )  # fmt: skip
            _join_parts(sums, gates)
            return dx, dweight, dbias, dresidual
        if path == "one launch":
            grid, sizes, cfg = _fused(N, C, S, channels_last, size, per_sample)
            sums, stride = _gate_buffers(gates, 1, N, 1, C)
            _bwd_fused_kernel[grid](
                dy, x, y, dx if need_dx else None, dz, weight, bias, stats, dweight_or_none, dbias_or_none, *sums,
                stride, *sizes, 1 / (N * S), training, sigmoid, relu, per_sample, **cfg,
            )  # fmt: skip
            _join_parts(sums, gates)
            return dx, dweight, dbias, dresidual
        grid, sizes, cfg, repeat = _split(N, C, S, channels_last, size, per_sample)
        P = grid[1] * grid[2] * repeat
        partials = x.new_empty((2, P, C), dtype=torch.float32)
        projection = x.new_empty((2, C), dtype=torch.float32)
        sums, stride = _gate_buffers(gates, grid[2], N, repeat, C)
        _bwd_sums_kernel[grid](
            dy, x, y, weight, bias, stats, dz, *sums, stride, partials, *sizes, sigmoid, relu, per_sample, repeat, **cfg
        )
        _join_parts(sums, gates)
        final = finalise_config(P, C)
        _bwd_finalise_kernel[(triton.cdiv(C, final["BLOCK_C"]),)](
            partials, weight, stats, dweight_or_none, dbias_or_none, projection, P, C, 1 / (N * S), sigmoid, **final
        )
        if need_dx:
            grid, sizes, cfg = _matrix(N, C, S, channels_last, size)
            masked = (dy, relu, y if relu else None)
            if need_dresidual:
                masked = (dz, False, None)  # dz is dy after the ReLU already
            _bwd_apply_kernel[grid](
                masked[0], x, masked[2], dx, weight, bias, stats, projection if training else None, *sizes,
                sigmoid, masked[1], **cfg,
            )  # fmt: skip
    return dx, dweight, dbias, dresidual


# ---- traffic

WHATS = {  # a call in training: tensors of x's size (read once | read again by apply | written), forward and backward
    "bn": ((("x",), ("x",), ("y",)), (("dy", "x"), ("dy", "x"), ("dx",))),
    "relu": ((("x",), ("x",), ("y",)), (("dy", "x"), ("dy", "x"), ("dx",))),
    "add": ((("x", "residual"), ("x",), ("y",)), (("dy", "x", "y"), ("dresidual", "x"), ("dx", "dresidual"))),
}


def traffic(
    shape: tuple[int, int, int, int], channels_last: bool, itemsize: int, what: str, device: Device | None = None
) -> dict:
    """Bytes that a call moves between the GPU's memory and its L2 cache, and the path that it takes.

    Tensors of the size of x are counted; parameters, statistics and partial sums are far below one percent of them.
    A second read is counted where it goes to memory: in three launches, unless all that they read twice is small
    enough to stay in L2 (the share of it that slabs count on).

    Args:
        shape: Of x, (N, C, H, W).
        channels_last: Memory format of x.
        itemsize: Bytes of an element of x.
        what: ``"bn"``, ``"relu"``, ``"add"`` (residual, then ReLU), in training; ``"eval"`` (inference, forward only).
        device: Of the GPU; by default of the one in use, and without one a device that has no slabs.

    Returns: ``{"forward": bytes, "backward": bytes, "path": {"forward": name, "backward": name}}``; the names are
        "one launch", "slabs", "three launches" and, for what needs no sums, "elementwise"; None for no backward.
    """
    if what != "eval" and what not in WHATS:
        raise ValueError(f"traffic: expected what to be one of {', '.join((*WHATS, 'eval'))}, got {what!r}")
    if device is None:
        device = device_of(torch.empty(0, device="cuda")) if torch.cuda.is_available() else INTERPRETER
    N, C, H, W = shape
    tensor = N * C * H * W * itemsize
    if what == "eval":
        return {"forward": 2 * tensor, "backward": 0, "path": {"forward": "elementwise", "backward": None}}
    moved, paths = {}, {}
    add = {"judged_by_y": True, "add": True} if what == "add" else {}
    for direction, (first, again, written) in zip(("forward", "backward"), WHATS[what], strict=True):
        path = choose(N, C, H * W, channels_last or H * W == 1, itemsize, direction, device, **add)
        paths[direction] = "slabs" if isinstance(path, Slab) else path
        twice = path == "three launches" and len(again) * tensor > device.l2_bytes * SLAB_SHARE
        moved[direction] = (len(first) + len(written) + len(again) * twice) * tensor
    return {**moved, "path": paths}


# ---- what scripts/aot_check.py compiles

AOT_DTYPES = ("bf16", "fp16", "fp32")
AOT_LIMITS = {"_bwd_sums_kernel": {"registers": 248}, "_bwd_fused_kernel": {"registers": 168}}  # with all four gates
AOT_DEVICE = Device(processors=132, l2_bytes=60 << 20)  # an H200's slabs


def aot(dtype: str) -> list[tuple]:
    """Kernels, argument types and configurations at layers of ResNet-50 (56 x 56, 7 x 7), in both layouts."""
    size = 4 if dtype == "fp32" else 2
    x, param, f64 = f"*{dtype}:16", "*fp32:16", "*fp64:16"
    ints = ("N", "C", "S", "R", "K", "P", "numel", "CHUNK_N", "CHUNK_S", "CHUNK_R", "TEAMS", "PARTS_N", "PARTS_S")
    args = {
        **dict.fromkeys(ints, "i32"), **dict.fromkeys(("eps", "inverse", "unbiased"), "fp64"),
        "momentum": "fp32", "tracked_ptr": "*i64:16",
        **dict.fromkeys(("x_ptr", "y_ptr", "residual_ptr", "dy_ptr", "dx_ptr", "dresidual_ptr"), x),
        **dict.fromkeys(("weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr", "stats_ptr", "projection_ptr"), param),
        **dict.fromkeys(("running_mean_ptr", "running_var_ptr"), param),
        # columns of a matrix start anywhere
        **dict.fromkeys(("gate_grad_ptr", "gate_abs_ptr", "out_grad_ptr", "out_abs_ptr"), "*fp32"),
        "gate_stride": "i32", "GATES": True,
        "SIGMOID": True, "RELU": True, "TRAINING": True, "CUMULATIVE": False,
    }  # fmt: skip
    entries = []

    def add(label: str, kernel: triton.JITFunction, cfg: dict, wide: bool, **special: object) -> None:
        entries.append((label, kernel, {**args, **special}, cfg, wide))

    one_gate = {"gate_abs_ptr": None, "out_grad_ptr": None, "out_abs_ptr": None}
    plain = {"y_ptr": None, "dresidual_ptr": None, "gate_grad_ptr": None, **one_gate, "GATES": False}
    for label, N, C, S, nhwc in (
        ("nchw 56x56", 256, 64, 3136, False), ("nchw 7x7", 256, 512, 49, False),
        ("nhwc 56x56", 256, 64, 3136, True), ("nhwc ragged", 256, 37, 784, True),
    ):  # fmt: skip
        *_, cfg, repeat = _split(N, C, S, nhwc, size, False)
        one = {"N": 1} if nhwc else {}  # as the launcher sees it: 1 is a constant to Triton
        add(label, _sums_kernel, cfg, True, partials_ptr=f64, **one)
        add(label, _bwd_sums_kernel, cfg, True, partials_ptr=param, REPEAT=repeat, **one, **plain)
        *_, cfg, repeat = _split(N, C, S, nhwc, size, True)
        for gates, absent in (("gate", one_gate), ("gates", {})):
            special = {"partials_ptr": param, "REPEAT": repeat, **absent}
            add(f"{label} {gates}+add", _bwd_sums_kernel, cfg, True, **special)
        *_, cfg = _matrix(N, C, S, nhwc, size)
        one = {"S": 1} if nhwc else {}
        no_stats = {"running_mean_ptr": None, "running_var_ptr": None}
        add(label, _apply_kernel, cfg, True, residual_ptr=None, **no_stats, **one)
        add(f"{label} eval+add", _apply_kernel, cfg, True, **one)
        add(label, _bwd_apply_kernel, cfg, True, y_ptr=None, **one)
    for label, N, C, S, nhwc in (
        ("nchw 8x8", 128, 64, 64, False), ("nchw 7x7", 64, 64, 49, False), ("nhwc 8x8", 16, 64, 64, True)
    ):  # fmt: skip
        *_, cfg = _fused(N, C, S, nhwc, size, True)
        add(f"{label} add", _fused_kernel, cfg, True)
        add(f"{label} gate+add", _bwd_fused_kernel, cfg, True, **one_gate)
        add(f"{label} gates+add", _bwd_fused_kernel, cfg, True)
    cooperative = {"launch_cooperative_grid": True}
    slabs = {"counters_ptr": "*i32:16", "STRIDE": COUNTER_STRIDE}
    for label, N, C, S, nhwc in (
        ("nchw 56x56", 256, 64, 3136, False), ("nchw 7x7", 256, 2048, 49, False),
        ("nhwc 14x14", 256, 1024, 196, True), ("nhwc 7x7", 256, 2048, 49, True),
    ):  # fmt: skip
        one = {"N": 1, "PARTS_N": 1} if nhwc else {}
        for what, kind, special in (
            ("", "forward", {"residual_ptr": None}), (" add", "forward", {}),
            ("", "backward", plain), (" add", "backward", {**plain, "y_ptr": x, "dresidual_ptr": x}),
            (" gate+add", "gates", one_gate), (" gates+add", "gates", {}),
        ):  # fmt: skip
            asked = {} if kind == "forward" else {"judged_by_y": "add" in what, "add": "add" in what}
            plan = slab_plan(N, C, S, nhwc, size, kind, AOT_DEVICE, **asked)
            if plan is None:  # float32 is twice as long
                continue
            special = {**slabs, **special, "partials_ptr": f64 if kind == "forward" else param}
            special |= {} if kind == "gates" else one
            kernel = _slab_kernel if kind == "forward" else _bwd_slab_kernel
            add(f"{label}{what}", kernel, plan.config | cooperative, True, **special)
    add("", _finalise_kernel, finalise_config(512, 64), False, partials_ptr=f64, CUMULATIVE=True)
    add("", _bwd_finalise_kernel, finalise_config(512, 64), False, partials_ptr=param)
    return entries
