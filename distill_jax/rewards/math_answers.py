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
MEMORY_BYTES = 4 << 30


def final_answer(completion: str, stop_texts: Sequence[str] = ()) -> str:
    """The part of a completion that is judged.

    Of `answer_part` (no thinking, up to the first stop text) the first line after the last mark `####`; all of it where
    there is none, where that line is a heading, or where a box comes later; then math-verify looks for the answer.
    """
    text = answer_part(completion, stop_texts).replace("\\$", "")  # an escaped sign of a currency
    working, mark, after = text.rpartition(ANSWER_MARK)
    if not mark or "\\boxed" in after:
        return text
    if not after.strip():
        return working
    line, _, rest = after.strip().partition("\n")
    return rest.strip() if rest.strip() and _HEADING.fullmatch(line.strip(" *")) else line


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
            {"answer": answer, "completion": final_answer(completion, self._stop_texts)}
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
