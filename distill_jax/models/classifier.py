"""Sequence classifiers of the supported families: a decoder whose last token is read by a score head.

A reward model is one with a single label. Its folder is that of the language model, with another architecture
(`LlamaForSequenceClassification`), without a language-model head, and with `score.weight` [1, D].

Sources: the classes `*ForSequenceClassification` of transformers 5.24; Skywork-Reward-V2, arXiv 2507.01352 (Llama
and Qwen3 models of this form).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.masked import length_mask
from distill_jax.mesh import place_batch, replicated
from distill_jax.models import hf_io
from distill_jax.models.decoder import Decoder, Params, apply
from distill_jax.models.families import spec_from_config
from distill_jax.models.hub import fetch_from_hub, is_hub_name
from distill_jax.models.spec import ModelSpec
from distill_jax.text.tokenizers import Tokenizer

HEAD = "score.weight"
_KIND = "ForSequenceClassification"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A decoder and one score for a text.

    Attributes:
      spec: the decoder in numbers; its head is never used.
      params: the decoder's weights.
      head: f32[D], the score head.
      tokenizer: of its vocabulary.
      module: what `decoder.apply` takes.
      mesh: where the weights lie, None for one device.
      pad_id: the id of padding, which is never the token that the head reads: where it also closes a text, the token
        before it is read, as transformers does. None: no such id.
    """

    spec: ModelSpec
    params: Params
    head: jax.Array
    tokenizer: Tokenizer
    module: Decoder
    mesh: Mesh | None = None
    pad_id: int | None = None

    def scores(self, tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
        """The head on the hidden state of each row's last token that is not `pad_id`.

        Args:
          tokens: i32[B, T], right-padded; B divides by the mesh's data x fsdp.
          lengths: i32[B], at least 1.

        Returns:
          f32[B].
        """
        tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
        if self.pad_id is not None:
            places = np.arange(tokens.shape[1])
            read = (places < lengths[:, None]) & (tokens != self.pad_id)
            lengths = np.where(read, places + 1, 1).max(axis=1).astype(np.int32)
        batch: Any = (tokens, lengths)
        if self.mesh is not None:
            batch = place_batch(batch, self.mesh)
        return _scores(self.module, self.params, self.head, *batch)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    module: Decoder, params: Params, head: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    hidden, _ = apply(module, params, tokens, positions, length_mask(lengths, tokens.shape[1]))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last.astype(jnp.float32) @ head


def load_classifier(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
) -> Classifier:
    """Loads a sequence classifier with one label from a Hugging Face folder.

    Args:
      path: the folder, or "hf://ORGANISATION/NAME[@REVISION]" on the hub.
      mesh: where the weights are put, each by its logical axes; None is the default device.
      dtype: of the weights and of the computation; the score is float32.
      tokenizer: used instead of the one that lies beside the weights.

    Raises:
      FileNotFoundError: no such folder or file in it.
      ValueError: no sequence classifier, a family that is not supported, more than one label, or what reading the
        weights raises.
    """
    folder = fetch_from_hub(str(path)) if is_hub_name(path) else Path(path).expanduser()
    config = hf_io.read_json(folder / "config.json")
    names = config.get("architectures") or []
    if len(names) != 1 or not str(names[0]).endswith(_KIND):
        raise ValueError(
            f"{folder} is no reward model: its architecture is {names}, expected a sequence classifier such as "
            f"['Llama{_KIND}'] (config.json and safetensors with {HEAD})"
        )
    causal = str(names[0]).removesuffix(_KIND).replace("Gemma3Text", "Gemma3") + "ForCausalLM"
    # No language-model head is stored; a head that is the embedding needs none.
    spec = dataclasses.replace(
        spec_from_config(config | {"architectures": [causal], "tie_word_embeddings": True}),
        tie_embeddings=True,
    )
    head = hf_io.read_tensor(folder, HEAD)
    if head.shape != (1, spec.d_model):
        raise ValueError(
            f"{folder}: {HEAD} has shape {head.shape}; a reward model has one label, so (1, {spec.d_model})"
        )
    module = Decoder(spec, mesh, dtype, param_dtype=dtype)
    params = hf_io.read_hf_params(folder, module, beside=(HEAD,))
    weights = jnp.asarray(np.asarray(head[0], np.float32))
    if mesh is not None:
        weights = jax.device_put(weights, replicated(mesh))
    tokenizer = tokenizer or Tokenizer.from_folder(folder)
    if tokenizer.vocab_size != spec.vocab_size:
        tokenizer = tokenizer.with_vocab_size(spec.vocab_size)
    pad_id = config.get("pad_token_id")
    return Classifier(spec, params, weights, tokenizer, module, mesh, None if pad_id is None else int(pad_id))
