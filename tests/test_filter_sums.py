"""filter_norm and weight_taylor on every backend, dtype and layout against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from bn_cases import assert_as_good_as_eager, backends_of, device_for
from torch import nn

from fastprune import backends, ops
from fastprune.errors import BackendError
from fastprune.ops.filter_norm import KINDS

BACKENDS = backends_of("filter_norm")
COMPILED = [b for b in BACKENDS if b != "eager"]
DTYPES = {
    "eager": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "cpp": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
}
EACH = pytest.mark.parametrize("backend, dtype", [(b, d) for b in BACKENDS for d in DTYPES[b]], ids=str)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# ragged widths, filters shorter and longer than a block, depthwise, linear, 1-D, 3-D, sizes 1 and 0
SIZES = [
    (16, 3, 3, 3), (37, 13, 1, 1), (5, 130, 3, 3), (32, 1, 3, 3), (10, 301), (7, 9, 5), (3, 4, 3, 2, 3), (1, 1, 1, 1),
    (1, 600), (600, 1), (0, 4, 3, 3), (4, 0, 3, 3), (2, 3, 17, 19), (65, 33, 1, 7),
]  # fmt: skip


# The interpreter takes a millisecond per operation: the same kinds, smaller and fewer.
FEW = [
    (6, 3, 3, 3),
    (9, 70, 1, 1),
    (5, 1, 3, 3),
    (3, 301),
    (3, 4, 5),
    (2, 4, 3, 2, 2),
    (0, 4, 3, 3),
    (3, 0, 3, 3),
    (1, 1),
]


def sizes_for(backend):
    return FEW if backend == "triton" and device_for(backend) == "cpu" else SIZES


def draw(sizes, dtype, layout="nchw", device="cpu", scale=1.0):
    rng = torch.Generator().manual_seed(0)
    drawn = [(scale * torch.randn(s, generator=rng, dtype=torch.float64)).to(dtype).to(device) for s in sizes]
    nhwc = {"nchw": {}, "nhwc": {4: torch.channels_last, 5: torch.channels_last_3d}}[layout]
    return [w.contiguous(memory_format=nhwc.get(w.dim(), torch.contiguous_format)) for w in drawn]


def definition(weights, kind, dim=0):
    terms = {"l1": torch.abs, "l2": torch.square, "sum_squares": torch.square, "sum": lambda w: w}[kind]
    rows = [terms(w.double().cpu()).movedim(dim, 0) for w in weights]
    sums = torch.cat([r.reshape(len(r), r[:1].numel() if len(r) else 0).sum(1) for r in rows])
    return sums.sqrt() if kind == "l2" else sums


def taylor(weights, grads):
    return definition([w.double() * g.double() for w, g in zip(weights, grads, strict=True)], "sum_squares")


def check(got, eager, exact, dtype):
    acc = torch.promote_types(dtype, torch.float32)  # in which sums of half weights are made
    assert got.dtype == acc and not got.requires_grad
    assert_as_good_as_eager({"sums": got}, {"sums": eager}, {"sums": exact}, acc)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_filter_norm(backend, dtype, layout):
    weights = draw(sizes_for(backend), dtype, layout, device_for(backend))
    for kind in KINDS:
        for dim in (0, 1):
            got = ops.filter_norm(weights, kind, dim, backend)
            check(got, ops.filter_norm(weights, kind, dim, "eager"), definition(weights, kind, dim), dtype)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_taylor(backend, dtype, layout):
    weights = draw(sizes_for(backend), dtype, layout, device_for(backend))
    grads = [torch.randn_like(w) for w in weights]
    check(
        ops.weight_taylor(weights, grads, backend),
        ops.weight_taylor(weights, grads, "eager"),
        taylor(weights, grads),
        dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_another_memory_format(backend):
    for mine, theirs in (("nchw", "nhwc"), ("nhwc", "nchw")):
        sizes = sizes_for(backend)
        weights, grads = draw(sizes, torch.float32, mine), draw(sizes, torch.float32, theirs, scale=0.1)
        grads[1] = grads[1].transpose(0, 1).contiguous().transpose(0, 1)
        weights, grads = ([t.to(device_for(backend)) for t in ts] for ts in (weights, grads))
        exact = taylor(weights, grads)
        check(
            ops.weight_taylor(weights, grads, backend), ops.weight_taylor(weights, grads, "eager"), exact, torch.float32
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_gradients_and_missing_ones(backend):
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1).requires_grad_(False), nn.Linear(5, 2)]
    layers = [m.to(device_for(backend)) for m in layers]
    weights = [m.weight for m in layers]
    x = torch.randn(2, 3, 5, 5, device=weights[0].device)
    layers[2](layers[1](layers[0](x)).mean((2, 3))).square().sum().backward()
    got = ops.weight_taylor(weights, backend=backend)
    want = [w.detach() * (0 if w.grad is None else w.grad) for w in weights]
    torch.testing.assert_close(got.cpu().double(), definition(want, "sum_squares"), rtol=1e-5, atol=1e-9)
    assert (got[4:9] == 0).all() and (got[:4] > 0).all() and not got.requires_grad
    assert torch.equal(ops.weight_taylor(weights, [None] * 3, backend), torch.zeros(11, device=x.device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_huge_and_tiny_weights(backend):
    w = torch.full((2, 40, 3, 3), 1e25, device=device_for(backend))
    w[1] = 1e-25
    got = ops.filter_norm([w], "l2", backend=backend).cpu().double()
    torch.testing.assert_close(got, definition([w], "l2"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_and_nan_pass(backend):
    w = torch.randn(5, 40, 3, 3, device=device_for(backend))
    w[1, 3, 2, 1], w[2, 39, 0, 0], w[2, 0, 0, 0], w[3, 5, 1, 1] = torch.inf, torch.inf, -torch.inf, torch.nan
    for kind in KINDS:
        got, want = (ops.filter_norm([w], kind, backend=b) for b in (backend, "eager"))
        torch.testing.assert_close(got, want, equal_nan=True)
        assert got.isnan().sum() == (2 if kind == "sum" else 1)
    got = ops.weight_taylor([w], [torch.ones_like(w)], backend)
    assert got.isinf().tolist() == [False, True, True, False, False] and got[3].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend):
    sizes = sizes_for(backend) + ([(300, 700), (64, 64, 5, 5), (3, 70000)] if backend != "triton" else [])
    weights, grads = draw(sizes, torch.float32, "nhwc"), draw(sizes, torch.float32, "nhwc", scale=0.1)
    weights, grads = ([t.to(device_for(backend)) for t in ts] for ts in (weights, grads))

    def run():
        norms = [ops.filter_norm(weights, kind, dim, backend) for kind in ("l1", "l2") for dim in (0, 1)]
        return [*norms, ops.weight_taylor(weights, grads, backend)]

    first, threads = run(), torch.get_num_threads()
    try:
        for n in (1, 2) if backend != "triton" else (1,):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend):
    weights = draw([(5, 3, 2, 2), (4, 7)], torch.float32, "nhwc", device_for(backend))
    utils = ("test_schema", "test_faketensor")
    for dim in (0, 1):
        op = getattr(torch.ops.fastprune.filter_norm, backend)
        torch.library.opcheck(op, (weights, "l2", dim), test_utils=utils)
    op = getattr(torch.ops.fastprune.weight_taylor, backend)
    torch.library.opcheck(op, (weights, [w.clone() for w in weights]), test_utils=utils)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.11
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_they_compile_into_one_graph(backend):
    weights = [w.requires_grad_() for w in draw([(5, 3, 2, 2), (4, 7)], torch.float32)]

    def fn(*weights):
        grads = [w.detach() * 2 for w in weights]
        return ops.filter_norm(weights, "l2", backend=backend) + ops.weight_taylor(weights, grads, backend)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(*weights), fn(*weights))


@pytest.mark.parametrize("backend", COMPILED)
def test_other_strides_go_to_eager_or_are_refused(backend):
    weights = [torch.randn(4, 5, device=device_for(backend)), torch.randn(5, 4, device=device_for(backend)).t()]
    torch.testing.assert_close(ops.filter_norm(weights), torch.cat([w.abs().sum(1) for w in weights]))
    assert ops.weight_taylor(weights, weights).shape == (8,)
    for op, args in ((ops.filter_norm, {}), (ops.weight_taylor, {"grads": weights})):
        with pytest.raises(BackendError, match=r"contiguous or channels_last, weights\[1\] has strides \(1, 4\)"):
            op(weights, **args, backend=backend)
    with backends.force("eager"):
        ops.filter_norm(weights)


ONES = [torch.ones(2, 3), torch.ones(4, 2, 1, 1)]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ops.filter_norm([]), "filter_norm: expected at least one weight"),
        (lambda: ops.filter_norm(ONES, "l3"), "kind must be 'l1', 'l2', 'sum_squares' or 'sum', got 'l3'"),
        (lambda: ops.filter_norm(ONES, dim=2), "dim must be 0 .* got 2"),
        (lambda: ops.filter_norm([*ONES, torch.ones(3)]), r"weights\[2\] is \(3,\)"),
        (lambda: ops.filter_norm([*ONES, torch.ones(3, 3).double()]), "one dtype and device"),
        (lambda: ops.weight_taylor([torch.ones(2, 2).int()]), "weight_taylor: expected weights of floats"),
        (lambda: ops.weight_taylor(ONES, ONES[:1]), "gradient or None per weight, 2, got 1"),
        (lambda: ops.weight_taylor(ONES, ONES[::-1]), r"grads\[0\] like its weight, \(2, 3\) torch.float32"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
