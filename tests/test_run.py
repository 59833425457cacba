"""fastprune run: every family end to end in small, what a run leaves, resumption, and the command line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import fastprune as fp
from fastprune import cli, parallel, recipes, run
from fastprune.errors import TrainingError
from fastprune.train import MetricsLog, evaluate

QUIET = {"device": "cpu", "tiny": True, "progress": False, "say": lambda line: None}


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    """How often the command line tuned the memory of its process, which would stay on for the tests that follow."""
    calls = []
    monkeypatch.setattr(fp, "tune_cpu_memory", lambda: calls.append(1))
    return calls


def read(out):
    """(run.json, result.json, metrics, importances)"""
    run_json, result = (json.loads((out / f"{name}.json").read_text()) for name in ("run", "result"))
    return run_json, result, MetricsLog.read(out / "metrics.jsonl"), MetricsLog.read(out / "importances.jsonl")


def comparable(out):
    """All of a run that must not depend on when and how fast it ran."""
    run_json, result, metrics, importances = read(out)
    for block in result["phases"].values():
        del block["seconds"]
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in metrics]
    networks = {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}
    return {k: v for k, v in run_json.items() if k != "started"}, result, rows, importances, networks


SMALL = {"model.name": "resnet20", "data.options.size": 8}  # in place of ImageNet's networks
FAMILIES = {  # recipe: changes
    "rni/vgg16-cifar10-rni-0.5": {},
    "greg/vgg19-cifar100-greg2-0.5": {},
    "greg/resnet50-imagenet-unstructured-greg1-0.827": {**SMALL, "prune.ratio": 0.8},
    "fisher/densenet-bc-100-fisher-scratch": {},
    "fisher/wrn-reduced-depth16": {},
    "taylor/resnet50-imagenet-72": {**SMALL, "prune.options.max_removed": 60, "prune.options.per_cut": 30},
    "tpp/vgg19-cifar100-tpp-0.5": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs(name, tmp_path):
    said = []
    out = run.run(name, changes=FAMILIES[name], runs=tmp_path, seed=3, **{**QUIET, "say": said.append})
    recipe = recipes.load(name, tiny=True, changes={**FAMILIES[name], "seed": 3})
    assert out == tmp_path / "tiny" / name / "seed3"
    facts, result, metrics, importances = read(out)
    assert recipes.load(str(out / "recipe.yaml")) == recipe
    assert facts["phases"] == list(result["phases"]) == list(recipe.phases) and result["finished"]
    assert (facts["seed"], facts["tiny"], facts["device"], facts["set"]) == (3, True, "cpu", FAMILIES[name])
    assert facts["data"]["image_shape"][0] == 3 and facts["data"]["train_images"] == recipe.data.options["n_train"]
    assert not list(out.glob("*.pt")) and not list(out.glob("*.tmp")) and not (out / "start.safetensors").exists()
    if recipe.base:  # was done first, and said so
        assert said[0].startswith(f"{name} starts from {recipe.base.recipe}, which is not there")
        assert facts["base"]["recipe"] == recipe.base.recipe
        base = json.loads((tmp_path / "tiny" / recipe.base.recipe / "seed3" / "result.json").read_text())
        assert facts["base"]["acc"] == base["phases"]["train"]["acc"]

    images = run.load_data(recipe, None)
    example = run.example_of(images)
    dense = fp.load(out / "dense.safetensors")
    before = fp.flops(dense, example[:1])
    assert result["dense"] == {"macs": before["macs"], "params": before["params"]}
    for phase, block in result["phases"].items():
        rows = [row for row in metrics if row["phase"] == phase]
        assert [row["epoch"] for row in rows] == list(range(block["epochs"]))
        if rows:
            assert block["steps"] == rows[-1]["step"] and block["acc_last"] == rows[-1]["test_acc"]
            assert block["acc_best"] == max(row["test_acc"] for row in rows) == rows[block["epoch_best"]]["test_acc"]
        assert all(kept <= of for kept, of in block["kept"].values())
    network = run.NETWORKS[phase]
    small = fp.load(out / f"{network}.safetensors")
    after = fp.flops(small, example[:1])
    assert (block["macs"], block["params"]) == (after["macs"], after["params"])
    fused = fp.nn.convert_batchnorm(small, fuse=True)
    assert evaluate(fused, images.loaders(64).test)["acc"] == block["acc"]
    assert {row["name"]: [kept["out_channels"], row["out_channels"]] for row, kept in zip(
        before["layers"], after["layers"], strict=True)} == block["kept"]  # fmt: skip
    if recipe.prune is None:
        assert after["macs"] == before["macs"]
        return
    channels = result["phases"]["prune"]["channels"]
    if recipe.prune.compact:
        assert after["macs"] < before["macs"] and after["params"] < before["params"]
        for layer, (kept, of) in channels.items():
            if layer in block["kept"]:
                assert block["kept"][layer] == [kept, of]
    else:
        gone = sum(of - kept for kept, of in channels.values())
        assert after["macs"] == before["macs"] and result["phases"]["finetune"]["zeros"] == gone > 0
    for row in importances:
        assert len(row["edges"]) == len(row["counts"]) + 1 == run.BINS + 1
        assert row["edges"] == sorted(row["edges"])
    assert {row["phase"] for row in importances} >= {"prune"}
    last = [row for row in importances if row["phase"] == "prune" and row["epoch"] == importances[-1]["epoch"]]
    scored = {row["group"] for row in last}
    assert scored <= set(channels) | {key.removesuffix(".weight") for key in channels} and scored


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "name, where", [("greg/vgg19-cifar100-greg1-0.7", "epoch"), ("fisher/wrn-40-2-fisher-scratch", "file")]
)
def test_resumed_runs_end_bit_for_bit_the_same(name, where, tmp_path, monkeypatch):
    """Stopped before the n-th row, or the n-th JSON file, is written: n = 1, then 2 in what is left of it, ..."""
    base = recipes.load(name).base.recipe
    straight = run.run(name, runs=tmp_path / "a", **QUIET)
    write, write_json = run.PhaseLog.write, run._write_json
    for n in range(1, 20):
        calls = iter(range(1, 100))

        def stop(call, *args, n=n, calls=calls):
            if next(calls) == n:
                raise Killed
            call(*args)

        with monkeypatch.context() as patch:
            if where == "epoch":
                patch.setattr(run.PhaseLog, "write", lambda self, row, stop=stop: stop(write, self, row))
            else:
                patch.setattr(run, "_write_json", lambda path, content, stop=stop: stop(write_json, path, content))
            try:
                run.run(name, runs=tmp_path / "b", resume=True, **QUIET)
            except Killed:
                continue
        break
    assert n > 3  # so often it was stopped, and one
    out = tmp_path / "b" / "tiny" / name / "seed0"
    for got, expected in zip(comparable(out), _moved(comparable(straight), straight, out), strict=True):
        assert got == expected
    seed = f"tiny/{base}/seed0"
    assert comparable(tmp_path / "b" / seed)[1:] == comparable(tmp_path / "a" / seed)[1:]


def _moved(what, old, new):
    """The paths in run.json are those of another folder."""
    facts, *rest = what
    return (json.loads(json.dumps(facts).replace(str(old.parents[3]), str(new.parents[3]))), *rest)


def test_a_folder_is_never_overwritten(tmp_path):
    name = "fisher/wrn-reduced-depth16"
    out = run.run(name, runs=tmp_path, **QUIET)
    before = comparable(out)
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        run.run(name, runs=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"another recipe: train.lr was 0.1 then, and is 0.05 now"):
        run.run(name, runs=tmp_path, resume=True, changes={"train.lr": 0.05}, **QUIET)
    assert run.run(name, runs=tmp_path, resume=True, **QUIET) == out  # nothing left to do
    assert comparable(out) == before
    other = run.run(name, runs=tmp_path, seed=1, **QUIET)
    assert other != out and (other / "dense.safetensors").read_bytes() != (out / "dense.safetensors").read_bytes()


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    name = "fisher/wrn-reduced-depth16"
    out = run.folder(recipes.load(name, tiny=True), True, tmp_path)
    out.mkdir(parents=True)
    other = os.open(out, os.O_RDONLY)  # a lock of another process, as far as the system is concerned
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is at the run in "):
            run.run(name, resume=True, runs=tmp_path, **QUIET)
        assert not list(out.iterdir())
    finally:
        os.close(other)
    run.run(name, resume=True, runs=tmp_path, **QUIET)


def test_a_base_of_another_recipe_is_named(tmp_path):
    base, name = "rni/vgg16-cifar10-ucs-train", "rni/vgg16-cifar10-ucs-0.5"
    run.run(base, runs=tmp_path, changes={"train.lr": 0.05}, **QUIET)
    said = []
    run.run(name, runs=tmp_path, **{**QUIET, "say": said.append})
    assert said[0].endswith("of another recipe: train.lr was 0.05 then, and is 0.1 now") and len(said) == 3
    other = {"data.mean": [0.5, 0.5, 0.5], "data.std": [1, 1, 1]}  # the base would see images as it never has
    with pytest.raises(ValueError, match=r"with data.mean null, .* with \[0.5,0.5,0.5\]; --set data.mean=null"):
        run.run("rni/vgg16-cifar10-ucs-0.9", runs=tmp_path, changes=other, **QUIET)
    assert not run.folder(recipes.load("rni/vgg16-cifar10-ucs-0.9", tiny=True), True, tmp_path).exists()


def test_weights_that_are_not_finite_end_the_run_and_leave_what_was(tmp_path, capsys):
    argv = ["run", "rni/vgg16-cifar10-l1-train", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main([*argv, "--set", "train.lr=1e30"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search("not finite|loss is nan", err) and "lower the learning rate" in err
    out = tmp_path / "tiny/rni/vgg16-cifar10-l1-train/seed0"
    assert f"{out / 'train.pt'} holds the run at step 0 of epoch 0" in err and (out / "train.pt").exists()
    assert not list(out.glob("dense*")) and json.loads((out / "run.json").read_text())["set"]["train.lr"] == 1e30


def test_a_run_goes_on_with_a_lower_rate(tmp_path, capsys):
    name = "rni/vgg16-cifar10-l1-train"
    argv = ["run", name, "--tiny", "--device", "cpu", "--out", str(tmp_path), "--set"]
    assert cli.main([*argv, "train.lr=1e30"]) == 1
    capsys.readouterr()
    for other in (["train.lr=0.05", "--set", "train.momentum=0.5"], ["seed=0"]):
        assert cli.main([*argv, *other, "--resume"]) == 1
        assert "holds a run of another recipe: train." in capsys.readouterr().err
    assert cli.main([*argv, "train.lr=0.05", "--resume"]) == 0
    assert f"{name} goes on with other learning rates: train.lr 1e+30 -> 0.05\n" in capsys.readouterr().out
    out = tmp_path / "tiny" / name / "seed0"
    facts, result, metrics, _ = read(out)
    assert facts["rates"][0]["train.lr"] == [1e30, 0.05] and facts["set"]["train.lr"] == 0.05
    assert result["finished"] and metrics[0]["lr"] == 0.05
    assert recipes.load(str(out / "recipe.yaml")).train.lr == 0.05
    straight = run.run(name, changes={"train.lr": 0.05}, runs=tmp_path / "b", **QUIET)
    assert (straight / "dense.safetensors").read_bytes() == (out / "dense.safetensors").read_bytes()  # from step 0
    assert cli.main([*argv, "train.lr=0.01", "--resume"]) == 1  # it is over
    assert cli.main([*argv, "train.lr=0.05", "--resume"]) == 0 and read(out)[0] == facts


def test_scores_that_are_not_finite_have_no_histogram(tmp_path):
    scores = {"a": torch.tensor([1.0, float("nan")]), "b": torch.arange(4.0)}
    method = types.SimpleNamespace(finished=False, scores=lambda: scores)
    log = run.PhaseLog(tmp_path, "train", method, 1, 9)
    log.write({"epoch": 0, "step": 4})
    assert [row["group"] for row in MetricsLog.read(log.histograms.path)] == ["b"]


def test_pruning_cut_short_says_so(tmp_path):
    said = []
    changes = {"prune.epochs": 1, "base.set": {"train.lr": 0.01}}
    run.run("greg/vgg19-cifar100-greg1-0.7", runs=tmp_path, changes=changes, **{**QUIET, "say": said.append})
    assert any("greg-1 had not finished when prune.epochs=1 ended it" in line for line in said)
    base = tmp_path / "tiny" / "greg" / "vgg19-cifar100-base" / "seed0"
    assert recipes.load(str(base / "recipe.yaml")).train.lr == 0.01


def test_until_the_method_is_done(tmp_path):
    """Pruning ends with the step in which the method does, not with the epoch."""
    changes = {"prune.options.reg_step": 0.25, "prune.options.stabilize": 2, "data.options.n_train": 160}
    out = run.run("greg/vgg19-cifar100-greg1-0.7", runs=tmp_path, changes=changes, **QUIET)
    block = json.loads((out / "result.json").read_text())["phases"]["prune"]
    # updates in steps 0 to 4 bring the coefficient over 1 (0.25 each, the limit itself does not end it), 2 to stabilise
    assert block["steps"] == 7 and block["epochs"] == 2


def test_held_weights_stay_zero_without_removal(tmp_path):
    name = "greg/resnet50-imagenet-unstructured-greg1-0.827"
    changes = {**SMALL, "prune.ratio": 0.8, "finetune.epochs": 2, "finetune.lr": 0.5, "finetune.schedule.at": []}
    out = run.run(name, runs=tmp_path, changes=changes, **QUIET)
    dense, pruned = (fp.load(out / f"{which}.safetensors") for which in ("dense", "pruned"))
    for (key, a), b in zip(dense.named_parameters(), pruned.parameters(), strict=True):
        assert a.shape == b.shape and not torch.equal(a, b), key
        if a.dim() == 4 or key == "fc.weight":
            assert int((b == 0).sum()) == -(-8 * a.numel() // 10), key


# --- before anything runs ------------------------------------------------------------------------------------------


def test_tensorboard_events_lie_in_the_run(tmp_path, monkeypatch, tuned):
    got = []

    class Writer:
        def __init__(self, folder):
            self.folder = Path(folder).relative_to(tmp_path)

        def add_scalar(self, key, value, step):
            got.append((self.folder.parts[-2:], key, value, step))

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    argv = ["run", "fisher/wrn-reduced-depth16", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--tensorboard"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(argv) == 1 and not list(tmp_path.iterdir())  # said before anything is written
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert cli.main(argv) == 0
    rows = read(tmp_path / "tiny" / "fisher" / "wrn-reduced-depth16" / "seed0")[2]
    last = rows[-1]
    assert (("tensorboard", last["phase"]), "test_acc", last["test_acc"], last["step"]) in got
    assert len({step for _, _, _, step in got}) == len(rows) and tuned == [1, 1]


def test_dry_run_says_it_all(capsys):
    assert cli.main(["run", "greg/vgg19-cifar100-greg1-0.7", "--tiny", "--dry-run", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("name: greg/vgg19-cifar100-greg1-0.7\n") and "ratio: '[1-15:0.7]'" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("features.")]
    assert rows[:2] == [["features.0", "8", "8"], ["features.3", "2", "8"]] and len(rows) == 16
    assert re.search(r"^MACs: [\d,]+ before, [\d,]+ after \(\d[\d.]+x\)$", out, re.M) and "parameters: " in out
    assert "prune: " in out and " s per epoch, " in out and "finetune: " in out


def test_dry_run_without_the_data(capsys):
    assert cli.main(["run", "taylor/resnet50-imagenet-56", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "5892 of 11392 channels stay (51.7%)" in out and "MACs: 4,089,184,256 before\n" in out
    assert "prune: 25 epochs\ntime per epoch: not measured: imagenet: " in out and "--data DIR" in out
    assert "tiny" not in out
    assert cli.main(["run", "tpp/vgg19-cifar100-tpp-0.5", "--dry-run"]) == 0
    assert re.search(r"^prune: at most 110,\d\d\d steps of 256 images$", capsys.readouterr().out, re.M)


def test_nothing_is_written_when_the_data_is_missing(tmp_path, capsys):
    for name in ("rni/vgg16-cifar10-ucs-train", "taylor/resnet50-imagenet-56"):
        assert cli.main(["run", name, "--out", str(tmp_path / "runs")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith(f"fastprune: error: {recipes.load(name).data.name}: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["run", "rni/vgg61"], "unknown recipe 'rni/vgg61'"),
        (
            ["run", "rni/readme-train", "--set", "train.epoch=3"],
            "train.epoch: unknown key 'epoch'; did you mean 'epochs'",
        ),
        (["run", "rni/readme-train", "--set", "train"], "--set: expected key=value"),
        (["run", "none.yaml"], "cannot read recipe none.yaml"),
        (["run", "fisher/wrn-reduced-depth16", "--tiny", "--set", "data.options.size=x"], "size: expected int"),
        (["run", "fisher/wrn-reduced-depth16", "--tiny", "--set", "model.options.depth=x"], "depth: expected int"),
        (
            ["run", "fisher/wrn-reduced-depth16", "--tiny", "--device", "cpu", "--set", "engine.cuda_graph=true"],
            "cuda_graph=True expects a model on a CUDA device, got one on cpu",
        ),
        (["run", "greg/vgg19-cifar100-l1-0.5", "--tiny", "--set", "prune.ratio=1.5"], "ratio"),  # before the base
        (["list", "recipes", "xyz"], "no recipe fits 'xyz'"),
        *(
            (["run", "fisher/wrn-reduced-depth16", "--tiny", "--device", "cpu", "--set", change], says)
            for change, says in {
                "data.options.n_train=0": "synthetic: expected n_train >= 1, got 0",
                "data.options.n_test=-1": "synthetic: expected n_test >= 1, got -1",
                "data.options.n_train=99999999999999": "data.options: ",
                "data.mean=[0.5]": "expected 3 means and positive stds",
                "data.std=[0, 1, 1]": "expected 3 means and positive stds",
                "data.std=[.nan, 1, 1]": "data.std[0]: expected a finite number, got nan",
                "data.pad=-1": "pad >= 0",
                "data.pad=999999999": "expected a pad of at most",
                "model.options.depth=-2": "",
                "train.lr=.inf": "train.lr: expected a finite number, got inf",
                "train.momentum=.nan": "train.momentum: expected a finite number, got nan",
                "train.schedule.factor=-1": "train.schedule.factor: expected 0 or more, got -1",
                "train.schedule.at=[.nan]": "expected a finite number",
                "engine.clip_norm=-.inf": "engine.clip_norm: expected a finite number",
            }.items()
        ),
        *(
            (["run", "greg/vgg19-cifar100-l1-0.5", "--tiny", "--device", "cpu", "--set", change], says)
            for change, says in {
                "prune.compact=false": "expected prune.compact=false for single weights",
                "prune.options.group=weight": "expected prune.compact=false for single weights",
                "data.options.size=1": "does not run on images of synthetic, (3, 1, 1): ",
                "prune.ratio=.nan": "prune.ratio: expected a finite number",
                "prune.method=taylor-gate": "taylor-gate makes its scores while it trains; give prune.epochs",
                "prune.epochs=null": "l1 is never done by itself; give prune.epochs",
            }.items()
        ),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_row_that_found_no_room_is_written_once_and_with_its_own_histograms(fails, tmp_path, monkeypatch):
    method = types.SimpleNamespace(finished=False, scores=lambda: {"a": scores, "b": scores})
    log, write, calls = run.PhaseLog(tmp_path, "prune", method, 1, 9), os.write, 0

    def full(fd, line):
        nonlocal calls
        calls += 1
        return write(fd, line[: len(line) // 2] if calls == fails else line)

    monkeypatch.setattr(os, "write", full)
    scores, row = torch.arange(4.0), {"epoch": 0, "step": 4}
    with pytest.raises(OSError, match="No space left"):
        log.write(row)
    scores = scores + 10  # of the next epoch, at the end of which fit tries again
    for late in (row, {"epoch": 1, "step": 8}):
        log.write(late)
    assert [r["epoch"] for r in MetricsLog.read(log.path)] == [0, 1]
    seen = [(r["epoch"], r["group"], r["edges"][0]) for r in MetricsLog.read(log.histograms.path)]
    assert seen == [(0, "a", 0.0), (0, "b", 0.0), (1, "a", 10.0), (1, "b", 10.0)]


def test_a_result_that_finds_no_room_keeps_the_old_one_and_says_how_to_go_on(tmp_path, monkeypatch):
    run._write_json(tmp_path / "result.json", {"phases": {}})

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said = r"^run: cannot write .*result.json \(No space left on device\); make room, and .* --resume goes on$"
    with pytest.raises(TrainingError, match=said):
        run._write_json(tmp_path / "result.json", {"phases": {"train": {}}})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert run._read_json(tmp_path / "result.json") == {"phases": {}}
    (tmp_path / "result.json").write_text('{"phases": ')
    with pytest.raises(ValueError, match="is damaged; remove its folder, or put a copy of the file back"):
        run._read_json(tmp_path / "result.json")


def test_three_processes_have_the_same_example(monkeypatch):
    """Of two images, which they cannot share."""
    images = fp.data.load("synthetic", size=8, n_test=7)
    alone = run.example_of(images)
    assert alone.shape == (2, 3, 8, 8)
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        assert torch.equal(run.example_of(images), alone)


def test_files_of_your_own_from_any_folder(tmp_path, capsys, monkeypatch):
    """A base is found beside the file that names it, by a resumed run too."""
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    mine.mkdir()
    elsewhere.mkdir()
    data = "data: {name: synthetic, options: {size: 8, n_train: 32, n_test: 16}}\n"
    data += "model: {name: vgg-small}"
    (mine / "big.yaml").write_text(f"source: {{paper: none}}\n{data}\ntrain: {{epochs: 1, batch_size: 16, lr: 0.1}}\n")
    (mine / "small.yaml").write_text(
        "source: {paper: none}\nbase: big.yaml\nprune: {method: l1, ratio: 0.5}\n"
        "finetune: {epochs: 1, batch_size: 16, lr: 0.01}\n"
    )
    monkeypatch.chdir(elsewhere)
    argv = ["run", "../mine/small.yaml", "--device", "cpu"]
    assert cli.main(argv) == 0 and "small starts from" in capsys.readouterr().out
    assert cli.main([*argv, "--resume"]) == 0
    result = json.loads((elsewhere / "runs/small/seed0/result.json").read_text())
    assert result["finished"] and result["dense"]["macs"] > result["phases"]["finetune"]["macs"]
    assert cli.main(["show", "runs/small", "--json"]) == 0
    out = capsys.readouterr().out
    (shown,) = json.loads(out[out.index("[\n") :])
    assert shown["result"] == result and shown["run"]["recipe"] == "small" and shown["problems"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    """SIGKILL, wherever it hits; then the same run again, until one comes to its end: as if nothing had been."""
    name = "greg/vgg19-cifar100-greg1-0.7"
    base = recipes.load(name).base.recipe
    start = time.monotonic()
    straight = run.run(name, runs=tmp_path / "a", **QUIET)
    took, draw, kills = time.monotonic() - start, random.Random(0), 0
    changes = {"resume": True, "runs": tmp_path / "b"}
    while True:
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                run.run(name, **changes, **QUIET)
                code = 0
            os._exit(code)
        if kills < 6:
            time.sleep(draw.uniform(0.1, 0.7) * took)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            if kills:
                break
            shutil.rmtree(tmp_path / "b")  # it was faster than the first run; once more, with less patience
            took /= 2
        else:
            kills += 1
    for which in (name, base):
        old, new = (tmp_path / run_of / "tiny" / which / "seed0" for run_of in "ab")
        assert comparable(new)[1:] == comparable(old)[1:]
    assert straight == tmp_path / "a" / "tiny" / name / "seed0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_do_as_one(tmp_path):
    """Each trains on half of every batch; networks agree but for rounding, what is cut exactly, and files are one's."""
    name = "fisher/wrn-40-2-fisher-scratch"
    one = run.run(name, runs=tmp_path / "one", **QUIET)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                os.environ |= address | {"RANK": rank, "LOCAL_RANK": rank}
                run.run(name, runs=tmp_path / "two", **QUIET)
                parallel.stop()
                code = 0
            os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    two = tmp_path / "two" / one.relative_to(tmp_path / "one")
    (facts, result, metrics, _), (other_facts, other_result, other_metrics, _) = read(one), read(two)
    assert (facts["processes"], other_facts["processes"]) == (1, 2)
    steps = [[row[key] for key in ("phase", "epoch", "step")] for row in metrics]
    assert steps == [[row[key] for key in ("phase", "epoch", "step")] for row in other_metrics]
    for phase, block in result["phases"].items():
        same_keys = ("kept", "macs", "params", "steps") + (("channels",) if phase == "prune" else ())
        assert all(block[key] == other_result["phases"][phase][key] for key in same_keys)
    for network in ("dense", "pruned", "scratch"):
        a, b = (fp.load(out / f"{network}.safetensors").state_dict() for out in (one, two))
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_list_patterns_go_with_recipes(capsys):
    assert cli.main(["list", "models", "res"]) == 2
    assert cli.main(["list", "recipes", "taylor/"]) == 0
    assert "taylor/resnet101-imagenet-40" in capsys.readouterr().out
