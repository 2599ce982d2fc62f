"""What the attacks are compared with: no training at all, training without the teacher, and the clean teachers."""

from __future__ import annotations

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.tools import Text, Tools


def gold_texts(tools: Tools, seed: int) -> list[Text]:
    """The task's own completions of the run's problems."""
    return tools.gold()


UNTRAINED = Attack(
    "A0",
    "untrained student",
    "The student as it is: what an attacker has for nothing, and the zero of the recovered gap.",
    "text",
    1,
    uses_teacher=False,
    view="the untrained student (students/base/none)",
)
GOLD = Attack(
    "A0b",
    "gold text",
    "Trains on the task's own completions of the same problems for the same steps: any training would do that.",
    "text",
    1,
    select=gold_texts,
    knobs=(Knob("default", queries=0.0),),
    needs=("gold",),
    uses_teacher=False,
)
CLEAN = Attack(
    "A0c",
    "clean control",
    "Every attack, run on the original teacher and on the control (eta = 0): the one of the recovered gap.",
    "text",
    1,
    view="the arms original and control under every attack",
)
OTHER_STUDENTS = Attack(
    "A10",
    "other student",
    "Every attack with students whose tokenizer, family or size is not the proxy's.",
    "text",
    2,
    view="the rows of every kind of student that differs from the proxy",
)
ATTACKS = (UNTRAINED, GOLD, CLEAN, OTHER_STUDENTS)
