"""The run's own students as an attack: how much of what the original's students gain do those of another teacher gain?

Plain training on a teacher's texts is the weakest attack there is. Every run has it, at every budget, so its recovered
gap (see `report.attack_statistics`) stands in the report even where the attack suite has not been run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.report import words
from distill_jax.report.attack_statistics import recovered_gap
from distill_jax.report.attack_table import gap_text, shade
from distill_jax.report.records import ARMS, BASELINES, DECODINGS, Results
from distill_jax.report.statistics import Value

CLEAN = "original"
ATTACKED = tuple(arm for arm in ARMS if arm != CLEAN)


def recovered_gaps(
    results: Results, attack: str, kinds: Sequence[str], draw: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Value]]]:
    """student -> metric (decoding and budget) -> arm -> recovered gap, from students that answered the same problems.

    Args:
      results: of the WORKDIR.
      attack: how the run's students were trained.
      kinds: of student.
      draw: resamples and seed of the bootstrap.
    """
    found: dict[str, dict[str, dict[str, Value]]] = {}
    for kind in kinds:
        untrained = {
            decoding: cell
            for (_, decoding), cell in results.students.get((*BASELINES["base_student"], kind), {}).items()
        }
        clean = results.students.get((CLEAN, attack, kind), {})
        for (budget, decoding), cell in sorted(clean.items()):
            base = untrained.get(decoding)
            if base is None or base.problems != cell.problems:
                continue
            for arm in ATTACKED:
                attacked = results.students.get((arm, attack, kind), {}).get((budget, decoding))
                if attacked is not None and attacked.problems == cell.problems:
                    value = recovered_gap(attacked.correct, cell.correct, base.correct[:1], **draw)
                    found.setdefault(kind, {}).setdefault(words.metric_name(decoding, budget), {})[arm] = (
                        value
                    )
    return found


def recovered_tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each kind of student the table that the page shows: {"kind", "headers", "rows"}.

    A row is a budget and a decoding; a cell is (text, shade in [0, 1] or None). Empty where the attack suite has been
    run, which says more.
    """
    if "attacks" in summary:
        return []
    tables = []
    for kind, metrics in summary.get("recovered", {}).items():
        arms = [arm for arm in ATTACKED if any(arm in values for values in metrics.values())]
        original = summary["arms"][CLEAN]["students"][summary["setting"]["attack"]][kind]
        rows = []
        for decoding in DECODINGS:
            named = [(words.parse_metric_name(name), name) for name in metrics]
            of_decoding = sorted(
                (parsed[1], name) for parsed, name in named if parsed and parsed[0] == decoding
            )
            for budget, name in of_decoding:
                title = f"{words.budget_name(budget)}, {words.DECODING_TITLES[decoding]}"
                cells: list[tuple[str, float | None]] = [
                    (title, None),
                    (words.cell(original.get(name)), None),
                ]
                for arm in arms:
                    value = metrics[name].get(arm)
                    cells.append((gap_text(value), shade(value)))
                rows.append(cells)
        headers = ["steps", f"{words.ARM_TITLES[CLEAN]}, accuracy", *(words.ARM_TITLES[arm] for arm in arms)]
        tables.append({"kind": kind, "headers": headers, "rows": rows})
    return tables
