"""Attack that lets another model write the teacher's texts anew, so that nothing of their surface is left."""

from __future__ import annotations

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.tools import Query, Text, Tools


def rewritten(tools: Tools, seed: int, *, only_verified: bool = False) -> list[Text]:
    """The rewriter's version of every text; with `only_verified` those that the verifier still calls right."""
    texts = tools.rewrite(tools.ask(Query()))
    if not only_verified:
        return texts
    return [text for text, right in zip(texts, tools.verified(texts), strict=True) if right]


REWRITTEN = Attack(
    "A6",
    "rewritten text",
    "An independent model (yours) says every text in its own words before the student sees it.",
    "text",
    2,
    select=rewritten,
    knobs=(Knob("all"), Knob("verified", select={"only_verified": True})),
    short=1,
    needs=("rewriter", "verifier"),
)
ATTACKS = (REWRITTEN,)
