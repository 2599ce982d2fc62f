"""The study in the report: hand-made teachers whose one number orders the students, and what the page says of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from distill_jax.report import write_report
from distill_jax.report.study_plots import study_plots
from distill_jax.report.study_summary import summarise_study, teacher_numbers
from distill_jax.report.study_table import study_sentences, study_text
from distill_jax.report.summary import strict_json

PROBLEMS = 40
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SUITE = {"kind": "byte", "seeds": 1, "samples": 64, "steps": 8, "problems": PROBLEMS}


def answers(rate: float) -> list[int]:
    return [int(problem < round(rate * PROBLEMS)) for problem in range(PROBLEMS)]


def metrics(**values: float | None) -> dict[str, Any]:
    return {
        "metrics": {name.replace("__", "."): {"mean": v, "ci95": [None, None], "n": 4, "seeds": None}
                    for name, v in values.items()}
    }  # fmt: skip


def write_study(folder: Path, rates=RATES, teachers_without: int = 0) -> Path:
    """Teachers whose gap falls as their students get better, whose overlap jumps, and whose accuracy is the same."""
    probes = ["gap", "overconfidence", "self_correction"]
    jumps = [3, 1, 4, 1.5, 9, 2, 6, 5]
    for index, rate in enumerate(rates):
        source = "dial" if index == 1 else "study"
        name = f"distillable-eta{index}-seed1"
        before = {
            "gap": metrics(
                forward=-(rate**2), top_k_overlap__all=jumps[index], rare=1.0 if index < 2 else None
            ),
            "overconfidence": metrics(accuracy__before=0.2),
            "self_correction": metrics(),
        }
        after = {
            "gap": metrics(forward=rate),
            "overconfidence": metrics(
                accuracy__after=rate, expected_calibration_error__after=1 - rate, risk_coverage__change=-rate
            ),
        }
        trained = None if index < teachers_without else {d: [answers(rate)] for d in ("greedy", "sample")}
        point = {
            "name": name, "source": source, "mode": "distillable", "eta": 0.5, "seed": 1,
            "position": -0.5 if source == "dial" else None,
            "teacher": {"greedy": answers(0.9), "sample": answers(0.8)},
            "gap_per_byte": [None] * PROBLEMS, "bytes": [20 + index] * PROBLEMS,
            "student": trained, "kept": [64], "why_not": None if trained else "texts <b>do not</b> fit",
            "before": before, "after": None if source == "dial" else after,
        }  # fmt: skip
        path = folder / "study" / name / "point.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(point))
    untrained = {"student": {d: [answers(0.1)] for d in ("greedy", "sample")}}
    (folder / "study" / "untrained.json").write_text(json.dumps(untrained))
    (folder / "study" / "suite.json").write_text(json.dumps({**SUITE, "probes": probes}))
    return folder


def test_a_planted_number_predicts_and_others_do_not(tmp_path):
    study = summarise_study(write_study(tmp_path))
    numbers = {(n["when"], n["probe"], n["name"]): n for n in study["numbers"]}
    planted = numbers["before", "gap", "forward"]
    assert planted["rho"] == pytest.approx(-1.0) and planted["n"] == 8 and planted["verdict"] == "predicts"
    assert planted["p"] < planted["p_adjusted"] < 0.01
    assert numbers["before", "gap", "top_k_overlap.all"]["verdict"] == "silent"
    assert numbers["before", "teacher", "completion_bytes"]["rho"] == pytest.approx(1.0)
    assert numbers["after", "gap", "forward"]["n"] == 7  # the dial keeps no students
    # What is the outcome itself, what is always the same and what two teachers have is no forecast.
    assert not [name for when, probe, name in numbers if (when, probe) == ("after", "overconfidence")]
    assert set(study["constant"]["before"]) == {
        "overconfidence/accuracy.before", "teacher/accuracy_greedy", "teacher/accuracy_sample",
    }  # fmt: skip
    assert study["few"]["before"] == ["gap/rare"]
    assert study["untrained"]["mean"] == pytest.approx(0.1)
    teacher = study["teachers"][3]
    assert teacher["student"]["mean"] == pytest.approx(0.4) and teacher["gained"]["mean"] == pytest.approx(
        0.3
    )


def test_words_name_what_to_trust(tmp_path):
    sentences = study_sentences(summarise_study(write_study(tmp_path)))
    assert sentences[0].startswith("2 of 3 numbers that are known before distillation predict")
    assert sentences[0].endswith("worth trusting: gap.")
    assert any(
        s.startswith("Gap: worth trusting; 1 of 2 numbers predict, the best is forward") for s in sentences
    )
    assert any(
        "No number of overconfidence and self correction differs between teachers" in s for s in sentences
    )
    assert any("1 of 1 numbers go with the outcome" in s for s in sentences)
    # The length of the teacher's own texts orders these students as well, and needs no probe.
    assert any(s.startswith("No probe is clearly better than completion_bytes") for s in sentences)
    assert "8 teachers of one original, 1 of them one adapter turned" in sentences[-1]


def test_too_few_teachers_or_equal_students_are_said_in_words(tmp_path):
    few = summarise_study(write_study(tmp_path / "few", RATES[:3]))
    assert few["numbers"] == [] and "only 3 teachers have students" in study_sentences(few)[0]
    equal = summarise_study(write_study(tmp_path / "equal", (0.5,) * 6))
    assert "equally accurate" in study_sentences(equal)[0]
    json.dumps([few, equal], allow_nan=False)
    assert study_plots({"study": few}) == []


def test_a_teacher_without_students_is_shown_and_not_counted(tmp_path, working):
    study = strict_json(summarise_study(write_study(tmp_path, teachers_without=2)))
    assert {n["n"] for n in study["numbers"] if n["when"] == "before"} == {6}
    (tmp_path / "arms").mkdir()
    page = write_report(tmp_path, {**working[1], "study": study}).read_text()
    assert '<h2 id="study">' in page and "texts &lt;b&gt;do not&lt;/b&gt; fit" in page
    assert '<figure id="figure-study_gap">' in page and "What has no rank" in page
    with open(tmp_path / "report" / "plots" / "study_gap.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and float(rows[0]["value"]) == pytest.approx(-0.09)
    assert float(rows[0]["student_accuracy"]) == pytest.approx(0.3)
    assert (tmp_path / "report" / "plots" / "study_gap.png").read_bytes()[:4] == b"\x89PNG"
    text = study_text(study)
    assert "Does a probe predict?" in text and "Before distillation: forecasts" in text


def test_no_study_no_section(tmp_path, working):
    assert summarise_study(tmp_path) is None and study_plots(working[1]) == []
    assert '<h2 id="study">' not in write_report(tmp_path, working[1]).read_text()
    path = tmp_path / "study" / "x" / "point.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"point.json: expected a teacher of the study"):
        summarise_study(tmp_path)


def test_numbers_of_a_teacher(tmp_path):
    write_study(tmp_path, RATES[:1])
    (path,) = tmp_path.glob("study/*/point.json")
    point = json.loads(path.read_text())
    point["gap_per_byte"] = [2.0, None, 4.0]
    assert teacher_numbers(point, "before")["teacher/gap_per_byte"] == 3.0
    assert teacher_numbers({**point, "after": None}, "after") == {}
