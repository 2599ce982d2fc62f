"""Attack on a teacher whose weights are known: undo the calibration first, then distil."""

from __future__ import annotations

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.tools import Query, Text, Tools


def undone(tools: Tools, seed: int, *, weights: str) -> list[Text]:
    """Texts of the teacher after its weights were changed, see `Query.weights`."""
    return tools.ask(Query(weights=weights))


UNDONE = Attack(
    "A12",
    "calibration undone",
    "Retrains the teacher on a few clean texts, or turns its adapter around, then trains on its text.",
    "weights",
    3,
    select=undone,
    knobs=(
        Knob("retrained=50", select={"weights": "retrained=50"}),
        Knob("retrained=500", select={"weights": "retrained=500"}),
        Knob("dial=-1", select={"weights": "dial=-1"}),
        Knob("dial=-0.5", select={"weights": "dial=-0.5"}),
    ),
    short=3,
    needs=("gold",),
)
ATTACKS = (UNDONE,)
