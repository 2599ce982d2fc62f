"""Numbers and names in words: shared by the claims, the terminal table and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ARM_TITLES = {
    "base": "untrained student",
    "gold": "gold text",
    "undistillable": "undistillable mode",
    "original": "original",
    "control": "control (eta = 0)",
    "distillable": "distillable mode",
}
DECODING_TITLES = {"greedy": "greedy", "sample": "T = 1"}


def percent(share: float | None, digits: int = 1) -> str:
    """0.956 -> '95.6 %'."""
    return "undefined" if share is None else f"{100 * share:.{digits}f} %"


def points(share: float | None, digits: int = 1) -> str:
    """0.003 -> '+0.3 points'."""
    return "undefined" if share is None else f"{100 * share:+.{digits}f} points"


def interval(ends: Sequence[float | None], scale: float = 1.0, digits: int = 2, signed: bool = False) -> str:
    """[1.4, 1.71] -> '1.40 to 1.71'; an unbounded end is said in words."""
    sign = "+" if signed else ""
    low, high = ends
    if low is None and high is None:
        return "undefined"
    first = "unbounded" if low is None else f"{scale * low:{sign}.{digits}f}"
    second = "unbounded" if high is None else f"{scale * high:{sign}.{digits}f}"
    return f"{first} to {second}"


def cell(value: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A table cell in per cent: '95.6 [93.1, 97.4]'; '-' where there is no value."""
    if value is None or value["mean"] is None:
        return "-"
    low, high = ("?" if end is None else f"{100 * end:.{digits}f}" for end in value["ci95"])
    return f"{100 * value['mean']:.{digits}f} [{low}, {high}]"


def budget_name(budget: float) -> str:
    """2.0 -> '2x'."""
    return f"{budget:g}x"


def metric_name(decoding: str, budget: float = 1.0) -> str:
    """Name of a student's accuracy in the summary: 'accuracy_greedy', 'accuracy_greedy@2x'."""
    return f"accuracy_{decoding}" + ("" if budget == 1.0 else f"@{budget_name(budget)}")


def parse_metric_name(name: str) -> tuple[str, float] | None:
    """Inverse of `metric_name`: (decoding, budget), or None for another metric."""
    if not name.startswith("accuracy_"):
        return None
    decoding, _, budget = name.removeprefix("accuracy_").partition("@")
    return decoding, float(budget.removesuffix("x")) if budget else 1.0


def seconds(duration: float) -> str:
    """754.2 -> '12 min 34 s'."""
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def enumeration(parts: Sequence[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
