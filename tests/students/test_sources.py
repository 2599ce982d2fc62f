"""Sources of text: what is kept, what is counted, and that a seed tells everything."""

from __future__ import annotations

import pytest

from distill_jax.students.sources import gold_rows, mix_rows, teacher_rows, verified_rows
from distill_jax.tasks.base import Problem

PROBLEMS = [Problem(f"{n}+1?", str(n + 1), f"= {n + 1}", n) for n in range(3)]


class Endings:
    """1 for a text that closed and ends in the answer, half for one that only names it; "?" breaks the verifier."""

    name = "endings"
    failures = 0

    def score(self, problem, completion, ended):
        if completion == "?":
            self.failures += 1
            return 0.0
        if ended and completion.endswith(problem.answer):
            return 1.0
        return 0.5 if problem.answer in completion else 0.0


# Four samples of each problem: two right and a half, none right, one right (and one that ends nothing).
TEXTS = ["=1", "is 1", "1, no", "9", "1", "?", "x", "y", "=3", "=3", "z", "33x"]
ENDED = [True, True, True, True, True, True, True, True, False, True, True, True]


def verified(seed=0, **options):
    return verified_rows(Endings(), PROBLEMS, TEXTS, ENDED, seed=seed, **options)


def texts_of(rows):
    return [row["completion"] for row in rows]


def test_gold():
    assert gold_rows(PROBLEMS) == [
        {"prompt": f"{n}+1?", "completion": f"= {n + 1}", "ended": True} for n in range(3)
    ]
    with pytest.raises(ValueError, match=r"1 of 2 problems have no gold completion \(first: index 7\)"):
        gold_rows([PROBLEMS[0], Problem("q", "", "", 7)])


def test_teacher_rows_are_in_the_order_of_generate():
    rows = teacher_rows(PROBLEMS, TEXTS, ENDED)
    assert len(rows) == 12 and texts_of(rows) == TEXTS
    assert [row["prompt"] for row in rows] == [p.prompt for p in PROBLEMS for _ in range(4)]
    assert rows[8] == {"prompt": "2+1?", "completion": "=3", "ended": False}


def test_verified_keeps_what_passes_and_counts_what_does_not():
    result = verified()
    assert result.problem_index == [0, 2] and [row["prompt"] for row in result.rows] == ["0+1?", "2+1?"]
    assert result.rows[0]["completion"] in ("=1", "is 1") and result.rows[1]["completion"] == "=3"
    assert result.rows[1]["ended"] is True
    counts = (result.prompts, result.prompts_without, result.passed, result.samples, result.failures)
    assert counts == (3, 1, 3, 12, 1)


def test_verified_takes_the_best_first():
    """At a lower bar half right passes too, but never before right."""
    for seed in range(8):
        result = verified(seed, correct_at=0.5, keep=4)
        assert set(texts_of(result.rows[:2])) == {"=1", "is 1"} and result.rows[2]["completion"] == "1, no"
        assert result.problem_index == [0, 0, 0, 2, 2, 2]  # of problem 2: right, half, half
        assert result.rows[3] == {"prompt": "2+1?", "completion": "=3", "ended": True}
        assert result.prompts_without == 1 and result.passed == 6


def test_among_equals_the_seed_decides_and_alone():
    chosen = [verified(seed).rows[0]["completion"] for seed in range(20)]
    assert set(chosen) == {"=1", "is 1"}
    assert chosen == [verified(seed).rows[0]["completion"] for seed in range(20)]
    alone = [
        verified_rows(Endings(), PROBLEMS[:1], TEXTS[:4], ENDED[:4], seed=seed).rows[0]["completion"]
        for seed in range(20)
    ]
    assert alone == chosen  # other problems have no say


def test_a_text_counts_once():
    result = verified_rows(Endings(), PROBLEMS[:1], ["=1", "=1", "a1"], [True] * 3, seed=0, keep=3)
    assert sorted(texts_of(result.rows)) == ["=1", "a1"] and result.passed == 3


def source(name, count=10):
    return [{"prompt": str(i), "completion": f"{name}{i}", "ended": True} for i in range(count)]


def test_a_mixture_has_exact_shares_and_repeats_nothing():
    sources = {"gold": source("g"), "teacher": source("t")}
    mixed = mix_rows(sources, {"gold": 1, "teacher": 3}, 10, seed=0)
    completions = texts_of(mixed)
    assert len(set(completions)) == 10
    assert sum(c.startswith("g") for c in completions) == 3  # 2.5 and 7.5: the first named gets the odd one
    assert completions != sorted(completions)  # shuffled
    assert all(row in sources["gold"] + sources["teacher"] for row in mixed)


def test_a_mixture_is_a_function_of_its_seed():
    sources = {"gold": source("g"), "teacher": source("t")}
    shares = {"gold": 0.5, "teacher": 0.5}
    first = mix_rows(sources, shares, 8, seed=3)
    assert first == mix_rows(sources, shares, 8, seed=3) != mix_rows(sources, shares, 8, seed=4)
    more = texts_of(mix_rows(sources, shares, 16, seed=3))
    assert set(texts_of(first)) < set(more)  # a larger budget adds to a smaller one


def test_shares_of_zero_and_of_everything():
    sources = {"gold": [], "teacher": source("t", 4)}
    mixed = mix_rows(sources, {"gold": 0, "teacher": 2}, 4, seed=0)
    assert sorted(texts_of(mixed)) == ["t0", "t1", "t2", "t3"]


def mixing(shares, count=4):
    return lambda: mix_rows({"a": source("a", 2), "b": source("b", 9)}, shares, count, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: teacher_rows(PROBLEMS, TEXTS[:-1], ENDED[:-1]), "same number of samples of each problem"),
        (lambda: teacher_rows(PROBLEMS, TEXTS, ENDED[:-1]), "12 texts and 11 ends of 3 problems"),
        (lambda: teacher_rows([], [], []), "0 texts and 0 ends of 0 problems"),
        (lambda: verified(keep=0), "keep must be at least 1"),
        (lambda: verified(correct_at=0.0), "correct_at in"),
        (mixing({"a": 1, "c": 1}), "must have the same names"),
        (mixing({"a": -1, "b": 2}), "numbers >= 0"),
        (mixing({"a": 0, "b": 0}), "not all 0"),
        (mixing({"a": 1, "b": 1}, 0), "count at least 1"),
        (mixing({"a": 1, "b": 1}, 8), "source 'a' has 2 rows, its share of 8 is 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_score_out_of_range_is_refused():
    class Broken(Endings):
        def score(self, problem, completion, ended):
            return 2.0

    with pytest.raises(ValueError, match=r"gave the score 2.0 for 'a'"):
        verified_rows(Broken(), PROBLEMS[:1], ["a"], [True], seed=0)
