"""Overconfidence: confidences, ECE and AURC by hand, a planted rise, and answers that are not there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from distill_jax.probes import overconfidence
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.texts import Texts, answer_starts_after
from distill_jax.probes.values import Bootstrap
from tests.probes.bigram_models import EOS, V, bigram, letter_tokenizer, probabilities, random_table, uniform

CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200)
# The answer is what stands behind the last "f".
COMPLETIONS = ("afb", "bfcd", "fb", "cc")
TEXTS = Texts(
    ("a", "b", "c", "d"),
    COMPLETIONS,
    [True] * 4,
    correct=[True, False, False, False],
    answer_starts=answer_starts_after(COMPLETIONS, "f"),
)


def test_answer_starts() -> None:
    assert TEXTS.answer_starts.tolist() == [2, 2, 1, -1]
    assert answer_starts_after(["é ####  7", "#### ", "#### 1 #### 2"], "####").tolist() == [9, -1, 12]


def test_confidence_is_that_of_the_answer_alone() -> None:
    table = random_table(1)
    p = probabilities(table)
    result = overconfidence.measure(bigram(random_table(2)), bigram(table), TEXTS, config=CONFIG)
    of_answers = [p[5, 1], (p[5, 2] + p[2, 3]) / 2, p[5, 1]]
    assert result.confidence_right["after"].mean == pytest.approx(of_answers[0], rel=1e-4)
    assert result.confidence_wrong["after"].mean == pytest.approx(np.mean(of_answers[1:]), rel=1e-4)
    assert result.accuracy["after"].mean == pytest.approx(1 / 3)
    entropy = -(p * np.log(p)).sum(1)
    expected = ((entropy[5] + entropy[2]) / 2 + entropy[5]) / 2
    assert result.entropy_wrong["after"].mean == pytest.approx(expected, rel=1e-4)
    q = probabilities(random_table(2))
    of_teacher = ((q[5, 2] + q[2, 3]) / 2 + q[5, 1]) / 2
    assert result.teacher_confidence_wrong.mean == pytest.approx(of_teacher, rel=1e-4)
    assert result.notes == ("1 of 4 answers of the student hold no answer to be confident about; left out",)
    joint = overconfidence.measure(
        bigram(random_table(2)), bigram(table), TEXTS, config=CONFIG, confidence="joint"
    )
    assert joint.confidence_wrong["after"].mean == pytest.approx((p[5, 2] * p[2, 3] + p[5, 1]) / 2, rel=1e-4)


def test_without_a_start_the_whole_completion_is_the_answer() -> None:
    """The end of a text counts, so that an empty answer that ended has one token; one that did not has none."""
    p = probabilities(table := random_table(1))
    texts = Texts(("a", "b", "c"), ("", "", "d"), [True, False, False], correct=[False] * 3)
    result = overconfidence.measure(bigram(table), bigram(table), texts, config=CONFIG)
    assert result.confidence_wrong["after"].mean == pytest.approx((p[0, EOS] + p[2, 3]) / 2, rel=1e-4)
    assert result.accuracy["after"].mean == 0.0 and result.confidence_right["after"].mean is None
    assert "the student has no right answers: there is no confidence on them" in result.notes


def test_calibration_error_by_hand() -> None:
    """Bins [.9, 1): two answers of confidence .95, one right: |.95 - .5|. [.2, .3): one of .25, wrong: .25."""
    confidence, error = np.array([0.95, 0.95, 0.25]), np.array([0.0, 1.0, 1.0])
    statistic = overconfidence._calibration_error(confidence, error, np.arange(3), 3)
    assert Bootstrap(3, 50).estimate(statistic, 3).mean == pytest.approx(2 / 3 * 0.45 + 1 / 3 * 0.25)


def test_risk_coverage_by_hand() -> None:
    """Sorted: right, wrong, right, wrong: risks 0, 1/2, 1/3, 1/2. Ties are accepted together, whatever their order."""
    confidence, error = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.0, 1.0, 0.0, 1.0])
    statistic = overconfidence._risk_coverage(confidence, error, np.arange(4))
    assert statistic(np.ones((4, 1)))[0] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    tied = np.array([0.9, 0.9, 0.1, 0.1])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):
        statistic = overconfidence._risk_coverage(tied[order], error[order], np.arange(4))
        assert statistic(np.ones((4, 1)))[0] == pytest.approx(0.5)
    # A draw that takes the first answer twice and leaves the last out.
    weights = np.array([[2.0], [1.0], [1.0], [0.0]])
    statistic = overconfidence._risk_coverage(confidence, error, np.arange(4))
    assert statistic(weights)[0] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)


def test_self_consistency_by_hand() -> None:
    """Prompt "a": answers 1, 1, 2 and one that cannot be read; of three others one agrees on 1, and none on 2."""
    texts = Texts(
        ("a", "a", "a", "a"),
        ("b", "b", "c", "d"),
        [True] * 4,
        correct=[False, False, True, False],
        answers=("1", "1", "2", None),
    )
    result = overconfidence.measure(
        bigram(uniform()), bigram(uniform()), texts, config=CONFIG, confidence="self_consistency"
    )
    assert result.confidence_wrong["after"].mean == pytest.approx(1 / 3)
    assert result.confidence_right["after"].mean == 0.0
    assert result.teacher_confidence_wrong.mean == pytest.approx(1 / V, rel=1e-4)
    with pytest.raises(ValueError, match=r"self_consistency needs texts\.answers"):
        unread = dataclasses.replace(texts, answers=None)
        overconfidence.measure(
            bigram(uniform()), bigram(uniform()), unread, config=CONFIG, confidence="self_consistency"
        )


@pytest.mark.parametrize("merged", [False, True])
def test_a_planted_rise_in_confidence_is_found(merged: bool) -> None:
    """Before, every letter is as likely as any; after, "b" follows everything, right or wrong."""
    sure = uniform()
    sure[:, 1] = 50.0
    texts = Texts(("a", "b", "c", "d"), ("b",) * 4, [False] * 4, correct=[False, True, False, False])
    teacher = bigram(uniform(), tokenizer=letter_tokenizer("cd") if merged else None)
    result = overconfidence.measure(
        teacher, bigram(sure), texts, base=bigram(uniform()), base_batch=texts, config=CONFIG
    )
    assert result.confidence_wrong["change"].ci95[0] > 0.7
    assert result.expected_calibration_error["change"].mean > 0.3
    same = overconfidence.measure(
        teacher, bigram(uniform()), texts, base=bigram(uniform()), base_batch=texts, config=CONFIG
    )
    assert same.confidence_wrong["change"].mean == pytest.approx(0.0, abs=1e-9)
    assert result.teacher_confidence_wrong.mean == pytest.approx(1 / V, rel=1e-4)


def test_refuses_bad_input() -> None:
    model = bigram(uniform())
    with pytest.raises(ValueError, match=r"needs texts\.correct"):
        overconfidence.measure(model, model, Texts(("a",), ("b",), [True]), config=CONFIG)
    with pytest.raises(ValueError, match="confidence must be one of"):
        overconfidence.measure(model, model, TEXTS, confidence="hunch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base and base_batch go together"):
        overconfidence.measure(model, model, TEXTS, base=model)
    other = Texts(("e",), ("b",), [True], correct=[True])
    with pytest.raises(ValueError, match="must answer the same questions"):
        overconfidence.measure(model, model, TEXTS, base=model, base_batch=other)
