"""Numbers of the attack suite, each with an interval: paired bootstrap over student seeds and problems.

With m, c and b the accuracies of students of the attacked teacher, of the clean teacher under the same attack, and of
the untrained student, all on the same problems:

    gain            m - b
    recovered gap   (m - b) / (c - b)      0: nothing was learned, 1: the defence is useless; below 0 it did harm
    absolute gap    (m - b) / (t - b)      t the clean teacher itself
    collapse        1 - m / c
    gain denied     1 - max(0, m* - b) / (c* - b), the best attack on either side

The draws are those of `report.statistics`: seeds and problems are resampled independently and every arm is read under
the same draw, so the difficulty of a problem and the luck of a seed cancel. One calibration of each teacher is what a
run has: the intervals do not hold the luck of a calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from scipy import stats

from distill_jax.report.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Value,
    check_matrix,
    difference,
    mean_draws,
    ratio,
    value_of,
)

UNDEFINED: Value = {"mean": None, "ci95": [None, None], "n": 0, "seeds": None}


def _above(matrix, base) -> np.ndarray:
    """f64[S, N]: answers minus those of the untrained student, problem by problem."""
    first, zero = check_matrix(matrix, "students"), check_matrix(base, "base")
    if zero.shape != (1, first.shape[1]):
        raise ValueError(
            f"base: expected one row on the same {first.shape[1]} problems, got shape {zero.shape}"
        )
    return first - zero


def gain(students, base, *, resamples: int = RESAMPLES, seed: int = 0) -> Value:
    """m - b. students: f64[S, N]; base: f64[1, N], the untrained student on the same problems."""
    above = _above(students, base)
    draws = mean_draws(above, (-1.0, 1.0), resamples, seed)
    seeds = None if len(above) == 1 else [float(mean) for mean in above.mean(axis=1)]
    return value_of(above.mean(), draws, above.shape[1], seeds)


def gain_p_value(students, base, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """One-sided p-value of "these students are no better than the untrained one", from the bootstrap of the gain."""
    draws = mean_draws(_above(students, base), (-1.0, 1.0), resamples, seed)
    return float((1 + np.count_nonzero(draws <= 0.0)) / (1 + len(draws)))


def worse_p_value(more, less, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """One-sided p-value of "the first students are no worse than the second", paired by problem, and by seed where both
    have as many, from the bootstrap of the difference. more: f64[S, N]; less: f64[S', N]."""
    a, b = check_matrix(more, "more"), check_matrix(less, "less")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected the same problems on both sides, got {a.shape} and {b.shape}")
    if len(a) == len(b):
        draws = mean_draws(a - b, (-1.0, 1.0), resamples, seed)
    else:
        draws = mean_draws(a, (0.0, 1.0), resamples, seed, 0) - mean_draws(b, (0.0, 1.0), resamples, seed, 1)
    return float((1 + np.count_nonzero(draws >= 0.0)) / (1 + len(draws)))


def recovered_gap(students, clean, base, *, resamples: int = RESAMPLES, seed: int = 0) -> Value:
    """(m - b) / (c - b), paired by problem and, where both have as many, by seed.

    A clean gain that is not positive leaves nothing to recover: the value is undefined. A draw in which it is not
    counts as infinite with the sign of the gain, so that an end that falls among such draws is unbounded.

    Args:
      students: f64[S, N]. clean: f64[S', N], the same attack on the clean teacher. base: f64[1, N].

    Raises:
      ValueError: shapes that cannot be paired, or numbers that are not finite.
    """
    above, below = _above(students, base), _above(clean, base)
    problems = above.shape[1]
    if below.mean() <= 0.0:
        return {**UNDEFINED, "n": problems}
    gained = mean_draws(above, (-1.0, 1.0), resamples, seed, 0)
    possible = mean_draws(below, (-1.0, 1.0), resamples, seed, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(possible > 0.0, gained / possible, np.where(gained > 0.0, np.inf, -np.inf))
    seeds = None
    if above.shape == below.shape and len(above) > 1 and (below.mean(axis=1) > 0.0).all():
        seeds = [float(value) for value in above.mean(axis=1) / below.mean(axis=1)]
    return value_of(above.mean() / below.mean(), draws, problems, seeds)


def relative_collapse(students, clean, *, resamples: int = RESAMPLES, seed: int = 0) -> Value:
    """1 - m / c; undefined where the clean teacher's students answer nothing right."""
    found = ratio(students, clean, resamples=resamples, seed=seed)
    if found["mean"] is None:
        return found
    low, high = found["ci95"]
    return {
        "mean": 1.0 - found["mean"],
        "ci95": [None if high is None else 1.0 - high, None if low is None else 1.0 - low],
        "n": found["n"],
        "seeds": None if found["seeds"] is None else [1.0 - value for value in found["seeds"]],
    }


def gain_denied(best, best_clean, base, *, resamples: int = RESAMPLES, seed: int = 0) -> Value:
    """1 - max(0, m* - b) / (c* - b): what the best attack on the clean teacher gains and the best on this one does not.

    An attacker may always keep the untrained student, so harm beyond that denies nothing more.
    """
    found = recovered_gap(best, best_clean, base, resamples=resamples, seed=seed)
    if found["mean"] is None:
        return found
    low, high = found["ci95"]  # an unbounded end below 0 denies everything, one above leaves the value open
    return {
        "mean": 1.0 - max(0.0, found["mean"]),
        "ci95": [None if high is None else 1.0 - max(0.0, high), 1.0 - max(0.0, low or 0.0)],
        "n": found["n"],
        "seeds": None,
    }


class Share(TypedDict):
    """A share of a few seeds: count of total, with the exact binomial interval."""

    count: int
    total: int
    ci95: list[float]


def harm_below_base(students, base) -> Share:
    """Seeds whose student is worse than the untrained one."""
    below = int(np.count_nonzero(_above(students, base).mean(axis=1) < 0.0))
    total = len(np.asarray(students))
    ends = stats.binomtest(below, total).proportion_ci(CONFIDENCE, method="exact")
    return {"count": below, "total": total, "ci95": [float(ends.low), float(ends.high)]}


class Retention(TypedDict):
    """A teacher against the clean one. p_value: one-sided, of "it lost at least the margin"."""

    ratio: Value
    difference: Value
    margin: float
    p_value: float
    not_inferior: bool


def teacher_retention(
    teacher, clean, margin: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> Retention:
    """Accuracy relative to the clean teacher's, and a paired test that less than `margin` was lost.

    The test: t of d + margin over problems, d the difference of the two answers to a problem. Where all d are 0 it is
    exact: N problems without one that was lost would have probability (1 - margin)^N.

    Args:
      teacher, clean: f64[1, N] on the same problems. margin: fixed beforehand, e.g. 0.01.

    Raises:
      ValueError: a margin outside (0, 1), more than one row, or other shapes that cannot be paired.
    """
    a, b = check_matrix(teacher, "teacher"), check_matrix(clean, "clean")
    if not 0.0 < margin < 1.0 or len(a) != 1 or a.shape != b.shape:
        raise ValueError(
            f"expected a margin in (0, 1) and one row each on the same problems, got {margin}, {a.shape}, {b.shape}"
        )
    lost = (a - b)[0]
    if np.ptp(lost) == 0.0:
        p_value = (1.0 - margin) ** lost.size if lost[0] >= 0.0 else 1.0
    else:
        p_value = float(stats.ttest_1samp(lost, -margin, alternative="greater").pvalue)
    return {
        "ratio": ratio(a, b, resamples=resamples, seed=seed),
        "difference": difference(a, b, resamples=resamples, seed=seed),
        "margin": margin,
        "p_value": p_value,
        "not_inferior": p_value < (1.0 - CONFIDENCE) / 2,
    }


class Cost(TypedDict):
    """Training steps that reach a fixed score, as multiples of the default budget.

    Attributes:
      score: the accuracy that is to be reached. clean, defended: budgets that reach it; None: the largest does not.
      multiplier: defended / clean; a mean of None says that the defended one is not reached: `at_least` bounds it.
      at_least: largest budget tried / clean, where the defended one is not reached; None else.
      first: the clean teacher's students reach the score at the smallest budget already: they may need less.
    """

    score: float
    clean: float | None
    defended: float | None
    multiplier: Value
    at_least: float | None
    first: bool


def cost_multiplier(
    defended: Mapping[float, np.ndarray],
    clean: Mapping[float, np.ndarray],
    score: float,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Cost:
    """How many times the budget students of the defended teacher need for the score that the clean one's reach.

    Between two budgets the accuracy is taken as linear in log(budget). A draw that does not reach the score counts as
    infinite: an end that falls among them is unbounded.

    Args:
      defended, clean: budget -> f64[S, N], at least two budgets, the same problems everywhere.

    Raises:
      ValueError: fewer than two budgets on a side.
    """
    if min(len(defended), len(clean)) < 2:
        raise ValueError(f"expected two or more budgets a side, got {sorted(defended)} and {sorted(clean)}")

    def needed(curve: Mapping[float, np.ndarray], stream: int) -> tuple[float, np.ndarray]:
        budgets = sorted(curve)
        points = np.array([[np.mean(curve[budget])] for budget in budgets])
        draws = np.stack(
            [mean_draws(curve[budget], (0.0, 1.0), resamples, seed, stream) for budget in budgets]
        )
        return float(first_crossing(budgets, points, score)[0]), first_crossing(budgets, draws, score)

    clean_point, clean_draws = needed(clean, 0)
    point, draws = needed(defended, 1)
    kept = np.isfinite(clean_draws)
    problems = next(iter(clean.values())).shape[1]
    multiplier: Value = {**UNDEFINED, "n": problems}
    if math.isfinite(clean_point) and math.isfinite(point) and kept.any():
        multiplier = value_of(point / clean_point, draws[kept] / clean_draws[kept], problems, None)
    unreached = math.isfinite(clean_point) and not math.isfinite(point)
    return {
        "score": score,
        "clean": clean_point if math.isfinite(clean_point) else None,
        "defended": point if math.isfinite(point) else None,
        "multiplier": multiplier,
        "at_least": max(defended) / clean_point if unreached else None,
        "first": clean_point <= min(clean),
    }


def first_crossing(budgets: Sequence[float], accuracies: np.ndarray, score: float) -> np.ndarray:
    """f64[R]: the first budget at which a curve reaches the score, infinite where none does.

    budgets: ascending, positive. accuracies: f64[len(budgets), R].
    """
    logs = np.log(np.asarray(budgets, np.float64))
    found = np.full(accuracies.shape[1], np.inf)
    for place in range(len(budgets) - 1, 0, -1):
        low, high = accuracies[place - 1], accuracies[place]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (score - low) / (high - low)
        between = np.exp(logs[place - 1] + np.clip(share, 0.0, 1.0) * (logs[place] - logs[place - 1]))
        found = np.where((low < score) & (high >= score), between, found)
    return np.where(accuracies[0] >= score, budgets[0], found)


def choose_worst(validation_gaps: Mapping[str, float]) -> str | None:
    """The attack with the largest recovered gap on validation problems; None without any."""
    return max(validation_gaps, key=lambda name: validation_gaps[name], default=None)
