"""Builds the CPU extension fastprune._C; everything else about the package is in pyproject.toml.

FASTPRUNE_EXT = auto (default): build it, and install without it, saying why, when that is not possible
                cpu:            build it or fail
                none:           pure Python, ops run on eager PyTorch
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

# Kernels are compiled once per instruction set and chosen at run time, so one binary serves every x86-64 machine.
ISA = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": (AVX512 := "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c".split()),
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
if platform.machine() not in ("x86_64", "AMD64"):
    ISA = {isa: [] for isa in ISA}  # other processors have none of these flags; run-time dispatch takes "base" there
CXX = [
    *("-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # stable ABI of torch 2.10: one binary for that and every later torch
]


def extension():
    """The extension and the command that builds it."""
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        """Compiles csrc/cpu/*_kernel.cpp once per instruction set: setuptools has no flags per source."""

        def build_extension(self, ext):
            for isa, flags in ISA.items():
                ext.extra_objects += self.compiler.compile(
                    kernels,
                    output_dir=os.path.join(self.build_temp, isa),
                    include_dirs=ext.include_dirs,
                    depends=ext.depends,
                    extra_postargs=[*CXX, "-fopenmp-simd", f"-DFP_ISA={isa}", *flags],
                )
            super().build_extension(ext)

    here = Path(__file__).parent
    kernels = sorted(str(p.relative_to(here)) for p in here.glob("csrc/cpu/*_kernel.cpp"))
    sources = ["csrc/bindings.cpp", *sorted(str(p.relative_to(here)) for p in here.glob("csrc/cpu/*_op.cpp"))]
    ext = cpp_extension.CppExtension(
        "fastprune._C",
        sources,
        include_dirs=[str(here / "csrc")],
        depends=[str(p) for p in here.glob("csrc/**/*.h")],
        extra_compile_args={"cxx": CXX},
        extra_link_args=["-Wl,--as-needed", "-s"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def why_not() -> str | None:
    """Why the extension cannot be built here."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler} is not on PATH)"
    probe = [compiler, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    probe = subprocess.run(probe, input=b"int main(){}", capture_output=True)
    if probe.returncode:
        return f"{compiler} does not compile C++17"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment"
    return None


mode = os.environ.get("FASTPRUNE_EXT", "auto")
if mode not in ("auto", "cpu", "none"):
    sys.exit(f"FASTPRUNE_EXT must be auto, cpu or none, got {mode!r}")
reason = why_not() if mode == "auto" else None
if reason:
    print(f"fastprune: installing without compiled kernels: {reason}; ops will run on eager PyTorch", file=sys.stderr)
setup(**({} if mode == "none" or reason else extension()))
