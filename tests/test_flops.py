"""flops against the published networks and commands (tests/golden/flops_reference.json) and against the definition."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fastprune import models
from fastprune.compact import compact
from fastprune.flops import flops
from fastprune.graph import ChannelGraph, trace
from fastprune.ratios import layers, left_alone, resolve, skipped
from fastprune.select import keep_masks, number_removed, pick
from fastprune.surgery import shrink

REFERENCE = json.loads((Path(__file__).parent / "golden" / "flops_reference.json").read_text())


def layers_of(report) -> dict[str, list[int]]:
    return {layer["name"]: [layer["out_channels"], layer["in_channels"]] for layer in report["layers"]}


@pytest.mark.parametrize("name, model, size", [
    ("resnet34_imagenet", lambda: torchvision.models.resnet34(), 224),
    ("resnet50_imagenet", lambda: torchvision.models.resnet50(), 224),
    ("resnet56_cifar10", lambda: models.create("resnet56"), 32),
    ("resnet56_cifar10_rni_sigbn", lambda: models.create("resnet56-rni", bound="sigmoid"), 32),
    ("vgg16_cifar10_rni", lambda: models.create("vgg16-rni"), 32),
    ("vgg16_cifar100_rni_sigbn", lambda: models.create("vgg16-rni", num_classes=100, bound="sigmoid"), 32),
])  # fmt: skip
def test_published_networks(name, model, size):
    expected = REFERENCE["unpruned"][name]
    report = flops(model(), torch.zeros(1, 3, size, size))
    assert (report["macs"], report["params"]) == (expected["macs"], expected["params_total"])
    assert sum(layer["params"] for layer in report["layers"]) == expected["params_convfc"]
    got = layers_of(report)
    assert sorted(got.values()) == sorted(expected["layers"].values())
    if name.endswith("imagenet"):  # torchvision's own names
        assert got == expected["layers"]


@pytest.mark.parametrize("row", REFERENCE["ucs_local"], ids=lambda r: f"{r['model']}-{r['prune_pc']}")
def test_what_a_uniform_ratio_leaves(row):
    """UCS: the same share of every prunable norm removed, at least three channels kept."""
    net, data = row["model"].split("_")
    model = models.create(f"{net}-rni", num_classes=int(data.removeprefix("cifar")))
    x = torch.zeros(2, 3, 32, 32)
    graph = trace(model, x)
    norm = {name: model.get_submodule(g.norms[0]) for name, g in graph.groups.items() if not g.coupled}
    scores = {name: torch.randn_like(m.weight) for name, m in norm.items()}
    keep = keep_masks(scores, row["prune_pc"], "local")
    assert [int(k.sum()) for k in keep.values()] == row["kept_per_bn"]
    report = flops(compact(model, keep, x, check=False), x)
    assert (report["macs"], report["params"]) == (row["macs"], row["params_total"])


NETWORKS = {
    "resnet56": (lambda: models.create("resnet56"), 32),
    "vgg19": (lambda: models.create("vgg19", num_classes=100), 32),
    "resnet34": (torchvision.models.resnet34, 224),
    "resnet50": (torchvision.models.resnet50, 224),
}


@cache
def dense(name: str) -> tuple[nn.Module, ChannelGraph, torch.Tensor]:
    """A published network, its graph and an input; ``copy`` it before cutting."""
    make, size = NETWORKS[name]
    model = make()
    return model, trace(model, torch.zeros(2, 3, 32, 32)), torch.zeros(1, 3, size, size)


def written(spec: list | dict | str) -> str:
    """A ratio as the READMEs write it: ``[0,0.5,0]``, ``*layer*.conv1:0.9`` or ``[1-15:0.5]``."""
    if isinstance(spec, dict):
        return ",".join(f"{pattern}:{ratio}" for pattern, ratio in spec.items())
    return spec if isinstance(spec, str) else f"[{','.join(map(str, spec))}]"


@pytest.mark.parametrize("row", REFERENCE["commands"], ids=lambda r: f"{r['model']}-{written(r['spec']['stage_pr'])}")
def test_published_commands(row):
    """Each ratio of the READMEs of GReg and TPP: channels of every layer, MACs and parameters, exactly."""
    model, graph, x = dense(row["model"])
    names = [name for name, group in graph.groups.items() if not group.coupled]
    spec = row["spec"]
    ratios = resolve(written(spec["stage_pr"]), model, names, reasons=left_alone(graph, names))
    skip = spec.get("skip_layers")
    ratios |= dict.fromkeys(skipped(written(skip), model, names) if skip else (), 0.0)
    # the mean magnitude of each filter; TPP's limit differs from GReg's only above 200 channels
    rows = {name: model.get_submodule(name).weight.detach().abs().flatten(1).mean(1) for name in names}
    limit = "tpp" if row["source"].startswith("TPP") else "greg"
    keep = {name: pick(rows[name], ratio, limit=limit) for name, ratio in ratios.items()}
    small = copy.deepcopy(model)
    shrink(small, graph.kept(keep), None)
    report = flops(small, x)
    assert list(layers_of(report).values()) == in_running_order(report, row["layers"])
    assert (report["macs"], report["params"]) == (row["macs"], row["params_total"])
    assert sum(layer["params"] for layer in report["layers"]) == row["params_convfc"]


def in_running_order(report, expected: dict[str, list[int]]) -> list[list[int]]:
    """By torchvision's names where they are the same; else our networks have the authors' order of layers."""
    names = [layer["name"] for layer in report["layers"]]
    return [expected[name] for name in names] if set(names) == set(expected) else list(expected.values())


def test_all_published_commands_are_there():
    assert len(REFERENCE["commands"]) == 30
    assert {row["model"] for row in REFERENCE["commands"]} == set(NETWORKS)


def test_published_unstructured_command():
    """Weight by weight every convolution and linear layer counts, shortcuts too: only the numbers, no network."""
    row = REFERENCE["unstructured_resnet50_0.827"]
    model, _, _ = dense("resnet50")
    ratios = resolve("[0,0.827,0.827,0.827,0.827,0.827]", model, layers(model))
    sizes = {name: model.get_submodule(name).weight.numel() for name in ratios}
    zeroed = {name: number_removed(ratio, sizes[name]) for name, ratio in ratios.items()}
    assert {name: [sizes[name], zeroed[name]] for name in sizes} == row["per_layer_numel_zeroed"]
    assert (
        (sum(sizes.values()), sum(zeroed.values())) == (row["conv_fc_weights"], row["zeroed"]) == (25502912, 21083162)
    )


class Odd(nn.Module):
    """What the networks above do not have: groups, transposed, 1-d, shared and repeated layers, tokens."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.tokens = nn.Linear(6, 6)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.tokens.weight

    def forward(self, x):
        x = self.up(self.grouped(x)).flatten(2)
        return self.line(self.tied(self.tokens(self.tokens(x.transpose(1, 2)))).transpose(1, 2))


def test_each_kind_of_layer():
    model = Odd()
    model.grouped.eval()
    report = flops(model, torch.randn(3, 4, 8, 8))
    rows = {(layer["name"], i): layer for i, layer in enumerate(report["layers"])}
    assert [name for name, _ in rows] == ["grouped", "up", "tokens", "tokens", "tied", "line"]
    grouped, up, first, again, tied, line = rows.values()
    assert (grouped["kind"], grouped["groups"], grouped["macs"]) == ("Conv2d", 2, 8 * 2 * 9 * 64)
    assert (up["kind"], up["macs"], up["output_shape"]) == ("ConvTranspose2d", 8 * 6 * 4 * 64, (3, 6, 16, 16))
    assert [r["macs"] for r in (first, again, tied)] == [36 * 256] * 3
    assert [r["params"] for r in (first, again, tied)] == [42, 0, 6]  # weight and bias, nothing, its own bias
    assert (line["kind"], line["macs"], line["in_channels"], line["out_channels"]) == ("Conv1d", 90 * 256, 6, 5)
    assert report["macs"] == sum(r["macs"] for r in rows.values())
    assert report["params"] == 8 * 2 * 9 + 8 + 8 * 6 * 4 + 36 + 6 + 6 + 90 + 5
    assert model.training and not model.grouped.training and not any(m._forward_hooks for m in model.modules())


def test_an_error_inside_the_model_leaves_no_hooks():
    model = Odd()
    with pytest.raises(RuntimeError):
        flops(model, torch.randn(3, 5, 8, 8))
    assert model.training and not any(m._forward_hooks for m in model.modules())
