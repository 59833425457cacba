"""Damaged and forged checkpoints: each must end in one clear error, or in the network that was saved.

    python -m bench.fuzz_checkpoints                # 10,000 files, about a minute; writes docs/results/checkpoints.md
    python -m bench.fuzz_checkpoints --cases 500 --seed 3 --no-timm --out -

The files are loaded in a child process in which, once it is warm, an audit hook forbids imports, compiling, executing,
starting programs, the network and opening anything but the file itself for reading; the address space may grow by
512 MiB, and a case may take ten seconds.  A case that breaks this is written out, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

import fastprune as fp
from fastprune.graph import trace
from fastprune.surgery import keep_lists

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 512 << 20  # bytes of address space on top of the warm process
SECONDS = 10  # of wall-clock time per file
OUTCOMES = ("refused", "as saved", "as edited")
FORBIDDEN = re.compile(
    r"import$|compile$|exec$|code\.__new__|marshal\.|pickle\.|subprocess\.|socket\.|ctypes\.|shutil\.|tempfile\.|urllib\."
    r"|os\.(?!listdir|scandir|getxattr|listxattr|stat|fstat)"
)

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Sample(NamedTuple):
    """A good file, and what it holds."""

    data: bytes
    model_fn: Callable[[], nn.Module] | None
    model: nn.Module


class Case(NamedTuple):
    kind: str
    sample: str
    data: bytes
    edited: bool  # with right hashes again: the document may then say something else than what was saved


# Good files -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Small, with tied weights, a depthwise convolution, integers, and a buffer that is cut but is no state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.register_buffer("shift", torch.linspace(0, 1, 6).view(6, 1, 1), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.fc, self.twin = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.twin.weight = self.fc.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.depthwise(self.norm(self.conv(x))) + self.shift).mean((2, 3))
        return self.fc(x) + self.twin(x.relu())


class Splits(nn.Module):
    """Its code reads numbers of channels from the module, which are cut along with its tensors."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.width, self.parts = 6, [8, 4]
        self.a, self.b = nn.Conv2d(channels, 12, 3), nn.Conv2d(12, 12, 1)
        self.c, self.d, self.out = nn.Conv2d(6, 9, 3), nn.Conv2d(8, 9, 3), nn.Conv2d(9, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(self.a(x), self.width, 1)
        third, _ = torch.split(self.b(torch.cat([first.relu(), second], 1)), self.parts, 1)
        return self.out(self.c(first) + self.d(third)).mean((2, 3))


def bounded() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 5, 3), fp.nn.SigmoidBatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 3)).double()


def samples(folder: Path) -> dict[str, Sample]:
    """Pruned by name, pruned by ``model_fn`` in channels-last format, and never pruned."""
    torch.manual_seed(0)
    lenet = fp.models.create("lenet-taylor", num_classes=3, in_channels=1, image_size=16, widths=[4, 6, 10])
    made = {
        "by name": (lenet, None),
        "model_fn": (Tied(), Tied),
        "numbers": (Splits(), Splits),
        "whole": (bounded(), bounded),
    }
    for name, (model, _) in made.items():
        if name != "whole":
            x = torch.randn(2, 1, 16, 16)
            graph = trace(model, x)
            fp.compact(model, {group: torch.arange(g.size) % 3 != 1 for group, g in graph.groups.items()}, x)
    made["model_fn"][0].to(memory_format=torch.channels_last)
    done = {}
    for name, (model, model_fn) in made.items():
        fp.save(model, folder / "good", recipe={"lr": [0.1, 1e-3], "note": 'quote " and \u00e9'}, extra={"n": 1})
        done[name] = Sample((folder / "good").read_bytes(), model_fn, model)
    (folder / "good").unlink()
    return done


# Bad files ------------------------------------------------------------------------------------------------------------

DEEP = "@@deep@@"
WILD = [
    *(0, -1, 1, 2, 7, 2**31, 2**48, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), None, True),
    *(
        "",
        "x",
        "0",
        "../../x",
        "/dev/zero",
        "__class__",
        "conv.__init__.__globals__",
        "\ud800",
        "a" * 10_000,
        "float32",
    ),
    *([], {}, [[]], [0, 1], [1, 0], [0, 10**9], [10**9, 0], [-1, 2], [[1]] * 1000, {"a": {"a": {}}}, DEEP),
]
KEYS = ["x", "0", "1", "..", "__class__", "__dict__.x", "conv.weight.data", "", "\ud800", "0.weight", "fc.weight"]
KEYS += ["parts[1]", "parts[x]", "width", "a.groups", "training", "conv.stride[0]"]


class Parts:
    """A file taken apart into its document, its entries of tensors, and their bytes."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self.entries = json.loads(data[8 : 8 + length])
        self.document = json.loads(self.entries.pop("__metadata__")["fastprune"])
        self.hash = self.document.pop("sha256")
        self.data = data[8 + length :]

    def joined(self, *, right_hash: bool) -> bytes:
        body = _dumps(self.document)
        digest = hashlib.sha256(body.encode()).hexdigest() if right_hash else self.hash
        header = _dumps({"__metadata__": {"fastprune": f'{{"sha256":"{digest}",{body[1:]}'}, **self.entries}).encode()
        return len(header).to_bytes(8, "little") + header + self.data


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)


def _edit(rng: random.Random, root: Any) -> None:
    """Change one random place of a JSON value."""
    node = root
    while True:
        inside = list(node.values() if isinstance(node, dict) else node)
        inside = [v for v in inside if isinstance(v, (dict, list)) and v]
        if not inside or rng.random() < 0.3:
            break
        node = rng.choice(inside)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key, what = rng.choice(keys), rng.randrange(6)
    if what == 0:
        del node[key]
    elif what == 1:
        other = rng.choice(keys)
        node[key], node[other] = node[other], node[key]
    elif what == 2 and isinstance(node, dict):
        node[rng.choice(KEYS)] = node.pop(key)
    elif what == 3:
        value = copy.deepcopy(node[key])
        node.update({rng.choice(KEYS): value}) if isinstance(node, dict) else node.insert(rng.choice(keys), value)
    elif what == 4 and type(node[key]) is int:
        node[key] += rng.choice([-2, -1, 1, 2, 10**9])
    else:
        node[key] = copy.deepcopy(rng.choice(WILD))


def _bits(rng: random.Random, data: bytes, _: Any) -> bytes:
    """One to three flipped bits, half of the time in the header."""
    out = bytearray(data)
    end = 8 + int.from_bytes(data[:8], "little") if rng.random() < 0.5 else len(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        out[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _runs(rng: random.Random, data: bytes, _: Any) -> bytes:
    start, length = rng.randrange(len(data)), rng.randint(1, 64)
    run = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length, b'"' * length, data[:length]])
    return data[:start] + run + data[start + length :]


def _shorter(rng: random.Random, data: bytes, _: Any) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + (data[start + rng.randint(1, 64) :] if rng.random() < 0.5 else b"")


def _longer(rng: random.Random, data: bytes, _: Any) -> bytes:
    start = rng.choice([0, 8, len(data), rng.randrange(len(data))])
    return data[:start] + rng.randbytes(rng.randint(1, 64)) + data[start:]


def _header_length(rng: random.Random, data: bytes, _: Any) -> bytes:
    length = int.from_bytes(data[:8], "little")
    wild = [0, 1, 2**24, 2**24 + 1, 2**31, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8, len(data) - 7]
    new = rng.choice([*wild, length + rng.randint(-9, 9), rng.randrange(len(data)), rng.randrange(2**64)])
    return (max(new, 0) % 2**64).to_bytes(8, "little") + data[8:]


def _text(rng: random.Random, data: bytes, _: Any) -> bytes:
    """The header as text: keys twice, words in other places, its length right."""
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode()
    tokens = [m.span() for m in re.finditer(r'\\*"[^"\\]*\\*"|-?\d+|[][{},:]', text)]
    (a, b), (c, d) = rng.choice(tokens), rng.choice(tokens)
    new = rng.choice(['"__metadata__":{},', "NaN", "-1", "1e999", "{", "]", " ", text[c:d], text[c:d] + ",", "\\ud800"])
    text = text[:a] + new + text[rng.choice([a, b]) :]
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + length :]


def _document(rng: random.Random, data: bytes, right_hash: bool = False) -> bytes:
    parts = Parts(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        _edit(rng, parts.document)
    return parts.joined(right_hash=right_hash)


def _entries(rng: random.Random, data: bytes, right_hash: bool = False) -> bytes:
    parts = Parts(data)
    _edit(rng, parts.entries)
    return parts.joined(right_hash=right_hash)


def _swaps(rng: random.Random, data: bytes, _: Any) -> bytes:
    """Tensors take each other's place, dtype or bytes."""
    parts = Parts(data)
    a, b = rng.sample(sorted(parts.entries), 2)
    what = rng.choice(["all", "data_offsets", "dtype", "bytes"])
    if what == "all":
        parts.entries[a], parts.entries[b] = parts.entries[b], parts.entries[a]
    elif what == "bytes":
        (i, j), (k, m) = sorted(parts.entries[name]["data_offsets"] for name in (a, b))
        raw = parts.data
        parts.data = raw[:i] + raw[k:m] + raw[j:k] + raw[i:j] + raw[m:]
    else:
        parts.entries[a][what], parts.entries[b][what] = parts.entries[b][what], parts.entries[a][what]
    return parts.joined(right_hash=True)


def _offsets(rng: random.Random, data: bytes, _: Any) -> bytes:
    """Tensors that overlap, leave gaps, or lie outside."""
    parts = Parts(data)
    offsets = parts.entries[rng.choice(sorted(parts.entries))]["data_offsets"]
    by = rng.choice([-8, -4, -1, 1, 4, 8, len(parts.data), -len(parts.data), 2**63, 2**64])
    for i in rng.choice([[0], [1], [0, 1]]):
        offsets[i] += by
    return parts.joined(right_hash=True)


def _both(rng: random.Random, data: bytes, right_hash: bool = False) -> bytes:
    """Lies that header and document agree on: names, shapes of no elements, dtypes, ties, lists, networks."""
    parts = Parts(data)
    d = parts.document
    name = rng.choice(sorted(d["tensors"]))
    what = rng.randrange(9)
    if what == 0:
        new = rng.choice([*KEYS, "../../etc/passwd", "conv.__class__", "forward", "fc.weight.grad", "training"])
        d["tensors"][new], parts.entries[new] = d["tensors"].pop(name), parts.entries.pop(name)
    elif what == 1:
        shape = rng.choice([[10**9, 0], [0, 2**40], [1] * 40, [2**47, 2**47, 0], [10**9], []])
        for about in (d["tensors"][name], parts.entries[name]):
            about["shape"] = shape
    elif what == 2:
        d["tensors"][name]["dtype"] = rng.choice(["int32", "float16", "bool", "complex64", "uint8"])
        parts.entries[name]["dtype"] = rng.choice(["I32", "F16", "BOOL", "C64", "U8", "F4", "I4"])
    elif what == 3:
        d["shared"][rng.choice([*KEYS, "twin.weight", *d["tensors"]])] = name
    elif what == 4 and d["keep"]:
        cut = d["keep"][rng.choice(sorted(d["keep"]))]
        dim = rng.choice(sorted(cut["dims"]))
        ranges = d["lists"][cut["dims"][dim]] = list(d["lists"][cut["dims"][dim]])
        left, big = sum(ranges[1::2]) - sum(ranges[::2]), rng.choice([left_ := 10**9, 2**40, 2**47 - 1, 20])
        d["lists"][cut["dims"][dim]] = rng.choice([[0, left], [big - left, big], [0, big], [1, 1 + left]])
        cut["shape"][int(dim)] = rng.choice([big, left_, cut["shape"][int(dim)]])
    elif what == 5:
        d["lists"] += rng.choice([[[0, 2**47]], [[0, 10**9]] * 50, [list(range(50_000))]])
        d["keep"][rng.choice(["shift", "norm.num_batches_tracked", "x"])] = {"shape": [10**9], "dims": {"0": 0}}
    elif what == 6:
        attributes = ["conv.groups", "conv.stride[0]", "training", "conv._parameters", "x.y", "parts[0]", "__class__"]
        attributes += ["parts[9]", "width", "a._version", "gate1.num_features", "conv1.padding[1]", "fc.out_features"]
        value = rng.choice([1, 2, 3, 8, 10**9, 2**47])
        d["lists"].append(rng.choice([[0, 1], [0, value], [1, 2]]))
        d["numbers"][rng.choice(attributes)] = {"value": value, "list": rng.choice([len(d["lists"]) - 1, 10**6])}
    elif what == 7:
        names = ["resnet152", "vit_h_14", "wrn-40-2", "vgg16-rni", "mlp", "hf-hub:a/b", "os.system", "local-dir:/etc"]
        arguments = rng.choice([
            *({}, {"num_classes": 2**40}, {"num_classes": 10**9}, {"depth": 6 * 10**8 + 4}, {"width": 1e7}),
            *({"checkpoint_path": "/dev/zero"}, {"pretrained": True}, {"weights": "DEFAULT"}, {"cache_dir": "x"}),
            *({"norm_layer": "os.system"}, {"widths": [2**30, 2, 2]}, {"widths": [1] * 10**5}, {"image_size": 10**7}),
        ])  # fmt: skip
        d["architecture"] = {"name": rng.choice(names), "arguments": arguments}
    else:
        lenet = {"num_classes": 3, "in_channels": 1, "image_size": 16, "widths": [4, 6, 10]}
        lenet[rng.choice(sorted(lenet))] = rng.choice(WILD)
        d["architecture"] = {"name": "lenet-taylor", "arguments": lenet}
    return parts.joined(right_hash=right_hash)


def _joined(rng: random.Random, data: bytes, _: Any) -> bytes:
    """Two files after one another, or the header of one with the tensors of the other."""
    other = rng.choice(_ALL)
    end, its_end = (8 + int.from_bytes(d[:8], "little") for d in (data, other))
    return rng.choice([
        *(data + other, data[:end] + other[its_end:], other[:its_end] + data[end:], data[:8] + other[8:]),
        *(data[:end] + other[8:], data + data, data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]),
    ])  # fmt: skip


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def _foreign(rng: random.Random, data: bytes, _: Any) -> bytes:
    """Other formats, and headers that are large, deep or empty."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(3), "r": _Runs()}, zipped)
    torch.save({"w": torch.ones(3), "r": _Runs()}, legacy, _use_new_zipfile_serialization=False)

    def header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    large = rng.choice(
        [b"[" * 2**20, b'{"a":' * 2**18, b" " * 2**20, b'{"a":[' + b"[]," * 2**19 + b"[]]}", b"9" * 2**16]
    )
    tensor = rng.choice([b"[1000000000]", b"[10,10]", b"[-1]", b"[18446744073709551615,2]", b'["a"]', b"[1e3]"])
    return rng.choice([
        *(b"", b"\0", bytes(8), bytes(4096), rng.randbytes(rng.randrange(1, 4096))),
        *(zipped.getvalue(), legacy.getvalue(), b"<html></html>"),
        *(pickle.dumps(_Runs(), protocol=protocol) for protocol in range(6)),
        *(b"GIF89a" + bytes(99), b"\x1f\x8b\x08" + rng.randbytes(99), b"PK\x03\x04" + rng.randbytes(99)),
        *(to_safetensors({"w": torch.ones(3)}), to_safetensors({"w": torch.ones(3)}, {"fastprune": "{}"})),
        *(to_safetensors({"w": torch.ones(3)}, {"format": "pt"}), to_safetensors({}, {"fastprune": '{"format":1}'})),
        *(header(b"{}"), header(b"null"), header(b"[]"), header(b'{"__metadata__":null}'), header(large)),
        header(b'{"w":{"dtype":"F32","shape":' + tensor + b',"data_offsets":[0,4]}}') + bytes(4),
    ])  # fmt: skip


KINDS: dict[str, tuple[Callable[..., bytes], bool]] = {  # how, and whether the hash of the document is made right
    "flipped bits": (_bits, False),
    "overwritten bytes": (_runs, False),
    "truncated, bytes left out": (_shorter, False),
    "bytes put in": (_longer, False),
    "length of the header": (_header_length, False),
    "header as text": (_text, False),
    "document": (_document, False),
    "document, hash made right": (_document, True),
    "entries of tensors": (_entries, True),
    "tensors exchanged": (_swaps, True),
    "offsets": (_offsets, True),
    "header and document in agreement": (_both, True),
    "two files in one": (_joined, False),
    "foreign files": (_foreign, False),
}
_ALL: list[bytes] = []


def cases(files: dict[str, Sample], count: int, seed: int) -> Iterator[Case]:
    """``count`` files, the same for the same seed."""
    _ALL[:] = [sample.data for sample in files.values()]
    kinds, names = list(KINDS), list(files)
    for i in range(count):
        rng = random.Random(f"{seed}/{i}")
        kind, name = kinds[i % len(kinds)], names[i // len(kinds) % len(names)]
        make, right_hash = KINDS[kind]
        good = bad = files[name].data
        while bad == good:
            bad = make(rng, good, right_hash)
        yield Case(kind, name, bad, right_hash)


# Loading them ---------------------------------------------------------------------------------------------------------


class _Guard:
    """While it is on, whatever loading a file must not do raises."""

    def __init__(self, path: Path) -> None:
        self.on, self.path, self.broken = False, str(path), ""
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.on:
            opens = event == "open" and ((str(args[0]) != self.path and type(args[0]) is not int) or args[2] & WRITES)
            if opens or FORBIDDEN.match(event):
                self.broken = f"{event} {args!r:.200}"
                raise AssertionError(self.broken)


def outcome(path: Path, sample: Sample, edited: bool) -> str:
    """One of :data:`OUTCOMES`, or what went wrong."""
    try:
        model = fp.load(path, sample.model_fn)
    except fp.CheckpointError as e:
        text = str(e)
        if "\n" in text or len(text) > 1000 or re.search("allocat|bad_alloc", text):
            return f"an error that is not clear: {text[:300]}"
        return "refused"
    except BaseException as e:
        return f"{type(e).__name__}: {str(e)[:300]}"
    state, was = model.state_dict(), sample.model.state_dict()
    if state.keys() != was.keys() or not all(
        t.dtype == was[name].dtype and torch.equal(t, was[name]) for name, t in state.items()
    ):
        return "another network"
    kept, before = keep_lists(model), keep_lists(sample.model)
    same = str(model) == str(sample.model) and kept.keys() == before.keys()
    same = same and all(
        dims.keys() == before[name].keys() and all(torch.equal(stays, before[name][dim]) for dim, stays in dims.items())
        for name, dims in kept.items()
    )
    same = same and vars(model).get("parts") == vars(sample.model).get("parts")
    same = same and all(t.stride() == was[name].stride() for name, t in state.items())
    return "as saved" if same else "as edited" if edited else "other cuts"


def child(count: int, seed: int) -> int:
    """Load all files; print counts by kind and outcome as JSON."""
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case"
        files = samples(Path(folder))
        for sample in files.values():  # warm: all that is ever imported is
            path.write_bytes(sample.data)
            assert outcome(path, sample, False) == "as saved"
            fp.checkpoint.read(path)
        for name in ("no such network", "resnet18"):
            parts = Parts(files["by name"].data)
            parts.document["architecture"]["name"] = name
            path.write_bytes(parts.joined(right_hash=True))
            assert outcome(path, files["by name"], True) == "refused"
        guard = _Guard(path)
        vm_size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (vm_size + MEMORY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"over {SECONDS} s")))
        counts, slowest, bad = {kind: Counter() for kind in KINDS}, (0.0, 0, ""), []
        for i, case in enumerate(cases(files, count, seed)):
            path.write_bytes(case.data)
            print(i, file=sys.stderr)  # where it was, if it dies
            signal.alarm(SECONDS)
            start, guard.on, guard.broken = time.process_time(), True, ""
            result = outcome(path, files[case.sample], case.edited)
            guard.on = False
            signal.alarm(0)
            slowest = max(slowest, (time.process_time() - start, i, case.kind))
            if guard.broken:
                result = f"forbidden: {guard.broken}"
            if path.read_bytes() != case.data or os.listdir(folder) != ["case"]:
                result = f"files changed: {os.listdir(folder)}"
            counts[case.kind][result if result in OUTCOMES else "wrong"] += 1
            if result not in OUTCOMES:
                bad.append((i, case.kind, case.sample, result))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    json.dump({"counts": counts, "slowest": slowest, "bad": bad, "vm_size": vm_size, "peak": peak}, sys.stdout)
    return 0


def page(result: dict[str, Any], count: int, seed: int) -> str:
    lines = [
        "# Damaged and forged checkpoints",
        "",
        f"Written by `python -m bench.fuzz_checkpoints`: {count:,} files made from four good ones (pruned, "
        "built by name; pruned, for `model_fn`, with tied weights and with numbers in modules; never pruned), "
        f"seed {seed}, torch {torch.__version__}.",
        "",
        "- Refused: one `CheckpointError` of one line.",
        "- As saved: the network that was saved, bit for bit, such as after a space that JSON does not mind.",
        "- As edited: its tensors, bit for bit, but the document, whose hash was made right again, says something "
        "else of them, such as other indices of the same number.",
        "- Wrong: anything else, such as another exception, other tensors, an import, a program started, another file "
        f"opened, {MEMORY >> 20} MiB more memory, {SECONDS} seconds.",
        "",
        "| how | files | refused | as saved | as edited | wrong |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    total = Counter()
    for kind, counter in result["counts"].items():
        total.update(counter)
        row = [sum(counter.values()), *(counter.get(o, 0) for o in (*OUTCOMES, "wrong"))]
        lines.append(f"| {kind} | " + " | ".join(f"{n:,}" for n in row) + " |")
    row = [sum(total.values()), *(total.get(o, 0) for o in (*OUTCOMES, "wrong"))]
    lines.append("| **all** | " + " | ".join(f"**{n:,}**" for n in row) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-timm", action="store_true", help="as if timm were not installed: starts faster")
    parser.add_argument("--out", default=str(ROOT / "docs" / "results" / "checkpoints.md"), help="-: to the screen")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        if args.no_timm:
            sys.modules["timm"] = None
        return child(args.cases, args.seed)
    options = ["--child", f"--cases={args.cases}", f"--seed={args.seed}"] + ["--no-timm"] * args.no_timm
    command = [sys.executable, "-m", "bench.fuzz_checkpoints", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"the child ended with {done.returncode}; its last words:\n{done.stderr[-3000:]}", file=sys.stderr)
        return 1
    result = json.loads(done.stdout)
    for bad in result["bad"][:20]:
        print(*bad, sep=" | ", file=sys.stderr)
    text = page(result, args.cases, args.seed)
    print(f"slowest (CPU s, case, how): {result['slowest']}; peak {result['peak'] >> 20} MiB\n{text}")
    if args.out != "-":
        Path(args.out).write_text(text)
    return bool(result["bad"])


if __name__ == "__main__":
    sys.exit(main())
