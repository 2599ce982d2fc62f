"""A random reward model on bytes, as a Hugging Face folder, for every test that needs one."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.model import Model, save_model
from distill_jax.models.spec import ModelSpec
from distill_jax.text.tokenizers import Tokenizer


def write_classifier(folder: Path, labels: int = 1, seed: int = 0) -> Path:
    """A Llama classifier of one layer and width 16; the vocabulary (260) and the width divide by two."""
    spec = ModelSpec("llama", 260, 16, 1, 2, 2, 8, 32, tie_embeddings=True)
    module = Decoder(spec)
    params = init_params(module, jax.random.key(seed))
    save_model(Model(spec, params, Tokenizer.bytes_tokenizer(), module), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]})
    )
    head = np.random.default_rng(seed).normal(size=(labels, 16)).astype(np.float32)
    weights = load_file(folder / "model.safetensors") | {"score.weight": head}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
