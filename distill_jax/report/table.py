"""The results as a table of text and the claims as lines: what a terminal prints, and what the page shows too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_jax.report import words
from distill_jax.report.records import DECODINGS


def _table_rows(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(title, teacher metrics, student kind -> metrics) a row, the untrained student first."""
    attack = summary["setting"]["attack"]
    baselines = summary["baselines"]
    rows: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        (words.ARM_TITLES["base"], {}, baselines["base_student"]),
        (words.ARM_TITLES["gold"], {}, baselines["gold_sft"]),
    ]
    for arm in ("undistillable", "original", "control", "distillable"):
        part = summary["arms"][arm]
        rows.append((words.ARM_TITLES[arm], part["teacher"], part["students"].get(attack, {})))
    return rows


def accuracy_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows as text: per cent with intervals, arms by teacher and student accuracy (default budget)."""
    rows = _table_rows(summary)
    kinds = [*summary["setting"]["student_parameters"]]
    kinds += sorted({kind for _, _, students in rows for kind in students} - set(kinds))
    headers = ["trained on", "teacher, greedy", "teacher, T = 1"]
    headers += [f"{kind}, {words.DECODING_TITLES[decoding]}" for kind in kinds for decoding in DECODINGS]
    table = []
    for title, teacher, students in rows:
        line = [title, *(words.cell(teacher.get(words.metric_name(decoding))) for decoding in DECODINGS)]
        for kind in kinds:
            line += [
                words.cell(students.get(kind, {}).get(words.metric_name(decoding))) for decoding in DECODINGS
            ]
        table.append(line)
    return headers, table


def summary_table(summary: Mapping[str, Any]) -> str:
    """The end of a run for a terminal: accuracies with 95 % intervals, then the claims and what is missing."""
    headers, rows = accuracy_table(summary)
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]
    rule = "  ".join("-" * width for width in widths)
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in [headers, *rows]
    ]
    text = [
        f"Accuracy in per cent [95 % interval]; students: {summary['setting']['access']}, "
        f"{summary['setting']['samples']:,} samples, {summary['setting']['steps']:,} steps",
        lines[0].rstrip(),
        rule,
        *(line.rstrip() for line in lines[1:]),
    ]
    alignment = alignment_lines(summary)
    if alignment:
        text += ["", "Alignment of teacher and proxy", *(f"  {line}" for line in alignment)]
    if summary["claims"]:
        text += ["", "Claims"]
        text += [
            f"  {'holds         ' if claim['holds'] else 'DOES NOT HOLD '} {claim_title(claim)}: {claim_numbers(claim)}"
            for claim in summary["claims"]
        ]
    if summary["missing"]:
        text += ["", "Missing", *(f"  {sentence}" for sentence in summary["missing"])]
    return "\n".join(text)


def alignment_lines(summary: Mapping[str, Any]) -> list[str]:
    """For each calibrated arm, how much of its rollouts the calibration reward could see."""
    lines = []
    for arm, part in summary["arms"].items():
        metrics = part["teacher"]
        if "span_coverage" in metrics:
            covered, lost = (metrics.get(name, {}).get("mean") for name in ("span_coverage", "unscorable"))
            lines.append(
                f"{words.ARM_TITLES[arm]}: {words.percent(covered, 2)} of the scored bytes aligned, "
                f"{words.percent(lost, 2)} of the rollouts not scorable by the proxy"
            )
    return lines


def claim_numbers(claim: Mapping[str, Any]) -> str:
    """A claim's value and interval: '0.24 [0.20, 0.28]', or in points for a teacher's accuracy."""
    of_teacher = claim["name"].startswith("teacher_accuracy/")
    scale, form, unit = (100, "+.1f", " points") if of_teacher else (1, ".2f", "")
    value = claim["value"]
    if value["mean"] is None:
        return "undefined"
    low, high = ("?" if end is None else f"{scale * end:{form}}" for end in value["ci95"])
    return f"{scale * value['mean']:{form}}{unit} [{low}, {high}]"


_CLAIM_TITLES = {
    "teacher_accuracy": "Teacher in {} mode: at most {} point below the original",
    "students_beat_gold": "{} students: distillable mode at least {} times gold text",
    "students_beat_original": "{} students: distillable mode at least {} times the original",
    "guard_at_1x": "{} students: undistillable mode at most {} times the original, default steps",
    "guard_at_2x": "{} students: undistillable mode at most {} times the original, 2x steps",
    "guard_over_budgets": "{} students: undistillable mode at most {} times the original, all steps from 1x",
}


def claim_title(claim: Mapping[str, Any]) -> str:
    """One line for a claim, with its threshold; the statement says the rest."""
    kind, _, subject = claim["name"].partition("/")
    limit = -100 * claim["threshold"] if kind == "teacher_accuracy" else claim["threshold"]
    return _CLAIM_TITLES[kind].format(subject, f"{limit:g}")
