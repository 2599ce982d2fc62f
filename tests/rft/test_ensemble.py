"""Several proxies with tokenizers of their own: how their gaps are put together, and what they are refused for."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.rft.calibration import proxy_weights, weigh_proxies
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.judgement import judge
from distill_jax.rft.proxies import Proxy, as_proxies
from distill_jax.rft.rollout import sample_batch, score_rollouts
from distill_jax.rft.validation import sampling_config
from distill_jax.sampling import make_sampler
from tests.rft.tiny_calibration import CONFIG, Letters, make_model

CONFIG = dataclasses.replace(CONFIG, ensemble="mean", within_correct=False)
TASK = Letters()
PROBLEMS = TASK.problems("train", 4, 0)
PROXIES = (
    Proxy("bytes", make_model("proxy"), "raw"),
    Proxy("letters", make_model("letter_proxy"), "raw"),
)


@functools.cache
def scored_batch():
    teacher = make_model("teacher")
    sampler = make_sampler(teacher.module, sampling_config(teacher, CONFIG, 4), CONFIG.prompt_sizes)
    batch = sample_batch(sampler, teacher, PROBLEMS, jax.random.key(3), CONFIG, teacher.params, None, 1.0)
    rollouts, scored = score_rollouts(teacher, PROXIES, TASK, PROBLEMS, batch, CONFIG)
    # Of random weights the larger vocabulary always finds text the more surprising: every other row is turned round.
    of_bytes, of_letters = scored.proxies
    of_letters = dataclasses.replace(of_letters, lp=of_letters.lp.at[::2, 0].add(-30.0))
    return rollouts, dataclasses.replace(scored, proxies=(of_bytes, of_letters))


GAPS = jnp.array([[1.0, 4.0, -1.0, 2.0], [3.0, 2.0, -2.0, 2.0]])


@pytest.mark.parametrize(
    ("ensemble", "expected"),
    [("mean", [2.0, 3.0, -1.5, 2.0]), ("min", [1.0, 2.0, -2.0, 2.0]), ("max", [3.0, 4.0, -1.0, 2.0])],
)
def test_gaps_by_hand(ensemble, expected):
    weights = proxy_weights(GAPS, ensemble)
    np.testing.assert_array_equal(weights.sum(axis=0), np.ones(4))
    np.testing.assert_allclose(weigh_proxies(list(GAPS), weights), expected)


def test_the_weights_of_a_row_hold_for_its_tokens():
    weights = proxy_weights(GAPS[:, :2], "min")
    credits = [jnp.array([[1.0, 2.0, 3.0]] * 2), jnp.array([[-1.0, -2.0, -3.0]] * 2)]
    np.testing.assert_array_equal(weigh_proxies(credits, weights), [[1, 2, 3], [-1, -2, -3]])


def test_one_proxy_is_the_ensemble_of_one():
    weights = proxy_weights(GAPS[:1], None)
    np.testing.assert_array_equal(weights, np.ones((1, 4)))
    np.testing.assert_array_equal(weigh_proxies([GAPS[0]], weights), GAPS[0])


@pytest.mark.parametrize("ensemble", ["mean", "min", "max"])
@pytest.mark.parametrize(("arm", "sign"), [("distillable", -1.0), ("undistillable", 1.0)])
def test_advantages_by_hand(ensemble, arm, sign):
    """Each gap in its proxy's own tokens and in nats a byte; put together, then normalised in the group."""
    rollouts, scored = scored_batch()
    config = dataclasses.replace(CONFIG, ensemble=ensemble)
    judgement = judge(rollouts, scored, config, arm, 0.5)
    teacher = np.asarray(scored.lp_teacher).sum(axis=1)
    gaps = [
        (teacher - np.asarray(own.lp).sum(axis=1)) / np.maximum(rollouts.bytes, 1) for own in scored.proxies
    ]
    rows = scored.scorable
    assert np.ptp(np.sign(gaps[0] - gaps[1])[rows]) == 2  # neither proxy is always the better one
    gap = getattr(np, ensemble)(gaps, axis=0)
    np.testing.assert_allclose(judgement.gap_per_byte[rows], gap[rows], rtol=1e-4, atol=1e-5)
    expected = np.zeros(16)
    for start in range(0, 16, 4):
        group = np.arange(start, start + 4)
        task = scored.task.rewards[group]
        expected[group] = (task - task.mean()) / (task.std() + 1e-4)
        known = group[rows[group]]
        if len(known):
            values = sign * gap[known]
            expected[known] += 0.5 * (values - values.mean()) / (max(values.std(), 0.01) + 1e-4)
    np.testing.assert_allclose(judgement.advantages, expected, atol=2e-4)
    for name, own in zip(("bytes", "letters"), gaps, strict=True):
        total, count = judgement.sums[f"gap_per_byte_{name}"]
        np.testing.assert_allclose(total / count, own[rows].mean(), rtol=1e-4)


def test_span_credit_of_the_mean_is_the_mean_of_the_span_credits():
    rollouts, scored = scored_batch()
    spans = dataclasses.replace(CONFIG, credit="span", advantage_scale="none")

    def credit(proxies, ensemble):
        config = dataclasses.replace(spans, ensemble=ensemble)
        judged = judge(rollouts, dataclasses.replace(scored, proxies=proxies), config, "distillable", 1.0)
        bare = judge(rollouts, dataclasses.replace(scored, proxies=proxies), config, "control", 0.0)
        return np.asarray(judged.advantages - bare.advantages)

    first, second = scored.proxies
    expected = (credit((first,), None) + credit((second,), None)) / 2
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(credit((first, second), "mean"), expected, atol=1e-4)


def test_bad_proxies():
    with pytest.raises(ValueError, match=r"got 2 proxies \['bytes', 'letters'\] with ensemble=None"):
        as_proxies(PROXIES, dataclasses.replace(CONFIG, ensemble=None))
    with pytest.raises(ValueError, match="got 1 proxies"):
        as_proxies(make_model("proxy"), CONFIG)
    with pytest.raises(ValueError, match="different names"):
        as_proxies((PROXIES[0], PROXIES[0]), CONFIG)
    with pytest.raises(ValueError, match="ensemble must be one of"):
        CalibrationConfig(ensemble="median")
    with pytest.raises(ValueError, match="per_byte"):
        CalibrationConfig(ensemble="mean", units="per_token")
    with pytest.raises(ValueError, match="ensemble of 2 proxies must be one of"):
        proxy_weights(GAPS, None)
