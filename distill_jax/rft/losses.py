"""Losses of reinforcement fine-tuning: the clipped surrogate, its aggregations, and the KL anchor.

Pure functions. Each loss returns (sum, count); the caller adds both over micro-batches and hosts and divides
once. On-policy the *value* of the surrogate is near 0 by construction, since advantages are centred; its
gradient is not.

Letters: lp = log pi(y_t | x, y_<t) of the policy that is differentiated, lp_old of the policy that wrote y,
lp_reference of the reference; all f32[B, T]. mask: bool[B, T], real completion tokens; what lies outside
never reaches a value or a gradient.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.masked import zero_masked

ALGORITHMS = ("grpo", "dapo", "dr_grpo", "gspo", "rloo")
LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0

_WHY_NOT = {
    ("k1", "loss"): "its gradient is zero in expectation, so the coefficient would only add noise",
    ("k3", "loss"): "its gradient is that of KL(reference || policy), the other direction; use 'ratio_k3'",
    ("k2", "reward"): "its gradient is not that of the KL; k2 belongs into the loss",
    ("k3", "reward"): "its gradient is not that of the KL; use 'k1' in the reward",
    ("ratio_k3", "reward"): "the ratio has to be differentiated, which a reward is not",
}


@dataclasses.dataclass(frozen=True)
class KLAnchor:
    """Which estimator of KL(policy || reference) holds the policy, where it acts, and how strongly.

    Three pairs have that KL's gradient in expectation, and only they are accepted (A Comedy of Estimators,
    arXiv 2512.21852): ("k1", "reward"), ("k2", "loss") and ("ratio_k3", "loss"). All three act on the token:
    the KL at the prefixes that were visited; what a token does to the KL of later prefixes is not charged to
    it.

    Attributes:
      estimator: "k1", "k2" or "ratio_k3".
      place: "reward" or "loss".
      coefficient: >= 0, in advantage units a nat; 0 switches the anchor off.

    Raises:
      ValueError: another pair, with the reason; a negative coefficient.
    """

    estimator: str = "k1"
    place: str = "reward"
    coefficient: float = 0.02

    def __post_init__(self) -> None:
        legal = (("k1", "reward"), ("k2", "loss"), ("ratio_k3", "loss"))
        pair = (self.estimator, self.place)
        if pair not in legal:
            reason = _WHY_NOT.get(pair, "no such estimator or place")
            raise ValueError(
                f"KL estimator {pair[0]!r} in the {pair[1]!r}: {reason}. Legal (estimator, place): {legal}"
            )
        if not self.coefficient >= 0:
            raise ValueError(f"the coefficient of a KL anchor must be >= 0, got {self.coefficient}")


def log_ratio(lp: jax.Array, lp_other: jax.Array, mask: jax.Array) -> jax.Array:
    """lp - lp_other inside the mask, clamped to +-20 (no gradient beyond), 0 outside; f32[B, T]."""
    difference = zero_masked(lp, mask) - zero_masked(lp_other, mask)
    return jnp.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_ratio(lp: jax.Array, lp_old: jax.Array, mask: jax.Array, algorithm: str = "grpo") -> jax.Array:
    """pi / pi_old of each token, f32[B, T]; for "gspo" that of the sequence, written on each of its tokens.

    GSPO (arXiv 2507.18071, eq. 7 and 14): r_i = exp(mean_t (lp - lp_old)); as sg(r_i) * pi / sg(pi) for each
    token, which has the value of r_i and, averaged over the tokens, its gradient, and also admits an
    advantage for each token.
    """
    delta = log_ratio(lp, lp_old, mask)
    if algorithm != "gspo":
        return jnp.exp(delta)
    mean = delta.sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.exp(jax.lax.stop_gradient(mean) + delta - jax.lax.stop_gradient(delta))


def clipped_terms(ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float) -> jax.Array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), f32[B, T].

    Sources: PPO (arXiv 1707.06347, eq. 7); two clips as in DAPO (2503.14476). advantages: f32[B, T].
    """
    advantages = jax.lax.stop_gradient(advantages)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def aggregate(
    terms: jax.Array, mask: jax.Array, algorithm: str = "grpo", max_tokens: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Adds up the terms of tokens; (sum, count), f32[]. The loss is the quotient over *all* micro-batches.

                    sum                             count
        grpo, gspo  sum_i mean_t                    rows                each row weighs the same
        dapo        sum_it                          tokens              each token weighs the same
        dr_grpo     sum_it                          rows * max_tokens   a constant: length earns nothing
        rloo        sum_it                          rows                the policy gradient of the sequence

    Rows without a token count nowhere.

    Raises:
      ValueError: an unknown algorithm, or dr_grpo without max_tokens.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    if algorithm == "dr_grpo" and (max_tokens is None or max_tokens < 1):
        raise ValueError(f"dr_grpo divides by a constant length: give max_tokens >= 1, got {max_tokens}")
    terms = zero_masked(terms, mask)
    tokens = mask.sum(axis=1).astype(jnp.float32)
    rows = (tokens > 0).sum().astype(jnp.float32)
    if algorithm in ("grpo", "gspo"):
        return (terms.sum(axis=1) / jnp.maximum(tokens, 1.0)).sum(), rows
    if algorithm == "dapo":
        return terms.sum(), tokens.sum()
    if algorithm == "dr_grpo":
        assert max_tokens is not None
        return terms.sum(), rows * max_tokens
    return terms.sum(), rows


def clipped_surrogate(
    lp: jax.Array,
    lp_old: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    algorithm: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_tokens: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The policy loss without its anchor, (sum, count): `clipped_terms`, added up by `aggregate`.

    Args:
      lp, lp_old, mask: see the head of this file; differentiated in lp alone.
      advantages: f32[B] or f32[B, T].
      algorithm: "grpo", "dapo", "dr_grpo", "gspo" or "rloo".
      clip_low, clip_high: how far the ratio may fall below and rise above 1. For "gspo" much smaller values
        are usual.
      max_tokens: the constant length of "dr_grpo".

    Raises:
      ValueError: what `aggregate` raises; advantages of another shape.
    """
    ratio = importance_ratio(lp, jax.lax.stop_gradient(lp_old), mask, algorithm)
    terms = clipped_terms(ratio, per_token(advantages, mask), clip_low, clip_high)
    return aggregate(terms, mask, algorithm, max_tokens)


def per_token(advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """f32[B] or f32[B, T] -> f32[B, T]. Raises ValueError for another shape."""
    if advantages.shape == mask.shape:
        return advantages
    if advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"advantages must be f32[B] or f32[B, T] for tokens {mask.shape}, got {advantages.shape}"
        )
    return jnp.broadcast_to(advantages[:, None], mask.shape)


def clip_fraction(
    ratio: jax.Array, mask: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """(number of tokens whose ratio lies outside the clip range, number of tokens), f32[]."""
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    return (outside & mask).sum().astype(jnp.float32), mask.sum().astype(jnp.float32)


def k1(lp: jax.Array, lp_reference: jax.Array, mask: jax.Array) -> jax.Array:
    """lp - lp_reference, f32[B, T]: unbiased for KL(policy || reference), noisy, of either sign."""
    return log_ratio(lp, lp_reference, mask)


def k2(lp: jax.Array, lp_reference: jax.Array, mask: jax.Array) -> jax.Array:
    """(lp - lp_reference)^2 / 2, f32[B, T]: biased value, the right gradient as a loss on own samples."""
    return 0.5 * jnp.square(log_ratio(lp, lp_reference, mask))


def k3(lp: jax.Array, lp_reference: jax.Array, mask: jax.Array) -> jax.Array:
    """exp(d) - 1 - d, d = lp_reference - lp, f32[B, T]: unbiased, never negative, low noise; at most 10."""
    d = log_ratio(lp_reference, lp, mask)
    return jnp.minimum(jnp.expm1(d) - d, K3_LIMIT)


def clamped_terms(lp: jax.Array, lp_reference: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens at which a clamp of `k1` or `k3` acts, tokens), f32[]; many: the policy has run away."""
    d = zero_masked(lp_reference, mask) - zero_masked(lp, mask)
    beyond = (jnp.abs(d) > LOG_RATIO_LIMIT) | (jnp.expm1(jnp.minimum(d, LOG_RATIO_LIMIT)) - d > K3_LIMIT)
    return (beyond & mask).sum().astype(jnp.float32), mask.sum().astype(jnp.float32)


def anchor_reward(anchor: KLAnchor, lp_old: jax.Array, lp_reference: jax.Array, mask: jax.Array) -> jax.Array:
    """-coefficient * k1, f32[B, T], added to the advantages; constants. 0 if the anchor acts in the loss."""
    if anchor.place != "reward":
        return jnp.zeros(mask.shape, jnp.float32)
    return -anchor.coefficient * jax.lax.stop_gradient(k1(lp_old, lp_reference, mask))


def anchor_terms(
    anchor: KLAnchor, lp: jax.Array, lp_old: jax.Array, lp_reference: jax.Array, mask: jax.Array
) -> jax.Array:
    """coefficient * k2, or coefficient * ratio * k3, f32[B, T], to be added to `clipped_terms`.

    0 if the anchor acts in the reward. Differentiated in lp, through the ratio as well. The ratio is that of
    the token whatever the algorithm: the identity behind ratio * k3 holds for no other.
    """
    if anchor.place != "loss":
        return jnp.zeros(mask.shape, jnp.float32)
    lp_old, lp_reference = jax.lax.stop_gradient(lp_old), jax.lax.stop_gradient(lp_reference)
    if anchor.estimator == "k2":
        return anchor.coefficient * k2(lp, lp_reference, mask)
    return anchor.coefficient * importance_ratio(lp, lp_old, mask) * k3(lp, lp_reference, mask)
