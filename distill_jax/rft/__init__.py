"""Reinforcement fine-tuning of the teacher: rewards, advantages, losses, the step, the calibration loop."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "advantages",
    "answer_utility",
    "calibrate",
    "calibration",
    "config",
    "judgement",
    "losses",
    "micro_batches",
    "proxies",
    "proxy_training",
    "rewards",
    "rollout",
    "rollout_log",
    "step",
    "texts",
    "validation",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
