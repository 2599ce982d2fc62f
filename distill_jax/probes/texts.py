"""What is put before the models: questions with completions, and what is known about each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distill_jax.text.token_ids import TokenIds

if TYPE_CHECKING:
    from distill_jax.generation import Rollouts


@dataclasses.dataclass(frozen=True)
class Texts:
    """N completions. Rows with the same question are one prompt: what is resampled for the intervals.

    Attributes:
      questions: the task's question of each row (`Problem.prompt`), before any prompt style.
      completions: the text of each answer, special tokens left out; may be empty.
      ended: bool[N], whether the model closed it itself; then the end of sequence counts as one more token.
      correct: bool[N], what the task's verifier says. None: not judged.
      answers: the answer read out of each completion, None where there is none to read. None: not read.
      answer_starts: i64[N], byte of the completion at which the answer begins, -1 where it has none. None: the
        whole completion is the answer.
      ids: sampled token ids of each completion, end of sequence included. A model of their vocabulary scores
        them as they were sampled; without them, and in other vocabularies, the text is encoded.

    Raises:
      ValueError: no rows, or a column of another length.
    """

    questions: tuple[str, ...]
    completions: tuple[str, ...]
    ended: np.ndarray
    correct: np.ndarray | None = None
    answers: tuple[str | None, ...] | None = None
    answer_starts: np.ndarray | None = None
    ids: tuple[TokenIds, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.questions, str) or isinstance(self.completions, str):
            raise ValueError("questions and completions are lists of texts, one a row; got one text")
        if not len(self.questions):
            raise ValueError("texts has no rows; give at least one question with a completion")
        set_ = object.__setattr__  # frozen: columns are normalised once, here
        set_(self, "questions", tuple(self.questions))
        set_(self, "completions", tuple(self.completions))
        if self.correct is not None and not np.isin(verdicts := np.asarray(self.correct), (0, 1)).all():
            wrong = verdicts[~np.isin(verdicts, (0, 1))][0]
            raise ValueError(
                f"texts.correct holds {wrong!r}; expected a verdict of 0 or 1 (or False, True) a row: compare a reward "
                "with what counts as right first"
            )
        for name, kind in (("ended", bool), ("correct", bool), ("answer_starts", np.int64)):
            column = getattr(self, name)
            set_(self, name, None if column is None else np.asarray(column).astype(kind))
        for name in ("answers", "ids"):
            column = getattr(self, name)
            set_(self, name, None if column is None else tuple(column))
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            if column is not None and len(column) != len(self):
                raise ValueError(
                    f"texts.{field.name} has {len(column)} rows, but there are {len(self)} questions; expected one "
                    "a row"
                )

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def bytes(self) -> np.ndarray:
        """i64[N]: UTF-8 bytes of each completion."""
        return np.array([len(text.encode()) for text in self.completions], np.int64)


@dataclasses.dataclass(frozen=True)
class TextPair:
    """What the teacher and what the student wrote about the same questions.

    Raises:
      ValueError: questions that only one of them was asked; prompts could not be paired then.
    """

    teacher: Texts
    student: Texts

    def __post_init__(self) -> None:
        check_same_questions(self.teacher, self.student, "the teacher's texts", "the student's texts")


def check_same_questions(first: Texts, second: Texts, first_name: str, second_name: str) -> None:
    """Raises ValueError, with an example, unless both answer the same set of questions."""
    only_first, only_second = (
        set(first.questions) - set(second.questions),
        set(second.questions) - set(first.questions),
    )
    if only_first or only_second:
        example, owner = (min(only_first), first_name) if only_first else (min(only_second), second_name)
        raise ValueError(
            f"{first_name} and {second_name} must answer the same questions, since the numbers are paired by prompt; "
            f"{len(only_first)} questions are only in {first_name}, {len(only_second)} only in {second_name} "
            f"(such as {example[:60]!r}, only in {owner}). Sample both on one list of problems of one task"
        )


def prompt_index(*batches: Texts) -> tuple[list[np.ndarray], int]:
    """Numbers the prompts of some batches together: ([i64[N] a batch], how many there are).

    The numbers follow the questions in sorted order, so neither the order of rows nor of batches changes a draw.
    """
    distinct = sorted({question for texts in batches for question in texts.questions})
    place = {question: index for index, question in enumerate(distinct)}
    return [np.array([place[q] for q in texts.questions], np.int64) for texts in batches], len(distinct)


def from_rollouts(questions: Sequence[str], rollouts: Rollouts, **columns: Any) -> Texts:
    """`Texts` of what `generation.generate` returned.

    Args:
      questions: one for each prompt that was given to `generate`; sample g of question q is row q * G + g.
      columns: `correct`, `answers`, `answer_starts`, one a row.

    Raises:
      ValueError: another number of questions than prompts.
    """
    if len(questions) * rollouts.num_samples != len(rollouts.texts):
        raise ValueError(
            f"got {len(questions)} questions for {len(rollouts.texts)} completions with {rollouts.num_samples} a prompt"
        )
    repeated = tuple(question for question in questions for _ in range(rollouts.num_samples))
    return Texts(repeated, rollouts.texts, rollouts.ended, ids=rollouts.completion_ids, **columns)


def answer_starts_after(completions: Sequence[str], mark: str) -> np.ndarray:
    """i64[N]: the byte behind the last `mark` and the white space after it; -1 without a mark or an answer."""
    starts = []
    for text in completions:
        head, found, answer = text.rpartition(mark)
        blank = len(answer) - len(answer.lstrip())
        starts.append(len((head + mark + answer[:blank]).encode()) if found and answer.strip() else -1)
    return np.array(starts, np.int64)
