"""Does this model look calibrated against distillation? One number, its threshold, and what was seen.

    python -m distill_jax.detect --model DIR --proxy DIR --reference FILE [--original DIR] [--task chain_arithmetic]

The model and the small reference model (proxy) are sampled on problems of the task as the reference's models were; with
--original, also what the model is said to be, for references that were made with it. See `probes.detector` for what is
measured and `pipeline.detector_reference` for how a reference is made. Exit status: 0 looks untouched, 1 looks
calibrated, 2 could not be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from distill_jax.checkpoint import write_json
from distill_jax.mesh import make_mesh
from distill_jax.models.model import load_model
from distill_jax.probes import detector
from distill_jax.probes.detector import Detection
from distill_jax.probes.subjects import Subject
from distill_jax.probes.texts import TextPair
from distill_jax.tasks.base import get_task


def detect(
    model: str | Path,
    proxy: str | Path,
    reference: str | Path,
    *,
    original: str | Path | None = None,
    task: str | None = None,
    false_alarm: float | None = None,
    mesh: str = "",
    dtype: str = "float32",
) -> Detection:
    """Measures a model on disk against a reference file.

    Args:
      model, proxy, original: what `load_model` takes.
      reference: the file; it says how the models are asked.
      task: a check that the reference is of this task; None takes the reference's.
      false_alarm: see `fit_reference`.
      mesh, dtype: of the models; one device by default.

    Raises:
      FileNotFoundError: no such model or file.
      ValueError: a reference of another task, made with an original where none is given or the other way round, or
        what `fit_reference` and `features` raise.
    """
    setting, rows = detector.read_reference(reference)
    if task is not None and task != setting.task:
        raise ValueError(
            f"{reference} is of the task {setting.task!r}, not {task!r}; its numbers cannot be compared"
        )
    if setting.original != (original is not None):
        raise ValueError(
            f"{reference} was made {'with' if setting.original else 'without'} the claimed originals; "
            + ("give --original" if setting.original else "leave --original out, or make one --with_original")
        )
    fitted = detector.fit_reference(rows, false_alarm)
    problem_source = get_task(setting.task, **setting.options)
    problems = detector.reference_problems(problem_source, setting)
    devices = make_mesh(mesh) if mesh else make_mesh("data=1", devices=jax.devices()[:1])

    def ask(source: str | Path, style: str) -> tuple[Subject, detector.Texts]:
        subject = Subject(load_model(source, devices, dtype), style=style, system=setting.system)
        return subject, detector.sample_texts(subject, problem_source, problems, setting)

    suspect, own = ask(model, setting.style)
    small, of_small = ask(proxy, setting.proxy_style)
    claimed, of_claimed = (None, None) if original is None else ask(original, setting.style)
    return detector.measure(
        suspect, small, TextPair(own, of_small), fitted, original=claimed, original_texts=of_claimed
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m distill_jax.detect", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", required=True, help="the model in question: folder, .gguf file or demo model"
    )
    parser.add_argument("--proxy", required=True, help="the small reference model")
    parser.add_argument("--reference", required=True, help="reference.json of untouched models")
    parser.add_argument("--original", default=None, help="what the model is said to be")
    parser.add_argument("--task", default=None, help="checked against the reference's")
    parser.add_argument(
        "--false_alarm", type=float, default=None, help="rate at which untouched models may be flagged"
    )
    parser.add_argument("--mesh", default="", help="sizes of data, fsdp, tensor; one device by default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--json", default=None, help="also write the finding to this file; - prints it instead of words"
    )
    given = parser.parse_args(arguments)
    try:
        found = detect(
            given.model,
            given.proxy,
            given.reference,
            original=given.original,
            task=given.task,
            false_alarm=given.false_alarm,
            mesh=given.mesh,
            dtype=given.dtype,
        )
        if given.json not in (None, "-"):
            write_json(given.json, detector.to_json(found))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(detector.to_json(found), indent=2) if given.json == "-" else found.words())
    return int(found.calibrated)


if __name__ == "__main__":
    sys.exit(main())
