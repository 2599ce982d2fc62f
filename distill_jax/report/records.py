"""Reads what a run has written into its WORKDIR, as far as it has come, and aligns answers into matrices.

A stage that has not run leaves no file: the reader skips it. A file that is there and wrong (a missing key, a
number outside its range, a broken line that is not the last) is an error with file and line, because a report
built on half-read results would look like a result.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ARMS = ("original", "control", "distillable", "undistillable")
CALIBRATED = ("distillable", "undistillable")
# Baseline of the summary -> its folder under students/: the arm's place and the attack's place.
BASELINES = {"base_student": ("base", "none"), "gold_sft": ("gold", "sft")}
DECODINGS = ("greedy", "sample")
DEFAULT_BUDGET = 1.0

_PREDICTION_KEYS = ("decoding", "problem", "correct")
_ROLLOUT_KEYS = ("step", "prompt", "completion", "reward")
_SEED_FOLDER = re.compile(r"seed(\d+)")


@dataclass(frozen=True)
class Outcomes:
    """Answers of one arm: correct f64[S, N] for `seeds` (S of them) on `problems` (N of them, ascending)."""

    problems: tuple[int, ...]
    seeds: tuple[int, ...]
    correct: np.ndarray


@dataclass(frozen=True)
class Results:
    """Everything of a WORKDIR that the report shows.

    teachers: (arm, decoding) -> Outcomes with one row. students: (arm, attack, student) -> (budget, decoding) ->
    Outcomes. rollouts: arm -> rows of the last step written. metrics: arm -> one row a training step.
    texts: (arm, attack, student) -> one {"kept": texts, "dropped": texts} a seed, of the texts that students were
    given. notes: what was left out while reading, in words.
    """

    teachers: dict[tuple[str, str], Outcomes]
    students: dict[tuple[str, str, str], dict[tuple[float, str], Outcomes]]
    rollouts: dict[str, list[dict[str, Any]]]
    metrics: dict[str, list[dict[str, Any]]]
    wall_clock_s: dict[str, float]
    texts: dict[tuple[str, str, str], list[dict[str, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_rows(path: Path, keys: Iterable[str], notes: list[str]) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; [] when there is no such file.

    A last line without its line feed is what a killed run leaves behind: when it does not parse it is dropped and
    noted.

    Raises:
      ValueError: a line that is not a JSON object or lacks one of `keys`; names file and line.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                notes.append(f"{path.name} of {path.parent.name}: the last line is cut off and was left out")
                break
            raise ValueError(f"{path}, line {number}: expected one JSON object, got {line[:60]!r}") from error
        lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
        if lacking:
            raise ValueError(
                f"{path}, line {number}: expected the keys {', '.join(keys)}; missing {', '.join(lacking)}"
            )
        rows.append(row)
    return rows


def answers_by_cell(path: Path, rows: list[dict[str, Any]]) -> dict[tuple[float, str], dict[int, float]]:
    """(budget, decoding) -> problem -> share right (a problem answered several times counts its mean)."""
    collected: dict[tuple[float, str], dict[int, list[float]]] = {}
    for row in rows:
        decoding, correct = row["decoding"], float(row["correct"])
        if decoding not in DECODINGS:
            raise ValueError(
                f"{path}: expected decoding to be one of {', '.join(DECODINGS)}, got {decoding!r}"
            )
        if not 0.0 <= correct <= 1.0:
            raise ValueError(
                f"{path}: expected correct in [0, 1], got {correct!r} for problem {row['problem']}"
            )
        budget = float(row.get("budget", DEFAULT_BUDGET))
        if not 0.0 <= budget < float("inf"):
            raise ValueError(
                f"{path}: expected budget, a multiple of the default, to be >= 0, got {budget!r}"
            )
        collected.setdefault((budget, decoding), {}).setdefault(int(row["problem"]), []).append(correct)
    return {
        cell: {problem: float(np.mean(values)) for problem, values in problems.items()}
        for cell, problems in collected.items()
    }


def align(by_seed: Mapping[int, Mapping[int, float]], what: str, notes: list[str]) -> Outcomes | None:
    """Outcomes over the problems that every seed answered; None (and a note) when there are none."""
    common = set.intersection(*(set(answers) for answers in by_seed.values()))
    answered = set.union(*(set(answers) for answers in by_seed.values()))
    if not common:
        notes.append(f"{what}: the seeds have no test problem in common, so it is left out")
        return None
    if common != answered:
        notes.append(
            f"{what}: {len(answered) - len(common)} of {len(answered)} problems lack a seed and are left out"
        )
    problems, seeds = tuple(sorted(common)), tuple(sorted(by_seed))
    correct = np.array([[by_seed[seed][problem] for problem in problems] for seed in seeds])
    return Outcomes(problems, seeds, correct)


def pair(first: Outcomes, second: Outcomes) -> tuple[np.ndarray, np.ndarray] | None:
    """The two arms' matrices over their common problems and common seeds (all seeds when none is common).

    Returns None when no problem is common.
    """
    problems = sorted(set(first.problems) & set(second.problems))
    if not problems:
        return None
    seeds = set(first.seeds) & set(second.seeds)
    matrices = []
    for outcomes in (first, second):
        place = {problem: column for column, problem in enumerate(outcomes.problems)}
        columns = [place[problem] for problem in problems]
        rows = [row for row, seed in enumerate(outcomes.seeds) if seed in seeds or not seeds]
        matrices.append(outcomes.correct[np.ix_(rows, columns)])
    return matrices[0], matrices[1]


def _teachers(workdir: Path, notes: list[str]) -> dict[tuple[str, str], Outcomes]:
    teachers = {}
    for arm in ARMS:
        path = workdir / "arms" / arm / "evaluation.jsonl"
        for (_, decoding), answers in answers_by_cell(path, read_rows(path, _PREDICTION_KEYS, notes)).items():
            outcomes = align({0: answers}, f"teacher of arm {arm}, {decoding}", notes)
            if outcomes is not None:
                teachers[arm, decoding] = outcomes
    return teachers


def _students(
    workdir: Path, notes: list[str]
) -> dict[tuple[str, str, str], dict[tuple[float, str], Outcomes]]:
    seeds_of: dict[tuple[str, str, str], dict[int, dict[tuple[float, str], dict[int, float]]]] = {}
    for path in sorted((workdir / "students").glob("*/*/*/seed*/predictions.jsonl")):
        arm, attack, student, folder = path.parts[-5:-1]
        match = _SEED_FOLDER.fullmatch(folder)
        if match is None:
            raise ValueError(f"{path}: expected a folder seed<number>, got {folder!r}")
        rows = read_rows(path, _PREDICTION_KEYS, notes)
        if rows:
            seeds_of.setdefault((arm, attack, student), {})[int(match[1])] = answers_by_cell(path, rows)
    students = {}
    for key, by_seed in seeds_of.items():
        cells = {}
        for budget, decoding in sorted(set().union(*by_seed.values())):
            having = {
                seed: cell[budget, decoding] for seed, cell in by_seed.items() if (budget, decoding) in cell
            }
            outcomes = align(having, f"students {'/'.join(key)} at budget {budget:g}x, {decoding}", notes)
            if outcomes is not None:
                cells[budget, decoding] = outcomes
        students[key] = cells
    return students


def _last_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((row["step"] for row in rows), default=None)
    return [row for row in rows if row["step"] == last]


def read_rollouts(workdir: str | Path, notes: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """arm -> rollout rows of the last step that was written; arms without any are absent."""
    notes = [] if notes is None else notes
    found = {}
    for arm in ARMS:
        rows = read_rows(Path(workdir) / "arms" / arm / "rollouts.jsonl", _ROLLOUT_KEYS, notes)
        if rows:
            found[arm] = _last_step(rows)
    return found


def read_metrics(workdir: str | Path, notes: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """arm -> one row of training metrics a step; arms without any are absent."""
    notes = [] if notes is None else notes
    found = {}
    for arm in ARMS:
        rows = read_rows(Path(workdir) / "arms" / arm / "metrics.jsonl", ("step",), notes)
        if rows:
            found[arm] = rows
    return found


def read_wall_clock(workdir: str | Path) -> dict[str, float]:
    """stage -> seconds, from stages/<stage>.json."""
    seconds = {}
    for path in sorted((Path(workdir) / "stages").glob("*.json")):
        try:
            seconds[path.stem] = float(json.loads(path.read_text(encoding="utf-8"))["wall_clock_s"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path}: expected {{"wall_clock_s": seconds}}') from error
    return seconds


def read_texts(workdir: str | Path) -> dict[tuple[str, str, str], list[dict[str, int]]]:
    """(arm, attack, student) -> texts kept and dropped of each seed; cells without a texts.json are absent."""
    found = {}
    for path in sorted((Path(workdir) / "students").glob("*/*/*/texts.json")):
        arm, attack, student = path.parts[-4:-1]
        try:
            seeds = json.loads(path.read_text(encoding="utf-8"))["seeds"]
            counts = [{name: int(seed[name]) for name in ("kept", "dropped")} for seed in seeds]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path}: expected {{"seeds": [{{"kept": n, "dropped": n}}, ...]}}') from error
        found[arm, attack, student] = counts
    return found


def read_results(workdir: str | Path) -> Results:
    """All results of a WORKDIR.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a file that is present cannot be what it should be; names file and line.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"workdir: expected the folder of a run, got {workdir}, which does not exist")
    notes: list[str] = []
    return Results(
        teachers=_teachers(workdir, notes),
        students=_students(workdir, notes),
        rollouts=read_rollouts(workdir, notes),
        metrics=read_metrics(workdir, notes),
        wall_clock_s=read_wall_clock(workdir),
        texts=read_texts(workdir),
        notes=notes,
    )


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes a file so that a reader sees the old one or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a report is to be read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
