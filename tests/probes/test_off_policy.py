"""Off-policy instability: by hand, and a pair that disagrees only where the student goes."""

from __future__ import annotations

import numpy as np
import pytest

from distill_jax.probes import off_policy
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.texts import TextPair, Texts
from distill_jax.probes.values import Bootstrap
from tests.probes.bigram_models import EOS, bigram, probabilities, random_table, uniform

CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200)
QUESTIONS = ("a", "b", "ba")


def pair(teacher: tuple[str, ...], student: tuple[str, ...], ended: bool = False) -> TextPair:
    return TextPair(
        Texts(QUESTIONS, teacher, [ended] * len(teacher)), Texts(QUESTIONS, student, [ended] * len(student))
    )


def test_cells_by_hand() -> None:
    teacher, student = random_table(1), random_table(2)
    p, q = probabilities(teacher), probabilities(student)
    forward, reverse = (p * np.log(p / q)).sum(1), (q * np.log(q / p)).sum(1)
    texts = pair(("ab", "c", ""), ("dd", "ee", "f"), ended=True)
    result = off_policy.measure(bigram(teacher), bigram(student), texts, config=CONFIG)
    before_t, before_s = [0, 0, 1, 1, 2, 0], [0, 3, 3, 1, 4, 4, 0, 5]
    assert result.kl["forward.teacher"].mean == pytest.approx(forward[before_t].mean(), rel=1e-4)
    assert result.kl["forward.student"].mean == pytest.approx(forward[before_s].mean(), rel=1e-4)
    assert result.kl["reverse.teacher"].mean == pytest.approx(reverse[before_t].mean(), rel=1e-4)
    assert result.kl["reverse.student"].mean == pytest.approx(reverse[before_s].mean(), rel=1e-4)
    drift = forward[before_s].mean() - forward[before_t].mean()
    assert result.drift["forward"].mean == pytest.approx(drift, rel=1e-3)
    # Slope: least squares over the places 0, .5, 1 | 0, 1 | 0 of the teacher's texts.
    place = np.array([0, 0.5, 1, 0, 1, 0])
    assert result.slope["forward.teacher"].mean == pytest.approx(
        np.polyfit(place, forward[before_t], 1)[0], rel=1e-3
    )
    means = np.array([forward[[0, 0, 1]].mean(), forward[[1, 2]].mean(), forward[0]])
    assert result.variation["forward.teacher"].mean == pytest.approx(means.std() / means.mean(), rel=1e-3)
    # Log-ratios of every token, and the weights of the three texts.
    steps = [[(0, 0), (0, 1), (1, EOS)], [(1, 2), (2, EOS)], [(0, EOS)]]
    gaps = [[np.log(p[s] / q[s]) for s in text] for text in steps]
    assert result.log_ratio_999["teacher"].mean == pytest.approx(
        max(abs(g) for text in gaps for g in text), rel=1e-4
    )
    weight = np.exp([-sum(text) for text in gaps])
    assert result.effective_sample_size.mean == pytest.approx(
        weight.sum() ** 2 / (3 * (weight**2).sum()), rel=1e-3
    )


def test_drift_is_found_where_it_is_planted() -> None:
    """Both models agree after a, b, c; after d they do not, and only the student writes d."""
    teacher, student = uniform(), uniform()
    student[3, 0] = 50.0
    drifting = off_policy.measure(
        bigram(teacher), bigram(student), pair(("abc", "bca", "cab"), ("ddd", "add", "bdd")), config=CONFIG
    )
    assert drifting.drift["forward"].ci95[0] > 0.4 and drifting.slope["reverse.student"].ci95[0] > 0.1
    on_policy = off_policy.measure(
        bigram(teacher), bigram(student), pair(("abc", "bca", "cab"), ("bca", "cab", "abc")), config=CONFIG
    )
    assert on_policy.drift["forward"].mean == pytest.approx(0.0, abs=1e-6)
    assert on_policy.effective_sample_size.mean == pytest.approx(1.0)


def test_few_texts_carry_the_weight_where_that_is_planted() -> None:
    """After "a" comes "b", says the student: weights 8, 1 and almost 0, so ESS = (8 + 1)^2 / (3 (8^2 + 1))."""
    teacher, student = uniform(), uniform()
    student[0, 1] = 7e6
    result = off_policy.measure(
        bigram(teacher), bigram(student), pair(("b", "c", "cab"), ("b", "c", "a")), config=CONFIG
    )
    assert result.effective_sample_size.mean == pytest.approx(81 / 195, rel=1e-3)
    assert result.log_ratio_999["teacher"].mean > 5.0


def test_the_quantile_is_the_largest_that_a_thousandth_exceeds() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1, 10_001)).astype(float)
    value = off_policy._quantile(values, np.arange(10_000) % 100, Bootstrap(100, 100))
    assert value.mean == 9990.0  # ten of ten thousand exceed it
    assert value.ci95[0] <= 9990.0 <= value.ci95[1] and value.ci95[0] > 9970.0


def test_empty_texts_and_other_questions() -> None:
    teacher, student = bigram(uniform()), bigram(random_table(2))
    result = off_policy.measure(teacher, student, pair(("", "", ""), ("a", "b", "c")), config=CONFIG)
    assert result.kl["forward.teacher"].mean is None and result.kl["forward.student"].mean is not None
    assert result.drift["forward"].mean is None and result.effective_sample_size.mean is None
    assert result.notes == ("the teacher's texts have no position: all of them are empty and did not end",)
    with pytest.raises(
        ValueError, match=r"must answer the same questions.*1 questions are only in the teacher's texts"
    ):
        TextPair(Texts(("a", "b"), ("", ""), [True] * 2), Texts(("a",), ("",), [True]))
