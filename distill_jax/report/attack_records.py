"""What the attack suite has left in a WORKDIR: its facts, and the cells' answers on validation and on test problems."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_jax.report.records import Outcomes, align, answers_by_cell, read_rows

GOLD, BASE, UNTRAINED = "gold", "base", "none"
CONSTANT = "constant"  # a student that gives the most frequent answer every time
_KEYS = ("decoding", "problem", "correct")


@dataclass(frozen=True)
class AttackCell:
    """Students of one arm, attack and kind: greedy answers on both splits, the knob, and what one student costs.

    queries, steps: multiples of the run's samples and steps, the search for the knob included.
    """

    test: Outcomes
    validation: Outcomes | None
    knob: str = ""
    queries: float = 1.0
    steps: float = 1.0


@dataclass(frozen=True)
class AttackResults:
    """suite: suite.json. cells: (arm, attack, kind) -> cell; those of the arms "base" and "constant" are untrained.
    teachers: arm -> greedy answers. curves: (arm, kind) -> budget -> greedy answers of the stage distil's students.
    notes: what was left out."""

    suite: dict[str, Any]
    cells: dict[tuple[str, str, str], AttackCell]
    teachers: dict[str, Outcomes]
    curves: dict[tuple[str, str], dict[float, Outcomes]]
    notes: list[str] = field(default_factory=list)

    def matrices(self, split: str, *places: tuple[str, str, str] | str) -> list[Any] | None:
        """f64[S, N] of cells, and of teachers by name, over the problems that all have; None where one is missing."""
        outcomes = []
        for place in places:
            if isinstance(place, str):
                found = self.teachers.get(place)
            else:
                cell = self.cells.get(place)
                found = None if cell is None else cell.test if split == "test" else cell.validation
            if found is None:
                return None
            outcomes.append(found)
        return common(outcomes)


def common(outcomes: Iterable[Outcomes]) -> list[Any] | None:
    """Their matrices over the problems they share; None when there is none."""
    first, *others = outcomes
    problems = set(first.problems).intersection(*(other.problems for other in others))
    if not problems:
        return None
    matrices = []
    for outcome in (first, *others):
        place = {problem: column for column, problem in enumerate(outcome.problems)}
        matrices.append(outcome.correct[:, [place[problem] for problem in sorted(problems)]])
    return matrices


def read_attacks(workdir: str | Path) -> AttackResults | None:
    """Everything of the suite; None in a workdir where none has run.

    Raises:
      ValueError: a file that is present cannot be what it should be.
    """
    workdir = Path(workdir)
    path = workdir / "attacks" / "suite.json"
    if not path.is_file():
        return None
    notes: list[str] = []
    suite = json.loads(path.read_text(encoding="utf-8"))
    cells = {}
    for folder in sorted((workdir / "students").glob("*/*/*")):
        arm, attack, kind = folder.parts[-3:]
        known = attack in suite["attacks"] or (arm, attack) == (BASE, UNTRAINED)
        if not known or kind not in suite["kinds"]:
            continue
        test = _outcomes(folder, "predictions.jsonl", notes)
        if test is None:
            continue
        facts = {}
        if (folder / "knob.json").is_file():
            facts = json.loads((folder / "knob.json").read_text(encoding="utf-8"))
        cells[arm, attack, kind] = AttackCell(
            test,
            _outcomes(folder, "validation.jsonl", notes),
            _knob_name(facts, attack),
            *(facts.get(what, 0.0) + facts.get("search", {}).get(what, 0.0) for what in ("queries", "steps")),
        )
    constant = _constant(workdir, notes)
    if constant is not None:
        for kind in suite["kinds"]:
            cells[CONSTANT, UNTRAINED, kind] = AttackCell(constant, None)
    teachers = {}
    for arm in suite["arms"]:
        rows = read_rows(workdir / "arms" / arm / "evaluation.jsonl", _KEYS, notes)
        for (_, decoding), answers in answers_by_cell(workdir / "arms" / arm, rows).items():
            outcomes = align({0: answers}, f"teacher {arm}", notes)
            if decoding == "greedy" and outcomes is not None:
                teachers[arm] = outcomes
    curves = {
        (arm, kind): _curve(workdir / "students" / arm / "sft" / kind, notes)
        for arm in suite["arms"]
        for kind in suite["kinds"]
    }
    return AttackResults(suite, cells, teachers, curves, notes)


def _constant(workdir: Path, notes: list[str]) -> Outcomes | None:
    path = workdir / "attacks" / "constant.jsonl"
    rows = read_rows(path, _KEYS, notes)
    if not rows:
        return None
    [answers] = answers_by_cell(path, rows).values()
    return align({0: answers}, "the most frequent answer", notes)


def _knob_name(facts: dict[str, Any], attack: str) -> str:
    """The knob, with the attack that it belongs to where that is another (the best of all)."""
    name, owner = facts.get("knob", ""), facts.get("attack", attack)
    return name if owner == attack else f"{owner} {name}"


def _seeds(folder: Path, name: str, notes: list[str]) -> dict[int, dict[tuple[float, str], dict[int, float]]]:
    found = {}
    for path in sorted(folder.glob(f"seed*/{name}")):
        rows = read_rows(path, _KEYS, notes)
        if rows:
            found[int(path.parent.name.removeprefix("seed"))] = answers_by_cell(path, rows)
    return found


def _outcomes(folder: Path, name: str, notes: list[str]) -> Outcomes | None:
    """Greedy answers of all seeds at the one budget of the cell."""
    by_seed = {}
    for seed, cells in _seeds(folder, name, notes).items():
        greedy = {budget: answers for (budget, decoding), answers in cells.items() if decoding == "greedy"}
        if greedy:
            by_seed[seed] = greedy[max(greedy)]
    return align(by_seed, f"{'/'.join(folder.parts[-3:])} {name}", notes) if by_seed else None


def _curve(folder: Path, notes: list[str]) -> dict[float, Outcomes]:
    """budget -> greedy answers, of the budgets that all seeds have."""
    seeds = _seeds(folder, "predictions.jsonl", notes)
    budgets = set.intersection(*(set(cells) for cells in seeds.values())) if seeds else set()
    curve = {}
    for budget, decoding in sorted(budgets):
        if decoding == "greedy":
            answers = {seed: cells[budget, decoding] for seed, cells in seeds.items()}
            outcomes = align(answers, f"{'/'.join(folder.parts[-3:])} at {budget:g}x", notes)
            if outcomes is not None:
                curve[budget] = outcomes
    return curve
