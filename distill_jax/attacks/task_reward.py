"""Attack that needs no teacher at all: the student learns from its own right answers."""

from __future__ import annotations

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.tools import Text, Tools


def own_right_answers(tools: Tools, seed: int, *, samples: int) -> list[Text]:
    """Of the student's own completions of every problem those that the verifier calls right, each text once."""
    own = tools.own(tools.gold(), samples, seed)
    right = [text for text, good in zip(own, tools.verified(own), strict=True) if good]
    return list(dict.fromkeys(right))


OWN_ANSWERS = Attack(
    "A9",
    "task reward only",
    "Expert iteration: trains on the student's own completions that a verifier calls right. The teacher is not asked.",
    "text",
    2,
    select=own_right_answers,
    knobs=(Knob("n=8", 0.0, {"samples": 8}), Knob("n=32", 0.0, {"samples": 32})),
    short=1,
    needs=("verifier",),
    uses_teacher=False,
)
ATTACKS = (OWN_ANSWERS,)
