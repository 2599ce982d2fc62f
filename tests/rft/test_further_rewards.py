"""Rewards of the config beside the task's: normalised one by one, logged one by one, and never in the way."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from distill_jax.rewards.terms import RewardTerm, make_rewards
from distill_jax.rft.calibrate import calibrate
from distill_jax.rft.judgement import judge
from distill_jax.rft.rewards import further_rewards, task_rewards
from distill_jax.rft.rollout import check_prompts, sample_batch, score_rollouts
from distill_jax.rft.validation import sampling_config
from distill_jax.sampling import make_sampler
from tests.rft.tiny_calibration import CONFIG, Letters, make_model

TASK = Letters()
PROBLEMS = TASK.problems("train", 4, 0)
TERMS = (
    RewardTerm("length", weight=0.5, soft_bytes=2, hard_bytes=9),
    RewardTerm("function", weight=2.0, name="odd", source="tests.rft.odd_reward:score"),
)


@pytest.fixture(scope="module")
def scored():
    config = dataclasses.replace(CONFIG, rewards=TERMS)
    teacher = make_model("teacher")
    sampler = make_sampler(teacher.module, sampling_config(teacher, config, 4), config.prompt_sizes)
    batch = sample_batch(sampler, teacher, PROBLEMS, jax.random.key(3), config, teacher.params, None, 1.0)
    rewards = make_rewards(config.rewards)
    return config, *score_rollouts(
        teacher, make_model("proxy"), TASK, PROBLEMS, batch, config, rewards=rewards
    )


def normalised(values):
    """(r - mean) / (std + 1e-4) over the rows of a group that have a reward, 0 elsewhere."""
    result = np.zeros(len(values))
    for start in range(0, len(values), 4):
        rows = [row for row in range(start, start + 4) if np.isfinite(values[row])]
        if rows:
            group = np.asarray(values)[rows]
            result[rows] = (group - group.mean()) / (group.std() + 1e-4)
    return result


def test_each_reward_is_normalised_by_itself_and_added_with_its_weight(scored):
    config, rollouts, judged = scored
    length = np.clip((9 - np.array([len(text.encode()) for text in rollouts.texts])) / 7, 0, 1)
    odd = np.array([np.nan if "c" in text else float(text.count("a")) for text in rollouts.texts])
    assert np.isnan(odd).any() and np.isfinite(odd).any()
    with_them = judge(rollouts, judged, config, "control", 0.0)
    without = judge(rollouts, judged, dataclasses.replace(config, rewards=()), "control", 0.0)
    expected = np.asarray(without.advantages) + 0.5 * normalised(length) + 2.0 * normalised(odd)
    np.testing.assert_allclose(with_them.advantages, expected, atol=1e-4)
    mean = {name: float(total) / float(count) for name, (total, count) in with_them.sums.items()}
    np.testing.assert_allclose(mean["reward_length"], length.mean(), rtol=1e-5)
    np.testing.assert_allclose(mean["reward_odd"], np.nanmean(odd), rtol=1e-5)
    np.testing.assert_allclose(
        mean["advantage_odd_abs"], np.abs(normalised(odd))[np.isfinite(odd)].mean(), rtol=1e-4
    )
    assert judged.further["odd"].failures == int(np.isnan(odd).sum())


def test_span_credit_and_whitening_take_them_too(scored):
    config, rollouts, judged = scored
    whitened = judge(rollouts, judged, dataclasses.replace(config, whiten=True), "control", 0.0).advantages
    np.testing.assert_allclose([whitened.mean(), whitened.std()], [0, 1], atol=1e-3)
    spans = dataclasses.replace(config, credit="span")
    tokens = judge(rollouts, judged, spans, "distillable", 0.5).advantages
    bare = judge(rollouts, judged, dataclasses.replace(spans, rewards=()), "distillable", 0.5).advantages
    rows = judge(rollouts, judged, config, "control", 0.0).advantages
    task = judge(rollouts, judged, dataclasses.replace(config, rewards=()), "control", 0.0).advantages
    np.testing.assert_allclose(
        tokens - bare, np.broadcast_to((rows - task)[:, None], tokens.shape), atol=1e-4
    )


def test_a_run_logs_each_of_them(tmp_path):
    config = dataclasses.replace(CONFIG, rewards=TERMS, steps=2)
    models = make_model("teacher"), make_model("proxy")
    calibrate(*models, Letters(), "control", 0.0, config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    for row in rows[1:]:
        assert {"reward_length", "advantage_length_abs", "reward_odd", "advantage_odd_abs"} <= set(row)
        assert row["reward_length_failures"] == 0 and row["reward_odd_failures"] >= 0


def test_a_reward_that_fails_as_a_whole_stops_nothing(caplog):
    class Broken:
        name, failures = "broken", 0

        def __call__(self, rows):
            raise RuntimeError("out of order")

    found = further_rewards([Broken()], PROBLEMS, ["a"] * 4, [True] * 4)["broken"]
    assert np.isnan(found.values).all() and found.failures == 4
    assert "the reward broken failed on a batch" in caplog.text


def test_a_task_whose_verifier_raises_costs_one_sample(caplog):
    class Raising(Letters):
        def score(self, problem, completion, ended):
            if completion == "bad":
                raise ZeroDivisionError("nothing to divide by")
            return 1.0

    judged = task_rewards(Raising(), PROBLEMS[:3], ["good", "bad", "good"], [True] * 3)
    assert judged.rewards.tolist() == [1, 0, 1] and judged.failures == 1
    assert "could not judge 'bad'" in caplog.text


def test_a_prompt_that_does_not_fit_is_refused_before_the_run(tmp_path):
    teacher = make_model("teacher")
    longest = max(len(teacher.tokenizer.encode_prompt(p.prompt)) for p in PROBLEMS)
    check_prompts(teacher, PROBLEMS, dataclasses.replace(CONFIG, prompt_sizes=(longest,)))
    small = dataclasses.replace(CONFIG, prompt_sizes=(longest - 1,))
    with pytest.raises(ValueError, match=r"prompts are longer than .*the longest has 4 tokens.*larger size"):
        calibrate(teacher, make_model("proxy"), TASK, "control", 0.0, small, tmp_path / "run")
    assert not (tmp_path / "run").exists()
