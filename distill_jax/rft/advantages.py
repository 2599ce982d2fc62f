"""Advantages: each reward normalised inside its group of rollouts, and only then added.

A *group* is the G rollouts of one prompt; row ``q * G + g`` is rollout g of prompt q. Everything here works
on whole groups, so it is called before a batch is split into micro-batches.

Why separately: a sum that is normalised afterwards loses its weights wherever one of its terms is constant.
In a group in which every answer is right, ``task + eta * calibration`` normalises to the same numbers for
every eta > 0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

SCALES = ("std", "none", "leave_one_out")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Advantages:
    """What a rollout (or, with span credit, a token) earns beyond its group.

    Attributes:
      total: f32[B] or f32[B, T]; ``task + further + eta * calibration``, whitened over the batch if that was asked for.
      task: f32[B], the normalised task reward.
      calibration: f32[B] or f32[B, T], the normalised calibration reward before it is multiplied by eta.
    """

    total: jax.Array
    task: jax.Array
    calibration: jax.Array


def check_groups(rows: int, num_samples: int) -> int:
    """Returns the number of groups in a batch of `rows` rows.

    Raises:
      ValueError: fewer than two samples a group, or rows that are not whole groups.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}: one rollout is its own mean")
    if rows == 0 or rows % num_samples:
        raise ValueError(
            f"a batch of {rows} rows does not hold whole groups of num_samples={num_samples}; rows must be "
            "prompts x num_samples, so change the number of prompts or num_samples"
        )
    return rows // num_samples


def group_normalise(
    rewards: jax.Array,
    num_samples: int,
    *,
    eps: float = 1e-4,
    floor: float = 0.0,
    scale: str = "std",
    ddof: int = 0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """GN(r) = (r - mean of the group) / (max(std of the group, floor) + eps).

    Sources: GRPO (arXiv 2402.03300, eq. 2; ddof and eps differ between implementations, TRL has ddof=1,
      eps=1e-4); Dr. GRPO
    (2503.20783) for scale="none"; RLOO (2402.14740) for scale="leave_one_out".

    Args:
      rewards: f32[B] with B = prompts x G, or f32[B, T] (a reward for each token; the statistics then run
        over all masked-in tokens of the group).
      num_samples: G.
      eps: added to the deviation.
      floor: the smallest deviation that is divided by, in the units of the reward. It keeps a difference that
        is no more than noise (every rollout in the same style) from being blown up to unit variance.
      scale: "std"; "none" (centred only); "leave_one_out" (r minus the mean of the *other* rollouts, no
        division).
      ddof: 0 for the population deviation, 1 for the sample deviation (Bessel).
      mask: bool, the shape of rewards; masked-out entries enter no statistic and get 0.

    Returns:
      f32, the shape of rewards; a constant for differentiation.

    Raises:
      ValueError: B is not whole groups, an unknown scale, a mask of another shape.
    """
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    if rewards.ndim not in (1, 2):
        raise ValueError(f"rewards must be f32[B] or f32[B, T], got shape {rewards.shape}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 (population) or 1 (sample), got {ddof}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != rewards.shape:
        raise ValueError(f"mask has shape {mask.shape}, rewards have {rewards.shape}; expected the same")
    groups = check_groups(rewards.shape[0], num_samples)
    grouped = jnp.where(mask, rewards, 0.0).reshape(groups, -1)
    inside = mask.reshape(groups, -1)
    count = inside.sum(axis=1, keepdims=True)
    mean = grouped.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(inside, grouped - mean, 0.0)
    if scale == "leave_one_out":
        # r - mean of the others = (r - mean of all) * n / (n - 1)
        normalised = centred * (count / jnp.maximum(count - 1, 1))
    elif scale == "std":
        variance = jnp.square(centred).sum(axis=1, keepdims=True) / jnp.maximum(count - ddof, 1)
        normalised = centred / (jnp.maximum(jnp.sqrt(variance), floor) + eps)
    else:
        normalised = centred
    return normalised.reshape(rewards.shape)


def whiten(x: jax.Array, eps: float = 1e-4, ddof: int = 0) -> jax.Array:
    """(x - mean) / (std + eps) over the whole batch, f32[B]; the last stage of GDPO (arXiv 2601.05242).

    In a batch in which *every* group is saturated this blows the remaining reward up to unit variance again.
    """
    centred = x - x.mean()
    return centred / (jnp.sqrt(jnp.square(centred).sum() / (x.size - ddof)) + eps)


def combine(
    task: jax.Array,
    calibration: jax.Array,
    eta: float,
    num_samples: int,
    *,
    eps: float = 1e-4,
    floor: float = 0.0,
    scale: str = "std",
    ddof: int = 0,
    mask: jax.Array | None = None,
    whiten_batch: bool = False,
    further: jax.Array | None = None,
) -> Advantages:
    """A = GN(task) + further + eta * GN_floor(calibration).

    Args:
      task: f32[B] task rewards.
      calibration: f32[B] calibration rewards, or f32[B, T] credit of each token (`calibration.span_credit`).
      eta: strength, >= 0; the direction is the mode of the calibration reward, not the sign of eta. 0 is the
        control arm.
      num_samples: G.
      eps, scale, ddof: see `group_normalise`; used for both rewards, and in whitening.
      floor: smallest deviation of the calibration reward that is divided by; the task reward has none.
      mask: bool, the shape of calibration: where a calibration reward exists. Elsewhere only the task reward
        counts.
      whiten_batch: whiten the sum over the batch (GDPO); needs f32[B].
      further: f32[B], the weighted sum of other rewards, each normalised by itself; None is 0.

    Returns:
      Advantages; total has the shape of calibration.

    Raises:
      ValueError: negative eta, shapes that do not fit, whitening of token credit, or what `group_normalise`
        raises.
    """
    if eta < 0:
        raise ValueError(
            f"eta must be >= 0, got {eta}; choose the direction with mode='distillable' or 'undistillable'"
        )
    task, calibration = jnp.asarray(task, jnp.float32), jnp.asarray(calibration, jnp.float32)
    if task.ndim != 1 or task.shape[0] != calibration.shape[0]:
        raise ValueError(
            f"task must be f32[B] with the rows of calibration, got {task.shape} and {calibration.shape}"
        )
    if whiten_batch and calibration.ndim != 1:
        raise ValueError(
            "whitening over the batch is defined for one advantage a rollout; use credit='sequence'"
        )
    task_part = group_normalise(task, num_samples, eps=eps, scale=scale, ddof=ddof)
    calibration_part = group_normalise(
        calibration, num_samples, eps=eps, floor=floor, scale=scale, ddof=ddof, mask=mask
    )
    rows = task_part if further is None else task_part + further
    total = (rows if calibration.ndim == 1 else rows[:, None]) + eta * calibration_part
    return Advantages(whiten(total, eps, ddof) if whiten_batch else total, task_part, calibration_part)


def saturated_groups(rewards: jax.Array, num_samples: int) -> tuple[jax.Array, jax.Array]:
    """(number of groups whose rewards are all equal, number of groups), f32[]; such groups teach nothing."""
    grouped = jnp.asarray(rewards, jnp.float32).reshape(
        check_groups(rewards.shape[0], num_samples), num_samples
    )
    same = grouped.max(axis=1) == grouped.min(axis=1)
    return same.sum().astype(jnp.float32), jnp.float32(same.shape[0])
