"""The plots: text stays text, ink follows the page, numbers go into the CSV, and gaps leave no plot."""

from __future__ import annotations

import csv
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from distill_jax.report.plots import INK, TRAINING, make_plots, save_plots
from distill_jax.report.records import read_metrics


@pytest.fixture(scope="module")
def plots(working):
    workdir, summary = working
    return make_plots(summary, read_metrics(workdir))


def test_every_kind_of_plot_is_there(plots):
    names = {plot.name for plot in plots}
    assert names == {
        *(f"knob_{kind}" for kind in ("byte", "bpe")),
        *(f"budget_{kind}_{decoding}" for kind in ("byte", "bpe") for decoding in ("greedy", "sample")),
        *(f"training_{key}" for key in TRAINING),
    }


def test_svg_is_inline_text_in_the_ink_of_the_page(plots):
    identifiers: list[str] = []
    for plot in plots:
        root = ElementTree.fromstring(plot.svg)
        assert root.tag.endswith("svg") and root.get("aria-label") == plot.alt and root.get("width") is None
        assert any(element.tag.endswith("}text") for element in root.iter())
        assert "currentColor" in plot.svg and INK not in plot.svg and "<metadata" not in plot.svg
        own = [element.get("id") for element in root.iter() if element.get("id")]
        for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', plot.svg):
            assert "".join(target) in own
        identifiers += own
    assert len(identifiers) == len(set(identifiers))  # many figures share one page


def test_hostile_student_name_stays_text(working):
    _, summary = working
    name = '<img src=x onerror="1">&'
    students = {
        arm: {**part, "students": {"sft": {name: part["students"]["sft"]["byte"]}}}
        for arm, part in summary["arms"].items()
    }
    setting = {**summary["setting"], "student_parameters": {name: 1}}
    for plot in make_plots({**summary, "arms": students, "setting": setting}, {}):
        root = ElementTree.fromstring(plot.svg)
        assert name in root.get("aria-label") and not any(
            element.tag.endswith("img") for element in root.iter()
        )
        assert re.fullmatch(r"[A-Za-z0-9_-]+", plot.name)


def test_same_summary_same_pictures(working, plots):
    workdir, summary = working
    again = make_plots(summary, read_metrics(workdir))
    assert [plot.svg for plot in again] == [plot.svg for plot in plots]


def test_files_hold_the_numbers(working, plots, tmp_path):
    _, summary = working
    paths = save_plots(plots, tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths) and len(paths) == len(plots)
    with open(tmp_path / "knob_byte.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(
        row for row in rows if (row["arm"], row["who"], row["decoding"]) == ("original", "student", "greedy")
    )
    value = summary["arms"]["original"]["students"]["sft"]["byte"]["accuracy_greedy"]
    assert float(row["mean"]) == value["mean"] and float(row["ci95_low"]) == value["ci95"][0]
    assert len(row["seeds"].split()) == 3
    with open(tmp_path / "budget_bpe_sample.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["budget"] for row in rows} == {"0.5", "1.0", "2.0"} and len(rows) == 15


def test_nothing_to_draw_gives_no_plot(working):
    _, summary = working
    empty = {arm: {"teacher": {}, "students": {}, "probes": {}} for arm in summary["arms"]}
    nothing = {**summary, "arms": empty, "baselines": {"base_student": {}, "gold_sft": {}}}
    assert make_plots(nothing, {}) == []
    rows = [{"step": 0, "entropy": math.nan}, {"step": 1, "entropy": None}, {"step": 2}]
    assert make_plots(nothing, {"control": rows}) == []
    assert [plot.name for plot in make_plots(nothing, {"control": [*rows, {"step": 3, "entropy": 0.5}]})] == [
        "training_entropy"
    ]
