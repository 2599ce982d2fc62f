"""An independent oracle of the span alignment: Python sets, `bisect` and loops, one row at a time.

It shares no step with the kernel: no running maximum, no search in arrays, no segments.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Side:
    """One tokenizer's row: lists of the same length, one entry a token slot."""

    end: list[int]
    present: list[bool]
    score: list[bool]
    lp: list[float]
    origin: int = 0

    def ends(self) -> set[int]:
        return {end for end, present in zip(self.end, self.present, strict=True) if present}


@dataclasses.dataclass(frozen=True)
class SideSpans:
    """What one side has: the span of each token slot, and of each of the S spans the first slot, the tokens, the
    scored tokens, the sum of their log-probabilities and the bytes from its first token to its last.
    """

    ids: list[int]
    start: list[int]
    count: list[int]
    scored: list[int]
    logprob: list[float]
    interval: list[tuple[int, int] | None]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What `align_spans` and `span_logprobs` should say about one row."""

    num_spans: int
    valid: list[bool]
    bytes: list[int]
    teacher: SideSpans
    student: SideSpans


def expected_spans(teacher: Side, student: Side) -> Expected:
    """Aligns one row: a token is in the span of the first common border at or after its end."""
    size = min(len(teacher.end), len(student.end)) + 1
    borders = sorted(teacher.ends() & student.ends())
    sides = [_side_spans(side, borders, size) for side in (teacher, student)]
    valid = [
        k < len(borders)
        and all(side.count[k] > 0 and side.count[k] == side.scored[k] for side in sides)
        and (k > 0 or teacher.origin == student.origin)
        for k in range(size)
    ]
    begins = [max(teacher.origin, student.origin), *borders]
    widths = [end - begin for begin, end in zip(begins, borders, strict=False)]
    return Expected(len(borders), valid, widths + [0] * (size - len(borders)), *sides)


def _side_spans(side: Side, borders: Sequence[int], size: int) -> SideSpans:
    ids = [
        bisect_left(borders, end) if present else size - 1
        for end, present in zip(side.end, side.present, strict=True)
    ]
    start, count, scored = [0] * size, [0] * size, [0] * size
    logprob = [0.0] * size
    interval: list[tuple[int, int] | None] = [None] * size
    last_end = side.origin
    for slot, (k, end) in enumerate(zip(ids, side.end, strict=True)):
        if not side.present[slot]:
            continue
        if count[k] == 0:
            start[k] = slot
            interval[k] = (last_end, end)
        count[k] += 1
        if side.score[slot]:
            scored[k] += 1
            logprob[k] += side.lp[slot]
        begin, _ = interval[k] or (last_end, end)
        interval[k] = (begin, end)
        last_end = end
    return SideSpans(ids, start, count, scored, logprob, interval)
