"""What an attacker can do while it makes training texts: the only door from an attack to models and tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A completion to train on.

    Attributes:
      prompt, completion: the question, and what stands under it.
      ended: the completion was closed by the model itself.
      problem: index of the training problem, -1 for a clean text of another.
      asked: the prompt that the teacher was really given, where that is another one (a control's teacher); "" else.
    """

    prompt: str
    completion: str
    ended: bool
    problem: int
    asked: str = ""


@dataclasses.dataclass(frozen=True)
class Query:
    """How the teacher is asked.

    Attributes:
      sample: which of several independent answers to the same problem.
      part: which block of training problems, each as large as the run's samples.
      temperature: multiple of the run's own.
      system: text before the question, where the teacher's prompt style has a place for one.
      weights: "released"; with the weights in hand, "dial=S" multiplies a calibrated teacher's adapter by S, and
        "retrained=N" first trains the teacher on N clean texts.
    """

    sample: int = 0
    part: int = 0
    temperature: float = 1.0
    system: str | None = None
    weights: str = "released"

    def __post_init__(self) -> None:
        if self.sample < 0 or self.part < 0 or self.temperature <= 0:
            raise ValueError(
                f"query: sample and part count from 0 and the temperature is positive, got {self}"
            )
        kind, _, number = self.weights.partition("=")
        try:
            known = self.weights == "released" or (kind in ("dial", "retrained") and float(number) != 0)
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"query: weights must be 'released', 'dial=S' or 'retrained=N', got {self.weights!r}"
            )


class Tools(Protocol):
    """One arm's teacher, one kind of student (untrained), one student seed.

    Attributes:
      answer_mark: what stands before the final answer in a completion of the task.
    """

    answer_mark: str

    def ask(self, query: Query) -> list[Text]:
        """One completion of the teacher for every training problem of the query's block."""
        ...

    def gold(self, part: int = 0) -> list[Text]:
        """The task's own completions of a block of problems."""
        ...

    def holdout(self, count: int) -> list[Text]:
        """Clean texts that are neither training nor test problems."""
        ...

    def own(self, texts: Sequence[Text], samples: int, seed: int) -> list[Text]:
        """`samples` completions of the untrained student for the problem of every text, in that order."""
        ...

    def verified(self, texts: Sequence[Text]) -> np.ndarray:
        """bool[N]: the verifier calls the completion right."""
        ...

    def nats_per_byte(self, texts: Sequence[Text]) -> np.ndarray:
        """f64[N]: -log p(completion) / bytes under the untrained student; infinite where it cannot be scored."""
        ...

    def gain(self, texts: Sequence[Text], holdout: Sequence[Text]) -> np.ndarray:
        """f64[N]: how fast a text's mean token log-likelihood grows along the unit gradient of the holdout's; 0 where a
        text cannot be scored."""
        ...

    def rewrite(self, texts: Sequence[Text]) -> list[Text]:
        """The same texts in the words of another model."""
        ...


def final_answer(completion: str, mark: str) -> str | None:
    """What stands after the only `mark` of a completion, to the end of its line; None where there is none."""
    parts = completion.split(mark)
    lines = parts[1].strip().splitlines() if len(parts) == 2 else []
    return lines[0].strip() if lines else None
