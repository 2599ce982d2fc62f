"""The answer-utility reward: which tokens it counts, its sign, its gate, and the tasks that it is refused for."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from distill_jax.logprobs import token_logprobs
from distill_jax.rft.answer_utility import answer_lp_per_byte, require_answer_mark, with_gold_answer
from distill_jax.rft.calibrate import calibrate
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.judgement import judge
from distill_jax.rft.rollout import sample_batch, score_rollouts
from distill_jax.rft.validation import sampling_config
from distill_jax.sampling import make_sampler
from distill_jax.tasks import get_task
from distill_jax.tasks.base import Problem
from tests.rft.tiny_calibration import CONFIG, Letters, MarkedLetters, make_model

CONFIG = dataclasses.replace(CONFIG, answer_utility=0.5)
TASK = MarkedLetters()
PROBLEMS = TASK.problems("train", 4, 0)


@functools.cache
def scored_batch():
    teacher = make_model("teacher")
    sampler = make_sampler(teacher.module, sampling_config(teacher, CONFIG, 4), CONFIG.prompt_sizes)
    batch = sample_batch(sampler, teacher, PROBLEMS, jax.random.key(3), CONFIG, teacher.params, None, 1.0)
    return score_rollouts(
        teacher, make_model("proxy"), TASK, PROBLEMS, batch, CONFIG, answer_mark=TASK.answer_mark
    )


def by_hand():
    """f64[B]: log p(b"db" | prompt, text up to and with the first "c") / 2, NaN without a "c"."""
    rollouts, _ = scored_batch()
    proxy, found = make_model("proxy"), np.full(16, np.nan)
    for row, text in enumerate(rollouts.texts):
        if rollouts.faithful[row] and "c" in text:
            ids = [*rollouts.problems[row].prompt.encode(), *text[: text.index("c") + 1].encode(), *b"db"]
            found[row] = np.asarray(token_logprobs(proxy, [ids], [len(ids)]))[0, -2:].sum() / 2
    return found


def test_texts_with_the_gold_answer():
    problems = [Problem("1+1?", "2", "1+1=2 #### 2", 0)] * 3
    answered = with_gold_answer(problems, ["é #### 3", "no mark", "#### 1 #### 2"], "####")
    assert answered.texts == ["é #### 2", "", "#### 2"]
    assert answered.known.tolist() == [True, False, True]
    assert answered.first_byte.tolist() == [7, 7, 4]
    assert answered.bytes.tolist() == [2, 2, 2]


def test_tokens_that_end_inside_the_answer_count():
    """Tokens end at 2, 5, 6 and at 3, 4; the answer begins after byte 4 (a token across the border counts) and 3."""
    lp = np.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]])
    ends = np.array([[2, 5, 6], [3, 4, 0]])
    got = answer_lp_per_byte(lp, ends, np.array([4, 3]), np.array([2, 1]))
    np.testing.assert_allclose(got, [-2.5, -5.0])


def test_scores_are_those_of_each_answer_alone():
    _, scored = scored_batch()
    expected = by_hand()
    known = np.isfinite(expected)
    assert known.any() and not known.all()
    answer = scored.proxies[0].answer
    assert (answer.known & scored.scorable).tolist() == known.tolist()
    np.testing.assert_allclose(np.asarray(answer.lp_per_byte)[known], expected[known], rtol=1e-4)


@pytest.mark.parametrize(("arm", "sign"), [("distillable", 1.0), ("undistillable", -1.0), ("control", 0.0)])
@pytest.mark.parametrize("gate", [True, False])
def test_advantages_by_hand(arm, sign, gate):
    """+u pays in distillable mode, -u in undistillable mode, nothing in the control; logged everywhere."""
    rollouts, scored = scored_batch()
    config = dataclasses.replace(CONFIG, within_correct=gate)
    eta = 0.0 if arm == "control" else 0.5
    bare = dataclasses.replace(scored, proxies=(dataclasses.replace(scored.proxies[0], answer=None),))
    judged, without = judge(rollouts, scored, config, arm, eta), judge(rollouts, bare, config, arm, eta)
    utility = by_hand()
    direction = -1.0 if arm == "undistillable" else 1.0
    rewards, expected = direction * utility, np.zeros(16)
    for start in range(0, 16, 4):
        rows = np.arange(start, start + 4)
        if gate:
            correct = scored.task.correct[rows]
            good = rewards[rows][correct & np.isfinite(rewards[rows])]
            for row, right in zip(rows, correct, strict=True):
                rewards[row] = rewards[row] if right else (good.min() if len(good) else np.nan)
            if not len(good):
                continue
        rows = rows[np.isfinite(rewards[rows])]
        values = rewards[rows]
        if len(rows):
            expected[rows] = (values - values.mean()) / (max(values.std(), 0.1) + 1e-4)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(judged.advantages - without.advantages, 0.5 * abs(sign) * expected, atol=2e-4)
    total, count = judged.sums["answer_utility"]
    np.testing.assert_allclose(total / count, np.nanmean(utility), rtol=1e-4)
    assert "answer_utility" not in without.sums


def test_a_run_logs_it_and_without_weight_it_is_not_computed(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1)
    models = make_model("teacher"), make_model("proxy")
    for weight in (0.5, 0.0):
        folder = tmp_path / str(weight)
        calibrate(
            *models, TASK, "undistillable", 0.5, dataclasses.replace(config, answer_utility=weight), folder
        )
        last = [json.loads(line) for line in (folder / "metrics.jsonl").open()][-1]
        assert ("answer_utility" in last) == ("advantage_answer_utility_abs" in last) == (weight > 0)


def test_a_task_without_answers_is_refused(tmp_path):
    models = make_model("teacher"), make_model("proxy")
    with pytest.raises(ValueError, match=r"task 'letters' has no `answer_mark`"):
        calibrate(*models, Letters(), "undistillable", 0.5, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="nothing follows the mark 'c'"):
        require_answer_mark(TASK, [Problem("ab", "", "abc", 0)])
    chains = get_task("chain_arithmetic")
    assert require_answer_mark(chains, chains.problems("train", 4, 0)) == "####"


def test_bad_settings():
    with pytest.raises(ValueError, match="answer_utility must be >= 0"):
        CalibrationConfig(answer_utility=-0.5)
    with pytest.raises(ValueError, match="answer_floor must be >= 0"):
        CalibrationConfig(answer_floor=-0.5)
