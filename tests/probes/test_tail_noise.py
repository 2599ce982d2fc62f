"""Tail noise: by hand, with the tail planted and without, and where there is nothing to measure."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.probes import tail_noise
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.tail_noise import TailTerms, ranks_of
from distill_jax.probes.texts import Texts
from tests.probes.bigram_models import V, bigram, probabilities, random_table, uniform

CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200)
TEXTS = Texts(("a", "b", "c", "d"), ("bca", "c", "dab", "ab"), [True] * 4)


def test_ranks() -> None:
    assert ranks_of(8) == (1, 2, 4, 8) and ranks_of(258)[-2:] == (256, 258) and ranks_of(1) == (1,)


def test_the_curve_by_hand() -> None:
    """p = (.5, .3, .15, .05), q = (.25,) * 4: terms p log(4p) - p + 1/4, added in the order of p."""
    p, q = np.array([0.15, 0.5, 0.05, 0.3]), np.full(4, 0.25)
    terms = p * np.log(p / q) - p + q
    out = TailTerms((1, 2, 4))(jnp.log(p)[None, None, :], jnp.log(q)[None, None, :])
    order = [1, 3, 0, 2]
    np.testing.assert_allclose(out["forward"][0, 0], np.cumsum(terms[order])[[0, 1, 3]], rtol=1e-5)
    np.testing.assert_allclose(out["forward"][0, 0, -1], (p * np.log(p / q)).sum(), rtol=1e-5)
    np.testing.assert_allclose(out["mass"][0, 0], [0.5, 0.8, 1.0], rtol=1e-5)
    # Reverse: q is flat, so its order is that of the ids.
    back = q * np.log(q / p) - q + p
    np.testing.assert_allclose(out["reverse"][0, 0], np.cumsum(back)[[0, 1, 3]], rtol=1e-5)


def test_means_over_positions() -> None:
    teacher, student = random_table(1), random_table(2)
    p, q = probabilities(teacher), probabilities(student)
    by_row = (p * np.log(p / q)).sum(1)
    before = [0, 1, 2, 0, 1, 2, 2, 3, 0, 1, 3, 0, 1]  # the letter before each of the 13 compared tokens
    result = tail_noise.measure(bigram(teacher), bigram(student), TEXTS, config=CONFIG)
    assert (result.unit, result.outcomes, result.positions) == ("token", V, 13)
    assert result.forward_kl.mean == pytest.approx(by_row[before].mean(), rel=1e-4)
    assert result.forward_curve["8"] == result.forward_kl
    curve = [value.mean for value in result.forward_curve.values()]
    assert list(result.forward_curve) == ["1", "2", "4", "8"] and curve == sorted(curve)
    # A vocabulary below 16 ids has no tail beyond 16.
    assert result.forward_tail["16"].mean == result.teacher_tail_mass["64"].mean == 0.0
    shares = [
        max(kls) / sum(kls)
        for kls in ([by_row[i] for i in row] for row in ([0, 1, 2, 0], [1, 2], [2, 3, 0, 1], [3, 0, 1]))
    ]
    assert result.top_fifth_share.mean == pytest.approx(np.mean(shares), rel=1e-4)


def tailed(shift: float, size: int = 128) -> np.ndarray:
    """Two likely tokens with .45 each, and a tail that tilts by `shift` from its first to its last id."""
    table = uniform(size)
    table[:, :2] = 0.45
    tail = np.exp(np.linspace(-shift, shift, size - 2))
    table[:, 2:] = 0.1 * tail / tail.sum()
    return table


def test_a_planted_tail_is_found() -> None:
    """The same head, tails that tilt against each other: most of the KL lies beyond the top 64 of 128."""
    planted = tail_noise.measure(bigram(tailed(-0.9)), bigram(tailed(0.9)), TEXTS, config=CONFIG)
    head = tailed(-0.9)
    head[:, 0], head[:, 1] = 0.7, 0.2
    clean = tail_noise.measure(bigram(tailed(-0.9)), bigram(head), TEXTS, config=CONFIG)
    assert planted.forward_tail["64"].ci95[0] > 0.3 and planted.forward_tail["16"].ci95[0] > 0.6
    assert clean.forward_tail["16"].ci95[1] < 0.01
    assert planted.teacher_tail_mass["64"].mean == pytest.approx(clean.teacher_tail_mass["64"].mean)


def test_frequent_tokens_inflate_the_kl_with_k() -> None:
    """After "a" the tail differs, after "b" the head: at positions that go on with "b" (from "a") the share grows."""
    teacher, student = tailed(-0.9), tailed(0.9)
    student[1] = teacher[1]
    student[1, :2] = 0.5, 0.4
    texts = Texts(("a", "ba"), ("bbbb", "bb"), [False, False])
    few = tail_noise.measure(bigram(teacher), bigram(student), texts, config=CONFIG, frequent=1)
    assert few.frequent_share["all"].mean == pytest.approx(1.0) and few.frequent_growth.mean is None
    assert few.notes == ("the texts have 1 types in all, so the 1 most frequent ones are everything",)
    texts = Texts(("a", "ba"), ("bababac", "bababab"), [False, False])  # "b" 7 times, always after "a"
    result = tail_noise.measure(bigram(teacher), bigram(student), texts, config=CONFIG, frequent=1)
    assert result.notes == ()
    assert result.frequent_share["16"].mean < result.frequent_share["all"].mean
    assert result.frequent_growth.mean > 1.05


def test_nothing_to_compare_is_said() -> None:
    empty = Texts(("a", "b"), ("", ""), [False, False])
    result = tail_noise.measure(bigram(uniform()), bigram(random_table(1)), empty, config=CONFIG)
    assert result.positions == 0 and result.forward_kl.mean is None and result.forward_tail["64"].mean is None
    assert result.notes == ("there is no position to compare: all completions are empty and did not end",)
    with pytest.raises(ValueError, match="frequent must be at least 1, got 0"):
        tail_noise.measure(bigram(uniform()), bigram(uniform()), empty, frequent=0)


def test_equal_models_have_no_kl_and_no_shares() -> None:
    result = tail_noise.measure(bigram(uniform()), bigram(uniform()), TEXTS, config=CONFIG)
    assert result.forward_kl.mean == result.reverse_kl.mean == 0.0
    assert result.forward_tail["64"].mean is None and result.top_fifth_share.mean is None
