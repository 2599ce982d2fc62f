"""Are two mathematical answers the same? The package math-verify decides, in child processes.

It parses LaTeX and plain expressions (boxed answers first, then what follows "the answer is", then the last
expression) and compares them with sympy, so 1/2, 0.5, $\\frac{1}{2}$ and 50% are one answer. Its own time limit
is a signal, which works in the main thread alone, and sympy can be made to compute for ever or to fill the
memory by what a model writes; so both limits are those of `functions.LimitedFunction` here. What the children
run is in `math_comparison`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from distill_jax.rewards.answer_part import answer_part
from distill_jax.rewards.functions import LimitedFunction

ANSWER_MARK = "####"
# The mark is a heading in Markdown: words alone, or the number of a step.
_HEADING = re.compile(r"(?:[A-Za-z][A-Za-z ,'-]{2,}|(?:step|part|case)\b.*):?", re.IGNORECASE)
# A number, and after it words: a unit, an explanation.
_NUMBER = r"[-+]?[$\u20ac\u00a3]?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?"
_WITH_WORDS = re.compile(
    rf"\s*({_NUMBER})\s*%?\s*(?:\([^()]*[A-Za-z]|(?!(?:or|and|to|pi|sqrt|sin|cos|tan|log|ln|exp|[xyzn])\b)[A-Za-z])"
)
_PLAIN_NUMBER = re.compile(rf"\s*\$?{_NUMBER}\$?\s*")
# What may stand between two boxes that are parts of one answer.
_JOINED = re.compile(r"(?:[\s,;$]|\\[()\[\]]|\band\b|\bor\b|\\quad|\\text\s*\{[^{}]*\})*")
_BOXED = "\\boxed"
MEMORY_BYTES = 4 << 30


def final_answer(completion: str, stop_texts: Sequence[str] = (), answer: str = "") -> str:
    """The part of a completion that is judged; math-verify looks for the answer in it.

    Of `answer_part` (no thinking, up to the first stop text) the first line after the last mark `####`; all of it where
    there is none, where that line is a heading, or where a box comes later. Of boxes that are not parts of one answer
    the last.

    Args:
      answer: the reference. Where it is a number, the line's number is judged without the words behind it
        (`18 dollars a week for 4 weeks`), in which math-verify would find another.
    """
    text = answer_part(completion, stop_texts).replace("\\$", "")  # an escaped sign of a currency
    working, mark, after = text.rpartition(ANSWER_MARK)
    if not mark or _BOXED in after:
        return _last_box(text)
    if not after.strip():
        return working
    line, _, rest = after.strip().partition("\n")
    if rest.strip() and _HEADING.fullmatch(line.strip(" *")):
        return rest.strip()
    words = _WITH_WORDS.match(line) if _PLAIN_NUMBER.fullmatch(answer) else None
    return words[1] if words else line


def _last_box(text: str) -> str:
    """The text from its last box on, and the boxes right before that: a model that corrects itself writes several."""
    start = text.rfind(_BOXED)
    while (before := text.rfind(_BOXED, 0, max(start, 0))) >= 0:
        end = _closing(text, before)
        if not _JOINED.fullmatch(text, end, start):
            return text[start:]
        start = before
    return text


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the first one after `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if text[place] == "}" and depth == 0:
            return place + 1
    return len(text)


class MathVerifier:
    """Compares answers of many completions, each under the same time limit.

    Args:
      seconds: of one comparison.
      workers: processes.
      stop_texts: see `final_answer`.

    Attributes:
      failures: completions that could not be judged; each counts as wrong.
    """

    def __init__(self, seconds: float = 5.0, workers: int = 2, stop_texts: Sequence[str] = ()) -> None:
        self.failures = 0
        self._stop_texts = tuple(stop_texts)
        self._limits = (float(seconds), workers)

    def __call__(self, answers: Sequence[str], completions: Sequence[str]) -> list[float]:
        """1.0 or 0.0 for each pair of a reference answer and a completion."""
        calls = [
            {"answer": answer, "completion": final_answer(completion, self._stop_texts, answer)}
            for answer, completion in zip(answers, completions, strict=True)
        ]
        # What says nothing, or the same words, needs no parser.
        easy = [_judge_plainly(**call) for call in calls]
        hard = [call for call, known in zip(calls, easy, strict=True) if known is None]
        values = _comparer(*self._limits)(hard) if hard else []
        self.failures += values.count(None)
        judged = iter(values)
        return [(next(judged) or 0.0) if known is None else known for known in easy]


@functools.lru_cache(maxsize=2)
def _comparer(seconds: float, workers: int) -> LimitedFunction:
    """Shared by all verifiers with these limits: its processes take seconds to start."""
    path, names = "distill_jax.rewards.math_comparison:same_answer", ("answer", "completion")
    return LimitedFunction(path, names, seconds=seconds, workers=workers, memory_bytes=MEMORY_BYTES)


def _judge_plainly(answer: str, completion: str) -> float | None:
    if not completion.strip():
        return 0.0
    return 1.0 if completion.strip() == answer.strip() else None
