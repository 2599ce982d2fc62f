"""The probes in a run: what they leave behind, a second start, what they refuse, and configs/probe.py."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import shutil

import pytest

from distill_jax import pipeline
from distill_jax.pipeline import probe_texts
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.probe_settings import PROBES, ProbeSuite, choose_probes
from distill_jax.pipeline.probe_summary import diagnosis_text, summarise_probes
from distill_jax.pipeline.settings import read_settings
from distill_jax.probes.results import from_json
from tests.pipeline.probed_run import SUITE, one_device, probing
from tests.pipeline.tiny_run import ROOT, smallest

probe_stage = importlib.import_module("distill_jax.pipeline.probe")  # the package's name is the function
ARMS = ("original", "distillable")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(pipeline, "make_mesh", one_device)


def test_every_arm_has_every_probe(probed):
    workdir, summary = probed
    assert {path.stem for path in (workdir / "probes").iterdir()} == {"suite", *ARMS}
    for arm in ARMS:
        kinds = json.loads((workdir / "probes" / f"{arm}.json").read_text())
        assert list(kinds) == ["bytes"] and list(kinds["bytes"]) == list(PROBES)
        numbers = summary["arms"][arm]["probes"]
        for probe, result in kinds["bytes"].items():
            assert result["metrics"], result["notes"]
            from_json(result)  # reads back
            for metric, value in result["metrics"].items():
                assert numbers[probe][f"bytes/{metric}"] == value
            if probe not in ("overconfidence", "self_correction"):
                assert set(result["before"]) == set(result["metrics"])
                assert f"bytes/{next(iter(result['before']))}@before" in numbers[probe]
    assert summary["arms"]["control"]["probes"] == {}


def test_an_answer_ends_where_the_task_stops_reading():
    """The last mark would be the one of a question that the model asked itself."""
    texts = ["4 + 3\n#### 7", "\n\n4 + 3\n####  7\n\nQuestion: 4 + 4\n#### 8", "4 + 3", "#### \n\n7"]
    answers, starts = probe_texts.read_answers(texts, "####", ("\n\n", "\nQuestion:"))
    assert answers == ["7", "7", None, None]
    assert starts.tolist() == [11, 14, -1, -1]
    assert probe_texts.read_answers(["So\nAnswer: B\nQuestion: x"], "Answer:", ("\nQuestion:",))[0] == ["B"]


@pytest.mark.parametrize("name", ["calib_guard", "probe", "attack"])
def test_choices_are_found_behind_their_own_mark(name):
    place = importlib.util.spec_from_file_location("any_config", ROOT / "configs" / f"{name}.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    config = module.get_config("gemma3_270m,multiple_choice")
    assert config.probe_suite.answer_mark == config.attack_suite.answer_mark == "Answer:"


def test_a_student_that_never_answers_right_is_said_in_words(probed, tmp_path, monkeypatch):
    """What needs right answers is undefined, not NaN, and the diagnosis says why."""
    workdir = tmp_path / "run"
    shutil.copytree(probed[0], workdir)
    for arm in ARMS:
        (workdir / "probes" / f"{arm}.json").unlink()
    shutil.rmtree(workdir / "dial")
    monkeypatch.setattr(probe_texts, "judge", lambda settings, task, problems, *rest: [0] * len(problems))
    suite = dataclasses.replace(SUITE, arms=("original",))
    summary = pipeline.run(probing(suite=suite, dial=DialConfig()), workdir)
    numbers = summary["arms"]["original"]["probes"]
    preference = numbers["gap"]["bytes/wrong_trace_preference"]
    assert preference["mean"] is None and preference["n"] == 0
    assert numbers["overconfidence"]["bytes/accuracy.after"]["mean"] == 0.0
    (finding,) = (f for f in summary["diagnosis"]["original"]["bytes"] if f["name"] == "wrong_traces")
    assert finding["verdict"] == "unknown" and "not measured" in finding["sentence"]
    assert "dial" not in summary
    assert '<h2 id="probes">' in (workdir / "report" / "index.html").read_text()


def test_a_probe_that_refuses_the_texts_leaves_its_reason():
    def refuse():
        raise ValueError("3 of 4 texts cannot be aligned")

    result = probe_stage._measured("gap", refuse)
    notes = ["not measured: 3 of 4 texts cannot be aligned"]
    assert result == {"probe": "gap", "metrics": {}, "facts": {}, "notes": notes}


def test_the_report_shows_probes_and_diagnosis(probed):
    workdir, summary = probed
    page = (workdir / "report" / "index.html").read_text()
    assert '<h2 id="probes">' in page and "bytes students: diagnosis" in page
    for name in ("probe_bytes_tail_noise", "probe_bytes_gap"):
        drawn = (workdir / "report" / "plots" / f"{name}.csv").exists()
        assert drawn == (f'id="figure-{name}"' in page)
    assert (workdir / "report" / "plots" / "probe_bytes_tail_noise.png").exists()
    text = diagnosis_text(summary["diagnosis"])
    assert "Diagnosis: bytes students of the distillable teacher" in text
    for finding in summary["diagnosis"]["original"]["bytes"]:
        absent = finding["verdict"] == "absent"  # named, not spelled out
        assert (finding["sentence"] in text) != absent and finding["name"].replace("_", " ") in text


def test_a_second_start_measures_nothing_and_prints_no_empty_table(probed, monkeypatch, capsys):
    workdir, summary = probed

    def forbidden(*arguments):
        raise AssertionError("an arm was probed again")

    monkeypatch.setattr(probe_stage, "measure_all", forbidden)
    again = pipeline.run(probing(), workdir)
    printed = capsys.readouterr().out
    assert "Diagnosis" in printed and "Accuracy in per cent" not in printed  # no student was asked
    assert again["arms"] == summary["arms"] and again["diagnosis"] == summary["diagnosis"]
    assert again["dial"] == summary["dial"]
    assert again["wall_clock_s"]["probe"] >= summary["wall_clock_s"]["probe"]


def test_an_arm_that_is_missing_is_measured_to_the_same_numbers(probed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(probed[0], workdir)
    path = workdir / "probes" / "distillable.json"
    before = path.read_bytes()
    path.unlink()
    pipeline.run(probing(), workdir)
    assert path.read_bytes() == before


def test_probes_are_off_unless_asked_for():
    config = smallest()
    with config.unlocked():
        config.smoke = False  # which sets fields of the suites
        for name in ("probes", "probe_suite", "dial"):
            del config[name]
    settings = read_settings(config)
    assert settings.probes == () and settings.dial.arm == ""
    assert choose_probes("decoding, gap") == ("gap", "decoding")
    summary = {"arms": {"original": {"probes": {}}}, "missing": []}
    summarise_probes(ROOT, summary)
    assert summary == {"arms": {"original": {"probes": {}}}, "missing": []}


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (
            {"arms": ("undistillable",)},
            r"probe_suite.arms names \['undistillable'\]; the run has original, control",
        ),
        ({"kinds": ("words",)}, r"probe_suite.kinds names \['words'\]; the run has bytes"),
        ({"samples": 3}, r"measured otherwise \(samples: 2 -> 3\)"),
    ],
)
def test_what_the_suite_refuses(probed, suite, message):
    with pytest.raises(ValueError, match=message):
        pipeline.run(probing(suite=dataclasses.replace(SUITE, **suite)), probed[0])


def test_students_that_are_not_there(probed):
    """The control was not distilled: without `distil` that is an error that names the stage."""
    suite = dataclasses.replace(SUITE, arms=("control",), distil=False)
    with pytest.raises(FileNotFoundError, match=r"students of 4 steps for control/bytes .*stage 'distil'"):
        pipeline.run(probing(suite=suite), probed[0])


@pytest.mark.parametrize(
    "wrong",
    [{"problems": 0}, {"temperature": 0.0}, {"answer_mark": ""}, {"unaligned_limit": 1.0}, {"chunk": 0}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ProbeSuite(**wrong)


def test_unknown_probe():
    with pytest.raises(
        ValueError, match=r"probes names \['entropy'\]; expected 'none', 'all', or some of tail_noise"
    ):
        read_settings(probing("gap,entropy"))


def test_config_of_any_two_models():
    place = importlib.util.spec_from_file_location("probe_config", ROOT / "configs" / "probe.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    for pair, source in (("tiny", "train"), ("gemma3_270m", "gemma3-270m")):
        config = module.get_config(pair)
        settings = read_settings(config)
        assert settings.arms == ("original",) and settings.probes == PROBES and settings.probe_suite.distil
        assert settings.roles["teacher"].source == source and list(settings.students) == ["student"]
        config.teacher, config.student = "one", "other"
        settings = read_settings(config)
        sources = {settings.roles["proxy"].source, settings.students["student"].source}
        assert (settings.roles["teacher"].source, sources) == ("one", {"other"})
    with pytest.raises(
        ValueError, match=r"pair 'huge' does not exist; choose from \['tiny', 'gemma3_270m'\]"
    ):
        module.get_config("huge")
