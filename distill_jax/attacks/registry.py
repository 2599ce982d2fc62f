"""All attacks by id, and the words by which a suite of them is chosen."""

from __future__ import annotations

from distill_jax.attacks import (
    answers,
    baselines,
    distributions,
    ensemble,
    filtered_text,
    open_weights,
    reweighting,
    rewriting,
    sampled_text,
    task_reward,
)
from distill_jax.attacks.attack import ACCESS, Attack

_FAMILIES = (
    baselines,
    distributions,
    sampled_text,
    filtered_text,
    answers,
    reweighting,
    rewriting,
    task_reward,
    open_weights,
    ensemble,
)


def _number(name: str) -> tuple[int, str]:
    digits = "".join(letter for letter in name[1:3] if letter.isdigit())
    return int(digits), name


ATTACKS: dict[str, Attack] = {
    attack.id: attack
    for attack in sorted(
        (attack for family in _FAMILIES for attack in family.ATTACKS), key=lambda attack: _number(attack.id)
    )
}


def choose(words: str) -> list[Attack]:
    """The attacks of a suite, in the order of the registry.

    Args:
      words: "none"; "tier1", "tier2" or "tier3" (each with the tiers below it); a tier and an access ("tier1-text":
        what sees no more than text); or ids, "A1,A3".

    Raises:
      ValueError: a word that is none of these.
    """
    if words == "none":
        return []
    chosen: set[str] = set()
    for word in filter(None, (part.strip() for part in words.split(","))):
        tier, _, access = word.partition("-")
        if word in ATTACKS:
            chosen.add(word)
        elif tier in ("tier1", "tier2", "tier3") and (not access or access in ACCESS):
            most = ACCESS.index(access) if access else len(ACCESS)
            chosen |= {
                attack.id
                for attack in ATTACKS.values()
                if attack.tier <= int(tier[-1]) and ACCESS.index(attack.access) <= most
            }
        else:
            raise ValueError(
                f"attacks: {word!r} is neither an attack ({', '.join(ATTACKS)}) nor a suite (none, tier1, tier2, "
                f"tier3, or tier1-{ACCESS[0]} and the like)"
            )
    if not chosen:
        raise ValueError(f"attacks: {words!r} names no attack; say 'none' to run none")
    return [attack for attack in ATTACKS.values() if attack.id in chosen]
