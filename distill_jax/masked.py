"""Masked sums and means; masks come from lengths, never from a comparison with the padding id."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """bool[B, size]: the first ``lengths[b]`` positions of each row. lengths: i32[B]."""
    return jnp.arange(size)[None, :] < lengths[:, None]


def zero_masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x where the mask holds, else 0; a NaN outside the mask reaches neither the value nor the gradient of x."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def masked_sum(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of x over the mask, number of masked-in elements), both f32[]."""
    mask = jnp.broadcast_to(mask, x.shape)
    return zero_masked(x, mask).sum(), mask.sum().astype(jnp.float32)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of x over the mask; 0 where nothing is masked in."""
    mask = jnp.broadcast_to(mask, x.shape)
    return zero_masked(x, mask).sum(axis) / jnp.maximum(mask.sum(axis), 1)
