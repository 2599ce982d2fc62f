"""One batch of rollouts: sampled, read as text, judged by the task and by two models, turned into advantages.

    problems -> sampler -> ids -> text -> task reward                      (host)
                            |       |---> the proxy's ids and byte ends    (host)
                            |-> reference log-probs, proxy log-probs -> spans, calibration reward, advantages
                            (device)

The host decodes, verifies and encodes while the device scores the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.logprobs import score_completions
from distill_jax.masked import masked_sum
from distill_jax.mesh import place_batch
from distill_jax.models.decoder import Decoder, Params
from distill_jax.models.model import Model
from distill_jax.rewards.terms import Reward
from distill_jax.rft.advantages import combine, group_normalise, saturated_groups
from distill_jax.rft.calibration import calibration_reward, gate_within_correct, likelihood_gap, span_credit
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.micro_batches import count_pieces, map_rows
from distill_jax.rft.rewards import FurtherReward, TaskRewards, further_rewards, task_rewards
from distill_jax.rft.texts import (
    EncodedTexts,
    encode_completions,
    encode_prompts,
    end_of_text_id,
    plain_scores,
    put,
    require_tokenizer,
)
from distill_jax.sampling import RolloutBatch, Sampler, row_keys
from distill_jax.sequences import Sequences, pack_prompts
from distill_jax.tasks.base import Problem, Task
from distill_jax.text.spans import align_spans

Sums = dict[str, tuple[jax.Array, jax.Array]]


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
      lp_proxy: f32[B, Tc] plain log-probs of the proxy on its own tokens.
      encoded: the proxy's tokens.
      scorable: bool[B], both sides are about the same bytes.
      task: rewards.
      further: name -> rewards of the config, in the order of `config.rewards`.
    """

    lp_reference: jax.Array
    lp_teacher: jax.Array
    lp_proxy: jax.Array
    encoded: EncodedTexts
    scorable: np.ndarray
    task: TaskRewards
    further: Mapping[str, FurtherReward] = dataclasses.field(default_factory=dict)


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
    proxy: Model,
    task: Task,
    problems: Sequence[Problem],
    batch: RolloutBatch,
    config: CalibrationConfig,
    *,
    with_anchor: bool = True,
    rewards: Sequence[Reward] = (),
) -> tuple[Rollouts, Scored]:
    """Reads and judges a sampled batch. Models score no more rows at a time than an update takes.

    Args:
      teacher: its bare parameters are the reference.
      proxy: the frozen small model.
      with_anchor: also score the reference at the sampling temperature, which only training needs.
      rewards: of `config.rewards`; validation needs none.
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
    tokenizer, style = require_tokenizer(proxy, "the proxy"), config.proxy_prompt_style
    samples = len(rollouts.texts) // len(problems)
    prompts = encode_prompts(tokenizer, [problem.prompt for problem in problems], style, config.system)
    encoded = encode_completions(
        tokenizer,
        [prompt for prompt in prompts for _ in range(samples)],
        rollouts.texts,
        rollouts.ended,
        end_id=end_of_text_id(tokenizer, style),
        prompt_sizes=config.proxy_prompt_sizes,
        completion_sizes=config.proxy_completion_sizes,
    )
    lp_proxy = plain_scores(
        proxy.module,
        proxy.params,
        put(encoded.sequences, proxy),
        chunk=rft.logit_chunk,
        pieces=count_pieces(rows, micro_rows, proxy.mesh),
    )
    judged = task_rewards(task, rollouts.problems, rollouts.texts, rollouts.ended, config.correct_at)
    further = further_rewards(rewards, rollouts.problems, rollouts.texts, rollouts.ended)
    lp_teacher = lp_plain if config.numerator == "reference" else batch.lp_model
    scorable = rollouts.faithful & encoded.usable
    return rollouts, Scored(lp_reference, lp_teacher, lp_proxy, encoded, scorable, judged, further)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judgement:
    """advantages: f32[B] or f32[B, T]; gap_per_byte: f32[B]; sums: name -> (sum, count) of what is logged."""

    advantages: jax.Array
    gap_per_byte: jax.Array
    sums: Sums


def judge(rollouts: Rollouts, scored: Scored, config: CalibrationConfig, arm: str, eta: float) -> Judgement:
    """Rewards and advantages of whole groups, compiled once."""
    sequences, encoded = rollouts.batch.sequences, scored.encoded
    host = {
        "task": scored.task.rewards,
        "correct": scored.task.correct,
        "scorable": scored.scorable,
        "ended": rollouts.ended,
        "bytes": rollouts.bytes,
        "tokens_proxy": encoded.sequences.completion_length,
        "end_t": rollouts.byte_ends,
        "present_t": rollouts.present & rollouts.faithful[:, None],
        "end_s": encoded.byte_ends,
        "present_s": np.arange(encoded.byte_ends.shape[1])[None, :]
        < np.asarray(encoded.sequences.completion_length)[:, None],
    }
    return _judge(
        config,
        arm,
        eta,
        host,
        scored.lp_teacher,
        scored.lp_proxy,
        sequences.completion_mask,
        sequences.completion_length,
        {name: reward.values for name, reward in scored.further.items()},
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _judge(
    config: CalibrationConfig,
    arm: str,
    eta: float,
    host: dict[str, jax.Array],
    lp_teacher: jax.Array,
    lp_proxy: jax.Array,
    token_mask: jax.Array,
    tokens: jax.Array,
    further: dict[str, jax.Array],
) -> Judgement:
    samples = config.rft.num_samples
    task, correct, scorable = host["task"], host["correct"], host["scorable"]
    spans = align_spans(host["end_t"], host["end_s"], host["present_t"], host["present_s"])
    size = {"per_byte": host["bytes"], "per_token": tokens, "sum": None}[config.units]
    reward, terms = calibration_reward(
        lp_teacher,
        lp_proxy,
        size,
        "distillable" if arm == "control" else arm,  # eta is 0 there: any direction is logged alike
        config.units,
        size_proxy=host["tokens_proxy"] if config.units == "per_token" else None,
        spans=spans if config.credit == "span" else None,
    )
    known = scorable
    if config.within_correct:
        reward, known = gate_within_correct(reward, correct, samples, scorable)
    credit, credit_mask = reward, known
    if terms is not None:
        own = scorable & correct if config.within_correct else scorable
        credit, credit_mask = span_credit(terms, spans.id_t, reward, own, token_mask, samples, known)
    added, further_sums = _further_advantages(config, further)
    advantages = combine(
        task,
        credit,
        eta,
        samples,
        eps=config.advantage_eps,
        floor=config.calibration_floor,
        scale=config.normalisation,
        ddof=config.advantage_ddof,
        mask=credit_mask,
        whiten_batch=config.whiten,
        further=added,
    )
    sums, gap_per_byte = _gap_sums(host, lp_teacher, lp_proxy, tokens)
    all_rows = jnp.ones(task.shape, bool)
    deviation = task.reshape(-1, samples).std(axis=1)
    sums |= {
        "reward_task_std": masked_sum(deviation, jnp.ones(deviation.shape, bool)),
        "saturated_groups": saturated_groups(task, samples),
        "advantage_task_abs": masked_sum(jnp.abs(advantages.task), all_rows),
        "advantage_calibration_abs": masked_sum(jnp.abs(advantages.calibration), credit_mask),
        "span_coverage": spans.coverage()["bytes_t"],
    }
    sums |= further_sums
    return Judgement(advantages.total, gap_per_byte, sums)


def _further_advantages(
    config: CalibrationConfig, further: dict[str, jax.Array]
) -> tuple[jax.Array | None, Sums]:
    """The weighted sum of the config's rewards, each normalised in its group, and what is logged of each."""
    total: jax.Array | None = None
    sums: Sums = {}
    for term in config.rewards:
        if term.name not in further:
            continue
        known = ~jnp.isnan(further[term.name])
        values = jnp.where(known, further[term.name], 0.0)
        normalised = group_normalise(
            values,
            config.rft.num_samples,
            eps=config.advantage_eps,
            scale=config.normalisation,
            ddof=config.advantage_ddof,
            mask=known,
        )
        total = term.weight * normalised + (0.0 if total is None else total)
        sums[f"reward_{term.name}"] = masked_sum(values, known)
        sums[f"advantage_{term.name}_abs"] = masked_sum(jnp.abs(normalised), known)
    return total, sums


def _gap_sums(
    host: dict[str, jax.Array], lp_teacher: jax.Array, lp_proxy: jax.Array, tokens: jax.Array
) -> tuple[Sums, jax.Array]:
    """What is logged of any batch, as (sum, count), and the gap per byte of each row."""
    task, scorable = host["task"], host["scorable"]
    sum_teacher, sum_proxy = lp_teacher.sum(axis=1), lp_proxy.sum(axis=1)
    gap_per_byte = likelihood_gap(sum_teacher, sum_proxy, host["bytes"])
    rows = jnp.ones(task.shape, bool)
    sums = {
        "reward_task": masked_sum(task, rows),
        "correct": masked_sum(host["correct"].astype(jnp.float32), rows),
        "gap_raw": masked_sum(sum_teacher - sum_proxy, scorable),
        "gap_per_byte": masked_sum(gap_per_byte, scorable),
        "completion_bytes": masked_sum(host["bytes"].astype(jnp.float32), rows),
        "completion_tokens": masked_sum(tokens.astype(jnp.float32), rows),
        "ended": masked_sum(host["ended"].astype(jnp.float32), rows),
        "unscorable": masked_sum(1.0 - scorable.astype(jnp.float32), rows),
    }
    return sums, gap_per_byte
