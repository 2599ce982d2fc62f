"""Decoders, adapters, and their files. The only place that imports Flax."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "adapter",
    "decoder",
    "families",
    "gguf_file",
    "gguf_io",
    "hf_io",
    "hub",
    "layers",
    "model",
    "packages",
    "presets",
    "quantised",
    "spec",
    "weights",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
