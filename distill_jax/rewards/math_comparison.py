"""One comparison of two mathematical answers: what the child processes of `math_answers` run.

Only they import this module: sympy and its parser take seconds to load, which must not count as the time of the
first comparison.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import sympy
from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off


_WORD = re.compile(r"(?<![\\A-Za-z])(?!sqrt\()[A-Za-z]{3,}|\\boxed")
_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)|\u221a\s*(\w+)")
_PI = re.compile(r"\u03c0|(?<![\\A-Za-z])pi(?![A-Za-z])")
_MIXED = re.compile(r"^(-?)(\d+) (\d+/\d+)$")
_BRACE = re.compile(r"[{}]")


def same_answer(answer: str, completion: str) -> float:
    """1.0 when the completion's answer is the reference answer, else 0.0.

    Raises:
      ValueError: the reference answer is not mathematics that math-verify reads.
    """
    marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    reference = parse(marked, parsing_timeout=None)  # type: ignore[arg-type]
    if not reference:
        raise ValueError(f"math-verify reads no mathematics in the reference answer {answer!r}")
    if _is_expression(completion):
        # In plain text the parser takes the last number for the answer: 2 of x^2 + 2, 4 of (3, 4).
        whole = parse(f"${_as_latex(completion.strip())}$", parsing_timeout=None)  # type: ignore[arg-type]
        if whole and verify(reference, whole, timeout_seconds=None):
            return 1.0
        if whole and _says_more_than_a_number(whole[0]):
            return 0.0
    found = parse(completion, parsing_timeout=None)  # type: ignore[arg-type]
    return float(bool(found) and verify(reference, found, timeout_seconds=None))


def _as_latex(line: str) -> str:
    """A line in which braces are those of a set, roots are written as in a program, 1 1/2 is a mixed number."""
    if "\\" not in line:
        line = _BRACE.sub(r"\\\g<0>", line)
    line = _MIXED.sub(r"\1(\2+\3)", line)
    line = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", line)
    return _PI.sub(r"\\pi ", line)


def _is_expression(text: str) -> bool:
    """One line of mathematics without words and without marks of its own."""
    line = text.strip()
    return (
        bool(line) and len(line) < 200 and "\n" not in line and "$" not in line and _WORD.search(line) is None
    )


def _says_more_than_a_number(found: Any) -> bool:
    """Several values, or a formula: no answer to a question with one number, though one stands in it."""
    several = isinstance(found, sympy.Set | sympy.Tuple | sympy.MatrixBase)
    return several or (isinstance(found, sympy.Expr) and bool(found.free_symbols))


same_answer("$\\frac{1}{2}$", "$x = 0.5$")  # builds the parser's tables
