"""The probes in the report: panels before and after, the diagnosis, figures; and a page without any."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from distill_jax.report import write_report
from distill_jax.report.probe_plots import probe_plots
from distill_jax.report.probe_table import PANELS, page_view, panel_values, probed_kinds


def value(mean: float | None, half: float | None = 0.1) -> dict[str, Any]:
    ends = [None, None] if mean is None or half is None else [mean - half, mean + half]
    return {"mean": mean, "ci95": ends, "n": 8, "seeds": None}


def finding(verdict: str, sentence: str) -> dict[str, Any]:
    return {
        "probe": "gap",
        "name": "wrong_traces",
        "verdict": verdict,
        "sentence": sentence,
        "value": value(0.6),
        "threshold": 0.5,
    }


@pytest.fixture
def probed(working) -> dict[str, Any]:
    """A summary with two arms probed by one kind of student."""
    _, summary = working
    numbers = {
        "gap": {
            "byte/wrong_trace_preference": value(0.62),
            "byte/wrong_trace_preference@before": value(None),
            "byte/top_k_overlap.all": value(0.71, None),
        },
        "overconfidence": {
            "byte/confidence_wrong.before": value(0.3),
            "byte/confidence_wrong.after": value(0.8),
        },
    }
    arms = {arm: {**part, "probes": {}} for arm, part in summary["arms"].items()}
    arms["original"]["probes"] = numbers
    arms["distillable"]["probes"] = {"gap": {"byte/wrong_trace_preference": value(0.2)}}
    diagnosis = {
        "original": {
            "byte": [finding("absent", "fine"), finding("found", "prefers 62 % <i>wrong</i> answers")]
        },
        "distillable": {"byte": []},
    }
    return {**summary, "arms": arms, "diagnosis": diagnosis}


def test_before_and_after_are_found_where_each_probe_keeps_them(probed):
    panels = {panel.metric: panel for panel in PANELS}
    preference = panel_values(probed, panels["wrong_trace_preference"], "byte")
    assert {arm: [v and v["mean"] for v in pair] for arm, pair in preference.items()} == {
        "original": [None, 0.62],  # undefined before: shown as a gap
        "distillable": [None, 0.2],
    }
    (pair,) = panel_values(probed, panels["confidence_wrong.after"], "byte").values()
    assert [v["mean"] for v in pair] == [0.3, 0.8]
    assert panel_values(probed, panels["repair_rate.student"], "byte") == {}


def test_table_and_diagnosis(probed):
    (view,) = page_view(probed)
    assert view["kind"] == "byte" and view["headers"] == ["original", "distillable mode"]
    rows = {title: cells for title, _, cells in view["rows"]}
    assert rows["Wrong answer preferred to a right one"] == [("-", "62", "[52, 72]"), ("-", "20", "[10, 30]")]
    assert rows["Confidence in wrong answers"] == [("30", "80", "[70, 90]"), ("-", "-", "")]
    assert rows["Common most probable tokens"][0] == ("-", "71", "[?, ?]")
    title, findings = view["diagnosis"][0]
    assert title == "original" and [verdict for verdict, _, _ in findings] == ["found", "absent"]


def test_figures_have_the_numbers(probed):
    plots = {plot.name: plot for plot in probe_plots(probed)}
    assert set(plots) == {"probe_byte_gap", "probe_byte_overconfidence"}
    rows = plots["probe_byte_overconfidence"].rows
    assert [row[:3] for row in rows] == [("original", "untrained", 0.3), ("original", "distilled", 0.8)]
    for plot in plots.values():
        assert ElementTree.fromstring(plot.svg).get("aria-label") == plot.alt and plot.png[:4] == b"\x89PNG"


def test_page_with_and_without_probes(probed, working, tmp_path):
    page = write_report(tmp_path, probed).read_text()
    assert '<h2 id="probes">' in page and "&lt;i&gt;wrong&lt;/i&gt;" in page
    assert '<figure id="figure-probe_byte_gap">' in page and "no probe could be measured" in page
    assert (tmp_path / "report" / "plots" / "probe_byte_gap.csv").exists()
    assert '<h2 id="probes">' not in write_report(tmp_path, working[1]).read_text()
    assert page_view(working[1]) is None and probed_kinds(working[1]) == []


def test_a_run_of_probes_alone_begins_with_what_they_found(probed, tmp_path):
    arms = {arm: {**part, "teacher": {}, "students": {}} for arm, part in probed["arms"].items()}
    missing = ["teacher of control: not evaluated", "probe gap of byte students of original: no pairs"]
    summary = {**probed, "arms": arms, "claims": [], "missing": missing, "recovered": {}}
    page = write_report(tmp_path, summary).read_text()
    assert "<h1>The probes found traps between this teacher and this student</h1>" in page
    assert "byte students of the original teacher: found: wrong traces." in page
    assert "no pairs" in page and "not evaluated" not in page
    for absent in ("claims", "accuracy", "knob", "budget"):
        assert (
            f'<h2 id="{absent}">' not in page
            and f'<h2 id="{absent}">' in write_report(tmp_path, probed).read_text()
        )
