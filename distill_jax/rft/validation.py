"""Validation of a policy on fixed problems: can it still do the task, and how far has the gap moved.

Training batches differ in difficulty from step to step, and the gap moves with it; a run is judged on one
fixed set of problems with one fixed key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.rft.calibration import SIGN, likelihood_gap, proxy_weights, weigh_proxies
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.proxies import Proxy, score_encoded
from distill_jax.rft.rewards import task_rewards
from distill_jax.rft.rollout import Scored, read_rollouts, sample_batch, score_rollouts
from distill_jax.rft.texts import require_tokenizer
from distill_jax.sampling import RolloutBatch, Sampler, SamplingConfig, make_sampler
from distill_jax.tasks.base import Problem, Task


@dataclasses.dataclass(frozen=True)
class Validation:
    """Means over the validation problems.

    Attributes:
      accuracy: share correct, greedy decoding.
      accuracy_sampled, reward_sampled: share correct and mean task reward, one sample a problem.
      gap, gap_per_byte: of the samples that could be scored, in the units of the config and in nats a byte;
        against the proxies as they were given, so that it means the same in every run and at every step.
      completion_bytes: of the samples.
      not_same_bytes, does_not_fit: share of samples that could not be scored, and why.
      gap_learning, gap_per_byte_learning: the same gaps against the proxies as they have learned so far; None where
        they do not learn.
    """

    accuracy: float
    accuracy_sampled: float
    reward_sampled: float
    gap: float
    gap_per_byte: float
    completion_bytes: float
    not_same_bytes: float
    does_not_fit: float
    gap_learning: float | None = None
    gap_per_byte_learning: float | None = None

    def objective(self, arm: str, by: str = "static") -> float:
        """What the arm wants more of: the gap in its direction, or (control) the task reward.

        by: against which proxies, "static" or "learning".

        Raises:
          ValueError: "learning" where the proxies do not learn.
        """
        if arm == "control":
            return self.reward_sampled
        gap = self.gap_learning if by == "learning" else self.gap
        if gap is None:
            raise ValueError("there is no gap against learning proxies: they do not learn in this run")
        return SIGN[arm] * gap

    def metrics(self) -> dict[str, float]:
        values = dataclasses.asdict(self)
        return {f"validation_{name}": value for name, value in values.items() if value is not None}


def sampling_config(
    teacher: Model, config: CalibrationConfig, samples: int, greedy: bool = False
) -> SamplingConfig:
    """How the policy is sampled from: as it is trained, or greedily."""
    tokenizer, rft = require_tokenizer(teacher, "the teacher"), config.rft
    return SamplingConfig(
        num_samples=samples,
        max_new_tokens=config.completion_size,
        temperature=0.0 if greedy else rft.temperature,
        top_k=0 if greedy else rft.top_k,
        top_p=1.0 if greedy else rft.top_p,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )


def validate(
    teacher: Model,
    proxies: Sequence[Proxy],
    learned: Sequence[Proxy],
    task: Task,
    problems: Sequence[Problem],
    config: CalibrationConfig,
    key: jax.Array,
    params: Params,
    adapter: Params | None,
    scale: float,
) -> Validation:
    """Decodes every problem greedily and once at the sampling temperature, and scores the samples.

    Args:
      proxies: as they were given.
      learned: the same proxies as they have learned so far; none where they do not learn.
      problems: the fixed set.
      key: the same for every validation of a run, so that differences are those of the policy.
      params, adapter, scale: the policy.
    """
    greedy, sampled = (
        make_sampler(teacher.module, sampling_config(teacher, config, 1, greedy=greedy), config.prompt_sizes)
        for greedy in (True, False)
    )

    def sample(sampler: Sampler, chunk: Sequence[Problem], index: int):  # type: ignore[no-untyped-def]
        chunk_key = jax.random.fold_in(key, index)
        return sample_batch(sampler, teacher, chunk, chunk_key, config, params, adapter, scale)

    correct = []
    rows: list[tuple[np.ndarray, ...]] = []
    for index, (chunk, real) in enumerate(_chunks(problems, config.validation_batch)):
        read = read_rollouts(teacher, chunk, sample(greedy, chunk, index))
        judged = task_rewards(task, read.problems, read.texts, read.ended, config.correct_at)
        correct.append(judged.correct[:real])
        batch = sample(sampled, chunk, index)
        read, scored = score_rollouts(teacher, proxies, task, chunk, batch, config, with_anchor=False)
        columns = [
            scored.task.correct,
            scored.task.rewards,
            read.bytes,
            scored.scorable,
            scored.does_not_fit,
            *_row_gaps(scored, [own.lp for own in scored.proxies], read.bytes, batch, config),
        ]
        if learned:
            lp = [
                score_encoded(own, scores.encoded, config)
                for own, scores in zip(learned, scored.proxies, strict=True)
            ]
            columns += _row_gaps(scored, lp, read.bytes, batch, config)
        rows.append(tuple(column[:real] for column in columns))
    hits, rewards, width, scorable, unfit, *gaps = (
        np.concatenate(column) for column in zip(*rows, strict=True)
    )
    means = [float(gap[scorable].mean()) if scorable.any() else 0.0 for gap in gaps]
    return Validation(
        accuracy=float(np.concatenate(correct).mean()),
        accuracy_sampled=float(hits.mean()),
        reward_sampled=float(rewards.mean()),
        gap=means[0],
        gap_per_byte=means[1],
        completion_bytes=float(width.mean()),
        not_same_bytes=float((~scorable & ~unfit).mean()),
        does_not_fit=float(unfit.mean()),
        gap_learning=means[2] if learned else None,
        gap_per_byte_learning=means[3] if learned else None,
    )


def _row_gaps(
    scored: Scored,
    lp_proxies: Sequence[jax.Array],
    width: np.ndarray,
    batch: RolloutBatch,
    config: CalibrationConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """(gap in the units of the config, gap in nats a byte) of each row, f32[B]; of several proxies put together."""
    l_teacher = np.asarray(scored.lp_teacher.sum(axis=1))
    l_proxies = [np.asarray(lp.sum(axis=1)) for lp in lp_proxies]
    tokens = np.asarray(batch.sequences.completion_length)
    size = {"per_byte": width, "per_token": tokens, "sum": None}[config.units]
    sizes = [
        np.asarray(own.encoded.sequences.completion_length) if config.units == "per_token" else None
        for own in scored.proxies
    ]
    gaps = [
        likelihood_gap(l_teacher, lp, size, config.units, size_proxy=own)
        for lp, own in zip(l_proxies, sizes, strict=True)
    ]
    weights = proxy_weights(jnp.stack(gaps), config.ensemble)
    per_byte = [likelihood_gap(l_teacher, lp, width) for lp in l_proxies]
    return np.asarray(weigh_proxies(gaps, weights)), np.asarray(weigh_proxies(per_byte, weights))


def _chunks(problems: Sequence[Problem], size: int) -> Iterator[tuple[list[Problem], int]]:
    """Pieces of one size (the last one is filled up with its last problem) and how many of each are real."""
    size = min(size, len(problems))
    for start in range(0, len(problems), size):
        real = min(size, len(problems) - start)
        chunk = list(problems[start : start + real])
        yield chunk + [chunk[-1]] * (size - real), real
