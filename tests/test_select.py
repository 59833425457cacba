"""keep_masks, pick and pick_globally against the authors' masks (tests/golden) and against their own promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.select import keep_masks, number_removed, pick, pick_array, pick_arrays_globally, pick_globally

PICKS = np.load(Path(__file__).parent / "golden" / "picks.npz")
GOLDEN = np.load(Path(__file__).parent / "golden" / "rni.npz")
SCORE = {"bn": torch.abs, "sigbn": torch.sigmoid}


def corrected(mask, scores) -> tuple[list[int], bool]:
    """The authors' mask with their floor of three made to hold, and whether it did not.

    They count scores >= threshold and keep those above it, so when the threshold is itself a score two can be left.
    """
    fixed = mask.astype(int)
    fixed[np.argsort(scores)[-3:]] = 1
    return fixed.tolist(), bool(mask.sum() < 3)


@pytest.mark.parametrize("norm", ["bn", "sigbn"])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_authors_masks(norm, scope, ratio):
    scores = {f"bn{i}": SCORE[norm](torch.from_numpy(GOLDEN[f"rni_masks/w{i}"])) for i in range(4)}
    keep = keep_masks(scores, ratio, scope)
    for i in range(4):
        expected, bug = corrected(GOLDEN[f"rni_masks/{norm}/{scope}/p{ratio}/mask{i}"], scores[f"bn{i}"].numpy())
        assert keep[f"bn{i}"].int().tolist() == expected
        assert bug == (scope == "local" and ratio == 0.5 and i == 3)  # five channels: the median is a score


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.8, 0.9])
def test_ties_with_the_threshold(ratio):
    scores = torch.from_numpy(GOLDEN["rni_masks/tie/w"])
    expected, bug = corrected(GOLDEN[f"rni_masks/tie/p{ratio}"], scores.numpy())
    assert keep_masks({"tie": scores}, ratio, "local")["tie"].int().tolist() == expected
    assert bug == (ratio == 0.8)


def test_authors_resnet56():
    sizes = [16] * 9 + [32] * 9 + [64] * 9
    weights = torch.from_numpy(GOLDEN["rni_masks/resnet56_sigbn/bn1"]).split(sizes)
    keep = keep_masks({f"block{i}": w.sigmoid() for i, w in enumerate(weights)}, 0.9)
    assert torch.cat(list(keep.values())).int().tolist() == GOLDEN["rni_masks/resnet56_sigbn/masks_p0.9"].tolist()
    assert [int(k.sum()) for k in keep.values()] == GOLDEN["rni_masks/resnet56_sigbn/kept_p0.9"].tolist()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    st.floats(0.001, 0.999),
    st.sampled_from(["global", "local"]),
    st.integers(1, 5),
)
def test_rule_on_tied_scores(values, ratio, scope, min_keep):
    """The definition again, in NumPy: strictly above the quantile, or among the min_keep best, lower index first."""
    scores = {f"g{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    keep = keep_masks(scores, ratio, scope, min_keep)
    for (name, mask), mine in zip(keep.items(), values, strict=True):
        threshold = np.quantile(np.concatenate(values) if scope == "global" else mine, ratio)
        best = sorted(range(len(mine)), key=lambda i: (-mine[i], i))[:min_keep]
        assert mask.tolist() == [v > threshold or i in best for i, v in enumerate(mine)], name


def test_thresholds_equal_numpy_bit_for_bit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, q = int(rng.integers(1, 40)), float(rng.random())
        values = rng.standard_normal(n)
        # a score equal to the threshold must go, its successor must stay
        threshold = np.quantile(values, q)
        scores = torch.from_numpy(np.append(values, [threshold, np.nextafter(threshold, np.inf)]))
        keep = keep_masks({"all": torch.from_numpy(values), "probe": scores}, {"all": q}, min_keep=1)["all"]
        assert keep.tolist() == [v > threshold or i == values.argmax() for i, v in enumerate(values)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type(dtype):
    scores = {"a": torch.arange(10).to(dtype)}
    assert keep_masks(scores, 0.5)["a"].tolist() == [False] * 5 + [True] * 5


def test_ratio_zero_keeps_everything_and_small_groups_stay_whole():
    scores = {"a": torch.tensor([1.0, 0.0]), "b": torch.rand(8)}
    assert all(k.all() for k in keep_masks(scores, 0.0).values())
    assert keep_masks(scores, 0.99, "local")["a"].all()
    assert keep_masks(scores, 0.99, "local")["b"].sum() == 3
    assert keep_masks({}, 0.5) == {}


def test_infinite_scores_are_ranks_like_others():
    scores = {"a": torch.tensor([float("-inf"), 0.0, 1.0, 2.0, float("inf"), float("inf")])}
    assert keep_masks(scores, 0.5, min_keep=1)["a"].tolist() == [False, False, False, True, True, True]
    assert keep_masks(scores, 0.9, min_keep=1)["a"].tolist() == [False] * 4 + [True, False]  # threshold inf: the first
    assert keep_masks(scores, 0.1, min_keep=1)["a"].tolist() == [False] + [True] * 5


def test_ratios_by_name_and_pattern():
    scores = {name: torch.arange(8.0) for name in ("conv1", "layer1.0.conv1", "layer1.1.conv1", "fc")}
    keep = keep_masks(scores, {"layer1.*": 0.5, "layer1.1.conv1": 0.25, "*": 0.0}, min_keep=1)
    assert {name: int(k.sum()) for name, k in keep.items()} == {
        "conv1": 8, "layer1.0.conv1": 4, "layer1.1.conv1": 6, "fc": 8,
    }  # fmt: skip
    assert keep_masks(scores, {"fc": 0.5})["conv1"].all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: keep_masks(s, 1.0), r"expected 0 <= ratio < 1 .*got 1.0"),
        (lambda s: keep_masks(s, -0.1), r"got -0.1"),
        (lambda s: keep_masks(s, float("nan")), r"got nan"),
        (lambda s: keep_masks(s, "half"), r"got 'half'"),
        (lambda s: keep_masks(s, {"conv1": 2.0}), r"for 'conv1'"),
        (lambda s: keep_masks(s, {"conv2": 0.5}), r"'conv2' matches no group; did you mean 'conv1'\?"),
        (lambda s: keep_masks(s, 0.5, "globl"), r"unknown scope 'globl'; did you mean 'global'\?"),
        (lambda s: keep_masks(s, 0.5, min_keep=0), r"min_keep must be at least 1, got 0"),
        (lambda s: keep_masks(s | {"b": torch.tensor([1.0, float("nan")])}, 0.5), r"NaN scores in b"),
        (lambda s: keep_masks(s | {"b": torch.ones(2, 2)}, 0.5), r"shape \(C,\) for b, got torch.float32 \(2, 2\)"),
        (lambda s: keep_masks(s | {"b": torch.ones(2, dtype=torch.long)}, 0.5), r"floating scores .* got torch.int64"),
        (lambda s: keep_masks(s | {"b": torch.ones(0)}, 0.5), r"shape \(C,\) for b"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call({"conv1": torch.rand(8)})


def removed(keep: torch.Tensor) -> list[int]:
    return (~keep).nonzero().flatten().tolist()


# GReg's own rule stops at n - 1 for a ratio of 1, which no method of ours takes
FIXTURES = [k for k in PICKS.files if "/pr" in k and not k.endswith("pr1.0")]


@pytest.mark.parametrize("key", FIXTURES)
def test_authors_picks(key):
    limit, _, order, ratio = key.split("/")
    scores = torch.from_numpy(PICKS[f"{limit}/pick/score16"])
    keep = pick(scores, float(ratio.removeprefix("pr")), order, limit)
    assert removed(keep) == sorted(PICKS[key].tolist())


def test_every_authors_pick_is_there():
    assert len(FIXTURES) == 7 * 3 + 7 * 2  # TPP: three orders; GReg: two


@pytest.mark.parametrize("ratio, size, greg, tpp", [
    (0.0, 64, 0, 0), (0.1, 64, 7, 7), (0.5, 64, 32, 32), (0.07, 100, 8, 8), (0.999, 64, 63, 63),
    (0.999, 1000, 999, 995), (0.5, 1, 0, 0), (0.01, 2, 1, 1), (0.9, 16, 15, 15),
])  # fmt: skip
def test_number_removed(ratio, size, greg, tpp):
    assert (number_removed(ratio, size), number_removed(ratio, size, "tpp")) == (greg, tpp)


def test_equal_scores_go_by_index_and_random_ones_by_seed():
    tied = torch.zeros(40)
    assert removed(pick(tied, 0.1)) == [0, 1, 2, 3]
    assert removed(pick(tied, 0.1, "max")) == [36, 37, 38, 39]
    for seed in (42, 7):
        expected = np.random.RandomState(seed).permutation(40)[:4]
        assert removed(pick(torch.rand(40), 0.1, "rand", seed=seed)) == sorted(expected.tolist())


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    st.floats(0, 0.999),
    st.sampled_from(["min", "max", "rand"]),
    st.integers(1, 5),
)
def test_global_picks(values, ratio, order, min_keep):
    """The definition again: one after the other goes, unless its group is at its floor."""
    scores = {f"g{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    keep = pick_globally(scores, ratio, order, min_keep, seed=3)
    everything = [(v, g, i) for g, mine in enumerate(values) for i, v in enumerate(mine)]
    ranked = sorted(range(len(everything)), key=lambda at: everything[at][0])
    if order == "max":
        ranked = ranked[::-1]
    elif order == "rand":
        ranked = np.random.RandomState(3).permutation(len(everything)).tolist()
    left, gone = [len(mine) for mine in values], set()
    for at in ranked:
        _, g, i = everything[at]
        if len(gone) < math.ceil(ratio * len(everything)) and left[g] > min_keep:
            left[g] -= 1
            gone.add((g, i))
    assert {(g, i) for g in range(len(values)) for i in removed(keep[f"g{g}"])} == gone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_picks_take_every_float_type(dtype):
    scores = torch.arange(10).to(dtype)
    assert removed(pick(scores, 0.5)) == removed(pick_globally({"a": scores}, 0.5)["a"]) == [0, 1, 2, 3, 4]
    assert pick_globally({}, 0.5) == {}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: pick(s, 1.0), r"expected 0 <= ratio < 1 .*got 1.0"),
        (lambda s: pick(s, 0.5, "lowest"), r"pick: unknown order 'lowest'"),
        (lambda s: pick(s, 0.5, limit="grag"), r"unknown limit 'grag'; did you mean 'greg'\?"),
        (lambda s: pick(s.reshape(2, 4), 0.5), r"shape \(C,\) for scores, got torch.float32 \(2, 4\)"),
        (lambda s: pick(s.long(), 0.5), r"floating scores .* got torch.int64"),
        (lambda s: pick(s / 0 * 0, 0.5), r"NaN scores in scores"),
        (lambda s: pick_globally({"a": s, "b": s * float("nan")}, 0.5), r"NaN scores in b"),
        (lambda s: pick_globally({"a": s}, 1.5), r"pick_globally: expected 0 <= ratio < 1 .*got 1.5"),
        (lambda s: pick_globally({"a": s}, 0.5, min_keep=0), r"min_keep must be at least 1, got 0"),
    ],
)
def test_errors_of_picks_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(8))


@pytest.mark.parametrize("order", ["min", "max", "rand"])
def test_arrays_are_picked_like_tensors(order):
    rng = np.random.default_rng(0)
    for size, ratio, least in ((1, 0.9, 1), (7, 0.5, 2), (40, 0.07, 1), (40, 0.97, 3)):
        scores = {name: rng.integers(0, 6, n).astype(float) for name, n in (("a", size), ("b", 5), ("c", 30))}  # ties
        tensors = {name: torch.from_numpy(score) for name, score in scores.items()}
        keep = pick_arrays_globally(scores, ratio, order, least, seed=3)
        for name, mask in pick_globally(tensors, ratio, order, least, seed=3).items():
            assert torch.from_numpy(keep[name]).equal(mask)
        for limit in ("greg", "tpp"):
            one = pick_array(scores["a"], ratio, order, limit, 3, least)
            assert torch.from_numpy(one).equal(pick(tensors["a"], ratio, order, limit, 3, least))
    scores["b"][1] = np.nan
    with pytest.raises(ValueError, match="pick_globally: NaN scores in b"):
        pick_arrays_globally(scores, 0.5)
