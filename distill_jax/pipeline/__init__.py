"""The pipeline: a config's stages in order, each skipped when its result already stands in the workdir.

prepare -> calibrate (arms) -> distil (arms x kinds of student x seeds) -> evaluate -> report

Before the report run, each with what it has not done yet: with `probes` other than "none" the probes
(`pipeline.probe`), with an arm in `dial` the dial (`pipeline.dial`), with a `study` the study of what the probes
predict (`pipeline.study`); and with `attacks` other than "none", report or not, the attack suite (`pipeline.attack`).
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from distill_jax.checkpoint import read_json
from distill_jax.mesh import make_mesh
from distill_jax.pipeline.arms import calibrate_arms, make_task
from distill_jax.pipeline.attack import attack, check_suite
from distill_jax.pipeline.checks import check_start
from distill_jax.pipeline.coloured_rollouts import colour_rollouts
from distill_jax.pipeline.dial import dial, dial_settings
from distill_jax.pipeline.distil import ATTACK, GOLD, distil
from distill_jax.pipeline.evaluate import evaluate
from distill_jax.pipeline.plan import format_plan
from distill_jax.pipeline.prepare import STUDENT, prepare, role_spec
from distill_jax.pipeline.probe import chosen, probe
from distill_jax.pipeline.probe_summary import diagnosis_text, summarise_probes
from distill_jax.pipeline.settings import STAGES, Settings, apply_modes, from_config, read_settings, to_config
from distill_jax.pipeline.study import study, study_settings
from distill_jax.pipeline.workdir import is_done, open_workdir, plain_config, stage_clock
from distill_jax.report import Setting, summarise, summary_table, write_report, write_summary
from distill_jax.report.answer import only_probes
from distill_jax.report.attack_summary import summarise_attacks
from distill_jax.report.attack_table import attack_text
from distill_jax.report.dial_summary import summarise_dial
from distill_jax.report.dial_table import dial_text
from distill_jax.report.study_summary import summarise_study
from distill_jax.report.study_table import study_text

__all__ = ["STAGES", "InvalidEvaluationError", "Settings", "from_config", "read_settings", "run", "to_config"]


class InvalidEvaluationError(ValueError):
    """A positive control of the attack suite failed: its numbers mean nothing. The report is written and says so."""


def run(config: config_dict.ConfigDict, workdir: str | Path | None = None) -> dict[str, Any] | None:
    """Runs the stages of a config and returns the summary; without stages it prints the plan and returns None.

    Args:
      config: from a config file's `get_config`.
      workdir: folder of the run; a new one under runs/ by default. A second start goes on where the first stopped.

    Raises:
      ValueError: several processes, a setting out of range, a mesh that does not fit, models or tokenizers that do not
        go together, or a workdir of another config.
      FileNotFoundError: weights that are not there; says what to install.
      InvalidEvaluationError: a positive control of the attack suite failed; the report stands.
    """
    settings = read_settings(config)
    make_task(settings)  # an unknown task or option is refused before anything is made
    for term in settings.calibration.rewards:
        term.check_source()
    chosen(settings)
    if settings.attacks:
        check_suite(settings)
    if settings.dial.arm:
        dial_settings(settings)
    if settings.study is not None:
        study_settings(settings)
    if not settings.stages:
        print(format_plan(settings))
        return None
    if jax.process_count() > 1:
        raise ValueError(
            f"this is process {jax.process_index()} of {jax.process_count()}, and each of them would write the same "
            "files; a run over several hosts is not supported: use one host with enough devices"
        )
    folder = Path(workdir or f"runs/{settings.pair}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser().absolute()
    mesh = make_mesh(settings.mesh)
    if any(stage in settings.stages and not is_done(folder, stage) for stage in STAGES[:-1]):
        check_start(settings, mesh, folder)
    if mesh.size > 1:
        # Two programs that run collectives on the same devices may wait for each other for ever.
        settings = dataclasses.replace(settings, at_once=1)
    open_workdir(folder, plain_config(config))
    work = {"prepare": _prepare, "calibrate": calibrate_arms, "distil": distil, "evaluate": evaluate}
    for stage in STAGES[:-1]:
        # A finished run may be given the larger budgets later; its stages then do what is missing.
        longer = stage in ("distil", "evaluate") and bool(settings.distillation.long_budgets)
        if stage in settings.stages and (longer or not is_done(folder, stage)):
            print(f"== {stage}", flush=True)
            with stage_clock(folder, stage, more=True):
                work[stage](settings, mesh, folder)
    reporting = "report" in settings.stages
    further = {
        "probe": (probe, settings.probes and reporting),
        "dial": (dial, settings.dial.arm and reporting),
        "study": (study, settings.study is not None and reporting),
        "attack": (attack, settings.attacks),
    }
    for stage, (do, wanted) in further.items():
        if wanted:
            print(f"== {stage}", flush=True)
            with stage_clock(folder, stage, more=True):
                do(settings, mesh, folder)
    if not reporting:
        return None
    colour_rollouts(settings, mesh, folder)
    return _report(settings, folder, plain_config(apply_modes(config)))


def _prepare(settings: Settings, mesh: Mesh, workdir: Path) -> None:
    """The stage, and beside the training of the teacher the students of gold text, which need no teacher."""

    fills_a_core = settings.at_once > 1 and "distil" in settings.stages

    def ready(name: str) -> None:
        if fills_a_core and name.startswith(STUDENT):
            distil(settings, mesh, workdir, (GOLD,), (name.removeprefix(STUDENT),))

    prepare(settings, mesh, workdir, ready)


def _report(settings: Settings, folder: Path, effective_config: dict[str, Any]) -> dict[str, Any]:
    """Made anew at each start: it is cheap, and reads nothing but results.

    `effective_config` is what ran: the config with smoke and budget_curve worked in.
    """
    print("== report", flush=True)
    with stage_clock(folder, "report"):
        summary = summarise(
            folder,
            read_json(folder / "config.json"),
            read_json(folder / "environment.json"),
            _setting(settings, folder),
        )
    summary["effective_config"] = effective_config
    summarise_probes(folder, summary)
    turned = summarise_dial(folder)
    if turned is not None:
        summary["dial"] = turned
    studied = summarise_study(folder)
    if studied is not None:
        summary["study"] = studied
    suite = summarise_attacks(folder, summary["setting"])
    if suite is not None:
        summary["attacks"] = suite
    write_summary(folder, summary)
    page = write_report(folder, summary)
    # Probes alone ask nobody the test problems: an empty table would hide their answer.
    if not only_probes(summary):
        print(summary_table(summary))
    if "diagnosis" in summary:
        print(diagnosis_text(summary["diagnosis"]))
    if turned is not None:
        print(dial_text(turned))
    if studied is not None:
        print(study_text(studied))
    if suite is not None:
        print(attack_text(suite))
    print(f"report: {page}")
    if suite is not None and suite["verdict"] == "invalid":
        failed = [name for name, control in suite["controls"].items() if control["verdict"] == "failed"]
        raise InvalidEvaluationError(
            f"the evaluation is invalid: the positive controls {', '.join(failed)} failed, so the attacks cannot be "
            f"trusted; see {page}"
        )
    return summary


def _setting(settings: Settings, folder: Path) -> Setting:
    """What the students were given, for the words of every claim."""
    parameters, descriptions = {}, {}
    how = "all weights" if settings.distillation.training.trainable == "params" else "a low-rank adapter"
    for kind in settings.students:
        spec = role_spec(settings, folder, f"{STUDENT}{kind}")
        parameters[kind] = spec.num_params
        descriptions[kind] = f"{spec.n_layers} layers, width {spec.d_model}, {how} trained"
    return Setting(
        samples=settings.distillation.samples,
        steps=settings.distillation.steps,
        student_parameters=parameters,
        student_descriptions=descriptions,
        attack=ATTACK,
    )
