"""Where a student's texts come from: gold, the teacher's samples, verified samples of it, and mixtures. Host only.

A row is {"prompt", "completion", "ended"}: the task's question, the text, and whether its writer closed it with an end
of sequence. Every choice here is a function of its arguments: the same seed gives the same rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.tasks.base import Problem, Task, stable_hash

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verified:
    """Samples that passed the task's own verifier.

    Attributes:
      rows: the kept samples, in the order of the problems.
      problem_index: position among the problems, one a row.
      prompts: problems in all.
      prompts_without: problems of which no sample passed; they are missing from `rows`, and what is left is easier
        than what was asked. Report it.
      passed: samples that passed, kept or not.
      samples: samples in all.
      failures: samples that the verifier itself could not judge; they count as not passed.
    """

    rows: list[Row]
    problem_index: list[int]
    prompts: int
    prompts_without: int
    passed: int
    samples: int
    failures: int


def gold_rows(problems: Sequence[Problem]) -> list[Row]:
    """The task's own completions, one a problem.

    Raises:
      ValueError: a problem has no gold completion.
    """
    missing = [problem.index for problem in problems if not problem.gold]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(problems)} problems have no gold completion (first: index {missing[0]}); this "
            "task can only be learned from a teacher's texts"
        )
    return [_row(problem, problem.gold, True) for problem in problems]


def teacher_rows(
    problems: Sequence[Problem], texts: Sequence[str], ended: Sequence[bool] | np.ndarray
) -> list[Row]:
    """Samples as rows; sample g of problem q stands at q * G + g, as `generate` returns them.

    Raises:
      ValueError: not the same number of samples of each problem, or not one end a text.
    """
    samples = _samples_each(problems, texts, ended)
    return [
        _row(problems[place // samples], text, bool(end))
        for place, (text, end) in enumerate(zip(texts, ended, strict=True))
    ]


def verified_rows(
    task: Task,
    problems: Sequence[Problem],
    texts: Sequence[str],
    ended: Sequence[bool] | np.ndarray,
    *,
    seed: int,
    keep: int = 1,
    correct_at: float = 1.0,
) -> Verified:
    """Best of n: of each problem's G samples the `keep` best by the task's score, of those that pass.

    Samples of equal score are taken in an order drawn from the seed and the question: neither the first nor the
    shortest, which would teach a length. A text that occurs twice counts once.

    Args:
      task: the judge.
      problems: Q of them.
      texts, ended: Q * G samples, as `generate` returns them.
      seed: of the order among equals.
      keep: most samples kept of a problem.
      correct_at: smallest score that passes, in (0, 1].

    Raises:
      ValueError: shapes as in `teacher_rows`, keep < 1, correct_at out of range, or a score outside [0, 1].
    """
    samples = _samples_each(problems, texts, ended)
    if keep < 1 or not 0 < correct_at <= 1:
        raise ValueError(f"keep must be at least 1 and correct_at in (0, 1], got {keep} and {correct_at}")
    before, rows, index, passed, without = task.failures, [], [], 0, 0
    for place, problem in enumerate(problems):
        own = range(place * samples, (place + 1) * samples)
        scores = {i: _score(task, problem, texts[i], bool(ended[i])) for i in own}
        right = [i for i in own if scores[i] >= correct_at]
        passed += len(right)
        without += not right
        order = np.random.default_rng((seed, stable_hash(problem.prompt, "best"))).permutation(len(right))
        ranked = sorted(
            (right[i] for i in order), key=lambda i: -scores[i]
        )  # stable: the order among equals stays
        distinct: dict[tuple[str, bool], int] = {}
        for i in ranked:
            distinct.setdefault((texts[i], bool(ended[i])), i)
        for i in list(distinct.values())[:keep]:
            rows.append(_row(problem, texts[i], bool(ended[i])))
            index.append(place)
    return Verified(rows, index, len(problems), without, passed, len(texts), failures=task.failures - before)


def mix_rows(
    sources: Mapping[str, Sequence[Row]], shares: Mapping[str, float], count: int, seed: int
) -> list[Row]:
    """`count` rows in a random order, of each source its share, without repeating a row of a source.

    The number from each source is its share of `count`, rounded by largest remainder, so that shares hold exactly and
    not on average. A larger `count` takes further rows of the same orders.

    Args:
      sources: rows by name.
      shares: >= 0, of the same names; divided by their sum.
      count: rows wanted.
      seed: of all orders.

    Raises:
      ValueError: other names, shares that are negative or all 0, count < 1, or a source with too few rows.
    """
    if set(sources) != set(shares) or not sources:
        raise ValueError(
            f"sources and shares must have the same names, got {sorted(sources)} and {sorted(shares)}"
        )
    weights = np.array([shares[name] for name in sources], np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0) or count < 1:
        raise ValueError(
            f"shares must be numbers >= 0 that are not all 0, and count at least 1; got {dict(shares)} and {count}"
        )
    exact = count * weights / weights.sum()
    numbers = np.floor(exact).astype(int)
    # The largest remainders get one more; among equal ones the source that is named first.
    numbers[np.argsort(numbers - exact, kind="stable")[: count - numbers.sum()]] += 1
    rows: list[Row] = []
    for name, number in zip(sources, numbers, strict=True):
        own = sources[name]
        if number > len(own):
            raise ValueError(
                f"source {name!r} has {len(own)} rows, its share of {count} is {number}; sample more, lower its share "
                "or ask for fewer rows"
            )
        order = np.random.default_rng((seed, stable_hash(name, "mix"))).permutation(len(own))
        rows.extend(own[i] for i in order[:number])
    return [rows[i] for i in np.random.default_rng((seed, count)).permutation(len(rows))]


def _row(problem: Problem, completion: str, ended: bool) -> Row:
    return {"prompt": problem.prompt, "completion": completion, "ended": ended}


def _samples_each(
    problems: Sequence[Problem], texts: Sequence[str], ended: Sequence[bool] | np.ndarray
) -> int:
    """G."""
    if not problems or not len(texts) or len(texts) % len(problems) or len(texts) != len(ended):
        raise ValueError(
            f"got {len(texts)} texts and {len(ended)} ends of {len(problems)} problems; expected the same number of "
            "samples of each problem, with an end each"
        )
    return len(texts) // len(problems)


def _score(task: Task, problem: Problem, text: str, ended: bool) -> float:
    score = float(task.score(problem, text, ended))
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"task {task.name!r} gave the score {score} for {text!r}; a score must be in [0, 1]")
    return score
