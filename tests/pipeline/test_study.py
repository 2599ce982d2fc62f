"""The study in a run: further teachers, what is measured on each, a second start, colours, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_jax import pipeline
from distill_jax.pipeline import coloured_rollouts
from distill_jax.pipeline.checks import batch_rows
from distill_jax.pipeline.detector_reference import _ready
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.settings import read_settings, to_config
from distill_jax.pipeline.study_settings import StudyConfig
from distill_jax.pipeline.study_teachers import finished_teachers, study_teachers
from distill_jax.pipeline.workdir import open_workdir, plain_config, write_rows
from tests.pipeline.probed_run import one_device, probing
from tests.pipeline.tiny_run import ROOT, load_config, smallest

study_stage = importlib.import_module("distill_jax.pipeline.study")  # the package's name is the function
STUDY = StudyConfig(
    modes=("distillable",),
    eta=(0.5,),
    controls=1,
    calibration_steps=1,
    samples=8,
    student_steps=2,
    problems=8,
    positions=(-1.0, 0.7),
    probes="gap,decoding",
)
NAMES = {
    "original", "control", "distillable", "control-seed1", "distillable-eta0.5-seed1", "dial-distillable-at-1",
}  # fmt: skip
TEXTS = ["6+4=10 #### 10", "#", "2+2=4 #### 4"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(pipeline, "make_mesh", one_device)


def studying(study: StudyConfig = STUDY):
    """As configs/study.py does: the study on, probes and dial left as the finished run has them."""
    config = probing("none", dial=DialConfig(), stages=("prepare", "report"))
    with config.unlocked():
        config.study = to_config(study)
    return config


@pytest.fixture(scope="module")
def studied(probed, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """(workdir, summary) of the probed run with a study, and with rollouts to colour."""
    workdir = tmp_path_factory.mktemp("studied") / "run"
    shutil.copytree(probed[0], workdir)
    common = {
        "step": 9,
        "prompt": "6+4?\n",
        "answer": "10",
        "reward": 1.0,
        "gap_per_byte": 0.0,
        "style": None,
    }
    write_rows(workdir / "arms" / "original" / "rollouts.jsonl", [{**common, "completion": t} for t in TEXTS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_mesh", one_device)
        summary = pipeline.run(studying(), workdir)
    assert summary is not None
    return workdir, summary


def point(workdir: Path, name: str) -> dict[str, Any]:
    return json.loads((workdir / "study" / name / "point.json").read_text())


def test_every_teacher_is_measured(studied):
    workdir, summary = studied
    assert {path.parent.name for path in workdir.glob("study/*/point.json")} == NAMES
    for name in NAMES:
        found = point(workdir, name)
        assert list(found["before"]) == ["gap", "decoding"] and found["before"]["gap"]["metrics"]
        assert all(len(found["teacher"][decoding]) == 8 for decoding in ("greedy", "sample"))
        assert (found["after"] is None) == (found["source"] == "dial" or found["student"] is None)
        if found["student"] is not None:
            assert [len(seed) for seed in found["student"]["greedy"]] == [8]
        assert not (workdir / "study" / name / "training").exists()
    record = json.loads((workdir / "study" / "control-seed1" / "calibration.json").read_text())
    assert (record["arm"], record["eta"], record["seed"], record["steps"]) == ("control", 0.0, 1, 1)
    assert {teacher["name"] for teacher in summary["study"]["teachers"]} == NAMES
    assert "Does a probe predict?" in (workdir / "report" / "index.html").read_text()
    json.dumps(summary["study"], allow_nan=False)


def test_a_teacher_of_the_run_gives_what_the_dial_gave(studied):
    """The dial's position 1 is the distillable arm: the same texts, the same students, with sizes that are the same."""
    workdir, _ = studied
    turned = json.loads((workdir / "dial" / "distillable" / "scale1.json").read_text())
    own = point(workdir, "distillable")
    for key in ("teacher", "student", "bytes", "kept"):
        assert own[key] == turned[key]


def test_a_second_start_makes_only_what_is_missing(studied, monkeypatch):
    workdir, summary = studied
    path = workdir / "study" / "control-seed1" / "point.json"
    before = json.loads(path.read_text())
    path.unlink()
    looked, ordinary = [], study_stage._look_at
    monkeypatch.setattr(
        study_stage, "_look_at", lambda tools, entry: looked.append(entry.name) or ordinary(tools, entry)
    )
    again = pipeline.run(studying(), workdir)
    assert looked == ["control-seed1"]
    after = json.loads(path.read_text())
    assert {**after, "wall_clock_s": 0} == {**before, "wall_clock_s": 0}
    assert again is not None and again["study"] == summary["study"]


def test_rollouts_are_coloured_once(studied, monkeypatch):
    workdir, _ = studied
    stored = json.loads((workdir / "coloured_rollouts.json").read_text())
    rows = {row["completion"]: row["spans"] for row in stored["rows"]}
    assert set(TEXTS) <= set(rows) and stored["why_not"] is None
    for text, spans in rows.items():
        assert spans is not None and [begin for begin, *_ in spans] == [
            0,
            *(end for _, end, *_ in spans[:-1]),
        ]
        assert spans[-1][1] == len(text.encode())
        assert all(np.isfinite(span[2:]).all() and max(span[2:]) <= 0 for span in spans)
    assert 'class="legend"' in (workdir / "report" / "index.html").read_text()
    monkeypatch.setattr(coloured_rollouts, "load_role", lambda *rest: pytest.fail("scored again"))
    coloured_rollouts.colour_rollouts(read_settings(studying()), one_device(""), workdir)


def test_rollouts_stay_plain_when_the_models_are_gone(studied, tmp_path, capsys):
    shutil.copytree(studied[0] / "arms", tmp_path / "arms")
    coloured_rollouts.colour_rollouts(read_settings(studying()), one_device(""), tmp_path)
    assert "rollouts are not coloured" in capsys.readouterr().out
    assert not (tmp_path / "coloured_rollouts.json").exists()


def test_the_detector_reads_the_teachers_of_a_study(studied):
    workdir, _ = studied
    made = _ready(read_settings(studying()), workdir)
    assert [(t.name, t.kind, t.seed) for t in made] == [
        ("original", "untouched", 0),
        ("control", "untouched", 0),
        ("distillable", "distillable", 0),
        ("control-seed1", "untouched", 1),
        ("distillable-eta0.5-seed1", "distillable", 1),
    ]
    assert [t.of_study for t in made] == [False, False, False, True, True]
    assert len({t.group for t in made}) == 2 and len({t.run for t in made}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "words"}, r"study.kind is 'words'; the run's students are \['bytes'\]"),
        ({"student_steps": 3}, r"another study \(steps: 2 -> 3\)"),
        ({"calibration_steps": 2}, r"another study \(calibration_steps: 1 -> 2\)"),
    ],
)
def test_what_the_study_refuses(studied, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.run(studying(dataclasses.replace(STUDY, **change)), studied[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modes": ("control",)}, "controls are asked for by"),
        ({"eta": (0.5, 0.5)}, "names one twice"),
        ({"eta": (0.0,)}, "positive strengths"),
        ({"seeds": 0}, "at least 1"),
        ({"controls": -1}, "at least 0"),
        ({"probes": "none"}, "nothing to study"),
        ({"probes": "entropy"}, "probes names"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**wrong)


def test_names_tell_teachers_apart():
    made = study_teachers(StudyConfig(seeds=2, controls=2))
    assert len({teacher.name for teacher in made}) == len(made) == 2 + 2 * 2 * 4
    assert made[0].name == "control-seed1" and made[-1].name == "undistillable-eta1-seed2"
    assert all(teacher.seed >= 1 for teacher in made)  # 0 would be the run's own arms
    assert finished_teachers(ROOT, 0) == []


def test_the_config_goes_on_in_the_folder_of_a_finished_run(tmp_path):
    place = importlib.util.spec_from_file_location("study_config", ROOT / "configs" / "study.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    open_workdir(tmp_path, plain_config(load_config().get_config()))
    open_workdir(tmp_path, plain_config(module.get_config()))  # is not refused
    settings = read_settings(module.get_config())
    chosen, dial = settings.study, read_settings(load_config().get_config()).dial
    assert chosen is not None and len(study_teachers(chosen)) == 12
    assert (chosen.kind, chosen.samples, chosen.student_steps) == (dial.kind, dial.samples, dial.steps)
    assert settings.probes == () and settings.dial.arm == ""
    smoke = module.get_config()
    smoke.smoke = True
    assert len(study_teachers(read_settings(smoke).study)) == 3
    other = module.get_config()
    other.smoke_values = other.smoke_values[1:]  # what smoke does to the run itself is not free
    with pytest.raises(ValueError, match="smoke_values"):
        open_workdir(tmp_path, plain_config(other))


def test_batches_of_dial_and_study_must_divide():
    config = smallest()
    assert not {"dial.problems", "study.problems"} & set(batch_rows(read_settings(config)))
    with config.unlocked():
        config.dial = to_config(DialConfig("distillable", problems=6))
        config.study = to_config(dataclasses.replace(STUDY, problems=100))
    rows = batch_rows(read_settings(config))
    assert (rows["dial.problems"], rows["study.problems"]) == (6, 16)  # of 16 test problems at most
