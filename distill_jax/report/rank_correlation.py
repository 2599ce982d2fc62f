"""Spearman's rank correlation for a few dozen teachers: ties, an interval, and p-values for many numbers at once.

    rho = Pearson correlation of the ranks, ties sharing their mean rank

Interval: percentiles of rho over teachers drawn with replacement. p: two-sided permutation test, outcomes shuffled over
the teachers, (1 + shuffles at least as extreme) / (1 + shuffles); no normal distribution is assumed. Many numbers are
tried, and some look good by luck: what is below .05 after `statistics.holm` is so with all of them looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

FEWEST = 4  # teachers below which nothing is said
RESAMPLES = 2000
SHUFFLES = 19_999  # so that the smallest p, times a hundred numbers, is still below .01
_ROUNDING = 1e-9
_TAIL = 0.025


@dataclasses.dataclass(frozen=True)
class Correlation:
    """rho: -1 to 1. ci95: its interval, ends None where most draws leave it undefined. p: see the head. n: teachers."""

    rho: float
    ci95: tuple[float | None, float | None]
    p: float
    n: int


def rank_correlation(
    values: Sequence[float] | np.ndarray,
    outcomes: Sequence[float] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> Correlation | None:
    """Spearman's rho of two columns; see the head of this file.

    Args:
      values, outcomes: f64[N], one teacher a place.
      resamples, shuffles, seed: of bootstrap and permutation test; equal seeds and N give equal draws.

    Returns:
      None where it is undefined: fewer than `FEWEST` teachers, or a column that is the same everywhere.

    Raises:
      ValueError: columns of other lengths, or a number that is not finite.
    """
    x, y = (np.asarray(column, np.float64) for column in (values, outcomes))
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"expected one value and one outcome a teacher, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("expected finite numbers, got NaN or infinity; leave teachers without a number out")
    count = len(x)
    if count < FEWEST or is_constant(x) or is_constant(y):
        return None
    own = _standard(rankdata(x)[None])[0]
    rho = float(np.clip(own @ _standard(rankdata(y)[None])[0], -1.0, 1.0))
    drawn, of_drawn, shuffled = _draws(tuple(y.tolist()), resamples, shuffles, seed)
    draws = (_standard(rankdata(x[drawn], axis=1)) * of_drawn).sum(axis=1)
    draws = draws[np.isfinite(draws)]
    ends: tuple[float | None, float | None] = (None, None)
    if draws.size >= resamples / 2:
        low, high = np.clip(np.quantile(draws, [_TAIL, 1.0 - _TAIL]), -1.0, 1.0)
        ends = (min(float(low), rho), max(float(high), rho))
    extreme = np.abs(shuffled @ own) >= abs(rho) - _ROUNDING
    return Correlation(rho, ends, (1 + int(extreme.sum())) / (1 + shuffles), count)


@functools.lru_cache(maxsize=4)
def _draws(
    outcomes: tuple[float, ...], resamples: int, shuffles: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What all numbers of the same teachers share.

    Returns:
      (i64[R, N] teachers of each bootstrap draw, f64[R, N] standardised ranks of their outcomes, f64[P, N] standardised
      ranks of the outcomes, shuffled).
    """
    y, generator = np.array(outcomes), np.random.default_rng([seed, len(outcomes)])
    drawn = generator.integers(len(y), size=(resamples, len(y)))
    ranks = _standard(rankdata(y)[None])
    shuffled = generator.permuted(np.broadcast_to(ranks, (shuffles, len(y))), axis=1)
    return drawn, _standard(rankdata(y[drawn], axis=1)), shuffled


def is_constant(values: np.ndarray) -> bool:
    """Whether a column is the same everywhere, up to rounding."""
    return bool(np.ptp(values) <= _ROUNDING * max(1.0, float(np.abs(values).max())))


def _standard(matrix: np.ndarray) -> np.ndarray:
    """Rows f64[R, N] with mean 0 and length 1, so that products are correlations; NaN where a row is constant."""
    away = matrix - matrix.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return away / np.sqrt((away**2).sum(axis=1, keepdims=True))
