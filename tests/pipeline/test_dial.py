"""The dial in a run: what a position holds, that its ends are the arms, a second start, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil

import pytest

from distill_jax import pipeline
from distill_jax.pipeline.dial_settings import DialConfig
from tests.pipeline.probed_run import DIAL, one_device, probing

dial_stage = importlib.import_module("distill_jax.pipeline.dial")  # the package's name is the function
POSITIONS = {"distillable": (-1, 0, 1), "control-distillable": (0.5, 1)}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(pipeline, "make_mesh", one_device)


def point(workdir, curve, position):
    return json.loads((workdir / "dial" / curve / f"scale{position}.json").read_text())


def test_every_position_has_teacher_gap_and_students(probed):
    workdir, summary = probed
    for curve, positions in POSITIONS.items():
        assert {path.name for path in (workdir / "dial" / curve).iterdir()} == {
            f"scale{p}.json" for p in positions
        }
        for position in positions:
            found = point(workdir, curve, position)
            for decoding in ("greedy", "sample"):
                assert len(found["teacher"][decoding]) == 8 and set(found["teacher"][decoding]) <= {0, 1}
                if found["student"] is not None:
                    assert [len(seed) for seed in found["student"][decoding]] == [8]
            assert (found["student"] is None) == bool(found["why_not"])
            assert len(found["gap_per_byte"]) == len(found["style"]) == 8
        shown = [p["position"] for p in summary["dial"]["curves"][curve]["points"]]
        assert shown == list(positions)
    assert not (workdir / "dial" / "training").exists()


def test_the_end_of_the_way_between_two_adapters_is_the_one_itself(probed):
    """At w = 1 the blend is the distillable adapter: the same texts, so the same teacher and the same students."""
    workdir, _ = probed
    one, other = point(workdir, "distillable", 1), point(workdir, "control-distillable", 1)
    for name in ("teacher", "student", "style", "bytes"):
        assert one[name] == other[name]
    assert one["gap_per_byte"] == pytest.approx(other["gap_per_byte"], abs=1e-5)


def test_position_zero_is_the_original_teacher(probed):
    workdir, summary = probed
    zero = point(workdir, "distillable", 0)
    sampled = json.loads((workdir / "dial" / "suite.json").read_text())
    assert (sampled["samples"], sampled["steps"], sampled["kind"]) == (8, 2, "bytes")
    (shown,) = (p for p in summary["dial"]["curves"]["distillable"]["points"] if p["position"] == 0.0)
    assert shown["loss"]["mean"] == 0.0
    assert shown["teacher_greedy"]["mean"] == sum(zero["teacher"]["greedy"]) / 8


def test_the_report_shows_the_curves(probed):
    workdir, _ = probed
    page = (workdir / "report" / "index.html").read_text()
    assert '<h2 id="dial">' in page
    for curve in POSITIONS:
        assert f'id="figure-dial_{curve}_accuracy"' in page
        for ending in ("png", "csv"):
            assert (workdir / "report" / "plots" / f"dial_{curve}_accuracy.{ending}").exists()


def test_a_second_start_adds_positions_and_makes_no_other_again(probed, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(probed[0], workdir)
    (workdir / "dial" / "distillable" / "scale-1.json").unlink()
    asked, ordinary = [], dial_stage.teacher_answers
    monkeypatch.setattr(
        dial_stage, "teacher_answers", lambda s, arm, *rest: asked.append(arm.name) or ordinary(s, arm, *rest)
    )
    pipeline.run(probing(), workdir)
    assert asked == ["distillable@-1"]
    assert (point(workdir, "distillable", -1)["student"]) == (point(probed[0], "distillable", -1)["student"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arm": "original"},
            r"dial.arm is 'original'; expected a calibrated arm .*'control', 'distillable'",
        ),
        ({"other": "undistillable"}, r"dial.other is 'undistillable'"),
        ({"kind": "words"}, r"dial.kind is 'words'; the run's students are \['bytes'\]"),
        ({"steps": 3}, r"another dial \(steps: 2 -> 3\)"),
    ],
)
def test_what_the_dial_refuses(probed, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.run(probing(dial=dataclasses.replace(DIAL, **change)), probed[0])


def test_arms_without_adapters_have_no_dial(tmp_path):
    config = probing(**{"calibration.trainable": "params"})
    with pytest.raises(ValueError, match=r"the dial scales an adapter, but calibration.trainable='params'"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": (-1.0, 1.0)}, "must hold 0"),
        ({"scales": (0.0, 0.0)}, "ascending"),
        ({"weights": (0.5,)}, "two or more"),
        ({"seeds": 0}, "seeds"),
        ({"floor": 1.0}, "floor"),
        ({"other": "control"}, "needs another arm"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        DialConfig(**wrong)
