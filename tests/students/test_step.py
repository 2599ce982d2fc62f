"""The student step: its loss against numpy, what it trains, donation, traces, replicas, skipped updates, sharding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.mesh import place_batch
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, apply, init_params, unembed
from distill_jax.models.spec import ModelSpec
from distill_jax.sequences import pack_sequences
from distill_jax.students.step import cross_entropy, init_student_state, make_student_step
from distill_jax.students.train import stack_replicas

SPEC = ModelSpec("llama", vocab_size=32, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
MODULE = Decoder(SPEC)
ADAPTER = AdapterConfig(rank=2, alpha=4.0)
ROWS, PROMPT, COMPLETION = 4, 4, 5


@functools.cache
def params(seed=0, mesh=None):
    return init_params(Decoder(SPEC, mesh), jax.random.key(seed))


def texts(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 32, rng.integers(1, PROMPT + 1)).tolist() for _ in range(rows)]
    completions = [rng.integers(0, 32, length).tolist() for length in ([1, 5, 3, 4] * rows)[:rows]]
    return prompts, completions


def make_batch(seed=0, pad_id=0, rows=ROWS):
    return pack_sequences(*texts(seed, rows), PROMPT, COMPLETION, pad_id)


@jax.jit
def full_logits(params, ids):
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    hidden, _ = apply(MODULE, params, ids, positions, jnp.ones(ids.shape, bool))
    return unembed(MODULE, params, hidden)


def numpy_loss(params, prompts, completions):
    """(sum, count) of -log softmax(logits)[token], one row at a time without any padding between its parts."""
    total, count = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        row = [*prompt, *completion]
        ids = np.zeros(
            (1, PROMPT + COMPLETION), np.int32
        )  # one shape; causal, so what follows the row is not seen
        ids[0, : len(row)] = row
        logits = np.asarray(full_logits(params, ids))[0].astype(np.float64)
        for place, token in enumerate(completion, start=len(prompt)):
            line = logits[place - 1]
            total -= line[token] - line.max() - np.log(np.exp(line - line.max()).sum())
            count += 1
    return total, count


def jitted_loss(batch, **options):
    return jax.jit(functools.partial(cross_entropy, MODULE, chunk=2, **options))(params(), batch)


def differences(first, second):
    return [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)]


def test_loss_is_that_of_a_full_log_softmax():
    total, count = jitted_loss(make_batch())
    expected, tokens = numpy_loss(params(), *texts())
    assert float(count) == tokens == 13
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_loss_is_over_completion_tokens_alone():
    """Tokens of a prompt are conditions, not targets: an empty completion adds nothing, whatever its prompt is."""
    prompts, completions = texts()
    longer = pack_sequences([*prompts, [1, 2, 3]], [*completions, []], PROMPT, COMPLETION)
    np.testing.assert_allclose(jitted_loss(longer), jitted_loss(make_batch()), rtol=1e-6)


def test_padding_is_harmless():
    """Neither what lies in unused slots nor how many there are changes loss or gradient."""

    @jax.jit
    def value_and_gradient(batch):
        return jax.value_and_grad(lambda tree: cross_entropy(MODULE, tree, batch)[0])(params())

    value, gradient = value_and_gradient(make_batch())
    for other in (make_batch(pad_id=31), pack_sequences(*texts(), PROMPT + 2, COMPLETION + 3, pad_id=7)):
        again, other_gradient = value_and_gradient(other)
        np.testing.assert_allclose(again, value, rtol=1e-5)
        assert max(differences(gradient, other_gradient)) < 1e-5


def test_step_reports_the_mean_and_moves_every_weight():
    optimizer = optax.sgd(0.1)
    step = make_student_step(MODULE, optimizer, logit_chunk=2)
    state, metrics = step(init_student_state(params(), optimizer), None, make_batch())
    expected, tokens = numpy_loss(params(), *texts())
    assert set(metrics) == {"loss", "grad_norm", "tokens", "skipped_steps"}
    np.testing.assert_allclose(metrics["loss"], expected / tokens, rtol=1e-5)
    assert float(metrics["tokens"]) == tokens and float(metrics["skipped_steps"]) == 0
    assert int(state.step) == 1 and float(metrics["grad_norm"]) > 0
    assert min(differences(state.trainable, params())) > 0
    after, _ = numpy_loss(state.trainable, *texts())
    assert after < expected


def counting_optimizer():
    """SGD with momentum that counts how often it is traced."""
    inner, traces = optax.sgd(0.1, momentum=0.9), []

    def update(updates, state, tree=None):
        traces.append(1)
        return inner.update(updates, state, tree)

    return optax.GradientTransformation(inner.init, update), traces


def test_one_trace_for_all_batches_and_rates():
    optimizer, traces = counting_optimizer()
    step = make_student_step(MODULE, optimizer)
    state = init_student_state(params(), optimizer)
    for index in range(3):
        state, _ = step(state, None, make_batch(index), 0.5**index)
    assert len(traces) == 1 and int(state.step) == 3


def test_state_is_donated_and_the_start_is_not():
    optimizer = optax.adam(1e-2)
    step = make_student_step(MODULE, optimizer)
    state = init_student_state(params(), optimizer)
    step(state, None, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params()))


def test_non_finite_step_changes_nothing_but_the_counters():
    optimizer = optax.adam(1e-2)
    step = make_student_step(MODULE, optimizer)
    state, _ = step(init_student_state(params(), optimizer), None, make_batch())
    # A weight that is infinite makes the loss NaN; the rest of the state is as ordinary training left it.
    broken = jax.tree.map(jnp.array, state.trainable)
    broken["final_norm"]["scale"] = jnp.full_like(broken["final_norm"]["scale"], jnp.inf)
    state = dataclasses.replace(state, trainable=broken)
    before = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    state, metrics = step(state, None, make_batch())
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), before)
    assert not np.isfinite(float(metrics["loss"]))
    assert int(state.step) == 2 and int(state.skipped) == 1 and float(metrics["skipped_steps"]) == 1


def test_replicas_are_separate_steps():
    """Three students with weights and batches of their own, two steps, against one at a time."""
    optimizer = optax.adam(1e-2, eps=1e-3)
    together = make_student_step(MODULE, optimizer, replicas=3)
    alone = make_student_step(MODULE, optimizer)
    state = init_student_state(stack_replicas([params(seed) for seed in range(3)]), optimizer, 3)
    singles = [init_student_state(params(seed), optimizer) for seed in range(3)]
    for index in range(2):
        batches = [make_batch(10 * index + seed) for seed in range(3)]
        state, metrics = together(state, None, jax.tree.map(lambda *leaves: np.stack(leaves), *batches), 0.5)
        pairs = [alone(single, None, batch, 0.5) for single, batch in zip(singles, batches, strict=True)]
        singles = [single for single, _ in pairs]
        for seed, (_, single) in enumerate(pairs):
            for name, value in single.items():
                np.testing.assert_allclose(metrics[name][seed], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert metrics["loss"].shape == (3,)
    for seed, single in enumerate(singles):
        replica = jax.tree.map(lambda leaf, r=seed: leaf[r], state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), replica, single)


def test_a_broken_replica_does_not_stop_the_others():
    optimizer = optax.sgd(0.1)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params())
    state = init_student_state(stack_replicas([params(), broken]), optimizer, 2)
    batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), make_batch())
    state, metrics = make_student_step(MODULE, optimizer, replicas=2)(state, None, batch)
    assert state.skipped.tolist() == metrics["skipped_steps"].tolist() == [0, 1]
    assert min(differences(jax.tree.map(lambda leaf: leaf[0], state.trainable), params())) > 0


def test_adapter_is_trained_on_a_base_that_stays():
    optimizer = optax.sgd(0.1)
    adapter = init_adapter(MODULE, ADAPTER, jax.random.key(1))
    before = jax.tree.map(np.asarray, params())
    step = make_student_step(MODULE, optimizer, trainable="adapter", scale=2.0)
    state = init_student_state(adapter, optimizer)
    losses = []
    for _ in range(3):
        state, metrics = step(state, params(), make_batch())
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, params(), before)
    assert jax.tree.structure(state.trainable) == jax.tree.structure(adapter)
    assert min(differences(state.trainable, adapter)) > 0 and losses[0] > losses[1] > losses[2]
    expected, tokens = numpy_loss(params(), *texts())  # a new adapter changes nothing
    np.testing.assert_allclose(losses[0], expected / tokens, rtol=1e-5)
    total, count = jax.jit(functools.partial(cross_entropy, MODULE))(
        params(), make_batch(), adapter=state.trainable, scale=2.0
    )
    assert float(total / count) < losses[2]


def test_replicas_of_an_adapter_share_the_base():
    optimizer = optax.sgd(0.1)
    adapters = [init_adapter(MODULE, ADAPTER, jax.random.key(seed)) for seed in range(2)]
    step = make_student_step(MODULE, optimizer, trainable="adapter", replicas=2)
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), make_batch(0), make_batch(1))
    state, metrics = step(init_student_state(stack_replicas(adapters), optimizer, 2), params(), batch)
    assert metrics["loss"].shape == (2,) and state.skipped.tolist() == [0, 0]
    assert min(differences(state.trainable, stack_replicas(adapters))) == 0  # "a" waits for "b" to leave zero
    assert max(differences(state.trainable, stack_replicas(adapters))) > 0


@pytest.mark.parametrize("rate", [0.0, 0.25, 2.0])
def test_learning_rate_scales_the_update(rate):
    optimizer = optax.sgd(0.1)
    step = make_student_step(MODULE, optimizer)
    full, _ = step(init_student_state(params(), optimizer), None, make_batch())
    scaled, _ = step(init_student_state(params(), optimizer), None, make_batch(), rate)
    jax.tree.map(
        lambda start, one, got: np.testing.assert_allclose(
            got, start + rate * (one - start), rtol=1e-5, atol=1e-6
        ),
        params(),
        full.trainable,
        scaled.trainable,
    )


def test_sharded_is_unsharded(mesh_cube, mesh_single):
    """data=2, fsdp=2, tensor=2 against one device: replicas, two steps, state and metrics."""
    optimizer = optax.adam(1e-2, eps=1e-3)
    results = []
    for mesh in (mesh_cube, mesh_single):
        step = make_student_step(Decoder(SPEC, mesh), optimizer, replicas=2)
        start = stack_replicas([params(seed, mesh) for seed in range(2)])
        state = init_student_state(start, optimizer, 2)
        for index in range(2):
            batches = [make_batch(10 * index + seed, rows=8) for seed in range(2)]
            batch = place_batch(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), mesh, axis=1)
            state, metrics = step(state, None, batch)
        results.append(jax.tree.map(np.asarray, (state, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": "head"}, "trainable must be 'params' or 'adapter', got 'head'"),
        ({"replicas": -1}, "replicas must be at least 0, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_student_step(MODULE, optax.sgd(1.0), **options)
