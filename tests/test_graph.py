"""What trace finds: groups, roles, couplings, what it freezes and why, and that it leaves no trace itself."""

from __future__ import annotations

import copy
import pickle
import random
import re

import numpy as np
import pytest
import torch
import torchvision
from graph_cases import FAMILIES, PATTERNS, Hierarchical, Lambda, Net, OptionA, conv_bn, stir, uneven_keep
from torch import nn
from torch.nn import functional as F

from fastprune import labels, rules
from fastprune.compact import compact
from fastprune.errors import GraphError
from fastprune.graph import ChannelGraph, pointwise, register_rule, trace
from fastprune.models import create
from fastprune.nn import convert_batchnorm

X = torch.randn(2, 3, 16, 16)


def middle(function, width=7, **modules) -> Net:
    return Net(Lambda(function, **modules), width)


def groups_of(graph: ChannelGraph) -> dict[str, int]:
    return {name: g.size for name, g in graph.groups.items()}


# Groups and roles


def test_resnet18():
    graph = trace(torchvision.models.resnet18(), torch.randn(2, 3, 64, 64))
    assert groups_of(graph) == {
        "conv1": 64, "layer1.0.conv1": 64, "layer1.1.conv1": 64,
        "layer2.0.conv1": 128, "layer2.0.conv2": 128, "layer2.1.conv1": 128,
        "layer3.0.conv1": 256, "layer3.0.conv2": 256, "layer3.1.conv1": 256,
        "layer4.0.conv1": 512, "layer4.0.conv2": 512, "layer4.1.conv1": 512,
    }  # fmt: skip
    inner, stream = graph.groups["layer2.0.conv1"], graph.groups["layer2.0.conv2"]
    assert inner.convs == ("layer2.0.conv1",) and not inner.coupled
    assert inner.norms == ("layer2.0.bn1",) and inner.consumers == ("layer2.0.conv2",)
    assert stream.convs == ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2") and stream.coupled
    assert stream.norms == ("layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2")
    assert stream.consumers == ("layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0")
    assert graph.frozen == {"fc": "it is an output of the model"} and graph.train_error is None
    assert graph.norm_after["layer2.0.downsample.0"] == "layer2.0.downsample.1"
    assert len(graph.norm_after) == 20
    assert set(inner.index) == {
        ("layer2.0.conv1.weight", 0), ("layer2.0.conv2.weight", 1),
        *((f"layer2.0.bn1.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var")),
    }  # fmt: skip
    for position, channel in inner.index.values():
        assert position.tolist() == channel.tolist() == list(range(128))


def test_flatten_gives_each_channel_several_columns():
    group = trace(PATTERNS["flatten_into_linear"](), X).groups["first"]
    position, channel = group.index["hidden.weight", 1]
    assert position.tolist() == list(range(48)) and channel.tolist() == [i // 6 for i in range(48)]
    assert group.per_channel("hidden.weight", 1, torch.arange(48.0)).tolist() == [36.0 * i + 15 for i in range(8)]
    assert group.consumers == ("hidden",) and group.norms == ()


def test_zero_padded_shortcuts():
    """Option A: the stem's six channels run through all stages, two and four rows further; the rest meet padding."""
    graph = trace(OptionA(), X)
    stream = graph.groups["first"]
    assert stream.size == 6
    assert stream.convs == ("first", *(f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in (0, 1)))
    assert stream.index["layer2.0.conv2.weight", 0].position.tolist() == [2, 3, 4, 5, 6, 7]
    assert stream.index["fc.weight", 1].position.tolist() == [4, 5, 6, 7, 8, 9]
    assert [n for n, g in graph.groups.items() if not g.coupled] == [
        f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1)
    ]
    assert graph.frozen["layer2.1.conv2"] == "it is added to channels of zero padding (4 of 10 channels)"
    assert graph.frozen["layer3.0.conv2"] == "it is added to channels of zero padding (8 of 14 channels)"


def test_concatenation():
    graph = trace(PATTERNS["dense"](), X)
    assert groups_of(graph) == {"first": 8, "middle.conv1": 6, "middle.conv2": 6}
    first, second = graph.groups["first"], graph.groups["middle.conv1"]
    assert first.norms == ("bn", "middle.bn1", "middle.bn2") and second.norms == ("middle.bn2",)
    assert second.index["middle.bn2.bias", 0].position.tolist() == list(range(8, 14))
    assert second.index["fc.weight", 1].position.tolist() == list(range(8, 14))
    assert graph.norm_after == {"first": "bn"}  # the other norms read more than one layer's channels


def test_depthwise_convolutions_pass_channels_on():
    group = trace(PATTERNS["depthwise"](), X).groups["first"]
    assert group.size == 8 and not group.coupled and group.convs == ("first",)
    assert group.depthwise == ("middle.0.0", "middle.1.0") and group.consumers == ("middle.2.0",)
    assert group.index["middle.1.0.weight", 0].channel.tolist() == [i // 3 for i in range(24)]


def test_grouped_convolutions_stay_rectangular():
    graph = trace(PATTERNS["grouped"](), X)
    assert groups_of(graph) == {"first": 8, "middle.0.0": 8, "middle.1.0": 6, "middle.2.0": 7}
    assert graph.groups["middle.0.0"].index["middle.0.0.weight", 0].channel.tolist() == [*range(8)] * 3
    assert graph.groups["middle.0.0"].index["middle.1.0.weight", 1].position.tolist() == [*range(8)]


def test_gates_are_coupled_to_what_they_scale():
    graph = trace(PATTERNS["squeeze_excite"](), X)
    assert groups_of(graph) == {"first": 8, "middle.down": 4, "middle.out": 7}
    assert graph.groups["first"].convs == ("first", "middle.up")


def test_a_layer_that_feeds_two_groups_gets_two_names():
    def run(m, x):
        return torch.cat([m.left(x), m.right(m.wide(x).chunk(2, 1)[0])], 1)

    net = middle(run, 9, left=nn.Conv2d(8, 4, 1), wide=nn.Conv2d(8, 12, 1), right=nn.Conv2d(6, 5, 1))
    assert groups_of(trace(net, X)) == {"first": 8, "middle.left": 4, "middle.wide": 6, "middle.right": 5}

    def two(m, x):
        y = torch.cat([m.wide(x), m.wide(x)], 1)  # rows twice
        return m.right(y)

    graph = trace(middle(two, 5, wide=nn.Conv2d(8, 6, 1), right=nn.Conv2d(12, 5, 1)), X)
    assert graph.groups["middle.wide"].index["middle.right.weight", 1].channel.tolist() == [*range(6)] * 2

    def lopsided(m, x):
        a = m.wide(x)
        return m.right(F.pad(a, (0, 0, 0, 0, 0, 3)) * m.gate(x))

    net = middle(lopsided, 5, wide=nn.Conv2d(8, 6, 1), gate=nn.Conv2d(8, 9, 1), right=nn.Conv2d(9, 5, 1))
    graph = trace(net, X)
    assert graph.groups["middle.wide"].convs == ("middle.wide", "middle.gate")
    assert graph.frozen["middle.gate"] == "it is added to channels of zero padding (3 of 9 channels)"


@pytest.mark.filterwarnings("ignore:trace. a never ran")
def test_one_layer_two_groups():
    """The halves of one convolution that go different ways are told apart by their names."""

    class TwoWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(12, 5, 1)
            self.extra = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            y = self.wide(x) * torch.cat([self.extra(x), torch.ones(2, 6, 16, 16)], 1)
            return self.b(y).mean((2, 3))

    graph = trace(TwoWays(), X)
    assert groups_of(graph) == {"wide": 6}
    assert graph.groups["wide"].convs == ("wide", "extra")
    assert graph.frozen["wide"].endswith("(6 of 12 channels)")

    class Both(TwoWays):
        def forward(self, x):
            y = torch.cat([self.extra(x), self.a(self.extra(x))], 1) + self.wide(x)
            return self.b(y).mean((2, 3))

    graph = trace(Both(), X)
    assert groups_of(graph) == {"wide": 6, "wide#2": 6}
    assert {g.convs for g in graph.groups.values()} == {("wide", "extra"), ("wide", "a")}


def test_order_is_module_order_and_traces_agree():
    model = FAMILIES["googlenet"]()
    x = torch.randn(2, 3, 64, 64)
    graph, again = trace(model, x), trace(model, x)
    assert (
        graph.groups == again.groups and graph.frozen == again.frozen and (graph.channel_of == again.channel_of).all()
    )
    order = [name for name, _ in model.named_modules()]
    at = [order.index(g.convs[0]) for g in graph.groups.values()]
    assert at == sorted(at)
    assert {"aux1.conv.conv", "aux1.fc1"} <= set(graph.groups)  # they only run in training
    assert pickle.loads(pickle.dumps(graph)).groups == graph.groups == copy.deepcopy(graph).groups


# What is frozen


def weighted(m, x):
    w = m.conv.weight.sigmoid()  # a masked weight would be 0.5, and a masked input is not zero
    return m.out(F.conv2d(F.softplus(x), w))


def attention(m, x, act=F.relu):
    q, k = act(m.q(x)).flatten(2), act(m.k(x)).flatten(2)
    return (
        m.out((q.transpose(1, 2) @ k).softmax(-1) @ m.v(x).flatten(2).transpose(1, 2))
        .transpose(1, 2)
        .unflatten(2, (16, 16))
    )


def shifted(m, x):
    return m.out(F.conv2d(F.softplus(x), m.conv.weight.clone().add_(0.1)))


def standardised(m, x):
    w = m.conv.weight
    return m.out(F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True)))


def never_zero(m, x):
    return attention(m, x, F.softplus)


def tokens(m, x, scale=None):
    q, k, v = (m.get_submodule(n)(x).flatten(2).transpose(1, 2).unsqueeze(1) for n in "qkv")
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return m.out(y.squeeze(1)).transpose(1, 2).unflatten(2, (16, 16))


def over_channels(m, x):
    gate = m.along(x.mean((2, 3)).unsqueeze(1)).sigmoid()
    return m.conv(x * gate.transpose(1, 2).unsqueeze(3))


def all_tied(m, x):
    for _ in range(3):  # each shuffle ties the channels of a cycle: 0 1 2 3 4 5 6 7 -> 0 4 1 5 2 6 3 7
        x = F.channel_shuffle(x, 2) + x
    return m.conv(F.channel_shuffle(x.flip(1) + x, 4) + x)


def written(m, x):
    y = torch.zeros(len(x), 8, 16, 16)
    y[:, :8] = x
    return m.conv(y)


CONV = {"conv": nn.Conv2d(8, 7, 1)}
PAIR = {"conv": nn.Conv2d(8, 6, 1), "out": nn.Conv2d(6, 7, 1)}
ALONG = {"along": nn.Conv1d(1, 1, 3, padding=1)}
QKV = {**{n: nn.Conv2d(8, 6, 1) for n in "qkv"}, "out": nn.Linear(6, 7)}
CUT = "takes fixed positions out of its channels"
WIDE = (2, 8, 16, 16)
CROP = (0, 0, 0, 0, -1, -1)
FROZEN = {
    "layer norm": (lambda m, x: m.conv(F.layer_norm(x, x.shape[1:])), CONV, "layer norm averages over it"),
    "group norm": (lambda m, x: m.conv(F.group_norm(x, 2)), CONV, "group norm averages over it"),
    "softmax": (lambda m, x: m.conv(x.softmax(1)), CONV, "aten::_softmax runs over it"),
    "reduction": (lambda m, x: m.conv(x * x.mean(1, keepdim=True)), CONV, "aten::mean reduces over it"),
    "slice": (lambda m, x: m.conv(torch.cat([x[:, :3], x[:, 3:]], 1)), CONV, f"aten::slice {CUT}"),
    "split": (lambda m, x: m.conv(torch.cat(x.split([4, 4], 1), 1)), CONV, f"aten::split_with_sizes {CUT}"),
    "index": (lambda m, x: m.conv(x[:, [7, 6, 5, 4, 3, 2, 1, 0]]), CONV, f"aten::index {CUT}"),
    "roll": (lambda m, x: m.conv(x.roll(1, 1)), CONV, f"aten::roll {CUT}"),
    "constant": (lambda m, x: m.conv(x * torch.ones(8, 1, 1)), CONV, "input or a constant of fixed size"),
    "pool over channels": (lambda m, x: m.conv(F.local_response_norm(x, 3)), CONV, "aten::avg_pool3d slides over it"),
    "crop": (lambda m, x: m.conv(F.pad(torch.cat([x, x], 1), CROP)[:, :8]), CONV, "a negative padding cuts"),
    "written": (written, CONV, "input or a constant of fixed size"),
    "computed weight": (weighted, PAIR, "computed from other weights"),
    "weight changed in place": (shifted, PAIR, "computed from other weights"),
    "standardised weight": (standardised, PAIR, "aten::mean reduces over it"),
    "attention": (never_zero, QKV, "an activation itself"),
    "sdpa": (tokens, QKV, "depends on how many there are"),
    "channel attention": (
        over_channels,
        CONV | {"along": nn.Conv1d(1, 1, 3, padding=1)},
        "a convolution slides over it",
    ),
    "as_strided": (lambda m, x: m.conv(x.as_strided(x.shape, x.stride())), CONV, "reads memory by stride"),
    "all tied": (all_tied, CONV, "the model ties all its channels into one"),
    "view": (lambda m, x: m.conv(x.view(-1, 8, 16, 16)), CONV, "a view gives its size as a number"),
    "view by a constant": (lambda m, x: m.conv(x.flatten(2).view(WIDE)), CONV, "a view gives its size as a number"),
    "expanded": (lambda m, x: m.conv(x + torch.ones(()).expand(1, 8, 1, 1)), CONV, "a constant of fixed size"),
    "noise": (lambda m, x: m.conv(x + torch.randn(1, 8, 1, 1)), CONV, "a constant of fixed size"),
}


@pytest.mark.parametrize("case", FROZEN)
def test_frozen_and_why(case):
    function, modules, why = FROZEN[case]
    name = "middle.q" if "q" in modules else "first"
    graph = trace(middle(function, **copy.deepcopy(modules)), X)
    assert name not in graph.groups
    assert why in graph.frozen[name]
    assert "fc" in graph.frozen


def test_values_pass_attention():
    for function in (never_zero, tokens):
        assert set(trace(middle(function, **copy.deepcopy(QKV)), X).groups) == {"first", "middle.v", "middle.out"}


def test_queries_and_keys_go_together_if_a_masked_one_is_zero():
    for function in (attention, lambda m, x: tokens(m, x, scale=0.3)):
        graph = trace(middle(function, **copy.deepcopy(QKV)), X)
        assert set(graph.groups) == {"first", "middle.q", "middle.v", "middle.out"}
        assert graph.groups["middle.q"].convs == ("middle.q", "middle.k")
        assert "middle.q" in trace(middle(function, **copy.deepcopy(QKV)), X, strict=True).frozen


def test_strict_freezes_what_views_and_splits_take_apart():
    for name in ("chunk", "channel_shuffle_by_view"):
        proved, trusting = trace(PATTERNS[name](), X), trace(PATTERNS[name](), X, strict=False)
        assert proved.groups["first"].size == trusting.groups["first"].size == 4
        assert "first" in trace(PATTERNS[name](), X, strict=True).frozen
    assert groups_of(trace(PATTERNS["residual"](), X, strict=True)) == groups_of(trace(PATTERNS["residual"](), X))


WHOLE = (
    "hierarchical_split cross_stage_split mixed_split dual_path blur_pool heads selective_kernels auxiliary_head "
    "reparameterised_branches computed_weight one_weight_in_two_layers pixel_shuffle layer_scale_and_dropout"
).split()


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_but_the_outputs_is_left_alone(name):
    assert set(trace(PATTERNS[name](), X).frozen) <= {"fc", "aux.2"}


def test_numbers_in_modules_follow():
    model = PATTERNS["mixed_split"]()
    graph = trace(model, X)
    assert graph.groups["first"].size == 5 and graph.groups["first#2"].size == 3  # pieces are cut independently
    keep = {"first": torch.tensor([True, False, False, True, False])}
    assert {n: len(d[-1]) for n, d in graph.kept(keep).items() if -1 in d} == {"middle.0.splits[0]": 2}
    smaller = graph.after(keep)
    compact(model, keep, X)
    assert model.middle[0].splits == [2, 3] and model.middle[2].splits == (5, 3)
    smaller.tensors(model)
    other = copy.deepcopy(model)
    other.middle[0].splits = [5, 3]
    with pytest.raises(GraphError, match=r"expected middle.0.splits\[0\] to be 2, got 5; trace the model again"):
        smaller.tensors(other)
    compact(model, {"middle.1#2": torch.tensor([True, False, False])}, X)
    assert model.middle[2].splits == (5, 1)

    tied = PATTERNS["hierarchical_split"]()
    assert groups_of(trace(tied, X))["middle.up.0"] == 4  # three pieces of one width
    compact(tied, {"middle.up.0": torch.tensor([True, False, True, True])}, X)
    assert tied.middle.width == 3 and tied.middle.up[0].out_channels == 9


def test_a_number_that_means_something_else_is_left_alone():
    """It is equal to the number of channels and read where they are viewed, but by chance."""

    class Chance(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor, self.out = 8, nn.Conv2d(8, 7, 1)

        def forward(self, x):
            return self.out(x.flatten(2).view(x.shape) / self.factor)

    net = Net(nn.Sequential(Chance(), Hierarchical(7)), 7)
    graph = trace(net, X)
    numbers = {row.name for row in graph.rows if row.dim == -1}
    assert numbers == {"middle.1.width"}  # of other classes all is assumed as before
    assert {"first", "middle.1.up.0"} <= graph.groups.keys()
    compact(net, uneven_keep(graph), X)
    assert net.middle[0].factor == 8 and net.middle[1].width == 2


@pytest.mark.parametrize("layer", [nn.LSTM(8, 7), nn.GRU(8, 7), nn.MultiheadAttention(8, 2)])
@pytest.mark.filterwarnings("ignore:trace. aten.*has no rule")
def test_layers_that_check_their_width_keep_their_inputs(layer):
    def run(m, x):
        tokens = x.flatten(2).permute(2, 0, 1)
        y = m.layer(tokens, tokens, tokens)[0] if m.attends else m.layer(tokens)[0]
        return m.out(y).permute(1, 2, 0).unflatten(2, (16, 16))

    attends = isinstance(layer, nn.MultiheadAttention)
    wide = nn.Conv2d(3, 6, 1)
    net = nn.Sequential(wide, middle(run, layer=layer, attends=attends, out=nn.Linear(8 if attends else 7, 7)))
    net[1].first = nn.Conv2d(6, 8, 1)
    graph = trace(net, X)
    assert graph.frozen["1.first"] == f"{type(layer).__name__} checks how many there are"
    assert graph.groups["0"].size == 6
    compact(net, uneven_keep(graph), X)


def test_the_tutorials_network_keeps_what_it_flattens_by_number():
    class LeNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
            self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 12), nn.Linear(12, 5)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2).view(-1, 16 * 5 * 5)
            return self.fc2(F.relu(self.fc1(x)))

    net, x = LeNet(), torch.randn(2, 3, 32, 32)
    graph = trace(net, x)
    assert set(graph.groups) == {"conv1", "fc1"} and "a view gives its size as a number" in graph.frozen["conv2"]
    compact(net, uneven_keep(graph), x)


def test_numbers_are_found_whatever_the_module_is_called():
    class This(nn.Module):
        def __init__(this):
            super().__init__()
            this.width, this.out = 3, nn.Conv2d(8, 7, 1)

        def forward(this, x):
            return this.out(torch.cat([x[:, : this.width].sin(), x[:, this.width :]], 1))

    net = Net(This(), 7)
    graph = trace(net, X)
    assert groups_of(graph) == {"first": 3, "first#2": 5, "middle.out": 7}
    compact(net, {"first": torch.tensor([True, False, True])}, X, graph=graph)
    assert net.middle.width == 2


def test_code_that_compares_widths_of_two_groups_freezes_them():
    class Reshaped(nn.Module):
        """Gives one convolution's output the width of the input, and no view shows it."""

        def __init__(self):
            super().__init__()
            self.wide, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.out(self.wide(x).reshape(x.shape))

    net = Net(nn.Sequential(nn.Conv2d(8, 8, 1), Reshaped(), Hierarchical()), 7)
    trusting = trace(net, X, strict=False)
    with pytest.raises(GraphError, match=r"'middle.1' does not compute .* RuntimeError: shape"):
        compact(net, {"middle.0": torch.arange(8) < 3}, X, graph=trusting)
    graph = trace(net, X)
    why = "the code of Reshaped relies on how many there are"
    assert graph.frozen["middle.0"] == graph.frozen["middle.1.wide"] == why
    assert {"first", "middle.1.out", "middle.2.up.0"} <= graph.groups.keys()
    compact(net, uneven_keep(graph), X)


def test_group_norms_lose_whole_groups():
    model = PATTERNS["group_norm_of_several_channels_each"]()
    assert trace(model, X).groups["middle.0"].size == 6
    compact(model, {"middle.0": torch.arange(6) % 3 > 0}, X)
    assert (model.middle[1].num_groups, model.middle[1].num_channels) == (4, 8)
    assert trace(model, X).groups["middle.0"].size == 4


def test_transformer_layers_lose_hidden_features():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)

        def forward(self, x):
            return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (16, 16))

    net = Net(Tokens(), 8)
    graph = trace(net, X)
    assert groups_of(graph) == {"middle.layer.linear1": 12}
    assert graph.frozen["middle.layer.self_attn"] == "a view takes its channel axis apart, by numbers that may be fixed"
    assert graph.frozen["middle.layer.linear2"] == graph.frozen["first"]
    assert graph.frozen["first"] == "MultiheadAttention checks how many there are"
    assert torch.backends.mha.get_fastpath_enabled()
    compact(net, uneven_keep(graph), X)
    assert net.middle.layer.linear1.out_features == net.middle.layer.linear2.in_features == 6


def test_modules_that_raise_are_left():
    class Tries(nn.Module):
        """Falls back to another branch, then splits by its own number."""

        def __init__(self):
            super().__init__()
            self.width, self.broken, self.out = 4, nn.Linear(3, 3), nn.Conv2d(4, 7, 1)

        def forward(self, x):
            try:
                x = self.broken(x)
            except RuntimeError:
                pass
            a, b = x.split(self.width, 1)
            return self.out(a * b.sigmoid())

    graph = trace(Net(Tries(), 7), X)
    assert graph.groups["first"].size == 4 and "middle.width" in {row.name for row in graph.rows}


def test_what_float32_hides_is_not_assumed():
    def coarse(m, x):
        q, k, v = (m.get_submodule(n)(x).flatten(2).float() for n in "qkv")
        y = (q.transpose(1, 2) @ k).softmax(-1) @ v.transpose(1, 2)
        return m.out(y.to(x.dtype)).transpose(1, 2).unflatten(2, (16, 16))

    graph = trace(middle(coarse, **copy.deepcopy(QKV)), X)
    assert "middle.q" in graph.frozen and "middle.v" in graph.groups
    assert "middle.q" in trace(middle(coarse, **copy.deepcopy(QKV)), X, strict=False).groups


def test_standardised_weights_lose_rows_only():
    graph = trace(PATTERNS["standardised_rows"](), X)
    assert set(graph.groups) == {"first", "middle.1", "middle.3"}
    assert graph.frozen["middle.0"] == "weights are standardised over it"


def test_unread_and_unproduced_channels():
    def run(m, x):
        m.dead(x)
        return m.conv(x) + m.bias

    model = middle(run, dead=nn.Conv2d(8, 6, 1), conv=nn.Conv2d(8, 7, 1), bias=nn.Parameter(torch.ones(7, 1, 1)))
    graph = trace(model, X)
    assert graph.frozen["middle.dead"] == "no convolution or linear layer reads it"
    assert ("middle.bias", 0) in graph.groups["middle.conv"].index


# Unknown ops


@pytest.fixture
def swirl():
    """An op that PyTorch knows nothing about, registered for one test."""
    library = torch.library.Library("fastprune_test", "FRAGMENT")
    library.define("swirl(Tensor x, float by) -> Tensor")
    library.impl("swirl", lambda x, by: torch.sin(x) * by, "CompositeExplicitAutograd")
    yield torch.ops.fastprune_test.swirl
    rules._RULES.pop("fastprune_test::swirl", None)
    rules.rule_of.cache_clear()
    library._destroy()


def test_unknown_ops_freeze_and_are_named_once(swirl):
    model = Net(nn.Sequential(Lambda(lambda m, x: swirl(x, 2.0)), conv_bn(8, 6), Lambda(lambda m, x: swirl(x, 2.0))), 6)
    with pytest.warns(UserWarning) as warned:
        graph = trace(model, X)
    assert len(warned) == 1
    assert re.fullmatch(r"trace: fastprune_test::swirl has no rule; .* stay unpruned .*", str(warned[0].message))
    assert graph.groups == {}
    assert graph.frozen["first"] == graph.frozen["middle.1.0"] == "it reaches fastprune_test::swirl, which has no rule"
    assert graph.frozen["fastprune_test::swirl"] == "has no rule; the channels that reach it are left alone"
    register_rule("fastprune_test::swirl", pointwise)
    assert set(trace(model, X).groups) == {"first", "middle.1.0"}


def test_a_rule_that_fails_freezes_too(swirl):
    def rule(tracer, call):
        raise KeyError("no such form")

    register_rule("fastprune_test::swirl", rule)
    with pytest.warns(
        UserWarning, match=r"swirl was called in a way its rule does not cover \(KeyError: 'no such form'\)"
    ):
        graph = trace(middle(lambda m, x: m.conv(swirl(x, 1.0)), **copy.deepcopy(CONV)), X)
    assert "first" in graph.frozen and "middle.conv" in graph.groups


def test_a_rule_of_ones_own(swirl):
    def rule(tracer, call):
        x = call.arg("x")
        assert call.arg("by") == 1.0 and call.arg("other") is None and call.outs == [call.out]
        tracer.freeze(tracer.axes(x)[1][:2], "the first two are special")
        tracer.label(call.out, tracer.axes(x))

    register_rule("fastprune_test::swirl", rule)
    graph = trace(middle(lambda m, x: m.conv(swirl(x, 1.0)), **copy.deepcopy(CONV)), X)
    assert graph.groups["first"].size == 6
    assert graph.frozen["first"] == "the first two are special (2 of 8 channels)"
    assert graph.groups["first"].index["first.weight", 0].position.tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["swirl", "a::b::c", "aten::add.Tensor", ""])
def test_rules_need_a_qualified_name(name):
    with pytest.raises(ValueError, match=r"expected an op name such as 'mylib::swish'"):
        register_rule(name, pointwise)


# The model itself


def test_nothing_of_the_trace_stays():
    model = FAMILIES["mobilenet_v3_small"]()  # batch norm, dropout
    model.train()
    model.features[3].eval()
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    x.requires_grad_(True)
    flags = [m.training for m in model.modules()]
    buffers = list(model.buffers())
    before = [t.detach().clone() for t in [*model.parameters(), *buffers, *(p.grad for p in model.parameters())]]
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    trace(model, x)
    drawn = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    assert drawn == (torch.rand(1), random.random(), np.random.rand())
    assert [m.training for m in model.modules()] == flags
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    after = [*model.parameters(), *buffers, *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(hasattr(t, labels.ATTRIBUTE) for t in [*model.parameters(), *buffers, x]) and x.grad is None


def test_inputs_by_position_and_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, image, depth=None):
            return {"logits": self.out(self.a(image) + self.b(depth)), "none": None}

    depth = torch.randn(2, 1, 16, 16)
    expected = trace(Two(), (X, depth))
    assert groups_of(expected) == {"a": 8} and expected.groups["a"].convs == ("a", "b")
    assert trace(Two(), {"image": X, "depth": depth}).groups == expected.groups
    assert not hasattr(depth, labels.ATTRIBUTE)


def test_training_that_cannot_run_is_kept_in_words():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.fc, self.aux = (
                nn.Conv2d(3, 8, 1),
                nn.BatchNorm2d(8),
                nn.Linear(8, 5),
                nn.Linear(8, 5),
            )

        def forward(self, x):
            x = self.norm(self.body(x).mean((2, 3), keepdim=True)).flatten(1)
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    model = Head()
    graph = trace(model, X)
    assert graph.train_error is None and graph.groups["body"].consumers == ("fc", "aux")
    with pytest.warns(UserWarning, match=r"trace: aux never ran; the forward in training mode failed \(ValueError"):
        graph = trace(model, X[:1])
    assert "more than 1 value per channel" in graph.train_error and graph.groups["body"].consumers == ("fc",)


def test_layers_that_only_run_on_other_inputs_are_named():
    def run(m, x):
        return m.conv(m.wide(x) if x.shape[-1] > 16 else x)

    model = middle(run, wide=nn.Conv2d(8, 8, 1), conv=nn.Conv2d(8, 7, 1))
    with pytest.warns(UserWarning, match=r"trace: middle.wide never ran; what runs .* on other inputs may not fit"):
        trace(model, X)


def test_masking_zeroes_what_goes_and_nothing_else():
    model = stir(PATTERNS["depthwise"]()).eval()
    graph, whole = trace(model, X), copy.deepcopy(model)
    keep = {"first": torch.tensor([True, False] * 4)}
    graph.mask_(model, keep)
    removed = torch.arange(24) // 3 % 2 == 1
    rows = [f"middle.1.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean")]
    for name, axis in [*((n, 0) for n in rows), ("middle.2.0.weight", 1)]:
        masked, was = model.state_dict()[name].movedim(axis, 0), whole.state_dict()[name].movedim(axis, 0)
        assert not masked[removed].any() and torch.equal(masked[~removed], was[~removed]) and was.all()
    assert torch.equal(model.middle[1][1].running_var, whole.middle[1][1].running_var)
    assert torch.equal(model.fc.weight, whole.fc.weight) and torch.equal(
        model.middle[2][0].bias, whole.middle[2][0].bias
    )


@pytest.mark.parametrize("model, x, error, message", [
    (PATTERNS["residual"], torch.randn(2, 4, 16, 16), GraphError, r"does not run on example_inputs: RuntimeError"),
    (PATTERNS["residual"], (None,), GraphError, r"TypeError: conv2d\(\) received .* but expected one of:$"),
    (lambda: Lambda(lambda m, x: "logits"), X, GraphError, r"expected the model to return tensors, got str"),
    (lambda: nn.LazyConv2d(4, 1), X, ValueError, r"lazy parameters; run it once on example_inputs first"),
    (lambda: torch.compile(nn.Conv2d(3, 4, 1), backend="eager"), X, ValueError, r"trace before compiling"),
])  # fmt: skip
def test_errors_say_what_to_do(model, x, error, message):
    with pytest.raises(error, match=message):
        trace(model(), x)


def test_graph_after_a_cut_is_the_graph_of_the_cut_model():
    model, x = create("resnet56"), torch.randn(2, 3, 32, 32)
    graph = trace(model, x)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):  # twice: the second cut starts from the first one's result
        keep = {name: torch.rand(g.size, generator=generator) > 0.3 for name, g in graph.groups.items()}
        for mask in keep.values():
            mask[:2] = True
        graph = graph.after(keep) if compact(model, keep, x, check=False, graph=graph) else None
        again = trace(model, x)
        assert graph.rows == again.rows and graph.groups.keys() == again.groups.keys()
        for name, group in graph.groups.items():
            for key, (position, channel) in again.groups[name].index.items():
                assert torch.equal(group.index[key].position, position), (name, key)
                assert torch.equal(group.index[key].channel, channel), (name, key)
        assert graph.outputs.keys() == again.outputs.keys()
        for name, (channels, *rest) in again.outputs.items():
            assert rest == list(graph.outputs[name][1:]) and (channels == graph.outputs[name].channels).all(), name


@pytest.mark.parametrize("fuse", [False, True])
def test_ends_of_residual_blocks_are_found(fuse):
    model = torchvision.models.resnet18()
    ends = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1"]
    if fuse:  # then it is the norm that adds
        model, ends = convert_batchnorm(model, fuse=True), [f"{name}.bn2" for name in ends]
    graph = trace(model, torch.randn(2, 3, 64, 64))
    assert [name for name, out in graph.outputs.items() if out.is_sum] == ends
    assert graph.stems == {"conv1"}
    assert "layer1.0.relu" not in graph.outputs  # runs twice, if it runs
