"""The run's own students as an attack: the gap by hand, and a table where no suite has been run."""

from __future__ import annotations

import copy
import json

import pytest

from distill_jax.report import html
from distill_jax.report.recovered import recovered_tables
from distill_jax.report.summary import summarise
from tests.report.synthetic import CONFIG, ENVIRONMENT, SETTING, WORKING, write_workdir


def summary_of(tmp_path, students=WORKING):
    return summarise(write_workdir(tmp_path, students), CONFIG, ENVIRONMENT, SETTING, resamples=200)


def rate(workdir, place, kind="bpe", seeds=(0, 1, 2)):
    """Share of right greedy answers at the default budget; the untrained student has no budget."""
    right = []
    for seed in seeds:
        path = workdir / "students" / place / kind / f"seed{seed}" / "predictions.jsonl"
        for row in map(json.loads, path.read_text().splitlines()):
            if row["decoding"] == "greedy" and row["budget"] in (0.0, 1.0):
                right.append(row["correct"])
    return sum(right) / len(right)


def test_the_gap_by_hand(tmp_path):
    recovered = summary_of(tmp_path)["recovered"]
    assert set(recovered) == {"byte", "bpe"}
    assert set(recovered["byte"]) == {
        f"accuracy_{decoding}{budget}" for decoding in ("greedy", "sample") for budget in ("", "@0.5x", "@2x")
    }
    value = recovered["bpe"]["accuracy_greedy"]["undistillable"]
    untrained = rate(tmp_path, "base/none", seeds=(0,))
    clean, guarded = rate(tmp_path, "original/sft"), rate(tmp_path, "undistillable/sft")
    assert value["mean"] == pytest.approx((guarded - untrained) / (clean - untrained))
    assert value["ci95"][0] < value["mean"] < value["ci95"][1] < 0.3
    assert recovered["bpe"]["accuracy_greedy"]["distillable"]["mean"] > 1.2


def test_the_table_and_the_page(tmp_path):
    summary = summary_of(tmp_path)
    tables = recovered_tables(summary)
    assert [table["kind"] for table in tables] == ["byte", "bpe"]
    assert tables[0]["headers"][2:] == ["control (eta = 0)", "distillable mode", "undistillable mode"]
    rows = {row[0][0]: row[1:] for row in tables[0]["rows"]}
    assert list(rows) == [
        f"{budget}, {how}" for how in ("greedy", "T = 1") for budget in ("0.5x", "1x", "2x")
    ]
    clean, easy, guarded = (rows["1x, greedy"][column] for column in (0, 2, 3))
    assert clean == (f"{100 * rate(tmp_path, 'original/sft', 'byte'):.1f} [" + clean[0].split("[")[1], None)
    assert easy[1] == 1.0 and 0.0 < guarded[1] < 0.2 and guarded[0].startswith(f"{guarded[1]:.2f} [")
    page = html.render_html(summary, [], {})
    assert '<h2 id="attacks">Attacks</h2>' in page and guarded[0] in page
    # The suite says more.
    assert recovered_tables({**summary, "attacks": {}}) == []


@pytest.mark.parametrize("absent", ["base", "original"])
def test_nothing_to_compare_with(tmp_path, absent):
    students = copy.deepcopy(WORKING)
    del students[absent]
    summary = summary_of(tmp_path, students)
    assert summary["recovered"] == {} and recovered_tables(summary) == []
    assert 'id="attacks"' not in html.render_html(summary, [], {})


def test_an_arm_without_students(tmp_path):
    students = copy.deepcopy(WORKING)
    del students["control"], students["distillable"][2.0]
    tables = recovered_tables(summary_of(tmp_path, students))
    assert tables[0]["headers"][2:] == ["distillable mode", "undistillable mode"]
    assert [row[2][0] == "-" for row in tables[0]["rows"]] == [False, False, True] * 2
