"""The verdict on the attack suite itself: were the planted weaknesses found, and was nothing learned from nothing?

Controls are judged for each kind of student and each access on their own: that wrong texts with honest distributions
are broken by an attacker who reads distributions says nothing of one who reads text. An attack is chosen on validation
problems and judged on test problems, as in the headline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from distill_jax.report import words
from distill_jax.report.attack_records import BASE, CONSTANT, UNTRAINED, AttackResults
from distill_jax.report.attack_statistics import (
    choose_worst,
    gain,
    gain_p_value,
    recovered_gap,
    worse_p_value,
)
from distill_jax.report.statistics import CONFIDENCE, holm

ACCESS = ("text", "top-k", "logits", "weights")
ONE_SIDED = round((1.0 - CONFIDENCE) / 2, 6)  # level of a test, that of one end of an interval
NEGLIGIBLE = 0.1  # share of the best attack's clean gain below which another's is no denominator
VACUOUS = 0.5  # share of the clean teacher's right texts above which a sham has hidden nothing


class Verdict(TypedDict):
    """verdict: "passed", "failed" or "not judged"; finding: why, in a sentence; found: kind -> access -> verdict, for
    the access that the control says something about."""

    verdict: str
    finding: str
    found: dict[str, dict[str, str]]


def suite_verdict(
    controls: Mapping[str, Mapping[str, Any]], proofs: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> str:
    """ "invalid" when a control failed; "valid" when every access of every kind (see `prove`) is proven; else "not
    validated"."""
    if any(control["verdict"] == "failed" for control in controls.values()):
        return "invalid"
    levels = [proof for levels in proofs.values() for proof in levels.values()]
    return "valid" if levels and all(proof["proven"] for proof in levels) else "not validated"


def prove(
    results: AttackResults, controls: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """kind -> access -> {"proven", "why"}: what the controls show of the attacks that were run with this access.

    An access is proven when nothing was learned from the teacher without information, and, for it and every lesser one
    that was run, an attack broke the weakness that was planted for it. No weakness is planted for known weights.
    """
    silent = {name: control for name, control in controls.items() if control["expect"] == "fail"}
    planted = {name: control for name, control in controls.items() if control["expect"] == "recover"}
    proofs: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in results.suite["kinds"]:
        missing, by = [], []
        for name, control in silent.items():
            verdicts = set(control["found"].get(kind, {}).values())
            if verdicts == {"passed"}:
                by.append(name)
            else:
                missing.append(f"{name} {'failed' if verdicts else 'not judged'}")
        if not silent:
            missing.append("no teacher without information was attacked")
        proofs[kind] = {}
        for access, _ in access_levels(results, kind):
            judged = {name: control["found"].get(kind, {}).get(access) for name, control in planted.items()}
            shown = [name for name, verdict in judged.items() if verdict == "passed"]
            if shown:
                by = list(dict.fromkeys([*by, *shown]))
            else:
                tried = [f"{name} {verdict}" for name, verdict in judged.items() if verdict]
                missing = [*missing, *(tried or [f"no control covers attacks with {access} access"])]
            why = f"proven by {words.enumeration(sorted(by))}"
            if missing:
                why = f"not proven ({'; '.join(missing)})"
            proofs[kind][access] = {"proven": not missing, "why": why}
    return proofs


def judge_control(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """The verdict on one control of suite.json."""
    judge = {"recover": _recovers, "fail": _fails, "monotone": _is_monotone}[control["expect"]]
    return judge(results, control, draw)


def _recovers(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """The attack that validation problems choose recovers at least the threshold, for every kind of student.

    A kind fails by the attack of the highest access; a lesser access whose attacks do not recover is not proven.
    """
    found: dict[str, dict[str, str]] = {}
    listed = []
    shares = results.suite.get("shams", {}).get(control["arm"])
    vacuous = shares is not None and shares["sham"] > VACUOUS * shares["clean"]
    for kind in results.suite["kinds"]:
        tried = [name for name in control["attacks"] if (control["arm"], name, kind) in results.cells]
        for access in sorted({results.suite["attacks"][name]["access"] for name in tried}, key=ACCESS.index):
            within = [
                name
                for name in tried
                if ACCESS.index(results.suite["attacks"][name]["access"]) <= ACCESS.index(access)
            ]
            gaps = {} if vacuous else validation_gaps(results, control["arm"], kind, within, draw)
            chosen = choose_worst(gaps)
            gap = None if chosen is None else _gap(results, control["arm"], chosen, kind, draw)
            verdict = "not judged"
            if gap is not None and chosen is not None and _clean_gain_is_real(results, chosen, kind, draw):
                verdict = "passed" if gap["mean"] >= control["threshold"] else "failed"
                listed.append(f"{gap['mean']:.2f} by {kind} students with {access} access ({chosen})")
            found.setdefault(kind, {})[access] = verdict
    final = [list(levels.values())[-1] for levels in found.values()]
    if vacuous:
        return _not_judged(
            f"it hides nothing in this task: {words.percent(shares['sham'])} of its texts still count as right, of the "
            f"clean teacher's {words.percent(shares['clean'])}",
            found,
        )
    if not listed:
        return _not_judged(
            "none of its attacks was run where the clean teacher's students gain anything", found
        )
    verdict = next((v for v in ("failed", "not judged") if v in final), "passed")
    finding = (
        f"Recovered by the best attack: {words.enumeration(listed)}; {control['threshold']:g} is needed."
    )
    return {"verdict": verdict, "finding": finding, "found": found}


def _fails(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """No attack gains: none is above what needs no information (Holm-adjusted), and above the threshold too.

    What needs none: the untrained student, or one that gives the most frequent answer every time, whichever is right
    more often. Texts under wrong questions still teach how an answer is written, and which answers there are.
    """
    p_values: dict[tuple[str, str], float] = {}
    shares: dict[tuple[str, str], float | None] = {}
    found: dict[str, dict[str, str]] = {}
    floors = set()
    for kind in results.suite["kinds"]:
        for attack in control["attacks"]:
            place = (control["arm"], attack, kind)
            base = _without_information(results, place)
            if base is None:
                continue
            floors.add("the untrained student" if base[0] == BASE else "the most frequent answer")
            matrices = results.matrices("test", place, base)
            assert matrices is not None
            gap = _gap(results, *place, draw, base=base)
            p_values[attack, kind] = gain_p_value(*matrices, **draw)
            shares[attack, kind] = None if gap is None else gap["mean"]
            found.setdefault(kind, {})[results.suite["attacks"][attack]["access"]] = "passed"
    if not p_values:
        return _not_judged("none of its attacks was run")
    leaks = []
    for (attack, kind), p_value in holm(p_values).items():
        share = shares[attack, kind]
        if p_value < ONE_SIDED and (share is None or share >= control["threshold"]):
            leaks.append(f"{attack} by {kind} students")
            found[kind][results.suite["attacks"][attack]["access"]] = "failed"
    above = f"more than {words.enumeration(sorted(floors))}"
    if leaks:
        finding = f"Learned from a teacher without information, {above}: {words.enumeration(leaks)}."
        return {"verdict": "failed", "finding": finding, "found": found}
    return {
        "verdict": "passed",
        "finding": f"None of {len(p_values)} attacks gained anything from it, {above}.",
        "found": found,
    }


def _without_information(results: AttackResults, place: tuple[str, str, str]) -> tuple[str, str, str] | None:
    """The better of the untrained student and the most frequent answer on the test problems of a cell."""
    scores = {}
    for arm in (BASE, CONSTANT):
        base = (arm, UNTRAINED, place[2])
        matrices = results.matrices("test", place, base)
        if matrices is not None:
            scores[base] = float(matrices[1].mean())
    return max(scores, key=lambda base: scores[base], default=None)


def _is_monotone(results: AttackResults, control: Mapping[str, Any], draw: dict[str, Any]) -> Verdict:
    """More access, or more data, never leaves the best attack worse: one-sided tests, Holm-adjusted over all."""
    compared, p_values = 0, {}
    for arm in results.suite["arms"]:
        for kind in results.suite["kinds"]:
            for what, less, more in _steps(results, arm, kind):
                found = results.matrices("test", (arm, more, kind), (arm, less, kind))
                if found is None:
                    continue
                compared += 1
                if less != more:  # the same students are not worse than themselves
                    name = f"{more} after {less} ({what}) on {arm} by {kind} students"
                    p_values[name] = worse_p_value(*found, **draw)
    if not compared:
        return _not_judged("only one level of access and one amount of data were run")
    broken = [name for name, value in holm(p_values).items() if value < ONE_SIDED]
    if broken:
        finding = f"Worse with more (Holm-adjusted p < {ONE_SIDED:g}): {words.enumeration(broken)}."
        return {"verdict": "failed", "finding": finding, "found": {}}
    finding = f"None of {compared} comparisons is worse with more."
    return {"verdict": "passed", "finding": finding, "found": {}}


def _steps(results: AttackResults, arm: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """(what there is more of, the best attack with less, the best with more), chosen on validation problems."""
    levels = list(access_levels(results, kind))
    best = [best_attack(results, arm, kind, attacks) for _, attacks in levels]
    for place in range(1, len(levels)):
        less, more = best[place - 1], best[place]
        if less is not None and more is not None:
            yield f"access to {levels[place][0]}", less, more
    more = best_attack(results, arm, kind, ["A1", "A11"])
    if more is not None and ("A11" in results.suite["attacks"]) and (arm, "A1", kind) in results.cells:
        yield "data", "A1", more


def access_levels(results: AttackResults, kind: str) -> Iterator[tuple[str, list[str]]]:
    """(access, the attacks that need no more), from less to more; levels that add no attack of this kind of student
    are left out."""
    attacks = {
        name: facts["access"]
        for name, facts in results.suite["attacks"].items()
        if facts["uses_teacher"]
        and not facts["view"]
        and any((arm, name, kind) in results.cells for arm in results.suite["arms"])
    }
    for level, access in enumerate(ACCESS):
        if access in attacks.values():
            yield access, [name for name, needed in attacks.items() if ACCESS.index(needed) <= level]


def validation_gaps(
    results: AttackResults, arm: str, kind: str, attacks: Sequence[str], draw: dict[str, Any]
) -> dict[str, float]:
    """attack -> recovered gap on validation problems, of those by which the clean teacher's students gain anything.

    A gain that is within its interval of nothing, or a small share of what the best of these attacks gains, is no
    denominator: its ratio would be noise, and a choice of the largest ratio would choose the noise.
    """
    clean, gaps, possible = results.suite["settings"]["clean"], {}, {}
    for attack in attacks:
        found = results.matrices(
            "validation", (arm, attack, kind), (clean, attack, kind), (BASE, UNTRAINED, kind)
        )
        if found is None:
            continue
        students, rivals, zero = found
        low = gain(rivals, zero, **draw)["ci95"][0]
        if low is not None and low > 0.0:
            possible[attack] = float(rivals.mean() - zero.mean())
            gaps[attack] = float(students.mean() - zero.mean()) / possible[attack]
    least = NEGLIGIBLE * max(possible.values(), default=0.0)
    return {attack: gap for attack, gap in gaps.items() if possible[attack] >= least}


def best_attack(results: AttackResults, arm: str, kind: str, attacks: Sequence[str]) -> str | None:
    """The attack with the best accuracy on validation problems."""
    scores = {}
    for attack in attacks:
        cell = results.cells.get((arm, attack, kind))
        if cell is not None and cell.validation is not None:
            scores[attack] = float(cell.validation.correct.mean())
    return max(scores, key=lambda name: scores[name], default=None)


def _gap(
    results: AttackResults,
    arm: str,
    attack: str,
    kind: str,
    draw: dict[str, Any],
    base: tuple[str, str, str] | None = None,
) -> Any:
    clean = results.suite["settings"]["clean"]
    zero = base or (BASE, UNTRAINED, kind)
    found = results.matrices("test", (arm, attack, kind), (clean, attack, kind), zero)
    return None if found is None else recovered_gap(*found, **draw)


def _clean_gain_is_real(results: AttackResults, attack: str, kind: str, draw: dict[str, Any]) -> bool:
    clean = results.suite["settings"]["clean"]
    found = results.matrices("test", (clean, attack, kind), (BASE, UNTRAINED, kind))
    low = gain(*found, **draw)["ci95"][0] if found is not None else None
    return low is not None and low > 0.0


def _not_judged(why: str, found: dict[str, dict[str, str]] | None = None) -> Verdict:
    return {"verdict": "not judged", "finding": f"Not judged: {why}.", "found": found or {}}
