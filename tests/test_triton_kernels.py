"""What only the Triton kernels have: geometries, split sums, joined rows, addresses, tables of pointers.

The op itself, branch by branch, is in test_batch_norm_act.py and test_scale_penalty.py.  Small tiles make small tensors
take the paths of large ones.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from bn_cases import (
    BACKENDS,
    LAYOUTS,
    Variant,
    assert_as_good_as_eager,
    definition,
    device_for,
    make_call,
    ours,
    plain_pytorch,
)

if "triton" not in BACKENDS:
    pytest.skip("triton is not among FASTPRUNE_TEST_BACKENDS", allow_module_level=True)

import triton
import triton.language as tl
from fastprune.kernels import _bn_geometry as geometry
from fastprune.kernels import _bn_tiles as bn_tiles
from fastprune.kernels import batch_norm_act as kernels
from fastprune.kernels import growing_sgd as sgd
from fastprune.kernels import scale_penalty as penalty

DEVICE = device_for("triton")
HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
SPLIT = {"FUSED_ELEMENTS": 0, "PROGRAMS": 6, "TILE": 256, "WIDE_TILE": 256}
TURNS = [
    Variant(act="relu", residual=True, gates="all"),
    Variant(bound="sigmoid", bias=False, act="relu", gates="abs"),
    Variant(params="same"),
    Variant(act="relu", residual=True, params="same"),
]


@pytest.fixture
def split(monkeypatch):
    """Several small chunks per channel, several tiles per chunk."""
    for name, value in SPLIT.items():
        monkeypatch.setattr(geometry, name, value)


def parts(shape, layout, itemsize, per_sample):
    """Chunks per channel, tiles per chunk, and joined rows of a sums kernel."""
    N, C, H, W = shape
    (_, parts_n, parts_s), sizes, cfg, repeat = geometry._split(N, C, H * W, layout == "nhwc", itemsize, per_sample)
    tiles = triton.cdiv(sizes[4], cfg["BLOCK_N"]) * triton.cdiv(sizes[5], cfg["BLOCK_S"])
    return parts_n * parts_s, tiles, repeat


def check(variant, shape, dtype, layout):
    call = make_call(variant, shape, dtype, layout)
    got = ours(call, dtype, "triton", DEVICE)
    assert_as_good_as_eager(got, plain_pytorch(call, dtype), definition(call), dtype)


# ---- split sums

MANY_CHUNKS = [  # few large planes, many small ones, planes off the vectors, ragged and single channels
    (2, 3, 24, 40), (1, 1, 32, 32), (5, 16, 7, 7), (6, 13, 7, 7), (37, 64, 1, 1), (5, 130, 2, 2), (23, 5, 3, 3),
    (1, 2, 33, 31), (3, 12, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", MANY_CHUNKS, ids=str)
def test_split_sums(split, shape, layout):
    for i, dtype in enumerate(HALVES_AND_FLOAT):
        check(TURNS[(MANY_CHUNKS.index(shape) + i + (layout == "nhwc")) % len(TURNS)], shape, dtype, layout)


def test_the_shapes_above_take_several_chunks_and_tiles(split):
    seen = [parts(s, layout, 2, gate) for s in MANY_CHUNKS for layout in LAYOUTS for gate in (True, False)]
    assert sum(chunks > 1 and tiles > 1 for chunks, tiles, _ in seen) >= 12
    assert {repeat for _, _, repeat in seen} == {1, 2, 4, 8}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cumulative_average_reads_the_count_of_this_batch(split, layout):
    x = torch.randn(6, 5, 6, 6).to(DEVICE, memory_format=LAYOUTS[layout])
    mean, var, tracked = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE), torch.tensor(3, device=DEVICE)
    kernels.batch_norm_act(x, None, None, None, mean, var, tracked, True, None, 1e-5, False, False, False)
    assert tracked.item() == 4
    torch.testing.assert_close(mean, x.mean((0, 2, 3)) / 4)
    torch.testing.assert_close(var, 0.75 + x.var((0, 2, 3)) / 4)


@pytest.mark.parametrize("geometry", ["one launch", "split"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_agree_bit_for_bit(request, geometry, layout):
    if geometry == "split":
        request.getfixturevalue("split")
    for variant, dtype in ((TURNS[0], torch.float32), (TURNS[1], torch.bfloat16)):
        call = make_call(variant, (5, 11, 6, 6), dtype, layout)
        first, second = (ours(call, dtype, "triton", DEVICE) for _ in range(2))
        assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_survives_large_offsets_and_a_misleading_first_tile(split, monkeypatch, layout):
    """The shift is the mean of a program's first tile; E[x^2] - E[x]^2 in float32 would lose every digit here."""
    monkeypatch.setattr(geometry, "PROGRAMS", 2)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 8, 8, generator=g, dtype=torch.float64) * 0.1
    x[:, 0] += 1e4
    x[1:, 1] += 100  # the first sample says 0
    x[0, 2, 0, 0] = 1e4  # an outlier in the first tile
    x = x.float().contiguous(memory_format=LAYOUTS[layout])
    assert parts(x.shape, layout, 4, False)[1] > 1
    _, stats, _ = kernels.batch_norm_act(
        x.to(DEVICE), None, None, None, None, None, None, True, 0.1, 1e-12, False, False, False
    )
    exact = x.double()
    torch.testing.assert_close(stats[0].cpu().double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=0)
    want = exact.var((0, 2, 3), correction=0).rsqrt()
    torch.testing.assert_close(stats[1].cpu().double(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinities_and_nan_in_any_chunk_as_in_pytorch(split, layout):
    for where in ((0, 0, 0), (3, 5, 5), (5, 2, 1)):  # the tile of the shift, later tiles
        x = torch.randn(6, 5, 6, 6)
        n, h, w = where
        x[n, 0, h, w], x[n, 1, h, w], x[n, 2, h, w] = torch.inf, -torch.inf, torch.nan
        x[n, 3, h, w], x[(n + 1) % 6, 3, 0, 0] = torch.inf, -torch.inf
        mean, var = torch.zeros(5), torch.ones(5)
        args = [t.to(DEVICE) for t in (mean, var)]
        want = F.batch_norm(x, mean, var, None, None, True, 0.1).relu()
        y, stats, _ = kernels.batch_norm_act(
            x.to(DEVICE, memory_format=LAYOUTS[layout]),
            None,
            None,
            None,
            *args,
            None,
            True,
            0.1,
            1e-5,
            False,
            True,
            False,
        )
        torch.testing.assert_close(y.cpu().contiguous(), want, equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(args[0].cpu(), mean, equal_nan=True)
        torch.testing.assert_close(args[1].cpu(), var, equal_nan=True)
        assert stats[0, 0] == torch.inf and stats[0, 1] == -torch.inf and stats[0, 2:4].isnan().all()
        assert stats[1, :4].isnan().all() and stats[:, 4].isfinite().all()


# ---- launchers called directly: outputs that the op's autograd never leaves out


@pytest.mark.parametrize("geometry", ["one launch", "split"])
@pytest.mark.parametrize("training", [True, False])
def test_every_combination_of_requested_outputs(request, geometry, training):
    if geometry == "split":
        request.getfixturevalue("split")
    shape, g = (5, 3, 3, 3), torch.Generator().manual_seed(0)
    x, dy, residual = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    weight, bias, mean = (torch.randn(3, generator=g, dtype=torch.float64) for _ in range(3))
    var = torch.rand(3, generator=g, dtype=torch.float64) + 0.5
    flags = itertools.product((True, False), (True, False), (True, False), (True, False), (True, False), (True, False))
    for relu, added, affine, need_dx, need_dresidual, gates in flags:
        if need_dresidual and not (relu and added):
            continue  # without a ReLU dresidual is dy
        leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
        z = F.batch_norm(x, mean.clone(), var.clone(), *((weight, bias) if affine else (None, None)), training, 0.1)
        before = z + residual if added else z
        want = torch.autograd.grad(before.relu() if relu else before, leaves, dy, materialize_grads=True)
        dz = dy * (before > 0) if relu else dy

        given = [t.detach().float().to(DEVICE) for t in (x, weight, bias, residual, mean, var, dy)]
        p = given[1:3] if affine else [None, None]
        y, stats, mask = kernels.batch_norm_act(
            given[0],
            *p,
            given[3] if added else None,
            *given[4:6],
            None,
            training,
            0.1,
            1e-5,
            False,
            relu,
            added and relu,
        )
        # one stride or several: the kernels write in place, or by way of a buffer
        buffers = [torch.full((5, 4 + i * (need_dx and gates)), torch.nan, device=DEVICE)[:, :3] for i in range(4)]
        sums = [t if gates and (added or i < 2) else None for i, t in enumerate(buffers)]
        saved_y = y if added and (relu or gates) else None
        got = kernels.batch_norm_act_backward(
            given[6], given[0], *p, stats, saved_y, mask, *sums, training, 1e-5, False, relu, need_dx, need_dresidual
        )
        asked = (need_dx, affine, affine, need_dresidual)
        for name, t, w, ask in zip(("dx", "dweight", "dbias", "dresidual"), got, want, asked, strict=True):
            assert t.shape == (w.shape if ask else (0,)), name
            if ask:
                torch.testing.assert_close(t.cpu().double(), w, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        products = [dz * z, (dz * z).abs(), dy * y.cpu().double(), (dy * y.cpu().double()).abs()]
        for gate, product in zip(sums, products, strict=True):
            if gate is not None:
                torch.testing.assert_close(gate.cpu().double(), product.sum((2, 3)).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(layout, training):
    x = torch.empty(0, 3, 4, 4, device=DEVICE).contiguous(memory_format=LAYOUTS[layout])
    weight, bias, mean = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    var, tracked = torch.ones(3, device=DEVICE), torch.tensor(7, device=DEVICE)
    y, stats, mask = kernels.batch_norm_act(
        x, weight, bias, None, mean, var, tracked, training, 0.1, 1e-5, False, True, False
    )
    assert y.shape == x.shape and stats.isfinite().all() and mask.numel() == 0
    assert tracked.item() == 7 + training and mean.eq(0).all() and var.eq(1).all()
    dx, dweight, dbias, dresidual = kernels.batch_norm_act_backward(
        x,
        x,
        weight,
        bias,
        stats,
        None,
        None,
        torch.empty(0, 3, device=DEVICE),
        None,
        None,
        None,
        training,
        1e-5,
        False,
        True,
        True,
        False,
    )
    assert dx.shape == x.shape and dweight.tolist() == dbias.tolist() == [0.0] * 3 and dresidual.numel() == 0


def test_what_the_launchers_refuse():
    x, stats = torch.randn(2, 3, 4, 4, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    rest = (True, 0.1, 1e-5, False, False, False)
    with pytest.raises(ValueError, match="expected x contiguous or channels_last"):
        kernels.batch_norm_act(x.transpose(2, 3), None, None, None, None, None, None, *rest)
    with pytest.raises(ValueError, match="eval mode needs running_mean and running_var"):
        kernels.batch_norm_act(x, None, None, None, None, None, None, False, *rest[1:])
    with pytest.raises(ValueError, match="expected y, got mask bits"):
        mask = torch.ones(2, 3, 2, dtype=torch.uint8, device=DEVICE)
        kernels.batch_norm_act_backward(
            x, x, None, None, stats, None, mask, *[None] * 4, True, 1e-5, False, True, True, True
        )
    with pytest.raises(ValueError, match="expected y, for out_grad and out_abs, got None"):
        gates = (None, None, torch.zeros(2, 3, device=DEVICE), None)
        kernels.batch_norm_act_backward(
            x, x, None, None, stats, None, None, *gates, True, 1e-5, False, True, True, True
        )


# ---- addresses and geometry


@triton.jit
def _probe_kernel(
    offset_ptr, live_ptr, n_start, n_last, c_start, s, size, C, S, numel,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = c_start + tl.arange(0, BLOCK)
    base, first, last, read, exists = bn_tiles._planes(
        n_start, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK
    )
    k = tl.arange(0, BLOCK)[None, None, :]
    offset, _, live = bn_tiles._tile(base, first, last, read, exists, k, C, VEC, CHANNELS_LAST, PEEL)
    n = tl.arange(0, BLOCK)[:, None, None]
    at = (n * BLOCK + tl.arange(0, BLOCK)[None, :, None]) * BLOCK + k
    tl.store(offset_ptr + at, offset)
    tl.store(live_ptr + at, live)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_addresses_past_2_to_the_31(layout):
    N, C, S, B = 256, 1000, 112 * 112 - 1, 8  # 3.2e9 elements, never allocated
    n, c, s = 250, 993, 12000
    offset = torch.zeros(B, B, B, dtype=torch.int64, device=DEVICE)
    live = torch.zeros(B, B, B, dtype=torch.int8, device=DEVICE)
    nhwc = layout == "nhwc"
    _probe_kernel[(1,)](offset, live, n, N, c, s, 100, C, S, N * C * S, 8, nhwc, not nhwc, B)
    i = torch.arange(B, dtype=torch.int64)
    n, c, k = n + i[:, None, None], c + i[None, :, None], i[None, None, :]
    if nhwc:
        want = (n * S + s + k) * C + c
    else:
        want = ((n * C + c) * S + s) // 8 * 8 + k  # from the vector before
    assert want.max() > 2**31 and torch.equal(offset.cpu(), want)
    alive = (n < N) & (c < C) & (torch.ones_like(want, dtype=torch.bool) if nhwc else want >= (n * C + c) * S + s)
    assert torch.equal(live.cpu().bool(), alive)


def test_traffic_counts_the_second_read_of_large_layers_only():
    small, large = (128, 16, 8, 8), (256, 64, 56, 56)
    for what, once, twice in (("bn", (2, 3), (3, 5)), ("relu", (2, 3), (3, 5)), ("add", (3, 5), (4, 7))):
        for shape, path, tensors in ((small, "one launch", once), (large, "three launches", twice)):
            got, size = kernels.traffic(shape, False, 2, what), 2 * torch.Size(shape).numel()
            assert (got["forward"], got["backward"]) == (tensors[0] * size, tensors[1] * size)
            assert got["path"] == {"forward": path, "backward": path}
    assert kernels.traffic(large, True, 4, "eval")["forward"] == 8 * torch.Size(large).numel()
    with pytest.raises(ValueError, match="expected what to be one of bn, relu, add, eval, got 'gelu'"):
        kernels.traffic(large, False, 2, "gelu")


RESNET50 = [
    (64, 12544),
    (64, 3136),
    (256, 3136),
    (128, 784),
    (512, 784),
    (256, 196),
    (1024, 196),
    (512, 49),
    (2048, 49),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_geometry_of_real_layers(layout):
    """16-byte loads everywhere, no empty chunk, and a GPU that is neither starved nor flooded."""
    nhwc = layout == "nhwc"
    for (C, S), N, itemsize, per_sample in itertools.product(RESNET50, (256, 32), (2, 4), (False, True)):
        grid, (n, c, s, numel, chunk_n, chunk_s), cfg, _ = geometry._split(N, C, S, nhwc, itemsize, per_sample)
        assert n * c * s == numel == N * C * S
        assert cfg["VEC"] * itemsize == 16
        assert grid[0] * cfg["BLOCK_C"] >= c and (grid[1] - 1) * chunk_n < n <= grid[1] * chunk_n
        assert (grid[2] - 1) * chunk_s < s <= grid[2] * chunk_s
        programs = grid[0] * grid[1] * grid[2]
        assert programs <= 2.1 * geometry.PROGRAMS and max(grid[1:]) < 2**16
        assert programs >= min(geometry.PROGRAMS / 2, numel / geometry.TILE / 2)
        grid, (rows, cols, _, _, chunk), cfg = geometry._matrix(N, C, S, nhwc, itemsize)
        assert cfg["VEC"] * itemsize == 16 and rows * cols == N * C * S
        assert (grid[1] - 1) * chunk < rows <= grid[1] * chunk and grid[1] < 2**16


@pytest.mark.parametrize("C", [1, 3, 5, 37, 38, 44, 257])
def test_ragged_channels_last_still_loads_whole_vectors(C):
    for itemsize, per_sample in itertools.product((2, 4), (False, True)):
        *_, cfg, repeat = geometry._split(32, C, 784, True, itemsize, per_sample)
        assert cfg["VEC"] * itemsize == 16 and repeat <= 8
        assert geometry._matrix(32, C, 784, True, itemsize)[-1]["VEC"] * itemsize == 16


# ---- scale_penalty


def scales_of(dtype):
    g = torch.Generator().manual_seed(0)
    sizes = (1, 3, 600, 512, 0, 64)
    extremes = torch.tensor([-1000.0, 1000.0, 0.0, -80.0, 80.0, -16.0, 16.0])
    return [t.to(DEVICE, dtype) for t in (*(4 * torch.randn(n, generator=g) for n in sizes), extremes)]


def penalty_of(scales, kind, shift):
    w = torch.cat(scales).double().cpu().requires_grad_()
    s = (w + shift).sigmoid()
    value = (s * (1 - F.logsigmoid(w + shift))).sum() if kind == "rni" else w.abs().sum()
    return value.detach(), torch.autograd.grad(value, w)[0]


@pytest.mark.parametrize("kind, shift", [("rni", 0.0), ("rni", 2.7), ("l1", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES_AND_FLOAT], ids=str)
def test_scale_penalty_over_many_tensors(dtype, kind, shift):
    scales = scales_of(dtype)
    value, grad = penalty.scale_penalty(scales, kind, shift)
    acc = torch.promote_types(dtype, torch.float32)
    assert value.dtype == grad.dtype == acc and value.shape == () and grad.shape == (1187,)
    want_value, want_grad = penalty_of(scales, kind, shift)
    eps = torch.finfo(acc).eps
    torch.testing.assert_close(value.cpu().double(), want_value, rtol=4 * eps, atol=0)
    torch.testing.assert_close(grad.cpu().double(), want_grad, rtol=0, atol=4 * eps)
    again = penalty.scale_penalty(scales, kind, shift)
    assert torch.equal(value, again[0]) and torch.equal(grad, again[1])


def test_scale_penalty_sees_updates_in_place_and_new_addresses():
    scales = [torch.randn(5, device=DEVICE), torch.randn(9, device=DEVICE)]
    for _ in range(3):
        torch.testing.assert_close(penalty.scale_penalty(scales, "l1", 0.0)[0], torch.cat(scales).abs().sum())
        scales[0].mul_(2)
        scales[1] = scales[1][1:]  # the address moves on by one element: cut scales are views at times
    assert penalty.scale_penalty([torch.empty(0, device=DEVICE)], "rni", 0.0)[0].item() == 0.0
    nan = penalty.scale_penalty([torch.tensor([torch.nan, 1.0], device=DEVICE)], "l1", 0.0)
    assert nan[0].isnan() and nan[1][0].isnan() and nan[1][1] == 1


# ---- the optimizer's step


def sgd_step(params, grads, momenta, reg=(), keep=(), lr=0.1, wd=0.01):
    """Launches a step; what it should have made, in float64."""
    reg, keep = dict(reg), dict(keep)
    wanted = []
    for i, (p, g, b) in enumerate(zip(params, grads, momenta, strict=True)):
        p, g, b = p.double(), g.double(), b.double()
        b = 0.9 * b + g + (wd + reg.get(i, torch.zeros((), device=p.device))) * p
        kept = keep.get(i, torch.ones((), device=p.device)).double()
        wanted += [(p - lr * b) * kept, b * kept]
    parts = [list(reg.values()), list(reg), list(keep.values()), list(keep)]
    sgd.growing_sgd(params, grads, momenta, *parts, None, None, None, lr, 0.9, 0.0, wd, False, False, False)
    got = [t.double() for pair in zip(params, momenta, strict=True) for t in pair]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def tensors_of(*shapes):
    return [[torch.randn(s, device=DEVICE) for s in shapes] for _ in range(3)]


def test_optimizer_step_over_blocks_of_every_kind():
    """Ends of tensors, tensors off the vectors, dimensions that wrap within a block and across blocks."""
    size = sgd.config()["BLOCK"]
    params, grads, momenta = tensors_of((3, size - 5), (size,), (2 * size + 7, 1), (7, 5, 11, 3), (1,))
    odd = torch.randn(3, 40, device=DEVICE)
    for tensors, moved in zip((params, grads, momenta), odd, strict=True):
        tensors.append(moved[1:38])  # contiguous, off by four bytes
    reg = {
        0: torch.randn(3, 1),
        1: torch.randn(size),
        2: torch.randn(1, 1),
        3: torch.randn(7, 1, 11, 1),
        5: torch.ones(37),
    }
    keep = {0: torch.rand(1, size - 5) > 0.5, 2: torch.rand(2 * size + 7, 1) > 0.5, 3: torch.rand(1, 5, 1, 3) > 0.5}
    sgd_step(params, grads, momenta, *({i: t.to(DEVICE) for i, t in part.items()} for part in (reg, keep)))


def test_optimizer_tables_follow_addresses_and_not_numbers():
    params, grads, momenta = tensors_of((4, 3, 2, 2), (9,))
    reg = {0: torch.zeros(4, 1, 1, 1, device=DEVICE)}
    sgd._table.clear()
    for turn in range(4):
        sgd_step(params, grads, momenta, reg, lr=0.1 / (turn + 1), wd=0.01 * (turn + 1))
        reg[0] += 0.5  # in place: the same table
    assert sgd._table.misses == 1
    grads = [g.clone() for g in grads]
    sgd_step(params, grads, momenta, reg)
    params[0].data = params[0].data[:2].clone()  # a cut: as fastprune.compact leaves it
    grads[0], momenta[0], reg[0] = grads[0][:2], momenta[0][:2], reg[0][:2]
    sgd_step(params, grads, momenta, reg)
    sgd_step(params, grads, momenta)
    assert sgd._table.misses == 4


def test_dimensions_along_the_memory_of_a_parameter():
    """As few as there can be, the fastest first."""

    def dims(p, part):
        return sgd._dims(p.shape, p.stride(), part.shape, part.stride())

    w = torch.empty(8, 4, 3, 3)
    nhwc = w.contiguous(memory_format=torch.channels_last)
    assert dims(w, torch.empty(8, 1, 1, 1)) == ((36, 0), (8, 1))
    assert dims(w, torch.empty(8, 4, 1, 1)) == ((9, 0), (32, 1))
    assert dims(w, torch.empty(1, 4, 1, 1)) == ((9, 0), (4, 1), (8, 0))
    assert dims(w, w) == ((288, 1),) == dims(nhwc, nhwc)
    assert dims(nhwc, torch.empty(8, 1, 1, 1)) == ((36, 0), (8, 1))
    assert dims(nhwc, torch.empty(8, 4, 1, 1)) == ((4, 1), (9, 0), (8, 4))
    assert dims(nhwc, w) == ((4, 9), (9, 1), (8, 36))
    assert dims(w, torch.empty(1, 1, 1, 1)) == ((288, 0),) and dims(torch.empty(()), torch.empty(())) == ((1, 0),)
    with pytest.raises(ValueError, match=r"broadcasts to \(8, 4, 3, 3\), got \(8, 4, 3\)"):
        dims(w, torch.empty(8, 4, 3))
    with pytest.raises(ValueError, match="less than 2\\^31 elements"):
        dims(torch.empty(2**16, 2**15, device="meta"), torch.empty(1, 1, device="meta"))
