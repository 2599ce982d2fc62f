"""The text side: tokenizers with exact byte ends, prompts, and the alignment of two tokenizations on bytes."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "alignable",
    "byte_tables",
    "chat",
    "encoder",
    "folders",
    "gguf_reader",
    "gguf_vocabulary",
    "sentencepiece_vocabulary",
    "spans",
    "token_ids",
    "tokenizers",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
