"""Gates: where they sit, and their per-sample gradients against float64 autograd through explicit factors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from torch import nn

from fastprune import backends, models
from fastprune.errors import GraphError
from fastprune.gates import GateStatistics, find_gates
from fastprune.graph import trace
from fastprune.nn import BatchNormAct2d, Gate, convert_batchnorm
from fastprune.oracle import explicit_gates, unfused

REFERENCE = json.loads((Path(__file__).parent / "golden" / "flops_reference.json").read_text())
SMALL = {
    "resnet56": (lambda: models.create("resnet56"), (4, 3, 16, 16)),
    "densenet-bc": (lambda: models.create("densenet-bc-100", depth=22), (4, 3, 16, 16)),
    "wrn": (lambda: models.create("wrn-40-2", depth=10, width=0.5), (4, 3, 16, 16)),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), (2, 3, 64, 64)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (2, 3, 64, 64)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(num_classes=10, dropout=0), (2, 3, 64, 64)),
    "vgg without norms": (lambda: torchvision.models.vgg11(num_classes=10, dropout=0), (2, 3, 32, 32)),
}


def found(model, shape, **options):
    graph = trace(model, torch.randn(shape))
    return graph, find_gates(model, graph, **options)


def explicit(model, names, x, y, dtype=torch.float64, **options):
    """(N, K) float64: gradients of explicit per-sample factors on the outputs of modules, by autograd in ``dtype``."""
    copied, gates = unfused(model, names, x[:2], **options)
    copied.to(dtype)
    values = {name: torch.ones(len(x), gate.size, dtype=dtype, requires_grad=True) for name, gate in gates.items()}
    with backends.force("eager"), explicit_gates(copied, gates, values):
        loss = F.cross_entropy(copied(x.to(dtype)), y)
    return torch.cat(torch.autograd.grad(loss, list(values.values())), dim=1).double()


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("fuse", [False, True])
def test_counts_of_the_authors(name, fuse):
    model = torchvision.models.get_model(name)
    if fuse:
        convert_batchnorm(model, fuse=True)
    _, gates = found(model, (2, 3, 32, 32), branches=True)
    skips = [gate for gate in gates.values() if gate.kind == "skip"]
    expected = REFERENCE["taylor_gates"][name]
    assert sum(g.size for g in skips) == expected["skip"]
    assert sum(g.size for g in gates.values()) == expected["total"]
    blocks = {"resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}[name]
    assert [len(g.sites) for g in skips] == blocks
    assert "conv1" not in gates or gates["conv1"].kind == "skip"  # the stem is left alone


def test_stem_on_request():
    model = models.create("vgg-small", in_channels=3)
    _, without = found(model, (2, 3, 16, 16))
    _, with_stem = found(model, (2, 3, 16, 16), stem=True)
    assert len(with_stem) == len(without) + 1


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_per_sample_gradients_are_those_of_explicit_factors(name, fuse):
    make, shape = SMALL[name]
    model = make()
    if fuse:
        convert_batchnorm(model, fuse=True)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    _, gates = found(model, shape, branches=True)
    expected = explicit(model, list(gates), x, y, branches=True)
    eager = explicit(model, list(gates), x, y, torch.float32, branches=True)
    plain = copy.deepcopy(model)
    results = {}
    for dtype in (torch.float64, torch.float32):
        statistics = GateStatistics(model.to(dtype), gates)
        F.cross_entropy(model(x.to(dtype)), y).backward()
        results[dtype] = statistics.per_sample().double()
        statistics.close()
        model.zero_grad()
    scale = expected.abs().max(0, keepdim=True).values.clamp(min=1e-12)
    assert ((results[torch.float64] - expected) / scale).abs().max() < 1e-8
    assert (results[torch.float32] - expected).norm() <= 2 * (eager - expected).norm() + 1e-6 * expected.norm()
    # nothing is left behind
    assert not any(m._forward_hooks or m.__dict__.get("gate_slots") for m in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip


def attached(model, **options):
    _, gates = found(model, (2, 3, 8, 8), stem=True)
    return GateStatistics(model, gates, **options)


def test_sums_over_one_backward():
    model, x, y = net(), torch.randn(5, 3, 8, 8), torch.randint(10, (5,))
    expected = explicit(model, ["0", "3"], x, y, stem=True)
    statistics = attached(model, pixel_magnitudes=True)
    (F.cross_entropy(model(x), y) + statistics.penalty()).backward()
    sums = statistics.take()
    torch.testing.assert_close(sums.gradient, expected.sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums.squares, expected.square().sum(0), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(sums.magnitudes, expected.abs().sum(0), rtol=1e-4, atol=1e-6)
    assert (sums.pixel_magnitudes > sums.magnitudes * 0.999).all() and sums.samples == 5
    assert statistics.take() is None
    assert list(statistics.split(sums.gradient)) == ["0", "3"]


def test_accumulation_adds_up_and_batches_may_differ():
    model, x, y = net(), torch.randn(9, 3, 8, 8), torch.randint(10, (9,))
    model.eval()  # so that parts of a batch are independent
    statistics = attached(model)
    (F.cross_entropy(model(x), y, reduction="sum") + statistics.penalty()).backward()
    whole = statistics.take()
    for part in (slice(0, 6), slice(6, 9)):
        (F.cross_entropy(model(x[part]), y[part], reduction="sum") + statistics.penalty()).backward()
    parts = statistics.take()
    assert parts.samples == whole.samples == 9
    for a, b in zip(whole[:3], parts[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_forward_without_backward_leaves_nothing():
    model, x, y = net(), torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    statistics = attached(model)
    F.cross_entropy(model(x), y).backward()  # nobody takes its sums
    model(x[:4])
    (F.cross_entropy(model(x[:2]), y[:2]) + statistics.penalty()).backward()
    got = statistics.take()
    again = attached(model2 := copy.deepcopy(model))
    (F.cross_entropy(model2(x[:2]), y[:2]) + again.penalty()).backward()
    assert got.samples == 2 and torch.equal(got.gradient, again.take().gradient)


def test_two_runs_agree_bit_for_bit():
    x, y, runs = torch.randn(6, 3, 16, 16), torch.randint(10, (6,)), []
    for _ in range(2):
        torch.manual_seed(1)
        model = convert_batchnorm(models.create("resnet20"))
        _, gates = found(model, (2, 3, 16, 16))
        statistics = GateStatistics(model, gates)
        (F.cross_entropy(model(x), y) + statistics.penalty()).backward()
        runs.append(statistics.take())
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], runs[1][:3], strict=True))


def test_explicit_gates_go_first():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Gate(8), nn.Flatten(), nn.Linear(288, 10))
    _, gates = found(model, (2, 3, 8, 8))
    assert [site.module for site in gates["0"].sites] == ["3"]  # the stem, but it has a gate of its own
    with torch.no_grad():
        model[3].weight[3] = 0.0
    statistics = GateStatistics(model, gates)
    (F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.randint(10, (4,))) + statistics.penalty()).backward()
    assert statistics.take().gradient[3] != 0  # of the gate, not times the gate


def test_a_copy_and_a_saved_model_are_not_attached(tmp_path):
    model, x, y = net(), torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    statistics = attached(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        F.cross_entropy(other(x), y).backward()
        assert statistics.take() is None
        assert other(x).shape == (4, 10)


def test_a_norm_that_lost_its_residual_says_so():
    model = convert_batchnorm(models.create("resnet20"))
    _, gates = found(model, (2, 3, 16, 16))
    statistics = GateStatistics(model, gates)
    with pytest.raises(GraphError, match="expected a residual"):
        model.layer1[0].bn2(torch.randn(2, 16, 8, 8))
    statistics.close()
    assert isinstance(model.layer1[0].bn2, BatchNormAct2d) and model.layer1[0].bn2(torch.randn(2, 16, 8, 8)).ndim == 4


def test_no_gates_are_refused():
    with pytest.raises(ValueError, match="at least one gate"):
        GateStatistics(net(), {})


def test_accumulation_with_a_frozen_first_layer():
    model, x, y = net().eval(), torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    model[0].requires_grad_(False)
    statistics = attached(model)
    for part in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(model(x[part]), y[part]) + statistics.penalty()).backward()
    assert statistics.take().samples == 8


def test_a_gate_behind_frozen_layers_says_so():
    model, x, y = net(), torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    model[:2].requires_grad_(False)
    statistics = attached(model)
    (F.cross_entropy(model(x), y) + statistics.penalty()).backward()
    with pytest.raises(GraphError, match="all before it is frozen"):
        statistics.take()
    (F.cross_entropy(model(x.requires_grad_()), y) + statistics.penalty()).backward()
    assert statistics.take().gradient.all()


def test_two_forwards_before_a_backward_say_so():
    model, x, y = net(), torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    statistics = attached(model)
    (F.cross_entropy(model(x), y) + F.cross_entropy(model(-x), y) + statistics.penalty()).backward()
    with pytest.raises(GraphError, match="one forward per backward"):
        statistics.take()
    (F.cross_entropy(model(x), y) + statistics.penalty()).backward()
    assert statistics.take().samples == 4


class Frames(nn.Module):
    """(N, T, C, H, W): a convolution over single frames, one over their mean."""

    def __init__(self):
        super().__init__()
        self.frame = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.clip = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        h = self.frame(x.flatten(0, 1)).relu().unflatten(0, x.shape[:2]).mean(1)
        return self.fc(self.clip(h).relu().mean((2, 3)))


def test_two_batch_sizes_in_one_forward_say_so():
    model, x = Frames(), torch.randn(4, 5, 3, 8, 8)
    statistics = GateStatistics(model, find_gates(model, trace(model, x), stem=True))
    (model(x).sum() + statistics.penalty()).backward()
    with pytest.raises(GraphError, match="expected one batch size"):
        statistics.take()


def test_a_second_one_takes_over_and_the_first_says_so():
    model, x, y = net(), torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    first, second = attached(model), attached(model)
    (F.cross_entropy(model(x), y) + first.penalty() + second.penalty()).backward()
    with pytest.raises(GraphError, match="or got others"):
        first.take()
    first.close()
    assert second.take().samples == 4
    second.close()
    assert not any(m._forward_hooks or m.__dict__.get("gate_slots") for m in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_sums(reentrant):
    model, x, y = net(), torch.randn(4, 3, 8, 8, requires_grad=True), torch.randint(10, (4,))
    statistics = attached(model)
    (F.cross_entropy(model(x), y) + statistics.penalty()).backward()
    expected = statistics.take()
    hidden = torch.utils.checkpoint.checkpoint(model[:6], x, use_reentrant=reentrant)
    (F.cross_entropy(model[6:](hidden), y) + statistics.penalty()).backward()
    assert torch.equal(statistics.take().gradient, expected.gradient)


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation or a concatenation with what came before, projection."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.expand = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        if "factor" in kind:
            self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(16 if kind == "ghost" else 8, 10, 1)

    def forward(self, x):
        h = self.expand(x)
        d = self.depthwise(h)
        if self.kind == "ghost":
            d = torch.cat([h, d], 1)
        elif self.kind != "plain":
            scale = self.excite(self.squeeze(d.mean((2, 3), keepdim=True)).relu()).sigmoid()
            d = scale * d if self.kind == "factor first" else d * scale
        return self.project(d).mean((2, 3))


@pytest.mark.parametrize("kind", ["plain", "factor first", "factor last", "ghost"])
def test_the_gate_is_behind_a_depthwise_convolution_whose_norm_would_hide_it(kind):
    model, x, y = Inverted(kind).double(), torch.randn(4, 3, 8, 8).double(), torch.randint(10, (4,))
    _, gates = found(model.float(), x.shape, stem=True)
    assert gates["expand.0"].kind == "block"
    model.double()
    statistics = GateStatistics(model, gates)
    (F.cross_entropy(model(x), y) + statistics.penalty()).backward()
    # with ReLUs in between, a gate is a factor on the slices of the weights that read the channel
    expected = torch.zeros(8, dtype=torch.float64)
    for reader in (model.project, model.squeeze) if "factor" in kind else (model.project,):
        slices = (reader.weight * reader.weight.grad).sum((0, 2, 3)).detach()
        expected += slices.view(-1, 8).sum(0)
    got = statistics.split(statistics.take().gradient)["expand.0"]
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    assert expected.abs().max() > 1e-4
