"""The loop: what it writes, its guards, and a resume that is exact to the bit."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.checkpoint import load_tree, read_json
from distill_jax.rft import calibrate as loop
from distill_jax.rft.calibrate import calibrate
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.validation import Validation
from tests.rft.tiny_calibration import CONFIG, Letters, make_model

LOGGED = [
    *(
        "reward_task",
        "reward_task_std",
        "gap_raw",
        "gap_per_byte",
        "advantage_task_abs",
        "advantage_calibration_abs",
    ),
    *("kl_k3", "kl_k1", "entropy", "completion_bytes", "completion_tokens", "saturated_groups", "ratio_mean"),
    *("ratio_max", "clip_fraction", "grad_norm", "skipped_steps", "loss"),
]


class Killed(Exception):
    pass


def run(directory, arm="distillable", eta=0.5, config=CONFIG, **options):
    return calibrate(
        make_model("teacher"), make_model("proxy"), Letters(), arm, eta, config, directory, **options
    )


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, result) of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, run(directory)


def test_what_is_written(finished):
    directory, result = finished
    metrics = rows(directory / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4, 5]
    assert set(LOGGED) <= set(metrics[1]) and all(np.isfinite(metrics[1][name]) for name in LOGGED)
    assert [row["step"] for row in metrics if "validation_accuracy" in row] == [0, 2, 4, 5]
    # The sampler's scores and the step's agree: on-policy, the ratio is 1.
    assert all(abs(row["ratio_max"] - 1) < 1e-4 and row["clip_fraction"] == 0 for row in metrics[1:])
    assert metrics[1]["kl_k3"] < 1e-6 < metrics[-1]["kl_k3"]  # the first rollouts are the reference's own
    saved = rows(directory / "rollouts.jsonl")
    assert sorted({row["step"] for row in saved}) == [1, 3, 5] and len(saved) == 12
    assert set(saved[0]) == {"step", "prompt", "answer", "completion", "reward", "gap_per_byte", "style"}
    stored = load_tree(directory / "adapter", result.trainable)
    jax.tree.map(np.testing.assert_array_equal, stored, result.trainable)
    summary = read_json(directory / "calibration.json")
    assert (summary["arm"], summary["steps"], summary["stopped"]) == ("distillable", 5, "steps")
    assert summary["best"] == dataclasses.asdict(result.best)


def test_best_is_the_highest_validation_in_the_direction_of_the_arm(finished):
    directory, result = finished
    validated = {row["step"]: row for row in rows(directory / "metrics.jsonl") if "validation_gap" in row}
    assert result.best_step == min(validated, key=lambda step: validated[step]["validation_gap"])
    assert result.best.gap == validated[result.best_step]["validation_gap"]
    assert result.original.gap == validated[0]["validation_gap"]


def test_finished_run_is_not_run_again(finished):
    directory, result = finished
    before = (directory / "metrics.jsonl").read_text()

    def on_step(step, metrics):
        raise AssertionError("a step was run")

    again = run(directory, on_step=on_step)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, result.trainable)
    assert dataclasses.replace(again, trainable=None) == dataclasses.replace(result, trainable=None)
    assert (directory / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("killed_after", [1, 3])
def test_killed_run_ends_as_if_it_had_not_been(finished, tmp_path, killed_after):
    """Killed before the first checkpoint, and between two: the adapter is bit-equal, the logs have no row twice."""
    directory, result = finished

    def kill(step, metrics):
        if step == killed_after:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, on_step=kill)
    steps = []
    again = run(tmp_path, on_step=lambda step, metrics: steps.append(step))
    assert steps == list(range(killed_after // 2 * 2 + 1, 6))  # from the last checkpoint on
    jax.tree.map(np.testing.assert_array_equal, again.trainable, result.trainable)
    assert (again.best_step, again.best) == (result.best_step, result.best)

    def without_time(path):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path)]

    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_time(tmp_path / name) == without_time(directory / name)


def test_other_seed_is_another_run(finished, tmp_path):
    _, result = finished
    other = run(tmp_path, seed=1)
    assert not np.array_equal(jax.tree.leaves(other.trainable)[0], jax.tree.leaves(result.trainable)[0])


def test_teacher_is_not_changed(finished):
    fresh = jax.tree.map(np.asarray, make_model.__wrapped__("teacher").params)
    jax.tree.map(np.testing.assert_array_equal, make_model("teacher").params, fresh)


def test_task_reward_rises_and_style_is_named(tmp_path):
    """40 steps of the control arm on a task that a coin could do."""
    config = dataclasses.replace(
        CONFIG, steps=40, prompts_per_step=8, validation_every=40, checkpoint_every=40, validation_problems=64
    )
    result = run(tmp_path, "control", 0.0, config, style_of=lambda text: "a" if "a" in text else None)
    assert result.best_step == 40
    assert result.best.reward_sampled > result.original.reward_sampled + 0.1
    assert all(
        row["style"] == ("a" if "a" in row["completion"] else None)
        for row in rows(tmp_path / "rollouts.jsonl")
    )


def test_arms_move_the_gap_in_opposite_directions(tmp_path):
    """Same teacher, seed and length of run; only the arm differs."""
    config = dataclasses.replace(
        CONFIG, steps=30, prompts_per_step=8, validation_every=30, checkpoint_every=30, validation_problems=64
    )
    gap = {}
    for arm in ("distillable", "undistillable"):
        run(tmp_path / arm, arm, 1.0, dataclasses.replace(config, within_correct=False))
        first, last = (
            r["validation_gap"] for r in rows(tmp_path / arm / "metrics.jsonl") if "validation_gap" in r
        )
        gap[arm] = last - first
    assert gap["distillable"] < -0.2 and gap["undistillable"] > 0.2


def test_span_credit_many_updates_and_full_fine_tuning(tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=2, credit="span", trainable="params", updates_per_batch=2, numerator="current"
    )
    result = run(tmp_path, "undistillable", 0.5, config)
    assert result.steps == 2
    last = rows(tmp_path / "metrics.jsonl")[-1]
    assert last["ratio_max"] > 1.0001  # the second update on a batch is off-policy
    teacher = make_model("teacher").params
    assert jax.tree.structure(result.trainable) == jax.tree.structure(teacher)


def validation(**values):
    numbers = dict.fromkeys((field.name for field in dataclasses.fields(Validation)), 0.0)
    return Validation(**numbers | values)


def guarded(monkeypatch, tmp_path, validations, config, metrics=None, arm="undistillable"):
    """Runs the loop on validations that were made up."""
    queue = iter(validations)
    monkeypatch.setattr(loop, "validate", lambda *arguments: next(queue))
    if metrics is not None:
        update = loop._Run.update

        def changed(self, state, proxies, step):
            state, real, batch = update(self, state, proxies, step)
            return state, real | metrics[step], batch

        monkeypatch.setattr(loop._Run, "update", changed)
    return run(tmp_path, arm, 0.0 if arm == "control" else 0.5, config)


EVERY_STEP = dataclasses.replace(CONFIG, steps=3, validation_every=1, utility_floor=0.1, checkpoint_every=1)


def test_utility_floor_stops_and_keeps_the_best_above_it(monkeypatch, tmp_path):
    made_up = [
        validation(accuracy=0.9, gap=1.0),
        validation(accuracy=0.85, gap=2.0),
        validation(accuracy=0.7, gap=9.0),  # the largest gap, below the floor of 0.8
    ]
    result = guarded(monkeypatch, tmp_path, made_up, EVERY_STEP)
    assert result.stopped == "accuracy below the utility floor" and result.steps == 2
    assert result.best_step == 1 and result.best.gap == 2.0
    again = run(tmp_path, "undistillable", 0.5, EVERY_STEP)  # a stopped run stays stopped
    assert again.steps == 2 and again.stopped == result.stopped


def test_floor_is_forgiving_with_patience(monkeypatch, tmp_path):
    low, fine = validation(accuracy=0.1, gap=9.0), validation(accuracy=0.9, gap=2.0)
    made_up = [validation(accuracy=0.9, gap=1.0), low, fine, low]
    result = guarded(monkeypatch, tmp_path, made_up, dataclasses.replace(EVERY_STEP, floor_patience=2))
    assert result.stopped == "steps" and result.best_step == 2


def test_nothing_better_gives_the_original_back(monkeypatch, tmp_path):
    made_up = [validation(accuracy=0.9, gap=1.0)] + [validation(accuracy=0.9, gap=0.5)] * 3
    result = guarded(monkeypatch, tmp_path, made_up, EVERY_STEP)
    assert result.best_step == 0 and result.best == result.original
    products = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(result.trainable) if path[-1].key == "b"
    ]
    assert products and not any(jnp.any(leaf) for leaf in products)


def test_control_keeps_its_last_policy_above_the_floor(monkeypatch, tmp_path):
    """It stands for the same amount of fine-tuning, so a better step before does not count."""
    made_up = [
        validation(accuracy=0.9, reward_sampled=0.9),
        validation(accuracy=0.9, reward_sampled=0.8),
        validation(accuracy=0.85, reward_sampled=0.7),
        validation(accuracy=0.5, reward_sampled=1.0),
    ]
    result = guarded(monkeypatch, tmp_path, made_up, EVERY_STEP, arm="control")
    assert result.best_step == 2 and result.best.reward_sampled == 0.7


def test_convergence_stops(monkeypatch, tmp_path):
    made_up = [validation(accuracy=0.9, gap=g) for g in (1.0, 1.005, 1.009, 1.01)]
    config = dataclasses.replace(EVERY_STEP, stop_when_converged=True, patience=2, min_improvement=0.01)
    result = guarded(monkeypatch, tmp_path, made_up, config)
    assert result.stopped == "converged" and result.steps == 2


@pytest.mark.parametrize(
    ("settings", "metrics", "reason"),
    [
        ({"entropy_floor": 0.1}, [{"entropy": 0.5}, {"entropy": 0.05}], "entropy below its floor"),
        (
            {"length_ceiling": 1.5},
            [{"completion_bytes": 4.0}, {"completion_bytes": 6.5}],
            "completions above the length ceiling",
        ),
    ],
)
def test_entropy_and_length_guards(monkeypatch, tmp_path, settings, metrics, reason):
    made_up = [validation(accuracy=0.9)] * 3
    result = guarded(monkeypatch, tmp_path, made_up, dataclasses.replace(EVERY_STEP, **settings), metrics)
    assert result.stopped == reason and result.steps == 2


def test_texts_that_the_proxy_cannot_score_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, proxy_completion_sizes=(3,))
    with pytest.raises(ValueError, match=r"cannot score .* are longer than proxy_prompt_sizes=\(4,\)"):
        run(tmp_path, config=dataclasses.replace(config, unscorable_limit=0.01))


@pytest.mark.parametrize(
    ("arm", "eta", "message"),
    [
        ("original", 0.0, "arm must be one of"),
        ("control", 0.5, "'control' is the arm with eta=0"),
        ("distillable", 0.0, "'control' is the arm with eta=0"),
        ("distillable", -0.5, "eta must be >= 0"),
    ],
)
def test_arm_and_eta(tmp_path, arm, eta, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, arm, eta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"units": "per_word"}, "units must be one of"),
        ({"credit": "token"}, "credit must be one of"),
        ({"prompt_sizes": ()}, "prompt_sizes"),
        ({"utility_floor": 2.0}, "utility_floor is a share"),
        ({"calibration_floor": -1.0}, "calibration_floor must be >= 0"),
        ({"length_ceiling": 0.5}, "length_ceiling"),
        ({"credit": "span", "whiten": True}, "credit='span'"),
        ({"credit": "span", "units": "per_token"}, "credit='span'"),
        ({"advantage_eps": 0.0}, "advantage_eps"),
        ({"train_problems": 4}, "less than prompts_per_step"),
        ({"trainable": "head"}, "trainable must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**settings)
