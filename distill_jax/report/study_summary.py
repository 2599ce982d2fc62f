"""Does a probe predict? WORKDIR/study as rank correlations of every number with the students' accuracy.

One teacher is one point: (a probe's number, greedy accuracy of the students that learned from it). Numbers that were
measured **before** distillation, on the teacher and the untrained student, are forecasts; those of **after** know the
trained student, so they explain at best. Each of the two families is adjusted for how many numbers it holds. What the
teacher does by itself (accuracy, length, gap) stands among the forecasts, as what a probe must beat.

A number

    "predicts"   adjusted p below .05, and the whole 95 % interval on rho's side of 0
    "hints"      the interval alone does not hold 0
    "silent"     neither

The teachers share one original, and positions of the dial one adapter: the intervals are about teachers like these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.report.rank_correlation import FEWEST, RESAMPLES, is_constant, rank_correlation
from distill_jax.report.statistics import difference, estimate, holm

WHEN = ("before", "after")
SIGNIFICANT = 0.05
# The outcome again, on the probes' own problems: the accuracy, and what is made of right and wrong answers.
_OUTCOMES = tuple(
    f"overconfidence/{name}.{when}"
    for name in ("accuracy", "expected_calibration_error", "risk_coverage")
    for when in ("after", "change")
)
_ROUNDING = 1e-9
_KEYS = ("name", "source", "mode", "eta", "seed", "teacher", "student", "before", "after")


def summarise_study(
    workdir: str | Path, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any] | None:
    """The study of a WORKDIR as plain JSON types; None where it has not run.

    Returns:
      suite.json, with
        "untrained": V, greedy accuracy of the untrained student, or None
        "teachers": [{"name", "source", "mode", "eta", "seed", "position", "teacher": V, "student": V or None,
          "gained": V or None, the student's accuracy minus the untrained one's, "why_not"}]
        "numbers": [{"when", "probe", "name", "rho", "ci95", "p", "p_adjusted", "n", "verdict", "points":
          {teacher: value}}], by |rho|
        "constant": {when: [name]}, the same for all teachers; "few": {when: [name]}, known for too few of them
        "undefined": why there is no correlation at all, or None.

    Raises:
      ValueError: a file that is present cannot be what it should be.
    """
    folder = Path(workdir) / "study"
    points = [_read(path) for path in sorted(folder.glob("*/point.json"))]
    if not points:
        return None
    suite = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    draw: dict[str, Any] = {"seed": seed}
    path = folder / "untrained.json"
    untrained = json.loads(path.read_text(encoding="utf-8"))["student"]["greedy"] if path.is_file() else None
    teachers = [_teacher(point, untrained, draw) for point in points]
    outcomes = {t["name"]: t["student"]["mean"] for t in teachers if t["student"] is not None}
    numbers, constant, few = [], {}, {}
    for when in WHEN:
        found, constant[when], few[when] = _correlate(when, points, outcomes, resamples, seed)
        numbers += found
    return {
        **suite,
        "untrained": None if untrained is None else estimate(untrained, **draw),
        "teachers": teachers,
        "numbers": sorted(numbers, key=lambda number: -abs(number["rho"])),
        "constant": constant,
        "few": few,
        "undefined": _undefined(outcomes),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        point = json.loads(path.read_text(encoding="utf-8"))
        _ = [point[key] for key in _KEYS], point["teacher"]["greedy"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a teacher of the study, got {error!r}") from error
    return point


def _teacher(
    point: Mapping[str, Any], untrained: list[list[int]] | None, draw: Mapping[str, Any]
) -> dict[str, Any]:
    student = None if point["student"] is None else point["student"]["greedy"]
    return {
        **{name: point[name] for name in ("name", "source", "mode", "eta", "seed")},
        "position": point.get("position"),
        "teacher": estimate([point["teacher"]["greedy"]], **draw),
        "student": None if student is None else estimate(student, **draw),
        "gained": None if student is None or untrained is None else difference(student, untrained, **draw),
        "why_not": point.get("why_not"),
    }


def teacher_numbers(point: Mapping[str, Any], when: str) -> dict[str, float]:
    """'probe/metric' -> value of one teacher, of the numbers that it has; without those that are the outcome."""
    found = {
        f"{probe}/{metric}": value["mean"]
        for probe, result in (point[when] or {}).items()
        for metric, value in result["metrics"].items()
        if value["mean"] is not None and f"{probe}/{metric}" not in _OUTCOMES
    }
    if when == "before":
        gaps = [gap for gap in point["gap_per_byte"] if gap is not None and math.isfinite(gap)]
        found |= {f"teacher/accuracy_{d}": float(np.mean(rows)) for d, rows in point["teacher"].items()}
        found["teacher/completion_bytes"] = float(np.mean(point["bytes"]))
        if gaps:
            found["teacher/gap_per_byte"] = float(np.mean(gaps))
    return found


def _correlate(
    when: str,
    points: list[dict[str, Any]],
    outcomes: Mapping[str, float],
    resamples: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """(numbers with a correlation, names of constant ones, names of those of too few teachers)."""
    tables = {p["name"]: teacher_numbers(p, when) for p in points if p["name"] in outcomes}
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    numbers: list[dict[str, Any]] = []
    constant, few = [], []
    for name in names:
        values = {teacher: table[name] for teacher, table in tables.items() if name in table}
        column = np.array(list(values.values()))
        if len(column) < FEWEST:
            few.append(name)
            continue
        if is_constant(column):
            constant.append(name)
            continue
        found = rank_correlation(
            column, [outcomes[teacher] for teacher in values], resamples=resamples, seed=seed
        )
        if found is not None:
            numbers.append(
                {
                    "when": when,
                    "probe": name.partition("/")[0],
                    "name": name.partition("/")[2],
                    "rho": found.rho,
                    "ci95": list(found.ci95),
                    "p": found.p,
                    "n": found.n,
                    "points": values,
                }
            )
    for place, adjusted in holm({place: number["p"] for place, number in enumerate(numbers)}).items():
        numbers[place] |= {"p_adjusted": adjusted, "verdict": _verdict(numbers[place]["ci95"], adjusted)}
    return numbers, constant, few


def _verdict(ends: list[float | None], adjusted: float) -> str:
    low, high = ends
    if low is None or high is None or (low <= _ROUNDING and high >= -_ROUNDING):
        return "silent"
    return "predicts" if adjusted < SIGNIFICANT else "hints"


def _undefined(outcomes: Mapping[str, float]) -> str | None:
    if len(outcomes) < FEWEST:
        return (
            f"only {len(outcomes)} teachers have students, and fewer than {FEWEST} have no order to speak of"
        )
    if is_constant(np.array(list(outcomes.values()))):
        return "the students of all teachers are equally accurate, so there is nothing to predict"
    return None
