"""Rewards for how a completion is written: its length and its form."""

from __future__ import annotations

import re

import numpy as np

FORMS = {
    # Working, and the answer alone on a last line behind the mark that the tasks here ask for.
    "marked": r"\s*\S.*\n?####[ \t]*\S[^\n#]*\s*",
    "boxed": r".*\\boxed\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*",
    "think": r"\s*<think>.*\S.*</think>\s*\S(?:(?!</?think>).)*",
}


def length_reward(lengths: np.ndarray, soft: int, hard: int) -> np.ndarray:
    """1 up to `soft` bytes, 0 from `hard` bytes on, a straight line between.

    Source: the soft punishment of overlong answers of DAPO, arXiv 2503.14476, eq. 13, moved from [-1, 0] to [0, 1].

    Args:
      lengths: [B] bytes.
      soft, hard: bytes, 0 <= soft < hard.

    Returns:
      f32[B].

    Raises:
      ValueError: soft and hard in another order.
    """
    if not 0 <= soft < hard:
        raise ValueError(f"a length reward needs 0 <= soft < hard, got soft={soft} and hard={hard}")
    return np.clip((hard - np.asarray(lengths, np.float32)) / (hard - soft), 0.0, 1.0)


def form_pattern(source: str) -> str:
    """The pattern of a named form of `FORMS`, or `source` itself.

    Raises:
      ValueError: `source` is empty or no regular expression.
    """
    pattern = FORMS.get(source, source)
    if not pattern:
        raise ValueError(f"a form is one of {', '.join(FORMS)} or a regular expression; got nothing")
    try:
        re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"{source!r} is neither one of {', '.join(FORMS)} nor a regular expression: {error}"
        ) from error
    return pattern


def matches(pattern: str, completion: str) -> float:
    """1.0 when the whole completion matches. Runs in a child process: a pattern may take for ever."""
    return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)
