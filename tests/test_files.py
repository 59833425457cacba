"""fastprune show, eval, compact, export and bench: what they do with good files, and what they say of bad ones."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune import cli, speed
from fastprune.train import evaluate


def call(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def refused(capsys, *argv) -> str:
    """The one line that a command says of bad input."""
    try:
        code, out, err = call(capsys, *argv)
    except SystemExit as stop:
        pytest.fail(f"{argv} left with {stop.code}")
    assert code in (1, 2) and out == "", (argv, out)
    assert err.startswith("fastprune: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network trained on digits for a moment, as a file."""
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    out = path.parent / "run"
    model, _ = fp.train("digits", "vgg-small", "ucs", epochs=2, device="cpu", progress=False, out_dir=out)
    fp.save(model, path, extra={"input": [1, 8, 8]})
    return path


@pytest.fixture(scope="module")
def small(trained):
    path = trained.parent / "small.safetensors"
    assert cli.main(["compact", str(trained), "--ratio", "0.5", "--out", str(path)]) == 0
    return path


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_compact_is_what_python_does(trained, small):
    model = fp.load(trained)
    method = fp.create("l1", model, X[:2], ratio=0.5)
    fp.compact(model, method.keep_masks(), X[:2])
    again = fp.load(small)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert fp.checkpoint.read(small)["method"]["name"] == "l1"
    assert fp.checkpoint.read(small)["extra"] == {"input": [1, 8, 8]}


def test_compact_by_target_and_options(capsys, trained, tmp_path):
    out = tmp_path / "out.safetensors"
    argv = ("--target-macs", "0.5", "--method", "slimming", "--set", "round_to=8", "--set", "coupled=true")
    code, said, _ = call(capsys, "compact", trained, *argv, "--out", out)
    assert code == 0 and "proven equal" in said
    model, before = fp.load(out), fp.flops(fp.load(trained), X[:1])["macs"]
    assert fp.flops(model, X[:1])["macs"] <= 0.5 * before
    assert all(m.out_channels % 8 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))


def test_compact_by_name(capsys, tmp_path):
    out = tmp_path / "out.safetensors"
    code, said, _ = call(
        capsys, "compact", "resnet20", "--classes", 10, "--input", "3x32x32", "--method", "rni", "--out", out
    )
    assert code == 0 and "its weights are random" in said
    assert fp.load(out)(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_compact_by_lists(capsys, trained, tmp_path):
    lists, out = tmp_path / "keep.json", tmp_path / "out.safetensors"
    lists.write_text(json.dumps({"features.0": [0, 3, 5], "features.3": list(range(31))}))
    code, said, _ = call(capsys, "compact", trained, "--keep", lists, "--out", out)
    assert code == 0 and "34 of 64 channels" in said
    model = fp.load(trained)
    first = torch.zeros(32, dtype=torch.bool)
    first[[0, 3, 5]] = True
    fp.compact(model, {"features.0": first, "features.3": torch.arange(32) < 31}, X[:2])
    assert torch.equal(model.eval()(X), fp.load(out).eval()(X))


@pytest.mark.parametrize(
    "lists, says",
    [
        ("[", "is no JSON"),
        ("[1]", "expected {"),
        ("{}", "expected {"),
        ('{"features.1": [0]}', "did you mean 'features.1"),
        ('{"features.0": [32]}', "from 0 to 31"),
        ('{"features.0": []}', "from 0 to 31"),
        ('{"features.0": [true]}', "from 0 to 31"),
        ('{"features.0": 3}', "from 0 to 31"),
    ],
)
def test_bad_lists(capsys, trained, tmp_path, lists, says):
    (tmp_path / "keep.json").write_text(lists)
    out = tmp_path / "out.safetensors"
    assert says in refused(capsys, "compact", trained, "--keep", tmp_path / "keep.json", "--out", out)
    assert not out.exists()


def test_eval_is_what_python_finds(capsys, small):
    code, said, _ = call(capsys, "eval", small, "--dataset", "digits", "--device", "cpu", "--latency")
    data = fp.data.load("digits")
    acc = evaluate(fp.load(small), data.loaders(250).test)["acc"]
    assert code == 0 and f"{acc:.2%} right of 360 test images" in said and "whole, without hooks" in said


def test_eval_sees_images_as_the_run_did(capsys, small, tmp_path):
    path = tmp_path / "pruned.safetensors"
    path.write_bytes(small.read_bytes())
    (tmp_path / "recipe.yaml").write_text("data: {name: digits, mean: [0.2], std: [0.9]}\n")
    code, said, _ = call(capsys, "eval", path, "--dataset", "digits", "--device", "cpu")
    test = fp.data.load("digits", mean=(0.2,), std=(0.9,)).loaders(250).test
    assert code == 0 and f"{evaluate(fp.load(path), test)['acc']:.2%} right" in said and "mean [0.2]" in said
    (tmp_path / "recipe.yaml").write_text("data: [")
    assert "recipe.yaml: no valid YAML" in refused(capsys, "eval", path, "--dataset", "digits")


def test_show(capsys, small, trained):
    code, said, _ = call(capsys, "show", small, "--lists")
    macs, params = ([fp.flops(fp.load(p), X[:1])[key] for p in (small, trained)] for key in ("macs", "params"))
    assert code == 0
    assert f"{params[0]:,} of {params[1]:,} ({params[0] / params[1]:.1%})" in said
    assert f"{macs[0]:,} of {macs[1]:,} ({macs[0] / macs[1]:.1%}), for an input of 1x8x8" in said
    assert "method      l1, ratio 0.5, scope local" in said
    assert re.search(r"features\.3\.weight +16 of 32 +16 of 32", said)
    kept = fp.checkpoint.read(small)["keep"]["features.0.weight"]["dims"][0]
    line = re.search(r"features\.0\.weight 0: (.*)", said)[1]
    shown = [i for part in line.split(", ") for i in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)]
    assert shown == [i for a, b in zip(kept[::2], kept[1::2], strict=True) for i in range(a, b)]
    code, said, _ = call(capsys, "show", small, "--json")
    assert json.loads(said)["method"]["name"] == "l1"
    assert "nothing was removed" in call(capsys, "show", trained)[1]


def test_size_of_an_input_is_the_runs(capsys, trained, tmp_path):
    fp.save(fp.load(trained), path := tmp_path / "dense.safetensors")
    assert "say of which input" in call(capsys, "show", path)[1]
    (tmp_path / "run.json").write_text('{"data": {"image_shape": [1, 8, 8]}}')
    assert "for an input of 1x8x8" in call(capsys, "show", path)[1]
    for bad in (
        "[",
        "{}",
        '{"data": []}',
        '{"data": {"image_shape": [1, 30000, 30000]}}',
        '{"data": {"image_shape": 3}}',
    ):
        (tmp_path / "run.json").write_text(bad)
        assert "say of which input" in call(capsys, "show", path)[1]


def test_show_a_run(capsys, trained):
    code, said, _ = call(capsys, "show", trained.parent / "run")
    assert code == 0 and "state    finished" in said and "vgg-small" in said


def test_export(capsys, small, tmp_path):
    out = tmp_path / "small.pt2"
    code, said, _ = call(capsys, "export", small, "--out", out, "--fold")
    assert code == 0 and "x (batch, 1, 8, 8)" in said
    got = torch.export.load(out).module()(X)
    torch.testing.assert_close(got, fp.load(small).eval()(X), rtol=1e-4, atol=1e-5)
    beside = tmp_path / "beside.safetensors"
    beside.write_bytes(small.read_bytes())
    code, said, _ = call(capsys, "export", beside, "--format", "onnx", "--batch", "3")
    assert code == 0 and "x (3, 1, 8, 8)" in said and (tmp_path / "beside.onnx").stat().st_size > 1000


OWN = """
from torch import nn
from helper import WIDTH

def make():
    return nn.Sequential(nn.Conv2d(1, WIDTH, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * WIDTH, 10))

def fails():
    raise KeyError("no weights here")

nothing = 3
"""


@pytest.fixture
def own(tmp_path):
    """A network of the user's own, saved and cut."""
    (tmp_path / "helper.py").write_text("WIDTH = 6\n")
    (tmp_path / "net.py").write_text(OWN)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    fp.save(fp.compact(model, {"0": torch.arange(6) < 4}, X), tmp_path / "own.safetensors")
    return tmp_path


def test_own_network(capsys, own):
    path, make = own / "own.safetensors", f"{own}/net.py:make"
    assert "build it yourself" in call(capsys, "show", path)[1]
    out = own / "less.safetensors"
    argv = ("--model", make, "--input", "1x8x8", "--ratio", "0.5")
    assert call(capsys, "compact", path, *argv, "--out", out)[0] == 0
    code, said, _ = call(capsys, "eval", out, "--model", make, "--dataset", "digits", "--limit", 50)
    assert code == 0 and "of 50 test images" in said
    for bad, says in (
        ("net.py", "expected FILE.py:FUNCTION"),
        (f"{own}/none.py:make", "there is no file"),
        (f"{own}/net.py:mak", "has no function mak"),
        (f"{own}/net.py:nothing", "has no function nothing"),
        (f"{own}/net.py:fails", "KeyError"),
    ):
        assert says in refused(capsys, "eval", path, "--model", bad, "--dataset", "digits")
    (own / "broken.py").write_text("def (")
    assert "SyntaxError" in refused(capsys, "export", path, "--model", f"{own}/broken.py:make", "--format", "pt2")


@pytest.mark.parametrize(
    "argv, says",
    [
        (("compact", "NET", "--out", "OUT", "--method", "l11"), "did you mean 'l1'"),
        (("compact", "NET", "--out", "OUT", "--method", "greg-1"), "needs training steps"),
        (("compact", "NET", "--out", "OUT", "--method", "22"), "needs training steps"),
        (("compact", "NET", "--out", "OUT", "--set", "rund_to=8"), "did you mean 'round_to'"),
        (("compact", "NET", "--out", "OUT", "--set", "round_to=x"), "must be int | None"),
        (("compact", "NET", "--out", "OUT", "--set", "round_to"), "expected name=value"),
        (("compact", "NET", "--out", "OUT", "--set", "group=weight"), "single weights"),
        (("compact", "NET", "--out", "OUT", "--ratio", "1.5"), "ratio"),
        (("compact", "NET", "--out", "OUT", "--ratio", "featurs.*:0.5"), "featurs"),
        (("compact", "NET", "--out", "OUT", "--ratio", "0.5", "--target-macs", "0.5"), "a ratio or a target"),
        (("compact", "NET", "--out", "OUT", "--target-macs", "1e-9"), "target_macs"),
        (("compact", "NET", "--out", "OUT", "--target-macs", "-1"), "above 0"),
        (("compact", "NET", "--out", "OUT", "--keep", "none.json"), "none.json"),
        (("compact", "NET", "--out", "OUT", "--keep", "none.json", "--ratio", "0.5"), "--keep says all"),
        (("compact", "NET", "--out", "OUT", "--input", "3x8x8"), "does not run on an input of 3x8x8"),
        (("compact", "NET", "--out", "OUT", "--input", "8x8"), "such as 3x224x224"),
        (("compact", "NET", "--out", "OUT", "--classes", "10"), "networks by name"),
        (("compact", "NET", "--out", "no/folder/x.safetensors"), "there is no folder"),
        (("compact", "NET", "--out", "."), ". is a folder"),
        (("compact", "resnet2", "--out", "OUT", "--input", "3x8x8"), "did you mean 'resnet20'"),
        (("compact", "resnet20", "--out", "OUT"), "--input 3x224x224"),
        (("compact", "resnet20", "--out", "OUT", "--weights", "DEFAULT", "--input", "3x32x32"), "resnet20 is no"),
        (("compact", "resnet18", "--out", "OUT", "--weights", "DEFALT", "--input", "3x32x32"), "mean 'DEFAULT'"),
        (("eval", "none", "--dataset", "digits"), "expected a checkpoint at none"),
        (("export", "NET", "--out", "no/folder/x.onnx"), "there is no folder no/folder"),
        (("report", "NET", "--out", "no/folder/x.html"), "there is no folder no/folder"),
        (("eval", "NET", "--dataset", "cifar10", "--root", "none"), "none"),
        (("eval", "NET", "--dataset", "digts"), "did you mean 'digits'"),
        (("eval", "NET", "--dataset", "synthetic"), "does not run on images of synthetic"),
        (("eval", "NET", "--dataset", "digits", "--set", "image_size=9"), "has no option 'image_size'"),
        (("eval", "NET", "--dataset", "synthetic", "--set", "size=-3"), "expected size >= 1, got -3"),
        (("eval", "NET", "--dataset", "synthetic", "--set", "size=x"), "mend what --set says"),
        (("eval", "NET", "--dataset", "synthetic", "--set", "classes=1000000000000"), "mend what --set says"),
        (("eval", "NET", "--dataset", "digits", "--device", "cuda:77"), "no device"),
        (("eval", "NET", "--dataset", "digits", "--device", "meta"), "no device"),
        (("eval", "NET"), "--dataset"),
        (("export", "NET"), "--format onnx or pt2"),
        (("export", "NET", "--format", "pt"), "invalid choice: 'pt'"),
        (("export", "NET", "--out", "x.pt"), ".onnx"),
        (("export", "NET", "--out", "x.pt2", "--format", "onnx"), "does not fit"),
        (("export", "NET", "--out", "no/x.pt2"), "no"),
        (("export", "NET", "--format", "pt2", "--opset", "18", "--out", "x.pt2"), "opset"),
        (("export", "NET", "--format", "pt2", "--input", "99999x9999x9999"), "does not run on an input"),
        (("show", "none.safetensors"), "none.safetensors"),
        (("show", "."), "holds no run"),
        (("bench", "batch_norm"), "did you mean 'batch_norm_act'"),
        (("report", "."), "holds no run"),
    ],
)  # fmt: skip
def test_bad_usage(capsys, monkeypatch, trained, tmp_path, argv, says):
    monkeypatch.chdir(tmp_path)
    argv = [{"NET": trained, "OUT": tmp_path / "out.safetensors"}.get(arg, arg) for arg in argv]
    assert says in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def damaged(good: bytes):
    yield "empty", b""
    for n in (1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        yield f"first {n} bytes", good[:n]
    yield "text", b"hello\n"
    yield "zeros", bytes(1000)
    yield "longer", good + b"x"
    yield "flipped", good[:-40] + bytes([good[-40] ^ 1]) + good[-39:]
    yield "zip", b"PK\3\4" + bytes(100)


def test_damaged_files(capsys, trained, tmp_path, monkeypatch):
    """Every command, every kind of damage, what is no file at all: one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.safetensors"
    commands = [
        ("show", bad), ("eval", bad, "--dataset", "digits"), ("compact", bad, "--out", "out.safetensors"),
        ("export", bad, "--format", "pt2"),
    ]  # fmt: skip
    for what, content in damaged(trained.read_bytes()):
        bad.write_bytes(content)
        for argv in commands[: 1 if what == "flipped" else None]:
            if what == "flipped":  # show reads the document; the tensors are checked where the network is built
                assert "unknown: " in call(capsys, *argv)[1]
            else:
                assert "bad.safetensors" in refused(capsys, *argv)
        if what == "flipped":
            for argv in commands[1:]:
                assert "bad.safetensors" in refused(capsys, *argv)
        bad.unlink()
    bad.mkdir()
    for argv in commands:
        assert "bad.safetensors" in refused(capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_bench(capsys, monkeypatch):
    monkeypatch.setattr(speed, "SAMPLE_MS", 0.1)
    monkeypatch.setattr(speed, "SHAPES", {"deep": (2, 8, 4, 4)})
    names = [name for name in speed.CASES if name != "train_step"]
    code, said, _ = call(capsys, "bench", *names, "--rounds", 2, "--device", "cpu")
    assert code == 0
    for name in names:
        assert re.search(rf"\| {name} .*\d\.\d\dx", said)


@pytest.mark.parametrize("name", speed.CASES)
def test_both_sides_of_a_bench_compute_the_same(name, monkeypatch):
    """Same inputs, no state that one side leaves to the other, equal results where the call returns some."""
    monkeypatch.setattr(speed, "SHAPES", {"deep": (4, 8, 6, 6)})
    for _, (eager, ours), _ in speed.CASES[name]("cpu"):
        a, b = eager(), ours()  # an optimizer's step returns nothing; tests/test_growing_sgd.py compares those
        assert name == "growing_sgd" or a is not None
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
