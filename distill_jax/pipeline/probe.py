"""Stage probe: why each arm's teacher does, or does not, distil into each kind of student.

Every chosen probe is measured on the student of seed 0 at the default budget, and once more on the untrained student.
WORKDIR/probes/<arm>.json holds {kind: {probe: `probes.results.to_json`, with "before": the untrained student's
metrics}}; an arm's kinds that are there are not measured again. WORKDIR/probes/suite.json says how they were measured.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from distill_jax.checkpoint import read_json, write_json
from distill_jax.pipeline.arms import load_arm
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.distil import cell, distil
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.probe_texts import Written, make_bench
from distill_jax.pipeline.settings import Settings
from distill_jax.probes import decoding, gap, off_policy, overconfidence, self_correction, tail_noise
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.results import Result, to_json
from distill_jax.probes.self_correction import Corrections
from distill_jax.probes.subjects import Subject
from distill_jax.probes.texts import TextPair

# What may differ between two starts that add to the same numbers.
_FREE = ("arms", "kinds", "distil", "batch_size", "chunk")
# These compare the student with the untrained one by themselves.
_HOLD_BEFORE = ("overconfidence", "self_correction")


def results_path(workdir: Path, arm: str) -> Path:
    """Results of one arm."""
    return workdir / "probes" / f"{arm}.json"


def probe(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Measures every arm and kind of student that has not been measured.

    Raises:
      ValueError: arms or kinds that the run does not have, or a workdir whose probes were measured in another way.
      FileNotFoundError: teachers or students that are not there yet; says which stage makes them.
    """
    arms, kinds = chosen(settings)
    _check_suite(settings, workdir)
    waiting = {kind: [arm for arm in arms if kind not in _stored(workdir, arm)] for kind in kinds}
    waiting = {kind: missing for kind, missing in waiting.items() if missing}
    if not waiting:
        return
    _need_students(settings, mesh, workdir, waiting)
    teacher = load_role(settings, mesh, workdir, "teacher")
    students = {kind: load_role(settings, mesh, workdir, f"student_{kind}") for kind in waiting}
    bench = make_bench(settings, mesh)
    untrained = {kind: bench.untrained(student, kind) for kind, student in students.items()}

    def measure(arm: str) -> None:
        subject = bench.teacher(load_arm(settings, workdir, teacher, arm))
        written = bench.teacher_texts(subject)
        for kind in (kind for kind, missing in waiting.items() if arm in missing):
            started = time.monotonic()
            after = bench.student(workdir, students[kind], arm, kind)
            results = measure_all(settings, subject, written, after, untrained[kind])
            write_json(results_path(workdir, arm), {**_stored(workdir, arm), kind: results})
            print(f"probe/{kind}: {arm}, {time.monotonic() - started:.0f} s", flush=True)

    missing_arms = [arm for arm in arms if any(arm in missing for missing in waiting.values())]
    run_at_once([functools.partial(measure, arm) for arm in missing_arms], settings.at_once)


def chosen(settings: Settings) -> tuple[list[str], list[str]]:
    """(arms, kinds of student) that are probed.

    Raises:
      ValueError: names that the run does not have.
    """
    suite = settings.probe_suite
    for what, named, there in (
        ("arms", suite.arms, settings.arms),
        ("kinds", suite.kinds, tuple(settings.students)),
    ):
        unknown = sorted(set(named) - set(there))
        if unknown:
            raise ValueError(f"probe_suite.{what} names {unknown}; the run has {', '.join(there)}")
    arms = [arm for arm in settings.arms if not suite.arms or arm in suite.arms]
    return arms, [kind for kind in settings.students if not suite.kinds or kind in suite.kinds]


def _stored(workdir: Path, arm: str) -> dict[str, Any]:
    path = results_path(workdir, arm)
    return read_json(path) if path.exists() else {}


def _check_suite(settings: Settings, workdir: Path) -> None:
    """Writes suite.json, or compares with the one that is there.

    Raises:
      ValueError: the numbers that are there were measured otherwise.
    """
    suite = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings.probe_suite).items()
        if name not in _FREE
    }
    suite["probes"] = list(settings.probes)
    path = workdir / "probes" / "suite.json"
    if any(results_path(workdir, arm).exists() for arm in settings.arms):
        before = read_json(path)
        differing = [
            f"{n}: {before.get(n)!r} -> {suite[n]!r}" for n in sorted(suite) if before.get(n) != suite[n]
        ]
        if differing:
            raise ValueError(
                f"{workdir} holds probes that were measured otherwise ({'; '.join(differing)}); give the same probes "
                f"and probe_suite, or move {path.parent} away"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, suite)


def _need_students(settings: Settings, mesh: Mesh, workdir: Path, waiting: dict[str, list[str]]) -> None:
    """Trains the students that are missing where `probe_suite.distil` says so.

    Raises:
      FileNotFoundError: they are missing, and it does not.
    """
    steps = settings.distillation.steps
    absent = {
        f"{arm}/{kind}": arm
        for kind, arms in waiting.items()
        for arm in arms
        if not (cell(workdir, arm, kind) / f"steps{steps}").exists()
    }
    if absent and not settings.probe_suite.distil:
        raise FileNotFoundError(
            f"no students of {steps} steps for {', '.join(absent)} in {workdir}; run the stage 'distil' first, set "
            "probe_suite.distil=True, or leave the probes out with probes='none'"
        )
    if absent:
        kinds = {kind: role for kind, role in settings.students.items() if kind in waiting}
        only = dataclasses.replace(settings, students=kinds)
        distil(only, mesh, workdir, tuple(dict.fromkeys(absent.values())))


def measure_all(
    settings: Settings, teacher: Subject, texts: Written, student: Written, untrained: Written
) -> dict[str, Any]:
    """{probe: its result as JSON, with "before": the untrained student's metrics}."""
    results = measure_once(settings, teacher, texts, student, untrained)
    others = tuple(name for name in settings.probes if name not in _HOLD_BEFORE)
    only = dataclasses.replace(settings, probes=others)
    for name, before in measure_once(only, teacher, texts, untrained, untrained).items():
        results[name]["before"] = before["metrics"]
    return results


def measure_once(
    settings: Settings, teacher: Subject, texts: Written, student: Written, untrained: Written
) -> dict[str, Any]:
    """{probe: its result as JSON}. A probe that refuses what the models wrote leaves no metrics, and its reason."""
    calls = _measures(settings, teacher, texts, student, untrained)
    return {name: _measured(name, calls[name]) for name in settings.probes}


def _measures(
    settings: Settings, teacher: Subject, texts: Written, student: Written, untrained: Written
) -> dict[str, Callable[[], Result]]:
    """Every probe as a call without arguments."""
    suite, limit = settings.probe_suite, settings.distillation.completion_size
    config = ProbeConfig(suite.batch_size, suite.chunk, suite.unaligned_limit, seed=settings.seed)
    pair, own = TextPair(texts.texts, student.texts), student.subject

    def corrections() -> Corrections:
        if student.forced is None or untrained.forced is None:
            raise ValueError(
                "no gold completion has two steps that end in '= number', so none can be forced wrong"
            )
        return Corrections(
            student.prefixes, student.forced, student.texts, texts.texts, untrained.forced, untrained.texts
        )

    return {
        "tail_noise": lambda: tail_noise.measure(
            teacher, own, texts.texts, config=config, frequent=suite.frequent
        ),
        "off_policy": lambda: off_policy.measure(teacher, own, pair, config=config),
        "gap": lambda: gap.measure(teacher, own, pair, config=config),
        "overconfidence": lambda: overconfidence.measure(
            teacher,
            own,
            student.texts,
            base=untrained.subject,
            base_batch=untrained.texts,
            config=config,
            confidence=suite.confidence,
        ),
        "self_correction": lambda: self_correction.measure(teacher, own, corrections(), config=config),
        "decoding": lambda: decoding.measure(teacher, own, pair, config=config, limit=limit),
    }


def _measured(name: str, measure: Callable[[], Result]) -> dict[str, Any]:
    try:
        return to_json(measure())
    except ValueError as error:  # the texts are the models': what cannot be measured on them is a finding
        return {"probe": name, "metrics": {}, "facts": {}, "notes": [f"not measured: {error}"]}
