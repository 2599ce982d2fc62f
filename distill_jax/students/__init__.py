"""Students: the models that are trained on a teacher's text, and the loop that trains them."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("step", "train")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
