"""keep_masks against the authors' masks (tests/golden/rni.npz) and against its own promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.select import keep_masks

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
