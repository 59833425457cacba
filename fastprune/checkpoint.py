"""A pruned network in one file that can do nothing but be read: safetensors with a JSON document.

The file is an ordinary ``.safetensors`` file, tensors by ``state_dict`` name.  The one entry of its metadata,
``fastprune``, is a JSON document, see docs/checkpoints.md: which indices are left of each tensor, how to build the
network before pruning, method, recipe, versions, and the SHA-256 of every tensor and of the document itself.

:func:`load` builds the unpruned network, checks each name, shape and dtype, cuts it as the file says and moves the
tensors in.  A name in the file is only ever looked up among the network's own tensors; nothing is imported, unpickled
or evaluated.  The hashes find damage; they are no signature: who can write the file can write hashes too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from itertools import pairwise, zip_longest
from numbers import Integral, Real
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune import models
from fastprune.errors import CheckpointError
from fastprune.nn import BatchNormAct2d, Gate, MaskedConv2d, SigmoidBatchNorm2d
from fastprune.nn.convert import convert_plain
from fastprune.surgery import NUMBER, Plan, first_shapes, keep_lists, number, shrink
from fastprune.version import __version__

FORMAT = 1
MOST_HEADER_BYTES = 1 << 24  # of names, shapes and the document; a pruned DenseNet-201 takes less than a tenth
MOST_BRACKETS = 1 << 18  # in the header: each costs some sixty times the memory of its text
MOST_ELEMENTS = 1 << 30  # of an unpruned network that is built because a file says so
MOST_DEPTH = 64  # of nested lists and dicts in recipe and extra

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
}
_DOCUMENT = {  # key -> type of its value; None: any JSON
    "format": int,
    "fastprune": str,
    "torch": str,
    "architecture": (dict, type(None)),
    "bounded": list,
    "tensors": dict,
    "shared": dict,
    "lists": list,
    "keep": dict,
    "numbers": dict,
    "method": None,
    "recipe": None,
    "extra": None,
}


class _Bad(Exception):
    """What is wrong with a file, without its name."""


# Writing --------------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    method: Any = None,
    recipe: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a network, pruned or not, to one ``.safetensors`` file that :func:`load` rebuilds it from.

    Parameters and persistent buffers are stored, tied ones once, with their memory format.  The file takes the place of
    an older one in one step, when it is complete and on the disk: a kill or a full disk leaves the old file.  A
    symbolic link is followed.

    Args:
        model: What :func:`fastprune.compact`, ``to_plain`` or ``fold`` left, or any other module.  Wrappers of
            ``torch.compile`` and data parallelism are looked through.  Not changed.
        path: Of the file; its folder must exist.
        method: The :class:`fastprune.methods.base.Method` that pruned it, to note its name, ratio or target, scope and
            options.
        recipe, extra: Whatever is to be known about the network: dicts of numbers, strings, None, lists and dicts.

    Raises:
        ValueError: The model has state that is no plain tensor, or an argument does not go into JSON.
        CheckpointError: The file cannot be written; an older one is still whole.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"save: expected an nn.Module and a path, got {type(model).__name__} first")
    model = _unwrapped(model)
    tensors, shared = _tensors_of(model)
    kept, shapes = keep_lists(model), first_shapes(model)
    lists: dict[tuple[int, ...], int] = {}  # many tensors share one
    keep = {
        name: {
            "shape": list(shapes[name]),
            "dims": {str(d): lists.setdefault(_ranges(stays), len(lists)) for d, stays in dims.items()},
        }
        for name, dims in kept.items()
        if NUMBER not in dims
    }
    numbers = {
        name: {"value": shapes[name][0], "list": lists.setdefault(_ranges(dims[NUMBER]), len(lists))}
        for name, dims in kept.items()
        if NUMBER in dims
    }
    stored = {name: t.detach().resolve_conj().resolve_neg().cpu().contiguous() for name, t in tensors.items()}
    document = {
        "format": FORMAT,
        "fastprune": __version__,
        "torch": str(torch.__version__),
        "architecture": models.recorded(model),
        "bounded": _bounded(model),
        "tensors": {name: _described(t, stored[name]) for name, t in tensors.items()},
        "shared": shared,
        "lists": [list(ranges) for ranges in lists],
        "keep": keep,
        "numbers": numbers,
        "method": None if method is None else _json(about_method(method), "method"),
        "recipe": _json(recipe, "recipe"),
        "extra": _json(extra, "extra"),
    }
    body = json.dumps(document, separators=(",", ":"), allow_nan=False)
    text = f'{{"sha256":"{_sha256(body.encode())}",{body[1:]}'
    data = safetensors.save(stored, {"fastprune": text})
    header = int.from_bytes(data[:8], "little")
    if header > MOST_HEADER_BYTES or _brackets(data[8 : 8 + header]) > MOST_BRACKETS:
        raise ValueError(f"save: expected recipe and extra to be small, got a header of {header} bytes; shorten them")
    _replace(os.path.realpath(path), data)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's
            model = model._orig_mod
        else:
            return model


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and persistent buffers by name, without those tied to another, and these: name -> that other."""
    named, persistent = _named(model)
    state = model.state_dict(keep_vars=True)
    if odd := [name for name in state.keys() ^ persistent if state.get(name) is not None or name in persistent]:
        raise ValueError(
            f"save: expected state_dict to be the model's parameters and buffers, got {min(odd)!r} besides"
        )
    tensors, shared, seen = {}, {}, {}
    for name in state:
        t = named[name]
        dense = not is_lazy(t) and type(t.data) is Tensor and t.layout == torch.strided and not t.is_meta
        if not dense or str(t.dtype)[6:] not in _DTYPES:
            raise ValueError(
                f"save: expected {name} to be a dense tensor of a common dtype, with data, got {type(t).__name__}, "
                f"{t.dtype}, {t.layout}, {t.device}"
            )
        key = (t.data_ptr(), t.device, t.shape, t.stride(), t.dtype) if t.numel() else id(t)
        if (first := seen.setdefault(key, name)) == name:
            tensors[name] = t
        else:
            shared[name] = first
    return tensors, shared


def _named(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Parameters and buffers under all of their names; the names of those that belong to the state."""
    named, persistent = {}, set()
    for path, m in model.named_modules(remove_duplicate=False):
        for leaf, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None:
                name = f"{path}.{leaf}" if path else leaf
                named[name] = t
                if leaf not in m._non_persistent_buffers_set:
                    persistent.add(name)
    return named, persistent


def _bounded(model: nn.Module) -> list[str]:
    """Norms whose weight is the logit of their scale: the same tensors mean another function there."""
    return [name for name, m in model.named_modules() if isinstance(m, BatchNormAct2d) and m.bound]


def _described(t: Tensor, stored: Tensor) -> dict[str, Any]:
    description = {"dtype": str(t.dtype)[6:], "shape": list(t.shape), "sha256": _sha256(_bytes_of(stored))}
    order = _memory_order(t)
    return description if order == sorted(order) else description | {"order": order}


def _memory_order(t: Tensor) -> list[int]:
    """The dimensions from slowest to fastest; their own order where ``t`` is a part of another tensor, or expanded."""
    dims = list(range(t.dim()))
    usual = dims, dims[:1] + dims[2:] + dims[1:2]  # where sizes of 1 let several fit, one of these is meant
    by_stride = sorted(dims, key=lambda d: -t.stride(d))
    for order, least in (*((order, 0) for order in usual), (by_stride, 2)):
        strides = torch.empty_permuted(t.shape, order, device="meta").stride()
        if all(a == b or n < least for a, b, n in zip(strides, t.stride(), t.shape, strict=True)):
            return order
    return dims


def _bytes_of(t: Tensor) -> memoryview:
    return memoryview(t.reshape(-1).view(torch.uint8).numpy())


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _ranges(indices: Tensor) -> tuple[int, ...]:
    """Ascending indices as (start, stop, start, stop, ...)."""
    starts = torch.cat([indices.new_ones(1), indices.diff() != 1]).nonzero().squeeze(1)
    stops = torch.cat([starts[1:], starts.new_tensor([len(indices)])]) - 1
    return tuple(torch.stack([indices[starts], indices[stops] + 1], 1).flatten().tolist())


def about_method(method: Any) -> dict[str, Any]:
    """Name, ratio, scope, target and options of a method; options that are no JSON by the name of their type."""
    if not hasattr(method, "options"):
        raise ValueError(f"save: expected method to be what fastprune.create returned, got {method!r:.100}")
    about = {name: getattr(method, name) for name in ("name", "ratio", "scope")}
    about["target"] = None if method.budget is None else method.budget.target
    return about | {"options": {f.name: _option(getattr(method.options, f.name)) for f in fields(method.options)}}


def _option(value: Any) -> Any:
    """A value as JSON; what has none, such as data, a model or a loss, by its name or the name of its type."""
    try:
        return _json(value, "method")
    except ValueError:
        return repr(value) if isinstance(value, Real) else getattr(value, "__qualname__", type(value).__qualname__)


def _json(value: Any, where: str, depth: int = 0) -> Any:
    """``value`` as JSON gives it back.

    Raises:
        ValueError: It would come back as something else, or not at all.
    """
    if depth > MOST_DEPTH:
        raise ValueError(f"save: expected at most {MOST_DEPTH} nested lists and dicts, got more at {where}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and _is_text(value):
        return str(value)
    if isinstance(value, Integral) and abs(value) < 1 << 63:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_json(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and _is_text(key) for key in value):
        return {key: _json(v, f"{where}[{key!r}]", depth + 1) for key, v in value.items()}
    raise ValueError(f"save: expected None, finite numbers, strings, lists and dicts at {where}, got {value!r:.100}")


def _is_text(value: str) -> bool:
    return not re.search("[\ud800-\udfff]", value)


def _brackets(header: bytes) -> int:
    return header.count(b"[") + header.count(b"{")


def _replace(path: str, data: bytes) -> None:
    """Put a file with ``data`` at ``path``, whole or not at all."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    made = False
    try:
        if os.path.isdir(path):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.lexists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "no regular file")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        made = True
        with open(file, "wb") as out:
            if os.path.exists(path):
                os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        if made:
            with _ignored(OSError):
                os.unlink(temporary)
        if isinstance(e, OSError):
            raise CheckpointError(
                f"save: expected a file that can be written at {path}, got: {e.strerror}; nothing was changed there"
            ) from e
        raise
    with _ignored(OSError):  # the file is there; not every system lets a folder be flushed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# Reading --------------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The document of a checkpoint: all there is to know about it without building a network.  Tensors are not read.

    Returns: ``format``, ``fastprune``, ``torch`` (versions); ``architecture``, ``{"name", "arguments"}`` or None;
        ``bounded``, norms with scale sigmoid(weight); ``tensors``, name to ``{"dtype", "shape", "sha256"}``;
        ``shared``, name to the name of the tensor it is tied to; ``keep``, name to ``{"shape", "dims"}``: the shape
        before pruning and, by dimension, what is left as ``[start, stop, start, stop, ...]``; ``numbers``, of integers
        in modules that count channels, ``{"value", "keep"}`` likewise; ``method``, ``recipe``, ``extra``.

    Raises:
        CheckpointError: Missing, damaged, or no checkpoint of ours.
    """
    with _opened(path) as file:
        document = _Header(file).document
    lists = document.pop("lists")
    for cut in document["keep"].values():
        cut["dims"] = {int(dim): list(lists[i]) for dim, i in cut["dims"].items()}
    for cut in document["numbers"].values():
        cut["keep"] = list(lists[cut.pop("list")])
    return document


def load(
    path: str | os.PathLike,
    model_fn: Callable[[], nn.Module] | None = None,
    *,
    map_location: torch.device | str | None = "cpu",
    strict: bool = True,
) -> nn.Module:
    """Rebuild the network that :func:`save` wrote.

    Args:
        path: Of the file.  It is opened once; what is checked is what is loaded.
        model_fn: Returns the network as it was before ``compact``, with the conversions it had, for example
            ``lambda: fp.nn.convert_batchnorm(Net(), bound="sigmoid")`` or ``lambda: fp.fold(Net().eval(), x)``.
            None: as recorded by :func:`fastprune.models.create`, in the file's dtype, with its bounded norms and
            without those that were folded.
        map_location: Where the network goes; None: it stays where ``model_fn`` made it.
        strict: False: tensors that only the file or only the network has are left out, or left as they are; one warning
            names them.

    Returns: The network, in the mode that ``model_fn`` left it in.

    Raises:
        ValueError: ``model_fn`` makes no network, or ``map_location`` is no device.
        CheckpointError: The file is missing, damaged, foreign or of a newer format, or does not fit the network: one
            sentence says which.
    """
    try:
        device = None if map_location is None else torch.device(map_location)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"load: expected map_location to be a device such as 'cpu', got {map_location!r}") from error
    with _opened(path) as file:
        header = _Header(file)
        document = header.document
        if isinstance(model_fn, nn.Module):
            raise ValueError(
                f"load: expected model_fn to be a function that makes the network, got the network, a "
                f"{type(model_fn).__name__}; pass lambda: ..."
            )
        model = _recreated(document) if model_fn is None else model_fn()
        if not isinstance(model, nn.Module):
            raise ValueError(f"load: expected model_fn to return an nn.Module, got {type(model).__name__}")
        _fit_modules(model, document, may_rebind=model_fn is None)
        _fit_tensors(model, document, strict)
        stored = header.tensors()
    shrink(model, _plan(model, document), None)
    named, persistent = _named(model)
    for name in stored.keys() & persistent:
        new, t = stored.pop(name), named[name]
        order = document["tensors"][name].get("order", range(new.dim()))
        t.data = torch.empty_permuted(new.shape, tuple(order), dtype=new.dtype, device=t.device).copy_(new)
    for m in model.modules():
        if isinstance(m, MaskedConv2d):
            m._look_up()
    if document["architecture"] is not None:
        model._architecture = document["architecture"]
    return model if device is None else model.to(device)


@contextmanager
def _ignored(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors:
        pass


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """The file, open; what is found wrong with it inside gets its name."""
    try:
        # a pipe would block here for ever
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as e:
        raise CheckpointError(f"load: expected a checkpoint at {path}, got: {e.strerror}") from e
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _Bad("is no regular file; expected one written by fastprune.save")
        with open(handle, "rb", closefd=False) as file:
            yield file
    except _Bad as e:
        raise CheckpointError(f"load: {path} {e}") from e.__cause__
    finally:
        os.close(handle)


class _Header:
    """The part of a file before its tensors, checked."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, start = file, _bytes(file, 8)
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MOST_HEADER_BYTES, size - 8):
            if start[:4] == b"PK\x03\x04" or re.match(b"\x80[\x02-\x05]", start):
                raise _Bad("is a zip or pickle, as torch.save writes; expected a file that fastprune.save wrote")
            raise _Bad(f"is truncated or no checkpoint: a header of {length} bytes does not fit in, of {size} bytes")
        self.start = start + _bytes(file, length)
        self.rest = size - len(self.start)
        entries = _parse(self.start[8:])
        metadata = entries.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.keys() != {"fastprune"} or type(metadata["fastprune"]) is not str:
            raise _Bad("was not written by fastprune.save: there is no document of ours in it")
        self.document = _document(metadata["fastprune"])
        _check(self.document, entries, self.rest)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, compared with their hashes."""
        data = self.start + _bytes(self.file, self.rest + 1)
        if len(data) != len(self.start) + self.rest:
            raise _Bad("changed while it was read; try again when nothing writes to it")
        try:
            tensors = safetensors.load(data)
        except (SafetensorError, ValueError, KeyError, AssertionError, RuntimeError) as e:
            raise _Bad(f"is damaged: safetensors says {str(e).partition(chr(10))[0][:200]}") from e
        for name, about in self.document["tensors"].items():
            t = tensors[name]
            if t.dtype != _DTYPES[about["dtype"]] or list(t.shape) != about["shape"]:
                raise _Bad(f"is damaged: {name!r:.200} is not of the dtype and shape that its document says")
            _check_hash(_bytes_of(t), about["sha256"], f"tensor {name!r:.200}")
        return tensors


def _bytes(file: BinaryIO, count: int) -> bytes:
    try:
        return file.read(count)
    except OSError as e:
        raise _Bad(f"cannot be read: {e.strerror}") from e


def _parse(data: bytes | str) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN or half characters."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(parsed := dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return parsed

    def no_constant(name: str) -> None:
        raise ValueError(f"the constant {name}")

    if isinstance(data, bytes) and _brackets(data) > MOST_BRACKETS:
        raise _Bad("is no checkpoint: its header has more lists than any network")
    try:
        text = data.decode() if isinstance(data, bytes) else data
        parsed = json.loads(text, object_pairs_hook=distinct, parse_constant=no_constant)
        json.dumps(parsed, ensure_ascii=False).encode()  # half characters
    except (ValueError, RecursionError) as e:
        raise _Bad(f"is damaged or no checkpoint: its header is not JSON as we write it ({str(e)[:100]})") from None
    if not isinstance(parsed, dict):
        raise _Bad("is damaged or no checkpoint: its header is not a JSON object")
    return parsed


def _document(text: str) -> dict[str, Any]:
    document = _parse(text)
    version = document.get("format")
    if type(version) is int and version > FORMAT:
        raise _Bad(
            f"has format {version % 10**9}, and fastprune {__version__} reads up to format {FORMAT}; update fastprune"
        )
    parts = re.fullmatch(r'\{"sha256":"([0-9a-f]{64})",(.*)', text, re.DOTALL)
    if parts is None:
        raise _Bad("is damaged: its document does not begin with a SHA-256")
    _check_hash(("{" + parts[2]).encode(), parts[1], "its document")
    del document["sha256"]
    return document


def _check_hash(data: bytes | memoryview, expected: str, of: str) -> None:
    if _sha256(data) != expected:
        raise _Bad(f"is damaged: the SHA-256 of {of} is not the one it was written with")


def _check(document: dict[str, Any], entries: dict[str, Any], size: int) -> None:
    """Whether a document is one that :func:`save` could have written to a file with these entries and bytes of data."""
    _expect(document.keys() == _DOCUMENT.keys(), "has other keys than ours")
    for key, types in _DOCUMENT.items():
        _expect(types is None or isinstance(document[key], types), f"has no proper {key!r}")
    _expect(document["format"] == FORMAT and document["format"] is not True, "has no proper 'format'")
    tensors, shared, lists, keep, numbers = (document[k] for k in ("tensors", "shared", "lists", "keep", "numbers"))
    architecture = document["architecture"]
    if architecture is not None:
        _expect(architecture.keys() == {"name", "arguments"}, "has no proper 'architecture'")
        _expect(type(architecture["name"]) is str and type(architecture["arguments"]) is dict, "has no architecture")
    _expect(all(type(name) is str for name in document["bounded"]), "has no proper 'bounded'")

    _expect(tensors.keys() == entries.keys(), "names other tensors than the file has")
    total = 0
    for name, about in tensors.items():
        _expect(isinstance(about, dict) and about.keys() - {"order"} == {"dtype", "shape", "sha256"}, f"{name!r}: keys")
        _expect(type(about["dtype"]) is str and about["dtype"] in _DTYPES, f"{name!r}: dtype")
        _expect(_is_shape(about["shape"]), f"{name!r}: shape")
        _expect(isinstance(entries[name], dict) and entries[name].get("shape") == about["shape"], f"{name!r}: shape")
        _expect(type(about["sha256"]) is str, f"{name!r}: hash")
        if "order" in about:
            order = about["order"]
            _expect(_are_ints(order) and sorted(order) == list(range(len(about["shape"]))), f"{name!r}: order")
        total += math.prod(about["shape"]) * _DTYPES[about["dtype"]].itemsize
    if total != size:
        raise _Bad(f"is truncated or has something attached: expected {total} bytes of tensors, got {size}")
    for name, first in shared.items():
        _expect(type(first) is str and first in tensors and name not in tensors, f"{name!r}: shared")

    counts = []
    for ranges in lists:
        ascending = _are_ints(ranges) and all(a < b for a, b in pairwise(ranges))
        _expect(ascending and ranges and len(ranges) % 2 == 0, "has no proper 'lists'")
        counts.append(sum(ranges[1::2]) - sum(ranges[::2]))
    for name, cut in keep.items():
        _expect(isinstance(cut, dict) and cut.keys() == {"shape", "dims"}, f"keep {name!r}")
        shape, dims = cut["shape"], cut["dims"]
        _expect(_is_shape(shape) and isinstance(dims, dict), f"keep {name!r}")
        _expect(dims.keys() <= {str(d) for d in range(len(shape))}, f"keep {name!r}: dimensions")
        left = list(shape)
        for dim, i in dims.items():
            _expect(type(i) is int and 0 <= i < len(lists) and lists[i][-1] <= shape[int(dim)], f"keep {name!r}: lists")
            left[int(dim)] = counts[i]
        first = shared.get(name, name)  # a buffer that is no state has no tensor
        _expect(first not in tensors or tensors[first]["shape"] == left, f"keep {name!r}: shape")
    for name, cut in numbers.items():
        _expect(isinstance(cut, dict) and cut.keys() == {"value", "list"} and name not in keep, f"number {name!r}")
        _expect(_are_ints([*cut.values()]), f"number {name!r}")
        _expect(cut["list"] < len(lists) and lists[cut["list"]][-1] <= cut["value"], f"number {name!r}: lists")


def _expect(true: Any, what: str) -> None:
    if not true:
        raise _Bad(f"is damaged: its document is not as we write it ({what[:200]})")


def _are_ints(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _is_shape(values: Any) -> bool:
    return _are_ints(values) and len(values) <= MOST_DEPTH and math.prod(values) < 1 << 63


# Building -------------------------------------------------------------------------------------------------------------


def _recreated(document: dict[str, Any]) -> nn.Module:
    """The unpruned network by its recorded name and arguments."""
    architecture = document["architecture"]
    if architecture is None:
        raise _Bad("does not say how to build its network; pass model_fn, which returns it as before compact")
    name, arguments = architecture["name"], architecture["arguments"]
    if not models.registry.is_plain(arguments):
        raise _Bad("has arguments for its network that fastprune.save does not write; pass model_fn")
    shapes = {name: about["shape"] for name, about in document["tensors"].items()}
    shapes |= {name: cut["shape"] for name, cut in document["keep"].items()}
    elements = sum(map(math.prod, shapes.values()))
    if elements > MOST_ELEMENTS:
        raise _Bad(f"says that its network had {elements} elements, more than 2^30; pass model_fn if that is so")
    try:
        with torch.random.fork_rng(devices=()), _Allowance(4 * elements + (1 << 22), 100 * len(shapes) + 10_000):
            model = models.create(name, **arguments)
    except Exception as e:
        why = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
        raise _Bad(f"needs {name[:80]!r}, which cannot be built here as recorded ({why}); pass model_fn") from e
    dtypes = {_DTYPES[about["dtype"]] for about in document["tensors"].values()}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    _leave_out(model, document)
    return model.to(floating.pop()) if len(floating) == 1 else model


def _leave_out(model: nn.Module, document: dict[str, Any]) -> None:
    """Take out the norms and gates that the file has nothing of: ``to_plain`` and ``fold`` took them out of its network
    and gave the layers before them a bias."""
    stored = {*document["tensors"], *document["shared"]}
    for name, m in list(model.named_modules(remove_duplicate=False)):
        has_tensors = any(t is not None for t in (*m._parameters.values(), *m._buffers.values()))
        if isinstance(m, (_BatchNorm, Gate)) and has_tensors and not any(s.startswith(f"{name}.") for s in stored):
            rest = [child for child in m.children() if type(child) is not nn.Identity]  # timm's have their activation
            path, _, leaf = name.rpartition(".")
            rest = rest if len(rest) == 1 else [nn.Sequential(*rest) if rest else nn.Identity()]
            model.get_submodule(path)._modules[leaf] = rest[0]
        elif isinstance(m, (_ConvNd, nn.Linear)) and m.bias is None and f"{name}.bias" in stored:
            rows = m.out_features if isinstance(m, nn.Linear) else m.out_channels
            m.bias = nn.Parameter(torch.zeros(rows, dtype=m.weight.dtype))


class _Allowance(TorchDispatchMode):
    """Ends the making of a network that is larger than the file says, before its memory is taken."""

    def __init__(self, elements: int, calls: int) -> None:
        super().__init__()
        self.elements, self.most, self.calls = elements, elements, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [a.shape for a in args if isinstance(a, Tensor)]
        if not shapes:  # makes a new one
            sizes = [a if isinstance(a, (list, tuple)) else [a] for a in args]
            self.elements -= max((math.prod(a) for a in sizes if all(isinstance(n, Real) for n in a)), default=0)
        elif len(shapes) > 1 and math.prod(map(max, zip_longest(*(s[::-1] for s in shapes), fillvalue=1))) > self.most:
            self.elements = -1  # by broadcasting
        self.calls -= 1
        if self.elements < 0 or self.calls < 0:
            raise MemoryError("it is larger than the file says")
        return func(*args, **(kwargs or {}))


def _fit_modules(model: nn.Module, document: dict[str, Any], may_rebind: bool) -> None:
    """Have the same norms bounded as the file, and shifts and masks where it has some.

    With ``model_fn`` a difference is an error: it would change the function without a trace in names or shapes.
    """
    modules, bounded, stored = dict(model.named_modules()), set(document["bounded"]), document["tensors"]
    for name in sorted(bounded ^ set(_bounded(model))):
        m = modules.get(name)
        if not may_rebind or getattr(m, "weight", None) is None or not convert_plain(m):
            scales = ["sigmoid(weight)", "weight"]
            here, there = scales if name in bounded else scales[::-1]
            raise _Bad(
                f"has a norm {name!r:.200} with scale {here}, and the network {there if m is not None else 'none'}; "
                "model_fn must return the network with its conversions, such as convert_batchnorm(net, bound='sigmoid')"
            )
        if name in bounded:
            m.__class__, m.bias = SigmoidBatchNorm2d, None
        else:
            m.__class__ = nn.BatchNorm2d
            vars(m).pop("bound", None)
            m.bias = nn.Parameter(torch.zeros_like(m.weight))
    for name, m in modules.items():  # masks that are set are part of the state
        if isinstance(m, MaskedConv2d):
            masks = {"in_mask": (m.in_channels,), "out_mask": (m.out_channels,), "weight_mask": m.weight.shape}
            for leaf, shape in masks.items():
                if m._buffers[leaf] is None and (f"{name}.{leaf}" if name else leaf) in stored:
                    m._buffers[leaf] = torch.zeros(shape, dtype=torch.bool, device=m.weight.device)
    for name in bounded:  # a trained shift survives the conversion, a fresh network has none
        if modules[name].bias is None and f"{name}.bias" in stored:
            modules[name].bias = nn.Parameter(torch.zeros_like(modules[name].weight))


def _fit_tensors(model: nn.Module, document: dict[str, Any], strict: bool) -> None:
    """Compare names, ties, shapes and dtypes of the unpruned network with the file's; tie what the file has tied."""
    named, persistent = _named(model)
    stored, shared, keep = document["tensors"], document["shared"], document["keep"]
    wrong, lone, owner = [], [], {}
    for name in [*stored, *shared, *(name for name in keep if name not in stored and name not in shared)]:
        first = shared.get(name, name)
        if name not in named or (name not in persistent and first in stored):
            lone.append(f"{name!r:.200} is only in the file")
            continue
        t, about = named[name], stored.get(first)
        shape, dtype = tuple((keep.get(name) or keep.get(first) or about)["shape"]), about and _DTYPES[about["dtype"]]
        if tuple(t.shape) != shape or t.dtype != (dtype or t.dtype) or t.is_meta:
            got = f"{t.dtype} {tuple(t.shape)}" + (" without data" if t.is_meta else "")
            wrong.append(f"expected {name!r:.200} to be {dtype or t.dtype} {shape}, got {got}")
        elif owner.setdefault(id(t), first) != first:
            wrong.append(f"{name!r:.200} and {owner[id(t)]!r:.200} are one tensor in the network and two in the file")
    for name, cut in document["numbers"].items():
        if (got := number(model, name)) != cut["value"]:
            wrong.append(
                f"expected the number {name!r:.200} to be {cut['value']}, got {'no integer' if got is None else got}"
            )
    lone += [f"{name!r:.200} is only in the network" for name in named if name in persistent - {*stored, *shared}]
    if wrong := (wrong + lone if strict else wrong):
        more = f", and {len(wrong) - 1} more differ" if wrong[1:] else ""
        raise _Bad(
            f"does not fit the network: {wrong[0]}{more}; "
            "model_fn must return the network as it was before compact, with its conversions"
        )
    if lone:
        warnings.warn(f"load: {lone[0]}" + (f", and {len(lone) - 1} more differ" if lone[1:] else ""), stacklevel=3)
    for name, first in shared.items():
        if name in named and first in named and named[name] is not named[first]:
            path, _, leaf = name.rpartition(".")
            m = model.get_submodule(path)
            (m._parameters if leaf in m._parameters else m._buffers)[leaf] = named[first]


def _plan(model: nn.Module, document: dict[str, Any]) -> Plan:
    """The indices that stay, under the names that ``named_parameters`` and ``named_buffers`` give."""
    named, names = _named(model)[0], {}
    for name, t in named.items():
        names.setdefault(id(t), name)

    @cache  # many tensors share a list
    def indices(i: int) -> Tensor:
        ranges = document["lists"][i]
        return torch.cat([torch.arange(a, b) for a, b in zip(ranges[::2], ranges[1::2], strict=True)])

    tensors = {
        names[id(named[name])]: {int(dim): indices(i) for dim, i in cut["dims"].items()}
        for name, cut in document["keep"].items()
        if name in named
    }
    return tensors | {name: {NUMBER: indices(cut["list"])} for name, cut in document["numbers"].items()}
