"""Compile every Triton kernel ahead of time, without a GPU, and judge the machine code.

    python scripts/aot_check.py [--arch sm_90,gfx942] [--dtype bf16] [--kernel batch_norm_act] [--json | --markdown]

Prints registers, spills, shared memory and load widths per kernel.  Exit code 1 when a kernel does not compile, spills,
or is declared vectorised but reads global memory in pieces smaller than 16 bytes where activations lie.

A kernel file takes part by defining ``AOT_DTYPES`` and ``aot(dtype) -> [(label, kernel, args, config, vectorised)]``:
``args`` maps argument names to a type ("*bf16:16" is a pointer divisible by 16) or to a constant (None: tensor absent),
``config`` holds the remaining constants and num_warps.  Files named ``_...`` hold parts of others.
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
from importlib import import_module
from pathlib import Path

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
COLUMNS = ("kernel", "variant", "arch", "dtype", "registers", "spills", "shared", "loads", "stores", "verdict")


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
    for op, suffix in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", sass):
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


def judge(facts: dict, dtype: str, vectorised: bool) -> str:
    if facts["spills"]:
        return "FAIL: spills"
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[dtype]
    # Parameters are float32, so a load as narrow as a half type's item can only be an activation.
    scalar = itemsize < 4 and facts["loads"][itemsize]
    if vectorised and (scalar or not facts["loads"][16]):
        return "FAIL: no 16-byte loads"
    return "ok"


def check(arches: list[str], dtypes: list[str] | None, only: str) -> list[dict]:
    rows = []
    for info in sorted(pkgutil.iter_modules(kernels.__path__, "kernels."), key=lambda info: info.name):
        if info.name.startswith("kernels._"):
            continue
        module = import_module(info.name)
        if not hasattr(module, "aot"):
            raise SystemExit(f"{info.name}: no aot(dtype); every kernel file must say what is compiled ahead of time")
        seen = set()
        for dtype in module.AOT_DTYPES:
            for label, kernel, args, config, vectorised in module.aot(dtype):
                name = f"{info.name.removeprefix('kernels.')}.{kernel.__name__.strip('_')}"
                seen.add(kernel.__name__)
                for arch in arches:
                    if only not in name or (dtypes and dtype not in dtypes):
                        continue
                    row = {"kernel": name, "variant": label, "arch": arch, "dtype": dtype}
                    try:
                        compiled = compile_kernel(kernel, args, config, TARGETS[arch])
                    except Exception as error:  # whatever the compiler raises is the finding
                        rows.append({**row, "verdict": f"FAIL: {str(error).strip().splitlines()[-1]}"})
                        continue
                    facts = inspect_hip(compiled) if arch.startswith("gfx") else inspect_cuda(compiled)
                    row |= facts | {"shared": compiled.metadata.shared, "verdict": judge(facts, dtype, vectorised)}
                    rows.append(row)
        launched = {name for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
        missing = {name for name in launched if name.endswith("_kernel")} - seen
        if missing:
            raise SystemExit(f"{info.name}: aot(dtype) leaves out {', '.join(sorted(missing))}")
    return rows


def show(row: dict) -> list[str]:
    """Cells of a row; accesses as 'count x bytes', widest first."""
    cells = []
    for column in COLUMNS:
        value = row.get(column, "")
        if isinstance(value, Counter):
            value = " ".join(f"{value[width]}x{width}" for width in sorted(value, reverse=True))
        cells.append(str(value))
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--dtype", help="of bf16, fp16, fp32, fp64; default: all")
    parser.add_argument("--kernel", default="", help="only kernels with this in file.name")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter takes the place of the compiler")
    arches = options.arch.split(",")
    if unknown := set(arches) - set(TARGETS):
        parser.error(f"unknown --arch {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    rows = check(arches, options.dtype and options.dtype.split(","), options.kernel)
    if not rows:
        parser.error("nothing to compile; see --dtype and --kernel")
    table = [list(COLUMNS), *map(show, rows)]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.markdown:
        table.insert(1, ["---"] * len(COLUMNS))
        print("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    else:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print("\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table))
    failed = sum(row["verdict"] != "ok" for row in rows)
    print(f"{len(rows)} compiled, {failed} failed", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
