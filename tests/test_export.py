"""Exports of a tiny run: logits at every scale, the folders' files, the card, and what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from distill_jax import pipeline
from distill_jax.checkpoint import load_tree, save_tree
from distill_jax.export import export_arm, main
from distill_jax.mesh import make_mesh
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.models.model import load_model
from distill_jax.models.model_card import CardFacts, model_card
from tests.models.small_models import stored_weights
from tests.pipeline.tiny_run import smallest

TOKENS = np.random.default_rng(0).integers(3, 250, (2, 12))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with the stages prepare and calibrate done."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    changes = {"stages": ("prepare", "calibrate"), "calibration.optimizer.learning_rate": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_mesh", lambda spec: make_mesh(spec, devices=jax.devices()[:1]))
        pipeline.run(smallest(changes), workdir)
    # As after an update that helped: the tiny run may keep the adapter it began with.
    config = json.loads((workdir / "config.json").read_text())["calibration"]["adapter"]
    adapter = AdapterConfig(config["rank"], config["alpha"], tuple(config["targets"]))
    module = load_model(workdir / "models" / "teacher").module
    tree = init_adapter(module, adapter, jax.random.key(1))
    key = jax.random.key(2)
    tree = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), tree)
    save_tree(workdir / "arms" / "distillable" / "adapter", tree, overwrite=True)
    return workdir, adapter


def original(run):
    return load_model(run[0] / "models" / "teacher")


def calibrated_logits(run, scale):
    model = original(run)
    tree = load_tree(
        run[0] / "arms" / "distillable" / "adapter", init_adapter(model.module, run[1], jax.random.key(0))
    )
    return np.asarray(model.logits(TOKENS, adapter=tree, scale=scale, adapter_config=run[1]))


def test_scale_0_is_the_original_bit_for_bit(run, tmp_path):
    path = export_arm(run[0], "distillable", tmp_path / "out", scale=0.0)
    exported = load_model(path)
    np.testing.assert_array_equal(exported.logits(TOKENS), original(run).logits(TOKENS))
    ours, theirs = stored_weights(path), stored_weights(run[0] / "models" / "teacher")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_other_scales_turn_the_dial(run, tmp_path, scale):
    path = export_arm(run[0], "distillable", tmp_path / "out", scale=scale)
    logits = np.asarray(load_model(path).logits(TOKENS))
    np.testing.assert_allclose(logits, calibrated_logits(run, scale), atol=1e-4)
    assert np.abs(logits - np.asarray(original(run).logits(TOKENS))).max() > 0.05


def test_original_and_merged_folder(run, tmp_path):
    path = export_arm(run[0], "original", tmp_path / "out", max_shard_bytes=20_000)
    np.testing.assert_array_equal(load_model(path).logits(TOKENS), original(run).logits(TOKENS))
    names = {file.name for file in path.iterdir()}
    assert {
        "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors.index.json",
    } <= names  # fmt: skip
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (path / "model.safetensors").exists()


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_peft_folder(run, tmp_path, scale):
    """W + lora_alpha / r * B A with the stored matrices is the calibrated kernel."""
    path = export_arm(run[0], "distillable", tmp_path / "out", scale=scale, format="peft")
    assert {file.name for file in path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] == run[1].rank and config["lora_alpha"] == pytest.approx(scale * run[1].alpha)
    low = load_file(path / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (low[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    merged = stored_weights(export_arm(run[0], "distillable", tmp_path / "merged", scale=scale))
    kernel = stored_weights(run[0] / "models" / "teacher")[f"{name}.weight"]
    expected = kernel + config["lora_alpha"] / config["r"] * (b @ a)
    np.testing.assert_allclose(merged[f"{name}.weight"], expected, atol=1e-6)


def test_card_of_a_run_without_a_report(run, tmp_path):
    card = (export_arm(run[0], "distillable", tmp_path / "my-model", scale=0.5) / "README.md").read_text()
    for part in (
        "# my-model", "distillable mode", "exported at scale 0.5", "smoke size", "## Intended use",
        "| eta (weight of the calibration reward) | 0.5 |", "| proxy | a model trained in the run (llama,",
        "| task | chain_arithmetic |", "operations = ", "the run had no report", "As a teacher",
    ):  # fmt: skip
        assert part in card, part
    assert str(run[0]) not in card


def test_card_shows_the_numbers_of_the_report(run, tmp_path):
    def value(mean):
        return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 9, "seeds": None}

    report = run[0] / "report" / "summary.json"
    report.parent.mkdir()
    arm = {
        "teacher": {"accuracy_greedy": value(0.9), "gap_per_byte": value(-0.2)},
        "students": {"sft": {"bytes": {"accuracy_greedy": value(0.8), "accuracy_greedy@2x": value(0.85)}}},
    }
    claims = [
        {"name": "teacher_accuracy/distillable", "statement": "The teacher is as good."},
        {"name": "students_beat_gold/bytes", "statement": "Students learn more."},
        {"name": "guard_at_1x/bytes", "statement": "Students learn less."},
    ]
    report.write_text(json.dumps({"arms": {"distillable": arm, "original": {}}, "claims": claims}))
    try:
        card = (export_arm(run[0], "distillable", tmp_path / "one") / "README.md").read_text()
        zero = (export_arm(run[0], "distillable", tmp_path / "zero", scale=0.0) / "README.md").read_text()
    finally:
        report.unlink()
        report.parent.rmdir()
    for part in (
        "| this model, accuracy greedy | 90.0 [80.0, 100.0] % |",
        "| this model, gap per byte | -0.200 [-0.300 to -0.100] |",
        "| its students (bytes, sft), accuracy greedy@2x | 85.0 [75.0, 95.0] % |", "- The teacher is as good.",
        "- Students learn more.",
    ):  # fmt: skip
        assert part in card, part
    assert "Students learn less" not in card
    assert "90.0" not in zero and "bit for bit" in zero and "As a teacher" not in zero


def test_card_of_the_guard_promises_nothing():
    facts = CardFacts("m", "undistillable", "peft", "base", 0.5, 1.0, "proxy", "task", "data")
    card = model_card(facts)
    assert "This is no lock" in card and "PeftModel.from_pretrained" in card and "library_name: peft" in card
    with pytest.raises(ValueError, match="a card is of an arm in"):
        model_card(CardFacts("m", "best", "peft", "base", 0.5, 1.0, "proxy", "task", "data"))


def test_what_is_refused_leaves_nothing_behind(run, tmp_path):
    out = tmp_path / "out"

    def refused(kind, message, **changes):
        arguments = {"workdir": run[0], "arm": "distillable", "out": out} | changes
        with pytest.raises(kind, match=message):
            export_arm(**arguments)
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    refused(FileNotFoundError, "holds no run", workdir=tmp_path)
    refused(
        ValueError,
        "arm 'undistillable' is not in .*it has original, control, distillable",
        arm="undistillable",
    )
    refused(ValueError, "format must be one of", format="gguf")
    refused(ValueError, "scale must be a number, got nan", scale=float("nan"))
    refused(ValueError, "'original' has no adapter to export", arm="original", format="peft")
    refused(ValueError, "'original' has no adapter to scale .*got 0.5", arm="original", scale=0.5)
    refused(ValueError, "max_shard_bytes must be at least 1", max_shard_bytes=0)


def test_an_existing_folder_is_not_touched(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty; choose another folder"):
        export_arm(run[0], "distillable", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_command(run, tmp_path, capsys):
    common = ["--workdir", str(run[0]), "--arm", "control", "--out", str(tmp_path / "out")]
    assert main([*common, "--format", "peft", "--scale", "0.5"]) == 0
    assert "peft export of arm control at scale 0.5" in capsys.readouterr().out
    assert main(common) == 2
    assert "error: " in capsys.readouterr().err
