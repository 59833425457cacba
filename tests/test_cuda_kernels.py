"""What the op tests cannot see of the CUDA C++ kernels: every way through them, schedules, addresses, geometry.

Runs on a GPU where there is one, else in tests/cuda_emulator.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from bn_cases import (
    BACKENDS,
    GATES,
    LAYOUTS,
    Variant,
    assert_as_good_as_eager,
    definition,
    device_for,
    make_call,
    ours,
    plain_pytorch,
)

import fastprune
from fastprune import backends, ops

if "cuda" not in BACKENDS:
    pytest.skip("FASTPRUNE_TEST_BACKENDS leaves cuda out", allow_module_level=True)
DEVICE = device_for("cuda")
LIBRARY = ctypes.CDLL(backends.EMULATE or str(Path(fastprune.__file__).parent / "_C_cuda.abi3.so"))
SHARED, OPTIN_A100 = 227 << 10, 163 << 10  # bytes of shared memory that a block may have, H100 and H200 | A100

# Way: what the planner is to believe of the device: shared memory, cluster, threads, programs.
WAYS = {
    "block": (0, 1, 64, 8),
    "cluster": (0, 4, 64, 8),
    "wide cluster": (0, 8, 32, 8),
    "partly kept": (9 << 10, 2, 64, 8),
    "nothing kept": (1, 2, 64, 8),
    "three launches": (0, -1, 64, 24),
}
SHAPES = {  # name to shape and what is special
    "vectors": (9, 16, 8, 8),
    "ragged": (9, 19, 7, 7),
    "large planes": (2, 3, 41, 40),
    "half a vector": (6, 5, 2, 2),
    "one row": (33, 9, 1, 1),
}
TURNS = [
    Variant(bound="sigmoid", bias=False, act="relu"),
    Variant(act="relu", residual=True, gates="all"),
    Variant(gates="abs"),
    Variant(act="relu", residual=True, momentum=None),
]


@pytest.fixture
def force():
    yield lambda way: LIBRARY.fastprune_cuda_force(*WAYS[way])
    LIBRARY.fastprune_cuda_force(0, 0, 0, 0)


def check(variant, shape, dtype, layout):
    call = make_call(variant, shape, dtype, layout)
    got = ours(call, dtype, "cuda", DEVICE)
    assert_as_good_as_eager(got, plain_pytorch(call, dtype), definition(call), dtype)
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way(way, shape, layout, force):
    force(way)
    turn = list(WAYS).index(way) + list(SHAPES).index(shape)
    for i, variant in enumerate(TURNS):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[(turn + i) % 3]
        check(variant, SHAPES[shape], dtype, layout)


@pytest.mark.parametrize("way", ["block", "three launches"])
def test_addresses_off_the_vectors(way, force):
    """Views that start at an odd element: loaded one by one."""
    force(way)
    shape = (4, 3, 5, 5)  # 75 elements a sample
    for dtype in (torch.float32, torch.bfloat16):
        memory = torch.randn(5, *shape[1:]).to(DEVICE, dtype)
        x = memory[1:].requires_grad_()
        assert x.is_contiguous() and x.data_ptr() % 16
        y = ops.batch_norm_act(x, act="relu", backend="cuda")
        aligned = x.detach().clone().requires_grad_()
        want = ops.batch_norm_act(aligned, act="relu", backend="eager")
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
        dy = torch.randn_like(memory)[1:]
        got, exact = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(want, aligned, dy.clone())[0]
        torch.testing.assert_close(got, exact, rtol=8 * tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_no_schedule_changes_a_bit(way, layout, force):
    force(way)
    call = make_call(TURNS[1], (5, 11, 7, 7), torch.float32, layout)
    first = ours(call, torch.float32, "cuda", DEVICE)
    for seed in range(1, 4):
        if backends.EMULATE:
            LIBRARY.emulator_seed(ctypes.c_uint64(seed))
        again = ours(call, torch.float32, "cuda", DEVICE)
        for name, t in first.items():
            assert torch.equal(t, again[name]), name


@pytest.mark.skipif(not backends.EMULATE, reason="the emulator counts launches")
def test_number_of_launches(force):
    x = torch.randn(6, 8, 4, 4, requires_grad=True)
    gates = {name: torch.empty(6, 8) for name in GATES["grad"]}
    LIBRARY.emulator_launches.restype = ctypes.c_int64
    counts = {}
    for way in WAYS:
        force(way)
        before = LIBRARY.emulator_launches()
        y = ops.batch_norm_act(x, act="relu", backend="cuda", **gates)
        between = LIBRARY.emulator_launches()
        y.sum().backward()
        counts[way] = between - before, LIBRARY.emulator_launches() - between
    assert counts == dict.fromkeys(WAYS, (1, 1)) | {"three launches": (3, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["cluster", "partly kept", "three launches"])
def test_large_offsets_and_distant_samples(way, layout, force):
    force(way)
    call = make_call(Variant(), (5, 16, 8, 8), torch.float32, layout)
    call.x = (call.x * 1e-2 + 1e4).float().double()
    call.x[0, 2] = (call.x[0, 2] + 1e3).float().double()
    got = ours(call, torch.float32, "cuda", DEVICE)
    assert_as_good_as_eager(got, plain_pytorch(call, torch.float32), definition(call), torch.float32)


@pytest.mark.parametrize("way", ["cluster", "three launches"])
def test_infinite_values_stay_in_their_channel(way, force):
    force(way)
    x = torch.randn(6, 4, 5, 5, device=DEVICE)
    x[3, 1, 2, 2], x[0, 2, 0, 0] = torch.inf, torch.nan
    mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    y = ops.batch_norm_act(x, None, None, mean, var, momentum=1.0, backend="cuda")
    assert y.isnan().flatten(2).any(2).any(0).tolist() == [False, True, True, False]
    assert mean[1] == torch.inf and mean[2].isnan() and mean[[0, 3]].isfinite().all()


def test_raw_ops_refuse_in_words():
    forward, backward = torch.ops.fastprune.batch_norm_act.cuda, torch.ops.fastprune.batch_norm_act_backward.cuda
    x, stats = torch.randn(2, 3, 4, 4, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    rest = (True, 0.1, 1e-5, False, False, False)
    with pytest.raises(RuntimeError, match="NCHW or channels_last without gaps"):
        forward(x.transpose(2, 3), None, None, None, None, None, None, *rest)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        forward(x.double(), None, None, None, None, None, None, *rest)
    with pytest.raises(RuntimeError, match="training=False needs running_mean and running_var"):
        forward(x, None, None, None, None, None, None, False, *rest[1:])
    with pytest.raises(RuntimeError, match=r"weight must be \(3,\), contiguous"):
        forward(x, torch.ones(4, device=DEVICE), None, None, None, None, None, *rest)
    flags = (True, 1e-5, False, True, True, True)
    with pytest.raises(RuntimeError, match="expected y, got mask bits"):
        bits = torch.ones(2, 3, 2, dtype=torch.uint8, device=DEVICE)
        backward(x, x, None, None, stats, None, bits, *[None] * 4, *flags)
    with pytest.raises(RuntimeError, match="out_grad and out_abs need y"):
        backward(x, x, None, None, stats, None, None, None, None, torch.zeros(2, 3, device=DEVICE), None, *flags)
    with pytest.raises(RuntimeError, match=r"gate_grad must be \(2, 3\) float32"):
        backward(x, x, None, None, stats, None, None, torch.zeros(3, 2, device=DEVICE), None, None, None, *flags)


# ---- geometry

FIELDS = "fused vectors slabs chunks parts threads join share slab lanes chunk rounds steps resident segments pixels part channels shared"  # noqa: E501


def plan(N, C, S, layout="nchw", itemsize=2, streams=1, per_sample=False, shared=SHARED, cluster=8):
    sizes, out = (ctypes.c_int64 * 3)(N, C, S), (ctypes.c_int64 * 19)()
    flags = (ctypes.c_int * 5)(layout == "nhwc", True, per_sample, itemsize, streams)
    LIBRARY.fastprune_cuda_plan(sizes, flags, (ctypes.c_int * 4)(shared, cluster, 256, 1024), out)
    return dict(zip(FIELDS.split(), out, strict=True))


def kept(p):
    return min(1.0, p["resident"] / (p["rounds"] * p["steps"])) if p["fused"] else 0.0


def test_resnet50_in_bfloat16_is_read_once():
    """NCHW, batch 256, H100 and H200: what the forward keeps of x, the backward of dy and x."""
    layers = [(64, 3136), (256, 3136), (128, 784), (512, 784), (256, 196), (1024, 196), (512, 49), (2048, 49)]
    for C, S in layers:
        forward, backward = plan(256, C, S), plan(256, C, S, streams=2)
        assert kept(forward) == 1, (C, S, forward)
        assert kept(backward) == 1 or (S == 3136 and kept(backward) > 0.5), (C, S, backward)
        assert forward["vectors"] and backward["vectors"]
        # two blocks on a multiprocessor, which has 228 KB and keeps 1 KB of each block's
        assert S == 3136 or 2 * (forward["shared"] + 1024) <= 228 << 10, (C, S, forward)
    assert 0.2 < kept(plan(256, 64, 12544))
    for C, S in [(512, 49), (2048, 49)]:
        assert kept(plan(256, C, S, "nhwc")) == 1


def test_few_channels_with_large_planes_fill_the_gpu():
    for N, C, S in [(16, 128, 1024), (64, 256, 12544), (1, 3, 1 << 20), (256, 64, 3136), (2, 3, 1 << 22)]:
        for layout in LAYOUTS:
            p = plan(N, C, S, layout, cluster=-1)
            blocks = p["slabs"] * p["chunks"] * p["parts"]
            assert 500 <= blocks <= 4 * 1024, (N, C, S, layout, p)


def test_plans_cover_every_element_and_fit_every_device():
    shapes = [
        (n, c, s) for n in (1, 2, 37, 256) for c in (1, 3, 16, 37, 64, 257, 2048) for s in (1, 4, 49, 196, 1024, 12544)
    ]
    for (N, C, S), layout, itemsize, streams, per_sample, (shared, cluster) in (
        (shape, layout, itemsize, streams, per_sample, device)
        for shape in shapes
        for layout in LAYOUTS
        for itemsize, streams, per_sample in ((2, 1, False), (4, 2, True), (2, 2, False))
        for device in ((SHARED, 8), (OPTIN_A100, 1), (SHARED, -1))
    ):
        p = plan(N, C, S, layout, itemsize, streams, per_sample, shared, cluster)
        assert p["shared"] <= shared and p["slabs"] * p["slab"] >= p["channels"] == C * p["join"]
        assert p["chunks"] * p["chunk"] >= p["segments"] and p["threads"] == 256
        assert p["chunks"] <= max(cluster, 1) if p["fused"] else p["resident"] == 0
        assert max(p["chunks"], p["parts"]) < 1 << 16 and p["resident"] % 2 == 0
        if layout == "nchw":
            assert p["segments"] == N and p["parts"] * p["part"] >= S and p["join"] == p["share"] == 1
            teams = p["threads"] // p["lanes"] // p["slab"]
            reach = p["steps"] * p["lanes"] * (16 // itemsize)
            assert teams >= 1 and p["rounds"] * teams >= p["chunk"] and reach >= p["part"]
        else:
            rows = 32 // p["lanes"]
            assert p["segments"] * p["pixels"] * p["join"] >= N * S and p["steps"] * rows >= p["pixels"]
            assert p["rounds"] * 8 >= p["chunk"]
            if per_sample:
                assert p["pixels"] * p["share"] * p["join"] == S and p["segments"] == N * p["share"]
            if C % 8 == 0:
                assert p["vectors"]
