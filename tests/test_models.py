"""Networks: sizes and costs of the authors' to the last unit, initialisation, names."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune import models
from fastprune import nn as fpnn

REFERENCE = json.loads((Path(__file__).parent / "golden" / "flops_reference.json").read_text())["unpruned"]
CASES = [
    ("vgg16-rni", 10, None, "vgg16_cifar10_rni"),
    ("vgg16-rni", 100, None, "vgg16_cifar100_rni"),
    ("vgg16-rni", 10, "sigmoid", "vgg16_cifar10_rni_sigbn"),
    ("vgg16-rni", 100, "sigmoid", "vgg16_cifar100_rni_sigbn"),
    ("resnet56-rni", 10, None, "resnet56_cifar10"),
    ("resnet56-rni", 100, None, "resnet56_cifar100"),
    ("resnet56-rni", 10, "sigmoid", "resnet56_cifar10_rni_sigbn"),
    ("resnet56", 10, None, "resnet56_cifar10"),
]


def count(model, x):
    """MACs and layer shapes in order of execution, by hooks: independent of fastprune.flops."""
    macs, layers, hooks = 0, [], []

    def hook(module, _, y):
        nonlocal macs
        macs += module.weight.numel() * (y[0, 0].numel() if y.dim() == 4 else 1)
        layers.append(list(module.weight.shape[:2]))

    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            hooks.append(m.register_forward_hook(hook))
    with torch.no_grad():
        model.eval()(x)
    for h in hooks:
        h.remove()
    return macs, layers


@pytest.mark.parametrize("name, classes, bound, key", CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_parameters_and_macs_are_the_authors(name, classes, bound, key):
    ref = REFERENCE[key]
    model = models.create(name, num_classes=classes, **({"bound": bound} if bound else {}))
    macs, layers = count(model, torch.randn(1, 3, 32, 32))
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert macs == ref["macs"]
    assert sum(p.numel() for p in model.parameters()) == ref["params_total"]
    assert sum(p.numel() for m in weighted for p in m.parameters()) == ref["params_convfc"]
    assert layers == list(ref["layers"].values())


@pytest.mark.parametrize("name", ["vgg16-rni", "resnet56-rni"])
@pytest.mark.parametrize("bound", [None, "sigmoid"])
def test_initialisation_is_rnis(name, bound):
    model = models.create(name, bound=bound)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([m.weight.detach() for m in norms])
    if bound:
        assert all(isinstance(m, fpnn.SigmoidBatchNorm2d) and m.bias is None for m in norms)
        assert abs(scales.mean()) < 4 / math.sqrt(len(scales)) and abs(scales.std() - 1) < 0.1  # N(0, 1)
    else:
        assert all(type(m) is nn.BatchNorm2d and not m.bias.any() for m in norms)
        assert (scales == 0.5).all()
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 1000:
            std = math.sqrt(2 / (9 * m.out_channels))
            assert abs(m.weight.std() / std - 1) < 6 / math.sqrt(2 * m.weight.numel())
            assert m.bias is None or not m.bias.any()
        elif isinstance(m, nn.Linear):
            assert abs(m.weight.std() / 0.01 - 1) < 0.2 and not m.bias.any()


def test_the_shortcut_subsamples_and_pads_both_sides():
    block = models.resnet_cifar.BasicBlock(4, 8, 2, None).eval()
    nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert y.shape == (2, 8, 3, 3) and not y[:, :2].any() and not y[:, 6:].any()
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])


def test_rnis_stem_has_no_relu_and_the_other_has():
    x = torch.randn(2, 3, 8, 8)
    for name, relu in (("resnet56-rni", False), ("resnet56", True)):
        model, seen = models.create(name).eval(), []
        model.layer1.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(x)
        assert (seen[0].min() >= 0) == relu


@pytest.mark.parametrize("size", [8, 16])
def test_vgg_small_takes_digits(size):
    assert models.create("vgg-small")(torch.randn(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_network_trains_one_step(name):
    channels = 1 if name == "vgg-small" else 3
    model = models.create(name, num_classes=4)
    loss = nn.functional.cross_entropy(model(torch.randn(2, channels, 32, 32)), torch.tensor([0, 3]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


def test_torchvisions_classifiers_come_by_their_own_names():
    model = models.create("squeezenet1_1", num_classes=7)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert {"resnet50", "vgg16-rni", "mobilenet_v2"} <= set(models.list_models())
    assert "fcn_resnet50" not in models.list_models()  # segmentation


def test_an_unknown_name_gets_a_hint():
    with pytest.raises(ValueError, match=r"unknown model 'resnet57'.*did you mean 'resnet5"):
        models.create("resnet57")
    if not find_spec("timm"):
        with pytest.raises(ValueError, match="pip install timm"):
            models.create("convnext_pico")
    with pytest.raises(ValueError, match="bound must be 'sigmoid' or None"):
        models.create("vgg-small", bound="tanh")


def test_register_refuses_a_taken_name():
    def vgg16_rni(num_classes=10):
        return nn.Identity()

    with pytest.raises(ValueError, match=r"'vgg16-rni' is already taken by fastprune\.models\.vgg"):
        models.register(vgg16_rni)
