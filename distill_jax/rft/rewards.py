"""Task rewards: the task's own verifier, row by row on the host, checked and counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from distill_jax.tasks.base import Problem, Task


@dataclasses.dataclass(frozen=True)
class TaskRewards:
    """What a task said about a batch of completions.

    Attributes:
      rewards: f32[B] in [0, 1].
      correct: bool[B], the reward reaches what counts as correct.
      failures: completions that the task's verifier could not judge (it raised); each has the reward 0.
    """

    rewards: np.ndarray
    correct: np.ndarray
    failures: int


def task_rewards(
    task: Task,
    problems: Sequence[Problem],
    texts: Sequence[str],
    ended: Sequence[bool] | np.ndarray,
    correct_at: float = 1.0,
) -> TaskRewards:
    """Scores completions with the task's verifier.

    Args:
      task: the judge. A verifier that breaks on a text is the task's to catch; it counts them in
        `task.failures`.
      problems, texts, ended: one a row; ended is False for a completion that was cut off.
      correct_at: smallest reward that counts as correct, for tasks that also give partial credit.

    Raises:
      ValueError: different numbers of problems, texts and ends, or a reward outside [0, 1]: advantages and
        the gate on correctness would silently be wrong.
    """
    if not len(problems) == len(texts) == len(ended):
        raise ValueError(
            f"got {len(problems)} problems, {len(texts)} texts and {len(ended)} ends; expected one of each a row"
        )
    failures_before = task.failures
    rewards = np.zeros(len(texts), np.float32)
    for row, (problem, text, end) in enumerate(zip(problems, texts, ended, strict=True)):
        reward = float(task.score(problem, text, bool(end)))
        if not (math.isfinite(reward) and 0.0 <= reward <= 1.0):
            raise ValueError(
                f"task {task.name!r} gave the reward {reward} for {text!r}; a reward must be in [0, 1]"
            )
        rewards[row] = reward
    return TaskRewards(rewards, rewards >= correct_at, task.failures - failures_before)
