"""The calibration loop: rollouts, rewards, one pure step; validation, best checkpoint, early stop, exact resume.

Everything that a step depends on is a function of (seed, step, state): prompts are element `step` of a
shuffled data set, random numbers come from fold_in(key, step). A run that was killed goes on from its last
checkpoint and ends with the same adapter, bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.checkpoint import Checkpointer, save_tree, write_json
from distill_jax.data.stream import ExampleStream
from distill_jax.mesh import place_batch
from distill_jax.metrics import MetricWriter, Progress
from distill_jax.models.adapter import adapter_axes, adapter_scale, init_adapter
from distill_jax.models.decoder import Params, param_axes
from distill_jax.models.model import Model
from distill_jax.models.quantised import has_quantised
from distill_jax.optimizer import make_optimizer
from distill_jax.rewards.terms import Reward, make_rewards
from distill_jax.rft.answer_utility import require_answer_mark
from distill_jax.rft.config import CalibrationConfig, check_arm
from distill_jax.rft.judgement import Judgement, judge
from distill_jax.rft.proxies import Proxy, as_proxies
from distill_jax.rft.proxy_training import Learners, ProxyState
from distill_jax.rft.rollout import Rollouts, Scored, check_prompts, sample_batch, score_rollouts
from distill_jax.rft.rollout_log import RolloutLog
from distill_jax.rft.step import RftBatch, RftState, RftStep, init_rft_state, make_rft_step
from distill_jax.rft.validation import Validation, sampling_config, validate
from distill_jax.sampling import RolloutBatch, make_sampler
from distill_jax.tasks.base import Problem, Task

# Purposes of random numbers: fold_in(seed's key, purpose), then fold_in(that, step).
_ADAPTER, _ROLLOUTS, _VALIDATION, _ORIGINAL_ROLLOUTS = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """What a run ends with.

    Attributes:
      trainable: the best adapter (or parameters, with trainable="params"), on the device.
      best_step: the update after which it was taken; 0 is the original teacher: no checkpoint was better and
        above the floor.
      best: its validation; original: that of the original teacher.
      steps: updates done.
      stopped: why the run ended: "steps", or the guard that stopped it.
    """

    trainable: Params
    best_step: int
    best: Validation
    original: Validation
    steps: int
    stopped: str


@dataclasses.dataclass
class _Record:
    """What the loop remembers beside its arrays; JSON, saved with every checkpoint."""

    original: Validation
    best: Validation
    best_step: int = 0
    highest: float = 0.0  # objective that a rise is measured from
    first_bytes: float | None = None
    below_floor: int = 0
    without_rise: int = 0
    stopped: str | None = None

    def to_meta(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> _Record:
        fields = {name: meta[name] for name in (field.name for field in dataclasses.fields(cls))}
        return cls(**fields | {name: Validation(**meta[name]) for name in ("original", "best")})


def calibrate(
    teacher: Model,
    proxy: Model | Sequence[Proxy],
    task: Task,
    arm: str,
    eta: float,
    config: CalibrationConfig,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    style_of: Callable[[str], str | None] | None = None,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> CalibrationResult:
    """Fine-tunes the teacher's adapter in one direction, or (control) on the task alone.

    Writes into `directory`: metrics.jsonl and TensorBoard events, rollouts.jsonl (samples every few steps),
    checkpoints/, and at the end adapter/ (the best trainable tree) and calibration.json. Called again after a
    kill it goes on; called again after it has finished it returns the same result.

    Args:
      teacher: the model to calibrate; its parameters are the reference and are not changed.
      proxy: the small model, or with `config.ensemble` several `Proxy`s; what was given is not changed, though a
        copy of it may learn (`config.proxy`).
      task: prompts and verifier; its "train" and "validation" splits are used. With `config.answer_utility` it needs
        an attribute `answer_mark`, the text before its answers.
      arm: "control", "distillable" or "undistillable".
      eta: weight of the calibration reward; 0 for "control", positive for the others.
      config: see `CalibrationConfig`.
      directory: the arm's folder.
      seed: of prompts, rollouts and the adapter.
      style_of: names the style of a completion, for rollouts.jsonl.
      on_step: called after each update with (updates done, metrics), after they and a due checkpoint were
        written.

    Raises:
      ValueError: arm and eta that contradict each other; more texts that the proxy cannot score than
        `config.unscorable_limit`; proxies that do not go with `config.ensemble`, an answer utility for a task without
        answers; what the models, the task and the tokenizers raise.
    """
    check_arm(arm, eta)
    run = _Run.make(teacher, proxy, task, arm, eta, config, Path(directory), seed)
    with Checkpointer(run.directory / "checkpoints") as checkpointer:
        resumed = checkpointer.latest_step()
        if resumed is None:
            start, state, best, proxies = 0, run.initial, run.initial.trainable, run.begin_proxies()
            record, best = run.begin(proxies), jax.tree.map(jnp.copy, best)
        else:
            proxies = run.learners.begin()
            abstract = _checkpoint(run.initial, run.initial.trainable, run.key, proxies)
            start, saved, meta = checkpointer.restore(abstract)
            state, best, record = saved["state"], saved["best"], _Record.from_meta(meta)
            proxies = tuple(saved.get("proxies", ()))
            run = dataclasses.replace(run, key=saved["key"])
        with (
            MetricWriter(run.directory, resume_step=resumed) as writer,
            RolloutLog(run.directory / "rollouts.jsonl", resumed) as log,
            Progress(config.steps, f"calibrate/{arm}", start=start) as bar,
        ):
            if resumed is None:
                writer.write(0, record.original.metrics())
            for step in range(start, config.steps):
                if record.stopped:
                    break
                state, metrics, batch = run.update(state, proxies, step)
                done = step + 1
                proxies, learned = run.learners.step(proxies, *batch[:2], seed, done)
                metrics |= learned
                if done % config.validation_every == 0 or done == config.steps:
                    validation = run.validate(state.trainable, proxies)
                    metrics |= validation.metrics()
                    if run.review(record, validation, done):
                        best = jax.tree.map(jnp.copy, state.trainable)
                run.guard(record, metrics)
                if done == config.steps and record.stopped is None:
                    record.stopped = "steps"
                if step % config.rollouts_every == 0 or record.stopped:
                    log.write(done, *batch, config.rollouts_kept, style_of)
                writer.write(done, metrics)
                if done % config.checkpoint_every == 0 or record.stopped:
                    tree = _checkpoint(state, best, run.key, proxies)
                    checkpointer.save(done, tree, record.to_meta() | {"data_position": done})
                shown = ("reward_task", "gap_per_byte", "kl_k3", "span_coverage", "validation_accuracy")
                bar.update(1, **{name: metrics[name] for name in shown if name in metrics})
                if on_step is not None:
                    on_step(done, metrics)
    assert record.stopped is not None
    result = CalibrationResult(
        best,
        record.best_step,
        record.best,
        record.original,
        int(state.step) // config.updates_per_batch,
        record.stopped,
    )
    save_tree(run.directory / "adapter", best, overwrite=True)
    summary = {name: getattr(result, name) for name in ("best_step", "steps", "stopped")}
    validations = {name: dataclasses.asdict(getattr(result, name)) for name in ("best", "original")}
    # Which gap chose the best checkpoint, and so what `best` was compared by.
    summary["best_by"] = config.judged_by
    write_json(
        run.directory / "calibration.json", {"arm": arm, "eta": eta, "seed": seed, **summary, **validations}
    )
    return result


def _checkpoint(
    state: RftState, best: Params, key: jax.Array, proxies: tuple[ProxyState, ...]
) -> dict[str, Any]:
    """The tree of a checkpoint; proxies that do not learn are not in it."""
    tree = {"state": state, "best": best, "key": key}
    return tree | ({"proxies": proxies} if proxies else {})


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same during a run."""

    teacher: Model
    proxies: tuple[Proxy, ...]
    learners: Learners
    answer_mark: str | None
    task: Task
    arm: str
    eta: float
    config: CalibrationConfig
    directory: Path
    key: jax.Array
    seed: int
    step: RftStep
    scale: float
    initial: RftState
    validation_problems: Sequence[Problem]
    batches: ExampleStream[Problem]
    rewards: tuple[Reward, ...]

    @classmethod
    def make(
        cls,
        teacher: Model,
        proxy: Model | Sequence[Proxy],
        task: Task,
        arm: str,
        eta: float,
        config: CalibrationConfig,
        directory: Path,
        seed: int,
    ) -> _Run:
        key = jax.random.key(seed)
        module = teacher.module
        optimizer = make_optimizer(config.optimizer, config.steps * config.updates_per_batch)
        if config.trainable == "adapter":
            scale = float(adapter_scale(config.adapter))
            trainable = init_adapter(module, config.adapter, jax.random.fold_in(key, _ADAPTER))
            axes = adapter_axes(module, config.adapter)
        else:
            if has_quantised(teacher.params):
                raise ValueError(
                    "trainable='params' cannot train weights that are kept in 8 bits; load the teacher with "
                    "weights='full', or train an adapter"
                )
            scale, trainable, axes = 1.0, teacher.params, param_axes(module)
        step = make_rft_step(
            module,
            config.rft,
            optimizer,
            trainable=config.trainable,
            scale=scale,
            axes=axes if module.mesh else None,
        )
        problems = task.problems("train", config.train_problems, seed)
        validation_problems = task.problems("validation", config.validation_problems, seed)
        check_prompts(teacher, [*problems, *validation_problems], config)
        proxies = as_proxies(proxy, config)
        return cls(
            teacher=teacher,
            proxies=proxies,
            learners=Learners.make(proxies, config),
            answer_mark=require_answer_mark(task, problems) if config.answer_utility else None,
            task=task,
            arm=arm,
            eta=eta,
            config=config,
            directory=directory,
            key=key,
            seed=seed,
            step=step,
            scale=scale,
            initial=init_rft_state(trainable, optimizer),
            validation_problems=validation_problems,
            batches=ExampleStream(problems, config.prompts_per_step, seed),
            rewards=make_rewards(config.rewards, teacher.mesh, teacher.module.dtype),
        )

    def policy(self, trainable: Params) -> tuple[Params, Params | None, float]:
        """(params, adapter, scale) of the teacher being trained."""
        if self.config.trainable == "adapter":
            return self.teacher.params, trainable, self.scale
        return trainable, None, 1.0

    def begin_proxies(self) -> tuple[ProxyState, ...]:
        """Learning proxies after their first training, on what the original teacher writes; () without any.

        Without it the original would be measured against proxies that have seen nothing, and no checkpoint could
        compare with it.
        """
        states = self.learners.begin()
        if not states:
            return ()
        rows = self.config.prompts_per_step * self.config.rft.num_samples
        for index in range(-(-self.config.proxy_buffer // rows)):
            batch, _ = self.rollouts(self.initial.trainable, self.proxies, index, _ORIGINAL_ROLLOUTS)
            states = self.learners.observe(states, *batch)
        return self.learners.train(states, self.seed, 0)[0]

    def begin(self, states: tuple[ProxyState, ...]) -> _Record:
        """Validates the original teacher, and refuses texts that the proxy cannot score."""
        original = self.validate(self.initial.trainable, states)
        unscorable, limit = original.not_same_bytes + original.does_not_fit, self.config.unscorable_limit
        if unscorable > limit:
            raise ValueError(
                f"the proxy cannot score {unscorable:.1%} of {len(self.validation_problems)} texts of the "
                f"original teacher, more than unscorable_limit={limit:.1%}: {original.not_same_bytes:.1%} do not "
                f"come out of both tokenizers byte for byte the same, {original.does_not_fit:.1%} are longer than "
                f"proxy_prompt_sizes={self.config.proxy_prompt_sizes} or "
                f"proxy_completion_sizes={self.config.proxy_completion_sizes}; "
                "choose another proxy, or larger sizes"
            )
        return _Record(original, original, highest=original.objective(self.arm, self.config.judged_by))

    def validate(self, trainable: Params, states: tuple[ProxyState, ...]) -> Validation:
        return validate(
            self.teacher,
            self.proxies,
            self.learners.now(states),
            self.task,
            self.validation_problems,
            self.config,
            jax.random.fold_in(self.key, _VALIDATION),
            *self.policy(trainable),
        )

    def rollouts(
        self, trainable: Params, proxies: tuple[Proxy, ...], step: int, purpose: int
    ) -> tuple[tuple[Rollouts, Scored], RolloutBatch]:
        """Rollouts for the prompts of a step, read and scored."""
        config, teacher, problems = self.config, self.teacher, self.batches[step]
        sampler = make_sampler(
            teacher.module, sampling_config(teacher, config, config.rft.num_samples), config.prompt_sizes
        )
        key = jax.random.fold_in(jax.random.fold_in(self.key, purpose), step)
        batch = sample_batch(sampler, teacher, problems, key, config, *self.policy(trainable))
        read = score_rollouts(
            teacher,
            proxies,
            self.task,
            problems,
            batch,
            config,
            rewards=self.rewards,
            answer_mark=self.answer_mark,
        )
        return read, batch

    def update(
        self, state: RftState, proxies: tuple[ProxyState, ...], step: int
    ) -> tuple[RftState, dict[str, float], tuple[Rollouts, Scored, Judgement]]:
        """One batch of rollouts and the updates on it."""
        started = time.monotonic()
        config, teacher = self.config, self.teacher
        (rollouts, scored), batch = self.rollouts(
            state.trainable, self.learners.now(proxies) or self.proxies, step, _ROLLOUTS
        )
        judgement = judge(rollouts, scored, config, self.arm, self.eta)
        rft_batch = RftBatch(batch.sequences, judgement.advantages, scored.lp_reference, batch.lp)
        if teacher.mesh is not None:
            rft_batch = place_batch(rft_batch, teacher.mesh)
        params = teacher.params if config.trainable == "adapter" else None
        for _ in range(config.updates_per_batch):
            state, step_metrics = self.step(state, params, rft_batch)
        sums, values = jax.device_get((judgement.sums, step_metrics))
        metrics = {name: float(total / max(count, 1.0)) for name, (total, count) in sums.items()}
        metrics |= {name: float(value) for name, value in values.items()}
        metrics |= {"verifier_failures": float(scored.task.failures), "seconds": time.monotonic() - started}
        metrics |= {f"reward_{name}_failures": float(r.failures) for name, r in scored.further.items()}
        return state, metrics, (rollouts, scored, judgement)

    def review(self, record: _Record, validation: Validation, done: int) -> bool:
        """Updates the counters of the guards; True if this is the policy to keep."""
        config = self.config
        objective = validation.objective(self.arm, config.judged_by)
        above = validation.accuracy >= record.original.accuracy - config.utility_floor - 1e-9
        record.below_floor = 0 if above else record.below_floor + 1
        rose = objective >= record.highest + config.min_improvement
        record.without_rise = 0 if rose else record.without_rise + 1
        record.highest = max(record.highest, objective)
        # The control is there to have had the same fine-tuning, so it is the last policy above the floor, not the best.
        better = above and (
            self.arm == "control" or objective > record.best.objective(self.arm, config.judged_by)
        )
        if better:
            record.best, record.best_step = validation, done
        return better

    def guard(self, record: _Record, metrics: Mapping[str, float]) -> None:
        """Says why the run has to stop, if it has to."""
        config = self.config
        if record.first_bytes is None:
            record.first_bytes = metrics["completion_bytes"]
        ceiling = config.length_ceiling
        if record.below_floor >= config.floor_patience:
            record.stopped = "accuracy below the utility floor"
        elif metrics["entropy"] < config.entropy_floor:
            record.stopped = "entropy below its floor"
        elif ceiling is not None and metrics["completion_bytes"] > ceiling * record.first_bytes:
            record.stopped = "completions above the length ceiling"
        elif config.stop_when_converged and record.without_rise >= config.patience:
            record.stopped = "converged"
