"""to_plain and fold: the same function in both modes, only torch's modules left, and nothing done on failure."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from graph_cases import FAMILIES, PATTERNS, Lambda, stir, uneven_keep
from hypothesis import given
from hypothesis import strategies as st
from test_properties import examples, networks
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune as torch_prune

import fastprune as fp
from fastprune.errors import GraphError
from fastprune.gates import GateStatistics, find_gates
from fastprune.nn import BatchNormAct2d, Gate, MaskedConv2d, SigmoidBatchNorm2d, SyncBatchNormAct2d
from fastprune.surgery import first_shapes, keep_lists, leaves

OURS = {
    "vgg16-rni": lambda: fp.models.create("vgg16-rni", bound="sigmoid", width=0.1),
    "resnet20": lambda: fp.models.create("resnet20", bound="sigmoid"),
    "wrn-40-2": lambda: fp.models.create("wrn-40-2", bound="sigmoid", depth=10, width=0.5),
    "densenet-bc-100": lambda: fp.models.create("densenet-bc-100", bound="sigmoid", depth=10),
    "lenet-taylor": lambda: fp.models.create("lenet-taylor"),
}
SOME = ("resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "shufflenet_v2_x0_5", "convnext")
NETWORKS = {name: FAMILIES[name] for name in SOME} | OURS  # one of each family is in bench/e2e/export.py
# norms without a layer of their own before them: on a concatenation, before a convolution, in a training-only head
STAY = {"densenet121": 62, "googlenet": 2, "wrn-40-2": 3, "densenet-bc-100": 6}


def run(model: nn.Module, x: torch.Tensor, training: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.cat([t.flatten() for t in leaves(model.train(training)(x))])


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def assert_plain(model: nn.Module) -> None:
    for m in model.modules():
        assert not isinstance(m, BatchNormAct2d | Gate | MaskedConv2d)
        assert re.match(r"fastprune\.models\.|(?!fastprune)", type(m).__module__), type(m)
        assert not any(hooks for name, hooks in vars(m).items() if name.endswith("_hooks"))


def folded(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, str]:
    """The folded model, and the warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fp.fold(model, x)
    assert len(caught) <= 1
    return model, "".join(str(w.message) for w in caught)


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_networks_keep_their_function(name):
    x = torch.randn(2, 3, 32, 32).double()
    model = stir(NETWORKS[name]().double()).eval()
    if name in FAMILIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names what cannot be fused
            fp.nn.convert_batchnorm(model, bound="sigmoid")
    graph = fp.graph.trace(model, x)
    fp.compact(model, uneven_keep(graph), x, check=False, graph=graph)
    modules, parameters, state = dict(model.named_modules()), dict(model.named_parameters()), set(model.state_dict())
    cut = keep_lists(model)
    reference = copy.deepcopy(model)

    assert fp.to_plain(model, x) is model
    assert_plain(model)
    shifts = {f"{n}.bias" for n, m in modules.items() if isinstance(m, nn.BatchNorm2d)}
    gates = {f"{n}.weight" for n, m in modules.items() if isinstance(m, Gate)}
    assert set(model.state_dict()) == (state | shifts) - gates
    assert all(p is model.get_parameter(n) for n, p in parameters.items() if n not in gates)
    assert all(m is model.get_submodule(n) for n, m in modules.items() if not isinstance(m, Gate))
    for n, kept in keep_lists(model).items():
        before = cut[n] if n in cut else cut[n.removesuffix("bias") + "weight"]
        assert all(torch.equal(stays, before[dim]) for dim, stays in kept.items())
    first = first_shapes(model)
    assert all(n in first for n in shifts if n.removesuffix("bias") + "weight" in first)
    for training in (False, True):
        assert gap(run(model, x, training), run(reference, x, training)) < 1e-12
    buffers = dict(model.named_buffers())
    assert all(torch.allclose(buffers[n], b, rtol=1e-12, atol=1e-12) for n, b in reference.named_buffers())
    F.mse_loss(y := run(model, x, True), torch.zeros_like(y)).backward()

    expected = run(model, x)
    parameters = dict(model.named_parameters())
    model, left = folded(model, x)
    assert gap(run(model, x), expected) < 1e-12
    assert sum(isinstance(m, _BatchNorm) for m in model.modules()) == STAY.get(name, 0)
    assert left.startswith(f"fold: {STAY[name]} norms stay" if name in STAY else "") and bool(left) == (name in STAY)
    assert all(p is parameters[n] for n, p in model.named_parameters() if n in parameters)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_keep_their_function(name):
    model, x = stir(PATTERNS[name]().double()).eval(), torch.randn(3, 3, 16, 16).double()
    expected = run(model, x)
    model = fp.to_plain(model)
    assert_plain(model)
    assert gap(run(model, x), expected) < 1e-12
    model, left = folded(model, x)
    assert gap(run(model, x), expected) < 1e-12
    norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    assert norms == {"dense": 2, "reparameterised_branches": 1}.get(name, 0) and bool(left) == bool(norms)


@given(st.data())
@examples(25)
def test_random_networks_keep_their_function(data):
    """With our norms or without; those that a layer of their own precedes are folded, the others stay."""
    model, x = data.draw(networks()).eval(), torch.randn(3, 2, 8, 8).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names what cannot be fused
        if data.draw(st.booleans()):
            fp.nn.convert_batchnorm(model, bound="sigmoid")
    expected = run(model, x)
    fp.to_plain(model, x)
    assert_plain(model)
    assert gap(run(model, x), expected) < 1e-10
    folded(model, x)
    assert gap(run(model, x), expected) < 1e-10


# --- each module of ours -----------------------------------------------------------------------------------------


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 6, 3, padding=1)


def bounded(act: str | None = None) -> BatchNormAct2d:
    return BatchNormAct2d(6, act=act, bound="sigmoid", bias=False)


def with_masks(groups: int, **options) -> MaskedConv2d:
    masked = MaskedConv2d(6, 12, 3, groups=groups, **options)
    masked.in_mask, masked.out_mask = torch.rand(6) > 0.4, torch.rand(12) > 0.4
    masked.weight_mask = torch.rand_like(masked.weight) > 0.3
    return masked


def with_gate(layer: nn.Module, width: int = 6) -> nn.Sequential:
    gate = Gate(width)
    gate.weight.data.copy_(torch.randn(width))
    return nn.Sequential(layer, gate, nn.ReLU())


MODULES = {
    "the norm alone": lambda: SigmoidBatchNorm2d(3),
    "the norm alone with ReLU": lambda: SigmoidBatchNorm2d(3, act="relu"),
    "over processes": lambda: nn.Sequential(conv(), SyncBatchNormAct2d(6, bound="sigmoid")),
    "no parameters": lambda: nn.Sequential(conv(), BatchNormAct2d(6, affine=False, act="relu")),
    "no statistics": lambda: nn.Sequential(conv(), SigmoidBatchNorm2d(6, track_running_stats=False)),
    "cumulative average": lambda: nn.Sequential(conv(), SigmoidBatchNorm2d(6, momentum=None)),
    "residual": lambda: Lambda(lambda m, x: m.bn(m.conv(x), m.conv(x).sin()), conv=conv(), bn=bounded()),
    "residual, ReLU": lambda: Lambda(
        lambda m, x: m.bn(m.conv(x), residual=m.conv(x).sin()), conv=conv(), bn=bounded("relu")
    ),
    "residual behind a condition": lambda: Lambda(
        lambda m, x: m.bn(m.conv(x), residual=x[:, :1]) if x.sum() < 1e9 else x, conv=conv(), bn=bounded("relu")
    ),
    "shared norm": lambda: Lambda(lambda m, x: m.bn(m.bn(m.conv(x)).sin()), conv=conv(), bn=bounded("relu")),
    "gate behind conv": lambda: with_gate(conv()),
    "gate behind 3 groups": lambda: nn.Sequential(conv(), with_gate(nn.Conv2d(6, 6, 3, groups=3, bias=False))),
    "gate behind transposed": lambda: nn.Sequential(conv(), with_gate(nn.ConvTranspose2d(6, 4, 3, groups=2), 4)),
    "gate behind bounded norm": lambda: nn.Sequential(conv(), with_gate(bounded())),
    "gate behind linear": lambda: nn.Sequential(nn.Flatten(), with_gate(nn.Linear(192, 6))),
    "gate of ones anywhere": lambda: nn.Sequential(nn.ReLU(), Gate(3)),
    "masked": lambda: nn.Sequential(conv(), with_masks(1)),
    "masked, 3 groups": lambda: nn.Sequential(conv(), with_masks(3, bias=False, padding=1, padding_mode="reflect")),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_each_module(name):
    model, x = stir(MODULES[name]().double()), torch.randn(4, 3, 8, 8).double()
    for m in model.modules():
        if isinstance(m, Gate):
            m.weight.data.fill_(1) if "ones" in name else m.weight.data.uniform_(-2, 2)
    model.requires_grad_("residual" not in name)
    model.train()
    reference = copy.deepcopy(model)
    plain = fp.to_plain(model, x)
    assert_plain(plain)
    assert (plain is model) == (name != "the norm alone with ReLU")
    assert all(m.training for m in plain.modules())
    if "residual" in name:
        assert not any(p.requires_grad for p in plain.parameters())
    for training in (True, False):
        assert gap(run(plain, x, training), run(reference, x, training)) < 1e-12
    assert len(list(plain.buffers())) == sum("mask" not in n for n, _ in reference.named_buffers())
    for a, b in zip(plain.buffers(), (b for n, b in reference.named_buffers() if "mask" not in n), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    again = pickle.loads(pickle.dumps(plain)) if "residual" not in name and "shared" not in name else plain
    assert torch.equal(run(copy.deepcopy(again), x), run(plain, x))


def test_tied_weights_are_transformed_once():
    model = nn.Sequential(conv(), bounded(), nn.ReLU(), bounded()).double()
    model[3].weight = model[1].weight
    x = torch.randn(4, 3, 8, 8).double()
    expected = run(model, x)
    fp.to_plain(model)
    assert model[3].weight is model[1].weight and model[3].bias is not model[1].bias
    assert gap(run(model, x), expected) < 1e-12


def test_bfloat16_and_float32_scales_are_rounded_once():
    for dtype in (torch.float32, torch.bfloat16):
        norm = SigmoidBatchNorm2d(64).to(dtype)
        expected = norm.weight.detach().double().sigmoid().to(dtype)
        norm.weight.grad = torch.ones_like(norm.weight)
        fp.to_plain(norm)
        assert torch.equal(norm.weight, expected) and norm.weight.grad is None and norm.bias.dtype == dtype


def test_statistics_of_a_method_go():
    model, x = stir(fp.models.create("resnet20")), torch.randn(2, 3, 16, 16)
    graph = fp.graph.trace(model, x)
    GateStatistics(model, find_gates(model, graph))
    assert any(hasattr(m, "gate_slots") for m in model.modules())
    copied = copy.deepcopy(model)
    for each in (copied, model):
        fp.to_plain(each)
        assert_plain(each)
        assert not any("gate_slots" in vars(m) for m in each.modules())


def test_other_hooks_stay():
    model, x, seen = nn.Sequential(conv(), bounded()), torch.randn(2, 3, 8, 8), []
    model[1].register_forward_hook(lambda m, args, out: seen.append(type(m)))
    fp.to_plain(model)(x)
    assert seen == [nn.BatchNorm2d]


class Subclass(SigmoidBatchNorm2d):
    pass


def pruned_by_torch() -> nn.Module:
    model = nn.Sequential(conv(), bounded())
    torch_prune.random_unstructured(model[1], "weight", 0.5)
    return model


def tied_to_a_convolution() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(1, 1, 6, bias=False), SigmoidBatchNorm2d(6))
    model[1].weight = model[0].weight
    return model


def with_hook() -> nn.Module:
    model = nn.Sequential(conv(), bounded("relu"))
    model[1].register_forward_hook(lambda m, args, out: None)
    return model


def called_both_ways() -> nn.Module:
    return Lambda(lambda m, x: m.bn(m.bn(m.conv(x)), x[:, :1]), conv=conv(), bn=bounded())


REFUSED = {
    "a subclass": (lambda: nn.Sequential(conv(), Subclass(6)), "'1' (Subclass) has code of its own"),
    "torch's pruning": (pruned_by_torch, "'1' (BatchNormAct2d) computes its weight"),
    "tied": (tied_to_a_convolution, "'1' (SigmoidBatchNorm2d) shares its weight"),
    "hooks": (with_hook, "'1' adds or activates and has hooks"),
    "both ways": (called_both_ways, "'bn' is called with a residual in one place and without"),
    "both ways behind a condition": (
        lambda: Lambda(
            lambda m, x: m.bn(m.bn(m.conv(x)), x[:, :1]) if x.sum() < 1e9 else x, conv=conv(), bn=bounded()
        ),
        "'bn' is called with a residual in one place and without",
    ),
    "act for a call": (
        lambda: Lambda(lambda m, x: m.bn(m.conv(x), act="relu"), conv=conv(), bn=bounded()),
        "'bn' is called with act",
    ),
    "gate behind a sum": (
        lambda: Lambda(
            lambda m, x: m.bn(m.gate(m.conv(x) + x[:, :1])), conv=conv(), gate=with_gate(conv())[1], bn=bounded()
        ),
        "'gate' holds other factors than 1, and no convolution",
    ),
    "two behind one gate": (
        lambda: Lambda(lambda m, x: m.gate(y := m.conv(x)) + y, conv=conv(), gate=with_gate(conv())[1]),
        "'gate' holds other factors than 1, and no convolution",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_unchanged(name):
    build, why = REFUSED[name]
    model, x = build(), torch.randn(2, 3, 8, 8)
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(GraphError, match=re.escape(f"to_plain: {why}")):
        fp.to_plain(model, x)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_arguments_in_words():
    with pytest.raises(ValueError, match=r"expected example_inputs, because '1' holds other factors"):
        fp.to_plain(with_gate(conv()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what torch.compile imports
        compiled = torch.compile(nn.Sequential(conv()))
    for function in (fp.to_plain, fp.fold):
        with pytest.raises(ValueError, match=r"it was compiled; .* before compiling"):
            function(compiled, torch.randn(2, 3, 8, 8))
        with pytest.raises(ValueError, match=r"expected an nn\.Module, got str"):
            function("resnet20", torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected a model in eval mode"):
        fp.fold(nn.Sequential(conv(), bounded()), torch.randn(2, 3, 8, 8))
    with pytest.raises(GraphError, match=r"a float64 copy of the model does not run"):
        fp.to_plain(nn.Sequential(conv(), bounded()), torch.randn(2, 5, 8, 8))


WITHOUT_US = """
import copy, pickle, sys, torch
sys.modules["fastprune"] = None
sys.path.insert(0, sys.argv[1])
ours, plain, x, y = pickle.load(open("network.pickle", "rb"))
try:
    pickle.loads(ours)
except ImportError:
    pass
else:
    raise AssertionError("the pickle of our modules was expected to need fastprune")
model = pickle.loads(plain)
for m in (model, copy.deepcopy(model)):
    assert torch.equal(m(x), y)
model.train()(x).sum().backward()
assert not any(name.startswith("fastprune.") for name in sys.modules)
"""
NETWORK = """
from torch import nn
class Network(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.bn1, self.bn2, self.bn3 = nn.Conv2d(3, 6, 3, padding=1), norm(6), norm(6), norm(6, act="relu")
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)
    def forward(self, x):
        x = self.bn1(self.conv(x)).relu()
        x = self.bn2(self.second(x)) + x
        return self.fc(self.bn3(self.second(x), x).mean((2, 3)))
"""


def test_a_plain_network_needs_no_fastprune(tmp_path, monkeypatch):
    (tmp_path / "plain_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    from plain_network import Network

    model, x = stir(Network(SigmoidBatchNorm2d)).eval(), torch.randn(2, 3, 8, 8)
    fp.nn.convert_batchnorm(model, "sigmoid")
    graph = fp.graph.trace(model, x)
    fp.compact(model, uneven_keep(graph), x, graph=graph)
    ours, plain = pickle.dumps(model), fp.to_plain(model, x)
    with torch.no_grad():
        (tmp_path / "network.pickle").write_bytes(pickle.dumps((ours, pickle.dumps(plain), x, plain(x))))
    command = [sys.executable, "-W", "error", "-c", WITHOUT_US, "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- folding -----------------------------------------------------------------------------------------------------

PAIRS = {
    "Conv1d": (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "Conv2d, reflected edges": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "Conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 5, 5)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "Linear": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
    "SyncBatchNorm": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 9, 9)),
    "dropout between": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout()), nn.BatchNorm2d(6), (2, 4, 9, 9)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    *layers, shape = copy.deepcopy(PAIRS[name])
    model, x = stir(nn.Sequential(*layers).double()).eval(), torch.randn(shape).double()
    model[1].eps = 0.1
    expected = run(model, x)
    assert fp.fold(model, x) is model
    assert type(model[1]) is nn.Identity
    assert gap(run(model, x), expected) < 1e-13
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_folding_keeps_dtype_layout_and_what_trains():
    model = stir(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last).eval().requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    expected = run(model, x)
    fp.fold(model, x)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in model.parameters())
    assert gap(run(model, x).float(), expected.float()) < 0.02  # the folded weights are rounded to 8 bits


class Activated(nn.BatchNorm2d):
    """A norm with an activation inside, as timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class Biasless(nn.Conv2d):
    """Forgets the bias that folding gives it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, padding=1)


def test_norm_with_an_activation_inside():
    model, x = stir(nn.Sequential(conv(), Activated(6), nn.Conv2d(6, 2, 3)).double()).eval(), torch.randn(2, 3, 8, 8)
    expected = run(model, x.double())
    fp.fold(model, x.double())
    assert type(model[1]) is nn.ReLU and gap(run(model, x.double()), expected) < 1e-13


def two(function, **modules):
    return lambda: Lambda(
        function, **({"conv": conv(), "bn": nn.BatchNorm2d(6)} | {k: v() for k, v in modules.items()})
    )


def hooked(name: str):
    def build():
        model = nn.Sequential(nn.Sequential(conv()), nn.BatchNorm2d(6))
        model.get_submodule(name).register_forward_hook(lambda m, args, out: None)
        return model

    return build


def tied():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    model[3].weight = model[1].weight
    return model


def parametrized():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def in_training():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6)).eval()
    model[1].train()
    return model


STAYS = {
    "two readers": (two(lambda m, x: m.bn(y := m.conv(x)) + y), "conv is also read by add in the model"),
    "read before": (two(lambda m, x: (y := m.conv(x)).sum() + m.bn(y)), "conv is also read by sum in the model"),
    "read as a view": (two(lambda m, x: m.bn(m.conv(x)[:]) * 2), "conv is also read by "),
    "activated in place": (two(lambda m, x: m.bn(F.relu_(m.conv(x)))), "conv is also read by relu_"),
    "returned": (two(lambda m, x: (m.bn(y := m.conv(x)), y)), "conv is also read by the caller"),
    "conv twice": (two(lambda m, x: m.bn(m.conv(x)) + m.conv(x)), "bn (it or conv runs twice"),
    "norm twice": (two(lambda m, x: m.bn(m.bn(m.conv(x)))), "bn (ran 2 times)"),
    "weight read": (two(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.norm()), "bn (it or conv runs twice"),
    "scale read": (two(lambda m, x: m.bn(m.conv(x)) * m.bn.weight.sum()), "bn (it or conv runs twice"),
    "shape read": (two(lambda m, x: m.bn(m.conv(x)) * m.bn.num_features), "bn (the code around it"),
    "not a module's call": (two(lambda m, x: m.bn.forward(m.conv(x))), "bn (did not run)"),
    "before": (two(lambda m, x: m.conv(m.bn(x)), bn=lambda: nn.BatchNorm2d(3)), "bn (reads no layer's output)"),
    "idle": (two(lambda m, x: m.conv(x)), "bn (did not run)"),
    "its own kind": (two(lambda m, x: m.bn(m.conv(x)), bn=lambda: Doubled(6)), "bn (the code around it or its layer"),
    "standardised": (
        two(lambda m, x: m.bn(m.conv(x)), conv=lambda: Standardised(3, 6, 3)),
        "bn (reads no layer's output)",
    ),
    "biasless": (
        two(lambda m, x: m.bn(m.conv(x)), conv=lambda: Biasless(3, 6, 3, bias=False)),
        "bn (the code around it or its layer",
    ),
    "no statistics": (
        two(lambda m, x: m.bn(m.conv(x)), bn=lambda: nn.BatchNorm2d(6, track_running_stats=False)),
        "bn (uses the batch's statistics)",
    ),
    "training": (in_training, "1 (uses the batch's statistics)"),
    "hook on the layer": (hooked("0.0"), "1 (0.0 is also read by a hook in 0.0)"),
    "hook around the layer": (hooked("0"), "1 (0.0 is also read by a hook in 0)"),
    "hook on the norm": (hooked("1"), "1 (0.0 is also read by a hook in 1)"),
    "tied": (tied, "1 (it or 0 runs twice or shares parameters), 3 (it or 2 runs twice"),
    "parametrized": (parametrized, "1 (0 computes its weight)"),
    "other channels": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3)),
        "2 (1 is also read by ",
    ),
    "no batch": (
        two(lambda m, x: m.bn(m.conv(x[0])), bn=lambda: nn.BatchNorm1d(8)),
        "bn (conv is also read by squeeze in conv)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_left_alone(name):
    build, why = STAYS[name]
    model, x = stir(build().double()).eval(), torch.randn(2, 3, 8, 8).double()
    if name == "training":
        model = in_training().double()
    expected = run(copy.deepcopy(model), x) if name != "training" else None
    state = copy.deepcopy(model.state_dict())
    model, left = folded(model, x)
    assert why in left
    assert any(isinstance(m, _BatchNorm) for m in model.modules())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and len(state) == len(
        model.state_dict()
    )
    assert expected is None or torch.equal(run(model, x), expected)


def test_storages_that_are_used_again():
    """What a norm on a sum has read is freed, and the next convolution writes there."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(8))
            self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = conv(norm(x + 1))
            return x

    _, left = folded(Body().double().eval(), torch.randn(2, 6, 16, 16).double())
    assert left.count("reads no layer's output") == 8


def test_one_pair_that_fails_does_not_take_the_others_along():
    model = nn.Sequential(conv(), Doubled(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    model, x = stir(model.double()).eval(), torch.randn(2, 3, 8, 8).double()
    expected = run(model, x)
    model, left = folded(model, x)
    assert [type(m) for m in model] == [
        nn.Conv2d,
        Doubled,
        nn.Conv2d,
        nn.Identity,
    ] and "fold: 1 norm stays: 1 (" in left
    assert gap(run(model, x), expected) < 1e-13


def test_new_biases_are_in_the_keep_lists():
    model, x = stir(fp.models.create("resnet20")).eval(), torch.randn(2, 3, 16, 16)
    graph = fp.graph.trace(model, x)
    fp.compact(model, uneven_keep(graph), x, graph=graph)
    kept = keep_lists(model)
    fp.fold(model, x)
    now = keep_lists(model)
    biases = [name for name in now if "conv" in name and name.endswith("bias")]
    assert len(biases) == 19 and not any("bn" in name for name in now)
    for name in biases:
        assert torch.equal(now[name][0], kept[name.removesuffix("bias") + "weight"][0])
        assert first_shapes(model)[name] == first_shapes(model)[name.removesuffix("bias") + "weight"][:1]
