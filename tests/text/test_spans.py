"""The alignment kernel: worked vectors, one trace, jit, vmap, shardings, gradients, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax.mesh import batch_sharding, place_batch
from distill_jax.text.spans import GRAD_CHOICES, Spans, align_spans, span_logprobs, valid_spans

# The text of the worked vectors: "naïve 12", bytes 6e 61 c3 af 76 65 20 31 32; V1 is the first of them.
END_T, LP_T = [2, 4, 6, 9], [-1.0, -2.0, -0.5, -0.7]
END_S, LP_S = [1, 3, 6, 8, 9], [-0.3, -4.0, -0.2, -0.6, -0.1]


def close(got: jax.Array, expected: list[float]) -> None:
    """The first spans of the only row; whatever comes after is 0."""
    padded = np.zeros(got.shape[1], np.float32)
    padded[: len(expected)] = expected
    np.testing.assert_allclose(got[0], padded, rtol=1e-6)


def first(array: jax.Array, count: int) -> list[Any]:
    return np.asarray(array)[0, :count].tolist()


def test_v1_a_split_letter_is_kept_whole() -> None:
    spans = align_spans([END_T], [END_S])
    logprob_t, logprob_s = span_logprobs(spans, [LP_T], [LP_S])
    assert first(spans.id_t, 4) == [0, 0, 0, 1] and first(spans.id_s, 5) == [0, 0, 0, 1, 1]
    assert spans.num_spans.tolist() == [2] and spans.valid.tolist() == [[True, True, False, False, False]]
    assert first(spans.count_t, 2) == [3, 1] and first(spans.count_s, 2) == [3, 2]
    assert first(spans.start_t, 2) == [0, 3] and first(spans.start_s, 2) == [0, 3]
    assert first(spans.bytes, 5) == [6, 3, 0, 0, 0]
    close(logprob_t, [-3.5, -0.7])
    close(logprob_s, [-4.5, -0.7])


def test_v2_a_one_sided_special_and_a_truncated_student() -> None:
    spans = align_spans(
        [[0, *END_T]],
        [END_S],
        present_t=[[False, True, True, True, True]],
        present_s=[[True, True, True, True, False]],
    )
    logprob_t, logprob_s = span_logprobs(spans, [[-9.0, *LP_T]], [LP_S])
    assert spans.num_spans.tolist() == [1] and first(spans.valid, 2) == [True, False]
    assert first(spans.id_t, 5) == [5, 0, 0, 0, 1] and first(spans.id_s, 5) == [0, 0, 0, 1, 5]
    assert first(spans.start_t, 2) == [1, 4]
    close(logprob_t, [-3.5, -0.7])
    close(logprob_s, [-4.5, -0.6])
    coverage = {name: (float(inside), float(scored)) for name, (inside, scored) in spans.coverage().items()}
    assert coverage == {"tokens_t": (3, 4), "tokens_s": (3, 4), "bytes_t": (6, 9), "bytes_s": (6, 8)}


def test_v3_a_token_of_no_width_stays_with_the_token_before() -> None:
    spans = align_spans([[3, 3, 5]], [[3, 5]])
    logprob_t, logprob_s = span_logprobs(spans, [[-1.0, -0.2, -0.4]], [[-0.9, -0.5]])
    assert first(spans.id_t, 3) == [0, 0, 1] and first(spans.id_s, 2) == [0, 1]
    assert first(spans.valid, 2) == [True, True]
    close(logprob_t, [-1.2, -0.4])
    close(logprob_s, [-0.9, -0.5])


def test_v4_one_span_a_token_when_both_cut_alike() -> None:
    spans = align_spans([[1, 2, 5]], [[1, 2, 5]])
    logprob_t, logprob_s = span_logprobs(spans, [[-1.0, -2.0, -3.0]], [[-4.0, -5.0, -6.0]])
    assert first(spans.id_t, 3) == first(spans.id_s, 3) == [0, 1, 2]
    assert first(spans.count_t, 4) == first(spans.count_s, 4) == [1, 1, 1, 0]
    close(logprob_t, [-1.0, -2.0, -3.0])
    close(logprob_s, [-4.0, -5.0, -6.0])


def test_v5_a_span_with_an_unscored_token_is_summed_but_not_valid() -> None:
    mask = [[False, True, True, True, True]]
    aligned = align_spans([END_T], [END_S], score_s=mask)
    late = align_spans([END_T], [END_S])
    for logprobs in (
        span_logprobs(aligned, [LP_T], [LP_S]),
        span_logprobs(late, [LP_T], [LP_S], score_s=mask),
    ):
        close(logprobs[0], [-3.5, -0.7])
        close(logprobs[1], [-4.2, -0.7])
    assert first(aligned.valid, 3) == first(valid_spans(late, score_s=mask), 3) == [False, True, False]
    assert first(late.valid, 2) == first(valid_spans(late), 2) == [True, True]


def test_an_empty_text_has_no_valid_span_and_sums_to_zero() -> None:
    nothing = [[False, False]]
    spans = align_spans([[0, 0]], [[0, 0]], nothing, nothing)
    nans = [[float("nan")] * 2]
    logprob_t, logprob_s = span_logprobs(spans, nans, nans)
    assert spans.num_spans.tolist() == [0] and not spans.valid.any() and not spans.bytes.any()
    assert not logprob_t.any() and not logprob_s.any()
    assert all((float(a), float(b)) == (0, 0) for a, b in spans.coverage().values())


def random_batch(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Positional arguments by name: ends of both sides with common borders, presence, and log-probabilities."""
    rng = np.random.default_rng(seed)
    end_t = np.sort(rng.integers(1, 60, (rows, 24)), axis=1).astype(np.int32)
    end_s = np.sort(rng.integers(1, 60, (rows, 20)), axis=1).astype(np.int32)
    present_t, present_s = rng.random((rows, 24)) < 0.9, rng.random((rows, 20)) < 0.9
    lp_t, lp_s = (rng.standard_normal((rows, size)).astype(np.float32) for size in (24, 20))
    return dict(end_t=end_t, end_s=end_s, present_t=present_t, present_s=present_s, lp_t=lp_t, lp_s=lp_s)


def whole(batch: dict[str, Any]) -> tuple[Spans, jax.Array, jax.Array]:
    spans = align_spans(batch["end_t"], batch["end_s"], batch["present_t"], batch["present_s"])
    return spans, *span_logprobs(spans, batch["lp_t"], batch["lp_s"])


def assert_same(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_one_trace_serves_every_batch_of_a_shape() -> None:
    traces = 0

    @jax.jit
    def counted(batch: dict[str, Any]) -> Any:
        nonlocal traces
        traces += 1
        return whole(batch)

    results = [counted(random_batch(4, seed)) for seed in range(3)]
    assert traces == 1
    assert len({int(spans.num_spans.sum()) for spans, _, _ in results}) > 1  # they did differ


def test_jit_and_eager_agree() -> None:
    batch = random_batch(4, 0)
    with jax.disable_jit():
        eager = whole(batch)
    assert_same(jax.jit(whole)(batch), eager)


def test_vmap_is_a_loop() -> None:
    batches = [random_batch(4, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.jit(whole), batches))
    assert_same(jax.jit(jax.vmap(whole))(stacked), looped)


def test_sharded_is_unsharded_and_needs_no_communication(mesh_cube: Mesh) -> None:
    batch = random_batch(8, 0)
    sharded = place_batch(batch, mesh_cube)
    compiled = jax.jit(whole).lower(sharded).compile()
    assert_same(compiled(sharded), jax.jit(whole)(batch))
    collectives = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(collectives, compiled.as_text())
    for leaf in jax.tree.leaves(compiled(sharded)):
        assert leaf.sharding.is_equivalent_to(batch_sharding(mesh_cube), leaf.ndim)


@pytest.mark.parametrize("grad", GRAD_CHOICES)
def test_gradient_agrees_with_finite_differences(grad: Any) -> None:
    """L is linear in lp: with eighths and a step of 1, a difference is the exact derivative."""
    batch = random_batch(1, 3)
    spans = align_spans(batch["end_t"], batch["end_s"], batch["present_t"], batch["present_s"])
    weights = np.random.default_rng(4).integers(-8, 8, (2, *spans.valid.shape)).astype(np.float32)
    lp = {"t": np.round(batch["lp_t"] * 8) / 8, "s": np.round(batch["lp_s"] * 8) / 8}

    @jax.jit
    def loss(lp: dict[str, Any]) -> jax.Array:
        logprob_t, logprob_s = span_logprobs(spans, lp["t"], lp["s"], grad=grad)
        return (weights[0] * logprob_t).sum() + (weights[1] * logprob_s).sum()

    gradient = jax.grad(loss)(lp)
    for suffix, name in (("t", "teacher"), ("s", "student")):
        for slot in range(lp[suffix].shape[1]):
            moved = {**lp, suffix: lp[suffix] + np.eye(lp[suffix].shape[1], dtype=np.float32)[slot][None]}
            difference = loss(moved) - loss(lp) if grad in (name, "both") else 0.0
            assert gradient[suffix][0, slot] == difference


def test_results_are_int32_bool_and_float32_whatever_comes_in() -> None:
    spans = align_spans(np.array([END_T], np.int64), np.array([END_S], np.uint16))
    logprobs = span_logprobs(spans, np.array([LP_T], np.float64), jnp.asarray([LP_S], jnp.bfloat16))
    assert {logprob.dtype for logprob in logprobs} == {jnp.dtype("float32")}
    booleans = {"valid", "score_t", "score_s"}
    for field in dataclasses.fields(spans):
        dtype = "bool" if field.name in booleans else "int32"
        assert getattr(spans, field.name).dtype == dtype, field.name


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"end_t must have the shape \[B, T\].*got \[4\].*end_t\[None\]", dict(end_t=END_T)),
        (ValueError, r"end_s must have the shape \[B, T\].*got \[1, 0\]", dict(end_s=np.zeros((1, 0), int))),
        (ValueError, "end_t has 2 rows and end_s has 1", dict(end_t=[END_T, END_T])),
        (TypeError, "end_t must hold integer byte offsets, got float32", dict(end_t=[LP_T])),
        (TypeError, "present_t must be boolean, got int32", dict(present_t=[[1, 1, 1, 0]])),
        (ValueError, r"present_s must have the shape \[1, 5\].*got \[1, 4\]", dict(present_s=[[True] * 4])),
        (ValueError, r"score_t must have the shape \[1, 4\].*got \[4\]", dict(score_t=[True] * 4)),
        (ValueError, r"origin_s must have the shape \[1\].*got \[\]", dict(origin_s=3)),
        (TypeError, "origin_t must hold integer", dict(origin_t=[0.0])),
    ],
)
def test_alignment_refuses(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        align_spans(**{"end_t": [END_T], "end_s": [END_S], **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            "grad must be one of 'none', 'student', 'teacher', 'both', got 'proxy'",
            dict(grad="proxy"),
        ),
        (ValueError, r"lp_t must have the shape \[1, 4\].*got \[1, 5\]", dict(lp_t=[LP_S])),
        (ValueError, r"lp_s must have the shape \[1, 5\].*got \[5\]", dict(lp_s=LP_S)),
        (TypeError, "lp_t must be floating point.*int32", dict(lp_t=[END_T])),
        (TypeError, "score_s must be boolean, got float32", dict(score_s=[LP_S])),
        (ValueError, r"score_t must have the shape \[1, 4\]", dict(score_t=[[True] * 5])),
    ],
)
def test_sums_refuse(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    spans = align_spans([END_T], [END_S])
    with pytest.raises(error, match=message):
        span_logprobs(spans, **{"lp_t": [LP_T], "lp_s": [LP_S], **arguments})
