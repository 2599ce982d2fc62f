"""Models whose distributions are written down: decoders that look at the last token alone, with a table of our own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh
from tokenizers import decoders, models, pre_tokenizers

from distill_jax.mesh import place
from distill_jax.models.decoder import Decoder, init_params, param_axes
from distill_jax.models.model import Model
from distill_jax.models.spec import ModelSpec
from distill_jax.probes.subjects import Subject
from distill_jax.text.token_ids import TokenizerSettings
from distill_jax.text.tokenizers import Tokenizer

LETTERS = "abcdef"
V = 8  # six letters, the end of sequence, a spare id
EOS = 6


@functools.cache
def letter_tokenizer(*merges: str) -> Tokenizer:
    """One token a letter, and the given pairs of letters; then the end of sequence."""
    vocabulary = {piece: index for index, piece in enumerate((*LETTERS, *merges, "<eos>"))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[(m[0], m[1]) for m in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, TokenizerSettings(eos_id=len(vocabulary) - 1))


def bigram(table: np.ndarray, mesh: Mesh | None = None, tokenizer: Tokenizer | None = None) -> Subject:
    """A model with p(next = j | last = i) = table[i, j] / sum of table[i].

    The embedding is the identity, the layers add nothing, so the head's row i is the logits after token i.
    """
    size = len(table)
    spec = ModelSpec("llama", size, size, 1, 2, 2, size // 2, 2 * size, tie_embeddings=False)
    host = Decoder(spec)
    params = jax.tree.map(jnp.zeros_like, init_params(host, jax.random.key(0)))
    logits = np.log(table / table.sum(axis=1, keepdims=True))
    scale = 1.0 / np.sqrt(1.0 / size + spec.norm_eps)  # what the norm makes of a one
    params["embed"] = jax.tree.map(lambda x: jnp.eye(size, dtype=x.dtype), params["embed"])
    params["final_norm"] = jax.tree.map(jnp.ones_like, params["final_norm"])
    params["head"]["kernel"] = jnp.asarray(logits / scale, jnp.float32)
    module = Decoder(spec, mesh)
    if mesh is not None:
        params = place(params, param_axes(module), mesh)
    tokenizer = tokenizer or letter_tokenizer()
    return Subject(Model(spec, params, tokenizer.with_vocab_size(size), module, mesh), style="raw")


def uniform(size: int = V) -> np.ndarray:
    return np.ones((size, size))


def random_table(seed: int, size: int = V) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0.0, 1.5, (size, size)))


def probabilities(table: np.ndarray) -> np.ndarray:
    return table / table.sum(axis=1, keepdims=True)
