"""Questions with options: CommonsenseQA, MMLU-Pro, SuperGPQA, and data sets of the same form.

    get_task("multiple_choice", dataset="mmlu_pro", path="data/mmlu_pro")

The prompt is the question, the options with their letters, and a line that says how to answer. Which option a
completion chose is read in the forms that models use (`rewards.choices`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.data.sources import DataError, Row
from distill_jax.rewards.choices import LETTERS, extract_choice
from distill_jax.tasks.base import Problem
from distill_jax.tasks.rows import Asked, RowTask, column

INSTRUCTION = 'End with "Answer: " and the letter of the right option.'
STOP_TEXTS = ("\nQuestion:",)


class MultipleChoice(RowTask):
    """Questions with one right option.

    Args:
      path, dataset, columns, splits, pool, shots, instruction, max_prompt_bytes, data_dir: see `RowTask`. Columns:
        "question"; "choices", a list of texts; "answer", the right one's number from 0, its letter or its text;
        "labels", where the answer names one of them.
      require_end: score 0 when the model did not end by itself. A base model never does.
      stop_texts: see `choices.extract_choice`.
    """

    name = "multiple_choice"
    failures = 0  # reading a choice cannot fail
    roles = ("question", "choices", "labels", "answer")
    required = ("question", "choices", "answer")

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
        require_end: bool = False,
        stop_texts: Sequence[str] = STOP_TEXTS,
    ) -> None:
        self._require_end, self.stop_texts = require_end, tuple(stop_texts)
        super().__init__(path, dataset, columns, splits, pool, shots, instruction, max_prompt_bytes, data_dir)

    def _read(self, row: Row, where: str) -> Asked:
        name = self.entry.columns["choices"]
        choices = column(row, name, where)
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise DataError(f"{where}: the column {name!r} should list 2 to 26 options, got {choices!r:.60}")
        options = [str(c["text"] if isinstance(c, Mapping) else c).strip() for c in choices]
        labels = list(LETTERS[: len(options)])
        named = "labels" in self.entry.columns
        if named:
            labels = [str(label).strip() for label in column(row, self.entry.columns["labels"], where)]
            if len(labels) != len(options):
                raise DataError(
                    f"{where}: {len(labels)} labels for {len(options)} options; expected one for each"
                )
        answer = column(row, self.entry.columns["answer"], where)
        right = self._right(answer, options, labels, named, where)
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
        question = "\n".join([self._text(row, "question", where), *lines])
        return Asked(
            question, LETTERS[right], f"Answer: {LETTERS[right]}", {"options": options, "right": right}
        )

    def _right(self, answer: Any, options: list[str], labels: list[str], named: bool, where: str) -> int:
        # A number is a place only where the options have no labels of their own, which may be numbers.
        if (
            not named
            and isinstance(answer, int)
            and not isinstance(answer, bool)
            and 0 <= answer < len(options)
        ):
            return answer
        text = str(answer).strip()
        for names in (labels, options):
            if text in names:
                return names.index(text)
        raise DataError(
            f"{where}: the answer {answer!r:.60} is neither a number below {len(options)} nor one of {labels} or of "
            f"the options {options!r:.200}"
        )

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """1 when the completion chose the right option, else 0."""
        if self._require_end and not ended:
            return 0.0
        chosen = extract_choice(completion, problem.metadata["options"], self.stop_texts)
        return float(chosen == problem.metadata["right"])
