"""The answer first: did the knob work, at what cost to the teacher, at what budget; in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_jax.report import words
from distill_jax.report.claims import GUARD, Setting, group_status

_DIRECTION_WORDS = {
    "all": "worked",
    "some": "worked in part",
    "none": "did not work",
    "unjudged": "cannot be judged yet",
}


@dataclass(frozen=True)
class Answer:
    """A headline, its tone ("good", "mixed", "bad" or "open") and the sentences under it."""

    headline: str
    tone: str
    sentences: list[str]


def _setting(summary: Mapping[str, Any]) -> Setting:
    names = Setting.__dataclass_fields__
    return Setting(**{name: value for name, value in summary["setting"].items() if name in names})


def _headline(easier: str, guard: str, cost: str) -> tuple[str, str]:
    if easier == guard == "unjudged":
        return "Not judged yet: the results that the claims need are missing", "open"
    if easier == guard == "all":
        if cost in ("some", "none"):
            return (
                "The knob worked in both directions at the stated budget, but cost a teacher over one point",
                "mixed",
            )
        return "The knob worked in both directions at the stated budget", "good"
    if easier == guard == "none":
        return "The knob did not work in either direction", "bad"
    sentence = (
        f"Making the teacher easier to distil {_DIRECTION_WORDS[easier]}; "
        f"guarding it against distillation at the default budget {_DIRECTION_WORDS[guard]}"
    )
    return sentence, "open" if "unjudged" in (easier, guard) else "mixed"


def _students(summary: Mapping[str, Any], setting: Setting, kind: str) -> str | None:
    """What the students of one kind reach, from the guarded teacher to the distillable one."""
    names = {
        "undistillable": "the undistillable mode",
        "original": "the original",
        "distillable": "the distillable mode",
    }
    greedy = words.metric_name("greedy")
    parts = []
    for arm, name in names.items():
        value = summary["arms"][arm]["students"].get(setting.attack, {}).get(kind, {}).get(greedy)
        if value is not None:
            parts.append(f"{words.percent(value['mean'])} after {name}")
    if not parts:
        return None
    beside = []
    for baseline, label in (("gold_sft", "after gold text"), ("base_student", "untrained")):
        value = summary["baselines"][baseline].get(kind, {}).get(greedy)
        if value is not None:
            beside.append(f"{words.percent(value['mean'])} {label}")
    return (
        f"{kind} students after {setting.steps:,} steps on {setting.samples:,} text samples: "
        f"{words.enumeration(parts)}{f' ({words.enumeration(beside)})' if beside else ''}."
    )


def _cost(claims: list[dict[str, Any]]) -> str | None:
    teachers = [claim for claim in claims if claim["name"].startswith("teacher_accuracy/")]
    if not teachers:
        return None
    parts = [
        f"{words.points(claim['value']['mean'])} in {claim['name'].partition('/')[2]} mode "
        f"[{words.interval(claim['value']['ci95'], 100, 1, signed=True)}]"
        for claim in teachers
    ]
    kept = all(claim["holds"] for claim in teachers)
    margin = "within the margin of one point" if kept else "more than the margin of one point was lost"
    return f"Cost to the teacher, against the original: {words.enumeration(parts)}; {margin}."


def _budgets(claims: list[dict[str, Any]], setting: Setting) -> list[str]:
    """Where the guard breaks, from the claims over budgets; kinds with the same finding share a sentence."""
    kinds: dict[tuple[float | None, float], list[str]] = {}
    for claim in claims:
        if claim["name"].startswith("guard_over_budgets/"):
            finding = (claim["first_break"], claim["tried"][-1])
            kinds.setdefault(finding, []).append(claim["name"].partition("/")[2])
    limit = f"{GUARD:g} times the accuracy of the original's students"
    sentences = []
    for (first_break, largest), names in kinds.items():
        who = f"{words.enumeration(names)} students"
        if first_break is None:
            sentences.append(
                f"Budget: the guard keeps {who} within {limit} up to {round(setting.steps * largest):,} steps "
                f"({words.budget_name(largest)}), the largest budget tried; a longer one may still break it."
            )
        else:
            place = "the default" if first_break == 1.0 else f"{words.budget_name(first_break)} the default"
            sentences.append(
                f"Budget: the guard against {who} breaks at {round(setting.steps * first_break):,} steps ({place}), "
                f"where they exceed {limit}."
            )
    return sentences


def has_accuracies(summary: Mapping[str, Any]) -> bool:
    """Whether any teacher or student has answered the test problems."""
    arms = summary["arms"].values()
    return any(arm["students"] or any(name.startswith("accuracy") for name in arm["teacher"]) for arm in arms)


def only_probes(summary: Mapping[str, Any]) -> bool:
    """Whether the run asked nothing but what the probes measure: it has a diagnosis, and no claims to judge."""
    return "diagnosis" in summary and not has_accuracies(summary)


def _traps(summary: Mapping[str, Any]) -> Answer:
    """What the probes found, for a run that did nothing else."""
    sentences, verdicts = [], set()
    for arm, kinds in summary["diagnosis"].items():
        for kind, findings in kinds.items():
            shown = {
                verdict: [f["name"].replace("_", " ") for f in findings if f["verdict"] == verdict]
                for verdict in ("found", "suspected")
            }
            verdicts |= {verdict for verdict, names in shown.items() if names}
            parts = [f"{verdict}: {words.enumeration(names)}" for verdict, names in shown.items() if names]
            finding = "; ".join(parts) or "no trap found or suspected"
            sentences.append(f"{kind} students of the {arm} teacher: {finding}.")
    if "found" in verdicts:
        return Answer("The probes found traps between this teacher and this student", "bad", sentences)
    if verdicts:
        return Answer("The probes suspect traps, on too few problems to be sure", "mixed", sentences)
    return Answer("The probes found no trap between this teacher and this student", "good", sentences)


def answer(summary: Mapping[str, Any]) -> Answer:
    """The answer of a run from its summary; says so where results are missing."""
    if only_probes(summary):
        return _traps(summary)
    claims, setting = summary["claims"], _setting(summary)
    easier = group_status(claims, "students_beat_gold", "students_beat_original")
    guard = group_status(claims, "guard_at_1x")
    headline, tone = _headline(easier, guard, group_status(claims, "teacher_accuracy"))
    kinds = [*setting.student_parameters]
    sentences = [_students(summary, setting, kind) for kind in kinds]
    sentences += [_cost(claims)]
    sentences += _budgets(claims, setting)
    test = summary["setting"]["test_problems"]
    if test:
        effect = summary["setting"]["minimum_detectable_effect"]
        sentences.append(
            f"{test:,} held-out problems: two single students must differ by about {100 * effect:.0f} points "
            "to be told apart (80 % power); intervals pair the arms by problem and seed."
        )
    if summary["missing"]:
        count = len(summary["missing"])
        sentences.append(f"{count} thing{'s are' if count > 1 else ' is'} missing; see the list below.")
    return Answer(headline, tone, [sentence for sentence in sentences if sentence])
