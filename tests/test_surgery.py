"""What hangs on a model's parameters when they get smaller: optimizers, averages, schedulers, gradients, memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from graph_cases import PATTERNS, Lambda, Net, conv_bn, stir, uneven_keep
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import lr_scheduler, swa_utils

from fastprune import surgery
from fastprune.compact import compact
from fastprune.graph import ChannelGraph, trace
from fastprune.optim import GrowingSGD
from fastprune.surgery import leaves

X, Y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6) % 5


def network() -> nn.Module:
    """A residual block, depthwise and grouped convolutions, batch norms, a layer scale.

    No bias in front of a batch norm: its gradient is nothing but rounding, which Adam and others blow up to a step.
    """
    scale = nn.Parameter(torch.full((8, 1, 1), 0.5))
    body = nn.Sequential(conv_bn(8, 6, bias=False), nn.Conv2d(6, 8, 1))
    block = Lambda(lambda m, x: torch.relu(m.scale * m.body(x) + x), body=body, scale=scale)
    wide, grouped = conv_bn(8, 16, groups=8, bias=False), conv_bn(16, 12, groups=2, bias=False)
    model = Net(nn.Sequential(block, wide, grouped), 12)
    model.first.bias = None
    return stir(model.double())


def keeps_of(graph: ChannelGraph) -> dict[str, Tensor]:
    return uneven_keep(graph, seed=3)


def backward(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def stays(t: Tensor, dims: dict[int, Tensor]) -> Tensor:
    for dim, indices in dims.items():
        t = t.index_select(dim, indices)
    return t


def pairs(model: nn.Module, masked: nn.Module, plan: surgery.Plan) -> Iterator[tuple[str, Tensor, Tensor, dict]]:
    """Name, tensor of the small model, of the masked model, what stays of it."""
    small, big = surgery.named_tensors(model), surgery.named_tensors(masked)
    assert small.keys() == big.keys()
    for name, t in small.items():
        yield name, t, big[name], plan.get(name, {})


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, foreach=False),
    "sgd-foreach-nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused-dampened": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1, fused=True),
    "sgd-plain": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "adam-foreach-amsgrad": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01, amsgrad=True, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, maximize=True, foreach=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, decoupled_weight_decay=True, weight_decay=0.1, foreach=False),
    "nadam-foreach": lambda p: torch.optim.NAdam(p, 0.01, foreach=True),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1, foreach=False),
    "radam-foreach": lambda p: torch.optim.RAdam(p, 0.01, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, foreach=False),
    "adamax-foreach": lambda p: torch.optim.Adamax(p, 0.01, foreach=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5, foreach=False),
    "adadelta-foreach": lambda p: torch.optim.Adadelta(p, 0.5, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, lr_decay=0.1, foreach=False),
    "adagrad-foreach": lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1, foreach=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, 0.05, fused=True),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05, t0=1, foreach=False),
    "asgd-foreach": lambda p: torch.optim.ASGD(p, 0.05, t0=1, foreach=True),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01, foreach=False),
    "rprop-foreach": lambda p: torch.optim.Rprop(p, 0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9, foreach=False),
    "rmsprop-foreach": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9, foreach=True),
    "growing-sgd": lambda p: GrowingSGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_the_masked_models(name):
    """Three steps after the surgery: parameters, state and buffers are the masked model's, on what is left."""
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    if name == "growing-sgd":  # per entry, per filter, per channel
        w = model.middle[0].body[0][0].weight, model.middle[2][0].weight, model.first.weight
        reg = {w[0]: torch.rand_like(w[0]), w[1]: torch.rand(12, 1, 1, 1).double()}
        optimizer.constrain(reg=reg, keep={w[2]: torch.rand(8, 3, 1, 1) < 0.7})
    for _ in range(2):
        backward(model)
        optimizer.step()
    graph = trace(model, X)
    keep = keeps_of(graph)
    plan = graph.kept(keep)
    masked, theirs = copy.deepcopy((model, optimizer))
    if name == "growing-sgd":  # constraints are no part of a copy
        twin = dict(zip(model.parameters(), masked.parameters(), strict=True))
        theirs.constrain(*({twin[p]: t for p, t in of.values()} for of in (optimizer._reg, optimizer._keep)))
    graph.mask_(masked, keep)
    compact(model, keep, X, optimizer=optimizer)
    for _ in range(3):
        for net, its in ((model, optimizer), (masked, theirs)):
            backward(net)
            its.step()
        graph.mask_(masked, keep)  # held, as training a masked model does
    for what, small, big, dims in pairs(model, masked, plan):
        assert torch.allclose(small, stays(big, dims), rtol=1e-9, atol=1e-11), what
        if isinstance(small, nn.Parameter):
            assert optimizer.state[small].keys() == theirs.state[big].keys()
            for a, b in zip(leaves(optimizer.state[small]), leaves(theirs.state[big]), strict=True):
                assert torch.allclose(a, stays(b, dims) if b.dim() else b, rtol=1e-9, atol=1e-11), what


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_itself_is_exact_and_its_state_loads(name):
    """With the masked model's own gradients the steps agree to the last bits; a fresh optimizer goes on bit for bit."""
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    backward(model)
    optimizer.step()
    graph = trace(model, X)
    keep = keeps_of(graph)
    plan = graph.kept(keep)
    masked, theirs = copy.deepcopy((model, optimizer))
    compact(model, keep, X, optimizer=optimizer)
    for _ in range(3):
        backward(masked)
        for _, small, big, dims in pairs(model, masked, plan):
            if isinstance(small, nn.Parameter):
                small.grad = stays(big.grad, dims).clone()  # nesterov and foreach change it
        optimizer.step()
        theirs.step()
    for what, small, big, dims in pairs(model, masked, plan):
        if isinstance(small, nn.Parameter):
            assert torch.allclose(small, stays(big, dims), rtol=1e-14, atol=1e-16), what
    again = copy.deepcopy(model)
    fresh = OPTIMIZERS[name](list(again.parameters()))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        backward(model)
        for a, b in zip(again.parameters(), model.parameters(), strict=True):
            a.grad = b.grad.clone()
        optimizer.step()
        fresh.step()
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        # loading, PyTorch makes a float64 of NAdam's float32 product of its betas
        assert torch.equal(a, b) or (name.startswith("nadam") and torch.allclose(a, b, rtol=1e-6))


def test_muon_keeps_its_momentum():
    """Its step depends on the shape of the matrix, so only the state can be compared."""
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.ReLU(), nn.Linear(10, 6, bias=False))
    x, keep = torch.randn(4, 12), {"0": torch.arange(10) % 3 > 0}
    optimizer = torch.optim.Muon(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    before = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    compact(model, keep, x, optimizer=optimizer)
    after = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    assert torch.equal(after[0], before[0][keep["0"]]) and torch.equal(after[1], before[1][:, keep["0"]])
    model(x).square().mean().backward()
    optimizer.step()


def lamb_like(optimizer, model):
    optimizer.state[model.first.weight]["row_mean"] = torch.zeros(8, 3)


REFUSED = {
    "lbfgs": (torch.optim.LBFGS, r"state of LBFGS cannot be cut: it keeps the history .* create it anew"),
    "adafactor": (torch.optim.Adafactor, r"state of Adafactor cannot be cut: .* depends on the whole tensor"),
    "not one": (lambda p: "sgd", r"expected a torch.optim.Optimizer or several, got str"),
    "another model's": (
        lambda p: torch.optim.SGD(network().parameters(), 0.1), r"none of the parameters of this SGD is the model's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_optimizers_that_cannot_follow_are_refused(make, message):
    model = network()
    good, bad = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), make(list(model.parameters()))
    backward(model)
    good.step()
    with pytest.raises(ValueError, match=message), unchanged(model, good):
        compact(model, keeps_of(trace(model, X)), X, optimizer=[good, bad])


class unchanged:
    """Nothing of a model, its gradients, its modules' attributes, optimizers and averages is changed within."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer, ema: nn.Module | None = None) -> None:
        self.modules = [*model.modules(), *(ema.modules() if ema is not None else ())]
        self.optimizers = optimizers

    def state(self) -> tuple[list[tuple[int, Tensor, Tensor]], list, list[dict]]:
        tensors = [t for m in self.modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        tensors += [t.grad for t in tensors if t.grad is not None]
        kept = [(id(of), dict(of)) for o in self.optimizers for of in o.state.values()]
        kept += [(id(of), dict(of)) for o in self.optimizers if isinstance(o, GrowingSGD) for of in (o._reg, o._keep)]
        tensors += leaves([entries for _, entries in kept])
        hidden = ("_parameters", "_buffers", "_modules")
        attributes = [{k: v for k, v in vars(m).items() if k not in hidden} for m in self.modules]
        return [(id(t), t.data_ptr(), t.clone()) for t in tensors], [i for i, _ in kept], copy.deepcopy(attributes)

    def __enter__(self) -> None:
        self.before = self.state()

    def __exit__(self, *_) -> None:
        for a, b in zip(self.before[0], self.state()[0], strict=True):
            # gradients are other objects each time they are asked for, but the same memory
            assert a[1] == b[1] and torch.equal(a[2], b[2])
        assert self.before[1:] == self.state()[1:]


def averaged(model: nn.Module, steps: int = 1) -> swa_utils.AveragedModel:
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    with torch.no_grad():
        for t in ema.module.parameters():
            t.add_(0.1 * torch.randn_like(t))
    ema.n_averaged += steps
    return ema


@pytest.mark.parametrize("fails", ["_select", "_replace", "_resize", "record_keep"])
def test_whatever_fails_changes_nothing(fails, monkeypatch):
    """An error injected at each call in turn, in the preparation and amid the swap."""
    model = PATTERNS["residual"]().double()
    optimizers = [
        GrowingSGD([*model.first.parameters(), *model.middle.parameters()], 0.1, momentum=0.9),
        torch.optim.AdamW([*model.bn.parameters(), *model.fc.parameters()]),
    ]
    w = model.middle.body[0][0].weight
    optimizers[0].constrain(reg={w: torch.rand_like(w)}, keep={w: torch.rand(6, 8, 1, 1) < 0.7})
    backward(model)
    for o in optimizers:
        o.step()
    ema, graph = averaged(model), trace(model, X)
    keep = keeps_of(graph)
    real, calls = getattr(surgery, fails), 0

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("injected")
        return real(*args)

    monkeypatch.setattr(surgery, fails, failing)
    for at in range(1, 1000):  # noqa: B007  (failing reads it)
        calls = 0
        try:
            with unchanged(model, *optimizers, ema=ema):
                compact(model, keep, X, optimizer=optimizers, ema=ema, graph=graph, check=False)
        except RuntimeError as e:
            assert str(e) == "injected"
        except AssertionError:
            break
    assert at > 10 and calls < at  # it went through at last, and that is what changed something
    assert model.first.out_channels == ema.module.first.out_channels == 4
    backward(model)
    for o in optimizers:
        o.step()


def test_several_optimizers_and_averages_follow():
    model = network()
    norms = [p for n, p in model.named_parameters() if p.dim() == 1]
    others = [p for n, p in model.named_parameters() if p.dim() > 1]
    optimizers = torch.optim.SGD(norms, 0.1, momentum=0.9), torch.optim.Adam(others, 0.01)
    holder = nn.Module()
    holder.shadow, holder.slow = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).float()
    emas = [averaged(model), averaged(averaged(model)), holder]  # the second has module.module.first.weight
    backward(model)
    for o in optimizers:
        o.step()
    graph = trace(model, X)
    keep = keeps_of(graph)
    plan = graph.kept(keep)
    masked, their_emas = copy.deepcopy((model, emas))
    parameters = [list(e.parameters()) for e in emas]
    compact(model, keep, X, optimizer=optimizers, ema=emas)
    for o, params in zip(optimizers, (norms, others), strict=True):
        assert all(t.shape in (p.shape, ()) for p in params for t in leaves(o.state[p]))
    emas[0].update_parameters(model)
    their_emas[0].update_parameters(masked)
    inside = lambda e: (e[0].module, e[1].module.module, e[2].shadow, e[2].slow)  # noqa: E731
    for small, big in zip(inside(emas), inside(their_emas), strict=True):
        for what, a, b, dims in pairs(small, big, plan):
            assert torch.equal(a, stays(b, dims)), what
        assert str(small) == str(model) and small(X.to(small.fc.weight.dtype)).isfinite().all()
    for e, before in zip(emas, parameters, strict=True):
        assert all(a is b for a, b in zip(e.parameters(), before, strict=True))


def test_timm_average_follows():
    utils = pytest.importorskip("timm.utils")
    model = network().float()
    emas = [utils.ModelEmaV2(model), utils.ModelEmaV3(model, foreach=True), utils.ModelEmaV3(model, foreach=False)]
    keep = keeps_of(trace(model, X.float()))
    compact(model, keep, X.float(), ema=emas)
    for ema in emas:
        ema.update(model)
        assert torch.allclose(ema.module.first.weight, model.first.weight)  # it was a copy, and averages of equals are
        assert ema.module.middle[1][0].groups == model.middle[1][0].groups == 4


def smaller():
    model = network()
    return compact(model, keeps_of(trace(model, X)), X)


WRONG_AVERAGES = {
    "smaller": (lambda m: smaller(), r"first.weight of shape \(8, 3, 3, 3\) in Net, got one of \(4, 3, 3, 3\)"),
    "other": (lambda m: averaged(nn.Conv2d(3, 8, 3)), r"expected first.weight .* in Conv2d, got no such tensor"),
    "itself": (lambda m: m, r"ema shares its parameters with the model; pass a copy"),
    "holds it": (lambda m: nn.Sequential(m), r"ema shares its parameters with the model; pass a copy"),
    "weights": (lambda m: m.state_dict(), r"expected ema to be a module with a copy of the model .* got OrderedDict"),
}


@pytest.mark.parametrize("make, message", WRONG_AVERAGES.values(), ids=WRONG_AVERAGES)
def test_wrong_averages_are_refused(make, message):
    model = network()
    ema, keep = averaged(model), keeps_of(trace(model, X))
    with pytest.raises(ValueError, match=message), unchanged(model, ema=ema):
        compact(model, keep, X, ema=[ema, make(model)])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "swa": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_go_on(make):
    lrs = []
    for cut in (False, True):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler, lrs = make(optimizer), [*lrs, []]
        for i in range(6):
            if i == 3 and cut:
                compact(model, keeps_of(trace(model, X)), X, optimizer=optimizer)
            before = model.fc.bias.clone()
            backward(model)
            optimizer.step()
            assert not torch.equal(model.fc.bias, before)
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            lrs[-1].append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert lrs[0] == lrs[1] and len(set(lrs[0])) > 1


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adam-fused"], OPTIMIZERS["growing-sgd"]])
def test_grad_scaler_and_accumulated_gradients_go_on(make):
    """Surgery between two backward passes: gradients, scaled, are cut and added to; the step is the masked model's."""
    model = network()
    optimizer, scaler = make(list(model.parameters())), torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    loss = nn.functional.cross_entropy

    def accumulate(net, x):
        scaler.scale(loss(net(x), Y)).backward()

    accumulate(model, X)
    graph = trace(model, X)
    keep = keeps_of(graph)
    masked, theirs, their_scaler = copy.deepcopy((model, optimizer, scaler))
    for p, q in zip(masked.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    graph.mask_(masked, keep)
    compact(model, keep, X, optimizer=optimizer)
    for net, its, scaler_ in ((model, optimizer, scaler), (masked, theirs, their_scaler)):
        scaler_.scale(loss(net(X.flip(0)), Y)).backward()
        scaler_.unscale_(its)
        scaler_.step(its)
        scaler_.update()
    graph.mask_(masked, keep)
    for what, small, big, dims in pairs(model, masked, graph.kept(keep)):
        assert torch.allclose(small, stays(big, dims), rtol=1e-9, atol=1e-11), what
    model.first.weight.grad[0, 0] = torch.inf  # a step left out
    before = model.fc.weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, model.fc.weight) and scaler.get_scale() == 512 and "step" in seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_goes_on(dtype):
    model, x = network().float(), X.float()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.cross_entropy(model(x), Y)
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    compact(model, keeps_of(trace(model, x)), x, optimizer=optimizer)
    losses = [step() for _ in range(8)]
    assert losses[-1] < losses[0]


def test_hooks_survive():
    model, seen = network(), []
    w = model.first.weight
    w.register_hook(lambda grad: seen.append(("tensor", grad.shape)))
    w.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.grad.shape)))
    model.first.register_forward_hook(lambda m, args, out: seen.append(("forward", out.shape)))
    model.first.register_full_backward_hook(lambda m, *_: seen.append(("backward", m.weight.shape)))
    keep = keeps_of(trace(model, X))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    compact(model, keep, X, optimizer=optimizer)
    seen.clear()
    backward(model, X.clone().requires_grad_())
    optimizer.step()
    shape = torch.Size([4, 3, 3, 3])
    want = [("forward", (6, 4, 8, 8)), ("tensor", shape), ("accumulated", shape), ("backward", shape), "before"]
    assert sorted(map(str, seen)) == sorted(map(str, [(w[0], torch.Size(w[1])) if w != "before" else w for w in want]))


def test_a_step_in_the_backward_goes_on():
    """An optimizer for each parameter, stepped by a hook as soon as its gradient is there."""
    model = network()
    optimizers = {p: torch.optim.Adam([p], 0.01) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    backward(model)
    compact(model, keeps_of(trace(model, X)), X, optimizer=list(optimizers.values()))
    before = model.first.weight.clone()
    backward(model)
    assert not torch.equal(before, model.first.weight)
    assert all(t.shape in (p.shape, ()) for p, o in optimizers.items() for t in leaves(o.state[p]))


def test_old_memory_is_given_back():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    backward(model)
    optimizer.step()
    ema, graph = averaged(model), trace(model, X)
    keep = keeps_of(graph)

    def tensors() -> list[Tensor]:
        named = [(n, t) for m in (model, ema.module) for n, t in surgery.named_tensors(m).items()]
        mine = [t for n, t in named if n in graph.kept(keep)]
        return [*mine, *(t.grad for t in mine if t.grad is not None), *leaves([optimizer.state.get(t) for t in mine])]

    old = [StorageWeakRef(t.untyped_storage()) for t in tensors() if t.dim()]
    assert len(old) > 90 and not any(ref.expired() for ref in old)
    compact(model, keep, X, optimizer=optimizer, ema=ema, graph=graph, check=False)
    gc.collect()
    assert all(ref.expired() for ref in old)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_called_without_gradients_the_result_can_be_trained(mode):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with mode():
        compact(model, keeps_of(trace(model, X)), X, optimizer=optimizer)
    assert not any(t.is_inference() for t in surgery.named_tensors(model).values())
    backward(model)
    optimizer.step()


def test_dtype_layout_flags_and_buffers_stay_what_they_are():
    model = network().to(torch.bfloat16, memory_format=torch.channels_last)
    w = model.middle[0].body[0][0].weight
    w.data = w.data.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)  # neither contiguous nor channels_last
    model.first.weight.requires_grad_(False)
    model.bn.register_buffer("twin", model.bn.running_mean, persistent=False)  # a second name of one buffer
    model.bn.register_buffer("view", model.bn.running_var.view(-1), persistent=False)  # a second tensor on one memory
    model.bn.register_buffer("steps", torch.arange(8))  # integers: nothing to do with channels
    model.bn.forward = lambda x: nn.BatchNorm2d.forward(model.bn, x) + 0 * (model.bn.view)[:, None, None]
    x = X.bfloat16()
    names, order = list(model.state_dict()), sorted(range(4), key=lambda d: -w.stride(d))
    graph = trace(model, x)
    compact(model, keeps_of(graph), x, graph=graph, check=False)
    assert all(t.dtype == torch.bfloat16 for t in surgery.named_tensors(model).values() if t.is_floating_point())
    assert sorted(range(4), key=lambda d: -w.stride(d)) == order and w.shape == (3, 4, 3, 3)
    assert model.middle[2][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.first.weight.requires_grad and w.requires_grad
    assert model.bn.twin is model.bn.running_mean and len(model.bn.twin) == 4 and list(model.state_dict()) == names
    assert model.bn.view.data_ptr() == model.bn.running_var.data_ptr() and model.bn.view.shape == (4,)
    assert len(model.bn.steps) == 8 and model(x).isfinite().all()


def test_one_memory_cut_in_two_ways_is_refused():
    """Two convolutions on one memory that PyTorch does not know to be tied; and a parameter inside a buffer."""
    twice = PATTERNS["residual"]().double()
    twice.middle.body[0][0].weight.data = twice.middle.body[1][0].weight.data.view(6, 8, 3, 3)
    part = PATTERNS["residual"]().double()
    part.register_buffer("flat", torch.cat([part.bn.weight.detach(), part.bn.bias.detach()]))
    part.bn.weight.data = part.flat[:8]
    cases = (twice, "middle.body.0.0.weight and middle.body.1.0.weight"), (part, "(flat and bn|bn.weight and flat)")
    for model, names in cases:
        keep = keeps_of(trace(model, X))
        with pytest.raises(ValueError, match=names + ".* share memory and would be cut differ"), unchanged(model):
            compact(model, keep, X, check=False)
    part.bn.weight.data, part.bn.bias.data = part.flat.split(8)  # all in one storage, side by side: nothing is shared
    del part.flat
    compact(part, keeps_of(trace(part, X)), X)


def compiled_inside():
    model = network()
    model.middle[1] = torch.compile(model.middle[1], backend="eager")
    return model


def compiled_in_place():
    model = network()
    model.compile(backend="eager")
    return model


def made_for_inference():
    with torch.inference_mode():
        return network()


UNFIT = {
    "compiled": (lambda: torch.compile(network(), backend="eager"), r"but it was compiled; compact before compiling"),
    "compiled inside": (compiled_inside, r"but its part 'middle.1' was compiled; compact before"),
    "compiled in place": (compiled_in_place, r"but it was compiled; compact before compiling"),
    "parallel": (lambda: nn.DataParallel(network()), r"it is a DataParallel, .* pass its .module, and wrap what comes"),
    "meta": (lambda: network().to("meta"), r"first.weight is on the meta device, .* load the weights first"),
    "no module": (lambda: "resnet20", r"expected an nn.Module, got str"),
    "inference": (made_for_inference, r"first.weight was made under torch.inference_mode .* make it outside"),
}


@pytest.mark.parametrize("make, message", UNFIT.values(), ids=UNFIT)
def test_models_that_cannot_be_cut_say_why(make, message):
    with pytest.raises(ValueError, match="compact: .*" + message):
        compact(make(), {}, X)


def test_distributed_models_are_cut_inside_and_wrapped_anew(tmp_path):
    """What docs/surgery.md says of DistributedDataParallel."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network())
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
        backward(wrapped)
        optimizer.step()
        with pytest.raises(ValueError, match=r"it is a DistributedDataParallel, which keeps buckets of the old sizes"):
            compact(wrapped, {}, X, optimizer=optimizer)
        model = wrapped.module
        del wrapped
        compact(model, keeps_of(trace(model, X)), X, optimizer=optimizer)
        again, before = nn.parallel.DistributedDataParallel(model), model.first.weight.clone()
        backward(again)
        optimizer.step()
        assert not torch.equal(before, model.first.weight)
    finally:
        torch.distributed.destroy_process_group()


def test_buffers_that_find_their_size_in_the_first_batch():
    """As quantisation's observers do: looking at the model leaves them empty."""

    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("highest", torch.empty(0))

        def forward(self, x):
            high = x.detach().amax((0, 2, 3))
            self.highest.resize_(high.shape).copy_(high)
            return x

    model, x = Net(nn.Sequential(Observer(), nn.Conv2d(8, 7, 1)), 7), X.float()
    with pytest.warns(UserWarning, match="aten::resize_ has no rule"):
        graph = trace(model, x)
    compact(model, keeps_of(graph), x, graph=graph)
    assert model.middle[0].highest.shape == (0,) and model.middle[1].out_channels == 3
