"""The attack suite end to end on the smallest run: cells, controls, a second start, and what it refuses."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import shutil

import jax
import pytest

from distill_jax import pipeline
from distill_jax.attacks.tools import Query
from distill_jax.mesh import make_mesh
from distill_jax.pipeline import attack_arms, attack_cells
from distill_jax.pipeline.attack_arms import query_name
from distill_jax.pipeline.attack_settings import AttackSuite
from distill_jax.pipeline.settings import read_settings, to_config
from distill_jax.pipeline.workdir import read_rows
from tests.pipeline.tiny_run import smallest

attack_stage = importlib.import_module("distill_jax.pipeline.attack")  # the package's name is the function
SUITE = AttackSuite(arms=("original", "distillable"), search_problems=8)
ATTACKS = "A0,A0b,A1,A3,A5"


def one_device(spec):
    return make_mesh(spec, devices=jax.devices()[:1])


def attacking(attacks=ATTACKS, suite=SUITE, stages=("prepare", "calibrate", "report")):
    config = smallest({"stages": stages, "distillation.seeds": 2})
    with config.unlocked():
        config.attacks, config.attack_suite = attacks, to_config(suite)
    return config


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(pipeline, "make_mesh", one_device)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, summary) of a suite that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("attacked") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_mesh", one_device)
        return workdir, pipeline.run(attacking(), workdir)


def cells(workdir):
    return {
        path.relative_to(workdir / "students").parent.parent
        for path in workdir.glob("students/*/*/*/seed0/predictions.jsonl")
    }


def test_every_cell_has_answers_on_both_splits(finished):
    workdir, _ = finished
    found = {path.parts[:2] for path in cells(workdir)}
    real = {(arm, attack) for arm in ("original", "distillable") for attack in ("A1", "A3", "A5")}
    shams = {("sham", "A3"), ("sham", "A5"), *(("permuted", attack) for attack in ("A1", "A3", "A5"))}
    assert found == real | shams | {("gold", "A0b"), ("base", "none")}
    for arm, attack in found - {("base", "none")}:
        folder = workdir / "students" / arm / attack / "bytes"
        for seed in range(2):
            tested = read_rows(folder / f"seed{seed}" / "predictions.jsonl")
            assert [(row["decoding"], row["problem"]) for row in tested] == [
                (decoding, problem) for decoding in ("greedy", "sample") for problem in range(16)
            ]
            assert len(read_rows(folder / f"seed{seed}" / "validation.jsonl")) == 8
        knob = json.loads((folder / "knob.json").read_text())
        scores = knob["search"]["scores"]
        assert (knob["knob"] in scores) if scores else knob["search"]["queries"] == 0
        counts = json.loads((folder / "texts.json").read_text())["seeds"]
        assert len(counts) == 2


def test_validation_problems_are_no_test_problems_and_the_search_seed_is_not_reported(finished):
    workdir, _ = finished
    bench = attack_stage.make_bench(read_settings(attacking()), one_device("data=-1"), workdir)
    asked = {problem.prompt for problem in bench.validation_problems()}
    assert not asked & {problem.prompt for problem in attack_cells.test_problems(bench.settings)}
    assert bench.search_seed == 2
    assert (workdir / "students" / "original" / "texts_seed2.jsonl").exists()
    assert not list(workdir.glob("students/*/*/*/seed2"))


def test_summary_and_page(finished):
    workdir, summary = finished
    attacks = summary["attacks"]
    assert json.loads((workdir / "report" / "summary.json").read_text()) == summary
    assert attacks["clean"] == "original" and attacks["arms"] == ["original", "distillable"]
    assert set(attacks["cells"]["bytes"]) == {"A0", "A0b", "A1", "A3", "A5"}
    assert set(attacks["controls"]) == {"P1", "P2", "P3", "P4"}
    assert attacks["controls"]["P2"]["verdict"] == "not judged"  # no attack that reads distributions
    assert attacks["verdict"] in ("valid", "not validated")
    page = (workdir / "report" / "index.html").read_text()
    assert 'id="attacks"' in page and "P3 permuted labels" in page


def test_what_the_controls_need_is_measured(finished):
    workdir, _ = finished
    suite = json.loads((workdir / "attacks" / "suite.json").read_text())
    assert set(suite["shams"]) == {"sham", "swapped"} and suite["shams"]["sham"]["sham"] == 0.0
    bench = attack_stage.make_bench(read_settings(attacking()), one_device("data=-1"), workdir)
    answers = [problem.answer for problem in attack_cells.test_problems(bench.settings)]
    said = {
        answer
        for row, answer in zip(read_rows(workdir / "attacks" / "constant.jsonl"), answers, strict=True)
        if row["correct"]
    }
    [constant] = said
    assert answers.count(constant) == max(answers.count(answer) for answer in answers)


def test_cells_side_by_side_come_out_the_same_and_no_text_is_sampled_twice(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for gone in ("students", "attacks", "report"):
        shutil.rmtree(workdir / gone)
    ordinary, asked = attack_arms.decode_texts, collections.Counter()

    def count(settings, arm, problems, **options):
        asked[arm.name, problems[0].prompt, options["temperature"], str(options["key"])] += 1
        return ordinary(settings, arm, problems, **options)

    monkeypatch.setattr(attack_arms, "decode_texts", count)
    config = attacking()
    config.at_once = 3
    summary = pipeline.run(config, workdir)
    assert (
        set(asked.values()) == {1} and len(asked) == 2 * 3
    )  # two teachers, two seeds and that of the search
    assert summary["attacks"] == finished[1]["attacks"]
    for path in workdir.glob("students/*/*/*/seed*/*.jsonl"):
        assert path.read_bytes() == (finished[0] / path.relative_to(workdir)).read_bytes()


def test_one_knob_is_not_searched_for(finished, tmp_path, monkeypatch):
    """Of A8b's short grid there is one: two seeds are trained, and no third."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    ordinary, seeds = attack_cells.train_students, []

    def count(bench, arm, attack, knob, student, chosen):
        seeds.append((attack.id, list(chosen)))
        return ordinary(bench, arm, attack, knob, student, chosen)

    monkeypatch.setattr(attack_cells, "train_students", count)
    suite = dataclasses.replace(SUITE, arms=("original",), controls=False)
    pipeline.run(attacking("A8b", suite), workdir)
    assert seeds == [("A8b", [0, 1])]
    knob = json.loads((workdir / "students" / "original" / "A8b" / "bytes" / "knob.json").read_text())
    # 2 steps of 8 rows, half of them the student's own: 8 scored texts beside the 16 that were asked for
    assert knob["search"] == {"scores": {}, "queries": 0, "steps": 0}
    assert (knob["queries"], knob["steps"]) == (1.5, 0.5)


def test_best_of_all_is_run_again_when_a_better_attack_came_later(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    suite = dataclasses.replace(SUITE, arms=("original",), controls=False)

    def pretend(attack, correct):
        for path in workdir.glob(f"students/original/{attack}/bytes/seed*/validation.jsonl"):
            rows = [row | {"correct": correct} for row in read_rows(path)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ensemble():
        folder = workdir / "students" / "original" / "A14" / "bytes"
        return json.loads((folder / "knob.json").read_text()), (
            folder / "seed0" / "predictions.jsonl"
        ).stat().st_mtime_ns

    for attack, correct in (("A1", 1), ("A3", 0), ("A5", 0)):
        pretend(attack, correct)
    pipeline.run(attacking("A1,A14", suite), workdir)
    first, written = ensemble()
    assert first["attack"] == "A1" and set(first["search"]["scores"]) == {"A1", "A3", "A5"}
    pretend("A5", 0.5)  # still not the best: nothing is trained, the scores are those of now
    pipeline.run(attacking("A14", suite), workdir)
    assert ensemble()[1] == written and ensemble()[0]["search"]["scores"]["A5"] == 0.5
    pretend("A1", 0)
    pipeline.run(attacking("A14", suite), workdir)
    assert ensemble()[0]["attack"] == "A5" and ensemble()[1] > written


def test_second_start_trains_nothing(finished, monkeypatch):
    workdir, summary = finished

    def forbidden(*arguments, **options):
        raise AssertionError("a finished cell was run")

    monkeypatch.setattr(attack_cells, "train_students", forbidden)
    again = pipeline.run(attacking(), workdir)
    assert again["attacks"] == summary["attacks"]


def test_killed_suite_goes_on_to_the_same_answers(finished, tmp_path, monkeypatch):
    """Cells that were finished before the kill are left alone; the others come out as without it."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for gone in ("students/distillable/A1", "students/permuted", "report"):
        shutil.rmtree(workdir / gone)
    ordinary, calls = attack_cells.train_students, []

    def kill(bench, arm, attack, *rest):
        calls.append((arm, attack.id))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ordinary(bench, arm, attack, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(attack_cells, "train_students", kill)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(attacking(), workdir)
    assert calls == [("distillable", "A1")] * 2  # the search of a knob, then the cell
    pipeline.run(attacking("A0,A0b,A1,A3,A5", dataclasses.replace(SUITE, controls=False)), workdir)
    for seed in range(2):
        place = f"students/distillable/A1/bytes/seed{seed}/predictions.jsonl"
        assert (workdir / place).read_bytes() == (finished[0] / place).read_bytes()
    assert not (workdir / "students" / "permuted").exists()


def test_a_failed_control_is_an_error_after_the_report(finished, tmp_path, monkeypatch):
    """Were the permuted teacher's students perfect, the evaluation would leak."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for path in workdir.glob("students/permuted/A1/bytes/seed*/predictions.jsonl"):
        rows = [row | {"correct": 1} for row in read_rows(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(pipeline.InvalidEvaluationError, match="invalid: the positive controls P3 failed"):
        pipeline.run(attacking(), workdir)
    page = (workdir / "report" / "index.html").read_text()
    assert '<p class="alarm">THE EVALUATION IS INVALID' in page
    assert json.loads((workdir / "report" / "summary.json").read_text())["attacks"]["headlines"] == []


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"arms": ("original", "undistillable")}, r"names the arms \['undistillable'\]"),
        ({"kinds": ("words",)}, r"kinds names \['words'\]; the run's students are \['bytes'\]"),
        ({"search_problems": 9}, r"attacks of another suite \(search_problems: 8 -> 9\)"),
    ],
)
def test_what_the_suite_refuses(finished, suite, message):
    with pytest.raises(ValueError, match=message):
        pipeline.run(attacking(suite=dataclasses.replace(SUITE, **suite)), finished[0])


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (
            {"arms": ("mine",)},
            r"names the arms \['mine'\], but the run has \['original', 'control', 'distillable'\]",
        ),
        ({"clean": "cleaner"}, r"names the arms \['cleaner'\]"),
        ({"kinds": ("words",)}, r"kinds names \['words'\]"),
        ({"folders": "mine=not/there"}, r"attack_suite, mine: no model at 'not/there'"),
        ({"rewriter": "not/there"}, r"attack_suite, rewriter: no model at 'not/there'"),
    ],
)
def test_a_suite_that_cannot_run_is_refused_before_anything_is_trained(tmp_path, suite, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.run(attacking(suite=dataclasses.replace(SUITE, **suite)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_any_model_folder_is_an_arm(finished, tmp_path):
    """The original teacher's own folder under another name: the same texts, the same students."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    suite = dataclasses.replace(
        SUITE, arms=("mine",), folders=f"mine={workdir / 'models' / 'teacher'}", controls=False
    )
    summary = pipeline.run(attacking("A1", suite), workdir)["attacks"]
    assert summary["arms"] == ["original", "distillable", "mine"]
    for name in ("validation", "predictions"):
        mine, original = (
            (workdir / "students" / arm / "A1" / "bytes" / "seed1" / f"{name}.jsonl").read_bytes()
            for arm in ("mine", "original")
        )
        assert mine == original
    assert summary["retention"]["mine"]["difference"]["mean"] == 0.0
    other = dataclasses.replace(suite, folders=f"mine={workdir / 'models' / 'proxy'}")
    with pytest.raises(ValueError, match=r"another suite \(folders, mine: .*teacher' -> .*proxy'\)"):
        pipeline.run(attacking("A1", other), workdir)


@pytest.mark.parametrize(
    ("folders", "message"),
    [("here", "expected NAME=FOLDER"), ("original=/a", "is taken"), ("a=/b,a=/c", "is taken")],
)
def test_folders_that_are_no_arms(folders, message):
    with pytest.raises(ValueError, match=message):
        AttackSuite(folders=folders)


@pytest.mark.parametrize(
    "wrong", [{"grid": "wide"}, {"search_problems": 0}, {"margin": 0.0}, {"answer_mark": ""}]
)
def test_settings_of_the_suite_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AttackSuite(**wrong)


def test_queries_have_names_of_their_own():
    queries = [
        Query(),
        Query(sample=1),
        Query(part=1),
        Query(temperature=1.5),
        Query(system="a"),
        Query(system="b"),
        Query(weights="dial=-1"),
    ]
    names = [query_name(query) for query in queries]
    assert names[0] == "" and len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789=.-_") for name in names)
