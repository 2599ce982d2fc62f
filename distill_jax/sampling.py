"""Sampling: prompts prefilled once, their cache repeated G times, decoding in `lax.while_loop` with early stop.

`sample` is the pure function; `make_sampler` compiles its two halves apart (prefill is bound by arithmetic,
decoding by memory), picks a prompt-length bucket on the host and donates the decoding state. Nothing here keeps
parameters: the ones that are passed are the ones that are sampled from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.distribution import check_distribution, draw, process_logits
from distill_jax.masked import length_mask
from distill_jax.models.decoder import Cache, Decoder, Params, apply, init_cache, unembed
from distill_jax.sequences import Sequences, slot_positions

DEFAULT_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What is sampled; static under jit.

    Attributes:
      num_samples: G rollouts a prompt.
      max_new_tokens: T, the size of the completion buffers.
      temperature: 0 is greedy decoding (the first of the largest logits; top_k and top_p change nothing).
      top_k, top_p: see `distribution.process_logits`.
      eos_ids: a row ends with the first of these, which counts as its last token. Empty: rows end at T only.
      pad_id: what stands in slots after the end.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        check_distribution(self.temperature or 1.0, self.top_k, self.top_p)
        object.__setattr__(self, "eos_ids", tuple(int(i) for i in self.eos_ids))  # hashable, whatever came

    @property
    def truncates(self) -> bool:
        """Whether ids are left out of the distribution that is sampled from."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """B = Q*G rollouts; row q*G+g is sample g of prompt q.

    Attributes:
      sequences: prompts and completions, as `logprobs.score_completions` takes them.
      lp: f32[B, T] under the distribution that was sampled from (0 for greedy: a point mass); 0 in padding.
      lp_model: f32[B, T] under the model's softmax at temperature 1; 0 in padding.
      support_size: i32[B, T], how many ids top-k and top-p left to draw from; None where neither is used. As
        `top_k` of `logprobs.score_completions` it scores the rollout under the very support it was drawn from.
      ended: bool[B], the row has its end-of-sequence token; False for one that was cut off.
    """

    sequences: Sequences
    lp: jax.Array
    lp_model: jax.Array
    support_size: jax.Array | None
    ended: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Carry of the decoding loop.

    Attributes:
      step: i32[], tokens that every row holds, padding of ended rows counted; at least 1.
      tokens: i32[B, P+T] in the layout of `Sequences`.
      prompt_length, length: i32[B], of the prompt and of the completion so far.
      ended: bool[B].
      lp, lp_model, support_size: [B, T], as in `RolloutBatch`.
      cache: P+T slots a row.
    """

    step: jax.Array
    tokens: jax.Array
    prompt_length: jax.Array
    length: jax.Array
    ended: jax.Array
    lp: jax.Array
    lp_model: jax.Array
    support_size: jax.Array | None
    cache: Cache


def row_keys(key: jax.Array, n: int) -> jax.Array:
    """key[n]: fold_in(key, row) for each row; a row's key does not depend on how many rows there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def sample(
    module: Decoder,
    params: Params,
    prompt_tokens: jax.Array,
    prompt_length: jax.Array,
    keys: jax.Array,
    config: SamplingConfig,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    limit: int | jax.Array | None = None,
    vocabulary_hash: str = "",
) -> RolloutBatch:
    """Samples G completions of each prompt. Pure; call it inside your own jit.

    May be put under `jax.vmap` over a leading replica axis of params, adapter or keys: the loop then runs until
    the rows of every replica have ended, and what a replica finished earlier stays as it is.

    Args:
      module, params, adapter, scale: as in `models.decoder.apply`.
      prompt_tokens: i32[Q, P], right-padded.
      prompt_length: i32[Q], 1 to P.
      keys: key[Q*G] (see `row_keys`). A row's completion depends on its own key and prompt alone: not on the
        other rows, not on the mesh.
      config: static.
      limit: i32[], may be traced: stop after this many tokens if that is less than config.max_new_tokens.
      vocabulary_hash: goes into the result's sequences.

    Raises:
      ValueError: shapes that do not fit together.
    """
    state = prefill(module, params, prompt_tokens, prompt_length, keys, config, adapter=adapter, scale=scale)
    state = decode(module, params, state, keys, config, adapter=adapter, scale=scale, limit=limit)
    return rollout_batch(state, config, vocabulary_hash)


def prefill(
    module: Decoder,
    params: Params,
    prompt_tokens: jax.Array,
    prompt_length: jax.Array,
    keys: jax.Array,
    config: SamplingConfig,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
) -> DecodeState:
    """Runs the Q prompts once, repeats their cache G times and draws the first token of all Q*G rows."""
    prompt_tokens, prompt_length = jnp.asarray(prompt_tokens), jnp.asarray(prompt_length)
    if prompt_tokens.ndim != 2 or prompt_length.shape != prompt_tokens.shape[:1]:
        raise ValueError(
            f"prompt_tokens must be [Q, P] and prompt_length [Q]; got {prompt_tokens.shape} and "
            f"{prompt_length.shape}"
        )
    (num_prompts, prompt_size), samples, new = prompt_tokens.shape, config.num_samples, config.max_new_tokens
    rows = num_prompts * samples
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (rows,):
        raise ValueError(
            f"keys must be {rows} typed keys, one for each of {num_prompts} prompts x {samples} samples; got "
            f"{keys.dtype}{list(keys.shape)}; make them with row_keys(jax.random.key(seed), {rows})"
        )
    valid = length_mask(prompt_length, prompt_size)
    tokens = jnp.where(valid, prompt_tokens, 0)  # padding may be no id of this vocabulary
    positions = slot_positions(prompt_length, prompt_size, prompt_size)
    empty = init_cache(module, num_prompts, prompt_size)
    hidden, cache = apply(module, params, tokens, positions, valid, adapter=adapter, scale=scale, cache=empty)
    assert cache is not None
    last = jnp.take_along_axis(hidden, (prompt_length - 1)[:, None, None], axis=1)[:, 0]
    logits = unembed(module, params, last, adapter=adapter, scale=scale)
    state = DecodeState(
        step=jnp.int32(0),
        tokens=jnp.pad(
            jnp.repeat(prompt_tokens.astype(jnp.int32), samples, axis=0),
            ((0, 0), (0, new)),
            constant_values=config.pad_id,
        ),
        prompt_length=jnp.repeat(prompt_length.astype(jnp.int32), samples),
        length=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
        lp=jnp.zeros((rows, new), jnp.float32),
        lp_model=jnp.zeros((rows, new), jnp.float32),
        support_size=jnp.zeros((rows, new), jnp.int32) if config.truncates else None,
        cache=_repeat_cache(module, cache, samples, new),
    )
    return _emit(state, jnp.repeat(logits, samples, axis=0), keys, config)


def decode(
    module: Decoder,
    params: Params,
    state: DecodeState,
    keys: jax.Array,
    config: SamplingConfig,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    limit: int | jax.Array | None = None,
) -> DecodeState:
    """Runs the loop to its end: every row ended, or `limit` (at most config.max_new_tokens) tokens drawn."""
    prompt_size = state.tokens.shape[1] - config.max_new_tokens
    limit = config.max_new_tokens if limit is None else jnp.minimum(limit, config.max_new_tokens)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < limit) & ~_all_true(state.ended)

    def advance(state: DecodeState) -> DecodeState:
        slot = prompt_size + state.step - 1
        alive = ~state.ended[:, None]
        token = jnp.where(alive, jax.lax.dynamic_slice_in_dim(state.tokens, slot, 1, axis=1), 0)
        position = (state.prompt_length + state.step - 1)[:, None]
        hidden, cache = apply(
            module, params, token, position, alive, adapter=adapter, scale=scale, cache=state.cache, slot=slot
        )
        assert cache is not None
        logits = unembed(module, params, hidden[:, 0], adapter=adapter, scale=scale)
        return _emit(dataclasses.replace(state, cache=cache), logits, keys, config)

    return jax.lax.while_loop(unfinished, advance, state)


def rollout_batch(state: DecodeState, config: SamplingConfig, vocabulary_hash: str = "") -> RolloutBatch:
    """The finished state without what only decoding needs."""
    prompt_size = state.tokens.shape[-1] - config.max_new_tokens
    sequences = Sequences(state.tokens, state.prompt_length, state.length, prompt_size, vocabulary_hash)
    return RolloutBatch(sequences, state.lp, state.lp_model, state.support_size, state.ended)


def _emit(state: DecodeState, logits: jax.Array, keys: jax.Array, config: SamplingConfig) -> DecodeState:
    """Draws token `state.step` of every row from logits f32[B, V] and writes it; an ended row gets padding.

    keys: key[B]; token t of a row is drawn with fold_in(its key, t).
    """
    step, alive = state.step, ~state.ended
    model = process_logits(logits)
    sampled = model
    if config.temperature == 0:
        token = jnp.argmax(logits, axis=-1)
        lp = jnp.zeros(token.shape, jnp.float32)
    else:
        if config.truncates or config.temperature != 1:
            sampled = process_logits(logits, config.temperature, config.top_k, config.top_p)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = jax.vmap(draw)(step_keys, sampled)
        lp = _pick(sampled, token)
    lp_model = _pick(model, token)
    token = jnp.where(alive, token.astype(jnp.int32), config.pad_id)
    is_eos = functools.reduce(jnp.logical_or, [token == i for i in config.eos_ids], jnp.zeros_like(alive))

    def write(buffer: jax.Array, column: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, value[:, None], column, axis=1)

    support_size = None
    if state.support_size is not None:
        ids = jnp.sum(sampled > -jnp.inf, axis=-1, dtype=jnp.int32)
        support_size = write(state.support_size, step, jnp.where(alive, ids, 0))
    return dataclasses.replace(
        state,
        step=step + 1,
        tokens=write(state.tokens, state.tokens.shape[1] - config.max_new_tokens + step, token),
        length=state.length + alive,
        ended=state.ended | (alive & is_eos),
        lp=write(state.lp, step, jnp.where(alive, lp, 0.0)),
        lp_model=write(state.lp_model, step, jnp.where(alive, lp_model, 0.0)),
        support_size=support_size,
    )


def _pick(logprobs: jax.Array, token: jax.Array) -> jax.Array:
    """f32[B, V], i32[B] -> f32[B]."""
    return jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def _repeat_cache(module: Decoder, cache: Cache, samples: int, new: int) -> Cache:
    """Each row `samples` times, in a cache that has `new` more slots behind the prompt's."""
    num_prompts, prompt_size = cache.valid.shape

    def write(empty: jax.Array, filled: jax.Array, row_axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice(empty, jnp.repeat(filled, samples, row_axis), (0,) * empty.ndim)

    empty = init_cache(module, num_prompts * samples, prompt_size + new)
    return Cache(
        k=write(empty.k, cache.k, 1),
        v=write(empty.v, cache.v, 1),
        positions=write(empty.positions, cache.positions, 0),
        valid=write(empty.valid, cache.valid, 0),
    )


@jax.custom_batching.custom_vmap
def _all_true(x: jax.Array) -> jax.Array:
    """bool[]: all of x; under vmap one value for all replicas.

    If the loop condition differed between replicas, vmap would select old or new for the whole carry at each
    step, a copy of every cache a token. One shared condition leaves the loop as it is, and `_emit` writes
    nothing but padding into rows that have ended.
    """
    return jnp.all(x)


@_all_true.def_vmap
def _all_true_of_replicas(_axis_size: int, _in_batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    return _all_true(x), False


@dataclasses.dataclass(frozen=True)
class Sampler:
    """`sample` compiled: it picks the bucket on the host, prefills, and decodes with donated state.

    Attributes:
      module, config: what is sampled from, and how.
      buckets: prompt sizes, ascending. One compilation a bucket in use (and a number of prompts).
    """

    module: Decoder
    config: SamplingConfig
    buckets: tuple[int, ...] = DEFAULT_BUCKETS

    def bucket(self, longest: int) -> int:
        """The smallest bucket that holds a prompt of `longest` tokens."""
        for size in self.buckets:
            if longest <= size:
                return size
        raise ValueError(
            f"the longest prompt has {longest} tokens, the largest bucket {self.buckets[-1]}; shorten the prompt "
            "or give a larger bucket"
        )

    def __call__(
        self,
        params: Params,
        prompt_tokens: np.ndarray | jax.Array,
        prompt_length: np.ndarray | jax.Array | Sequence[int],
        keys: jax.Array,
        *,
        adapter: Params | None = None,
        scale: float | jax.Array = 1.0,
        limit: int | jax.Array | None = None,
        vocabulary_hash: str = "",
    ) -> RolloutBatch:
        """As `sample`. prompt_tokens of any width that holds the prompts are cut or padded to the bucket."""
        tokens, lengths = np.asarray(prompt_tokens, np.int32), np.asarray(prompt_length, np.int32)
        if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not lengths.size:
            raise ValueError(
                f"prompt_tokens must be [Q, P] with Q >= 1 and prompt_length [Q]; got {tokens.shape} and "
                f"{lengths.shape}"
            )
        if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
            raise ValueError(
                f"prompt_length must be in 1..{tokens.shape[1]}, got {lengths.min()}..{lengths.max()}; an empty "
                "prompt needs a beginning-of-sequence token"
            )
        size = self.bucket(int(lengths.max()))
        tokens = np.pad(tokens[:, :size], ((0, 0), (0, max(0, size - tokens.shape[1]))))
        if limit is None:
            limit = self.config.max_new_tokens
        state = _prefill(
            self.module, params, tokens, lengths, keys, self.config, adapter=adapter, scale=scale
        )
        state = _decode(
            self.module, params, state, keys, self.config, adapter=adapter, scale=scale, limit=limit
        )
        return rollout_batch(state, self.config, vocabulary_hash)


_prefill = jax.jit(prefill, static_argnames=("module", "config"))
# The whole state is returned so that each donated buffer, the cache above all, has an output to live on in.
_decode = jax.jit(decode, static_argnames=("module", "config"), donate_argnames=("state",))


def make_sampler(
    module: Decoder, config: SamplingConfig, buckets: Sequence[int] = DEFAULT_BUCKETS
) -> Sampler:
    """A compiled sampler. Samplers of equal module and config share their compilations.

    Raises:
      ValueError: buckets are empty or not positive.
    """
    sizes = tuple(sorted({int(size) for size in buckets}))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"buckets must be positive prompt sizes, got {tuple(buckets)}")
    return Sampler(module, config, sizes)
