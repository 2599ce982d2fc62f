"""`summary.json`: the schema, the numbers, and what happens when stages are missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from distill_jax.report import read_results, summarise, summary_table, write_summary
from distill_jax.report.summary import strict_json
from tests.report.synthetic import CONFIG, ENVIRONMENT, SETTING, WORKING, write_lines, write_workdir

ARMS = {"original", "control", "distillable", "undistillable"}


def check_value(value):
    """V of schema 1."""
    assert set(value) == {"mean", "ci95", "n", "seeds"}
    assert isinstance(value["n"], int) and value["n"] > 0
    assert len(value["ci95"]) == 2
    numbers = [value["mean"], *value["ci95"], *(value["seeds"] or [])]
    assert all(number is None or (isinstance(number, float) and math.isfinite(number)) for number in numbers)
    low, high = value["ci95"]
    if None not in numbers[:3]:
        assert low <= value["mean"] <= high


def check_metrics(tree, depth):
    """A mapping of metrics `depth` levels down."""
    assert isinstance(tree, dict)
    for item in tree.values():
        check_metrics(item, depth - 1) if depth else check_value(item)


def check_summary(summary):
    """Schema 1, as far as a program that reads it relies on it."""
    assert summary["schema"] == 1
    assert isinstance(summary["config"], dict) and isinstance(summary["environment"], dict)
    assert all(isinstance(seconds, float) for seconds in summary["wall_clock_s"].values())
    assert set(summary["arms"]) == ARMS
    for arm in summary["arms"].values():
        assert set(arm) == {"teacher", "students", "probes"}
        check_metrics(arm["teacher"], 0)
        check_metrics(arm["students"], 2)
        check_metrics(arm["probes"], 1)
    assert set(summary["baselines"]) == {"base_student", "gold_sft"}
    check_metrics(summary["baselines"], 2)
    for claim in summary["claims"]:
        assert {"name", "holds", "statement", "value", "threshold"} <= set(claim)
        assert isinstance(claim["name"], str) and isinstance(claim["statement"], str)
        assert isinstance(claim["holds"], bool) and isinstance(claim["threshold"], float)
        check_value(claim["value"])
    assert all(isinstance(sentence, str) for sentence in summary["missing"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_full_run_follows_the_schema(working):
    _, summary = working
    check_summary(summary)
    assert summary["missing"] == []
    students = summary["arms"]["undistillable"]["students"]["sft"]
    budgets = {
        f"accuracy_{decoding}{suffix}" for decoding in ("greedy", "sample") for suffix in ("", "@0.5x", "@2x")
    }
    assert set(students) == {"byte", "bpe"} and set(students["byte"]) == budgets
    assert set(summary["baselines"]["base_student"]["bpe"]) == {"accuracy_greedy", "accuracy_sample"}
    assert summary["wall_clock_s"]["prepare"] == 312.5


def test_numbers_are_those_of_the_files(working):
    workdir, summary = working
    results = read_results(workdir)
    cell = results.students["distillable", "sft", "byte"][2.0, "sample"]
    value = summary["arms"]["distillable"]["students"]["sft"]["byte"]["accuracy_sample@2x"]
    assert value["mean"] == pytest.approx(cell.correct.mean())
    assert value["seeds"] == pytest.approx(list(cell.correct.mean(axis=1))) and value["n"] == 256
    teacher = summary["arms"]["control"]["teacher"]
    assert teacher["accuracy_greedy"]["mean"] == pytest.approx(
        results.teachers["control", "greedy"].correct.mean()
    )


def test_rollout_metrics_by_hand(tmp_path):
    def row(prompt, text, gap, style):
        return {
            "step": 5,
            "prompt": prompt,
            "completion": text,
            "reward": 1.0,
            "gap_per_byte": gap,
            "style": style,
        }

    rows = [
        row("a", "é", 1.0, "x"),
        row("a", "abcd", 3.0, "y"),
        row("b", "ab", 6.0, "x"),
        row("c", "ab", None, None),
    ]
    write_lines(tmp_path / "arms" / "original" / "rollouts.jsonl", rows)
    teacher = summarise(tmp_path, {}, {}, SETTING, resamples=100)["arms"]["original"]["teacher"]
    assert teacher["gap_per_byte"]["mean"] == 4.0 and teacher["gap_per_byte"]["n"] == 2  # (2 + 6) / 2 prompts
    assert teacher["completion_bytes"]["mean"] == pytest.approx((3 + 2 + 2) / 3)
    assert teacher["style/x"]["mean"] == 0.75 and teacher["style/y"]["mean"] == 0.25
    assert "accuracy_greedy" not in teacher


def test_alignment_is_the_mean_over_training_steps_and_is_printed(tmp_path):
    rows = [{"step": 0}, {"step": 1, "span_coverage": 1.0, "unscorable": 0.5}]
    write_lines(
        tmp_path / "arms/control/metrics.jsonl", [*rows, {"step": 2, "span_coverage": 0.5, "unscorable": 0.0}]
    )
    summary = summarise(tmp_path, {}, {}, SETTING)
    teacher = summary["arms"]["control"]["teacher"]
    assert (teacher["span_coverage"]["mean"], teacher["span_coverage"]["n"]) == (0.75, 2)
    assert teacher["unscorable"]["mean"] == 0.25
    assert (
        "control (eta = 0): 75.00 % of the scored bytes aligned, 25.00 % of the rollouts not scorable"
        in summary_table(summary)
    )


def test_empty_workdir_gives_an_empty_summary_that_says_so(tmp_path):
    summary = summarise(tmp_path, CONFIG, ENVIRONMENT, SETTING)
    check_summary(summary)
    assert summary["claims"] == [] and summary["wall_clock_s"] == {}
    said = "\n".join(summary["missing"])
    assert all(f"teacher of arm {arm}: no answers" in said for arm in ARMS)
    assert "students: none have been evaluated" in said and "claims about students" in said
    assert "untrained student" in summary_table(summary)


def test_one_arm_before_any_student(tmp_path):
    write_workdir(tmp_path, {}, {"original": 0.9}, problems=64)
    summary = summarise(tmp_path, CONFIG, ENVIRONMENT, SETTING, resamples=200)
    check_summary(summary)
    assert "accuracy_greedy" in summary["arms"]["original"]["teacher"]
    assert summary["arms"]["control"] == {"teacher": {}, "students": {}, "probes": {}}


def test_a_missing_kind_and_baseline_are_named(tmp_path):
    students = {"original": {1.0: 0.8}, "undistillable": {1.0: 0.2}}
    write_workdir(tmp_path, students, kinds=("byte",), seeds=1, problems=64)
    summary = summarise(tmp_path, CONFIG, ENVIRONMENT, SETTING, resamples=200)
    check_summary(summary)
    said = "\n".join(summary["missing"])
    assert (
        "students of gold_sft: none of kind byte, bpe" in said
        and "students of original: none of kind bpe" in said
    )
    assert "claim guard_at_2x/byte: greedy answers at 2x are missing" in said
    assert [claim["name"] for claim in summary["claims"] if claim["name"].endswith("/byte")] == [
        "guard_at_1x/byte",
        "guard_over_budgets/byte",
    ]


def test_dropped_texts_are_counted_and_named(tmp_path):
    write_workdir(tmp_path, WORKING, kinds=("byte", "bpe"), seeds=2, problems=64)
    for arm, dropped in (("original", 0), ("distillable", 3)):
        seeds = [{"kept": 10, "dropped": 0}, {"kept": 10 - dropped, "dropped": dropped}]
        path = tmp_path / "students" / arm / "sft" / "bpe" / "texts.json"
        path.write_text(json.dumps({"seeds": seeds}), encoding="utf-8")
    summary = summarise(tmp_path, CONFIG, ENVIRONMENT, SETTING, resamples=200)
    check_summary(summary)
    assert summary["texts"] == {
        "original": {"bpe": {"kept": [10, 10], "dropped": [0, 0]}},
        "distillable": {"bpe": {"kept": [10, 7], "dropped": [0, 3]}},
    }
    said = [sentence for sentence in summary["missing"] if sentence.startswith("texts of")]
    assert len(said) == 1 and "distillable for students of kind bpe: 3 of 20 were dropped" in said[0]
    path.write_text('{"seeds": [{"kept": 1}]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"texts.json: expected"):
        summarise(tmp_path, CONFIG, ENVIRONMENT, SETTING, resamples=200)


def test_an_unannounced_kind_of_student_is_reported_too(tmp_path):
    write_workdir(tmp_path, WORKING, kinds=("other",), seeds=1, problems=64)
    summary = summarise(tmp_path, CONFIG, ENVIRONMENT, SETTING, resamples=200)
    assert "accuracy_greedy" in summary["arms"]["original"]["students"]["sft"]["other"]
    assert "other, greedy" in summary_table(summary)


def test_same_seed_same_summary(working):
    workdir, summary = working
    assert summarise(workdir, CONFIG, ENVIRONMENT, SETTING, resamples=1000) == summary


def test_strict_json_takes_what_configs_hold():
    found = strict_json(
        {1: (np.float32(0.5), np.int64(2)), "a": float("nan"), "b": {"y", "x"}, "c": Path("runs/x")}
    )
    assert found == {"1": [0.5, 2], "a": None, "b": ["x", "y"], "c": "runs/x"}
    with pytest.raises(TypeError, match="got function"):
        strict_json({"a": check_value})


def test_write_summary_is_strict_json_on_disk(working, tmp_path):
    _, summary = working
    path = write_summary(tmp_path, summary)
    assert path == tmp_path / "report" / "summary.json"
    assert json.loads(path.read_text(encoding="utf-8")) == summary
    with pytest.raises(ValueError, match="finite numbers and None"):
        write_summary(tmp_path, {**summary, "schema": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == summary


def test_terminal_table_is_aligned_and_complete(working, failing):
    text = summary_table(working[1])
    lines = text.splitlines()
    rule = lines[2]
    starts = [
        index for index in range(len(rule)) if rule[index] == "-" and (index == 0 or rule[index - 1] == " ")
    ]
    for line in [lines[1], *lines[3:9]]:
        assert all(line[start] != " " and (start == 0 or line[start - 2 : start] == "  ") for start in starts)
    assert "6,000 samples, 800 steps" in lines[0] and "DOES NOT HOLD" not in text
    assert summary_table(failing[1]).count("DOES NOT HOLD") == sum(
        not c["holds"] for c in failing[1]["claims"]
    )
