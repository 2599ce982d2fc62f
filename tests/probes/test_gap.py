"""The gap: bits by hand, wrong-trace preference planted both ways, and students that are always or never right."""

from __future__ import annotations

import numpy as np
import pytest

from distill_jax.probes import gap
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.texts import TextPair, Texts
from tests.probes.bigram_models import EOS, bigram, letter_tokenizer, probabilities, random_table, uniform

CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200)
QUESTIONS = tuple("aabbccdd")  # four prompts, two answers each
STUDENT_TEXTS = Texts(QUESTIONS, ("c", "d") * 4, [True] * 8, correct=[True, False] * 4)
PAIR = TextPair(Texts(("a", "b", "c", "d"), ("ab", "b", "ba", ""), [True] * 4), STUDENT_TEXTS)


def test_bits_per_byte_by_hand() -> None:
    teacher, student = random_table(1), random_table(2)
    p, q = probabilities(teacher), probabilities(student)
    result = gap.measure(bigram(teacher), bigram(student), PAIR, config=CONFIG)
    steps = [(0, 0), (0, 1), (1, EOS), (1, 1), (1, EOS), (2, 1), (1, 0), (0, EOS), (3, EOS)]
    bits = sum(np.log2(p[s] / q[s]) for s in steps)
    assert result.forward.mean == pytest.approx(bits / 5, rel=1e-4)  # ab, b, ba and nothing: five bytes
    right = sum(np.log2(q[i, 2] / p[i, 2]) for i in range(4)) + 4 * np.log2(q[2, EOS] / p[2, EOS])
    assert result.reverse["right"].mean == pytest.approx(right / 4, rel=1e-3)
    assert result.reverse["all"].mean == pytest.approx(
        (result.reverse["right"].mean + result.reverse["wrong"].mean) / 2, rel=1e-4
    )
    entropy_p, entropy_q = (-(x * np.log(x)).sum(1) for x in (p, q))
    before = [0, 1, 2, 3, 2, 2, 2, 2]
    assert result.entropy_gap["right"].mean == pytest.approx((entropy_q - entropy_p)[before].mean(), rel=1e-3)


def test_top_k_overlap_by_hand() -> None:
    teacher, student = uniform(), uniform()
    teacher[:, [0, 1]], student[:, [1, 2]] = 5.0, 5.0
    result = gap.measure(bigram(teacher), bigram(student), PAIR, config=CONFIG, k=2)
    assert result.top_k_overlap["all"].mean == pytest.approx(0.5)
    assert gap.measure(bigram(teacher), bigram(student), PAIR, config=CONFIG).top_k_overlap["all"].mean == 1.0


@pytest.mark.parametrize("merged", [False, True])
def test_wrong_trace_preference_is_found_where_it_is_planted(merged: bool) -> None:
    """Wrong answers are "d", right ones "c": the teacher likes one of them more than the student does."""
    # Across vocabularies the student has the piece "ab" besides; neither c nor d is in it.
    other = letter_tokenizer("ab") if merged else letter_tokenizer()
    student = bigram(uniform(), tokenizer=other)
    for liked, preference in ((3, 1.0), (2, 0.0)):
        table = uniform()
        table[:, liked] = 4.0
        result = gap.measure(bigram(table), student, PAIR, config=CONFIG)
        assert result.wrong_trace_preference.mean == preference
        assert result.wrong_trace_preference_teacher.mean == preference
        assert result.wrong_trace_preference.n == 4 and None not in result.wrong_trace_preference.ci95
    equal = gap.measure(bigram(uniform()), student, PAIR, config=CONFIG)
    assert equal.wrong_trace_preference.mean == 0.5  # every pair is a tie


def test_the_preference_is_over_pairs_within_prompts() -> None:
    """Prompt 0: scores of wrong 3, 1 and right 2, 0: of four pairs 3 > 2, 3 > 0, 1 > 0 prefer the wrong one."""
    score = np.array([3.0, 1.0, 2.0, 0.0, 9.0, 1.0, 1.0])
    correct = np.array([False, False, True, True, False, True, False])
    index, usable = np.array([0, 0, 0, 0, 1, 2, 2]), np.ones(7, bool)
    preference, has = gap.pair_preference(score, correct, index, 3, usable)
    assert preference.tolist() == [0.75, 0.0, 0.5] and has.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("correct", "note"),
    [
        ([False] * 8, "needs right answers to compare with, and the student has none at all"),
        ([True] * 8, "needs wrong answers, and the student has none at all"),
        ([True, True, False, False] * 2, "no prompt has both right and wrong answers"),
        (None, "the student's answers are not judged"),
    ],
)
def test_without_pairs_it_says_so(correct: list[bool] | None, note: str) -> None:
    texts = Texts(QUESTIONS, STUDENT_TEXTS.completions, [True] * 8, correct=correct)
    result = gap.measure(
        bigram(random_table(1)), bigram(random_table(2)), TextPair(PAIR.teacher, texts), config=CONFIG
    )
    assert result.wrong_trace_preference.mean is None and result.wrong_trace_preference.ci95 == (None, None)
    assert len(result.notes) == 1 and note in result.notes[0]
    assert np.isfinite(result.reverse["all"].mean)
    for name in ("right", "wrong"):
        value = result.reverse.get(name)
        assert value is None or value.mean is None or np.isfinite(value.mean)


def test_empty_and_one_token_answers() -> None:
    """Row 0 is empty and did not end: no token, no bytes, and no pair with row 1; the others are one token each."""
    texts = Texts(
        ("a", "a", "b", "b"), ("", "c", "", "d"), [False, False, True, False], [True, False, True, False]
    )
    teacher = Texts(("a", "b"), ("", ""), [True, False])
    result = gap.measure(
        bigram(random_table(1)), bigram(random_table(2)), TextPair(teacher, texts), config=CONFIG
    )
    assert result.wrong_trace_preference.n == 1 and result.wrong_trace_preference.mean in (0.0, 1.0)
    assert result.forward.mean is None  # the teacher's texts have no byte
    assert np.isfinite(result.reverse["wrong"].mean) and result.reverse["right"].mean is None
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        gap.measure(bigram(uniform()), bigram(uniform()), PAIR, k=0)
