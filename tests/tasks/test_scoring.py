"""Any task's verifier may raise, exit or hang: each costs one sample."""

from __future__ import annotations

import threading
import time

import pytest

from distill_jax.tasks.base import Problem
from distill_jax.tasks.scoring import score_all

PROBLEMS = [Problem(str(number), str(number), str(number), number) for number in range(6)]


class Odd:
    name = "odd"
    failures = 0

    def __init__(self) -> None:
        self.released = threading.Event()
        self.scored: list[str] = []

    def problems(self, split, count, seed):
        return PROBLEMS[:count]

    def score(self, problem, completion, ended):
        self.scored.append(completion)
        if completion == "hangs":
            self.released.wait(30)
        if completion == "exits":
            raise SystemExit(3)
        if completion == "times out by itself":
            raise TimeoutError("as a verifier may")
        return float(ended and completion == problem.answer)


@pytest.fixture
def task():
    odd = Odd()
    yield odd
    odd.released.set()


def test_what_hangs_or_raises_costs_its_sample(task, caplog):
    texts = ["0", "hangs", "2", "exits", "times out by itself", "5"]
    rewards, failed = score_all(task, PROBLEMS, texts, [True] * 5 + [False], seconds=0.3)
    assert rewards == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0] and failed == 3
    assert task.scored == texts  # each once
    assert caplog.text.count("could not judge") == 1 and "more than 0.3 s" in caplog.text


def test_a_thread_that_was_left_behind_scores_nothing_more(task):
    score_all(task, PROBLEMS[:2], ["hangs", "1"], [True] * 2, seconds=0.2)
    task.released.set()
    time.sleep(0.2)
    assert task.scored == ["hangs", "1"]


def test_a_batch_that_cannot_be_judged_is_judged_row_by_row(caplog):
    class Batched(Odd):
        def score_batch(self, problems, completions, ended):
            raise RuntimeError("one of them is odd")

    rewards, failed = score_all(Batched(), PROBLEMS[:3], ["0", "exits", "2"], [True] * 3)
    assert rewards == [1.0, 0.0, 1.0] and failed == 1
    assert "judged one by one" in caplog.text


def test_no_number_is_no_reward(caplog):
    class Blank(Odd):
        def score(self, problem, completion, ended):
            return float("nan") if completion == "0" else 1.0

    assert score_all(Blank(), PROBLEMS[:2], ["0", "1"], [True] * 2) == ([0.0, 1.0], 1)
    assert "it gave nan" in caplog.text


def test_no_rows(task):
    assert score_all(task, [], [], []) == ([], 0)
    with pytest.raises(ValueError, match="zip"):
        score_all(task, PROBLEMS, ["0"], [True])
