"""Student steps across tokenizers: span likelihood matching, and sorted distributions as a baseline.

The first learns from scores that the teacher gave before training, see `students.aligned_texts`. The second needs the
teacher's distributions, so there the teacher runs in the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.logprobs import completion_states, map_token_chunks, score_completions
from distill_jax.masked import length_mask, masked_sum, zero_masked
from distill_jax.models.decoder import Decoder, Params, unembed
from distill_jax.students.aligned_texts import AlignedTexts
from distill_jax.students.cross_tokenizer import ALM_UNITS, alm, alm_terms, comparable_spans, uld_distance
from distill_jax.students.step import StudentState, apply_gradient
from distill_jax.students.targets import Teacher

ULD_PAIRINGS = ("spans", "positions")
TRAINABLE = ("params", "adapter")

Metrics = dict[str, jax.Array]


def make_alm_step(
    module: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    kind: str = "kl",
    tau: float = 100.0,
    unit: str = "span",
    cross_entropy_weight: float = 0.0,
    trainable: str = "params",
    scale: float = 1.0,
    logit_chunk: int = 64,
    replicas: int = 0,
) -> Callable[..., tuple[StudentState, Metrics]]:
    """Makes `(state, base_params, texts, learning_rate=1.0) -> (state, metrics)`, jitted, the state donated.

        loss = alm.sum / alm.count + cross_entropy_weight * (-log p of the student's completion tokens).mean

    Args:
      module: the student's decoder.
      optimizer, trainable, scale, logit_chunk, replicas: as in `make_student_step`.
      kind, tau, unit: see `cross_tokenizer.alm`.
      cross_entropy_weight: >= 0; of next-token prediction on the same text.

    Returns:
      The step; texts: `AlignedTexts`. Metrics, f32[] or f32[R]: loss, alm (nats a span or token), cross_entropy (nats a
      token), spans, tokens, coverage (share of the student's bytes in comparable spans), grad_norm, skipped_steps.

    Raises:
      ValueError: unknown kind, unit or trainable, negative replicas or weight, tau that is not positive.
    """
    _check_options(trainable, cross_entropy_weight, replicas)
    # Refuses wrong options now and not at the first step.
    alm_terms(jnp.float32(-1), jnp.float32(-1), kind=kind, tau=tau)
    if unit not in ALM_UNITS:
        raise ValueError(f"unit must be one of {ALM_UNITS}, got {unit!r}")

    def loss(tree: Params, base: Params | None, texts: AlignedTexts) -> tuple[jax.Array, Metrics]:
        weights: dict[str, Any] = {"chunk": logit_chunk, **student_weights(tree, base, trainable, scale)}
        lp_s = score_completions(module, sequences=texts.student, **weights).lp
        spans = texts.spans()
        matched, count = alm(spans, texts.lp_t, lp_s, kind=kind, tau=tau, unit=unit)
        known = comparable_spans(spans, texts.lp_t, lp_s)[2]
        tokens = texts.student.completion_length.sum().astype(jnp.float32)
        entropy = -lp_s.sum() / jnp.maximum(tokens, 1)
        value = matched / jnp.maximum(count, 1)
        inside = zero_masked(spans.bytes, known).sum().astype(jnp.float32)
        metrics = {
            "alm": value,
            "cross_entropy": entropy,
            "spans": known.sum().astype(jnp.float32),
            "tokens": tokens,
            "coverage": inside / jnp.maximum(spans.scored_bytes_s.sum(), 1),
        }
        return value + cross_entropy_weight * entropy, metrics

    return _make_step(loss, optimizer, replicas)


def make_uld_step(
    module: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    top_k: int = 0,
    pairing: str = "positions",
    cross_entropy_weight: float = 1.0,
    trainable: str = "params",
    scale: float = 1.0,
    logit_chunk: int = 64,
    replicas: int = 0,
) -> Callable[..., tuple[StudentState, Metrics]]:
    """Makes `(state, (base_params, teacher), texts, learning_rate=1.0) -> (state, metrics)`; teacher: a `Teacher`.

        loss = uld_distance, mean over pairs + cross_entropy_weight * (-log p of the student's completion tokens).mean

    A baseline: see `cross_tokenizer.uld_distance`.

    Args:
      top_k: see `uld_distance`.
      pairing: "positions" compares completion token i with completion token i, up to the shorter completion, as
        published; "spans" compares the predictions of the first tokens of each span, where both sides have read the
        same bytes.
      cross_entropy_weight: >= 0; 1 as published.
      module, optimizer, trainable, scale, logit_chunk, replicas: as in `make_student_step`.

    Returns:
      The step; texts: `AlignedTexts`, whose lp_t is not read. Metrics: loss, uld (0 to 2), cross_entropy (nats a
      token), pairs, tokens, grad_norm, skipped_steps.

    Raises:
      ValueError: an unknown pairing or trainable, negative top_k, replicas or weight.
    """
    _check_options(trainable, cross_entropy_weight, replicas)
    if pairing not in ULD_PAIRINGS or top_k < 0:
        raise ValueError(f"pairing must be one of {ULD_PAIRINGS} and top_k >= 0, got {pairing!r} and {top_k}")

    def loss(
        tree: Params, frozen: tuple[Params | None, Teacher], texts: AlignedTexts
    ) -> tuple[jax.Array, Metrics]:
        base, teacher = frozen
        teacher.check(texts.teacher)
        own = student_weights(tree, base, trainable, scale)
        theirs = {"params": teacher.params, "adapter": teacher.adapter, "scale": teacher.scale}
        hidden_s, tokens = completion_states(module, sequences=texts.student, **own)
        hidden_t, _ = completion_states(teacher.module, sequences=texts.teacher, **theirs)

        def distance(hidden_t: jax.Array, hidden_s: jax.Array) -> jax.Array:
            p_t = jax.nn.softmax(unembed(teacher.module, hidden=hidden_t, **theirs))
            return uld_distance(p_t, jax.nn.softmax(unembed(module, hidden=hidden_s, **own)), top_k)

        def surprise(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = unembed(module, hidden=hidden, **own)
            # A comparison, where a gather would do: its gradient is no scatter.
            hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == tokens[..., None]
            return jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0.0).sum(axis=-1)

        slots_t, slots_s, mask = _uld_pairs(texts, pairing)
        paired = (
            jnp.take_along_axis(hidden_t, slots_t[..., None], axis=1),
            jnp.take_along_axis(hidden_s, slots_s[..., None], axis=1),
        )
        distances, pairs = masked_sum(map_token_chunks(distance, paired, logit_chunk, module.mesh), mask)
        surprises, count = masked_sum(
            map_token_chunks(surprise, (hidden_s, tokens), logit_chunk, module.mesh),
            texts.student.completion_mask,
        )
        uld, entropy = distances / jnp.maximum(pairs, 1), surprises / jnp.maximum(count, 1)
        metrics = {"uld": uld, "cross_entropy": entropy, "pairs": pairs, "tokens": count}
        return uld + cross_entropy_weight * entropy, metrics

    return _make_step(loss, optimizer, replicas)


def _uld_pairs(texts: AlignedTexts, pairing: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(teacher's completion slots, student's, mask), i32[B, N], i32[B, N], bool[B, N]."""
    if pairing == "spans":
        spans = texts.spans()
        return zero_masked(spans.start_t, spans.valid), zero_masked(spans.start_s, spans.valid), spans.valid
    size = min(texts.end_t.shape[1], texts.end_s.shape[1])
    shorter = jnp.minimum(texts.present_t.sum(axis=1), texts.student.completion_length)
    mask = length_mask(shorter, size)
    slots = zero_masked(jnp.broadcast_to(jnp.arange(size)[None, :], mask.shape), mask)
    return slots, slots, mask


def student_weights(tree: Params, base: Params | None, trainable: str, scale: float) -> dict[str, Any]:
    """Keyword arguments that tell a decoder's functions whose weights are trained."""
    if trainable == "params":
        return {"params": tree}
    return {"params": base, "adapter": tree, "scale": scale}


def _check_options(trainable: str, cross_entropy_weight: float, replicas: int) -> None:
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable must be 'params' or 'adapter', got {trainable!r}")
    if not cross_entropy_weight >= 0:
        raise ValueError(f"cross_entropy_weight must be at least 0, got {cross_entropy_weight}")
    if replicas < 0:
        raise ValueError(f"replicas must be at least 0, got {replicas}")


def _make_step(
    loss: Callable[[Params, Any, AlignedTexts], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    replicas: int,
) -> Callable[..., tuple[StudentState, Metrics]]:
    """The jitted update of a loss (trainable tree, frozen trees, texts) -> (value, metrics)."""

    def step(
        state: StudentState, frozen: Any, texts: AlignedTexts, learning_rate: jax.Array
    ) -> tuple[StudentState, Metrics]:
        texts = jax.tree.map(jnp.asarray, texts)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, texts)
        state, applied = apply_gradient(optimizer, state, value, gradient, learning_rate)
        return state, {"loss": value, **metrics, **applied}

    def step_replicas(
        state: StudentState, frozen: Any, texts: AlignedTexts, learning_rate: jax.Array
    ) -> tuple[StudentState, Metrics]:
        # One replica after another, as in `make_student_step`: the temporaries of one are in use at a time.
        return jax.lax.map(lambda own: step(own[0], frozen, own[1], learning_rate), (state, texts))

    jitted = jax.jit(step_replicas if replicas else step, donate_argnums=0)

    def call(
        state: StudentState, frozen: Any, texts: AlignedTexts, learning_rate: float = 1.0
    ) -> tuple[StudentState, Metrics]:
        return jitted(state, frozen, texts, jnp.float32(learning_rate))

    return call
