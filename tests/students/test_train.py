"""The students' loop: its data order, budgets that branch off one trunk, and a resume that is exact to the bit."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.spec import ModelSpec
from distill_jax.optimizer import OptimizerConfig, decay_start
from distill_jax.sequences import pack_sequences
from distill_jax.students.train import Batches, StudentConfig, batch_rows, stack_replicas, train

SPEC = ModelSpec("llama", vocab_size=16, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16)
MODULE = Decoder(SPEC)
CONFIG = StudentConfig(
    batch_size=4, optimizer=OptimizerConfig("adamw", 0.02, warmup_steps=2), logit_chunk=4, checkpoint_every=2
)
BUDGETS = [5, 10]


class Killed(Exception):
    pass


def rows(count=6, seed=0, prompt_size=3):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 16, 2).tolist() for _ in range(count)]
    return pack_sequences(prompts, [rng.integers(0, 16, 4).tolist() for _ in prompts], prompt_size, 4)


@functools.cache
def start():
    return stack_replicas([init_params(MODULE, jax.random.key(seed)) for seed in range(2)])


def batches(batch_size=CONFIG.batch_size):
    return Batches([rows(6, 0), rows(7, 1)], batch_size, [0, 1], MODULE)


def run(budgets, *, on_budget=None, give=None, config=CONFIG, **options):
    """Trees on the host by budget."""
    trees = {}

    def keep(budget, tree):
        if on_budget is not None:
            on_budget(budget)
        trees[budget] = jax.tree.map(np.asarray, tree)

    train(MODULE, start(), give or batches(), config, budgets, keep, **options)
    return trees


@functools.cache
def finished():
    return run(BUDGETS)


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_each_pass_is_a_permutation():
    taken = np.concatenate([batch_rows(10, 4, seed=3, step=step) for step in range(5)])
    first, second = taken[:10].tolist(), taken[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_a_batch_depends_on_its_arguments_alone():
    in_order = [batch_rows(10, 4, 3, step).tolist() for step in range(6)]
    assert [batch_rows(10, 4, 3, step).tolist() for step in reversed(range(6))] == in_order[::-1]
    assert batch_rows(10, 4, 4, 0).tolist() != in_order[0]


def test_a_batch_may_be_larger_than_the_data():
    taken = batch_rows(3, 8, seed=0, step=0)
    assert np.bincount(taken).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert sorted(taken[:3]) == sorted(taken[3:6]) == [0, 1, 2]


def test_batches_are_each_replicas_own_rows():
    data = [rows(6, 0), rows(7, 1)]
    batch = Batches(data, 4, [0, 1], MODULE)(2)
    assert batch.tokens.shape == (2, 4, 7) and batch.prompt_size == 3
    for replica, own in enumerate(data):
        expected = own.tokens[batch_rows(len(own.tokens), 4, replica, 2)]
        np.testing.assert_array_equal(batch.tokens[replica], expected)


def test_a_budget_is_a_whole_run_of_its_own():
    """The branches off one trunk are, bit for bit, what runs of those budgets alone give."""
    together = finished()
    assert list(together) == BUDGETS
    for budget in BUDGETS:
        assert_equal(run([budget])[budget], together[budget])
    leaves = [jax.tree.leaves(together[budget])[0] for budget in BUDGETS]
    assert not np.array_equal(*leaves)


def test_replicas_differ_and_learn():
    tree = finished()[10]
    assert not any(np.array_equal(leaf[0], leaf[1]) for leaf in jax.tree.leaves(tree) if leaf.ndim > 2)


def metrics_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_written(tmp_path):
    run([3, 25], directory=tmp_path)
    written = metrics_rows(tmp_path)
    assert [row["step"] for row in written] == [decay_start(3) + 1, 20, decay_start(25) + 1]
    assert set(written[1]) == {"step", "loss", "grad_norm", "tokens", "skipped_steps"}
    assert set(written[0]) == {"step"} | {f"budget3/{name}" for name in written[1] if name != "step"}
    assert written[2]["budget25/loss"] < written[0]["budget3/loss"]


# Batches in the order asked for: trunk 0..3, branch of 5 steps: 4, trunk 4..7, branch of 10 steps: 8, 9.
@pytest.mark.parametrize(
    ("batch", "budget", "again"),
    [
        (1, None, [5, 10]),  # before the first checkpoint
        (7, None, [10]),  # in the trunk; the first budget stands
        (10, None, [10]),  # in the last branch
        (None, 5, [5, 10]),  # while a tree is handed over, at the step of a checkpoint
        (None, 10, [10]),
    ],
)
def test_killed_run_ends_as_if_it_had_not_been(tmp_path, batch, budget, again):
    ordinary, asked = batches(), []

    def give(step):
        asked.append(step)
        if len(asked) - 1 == batch:
            raise Killed
        return ordinary(step)

    def on_budget(done):
        if done == budget:
            raise Killed

    with pytest.raises(Killed):
        run(BUDGETS, directory=tmp_path, give=give, on_budget=on_budget)
    second = run(BUDGETS, directory=tmp_path)
    assert list(second) == again
    for budget, tree in second.items():
        assert_equal(tree, finished()[budget])
    names = [name for row in metrics_rows(tmp_path) for name in row if name.endswith("/loss")]
    assert names == ["budget5/loss", "budget10/loss"]  # no row twice, none lost


def test_a_failing_checkpoint_does_not_hide_what_came_first(tmp_path, monkeypatch):
    """A kill stays the error that is seen, when closing the checkpoints fails as well; the failure is a note on it."""

    def close(self):
        raise OSError("no room left")

    def give(step):
        raise Killed

    monkeypatch.setattr("distill_jax.checkpoint.Checkpointer.close", close)
    with pytest.raises(Killed) as caught:
        run(BUDGETS, directory=tmp_path, give=give)
    assert caught.value.__notes__ == ["no room left"]


def test_adapters_are_trained_on_one_base():
    adapter = AdapterConfig(rank=2, alpha=4.0)
    config = StudentConfig(
        batch_size=4, optimizer=CONFIG.optimizer, trainable="adapter", adapter=adapter, logit_chunk=4
    )
    base = init_params(MODULE, jax.random.key(0))
    adapters = stack_replicas([init_adapter(MODULE, adapter, jax.random.key(seed)) for seed in range(2)])
    got = {}
    train(MODULE, adapters, batches(), config, [3], got.__setitem__, base=base)
    assert jax.tree.structure(got[3]) == jax.tree.structure(adapters)
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != np.asarray(b)), got[3], adapters)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("budgets", [[], [10, 5], [5, 5], [0, 5]])
def test_budgets_must_ascend(budgets):
    with pytest.raises(ValueError, match="budgets must be ascending numbers of steps, got"):
        run(budgets)


def test_base_and_trainable_must_agree():
    with pytest.raises(ValueError, match="trainable='params': base weights are for adapters"):
        run([1], base=start())
    with pytest.raises(ValueError, match=r"trainable='adapter': .* adapters need them"):
        run([1], config=StudentConfig(trainable="adapter"))


@pytest.mark.parametrize(
    ("data", "seeds", "message"),
    [
        ([], [], "expected one seed a replica, got 0 data sets"),
        ([rows()], [0, 1], "got 1 data sets and 2 seeds"),
        ([rows(), rows(prompt_size=5)], [0, 1], "different layouts or vocabularies"),
        ([rows(), rows(0)], [0, 1], "a replica has no training rows"),
    ],
)
def test_bad_data(data, seeds, message):
    with pytest.raises(ValueError, match=message):
        Batches(data, 4, seeds, MODULE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "student settings out of range"),
        ({"checkpoint_every": -1}, "student settings out of range"),
        ({"logit_chunk": 0}, "student settings out of range"),
        ({"trainable": "head"}, "must be 'params' or 'adapter', got 'head'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        StudentConfig(**settings)
