"""The calibration reward: how much easier a text is for the teacher than for a small model, and what pays.

    gap(y) = (l_0(y) - l_C(y)) / size(y)   l_0: the reference (the teacher before calibration); l_C: the proxy
    r_cal  = -gap(y)   distillable         pays for text that the small model can also produce
             +gap(y)   undistillable       pays for text easy for the teacher and surprising to the proxy

Source: Distillation Traps and Guards (arXiv 2604.18963). Beyond the paper: units, the gate on correctness,
credit by span, and ensembles of proxies. Everything returned is a constant for differentiation: the reward ranks
rollouts, it is not differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.rft.advantages import check_groups
from distill_jax.text.spans import Spans, span_logprobs

SIGN = {"distillable": -1.0, "undistillable": 1.0}
UNITS = ("per_byte", "per_token", "sum")
ENSEMBLES = ("mean", "min", "max")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpanTerms:
    """The calibration reward taken apart along the spans that both tokenizers can be cut into.

    Attributes:
      reward: f32[B, S], signed and in the units of the sequence reward: where every span of a row is valid,
        its sum is the row's reward. 0 where a span is not valid.
      share: f32[B, S], each span's share of the bytes of the row's valid spans; 0 for units "sum".
    """

    reward: jax.Array
    share: jax.Array


def likelihood_gap(
    lp_reference: ArrayLike,
    lp_proxy: ArrayLike,
    size: ArrayLike | None,
    units: str = "per_byte",
    *,
    size_proxy: ArrayLike | None = None,
) -> jax.Array:
    """gap = (l_0 - l_C) / bytes, or l_0 / tokens_0 - l_C / tokens_C, or l_0 - l_C; f32[B], in nats.

    Args:
      lp_reference, lp_proxy: f32[B], log-probability of the whole completion, the end of sequence included on
        both sides or on neither. Each model under its own tokenizer and prompt.
      size: f32[B] or i32[B]: bytes of the text for "per_byte", tokens of the reference for "per_token"; None
        for "sum". A size of 0 (an empty completion) counts as 1.
      units: "per_byte" (comparable across tokenizers), "per_token" (each model's own tokens) or "sum"
        (couples to length).
      size_proxy: tokens of the proxy; for "per_token" only, and needed there.

    Raises:
      ValueError: unknown units, or sizes that do not go with them.
    """
    if units not in UNITS:
        raise ValueError(f"units must be one of {UNITS}, got {units!r}")
    if (size is None) != (units == "sum"):
        raise ValueError(f"units={units!r} {'takes no size' if units == 'sum' else 'needs size, f32[B]'}")
    if (size_proxy is None) != (units != "per_token"):
        raise ValueError(
            "units='per_token' needs size_proxy, the proxy's number of tokens"
            if units == "per_token"
            else f"units={units!r} measures both models on the same text and takes no size_proxy"
        )
    lp_reference, lp_proxy = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (lp_reference, lp_proxy)
    )
    if lp_reference.ndim != 1 or lp_reference.shape != lp_proxy.shape:
        raise ValueError(
            f"expected one log-probability a row, f32[B] each, got {lp_reference.shape} and {lp_proxy.shape}"
        )
    if size is None:
        return lp_reference - lp_proxy
    for name, value in (("size", size), ("size_proxy", size_proxy)):
        if value is not None and jnp.shape(value) != lp_reference.shape:
            raise ValueError(f"{name} has shape {jnp.shape(value)}, expected {lp_reference.shape}, one a row")
    own = jnp.maximum(jnp.asarray(size, jnp.float32), 1.0)
    if size_proxy is None:
        return (lp_reference - lp_proxy) / own
    return lp_reference / own - lp_proxy / jnp.maximum(jnp.asarray(size_proxy, jnp.float32), 1.0)


def calibration_reward(
    lp_reference: ArrayLike,
    lp_proxy: ArrayLike,
    size: ArrayLike | None,
    mode: str,
    units: str = "per_byte",
    *,
    spans: Spans | None = None,
    size_proxy: ArrayLike | None = None,
) -> tuple[jax.Array, SpanTerms | None]:
    """r_cal = -gap for mode "distillable", +gap for "undistillable"; see the head of this file.

    Args:
      lp_reference, lp_proxy: f32[B] sums over the completion, or f32[B, Tt] and f32[B, Ts] log-probabilities
        of its tokens (0 in padding). With spans they must be of tokens, as the spans index them.
      size, size_proxy, units: see `likelihood_gap`.
      mode: "distillable" or "undistillable".
      spans: alignment of the reference's tokens (side t) with the proxy's (side s), from `align_spans`.

    Returns:
      (f32[B] reward, SpanTerms or None without spans). Both are constants for differentiation.

    Raises:
      ValueError: unknown mode or units, shapes or sizes that do not fit, spans with sums, spans with
        "per_token" (a span has no single number of tokens).
    """
    if mode not in SIGN:
        raise ValueError(
            f"mode must be one of {tuple(SIGN)}, got {mode!r}; a control arm is eta=0, not a mode"
        )
    lp_reference, lp_proxy = jnp.asarray(lp_reference, jnp.float32), jnp.asarray(lp_proxy, jnp.float32)
    sum_reference, sum_proxy = (x.sum(axis=1) if x.ndim == 2 else x for x in (lp_reference, lp_proxy))
    reward = SIGN[mode] * likelihood_gap(sum_reference, sum_proxy, size, units, size_proxy=size_proxy)
    if spans is None:
        return reward, None
    if units == "per_token":
        raise ValueError("credit by span needs a size that both models share; use units='per_byte' or 'sum'")
    if lp_reference.ndim != 2 or lp_proxy.ndim != 2:
        raise ValueError(
            "with spans, lp_reference and lp_proxy must be log-probabilities of tokens, f32[B, T]; got "
            f"{lp_reference.shape} and {lp_proxy.shape}"
        )
    of_reference, of_proxy = span_logprobs(spans, lp_reference, lp_proxy, grad="none")
    row_size = jnp.ones_like(reward) if size is None else jnp.maximum(jnp.asarray(size, jnp.float32), 1.0)
    terms = SIGN[mode] * (of_reference - of_proxy) / row_size[:, None]
    width = jnp.where(spans.valid & (size is not None), spans.bytes.astype(jnp.float32), 0.0)
    share = width / jnp.maximum(width.sum(axis=1, keepdims=True), 1.0)
    return reward, SpanTerms(jnp.where(spans.valid, terms, 0.0), share)


def proxy_weights(gaps: ArrayLike, ensemble: str | None) -> jax.Array:
    """How much each of K proxies counts in each row, f32[K, B]; a column sums to 1.

    "mean": all alike. "min": the proxy with the smallest gap, the one that finds the text easiest: in the
    undistillable mode that is the attacker's best model, so only text that is hard for all of them pays. "max": the
    proxy with the largest gap: in the distillable mode only text that is easy for all of them pays. Of equal gaps the
    first counts.

    Args:
      gaps: f32[K, B], see `likelihood_gap`.
      ensemble: one of `ENSEMBLES`; None is the one proxy alone.

    Raises:
      ValueError: an unknown ensemble, or none for several proxies.
    """
    gaps = jnp.asarray(gaps, jnp.float32)
    count = gaps.shape[0]
    if ensemble not in (*ENSEMBLES, None) or (ensemble is None and count != 1):
        raise ValueError(f"ensemble of {count} proxies must be one of {ENSEMBLES}, got {ensemble!r}")
    if ensemble in (None, "mean"):
        return jnp.full(gaps.shape, 1.0 / count)
    chosen = gaps.argmin(axis=0) if ensemble == "min" else gaps.argmax(axis=0)
    return jax.nn.one_hot(chosen, count, axis=0)


def weigh_proxies(values: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """sum_k weights[k] * values[k], of K arrays f32[B] or f32[B, T]; of one proxy its own values."""
    if len(values) == 1:
        return values[0]
    stacked = jnp.stack(values)
    return (jnp.expand_dims(weights, tuple(range(2, stacked.ndim))) * stacked).sum(axis=0)


def gate_within_correct(
    reward: jax.Array, correct: jax.Array, num_samples: int, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Lets the calibration reward rank the correct rollouts only.

    A wrong rollout gets the worst calibration reward of the correct ones in its group, so it never gains by
    its style; in a group without a correct rollout the calibration reward is 0 for all. Without the gate such
    a group is driven by calibration alone, and the undistillable mode can run away from the task.

    Args:
      reward: f32[B] calibration rewards.
      correct: bool[B].
      num_samples: G.
      mask: bool[B], rows whose calibration reward exists (all by default).

    Returns:
      (f32[B] gated reward, bool[B] rows that have one). A wrong row has one even if it could not be scored,
      because its value comes from the others; a correct row that could not be scored has none.

    Raises:
      ValueError: rows that are not whole groups.
    """
    groups = check_groups(reward.shape[0], num_samples)
    correct = jnp.asarray(correct, bool)
    known = correct if mask is None else correct & jnp.asarray(mask, bool)
    grouped = jnp.where(known, reward, jnp.inf).reshape(groups, num_samples)
    worst = jnp.repeat(grouped.min(axis=1), num_samples)
    any_known = jnp.isfinite(worst)
    gated = jnp.where(known, reward, jnp.where(any_known, worst, 0.0))
    return gated, (known | ~correct) & any_known


def span_credit(
    terms: SpanTerms,
    id_t: jax.Array,
    reward: jax.Array,
    own: jax.Array,
    token_mask: jax.Array,
    num_samples: int,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Credit of each teacher token: what the reward gains over the group's rate from here to the end.

        credit_t = sum over spans k >= id_t(t) of (term_k - rate * share_k),   rate = mean reward of the group

    The rate is charged for every byte, because a reward *per byte* is a ratio: E[gap] / E[bytes] has the
    gradient of E[gap - rate * bytes], and without the charge a token would be blamed for nothing but how much
    text follows it. At the first token the credit is the row's reward minus the rate, which is what credit by
    sequence gives to every token. (Units "sum" have no share: the credit is then the plain reward-to-go, and
    the rate is left to the normalisation.)

    Args:
      terms: from `calibration_reward`.
      id_t: i32[B, T], span of each teacher token.
      reward: f32[B], the sequence reward, gated if there is a gate.
      own: bool[B], rows whose spans count. The others (wrong rollouts under the gate) get reward - rate at
        every token.
      token_mask: bool[B, T], real completion tokens.
      num_samples: G.
      mask: bool[B], rows that have a reward.

    Returns:
      (f32[B, T] credit, not yet normalised (`advantages.combine` does that), bool[B, T] tokens that have
      credit).

    Raises:
      ValueError: rows that are not whole groups.
    """
    groups = check_groups(reward.shape[0], num_samples)
    mask = jnp.ones(reward.shape, bool) if mask is None else jnp.asarray(mask, bool)
    inside = mask.reshape(groups, num_samples)
    total = jnp.where(inside, reward.reshape(groups, num_samples), 0.0).sum(axis=1)
    rate = jnp.repeat(total / jnp.maximum(inside.sum(axis=1), 1), num_samples)
    excess = terms.reward - rate[:, None] * terms.share
    to_go = jnp.cumsum(excess[:, ::-1], axis=1)[:, ::-1]
    of_token = jnp.take_along_axis(to_go, id_t, axis=1)
    whole = (reward - rate)[:, None]
    has_credit = token_mask & mask[:, None]
    credit = jnp.where(own[:, None], of_token, jnp.broadcast_to(whole, of_token.shape))
    return jax.lax.stop_gradient(jnp.where(has_credit, credit, 0.0)), has_credit
