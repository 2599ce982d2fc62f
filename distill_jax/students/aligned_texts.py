"""The same texts in a student's and in a teacher's tokens, with the teacher's scores: what losses on spans learn from.

A text is scored by the teacher once, before training; its log-probabilities then travel with the student's tokens, and
the spans are found anew in each step, which costs next to nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.logprobs import score_completions
from distill_jax.masked import length_mask
from distill_jax.mesh import place_batch
from distill_jax.sequences import Sequences
from distill_jax.students.targets import Teacher
from distill_jax.text.spans import Spans, align_spans


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlignedTexts:
    """The same B texts in the student's and in the teacher's tokens, and the teacher's scores of them.

    Attributes:
      student, teacher: prompts and completions, Ts and Tt completion slots.
      end_s, end_t: i32[B, Ts], i32[B, Tt]; byte offset after each token, from the completion's first byte.
      present_s, present_t: bool[B, Ts], bool[B, Tt]; tokens that lie in that coordinate. A row that cannot be aligned
        has none of the teacher's.
      lp_t: f32[B, Tt]; log-probabilities of the teacher's tokens; NaN where it gave none.
    """

    student: Sequences
    teacher: Sequences
    end_s: jax.Array
    end_t: jax.Array
    present_s: jax.Array
    present_t: jax.Array
    lp_t: jax.Array

    def spans(self) -> Spans:
        """Their spans; S = min(Tt, Ts) + 1."""
        return align_spans(self.end_t, self.end_s, self.present_t, self.present_s)


def align_texts(
    student: Sequences,
    end_s: np.ndarray,
    teacher: Sequences,
    end_t: np.ndarray,
    lp_t: np.ndarray | jax.Array | None = None,
    *,
    present_s: np.ndarray | None = None,
    usable: np.ndarray | None = None,
    unusable_limit: float = 0.01,
) -> AlignedTexts:
    """Puts the two sides of the same texts together, on the host.

    Args:
      student, teacher: B rows each, in each model's own tokens and prompt style.
      end_s, end_t: int[B, Ts], int[B, Tt]; byte offsets (`Tokenizer.byte_ends`), where an end of sequence adds one.
      lp_t: float[B, Tt]; see `score_sequences`. Without it every score is missing, until it is put in.
      present_s: bool[B, Ts]; completion tokens that are text or the end of sequence. All of them by default.
      usable: bool[B]; rows whose text both tokenizers give back byte for byte. All of them by default. The student may
        still be trained on the tokens of the others, but nothing of the teacher is used for them.
      unusable_limit: the largest share of rows that may not be usable.

    Raises:
      ValueError: sides with different rows or shapes, or too many rows that are not usable.
    """
    rows = student.tokens.shape[0]
    shapes = {
        "end_s": (end_s, (rows, student.completion_size)),
        "end_t": (end_t, (rows, teacher.completion_size)),
        "lp_t": (lp_t, (rows, teacher.completion_size)),
        "present_s": (present_s, (rows, student.completion_size)),
        "usable": (usable, (rows,)),
        "teacher.completion_length": (teacher.completion_length, (rows,)),
    }
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(array.shape)}")
    usable = np.ones(rows, bool) if usable is None else np.asarray(usable, bool)
    unusable = int((~usable).sum())
    if unusable > unusable_limit * rows:
        raise ValueError(
            f"{unusable} of {rows} texts are not given back byte for byte by both tokenizers or do not fit, the limit "
            f"is {unusable_limit:.2%}; look at them, make the sizes larger, or raise unusable_limit"
        )
    completion_s = np.asarray(length_mask(jnp.asarray(student.completion_length), student.completion_size))
    completion_t = np.asarray(length_mask(jnp.asarray(teacher.completion_length), teacher.completion_size))
    return AlignedTexts(
        student=student,
        teacher=teacher,
        end_s=jnp.asarray(end_s, jnp.int32),
        end_t=jnp.asarray(end_t, jnp.int32),
        present_s=jnp.asarray(completion_s if present_s is None else completion_s & present_s),
        present_t=jnp.asarray(completion_t & usable[:, None]),
        lp_t=jnp.full(end_t.shape, jnp.nan) if lp_t is None else jnp.asarray(lp_t, jnp.float32),
    )


def same_tokens(sequences: Sequences, lp_t: jax.Array) -> AlignedTexts:
    """`AlignedTexts` of models that share a tokenizer: every span is one token. lp_t: f32[B, T]. Pure."""
    mask = length_mask(jnp.asarray(sequences.completion_length), sequences.completion_size)
    ends = jnp.broadcast_to(jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32)[None, :], mask.shape)
    return AlignedTexts(sequences, sequences, ends, ends, mask, mask, lp_t)


@functools.partial(jax.jit, static_argnames=("chunk",))
def completion_lp(teacher: Teacher, sequences: Sequences, *, chunk: int = 64) -> jax.Array:
    """f32[B, T]: log p of completion tokens, 0 in padding; compiled once for each shape."""
    return score_completions(
        teacher.module,
        teacher.params,
        sequences,
        adapter=teacher.adapter,
        scale=teacher.scale,
        chunk=chunk,
    ).lp


def score_sequences(
    teacher: Teacher, sequences: Sequences, *, batch_size: int = 64, chunk: int = 64
) -> np.ndarray:
    """f32[N, T] on the host: the teacher's log-probabilities of N texts, 0 in padding.

    Args:
      sequences: N rows in the teacher's tokens.
      batch_size: rows on the device at a time; the last batch is filled up, so that nothing is compiled for it.
      chunk: as in `score_completions`.

    Raises:
      ValueError: no rows, batch_size < 1, or rows of another vocabulary.
    """
    teacher.check(sequences)
    count = sequences.tokens.shape[0]
    if count < 1 or batch_size < 1:
        raise ValueError(f"expected at least one text and one row a batch, got {count} and {batch_size}")
    parts = []
    for start in range(0, count, batch_size):
        rows = take_rows(sequences, np.minimum(np.arange(start, start + batch_size), count - 1))
        if teacher.module.mesh is not None:
            rows = place_batch(rows, teacher.module.mesh)
        parts.append(np.asarray(completion_lp(teacher, rows, chunk=chunk)))
    return np.concatenate(parts)[:count]


def take_rows(tree: Any, rows: np.ndarray) -> Any:
    """These rows of every leaf, on the host: one batch of `Sequences` or `AlignedTexts`."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)
