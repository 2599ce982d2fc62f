"""The dial as curves: accuracy of teacher and students over its positions, and the gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from distill_jax.report.dial_table import curve_title
from distill_jax.report.plots import (
    COLOURS,
    INK,
    SIZE,
    SMALL,
    STYLE,
    Plot,
    add_legend,
    finish_plot,
    new_axes,
    percent_axis,
    slug,
    value_fields,
)

# name of the number -> (label, colour, marker, line)
LINES = {
    "teacher_greedy": ("teacher", INK, "o", "-"),
    "student_greedy": ("student, greedy", COLOURS["distillable"], "^", "-"),
    "student_sample": ("student, T = 1", COLOURS["distillable"], "^", ":"),
}
HEADERS = ("position", "number", "mean", "ci95_low", "ci95_high", "problems", "seeds")


def dial_plots(summary: Mapping[str, Any]) -> list[Plot]:
    """Two figures a curve; none where the dial has not been turned."""
    dial = summary.get("dial")
    if dial is None:
        return []
    with matplotlib.rc_context(STYLE):
        plots = [draw(dial, name) for name in dial["curves"] for draw in (accuracy_plot, gap_plot)]
    return [plot for plot in plots if plot is not None]


def accuracy_plot(dial: Mapping[str, Any], name: str) -> Plot:
    """Teacher and students over the positions; crosses on the axis where the teacher is broken."""
    figure, axes = new_axes(SIZE)
    curve, rows = dial["curves"][name], []
    for number, (label, colour, marker, line) in LINES.items():
        rows += _band(axes, curve, number, 100.0, label=label, color=colour, marker=marker, linestyle=line)
    if curve["broken"]:
        crosses: dict[str, Any] = {"color": COLOURS["undistillable"], "linestyle": "none", "clip_on": False}
        axes.plot(
            curve["broken"], [0.0] * len(curve["broken"]), marker="x", label="teacher broken", **crosses
        )
    percent_axis(axes)
    _positions(axes, dial, name, 34)
    alt = f"Accuracy of the teacher and of its students over {curve_title(dial, name)}."
    return finish_plot(figure, f"dial_{slug(name)}_accuracy", "dial", alt, HEADERS, rows)


def gap_plot(dial: Mapping[str, Any], name: str) -> Plot | None:
    """The teacher's gap over the positions; None where no text could be scored."""
    figure, axes = new_axes(SMALL)
    colour = COLOURS["undistillable"]
    rows = _band(axes, dial["curves"][name], "gap_per_byte", 1.0, color=colour, marker="v", linestyle="-")
    if not rows:
        return None
    axes.set_ylabel("gap, nats per byte")
    _positions(axes, dial, name, 6)
    alt = f"Gap of the teacher's texts over {curve_title(dial, name)}."
    return finish_plot(figure, f"dial_{slug(name)}_gap", "dial", alt, HEADERS, rows)


def _positions(axes: Axes, dial: Mapping[str, Any], name: str, pad: float) -> None:
    axes.set_xlabel("position of the dial")
    title = curve_title(dial, name)
    axes.set_title(title[:1].upper() + title[1:], loc="left", pad=pad, fontsize=8.5)
    if axes.get_legend_handles_labels()[1]:
        add_legend(axes, 2)


def _band(axes: Axes, curve: Mapping[str, Any], number: str, scale: float, **style: Any) -> list[tuple]:
    """A line with its band; returns the rows of the CSV."""
    points = [(p["position"], p[number]) for p in curve["points"] if p[number] is not None]
    if points:
        places = [place for place, _ in points]
        low, high = ([scale * value["ci95"][end] for _, value in points] for end in (0, 1))
        axes.fill_between(places, low, high, color=style["color"], alpha=0.16, linewidth=0)
        axes.plot(places, [scale * value["mean"] for _, value in points], markersize=4.5, **style)
    return [(place, number, *value_fields(value)) for place, value in points]
