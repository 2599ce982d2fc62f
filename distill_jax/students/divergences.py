"""Divergences between a teacher's and a student's next-token distributions, full or on the top k ids.

Every divergence is a sum over ids of terms that are >= 0, and 0 exactly where p = q. For the Kullback-Leibler kinds
that is the Bregman form p log(p/q) - p + q: over a whole distribution -p + q adds nothing. So a top-k support may
leave the rest out ("bregman") or join it into one more id ("bucket"), and by x log(x/y) >= x - y and the data
processing inequality

    0 <= bregman <= bucket <= full

where the plain sum of p log(p/q) over some ids can be negative. With p the teacher's, q the student's, m their mixture:

    forward_kl        p log(p/q) - p + q
    reverse_kl        q log(q/p) - q + p
    jsd               beta p log(p/m) + (1 - beta) q log(q/m),  m = beta p + (1 - beta) q;  the KLs at beta = 0 and 1
    skew_forward_kl   p log(p/m) - p + m,                       m = skew p + (1 - skew) q
    skew_reverse_kl   q log(q/m) - q + m,                       m = (1 - skew) p + skew q
    total_variation   |p - q| / 2

Sources: generalized JSD, arXiv 2306.13649 (beta as in TRL); skewed KL, 2402.03898; temperature^2, 1503.02531.

Float32 inside, gradients to the student alone. A probability of 0 counts as exp(-10000): an id that only one of the
two can produce costs much and not infinitely, and no gradient is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.distribution import process_logits
from distill_jax.logprobs import completion_states, map_token_chunks
from distill_jax.masked import zero_masked
from distill_jax.models.decoder import Decoder, Params, unembed
from distill_jax.sequences import Sequences
from distill_jax.students.divergence_config import Divergence
from distill_jax.students.targets import (
    LOG_ZERO,
    Teacher,
    TopKTargets,
    log_mass_outside,
    log_probabilities,
)


def token_divergence(teacher_logits: jax.Array, student_logits: jax.Array, config: Divergence) -> jax.Array:
    """The divergence at each position, in nats.

    Args:
      teacher_logits: [..., V], any float dtype; a constant in the gradient.
      student_logits: [..., V], ids as the teacher's.
      config: see `Divergence`. Logits that tie with the k-th largest are in the support too.

    Returns:
      f32[...], times temperature^2 if the config says so.

    Raises:
      ValueError: different shapes.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher and student logits must have one shape [..., V], got {teacher_logits.shape} and "
            f"{student_logits.shape}; models of different vocabularies need the cross-tokenizer losses"
        )
    p = log_probabilities(jax.lax.stop_gradient(teacher_logits), config.temperature)
    q = log_probabilities(student_logits, config.temperature)
    if config.support == "full":
        return _scaled(_entries(config, p, q).sum(axis=-1), config)
    inside = _support(config, p, q)
    return _on_support(config, p, q, inside, log_mass_outside(p, inside))


def stored_divergence(teacher: TopKTargets, student_logits: jax.Array, config: Divergence) -> jax.Array:
    """`token_divergence` from the teacher's stored top ids: equal to it with support "teacher_topk", ties aside.

    Args:
      teacher: its leaves [..., K] and [...]. Of more than config.top_k ids the later, less probable ones join the tail.
      student_logits: [..., V] with V = teacher.vocab_size, any float dtype.
      config: support "teacher_topk" and the stored temperature.

    Returns:
      f32[...]; of a student that equals the stored teacher, 0 up to rounding.

    Raises:
      ValueError: another support, fewer stored ids than `top_k`, another temperature or vocabulary size.
    """
    if student_logits.shape[-1] != teacher.vocab_size:
        raise ValueError(
            f"the stored teacher is normalised over {teacher.vocab_size} ids, the student's logits have "
            f"{student_logits.shape[-1]}; store it with the smaller vocab_size of the two"
        )
    if config.temperature != teacher.temperature:
        raise ValueError(
            f"the teacher was stored at temperature {teacher.temperature}, the divergence is at {config.temperature}: "
            "the tail of one says nothing about that of the other; store the teacher at that temperature"
        )
    stored = teacher.ids.shape[-1]
    if config.support != "teacher_topk" or config.top_k > stored:
        raise ValueError(
            f"the stored teacher has its own {stored} most probable ids, but the divergence wants support "
            f"{config.support!r} with top_k={config.top_k}; use 'teacher_topk' with at most {stored}, or run the "
            "teacher instead"
        )
    k = config.top_k
    lp, rest = jnp.split(jnp.maximum(jax.lax.stop_gradient(teacher.lp), LOG_ZERO), [k], axis=-1)
    tail = jnp.maximum(jax.lax.stop_gradient(teacher.tail_lp), LOG_ZERO)
    tail = jax.nn.logsumexp(jnp.concatenate([rest, tail[..., None]], axis=-1), axis=-1)
    q = log_probabilities(student_logits, config.temperature)
    # The teacher's entries go to their places, not the student's to theirs: the gradient then holds no scatter.
    p = jnp.full(q.shape, 2 * LOG_ZERO, jnp.float32)
    p = jnp.put_along_axis(p, teacher.ids[..., :k], lp, axis=-1, inplace=False)
    return _on_support(config, jnp.maximum(p, LOG_ZERO), q, p >= LOG_ZERO, tail)


def sequence_divergence(
    module: Decoder,
    params: Params,
    sequences: Sequences,
    teacher: Teacher | TopKTargets,
    config: Divergence,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of the divergence over the completion tokens of all rows, in nats; differentiable in the student.

    See `completion_terms` for the arguments.
    """
    _, divergence = completion_terms(
        module, params, sequences, teacher, config, adapter=adapter, scale=scale, chunk=chunk
    )
    return divergence.sum(), sequences.completion_length.sum().astype(jnp.float32)


def completion_terms(
    module: Decoder,
    params: Params,
    sequences: Sequences,
    teacher: Teacher | TopKTargets,
    config: Divergence,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and divergence of every completion token, from one forward pass of each model.

    Each decoder gives its hidden states once; logits exist for `chunk` tokens of every row at a time, and are made
    again in the backward pass. Pure: call it inside your own jit.

    Args:
      module, params, adapter, scale: the student's, as in `models.decoder.apply`.
      sequences: B rows; may hold numpy leaves.
      teacher: a `Teacher`, run here; or `TopKTargets` of these rows. Of the same vocabulary. Where the embeddings are
        padded to different sizes, the ids of the smaller one count.
      config: see `Divergence`.
      chunk: the most tokens of a row whose logits exist at one time.

    Returns:
      (-log q(token), divergence), f32[B, T], 0 where `sequences.completion_mask` is False. The first is at temperature
      1 and over the student's whole vocabulary, as in `students.step.cross_entropy`.

    Raises:
      ValueError: chunk < 1, no completion slots, another vocabulary, or targets of other shapes or that
        do not serve the config (see `stored_divergence`).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    teacher.check(sequences)
    hidden, tokens = completion_states(module, params, sequences, adapter=adapter, scale=scale)
    given, compare = _teacher_side(teacher, sequences, config)

    def terms(hidden: jax.Array, tokens: jax.Array, given: Any) -> tuple[jax.Array, jax.Array]:
        logits = unembed(module, params, hidden, adapter=adapter, scale=scale)
        # A comparison, where a gather would do: its gradient is no scatter, and needs no logits-sized array.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == tokens[..., None]
        cross_entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return cross_entropy, compare(given, logits)

    results = map_token_chunks(terms, (hidden, tokens, given), chunk, module.mesh)
    mask = sequences.completion_mask
    return zero_masked(results[0], mask), zero_masked(results[1], mask)


def _teacher_side(
    teacher: Teacher | TopKTargets, sequences: Sequences, config: Divergence
) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """(what is known of the teacher at each token, the divergence from a chunk of it and of the student's logits)."""
    if isinstance(teacher, TopKTargets):
        size = teacher.vocab_size
        stored = jax.tree.map(jnp.asarray, teacher)
        return stored, lambda given, logits: stored_divergence(given, logits[..., :size], config)
    params, adapter, scale = jax.lax.stop_gradient((teacher.params, teacher.adapter, teacher.scale))
    hidden, _ = completion_states(teacher.module, params, sequences, adapter=adapter, scale=scale)

    def compare(given: jax.Array, logits: jax.Array) -> jax.Array:
        theirs = unembed(teacher.module, params, given, adapter=adapter, scale=scale)
        common = min(logits.shape[-1], theirs.shape[-1])
        return token_divergence(theirs[..., :common], logits[..., :common], config)

    return hidden, compare


def _scaled(value: jax.Array, config: Divergence) -> jax.Array:
    return value * config.temperature**2 if config.temperature_squared else value


def _support(config: Divergence, p: jax.Array, q: jax.Array) -> jax.Array:
    """bool[..., V]: the ids of a top-k support; a constant in the gradient."""

    def largest(x: jax.Array) -> jax.Array:  # without a sort, so that a cut vocabulary is not gathered
        return process_logits(jax.lax.stop_gradient(x), top_k=config.top_k) > -jnp.inf

    if config.support == "teacher_topk":
        return largest(p)
    return largest(q) if config.support == "student_topk" else largest(p) | largest(q)


def _on_support(
    config: Divergence, p: jax.Array, q: jax.Array, inside: jax.Array, teacher_tail: jax.Array
) -> jax.Array:
    """The divergence on the ids `inside`, with the tail as the config says. Two zero probabilities add exactly 0."""
    student_tail = log_mass_outside(q, inside)
    p, q = jnp.where(inside, p, LOG_ZERO), jnp.where(inside, q, LOG_ZERO)
    if config.tail == "renormalise":
        # Side by side in one array: compiled apart, the two sums may be rounded in different orders, and a student that
        # is its teacher would be a rounding away from it.
        both = jnp.stack([p, q])
        both -= jax.nn.logsumexp(both, axis=-1, keepdims=True)
        p, q = jnp.where(inside, jnp.maximum(both, LOG_ZERO), LOG_ZERO)
    value = _entries(config, p, q).sum(axis=-1)
    if config.tail == "bucket":
        value += _entries(config, teacher_tail, student_tail)
    return _scaled(value, config)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entries(config: Divergence, p: jax.Array, q: jax.Array) -> jax.Array:
    """The term of each id from log-probabilities of one shape."""
    return _value_and_slope(config, p, q)[0]


@_entries.defjvp
def _entries_jvp(
    config: Divergence, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # By hand, for two reasons: it is exactly 0 where p = q, which products of rounded weights are not, and one array is
    # kept for the backward pass. The teacher is a constant.
    value, slope = _value_and_slope(config, *primals)
    return value, slope * tangents[1]


def _value_and_slope(config: Divergence, log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The term of each id and its derivative in log q."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # A kind without beta or skew does not read it.
    kind, beta, skew = config.kind, config.beta or 0.0, config.skew or 0.0
    if kind == "jsd":
        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, kind)
    if kind == "forward_kl":
        value, slope = p * (log_p - log_q) - p + q, q - p
    elif kind == "reverse_kl":
        value, slope = q * (log_q - log_p) - q + p, q * (log_q - log_p)
    elif kind == "jsd":
        to_p, to_q = _log_ratios_to_mixture(log_p, log_q, beta)
        weight = 1 / (beta * (1 - beta)) if config.normalize_beta else 1.0
        value = weight * (beta * p * to_p + (1 - beta) * q * to_q)
        slope = weight * (1 - beta) * q * to_q
    elif kind == "skew_forward_kl":
        to_p, _ = _log_ratios_to_mixture(log_p, log_q, skew)
        value = p * to_p + (1 - skew) * (q - p)
        slope = -(1 - skew) * q * jnp.expm1(to_p)
    elif kind == "skew_reverse_kl":
        _, to_q = _log_ratios_to_mixture(log_p, log_q, 1 - skew)
        value = q * to_q + (1 - skew) * (p - q)
        slope = q * (to_q - skew * jnp.expm1(to_q))
    else:
        value, slope = jnp.abs(p - q) / 2, q * jnp.sign(q - p) / 2
    if config.entry_clip is None:
        return value, slope
    return jnp.minimum(value, config.entry_clip), jnp.where(value > config.entry_clip, 0.0, slope)


def _log_ratios_to_mixture(log_p: jax.Array, log_q: jax.Array, weight: float) -> tuple[jax.Array, jax.Array]:
    """(log p/m, log q/m) with m = weight p + (1 - weight) q; exactly 0 where p = q, finite for any finite logs.

    Each from its own ratio to m, m/p = 1 + (1 - weight) (q/p - 1), so that a small one keeps its digits. Beyond a ratio
    of e^30, where exp would overflow at last, one part of m is nothing beside the other and the logarithm is linear.
    """
    difference = log_q - log_p
    near = jnp.clip(difference, -30.0, 30.0)
    beyond = jnp.abs(difference - near)
    to_p = -jnp.log1p((1 - weight) * jnp.expm1(near)) - jnp.where(difference > 0, beyond, 0.0)
    to_q = -jnp.log1p(weight * jnp.expm1(-near)) - jnp.where(difference < 0, beyond, 0.0)
    return to_p, to_q
