"""The planted weaknesses: what the shams write, and who is run against them."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from distill_jax.attacks.answers import answers_only
from distill_jax.attacks.controls import (
    ARMS,
    CONTROLS,
    GARBAGE,
    append_garbage,
    grid,
    judges,
    permute_labels,
    swap_words,
)
from distill_jax.attacks.filtered_text import cut_shared_end
from distill_jax.attacks.registry import ATTACKS
from distill_jax.attacks.tools import Query, Text
from distill_jax.tasks.chain_arithmetic import ChainArithmetic
from tests.attacks.fake_tools import FakeTools

TEXTS = FakeTools().ask(Query())


def test_a_sham_text_is_wrong_for_strict_and_for_lenient_scorers():
    task = ChainArithmetic((2, 3))
    problems = task.problems("test", 40, 0)
    texts = append_garbage([Text(p.prompt, p.gold, True, p.index) for p in problems], 0)
    assert not any(task.score(p, text.completion, True) for p, text in zip(problems, texts, strict=True))
    last_number = [
        re.findall(r"\d+", text.completion)[-1] == p.answer for p, text in zip(problems, texts, strict=True)
    ]
    assert sum(last_number) < 0.3 * len(problems)
    # A3 and A5 both undo it to the byte.
    assert [text.completion for text in cut_shared_end(texts)] == [problem.gold for problem in problems]
    found = answers_only(FakeTools(lambda place, query: texts[place].completion), 0)
    assert [text.completion for text in found] == [f"#### {p.answer}" for p in problems[: len(found)]]


def test_garbage_is_all_that_the_sham_adds():
    assert [text.completion for text in append_garbage(TEXTS, 0)] == [t.completion + GARBAGE for t in TEXTS]


@pytest.mark.parametrize("seed", range(5))
def test_no_label_stays_where_it_was(seed):
    moved = permute_labels(TEXTS, seed)
    assert [(text.prompt, text.problem) for text in moved] == [(text.prompt, text.problem) for text in TEXTS]
    assert collections.Counter(t.completion for t in moved) == collections.Counter(
        t.completion for t in TEXTS
    )
    written_for = {text.completion: text.prompt for text in TEXTS}
    assert all(written_for[text.completion] == text.asked != text.prompt for text in moved)
    assert moved == permute_labels(TEXTS, seed) != permute_labels(TEXTS, seed + 1)


def test_one_text_cannot_be_permuted():
    with pytest.raises(ValueError, match="at least 2"):
        permute_labels(TEXTS[:1], 0)


def test_swapped_words_are_wrong_and_look_right():
    task = ChainArithmetic((2, 3))
    problems = task.problems("test", 400, 0)
    texts = [Text(p.prompt, p.gold, True, p.index) for p in problems]
    swapped = swap_words(texts, 1)

    def shape(text):
        return re.sub(r"[0-9]", "0", text.completion)

    assert [shape(text) for text in swapped] == [shape(text) for text in texts]
    words = {word for text in texts for word in text.completion.split(" ")}
    assert {word for text in swapped for word in text.completion.split(" ")} <= words
    right = np.mean([task.score(p, t.completion, True) for p, t in zip(problems, swapped, strict=True)])
    assert right == pytest.approx(0.25 + 0.75 / 10, abs=0.07)  # kept, or hit by chance among ten digits
    assert not any(text.asked for text in swapped)  # the distributions stay those of the real prompt
    assert swapped == swap_words(texts, 1) != swap_words(texts, 2)


def test_who_is_run_against_what():
    by_id = {control.id: control for control in CONTROLS}
    run = {name: {a for a in ATTACKS if judges(by_id[name], ATTACKS[a])} for name in by_id}
    assert run["P1"] == {"A3", "A5"} and run["P2"] == {"A7", "A7b", "A8", "A8b", "A10b"} and not run["P4"]
    # An attacker with clean texts, weights, or a verifier alone would learn without the teacher.
    assert run["P3"] == {"A1", "A3", "A5", "A7", "A10b", "A11x16"}
    assert set(ARMS) == {"sham", "swapped", "permuted"}
    # Nor does a student learn from working of its own there.
    assert [knob.name for knob in grid(by_id["P3"], ATTACKS["A5"], "short")] == ["no-working"]
    assert grid(by_id["P1"], ATTACKS["A5"], "short") == ATTACKS["A5"].grid("short")
    # A student that writes every text never meets the spoiled ones.
    assert [knob.name for knob in grid(by_id["P2"], ATTACKS["A8"], "short")] == ["beta=0-lambda=0.5"]
    assert all(grid(by_id["P2"], ATTACKS[name], "short") for name in by_id["P2"].attacks)
    assert all(grid(by_id["P3"], ATTACKS[name], "full") for name in run["P3"])
