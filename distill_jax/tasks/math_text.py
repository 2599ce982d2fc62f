"""Mathematics in words with an answer to compare: GSM8K, Big-Math, and data sets of the same form.

    get_task("math_text", dataset="gsm8k", path="data/gsm8k", shots=4)

The prompt is the question and a line that says how to end; math-verify compares what a model ends with and the
reference answer (`rewards.math_answers`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.data.sources import DataError, Row
from distill_jax.rewards.math_answers import MathVerifier
from distill_jax.tasks.base import Problem
from distill_jax.tasks.rows import Asked, RowTask

INSTRUCTION = 'Think step by step. End with "#### " and the answer.'
STOP_TEXTS = ("\nQuestion:",)
_CALCULATOR = re.compile(r"<<.*?>>")  # notes in the answers of GSM8K


class MathText(RowTask):
    """Questions with an answer that math-verify can compare.

    Args:
      path, dataset, columns, splits, pool, shots, instruction, max_prompt_bytes, data_dir: see `RowTask`. Columns:
        "question", "answer", and "working" where the way to the answer is written elsewhere.
      answer_mark: the answer is what follows this mark in its column; None takes the entry's.
      require_end: score 0 when the model did not end by itself. A base model never does.
      stop_texts: see `math_answers.final_answer`.
      seconds, workers: time of one comparison, and processes that compare.

    Attributes:
      failures: completions that could not be compared; they score 0.
    """

    name = "math_text"
    roles = ("question", "answer", "working")

    def __init__(
        self,
        path: str,
        dataset: str = "",
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
        pool: Sequence[str] | None = None,
        shots: int = 0,
        instruction: str = INSTRUCTION,
        max_prompt_bytes: int | None = None,
        data_dir: str | None = None,
        answer_mark: str | None = None,
        require_end: bool = False,
        stop_texts: Sequence[str] = STOP_TEXTS,
        seconds: float = 5.0,
        workers: int = 2,
    ) -> None:
        self._answer_mark, self.stop_texts = answer_mark, tuple(stop_texts)
        self._require_end = require_end
        self._verifier = MathVerifier(seconds, workers, stop_texts)
        super().__init__(path, dataset, columns, splits, pool, shots, instruction, max_prompt_bytes, data_dir)

    @property
    def failures(self) -> int:
        return self._verifier.failures

    def _read(self, row: Row, where: str) -> Asked:
        question, stored = self._text(row, "question", where), self._text(row, "answer", where)
        mark = self.entry.answer_mark if self._answer_mark is None else self._answer_mark
        working, found, answer = stored.rpartition(mark) if mark else ("", "", stored)
        if mark and not (found and answer.strip()):
            raise DataError(
                f"{where}: nothing follows {mark!r} in the answer {stored[:60]!r}; set answer_mark to what comes "
                "before the answer, or to '' where the column holds the answer alone"
            )
        if "working" in self.entry.columns:
            working = self._text(row, "working", where)
        answer = answer.strip()
        steps = _CALCULATOR.sub("", working).strip() or f"The answer is {answer}."
        return Asked(question, answer, f"{steps}\n#### {answer}")

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """1 when the completion's answer is the reference answer, else 0."""
        return self.score_batch([problem], [completion], [ended])[0]

    def score_batch(
        self, problems: Sequence[Problem], completions: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        """`score` of each row, several at a time."""
        read: list[Any] = [
            text if end or not self._require_end else "" for text, end in zip(completions, ended, strict=True)
        ]
        return self._verifier([problem.answer for problem in problems], read)
