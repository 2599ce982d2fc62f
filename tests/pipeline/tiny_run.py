"""configs/calib_guard.py as a module, and a run of it that is as small as a run can be."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from ml_collections import config_dict

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ("tiny", "gemma3_270m", "gemma3_12b", "qwen3_8b")


@functools.cache
def load_config() -> ModuleType:
    """The config file as `--config` would load it."""
    place = importlib.util.spec_from_file_location("calib_guard", ROOT / "configs" / "calib_guard.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def smallest(changes: Mapping[str, Any] = MappingProxyType({})) -> config_dict.ConfigDict:
    """Two arms, one kind of student, three seeds, one budget; models of one layer and width 16."""
    config = load_config().get_config("tiny")
    config.smoke = True
    config.remat = "none"
    config.at_once = 1
    config.probes, config.dial.arm, config.dial.other = "none", "", ""
    config.bpe_vocab_size = 300
    for optimizer in (config.base_optimizer, config.distillation.training.optimizer):
        optimizer.name = "adamw"  # compiles faster
    spec = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 32}
    del config.students["bpe"]
    del config.eta["undistillable"]
    config.smoke_values = tuple(row for row in config.smoke_values if not row[0].startswith("students.bpe"))
    for role in (config.roles.teacher, config.roles.proxy, config.students.bytes):
        role.spec.update(spec)
    phase = {
        "steps": 60,
        "learning_rate": 0.02,
        "styles": (("terse", 1.0),),
        "operations": (1, 2),
        "batch_size": 8,
    }
    config.roles.teacher.phases = (phase,)
    config.roles.proxy.phases = (phase | {"steps": 4},)
    config.students.bytes.phases = (phase | {"steps": 4},)
    config.task.options.operations = (1, 2)
    calibration = config.calibration
    calibration.steps, calibration.batch_size, calibration.rft.num_samples = 2, 8, 4
    calibration.unscorable_limit, calibration.completion_size = 1.0, 12
    calibration.proxy_completion_sizes = (48,)
    calibration.train_problems, calibration.validation_problems, calibration.validation_batch = 64, 8, 8
    distillation = config.distillation
    distillation.samples, distillation.steps, distillation.budgets = 16, 4, (1.0,)
    distillation.training.batch_size, distillation.training.checkpoint_every = 8, 1
    config.evaluation.problems, config.evaluation.batch, config.evaluation.rollouts = 16, 16, 4
    config.update_from_flattened_dict(changes)
    return config
