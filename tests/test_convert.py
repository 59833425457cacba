"""convert_batchnorm: the same modules, the same function, fewer passes."""

import copy
import io
import operator
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastprune import backends, models
from fastprune.nn import (
    BatchNormAct2d,
    SigmoidBatchNorm2d,
    SyncBatchNormAct2d,
    convert_batchnorm,
    convert_sync_batchnorm,
    unfuse,
)

DYNAMO = "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"


def folds(model):
    """{"norm+relu": how often, ...}: what the rewritten forwards say of themselves."""
    count = {}
    for m in model.modules():
        for text in type(m)._plan.folds if hasattr(type(m), "_plan") else ():
            kind = "+".join(["norm", *text.split("+")[1:]])
            count[kind] = count.get(kind, 0) + 1
    return count


def randomise(model):
    """Statistics and parameters as after training: nothing at its initial value."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(torch.rand(m.weight.shape, generator=g) * 0.8 + 0.1)
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * 0.1)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)
                m.num_batches_tracked.fill_(10)
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.1)
    return model


def step(model, x, training):
    """Output, gradients and buffers of one pass."""
    model.train(training)
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_same(got, want, eps=None):
    for a, b in zip(got, want, strict=True):
        if a is None and b is None:  # no gradient
            continue
        largest = b.abs().max().item() if b.numel() else 0.0
        atol = (eps or 1e-9) * max(1.0, largest) if b.is_floating_point() else 0
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


TORCHVISION = {
    "resnet18": {"norm+relu": 9, "norm+add+relu": 8},
    "resnet50": {"norm+relu": 33, "norm+add+relu": 16},
    "vgg11_bn": {"norm+relu": 8},
    "densenet121": {"norm+relu": 121},
    "mobilenet_v2": {"norm+add": 10},  # ReLU6 stays
    "regnet_y_400mf": {"norm+relu": 33, "norm+add+relu": 16},  # norm and add in different modules
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_compute_the_same(name):
    torch.manual_seed(0)
    if name == "vgg11_bn":
        with torch.device("meta"):  # the 120 million weights of its classifier say nothing here
            model = torchvision.models.vgg11_bn()
        model.classifier, model.avgpool = nn.Sequential(nn.Linear(512, 10)), nn.AdaptiveAvgPool2d(1)
        model.to_empty(device="cpu").apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    else:
        model = torchvision.models.get_model(name, num_classes=10)
    randomise(model)
    names, keys = [n for n, _ in model.named_modules()], list(model.state_dict())
    ours = copy.deepcopy(model)
    parameters, types = list(ours.parameters()), [type(m) for m in ours.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert_batchnorm(ours) is ours
    assert folds(ours) == TORCHVISION[name]
    assert [n for n, _ in ours.named_modules()] == names and list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert all(isinstance(m, t) for m, t in zip(ours.modules(), types, strict=True))
    x = torch.randn(2, 3, 33, 33)
    with backends.force("eager"):  # the rewriting itself, exactly
        for training in (True, False):
            assert_same(step(ours, x, training), step(model, x, training))


@pytest.mark.parametrize("bound", [None, "sigmoid"])
@pytest.mark.parametrize("name", ["resnet20", "vgg-small", "resnet56-rni"])
def test_our_models_on_the_best_backend(name, bound):
    torch.manual_seed(0)
    model = randomise(models.create(name, in_channels=3, bound=bound)).double()
    x = torch.randn(4, 3, 16, 16)
    with backends.force("eager"):
        ours = convert_batchnorm(copy.deepcopy(model))
        for training in (True, False):
            assert_same(step(ours, x.double(), training), step(model, x.double(), training), 1e-9)
    expected = {"resnet20": (10, 9), "vgg-small": (6, 0), "resnet56-rni": (27, 27)}[name]
    assert (folds(ours).get("norm+relu", 0), folds(ours).get("norm+add+relu", 0)) == expected
    plain = copy.deepcopy(model).float()
    ours.float()
    for training in (True, False):  # in float32, whatever the backend: at most twice the error of the plain model
        exact, want, got = step(model, x.double(), training), step(plain, x, training), step(ours, x, training)
        for g, w, e in zip(got, want, exact, strict=True):
            scale = max(e.double().norm().item(), 1e-3)
            assert (g.double() - e).norm() <= 2 * (w.double() - e).norm() + 1e-6 * scale


class Block(nn.Module):
    """A residual block whose last lines are given: ``end(self, out, identity)`` after the second norm."""

    def __init__(self, end=None, inplace=True, downsample=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if downsample else None
        self.relu = nn.ReLU(inplace)
        self.end = end or (lambda self, out, identity: self.relu(out + identity))

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        return self.end(self, out, identity)


def iadd_method(self, out, identity):
    out += identity
    return self.relu(out)


ENDS = {
    "out + identity": (lambda s, o, i: s.relu(o + i), "norm+add+relu"),
    "identity + out": (lambda s, o, i: s.relu(i + o), "norm+add+relu"),
    "out += identity": (iadd_method, "norm+add+relu"),
    "add_": (lambda s, o, i: F.relu(o.add_(i), inplace=True), "norm+add+relu"),
    "torch.add": (lambda s, o, i: torch.relu(torch.add(o, i)), "norm+add+relu"),
    "relu_": (lambda s, o, i: (o + i).relu_(), "norm+add+relu"),
    "no relu": (lambda s, o, i: o + i, "norm+add"),
    "no add": (lambda s, o, i: o.relu(), "norm+relu"),
    "torch.relu_": (lambda s, o, i: torch.relu_(o), "norm+relu"),
    # and what must stay as it is
    "alpha": (lambda s, o, i: torch.add(o, i, alpha=2).relu(), None),
    "out + out": (lambda s, o, i: s.relu(o + o), None),
    "norm used twice": (lambda s, o, i: s.relu(o + i) * o.sigmoid(), None),
    "sum used twice": (lambda s, o, i: (lambda t: t.relu() * t.sigmoid())(o + i), "norm+add"),
    "scalar": (lambda s, o, i: (o + 1).relu(), None),
    "relu result dropped": (lambda s, o, i: (s.relu(o), o)[1], None),
    "input changed in place": (lambda s, o, i: s.relu(operator.iadd(i.mul(2) if s.downsample else i * 1, o)), None),
}


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_every_spelling_of_the_end_of_a_block(name, inplace, downsample):
    end, fold = ENDS[name]
    torch.manual_seed(0)
    model = randomise(Block(end, inplace, downsample)).double()
    ours = convert_batchnorm(copy.deepcopy(model))
    expected = {"norm+relu": 1}
    if fold:
        expected[fold] = expected.get(fold, 0) + 1
    if name == "norm used twice" and downsample:  # then the downsampling norm takes the add
        expected["norm+add+relu"] = 1
    assert folds(ours) == expected
    if fold and fold.startswith("norm+add"):
        assert "bn2+add" in ours.extra_repr()  # the main path, not the shortcut
    for training in (True, False):
        x = torch.randn(2, 4, 6, 6).double()
        assert_same(step(ours, x, training), step(model, x, training))


def test_writing_into_the_blocks_input_stays_visible():
    def end(self, out, identity):
        identity += out
        return self.relu(identity)

    model = randomise(Block(end, inplace=False)).eval()
    ours = convert_batchnorm(copy.deepcopy(model))
    assert "bn2" not in ours.extra_repr()
    with torch.no_grad():
        a, b = (torch.ones(1, 4, 3, 3) for _ in range(2))
        model(a), ours(b)
    torch.testing.assert_close(a, b)
    assert not torch.equal(b, torch.ones_like(b))


def test_a_norm_does_not_move_behind_a_write_into_its_input():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.conv(x)
            out = self.bn(x)
            return F.relu(out + x.mul_(3))

    model = randomise(Own()).eval()
    ours, x = convert_batchnorm(copy.deepcopy(model)), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))


def test_residual_that_broadcasts_or_promotes():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.shift = nn.BatchNorm2d(4), nn.Parameter(torch.randn(1, 4, 1, 1, dtype=torch.float64))

        def forward(self, x):
            return F.relu(self.bn(x) + self.shift)

    model = Gate()
    ours, x = convert_batchnorm(copy.deepcopy(model)), torch.randn(2, 4, 3, 3)
    assert folds(ours) == {"norm+add+relu": 1}
    with backends.force("eager"):  # the same arithmetic on both sides: what is tested is the conversion
        got, want = step(ours, x, True), step(model, x, True)
    assert got[0].dtype == want[0].dtype == torch.float64
    assert_same(got, want, 1e-6)


def test_module_lists_loops_and_shared_relus():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
            self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
            self.act = nn.ReLU()

        def forward(self, x):
            for conv, bn in zip(self.convs, self.bns, strict=True):
                x = self.act(bn(conv(x)))
            return x

    model = Loop()
    ours, x = convert_batchnorm(copy.deepcopy(model)), torch.randn(2, 3, 4, 4)
    assert folds(ours) == {"norm+relu": 3}
    assert_same(step(ours, x, True), step(model, x, True), 1e-5)
    for m in (model, ours):  # the loop has become shorter: the trace is out of date, the original forward runs
        del m.bns[2], m.convs[2]
    assert_same(step(ours, x, True), step(model, x, True), 1e-5)


# --- forwards that must not be frozen ----------------------------------------------------------------------------


def forward_of(body, **members):
    """A module with conv, bn and the given members whose forward is ``body(self, x)``."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            for name, value in members.items():
                setattr(self, name, value)

        def forward(self, x):
            return body(self, x)

    return Own()


def counting(self, x):
    self.calls += 1
    return F.relu(self.bn(x))


def keeping(self, x):
    self.last = self.bn(x)
    return F.relu(self.last)


def no_grad_inside(self, x):
    with torch.no_grad():
        x = self.conv(x)
    return F.relu(self.bn(x))


def autocast_inside(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        x = self.conv(x)
    return F.relu(self.bn(x))


UNTRACEABLE = {
    "mode": (lambda s, x: F.relu(s.bn(x)) if s.training else s.bn(x), "control flow"),
    "mode of a child": (lambda s, x: F.relu(s.bn(x)) if s.conv.training else s.bn(x), "control flow"),
    "value": (lambda s, x: F.relu(s.bn(x)) if x.sum() > 0 else s.bn(x), "control flow"),
    "random": (lambda s, x: F.relu(s.bn(x)) if torch.rand(1) < 0.5 else s.bn(x), "draws random numbers"),
    "python's random": (lambda s, x: F.relu(s.bn(x)) * random.random(), "draws random numbers"),
    "numpy's random": (lambda s, x: F.relu(s.bn(x)) * np.random.rand(), "draws random numbers"),
    "counter": (counting, "changes the module's own attributes"),
    "kept activation": (keeping, "changes the module's own attributes"),
    "no_grad": (no_grad_inside, "switches grad mode"),
    "autocast": (autocast_inside, "switches grad mode, inference mode or autocast"),
    "checkpoint": (lambda s, x: checkpoint(lambda t: F.relu(s.bn(t)), x, use_reentrant=False), "checkpoint"),
    "type of a value": (
        lambda s, x: F.relu(s.bn(x)) if isinstance(s.conv(x), torch.Tensor) else x,
        "asks for the type",
    ),
    "error": (lambda s, x: F.relu(s.bn(x)) + len(x), "'len' is not supported"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_cannot_be_traced_is_left_alone_and_named(name):
    body, reason = UNTRACEABLE[name]
    model = nn.Sequential(forward_of(body, calls=0, last=None), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    before, rng = dict(vars(model[0])), torch.get_rng_state()
    with pytest.warns(UserWarning, match=rf"^convert_batchnorm: not fused.*0 \(Own: .*{reason}") as caught:
        convert_batchnorm(model)
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and caught[0].filename == __file__
    assert type(model[0]).__name__ == "Own" and folds(model) == {"norm+relu": 1}  # its neighbour is none the worse
    assert type(model[0].bn) is BatchNormAct2d
    assert vars(model[0]).keys() == before.keys() and all(vars(model[0])[k] is v for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_training_as_a_value_stays_live():
    model = forward_of(lambda s, x: F.dropout(F.relu(s.bn(x)), 0.5, s.training))
    ours, x = convert_batchnorm(copy.deepcopy(model)), torch.randn(2, 3, 4, 4)
    assert folds(ours) == {"norm+relu": 1}
    for training in (True, False):
        model.conv, ours.conv = nn.Identity(), nn.Identity()
        assert_same(step(ours, x, training), step(model, x, training), 1e-5)
    assert (ours.train()(x) == 0).float().mean() > 0.6 > (ours.eval()(x) == 0).float().mean()


def test_arguments_with_defaults_and_isinstance():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x, skip=None, double=False):
            if isinstance(x, torch.Tensor):
                x = [x]
            x = self.bn(torch.cat(x, 1))
            if skip is not None:
                x = x + skip
            return F.relu(x) * 2 if double else F.relu(x)

    model = Own()
    ours, x, s = convert_batchnorm(copy.deepcopy(model)), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert folds(ours) == {"norm+relu": 1}
    for args, kwargs in (
        ((x,), {}),
        ((list(x.split(2, 1)),), {}),
        ((x, s), {}),
        ((x,), {"double": True}),
        ((), {"x": x}),
    ):
        torch.testing.assert_close(ours(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize(
    "change",
    ["attribute", "attribute of a child", "relu", "relu in _modules", "append", "insert", "hook", "relu hook", "act"],
)
def test_later_changes_to_the_model_take_effect(change):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    if change == "attribute":
        model = forward_of(lambda s, x: F.relu(s.bn(x)) * s.factor, factor=2.0)
    elif change == "attribute of a child":
        model = forward_of(lambda s, x: F.relu(s.bn(x)) * s.conv.stride[0])
    ours, seen, x = convert_batchnorm(copy.deepcopy(model)), {}, torch.randn(2, 3, 4, 4)
    assert folds(ours) == {"norm+relu": 1}
    for m in (model, ours):

        def look(module, args, output, m=m):
            seen[m] = output.detach().clone()

        if change == "attribute":
            m.factor = 3.0
        elif change == "attribute of a child":
            m.conv.stride = (2, 2)
        elif change == "relu":
            m[2] = nn.Tanh()
        elif change == "relu in _modules":
            m._modules["2"] = nn.Tanh()
        elif change == "append":
            m.append(nn.Tanh())
        elif change == "insert":
            m.insert(1, nn.Tanh())
        elif change == "hook":
            m[1].register_forward_hook(look)
        elif change == "relu hook":
            m[2].register_forward_hook(look)
        elif change == "act":
            m[1].act = "relu"
    assert_same(step(ours, x, True)[:2], step(model, x, True)[:2], 1e-5)
    if seen:
        torch.testing.assert_close(seen[ours], seen[model])


def test_other_callers_of_a_norm_get_a_plain_norm():
    ours = convert_batchnorm(Block())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(ours.bn2(x), nn.BatchNorm2d(4)(x))


# --- what users do with a converted model ------------------------------------------------------------------------


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file])
@pytest.mark.parametrize("name", ["resnet20", "torchvision resnet18", "densenet"])
def test_copies_stay_fused_and_independent(name, copied):
    if name == "densenet":
        model = torchvision.models.DenseNet(8, (2, 2), 8, num_classes=3)
    elif name == "resnet20":
        model = models.create(name)
    else:
        model = torchvision.models.resnet18(num_classes=3)
    ours = convert_batchnorm(model)
    twin, x = copied(ours), torch.randn(2, 3, 32, 32)
    assert folds(twin) == folds(ours) != {} and type(twin) is type(ours)
    assert_same(step(twin, x, True), step(ours, x, True))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert ours(x).abs().sum() > 0 and twin(x).abs().sum() == 0


def test_unfuse_restores_the_classes():
    model = torchvision.models.resnet18(num_classes=3)
    types = [type(m) for m in model.modules() if not isinstance(m, nn.BatchNorm2d)]
    ours = unfuse(convert_batchnorm(model))
    assert [type(m) for m in ours.modules() if not isinstance(m, nn.BatchNorm2d)] == types and folds(ours) == {}
    assert folds(convert_batchnorm(convert_batchnorm(ours))) == TORCHVISION["resnet18"]  # twice is once


def test_repr_says_what_is_fused():
    text = repr(convert_batchnorm(Block()))
    assert text.startswith("Block(\n  fused: bn1+relu, bn2+add+relu\n  (conv1)")


@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph_of_a_model(training):
    torch.compiler.reset()
    model = convert_batchnorm(nn.Sequential(Block(downsample=True), Block(iadd_method), nn.Conv2d(4, 4, 1)))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 5)
    assert_same(step(compiled, x, training), step(model, x, training), 1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings(DYNAMO)
def test_export_of_a_model(strict):
    model = convert_batchnorm(nn.Sequential(Block(downsample=True), Block(iadd_method))).eval()
    x = torch.randn(2, 4, 5, 5)
    exported = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_autocast_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(downsample=True), Block())
    ours, x = convert_batchnorm(copy.deepcopy(model)), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), model(x)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=0.1)
    a.float().sum().backward()
    assert ours[1].bn1.weight.grad.dtype == torch.float32


def test_channels_last_stays():
    ours = convert_batchnorm(Block()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


# --- swapping ----------------------------------------------------------------------------------------------------


def test_swap_keeps_modules_parameters_hooks_and_modes():
    shared = nn.BatchNorm2d(3, eps=1e-3, momentum=None)
    model = nn.Sequential(shared, nn.Conv2d(3, 3, 1), shared, nn.BatchNorm2d(3, affine=False).double())
    shared.weight.requires_grad_(False)
    shared.eval()
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weight = shared.weight
    convert_batchnorm(model)
    assert model[0] is model[2] is shared and type(shared) is BatchNormAct2d
    assert shared.weight is weight is optimizer.param_groups[0]["params"][0] and not weight.requires_grad
    assert (shared.eps, shared.momentum, shared.training) == (1e-3, None, False)
    assert model[3].training and model[3].running_mean.dtype == torch.float64
    model[:3](torch.randn(2, 3, 4, 4))
    assert calls == [1, 1]


def test_a_norm_alone_and_models_without_norms():
    norm = nn.BatchNorm2d(3)
    assert convert_batchnorm(norm) is norm and type(norm) is BatchNormAct2d
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm1d(3))
    assert [type(m) for m in convert_batchnorm(model)] == [nn.Conv2d, nn.BatchNorm1d]


def test_which_subclasses_are_swapped():
    class Defaults(nn.BatchNorm2d):
        def __init__(self, n):
            super().__init__(n, eps=1e-3)

    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    parametrized = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3).requires_grad_(), dim=None)
    model = nn.Sequential(Defaults(3), Odd(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), parametrized)
    with pytest.warns(UserWarning, match=r"left alone.*: 1 \(Odd\), 2 \(SyncBatchNorm\), 3 \(Lazy.*\), 4 \(Param"):
        convert_batchnorm(model)
    assert type(model[0]) is BatchNormAct2d and type(model[1]) is Odd and model[0].eps == 1e-3


def test_a_users_own_subclass_of_ours_keeps_its_forward():
    class Own(BatchNormAct2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Own(3), nn.ReLU())
    x, want = torch.randn(2, 3, 4, 4), copy.deepcopy(model)
    torch.testing.assert_close(convert_batchnorm(model)(x), want(x))
    with pytest.warns(UserWarning, match=r"left alone.* 0 \(Own\)"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is Own


def test_bad_bound():
    with pytest.raises(ValueError, match="bound must be 'sigmoid' or None, got 'tanh'"):
        convert_batchnorm(nn.BatchNorm2d(3), bound="tanh")


def test_sync_after_fusing_keeps_the_fusing():
    model = convert_batchnorm(models.create("resnet20", bound="sigmoid"))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 16, 16)
    convert_sync_batchnorm(twin)
    assert {type(m) for m in twin.modules() if isinstance(m, nn.BatchNorm2d)} == {SyncBatchNormAct2d}
    assert_same(step(twin, x, True), step(model, x, True))
    norm = twin.layer1[0].bn1
    del norm.act  # as the class has it
    assert type(twin.layer1[0])._plan.folds and norm.bound == "sigmoid"


# --- bound="sigmoid" ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "densenet", "vgg"])
def test_bounding_keeps_the_function_of_a_trained_model(name, fuse):
    torch.manual_seed(0)
    model = {
        "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
        "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10),
        "vgg": lambda: models.create("vgg-small", in_channels=3),
    }[name]()
    randomise(model).double()
    ours, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all scales in (0, 1): nothing to say
        convert_batchnorm(ours, bound="sigmoid", fuse=fuse)
    assert all(type(m) is SigmoidBatchNorm2d for m in ours.modules() if isinstance(m, nn.BatchNorm2d))
    for training in (True, False):
        assert_same(step(ours, x, training)[:2], step(model, x, training)[:2])
    assert bool(folds(ours)) == fuse


def test_bias_is_kept_unless_it_is_zero_throughout():
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    bias = model[0].bias
    nn.init.zeros_(model[1].bias)
    convert_batchnorm(model, bound="sigmoid")
    assert model[0].bias is bias and model[1].bias is None
    assert "1.bias" not in model.state_dict()


def test_scales_out_of_reach_are_moved_where_that_is_exact():
    torch.manual_seed(0)
    model = models.create("vgg-small", in_channels=3)
    randomise(model).double()
    with torch.no_grad():
        for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            m.weight[0], m.weight[1], m.weight[2], m.weight[3] = -0.5, 1.0, 1.7 + i, -40.0
    ours, x = copy.deepcopy(model), torch.randn(2, 3, 16, 16).double()
    with pytest.warns(UserWarning) as caught:
        convert_batchnorm(ours, bound="sigmoid")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "features.1 (2 of 32 negative: sign moved into features.0); features.1 (3 of 32 >= 1:" in text
    assert "features.3" in text and "clamped" not in text
    for training in (True, False):
        assert_same(step(ours, x, training)[:2], step(model, x, training)[:2])


def test_large_scales_move_into_depthwise_convolutions_and_across_modules():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 5))
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)),
        nn.MaxPool2d(2),
        head,
    )
    randomise(model).double()
    with torch.no_grad():
        model[0][1].weight.copy_(torch.tensor([1.0, 0.3, 5.0, 100.0]))
        model[2][1].weight.copy_(torch.tensor([0.2, 8.0, 1.5, 2.0]))
    ours, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6).double()
    with pytest.warns(UserWarning, match=r"0\.1 .*moved into 1\); 2\.1 .*moved into 4\.1\)$"):
        convert_batchnorm(ours, bound="sigmoid")
    for training in (True, False):
        assert_same(step(ours, x, training)[:2], step(model, x, training)[:2])


def test_scales_that_cannot_be_moved_are_clamped_and_named():
    model = randomise(Block()).double()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([0.0, 0.5, 0.5, 0.5]))
        model.bn2.weight.copy_(torch.tensor([3.0, 0.5, 1.0, 0.25]))
    ours = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"bn1 \(1 of 4 clamped.*; bn2 \(2 of 4 clamped to \[1e-06, 0.999\]: the func"):
        convert_batchnorm(ours, bound="sigmoid")
    torch.testing.assert_close(ours.bn1.scale.tolist(), [1e-6, 0.5, 0.5, 0.5])
    torch.testing.assert_close(ours.bn2.scale.tolist(), [0.999, 0.5, 0.999, 0.25])
    assert torch.equal(ours.conv2.weight, model.conv2.weight)


def test_shared_layers_are_not_rescaled():
    conv = nn.Conv2d(3, 3, 1)
    model = randomise(nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3)))
    tied = nn.Conv2d(3, 3, 1)
    other = nn.Conv2d(3, 3, 1)
    tied.weight = other.weight
    second = randomise(nn.Sequential(tied, nn.BatchNorm2d(3), nn.ReLU(), other))
    for m in (model[1], second[1]):
        nn.init.constant_(m.weight, 2.0)
        with torch.no_grad():
            m.weight[0] = -0.5
    weights = conv.weight.clone(), other.weight.clone()
    with pytest.warns(UserWarning, match=r"0\.1 \(3 of 3 clamped.*1\.1 \(3 of 3 clamped"):
        convert_batchnorm(nn.Sequential(model, second), bound="sigmoid")
    assert torch.equal(conv.weight, weights[0]) and torch.equal(other.weight, weights[1])


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_a_fresh_model_starts_as_the_authors_did(scale):
    model = nn.Sequential(nn.Conv2d(3, 500, 1), nn.BatchNorm2d(500))
    nn.init.constant_(model[1].weight, scale)
    weight = model[1].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_batchnorm(model, bound="sigmoid")
    assert model[1].weight is weight and model[1].bias is None
    assert abs(weight.mean().item()) < 0.2 and 0.8 < weight.std().item() < 1.2


def test_a_bounded_norm_stays_and_one_without_weight_is_named():
    model = nn.Sequential(SigmoidBatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    weight = model[0].weight.clone()
    with pytest.warns(UserWarning, match=r"1 stays unbounded \(affine=False\)$"):
        convert_batchnorm(model, bound="sigmoid")
    convert_batchnorm(model)
    assert torch.equal(model[0].weight, weight) and model[0].bound == "sigmoid" and model[1].bound is None
