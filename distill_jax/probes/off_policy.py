"""Does the signal drift off the data that it was made on?

    forward(s) = sum_v p_v log(p_v / q_v)        reverse(s) = sum_v q_v log(q_v / p_v)      p teacher, q student

at every position of the teacher's and of the student's texts: two directions times two sources of prefixes, because the
two choices are independent of each other (arXiv 2605.16826). Where the student's own prefixes are unlike those of the
teacher, it is trained on other states than it visits, and its teacher is asked about states that it never saw. Signs of
it: KL that differs between sources, that rises along the text, that varies much between texts, single tokens with a
huge log-ratio, and importance weights from the one source to the other that rest on few texts:

    ESS = (sum_i w_i)^2 / (N sum_i w_i^2),   w_i = exp(l_S(y_i) - l_T(y_i)),   y_i ~ teacher       (Kong 1992)

Source: *Distillation Traps and Guards*, arXiv 2604.18963, section 4; GKD, arXiv 2306.13649.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from distill_jax.models.model import Model
from distill_jax.probes.distributions import kl_terms, positions
from distill_jax.probes.pairs import ProbeConfig, excluded_note, likelihoods
from distill_jax.probes.subjects import Subject, as_subject
from distill_jax.probes.texts import TextPair, prompt_index
from distill_jax.probes.values import Bootstrap, Value, sum_by

SOURCES, DIRECTIONS = ("teacher", "student"), ("forward", "reverse")
QUANTILE = 0.999


@dataclasses.dataclass(frozen=True)
class OffPolicy:
    """What `measure` found. Cells are keyed "forward.teacher", "forward.student", "reverse.teacher",
    "reverse.student": direction of the KL, whose texts.

    Attributes:
      unit: "token", or "byte" across vocabularies.
      kl: nats a position.
      drift: "forward", "reverse": KL on the student's prefixes minus KL on the teacher's.
      slope: nats by which the KL rises from the first position of a text to its last (least squares).
      variation: standard deviation over texts of a text's mean KL, divided by its mean.
      log_ratio_999: "teacher", "student": 99.9 % quantile of |l_T - l_S| over the spans of those texts, nats.
      effective_sample_size: ESS, as a share of the teacher's texts.
      notes: what could not be measured.
    """

    unit: str
    kl: Mapping[str, Value]
    drift: Mapping[str, Value]
    slope: Mapping[str, Value]
    variation: Mapping[str, Value]
    log_ratio_999: Mapping[str, Value]
    effective_sample_size: Value
    notes: tuple[str, ...] = ()


def both_directions(lp: jax.Array, lq: jax.Array) -> dict[str, jax.Array]:
    """f32[B, c] each: the KL of both directions."""
    return {"forward": kl_terms(lp, lq).sum(-1), "reverse": kl_terms(lq, lp).sum(-1)}


def measure(
    teacher: Model | Subject, student: Model | Subject, batch: TextPair, *, config: ProbeConfig | None = None
) -> OffPolicy:
    """Measures both directions on both sources of prefixes.

    Args:
      teacher, student: models on one mesh.
      batch: the teacher's and the student's answers to the same questions.
      config: see `ProbeConfig`.

    Raises:
      ValueError: what `pairs.encode_pair` raises.
    """
    teacher, student, config = as_subject(teacher), as_subject(student), config or ProbeConfig()
    indices, prompts = prompt_index(batch.teacher, batch.student)
    bootstrap = Bootstrap(prompts, config.resamples, config.seed)
    notes: list[str] = []
    means, slope, variation, quantile = {}, {}, {}, {}
    unit, effective = "token", None
    for source, index in zip(SOURCES, indices, strict=True):
        texts = getattr(batch, source)
        found = positions(teacher, student, texts, both_directions, config)
        unit = found.unit
        if not len(found.row):
            notes.append(f"the {source}'s texts have no position: all of them are empty and did not end")
        notes += excluded_note(found.excluded, f"of the {source}'s texts")
        prompt = index[found.row]
        count = sum_by(prompt, np.ones(len(prompt)), prompts)
        for direction in DIRECTIONS:
            kl, cell = np.asarray(found.values[direction], np.float64), f"{direction}.{source}"
            means[cell] = (sum_by(prompt, kl, prompts), count)
            slope[cell] = _slope(found.place, kl, prompt, bootstrap)
            variation[cell] = _variation(found.row, kl, index, bootstrap)
        spans = likelihoods(teacher, student, texts, config)
        gap = spans.lp_t - spans.lp_s
        quantile[source] = _quantile(np.abs(gap), index[spans.row], bootstrap)
        if source == "teacher":
            effective = _effective_sample_size(spans.row, gap, index, bootstrap)
    assert effective is not None
    return OffPolicy(
        unit=unit,
        kl={cell: bootstrap.ratio(*pair) for cell, pair in means.items()},
        drift={d: bootstrap.difference(means[f"{d}.student"], means[f"{d}.teacher"]) for d in DIRECTIONS},
        slope=slope,
        variation=variation,
        log_ratio_999=quantile,
        effective_sample_size=effective,
        notes=tuple(notes),
    )


def _slope(place: np.ndarray, kl: np.ndarray, prompt: np.ndarray, bootstrap: Bootstrap) -> Value:
    """Least squares of kl on place in [0, 1], over all positions; sums of prompts are all that a draw needs."""
    columns = np.stack([np.ones_like(kl), place, place**2, kl, place * kl], axis=1)
    sums = sum_by(prompt, columns, bootstrap.prompts)

    def statistic(weights: np.ndarray) -> np.ndarray:
        n, x, xx, y, xy = sums.T @ weights
        spread = n * xx - x**2
        return np.where(spread > 1e-9, (n * xy - x * y) / np.where(spread > 1e-9, spread, 1.0), np.nan)

    return bootstrap.estimate(statistic, int((sums[:, 0] > 0).sum()))


def _variation(row: np.ndarray, kl: np.ndarray, index: np.ndarray, bootstrap: Bootstrap) -> Value:
    """Coefficient of variation of the texts' mean KL."""
    total, count = sum_by(row, kl, len(index)), sum_by(row, np.ones(len(row)), len(index))
    has = count > 0
    mean = total[has] / count[has]
    sums = sum_by(index[has], np.stack([np.ones_like(mean), mean, mean**2], axis=1), bootstrap.prompts)

    def statistic(weights: np.ndarray) -> np.ndarray:
        n, first, second = sums.T @ weights
        return np.sqrt(np.maximum(second / n - (first / n) ** 2, 0.0)) / (first / n)

    return bootstrap.estimate(statistic, int((sums[:, 0] > 0).sum()))


def _quantile(values: np.ndarray, prompt: np.ndarray, bootstrap: Bootstrap) -> Value:
    """The smallest of the values that at most .1 % of them exceed."""
    order = np.argsort(-values, kind="stable")
    sums = sum_by(prompt, np.ones(len(prompt)), bootstrap.prompts)
    # Only the largest can be it: ten times the share is looked at, and the last of them stands for all below.
    order = order[: max(64, int(10 * (1 - QUANTILE) * len(order)))]
    largest, owner = values[order], prompt[order]

    def statistic(weights: np.ndarray) -> np.ndarray:
        if not len(largest):
            return np.full(weights.shape[1], np.nan)
        above = np.cumsum(weights[owner], axis=0)
        reached = above > (1 - QUANTILE) * (sums @ weights)[None, :]
        return np.where(reached.any(axis=0), largest[np.argmax(reached, axis=0)], largest[-1])

    return bootstrap.estimate(statistic, int((sums > 0).sum()))


def _effective_sample_size(
    row: np.ndarray, gap: np.ndarray, index: np.ndarray, bootstrap: Bootstrap
) -> Value:
    """ESS / N of the weights exp(l_S - l_T); they are scaled by the largest, which cancels."""
    has = np.bincount(row, minlength=len(index)) > 0
    log_weight = -sum_by(row, gap, len(index))[has]
    weight = np.exp(log_weight - log_weight.max(initial=-np.inf))
    sums = sum_by(index[has], np.stack([np.ones_like(weight), weight, weight**2], axis=1), bootstrap.prompts)

    def statistic(weights: np.ndarray) -> np.ndarray:
        n, first, second = sums.T @ weights
        return first**2 / (n * second)

    return bootstrap.estimate(statistic, int((sums[:, 0] > 0).sum()))
