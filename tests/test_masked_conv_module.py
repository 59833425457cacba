"""MaskedConv2d: a drop-in nn.Conv2d; its masks through copies, checkpoints, compilation, tracing and compaction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastprune.compact import compact, prove
from fastprune.graph import trace
from fastprune.nn import MaskedConv2d


def keep(size, *dead):
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(dead)] = False
    return mask


def make(**kwargs):
    conv = MaskedConv2d(6, 8, 3, **{"padding": 1, **kwargs})
    conv.in_mask, conv.out_mask = keep(6, 1, 4), keep(8, 0, 1, 2, 7)
    return conv


def masked(conv, x):
    """nn.Conv2d on zeroed channels."""
    x = x if conv.in_mask is None else x * conv.in_mask.view(1, -1, 1, 1)
    weight = conv.weight if conv.weight_mask is None else conv.weight * conv.weight_mask
    y = nn.Conv2d._conv_forward(conv, x, weight, conv.bias)
    return y if conv.out_mask is None else y * conv.out_mask.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "bias": False},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular", "padding": "same"},
        {"groups": 2},
    ],
    ids=str,
)
def test_is_a_conv2d_with_masks(kwargs):
    conv, x = make(**kwargs), torch.randn(2, 6, 7, 7)
    torch.testing.assert_close(conv(x), masked(conv, x))
    conv.weight_mask = torch.rand_like(conv.weight) < 0.5
    torch.testing.assert_close(conv(x), masked(conv, x))
    conv.in_mask = conv.out_mask = conv.weight_mask = None
    assert torch.equal(conv(x), nn.Conv2d.forward(conv, x))


def test_from_conv_shares_the_parameters():
    conv = nn.Conv2d(6, 8, (3, 1), 2, padding=(1, 0), bias=False, dtype=torch.float64).eval()
    new, x = MaskedConv2d.from_conv(conv), torch.randn(2, 6, 7, 7, dtype=torch.float64)
    assert new.weight is conv.weight and new.bias is None and not new.training
    assert torch.equal(new(x), conv(x)) and new.state_dict().keys() == conv.state_dict().keys()
    assert repr(new) == "Masked" + repr(conv)
    new.out_mask = keep(8, 3)
    assert "out_mask=7/8" in repr(new)


def test_masks_can_be_edited_copied_and_loaded():
    conv, x = make(), torch.randn(2, 6, 7, 7)
    conv.out_mask[5] = False
    assert not conv(x)[:, 5].any()
    twin = copy.deepcopy(conv)
    twin.out_mask[6] = False
    assert conv(x)[:, 6].any() and not twin(x)[:, 6].any()
    fresh = MaskedConv2d(6, 8, 3, padding=1)
    fresh.load_state_dict(conv.state_dict())
    assert torch.equal(fresh(x), conv(x)) and fresh.state_dict().keys() == conv.state_dict().keys()
    assert torch.equal(conv.double()(x.double()), masked(conv, x.double()))
    conv.out_mask = keep(8)
    assert conv.out_mask is None
    with pytest.raises(ValueError, match="expected in_mask"):
        conv.in_mask = torch.ones(6)


def test_a_refused_mask_changes_nothing():
    conv = make()
    before = conv.in_mask
    for wrong in (torch.ones(6), keep(5), torch.ones(1, 6, dtype=torch.bool)):
        with pytest.raises(ValueError, match="in_mask"):
            conv.in_mask = wrong
        assert conv.in_mask is before
    with pytest.raises(ValueError, match="weight_mask"):
        conv.weight_mask = keep(8)


def test_autocast_does_what_conv2d_does():
    conv, x = make(), torch.randn(2, 6, 7, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        want = masked(conv, x)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    y.sum().backward()
    assert conv.weight.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.11
def test_compiles_without_graph_breaks():
    conv, x = make(), torch.randn(2, 6, 7, 7)
    torch._dynamo.reset()
    quick = torch.compile(conv, fullgraph=True, backend="aot_eager")
    y = quick(x)
    y.sum().backward()
    got, conv.weight.grad = conv.weight.grad, None
    want = conv(x)
    want.sum().backward()
    assert torch.equal(y, want) and torch.equal(got, conv.weight.grad)
    conv.out_mask = keep(8, 3)  # a cut: compiled anew
    assert torch.equal(quick(x), conv(x))


class Net(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.first, self.bn = MaskedConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = MaskedConv2d(8, 8 if groups == 8 else 12, 3, groups=groups)
        self.third = MaskedConv2d(self.second.out_channels, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.bn(self.first(x)).relu()
        return self.fc(self.third(self.second(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_compacts_with_its_masks(groups):
    model, x = Net(groups).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    plain = {name: g.size for name, g in graph.groups.items()}
    width = model.second.out_channels
    model.first.out_mask = keep(8, 1, 5)
    model.second.in_mask, model.second.weight_mask = keep(8, 1, 5), torch.rand_like(model.second.weight) < 0.7
    model.second.out_mask, model.third.in_mask = keep(width, 1, 5), keep(width, 1, 5)
    graph = trace(model, x)
    assert {name: g.size for name, g in graph.groups.items()} == plain and "first" in plain  # masks freeze nothing
    cut = {n: keep(g.size, *((1, g.size // 2 + 1) if g.size >= 4 else ())) for n, g in graph.groups.items()}
    small = copy.deepcopy(model)
    assert prove(small, graph, cut, x) <= 1e-9
    compact(small, cut, x)
    assert small.first.out_channels < 8 and small.first.weight.shape[0] == small.first.out_channels
    for conv in (small.first, small.second, small.third):
        for name, size in (("in_mask", conv.in_channels), ("out_mask", conv.out_channels)):
            mask = getattr(conv, name)
            assert mask is None or mask.shape == (size,)
        assert conv.weight_mask is None or conv.weight_mask.shape == conv.weight.shape
    graph.mask_(model, cut)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    small.train()(x).sum().backward()
    assert trace(small, x).groups.keys() == graph.groups.keys()
