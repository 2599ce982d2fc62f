"""The study in words and as tables: which probes are worth trusting, and which are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_jax.report import words
from distill_jax.report.study_summary import WHEN

TONES = {"predicts": "good", "hints": "", "silent": "bad"}
TITLES = {"before": "Before distillation: forecasts", "after": "After distillation: in hindsight"}
NUMBER_HEADERS = ("number", "verdict", "rank correlation", "p", "p, adjusted", "teachers")
TEACHER_HEADERS = ("teacher", "mode", "eta", "its accuracy", "its students", "above the untrained student")
SHOWN = 12  # numbers of a table before the rest is folded away


def of_when(study: Mapping[str, Any], when: str) -> list[Mapping[str, Any]]:
    """Numbers of "before" or "after", the strongest correlation first."""
    return [number for number in study["numbers"] if number["when"] == when]


def best_of_probes(study: Mapping[str, Any], when: str) -> dict[str, Mapping[str, Any]]:
    """Probe -> its number with the best verdict, then the strongest correlation; the teacher's own numbers last."""
    order = list(TONES)
    best: dict[str, Mapping[str, Any]] = {}
    for number in sorted(of_when(study, when), key=lambda n: (order.index(n["verdict"]), -abs(n["rho"]))):
        best.setdefault(number["probe"], number)
    return {probe: number for probe, number in sorted(best.items(), key=lambda item: item[0] == "teacher")}


def study_sentences(study: Mapping[str, Any]) -> list[str]:
    """What the study says, the answer first."""
    if study["undefined"]:
        return [f"Nothing can be said about what predicts: {study['undefined']}."]
    sentences = [_answer(study)]
    for probe, number in best_of_probes(study, "before").items():
        sentences.append(_of_probe(study, probe, number))
    sentences += _rival(study)
    silent = [probe for probe in study["probes"] if probe not in best_of_probes(study, "before")]
    if silent:
        sentences.append(
            f"No number of {words.enumeration([_plain(p) for p in silent])} differs between teachers before "
            "distillation, so there is nothing that could predict."
        )
    after = [n for n in of_when(study, "after") if n["verdict"] == "predicts"]
    total = len(of_when(study, "after"))
    if total:
        sentences.append(
            f"In hindsight, with the trained student at hand, {len(after)} of {total} numbers go with the outcome"
            + (f"; first of all {_number_text(after[0])}." if after else ".")
        )
    return [*sentences, _caveat(study)]


def _answer(study: Mapping[str, Any]) -> str:
    total = of_when(study, "before")
    trusted = [n for n in total if n["verdict"] == "predicts"]
    probes = [_plain(p) for p in dict.fromkeys(n["probe"] for n in trusted) if p != "teacher"]
    if not trusted:
        return (
            f"No number that is known before distillation predicts the student: 0 of {len(total)} stand after "
            "adjustment for how many were tried."
        )
    said = (
        f"worth trusting: {words.enumeration(probes)}" if probes else "all of them of the teacher by itself"
    )
    return (
        f"{len(trusted)} of {len(total)} numbers that are known before distillation predict the student's accuracy "
        f"after adjustment for how many were tried; {said}."
    )


def _of_probe(study: Mapping[str, Any], probe: str, number: Mapping[str, Any]) -> str:
    verdict = {
        "predicts": "worth trusting",
        "hints": "a hint, not more",
        "silent": "not worth trusting",
    }[number["verdict"]]
    of_probe = [n for n in of_when(study, "before") if n["probe"] == probe]
    standing = sum(n["verdict"] == "predicts" for n in of_probe)
    return (
        f"{_plain(probe).capitalize()}: {verdict}; {standing} of {len(of_probe)} numbers predict, the best is "
        f"{_number_text(number)}."
    )


def _rival(study: Mapping[str, Any]) -> list[str]:
    """Whether the best probe tells more than what needs no probe."""
    best = best_of_probes(study, "before")
    probes = [number for probe, number in best.items() if probe != "teacher"]
    rival = best.get("teacher")
    if rival is None or rival["verdict"] != "predicts" or not probes:
        return []
    strongest = max(abs(number["rho"]) for number in probes)
    ends = [abs(end) for end in rival["ci95"] if end is not None]
    if strongest > max(ends, default=0.0):
        return []
    return [
        f"No probe is clearly better than {rival['name']} of the teacher by itself, which needs no student: within its "
        f"interval lies the best probe's {strongest:.2f} too. One cause may move all of these numbers."
    ]


def _number_text(number: Mapping[str, Any]) -> str:
    way = "higher" if number["rho"] > 0 else "lower"
    return (
        f"{number['name']} (rank correlation {number['rho']:+.2f}, {words.interval(number['ci95'], signed=True)}, "
        f"adjusted p {_p(number['p_adjusted'])}, {number['n']} teachers: where it is high, students are {way})"
    )


def _caveat(study: Mapping[str, Any]) -> str:
    sources = [teacher["source"] for teacher in study["teachers"] if teacher["student"] is not None]
    dial = sources.count("dial")
    return (
        f"{len(sources)} teachers of one original"
        + (f", {dial} of them one adapter turned further or less" if dial else "")
        + f"; {study['kind']} students, {study['samples']:,} samples, {study['steps']:,} steps, "
        f"{study['problems']:,} test problems. The intervals are over teachers like these, and say nothing of another "
        "original or another kind of student."
    )


def _plain(probe: str) -> str:
    return "the teacher by itself" if probe == "teacher" else probe.replace("_", " ")


def _p(value: float) -> str:
    return "below .001" if value < 0.001 else f"{value:.3f}"


def number_rows(study: Mapping[str, Any], when: str) -> list[tuple[str, list[str]]]:
    """(verdict, cells in the columns of `NUMBER_HEADERS`) of every number."""
    return [
        (
            number["verdict"],
            [
                f"{_plain(number['probe'])}: {number['name']}",
                number["verdict"],
                f"{number['rho']:+.2f} ({words.interval(number['ci95'], signed=True)})",
                _p(number["p"]),
                _p(number["p_adjusted"]),
                str(number["n"]),
            ],
        )
        for number in of_when(study, when)
    ]


def left_out(study: Mapping[str, Any], when: str) -> list[str]:
    """What has no correlation, and why."""
    lines = []
    constant, few = study["constant"][when], study["few"][when]
    if constant:
        lines.append(
            f"The same for all teachers, so they cannot predict anything: {', '.join(sorted(constant))}."
        )
    if few:
        lines.append(f"Known for fewer than four teachers: {', '.join(sorted(few))}.")
    return lines


def teacher_rows(study: Mapping[str, Any]) -> list[list[str]]:
    """One row a teacher, the best students first; without students last."""
    rows = sorted(
        study["teachers"], key=lambda t: -2.0 if t["student"] is None else t["student"]["mean"], reverse=True
    )
    return [
        [
            teacher["name"],
            teacher["mode"]
            if teacher["position"] is None
            else f"{teacher['mode']} x {teacher['position']:g}",
            f"{teacher['eta']:g}",
            words.cell(teacher["teacher"]),
            words.cell(teacher["student"]),
            words.cell(teacher["gained"]),
        ]
        for teacher in rows
    ]


def study_text(study: Mapping[str, Any]) -> str:
    """The study for a terminal: sentences, then the strongest numbers."""
    lines = ["", "Does a probe predict?", *(f"  {sentence}" for sentence in study_sentences(study))]
    for when in WHEN:
        rows = [list(NUMBER_HEADERS), *(cells for _, cells in number_rows(study, when)[:SHOWN])]
        if len(rows) == 1:
            continue
        widths = [max(len(row[column]) for row in rows) for column in range(len(NUMBER_HEADERS))]
        lines += ["", TITLES[when]]
        lines += [
            "  " + "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
    return "\n".join(lines)


def page_view(study: Mapping[str, Any]) -> dict[str, Any]:
    """The study as the page shows it."""
    tables = []
    for when in WHEN:
        rows = [(TONES[verdict], cells) for verdict, cells in number_rows(study, when)]
        if rows or left_out(study, when):
            tables.append(
                {
                    "title": TITLES[when],
                    "first": rows[:SHOWN],
                    "rest": rows[SHOWN:],
                    "left_out": left_out(study, when),
                }
            )
    return {
        "sentences": study_sentences(study),
        "headers": NUMBER_HEADERS,
        "tables": tables,
        "teacher_headers": TEACHER_HEADERS,
        "teachers": teacher_rows(study),
        "why_not": [(t["name"], t["why_not"]) for t in study["teachers"] if t["why_not"]],
    }
