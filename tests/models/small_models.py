"""The small random models of `goldens/`, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = ("gemma2", "gemma3", "gemma3_text", "llama", "llama3", "mistral", "qwen2", "qwen3")


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
