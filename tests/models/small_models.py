"""The small random models of `goldens/`, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder, Params

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = ("gemma2", "gemma3", "gemma3_text", "llama", "llama3", "mistral", "qwen2", "qwen3")

# Adapters that goldens/make_peft_goldens.py gave to PEFT, at this scale of the dial: between two whole numbers.
PEFT_ADAPTERS = {
    "llama": AdapterConfig(rank=2, alpha=6.0),
    "llama3": AdapterConfig(rank=3, alpha=6.0, targets=("attn", "head")),
    "gemma3_text": AdapterConfig(rank=2, alpha=6.0),
    "gemma3": AdapterConfig(rank=2, alpha=6.0),  # inside a model of images and text
}
PEFT_SCALE = 0.75


def exact_adapter(module: Decoder, config: AdapterConfig) -> Params:
    """An adapter whose numbers are small fractions with a denominator of 2048: the same wherever it is made."""
    shapes = jax.eval_shape(lambda: init_adapter(module, config, jax.random.key(0)))
    leaves, structure = jax.tree.flatten(shapes)
    values = [
        ((np.arange(leaf.size) * 7919 + 104_729 * place) % 1009 - 504) / 2048
        for place, leaf in enumerate(leaves)
    ]
    arrays = [
        jnp.asarray(value.reshape(leaf.shape), jnp.float32)
        for value, leaf in zip(values, leaves, strict=True)
    ]
    return structure.unflatten(arrays)


def answers(name: str) -> dict[str, np.ndarray]:
    """tokens i32[2, 48], logits f32[2, 48, 128], prompt i32[20] and its greedy continuation i32[12]."""
    return dict(np.load(GOLDENS / name / "golden.npz"))


def stored_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in the safetensors files of a folder, read without this project's loader."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_config(folder: Path, **changes: object) -> None:
    """Changes fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
