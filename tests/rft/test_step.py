"""The step: against a loss written out in full, accumulation, sharding, donation, traces, skipped updates."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.mesh import place_batch
from distill_jax.models.adapter import AdapterConfig, adapter_axes, init_adapter
from distill_jax.models.decoder import Decoder, apply, init_params, param_axes, unembed
from distill_jax.models.spec import ModelSpec
from distill_jax.rft.losses import KLAnchor
from distill_jax.rft.step import RftBatch, RftConfig, init_rft_state, make_rft_step, rft_gradients
from distill_jax.sequences import pack_sequences

SPEC = ModelSpec("llama", vocab_size=32, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
ADAPTER = AdapterConfig(rank=4, alpha=8.0)
CONFIG = RftConfig(num_samples=4, kl=KLAnchor("k1", "reward", 0.1), logit_chunk=4)
ROWS, PROMPT, COMPLETION = 8, 5, 6


@functools.cache
def setting(mesh=None):
    """(module, params, adapter with a non-zero product)."""
    module = Decoder(SPEC, mesh)
    params = init_params(module, jax.random.key(0))
    adapter = init_adapter(module, ADAPTER, jax.random.key(1))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, adapter)

    @functools.partial(jax.jit, out_shardings=shardings)
    def disturb(adapter):
        return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapter)

    adapter = disturb(adapter)
    return module, params, adapter


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, adapter, params, batch):
    return rft_gradients(Decoder(SPEC), config, adapter, params, batch, scale=2.0)


@functools.cache
def make_batch(rows=ROWS, credit="sequence"):
    """Uneven rollouts, log-probabilities near those of a policy, any advantages."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 32, rng.integers(1, PROMPT + 1)).tolist() for _ in range(rows)]
    completions = [
        rng.integers(0, 32, length).tolist() for length in ([1, 6, 3, 4, 6, 2, 5, 6] * rows)[:rows]
    ]
    shape = (rows, COMPLETION)
    advantages = rng.normal(size=rows if credit == "sequence" else shape)
    lp_old = np.log(1 / 32) + 0.3 * rng.normal(size=shape)
    lp_reference = lp_old + 0.2 * rng.normal(size=shape)
    arrays = (jnp.asarray(x, jnp.float32) for x in (advantages, lp_reference, lp_old))
    sequences = jax.tree.map(jnp.asarray, pack_sequences(prompts, completions, PROMPT, COMPLETION))
    return RftBatch(sequences, *arrays)


def contiguous_token_scores(module, params, adapter, sequences):
    """f32[B, T] log p of completion tokens, rows packed without the gap; no code shared with scoring."""
    size = sequences.tokens.shape[1]
    start = sequences.prompt_length[:, None]
    slot = jnp.arange(size)[None, :]
    source = jnp.where(slot < start, slot, jnp.minimum(slot - start + PROMPT, size - 1))
    ids = jnp.take_along_axis(sequences.tokens, source, axis=1)
    valid = slot < start + sequences.completion_length[:, None]
    positions = jnp.broadcast_to(slot, ids.shape)
    hidden, _ = apply(module, params, ids, positions, valid, adapter=adapter, scale=2.0)
    lp = jax.nn.log_softmax(unembed(module, params, hidden, adapter=adapter, scale=2.0))
    lp = jnp.take_along_axis(lp[:, :-1], ids[:, 1:, None], axis=2)[:, :, 0]
    token = jnp.minimum(start - 1 + jnp.arange(COMPLETION)[None, :], size - 2)
    return jnp.take_along_axis(lp, token, axis=1)


@pytest.mark.parametrize("credit", ["sequence", "span"])
def test_gradient_is_that_of_the_loss_written_out(credit):
    """GRPO with k1 in the reward: -mean_i mean_t min(r A', clip(r) A'), A' = A - .1 (lp_old - lp_reference)."""
    module, params, adapter = setting()
    batch = make_batch(credit=credit)

    def written_out(adapter):
        ratio = jnp.exp(contiguous_token_scores(module, params, adapter, batch.sequences) - batch.lp_old)
        advantage = batch.advantages[:, None] if credit == "sequence" else batch.advantages
        advantage = advantage - 0.1 * (batch.lp_old - batch.lp_reference)
        loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        mask = jnp.arange(COMPLETION)[None, :] < batch.sequences.completion_length[:, None]
        return (jnp.where(mask, loss, 0).sum(axis=1) / mask.sum(axis=1)).mean()

    expected_loss, expected = jax.jit(jax.value_and_grad(written_out))(adapter)
    gradient, metrics = gradients(CONFIG, adapter, params, batch)
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)


def test_metrics_by_hand():
    module, params, adapter = setting()
    batch = make_batch()
    _, metrics = gradients(CONFIG, adapter, params, batch)
    scores = jax.jit(contiguous_token_scores, static_argnums=0)(module, params, adapter, batch.sequences)
    mask = np.arange(COMPLETION)[None, :] < np.asarray(batch.sequences.completion_length)[:, None]
    lp, old, reference = (np.asarray(x)[mask] for x in (scores, batch.lp_old, batch.lp_reference))
    ratio = np.exp(lp - old)
    d = reference - lp
    expected = {
        "kl_k1": -d.mean(),
        "kl_k3": (np.exp(d) - 1 - d).mean(),
        "kl_clamped": 0.0,
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_fraction": ((ratio < 0.8) | (ratio > 1.2)).mean(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert 0 < float(metrics["entropy"]) <= np.log(32)


@pytest.mark.parametrize(
    ("algorithm", "kl", "pieces"),
    [
        ("grpo", KLAnchor("k1", "reward", 0.1), (2, 8)),
        ("dapo", KLAnchor("ratio_k3", "loss", 0.1), (4,)),
        ("dr_grpo", KLAnchor("k2", "loss", 0.1), (4,)),
        ("gspo", KLAnchor("k1", "reward", 0.1), (4,)),
        ("rloo", KLAnchor("k1", "reward", 0.0), (4,)),
    ],
)
def test_accumulation_is_exact(algorithm, kl, pieces):
    """One piece of 8 rows, 2 of 4, 4 of 2 or 8 of 1 give the same gradient, with rows of uneven lengths."""
    _, params, adapter = setting()
    limit = COMPLETION if algorithm == "dr_grpo" else None
    base = dataclasses.replace(CONFIG, algorithm=algorithm, max_tokens=limit, kl=kl)
    whole, metrics = gradients(base, adapter, params, make_batch())
    for micro_batches in pieces:
        config = dataclasses.replace(base, micro_batches=micro_batches)
        split, split_metrics = gradients(config, adapter, params, make_batch())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), split, whole)
        for name, value in metrics.items():
            np.testing.assert_allclose(split_metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_on_policy_batch_needs_no_old_scores():
    _, params, adapter = setting()
    batch = dataclasses.replace(make_batch(), lp_old=None)
    gradient, metrics = gradients(CONFIG, adapter, params, batch)
    assert float(metrics["ratio_mean"]) == float(metrics["ratio_max"]) == 1.0
    assert float(metrics["clip_fraction"]) == 0.0
    assert float(optax.tree.norm(gradient)) > 1e-3


def test_step_trains_the_adapter_alone_and_donates_its_state():
    module, params, adapter = setting()
    before = jax.tree.map(np.asarray, params)
    optimizer = optax.adam(1e-2)
    step = make_rft_step(module, CONFIG, optimizer, scale=2.0)
    state = init_rft_state(adapter, optimizer)
    new, metrics = step(state, params, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((adapter, params)))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.trainable, adapter)
    assert min(jax.tree.leaves(moved)) > 0
    assert int(new.step) == 1 and int(new.skipped) == 0
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_one_trace_for_all_steps():
    module, params, adapter = setting()
    optimizer = optax.adam(1e-2)
    step = make_rft_step(module, CONFIG, optimizer)
    state = init_rft_state(adapter, optimizer)
    for _ in range(3):
        state, _ = step(state, params, make_batch())
    assert step._cache_size() == 1


def test_ascending_the_surrogate_raises_the_favoured_rows():
    module, params, adapter = setting()
    optimizer = optax.sgd(0.5)
    config = dataclasses.replace(CONFIG, kl=KLAnchor(coefficient=0.0))
    step = make_rft_step(module, config, optimizer, scale=2.0)
    batch = dataclasses.replace(make_batch(), lp_old=None, advantages=jnp.array([1.0, -1.0] * 4))

    mask = jnp.arange(COMPLETION)[None, :] < batch.sequences.completion_length[:, None]

    @jax.jit
    def surrogate(adapter):
        lp = contiguous_token_scores(module, params, adapter, batch.sequences)
        return ((jnp.where(mask, lp, 0).sum(axis=1) / mask.sum(axis=1)) * batch.advantages).mean()

    state, _ = step(init_rft_state(adapter, optimizer), params, batch)
    assert float(surrogate(state.trainable)) > float(surrogate(adapter)) + 1e-3


def test_non_finite_update_is_skipped_and_counted():
    module, params, adapter = setting()
    optimizer = optax.adam(1e-2)
    step = make_rft_step(module, CONFIG, optimizer)
    good, bad = make_batch(), dataclasses.replace(make_batch(), advantages=jnp.full(ROWS, jnp.nan))
    state, _ = step(init_rft_state(adapter, optimizer), params, good)
    kept = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    state, metrics = step(state, params, bad)
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), kept)
    assert int(state.step) == 2 and int(state.skipped) == 1 and float(metrics["skipped_steps"]) == 1
    state, metrics = step(state, params, good)
    assert np.isfinite(float(metrics["grad_norm"])) and int(state.skipped) == 1


def test_all_parameters_can_be_trained():
    module, params, _ = setting()
    optimizer = optax.sgd(0.1)
    step = make_rft_step(module, CONFIG, optimizer, trainable="params")
    state, metrics = step(init_rft_state(params, optimizer), None, make_batch())
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.trainable, params)
    assert min(jax.tree.leaves(moved)) > 0 and float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("trainable", ["adapter", "params"])
def test_sharded_is_unsharded(mesh_cube, mesh_single, trainable):
    """data=2, fsdp=2, tensor=2 with two micro-batches against one device: state and metrics after two steps."""
    optimizer = optax.adam(1e-2, eps=1e-3)
    config = dataclasses.replace(CONFIG, micro_batches=2)
    results = []
    for mesh in (mesh_cube, mesh_single):
        module, params, adapter = setting(mesh)
        axes = adapter_axes(module, ADAPTER) if trainable == "adapter" else param_axes(module)
        step = make_rft_step(module, config, optimizer, trainable=trainable, axes=axes)
        state = init_rft_state(adapter if trainable == "adapter" else params, optimizer)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state.trainable)
        for _ in range(2):
            state, metrics = step(state, params, place_batch(make_batch(), mesh))
        jax.tree.map(
            lambda leaf, s: None if leaf.sharding.is_equivalent_to(s, leaf.ndim) else 1 / 0,
            state.trainable,
            placed,
        )
        assert step._cache_size() <= 2, "the state moved between steps"
        results.append(jax.tree.map(np.asarray, (state, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RftConfig(algorithm="ppg"), "algorithm must be one of"),
        (lambda: RftConfig(num_samples=1), "num_samples must be at least 2"),
        (lambda: RftConfig(clip_low=1.5), "clip_low"),
        (lambda: RftConfig(micro_batches=0), "micro_batches"),
        (lambda: RftConfig(temperature=0.0), "temperature"),
        (lambda: RftConfig(algorithm="dr_grpo"), "max_tokens"),
        (lambda: RftConfig(max_tokens=5), "max_tokens"),
        (lambda: make_rft_step(Decoder(SPEC), CONFIG, optax.sgd(1), trainable="head"), "trainable must be"),
        (lambda: make_rft_step(Decoder(SPEC), CONFIG, optax.sgd(1), trainable="params", scale=2.0), "scale"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 3}, "whole groups of num_samples=3"),
        ({"micro_batches": 3}, "divide into micro_batches=3"),
    ],
)
def test_batch_that_does_not_divide(change, message):
    module, params, adapter = setting()
    with pytest.raises(ValueError, match=message):
        rft_gradients(module, dataclasses.replace(CONFIG, **change), adapter, params, make_batch())


def test_mesh_needs_axes(mesh_cube):
    with pytest.raises(ValueError, match="give axes"):
        make_rft_step(Decoder(SPEC, mesh_cube), CONFIG, optax.sgd(1))
