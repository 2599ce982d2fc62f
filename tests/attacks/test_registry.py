"""The declarative entries: complete, well-formed, chosen by the words of a config."""

from __future__ import annotations

import pytest

from distill_jax.attacks.attack import ACCESS, Attack, Knob, Recipe
from distill_jax.attacks.registry import ATTACKS, choose

MATRIX = "A0 A0b A0c A1 A2 A3 A4 A5 A6 A7 A7b A8 A8b A9 A10 A10b A11 A11x16 A12 A13 A14"  # fmt: skip
TIER1 = ["A0", "A0b", "A0c", "A1", "A2", "A3", "A5", "A7", "A8"]


def test_the_whole_matrix_is_there_in_order():
    assert list(ATTACKS) == MATRIX.split()
    for attack in ATTACKS.values():
        assert attack.sentence.endswith(".") and attack.access in ACCESS
        assert attack.view or attack.select is not None
        assert len(attack.grid("short")) == attack.short <= len(attack.grid("full"))


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("none", []),
        ("tier1", TIER1),
        ("tier1-text", ["A0", "A0b", "A0c", "A1", "A2", "A3", "A5"]),
        ("A3,A1", ["A1", "A3"]),
        ("A7, tier1-text", ["A0", "A0b", "A0c", "A1", "A2", "A3", "A5", "A7"]),
        ("tier3", list(ATTACKS)),
    ],
)
def test_choose(words, ids):
    assert [attack.id for attack in choose(words)] == ids


@pytest.mark.parametrize("words", ["A99", "tier4", "tier1-eyes", "", " , "])
def test_choose_refuses(words):
    with pytest.raises(ValueError, match="attacks: "):
        choose(words)


def test_tier_two_leaves_out_what_only_a_paper_needs():
    left = set(ATTACKS) - {attack.id for attack in choose("tier2")}
    assert left == {"A11x16", "A12"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("magic"), "loss must be one of"),
        (lambda: Recipe(steps=0.0), "positive multiples"),
        (lambda: Knob("a/b"), "a folder's name"),
        (lambda: Knob("a", queries=-1.0), "queries must be at least 0"),
        (lambda: Attack("X", "x", "X.", "eyes", 1, view="v"), "access must be one of"),
        (lambda: Attack("X", "x", "X.", "text", 4, view="v"), "tier must be"),
        (lambda: Attack("X", "x", "X.", "text", 1), "is a view of others"),
        (lambda: Attack("X", "x", "X.", "text", 1, view="v", short=2), "short <= 1"),
        (
            lambda: Attack("X", "x", "X.", "text", 1, view="v", knobs=(Knob("a", recipe={"loss": "magic"}),)),
            "loss must be one of",
        ),
    ],
)
def test_entries_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_knob_changes_the_recipe():
    attack = ATTACKS["A7"]
    recipe = attack.recipe_of(attack.knob("k=64-T=4"))
    assert recipe.loss == "top_k" and recipe.options == {"top_k": 64, "temperature": 4.0}
    with pytest.raises(ValueError, match="grid must be"):
        attack.grid("middle")
