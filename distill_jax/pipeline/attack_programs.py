"""Training programs of the attack suite, compiled once for all cells and seeds that train alike.

The two that `students.train` does not make. What differs between cells (texts, teacher, rate, seed) is an argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optax

from distill_jax.models.decoder import Decoder
from distill_jax.optimizer import OptimizerConfig, make_optimizer
from distill_jax.students.cross_tokenizer_step import make_alm_step
from distill_jax.students.divergence_config import Divergence
from distill_jax.students.divergences import sequence_divergence
from distill_jax.students.on_policy import DivergenceLoss, OnPolicyConfig, make_on_policy_update


@functools.lru_cache(maxsize=4)
def span_program(
    module: Decoder,
    optimizer: OptimizerConfig,
    tau: float,
    cross_entropy: float,
    trainable: str,
    scale: float,
    logit_chunk: int,
    replicas: int,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The step of span matching, compiled once for all cells that train alike."""
    rule = make_optimizer(optimizer, None)
    step = make_alm_step(
        module,
        rule,
        tau=tau,
        cross_entropy_weight=cross_entropy,
        trainable=trainable,
        scale=scale,
        logit_chunk=logit_chunk,
        replicas=replicas,
    )
    return rule, step


@functools.lru_cache(maxsize=8)
def on_policy_program(
    module: Decoder, optimizer: OptimizerConfig, config: OnPolicyConfig, beta: float | None
) -> tuple[optax.GradientTransformation, DivergenceLoss | None, Callable[..., Any]]:
    """The update of on-policy training, compiled once for all seeds and cells; beta: None for the sampled objective."""
    rule = make_optimizer(optimizer, None)
    divergence = None
    if beta is not None:
        divergence = functools.partial(sequence_divergence, config=Divergence("jsd", beta=beta))
    return rule, divergence, make_on_policy_update(module, rule, config, divergence)
