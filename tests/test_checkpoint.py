"""Checkpoints: what a pruned network remembers of its cuts, and the file it is kept in."""

from __future__ import annotations

import copy

import torch
from graph_cases import uneven_keep

from fastprune import compact, models
from fastprune.graph import trace
from fastprune.surgery import first_shapes, keep_lists, record_keep


def test_cuts_are_remembered_and_composed(tmp_path):
    model, x = models.create("resnet20"), torch.randn(2, 3, 16, 16)
    whole = {name: t.clone() for name, t in model.state_dict().items()}
    assert keep_lists(model) == first_shapes(model) == {}
    compact(model, uneven_keep(trace(model, x)), x)
    compact(copy.deepcopy(model), uneven_keep(trace(model, x)), x)  # a copy's cuts are its own
    compact(model, {"conv1": torch.arange(8) % 3 > 0}, x)
    path = tmp_path / "model.pt"
    torch.save(model, path)
    for m in (model, copy.deepcopy(model), torch.load(path, weights_only=False)):
        kept, shapes = keep_lists(m), first_shapes(m)
        assert kept.keys() == shapes.keys() and "conv1.weight" in kept and "fc.bias" not in kept
        for name, t in m.state_dict().items():
            expected = whole[name]
            assert shapes.get(name, expected.shape) == expected.shape
            for dim, stays in kept.get(name, {}).items():
                assert stays.dtype == torch.int64 and (stays.diff() > 0).all()
                expected = expected.index_select(dim, stays)
            assert torch.equal(t, expected), name
    inside = {f"layer2.{name}" for name in keep_lists(model.layer2)}
    assert inside and inside == {name for name in keep_lists(model) if name.startswith("layer2.")}


def test_a_new_tensor_can_be_recorded():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    record_keep(model, "0.bias", (4,), {0: torch.tensor([1, 3])})
    record_keep(model, "0.bias", (2,), {0: torch.tensor([1])})
    assert first_shapes(model) == {"0.bias": (4,)} and keep_lists(model)["0.bias"][0].tolist() == [3]
