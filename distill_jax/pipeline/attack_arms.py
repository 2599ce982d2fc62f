"""The teachers that the attack suite asks: a run's arms, any model folder, and the shams of the positive controls."""

from __future__ import annotations

import dataclasses
import re
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.attacks import controls
from distill_jax.attacks.tools import Query, Text
from distill_jax.models.adapter import adapter_scale, init_adapter
from distill_jax.models.decoder import Params
from distill_jax.models.model import Model, load_model
from distill_jax.pipeline.arms import Arm, load_arm, make_task
from distill_jax.pipeline.at_once import KeyedLocks
from distill_jax.pipeline.distil import decode_texts, student_problems, teacher_key, texts_path
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import Settings
from distill_jax.pipeline.workdir import read_rows, write_rows
from distill_jax.rft.texts import encode_completions, encode_prompts, end_of_text_id
from distill_jax.students.train import Batches, StudentConfig, stack_replicas, train
from distill_jax.tasks.base import Problem

CLEAN_PROBLEMS = 900  # seeds of the attacker's clean problems start here, away from the students' own
RETRAINING_PASSES = 10  # over the clean texts of an attacker who has the weights
RETRAINING_BATCH = 16


class Teachers:
    """Loads each teacher once, asks it once: texts stay in WORKDIR/students/<arm>/texts_seed<k>*.jsonl.

    Cells that run side by side share one instance. Weights are loaded by one thread at a time, and the last
    `settings.at_once` teachers stay loaded; a file of texts is written by one thread while the others wait for it.

    Args:
      settings, mesh, workdir: of the run.

    Attributes:
      locks: of everything that is made once for all cells, by its path.
    """

    def __init__(self, settings: Settings, mesh: Mesh, workdir: Path) -> None:
        self._settings, self._mesh, self._workdir = settings, mesh, workdir
        self.locks = KeyedLocks()
        self._loading = threading.RLock()
        self._teacher: Model | None = None
        self._arms: dict[str, Arm] = {}
        self._changed: dict[tuple[str, str], Arm] = {}

    def names(self) -> list[str]:
        """Arms that are attacked, the clean one first.

        Raises:
          ValueError: an arm that is named and is not there, or a clean arm that is not among them.
        """
        suite = self._settings.attack_suite
        calibrated = [
            arm
            for arm in self._settings.arms
            if arm == "original" or (self._workdir / "arms" / arm / "calibration.json").exists()
        ]
        found = [*calibrated, *suite.model_folders()]
        unknown = sorted(set((*suite.arms, suite.clean)) - set(found))
        if unknown:
            raise ValueError(
                f"attack_suite names the arms {unknown}, but {self._workdir} has {found}; calibrate them first, or "
                "give a folder as attack_suite.folders=NAME=FOLDER"
            )
        chosen = [arm for arm in found if not suite.arms or arm in suite.arms]
        return [suite.clean, *(arm for arm in chosen if arm != suite.clean)]

    def load(self, arm: str) -> Arm:
        """The teacher behind an arm; a sham's is the clean one."""
        if arm in controls.ARMS:
            return self.load(self._settings.attack_suite.clean)
        with self._loading:
            if arm not in self._arms:
                self._make_room(self._arms)
                self._arms[arm] = self._read(arm)
            return self._arms[arm]

    def _make_room(self, kept: dict[Any, Arm]) -> None:
        while len(kept) >= self._settings.at_once:
            kept.pop(next(iter(kept)))

    def _read(self, arm: str) -> Arm:
        folders = self._settings.attack_suite.model_folders()
        if arm in folders:
            model = load_model(folders[arm], self._mesh, self._settings.dtype)
            if model.tokenizer is None:
                raise ValueError(
                    f"arm {arm}: {folders[arm]} holds no tokenizer; put its tokenizer.json there"
                )
            return Arm(arm, model, None, 1.0)
        self._teacher = self._teacher or load_role(self._settings, self._mesh, self._workdir, "teacher")
        return load_arm(self._settings, self._workdir, self._teacher, arm)

    def ask(self, arm: str, seed: int, query: Query) -> list[Text]:
        """One completion for every problem of the query's block, from the file where it was asked before."""
        problems = block(self._settings, seed, query.part)
        first = query.part * self._settings.distillation.samples
        control = controls.ARMS.get(arm)
        if control is not None:
            assert control.corrupt is not None
            honest = self.ask(self._settings.attack_suite.clean, seed, query)
            return control.corrupt(honest, seed * 1000 + query.part)
        path = query_path(self._workdir, arm, seed, query)
        with self.locks(path):
            if not path.exists():
                write_rows(path, self._sample(arm, seed, query, problems))
        rows = read_rows(path)
        if [row["prompt"] for row in rows] != [problem.prompt for problem in problems]:
            raise ValueError(
                f"{path} answers other problems than those of this config; remove it to ask again"
            )
        return [
            Text(row["prompt"], row["completion"], row["ended"], first + place)
            for place, row in enumerate(rows)
        ]

    def _sample(self, arm: str, seed: int, query: Query, problems: list[Problem]) -> list[dict[str, Any]]:
        key, name = teacher_key(self._settings, seed), query_name(query)
        if name:  # else the texts of the stage distil
            key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        rows = decode_texts(
            self._settings,
            self._changed_weights(arm, seed, query.weights),
            problems,
            temperature=query.temperature * self._settings.distillation.temperature,
            key=key,
            system=query.system,
        )
        print(f"attack/{arm}: {len(rows)} texts for student seed {seed} {name}".rstrip(), flush=True)
        return rows

    def _changed_weights(self, name: str, seed: int, weights: str) -> Arm:
        if weights == "released":
            return self.load(name)
        key = (name, f"{weights} {seed}")
        with self._loading:
            if key not in self._changed:
                kind, _, number = weights.partition("=")
                arm = self.load(name)
                self._make_room(self._changed)
                self._changed[key] = (
                    dataclasses.replace(arm, scale=arm.scale * float(number))
                    if kind == "dial"
                    else retrained(self._settings, arm, int(number), seed)
                )
            return self._changed[key]


def block(settings: Settings, seed: int, part: int) -> list[Problem]:
    """The training problems of one block of a student seed."""
    size = settings.distillation.samples
    return student_problems(settings, seed, part + 1)[part * size :]


def clean_texts(settings: Settings, count: int, seed: int) -> list[Text]:
    """Clean completions of problems that are neither a student's own nor test problems."""
    problems = make_task(settings).problems("train", count, settings.seed * 1000 + CLEAN_PROBLEMS + seed)
    return [Text(problem.prompt, problem.gold, True, -1) for problem in problems]


def query_name(query: Query) -> str:
    """What differs from the ordinary query, as a part of a file's name; "" for the ordinary one."""
    parts = []
    for name, value in dataclasses.asdict(query).items():
        if value != getattr(Query(), name):
            text = f"{zlib.crc32(value.encode()):08x}" if name == "system" else str(value)
            parts.append(re.sub(r"[^A-Za-z0-9.=-]", "", f"{name}={text}"))
    return "_".join(parts)


def query_path(workdir: Path, arm: str, seed: int, query: Query) -> Path:
    """The file of a query's texts; the ordinary query's is that of the stage distil."""
    path, name = texts_path(workdir, arm, seed), query_name(query)
    return path.with_stem(f"{path.stem}_{name}") if name else path


def retrained(settings: Settings, arm: Arm, count: int, seed: int) -> Arm:
    """The teacher after training its adapter (its own, or a new one) on `count` clean texts, a few passes of them."""
    model, config = arm.model, settings.calibration
    tokenizer = model.tokenizer
    assert tokenizer is not None
    style = settings.roles["teacher"].prompt_style
    texts = clean_texts(settings, count, seed)
    encoded = encode_completions(
        tokenizer,
        encode_prompts(tokenizer, [text.prompt for text in texts], style, config.system),
        [text.completion for text in texts],
        np.ones(len(texts), bool),
        end_id=end_of_text_id(tokenizer, style),
        prompt_sizes=(max(config.prompt_sizes),),
        completion_sizes=(config.completion_size,),
    )
    data = jax.tree.map(lambda leaf: np.asarray(leaf)[encoded.usable], encoded.sequences)
    start = arm.adapter
    if start is None:
        start = init_adapter(model.module, config.adapter, jax.random.key(seed))
    recipe = StudentConfig(
        batch_size=RETRAINING_BATCH,
        optimizer=config.optimizer,
        trainable="adapter",
        adapter=config.adapter,
        logit_chunk=config.rft.logit_chunk,
    )
    trees: list[Params] = []
    train(
        model.module,
        stack_replicas([start]),
        Batches([data], RETRAINING_BATCH, [seed], model.module),
        recipe,
        [max(1, RETRAINING_PASSES * count // RETRAINING_BATCH)],
        lambda _, tree: trees.append(tree),
        base=model.params,
        label=f"attack/{arm.name} retrained",
    )
    adapter = jax.tree.map(lambda leaf: leaf[0], trees[0])
    return Arm(arm.name, model, adapter, float(adapter_scale(config.adapter)))
