"""Losses between a teacher and a student that do not share a tokenizer. Pure functions, differentiated in the student.

They meet on the spans of `text.spans`: the finest stretches of text that both cut out with whole tokens, each with a
likelihood on either side,

    L_T[k] = sum of lp_t over the teacher's tokens of span k        L_S[k] = sum of lp_s over the student's

Three ways to learn from that, and what each needs of the teacher:

    alm               likelihoods of the teacher's own text                    principled, the default
    span_advantages   likelihoods of the student's samples                     on-policy, a policy gradient
    uld_distance      whole distributions; which token is which is not used    a baseline, blind to permutations

Where both sides have the same tokens every span is one token, and the first two are the losses of one tokenizer.
A teacher's score that is NaN or infinite is *missing*: its span counts nowhere. It must never be read as 0, which
would be the log-probability of a certain event, and would reward the student for whatever was not scored.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from distill_jax.masked import masked_sum, zero_masked
from distill_jax.text.spans import Spans, span_logprobs

ALM_KINDS = ("kl", "reverse_kl", "total_variation", "absolute")
ALM_UNITS = ("span", "token")


def comparable_spans(
    spans: Spans, lp_t: jax.Array, lp_s: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The spans on which the sides can be compared.

    Args:
      spans: from `align_spans`, the teacher first.
      lp_t, lp_s: f32[B, Tt], f32[B, Ts]; log-probabilities of the tokens. What stands at tokens that are not scored is
        never used. A teacher's score that is not finite makes its span unknown.

    Returns:
      (L_T, L_S, known): f32[B, S], f32[B, S], bool[B, S]; in nats, 0 where not known. Differentiable in lp_s alone.
    """
    total_t, total_s = span_logprobs(spans, lp_t, lp_s, grad="student")
    known = spans.valid & jnp.isfinite(total_t)
    return zero_masked(total_t, known), zero_masked(total_s, known), known


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, exact near 0 and far from it, in value and gradient.

    Two branches that meet at -log 2 (M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012). Each sees only
    arguments of its own range: the gradient of the one that is not taken has to be finite too.
    """
    border = -math.log(2.0)
    near = jnp.log(-jnp.expm1(jnp.where(x > border, x, border)))
    far = jnp.log1p(-jnp.exp(jnp.where(x > border, border, x)))
    return jnp.where(x > border, near, far)


def binary_cross_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """-[p log q + (1 - p) log(1 - q)] of two events with log-probabilities log_p, log_q < 0, elementwise."""
    return -(jnp.exp(log_p) * log_q - jnp.expm1(log_p) * log1mexp(log_q))


def binary_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL of two events: p log(p/q) + (1 - p) log((1 - p)/(1 - q)), elementwise; 0 where the two are equal.

    The same number as binary_cross_entropy(log_p, log_q) - binary_cross_entropy(log_p, log_p), without the difference
    of two numbers that are nearly equal.
    """
    return jnp.exp(log_p) * (log_p - log_q) - jnp.expm1(log_p) * (log1mexp(log_p) - log1mexp(log_q))


def alm_terms(
    total_t: jax.Array, total_s: jax.Array, *, kind: str = "kl", tau: float = 100.0, eps: float = 1e-6
) -> jax.Array:
    """Approximate likelihood matching: tau * D(e^a || e^b) of the events "this span is written", elementwise.

        a = L_T / tau - eps        b = L_S / tau - eps

        kl               e^a (a - b) + (1 - e^a) log((1 - e^a) / (1 - e^b))
        reverse_kl       the same with a and b exchanged
        total_variation  |e^a - e^b|
        absolute         |a - b|, so that the loss is |L_T - L_S| whatever tau is

    A span's likelihood is nearly 0 for a long span, so at tau = 1 the divergence hardly sees the spans that differ
    most; a large tau lifts all of them to where it does. The gradient of D falls like 1 / tau. The factor tau takes
    that out and leaves a knob of shape, not of the learning rate: for kl the limit of large tau is
    (L_T - L_S) + L_T log(L_S / L_T).

    Source: Minixhofer, Vulic and Ponti, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
    arXiv 2503.20083; the factor tau is ours.

    Args:
      total_t, total_s: f32[...], log-likelihoods of spans, in nats. Rounding above 0 is cut.
      kind: one of `ALM_KINDS`.
      tau: > 0.
      eps: > 0, keeps log(1 - e^b) finite where a side is certain; well below |L| / tau of the spans that matter.

    Returns:
      f32[...], at least 0, and 0 where total_t == total_s. Differentiable in both.

    Raises:
      ValueError: an unknown kind; tau or eps that are not positive.
    """
    if kind not in ALM_KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, ALM_KINDS))}, got {kind!r}")
    if not (tau > 0 and math.isfinite(tau) and eps > 0):
        raise ValueError(f"tau and eps must be positive numbers, got tau={tau} and eps={eps}")
    total_t, total_s = (jnp.where(total > 0, 0.0, total) for total in (total_t, total_s))
    if kind == "absolute":
        return _absolute(total_t - total_s)
    a, b = total_t / tau - eps, total_s / tau - eps
    if kind == "kl":
        return tau * binary_kl(a, b)
    if kind == "reverse_kl":
        return tau * binary_kl(b, a)
    # The sign is that of the totals themselves: where they are equal, a and b may still differ by a rounding.
    return tau * (jnp.expm1(a) - jnp.expm1(b)) * lax.stop_gradient(jnp.sign(total_t - total_s))


def alm(
    spans: Spans,
    lp_t: jax.Array,
    lp_s: jax.Array,
    *,
    kind: str = "kl",
    tau: float = 100.0,
    eps: float = 1e-6,
    unit: str = "span",
) -> tuple[jax.Array, jax.Array]:
    """(sum, count): `alm_terms` over the comparable spans of all rows; differentiated in lp_s.

    Args:
      spans, lp_t, lp_s: see `comparable_spans`.
      kind, tau, eps: see `alm_terms`.
      unit: what is counted, "span", or "token" for the student's tokens in those spans; the sum is the same. Per span
        the loss does not depend on how finely the student cuts; per token it adds to a cross-entropy like with like.

    Returns:
      f32[] both; exactly (0, 0) for a batch without a comparable span.

    Raises:
      ValueError: an unknown unit, or what `alm_terms` and `span_logprobs` raise.
    """
    if unit not in ALM_UNITS:
        raise ValueError(f"unit must be one of {', '.join(map(repr, ALM_UNITS))}, got {unit!r}")
    total_t, total_s, known = comparable_spans(spans, lp_t, lp_s)
    total, count = masked_sum(alm_terms(total_t, total_s, kind=kind, tau=tau, eps=eps), known)
    if unit == "token":
        count = zero_masked(spans.count_s, known).sum().astype(jnp.float32)
    return total, count


def token_advantages(lp_t: jax.Array, lp_s: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sampled reverse KL where teacher and student have the same tokens: A_t = lp_t - lp_s at the student's samples.

    E[A] over the student's tokens is -KL(student || teacher) at that prefix, and its policy gradient is that of the
    KL: k1 as a reward. What a token does to the KL of later prefixes is not charged to it.

    Args:
      lp_t, lp_s: f32[B, T]; of the same sampled tokens.
      mask: bool[B, T], real tokens.

    Returns:
      (advantages f32[B, T], known bool[B, T]); constants for the gradient. Where the teacher's score is missing
      (not finite) or the mask is False the advantage is 0 and known is False.
    """
    known = mask & jnp.isfinite(lp_t)
    return lax.stop_gradient(zero_masked(lp_t, known) - zero_masked(lp_s, known)), known


def span_advantages(spans: Spans, lp_t: jax.Array, lp_s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sampled reverse KL across tokenizers, as one advantage for each of the student's tokens.

        A_t = L_T[k] - L_S[k]        for every token t of the student in span k

    A span is one action, whose log-probability is the sum over its tokens, so each of them gets the *whole* difference:
    the teacher judges the span, and none of it is earned before the span's last token. Parts of a teacher's span are
    conditional log-probabilities of nothing, hence no sharing out.

    Args:
      spans, lp_t, lp_s: see `comparable_spans`; lp_s at the student's own samples.

    Returns:
      (advantages f32[B, Ts], known bool[B, Ts]); constants for the gradient, 0 and False for tokens outside of
      comparable spans.
    """
    total_t, total_s, known_spans = comparable_spans(spans, lp_t, lp_s)
    # Absent tokens have the id S-1, a span that is never valid.
    known = jnp.take_along_axis(known_spans, spans.id_s, axis=1)
    advantages = jnp.take_along_axis(total_t - total_s, spans.id_s, axis=1)
    return lax.stop_gradient(zero_masked(advantages, known)), known


def policy_gradient(lp_s: jax.Array, advantages: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of -A_t lp_s[t] over the mask, f32[]; the gradient is the REINFORCE one, A is a constant.

    Args:
      lp_s: f32[B, T], differentiated.
      advantages: f32[B, T].
      mask: bool[B, T]; what lies outside reaches neither value nor gradient.
    """
    advantages = zero_masked(lax.stop_gradient(advantages), mask)
    return masked_sum(-advantages * zero_masked(lp_s, mask), mask)


def uld_distance(p_t: jax.Array, p_s: jax.Array, top_k: int = 0) -> jax.Array:
    """Universal logit distillation: the L1 distance of two *sorted* distributions, f32[...].

        sum_i | p_t sorted descending [i] - p_s sorted descending [i] |       the smaller vocabulary padded with zeros

    A baseline. It compares how peaked two distributions are and never which tokens they prefer: a teacher whose
    probabilities are permuted has the distance 0. Source: Boizard et al., arXiv 2402.12030.

    Args:
      p_t, p_s: f32[..., Vt], f32[..., Vs]; probabilities.
      top_k: compare the k largest of each and the rest as one number; 0 sorts everything. Never more than the whole
        distance, and the same from k = max(Vt, Vs) on.

    Raises:
      ValueError: a negative top_k, or leading dimensions that differ.
    """
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 sorts the whole vocabulary), got {top_k}")
    if p_t.shape[:-1] != p_s.shape[:-1]:
        raise ValueError(
            f"the distributions must be paired one to one, got {p_t.shape[:-1]} of the teacher and {p_s.shape[:-1]} "
            "of the student; bring both to the same positions first"
        )
    size = max(p_t.shape[-1], p_s.shape[-1])
    kept = min(top_k, size) if top_k else size
    largest_t, largest_s = _largest(p_t, kept), _largest(p_s, kept)
    distance = _absolute(largest_t - largest_s).sum(axis=-1)
    if kept == size:
        return distance
    return distance + _absolute(largest_t.sum(axis=-1) - largest_s.sum(axis=-1))


def _largest(p: jax.Array, count: int) -> jax.Array:
    """f32[..., count]: the largest of p in descending order, zeros after the end of its vocabulary."""
    own = min(count, p.shape[-1])
    largest, _ = lax.top_k(p, own)
    return jnp.pad(largest, [(0, 0)] * (p.ndim - 1) + [(0, count - own)])


def _absolute(x: jax.Array) -> jax.Array:
    """|x| with the gradient 0 at 0, where that of `jnp.abs` is 1: a student that equals its teacher is not moved."""
    return x * lax.stop_gradient(jnp.sign(x))
