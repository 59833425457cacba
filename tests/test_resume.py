"""Kills, full disks, damaged files, losses that are not finite: what was good stays, one line says what to do."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune import data
from fastprune.errors import CheckpointError, TrainingError
from fastprune.train import MetricsLog, fit, multistep, resume

ROOT = Path(__file__).resolve().parent.parent
DIGITS = data.load("digits", limit=128)


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(288, 10),
    )  # fmt: skip


def run(folder, model=None, epochs=3, batch_size=32, method=None, momentum=0.9, spoil=None, stop=None, **options):
    model = model or net()
    if method is not None:
        method = fp.create(method, model, torch.zeros(2, 1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    if spoil is not None:
        model.register_forward_hook(spoil)
    if stop is not None:
        optimizer.register_step_post_hook(stop)
    history = fit(
        model, DIGITS.loaders(batch_size), epochs=epochs, optimizer=optimizer, schedule=multistep(optimizer, 4),
        method=method, checkpoint=folder / "last.pt", progress=False, **options,
    )  # fmt: skip
    return model, history


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Stopped(Exception):
    pass


def stop_after(calls):
    """A hook that raises in the call after so many."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count > calls:
            raise Stopped

    return hook


def test_killed_runs_end_as_the_uninterrupted_one():
    command = [sys.executable, "-m", "bench.kill_resume", "--kills", "3", "--recipe-kills", "0", "--out", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "**3 of 3**" in done.stdout


def test_the_committed_page_has_twenty_kills_without_a_difference():
    text = (ROOT / "docs" / "results" / "resume.md").read_text()
    assert "**20 of 20**" in text and text.count("| the same |") == 20


@pytest.mark.parametrize("calls", [0, 3, 6, 9])  # of an epoch: four batches, and one more for the test
@pytest.mark.parametrize("options", [{}, {"schedule_every": "step", "accumulate": 2, "ema": 0.9}], ids=["", "more"])
def test_it_goes_on_at_the_batch_where_it_stopped(calls, options, tmp_path):
    options |= {"checkpoint_minutes": 0.0}
    whole, expected = run(tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        run(tmp_path / "part", spoil=stop_after(calls), **options)
    seen = []
    model, history = run(tmp_path / "part", resume=True, spoil=lambda *_: seen.append(1), **options)
    assert same(model.state_dict(), whole.state_dict()) and same(history.best_state, expected.best_state)
    times = ("seconds", "images_per_s")
    rows, wanted = ([{k: v for k, v in row.items() if k not in times} for row in h] for h in (history, expected))
    assert rows == wanted
    evaluations = 0 if calls < 4 else 1 if calls < 9 else 2
    assert len(seen) <= 12 + 3 * (1 + ("ema" in options)) - calls + evaluations + options.get("accumulate", 1)


@pytest.mark.parametrize(
    "options",
    [{"compile": {"backend": "aot_eager"}, "method": "slimming"}, {"precision": "bf16", "accumulate": 3}],
    ids=["compiled", "bf16"],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
def test_compiled_and_bf16_runs_go_on_with_the_same_bits(options, tmp_path):
    """With a last batch of 20 images; dropout, and whatever else is drawn, goes on too."""
    options |= {"batch_size": 36, "checkpoint_minutes": 0.0}

    def go(folder, **more):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        model, history = run(tmp_path / folder, **options, **more)
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in history]
        return model.state_dict(), rows, torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())

    whole = go("whole")
    with pytest.raises(Stopped):
        go("part", stop=stop_after(3))
    resumed = go("part", resume=True)
    assert same(resumed[0], whole[0]) and resumed[1:] == whole[1:]


def test_rows_behind_the_checkpoint_are_written_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"run": 1})
    with pytest.raises(Stopped):
        run(tmp_path, spoil=stop_after(7), log=log, checkpoint_minutes=None)
    file = tmp_path / "last.pt"
    size = resume.read_state(file)["log"]
    with open(log.path, "a") as out:
        out.write('{"epoch": 1, "torn')
    assert log.path.stat().st_size > size
    run(tmp_path, resume=True, log=log)
    rows = MetricsLog.read(log.path)
    assert rows[0] == {"run": 1} and [row["epoch"] for row in rows[1:]] == [0, 1, 2]
    assert log.path.read_text().endswith("\n")
    log.write({"phase": "the next one"})
    run(tmp_path, resume=True, log=log)  # there is nothing left to do, so nothing to take back
    assert MetricsLog.read(log.path)[-1] == {"phase": "the next one"}
    log.path.write_text("")
    with pytest.raises(TrainingError, match="expected the log of the run to be resumed"):
        run(tmp_path, epochs=4, resume=True, log=log)


def test_the_first_row_of_a_run_killed_at_once_is_not_doubled(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for latency in (1.0, 2.0):
        log.start({"call": "train", "latency_ms": latency})
        assert MetricsLog.read(log.path) == [{"call": "train", "latency_ms": latency}]
    with open(log.path, "a") as out:
        out.write('{"epoch": 0')
    log.start({"other": 1})
    assert len(MetricsLog.read(log.path)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "folder", "version"])
def test_a_damaged_or_foreign_file_is_one_line(damage, tmp_path):
    run(tmp_path, epochs=1)
    path = tmp_path / "last.pt"
    blob = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = blob[:-100] + bytes([blob[-100] ^ 1]) + blob[-99:]
        path.write_bytes(
            {
                "flip": flipped,
                "cut": blob[:-10],
                "empty": b"",
                "other": b"PK\3\4" + blob,
                "version": blob.replace(b"state 2", b"state 1", 1),
            }[damage]
        )
    model = net()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    said = {"folder": "cannot read", "flip": "is damaged", "cut": "is damaged", "version": "of another version"}
    said = said.get(damage, "another kind of file")
    with pytest.raises(CheckpointError, match=said) as caught:
        run(tmp_path, model=model, resume=True)
    assert "\n" not in str(caught.value) and same(before, model.state_dict())


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": 12}, r"0\.bias is \(8,\) there, \(12,\) here"),
        ({"batch_size": 16}, "training data is Loader of 4 batches there, Loader of 8 batches here"),
        ({"method": "slimming"}, "method is nothing there, {'name': 'slimming'"),
        ({"ema": 0.9}, r"ema is None there, 0\.9 here"),
        ({"precision": "bf16"}, "precision is fp32 there, bf16 here"),
    ],
)
def test_a_file_of_another_run_changes_nothing(change, said, tmp_path):
    run(tmp_path, epochs=1)
    model = net(change.pop("model", 8))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"last\.pt is of another run: .*{said}"):
        run(tmp_path, model=model, resume=True, **change)
    assert same(before, model.state_dict())


def test_options_that_are_objects_are_the_same_run_in_another_process(tmp_path):
    def start(ratio=0.5, resumed=False):
        model, batch = net(), (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
        options = {"data": [batch], "loss": lambda out, y: nn.functional.cross_entropy(out, y)}
        method = fp.create("oracle", model, batch[0], ratio, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        files = {"checkpoint": tmp_path / "last.pt", "resume": resumed}
        return fit(model, DIGITS.loaders(64), epochs=1, optimizer=optimizer, method=method, progress=False, **files)

    assert list(start()) == list(start(resumed=True))
    with pytest.raises(
        CheckpointError, match=r"another run: method is .*'ratio': 0\.5.* there, .*'ratio': 0\.4.* here"
    ):
        start(ratio=0.4, resumed=True)


def test_a_state_that_could_not_be_read_back_shows_at_the_start(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["note"] = Stopped("an object")
    with pytest.raises(CheckpointError, match=r"holds more than tensors, .*Stopped") as caught:
        fit(model, DIGITS.loaders(32), epochs=1, optimizer=optimizer, checkpoint=tmp_path / "last.pt", progress=False)
    assert "\n" not in str(caught.value)


@pytest.fixture
def full_disk(monkeypatch):
    """Writes of files end with ENOSPC while the list holds something."""
    full, fsync, write = [], os.fsync, os.write

    def no_sync(fd):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    def no_write(fd, line):
        return write(fd, line[: len(line) // 2]) if full else write(fd, line)  # what a full disk does

    monkeypatch.setattr(os, "fsync", no_sync)
    monkeypatch.setattr(os, "write", no_write)
    return full


def test_a_full_disk_keeps_the_last_good_checkpoint(full_disk, tmp_path):
    whole, _ = run(tmp_path / "whole")
    count = 0

    def fill(*_):
        nonlocal count
        count += 1
        if count == 7:  # in the second epoch
            full_disk.append(1)

    with pytest.raises(TrainingError) as caught:
        run(tmp_path / "part", spoil=fill, checkpoint_minutes=0.0)
    text = str(caught.value)
    assert "No space left on device" in text and "last.pt holds the run at step 1 of epoch 1" in text
    assert "\n" not in text and [p.name for p in (tmp_path / "part").iterdir()] == ["last.pt"]
    full_disk.clear()
    model, _ = run(tmp_path / "part", resume=True)
    assert same(model.state_dict(), whole.state_dict())


def test_a_full_disk_need_not_stop_a_run(full_disk, tmp_path):
    whole, _ = run(tmp_path / "whole")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    count = 0

    def fill(*_):
        nonlocal count
        count += 1
        full_disk[:] = [1] if 4 < count < 11 else []  # from the first test to the second one

    with pytest.warns(UserWarning, match=r"No space left on device.*going on"):
        model, history = run(tmp_path, spoil=fill, keep_going=True, log=log)
    assert same(model.state_dict(), whole.state_dict())
    assert MetricsLog.read(log.path) == json.loads(json.dumps(list(history)))  # rows were made good later


def test_a_log_on_a_full_disk_stops_the_run_and_stays_whole(full_disk, tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"run": 1})
    full_disk.append(1)
    with pytest.raises(OSError, match="No space left"):
        log.write({"run": 2})
    assert log.path.read_text() == '{"run": 1}\n'


def test_a_real_limit_on_file_size_is_told_in_one_line(tmp_path):
    """The kernel refuses, not a mock."""
    path = tmp_path / "last.pt"
    keeper = resume.Checkpoints(path, {"model": nn.Linear(100, 100)}, {})
    resume.write_state(path, {"a": torch.zeros(10)})
    keeper.last, before = "at step 1", path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(
            TrainingError, match=r"File too large.*at step 2; .*holds the run at step 1; make room"
        ) as e:
            keeper.save({"local": {}}, "at step 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value) and path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_is_not_finite_never_reaches_the_checkpoint(what, tmp_path):
    model, count = net(), 0

    def spoil(module, args, out):
        nonlocal count
        count += 1
        if count == 6:  # first batch of the second epoch
            return out * math.nan if what == "loss" else None

    if what == "weights":  # a finite loss, and a gradient that is not

        def burn(grad):
            return grad * math.inf if count == 6 else grad

        model[0].weight.register_hook(burn)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, model=model, spoil=spoil, checkpoint_minutes=0.0)
    text = str(caught.value)
    said = {"loss": "the loss is nan at step 0 of epoch 1, learning rate 0.05"}
    assert said.get(what, "the weights are not finite at step 1 of epoch 1; lower the learning rate") in text
    assert text.endswith("last.pt holds the run at step 0 of epoch 1")
    state = resume.read_state(tmp_path / "last.pt")
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_run_that_stopped_by_until_stays_stopped(tmp_path):
    model = net()
    options = {"update_interval": 1, "stabilize": 2, "reg_step": 0.25}
    method = fp.create("greg-1", model, torch.zeros(2, 1, 8, 8), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loaders, log = DIGITS.loaders(32), MetricsLog(tmp_path / "metrics.jsonl")
    kw = {"epochs": 9, "checkpoint": tmp_path / "last.pt", "log": log, "resume": True, "progress": False}
    history = fit(model, loaders, optimizer=optimizer, method=method, until=lambda: method.finished, **kw)
    assert method.finished and len(history) == 2 and history[-1]["step"] == method.steps < 8
    after = loaders.train.state_dict()
    assert after["batch"] == 0  # the next phase starts with an epoch of its own
    again = net()
    method = fp.create("greg-1", again, torch.zeros(2, 1, 8, 8), **options)
    optimizer, loaders = torch.optim.SGD(again.parameters(), lr=0.01), DIGITS.loaders(32)
    same_rows = fit(again, loaders, optimizer=optimizer, method=method, until=lambda: method.finished, **kw)
    assert list(same_rows) == list(history) and same(again.state_dict(), model.state_dict())
    assert torch.equal(loaders.train.state_dict()["epoch_start"], after["epoch_start"])
    assert len(MetricsLog.read(log.path)) == 2
