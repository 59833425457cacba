"""Batch norm in slabs: programs that wait for each other, in many orders; and what is launched, on paper.

Interpreted, programs take turns as tests/slab_schedule.py draws them; on a GPU the same calls run for real.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from bn_cases import (
    BACKENDS,
    LAYOUTS,
    Variant,
    assert_as_good_as_eager,
    definition,
    device_for,
    every_variant,
    make_call,
    ours,
    plain_pytorch,
)

if "triton" not in BACKENDS:
    pytest.skip("triton is not among FASTPRUNE_TEST_BACKENDS", allow_module_level=True)

import triton
import triton.language as tl
from fastprune.kernels import _bn_geometry as geometry
from fastprune.kernels import _bn_slab as slab
from fastprune.kernels import batch_norm_act as kernels

DEVICE = device_for("triton")
ORDERS = (0, 1)
SMALL = {"nchw": geometry.Device(processors=2, l2_bytes=24 << 10), "nhwc": geometry.Device(2, 96 << 10)}
INTERPRETED = pytest.mark.skipif(DEVICE == "cuda", reason="a kernel that waits for ever would hang the GPU")
HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
TURNS = [
    Variant(act="relu", residual=True, gates="all"),
    Variant(bound="sigmoid", bias=False, act="relu", gates="abs"),
    Variant(params="same"),
    Variant(act="relu", residual=True, params="same"),
]


@pytest.fixture
def slabs(monkeypatch):
    """All that can takes slabs, on a GPU of few programs and a small cache; yields the paths chosen."""
    paths = []

    def choose(*args, **kwargs):
        paths.append(plain(*args, **kwargs))
        return paths[-1]

    plain = kernels.choose
    monkeypatch.setattr(geometry, "FUSED_ELEMENTS", 0)
    monkeypatch.setattr(geometry, "SLAB_THREADS", 128)
    monkeypatch.setattr(kernels, "device_of", lambda x: SMALL["nchw" if x.is_contiguous() else "nhwc"])
    monkeypatch.setattr(kernels, "choose", choose)
    geometry.slab_plan.cache_clear()
    yield paths
    geometry.slab_plan.cache_clear()


@pytest.fixture
def teams(slabs, monkeypatch):
    """Shapes by layout of which each team takes several blocks of channels, in float32 with several members."""
    monkeypatch.setattr(geometry, "SLAB_THREADS", 32)
    devices = {"nchw": geometry.Device(2, 16 << 10), "nhwc": geometry.Device(2, 32 << 10)}
    monkeypatch.setattr(kernels, "device_of", lambda x: devices["nchw" if x.is_contiguous() else "nhwc"])
    yield {"nchw": (8, 3, 8, 8), "nhwc": (2, 48, 4, 8)}
    assert all(p.members > 1 and p.blocks > p.teams for p in slabs if p.config["VEC"] == 4)


@pytest.fixture
def in_turns():
    """A function of a seed: the context in which cooperative launches run."""
    if DEVICE == "cuda":
        import contextlib

        return lambda seed: contextlib.nullcontext()
    from slab_schedule import scheduled

    return scheduled


def check(variant, shape, dtype, layout):
    call = make_call(variant, shape, dtype, layout)
    got = ours(call, dtype, "triton", DEVICE)
    assert_as_good_as_eager(got, plain_pytorch(call, dtype), definition(call), dtype)


VARIANTS = every_variant()


@pytest.mark.parametrize(
    "layout, variant", [(("nchw", "nhwc")[(i >> 1) % 2], v) for i, v in enumerate(VARIANTS)], ids=str
)
def test_every_branch(slabs, in_turns, variant, layout):
    """Layouts and dtypes take turns, so that the whole stays short."""
    turn = VARIANTS.index(variant)
    with in_turns(turn):
        check(variant, (3, 16 if layout == "nchw" else 32, 5, 7), HALVES_AND_FLOAT[turn % 3], layout)
    assert len(slabs) == 1 + (variant.training or not variant.track)  # forward in training, backward always
    assert all(isinstance(path, geometry.Slab) and path.members * path.blocks > 1 for path in slabs)


SHAPES = [  # planes on and off the vectors, blocks of one channel and of many, the last one short, one sample
    (4, 3, 24, 40), (2, 2, 32, 32), (5, 16, 7, 7), (6, 24, 7, 7), (37, 48, 1, 1), (9, 40, 2, 2), (23, 8, 3, 3),
    (1, 6, 16, 31), (3, 24, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(slabs, in_turns, shape, layout):
    turn = SHAPES.index(shape) + (layout == "nhwc")
    with in_turns(turn):
        check(TURNS[turn % len(TURNS)], shape, (torch.float32, torch.bfloat16)[turn % 2], layout)


@pytest.mark.parametrize("shape", [(2, 2, 32, 64), (2, 4, 31, 65)], ids=str)
def test_planes_that_several_members_share(slabs, in_turns, monkeypatch, shape):
    """Gate sums per sample then come in parts; off the vectors, the apply pass shares columns instead."""
    monkeypatch.setattr(kernels, "device_of", lambda x: geometry.Device(4, 1 << 20))
    with in_turns(0):
        check(TURNS[0], shape, torch.float32, "nchw")
    assert slabs[0].parts_s > 1 and slabs[1].parts_n > 1 and slabs[1].parts_s > 1


def plan(shape, layout, itemsize, kind, device=None, **asked):
    N, C, H, W = shape
    nhwc = layout == "nhwc" or H * W == 1
    return geometry.slab_plan(N, C, H * W, nhwc, itemsize, kind, device or SMALL[layout], **asked)


def test_the_shapes_above_take_every_kind_of_team(slabs):
    cases = itertools.product(SHAPES, LAYOUTS, (2, 4), ("forward", "backward", "gates"))
    plans = [p for case in cases if (p := plan(*case)) is not None]
    assert sum(triton.cdiv(p.blocks, p.teams) > 2 for p in plans) > 8
    assert sum(p.teams > 1 and p.members > 1 for p in plans) >= 3 and {p.members for p in plans} >= {1, 2, 3}
    assert any(p.config["PEEL"] for p in plans) and any(p.blocks * p.config["BLOCK_C"] > p.sizes[1] for p in plans)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_order_gives_the_same_right_bits(teams, in_turns, layout):
    variant = TURNS[layout == "nchw"]
    call, results = make_call(variant, teams[layout], torch.float32, layout), []
    for seed in ORDERS:
        with in_turns(seed):
            results.append(ours(call, torch.float32, "triton", DEVICE))
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())
    assert_as_good_as_eager(results[0], plain_pytorch(call, torch.float32), definition(call), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cumulative_average_reads_the_count_of_this_batch(slabs, in_turns, layout):
    x = torch.randn(6, 16, 6, 6).to(DEVICE, memory_format=LAYOUTS[layout])
    mean, var, tracked = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE), torch.tensor(3, device=DEVICE)
    with in_turns(0):
        kernels.batch_norm_act(x, None, None, None, mean, var, tracked, True, None, 1e-5, False, False, False)
    assert tracked.item() == 4 and isinstance(slabs[0], geometry.Slab)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)) / 4)
    torch.testing.assert_close(var, 0.75 + x.var((0, 2, 3)) / 4)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cuda_graph_replays_slabs_of_full_size(layout):
    """Counters are cleared in the graph: each replay counts from zero."""
    shape = (256, 256, 14, 14) if layout == "nhwc" else (64, 64, 56, 56)
    x, dy = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(memory_format=LAYOUTS[layout]) for _ in "xy")
    N, C, S, nhwc = shape[0], shape[1], shape[2] * shape[3], layout == "nhwc"
    device = geometry.device_of(x)
    if not isinstance(geometry.choose(N, C, S, nhwc, 2, "backward", device), geometry.Slab):
        pytest.skip(f"no slabs on {device}")

    def step():
        y, stats, mask = kernels.batch_norm_act(x, *[None] * 6, True, 0.1, 1e-5, False, True, False)
        rest = (*[None] * 4, True, 1e-5, False, True, True, False)
        dx, *_ = kernels.batch_norm_act_backward(dy, x, None, None, stats, None, mask, *rest)
        return y, stats, dx

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        for t in got:
            t.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the schedule finds what it is there to find


@triton.jit
def _no_wait(counter_ptr, count):
    pass


@triton.jit
def _wait_for_slots_only(counter_ptr, count):
    """For all members, but not for the one that joins their slots."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < count - 1:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def _arrive_one_early(counter_ptr):
    """Whoever comes last but one thinks that all are there."""
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1


@triton.jit
def _wait_for_one_more(counter_ptr, count):
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < count + 1:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def _join_sums_of_the_wrong_slab(at_ptr, inside, P, row, plane, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    return slab._right_join(at_ptr - 2 * plane, inside, P, row, plane, BLOCK_P, BLOCK_C)


def some_order_is_wrong(in_turns):
    """Whether one of the orders that are right above gives other numbers than the definition."""
    call = make_call(TURNS[1], (8, 3, 8, 8), torch.float32)
    exact = definition(call)
    for seed in ORDERS:
        with in_turns(seed):
            got = ours(call, torch.float32, "triton", DEVICE)
        if any(not torch.allclose(t.double(), exact[name], rtol=1e-3, atol=1e-3) for name, t in got.items()):
            return True
    return False


@INTERPRETED
@pytest.mark.parametrize(
    "name, bug",
    [
        ("_wait", _no_wait),
        ("_wait", _wait_for_slots_only),
        ("_arrive", _arrive_one_early),
        ("_join_sums", _join_sums_of_the_wrong_slab),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_planted_bugs_give_wrong_numbers_in_some_order(teams, in_turns, monkeypatch, name, bug):
    monkeypatch.setattr(slab, "_right_join", slab._join_sums, raising=False)
    monkeypatch.setattr(slab, name, bug)
    assert some_order_is_wrong(in_turns)


@INTERPRETED
def test_a_deadlock_is_found(teams, in_turns, monkeypatch):
    from slab_schedule import Deadlock

    monkeypatch.setattr(slab, "_wait", _wait_for_one_more)
    with pytest.raises(Deadlock, match="programs wait, and nobody else is left"):
        some_order_is_wrong(in_turns)


@INTERPRETED
def test_counters_need_a_cooperative_launch(slabs):
    from slab_schedule import scheduled

    class Plain:  # the launcher's call, without the option
        def __getitem__(self, grid):
            return lambda *args, launch_cooperative_grid, **kwargs: slab._slab_kernel[grid](*args, **kwargs)

    x = torch.randn(6, 32, 7, 7)
    with pytest.MonkeyPatch.context() as patch, scheduled(0):
        patch.setattr(kernels, "_slab_kernel", Plain())
        with pytest.raises(Exception, match="an atomic in a launch that is not cooperative"):
            kernels.batch_norm_act(x, *[None] * 6, True, 0.1, 1e-5, False, False, False)


# ---- what is launched where, on paper

H200 = geometry.Device(processors=132, l2_bytes=60 << 20)
A100 = geometry.Device(processors=108, l2_bytes=40 << 20)
RESNET50 = (  # channels, pixels at batch 256
    (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7),
)  # fmt: skip


def paths(layout, device, itemsize=2, direction="forward", **asked):
    """For each layer of ResNet-50: "slabs" or the name of another path."""
    found = []
    for C, H in RESNET50:
        path = geometry.choose(256, C, H * H, layout == "nhwc", itemsize, direction, device, **asked)
        found.append("slabs" if isinstance(path, geometry.Slab) else path)
    return found


def test_which_layers_of_resnet50_are_read_once():
    assert paths("nchw", H200) == paths("nchw", H200, direction="backward") == ["slabs"] * 9
    assert paths("nchw", A100) == ["slabs"] * 9
    assert paths("nchw", A100, direction="backward") == ["three launches"] + ["slabs"] * 8
    nhwc = paths("nhwc", H200)  # 64 bytes of channels times all pixels must fit
    assert nhwc == ["three launches"] * 3 + ["slabs"] * 6
    assert paths("nhwc", H200, direction="backward") == ["three launches"] * 5 + ["slabs"] * 4
    add = {"judged_by_y": True, "add": True}
    assert paths("nchw", H200, direction="backward", **add) == ["slabs"] * 9
    assert set(paths("nchw", geometry.INTERPRETER)) == {"three launches", "one launch"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_slabs_fill_the_gpu_and_fit_its_cache(device, layout):
    shapes = [(n, c, h, h) for c, h in RESNET50 for n in (32, 256)] + [(64, 256, 112, 112), (16, 128, 32, 32)]
    for shape, itemsize, (kind, asked) in itertools.product(
        shapes,
        (2, 4),
        (("forward", {}), ("backward", {}), ("backward", {"judged_by_y": True, "add": True}), ("gates", {})),
    ):
        p = plan(shape, layout, itemsize, kind, device, **asked)
        if p is None:
            continue
        N, C, S, numel, chunk_n, chunk_s = p.sizes
        cfg = p.config
        assert cfg["VEC"] * itemsize == 16 and numel == torch.Size(shape).numel() == N * C * S
        assert (p.parts_n - 1) * chunk_n < N <= p.parts_n * chunk_n  # each member has something to do
        assert (p.parts_s - 1) * chunk_s < S <= p.parts_s * chunk_s
        assert p.blocks * cfg["BLOCK_C"] >= C > (p.blocks - 1) * cfg["BLOCK_C"] and p.teams <= p.blocks
        per_processor = geometry._occupancy(kind, cfg["PEEL"])[0]
        assert p.programs <= per_processor * device.processors and p.slab_bytes <= device.l2_bytes / 4
        assert per_processor * 32 * cfg["num_warps"] * cfg["maxnreg"] <= 65536  # all of them at the same time
        if numel * itemsize >= 4 << 20:
            assert p.programs >= 0.75 * device.processors


def test_the_two_ends_fill_an_h200():
    """Few channels of many pixels, many of few: programs, and bytes of x that each sums at a time."""
    ends = {
        (16, 128, 32, 32): (256, 16 << 10), (64, 256, 112, 112): (384, 40 << 10), (256, 2048, 7, 7): (264, 52 << 10),
    }  # fmt: skip
    for (N, C, H, W), (programs, most) in ends.items():
        p = geometry.choose(N, C, H * W, False, 2, "forward", H200)
        assert p.programs == programs and p.config["VEC"] == 8
        assert p.sizes[4] * min(p.sizes[5], H * W) * p.config["BLOCK_C"] * 2 <= most, p


def test_small_layers_and_those_without_slabs():
    def choose(*args, **kwargs):
        return geometry.choose(*args, H200, **kwargs)

    assert choose(128, 64, 64, False, 2, "forward") == "one launch"
    assert choose(128, 64, 49, False, 2, "backward") == "one launch"  # narrow stores, but few
    assert isinstance(choose(128, 64, 64, False, 2, "forward", cumulative=True), geometry.Slab)
    assert choose(256, 64, 3136, False, 2, "backward", need_dx=False) == "three launches"
    assert choose(256, 37, 784, True, 2, "forward") == "three launches"  # rows of 74 bytes
    assert choose(256, 37, 841, False, 2, "forward") == "three launches"  # 37 * 29 * 29 is odd: rows off the vectors


def test_traffic_of_slabs():
    shape, size = (256, 64, 56, 56), 2 * 256 * 64 * 56 * 56
    for what, tensors in (("bn", (2, 3)), ("relu", (2, 3)), ("add", (3, 5))):
        got = kernels.traffic(shape, False, 2, what, H200)
        assert (got["forward"], got["backward"]) == (tensors[0] * size, tensors[1] * size)
        assert got["path"] == {"forward": "slabs", "backward": "slabs"}
    got = kernels.traffic(shape, True, 2, "add", H200)
    assert (got["forward"], got["backward"]) == (4 * size, 7 * size)
    ragged = kernels.traffic((64, 37, 16, 16), True, 2, "relu", H200)  # small enough to stay in L2 between launches
    assert ragged["path"]["forward"] == "three launches" and ragged["forward"] == 2 * 2 * 64 * 37 * 256
