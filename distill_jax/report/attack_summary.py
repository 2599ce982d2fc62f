"""The attack suite's part of `summary.json`: cells, worst cases, controls, and the sentences that they allow.

    {"verdict": "valid" | "not validated" | "invalid", "proofs": {kind: {access: {"proven": bool, "why": str}}},
     "headlines": [str], "clean": arm, "arms": [...], "kinds": [...],
     "attacks": {id: {facts}}, "cells": {kind: {attack: {arm: {...}}}}, "worst_case": {kind: {arm: [one a level]}},
     "retention": {arm: {...}}, "cost": {kind: {arm: {...}}}, "controls": {id: {..., "verdict", "finding", "found"}},
     "skipped": {what: why}, "problems": int, "seeds": int, "minimum_detectable_effect": float, "notes": [str]}

Under a verdict of "invalid" there are no headlines: attacks that cannot break a sham say nothing about a defence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.report import words
from distill_jax.report.attack_controls import (
    access_levels,
    best_attack,
    judge_control,
    prove,
    suite_verdict,
    validation_gaps,
)
from distill_jax.report.attack_records import (
    BASE,
    CONSTANT,
    GOLD,
    UNTRAINED,
    AttackResults,
    common,
    read_attacks,
)
from distill_jax.report.attack_statistics import (
    choose_worst,
    cost_multiplier,
    gain,
    gain_denied,
    gain_p_value,
    harm_below_base,
    recovered_gap,
    relative_collapse,
    teacher_retention,
)
from distill_jax.report.statistics import RESAMPLES, estimate, holm, minimum_detectable_effect
from distill_jax.report.summary import strict_json

HALFWAY = 0.5  # of the clean gain: the score that the cost multiplier is asked for


def summarise_attacks(
    workdir: str | Path, setting: Mapping[str, Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any] | None:
    """The suite's part of the summary; None in a workdir where no suite has run.

    Args:
      workdir: of the run. setting: of the summary ("samples" and "steps" are read).
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: a result file that is present is broken.
    """
    results = read_attacks(workdir)
    if results is None:
        return None
    draw: dict[str, Any] = {"resamples": resamples, "seed": seed}
    suite = results.suite
    controls = {
        name: {**control, **judge_control(results, control, draw)}
        for name, control in suite["controls"].items()
    }
    proofs = prove(results, controls)
    test = [cell.test for cell in results.cells.values()]
    problems = max((len(outcomes.problems) for outcomes in test), default=0)
    summary: dict[str, Any] = {
        "verdict": suite_verdict(controls, proofs),
        "proofs": proofs,
        "clean": suite["settings"]["clean"],
        "arms": suite["arms"],
        "kinds": suite["kinds"],
        "attacks": suite["attacks"],
        "cells": {kind: _cells(results, kind, draw) for kind in suite["kinds"]},
        "worst_case": {
            kind: {
                arm: _worst_cases(results, kind, arm, draw)
                for arm in suite["arms"]
                if arm != suite["settings"]["clean"]
            }
            for kind in suite["kinds"]
        },
        "retention": _retention(results, draw),
        "cost": _costs(results, draw),
        "controls": controls,
        "skipped": suite["skipped"],
        "samples": setting["samples"],
        "steps": setting["steps"],
        "problems": problems,
        "seeds": max((len(outcomes.seeds) for outcomes in test), default=0),
        "minimum_detectable_effect": minimum_detectable_effect(problems) if problems else None,
        "notes": results.notes,
    }
    summary["headlines"] = [] if summary["verdict"] == "invalid" else _headlines(summary)
    return strict_json(summary)


def _cells(results: AttackResults, kind: str, draw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """attack -> arm -> numbers of a cell; baselines stand under the arm that they have."""
    table: dict[str, dict[str, Any]] = {}
    for (arm, attack, of_kind), cell in results.cells.items():
        if of_kind != kind or arm == CONSTANT:
            continue
        numbers: dict[str, Any] = {
            "knob": cell.knob,
            "queries": cell.queries,
            "steps": cell.steps,
            "accuracy": estimate(cell.test.correct, **draw),
        }
        if arm != BASE:
            numbers |= _against_others(results, arm, attack, kind, draw)
        table.setdefault("A0" if arm == BASE else attack, {})[arm] = numbers
    for arm in results.suite["arms"]:
        mine = {
            attack: arms[arm]["gain_p"]
            for attack, arms in table.items()
            if arms.get(arm, {}).get("gain_p") is not None
        }
        for attack, value in holm(mine).items():
            table[attack][arm]["gain_p_holm"] = value
    return table


def _against_others(
    results: AttackResults, arm: str, attack: str, kind: str, draw: dict[str, Any]
) -> dict[str, Any]:
    clean = results.suite["settings"]["clean"]
    mine, base = (arm, attack, kind), (BASE, UNTRAINED, kind)
    numbers: dict[str, Any] = {}
    found = results.matrices("test", mine, base)
    if found is not None:
        numbers["gain"] = gain(*found, **draw)
        numbers["gain_p"] = gain_p_value(*found, **draw)
        numbers["harm_below_base"] = harm_below_base(*found)
    for name, rival in (("recovered_gap", clean), ("against_control", "control")):
        found = results.matrices("test", mine, (rival, attack, kind), base)
        if found is not None and arm not in (rival, GOLD):
            numbers[name] = recovered_gap(*found, **draw)
            if name == "recovered_gap":
                numbers["relative_collapse"] = relative_collapse(*found[:2], **draw)
                low = gain(found[1], found[2], **draw)["ci95"][0]
                numbers["clean_gains"] = low is not None and low > 0.0
    found = results.matrices("test", mine, clean, base)
    if found is not None:
        numbers["absolute_gap"] = recovered_gap(*found, **draw)
    return numbers


def _worst_cases(results: AttackResults, kind: str, arm: str, draw: dict[str, Any]) -> list[dict[str, Any]]:
    """For every level of access the attack with the largest recovered gap on validation problems, read on test."""
    clean, base = results.suite["settings"]["clean"], (BASE, UNTRAINED, kind)
    worst = []
    for access, attacks in access_levels(results, kind):
        tried = [attack for attack in attacks if (arm, attack, kind) in results.cells]
        gaps = validation_gaps(results, arm, kind, tried, draw)
        chosen = choose_worst(gaps)
        if chosen is None:
            continue
        found = results.matrices("test", (arm, chosen, kind), (clean, chosen, kind), base)
        best, best_clean = (best_attack(results, name, kind, attacks) for name in (arm, clean))
        denied = results.matrices("test", (arm, best or "", kind), (clean, best_clean or "", kind), base)
        if found is None:
            continue
        cell = results.cells[arm, chosen, kind]
        worst.append(
            {
                "access": access,
                "attacks": [attack for attack in tried if attack in gaps],
                "not_comparable": [attack for attack in tried if attack not in gaps],
                "attack": chosen,
                "knob": cell.knob,
                "queries": max(results.cells[arm, attack, kind].queries for attack in tried),
                "steps": max(results.cells[arm, attack, kind].steps for attack in tried),
                "validation": gaps[chosen],
                "recovered_gap": recovered_gap(*found, **draw),
                "gain_denied": None if denied is None else gain_denied(*denied, **draw),
                "best_attack": best,
            }
        )
    return worst


def _retention(results: AttackResults, draw: dict[str, Any]) -> dict[str, Any]:
    settings, found = results.suite["settings"], {}
    for arm in results.suite["arms"]:
        pair = results.matrices("test", arm, settings["clean"])
        if pair is not None and arm != settings["clean"]:
            found[arm] = teacher_retention(pair[0], pair[1], settings["margin"], **draw)
    return found


def _costs(results: AttackResults, draw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """kind -> arm -> cost, from the budgets of the stage distil; the score is half of the clean gain at the default."""
    clean = results.suite["settings"]["clean"]
    costs: dict[str, dict[str, Any]] = {}
    for kind in results.suite["kinds"]:
        curve, base = results.curves.get((clean, kind), {}), results.cells.get((BASE, UNTRAINED, kind))
        if len(curve) < 2 or base is None or 1.0 not in curve:
            continue
        zero = base.test.correct.mean()
        score = float(zero + HALFWAY * (curve[1.0].correct.mean() - zero))
        if score <= zero:
            continue
        costs[kind] = {}
        for arm in results.suite["arms"]:
            other = results.curves.get((arm, kind), {})
            if arm == clean or len(other) < 2:
                continue
            matrices = common([*other.values(), *curve.values()])
            if matrices is not None:
                defended = dict(zip(other, matrices[: len(other)], strict=True))
                open_one = dict(zip(curve, matrices[len(other) :], strict=True))
                costs[kind][arm] = cost_multiplier(defended, open_one, score, **draw)
    return costs


def _headlines(summary: Mapping[str, Any]) -> list[str]:
    """What may be said of each arm, kind of student and access; never that a teacher cannot be distilled."""
    sentences = []
    for kind, arms in summary["worst_case"].items():
        for arm, levels in arms.items():
            retention = summary["retention"].get(arm)
            for level in levels:
                sentences.append(_headline(summary, kind, arm, level, retention))
    return sentences


def _headline(
    summary: Mapping[str, Any],
    kind: str,
    arm: str,
    level: Mapping[str, Any],
    retention: Mapping[str, Any] | None,
) -> str:
    gap = level["recovered_gap"]
    value = "undefined" if gap["mean"] is None else f"{gap['mean']:.2f}"
    kept = "an unknown teacher retention"
    if retention is not None and retention["ratio"]["mean"] is not None:
        ends = words.interval(retention["ratio"]["ci95"], digits=3)
        kept = f"teacher retention {retention['ratio']['mean']:.3f} ({ends})"
    queries, steps = round(summary["samples"] * level["queries"]), round(summary["steps"] * level["steps"])
    proof = summary["proofs"][kind][level["access"]]
    provisional = "" if proof["proven"] else "Not validated by the positive controls: "
    # No denominator, no recovered gap: such an attack may gain here, and must not be read as one that was beaten.
    left_out = level["not_comparable"]
    beside = (
        f" Tried but not compared, for the clean teacher's students gain nothing clear by it: "
        f"{words.enumeration(left_out)}."
        if left_out
        else ""
    )
    return (
        f"{provisional}under {level['access']} access, a budget of up to {queries:,} texts and {steps:,} training "
        f"steps for each attack (knob search and the student's own texts that the teacher scores included) and attacks "
        f"{words.enumeration(level['attacks'])}, the worst-case recovered gap of {kind} students of "
        f"the teacher '{words.ARM_TITLES.get(arm, arm)}' is {value} (95 % interval {words.interval(gap['ci95'])}; "
        f"{level['attack']} {level['knob']}, chosen on validation problems) at {kept}.{beside}"
    )
