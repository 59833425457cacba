"""Compile every Triton kernel ahead of time, without a GPU, and judge the machine code.

    python scripts/aot_check.py [--arch sm_90,gfx942] [--dtype bf16] [--kernel batch_norm_act] [--json | --markdown]
    python scripts/aot_check.py --write --jobs 8    all of it, into bench/results/aot.jsonl and docs/results/aot.md;
                                                    with --kernel only the rows of these are made anew

Prints registers, spills, shared memory and load widths per kernel.  Exit code 1 when a kernel does not compile, spills,
takes more registers or shared memory than its file allows, or is declared vectorised but reads global memory in pieces
smaller than 16 bytes where activations lie.

A kernel file takes part by defining ``AOT_DTYPES`` and ``aot(dtype) -> [(label, kernel, args, config, vectorised)]``:
``args`` maps argument names to a type ("*bf16:16" is a pointer divisible by 16) or to a constant (None: tensor absent),
``config`` holds the remaining constants and num_warps.  Files named ``_...`` hold parts of others.  ``AOT_LIMITS`` maps
the names of kernels that may have other than LIMITS to what they may have, ``{"_gram_kernel": {"registers": 168}}``.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout's kernels, installed or not

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of a kernel whose file says nothing.  128 registers let two blocks of 256 threads share a multiprocessor's 65,536, and
# 48 KiB is what a block gets without asking for more.  AMD's wavefronts have up to 512 vector registers.
LIMITS = {"registers": 128, "vgprs": 256, "shared": 48 << 10}
KEY = ("kernel", "variant", "arch", "dtype")
COLUMNS = (*KEY, "registers", "spills", "shared", "loads", "stores", "verdict")
ROOT = Path(__file__).resolve().parent.parent
ROWS, PAGE = ROOT / "bench" / "results" / "aot.jsonl", ROOT / "docs" / "results" / "aot.md"


class Job(NamedTuple):
    """One kernel for one architecture: entry ``index`` of ``module``'s ``aot(dtype)``."""

    module: str
    dtype: str
    index: int
    arch: str


def compile_kernel(kernel: triton.JITFunction, args: dict, config: dict, target: GPUTarget):
    known = {**args, **config}
    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if isinstance(known[name], str):
            signature[name], _, aligned = known[name].partition(":")
            if aligned:
                attrs[(i,)] = [["tt.divisibility", int(aligned)]]
        else:
            signature[name], constants[name] = "constexpr", known[name]
    options = {key: value for key, value in config.items() if key not in kernel.arg_names}
    # The launchers choose threads; the configurations here were made where a warp has 32.
    options["num_warps"] = max(1, options["num_warps"] * 32 // target.warp_size)
    return triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=options)


def run_tool(tool: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def inspect_cuda(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        sass = run_tool("nvdisasm", "-c", file.name)
    # An access without a width moves 4 bytes; LDL and STL are spills.
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    count = {"LDG": Counter(), "STG": Counter()}
    # LDGSTS copies to shared memory, as wide as it says
    for op, suffix in re.findall(r"\b(LDG|STG)(?:STS)?((?:\.\w+)*)", sass):
        count[op][next((widths[s] for s in suffix.split(".") if s in widths), 4)] += 1
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": count["LDG"],
        "stores": count["STG"],
    }


def inspect_hip(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    count = {"load": Counter(), "store": Counter()}
    for op, kind in re.findall(r"\b(?:global|buffer|flat)_(load|store)_([a-z0-9]+)", text):
        count[op][widths[kind]] += 1
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        "loads": count["load"],
        "stores": count["store"],
    }


def judge(facts: dict, dtype: str, vectorised: bool, limits: dict[str, int]) -> str:
    if facts["spills"]:
        return "FAIL: spills"
    for name, most in limits.items():
        if facts[name] > most:
            return f"FAIL: {facts[name]} {name}, limit {most}"
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[dtype]
    # Parameters are float32, so a load as narrow as a half type's item can only be an activation.
    scalar = itemsize < 4 and facts["loads"][itemsize]
    if vectorised and (scalar or not facts["loads"][16]):
        return "FAIL: no 16-byte loads"
    return "ok"


@cache
def load(name: str) -> ModuleType:
    module = import_module(name)
    if not hasattr(module, "aot"):
        raise SystemExit(f"{name}: no aot(dtype); every kernel file must say what is compiled ahead of time")
    return module


@cache
def entries(module: str, dtype: str) -> list[tuple]:
    return load(module).aot(dtype)


def row_of(job: Job) -> dict:
    """What a job compiles, without compiling it."""
    label, kernel, *_ = entries(job.module, job.dtype)[job.index]
    name = f"{job.module.removeprefix('kernels.')}.{kernel.__name__.strip('_')}"
    return {"kernel": name, "variant": label, "arch": job.arch, "dtype": job.dtype}


def check(job: Job) -> dict:
    """Compile and judge."""
    _, kernel, args, config, vectorised = entries(job.module, job.dtype)[job.index]
    limits = LIMITS | getattr(load(job.module), "AOT_LIMITS", {}).get(kernel.__name__, {})
    vgprs = limits.pop("vgprs")
    if job.arch.startswith("gfx"):
        limits["registers"] = vgprs
    row = row_of(job) | {"limits": limits}
    try:
        compiled = compile_kernel(kernel, args, config, TARGETS[job.arch])
    except Exception as error:  # whatever the compiler raises is the finding
        return row | {"verdict": f"FAIL: {str(error).strip().splitlines()[-1]}"}
    facts = inspect_hip(compiled) if job.arch.startswith("gfx") else inspect_cuda(compiled)
    facts["shared"] = compiled.metadata.shared
    return row | facts | {"verdict": judge(facts, job.dtype, vectorised, limits)}


def jobs(arches: list[str], dtypes: list[str] | None, only: str) -> list[Job]:
    """What there is to compile.  A file that leaves out one of its kernels is refused."""
    found = []
    for info in sorted(pkgutil.iter_modules(kernels.__path__, "kernels."), key=lambda info: info.name):
        if info.name.startswith("kernels._"):
            continue
        module, seen = load(info.name), set()
        for dtype in module.AOT_DTYPES:
            for index, (_, kernel, *_) in enumerate(entries(info.name, dtype)):
                seen.add(kernel.__name__)
                if only in row_of(Job(info.name, dtype, index, ""))["kernel"] and (not dtypes or dtype in dtypes):
                    found += [Job(info.name, dtype, index, arch) for arch in arches]
        launched = {name for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
        if missing := {name for name in launched if name.endswith("_kernel")} - seen:
            raise SystemExit(f"{info.name}: aot(dtype) leaves out {', '.join(sorted(missing))}")
        if unknown := set(getattr(module, "AOT_LIMITS", {})) - seen:
            raise SystemExit(f"{info.name}: AOT_LIMITS names {', '.join(sorted(unknown))}, which it has not")
    return found


def show(row: dict) -> list[str]:
    """Cells of a row; accesses as 'count x bytes', widest first."""
    cells = []
    for column in COLUMNS:
        value = row.get(column, "")
        if isinstance(value, dict):
            value = " ".join(f"{value[width]}x{width}" for width in sorted(value, key=int, reverse=True))
        cells.append(str(value))
    return cells


def page(rows: list[dict]) -> str:
    """docs/results/aot.md from rows."""
    text = [
        "# Every Triton kernel, compiled ahead of time",
        "",
        "Written by `python scripts/aot_check.py --write`, which needs no GPU; rows: `bench/results/aot.jsonl`.",
        f"Triton {triton.__version__}: {len(rows)} kernels for {', '.join(TARGETS)}. Per thread, *registers* and",
        "*spills* (accesses to local memory); per block, *shared* memory in bytes; *loads* and *stores* of memory",
        "in the machine code as count x bytes: `8x16` are eight instructions that move 16 bytes each. Argument tables,",
        "parameters of a channel and the ragged ends of a tensor are narrower on purpose.",
        "",
        "What a kernel may have at most, 0 spills aside, stands beside it in its file, and here below its name. Where",
        "activations are declared to be read 16 bytes at a time, a narrower load of them fails the check.",
    ]
    for kernel, mine in groupby(sorted(rows, key=lambda row: row["kernel"]), lambda row: row["kernel"]):
        mine = list(mine)
        most = {row["arch"]: row["limits"]["registers"] for row in mine}
        registers = ", ".join(f"{n} on {arch}" for arch, n in most.items())
        text += [
            "",
            f"## {kernel}",
            "",
            f"At most {registers} registers; {mine[0]['limits']['shared']:,} bytes shared.",
            "",
        ]
        text += [f"| {' | '.join(COLUMNS[1:])} |", "| --- | --- | --- | ---: | ---: | ---: | --- | --- | --- |"]
        text += [f"| {' | '.join(show(row)[1:])} |" for row in mine]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--dtype", help="of bf16, fp16, fp32, fp64; default: all")
    parser.add_argument("--kernel", default="", help="only kernels with this in file.name")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    form.add_argument("--list", action="store_true", help="as JSON what there is to compile, and compile nothing")
    form.add_argument("--write", action="store_true", help=f"into {ROWS.name} and {PAGE.name}")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter takes the place of the compiler")
    arches = options.arch.split(",")
    if unknown := set(arches) - set(TARGETS):
        parser.error(f"unknown --arch {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    if options.write and (options.dtype or len(arches) < len(TARGETS)):
        parser.error("--write is for all types and architectures; leave --arch and --dtype out")
    todo = jobs(arches, options.dtype and options.dtype.split(","), options.kernel)
    if not todo:
        parser.error("nothing to compile; see --dtype and --kernel")
    if options.list:
        print(json.dumps([row_of(job) for job in todo]))
        return 0
    if options.jobs > 1:
        with ProcessPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(check, todo))
    else:
        rows = list(map(check, todo))
    table = [list(COLUMNS), *map(show, rows)]
    failed = [row for row in rows if row["verdict"] != "ok"]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.markdown:
        table.insert(1, ["---"] * len(COLUMNS))
        print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    elif options.write:
        for row in failed:
            print("  ".join(show(row)))
        names = {row["kernel"] for row in rows}
        old = map(json.loads, ROWS.read_text().splitlines()) if options.kernel else ()
        known = {json.dumps(row_of(job)) for job in jobs(arches, None, "")}
        kept = [row for row in old if row["kernel"] not in names and json.dumps({k: row[k] for k in KEY}) in known]
        rows = sorted(kept + [row | {"triton": triton.__version__} for row in rows], key=lambda row: row["kernel"])
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
        PAGE.write_text(page(rows))
    else:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print("\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table))
    print(f"{len(todo)} compiled, {len(failed)} failed", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
