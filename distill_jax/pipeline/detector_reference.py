"""The detector's reference, and its ROC, from teachers that runs of the pipeline made.

    python -m distill_jax.pipeline.detector_reference WORKDIR [WORKDIR ...] --out FOLDER [--with_original]

Every original and every calibrated teacher of the runs (see `arms`), those of their studies among them (see `study`),
is sampled on validation problems and measured with its run's own proxy. Originals and controls are untouched; controls
are what makes the test fair: they were trained with the same algorithm on the task alone. FOLDER holds

    reference.json   the rows, what `python -m distill_jax.detect --reference` reads
    roc.json         `curves`, how well calibrated and untouched teachers are told apart, one seed left out at a time;
                     from several runs also "unseen_run": one run left out at a time

**One seed left out**: a teacher is judged by a reference without any teacher of its run that was calibrated with its
seed, so neither it nor its siblings (same problems, same first adapter) are in what it is compared with. The references
know other teachers of the same original. **One run left out**: they do not even know that; what is left is the question
that a stranger asks, and the answer of a reference with few originals in it may be poor.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict

from distill_jax.checkpoint import read_json, write_json
from distill_jax.mesh import make_mesh
from distill_jax.pipeline.arms import Arm, calibration_record, load_arm, load_calibrated, make_task
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import Settings, read_settings
from distill_jax.pipeline.study_teachers import finished_teachers, teacher_folder
from distill_jax.probes import detector
from distill_jax.probes.detector import FeatureRow, Setting
from distill_jax.probes.reference import FEWEST_ROWS, UNTOUCHED
from distill_jax.probes.subjects import Subject
from distill_jax.probes.texts import TextPair

_KINDS = {"original": UNTOUCHED, "control": UNTOUCHED}  # every other arm is its own kind
_HOW = {
    "seed": "one seed left out: each teacher is judged by a reference without the teachers of its run that were "
    "calibrated with its seed",
    "run": "one run left out: each teacher is judged by a reference without any teacher of its run's original",
}


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
      workdirs: runs of one task with finished arms, and their studies; what is not calibrated yet is left out.
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
    made = [teacher for folder, run in runs.items() for teacher in _ready(run, folder)]
    untouched = [teacher.group for teacher in made if teacher.kind == UNTOUCHED]
    left = len(untouched) - max(untouched.count(teacher.group) for teacher in made)
    if left < FEWEST_ROWS:
        raise ValueError(
            f"the runs have {len(untouched)} original and control teachers, {left} of them without the seed that has "
            f"most, but a ROC needs {FEWEST_ROWS} without it; make more controls (configs/study.py), or give more runs"
        )
    mesh = mesh or make_mesh("data=1", devices=jax.devices()[:1])
    rows: list[FeatureRow] = []
    for folder, run in runs.items():
        rows += measure_run(run, folder, settings[0], mesh)
    target = Path(out).expanduser().absolute()
    detector.write_reference(target / "reference.json", settings[0], rows)
    result = curves(rows, [teacher.group for teacher in made])
    runs_of = [teacher.run for teacher in made]
    untouched_runs = [run for run, row in zip(runs_of, rows, strict=True) if row.untouched]
    if len(untouched_runs) - max(map(untouched_runs.count, runs_of)) >= FEWEST_ROWS:
        result["unseen_run"] = curves(rows, runs_of, how="run")
    write_json(target / "roc.json", result)
    return result


def measure_run(settings: Settings, workdir: Path, setting: Setting, mesh: Mesh) -> list[FeatureRow]:
    """One row for each finished teacher of a run."""
    task = make_task(settings)
    problems = detector.reference_problems(task, setting)
    correct_at, system = settings.calibration.correct_at, setting.system
    teacher = load_role(settings, mesh, workdir, "teacher")
    proxy = Subject(load_role(settings, mesh, workdir, "proxy"), style=setting.proxy_style, system=system)
    small = detector.sample_texts(proxy, task, problems, setting, correct_at)

    def subject(arm: Arm) -> Subject:
        return Subject(arm.model, arm.adapter, arm.scale, style=setting.style, system=system)

    original = subject(load_arm(settings, workdir, teacher, "original"))
    own_of_original = detector.sample_texts(original, task, problems, setting, correct_at)
    rows = []
    for made in _ready(settings, workdir):
        if made.of_study:
            arm = load_calibrated(settings, teacher_folder(workdir, made.name), teacher, made.name)
        else:
            arm = load_arm(settings, workdir, teacher, made.name)
        suspect = subject(arm)
        own = (
            own_of_original
            if made.name == "original"
            else detector.sample_texts(suspect, task, problems, setting, correct_at)
        )
        found = detector.features(
            suspect,
            proxy,
            TextPair(own, small),
            original=original if setting.original else None,
            original_texts=own_of_original if setting.original else None,
        )
        label = f"{workdir.name}/{made.name} (seed {made.seed}, eta {made.eta:g})"
        rows.append(found.row(label, made.kind))
        print(f"detector: measured {label}", flush=True)
    return rows


def curves(
    rows: Sequence[FeatureRow], groups: Sequence[str] | None = None, how: str = "seed"
) -> dict[str, Any]:
    """How well a reference tells calibrated from untouched rows that it does not know.

    Args:
      rows, groups: see `reference.held_out`. how: "seed" or "run", what the groups are.

    Returns:
      {"how": in words, "scores": [{"name", "kind", "score", "alarm"}],
       "roc": {kind: {"auc", "ci95", "fpr", "tpr", "positives", "negatives"}},
       "detection": {"false_alarm": the rate that was promised, kind: {"rate", "ci95", "n"}}}

      The kind "calibrated" is all that is not untouched, "untouched" among the detections is the false-alarm rate that
      was met. There is no curve without positives.

    Raises:
      ValueError: see `reference.held_out`.
    """
    found = detector.held_out(rows, groups)
    untouched = np.array([row.untouched for row in rows])
    kinds = {kind: np.array([row.kind == kind for row in rows]) for kind in {row.kind for row in rows}}
    kinds = {kind: of for kind, of in sorted(kinds.items()) if kind != UNTOUCHED}
    table = {}
    detection: dict[str, Any] = {"false_alarm": found.false_alarm}
    for kind, of in {"calibrated": ~untouched, **kinds, UNTOUCHED: untouched}.items():
        if not of.any():
            continue
        rate, ends = detector.share(int(found.alarms[of].sum()), int(of.sum()))
        detection[kind] = {"rate": rate, "ci95": list(ends), "n": int(of.sum())}
        if kind == UNTOUCHED:
            continue
        used = of | untouched
        curve = detector.roc(found.scores[used], of[used])
        table[kind] = {
            "auc": curve.auc,
            "ci95": list(curve.ci95),
            "fpr": curve.fpr.tolist(),
            "tpr": curve.tpr.tolist(),
            "positives": int(of.sum()),
            "negatives": int(untouched.sum()),
        }
    named = [
        {"name": row.name, "kind": row.kind, "score": float(score), "alarm": bool(alarm)}
        for row, score, alarm in zip(rows, found.scores, found.alarms, strict=True)
    ]
    return {"how": _HOW[how], "scores": named, "roc": table, "detection": detection}


def curves_text(result: Mapping[str, Any]) -> str:
    """The areas and rates of `curves` in plain lines."""
    rates, lines = result["detection"], [f"{result['how']}."]
    for kind, curve in result["roc"].items():
        of_kind = rates[kind]
        lines.append(
            f"  {kind}: AUC {curve['auc']:.2f} [{', '.join(f'{end:.2f}' for end in curve['ci95'])}], "
            f"{curve['positives']} against {curve['negatives']} untouched; found {_rate(of_kind)}"
        )
    lines.append(
        f"  untouched: flagged {_rate(rates[UNTOUCHED])}, at a threshold that promises {rates['false_alarm']:.1%} "
        "at most"
    )
    return "\n".join(lines)


def _rate(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return (
        f"{round(value['rate'] * value['n'])} of {value['n']} ({value['rate']:.0%} [{low:.0%}, {high:.0%}])"
    )


@dataclasses.dataclass(frozen=True)
class _Made:
    """A teacher of a run. run, group: its folder; the folder and the seed of its calibration."""

    name: str
    kind: str
    eta: float
    seed: int
    run: str
    group: str
    of_study: bool = False


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


def _ready(settings: Settings, workdir: Path) -> list[_Made]:
    """The teachers of a run that are finished: its arms, then those of its study."""

    def made(name: str, mode: str, eta: float, seed: int, of_study: bool) -> _Made:
        return _Made(name, _KINDS.get(mode, mode), eta, seed, str(workdir), f"{workdir}:{seed}", of_study)

    found = [made("original", "original", 0.0, settings.seed, False)]
    for arm in settings.arms:
        if arm != "original" and (workdir / "arms" / arm / "calibration.json").exists():
            found.append(made(arm, arm, calibration_record(workdir, arm)["eta"], settings.seed, False))
    for further in finished_teachers(workdir, settings.seed):
        found.append(
            made(further.name, further.mode, further.eta, settings.seed + further.seed, of_study=True)
        )
    return found


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
    print(f"{len(result['scores'])} teachers; {curves_text(result)}")
    if "unseen_run" in result:
        print(curves_text(result["unseen_run"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
