"""Triton kernels compiled for GPUs that are not here: they compile, fit their registers, and load 16 bytes at a time.

scripts/aot_check.py does the work, in a process of its own: the interpreter of the other tests excludes the compiler.
It covers every type and architecture when run by hand or by CI; here a few take turns, so that the test takes a minute.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "aot_check.py"
if not find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)


def aot_check(*args: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, SCRIPT, *args], env=env, capture_output=True, text=True, timeout=550)


@pytest.mark.parametrize(
    "args",
    [
        ("--arch", "sm_90", "--dtype", "bf16"),
        ("--arch", "sm_80", "--dtype", "fp32", "--kernel", "fused"),
        ("--arch", "sm_80", "--dtype", "fp32", "--kernel", "batch_norm_act.slab"),
        ("--arch", "gfx942", "--dtype", "fp16", "--kernel", "batch_norm_act.slab"),
        ("--arch", "sm_80,gfx942", "--dtype", "fp64,fp16", "--kernel", "scale_penalty"),
        ("--arch", "gfx942", "--dtype", "bf16", "--kernel", "fused"),
        ("--arch", "sm_90,gfx942", "--dtype", "fp32,fp64", "--kernel", "gate_sums"),
        ("--arch", "sm_80,gfx942", "--dtype", "fp64", "--kernel", "growing_sgd"),
        ("--arch", "sm_80,gfx942", "--dtype", "fp32", "--kernel", "masked_conv2d"),
        ("--arch", "sm_80,gfx942", "--dtype", "fp32,bf16", "--kernel", "gram_penalty"),
    ],
    ids=" ".join,
)
def test_kernels_compile_without_spills_and_with_wide_loads(args):
    done = aot_check(*args, "--json")
    assert done.stderr.endswith("compiled, 0 failed\n"), done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and rows
    for row in rows:
        assert row["verdict"] == "ok" and row["spills"] == 0 and row["registers"] > 0, row
    if args == ("--arch", "sm_90", "--dtype", "bf16"):
        names = {row["kernel"] for row in rows}
        assert {"batch_norm_act.sums_kernel", "batch_norm_act.bwd_apply_kernel", "scale_penalty.block_kernel"} <= names
        assert {"channel_gate.scale_kernel", "channel_gate.backward_kernel", "filter_norm.filter_sums_kernel"} <= names
        steps = [row for row in rows if row["kernel"].startswith("growing_sgd")]  # 16 bytes but at the end of a tensor
        assert len(steps) == 8 and all(row["loads"]["16"] and row["stores"]["16"] for row in steps)
        slabs = [row for row in rows if "slab" in row["kernel"]]
        assert len(slabs) == 24 and all(row["stores"]["16"] and "2" not in row["stores"] for row in slabs)
        planes = [row for row in rows if "7x7" in row["variant"]]  # planes of 49 elements lie off the vectors
        assert len(planes) >= 8 and all(row["loads"]["16"] and "2" not in row["loads"] for row in planes)


SLAB_CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from aot_check import TARGETS, compile_kernel, run_tool
from kernels.batch_norm_act import aot
import tempfile
found = []
for label, kernel, args, config, _ in aot("bf16"):
    if "slab" in kernel.__name__ and label in ("nchw 56x56", "nchw 7x7 add", "nhwc 14x14 gate+add"):
        code = compile_kernel(kernel, args, config, TARGETS["sm_90"])
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            sass = run_tool("nvdisasm", "-c", file.name)
        found.append((label, kernel.__name__, code.asm["ptx"], sass, code.metadata.launch_cooperative_grid))
print(json.dumps(found))
"""


def test_slab_kernels_publish_before_they_arrive_and_look_after_they_waited():
    """In the order of the code: stores, a barrier, the release; the acquire, a barrier, loads past L1."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SLAB_CODE, SCRIPT.parent], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 5  # three labels, two of them forward and backward
    for label, name, ptx, sass, cooperative in compiled:
        assert cooperative is True, (label, name)
        ops = re.findall(
            r"(bar\.sync|st\.global|atom\.\S+|ld\.global\.gpu\.acquire|ld\.global\.cg|ld\.global(?=[.\s]))", ptx
        )
        releases = [i for i, op in enumerate(ops) if op.startswith("atom")]
        acquires = [i for i, op in enumerate(ops) if "acquire" in op and not op.startswith("atom")]
        # once the partial sums, once the statistics; no other atomics, and none on floats
        assert [ops[i] for i in releases] == ["atom.global.gpu.acq_rel.add.u32"] * 2, (label, name)
        assert len(acquires) == 2  # the first look, and the loop
        for i in releases:
            last_store = max(k for k in range(i) if ops[k] == "st.global")
            assert "bar.sync" in ops[last_store:i], (label, name)
            assert ops[i + 1] == "bar.sync" or i == releases[-1]  # all threads learn who came last, then read
        assert ops[acquires[-1] + 1] == "bar.sync" and ops[acquires[-1] + 2 :].count("ld.global.cg") >= 2
        between = ops[releases[0] : releases[1]]
        assert between.count("ld.global.cg") >= 2 and "st.global" in between  # whoever came last joins and writes
        assert "createpolicy.fractional.L2::evict_last" in ptx and "createpolicy.fractional.L2::evict_first" in ptx
        assert re.search(r"MEMBAR\.\S*GPU", sass) and "CCTL.IVALL" in sass  # L1 forgets what it held


def test_every_kernel_is_launched_where_sizes_are_one():
    """A size of 1 is a constant in a compiled kernel, and no tensor: what the interpreter takes may not compile."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parent / "launches.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sources = "".join(path.read_text() for path in (SCRIPT.parent.parent / "kernels").glob("*.py"))
    assert set(done.stdout.split()) == set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))


def test_triton_launches_cooperatively_when_asked():
    """The option of the kernel's metadata becomes the driver's attribute: read from Triton, there is no GPU here."""
    driver = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "driver.py"
    text = driver.read_text()
    assert "self.launch_cooperative_grid = metadata.launch_cooperative_grid" in text
    assert re.search(
        r"if \(launch_cooperative_grid != 0\) \{\{\s+CUlaunchAttribute \w+ = \{\{ \.id = "
        r"CU_LAUNCH_ATTRIBUTE_COOPERATIVE, \.value = 1\}\}",
        text,
    )


def test_the_committed_table_is_of_all_kernels_there_are():
    """Else: python scripts/aot_check.py --write --jobs 2"""
    done = aot_check("--list")
    assert done.returncode == 0, done.stderr
    there = {tuple(row.values()) for row in json.loads(done.stdout)}
    root = SCRIPT.parent.parent
    rows = [json.loads(line) for line in (root / "bench" / "results" / "aot.jsonl").read_text().splitlines()]
    committed = {tuple(row[key] for key in ("kernel", "variant", "arch", "dtype")) for row in rows}
    assert committed == there, f"gone: {committed - there}; new: {there - committed}"
    assert len(rows) == len(committed) and all(row["verdict"] == "ok" for row in rows)
    page = (root / "docs" / "results" / "aot.md").read_text()
    for row in rows:
        line = f"| {row['variant']} | {row['arch']} | {row['dtype']} | {row['registers']} | 0 | {row['shared']} |"
        assert f"\n{line} " in page and f"\n## {row['kernel']}\n" in page


@pytest.fixture
def bad_kernels(tmp_path):
    """A checkout whose only kernels are one that loads element by element, one that spills, and ones beyond limits."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "scripts" / "aot_check.py").write_text(SCRIPT.read_text())
    (tmp_path / "kernels" / "bad.py").write_text(
        """
import triton
import triton.language as tl

@triton.jit
def _narrow_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i * n).to(tl.float32))

@triton.jit
def _spilling_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i).to(tl.float32)
    tl.store(y_ptr + i, x - tl.sum(x, axis=0))

@triton.jit
def _large_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    _sum(x_ptr, y_ptr, B)

@triton.jit
def _sharing_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    _sum(x_ptr, y_ptr, B)

@triton.jit
def _sum(x_ptr, y_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i).to(tl.float32)
    tl.store(y_ptr + i, x - tl.sum(x, axis=0))

AOT_DTYPES = ("bf16",)
AOT_LIMITS = {"_large_kernel": {"registers": 8}, "_sharing_kernel": {"shared": 15}}

def aot(dtype):
    args = {"x_ptr": f"*{dtype}:16", "y_ptr": "*fp32:16", "n": "i32"}
    wide = {"B": 1024, "num_warps": 4}
    return [
        ("", _large_kernel, args, wide, True),
        ("", _sharing_kernel, args, wide, True),
        ("", _narrow_kernel, args, wide, True),
        ("", _spilling_kernel, args, {"B": 4096, "num_warps": 1, "maxnreg": 32}, False),
    ]
"""
    )
    return tmp_path


def test_the_check_fails_on_narrow_loads_spills_and_limits(bad_kernels):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, bad_kernels / "scripts" / "aot_check.py", "--arch", "sm_90"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.endswith("4 compiled, 4 failed\n"), done.stdout + done.stderr
    assert "FAIL: no 16-byte loads" in done.stdout and "FAIL: spills" in done.stdout
    assert " registers, limit 8\n" in done.stdout and " shared, limit 15\n" in done.stdout


def test_the_check_refuses_the_interpreter():
    done = subprocess.run(
        [sys.executable, SCRIPT], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr
