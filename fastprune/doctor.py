"""``fastprune doctor``: versions, backends, settings, and whether every backend computes what it should."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import fastprune
from fastprune import backends, memory, ops
from fastprune.errors import BackendError

# Package: what it is for.
OPTIONAL = {
    "triton": "GPU kernels",
    "scikit-learn": "the digits data set, quickstart",
    "matplotlib": "pictures, quickstart",
    "jinja2": "reports",
    "timm": "timm's models",
    "onnx": "ONNX export",
    "onnxscript": "ONNX export",
    "onnxruntime": "checking an ONNX export",
}
TOLERANCE = 1e-5  # of float32 results around 1; a wrong kernel is off by far more


def run() -> int:
    """Print the report; returns 1 if a backend computes wrong results, else 0."""
    import numpy
    import torchvision

    print(f"fastprune {fastprune.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {numpy.__version__}")
    omp = os.environ.get("OMP_NUM_THREADS")
    print(
        f"threads: {torch.get_num_threads()} on {os.cpu_count()} CPUs"
        + (f" (OMP_NUM_THREADS={omp})" if omp else " (OMP_NUM_THREADS is not set)")
    )
    print("CUDA: " + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"))
    _table("backends", backends.report())
    _table("CPU memory", memory.report())
    _table("optional packages", {name: _installed(name, use) for name, use in OPTIONAL.items()})
    results = {
        name: ", ".join(_verdict(op, name) for op in CHECKS if _claims(name, op))
        for name in ("eager", "cpp", "triton", "cuda")
        if _usable(name)
    }
    _table("self-check, forward and backward of every op in float32 against float64", results)
    wrong = [name for name, text in results.items() if "WRONG" in text]
    if wrong:
        print(f"\n{' and '.join(wrong)} computes wrong results here: please report this output as a bug")
    return 1 if wrong else 0


def _verdict(op: str, backend: str) -> str:
    try:
        error = self_check(op, backend)
    except BackendError as refusal:  # a backend need not have every op; the preference table then goes on to the next
        return f"{op} not there ({str(refusal).rpartition(': ')[2]})"
    return f"{op} {'ok' if error <= TOLERANCE else 'WRONG'} ({error:.1e})"  # NaN is wrong, too


def self_check(op: str, backend: str) -> float:
    """Largest error of the op's results and gradients, float32 on ``backend`` against float64 on eager.

    Raises:
        BackendError: The backend has no kernel of this op.
    """
    on_gpu = {"triton": not backends.INTERPRET, "cuda": not backends.EMULATE}.get(backend, False)
    device = "cuda" if on_gpu else "cpu"
    draw = torch.Generator().manual_seed(0)
    activations, parameters = torch.randn(3, 4, 19, 5, 7, generator=draw), torch.randn(2, 19, generator=draw)
    inputs = [t.to(device) for t in (*activations, *parameters)]
    got = CHECKS[op](inputs, backend)
    exact = CHECKS[op]([t.double() for t in inputs], "eager")
    return max((a - b).abs().max().item() for a, b in zip(got, exact, strict=True))


def _batch_norm_act(inputs: list[Tensor], backend: str) -> list[Tensor]:
    x, residual, dy, weight, bias = inputs
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    y = ops.batch_norm_act(*leaves[:3], residual=leaves[3], act="relu", bound="sigmoid", training=True, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def _channel_gate(inputs: list[Tensor], backend: str) -> list[Tensor]:
    x, _, dy, gate, _ = inputs
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    grad, magnitude = x.detach().new_zeros(2, *x.shape[:2])
    y = ops.channel_gate(x, gate, gate_grad=grad, gate_abs=magnitude, backend=backend)
    return [y, *torch.autograd.grad(y, (x, gate), dy), grad, magnitude]


def _scale_penalty(inputs: list[Tensor], backend: str) -> list[Tensor]:
    weight, bias = (t.clone().requires_grad_() for t in inputs[3:])
    value = ops.scale_penalty([weight, bias], "rni", 3.0, backend=backend)
    return [value, *torch.autograd.grad(value, (weight, bias))]


def _filter_norm(inputs: list[Tensor], backend: str) -> list[Tensor]:
    size = inputs[0][0].numel()  # means are around 1, where sums are not
    return [ops.filter_norm(inputs[:2], kind, dim, backend) / size for kind in ("l1", "l2", "sum") for dim in (0, 1)]


def _gram_penalty(inputs: list[Tensor], backend: str) -> list[Tensor]:
    weights = [t.clone().requires_grad_() for t in inputs[:2]]
    keep = [torch.arange(len(w), device=w.device) % 2 > 0 for w in weights]
    value = ops.gram_penalty(weights, keep, kept=0.5, backend=backend) / weights[0][0].numel() ** 2
    return [value, *torch.autograd.grad(value, weights)]


def _weight_taylor(inputs: list[Tensor], backend: str) -> list[Tensor]:
    return [ops.weight_taylor(inputs[:2], inputs[1:3], backend) / inputs[0][0].numel()]


def _masked_conv2d(inputs: list[Tensor], backend: str) -> list[Tensor]:
    x, other, dy, scales, bias = inputs
    weight = scales.outer(bias)[:, :, None, None] * other[0, :, :3, :3] / 19
    leaves = [t.clone().requires_grad_() for t in (x / 10, weight, bias)]
    masks = [torch.arange(19, device=x.device) % k > 0 for k in (2, 3)]
    y = ops.masked_conv2d(*leaves, in_mask=masks[0], out_mask=masks[1], padding=1, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def _growing_sgd(inputs: list[Tensor], backend: str) -> list[Tensor]:
    params, grads, momenta = ([inputs[i].clone() for i in pair] for pair in ((0, 1), (1, 2), (2, 0)))
    reg, keep = inputs[3].view(1, -1, 1, 1), inputs[1][:, :1] > 0
    ops.growing_sgd(params, grads, momenta, lr=0.1, momentum=0.9, reg={0: reg}, keep={1: keep}, backend=backend)
    return [*params, *momenta]


def _gate_sums(inputs: list[Tensor], backend: str) -> list[Tensor]:
    slots = inputs[0].flatten(1)[:, :19].contiguous()
    columns = torch.arange(19, device=slots.device).flip(0)
    sums = ops.gate_sums(slots, columns, columns.new_tensor([0, 3, 10, 19]), backend)
    return [part / len(slots) for part in sums]


CHECKS = {
    "batch_norm_act": _batch_norm_act,
    "channel_gate": _channel_gate,
    "filter_norm": _filter_norm,
    "gate_sums": _gate_sums,
    "growing_sgd": _growing_sgd,
    "gram_penalty": _gram_penalty,
    "masked_conv2d": _masked_conv2d,
    "scale_penalty": _scale_penalty,
    "weight_taylor": _weight_taylor,
}


def _usable(backend: str) -> bool:
    return backends.report()[backend].startswith(("ok", "interpreted", "emulated"))


def _claims(backend: str, op: str) -> bool:
    return any(backend in names for names in backends.PREFERENCE[op].values())


def _installed(package: str, use: str) -> str:
    try:
        return f"{version(package)} ({use})"
    except PackageNotFoundError:
        return f"not installed ({use}): pip install {package}"


def _table(title: str, rows: dict[str, str]) -> None:
    print(f"\n{title}")
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"  {name:{width}}  {text}")
