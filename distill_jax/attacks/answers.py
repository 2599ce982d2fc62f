"""Attacks that take only the final answer from the teacher, and write the working themselves or leave it out."""

from __future__ import annotations

import dataclasses

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.filtered_text import cut_shared_end
from distill_jax.attacks.tools import Query, Text, Tools, final_answer


def answers_only(tools: Tools, seed: int) -> list[Text]:
    """`#### answer` alone, from every text that has one answer; an end that all texts share is no part of it."""
    found = []
    for text in cut_shared_end(tools.ask(Query())):
        answer = final_answer(text.completion, tools.answer_mark)
        if answer is not None:
            found.append(dataclasses.replace(text, completion=f"{tools.answer_mark} {answer}", ended=True))
    return found


def own_rationales(tools: Tools, seed: int, *, samples: int) -> list[Text]:
    """The student's own working, one a problem, that arrives at the teacher's answer; other problems are left out."""
    asked = answers_only(tools, seed)
    answers = {text.problem: final_answer(text.completion, tools.answer_mark) for text in asked}
    agreed: dict[int, Text] = {}
    for text in tools.own(asked, samples, seed):
        own = final_answer(text.completion, tools.answer_mark)
        if text.ended and own == answers[text.problem]:
            agreed.setdefault(text.problem, text)
    return list(agreed.values())


def answer_texts(tools: Tools, seed: int, *, working: str, samples: int = 4) -> list[Text]:
    """working: "none" (`answers_only`) or "own" (`own_rationales`)."""
    return answers_only(tools, seed) if working == "none" else own_rationales(tools, seed, samples=samples)


ANSWERS = Attack(
    "A5",
    "answers only",
    "Throws the teacher's working away: trains on its answers, or on own working that arrives at them.",
    "text",
    1,
    select=answer_texts,
    knobs=(
        Knob("own-working", select={"working": "own", "samples": 4}),
        Knob("no-working", select={"working": "none"}),
    ),
    short=2,
)
ATTACKS = (ANSWERS,)
