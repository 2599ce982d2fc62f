"""The supervised student step: next-token cross-entropy on completions, one pure jitted function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.logprobs import score_completions
from distill_jax.models.decoder import Decoder, Params
from distill_jax.sequences import Sequences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StudentState:
    """What a step reads and replaces. With replicas every leaf has a leading [R] dimension.

    step: i32[]; trainable: parameters or adapter; opt_state: optax; skipped: i32[], steps with a non-finite gradient.
    """

    step: jax.Array
    trainable: Params
    opt_state: Any
    skipped: jax.Array


StudentStep = Callable[..., tuple[StudentState, dict[str, jax.Array]]]


def cross_entropy(
    module: Decoder,
    params: Params,
    sequences: Sequences,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of -log p(completion token) over the completion tokens of all rows, in nats; differentiable."""
    scores = score_completions(module, params, sequences, adapter=adapter, scale=scale, chunk=chunk)
    return -scores.lp.sum(), sequences.completion_length.sum().astype(jnp.float32)


def init_student_state(
    trainable: Params, optimizer: optax.GradientTransformation, replicas: int = 0
) -> StudentState:
    """A state at step 0. The trainable tree is copied, since the step donates its state."""

    def init(tree: Params) -> StudentState:
        tree = jax.tree.map(jnp.array, tree)
        return StudentState(jnp.int32(0), tree, optimizer.init(tree), jnp.int32(0))

    return jax.jit(jax.vmap(init) if replicas else init)(trainable)


def make_student_step(
    module: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str = "params",
    scale: float = 1.0,
    logit_chunk: int = 64,
    replicas: int = 0,
) -> StudentStep:
    """Makes `(state, base_params, batch, learning_rate=1.0) -> (state, metrics)`, jitted, the state donated.

    loss = sum over completion tokens of -log p / number of completion tokens in the batch

    Args:
      module: the student's decoder.
      optimizer: see `optimizer.make_optimizer`. The step multiplies its update by `learning_rate`: leave that at 1 for
        an optimizer with a schedule of its own.
      trainable: "params" trains every weight (base_params is then ignored and may be None); "adapter" trains
        `state.trainable` as a low-rank adapter on frozen base_params.
      scale: factor of the adapter's product.
      logit_chunk: tokens of a row whose logits exist at one time.
      replicas: R > 0 trains R students at once: state and batch have a leading [R] dimension, base_params has not.

    Returns:
      The step. Metrics, f32[] or f32[R]: loss (nats a token), grad_norm, tokens, skipped_steps. A step whose gradient
      is not finite changes nothing but the step and skip counters.

    Raises:
      ValueError: unknown `trainable`, negative replicas.
    """
    if trainable not in ("params", "adapter"):
        raise ValueError(f"trainable must be 'params' or 'adapter', got {trainable!r}")
    if replicas < 0:
        raise ValueError(f"replicas must be at least 0, got {replicas}")

    def loss(tree: Params, base: Params | None, batch: Sequences) -> tuple[jax.Array, jax.Array]:
        if trainable == "params":
            total, count = cross_entropy(module, tree, batch, chunk=logit_chunk)
        else:
            total, count = cross_entropy(module, base, batch, adapter=tree, scale=scale, chunk=logit_chunk)
        return total / jnp.maximum(count, 1), count

    def step(
        state: StudentState, base: Params | None, batch: Sequences, learning_rate: jax.Array
    ) -> tuple[StudentState, dict[str, jax.Array]]:
        (value, count), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable, base, batch)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        tree = optax.apply_updates(state.trainable, jax.tree.map(lambda u: learning_rate * u, updates))
        finite = jnp.isfinite(norm) & jnp.isfinite(value)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new, old)

        skipped = state.skipped + jnp.where(finite, 0, 1)
        new_state = StudentState(
            state.step + 1,
            jax.tree.map(keep, tree, state.trainable),
            jax.tree.map(keep, opt_state, state.opt_state),
            skipped,
        )
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "tokens": count,
            "skipped_steps": skipped.astype(jnp.float32),
        }
        return new_state, metrics

    def step_replicas(
        state: StudentState, base: Params | None, batch: Sequences, learning_rate: jax.Array
    ) -> tuple[StudentState, dict[str, jax.Array]]:
        # One replica after another inside one call: the temporaries of one are in use at a time. Under vmap those of
        # all R would be, which took 1.6 times as long for three small students on a CPU.
        return jax.lax.map(lambda own: step(own[0], base, own[1], learning_rate), (state, batch))

    jitted = jax.jit(step_replicas if replicas else step, donate_argnums=0)

    def call(
        state: StudentState, base: Params | None, batch: Sequences, learning_rate: float = 1.0
    ) -> tuple[StudentState, dict[str, jax.Array]]:
        return jitted(state, base, batch, jnp.float32(learning_rate))

    return call
