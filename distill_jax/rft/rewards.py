"""Rewards of a batch of completions: the task's own verifier and the rewards of the config, checked and counted."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np

from distill_jax.rewards.terms import Answered, Reward
from distill_jax.tasks.base import Problem, Task
from distill_jax.tasks.scoring import score_all

_log = logging.getLogger(__name__)


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
      task: the judge. A verifier that breaks on a text costs that text alone: it scores 0 and is counted.
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
    scores, raised = score_all(task, problems, texts, ended)
    rewards = np.zeros(len(texts), np.float32)
    for row, (text, reward) in enumerate(zip(texts, scores, strict=True)):
        if not (math.isfinite(reward) and 0.0 <= reward <= 1.0):
            raise ValueError(
                f"task {task.name!r} gave the reward {reward} for {text!r}; a reward must be in [0, 1]"
            )
        rewards[row] = reward
    return TaskRewards(rewards, rewards >= correct_at, task.failures - failures_before + raised)


@dataclasses.dataclass(frozen=True)
class FurtherReward:
    """values: f32[B], NaN where there is none; failures: how many those are."""

    values: np.ndarray
    failures: int


def further_rewards(
    rewards: Sequence[Reward],
    problems: Sequence[Problem],
    texts: Sequence[str],
    ended: Sequence[bool] | np.ndarray,
) -> dict[str, FurtherReward]:
    """The rewards of the config by name. One that raises as a whole gives no reward to this batch, and is counted.

    Args:
      rewards: see `rewards.terms.make_rewards`.
      problems, texts, ended: one a row.
    """
    rows = [
        Answered(problem.prompt, problem.answer, text, bool(end), problem.metadata)
        for problem, text, end in zip(problems, texts, ended, strict=True)
    ]
    found: dict[str, FurtherReward] = {}
    for reward in rewards:
        try:
            values = np.asarray(reward(rows), np.float32)
        except Exception:
            _log.exception("the reward %s failed on a batch", reward.name)
            values = np.full(len(rows), np.nan, np.float32)
        found[reward.name] = FurtherReward(values, int(np.isnan(values).sum()))
    return found
