"""Networks: sizes and costs of the authors' to the last unit, initialisation, names."""

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune import compact, flops, graph, models
from fastprune import nn as fpnn
from fastprune.train import from_scratch

COSTS = json.loads((Path(__file__).parent / "golden" / "flops_reference.json").read_text())
REFERENCE = COSTS["unpruned"]
CASES = [
    ("vgg16-rni", 10, None, "vgg16_cifar10_rni"),
    ("vgg16-rni", 100, None, "vgg16_cifar100_rni"),
    ("vgg16-rni", 10, "sigmoid", "vgg16_cifar10_rni_sigbn"),
    ("vgg16-rni", 100, "sigmoid", "vgg16_cifar100_rni_sigbn"),
    ("resnet56-rni", 10, None, "resnet56_cifar10"),
    ("resnet56-rni", 100, None, "resnet56_cifar100"),
    ("resnet56-rni", 10, "sigmoid", "resnet56_cifar10_rni_sigbn"),
    ("resnet56", 10, None, "resnet56_cifar10"),
    ("resnet56", 100, None, "resnet56_cifar100"),
    ("vgg19", 10, None, "vgg19_cifar10_greg"),
    ("vgg19", 100, None, "vgg19_cifar100_greg"),
    ("wrn-40-2", 10, None, "wrn_40_2"),
    ("densenet-bc-100", 10, None, "densenet_bc_100_12"),
    ("resnet34", 1000, None, "resnet34_imagenet"),
    ("resnet50", 1000, None, "resnet50_imagenet"),
    ("resnet101", 1000, None, "resnet101_imagenet"),
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
    size = 224 if key.endswith("imagenet") else 32
    with torch.device("meta"):
        model = models.create(name, num_classes=classes, **({"bound": bound} if bound else {}))
        macs, layers = count(model, torch.empty(1, 3, size, size))
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert macs == ref["macs"]
    assert sum(p.numel() for p in model.parameters()) == ref["params_total"]
    assert sum(p.numel() for m in weighted for p in m.parameters()) == ref["params_convfc"]
    assert layers == list(ref["layers"].values())


@pytest.mark.parametrize("name, classes, key", [c[:2] + c[3:] for c in CASES if c[0] in ("resnet56", "vgg19")])
def test_flops_counts_the_same(name, classes, key):
    ours, ref = flops(models.create(name, num_classes=classes), torch.zeros(1, 3, 32, 32)), REFERENCE[key]
    assert (ours["macs"], ours["params"]) == (ref["macs"], ref["params_total"])


def family(key):
    """Name and arguments of a network of the reference's reduced families."""
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", key)]
    if key.startswith("densenet_bc"):  # densenet_bc_<depth>_<growth>
        return "densenet-bc-100", {"depth": int(numbers[0]), "growth": int(numbers[1])}
    if key.startswith("wrn_40_2_bottle"):
        return "wrn-40-2", {"bottle_mult": numbers[2]}
    return "wrn-40-2", {"depth": int(numbers[0]), "width": numbers[1]}


@pytest.mark.parametrize("key", COSTS["reduced_families"])
def test_reduced_families_have_the_authors_size(key):
    ref, (name, arguments) = COSTS["reduced_families"][key], family(key)
    with torch.device("meta"):
        model = models.create(name, **arguments)
        macs, _ = count(model, torch.empty(1, 3, 32, 32))
    assert (macs, sum(p.numel() for p in model.parameters())) == (ref["macs"], ref["params_total"])


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
def test_taylor_gates_number_as_the_authors(name):
    """Taylor pruning gates bn1 and bn2 inside each block, and each stage's residual stream once (arXiv:1906.10771)."""
    with torch.device("meta"):
        model = models.create(name, num_classes=1000)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    in_block = sum(block.bn1.num_features + block.bn2.num_features for stage in stages for block in stage)
    last = "bn3" if name != "resnet34" else "bn2"
    skip = sum(getattr(stage[-1], last).num_features for stage in stages)
    ref = COSTS["taylor_gates"][name]
    assert {"in_block": in_block, "skip": skip, "total": in_block + skip} == ref


SMALL = {
    "wrn": ("wrn-40-2", {"depth": 10, "width": 0.5}),
    "wrn-bottle": ("wrn-40-2", {"depth": 16, "width": 0.5, "bottle_mult": 0.5}),
    "wrn-sigmoid": ("wrn-40-2", {"depth": 10, "width": 1.0, "bound": "sigmoid"}),
    "densenet": ("densenet-bc-100", {"depth": 10, "growth": 4}),
}


@pytest.mark.parametrize("small", SMALL)
def test_small_relatives_are_halved(small):
    name, arguments = SMALL[small]
    model, x = models.create(name, num_classes=5, **arguments), torch.randn(2, 3, 16, 16)
    assert model(x).shape == (2, 5)
    traced, before = graph.trace(model, x), sum(p.numel() for p in model.parameters())
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert {conv for group in traced.groups.values() for conv in group.convs} == set(convs)
    keep = {key: torch.arange(group.size) % 2 == 0 for key, group in traced.groups.items()}
    compact(model, keep, x)  # proves that the small network computes what the masked one does
    assert 0.2 < sum(p.numel() for p in model.parameters()) / before < 0.36
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("channels, size", [(3, 32), (1, 28), (1, 16)])
def test_lenets_gates_cut_what_compact_removes(channels, size):
    model, x = (
        models.create("lenet-taylor", in_channels=channels, image_size=size),
        torch.randn(2, channels, size, size),
    )
    gates = {"conv1": model.gate1, "conv2": model.gate2, "fc1": model.gate3}
    assert {name: len(gate.weight) for name, gate in gates.items()} == {"conv1": 16, "conv2": 32, "fc1": 120}
    assert all((gate.weight == 1).all() and not gate.weight.requires_grad for gate in gates.values())
    whole = model(x)
    keep = {name: torch.arange(len(gate.weight)) % 2 == 0 for name, gate in gates.items()}
    for name, gate in gates.items():
        gate.weight.data.mul_(keep[name])
    masked = model(x)
    compact(model, keep, x)
    assert [len(gate.weight) for gate in gates.values()] == [8, 16, 60] and model.fc1.out_features == 60
    torch.testing.assert_close(model(x), masked)
    assert not torch.allclose(whole, masked, atol=1e-3)
    with pytest.raises(ValueError, match="image_size must be at least 16, got 15"):
        models.create("lenet-taylor", image_size=15)


@pytest.mark.parametrize("name", ["wrn-40-2", "densenet-bc-100"])
def test_fractional_sizes_and_nonsense(name):
    assert models.create(name, depth=10, bottle_mult=0.001)(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4 .*got 39"):
        models.create(name, depth=39)
    with pytest.raises(ValueError, match=r"bottle_mult .*above 0|bottle_mult > 0"):
        models.create(name, bottle_mult=0)


@pytest.mark.parametrize("name", ["wrn-40-2", "densenet-bc-100"])
def test_initialisation_is_by_fan_out(name):
    model = models.create(name)
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 1000:
            std = math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels))
            assert abs(m.weight.std() / std - 1) < 6 / math.sqrt(2 * m.weight.numel())
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()
    assert not model.fc.bias.any() and model.fc.weight.abs().max() <= 1 / math.sqrt(model.fc.in_features)


@pytest.mark.parametrize("projects", [False, True])
def test_the_shortcut_reads_what_the_authors_does(projects):
    """relu(bn1(x)) goes through the 1x1 convolution, but x itself through the identity."""
    block = models.wide_resnet.PreActBlock(4, 4, 8 if projects else 4, 2 if projects else 1, None).eval()
    nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    nn.init.constant_(block.bn1.bias, 0.5)
    x = torch.randn(2, 4, 6, 6)
    expected = block.shortcut((block.bn1(x)).relu()) if projects else x
    assert (block.shortcut is None) == (not projects)
    assert torch.equal(block(x), expected)


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


@pytest.mark.parametrize("name, options", [("resnet20", {}), ("resnet110", {}), ("vgg19", {"width": 0.5})])
def test_gregs_initialisation_is_kaiming_normal_by_fan_in(name, options):
    model = models.create(name, **options)
    assert all((m.weight == 1).all() and not m.bias.any() for m in model.modules() if type(m) is nn.BatchNorm2d)
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.numel() > 600:
            std = math.sqrt(2 / m.weight[0].numel())
            assert abs(m.weight.std() / std - 1) < 6 / math.sqrt(2 * m.weight.numel())


def test_resnets_have_the_depth_of_their_name():
    with torch.device("meta"):
        for depth in (20, 56, 110):
            model = models.create(f"resnet{depth}", in_channels=1)
            assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth
            assert model(torch.empty(2, 1, 28, 28)).shape == (2, 10)


def test_vgg19_takes_a_width():
    with torch.device("meta"):
        model = models.create("vgg19", width=0.25, in_channels=1)
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 10)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [16] * 2 + [32] * 2 + [64] * 4 + [128] * 8
    assert all(m.bias is None for m in convs)


def test_the_linear_network_is_tpps():
    model = models.create("mlp-7-linear")
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(100, 784), *[(100, 100)] * 5, (10, 100)]
    a, b = torch.randn(2, 3, 1, 28, 28)
    torch.testing.assert_close(model(2 * a - b), 2 * model(a) - model(b))  # affine
    bent = models.create("mlp-7-linear", act="relu")
    assert sum(isinstance(m, nn.ReLU) for m in bent.modules()) == 6
    assert (bent(2 * a - b) - 2 * bent(a) + bent(b)).abs().max() > 1e-3


def test_orthogonal_layers_pass_the_gradient_unchanged():
    options = {"in_features": 12, "hidden": 8, "depth": 4, "num_classes": 5}
    model = models.create("mlp-7-linear", **options, orthogonal=True)
    jacobian = model(torch.eye(12)) - model(torch.zeros(1, 12))
    torch.testing.assert_close(torch.linalg.svdvals(jacobian), torch.ones(5))
    again = from_scratch(model, seed=1)  # the model knows how it was initialised
    assert not torch.equal(again.layers[1].weight, model.layers[1].weight)
    torch.testing.assert_close(again.layers[1].weight @ again.layers[1].weight.T, torch.eye(8))
    with pytest.raises(ValueError, match="act must be 'linear' or 'relu', got 'tanh'"):
        models.create("mlp-7-linear", act="tanh")
    with pytest.raises(ValueError, match="must be at least 1, got 784, 0, 7"):
        models.create("mlp-7-linear", hidden=0)


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
    model = models.create(name, num_classes=4, **({"in_features": 3 * 32 * 32} if name == "mlp-7-linear" else {}))
    loss = nn.functional.cross_entropy(model(torch.randn(2, channels, 32, 32)), torch.tensor([0, 3]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)


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
