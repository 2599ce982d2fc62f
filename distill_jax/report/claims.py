"""The claims of a run, in words, each with its value, its threshold and the budget under which it is made.

A claim is judged on the point estimate; its statement gives the 95 % interval and says whether that interval
excludes the threshold. No statement says "undistillable" without the access, the samples and the steps that the
students had: a longer budget may undo any guard, and the curve over budgets says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from distill_jax.report import words
from distill_jax.report.records import CALIBRATED, DEFAULT_BUDGET, Outcomes, Results, pair
from distill_jax.report.statistics import RESAMPLES, Value, difference, ratio

TEACHER_MARGIN = -0.01  # a calibrated teacher may lose at most one point
GAIN = 1.2  # students of a distillable teacher, relative to gold text and to the original teacher
GUARD = 0.4  # students of an undistillable teacher, relative to those of the original teacher
GUARD_BUDGET = 2.0  # the guard is also judged at twice the default steps
_ROUNDING = 1e-9  # .986 - .996 is a hair below -.01 in binary


@dataclass(frozen=True)
class Setting:
    """What the students were given: part of every claim.

    Attributes:
      samples: number of teacher samples that one student trains on.
      steps: training steps of the default budget (1x).
      student_parameters: student kind -> number of parameters; the order is the order of the report.
      student_descriptions: student kind -> a few words, e.g. "the proxy's tokenizer".
      attack: the attack that the claims are about (its folder's name).
      access: what the attacker sees.
    """

    samples: int
    steps: int
    student_parameters: Mapping[str, int]
    student_descriptions: Mapping[str, str] = field(default_factory=dict)
    attack: str = "sft"
    access: str = "text access"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.steps < 1:
            raise ValueError(f"setting: expected samples and steps >= 1, got {self.samples} and {self.steps}")
        if unknown := set(self.student_descriptions) - set(self.student_parameters):
            raise ValueError(
                f"setting: student_descriptions names {', '.join(sorted(unknown))}, which student_parameters lacks"
            )

    def student(self, kind: str) -> str:
        """'byte students (33,024 parameters, the proxy's tokenizer)'."""
        facts = [f"{self.student_parameters[kind]:,} parameters"] if kind in self.student_parameters else []
        if kind in self.student_descriptions:
            facts.append(self.student_descriptions[kind])
        return f"{kind} students" + (f" ({', '.join(facts)})" if facts else "")

    def budget(self, multiple: float = DEFAULT_BUDGET) -> str:
        """'text access with 6,000 samples and 1,600 training steps (2x the default)'."""
        place = (
            "the default budget"
            if multiple == DEFAULT_BUDGET
            else f"{words.budget_name(multiple)} the default"
        )
        steps = f"{round(self.steps * multiple):,} training steps ({place})"
        return f"{self.access} with {self.samples:,} samples and {steps}"


class Claim(TypedDict):
    """One entry of `claims` in `summary.json`."""

    name: str
    holds: bool
    statement: str
    value: Value
    threshold: float


class CurveClaim(Claim):
    """A guard over budgets: where it first broke (None: nowhere), and the budgets tried from the default upwards."""

    first_break: float | None
    tried: list[float]


def _verdict(value: Value, threshold: float, upper: bool, bound: str, limit: str) -> tuple[bool, str]:
    """Judges mean <= threshold (upper) or mean >= threshold, and says so; `bound` and `limit` are its words."""
    if value["mean"] is None:
        return False, "The ratio is undefined: the students it is measured against answer nothing right."
    mean, (low, high) = value["mean"], value["ci95"]
    holds = mean <= threshold + _ROUNDING if upper else mean >= threshold - _ROUNDING
    outside = (low is not None and low > threshold) or (high is not None and high < threshold)
    return holds, (
        f"The claim, {bound}, {'holds' if holds else 'does not hold'}; "
        f"the interval {'excludes' if outside else 'includes'} {limit}."
    )


@dataclass(frozen=True)
class _Comparison:
    """Two arms' students on the problems and seeds they share: accuracies and the ratio first / second."""

    first: float
    second: float
    ratio: Value
    seeds: int

    def __str__(self) -> str:
        if self.ratio["mean"] is None:
            return "undefined"
        return f"{self.ratio['mean']:.2f} (95 % interval {words.interval(self.ratio['ci95'])})"

    @property
    def within_guard(self) -> bool:
        return self.ratio["mean"] is not None and self.ratio["mean"] <= GUARD + _ROUNDING


class _Judge:
    """Builds the claims from the results; what cannot be judged is said in `unjudged`."""

    def __init__(self, results: Results, setting: Setting, resamples: int, seed: int):
        self.results, self.setting = results, setting
        self.draw: dict[str, Any] = {"resamples": resamples, "seed": seed}
        self.claims: list[Claim] = []
        self.unjudged: list[str] = []

    def cell(self, arm: str, kind: str, budget: float, decoding: str = "greedy") -> Outcomes | None:
        attack = self.setting.attack
        return self.results.students.get((arm, attack, kind), {}).get((budget, decoding))

    def compare(
        self, arm: str, other: str, kind: str, budget: float, decoding: str = "greedy"
    ) -> _Comparison | None:
        """Paired comparison of two arms' students; None when one of them is missing."""
        first, second = self.cell(arm, kind, budget, decoding), self.cell(other, kind, budget, decoding)
        matrices = pair(first, second) if first is not None and second is not None else None
        if matrices is None:
            return None
        above, below = matrices
        value = ratio(above, below, **self.draw)
        return _Comparison(float(above.mean()), float(below.mean()), value, above.shape[0])

    def teacher(self, arm: str) -> None:
        name = f"teacher_accuracy/{arm}"
        first = self.results.teachers.get((arm, "greedy"))
        original = self.results.teachers.get(("original", "greedy"))
        matrices = pair(first, original) if first is not None and original is not None else None
        if matrices is None:
            self.unjudged.append(
                f"claim {name}: the greedy answers of this teacher or of the original are missing"
            )
            return
        value = difference(*matrices, **self.draw)
        holds, verdict = _verdict(
            value, TEACHER_MARGIN, False, "a loss of at most one point", "a loss of one point"
        )
        statement = (
            f"The teacher calibrated in the {arm} mode answers {words.percent(matrices[0].mean())} of "
            f"{value['n']:,} held-out problems greedily, the original {words.percent(matrices[1].mean())}: "
            f"a difference of {words.points(value['mean'])} (95 % interval "
            f"{words.interval(value['ci95'], 100, 1, signed=True)}). {verdict}"
        )
        self.claims.append(_claim(name, holds, statement, value, TEACHER_MARGIN))

    def students(self, name: str, arm: str, other: str, kind: str, budget: float, threshold: float) -> None:
        found = self.compare(arm, other, kind, budget)
        if found is None:
            self.unjudged.append(
                f"claim {name}: greedy answers at {words.budget_name(budget)} are missing for {kind} students "
                f"of {words.ARM_TITLES[arm]} or of {words.ARM_TITLES[other]}"
            )
            return
        upper = threshold < 1.0
        bound = f"{'at most' if upper else 'at least'} {threshold:g}"
        holds, verdict = _verdict(found.ratio, threshold, upper, bound, f"{threshold:g}")
        rival = "gold text for the same steps" if other == "gold" else "samples of the original teacher"
        seeds = f"{found.seeds} seed{'' if found.seeds == 1 else 's'}"
        statement = (
            f"Under {self.setting.budget(budget)}, {self.setting.student(kind)} of the teacher calibrated in "
            f"the {arm} mode reach {words.percent(found.first)} greedy; students trained on {rival} reach "
            f"{words.percent(found.second)}. The ratio is {found} on {found.ratio['n']:,} problems with {seeds}. "
            f"{verdict}"
        )
        beside = self.compare(arm, other, kind, budget, "sample")
        if beside is not None:
            statement += f" At temperature 1 the ratio is {beside}."
        self.claims.append(_claim(name, holds, statement, found.ratio, threshold))

    def curve(self, kind: str) -> None:
        """Where the guard breaks, from the default budget upwards; smaller budgets are reported beside it."""
        name = f"guard_over_budgets/{kind}"
        cells = self.results.students.get(("undistillable", self.setting.attack, kind), {})
        budgets = sorted(budget for budget, decoding in cells if decoding == "greedy")
        compared = {budget: self.compare("undistillable", "original", kind, budget) for budget in budgets}
        known = {budget: found for budget, found in compared.items() if found is not None}
        judged = [budget for budget in known if budget >= DEFAULT_BUDGET]
        if not judged:
            self.unjudged.append(f"claim {name}: no budget from 1x upwards has students of both teachers")
            return
        broken = [budget for budget in judged if not known[budget].within_guard]
        first_break = broken[0] if broken else None
        shown = first_break if first_break is not None else judged[-1]
        if first_break is None:
            finding = f"does not break within the budgets tried (1x and above: {_names(judged)})"
        else:
            before = [budget for budget in judged if budget < first_break]
            finding = f"breaks at {words.budget_name(first_break)} the default steps" + (
                f", after holding at {_names(before)}" if before else ", the first budget judged"
            )
        listed = "; ".join(
            f"{words.budget_name(budget)} ({round(self.setting.steps * budget):,} steps) {found}"
            for budget, found in known.items()
        )
        statement = (
            f"Under {self.setting.access} with {self.setting.samples:,} samples, the guard of the teacher "
            f"calibrated in the undistillable mode against {self.setting.student(kind)} {finding}. A guard breaks "
            f"where these students exceed {GUARD:g} times the greedy accuracy of the original teacher's. "
            f"Ratio by budget: {listed}."
        )
        early = [budget for budget in known if budget < DEFAULT_BUDGET and not known[budget].within_guard]
        if early:
            reached = words.enumeration([words.percent(known[budget].second) for budget in early])
            statement += (
                f" Below the default budget the ratio exceeds {GUARD:g} too, at {_names(early)}; there the "
                f"original teacher's students reach {reached}."
            )
        claim: CurveClaim = {
            **_claim(name, first_break is None, statement, known[shown].ratio, GUARD),
            "first_break": first_break,
            "tried": judged,
        }
        self.claims.append(claim)


def _claim(name: str, holds: bool, statement: str, value: Value, threshold: float) -> Claim:
    return {
        "name": name,
        "holds": bool(holds),
        "statement": statement,
        "value": value,
        "threshold": threshold,
    }


def _names(budgets: list[float]) -> str:
    return words.enumeration([words.budget_name(budget) for budget in budgets])


def student_kinds(results: Results, setting: Setting) -> list[str]:
    """Student kinds in the order of the report: those of the setting first, then others that were found."""
    found = {kind for _, _, kind in results.students}
    return [*setting.student_parameters, *sorted(found - set(setting.student_parameters))]


def make_claims(
    results: Results, setting: Setting, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[Claim], list[str]]:
    """All claims that the results can judge, and the ones they cannot, in words.

    Names: `teacher_accuracy/<arm>` (difference to the original >= -0.01); and for every student kind, greedy:
    `students_beat_gold/<kind>` and `students_beat_original/<kind>` (ratio >= 1.2, distillable mode),
    `guard_at_1x/<kind>` and `guard_at_2x/<kind>` (ratio <= 0.4, undistillable mode), and
    `guard_over_budgets/<kind>` (the ratio where it first exceeds 0.4, or at the largest budget tried).

    Args:
      results: from `read_results`. setting: what the students were given.
      resamples, seed: of the bootstrap.
    """
    judge = _Judge(results, setting, resamples, seed)
    for arm in CALIBRATED:
        judge.teacher(arm)
    if not results.students:
        judge.unjudged.append("claims about students: no students have been evaluated")
        return judge.claims, judge.unjudged
    for kind in student_kinds(results, setting):
        judge.students(f"students_beat_gold/{kind}", "distillable", "gold", kind, DEFAULT_BUDGET, GAIN)
        judge.students(
            f"students_beat_original/{kind}", "distillable", "original", kind, DEFAULT_BUDGET, GAIN
        )
        for budget in (DEFAULT_BUDGET, GUARD_BUDGET):
            name = f"guard_at_{words.budget_name(budget)}/{kind}"
            judge.students(name, "undistillable", "original", kind, budget, GUARD)
        judge.curve(kind)
    return judge.claims, judge.unjudged


def group_status(claims: list[dict[str, Any]], *prefixes: str) -> str:
    """'all', 'none', 'some' or 'unjudged': how the claims whose name starts with one of `prefixes` came out."""
    held = [claim["holds"] for claim in claims if claim["name"].partition("/")[0] in prefixes]
    if not held:
        return "unjudged"
    return "all" if all(held) else "some" if any(held) else "none"
