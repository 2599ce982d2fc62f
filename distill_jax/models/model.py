"""`Model`: a decoder with its weights and its tokenizer; loading from and saving to disk."""

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
from distill_jax.mesh import place_batch
from distill_jax.models import hf_io
from distill_jax.models.adapter import AdapterConfig, adapter_scale
from distill_jax.models.decoder import Decoder, Params, apply, unembed
from distill_jax.models.families import config_from_spec, spec_from_config
from distill_jax.models.gguf_file import read_gguf
from distill_jax.models.gguf_io import gguf_spec, read_gguf_params
from distill_jax.models.hub import PREFIX, fetch_from_hub, is_hub_name
from distill_jax.models.origin import Origin, read_origin
from distill_jax.models.packages import PACKAGE_MODELS, find_package_model
from distill_jax.models.peft_io import write_peft_adapter
from distill_jax.models.quantised import check_weights, has_quantised
from distill_jax.models.spec import ModelSpec
from distill_jax.text.tokenizers import TokenIds, Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
_MOST_SPARE_ROWS = 1024  # of an embedding that is padded to a round size; published ones have up to 400
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder, its weights, and the tokenizer of its vocabulary.

    spec: the model in numbers. params: see `decoder`. tokenizer: None for weights that came without one.
    module: what `decoder.apply` takes. mesh: where the weights lie, None for one device.
    origin: what else its folder said, kept for the folder that `save_model` writes.
    """

    spec: ModelSpec
    params: Params
    tokenizer: Tokenizer | None
    module: Decoder
    mesh: Mesh | None = None
    origin: Origin = dataclasses.field(default_factory=Origin)

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.spec.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, but the model's embedding only "
                f"{self.spec.vocab_size}; they do not belong together: put the model's own tokenizer beside its weights"
            )

    def logits(
        self,
        tokens: Any,
        lengths: Any = None,
        adapter: Params | None = None,
        scale: float | jax.Array = 1.0,
        adapter_config: AdapterConfig | None = None,
    ) -> jax.Array:
        """Logits of every position; for small inputs: [B, T, V] is stored.

        Args:
          tokens: i32[B, T], or a list of B `TokenIds` of one length.
          lengths: i32[B], how many tokens of each row are real; all by default. Later positions hold no
            meaning.
          adapter: low-rank adapter tree, multiplied by `scale`.
          scale: the dial s with `adapter_config` (s * alpha / rank is applied); without it, the whole
            multiplier.

        Returns:
          f32[B, T, V]; `logits[b, t]` predicts token t + 1.

        Raises:
          ValueError: another rank, ids outside the vocabulary or of another one, lengths outside 1..T.
        """
        for row in tokens:
            if isinstance(row, TokenIds) and self.tokenizer is not None:
                self.tokenizer.check(row)
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens must be integers of shape [B, T], got {ids.dtype} of shape {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            raise ValueError(
                f"token ids must lie in 0..{self.spec.vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}"
            )
        rows, width = ids.shape
        real = np.full(rows, width) if lengths is None else np.asarray(lengths)
        if real.shape != (rows,) or real.min() < 1 or real.max() > width:
            raise ValueError(f"lengths must be {rows} numbers in 1..{width}, got {real.tolist()}")
        batch = (ids.astype(np.int32), real.astype(np.int32))
        if self.mesh is not None:
            batch = place_batch(batch, self.mesh)
        return _logits(self.module, self.params, *batch, adapter, multiplier(scale, adapter_config))


def multiplier(scale: float | jax.Array, config: AdapterConfig | None) -> float | jax.Array:
    """What A B is multiplied by: scale * alpha / rank with a config, else `scale` itself."""
    return scale if config is None else adapter_scale(config, scale)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    module: Decoder,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    adapter: Params | None,
    scale: jax.Array,
) -> jax.Array:
    rows, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (rows, width))
    valid = length_mask(lengths, width)
    hidden, _ = apply(module, params, tokens, positions, valid, adapter=adapter, scale=scale)
    return unembed(module, params, hidden, adapter=adapter, scale=scale)


def load_model(
    path_or_name: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
    weights: str = "full",
) -> Model:
    """Loads a model from disk; only a name that starts with "hf://" may be fetched from a network.

    Args:
      path_or_name: a Hugging Face folder (config.json and safetensors, also sharded; `save_model` writes such
        a folder), a .gguf file, the name of a demo model in an installed package: "smollm2-135m",
        "gemma3-270m"; or "hf://ORGANISATION/NAME[@REVISION]" on the Hugging Face hub (see `hub`).
      mesh: where the weights are put, each by its logical axes; None is the default device.
      dtype: of the weights and of the computation: "float32", "bfloat16" or "float16".
      tokenizer: used instead of the one that lies beside the weights.
      weights: "int8" keeps the layers' kernels in 8 bits, for a model that stays frozen: an adapter on top of
        it is trained as on any other, the weights cannot be trained, merged or saved (see `quantised`).

    Raises:
      FileNotFoundError: no such file, folder, installed package or model on the hub; says what to do.
      ValueError: an unsupported architecture or setting; truncated, pickled, missing or unexpected weights; a
        tokenizer with more tokens than the embedding has rows; "int8" without the package qwix.
        `mesh.ShardingError`: the mesh does not divide a dimension.
    """
    check_weights(weights)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    path, origin = Path(path_or_name).expanduser(), Origin()
    if is_hub_name(path_or_name):
        path = fetch_from_hub(str(path_or_name))
    elif not path.exists():
        if str(path_or_name) not in PACKAGE_MODELS:
            raise FileNotFoundError(
                f"no model at {path_or_name!r}: expected a Hugging Face folder, a .gguf file, "
                f"{PREFIX}ORGANISATION/NAME, or one of the names {sorted(PACKAGE_MODELS)}"
            )
        path = find_package_model(str(path_or_name))
    if path.is_dir():
        spec = spec_from_config(hf_io.read_json(path / "config.json"))
        module = Decoder(spec, mesh, dtype, param_dtype=dtype)
        params = hf_io.read_hf_params(path, module, weights=weights)
        origin = read_origin(path, str(path_or_name))
        tokenizer = tokenizer or load_tokenizer(path)
    else:
        file = read_gguf(path)
        spec = gguf_spec(file)
        module = Decoder(spec, mesh, dtype, param_dtype=dtype)
        params = read_gguf_params(file, module, weights)
        tokenizer = tokenizer or load_tokenizer(path)
    if tokenizer is not None and tokenizer.vocab_size != spec.vocab_size:
        # Embeddings are often padded, and a model may write an id of the padding: legal, and no text.
        spare = spec.vocab_size - tokenizer.vocab_size
        if spare > max(_MOST_SPARE_ROWS, spec.vocab_size // 20):
            raise ValueError(
                f"{path}: the embedding has {spec.vocab_size} rows, but the tokenizer only {tokenizer.vocab_size} "
                "tokens, and padding does not explain that; they do not belong together: put the model's own tokenizer "
                "beside its weights"
            )
        tokenizer = tokenizer.with_vocab_size(spec.vocab_size)
    return Model(spec, params, tokenizer, module, mesh, origin)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer beside the weights in a folder, or in a .gguf file; None for a folder that has none.

    Raises:
      ValueError: a malformed file, named in the message.
    """
    if not path.is_dir():
        return Tokenizer.from_gguf(path)
    return Tokenizer.from_folder(path) if any((path / name).is_file() for name in _TOKENIZER_FILES) else None


def save_model(
    model: Model,
    path: str | Path,
    adapter: Params | None = None,
    scale: float = 1.0,
    merge: bool = True,
    adapter_config: AdapterConfig | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a Hugging Face folder that `load_model` and transformers read, or (merge=False) a PEFT adapter
    folder.

    Without an adapter the weights are written bit for bit. The folder appears under its name only when it is
    complete.

    Args:
      adapter: low-rank adapter tree; merged as kernel + multiplier * A B, or written as it is with
        merge=False.
      scale: the dial s with `adapter_config` (multiplier s * alpha / rank); without it, the whole multiplier.
      max_shard_bytes: weights beyond this size are split into shards with an index.

    Returns:
      The absolute path.

    Raises:
      FileExistsError: `path` exists and is not an empty folder.
      OSError: could not be written (a full disk, for example); nothing is left under the name.
      ValueError: merge=False without an adapter, weights in 8 bits with merge=True, or a spec that no Hugging Face
        architecture expresses.
    """
    if adapter is None and not merge:
        raise ValueError("merge=False writes an adapter folder, but no adapter was given")
    if merge and has_quantised(model.params):
        raise ValueError(
            "the weights of this model are in 8 bits, and a folder is written from the original ones; load it with "
            "weights='full' and save that (an adapter alone can be written with merge=False)"
        )
    target = Path(path).expanduser().absolute()
    factor = float(multiplier(scale, adapter_config))
    if adapter is not None and not merge:
        with hf_io.new_folder(target) as folder:
            write_peft_adapter(folder, model.module, adapter, factor, model.origin)
        return target
    config = config_from_spec(model.spec)
    dtype = str(jax.tree.leaves(model.params)[0].dtype)
    # Both names: transformers 5 writes "dtype", version 4 reads "torch_dtype".
    config |= {"dtype": dtype, "torch_dtype": dtype}
    generation: dict[str, Any] = dict(model.origin.generation)
    tokenizer = model.tokenizer
    if tokenizer is not None:
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        generation |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        generation |= {"eos_token_id": list(tokenizer.eos_ids)} if tokenizer.eos_ids else {}
    with hf_io.new_folder(target) as folder:
        hf_io.write_json(folder / "config.json", config)
        hf_io.write_json(folder / "generation_config.json", generation)
        hf_io.write_hf_params(folder, model.module, model.params, adapter, factor, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(folder)
    return target
