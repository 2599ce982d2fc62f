"""The teachers of a study: more calibrations of a run's own original, each in WORKDIR/study/<name>.

A name says what the teacher is: "distillable-eta0.25-seed1", "control-seed3". The seed is added to the run's own, so
seed 0 would be an arm of the run; it decides prompts, rollouts and the adapter's first weights.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from jax.sharding import Mesh

from distill_jax.checkpoint import read_json
from distill_jax.pipeline.arms import calibration_config, load_proxies, make_task, style_of
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import Settings
from distill_jax.pipeline.study_settings import StudyConfig
from distill_jax.rft.calibrate import calibrate


@dataclasses.dataclass(frozen=True)
class StudyTeacher:
    """name: its folder. mode: "control", "distillable" or "undistillable". eta: strength. seed: see the file's head."""

    name: str
    mode: str
    eta: float
    seed: int


def study_teachers(study: StudyConfig) -> list[StudyTeacher]:
    """The further teachers of a study, controls first."""
    controls = [StudyTeacher(f"control-seed{k}", "control", 0.0, k) for k in range(1, study.controls + 1)]
    return controls + [
        StudyTeacher(f"{mode}-eta{eta:g}-seed{seed}", mode, eta, seed)
        for seed in range(1, study.seeds + 1)
        for eta in study.eta
        for mode in study.modes
    ]


def teacher_folder(workdir: Path, name: str) -> Path:
    """Where `calibrate` works."""
    return workdir / "study" / name


def finished_teachers(workdir: Path, run_seed: int) -> list[StudyTeacher]:
    """Every teacher of a study whose calibration stands in a run's folder, in order of name."""
    found = []
    for path in sorted((workdir / "study").glob("*/calibration.json")):
        record = read_json(path)
        found.append(StudyTeacher(path.parent.name, record["arm"], record["eta"], record["seed"] - run_seed))
    return found


def calibrate_teachers(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Calibrates every teacher of the study that is not finished."""
    assert settings.study is not None
    waiting = [
        teacher
        for teacher in study_teachers(settings.study)
        if not (teacher_folder(workdir, teacher.name) / "calibration.json").exists()
    ]
    if not waiting:
        return
    original = load_role(settings, mesh, workdir, "teacher")
    proxies = load_proxies(settings, mesh, workdir)
    steps = settings.study.calibration_steps or settings.calibration.steps
    config = dataclasses.replace(calibration_config(settings), steps=steps)

    def run(teacher: StudyTeacher) -> None:
        result = calibrate(
            original,
            proxies,
            make_task(settings, mesh),
            teacher.mode,
            teacher.eta,
            config,
            teacher_folder(workdir, teacher.name),
            seed=settings.seed + teacher.seed,
            style_of=lambda text: style_of(settings, text),
        )
        print(
            f"study/{teacher.name}: gap {result.original.gap_per_byte:.3f} -> {result.best.gap_per_byte:.3f} nats a "
            f"byte, greedy accuracy {result.original.accuracy:.3f} -> {result.best.accuracy:.3f}",
            flush=True,
        )

    run_at_once([functools.partial(run, teacher) for teacher in waiting], settings.at_once)
