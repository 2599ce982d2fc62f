"""Validation of a policy on fixed problems: can it still do the task, and how far has the gap moved.

Training batches differ in difficulty from step to step, and the gap moves with it; a run is judged on one
fixed set of problems with one fixed key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.rft.calibration import SIGN, likelihood_gap
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.rewards import task_rewards
from distill_jax.rft.rollout import read_rollouts, sample_batch, score_rollouts
from distill_jax.rft.texts import require_tokenizer
from distill_jax.sampling import Sampler, SamplingConfig, make_sampler
from distill_jax.tasks.base import Problem, Task


@dataclasses.dataclass(frozen=True)
class Validation:
    """Means over the validation problems.

    Attributes:
      accuracy: share correct, greedy decoding.
      accuracy_sampled, reward_sampled: share correct and mean task reward, one sample a problem.
      gap, gap_per_byte: of the samples that could be scored, in the units of the config and in nats a byte.
      completion_bytes: of the samples.
      not_same_bytes, does_not_fit: share of samples that could not be scored, and why.
    """

    accuracy: float
    accuracy_sampled: float
    reward_sampled: float
    gap: float
    gap_per_byte: float
    completion_bytes: float
    not_same_bytes: float
    does_not_fit: float

    def objective(self, arm: str) -> float:
        """What the arm wants more of: the gap in its direction, or (control) the task reward."""
        return self.reward_sampled if arm == "control" else SIGN[arm] * self.gap

    def metrics(self) -> dict[str, float]:
        return {f"validation_{name}": value for name, value in dataclasses.asdict(self).items()}


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
    proxy: Model,
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
        read, scored = score_rollouts(teacher, proxy, task, chunk, batch, config, with_anchor=False)
        sums = np.asarray(scored.lp_teacher.sum(axis=1)), np.asarray(scored.lp_proxy.sum(axis=1))
        tokens, proxy_tokens = (
            np.asarray(s.completion_length) for s in (batch.sequences, scored.encoded.sequences)
        )
        columns = (
            scored.task.correct,
            scored.task.rewards,
            *sums,
            read.bytes,
            tokens,
            proxy_tokens,
            scored.scorable,
            scored.encoded.does_not_fit,
        )
        rows.append(tuple(column[:real] for column in columns))
    hits, rewards, l_teacher, l_proxy, width, tokens, proxy_tokens, scorable, unfit = (
        np.concatenate(column) for column in zip(*rows, strict=True)
    )
    size = {"per_byte": width, "per_token": tokens, "sum": None}[config.units]
    proxy_size = proxy_tokens if config.units == "per_token" else None
    gap = np.asarray(likelihood_gap(l_teacher, l_proxy, size, config.units, size_proxy=proxy_size))
    per_byte = np.asarray(likelihood_gap(l_teacher, l_proxy, width))
    return Validation(
        accuracy=float(np.concatenate(correct).mean()),
        accuracy_sampled=float(hits.mean()),
        reward_sampled=float(rewards.mean()),
        gap=float(gap[scorable].mean()) if scorable.any() else 0.0,
        gap_per_byte=float(per_byte[scorable].mean()) if scorable.any() else 0.0,
        completion_bytes=float(width.mean()),
        not_same_bytes=float((~scorable & ~unfit).mean()),
        does_not_fit=float(unfit.mean()),
    )


def _chunks(problems: Sequence[Problem], size: int) -> Iterator[tuple[list[Problem], int]]:
    """Pieces of one size (the last one is filled up with its last problem) and how many of each are real."""
    size = min(size, len(problems))
    for start in range(0, len(problems), size):
        real = min(size, len(problems) - start)
        chunk = list(problems[start : start + real])
        yield chunk + [chunk[-1]] * (size - real), real
