"""Checkpoints: what a pruned network remembers of its cuts, and the file it is kept in."""

from __future__ import annotations

import copy

import pytest
import torch
from graph_cases import stir, uneven_keep
from torch import nn

import fastprune as fp
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


class Odd(nn.Module):
    """Tied weights, a buffer that is no state but is cut, one that is, a parameter of no layer, integers, a scalar."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("shift", torch.rand(8, 1, 1), persistent=False)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("table", torch.arange(6, dtype=torch.int16).view(2, 3).t())
        self.fc, self.twin = nn.Linear(8, 6, bias=False), nn.Linear(8, 6)
        self.twin.weight = self.fc.weight

    def forward(self, x):
        x = (self.norm(self.depthwise(self.conv(x))) * self.scale + self.shift).mean((2, 3))
        return self.fc(x) - 2 * self.twin(x.relu())


def make_odd():
    torch.manual_seed(1)  # the buffer that is no state must be the same
    return Odd()


def small(model, times=1, size=16):
    """Trained for a step, pruned, in channels-last format, in eval mode."""
    x = torch.randn(2, 3, size, size)
    stir(model).train()(x)
    for _ in range(times):
        compact(model, uneven_keep(trace(model, x)), x)
    return model.to(memory_format=torch.channels_last).eval()


def assert_same(a, b, size=16):
    """Same tensors in the same layout, same function, same memory of its cuts; and both can be pruned on."""
    for (name, t), (other, u) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other and t.dtype == u.dtype and torch.equal(t, u), name
        assert all(n == 1 or i == j for n, i, j in zip(t.shape, t.stride(), u.stride(), strict=True)), name
    assert str(a) == str(b) and first_shapes(a) == first_shapes(b)
    kept, other = keep_lists(a), keep_lists(b)
    assert kept.keys() == other.keys()
    assert all(torch.equal(stays, other[name][dim]) for name in kept for dim, stays in kept[name].items())
    p = next(a.parameters())
    x = torch.randn(2, 3, size, size, dtype=p.dtype)
    with torch.no_grad():
        assert torch.equal(a.eval()(x), b.eval()(x))


ROUND_TRIPS = {
    "by_name": (lambda: small(models.create("resnet20")), None),
    "by_name_bounded": (lambda: small(models.create("vgg-small", in_channels=3, bound="sigmoid")), None),
    "by_name_converted": (
        lambda: small(fp.nn.convert_batchnorm(models.create("resnet20", num_classes=7), "sigmoid", fuse=False)), None,
    ),
    "by_name_half": (lambda: small(models.create("resnet20")).bfloat16(), None),
    "by_name_torchvision": (lambda: small(models.create("mobilenet_v3_small"), size=32), None),
    "by_name_whole": (lambda: models.create("lenet-taylor", in_channels=3, image_size=16), None),
    "model_fn": (lambda: small(make_odd()), make_odd),
    "model_fn_twice": (lambda: small(make_odd(), times=2), make_odd),
    "model_fn_whole": (make_odd, make_odd),
    "model_fn_converted": (
        lambda: small(fp.nn.convert_batchnorm(stir(make_odd()), "sigmoid")),
        lambda: fp.nn.convert_batchnorm(make_odd(), "sigmoid"),
    ),
    "model_fn_double": (lambda: small(make_odd()).double(), lambda: make_odd().double()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:convert_batchnorm")
@pytest.mark.parametrize("make, model_fn", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip(make, model_fn, tmp_path):
    model = make()
    path, again = tmp_path / "small.safetensors", tmp_path / "again.safetensors"
    fp.save(model, path, recipe={"epochs": 3})
    random_state = torch.get_rng_state()
    loaded = fp.load(path, model_fn)
    assert model_fn is not None or torch.equal(random_state, torch.get_rng_state())
    assert loaded.training
    size = 32 if len(keep_lists(model)) > 200 else 16
    assert_same(model, loaded, size)
    fp.save(loaded, again, recipe={"epochs": 3})
    assert again.read_bytes() == path.read_bytes()
    if not isinstance(model, models.lenet.GatedLeNet) and next(model.parameters()).dtype == torch.float32:
        x = torch.randn(2, 3, size, size)
        for m in (model, loaded):
            compact(m, uneven_keep(trace(m, x)), x)
        fp.save(loaded, path)
        assert_same(model, fp.load(path, model_fn), size)
