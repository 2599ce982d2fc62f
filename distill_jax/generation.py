"""Text in, text out: `generate` encodes prompts, samples on the device, and decodes the completions on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from distill_jax.models.adapter import AdapterConfig, adapter_scale
from distill_jax.models.decoder import Params
from distill_jax.sampling import DEFAULT_BUCKETS, RolloutBatch, SamplingConfig, make_sampler, row_keys
from distill_jax.sequences import pack_prompts
from distill_jax.text.token_ids import TokenIds

if TYPE_CHECKING:
    from distill_jax.models.model import Model
    from distill_jax.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions on the host; row q * num_samples + g is sample g of prompt q.

    Attributes:
      texts: the completions' text, special tokens left out.
      prompt_ids, completion_ids: one a row; a completion's ids include its end-of-sequence token.
      lengths: i32[B], tokens of each completion.
      lp: f32[B, T] under the distribution that was sampled from (0 for greedy decoding); 0 in padding.
      lp_model: f32[B, T] under the model's softmax at temperature 1; 0 in padding.
      ended: bool[B], False where a completion was cut off at max_new_tokens.
      num_samples: G.
      vocabulary_hash: of all ids.
    """

    texts: tuple[str, ...]
    prompt_ids: tuple[TokenIds, ...]
    completion_ids: tuple[TokenIds, ...]
    lengths: np.ndarray
    lp: np.ndarray
    lp_model: np.ndarray
    ended: np.ndarray
    num_samples: int
    vocabulary_hash: str


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    num_samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    adapter_config: AdapterConfig | None = None,
    eos_ids: Sequence[int] | None = None,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    batch_size: int | None = None,
) -> Rollouts:
    """Samples `num_samples` completions of each prompt with the model's current parameters.

    Args:
      model: a model with its tokenizer.
      prompts: texts (rendered prompts, see `Tokenizer.encode_prompt`), or ids of the model's vocabulary.
      num_samples, max_new_tokens, temperature, top_k, top_p: see `SamplingConfig`; temperature 0 is greedy.
      key: typed key. Row b draws from fold_in(key, b), so neither batch_size nor the mesh changes a sample.
        Needed unless temperature is 0.
      adapter: low-rank adapter tree, multiplied by `scale`.
      scale: the dial s with `adapter_config` (s * alpha / rank is applied); without it, the whole multiplier.
      eos_ids: what ends a completion; the tokenizer's `eos_ids` by default.
      buckets: prompt sizes; each call uses the smallest that holds its longest prompt, one compilation each.
      batch_size: prompts in one call on the device, all of them by default. The last call is filled up with
        repeated prompts, so that it needs no compilation of its own.

    Raises:
      ValueError: no prompts, an argument out of range, ids of another vocabulary, a prompt that is longer than
        the largest bucket or leaves less than max_new_tokens of the model's context.
      TypeError: one text instead of a list of prompts.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer; load it with load_model(..., tokenizer=...), or use sampling.sample"
        )
    prompt_ids = _encode(tokenizer, prompts)
    config = SamplingConfig(
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=tuple(tokenizer.eos_ids if eos_ids is None else eos_ids),
        pad_id=tokenizer.pad_id or 0,
    )
    batch_size = len(prompt_ids) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if key is None:
        if temperature != 0:
            raise ValueError(
                "sampling needs key=jax.random.key(seed); only temperature 0 (greedy) does without"
            )
        key = jax.random.key(0)
    sampler = make_sampler(model.module, config, buckets)
    sampler.bucket(max(map(len, prompt_ids)))  # refuses too long a prompt before anything runs
    context = max(map(len, prompt_ids)) + max_new_tokens
    if context > model.spec.max_context:
        raise ValueError(
            f"the longest prompt and max_new_tokens={max_new_tokens} make {context} tokens, but the model's context "
            f"is {model.spec.max_context}; shorten the prompt or ask for fewer tokens"
        )
    multiplier = scale if adapter_config is None else adapter_scale(adapter_config, scale)
    keys = row_keys(key, len(prompt_ids) * num_samples)
    host_batches = []
    for start in range(0, len(prompt_ids), batch_size):
        chosen = np.minimum(np.arange(start, start + batch_size), len(prompt_ids) - 1)
        batch_prompts = [prompt_ids[i] for i in chosen]
        tokens, lengths = pack_prompts(batch_prompts, max(map(len, batch_prompts)), config.pad_id)
        rows = (chosen[:, None] * num_samples + np.arange(num_samples)[None, :]).reshape(-1)
        batch = sampler(model.params, tokens, lengths, keys[rows], adapter=adapter, scale=multiplier)
        host_batches.append(_to_host(batch))
    columns = zip(*host_batches, strict=True)
    real_rows = len(prompt_ids) * num_samples
    completion, lengths, lp, lp_model, ended = (np.concatenate(column)[:real_rows] for column in columns)
    completion_ids = tuple(
        TokenIds(row[:length].tolist(), tokenizer.vocabulary_hash)
        for row, length in zip(completion, lengths, strict=True)
    )
    return Rollouts(
        texts=tuple(tokenizer.decode(ids, continuation=True) for ids in completion_ids),
        prompt_ids=tuple(ids for ids in prompt_ids for _ in range(num_samples)),
        completion_ids=completion_ids,
        lengths=lengths,
        lp=lp,
        lp_model=lp_model,
        ended=ended,
        num_samples=num_samples,
        vocabulary_hash=tokenizer.vocabulary_hash,
    )


def _encode(tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]]) -> list[TokenIds]:
    if isinstance(prompts, (str, bytes)):
        raise TypeError("prompts must be a list of texts or of token ids, got one text; write [text]")
    encoded = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = tokenizer.encode_prompt(prompt)
        else:
            ids = TokenIds(tokenizer.check(prompt).tolist(), tokenizer.vocabulary_hash)
        if not ids:
            raise ValueError(
                f"prompt {index} has no tokens; a model needs at least one token to go on from, such as a "
                "beginning-of-sequence token"
            )
        encoded.append(ids)
    if not encoded:
        raise ValueError("prompts is empty; expected at least one text or one list of token ids")
    return encoded


def _to_host(batch: RolloutBatch) -> tuple[np.ndarray, ...]:
    """(completion ids, lengths, lp, lp_model, ended) as numpy, fetched together."""
    sequences = batch.sequences
    return jax.device_get(
        (sequences.completion, sequences.completion_length, batch.lp, batch.lp_model, batch.ended)
    )
