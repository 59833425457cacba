"""compact against the masked model: outputs, one training step, optimizer state, and nothing done on failure."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_cases import FAMILIES, PATTERNS, Lambda, Net, conv_bn, stir, uneven_keep
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune import backends
from fastprune.compact import compact, prove
from fastprune.errors import GraphError
from fastprune.graph import leaves, trace
from fastprune.nn import SigmoidBatchNorm2d
from fastprune.select import keep_masks

GOLDEN = np.load(Path(__file__).parent / "golden" / "rni.npz")


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    if optimizer is not None:
        tensors += leaves([optimizer.state[p] for p in model.parameters()])
    return [t.detach().clone() for t in tensors]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = leaves(model(x))
    return torch.cat([t.flatten() for t in out])


def assert_shrunk_equals_masked(model: nn.Module, x: torch.Tensor, *, least: float) -> None:
    """Remove half of everything in float64: same outputs as masked, fewer parameters, and it trains."""
    model = stir(model.double()).eval()
    graph = trace(model, x)
    keep = uneven_keep(graph)
    masked, before = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
    graph.mask_(masked, keep)
    with torch.no_grad():
        whole, expected = outputs(model, x), outputs(masked, x)
        assert compact(model, keep, x, check=False) is model
        got = outputs(model, x)
    assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert not torch.allclose(whole, expected)  # masking did something
    assert sum(p.numel() for p in model.parameters()) <= before * least
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
        elif isinstance(m, nn.BatchNorm2d):
            assert m.num_features == len(m.running_mean)
    assert trace(model, x).train_error is None
    model.train()
    outputs(model, x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert outputs(model, x).isfinite().all()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name):
    # ConvNeXt's stream runs through layer norms and ShuffleNet's through shuffles that tie some stages together
    least = {"convnext": 0.7, "shufflenet_v2_x0_5": 0.45}.get(name, 0.4)
    assert_shrunk_equals_masked(FAMILIES[name](), torch.randn(2, 3, 64, 64).double(), least=least)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name):
    assert_shrunk_equals_masked(PATTERNS[name](), torch.randn(3, 3, 16, 16).double(), least=0.8)


@pytest.mark.parametrize("name", ["residual", "dense", "depthwise", "grouped", "squeeze_excite", "bounded_norms"])
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2, amsgrad=True),
])  # fmt: skip
def test_the_next_step_is_the_masked_models(name, make):
    model = stir(PATTERNS[name]().double())
    x, y = torch.randn(6, 3, 16, 16).double(), torch.randint(5, (6,))
    optimizer = make(model.parameters())

    def step(model, optimizer):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(2):
        step(model, optimizer)
    graph = trace(model, x)
    keep = uneven_keep(graph)
    masked, masked_optimizer = copy.deepcopy((model, optimizer))
    graph.mask_(masked, keep)
    compact(model, keep, x, optimizer=optimizer)
    step(masked, masked_optimizer)
    step(model, optimizer)
    kept = graph.kept(keep)
    for (name_, small), big in zip(model.named_parameters(), masked.parameters(), strict=True):
        entries = zip(leaves(optimizer.state[small]), leaves(masked_optimizer.state[big]), strict=True)
        for a, b in [(small, big), (small.grad, big.grad), *entries]:
            for dim, stays in kept.get(name_, {}).items():
                b = b.index_select(dim, stays) if b.dim() else b
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name_


def test_authors_pruned_network():
    """RNI's prune_hard: 40 % of all channels of a network of two bounded norms, global threshold."""
    dense = {k.split("dense/")[1]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN if "prune_hard/dense/" in k}
    pruned = {k.split("pruned/")[1]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN if "prune_hard/pruned/" in k}
    x, y = (torch.from_numpy(GOLDEN[f"rni_prune_hard/{k}"]) for k in "xy")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1), SigmoidBatchNorm2d(6), nn.ReLU(),
                nn.Conv2d(6, 7, 3, padding=1), SigmoidBatchNorm2d(7), nn.ReLU(),
            )  # fmt: skip
            self.classifier = nn.Sequential(nn.Linear(7, 4))

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    model = Network().double().eval()
    missing, unexpected = model.load_state_dict(dense, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    graph = trace(model, x)
    scores = {"features.0": dense["features.1.weight"].sigmoid(), "features.3": dense["features.4.weight"].sigmoid()}
    keep = keep_masks(scores, 0.4)
    for i, mask in enumerate(keep.values()):
        assert mask.int().tolist() == GOLDEN[f"rni_prune_hard/mask{i}"].tolist()
    masked = copy.deepcopy(model)
    graph.mask_(masked, keep)
    compact(model, keep, x)
    for name, value in pruned.items():
        assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.allclose(model(x), y, rtol=1e-12, atol=1e-14)
        assert torch.allclose(masked(x), y, rtol=1e-12, atol=1e-14)


def test_identity_hooks_layout_and_attributes_survive():
    model = Net(nn.Sequential(conv_bn(8, 16, groups=8), conv_bn(16, 10)), 10).to(memory_format=torch.channels_last)
    model.middle[1][0].weight.requires_grad_(False)
    one_by_one = model.fc.weight  # not 4-d: stays contiguous
    x = torch.randn(2, 3, 16, 16)
    model(x).sum().backward()
    parameters, seen = list(model.parameters()), []
    model.first.weight.register_hook(lambda grad: seen.append(grad.shape))
    model.first.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    keep = {"first": torch.arange(8) % 3 == 0, "middle.1.0": torch.arange(10) < 7}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    compact(model, keep, x)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model.first.weight.grad, grads["first.weight"][keep["first"]])
    assert torch.equal(model.fc.weight.grad, grads["fc.weight"][:, keep["middle.1.0"]])
    assert model.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.middle[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert one_by_one.is_contiguous() and not model.middle[1][0].weight.requires_grad
    assert str(model.first) == "Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert str(model.middle[0][0]) == "Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=3)"
    assert str(model.middle[1][0]) == "Conv2d(6, 7, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert model.bn.num_features == 3 and model.fc.in_features == 7
    model.zero_grad()
    model(x).sum().backward()
    assert seen == [torch.Size([3, 3, 3, 3]), torch.Size([3])]


def test_tied_weights_stay_tied():
    model = PATTERNS["flatten_into_linear"]()
    model.again = nn.Linear(5, 12, bias=False)
    model.again.weight = nn.Parameter(torch.randn(12, 5))
    twin = nn.Linear(5, 12, bias=False)
    twin.weight = model.again.weight
    net = nn.Sequential(model, nn.ReLU(), nn.Linear(12, 5), twin, nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(2, 3, 16, 16)
    compact(net, uneven_keep(trace(net, x)), x)
    assert model.again.weight is twin.weight and len(twin.weight) == twin.out_features == model.again.out_features == 6


def test_half_precision_and_partial_keep():
    """The proof is in float64 whatever the model's dtype; groups that keep does not name stay whole."""
    model = PATTERNS["residual"]().bfloat16()
    x = torch.randn(2, 3, 16, 16).bfloat16()
    compact(model, {"middle.body.0.0": torch.tensor([True, False, True, True, False, True])}, x)
    assert model.middle.body[0][0].out_channels == model.middle.body[1][0].in_channels == 4
    assert model.first.out_channels == 8 and model.first.weight.dtype == torch.bfloat16


BAD_MASKS = [
    ({"firts": torch.ones(8, dtype=torch.bool)}, r"unknown group 'firts'; did you mean 'first'\?"),
    ({"fc": torch.ones(5, dtype=torch.bool)}, r"unknown group 'fc'.*left alone: it is an output of the model"),
    ({"first": torch.ones(7, dtype=torch.bool)}, r"shape \(8,\), True = keep; got torch.bool \(7,\)"),
    ({"first": torch.ones(8)}, r"expected a bool tensor .* got torch.float32 \(8,\)"),
    ({"first": [True] * 8}, r"got list"),
    ({"first": torch.zeros(8, dtype=torch.bool)}, r"removes all 8 channels; keep at least one"),
]


def fixed_width(m, x):
    """Code that only works with eight channels."""
    return m.conv(x.view(len(x), 2, 4, *x.shape[2:]).flatten(1, 2))


def order_matters(m, x):
    """Code that runs with any number of channels but means something else with fewer."""
    return m.conv(x * (1 + x.shape[1] / 8))


def fades(m, x):
    """The same, so faint at the output that only a look at the layer shows it."""
    return 1e-14 * order_matters(m, x) + 1


@pytest.mark.parametrize("keep, message", BAD_MASKS, ids=[m for _, m in BAD_MASKS])
def test_malformed_masks_change_nothing(keep, message):
    assert_untouched(PATTERNS["residual"](), keep, ValueError, message)


@pytest.mark.parametrize("function", [order_matters, fades])
def test_what_the_graph_cannot_see_is_refused(function):
    model = Net(Lambda(function, conv=nn.Conv2d(8, 7, 1)), 7)
    message = r"without the channels, 'middle.conv' does not compute what .* \(relative .*nothing was changed"
    assert_untouched(model, {"first": torch.arange(8) < 5}, GraphError, message)


def test_fixed_sizes_are_noticed():
    model, x = Net(Lambda(fixed_width, conv=nn.Conv2d(8, 7, 1)), 7), torch.randn(2, 3, 16, 16)
    trusting = trace(model, x, strict=False)
    with pytest.raises(GraphError, match=r"'middle' does not compute .* RuntimeError: shape .*strict=True"):
        compact(model, uneven_keep(trusting), x, graph=trusting)
    graph = trace(model, x)
    assert graph.frozen["first"] == "a view takes its channel axis apart, by numbers that may be fixed"
    compact(model, uneven_keep(graph), x)
    assert model.first.out_channels == 8 and model.middle.conv.out_channels == 3


def test_state_that_cannot_be_cut_is_refused():
    def factored(optimizer, model):
        optimizer.state[model.first.weight]["row_mean"] = torch.zeros(8, 3)

    keep = {"first": torch.arange(8) < 5}
    message = r"state 'row_mean' of first.weight to have the parameter's shape .* got \[\(8, 3\)\]"
    assert_untouched(PATTERNS["residual"](), keep, ValueError, message, damage=factored)


def assert_untouched(model, keep, error, message, damage=None):
    x = torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    if damage is not None:
        damage(optimizer, model)
    model.train()
    keep = uneven_keep(trace(model, x)) if keep is None else keep
    before, text, rng = state(model, optimizer), str(model), torch.get_rng_state()
    with pytest.raises(error, match=message):
        compact(model, keep, x, optimizer=optimizer)
    assert same(before, state(model, optimizer)) and str(model) == text and model.training
    assert torch.equal(rng, torch.get_rng_state())


def test_a_stale_graph_is_refused():
    model, x = PATTERNS["residual"](), torch.randn(2, 3, 16, 16)
    graph = trace(model, x)
    keep = uneven_keep(graph)
    compact(model, keep, x, graph=graph)
    with pytest.raises(GraphError, match=r"traced on another model: .* trace the model again"):
        compact(model, keep, x, graph=graph)


def test_models_that_cannot_be_proved_say_so():
    class Unpicklable(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.lock = PATTERNS["residual"](), (i for i in range(3))

        def forward(self, x):
            return self.net(x)

    model, x = Unpicklable(), torch.randn(2, 3, 16, 16)
    keep = uneven_keep(trace(model, x))
    with pytest.raises(GraphError, match=r"needs a deep copy .*generator.* check=False skips the proof"):
        compact(model, keep, x)
    assert compact(model, keep, x, check=False).net.first.out_channels == 4


def test_the_proof_reports_its_error_and_leaves_the_model():
    model, x = FAMILIES["mobilenet_v3_small"](), torch.randn(2, 3, 32, 32)
    graph, before = trace(model, x), state(model)
    assert prove(model, graph, uneven_keep(graph), x) < 1e-12
    assert same(before, state(model))


def scaled_by_width(m, x):
    return m.conv(x.float() * (1 + x.shape[1] / 8))


def test_float32_in_the_code_is_compared_by_its_own_rounding():
    """A convolution in float32 inside; and a model that runs in float32 only."""

    def inside(m, x):
        weight, bias = m.conv.weight.float(), m.conv.bias.float()
        return nn.functional.conv2d(m.value(x).relu().float(), weight, bias).to(x.dtype)

    def only(m, x):
        return m.conv(m.value(x.float()).relu()).float()

    for function in (inside, only):
        model = Net(Lambda(function, value=nn.Conv2d(8, 16, 1), conv=nn.Conv2d(16, 7, 1)), 7)
        x = torch.randn(2, 3, 16, 16)
        graph = trace(model, x)
        keep = uneven_keep(graph)
        assert 1e-9 < prove(model, graph, keep, x) < 1e-5
        compact(model, keep, x, graph=graph)
        assert model.middle.value.out_channels == 8
    wrong = Net(Lambda(scaled_by_width, conv=nn.Conv2d(8, 7, 1)), 7)
    with pytest.raises(GraphError, match=r"'middle.conv' does not .*e-01; its code insists on torch.float32\)"):
        compact(wrong, {"first": torch.arange(8) < 5}, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("hide", ["colourless", "dead", "no scale", "stale statistics"])
def test_nothing_hides_a_mistake(hide):
    """The third channel goes to where the fourth should: the proof sees it whatever the weights and inputs are."""

    def swapped(m, x):
        return m.conv(x if x.shape[1] == 8 else x.flip(1))

    model = Net(Lambda(swapped, conv=nn.Conv2d(8, 7, 1, bias=False)), 7)
    x = torch.zeros(2, 3, 16, 16) if hide == "colourless" else torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model.first.bias.zero_()
        if hide == "dead":
            model.bn.bias.fill_(-100.0)
        elif hide == "no scale":
            model.bn.weight.zero_()
        elif hide == "stale statistics":
            model.bn.running_mean.fill_(1e4)
    with pytest.raises(GraphError, match=r"'middle.conv' does not compute what it does with them masked \(relative"):
        compact(model, {"first": torch.arange(8) < 5}, x)


def test_branches_of_training_must_run():
    def branch(m, x):
        return m.conv(x.view(len(x), 8, -1, *x.shape[2:]).flatten(1, 2) if m.training else x)

    model, x = Net(Lambda(branch, conv=nn.Conv2d(8, 7, 1)), 7), torch.randn(2, 3, 16, 16)
    graph, keep = trace(model, x, strict=False), {"first": torch.arange(8) < 5}
    with pytest.raises(GraphError, match=r"'middle' does not compute .* masked in training mode: RuntimeError: shape"):
        compact(model, keep, x, graph=graph)
    assert model.first.out_channels == 8 and model.training


@pytest.mark.parametrize("drop", [nn.Identity(), nn.Dropout(0.3)])
def test_branches_of_training_must_compute_the_same(drop):
    def branch(m, x):
        return m.conv(m.drop(x) * (1 + x.shape[1] / 8 if m.training else 1))

    model, x = Net(Lambda(branch, conv=nn.Conv2d(8, 7, 1), drop=drop), 7), torch.randn(2, 3, 16, 16)
    with pytest.raises(GraphError, match=r"the model does not compute .* in training mode \(relative difference"):
        compact(model, {"first": torch.arange(8) < 5}, x)
    assert model.first.out_channels == 8


def test_a_number_that_means_something_else_in_training_is_left_alone():
    class Chance(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.factor, self.out = 8, 8, nn.Conv2d(8, 7, 1)

        def forward(self, x):
            y = x.flatten(2).view(len(x), self.width, *x.shape[2:])
            return self.out(y / self.factor if self.training else y)

    model, x = Net(Chance(), 7), torch.randn(2, 3, 16, 16)
    compact(model, uneven_keep(trace(model, x)), x)
    assert model.middle.factor == 8


def test_a_width_in_a_users_code_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x * self.gain.expand(len(x), 8)[:, :, None, None]

    model, x = Net(nn.Sequential(Scale(), nn.Conv2d(8, 7, 1)), 7), torch.randn(2, 3, 16, 16)
    with pytest.raises(GraphError, match=r"'middle.0' does not compute .* expanded size .*fixed channel counts"):
        compact(model, {"first": torch.arange(8) < 5}, x, graph=trace(model, x, strict=False))


def test_what_a_forward_left_behind_is_copied():
    """A tensor with a graph, kept on a module, cannot be copied by deepcopy."""

    def remember(m, x):
        m.seen = m.conv(x)
        return m.seen

    model, x = Net(Lambda(remember, conv=nn.Conv2d(8, 7, 1)), 7), torch.randn(2, 3, 16, 16)
    graph = trace(model, x)
    model(x)
    assert not model.middle.seen.is_leaf
    compact(model, uneven_keep(graph), x, graph=graph)
    assert model.first.out_channels == 4


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_our_compiled_norms_are_understood(backend):
    if not (report := backends.report()[backend]).startswith(("ok", "interpreted")):
        pytest.skip(report)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 3, 16, 16, device=device)
    for name in ("bounded_norms", "bounded_norm_with_residual"):
        model = PATTERNS[name]().to(device)
        with backends.force("eager"):
            plain = trace(model, x)
        with backends.force(backend, "batch_norm_act"), OpNames() as ran:
            graph = trace(model, x)
        assert f"fastprune::batch_norm_act.{backend}" in ran.names
        assert graph.groups == plain.groups and graph.frozen == plain.frozen and graph.norm_after == plain.norm_after
        assert len(graph.groups) >= 2


class OpNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_training_goes_on_while_an_earlier_loss_is_alive():
    """The loss keeps each parameter's gradient accumulator alive, and that remembers the parameter's old shape."""
    model, x = PATTERNS["residual"](), torch.randn(2, 3, 16, 16)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    compact(model, uneven_keep(trace(model, x)), x)
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters()) and loss.isfinite()


def test_layers_that_take_channels_for_samples_are_no_difference():
    """A layer runs on each channel alone: the first two of its samples are other channels in the shrunk model."""

    def run(m, x):
        n, c, h, w = x.shape
        return m.conv(m.each(x.reshape(n * c, 1, h, w)).amax(1).reshape(n, c, h, w))

    model = Net(Lambda(run, each=nn.Conv2d(1, 4, 3, padding=1), conv=nn.Conv2d(8, 7, 1)), 7)
    x = torch.randn(2, 3, 16, 16)
    compact(model, {"first": torch.arange(8) % 2 == 1}, x)
    assert model.first.out_channels == 4


def test_tokens_and_masks_as_inputs():
    """Integers and bools stay what they are in the proof's float64 copies; inputs by keyword."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = nn.Embedding(20, 12), nn.Conv1d(12, 10, 3, padding=1)
            self.bn, self.second, self.fc = nn.BatchNorm1d(10), nn.Conv1d(10, 8, 3), nn.Linear(8, 3)

        def forward(self, tokens, *, live):
            x = self.embed(tokens).transpose(1, 2) * live[:, None]
            return self.fc(self.second(self.bn(self.first(x)).relu()).amax(2))

    inputs = {"tokens": torch.randint(20, (4, 9)), "live": torch.rand(4, 9) > 0.2}
    model = Tokens()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "trace: aten::embedding has no rule")
        graph = trace(model, inputs)
    keep = uneven_keep(graph)
    assert prove(model, graph, keep, inputs) < 1e-12
    compact(model, keep, inputs, graph=graph)
    assert (model.first.out_channels, model.second.in_channels, model.fc.in_features) == (5, 5, 4)
