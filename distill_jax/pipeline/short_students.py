"""Few-step students for stages that train many: one kind, one budget, sizes of their own, nothing kept on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import Arm
from distill_jax.pipeline.distil import (
    decode_texts,
    encode_texts,
    student_problems,
    student_start,
    teacher_key,
)
from distill_jax.pipeline.evaluate import DECODINGS, judge, student_answers
from distill_jax.pipeline.settings import Settings
from distill_jax.sequences import Sequences
from distill_jax.students.train import Batches, train
from distill_jax.tasks.base import Problem, Task


@dataclasses.dataclass(frozen=True)
class Trained:
    """Students of one teacher.

    Attributes:
      trees: what was trained, with a leading [seeds]; None where the texts could not be given to a student.
      base: the frozen weights below adapters, None when the weights themselves were trained.
      kept: texts of each seed.
      why_not: why there are no students; None where there are.
    """

    trees: Params | None
    base: Params | None
    kept: list[int]
    why_not: str | None


def short_settings(
    settings: Settings, where: str, kind: str, seeds: int, samples: int, steps: int, problems: int
) -> Settings:
    """The run's settings with one kind of student, one budget, and these sizes.

    Args:
      where: the config's part that the numbers are from, for messages.
      kind: "" for the run's first. samples, steps: 0 for those of `distillation`. problems: at most.

    Raises:
      ValueError: a kind that the run does not have.
    """
    sizes, kind = settings.distillation, kind or next(iter(settings.students))
    if kind not in settings.students:
        raise ValueError(f"{where}.kind is {kind!r}; the run's students are {list(settings.students)}")
    distillation = dataclasses.replace(
        sizes,
        samples=samples or sizes.samples,
        steps=steps or sizes.steps,
        seeds=seeds,
        budgets=(1.0,),
        long_budgets=(),
    )
    evaluation = dataclasses.replace(
        settings.evaluation, problems=min(problems, settings.evaluation.problems)
    )
    return dataclasses.replace(
        settings,
        students={kind: settings.students[kind]},
        distillation=distillation,
        evaluation=evaluation,
    )


def train_short(settings: Settings, arm: Arm, student: Model, directory: Path, label: str) -> Trained:
    """Trains the students of `settings`, of its only kind, on what a teacher writes.

    Args:
      settings: from `short_settings`.
      directory: for checkpoints; a killed start goes on from them.
      label: of the progress bar.
    """
    sizes, (role,) = settings.distillation, settings.students.values()
    data: list[Sequences] = []
    for seed in range(sizes.seeds):
        texts = decode_texts(
            settings,
            arm,
            student_problems(settings, seed),
            temperature=sizes.temperature,
            key=teacher_key(settings, seed),
        )
        try:
            data.append(encode_texts(settings, student, role, texts))
        except ValueError as error:
            # A dial turned too far: that there is nothing to learn from is the finding.
            return Trained(None, None, [], str(error))
    start, base = student_start(settings, student, sizes.seeds)
    orders = [settings.seed * 100 + seed for seed in range(sizes.seeds)]
    trained: list[Params] = []
    train(
        student.module,
        start,
        Batches(data, sizes.training.batch_size, orders, student.module),
        sizes.training,
        [sizes.steps],
        lambda _, tree: trained.append(tree),
        base=base,
        directory=directory,
        label=label,
    )
    return Trained(trained[0], base, [len(rows.tokens) for rows in data], None)


def short_answers(
    settings: Settings, student: Model, trained: Trained, task: Task, problems: list[Problem]
) -> dict[str, Any]:
    """{"student": {decoding: [[0 or 1 a problem] a seed]}, "kept": [texts a seed], "why_not": None}.

    "student" is None, and "why_not" the reason, where there are no students.
    """
    if trained.trees is None:
        return {"student": None, "kept": [], "why_not": trained.why_not}
    (role,) = settings.students.values()
    answers = {
        decoding: [
            judge(settings, task, problems, *zip(*seed, strict=True))
            for seed in student_answers(
                settings, student, role, trained.trees, trained.base, problems, decoding
            )
        ]
        for decoding in DECODINGS
    }
    return {"student": answers, "kept": trained.kept, "why_not": None}
