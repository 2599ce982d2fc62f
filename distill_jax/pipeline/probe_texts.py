"""What the probes read: the texts of a teacher, of a student and of the untrained student, judged by the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.checkpoint import load_tree
from distill_jax.generation import generate
from distill_jax.models.adapter import adapter_scale
from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.pipeline.arms import Arm, make_task
from distill_jax.pipeline.distil import cell, student_start
from distill_jax.pipeline.evaluate import judge
from distill_jax.pipeline.settings import Settings
from distill_jax.probes.self_correction import continue_after, force_wrong_step
from distill_jax.probes.subjects import Subject
from distill_jax.probes.texts import Texts, answer_starts_after, from_rollouts
from distill_jax.rewards.answer_part import before_stop
from distill_jax.tasks.base import Problem, Task

_PROBE = 11  # purpose of random numbers
_VALIDATION = 2  # added to the run's seed: not the problems that calibration, or the attacks, chose on


@dataclasses.dataclass(frozen=True)
class Written:
    """A model and what it wrote.

    Attributes:
      subject: the model.
      texts: its answers to all problems, judged.
      prefixes: traces with a forced wrong step, for the problems whose gold completion allows one.
      forced: its completions of them; None for a teacher, and without prefixes.
    """

    subject: Subject
    texts: Texts
    prefixes: tuple[str, ...] = ()
    forced: Texts | None = None


@dataclasses.dataclass(frozen=True)
class Bench:
    """The problems, and the way from a model of the run to what it wrote about them."""

    settings: Settings
    task: Task
    problems: tuple[Problem, ...]

    def teacher(self, arm: Arm) -> Subject:
        """The teacher of an arm, asked as it was calibrated."""
        config = self.settings.calibration
        style = self.settings.roles["teacher"].prompt_style
        return Subject(arm.model, arm.adapter, arm.scale, style=style, system=config.system)

    def untrained(self, student: Model, kind: str) -> Written:
        """The student before distillation."""
        return self._student(Subject(student, style=self._style(kind), system=self._system))

    def student(self, workdir: Path, student: Model, arm: str, kind: str) -> Written:
        """Seed 0 of the students of an arm, at the default budget.

        Raises:
          FileNotFoundError: it has not been trained.
        """
        config = self.settings.distillation
        trees, base = student_start(self.settings, student, config.seeds)
        trees = load_tree(cell(workdir, arm, kind) / f"steps{config.steps}", trees)
        return self.trained(student, trees, base, kind)

    def trained(self, student: Model, trees: Params, base: Params | None, kind: str) -> Written:
        """Seed 0 of students that have just been trained; see `distil.student_start` for trees and base."""
        tree = jax.tree.map(lambda leaf: leaf[0], trees)
        if base is None:
            of_tree = dataclasses.replace(student, params=tree)
            return self._student(Subject(of_tree, style=self._style(kind), system=self._system))
        scale = float(adapter_scale(self.settings.distillation.training.adapter))
        return self._student(Subject(student, tree, scale, style=self._style(kind), system=self._system))

    def teacher_texts(self, subject: Subject) -> Written:
        """One answer of the teacher to each problem."""
        return Written(subject, self._write(subject, 1, self.settings.calibration.completion_size))

    def _write(self, subject: Subject, samples: int, size: int) -> Texts:
        """Judged answers of at most `size` tokens."""
        settings, suite = self.settings, self.settings.probe_suite
        questions = [problem.prompt for problem in self.problems]
        rollouts = generate(
            subject.model,
            [subject.tokenizer.encode_prompt(subject.prompt_text(question)) for question in questions],
            num_samples=samples,
            max_new_tokens=size,
            temperature=suite.temperature,
            key=jax.random.fold_in(jax.random.key(settings.seed), _PROBE),
            adapter=subject.adapter,
            scale=subject.multiplier,
            batch_size=max(1, min(len(questions), settings.evaluation.batch // samples)),
        )
        answers, starts = read_answers(
            rollouts.texts, suite.answer_mark, getattr(self.task, "stop_texts", ())
        )
        return from_rollouts(
            questions,
            rollouts,
            correct=self._judge(
                [p for p in self.problems for _ in range(samples)], rollouts.texts, rollouts.ended
            ),
            answers=answers,
            answer_starts=starts,
        )

    def _student(self, subject: Subject) -> Written:
        samples, size = self.settings.probe_suite.samples, self.settings.distillation.completion_size
        own = self._write(subject, samples, size)
        if "self_correction" not in self.settings.probes:
            return Written(subject, own)
        cut = [(problem, force_wrong_step(problem.gold, problem.index)) for problem in self.problems]
        kept = [(problem, prefix) for problem, prefix in cut if prefix is not None]
        if not kept:
            return Written(subject, own)
        problems, prefixes = [p for p, _ in kept], tuple(prefix for _, prefix in kept)
        questions = [problem.prompt for problem in problems]
        whole, ended = continue_after(
            subject,
            questions,
            prefixes,
            max_new_tokens=size,
            batch_size=min(len(questions), self.settings.evaluation.batch),
        )
        forced = Texts(tuple(questions), tuple(whole), ended, correct=self._judge(problems, whole, ended))
        return Written(subject, own, prefixes, forced)

    def _judge(self, problems: Sequence[Problem], texts: Sequence[str], ended: np.ndarray) -> np.ndarray:
        return np.array(judge(self.settings, self.task, problems, texts, ended.tolist()), bool)

    def _style(self, kind: str) -> str:
        return self.settings.students[kind].prompt_style

    @property
    def _system(self) -> str | None:
        return self.settings.calibration.system


def make_bench(settings: Settings, mesh: Mesh) -> Bench:
    """The problems of the probes: held out, and the same for every arm and student."""
    task = make_task(settings, mesh)
    problems = task.problems("validation", settings.probe_suite.problems, settings.seed + _VALIDATION)
    return Bench(settings, task, tuple(problems))


def read_answers(
    texts: Sequence[str], mark: str, stop_texts: Sequence[str]
) -> tuple[list[str | None], np.ndarray]:
    """(final answers, i64[N] the bytes where they begin); None and -1 where there is none.

    What a model that does not end writes behind a stop text is no answer: the task does not read it either.
    """
    answered = [before_stop(text, stop_texts) for text in texts]
    starts = answer_starts_after(answered, mark)
    answers = [
        text.encode()[start:].decode(errors="replace").strip() if start >= 0 else None
        for text, start in zip(answered, starts, strict=True)
    ]
    return answers, starts
