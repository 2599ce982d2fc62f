"""The detector's reference from runs of the pipeline: which teachers count as what, its files, and bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import pytest

from distill_jax import detect, pipeline
from distill_jax.checkpoint import read_json, write_json
from distill_jax.mesh import make_mesh
from distill_jax.pipeline import detector_reference
from distill_jax.probes import detector
from tests.pipeline.tiny_run import smallest


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One run with an original, a control and a distillable teacher, three times."""
    folder = tmp_path_factory.mktemp("runs")
    config = smallest({"stages": ("prepare", "calibrate")})
    # Long enough that what the proxy writes is text.
    config.roles.proxy.phases = config.students.bytes.phases = config.roles.teacher.phases
    with pytest.MonkeyPatch.context() as patch:  # on one of the eight devices: what is tested is not sharding
        patch.setattr(pipeline, "make_mesh", lambda spec: make_mesh(spec, devices=jax.devices()[:1]))
        pipeline.run(config, folder / "run0")
    for copy in ("run1", "run2"):
        shutil.copytree(folder / "run0", folder / copy)
    return [folder / f"run{i}" for i in range(3)]


def test_the_reference_of_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run) for run in runs]
    command = [*folders, "--out", str(tmp_path), "--with_original", "--problems", "4", "--samples", "2"]
    assert detector_reference.main(command) == 0
    assert "calibrated: AUC" in capsys.readouterr().out
    setting, rows = detector.read_reference(tmp_path / "reference.json")
    assert (setting.task, setting.problems, setting.original) == ("chain_arithmetic", 4, True)
    assert [row.kind for row in rows] == ["untouched", "untouched", "distillable"] * 3
    assert rows[0].name == "run0/original (seed 0, eta 0)" and "run2/distillable" in rows[8].name
    assert set(rows[0].features) == set(detector.FEATURES)
    assert rows[0].features["log_ratio"] == 0.0 and rows[0].features["gap_shift"] == 0.0
    for first, second in zip(rows[:3], rows[3:6], strict=True):
        assert first.features == second.features  # the same models, asked the same
    table = read_json(tmp_path / "roc.json")
    assert set(table["roc"]) == {"calibrated", "distillable"} and len(table["scores"]) == 9
    assert (table["roc"]["distillable"]["positives"], table["roc"]["distillable"]["negatives"]) == (3, 6)
    # What was measured is what the command reads.
    found = detect.detect(
        runs[0] / "models" / "teacher",
        runs[0] / "models" / "proxy",
        tmp_path / "reference.json",
        original=runs[0] / "models" / "teacher",
    )
    assert found.untouched == 6 and found.features["log_ratio"].mean == 0.0
    assert found.false_alarm == pytest.approx(1 / 7)
    # It asks the same problems in the same way, so an untouched model gets the numbers of its row, and passes.
    for name, value in rows[0].features.items():
        mean = found.features[name].mean
        assert (mean is None) if value is None else mean == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert not found.calibrated


def test_runs_that_make_no_reference(runs: list[Path], tmp_path: Path) -> None:
    make = detector_reference.make_reference
    with pytest.raises(FileNotFoundError, match="holds no run"):
        make([tmp_path / "nothing"], tmp_path)
    with pytest.raises(ValueError, match="each of them once"):
        make([runs[0], runs[0]], tmp_path)
    with pytest.raises(ValueError, match="have 2 original and control teachers"):
        make(runs[:1], tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    config = read_json(runs[0] / "config.json")
    config["task"]["options"]["operations"] = [1, 3]
    write_json(other / "config.json", config)
    with pytest.raises(ValueError, match="is asked in another way than"):
        make([runs[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
