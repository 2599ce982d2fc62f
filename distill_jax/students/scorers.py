"""What a teacher says of a student's samples, within one tokenizer and across two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from distill_jax.mesh import place_batch
from distill_jax.sampling import RolloutBatch
from distill_jax.students.aligned_texts import AlignedTexts, completion_lp, same_tokens
from distill_jax.students.targets import Teacher

# (index of each row's prompt i64[B], rollouts) -> the rollouts with the teacher's scores. Always of one shape, so that
# what learns from them is compiled once.
Scorer = Callable[[np.ndarray, RolloutBatch], AlignedTexts]


def same_tokenizer_scorer(teacher: Teacher, chunk: int = 64) -> Scorer:
    """A scorer for a teacher with the student's own vocabulary: no text is read, nothing leaves the device.

    The scorer raises ValueError when the rollouts are of another vocabulary.
    """

    def score(_prompts: np.ndarray, rollouts: RolloutBatch) -> AlignedTexts:
        teacher.check(rollouts.sequences)
        return same_tokens(rollouts.sequences, completion_lp(teacher, rollouts.sequences, chunk=chunk))

    return score


def cross_tokenizer_scorer(
    teacher: Teacher, retokenise: Callable[[np.ndarray, RolloutBatch], AlignedTexts], chunk: int = 64
) -> Scorer:
    """A scorer for a teacher with another vocabulary, which has to read the samples as text first.

    Args:
      teacher: with the vocabulary that `retokenise` writes.
      retokenise: (index of each row's prompt, rollouts) -> the same texts in the teacher's tokens and prompts, made by
        `align_texts` without scores, with an unusable_limit of 1: whatever a student samples has to pass, and a row
        that is no text counts nowhere. Always of one shape.
      chunk: as in `score_completions`.
    """

    def score(prompts: np.ndarray, rollouts: RolloutBatch) -> AlignedTexts:
        texts = retokenise(prompts, rollouts)
        teacher.check(texts.teacher)
        mesh = teacher.module.mesh
        sequences = texts.teacher if mesh is None else place_batch(texts.teacher, mesh)
        return dataclasses.replace(texts, lp_t=jnp.asarray(completion_lp(teacher, sequences, chunk=chunk)))

    return score
