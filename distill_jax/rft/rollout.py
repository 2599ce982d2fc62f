"""One batch of rollouts: sampled, read as text, judged by the task and scored by the models.

    problems -> sampler -> ids -> text -> task reward                        (host)
                            |       |---> each proxy's ids and byte ends     (host)
                            |-> reference log-probs, proxy log-probs         (device) -> `judgement`

The host decodes, verifies and encodes while the device scores the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from distill_jax.logprobs import score_completions
from distill_jax.mesh import place_batch
from distill_jax.models.decoder import Decoder, Params
from distill_jax.models.model import Model
from distill_jax.rewards.terms import Reward
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.micro_batches import count_pieces, map_rows
from distill_jax.rft.proxies import Proxy, ProxyScores, as_proxies, score_by_proxies
from distill_jax.rft.rewards import FurtherReward, TaskRewards, further_rewards, task_rewards
from distill_jax.rft.texts import (
    EncodedTexts,
    check_prompt_lengths,
    encode_prompts,
    plain_scores,
    require_tokenizer,
)
from distill_jax.sampling import RolloutBatch, Sampler, row_keys
from distill_jax.sequences import Sequences, pack_prompts
from distill_jax.tasks.base import Problem, Task


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What was sampled, on the device and as text.

    Attributes:
      problems: of each row, B = Q * G.
      batch: ids, lengths, log-probs under the policy.
      texts, ended: of each row.
      byte_ends: i32[B, T] of the teacher's tokens; an end of sequence adds one.
      present: bool[B, T], tokens that are text, or the end of sequence.
      faithful: bool[B]: the ids are the text and nothing else. False where bytes were no UTF-8, or a special
        token stands
        inside: the text would then not be what the teacher's log-probs are about.
      bytes: i32[B] of the text.
    """

    problems: list[Problem]
    batch: RolloutBatch
    texts: list[str]
    ended: np.ndarray
    byte_ends: np.ndarray
    present: np.ndarray
    faithful: np.ndarray
    bytes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
    """What two models say about the same rollouts.

    Attributes:
      lp_reference: f32[B, T] under the reference at the sampling temperature, top-k and top-p (for the KL
        anchor).
      lp_teacher: f32[B, T] plain log-probs of the gap's numerator, the reference or the current policy.
      proxies: of each proxy, on its own tokens.
      scorable: bool[B], all sides are about the same bytes.
      task: rewards.
      further: name -> rewards of the config, in the order of `config.rewards`.
    """

    lp_reference: jax.Array
    lp_teacher: jax.Array
    proxies: tuple[ProxyScores, ...]
    scorable: np.ndarray
    task: TaskRewards
    further: Mapping[str, FurtherReward] = dataclasses.field(default_factory=dict)

    @property
    def lp_proxy(self) -> jax.Array:
        """f32[B, Tc], of the first proxy."""
        return self.proxies[0].lp

    @property
    def encoded(self) -> EncodedTexts:
        """Tokens of the first proxy."""
        return self.proxies[0].encoded

    @property
    def does_not_fit(self) -> np.ndarray:
        """bool[B], rows that are too long for a proxy."""
        return np.any([proxy.encoded.does_not_fit for proxy in self.proxies], axis=0)


def check_prompts(teacher: Model, problems: Sequence[Problem], config: CalibrationConfig) -> None:
    """Raises ValueError when the prompt of a problem is longer than the largest size there is for it."""
    check_prompt_lengths(
        require_tokenizer(teacher, "the teacher"),
        problems,
        style=config.prompt_style,
        system=config.system,
        sizes=config.prompt_sizes,
        setting="prompt_sizes",
    )


def sample_batch(
    sampler: Sampler,
    teacher: Model,
    problems: Sequence[Problem],
    key: jax.Array,
    config: CalibrationConfig,
    params: Params,
    adapter: Params | None,
    scale: float,
) -> RolloutBatch:
    """Samples G completions of each problem; returns while the device is still at work.

    Args:
      sampler: of the teacher, see `make_sampler`.
      key: one for the batch; each row gets its own.
      params, adapter, scale: the policy.
    """
    tokenizer = require_tokenizer(teacher, "the teacher")
    questions = [problem.prompt for problem in problems]
    prompts = encode_prompts(tokenizer, questions, config.prompt_style, config.system)
    tokens, lengths = pack_prompts(prompts, max(map(len, prompts)), tokenizer.pad_id)
    keys = row_keys(key, len(problems) * sampler.config.num_samples)
    batch = sampler(
        params, tokens, lengths, keys, adapter=adapter, scale=scale, vocabulary_hash=tokenizer.vocabulary_hash
    )
    return batch if teacher.mesh is None else place_batch(batch, teacher.mesh)


def read_rollouts(teacher: Model, problems: Sequence[Problem], batch: RolloutBatch) -> Rollouts:
    """Fetches the ids and reads them as text."""
    tokenizer = require_tokenizer(teacher, "the teacher")
    sequences = batch.sequences
    ids, lengths, ended = jax.device_get((sequences.completion, sequences.completion_length, batch.ended))
    rows, size = ids.shape
    byte_ends, present = np.zeros((rows, size), np.int32), np.zeros((rows, size), bool)
    texts, faithful, widths = [], np.zeros(rows, bool), np.zeros(rows, np.int32)
    for row in range(rows):
        own = ids[row, : lengths[row]].tolist()
        inner = own[:-1] if ended[row] else own
        data = tokenizer.token_bytes(inner, continuation=True)
        text = data.decode("utf-8", errors="replace")
        ends, special = tokenizer.byte_ends(inner, continuation=True), tokenizer.special_mask(inner)
        byte_ends[row, : len(inner)], present[row, : len(inner)] = ends, ~special
        if ended[row]:
            byte_ends[row, len(inner)], present[row, len(inner)] = len(data) + 1, True
        texts.append(text)
        faithful[row] = text.encode() == data and not special.any()
        widths[row] = len(text.encode())
    samples = rows // len(problems)
    of_rows = [problem for problem in problems for _ in range(samples)]
    return Rollouts(of_rows, batch, texts, ended, byte_ends, present, faithful, widths)


@functools.partial(jax.jit, static_argnames=("module", "temperature", "top_k", "top_p", "chunk", "pieces"))
def _sampling_scores(
    module: Decoder,
    params: Params,
    batch: RolloutBatch,
    temperature: float,
    top_k: int,
    top_p: float,
    chunk: int,
    pieces: int,
) -> jax.Array:
    def score(rows: Sequences) -> jax.Array:
        return score_completions(
            module, params, rows, temperature=temperature, top_k=top_k, top_p=top_p, chunk=chunk
        ).lp

    return map_rows(score, batch.sequences, pieces, module.mesh)


def score_rollouts(
    teacher: Model,
    proxy: Model | Sequence[Proxy],
    task: Task,
    problems: Sequence[Problem],
    batch: RolloutBatch,
    config: CalibrationConfig,
    *,
    with_anchor: bool = True,
    rewards: Sequence[Reward] = (),
    answer_mark: str | None = None,
) -> tuple[Rollouts, Scored]:
    """Reads and judges a sampled batch. Models score no more rows at a time than an update takes.

    Args:
      teacher: its bare parameters are the reference.
      proxy: the small model as it is now, or several.
      with_anchor: also score the reference at the sampling temperature, which only training needs.
      rewards: of `config.rewards`; validation needs none.
      answer_mark: score the gold answers after the traces too, see `answer_utility.require_answer_mark`.
    """
    rft = config.rft
    plain = (rft.temperature, rft.top_k, rft.top_p) == (1.0, 0, 1.0)
    rows = batch.sequences.tokens.shape[0]
    micro_rows = config.prompts_per_step * rft.num_samples // rft.micro_batches
    pieces = count_pieces(rows, micro_rows, teacher.mesh)
    # The device starts on these while the host works on the text below.
    lp_plain = plain_scores(
        teacher.module, teacher.params, batch.sequences, chunk=rft.logit_chunk, pieces=pieces
    )
    lp_reference = lp_plain
    if with_anchor and not plain:
        settings = (rft.temperature, rft.top_k, rft.top_p, rft.logit_chunk, pieces)
        lp_reference = _sampling_scores(teacher.module, teacher.params, batch, *settings)
    rollouts = read_rollouts(teacher, problems, batch)
    proxies = score_by_proxies(
        as_proxies(proxy, config), problems, rollouts.texts, rollouts.ended, config, answer_mark
    )
    judged = task_rewards(task, rollouts.problems, rollouts.texts, rollouts.ended, config.correct_at)
    further = further_rewards(rewards, rollouts.problems, rollouts.texts, rollouts.ended)
    lp_teacher = lp_plain if config.numerator == "reference" else batch.lp_model
    scorable = np.all([rollouts.faithful, *(own.encoded.usable for own in proxies)], axis=0)
    return rollouts, Scored(lp_reference, lp_teacher, proxies, scorable, judged, further)
