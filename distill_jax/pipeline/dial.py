"""Stage dial: one trained adapter, applied more or less, the wrong way round, or mixed with another one.

Two curves: the adapter of `dial.arm` at every scale, and, with `dial.other`, the way from that arm's adapter to it. At
each position the teacher answers the test problems, and students are trained on its texts; no teacher is trained.
WORKDIR/dial/<curve>/scale<s>.json is one position; those that are there are not made again. WORKDIR/dial/suite.json
says what was asked for.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from distill_jax.checkpoint import read_json, write_json
from distill_jax.models.adapter import AdapterConfig, adapter_scale, blend_adapters
from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import Arm, load_arm, make_task, style_of
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.evaluate import DECODINGS, teacher_answers, test_problems, text_gaps
from distill_jax.pipeline.prepare import STUDENT, load_role
from distill_jax.pipeline.settings import Settings
from distill_jax.pipeline.short_students import short_answers, short_settings, train_short
from distill_jax.tasks.base import Problem, Task

# What decides a position's numbers, besides the position.
_FIXED = ("arm", "other", "kind", "seeds", "samples", "steps", "problems")


def dial(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Measures every position that has not been measured.

    Raises:
      ValueError: arms or a kind that the run does not have, arms without adapters, or positions of other settings.
      FileNotFoundError: an arm that is not calibrated yet.
    """
    settings = dial_settings(settings)
    chosen = settings.dial
    (kind,) = settings.students
    _open_suite(settings, workdir, kind)
    points = [
        (curve, position)
        for curve, positions in curves(settings).items()
        for position in positions
        if not point_path(workdir, curve, position).exists()
    ]
    if not points:
        return
    teacher = load_role(settings, mesh, workdir, "teacher")
    arms = {name: load_arm(settings, workdir, teacher, name) for name in (chosen.arm, chosen.other) if name}
    proxy = load_role(settings, mesh, workdir, "proxy")
    student = load_role(settings, mesh, workdir, f"{STUDENT}{kind}")
    task, problems = make_task(settings, mesh), test_problems(settings)
    done = itertools.count(1)

    def measure(curve: str, position: float) -> None:
        started = time.monotonic()
        other = arms.get(chosen.other)
        arm = turned(settings.calibration.adapter, teacher, arms[chosen.arm], other, curve, position)
        training = _training(workdir) / arm.name
        trained = train_short(settings, arm, student, training, f"dial {curve} {position:g}")
        point = {
            "position": position,
            **teacher_numbers(settings, arm, teacher, proxy, task, problems),
            **short_answers(settings, student, trained, task, problems),
            "wall_clock_s": time.monotonic() - started,
        }
        write_json(point_path(workdir, curve, position), point)
        shutil.rmtree(training, ignore_errors=True)
        print(
            f"dial {next(done)}/{len(points)}: {curve} at {position:g}, {point['wall_clock_s']:.0f} s",
            flush=True,
        )

    run_at_once([functools.partial(measure, *point) for point in points], settings.at_once)
    shutil.rmtree(_training(workdir), ignore_errors=True)


def dial_settings(settings: Settings) -> Settings:
    """The run's settings as the dial uses them: one kind of student, one budget, its own sizes.

    Raises:
      ValueError: arms or a kind that the run does not have, or arms that have weights of their own.
    """
    chosen = settings.dial
    calibrated = [arm for arm in settings.arms if arm != "original"]
    for field in ("arm", "other"):
        name = getattr(chosen, field)
        if name and name not in calibrated:
            raise ValueError(
                f"dial.{field} is {name!r}; expected a calibrated arm of the run, one of {calibrated}"
            )
    if settings.calibration.trainable != "adapter":
        raise ValueError(
            "the dial scales an adapter, but calibration.trainable='params' gives every arm weights of its own"
        )
    return short_settings(
        settings, "dial", chosen.kind, chosen.seeds, chosen.samples, chosen.steps, chosen.problems
    )


def curves(settings: Settings) -> dict[str, tuple[float, ...]]:
    """Name of each curve (its folder) -> positions."""
    chosen = settings.dial
    found = {chosen.arm: chosen.scales}
    if chosen.other:
        found[f"{chosen.other}-{chosen.arm}"] = chosen.weights
    return found


def point_path(workdir: Path, curve: str, position: float) -> Path:
    """File of one position."""
    return workdir / "dial" / curve / f"scale{position:g}.json"


def _training(workdir: Path) -> Path:
    """Checkpoints of the students in training; a killed start goes on from them."""
    return workdir / "dial" / "training"


def _open_suite(settings: Settings, workdir: Path, kind: str) -> None:
    """Writes suite.json, or compares with the one that is there; positions may be added.

    Raises:
      ValueError: the positions that are there are of other settings.
    """
    chosen, sizes = settings.dial, settings.distillation
    suite = {
        "arm": chosen.arm,
        "other": chosen.other,
        "kind": kind,
        "seeds": sizes.seeds,
        "samples": sizes.samples,
        "steps": sizes.steps,
        "problems": settings.evaluation.problems,
        "floor": chosen.floor,
        "curves": {name: list(positions) for name, positions in curves(settings).items()},
    }
    path = workdir / "dial" / "suite.json"
    if any(path.parent.glob("*/scale*.json")):
        before = read_json(path)
        differing = [f"{n}: {before[n]!r} -> {suite[n]!r}" for n in _FIXED if before[n] != suite[n]]
        if differing:
            raise ValueError(
                f"{workdir} holds another dial ({'; '.join(differing)}); give the same settings, or move "
                f"{path.parent} away"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, suite)


def turned(
    config: AdapterConfig, teacher: Model, arm: Arm, other: Arm | None, curve: str, position: float
) -> Arm:
    """The teacher with the dial at this position.

    Args:
      config: of the adapters. teacher: the original.
      arm: whose adapter is scaled on the curve of its own name.
      other: where any other curve begins.
    """
    name = f"{curve}@{position:g}"
    if curve == arm.name:
        return Arm(name, teacher, arm.adapter, float(adapter_scale(config, position)))
    assert other is not None
    blend = blend_adapters([(_adapter(other), 1.0 - position), (_adapter(arm), position)])
    return Arm(name, teacher, blend, float(adapter_scale(config)))


def teacher_numbers(
    settings: Settings, arm: Arm, teacher: Model, proxy: Model, task: Task, problems: list[Problem]
) -> dict[str, Any]:
    """What a teacher itself does on the problems.

    Returns:
      {"teacher": {decoding: [0 or 1]}, "gap_per_byte": [nats or None], "bytes": [int], "style": [str or None]}, one
      entry a problem; all but the first of its sampled texts.
    """
    rows, texts = teacher_answers(settings, arm, task, problems)
    return {
        "teacher": _by_decoding(rows),
        "gap_per_byte": text_gaps(settings, teacher, proxy, texts),
        "bytes": [len(row["completion"].encode()) for row in texts],
        "style": [style_of(settings, row["completion"]) for row in texts],
    }


def _adapter(arm: Arm) -> Params:
    assert arm.adapter is not None
    return arm.adapter


def _by_decoding(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    return {
        decoding: [row["correct"] for row in rows if row["decoding"] == decoding] for decoding in DECODINGS
    }
