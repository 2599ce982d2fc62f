"""The tables of texts: columns, prompts and rollouts that belong together."""

from __future__ import annotations

import numpy as np
import pytest

from distill_jax.generation import generate
from distill_jax.probes.texts import TextPair, Texts, from_rollouts, prompt_index
from tests.probes.bigram_models import EOS, bigram, uniform


def test_columns_are_normalised() -> None:
    texts = Texts(["a", "b"], ["é", ""], [1, 0], correct=[0, 1], answer_starts=[0, -1])
    assert texts.ended.dtype == bool and texts.correct.tolist() == [False, True] and len(texts) == 2
    assert texts.bytes.tolist() == [2, 0] and texts.completions == ("é", "")


def test_prompts_are_numbered_by_question_whatever_the_order() -> None:
    first, second = Texts(("b", "a", "b"), ("",) * 3, [True] * 3), Texts(("c", "a"), ("",) * 2, [True] * 2)
    (one, two), count = prompt_index(first, second)
    assert one.tolist() == [1, 0, 1] and two.tolist() == [2, 0] and count == 3
    (two, one), count = prompt_index(second, first)
    assert one.tolist() == [1, 0, 1] and two.tolist() == [2, 0] and count == 3


def test_rollouts_keep_their_ids() -> None:
    table = uniform()
    table[:, EOS] = 1e4
    rollouts = generate(bigram(table).model, ["a", "b"], num_samples=2, max_new_tokens=2, temperature=0.0)
    texts = from_rollouts(["a", "b"], rollouts, correct=[True, False] * 2)
    assert texts.questions == ("a", "a", "b", "b") and texts.ids == tuple([[EOS]] * 4)
    assert texts.ended.all() and texts.completions == ("",) * 4
    with pytest.raises(ValueError, match="got 1 questions for 4 completions with 2 a prompt"):
        from_rollouts(["a"], rollouts)


def test_refuses_columns_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"texts\.completions has 1 rows, but there are 2 questions"):
        Texts(("a", "b"), ("",), [True, True])
    with pytest.raises(ValueError, match=r"texts\.correct has 3 rows"):
        Texts(("a", "b"), ("", ""), [True, True], correct=np.zeros(3))
    with pytest.raises(ValueError, match="texts has no rows"):
        Texts((), (), [])
    with pytest.raises(ValueError, match="got one text"):
        Texts("ab", ("", ""), [True, True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"such as 'x', only in the student's texts.*one task"):
        TextPair(Texts(("a",), ("",), [True]), Texts(("a", "x"), ("", ""), [True, True]))


@pytest.mark.parametrize("verdicts", [[0.3], [float("nan")], [2]])
def test_a_reward_is_no_verdict(verdicts: list[float]) -> None:
    with pytest.raises(ValueError, match=r"texts\.correct holds .*; expected a verdict of 0 or 1"):
        Texts(("q",), ("c",), [True], correct=np.array(verdicts))
    assert Texts(("q",), ("c",), [True], correct=np.array([1.0])).correct is not None
