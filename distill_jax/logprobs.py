"""Log-probabilities of tokens that are there already: completions of a batch, or whole texts.

`process_logits` is the one place where temperature, top-k and top-p are applied: the sampler draws from its
output, and scores are read from it here, so a rollout that is scored again with the same parameters has ratio 1.
Scoring walks over the tokens in chunks that are recomputed in the backward pass: [B, T, V] never exists.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.distribution import check_distribution, entropy_of, process_logits
from distill_jax.masked import zero_masked
from distill_jax.mesh import constrain
from distill_jax.models.adapter import AdapterConfig, adapter_scale
from distill_jax.models.decoder import Decoder, Params, apply, unembed
from distill_jax.sequences import Sequences
from distill_jax.text.token_ids import TokenIds

if TYPE_CHECKING:
    from distill_jax.models.model import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompletionScores:
    """lp: f32[B, T] of each completion token; entropy: f32[B, T] of its distribution; both 0 in padding."""

    lp: jax.Array
    entropy: jax.Array


def score_completions(
    module: Decoder,
    params: Params,
    sequences: Sequences,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    temperature: float = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float = 1.0,
    chunk: int = 64,
) -> CompletionScores:
    """log p(completion token t | prompt, completion before t) and the entropy of that p, for every row.

    One forward pass over prompts and completions, then logits for `chunk` tokens of every row at a time.
    Chunks lie along T, so that B keeps its sharding; each is recomputed in the backward pass. Pure: call it
    inside your own jit. Differentiable in params and adapter.

    Under top-k or top-p the scored token always counts as part of the support. For a token that was sampled
    under the same parameters that is exact, and rounding at the edge of the support cannot turn its score into
    -inf; for a token that the distribution excludes it is the score under the support widened by that token.
    top-p jumps where a mass just reaches it, so that rounding lets a token be scored, now and then, with one id
    more or less than it was drawn with. `RolloutBatch.support_size` as top_k, in place of both, has no jumps.

    Args:
      module, params, adapter, scale: as in `models.decoder.apply`.
      sequences: B rows; may hold numpy leaves.
      temperature, top_k, top_p: the distribution, see `distribution.process_logits`; top_k may be i32[B, T].
      chunk: the most tokens of a row whose logits exist at one time.

    Returns:
      lp, entropy: f32[B, T], 0 where `sequences.completion_mask` is False.

    Raises:
      ValueError: chunk < 1, no completion slots, or temperature, top_k, top_p out of range.
    """
    check_distribution(temperature, top_k, top_p)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    hidden, targets = completion_states(module, params, sequences, adapter=adapter, scale=scale)

    whole_vocabulary = isinstance(top_k, int) and top_k == 0 and top_p == 1.0

    def score(
        chunk_hidden: jax.Array, chunk_targets: jax.Array, chunk_top_k: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        logits = unembed(module, params, chunk_hidden, adapter=adapter, scale=scale)
        # A comparison, where a gather would do: its gradient is no scatter, and needs no logits-sized array.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == chunk_targets[..., None]
        if whole_vocabulary:  # the same numbers without an array of log-probabilities
            logits = logits / temperature
            normaliser = jax.nn.logsumexp(logits, axis=-1)
            mean_logit = jnp.sum(jnp.exp(logits - normaliser[..., None]) * logits, axis=-1)
            return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - normaliser, normaliser - mean_logit
        keep_most = top_k if chunk_top_k is None else chunk_top_k
        logprobs = process_logits(logits, temperature, keep_most, top_p, keep=chunk_targets)
        return jnp.sum(jnp.where(hit, logprobs, 0.0), axis=-1), entropy_of(logprobs)

    per_token = None if isinstance(top_k, int) else jnp.asarray(top_k)
    lp, entropy = map_token_chunks(score, (hidden, targets, per_token), chunk, module.mesh)
    mask = sequences.completion_mask
    return CompletionScores(zero_masked(lp, mask), zero_masked(entropy, mask))


def completion_states(
    module: Decoder,
    params: Params,
    sequences: Sequences,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One forward pass over prompts and completions: what predicts each completion token, and the token.

    Returns:
      hidden: dtype[B, T, D], whose `unembed` is the distribution of completion token t; tokens: i32[B, T], 0 in
      padding.

    Raises:
      ValueError: no completion slots.
    """
    if sequences.completion_size < 1:
        raise ValueError(
            f"sequences have no completion slots: tokens are {sequences.tokens.shape} and prompt_size is "
            f"{sequences.prompt_size}; pack them with a completion_size of at least 1"
        )
    sequences = jax.tree.map(jnp.asarray, sequences)
    # Padding may be no id of this vocabulary, and an embedding that is looked up out of range is NaN.
    valid = sequences.valid()
    tokens = jnp.where(valid, sequences.tokens, 0)
    hidden, _ = apply(module, params, tokens, sequences.positions(), valid, adapter=adapter, scale=scale)
    return _predicting_hidden(hidden, sequences), tokens[:, sequences.prompt_size :]


def map_token_chunks(function: Callable[..., Any], arrays: Any, chunk: int, mesh: Mesh | None) -> Any:
    """`function(*arrays)`, `chunk` tokens of every row at a time, recomputed in the backward pass.

    Args:
      function: of pieces [B, C, ...] of the arrays, C <= chunk; returns a tree of [B, C, ...], each token's part made
        of that token alone.
      arrays: a tuple of trees of [B, T, ...]. The last piece is filled up with zeros; what becomes of them is cut off.
      chunk: the most tokens of a row in a piece, at least 1.
      mesh: on which B is cut; None for one device.

    Returns:
      The tree of [B, T, ...].
    """
    function = jax.checkpoint(function)
    size = jax.tree.leaves(arrays)[0].shape[1]
    num_chunks = math.ceil(size / chunk)
    if num_chunks == 1:
        return function(*arrays)
    chunk_size = math.ceil(size / num_chunks)  # evenly filled chunks: at most num_chunks - 1 padded tokens
    pieces = jax.tree.map(
        lambda x: constrain(
            _split_chunks(x, num_chunks, chunk_size), mesh, (None, "batch", None, None)[: x.ndim + 1]
        ),
        arrays,
    )
    _, results = jax.lax.scan(lambda carry, piece: (carry, function(*piece)), None, pieces)
    return jax.tree.map(lambda x: _join_chunks(x)[:, :size], results)


def _predicting_hidden(hidden: jax.Array, sequences: Sequences) -> jax.Array:
    """[B, T, D]: what predicts completion token t: slot prompt_length-1 for t = 0 (before the gap of padding), slot
    P+t-1 after."""
    last_prompt_slot = (sequences.prompt_length - 1)[:, None, None]
    first = jnp.take_along_axis(hidden, last_prompt_slot, axis=1)
    return jnp.concatenate([first, hidden[:, sequences.prompt_size : -1]], axis=1)


def _split_chunks(x: jax.Array, num_chunks: int, chunk_size: int) -> jax.Array:
    """[B, T, ...] -> [num_chunks, B, chunk_size, ...], zeros after T."""
    padding = num_chunks * chunk_size - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:]), 1, 0)


def _join_chunks(x: jax.Array) -> jax.Array:
    """[num_chunks, B, chunk_size, ...] -> [B, num_chunks * chunk_size, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def token_logprobs(
    model: Model,
    tokens: jax.Array | np.ndarray | Sequence[Sequence[int]],
    lengths: jax.Array | np.ndarray | Sequence[int],
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    chunk: int = 64,
    adapter_config: AdapterConfig | None = None,
) -> jax.Array:
    """log p(tokens[b, t] | tokens[b, :t]) of whole texts, chunked; compiled once for each shape.

    Args:
      model: the model that scores.
      tokens: i32[B, T], right-padded with anything; or B `TokenIds` of one length.
      lengths: i32[B], number of real tokens in each row, 1 to T.
      adapter: low-rank adapter tree, multiplied by `scale`.
      scale: the dial s with `adapter_config` (s * alpha / rank is applied); without it, the whole multiplier.
      chunk: as in `score_completions`.

    Returns:
      f32[B, T]. Position 0 (nothing predicts it) and padding hold 0 and must be masked by the caller.

    Raises:
      ValueError: wrong shapes, lengths out of range, ids outside the model's vocabulary or of another one.
    """
    for row in tokens:
        if isinstance(row, TokenIds) and model.tokenizer is not None:
            model.tokenizer.check(row)
    token_array, length_array = np.asarray(tokens), np.asarray(lengths)
    if token_array.ndim != 2 or length_array.shape != token_array.shape[:1]:
        raise ValueError(
            f"tokens must be [B, T] and lengths [B]; got {token_array.shape} and {length_array.shape}; pad the rows "
            "to one length and tell their real lengths"
        )
    size = token_array.shape[1]
    if length_array.size and not (length_array.min() >= 1 and length_array.max() <= size):
        raise ValueError(f"lengths must be in 1..{size}, got {length_array.min()}..{length_array.max()}")
    real = token_array[np.arange(size)[None, :] < length_array[:, None]]
    if real.size and not (real.min() >= 0 and real.max() < model.spec.vocab_size):
        raise ValueError(
            f"token ids must be in 0..{model.spec.vocab_size - 1} (the model's vocabulary), got "
            f"{real.min()}..{real.max()}; encode the text with this model's tokenizer"
        )
    return _token_logprobs(
        model.module,
        model.params,
        token_array.astype(np.int32),
        length_array.astype(np.int32),
        adapter,
        scale if adapter_config is None else adapter_scale(adapter_config, scale),
        chunk,
    )


@functools.partial(jax.jit, static_argnames=("module", "chunk"))
def _token_logprobs(
    module: Decoder,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    adapter: Params | None,
    scale: float | jax.Array,
    chunk: int,
) -> jax.Array:
    if tokens.shape[1] == 1:
        return jnp.zeros(tokens.shape, jnp.float32)
    # The first token is the prompt, the rest its completion.
    sequences = Sequences(tokens, jnp.ones_like(lengths), lengths - 1, prompt_size=1)
    scores = score_completions(module, params, sequences, adapter=adapter, scale=scale, chunk=chunk)
    return jnp.pad(scores.lp, ((0, 0), (1, 0)))
