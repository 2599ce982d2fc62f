"""Stage evaluate: every teacher and every student on the same held-out problems, greedily and sampled."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.checkpoint import load_tree
from distill_jax.models.adapter import adapter_scale
from distill_jax.models.decoder import Decoder, Params
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import Arm, load_arm, make_task, style_of
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.distil import ATTACK, GOLD, cell, decode_texts, student_start
from distill_jax.pipeline.prepare import SCORED_ROWS, STUDENT, load_role
from distill_jax.pipeline.settings import Role, Settings
from distill_jax.pipeline.workdir import read_rows, write_rows
from distill_jax.rft.texts import encode_prompts, score_texts
from distill_jax.sampling import RolloutBatch, SamplingConfig, row_keys, sample
from distill_jax.sequences import pack_prompts
from distill_jax.tasks.base import Problem, Task
from distill_jax.tasks.scoring import score_all

DECODINGS = ("greedy", "sample")
_EVALUATION = 7  # purpose of random numbers


def test_problems(settings: Settings) -> list[Problem]:
    """The held-out problems, in one order for all."""
    return make_task(settings).problems("test", settings.evaluation.problems, settings.seed)


def evaluate(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Writes evaluation.jsonl and the last rollouts of each arm, and predictions.jsonl of each student seed."""
    task, problems = make_task(settings, mesh), test_problems(settings)
    _evaluate_teachers(settings, mesh, workdir, task, problems)
    for kind, role in settings.students.items():
        cells = [(arm, ATTACK) for arm in (GOLD, *settings.arms)] + [("base", "none")]
        waiting = [c for c in cells if not _predicted(settings, workdir, c[0], c[1], kind)]
        if not waiting:
            continue
        student = load_role(settings, mesh, workdir, f"{STUDENT}{kind}")

        def run(arm: str, attack: str, student: Model = student, role: Role = role, kind: str = kind) -> None:
            evaluate_cell(settings, workdir, student, role, task, problems, arm, attack, kind)

        run_at_once([functools.partial(run, *which) for which in waiting], settings.at_once)


def predictions_path(workdir: Path, arm: str, attack: str, kind: str, seed: int) -> Path:
    """Answers of student seed `seed` to the test problems."""
    return workdir / "students" / arm / attack / kind / f"seed{seed}" / "predictions.jsonl"


def _predicted(settings: Settings, workdir: Path, arm: str, attack: str, kind: str) -> bool:
    """Whether every seed has answered, the first one at the long budgets too: those may have been added since."""
    untrained = attack == "none"
    paths = [
        predictions_path(workdir, arm, attack, kind, seed)
        for seed in range(1 if untrained else settings.distillation.seeds)
    ]
    if not all(path.exists() for path in paths):
        return False
    long = set() if untrained else set(settings.distillation.long_budgets)
    return not long or long <= {row["budget"] for row in read_rows(paths[0])}


def is_correct(settings: Settings, task: Task, problem: Problem, text: str, ended: bool) -> int:
    """1 for a completion that counts as right, else 0."""
    return judge(settings, task, [problem], [text], [ended])[0]


def judge(
    settings: Settings, task: Task, problems: Sequence[Problem], texts: Sequence[str], ended: Sequence[bool]
) -> list[int]:
    """1 for each completion that counts as right, else 0; all at once, for a task that judges with a model."""
    rewards, _ = score_all(task, problems, texts, ended)
    return [int(reward >= settings.calibration.correct_at) for reward in rewards]


def _evaluate_teachers(
    settings: Settings, mesh: Mesh, workdir: Path, task: Task, problems: list[Problem]
) -> None:
    waiting = [arm for arm in settings.arms if not (workdir / "arms" / arm / "evaluation.jsonl").exists()]
    if not waiting:
        return
    teacher = load_role(settings, mesh, workdir, "teacher")
    proxy = load_role(settings, mesh, workdir, "proxy")
    for name in waiting:
        arm = load_arm(settings, workdir, teacher, name)
        rows, sampled = teacher_answers(settings, arm, task, problems)
        _write_rollouts(settings, workdir, arm, teacher, proxy, task, problems, sampled)
        write_rows(workdir / "arms" / name / "evaluation.jsonl", rows)


def teacher_answers(
    settings: Settings, arm: Arm, task: Task, problems: list[Problem]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of evaluation.jsonl under both decodings, the sampled texts of `decode_texts`)."""
    rows, texts = [], []
    for decoding in DECODINGS:
        temperature = 0.0 if decoding == "greedy" else settings.evaluation.temperature
        key = jax.random.fold_in(jax.random.key(settings.seed), _EVALUATION)
        texts = decode_texts(settings, arm, problems, temperature=temperature, key=key)
        completions, ended = ([row[name] for row in texts] for name in ("completion", "ended"))
        correct = judge(settings, task, problems, completions, ended)
        rows += [
            {"decoding": decoding, "problem": index, "correct": right} for index, right in enumerate(correct)
        ]
    return rows, texts


def _write_rollouts(
    settings: Settings,
    workdir: Path,
    arm: Arm,
    teacher: Model,
    proxy: Model,
    task: Task,
    problems: list[Problem],
    texts: list[dict[str, Any]],
) -> None:
    """Adds samples of the finished teacher to its rollouts, the same problems in every arm, with the gap of each."""
    config, count = settings.calibration, min(len(problems), settings.evaluation.rollouts)
    chosen, kept = problems[:count], texts[:count]
    gaps = text_gaps(settings, teacher, proxy, kept)
    rewards, _ = score_all(task, chosen, [row["completion"] for row in kept], [row["ended"] for row in kept])
    rows = [
        {
            "step": config.steps + 1,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "completion": row["completion"],
            "reward": reward,
            "gap_per_byte": gap,
            "style": style_of(settings, row["completion"]),
        }
        for problem, row, gap, reward in zip(chosen, kept, gaps, rewards, strict=True)
    ]
    path = workdir / "arms" / arm.name / "rollouts.jsonl"
    earlier = [row for row in read_rows(path) if row["step"] <= config.steps] if path.exists() else []
    write_rows(path, [*earlier, *rows])


def text_gaps(
    settings: Settings, teacher: Model, proxy: Model, texts: list[dict[str, Any]]
) -> list[float | None]:
    """(log p of the original teacher - log p of the proxy) / bytes of each text, None where one cannot score it.

    texts: rows of `decode_texts`.
    """
    config, count = settings.calibration, len(texts)
    questions, completions = [row["prompt"] for row in texts], [row["completion"] for row in texts]
    ended = np.array([row["ended"] for row in texts])
    common = {"batch_size": min(SCORED_ROWS, count), "chunk": config.rft.logit_chunk, "system": config.system}
    original = score_texts(
        teacher,
        questions,
        completions,
        ended,
        prompt_sizes=config.prompt_sizes,
        completion_sizes=(config.completion_size,),
        style=settings.roles["teacher"].prompt_style,
        **common,  # type: ignore[arg-type]
    )
    small = score_texts(
        proxy,
        questions,
        completions,
        ended,
        prompt_sizes=config.proxy_prompt_sizes,
        completion_sizes=config.proxy_completion_sizes,
        style=settings.roles["proxy"].prompt_style,
        **common,  # type: ignore[arg-type]
    )
    usable = original.usable & small.usable & (original.bytes > 0)
    gaps = (original.lp - small.lp) / np.maximum(original.bytes, 1)
    return [float(gap) if use else None for gap, use in zip(gaps, usable, strict=True)]


@functools.partial(jax.jit, static_argnames=("module", "config"))
def _decode_students(
    module: Decoder,
    params: Params,
    adapters: Params | None,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    scale: float,
    config: SamplingConfig,
) -> RolloutBatch:
    """`sample` for R students at once: the weights (or the adapters) have a leading [R]."""

    def one(tree: Params) -> RolloutBatch:
        if adapters is None:
            return sample(module, tree, tokens, lengths, keys, config)
        return sample(module, params, tokens, lengths, keys, config, adapter=tree, scale=scale)

    return jax.vmap(one)(params if adapters is None else adapters)


def evaluate_cell(
    settings: Settings,
    workdir: Path,
    student: Model,
    role: Role,
    task: Task,
    problems: list[Problem],
    arm: str,
    attack: str,
    kind: str,
) -> None:
    """Writes the predictions of one cell: every budget, every seed, both decodings. "base" is the untrained student."""
    config = settings.distillation
    untrained = attack == "none"
    seeds = 1 if untrained else config.seeds
    rows: list[list[dict[str, Any]]] = [[] for _ in range(seeds)]
    budgets = {0: 0.0} if untrained else {**config.budget_steps, **config.long_budget_steps}
    for steps, multiple in budgets.items():
        replicas = 1 if untrained or steps in config.long_budget_steps else seeds
        trees, base = student_start(settings, student, replicas)
        if not untrained:
            trees = load_tree(cell(workdir, arm, kind) / f"steps{steps}", trees)
        for decoding in DECODINGS:
            for seed, answers in enumerate(
                student_answers(settings, student, role, trees, base, problems, decoding)
            ):
                correct = judge(settings, task, problems, *zip(*answers, strict=True))
                rows[seed] += [
                    {"budget": multiple, "decoding": decoding, "problem": index, "correct": right}
                    for index, right in enumerate(correct)
                ]
    for seed in range(seeds):
        write_rows(predictions_path(workdir, arm, attack, kind, seed), rows[seed])


def student_answers(
    settings: Settings,
    student: Model,
    role: Role,
    trees: Params,
    base: Params | None,
    problems: list[Problem],
    decoding: str,
) -> list[list[tuple[str, bool]]]:
    """(text, ended) of every problem, for each replica."""
    tokenizer, evaluation = student.tokenizer, settings.evaluation
    assert tokenizer is not None
    config = SamplingConfig(
        num_samples=1,
        max_new_tokens=settings.distillation.completion_size,
        temperature=0.0 if decoding == "greedy" else evaluation.temperature,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    scale = 1.0 if base is None else float(adapter_scale(settings.distillation.training.adapter))
    questions, system = [problem.prompt for problem in problems], settings.calibration.system
    prompts = encode_prompts(tokenizer, questions, role.prompt_style, system)
    keys = row_keys(jax.random.fold_in(jax.random.key(settings.seed), _EVALUATION), len(problems))
    replicas = jax.tree.leaves(trees)[0].shape[0]
    answers: list[list[tuple[str, bool]]] = [[] for _ in range(replicas)]
    size = min(evaluation.batch, len(problems))
    for start in range(0, len(problems), size):
        chosen = np.minimum(np.arange(start, start + size), len(problems) - 1)
        tokens, lengths = pack_prompts(
            [prompts[i] for i in chosen], settings.distillation.prompt_size, tokenizer.pad_id
        )
        params, adapters = (trees, None) if base is None else (base, trees)
        batch = _decode_students(
            student.module, params, adapters, tokens, lengths, keys[chosen], scale, config
        )
        ids, counts, ended = jax.device_get(
            (batch.sequences.tokens[..., tokens.shape[1] :], batch.sequences.completion_length, batch.ended)
        )
        for replica in range(replicas):
            for row in range(min(size, len(problems) - start)):
                text = tokenizer.decode(ids[replica, row, : counts[replica, row]].tolist(), continuation=True)
                answers[replica].append((text, bool(ended[replica, row])))
    return answers
