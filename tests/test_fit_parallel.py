"""Two processes that ``fit`` together end where one process with the same batches does, and only one of them writes."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
from torch import nn

import fastprune as fp
from fastprune import data, parallel
from fastprune.train import MetricsLog, evaluate, fit


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


CUTTING = {"per_cut": 2, "frequency": 2, "max_removed": 8, "stem": True, "coupled": True}
GROWING = {"update_interval": 1, "stabilize": 4, "reg_step": 0.25}
METHODS = {
    "taylor-gate": CUTTING | {"shrink_every": 2, "loss_threshold": 10.0},
    "taylor-output": CUTTING | {"shrink_every": 1},
    "taylor-weight": CUTTING | {"shrink_every": 2},
    "bn-taylor": CUTTING | {"shrink_every": 0},
    "fisher": {"per_cut": 1, "frequency": 2, "max_removed": 3, "shrink_every": 1},
    "greg-1": GROWING,
    "greg-2": GROWING | {"pick_step": 0.005},
    "tpp": GROWING | {"weight": 1.0, "zero_out_interval": 1},
    "slimming": {"reg_weight": 1e-2},
    "rni": {"reg_weight": 1e-2},
}


class Wide:
    """Batches in float64."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ((x.double(), y) for x, y in self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


def train(name, folder, resume=False, epochs=2, **options):
    """100 images in batches of 16: the last one has 4."""
    images = data.load("digits", limit=100)
    model = fp.nn.convert_batchnorm(net().double(), fuse=True, bound="sigmoid" if name == "rni" else None)
    model = fp.nn.convert_sync_batchnorm(model) if parallel.processes() > 1 else model
    method = fp.create(name, model, torch.zeros(2, 1, 8, 8).double(), **METHODS[name])
    kind = fp.optim.GrowingSGD if name in ("greg-2", "fisher") else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    log, loaders = MetricsLog(f"{folder}/{name}.jsonl"), tuple(map(Wide, images.loaders(16, seed=3)))
    history = fit(
        model, loaders, epochs=epochs, optimizer=optimizer, method=method, log=log,
        checkpoint=f"{folder}/{name}.pt", resume=resume, ema=0.9, clip_norm=5.0, progress=False, **options,
    )  # fmt: skip
    weights = {key: t for key, t in model.state_dict().items() if t.is_floating_point()}
    keep = method.survivors() if hasattr(method, "survivors") else method.keep_masks()
    return {
        "weights": weights,
        "ema": {key: t for key, t in history.ema.state_dict().items() if t.is_floating_point()},
        "keep": keep,
        "scores": method.scores(),
        "rows": [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in history],
    }


def score():
    """Of 99 test images, which two processes cannot share evenly."""
    return evaluate(net(), data.load("digits", limit=99).loaders(16).test)


def work(rank, path, port):
    torch.set_num_threads(1)
    # as torchrun does it
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert parallel.start("cpu") == torch.device("cpu") == parallel.start("cpu")
    assert (parallel.rank(), parallel.processes(), dist.get_backend()) == (rank, 2, "gloo")
    found = {name: train(name, path) for name in METHODS}
    train("taylor-gate", f"{path}/again", epochs=1)
    found["resumed"] = train("taylor-gate", f"{path}/again", resume=True)
    found["accumulated"] = train("slimming", f"{path}/accumulated", accumulate=2)
    found["score"] = score()
    torch.save(found, f"{path}/{rank}.pt")
    dist.barrier()
    parallel.stop()


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


def test_two_processes_end_where_one_does(tmp_path):
    (tmp_path / "one").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in METHODS:
        alone = train(name, tmp_path / "one")
        a, b = first[name], second[name]
        assert all(torch.equal(a["keep"][key], b["keep"][key]) for key in a["keep"]), name
        assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"]), name
        assert a["keep"].keys() == alone["keep"].keys()
        assert all(torch.equal(a["keep"][key], alone["keep"][key]) for key in a["keep"]), name
        close(a["weights"], alone["weights"])
        close(a["ema"], alone["ema"])
        close(a["scores"], alone["scores"])
        assert a["rows"] == b["rows"] and len(a["rows"]) == 2
        for mine, theirs in zip(a["rows"], alone["rows"], strict=True):
            close(mine, theirs)
        rows = MetricsLog.read(tmp_path / f"{name}.jsonl")
        assert [row["epoch"] for row in rows] == [0, 1]  # the second process wrote nothing
    assert int((~torch.cat(list(first["taylor-gate"]["keep"].values()))).sum()) == 8
    # what a resumed pair of processes ends with, bit for bit
    for one, name in ((first, "weights"), (first, "ema"), (second, "weights")):
        got, wanted = one["resumed"][name], one["taylor-gate"][name]
        assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in got)
    assert first["resumed"]["rows"] == first["taylor-gate"]["rows"]
    alone = score()
    assert first["score"] == second["score"] and first["score"]["acc"] == alone["acc"]
    close(first["score"], alone, rtol=1e-6)  # of a float32 model
    alone = train("slimming", tmp_path / "one" / "accumulated", accumulate=2)
    close(first["accumulated"]["weights"], alone["weights"])
    rows = [one["accumulated"]["rows"] for one in (first, second)]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 8
