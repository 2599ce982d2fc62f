"""Claims that hold, claims that fail, and what their sentences must say."""

from __future__ import annotations

import re

import numpy as np
import pytest

from distill_jax.report.answer import answer
from distill_jax.report.claims import Setting, group_status, make_claims
from distill_jax.report.records import Outcomes, Results
from tests.report.synthetic import SETTING

ONE_KIND = Setting(samples=100, steps=10, student_parameters={"byte": 1000})


def share(rate: float, seeds: int = 3, problems: int = 100) -> Outcomes:
    """The first `rate` of the problems right, in every seed."""
    row = (np.arange(problems) < round(rate * problems)).astype(float)
    return Outcomes(tuple(range(problems)), tuple(range(seeds)), np.tile(row, (seeds, 1)))


def results(students=(), teachers=()) -> Results:
    """Greedy results: students as (arm, budget, rate), teachers as (arm, rate)."""
    cells: dict = {}
    for arm, budget, rate in students:
        cells.setdefault((arm, "sft", "byte"), {})[budget, "greedy"] = share(rate)
    judged = {(arm, "greedy"): share(rate, seeds=1) for arm, rate in teachers}
    return Results(judged, cells, {}, {}, {})


def by_name(found: Results) -> dict:
    claims, _ = make_claims(found, ONE_KIND, resamples=400)
    return {claim["name"]: claim for claim in claims}


def guard_curve(*ratios: tuple[float, float]) -> dict:
    """The claim over budgets when the original's students reach .5 and the guarded ones `ratio` of that."""
    students = [("original", budget, 0.5) for budget, _ in ratios]
    students += [("undistillable", budget, 0.5 * factor) for budget, factor in ratios]
    return by_name(results(students))["guard_over_budgets/byte"]


def test_all_claims_hold_on_a_run_that_worked(working):
    _, summary = working
    names = [claim["name"] for claim in summary["claims"]]
    kinds = (
        "students_beat_gold",
        "students_beat_original",
        "guard_at_1x",
        "guard_at_2x",
        "guard_over_budgets",
    )
    assert set(names) == {
        *(f"{name}/{kind}" for name in kinds for kind in ("byte", "bpe")),
        "teacher_accuracy/distillable",
        "teacher_accuracy/undistillable",
    }
    assert all(claim["holds"] for claim in summary["claims"])


def test_claims_fail_on_a_run_that_did_not(failing):
    _, summary = failing
    holding = {claim["name"] for claim in summary["claims"] if claim["holds"]}
    assert holding == {"teacher_accuracy/distillable"}


@pytest.mark.parametrize("calibrated,holds", [(0.93, True), (0.90, True), (0.89, True), (0.88, False)])
def test_teacher_may_lose_one_point(calibrated, holds):
    claim = by_name(results(teachers=[("original", 0.90), ("distillable", calibrated)]))[
        "teacher_accuracy/distillable"
    ]
    assert claim["holds"] is holds and claim["value"]["mean"] == pytest.approx(calibrated - 0.90)
    assert claim["threshold"] == -0.01


@pytest.mark.parametrize("rate,holds", [(0.59, False), (0.60, True), (0.75, True)])
def test_gain_is_judged_at_1_2(rate, holds):
    found = by_name(results([("gold", 1.0, 0.5), ("original", 1.0, 0.5), ("distillable", 1.0, rate)]))
    for name in ("students_beat_gold/byte", "students_beat_original/byte"):
        assert found[name]["holds"] is holds and found[name]["value"]["mean"] == pytest.approx(rate / 0.5)


@pytest.mark.parametrize("rate,holds", [(0.20, True), (0.21, False)])
def test_guard_is_judged_at_0_4_and_at_twice_the_budget(rate, holds):
    found = by_name(
        results(
            [("original", budget, 0.5) for budget in (1.0, 2.0)]
            + [("undistillable", 1.0, 0.1), ("undistillable", 2.0, rate)]
        )
    )
    assert found["guard_at_1x/byte"]["holds"] is True
    assert found["guard_at_2x/byte"]["holds"] is holds
    assert "20 training steps (2x the default)" in found["guard_at_2x/byte"]["statement"]


def test_where_the_guard_breaks():
    claim = guard_curve((1.0, 0.2), (2.0, 0.3), (4.0, 0.9), (8.0, 1.0))
    assert claim["holds"] is False and claim["first_break"] == 4.0
    assert claim["value"]["mean"] == pytest.approx(0.9)
    assert "breaks at 4x the default steps, after holding at 1x and 2x" in claim["statement"]
    assert "4x (40 steps) 0.90" in claim["statement"]


def test_guard_that_does_not_break_says_how_far_it_was_tried():
    claim = guard_curve((1.0, 0.2), (2.0, 0.3))
    assert claim["holds"] is True and claim["first_break"] is None and claim["tried"] == [1.0, 2.0]
    assert "not break within the budgets tried (1x and above: 1x and 2x)" in claim["statement"]


def test_a_ratio_above_the_limit_below_the_default_budget_is_told_but_not_a_break():
    claim = guard_curve((0.5, 0.8), (1.0, 0.2))
    assert claim["holds"] is True and claim["first_break"] is None
    assert "Below the default budget the ratio exceeds 0.4 too, at 0.5x" in claim["statement"]


def test_zero_denominator_does_not_hold_and_says_why():
    claim = by_name(results([("original", 1.0, 0.0), ("undistillable", 1.0, 0.0)]))["guard_at_1x/byte"]
    assert claim["holds"] is False and claim["value"]["mean"] is None
    assert "undefined" in claim["statement"] and "answer nothing right" in claim["statement"]


def test_whether_the_interval_excludes_the_threshold():
    clear = by_name(results([("original", 1.0, 0.9), ("undistillable", 1.0, 0.05)]))["guard_at_1x/byte"]
    close = by_name(results([("original", 1.0, 0.9), ("undistillable", 1.0, 0.35)]))["guard_at_1x/byte"]
    assert "the interval excludes 0.4" in clear["statement"] and clear["value"]["ci95"][1] < 0.4
    assert "the interval includes 0.4" in close["statement"] and close["value"]["ci95"][1] > 0.4


def test_statements_state_access_samples_steps_kind_and_size(working, failing):
    for _, summary in (working, failing):
        for claim in summary["claims"]:
            statement, (name, kind) = claim["statement"], claim["name"].split("/")
            assert "95 % interval" in statement
            if name == "teacher_accuracy":
                continue
            assert "text access with 6,000 samples" in statement
            assert f"{kind} students ({SETTING.student_parameters[kind]:,} parameters" in statement
            assert re.search(r"\d+ (training )?steps", statement)


def test_the_word_undistillable_only_names_a_mode(working, failing):
    """Never a claim by itself: in every sentence it names the mode of a calibrated teacher."""
    for _, summary in (working, failing):
        for claim in summary["claims"]:
            assert "undistillable" not in re.sub(r"\bthe undistillable mode\b", "", claim["statement"])


def test_group_status():
    claims = [{"name": "a/x", "holds": True}, {"name": "a/y", "holds": False}, {"name": "b/x", "holds": True}]
    assert [group_status(claims, name) for name in ("a", "b", "c")] == ["some", "all", "unjudged"]
    assert group_status(claims[1:2], "a") == "none"


def test_answer_tells_what_happened(working, failing):
    good, bad = answer(working[1]), answer(failing[1])
    assert good.tone == "good" and "worked in both directions at the stated budget" in good.headline
    assert bad.tone == "bad" and bad.headline == "The knob did not work in either direction"
    assert any("up to 1,600 steps (2x), the largest budget tried" in sentence for sentence in good.sentences)
    assert any("breaks at 800 steps (the default)" in sentence for sentence in bad.sentences)
    assert any("more than the margin of one point was lost" in sentence for sentence in bad.sentences)


def test_answer_of_a_mixed_run(working):
    _, summary = working
    claims = [
        {**claim, "holds": claim["holds"] and not claim["name"].startswith("guard")}
        for claim in summary["claims"]
    ]
    mixed = answer({**summary, "claims": claims})
    assert mixed.tone == "mixed"
    assert (
        "easier to distil worked; guarding it against distillation at the default budget did not work"
        in mixed.headline
    )
    costly = [{**claim, "holds": not claim["name"].startswith("teacher")} for claim in summary["claims"]]
    assert "cost a teacher over one point" in answer({**summary, "claims": costly}).headline


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"samples": 0}, "samples and steps >= 1"),
        ({"student_descriptions": {"other": "?"}}, "names other"),
    ],
)
def test_setting_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Setting(**{"samples": 1, "steps": 1, "student_parameters": {"byte": 1}, **wrong})
