"""How well a score tells two kinds apart: the ROC curve, its area, and an interval that holds for a few dozen models.

    AUC = P[ score(positive) > score(negative) ] + P[ equal ] / 2

the area under the curve and, at the same time, the Mann-Whitney statistic over m n. Neither a bootstrap nor DeLong's
variance knows anything about a score that separates the sample at hand perfectly: their interval is [1, 1] with three
models as with three hundred. Newcombe's does: it holds every theta with

    |AUC - theta| <= z sqrt(V(theta)),
    V(theta) = theta (1 - theta) [1 + k (1 - theta)/(2 - theta) + k theta/(1 + theta)] / (m n),   k = (m + n)/2 - 1

Source: Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5; V is that of Hanley and McNeil, Radiology 143
(1982) 29-36, for equal groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, rankdata

from distill_jax.probes.values import CONFIDENCE


class Roc(NamedTuple):
    """What `roc` returns.

    fpr, tpr: f64[K], false and true alarms as the threshold falls; from (0, 0) to (1, 1), one step a distinct score.
    auc: area under the curve. ci95: its interval.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    auc: float
    ci95: tuple[float, float]


def roc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> Roc:
    """The curve of a score that is meant to be higher for positives; see the head of this file.

    Args:
      scores: f64[N]; models with equal scores raise the alarm together.
      labels: bool[N], True for a positive.

    Raises:
      ValueError: columns of other lengths, a score that is not finite, labels that are not yes or no, or only one kind.
    """
    values, raw = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != raw.shape:
        raise ValueError(f"expected one score and one label a model, got {values.shape} and {raw.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, got {values[~np.isfinite(values)][0]}")
    positive = raw.astype(bool)
    if not np.array_equal(positive, raw):
        raise ValueError(f"labels are True or False (1 or 0), got {raw.tolist()}")
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        raise ValueError(f"a ROC needs both kinds; got {m} positives and {n} negatives")
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    tpr, fpr = (np.append(0.0, np.cumsum(of[order])[last] / of.sum()) for of in (positive, ~positive))
    area = (rankdata(values)[positive].sum() - m * (m + 1) / 2) / (m * n)
    return Roc(fpr, tpr, float(area), _interval(float(area), m, n))


def share(count: int, total: int) -> tuple[float, tuple[float, float]]:
    """(count / total, its exact 95 % interval of Clopper and Pearson): of models that raised an alarm.

    Raises:
      ValueError: no models, or more alarms than models.
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"expected some models and no more alarms than models, got {count} of {total}")
    found = binomtest(count, total).proportion_ci(CONFIDENCE, "exact")
    return count / total, (float(found.low), float(found.high))


def _interval(area: float, m: int, n: int) -> tuple[float, float]:
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    k = (m + n) / 2 - 1

    def beyond(theta: float) -> float:
        of_pairs = 1 + k * (1 - theta) / (2 - theta) + k * theta / (1 + theta)
        return abs(area - theta) - z * np.sqrt(theta * (1 - theta) * of_pairs / (m * n))

    # `beyond` is positive at 0 and at 1 and not positive at the area itself, where that is inside.
    inside = min(max(area, 1e-9), 1 - 1e-9)
    low = 0.0 if area <= 0.0 else brentq(beyond, 0.0, inside)
    high = 1.0 if area >= 1.0 else brentq(beyond, inside, 1.0)
    return float(low), float(high)
