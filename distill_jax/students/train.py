"""The loop that trains students: one trunk, a branch for each budget, several seeds at once.

A budget of n steps means a whole run of n steps, learning-rate decay included. Runs of different budgets are the same
until the shorter one starts to decay, so the constant part is trained once and each budget branches off it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.checkpoint import Checkpointer
from distill_jax.mesh import place_batch
from distill_jax.metrics import MetricWriter, Progress
from distill_jax.models.adapter import AdapterConfig, adapter_scale
from distill_jax.models.decoder import Decoder, Params
from distill_jax.optimizer import OptimizerConfig, decay_start, make_optimizer, trapezoid
from distill_jax.sequences import Sequences
from distill_jax.students.divergence_config import StudentLoss
from distill_jax.students.step import (
    CROSS_ENTROPY,
    StudentState,
    StudentStep,
    init_student_state,
    make_student_step,
)
from distill_jax.students.targets import Teacher, TopKTargets

DEFAULT_OPTIMIZER = OptimizerConfig()
DEFAULT_ADAPTER = AdapterConfig(rank=16, alpha=32.0)


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """How students are trained.

    Attributes:
      batch_size: rows a step (of each replica).
      optimizer: peak rate and warm-up; the decay is `optimizer.trapezoid`.
      trainable: "params", or "adapter" with `adapter`.
      logit_chunk: tokens of a row whose logits exist at one time.
      checkpoint_every: steps between checkpoints of the trunk; 0 writes none (short runs).

    Raises:
      ValueError: a size below 1, a negative checkpoint_every, or an unknown `trainable`.
    """

    batch_size: int = 64
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER
    trainable: str = "params"
    adapter: AdapterConfig = DEFAULT_ADAPTER
    logit_chunk: int = 64
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.checkpoint_every < 0 or self.logit_chunk < 1:
            raise ValueError(f"student settings out of range: {self}")
        if self.trainable not in ("params", "adapter"):
            raise ValueError(f"students.trainable must be 'params' or 'adapter', got {self.trainable!r}")


def batch_rows(num_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """i64[batch_size]: the rows of batch `step`: passes over the data, each in an order of its own.

    A function of its arguments alone, so a run that goes on at any step sees the batches that it would have seen.
    """
    first = step * batch_size
    rows = np.empty(batch_size, np.int64)
    done = 0
    while done < batch_size:
        epoch, offset = divmod(first + done, num_rows)
        take = min(batch_size - done, num_rows - offset)
        rows[done : done + take] = np.random.default_rng((seed, epoch)).permutation(num_rows)[
            offset : offset + take
        ]
        done += take
    return rows


class Batches:
    """Batches of each replica's own data, made on the host.

    Args:
      data: one `Sequences` (numpy leaves, one layout) for each replica.
      batch_size: rows of each replica.
      seeds: of the order, one a replica.
      module: whose mesh the batches are put on.
      targets: a stored teacher, the `TopKTargets` (numpy leaves) of each replica's data.

    Raises:
      ValueError: no rows, different layouts, not one seed a replica, or targets of other rows.
    """

    def __init__(
        self,
        data: Sequence[Sequences],
        batch_size: int,
        seeds: Sequence[int],
        module: Decoder,
        targets: Sequence[TopKTargets] | None = None,
    ) -> None:
        if len(data) != len(seeds) or not data:
            raise ValueError(f"expected one seed a replica, got {len(data)} data sets and {len(seeds)} seeds")
        layouts = {(d.tokens.shape[1], d.prompt_size, d.vocabulary_hash) for d in data}
        if len(layouts) > 1:
            raise ValueError(f"the replicas' data have different layouts or vocabularies: {sorted(layouts)}")
        if min(len(d.tokens) for d in data) < 1:
            raise ValueError(
                "a replica has no training rows; sample more, or check why all rows were dropped"
            )
        self._data, self._batch_size, self._seeds, self._module = list(data), batch_size, list(seeds), module
        self._targets = None if targets is None else list(targets)
        if self._targets is not None:
            if len(self._targets) != len(self._data):
                raise ValueError(
                    f"expected targets for each replica, got {len(self._targets)} for {len(self._data)} data sets"
                )
            for own, stored in zip(self._data, self._targets, strict=True):
                stored.check(own)

    def __call__(self, step: int) -> Sequences:
        """Rows of batch `step`, every leaf with a leading [R]."""
        return self._take(self._data, step)

    def targets(self, step: int) -> TopKTargets | None:
        """The stored teacher of the rows of batch `step`, every leaf with a leading [R]; None without one."""
        return None if self._targets is None else self._take(self._targets, step)

    def _take(self, trees: Sequence[Any], step: int) -> Any:
        parts = []
        for tree, data, seed in zip(trees, self._data, self._seeds, strict=True):
            rows = batch_rows(len(data.tokens), self._batch_size, seed, step)
            parts.append(jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], tree))
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
        return batch if self._module.mesh is None else place_batch(batch, self._module.mesh, axis=1)


def train(
    module: Decoder,
    start: Params,
    batches: Callable[[int], Sequences],
    config: StudentConfig,
    budgets: Sequence[int],
    on_budget: Callable[[int, Params], None],
    *,
    base: Params | None = None,
    directory: str | os.PathLike[str] | None = None,
    label: str = "students",
    loss: StudentLoss = CROSS_ENTROPY,
    teacher: Teacher | None = None,
    targets: Callable[[int], TopKTargets | None] | None = None,
) -> None:
    """Trains R students together and hands over the trained tree of every budget.

    Args:
      module: the students' decoder.
      start: what is trained (weights, or an adapter), every leaf with a leading [R]; see `stack_replicas`.
      batches: step -> rows with a leading [R] (see `Batches`).
      config: see `StudentConfig`.
      budgets: numbers of steps, ascending; each is a whole run, decay included.
      on_budget: called with (budget, trained tree with a leading [R]) once a budget.
      base: the frozen weights below an adapter; None when the weights themselves are trained.
      directory: for metrics.jsonl and checkpoints of the trunk; None writes nothing. With checkpoints, a call on the
        same folder goes on from the last one, and ends with the same trees, bit for bit; budgets that were handed over
        before it are not handed over again.
      label: of the progress bar.
      loss: see `StudentLoss`; a divergence needs `teacher` or `targets`.
      teacher: run beside the students, one for all.
      targets: step -> the stored teacher of the rows of that batch with a leading [R] (see `Batches.targets`).

    Raises:
      ValueError: no budgets or not ascending ones, or `base` and `config.trainable` that contradict each other; a
        divergence without teacher or targets, or these without a divergence.
      DiskFullError: no room for a checkpoint; the one before it is intact.
    """
    if not budgets or list(budgets) != sorted(set(budgets)) or budgets[0] < 1:
        raise ValueError(f"budgets must be ascending numbers of steps, got {list(budgets)}")
    if (base is None) != (config.trainable == "params"):
        raise ValueError(
            f"trainable={config.trainable!r}: base weights are for adapters, and adapters need them"
        )
    replicas = jax.tree.leaves(start)[0].shape[0]
    scale = float(adapter_scale(config.adapter)) if config.trainable == "adapter" else 1.0
    optimizer, train_step = _program(
        module,
        without_schedule(config.optimizer),
        config.trainable,
        scale,
        config.logit_chunk,
        replicas,
        loss,
    )

    def step_fn(state: StudentState, step: int, rate: float) -> tuple[StudentState, dict[str, jax.Array]]:
        stored = None if targets is None else targets(step)
        return train_step(state, base, batches(step), rate, teacher=teacher, targets=stored)

    state = init_student_state(start, optimizer, replicas)

    trunk_end = decay_start(budgets[-1])
    total = trunk_end + sum(budget - decay_start(budget) for budget in budgets)
    with _TrunkLog(directory, config.checkpoint_every, state) as log:
        state, done = log.state, log.step
        branches_done = sum(budget - decay_start(budget) for budget in budgets if decay_start(budget) < done)
        with Progress(total, label, start=done + branches_done) as bar:
            for step in range(done, trunk_end + 1):
                for budget in budgets:
                    if decay_start(budget) == step:
                        branch = jax.tree.map(jnp.copy, state)
                        for inner in range(step, budget):
                            rate = trapezoid(config.optimizer, inner, budget)
                            branch, metrics = step_fn(branch, inner, rate)
                            bar.update(1)
                        # One step later than a checkpoint that this branch could be repeated from: no row twice.
                        log.write(step + 1, f"budget{budget}/", metrics)
                        on_budget(budget, branch.trainable)
                if step == trunk_end:
                    break
                rate = trapezoid(config.optimizer, step, budgets[-1])
                state, metrics = step_fn(state, step, rate)
                log.step_done(step + 1, state, metrics)
                bar.update(1, **({} if (step + 1) % 50 else {"loss": float(jnp.mean(metrics["loss"]))}))


def without_schedule(config: OptimizerConfig) -> OptimizerConfig:
    """The config with the rate and the schedule of every other one: a step gets its rate as an argument."""
    return dataclasses.replace(config, learning_rate=1.0, warmup_steps=0, final_fraction=1.0)


@functools.lru_cache(maxsize=16)
def _program(
    module: Decoder,
    optimizer: OptimizerConfig,
    trainable: str,
    scale: float,
    logit_chunk: int,
    replicas: int,
    loss: StudentLoss,
) -> tuple[optax.GradientTransformation, StudentStep]:
    """The step of every training of this kind: many cells that differ in their texts alone are compiled once."""
    rule = make_optimizer(optimizer, None)
    step = make_student_step(
        module,
        rule,
        trainable=trainable,
        scale=scale,
        logit_chunk=logit_chunk,
        replicas=replicas,
        loss=loss,
    )
    return rule, step


def stack_replicas(trees: Sequence[Params]) -> Params:
    """One tree with a leading [R] from R trees of one structure."""
    return jax.jit(lambda *parts: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))(*trees)


class _TrunkLog:
    """Metrics and checkpoints of the trunk, or nothing without a directory."""

    def __init__(self, directory: str | os.PathLike[str] | None, every: int, state: StudentState) -> None:
        self.state, self.step, self._every = state, 0, every
        self._checkpointer: Checkpointer | None = None
        self._writer: MetricWriter | None = None
        if directory is None:
            return
        resumed = None
        if every:
            self._checkpointer = Checkpointer(Path(directory) / "checkpoints", keep=1)
            resumed = self._checkpointer.latest_step()
            if resumed is not None:
                self.step, self.state, _ = self._checkpointer.restore(state)
        self._writer = MetricWriter(directory, resume_step=resumed)

    def step_done(self, step: int, state: StudentState, metrics: dict[str, Any]) -> None:
        """A row now and then, a checkpoint when one is due."""
        if step % 20 == 0:
            self.write(step, "", metrics)
        if self._checkpointer is not None and step % self._every == 0:
            self._checkpointer.save(step, state, {"data_position": step})

    def write(self, step: int, prefix: str, metrics: dict[str, Any]) -> None:
        """One row; of several replicas the mean, and the largest count of skipped steps."""
        if self._writer is None:
            return
        values = {name: np.asarray(value) for name, value in metrics.items()}
        row = {name: float(v.max() if name == "skipped_steps" else v.mean()) for name, v in values.items()}
        self._writer.write(step, {f"{prefix}{name}": value for name, value in row.items()})

    def __enter__(self) -> _TrunkLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            if self._checkpointer is not None:  # not close(): its own failure must not hide the first error
                self._checkpointer.__exit__(kind, error, trace)
