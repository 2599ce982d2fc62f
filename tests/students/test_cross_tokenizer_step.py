"""Steps across tokenizers on tiny models: alignment, scores, what is learned, replicas, padding, one trace."""

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
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.spec import ModelSpec
from distill_jax.sequences import pack_sequences
from distill_jax.students.aligned_texts import (
    AlignedTexts,
    align_texts,
    completion_lp,
    same_tokens,
    score_sequences,
    take_rows,
)
from distill_jax.students.cross_tokenizer import alm_terms
from distill_jax.students.cross_tokenizer_step import make_alm_step, make_uld_step
from distill_jax.students.step import apply_gradient, init_student_state
from distill_jax.students.targets import Teacher
from distill_jax.students.train import stack_replicas

SIZES = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4, "d_ff": 16}
SPEC = ModelSpec("llama", vocab_size=12, d_model=8, **SIZES)
TEACHER_SPEC = ModelSpec("llama", vocab_size=20, d_model=8, **SIZES)
MODULE, TEACHER_MODULE = Decoder(SPEC), Decoder(TEACHER_SPEC)
SGD = optax.sgd(0.5)
END = 11  # of the student; the teacher's is 19

# The student writes bytes; the teacher has pairs: its token 10 is "01", 11 is "23". Row 3 ended at once, row 2 is
# cut off.
TEXTS = [[0, 1, 2, 3, END], [2, 3, 0, END], [4, 0, 1], [END]]
TEACHER_TEXTS = [[10, 11, 19], [11, 0, 19], [4, 10], [19]]
PAIRS = {10: 2, 11: 2}


@functools.cache
def params(role="student", seed=0):
    return init_params(MODULE if role == "student" else TEACHER_MODULE, jax.random.key(seed))


@functools.cache
def teacher():
    return Teacher(TEACHER_MODULE, params("teacher", 7))


def byte_ends(texts, size, widths):
    ends = np.zeros((len(texts), size), np.int32)
    for row, text in enumerate(texts):
        ends[row, : len(text)] = np.cumsum([widths.get(i, 1) for i in text])
    return ends


def aligned(size=5, size_t=3, pad_id=0, **options):
    prompts = [[5], [6, 7], [5, 5], [8]]
    student = pack_sequences(prompts, TEXTS, 2, size, pad_id)
    own = pack_sequences([[9, *p] for p in prompts], TEACHER_TEXTS, 3, size_t, pad_id)
    ends = byte_ends(TEXTS, size, {}), byte_ends(TEACHER_TEXTS, size_t, PAIRS)
    return align_texts(
        student, ends[0], own, ends[1], score_sequences(teacher(), own, batch_size=3), **options
    )


def student_lp(tree, sequences):
    return completion_lp(Teacher(MODULE, tree), sequences, chunk=2)


def test_scores_do_not_depend_on_the_batch():
    sequences = aligned().teacher
    whole = completion_lp(teacher(), sequences)
    for batch_size in (1, 3, 64):
        np.testing.assert_allclose(
            score_sequences(teacher(), sequences, batch_size=batch_size), whole, atol=1e-6
        )
    assert (np.asarray(whole)[np.asarray(sequences.completion_mask)] < 0).all()


def test_spans_are_those_of_the_bytes():
    spans = aligned().spans()
    assert spans.num_spans.tolist() == [3, 3, 2, 1]
    assert np.asarray(spans.count_s)[0, :3].tolist() == [2, 2, 1]
    assert np.asarray(spans.count_t)[:3, :3].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]


def test_a_step_reports_the_loss_of_spans_and_lowers_it():
    texts = aligned()
    step = make_alm_step(MODULE, SGD, tau=5.0, logit_chunk=2)
    state = init_student_state(params(), SGD)
    state, metrics = step(state, None, texts)
    lp_s, lp_t = np.asarray(student_lp(params(), texts.student)), np.asarray(texts.lp_t)
    pairs = []  # by hand: (teacher, student) of every span
    for row, cuts in enumerate([[2, 2, 1], [2, 1, 1], [1, 2], [1]]):
        starts = np.cumsum([0, *cuts])
        pairs += [(lp_t[row, k], lp_s[row, starts[k] : starts[k + 1]].sum()) for k in range(len(cuts))]
    expected = alm_terms(*jnp.array(pairs).T, tau=5.0).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["alm"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["cross_entropy"], -lp_s.sum() / 13, rtol=1e-5)
    assert (float(metrics["spans"]), float(metrics["tokens"]), float(metrics["coverage"])) == (9, 13, 1)
    for _ in range(10):
        state, later = step(state, None, texts)
    assert float(later["loss"]) < 0.5 * float(metrics["loss"])
    assert int(state.step) == 11 and int(state.skipped) == 0


def test_cross_entropy_is_added():
    texts = aligned()
    plain = make_alm_step(MODULE, SGD, tau=5.0)(init_student_state(params(), SGD), None, texts)[1]
    both = make_alm_step(MODULE, SGD, tau=5.0, cross_entropy_weight=0.5)(
        init_student_state(params(), SGD), None, texts
    )[1]
    np.testing.assert_allclose(both["loss"], plain["alm"] + 0.5 * plain["cross_entropy"], rtol=1e-5)


def test_padding_and_missing_scores_do_not_matter():
    """Other sizes, other padding, NaN where nothing is; then the scores of a row go missing, and only that row does."""
    texts = aligned()
    wider = aligned(size=7, size_t=6, pad_id=3)
    wider = dataclasses.replace(wider, lp_t=jnp.where(wider.present_t, wider.lp_t, jnp.nan))
    step = make_alm_step(MODULE, SGD, tau=5.0)
    results = [step(init_student_state(params(), SGD), None, t) for t in (texts, wider)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
    missing = dataclasses.replace(texts, lp_t=texts.lp_t.at[0].set(jnp.nan))
    unusable = aligned(usable=np.array([False, True, True, True]), unusable_limit=0.25)
    results = [step(init_student_state(params(), SGD), None, t) for t in (missing, unusable)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
    assert float(results[0][1]["spans"]) == 6 and float(results[0][1]["coverage"]) == pytest.approx(8 / 13)


def test_nothing_to_compare_is_no_step():
    texts = dataclasses.replace(aligned(), lp_t=jnp.full((4, 3), jnp.nan))
    state, metrics = make_alm_step(MODULE, SGD)(init_student_state(params(), SGD), None, texts)
    assert float(metrics["loss"]) == float(metrics["spans"]) == float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.trainable, params())


def test_a_student_that_equals_its_teacher_stays():
    """One tokenizer and one model: the loss is 0 and so is the gradient."""
    sequences = aligned().student
    texts = same_tokens(sequences, student_lp(params(), sequences))
    for kind in ("kl", "reverse_kl"):
        step = make_alm_step(MODULE, SGD, kind=kind, tau=5.0, logit_chunk=2)
        _, metrics = step(init_student_state(params(), SGD), None, texts)
        np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [0, 0], atol=1e-4)


def test_one_trace_for_all_batches():
    traces = []

    def update(updates, state, tree=None):
        traces.append(1)
        return SGD.update(updates, state, tree)

    counting = optax.GradientTransformation(SGD.init, update)
    step, state = make_alm_step(MODULE, counting), init_student_state(params(), SGD)
    texts = aligned()
    for rows in ([0, 1], [2, 3], [3, 1]):
        state, _ = step(state, None, take_rows(texts, np.array(rows)), 0.5)
    assert len(traces) == 1


def test_replicas_and_adapters():
    adapters = [init_adapter(MODULE, AdapterConfig(rank=2, alpha=4.0), jax.random.key(s)) for s in range(2)]
    texts = aligned()
    batches = [take_rows(texts, np.array(rows)) for rows in ([0, 1], [2, 3])]
    options = {"tau": 5.0, "trainable": "adapter", "scale": 2.0}
    alone = make_alm_step(MODULE, SGD, **options)
    singles = [alone(init_student_state(a, SGD), params(), b) for a, b in zip(adapters, batches, strict=True)]
    together = make_alm_step(MODULE, SGD, replicas=2, **options)(
        init_student_state(stack_replicas(adapters), SGD, 2),
        params(),
        jax.tree.map(lambda *leaves: np.stack(leaves), *batches),
    )
    for replica, single in enumerate(singles):
        own = jax.tree.map(lambda leaf, r=replica: leaf[r], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own, single)


def test_sharded_is_unsharded(mesh_cube):
    spec = dataclasses.replace(SPEC, d_model=16, vocab_size=16)
    texts = aligned()
    texts = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), texts)
    results = []
    for mesh in (None, mesh_cube):
        module = Decoder(spec, mesh)
        step = make_alm_step(module, SGD, tau=5.0, logit_chunk=2)
        batch = texts if mesh is None else place_batch(texts, mesh)
        state, metrics = step(init_student_state(init_params(module, jax.random.key(0)), SGD), None, batch)
        results.append(jax.tree.map(np.asarray, (state, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize("pairing", ["positions", "spans"])
def test_sorted_distributions(pairing):
    texts = aligned()
    step = make_uld_step(MODULE, SGD, pairing=pairing, cross_entropy_weight=0.0, logit_chunk=2)
    state, first = step(init_student_state(params(), SGD), (None, teacher()), texts)
    assert float(first["pairs"]) == {"positions": 3 + 3 + 2 + 1, "spans": 9}[pairing]
    assert float(first["loss"]) == float(first["uld"]) and 0 < float(first["uld"]) < 2
    np.testing.assert_allclose(
        first["cross_entropy"], -student_lp(params(), texts.student).sum() / 13, rtol=1e-5
    )
    for _ in range(5):
        state, metrics = step(state, (None, teacher()), texts)
    assert float(metrics["uld"]) < float(first["uld"])


def test_sorted_distributions_pair_the_right_predictions_and_are_blind():
    """One tokenizer, each token with itself: at 0 from its own model, and from that model with permuted labels."""
    module = Decoder(dataclasses.replace(SPEC, tie_embeddings=False))
    own = init_params(module, jax.random.key(0))
    sequences = aligned().student
    permuted = {**own, "head": {"kernel": own["head"]["kernel"][:, ::-1]}}
    lp = [completion_lp(Teacher(module, tree), sequences) for tree in (own, permuted)]
    assert np.abs(lp[0] - lp[1]).max() > 0.1
    for pairing in ("positions", "spans"):
        step = make_uld_step(module, SGD, pairing=pairing, cross_entropy_weight=0.0)
        for tree, text_lp in zip((own, permuted), lp, strict=True):
            texts = same_tokens(sequences, text_lp)
            _, metrics = step(init_student_state(own, SGD), (None, Teacher(module, tree)), texts)
            np.testing.assert_allclose(metrics["uld"], 0, atol=1e-5)
            assert float(metrics["pairs"]) == 13


def test_a_gradient_that_is_not_finite_moves_only_the_counters():
    state = init_student_state(params(), SGD)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params())
    after, metrics = apply_gradient(SGD, state, jnp.float32(1), broken, jnp.float32(1))
    jax.tree.map(np.testing.assert_array_equal, after.trainable, params())
    assert int(after.step) == int(after.skipped) == int(metrics["skipped_steps"]) == 1


def with_ends(name, value):
    texts = aligned()
    arrays = {"end_s": np.asarray(texts.end_s), "end_t": np.asarray(texts.end_t), "lp_t": texts.lp_t}
    arrays[name] = value
    return align_texts(texts.student, arrays["end_s"], texts.teacher, arrays["end_t"], arrays["lp_t"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_alm_step(MODULE, SGD, kind="jsd"), "kind must be one of"),
        (lambda: make_alm_step(MODULE, SGD, unit="byte"), "unit must be one of"),
        (lambda: make_alm_step(MODULE, SGD, trainable="head"), "trainable must be"),
        (lambda: make_alm_step(MODULE, SGD, cross_entropy_weight=-1.0), "cross_entropy_weight must be"),
        (lambda: make_uld_step(MODULE, SGD, pairing="dtw"), "pairing must be one of"),
        (lambda: make_uld_step(MODULE, SGD, replicas=-1), "replicas must be at least 0"),
        (lambda: with_ends("end_s", np.zeros((4, 4), np.int32)), r"end_s must have the shape \[4, 5\]"),
        (lambda: with_ends("lp_t", np.zeros((3, 3))), r"lp_t must have the shape \[4, 3\]"),
        (lambda: aligned(usable=np.array([True, True, True, False])), "1 of 4 texts are not given back"),
        (lambda: score_sequences(teacher(), take_rows(aligned().teacher, np.arange(0))), "at least one text"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_aligned_texts_are_a_tree_of_rows():
    assert isinstance(take_rows(aligned(), np.array([1])), AlignedTexts)
    assert {len(leaf) for leaf in jax.tree.leaves(take_rows(aligned(), np.array([1, 1])))} == {2}
