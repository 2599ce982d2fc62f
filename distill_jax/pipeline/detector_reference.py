"""The detector's reference, and its ROC, from teachers that runs of the pipeline made.

    python -m distill_jax.pipeline.detector_reference WORKDIR [WORKDIR ...] --out FOLDER [--with_original]

Every original and every calibrated teacher of the runs (see `arms`) is sampled on validation problems and measured with
its run's own proxy. Originals and controls are untouched; controls are what makes the test fair: they were trained with
the same algorithm on the task alone. FOLDER holds

    reference.json   the rows, what `python -m distill_jax.detect --reference` reads
    roc.json         scores (untouched models by the other untouched ones), and the ROC: all calibrated against
                     untouched, and each direction by itself
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict

from distill_jax.checkpoint import read_json, write_json
from distill_jax.mesh import make_mesh
from distill_jax.pipeline.arms import Arm, calibration_record, load_arm, make_task
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import Settings, read_settings
from distill_jax.probes import detector
from distill_jax.probes.detector import FeatureRow, Setting
from distill_jax.probes.reference import FEWEST_ROWS, UNTOUCHED
from distill_jax.probes.subjects import Subject
from distill_jax.probes.texts import TextPair

_KINDS = {"original": UNTOUCHED, "control": UNTOUCHED}  # every other arm is its own kind
_VALIDATION = 3  # added to the run's seed: problems that neither calibration nor the other probes chose on


def make_reference(
    workdirs: Sequence[str | Path],
    out: str | Path,
    *,
    with_original: bool = False,
    problems: int = 64,
    samples: int = 4,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Measures all teachers of some runs and writes reference.json and roc.json.

    Args:
      workdirs: runs of one task with finished arms; arms that are not calibrated yet are left out.
      out: a folder for the two files.
      with_original: also measure what needs the claimed original. Originals then compare with themselves: their
        log-ratio is 0.
      problems, samples: see `Setting`.
      mesh: where the models are put; one device by default.

    Returns:
      What roc.json holds.

    Raises:
      FileNotFoundError: a folder without a run. ValueError: no workdirs, the same one twice, runs of other tasks, or
        too few untouched teachers.
    """
    folders = [Path(workdir).expanduser().absolute() for workdir in workdirs]
    if not folders or len(set(folders)) != len(folders):
        raise ValueError(f"give at least one workdir, and each of them once; got {[str(f) for f in folders]}")
    runs = {folder: _read_run(folder) for folder in folders}
    settings = [_setting(run, with_original, problems, samples) for run in runs.values()]
    for folder, setting in zip(folders, settings, strict=True):
        if setting != settings[0]:
            raise ValueError(
                f"{folder} is asked in another way than {folders[0]}: {setting} and {settings[0]}; make a reference "
                "from runs of one task"
            )
    untouched = sum(_KINDS.get(arm, arm) == UNTOUCHED for f, run in runs.items() for arm in _ready(run, f))
    if untouched <= FEWEST_ROWS:
        raise ValueError(
            f"the runs have {untouched} original and control teachers, but a ROC needs more than {FEWEST_ROWS}"
        )
    mesh = mesh or make_mesh("data=1", devices=jax.devices()[:1])
    rows: list[FeatureRow] = []
    for folder, run in runs.items():
        rows += measure_run(run, folder, settings[0], mesh)
    target = Path(out).expanduser().absolute()
    detector.write_reference(target / "reference.json", settings[0], rows)
    result = curves(rows)
    write_json(target / "roc.json", result)
    return result


def measure_run(settings: Settings, workdir: Path, setting: Setting, mesh: Mesh) -> list[FeatureRow]:
    """One row for each finished teacher of a run."""
    task = make_task(settings)
    problems = task.problems("validation", setting.problems, setting.seed + _VALIDATION + settings.seed)
    correct_at, system = settings.calibration.correct_at, setting.system
    teacher = load_role(settings, mesh, workdir, "teacher")
    proxy = Subject(load_role(settings, mesh, workdir, "proxy"), style=setting.proxy_style, system=system)
    small = detector.sample_texts(proxy, task, problems, setting, correct_at)

    def subject(arm: Arm) -> Subject:
        return Subject(arm.model, arm.adapter, arm.scale, style=setting.style, system=system)

    original = subject(load_arm(settings, workdir, teacher, "original"))
    own_of_original = detector.sample_texts(original, task, problems, setting, correct_at)
    rows = []
    for name in _ready(settings, workdir):
        suspect = subject(load_arm(settings, workdir, teacher, name))
        own = (
            own_of_original
            if name == "original"
            else detector.sample_texts(suspect, task, problems, setting, correct_at)
        )
        found = detector.features(
            suspect,
            proxy,
            TextPair(own, small),
            original=original if setting.original else None,
            original_texts=own_of_original if setting.original else None,
        )
        eta = calibration_record(workdir, name)["eta"] if name != "original" else 0.0
        label = f"{workdir.name}/{name} (seed {settings.seed}, eta {eta:g})"
        rows.append(found.row(label, _KINDS.get(name, name)))
        print(f"detector: measured {label}", flush=True)
    return rows


def curves(rows: Sequence[FeatureRow]) -> dict[str, Any]:
    """{"scores": [{"name", "kind", "score"}], "roc": {kind: {"auc", "ci95", "fpr", "tpr", "positives", "negatives"}}}.

    The kind "calibrated" is all that is not untouched. There is no curve without positives.

    Raises:
      ValueError: see `held_out_scores`.
    """
    scores = detector.held_out_scores(rows)
    untouched = np.array([row.untouched for row in rows])
    kinds = {kind: np.array([row.kind == kind for row in rows]) for kind in {row.kind for row in rows}}
    kinds = {kind: of for kind, of in sorted(kinds.items()) if kind != UNTOUCHED}
    table = {}
    for kind, of in {"calibrated": ~untouched, **kinds}.items():
        if not of.any():
            continue
        used = of | untouched
        curve = detector.roc(scores[used], of[used])
        table[kind] = {
            "auc": curve.auc,
            "ci95": list(curve.ci95),
            "fpr": curve.fpr.tolist(),
            "tpr": curve.tpr.tolist(),
            "positives": int(of.sum()),
            "negatives": int(untouched.sum()),
        }
    named = [
        {"name": row.name, "kind": row.kind, "score": float(score)}
        for row, score in zip(rows, scores, strict=True)
    ]
    return {"scores": named, "roc": table}


def _read_run(folder: Path) -> Settings:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.json); give the --workdir of one")
    return read_settings(config_dict.ConfigDict(read_json(folder / "config.json")))


def _setting(settings: Settings, with_original: bool, problems: int, samples: int) -> Setting:
    return Setting(
        task=settings.task,
        options=dict(settings.task_options),
        problems=problems,
        samples=samples,
        max_new_tokens=max(settings.calibration.completion_size, settings.distillation.completion_size),
        style=settings.roles["teacher"].prompt_style,
        proxy_style=settings.roles["proxy"].prompt_style,
        system=settings.calibration.system,
        original=with_original,
    )


def _ready(settings: Settings, workdir: Path) -> list[str]:
    return [
        arm
        for arm in settings.arms
        if arm == "original" or (workdir / "arms" / arm / "calibration.json").exists()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m distill_jax.pipeline.detector_reference", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("workdirs", nargs="+", help="folders of runs")
    parser.add_argument("--out", required=True, help="folder for reference.json and roc.json")
    parser.add_argument("--with_original", action="store_true", help="also compare with the claimed original")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="completions of each problem")
    given = parser.parse_args(arguments)
    try:
        result = make_reference(
            given.workdirs,
            given.out,
            with_original=given.with_original,
            problems=given.problems,
            samples=given.samples,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for kind, curve in result["roc"].items():
        low, high = curve["ci95"]
        print(
            f"{kind}: AUC {curve['auc']:.2f} [{low:.2f}, {high:.2f}], {curve['positives']} against "
            f"{curve['negatives']} untouched"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
