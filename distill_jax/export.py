"""A calibrated teacher out of a run, as a folder that transformers or peft opens, with its card.

    python -m distill_jax.export --workdir RUN --arm distillable --out DIR [--scale 1.0] [--format merged|peft]

merged   the weights with the adapter worked in, at the scale of the dial: safetensors in shards of limited size with
         their index, config.json, generation_config.json, tokenizer, README.md
peft     the adapter alone: adapter_config.json, adapter_model.safetensors, README.md

Scale 0 is the original teacher bit for bit (in the dtype of the run), 1 what was trained; anything between or beyond
turns the dial.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from distill_jax.checkpoint import read_json
from distill_jax.mesh import make_mesh
from distill_jax.models.hf_io import new_folder
from distill_jax.models.hub import is_hub_name, split_name
from distill_jax.models.model import save_model
from distill_jax.models.model_card import CardFacts, model_card
from distill_jax.pipeline.arms import Arm, calibration_record, load_arm
from distill_jax.pipeline.prepare import load_role, role_spec
from distill_jax.pipeline.settings import Role, Settings, read_settings
from distill_jax.report import words

FORMATS = ("merged", "peft")
MAX_SHARD_BYTES = 5_000_000_000


def export_arm(
    workdir: str | Path,
    arm: str,
    out: str | Path,
    *,
    scale: float = 1.0,
    format: str = "merged",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    mesh: Mesh | None = None,
) -> Path:
    """Writes one arm of a run as a folder.

    Args:
      workdir: of the run; its stage "calibrate" is finished for this arm.
      arm: "original", or an arm of the run.
      out: the new folder.
      scale: the dial: 0 the original bit for bit, 1 what was trained. An arm whose weights were all trained has 0 and 1
        alone.
      format: "merged" or "peft".
      max_shard_bytes: of a merged model's files.
      mesh: where the weights are put; one device by default.

    Returns:
      The absolute path of the folder.

    Raises:
      FileNotFoundError: no run, or no such arm in it. FileExistsError: `out` is there and not empty.
      ValueError: an unknown arm or format, a scale that the arm cannot have, an adapter of an arm that has none.
      OSError: it could not be written; nothing is left there.
    """
    folder = Path(workdir).expanduser().absolute()
    settings = _read_run(folder)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    if arm not in settings.arms:
        raise ValueError(f"arm {arm!r} is not in {folder}; it has {', '.join(settings.arms)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    _check_scale(settings, arm, scale, format)
    target = Path(out).expanduser().absolute()
    with new_folder(target) as temporary:
        mesh = mesh or make_mesh("data=1", devices=jax.devices()[:1])
        # What is exported is the source's own weights, also where the run kept them in 8 bits.
        teacher = load_role(settings, mesh, folder, "teacher", weights="full")
        loaded = load_arm(
            settings, folder, teacher, "original" if scale == 0.0 and format == "merged" else arm
        )
        _save(loaded, temporary, scale, format, max_shard_bytes)
        facts = card_facts(settings, folder, arm, scale, format, target.name)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
    return target


def _save(arm: Arm, folder: Path, scale: float, format: str, max_shard_bytes: int) -> None:
    factor = arm.scale * scale
    save_model(arm.model, folder, arm.adapter, factor, format == "merged", max_shard_bytes=max_shard_bytes)


def _read_run(folder: Path) -> Settings:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.json); give the --workdir of one")
    return read_settings(config_dict.ConfigDict(read_json(folder / "config.json")))


def _check_scale(settings: Settings, arm: str, scale: float, format: str) -> None:
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be a number, got {scale}")
    has_adapter = arm != "original" and settings.calibration.trainable == "adapter"
    if has_adapter:
        return
    why = "it is the original teacher" if arm == "original" else "all its weights were trained"
    if format == "peft":
        raise ValueError(f"arm {arm!r} has no adapter to export ({why}); use the format 'merged'")
    if scale not in (0.0, 1.0):
        raise ValueError(f"arm {arm!r} has no adapter to scale ({why}); its scale is 0 or 1, got {scale:g}")


def card_facts(
    settings: Settings, workdir: Path, arm: str, scale: float, format: str, name: str
) -> CardFacts:
    """What the card of an export says: the run's settings, its calibration record, its report if there is one.

    Args:
      settings, workdir: of the run.
      arm, scale, format: see `export_arm`.
      name: of the exported model.
    """
    calibration = settings.calibration
    report = workdir / "report" / "summary.json"
    summary = read_json(report) if report.is_file() else {}
    shown = "original" if scale == 0.0 else arm
    notes = []
    if read_json(workdir / "config.json").get("smoke"):
        notes.append(
            "Made by a run of smoke size, which shows that every stage works and proves nothing else."
        )
    if settings.roles["teacher"].weights != "full" and arm != "original":
        notes.append(
            "The run kept the teacher's weights in 8 bits, for its adapter and for the numbers here; this model "
            "is made from the weights in full."
        )
    if settings.dtype != "float32":
        notes.append(
            f"The weights are in {settings.dtype}, as in the run, also where the source had more digits."
        )
    training: dict[str, Any] = {"run": f"pair {settings.pair}, seed {settings.seed}"}
    if arm != "original":
        record = calibration_record(workdir, arm)
        training |= {
            "updates": f"best after {record['best_step']} of {record['steps']} (stopped: {record['stopped']})",
            "batch": f"{calibration.prompts_per_step} prompts x {calibration.rft.num_samples} rollouts",
            "calibration reward": (
                f"{calibration.units}, numerator {calibration.numerator}, credit {calibration.credit}"
            ),
            "further rewards": ", ".join(f"{term.name} x {term.weight:g}" for term in calibration.rewards)
            or "none",
        }
        if calibration.trainable == "adapter":
            adapter = calibration.adapter
            training["adapter"] = (
                f"rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets)}"
            )
    return CardFacts(
        name=name,
        arm=arm,
        kind=format,
        base=_in_words(settings, workdir, "teacher"),
        eta=None if arm == "original" else settings.eta[arm],
        scale=scale,
        proxy=_in_words(settings, workdir, "proxy"),
        task=settings.task,
        data=_options_in_words(settings.task_options),
        training=training,
        prompt_style=settings.roles["teacher"].prompt_style,
        results=_results(summary, shown),
        claims=[claim["statement"] for claim in summary.get("claims", []) if _is_about(claim["name"], shown)],
        notes=notes,
        base_name=split_name(source)[0] if is_hub_name(source := settings.roles["teacher"].source) else "",
    )


def _in_words(settings: Settings, workdir: Path, name: str) -> str:
    role: Role = settings.roles[name]
    spec = role_spec(settings, workdir, name)
    # Where a model lay on the machine of the run is nobody's business; its folder's name is what it is called.
    source = "a model trained in the run" if role.source == "train" else Path(role.source).name
    return f"{source} ({spec.family}, {spec.num_params:,} parameters)"


def _options_in_words(options: Mapping[str, Any]) -> str:
    def said(value: Any) -> str:
        text = str(value)
        return Path(text).name if isinstance(value, str) and "/" in text else text

    return ", ".join(f"{name} = {said(value)}" for name, value in options.items()) or "no options"


def _results(summary: Mapping[str, Any], arm: str) -> list[tuple[str, str]]:
    found = summary.get("arms", {}).get(arm, {})
    rows = []
    for metric, value in found.get("teacher", {}).items():
        share = metric.startswith(("accuracy", "style/"))
        if value["mean"] is not None:
            plain = f"{value['mean']:.3f} [{words.interval(value['ci95'], digits=3)}]"
            text = f"{words.cell(value)} %" if share else plain
            rows.append((f"this model, {metric.replace('_', ' ')}", text))
    for attack, kinds in found.get("students", {}).items():
        for kind, metrics in kinds.items():
            rows += [
                (f"its students ({kind}, {attack}), {metric.replace('_', ' ')}", f"{words.cell(value)} %")
                for metric, value in metrics.items()
                if words.parse_metric_name(metric) is not None and value["mean"] is not None
            ]
    return rows


def _is_about(claim: str, arm: str) -> bool:
    head, _, tail = claim.partition("/")
    if head == "teacher_accuracy":
        return tail == arm
    of_students = {"distillable": "students_beat", "undistillable": "guard"}
    return arm in of_students and head.startswith(of_students[arm])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m distill_jax.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--arm", required=True, help="original, control, distillable or undistillable")
    parser.add_argument("--out", required=True, help="the new folder")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="the dial: 0 the original, 1 what was trained"
    )
    parser.add_argument("--format", choices=FORMATS, default="merged")
    parser.add_argument(
        "--max_shard_bytes", type=int, default=MAX_SHARD_BYTES, help="of a merged model's files"
    )
    parser.add_argument("--mesh", default="", help="sizes of data, fsdp, tensor; one device by default")
    given = parser.parse_args(arguments)
    try:
        written = export_arm(
            given.workdir,
            given.arm,
            given.out,
            scale=given.scale,
            format=given.format,
            max_shard_bytes=given.max_shard_bytes,
            mesh=make_mesh(given.mesh) if given.mesh else None,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.format} export of arm {given.arm} at scale {given.scale:g}: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
