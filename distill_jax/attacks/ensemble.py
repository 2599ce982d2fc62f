"""The attacker who tries everything: the best of all attacks on validation problems, run again with new seeds."""

from __future__ import annotations

from distill_jax.attacks.attack import Attack

ENSEMBLE = Attack(
    "A14",
    "best of all",
    "The attack and knob that did best on validation problems, run again with student seeds that nobody has seen.",
    "weights",
    2,
    view="the winner's recipe under new seeds",
)
ATTACKS = (ENSEMBLE,)
