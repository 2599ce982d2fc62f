"""Attacks that read the teacher's distribution, not only its text; where the vocabularies differ, its likelihoods."""

from __future__ import annotations

from distill_jax.attacks.attack import Attack, Knob, Recipe
from distill_jax.attacks.sampled_text import all_texts


def _top(k: int, temperature: float) -> Knob:
    options = {"top_k": k, "temperature": temperature}
    return Knob(f"k={k}-T={temperature:g}", recipe={"options": options})


def _on_policy(beta: float, share: float) -> Knob:
    options = {"beta": beta, "student_share": share}
    return Knob(f"beta={beta:g}-lambda={share:g}", recipe={"options": options})


TOP_K = Attack(
    "A7",
    "top-k distributions",
    "Forward KL to the teacher's k most probable tokens and one bucket for the rest, on the teacher's text.",
    "top-k",
    1,
    select=all_texts,
    recipe=Recipe("top_k", options={"top_k": 16, "temperature": 1.0}),
    knobs=(
        _top(16, 1.0),
        _top(16, 2.0),
        _top(1, 1.0),
        _top(64, 1.0),
        _top(64, 2.0),
        _top(64, 4.0),
        _top(16, 4.0),
    ),
    short=2,
)
LOGITS = Attack(
    "A7b",
    "whole distributions",
    "Forward KL to the whole distribution, mixed with the text itself (hybrid, as against nasty teachers).",
    "logits",
    2,
    select=all_texts,
    recipe=Recipe("logits", options={"cross_entropy": 0.5, "temperature": 1.0}),
    knobs=(
        Knob("text=0.5", recipe={"options": {"cross_entropy": 0.5, "temperature": 1.0}}),
        Knob("text=0.1", recipe={"options": {"cross_entropy": 0.1, "temperature": 1.0}}),
        Knob("text=0.5-T=2", recipe={"options": {"cross_entropy": 0.5, "temperature": 2.0}}),
    ),
    short=2,
)
ON_POLICY = Attack(
    "A8",
    "on-policy distillation",
    "The student writes, the teacher's whole distribution corrects it (generalized JSD, lambda 1 or 0.5), in half the "
    "steps: each also samples.",
    "logits",
    1,
    select=all_texts,
    recipe=Recipe("on_policy", steps=0.5, options={"beta": 0.0, "student_share": 0.5}),
    knobs=(
        _on_policy(0.0, 1.0),
        _on_policy(0.0, 0.5),
        _on_policy(0.5, 1.0),
        _on_policy(0.5, 0.5),
        _on_policy(1.0, 1.0),
        _on_policy(1.0, 0.5),
    ),
    short=2,
)
POLICY_GRADIENT = Attack(
    "A8b",
    "reverse-KL policy gradient",
    "The student writes, the teacher's likelihood of every stretch of it is the advantage; any two tokenizers. It asks "
    "for likelihoods of texts of its own choice: less than whole distributions, more than the top k of an answer.",
    "logits",
    2,
    select=all_texts,
    recipe=Recipe("policy_gradient", steps=0.5, options={"student_share": 0.5}),
    knobs=(
        Knob("lambda=0.5", recipe={"options": {"student_share": 0.5}}),
        Knob("lambda=1", recipe={"options": {"student_share": 1.0}}),
    ),
    short=1,
)
SPANS = Attack(
    "A10b",
    "likelihoods across tokenizers",
    "Matches the likelihood that the teacher gives every stretch of its text that both tokenizers can cut out.",
    "top-k",
    2,
    select=all_texts,
    recipe=Recipe("spans", options={"tau": 100.0, "cross_entropy": 0.5}),
    knobs=(
        Knob("text=0.5", recipe={"options": {"tau": 100.0, "cross_entropy": 0.5}}),
        Knob("text=0", recipe={"options": {"tau": 100.0, "cross_entropy": 0.0}}),
        Knob("text=0.5-tau=1", recipe={"options": {"tau": 1.0, "cross_entropy": 0.5}}),
    ),
    short=2,
)
ATTACKS = (TOP_K, LOGITS, ON_POLICY, POLICY_GRADIENT, SPANS)
