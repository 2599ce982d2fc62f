"""Rewards of a config: values by hand, rows without a reward, and settings that cannot be meant."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distill_jax.pipeline.settings import from_config, to_config
from distill_jax.rewards.shaping import FORMS, length_reward, matches
from distill_jax.rewards.terms import Answered, RewardTerm, make_rewards
from distill_jax.rft.config import CalibrationConfig
from tests.rewards.small_classifier import write_classifier

ODD = "tests.rewards.odd_functions"


def answered(*completions, ended=True):
    return [Answered("p", "abc", text, ended, {"level": 4}) for text in completions]


def test_length_reward_by_hand():
    np.testing.assert_allclose(length_reward(np.array([0, 10, 15, 20, 99]), 10, 20), [1, 1, 0.5, 0, 0])
    (reward,) = make_rewards([RewardTerm("length", soft_bytes=2, hard_bytes=4)])
    np.testing.assert_allclose(reward(answered("ab", "é", "abc", "abcd")), [1, 1, 0.5, 0])  # é has two bytes


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("marked", "3+4=7\n#### 7\n", ("#### ", "7", "#### 7 #### 8\nmore", "7 ####\n")),
        ("boxed", "so $\\boxed{\\frac{1}{2}}$.", ("so 1/2", "\\boxed{1")),
        ("think", "<think>a\nb</think>\n7", ("7", "<think>a</think>", "<think>a</think> 7 <think>b</think>")),
        (r"\d+", "123", ("12a", "")),
    ],
)
def test_forms(form, good, bad):
    pattern = FORMS.get(form, form)
    assert matches(pattern, good) == 1.0
    assert [matches(pattern, text) for text in bad] == [0.0] * len(bad)


def test_form_needs_an_end_and_a_pattern_that_never_ends_costs_its_sample():
    (reward,) = make_rewards([RewardTerm("form", source=r"(a+)+b", seconds=0.5)])
    rows = [*answered("aab"), *answered("aab", ended=False), *answered("a" * 40), *answered("c")]
    np.testing.assert_array_equal(reward(rows), np.array([1, 0, np.nan, 0], np.float32))
    assert reward.failures == 1


def test_function_of_the_user():
    (reward,) = make_rewards([RewardTerm("function", source=f"{ODD}:pick", name="mine")])
    np.testing.assert_allclose(
        reward(answered("abc", "x")), [4, 3]
    )  # prompt, ended and metadata are given too
    assert (reward.name, reward.failures) == ("mine", 0)
    term = RewardTerm("function", source=f"{ODD}:misbehave", memory_bytes=1 << 30)
    (reward,) = make_rewards([term])
    np.testing.assert_array_equal(reward(answered("x", "memory")), np.array([1, np.nan], np.float32))
    assert reward.failures == 1
    (reward,) = make_rewards([RewardTerm("function", source=f"{ODD}:misbehave")])
    np.testing.assert_array_equal(reward(answered("x", "raise")), np.array([1, np.nan], np.float32))
    assert reward.failures == 1


def test_reward_model_on_a_mesh(tmp_path, mesh_cube):
    term = RewardTerm("reward_model", source=str(write_classifier(tmp_path / "m")), batch_size=4, sizes=(64,))
    (reward,) = make_rewards([term], mesh_cube)
    values = reward(answered("good", "bad", "y" * 80))
    assert np.isfinite(values).tolist() == [True, True, False] and values[0] != values[1]
    assert reward.failures == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lenght"}, "must be one of length, form, function, reward_model, got 'lenght'"),
        (
            {"kind": "length", "weight": 0, "hard_bytes": 2},
            "weight of the reward 'length' must be positive, got 0",
        ),
        (
            {"kind": "length", "soft_bytes": 5, "hard_bytes": 2},
            "needs 0 <= soft < hard, got soft=5 and hard=2",
        ),
        ({"kind": "form"}, "one of marked, boxed, think or a regular expression; got nothing"),
        ({"kind": "form", "source": "("}, "neither one of .* nor a regular expression"),
        ({"kind": "form", "source": "boxed", "name": "a b"}, "must be one word"),
        (
            {"kind": "function", "source": "m:f", "memory_bytes": 4096},
            "memory_bytes of the reward 'function' must be at least 67108864.* got 4096",
        ),
    ],
)
def test_bad_terms(fields, message):
    with pytest.raises(ValueError, match=message):
        RewardTerm(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "function", "source": "nowhere:f"}, "no module 'nowhere'"),
        ({"kind": "reward_model", "source": "nowhere"}, "no config.json in 'nowhere'"),
        ({"kind": "reward_model", "source": "hf://nowhere"}, "is named hf://ORGANISATION/NAME"),
    ],
)
def test_a_source_is_looked_at_when_a_run_starts_and_not_when_its_config_is_read(fields, message):
    term = RewardTerm(**fields)
    with pytest.raises(ValueError, match=message):
        term.check_source()
    with pytest.raises(ValueError, match=message):
        make_rewards([term])


def test_names_must_differ():
    term = RewardTerm("form", source="boxed")
    with pytest.raises(ValueError, match="names of rewards must be different"):
        make_rewards([term, term])


def test_a_config_file_says_rewards():
    """As a field of the calibration, from Python and as a run's config.json has it."""
    terms = (RewardTerm("length", soft_bytes=2, hard_bytes=4), RewardTerm("form", 0.5, source="boxed"))
    config = CalibrationConfig(rewards=terms)
    for fields in (to_config(config), json.loads(json.dumps(to_config(config).to_dict()))):
        read = from_config(CalibrationConfig, fields, "calibration")
        assert read == config and hash(read) == hash(config)
    plain = to_config(CalibrationConfig())
    plain.rewards = ({"kind": "form", "source": "boxed", "weight": 0.5},)
    assert from_config(CalibrationConfig, plain, "calibration").rewards == terms[1:]
    plain.rewards = ({"kind": "form", "pattern": "boxed"},)
    with pytest.raises(ValueError, match=r"calibration.rewards\[0\]: unknown fields \['pattern'\]"):
        from_config(CalibrationConfig, plain, "calibration")
