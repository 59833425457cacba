"""Taylor's criteria, Fisher pruning and iterative cutting: the authors' numbers, masked against shrunk, resumption."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fastprune as fp
from fastprune.methods.base import IDS
from fastprune.methods.taylor import from_config
from fastprune.models.densenet_cifar import DenseLayer
from fastprune.models.wide_resnet import PreActBlock

GOLDEN = np.load(Path(__file__).parent / "golden" / "taylor.npz")
PRUNES = np.load(Path(__file__).parent / "golden" / "prunes.npz")
CONFIG = {
    "method": 22, "frequency": 30, "prune_per_iteration": 100, "maximum_pruning_iterations": 32, "starting_neuron": 0,
    "fixed_layer": -1, "l2_normalization_per_layer": False, "rank_neurons_equally": False, "prune_neurons_max": 3200,
    "use_momentum": True, "pruning_silent": False, "pruning_threshold": 100.0, "start_pruning_after_n_iterations": 0,
    "push_group_down": False, "do_iterative_pruning": True, "fixed_criteria": False, "seed": 0,
    "pruning_momentum": 0.9,
}  # fmt: skip


def golden(key, data=GOLDEN):
    return torch.from_numpy(data[key])


def authors_net(explicit):
    """conv-bn-gate-relu twice, mean, linear; with Gate modules, or none."""
    gate = fp.nn.Gate if explicit else lambda c: nn.Identity()
    net = nn.Sequential()
    for i, (cin, cout) in enumerate([(3, 4), (4, 5)], 1):
        net.add_module(f"conv{i}", nn.Conv2d(cin, cout, 3, padding=1, bias=False))
        net.add_module(f"bn{i}", nn.BatchNorm2d(cout))
        net.add_module(f"gate{i}", gate(cout))
        net.add_module(f"relu{i}", nn.ReLU(inplace=False))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(5, 3))
    net.double()
    state = {k.removeprefix("taylor/net/"): golden(k) for k in GOLDEN.files if k.startswith("taylor/net/")}
    net.load_state_dict({k: v for k, v in state.items() if explicit or not k.startswith("gate")}, strict=False)
    return net


def step(method, model, x, y, optimizer):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    (loss + method.penalty()).backward()
    method.step(optimizer, loss.detach())
    return loss


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("number", [0, 2, 3, 6, 22, 23, 30, 31])
def test_criteria_are_the_authors(number, explicit):
    net, x, y = authors_net(explicit), golden("taylor/x"), golden("taylor/y")
    method = fp.create(number, net, x[:2], variant="code", stem=True)
    loss = step(method, net, x, y, torch.optim.SGD(net.parameters(), lr=0.0))
    assert loss.item() == pytest.approx(float(GOLDEN["taylor/loss"]), rel=1e-13)
    scores = method.scores()
    assert list(scores) == ["conv1", "conv2"]
    for layer, score in enumerate(scores.values()):  # the divisor of 3 belongs to their ImageNet networks
        torch.testing.assert_close(3 * score, golden(f"taylor/method{number}/layer{layer}"), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
def test_divisors_are_the_authors(name):
    model = torchvision.models.get_model(name)
    method = fp.create("taylor-gate", model, torch.randn(2, 3, 32, 32), variant="code")
    skips = [n for n, gate in method.gates.items() if gate.kind == "skip"]
    by_gate = {n: set(d.tolist()) for n, d in method._split(method._divisor).items()}
    for i, skip in enumerate(skips):
        divided = golden(f"taylor/div/grad{i}").square() / golden(f"taylor/div/{name}/crit{i}")
        assert by_gate.pop(skip) == {round(float(divided[0]), 9)}
    assert set.union(*by_gate.values()) == {3.0}  # all others, crit4 and crit5
    assert torch.allclose(golden("taylor/div/grad4").square() / 3, golden(f"taylor/div/{name}/crit4"))
    paper = fp.create("taylor-gate", model, torch.randn(2, 3, 32, 32))
    uses = {n: set(d.tolist()) for n, d in paper._split(paper._divisor).items()}
    assert [uses.pop(skip) for skip in skips] == [{float(len(paper.gates[s].sites))} for s in skips]
    assert set.union(*uses.values()) == {1.0}


@pytest.mark.parametrize("block", ["wrn_proj", "wrn_id", "dense"])
@pytest.mark.parametrize("fuse", [False, True])
def test_fisher_is_the_authors(block, fuse):
    parameters = {k.split("/")[-1]: golden(k, PRUNES) for k in PRUNES.files if k.startswith(f"fisher/{block}/param/")}
    cin, mid = parameters["conv1.weight"].shape[1], len(parameters["conv1.weight"])
    if block == "dense":
        model = DenseLayer(cin, mid, len(parameters["conv2.weight"]), None)
    else:
        model = PreActBlock(cin, mid, 4, 2 if block == "wrn_proj" else 1, None)
    model.double()
    parameters = {k.replace("convShortcut", "shortcut"): v for k, v in parameters.items()}
    model.load_state_dict(parameters, strict=False)
    if fuse:
        fp.nn.convert_batchnorm(model)
    x = golden(f"fisher/{block}/step0/x", PRUNES)
    method = fp.create("fisher", model, x[:2], ratio=0.25, per_cut=1, frequency=2, stem=True, shrink_every=0)
    assert list(method.groups) == ["conv1"]
    optimizer, total = torch.optim.SGD(model.parameters(), lr=0.0), torch.zeros(mid, dtype=torch.float64)
    keep = golden(f"fisher/{block}/mask", PRUNES).bool()
    for i in range(3):
        x, dy = (golden(f"fisher/{block}/step{i}/{key}", PRUNES) for key in ("x", "dy"))
        if i == 2:
            method.graph.mask_(model, {"conv1": keep})
        out = model(x)
        torch.testing.assert_close(out, golden(f"fisher/{block}/step{i}/y", PRUNES), rtol=1e-9, atol=1e-12)
        optimizer.zero_grad()
        ((out * dy).sum() + method.penalty()).backward()
        total += method.measure()
        torch.testing.assert_close(total, golden(f"fisher/{block}/running_fisher", PRUNES)[i], rtol=1e-9, atol=1e-14)
    assert method.graph.parameters_after(model, {"conv1": keep}) == int(PRUNES[f"fisher/{block}/cost_params"])


def authors_wrn(sums):
    """WRN-10-0.25, its 28 filters between two convolutions with these sums."""
    model = fp.models.create("wrn-40-2", depth=10, width=0.25)
    with torch.no_grad():
        rest = torch.as_tensor(sums)
        for name, p in model.named_parameters():
            if name.startswith("layer") and name.endswith("conv1.weight"):
                p.copy_((rest[: len(p)] / p[0].numel()).view(-1, 1, 1, 1).expand_as(p))
                rest = rest[len(p) :]
    assert not len(rest)
    return model


def order_of_cuts(method, model, optimizer):
    """Numbers of the channels in the order they go; one cut a step."""
    order, x, y = [], torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    while not method.finished:
        step(method, model, x, y, optimizer)
        gone = (~torch.cat(list(method.survivors().values()))).nonzero().squeeze(1).tolist()
        order += [c for c in gone if c not in order]
    return order


@pytest.mark.parametrize("shrink_every", [0, 1])
@pytest.mark.parametrize("signed", [True, False])
def test_l1_order_and_bookkeeping_are_the_authors(signed, shrink_every):
    sums = PRUNES["prunes/conv1_signed_sum" if signed else "prunes/conv1_abs_sum"]
    model = authors_wrn(sums)
    method = fp.create(
        "maskblock-l1", model, torch.randn(2, 3, 8, 8), per_cut=1, frequency=1, max_removed=6, signed=signed,
        shrink_every=shrink_every,
    )  # fmt: skip
    assert sum(g.size for g in method.groups.values()) == int(PRUNES["prunes/n_channels"])
    order = order_of_cuts(method, model, torch.optim.SGD(model.parameters(), lr=0.0))
    if signed:
        assert order == PRUNES["prunes/l1_original_order"].tolist()
        assert method.parameters_left() == int(PRUNES["prunes/params_after_6"])
        small = sum(p.numel() for p in model.parameters())
        assert small == method.parameters_left() if shrink_every else small > method.parameters_left()
    else:
        assert order == np.argsort(sums)[:6].tolist()


@pytest.mark.parametrize("shrink_every", [0, 1, 2])
def test_fisher_order_is_the_authors(shrink_every):
    model = authors_wrn(np.ones(28))
    method = fp.create(
        "fisher", model, torch.randn(2, 3, 8, 8), per_cut=1, frequency=1, max_removed=6, shrink_every=shrink_every
    )
    given = iter(golden("prunes/fisher_given", PRUNES))

    def measured():
        return next(given)[
            torch.cat(
                [
                    F.one_hot(a, s).sum(0).bool()
                    for a, s in zip(method._alive.values(), method._sizes.values(), strict=True)
                ]
            )
        ]

    method.measure = measured
    order = order_of_cuts(method, model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert order == PRUNES["prunes/fisher_order"].tolist()


def run(name, steps=14, arch="resnet20", seed=0, dtype=torch.float64, **options):
    """Train ``steps`` steps on noise; model, method and optimizer."""
    torch.manual_seed(seed)
    model = fp.nn.convert_batchnorm(fp.models.create(arch).to(dtype))
    x, y = torch.randn(steps, 8, 3, 16, 16, dtype=dtype), torch.randint(10, (steps, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    if name in ("obd", "taylor-gate-so", "oracle"):
        options["data"] = [(x[0], y[0])]
    method = fp.create(name, model, x[0, :2], **options)
    for i in range(steps):
        step(method, model, x[i], y[i], optimizer)
    return model, method, optimizer


@pytest.mark.parametrize(
    "name", ["taylor-gate", "taylor-output", "fisher", "taylor-weight", "bn-taylor", "maskblock-random"]
)
def test_shrinking_on_the_way_gives_the_same_masks_and_network(name):
    options = {"per_cut": 20, "frequency": 3, "max_removed": 60, "momentum": 0.5}
    masked, a, _ = run(name, shrink_every=0, **options)
    small, b, optimizer = run(name, shrink_every=1, **options)
    assert a.survivors().keys() == b.survivors().keys()
    for key, alive in a.survivors().items():
        assert torch.equal(alive, b.survivors()[key]), key
    assert sum(int((~m).sum()) for m in a.survivors().values()) >= 60
    assert all(m.all() for m in b.keep_masks().values())
    assert (
        sum(p.numel() for p in small.parameters()) == a.parameters_left() < sum(p.numel() for p in masked.parameters())
    )
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-7, atol=1e-9)
    fp.compact(masked, a.keep_masks(), x[:2])
    for p, q in zip(masked.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
        assert optimizer.state[q].get("momentum_buffer", q).shape == q.shape


@pytest.mark.parametrize("bound", [None, "sigmoid"])
@pytest.mark.parametrize("optim", [torch.optim.SGD, torch.optim.AdamW])
def test_what_is_cut_stays_zero(bound, optim):
    torch.manual_seed(0)
    model = fp.nn.convert_batchnorm(fp.models.create("resnet20"), bound=bound)
    optimizer = optim(
        model.parameters(), lr=0.01, weight_decay=0.01, **({"momentum": 0.9} if optim is torch.optim.SGD else {})
    )
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    method = fp.create("taylor-gate", model, x[:2], per_cut=30, frequency=2, max_removed=60, shrink_every=0)
    for _ in range(10):
        step(method, model, x, y, optimizer)
    assert method.finished and sum(int((~m).sum()) for m in method.keep_masks().values()) >= 60
    named = dict(model.named_parameters())
    for name, dims in method.dead().items():
        for dim, stays in dims.items() if name in named else ():
            gone = torch.ones(named[name].shape[dim], dtype=torch.bool).index_fill_(0, stays, False)
            assert not named[name].detach().movedim(dim, 0)[gone].any(), name
    masked = model.eval()(x)
    fp.compact(model, method.keep_masks(), x[:2])
    torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-5)


def test_an_average_shrinks_along():
    """To what an average of the masked model becomes when both are cut at the end."""
    averages = []
    for shrink_every in (1, 0):
        torch.manual_seed(0)
        model = fp.nn.convert_batchnorm(fp.models.create("resnet20").double())
        x, y = torch.randn(6, 8, 3, 16, 16, dtype=torch.float64), torch.randint(10, (6, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        options = {"per_cut": 30, "frequency": 2, "max_removed": 60, "shrink_every": shrink_every}
        method = fp.create("taylor-gate", model, x[0, :2], **options)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        for images, labels in zip(x, y, strict=True):
            loss = F.cross_entropy(model(images), labels) + method.penalty()
            optimizer.zero_grad()
            loss.backward()
            method.step(optimizer, loss, ema=ema)
            ema.update_parameters(model)
        assert method.finished
        if not shrink_every:
            fp.compact(model, method.keep_masks(), x[0, :2], ema=ema)
        averages.append(ema.module)
    whole = sum(p.numel() for p in fp.models.create("resnet20").parameters())
    assert sum(p.numel() for p in averages[0].parameters()) < whole
    for (name, a), b in zip(averages[0].named_parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["taylor-gate", "taylor-random", "fisher"])
@pytest.mark.parametrize("shrink_every", [0, 1])
def test_resumed_run_is_the_uninterrupted_one(name, shrink_every, tmp_path):
    options = {"per_cut": 15, "frequency": 3, "max_removed": 45, "shrink_every": shrink_every}
    expected, whole, _ = run(name, steps=12, **options)
    torch.manual_seed(0)
    model = fp.nn.convert_batchnorm(fp.models.create("resnet20").double())
    x, y = torch.randn(12, 8, 3, 16, 16, dtype=torch.float64), torch.randint(10, (12, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    method = fp.create(name, model, x[0, :2], **options)
    for i in range(8):
        step(method, model, x[i], y[i], optimizer)
    parts = {"method": method.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(parts, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(7)
    model = fp.nn.convert_batchnorm(fp.models.create("resnet20").double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    method = fp.create(name, model, x[0, :2], **options)
    method.load_state_dict(state["method"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for i in range(8, 12):
        step(method, model, x[i], y[i], optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.survivors().values(), method.survivors().values(), strict=True))
    for p, q in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("number", sorted(IDS))
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_every_criterion_chooses_once(number, variant):
    _, method, _ = run(IDS[number], steps=1, arch="resnet20", variant=variant, ratio=0.25, dtype=torch.float32)
    keep = method.keep_masks()
    total = sum(len(m) for m in keep.values())
    assert abs(sum(int((~m).sum()) for m in keep.values()) - 0.25 * total) <= 0.02 * total
    assert all(s.dtype == torch.float64 and s.isfinite().all() for s in method.scores().values())
    assert "conv1" in keep and any(g.kind == "branch" for g in method.gates.values()) == (variant == "code")


@pytest.mark.parametrize("name", ["obd", "taylor-gate-so", "oracle", "taylor-output", "taylor-random", "bn-scale"])
def test_other_criteria_cut_on_the_way(name):
    _, method, _ = run(name, steps=5, per_cut=10, frequency=2, max_removed=20, dtype=torch.float32)
    assert method.finished and 20 <= sum(int((~m).sum()) for m in method.survivors().values())


def test_branches_are_silenced_not_removed():
    model, method, _ = run("taylor-gate", 8, variant="code", per_cut=40, frequency=2, max_removed=120, shrink_every=1)
    branches = {n: k for n, k in method._keep.items() if method.gates[n].kind == "branch"}
    silenced = {n: k for n, k in branches.items() if not k.all()}
    assert silenced
    for name, keep in silenced.items():
        norm, site = model.get_submodule(name), method.gates[name].sites[0]
        gone = site.index.position[~keep[site.index.channel]]
        assert len(gone) == int((~keep).sum())  # still there
        assert not norm.weight[gone].any() and not norm.bias[gone].any()
    assert set(method.keep_masks()) == set(method.groups)


@pytest.mark.parametrize("kind", ["bounded", "without shift"])
def test_branches_of_other_norms(kind):
    model, x = fp.nn.convert_batchnorm(fp.models.create("resnet20"), bound="sigmoid"), torch.randn(8, 3, 16, 16)
    if kind == "without shift":  # else a scale of zero is 0.5, so that nothing would be silent
        for m in model.modules():
            if isinstance(m, fp.nn.BatchNormAct2d):
                m.bound = None
    method = fp.create("taylor-gate", model, x[:2], variant="code", per_cut=60, frequency=1, max_removed=120)
    assert any(g.kind == "branch" for g in method.gates.values()) == (kind == "without shift")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        step(method, model, x, torch.randint(10, (8,)), optimizer)
    assert method.finished
    for name, gate in method.gates.items():
        if gate.kind == "branch":
            norm, keep, index = model.get_submodule(name), method._keep[name], gate.sites[0].index
            assert not norm.weight[index.position[~keep[index.channel]]].any()


def test_momentum_starts_anew_after_the_last_cut():
    _, method, optimizer = run("taylor-gate", 3, per_cut=20, frequency=2, max_removed=20, shrink_every=0)
    assert method.finished and not any("momentum_buffer" in s for s in optimizer.state.values())


def test_loss_threshold_postpones():
    _, method, _ = run("taylor-gate", 7, per_cut=20, frequency=2, max_removed=20, loss_threshold=1e-3)
    assert method.cuts.cuts == 0 and method.cuts.windows == 3
    with pytest.raises(ValueError, match="loss_threshold needs the loss"):
        model = fp.models.create("resnet20")
        method = fp.create("taylor-gate", model, torch.randn(2, 3, 16, 16), per_cut=5, loss_threshold=1.0)
        (model(torch.randn(2, 3, 16, 16)).sum() + method.penalty()).backward()
        method.step(torch.optim.SGD(model.parameters(), lr=0.1))


def test_configuration_of_the_authors_loads_as_it_is(tmp_path):
    path = tmp_path / "imagenet_resnet50_prune72.json"
    path.write_text(json.dumps(CONFIG))
    model = torchvision.models.resnet50()
    method = from_config(path, model, torch.randn(2, 3, 32, 32), variant="code")
    assert method.name == "taylor-gate" and sum(g.size for g in method.gates.values()) == 11392
    s = method.cuts.schedule
    assert (s.frequency, s.per_cut, s.max_removed, s.max_cuts, s.momentum) == (30, 100, 3200, 32, 0.9)
    with pytest.raises(ValueError, match="did you mean 'frequency'"):
        from_config(CONFIG | {"freqency": 3}, model, None)
    with pytest.raises(ValueError, match="push_group_down"):
        from_config(CONFIG | {"push_group_down": True}, model, None)
    with pytest.raises(ValueError, match="expected a method of"):
        from_config(CONFIG | {"method": 7}, model, None)


def test_lenet_cuts_at_its_own_gates():
    torch.manual_seed(0)
    model = fp.models.create("lenet-taylor", in_channels=1, image_size=28)
    x, y = torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
    method = fp.create(22, model, x[:2], per_cut=10, frequency=2, max_removed=30, shrink_every=1)
    assert all(isinstance(model.get_submodule(g.sites[0].module), fp.nn.Gate) for g in method.gates.values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for _ in range(8):
        step(method, model, x, y, optimizer)
    assert method.finished and model(x).shape == (8, 10)
    assert sum(len(m.weight) for m in model.modules() if isinstance(m, fp.nn.Gate)) == sum(
        map(sum, method.survivors().values())
    )


def test_plain_network_without_norms():
    model = torchvision.models.vgg11(num_classes=10, dropout=0)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    method = fp.create("taylor-gate", model, x[:2], ratio=0.3)
    step(method, model, x, y, torch.optim.SGD(model.parameters(), lr=0.0))
    small = fp.compact(model, method.keep_masks(), x[:2])
    assert small(x).shape == (4, 10)
    with pytest.raises(ValueError, match="scale of a batch norm"):
        fp.create("bn-scale", model, x[:2])


def test_prunable_counts_of_the_fisher_networks():
    for name, count in (("wrn-40-2", 1344), ("densenet-bc-100", 2304)):
        method = fp.create("fisher", fp.models.create(name), torch.randn(2, 3, 16, 16))
        assert sum(g.size for g in method.groups.values()) == count


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"max_removed": 1000}, {"group_size": 7, "max_removed": 48}])
def test_a_run_ends_when_nothing_more_can_go(options):
    _, method, _ = run("taylor-gate", 40, per_cut=60, frequency=1, momentum=0.0, shrink_every=5, **options)
    assert method.finished and not any(hasattr(m, "gate_slots") and m.gate_slots for m in method.model.modules())
    assert all(len(k) and k.any() for k in method.keep_masks().values())


def test_a_state_is_a_snapshot():
    model, method, _ = run("taylor-gate", 5, per_cut=10, frequency=2, max_removed=60, shrink_every=1)
    state = method.state_dict()
    before = copy.deepcopy(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(4):
        step(method, model, torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randint(10, (8,)), optimizer)
    assert method.cuts.removed > before["cuts"]["removed"]
    for key in ("alive", "keep"):
        assert all(torch.equal(state[key][name], before[key][name]) for name in before[key])


def test_errors():
    model, x = fp.models.create("resnet20"), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="unknown method 7; known numbers"):
        fp.create(7, model, x)
    with pytest.raises(ValueError, match="variant must be 'paper' or 'code'"):
        fp.create(22, model, x, variant="papr")
    with pytest.raises(ValueError, match="expected data=batches"):
        fp.create("oracle", model, x)
    method = fp.create(22, copy.deepcopy(model), x)
    with pytest.raises(ValueError, match="no scores before the first step"):
        method.keep_masks()
    with pytest.raises(ValueError, match="without a backward"):
        method.step(torch.optim.SGD(model.parameters(), lr=0.1))
    copied, method = copy.deepcopy((model, fp.create(22, model, x)))
    with pytest.raises(ValueError, match="for a copy of the model make a new method"):
        step(method, copied, x, torch.tensor([0, 1]), torch.optim.SGD(copied.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="expected one ratio or max_removed"):
        fp.create(22, copy.deepcopy(model), x, ratio={"layer1*": 0.5}, per_cut=5)
    with pytest.raises(ValueError, match="variant belongs to Taylor's criteria"):
        fp.create("fisher", fp.models.create("wrn-40-2", depth=10), x, variant="code")
    with pytest.raises(ValueError, match="it masks channels that one convolution writes"):
        fp.create("fisher", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), x)
