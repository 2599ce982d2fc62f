"""The suite's numbers against hand-made cases, against other formulas, and where they are undefined."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from distill_jax.report.attack_statistics import (
    choose_worst,
    cost_multiplier,
    first_crossing,
    gain,
    gain_denied,
    gain_p_value,
    harm_below_base,
    recovered_gap,
    relative_collapse,
    teacher_retention,
    worse_p_value,
)

DRAW = {"resamples": 2000, "seed": 0}


def answers(rate, problems=200, seeds=3, seed=0):
    """f64[S, N] with exactly round(rate * N) right answers a seed, each seed other ones."""
    rng = np.random.default_rng([seed, round(1000 * rate)])
    rows = np.zeros((seeds, problems))
    for row in rows:
        row[rng.permutation(problems)[: round(rate * problems)]] = 1.0
    return rows


BASE = answers(0.2, seeds=1, seed=9)


@pytest.mark.parametrize(
    ("students", "clean", "gap"),
    [(0.8, 0.8, 1.0), (0.2, 0.8, 0.0), (0.5, 0.8, 0.5), (0.1, 0.8, -1 / 6), (0.9, 0.6, 1.75)],
)
def test_recovered_gap_and_its_neighbours(students, clean, gap):
    mine, other = answers(students), answers(clean, seed=1)
    value = recovered_gap(mine, other, BASE, **DRAW)
    assert value["mean"] == pytest.approx(gap) and value["n"] == 200
    low, high = value["ci95"]
    assert low <= value["mean"] <= high
    np.testing.assert_allclose(value["seeds"], [gap] * 3)
    assert gain(mine, BASE, **DRAW)["mean"] == pytest.approx(students - 0.2)
    assert relative_collapse(mine, other, **DRAW)["mean"] == pytest.approx(1 - students / clean)
    denied = gain_denied(mine, other, BASE, **DRAW)
    assert denied["mean"] == pytest.approx(1 - max(0.0, gap))
    assert denied["ci95"][0] <= denied["mean"] <= denied["ci95"][1] <= 1.0


def test_the_same_students_recover_everything_without_doubt():
    """A sham that an attack undoes to the byte leaves the same students: the interval is the point."""
    mine = answers(0.7)
    value = recovered_gap(mine, mine, BASE, **DRAW)
    assert value["mean"] == 1.0
    np.testing.assert_allclose(value["ci95"], [1.0, 1.0])


def test_without_a_clean_gain_nothing_can_be_recovered():
    value = recovered_gap(answers(0.5), answers(0.2, seed=1), BASE, **DRAW)
    assert value["mean"] is None and value["ci95"] == [None, None]
    assert gain_denied(answers(0.5), answers(0.2, seed=1), BASE, **DRAW)["mean"] is None


def test_a_doubtful_clean_gain_leaves_an_end_open():
    value = recovered_gap(answers(0.6), answers(0.23, seed=1), BASE, **DRAW)
    assert value["mean"] == pytest.approx(0.4 / 0.03) and value["ci95"][1] is None


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Bernoulli answers with known rates; 95 % nominal, three seeds; a rough check from both sides."""
    rng, hits, count = np.random.default_rng(5), 0, 100
    for _ in range(count):
        difficulty = rng.normal(size=120)
        base, mine, clean = (
            (rng.random((seeds, 120)) < stats.norm.cdf(level + 0.5 * difficulty)).astype(float)
            for seeds, level in ((1, -1.0), (3, -0.3), (3, 0.8))
        )
        truth_of = [stats.norm.cdf(level / np.sqrt(1.25)) for level in (-1.0, -0.3, 0.8)]
        truth = (truth_of[1] - truth_of[0]) / (truth_of[2] - truth_of[0])
        low, high = recovered_gap(mine, clean, base, resamples=400)["ci95"]
        hits += (low if low is not None else -np.inf) <= truth <= (high if high is not None else np.inf)
    assert hits >= 0.89 * count


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_gain_p_value(rate):
    value = gain_p_value(answers(rate), BASE, **DRAW)
    assert (value > 0.2) if rate == 0.2 else (value == pytest.approx(1 / 2001))


@pytest.mark.parametrize("seeds", [3, 2])
def test_worse_p_value(seeds):
    """Small where the first are worse, large where they are better, about a half where nothing differs."""
    other = answers(0.5, seeds=seeds, seed=1)
    assert (
        worse_p_value(answers(0.2), other, **DRAW) < 0.005
        and worse_p_value(answers(0.8), other, **DRAW) > 0.99
    )
    assert 0.2 < worse_p_value(answers(0.5), other, **DRAW) < 0.8
    with pytest.raises(ValueError, match="same problems"):
        worse_p_value(answers(0.5), answers(0.5, problems=100), **DRAW)


def test_harm_below_base():
    mine = np.concatenate([answers(0.1, seeds=2), answers(0.3, seeds=1)])
    share = harm_below_base(mine, BASE)
    assert (share["count"], share["total"]) == (2, 3)
    np.testing.assert_allclose(share["ci95"], [0.09430, 0.99160], atol=1e-4)  # Clopper-Pearson of 2 in 3


def test_base_must_be_one_row_of_the_same_problems():
    with pytest.raises(ValueError, match="base: expected one row on the same 200 problems"):
        gain(answers(0.5), answers(0.2, seeds=3))


class TestRetention:
    def test_no_loss_is_not_inferior_with_enough_problems(self):
        teacher = np.ones((1, 512))
        found = teacher_retention(teacher, teacher, 0.01, **DRAW)
        assert found["ratio"]["mean"] == 1.0 and found["p_value"] == pytest.approx(0.99**512)
        assert found["not_inferior"]
        few = teacher_retention(teacher[:, :100], teacher[:, :100], 0.01, **DRAW)
        assert not few["not_inferior"]  # .99^100 = .37: 100 problems cannot exclude a loss of one point

    def test_against_the_t_test(self):
        clean, teacher = answers(0.95, 500, 1), answers(0.93, 500, 1, seed=3)
        found = teacher_retention(teacher, clean, 0.05, **DRAW)
        d = (teacher - clean)[0]
        t = (d.mean() + 0.05) / (d.std(ddof=1) / np.sqrt(500))
        assert found["p_value"] == pytest.approx(stats.t.sf(t, 499))
        assert found["difference"]["mean"] == pytest.approx(-0.02)

    def test_every_answer_lost(self):
        found = teacher_retention(np.zeros((1, 50)), np.ones((1, 50)), 0.01, **DRAW)
        assert found["p_value"] == 1.0 and not found["not_inferior"]

    @pytest.mark.parametrize("margin", [0.0, 1.0])
    def test_margin(self, margin):
        with pytest.raises(ValueError, match="margin"):
            teacher_retention(np.ones((1, 5)), np.ones((1, 5)), margin)


@pytest.mark.parametrize(
    ("curve", "reached"),
    [
        ([0.5, 0.6, 0.7], 1.0),  # at the first budget already
        ([0.1, 0.5, 0.9], 2.0),
        ([0.3, 0.7, 0.9], np.sqrt(2.0)),  # halfway in log(budget)
        ([0.1, 0.2, 0.8], 2 * np.sqrt(2.0)),
        ([0.1, 0.2, 0.3], np.inf),
        ([0.1, 0.6, 0.2], 2**0.8),  # the first time counts
    ],
)
def test_first_crossing(curve, reached):
    found = first_crossing([1.0, 2.0, 4.0], np.array([[value] for value in curve]), 0.5)
    np.testing.assert_allclose(found, [reached])


class TestCost:
    def curve(self, *rates):
        return {2.0**place: answers(rate, seed=place) for place, rate in enumerate(rates)}

    def test_twice_the_budget(self):
        cost = cost_multiplier(self.curve(0.1, 0.3, 0.7), self.curve(0.3, 0.7, 0.9), 0.5, **DRAW)
        assert cost["multiplier"]["mean"] == pytest.approx(2.0)
        low, high = cost["multiplier"]["ci95"]
        assert 1.2 < low <= 2.0 <= high < 4.0
        assert not cost["first"] and cost["at_least"] is None

    def test_not_reached_is_a_bound(self):
        cost = cost_multiplier(self.curve(0.1, 0.1, 0.2), self.curve(0.3, 0.7, 0.9), 0.5, **DRAW)
        assert cost["multiplier"]["mean"] is None and cost["defended"] is None
        assert cost["at_least"] == pytest.approx(4.0 / np.sqrt(2.0))

    def test_reached_at_once(self):
        assert cost_multiplier(self.curve(0.1, 0.9), self.curve(0.8, 0.9), 0.5, **DRAW)["first"]

    def test_one_budget_is_no_curve(self):
        with pytest.raises(ValueError, match="two or more budgets"):
            cost_multiplier(self.curve(0.5), self.curve(0.5, 0.6), 0.5)


def test_worst_case_is_the_largest():
    assert choose_worst({"A1": 0.1, "A3": 0.4, "A5": -2.0}) == "A3" and choose_worst({}) is None
