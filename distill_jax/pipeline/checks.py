"""What a start is refused for before it writes anything: a refused start must not leave a workdir in its own way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from distill_jax.mesh import ShardingError, axis_size, place
from distill_jax.models.decoder import Decoder, abstract_params, param_axes
from distill_jax.models.packages import PACKAGE_MODELS
from distill_jax.models.spec import ModelSpec
from distill_jax.pipeline.prepare import SCORED_ROWS, all_roles, check_sources, model_place, role_spec
from distill_jax.pipeline.prompt_lengths import check_prompts
from distill_jax.pipeline.settings import Settings
from distill_jax.text.tokenizers import Tokenizer


def check_start(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """Checks weights, shapes, batches against the mesh, and prompts against their slots; writes nothing.

    Raises:
      FileNotFoundError: weights of any role are not there.
      ValueError: models to be trained with a task that has no corpus; as `mesh.ShardingError` a dimension of a model or
        a number of rows that the mesh does not divide; a prompt that is too long.
    """
    check_sources(settings)
    for name in all_roles(settings):
        spec = _known_spec(settings, mesh, workdir, name)
        if spec is not None and mesh.size > 1:
            module = Decoder(spec)
            place(abstract_params(module), param_axes(module), mesh, what=name)
    shards = axis_size(mesh, "batch")
    for name, rows in batch_rows(settings).items():
        if rows % shards:
            raise ShardingError(
                f"{name}: a batch of {rows} rows does not divide by data x fsdp = {shards} of mesh "
                f"{dict(mesh.shape)}; choose a number of rows that does, or another mesh"
            )
    check_prompts(settings, workdir)


def batch_rows(settings: Settings) -> dict[str, int]:
    """Setting -> rows of a batch that it makes, of all batches that are laid out over the mesh as they are.

    The probes' own batches (`probe_suite.batch_size`) are not among them: they are filled up to what the mesh divides.
    """
    calibration, evaluation = settings.calibration, settings.evaluation
    rows = {
        "calibration.batch_size": calibration.prompts_per_step * calibration.rft.num_samples,
        "calibration.validation_batch": min(calibration.validation_batch, calibration.validation_problems),
        "distillation.training.batch_size": settings.distillation.training.batch_size,
        "evaluation.rollouts": min(SCORED_ROWS, evaluation.rollouts, evaluation.problems),
    }
    # Their teachers' texts are scored for the gap; their students are trained in the batches of all students.
    if settings.dial.arm:
        rows["dial.problems"] = min(SCORED_ROWS, settings.dial.problems, evaluation.problems)
    if settings.study is not None:
        rows["study.problems"] = min(SCORED_ROWS, settings.study.problems, evaluation.problems)
    if calibration.proxy == "learning":
        rows["calibration.proxy_batch"] = calibration.proxy_batch
    for name, role in all_roles(settings).items():
        if role.source == "train":
            rows |= {
                f"{name}.phases[{i}].batch_size": phase.batch_size for i, phase in enumerate(role.phases)
            }
    return rows


def _known_spec(settings: Settings, mesh: Mesh, workdir: Path, name: str) -> ModelSpec | None:
    """A role's model in numbers as far as they are certain now, None where only its weights tell them."""
    role = all_roles(settings)[name]
    location = model_place(settings, workdir, name)
    if location is not None and (location / "config.json").is_file():
        return role_spec(settings, workdir, name)
    if role.source == "train":
        # The size of a trained vocabulary is known only after its training: one that divides stands for it.
        trained = role.tokenizer != "bytes"
        size = axis_size(mesh, "vocab") if trained else Tokenizer.bytes_tokenizer().vocab_size
        return dataclasses.replace(role.spec, vocab_size=size)
    return (
        role.spec if role.source in PACKAGE_MODELS and not Path(role.source).expanduser().exists() else None
    )
