"""Compiles CUDA C++ for the CPU, against emulator.h; keeps the libraries in the temporary folder."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
OP = [CSRC / "cuda" / name for name in ("batch_norm_act.cu", "batch_norm_act_plan.cpp", "batch_norm_act_op.cpp")]


def build_op() -> Path:
    """The library that registers batch_norm_act.cuda for CPU tensors."""
    site = Path(torch.__file__).parent
    return build(
        OP,
        f"-isystem{site / 'include'}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-L{site / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    )


def build(sources: list[Path], *flags: str) -> Path:
    """A shared library of ``sources``; made once for their content, whatever the number of processes that ask."""
    compiler = os.environ.get("CXX", "c++").split()
    flags = ("-O1", "-g0", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-shared", *flags)
    flags = (f"-I{CSRC}", f"-I{HERE}", "-DFASTPRUNE_EMULATOR", "-fvisibility=hidden", *flags)
    inputs = [*sources, *sorted(CSRC.rglob("*.h")), HERE / "emulator.h"]
    content = b"".join(path.read_bytes() for path in inputs)
    key = hashlib.sha256(repr((compiler, flags)).encode() + content).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastprune-emulator-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{sources[-1].stem}-{key}.so"
    with open(folder / f"{library.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = library.with_suffix(".tmp")
            command = [*compiler, "-x", "c++", *map(str, sources), "-x", "none", *flags, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the emulator does not compile:\n{done.stderr[-4000:]}")
            made.rename(library)
    return library
