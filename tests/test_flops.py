"""flops against the published networks (tests/golden/flops_reference.json) and against the definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fastprune import models
from fastprune.compact import compact
from fastprune.flops import flops
from fastprune.graph import trace
from fastprune.select import keep_masks

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
