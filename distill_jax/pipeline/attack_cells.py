"""One cell of the attack suite: an attack on an arm by one kind of student. Knob search, training, answers.

    WORKDIR/students/<arm>/<attack>/<kind>/search/<knob>.jsonl        answers to validation problems, one search seed
                                          /knob.json                  the knob that won, what it and the search cost
                                          /texts.json                 texts that each seed was trained on
                                          /seed<k>/validation.jsonl   greedy answers to validation problems
                                          /seed<k>/predictions.jsonl  answers to test problems; written last

A cell is finished when its predictions are there, and is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.checkpoint import read_json, write_json
from distill_jax.models.decoder import Params
from distill_jax.pipeline.arms import make_task
from distill_jax.pipeline.attack_budget import budget
from distill_jax.pipeline.attack_tools import Bench, Student
from distill_jax.pipeline.attack_training import train_students
from distill_jax.pipeline.evaluate import (
    DECODINGS,
    judge,
    predictions_path,
    student_answers,
    test_problems,
)
from distill_jax.pipeline.workdir import read_rows, write_rows
from distill_jax.tasks.base import Problem


def cell_folder(workdir: Path, arm: str, attack: str, kind: str) -> Path:
    """Folder of one cell."""
    return workdir / "students" / arm / attack / kind


def is_finished(bench: Bench, arm: str, attack: str, kind: str) -> bool:
    """Whether every seed of a cell has answered the test problems."""
    seeds = range(bench.settings.distillation.seeds)
    return all(predictions_path(bench.workdir, arm, attack, kind, seed).exists() for seed in seeds)


def inapplicable(bench: Bench, attack: Attack, knob: Knob, student: Student, arm: str) -> str:
    """Why a knob of an attack cannot be run here, in words; "" where it can."""
    settings, recipe = bench.settings, attack.recipe_of(knob)
    if knob.select.get("system") and settings.roles["teacher"].prompt_style == "raw":
        return "a teacher that is asked in the raw style takes no system text"
    if str(knob.select.get("weights", "")).startswith("dial") and bench.teachers.load(arm).adapter is None:
        return "no adapter to turn around"
    if "rewriter" in attack.needs and bench.rewriter is None:
        return "no rewriter is given (attack_suite.rewriter)"
    if recipe.loss in ("top_k", "logits", "on_policy"):
        model = bench.teachers.load(arm).model
        assert model.tokenizer is not None and student.model.tokenizer is not None
        if model.tokenizer.vocabulary_hash != student.model.tokenizer.vocabulary_hash:
            return "teacher and student have different vocabularies"
        if recipe.loss != "top_k" and settings.roles["teacher"].prompt_style != student.role.prompt_style:
            return "teacher and student are asked in different prompt styles, and this loss needs one row for both"
        if recipe.loss == "top_k" and recipe.options["top_k"] >= min(
            model.spec.vocab_size, student.model.spec.vocab_size
        ):
            return "k is the whole vocabulary"
    return ""


def run_cell(bench: Bench, arm: str, attack: Attack, student: Student, grid: Sequence[Knob]) -> str:
    """Chooses the knob on validation problems, trains all seeds with it, writes their answers; returns the knob."""
    folder = cell_folder(bench.workdir, arm, attack.id, student.name)
    scores = {}
    for knob in grid if len(grid) > 1 else ():
        path = folder / "search" / f"{knob.name}.jsonl"
        if not path.exists():
            trees, base, _ = train_students(bench, arm, attack, knob, student, [bench.search_seed])
            answers = greedy_rows(bench, student, trees, base, bench.validation_problems(), knob, attack)
            write_rows(path, answers[0])
        scores[knob.name] = float(np.mean([row["correct"] for row in read_rows(path)]))
    best = max(scores, key=lambda name: scores[name]) if scores else grid[0].name
    spent = [budget(bench.settings, attack, attack.knob(name)) for name in scores]
    search = {"scores": scores, **{name: sum(one[name] for one in spent) for name in ("queries", "steps")}}
    fill_cell(bench, arm, attack, attack.knob(best), student, 0, folder, search)
    return best


def fill_cell(
    bench: Bench,
    arm: str,
    attack: Attack,
    knob: Knob,
    student: Student,
    first_seed: int,
    folder: Path,
    search: dict[str, Any],
) -> None:
    """Trains all seeds of a cell, counted from `first_seed`, and writes what they answer as seed 0, 1, ...

    search: how the knob was chosen: "scores" of what was tried, and "queries" and "steps" that this took.
    """
    settings, recipe = bench.settings, attack.recipe_of(knob)
    seeds = range(first_seed, first_seed + settings.distillation.seeds)
    trees, base, kept = train_students(bench, arm, attack, knob, student, seeds)
    write_json(
        folder / "knob.json",
        {
            "attack": attack.id,
            "knob": knob.name,
            **budget(settings, attack, knob),
            "search": search,
        },
    )
    write_json(folder / "texts.json", {"seeds": kept})
    validation = greedy_rows(bench, student, trees, base, bench.validation_problems(), knob, attack)
    tests: list[list[dict[str, Any]]] = [[] for _ in seeds]
    for decoding in DECODINGS:
        for place, rows in enumerate(
            answer_rows(bench, student, trees, base, test_problems(settings), decoding, recipe.steps)
        ):
            tests[place] += rows
    for place, rows in enumerate(validation):
        write_rows(folder / f"seed{place}" / "validation.jsonl", rows)
        write_rows(folder / f"seed{place}" / "predictions.jsonl", tests[place])


def answer_rows(
    bench: Bench,
    student: Student,
    trees: Params,
    base: Params | None,
    problems: list[Problem],
    decoding: str,
    budget: float,
) -> list[list[dict[str, Any]]]:
    """Rows of predictions.jsonl for each replica."""
    task = make_task(bench.settings)
    answers = student_answers(bench.settings, student.model, student.role, trees, base, problems, decoding)
    return [
        [
            {"budget": budget, "decoding": decoding, "problem": index, "correct": right}
            for index, right in enumerate(judge(bench.settings, task, problems, *zip(*replica, strict=True)))
        ]
        for replica in answers
    ]


def greedy_rows(
    bench: Bench,
    student: Student,
    trees: Params,
    base: Params | None,
    problems: list[Problem],
    knob: Knob,
    attack: Attack,
) -> list[list[dict[str, Any]]]:
    """`answer_rows` of greedy answers."""
    return answer_rows(bench, student, trees, base, problems, "greedy", attack.recipe_of(knob).steps)


def read_knob(folder: Path) -> dict[str, Any] | None:
    """knob.json of a cell; None where it has none."""
    path = folder / "knob.json"
    return read_json(path) if path.exists() else None
