"""Schedules by hand, and what the two optimizers do to single matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.optimizer import OptimizerConfig, decay_start, make_optimizer, make_schedule, trapezoid

# Settings that make the first update easy to write down: no warm-up, constant rate, no clipping to speak of.
PLAIN = {"warmup_steps": 0, "final_fraction": 1.0, "clip": 1e9}


def first_update(config: OptimizerConfig, params: dict, grads: dict, total_steps: int | None = None) -> dict:
    optimizer = make_optimizer(config, total_steps)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_trapezoid_by_hand() -> None:
    config = OptimizerConfig(learning_rate=8.0, warmup_steps=3, final_fraction=0.5)
    # 20 steps: three of warm-up to 8 (quarters), constant, and over the last 4 linearly from 8 towards 4.
    rates = [trapezoid(config, step, 20) for step in range(20)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]
    assert set(rates[3:17]) == {8.0}
    assert rates[16:] == [8.0, 7.0, 6.0, 5.0]
    assert decay_start(20) == 16
    assert trapezoid(config, 20, 20) == 4.0


def test_a_run_shorter_than_its_warm_up() -> None:
    config = OptimizerConfig(learning_rate=8.0, warmup_steps=20, final_fraction=0.0)
    # Warm-up of 4 // 2 = 2 steps (thirds), decay over the last step alone.
    assert [trapezoid(config, step, 4) for step in range(5)] == pytest.approx([8 / 3, 16 / 3, 8, 8, 0])


def test_two_budgets_are_one_trunk_until_the_shorter_decays() -> None:
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=5, final_fraction=0.1)
    short, long = ([trapezoid(config, step, total) for step in range(30)] for total in (30, 100))
    start = decay_start(30)
    assert start == 24
    assert short[: start + 1] == long[: start + 1]
    assert all(a < b for a, b in zip(short[start + 1 :], long[start + 1 :], strict=True))


def test_cosine_schedule_by_hand() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.5), 12)
    # Linear 0 -> 2 over 4 steps; then 1 + (2 - 1) * (1 + cos(pi * x)) / 2 over 8.
    np.testing.assert_allclose([schedule(s) for s in (0, 2, 4, 8, 12, 50)], [0, 1, 2, 1.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize(("warmup", "expected"), [(2, [0, 1, 2, 2, 2]), (0, [2, 2, 2, 2, 2])])
def test_fraction_one_is_constant_after_the_warm_up(warmup: int, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=warmup, final_fraction=1.0)
    np.testing.assert_allclose([make_schedule(config, 10)(s) for s in (0, 1, 2, 5, 20)], expected, atol=1e-6)


def test_first_step_of_adam_is_the_sign_of_the_gradient_and_decay_is_decoupled() -> None:
    params, grads = {"w": jnp.array([2.0, -4.0])}, {"w": jnp.array([0.3, -0.001])}
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, **PLAIN)
    np.testing.assert_allclose(first_update(config, params, grads, 10)["w"], [-0.2, 0.3], rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_total_steps_the_rate_is_one(name: str) -> None:
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "scale": jnp.ones(3)}
    grads = jax.tree.map(jnp.sin, params)
    config = OptimizerConfig(name, learning_rate=0.01, weight_decay=0.1, **PLAIN)
    one, scheduled = first_update(config, params, grads), first_update(config, params, grads, 10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(0.01 * a, b, rtol=1e-5), one, scheduled)
    np.testing.assert_allclose(first_update(config, params, grads)["scale"][0], one["scale"][0])
    if name == "adamw":
        np.testing.assert_allclose(one["scale"], -np.ones(3) - 0.1, rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    """Adam forgets a factor common to all steps, so the norm shows in the second moment: ((1 - b2) * g^2)."""
    config = OptimizerConfig(b2=0.9, clip=1.0)
    params, grads = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    optimizer = make_optimizer(config, 10)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree_utils.tree_get(state, "nu")
    np.testing.assert_allclose([moments["a"][0], moments["b"][0]], [0.1 * 0.36, 0.1 * 0.64], rtol=1e-5)


def stacked(seed: int) -> dict:
    """Two layers with attention's q and o (N = 3, H = 2, D = 4) and a norm."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "layers": {
            "attn": {
                "q": {"kernel": jax.random.normal(keys[0], (2, 4, 3, 2))},
                "o": {"kernel": jax.random.normal(keys[1], (2, 3, 2, 4))},
            },
            "attn_norm": {"scale": jax.random.normal(keys[2], (2, 4))},
        }
    }


def test_muon_treats_every_layer_by_itself() -> None:
    config = OptimizerConfig("muon", learning_rate=1.0, **PLAIN)
    params, grads = stacked(0), stacked(1)
    other = jax.tree.map(lambda x: x.at[1].set(7 * jnp.cos(x[1])), grads)
    a, b = (first_update(config, params, g) for g in (grads, other))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x[0], y[0], rtol=1e-4, atol=1e-6)
        assert np.abs(x[1] - y[1]).max() > 0.01


@pytest.mark.parametrize(("name", "matrix"), [("q", (4, 6)), ("o", (6, 4))])
def test_muon_orthogonalises_inputs_by_outputs(name: str, matrix: tuple[int, int]) -> None:
    """The oracle is the polar factor U V^T; five Newton-Schulz steps bring singular values near 1, not to it."""
    grads = stacked(1)
    updates = first_update(OptimizerConfig("muon", learning_rate=1.0, **PLAIN), stacked(0), grads)
    for layer in range(2):
        update = np.asarray(updates["layers"]["attn"][name]["kernel"][layer]).reshape(matrix)
        u, before, vt = np.linalg.svd(
            np.asarray(grads["layers"]["attn"][name]["kernel"][layer]).reshape(matrix), full_matrices=False
        )
        after = np.linalg.svd(update, compute_uv=False)
        assert before.max() / before.min() > 2 > after.max() / after.min()
        polar = -u @ vt
        cosine = np.sum(polar * update) / np.linalg.norm(polar) / np.linalg.norm(update)
        assert cosine > 0.96


def test_muon_leaves_vectors_to_adam() -> None:
    grads = stacked(1)
    updates = first_update(OptimizerConfig("muon", learning_rate=1.0, **PLAIN), stacked(0), grads)
    scale, grad = (tree["layers"]["attn_norm"]["scale"] for tree in (updates, grads))
    # Adam with Nesterov momentum looks one step ahead: 0.9 * 0.1 / (1 - 0.9^2) + 0.1 / (1 - 0.9) of the sign.
    np.testing.assert_allclose(scale, -(9 / 19 + 1) * np.sign(grad), rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sgd"}, r"optimizer 'sgd' is not one of \('adamw', 'muon'\)"),
        ({"learning_rate": 0.0}, "learning_rate and clip must be positive, got 0.0"),
        ({"clip": -1.0}, "learning_rate and clip must be positive"),
        ({"warmup_steps": -1}, "out of range"),
        ({"final_fraction": 1.5}, "out of range"),
        ({"weight_decay": -0.1}, "out of range"),
        ({"b2": 1.0}, "out of range"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**arguments)
