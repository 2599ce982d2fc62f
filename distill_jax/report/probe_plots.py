"""One small figure a probe: its first number on every arm, hollow before distillation, filled after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from distill_jax.report.plots import (
    COLOURS,
    INK,
    MARKERS,
    SMALL,
    STYLE,
    Plot,
    add_legend,
    finish_plot,
    new_axes,
    slug,
    value_fields,
)
from distill_jax.report.probe_table import PANELS, Panel, panel_values, probed_kinds

HEADERS = ("arm", "student", "mean", "ci95_low", "ci95_high", "prompts", "seeds")
SHORT = {"undistillable": "undistil-\nlable", "distillable": "distil-\nlable"}


def probe_plots(summary: Mapping[str, Any]) -> list[Plot]:
    """All panels that have a figure and numbers."""
    with matplotlib.rc_context(STYLE):
        plots = [
            probe_plot(summary, panel, kind)
            for kind in probed_kinds(summary)
            for panel in PANELS
            if panel.drawn
        ]
    return [plot for plot in plots if plot is not None]


def probe_plot(summary: Mapping[str, Any], panel: Panel, kind: str) -> Plot | None:
    """One panel of one kind of student; None when no arm has the number."""
    values = panel_values(summary, panel, kind)
    if not values:
        return None
    figure, axes = new_axes(SMALL)
    rows: list[tuple] = []
    for place, (arm, pair) in enumerate(values.items()):
        for value, side, name in zip(pair, (-0.12, 0.12), ("untrained", "distilled"), strict=True):
            if value is not None:
                rows.append((arm, name, *value_fields(value)))
                _draw(
                    axes, place + side, value, arm, 100.0 if panel.share else 1.0, filled=name == "distilled"
                )
    axes.set_xticks(range(len(values)), [SHORT.get(arm, arm) for arm in values], fontsize=8)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.set_title(f"{panel.title}", loc="left", pad=20)
    ink: dict[str, Any] = {"color": INK, "linestyle": "none", "marker": "o"}
    axes.plot([], [], label="untrained", markerfacecolor="none", markeredgewidth=1.4, **ink)
    axes.plot([], [], label=f"{kind} student, distilled", **ink)
    add_legend(axes, 2)
    alt = f"{panel.title} ({panel.unit}) of {kind} students by teacher, before and after distillation."
    return finish_plot(figure, f"probe_{slug(kind)}_{panel.probe}", "probes", alt, HEADERS, rows)


def _draw(
    axes: Axes, place: float, value: Mapping[str, Any], arm: str, scale: float, *, filled: bool
) -> None:
    """A marker with its interval; an end that is unknown has no bar."""
    mean = value["mean"]
    low, high = (mean if end is None else end for end in value["ci95"])
    axes.errorbar(
        place,
        scale * mean,
        yerr=[[scale * (mean - low)], [scale * (high - mean)]],
        fmt=MARKERS[arm],
        color=COLOURS[arm],
        markerfacecolor=COLOURS[arm] if filled else "none",
        markeredgewidth=1.4,
        elinewidth=1.4,
        capsize=3,
    )
