"""On-policy distillation: its gradient against exact sums, sources, old rows, two tokenizers, exact resume."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.checkpoint import Checkpointer
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.spec import ModelSpec
from distill_jax.sampling import RolloutBatch, SamplingConfig
from distill_jax.sequences import pack_prompts, pack_sequences
from distill_jax.students.aligned_texts import align_texts, completion_lp, same_tokens, take_rows
from distill_jax.students.divergence_config import Divergence
from distill_jax.students.divergences import sequence_divergence
from distill_jax.students.on_policy import (
    FRESH,
    REPLAY,
    TEACHER,
    OnPolicyBatch,
    OnPolicyConfig,
    OnPolicyStep,
    on_policy_loss,
    train_on_policy,
)
from distill_jax.students.replay import draw_rows, init_replay, push_rows
from distill_jax.students.scorers import cross_tokenizer_scorer, same_tokenizer_scorer
from distill_jax.students.step import cross_entropy
from distill_jax.students.targets import Teacher

SPEC = ModelSpec("llama", vocab_size=8, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=16)
MODULE = Decoder(SPEC)
EOS, T, PROMPT = 7, 3, 2
SAMPLING = SamplingConfig(num_samples=2, max_new_tokens=T, eos_ids=(EOS,))
CONFIG = OnPolicyConfig(prompts_per_step=2, logit_chunk=2)
MIXED = dataclasses.replace(CONFIG, student_share=0.6, replay_share=0.5, replay_rows=6)
ADAM = optax.adam(0.03)
REVERSE = functools.partial(sequence_divergence, config=Divergence("reverse_kl"))
TRUE = jnp.bool_(True)


@functools.cache
def params(seed=0):
    return init_params(MODULE, jax.random.key(seed))


@functools.cache
def teacher():
    return Teacher(MODULE, jax.tree.map(lambda leaf: 2 * leaf, params(5)))  # sharper than the student


@functools.cache
def prompts():
    return pack_prompts([[1, 2], [3], [4, 5], [6]], PROMPT)


@functools.cache
def teacher_texts():
    own = pack_sequences([[1, 2], [3], [4]], [[2, 3, EOS], [5, EOS], [1, 1, 1]], PROMPT, T)
    return take_rows(same_tokens(own, completion_lp(teacher(), own)), np.arange(3))


def make_step(config=CONFIG, optimizer=ADAM, *, sampling=SAMPLING, score=None, **options):
    if config.student_share < 1:
        options.setdefault("teacher_texts", teacher_texts())
    score = score or same_tokenizer_scorer(teacher())
    return OnPolicyStep(MODULE, optimizer, sampling, prompts(), score, config, **options)


def copy(state):
    return jax.tree.map(jnp.copy, state)


def assert_equal(first, second):
    def data(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b)), first, second)


def every_token(prompt_size=PROMPT):
    """One row for each id of the vocabulary, all after the same prompt."""
    return pack_sequences([[1, 2]] * 8, [[i] for i in range(8)], prompt_size, 1)


def test_expected_gradient_is_that_of_the_exact_reverse_kl():
    """All eight tokens after one prompt, as if drawn uniformly: the weights turn that into the student's own draws."""
    rows = every_token()
    batch = OnPolicyBatch(same_tokens(rows, completion_lp(teacher(), rows)), jnp.full((8, 1), -jnp.log(8.0)))
    config = dataclasses.replace(CONFIG, weight_limit=1e3)

    @jax.jit
    @jax.grad
    def sampled(tree):
        total, count, _ = on_policy_loss(MODULE, tree, None, batch, TRUE, config)
        return total / count

    @jax.jit
    @jax.grad
    def exact(tree):
        total, count = REVERSE(MODULE, tree, rows, teacher())
        return total / count

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        sampled(params()),
        exact(params()),
    )


def test_on_the_teachers_text_the_gradient_is_that_of_cross_entropy():
    texts = teacher_texts()
    batch = OnPolicyBatch(texts, jnp.full(texts.lp_t.shape, jnp.nan))  # nobody knows how likely it was

    @jax.jit
    def both(tree):
        def ours(tree):
            total, count, metrics = on_policy_loss(MODULE, tree, None, batch, ~TRUE, CONFIG)
            return total / count, metrics

        def theirs(tree):
            total, count = cross_entropy(MODULE, tree, texts.student)
            return total / count

        return jax.value_and_grad(ours, has_aux=True)(tree), jax.value_and_grad(theirs)(tree)

    ((value, _), slope), (expected, expected_slope) = both(params())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), slope, expected_slope)


def test_weights_are_ratios_and_are_cut():
    texts = teacher_texts()
    lp = completion_lp(Teacher(MODULE, params()), texts.student)
    mask = np.asarray(texts.student.completion_mask)
    drift = np.where(mask, np.array([[-1.0, 0.0, 3.0]]), np.nan)  # weights e, 1 and e^-3, the first is cut
    loss = jax.jit(functools.partial(on_policy_loss, MODULE, config=CONFIG))
    total, count, metrics = loss(params(), None, OnPolicyBatch(texts, lp + drift), TRUE)
    weights = np.array([2.0, 1.0, np.exp(-3.0)])[None] * mask
    np.testing.assert_allclose(metrics["weight"], weights.sum() / 8, rtol=1e-4)
    advantages = np.where(mask, texts.lp_t - np.asarray(lp), 0)
    np.testing.assert_allclose(total, -(weights * advantages * lp).sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics["log_ratio"], -advantages.sum() / 8, rtol=1e-4)
    assert float(count) == mask.sum() == 8 and float(metrics["known"]) == 1


def test_fresh_samples_are_the_students_own_and_count_once():
    step = make_step()
    state = step.start(params(), jax.random.key(0))
    batch = step.sample(state, 0)
    own = batch.texts.student
    assert own.tokens.shape == (4, PROMPT + T) and own.prompt_size == PROMPT
    assert_equal(own.tokens[0, :PROMPT], own.tokens[1, :PROMPT])  # two samples of each prompt
    np.testing.assert_allclose(batch.lp_behaviour, completion_lp(Teacher(MODULE, params()), own), atol=1e-5)
    assert_equal(step.sample(state, 0), batch)
    assert (np.asarray(step.sample(state, 1).texts.student.completion) != own.completion).any()
    _, metrics = step(state)
    np.testing.assert_allclose(metrics["weight"], 1, atol=1e-5)
    assert float(metrics["known"]) == float(metrics["from_student"]) == 1


def reverse_kl(tree):
    """Exact, of the first token after a prompt."""
    total, count = jax.jit(functools.partial(REVERSE, MODULE))(tree, every_token(), teacher())
    return float(total / count)


@pytest.mark.parametrize("divergence", [None, REVERSE])
def test_the_student_comes_nearer_to_its_teacher(divergence):
    options = {} if divergence is None else {"divergence": divergence, "teacher": teacher()}
    sampling = dataclasses.replace(SAMPLING, num_samples=8)
    step = make_step(sampling=sampling, **options)
    state = train_on_policy(step, step.start(params(), jax.random.key(1)), 12, lambda _: 1.0)
    assert reverse_kl(state.student.trainable) < 0.7 * reverse_kl(params())
    assert int(state.student.step) == 12 and int(state.student.skipped) == 0


def test_a_student_that_equals_its_teacher_learns_nothing():
    twin = Teacher(MODULE, params())
    for divergence in (None, REVERSE):
        options = {} if divergence is None else {"divergence": divergence, "teacher": twin}
        step = make_step(optimizer=optax.sgd(1.0), score=same_tokenizer_scorer(twin), **options)
        _, metrics = step(step.start(params(), jax.random.key(0)))
        np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [0, 0], atol=1e-4)


def test_a_run_that_is_resumed_ends_the_same_to_the_bit(tmp_path):
    """Mixed sources and a ring of old rows; everything that the rest depends on is in the state."""
    step, halfway = make_step(MIXED), []

    def keep(done, state, _metrics):
        if done == 4:
            with Checkpointer(tmp_path) as checkpointer:
                checkpointer.save(done, state, {})
                checkpointer.wait()
            halfway.append(state.replay is not None)

    whole = train_on_policy(
        step, step.start(params(), jax.random.key(3)), 8, lambda done: 1 / (1 + done), keep
    )
    other = make_step(MIXED)
    with Checkpointer(tmp_path) as checkpointer:
        done, state, _ = checkpointer.restore(other.start(params(1), jax.random.key(0)))
    assert done == 4 and halfway == [True] and int(state.student.step) == 4
    resumed = train_on_policy(other, state, 8, lambda done: 1 / (1 + done))
    assert_equal(resumed, whole)


def test_sources_are_drawn_by_their_shares_and_by_the_key():
    step = make_step(MIXED)
    state = step.start(params(), jax.random.key(0))
    empty = [step.source(state, i) for i in range(100)]
    assert REPLAY not in empty and 45 <= empty.count(FRESH) <= 75
    full = dataclasses.replace(state, replay=push_rows(state.replay, step.sample(state, 0)))
    sources = [step.source(full, i) for i in range(100)]
    assert [s == TEACHER for s in sources] == [s == TEACHER for s in empty]
    assert 18 <= sources.count(REPLAY) <= 42
    assert sources == [step.source(full, i) for i in range(100)]
    assert sources != [step.source(dataclasses.replace(full, key=jax.random.key(1)), i) for i in range(100)]


def test_one_trace_for_every_source():
    traces = []

    def update(updates, state, tree=None):
        traces.append(1)
        return ADAM.update(updates, state, tree)

    step = make_step(MIXED, optax.GradientTransformation(ADAM.init, update))
    seen = []
    state = step.start(params(), jax.random.key(3))
    for index in range(8):
        seen.append(step.source(state, index))
        state, metrics = step(state)
        assert float(metrics["from_student"]) == (seen[-1] != TEACHER)
    assert set(seen) == {FRESH, REPLAY, TEACHER} and len(traces) == 1


def test_only_fresh_samples_go_into_the_ring():
    step = make_step(MIXED)
    state = step.start(params(), jax.random.key(3))
    fresh = 0
    for index in range(6):
        fresh += step.source(state, index) == FRESH
        state, _ = step(state)
    assert int(state.replay.written) == 4 * fresh > 0


def test_an_adapter_is_trained_on_a_base_that_stays():
    adapter = init_adapter(MODULE, AdapterConfig(rank=2, alpha=4.0), jax.random.key(1))
    config = dataclasses.replace(CONFIG, trainable="adapter", scale=2.0)
    step = make_step(config, base=params())
    before = jax.tree.map(np.asarray, params())
    state, _ = step(step.start(adapter, jax.random.key(0)))
    state, metrics = step(state)
    assert jax.tree.structure(state.student.trainable) == jax.tree.structure(adapter)
    assert float(metrics["grad_norm"]) > 0
    np.testing.assert_allclose(metrics["weight"], 1, atol=1e-4)  # sampled from what is trained
    assert_equal(params(), before)


def retokenise(chosen, rollouts):
    """The teacher writes 0 and 1 as one token, 8, and its end as 9; a text with a 6 in it cannot be put before it."""
    assert chosen.shape == (4,)
    own = jax.tree.map(np.asarray, rollouts.sequences)
    completions, ends, usable = [], np.zeros((4, T), np.int32), np.ones(4, bool)
    for row in range(4):
        ids, written, place = own.completion[row, : own.completion_length[row]].tolist(), [], 0
        usable[row] = 6 not in ids
        while place < len(ids):
            pair = ids[place : place + 2] == [0, 1]
            written.append(8 if pair else 9 if ids[place] == EOS else ids[place])
            place += 1 + pair
            ends[row, len(written) - 1] = place
        completions.append(written)
    theirs = pack_sequences([[c + 1] for c in chosen], completions, 1, T, 9)
    ends_s = np.broadcast_to(np.arange(1, T + 1), (4, T))
    return align_texts(rollouts.sequences, ends_s, theirs, ends, usable=usable, unusable_limit=1.0)


def test_a_teacher_with_another_tokenizer():
    """What a student samples is judged on spans; a row that the teacher cannot read counts nowhere."""
    other = Decoder(dataclasses.replace(SPEC, vocab_size=10))
    judge = Teacher(other, init_params(other, jax.random.key(2)))
    score = cross_tokenizer_scorer(judge, retokenise)
    step = make_step(score=score)
    tokens = pack_sequences([[1]] * 4, [[0, 1, EOS], [2, 0, 1], [6, 1, EOS], [EOS]], PROMPT, T)
    nothing = jnp.zeros((4, T))
    rollouts = RolloutBatch(tokens, nothing, nothing, None, np.array([True, False, True, True]))
    texts = score(np.array([0, 1, 2, 3]), rollouts)
    spans = texts.spans()
    assert spans.num_spans.tolist() == [2, 2, 0, 1] and np.asarray(spans.count_s)[0, :2].tolist() == [2, 1]
    theirs = pack_sequences([[1], [2], [3], [4]], [[8, 9], [2, 8], [6, 1, 9], [9]], 1, T)
    np.testing.assert_allclose(texts.lp_t, completion_lp(judge, theirs), atol=1e-6)
    batch = OnPolicyBatch(texts, nothing)
    _, count, metrics = jax.jit(functools.partial(on_policy_loss, MODULE, config=CONFIG))(
        params(), None, batch, TRUE
    )
    assert float(count) == 7 and float(metrics["known"]) == pytest.approx(0.7)
    lp = np.asarray(completion_lp(Teacher(MODULE, params()), tokens))
    both, alone = (
        lp[0, :2].sum(),
        [lp[0, 2], lp[1, 0], lp[3, 0]],
    )  # drawn with certainty: the ratio is the likelihood
    weights = [2 * np.exp(both), 2 * np.exp(lp[1, 1:].sum()), *np.exp(alone)]
    np.testing.assert_allclose(metrics["weight"], np.sum(weights) / 7, rtol=1e-4)
    state, metrics = step(step.start(params(), jax.random.key(0)))
    assert int(state.student.skipped) == 0 and np.isfinite(float(metrics["loss"]))


def test_the_ring_overwrites_its_oldest_rows():
    ring = init_replay({"x": jnp.zeros((2, 1), jnp.int32)}, 5)
    for first in range(1, 8, 2):
        ring = push_rows(ring, {"x": jnp.array([[first], [first + 1]])})
    assert ring.rows["x"][:, 0].tolist() == [6, 7, 8, 4, 5] and int(ring.written) == 8 and ring.size == 5


def test_the_ring_draws_what_was_written_and_by_the_key():
    ring = push_rows(init_replay(jnp.zeros(2), 50), jnp.array([3.0, 4.0]))
    drawn = draw_rows(ring, jax.random.key(0), 40)
    assert set(drawn.tolist()) == {3, 4}
    assert_equal(drawn, draw_rows(ring, jax.random.key(0), 40))
    assert drawn.tolist() != draw_rows(ring, jax.random.key(1), 40).tolist()


def other_layout():
    texts = teacher_texts()
    return dataclasses.replace(texts, student=pack_sequences([[1]], [[2]], PROMPT, T + 1))


def other_vocabulary():
    texts = teacher_texts()
    return dataclasses.replace(texts, student=dataclasses.replace(texts.student, vocabulary_hash="other"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OnPolicyConfig(prompts_per_step=0), "prompts_per_step"),
        (lambda: OnPolicyConfig(student_share=1.5), "student_share must be in"),
        (lambda: OnPolicyConfig(replay_share=1.0, replay_rows=4), "replay_share in"),
        (lambda: OnPolicyConfig(replay_share=0.5), "a share needs rows"),
        (lambda: OnPolicyConfig(weight_limit=0.0), "weight_limit must be positive"),
        (lambda: OnPolicyConfig(trainable="head"), "trainable must be"),
        (lambda: make_step(teacher_texts=teacher_texts()), "at 1 never used"),
        (lambda: make_step(MIXED, teacher_texts=None), "the teacher's texts are needed"),
        (lambda: make_step(MIXED, teacher_texts=other_layout()), r"\(6, 2\), rollouts \(5, 2\)"),
        (lambda: make_step(MIXED, teacher_texts=other_vocabulary()), "of vocabulary 'other'"),
        (lambda: make_step(divergence=REVERSE), "give both, or neither"),
        (lambda: make_step(base=params()), "base is for adapters"),
        (lambda: make_step(sampling=dataclasses.replace(SAMPLING, temperature=0.0)), "needs temperature > 0"),
        (
            lambda: make_step(dataclasses.replace(MIXED, replay_rows=3)).start(params(), jax.random.key(0)),
            "ring of 3 rows cannot hold one batch of 4",
        ),
        (
            lambda: make_step(vocabulary_hash="a").sample(make_step().start(params(), jax.random.key(0)), 0),
            "need the cross-tokenizer losses",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
