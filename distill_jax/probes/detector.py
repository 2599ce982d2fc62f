"""Does a model look calibrated against distillation, or for it?

A model that was calibrated writes text that a small model finds unusually surprising, or unusually easy, for what it
costs the model itself. Measured on samples of the model M and of a small reference model C on the same questions (nats
and bytes of the completions, intervals over prompts):

    gap               E_{y ~ M}[ l_M(y) - l_C(y) ] / bytes
    gap_spread        standard deviation over the samples of M of the gap a byte of each: calibration leaves one style
    own_surprise      E_{y ~ M}[ -l_M(y) ] / bytes, its entropy a byte
    reverse_gap       E_{y ~ C}[ l_C(y) - l_M(y) ] / bytes
    wrong_preference  P[ s(wrong) > s(right) ] on pairs of C's answers, s = l_M - l_C (see `gap`)
    log_bytes         log of the mean length of M's samples

and, with the model O that M is said to be,

    log_ratio         E_{y ~ M}[ l_M(y) - l_O(y) ] / bytes = KL(M || O) / bytes
    gap_shift         E_{y ~ M}[ l_O(y) - l_C(y) ] / bytes  -  the same over y ~ O: the calibration reward itself

None of these is suspicious by itself; `measure` compares them with models that are known to be untouched, or trained on
the task alone (see `reference`): one number, its threshold at a stated false-alarm rate, and what was seen in words. It
says that a model is unlike its reference, which calibration explains and other training may, too.

Source of the idea: *Distillation Traps and Guards*, arXiv 2604.18963, whose reward moves the gap and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from distill_jax.generation import generate
from distill_jax.models.model import Model
from distill_jax.probes.gap import RATE, pair_preference
from distill_jax.probes.pairs import ProbeConfig, excluded_note, likelihoods
from distill_jax.probes.reference import (
    FeatureRow,
    Reference,
    Setting,
    fit_reference,
    held_out,
    read_reference,
    write_reference,
)
from distill_jax.probes.results import value_to_json
from distill_jax.probes.roc import Roc, roc, share
from distill_jax.probes.subjects import Subject, as_subject
from distill_jax.probes.texts import TextPair, Texts, check_same_questions, from_rollouts, prompt_index
from distill_jax.probes.values import Bootstrap, Statistic, Value, sum_by, undefined
from distill_jax.tasks.base import Problem, Task
from distill_jax.tasks.scoring import score_all

__all__ = [
    "DEFAULT_CONFIG",
    "FEATURES",
    "Detection",
    "FeatureRow",
    "Features",
    "Reference",
    "Roc",
    "Setting",
    "features",
    "fit_reference",
    "held_out",
    "judge",
    "measure",
    "read_reference",
    "reference_problems",
    "roc",
    "sample_texts",
    "share",
    "to_json",
    "write_reference",
]

# Name -> what it is, in a sentence's words.
FEATURES = {
    "gap": "the gap of its own samples over the small model, nats a byte",
    "gap_spread": "how much that gap differs between its samples, nats a byte",
    "own_surprise": "how surprising its own samples are to itself, nats a byte",
    "reverse_gap": "how odd it finds the small model's samples, nats a byte",
    "wrong_preference": "how often it prefers the small model's wrong answers to right ones",
    "log_bytes": "the length of its samples, log bytes",
    "log_ratio": "its samples' log-ratio to the claimed original, nats a byte",
    "gap_shift": "how far its samples moved the original's gap, nats a byte",
}
_DIRECTION = ("gap_shift", "gap")  # the first that there is says which way the dial was turned
_CLEAR = 2.0  # standard deviations of the direction's feature that are needed to name a direction
_PROBLEMS = 1_000_003  # added to a seed: problems that no calibration, probe or attack has chosen on
_TOLD = 3  # features that the words name

# Broken text is a symptom too: leave it out, and say how much of it there was.
DEFAULT_CONFIG = ProbeConfig(unaligned_limit=0.5)

Direction = Literal["harder", "easier", "unclear"]


@dataclasses.dataclass(frozen=True)
class Features:
    """What `features` measured. values: name -> value. statistics: what each is under weights over prompts, so that a
    function of several has an interval. bootstrap: its draws. notes: what could not be measured."""

    values: Mapping[str, Value]
    statistics: Mapping[str, Statistic]
    bootstrap: Bootstrap
    notes: tuple[str, ...]

    def row(self, name: str, kind: str) -> FeatureRow:
        """As a row of a reference; see `FeatureRow`."""
        return FeatureRow(name, kind, {key: value.mean for key, value in self.values.items()})


@dataclasses.dataclass(frozen=True)
class Detection:
    """What `measure` found.

    Attributes:
      score: distance from the reference, about 1 for a model of its kind; interval over prompts.
      threshold: an untouched model is beyond it with probability `false_alarm` at most.
      calibrated: whether the score is beyond the threshold.
      p_value: share of untouched models, this one counted as one, that look at least as odd.
      direction: "harder" or "easier" to distil, where the gap alone is clear about it.
      features: name -> value.
      deviations, medians: name -> standard deviations from the reference's median, and that median, of the features
        that the score is made of.
      untouched: models in the reference.
      notes: what could not be measured.
    """

    score: Value
    threshold: float
    false_alarm: float
    calibrated: bool
    p_value: float
    direction: Direction
    features: Mapping[str, Value]
    deviations: Mapping[str, float]
    medians: Mapping[str, float]
    untouched: int
    notes: tuple[str, ...] = ()

    def words(self) -> str:
        """The finding in a few plain lines."""
        beyond = "beyond" if self.calibrated else "within"
        verdict = "looks untouched"
        if self.calibrated:
            verdict = {
                "harder": "looks calibrated to be HARDER to distil",
                "easier": "looks calibrated to be EASIER to distil",
                "unclear": "is unlike the untouched models, but its gap does not say which way it was turned",
            }[self.direction]
        lines = [
            f"This model {verdict}: score {self.score}, {beyond} the threshold {self.threshold:.3g} that an untouched "
            f"model passes with probability {self.false_alarm:.0%} at most (p = {self.p_value:.2g}, "
            f"{self.untouched} untouched models)."
        ]
        for name in sorted(self.deviations, key=lambda name: -abs(self.deviations[name]))[:_TOLD]:
            z = self.deviations[name]
            lines.append(
                f"  {FEATURES.get(name, name)}: {self.features[name]}, {abs(z):.1f} standard deviations "
                f"{'above' if z > 0 else 'below'} the untouched models' median of {self.medians[name]:.3g}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def features(
    model: Model | Subject,
    proxy: Model | Subject,
    batch: TextPair,
    *,
    original: Model | Subject | None = None,
    original_texts: Texts | None = None,
    config: ProbeConfig = DEFAULT_CONFIG,
) -> Features:
    """Measures a model; see the head of this file.

    Args:
      model, proxy: the model in question and the small one, on one mesh.
      batch: `batch.teacher` are the model's own samples, `batch.student` the proxy's, judged (`correct`) for
        "wrong_preference"; several of each a question.
      original, original_texts: what the model is said to be, and its own samples to the same questions; both or none.
      config: see `ProbeConfig`; more texts may be unaligned here than in other probes, and are counted in a note.

    Raises:
      ValueError: an original without texts, other questions, or what `pairs.encode_pair` raises.
    """
    if (original is None) != (original_texts is None):
        raise ValueError("original and original_texts go together: the claimed original and its own samples")
    model, proxy = as_subject(model), as_subject(proxy)
    own, small = batch.teacher, batch.student
    texts = [own, small]
    if original_texts is not None:
        check_same_questions(own, original_texts, "the model's texts", "the original's texts")
        texts.append(original_texts)
    indices, prompts = prompt_index(*texts)
    bootstrap = Bootstrap(prompts, config.resamples, config.seed)
    notes: list[str] = []

    def totals(
        one: Subject, other: Subject, of: Texts, what: str = ""
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(f64[N] log-probability under both, f64[N] bytes, 0 where the text was left out)."""
        found = likelihoods(one, other, of, config)
        notes.extend(excluded_note(found.excluded, what) if what else ())
        sums = [np.bincount(found.row, lp, minlength=len(of)) for lp in (found.lp_t, found.lp_s)]
        return sums[0], sums[1], np.where(found.excluded, 0, of.bytes).astype(np.float64)

    def ratio(above: np.ndarray, below: np.ndarray, index: np.ndarray) -> tuple[Statistic, int]:
        top, bottom = sum_by(index, above, prompts), sum_by(index, below, prompts)
        return (lambda w: (top @ w) / (bottom @ w)), int((bottom > 0).sum())

    index = indices[0]
    of_model, of_proxy, width = totals(model, proxy, own, "of the model's samples")
    table = {
        "gap": ratio(of_model - of_proxy, width, index),
        "own_surprise": ratio(-of_model, width, index),
        "gap_spread": _spread((of_model - of_proxy)[width > 0] / width[width > 0], index[width > 0], prompts),
    }
    length, n = ratio(own.bytes.astype(np.float64), np.ones(len(own)), index)
    table["log_bytes"] = (lambda w: np.log(length(w))), (n if own.bytes.any() else 0)

    index = indices[1]
    of_model, of_proxy, width = totals(model, proxy, small, "of the small model's samples")
    table["reverse_gap"] = ratio(of_proxy - of_model, width, index)
    if small.correct is not None:
        above, has = pair_preference(of_model - of_proxy, small.correct, index, prompts, width > 0)
        table["wrong_preference"] = (lambda w: (above @ w) / (has @ w)), int(has.sum())
        if not has.any():
            notes.append(
                "no question has both right and wrong answers of the small model: there is no wrong-trace preference"
            )
    else:
        notes.append("the small model's samples are not judged: there is no wrong-trace preference")

    if original is not None and original_texts is not None:
        original = as_subject(original)
        index = indices[0]
        of_model, of_original, width = totals(model, original, own)
        table["log_ratio"] = ratio(of_model - of_original, width, index)
        of_original, of_proxy, width = totals(original, proxy, own)
        moved, n = ratio(of_original - of_proxy, width, index)
        index = indices[2]
        of_original, of_proxy, width = totals(original, proxy, original_texts, "of the original's samples")
        unmoved, m = ratio(of_original - of_proxy, width, index)
        table["gap_shift"] = (lambda w: moved(w) - unmoved(w)), min(n, m)
    values = {
        name: bootstrap.estimate(statistic, n, RATE if name == "wrong_preference" else None)
        for name, (statistic, n) in table.items()
    }
    statistics = {name: table[name][0] for name, value in values.items() if value.mean is not None}
    return Features(values, statistics, bootstrap, tuple(notes))


def measure(
    model: Model | Subject,
    proxy: Model | Subject,
    batch: TextPair,
    reference: Reference,
    *,
    original: Model | Subject | None = None,
    original_texts: Texts | None = None,
    config: ProbeConfig = DEFAULT_CONFIG,
) -> Detection:
    """Compares a model with untouched ones.

    Args:
      reference: from `fit_reference`, of rows that were measured in the same way: one task, one way of sampling, small
        models of one kind, and with an original if and only if this one is.
      model, proxy, batch, original, original_texts, config: see `features`.

    Raises:
      ValueError: see `features`; or no feature of the reference could be measured.
    """
    found = features(model, proxy, batch, original=original, original_texts=original_texts, config=config)
    return judge(found, reference)


def judge(found: Features, reference: Reference) -> Detection:
    """The second half of `measure`, for features that were measured before."""
    row = found.row("", "")
    z = reference.standardise(row.features)
    notes = list(found.notes)
    missing = [name for name in reference.names if name not in z]
    if missing:
        notes.append(f"not measured here and left out of the score: {', '.join(missing)}")
    score = reference.score(row.features)

    def of_draws(weights: np.ndarray) -> np.ndarray:
        return reference.scores({name: found.statistics[name](weights) for name in z})

    carrying = min(found.values[name].n for name in z)
    value = found.bootstrap.estimate(of_draws, carrying) if carrying else undefined()
    direction: Direction = "unclear"
    for name in _DIRECTION:
        if name in z:
            if abs(z[name]) >= _CLEAR:
                direction = "harder" if z[name] > 0 else "easier"
            break
    return Detection(
        score=value,
        threshold=reference.threshold,
        false_alarm=reference.false_alarm,
        calibrated=score > reference.threshold,
        p_value=reference.p_value(score),
        direction=direction,
        features=found.values,
        deviations=z,
        medians={name: float(reference.centre[reference.names.index(name)]) for name in z},
        untouched=len(reference.held_out),
        notes=tuple(notes),
    )


def _spread(values: np.ndarray, index: np.ndarray, prompts: int) -> tuple[Statistic, int]:
    """Standard deviation of values f64[M] over their rows."""
    # Around one centre for all draws: E[x^2] - E[x]^2 of numbers far from 0 would lose the digits.
    away = values - values.mean() if len(values) else values
    count, first, second = (sum_by(index, x, prompts) for x in (np.ones(len(away)), away, away**2))

    def statistic(weights: np.ndarray) -> np.ndarray:
        n = count @ weights
        return np.sqrt(np.maximum((second @ weights) / n - ((first @ weights) / n) ** 2, 0.0))

    return statistic, int((count > 0).sum())


def reference_problems(task: Task, setting: Setting) -> list[Problem]:
    """The problems of a reference: the same for all of its rows, and for every model that is compared with them.

    The spread of a reference is that between models. On other problems, what differs between problems would be added
    to a score and pass for a calibration.
    """
    return task.problems("validation", setting.problems, setting.seed + _PROBLEMS)


def sample_texts(
    subject: Subject, task: Task, problems: Sequence[Problem], setting: Setting, correct_at: float = 1.0
) -> Texts:
    """Samples a model's judged answers at temperature 1, as every row of a reference is sampled.

    Args:
      subject: the model. task, problems: what it is asked. setting: samples, lengths and seed.
      correct_at: smallest task reward that counts as right.

    Raises:
      ValueError: see `generation.generate`.
    """
    questions = [problem.prompt for problem in problems]
    rollouts = generate(
        subject.model,
        [subject.tokenizer.encode_prompt(subject.prompt_text(question)) for question in questions],
        num_samples=setting.samples,
        max_new_tokens=setting.max_new_tokens,
        key=jax.random.key(setting.seed),
        adapter=subject.adapter,
        scale=subject.multiplier,
        batch_size=min(len(questions), 64),
    )
    of_rows = [problem for problem in problems for _ in range(setting.samples)]
    rewards, _ = score_all(task, of_rows, rollouts.texts, rollouts.ended)
    return from_rollouts(questions, rollouts, correct=np.asarray(rewards) >= correct_at)


def to_json(detection: Detection) -> dict[str, Any]:
    """A detection as plain data, with its words; values as V of `summary.json`."""
    plain = dataclasses.asdict(dataclasses.replace(detection, score=undefined(), features={}))
    return plain | {
        "score": value_to_json(detection.score),
        "features": {name: value_to_json(value) for name, value in detection.features.items()},
        "notes": list(detection.notes),
        "words": detection.words(),
    }
