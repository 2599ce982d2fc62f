"""Whether every prompt of a run has room: found out before it begins, not hours later at the held-out problems."""

from __future__ import annotations

from pathlib import Path

from distill_jax.models.model import load_tokenizer
from distill_jax.models.packages import PACKAGE_MODELS, find_package_model
from distill_jax.pipeline.arms import make_task
from distill_jax.pipeline.distil import student_problems
from distill_jax.pipeline.evaluate import test_problems
from distill_jax.pipeline.prepare import STUDENT, all_roles, model_place
from distill_jax.pipeline.settings import Settings
from distill_jax.rft.texts import check_prompt_lengths
from distill_jax.tasks.base import Problem
from distill_jax.text.tokenizers import Tokenizer


def check_prompts(settings: Settings, workdir: Path) -> None:
    """Checks the prompts of all stages that are to run, for the models whose tokenizers are at hand.

    A proxy or a student leaves out the training texts that it has no room for, and says how many.

    Raises:
      ValueError: a prompt that the teacher, or a student at a held-out problem, has no slots for; names the setting.
    """
    calibration, stages = settings.calibration, settings.stages
    held_out = test_problems(settings) if "evaluate" in stages else []
    asked = list(held_out)
    if "calibrate" in stages:
        task = make_task(settings)
        asked += task.problems("train", calibration.train_problems, settings.seed)
        asked += task.problems("validation", calibration.validation_problems, settings.seed)
    if "distil" in stages:
        for seed in range(settings.distillation.seeds):
            asked += student_problems(settings, seed)
    _check(settings, workdir, "teacher", asked, calibration.prompt_sizes, "calibration.prompt_sizes")
    for kind in settings.students:
        sizes = (settings.distillation.prompt_size,)
        _check(settings, workdir, f"{STUDENT}{kind}", held_out, sizes, "distillation.prompt_size")


def _check(
    settings: Settings,
    workdir: Path,
    name: str,
    problems: list[Problem],
    sizes: tuple[int, ...],
    setting: str,
) -> None:
    tokenizer = _tokenizer(settings, workdir, name)
    if tokenizer is None:
        return
    style, system = all_roles(settings)[name].prompt_style, settings.calibration.system
    try:
        check_prompt_lengths(tokenizer, problems, style=style, system=system, sizes=sizes, setting=setting)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _tokenizer(settings: Settings, workdir: Path, name: str) -> Tokenizer | None:
    role, place = all_roles(settings)[name], model_place(settings, workdir, name)
    if place is not None and place.exists():
        return load_tokenizer(place)
    if role.source in PACKAGE_MODELS:
        return load_tokenizer(find_package_model(role.source))
    return Tokenizer.bytes_tokenizer() if role.source == "train" and role.tokenizer == "bytes" else None
