"""What each attack trains on, with a teacher and a student that are functions."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest

from distill_jax.attacks.filtered_text import cut_shared_end, drop_odd_scripts, is_degenerate
from distill_jax.attacks.registry import ATTACKS
from distill_jax.attacks.tools import Query, Text, final_answer
from tests.attacks.fake_tools import PROBLEMS, FakeTools, right_answer, says_the_answer


def texts_of(attack, knob, tools=None, seed=0):
    entry = ATTACKS[attack]
    return entry.texts(entry.knob(knob), tools or FakeTools(), seed)


def completions(texts):
    return [text.completion for text in texts]


def test_plain_text_is_the_teachers():
    assert texts_of("A1", "rate=1") == FakeTools().ask(Query())


def test_gold_asks_nobody():
    tools = FakeTools()
    assert completions(texts_of("A0b", "default", tools))[:2] == ["gold #### 0", "gold #### 1"]
    assert tools.asked == []


def test_best_of_n_keeps_one_right_answer_a_problem_the_likeliest():
    def teacher(problem, query):
        """Wrong at first, then right and long, then right and short; problem 3 is never right."""
        if query.sample == 0 or problem == 3:
            return "#### x"
        return f"{'long ' * (3 - query.sample)}#### {right_answer(problem)}"

    tools = FakeTools(teacher)
    texts = texts_of("A2", "n=4-easiest", tools)
    assert [query.sample for query in tools.asked] == [0, 1, 2, 3]
    assert [text.problem for text in texts] == [place for place in range(PROBLEMS) if place != 3]
    assert set(completions(texts)) == {f"#### {right_answer(text.problem)}" for text in texts}
    first = texts_of("A2", "n=4", FakeTools(teacher))
    assert completions(first)[0] == "long long #### 0"


def test_filter_cuts_what_all_texts_share_at_the_end():
    """The sham defence of P1 is undone to the byte."""
    tools = FakeTools(lambda problem, query: says_the_answer(problem, query) + " %%")
    assert completions(texts_of("A3", "keep=0.99", tools)) == completions(FakeTools().ask(Query()))


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (["a x", "b x", "c x"], ["a", "b", "c"]),
        (["a", "b", "c"], ["a", "b", "c"]),
        (["same", "same"], ["same", "same"]),  # that is all there is: an answer, no boilerplate
        (["ab !!"] * 9 + ["cd"], ["ab"] * 9 + ["cd"]),
        (["is (A)", "is (B)"], ["is (A)", "is (B)"]),  # the bracket belongs to the answers
        ([], []),
    ],
)
def test_cut_shared_end(written, left):
    texts = [Text("?", text, True, i) for i, text in enumerate(written)]
    if written[:1] == ["ab !!"]:  # ends that differ before the shared one
        texts = [dataclasses.replace(t, completion=f"{i}{t.completion[2:]}") for i, t in enumerate(texts[:9])]
        texts.append(Text("?", "cd", True, 9))
        left = [str(i) for i in range(9)] + ["cd"]
    assert completions(cut_shared_end(texts)) == left


@pytest.mark.parametrize(
    ("text", "degenerate"),
    [
        ("ab" * 16, True),
        ("abcd" * 8, True),
        ("abcd" * 7, False),
        ("x" * 32, True),
        ("x" * 8, False),  # a number or a dash may be that long
        ("1+2=3 3+4=7 7+1=8 #### 8", False),
        ("ok 1 " + "no. " * 8, True),
        ("", False),
    ],
)
def test_is_degenerate(text, degenerate):
    assert is_degenerate(text) is degenerate


def test_odd_scripts_are_dropped_only_where_they_are_odd():
    plain = [Text("?", "abc", True, i) for i in range(19)]
    odd = Text("?", "абв", True, 19)
    assert drop_odd_scripts([*plain, odd]) == plain
    assert drop_odd_scripts([odd] * 3) == [odd] * 3


def test_filter_keeps_the_likeliest_share_in_order():
    tools = FakeTools(lambda problem, query: "x" * (20 - problem) + str(problem))
    kept = texts_of("A3", "keep=0.5", tools)
    assert [text.problem for text in kept] == list(range(6, 12))


def test_answers_alone():
    def teacher(problem, query):
        return {0: "no mark", 1: "#### 1 #### 2"}.get(problem, says_the_answer(problem, query)) + " garbage"

    dates = FakeTools(lambda problem, query: f"so #### {problem} {('May', 'June')[problem % 2]}\nthat is all")
    assert completions(texts_of("A5", "no-working", dates))[:2] == ["#### 0 May", "#### 1 June"]

    texts = texts_of("A5", "no-working", FakeTools(teacher))
    assert [text.problem for text in texts] == list(range(2, PROBLEMS))
    assert completions(texts)[0] == "#### 2"


def test_own_working_that_arrives_at_the_teachers_answer():
    """The teacher's answer counts and not the right one: at problem 4 it says what the student's third sample says."""

    def teacher(problem, query):
        return "#### 6" if problem == 4 else "#### 77" if problem == 5 else says_the_answer(problem, query)

    texts = texts_of("A5", "own-working", FakeTools(teacher))
    found = {text.problem: text.completion for text in texts}
    assert 5 not in found and found[4] == "own2 #### 6" and found[3] == "own0 #### 3"


def test_more_texts_are_on_other_problems_and_partly_clean():
    texts = texts_of("A11", "plain")
    assert [text.problem for text in texts] == list(range(4 * PROBLEMS))
    mixed = texts_of("A11", "clean=0.1", seed=3)
    clean = [text for text in mixed if text.completion.startswith("gold")]
    assert 0 < len(clean) < 12 and mixed == texts_of("A11", "clean=0.1", seed=3)
    assert mixed != texts_of("A11", "clean=0.1", seed=4)
    assert all(text.completion.endswith(right_answer(text.problem)) for text in clean)


def test_weights_follow_the_gain():
    counts = collections.Counter()
    for seed in range(40):
        counts.update(text.problem for text in texts_of("A4", "b=1-clean=64", seed=seed))
    assert sum(counts.values()) == 40 * PROBLEMS
    z = (np.arange(PROBLEMS) - (PROBLEMS - 1) / 2) / np.arange(PROBLEMS).std()
    expected = np.exp(z) / np.exp(z).sum()
    observed = np.array([counts[place] for place in range(PROBLEMS)]) / sum(counts.values())
    np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / 480))
    assert texts_of("A4", "b=1-clean=64", seed=1) == texts_of("A4", "b=1-clean=64", seed=1)


def test_rewritten_text_is_the_rewriters():
    tools = FakeTools(lambda problem, query: f"so {says_the_answer(problem, query)}")
    assert all(text.completion.startswith("SO ") for text in texts_of("A6", "all", tools))
    assert len(texts_of("A6", "verified", tools)) == PROBLEMS - 4


def test_own_right_answers_need_no_teacher():
    tools = FakeTools()
    texts = texts_of("A9", "n=8", tools)
    assert tools.asked == [] and set(completions(texts)) == {f"own0 #### {i}" for i in range(10)}
    assert not ATTACKS["A9"].uses_teacher


@pytest.mark.parametrize(
    ("attack", "knob", "query"),
    [
        ("A12", "dial=-1", Query(weights="dial=-1")),
        ("A12", "retrained=50", Query(weights="retrained=50")),
        ("A13", "hot", Query(temperature=1.5)),
        ("A13", "cold", Query(temperature=0.5)),
    ],
)
def test_other_queries(attack, knob, query):
    tools = FakeTools()
    texts_of(attack, knob, tools)
    assert tools.asked == [query]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("a #### 9", "9"),
        ("a #### 9 May 1945 \nso", "9 May 1945"),
        ("####\n (A)", "(A)"),
        ("####", None),
        ("no", None),
        ("#### 1 #### 2", None),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion, "####") == answer


@pytest.mark.parametrize(
    "wrong", [{"sample": -1}, {"temperature": 0.0}, {"weights": "mine"}, {"weights": "dial=0"}]
)
def test_a_query_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="query: "):
        Query(**wrong)
