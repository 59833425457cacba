"""Who may import whom.  Reads sources only: runs without torch, and finds imports inside functions and strings too."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A unit imports itself, units on its own line without making a circle, and lines above.
LAYERS = (
    ("kernels",),
    ("errors", "version"),
    ("backends", "memory", "parallel"),
    ("ops",),
    ("nn",),
    ("surgery", "labels", "rules", "graph", "flops", "models", "optim"),
    ("select", "ratios", "compact", "gates", "correlation", "hessian", "cutting", "growing", "oracle", "trainability"),
    ("checkpoint", "plain", "export"),
    ("latency", "budget"),
    ("methods",),
    ("capture",),
    ("data", "train"),
    ("__init__",),  # the public names
    ("recipes", "run", "doctor", "quickstart", "study", "report", "files", "speed"),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

# What `pip install fastprune` brings; all else is imported where it is needed, with the install command on failure.
INSTALLED = {"torch", "torchvision", "numpy", "safetensors", "yaml", "tqdm", "PIL", "fastprune"}


def sources() -> dict[Path, str]:
    """Python file to its module name, "fastprune.ops.batch_norm_act", "fastprune.ops.__init__"."""
    folders = {"fastprune": ROOT / "fastprune", "fastprune.kernels": ROOT / "kernels"}
    return {
        path: ".".join((name, *path.relative_to(folder).with_suffix("").parts))
        for name, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, name) of all that ``module`` imports: absolute, relative, in functions, and modules named in strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += [node.module] if node.module else []
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if match := re.match(r"fastprune(\.\w+)+", node.value):  # import_module("fastprune.kernels." ...)
                found.append((node.lineno, match[0]))
    return found


def unit_of(module: str) -> str | None:
    """Unit that ``module`` belongs to; None for somebody else's and for the compiled libraries."""
    package, unit = [*module.split("."), "", ""][:2]
    if package != "fastprune" or unit in ("_C", "_C_cuda"):
        return None
    is_unit = unit in RANK or (ROOT / "fastprune" / unit).is_dir() or (ROOT / "fastprune" / f"{unit}.py").is_file()
    return unit if unit and is_unit else "__init__"  # else a public name: from fastprune import create


def upward(source: str, module: str) -> list[str]:
    """Imports that the order forbids."""
    unit = unit_of(module)
    found = [(line, name, unit_of(name)) for line, name in imports(source, module)]
    return [f"line {line}: {unit} imports {name}" for line, name, to in found if to and RANK[to] > RANK[unit]]


EACH = pytest.mark.parametrize("path, module", sources().items(), ids=sources().values())


def test_every_unit_has_a_layer():
    unknown = {unit_of(module) for module in sources().values()} - set(RANK)
    assert not unknown, f"put {sorted(unknown)} into LAYERS of tests/test_layers.py"


@EACH
def test_imports_go_down(path, module):
    assert upward(path.read_text(), module) == []
    names = {name.split(".")[0] for _, name in imports(path.read_text(), module)}
    assert not names & {"bench", "recipes", "scripts", "tests"}


def test_no_circles():
    graph = {unit: set() for unit in RANK}
    for path, module in sources().items():
        graph[unit_of(module)] |= {unit_of(name) for _, name in imports(path.read_text(), module)}
    for unit, below in graph.items():
        below -= {None, unit}
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@EACH
def test_optional_packages_are_imported_late(path, module):
    allowed = INSTALLED | set(sys.stdlib_module_names) | ({"triton"} if unit_of(module) == "kernels" else set())
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for node in top for _, name in imports(ast.unparse(node), module)}
    assert names <= allowed, f"import {sorted(names - allowed)} inside the function that needs it"


@pytest.mark.parametrize(
    "source",
    [
        "import fastprune.cli",
        "from fastprune.nn import SigmoidBatchNorm2d",
        "from fastprune import graph",
        "from fastprune import create",
        "from ..methods import rni",
        "def f():\n    from fastprune.train import loop",
        "import_module('fastprune.compact')",
    ],
)
def test_the_test_sees_each_kind_of_import(source):
    assert len(upward(source, "fastprune.ops.some_op")) == 1
    assert upward("from . import other_op\nfrom fastprune import backends, _C", "fastprune.ops.some_op") == []


def test_kernels_in_cpp_know_nothing_of_torch():
    """They are compiled once per instruction set or by nvcc; torch's headers would cost half a minute each time."""
    kernels = [*ROOT.glob("csrc/cpu/*_kernel.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
    assert {path.suffix for path in kernels} == {".cpp", ".cu"}
    seen = set()
    while kernels:
        path = kernels.pop()
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE):
            assert not re.match(r"(torch|ATen|c10|pybind11|Python\.h)\b", header), f"{path.name} includes {header}"
            for folder in (path.parent, ROOT / "csrc"):
                local = (folder / header).resolve()
                if local.is_file() and local not in seen:
                    seen.add(local)
                    kernels.append(local)
