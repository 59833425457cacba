"""growing_sgd on every backend, dtype and layout against its formula in float64, and GrowingSGD against torch's SGD."""

from __future__ import annotations

import copy
import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from bn_cases import assert_as_good_as_eager, backends_of, device_for
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastprune as fp
from fastprune import backends, ops
from fastprune.errors import BackendError
from fastprune.optim import GrowingSGD

GOLDEN = np.load(Path(__file__).parent / "golden" / "growing.npz")
BACKENDS = backends_of("growing_sgd")
COMPILED = [b for b in BACKENDS if b != "eager"]
DTYPES = {
    "eager": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "cpp": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
}
EACH = pytest.mark.parametrize("backend, dtype", [(b, d) for b in BACKENDS for d in DTYPES[b]], ids=str)
SWITCHES = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "first": True, "dampening": 0.5},
    {"momentum": 0.9, "first": True, "nesterov": True, "maximize": True},
]
SHAPES = [
    (16, 3, 3, 3), (37, 13, 1, 1), (5, 70, 3, 3), (32, 1, 3, 3), (10, 301), (7, 9, 5), (3, 4, 3, 2, 3), (600,), (1,),
    (), (0, 4, 3, 3), (4, 0), (33, 65),
]  # fmt: skip
FEW = [(6, 3, 3, 3), (5, 7, 1, 1), (3, 401), (3, 4, 5), (2, 4, 3, 2, 2), (40,), (), (0, 4, 3, 3)]  # for the interpreter


def shapes_for(backend):
    return FEW if backend == "triton" and device_for(backend) == "cpu" else SHAPES


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: (
        t.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[t.dim()]) if t.dim() > 3 else t
    ),
    "reversed": lambda t: t.permute(tuple(range(t.dim()))[::-1]).contiguous().permute(tuple(range(t.dim()))[::-1]),
}
FORMS = {  # which dimensions a regularisation or mask has
    "filter": lambda shape: [n if d == 0 else 1 for d, n in enumerate(shape)],
    "channel": lambda shape: [n if d == 1 else 1 for d, n in enumerate(shape)],
    "kernel": lambda shape: [n if d < 2 else 1 for d, n in enumerate(shape)],
    "weight": lambda shape: list(shape),
    "one": lambda shape: [1 for _ in shape],
    "odd": lambda shape: [n if d % 2 else 1 for d, n in enumerate(shape)],
}


class Case:
    """Inputs of a step: CPU, float64 but of values that the dtype has."""

    def __init__(self, shapes, dtype, layout="contiguous", seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.dtype, self.acc = dtype, torch.promote_types(dtype, torch.float32)

        def draw(shape, to=dtype):
            return torch.randn(shape, generator=rng, dtype=torch.float64).to(to).double()

        self.params, self.grads, self.momenta = ([LAYOUTS[layout](draw(shape)) for shape in shapes] for _ in range(3))
        self.reg, self.keep = {}, {}
        forms = itertools.cycle(FORMS.values())
        for i, shape in enumerate(shapes):
            if i % 5 != 4:  # some have none
                self.reg[i] = draw(next(forms)(shape), self.acc)
            if i % 4 != 3:
                self.keep[i] = torch.rand(next(forms)(shape), generator=rng) > 0.3

    def tensors(self, device, dtype=None):
        """Fresh params, grads, momenta, and reg and keep."""
        to = lambda ts, d: [t.clone(memory_format=torch.preserve_format).to(device, d) for t in ts]  # noqa: E731
        dtype = dtype or self.dtype
        acc = torch.promote_types(dtype, torch.float32)
        parts = [
            {i: t.to(device, d) for i, t in part.items()} for part, d in ((self.reg, acc), (self.keep, torch.bool))
        ]
        return [to(ts, dtype) for ts in (self.params, self.grads, self.momenta)] + parts


def step(case, backend, dtype=None, reg=True, keep=True, lr=0.1, **switches):
    """All that a step changes, by name."""
    params, grads, momenta, regs, keeps = case.tensors(device_for(backend) if backend else "cpu", dtype)
    for name in ("grad_scale", "found_inf"):
        if name in switches:
            switches[name] = switches[name].to(params[0].device)
    buffers = momenta if switches.get("momentum") else []
    parts = {"reg": regs if reg else (), "keep": keeps if keep else ()}
    lr = lr.to(params[0].device) if isinstance(lr, torch.Tensor) else lr
    ops.growing_sgd(params, grads, buffers, lr=lr, **parts, **switches, backend=backend)
    lists = {"param": params, "grad": grads, "momentum": buffers}
    return {f"{name}{i}": t for name, ts in lists.items() for i, t in enumerate(ts)}


def definition(case, *, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, first=False,
               grad_scale=None):  # fmt: skip
    """The formula of the docstring in float64."""
    out = {}
    for i, (p, g, b) in enumerate(zip(case.params, case.grads, case.momenta, strict=True)):
        if grad_scale is not None:
            g = g / grad_scale.double()
        out[f"grad{i}"] = g
        g = (-g if maximize else g) + weight_decay * p
        if i in case.reg:
            g = g + case.reg[i] * p
        kept = case.keep.get(i, torch.tensor(True)).double()
        if momentum:
            b = g if first else momentum * b + (1 - dampening) * g
            out[f"momentum{i}"] = b * kept
            g = g + momentum * b if nesterov else b
        out[f"param{i}"] = (p - 0.1 * g) * kept
    return out


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_formula(backend, dtype, layout):
    case = Case(shapes_for(backend), dtype, layout)
    for switches in SWITCHES if layout == "contiguous" else SWITCHES[3:5]:
        got, eager = step(case, backend, **switches), step(case, "eager", **switches)
        assert all(t.dtype == dtype for t in got.values())
        assert_as_good_as_eager(got, eager, definition(case, **switches), dtype)
        for i, keep in case.keep.items():
            assert not got[f"param{i}"].cpu()[~keep.expand(case.params[i].shape)].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_of_regularisation_and_mask(backend, layout):
    shapes = [(4, 3, 3, 2), (5, 7), (6,), (2, 3, 2, 2, 3)]
    case = Case(shapes, torch.float32, layout)
    for forms in (
        itertools.product(FORMS.values(), repeat=2)
        if backend != "triton"
        else zip(FORMS.values(), reversed(FORMS.values()), strict=True)
    ):
        case.reg = {i: torch.randn(forms[0](s)).double() for i, s in enumerate(shapes)}
        case.keep = {i: torch.rand(forms[1](s)) > 0.4 for i, s in enumerate(shapes)}
        for other in (False, True):  # strides of their own, too
            if other:
                case.reg = {i: LAYOUTS["reversed"](t) for i, t in case.reg.items()}
                case.keep = {i: LAYOUTS["channels_last"](t) for i, t in case.keep.items()}
            got, exact = step(case, backend, momentum=0.9), definition(case, momentum=0.9)
            assert_as_good_as_eager(got, step(case, "eager", momentum=0.9), exact, torch.float32)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_constraints_it_is_torch_sgd_bit_for_bit(backend, dtype, layout):
    if backend == "cpp" and not set(backends.build_info()["isa_available"]) & {"avx2", "avx512"}:
        pytest.skip("no fused multiply-add")
    case = Case(SHAPES, dtype, layout)
    for switches in SWITCHES:
        first = switches.get("first", False)
        ours, theirs = ([nn.Parameter(p) for p in case.tensors("cpu")[0]] for _ in range(2))
        options = {key: value for key, value in switches.items() if key != "first"}
        a = GrowingSGD(ours, lr=0.1, **options)
        b = torch.optim.SGD(theirs, lr=0.1, foreach=True, **options)
        with backends.force(backend):
            for turn in range(1 if first else 3):
                for p, q, g in zip(ours, theirs, case.grads, strict=True):
                    p.grad, q.grad = (LAYOUTS[layout](g.to(dtype) * (turn + 1)) for _ in range(2))
                a.step()
                b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            if options.get("momentum"):
                assert torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_authors_gradients(backend):
    def tensor(key):
        return torch.from_numpy(GOLDEN[key]).to(device_for(backend))

    for method, names in (("greg", ("features.0", "features.3", "classifier")),
                          ("tpp", ("0.weight", "0.bias", "1.weight", "1.bias"))):  # fmt: skip
        params = [tensor(f"greg/net/{n}.weight" if method == "greg" else f"tpp/apply_reg/param/{n}") for n in names]
        before = [tensor(f"{method}/apply_reg/grad_in/{n}") for n in names]
        if method == "greg":
            regs = [tensor(f"greg/apply_reg/reg/{n}") for n in names]
            regs = [r.view(*r.shape, *[1] * (p.dim() - 2)) for r, p in zip(regs, params, strict=True)]
        else:
            column = tensor("tpp/apply_reg/reg")[:, 0].contiguous()  # per filter: of weight, bias, scale and shift
            regs = [column.view(-1, *[1] * (p.dim() - 1)) for p in params]
        grads = [g.clone() for g in before]
        ops.grow_grads(params, grads, regs, backend)
        momenta = [torch.zeros_like(p) for p in params]
        ops.growing_sgd(params, before, momenta, lr=0.0, momentum=0.5, first=True, reg=regs, backend=backend)
        for name, grad, buffer in zip(names, grads, momenta, strict=True):
            want = tensor(f"{method}/apply_reg/grad_out/{name}")
            torch.testing.assert_close(grad, want, rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(buffer, want, rtol=1e-14, atol=1e-14)


@EACH
def test_a_scaled_gradient_and_a_step_that_is_skipped(backend, dtype):
    case, switches = Case(FEW, dtype), {"momentum": 0.9, "weight_decay": 0.01}
    scaled = switches | {"grad_scale": torch.tensor(64.0), "found_inf": torch.tensor(0.0)}
    got, eager = step(case, backend, **scaled), step(case, "eager", **scaled)
    assert_as_good_as_eager(got, eager, definition(case, **switches, grad_scale=torch.tensor(64.0)), dtype)
    for i, g in enumerate(case.grads):
        torch.testing.assert_close(got[f"grad{i}"].cpu(), (g / 64).to(dtype), rtol=0, atol=0)
    skipped = step(case, backend, **scaled | {"found_inf": torch.tensor(1.0)})
    for name, tensors in (("param", case.params), ("grad", case.grads), ("momentum", case.momenta)):
        assert all(torch.equal(skipped[f"{name}{i}"].cpu(), t.to(dtype)) for i, t in enumerate(tensors))


@EACH
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["lr32", "lr64"])
def test_a_learning_rate_on_the_device(backend, dtype, kind):
    """Is the number that it holds, to the bit where the kernel reads it; eager PyTorch rounds once more."""
    case, switches = Case(FEW, dtype), {"momentum": 0.9, "weight_decay": 0.01}
    rate = torch.tensor(0.1, dtype=kind)
    got, eager = step(case, backend, lr=rate, **switches), step(case, "eager", lr=rate, **switches)
    number = step(case, backend, lr=rate.item(), **switches)
    assert_as_good_as_eager(got, eager, definition(case, **switches), dtype)
    if backend != "eager":
        assert all(torch.equal(got[name], t) for name, t in number.items())
    other = step(case, backend, lr=torch.tensor(0.2, dtype=kind), **switches)
    assert not torch.equal(got["param0"], other["param0"]) and torch.equal(got["momentum0"], other["momentum0"])


@EACH
def test_grow_grads_and_hold(backend, dtype):
    case = Case(shapes_for(backend), dtype, "channels_last")
    params, grads, _, reg, keep = case.tensors(device_for(backend))
    ops.grow_grads(params, grads, reg, backend)
    eager = case.tensors("cpu")
    ops.grow_grads(eager[0], eager[1], eager[3], "eager")
    exact = [
        g + case.reg[i] * p if i in reg else g for i, (p, g) in enumerate(zip(case.params, case.grads, strict=True))
    ]
    named = [{str(i): t for i, t in enumerate(ts)} for ts in (grads, eager[1], exact)]
    assert_as_good_as_eager(*named, dtype)
    for p, k in zip(params, [keep.get(i) for i in range(len(params))], strict=True):
        if k is not None and p.numel() and not k.all():
            p[~k.expand(p.shape)] = torch.nan
    ops.hold(params, keep, backend)
    for i, (p, was) in enumerate(zip(params, case.params, strict=True)):
        kept = case.keep.get(i, torch.tensor(True)).expand(p.shape)
        assert torch.equal(p.cpu(), torch.where(kept, was, 0).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_cut_is_zero_even_where_numbers_are_not_finite(backend):
    device = device_for(backend)
    p = torch.tensor([torch.inf, torch.nan, 1.0, torch.inf, 2.0], device=device)
    g, b = torch.full_like(p, torch.nan), torch.full_like(p, torch.inf)
    g[3:], b[3:] = 1.0, 0.0
    keep = torch.tensor([False, False, False, True, True], device=device)
    ops.growing_sgd([p], [g], [b], lr=0.1, momentum=0.9, keep=[keep], backend=backend)
    assert p.tolist()[:4] == [0, 0, 0, torch.inf] and b.tolist() == [0, 0, 0, 1, 1]
    ops.growing_sgd([p], [g], [b], lr=0.1, momentum=0.9, reg={}, backend=backend)  # no 0 * inf where there is no reg
    assert p[3] == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend):
    case = Case(
        shapes_for(backend) + ([(300, 700), (3, 70000), (70000,)] if backend != "triton" else []), torch.float32
    )
    first, threads = step(case, backend, momentum=0.9), torch.get_num_threads()
    try:
        for n in (1, 2, 3) if backend != "triton" else (1,):
            torch.set_num_threads(n)
            again = step(case, backend, momentum=0.9)
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    ops.growing_sgd([], [], [], lr=0.1, momentum=0.9, backend=backend)
    ops.grow_grads([torch.ones(3)], [torch.ones(3)], [None], backend)
    ops.hold([], {}, backend)
    empty = [torch.ones(0, 3, device=device_for(backend)) for _ in range(3)]
    ops.growing_sgd(*[[t] for t in empty], lr=0.1, momentum=0.9, keep=[empty[0] > 0], backend=backend)


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend):
    case = Case([(5, 3, 2, 2), (4, 7), (3,)], torch.float32, "channels_last")
    params, grads, momenta, reg, keep = case.tensors(device_for(backend))
    parts = [list(reg.values()), list(reg), list(keep.values()), list(keep)]
    scalars = [torch.tensor(2.0, device=params[0].device), torch.tensor(0.0, device=params[0].device)]
    utils = ("test_schema", "test_faketensor")
    rate = torch.tensor(0.1, dtype=torch.float64, device=params[0].device)
    for some in ([*scalars, None], [None, None, rate]):
        args = (params, grads, momenta, *parts, *some, 0.1, 0.9, 0.0, 0.01, True, False, False)
        torch.library.opcheck(getattr(torch.ops.fastprune.growing_sgd, backend), args, test_utils=utils)
    all_of = lambda parts, kind: [  # noqa: E731
        parts.get(i, torch.ones_like(p, dtype=kind)) for i, p in enumerate(params)
    ]
    op = getattr(torch.ops.fastprune.grow_grads, backend)
    torch.library.opcheck(op, (params, grads, all_of(reg, torch.float32)), test_utils=utils)
    op = getattr(torch.ops.fastprune.hold, backend)
    torch.library.opcheck(op, (params, all_of(keep, torch.bool)), test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_that_parameters_changed(backend):
    w = torch.randn(3, device=device_for(backend), requires_grad=True)
    loss = (w * w).sum()
    version = w._version
    ops.growing_sgd([w], [torch.ones_like(w)], [], lr=0.1, backend=backend)
    assert w._version > version and w.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", COMPILED)
def test_other_strides_go_to_eager_or_are_refused(backend):
    def tensors(*which):
        made = [torch.arange(24.0, device=device_for(backend)).view(4, 6) for _ in range(3)]
        return [t.repeat(1, 2)[:, ::2] if name in which else t for name, t in zip("pgb", made, strict=True)]

    for which, words in (
        ("pgb", r"params must be dense, of at most 5 dimensions; params\[0\] has strides \(12, 2\)"),
        ("g", r"grads\[0\] must have its parameter's strides, \(6, 1\), got \(12, 2\)"),
        ("b", r"momenta\[0\] must have its parameter's strides"),
    ):
        p, g, b = tensors(*which)
        with pytest.raises(BackendError, match=words):
            ops.growing_sgd([p], [g], [b], lr=0.1, momentum=0.9, backend=backend)
        want = p - 0.1 * (0.9 * b + g)
        ops.growing_sgd([p], [g], [b], lr=0.1, momentum=0.9)
        torch.testing.assert_close(p, want)


@pytest.mark.parametrize("backend", COMPILED)
def test_the_kernels_check_shapes_themselves(backend):
    op, device = getattr(torch.ops.fastprune.growing_sgd, backend), device_for(backend)
    p, g, b = ([torch.ones(4, 3, device=device)] for _ in range(3))
    numbers = (None, None, None, 0.1, 0.9, 0.0, 0.0, False, False, False)
    for reg, keep in ((torch.ones(5, 1), None), (torch.ones(3), None), (torch.ones(4, 1).double(), None),
                      (None, torch.ones(4, 2) > 0), (None, torch.ones(4, 1))):  # fmt: skip
        regs, keeps = ([] if t is None else [t.to(device)] for t in (reg, keep))
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            op(p, g, b, regs, [0] * len(regs), keeps, [0] * len(keeps), *numbers)
    with pytest.raises((RuntimeError, ValueError), match=r"momenta|shape"):
        op(p, g, [torch.ones(5, 3, device=device)], [], [], [], [], *numbers)


ONES, PAIR = [torch.ones(2, 3)], [torch.ones(2, 3), torch.ones(4)]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ops.growing_sgd(PAIR, ONES, [], lr=0.1), "growing_sgd: expected grads for all 2 params, got 1"),
        (lambda: ops.growing_sgd(PAIR, PAIR[::-1], [], lr=0.1), r"grads\[0\] like its parameter, \(2, 3\)"),
        (lambda: ops.growing_sgd(PAIR, PAIR, [], lr=0.1, momentum=0.9), "a buffer per parameter, got 0 for 2"),
        (lambda: ops.growing_sgd(PAIR, PAIR, PAIR, lr=0.1), "no buffers without momentum, got 2"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=0.1, nesterov=True), "nesterov needs a momentum"),
        (lambda: ops.growing_sgd([torch.ones(2).int()], ONES, [], lr=0.1), "params of floats of one dtype"),
        (lambda: ops.growing_sgd([*ONES, torch.ones(2).double()], ONES, [], lr=0.1), "call once for each"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=0.1, reg=[torch.ones(3)]), r"reg\[0\] to have 2 dimensions"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=0.1, reg=[torch.ones(3, 1)]), r"got \(3, 1\)"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=0.1, reg=[torch.ones(2, 1).half()]), "torch.float32 on cpu; got"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=0.1, keep=[torch.ones(2, 1)]), "torch.bool on cpu; got"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=0.1, keep={1: None}), r"keep has positions \[1\]"),
        (lambda: ops.growing_sgd(PAIR, PAIR, [], lr=0.1, reg=[None]), "reg for all 2 params"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=0.1, grad_scale=torch.ones(1)), r"grad_scale \(\), float32"),
        (lambda: ops.growing_sgd(ONES, ONES, [], lr=torch.ones(1)), r"expected lr \(\), float32 or float64, on cpu"),
        (lambda: ops.growing_sgd(ONES, [ONES[0].to_sparse()], [], lr=0.1), r"grads\[0\] is torch.sparse_coo"),
        (lambda: ops.grow_grads(ONES, PAIR, [None]), "grow_grads: expected grads for all 1"),
        (lambda: ops.hold(PAIR, [None, torch.ones(4)]), r"hold: expected keep\[1\]"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the optimizer -------------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(1), nn.Linear(6 * 16, 4)
    )  # fmt: skip


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def test_it_continues_runs_of_torch_sgd_and_the_other_way_round():
    reference, model = network(), network()
    straight = torch.optim.SGD(reference.parameters(), **OPTIONS, foreach=True)
    schedule = torch.optim.lr_scheduler.StepLR(straight, 2, 0.5)
    for i in range(6):
        train(reference, straight, 2, 2 * i)
        schedule.step()
    state = None
    for i, cls in enumerate((GrowingSGD, torch.optim.SGD, GrowingSGD)):
        optimizer = cls(model.parameters(), **OPTIONS)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        if state:
            state.seek(0)
            loaded = torch.load(state)
            optimizer.load_state_dict(loaded["optimizer"])
            schedule.load_state_dict(loaded["schedule"])
        assert optimizer.param_groups[0].keys() == straight.param_groups[0].keys()
        for j in (2 * i, 2 * i + 1):
            train(model, optimizer, 2, 2 * j)
            schedule.step()
        state = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, state)
    assert same(model, reference)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in straight.param_groups]


def test_groups_missing_gradients_mixed_dtypes_and_tensor_learning_rates():
    def make(cls):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4).double()), nn.Parameter(torch.randn(2))]
        optimizer = cls(
            [{"params": params[:2], "lr": torch.tensor(0.25)}, {"params": params[2:], "momentum": 0}], 0.1, 0.9
        )
        params += [nn.Parameter(torch.randn(3, 2).double()), nn.Parameter(torch.randn(7))]
        optimizer.add_param_group({"params": params[3:], "weight_decay": 0.1, "maximize": True})
        for turn in range(4):
            for i, p in enumerate(params):
                late = (i == 0 and turn < 2) or i == 4  # a gradient comes at the third step, or never
                p.grad = None if late else torch.full_like(p, 0.1 * (i + turn))
            optimizer.step()
        return params, optimizer

    (ours, a), (theirs, b) = make(GrowingSGD), make(torch.optim.SGD)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert a.state.get(p, {}).keys() == b.state.get(q, {}).keys()


def test_constraints_are_kept_by_reference_and_hold():
    model = network()
    optimizer = GrowingSGD(model.parameters(), **OPTIONS)
    conv, norm = model[0], model[1]
    reg = {conv.weight: torch.zeros(8, 1, 1, 1)}
    keep = {conv.weight: torch.ones(8, 1, 1, 1, dtype=torch.bool), norm.weight: torch.ones(8, dtype=torch.bool)}
    optimizer.constrain(reg, keep)
    plain = network()
    other = torch.optim.SGD(plain.parameters(), **OPTIONS, foreach=True)
    train(model, optimizer, 3)
    train(plain, other, 3)
    assert same(model, plain)
    for mask in keep.values():
        mask[2] = False
    reg[conv.weight].fill_(0.5)
    train(model, optimizer, 2, 3)
    for p in keep:
        assert not p[2].any() and not optimizer.state[p]["momentum_buffer"][2].any() and p[3].any()
    for i in (3, 4):  # the usual way to do the same
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        other.zero_grad()
        plain(x).square().mean().backward()
        plain[0].weight.grad += 0.5 * plain[0].weight.detach()
        other.step()
        with torch.no_grad():
            for p in (plain[0].weight, plain[1].weight):
                p[2] = other.state[p]["momentum_buffer"][2] = 0
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    optimizer.constrain()
    conv.weight.grad = torch.ones_like(conv.weight)
    optimizer.step()
    assert conv.weight[2].all()


def test_constrain_with_the_same_tensors_checks_nothing(monkeypatch):
    model = network()
    optimizer = GrowingSGD(model.parameters(), lr=0.1)
    reg = {p: torch.ones_like(p) for p in model.parameters()}
    optimizer.constrain(reg)
    monkeypatch.setattr("fastprune.optim.check_broadcast", lambda *args, **kwargs: pytest.fail("checked again"))
    optimizer.constrain(dict(reg))
    train(model, optimizer, 1)


def test_constrain_refuses_what_does_not_fit():
    model = network()
    optimizer = GrowingSGD(model.parameters(), lr=0.1)
    w = model[0].weight
    for args, words in (
        (({torch.ones(3): torch.ones(3)},), r"reg has a tensor \(3,\) that is none of the parameters"),
        (({w: torch.ones(8)},), r"4 dimensions, .* \(8, 3, 3, 3\), torch.float32 on cpu; got \(8,\)"),
        (({w: torch.ones(7, 1, 1, 1)},), r"got \(7, 1, 1, 1\)"),
        ((None, {w: torch.ones(8, 1, 1, 1)}), "torch.bool on cpu; got"),
    ):
        with pytest.raises(ValueError, match=f"GrowingSGD.constrain: .*{words}"):
            optimizer.constrain(*args)
    train(model, optimizer, 1)


def test_compact_cuts_constraints_as_it_cuts_the_state():
    model, twin = network(), network()
    optimizers = [GrowingSGD(m.parameters(), **OPTIONS) for m in (model, twin)]
    mask = torch.tensor([True] * 5 + [False] * 3)
    reg = torch.linspace(0, 1, 8).view(8, 1, 1, 1)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        optimizer.constrain(reg={m[0].weight: reg}, keep={m[0].weight: mask.view(-1, 1, 1, 1)})
        train(m, optimizer, 2)
        fp.compact(m, {"0": mask}, torch.randn(1, 3, 8, 8), optimizer=optimizer)
    assert model[0].weight.shape == (5, 3, 3, 3)
    optimizers[1].constrain({twin[0].weight: reg[mask]}, {twin[0].weight: torch.ones(1, 1, 1, 1, dtype=torch.bool)})
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        train(m, optimizer, 2, 2)
    assert same(model, twin) and optimizers[0].state[model[0].weight]["momentum_buffer"].shape == (5, 3, 3, 3)


class Counted(TorchDispatchMode):
    def __enter__(self):
        self.calls = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", COMPILED)
def test_a_step_is_one_call_whatever_the_depth(backend):
    calls = []
    for depth in (2, 9):
        model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(depth))).to(device_for(backend))
        optimizer = GrowingSGD(model.parameters(), **OPTIONS)
        optimizer.constrain({m.weight: torch.ones_like(m.weight[:, :1, :1, :1]) for m in model})
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with backends.force(backend):
            optimizer.step()
            with Counted() as counted:
                optimizer.step()
        calls.append(counted.calls)
    assert calls[0] == calls[1] and calls[0][f"fastprune.growing_sgd.{backend}"] == 1
    assert sum(calls[0].values()) <= 3, calls[0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_grad_scaler(momentum):
    options = {"lr": 0.1, "momentum": momentum, "dampening": 0.5 if momentum else 0, "weight_decay": 0.01}
    models, scalers = (network(), network()), [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    optimizers = [cls(m.parameters(), **options) for cls, m in zip((GrowingSGD, torch.optim.SGD), models, strict=True)]
    for i in range(6):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))
            scaler.scale(model(x).square().mean()).backward()
            if i in (0, 3):  # of all steps the first, which would make the buffers
                model[0].weight.grad[0, 0, 0, 0] = torch.inf
                before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"]))
            if i == 4:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            if i in (0, 3):
                now = list(model.parameters()), optimizer.state_dict()["state"]
                torch.testing.assert_close(now, before, rtol=0, atol=0)
            scaler.update()
        if i not in (0, 3):
            for p, q in zip(*(m.parameters() for m in models), strict=True):
                torch.testing.assert_close(p.grad, q.grad)  # unscaled, for whoever reads it after the step
    assert scalers[0].get_scale() == scalers[1].get_scale() == 256.0
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)


def test_grad_scaler_without_a_look_from_the_host():
    """The step that makes the buffers does not ask whether it is skipped; what comes after is as if it had."""
    model, twin = network(), network()
    optimizer, other = GrowingSGD(model.parameters(), 0.1, 0.9), torch.optim.SGD(twin.parameters(), 0.1, 0.9)
    optimizer.grad_scale = torch.tensor(2.0)
    for i in range(3):
        optimizer.found_inf = torch.tensor(float(i == 0))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad, q.grad = torch.full_like(p, torch.inf if i == 0 else 2.0 * i), torch.full_like(q, float(i))
        with Counted() as counted:
            optimizer.step()
        assert not any("_local_scalar_dense" in name for name in counted.calls)
        if i:
            other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


def test_a_learning_rate_on_the_device_follows_its_scheduler():
    """As torch's own schedulers treat a tensor: they fill it."""
    runs = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        model = network()
        optimizer = GrowingSGD(model.parameters(), lr, 0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for i in range(5):
            for p in model.parameters():
                p.grad = torch.full_like(p, float(i))
            with Counted() as counted:
                optimizer.step()
            assert not any("_local_scalar_dense" in name for name in counted.calls)
            schedule.step()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


def test_what_is_refused():
    p = nn.Parameter(torch.ones(2))
    for name in ("foreach", "fused", "differentiable"):
        with pytest.raises(ValueError, match=f"GrowingSGD: {name}=True cannot be had"):
            GrowingSGD([p], 0.1, **{name: True})
    with pytest.raises(ValueError, match="Nesterov"):
        GrowingSGD([p], 0.1, nesterov=True)
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = GrowingSGD(embedding.parameters(), 0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of a parameter \(5, 3\) is torch.sparse_coo"):
        optimizer.step()


def test_hooks_closures_and_copies():
    model = network()
    optimizer = GrowingSGD(model.parameters(), **OPTIONS)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3, 8, 8)).square().mean()
        loss.backward()
        return loss

    with torch.profiler.profile(acc_events=True) as profile:
        first = optimizer.step(closure)
    assert "Optimizer.step#GrowingSGD.step" in {event.key for event in profile.key_averages()}
    assert seen == ["before", "after"] and optimizer.step(closure) < first
    optimizer.constrain(keep={model[0].weight: torch.zeros(8, 1, 1, 1, dtype=torch.bool)})
    twin, its = copy.deepcopy((model, optimizer))
    train(twin, its, 1)  # a copy has parameters of its own, and no constraints
    train(model, optimizer, 1)
    assert twin[0].weight.any() and not model[0].weight.any()
