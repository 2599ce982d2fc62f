"""Is the student confident and wrong, and did distilling make it so?

Of each answer a confidence c in [0, 1], with the verifier's verdict a in {0, 1}:

    ECE   = sum over 10 bins of c:  (texts in the bin / texts) |mean a - mean c|                    (arXiv 1706.04599)
    AURC  = mean over coverages i/N of the share of wrong answers among the i most confident ones   (arXiv 1805.08206)

    "token_mean"        c = mean probability of the answer's tokens, each model with its own tokens
    "joint"             c = exp(l(answer)), the probability of the whole answer, given the working before it
    "self_consistency"  c = share of the student's other answers to the prompt that agree with this one

The first two are taken after the working, and where an answer only copies what the working ended with, they are near 1
for right and wrong alike; the third is not, and asks for several answers to each prompt.

The trap: confidence on wrong answers rises while accuracy falls. Both are compared with the undistilled student on the
same questions, paired by prompt.

Source: the symptom, *Distillation Traps and Guards*, arXiv 2604.18963, section 6.5; the measures as cited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from distill_jax.models.model import Model
from distill_jax.probes.pairs import ProbeConfig, score
from distill_jax.probes.subjects import Subject, as_subject, encode
from distill_jax.probes.texts import Texts, check_same_questions, prompt_index
from distill_jax.probes.values import Bootstrap, Statistic, Value, sum_by

RATE = (0.0, 1.0)
EVENT_RATES = ("accuracy", "risk_coverage")  # made of right and wrong alone
BINS = 10
CONFIDENCES = ("token_mean", "joint", "self_consistency")
Confidence = Literal["token_mean", "joint", "self_consistency"]


@dataclasses.dataclass(frozen=True)
class Overconfidence:
    """What `measure` found; keys "after" (the student) and, where a base was given, "before" and "change".

    Attributes:
      confidence: which confidence was used.
      accuracy: share of right answers.
      confidence_wrong, confidence_right: mean confidence on such answers.
      entropy_wrong: mean entropy of the distributions that the tokens of wrong answers were in, nats.
      expected_calibration_error, risk_coverage: ECE and AURC.
      teacher_confidence_wrong: the teacher's confidence in the student's wrong answers (token_mean or joint; under
        "self_consistency", which the teacher has none of, its token_mean).
      notes: what could not be measured.
    """

    confidence: str
    accuracy: Mapping[str, Value]
    confidence_wrong: Mapping[str, Value]
    confidence_right: Mapping[str, Value]
    entropy_wrong: Mapping[str, Value]
    expected_calibration_error: Mapping[str, Value]
    risk_coverage: Mapping[str, Value]
    teacher_confidence_wrong: Value
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Rows that have a confidence: confidence, entropy f64[N]; correct bool[N]; prompt i64[N]."""

    confidence: np.ndarray
    entropy: np.ndarray
    correct: np.ndarray
    prompt: np.ndarray


def measure(
    teacher: Model | Subject,
    student: Model | Subject,
    batch: Texts,
    *,
    base: Model | Subject | None = None,
    base_batch: Texts | None = None,
    config: ProbeConfig | None = None,
    confidence: Confidence = "token_mean",
) -> Overconfidence:
    """Measures the student's confidence in its own answers.

    Args:
      teacher: judged on the student's wrong answers.
      student, batch: the student and its answers; `correct` is needed, `answer_starts` says where the answer stands
        (by default the whole completion is one), `answers` is needed for "self_consistency".
      base, base_batch: the student before it was distilled and its own answers to the same questions; both or none.
      config: see `ProbeConfig`.
      confidence: see the head of this file.

    Raises:
      ValueError: an unknown confidence, a column that is needed and missing, a base without texts, other questions.
    """
    config = config or ProbeConfig()
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {CONFIDENCES}, got {confidence!r}")
    if (base is None) != (base_batch is None):
        raise ValueError("base and base_batch go together: the undistilled student and its own answers")
    named = {"after": (as_subject(student), batch)}
    if base is not None and base_batch is not None:
        check_same_questions(batch, base_batch, "the student's texts", "the base's texts")
        named["before"] = (as_subject(base), base_batch)
    indices, prompts = prompt_index(*(texts for _, texts in named.values()))
    bootstrap = Bootstrap(prompts, config.resamples, config.seed)
    table: dict[str, dict[str, Value]] = {}
    statistics: dict[str, dict[str, tuple[Statistic, int]]] = {}
    notes: list[str] = []
    for (name, (subject, texts)), index in zip(named.items(), indices, strict=True):
        answers = _read(subject, texts, index, confidence, config)
        statistics[name] = _statistics(answers, prompts)
        notes += _notes(answers, texts, "the student" if name == "after" else "the base")
        for metric, (statistic, n) in statistics[name].items():
            bounds = RATE if metric in EVENT_RATES else None
            table.setdefault(metric, {})[name] = bootstrap.estimate(statistic, n, bounds)
    if "before" in statistics:
        for metric, values in table.items():
            (after, n), (before, m) = statistics["after"][metric], statistics["before"][metric]
            values["change"] = bootstrap.estimate(
                _minus(after, before), min(n, m), (-1.0, 1.0) if metric in EVENT_RATES else None
            )
    scorer: Confidence = "token_mean" if confidence == "self_consistency" else confidence
    of_teacher = _read(as_subject(teacher), batch, indices[0], scorer, config)
    statistic, n = _statistics(of_teacher, prompts)["confidence_wrong"]
    return Overconfidence(
        confidence=confidence,
        teacher_confidence_wrong=bootstrap.estimate(statistic, n),
        notes=tuple(notes),
        **table,  # type: ignore[arg-type]
    )


def _read(
    subject: Subject, texts: Texts, index: np.ndarray, confidence: Confidence, config: ProbeConfig
) -> _Answers:
    """Scores the answers; rows without one (empty, not found) are left out."""
    if texts.correct is None:
        raise ValueError("overconfidence needs texts.correct, the verifier's verdict on each completion")
    encoded = encode(subject, texts, "the model")
    scores = score(subject, encoded, config)
    ends, length = encoded.ends, np.asarray(encoded.sequences.completion_length)
    inside = np.arange(ends.shape[1])[None, :] < length[:, None]
    if texts.answer_starts is not None:
        # Every token that has a byte of the answer; the end of the text is none.
        begins = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        start = texts.answer_starts[:, None]
        inside &= (ends > start) & (begins < texts.bytes[:, None]) & (start >= 0)
    count = inside.sum(axis=1)
    has = count > 0
    safe = np.maximum(count, 1)
    if confidence == "self_consistency":
        value, answered = _agreement(texts, index)
        has &= answered
    elif confidence == "joint":
        value = np.exp(np.where(inside, scores.lp, 0.0).sum(axis=1, dtype=np.float64))
    else:
        value = np.where(inside, np.exp(scores.lp), 0.0).sum(axis=1, dtype=np.float64) / safe
    entropy = np.where(inside, scores.entropy, 0.0).sum(axis=1, dtype=np.float64) / safe
    return _Answers(np.clip(value, 0.0, 1.0)[has], entropy[has], texts.correct[has], index[has])


def _agreement(texts: Texts, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f64[N] share of the prompt's other rows with the same answer, bool[N] rows with an answer and such rows)."""
    if texts.answers is None:
        raise ValueError("self_consistency needs texts.answers, the answer read out of each completion")
    answers = np.array(["" if answer is None else answer for answer in texts.answers], object)
    answered = np.array([answer is not None for answer in texts.answers])
    same = (index[:, None] == index[None, :]) & (answers[:, None] == answers[None, :]) & answered[None, :]
    others = np.bincount(index)[index] - 1
    return (same.sum(axis=1) - 1) / np.maximum(others, 1), answered & (others > 0)


def _statistics(answers: _Answers, prompts: int) -> dict[str, tuple[Statistic, int]]:
    """metric -> (what it is under weights over prompts, prompts that carry it)."""
    prompt, confidence, right = answers.prompt, answers.confidence, answers.correct
    error = (~right).astype(np.float64)
    ones = np.ones(len(prompt))

    def mean(values: np.ndarray, rows: np.ndarray) -> tuple[Statistic, int]:
        above = sum_by(prompt[rows], values[rows], prompts)
        below = sum_by(prompt[rows], ones[rows], prompts)
        return (lambda w: (above @ w) / (below @ w)), int((below > 0).sum())

    everything = np.ones(len(prompt), bool)
    carrying = len(np.unique(prompt))
    return {
        "accuracy": mean(1.0 - error, everything),
        "confidence_wrong": mean(confidence, ~right),
        "confidence_right": mean(confidence, right),
        "entropy_wrong": mean(answers.entropy, ~right),
        "expected_calibration_error": (_calibration_error(confidence, error, prompt, prompts), carrying),
        "risk_coverage": (_risk_coverage(confidence, error, prompt), carrying),
    }


def _minus(first: Statistic, second: Statistic) -> Statistic:
    return lambda weights: first(weights) - second(weights)


def _calibration_error(
    confidence: np.ndarray, error: np.ndarray, prompt: np.ndarray, prompts: int
) -> Statistic:
    bin_ = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    # In each bin the texts times (mean confidence - mean accuracy) is a sum, so that a draw is a matrix product.
    excess = np.zeros((prompts, BINS))
    np.add.at(excess, (prompt, bin_), confidence - (1.0 - error))
    count = sum_by(prompt, np.ones(len(prompt)), prompts)
    return lambda w: np.abs(excess.T @ w).sum(axis=0) / (count @ w)


def _risk_coverage(confidence: np.ndarray, error: np.ndarray, prompt: np.ndarray) -> Statistic:
    order = np.argsort(-confidence, kind="stable")
    # Answers of one confidence are accepted together: each gets the risk at the last of them.
    last = np.searchsorted(-confidence[order], -confidence[order], side="right") - 1

    def statistic(weights: np.ndarray) -> np.ndarray:
        own = weights[prompt[order]]
        covered, wrong = np.cumsum(own, axis=0), np.cumsum(own * error[order, None], axis=0)
        if not len(own):
            return np.full(weights.shape[1], np.nan)
        risk = wrong[last] / np.maximum(covered[last], 1e-12)
        return (own * risk).sum(axis=0) / covered[-1]

    return statistic


def _notes(answers: _Answers, texts: Texts, who: str) -> list[str]:
    notes = []
    without = len(texts) - len(answers.prompt)
    if without:
        notes.append(
            f"{without} of {len(texts)} answers of {who} hold no answer to be confident about; left out"
        )
    if len(answers.correct) and answers.correct.all():
        notes.append(f"{who} has no wrong answers: there is no confidence on them")
    if len(answers.correct) and not answers.correct.any():
        notes.append(f"{who} has no right answers: there is no confidence on them")
    return notes
