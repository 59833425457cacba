"""Correlations against scipy.stats and against the definition."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # comes with scikit-learn

from fastprune.correlation import kendall, pearson, spearman

PAIRS = {pearson: stats.pearsonr, spearman: stats.spearmanr, kendall: stats.kendalltau}
EACH = pytest.mark.parametrize("ours, theirs", PAIRS.items(), ids=[f.__name__ for f in PAIRS])


def scipys(theirs, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input
        return theirs(x.double().numpy(), y.double().numpy()).statistic


@EACH
@pytest.mark.parametrize("n", [2, 3, 17, 1000])
@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_as_scipy(ours, theirs, n, levels, dtype):
    x = torch.randn(n)
    y = 0.5 * x + torch.randn(n)
    if levels:
        x, y = (t.mul(levels).clamp(-levels, levels).round() for t in (x, y))
    x, y = x.to(dtype), y.to(dtype)
    assert ours(x, y) == pytest.approx(scipys(theirs, x, y), rel=1e-12, abs=1e-13, nan_ok=True)


@EACH
@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_ties_of_every_kind(ours, theirs, data):
    x, y = torch.tensor(data).T
    assert ours(x, y) == pytest.approx(scipys(theirs, x, y), rel=1e-12, abs=1e-13, nan_ok=True)


def test_kendall_is_the_count_of_pairs():
    x, y = torch.randint(0, 9, (2, 60)).double()
    sx, sy = ((t[:, None] - t[None]).sign() for t in (x, y))
    assert kendall(x, y) == pytest.approx(
        (sx * sy).sum().item() / math.sqrt(sx.abs().sum() * sy.abs().sum()), rel=1e-14
    )


@EACH
def test_the_ends_and_the_middle(ours, theirs):
    x = torch.linspace(1e200, 9e200, 50, dtype=torch.float64)  # squares overflow
    assert ours(x, x) == pytest.approx(1, abs=1e-15) and ours(x, -x) == pytest.approx(-1, abs=1e-15)
    assert abs(ours(x, x)) <= 1
    assert math.isnan(ours(x, torch.full((50,), 0.1))) and math.isnan(ours(torch.full((50,), 0.1), x))
    if ours is not pearson:
        assert ours(torch.tensor([-math.inf, 0.0, math.inf]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(1)
        assert ours(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])) == pytest.approx(1)  # one tie


@EACH
def test_errors_in_words(ours, theirs):
    x = torch.rand(4)
    with pytest.raises(ValueError, match=r"two vectors of one length, got \(4,\) and \(3,\)"):
        ours(x, x[:3])
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2, 2\)"):
        ours(x.view(2, 2), x.view(2, 2))
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        ours(x[:1], x[:1])
    with pytest.raises(ValueError, match="NaN in y"):
        ours(x, x.log().mul(math.nan))
    with pytest.raises(ValueError, match=r"numbers in x, got torch\.bool"):
        ours(x > 0, x)
    if ours is pearson:
        with pytest.raises(ValueError, match="x has infinite values"):
            ours(x / 0, x)
