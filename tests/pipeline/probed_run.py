"""The smallest run with the probes and the dial on."""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import config_dict

from distill_jax.mesh import make_mesh
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.probe_settings import ProbeSuite
from distill_jax.pipeline.settings import to_config
from tests.pipeline.tiny_run import smallest

SUITE = ProbeSuite(problems=4, samples=2, frequent=5, distil=True, arms=("original", "distillable"))
DIAL = DialConfig(
    arm="distillable",
    scales=(-1.0, 0.0, 1.0),
    other="control",
    weights=(0.5, 1.0),
    problems=8,
    samples=8,
    steps=2,
)


def one_device(spec: str):
    """The mesh of a run, on one of the eight devices: what is tested here is not sharding."""
    return make_mesh(spec, devices=jax.devices()[:1])


def probing(
    probes: str = "all",
    suite: ProbeSuite = SUITE,
    dial: DialConfig = DIAL,
    stages: tuple[str, ...] = ("prepare", "calibrate", "report"),
    **changes: Any,
) -> config_dict.ConfigDict:
    """The config of that run, or of one that differs."""
    # Two steps in every gold completion: one of them can be forced wrong.
    steps = {"task.options.operations": (2, 2), "task.options.gold_styles.folded": 1e-9}
    config = smallest({"stages": stages, "distillation.seeds": 1, **steps, **changes})
    # Trained for as long as the teacher: bytes of a student that knows nothing are no text that two tokenizers share.
    config.roles.proxy.phases = config.students.bytes.phases = config.roles.teacher.phases
    with config.unlocked():
        config.probes, config.probe_suite, config.dial = probes, to_config(suite), to_config(dial)
    return config
