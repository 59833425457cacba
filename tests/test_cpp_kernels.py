"""What the op tests cannot see of the C++ kernels: instruction sets, threads, cancellation, writes out of bounds."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_growing_sgd as sgd
import torch
from bn_cases import BACKENDS, GATES, LAYOUTS

from fastprune import backends  # declares the schemas and loads the kernels

facts = backends.build_info()
ISAS = ["base", "avx2", "avx512", "avx512_bf16"]
MALLOC_DEBUG = next((str(p) for p in Path("/").glob("lib*/*/libc_malloc_debug.so.0")), None)
pytestmark = pytest.mark.skipif("cpp" not in BACKENDS, reason="cpp is not under test")

forward = torch.ops.fastprune.batch_norm_act.cpp
backward = torch.ops.fastprune.batch_norm_act_backward.cpp
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# full vectors, tails in each driver, several tasks, folded rows, planes as rows
SHAPES = [(2, 16, 8, 8), (3, 37, 7, 7), (5, 3, 2, 2), (1, 257, 1, 1), (2, 13, 33, 41), (40, 19, 12, 12)]
FLAGS = [  # training, sigmoid, relu, residual, gates
    (True, False, True, False, "abs"),
    (True, True, True, True, ""),
    (True, False, False, False, ""),
    (False, False, True, True, "grad"),
    (True, False, True, True, "all"),
    (True, False, False, True, "out"),
]


def call(shape, dtype, layout, flags, allocate=torch.empty_like):
    """All outputs of one forward and backward; `allocate` makes the inputs' memory, (tensor) -> tensor like it."""
    training, sigmoid, relu, has_residual, gates = flags
    rng = torch.Generator().manual_seed(0)

    def activations():
        values = torch.randn(shape, generator=rng).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        return allocate(values).copy_(values)

    x, residual, dy = activations(), activations() if has_residual else None, activations()
    weight, bias, mean = (allocate(t).copy_(t) for t in torch.randn(3, shape[1], generator=rng))
    var, tracked = torch.rand(shape[1], generator=rng) + 0.5, torch.tensor(3)
    masked = relu and has_residual
    y, stats, mask = forward(x, weight, bias, residual, mean, var, tracked, training, 0.1, 1e-5, sigmoid, relu, masked)
    gates = {name: allocate(torch.empty(shape[:2])) for name in GATES[gates]}
    saved = (stats, y if "out_grad" in gates else None, mask if masked else None, *map(gates.get, GATES["all"]))
    grads = backward(dy, x, weight, bias, *saved, training, 1e-5, sigmoid, relu, True, masked)
    return [y, stats, mask, mean, var, *grads, *gates.values()]


def every_call(**options):
    for shape, (name, dtype), layout, flags in itertools.product(SHAPES, DTYPES.items(), LAYOUTS, FLAGS):
        if shape != (1, 257, 1, 1) or not flags[0]:  # one value per channel has no batch statistics
            yield f"{shape} {name} {layout} {flags}", call(shape, dtype, layout, flags, **options)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=300)


def optimizer_steps():
    cases = [sgd.Case(sgd.SHAPES, dtype, layout) for dtype in sgd.DTYPES["cpp"] for layout in sgd.LAYOUTS]
    return [sgd.step(case, "cpp", **switches) for case in cases for switches in sgd.SWITCHES[2:5]]


DUMP = """
import sys, torch, test_cpp_kernels as t
torch.save((t.backends.build_info()["isa"], dict(t.every_call()), t.optimizer_steps()), sys.stdout.buffer)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree(isa):
    if isa not in facts["isa_available"]:
        pytest.skip(f"this CPU has no {isa}")
    run = run_python(DUMP, FASTPRUNE_CPU_ISA=isa)
    assert run.returncode == 0, run.stderr.decode()
    used, theirs, steps = torch.load(io.BytesIO(run.stdout))
    assert used == isa
    for name, ours in every_call():
        for a, b in zip(ours, theirs[name], strict=True):
            if a.dtype == torch.uint8:
                assert (a != b).sum() <= 1e-3 * a.numel(), (
                    name
                )  # an element within rounding of 0 may fall on either side
                continue
            # Compared as a whole: where rounding moves an element across the ReLU, its gradient comes or goes.
            error, size = (a.double() - b.double()).norm(), b.double().norm()
            eps = torch.finfo(a.dtype if "float32" in name else torch.bfloat16).eps
            assert error <= 64 * eps * size + 1e-5, (name, a.shape, float(error / size))
    for ours, other in zip(optimizer_steps(), steps, strict=True):  # the same but where there is no multiply-add
        for name, t in other.items():
            eps = 8 * torch.finfo(t.dtype).eps if "base" in (isa, facts["isa"]) else 0
            torch.testing.assert_close(ours[name], t, rtol=eps, atol=eps)


def test_an_unknown_instruction_set_is_an_error():
    wrong = run_python("from fastprune import backends; backends.build_info()", FASTPRUNE_CPU_ISA="mmx")
    assert (
        wrong.returncode and b"FASTPRUNE_CPU_ISA must be base, avx2, avx512 or avx512_bf16, got 'mmx'" in wrong.stderr
    )


def test_build_info_is_json_with_the_facts_doctor_prints():
    info = json.loads(torch.ops.fastprune.build_info())
    assert {"isa", "isa_available", "compiler", "torch_target"} <= info.keys()
    assert info["isa_available"][0] == "base"


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            # enough work for several tasks, in every driver
            big = [(40, 19, 48, 48), (1, 70, 40, 41)]
            results.append(
                [call(s, d, m, f) for s in big for d in DTYPES.values() for m in LAYOUTS for f in FLAGS]
                + [outputs for _, outputs in every_call()]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 5, 16, 16), (64, 3, 2, 2), (2, 48, 24, 24)])
def test_variance_survives_an_outlying_beginning(shape, layout):
    """The shift of the one-pass variance comes from a few elements; here those are far from all the others."""
    x = torch.randn(shape) * 1e-2
    x[0] += 1e3  # the mean stays far from most values: single-pass sums around 0 or 1e3 lose all digits of a channel
    x[0, 0], x[:, 1] = x[0, 0] - 1e3, x[:, 1] * 1e-3 + 100.0
    shift_only = x.clone()
    shift_only[1:] = x[1:] + 1e3  # one offset for all, except channel 0: no outlier left, all cancellation
    for case in (x, shift_only):
        case = case.contiguous(memory_format=LAYOUTS[layout])
        mean, var = torch.zeros(shape[1]), torch.zeros(shape[1])
        stats = forward(case, None, None, None, mean, var, None, True, 1.0, 0.0, False, False, False)[1]
        exact = case.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(stats[0].double(), exact.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats[1].double(), exact.var(1, correction=0).rsqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(var.double(), exact.var(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e20, 3e37])
def test_squares_beyond_float32_do_not_overflow_the_variance(scale):
    x = torch.randn(4, 3, 5, 5) * scale
    stats = forward(x, None, None, None, None, None, None, True, 0.1, 1e-5, False, False, False)[1]
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(stats[1].double(), exact.var(1, correction=0).rsqrt(), rtol=1e-5, atol=0)


def test_guards_around_the_arguments():
    """NaN before and after each argument: none is read into a result, none is written over."""
    guard = 64  # bytes
    kept: list[torch.Tensor] = []

    def guarded(t: torch.Tensor) -> torch.Tensor:
        memory = torch.full((t.numel() * t.element_size() + 2 * guard,), 0xFF, dtype=torch.uint8)
        kept.append(memory)
        return memory.view(t.dtype).as_strided(t.shape, t.stride(), guard // t.element_size())

    plain = dict(every_call())
    for name, outputs in every_call(allocate=guarded):
        assert all(torch.equal(a, b) for a, b in zip(outputs, plain[name], strict=True)), name
        for memory in kept:
            assert (memory[:guard] == 0xFF).all() and (memory[-guard:] == 0xFF).all(), name
        kept.clear()


@pytest.mark.skipif(not MALLOC_DEBUG, reason="needs glibc's libc_malloc_debug")
@pytest.mark.parametrize("isa", ISAS)
def test_outputs_and_scratch_under_the_checking_allocator(isa):
    """glibc's checking malloc aborts when the byte after a block, or the header before it, was written over."""
    if isa not in facts["isa_available"]:
        pytest.skip(f"this CPU has no {isa}")
    code = "import test_cpp_kernels as t; print(len(list(t.every_call())))"
    run = run_python(code, LD_PRELOAD=MALLOC_DEBUG, MALLOC_CHECK_="3", FASTPRUNE_CPU_ISA=isa)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    assert int(run.stdout) == len(list(every_call()))
