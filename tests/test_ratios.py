"""The ratio grammar: each form, what it reaches, what errors say; and what is taken over from another network."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fastprune import models, ratios
from fastprune.compact import compact
from fastprune.graph import trace
from fastprune.ratios import constrained, inherited, layers, left_alone, resolve, skipped, stages
from fastprune.select import number_removed, pick

X = torch.zeros(2, 3, 32, 32)


def on_meta(fn, *args, **kw) -> nn.Module:
    with torch.device("meta"):
        return fn(*args, **kw)


@pytest.fixture(scope="module")
def resnet():
    """ResNet-20, its graph, and the layers inside its blocks: nine, three per stage."""
    model = models.create("resnet20")
    graph = trace(model, X)
    return model, graph, [name for name, group in graph.groups.items() if not group.coupled]


@pytest.fixture(scope="module")
def plain():
    """Six convolutions in a row, all prunable, and a linear layer that is not."""
    model = models.create("vgg-small")
    return model, (graph := trace(model, torch.zeros(2, 1, 8, 8))), list(graph.groups)


def asked(model, graph, names, ratio) -> list[float]:
    found = resolve(ratio, model, names, reasons=left_alone(graph, names))
    assert list(found) == names
    return list(found.values())


@pytest.mark.parametrize("ratio, expected", [(0.5, 0.5), (0, 0), ("0.5", 0.5), (" 0.25 ", 0.25), ("0", 0.0)])
def test_one_number(resnet, ratio, expected):
    model, _, names = resnet
    found = resolve(ratio, model, names)
    assert found == expected and not isinstance(found, dict)


@pytest.mark.parametrize("ratio, expected", [
    ("[0,0.75,0.5,0.32,0]", [0.75] * 3 + [0.5] * 3 + [0.32] * 3),
    (" [ 0 , .75,  0.5 , 3.2e-1, 0.0 ]\n", [0.75] * 3 + [0.5] * 3 + [0.32] * 3),
    ("0, 0, 0.5, 0, 0", [0.0] * 3 + [0.5] * 3 + [0.0] * 3),
    ([0, 0.75, 0.5, 0.32, 0], [0.75] * 3 + [0.5] * 3 + [0.32] * 3),  # as YAML reads it
    ("*layer*.conv1:0.9", [0.9] * 9),
    ("[*layer*.conv1:0.9]", [0.9] * 9),
    ("layer2.1.conv1 : 0.1, layer2.*:0.2, *:0.3", [0.3] * 3 + [0.2, 0.1, 0.2] + [0.3] * 3),
    ("*:0.3, layer2.1.conv1:0.1", [0.3] * 4 + [0.1] + [0.3] * 4),  # the exact name goes first
    ("*layer[1-2]*conv[1-2]:0.6, *layer3*conv[1-2]:0.2", [0.6] * 6 + [0.2] * 3),  # begins with no bracket of the list
    ("layer[12]*:0.5", [0.5] * 6 + [0.0] * 3),
    ({"layer1.*": 0.5, "layer3.2.conv1": 0.25}, [0.5] * 3 + [0.0] * 5 + [0.25]),
    ({"*": 0, "layer1.0.conv1": 0.5}, [0.5] + [0.0] * 8),
    ({"*fc*": 0, "layer1.0.conv1": 0.5}, [0.5] + [0.0] * 8),  # cannot be pruned, nor is it asked to be
    ({}, [0.0] * 9),
])  # fmt: skip
def test_by_stage_and_by_name(resnet, ratio, expected):
    assert asked(*resnet, ratio) == expected


@pytest.mark.parametrize("ratio, expected", [
    ("[0-1:0.5, 3:0.2]", [0.5, 0.5, 0, 0.2, 0, 0]),
    ("3 : 0.2 ,0 - 1:0.5", [0.5, 0.5, 0, 0.2, 0, 0]),
    (["0-1:0.5", "3:0.2"], [0.5, 0.5, 0, 0.2, 0, 0]),  # as YAML reads [0-1:0.5, 3:0.2]
    ("[1-6:0.5]", [0, 0.5, 0.5, 0.5, 0.5, 0.5]),  # the classifier, 6, stays
    ("[0-18:0]", [0] * 6),  # a README trains its dense network with this, though the last layer is 16
    ("features.0:0.5, features.7:0.1", [0.5, 0, 0.1, 0, 0, 0]),
])  # fmt: skip
def test_by_index(plain, ratio, expected):
    assert asked(*plain, ratio) == expected


def test_index_counts_all_convolutions_and_linear_layers(resnet, plain):
    assert layers(plain[0]) == [f"features.{i}" for i in (0, 3, 7, 10, 14, 17)] + ["classifier"]
    model = resnet[0]
    assert layers(model)[:4] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]
    assert asked(*resnet, "[1-3:0.5]") == [0.5, 0.5] + [0.0] * 7  # 2 is at the end of a block


def test_groups_of_one_layer_share_its_ratio_unless_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    assert resolve("0:0.5", model, ["0", "0#2", "1"]) == {"0": 0.5, "0#2": 0.5, "1": 0.0}
    assert resolve({"0#2": 0.25, "*": 0.5}, model, ["0", "0#2", "1"]) == {"0": 0.5, "0#2": 0.25, "1": 0.5}
    assert resolve({"1": 0.5}, model, ["0", "0#2", "1"])["1"] == 0.5  # a dict names layers, a string counts them
    assert resolve({"0": 0.5}, model, ["0", "0#2", "1"]) == {"0": 0.5, "0#2": 0.5, "1": 0.0}


class Staged(nn.Module):
    """Stages as timm's networks have them, with something before, between and after."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.ModuleList(self.stage() for _ in range(2))
        self.head = nn.ModuleDict({"norm": nn.BatchNorm2d(4), "fc": nn.Linear(4, 2)})

    @staticmethod
    def stage():
        blocks = nn.Sequential(*(nn.ModuleDict({"conv_dw": nn.Conv2d(4, 4, 3), "mlp": nn.Linear(4, 4)}) for _ in "ab"))
        return nn.ModuleDict({"downsample": nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), "blocks": blocks})


@pytest.mark.parametrize("make, sizes, first", [
    (lambda: models.create("resnet56"), [1, 18, 18, 18, 1], "layer1.0.conv1"),
    (lambda: models.create("wrn-40-2"), [1, 13, 13, 13, 1], "layer1.0.conv1"),
    (torchvision.models.resnet50, [1, 10, 13, 19, 10, 1], "layer1.0.conv1"),
    # a transition behind a dense block belongs to it
    (torchvision.models.densenet121, [1, 13, 25, 49, 32, 1], "features.denseblock1.denselayer1.conv1"),
    (torchvision.models.regnet_y_400mf, [1, 6, 16, 31, 31, 1], "trunk_output.block1.block1-0.proj.0"),
    (torchvision.models.shufflenet_v2_x1_0, [1, 14, 26, 14, 2], "stage2.0.branch1.0"),
    (lambda: models.create("densenet-bc-100"), [1, 33, 33, 32, 1], "dense1.0.conv1"),
    # three layers of the list are no stages themselves; the last one follows the last stage
    (torchvision.models.mnasnet0_5, [3, 9, 9, 9, 6, 12, 3, 2], "layers.8.0.layers.0"),
    (Staged, [1, 5, 5, 1], "stages.0.downsample.1"),
    (lambda: nn.DataParallel(torchvision.models.resnet18()), [1, 4, 5, 5, 5, 1], "module.layer1.0.conv1"),
])  # fmt: skip
def test_stages_of_networks(make, sizes, first):
    model = make() if make is torchvision.models.regnet_y_400mf else on_meta(make)  # it computes its widths
    found = stages(model)
    assert [len(entry) for entry in found] == sizes and found[1][0] == first
    assert [name for entry in found for name in entry] == layers(model)


def test_skip(resnet):
    model, _, names = resnet
    assert skipped([], model, names) == set()
    assert skipped("[1.0, 2.1]", model, names) == {"layer1.0.conv1", "layer2.1.conv1"}
    assert skipped(["3"], model, names) == set(names[6:])
    assert skipped(["3.1.0", "layer1.2.conv1"], model, names) == {"layer3.1.conv1", "layer1.2.conv1"}
    assert skipped(["3.1.1", "0", "4"], model, names) == set()  # they exist, and nobody would prune them
    assert skipped("*layer[12]*", model, names) == set(names[:6])


def test_skip_goes_by_components():
    model = on_meta(torchvision.models.resnet101)
    names = [name for name in layers(model) if ".conv1" in name]
    assert skipped(["3.1"], model, names) == {"layer3.1.conv1"}  # not blocks 10 to 19
    assert skipped(["3.22"], model, names) == {"layer3.22.conv1"}
    staged = on_meta(Staged)
    assert skipped(["2.1", "1.0.1"], staged, layers(staged)) == {
        "stages.1.blocks.1.conv_dw", "stages.1.blocks.1.mlp", "stages.0.blocks.0.mlp",
    }  # fmt: skip


def test_patterns_do_not_see_wrappers(plain):
    model, _, names = plain
    wrapped = copy.deepcopy(model)
    wrapped.features = nn.DataParallel(wrapped.features)
    inner = [name.replace("features", "features.module") for name in names]
    assert skipped(["*features.0"], wrapped, inner) == {"features.module.0"}
    assert resolve("features.0:0.5", wrapped, inner)["features.module.0"] == 0.5


def test_attention_has_a_stage():
    """Its projections belong to a module that is neither a convolution nor a linear layer."""

    def block():
        return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})

    model = nn.ModuleDict({"stages": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 2)})
    names = ["stages.0.attn", "stages.0.attn#2", "stages.0.mlp", "stages.1.attn"]
    assert list(resolve("[0,0.5,0.25,0]", model, names).values()) == [0.5, 0.5, 0.5, 0.25]
    assert skipped(["1"], model, names) == set(names[:3])
    assert resolve("*attn:0.5", model, names)["stages.0.attn#2"] == 0.5


def test_constrained():
    sizes = {f"layer{s}.{b}.conv1": 16 * s for s in (1, 2) for b in range(3)}
    two = [["layer1.0.conv1", "layer1.2.conv1"], [f"layer2.{b}.conv1" for b in range(3)]]
    assert constrained("layer1.0.conv1,layer1.2.conv1/layer2.*.conv1", sizes) == two
    assert constrained(" layer1.0.conv1 , layer1.2.conv1 / layer2.*.conv1 ", sizes) == two
    assert constrained(["layer1.0.conv1,layer1.2.conv1", "layer2.*.conv1"], sizes) == two
    assert constrained([("layer1.0.conv1", "layer1.2.conv1"), ("layer2.*.conv1",)], sizes) == two
    # the first one's scores decide, so the order counts
    assert constrained("layer1.2.conv1,layer1.*", sizes)[0][0] == "layer1.2.conv1"


@pytest.mark.parametrize("spec, message", [
    ("layer3.*/layer1.*", r"'layer3.\*' matches no prunable layer; nearest: layer"),
    ("layer*.conv1", r"equal width in 'layer\*.conv1', got layer1.0.conv1 with 16 and layer2.0.conv1 with 32"),
    ("layer1.0.conv1", r"names only layer1.0.conv1; a set needs two layers"),
    ("layer1.*/layer1.0.conv1,layer1.1.conv1", r"layer1.0.conv1 is in two sets"),
    ("layer1.*,/layer2.*", r"empty entry in 'layer1.\*,'"),
])  # fmt: skip
def test_constrained_errors(spec, message):
    sizes = {f"layer{s}.{b}.conv1": 16 * s for s in (1, 2) for b in range(3)}
    with pytest.raises(ValueError, match=f"constrained: .*{message}") as e:
        constrained(spec, sizes)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ratio, message", [
    (1.0, r"0 <= ratio < 1 .*got 1.0"),
    (-0.1, r"got -0.1"),
    (float("nan"), r"got nan"),
    (None, r"expected 0.5, .*by stage, .*by layer index, .*by name; got NoneType"),
    ("half", r"expected a number in 'half', got 'half'; the forms are 0.5, '\[0,0.5"),
    ("", r"empty entry in ''"),
    ("[0,0.5,,0.5,0]", r"empty entry in '\[0,0.5,,0.5,0\]'"),
    ("[0,0.5,0.5,0.5,0", r"got '\[0'"),
    ("[0,0.5,0.5,1.5,0]", r"0 <= ratio < 1 .*got '1.5'"),
    ("[0,0.5,x,0.5,0]", r"got 'x'"),
    ("[0,0.5,0.5,0]", r"expected 5 entries \(before the first stage, 3 stages, after the last\), got 4; "
                      r"the stages are layer1, layer2, layer3"),
    ("[0.5]", r"got 1; the stages are"),
    ([], r"got 0; the stages are"),
    ("[0.5,0,0,0,0]", r"'entry 0 \(before the first stage\)' reaches no prunable layer: "
                      r"conv1 \(layer1.0.conv2 writes the same channels, see option coupled\)"),
    ("[0,0,0,0,0.1]", r"'entry 4 \(after the last stage\)' reaches no prunable layer: fc \(.*output"),
    ("0-4:0.5, layer1.0.conv1:0.2", r"mixes indices and names"),
    ("[0-4:0.5, 0.2]", r"expected 'layer:ratio' at '0.2'"),
    ("4-1:0.5", r"'4-1:0.5' runs backwards; write '1-4:0.5'"),
    ("0-3:0.5, 2:0.1", r"'0-3:0.5' and '2:0.1' both name layer 2 \(layer1.0.conv2\)"),
    ("0-3:0, 2:0", r"both name layer 2"),
    ("10-20:0.5", r"index 20 in '10-20:0.5' is out of range; the network has 20 layers, 0 \(conv1\) to 19 \(fc\)"),
    ("2:0.5", r"'2:0.5' reaches no prunable layer: layer1.0.conv2 \(conv1 writes the same channels"),
    ("1:", r"expected a number in '1:', got ''"),
    (":0.5", r"':0.5' names no layer"),
    ("conv:0.5, conv:0.2", r"'conv:0.2' repeats conv"),
    ("layer1.0.conv3:0.5", r"'layer1.0.conv3' matches no layer; nearest: layer1.0.conv"),
    ("zzz*:0.5", r"'zzz\*' matches no layer; known: layer1.0.conv1, layer1.1.conv1, layer1.2.conv1, ... \(20 in all\)"),
    ("layr1.*:0, *:0.5", r"'layr1.\*' matches no layer; nearest: layer1"),  # else it would be pruned after all
    ("*conv2:0.5", r"'\*conv2' reaches no prunable layer: layer1.0.conv2 \(conv1 writes the same .* and 8 more; "
                    r"prunable: layer1.0.conv1, layer1.1.conv1, layer1.2.conv1, ... \(9 in all\)"),
    ("*:0.5, layer1.*:0.2", r"'layer1.\*' decides nothing, since '\*' comes before it for layer1.0.conv1"),
    ({"layer1.0.conv1": 1.0}, r"for 'layer1.0.conv1', got 1.0"),
    ({"layer1.0.conv1": "x"}, r"expected a number for 'layer1.0.conv1', got 'x'"),
    ({3: 0.5}, r"expected layer names as keys, got 3; by index write '3:0.5'"),
])  # fmt: skip
def test_errors_say_what_to_do(resnet, ratio, message):
    model, graph, names = resnet
    with pytest.raises(ValueError, match=f"ratio: .*{message}") as e:
        resolve(ratio, model, names, reasons=left_alone(graph, names))
    assert "\n" not in str(e.value)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*"0123456789.,:-[]* ", "0.5", "layer1", "conv1", "fc", "1-2:"]), max_size=12).map("".join)
)
def test_any_text_is_understood_or_refused_in_words(resnet, text):
    model, graph, names = resnet
    try:
        found = resolve(text, model, names, reasons=left_alone(graph, names))
    except ValueError as e:
        assert str(e).startswith("ratio: ") and "\n" not in str(e)
    else:
        assert isinstance(found, float) or all(0 <= r < 1 for r in found.values())


def test_residual_streams_have_the_name_of_their_first_layer(resnet):
    model, graph, _ = resnet
    names = list(graph.groups)
    assert asked(model, graph, names, "conv1:0.5")[0] == 0.5
    with pytest.raises(
        ValueError, match=r"layer1.2.conv2 \(it shares its channels with conv1: give that one's ratio\)"
    ):
        asked(model, graph, names, "layer1.2.conv2:0.5")
    found = resolve("[0.1,0,0.2,0,0]", model, names)  # the stream begins at the stem, so it is in its entry
    assert [name for name, r in found.items() if r == 0.1] == ["conv1"]


def test_errors_without_stages(plain):
    model, _, names = plain
    with pytest.raises(ValueError, match=r"VGG has no stages .* by layer index, '\[0-4:0.5\]', or name"):
        resolve("[0,0.5,0]", model, names)
    with pytest.raises(ValueError, match=r"skip: VGG has no stages .*; name layers"):
        skipped(["1.0"], model, names)
    stage = nn.ModuleDict({"layer1": nn.Sequential(nn.Linear(1, 1))})
    two = nn.ModuleDict({"a": stage, "b": copy.deepcopy(stage)})
    with pytest.raises(ValueError, match=r"several series of stages, 'a.layer\*' and 'b.layer\*'"):
        stages(two)


@pytest.mark.parametrize("skip, message", [
    (["3.7"], r"'3.7' names no layer"),
    (["layer9.*"], r"'layer9.\*' names no layer; nearest: layer"),
    ([1.0], r"expected strings such as '1.0' \(2.1 and 2.10 are one number\), got 1.0"),
    ("[1.0,]", r"empty entry"),
])  # fmt: skip
def test_skip_errors(resnet, skip, message):
    model, _, names = resnet
    with pytest.raises(ValueError, match=f"skip: {message}"):
        skipped(skip, model, names)


# From another network -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(resnet):
    """A ResNet-20 that lost 0, 1, 2, ... channels of its layers: keep-masks, masked and smaller."""
    model, graph, names = resnet
    keep = {
        name: pick(torch.rand(graph.groups[name].size), i / graph.groups[name].size) for i, name in enumerate(names)
    }
    masked = copy.deepcopy(model)
    graph.mask_(masked, keep)
    return keep, masked, compact(copy.deepcopy(model), keep, X, graph=graph)


@pytest.mark.parametrize("form", ["module", "state_dict", "checkpoint", "torch", "safetensors", "wrapped"])
@pytest.mark.parametrize("how", ["masked", "smaller"])
def test_inherit_from_a_network(resnet, pruned, form, how, tmp_path):
    model, graph, names = resnet
    keep, masked, smaller = pruned
    other = masked if how == "masked" else smaller
    source = {
        "module": lambda: other,
        "state_dict": other.state_dict,
        "checkpoint": lambda: {"epoch": 3, "state_dict": other.state_dict()},
        "wrapped": lambda: nn.DataParallel(other).state_dict(),
    }.get(form, lambda: tmp_path / f"net.{form}")()
    if form == "torch":
        torch.save({"model": other.state_dict(), "epoch": 3}, source)
    elif form == "safetensors":
        save_file(other.state_dict(), source)
    found = inherited(source, model, graph, names)
    gone = {name: int((~k).sum()) for name, k in keep.items()}
    assert {name: number_removed(r, graph.groups[name].size) for name, r in found.items()} == gone
    if how == "masked":
        found = inherited(source, model, graph, names, "index")
        assert list(found) == names and all(torch.equal(found[name], keep[name]) for name in names)
    else:
        with pytest.raises(ValueError, match=r"layer1.1.conv1 of .* has 15 of 16 channels, and which ones cannot be"):
            inherited(source, model, graph, names, "index")


@pytest.mark.parametrize("form", ["json", "lists", "masks"])
def test_inherit_from_a_keep_list(resnet, pruned, form, tmp_path):
    model, graph, names = resnet
    keep = {name: mask for name, mask in pruned[0].items() if not mask.all()}
    source = {name: mask.nonzero().flatten().tolist() for name, mask in keep.items()}
    if form == "masks":
        source = keep
    elif form == "json":
        (tmp_path / "keep.json").write_text(json.dumps(source))
        source = str(tmp_path / "keep.json")
    found = inherited(source, model, graph, names, "index")
    assert list(found) == names and all(torch.equal(found[name], pruned[0][name]) for name in names)
    gone = {name: number_removed(r, 64) for name, r in inherited(source, model, graph, names).items()}
    assert gone[names[0]] == 0 and gone[names[8]] == 8


def test_inherited_ratios_give_the_same_number_back():
    for size in range(1, 300):
        for gone in range(size):
            assert math.ceil(ratios._exact_ratio(gone, size) * size) == gone
    assert math.ceil(7 / 25 * 25) == 8  # why it takes care


def test_inherit_errors(resnet, pruned, tmp_path):
    model, graph, names = resnet
    _, masked, smaller = pruned

    def error(source, what="ratio", mine=names) -> str:
        with pytest.raises(ValueError, match="inherit: ") as e:
            inherited(source, model, graph, mine, what)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "expected 'ratio' or 'index', got 'indices'" in error(masked, "indices")
    assert "no channel of the ResNetCIFAR is missing or zero" in error(model)
    assert "has no conv1.weight; nearest" in error({"conv.weight": torch.zeros(3)})
    assert "lacks 1 channels of layer1.1.conv1, which cannot be pruned here (the method leaves" in error(
        smaller, mine=names[2:]
    )
    wider = copy.deepcopy(smaller.state_dict())
    wider["layer1.1.conv1.weight"] = torch.zeros(17, 16, 3, 3)
    assert "layer1.1.conv1.weight of the given mapping is (17, 16, 3, 3), and this model's is (16, 16" in error(wider)
    dead = masked.state_dict() | {"layer1.1.conv1.weight": torch.zeros(16, 16, 3, 3)}
    assert "all 16 filters of layer1.1.conv1" in error(dead)
    half = copy.deepcopy(model.state_dict())
    half["layer1.0.conv2.weight"] = half["layer1.0.conv2.weight"][:8]
    assert "different numbers of channels in layers that share them" in error(half)
    assert "different indices from 0 to 15 for layer1.0.conv1, got [0, 16]" in error({"layer1.0.conv1": [0, 16]})
    assert "different indices" in error({"layer1.0.conv1": [1, 1]})
    assert "no file" in error(str(tmp_path / "none.pth"))
    assert "expected a state_dict" in error(3) and "got nothing" in error({})
    torch.save(model, tmp_path / "pickled.pth")
    assert "A pickled module: load it yourself" in error(tmp_path / "pickled.pth")
    (tmp_path / "bad.json").write_text("{")
    assert "cannot read" in error(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"unknown group 'layer1.0.conv2'.*"):
        inherited({"layer1.0.conv2": [0]}, model, graph, names)
    with pytest.raises(ValueError, match=r"removes all 16 channels"):
        inherited({"layer1.0.conv1": []}, model, graph, names)


def test_inherit_where_several_groups_share_one_layer():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
            self.out = nn.Conv2d(12, 5, 3)

        def forward(self, x):
            return self.out(self.wide(x) + torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))

    model = Both()
    graph = trace(model, X)
    names = ["wide", "wide#2"]
    assert list(graph.groups) == names
    masked = copy.deepcopy(model)
    keep = {"wide": torch.arange(6) != 1, "wide#2": torch.arange(6) > 2}
    graph.mask_(masked, keep)
    found = inherited(masked, model, graph, names, "index")
    assert all(torch.equal(found[name], keep[name]) for name in names)
    smaller = compact(copy.deepcopy(model), keep, X, graph=graph)
    with pytest.raises(ValueError, match=r"wide.weight .* has 8 of 12 outputs, but only 6 belong to wide; give ratios"):
        inherited(smaller, model, graph, names)
