"""channel_gate on every backend, dtype and layout against its definition in float64; Gate; the channel graph."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bn_cases import DTYPES, assert_as_good_as_eager, backends_of, device_for
from torch import nn

import fastprune as fp
from fastprune import backends, ops
from fastprune.errors import BackendError
from fastprune.nn import Gate

BACKENDS = backends_of("channel_gate")
COMPILED = [b for b in BACKENDS if b != "eager"]
SHAPES = [
    (4, 16, 8, 8), (1, 1, 1, 1), (3, 5, 7, 9), (2, 3, 33, 17), (0, 4, 8, 8), (3, 0, 2, 2), (2, 6, 0, 3), (5, 37, 2, 2),
    (2, 70, 1, 1), (9, 13), (1, 600), (4, 3, 19), (2, 5, 3, 4, 5), (1, 2, 40, 41),
]  # fmt: skip


def layouts(shape):
    nhwc = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    return [torch.contiguous_format] + [nhwc] * (nhwc is not None)


CASES = [(shape, layout) for shape in SHAPES for layout in layouts(shape)]


def draw(shape, dtype, layout=torch.contiguous_format, device="cpu"):
    """x, dy (N, C, ...) and gate (C,): float64, as rounded to dtype."""
    rng = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    gate = torch.rand(shape[1], generator=rng, dtype=torch.float64) + 0.5
    return x.contiguous(memory_format=layout).to(device), dy.to(device), gate.to(dtype).to(device)


def definition(x, dy, gate):
    x, dy, gate = x.double().cpu(), dy.double().cpu(), gate.double().cpu()
    column = gate.view(-1, *[1] * (x.dim() - 2))
    product = (dy * x).reshape(*x.shape[:2], x[:1, :1].numel() if x.numel() else 0)
    sums = product.sum(2)
    return {"y": x * column, "dx": dy * column, "dgate": sums.sum(0), "grad": sums, "abs": product.abs().sum(2)}


def run(x, dy, gate, backend, buffers=True):
    acc = torch.promote_types(x.dtype, torch.float32)
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    grad, magnitude = torch.full((2, *x.shape[:2]), 7.0, dtype=acc, device=x.device)
    given = {"gate_grad": grad, "gate_abs": magnitude} if buffers else {}
    y = ops.channel_gate(x, gate, **given, backend=backend)
    dx, dgate = torch.autograd.grad(y, (x, gate), dy)
    assert y.dtype == dx.dtype == x.dtype and dgate.dtype == gate.dtype
    return {"y": y.detach(), "dx": dx, "dgate": dgate} | ({"grad": grad, "abs": magnitude} if buffers else {})


EACH = pytest.mark.parametrize("backend, dtype", [(b, d) for b in BACKENDS for d in DTYPES[b]], ids=str)


@EACH
@pytest.mark.parametrize("shape, layout", CASES, ids=str)
def test_forward_and_backward(backend, dtype, shape, layout):
    inputs = draw(shape, dtype, layout, device_for(backend))
    got = run(*inputs, backend)
    assert_as_good_as_eager(got, run(*inputs, "eager"), definition(*inputs), dtype)
    if inputs[0].numel() and backend != "eager":
        assert got["y"].stride() == got["dx"].stride() == inputs[0].stride()


@EACH
def test_half_activations_take_a_float32_gate(backend, dtype):
    x, dy, _ = draw((3, 5, 4, 6), dtype, device=device_for(backend))
    gate = torch.rand(5, device=x.device)
    got, exact = run(x, dy, gate, backend), definition(x, dy, gate)
    assert got["dgate"].dtype == torch.float32
    assert_as_good_as_eager(got, run(x, dy, gate, "eager"), exact, dtype)
    torch.testing.assert_close(got["grad"].cpu().double(), exact["grad"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, layout", CASES, ids=str)
def test_the_probe_changes_nothing_and_watches(backend, shape, layout):
    x, dy, gate = draw(shape, torch.float32, layout, device_for(backend))
    x.requires_grad_()
    exact = definition(x.detach(), dy, gate)
    matrix = torch.full((len(x), 3 * shape[1] + 5), 7.0, device=x.device)  # the buffers are columns of a matrix
    grad, magnitude = matrix[:, 2 : 2 + shape[1]], matrix[:, 3 + shape[1] : 3 + 2 * shape[1]]
    y = ops.channel_gate(x, gate_grad=grad, gate_abs=magnitude, backend=backend)
    assert y.data_ptr() == x.data_ptr() and torch.equal(y, x) and y.requires_grad
    dx = torch.autograd.grad(y, x, dy)[0]
    assert dx.data_ptr() == dy.data_ptr() and torch.equal(dx, dy)
    for got, name in ((grad, "grad"), (magnitude, "abs")):
        torch.testing.assert_close(got.cpu().double(), exact[name], rtol=1e-4, atol=1e-4)
    grad.fill_(7), magnitude.fill_(7)
    assert (matrix == 7).all()  # nothing beside the buffers was written


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probe_with_nothing_to_watch_is_not_there(backend):
    x = torch.randn(2, 3, 4, 4, device=device_for(backend))
    buffer = torch.zeros(2, 3, device=x.device)
    assert ops.channel_gate(x, gate_grad=buffer, backend=backend) is x
    x.requires_grad_()
    assert ops.channel_gate(x, backend=backend) is x
    with torch.no_grad():
        assert ops.channel_gate(x, gate_grad=buffer, backend=backend) is x


@pytest.mark.parametrize("layout", layouts((1,) * 4), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed_is_made(backend, layout):
    x, dy, gate = draw((3, 5, 4, 6), torch.float32, layout, device_for(backend))
    exact = definition(x, dy, gate)
    for one in itertools.product((True, False), repeat=4):
        needs_x, needs_gate, wants_grad, wants_abs = one
        if not (needs_x or needs_gate):
            continue
        a, g = x.detach().requires_grad_(needs_x), gate.detach().requires_grad_(needs_gate)
        buffers = {
            "gate_grad": torch.full((3, 5), 7.0, device=x.device) if wants_grad else None,
            "gate_abs": torch.full((3, 5), 7.0, device=x.device) if wants_abs else None,
        }
        y = ops.channel_gate(a, g, **buffers, backend=backend)
        saved = y.grad_fn.saved_tensors
        assert (saved[0] is not None) == (needs_gate or wants_grad or wants_abs)  # x is kept for the sums alone
        grads = iter(torch.autograd.grad(y, [t for t in (a, g) if t.requires_grad], dy))
        made = {"dx": next(grads) if needs_x else None, "dgate": next(grads) if needs_gate else None}
        made |= {"grad": buffers["gate_grad"], "abs": buffers["gate_abs"]}
        for name, got in made.items():
            if got is not None:
                torch.testing.assert_close(got.cpu().double(), exact[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not ops.channel_gate(x.requires_grad_(), gate, backend=backend).requires_grad


@pytest.mark.parametrize("shape, layout", [c for c in CASES if c[0] in SHAPES[:4] + SHAPES[7:10]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend, shape, layout):
    more = 1 if backend == "triton" else 11  # several tasks
    inputs = draw((more * shape[0], *shape[1:]), torch.float32, layout, device_for(backend))
    first = run(*inputs, backend)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            again = run(*inputs, backend)
            assert all(torch.equal(first[name], again[name]) for name in first)
            if backend == "triton":
                break
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="cpp is not under test")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", layouts((1,) * 4), ids=str)
def test_large_outputs_that_bypass_the_caches(dtype, layout):
    inputs = draw((52 // dtype.itemsize, 64, 64, 64), dtype, layout)
    assert inputs[0].nbytes >= 12 << 20
    assert_as_good_as_eager(run(*inputs, "cpp"), run(*inputs, "eager"), definition(*inputs), dtype)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="cpp is not under test")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """Of the kernels of channel_gate, filter_norm and weight_taylor."""
    code = """
import test_channel_gate as gate, test_filter_sums as sums
for dtype in gate.DTYPES["cpp"]:
    for shape, layout in gate.CASES:
        gate.test_forward_and_backward("cpp", dtype, shape, layout)
    for layout in sums.LAYOUTS:
        sums.test_filter_norm("cpp", dtype, layout)
        sums.test_weight_taylor("cpp", dtype, layout)
print(gate.backends.build_info()["isa"])
"""
    env = os.environ | {"FASTPRUNE_CPU_ISA": isa, "FASTPRUNE_TEST_BACKENDS": "eager,cpp", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if "FASTPRUNE_CPU_ISA" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0 and done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_arrive_in_any_layout(backend):
    for layout in layouts((1,) * 4):
        x, dy, gate = draw((2, 5, 4, 4), torch.float32, layout, device_for(backend))
        want = definition(x, dy, gate)
        for odd in (dy, dy.contiguous(memory_format=torch.channels_last), dy.mT.contiguous().mT):
            got = run(x, odd, gate, backend)
            for name, value in got.items():
                torch.testing.assert_close(value.cpu().double(), want[name], rtol=1e-4, atol=1e-4)
        got = run(x, torch.ones((), device=x.device).expand(x.shape), gate, backend)  # as of sum()
        torch.testing.assert_close(got["grad"], x.sum((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_and_nan_pass(backend):
    x, dy, gate = draw((2, 4, 5, 7), torch.float32, device=device_for(backend))
    x[0, 1, 2, 3], x[1, 2, 0, 0], dy[1, 0, 4, 6] = torch.inf, torch.nan, -torch.inf
    gate[3] = 0
    got, want = run(x, dy, gate, backend), run(x, dy, gate, "eager")
    for name in got:
        torch.testing.assert_close(got[name], want[name], equal_nan=True, rtol=1e-4, atol=1e-4)
    assert got["grad"].isnan().sum() == 1 and got["abs"].isinf().sum() == 2


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("layout", layouts((1,) * 4), ids=str)
def test_eager_differentiates_twice(layout, probe):
    x, _, gate = draw((2, 3, 2, 3), torch.float64, layout)
    buffer = torch.zeros(2, 3, dtype=torch.float64)
    leaves = [x.requires_grad_()] if probe else [x.requires_grad_(), gate.requires_grad_()]
    fn = lambda *a: ops.channel_gate(*a, gate_grad=buffer)  # noqa: E731
    assert torch.autograd.gradcheck(fn, leaves)
    if not probe:  # a probe is linear with constant gradient
        assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivatives_of_compiled_backends(backend):
    def second(dtype, backend, device):
        x, dy, gate = (t.to(device, dtype) for t in draw((3, 4, 3, 3), torch.float32))
        leaves = (x.requires_grad_(), gate.requires_grad_())
        y = ops.channel_gate(*leaves, gate_abs=x.detach().new_zeros(3, 4), backend=backend)
        first = torch.autograd.grad(y, leaves, dy * y.detach().abs(), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    exact = second(torch.float64, "eager", "cpu")
    for a, b in zip(second(torch.float32, backend, device_for(backend)), exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", layouts((1,) * 4), ids=str)
@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend, layout):
    x, dy, gate = draw((2, 5, 3, 4), torch.float32, layout, device_for(backend))
    dy = dy.contiguous(memory_format=layout)
    torch.library.opcheck(getattr(torch.ops.fastprune.channel_gate, backend), (x, gate))
    backward = getattr(torch.ops.fastprune.channel_gate_backward, backend)
    grad, magnitude = torch.zeros(2, 2, 5, device=x.device)
    torch.library.opcheck(backward, (dy, x, gate, grad, magnitude, True, True))
    torch.library.opcheck(backward, (dy, x, gate, None, None, False, True))
    torch.library.opcheck(backward, (dy, x, None, None, magnitude, False, False))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.11
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("probe", [False, True])
def test_it_compiles_into_one_graph(backend, probe):
    x, dy, gate = draw((3, 6, 4, 4), torch.float32)
    x.requires_grad_(), gate.requires_grad_()
    grad = torch.zeros(3, 6)

    def fn(x, gate, grad):
        return ops.channel_gate(2 * x, None if probe else gate, gate_grad=grad, backend=backend).exp()

    def both(fn):
        y = fn(x, gate, grad.zero_())
        grads = torch.autograd.grad(y, (x, gate), dy, allow_unused=True)
        return [y, *(g for g in grads if g is not None), grad.clone()]

    torch._dynamo.reset()
    want, got = both(fn), both(torch.compile(fn, fullgraph=True, backend="aot_eager"))
    assert want[-1].abs().min() > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", COMPILED)
def test_other_strides_go_to_eager_or_are_refused(backend):
    x = torch.randn(2, 3, 4, 8, device=device_for(backend))[..., ::2]
    gate = torch.rand(3, device=x.device)
    torch.testing.assert_close(ops.channel_gate(x, gate), x * gate.view(3, 1, 1))
    buffer = torch.zeros(2, 3, device=x.device)
    for args in ({"gate": gate}, {"gate_grad": buffer}):
        with pytest.raises(BackendError, match=r"contiguous or channels_last tensor, got .* with strides \(96, 32, 8"):
            ops.channel_gate(x, **args, backend=backend)
    with pytest.raises(BackendError, match="gate must be contiguous"):
        ops.channel_gate(x.contiguous(), torch.rand(6, device=x.device)[::2], backend=backend)
    with pytest.raises(BackendError, match="it takes float32"):
        ops.channel_gate(x.double().contiguous(), gate, backend=backend)


X = torch.randn(2, 4, 5, 5)


@pytest.mark.parametrize(
    "args, words",
    [
        ({"x": X[0, 0, 0]}, "2 to 5 dimensions"),
        ({"x": X.long()}, "floating-point x, got torch.int64"),
        ({"gate": torch.ones(3)}, r"expected gate \(4,\) for x \(2, 4, 5, 5\), got \(3,\)"),
        ({"gate": torch.ones(4).half()}, "gate is torch.float16 on cpu"),
        ({"gate_grad": torch.ones(2, 3)}, r"expected gate_grad \(2, 4\) torch.float32 on cpu, got \(2, 3\)"),
        ({"gate_abs": torch.ones(2, 4).double()}, "got .* torch.float64"),
        ({"gate_grad": torch.ones(4, 2).t()}, r"rows at least 4 apart, got strides \(1, 2\)"),
        ({"gate_grad": torch.ones(1, 4).expand(2, 4)}, "rows at least 4 apart"),
    ],
)
def test_bad_arguments_are_named(args, words):
    with pytest.raises(ValueError, match="channel_gate: .*" + words):
        ops.channel_gate(**{"x": X} | args)


# ---- Gate


def test_gate_is_a_module_of_ones_that_does_not_train():
    gate = Gate(5)
    assert list(gate.state_dict()) == ["weight"] and not gate.weight.requires_grad and repr(gate) == "Gate(5)"
    assert repr(Gate(5, trainable=True)) == "Gate(5, trainable=True)" and Gate(5, trainable=True).weight.requires_grad
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    gate.gate_grad, gate.gate_abs = torch.empty(2, 2, 5)
    assert torch.equal(gate(x), x) and list(gate.state_dict()) == ["weight"]
    gate.weight.data[3] = 0
    gate(x).square().sum().backward()
    assert (gate.gate_grad[:, 3] == 0).all() and (gate.gate_grad[:, :3] > 0).all() and (x.grad[:, 3] == 0).all()
    with torch.no_grad():
        assert gate(x[:1]).shape == (1, 5, 3, 3)  # another batch size than the buffers'


def test_gate_works_in_the_dtype_of_its_input():
    gate = Gate(5, trainable=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = gate(nn.Conv2d(3, 5, 1)(torch.randn(2, 3, 4, 4)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert gate.weight.grad.dtype == torch.float32
    assert gate.bfloat16()(torch.randn(2, 5, 3)).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_the_channel_graph_sees_through_gates(backend, trainable):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Gate(8, trainable=trainable), nn.ReLU(), nn.Conv2d(8, 6, 3),
        Gate(6, trainable=trainable), nn.Flatten(), nn.Linear(6 * 4 * 4, 5),
    ).to(device_for(backend))  # fmt: skip
    x = torch.randn(2, 3, 8, 8, device=device_for(backend))
    with backends.force(backend, "channel_gate"):
        graph = fp.graph.trace(model, x)
        assert [g.size for g in graph.groups.values()] == [8, 6]
        assert not any(name.startswith(("2.", "5.")) for name in graph.frozen)
        keep = {g.name: torch.arange(g.size) % 2 == 0 for g in graph.groups.values()}
    masked, small = copy.deepcopy(model), fp.compact(model, keep, x, graph=graph)
    graph.mask_(masked, keep)
    torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-4, atol=1e-5)
    assert small[2].weight.shape == (4,) and small[2].num_features == 4 and small[5].weight.shape == (3,)
    assert small[2].weight.requires_grad == trainable
