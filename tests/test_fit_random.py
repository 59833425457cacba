"""Processes that train together draw random numbers of their own, and all else as one process would."""

from __future__ import annotations

import contextlib
import random
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastprune as fp
from fastprune import data, parallel
from fastprune.train import fit

CUTTING = {"per_cut": 2, "frequency": 2, "max_removed": 6, "stem": True, "shrink_every": 2}


class Drop(nn.Dropout):
    """Dropout that remembers what it dropped first and last."""

    first = last = None

    def forward(self, x):
        out = super().forward(x)
        if self.training:
            seen = (out == 0) & (x != 0)
            self.first, self.last = seen if self.first is None else self.first, seen
        return out


class Stopped(Exception):
    pass


def draws():
    return torch.rand(3).tolist(), random.random(), float(np.random.rand())


def train(folder, seeds=(0, 0, 0), epochs=2, stop_at=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Drop(0.5), nn.Linear(12, 10),
    )  # fmt: skip
    method, steps = fp.create("taylor-gate", model, torch.zeros(2, 1, 8, 8), **CUTTING), 0

    def count(module, *_):
        nonlocal steps
        steps += module.training
        if steps == stop_at:
            raise Stopped

    model.register_forward_hook(count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model[8].first = None  # of the tracer
    torch.manual_seed(seeds[0]), random.seed(seeds[1]), np.random.seed(seeds[2])
    before, stopped = torch.get_rng_state(), contextlib.nullcontext() if stop_at is None else pytest.raises(Stopped)
    with stopped:
        fit(
            model, data.load("digits", limit=96).loaders(16, seed=3), epochs=epochs, optimizer=optimizer, method=method,
            checkpoint=folder / "last.pt", checkpoint_minutes=0.0, progress=False, **options,
        )  # fmt: skip
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "keep": torch.cat(list(method.survivors().values())),
        "dropped": [model[8].first, model[8].last],
        "back": torch.equal(torch.get_rng_state(), before),
        "draws": draws(),
    }


def work(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {
        "whole": train(folder / "whole"),
        "stopped": train(folder / "part", stop_at=9),
        "resumed": train(folder / "part", resume=True),
        "own seeds": train(folder / "own", seeds=(rank, 0, rank)),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    parallel.stop()


def test_two_processes_drop_different_features(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (tmp_path, port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, one in first.items():
        other = second[name]
        assert not any(torch.equal(a, b) for a, b in zip(one["dropped"], other["dropped"], strict=True)), name
        assert torch.equal(one["keep"], other["keep"]) and torch.equal(one["weights"], other["weights"]), name
        assert (one["draws"] == other["draws"]) == (name != "own seeds"), name
    for one in (first, second):  # each has its own masks again
        for key in ("weights", "keep"):
            assert torch.equal(one["resumed"][key], one["whole"][key])
        assert torch.equal(one["resumed"]["dropped"][1], one["whole"]["dropped"][1])
        assert one["resumed"]["draws"] == one["whole"]["draws"]
        assert one["stopped"]["back"]  # whoever goes on after an error has what the others have
    assert first["whole"]["keep"].sum() == 14
    # a generator that was seeded on purpose is not touched, the others are
    torch_of, python_of, numpy_of = zip(first["own seeds"]["draws"], second["own seeds"]["draws"], strict=True)
    assert torch_of[0] != torch_of[1] and python_of[0] == python_of[1] and numpy_of[0] != numpy_of[1]
    np.random.seed(1)
    assert numpy_of[1] == np.random.rand()


def test_one_process_goes_on_with_its_numbers(tmp_path):
    torch.manual_seed(0)
    expected = [torch.nn.functional.dropout(torch.ones(16, 12), 0.5) == 0 for _ in range(12)]
    one = train(tmp_path)
    assert not one["back"]
    for got, wanted in zip(one["dropped"], (expected[0], expected[11]), strict=True):
        assert torch.equal(got, got & wanted) and got.any()
