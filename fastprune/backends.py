"""Which implementation runs an op: one table, one function.

A backend is a name: "eager" (plain PyTorch), "cpp" (compiled for the CPU), "triton" or "cuda".  ``PREFERENCE`` lists,
per op and device type, the backends to try in order; :func:`select` returns the first that can take the call.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from fastprune.errors import BackendError, did_you_mean

PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    # op                        on cuda tensors                on cpu tensors
    # The CUDA C++ kernels of batch_norm_act are second as long as nobody has measured which are faster on a GPU.
    "batch_norm_act": {"cuda": ("triton", "cuda", "eager"), "cpu": ("cpp", "eager")},
    "channel_gate": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
    "filter_norm": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
    "gate_sums": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
    "growing_sgd": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
    "gram_penalty": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
    "masked_conv2d": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
    "scale_penalty": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
    "weight_taylor": {"cuda": ("triton", "eager"), "cpu": ("cpp", "eager")},
}

EMULATE = os.environ.get("FASTPRUNE_CUDA_EMULATOR")  # tests only: a library with the CUDA kernels, run by the CPU
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # tests only: Triton kernels on CPU tensors, by interpretation
_DEVICES = {
    "eager": ("cpu", "cuda"),
    "cpp": ("cpu",),
    "cuda": ("cuda", "cpu") if EMULATE else ("cuda",),
    "triton": ("cuda", "cpu") if INTERPRET else ("cuda",),
}
_lib = torch.library.Library("fastprune", "DEF")
_eager: dict[str, Callable] = {}
_refuse: dict[str, Callable] = {}
_forced: dict[str, str] = {}
_missing: dict[tuple[str, str, str], str | None] = {}  # (op, backend, device type) to why there is no kernel


def define(
    op: str,
    schemas: dict[str, str],
    *,
    eager: Callable,
    fake: dict[str, Callable],
    refuse: Callable[..., str | None] = lambda backend, *args: None,
) -> None:
    """Declare an op and the dispatcher functions behind it: one schema each for all compiled backends.

    Args:
        op: Name, a row of ``PREFERENCE``.
        schemas: Dispatcher function to its arguments and returns, ``{"batch_norm_act": "(Tensor x, ...) -> Tensor"}``.
            Each becomes ``torch.ops.fastprune.<function>.<backend>``; Triton's is found in ``fastprune.kernels.<op>``.
        eager: Plain PyTorch, differentiable any number of times.  Never goes through the dispatcher.
        fake: Dispatcher function to its shape function ``(backend, *args)``: shapes, dtypes and strides of the outputs.
        refuse: ``(backend, *args of select) -> reason`` why a compiled backend cannot take this call, or None.
    """
    _eager[op], _refuse[op] = eager, refuse
    for function, schema in schemas.items():
        for backend in ("cpp", "cuda", "triton"):
            name = f"{function}.{backend}"
            _lib.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(f"fastprune::{name}", partial(fake[function], backend), lib=_lib)
        if find_spec("triton"):
            for device in _DEVICES["triton"]:
                _lib.impl(f"{function}.triton", _lazy(f"fastprune.kernels.{op}", function), device.upper())
    for backend in ("cpp", "cuda", "triton"):
        for device in ("cpu", "cuda"):
            _missing[op, backend, device] = _find_kernel(schemas, backend, device)


def _lazy(module: str, name: str) -> Callable:
    load = cache(lambda: getattr(import_module(module), name))  # the first call imports Triton, not `import fastprune`
    return lambda *args: load()(*args)


def _find_kernel(functions: Iterable[str], backend: str, device: str) -> str | None:
    """Why ``backend`` has no kernel of an op made of ``functions`` for ``device``; None when it has one."""
    if device not in _DEVICES[backend]:
        return f"it runs on {' or '.join(_DEVICES[backend])} tensors"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if any(has_kernel(f"fastprune::{function}.{backend}", device.upper()) for function in functions):
        return None
    if backend == "triton":
        return "triton is not installed"
    return {"cpp": _extension_error, "cuda": _cuda_error}[backend] or "it has no kernel of this op"


def why_not(op: str, backend: str, x: Tensor, *args: object) -> str | None:
    """Why ``backend`` cannot run ``op`` on a call whose leading tensor is ``x``; None when it can."""
    if backend == "eager":
        return None
    if backend not in _DEVICES:
        raise ValueError(f"no backend named {backend!r}{did_you_mean(backend, _DEVICES)}")
    # A table, since Dynamo can trace a lookup but not a query of the dispatcher.
    reason = _missing.get((op, backend, x.device.type), f"it does not run on {x.device.type} tensors")
    return reason or _refuse[op](backend, x, *args)


def select(op: str, backend: str | None, x: Tensor, *args: object) -> str:
    """The name of the backend that runs ``op`` on a call whose leading tensor is ``x``.

    A backend asked for by name (here or through :func:`force`) is used or refused, never replaced.

    Raises:
        BackendError: The named backend cannot take this call; the message says why.
    """
    asked = backend or _forced.get(op) or _forced.get("*")
    if asked is None:
        for name in PREFERENCE[op].get(x.device.type, ("eager",)):
            if why_not(op, name, x, *args) is None:
                return name
    elif reason := why_not(op, asked, x, *args):
        raise BackendError(f"{op}: backend {asked!r} cannot take {x.dtype} on {x.device}: {reason}")
    return asked or "eager"


def eager(op: str) -> Callable:
    """The plain PyTorch version of ``op``."""
    return _eager[op]


@contextmanager
def force(backend: str, op: str = "*") -> Iterator[None]:
    """Run a block on one backend: ``with backends.force("eager"): ...``; ``op`` restricts it to one op."""
    if backend not in _DEVICES:
        raise ValueError(f"no backend named {backend!r}{did_you_mean(backend, _DEVICES)}")
    if op != "*" and op not in PREFERENCE:
        raise ValueError(f"no op named {op!r}{did_you_mean(op, PREFERENCE)}")
    old = _forced.get(op)
    _forced[op] = backend
    try:
        yield
    finally:
        if old is None:
            del _forced[op]
        else:
            _forced[op] = old


def report() -> dict[str, str]:
    """Backend to what it is or why it cannot run here; what ``fastprune doctor`` prints."""
    lines = {"eager": f"ok: PyTorch {torch.__version__}"}
    facts = build_info()
    if facts:
        lines["cpp"] = "ok: " + ", ".join(f"{key} {value}" for key, value in facts.items())
    else:
        lines["cpp"] = f"not available: {_extension_error}"
    if not find_spec("triton"):
        lines["triton"] = "not available: triton is not installed (pip install triton)"
    elif INTERPRET:
        lines["triton"] = "interpreted on the CPU (TRITON_INTERPRET=1): for tests, very slow"
    elif not torch.cuda.is_available():
        lines["triton"] = "installed, not in use: no CUDA device"
    else:
        lines["triton"] = f"ok: {torch.cuda.get_device_name()}"
    facts = cuda_build_info()
    if EMULATE:
        lines["cuda"] = "emulated on the CPU (FASTPRUNE_CUDA_EMULATOR): for tests, very slow"
    elif not facts:
        lines["cuda"] = f"not available: {_cuda_error}"
    else:
        what = ", ".join(f"{key} {value}" for key, value in facts.items())
        lines["cuda"] = f"ok: {what}" if torch.cuda.is_available() else f"installed, not in use: no CUDA device; {what}"
    return lines


def build_info() -> dict:
    """Facts of the compiled CPU extension (instruction set in use, compiler, ...); empty when it is missing."""
    return {} if _extension_error else json.loads(torch.ops.fastprune.build_info())


def cuda_build_info() -> dict:
    """Facts of the compiled CUDA extension (architectures, nvcc, ...); empty when it is missing."""
    return {} if _cuda_error or EMULATE else json.loads(torch.ops.fastprune.cuda_build_info())


_extension_error: str | None = None
try:  # importing the library registers its kernels
    import_module("fastprune._C")
except ImportError as error:  # a pure-Python install, or a library that does not fit: say which, once, and go on
    _extension_error = f"the compiled extension did not load ({error})"
    warnings.warn(
        f"fastprune: {_extension_error}; CPU ops run on eager PyTorch, correct but slower. Install a C++17 "
        "compiler and reinstall with `pip install --no-build-isolation .`; `fastprune doctor` says more.",
        stacklevel=2,
    )

_cuda_error: str | None = None
try:
    if EMULATE:
        torch.ops.load_library(EMULATE)
    elif torch.version.cuda:  # else the library would not load, and nobody misses it
        import_module("fastprune._C_cuda")
    else:
        _cuda_error = f"PyTorch {torch.__version__} has no CUDA"
except ModuleNotFoundError:
    _cuda_error = "not built (nvcc was missing at install time, or FASTPRUNE_EXT=cpu or none); Triton runs on the GPU"
except (ImportError, OSError) as error:  # built for another PyTorch or CUDA
    _cuda_error = f"fastprune._C_cuda did not load ({error})"
    warnings.warn(
        f"fastprune: {_cuda_error}; Triton runs on the GPU. Reinstall with `pip install --no-build-isolation .`; "
        "`fastprune doctor` says more.",
        stacklevel=2,
    )
