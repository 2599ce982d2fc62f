"""The attack suite as one table (attack x arm, intervals) for a terminal, and as what the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_jax.report import words

VERDICTS = {
    "valid": "The suite's own controls passed.",
    "not validated": "The suite's own controls do not prove every access: where they do not, numbers are provisional.",
    "invalid": "THE EVALUATION IS INVALID: a positive control failed, so these attacks prove nothing.",
}


def table_arms(attacks: Mapping[str, Any]) -> list[str]:
    """Columns: the clean arm first."""
    return [attacks["clean"], *(arm for arm in attacks["arms"] if arm != attacks["clean"])]


def gap_text(value: Mapping[str, Any] | None) -> str:
    """A recovered gap: '0.12 [0.03, 0.21]'."""
    if value is None:
        return "-"
    if value["mean"] is None:
        return "undefined"
    low, high = ("unbounded" if end is None else f"{end:.2f}" for end in value["ci95"])
    return f"{value['mean']:.2f} [{low}, {high}]"


def attack_rows(attacks: Mapping[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of one kind of student: accuracy in per cent of the clean teacher's, recovered gap elsewhere."""
    arms = table_arms(attacks)
    headers = ["attack", "access", f"{_title(arms[0])}, accuracy", *(_title(arm) for arm in arms[1:])]
    cells, rows = attacks["cells"].get(kind, {}), []
    if "A0" in cells:
        accuracy = words.cell(cells["A0"]["base"]["accuracy"])
        rows.append(["A0 untrained student", "-", accuracy, *["0"] * (len(arms) - 1)])
    for attack, facts in attacks["attacks"].items():
        found = cells.get(attack, {})
        if attack == "A0" or not found:
            continue
        title = f"{attack} {facts['name']}"
        if "gold" in found:
            rows.append([title, "none", words.cell(found["gold"]["accuracy"]), *["-"] * (len(arms) - 1)])
            continue
        line = [title, facts["access"], words.cell(found.get(arms[0], {}).get("accuracy"))]
        for arm in arms[1:]:
            line.append(_gap_cell(found.get(arm)))
        rows.append(line)
    return headers, rows


def _gap_cell(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return "-"
    if not numbers.get("clean_gains", True):
        return f"no clean gain ({words.cell(numbers['accuracy'])} %)"
    return gap_text(numbers.get("recovered_gap"))


def detail_rows(attacks: Mapping[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of what else is known of each attack on each teacher.

    Points are per cent of the test problems. p: of "no better than the untrained student", Holm-adjusted over the
    attacks on this teacher. The absolute gap is measured against the clean teacher itself.
    """
    headers = ["attack", "teacher", "accuracy", "gain, points", "p (Holm)", "gap to control", "absolute gap"]
    headers += ["collapse", "seeds below untrained"]
    rows = []
    for attack, found in attacks["cells"].get(kind, {}).items():
        for arm in table_arms(attacks):
            numbers = found.get(arm)
            if numbers is None or "gain" not in numbers:
                continue
            harm, p_value = numbers["harm_below_base"], numbers.get("gain_p_holm")
            rows.append(
                [
                    attack,
                    _title(arm),
                    words.cell(numbers["accuracy"]),
                    words.cell(numbers["gain"]),
                    "-" if p_value is None else f"{p_value:.2g}",
                    *(
                        gap_text(numbers.get(name))
                        for name in ("against_control", "absolute_gap", "relative_collapse")
                    ),
                    f"{harm['count']} of {harm['total']}",
                ]
            )
    return headers, rows


def worst_rows(attacks: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the worst case of each kind of student, teacher and access."""
    headers = ["students", "teacher", "access", "worst attack", "recovered gap", "gain denied"]
    rows = [
        [
            kind,
            _title(arm),
            level["access"],
            f"{level['attack']} {level['knob']}",
            gap_text(level["recovered_gap"]),
            gap_text(level["gain_denied"]),
        ]
        for kind, arms in attacks["worst_case"].items()
        for arm, levels in arms.items()
        for level in levels
    ]
    return headers, rows


def proof_sentences(attacks: Mapping[str, Any]) -> list[str]:
    """For each kind of student and access, what the controls show."""
    return [
        f"{kind} students with {access} access: {proof['why']}"
        for kind, levels in attacks["proofs"].items()
        for access, proof in levels.items()
    ]


def effect_sentence(attacks: Mapping[str, Any]) -> str:
    """The smallest difference that two students can be told apart by; "" without test problems."""
    effect = attacks["minimum_detectable_effect"]
    if effect is None:
        return ""
    return (
        f"Two single students must differ by about {100 * effect:.0f} points on {attacks['problems']} problems to be "
        "told apart (80 % power)."
    )


def heat_map(attacks: Mapping[str, Any], kind: str) -> dict[str, dict[str, float]]:
    """attack -> arm -> recovered gap cut to [0, 1]: the numbers behind the colours; cells without one are absent."""
    shades: dict[str, dict[str, float]] = {}
    for attack, found in attacks["cells"].get(kind, {}).items():
        for arm, numbers in found.items():
            share = shade(numbers.get("recovered_gap"))
            if share is not None and numbers.get("clean_gains", True):
                shades.setdefault(attack, {})[arm] = share
    return shades


def shade(gap: Mapping[str, Any] | None) -> float | None:
    """A recovered gap cut to [0, 1], None where it is undefined."""
    return None if gap is None or gap["mean"] is None else min(1.0, max(0.0, gap["mean"]))


def shaded_rows(
    attacks: Mapping[str, Any], kind: str
) -> tuple[list[str], list[list[tuple[str, float | None]]]]:
    """`attack_rows` with the shade of each cell, None for none."""
    headers, rows = attack_rows(attacks, kind)
    shades, arms = heat_map(attacks, kind), table_arms(attacks)
    plain = len(headers) - len(arms) + 1  # columns before the attacked arms
    shaded = []
    for row in rows:
        of_attack = shades.get(row[0].split()[0], {})
        shaded.append(
            [
                (text, None if column < plain else of_attack.get(arms[column - plain + 1]))
                for column, text in enumerate(row)
            ]
        )
    return headers, shaded


def control_rows(attacks: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(id and name, verdict, finding, sentence) of every control."""
    return [
        (f"{name} {control['name']}", control["verdict"], control["finding"], control["sentence"])
        for name, control in attacks["controls"].items()
    ]


def retention_rows(attacks: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(arm, retention, difference in points, verdict of the non-inferiority test)."""
    rows = []
    for arm, found in attacks["retention"].items():
        points = found["difference"]
        verdict = "not inferior" if found["not_inferior"] else "not shown to be within the margin"
        rows.append(
            (
                _title(arm),
                gap_text(found["ratio"]),
                f"{words.points(points['mean'])} ({words.interval(points['ci95'], 100, 1, signed=True)})",
                f"{verdict} of {100 * found['margin']:g} points (p = {found['p_value']:.3g})",
            )
        )
    return rows


def cost_sentences(attacks: Mapping[str, Any]) -> list[str]:
    """How many times the steps each arm's students need for half of the clean gain."""
    sentences = []
    for kind, arms in attacks["cost"].items():
        for arm, cost in arms.items():
            who = f"{kind} students of '{_title(arm)}'"
            score = words.percent(cost["score"])
            bound = " or more" if cost["first"] else ""
            if cost["clean"] is None:
                continue
            if cost["multiplier"]["mean"] is not None:
                sentences.append(
                    f"{who} need {gap_text(cost['multiplier'])} times the steps{bound} for {score}."
                )
            elif cost["at_least"] is not None:
                sentences.append(
                    f"{who} do not reach {score} within the budgets that all seeds had: more than "
                    f"{cost['at_least']:.2g} times the steps of the clean teacher's."
                )
    return sentences


def attack_text(attacks: Mapping[str, Any]) -> str:
    """The suite for a terminal."""
    lines = ["", "Attacks", f"  {VERDICTS[attacks['verdict']]}"]
    for name, verdict, finding, _ in control_rows(attacks):
        lines.append(f"  {verdict.upper() if verdict == 'failed' else verdict:<11} {name}: {finding}")
    lines += [f"  {sentence}" for sentence in proof_sentences(attacks)]
    for kind in attacks["kinds"]:
        what = "recovered gap [95 % interval] on test problems, knobs chosen on validation"
        lines += ["", f"{kind} students: {what}", *_columns(*attack_rows(attacks, kind))]
        lines += [
            "",
            f"{kind} students: more numbers of the same cells",
            *_columns(*detail_rows(attacks, kind)),
        ]
    headers, rows = worst_rows(attacks)
    if rows and attacks["headlines"]:  # under a failed control there is no worst case to speak of
        lines += ["", "Worst case of each access, chosen on validation problems", *_columns(headers, rows)]
    lines += ["", *(f"  {_capital(sentence)}" for sentence in attacks["headlines"])]
    lines += [
        f"  {arm}: {kept}, {points}; {verdict}" for arm, kept, points, verdict in retention_rows(attacks)
    ]
    lines += [
        f"  {sentence}" for sentence in [*cost_sentences(attacks), effect_sentence(attacks)] if sentence
    ]
    if attacks["skipped"]:
        lines += [
            "",
            "Attacks that were not run",
            *(f"  {what}: {why}" for what, why in attacks["skipped"].items()),
        ]
    return "\n".join(lines)


def _columns(headers: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table for a terminal."""
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (headers, ["-" * width for width in widths], *rows)
    ]


def page_view(attacks: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    return {
        "verdict": attacks["verdict"],
        "verdict_text": VERDICTS[attacks["verdict"]],
        "headlines": [_capital(sentence) for sentence in attacks["headlines"]],
        "controls": control_rows(attacks),
        "proofs": proof_sentences(attacks),
        "tables": [
            (kind, *shaded_rows(attacks, kind), *detail_rows(attacks, kind)) for kind in attacks["kinds"]
        ],
        "worst": worst_rows(attacks),
        "retention": retention_rows(attacks),
        "costs": cost_sentences(attacks),
        "entries": [
            (f"{name} {facts['name']}", facts["access"], facts["sentence"])
            for name, facts in attacks["attacks"].items()
        ],
        "skipped": list(attacks["skipped"].items()),
        "problems": attacks["problems"],
        "seeds": attacks["seeds"],
        "effect": effect_sentence(attacks),
    }


def _title(arm: str) -> str:
    return words.ARM_TITLES.get(arm, arm)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
