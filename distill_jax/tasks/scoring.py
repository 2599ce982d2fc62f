"""Rewards of many completions by any task; a verifier that raises or hangs costs one sample and stops nothing."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from distill_jax.tasks.base import BatchTask, Problem, Task

SECONDS = 30.0  # wall-clock time of one verification, far beyond what an honest one takes

_log = logging.getLogger(__name__)


class _Row(NamedTuple):
    problem: Problem
    completion: str
    ended: bool


def score_all(
    task: Task,
    problems: Sequence[Problem],
    completions: Sequence[str],
    ended: Iterable[bool],
    seconds: float = SECONDS,
) -> tuple[list[float], int]:
    """(rewards, how many verifications raised, took too long or gave no finite number): such a row scores 0.

    A task's `score` runs in a thread beside the caller's, which goes on without it when it hangs. Python cannot end a
    thread, so a loop without end keeps using processor time, and one in C code that never lets go of the interpreter
    holds up the run: a verifier that may do so belongs into a process of its own (`rewards.functions.LimitedFunction`),
    as those of the tasks here are that judge with other people's code.

    Args:
      task: its `score_batch` is used where it has one, which answers for its own time; when that raises, `score`.
      problems, completions, ended: one a row.
      seconds: wall-clock time of one `score`.
    """
    ends = [bool(end) for end in ended]
    if isinstance(task, BatchTask):
        try:
            return [float(reward) for reward in task.score_batch(problems, completions, ends)], 0
        except Exception:
            _log.exception("task %s could not judge a batch; its rows are judged one by one", task.name)
    rows = [_Row(*row) for row in zip(problems, completions, ends, strict=True)]
    rewards: list[float] = []
    failed = 0
    while len(rewards) < len(rows):
        worker = _Worker(task, rows[len(rewards) :])
        for row in rows[len(rewards) :]:
            found, hangs = worker.next(seconds)
            if isinstance(found, BaseException):
                if not failed:
                    _log.warning("task %s could not judge %r: %r", task.name, row.completion, found)
                failed += 1
                found = 0.0
            rewards.append(found)
            if hangs:
                break  # the rows after it are another thread's
    return rewards, failed


class _Worker:
    """Scores rows in a thread of its own, in order."""

    def __init__(self, task: Task, rows: Sequence[_Row]) -> None:
        self._results: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()
        self._is_abandoned = threading.Event()
        threading.Thread(target=self._run, args=(task, rows), daemon=True).start()

    def next(self, seconds: float) -> tuple[float | BaseException, bool]:
        """(the next row's reward or what it raised, whether it hangs: then nothing comes after it)."""
        try:
            return self._results.get(timeout=seconds), False
        except queue.Empty:
            self._is_abandoned.set()
            return TimeoutError(f"it took more than {seconds:g} s"), True

    def _run(self, task: Task, rows: Sequence[_Row]) -> None:
        for row in rows:
            result: float | BaseException
            try:
                reward = float(task.score(*row))
                result = reward if math.isfinite(reward) else ValueError(f"it gave {reward}")
            except BaseException as error:  # SystemExit among them: one verification is not the run's to end
                result = error
            if self._is_abandoned.is_set():
                return
            self._results.put(result)
