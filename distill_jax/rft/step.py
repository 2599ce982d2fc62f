"""The reinforcement step: one pure function, `(state, params, batch) -> (state, metrics)`, jitted, donated.

    per token   l = -min(r A, clip(r) A) + anchor        r = pi / pi_old,  A = advantage (- coefficient * k1)
    loss        = sum of l / count, as the algorithm aggregates, over the whole batch

Micro-batches add up gradients of *sums* and the counts; the division happens once, so the result is that of
the whole batch whatever the lengths of its rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.distribution import check_distribution
from distill_jax.logprobs import score_completions
from distill_jax.mesh import named_sharding
from distill_jax.models.decoder import Decoder, Params
from distill_jax.rft import losses
from distill_jax.rft.advantages import check_groups
from distill_jax.rft.micro_batches import split_rows
from distill_jax.sequences import Sequences

TRAINABLE = ("adapter", "params")
DEFAULT_ANCHOR = losses.KLAnchor("k1", "reward", 0.02)


@dataclasses.dataclass(frozen=True)
class RftConfig:
    """What a step computes; static under jit.

    Attributes:
      algorithm: "grpo", "dapo", "dr_grpo", "gspo" or "rloo"; see `losses.aggregate` and
        `losses.importance_ratio`.
      num_samples: G rollouts a prompt.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      kl: the anchor to the reference.
      micro_batches: pieces in which a batch goes through the model; changes memory, not the result.
      temperature, top_k, top_p: the distribution that was sampled from, which is the one that is trained.
      logit_chunk: tokens of a row whose logits exist at one time.
      max_tokens: the constant length that "dr_grpo" divides by; only there.

    Raises:
      ValueError: a value out of range, or max_tokens without "dr_grpo" and the other way round.
    """

    algorithm: str = "grpo"
    num_samples: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: losses.KLAnchor = DEFAULT_ANCHOR
    micro_batches: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    logit_chunk: int = 64
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in losses.ALGORITHMS:
            raise ValueError(f"algorithm must be one of {losses.ALGORITHMS}, got {self.algorithm!r}")
        if self.num_samples < 2:
            raise ValueError(
                f"num_samples must be at least 2, got {self.num_samples}: advantages compare rollouts"
            )
        if not 0 < self.clip_low <= 1 or not self.clip_high > 0:
            raise ValueError(
                f"clip_low must be in (0, 1] and clip_high positive, got {self.clip_low} and {self.clip_high}"
            )
        for name in ("micro_batches", "logit_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_distribution(self.temperature, self.top_k, self.top_p)
        if (self.max_tokens is not None) != (self.algorithm == "dr_grpo"):
            raise ValueError(
                f"max_tokens is the divisor of 'dr_grpo' and of nothing else; got {self.max_tokens} with "
                f"algorithm={self.algorithm!r}"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RftState:
    """What a step reads and replaces.

    step: i32[], updates so far, skipped ones counted; trainable: the adapter, or all parameters; opt_state:
      optax; skipped: i32[],
    updates left out because their loss or gradient was not finite.
    """

    step: jax.Array
    trainable: Params
    opt_state: Any
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RftBatch:
    """B = prompts x G rollouts with what they earned.

    Attributes:
      sequences: the rollouts.
      advantages: f32[B], or f32[B, T] with a credit for each token; computed over whole groups.
      lp_reference: f32[B, T] under the reference, at the temperature, top-k and top-p of the config.
      lp_old: f32[B, T] under the policy that wrote them, or None: then the batch is on-policy and the ratio
        is 1, with its gradient. A batch that is used for more than one update needs it.
    """

    sequences: Sequences
    advantages: jax.Array
    lp_reference: jax.Array
    lp_old: jax.Array | None = None


RftStep = Callable[[RftState, Params | None, RftBatch], tuple[RftState, dict[str, jax.Array]]]


def init_rft_state(trainable: Params, optimizer: optax.GradientTransformation) -> RftState:
    """A state at step 0, laid out as the step's outputs are: moments as the trainable tree, counters replicated.

    The trainable tree is copied, because the step donates its state.
    """
    trainable = jax.tree.map(jnp.copy, trainable)
    first = jax.tree.leaves(trainable)[0]
    state = RftState(jnp.int32(0), trainable, optimizer.init(trainable), jnp.int32(0))
    if not first.committed:
        return state
    # An array that is bound to its device and one that is not are two compilations, so all are bound.
    mesh = first.sharding.mesh if isinstance(first.sharding, NamedSharding) else None
    everywhere = first.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())
    opt_state = _map_moments(
        optimizer,
        lambda moment, leaf: jax.device_put(moment, leaf.sharding),
        state.opt_state,
        trainable,
        lambda leaf: jax.device_put(leaf, everywhere),
    )
    step, skipped = jax.device_put((state.step, state.skipped), everywhere)
    return RftState(step, trainable, opt_state, skipped)


def _map_moments(
    optimizer: optax.GradientTransformation,
    function: Callable[[jax.Array, Any], jax.Array],
    opt_state: Any,
    tree: Any,
    function_of_rest: Callable[[jax.Array], jax.Array],
) -> Any:
    """`function(moment, leaf)` of every moment and its leaf of `tree`, `function_of_rest` of every other array.

    An optimizer with two rules (muon and Adam) keeps holes where the leaf belongs to the other rule; they stay.
    """

    def is_hole(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return optax.tree.map_params(
        optimizer,
        lambda moment, leaf: moment if is_hole(moment) else function(moment, leaf),
        opt_state,
        tree,
        transform_non_params=lambda leaf: leaf if is_hole(leaf) else function_of_rest(leaf),
        is_leaf=is_hole,
    )


def rft_gradients(
    module: Decoder,
    config: RftConfig,
    trainable_tree: Params,
    params: Params | None,
    batch: RftBatch,
    *,
    trainable: str = "adapter",
    scale: float = 1.0,
) -> tuple[Params, dict[str, jax.Array]]:
    """(gradient of the loss, metrics) of the whole batch, accumulated over `config.micro_batches`. Pure.

    Metrics, f32[]: loss, kl_k1, kl_k3, kl_clamped (share of tokens at which a clamp of the estimators acts),
    entropy, ratio_mean, ratio_max, clip_fraction; means are over completion tokens.

    Raises:
      ValueError: rows that are not whole groups, or do not divide by micro_batches.
    """
    rows = batch.sequences.tokens.shape[0]
    check_groups(rows, config.num_samples)
    if rows % config.micro_batches:
        raise ValueError(f"a batch of {rows} rows does not divide into micro_batches={config.micro_batches}")

    def loss_sum(tree: Params, micro: RftBatch) -> tuple[jax.Array, tuple[dict[str, Any], jax.Array]]:
        total, count, sums, largest = _loss_and_sums(module, config, tree, params, micro, trainable, scale)
        return total, ({"loss": (total, count), **sums}, largest)

    differentiate = jax.grad(loss_sum, has_aux=True)
    if config.micro_batches == 1:
        gradient, (sums, ratio_max) = differentiate(trainable_tree, batch)
    else:
        micro_batches = jax.tree.map(lambda x: split_rows(x, config.micro_batches, module.mesh), batch)

        def accumulate(carry: Any, micro: RftBatch) -> tuple[Any, None]:
            gradient, (sums, ratio_max) = differentiate(trainable_tree, micro)
            return (
                *jax.tree.map(jnp.add, carry[:2], (gradient, sums)),
                jnp.maximum(carry[2], ratio_max),
            ), None

        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(differentiate, trainable_tree, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][0]))
        (gradient, sums, ratio_max), _ = jax.lax.scan(
            accumulate, (*zeros, jnp.float32(-jnp.inf)), micro_batches
        )
    loss_count = jnp.maximum(sums["loss"][1], 1.0)
    gradient = jax.tree.map(lambda g: g / loss_count.astype(g.dtype), gradient)
    metrics = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in sums.items()}
    return gradient, {**metrics, "ratio_max": ratio_max}


def _loss_and_sums(
    module: Decoder,
    config: RftConfig,
    tree: Params,
    params: Params | None,
    batch: RftBatch,
    trainable: str,
    scale: float,
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]], jax.Array]:
    """(sum, count) of the loss, (sum, count) of each metric, and the largest ratio, of one micro-batch."""
    scores = score_completions(
        module,
        tree if trainable == "params" else params,
        batch.sequences,
        adapter=tree if trainable == "adapter" else None,
        scale=scale,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        chunk=config.logit_chunk,
    )
    lp, mask = scores.lp, batch.sequences.completion_mask
    lp_old = jax.lax.stop_gradient(lp if batch.lp_old is None else batch.lp_old)
    advantages = losses.per_token(batch.advantages, mask)
    advantages = advantages + losses.anchor_reward(config.kl, lp_old, batch.lp_reference, mask)
    ratio = losses.importance_ratio(lp, lp_old, mask, config.algorithm)
    terms = losses.clipped_terms(ratio, advantages, config.clip_low, config.clip_high)
    terms = terms + losses.anchor_terms(config.kl, lp, lp_old, batch.lp_reference, mask)
    total, count = losses.aggregate(terms, mask, config.algorithm, config.max_tokens)

    fixed_ratio, fixed_lp = jax.lax.stop_gradient((ratio, lp))
    tokens = mask.sum().astype(jnp.float32)
    sums = {
        "kl_k1": (losses.k1(fixed_lp, batch.lp_reference, mask).sum(), tokens),
        "kl_k3": (losses.k3(fixed_lp, batch.lp_reference, mask).sum(), tokens),
        "kl_clamped": losses.clamped_terms(fixed_lp, batch.lp_reference, mask),
        "entropy": (jax.lax.stop_gradient(scores.entropy).sum(), tokens),
        "ratio_mean": (jnp.where(mask, fixed_ratio, 0.0).sum(), tokens),
        "clip_fraction": losses.clip_fraction(fixed_ratio, mask, config.clip_low, config.clip_high),
    }
    return total, count, sums, jnp.where(mask, fixed_ratio, -jnp.inf).max()


Update = Callable[[RftState, Params, jax.Array], tuple[RftState, jax.Array]]


def make_update(
    module: Decoder, optimizer: optax.GradientTransformation, axes: Params | None = None
) -> Update:
    """Makes `(state, gradient, loss) -> (new state, norm of the gradient)`, to be called inside a jitted step.

    An update whose loss or gradient is not finite is left out and counted in `skipped`.

    Args:
      module: its mesh is where the state lies.
      optimizer: clips the gradient itself; the norm is that before.
      axes: logical axes of the trainable tree. With them the new state is held to the shardings that they say, so that
        the second step runs the first one's compilation. Needed on a mesh of more than one device.

    Raises:
      ValueError: a mesh of more than one device without axes.
    """
    if module.mesh is not None and module.mesh.size > 1 and axes is None:
        raise ValueError("on a mesh of more than one device give axes=adapter_axes(...) or param_axes(...)")

    shardings: Params | None = None
    everywhere: NamedSharding | None = None
    if module.mesh is not None and axes is not None:
        place = functools.partial(named_sharding, module.mesh)
        shardings = jax.tree.map(place, axes, is_leaf=lambda names: isinstance(names, tuple))
        everywhere = place(())

    def hold(tree: Params) -> Params:
        """Keeps each leaf where `axes` put it; without a mesh the tree goes through unchanged."""
        if shardings is None:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)

    def hold_optimizer(opt_state: Any) -> Any:
        """The same for the optimizer's moments, which have the shapes of the trainable tree."""
        if shardings is None:
            return opt_state
        return _map_moments(
            optimizer,
            jax.lax.with_sharding_constraint,
            opt_state,
            shardings,
            lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere),
        )

    def update(state: RftState, gradient: Params, loss: jax.Array) -> tuple[RftState, jax.Array]:
        gradient = hold(gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        updated = optax.apply_updates(state.trainable, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new = RftState(
            step=state.step + 1,
            trainable=hold(keep(updated, state.trainable)),
            opt_state=hold_optimizer(keep(opt_state, state.opt_state)),
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        return new, norm

    return update


def make_rft_step(
    module: Decoder,
    config: RftConfig,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str = "adapter",
    scale: float = 1.0,
    axes: Params | None = None,
) -> RftStep:
    """Makes the jitted step `(state, params, batch) -> (state, metrics)`; the state is donated.

    An update whose loss or gradient is not finite is left out: trainable and opt_state stay as they were,
      `skipped` counts it.

    Args:
      module: the teacher's decoder; its mesh is the step's mesh.
      config: static.
      optimizer: clips the gradient itself (`optimizer.make_optimizer` does, by its global norm); grad_norm is
        logged before.
      trainable: "adapter": state.trainable is a low-rank adapter on frozen `params`. "params": it is all
        parameters, and the step's `params` argument is ignored and may be None.
      scale: factor of the adapter's product (`adapter_scale`); 1 for "params".
      axes: logical axes of the trainable tree (`adapter_axes`, `param_axes`), see `make_update`.

    Returns:
      The step. Metrics are f32[]: those of `rft_gradients`, and grad_norm, skipped_steps (in total so far).

    Raises:
      ValueError: an unknown `trainable`, a scale without an adapter, a mesh without axes.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable must be one of {TRAINABLE}, got {trainable!r}")
    if trainable == "params" and scale != 1.0:
        raise ValueError(f"scale={scale} belongs to an adapter; with trainable='params' it must be 1")
    update = make_update(module, optimizer, axes)

    def step(
        state: RftState, params: Params | None, batch: RftBatch
    ) -> tuple[RftState, dict[str, jax.Array]]:
        gradient, metrics = rft_gradients(
            module, config, state.trainable, params, batch, trainable=trainable, scale=scale
        )
        new, norm = update(state, gradient, metrics["loss"])
        return new, {**metrics, "grad_norm": norm, "skipped_steps": new.skipped.astype(jnp.float32)}

    return jax.jit(step, donate_argnums=0)
