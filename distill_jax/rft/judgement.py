"""A batch of rollouts turned into advantages: rewards normalised one by one and added, and what is logged of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.masked import masked_sum
from distill_jax.rft.advantages import combine, group_normalise, saturated_groups
from distill_jax.rft.calibration import (
    SIGN,
    calibration_reward,
    gate_within_correct,
    likelihood_gap,
    proxy_weights,
    span_credit,
    weigh_proxies,
)
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.proxies import ProxyScores
from distill_jax.rft.rollout import Rollouts, Scored
from distill_jax.text.spans import align_spans

Sums = dict[str, tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judgement:
    """advantages: f32[B] or f32[B, T]; gap_per_byte: f32[B]; sums: name -> (sum, count) of what is logged."""

    advantages: jax.Array
    gap_per_byte: jax.Array
    sums: Sums


def judge(rollouts: Rollouts, scored: Scored, config: CalibrationConfig, arm: str, eta: float) -> Judgement:
    """Rewards and advantages of whole groups, compiled once."""
    sequences = rollouts.batch.sequences
    host = {
        "task": scored.task.rewards,
        "correct": scored.task.correct,
        "scorable": scored.scorable,
        "ended": rollouts.ended,
        "bytes": rollouts.bytes,
        "end_t": rollouts.byte_ends,
        "present_t": rollouts.present & rollouts.faithful[:, None],
    }
    return _judge(
        config,
        arm,
        eta,
        tuple(proxy.name for proxy in scored.proxies),
        host,
        scored.lp_teacher,
        tuple(_proxy_arrays(proxy) for proxy in scored.proxies),
        sequences.completion_mask,
        sequences.completion_length,
        {name: reward.values for name, reward in scored.further.items()},
    )


def _proxy_arrays(scores: ProxyScores) -> dict[str, Any]:
    encoded = scores.encoded
    length = np.asarray(encoded.sequences.completion_length)
    arrays = {
        "lp": scores.lp,
        "tokens": length,
        "end": encoded.byte_ends,
        "present": np.arange(encoded.byte_ends.shape[1])[None, :] < length[:, None],
    }
    if scores.answer is not None:
        arrays |= {"answer": scores.answer.lp_per_byte, "answer_known": scores.answer.known}
    return arrays


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _judge(
    config: CalibrationConfig,
    arm: str,
    eta: float,
    names: tuple[str, ...],
    host: dict[str, jax.Array],
    lp_teacher: jax.Array,
    proxies: tuple[dict[str, jax.Array], ...],
    token_mask: jax.Array,
    tokens: jax.Array,
    further: dict[str, jax.Array],
) -> Judgement:
    samples = config.rft.num_samples
    task, correct, scorable = host["task"], host["correct"], host["scorable"]
    mode = "distillable" if arm == "control" else arm  # eta is 0 there: any direction is logged alike
    size = {"per_byte": host["bytes"], "per_token": tokens, "sum": None}[config.units]
    aligned = [align_spans(host["end_t"], own["end"], host["present_t"], own["present"]) for own in proxies]
    rewards, terms = zip(
        *(
            calibration_reward(
                lp_teacher,
                own["lp"],
                size,
                mode,
                config.units,
                size_proxy=own["tokens"] if config.units == "per_token" else None,
                spans=spans if config.credit == "span" else None,
            )
            for own, spans in zip(proxies, aligned, strict=True)
        ),
        strict=True,
    )
    weights = proxy_weights(SIGN[mode] * jnp.stack(rewards), config.ensemble)
    reward, known = weigh_proxies(rewards, weights), scorable
    if config.within_correct:
        reward, known = gate_within_correct(reward, correct, samples, scorable)
    credit, credit_mask = reward, known
    if config.credit == "span":
        own_rows = scorable & correct if config.within_correct else scorable
        credits, masks = zip(
            *(
                span_credit(own, spans.id_t, reward, own_rows, token_mask, samples, known)
                for own, spans in zip(terms, aligned, strict=True)
                if own is not None
            ),
            strict=True,
        )
        credit, credit_mask = weigh_proxies(credits, weights), masks[0]
    added, further_sums = _further_advantages(config, further)
    if "answer" in proxies[0]:
        added, answer_sums = _answer_advantages(config, arm, proxies, correct, scorable, added)
        further_sums |= answer_sums
    advantages = combine(
        task,
        credit,
        eta,
        samples,
        eps=config.advantage_eps,
        floor=config.calibration_floor,
        scale=config.normalisation,
        ddof=config.advantage_ddof,
        mask=credit_mask,
        whiten_batch=config.whiten,
        further=added,
    )
    sums, gap_per_byte = _gap_sums(names, host, lp_teacher, proxies, weights, tokens)
    all_rows = jnp.ones(task.shape, bool)
    deviation = task.reshape(-1, samples).std(axis=1)
    sums |= {
        "reward_task_std": masked_sum(deviation, jnp.ones(deviation.shape, bool)),
        "saturated_groups": saturated_groups(task, samples),
        "advantage_task_abs": masked_sum(jnp.abs(advantages.task), all_rows),
        "advantage_calibration_abs": masked_sum(jnp.abs(advantages.calibration), credit_mask),
        "span_coverage": aligned[0].coverage()["bytes_t"],
    }
    sums |= further_sums
    return Judgement(advantages.total, gap_per_byte, sums)


def _further_advantages(
    config: CalibrationConfig, further: dict[str, jax.Array]
) -> tuple[jax.Array | None, Sums]:
    """The weighted sum of the config's rewards, each normalised in its group, and what is logged of each."""
    total: jax.Array | None = None
    sums: Sums = {}
    for term in config.rewards:
        if term.name not in further:
            continue
        known = ~jnp.isnan(further[term.name])
        values = jnp.where(known, further[term.name], 0.0)
        normalised = group_normalise(
            values,
            config.rft.num_samples,
            eps=config.advantage_eps,
            scale=config.normalisation,
            ddof=config.advantage_ddof,
            mask=known,
        )
        total = term.weight * normalised + (0.0 if total is None else total)
        sums[f"reward_{term.name}"] = masked_sum(values, known)
        sums[f"advantage_{term.name}_abs"] = masked_sum(jnp.abs(normalised), known)
    return total, sums


def _answer_advantages(
    config: CalibrationConfig,
    arm: str,
    proxies: tuple[dict[str, jax.Array], ...],
    correct: jax.Array,
    scorable: jax.Array,
    added: jax.Array | None,
) -> tuple[jax.Array | None, Sums]:
    """`added` and the weighted answer-utility reward, and what is logged of it."""
    samples = config.rft.num_samples
    values = [own["answer"] for own in proxies]
    # An answer that is likely is a small gap: the proxy that counts is chosen by the same words.
    utility = weigh_proxies(values, proxy_weights(-jnp.stack(values), config.ensemble))
    has_answer = known = jnp.stack([own["answer_known"] for own in proxies]).all(axis=0) & scorable
    reward = -SIGN["distillable" if arm == "control" else arm] * utility
    if config.within_correct:
        reward, known = gate_within_correct(reward, correct, samples, known)
    normalised = group_normalise(
        reward,
        samples,
        eps=config.advantage_eps,
        floor=config.answer_floor,
        scale=config.normalisation,
        ddof=config.advantage_ddof,
        mask=known,
    )
    sums = {
        "answer_utility": masked_sum(utility, has_answer),
        "advantage_answer_utility_abs": masked_sum(jnp.abs(normalised), known),
    }
    if arm != "control":
        added = config.answer_utility * normalised + (0.0 if added is None else added)
    return added, sums


def _gap_sums(
    names: tuple[str, ...],
    host: dict[str, jax.Array],
    lp_teacher: jax.Array,
    proxies: tuple[dict[str, jax.Array], ...],
    weights: jax.Array,
    tokens: jax.Array,
) -> tuple[Sums, jax.Array]:
    """What is logged of any batch, as (sum, count), and the gap per byte of each row."""
    task, scorable = host["task"], host["scorable"]
    sum_teacher = lp_teacher.sum(axis=1)
    of_proxies = [own["lp"].sum(axis=1) for own in proxies]
    gaps = [likelihood_gap(sum_teacher, own, host["bytes"]) for own in of_proxies]
    gap_per_byte = weigh_proxies(gaps, weights)
    rows = jnp.ones(task.shape, bool)
    sums = {
        "reward_task": masked_sum(task, rows),
        "correct": masked_sum(host["correct"].astype(jnp.float32), rows),
        "gap_raw": masked_sum(sum_teacher - weigh_proxies(of_proxies, weights), scorable),
        "gap_per_byte": masked_sum(gap_per_byte, scorable),
        "completion_bytes": masked_sum(host["bytes"].astype(jnp.float32), rows),
        "completion_tokens": masked_sum(tokens.astype(jnp.float32), rows),
        "ended": masked_sum(host["ended"].astype(jnp.float32), rows),
        "unscorable": masked_sum(1.0 - scorable.astype(jnp.float32), rows),
    }
    if len(names) > 1:
        sums |= {
            f"gap_per_byte_{name}": masked_sum(gap, scorable) for name, gap in zip(names, gaps, strict=True)
        }
    return sums, gap_per_byte
