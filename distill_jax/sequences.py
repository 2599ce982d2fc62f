"""THE layout of token batches, shared by sampling, scoring and losses.

A row is a prompt in the first P slots, right-padded, and a completion in the next T slots, right-padded:

    slot      0 .. prompt_length-1 | padding to P | P .. P+completion_length-1 | padding to P+T
    position  0 .. prompt_length-1 |              | prompt_length ..

A sampler writes token t of every row into the same slot P+t (one `dynamic_update_slice`, no scatter), and a rollout is
scored as it was written, without repacking. What is real is told by lengths alone, so the padding id may be anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.masked import length_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """Prompts and completions of one vocabulary.

    Attributes:
      tokens: i32[B, P+T] in the layout of this module.
      prompt_length: i32[B], at least 1.
      completion_length: i32[B], the end-of-sequence token counted.
      prompt_size: P.
      vocabulary_hash: hash of the vocabulary that the ids belong to.
    """

    tokens: jax.Array
    prompt_length: jax.Array
    completion_length: jax.Array
    prompt_size: int = dataclasses.field(metadata={"static": True})
    vocabulary_hash: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def completion_size(self) -> int:
        return self.tokens.shape[1] - self.prompt_size

    @property
    def completion(self) -> jax.Array:
        """i32[B, T]"""
        return self.tokens[:, self.prompt_size :]

    @property
    def completion_mask(self) -> jax.Array:
        """bool[B, T]"""
        return length_mask(self.completion_length, self.completion_size)

    def positions(self) -> jax.Array:
        """i32[B, P+T]: distance from the row's first token, the gap of padding left out."""
        return slot_positions(self.prompt_length, self.prompt_size, self.tokens.shape[1])

    def valid(self) -> jax.Array:
        """bool[B, P+T]: slots that hold a token."""
        prompt = length_mask(self.prompt_length, self.prompt_size)
        return jnp.concatenate([prompt, self.completion_mask], axis=1)


def slot_positions(prompt_length: jax.Array, prompt_size: int, size: int) -> jax.Array:
    """i32[B, size]: the position of each slot; completions go on where the prompt ended."""
    slot = jnp.arange(size)[None, :]
    return jnp.where(slot < prompt_size, slot, slot - prompt_size + prompt_length[:, None]).astype(jnp.int32)


def pack_prompts(
    prompts: Sequence[Sequence[int]], prompt_size: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(i32[B, P] right-padded ids, i32[B] lengths) on the host.

    Raises:
      ValueError: a prompt is empty or longer than prompt_size.
    """
    tokens = np.full((len(prompts), prompt_size), pad_id, np.int32)
    lengths = np.array([len(p) for p in prompts], np.int32).reshape(len(prompts))
    for row, ids in enumerate(prompts):
        if not 1 <= len(ids) <= prompt_size:
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens, expected 1 to {prompt_size}; use a larger prompt size (length "
                "bucket), or a tokenizer that adds a beginning-of-sequence token to an empty prompt"
            )
        tokens[row, : len(ids)] = ids
    return tokens, lengths


def pack_sequences(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    prompt_size: int,
    completion_size: int,
    pad_id: int = 0,
) -> Sequences:
    """Packs token ids into `Sequences` (numpy leaves).

    Args:
      prompts, completions: B lists of ids each; completions include their end-of-sequence token if they ended. A
        `vocabulary_hash` attribute on the ids is kept, and must be the same on all of them.
      prompt_size: P slots for the prompt.
      completion_size: T slots for the completion.
      pad_id: what to put into unused slots.

    Raises:
      ValueError: different numbers of prompts and completions, a row that does not fit, or ids of two vocabularies.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions; expected one each")
    hashes = {ids.vocabulary_hash for ids in (*prompts, *completions) if hasattr(ids, "vocabulary_hash")}
    if len(hashes) > 1:
        raise ValueError(f"prompts and completions carry ids of {len(hashes)} vocabularies: {sorted(hashes)}")
    prompt_tokens, prompt_length = pack_prompts(prompts, prompt_size, pad_id)
    tokens = np.full((len(prompts), prompt_size + completion_size), pad_id, np.int32)
    tokens[:, :prompt_size] = prompt_tokens
    for row, ids in enumerate(completions):
        if len(ids) > completion_size:
            raise ValueError(f"completion {row} has {len(ids)} tokens, expected at most {completion_size}")
        tokens[row, prompt_size : prompt_size + len(ids)] = ids
    completion_length = np.array([len(c) for c in completions], np.int32).reshape(len(completions))
    return Sequences(tokens, prompt_length, completion_length, prompt_size, next(iter(hashes), ""))  # type: ignore[arg-type]
