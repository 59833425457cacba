"""Two processes that train together cut the same channels, those that one process with both halves would."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.gates import GateStatistics, find_gates
from fastprune.graph import trace


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def sums(model, x, y):
    statistics = GateStatistics(model.eval(), find_gates(model, trace(model, x), stem=True), pixel_magnitudes=True)
    (F.cross_entropy(model(x), y) + statistics.penalty()).backward()
    return statistics.take()


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    x, y = (t[4 * rank : 4 * rank + 4] for t in batch())
    found = tuple(torch.as_tensor(t) for t in sums(net(), x, y))
    masks = {name: train(name, x, y) for name in ("taylor-gate", "taylor-output", "oracle")}
    grown = {name: grow(name, x, y) for name in GROWING}
    torch.save((found, masks, grown, refused(rank, x)), f"{path}/{rank}.pt")
    gc.collect()  # a DistributedDataParallel that outlives its process group may hang
    dist.barrier()
    dist.destroy_process_group()


def train(name, x, y):
    model = net()
    options = {"oracle": {"data": [(x, y)]}, "taylor-gate": {"loss_threshold": 2.35}}.get(name, {})
    method = fp.create(name, model, x, stem=True, per_cut=4, frequency=1, max_removed=8, shrink_every=0, **options)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        loss = F.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        (loss + method.penalty()).backward()
        method.step(optimizer, loss.detach())
    return torch.cat(list(method.survivors().values()))


GROWING = {
    "greg-1": {},
    "greg-2": {"pick_step": 5e-3},
    "tpp": {"weight": 1.0, "zero_out_interval": 1},
    "orth-kernel": {},
}


def grow(name, x, y):
    """Weights after some steps, each with two backwards; in eval mode, so that the loss is a mean over samples."""
    model = net().double().eval()
    x, options = x.double(), GROWING[name]
    if name != "orth-kernel":
        options = options | {"update_interval": 1, "stabilize": 4, "reg_step": 0.25}
    method = fp.create(name, model, x, **options)
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(10):
        for last in (False, True):
            alone = dist.is_initialized() and not last and step % 2
            with wrapped.no_sync() if alone else contextlib.nullcontext():
                (F.cross_entropy(wrapped(x), y) + method.penalty()).backward()
        method.step(optimizer)
        optimizer.zero_grad(set_to_none=False)
    assert method.finished
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def refused(rank, x):
    """What is said when processes make the method on weights of their own."""
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(torch.arange(8.0).sub(4 * rank).abs().view(-1, 1, 1, 1) + 1)
    method = fp.create("greg-1", model, x)
    try:
        method.step(torch.optim.SGD(model.parameters(), lr=0.1))
    except ValueError as e:
        with pytest.raises(ValueError, match="trace: expected the module itself, but it is a DistributedDataParallel"):
            fp.create("greg-1", nn.parallel.DistributedDataParallel(model), x)
        return str(e)


def test_all_processes_cut_the_same(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    (sums0, masks0, grown0, said0), (sums1, masks1, grown1, said1) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    expected = sums(net(), *batch())
    for a, b, c in zip(sums0, sums1, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, torch.as_tensor(c), rtol=1e-4, atol=1e-8, check_dtype=False)
    for name, mask in masks0.items():
        assert torch.equal(mask, masks1[name]) and int((~mask).sum()) == 8, name
    for name, weights in grown0.items():
        assert torch.equal(weights, grown1[name]), name
        torch.testing.assert_close(weights, grow(name, *batch()), rtol=1e-9, atol=1e-12)
    assert said0 == said1 and said0.startswith("greg-1: the processes chose different channels; make the method after")
