"""Builds the extensions fastprune._C (CPU) and fastprune._C_cuda; everything else is in pyproject.toml.

FASTPRUNE_EXT = auto (default): build what can be built, and install without the rest, saying why
                cpu:            build the CPU extension or fail; no CUDA
                cuda:           build both or fail
                none:           pure Python, ops run on eager PyTorch (and Triton on a GPU)

TORCH_CUDA_ARCH_LIST chooses GPUs, as for PyTorch's own extensions; default "8.0;9.0+PTX", which later GPUs compile
for themselves.  No GPU is needed to build.
"""

import os
import platform
import re
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
ARCHITECTURES = "8.0;9.0+PTX"
CXX = [
    *("-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # stable ABI of torch 2.10: one binary for that and every later torch
]


def extensions(with_cuda: bool):
    """The extensions and the command that builds them."""
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        """Compiles csrc/cpu/*_kernel.cpp once per instruction set: setuptools has no flags per source."""

        def build_extension(self, ext):
            if ext.name == "fastprune._C_cuda":
                return self.build_cuda(ext)
            for isa, flags in ISA.items():
                ext.extra_objects += self.compiler.compile(
                    kernels,
                    output_dir=os.path.join(self.build_temp, isa),
                    include_dirs=ext.include_dirs,
                    depends=ext.depends,
                    extra_postargs=[*CXX, "-fopenmp-simd", f"-DFP_ISA={isa}", *flags],
                )
            super().build_extension(ext)

        def build_cuda(self, ext):
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
            try:
                super().build_extension(ext)
            except Exception as error:
                if not ext.optional:
                    raise
                print(
                    f"{str(error).splitlines()[0]}\nfastprune: nvcc failed, see above; {WITHOUT_CUDA}", file=sys.stderr
                )

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
    built = [ext]
    if with_cuda:
        arches = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        facts = [f'-DFP_CUDA_ARCHITECTURES="{arches.replace(";", " ")}"', f'-DFP_NVCC="{nvcc_version(nvcc())}"']
        cuda = cpp_extension.CUDAExtension(
            "fastprune._C_cuda",
            sorted(
                str(p.relative_to(here)) for pattern in ("*.cpp", "*.cu") for p in here.glob(f"csrc/cuda/{pattern}")
            ),
            include_dirs=[str(here / "csrc")],
            depends=[str(p) for p in here.glob("csrc/**/*.h")],
            extra_compile_args={"cxx": [*CXX, "-DUSE_CUDA", *facts], "nvcc": ["-O3", "-std=c++17", "--threads=2"]},
            extra_link_args=["-Wl,--as-needed", "-s"],
            py_limited_api=True,
        )
        cuda.optional = mode == "auto"  # its failure must not cost the user the CPU kernels
        built.append(cuda)
    return {
        "ext_modules": built,
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


def nvcc() -> Path | None:
    """The CUDA compiler; sets CUDA_HOME, which PyTorch would guess wrong where nvcc on PATH is a wrapper."""
    found = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", found and Path(found).resolve().parent.parent]
    for home in homes:
        if home and (Path(home) / "bin" / "nvcc").is_file():
            os.environ["CUDA_HOME"] = str(home)
            return Path(home) / "bin" / "nvcc"
    return None


def nvcc_version(path: Path) -> str:
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "unknown"


def why_not_cuda() -> str | None:
    """Why the CUDA extension cannot be built here; the empty string where nobody would expect it."""
    import torch

    if torch.version.cuda is None:
        return ""  # a PyTorch without CUDA has no use for it
    compiler = nvcc()
    if compiler is None:
        return "no nvcc (CUDA_HOME is not set, and it is not on PATH)"
    version = nvcc_version(compiler)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {version} does not fit PyTorch's CUDA {torch.version.cuda}"
    return None


WITHOUT_CUDA = "installing without CUDA C++ kernels: batch_norm_act runs on Triton on a GPU"
MODES = ("auto", "cpu", "cuda", "none")
mode = os.environ.get("FASTPRUNE_EXT", "auto")
if mode not in MODES:
    sys.exit(f"FASTPRUNE_EXT must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode!r}")
reason = why_not() if mode in ("auto", "cuda") else None
if reason and mode == "cuda":
    sys.exit(f"fastprune: FASTPRUNE_EXT=cuda cannot be built: {reason}")
if reason:
    print(f"fastprune: installing without compiled kernels: {reason}; ops will run on eager PyTorch", file=sys.stderr)
if mode == "none" or reason:
    setup()
else:
    lost = why_not_cuda() if mode != "cpu" else ""
    if mode == "cuda" and lost is not None:
        sys.exit(f"fastprune: FASTPRUNE_EXT=cuda cannot be built: {lost or 'this PyTorch has no CUDA'}")
    if lost:
        print(f"fastprune: {lost}; {WITHOUT_CUDA}", file=sys.stderr)
    setup(**extensions(with_cuda=lost is None and mode != "cpu"))
