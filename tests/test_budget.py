"""Budgets: the cost model against fp.flops of the cut model, the search against brute force, every limit kept."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from graph_cases import FAMILIES, PATTERNS, Lambda, Net, conv_bn, uneven_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastprune as fp
from fastprune.budget import Budget, Costs, keep_masks, steps, uses
from fastprune.errors import GraphError
from fastprune.graph import trace
from fastprune.select import Ranking, limits

X = torch.randn(2, 3, 16, 16)


def counted(model, x):
    count = fp.flops(model, x)
    return {what: count[what] for what in ("macs", "params")}


def assert_costs_are_exact(model, x):
    """Of the model, of it with half of its channels, and by the graph of that one of it with a quarter."""
    graph = trace(model, x)
    used, keep = uses(graph, model, x), uneven_keep(graph)
    costs = Costs(graph, model, used)
    assert costs.of({}) == counted(model, x)
    expected, after = costs.of(keep), graph.after(keep)
    assert expected["params"] < costs.of({})["params"]
    small = fp.compact(model, keep, x, check=False, graph=graph)
    assert expected == counted(small, x)
    rest = {name: torch.arange(group.size) % 2 == 0 for name, group in after.groups.items()}
    costs = Costs(after, small, used)
    assert costs.of({}) == expected
    assert costs.of(rest) == counted(fp.compact(small, rest, x, check=False, graph=after), x)


# --- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_costs_of_patterns(name):
    torch.manual_seed(0)
    assert_costs_are_exact(PATTERNS[name](), X)


@pytest.mark.parametrize("name", ["resnext", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "convnext"])
def test_costs_of_families(name):
    torch.manual_seed(0)
    assert_costs_are_exact(FAMILIES[name](), torch.randn(2, 3, 64, 64))


def test_a_linear_layer_over_an_axis_of_channels():
    """On (N, channels, positions) each channel is a run of the layer, so its cost shrinks with the channels."""

    def run(m, x):
        return m.last(m.mix(m.conv(x).flatten(2)).unflatten(2, (2, 2)))

    net = Net(Lambda(run, conv=nn.Conv2d(8, 12, 3), mix=nn.Linear(196, 4), last=nn.Conv2d(12, 7, 1)), 7)
    graph = trace(net, X)
    (use,) = (u for u in uses(graph, net, X) if u.weight == "middle.mix.weight")
    assert use.module == "middle.mix" and use.times == 1 and "middle.conv" in graph.groups
    assert_costs_are_exact(net, X)


def test_a_parametrised_weight_and_a_shared_one():
    net = Net(nn.Conv2d(8, 7, 3), 7)
    nn.utils.parametrize.register_parametrization(net.middle, "weight", nn.Hardtanh())
    graph = trace(net, X)
    assert "middle.parametrizations.weight.original" in [u.weight for u in uses(graph, net, X)]
    assert_costs_are_exact(net, X)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    twice = Net(nn.Sequential(shared, nn.ReLU(), shared), 8)
    graph = trace(twice, X)
    assert [u.weight for u in uses(graph, twice, X)].count("middle.0.weight") == 2
    assert_costs_are_exact(twice, X)


def test_a_weight_from_nowhere_is_refused():
    class Computed(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            del self._parameters["weight"]
            self.scale = nn.Parameter(torch.ones(()))

        @property
        def weight(self):
            return self.scale * torch.ones(7, 8, 3, 3)

    net = Net(Computed(8, 7, 3), 7)
    with pytest.raises(GraphError, match=r"cannot count middle, whose weight is no parameter.*ask for a ratio"):
        uses(trace(net, X), net, X)


def test_costs_want_their_own_graph():
    a, b = Net(conv_bn(8, 7), 7), Net(conv_bn(8, 9), 9)
    graph = trace(a, X)
    with pytest.raises(GraphError, match="traced on another model"):
        Costs(graph, b, uses(graph, a, X))


# --- the search ----------------------------------------------------------------------------------------------------


def small_net():
    torch.manual_seed(3)
    return Net(nn.Sequential(conv_bn(8, 6), conv_bn(6, 5), nn.Conv2d(5, 7, 1)), 7)


def best_by_brute_force(ranking, bounds, cost, limit):
    """Costs of all networks that a threshold reaches and that fit."""
    found = [cost(bounds.allowed(ranking.widths(gone))) for gone in range(sum(ranking.sizes) + 1)]
    return max((c for c in found if c <= limit), default=None)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 99), st.sampled_from([None, 2, 4]), st.sampled_from([None, 0.5, {"first": 0.3, "mid*": 0.8}]),
    st.integers(1, 3), st.sampled_from(["global", "local"]), st.sampled_from(["macs", "params"]), st.floats(0.02, 1),
)  # fmt: skip
def test_the_largest_that_fits(seed, round_to, max_ratio, min_keep, scope, what, target):
    net = small_net().eval()
    graph = trace(net, X)
    draw = np.random.default_rng(seed)
    scores = {name: torch.from_numpy(draw.integers(0, 9, g.size) / 4) for name, g in graph.groups.items()}
    options = {"min_keep": min_keep, "max_ratio": max_ratio, "round_to": round_to}
    sizes = {name: g.size for name, g in graph.groups.items()}
    bounds = limits(sizes, min_keep, max_ratio, round_to)
    ranking = Ranking({name: s.numpy() for name, s in scores.items()}, scope)
    costs = Costs(graph, net, uses(graph, net, X))
    limit = target * costs.of({})[what]

    def cost(widths):
        return costs.of({name: torch.from_numpy(m) for name, m in ranking.masks(widths).items()})[what]

    best = best_by_brute_force(ranking, bounds, cost, limit)
    if best is None:
        with pytest.raises(ValueError, match=f"target_{what} asks for .* but the smallest network"):
            keep_masks(scores, graph, net, X, **{f"target_{what}": target}, scope=scope, **options)
        return
    keep = keep_masks(scores, graph, net, X, **{f"target_{what}": target}, scope=scope, **options)
    assert best <= costs.of(keep)[what] <= limit
    widths = np.array([int(keep[name].sum()) for name in sizes])
    assert (widths == bounds.allowed(widths)).all() and (widths >= bounds.least).all()
    for name, mask in keep.items():  # the best stay, of equal ones the lower index
        order = np.argsort(-scores[name].numpy(), kind="stable")
        assert mask.numpy()[order].tolist() == sorted(mask.tolist(), reverse=True)
    for i in range(len(sizes)):  # and nothing that still fits was left out
        more = np.where(np.arange(len(sizes)) == i, bounds.wider(widths), widths)
        threshold = bounds.allowed(ranking.widths(first_that_fits(ranking, bounds, cost, limit)))
        assert more[i] == widths[i] or widths[i] > threshold[i] or cost(more) > limit


def first_that_fits(ranking, bounds, cost, limit):
    return next(k for k in itertools.count() if cost(bounds.allowed(ranking.widths(k))) <= limit)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 9), st.floats(0, 1), st.integers(1, 12))
def test_allowed_widths(size, min_keep, max_ratio, round_to):
    bounds = limits({"a": size}, min_keep, max_ratio, round_to)
    widths = [int(bounds.allowed(np.array([n]))[0]) for n in range(size + 1)]
    assert widths == sorted(widths) and widths[size] == size
    for n, width in enumerate(widths):
        assert width >= min(min_keep, size) and size - width <= max_ratio * size + 1e-6
        assert width % round_to == 0 or width == size or round_to > size
        if width < n:
            assert n - width < round_to / 2 + 1e-9  # the nearest, the wider of two
        assert width == n or round_to > 1 or n < bounds.least[0]


def test_a_share_that_is_whole_in_decimals():
    assert limits({"a": 100}, 1, 0.29).least[0] == 71  # 0.29 * 100 is 28.999999999999996


def test_scores_without_information_take_the_same_share_of_every_layer():
    net = FAMILIES["resnet18"]()
    graph = trace(net, X)
    ones = {name: torch.ones(g.size) for name, g in graph.groups.items()}
    keep = keep_masks(ones, graph, net, X, target_macs=0.5)
    shares = [float(mask.float().mean()) for mask in keep.values()]
    assert max(shares) - min(shares) < 0.03 and max(shares) < 0.8


def test_local_takes_one_share_of_every_group_and_global_does_not():
    net = FAMILIES["resnet18"]()
    x = torch.randn(1, 3, 32, 32)
    graph = trace(net, x)
    scores = {name: torch.rand(g.size) + i for i, (name, g) in enumerate(graph.groups.items())}
    for scope, apart in (("local", 0.04), ("global", 1.0)):
        keep = keep_masks(scores, graph, net, x, target_macs=0.4, scope=scope, min_keep=1)
        shares = [float(mask.float().mean()) for mask in keep.values()]
        assert (max(shares) - min(shares) <= apart) and (scope == "local" or max(shares) - min(shares) > 0.5)
        share = counted(fp.compact(copy.deepcopy(net), keep, x, check=False), x)["macs"] / counted(net, x)["macs"]
        assert 0.39 < share <= 0.4


def test_absolute_counts():
    net = small_net()
    graph = trace(net, X)
    scores = {name: torch.rand(g.size) for name, g in graph.groups.items()}
    dense = counted(net, X)
    for what in ("macs", "params"):
        number = dense[what] * 6 // 10
        got = [keep_masks(scores, graph, net, X, **{f"target_{what}": t}) for t in (number, number / dense[what])]
        assert all(torch.equal(got[0][name], got[1][name]) for name in scores)
    assert all(m.all() for m in keep_masks(scores, graph, net, X, target_params=1).values())
    assert all(m.all() for m in keep_masks(scores, graph, net, X, target_macs=dense["macs"]).values())


def test_groups_without_scores_stay_whole():
    net = small_net()
    graph = trace(net, X)
    keep = keep_masks({"first": torch.rand(8)}, graph, net, X, target_macs=0.7)
    assert keep.keys() == {"first"} and Costs(graph, net, uses(graph, net, X)).of(keep)["macs"] <= 0.7 * 1e9
    with pytest.raises(ValueError, match="the smallest network"):
        keep_masks({"first": torch.rand(8)}, graph, net, X, target_macs=0.05)


# --- widths of layers ----------------------------------------------------------------------------------------------


def test_grouped_layers_are_rounded_by_their_own_width():
    net = FAMILIES["resnext"]().eval()  # 8 groups: one channel of the graph is 8 filters
    x = torch.randn(1, 3, 64, 64)
    graph = trace(net, x)
    grouped = next(name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    assert steps(graph, 8)[grouped] == 1 and steps(graph, 16)[grouped] == 2 and steps(graph, 8)["conv1"] == 8
    keep = fp.create("l1", net, x, target_macs=0.5, coupled=True, round_to=16).keep_masks()
    small = fp.compact(copy.deepcopy(net), keep, x, check=False)
    widths = [layer["out_channels"] for layer in fp.flops(small, x)["layers"]][:-1]
    assert not any(width % 16 for width in widths) and min(widths) < 64
    assert counted(small, x)["macs"] <= 0.5 * counted(net, x)["macs"]


def test_groups_narrower_than_the_multiple_are_not_rounded():
    bounds = limits({"narrow": 6, "even": 16, "odd": 20}, 1, None, 8)
    assert [list(bounds.allowed(np.array(n))) for n in ([5, 5, 5], [1, 11, 18], [6, 12, 17])] == [
        [5, 8, 8], [1, 8, 20], [6, 16, 16],
    ]  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0, 0.95), st.integers(1, 9), st.floats(0, 1),
    st.sampled_from(["global", "local"]), st.integers(0, 9),
)  # fmt: skip
def test_a_ratio_keeps_the_limits_too(sizes, ratio, round_to, max_ratio, scope, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"g{i}": torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    plain = fp.keep_masks(scores, ratio, scope, min_keep=2)
    bounds = limits({name: len(s) for name, s in scores.items()}, 2, max_ratio, round_to)
    expected = bounds.allowed(np.array([int(mask.sum()) for mask in plain.values()]))
    limited = fp.keep_masks(scores, ratio, scope, min_keep=2, max_ratio=max_ratio, round_to=round_to)
    for score, mask, width in zip(scores.values(), limited.values(), expected, strict=True):
        assert int(mask.sum()) == (width if ratio else len(score))
        assert mask.all() or score[mask].min() >= score[~mask].max()


@pytest.mark.parametrize("value", [0, -8, True, 2.0, "8"])
def test_bad_multiples(value):
    graph = trace(net := small_net(), X)
    scores = {name: torch.rand(g.size) for name, g in graph.groups.items()}
    with pytest.raises(ValueError, match=f"round_to must be a whole number of at least 1, got {value!r}"):
        keep_masks(scores, graph, net, X, target_macs=0.5, round_to=value)
    with pytest.raises(ValueError, match="round_to must be a whole number"):
        fp.keep_masks(scores, 0.5, round_to=value)


def test_numbers_may_be_numpys():
    graph = trace(net := small_net(), X)
    scores = {name: torch.rand(g.size) for name, g in graph.groups.items()}
    target, limits = {"target_macs": np.float32(0.5)}, {"round_to": np.int64(4), "max_ratio": np.float32(0.75)}
    keep = keep_masks(scores, graph, net, X, **target, **limits)
    expected = keep_masks(scores, graph, net, X, target_macs=0.5, round_to=4, max_ratio=0.75)
    assert all(torch.equal(mask, expected[name]) for name, mask in keep.items())
    keep = fp.keep_masks(scores, np.float32(0.5), **limits)
    expected = fp.keep_masks(scores, 0.5, round_to=4, max_ratio=0.75)
    assert all(torch.equal(mask, expected[name]) for name, mask in keep.items())
    assert fp.create("l1", net, X, ratio=np.float32(0.5)).ratio == 0.5


def test_bad_shares():
    graph = trace(net := small_net(), X)
    scores = {name: torch.rand(g.size) for name, g in graph.groups.items()}
    for value in (-0.1, 1.5, True, "0.5"):
        with pytest.raises(ValueError, match="expected 0 <= max_ratio <= 1"):
            keep_masks(scores, graph, net, X, target_macs=0.5, max_ratio=value)
    with pytest.raises(ValueError, match="'frist' matches no group; did you mean 'first'"):
        keep_masks(scores, graph, net, X, target_macs=0.5, max_ratio={"frist": 0.2})


# --- what is refused -----------------------------------------------------------------------------------------------


def test_targets_that_make_no_sense():
    net = small_net()
    graph = trace(net, X)
    scores = {name: torch.rand(g.size) for name, g in graph.groups.items()}
    for value in (0, -1.0, True, float("nan"), float("inf"), "half"):
        with pytest.raises(ValueError, match="expected target_macs to be a finite number above 0, at most 1 for"):
            keep_masks(scores, graph, net, X, target_macs=value)
    with pytest.raises(ValueError, match=r"expected one of .* got target_macs and target_params"):
        keep_masks(scores, graph, net, X, target_macs=0.5, target_params=0.5)
    with pytest.raises(ValueError, match="got none"):
        keep_masks(scores, graph, net, X)
    with pytest.raises(ValueError, match="latency_inputs goes with target_latency_ms"):
        keep_masks(scores, graph, net, X, target_macs=0.5, latency_inputs=X)
    with pytest.raises(ValueError, match="unknown group 'fist'"):
        keep_masks({"fist": torch.rand(8)}, graph, net, X, target_macs=0.5)
    for bad in (torch.rand(9), torch.rand(8, 1), torch.ones(8, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected floating scores of shape \(8,\) for first, got"):
            keep_masks({"first": bad}, graph, net, X, target_macs=0.5)
    assert keep_masks({}, graph, net, X, target_macs=1.0) == {}
    with pytest.raises(ValueError, match="the smallest network"):
        keep_masks({}, graph, net, X, target_macs=0.9)
    with pytest.raises(ValueError, match="NaN scores in first"):
        keep_masks(scores | {"first": torch.full((8,), torch.nan)}, graph, net, X, target_macs=0.5)
    with pytest.raises(ValueError, match="unknown scope 'globl'; did you mean 'global'"):
        keep_masks(scores, graph, net, X, target_macs=0.5, scope="globl")


def test_an_unreachable_target_names_the_least():
    net = small_net()
    graph = trace(net, X)
    scores = {name: torch.rand(g.size) for name, g in graph.groups.items()}
    with pytest.raises(ValueError, match=r"smallest network .* has ([\d,]+) \((0\.\d+) of the dense one\)") as e:
        keep_masks(scores, graph, net, X, target_macs=0.01)
    least = float(str(e.value).split("(")[1].split(" of")[0])
    keep = keep_masks(scores, graph, net, X, target_macs=least + 1e-4)
    assert all(int(mask.sum()) == 3 for mask in keep.values())


# --- latency -------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch):
    """A clock by which a forward takes as many milliseconds as the model has thousands of MACs."""
    seen = []

    def relative(watch, dense, small, inputs):
        assert not small.training and not dense.training
        seen.append(fp.flops(small, inputs)["macs"])
        return fp.flops(dense, inputs)["macs"] / 1e3, seen[-1] / fp.flops(dense, inputs)["macs"]

    monkeypatch.setattr("fastprune.budget.relative", relative)
    return seen


def test_latency_is_bisected(simulated):
    net = small_net().train()
    before = copy.deepcopy(net.state_dict())
    graph = trace(net, X)
    scores = {name: torch.rand(g.size) for name, g in graph.groups.items()}
    dense = counted(net, X)["macs"] / 1e3
    for share in (0.3, 0.5, 0.8):
        simulated.clear()
        keep = keep_masks(scores, graph, net, X, target_latency_ms=share * dense)
        macs = Costs(graph, net, uses(graph, net, X)).of(keep)["macs"]
        assert share * dense * 0.9 < macs / 1e3 <= share * dense
        assert macs in simulated and len(simulated) <= 10
    assert all(m.all() for m in keep_masks(scores, graph, net, X, target_latency_ms=dense).values())
    with pytest.raises(ValueError, match=r"cannot be reached: the smallest .* takes [\d.]+ ms \(the dense one"):
        keep_masks(scores, graph, net, X, target_latency_ms=0.01 * dense)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_latency_is_measured_once_by_a_method(simulated):
    net = small_net()
    dense = counted(net, X)["macs"] / 1e3
    inputs = torch.randn(5, 3, 16, 16)
    method = fp.create("l1", net, X, coupled=True, target_latency_ms=0.5 * dense, latency_inputs=inputs)
    assert not simulated
    keep, tried = method.keep_masks(), list(simulated)
    assert [entry["macs"] for entry in method.budget.measured] == tried and method.budget.measured[0]["dense_ms"]
    again = method.keep_masks()
    assert simulated == tried and all(torch.equal(keep[name], again[name]) for name in keep)
    other = fp.create("l1", net, X, coupled=True, target_latency_ms=0.5 * dense)
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(keep[name], mask) for name, mask in other.keep_masks().items()) and simulated == tried


def test_latency_on_a_real_clock_is_at_most_the_dense_one():
    net = small_net()
    graph = trace(net, X)
    budget = Budget(graph, net, X, target_latency_ms=1e9)
    ranking = Ranking({name: np.arange(g.size) for name, g in graph.groups.items()}, "global")
    widths = budget.widths(ranking, limits({name: g.size for name, g in graph.groups.items()}, 1))
    assert (widths == ranking.sizes).all() and len(budget.measured) == 2 and budget.measured[0]["ms"] > 0


# --- methods -------------------------------------------------------------------------------------------------------


def train(method, model, most=200):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    for step in range(most):
        if method.finished:
            return step
        loss = nn.functional.cross_entropy(model(x), y) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        method.step(optimizer)
    raise AssertionError("never finished")


@pytest.mark.parametrize("shrink_every", [0, 2])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_cutting_on_the_way_stops_at_the_target(shrink_every, what):
    net = small_net()
    dense = counted(net, X)
    options = {"per_cut": 1, "frequency": 1, "shrink_every": shrink_every, f"target_{what}": 0.5}
    method = fp.create("taylor-gate", net, X, stem=True, max_ratio={"first": 0.25}, **options)
    steps = train(method, net)
    assert 3 < steps < sum(mask.numel() for mask in method.survivors().values()) and method.cuts.cuts < steps
    assert int(method.survivors()["first"].sum()) >= 6
    small = fp.compact(net, method.keep_masks(), X, check=False)
    assert 0.35 * dense[what] < counted(small, X)[what] <= 0.5 * dense[what]


def test_a_schedule_that_ends_before_its_target_says_so():
    net = small_net()
    method = fp.create("taylor-weight-norm", net, X, per_cut=2, frequency=1, max_removed=2, target_macs=0.5)
    with pytest.warns(UserWarning, match="no further cut, though target_macs is not reached; see max_removed"):
        train(method, net)


def test_a_target_met_from_the_start_cuts_nothing():
    method = fp.create("taylor-gate", small_net(), X, per_cut=1, target_macs=1.0)
    assert method.finished and all(mask.all() for mask in method.keep_masks().values())


@pytest.mark.parametrize("name", ["greg-1", "greg-2", "fix-reg", "tpp"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_growing_methods_end_within_the_target(name, scope):
    net = small_net()
    dense = counted(net, X)["macs"]
    options = {"update_interval": 1, "stabilize": 3, "reg_step": 0.5, "scope": scope}
    options |= {"tpp": {"zero_out_interval": 0}, "fix-reg": {"fixed_steps": 3}}.get(name, {})
    options |= {"pick_step": 5e-3} if name == "greg-2" else {}
    method = fp.create(name, net, X, target_macs=0.5, **options)
    train(method, net)
    keep = method.keep_masks()
    assert 0.35 * dense < counted(fp.compact(net, keep, X), X)["macs"] <= 0.5 * dense


@pytest.mark.parametrize("order", ["l1", "max", "random"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_magnitude_methods_take_channels_in_their_order(order, scope):
    net = FAMILIES["resnet18"]()
    x = torch.randn(1, 3, 32, 32)
    method = fp.create(order, net, x, target_macs=0.5, scope=scope)
    for name, mask in method.keep_masks().items():
        score = method.scores()[name]
        if order == "l1":
            assert mask.all() or score[mask].min() >= score[~mask].max()
        elif order == "max":
            assert mask.all() or score[mask].max() <= score[~mask].min()
    if scope == "local":  # as a ratio would choose, for the number it comes to
        ratio = {name: float((~mask).float().mean()) - 1e-9 for name, mask in method.keep_masks().items()}
        same = fp.create(order, net, x, ratio=ratio).keep_masks()
        assert all(torch.equal(same[name], mask) for name, mask in method.keep_masks().items())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_layers_that_lose_the_same_channels_still_do(scope):
    net = FAMILIES["resnet18"]()
    x = torch.randn(1, 3, 32, 32)
    tied = ("layer2.0.conv1", "layer2.1.conv1")
    for options in ({"target_macs": 0.5, "round_to": 8}, {"target_macs": 0.6}, {"ratio": 0.45, "round_to": 8}):
        keep = fp.create("l1", net, x, scope=scope, same=",".join(tied), **options).keep_masks()
        assert torch.equal(keep[tied[0]], keep[tied[1]])
        assert scope == "global" or not keep[tied[0]].all()
        if "target_macs" in options:
            macs = counted(fp.compact(copy.deepcopy(net), keep, x, check=False), x)["macs"]
            assert macs <= options["target_macs"] * counted(net, x)["macs"]


def test_what_methods_refuse():
    net = small_net()
    for options in ({"target_macs": 0.5}, {"round_to": 8}, {"max_ratio": 0.5}):
        with pytest.raises(ValueError, match=r"l1: .* is for groups of channels, got group='2:4'"):
            fp.create("l1", net, X, group="2:4", **options)
    with pytest.raises(ValueError, match="expected a target or inherit, which says what goes; got both"):
        fp.create("l1", net, X, inherit={"first": torch.ones(8, dtype=torch.bool)}, target_macs=0.5)
    with pytest.raises(ValueError, match="round_to is for one cut at the end; with per_cut take group_size"):
        fp.create("taylor-gate", net, X, per_cut=2, round_to=8)
    with pytest.raises(ValueError, match="with per_cut expected target_macs or target_params; a latency would have to"):
        fp.create("taylor-gate", net, X, per_cut=2, target_latency_ms=1.0)
    with pytest.raises(ValueError, match="create: latency_inputs goes with target_latency_ms"):
        fp.create("l1", net, X, latency_inputs=X)


def test_a_resumed_run_of_cuts_keeps_its_target():
    states = []
    for split in (False, True):
        torch.manual_seed(0)
        net = small_net()
        make = {"per_cut": 1, "frequency": 1, "target_macs": 0.5, "shrink_every": 2}
        method = fp.create("taylor-weight-norm", net, X, **make)
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        for _ in range(30):
            torch.manual_seed(1)
            loss = net(torch.randn(4, 3, 16, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            method.step(optimizer)
            if split and method.steps == 5:
                state, weights = method.state_dict(), net.state_dict()
                net = small_net()
                method = fp.create("taylor-weight-norm", net, X, **make)
                method.load_state_dict(state)
                net.load_state_dict(weights)
                optimizer = torch.optim.SGD(net.parameters(), 0.01)
        assert method.finished
        states.append((method.survivors(), counted(net, X)))
    assert states[0][1] == states[1][1]
    assert all(torch.equal(states[0][0][name], mask) for name, mask in states[1][0].items())
