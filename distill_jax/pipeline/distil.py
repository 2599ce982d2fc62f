"""Stage distil: texts of every arm, and students trained on them.

A student seed draws its own problems, texts and batch order; the problems of a seed are the same for every arm, so
that arms are compared in pairs. The seeds of a cell (arm x kind of student) are trained together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.checkpoint import save_tree, write_json
from distill_jax.generation import generate
from distill_jax.models.adapter import init_adapter
from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import Arm, load_arm, make_task
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.prepare import STUDENT, load_role
from distill_jax.pipeline.settings import Role, Settings
from distill_jax.pipeline.workdir import read_rows, write_rows
from distill_jax.rft.texts import encode_completions, encode_prompts, end_of_text_id
from distill_jax.sequences import Sequences
from distill_jax.students.train import Batches, stack_replicas, train
from distill_jax.tasks.base import Problem

ATTACK = "sft"
GOLD = "gold"
_STUDENT_PROBLEMS = 1000  # seeds of students' problems start here, away from the calibration's own


def cell(workdir: Path, arm: str, kind: str) -> Path:
    """Folder of the students of one arm and kind."""
    return workdir / "students" / arm / ATTACK / kind


def student_problems(settings: Settings, seed: int, parts: int = 1) -> list[Problem]:
    """The training problems of student seed `seed`, the same for every arm: `parts` blocks of distillation.samples."""
    return make_task(settings).problems(
        "train", parts * settings.distillation.samples, settings.seed * 1000 + _STUDENT_PROBLEMS + seed
    )


def teacher_key(settings: Settings, seed: int) -> jax.Array:
    """Random key of a teacher's texts for student seed `seed`, the same for every arm."""
    return jax.random.fold_in(jax.random.key(settings.seed), _STUDENT_PROBLEMS + seed)


def decode_texts(
    settings: Settings,
    arm: Arm,
    problems: list[Problem],
    *,
    temperature: float,
    key: jax.Array,
    system: str | None = None,
) -> list[dict[str, Any]]:
    """One completion of the arm's teacher for each problem: {"prompt", "completion", "ended"}.

    `system` stands before the question in place of the run's own text.
    """
    assert arm.model.tokenizer is not None
    style = settings.roles["teacher"].prompt_style
    prompts = encode_prompts(
        arm.model.tokenizer, [p.prompt for p in problems], style, system or settings.calibration.system
    )
    rollouts = generate(
        arm.model,
        prompts,
        max_new_tokens=settings.calibration.completion_size,
        temperature=temperature,
        key=key,
        adapter=arm.adapter,
        scale=arm.scale,
        buckets=settings.calibration.prompt_sizes,
        batch_size=min(settings.evaluation.batch, len(prompts)),
    )
    return [
        {"prompt": problem.prompt, "completion": text, "ended": bool(ended)}
        for problem, text, ended in zip(problems, rollouts.texts, rollouts.ended, strict=True)
    ]


def distil(
    settings: Settings,
    mesh: Mesh,
    workdir: Path,
    sources: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
) -> None:
    """Samples the texts of every arm and trains every cell that is not finished yet.

    sources, kinds: arms (or "gold") and kinds of student; all by default.
    """
    sources = (GOLD, *settings.arms) if sources is None else sources
    _sample_arms(settings, mesh, workdir, sources)
    for kind in settings.students if kinds is None else kinds:
        role = settings.students[kind]
        waiting = [arm for arm in sources if not _trained(settings, workdir, arm, kind)]
        if not waiting:
            continue
        student = load_role(settings, mesh, workdir, f"{STUDENT}{kind}")
        jobs = [
            functools.partial(_train_cell, settings, workdir, student, role, arm, kind) for arm in waiting
        ]
        run_at_once(jobs, settings.at_once)


def _trained(settings: Settings, workdir: Path, arm: str, kind: str) -> bool:
    folder = cell(workdir, arm, kind)
    budgets = {**settings.distillation.budget_steps, **settings.distillation.long_budget_steps}
    return all((folder / f"steps{steps}").exists() for steps in budgets)


def texts_path(workdir: Path, arm: str, seed: int) -> Path:
    """Texts that student seed `seed` of this arm is trained on."""
    return workdir / "students" / arm / f"texts_seed{seed}.jsonl"


def _sample_arms(settings: Settings, mesh: Mesh, workdir: Path, sources: Sequence[str]) -> None:
    teacher: Model | None = None
    for arm_name in sources:
        for seed in range(settings.distillation.seeds):
            path = texts_path(workdir, arm_name, seed)
            if path.exists():
                continue
            problems = student_problems(settings, seed)
            if arm_name == GOLD:
                write_rows(
                    path, [{"prompt": p.prompt, "completion": p.gold, "ended": True} for p in problems]
                )
                continue
            teacher = teacher or load_role(settings, mesh, workdir, "teacher")
            arm = load_arm(settings, workdir, teacher, arm_name)
            key = teacher_key(settings, seed)
            rows = decode_texts(
                settings, arm, problems, temperature=settings.distillation.temperature, key=key
            )
            write_rows(path, rows)
            print(f"distil/{arm_name}: {len(rows)} texts for student seed {seed}", flush=True)


def encode_texts(settings: Settings, student: Model, role: Role, rows: list[dict[str, Any]]) -> Sequences:
    """Texts in the student's own prompt style and tokens; those that it cannot spell, or that do not fit, are dropped.

    Raises:
      ValueError: more than half are dropped: what is left would be no sample of what the teacher writes.
    """
    tokenizer = student.tokenizer
    assert tokenizer is not None
    sizes = settings.distillation
    encoded = encode_completions(
        tokenizer,
        encode_prompts(
            tokenizer, [row["prompt"] for row in rows], role.prompt_style, settings.calibration.system
        ),
        [row["completion"] for row in rows],
        np.array([row["ended"] for row in rows]),
        end_id=end_of_text_id(tokenizer, role.prompt_style),
        prompt_sizes=(sizes.prompt_size,),
        completion_sizes=(sizes.completion_size,),
    )
    usable = encoded.usable & (np.asarray(encoded.sequences.completion_length) > 0)
    dropped = int((~usable).sum())
    if 2 * dropped > len(rows):
        unfit = int((encoded.does_not_fit & ~usable).sum())
        raise ValueError(
            f"{dropped} of {len(rows)} texts cannot be given to the student: {unfit} do not fit "
            f"distillation.prompt_size={sizes.prompt_size} and completion_size={sizes.completion_size}, "
            f"{dropped - unfit} are empty or not given back byte for byte by its tokenizer; make the sizes larger, or "
            "look at the texts"
        )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[usable], encoded.sequences)


def _train_cell(settings: Settings, workdir: Path, student: Model, role: Role, arm: str, kind: str) -> None:
    """All seeds together at the ordinary budgets, then one seed at the long ones."""
    config, folder = settings.distillation, cell(workdir, arm, kind)
    for budgets, seeds, part in (
        (config.budget_steps, range(config.seeds), "training"),
        (config.long_budget_steps, range(1), "training_long"),
    ):
        waiting = [steps for steps in budgets if not (folder / f"steps{steps}").exists()]
        if not waiting:
            continue
        texts = [read_rows(texts_path(workdir, arm, seed)) for seed in seeds]
        data = [encode_texts(settings, student, role, rows) for rows in texts]
        if part == "training":
            _count_texts(folder, f"distil/{kind}/{arm}", texts, data)
        start, base = student_start(settings, student, len(seeds))
        orders = [settings.seed * 100 + seed for seed in seeds]
        train(
            student.module,
            start,
            Batches(data, config.training.batch_size, orders, student.module),
            config.training,
            list(budgets),
            _saver(folder),
            base=base,
            directory=folder / part,
            label=f"distil/{kind}/{arm}",
        )


def _count_texts(folder: Path, label: str, texts: list[list[dict[str, Any]]], data: list[Sequences]) -> None:
    """Writes how many texts of each seed were kept, and says when any were not."""
    kept = [len(rows.tokens) for rows in data]
    dropped = [len(rows) - count for rows, count in zip(texts, kept, strict=True)]
    pairs = zip(kept, dropped, strict=True)
    write_json(folder / "texts.json", {"seeds": [{"kept": k, "dropped": d} for k, d in pairs]})
    if any(dropped):
        total = sum(kept) + sum(dropped)
        print(f"{label}: {sum(dropped)} of {total} texts dropped (by seed: {dropped})", flush=True)


def _saver(folder: Path) -> Callable[[int, Params], None]:
    def save(steps: int, tree: Params) -> None:
        save_tree(folder / f"steps{steps}", tree, overwrite=True)

    return save


def student_start(
    settings: Settings, student: Model, seeds: int, first_seed: int = 0
) -> tuple[Params, Params | None]:
    """(what is trained with a leading [seeds], frozen weights below it or None)."""
    training = settings.distillation.training
    if training.trainable == "params":
        return stack_replicas([student.params] * seeds), None
    keys = [jax.random.key(settings.seed * 100 + first_seed + seed) for seed in range(seeds)]
    return stack_replicas(
        [init_adapter(student.module, training.adapter, key) for key in keys]
    ), student.params
