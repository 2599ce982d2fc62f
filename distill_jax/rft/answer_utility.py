"""The answer-utility reward: does a trace help a small model to say the right answer?

    u(y) = log p_C(gold answer | prompt, y up to and with the answer mark) / bytes(gold answer)
    r    = +u  distillable      pays for traces after which the proxy finds the right answer
           -u  undistillable    pays for traces that do not help it

Source: Reinforcement-Learned Teachers (arXiv 2506.08388), which reward a teacher by what its explanation does for the
student's likelihood of the solution. The gap looks at how surprising every byte of a trace is; this term looks at
nothing but what the trace is good for. The proxy reads the trace and the gold answer as one text, and the tokens that
end inside the answer are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax.tasks.base import Problem, Task


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """lp_per_byte: f32[B], u in nats a byte of the gold answer; known: bool[B], rows that have one."""

    lp_per_byte: jax.Array
    known: np.ndarray


@dataclasses.dataclass(frozen=True)
class AnsweredTexts:
    """Traces with the gold answer in place of their own.

    Attributes:
      texts: each completion up to and with its first answer mark, then the gold answer; empty where there is no mark.
      known: bool[B], the completion had a mark.
      first_byte: i32[B], bytes of the text before the answer.
      bytes: i32[B], of the answer.
    """

    texts: list[str]
    known: np.ndarray
    first_byte: np.ndarray
    bytes: np.ndarray


def require_answer_mark(task: Task, problems: Sequence[Problem]) -> str:
    """The mark that a task writes before its answers, after checking that every gold completion has an answer there.

    Raises:
      ValueError: the task has no `answer_mark`, or a problem's gold completion nothing behind one.
    """
    mark = getattr(task, "answer_mark", None)
    if not isinstance(mark, str) or not mark:
        raise ValueError(
            f"answer_utility needs a task that says where an answer begins, but task {task.name!r} has no "
            "`answer_mark` (chain_arithmetic has '####'); set answer_utility=0, or give the task class that attribute"
        )
    for problem in problems:
        if mark not in problem.gold or not gold_answer(problem, mark):
            raise ValueError(
                f"answer_utility needs gold answers, but nothing follows the mark {mark!r} of task {task.name!r} in "
                f"the gold completion {problem.gold[:80]!r} of {problem.prompt[:80]!r}; set answer_utility=0"
            )
    return mark


def gold_answer(problem: Problem, mark: str) -> str:
    """What follows the last mark of the gold completion, white space included; the gold writes it as a model would."""
    return problem.gold.rpartition(mark)[2]


def with_gold_answer(problems: Sequence[Problem], texts: Sequence[str], mark: str) -> AnsweredTexts:
    """Puts the gold answer behind the first mark of each completion; one problem a row."""
    answered, known, first_byte, widths = [], [], [], []
    for problem, text in zip(problems, texts, strict=True):
        trace, found, _ = text.partition(mark)
        answer = gold_answer(problem, mark)
        head = trace + found
        known.append(bool(found))
        answered.append(head + answer if found else "")
        first_byte.append(len(head.encode()))
        widths.append(len(answer.encode()))
    return AnsweredTexts(
        answered, np.array(known, bool), np.array(first_byte, np.int32), np.array(widths, np.int32)
    )


@jax.jit
def answer_lp_per_byte(
    lp: ArrayLike, byte_ends: ArrayLike, first_byte: ArrayLike, answer_bytes: ArrayLike
) -> jax.Array:
    """sum of lp over the tokens that end after `first_byte`, over answer_bytes; f32[B], in nats a byte.

    Args:
      lp: f32[B, T], 0 in padding.
      byte_ends: i32[B, T], bytes of the text up to and with each token.
      first_byte, answer_bytes: i32[B]; an answer of 0 bytes counts as 1.
    """
    lp, byte_ends = jnp.asarray(lp, jnp.float32), jnp.asarray(byte_ends)
    inside = byte_ends > jnp.asarray(first_byte)[:, None]
    total = jnp.where(inside, lp, 0.0).sum(axis=1)
    return total / jnp.maximum(jnp.asarray(answer_bytes, jnp.float32), 1.0)
