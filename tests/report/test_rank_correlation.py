"""Rank correlations: by hand with ties, as scipy has them, what is undefined, and Holm's adjustment by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from distill_jax.report.rank_correlation import rank_correlation


def test_ties_by_hand():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5."""
    found = rank_correlation([1.0, 2.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0], resamples=200, shuffles=999)
    assert found.rho == pytest.approx(4.5 / math.sqrt(4.5 * 5.0)) and found.n == 4
    assert found.ci95[0] <= found.rho <= found.ci95[1]
    # Of the 24 orders, two give this rho and two its negative.
    assert found.p == pytest.approx(4 / 24, abs=0.04)


@pytest.mark.parametrize("seed", range(4))
def test_as_scipy_has_it(seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(6, size=18).astype(float)  # many ties
    y = x + rng.normal(0, 2, size=18)
    found, expected = rank_correlation(x, y, seed=seed), spearmanr(x, y)
    assert found.rho == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue, abs=0.02)  # its t approximation is close at 18


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Rank correlation of bivariate normals with r = .7: 6 / pi * arcsin(.35)."""
    truth, inside = 6 / math.pi * math.asin(0.35), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=25)
        y = 0.7 * x + math.sqrt(1 - 0.49) * rng.normal(size=25)
        low, high = rank_correlation(x, y, resamples=400, shuffles=1).ci95
        inside += low <= truth <= high
    assert inside >= 51  # of 60; 57 on average at 95 %


def test_monotone_and_unrelated():
    rising = rank_correlation(np.arange(8.0), np.exp(np.arange(8.0)), shuffles=9999)
    assert rising.rho == pytest.approx(1.0) and rising.ci95 == (pytest.approx(1.0), pytest.approx(1.0))
    assert rising.p < 0.001
    assert rank_correlation(np.arange(8.0), -np.arange(8.0), shuffles=99).rho == pytest.approx(-1.0)
    again = rank_correlation(np.arange(8.0), np.exp(np.arange(8.0)), shuffles=9999)
    assert again == rising


def test_what_has_no_rank_is_none_and_not_nan():
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None  # three teachers
    assert rank_correlation([2.0] * 6, np.arange(6.0)) is None
    assert rank_correlation(np.arange(6.0), [0.5] * 6) is None
    assert rank_correlation([0.1 + 0.2, 0.3, 0.3, 0.3], np.arange(4.0)) is None  # rounding is no difference
    # One teacher differs: most draws of eight hold it, and those that do not are left out.
    found = rank_correlation([1.0, *[0.0] * 7], np.arange(8.0), shuffles=99)
    assert math.isfinite(found.rho) and None not in found.ci95


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0], "one value and one outcome a teacher"),
        ([1.0, math.nan, 2.0, 3.0], [1.0] * 4, "finite numbers, got NaN or infinity"),
    ],
)
def test_bad_columns(x, y, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(x, y)
