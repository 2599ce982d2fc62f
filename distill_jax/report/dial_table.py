"""The dial in words and as a table: what it promises, where it keeps it, and where the teacher breaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_jax.report import words

HEADERS = (
    "position",
    "teacher, greedy",
    "teacher, T = 1",
    "gap, nats per byte",
    "bytes",
    "how it writes",
    "student, greedy",
    "student, T = 1",
)


def curve_title(dial: Mapping[str, Any], name: str) -> str:
    """'the scale of the distillable adapter'."""
    if name == dial["arm"]:
        return f"the scale of the {name} adapter"
    return f"from the {dial['other']} (0) to the {dial['arm']} adapter (1)"


def dial_sentences(dial: Mapping[str, Any], name: str) -> list[str]:
    """What a curve shows, and what it does not."""
    curve = dial["curves"][name]
    return [_order(curve), _teacher(dial, curve), *_untrained(curve), _caveat(dial)]


def _order(curve: Mapping[str, Any]) -> str:
    way, against = ("up", "falls") if curve["direction"] > 0 else ("down", "rises")
    with_it = curve["rises" if curve["direction"] > 0 else "falls"]
    pairs = curve["pairs"]
    if not pairs:
        return "Fewer than two positions have students, so nothing can be said about the order."
    if not with_it and not curve[against]:
        return f"No two positions can be told apart by their students ({pairs} compared): the dial shows no effect."
    if curve["monotone"]:
        return (
            f"No reversal seen: student accuracy goes {way} with the dial in {with_it} of {pairs} pairs of "
            "positions beyond the 95 % interval, and against it in none. Positions that cannot be told "
            "apart may still be in any order."
        )
    low, high = curve["stretch"] or ("?", "?")
    return (
        f"It reverses: student accuracy goes {way} with the dial in {with_it} of {pairs} pairs of positions beyond "
        f"the 95 % interval, and against it in {curve[against]}. The longest stretch without such a pair is "
        f"from {_position(low)} to {_position(high)}."
    )


def _teacher(dial: Mapping[str, Any], curve: Mapping[str, Any]) -> str:
    floor = f"{100 * dial['floor']:g} point{'' if dial['floor'] == 0.01 else 's'}"
    if not curve["broken"]:
        return f"The teacher loses at most {floor} against position 0 everywhere."
    losses = {point["position"]: point["loss"] for point in curve["points"]}
    # A few problems of some hundred are within the interval: a loss there may be none.
    sure = [position for position in curve["broken"] if losses[position]["ci95"][1] < -dial["floor"]]
    unsure = [position for position in curve["broken"] if position not in sure]

    def places(positions: list[float]) -> str:
        return words.enumeration(
            [
                f"{_position(position)} ({words.points(losses[position]['mean'])}, "
                f"{words.interval(losses[position]['ci95'], 100, 1, signed=True)})"
                for position in positions
            ]
        )

    against = f"by more than {floor} of greedy accuracy against position 0"
    sentences = []
    if sure:
        sentences.append(
            f"The teacher breaks, {against}, at {places(sure)}: what students learn there is no longer what the "
            "original teacher knows."
        )
    if unsure:
        sentences.append(f"It may break, {against}, at {places(unsure)}: the interval reaches above that.")
    return " ".join(sentences)


def _untrained(curve: Mapping[str, Any]) -> list[str]:
    return [
        f"At {_position(point['position'])} no student was trained: {point['why_not']}."
        for point in curve["points"]
        if point["why_not"]
    ]


def _caveat(dial: Mapping[str, Any]) -> str:
    setting = f"{dial['samples']:,} samples, {dial['steps']:,} steps, {dial['problems']:,} test problems"
    if dial["seeds"] == 1:
        return (
            f"One {dial['kind']} student a position ({setting}): the intervals are over problems and do not hold the "
            "luck of a training run."
        )
    return f"{dial['seeds']} {dial['kind']} students a position ({setting})."


def _position(position: float | str) -> str:
    return position if isinstance(position, str) else f"{position:g}"


def dial_rows(dial: Mapping[str, Any], name: str) -> list[list[str]]:
    """One row a position, in the columns of `HEADERS`."""
    rows = []
    for point in dial["curves"][name]["points"]:
        gap = point["gap_per_byte"]
        styles = sorted(point["styles"].items(), key=lambda item: -item[1]["mean"])
        rows.append(
            [
                _position(point["position"]),
                words.cell(point["teacher_greedy"]),
                words.cell(point["teacher_sample"]),
                "-" if gap is None else f"{gap['mean']:+.2f} ({words.interval(gap['ci95'], signed=True)})",
                f"{point['completion_bytes']['mean']:.0f}",
                ", ".join(f"{style} {words.percent(share['mean'], 0)}" for style, share in styles) or "-",
                words.cell(point["student_greedy"]),
                words.cell(point["student_sample"]),
            ]
        )
    return rows


def dial_text(dial: Mapping[str, Any]) -> str:
    """Every curve for a terminal."""
    lines = []
    for name in dial["curves"]:
        rows = [list(HEADERS), *dial_rows(dial, name)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
        lines += ["", f"The dial: {curve_title(dial, name)}"]
        lines += [
            "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [f"  {sentence}" for sentence in dial_sentences(dial, name)]
    return "\n".join(lines)


def page_view(dial: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each curve as the page shows it."""
    return [
        {
            "name": name,
            "title": curve_title(dial, name),
            "sentences": dial_sentences(dial, name),
            "headers": HEADERS,
            "rows": dial_rows(dial, name),
        }
        for name in dial["curves"]
    ]
