"""Checkpoints: what a pruned network remembers of its cuts, and the file it is kept in."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch
from graph_cases import PATTERNS, stir, uneven_keep
from torch import nn

import fastprune as fp
from bench import fuzz_checkpoints as fuzz
from bench.fuzz_checkpoints import DEEP, Parts
from fastprune import CheckpointError, checkpoint, compact, models
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


X = torch.ones(2, 3, 16, 16)
ROUND_TRIPS = {
    "by_name": (lambda: small(models.create("resnet20")), None),
    "by_name_bounded": (lambda: small(models.create("vgg-small", in_channels=3, bound="sigmoid")), None),
    "by_name_converted": (
        lambda: small(fp.nn.convert_batchnorm(models.create("resnet20", num_classes=7), "sigmoid", fuse=False)), None,
    ),
    "by_name_half": (lambda: small(models.create("resnet20")).bfloat16(), None),
    "by_name_torchvision": (lambda: small(models.create("mobilenet_v3_small"), size=32), None),
    "by_name_whole": (lambda: models.create("lenet-taylor", in_channels=3, image_size=16), None),
    "by_name_plain": (
        lambda: fp.to_plain(small(models.create("vgg-small", in_channels=3, bound="sigmoid")), X), None,
    ),
    "by_name_folded": (lambda: fp.fold(small(models.create("resnet20")), X), None),
    "model_fn_folded": (lambda: fp.fold(small(make_odd()), X), lambda: fp.fold(make_odd().eval(), X)),
    "model_fn": (lambda: small(make_odd()), make_odd),
    "model_fn_twice": (lambda: small(make_odd(), times=2), make_odd),
    "model_fn_numbers": (lambda: small(fuzz.Splits(3)), lambda: fuzz.Splits(3)),
    "model_fn_whole": (make_odd, make_odd),
    **{
        f"model_fn_numbers_{name}": (lambda build=build: small(build()), build)
        for name, build in PATTERNS.items()
        if name in ("hierarchical_split", "cross_stage_split", "mixed_split", "dual_path")
    },
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
    assert loaded.training == (model_fn is None or model_fn().training)
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


def test_ties_are_restored_and_stored_once(tmp_path):
    model, path = small(make_odd()), tmp_path / "odd.safetensors"
    fp.save(model, path)
    document = fp.checkpoint.read(path)
    assert document["shared"] == {"twin.weight": "fc.weight"} and "twin.weight" not in document["tensors"]
    assert document["keep"]["shift"]["shape"] == [8, 1, 1] and "shift" not in document["tensors"]
    loaded = fp.load(path, make_odd)
    assert loaded.twin.weight is loaded.fc.weight and loaded.shift.shape == (4, 1, 1)

    def untied():
        net = make_odd()
        net.twin.weight = nn.Parameter(net.twin.weight.detach().clone())
        return net

    loaded = fp.load(path, untied)
    assert loaded.twin.weight is loaded.fc.weight
    assert_same(model, loaded)
    fp.save(untied(), path)
    with pytest.raises(CheckpointError, match=r"'twin.weight' and 'fc.weight' are one tensor in the network and two"):
        fp.load(path, make_odd)


def test_what_a_file_says_about_itself(tmp_path):
    model, x, path = models.create("resnet20", num_classes=4), torch.randn(2, 3, 16, 16), tmp_path / "x.safetensors"
    method = fp.create("taylor-gate", model, x, ratio="*conv1:0.5", skip=("layer3.*",))
    compact(model, {"layer1.0.conv1": torch.arange(16) % 4 > 0}, x)
    fp.save(
        copy.deepcopy(model), path, method=method, recipe={"lr": 0.1, "steps": (1, 2)}, extra={"acc": np.float32(0.5)}
    )
    document = fp.checkpoint.read(path)
    assert document["architecture"] == {"name": "resnet20", "arguments": {"num_classes": 4}}
    assert (
        document["format"] == 1 and document["fastprune"] == fp.__version__ and document["torch"] == torch.__version__
    )
    assert document["keep"]["layer1.0.conv2.weight"] == {
        "shape": [16, 16, 3, 3], "dims": {1: [1, 4, 5, 8, 9, 12, 13, 16]},
    }  # fmt: skip
    weight = model.layer1[0].conv2.weight
    assert document["tensors"]["layer1.0.conv2.weight"] == {
        "dtype": "float32",
        "shape": [16, 12, 3, 3],
        "sha256": hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest(),
    }
    assert document["method"]["name"] == "taylor-gate" and document["method"]["options"]["skip"] == ["layer3.*"]
    assert document["recipe"] == {"lr": 0.1, "steps": [1, 2]} and document["extra"] == {"acc": 0.5}
    plain = safetensors.load_file(path)
    assert plain.keys() == model.state_dict().keys() and torch.equal(plain["layer1.0.conv2.weight"], weight)
    loaded = fp.load(path)  # with plain norms where the method put BatchNormAct2d: the same function
    assert str(loaded) == str(model).replace("BatchNormAct2d", "BatchNorm2d") != str(model)


def test_what_a_file_says_about_a_target_and_objects(tmp_path):
    model, x = models.create("resnet20"), torch.randn(2, 3, 16, 16)
    method = fp.create("obd", model, x, target_macs=np.float32(0.5), data=[(x, torch.tensor([0, 1]))])
    fp.save(model, tmp_path / "x", method=method)
    about = fp.checkpoint.read(tmp_path / "x")["method"]
    assert about["ratio"] is None and about["target"] == {"target_macs": 0.5}
    assert about["options"]["data"] == "list" and about["options"]["loss"] == "cross_entropy"
    fp.save(model, tmp_path / "x", method=fp.create("greg-1", model, x, ratio=0.5, ratio_limit=float("inf")))
    about = fp.checkpoint.read(tmp_path / "x")["method"]
    assert about["target"] is None and about["options"]["ratio_limit"] == "inf"
    with pytest.raises(ValueError, match=r"save: expected method to be what fastprune.create returned, got 'l1'"):
        fp.save(model, tmp_path / "x", method="l1")


def test_a_network_in_place_of_a_function_that_makes_it(tmp_path):
    fp.save(nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(ValueError, match=r"load: expected model_fn to be a function .* got the network, a Linear"):
        fp.load(tmp_path / "x", nn.Linear(2, 2))


WRAPPERS = {"compile": torch.compile, "data_parallel": nn.DataParallel}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing torch._dynamo
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap, tmp_path):
    model = small(models.create("resnet20"))
    fp.save(wrap(model), tmp_path / "x")
    assert_same(model, fp.load(tmp_path / "x"))


@pytest.mark.filterwarnings("ignore:convert_batchnorm")
def test_bounded_norms_of_a_recorded_network(tmp_path):
    """Made bounded or plain again after it was created; with a shift that training has left."""
    path = tmp_path / "x.safetensors"
    model = fp.nn.convert_batchnorm(stir(models.create("vgg-small")), "sigmoid", fuse=False)
    assert isinstance(model.features[1], fp.nn.SigmoidBatchNorm2d) and model.features[1].bias is not None
    fp.save(model, path)
    loaded, x = fp.load(path), torch.randn(2, 1, 8, 8)
    assert isinstance(loaded.features[1], fp.nn.SigmoidBatchNorm2d)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), loaded.eval()(x))

    model = models.create("vgg-small", bound="sigmoid")
    for i in (m for m in range(len(model.features)) if isinstance(model.features[m], nn.BatchNorm2d)):
        norm = nn.BatchNorm2d(model.features[i].num_features)
        with torch.no_grad():
            norm.weight.copy_(model.features[i].scale)
        model.features[i] = norm
    fp.save(model, path)
    loaded = fp.load(path)
    assert type(loaded.features[1]) is nn.BatchNorm2d
    with torch.no_grad():
        assert torch.equal(model.eval()(x), loaded.eval()(x))


def test_norms_and_gates_that_are_gone_are_left_out_of_a_recorded_network(tmp_path):
    model = small(models.create("resnet20"))
    model.bn1 = nn.Identity()
    model.conv1.bias = nn.Parameter(torch.randn(8))
    record_keep(model, "conv1.bias", (16,), keep_lists(model)["conv1.weight"])
    fp.save(model, tmp_path / "x")
    assert_same(model, fp.load(tmp_path / "x"))
    model = models.create("lenet-taylor", image_size=16)
    model.gate1 = nn.Identity()
    fp.save(model, tmp_path / "x")
    assert_same(model, fp.load(tmp_path / "x"))


@pytest.mark.parametrize("device", ["foo", 1.5])
def test_a_device_that_is_none(tmp_path, device):
    fp.save(small(make_odd()), tmp_path / "x")
    with pytest.raises(ValueError, match=f"map_location to be a device such as 'cpu', got {device!r}"):
        fp.load(tmp_path / "x", make_odd, map_location=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices(tmp_path):
    model = small(make_odd())
    fp.save(copy.deepcopy(model).cuda(), tmp_path / "x")
    loaded = fp.load(tmp_path / "x", make_odd, map_location="cuda")
    assert all(t.is_cuda for t in loaded.state_dict().values()) and loaded.twin.weight is loaded.fc.weight
    assert_same(model, loaded.cpu())
    loaded = fp.load(tmp_path / "x", lambda: make_odd().cuda(), map_location=None)
    assert all(t.is_cuda for t in loaded.state_dict().values())
    assert_same(model, fp.load(tmp_path / "x", lambda: make_odd().cuda()))


def test_masks_of_weights_come_back(tmp_path):
    def make():
        return nn.Sequential(fp.nn.MaskedConv2d(3, 8, 3), nn.ReLU(), fp.nn.MaskedConv2d(8, 4, 3))

    model = make()
    model[2].weight_mask = torch.rand(4, 8, 3, 3) > 0.5
    model[0].out_mask = torch.arange(8) != 3
    fp.save(small(model), tmp_path / "x")
    loaded = fp.load(tmp_path / "x", make)
    assert_same(model, loaded)
    assert loaded[2].weight_mask.shape == (4, 4, 3, 3) and loaded[2]._live == model[2]._live


def test_a_network_that_was_cut_while_it_trained(tmp_path):
    """Several cuts, on fused norms with gates; the file builds it with plain norms."""
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    model = fp.nn.convert_batchnorm(models.create("resnet20"), fuse=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    method = fp.create("taylor-gate", model, x, ratio=0.2, per_cut=20, frequency=1)
    while not method.finished:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + method.penalty()
        loss.backward()
        method.step(optimizer, loss)
    fp.save(model, tmp_path / "x", method=method)
    loaded = fp.load(tmp_path / "x")
    before, after = (
        sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))
        for net in (models.create("resnet20"), loaded)
    )
    assert before - after == method.cuts.removed > 0
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), loaded.eval()(x), rtol=1e-4, atol=1e-5)


def test_weights_are_no_part_of_an_architecture(monkeypatch):
    made = []

    def get_model(name, **kw):
        made.append(kw)
        return models.registry.torchvision.models.GoogLeNet(aux_logits=False, transform_input=True, init_weights=False)

    monkeypatch.setattr(models.registry.torchvision.models, "get_model", get_model)
    model = models.create("googlenet", num_classes=1000, weights="DEFAULT")
    assert made == [{"num_classes": 1000, "weights": "DEFAULT"}]
    said = {"num_classes": 1000, "transform_input": True, "aux_logits": False, "init_weights": False}
    assert models.recorded(model) == {"name": "googlenet", "arguments": said}
    assert models.recorded(models.create("lenet-taylor", widths=(2, 3, 4)))["arguments"]["widths"] == (2, 3, 4)
    assert models.recorded(make_odd()) is None


# What is refused ------------------------------------------------------------------------------------------------------


def edited(path, change):
    """Change the document of a file, and make its hash right again."""
    parts = Parts(path.read_bytes())
    change(parts)
    path.write_bytes(parts.joined(right_hash=True))


def other_shape(net):
    net.conv = nn.Conv2d(3, 9, 3, bias=False)
    return net


def other_names(net):
    net.first, net.scales = net.conv, net.scale
    del net.conv, net.scale
    return net


MISFITS = [
    (lambda: models.create("resnet20"), r"'fc.weight' to be .*\(6, 8\), got .* and \d+ more differ; model_fn must"),
    (lambda: other_shape(make_odd()), r"expected 'conv.weight' to be .*\(8, 3, 3, 3\), got torch.float32 \(9, "),
    (lambda: other_names(make_odd()), r"'scale' is only in the file, and 3 more differ"),
    (lambda: make_odd().half(), r"expected 'scale' to be torch.float32 .*, got torch.float16 .* and 10 more differ"),
    (lambda: make_odd().to("meta"), r"got torch.float32 \(8, 1, 1\) without data"),
    (lambda: small(make_odd()), r"expected 'scale' to be .*\(8, 1, 1\), got torch.float32 \(4, 1, 1\)"),
    (lambda: fp.nn.convert_batchnorm(make_odd(), "sigmoid"), r"'norm' with scale weight, .* sigmoid.*conversions"),
    (None, r"does not say how to build its network; pass model_fn"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:convert_batchnorm")
@pytest.mark.parametrize("model_fn, message", MISFITS, ids=range(len(MISFITS)))
def test_a_network_that_does_not_fit(model_fn, message, tmp_path):
    fp.save(small(make_odd()), tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"load: .*odd.safetensors .*" + message):
        fp.load(tmp_path / "odd.safetensors", model_fn)


def test_not_strict_leaves_out_what_the_other_has_not(tmp_path):
    fp.save(small(make_odd()), tmp_path / "x")
    net = other_names(make_odd())
    first = net.first.weight.clone()
    with pytest.warns(UserWarning, match=r"'scale' is only in the file, and 3 more differ"):
        loaded = fp.load(tmp_path / "x", lambda: net, strict=False)
    assert torch.equal(loaded.first.weight, first) and loaded.fc.in_features == 4
    with pytest.raises(CheckpointError, match=r"expected 'conv.weight' to be"):
        fp.load(tmp_path / "x", lambda: other_shape(make_odd()), strict=False)
    with pytest.raises(ValueError, match=r"expected model_fn to return an nn.Module, got OrderedDict"):
        fp.load(tmp_path / "x", lambda: make_odd().state_dict())
    with pytest.raises(FileNotFoundError):  # what model_fn raises is its own
        fp.load(tmp_path / "x", lambda: (tmp_path / "no").read_bytes())


def set_key(*keys, value):
    def change(parts):
        node = parts.document
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


FORGED = [
    (set_key("format", value=2), r"has format 2, and fastprune \S+ reads up to format 1; update"),
    (set_key("architecture", "name", value="no-such"), r"needs 'no-such', which cannot be built .*unknown model"),
    (set_key("architecture", "name", value="resnet152"), r"'resnet152', .*it is larger than the file says"),
    (set_key("architecture", "name", value="mobilenet_v3_small"), r"network: 'conv1.weight' is only in the file"),
    (set_key("architecture", "arguments", "bound", value="x"), r"as recorded \(ValueError: models: bound"),
    (set_key("architecture", "arguments", "weights", value="DEFAULT"), r"has arguments for its network that"),
    (set_key("architecture", "arguments", "checkpoint_path", value="x"), r"has arguments for its network"),
    (set_key("architecture", "arguments", "pretrained", value=True), r"has arguments for its network"),
    (set_key("architecture", "arguments", "in_channels", value="__import__('os')"), r"has arguments for its network"),
    (set_key("architecture", "arguments", "in_channels", value=10**400), r"has arguments for its network"),
    (set_key("architecture", "arguments", "in_channels", value=10**9), r"MemoryError: it is larger than the file says"),
    (set_key("bounded", value=["bn1", "x"]), r"has a norm 'x' with scale sigmoid\(weight\), and the network none"),
    (set_key("lists", 0, value=[5, 3]), r"is damaged: its document is not as we write it \(has no proper 'lists'\)"),
    (set_key("lists", 0, value=[-8, 0]), r"no proper 'lists'"),
    (set_key("lists", 0, value=[0, 1, 1, 8]), r"no proper 'lists'"),
    (set_key("lists", 0, value=[10**9, 10**9 + 8]), r"\(keep 'conv1.weight': lists\)"),
    (set_key("keep", "conv1.weight", "shape", value=[10**9, 3, 3, 3]), r"its network had \d+ elements, more than"),
    (set_key("keep", "conv1.weight", "shape", value=[17, 3, 3, 3]), r"'conv1.weight' to be .*\(17, 3, 3, 3\), got"),
    (set_key("shared", value={"../../x": "fc.bias"}), r"'../../x' is only in the file"),
    (set_key("tensors", "fc.bias", "dtype", value="int32"), r"'fc.bias' is not of the dtype|expected 'fc.bias' to be"),
    (set_key("tensors", "fc.bias", "sha256", value="0" * 64), r"the SHA-256 of tensor 'fc.bias' is not the one"),
    (set_key("extra", value="\ud800"), r"its header is not JSON as we write it"),
    (set_key("extra", value=float("nan")), r"not JSON as we write it \(the constant NaN\)"),
    (set_key("extra", value=DEEP), r"not JSON as we write it"),
    (set_key("more", value=1), r"has other keys than ours"),
]  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    fp.save(small(models.create("resnet20")), path)
    return path


@pytest.mark.parametrize("change, message", FORGED, ids=[m for _, m in FORGED])
def test_a_forged_document(change, message, pruned, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pruned.read_bytes())
    edited(path, change)
    with pytest.raises(CheckpointError, match=message) as e:
        fp.load(path)
    assert "\n" not in str(e.value) and str(e.value).startswith(f"load: {path} ")


def test_forged_numbers(tmp_path):
    path = tmp_path / "x"
    model = small(fuzz.Splits(3))
    fp.save(model, path)
    assert fp.checkpoint.read(path)["numbers"]["parts[0]"]["value"] == 8
    good = path.read_bytes()
    for name, message in {
        "training": "expected the number 'training' to be 8, got no integer",
        "parts[9]": "got no integer",
        "parts[x]": "got no integer",
        "a.weight[0]": "got no integer",
        "a.weight": "got no integer|number 'a.weight'",
        "__class__.__init__": "got no integer",
        "a._version": "got no integer",
        "c.out_channels": "expected the number 'c.out_channels' to be 8, got 9",
    }.items():
        path.write_bytes(good)
        numbers = fuzz.Parts(good).document["numbers"]
        edited(path, set_key("numbers", value={name: numbers["parts[0]"]}))
        with pytest.raises(CheckpointError, match=message):
            fp.load(path, lambda: fuzz.Splits(3))


LISTS = b'{"a":[' + b"[]," * 2**18 + b"[]]}"
FOREIGN = {
    "empty": (b"", r"is truncated or no checkpoint"),
    "short": (b"abc", r"is truncated or no checkpoint: a header of \d+ bytes does not fit in, of 3 bytes"),
    "huge header": ((1 << 63).to_bytes(8, "little") + b"{}", r"a header of 9223372036854775808 bytes does not fit in"),
    "pickle": (
        pickle.dumps([1]),
        r"is a zip or pickle, as torch.save writes; expected a file that fastprune.save wrote",
    ),
    "zip": (b"PK\x03\x04" + bytes(99), r"is a zip or pickle"),
    "not ours": (safetensors.save({"w": torch.ones(2)}), r"was not written by fastprune.save: there is no document"),
    "theirs": (safetensors.save({"w": torch.ones(2)}, {"format": "pt"}), r"was not written by fastprune.save"),
    "no JSON": (bytes(100), r"its header is not JSON"),
    "deep": (len(b"[" * 10**5).to_bytes(8, "little") + b"[" * 10**5, r"its header is not JSON"),
    "lists": (
        len(LISTS).to_bytes(8, "little") + LISTS,
        r"is no checkpoint: its header has more lists than any network",
    ),
    "twice": (len(b'{"a":1,"a":1}').to_bytes(8, "little") + b'{"a":1,"a":1}', r"as we write it \(a key twice\)"),
}


@pytest.mark.parametrize("data, message", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file(data, message, tmp_path):
    (tmp_path / "x").write_bytes(data)
    for function in (fp.load, fp.checkpoint.read):
        with pytest.raises(CheckpointError, match=message):
            function(tmp_path / "x")


def test_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a checkpoint at .*no, got: No such file"):
        fp.load(tmp_path / "no")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(CheckpointError, match=r"is no regular file; expected one written by fastprune.save"):
            fp.load(path)


def test_each_flipped_bit_is_noticed(tmp_path):
    """One of each byte of a small file; more in the fuzz."""
    path, net = tmp_path / "x", lambda: nn.Linear(2, 1)
    fp.save(net(), path)
    data = path.read_bytes()
    assert len(data) < 1000
    bits = random.Random(0)
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << bits.randrange(8))]) + data[i + 1 :])
        with pytest.raises(CheckpointError):
            fp.load(path, net)


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


REFUSED = [
    (lambda: "x.safetensors", {}, r"save: expected an nn.Module and a path, got str first"),
    (lambda: Stateful(2, 2), {}, r"state_dict to be the model's parameters and buffers, got '_extra_state' besides"),
    (lambda: nn.LazyLinear(2), {}, r"expected weight to be a dense tensor .* got UninitializedParameter"),
    (lambda: nn.Linear(2, 2, device="meta"), {}, r"expected weight to be a dense tensor .* meta"),
    (lambda: nn.Linear(2, 2, dtype=torch.complex128), {}, r"expected weight to be .* got Parameter, torch.complex128"),
    (lambda: nn.Linear(2, 2), {"recipe": {"lr": float("nan")}}, r"finite numbers.* at recipe\['lr'\], got nan"),
    (lambda: nn.Linear(2, 2), {"recipe": {1: 2}}, r"strings, lists and dicts at recipe, got \{1: 2\}"),
    (lambda: nn.Linear(2, 2), {"extra": {"a": [torch.ones(1)]}}, r"at extra\['a'\]\[0\], got tensor"),
    (lambda: nn.Linear(2, 2), {"extra": "a" * 2**24}, r"expected recipe and extra to be small, got a header of 16777"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("make, options, message", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_saved(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fp.save(make(), tmp_path / "x", **options)
    assert os.listdir(tmp_path) == []


# The file is there as a whole or not at all ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(where, tmp_path, monkeypatch):
    path = tmp_path / "x"
    fp.save(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        monkeypatch.setattr(signal, "old", signal.signal(signal.SIGXFSZ, signal.SIG_IGN), raising=False)
    else:
        monkeypatch.setattr(os, where, full)
    try:
        with pytest.raises(
            CheckpointError, match=r"save: expected a file that can be written at .*x, got: .*nothing was"
        ):
            fp.save(nn.Linear(300, 300), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x"]
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fp.save(nn.Linear(3, 3), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x"]


def test_links_modes_and_what_is_no_file(tmp_path):
    real, link, net = tmp_path / "real", tmp_path / "link", nn.Linear(2, 2)
    link.symlink_to("real")
    mask = os.umask(0o027)
    try:
        fp.save(net, link)
        assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640
        real.chmod(0o604)
        fp.save(net, link)
        assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o604
    finally:
        os.umask(mask)
    assert torch.equal(fp.load(link, lambda: nn.Linear(2, 2)).weight, net.weight)
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "no" / "x", "No such"),
    ):
        with pytest.raises(CheckpointError, match=f"save: expected a file that can be written at .*{why}"):
            fp.save(net, path)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "real"]


# Fuzz ----------------------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused_or_right(capsys):
    """A small share of ``python -m bench.fuzz_checkpoints``, with its guards."""
    code = fuzz.main(["--cases=560", "--seed=1", "--no-timm", "--out=-"])
    out, err = capsys.readouterr()
    assert code == 0 and "| **all** | **560** |" in out, out + err


def test_the_fuzz_sees_a_loader_that_is_too_trusting(tmp_path, monkeypatch):
    files = fuzz.samples(tmp_path)
    path = tmp_path / "case"

    def outcomes(kind):
        found = set()
        for case in fuzz.cases(files, 280, 0):
            if case.kind == kind:
                path.write_bytes(case.data)
                found.add(fuzz.outcome(path, files[case.sample], case.edited))
        return found

    assert outcomes("flipped bits") == {"refused"}
    monkeypatch.setattr(checkpoint, "_check_hash", lambda *args: None)
    assert "another network" in outcomes("flipped bits")
    monkeypatch.setattr(checkpoint, "_check", lambda *args: None)
    assert any("Error: " in outcome for outcome in outcomes("document, hash made right"))


# Other processes ------------------------------------------------------------------------------------------------------

NO_METHODS = """
import importlib.abc, importlib.machinery, pathlib, pickle, sys, types

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("fastprune.methods", "fastprune.train", "fastprune.compact", "fastprune.data")):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
package = types.ModuleType("fastprune")  # its __init__ would import them
package.__path__ = [sys.argv[1]]
sys.modules["fastprune"] = package
from fastprune import checkpoint
import torch

def no(*args, **kwargs):
    raise AssertionError("pickle")

pickle.Unpickler = pickle.load = pickle.loads = torch.load = no
model = checkpoint.load(sys.argv[2]).eval()
with torch.no_grad():
    print(model(torch.ones(1, 3, 16, 16)).sum().item())
"""


def test_loading_needs_no_method_code_and_no_pickle(pruned):
    command = [sys.executable, "-c", NO_METHODS, str(Path(fp.__file__).parent), str(pruned)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert float(done.stdout) == fp.load(pruned).eval()(torch.ones(1, 3, 16, 16)).sum().item()


NO_FASTPRUNE = """
import sys

sys.modules["fastprune"] = None
{}
x = torch.ones(1, 3, 64, 64)
with torch.no_grad():
    print(model.eval()(x).abs().sum().item(), model.conv1.out_channels)
"""


def test_the_documented_lines_load_without_fastprune(tmp_path):
    torch.manual_seed(0)
    x = torch.ones(1, 3, 64, 64)
    model = stir(models.create("resnet18")).eval()
    compact(model, uneven_keep(trace(model, x)), x, check=False)
    fp.save(model, tmp_path / "small.safetensors")
    page = (fuzz.ROOT / "docs" / "checkpoints.md").read_text().split("## Without fastprune")[1]
    code = NO_FASTPRUNE.format(page.split("```python\n")[1].split("```")[0])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, channels = map(float, done.stdout.split())
    with torch.no_grad():
        assert total == pytest.approx(model(x).abs().sum().item(), rel=1e-5) and channels == 32
