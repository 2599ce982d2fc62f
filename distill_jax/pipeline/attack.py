"""Stage attack: every attack of the suite on every arm by every kind of student, and the suite's own controls.

Cells (arm x attack x kind) are run `settings.at_once` at a time and kept; a second start goes on with those that are
not finished. WORKDIR/attacks/suite.json says what was run, in words that the report needs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from distill_jax.attacks import controls
from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.ensemble import ENSEMBLE
from distill_jax.attacks.registry import ATTACKS
from distill_jax.attacks.tools import Query
from distill_jax.checkpoint import read_json, write_json
from distill_jax.models.model import load_model
from distill_jax.pipeline.arms import make_task
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.attack_arms import Teachers
from distill_jax.pipeline.attack_cells import (
    Bench,
    answer_rows,
    cell_folder,
    fill_cell,
    inapplicable,
    is_finished,
    read_knob,
    run_cell,
)
from distill_jax.pipeline.attack_tools import Student, model_rewriter
from distill_jax.pipeline.distil import GOLD, student_start
from distill_jax.pipeline.evaluate import (
    DECODINGS,
    predictions_path,
    teacher_answers,
    test_problems,
)
from distill_jax.pipeline.prepare import STUDENT, check_source, load_role
from distill_jax.pipeline.settings import Settings
from distill_jax.pipeline.workdir import read_rows, write_rows

# Settings of the suite that decide what a cell is; cells of different ones are not compared.
_FIXED = ("grid", "clean", "search_problems", "answer_mark", "rewriter")


def check_suite(settings: Settings) -> None:
    """Refuses, before anything is trained, a suite that could not run after it.

    Raises:
      ValueError: kinds of student or arms that the run does not have.
      FileNotFoundError: a model of the suite that is not there.
    """
    suite = settings.attack_suite
    unknown = sorted(set(suite.kinds) - set(settings.students))
    if unknown:
        raise ValueError(
            f"attack_suite.kinds names {unknown}; the run's students are {list(settings.students)}"
        )
    folders = suite.model_folders()
    known = [*settings.arms, *folders]
    unknown = sorted(set((*suite.arms, suite.clean)) - set(known))
    if unknown:
        raise ValueError(
            f"attack_suite names the arms {unknown}, but the run has {known}; give it the arm, or a folder as "
            "attack_suite.folders=NAME=FOLDER"
        )
    for name, source in {**folders, "rewriter": suite.rewriter}.items():
        if source:
            check_source(f"attack_suite, {name}", source)


def attack(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Runs the cells that are not finished.

    Raises:
      ValueError: arms that have not been calibrated, or cells of another suite in the same workdir.
    """
    bench = make_bench(settings, mesh, workdir)
    kinds = settings.attack_suite.kinds or tuple(settings.students)
    arms = bench.teachers.names()
    suite = _open_suite(settings, workdir, arms, kinds)
    _evaluate_teachers(bench, arms)
    _answer_constantly(bench)
    for kind in kinds:
        model = load_role(settings, mesh, workdir, f"{STUDENT}{kind}")
        student = Student(kind, model, settings.students[kind])
        _evaluate_untrained(bench, student)
        cells = list(_cells(bench, arms, student, suite))
        _measure_shams(bench, student, suite)
        jobs = [
            functools.partial(_run, bench, student, f"{number}/{len(cells)}", *cell)
            for number, cell in enumerate(cells, start=1)
            if not is_finished(bench, cell[0], cell[1].id, kind)
        ]
        run_at_once(jobs, settings.at_once)
        if ENSEMBLE in settings.attacks:
            run_at_once(
                [functools.partial(_run_ensemble, bench, arm, student, suite) for arm in arms],
                settings.at_once,
            )
        write_json(workdir / "attacks" / "suite.json", suite)


def _run(
    bench: Bench, student: Student, number: str, arm: str, entry: Attack, grid: tuple[Knob, ...]
) -> None:
    started = time.monotonic()
    knob = run_cell(bench, arm, entry, student, grid)
    print(
        f"attack/{student.name} {number}: {entry.id} {entry.name} on {arm}, {knob}, "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )


def make_bench(settings: Settings, mesh: Mesh, workdir: Path) -> Bench:
    """The suite's models and texts, loaded as they are asked for."""
    rewriter = None
    if settings.attack_suite.rewriter:
        model = load_model(settings.attack_suite.rewriter, mesh, settings.dtype)
        if model.tokenizer is None:
            raise ValueError(f"attack_suite.rewriter: {settings.attack_suite.rewriter} holds no tokenizer")
        rewriter = model_rewriter(settings, model)
    return Bench(settings, mesh, workdir, Teachers(settings, mesh, workdir), rewriter)


def _open_suite(settings: Settings, workdir: Path, arms: list[str], kinds: tuple[str, ...]) -> dict[str, Any]:
    """suite.json as it will be; what an earlier start ran stays in it.

    Raises:
      ValueError: the workdir's cells are of another suite.
    """
    path = workdir / "attacks" / "suite.json"
    before = read_json(path) if path.exists() else {}
    chosen = dataclasses.asdict(settings.attack_suite)
    differing = [
        f"{name}: {before['settings'][name]!r} -> {chosen[name]!r}"
        for name in _FIXED
        if before and before["settings"][name] != chosen[name]
    ]
    # More teachers may come; a name that had cells made from one folder may not mean another.
    folders = settings.attack_suite.model_folders()
    known = before.get("folders", {})
    differing += [
        f"folders, {name}: {known[name]!r} -> {folder!r}"
        for name, folder in folders.items()
        if known.get(name, folder) != folder
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds attacks of another suite ({'; '.join(differing)}); give the same attack_suite, or "
            "another workdir"
        )
    suite = {
        "settings": {**chosen, "controls": chosen["controls"] or before.get("settings", {}).get("controls")},
        "folders": known | folders,
        "arms": list(dict.fromkeys([*before.get("arms", []), *arms])),
        "kinds": list(dict.fromkeys([*before.get("kinds", []), *kinds])),
        "attacks": before.get("attacks", {}) | {entry.id: _facts(entry) for entry in settings.attacks},
        "controls": before.get("controls", {}),
        "shams": before.get("shams", {}),
        "skipped": before.get("skipped", {}),
    }
    write_json(path, suite)
    return suite


def _facts(entry: Attack) -> dict[str, Any]:
    """What the report says of an attack."""
    return {
        "name": entry.name,
        "sentence": entry.sentence,
        "access": entry.access,
        "tier": entry.tier,
        "uses_teacher": entry.uses_teacher,
        "needs": list(entry.needs),
        "view": entry.view,
    }


def _cells(
    bench: Bench, arms: list[str], student: Student, suite: dict[str, Any]
) -> Iterator[tuple[str, Attack, tuple[Knob, ...]]]:
    """(arm, attack, knobs) in the order in which they run; what cannot run is noted in the suite."""
    trained = [entry for entry in bench.settings.attacks if entry.select is not None]
    for entry in trained:
        for arm in (GOLD,) if not entry.uses_teacher else arms:
            yield from _cell(bench, arm, entry, student, suite)
    if not bench.settings.attack_suite.controls:
        return
    earlier = suite[
        "controls"
    ]  # a later start with fewer attacks must not make a failed control forget what failed
    for control in controls.CONTROLS:
        chosen = [entry for entry in trained if controls.judges(control, entry)]
        suite["controls"][control.id] = {
            "name": control.name,
            "sentence": control.sentence,
            "expect": control.expect,
            "arm": control.arm,
            "threshold": control.threshold,
            "attacks": sorted(
                {*earlier.get(control.id, {}).get("attacks", ()), *(entry.id for entry in chosen)}
            ),
        }
        for entry in chosen if control.arm else ():
            yield from _cell(bench, control.arm, entry, student, suite)


def _cell(
    bench: Bench, arm: str, entry: Attack, student: Student, suite: dict[str, Any]
) -> Iterator[tuple[str, Attack, tuple[Knob, ...]]]:
    size = bench.settings.attack_suite.grid
    knobs = controls.grid(controls.ARMS[arm], entry, size) if arm in controls.ARMS else entry.grid(size)
    reasons = {knob.name: inapplicable(bench, entry, knob, student, arm) for knob in knobs}
    grid = tuple(knob for knob in knobs if not reasons[knob.name])
    if grid:
        yield arm, entry, grid
    else:
        suite["skipped"][f"{entry.id} on {arm} by {student.name}"] = next(iter(reasons.values()))


def _measure_shams(bench: Bench, student: Student, suite: dict[str, Any]) -> None:
    """Shares of right texts, of the clean teacher and of each sham: one whose texts stay right hides nothing."""
    if not bench.settings.attack_suite.controls:
        return
    clean = bench.settings.attack_suite.clean
    for control in controls.CONTROLS:
        if control.expect == "recover" and control.arm not in suite["shams"]:
            shares = {}
            for name, arm in (("clean", clean), ("sham", control.arm)):
                tools = bench.tools(arm, student, 0)
                shares[name] = float(tools.verified(tools.ask(Query())).mean())
            suite["shams"][control.arm] = shares


def _answer_constantly(bench: Bench) -> None:
    """WORKDIR/attacks/constant.jsonl: a student that says the most frequent answer of the test problems every time.

    The best that can be done without reading a question, and what a teacher without information may teach: where few
    answers are possible it is far above 0. A task without reference answers has none.
    """
    path, problems = bench.workdir / "attacks" / "constant.jsonl", test_problems(bench.settings)
    counts = collections.Counter(problem.answer for problem in problems if problem.answer)
    if path.exists() or not counts:
        return
    most, _ = counts.most_common(1)[0]
    rows = [
        {"decoding": "greedy", "problem": index, "correct": int(problem.answer == most)}
        for index, problem in enumerate(problems)
    ]
    write_rows(path, rows)


def _evaluate_teachers(bench: Bench, arms: list[str]) -> None:
    """Answers of teachers that the stage evaluate has not asked: those from folders, or all in a new workdir."""
    settings = bench.settings
    for arm in arms:
        path = bench.workdir / "arms" / arm / "evaluation.jsonl"
        if not path.exists():
            rows, _ = teacher_answers(
                settings, bench.teachers.load(arm), make_task(settings), test_problems(settings)
            )
            write_rows(path, rows)


def _evaluate_untrained(bench: Bench, student: Student) -> None:
    """The zero of every gap: the untrained student on test and validation problems."""
    path = predictions_path(bench.workdir, "base", "none", student.name, 0)
    trees, base = student_start(bench.settings, student.model, 1)
    if not path.exists():
        rows = [
            row
            for decoding in DECODINGS
            for row in answer_rows(bench, student, trees, base, test_problems(bench.settings), decoding, 0.0)[
                0
            ]
        ]
        write_rows(path, rows)
    if not path.with_name("validation.jsonl").exists():
        problems = bench.validation_problems()
        rows = answer_rows(bench, student, trees, base, problems, "greedy", 0.0)[0]
        write_rows(path.with_name("validation.jsonl"), rows)


def _run_ensemble(bench: Bench, arm: str, student: Student, suite: dict[str, Any]) -> None:
    """The winner on validation problems of an arm, run again with student seeds that nobody has seen.

    All attacks of the workdir take part. Where one that came later has won, the earlier winner's students go.
    """
    scores, spent = {}, {"queries": 0.0, "steps": 0.0}
    for name in suite["attacks"]:
        cell = cell_folder(bench.workdir, arm, name, student.name)
        rows = [row for path in cell.glob("seed*/validation.jsonl") for row in read_rows(path)]
        record = read_knob(cell)
        if not rows or record is None or ATTACKS[name].view or not ATTACKS[name].uses_teacher:
            continue
        scores[name] = sum(row["correct"] for row in rows) / len(rows)
        for what in spent:
            spent[what] += record[what] + record["search"].get(what, 0.0)
    if not scores:
        return
    best = ATTACKS[max(scores, key=lambda name: scores[name])]
    winner = read_knob(cell_folder(bench.workdir, arm, best.id, student.name))
    assert winner is not None
    folder = cell_folder(bench.workdir, arm, ENSEMBLE.id, student.name)
    search, before = {"scores": scores, **spent}, read_knob(folder)
    if (
        before is not None
        and (before["attack"], before["knob"]) == (best.id, winner["knob"])
        and is_finished(bench, arm, ENSEMBLE.id, student.name)
    ):
        write_json(folder / "knob.json", before | {"search": search})
        return
    for path in folder.glob("seed*/predictions.jsonl"):  # half of an old winner is no result
        path.unlink()
    fresh = bench.search_seed + 1
    fill_cell(bench, arm, best, best.knob(winner["knob"]), student, fresh, folder, search)
    print(f"attack/{student.name}: {ENSEMBLE.id} on {arm} is {best.id}, {winner['knob']}", flush=True)
