"""The verdict on the attack suite itself: were the planted weaknesses found, and was nothing learned from nothing?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from distill_jax.report import words
from distill_jax.report.attack_records import BASE, UNTRAINED, AttackResults
from distill_jax.report.attack_statistics import gain, recovered_gap
from distill_jax.report.statistics import difference

ACCESS = ("text", "top-k", "logits", "weights")
NEEDED = ("recover", "fail")  # at least one control of each kind must pass before a verdict is given


class Verdict(TypedDict):
    """verdict: "passed", "failed" or "not judged"; finding: why, in a sentence."""

    verdict: str
    finding: str


def suite_verdict(controls: Mapping[str, Mapping[str, Any]]) -> str:
    """ "invalid" when a control failed; "valid" when some of each kind passed; "not validated" in between.

    A planted weakness whose attacks were run and that could not be judged leaves those attacks without a proof that
    they work, so it stands in the way of "valid" too.
    """
    if any(control["verdict"] == "failed" for control in controls.values()):
        return "invalid"
    passed = {control["expect"] for control in controls.values() if control["verdict"] == "passed"}
    unproven = any(
        control["expect"] == "recover" and control["attacks"] and control["verdict"] == "not judged"
        for control in controls.values()
    )
    return "valid" if passed.issuperset(NEEDED) and not unproven else "not validated"


def judge_control(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """The verdict on one control of suite.json."""
    judge = {"recover": _recovers, "fail": _fails, "monotone": _is_monotone}[control["expect"]]
    return judge(results, control, draw)


def _recovers(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """Of each kind of student the best attack recovers at least the threshold."""
    best: dict[str, tuple[float, str]] = {}
    for attack in control["attacks"]:
        for kind in results.suite["kinds"]:
            gap = _gap(results, control["arm"], attack, kind, draw)
            if (
                gap is not None
                and gap["mean"] is not None
                and _clean_gain_is_real(results, attack, kind, draw)
            ):
                best[kind] = max(best.get(kind, (-np.inf, "")), (gap["mean"], attack))
    if not best:
        return _not_judged("none of its attacks was run where the clean teacher's students gain anything")
    short = {kind: found for kind, found in best.items() if found[0] < control["threshold"]}
    listed = words.enumeration(
        [f"{kind} students {gap:.2f} ({attack})" for kind, (gap, attack) in best.items()]
    )
    return {
        "verdict": "failed" if short else "passed",
        "finding": f"Recovered by the best attack: {listed}; at least {control['threshold']:g} is needed.",
    }


def _fails(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """No attack gains: none is both above the untrained student beyond its interval and above the threshold."""
    leaks, tried = [], 0
    for attack in control["attacks"]:
        for kind in results.suite["kinds"]:
            place, base = (control["arm"], attack, kind), (BASE, UNTRAINED, kind)
            found = results.matrices("test", place, base)
            if found is None:
                continue
            tried += 1
            low = gain(*found, **draw)["ci95"][0]
            gap = _gap(results, *place, draw)
            share = None if gap is None else gap["mean"]
            if (low is None or low > 0.0) and (share is None or share >= control["threshold"]):
                leaks.append(f"{attack} by {kind} students")
    if not tried:
        return _not_judged("none of its attacks was run")
    if leaks:
        return {
            "verdict": "failed",
            "finding": f"Learned from a teacher without information: {words.enumeration(leaks)}.",
        }
    return {"verdict": "passed", "finding": f"None of {tried} attacks gained anything from it."}


def _is_monotone(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """More access, or more data, never leaves the best attack worse beyond the interval of the difference."""
    broken, compared = [], 0
    for arm in results.suite["arms"]:
        for kind in results.suite["kinds"]:
            for what, less, more in _steps(results, arm, kind):
                found = results.matrices("test", (arm, more, kind), (arm, less, kind))
                if found is None:
                    continue
                compared += 1
                high = difference(*found, **draw)["ci95"][1]
                if high is not None and high < 0.0:
                    broken.append(f"{more} after {less} ({what}) on {arm} by {kind} students")
    if not compared:
        return _not_judged("only one level of access and one amount of data were run")
    if broken:
        return {"verdict": "failed", "finding": f"Worse with more: {words.enumeration(broken)}."}
    return {"verdict": "passed", "finding": f"None of {compared} comparisons is worse with more."}


def _steps(results: AttackResults, arm: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """(what there is more of, the best attack with less, the best with more), chosen on validation problems."""
    levels = list(access_levels(results))
    best = [best_attack(results, arm, kind, attacks) for _, attacks in levels]
    for place in range(1, len(levels)):
        less, more = best[place - 1], best[place]
        if less is not None and more is not None:
            yield f"access to {levels[place][0]}", less, more
    more = best_attack(results, arm, kind, ["A1", "A11"])
    if more is not None and ("A11" in results.suite["attacks"]) and (arm, "A1", kind) in results.cells:
        yield "data", "A1", more


def access_levels(results: AttackResults) -> Iterator[tuple[str, list[str]]]:
    """(access, the attacks that need no more), from less to more; levels that add no attack are left out."""
    attacks = {
        name: facts
        for name, facts in results.suite["attacks"].items()
        if facts["uses_teacher"] and not facts["view"]
    }
    for level, access in enumerate(ACCESS):
        if any(facts["access"] == access for facts in attacks.values()):
            within = [name for name, facts in attacks.items() if ACCESS.index(facts["access"]) <= level]
            yield access, within


def best_attack(results: AttackResults, arm: str, kind: str, attacks: Sequence[str]) -> str | None:
    """The attack with the best accuracy on validation problems."""
    scores = {}
    for attack in attacks:
        cell = results.cells.get((arm, attack, kind))
        if cell is not None and cell.validation is not None:
            scores[attack] = float(cell.validation.correct.mean())
    return max(scores, key=lambda name: scores[name], default=None)


def _gap(results: AttackResults, arm: str, attack: str, kind: str, draw: dict[str, Any]) -> Any:
    clean = results.suite["settings"]["clean"]
    found = results.matrices("test", (arm, attack, kind), (clean, attack, kind), (BASE, UNTRAINED, kind))
    return None if found is None else recovered_gap(*found, **draw)


def _clean_gain_is_real(results: AttackResults, attack: str, kind: str, draw: dict[str, Any]) -> bool:
    clean = results.suite["settings"]["clean"]
    found = results.matrices("test", (clean, attack, kind), (BASE, UNTRAINED, kind))
    low = gain(*found, **draw)["ci95"][0] if found is not None else None
    return low is not None and low > 0.0


def _not_judged(why: str) -> Verdict:
    return {"verdict": "not judged", "finding": f"Not judged: {why}."}
