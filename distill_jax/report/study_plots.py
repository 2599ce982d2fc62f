"""The study as scatter plots: for each probe the number that goes best with the students' accuracy, a dot a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib

from distill_jax.report.plots import (
    COLOURS,
    MARKERS,
    SMALL,
    STYLE,
    Plot,
    add_legend,
    finish_plot,
    new_axes,
    percent_axis,
    slug,
)
from distill_jax.report.study_table import best_of_probes

HEADERS = ("teacher", "source", "mode", "eta", "seed", "position", "value", "student_accuracy")


def study_plots(summary: Mapping[str, Any]) -> list[Plot]:
    """One figure a probe, of the forecasts; none where there is no study, or nothing to correlate."""
    study = summary.get("study")
    if study is None:
        return []
    with matplotlib.rc_context(STYLE):
        return [study_plot(study, probe, number) for probe, number in best_of_probes(study, "before").items()]


def study_plot(study: Mapping[str, Any], probe: str, number: Mapping[str, Any]) -> Plot:
    """One number against the students' greedy accuracy; hollow where the dial was turned."""
    figure, axes = new_axes(SMALL)
    teachers = {teacher["name"]: teacher for teacher in study["teachers"]}
    rows: list[tuple] = []
    named = set()
    for name, value in number["points"].items():
        teacher = teachers[name]
        mode, accuracy, turned = teacher["mode"], teacher["student"]["mean"], teacher["source"] == "dial"
        axes.plot(
            value,
            100 * accuracy,
            MARKERS[mode],
            color=COLOURS[mode],
            markerfacecolor="none" if turned else COLOURS[mode],
            markeredgewidth=1.4,
            label=None if mode in named or turned else mode,
        )
        if not turned:
            named.add(mode)
        facts = (teacher[key] for key in ("source", "mode", "eta", "seed", "position"))
        rows.append((name, *facts, value, accuracy))
    percent_axis(axes)
    axes.set_ylabel("student accuracy, %", fontsize=8)
    axes.set_xlabel(number["name"])
    title = "the teacher by itself" if probe == "teacher" else probe.replace("_", " ")
    axes.set_title(f"{title.capitalize()}, ρ = {number['rho']:+.2f}", loc="left", pad=34)
    if named:
        add_legend(axes, 2)
    alt = f"Student accuracy over {number['name']} ({title}), a mark a teacher; rank correlation {number['rho']:+.2f}."
    return finish_plot(figure, f"study_{slug(probe)}", "study", alt, HEADERS, rows)
