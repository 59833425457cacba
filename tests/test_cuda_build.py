"""The CUDA extension: built where it can be, with or without a GPU; what the compiler made of its kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastprune

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(fastprune.__file__).parent / "_C_cuda.abi3.so"
HAS_NVCC = bool(shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists())
needs_library = pytest.mark.skipif(
    torch.version.cuda is None or not (HAS_NVCC or LIBRARY.exists()), reason="needs nvcc and a PyTorch with CUDA"
)


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """In a process of its own, without the emulator."""
    keep = {key: value for key, value in os.environ.items() if key != "FASTPRUNE_CUDA_EMULATOR"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=keep | env, cwd=ROOT)


@needs_library
def test_it_is_built_loads_without_a_gpu_and_says_what_it_is():
    code = """
import json, torch
from fastprune import backends
names = ("batch_norm_act", "batch_norm_act_backward")
has = torch._C._dispatch_has_kernel_for_dispatch_key
registered = [has(f"fastprune::{n}.cuda", "CUDA") for n in names]
print(json.dumps([backends.cuda_build_info(), backends.report()["cuda"], registered]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    info, report, registered = json.loads(done.stdout)
    assert info, f"nvcc and a PyTorch with CUDA are here, the extension is not: {report}; reinstall fastprune"
    assert {"8.0", "9.0"} <= set(info["architectures"].replace("+PTX", "").split())
    assert re.fullmatch(r"\d+\.\d+", info["nvcc"])
    assert info["runtime"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert report.startswith("ok: " if torch.cuda.is_available() else "installed, not in use: no CUDA device")
    assert registered == [True, True]


# ---- machine code


def tool(name: str, *args: object) -> str:
    """Triton's package carries NVIDIA's disassemblers."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *map(str, args)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def kernels():
    """(architecture, kernel, template arguments) to registers, bytes of stack, and the memory instructions."""
    if not LIBRARY.exists() or not find_spec("triton"):
        pytest.skip("needs the CUDA extension, and cuobjdump from triton's package")
    found = {}

    def key(arch: str, name: str) -> tuple[str, str, str]:
        match = re.search(
            r"\d((?:forward|backward|finalise_forward|finalise_backward|join_gates|count)_kernel)(.*)", name
        )
        assert match, name
        kind = {"If": "float32", "8bfloat16": "bfloat16", "7float16": "float16"}
        words = [next((word for mark, word in kind.items() if mark in match[2]), "")]
        return arch, match[1], " ".join([*words, *re.findall(r"L[ib](\d+)E", match[2])]).strip()

    arch = ""
    usage = tool("cuobjdump", "-res-usage", LIBRARY)
    for line in usage.splitlines():
        arch = match[1] if (match := re.search(r"arch = (sm_\d+)", line)) else arch
        if match := re.search(r"Function (\S+):", line):
            name = key(arch, match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found[name] = dict(zip(("registers", "stack", "shared", "local"), map(int, match.groups()), strict=True))
    for line in tool("cuobjdump", "-sass", LIBRARY).splitlines():
        arch = match[1] if (match := re.search(r"arch = (sm_\d+)", line)) else arch
        if match := re.search(r"Function : (\S+)", line):
            ops = found[key(arch, match[1])].setdefault("ops", {})
        elif match := re.search(r"\b((?:LDGSTS|LDG|STG|LDL|STL|UCGABAR)\w*[.\w]*)", line):
            ops[match[1]] = ops.get(match[1], 0) + 1
    return found


@needs_library
def test_both_architectures_have_every_kernel(kernels):
    by_arch = {}
    for arch, name, arguments in kernels:
        by_arch.setdefault(arch, set()).add((name, arguments))
    assert {"sm_80", "sm_90"} <= set(by_arch)
    assert by_arch["sm_80"] == by_arch["sm_90"] and len(by_arch["sm_90"]) >= 32


@needs_library
def test_later_gpus_find_code_that_they_can_compile(kernels):
    assert re.search(r"sm_90\.ptx", tool("cuobjdump", "-lptx", LIBRARY))


@needs_library
def test_registers_and_spills(kernels):
    """256 threads of up to 128 registers: two blocks on a multiprocessor; sums per sample over columns: one."""
    for (arch, name, arguments), facts in kernels.items():
        where = (arch, name, arguments, facts)
        assert facts["local"] == 0 and facts["shared"] in (0, 1024), where  # sm_90 keeps 1 KB; the launch asks for ours
        assert not [op for op in facts["ops"] if op.startswith(("LDL", "STL"))], where
        columns_with_gates = name == "backward_kernel" and arguments.endswith("0 1")
        assert facts["registers"] <= (200 if columns_with_gates else 128), where


@needs_library
def test_vectors_of_16_bytes(kernels):
    """Loads to registers, copies to shared memory and stores; in the kernels that are not element by element."""
    seen = 0
    for (arch, name, arguments), facts in kernels.items():
        if name not in ("forward_kernel", "backward_kernel") or arguments.split()[1] == "1":
            continue
        seen += 1
        ops = facts["ops"]
        wide = {kind: sum(n for op, n in ops.items() if re.match(pattern, op)) for kind, pattern in {
            "load": r"LDG\.E(\.\w+)*\.128", "copy": r"LDGSTS\.E\.BYPASS(\.\w+)*\.128", "store": r"STG\.E(\.\w+)*\.128",
        }.items()}  # fmt: skip
        assert wide["load"] >= 2 and wide["copy"] >= 1 and wide["store"] >= 2, (arch, name, arguments, ops)
    assert seen >= 2 * 18


@needs_library
def test_barriers_of_clusters_where_there_are_any(kernels):
    for (arch, name, arguments), facts in kernels.items():
        if name in ("forward_kernel", "backward_kernel"):
            assert ("UCGABAR_WAIT" in facts["ops"]) == (arch != "sm_80"), (arch, name, arguments, facts)


# ---- the package without it


def test_a_cpu_only_pytorch_is_not_warned(tmp_path):
    code = "import torch; torch.version.cuda = None; from fastprune import backends; print(backends.report()['cuda'])"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not available: PyTorch ") and done.stdout.endswith("has no CUDA\n")


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch with CUDA")
def test_a_missing_library_is_said_where_asked(tmp_path):
    code = """
import sys
sys.modules["fastprune._C_cuda"] = None  # as if it were not there
import torch
from fastprune import backends, ops
print(backends.report()["cuda"])
ops.batch_norm_act(torch.ones(2, 3, 4, 4), backend="cuda")
"""
    done = run(code)
    assert done.stdout.startswith("not available: not built") and "Triton runs on the GPU" in done.stdout
    assert "BackendError" in done.stderr and "backend 'cuda' cannot take torch.float32 on cpu" in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch with CUDA")
def test_a_stale_library_costs_one_warning(tmp_path):
    code = """
import sys, warnings
class Stale:
    def find_spec(self, name, path=None, target=None):
        if name == "fastprune._C_cuda":
            raise ImportError("undefined symbol: _ZN5torch")
sys.meta_path.insert(0, Stale())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastprune import backends
print([str(w.message) for w in caught])
print(backends.report()["cuda"])
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    messages, report = done.stdout.splitlines()
    assert messages.count("fastprune: ") == 1 and "_C_cuda did not load (undefined symbol" in messages
    assert report.startswith("not available: fastprune._C_cuda did not load")


def test_setup_says_what_is_lost_without_nvcc(tmp_path):
    """FASTPRUNE_EXT=cuda fails in a line, and so does a name that it does not know."""
    for mode, words in (
        ("cuda", "FASTPRUNE_EXT=cuda cannot be built: no nvcc"),
        ("gpu", "must be auto, cpu, cuda or none"),
    ):
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
        compiler = tmp_path / "c++"
        if not compiler.exists():
            compiler.symlink_to(shutil.which(os.environ.get("CXX", "c++")))
        env = {"FASTPRUNE_EXT": mode, "CUDA_HOME": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{path}"}
        code = "import pathlib, runpy, sys; is_file = pathlib.Path.is_file\n"
        code += "pathlib.Path.is_file = lambda p: p.name != 'nvcc' and is_file(p)\n"
        code += "sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py', run_name='__main__')"
        done = run(code, **env)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
