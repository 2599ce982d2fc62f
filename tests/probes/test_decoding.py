"""Decoding: repetition and loops by hand, a student that loops and one that does not."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest

from distill_jax.probes import decoding
from distill_jax.probes.decoding import in_loop, repeated_ngrams
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.texts import TextPair, Texts
from tests.probes.bigram_models import bigram, uniform

CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200)
QUESTIONS = ("a", "b", "c", "d")


def test_repeated_ngrams() -> None:
    assert repeated_ngrams(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == 1
    assert repeated_ngrams(np.array([7] * 7)) == 3 and repeated_ngrams(np.array([1, 2, 3])) == 0


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([5] * 12, True),
        ([5] * 11, False),  # shorter than 12 tokens
        ([1, 2, 3, 4, 5] * 4, True),
        ([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4], False),  # not quite three further periods
        ([9, 8, 7] + [1, 2, 3] * 4 + [6, 5], True),  # in the middle
        (list(range(40)), False),
        (list(range(33)) * 4, False),  # a period beyond 32
        ([], False),
        ([3], False),
    ],
)
def test_loops(ids: list[int], loops: bool) -> None:
    assert in_loop(np.array(ids, np.int64)) is loops


def test_counts_by_hand() -> None:
    student = Texts(
        QUESTIONS,
        ("abcabcabcabc", "abcd", "", "f"),
        [False, True, True, False],
        answers=("1", "2", None, None),
    )
    teacher = Texts(QUESTIONS, ("abcd", "bcde", "a", "f"), [True] * 4, answers=("1",) * 4)
    table = uniform()
    table[:, 5] = 1e-5  # nobody writes "f", says the teacher: p < exp(-10)
    result = decoding.measure(
        bigram(table), bigram(uniform()), TextPair(teacher, student), config=CONFIG, limit=12
    )
    tokens = 12 + 4 + 0 + 1
    assert result.per_1k["repeated"].mean == pytest.approx(1000 * 6 / tokens)  # 9 4-grams, 3 of them distinct
    assert result.per_1k["loops"].mean == pytest.approx(1000 / tokens)
    assert result.per_1k["surprises"].mean == pytest.approx(1000 / tokens)
    expected = {
        "repeated": 0.25,
        "loops": 0.25,
        "surprises": 0.25,
        "no_end": 0.5,
        "truncated": 0.25,
        "unparsable": 0.5,
    }
    assert {event: value.mean for event, value in result.per_response.items()} == expected
    excess = {"repeated": 0.25, "loops": 0.25, "surprises": 0.0, "no_end": 0.5, "unparsable": 0.5}
    assert {event: value.mean for event, value in result.excess.items()} == excess
    assert result.distinct_2["student"].mean == pytest.approx((3 + 3) / (11 + 3))
    packed = sum(len(zlib.compress(text.encode(), 9)) for text in ("abcabcabcabc", "abcd", "f"))
    assert result.compression["student"].mean == pytest.approx(tokens / packed)
    assert result.notes == ()


def test_a_planted_loop_is_found() -> None:
    model = bigram(uniform())
    teacher = Texts(QUESTIONS, ("abcdef", "bcdefa", "cdefab", "defabc"), [True] * 4)
    looping = dataclasses.replace(teacher, completions=("ab" * 8,) * 4, ended=np.zeros(4, bool))
    found = decoding.measure(model, model, TextPair(teacher, looping), config=CONFIG)
    assert found.excess["loops"].mean == 1.0 and found.per_1k["repeated"].mean > 500
    assert found.compression["student"].mean > found.compression["teacher"].mean
    clean = decoding.measure(model, model, TextPair(teacher, teacher), config=CONFIG)
    assert clean.excess["loops"].mean == clean.per_1k["repeated"].mean == 0.0
    assert clean.notes == ("unparsable answers are not counted: the student's texts carry no answers",)


def test_empty_texts_are_said() -> None:
    model = bigram(uniform())
    teacher = Texts(QUESTIONS, ("a", "b", "c", "d"), [True] * 4)
    empty = Texts(QUESTIONS, ("",) * 4, [False] * 4, answers=(None,) * 4)
    result = decoding.measure(model, model, TextPair(teacher, empty), config=CONFIG)
    assert result.per_1k["loops"].mean is None and result.compression["student"].mean is None
    assert result.per_response["no_end"].mean == result.per_response["unparsable"].mean == 1.0
    assert result.notes == ("all of the student's texts are empty: there are no tokens to count by",)
