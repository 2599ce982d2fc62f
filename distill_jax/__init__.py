"""distill_jax: measure how distillable a language-model teacher is, and turn it either way.

Shapes, everywhere: B rows (= prompts x G rollouts a prompt), P prompt slots, T completion tokens, S spans (or cache
slots), V vocabulary, D model width, L layers, N query heads, K key/value heads, H head width, F feed-forward width,
R adapter rank, G rollouts a prompt. `lp` are log-probabilities, float32, already shifted: ``lp[b, t]`` scores token t.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it. Loaded on first use, so that importing the package costs nothing.
_PUBLIC = {
    "make_mesh": "distill_jax.mesh",
    "Model": "distill_jax.models.model",
    "load_model": "distill_jax.models.model",
    "save_model": "distill_jax.models.model",
    "token_logprobs": "distill_jax.logprobs",
    "generate": "distill_jax.generation",
    "align_spans": "distill_jax.text.spans",
    "span_logprobs": "distill_jax.text.spans",
    "Spans": "distill_jax.text.spans",
    "Tokenizer": "distill_jax.text.tokenizers",
    "TokenIds": "distill_jax.text.tokenizers",
    "calibration_reward": "distill_jax.rft.calibration",
    "make_rft_step": "distill_jax.rft.step",
    "make_student_step": "distill_jax.students.step",
    "Divergence": "distill_jax.students.divergence_config",
    "StudentLoss": "distill_jax.students.divergence_config",
    "Teacher": "distill_jax.students.targets",
    "TopKTargets": "distill_jax.students.targets",
    "make_targets": "distill_jax.students.targets",
    "save_targets": "distill_jax.students.targets",
    "load_targets": "distill_jax.students.targets",
    "export_arm": "distill_jax.export",
}
_MODULES = (
    "attacks",
    "checkpoint",
    "data",
    "distribution",
    "generation",
    "logprobs",
    "masked",
    "mesh",
    "metrics",
    "models",
    "optimizer",
    "pipeline",
    "probes",
    "report",
    "rewards",
    "rft",
    "sampling",
    "sequences",
    "students",
    "tasks",
    "text",
)

__all__ = [*_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"distill_jax.{name}")
    raise AttributeError(f"module 'distill_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
