"""batch_norm_act on every backend, dtype, layout and branch, against the definition in float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from bn_cases import (
    BACKENDS,
    DTYPES,
    GATES,
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

from fastprune import backends, ops

COMPILED = [b for b in BACKENDS if b != "eager"]
RAW = "batch_norm_act"


def params(*lists, keep=lambda *combination: True):
    import itertools

    return [
        pytest.param(*c, id="-".join(str(v)[6:] if isinstance(v, torch.dtype) else str(v).replace(" ", "") for v in c))
        for c in itertools.product(*lists)
        if keep(*c)
    ]


@functools.lru_cache(maxsize=16)  # the same call is checked for several backends, one after the other
def reference(variant, shape, dtype, layout, seed):
    call = make_call(variant, shape, dtype, layout, seed)
    return call, definition(call), plain_pytorch(call, dtype)


def check(variant, shape, dtype, layout, backend):
    # One channel is one draw of PyTorch's rounding error, now and then next to nothing: then the worst of four counts.
    sides = [], [], []
    for seed in range(4 if shape[1] == 1 else 1):
        call, exact, eager = reference(variant, shape, dtype, layout, seed)
        for side, results in zip(sides, (ours(call, dtype, backend, device_for(backend)), eager, exact), strict=True):
            side.append({name: t.cpu() for name, t in results.items()})
    got, eager, exact = ({name: torch.stack([r[name] for r in side]) for name in side[0]} for side in sides)
    assert_as_good_as_eager(got, eager, exact, dtype)


EVERY_DTYPE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


VARIANTS = every_variant()


def taken(dtype, layout, variant, backend):
    """All there is; the interpreter and the emulator, slow, take half types for every fourth variant."""
    if backend in ("triton", "cuda") and dtype != torch.float32 and VARIANTS.index(variant) % 4 != (layout == "nhwc"):
        return False
    return dtype in DTYPES[backend]


@pytest.mark.parametrize(
    "dtype, layout, variant, backend", params(EVERY_DTYPE, LAYOUTS, VARIANTS, BACKENDS, keep=taken)
)
def test_every_branch(dtype, layout, variant, backend):
    check(variant, (3, 19, 5, 7), dtype, layout, backend)


@pytest.fixture
def few_programs(monkeypatch):
    """Triton's geometry for the interpreter, which pays per program; tests/test_triton_kernels.py has the real one."""
    if "triton" in BACKENDS and backends.INTERPRET:
        from fastprune.kernels import _bn_geometry as geometry

        for name, value in {"PROGRAMS": 8, "TILE": 16384, "WIDE_TILE": 16384}.items():
            monkeypatch.setattr(geometry, name, value)


SIDES = {1: (1, 1), 49: (7, 7), 1024: (32, 32), 3136: (56, 56)}
SHAPES = [(n, c, *SIDES[s]) for n in (0, 1, 2, 37) for c in (1, 3, 16, 37, 64, 257) for s in SIDES]
TURNS = [
    Variant(bound="sigmoid", bias=False, act="relu", gates="abs"),
    Variant(act="relu", residual=True, gates="all"),
    Variant(),
    Variant(bound="sigmoid", act="relu", training=False, residual=True, gates="grad"),
]


def numel(shape):
    return shape[0] * shape[1] * shape[2] * shape[3]


LARGEST = {
    "eager": 1_000_000,
    "cpp": 10_000_000,
    "triton": 300_000,
    "cuda": 60_000,
}  # elements; keeps the run in minutes


@pytest.mark.parametrize(
    "shape, layout, backend", params(SHAPES, LAYOUTS, BACKENDS, keep=lambda s, _, b: numel(s) <= LARGEST[b])
)
def test_every_shape(shape, layout, backend, few_programs):
    """Every shape in both layouts; dtypes and variants take turns on big ones, so that the whole stays in minutes."""
    turn = SHAPES.index(shape) + (layout == "nhwc")
    dtypes = [d for d in DTYPES[backend] if d in (torch.float32, torch.bfloat16)]
    pairs = [(v, d) for v in TURNS for d in dtypes]
    if numel(shape) > 20_000 or backend in ("triton", "cuda"):
        pairs = [pairs[turn % len(pairs)]]
    for variant, dtype in pairs:
        if numel(shape) == shape[1] and variant.training:
            continue  # one value per channel: an error, see below
        check(variant, shape, dtype, layout, backend)


@pytest.mark.parametrize("layout, backend", params(LAYOUTS, COMPILED))
def test_two_runs_agree_bit_for_bit(layout, backend):
    for variant in TURNS:
        for shape in ((37, 37, 7, 7), (4, 3, 32, 32)):
            call = make_call(variant, shape, torch.float32, layout)
            first, second = (ours(call, torch.float32, backend, device_for(backend)) for _ in range(2))
            for name, t in first.items():
                assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("layout, backend", params(LAYOUTS, BACKENDS))
@pytest.mark.parametrize("relu", [True, False])
def test_infinities_and_nan_as_in_pytorch(layout, backend, relu):
    for training in (True, False):
        call = make_call(Variant(act="relu" if relu else None, training=training), (3, 5, 4, 4), torch.float32, layout)
        call.x[0, 0, 0, 0], call.x[0, 1, 1, 1], call.x[2, 2, 3, 3] = torch.inf, torch.nan, -torch.inf
        call.x[0, 3, 0, 0], call.x[1, 3, 0, 0] = torch.inf, -torch.inf
        got = ours(call, torch.float32, backend, device_for(backend))
        want = plain_pytorch(call, torch.float32)
        for name in got:
            torch.testing.assert_close(got[name].cpu(), want[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout, backend", params(LAYOUTS, BACKENDS))
def test_zero_variance_and_large_offsets(layout, backend):
    for shape in ((2, 3, 7, 7), (5, 16, 8, 8)):
        for offset in (0.0, 3.0, 1e4):
            call = make_call(Variant(), shape, torch.float32, layout)
            call.x[:, 0] = offset
            call.x[:, 1:] = (call.x[:, 1:] * 1e-2 + offset).float().double()
            call.x[0, 2] = (call.x[0, 2] + 1e3).float().double()  # the first plane far from the mean of the others
            exact, eager = definition(call), plain_pytorch(call, torch.float32)
            assert_as_good_as_eager(
                ours(call, torch.float32, backend, device_for(backend)), eager, exact, torch.float32
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_per_channel_is_pytorchs_error(backend):
    x = torch.randn(1, 3, 1, 1, device=device_for(backend))
    with pytest.raises(ValueError) as theirs:
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError) as error:
        ops.batch_norm_act(x, backend=backend)
    assert str(error.value) == str(theirs.value)


@pytest.mark.parametrize("backend", COMPILED)
def test_slices_and_transposes_run_on_eager_and_are_refused_by_name(backend):
    big = torch.randn(4, 8, 10, 12, device=device_for(backend))
    for x in (big[:, 2:5], big[:, :, 1:7], big.transpose(2, 3), big[::2, :, :, ::3], big.transpose(0, 1)):
        assert not x.is_contiguous()
        torch.testing.assert_close(
            ops.batch_norm_act(x, act="relu"), F.batch_norm(x, None, None, training=True).relu(), rtol=1e-5, atol=1e-5
        )
        with pytest.raises(backends.BackendError, match="NCHW or channels_last tensor without gaps"):
            ops.batch_norm_act(x, backend=backend)
    dense = big[1:3]  # a slice without gaps is taken as it is: storage offsets are real
    want = F.batch_norm(dense, None, None, training=True)
    torch.testing.assert_close(ops.batch_norm_act(dense, backend=backend), want, rtol=1e-5, atol=1e-5)
    nhwc = torch.randn(4, 5, 6, 8, device=device_for(backend)).permute(0, 3, 1, 2)
    want = F.batch_norm(nhwc, None, None, training=True)
    torch.testing.assert_close(ops.batch_norm_act(nhwc, backend=backend), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(backends.BackendError, match="strides of x"):
        ops.batch_norm_act(nhwc, residual=nhwc.contiguous(), backend=backend)


@pytest.mark.parametrize("layout, backend", params(LAYOUTS, BACKENDS))
def test_gradients_arrive_in_any_layout(layout, backend):
    x = torch.randn(2, 5, 4, 4, device=device_for(backend)).to(memory_format=LAYOUTS[layout]).requires_grad_()
    want = torch.autograd.grad(F.batch_norm(x, None, None, training=True).relu().square().sum(), x)[0]
    y = ops.batch_norm_act(x, act="relu", backend=backend)
    odd = (2 * y.detach()).transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(torch.autograd.grad(y, x, odd, retain_graph=True)[0], want, rtol=1e-4, atol=1e-5)
    spread = torch.autograd.grad(y.sum(), x)[0]  # stride-0 gradient
    torch.testing.assert_close(
        spread, torch.autograd.grad(F.batch_norm(x, None, None, training=True).relu().sum(), x)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(backend):
    call = make_call(Variant(act="relu", residual=True), (3, 6, 4, 4), torch.float32)
    exact = definition(call)
    for wanted in ("x", "weight", "bias", "residual"):
        given = {n: getattr(call, n).float().to(device_for(backend)) for n in ("x", "weight", "bias", "residual")}
        given[wanted].requires_grad_()
        y = ops.batch_norm_act(
            given["x"], given["weight"], given["bias"], residual=given["residual"], act="relu", backend=backend
        )
        (grad,) = torch.autograd.grad(y, given[wanted], call.dy.to(y))
        torch.testing.assert_close(grad.cpu().double(), exact[f"d{wanted}"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not ops.batch_norm_act(given["x"], backend=backend).requires_grad


@pytest.mark.parametrize("layout, backend", params(LAYOUTS, BACKENDS))
@pytest.mark.parametrize("act", [None, "relu"])
def test_gates_of_the_output_without_residual_are_those_of_the_norm(layout, backend, act):
    variant = Variant(act=act, gates="all")
    got = ours(make_call(variant, (3, 6, 4, 4), torch.float32, layout), torch.float32, backend, device_for(backend))
    assert torch.equal(got["gate_grad"], got["out_grad"]) and torch.equal(got["gate_abs"], got["out_abs"])
    assert (got["gate_abs"] > got["gate_grad"].abs()).any()


@pytest.mark.parametrize("layout, backend", params(LAYOUTS, BACKENDS))
@pytest.mark.parametrize("act", [None, "relu"])
def test_nan_reaches_the_gates_of_its_plane(layout, backend, act):
    call = make_call(Variant(act=act, residual=True, gates="all", training=False), (3, 6, 4, 4), torch.float32, layout)
    call.x[0, 1, 2, 3], call.residual[1, 2, 3, 0] = torch.nan, torch.nan
    got = ours(call, torch.float32, backend, device_for(backend))
    for name in GATES["all"]:
        where = [[0, 1], [1, 2]] if name.startswith("out") else [[0, 1]]  # the residual is not in z
        assert got[name].isnan().nonzero().tolist() == where, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_planes_have_gates_of_zero(backend):
    x = torch.zeros(2, 3, 0, 4, device=device_for(backend), requires_grad=True)
    gates = {name: torch.full((2, 3), torch.nan, device=x.device) for name in GATES["all"]}
    mean, var = torch.zeros(3, device=x.device), torch.ones(3, device=x.device)
    args = {"residual": x.detach(), "act": "relu", "training": False}
    ops.batch_norm_act(x, None, None, mean, var, **args, **gates, backend=backend).sum().backward()
    assert all(t.eq(0).all() for t in gates.values())


@pytest.mark.parametrize("layout, variant, backend", params(LAYOUTS, TURNS, BACKENDS))
def test_gates_of_a_gradient_that_has_a_graph(layout, variant, backend):
    """create_graph=True takes the backward in plain PyTorch: the same sums."""
    call, device = make_call(variant, (3, 4, 3, 3), torch.float32, layout), device_for(backend)
    exact = definition(call)
    x, residual = (
        None if t is None else t.float().to(device).contiguous(memory_format=call.layout)
        for t in (call.x, call.residual)
    )
    weight, bias, mean, var = (
        None if t is None else t.float().to(device) for t in (call.weight, call.bias, *call.running)
    )
    gates = {name: torch.full((3, 4), torch.nan, device=device) for name in GATES[variant.gates]}
    args = {"residual": residual, "act": variant.act, "bound": variant.bound, "training": variant.training}
    y = ops.batch_norm_act(x.requires_grad_(), weight, bias, mean, var, **args, **gates, backend=backend)
    torch.autograd.grad(y, x, call.dy.to(y), create_graph=True)
    for name, t in gates.items():
        torch.testing.assert_close(t.cpu().double(), exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", [*TURNS, Variant(act="relu"), Variant(residual=True, training=False)], ids=str)
def test_eager_differentiates_twice(layout, variant):
    call = make_call(variant, (3, 2, 2, 3), torch.float64, layout)

    def run(x, weight, bias, residual):
        mean, var = (t.clone() for t in call.running)
        args = {"residual": residual, "act": variant.act, "bound": variant.bound, "training": variant.training}
        return ops.batch_norm_act(x, weight, bias, mean, var, **args, backend="eager")

    leaves = [None if t is None else t.requires_grad_() for t in (call.x, call.weight, call.bias, call.residual)]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("layout, variant, backend", params(LAYOUTS, [*TURNS, Variant(act="relu")], COMPILED))
def test_second_derivatives_of_compiled_backends(layout, variant, backend):
    """Gradient of a function of the gradient, against float64."""

    def second(dtype, run, device):
        call = make_call(variant, (3, 4, 3, 3), torch.float32, layout)
        given = [call.x, call.weight, call.bias, call.residual]
        leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t in given]
        leaves[0] = leaves[0].detach().contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        if leaves[3] is not None:
            leaves[3] = leaves[3].detach().contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        mean, var = (t.to(device, dtype) for t in call.running)
        y = run(*leaves, mean, var)
        used = [t for t in leaves if t is not None]
        first = torch.autograd.grad(y, used, call.dy.to(y) * y.detach().abs(), create_graph=True)
        total = sum((g * torch.linspace(-1, 2, g.numel()).to(g).view(g.shape)).sum() for g in first)
        grads = torch.autograd.grad(total, used, materialize_grads=True)
        return {str(i): g.detach() for i, g in enumerate(grads)}

    def op(backend):
        def run(x, weight, bias, residual, mean, var):
            args = {"residual": residual, "act": variant.act, "bound": variant.bound, "training": variant.training}
            return ops.batch_norm_act(x, weight, bias, mean, var, **args, backend=backend)

        return run

    exact = second(torch.float64, op("eager"), "cpu")
    eager = second(torch.float32, op("eager"), "cpu")
    got = second(torch.float32, op(backend), device_for(backend))
    assert_as_good_as_eager(got, eager, exact, torch.float32)


@pytest.mark.parametrize("layout, backend", params(LAYOUTS, COMPILED))
def test_opcheck(layout, backend):
    for variant in TURNS:
        call = make_call(variant, (2, 5, 3, 4), torch.float32, layout)
        device = device_for(backend)
        x, dy, residual = (
            None if t is None else t.float().to(device).contiguous(memory_format=call.layout)
            for t in (call.x, call.dy, call.residual)
        )
        weight, bias, mean, var = (
            None if t is None else t.float().to(device) for t in (call.weight, call.bias, *call.running)
        )
        flags = (variant.bound == "sigmoid", variant.act == "relu")
        masked = residual is not None and variant.act == "relu"
        tracked = torch.tensor(0, device=device)
        forward = getattr(torch.ops.fastprune.batch_norm_act, backend)
        backward = getattr(torch.ops.fastprune.batch_norm_act_backward, backend)
        args = (x, weight, bias, residual, mean, var, tracked, variant.training, 0.1, 1e-5, *flags, masked)
        torch.library.opcheck(forward, args)
        y, stats, mask = forward(*args)
        buffers = [torch.zeros(2, 6 + i, device=device)[:, :5] for i in range(4)]
        for gates in ([None] * 4, [*buffers[:2], None, None], *[buffers] * (residual is not None)):
            saved = (
                y if gates[2] is not None or (masked and not mask.numel()) else None,
                mask if mask.numel() else None,
            )
            args = (dy, x, weight, bias, stats, *saved, *gates, variant.training, 1e-5, *flags, True, masked)
            torch.library.opcheck(backward, args)


@pytest.mark.parametrize(
    "layout, variant, backend", params(LAYOUTS, TURNS, BACKENDS, keep=lambda _, __, b: b not in ("triton", "cuda"))
)
def test_compiles_without_graph_breaks(layout, variant, backend):
    call = make_call(variant, (3, 6, 4, 4), torch.float32, layout)
    torch._dynamo.reset()
    want = ours(call, torch.float32, backend)

    def run(x, weight, bias, residual, mean, var, tracked, gates):
        args = {"residual": residual, "act": variant.act, "bound": variant.bound, "training": variant.training}
        return ops.batch_norm_act(x, weight, bias, mean, var, tracked, **args, **gates, backend=backend)

    leaves = {
        name: None
        if t is None
        else t.float().contiguous(memory_format=call.layout if t.dim() == 4 else torch.contiguous_format)
        for name, t in (("x", call.x), ("weight", call.weight), ("bias", call.bias), ("residual", call.residual))
    }
    used = [t.requires_grad_() for t in leaves.values() if t is not None]
    mean, var = (t.float() for t in call.running)
    names = GATES[variant.gates] if backend != "eager" else ()
    gates = {name: torch.zeros(3, 6) for name in names}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves.values(), mean, var, torch.tensor(0), gates)
    grads = torch.autograd.grad(y, used, call.dy.float())
    assert torch.equal(y, want["y"])
    assert torch.equal(mean, want["running_mean"]) and torch.equal(var, want["running_var"])
    for grad, name in zip(grads, [n for n, t in leaves.items() if t is not None], strict=True):
        torch.testing.assert_close(grad, want[f"d{name}"], rtol=1e-5, atol=1e-6)
    for name, t in gates.items():
        torch.testing.assert_close(t, want[name], rtol=1e-5, atol=1e-5)


BAD = {
    "three dimensions": (lambda x: {"x": x[0]}, "expected x (N, C, H, W), got 3 dimensions, (4, 5, 5)"),
    "integers": (lambda x: {"x": x.long()}, "expected a floating-point x, got torch.int64"),
    "act": (lambda x: {"x": x, "act": "gelu"}, "act must be 'relu' or None, got 'gelu'"),
    "bound": (lambda x: {"x": x, "bound": "tanh"}, "bound must be 'sigmoid' or None, got 'tanh'"),
    "bound without weight": (lambda x: {"x": x, "bound": "sigmoid"}, "bound='sigmoid' needs a weight, got None"),
    "weight shape": (lambda x: {"x": x, "weight": torch.ones(3)}, "expected weight (4,) for x (2, 4, 5, 5), got (3,)"),
    "bias dtype": (lambda x: {"x": x, "bias": torch.ones(4).half()}, "bias is torch.float16 on cpu"),
    "half of the statistics": (lambda x: {"x": x, "running_mean": torch.ones(4)}, "go together, got only one of them"),
    "residual": (lambda x: {"x": x, "residual": x[:1]}, "expected residual like x, (2, 4, 5, 5)"),
    "eval without statistics": (
        lambda x: {"x": x, "training": False},
        "training=False needs running_mean and running_var",
    ),
    "cumulative": (
        lambda x: {"x": x, "momentum": None, "running_mean": x[0, :, 0, 0], "running_var": x[0, :, 0, 0]},
        "momentum=None (cumulative average) needs num_batches_tracked",
    ),
    "gate_grad": (lambda x: {"x": x, "gate_grad": torch.zeros(4)}, "expected gate_grad (2, 4) torch.float32"),
    "gate_abs": (
        lambda x: {"x": x, "gate_abs": torch.zeros(4, 2).t()},
        "expected gate_abs (2, 4) torch.float32 on cpu with strides (at least 4, 1), got (2, 4) torch.float32 on cpu "
        "with strides (1, 2)",
    ),
    "out_grad": (lambda x: {"x": x, "out_grad": torch.zeros(2, 4).double()}, "expected out_grad (2, 4) torch.float32"),
    "out_abs": (lambda x: {"x": x, "out_abs": torch.zeros(1, 4).expand(2, 4)}, "with strides (0, 1)"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_was_expected_and_what_came(case):
    make, message = BAD[case]
    with pytest.raises(ValueError) as error:
        ops.batch_norm_act(**make(torch.randn(2, 4, 5, 5)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_named_backend_is_obeyed_or_refused():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(
        backends.BackendError, match=r"backend 'cpp' cannot take torch.float64 on cpu: it takes float32, bfloat16"
    ):
        ops.batch_norm_act(x, backend="cpp")
    with pytest.raises(ValueError, match="did you mean 'cpp'"):
        ops.batch_norm_act(x, backend="ccp")
    with pytest.raises(backends.BackendError), backends.force("cpp"):
        ops.batch_norm_act(x)
    with backends.force("eager"):
        assert backends.select(RAW, None, x.float(), *(None,) * 6) == "eager"
    assert backends.select(RAW, None, x, *(None,) * 6) == "eager"  # the table: float64 is eager's
