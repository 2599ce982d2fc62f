"""Attack that weighs texts by how much they help on clean ones (the adaptive attacker of arXiv 2605.22737)."""

from __future__ import annotations

import numpy as np

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.tools import Query, Text, Tools

CLIP = 10.0  # of b * gain, so that no text outweighs another by more than exp(20)


def reweighted(tools: Tools, seed: int, *, strength: float, holdout: int) -> list[Text]:
    """As many texts as there are, drawn with replacement with probability ~ exp(clip(strength * z)).

    z is the gain (see `Tools.gain`), centred and in units of its standard deviation over the texts, so that one
    strength means the same for every model.
    """
    texts = tools.ask(Query())
    gain = np.asarray(tools.gain(texts, tools.holdout(holdout)), np.float64)
    z = (gain - gain.mean()) / max(float(gain.std()), 1e-12)
    weight = np.exp(np.clip(strength * z, -CLIP, CLIP))
    drawn = np.random.default_rng([seed, 4]).choice(len(texts), size=len(texts), p=weight / weight.sum())
    return [texts[place] for place in sorted(drawn)]


REWEIGHTED = Attack(
    "A4",
    "adaptive weights",
    "Draws texts by how far a step towards clean held-out texts would raise their likelihood.",
    "text",
    2,
    select=reweighted,
    knobs=(
        Knob("b=1-clean=64", select={"strength": 1.0, "holdout": 64}),
        Knob("b=3-clean=64", select={"strength": 3.0, "holdout": 64}),
        Knob("b=1-clean=256", select={"strength": 1.0, "holdout": 256}),
        Knob("b=3-clean=256", select={"strength": 3.0, "holdout": 256}),
    ),
    short=2,
    needs=("gold",),
)
ATTACKS = (REWEIGHTED,)
