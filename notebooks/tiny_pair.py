"""The models of the notebooks: those of a finished run, or a tiny pair that the pipeline's first stage trains here."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import jax
from ml_collections import config_dict

from distill_jax import make_mesh, pipeline
from distill_jax.checkpoint import read_json
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import make_task
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import Settings, read_settings
from distill_jax.rft.config import CalibrationConfig
from distill_jax.tasks import Task

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SIZES = ("smoke", "full")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher (byte-level BPE), a small proxy and a student of the proxy's shape (bytes both), and their task."""

    teacher: Model
    proxy: Model
    student: Model
    task: Task
    settings: Settings

    def calibration(self, **changes: object) -> CalibrationConfig:
        """The run's calibration, with some fields changed; prompts are written as the models learned them."""
        roles = self.settings.roles
        styles = {
            "prompt_style": roles["teacher"].prompt_style,
            "proxy_prompt_style": roles["proxy"].prompt_style,
        }
        return dataclasses.replace(self.settings.calibration, **styles, **changes)  # type: ignore[arg-type]


def load_config_file(name: str = "calib_guard.py") -> ModuleType:
    """A file of configs/ as a module."""
    place = importlib.util.spec_from_file_location(name.removesuffix(".py"), CONFIGS / name)
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def tiny_config(size: str) -> config_dict.ConfigDict:
    """configs/calib_guard.py:tiny with its base models alone; "smoke" is as small as shows every step.

    Raises:
      ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {SIZES}, got {size!r}")
    config = load_config_file().get_config("tiny")
    config.stages = ("prepare",)
    config.probes, config.dial.arm, config.dial.other = "none", "", ""  # the notebooks do these by hand
    if size == "smoke":
        config.smoke = True
        config.bpe_vocab_size = 300
        config.base_optimizer.name = "adamw"  # compiles faster
        del config.students["bpe"]
        config.smoke_values = tuple(
            row for row in config.smoke_values if not row[0].startswith("students.bpe")
        )
        config.task.options.operations = (1, 2)
        phase = {"steps": 60, "learning_rate": 0.02, "styles": (("terse", 1.0),), "operations": (1, 2)}
        for role in (config.roles.teacher, config.roles.proxy, config.students.bytes):
            role.spec.update(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
            role.phases = (phase | {"batch_size": 16},)
        config.calibration.update(batch_size=16, completion_size=16, unscorable_limit=1.0)
        config.calibration.rft.num_samples = 4
    return config


def tiny_pair(size: str = "full", run: str = "") -> Pair:
    """Loads the pair of a run's folder, or trains it (full: ten minutes on two cores; smoke: half a minute).

    Args:
      size: of a pair that is trained here, under runs/ of the current folder; it is trained once.
      run: folder of a run of configs/calib_guard.py:tiny, such as `make run` makes.

    Raises:
      FileNotFoundError: `run` holds no run. ValueError: an unknown size.
    """
    if run:
        if not (Path(run) / "config.json").is_file():
            raise FileNotFoundError(
                f"{run} holds no run (no config.json); leave RUN empty to train the pair here"
            )
        settings, folder = (
            read_settings(config_dict.ConfigDict(read_json(Path(run) / "config.json"))),
            Path(run),
        )
    else:
        config, folder = tiny_config(size), Path("runs") / f"notebook-{size}"
        pipeline.run(config, folder)
        settings = read_settings(config)
    mesh = make_mesh("data=1", devices=jax.devices()[:1])
    teacher, proxy, student = (
        load_role(settings, mesh, folder.absolute(), name) for name in ("teacher", "proxy", "student_bytes")
    )
    return Pair(teacher, proxy, student, make_task(settings), settings)
