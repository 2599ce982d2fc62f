"""Stage study: does a probe predict what a student learns? Many teachers, every probe, one short student of each.

The teachers are further calibrations of the run's original (`study_teachers`), the run's own arms, and some positions
of the dial. Each is measured in the same way: its accuracy, every probe with the untrained student ("before": a
forecast, since nobody has been trained yet), short students trained on what it writes, their accuracy (the outcome),
and every probe again with the trained one ("after": in hindsight). At positions of the dial the students are those
that the dial has trained, and since it keeps none, there is no "after".

WORKDIR/study/<name>/point.json is one teacher, study/untrained.json the untrained student on the same problems,
study/suite.json how all were measured. What is there is not made again.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from distill_jax.checkpoint import read_json, write_json
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import Arm, calibration_record, load_arm, load_calibrated, make_task
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.dial import point_path, teacher_numbers, turned
from distill_jax.pipeline.distil import student_start
from distill_jax.pipeline.evaluate import test_problems
from distill_jax.pipeline.prepare import STUDENT, load_role
from distill_jax.pipeline.probe import measure_once
from distill_jax.pipeline.probe_settings import choose_probes
from distill_jax.pipeline.probe_texts import Bench, Written, make_bench
from distill_jax.pipeline.settings import Settings
from distill_jax.pipeline.short_students import Trained, short_answers, short_settings, train_short
from distill_jax.pipeline.study_teachers import calibrate_teachers, study_teachers, teacher_folder
from distill_jax.tasks.base import Problem, Task

# Of the probes: changes no number.
_FREE = ("arms", "kinds", "distil", "batch_size", "chunk")
_OF_STUDENTS = ("kind", "seeds", "samples", "steps", "problems")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A teacher that is looked at.

    Attributes:
      name: its folder. source: "study", "arm" or "dial". mode, eta: of its calibration; "original" and 0 without one.
      seed: of its calibration, beyond the run's. position: of the dial, None elsewhere.
    """

    name: str
    source: str
    mode: str
    eta: float
    seed: int = 0
    position: float | None = None


@dataclasses.dataclass(frozen=True)
class _Tools:
    """What all teachers share."""

    settings: Settings
    workdir: Path
    teacher: Model
    proxy: Model
    student: Model
    kind: str
    bench: Bench
    untrained: Written
    task: Task
    problems: list[Problem]


def study(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Calibrates, measures and distils every teacher that is not finished.

    Raises:
      ValueError: a kind of student that the run does not have, or a study that was made otherwise.
      FileNotFoundError: models that are not there yet.
    """
    settings = study_settings(settings)
    (kind,) = settings.students
    suite = _open_suite(settings, workdir, kind)
    calibrate_teachers(settings, mesh, workdir)
    entries = chosen_entries(settings, workdir, suite)
    waiting = [entry for entry in entries if not study_path(workdir, entry.name).exists()]
    if not waiting:
        return
    student, bench = load_role(settings, mesh, workdir, f"{STUDENT}{kind}"), make_bench(settings, mesh)
    tools = _Tools(
        settings,
        workdir,
        load_role(settings, mesh, workdir, "teacher"),
        load_role(settings, mesh, workdir, "proxy"),
        student,
        kind,
        bench,
        bench.untrained(student, kind),
        make_task(settings, mesh),
        test_problems(settings),
    )
    _evaluate_untrained(tools)
    run_at_once([functools.partial(_look_at, tools, entry) for entry in waiting], settings.at_once)


def study_settings(settings: Settings) -> Settings:
    """The run's settings as the study uses them: its kind of student, its sizes, its probes.

    Raises:
      ValueError: a kind that the run does not have.
    """
    chosen = settings.study
    assert chosen is not None
    settings = dataclasses.replace(settings, probes=choose_probes(chosen.probes))
    return short_settings(
        settings,
        "study",
        chosen.kind,
        chosen.student_seeds,
        chosen.samples,
        chosen.student_steps,
        chosen.problems,
    )


def study_path(workdir: Path, name: str) -> Path:
    """File of one teacher."""
    return teacher_folder(workdir, name) / "point.json"


def chosen_entries(settings: Settings, workdir: Path, suite: Mapping[str, Any]) -> list[Entry]:
    """The run's own arms as far as they are calibrated, the further teachers, and positions of the dial."""
    assert settings.study is not None
    own = [Entry("original", "arm", "original", 0.0)] + [
        Entry(arm, "arm", arm, float(calibration_record(workdir, arm)["eta"]))
        for arm in settings.arms
        if arm != "original" and (workdir / "arms" / arm / "calibration.json").exists()
    ]
    further = [
        Entry(teacher.name, "study", teacher.mode, teacher.eta, teacher.seed)
        for teacher in study_teachers(settings.study)
    ]
    return own + further + _positions(settings, workdir, suite)


def _positions(settings: Settings, workdir: Path, suite: Mapping[str, Any]) -> list[Entry]:
    assert settings.study is not None
    path = workdir / "dial" / "suite.json"
    if not path.exists():
        return []
    dial = read_json(path)
    differing = [
        f"{name}: {dial[name]!r}, here {suite[name]!r}" for name in _OF_STUDENTS if dial[name] != suite[name]
    ]
    if differing:
        print(f"study: the dial's students are others ({'; '.join(differing)}) and are left out", flush=True)
        return []
    arm = dial["arm"]
    eta = float(calibration_record(workdir, arm)["eta"])
    return [
        Entry(f"dial-{arm}-at{position:g}", "dial", arm, eta, position=position)
        for position in settings.study.positions
        if point_path(workdir, arm, position).exists()
    ]


def _open_suite(settings: Settings, workdir: Path, kind: str) -> dict[str, Any]:
    """Writes suite.json, or compares with the one that is there; teachers may be added.

    Raises:
      ValueError: the teachers that are there were measured otherwise.
    """
    assert settings.study is not None
    sizes = settings.distillation
    probes = dataclasses.asdict(settings.probe_suite)
    suite = {
        "kind": kind,
        "seeds": sizes.seeds,
        "samples": sizes.samples,
        "steps": sizes.steps,
        "problems": settings.evaluation.problems,
        "calibration_steps": settings.study.calibration_steps or settings.calibration.steps,
        "probes": list(settings.probes),
        **{f"probe_suite.{name}": value for name, value in probes.items() if name not in _FREE},
    }
    path = workdir / "study" / "suite.json"
    if path.exists():
        before = read_json(path)
        differing = [f"{n}: {before.get(n)!r} -> {suite[n]!r}" for n in suite if before.get(n) != suite[n]]
        if differing:
            raise ValueError(
                f"{workdir} holds another study ({'; '.join(differing)}); give the same settings, or move "
                f"{path.parent} away"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, suite)
    return suite


def _evaluate_untrained(tools: _Tools) -> None:
    """The zero that outcomes are also given against."""
    path = tools.workdir / "study" / "untrained.json"
    if path.exists():
        return
    trees, base = student_start(tools.settings, tools.student, 1)
    untrained = Trained(trees, base, [], None)
    write_json(path, short_answers(tools.settings, tools.student, untrained, tools.task, tools.problems))


def _load(tools: _Tools, entry: Entry) -> Arm:
    if entry.source == "arm":
        return load_arm(tools.settings, tools.workdir, tools.teacher, entry.name)
    if entry.source == "study":
        folder = teacher_folder(tools.workdir, entry.name)
        return load_calibrated(tools.settings, folder, tools.teacher, entry.name)
    assert entry.position is not None
    arm = load_arm(tools.settings, tools.workdir, tools.teacher, entry.mode)
    adapter = tools.settings.calibration.adapter
    return turned(adapter, tools.teacher, arm, None, entry.mode, entry.position)


def _look_at(tools: _Tools, entry: Entry) -> None:
    """Writes one teacher's point.json."""
    started, settings = time.monotonic(), tools.settings
    arm = _load(tools, entry)
    of_teacher = tools.bench.teacher(arm)
    texts = tools.bench.teacher_texts(of_teacher)
    after: dict[str, Any] | None = None
    if entry.source == "dial":
        assert entry.position is not None
        stored = read_json(point_path(tools.workdir, entry.mode, entry.position))
        names = ("teacher", "gap_per_byte", "bytes", "student", "kept", "why_not")
        numbers = {name: stored[name] for name in names}
    else:
        training = teacher_folder(tools.workdir, entry.name) / "training"
        trained = train_short(settings, arm, tools.student, training, f"study {entry.name}")
        numbers = teacher_numbers(settings, arm, tools.teacher, tools.proxy, tools.task, tools.problems)
        numbers |= short_answers(settings, tools.student, trained, tools.task, tools.problems)
        if trained.trees is not None:
            student = tools.bench.trained(tools.student, trained.trees, trained.base, tools.kind)
            after = measure_once(settings, of_teacher, texts, student, tools.untrained)
        shutil.rmtree(training, ignore_errors=True)
    point = {
        **dataclasses.asdict(entry),
        **numbers,
        "before": measure_once(settings, of_teacher, texts, tools.untrained, tools.untrained),
        "after": after,
        "wall_clock_s": time.monotonic() - started,
    }
    path = study_path(tools.workdir, entry.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, point)
    print(f"study: {entry.name}, {point['wall_clock_s']:.0f} s", flush=True)
