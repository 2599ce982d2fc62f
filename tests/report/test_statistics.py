"""The bootstrap against hand-computed numbers, against truth in simulations, and at its edges."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import special, stats

from distill_jax.report.statistics import difference, estimate, holm, minimum_detectable_effect, ratio


def half_right(problems: int) -> np.ndarray:
    return np.tile([1.0, 0.0], problems // 2)[None, :]


def logistic_answers(random, seeds, problems, mean, seed_spread, difficulty):
    """Answers f64[S, N] of students whose ability varies by seed on problems of the given difficulty f64[N]."""
    ability = mean + seed_spread * random.standard_normal((seeds, 1))
    return (random.random((seeds, problems)) < special.expit(ability + difficulty)).astype(float)


def true_rate(mean: float, spread: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    return float(special.expit(mean + spread * nodes) @ weights / weights.sum())


def test_mean_of_one_run_by_hand():
    value = estimate(half_right(400))
    assert value["mean"] == 0.5 and value["n"] == 400 and value["seeds"] is None
    # Standard error sqrt(.25 / 400) = .025, so about .451 to .549; the bootstrap's quantiles are steps of 1 / 400.
    np.testing.assert_allclose(value["ci95"], [0.451, 0.549], atol=0.005)


def test_mean_over_seeds_by_hand():
    value = estimate(np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]))
    assert value["mean"] == 0.5 and value["seeds"] == [0.5, 0.75, 0.25]


def test_seed_interval_approaches_the_t_interval():
    """Where problems do not matter, the interval is about that of a t test over the seeds' means."""
    means = np.array([0.40, 0.44, 0.48, 0.52, 0.56, 0.60])
    problems = 2000
    correct = np.stack([np.arange(problems) < mean * problems for mean in means]).astype(float)
    correct = np.stack([np.random.default_rng(seed).permutation(row) for seed, row in enumerate(correct)])
    low, high = estimate(correct)["ci95"]
    half = stats.t.ppf(0.975, 5) * means.std(ddof=1) / np.sqrt(6)
    assert 0.75 * half < (high - low) / 2 < 1.3 * half


@pytest.mark.parametrize("answer", [0.0, 1.0])
def test_identical_answers_get_the_exact_binomial_bound(answer):
    value = estimate(np.full((1, 100), answer))
    bound = 1 - 0.025 ** (1 / 100)  # 3.6 %
    expected = [0.0, bound] if answer == 0.0 else [1.0 - bound, 1.0]
    np.testing.assert_allclose(value["ci95"], expected, atol=0.004)


def test_difference_of_identical_perfect_arms_is_not_certain():
    low, high = difference(np.ones((1, 200)), np.ones((1, 200)))["ci95"]
    assert -0.03 < low < -0.01 and 0.01 < high < 0.03


def test_difference_and_ratio_by_hand():
    first, second = np.array([[1, 1, 1, 0]]), np.array([[1, 0, 1, 0]])
    assert difference(first, second)["mean"] == 0.25
    assert ratio(first, second)["mean"] == 1.5
    two_first, two_second = np.repeat(first, 2, 0), np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
    assert difference(two_first, two_second)["seeds"] == [0.25, 0.5]
    assert ratio(two_first, two_second)["seeds"] == [1.5, 3.0]
    assert ratio(two_first, two_second)["mean"] == 2.0
    assert difference(two_first, second)["seeds"] is None


@pytest.mark.parametrize("seeds,seed_spread", [(1, 0.0), (3, 0.0), (3, 0.3), (5, 0.6)])
def test_interval_covers_the_truth(seeds, seed_spread):
    """200 small cases: the 95 % intervals of a mean, a difference and a ratio cover the truth in 90 to 99 %."""
    random, problems, cases = np.random.default_rng(7), 80, 200
    low_rate, high_rate = (true_rate(mean, np.hypot(1.2, seed_spread)) for mean in (0.0, 0.8))
    truth = {"mean": low_rate, "difference": low_rate - high_rate, "ratio": low_rate / high_rate}
    covered = dict.fromkeys(truth, 0)
    for case in range(cases):
        difficulty = 1.2 * random.standard_normal(problems)
        first = logistic_answers(random, seeds, problems, 0.0, seed_spread, difficulty)
        second = logistic_answers(random, seeds, problems, 0.8, seed_spread, difficulty)
        values = {
            "mean": estimate(first, resamples=800, seed=case),
            "difference": difference(first, second, resamples=800, seed=case),
            "ratio": ratio(first, second, resamples=800, seed=case),
        }
        for name, value in values.items():
            low, high = value["ci95"]
            covered[name] += low <= truth[name] <= (np.inf if high is None else high)
    for name, count in covered.items():
        assert 0.90 <= count / cases <= 0.99, f"{name}: {count} of {cases}"


def test_pairing_narrows_the_interval_of_correlated_arms():
    random = np.random.default_rng(3)
    difficulty = 3.0 * random.standard_normal(300)
    first = logistic_answers(random, 1, 300, 0.0, 0.0, difficulty)
    second = logistic_answers(random, 1, 300, 0.5, 0.0, difficulty)
    shuffled = second[:, random.permutation(300)]
    for compare in (difference, ratio):
        paired, unpaired = (np.diff(compare(first, other)["ci95"])[0] for other in (second, shuffled))
        assert paired < 0.75 * unpaired
    assert difference(first, second)["mean"] == pytest.approx(difference(first, shuffled)["mean"])


def test_pairing_by_seed_cancels_the_luck_of_a_seed():
    random = np.random.default_rng(4)
    rate = np.array([0.3, 0.5, 0.7])[:, None]
    first = (random.random((3, 400)) < rate).astype(float)
    second = (random.random((3, 400)) < rate + 0.1).astype(float)
    aligned = np.diff(difference(first, second)["ci95"])[0]
    crossed = np.diff(difference(first, second[[2, 0, 1]])["ci95"])[0]
    assert aligned < 0.5 * crossed


def test_same_seed_same_interval():
    correct = (np.random.default_rng(0).random((3, 100)) < 0.6).astype(float)
    assert estimate(correct, seed=1) == estimate(correct, seed=1)
    assert estimate(correct, seed=1)["ci95"] != estimate(correct, seed=2)["ci95"]


def test_ratio_over_zero_is_none_and_strict_json():
    value = ratio(np.ones((2, 5)), np.zeros((2, 5)))
    assert value == {"mean": None, "ci95": [None, None], "n": 5, "seeds": None}
    json.dumps(value, allow_nan=False)


def test_ratio_with_some_zero_denominators_is_unbounded_above():
    below = np.zeros((1, 50))
    below[0, 0] = 1.0  # a resample misses the one right answer with probability (1 - 1/50)^50 = 36 %
    value = ratio(half_right(50), below)
    assert value["mean"] == 25.0 and value["ci95"][1] is None and 0.0 < value["ci95"][0] < 25.0
    json.dumps(value, allow_nan=False)


def test_ratio_keeps_no_seeds_when_one_seed_has_a_zero_denominator():
    value = ratio(np.ones((2, 4)), np.array([[1, 1, 0, 0], [0, 0, 0, 0]]))
    assert value["mean"] == 4.0 and value["seeds"] is None


def test_interval_stays_inside_the_unit_range():
    low, high = estimate(np.array([[1.0] * 19 + [0.0], [1.0] * 20, [0.0] * 10 + [1.0] * 10]))["ci95"]
    assert 0.0 <= low < high <= 1.0


def test_numbers_of_any_size_when_unbounded():
    value = estimate(np.array([[10.0, 20.0, 30.0]]), bounded=False)
    assert value["mean"] == 20.0 and 10.0 <= value["ci95"][0] < 20.0 < value["ci95"][1] <= 30.0


def test_minimum_detectable_effect_by_hand():
    # (1.95996 + 0.84162) * sqrt(2 * .25 / 500)
    assert minimum_detectable_effect(500) == pytest.approx(0.088593, abs=1e-5)
    assert minimum_detectable_effect(500, correlation=0.75) == pytest.approx(0.088593 / 2, abs=1e-5)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: estimate([1.0, 0.0]), r"shape \(2,\)"),
        (lambda: estimate(np.zeros((1, 0))), "non-empty"),
        (lambda: estimate([[np.nan, 1.0]]), "finite"),
        (lambda: estimate([[2.0, 1.0]]), r"\[0, 1\]"),
        (lambda: difference(np.ones((1, 3)), np.ones((1, 4))), "3 and 4"),
        (lambda: minimum_detectable_effect(0), "at least 1"),
        (lambda: minimum_detectable_effect(10, rate=1.5), "rate"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_holm():
    """Worked by hand: .01 x 4, .02 x 3, .03 x 2 = .06, then .04 x 1 raised to .06."""
    adjusted = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert holm({"only": 0.7}) == {"only": 0.7} and holm({}) == {}
    assert holm({"a": 0.9, "b": 0.8})["a"] == 1.0
    # 3 * .01 = .03; 2 * .03 = .06; max(.06, 1 * .04) = .06
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
