"""Students: models trained on a teacher's text or towards its distribution, and the loop that trains them."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "aligned_texts",
    "cross_tokenizer",
    "cross_tokenizer_step",
    "divergence_config",
    "divergences",
    "on_policy",
    "replay",
    "scorers",
    "sources",
    "step",
    "targets",
    "train",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
