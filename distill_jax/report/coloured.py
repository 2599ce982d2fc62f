"""Rollouts in colour: each span tinted by how much likelier the teacher finds it than the proxy, per byte.

The scale is the page's own (`full_tint`): small models that know nothing but a style differ by tens of nats a byte,
large ones by tenths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the legend, shares of the full tint
_ROUND = (1.0, 2.0, 5.0, 10.0)
_FULL_SHARE = 0.9  # of the bytes lie below the full tint
_TINT = 62.0  # per cent of colour at most, so that text stays readable on it in light and in dark
_PLAIN = 2.0  # per cent below which a tint is none

# (first byte, end byte, log p of the teacher, log p of the proxy), nats
Span = tuple[int, int, float, float]


@dataclass(frozen=True)
class Piece:
    """A part of a text. tone: "far" (the teacher finds it likelier), "near" (the proxy does) or "" (neither, or not
    scored). tint: per cent of colour. title: the numbers in words, "" without any."""

    text: str
    tone: str = ""
    tint: float = 0.0
    title: str = ""


def read_spans(workdir: str | Path) -> dict[tuple[str, str], list[Span]]:
    """(prompt, completion) -> spans, from WORKDIR/coloured_rollouts.json; texts without any are absent.

    Raises:
      ValueError: a file that is present is broken.
    """
    path = Path(workdir) / "coloured_rollouts.json"
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            (row["prompt"], row["completion"]): [
                (int(begin), int(end), float(t), float(c)) for begin, end, t, c in row["spans"]
            ]
            for row in rows
            if row["spans"] is not None
        }
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected coloured rollouts, got {error!r}") from error


def full_tint(spans: Mapping[tuple[str, str], Sequence[Span]]) -> float:
    """Nats a byte at which the tint is full: 9 of 10 bytes lie below it; 1, 2 or 5 times a power of ten."""
    all_spans = [(abs(t - c) / (end - begin), end - begin) for own in spans.values() for begin, end, t, c in own
                 if end > begin]  # fmt: skip
    left = _FULL_SHARE * sum(width for _, width in all_spans)
    for value, width in sorted(all_spans):
        left -= width
        if left <= 0.0 and value > 0.0:
            power = 10.0 ** math.floor(math.log10(value))
            return next(step * power for step in _ROUND if step * power >= value * (1 - 1e-9))
    return 1.0


def pieces(text: str, spans: Sequence[Span] | None, full: float) -> list[Piece]:
    """The text cut at its spans, in order and complete; `full` from `full_tint`.

    Spans that end inside a character are joined to the next ones. Bytes that no span covers, and a text that the spans
    do not fit, are shown plainly.
    """
    data = text.encode()
    if not spans or any(end > len(data) or begin > end for begin, end, _, _ in spans):
        return [Piece(text)] if text else []
    found: list[Piece] = []
    place = 0
    for begin, end, teacher, proxy in _whole_characters(data, spans):
        if begin > place:
            found.append(Piece(data[place:begin].decode(errors="replace")))
        if end > begin:
            found.append(_piece(data[begin:end], teacher, proxy, full))
        place = max(place, end)
    if place < len(data):
        found.append(Piece(data[place:].decode(errors="replace")))
    return found


def _whole_characters(data: bytes, spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for begin, end, teacher, proxy in spans:
        if joined and begin == joined[-1][1] and _inside_character(data, begin):
            first, _, before_t, before_c = joined.pop()
            begin, teacher, proxy = first, before_t + teacher, before_c + proxy
        joined.append((begin, end, teacher, proxy))
    return joined


def _inside_character(data: bytes, place: int) -> bool:
    return place < len(data) and data[place] & 0b1100_0000 == 0b1000_0000


def _piece(data: bytes, teacher: float, proxy: float, full: float) -> Piece:
    ratio = teacher - proxy
    tone, tint = tint_of(ratio / len(data), full)
    title = f"{ratio:+.2f} nats: teacher {teacher:.2f}, proxy {proxy:.2f}"
    return Piece(data.decode(errors="replace"), tone, tint, title)


def tint_of(per_byte: float, full: float) -> tuple[str, float]:
    """(tone, per cent of colour) of nats a byte."""
    tint = _TINT * min(1.0, abs(per_byte) / full)
    if tint < _PLAIN:
        return "", 0.0
    return ("far" if per_byte > 0 else "near"), tint


def legend(full: float) -> list[Piece]:
    """One swatch a step, from what the proxy finds likelier to what the teacher does."""
    swatches = []
    for step in _STEPS:
        tone, tint = tint_of(full * step, full)
        sign = "≤ " if step == _STEPS[0] else "≥ " if step == _STEPS[-1] else ""
        swatches.append(Piece(f"{sign}{full * step:+g}" if step else "0", tone, tint))
    return swatches
