"""Calls of batch_norm_act: random inputs, the definition in float64, plain PyTorch, and ours."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fastprune import ops
from fastprune.backends import PREFERENCE

# Named, not discovered: a backend that fails to build must fail the run, not shrink it.
BACKENDS = os.environ.get("FASTPRUNE_TEST_BACKENDS", "eager,cpp,triton,cuda").split(",")


def backends_of(op: str) -> list[str]:
    """Of those to test, the backends that ``op`` has."""
    return [b for b in BACKENDS if any(b in row for row in PREFERENCE[op].values())]


DTYPES = {
    "eager": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
GATES = {  # Variant.gates to the buffers it asks for
    "": (), "grad": ("gate_grad",), "abs": ("gate_grad", "gate_abs"), "out": ("out_grad",), "out abs": ("out_abs",),
    "all": ("gate_grad", "gate_abs", "out_grad", "out_abs"),
}  # fmt: skip
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def device_for(backend: str) -> str:
    return "cuda" if backend != "cpp" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Variant:
    """What a call asks for.  ``params``: dtype of parameters and running statistics, "same" as x or "float32"."""

    bound: str | None = None
    act: str | None = None
    affine: bool = True
    bias: bool = True
    residual: bool = False
    training: bool = True
    track: bool = True
    momentum: float | None = 0.1
    gates: str = ""
    params: str = "float32"

    def __str__(self) -> str:
        words = ["sigmoid" if self.bound else "free" if self.affine else "plain"]
        words += [word for word in ("bias", "residual") if getattr(self, word)]
        words += [f"gates {self.gates}"] * bool(self.gates)
        words += [self.act or "linear", "train" if self.training else "eval", self.params]
        words += ["untracked"] * (not self.track) + ["cumulative"] * (self.momentum is None)
        return "-".join(words)


def every_variant() -> list[Variant]:
    """The whole product of bound, act, bias, residual and training, gates by turns; rarer switches one at a time."""
    product = itertools.product((None, "sigmoid"), (None, "relu"), (True, False), (True, False), (True, False))
    turns = itertools.cycle([name for name in GATES if name != "out abs"])  # five, coprime to the product's twos
    variants = [Variant(bound=b, act=a, bias=c, residual=r, training=t, gates=next(turns)) for b, a, c, r, t in product]
    return [
        *variants,
        Variant(affine=False, bias=False, act="relu"),
        Variant(affine=False, bias=False, act="relu", residual=True, training=False),
        Variant(affine=False, bias=True, act="relu"),
        Variant(track=False, act="relu", gates="grad"),
        Variant(act="relu", residual=True, gates="out abs"),
        Variant(momentum=None, act="relu"),
        Variant(momentum=0.0),
        Variant(bound="sigmoid", bias=False, act="relu", gates="grad"),
        Variant(params="same", act="relu", gates="abs"),
        Variant(params="same", bound="sigmoid", residual=True, act="relu"),
        Variant(params="same", training=False, act="relu"),
    ]


@dataclass
class Call:
    """Inputs in float64, already rounded to ``dtype``."""

    variant: Variant
    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    running: tuple = (None, None)
    params: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    results: dict = field(default_factory=dict)


def make_call(
    variant: Variant, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw", seed: int = 0
) -> Call:
    g = torch.Generator().manual_seed(seed)
    C = shape[1]
    params = dtype if variant.params == "same" else torch.promote_types(dtype, torch.float32)

    def rounded(t, to):
        return t.to(to).double()

    mean, scale = torch.randn(C, 1, 1, generator=g, dtype=torch.float64), torch.rand(C, 1, 1, generator=g) + 0.5
    x = rounded(torch.randn(shape, generator=g, dtype=torch.float64) * scale + mean, dtype)
    call = Call(variant, x, torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1, params=params)
    call.layout = LAYOUTS[layout]
    if variant.affine:
        call.weight = rounded(torch.randn(C, generator=g), params)
    if variant.bias:
        call.bias = rounded(torch.randn(C, generator=g) * 0.5, params)
    if variant.residual:
        call.residual = rounded(torch.randn(shape, generator=g, dtype=torch.float64), dtype)
    if variant.track:
        running = (torch.randn(C, generator=g), torch.rand(C, generator=g) + 0.5)
        call.running = tuple(rounded(t, params) for t in running)
    if variant.act and x.numel() and x.numel() > C:
        # Next to the ReLU's kink the gradient depends on rounding, in PyTorch too: no gradient is sent there.
        near = definition(call)["before_act"].abs() < 64 * torch.finfo(dtype).eps
        call.dy[near] = 0
    call.dy = rounded(call.dy, dtype)
    return call


def _leaves(call: Call, dtype, device) -> dict:
    def leaf(t, to, layout=None):
        if t is None:
            return None
        t = t.to(device=device, dtype=to, memory_format=layout or torch.preserve_format, copy=True)
        return t.requires_grad_()

    params = dtype if dtype == torch.float64 else call.params
    return {
        "x": leaf(call.x, dtype, call.layout),
        "weight": leaf(call.weight, params),
        "bias": leaf(call.bias, params),
        "residual": leaf(call.residual, dtype, call.layout),
    }


def _gradients(out, leaves, dy) -> dict:
    used = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(out, list(used.values()), dy.to(out))
    return {f"d{name}": grad for name, grad in zip(used, grads, strict=True)}


def definition(call: Call) -> dict:
    """The formula, in float64."""
    v, leaves = call.variant, _leaves(call, torch.float64, "cpu")
    x, column, results = leaves["x"], (1, -1, 1, 1), {}
    m = x.numel() // x.shape[1]
    mean, var = call.running
    if v.training or not v.track:
        batch_mean = x.sum((0, 2, 3)) / max(m, 1)
        batch_var = (x - batch_mean.view(column)).square().sum((0, 2, 3)) / max(m, 1)
        if v.track and m > 0:
            factor = 1.0 if v.momentum is None else v.momentum
            results["running_mean"] = (1 - factor) * mean + factor * batch_mean
            results["running_var"] = (1 - factor) * var + factor * batch_var * m / max(m - 1, 1)
        mean, var = batch_mean, batch_var
    if v.track:
        results.setdefault("running_mean", call.running[0])
        results.setdefault("running_var", call.running[1])
    xhat = (x - mean.view(column)) / (var.view(column) + 1e-5).sqrt()
    scale = torch.ones(x.shape[1]) if leaves["weight"] is None else leaves["weight"]
    z = (1 / (1 + (-scale).exp()) if v.bound else scale).view(column) * xhat
    if leaves["bias"] is not None:
        z = z + leaves["bias"].view(column)
    gates = {name: torch.ones_like(z, requires_grad=True) for name in ("gate", "out")}  # one each element
    z = z * gates["gate"]
    before = z if leaves["residual"] is None else z + leaves["residual"]
    y = (before * (before > 0) if v.act else before) * gates["out"]
    results |= {"y": y, **_gradients(y, leaves | gates, call.dy)}
    for name in gates:
        grad = results.pop(f"d{name}")
        results[f"{name}_grad"], results[f"{name}_abs"] = grad.sum((2, 3)), grad.abs().sum((2, 3))
    results["before_act"] = before
    return {name: t.detach() for name, t in results.items()}


def plain_pytorch(call: Call, dtype: torch.dtype, device: str = "cpu") -> dict:
    """What a user of nn.BatchNorm2d, + and ReLU gets today."""
    v, leaves = call.variant, _leaves(call, dtype, device)
    mean, var = (
        None if t is None else t.to(device, call.params if dtype != torch.float64 else dtype) for t in call.running
    )
    weight, bias = leaves["weight"], leaves["bias"]
    scale = weight.sigmoid() if v.bound else weight
    if scale is None and bias is not None:  # F.batch_norm wants both or neither
        scale = torch.ones_like(bias)
    momentum = (1.0 if v.momentum is None else v.momentum) if v.track else 0.0
    z = F.batch_norm(leaves["x"], mean, var, scale, bias, v.training or not v.track, momentum, 1e-5)
    before = z if leaves["residual"] is None else z + leaves["residual"]
    y = before.relu() if v.act else before
    results = {"y": y, **_gradients(y, leaves, call.dy)}
    dy, acc = call.dy.to(y), torch.promote_types(dtype, torch.float32)
    for name, gradient, t in (("gate", dy * (before > 0) if v.act else dy, z), ("out", dy, y)):
        product = gradient.to(acc) * t
        results[f"{name}_grad"], results[f"{name}_abs"] = product.sum((2, 3)), product.abs().sum((2, 3))
    results |= {"running_mean": mean, "running_var": var} if v.track else {}
    return {name: t.detach() for name, t in results.items()}


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal strides where a stride means something: in dimensions longer than 1 of tensors with elements."""
    return all(s == t or n <= 1 for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)) or not a.numel()


def gate_buffers(
    variant: Variant, N: int, C: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict, torch.Tensor]:
    """The buffers that the variant asks for, columns of one (N, T) matrix of NaN, and the matrix."""
    names = GATES[variant.gates]
    matrix = torch.full((N, len(names) * (C + 1) + 1), torch.nan, dtype=dtype, device=device)
    return {name: matrix[:, i * (C + 1) + 1 :][:, :C] for i, name in enumerate(names)}, matrix


def ours(call: Call, dtype: torch.dtype, backend: str, device: str = "cpu") -> dict:
    v, leaves = call.variant, _leaves(call, dtype, device)
    x = leaves.pop("x")
    N, C = x.shape[:2]
    acc = torch.promote_types(dtype, torch.float32)
    gates, matrix = gate_buffers(v, N, C, acc, device)
    mean, var = (
        None if t is None else t.to(device, call.params if dtype != torch.float64 else dtype) for t in call.running
    )
    tracked = torch.tensor(0, device=device) if v.track else None
    y = ops.batch_norm_act(
        x, leaves["weight"], leaves["bias"], mean, var, tracked, residual=leaves["residual"], act=v.act, bound=v.bound,
        training=v.training or not v.track, momentum=v.momentum, backend=backend, **gates,
    )  # fmt: skip
    assert y.dtype == dtype and y.shape == x.shape and same_layout(y, x)
    results = {"y": y, **_gradients(y, {"x": x, **leaves}, call.dy)}
    assert same_layout(results["dx"], x)
    results |= {name: t.clone() for name, t in gates.items()}
    for t in gates.values():
        t.fill_(torch.nan)
    assert matrix.isnan().all(), "written beside the gate buffers"
    if v.track:
        results |= {"running_mean": mean, "running_var": var}
        assert tracked.item() == int(v.training)
    return {name: t.detach() for name, t in results.items()}


def assert_as_good_as_eager(got: dict, eager: dict, exact: dict, dtype: torch.dtype) -> None:
    """The error against float64 may be at most twice that of plain PyTorch in the same dtype."""
    wrong = []
    for name in got:
        g, e, x = (side[name].double().cpu() for side in (got, eager, exact))
        assert g.shape == x.shape, f"{name}: shape {tuple(g.shape)}, expected {tuple(x.shape)}"
        if not x.numel():
            continue
        error, limit = (g - x).abs().max().item(), 2 * (e - x).abs().max().item()
        limit += 4 * torch.finfo(dtype).eps * max(1.0, x.abs().max().item())
        if not error <= limit:
            where = tuple(int(i) for i in torch.unravel_index((g - x).abs().nan_to_num(torch.inf).argmax(), x.shape))
            wrong.append(f"{name}: error {error:.3e} against float64, limit {limit:.3e}, at {where}")
    assert not wrong, "; ".join(wrong)
