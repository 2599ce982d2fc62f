"""Intervals for accuracies: a bootstrap over seeds and problems, paired between arms.

Every number of the report is a mean of a matrix `correct[S, N]` (S training seeds, N test problems) or a
difference or ratio of two such means on the same problems. Seeds and problems are *crossed* (each seed answers
each problem), so a resample draws S seeds and N problems, independently, and reads the sub-matrix. Two arms are
compared under the same draws: the difficulty of a problem, and the luck of a seed, then cancel.

Two corrections keep the interval honest where the textbook percentile bootstrap is too narrow:

* **Few seeds.** Resampling S values underestimates their variance by (S-1)/S and ignores the heavy tails of a
  t distribution with S-1 degrees of freedom; with S = 3 that is a factor of 2.7. The drawn seed weights are
  therefore stretched around 1/S by sqrt(S/(S-1)) * t_{S-1}(.975) / z(.975)  (the idea of Hesterberg 2015,
  "What teachers should know about the bootstrap"), and shrunk by sqrt(1 - MS_error / MS_seed), the
  share of the spread between seeds that is more than the noise of single answers (two-way analysis of variance).
* **No variation.** Resampling 512 right answers says [1, 1]. A constant matrix is resampled from the
  distribution whose 2.5 % point is the exact binomial bound .025^(1/N) instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from typing import TypedDict, TypeVar

import numpy as np
from scipy import special, stats

Name = TypeVar("Name", bound=Hashable)
CONFIDENCE = 0.95
RESAMPLES = 4000


class Value(TypedDict):
    """One number of `summary.json`, V of the schema.

    mean: the point estimate, None when it is undefined (a ratio over zero).
    ci95: the 95 % interval; an end is None when it is unbounded or undefined.
    n: number of problems. seeds: the same number for each seed alone, None for a single run.
    """

    mean: float | None
    ci95: list[float | None]
    n: int
    seeds: list[float] | None


@functools.lru_cache(maxsize=4)
def _problem_weights(problems: int, resamples: int, seed: int) -> np.ndarray:
    """Weights f64[N, R] of bootstrap draws of N problems; the same for every matrix with N columns."""
    generator = np.random.default_rng([seed, 1, problems])
    counts = generator.multinomial(problems, np.full(problems, 1.0 / problems), size=resamples)
    return np.ascontiguousarray(counts.T / problems)


@functools.lru_cache(maxsize=4)
def _seed_weights(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """Weights f64[S, R] of bootstrap draws of S seeds."""
    generator = np.random.default_rng([seed, 2, seeds])
    counts = generator.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=resamples)
    return np.ascontiguousarray(counts.T / seeds)


def check_matrix(correct, name: str) -> np.ndarray:
    matrix = np.asarray(correct, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{name}: expected a non-empty matrix [seeds, problems], got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity; leave missing answers out")
    return matrix


def _seed_stretch(matrix: np.ndarray) -> float:
    """Factor on the deviations of the drawn seed weights from 1/S; see the head of this file."""
    seeds, problems = matrix.shape
    seed_deviation = matrix.mean(axis=1) - matrix.mean()
    mean_square_seed = problems * np.square(seed_deviation).sum() / (seeds - 1)
    if mean_square_seed == 0.0:
        return 0.0
    true_share = 1.0
    if problems > 1:
        residual = (
            matrix - matrix.mean(axis=1, keepdims=True) - matrix.mean(axis=0, keepdims=True) + matrix.mean()
        )
        mean_square_error = np.square(residual).sum() / ((seeds - 1) * (problems - 1))
        true_share = max(0.0, 1.0 - mean_square_error / mean_square_seed)
    upper = 0.5 + CONFIDENCE / 2
    heavy_tail = stats.t.ppf(upper, seeds - 1) / stats.norm.ppf(upper)
    return math.sqrt(true_share * seeds / (seeds - 1)) * heavy_tail


def _constant_draws(
    value: float, low: float, high: float, problems: int, resamples: int, key: list[int]
) -> np.ndarray:
    """Draws f64[R] around a constant matrix: all N answers equal still leaves a rate of others up to 1 - .025^(1/N)."""
    generator = np.random.default_rng(key)
    slack = 1.0 - generator.random(resamples) ** (1.0 / problems)
    if value <= low:
        return low + slack
    if value >= high:
        return high - slack
    return value + slack * generator.choice([-1.0, 1.0], size=resamples)


def mean_draws(
    matrix: np.ndarray, bounds: tuple[float, float] | None, resamples: int, seed: int, stream: int = 0
) -> np.ndarray:
    """Bootstrap draws f64[R] of the mean of `matrix` f64[S, N]; equal (shape, seed) means equal draws of indices."""
    seeds, problems = matrix.shape
    if bounds is not None and np.ptp(matrix) == 0.0:
        return _constant_draws(matrix[0, 0], *bounds, problems, resamples, [seed, 3, problems, stream])
    seed_means = matrix @ _problem_weights(problems, resamples, seed)
    if seeds == 1:
        return seed_means[0]
    weights = 1.0 / seeds + _seed_stretch(matrix) * (_seed_weights(seeds, resamples, seed) - 1.0 / seeds)
    draws = np.einsum("sr,sr->r", weights, seed_means)
    return draws if bounds is None else np.clip(draws, *bounds)


def _interval(point: float, draws: np.ndarray) -> list[float | None]:
    """Percentile interval that always holds the point estimate; infinite ends become None."""
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail], method="inverted_cdf")
    ends = (min(float(low), point), max(float(high), point))
    return [end if math.isfinite(end) else None for end in ends]


def value_of(point: float, draws: np.ndarray, problems: int, seeds: list[float] | None) -> Value:
    return {"mean": float(point), "ci95": _interval(float(point), draws), "n": problems, "seeds": seeds}


def _per_seed(numbers: np.ndarray) -> list[float] | None:
    return None if len(numbers) == 1 else [float(number) for number in numbers]


def estimate(correct, *, bounded: bool = True, resamples: int = RESAMPLES, seed: int = 0) -> Value:
    """Mean of `correct` with a 95 % interval over seeds and problems.

    Args:
      correct: f64[S, N], right (1) or wrong (0), or a share between them; S = 1 (a teacher, one run) resamples
        problems alone. With `bounded=False` any finite numbers (bytes, nats).
      bounded: the numbers lie in [0, 1], and so does the interval.
      resamples: number of bootstrap draws. seed: of the draws; equal seeds give equal intervals.

    Raises:
      ValueError: not a non-empty finite matrix, or `bounded` and a number outside [0, 1].
    """
    matrix = check_matrix(correct, "correct")
    if bounded and (matrix.min() < 0.0 or matrix.max() > 1.0):
        raise ValueError(f"correct: expected numbers in [0, 1], got {matrix.min():g} to {matrix.max():g}")
    draws = mean_draws(matrix, (0.0, 1.0) if bounded else None, resamples, seed)
    return value_of(matrix.mean(), draws, matrix.shape[1], _per_seed(matrix.mean(axis=1)))


def _pair(first, second) -> tuple[np.ndarray, np.ndarray]:
    a, b = check_matrix(first, "first"), check_matrix(second, "second")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"expected both arms on the same problems, got {a.shape[1]} and {b.shape[1]} columns; "
            "keep the problems that both arms answered, in the same order"
        )
    return a, b


def difference(first, second, *, resamples: int = RESAMPLES, seed: int = 0) -> Value:
    """mean(first) - mean(second), paired by problem, and by seed when both have the same number of seeds.

    Args:
      first: f64[S1, N] in [0, 1]. second: f64[S2, N] in [0, 1]; column n is the same problem in both.

    Returns:
      Value; `seeds` holds the difference seed by seed when S1 = S2 > 1, else None.

    Raises:
      ValueError: shapes that cannot be paired, or numbers that are not finite.
    """
    a, b = _pair(first, second)
    bounds = (-1.0, 1.0)
    if a.shape[0] == b.shape[0]:
        draws = mean_draws(a - b, bounds, resamples, seed)
        per_seed = _per_seed(a.mean(axis=1) - b.mean(axis=1))
    else:
        draws = mean_draws(a, (0.0, 1.0), resamples, seed, 0) - mean_draws(b, (0.0, 1.0), resamples, seed, 1)
        per_seed = None
    return value_of(a.mean() - b.mean(), draws, a.shape[1], per_seed)


def ratio(first, second, *, resamples: int = RESAMPLES, seed: int = 0) -> Value:
    """mean(first) / mean(second), paired by problem, and by seed when both have the same number of seeds.

    A zero denominator is an answer, not an accident: when mean(second) = 0 the ratio is undefined and the mean and
    both ends are None. When only some draws have a zero denominator they count as infinite (0/0 is left out), so
    an end that falls among them is None: unbounded.

    Args and Raises as `difference`. `seeds` is None when any seed's own denominator is zero.
    """
    a, b = _pair(first, second)
    problems = a.shape[1]
    if b.mean() == 0.0:
        return {"mean": None, "ci95": [None, None], "n": problems, "seeds": None}
    above = mean_draws(a, (0.0, 1.0), resamples, seed, 0)
    below = mean_draws(b, (0.0, 1.0), resamples, seed, 1)
    kept = (above > 0.0) | (below > 0.0)
    with np.errstate(divide="ignore"):
        draws = above[kept] / below[kept]
    seed_below = b.mean(axis=1)
    per_seed = None
    if a.shape[0] == b.shape[0] and (seed_below > 0.0).all():
        per_seed = _per_seed(a.mean(axis=1) / seed_below)
    return value_of(a.mean() / b.mean(), draws, problems, per_seed)


def minimum_detectable_effect(
    problems: int, rate: float = 0.5, correlation: float = 0.0, power: float = 0.8
) -> float:
    """Smallest true difference of two accuracies that a paired test on N problems finds with the given power.

    (z(.975) + z(power)) * sqrt(2 p (1-p) (1-rho) / N), for one seed a side; Cohen 1988, normal approximation.

    Args:
      problems: N. rate: p, where the accuracies lie. correlation: rho between the two arms' answers.
      power: probability of finding the difference.

    Raises:
      ValueError: a number outside its range.
    """
    if problems < 1:
        raise ValueError(f"problems: expected at least 1, got {problems}")
    if not 0.0 <= rate <= 1.0 or not -1.0 <= correlation <= 1.0 or not 0.0 < power < 1.0:
        raise ValueError(
            "expected rate in [0, 1], correlation in [-1, 1] and power in (0, 1), "
            f"got {rate}, {correlation} and {power}"
        )
    quantiles = special.ndtri(0.5 + CONFIDENCE / 2) + special.ndtri(power)
    return float(quantiles * math.sqrt(2.0 * rate * (1.0 - rate) * (1.0 - correlation) / problems))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p-values (S. Holm 1979): name -> the level at which "this one works" holds among all of them."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * value))
        adjusted[name] = largest
    return adjusted
