"""gram_penalty and orthogonality_penalty against the authors' numbers, their definitions in float64, and as ops."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bn_cases import assert_as_good_as_eager, backends_of, device_for

from fastprune import ops
from fastprune.errors import BackendError
from fastprune.ops.gram_penalty import value_and_grad

GOLDEN = np.load(Path(__file__).parent / "golden" / "gram.npz")
BACKENDS = backends_of("gram_penalty")
COMPILED = [b for b in BACKENDS if b != "eager"]
NO_INTERPRETER = [b for b in BACKENDS if b != "triton" or device_for("triton") != "cpu"]
DTYPES = {
    "eager": (torch.float64, torch.bfloat16),
    "cpp": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
}
EACH = pytest.mark.parametrize("backend, dtype", [(b, d) for b in BACKENDS for d in DTYPES[b]], ids=str)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# rows below, at and beyond a block of the kernels, rows longer than a pass and shorter than a vector; sizes 1 and 0
SIZES = [
    (16, 3, 3, 3), (84, 5, 3, 3), (171, 13, 1, 1), (90, 2, 1, 1), (10, 801), (7, 9, 5), (3, 4, 3, 2, 3), (1, 1, 1, 1),
    (1, 600), (97, 1), (0, 4, 3, 3), (4, 0, 3, 3), (5, 3, 4, 7),
]  # fmt: skip
FEW = [(6, 3, 3, 3), (70, 4, 2, 2), (5, 13), (3, 4, 5), (2, 4, 3, 2, 2), (1, 1), (0, 4, 3, 3), (3, 0, 3, 3)]
CONV = [(16, 3, 3, 3), (90, 2, 3, 2), (7, 30), (1, 1, 1, 1), (0, 4, 3, 3), (4, 0, 3, 3), (5, 3, 4, 5)]
FACTORS = [{}, {"kept": 1.0}, {"cut": 0.5, "kept": 0.1}, {"cut": 0.0, "kept": 1.0}]
PENALTIES = {  # kind and arguments, "energy" gets its references too
    "rows": {}, "columns": {}, "energy": {}, "conv": {}, "conv stride 2": {"stride": 2, "padding": 1},
    "conv lopsided": {"stride": 2, "padding": 2}, "conv wide": {"padding": 5}, "conv norm": {"stride": 2, "norm": True},
}  # fmt: skip


def draw(sizes, dtype=torch.float64, layout="nchw", device="cpu"):
    """Weights with rows of length about 1, as initialised."""
    nhwc = {"nchw": {}, "nhwc": {4: torch.channels_last, 5: torch.channels_last_3d}}[layout]
    weights = [torch.randn(s, dtype=torch.float64) / max(1, math.prod(s[1:])) ** 0.5 for s in sizes]
    weights = [w.contiguous(memory_format=nhwc.get(w.dim(), torch.contiguous_format)) for w in weights]
    return [w.to(device, dtype).requires_grad_() for w in weights]


def masks(sizes, ratio=0.6):
    """All kept, all cut, one kept, and at random."""
    keep = [torch.rand(s[0]) > ratio for s in sizes]
    keep[0][:], keep[2][:] = True, False
    keep[3][:] = torch.arange(sizes[3][0]) == 0
    return keep


def sizes_for(backend):
    return SIZES if backend in NO_INTERPRETER else FEW


def with_grads(penalty, weights):
    """Value and gradients by name."""
    value = penalty(weights)
    grads = torch.autograd.grad(value, weights)
    return {"value": value.detach(), **{f"{i} {tuple(g.shape)}": g for i, g in enumerate(grads)}}


def exact_of(weights):
    return [w.detach().double().cpu().contiguous().requires_grad_() for w in weights]


def gram_definition(weights, keep, scale, cut=1.0, kept=0.0):
    total = 0
    for w, k, s in zip(weights, keep, scale, strict=True):
        a = w.flatten(1) if w.numel() else w.new_zeros(len(w), 1) + 0 * w.sum()
        factor = torch.full((len(w), len(w)), cut, dtype=a.dtype)
        factor[k.outer(k)] = kept
        total = total + s * (factor * (a @ a.t() - torch.diag(k.to(a.dtype))).square()).sum() / max(1, len(w) ** 2)
    return total


def orthogonality_definition(weights, kind, scale, references=(), stride=1, padding=None, norm=False):
    total = 0
    for i, (w, s) in enumerate(zip(weights, scale, strict=True)):
        if not w.numel():
            n, k = len(w), math.prod(w.shape[1:])
            empty = {"rows": 1 / max(n, 1) if n else 0, "columns": 1 / k if k else 0, "energy": 0}
            total = total + s * empty.get(kind, n**0.5 if norm else n) + 0 * w.sum()
            continue
        a = w.flatten(1)
        if kind == "rows":
            total = total + s * (a @ a.t() - torch.eye(len(a))).square().mean()
        elif kind == "columns":
            total = total + s * (a.t() @ a - torch.eye(a.shape[1])).square().mean()
        elif kind == "energy":
            b = references[i].detach().double().cpu().flatten(1)
            total = total + s * (a.t() @ a - b.t() @ b).square().mean()
        else:
            w = w if w.dim() == 4 else w[:, :, None, None]
            pad = tuple((k - 1) // stride * stride if padding is None else padding for k in w.shape[2:])
            out = F.conv2d(w, w, stride=stride, padding=pad)
            target = torch.zeros_like(out.detach())
            target[:, :, out.shape[2] // 2, out.shape[3] // 2] = torch.eye(len(w))
            value = (out - target).square().sum()
            total = total + s * (value.sqrt() if norm else value)
    return total


# ---- values and gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["conv", "fc", "conv_none"])
@pytest.mark.parametrize("version, kept", [("v5", 0.0), ("v5_2", 1.0)])
def test_value_and_gradient_are_the_authors(backend, case, version, kept):
    w = torch.from_numpy(GOLDEN[f"tpp/{case}/w"]).to(device_for(backend)).requires_grad_()
    keep = torch.ones(len(w), dtype=torch.bool)
    keep[torch.from_numpy(GOLDEN[f"tpp/{case}/pruned"]).long()] = False
    value = ops.gram_penalty([w], [keep], kept=kept, backend=backend)
    value.backward()
    np.testing.assert_allclose(value.item(), GOLDEN[f"tpp/{case}/{version}/loss"], rtol=1e-12)
    np.testing.assert_allclose(w.grad.cpu(), GOLDEN[f"tpp/{case}/{version}/grad"], rtol=1e-12, atol=1e-14)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_gram_penalty(backend, dtype, layout, factors):
    sizes, device = sizes_for(backend), device_for(backend)
    weights, keep, scale = draw(sizes, dtype, layout, device), masks(sizes), [0.5 + i for i in range(len(sizes))]
    plan = ops.gram_plan(keep, device)
    exact = with_grads(lambda ws: gram_definition(ws, keep, scale, **factors), exact_of(weights))
    eager, got = (
        with_grads(lambda ws, b=b: ops.gram_penalty(ws, plan, scale=scale, backend=b, **factors), weights)
        for b in ("eager", backend)
    )
    assert got["value"].dtype == torch.promote_types(dtype, torch.float32) and got["value"].shape == ()
    assert all(g.dtype == dtype for name, g in got.items() if name != "value")
    assert_as_good_as_eager(got, eager, exact, dtype)
    if not factors:  # the channels of the first weight are all kept: nothing to do there
        assert not got[f"0 {sizes[0]}"].any()


@pytest.mark.parametrize(
    "name, backend, dtype",
    [(n, b, d) for n in PENALTIES for b in BACKENDS if b != "triton" or "conv" not in n for d in DTYPES[b]],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_orthogonality_penalty(name, backend, dtype, layout):
    kind, device = name.split()[0], device_for(backend)
    sizes = CONV if kind == "conv" else sizes_for(backend)
    weights, scale = draw(sizes, dtype, layout, device), [0.5 + i / 4 for i in range(len(sizes))]
    kwargs = dict(PENALTIES[name])
    if kind == "energy":
        others = draw(sizes, dtype, layout, device)
        kwargs["references"] = [(w + 0.3 * b).detach() for w, b in zip(weights, others, strict=True)]
    exact = with_grads(lambda ws: orthogonality_definition(ws, kind, scale, **kwargs), exact_of(weights))
    eager, got = (
        with_grads(lambda ws, b=b: ops.orthogonality_penalty(ws, kind, scale=scale, backend=b, **kwargs), weights)
        for b in ("eager", backend)
    )
    if kind == "energy" and dtype == torch.float64:  # a difference of sums, and eager's are those of the definition
        for key, value in got.items():
            torch.testing.assert_close(value.cpu(), exact[key], rtol=1e-11, atol=1e-12)
    else:
        assert_as_good_as_eager(got, eager, exact, dtype)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="cpp is not under test")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = """
import test_gram_penalty as t
from fastprune import backends
t.torch.manual_seed(0)
for dtype in (t.torch.float32, t.torch.float64):
    t.test_gram_penalty("cpp", dtype, "nhwc", {"kept": 1.0})
t.test_orthogonality_penalty("energy", "cpp", t.torch.float32, "nchw")
print(backends.build_info()["isa"])
"""
    env = os.environ | {"FASTPRUNE_CPU_ISA": isa, "FASTPRUNE_TEST_BACKENDS": "eager,cpp", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if "FASTPRUNE_CPU_ISA" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0 and done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_grad_are_those_of_the_function_in_the_layout_of_the_weights(backend):
    sizes = [(6, 3, 3, 3), (5, 4)]
    weights = draw(sizes, torch.bfloat16, "nhwc", device_for(backend))
    plan, scale = ops.gram_plan([torch.arange(6) > 1, torch.arange(5) > 3], device_for(backend)), torch.tensor([1.0, 3])
    scale = scale.to(device_for(backend))
    value, grads = value_and_grad(weights, plan, 1.0, 0.5, scale, backend)
    want = ops.gram_penalty(weights, plan, kept=0.5, scale=scale, backend=backend)
    assert torch.equal(value, want.detach()) and not value.requires_grad
    for w, g, expected in zip(weights, grads, torch.autograd.grad(want, weights), strict=True):
        assert g.stride() == w.stride() and g.dtype == torch.float32 and torch.equal(g.bfloat16(), expected)


@pytest.mark.parametrize("backend", COMPILED)
def test_nothing_of_the_kept_block_is_read_when_it_does_not_count(backend):
    w = draw([(40, 3, 3, 3)], torch.float32, device=device_for(backend))[0].detach()
    w[3] = torch.inf
    w.requires_grad_()
    keep = torch.ones(40, dtype=torch.bool)
    value = ops.gram_penalty([w], [keep], backend=backend)
    assert value == 0 and not torch.autograd.grad(value, w)[0].any()
    keep[7] = False  # meets row 3
    assert not ops.gram_penalty([w], [keep], backend=backend).isfinite()


@pytest.mark.parametrize("backend", [b for b in NO_INTERPRETER if b != "eager"])
def test_two_runs_agree_bit_for_bit(backend):
    sizes = [*SIZES, (200, 130, 3, 3)]
    weights = [w.to(device_for(backend)) for w in draw(sizes, torch.float32, "nhwc")]
    plan = ops.gram_plan(masks(sizes), device_for(backend))
    few = [w for w in weights[:4] if w.dim() == 4]

    def run():
        results = [with_grads(lambda ws: ops.gram_penalty(ws, plan, kept=0.5, backend=backend), weights)]
        for kind in ("columns", "conv") if backend != "triton" else ():
            results.append(with_grads(lambda ws, k=kind: ops.orthogonality_penalty(ws, k, backend=backend), few))
        return [t for r in results for t in r.values()]

    first, threads = run(), torch.get_num_threads()
    try:
        for n in (1, 2, 3) if backend == "cpp" else (1,):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", COMPILED)
def test_weights_that_moved_or_changed_are_read_where_they_are_now(backend):
    """Triton keeps tables of addresses between calls."""
    first = [w.detach() for w in draw([(20, 4), (5, 2, 3, 3)], torch.float32, device=device_for(backend))]
    plans = [ops.gram_plan([torch.arange(20) > k, torch.arange(5) > 2], device_for(backend)) for k in (9, 15)]
    for weights in (first, [2 * w for w in first], [w.mul_(3) for w in first], [w.flip(0).contiguous() for w in first]):
        for plan in plans:
            got, want = (ops.gram_penalty(weights, plan, backend=b) for b in (backend, "eager"))
            torch.testing.assert_close(got, want)


# ---- as PyTorch ops


@pytest.mark.parametrize(
    "name, backend",
    [
        (n, b)
        for n in ("gram", "rows", "columns", "energy", "conv", "conv norm")
        for b in NO_INTERPRETER
        if b != "triton" or n in ("gram", "rows")
    ],
)
def test_gradients_of_first_and_second_order(name, backend):
    kind = name.split()[0]
    weights = draw([(3, 1, 2, 2), (2, 3)], device=device_for(backend))
    kwargs = {"backend": backend, "scale": [1.0, 3.0]} | PENALTIES.get(name, {})
    if kind == "energy":
        kwargs["references"] = [torch.randn_like(w) for w in weights]

    def penalty(*weights):
        if kind == "gram":
            return ops.gram_penalty(weights, [torch.arange(3) > 1, torch.arange(2) > 0], kept=0.3, **kwargs)
        return ops.orthogonality_penalty(weights, kind, **kwargs)

    assert torch.autograd.gradcheck(penalty, weights)
    assert torch.autograd.gradgradcheck(penalty, weights, fast_mode=True)


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend):
    weights = [w.detach() for w in draw([(5, 3, 2, 2), (4, 7)], torch.float32, "nhwc", device_for(backend))]
    order = ops.gram_plan([torch.arange(5) > 1, torch.arange(4) > 2], device_for(backend)).order
    utils, scale = ("test_schema", "test_faketensor"), torch.ones(2, device=device_for(backend))
    op = getattr(torch.ops.fastprune.gram_penalty, backend)
    for args in ((order, [2, 3], 1.0, 0.0, scale), (None, [0, 0], 0.0, 1.0, None)):
        torch.library.opcheck(op, (weights, *args), test_utils=utils)
    if backend == "cpp":
        op = torch.ops.fastprune.orthogonality_penalty.cpp
        for args in (
            ([], "columns", [], [], False, scale),
            ([w.clone() for w in weights], "energy", [], [], False, None),
            ([], "conv", [1, 2], [1, 1, 0, 0], True, scale),
        ):
            torch.library.opcheck(op, (weights, *args), test_utils=utils)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.11
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_they_compile_into_one_graph(backend):
    weights = draw([(5, 3, 2, 2), (4, 7)], torch.float32)
    plan, scale = ops.gram_plan([torch.arange(5) > 1, torch.arange(4) > 2]), torch.tensor([1.0, 2.0])

    def fn(*weights):
        rest = ops.orthogonality_penalty(weights, "conv", norm=True, backend=backend)
        return ops.gram_penalty(weights, plan, scale=scale, backend=backend) + rest

    torch._dynamo.reset()
    got, want = torch.compile(fn, fullgraph=True, backend="aot_eager")(*weights), fn(*weights)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", COMPILED)
def test_what_a_backend_cannot_take_goes_to_eager_or_is_refused(backend):
    device = device_for(backend)
    weights, keep = [torch.randn(5, 4, device=device).t()], [torch.arange(4) > 1]
    torch.testing.assert_close(
        ops.gram_penalty(weights, keep), ops.gram_penalty([weights[0].contiguous()], keep, backend="eager")
    )
    with pytest.raises(BackendError, match=r"contiguous or channels_last, weights\[0\] has strides \(1, 4\)"):
        ops.gram_penalty(weights, keep, backend=backend)
    weights = [torch.randn(4, 5, device=device)]
    if backend == "triton":
        with pytest.raises(BackendError, match="no kernel of kind 'conv'"):
            ops.orthogonality_penalty(weights, "conv", backend=backend)
        there = torch.randn(4, 5, 3, 3, device=device)
        elsewhere = there.contiguous(memory_format=torch.channels_last)
        with pytest.raises(BackendError, match=r"references must lie like their weights, references\[0\] has strides"):
            ops.orthogonality_penalty([there], "energy", references=[elsewhere], backend=backend)
    ops.orthogonality_penalty(weights, "columns")
    with torch.autocast(device, torch.bfloat16):
        got = ops.gram_penalty(weights, keep, backend="eager")
    assert torch.equal(got, ops.gram_penalty(weights, keep, backend="eager"))


ONES, KEEP = [torch.ones(2, 3), torch.ones(4, 2, 1, 1)], [torch.ones(2).bool(), torch.ones(4).bool()]
orthogonality = ops.orthogonality_penalty


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ops.gram_penalty([], []), "gram_penalty: expected at least one weight"),
        (lambda: ops.gram_penalty(ONES, []), "gram_plan: expected at least one mask, got none"),
        (lambda: ops.gram_penalty(ONES, [torch.ones(2), KEEP[1]]), r"keep\[0\] is \(2,\) torch.float32"),
        (lambda: ops.gram_penalty(ONES, KEEP[:1]), "masks for 2 weights of 6 channels in all on cpu, got 1 of 2"),
        (lambda: ops.gram_penalty(ONES, [~k for k in KEEP[::-1]]), r"cuts 4 channels of weights\[0\], which has 2"),
        (lambda: ops.gram_penalty(ONES, KEEP, scale=[1.0]), r"a scale \(2,\) on cpu, got \(1,\) on cpu"),
        (lambda: ops.gram_penalty([*ONES, torch.ones(3)], KEEP), r"weights\[2\] is \(3,\)"),
        (lambda: orthogonality(ONES, "row"), "kind must be 'rows', 'columns', 'energy' or 'conv', got 'row'"),
        (lambda: orthogonality(ONES, "rows", norm=True), "belong to kind 'conv'; leave them out with 'rows'"),
        (lambda: orthogonality(ONES, "energy"), "expected one reference per weight with 'energy' and none else, got 0"),
        (lambda: orthogonality(ONES, references=ONES), "one reference per weight with 'energy' and none else, got 2"),
        (lambda: orthogonality(ONES, "energy", references=ONES[::-1]), r"references\[0\] is \(4, 2, 1, 1\)"),
        (lambda: orthogonality(ONES, "conv", stride=0), "a stride from 1 and a padding from 0 on, .* got 0 and None"),
        (lambda: orthogonality(ONES, "conv", padding=[1]), r"for all or for each of 2 weights, got 1 and \[1\]"),
        (lambda: orthogonality([torch.ones(2, 3, 4)], "conv"), r"2 or 4 dimensions, weights\[0\] is \(2, 3, 4\)"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
