"""Optimizers and learning-rate schedules by name, from a frozen config."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from optax import contrib

NAMES = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """A named optimizer with warm-up and cosine decay.

    Attributes:
      name: "adamw", or "muon": orthogonalised momentum for every matrix, embedding and head included; for the
        vectors Adam with Nesterov momentum and without weight decay.
      learning_rate: peak.
      warmup_steps: linear from 0; shortened when a run has fewer than twice as many steps.
      final_fraction: where the cosine ends, as a fraction of the peak; 1 keeps the rate constant after the warm-up.
      weight_decay: decoupled.
      b2: second-moment decay of Adam.
      clip: global gradient norm.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    final_fraction: float = 0.05
    weight_decay: float = 0.0
    b2: float = 0.95
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"optimizer {self.name!r} is not one of {NAMES}")
        if self.learning_rate <= 0 or self.clip <= 0:
            raise ValueError(
                f"learning_rate and clip must be positive, got {self.learning_rate} and {self.clip}"
            )
        if (
            self.warmup_steps < 0
            or not 0 <= self.final_fraction <= 1
            or self.weight_decay < 0
            or not 0 < self.b2 < 1
        ):
            raise ValueError(f"optimizer settings out of range: {self}")


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Warm-up, then cosine from the peak to final_fraction of it at total_steps."""
    warmup = min(config.warmup_steps, total_steps // 2)
    if config.final_fraction == 1:
        # Without a warm-up optax's own schedule would stay at its initial value, 0.
        constant = optax.constant_schedule(config.learning_rate)
        return optax.warmup_constant_schedule(0.0, config.learning_rate, warmup) if warmup else constant
    end = config.learning_rate * config.final_fraction
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total_steps, warmup + 1), end
    )


def trapezoid(config: OptimizerConfig, step: int, total_steps: int, decay: float = 0.2) -> float:
    """Learning rate of a run of total_steps: warm-up, constant, and a linear decay over the last `decay` of it.

    Runs of different lengths are the same until the shorter one starts to decay, so that a curve over budgets needs
    one trunk and a short branch for each budget (warmup-stable-decay, arXiv 2404.06395).
    """
    warmup = min(config.warmup_steps, total_steps // 2)
    start = decay_start(total_steps, decay)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if step < start:
        return config.learning_rate
    left = (total_steps - step) / (total_steps - start)
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * left)


def decay_start(total_steps: int, decay: float = 0.2) -> int:
    """The first step of the linear decay of `trapezoid`."""
    return total_steps - max(1, round(decay * total_steps))


def _matrix_dimensions(params: Any) -> Any:
    """Which dimensions of each leaf make a matrix; leading "layers" dimensions are batch, vectors get None (Adam)."""

    def dimensions(path: tuple[Any, ...], leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path]
        stacked = 1 if "layers" in names else 0
        if names[-1] in ("scale", "bias") or leaf.ndim - stacked < 2:
            return None
        # Kernels map input dimensions to output dimensions; only attention's "o" takes two ([N, H] -> D).
        inputs = 2 if "o" in names and leaf.ndim - stacked > 2 else 1
        axes = tuple(range(stacked, leaf.ndim))
        return contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(config: OptimizerConfig, total_steps: int | None) -> optax.GradientTransformation:
    """Clipping, the named optimizer, and its schedule over total_steps.

    With total_steps None the rate is 1: the caller multiplies the update by the learning rate of its own schedule.
    """
    schedule = 1.0 if total_steps is None else make_schedule(config, total_steps)
    if config.name == "muon":
        rule = contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrix_dimensions,
        )
    else:
        rule = optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)
