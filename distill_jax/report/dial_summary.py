"""What the dial did: WORKDIR/dial as curves with intervals, where they are monotone, and where the teacher breaks.

**Monotone** is judged on the students' greedy accuracy by pairs of positions, under the same draws of problems (and of
seeds): a pair *rises* when the whole 95 % interval of the difference lies above 0, and *falls* when it lies below. A
curve is monotone when a pair goes the way that the dial promises, and none goes against it; the longest stretch of
positions inside which none does is named in any case.

**Broken** is a position at which the teacher's greedy accuracy lies more than the floor below that at position 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.report.statistics import RESAMPLES, difference, estimate

_ROUNDING = 1e-9
# Where an arm is meant to take its students: further down, nowhere, further up.
_PROMISE = {"undistillable": -1, "control": 0, "distillable": 1}


def summarise_dial(
    workdir: str | Path, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any] | None:
    """The curves of a WORKDIR as plain JSON types; None where the dial has not been turned.

    Returns:
      suite.json, with "curves": {name: {"direction", "points": [...], "rises", "falls", "pairs", "monotone", "stretch",
      "broken"}}. A point: {"position", "teacher_greedy", "teacher_sample", "loss", "gap_per_byte", "completion_bytes",
      "styles", "student_greedy", "student_sample", "kept", "why_not"}, numbers as V.

    Raises:
      ValueError: a file that is present cannot be what it should be.
    """
    folder = Path(workdir) / "dial"
    if not (folder / "suite.json").is_file():
        return None
    suite = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    draw: dict[str, Any] = {"resamples": resamples, "seed": seed}
    raw = {name: _read(folder / name) for name in suite["curves"]}
    reference = next((point for point in raw[suite["arm"]] if point["position"] == 0.0), None)
    curves = {}
    for name, points in raw.items():
        if points and reference is not None:
            start = _PROMISE[suite["other"]] if name != suite["arm"] else 0
            direction = 1 if _PROMISE[suite["arm"]] >= start else -1
            curves[name] = _curve(points, reference, direction, suite["floor"], draw)
    return {**suite, "curves": curves} if curves else None


def _read(folder: Path) -> list[dict[str, Any]]:
    points = []
    for path in folder.glob("scale*.json"):
        try:
            points.append(json.loads(path.read_text(encoding="utf-8")))
            _ = points[-1]["position"], points[-1]["teacher"]["greedy"], points[-1]["student"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a position of the dial, got {error!r}") from error
    return sorted(points, key=lambda point: point["position"])


def _curve(
    points: list[dict[str, Any]],
    reference: Mapping[str, Any],
    direction: int,
    floor: float,
    draw: Mapping[str, Any],
) -> dict[str, Any]:
    shown = [_point(point, reference, draw) for point in points]
    trained = [point for point in points if point["student"] is not None]
    signs = {
        (a["position"], b["position"]): _sign(a["student"]["greedy"], b["student"]["greedy"], draw)
        for a, b in combinations(trained, 2)
    }
    against = {pair for pair, sign in signs.items() if sign == -direction}
    stretch = _longest([point["position"] for point in trained], against)
    return {
        "direction": direction,
        "points": shown,
        "pairs": len(signs),
        "rises": sum(sign > 0 for sign in signs.values()),
        "falls": sum(sign < 0 for sign in signs.values()),
        "monotone": direction in signs.values() and not against,
        "stretch": stretch,
        "broken": [point["position"] for point in shown if point["loss"]["mean"] < -floor - _ROUNDING],
    }


def _point(point: Mapping[str, Any], reference: Mapping[str, Any], draw: Mapping[str, Any]) -> dict[str, Any]:
    teacher, student = point["teacher"], point["student"]
    gaps = [gap for gap in point["gap_per_byte"] if gap is not None and math.isfinite(gap)]
    named = [style for style in point["style"] if style is not None]
    return {
        "position": point["position"],
        "teacher_greedy": estimate([teacher["greedy"]], **draw),
        "teacher_sample": estimate([teacher["sample"]], **draw),
        "loss": difference([teacher["greedy"]], [reference["teacher"]["greedy"]], **draw),
        "gap_per_byte": estimate([gaps], bounded=False, **draw) if gaps else None,
        "completion_bytes": estimate([point["bytes"]], bounded=False, **draw),
        "styles": {
            style: estimate([[float(one == style) for one in named]], **draw) for style in sorted(set(named))
        },
        "student_greedy": None if student is None else estimate(student["greedy"], **draw),
        "student_sample": None if student is None else estimate(student["sample"], **draw),
        "kept": point["kept"],
        "why_not": point["why_not"],
    }


def _sign(first: list[list[int]], second: list[list[int]], draw: Mapping[str, Any]) -> int:
    """1: the second is better beyond the interval, -1: the first is, 0: they cannot be told apart."""
    if np.array_equal(first, second):
        return 0
    low, high = difference(second, first, **draw)["ci95"]
    return int(low is not None and low > 0.0) - int(high is not None and high < 0.0)


def _longest(positions: list[float], against: set[tuple[float, float]]) -> list[float] | None:
    """[first, last] of the longest stretch without such a pair; the one with the widest range among equals."""
    windows = [
        (last - first, positions[last] - positions[first], positions[first], positions[last])
        for first in range(len(positions))
        for last in range(first + 1, len(positions))
        if not any(pair in against for pair in combinations(positions[first : last + 1], 2))
    ]
    return list(max(windows)[2:]) if windows else None
