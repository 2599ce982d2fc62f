"""An attacker without any model: the teacher writes what a function says, the student likes short texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from distill_jax.attacks.tools import Query, Text

PROBLEMS = 12


def right_answer(problem: int) -> str:
    return str(problem % 10)


def says_the_answer(problem: int, query: Query) -> str:
    return f"{problem}+0={right_answer(problem)} #### {right_answer(problem)}"


class FakeTools:
    """`attacks.tools.Tools` over PROBLEMS problems; `asked` collects the queries."""

    answer_mark = "####"

    def __init__(self, teacher: Callable[[int, Query], str] = says_the_answer) -> None:
        self._teacher, self.asked = teacher, []

    def ask(self, query: Query) -> list[Text]:
        self.asked.append(query)
        first = query.part * PROBLEMS
        return [
            Text(f"{place}?", self._teacher(place, query), True, place)
            for place in range(first, first + PROBLEMS)
        ]

    def gold(self, part: int = 0) -> list[Text]:
        first = part * PROBLEMS
        return [
            Text(f"{place}?", f"gold #### {right_answer(place)}", True, place)
            for place in range(first, first + PROBLEMS)
        ]

    def holdout(self, count: int) -> list[Text]:
        return [Text("clean?", "clean #### 1", True, -1)] * count

    def own(self, texts: Sequence[Text], samples: int, seed: int) -> list[Text]:
        """Sample k claims the answer (problem + k) % 10, so that sample 0 is right."""
        return [
            dataclasses.replace(text, completion=f"own{k} #### {(text.problem + k) % 10}", ended=True)
            for text in texts
            for k in range(samples)
        ]

    def verified(self, texts: Sequence[Text]) -> np.ndarray:
        return np.array([text.completion.endswith(f"#### {right_answer(text.problem)}") for text in texts])

    def nats_per_byte(self, texts: Sequence[Text]) -> np.ndarray:
        return np.array([float(len(text.completion)) for text in texts])

    def gain(self, texts: Sequence[Text], holdout: Sequence[Text]) -> np.ndarray:
        return np.array([float(text.problem) for text in texts])

    def rewrite(self, texts: Sequence[Text]) -> list[Text]:
        """By a rule: upper case, and every third answer lost."""
        return [
            dataclasses.replace(
                text, completion=text.completion.upper().replace("####", "" if i % 3 == 0 else "####")
            )
            for i, text in enumerate(texts)
        ]
