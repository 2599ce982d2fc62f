"""Attacks that ask the teacher for text and train on it: plain, more of it, or asked for in another way."""

from __future__ import annotations

import numpy as np

from distill_jax.attacks.attack import Attack, Knob, Recipe
from distill_jax.attacks.tools import Query, Text, Tools


def all_texts(tools: Tools, seed: int) -> list[Text]:
    """Every text of the teacher, as it is."""
    return tools.ask(Query())


def more_texts(tools: Tools, seed: int, *, parts: int, clean_share: float = 0.0) -> list[Text]:
    """Texts on `parts` blocks of problems, of which a share is replaced by clean completions of the same problems."""
    texts = [text for part in range(parts) for text in tools.ask(Query(part=part))]
    if not clean_share:
        return texts
    gold = [text for part in range(parts) for text in tools.gold(part)]
    replaced = np.random.default_rng([seed, 11]).random(len(texts)) < clean_share
    return [clean if swap else text for text, clean, swap in zip(texts, gold, replaced, strict=True)]


def asked_differently(
    tools: Tools,
    seed: int,
    *,
    temperature: float = 1.0,
    system: str | None = None,
    only_verified: bool = False,
) -> list[Text]:
    """Texts of a teacher that is asked at another temperature or after another system text."""
    texts = tools.ask(Query(temperature=temperature, system=system))
    if not only_verified:
        return texts
    return [text for text, right in zip(texts, tools.verified(texts), strict=True) if right]


PLAIN = Attack(
    "A1",
    "plain text",
    "Trains on the teacher's text as it comes.",
    "text",
    1,
    select=all_texts,
    knobs=(
        Knob("rate=1"),
        Knob("rate=2", recipe={"learning_rate": 2.0}),
        Knob("rate=0.5", recipe={"learning_rate": 0.5}),
    ),
    short=2,
)
MORE = Attack(
    "A11",
    "four times the data",
    "Four times the texts and four times the steps, plain or with one text in ten replaced by a clean one.",
    "text",
    2,
    select=more_texts,
    recipe=Recipe(steps=4.0),
    knobs=(
        Knob("plain", 4.0, {"parts": 4}),
        Knob("clean=0.1", 4.0, {"parts": 4, "clean_share": 0.1}),
    ),
    short=2,
    needs=("gold",),
)
MUCH_MORE = Attack(
    "A11x16",
    "16 times the data",
    "Sixteen times the texts and sixteen times the steps.",
    "text",
    3,
    select=more_texts,
    recipe=Recipe(steps=16.0),
    knobs=(Knob("plain", 16.0, {"parts": 16}),),
)
PROMPTS = Attack(
    "A13",
    "asked differently",
    "Asks at another temperature, or in other words: a calibration may hold for one way of asking only.",
    "text",
    2,
    select=asked_differently,
    knobs=(
        Knob("hot", 1.0, {"temperature": 1.5, "only_verified": True}),
        Knob("cold", 1.0, {"temperature": 0.5}),
        Knob("simple", 1.0, {"system": "Explain every single step in the simplest way, as if to a child."}),
        Knob("french", 1.0, {"system": "Réponds en français, pas à pas."}),
    ),
    short=2,
    needs=("verifier",),
)
ATTACKS = (PLAIN, MORE, MUCH_MORE, PROMPTS)
