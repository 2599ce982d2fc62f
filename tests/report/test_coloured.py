"""Rollouts in colour: texts cut at their spans and put together again, tints, and the page with and without them."""

from __future__ import annotations

import html
import json
import re

import pytest

from distill_jax.report import write_report
from distill_jax.report.coloured import full_tint, legend, pieces, read_spans, tint_of
from distill_jax.report.html import side_by_side
from distill_jax.report.records import read_rollouts


def test_pieces_are_the_text():
    text = "6+4=10 ####"
    found = pieces(text, [(0, 2, -0.1, -9.1), (2, 3, -3.0, -1.0), (5, 6, -1.0, -1.0)], 4.0)
    assert [piece.text for piece in found] == ["6+", "4", "=1", "0", " ####"]
    assert [piece.tone for piece in found] == ["far", "near", "", "", ""]
    assert found[0].title == "+9.00 nats: teacher -0.10, proxy -9.10"
    assert found[0].tint == pytest.approx(62.0) and found[1].tint == pytest.approx(62.0 * 2.0 / 4.0)
    assert found[2].title == "" and found[3].title.startswith("+0.00 nats")  # not scored, and equal


def test_spans_inside_a_character_are_joined():
    """The three bytes of the euro sign as three spans: one piece, with their sum."""
    found = pieces(
        "a€b",
        [(0, 1, 0.0, 0.0), (1, 2, -1.0, -2.0), (2, 3, 0.0, -3.0), (3, 4, 0.0, -1.0), (4, 5, 0.0, 0.0)],
        1.0,
    )
    assert [piece.text for piece in found] == ["a", "€", "b"]
    assert found[1].title == "+5.00 nats: teacher -1.00, proxy -6.00"


@pytest.mark.parametrize("spans", [None, [], [(0, 9, -1.0, -2.0)], [(2, 1, 0.0, 0.0)]])
def test_spans_that_do_not_fit_leave_plain_text(spans):
    (piece,) = pieces("abc", spans, 1.0)
    assert (piece.text, piece.tone, piece.title) == ("abc", "", "")
    assert pieces("", spans, 1.0) == []


def test_tints_and_legend():
    assert tint_of(9.0, 4.0) == ("far", 62.0) and tint_of(-9.0, 4.0) == ("near", 62.0)
    assert tint_of(0.01, 4.0) == ("", 0.0)
    assert [swatch.text for swatch in legend(4.0)] == ["≤ -4", "-2", "0", "+2", "≥ +4"]
    assert [swatch.tone for swatch in legend(4.0)] == ["near", "near", "", "far", "far"]


def test_the_scale_is_that_of_the_texts():
    """Bytes with |ratio| 1 to 10 times .3: nine of ten lie at or below 2.7, so 5."""
    spans = [(at, at + 1, 0.0, -0.3 * (at + 1)) for at in range(10)]
    assert full_tint({("", ""): spans}) == 5.0
    assert full_tint({("", ""): [(0, 4, 0.0, -0.8)]}) == pytest.approx(0.2)
    assert full_tint({}) == full_tint({("", ""): [(0, 1, -1.0, -1.0), (1, 1, -1.0, 0.0)]}) == 1.0


def coloured_page(working, tmp_path) -> str:
    workdir, summary = working
    rows = []
    for arm, rollouts in read_rollouts(workdir).items():
        for row in rollouts if arm == "original" else ():
            size = len(row["completion"].encode())
            spans = [[at, at + 1, -0.5, -0.5 - at % 5] for at in range(size)]
            rows.append({"prompt": row["prompt"], "completion": row["completion"], "spans": spans})
    (tmp_path / "arms" / "original").mkdir(parents=True)
    source = workdir / "arms" / "original" / "rollouts.jsonl"
    (tmp_path / "arms" / "original" / "rollouts.jsonl").write_bytes(source.read_bytes())
    (tmp_path / "coloured_rollouts.json").write_text(json.dumps({"rows": rows, "why_not": None}))
    return write_report(tmp_path, summary).read_text()


def test_the_page_shows_the_text_escaped_and_whole(working, tmp_path):
    page = coloured_page(working, tmp_path)
    assert 'class="legend"' in page and '<span class="far" style="--tint:' in page
    assert "<script>" not in page and 'title="+4.00 nats: teacher -0.50, proxy -4.50"' in page
    shown = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    texts = [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in shown]
    views = side_by_side(read_rollouts(working[0]))
    expected = [
        r.text
        for view in views for title, arm in view.arms if title == "original" for r in arm
    ]  # fmt: skip
    assert texts == expected and any("<script>" in text for text in texts)


def test_without_spans_the_page_is_plain(working, tmp_path):
    page = write_report(tmp_path, working[1]).read_text()
    assert 'class="legend"' not in page and read_spans(tmp_path) == {}
    plain = write_report(working[0], working[1]).read_text()
    assert 'class="legend"' not in plain and "&lt;script&gt;" in plain
    (tmp_path / "coloured_rollouts.json").write_text('{"rows": [{"prompt": "a"}]}')
    with pytest.raises(ValueError, match="expected coloured rollouts"):
        read_spans(tmp_path)
