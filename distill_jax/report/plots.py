"""The plots of the report: the knob, the curve over budgets, the training of the teachers.

Each plot is one small figure that stays readable on a phone, given three times: as SVG for the page (text as text,
ink in the page's own colour), as PNG (mid-grey ink on a transparent ground, so it reads on white and on black),
and as CSV with the numbers behind it. Colours are those of Okabe and Ito, told apart by colour-blind readers;
every arm has its own marker too.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax.report import words
from distill_jax.report.claims import GUARD
from distill_jax.report.records import ARMS, write_bytes

INK = "#767779"  # axes and text; becomes currentColor in the SVG
SIZE = (3.9, 2.9)  # inches: about as many CSS pixels as a phone is wide, so 9 pt text stays 9 pt
TALL = (3.9, 3.2)
SMALL = (3.9, 2.1)
COLOURS = {
    "base": "#8c8f94",
    "gold": "#c98a00",
    "undistillable": "#d55e00",
    "original": INK,
    "control": "#b5699b",
    "distillable": "#1c8fd1",
}
MARKERS = {
    "base": "X",
    "gold": "D",
    "undistillable": "v",
    "original": "o",
    "control": "s",
    "distillable": "^",
}
TRAINING = {
    "reward_task": "Task reward",
    "gap_per_byte": "Gap to the proxy, nats per byte",
    "kl_k3": "KL to the original, nats per token",
    "entropy": "Entropy, nats per token",
    "completion_bytes": "Length, bytes",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True)
class Plot:
    """One figure: name (of its files), group (where on the page it stands), alt text, forms and numbers."""

    name: str
    group: str
    alt: str
    svg: str
    png: bytes
    headers: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def _svg(figure: Figure, name: str, alt: str) -> str:
    """SVG to stand inside a page: no prologue, own ids, ink in currentColor, as wide as its place."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = (
        text.replace('href="#', f'href="#{name}-')
        .replace("url(#", f"url(#{name}-")
        .replace(INK, "currentColor")
    )
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    title = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def finish_plot(
    figure: Figure, name: str, group: str, alt: str, headers: Sequence[str], rows: list[tuple]
) -> Plot:
    """The figure in all its forms."""
    matplotlib.rcParams["svg.hashsalt"] = name  # the same ids, so the same file, in every run
    svg = _svg(figure, name, alt)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return Plot(name, group, alt, svg, buffer.getvalue(), tuple(headers), rows)


def new_axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of one panel; size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _student_metrics(summary: Mapping[str, Any], arm: str, student: str) -> Mapping[str, Any]:
    """Metrics of one arm's students under the headline attack; "base" and "gold" are the baselines."""
    if arm in ("base", "gold"):
        return summary["baselines"]["base_student" if arm == "base" else "gold_sft"].get(student, {})
    return summary["arms"][arm]["students"].get(summary["setting"]["attack"], {}).get(student, {})


def _students(summary: Mapping[str, Any]) -> list[str]:
    return [
        student
        for student in summary["setting"]["student_parameters"]
        if any(_student_metrics(summary, arm, student) for arm in COLOURS)
    ]


def percent_axis(axes: Axes) -> None:
    """Accuracy from 0 to 100 %."""
    axes.set_ylim(0, 104)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("accuracy, %")


def value_fields(value: Mapping[str, Any]) -> tuple[Any, ...]:
    """A value as CSV fields: mean, ci95_low, ci95_high, problems, seeds."""
    return value["mean"], *value["ci95"], value["n"], value["seeds"]


def _draw_student(
    axes: Axes, place: float, side: int, value: Mapping[str, Any], arm: str, *, filled: bool
) -> None:
    """One student's marker with its interval, `side` of its arm's place, and its seeds as dots further out."""
    colour, mean, (low, high) = COLOURS[arm], 100 * value["mean"], value["ci95"]
    seeds = [100 * seed for seed in value["seeds"] or ()]
    dots: dict[str, Any] = {"color": colour, "markersize": 4.5, "alpha": 0.8, "markeredgewidth": 0}
    axes.plot([place + 0.33 * side] * len(seeds), seeds, ".", **dots)
    axes.errorbar(
        place + 0.15 * side,
        mean,
        yerr=[[mean - 100 * low], [100 * high - mean]],
        fmt=MARKERS[arm],
        color=colour,
        markerfacecolor=colour if filled else "none",
        markeredgewidth=1.4,
        elinewidth=1.4,
        capsize=3,
    )


def knob_plot(summary: Mapping[str, Any], student: str) -> Plot:
    """Student accuracy by arm: greedy filled, T = 1 hollow, dots for seeds, a dash for the teacher itself."""
    figure, axes = new_axes(SIZE)
    rows: list[tuple] = []
    shown = [arm for arm in COLOURS if _student_metrics(summary, arm, student)]
    for place, arm in enumerate(shown):
        for decoding, side in (("greedy", -1), ("sample", 1)):
            value = _student_metrics(summary, arm, student).get(words.metric_name(decoding))
            if value is not None:
                rows.append((arm, "student", decoding, *value_fields(value)))
                _draw_student(axes, place, side, value, arm, filled=decoding == "greedy")
        teacher = summary["arms"].get(arm, {}).get("teacher", {}).get(words.metric_name("greedy"))
        if teacher is not None:
            rows.append((arm, "teacher", "greedy", *value_fields(teacher)))
            axes.hlines(100 * teacher["mean"], place - 0.36, place + 0.36, color=INK, linewidth=1.2)
    short = {
        "base": "untrained",
        "gold": "gold\ntext",
        "undistillable": "undistil-\nlable",
        "control": "control\n(η = 0)",
        "distillable": "distil-\nlable",
    }
    axes.set_xticks(range(len(shown)), [short.get(arm, arm) for arm in shown], fontsize=8)
    axes.set_xlim(-0.6, len(shown) - 0.4)
    percent_axis(axes)
    axes.set_title(f"{student} students", loc="left", pad=20)
    ink: dict[str, Any] = {"color": INK, "linestyle": "none", "marker": "o"}
    axes.plot([], [], label="greedy", **ink)
    axes.plot([], [], label="T = 1", markerfacecolor="none", markeredgewidth=1.4, **ink)
    axes.plot([], [], label="the teacher itself", color=INK, linewidth=1.2)
    add_legend(axes, 3)
    alt = f"Accuracy of {student} students by the teacher they were trained on, greedy and at temperature 1."
    headers = ("arm", "who", "decoding", "mean", "ci95_low", "ci95_high", "problems", "seeds")
    return finish_plot(figure, f"knob_{slug(student)}", "knob", alt, headers, rows)


def add_legend(axes: Axes, columns: int) -> None:
    """A legend between the title and the panel."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        frameon=False,
        borderaxespad=0.1,
        handletextpad=0.4,
        handlelength=1.5,
        columnspacing=1.0,
    )


def _curve(
    summary: Mapping[str, Any], arm: str, student: str, decoding: str
) -> list[tuple[float, Mapping[str, Any]]]:
    found = []
    for name, value in _student_metrics(summary, arm, student).items():
        parsed = words.parse_metric_name(name)
        if parsed is not None and parsed[0] == decoding:
            found.append((parsed[1], value))
    return sorted(found, key=lambda item: item[0])


def budget_plot(summary: Mapping[str, Any], student: str, decoding: str) -> Plot | None:
    """Student accuracy over the training budget, a line an arm with its band; None below two budgets."""
    curves = {arm: _curve(summary, arm, student, decoding) for arm in COLOURS if arm != "base"}
    budgets = sorted({budget for curve in curves.values() for budget, _ in curve if budget > 0})
    if len(budgets) < 2:
        return None
    figure, axes = new_axes(TALL)
    rows: list[tuple] = []
    for arm, curve in curves.items():
        curve = [(budget, value) for budget, value in curve if budget > 0]
        if not curve:
            continue
        x, means = [budget for budget, _ in curve], [100 * value["mean"] for _, value in curve]
        low, high = ([100 * value["ci95"][end] for _, value in curve] for end in (0, 1))
        axes.fill_between(x, low, high, color=COLOURS[arm], alpha=0.16, linewidth=0)
        axes.plot(x, means, marker=MARKERS[arm], color=COLOURS[arm], label=_arm_name(arm))
        rows += [(arm, budget, *value_fields(value)) for budget, value in curve]
        if arm == "original":
            axes.plot(
                x,
                [GUARD * mean for mean in means],
                ":",
                color=INK,
                linewidth=1.2,
                label=f"{GUARD:g} × original",
            )
    base = _student_metrics(summary, "base", student).get(words.metric_name(decoding))
    if base is not None:
        axes.axhline(
            100 * base["mean"], color=COLOURS["base"], linewidth=1.0, linestyle=(0, (1, 3)), label="untrained"
        )
    axes.set_xscale("log", base=2)
    steps = summary["setting"]["steps"]
    axes.set_xticks(
        budgets, [f"{words.budget_name(budget)}\n{round(steps * budget):,}" for budget in budgets]
    )
    axes.minorticks_off()
    axes.set_xlabel("budget and training steps of the student")
    percent_axis(axes)
    axes.set_title(f"{student} students, {words.DECODING_TITLES[decoding]}", loc="left", pad=44)
    add_legend(axes, 3)
    alt = f"Accuracy ({words.DECODING_TITLES[decoding]}) of {student} students over the training budget, by teacher."
    headers = ("arm", "budget", "mean", "ci95_low", "ci95_high", "problems", "seeds")
    return finish_plot(figure, f"budget_{slug(student)}_{decoding}", "budget", alt, headers, rows)


def training_plot(metrics: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> Plot | None:
    """One training metric of the calibration over its steps, a line an arm; None when no arm has it."""
    figure, axes = new_axes(SMALL)
    rows: list[tuple] = []
    for arm in ARMS:
        points = [(row["step"], row.get(key)) for row in metrics.get(arm, ())]
        points = [point for point in points if point[1] is not None and math.isfinite(point[1])]
        if points:
            every = max(1, len(points) // 8)
            style: dict[str, Any] = {
                "marker": MARKERS[arm],
                "markevery": every,
                "color": COLOURS[arm],
                "markersize": 4.5,
            }
            axes.plot(*zip(*points, strict=True), linewidth=1.5, label=_arm_name(arm), **style)
            rows += [(arm, step, number) for step, number in points]
    if not rows:
        return None
    axes.set_title(TRAINING[key], loc="left", pad=20)
    axes.set_xlabel("calibration step")
    add_legend(axes, 3)
    alt = f"{TRAINING[key]} over the steps of calibration, by arm."
    return finish_plot(figure, f"training_{key}", "training", alt, ("arm", "step", key), rows)


def _arm_name(arm: str) -> str:
    return {"gold": "gold text"}.get(arm, arm)


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)


def make_plots(summary: Mapping[str, Any], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    """All plots that the results allow.

    Args:
      summary: of schema 1. metrics: arm -> rows of its metrics.jsonl.
    """
    with matplotlib.rc_context(STYLE):
        students = _students(summary)
        plots: list[Plot | None] = [knob_plot(summary, student) for student in students]
        plots += [
            budget_plot(summary, student, decoding)
            for student in students
            for decoding in ("greedy", "sample")
        ]
        plots += [training_plot(metrics, key) for key in TRAINING]
    return [plot for plot in plots if plot is not None]


def save_plots(plots: Sequence[Plot], directory: str | Path) -> list[Path]:
    """Writes each plot as NAME.png and NAME.csv and returns the paths of the pictures."""
    paths = []
    for plot in plots:
        paths.append(write_bytes(Path(directory) / f"{plot.name}.png", plot.png))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(plot.headers)
        writer.writerows([_flat(item) for item in row] for row in plot.rows)
        write_bytes(Path(directory) / f"{plot.name}.csv", text.getvalue().encode())
    return paths


def _flat(item: Any) -> Any:
    """A CSV field: a list of seeds as '0.1 0.2'."""
    return " ".join(f"{number:g}" for number in item) if isinstance(item, list) else item
