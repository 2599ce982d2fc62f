"""The probes' results in the summary: their numbers under each arm, and the diagnosis in sentences.

arms.<arm>.probes.<probe>   {"<kind>/<metric>": V, "<kind>/<metric>@before": V of the untrained student}
diagnosis.<arm>.<kind>      [{"probe", "name", "verdict", "sentence", "value": V, "threshold"}], see `probes.diagnosis`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.checkpoint import read_json
from distill_jax.pipeline.probe import results_path
from distill_jax.probes.diagnosis import Finding, as_text, diagnose
from distill_jax.probes.results import from_json, value_from_json, value_to_json


def summarise_probes(workdir: Path, summary: dict[str, Any]) -> None:
    """Adds what WORKDIR/probes holds to a summary; one without probes stays as it is.

    Raises:
      ValueError: a file of another version.
    """
    diagnosis: dict[str, dict[str, Any]] = {}
    for arm, part in summary["arms"].items():
        path = results_path(workdir, arm)
        if not path.exists():
            continue
        for kind, results in read_json(path).items():
            for probe, result in results.items():
                numbers = part["probes"].setdefault(probe, {})
                numbers |= {f"{kind}/{metric}": value for metric, value in result["metrics"].items()}
                numbers |= {
                    f"{kind}/{metric}@before": value for metric, value in result.get("before", {}).items()
                }
                if not result["metrics"]:
                    summary["missing"] += [
                        f"probe {probe} of {kind} students of {arm}: {n}" for n in result["notes"]
                    ]
            measured = [from_json(result) for result in results.values() if result["metrics"]]
            diagnosis.setdefault(arm, {})[kind] = [_as_json(finding) for finding in diagnose(measured)]
    if diagnosis:
        summary["diagnosis"] = diagnosis


def diagnosis_text(diagnosis: Mapping[str, Mapping[str, Any]]) -> str:
    """The diagnosis of every arm and kind of student, for a terminal: what is there; the page has the rest too."""
    lines = []
    for arm, kinds in diagnosis.items():
        for kind, findings in kinds.items():
            read = [_from_json(finding) for finding in findings]
            shown = [finding for finding in read if finding.verdict != "absent"]
            lines += ["", f"Diagnosis: {kind} students of the {arm} teacher"]
            lines += [f"  {line}" for line in as_text(shown).splitlines()]
            if len(shown) < len(read):
                names = (finding.name.replace("_", " ") for finding in read if finding.verdict == "absent")
                lines.append(f"  absent: {', '.join(names)}")
    return "\n".join(lines)


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "probe": finding.probe,
        "name": finding.name,
        "verdict": finding.verdict,
        "sentence": finding.sentence,
        "value": value_to_json(finding.value),
        "threshold": finding.threshold,
    }


def _from_json(data: Mapping[str, Any]) -> Finding:
    return Finding(**{**data, "value": value_from_json(data["value"])})
