"""Cutting while training: against the authors' loop (tests/golden/taylor.npz), masked against shrunk, resumption."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune.cutting import CutSchedule, IterativeCuts, channel_groups, load_config

GOLDEN = np.load(Path(__file__).parent / "golden" / "taylor.npz")
SIZES = {"a": 6, "b": 5, "c": 8}
# The authors have no floor: g2 loses layer b.
LOOPS = {
    "g1": CutSchedule(max_removed=11, frequency=3, per_cut=3, max_cuts=5, min_keep=0),
    "g1nomom": CutSchedule(max_removed=11, frequency=3, per_cut=3, max_cuts=5, momentum=0.0, min_keep=0),
    "g2": CutSchedule(max_removed=12, frequency=3, per_cut=4, max_cuts=5, group_size=2, min_keep=0),
}
README = {
    "method": 22, "frequency": 30, "prune_per_iteration": 100, "maximum_pruning_iterations": 32, "starting_neuron": 0,
    "fixed_layer": -1, "l2_normalization_per_layer": False, "rank_neurons_equally": False, "prune_neurons_max": 3200,
    "use_momentum": True, "pruning_silent": False, "pruning_threshold": 100.0, "start_pruning_after_n_iterations": 0,
    "push_group_down": False, "do_iterative_pruning": True, "fixed_criteria": False, "seed": 0, "pruning_momentum": 0.9,
}  # fmt: skip


def grads(t):
    return torch.cat([torch.from_numpy(GOLDEN[f"taylor/loop/grads{i}"][t]) for i in range(3)])


@pytest.mark.parametrize("loop, min_keep", [("g1", 0), ("g1", 1), ("g1nomom", 0), ("g1nomom", 1), ("g2", 0)])
def test_the_authors_loop(loop, min_keep):
    cuts = IterativeCuts(SIZES, dataclasses.replace(LOOPS[loop], min_keep=min_keep))
    gates, made = torch.ones(19, dtype=torch.float64), 0
    for t in range(20):
        cuts.add((gates * grads(t)).square())
        if cuts.due:
            gates = torch.cat(list(cuts.cut().values())).double()
            expected = GOLDEN[f"taylor/loop/{loop}/averaged"][made]
            np.testing.assert_allclose(cuts.averaged.numpy(), expected, rtol=1e-14, atol=1e-15)
            assert cuts.threshold == pytest.approx(GOLDEN[f"taylor/loop/{loop}/threshold"][made], rel=1e-14, abs=0)
            made += 1
        assert torch.equal(gates, torch.from_numpy(GOLDEN[f"taylor/loop/{loop}/gates"][t])), t
    assert made == cuts.cuts == 5 and cuts.removed == 11 and cuts.finished


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_authors_groups(size):
    layers = [torch.from_numpy(GOLDEN[f"taylor/group/crit{i}"]) for i in range(2)]
    values, members = zip(*(channel_groups(layer, size) for layer in layers), strict=True)
    np.testing.assert_allclose(torch.cat(values).numpy(), GOLDEN[f"taylor/group/gs{size}/values"], rtol=1e-14)
    assert np.array_equal(torch.cat(members).numpy(), GOLDEN[f"taylor/group/gs{size}/members"])


def run(cuts, rounds, *, shrink=(), seed=0, sizes=SIZES, resume=None):
    """Cut ``rounds`` times on random criteria; shrink before the rounds named.  Returns the masks in full size."""
    generator, alive, history = torch.Generator().manual_seed(seed), {n: torch.arange(c) for n, c in sizes.items()}, []
    keep = {name: torch.ones(c, dtype=torch.bool) for name, c in sizes.items()}
    for r in range(rounds):
        for step in range(3 if r else 4):
            if r in shrink and step == 1:  # in the middle of a window
                cuts.shrink(keep)
                alive = {name: alive[name][k] for name, k in keep.items()}
                keep = {name: torch.ones(len(i), dtype=torch.bool) for name, i in alive.items()}
            scores = {name: torch.rand(c, generator=generator, dtype=torch.float64) for name, c in sizes.items()}
            scores["a"][2] = 0.0  # dead, but alive
            assert not cuts.due
            cuts.add({name: scores[name][i] for name, i in alive.items()})
        assert cuts.due
        if resume is not None:
            cuts = resume(cuts)
        keep = cuts.cut()
        full = {name: torch.zeros(c, dtype=torch.bool) for name, c in sizes.items()}
        for name, i in alive.items():
            full[name][i[keep[name]]] = True
        history.append(torch.cat(list(full.values())))
    return torch.stack(history)


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("min_keep", [0, 1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_shrinking_changes_no_choice(group_size, min_keep, momentum):
    schedule = CutSchedule(
        max_removed=17, frequency=3, per_cut=3, max_cuts=9, group_size=group_size, min_keep=min_keep, momentum=momentum
    )
    for seed in range(5):
        masked = run(IterativeCuts(SIZES, schedule), 7, seed=seed)
        assert masked[-1].sum() < 19 - 7
        for shrink in ((1, 2, 3, 4, 5, 6), (2, 5), (6,)):
            assert torch.equal(run(IterativeCuts(SIZES, schedule), 7, seed=seed, shrink=shrink), masked)


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_layer_keeps_its_floor_and_the_others_pay(group_size):
    """The floor of the weak layer does not use up the cuts: what is asked for goes, but elsewhere."""
    sizes = {"weak": 4, "strong": 12}
    cuts = IterativeCuts(
        sizes, CutSchedule(max_removed=10, frequency=1, per_cut=2, group_size=group_size, momentum=0.0)
    )
    weak, strong = torch.tensor([1e-3, 4e-3, 2e-3, 3e-3]), torch.arange(1.0, 13.0)
    for removed in (2, 4, 6, 8, 10):
        while not cuts.due:
            cuts.add({"weak": weak, "strong": strong})
        keep = cuts.cut()
        assert cuts.removed == removed
        assert keep["weak"].sum() >= 1 and keep["weak"][1]  # its best
    assert keep["weak"].sum() == group_size  # the group of the best stays whole
    assert keep["strong"].nonzero().flatten().tolist() == list(range(6 + group_size, 12))
    assert cuts.finished and not cuts.due


def test_nothing_left_to_cut_is_no_error():
    cuts = IterativeCuts({"a": 2, "b": 3}, CutSchedule(max_removed=100, frequency=1, per_cut=50, min_keep=2))
    made = 0
    while not cuts.finished:
        cuts.add(torch.rand(5))
        if cuts.due:
            keep, made = cuts.cut(), made + 1
    assert [int(k.sum()) for k in keep.values()] == [2, 2] and made == 2  # the second found nothing


def test_negative_scores_do_not_cut_more_than_asked():
    """The authors' zeros of removed channels would rank above them, and every cut take the earlier ones' number too."""
    cuts = IterativeCuts({"a": 20, "b": 20}, CutSchedule(max_removed=12, frequency=1, per_cut=3, momentum=0.5))
    for removed in (3, 6, 9, 12):
        while not cuts.due:
            cuts.add(torch.randn(40))
        cuts.cut()
        assert cuts.removed == removed
    assert cuts.finished


@pytest.mark.parametrize("only", ["b", 1])
def test_only_one_layer(only):
    cuts = IterativeCuts(SIZES, CutSchedule(max_removed=4, frequency=1, per_cut=2, only=only))
    scores = torch.zeros(19)
    scores[6:11] = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    scores[0] = math.nan  # not ranked, so not looked at
    for expected in ([True, False, True, False, True], [True, False, False, False, False]):
        while not cuts.due:
            cuts.add(scores)
        keep = cuts.cut()
        assert keep["a"].all() and keep["c"].all() and keep["b"].tolist() == expected


def test_windows_delay_and_end():
    """frequency + 1 steps first, then frequency; the delay's criteria do not count; nothing after the last cut."""
    cuts = IterativeCuts(
        {"a": 4}, CutSchedule(max_removed=3, frequency=2, per_cut=1, max_cuts=2, start_after=2, momentum=0.5)
    )
    due_at, averages = [], []
    for step in range(1, 12):
        cuts.add(torch.full((4,), float(step)))
        if cuts.due:
            cuts.cut()
            due_at.append(step)
            averages.append(cuts.averaged[-1].item())
    assert due_at == [5, 7] and averages == [4.0, 0.5 * 4 + 0.5 * 6.5] and cuts.finished


def test_a_high_loss_skips_the_cut_and_its_window():
    cuts = IterativeCuts({"a": 4}, CutSchedule(max_removed=3, frequency=2, per_cut=1, loss_threshold=1.0))
    scores, high = torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    for loss in (0.9, torch.tensor(0.9), 1.3):  # mean above 1
        cuts.add(high, loss)
    assert cuts.due and cuts.cut()["a"].all() and cuts.cuts == 0 and cuts.averaged is None
    for loss in (1.25, 0.75):  # mean of exactly 1
        cuts.add(scores, loss)
    assert cuts.due and cuts.cut()["a"].tolist() == [True, False, True, True] and cuts.cuts == 1
    for loss in (math.nan, 0.0):
        cuts.add(scores * math.nan, loss)
    assert cuts.cut()["a"].sum() == 3 and cuts.cuts == 1
    with pytest.raises(ValueError, match="loss of each step is needed"):
        cuts.add(scores)


@pytest.mark.parametrize("at", [0, 3])
def test_resumption_is_exact(at, tmp_path):
    schedule = CutSchedule(max_removed=14, frequency=3, per_cut=3, max_cuts=6, group_size=2)
    plain = run(IterativeCuts(SIZES, schedule), 5, shrink=(2, 4))

    def resume(cuts):
        torch.save(cuts.state_dict(), tmp_path / "cuts.pt")
        state = torch.load(tmp_path / "cuts.pt", weights_only=True)
        again = IterativeCuts(SIZES if cuts.cuts <= at else cuts.sizes, schedule)  # a fresh model, or the shrunk one
        again.load_state_dict(state)
        return again

    assert torch.equal(run(IterativeCuts(SIZES, schedule), 5, shrink=(2, 4), resume=resume), plain)
    with pytest.raises(ValueError, match="expected the state of layers"):
        IterativeCuts({"a": 6, "b": 4, "c": 8}, schedule).load_state_dict(IterativeCuts(SIZES, schedule).state_dict())


def test_steps_between_cuts_read_nothing_back():
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    cuts = IterativeCuts(SIZES, CutSchedule(max_removed=3))
    with NoSync():
        for _ in range(31):
            assert not cuts.due
            cuts.add({name: torch.rand(c).half() for name, c in SIZES.items()}, torch.tensor(0.5))
        with pytest.raises(AssertionError):
            cuts.cut()
    assert cuts._total.dtype == torch.float64  # half criteria are not summed in half


def test_arguments_are_checked():
    schedule = CutSchedule(max_removed=3)
    for bad in ({"frequency": 0}, {"per_cut": 1.5}, {"max_removed": -1}, {"momentum": 1.0}, {"group_size": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CutSchedule(**{"max_removed": 3, **bad})
    with pytest.raises(ValueError, match="per_cut=2 is less than one group of group_size=3"):
        CutSchedule(max_removed=3, per_cut=2, group_size=3)
    with pytest.raises(ValueError, match=r"only='d' is no layer.*Known: a, b, c"):
        IterativeCuts(SIZES, dataclasses.replace(schedule, only="d"))
    with pytest.raises(ValueError, match="only=3, but the layers are numbered 0 to 2"):
        IterativeCuts(SIZES, dataclasses.replace(schedule, only=3))
    with pytest.raises(ValueError, match="at least one layer"):
        IterativeCuts({}, schedule)
    cuts = IterativeCuts(SIZES, schedule)
    with pytest.raises(ValueError, match="no criteria since the last cut"):
        cuts.cut()
    with pytest.raises(ValueError, match=r"expected \(19,\) criteria, got \(18,\)"):
        cuts.add(torch.rand(18))
    with pytest.raises(ValueError, match="expected criteria of"):
        cuts.add({"a": torch.rand(6)})
    cuts.add(torch.full((19,), math.inf))
    with pytest.raises(ValueError, match="a score of a is not finite"):
        cuts.cut()
    with pytest.raises(ValueError, match="a loses channels that no cut removed"):
        cuts.shrink({"a": torch.arange(6) > 0})
    with pytest.raises(ValueError, match=r"expected bool \(6,\) for a"):
        cuts.shrink({"a": torch.ones(5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'aa' is no layer; did you mean 'a'"):
        cuts.shrink({"aa": torch.ones(5, dtype=torch.bool)})


def test_the_authors_configuration(tmp_path):
    (tmp_path / "prune72.json").write_text(json.dumps(README))
    expected = CutSchedule(max_removed=3200, max_cuts=32, loss_threshold=100.0)
    assert load_config(tmp_path / "prune72.json") == load_config(README) == (22, expected, 0)
    assert load_config({**README, "fixed_layer": 2, "seed": 7})[1:] == (dataclasses.replace(expected, only=2), 7)
    assert load_config({**README, "pruning_momentum": -1.0, "use_momentum": True})[1].momentum == 0
    assert load_config({**README, "start_pruning_after_n_iterations": 9})[1].start_after == 9


@pytest.mark.parametrize(
    "config, message",
    [
        ({**README, "frequencey": 3}, "unknown key 'frequencey'; did you mean 'frequency'"),
        ({**README, "push_group_down": True}, r"push_group_down=True \(.*\) is not supported, only False is"),
        ({**README, "do_iterative_pruning": False}, "do_iterative_pruning=False"),
        ({**README, "starting_neuron": 5}, "starting_neuron=5"),
        ({**README, "seed": "x"}, "seed must be an integer, got 'x'"),
        ({"method": 22}, "missing frequency, prune_per_iteration"),
        ("nowhere.json", "cannot read nowhere.json as JSON"),
    ],
)
def test_configurations_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load_config(config)
