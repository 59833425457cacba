"""What gets installed: contents of sdist and wheels, an install without the extension, a light import."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastprune
from fastprune import backends

ROOT = Path(__file__).resolve().parent.parent
HAS_CPP = "cpp" in os.environ.get("FASTPRUNE_TEST_BACKENDS", "eager,cpp,triton").split(",")


# An editable install finds fastprune._C whatever PYTHONPATH says.
FORGET_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """``code`` in a fresh interpreter, outside the repository; with PYTHONPATH, what is installed there."""
    if "PYTHONPATH" in environment:
        code = FORGET_EDITABLE + code
    stand_ins = ("TRITON_INTERPRET", "FASTPRUNE_CUDA_EMULATOR")
    keep = {key: value for key, value in os.environ.items() if key not in stand_ins}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, env=keep | environment
    )


def build(hook: str, source: Path, out: Path, **environment: str) -> Path:
    """Call the build backend as pip does, without an isolated environment; the file it made."""
    code = f"import setuptools.build_meta as b; print('MADE', b.{hook}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.rpartition("MADE ")[2].strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(names in the sdist, unpacked), made from a copy of what git tracks or would track."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if ".venv" not in p.parts]
    for name in files:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    with tarfile.open(build("build_sdist", copy, out)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(out, filter="data")
    return names, next(path for path in out.iterdir() if path.is_dir())


def modules() -> set[str]:
    """Every Python file, recipe and page of the package, as installed."""
    own = {
        str(path.relative_to(ROOT)) for kind in ("py", "yaml", "html") for path in ROOT.glob(f"fastprune/**/*.{kind}")
    }
    return own | {f"fastprune/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}


def test_sdist_has_all_that_a_build_needs(sdist):
    names, _ = sdist
    wanted = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"}
    wanted |= {
        str(p.relative_to(ROOT)) for folder in ("csrc", "kernels", "tests") for p in ROOT.glob(f"{folder}/**/*.*")
    }
    wanted = {name for name in wanted if "__pycache__" not in name and not name.endswith(".so")}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.skipif(not HAS_CPP, reason="FASTPRUNE_TEST_BACKENDS leaves cpp out")
def test_wheel_built_from_the_sdist(sdist, tmp_path):
    # Optimising takes most of the time and is not in question here.
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/bash\nexec ${REAL_CXX} "${@/#-O3/-O0}"\n')
    compiler.chmod(0o755)
    real = os.environ.get("CXX", "c++")
    wheel = build("build_wheel", sdist[1], tmp_path, FASTPRUNE_EXT="cpu", CXX=str(compiler), REAL_CXX=real)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "-cp311-abi3-" in wheel.name
    assert modules() - names == set()
    assert "fastprune/_C.abi3.so" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"fastprune", f"fastprune-{fastprune.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import fastprune; print(fastprune.__file__, fastprune.backends.build_info())"
    done = run(code, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path) in done.stdout and "{}" not in done.stdout and done.stderr == ""


@pytest.fixture(scope="module")
def pure(sdist, tmp_path_factory):
    """A folder with an install of FASTPRUNE_EXT=none."""
    out = tmp_path_factory.mktemp("pure")
    wheel = build("build_wheel", sdist[1], out, FASTPRUNE_EXT="none")
    assert "-py3-none-any" in wheel.name
    zipfile.ZipFile(wheel).extractall(out / "site")
    return str(out / "site")


def test_pure_install_warns_once_and_runs(pure):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastprune as fp
    import torch
    model = fp.nn.convert_batchnorm(fp.models.create("vgg-small"), bound="sigmoid", fuse=True)
    x = torch.randn(4, 1, 8, 8)
    method = fp.create("rni", model, x, ratio=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (model(x).logsumexp(1).mean() + method.penalty()).backward()
    method.step(optimizer)
    fp.compact(model, method.keep_masks(), x, optimizer=optimizer)
print(fp.__file__)
print([str(w.message) for w in caught])
"""
    done = run(code, PYTHONPATH=pure)
    assert done.returncode == 0, done.stderr
    where, messages = done.stdout.splitlines()
    assert where.startswith(pure)
    assert messages.count("did not load") == 1 and "eager PyTorch" in messages and messages.count("fastprune: ") == 1


def test_doctor_of_a_pure_install_says_why(pure):
    done = run("import sys; from fastprune.cli import main; sys.exit(main(['doctor']))", PYTHONPATH=pure)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["cpp"])
    assert "not available" in line and "_C" in line
    assert "cpp" not in done.stdout.partition("self-check")[2]


def test_cpp_asked_for_by_name_is_refused_in_a_pure_install(pure):
    code = "import torch, fastprune as fp; fp.ops.batch_norm_act(torch.ones(2, 3, 4, 4), backend='cpp')"
    done = run(code, PYTHONPATH=pure)
    assert done.returncode == 1 and "BackendError" in done.stderr and "did not load" in done.stderr


def test_extension_is_there():
    """The suite runs on the backends it names; a build that failed must not shrink it."""
    assert bool(backends.build_info()) == HAS_CPP


def test_import_is_light():
    """No optional package, no Triton kernel, no GPU (Triton itself comes with torchvision)."""
    code = """
import sys
import fastprune
import torch
heavy = {"sklearn", "matplotlib", "timm", "pandas", "fastprune.kernels", "fastprune.quickstart"}
print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())
"""
    done = run(code)
    assert done.stdout == "[] False\n", done.stderr


def test_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" in project["dynamic"]


def test_lint_versions_agree():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lint"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert all(pin in hooks for pin in extra)
