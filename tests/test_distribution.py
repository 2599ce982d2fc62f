"""Temperature, top-k and top-p against a sort in numpy and by hand; entropy; drawing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.distribution import draw, entropy_of, process_logits


def sorted_oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Log-probabilities of one row, by sorting, in float64."""
    x = logits.astype(np.float64) / temperature
    kept = np.ones(len(x), bool)
    if top_k:
        kept &= x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    if top_p < 1:
        p = np.where(kept, np.exp(x - x.max()), 0)
        p /= p.sum()
        order = np.argsort(-p)
        mass_before = np.cumsum(p[order]) - p[order]
        kept &= p >= p[order[mass_before < top_p]].min()
    x = np.where(kept, x, -np.inf)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
)
def test_process_logits_equals_sorting(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(2, 3, 10)).astype(np.float32) * 3
    got = process_logits(jnp.asarray(logits), temperature, top_k, top_p)
    expected = [[sorted_oracle(row, temperature, top_k, top_p) for row in rows] for rows in logits]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_process_logits_by_hand() -> None:
    logits = jnp.log(jnp.array([0.15, 0.5, 0.05, 0.3]))
    # top-p 0.7 keeps 0.5 and 0.3, which become 5/8 and 3/8; 0.9 needs 0.15 as well.
    np.testing.assert_allclose(jnp.exp(process_logits(logits, top_p=0.7)), [0, 0.625, 0, 0.375], rtol=1e-6)
    np.testing.assert_allclose(
        jnp.exp(process_logits(logits, top_p=0.9)), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], rtol=1e-6
    )
    # top-k comes first: of 0.5 and 0.3 (0.625, 0.375), 0.6 of the mass is the first alone.
    np.testing.assert_array_equal(
        process_logits(logits, top_k=2, top_p=0.6), [-jnp.inf, 0, -jnp.inf, -jnp.inf]
    )
    # temperature 1/2 squares probabilities: 0.25 and 0.09 of 0.34.
    np.testing.assert_allclose(
        jnp.exp(process_logits(logits, temperature=0.5, top_k=2)), [0, 0.25 / 0.34, 0, 0.09 / 0.34], rtol=1e-6
    )


def test_ties_are_all_kept_in_any_order() -> None:
    logits = jnp.array([1.0, 3.0, 2.0, 2.0, 0.0])
    kept = jnp.array([False, True, True, True, False])
    for order in ([0, 1, 2, 3, 4], [3, 4, 0, 2, 1]):
        index = jnp.array(order)
        assert (jnp.isfinite(process_logits(logits[index], top_k=2)) == kept[index]).all()
        # softmax: 0.53, 0.19, 0.19, 0.07: the second 0.19 is not needed for 0.6, but it equals the first.
        assert (jnp.isfinite(process_logits(logits[index], top_p=0.6)) == kept[index]).all()


def test_extreme_values() -> None:
    logits = jnp.array([[0.0, -jnp.inf, -jnp.inf, -2e38], [-1e-40, 1e38, -1e38, -5.0]])
    # More is asked for than is possible: -inf stays impossible, everything else stays.
    np.testing.assert_array_equal(
        jnp.isfinite(process_logits(logits, top_k=3))[0], [True, False, False, True]
    )
    np.testing.assert_array_equal(jnp.isfinite(process_logits(logits, top_k=3))[1], [True, True, False, True])
    spread = jax.random.normal(jax.random.key(0), (64, 999))
    almost_all = jnp.exp(process_logits(spread, top_p=1 - 1e-9))
    np.testing.assert_allclose(almost_all, jax.nn.softmax(spread), rtol=1e-4, atol=1e-7)
    only_the_first = process_logits(spread, top_p=1e-9)
    assert (jnp.argmax(spread, -1) == jnp.argmax(only_the_first, -1)).all()
    assert (jnp.isfinite(only_the_first).sum(-1) == 1).all()


def test_keep_adds_one_id_to_the_support() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))
    kept = jnp.exp(process_logits(logits, top_k=1, keep=jnp.array([2, 0])))
    np.testing.assert_allclose(kept, [[0.5 / 0.7, 0, 0.2 / 0.7], [1, 0, 0]], rtol=1e-6)


def test_top_k_of_each_row() -> None:
    logits = jnp.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    kept = jnp.isfinite(process_logits(logits, top_k=jnp.array([1, 2, 0])))
    np.testing.assert_array_equal(kept, [[True, False, False], [True, False, True], [True, True, True]])


def test_gradient_is_that_of_the_softmax_over_the_support() -> None:
    logits = jax.random.normal(jax.random.key(1), (7,))
    in_support = jnp.isfinite(process_logits(logits, 0.7, 5, 0.8))
    assert 1 < in_support.sum() < 5
    first = int(jnp.argmax(in_support))
    got = jax.grad(lambda x: process_logits(x, 0.7, 5, 0.8)[first])(logits)
    probability = jnp.where(in_support, jax.nn.softmax(jnp.where(in_support, logits / 0.7, -jnp.inf)), 0)
    expected = (jax.nn.one_hot(first, 7) - probability) / 0.7
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_vocabulary_is_never_sorted_and_the_result_is_float32() -> None:
    logits = jnp.ones((2, 9), jnp.bfloat16)
    for top_k, top_p in ((0, 1.0), (9, 1.0), (3, 1.0), (0, 0.5), (3, 0.5)):
        jaxpr = str(jax.make_jaxpr(lambda x: process_logits(x, 1.0, top_k, top_p))(logits))  # noqa: B023
        assert "sort" not in jaxpr and "top_k" not in jaxpr
        assert ("scan" in jaxpr or "while" in jaxpr) == (top_k == 3 or top_p == 0.5)
        assert process_logits(logits, 1.0, top_k, top_p).dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_bad_distributions_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_logits(jnp.zeros(4), **arguments)


def test_entropy_and_its_gradient_outside_the_support() -> None:
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25, 1e-9]))
    processed = process_logits(logits, top_k=3)
    np.testing.assert_allclose(entropy_of(processed), 1.5 * np.log(2), rtol=1e-6)
    gradient = jax.grad(lambda x: entropy_of(process_logits(x, top_k=3)))(logits)
    # d entropy / d logit_i = -p_i (log p_i + entropy)
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(gradient, [*(-p * (np.log(p) + 1.5 * np.log(2))), 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab_size", [5, 128, 300])
def test_draw_has_the_given_distribution(vocab_size: int) -> None:
    logprobs = process_logits(jax.random.normal(jax.random.key(2), (vocab_size,)) * 2, top_k=vocab_size // 2)
    draws = 40_000
    ids = jax.vmap(draw, (0, None))(jax.random.split(jax.random.key(3), draws), logprobs)
    counts = np.bincount(np.asarray(ids), minlength=vocab_size)
    expected = np.exp(np.asarray(logprobs, np.float64)) * draws
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    squares = (counts[often] - expected[often]) ** 2 / expected[often]
    degrees = often.sum() - 1
    assert squares.sum() < degrees + 4 * np.sqrt(2 * degrees)  # chi-square, four standard deviations


def test_draw_reaches_the_only_possible_id() -> None:
    keys = jax.random.split(jax.random.key(4), 50)
    for only in (0, 127, 128, 999):
        logprobs = jnp.full(1000, -jnp.inf).at[only].set(0.0)
        assert (jax.vmap(draw, (0, None))(keys, logprobs) == only).all()
