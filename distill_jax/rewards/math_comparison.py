"""One comparison of two mathematical answers: what the child processes of `math_answers` run.

Only they import this module: sympy and its parser take seconds to load, which must not count as the time of the
first comparison.
"""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off


def same_answer(answer: str, completion: str) -> float:
    """1.0 when the completion's answer is the reference answer, else 0.0.

    Raises:
      ValueError: the reference answer is not mathematics that math-verify reads.
    """
    marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    reference = parse(marked, parsing_timeout=None)  # type: ignore[arg-type]
    if not reference:
        raise ValueError(f"math-verify reads no mathematics in the reference answer {answer!r}")
    found = parse(completion, parsing_timeout=None)  # type: ignore[arg-type]
    if not found and completion.strip() and len(completion) < 200:
        found = parse(f"${completion.strip()}$", parsing_timeout=None)  # type: ignore[arg-type]
    return float(bool(found) and verify(reference, found, timeout_seconds=None))


same_answer("$\\frac{1}{2}$", "$x = 0.5$")  # builds the parser's tables
