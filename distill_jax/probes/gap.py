"""Can the teacher rank the student's work?

    forward  = E_{y ~ teacher}[ l_T(y) - l_S(y) ] / bytes      what the student would have to learn, bits a byte
    reverse  = E_{y ~ student}[ l_S(y) - l_T(y) ] / bytes      what the teacher finds odd in the student's work
    WTP      = P[ s(wrong) > s(right) ],  s(y) = l_T(y) - l_S(y)

Wrong-trace preference WTP is taken over pairs of a wrong and a right answer of the student to the same prompt, then
averaged over the prompts that have both; ties count one half. s is the implicit reward that distillation follows (the
reward whose optimum is the teacher, as in DPO, arXiv 2305.18290): at .5 it says nothing about right and wrong, above .5
it teaches the student its mistakes. The same for l_T per byte alone.

The support's side: overlap of the k most probable outcomes of both models on the student's prefixes (arXiv 2604.13016).

Source: *Distillation Traps and Guards*, arXiv 2604.18963, sections 4 and 6.4; the definition of WTP follows its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models.model import Model
from distill_jax.probes.distributions import positions
from distill_jax.probes.pairs import ProbeConfig, excluded_note, likelihoods
from distill_jax.probes.subjects import Subject, as_subject
from distill_jax.probes.texts import TextPair, prompt_index
from distill_jax.probes.values import Bootstrap, Value, sum_by, undefined

RATE = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Gap:
    """What `measure` found; the keys "all", "right" and "wrong" say over which of the student's answers.

    Attributes:
      unit: of the overlap, "token", or "byte" across vocabularies.
      forward: bits a byte, on the teacher's texts.
      reverse: bits a byte, on the student's texts.
      wrong_trace_preference: WTP by l_T - l_S. n is the number of prompts with right and wrong answers.
      wrong_trace_preference_teacher: WTP by l_T per byte.
      top_k_overlap: share of the k most probable outcomes that both models have in common.
      entropy_gap: entropy of the student minus that of the teacher, nats a position.
      notes: what could not be measured.
      top_k_share: k over the number of outcomes. In a small vocabulary the k most probable outcomes reach down to what
        neither model considers, and their order there is noise; 1 where it is not known.
    """

    unit: str
    forward: Value
    reverse: Mapping[str, Value]
    wrong_trace_preference: Value
    wrong_trace_preference_teacher: Value
    top_k_overlap: Mapping[str, Value]
    entropy_gap: Mapping[str, Value]
    notes: tuple[str, ...] = ()
    top_k_share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The reduction: f32[B, c] share of common top-k outcomes, and both entropies."""

    k: int

    def __call__(self, lp: jax.Array, lq: jax.Array) -> dict[str, jax.Array]:
        k = min(self.k, lp.shape[-1])
        _, of_p = jax.lax.top_k(lp, k)
        _, of_q = jax.lax.top_k(lq, k)
        common = (of_p[..., :, None] == of_q[..., None, :]).any(-1).mean(-1)
        entropy_p, entropy_q = (-(jnp.exp(x) * x).sum(-1) for x in (lp, lq))
        return {"overlap": common, "entropy_gap": entropy_q - entropy_p}


def measure(
    teacher: Model | Subject,
    student: Model | Subject,
    batch: TextPair,
    *,
    config: ProbeConfig | None = None,
    k: int = 16,
) -> Gap:
    """Measures the gap on the teacher's and the student's texts.

    Args:
      teacher, student: models on one mesh.
      batch: both models' answers to the same questions, several of the student's for each; `batch.student.correct`
        is needed for all that depends on right and wrong, and the rest is measured without it.
      config: see `ProbeConfig`.
      k: of the top-k overlap.

    Raises:
      ValueError: k < 1, or what `pairs.encode_pair` raises.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    teacher, student, config = as_subject(teacher), as_subject(student), config or ProbeConfig()
    (index_t, index_s), prompts = prompt_index(batch.teacher, batch.student)
    bootstrap = Bootstrap(prompts, config.resamples, config.seed)
    spans = likelihoods(teacher, student, batch.teacher, config)
    notes = list(excluded_note(spans.excluded, "of the teacher's texts"))
    forward = _bits_per_byte(
        spans.row, spans.lp_t - spans.lp_s, index_t, batch.teacher.bytes, spans.excluded, bootstrap
    )

    texts, size = batch.student, len(batch.student)
    spans = likelihoods(teacher, student, texts, config)
    notes += excluded_note(spans.excluded, "of the student's texts")
    total_t, total_s = (sum_by(spans.row, lp, size) for lp in (spans.lp_t, spans.lp_s))
    found = positions(teacher, student, texts, Overlap(k), config)
    correct = np.zeros(size, bool) if texts.correct is None else texts.correct
    groups = {"all": np.ones(size, bool)}
    if texts.correct is None:
        notes.append(
            "the student's answers are not judged (texts.correct is None): nothing is split by right and wrong"
        )
    else:
        groups |= {"right": correct, "wrong": ~correct}
    reverse, overlap, entropy = {}, {}, {}
    for name, rows in groups.items():
        inside = rows[spans.row]
        reverse[name] = _bits_per_byte(
            spans.row[inside],
            (spans.lp_s - spans.lp_t)[inside],
            index_s,
            texts.bytes,
            spans.excluded | ~rows,
            bootstrap,
        )
        here = rows[found.row]
        prompt = index_s[found.row[here]]
        count = sum_by(prompt, np.ones(len(prompt)), prompts)
        sums = [
            sum_by(prompt, np.asarray(found.values[v])[here], prompts) for v in ("overlap", "entropy_gap")
        ]
        overlap[name], entropy[name] = bootstrap.ratio(sums[0], count), bootstrap.ratio(sums[1], count)
    scored = np.bincount(spans.row, minlength=size) > 0
    preference = preference_teacher = undefined()
    if texts.correct is not None:
        by_gap = pair_preference(total_t - total_s, correct, index_s, prompts, scored)
        per_byte = total_t / np.maximum(texts.bytes, 1)
        by_teacher = pair_preference(per_byte, correct, index_s, prompts, scored)
        preference, preference_teacher = (bootstrap.ratio(*pair, RATE) for pair in (by_gap, by_teacher))
        if not by_gap[1].any():
            notes.append(_why_no_pairs(correct))
    return Gap(
        unit=found.unit,
        forward=forward,
        reverse=reverse,
        wrong_trace_preference=preference,
        wrong_trace_preference_teacher=preference_teacher,
        top_k_overlap=overlap,
        entropy_gap=entropy,
        notes=tuple(notes),
        top_k_share=min(1.0, k / found.outcomes),
    )


def pair_preference(
    score: np.ndarray, correct: np.ndarray, index: np.ndarray, prompts: int, usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(f64[Q] P[score(wrong) > score(right)] of each prompt, ties one half; f64[Q] 1 where it has both, else 0).

    score: f64[N]; correct, usable: bool[N]; index: i64[N], the prompt of each row.
    """
    preference, has = np.zeros(prompts), np.zeros(prompts)
    for prompt in range(prompts):
        own = (index == prompt) & usable
        right, wrong = score[own & correct], score[own & ~correct]
        if len(right) and len(wrong):
            above = wrong[:, None] - right[None, :]
            # Scores that differ by rounding alone are a tie.
            tie = np.abs(above) <= 1e-5 * np.maximum(1.0, np.abs(wrong[:, None]))
            preference[prompt] = np.where(tie, 0.5, above > 0).mean()
            has[prompt] = 1.0
    return preference, has


def _why_no_pairs(correct: np.ndarray) -> str:
    if not correct.any():
        return "wrong-trace preference needs right answers to compare with, and the student has none at all"
    if correct.all():
        return "wrong-trace preference needs wrong answers, and the student has none at all"
    return "no prompt has both right and wrong answers of the student: sample more of each for a wrong-trace preference"


def _bits_per_byte(
    row: np.ndarray,
    nats: np.ndarray,
    index: np.ndarray,
    width: np.ndarray,
    excluded: np.ndarray,
    bootstrap: Bootstrap,
) -> Value:
    """sum of nats / (ln 2 * bytes of the texts that are not excluded). row: i64[M]; width: i64[N]."""
    total = sum_by(index[row], nats, bootstrap.prompts)
    return bootstrap.ratio(
        total / np.log(2.0), sum_by(index, np.where(excluded, 0, width), bootstrap.prompts)
    )
