"""The student step, one pure jitted function: cross-entropy on completions, a divergence from a teacher, or both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.logprobs import score_completions
from distill_jax.models.decoder import Decoder, Params
from distill_jax.sequences import Sequences
from distill_jax.students.divergence_config import StudentLoss
from distill_jax.students.divergences import completion_terms
from distill_jax.students.targets import Teacher, TopKTargets


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


CROSS_ENTROPY = StudentLoss()

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


def student_loss(
    module: Decoder,
    params: Params,
    sequences: Sequences,
    loss: StudentLoss,
    teacher: Teacher | TopKTargets | None = None,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(sum, count, sums of the parts) of `loss` over the completion tokens of all rows, in nats; differentiable.

    parts: "cross_entropy" and "divergence", unweighted; none for the cross-entropy alone. See `completion_terms` for
    the other arguments and what it raises.

    Raises:
      ValueError: a divergence without a teacher, or a teacher without a divergence.
    """
    if (teacher is None) != (loss.divergence is None):
        raise ValueError(
            f"a divergence needs a teacher (or its stored targets), and a teacher a divergence; got divergence "
            f"{loss.divergence} and teacher {type(teacher).__name__}"
        )
    options: dict[str, Any] = {"adapter": adapter, "scale": scale, "chunk": chunk}
    if teacher is None or loss.divergence is None:
        total, count = cross_entropy(module, params, sequences, **options)
        return loss.cross_entropy * total, count, {}
    terms = completion_terms(module, params, sequences, teacher, loss.divergence, **options)
    parts = {"cross_entropy": terms[0].sum(), "divergence": terms[1].sum()}
    total = loss.cross_entropy * parts["cross_entropy"] + loss.weight * parts["divergence"]
    return total, sequences.completion_length.sum().astype(jnp.float32), parts


def apply_gradient(
    optimizer: optax.GradientTransformation,
    state: StudentState,
    loss: jax.Array,
    gradient: Params,
    learning_rate: jax.Array,
) -> tuple[StudentState, dict[str, jax.Array]]:
    """(new state, {"grad_norm", "skipped_steps"}): one update; nothing but the counters moves if it is not finite."""
    norm = optax.tree.norm(gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
    tree = optax.apply_updates(state.trainable, jax.tree.map(lambda u: learning_rate * u, updates))
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    keep = functools.partial(jnp.where, finite)
    skipped = state.skipped + jnp.where(finite, 0, 1)
    kept = jax.tree.map(keep, (tree, opt_state), (state.trainable, state.opt_state))
    metrics = {"grad_norm": norm, "skipped_steps": skipped.astype(jnp.float32)}
    return StudentState(state.step + 1, kept[0], kept[1], skipped), metrics


def make_student_step(
    module: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str = "params",
    scale: float = 1.0,
    logit_chunk: int = 64,
    replicas: int = 0,
    loss: StudentLoss = CROSS_ENTROPY,
) -> StudentStep:
    """Makes the jitted step, which donates its state:

        (state, base_params, batch, learning_rate=1.0, *, teacher=None, targets=None) -> (state, metrics)

    value = sum over completion tokens of the loss / number of completion tokens in the batch

    Args:
      module: the student's decoder.
      optimizer: see `optimizer.make_optimizer`. The step multiplies its update by `learning_rate`: leave that at 1 for
        an optimizer with a schedule of its own.
      trainable: "params" trains every weight (base_params is then ignored and may be None); "adapter" trains
        `state.trainable` as a low-rank adapter on frozen base_params.
      scale: factor of the adapter's product.
      logit_chunk: tokens of a row whose logits exist at one time.
      replicas: R > 0 trains R students at once: state, batch and targets have a leading [R] dimension, base_params and
        teacher have not.
      loss: see `StudentLoss`. With a divergence the step takes either `teacher`, which scores the batch beside the
        student, or `targets`, its stored top ids of the rows of the batch.

    Returns:
      The step. Metrics, f32[] or f32[R]: loss (nats a token), grad_norm, tokens, skipped_steps, and with a divergence
      the unweighted parts cross_entropy and divergence (nats a token). A step whose gradient is not finite changes
      nothing but the step and skip counters. It raises ValueError as `student_loss` does.

    Raises:
      ValueError: unknown `trainable`, negative replicas.
    """
    if trainable not in ("params", "adapter"):
        raise ValueError(f"trainable must be 'params' or 'adapter', got {trainable!r}")
    if replicas < 0:
        raise ValueError(f"replicas must be at least 0, got {replicas}")

    def value_of(
        tree: Params, base: Params | None, batch: Sequences, given: Teacher | TopKTargets | None
    ) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        params, low_rank = (tree, {}) if trainable == "params" else (base, {"adapter": tree, "scale": scale})
        total, count, parts = student_loss(module, params, batch, loss, given, chunk=logit_chunk, **low_rank)
        tokens = jnp.maximum(count, 1)
        return total / tokens, (count, {name: part / tokens for name, part in parts.items()})

    def step(
        state: StudentState,
        base: Params | None,
        batch: Sequences,
        learning_rate: jax.Array,
        given: Teacher | TopKTargets | None,
    ) -> tuple[StudentState, dict[str, jax.Array]]:
        value_and_grad = jax.value_and_grad(value_of, has_aux=True)
        (value, (count, parts)), grads = value_and_grad(state.trainable, base, batch, given)
        state, applied = apply_gradient(optimizer, state, value, grads, learning_rate)
        return state, {"loss": value, "tokens": count, **applied, **parts}

    def run(
        state: StudentState,
        base: Params | None,
        batch: Sequences,
        learning_rate: jax.Array,
        teacher: Teacher | None,
        targets: TopKTargets | None,
    ) -> tuple[StudentState, dict[str, jax.Array]]:
        def one(own: tuple[StudentState, Sequences, TopKTargets | None]) -> tuple[StudentState, dict]:
            state, batch, targets = own
            return step(state, base, batch, learning_rate, teacher if targets is None else targets)

        if not replicas:
            return one((state, batch, targets))
        # One replica after another inside one call: the temporaries of one are in use at a time. Under vmap those of
        # all R would be, which took 1.6 times as long for three small students on a CPU.
        return jax.lax.map(one, (state, batch, targets))

    jitted = jax.jit(run, donate_argnums=0)

    def call(
        state: StudentState,
        base: Params | None,
        batch: Sequences,
        learning_rate: float = 1.0,
        *,
        teacher: Teacher | None = None,
        targets: TopKTargets | None = None,
    ) -> tuple[StudentState, dict[str, jax.Array]]:
        if teacher is not None and targets is not None:
            raise ValueError("a step takes a teacher or its stored targets, got both")
        return jitted(state, base, batch, jnp.float32(learning_rate), teacher, targets)

    return call
