"""The bootstrap over prompts: points by hand, intervals against theory, pairing, and what is undefined."""

from __future__ import annotations

import numpy as np
import pytest

from distill_jax.probes.values import Bootstrap, Value, sum_by, undefined


def test_a_ratio_of_sums_by_hand() -> None:
    value = Bootstrap(3, 500).ratio(np.array([1.0, 0.0, 5.0]), np.array([2.0, 0.0, 4.0]))
    assert value.mean == 1.0 and value.n == 2  # the second prompt has nothing to say
    low, high = value.ci95
    assert low == 0.5 and high == 1.25  # each of the two alone


def test_the_interval_has_the_width_of_theory() -> None:
    numbers = np.random.default_rng(0).normal(3.0, 1.0, 400)
    value = Bootstrap(400, 4000).ratio(numbers, np.ones(400))
    low, high = value.ci95
    assert low is not None and high is not None
    np.testing.assert_allclose(high - low, 2 * 1.96 * numbers.std() / 20, rtol=0.06)


def test_differences_are_paired() -> None:
    """Two quantities that differ by a constant differ by it in every draw."""
    numbers, ones = np.random.default_rng(0).normal(3.0, 5.0, 40), np.ones(40)
    value = Bootstrap(40, 300).difference((numbers + 1.0, ones), (numbers, ones))
    np.testing.assert_allclose([value.mean, *value.ci95], 1.0, atol=1e-12)
    noisy = 2 * numbers**2 + np.random.default_rng(1).normal(0.0, 0.1, 40)
    double = Bootstrap(40, 300).quotient((noisy, ones), (numbers**2, ones))
    np.testing.assert_allclose(
        [double.mean, *double.ci95], 2.0, atol=0.01
    )  # each mean alone varies by a fifth


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_rate_without_variation_keeps_an_interval(right: float) -> None:
    """Ten equal answers: exact binomial slack 1 - .025^(1/10) = .31."""
    value = Bootstrap(10, 300).ratio(np.full(10, right), np.ones(10), (0.0, 1.0))
    assert value.mean == right
    slack = 1 - 0.025**0.1
    np.testing.assert_allclose(value.ci95, (right - slack if right else 0.0, 1.0 if right else slack))


def test_what_never_varies_is_not_certain() -> None:
    """A difference of 0 between ten answers each has the slack of the rates; a quotient has no interval."""
    same = (np.ones(10), np.ones(10))
    slack = 1 - 0.025**0.1
    bounded = Bootstrap(10, 300).difference(same, same, (-1.0, 1.0))
    np.testing.assert_allclose([bounded.mean, *bounded.ci95], [0.0, -slack, slack])
    assert Bootstrap(10, 300).quotient(same, same) == Value(1.0, (None, None), 10)


def test_what_is_undefined_is_none() -> None:
    nothing = np.zeros(3)
    assert Bootstrap(3, 50).ratio(nothing, nothing) == undefined()
    assert Bootstrap(3, 50).ratio(np.ones(3), nothing) == undefined(3)
    one = Bootstrap(3, 50).ratio(np.array([2.0, 0, 0]), np.array([4.0, 0, 0]))
    assert one == Value(0.5, (None, None), 1)  # a single prompt has no spread
    assert Bootstrap(3, 50).ratio(np.array([2.0, 0, 0]), np.array([2.0, 0, 0]), (0.0, 1.0)).ci95[1] == 1.0
    rare = Bootstrap(3, 200).quotient((np.ones(3), np.ones(3)), (np.array([1.0, 0, 0]), np.ones(3)))
    assert rare.mean == 3.0 and rare.ci95[0] is not None


def test_values_read_well() -> None:
    assert str(Value(0.5, (0.25, 0.75), 8)) == "0.5 [0.25, 0.75]"
    assert str(Value(0.5, (None, None), 1)) == "0.5 (n = 1)"
    assert str(undefined()) == "undefined"


def test_sum_by() -> None:
    out = sum_by(np.array([1, 1, 0]), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 3)
    assert out.tolist() == [[5.0, 6.0], [4.0, 6.0], [0.0, 0.0]]
