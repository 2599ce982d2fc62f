"""The registry, the splits, and the recipe for a new task in the package's docstring."""

from __future__ import annotations

import itertools
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distill_jax.tasks
from distill_jax.tasks import SPLITS, TASKS, Problem, Split, get_task, split_of
from distill_jax.tasks.base import check_draw, gather, stable_hash, task_rng, unit_hash


def test_unknown_task_lists_the_tasks():
    with pytest.raises(
        ValueError, match=r"no task 'chain_arithmetik'.*did you mean 'chain_arithmetic'.*reasoning_gym"
    ):
        get_task("chain_arithmetik")


def test_unknown_option_lists_the_options():
    with pytest.raises(ValueError, match="no option 'operation'; its options: operations, gold_styles"):
        get_task("chain_arithmetic", operation=(3, 5))


def test_missing_option_is_named():
    with pytest.raises(ValueError, match="needs the option 'dataset'"):
        get_task("reasoning_gym")


def test_hash_is_the_same_on_every_machine():
    # RFC 7693 BLAKE2b with an 8-byte digest, the purpose as its personalisation, read as little-endian.
    assert stable_hash("6+4?\n", "split") == 0xDF7899957148178
    assert stable_hash("6+4?\n", "filler") != stable_hash("6+4?\n", "split")


def test_hash_shares_are_uniform():
    places = [unit_hash(str(number), "split") for number in range(20_000)]
    assert min(places) >= 0
    assert max(places) < 1
    tenths = [sum(first <= place * 10 < first + 1 for place in places) for first in range(10)]
    assert max(abs(share - 2000) for share in tenths) < 170  # four standard deviations of a binomial


@pytest.mark.parametrize("held_out", [0.2, 0.5])
def test_split_shares(held_out):
    splits = [split_of(str(number), held_out) for number in range(20_000)]
    for split, share in zip(SPLITS, (1 - held_out, held_out / 2, held_out / 2), strict=True):
        assert splits.count(split) / 20_000 == pytest.approx(share, abs=0.015)


@given(st.text())
def test_more_held_out_never_moves_a_question_back_to_training(text):
    if split_of(text, 0.5) == "train":
        assert split_of(text, 0.2) == "train"


def test_gather_keeps_the_order_and_repeats_in_training_only():
    texts = [text for text in map(str, range(1000)) if split_of(text) == "train"][:3]
    held_out = [text for text in map(str, range(1000)) if split_of(text) == "test"][:2]
    stream = [
        (text, text.upper()) for text in [texts[1], held_out[1], texts[0], texts[1], held_out[1], held_out[0]]
    ]
    assert gather(stream, "train", 3, what="t") == [texts[1], texts[0], texts[1]]
    assert gather(stream, "test", 2, what="t") == [held_out[1], held_out[0]]
    assert gather(stream, "train", 2, what="t", distinct=True) == [texts[1], texts[0]]
    assert gather(itertools.repeat(stream[0]), "train", 0, what="t") == []


def test_gather_gives_up_with_the_number_found():
    stream = itertools.cycle([(str(number), number) for number in range(100)])
    there_are = sum(split_of(str(number)) == "test" for number in range(100))
    assert len(gather(stream, "test", there_are, what="t")) == there_are
    with pytest.raises(
        ValueError, match=rf"t: {there_are + 1} distinct problems of the split 'test'.*after {there_are} of"
    ):
        gather(stream, "test", there_are + 1, what="t", patience=300)


def test_gather_counts_what_cannot_be_used():
    with pytest.raises(ValueError, match=r"after 0 of them 50 draws brought no other \(50 in all"):
        gather(itertools.repeat((_text_in("train"), None)), "train", 1, what="t", patience=50)


def _text_in(split: Split) -> str:
    return next(text for text in map(str, range(1000)) if split_of(text) == split)


@pytest.mark.parametrize(
    ("split", "count", "seed", "message"),
    [
        ("dev", 1, 0, "split must be one of train, validation, test, not 'dev'"),
        ("test", -1, 0, "count must be a whole number >= 0, not -1"),
        ("test", 1.5, 0, "count must be a whole number >= 0, not 1.5"),
        ("test", 1, -3, "seed must be a whole number >= 0, not -3"),
        ("test", True, 0, "count must be a whole number >= 0, not True"),
    ],
)
def test_bad_draws(split, count, seed, message):
    with pytest.raises(ValueError, match=message):
        check_draw(split, count, seed)
    with pytest.raises(ValueError, match=message):
        get_task("chain_arithmetic").problems(split, count, seed)


def test_the_recipe_for_a_new_task_works(monkeypatch):
    """The class in the docstring of `distill_jax.tasks`, run as it stands there."""
    recipe = distill_jax.tasks.__doc__.partition("    class Parity:")[2].partition("The line, in `TASKS`")[0]
    names = {
        "itertools": itertools,
        "Problem": Problem,
        "Split": Split,
        "check_draw": check_draw,
        "gather": gather,
        "task_rng": task_rng,
    }
    exec(textwrap.dedent("    class Parity:" + recipe), names)
    monkeypatch.setitem(TASKS, "parity", names["Parity"])
    task = get_task("parity", bits=8)
    prompts = {split: [problem.prompt for problem in task.problems(split, 12, seed=0)] for split in SPLITS}
    assert len(set(prompts["test"])) == 12
    assert not set(prompts["test"]) & set(prompts["train"])
    problem = task.problems("validation", 3, seed=1)[2]
    assert problem.index == 2
    assert int(problem.answer) == problem.prompt.count("1") % 2
    assert task.score(problem, problem.gold, ended=True) == 1.0
    assert task.score(problem, f"#### {1 - int(problem.answer)}", ended=True) == 0.0
    with pytest.raises(ValueError, match="its options: bits"):
        get_task("parity", bit=8)
