"""TPP and the orthogonality baselines."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune import models
from fastprune.select import pick

GOLDEN = np.load(Path(__file__).parent / "golden" / "tpp.npz")
SCHEMES = ["v1", "v2", "v3", "v4", "v5", "v5_2", "v6"]
QUICK = {"update_interval": 2, "stabilize": 12, "reg_step": 0.25, "zero_out_interval": 2}


def golden(key):
    return torch.from_numpy(GOLDEN[f"tpp/{key}"])


class Net(nn.Module):
    """A convolution without a norm, one with, and linear layers with biases; 16 input channels at the end of one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 5, 3, stride=2, padding=1, bias=False)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = self.c(self.bn(self.b(self.a(x).relu())).relu())
        return self.fc(x.mean((2, 3)))


X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return Net().double()


def weights(model):
    return {name: model.get_submodule(name).weight for name in ("a", "b", "c", "fc")}


def gradients(model, penalty):
    model.zero_grad()
    value = penalty()
    (value + 0 * model.fc.bias.sum() if hasattr(model, "fc") else value).backward()  # some have no term yet
    return value.detach().double(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rows(w):
    return w.flatten(1) @ w.flatten(1).t()


def kept_identity(keep):
    return torch.diag(keep.double())


def definition(scheme, model, keep, level, start):
    """The penalties as they are written down, in plain autograd; weight 7 and kept_weight 0.3."""
    total = torch.zeros((), dtype=torch.float64)
    for name, w in weights(model).items():
        n, mask = w.shape[0], keep.get(name)
        if scheme in ("v1", "v2"):
            if scheme == "v1" and w[0, 0].numel() > 1:
                out = F.conv2d(w, w, stride=2, padding=1)
                target = torch.zeros_like(out)
                target[:, :, out.shape[2] // 2, out.shape[3] // 2] = torch.eye(n)
                total = total + 7 * (out - target).norm()
            else:
                a = w.flatten(1).t() if n < w.shape[1] else w.flatten(1)
                total = total + 7 * (a @ a.t() - torch.eye(len(a))).square().mean()
            continue
        if mask is None or mask.all():
            continue
        g, both = rows(w), mask[:, None] & mask
        if scheme == "v5":
            total = total + 7 * level * (g - torch.where(both, g.detach(), 0)).square().mean()
            continue
        distance = (g - kept_identity(mask)).square()
        if scheme == "v6":
            total = total + (distance * (0.3 * both.double() + 7 * level * (~both).double())).mean()
        else:
            total = total + 7 * (level if scheme == "v5_2" else 1) * distance.mean()
        if scheme == "v4":
            a, b = w.flatten(1), start[name].flatten(1)
            total = total + 7 * (a.t() @ a - b.t() @ b).square().mean()
    return total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_is_its_definition(scheme):
    model = net()
    method = fp.create("tpp", model, X, ratio=0.5, scheme=scheme, weight=7.0, kept_weight=0.3, **QUICK)
    start = {name: w.detach().clone() for name, w in weights(model).items()}
    keep = {"a": method.keep_masks()["a"], "b": method.keep_masks()["b"], "c": method.keep_masks()["c"]}
    for step, level in ((0, 0.0), (2, 0.25), (3, 0.25), (4, 0.5)):
        method.steps = step
        with torch.no_grad():
            for w in weights(model).values():
                w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(step), dtype=w.dtype), alpha=0.1)
        value, grads = gradients(model, method.penalty)
        expected, exact = gradients(model, lambda level=level: definition(scheme, model, keep, level, start))
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
        for name in exact:
            torch.testing.assert_close(
                grads.get(name, torch.zeros_like(exact[name])), exact[name], rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize("layer", ["conv", "fc"])
@pytest.mark.parametrize("scheme", ["v5", "v5_2"])
def test_penalty_and_gradient_are_the_authors(layer, scheme):
    w = golden(f"{layer}/w")
    first = nn.Conv2d(4, 6, 3, bias=False) if layer == "conv" else nn.Linear(7, 5, bias=False)
    after = [nn.Flatten(), nn.Linear(6 * 4, 2)] if layer == "conv" else [nn.Linear(5, 2)]
    model = nn.Sequential(first, *after).double()
    first.weight.data.copy_(w)
    x = torch.randn(2, 4, 4, 4).double() if layer == "conv" else torch.randn(2, 7).double()
    keep = torch.ones(len(w), dtype=torch.bool)
    keep[golden(f"{layer}/pruned")] = False
    method = fp.create(
        "tpp",
        model,
        x,
        scheme=scheme,
        weight=1.0,
        inherit={"0": keep},
        inherit_what="index",
        **QUICK | {"reg_step": 1.0},
    )
    method.steps = 2  # the coefficient is 1
    value, grads = gradients(model, method.penalty)
    np.testing.assert_allclose(value, GOLDEN[f"tpp/{layer}/{scheme}/loss"], rtol=1e-12)
    np.testing.assert_allclose(grads["0.weight"], GOLDEN[f"tpp/{layer}/{scheme}/grad"], rtol=1e-11, atol=1e-14)


def test_weights_biases_and_the_norm_behind_get_the_coefficient():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 3, 8, 8).double()
    params = {
        "0.weight": model[0].weight,
        "0.bias": model[0].bias,
        "1.weight": model[1].weight,
        "1.bias": model[1].bias,
    }
    for name, p in params.items():
        p.data.copy_(golden(f"apply_reg/param/{name}"))
        p.grad = golden(f"apply_reg/grad_in/{name}").clone()
    reg = golden("apply_reg/reg")[:, 0]
    options = QUICK | {"reg_step": float(reg.max()), "reg_limit": 10.0}
    method = fp.create("tpp", model, x, inherit={"0": reg == 0}, inherit_what="index", weight=0.0, **options)
    method.steps = 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model[3].weight.grad, model[3].bias.grad = torch.zeros_like(model[3].weight), torch.zeros_like(model[3].bias)
    method.step(optimizer)
    for name, p in params.items():
        np.testing.assert_allclose(p.grad, GOLDEN[f"tpp/apply_reg/grad_out/{name}"], rtol=1e-12)
    only_norm = fp.create("tpp", model, x, inherit={"0": reg == 0}, inherit_what="index", weight_reg=False, **QUICK)
    only_weight = fp.create("tpp", model, x, inherit={"0": reg == 0}, inherit_what="index", bn_reg=False, **QUICK)
    for method in (only_norm, only_weight):
        method.step(optimizer)
    assert set(only_norm.reg) == {model[1].weight, model[1].bias}
    assert set(only_weight.reg) == {model[0].weight, model[0].bias}


def test_scores_are_the_authors():
    w = golden("score/w")
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
    model[0].weight.data.copy_(w)
    scores = fp.create("tpp", model, torch.randn(2, 3, 4, 4).double(), **QUICK).scores()
    np.testing.assert_allclose(scores["0"], GOLDEN["tpp/score/filter"], rtol=1e-14)


def test_the_coefficient_grows_by_step_and_ends_at_the_limit():
    model = net()
    method = fp.create("tpp", model, X, weight=0.0, stabilize=20, zero_out_interval=0, reg_step=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    levels = []
    while method.phase == "grow":
        method.step(optimizer)
        levels.append(float(method.growth.level[0]))
    assert method.stable_since == 1000 and levels[:10] == [0.0] * 10 and levels[10] == 0.01 and levels[999] == 0.99
    while not method.finished:
        method.step(optimizer)
    assert method.steps == 1000 + 20 + 1


def test_layers_are_zeroed_one_after_the_other():
    model = net()
    method = fp.create("tpp", model, X, ratio=0.5, **QUICK | {"stabilize": 10})
    optimizer = fp.optim.GrowingSGD(model.parameters(), lr=1e-3, momentum=0.9)
    keep, first = method.keep_masks(), {}
    while not method.finished:
        loss = model(X).square().mean() + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        method.step(optimizer)
        for name in keep:
            if name not in first and not model.get_submodule(name).weight[~keep[name]].any():
                first[name] = method.steps - 1 - method.stable_since
                if name == "b":
                    assert not model.bn.weight[~keep[name]].any() and not model.bn.bias[~keep[name]].any()
            elif name in first:
                assert not model.get_submodule(name).weight[~keep[name]].any(), "stays zero"
    assert first == {"a": 2, "b": 4, "c": 6}
    small = fp.compact(model, keep, X, optimizer=optimizer)
    assert [small.a.out_channels, small.b.out_channels, small.c.out_channels] == [3, 8, 2]


def test_the_count_rule_is_tpps():
    model = models.create("resnet20")
    keep = fp.create("tpp", model, torch.randn(2, 3, 32, 32), ratio="*layer3*.conv1:0.99").keep_masks()
    assert {int(keep[f"layer3.{i}.conv1"].sum()) for i in range(3)} == {1}  # min(ceil(63.36), int(63.68)) = 63 go
    assert int(pick(torch.arange(64.0), 0.99, limit="tpp").sum()) == 1


def test_a_linear_network_trains_to_a_smaller_one():
    torch.manual_seed(0)
    model = models.create("mlp-7-linear", in_features=16, hidden=8, num_classes=3)
    x, y = torch.randn(32, 16), torch.arange(32) % 3
    method = fp.create("tpp", model, x, ratio=0.5, **QUICK | {"stabilize": 20})
    optimizer = fp.optim.GrowingSGD(model.parameters(), lr=1e-3, momentum=0.9)
    while not method.finished:
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + method.penalty()).backward()
        method.step(optimizer)
    expected = model(x)
    torch.testing.assert_close(fp.compact(model, method.keep_masks(), x)(x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["orth-kernel", "orth-conv"])
def test_orthogonality_baselines_are_their_definitions(name):
    model = net()
    method = fp.create(name, model, X, weight=0.5)
    strides = {"a": 1, "b": 1, "c": 2, "fc": 1}

    def definition():
        total = torch.zeros((), dtype=torch.float64)
        for layer, w in weights(model).items():
            if name == "orth-kernel":
                total = total + (rows(w) - torch.eye(len(w))).square().mean()
                continue
            w4, s = w if w.dim() == 4 else w[:, :, None, None], strides[layer]
            out = F.conv2d(w4, w4, stride=s, padding=(w4.shape[-1] - 1) // s * s)
            target = torch.zeros_like(out)
            target[:, :, out.shape[2] // 2, out.shape[3] // 2] = torch.eye(len(w))
            total = total + (out - target).norm()
        return 0.5 * total

    value, grads = gradients(model, method.penalty)
    expected, exact = gradients(model, definition)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    for key in exact:
        torch.testing.assert_close(grads[key], exact[key], rtol=1e-10, atol=1e-12)


# --- odd networks ---------------------------------------------------------------------------------------------------


def test_weights_at_the_start_follow_memory_format_and_resumption():
    model = net()
    method = fp.create("tpp", model, X, scheme="v4", ratio=0.2, scope="global", **QUICK)
    start = {name: w.detach().clone() for name, w in weights(model).items()}
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.mul_(1.25 + i / 8)
    method.steps = 2
    expected, gradient = gradients(model, method.penalty)
    model.to(memory_format=torch.channels_last)
    other = Net().double()  # other weights, and so another choice, until the state is loaded
    resumed = fp.create("tpp", other, X, scheme="v4", ratio=0.2, scope="global", **QUICK)
    assert any((resumed.keep_masks()[name] != keep).any() for name, keep in method.keep_masks().items())
    resumed.load_state_dict(method.state_dict())
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(resumed._start[w], start[name]) for name, w in weights(other).items() if w in resumed._start)
    for m, by in ((model, method), (other, resumed)):
        value, grads = gradients(m, by.penalty)
        torch.testing.assert_close(value, expected)
        for name in gradient:
            torch.testing.assert_close(grads[name], gradient[name])


@pytest.mark.parametrize("name, scheme", [("tpp", s) for s in SCHEMES] + [("orth-kernel", ""), ("orth-conv", "")])
def test_what_is_frozen_at_a_step_has_no_part_in_it(name, scheme):
    model = net()
    method = fp.create(name, model, X, **(QUICK | {"scheme": scheme} if scheme else {}))
    method.steps = 2
    expected, gradient = gradients(model, method.penalty)
    model.a.weight.requires_grad_(False)
    value, grads = gradients(model, method.penalty)
    assert value < expected and "a.weight" not in grads and torch.equal(grads["b.weight"], gradient["b.weight"])
    model.a.weight.requires_grad_(True)
    value, grads = gradients(model, method.penalty)
    assert value == expected and torch.equal(grads["a.weight"], gradient["a.weight"])
    for layer in weights(model).values():
        layer.requires_grad_(False)
    assert method.penalty() == 0


def test_layers_of_other_kinds_are_zeroed_in_their_turn():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3, 3, 3, dtype=torch.float64))

        def forward(self, x):
            return F.conv2d(x, self.weight, padding=1)

    model = net()
    model.a = Own()
    method = fp.create("tpp", model, X, **QUICK)
    optimizer, keep = torch.optim.SGD(model.parameters(), 1e-4), method.keep_masks()
    while method.steps <= method.stable_since + 2 or method.phase == "grow":
        (model(X).square().mean() + method.penalty()).backward()
        method.step(optimizer)
    assert not model.a.weight[~keep["a"]].any() and model.b.weight[~keep["b"]].all()


def test_columns_of_a_transposed_convolution_are_no_rows_of_a_gram_matrix():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.t = nn.Conv2d(3, 6, 3, padding=1), nn.ConvTranspose2d(6, 6, 3, padding=1)
            self.fc = nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x)
            return self.fc((x + self.t(x.relu())).relu().mean((2, 3)))

    model = Residual().double()
    method = fp.create("tpp", model, X, coupled=True, **QUICK)
    assert method.groups["a"].convs == ("a", "t")
    method.steps = 2
    _, grads = gradients(model, method.penalty)
    assert grads["a.weight"].any() and "t.weight" not in grads
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = model.t.weight.detach().clone()
    method.step(torch.optim.SGD(model.parameters(), lr=1.0))
    gone = ~method.keep_masks()["a"]
    torch.testing.assert_close(model.t.weight[:, gone], before[:, gone] * 0.75)
    assert torch.equal(model.t.weight[:, ~gone], before[:, ~gone])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="tpp: expected group='filter', got 'weight'"):
        fp.create("tpp", net(), X, group="weight")
    with pytest.raises(ValueError, match="tpp: unknown scheme 'v7'"):
        fp.create("tpp", net(), X, scheme="v7")
    with pytest.raises(ValueError, match="zeroing 4 layers every 100 steps takes longer than stabilize=399"):
        fp.create("tpp", net(), X, stabilize=399)
    bounded = nn.Sequential(nn.Conv2d(3, 4, 3), fp.nn.SigmoidBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    with pytest.raises(ValueError, match=r"tpp: 1 bounds its scale by a sigmoid.*or bn_reg=False"):
        fp.create("tpp", bounded, X)
    line = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)).double()
    for name, options in (("tpp", {"scheme": "v1"}), ("orth-conv", {})):
        with pytest.raises(ValueError, match=rf"{name}: conv\(W, W\) is for 2-D .*; 0 has \(4, 3, 3\)"):
            fp.create(name, line, X[:, :, 0], **options)
