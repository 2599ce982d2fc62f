"""Probes: will this teacher distil into this student, and if not, why? One measurement a file.

    tail_noise       how much of the KL is tail?
    off_policy       does the signal drift off the data that it was made on?
    gap              can the teacher rank the student's work?
    overconfidence   is the student confident and wrong?
    self_correction  can it repair a wrong step?
    decoding         does its decoding break?
    detector         does a model look calibrated against distillation?

Each has ``measure(teacher, student, batch, ...)``, which returns a frozen dataclass of `values.Value` (mean, 95 %
interval over prompts, n) and of notes, in words, about what could not be measured. `diagnosis.diagnose` turns them into
sentences, `results.to_json` into JSON.

Nothing here knows how a teacher was calibrated: a mistake in the reward must not be able to hide from its measurement.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "decoding",
    "detector",
    "diagnosis",
    "distributions",
    "gap",
    "off_policy",
    "overconfidence",
    "pairs",
    "reference",
    "results",
    "roc",
    "self_correction",
    "subjects",
    "tail_noise",
    "texts",
    "values",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
