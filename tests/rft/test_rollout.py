"""A batch of rollouts from ids to advantages, against numbers worked out row by row."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from distill_jax.logprobs import token_logprobs
from distill_jax.mesh import batch_sharding, place_batch
from distill_jax.rft.judgement import judge
from distill_jax.rft.micro_batches import count_pieces, join_rows, split_rows
from distill_jax.rft.rewards import task_rewards
from distill_jax.rft.rollout import sample_batch, score_rollouts
from distill_jax.rft.validation import sampling_config
from distill_jax.sampling import make_sampler
from tests.rft.tiny_calibration import CONFIG, Letters, make_model

TASK = Letters()
PROBLEMS = TASK.problems("train", 4, 0)


@functools.cache
def scored_batch(temperature=1.0):
    config = dataclasses.replace(CONFIG, rft=dataclasses.replace(CONFIG.rft, temperature=temperature))
    teacher = make_model("teacher")
    sampler = make_sampler(teacher.module, sampling_config(teacher, config, 4), config.prompt_sizes)
    batch = sample_batch(sampler, teacher, PROBLEMS, jax.random.key(3), config, teacher.params, None, 1.0)
    return score_rollouts(teacher, make_model("proxy"), TASK, PROBLEMS, batch, config)


def lp_alone(model, prompt_ids, completion_ids):
    ids = [*prompt_ids, *completion_ids]
    return np.asarray(token_logprobs(model, [ids], [len(ids)]))[0, len(prompt_ids) :]


def test_texts_and_byte_ends_are_those_of_the_ids():
    rollouts, _ = scored_batch()
    sequences, tokenizer = rollouts.batch.sequences, make_model("teacher").tokenizer
    assert rollouts.faithful.sum() > 8  # the spare id of the embedding is sampled now and then
    for row, text in enumerate(rollouts.texts):
        ids = sequences.completion[row, : sequences.completion_length[row]].tolist()
        assert text == tokenizer.decode(ids, continuation=True)
        assert rollouts.bytes[row] == len(text)
        assert rollouts.problems[row] is PROBLEMS[row // 4]
        if rollouts.faithful[row]:
            widths = [{4: 2, 5: 2}.get(i, 1) for i in ids]  # "ab" and "cd" have two; the end has its sentinel
            assert rollouts.byte_ends[row, : len(ids)].tolist() == np.cumsum(widths).tolist()
        assert rollouts.faithful[row] == (7 not in ids)
        assert rollouts.ended[row] == (ids[-1] == 6)


def test_log_probabilities_are_those_of_each_row_alone():
    rollouts, scored = scored_batch()
    sequences, teacher, proxy = rollouts.batch.sequences, make_model("teacher"), make_model("proxy")
    for row in range(0, 16, 3):
        prompt = rollouts.problems[row].prompt
        ids = sequences.completion[row, : sequences.completion_length[row]].tolist()
        expected = lp_alone(teacher, teacher.tokenizer.encode_prompt(prompt), ids)
        np.testing.assert_allclose(scored.lp_teacher[row, : len(ids)], expected, atol=1e-5)
        np.testing.assert_allclose(rollouts.batch.lp[row, : len(ids)], expected, atol=1e-5)
        if scored.scorable[row]:
            own = [*rollouts.texts[row].encode(), *([258] if rollouts.ended[row] else [])]
            expected = lp_alone(proxy, prompt.encode(), own)
            np.testing.assert_allclose(scored.lp_proxy[row].sum(), expected.sum(), rtol=1e-5)


def test_anchor_is_scored_at_the_sampling_temperature_and_the_gap_is_not():
    rollouts, scored = scored_batch(temperature=0.5)
    mask = np.asarray(rollouts.batch.sequences.completion_mask)
    np.testing.assert_allclose(
        np.asarray(scored.lp_reference)[mask], np.asarray(rollouts.batch.lp)[mask], atol=1e-5
    )
    model = np.asarray(rollouts.batch.lp_model)
    np.testing.assert_allclose(np.asarray(scored.lp_teacher)[mask], model[mask], atol=1e-5)
    assert np.abs(np.asarray(scored.lp_reference) - np.asarray(scored.lp_teacher))[mask].max() > 0.05


@pytest.mark.parametrize("on_mesh", [False, True])
def test_scores_in_pieces_are_those_of_one_piece(mesh_cube, on_mesh):
    """Of teacher, anchor and proxy; 16 rows in 4 pieces, of which every device of a mesh has a row."""
    mesh = mesh_cube if on_mesh else None
    teacher, proxy = make_model("teacher", mesh), make_model("proxy", mesh)
    rft = dataclasses.replace(CONFIG.rft, temperature=0.5)
    scores = []
    rollouts, _ = scored_batch()
    batch = rollouts.batch if mesh is None else place_batch(rollouts.batch, mesh)
    for micro_batches in (1, 4):
        config = dataclasses.replace(CONFIG, rft=dataclasses.replace(rft, micro_batches=micro_batches))
        _, scored = score_rollouts(teacher, proxy, TASK, PROBLEMS, batch, config)
        scores.append((scored.lp_teacher, scored.lp_reference, scored.lp_proxy))
    for whole, pieces in zip(*scores, strict=True):
        np.testing.assert_allclose(pieces, whole, atol=1e-5)
        assert np.abs(whole).max() > 0.1
        if on_mesh:
            assert pieces.sharding.is_equivalent_to(batch_sharding(mesh), 2)


def test_split_rows_are_joined_in_order_and_stay_on_their_devices(mesh_cube):
    x = place_batch(np.arange(32.0).reshape(16, 2), mesh_cube)
    split = jax.jit(lambda x: split_rows(x, 2, mesh_cube))(x)
    assert split[1, :, 0].tolist() == [2.0 * row for row in range(1, 16, 2)]
    where = {shard.device: set(np.asarray(shard.data)[..., 0].ravel()) for shard in x.addressable_shards}
    for shard in split.addressable_shards:
        assert set(np.asarray(shard.data)[..., 0].ravel()) == where[shard.device]
    np.testing.assert_array_equal(join_rows(split, mesh_cube), x)


def test_number_of_pieces(mesh_cube):
    """At most so many rows in a piece, equal pieces, and as many rows of each on every device."""
    assert [count_pieces(16, most, None) for most in (16, 15, 8, 7, 1)] == [1, 2, 2, 4, 16]
    assert count_pieces(12, 5, None) == 3
    assert [count_pieces(16, most, mesh_cube) for most in (16, 8, 5, 1)] == [1, 2, 4, 4]  # rows over 4


def by_hand(rollouts, scored, sign, gate):
    """Calibration reward (None where there is none) and gap of every row, in plain Python."""
    gaps = (np.asarray(scored.lp_teacher).sum(1) - np.asarray(scored.lp_proxy).sum(1)) / np.maximum(
        rollouts.bytes, 1
    )
    rewards: list[float | None] = [
        sign * g if ok else None for g, ok in zip(gaps, scored.scorable, strict=True)
    ]
    if gate:
        for group in range(0, len(rewards), 4):
            rows = range(group, group + 4)
            good = [rewards[r] for r in rows if scored.task.correct[r] and rewards[r] is not None]
            for r in rows:
                if not good:
                    rewards[r] = None
                elif not scored.task.correct[r]:
                    rewards[r] = min(good)
    return rewards, gaps


@pytest.mark.parametrize(("arm", "sign"), [("distillable", -1.0), ("undistillable", 1.0)])
@pytest.mark.parametrize("gate", [True, False])
def test_advantages_by_hand(arm, sign, gate):
    rollouts, scored = scored_batch()
    assert {True, False} == set(scored.task.correct.tolist())
    config = dataclasses.replace(CONFIG, within_correct=gate)
    judgement = judge(rollouts, scored, config, arm, 0.5)
    rewards, gaps = by_hand(rollouts, scored, sign, gate)
    expected = np.zeros(16)
    for group in range(0, 16, 4):
        task = scored.task.rewards[group : group + 4]
        expected[group : group + 4] = (task - task.mean()) / (task.std() + 1e-4)
        known = [r for r in range(group, group + 4) if rewards[r] is not None]
        values = np.array([rewards[r] for r in known])
        if known:
            expected[known] += 0.5 * (values - values.mean()) / (max(values.std(), 0.01) + 1e-4)
    np.testing.assert_allclose(judgement.advantages, expected, atol=1e-4)
    np.testing.assert_allclose(judgement.gap_per_byte, gaps, atol=1e-5)


def test_control_has_the_task_advantage_alone():
    rollouts, scored = scored_batch()
    control = judge(rollouts, scored, CONFIG, "control", 0.0)
    task = scored.task.rewards.reshape(4, 4)
    expected = (task - task.mean(1, keepdims=True)) / (task.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(control.advantages, expected.reshape(-1), atol=1e-5)
    assert float(control.sums["advantage_calibration_abs"][0]) > 0  # logged all the same


def test_span_credit_begins_with_the_credit_of_the_sequence():
    """The first token's credit is the rollout's own reward; afterwards tokens differ."""
    rollouts, scored = scored_batch()
    config = dataclasses.replace(CONFIG, credit="span", within_correct=False, advantage_scale="none")
    spans = judge(rollouts, scored, config, "distillable", 1.0)
    sequence = judge(rollouts, scored, dataclasses.replace(config, credit="sequence"), "distillable", 1.0)
    assert spans.advantages.shape == (16, 8)
    task = scored.task.rewards.reshape(4, 4)
    task = (task - task.mean(1, keepdims=True)).reshape(-1)
    first, whole = np.asarray(spans.advantages[:, 0]) - task, np.asarray(sequence.advantages) - task
    # Token credit is centred over the tokens of the group, so first tokens agree up to one number a group.
    for group in range(0, 16, 4):
        rows = [r for r in range(group, group + 4) if scored.scorable[r]]
        difference = (first - whole)[rows]
        np.testing.assert_allclose(difference, difference[0], atol=1e-5)
    long = int(np.argmax(np.where(scored.scorable, rollouts.bytes, 0)))
    assert np.ptp(np.asarray(spans.advantages[long, :3])) > 1e-3


def test_every_byte_of_scorable_rows_is_covered_by_spans():
    rollouts, scored = scored_batch()
    sums = judge(rollouts, scored, CONFIG, "distillable", 0.5).sums
    inside, of = (float(x) for x in sums["span_coverage"])
    ended = np.asarray(rollouts.ended) & rollouts.faithful
    assert inside == of == rollouts.bytes[rollouts.faithful].sum() + ended.sum()


def test_logged_sums_by_hand():
    rollouts, scored = scored_batch()
    sums = judge(rollouts, scored, CONFIG, "distillable", 0.5).sums
    mean = {name: float(total) / float(count) for name, (total, count) in sums.items()}
    _, gaps = by_hand(rollouts, scored, 1.0, False)
    task = scored.task.rewards.reshape(4, 4)
    expected = {
        "reward_task": task.mean(),
        "correct": scored.task.correct.mean(),
        "reward_task_std": task.std(axis=1).mean(),
        "saturated_groups": (np.ptp(task, axis=1) == 0).mean(),
        "gap_per_byte": gaps[scored.scorable].mean(),
        "gap_raw": (gaps * np.maximum(rollouts.bytes, 1))[scored.scorable].mean(),
        "completion_bytes": rollouts.bytes.mean(),
        "completion_tokens": np.asarray(rollouts.batch.sequences.completion_length).mean(),
        "ended": np.asarray(rollouts.ended).mean(),
        "unscorable": 1 - scored.scorable.mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(mean[name], value, rtol=1e-4, err_msg=name)


def test_rewards_are_checked_and_verifier_failures_counted():
    class Odd(Letters):
        def score(self, problem, completion, ended):
            self.failures += completion == "?"
            return {"good": 1.0, "half": 0.5, "?": 0.0}.get(completion, 7.0)

    problems = PROBLEMS[:3]
    judged = task_rewards(Odd(), problems, ["good", "half", "?"], [True] * 3, correct_at=0.5)
    assert judged.rewards.tolist() == [1.0, 0.5, 0.0] and judged.correct.tolist() == [True, True, False]
    assert judged.failures == 1
    with pytest.raises(ValueError, match=r"gave the reward 7.0"):
        task_rewards(Odd(), problems[:1], ["bad"], [True])
    with pytest.raises(ValueError, match="one of each a row"):
        task_rewards(Odd(), problems, ["good"], [True])
