"""Files that serve without fastprune: ``torch.export`` archives and ONNX models, read back and compared."""

from __future__ import annotations

import copy
import inspect
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import backends
from fastprune.errors import ExportError, did_you_mean
from fastprune.nn import Gate
from fastprune.plain import to_plain
from fastprune.surgery import call, check_plain, distance, leaves, map_tensors

FORMATS = {"torch.export": ".pt2", "onnx": ".onnx"}
TOLERANCE, TIMES_EAGER = 1e-5, 10  # see export
_ONE_FILE = 2**31 - 2**27  # bytes of weights; protobuf cannot hold 2 GiB, and the graph needs some
_BATCH = "batch"


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: The file; an ONNX model of 2 GB and more has its weights in a second one, ``<name>.data``.
        format: "torch.export" or "onnx".
        opset: Of ONNX; None otherwise.
        inputs, outputs: Name to shape, with "batch" where any size fits.
        bytes: Size of all files.
        difference: Largest difference of the file's outputs from the model's in float64, relative to the largest
            output, over all inputs of the check; None without a check.
        eager_difference: The same of PyTorch eager in the model's dtype.
    """

    path: Path
    format: str
    opset: int | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    bytes: int
    difference: float | None
    eager_difference: float | None

    def __str__(self) -> str:
        def listed(shapes: dict[str, tuple[int | str, ...]]) -> str:
            return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items())

        opset = f", opset {self.opset}" if self.opset else ""
        checked = "not checked"
        if self.difference is not None:
            checked = f"off by {self.difference:.1e} (eager: {self.eager_difference:.1e})"
        return (
            f"{self.path}: {self.format}{opset}, {self.bytes / 1e6:.2f} MB, "
            f"{listed(self.inputs)} -> {listed(self.outputs)}, {checked}"
        )


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    format: str | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
    check: bool = True,
) -> ExportReport:
    """Write ``model`` in eval mode, made plain (see :func:`fastprune.to_plain`), to a file; the model is not touched.

    The file is written beside ``path`` under another name, read back, and compared with the model on
    ``example_inputs`` and on random inputs, other batch sizes included.  It gets its name only if it is right.

    *What right means:* on each input, the largest difference from a float64 copy of ``model`` is at most 1e-5 of the
    largest output, or 10 times that of PyTorch eager in the model's own dtype if that is more.  So the bound knows how
    well conditioned the network is, and holds for float16 as for float32.

    Formats:

    - ``"torch.export"`` (.pt2): ``torch.export.load(path).module()`` runs it, on the CPU; memory formats are kept.
      float64, float32, float16 and bfloat16.
    - ``"onnx"`` (.onnx): by torch.onnx's exporter for exported programs, checked with onnxruntime's CPU kernels, which
      have no bfloat16 or float64 convolutions: float32 and float16 only.  Needs ``pip install 'fastprune[export]'``.

    TorchScript is deprecated in PyTorch and not offered.

    Args:
        model: Any module in any mode on any device; may contain modules of ours.
        path: Ends in ".pt2" or ".onnx"; an existing file is replaced.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        format: "torch.export" or "onnx"; None goes by the suffix.
        dynamic_batch: Let the file take any batch size: dimension 0 of every input that has as many entries there as
            the first input.  False keeps the size of ``example_inputs``.
        opset: Of ONNX; None: the exporter's default.
        check: False writes without a check, for example because no float64 copy fits into memory.

    Raises:
        ValueError: Unknown format or suffix, an opset for torch.export, no folder to write to, a compiled or
            distributed model, example_inputs without a tensor.
        GraphError: The model cannot be made plain.
        ExportError: The exporter fails, a package is missing, or the file is not right.  Nothing was written.
    """
    check_plain(model, "export")
    path = Path(path)
    format = _format(path, format, opset)
    args, kwargs = _arguments(model, example_inputs)
    dtypes = {t.dtype for t in (*model.parameters(), *leaves((args, kwargs))) if t.is_floating_point()}
    if format == "onnx":
        _expect_packages("onnx", "onnxscript", *(["onnxruntime"] if check else []))
        if unknown := dtypes & {torch.bfloat16, torch.float64}:
            raise ExportError(
                f"export: onnxruntime has no {_listed(unknown)} convolutions on the CPU, so that an ONNX file cannot "
                "be checked; export a copy in float32, copy.deepcopy(model).float()"
            )
    gated = any(isinstance(m, Gate) for m in model.modules())  # to_plain may have to watch where their factors go
    plain = _copied(model)
    plain = to_plain(plain, map_tensors(Tensor.cpu, example_inputs) if gated else None).eval()
    args, kwargs = map_tensors(lambda t: t.detach().cpu(), (args, kwargs))
    program = _program(plain, args, kwargs, dynamic_batch)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / path.name
        if format == "onnx":
            made_opset, inputs, outputs = _write_onnx(program, file, args, kwargs, dynamic_batch, opset)
        else:
            made_opset, (inputs, outputs) = None, _write_archive(program, file)
        difference = eager_difference = None
        if check:
            run = _read_onnx(file) if format == "onnx" else _read_archive(file)
            difference, eager_difference = _compared(model, run, args, kwargs, dynamic_batch)
        parts = sorted(Path(folder).iterdir(), key=lambda part: part == file)  # the weights before what refers to them
        size = sum(part.stat().st_size for part in parts)
        for part in parts:
            os.replace(part, path.parent / part.name)
    return ExportReport(path, format, made_opset, inputs, outputs, size, difference, eager_difference)


# --- arguments ---------------------------------------------------------------------------------------------------


def _format(path: Path, format: str | None, opset: int | None) -> str:
    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    if format is not None and format not in FORMATS:
        raise ValueError(f"export: unknown format {format!r}{did_you_mean(format, FORMATS)}")
    if by_suffix.get(path.suffix) != (format or by_suffix.get(path.suffix, "")):
        suffixes = repr(FORMATS[format]) if format else " or ".join(map(repr, by_suffix))
        raise ValueError(f"export: expected a path that ends in {suffixes}, got {str(path)!r}")
    if opset is not None and path.suffix != ".onnx":
        raise ValueError(f"export: opset is ONNX's; leave it out for {path.suffix}, got {opset}")
    if not path.parent.is_dir():
        raise ValueError(f"export: expected a path in an existing folder, got {str(path)!r}")
    return by_suffix[path.suffix]


def _arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments, the latter in the order of ``forward``, which exported files take them in."""
    if not any(t.dim() for t in leaves(example_inputs)):
        raise ValueError(f"export: expected example_inputs with tensors, got {type(example_inputs).__name__}")
    if isinstance(example_inputs, dict):
        order = list(inspect.signature(model.forward).parameters)
        by_order = sorted(example_inputs, key=lambda name: order.index(name) if name in order else len(order))
        return (), {name: example_inputs[name] for name in by_order}
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {}


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).cpu()
    except Exception as e:
        raise ExportError(f"export: expected a model that copy.deepcopy can copy, {_first_line(e)}") from e


def _expect_packages(*names: str) -> None:
    missing = [name for name in names if not find_spec(name)]
    if missing:
        raise ExportError(f"export: {' and '.join(missing)} not installed; pip install 'fastprune[export]'")


def _listed(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _batch(args: tuple, kwargs: dict[str, Any]) -> int:
    return next(t.shape[0] for t in leaves((args, kwargs)) if t.dim())


def _resized(value: Any, size: int, batch: int) -> Any:
    """Inputs whose dimension 0 of ``size`` has ``batch`` entries, repeated as often as it takes."""

    def resize(t: Tensor) -> Tensor:
        if not t.dim() or t.shape[0] != size:
            return t
        return t[torch.arange(batch) % size]

    return map_tensors(resize, value)


# --- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch.export and torch.onnx raise about their own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit\.script", DeprecationWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)  # channels_last weights
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
        yield


def _program(model: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic_batch: bool) -> Any:
    """The exported program.  ATen only: ops of ours that a forward calls itself run their eager definition."""
    size = _batch(args, kwargs)
    if dynamic_batch and size < 2:  # a size of 1 would be taken for a constant
        args, kwargs = _resized((args, kwargs), size, 2)
    try:
        with _quiet(), backends.force("eager"):
            shapes = _dynamic(args, kwargs, torch.export.Dim(_BATCH)) if dynamic_batch else None
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as e:
        fixed = "; if its code fixes the batch size, pass dynamic_batch=False" if dynamic_batch else ""
        raise ExportError(f"export: torch.export fails, {_first_line(e)}{fixed}") from e
    ours = {str(n.target) for n in program.graph.nodes if getattr(n.target, "namespace", "") == "fastprune"}
    if ours:
        raise ExportError(f"export: the program still calls {', '.join(sorted(ours))}, which needs fastprune to run")
    return program


def _dynamic(args: tuple, kwargs: dict[str, Any], dim: Any) -> tuple | dict[str, Any]:
    """``dim`` for each dimension that is the batch, in the structure of the arguments."""
    size = _batch(args, kwargs)
    return map_tensors(lambda t: {0: dim} if t.dim() and t.shape[0] == size else {}, kwargs or args)


def _write_archive(program: Any, file: Path) -> tuple[dict, dict]:
    try:
        with _quiet():
            torch.export.save(program, file)
    except Exception as e:
        raise ExportError(f"export: torch.export cannot write the program, {_first_line(e)}") from e
    of = {n.name: n.meta.get("val") for n in program.graph.nodes}
    signature = program.graph_signature

    def shapes(names: tuple[str, ...]) -> dict[str, tuple[int | str, ...]]:
        return {n: _shape(of[n].shape) for n in names if isinstance(of.get(n), Tensor)}

    return shapes(signature.user_inputs), shapes(signature.user_outputs)


def _write_onnx(
    program: Any, file: Path, args: tuple, kwargs: dict[str, Any], dynamic_batch: bool, opset: int | None
) -> tuple[int, dict, dict]:
    try:
        with _quiet():
            shapes = _dynamic(args, kwargs, _BATCH) if dynamic_batch else None
            made = torch.onnx.export(
                program, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False,
                output_names=_output_names(program),
            )  # fmt: skip
            weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
            made.save(str(file), external_data=weights > _ONE_FILE)
    except Exception as e:
        raise ExportError(f"export: torch.onnx fails, {_first_line(e)}") from e
    version = made.model.opset_imports[""]
    if opset not in (None, version):
        raise ExportError(f"export: torch.onnx cannot write opset {opset} for this model, it made {version}")
    inputs, outputs = (
        {v.name: _shape(v.shape) for v in values} for values in (made.model.graph.inputs, made.model.graph.outputs)
    )
    return version, inputs, outputs


def _output_names(program: Any) -> list[str] | None:
    """The keys of a model that returns a dict of tensors; None: whatever the exporter calls them."""
    spec, signature = program.call_spec.out_spec, program.graph_signature
    named = spec.unflatten(range(spec.num_leaves))
    if not isinstance(named, dict) or not all(isinstance(value, int) for value in named.values()):
        return None
    free = all(isinstance(key, str) and key not in signature.user_inputs for key in named)
    return list(named) if free and all(isinstance(name, str) for name in signature.user_outputs) else None


def _shape(sizes: Any) -> tuple[int | str, ...]:
    return tuple(n if isinstance(n, int) else _BATCH if str(n).isidentifier() else str(n) for n in sizes)


def _first_line(e: Exception) -> str:
    text = (str(e).strip() or type(e).__name__).splitlines()[0]
    return f"{type(e).__name__}: {text}" if text != type(e).__name__ else text


# --- reading back ------------------------------------------------------------------------------------------------

_Run = Callable[[tuple, dict[str, Any]], list[Tensor]]


def _read_archive(file: Path) -> _Run:
    try:
        with _quiet():
            module = torch.export.load(file).module()
    except Exception as e:
        raise ExportError(f"export: torch.export cannot read the file, {_first_line(e)}") from e
    return lambda args, kwargs: leaves(module(*args, **kwargs))


def _read_onnx(file: Path) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ExportError(f"export: onnxruntime cannot read the file, {_first_line(e)}") from e
    names = [value.name for value in session.get_inputs()]

    def run(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        given = [t.contiguous().numpy() for t in leaves((args, kwargs))]
        return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, given, strict=True)))]

    return run


@torch.no_grad()
def _compared(
    model: nn.Module, run: _Run, args: tuple, kwargs: dict[str, Any], dynamic_batch: bool
) -> tuple[float, float]:
    """Largest difference of the file and of eager from float64, over all inputs tried.

    Raises:
        ExportError: It does not run, or is not right.
    """
    eager = _copied(model).eval()  # not the plain one, which might be what is wrong
    exact = copy.deepcopy(eager).double()
    size, worst, worst_eager = _batch(args, kwargs), 0.0, 0.0
    sizes = [size, size, 1, size + 3] if dynamic_batch else [size, size]
    generator = torch.Generator().manual_seed(0)
    for i, batch in enumerate(sizes):
        some = _resized((args, kwargs), size, batch)
        if i:
            some = map_tensors(lambda t: _noise_like(t, generator), some)
        where = f"with a batch of {batch}"
        try:
            expected = leaves(_call(exact, map_tensors(lambda t: t.double() if t.is_floating_point() else t, some)))
        except Exception as e:
            raise ExportError(
                f"export: the check needs a model that runs in float64, {_first_line(e)}; check=False skips it"
            ) from e
        try:
            got = run(*some)
        except Exception as e:
            raise ExportError(f"export: the file does not run {where}, {_first_line(e)}") from e
        off, eager_off = distance(got, expected), distance(leaves(_call(eager, some)), expected)
        bound = max(TOLERANCE, TIMES_EAGER * eager_off)
        if not (math.isfinite(bound) and all(t.isfinite().all() for t in expected)):
            raise ExportError(f"export: the model's output is not finite {where}, so that a check would say nothing")
        if not off <= bound:
            raise ExportError(
                f"export: the file computes something else {where}: off by {off:.1e} of the largest output, "
                f"PyTorch eager by {eager_off:.1e}, at most {bound:.1e} is right"
            )
        worst, worst_eager = max(worst, off), max(worst_eager, eager_off)
    return worst, worst_eager


def _call(model: nn.Module, inputs: tuple[tuple, dict[str, Any]]) -> Any:
    args, kwargs = inputs
    return call(model, kwargs or args)


def _noise_like(t: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise with the mean and the spread of ``t``; whole numbers stay."""
    if not t.is_floating_point() or t.numel() < 2:
        return t
    spread, mean = torch.std_mean(t.double())
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
    return (noise * (spread if spread > 0 else 1) + mean).to(t.dtype)
