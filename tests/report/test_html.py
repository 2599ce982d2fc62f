"""The page: well-formed, alone in the world, safe against what models write, and right when things are missing."""

from __future__ import annotations

import builtins
import re
from html.parser import HTMLParser

import pytest

from distill_jax.report import render_html, summarise, write_report
from distill_jax.report.html import flatten, side_by_side
from tests.report.synthetic import CONFIG, ENVIRONMENT, SETTING, write_lines, write_workdir

VOID = {"meta", "link", "br", "img", "input", "hr", "source"}
LOADING = {"src", "srcset", "poster", "data", "action", "background"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects tags, ids, links and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def _attributes(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in LOADING or (name in ("href", "xlink:href") and not value.startswith("#")):
                self.loads.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_starttag(self, tag, attributes):
        self._attributes(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._attributes(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data


def build(workdir, summary=None) -> tuple[str, Page]:
    summary = summary or summarise(workdir, CONFIG, ENVIRONMENT, SETTING, resamples=200)
    path = write_report(workdir, summary)
    assert path == workdir / "report" / "index.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture(scope="module")
def page(working):
    return build(*working)


def test_page_is_well_formed_and_needs_no_network(page):
    source, parsed = page
    assert parsed.loads == ["data:,"]  # the empty icon, so that no browser asks for one
    assert "script" not in parsed.tags and parsed.handlers == []
    assert len(parsed.ids) == len(set(parsed.ids))
    style = source[source.index("<style>") : source.index("</style>")]
    assert "@import" not in style and "url(" not in style and "http" not in style
    assert {match for match in re.findall(r"https?://[^\s\"'<>]+", source)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_page_is_for_phones_and_the_dark(page):
    source, _ = page
    assert (
        'name="viewport"' in source
        and "prefers-color-scheme: dark" in source
        and "color-scheme: light dark" in source
    )


def test_the_answer_comes_first_then_everything_else(page):
    source, parsed = page
    assert re.findall(r"<h[12][^>]*>(.*?)</h", source) == [
        "The knob worked in both directions at the stated budget",
        "Claims",
        "Accuracy",
        "The knob",
        "Over the budget",
        "Attacks",
        "What calibration did to the teachers",
        "The same prompts, teacher by teacher",
        "The run",
    ]
    assert "Configuration" in parsed.text and "Environment" in parsed.text
    assert "12 of 12 hold" in parsed.text and "does not hold" not in parsed.text
    assert "prepare" in parsed.text and "5 min 12 s" in parsed.text and "calibration.eta" in parsed.text


def test_every_claim_shows_mark_numbers_and_statement(failing):
    source, parsed = build(*failing)
    text = parsed.text.replace("\u00a0", " ")
    for claim in failing[1]["claims"]:
        assert claim["statement"] in text
    assert text.count("✗ does not hold") == 11 and text.count("✓ holds") == 1
    assert source.count("<details open>") == 11


def test_table_has_all_arms_and_intervals(page):
    _, parsed = page
    for title in ("untrained student", "gold text", "undistillable mode", "original", "control (eta = 0)"):
        assert title in parsed.text
    assert re.search(r"99\.\d\s*\[\d\d\.\d, (100\.0|99\.\d)\]", parsed.text)


def test_what_a_model_writes_is_text(tmp_path):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)></pre></div>\"'&lt; \u202e {{ 7*7 }}"
    write_workdir(tmp_path, {}, {"original": 0.9}, problems=16)
    row = {
        "step": 1,
        "prompt": hostile,
        "answer": hostile,
        "completion": hostile,
        "reward": 0.5,
        "style": hostile,
    }
    write_lines(tmp_path / "arms" / "original" / "rollouts.jsonl", [row])
    config = {hostile: hostile}
    source, parsed = build(tmp_path, summarise(tmp_path, config, config, SETTING, resamples=100))
    assert "<script" not in source and "img" not in parsed.tags and parsed.handlers == []
    assert parsed.loads == ["data:,"] and parsed.text.count(hostile) >= 7
    assert "reward 0.50" in parsed.text


def test_rollouts_stand_side_by_side(working):
    rollouts = {
        "original": [row("p", "a", 1.0), row("q", "b", 0.0), row("p", "c", 0.0), row("p", "d", 1.0)],
        "distillable": [row("q", "e", 1.0), row("r", "f", 1.0)],
    }
    views = side_by_side(rollouts, count=2)
    assert [view.prompt for view in views] == ["q", "p"]  # q has both arms
    assert [(title, [r.text for r in shown]) for title, shown in views[0].arms] == [
        ("original", ["b"]),
        ("distillable mode", ["e"]),
    ]
    assert [r.text for r in views[1].arms[0][1]] == ["a", "c"] and views[1].arms[1][1] == []
    assert [r.verdict for r in views[1].arms[0][1]] == ["right", "wrong"]
    assert views[0].arms[0][1][0].facts == "gap +1.50 nats per byte, 1 bytes"
    assert "no sample for this prompt" in render_html(working[1], [], rollouts)


def row(prompt, completion, reward):
    return {
        "step": 1,
        "prompt": prompt,
        "answer": "",
        "completion": completion,
        "reward": reward,
        "gap_per_byte": 1.5,
    }


NOTHING = ["No claim can be judged", "No students have been evaluated", "What is missing"]
TWO_TEACHERS = {"original": 0.9, "undistillable": 0.9}
TWO_ARMS = {"original": {1.0: 0.8}, "undistillable": {1.0: 0.2}}


@pytest.mark.parametrize(
    "teachers,students,said",
    [
        ({}, {}, [*NOTHING, "No calibration has been run", "No rollouts have been saved"]),
        ({"original": 0.9}, {}, [*NOTHING, "No calibration has been run", "Prompt 1"]),
        (
            {},
            {"original": {1.0: 0.8}},
            ["No claim can be judged", "No rollouts have been saved", "fewer than two"],
        ),
        (
            TWO_TEACHERS,
            TWO_ARMS,
            ["against distillation at the default budget worked", "5 of 5 hold", "is missing"],
        ),
    ],
)
def test_missing_stages_are_said_not_hidden(tmp_path, teachers, students, said):
    write_workdir(tmp_path, students, teachers, seeds=1, problems=64)
    _, parsed = build(tmp_path)
    for words in said:
        assert words in parsed.text
    assert "nan" not in parsed.text.lower().split()


def test_zero_denominators_reach_the_page_as_undefined(tmp_path):
    write_workdir(
        tmp_path,
        {"original": {1.0: 0.0}, "undistillable": {1.0: 0.0}},
        {},
        seeds=1,
        problems=400,
        kinds=("byte",),
    )
    path = tmp_path / "students/original/sft/byte/seed0/predictions.jsonl"
    rows = [{"budget": 1.0, "decoding": "greedy", "problem": problem, "correct": 0} for problem in range(400)]
    write_lines(path, rows)
    _, parsed = build(tmp_path)
    assert "undefined" in parsed.text and "nan" not in parsed.text.lower()


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": (1, 2)}) == [("a.b", "1"), ("a.c", "{}"), ("d", "(1, 2)")]


def test_report_of_a_workdir_that_does_not_exist(working, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere", working[1])


def test_without_matplotlib_the_error_names_the_extra(working, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("distill_jax.report.plots"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"distill_jax\[report\]"):
        write_report(*working)
