"""The dial in the report: order and breaks on hand-made positions, and what the page, the plots and the words say."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_jax.report import write_report
from distill_jax.report.dial_plots import dial_plots
from distill_jax.report.dial_summary import summarise_dial
from distill_jax.report.dial_table import dial_rows, dial_sentences, dial_text
from distill_jax.report.summary import strict_json

PROBLEMS = 200


def answers(rate: float) -> list[int]:
    """The first `rate` of the problems right."""
    return [int(problem < round(rate * PROBLEMS)) for problem in range(PROBLEMS)]


def write_dial(
    folder: Path,
    students: dict[float, float | None],
    teachers: dict[float, float] | None = None,
    arm: str = "distillable",
    seeds: int = 1,
) -> Path:
    """WORKDIR/dial with one curve. students: position -> rate of right answers, None where none was trained."""
    suite = {"arm": arm, "other": "", "kind": "byte", "seeds": seeds, "samples": 64, "steps": 8}
    suite |= {"problems": PROBLEMS, "floor": 0.01, "curves": {arm: list(students)}}
    (folder / "dial" / arm).mkdir(parents=True)
    (folder / "dial" / "suite.json").write_text(json.dumps(suite))
    for position, rate in students.items():
        teacher = answers((teachers or {}).get(position, 0.95))
        trained = None if rate is None else {d: [answers(rate)] * seeds for d in ("greedy", "sample")}
        point: dict[str, Any] = {
            "position": position,
            "teacher": {"greedy": teacher, "sample": teacher},
            "gap_per_byte": [1.0 + position] * 3 + [None] * (PROBLEMS - 3),
            "bytes": [20] * PROBLEMS,
            "style": ["explicit", *["folded"] * (PROBLEMS - 1)],
            "student": trained,
            "kept": [64] * seeds,
            "why_not": "the texts <b>do not fit</b>" if rate is None else None,
        }
        (folder / "dial" / arm / f"scale{position:g}.json").write_text(json.dumps(point))
    return folder


def curve_of(dial: dict[str, Any] | None) -> dict[str, Any]:
    assert dial is not None
    return dial["curves"][dial["arm"]]


def test_monotone_is_read_off_pairs(tmp_path):
    dial = summarise_dial(write_dial(tmp_path, {-1.0: 0.1, 0.0: 0.5, 1.0: 0.9}), resamples=500)
    curve = curve_of(dial)
    assert (curve["rises"], curve["falls"], curve["pairs"]) == (3, 0, 3)
    assert curve["monotone"] and curve["stretch"] == [-1.0, 1.0] and curve["broken"] == []
    assert (
        "No reversal seen: student accuracy goes up with the dial in 3 of 3 pairs"
        in dial_sentences(dial, "distillable")[0]
    )


def test_where_it_turns_back(tmp_path):
    """0.1, 0.5, 0.9, 0.4: three pairs fall short of what 1 reached; the longest stretch without a fall ends at 1."""
    students = {-0.5: 0.1, 0.0: 0.5, 1.0: 0.9, 1.5: 0.4}
    dial = summarise_dial(write_dial(tmp_path, students), resamples=500)
    curve = curve_of(dial)
    assert (curve["rises"], curve["falls"], curve["monotone"]) == (4, 2, False)
    assert curve["stretch"] == [-0.5, 1.0]
    assert (
        "The longest stretch without such a pair is from -0.5 to 1." in dial_sentences(dial, "distillable")[0]
    )


def test_the_undistillable_adapter_promises_the_other_way(tmp_path):
    dial = summarise_dial(
        write_dial(tmp_path, {0.0: 0.9, 0.5: 0.5, 1.0: 0.1}, arm="undistillable"), resamples=500
    )
    curve = curve_of(dial)
    assert curve["direction"] == -1 and curve["monotone"] and curve["falls"] == 3
    assert "goes down with the dial in 3 of 3" in dial_sentences(dial, "undistillable")[0]


def test_differences_within_the_noise_are_no_order(tmp_path):
    dial = summarise_dial(write_dial(tmp_path, {0.0: 0.5, 0.1: 0.5, 0.25: 0.5}), resamples=500)
    curve = curve_of(dial)
    assert (curve["rises"], curve["falls"], curve["monotone"]) == (0, 0, False)
    assert "the dial shows no effect" in dial_sentences(dial, "distillable")[0]


def test_a_broken_teacher_and_a_position_without_students(tmp_path):
    students = {-1.0: None, 0.0: 0.5, 1.0: 0.9}
    folder = write_dial(tmp_path, students, {-1.0: 0.2, 1.0: 0.94})
    dial = summarise_dial(folder, resamples=500)
    curve = curve_of(dial)
    assert curve["broken"] == [-1.0] and curve["pairs"] == 1  # 1 point lost is not more than 1 point
    assert curve["points"][0]["loss"]["mean"] == pytest.approx(-0.75)
    text = " ".join(dial_sentences(dial, "distillable"))
    assert "breaks, by more than 1 point of greedy accuracy against position 0, at -1 (-75.0 points" in text
    assert "At -1 no student was trained: the texts" in text
    assert "do not hold the luck of a training run" in text
    assert dial_rows(dial, "distillable")[0][-2:] == ["-", "-"]
    assert dial_rows(dial, "distillable")[0][3:6] == [
        "+0.00 (+0.00 to +0.00)",
        "20",
        "folded 100 %, explicit 0 %",
    ]
    assert "The dial: the scale of the distillable adapter" in dial_text(dial)


def test_a_loss_within_the_interval_is_no_break_yet(tmp_path):
    """Two points of 100 problems lost, where one is allowed: the interval says that it may be none."""
    folder = write_dial(tmp_path, {0.0: 0.5, 1.0: 0.9}, {1.0: 0.93})
    dial = summarise_dial(folder, resamples=500)
    assert curve_of(dial)["broken"] == [1.0]
    text = dial_sentences(dial, "distillable")[1]
    assert text.startswith("It may break, by more than 1 point") and "breaks" not in text


def test_seeds_widen_the_interval_only_by_what_they_differ(tmp_path):
    dial = summarise_dial(write_dial(tmp_path, {0.0: 0.5, 1.0: 0.9}, seeds=2), resamples=500)
    assert curve_of(dial)["points"][0]["student_greedy"]["seeds"] == [0.5, 0.5]
    assert dial_sentences(dial, "distillable")[-1].startswith("2 byte students a position")


def test_page_and_plots(tmp_path, working):
    _, summary = working
    dial = strict_json(summarise_dial(write_dial(tmp_path, {-1.0: None, 0.0: 0.5, 1.0: 0.9}), resamples=500))
    plots = dial_plots({"dial": dial})
    assert [plot.name for plot in plots] == ["dial_distillable_accuracy", "dial_distillable_gap"]
    assert {row[1] for row in plots[0].rows} == {"teacher_greedy", "student_greedy", "student_sample"}
    (tmp_path / "arms").mkdir()
    page = write_report(tmp_path, {**summary, "dial": dial}).read_text()
    assert '<figure id="figure-dial_distillable_gap">' in page and "&lt;b&gt;do not fit" in page
    with open(tmp_path / "report" / "plots" / "dial_distillable_accuracy.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["number"] == "student_greedy"]
    assert [(float(row["position"]), float(row["mean"])) for row in rows] == [(0.0, 0.5), (1.0, 0.9)]


def test_no_dial_no_section(tmp_path, working):
    assert summarise_dial(tmp_path) is None and dial_plots(working[1]) == []
    (tmp_path / "dial" / "distillable").mkdir(parents=True)
    suite = {"arm": "distillable", "other": "", "curves": {"distillable": [0.0, 1.0]}}
    (tmp_path / "dial" / "suite.json").write_text(json.dumps(suite))
    assert summarise_dial(tmp_path) is None  # started, and nothing finished
    (tmp_path / "dial" / "distillable" / "scale0.json").write_text('{"position": 0.0}')
    with pytest.raises(ValueError, match=r"scale0.json: expected a position of the dial"):
        summarise_dial(tmp_path)


def test_intervals_are_those_of_the_problems(tmp_path):
    """A rate of .5 on 200 problems: 1.96 * sqrt(.25 / 200) = .069 a side."""
    dial = summarise_dial(write_dial(tmp_path, {0.0: 0.5, 1.0: 0.9}))
    low, high = curve_of(dial)["points"][0]["student_greedy"]["ci95"]
    assert np.allclose([low, high], [0.5 - 0.069, 0.5 + 0.069], atol=0.012)
