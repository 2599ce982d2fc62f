"""Numbers with intervals: a bootstrap over prompts, paired because all quantities see the same draws.

The texts of one prompt are not independent of each other, so prompts are what is resampled. A draw is a vector of
weights over prompts (how often each was drawn), and a quantity is a function of these weights; two quantities computed
from the same weights are paired, and so is their difference. Most quantities are ratios of sums over prompts, and cost
two matrix products for all draws at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Value:
    """One measured number; V of the schema of `summary.json`.

    Attributes:
      mean: the estimate, None where it is undefined (nothing to measure, a ratio over zero).
      ci95: its 95 % interval; an end is None where it is unknown (a single prompt has no spread).
      n: prompts that it rests on.
      seeds: the number of each training seed alone, None for a single run.
    """

    mean: float | None
    ci95: tuple[float | None, float | None]
    n: int
    seeds: tuple[float, ...] | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return "undefined"
        if None in self.ci95:
            return f"{self.mean:.3g} (n = {self.n})"
        return f"{self.mean:.3g} [{self.ci95[0]:.3g}, {self.ci95[1]:.3g}]"


def undefined(n: int = 0) -> Value:
    """A number that does not exist: no prompt to measure, or a ratio over zero."""
    return Value(None, (None, None), n)


# f64[Q, R] weights of Q prompts in R draws -> f64[R], NaN in draws in which the quantity is undefined.
Statistic = Callable[[np.ndarray], np.ndarray]


@functools.lru_cache(maxsize=4)
def _weights(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """f64[Q, R]: how often each prompt is drawn. Equal arguments give equal draws: that is what pairs quantities."""
    generator = np.random.default_rng([seed, prompts])
    counts = generator.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=resamples)
    return np.ascontiguousarray(counts.T.astype(np.float64))


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """prompts: Q, in one order for all quantities; resamples: R draws; seed: of the draws."""

    prompts: int
    resamples: int = 2000
    seed: int = 0

    def estimate(self, statistic: Statistic, n: int, bounds: tuple[float, float] | None = None) -> Value:
        """The statistic at weights 1, with the percentile interval of its draws (Efron and Tibshirani 1993, 13).

        Args:
          statistic: see `Statistic`.
          n: prompts that carry any of it.
          bounds: for rates of events and their differences, what they cannot leave. One that is the same in all draws
            (512 right answers) gets the exact binomial slack 1 - .025^(1/n), since resampling would say that nothing
            else is possible.

        Returns:
          The value; undefined where the statistic is NaN at weights 1.
        """
        if n == 0:
            return undefined()
        with np.errstate(divide="ignore", invalid="ignore"):
            point = float(statistic(np.ones((self.prompts, 1)))[0])
            draws = np.asarray(statistic(_weights(self.prompts, self.resamples, self.seed)), np.float64)
        if not math.isfinite(point):
            return undefined(n)
        draws = draws[np.isfinite(draws)]
        if bounds is not None and (not draws.size or np.ptp(draws) < 1e-12):
            slack = 1.0 - (0.5 - CONFIDENCE / 2) ** (1.0 / n)
            return Value(point, (max(bounds[0], point - slack), min(bounds[1], point + slack)), n)
        # Undefined in most draws: the interval of the others would be of another quantity.
        if n == 1 or draws.size < self.resamples / 2:
            return Value(point, (None, None), n)
        tail = (1.0 - CONFIDENCE) / 2
        low, high = np.quantile(draws, [tail, 1.0 - tail])
        return Value(point, (min(float(low), point), max(float(high), point)), n)

    def ratio(
        self, numerator: np.ndarray, denominator: np.ndarray, bounds: tuple[float, float] | None = None
    ) -> Value:
        """sum over prompts of numerator / sum of denominator; undefined where the latter is 0.

        Args:
          numerator, denominator: f64[Q]; a prompt that has nothing to say has 0 in both.
        """
        return self.estimate(_ratio(numerator, denominator), _count(numerator, denominator), bounds)

    def difference(
        self,
        first: tuple[np.ndarray, np.ndarray],
        second: tuple[np.ndarray, np.ndarray],
        bounds: tuple[float, float] | None = None,
    ) -> Value:
        """The first ratio of sums minus the second, under the same draws. Each is (numerator, denominator), f64[Q]."""
        a, b = _ratio(*first), _ratio(*second)
        return self.estimate(lambda w: a(w) - b(w), min(_count(*first), _count(*second)), bounds)

    def quotient(self, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> Value:
        """The first rate over the second, under the same draws; undefined where the second is 0.

        Where no draw differs (nothing is ever repaired) the interval is unknown: its width would be 0 with four prompts
        as with a thousand.
        """
        a, b = _ratio(*first), _ratio(*second)
        value = self.estimate(lambda w: a(w) / b(w), min(_count(*first), _count(*second)))
        return value if value.ci95[0] != value.ci95[1] else dataclasses.replace(value, ci95=(None, None))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    return lambda weights: (numerator @ weights) / (denominator @ weights)


def _count(numerator: np.ndarray, denominator: np.ndarray) -> int:
    return int(((numerator != 0) | (denominator != 0)).sum())


def sum_by(index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """f64[size, ...]: out[i] = sum of values[m] over the m with index[m] = i. index: i64[M]; values: [M, ...]."""
    out = np.zeros((size, *values.shape[1:]), np.float64)
    np.add.at(out, index, values.astype(np.float64))
    return out
