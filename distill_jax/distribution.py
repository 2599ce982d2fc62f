"""The distribution of the next token: temperature, top-k and top-p, its entropy, and drawing from it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

DRAW_BLOCK = 128


def check_distribution(temperature: float, top_k: int | jax.Array, top_p: float) -> None:
    """Raises ValueError unless temperature > 0, top_k >= 0 (if it is one number) and 0 < top_p <= 1."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be a positive number, got {temperature}; greedy decoding (temperature 0) is an "
            "argmax without a distribution, score it at temperature 1"
        )
    if isinstance(top_k, int) and top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 keeps the whole vocabulary), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] (1 keeps the whole vocabulary), got {top_p}")


def process_logits(
    logits: jax.Array,
    temperature: float = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float = 1.0,
    *,
    keep: jax.Array | None = None,
) -> jax.Array:
    """log softmax(logits / temperature) over the support that top-k, then top-p, leave; renormalised.

    top-k keeps the k largest logits; top-p (nucleus, arXiv 1904.09751) keeps, of those, the fewest most
    probable ones whose mass reaches top_p. Ties with the last kept logit are all kept: the support may be
    larger than k, and does not depend on the order of the vocabulary. In the gradient it is a constant.
    The vocabulary is never sorted.

    Args:
      logits: [..., V], any float dtype; computed in float32.
      temperature: > 0.
      top_k: 0 keeps all; i32[...] gives each row its own.
      top_p: in (0, 1]; 1 keeps all.
      keep: i32[...], one id that is in the support whatever its logit.

    Returns:
      f32[..., V] log-probabilities, -inf outside the support.

    Raises:
      ValueError: temperature, top_k or top_p out of range.
    """
    check_distribution(temperature, top_k, top_p)
    logits = logits.astype(jnp.float32)
    if temperature != 1.0:
        logits = logits / temperature
    if top_p == 1.0 and not _truncates(top_k, logits.shape[-1]):
        return jax.nn.log_softmax(logits, axis=-1)
    in_support = _support(jax.lax.stop_gradient(logits), top_k, top_p)
    if keep is not None:
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        in_support |= ids == keep[..., None]
    return jax.nn.log_softmax(jnp.where(in_support, logits, -jnp.inf), axis=-1)


def _truncates(top_k: int | jax.Array, vocab_size: int) -> bool:
    """Whether top-k can leave ids out; an array can."""
    return 0 < top_k < vocab_size if isinstance(top_k, int) else True


def _support(logits: jax.Array, top_k: int | jax.Array, top_p: float) -> jax.Array:
    """bool[..., V]: what top-k, then top-p, keep."""
    support = jnp.ones(logits.shape, bool)
    if _truncates(top_k, logits.shape[-1]):
        count = top_k if isinstance(top_k, int) else top_k[..., None]
        support = ~(logits < _cut(logits, jnp.ones_like(logits), count))
    if top_p < 1.0:
        mass = jnp.where(support, jax.nn.softmax(logits, axis=-1), 0.0)
        support &= ~(logits < _cut(logits, mass, top_p * jnp.sum(mass, axis=-1, keepdims=True)))
    return support


def _cut(logits: jax.Array, weight: jax.Array, target: float | jax.Array) -> jax.Array:
    """f32[..., 1]: the largest c for which the weights of the logits >= c sum to at least `target`.

    NaN, which no logit is smaller than, for target 0 and where rounding keeps even the sum of all weights below
    `target`.
    Exact: the 32 bits of c are found one by one, from the highest. That is 32 passes over the vocabulary,
    which costs a small part of a sort (TPU, CPU), and where V is cut over chips only the sums travel.
    """
    # Infinities out of the way: bit patterns beyond theirs are NaN, which have no place in the order.
    logits = jnp.clip(logits, jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max)

    def as_float(rank: jax.Array) -> jax.Array:
        """Unsigned integers in the order of the floats they stand for: sign bit flipped, negatives reversed."""
        bits = jnp.where(rank >> 31 == 1, rank ^ jnp.uint32(1 << 31), ~rank)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def set_bit(i: jax.Array, rank: jax.Array) -> jax.Array:
        candidate = rank | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(logits >= as_float(candidate), weight, 0.0), axis=-1, keepdims=True)
        return jnp.where(reached >= target, candidate, rank)

    return as_float(jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)))


def entropy_of(logprobs: jax.Array) -> jax.Array:
    """-sum_v p log p, f32[...], of log-probabilities [..., V]; ids outside the support count 0."""
    finite = jnp.where(logprobs == -jnp.inf, 0.0, logprobs)
    return -jnp.sum(jnp.exp(finite) * finite, axis=-1)


def draw(key: jax.Array, logprobs: jax.Array) -> jax.Array:
    """One id, i32[], from log-probabilities f32[V] (-inf allowed), by inverting the cumulative distribution.

    First a block of 128 ids, then an id inside it: two random numbers, where Gumbel noise takes V of them and
    with a large vocabulary more time than the model. An id of probability 0 is never drawn.
    """
    padding = -len(logprobs) % DRAW_BLOCK
    probability = jnp.exp(jnp.pad(logprobs, (0, padding), constant_values=-jnp.inf)).reshape(-1, DRAW_BLOCK)
    uniform = jax.random.uniform(key, (2,))
    block = _inverse_cumulative(uniform[0], jnp.sum(probability, axis=1))
    return block * DRAW_BLOCK + _inverse_cumulative(uniform[1], probability[block])


def _inverse_cumulative(uniform: jax.Array, weight: jax.Array) -> jax.Array:
    """i32[]: the first i with weight[i] > 0 and weight[0] + .. + weight[i] > uniform * total.

    A parallel cumulative sum may rise by a rounding error where the weight is 0: such places are left out, from
    the total too, so that one place always satisfies the condition.
    """
    cumulative = jnp.where(weight > 0, jnp.cumsum(weight), 0.0)
    return jnp.argmax(cumulative > uniform * jnp.max(cumulative)).astype(jnp.int32)
