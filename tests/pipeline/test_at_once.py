"""Pieces of a stage side by side: the results of one after another, and an error that stops what has not begun."""

from __future__ import annotations

import threading
import time

import jax
import pytest

from distill_jax import pipeline
from distill_jax.mesh import make_mesh
from distill_jax.pipeline.at_once import run_at_once
from tests.pipeline.tiny_run import smallest


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_run(workers):
    seen = []
    run_at_once([lambda number=number: seen.append(number) for number in range(7)], workers)
    assert sorted(seen) == list(range(7))


def test_two_jobs_do_run_at_the_same_time():
    meeting = threading.Barrier(2, timeout=30)
    run_at_once([meeting.wait, meeting.wait], 2)  # one after another, the first would wait in vain


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_and_begins_nothing_more(workers):
    begun = []

    def fail():
        raise OSError("no room")

    def job():
        time.sleep(0.001)  # all 1,000 could be done before a busy machine has seen the error
        begun.append(1)

    with pytest.raises(OSError, match="no room"):
        run_at_once([fail, *[job] * 1000], workers)
    assert len(begun) < 1000


def test_a_run_side_by_side_has_the_results_of_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "make_mesh", lambda spec: make_mesh(spec, devices=jax.devices()[:1]))
    changes = {"stages": ("prepare", "calibrate", "distil", "evaluate"), "distillation.seeds": 1}
    calibrate = pipeline.calibrate_arms
    gold_students = []

    def calibrate_arms(settings, mesh, workdir):
        gold_students.append(len(list((workdir / "students").glob("gold/sft/*/steps*"))))
        calibrate(settings, mesh, workdir)

    monkeypatch.setattr(pipeline, "calibrate_arms", calibrate_arms)
    for workers in (1, 2):
        pipeline.run(smallest(changes | {"at_once": workers}), tmp_path / str(workers))
    # Side by side, students that need no teacher are trained beside the teacher.
    assert gold_students[0] == 0 < gold_students[1]
    patterns = (
        "models/*/model.safetensors",
        "arms/*/evaluation.jsonl",
        "students/*/*/*/seed*/predictions.jsonl",
    )
    paths = [
        path.relative_to(tmp_path / "1") for pattern in patterns for path in (tmp_path / "1").glob(pattern)
    ]
    assert len(paths) == 3 + 3 + 5
    for path in paths:
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes(), path


def test_at_once_below_one_is_refused():
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        pipeline.read_settings(smallest({"at_once": 0}))
