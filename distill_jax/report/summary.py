"""From the WORKDIR to `report/summary.json`, schema 1: every number of the report, with its interval.

    {"schema": 1, "config": {...}, "environment": {...}, "wall_clock_s": {stage: seconds}, "setting": {...},
     "arms": {arm: {"teacher": {metric: V}, "students": {attack: {student: {metric: V}}}, "probes": {}}},
     "baselines": {"base_student": {student: {metric: V}}, "gold_sft": {student: {metric: V}}},
     "texts": {arm: {student: {"kept": [int, one a seed], "dropped": [int]}}},
     "recovered": {student: {metric: {arm: V}}}, "claims": [...], "missing": [str]}

The pipeline adds "effective_config": the config with its modes (smoke, budget_curve) worked in.

A stage that has not run leaves its part empty and a sentence in `missing`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.report import words
from distill_jax.report.claims import Setting, make_claims, student_kinds
from distill_jax.report.records import (
    ARMS,
    BASELINES,
    DECODINGS,
    DEFAULT_BUDGET,
    Outcomes,
    Results,
    read_results,
)
from distill_jax.report.recovered import recovered_gaps
from distill_jax.report.statistics import RESAMPLES, Value, estimate, minimum_detectable_effect

SCHEMA = 1


def _student_metrics(cells: Mapping[tuple[float, str], Outcomes], draw: dict[str, Any]) -> dict[str, Value]:
    """Accuracy by decoding and budget. Students of one single budget (the untrained ones) are the default."""
    budgets = {budget for budget, _ in cells}
    only = budgets.pop() if len(budgets) == 1 else None
    return {
        words.metric_name(decoding, DEFAULT_BUDGET if budget == only else budget): estimate(
            cell.correct, **draw
        )
        for (budget, decoding), cell in sorted(
            cells.items(), key=lambda item: (item[0][0] != DEFAULT_BUDGET, item[0])
        )
    }


def _by_prompt(rows: Sequence[Mapping[str, Any]], numbers: Sequence[float]) -> np.ndarray:
    """f64[1, N]: the mean over each prompt's rollouts, so that the bootstrap resamples prompts."""
    collected: dict[str, list[float]] = {}
    for row, number in zip(rows, numbers, strict=True):
        collected.setdefault(row["prompt"], []).append(number)
    return np.array([[float(np.mean(values)) for values in collected.values()]])


def _rollout_metrics(rows: Sequence[Mapping[str, Any]], draw: dict[str, Any]) -> dict[str, Value]:
    """Gap per byte, length in bytes and shares of styles of a teacher's last rollouts; n counts prompts."""
    metrics = {}
    scored = [
        row for row in rows if row.get("gap_per_byte") is not None and math.isfinite(row["gap_per_byte"])
    ]
    if scored:
        gaps = _by_prompt(scored, [float(row["gap_per_byte"]) for row in scored])
        metrics["gap_per_byte"] = estimate(gaps, bounded=False, **draw)
    if rows:
        lengths = _by_prompt(rows, [float(len(row["completion"].encode())) for row in rows])
        metrics["completion_bytes"] = estimate(lengths, bounded=False, **draw)
    styled = [row for row in rows if row.get("style")]
    for style in sorted({row["style"] for row in styled}):
        shares = _by_prompt(styled, [float(row["style"] == style) for row in styled])
        metrics[f"style/{style}"] = estimate(shares, **draw)
    return metrics


def _alignment_metrics(rows: Sequence[Mapping[str, Any]], draw: dict[str, Any]) -> dict[str, Value]:
    """How much of the calibration's rollouts teacher and proxy could be compared on; n counts training steps.

    span_coverage: share of the scored bytes that lie in spans of both tokenizers; unscorable: share of rollouts that
    the proxy could not score at all.
    """
    metrics = {}
    for name in ("span_coverage", "unscorable"):
        shares = [float(row[name]) for row in rows if row.get(name) is not None]
        if shares:
            metrics[name] = estimate(np.array([shares]), **draw)
    return metrics


def _arm(
    arm: str, results: Results, kinds: Sequence[str], draw: dict[str, Any], missing: list[str]
) -> dict[str, Any]:
    teacher = {
        words.metric_name(decoding): estimate(results.teachers[arm, decoding].correct, **draw)
        for decoding in DECODINGS
        if (arm, decoding) in results.teachers
    }
    if not teacher:
        missing.append(f"teacher of arm {arm}: no answers to the test problems (arms/{arm}/evaluation.jsonl)")
    if arm not in results.rollouts:
        missing.append(
            f"teacher of arm {arm}: no rollouts, so no gap, length or style (arms/{arm}/rollouts.jsonl)"
        )
    attacks = sorted({attack for having, attack, _ in results.students if having == arm})
    students = {
        attack: {
            kind: _student_metrics(results.students[arm, attack, kind], draw)
            for kind in kinds
            if (arm, attack, kind) in results.students
        }
        for attack in attacks
    }
    return {
        "teacher": {
            **teacher,
            **_rollout_metrics(results.rollouts.get(arm, []), draw),
            **_alignment_metrics(results.metrics.get(arm, []), draw),
        },
        "students": students,
        "probes": {},
    }


def _missing_students(results: Results, setting: Setting, kinds: Sequence[str]) -> list[str]:
    if not results.students:
        return [
            "students: none have been evaluated (students/<arm>/<attack>/<student>/seed<k>/predictions.jsonl)"
        ]
    missing = []
    places = [(arm, arm, setting.attack) for arm in ARMS] + [
        (name, *place) for name, place in BASELINES.items()
    ]
    for name, arm, attack in places:
        absent = [kind for kind in kinds if (arm, attack, kind) not in results.students]
        if absent:
            missing.append(f"students of {name}: none of kind {', '.join(absent)} (students/{arm}/{attack}/)")
    return missing


def _texts(results: Results, attack: str, missing: list[str]) -> dict[str, dict[str, dict[str, list[int]]]]:
    """arm -> student -> texts kept and dropped, one number a seed; dropped ones are named in `missing`."""
    texts: dict[str, dict[str, dict[str, list[int]]]] = {}
    for (arm, of_attack, kind), seeds in results.texts.items():
        if of_attack != attack:
            continue
        counts = {name: [seed[name] for seed in seeds] for name in ("kept", "dropped")}
        texts.setdefault(arm, {})[kind] = counts
        dropped = sum(counts["dropped"])
        if dropped:
            missing.append(
                f"texts of {arm} for students of kind {kind}: {dropped} of {dropped + sum(counts['kept'])} were "
                "dropped, because they do not fit or the student's tokenizer does not give them back"
            )
    return texts


def strict_json(value: Any) -> Any:
    """The value with plain JSON types only: tuples become lists, NaN and infinity become None.

    Raises:
      TypeError: a value that JSON has no word for; names its type.
    """
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            strict_json(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, np.ndarray | np.generic):
        return strict_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"summary: expected numbers, text, lists and mappings, got {type(value).__name__}: {value!r:.60}"
    )


def summarise(
    workdir: str | Path,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    setting: Setting,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The summary of a run, schema 1, from what its WORKDIR holds so far.

    Args:
      workdir: folder of the run; its layout is described in `distill_jax.report`.
      config: the run's configuration; environment: versions and devices. Both are copied as they are.
      setting: what the students were given; it goes into the words of every claim.
      resamples, seed: of the bootstrap.

    Returns:
      A dict of plain JSON types without NaN or infinity.

    Raises:
      FileNotFoundError: no such folder. ValueError: a result file that is present is broken.
    """
    results = read_results(workdir)
    draw: dict[str, Any] = {"resamples": resamples, "seed": seed}
    kinds = student_kinds(results, setting)
    missing: list[str] = []
    arms = {arm: _arm(arm, results, kinds, draw, missing) for arm in ARMS}
    texts = _texts(results, setting.attack, missing)
    baselines = {
        name: {
            kind: _student_metrics(results.students[*place, kind], draw)
            for kind in kinds
            if (*place, kind) in results.students
        }
        for name, place in BASELINES.items()
    }
    claims, unjudged = make_claims(results, setting, resamples=resamples, seed=seed)
    problems = max(
        (len(cell.problems) for cells in results.students.values() for cell in cells.values()), default=0
    )
    return strict_json(
        {
            "schema": SCHEMA,
            "config": config,
            "environment": environment,
            "wall_clock_s": results.wall_clock_s,
            "setting": {
                **asdict(setting),
                "test_problems": problems,
                "minimum_detectable_effect": minimum_detectable_effect(problems) if problems else None,
            },
            "arms": arms,
            "baselines": baselines,
            "texts": texts,
            "recovered": recovered_gaps(results, setting.attack, kinds, draw),
            "claims": claims,
            "missing": [*missing, *_missing_students(results, setting, kinds), *unjudged, *results.notes],
        }
    )


def write_summary(workdir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Writes WORKDIR/report/summary.json atomically and returns its path.

    Raises:
      ValueError: the summary holds NaN or infinity, which JSON does not know.
    """
    from distill_jax.checkpoint import (
        write_json,  # brings orbax along: a second that reading a summary does not need
    )

    try:
        json.dumps(summary, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            "summary: expected finite numbers and None; pass it through strict_json first"
        ) from error
    path = Path(workdir) / "report" / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, summary)
    return path
