"""Distillation in sequences and in the step: chunks against full logits, memory, teachers, replicas, sharding."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.mesh import place_batch
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, apply, init_params, unembed
from distill_jax.models.spec import ModelSpec
from distill_jax.optimizer import OptimizerConfig
from distill_jax.sequences import Sequences, pack_sequences
from distill_jax.students.divergence_config import Divergence, StudentLoss
from distill_jax.students.divergences import sequence_divergence, token_divergence
from distill_jax.students.step import cross_entropy, init_student_state, make_student_step
from distill_jax.students.targets import Teacher, make_targets
from distill_jax.students.train import Batches, StudentConfig, stack_replicas, train

SPEC = ModelSpec("llama", vocab_size=32, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
WIDER = dataclasses.replace(SPEC, d_model=24, n_heads=3, n_kv_heads=1, tie_embeddings=False)
STUDENT, TEACHER = Decoder(SPEC), Decoder(WIDER)
ADAPTER = AdapterConfig(rank=2, alpha=4.0)
HASH = "a" * 64
FORWARD = Divergence()
TOP = Divergence("reverse_kl", support="teacher_topk", top_k=4, temperature=2.0)


@functools.cache
def params(module=STUDENT, seed=0):
    return init_params(module, jax.random.key(seed))


def some_adapter(module, seed=0):
    adapter = init_adapter(module, ADAPTER, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1, adapter)  # b is zero in a new one


@functools.cache
def teacher():
    return Teacher(TEACHER, params(TEACHER, 1), some_adapter(TEACHER), 0.5, HASH)


def make_batch(seed=0, rows=4, size=5, pad_id=0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 32, rng.integers(1, 5)).tolist() for _ in range(rows)]
    completions = [rng.integers(0, 32, n).tolist() for n in ([0, 5, 3, 4] * rows)[:rows]]
    batch = pack_sequences(prompts, completions, 4, size, pad_id)
    return dataclasses.replace(batch, vocabulary_hash=HASH)


def full_sum(student_params, batch, given, config):
    """The sum over completion tokens from logits [B, P+T, V] in one piece."""
    batch = jax.tree.map(jnp.asarray, batch)

    def logits(module, params, **low_rank):
        hidden, _ = apply(module, params, batch.tokens, batch.positions(), batch.valid(), **low_rank)
        slots = jnp.arange(batch.completion_size)[None, :] + batch.prompt_size - 1
        slots = slots.repeat(len(batch.tokens), 0).at[:, 0].set(batch.prompt_length - 1)
        return jnp.take_along_axis(unembed(module, params, hidden, **low_rank), slots[..., None], axis=1)

    theirs = logits(given.module, given.params, adapter=given.adapter, scale=given.scale)
    values = token_divergence(theirs, logits(STUDENT, student_params), config)
    return jnp.where(batch.completion_mask, values, 0.0).sum()


@pytest.mark.parametrize("config", [Divergence("jsd", beta=0.3, temperature=2.0), TOP])
def test_chunks_equal_full_logits_in_value_and_gradient(config):
    batch = make_batch()
    expected, expected_gradient = jax.jit(jax.value_and_grad(full_sum), static_argnums=3)(
        params(), batch, teacher(), config
    )
    assert expected > 1 and min(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_gradient)) > 0

    def loss(chunk, tree):
        return sequence_divergence(STUDENT, tree, batch, teacher(), config, chunk=chunk)

    for chunk in (2, 64):
        (value, count), gradient = jax.jit(jax.value_and_grad(functools.partial(loss, chunk), has_aux=True))(
            params()
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert float(count) == 12
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected_gradient
        )


def test_a_stored_teacher_is_the_teacher():
    batch = make_batch()
    targets = make_targets(teacher(), batch, 6, temperature=2.0, batch_size=3, chunk=2)

    @jax.jit
    def value_and_gradient(tree, given):
        return jax.value_and_grad(lambda t: sequence_divergence(STUDENT, t, batch, given, TOP, chunk=2)[0])(
            tree
        )

    got, expected = value_and_gradient(params(), targets), value_and_gradient(params(), teacher())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("config", [FORWARD, TOP, Divergence("jsd", beta=0.5, support="union", top_k=3)])
def test_a_student_that_is_the_teacher(config):
    """Also through its adapter: no loss, no gradient. The two forward passes of one program may differ in the last bit;
    of equal logits the divergence is exactly 0, see test_divergences."""
    batch, adapter = make_batch(), some_adapter(STUDENT)
    same = Teacher(STUDENT, params(), adapter, 0.5, HASH)

    @jax.jit
    def value_and_gradient(tree, given):
        def loss(tree):
            return sequence_divergence(
                STUDENT, params(), batch, given, config, adapter=tree, scale=0.5, chunk=2
            )[0]

        return jax.value_and_grad(loss)(tree)

    value, gradient = value_and_gradient(adapter, same)
    assert abs(float(value)) < 1e-6
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5


def test_padding_may_hold_anything():
    run = jax.jit(lambda t, b: sequence_divergence(STUDENT, t, b, teacher(), FORWARD, chunk=2)[0])
    value, gradient = jax.value_and_grad(run)(params(), make_batch())
    for other in (make_batch(pad_id=2**30), make_batch(size=8, pad_id=-1)):
        again, other_gradient = jax.value_and_grad(run)(params(), other)
        np.testing.assert_allclose(again, value, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other_gradient, gradient
        )


def test_rows_of_padding_in_one_embedding_do_not_count():
    """One vocabulary, two padded sizes: as if the teacher's further rows could not be produced."""
    padded = Decoder(dataclasses.replace(WIDER, vocab_size=40))
    further = Teacher(padded, params(padded, 2), vocabulary_hash=HASH)
    head = further.params["head"]["kernel"]
    embedding = further.params["embed"]["embedding"]
    cut = {**further.params, "head": {"kernel": head[:, :32]}, "embed": {"embedding": embedding[:32]}}
    same = Teacher(TEACHER, cut, vocabulary_hash=HASH)
    batch = make_batch()
    values = [
        float(sequence_divergence(STUDENT, params(), batch, given, FORWARD)[0]) for given in (further, same)
    ]
    np.testing.assert_allclose(*values, rtol=1e-5)
    targets = [make_targets(given, batch, 4, temperature=2.0, vocab_size=32) for given in (further, same)]
    mask = np.asarray(batch.completion_mask)
    np.testing.assert_allclose(targets[0].lp[mask], targets[1].lp[mask], rtol=1e-5, atol=1e-5)
    too_many = make_targets(further, batch, 4, temperature=2.0)
    with pytest.raises(ValueError, match="normalised over 40 ids, the student's logits have 32"):
        sequence_divergence(STUDENT, params(), batch, too_many, TOP)


def test_gradient_memory_is_far_below_one_array_of_logits():
    spec = dataclasses.replace(SPEC, vocab_size=16384)
    module = Decoder(spec)
    tree = init_params(module, jax.random.key(0))
    rows, prompt, completion = 4, 8, 64
    full = jax.ShapeDtypeStruct((rows,), jnp.int32)
    batch = Sequences(jax.ShapeDtypeStruct((rows, prompt + completion), jnp.int32), full, full, prompt)
    logits_bytes = rows * completion * spec.vocab_size * 4

    def loss(tree, given, batch, config):
        return sequence_divergence(module, tree, batch, Teacher(module, given), config, chunk=2)[0]

    for config in (FORWARD, Divergence(support="union", top_k=8)):
        compiled = jax.jit(jax.grad(loss), static_argnums=3).lower(tree, tree, batch, config).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 3


def test_other_vocabularies_and_shapes_are_refused():
    batch = make_batch()
    other = dataclasses.replace(batch, vocabulary_hash="b" * 64)
    for given in (teacher(), make_targets(teacher(), batch, 4, temperature=2.0)):
        with pytest.raises(
            ValueError, match=r"the vocabulary bbbb.* is aaaa.* need the cross-tokenizer losses"
        ):
            sequence_divergence(STUDENT, params(), other, given, TOP)
    with pytest.raises(ValueError, match=r"has \(4, 5\) completion tokens, the sequences \(3, 5\)"):
        sequence_divergence(STUDENT, params(), make_batch(rows=3), given, TOP)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        sequence_divergence(STUDENT, params(), batch, teacher(), FORWARD, chunk=0)


def test_the_step_mixes_both_parts():
    """Its loss and parts against the two losses alone, its update against their weighted gradients."""
    loss = StudentLoss(0.5, 2.0, FORWARD)
    optimizer = optax.sgd(0.1)
    step = make_student_step(STUDENT, optimizer, loss=loss, logit_chunk=2)
    state, metrics = step(init_student_state(params(), optimizer), None, make_batch(), teacher=teacher())
    batch = make_batch()

    def parts(tree):
        count = 12
        given = cross_entropy(STUDENT, tree, batch)[0] / count
        return given, sequence_divergence(STUDENT, tree, batch, teacher(), FORWARD)[0] / count

    (given, divergence), gradients = parts(params()), jax.jit(jax.jacrev(parts))(params())
    assert set(metrics) == {"loss", "grad_norm", "tokens", "skipped_steps", "cross_entropy", "divergence"}
    np.testing.assert_allclose(metrics["cross_entropy"], given, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"], divergence, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 0.5 * given + 2 * divergence, rtol=1e-5)
    assert float(metrics["tokens"]) == 12
    jax.tree.map(
        lambda new, old, a, b: np.testing.assert_allclose(
            new, old - 0.1 * (0.5 * a + 2 * b), rtol=1e-4, atol=1e-5
        ),
        state.trainable,
        params(),
        *gradients,
    )


@pytest.mark.parametrize("trainable", ["params", "adapter"])
@pytest.mark.parametrize("config", [Divergence("reverse_kl"), TOP])
def test_a_student_approaches_the_teacher(trainable, config):
    optimizer = optax.adam(1e-2)
    loss = StudentLoss(0.0, 1.0, config)
    step = make_student_step(STUDENT, optimizer, loss=loss, trainable=trainable, scale=2.0)
    start = params() if trainable == "params" else init_adapter(STUDENT, ADAPTER, jax.random.key(1))
    state, base = init_student_state(start, optimizer), None if trainable == "params" else params()
    before = jax.tree.map(np.asarray, (teacher().params, teacher().adapter))
    losses = []
    for _ in range(8):
        state, metrics = step(state, base, make_batch(), teacher=teacher())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0] and min(losses) > 0
    jax.tree.map(np.testing.assert_array_equal, (teacher().params, teacher().adapter), before)


def test_another_scale_of_the_teacher_is_no_new_trace():
    """The dial is an argument; the loss moves with it."""
    traces = []
    inner = optax.sgd(0.0)

    def update(updates, state, tree=None):
        traces.append(1)
        return inner.update(updates, state, tree)

    optimizer = optax.GradientTransformation(inner.init, update)
    step = make_student_step(STUDENT, optimizer, loss=StudentLoss(0.0, 1.0, FORWARD))
    state, losses = init_student_state(params(), optimizer), []
    for scale in (0.0, 0.5, 1.0):
        state, metrics = step(state, None, make_batch(), teacher=dataclasses.replace(teacher(), scale=scale))
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1 and len(set(losses)) == 3
    plain = Teacher(TEACHER, params(TEACHER, 1), vocabulary_hash=HASH)
    _, metrics = step(state, None, make_batch(), teacher=plain)
    np.testing.assert_allclose(losses[0], metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("stored", [False, True])
def test_replicas_are_separate_steps(stored):
    """Batches and targets of their own, one teacher; one replica is broken and does not stop the other."""
    optimizer = optax.sgd(0.1)
    loss = StudentLoss(1.0, 1.0, TOP)
    together = make_student_step(STUDENT, optimizer, loss=loss, replicas=3)
    alone = make_student_step(STUDENT, optimizer, loss=loss)
    batches = [make_batch(seed) for seed in range(3)]
    stack = functools.partial(jax.tree.map, lambda *leaves: np.stack(leaves))
    targets = [make_targets(teacher(), batch, 4, temperature=2.0) for batch in batches]
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params())
    state = init_student_state(stack_replicas([params(), params(STUDENT, 1), broken]), optimizer, 3)
    options = {"targets": stack(*targets)} if stored else {"teacher": teacher()}
    state, metrics = together(state, None, stack(*batches), **options)
    assert state.skipped.tolist() == [0, 0, 1]
    for seed in range(2):
        own = {"targets": targets[seed]} if stored else {"teacher": teacher()}
        single, expected = alone(
            init_student_state(params(STUDENT, seed), optimizer), None, batches[seed], **own
        )
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name][seed], value, rtol=1e-5, atol=1e-6, err_msg=name)
        replica = jax.tree.map(lambda leaf, r=seed: leaf[r], state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), replica, single)


def test_sharded_is_unsharded(mesh_cube, mesh_single):
    """data=2, fsdp=2, tensor=2 against one device, with a teacher beside the student and with a stored one."""
    optimizer = optax.sgd(0.1)
    results = []
    for mesh in (mesh_cube, mesh_single):
        module, theirs = Decoder(SPEC, mesh), Decoder(dataclasses.replace(SPEC, d_ff=64), mesh)
        given = Teacher(theirs, init_params(theirs, jax.random.key(3)), vocabulary_hash=HASH)
        batch = make_batch(rows=8)
        targets = make_targets(given, batch, 6, temperature=2.0, batch_size=8, chunk=2)
        placed = place_batch((batch, targets), mesh)
        step = make_student_step(module, optimizer, loss=StudentLoss(1.0, 1.0, TOP), logit_chunk=2)
        for options in ({"teacher": given}, {"targets": placed[1]})[: 1 if mesh is mesh_single else 2]:
            state = init_student_state(init_params(module, jax.random.key(0)), optimizer)
            results.append(jax.tree.map(np.asarray, step(state, None, placed[0], **options)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, results[0])


def test_what_does_not_fit_the_loss_is_refused():
    optimizer = optax.sgd(0.1)
    plain, distil = (
        make_student_step(STUDENT, optimizer, loss=loss)
        for loss in (StudentLoss(), StudentLoss(0.0, 1.0, TOP))
    )
    targets = make_targets(teacher(), make_batch(), 4, temperature=2.0)
    state = init_student_state(params(), optimizer)
    with pytest.raises(ValueError, match=r"a teacher a divergence; got divergence None and teacher Teacher"):
        plain(state, None, make_batch(), teacher=teacher())
    with pytest.raises(ValueError, match=r"a divergence needs a teacher.* and teacher NoneType"):
        distil(state, None, make_batch())
    with pytest.raises(ValueError, match="a teacher or its stored targets, got both"):
        distil(state, None, make_batch(), teacher=teacher(), targets=targets)


def test_the_loop_distils_from_a_stored_teacher(tmp_path):
    """With targets of the same rows as the batches: the losses are those with the teacher beside the students."""
    config = StudentConfig(batch_size=2, optimizer=OptimizerConfig("adamw", 0.01, warmup_steps=1))
    data = [make_batch(seed, rows=6) for seed in range(2)]
    targets = [make_targets(teacher(), rows, 4, temperature=2.0) for rows in data]
    batches = Batches(data, 2, [0, 1], STUDENT, targets)
    start, rows = stack_replicas([params(), params(STUDENT, 1)]), []
    for name, options in (("run", {"teacher": teacher()}), ("stored", {"targets": batches.targets})):
        folder = tmp_path / name
        loss = StudentLoss(0.0, 1.0, TOP)
        train(STUDENT, start, batches, config, [3], lambda *_: None, loss=loss, directory=folder, **options)
        rows.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
    assert {"budget3/divergence", "budget3/cross_entropy"} < set(rows[0]) and rows[0]["budget3/loss"] > 0.1
    for name, value in rows[0].items():
        np.testing.assert_allclose(rows[1][name], value, rtol=1e-3, err_msg=name)
    assert Batches(data, 2, [0, 1], STUDENT).targets(0) is None
    with pytest.raises(ValueError, match="targets for each replica, got 1 for 2"):
        Batches(data, 2, [0, 1], STUDENT, targets[:1])
