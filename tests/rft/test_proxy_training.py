"""The learning proxy: its buffer, its step, and runs with it that are exact to the bit across a kill."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.checkpoint import read_json
from distill_jax.logprobs import token_logprobs
from distill_jax.mesh import place_batch
from distill_jax.models.decoder import Decoder, init_params, param_axes
from distill_jax.models.spec import ModelSpec
from distill_jax.optimizer import OptimizerConfig, make_optimizer
from distill_jax.rft.calibrate import calibrate
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.proxies import Proxy
from distill_jax.rft.proxy_training import Learner, Learners, RolloutBuffer, make_proxy_step
from distill_jax.rft.step import init_rft_state
from distill_jax.rft.validation import Validation
from distill_jax.sequences import pack_sequences
from tests.rft.tiny_calibration import CONFIG, MarkedLetters, make_model

LEARNING = dataclasses.replace(
    CONFIG,
    proxy="learning",
    proxy_every=2,
    proxy_steps=4,
    proxy_batch=8,
    proxy_buffer=32,
    proxy_optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0),
)


def rows_of(*texts, prompt_size=4, size=6):
    """The question "ab" and these completions in bytes."""
    return pack_sequences([list(b"ab")] * len(texts), [list(t) for t in texts], prompt_size, size)


class TestBuffer:
    def test_newest_rows_take_the_place_of_the_oldest(self):
        empty = RolloutBuffer.empty(3, 5, 6, "")
        two = empty.add(rows_of(b"a", b"x", b"bc"), np.array([True, False, True]))
        assert (empty.filled, two.filled) == (0, 2)
        four = two.add(rows_of(b"def", b"ghij"), np.ones(2, bool))
        assert two.rows.completion_length.tolist() == [1, 2, 0]  # what a checkpoint may still be writing
        assert four.filled == 3 and four.written.tolist() == [4]
        assert four.rows.completion_length.tolist() == [4, 2, 3]
        assert four.rows.completion[0].tolist() == [*b"ghij", 0, 0]
        assert four.rows.tokens[0, :5].tolist() == [*b"ab", 0, 0, 0] and four.rows.prompt_length[0] == 2

    def test_of_a_batch_larger_than_the_ring_the_last_rows_stay(self):
        full = RolloutBuffer.empty(2, 4, 6, "").add(rows_of(b"a", b"bb", b"ccc"), np.ones(3, bool))
        assert sorted(full.rows.completion_length.tolist()) == [2, 3] and full.filled == 2

    def test_draws(self):
        buffer = RolloutBuffer.empty(4, 4, 6, "").add(rows_of(b"a", b"bb", b"ccc"), np.ones(3, bool))
        rng = np.random.default_rng(0)
        assert sorted(buffer.draw(3, rng).completion_length.tolist()) == [1, 2, 3]
        assert set(buffer.draw(20, rng).completion_length.tolist()) == {1, 2, 3}
        with pytest.raises(ValueError, match="nothing to draw from"):
            RolloutBuffer.empty(4, 4, 6, "").draw(1, rng)


def test_loss_is_the_mean_of_the_tokens_and_falls():
    proxy = make_model("proxy")
    rows = rows_of(b"abc", b"d", b"ca")
    optimizer = make_optimizer(LEARNING.proxy_optimizer, 20)
    step = make_proxy_step(proxy.module, optimizer, chunk=4)
    state = init_rft_state(proxy.params, optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    lp = [
        np.asarray(token_logprobs(proxy, [[*b"ab", *text]], [2 + len(text)]))[0, 2:]
        for text in (b"abc", b"d", b"ca")
    ]
    np.testing.assert_allclose(losses[0], -np.concatenate(lp).mean(), rtol=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 20 and int(state.skipped) == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_is_unsharded(mesh_cube, mesh_single, name):
    """data=2, fsdp=2, tensor=2 against one device: weights, optimizer and loss after three steps."""
    spec = ModelSpec("llama", 32, 16, 2, 2, 2, 8, 32)
    rng = np.random.default_rng(0)
    rows = pack_sequences(
        [rng.integers(0, 32, 3).tolist() for _ in range(8)],
        [rng.integers(0, 32, length).tolist() for length in (1, 6, 3, 4, 6, 2, 5, 6)],
        4,
        6,
    )
    results = []
    for mesh in (mesh_cube, mesh_single):
        module = Decoder(spec, mesh)
        optimizer = make_optimizer(OptimizerConfig(name, 0.01, warmup_steps=0), 3)
        step = make_proxy_step(module, optimizer, chunk=4, axes=param_axes(module))
        state = init_rft_state(init_params(module, jax.random.key(0)), optimizer)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state.trainable)
        for _ in range(3):
            state, metrics = step(state, place_batch(rows, mesh))
        for leaf, sharding in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(placed), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert step._cache_size() <= 2, "the state moved between steps"
        results.append(jax.tree.map(np.asarray, (state.trainable, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)


@pytest.mark.parametrize("restart", [True, False])
def test_a_training_starts_anew_or_goes_on(restart):
    proxy = make_model("proxy")
    before = jax.tree.map(np.asarray, proxy.params)
    learner = Learner.make(
        Proxy("proxy", proxy, "raw"), dataclasses.replace(LEARNING, proxy_restart=restart, steps=4)
    )
    state = learner.begin()
    assert learner.train(state, 0, 0) == (state, {})  # nothing to learn from yet
    rows = rows_of(b"abc", b"dd", b"", prompt_size=4, size=17)
    state = learner.observe(state, rows, np.ones(3, bool))
    assert state.buffer.filled == 2  # an empty completion teaches nothing
    state, first = learner.train(state, 0, 2)
    assert first["loss_after"] < first["loss_before"]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.training.trainable, before)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert learner.current(state).model.params is state.training.trainable
    state, second = learner.train(state, 0, 4)
    if restart:
        np.testing.assert_allclose(second["loss_before"], first["loss_before"], rtol=0.5)
        assert int(state.training.step) == 4
    else:
        assert second["loss_before"] < first["loss_before"] and int(state.training.step) == 8
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, proxy.params), before)


class Killed(Exception):
    pass


PROXIES = (
    Proxy("bytes", make_model("proxy"), "raw"),
    Proxy("letters", make_model("letter_proxy"), "raw"),
)
ALL = dataclasses.replace(
    LEARNING, steps=4, ensemble="mean", answer_utility=0.5, proxy_restart=False, proxy_rollouts="correct"
)


def run(directory, on_step=None, proxies=PROXIES, config=ALL):
    return calibrate(
        make_model("teacher"),
        proxies,
        MarkedLetters(),
        "undistillable",
        0.5,
        config,
        directory,
        on_step=on_step,
    )


def rows_in(path):
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in lines]


def test_killed_run_ends_as_if_it_had_not_been(tmp_path):
    """Two learning proxies, their ensemble and the answer utility; killed between two checkpoints."""
    whole = run(tmp_path / "whole")
    metrics = rows_in(tmp_path / "whole" / "metrics.jsonl")
    trained = [row["step"] for row in metrics if "proxy_loss_after_bytes" in row]
    assert trained == [2, 4] == [row["step"] for row in metrics if "proxy_loss_after_letters" in row]
    validated = [row for row in metrics if "validation_gap_learning" in row]
    assert [row["step"] for row in validated] == [0, 2, 4]
    # Proxies that have learned what is written find it easier.
    assert all(row["validation_gap_learning"] < row["validation_gap"] - 0.1 for row in validated)
    summary = read_json(tmp_path / "whole" / "calibration.json")
    assert summary["best_by"] == "learning"
    assert whole.best_step == max(validated, key=lambda row: row["validation_gap_learning"])["step"]

    def kill(step, metrics):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", kill)
    steps = []
    again = run(tmp_path / "killed", lambda step, metrics: steps.append(step))
    assert steps == [3, 4]
    jax.tree.map(np.testing.assert_array_equal, again.trainable, whole.trainable)
    assert (again.best_step, again.best) == (whole.best_step, whole.best)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert rows_in(tmp_path / "killed" / name) == rows_in(tmp_path / "whole" / name)


def test_static_proxies_have_no_learners():
    assert Learners.make(PROXIES, CONFIG) == Learners(())
    assert Learners(()).begin() == () == Learners(()).now(())


def test_which_gap_is_the_objective():
    numbers = dict.fromkeys((field.name for field in dataclasses.fields(Validation)), 0.0)
    found = Validation(**numbers | {"gap": 3.0, "gap_learning": 0.5, "reward_sampled": 0.9})
    assert found.objective("undistillable") == 3.0 == -found.objective("distillable", "static")
    assert found.objective("undistillable", "learning") == 0.5
    assert found.objective("control", "learning") == 0.9
    static = dataclasses.replace(found, gap_learning=None, gap_per_byte_learning=None)
    assert not any("learning" in name for name in static.metrics())
    with pytest.raises(ValueError, match="do not learn"):
        static.objective("distillable", "learning")
    assert CalibrationConfig().judged_by == "static"
    assert CalibrationConfig(proxy="learning").judged_by == "learning"
    assert CalibrationConfig(proxy="learning", best_by="static").judged_by == "static"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proxy": "trained"}, "proxy must be one of"),
        ({"proxy_every": 0}, "proxy_every must be at least 1"),
        ({"proxy_steps": 0}, "proxy_steps must be at least 1"),
        ({"proxy_rollouts": "wrong"}, "proxy_rollouts must be one of"),
        ({"best_by": "gap"}, "best_by must be one of"),
        ({"best_by": "learning"}, "needs proxy='learning'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**settings)


def test_weights_of_8_bits_cannot_learn():
    proxy = make_model("proxy")
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.int8), proxy.params)
    with pytest.raises(ValueError, match=r"weights of \['int8'\]"):
        Learner.make(Proxy("proxy", dataclasses.replace(proxy, params=frozen), "raw"), LEARNING)


def test_a_mesh_needs_axes(mesh_cube):
    with pytest.raises(ValueError, match="give axes"):
        make_proxy_step(make_model("proxy", mesh_cube).module, optax.sgd(1.0))
