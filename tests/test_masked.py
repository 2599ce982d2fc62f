"""Masked sums and means, by hand, and with rubbish outside the mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.masked import length_mask, masked_mean, masked_sum, zero_masked

MASK = jnp.array([[True, True, False], [True, False, False]])
X = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])


def test_length_mask() -> None:
    np.testing.assert_array_equal(
        length_mask(jnp.array([0, 2, 3]), 3),
        [[False, False, False], [True, True, False], [True, True, True]],
    )


def test_sum_and_count() -> None:
    total, count = masked_sum(X, MASK)
    assert (float(total), float(count)) == (11.0, 3.0)
    assert count.dtype == jnp.float32


def test_means_over_everything_and_over_one_dimension() -> None:
    assert float(masked_mean(X, MASK)) == pytest.approx(11 / 3)
    np.testing.assert_allclose(masked_mean(X, MASK, axis=1), [1.5, 8.0])
    np.testing.assert_allclose(masked_mean(X, MASK, axis=0), [4.5, 2.0, 0.0])  # the last column is empty


def test_a_mask_is_broadcast_and_counted_in_full() -> None:
    total, count = masked_sum(X, jnp.array([[True], [False]]))
    assert (float(total), float(count)) == (7.0, 3.0)


def test_nothing_masked_in_is_zero_with_zero_gradient() -> None:
    value, grad = jax.value_and_grad(lambda x: masked_mean(x, jnp.zeros_like(MASK)))(X)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))


@pytest.mark.parametrize("rubbish", [jnp.nan, jnp.inf, -jnp.inf])
def test_rubbish_outside_the_mask_reaches_neither_value_nor_gradient(rubbish: float) -> None:
    x = jnp.where(MASK, X, rubbish)
    np.testing.assert_array_equal(zero_masked(x, MASK), [[1.0, 2.0, 0.0], [8.0, 0.0, 0.0]])
    value, grad = jax.value_and_grad(lambda x: masked_mean(x * x, MASK))(x)
    assert float(value) == pytest.approx((1 + 4 + 64) / 3)
    # d/dx of x^2 / 3 inside; outside the zero cotangent meets rubbish, so the mask must stand before the product.
    np.testing.assert_allclose(np.asarray(grad)[np.asarray(MASK)], [2 / 3, 4 / 3, 16 / 3], rtol=1e-6)
    value, grad = jax.value_and_grad(lambda x: masked_mean(jnp.square(zero_masked(x, MASK)), MASK))(x)
    assert float(value) == pytest.approx(23)
    np.testing.assert_allclose(grad, [[2 / 3, 4 / 3, 0], [16 / 3, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: masked_mean(x, MASK))(x), [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]], rtol=1e-6
    )


def test_rubbish_inside_the_mask_is_not_hidden() -> None:
    assert np.isnan(masked_mean(X.at[0, 0].set(jnp.nan), MASK))
