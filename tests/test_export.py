"""Exported files: right on other inputs than those they were traced with, free of fastprune, not there when wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from graph_cases import PATTERNS, Lambda, stir, uneven_keep
from torch import nn
from torch.nn import functional as F

import fastprune as fp
from fastprune import export as export_function
from fastprune.errors import ExportError
from fastprune.nn import SigmoidBatchNorm2d
from fastprune.surgery import leaves

export = sys.modules["fastprune.export"]
assert export_function is fp.export  # the function hides its module

# The large networks, as many as there are families, are in bench/e2e/export.py: an ONNX export takes seconds.
NETWORKS = ("depthwise", "squeeze_excite", "dense", "channel_shuffle_by_view", "bounded_norm_with_residual")


def pruned(name: str) -> tuple[nn.Module, torch.Tensor]:
    model, x = stir(PATTERNS[name]()).eval(), torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names what cannot be fused
        fp.nn.convert_batchnorm(model, bound="sigmoid")
    graph = fp.graph.trace(model, x)
    return fp.compact(model, uneven_keep(graph), x, graph=graph), x


def net(*options, seed: int = 0, **more) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SigmoidBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return stir(model).to(*options, **more)


READ_ARCHIVE = """
import sys, numpy, torch
sys.modules["fastprune"] = None
model = torch.export.load(sys.argv[1]).module()
numpy.save(sys.argv[3], model(torch.from_numpy(numpy.load(sys.argv[2]))).detach().numpy())
"""
READ_ONNX = """
import sys, numpy, onnxruntime
assert "torch" not in sys.modules
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})[0])
"""


@pytest.mark.parametrize("suffix, code", [(".pt2", READ_ARCHIVE), (".onnx", READ_ONNX)])
def test_files_run_without_fastprune(suffix, code, tmp_path):
    model, x = pruned("bounded_norm_with_residual")
    path = tmp_path / f"model{suffix}"
    model.train()
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    report = fp.export(model, path, x)
    assert [type(m) for m in model.modules()] == classes and all(m.training for m in model.modules())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and report.bytes == path.stat().st_size
    other = torch.randn(7, 3, 16, 16)
    np.save(tmp_path / "x.npy", other.numpy())
    files = [str(tmp_path / name) for name in (path.name, "x.npy", "y.npy")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), model.eval()(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS[:-1])
def test_pruned_networks(name, tmp_path):
    model, x = pruned(name)
    for suffix, format in ((".pt2", "torch.export"), (".onnx", "onnx")):
        report = fp.export(model, tmp_path / f"m{suffix}", x)
        assert report.format == format and (report.opset is not None) == (suffix == ".onnx")
        assert list(report.inputs.values()) == [("batch", *x.shape[1:])]
        assert [shape[0] for shape in report.outputs.values()] == ["batch"]
        assert report.difference <= max(1e-5, 10 * report.eager_difference) and report.eager_difference < 1e-4
        assert f"{format}{f', opset {report.opset}' if report.opset else ''}, {report.bytes / 1e6:.2f} MB" in str(
            report
        )


class Several(nn.Module):
    """Two inputs, one of them whole numbers without a batch, and outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scales = nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)

    def forward(self, image: torch.Tensor, which: torch.Tensor, *, again: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.conv(image) * self.scales(which).sum(0)[:, None, None]
        return {"main": y.mean((2, 3)), "aux": [y.amax((2, 3)) + again]}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_several_inputs_and_outputs(suffix, tmp_path):
    inputs = {"again": torch.randn(2, 4), "which": torch.tensor([1, 4, 2]), "image": torch.randn(2, 3, 8, 8)}
    report = fp.export(Several(), tmp_path / f"m{suffix}", inputs)
    assert report.inputs == {"image": ("batch", 3, 8, 8), "which": (3,), "again": ("batch", 4)}
    assert list(report.outputs.values()) == [("batch", 4), ("batch", 4)]


@pytest.mark.parametrize("names", [("out", "features"), ("out", "image"), (0, 1)])
def test_outputs_in_a_dictionary_keep_their_names(names, tmp_path):
    """Unless ONNX has no such names: those of inputs, or numbers."""

    class Named(nn.Conv2d):
        def forward(self, image: torch.Tensor) -> dict[str | int, torch.Tensor]:
            y = super().forward(image)
            return dict(zip(names, (y.mean((2, 3)), y), strict=True))

    model, x = Named(3, 4, 3), torch.randn(2, 3, 8, 8)
    outputs = fp.export(model, tmp_path / "m.onnx", x).outputs
    assert list(outputs.values()) == [("batch", 4), ("batch", 4, 6, 6)]
    assert (tuple(outputs) == names) == (names == ("out", "features"))
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "m.onnx")
    got = session.run(list(outputs), {"image": x.numpy()})
    assert all(torch.allclose(torch.from_numpy(a), t, atol=1e-5) for a, t in zip(got, model(x).values(), strict=True))


def test_one_image_and_a_fixed_batch(tmp_path):
    path, x = tmp_path / "m.pt2", torch.randn(1, 3, 8, 8)
    assert fp.export(net(), path, (x,)).inputs.popitem()[1] == ("batch", 3, 8, 8)
    report = fp.export(net(), path, x, dynamic_batch=False, check=False)
    assert report.inputs.popitem()[1] == (1, 3, 8, 8)
    assert report.difference is None and "not checked" in str(report)


def test_a_batch_that_the_code_fixes(tmp_path):
    model = Lambda(lambda m, x: m.conv(x).view(2, -1), conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(ExportError, match=r"torch\.export fails, .*pass dynamic_batch=False"):
        fp.export(model, tmp_path / "m.pt2", torch.randn(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())
    fp.export(model, tmp_path / "m.pt2", torch.randn(2, 3, 8, 8), dynamic_batch=False)


def test_layouts_and_dtypes(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = net(dtype)
        report = fp.export(model, tmp_path / "m.pt2", x.to(dtype))
        assert report.difference <= 10 * report.eager_difference
        assert {t.dtype for t in torch.export.load(tmp_path / "m.pt2").parameters()} == {dtype}
        if dtype == torch.float16:
            report = fp.export(model, tmp_path / "m.onnx", x.to(dtype))
            assert 0 < report.difference < 1e-2
        else:
            with pytest.raises(ExportError, match=rf"no {str(dtype)[6:]} convolutions on the CPU.*\.float\(\)"):
                fp.export(model, tmp_path / "n.onnx", x.to(dtype))
    model, x = net(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    fp.export(model, tmp_path / "m.pt2", x)
    weights = [p for p in torch.export.load(tmp_path / "m.pt2").parameters() if p.dim() == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert {p.name for p in tmp_path.iterdir()} == {"m.pt2", "m.onnx"}


def test_opset_one_image_and_weights_of_2_gb(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_ONE_FILE", 100)
    report = fp.export(net(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8), opset=18)
    assert report.opset == 18 and report.inputs.popitem()[1] == ("batch", 3, 8, 8)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_an_opset_that_is_too_old(tmp_path):
    with pytest.raises(ExportError, match=r"torch\.onnx"):
        fp.export(net(), tmp_path / "n.onnx", torch.randn(2, 3, 8, 8), opset=7)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """Files of another network of the same shapes; one takes a batch of 2 only."""
    folder, x = tmp_path_factory.mktemp("another"), torch.randn(2, 3, 8, 8)
    model = net(seed=1)
    fp.export(model, folder / "m.onnx", x, check=False)
    fp.export(model, folder / "m.pt2", x, check=False)
    fp.export(model, folder / "fixed.pt2", x, check=False, dynamic_batch=False)
    return folder


@pytest.mark.parametrize("file, what", [
    ("m.onnx", "wrong"), ("m.onnx", "cut off"), ("m.pt2", "wrong"), ("m.pt2", "cut off"), ("m.pt2", "for one size"),
    ("m.pt2", "not finite"),
])  # fmt: skip
def test_a_file_that_is_not_right_is_not_there(file, what, another, tmp_path, monkeypatch):
    path, x = tmp_path / file, torch.randn(2, 3, 8, 8)
    path.write_text("the last good one")
    writer = "_write_onnx" if file == "m.onnx" else "_write_archive"
    write = getattr(export, writer)

    def spoilt(program, file, *more):
        source = (another / ("fixed.pt2" if what == "for one size" else file.name)).read_bytes()
        if what == "not finite":
            next(iter(program.state_dict.values())).data.fill_(float("nan"))
            return write(program, file, *more)
        file.write_bytes(source[:-1000] if what == "cut off" else source)
        return (18, {}, {}) if more else ({}, {})

    monkeypatch.setattr(export, writer, spoilt)
    words = {"cut off": "cannot read the file", "for one size": "the file does not run with a batch of 1"}
    with pytest.raises(ExportError, match=words.get(what, "the file computes something else with a batch of 2")):
        fp.export(net(seed=1 if what == "for one size" else 2), path, x)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == "the last good one"


def test_arguments_in_words(tmp_path, monkeypatch):
    x = torch.randn(2, 3, 8, 8)
    for path, options, match in (
        ("m.pt", {}, r"expected a path that ends in '\.pt2' or '\.onnx', got"),
        ("m.pt2", {"format": "onnx"}, r"expected a path that ends in '\.onnx', got"),
        ("m.onnx", {"format": "onyx"}, r"unknown format 'onyx'; did you mean 'onnx'\?"),
        ("m.pt2", {"opset": 18}, r"opset is ONNX's; leave it out for \.pt2, got 18"),
        ("no/m.pt2", {}, r"expected a path in an existing folder"),
    ):
        with pytest.raises(ValueError, match=match):
            fp.export(net(), tmp_path / path, x, **options)
    with pytest.raises(ValueError, match=r"expected example_inputs with tensors, got list"):
        fp.export(net(), tmp_path / "m.pt2", [])
    with pytest.raises(ExportError, match=r"needs a model that runs in float64, .*check=False"):
        fp.export(Lambda(lambda m, x: m.conv(x.float()), conv=nn.Conv2d(3, 4, 3)), tmp_path / "m.pt2", x)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name in ("onnxscript", "onnxruntime") else name)
    with pytest.raises(ExportError, match=r"^export: onnxscript and onnxruntime not installed; pip install 'fastprune"):
        fp.export(net(), tmp_path / "m.onnx", x)
    with pytest.raises(ExportError, match=r"^export: onnxscript not installed"):
        fp.export(net(), tmp_path / "m.onnx", x, check=False)
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_cannot_be_checked(tmp_path):
    for dtype, factor in ((torch.float32, float("inf")), (torch.float16, 1e5)):  # the latter only in float16
        model = net(dtype)
        model[3].weight.data.mul_(factor)
        with pytest.raises(ExportError, match=r"the model's output is not finite with a batch of 2"):
            fp.export(model, tmp_path / "m.pt2", torch.randn(2, 3, 8, 8).to(dtype))
    model = net()
    model.generator = (i for i in ())
    with pytest.raises(ExportError, match=r"expected a model that copy\.deepcopy can copy, TypeError: cannot pickle"):
        fp.export(model, tmp_path / "m.pt2", torch.randn(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_our_ops_called_by_a_forward_become_aten(tmp_path):
    def run(m, x):
        scale = torch.full((4,), 2.0, dtype=x.dtype)
        return F.relu(fp.ops.channel_gate(m.conv(x), scale))

    x = torch.randn(2, 3, 8, 8)
    fp.export(Lambda(run, conv=nn.Conv2d(3, 4, 3)), tmp_path / "m.pt2", x)
    program = torch.export.load(tmp_path / "m.pt2")
    assert not any("fastprune" in str(n.target) for n in program.graph.nodes)
    assert len(leaves(program.module()(x))) == 1


def test_committed_page():
    """The table of all networks is what the numbers say, and the numbers keep what fp.export promises."""
    from bench.e2e import export as bench

    results = json.loads(bench.OUT.read_text())
    assert bench.page(results) == bench.OUT.with_suffix(".md").read_text()
    rows = [row for row in results["rows"] if "error" not in row]
    assert rows
    for row in rows:
        assert row["ours_left"] == 0 and row["plain"] < 1e-12 and row["fold"] < 1e-9, row["net"]
        for suffix in (".pt2", ".onnx"):
            assert row[suffix]["difference"] <= max(1e-5, 10 * row[suffix]["eager"]), row["net"]
