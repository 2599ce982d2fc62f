"""The folder of a run: whose it is, which stages stand in it, rows that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os

import pytest

from distill_jax.checkpoint import DiskFullError, read_json, write_json
from distill_jax.pipeline.workdir import (
    is_done,
    open_workdir,
    plain_config,
    read_rows,
    stage_clock,
    write_rows,
)
from tests.pipeline.tiny_run import load_config

CONFIG = {"seed": 0, "stages": ["prepare"], "distillation": {"steps": 4, "budgets": [1.0]}}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_folder_holds_config_and_environment(tmp_path):
    folder = tmp_path / "a" / "run"
    open_workdir(folder, CONFIG)
    assert read_json(folder / "config.json") == CONFIG
    environment = read_json(folder / "environment.json")
    assert environment["devices"] == ["8 x cpu (cpu)"]
    assert {"distill_jax", "jax", "flax"} <= set(environment["packages"])
    assert str(tmp_path) not in json.dumps(environment)


def test_an_empty_folder_may_be_given(tmp_path):
    open_workdir(tmp_path, CONFIG)
    assert read_json(tmp_path / "config.json") == CONFIG


def test_same_config_goes_on_and_stages_may_differ(tmp_path):
    open_workdir(tmp_path, CONFIG)
    before = contents(tmp_path)
    open_workdir(tmp_path, CONFIG)
    open_workdir(tmp_path, CONFIG | {"stages": ["report"]})
    assert contents(tmp_path) == before


def test_a_real_config_is_the_same_after_it_was_read_back(tmp_path):
    open_workdir(tmp_path, plain_config(load_config().get_config()))
    open_workdir(tmp_path, plain_config(load_config().get_config("tiny")))


def test_other_config_is_refused_with_every_difference(tmp_path):
    open_workdir(tmp_path, CONFIG)
    before = contents(tmp_path)
    other = {"seed": 1, "stages": [], "distillation": {"steps": 4, "budgets": [1.0, 2.0]}, "new": True}
    with pytest.raises(ValueError, match="is the run of another config; nothing was changed") as caught:
        open_workdir(tmp_path, other)
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert lines == ["distillation.budgets: [1.0] -> [1.0, 2.0]", "new: (absent) -> True", "seed: 0 -> 1"]
    assert contents(tmp_path) == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no run \(no config.json\)"):
        open_workdir(tmp_path, CONFIG)
    assert contents(tmp_path).keys() == {(tmp_path / "thesis.tex").relative_to(tmp_path)}


def test_stage_is_done_when_its_body_has_ended(tmp_path):
    with stage_clock(tmp_path, "distil"):
        assert not is_done(tmp_path, "distil")
    assert is_done(tmp_path, "distil") and not is_done(tmp_path, "evaluate")
    assert read_json(tmp_path / "stages" / "distil.json")["wall_clock_s"] >= 0


def test_time_of_interrupted_starts_is_added_up(tmp_path, monkeypatch):
    now = iter([0.0, 10.0, 100.0, 103.0, 200.0, 204.0])
    monkeypatch.setattr("distill_jax.pipeline.workdir.time.monotonic", lambda: next(now))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), stage_clock(tmp_path, "distil"):
            raise KeyboardInterrupt
        assert not is_done(tmp_path, "distil")
    with stage_clock(tmp_path, "distil"):
        pass
    assert read_json(tmp_path / "stages" / "distil.json") == {"wall_clock_s": 17.0}
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["distil.json"]


def test_the_error_of_a_stage_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    def no_room(path, obj):
        raise DiskFullError(f"disk is full while saving {path}")

    monkeypatch.setattr("distill_jax.pipeline.workdir.write_json", no_room)
    with pytest.raises(DiskFullError, match="the checkpoint"), stage_clock(tmp_path, "distil"):
        raise DiskFullError("disk is full while saving the checkpoint")


def test_rows_round_trip(tmp_path):
    """Also characters that end a line for Python, but not for JSON lines."""
    rows = [{"text": "a\u2028b\x85c\x0bd\r\ne\n"}, {"text": "日本語", "gap": None}, {}]
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    write_rows(path, [])
    assert read_rows(path) == []


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])
    with pytest.raises(ValueError, match="Out of range float"):
        write_rows(path, [{"a": 2}, {"a": float("nan")}])
    assert read_rows(path) == [{"a": 1}] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_rows_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}])

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("distill_jax.pipeline.workdir.os.fsync", no_room)
    with pytest.raises(
        DiskFullError, match=r"disk is full while saving .*rows.jsonl; what was finished before"
    ):
        write_rows(path, [{"a": 2}])
    assert read_rows(path) == [{"a": 1}] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_marker_is_all_that_counts(tmp_path):
    write_json(tmp_path / "stages" / "prepare.json", {"wall_clock_s": 1.0})
    assert is_done(tmp_path, "prepare")
