"""Stage calibrate: the teacher of every arm, one set of weights and an adapter each."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from distill_jax.checkpoint import load_tree, read_json
from distill_jax.models.adapter import adapter_scale, init_adapter
from distill_jax.models.decoder import Params
from distill_jax.models.model import Model
from distill_jax.pipeline.at_once import run_at_once
from distill_jax.pipeline.prepare import further_proxies, load_role
from distill_jax.pipeline.settings import Settings
from distill_jax.rft.calibrate import calibrate
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.proxies import Proxy
from distill_jax.tasks import Task, chain_arithmetic, get_task
from distill_jax.tasks.base import MeshTask


@dataclasses.dataclass(frozen=True)
class Arm:
    """A teacher as the rest of the run sees it: weights (the original's, or its own), adapter and its factor."""

    name: str
    model: Model
    adapter: Params | None
    scale: float


def make_task(settings: Settings, mesh: Mesh | None = None) -> Task:
    """The run's task; one that has a model of its own (a judge) puts it on the mesh."""
    task = get_task(settings.task, **settings.task_options)
    if mesh is not None and isinstance(task, MeshTask):
        task.use_mesh(mesh)
    return task


def style_of(settings: Settings, completion: str) -> str | None:
    """The style that a completion is written in, for tasks that know styles."""
    return chain_arithmetic.style_of(completion) if settings.task == "chain_arithmetic" else None


def load_proxies(settings: Settings, mesh: Mesh, workdir: Path) -> list[Proxy]:
    """What `calibrate` takes as its proxies: roles.proxy, and with `calibration.ensemble` all of `proxies`."""
    roles = {"proxy": settings.roles["proxy"], **further_proxies(settings)}
    return [
        Proxy(name, load_role(settings, mesh, workdir, name), role.prompt_style)
        for name, role in roles.items()
    ]


def calibration_config(settings: Settings) -> CalibrationConfig:
    """The run's calibration; how prompts are written belongs to the roles."""
    return dataclasses.replace(
        settings.calibration,
        prompt_style=settings.roles["teacher"].prompt_style,
        proxy_prompt_style=settings.roles["proxy"].prompt_style,
    )


def calibrate_arms(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Calibrates every arm that is not finished yet."""
    waiting = [arm for arm in settings.eta if not (workdir / "arms" / arm / "calibration.json").exists()]
    if not waiting:
        return
    teacher, proxies = load_role(settings, mesh, workdir, "teacher"), load_proxies(settings, mesh, workdir)
    config = calibration_config(settings)

    def run(arm: str) -> None:
        result = calibrate(
            teacher,
            proxies,
            make_task(settings, mesh),
            arm,
            settings.eta[arm],
            config,
            workdir / "arms" / arm,
            seed=settings.seed,
            style_of=lambda text: style_of(settings, text),
        )
        before, after = result.original, result.best
        learned = ""
        if before.gap_per_byte_learning is not None and after.gap_per_byte_learning is not None:
            learned = (
                f" (after learning {before.gap_per_byte_learning:.3f} -> {after.gap_per_byte_learning:.3f}; the best "
                f"by the {config.judged_by} proxy)"
            )
        print(
            f"calibrate/{arm}: best after step {result.best_step} of {result.steps} (stopped: {result.stopped}), "
            f"gap {before.gap_per_byte:.3f} -> {after.gap_per_byte:.3f} nats a byte{learned}, greedy accuracy "
            f"{before.accuracy:.3f} -> {after.accuracy:.3f}",
            flush=True,
        )

    run_at_once([functools.partial(run, arm) for arm in waiting], settings.at_once)


def load_arm(settings: Settings, workdir: Path, teacher: Model, name: str) -> Arm:
    """The calibrated teacher of an arm; "original" is the teacher itself.

    Raises:
      FileNotFoundError: the arm has not been calibrated.
    """
    if name == "original":
        return Arm(name, teacher, None, 1.0)
    folder = workdir / "arms" / name
    if not (folder / "calibration.json").exists():
        raise FileNotFoundError(
            f"arm {name!r} is not calibrated in {workdir}; run the stage 'calibrate' first"
        )
    return load_calibrated(settings, folder, teacher, name)


def load_calibrated(settings: Settings, folder: Path, teacher: Model, name: str) -> Arm:
    """The teacher that `calibrate` left in a folder."""
    config = settings.calibration
    if config.trainable == "params":
        params = load_tree(folder / "adapter", teacher.params)
        return Arm(name, dataclasses.replace(teacher, params=params), None, 1.0)
    abstract = init_adapter(teacher.module, config.adapter, jax.random.key(0))
    return Arm(name, teacher, load_tree(folder / "adapter", abstract), float(adapter_scale(config.adapter)))


def calibration_record(workdir: Path, arm: str) -> dict[str, Any]:
    """calibration.json of an arm."""
    return read_json(workdir / "arms" / arm / "calibration.json")
