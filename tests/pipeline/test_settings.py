"""The way from a config file to settings and back, smoke mode, what is refused, and the plan's arithmetic."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import typing
from collections.abc import Mapping

import jax
import pytest
from ml_collections import config_dict

from distill_jax import pipeline
from distill_jax.models.adapter import TARGETS, AdapterConfig, init_adapter
from distill_jax.models.decoder import Decoder
from distill_jax.models.presets import PRESETS
from distill_jax.models.spec import ModelSpec, RopeScaling
from distill_jax.optimizer import OptimizerConfig
from distill_jax.pipeline.arms import make_task
from distill_jax.pipeline.attack_settings import AttackSuite
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.plan import adapter_params, calibration_memory, format_plan, mesh_sizes
from distill_jax.pipeline.probe_settings import ProbeSuite
from distill_jax.pipeline.settings import (
    STAGES,
    Distillation,
    Evaluation,
    Phase,
    Role,
    Settings,
    from_config,
    read_settings,
    to_config,
)
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.losses import KLAnchor
from distill_jax.rft.step import RftConfig
from distill_jax.students.train import StudentConfig
from tests.pipeline.tiny_run import PAIRS, ROOT, load_config


def get_config(pair="tiny", changes=()):
    config = load_config().get_config(pair)
    config.update_from_flattened_dict(dict(changes))
    return config


def settings(pair="tiny", changes=()) -> Settings:
    return read_settings(get_config(pair, changes))


def parts(value):
    """Every dataclass in a value, itself first."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from parts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from parts(item)


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_dataclass_comes_back_from_its_config(pair, smoke):
    read = settings(pair, {"smoke": smoke, "budget_curve": "full"})
    found = [part for part in parts(read) if part is not read]
    kinds = {type(part) for part in found}
    wanted = {Role, ModelSpec, CalibrationConfig, RftConfig, KLAnchor, AdapterConfig, OptimizerConfig}
    wanted |= {Distillation, StudentConfig, Evaluation, AttackSuite, ProbeSuite, DialConfig}
    wanted |= {Phase} if pair == "tiny" else set()
    wanted |= {RopeScaling} if pair == "gemma3_12b" else set()
    assert kinds == wanted
    for part in found:
        assert from_config(type(part), to_config(part), "part") == part
        assert from_config(type(part), to_config(part).to_dict(), "part") == part  # as JSON has it
        assert hash(part) == hash(from_config(type(part), to_config(part), "part"))


@pytest.mark.parametrize("pair", PAIRS)
def test_what_the_config_file_wrote_is_what_the_pipeline_reads(pair):
    config, read = get_config(pair), settings(pair)
    assert (read.pair, read.stages, read.seed) == (pair, STAGES, 0)
    assert read.arms == ("original", "control", "distillable", "undistillable")
    rows = read.calibration.prompts_per_step * read.calibration.rft.num_samples
    assert rows == config.calibration.batch_size
    assert read.distillation.seeds >= 3 and read.evaluation.problems >= 512
    assert read.distillation.long_budgets == ()  # only with budget_curve="full"
    if pair != "tiny":
        assert {role.spec for role in read.roles.values()} <= set(PRESETS.values())


def test_every_field_can_be_set_by_hand():
    """A field whose default is None takes a value; one inside a nested dataclass as well."""
    changes = {
        "calibration.length_ceiling": 2.5,
        "calibration.advantage_scale": "none",
        "calibration.rft.kl.coefficient": 0.5,
        "roles.teacher.spec.sliding_window": 8,
        "distillation.training.adapter.rank": 3,
        "distillation.prompt_size": 24,
    }
    read = settings("tiny", changes)
    assert read.calibration.length_ceiling == 2.5 and read.calibration.advantage_scale == "none"
    assert read.calibration.rft.kl.coefficient == 0.5 and read.roles["teacher"].spec.sliding_window == 8
    assert read.distillation.training.adapter.rank == 3 and read.distillation.prompt_size == 24
    assert settings().calibration.length_ceiling is None


def test_unknown_field_is_named_with_those_that_exist():
    config = get_config()
    with config.unlocked():
        config.distillation.training.optimizer.lerning_rate = 1.0
    message = (
        r"distillation.training.optimizer: unknown fields \['lerning_rate'\]; expected some of \['b2', 'clip', "
        r"'final_fraction', 'learning_rate', 'name', 'warmup_steps', 'weight_decay'\]"
    )
    with pytest.raises(ValueError, match=message):
        read_settings(config)
    with pytest.raises(ValueError, match=r"roles.teacher.phases\[1\]: unknown fields \['epochs'\]"):
        phase = {"steps": 1, "learning_rate": 0.1, "styles": (("terse", 1.0),)}
        settings("tiny", {"roles.teacher.phases": (phase, phase | {"epochs": 2})})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"phase: .*missing .*'styles'"):
        from_config(Phase, {"steps": 3, "learning_rate": 0.1}, "phase")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"calibration.rft.num_samples": 6},
            "calibration.batch_size=128 does not divide by calibration.rft.num_samples=6 rollouts a prompt",
        ),
        ({"calibration.rft.num_samples": 0}, "does not divide by calibration.rft.num_samples=0"),
        ({"calibration.batch_size": 0}, "calibration.batch_size must be at least 1, got 0"),
        ({"calibration.batch_size": -8}, "calibration.batch_size must be at least 1, got -8"),
        (
            {"calibration.rft.micro_batches": 3},
            r"calibration: a batch of 128 rows \(.*\) does not divide into rft.micro_batches=3",
        ),
        ({"distillation.budgets": (0.5, 2.0)}, "distillation: budgets must be ascending .* 1.0 among them"),
        ({"distillation.budgets": (2.0, 1.0)}, "distillation: budgets must be ascending"),
        ({"distillation.budgets": (-1.0, 1.0)}, "distillation: budgets must be ascending"),
        (
            {"distillation.long_budgets": (2.0,), "budget_curve": "full"},
            r"long_budgets \(2.0,\) must ascend, above budgets",
        ),
        (
            {"distillation.long_budgets": (8.0, 4.0), "budget_curve": "full"},
            r"long_budgets \(8.0, 4.0\) must ascend, above budgets",
        ),
        ({"distillation.steps": 1}, r"steps=1 are too few to tell the budgets \(0.5, 1.0, 2.0\) apart"),
        ({"distillation.seeds": 0}, "samples, steps and seeds must be at least 1"),
        ({"distillation.prompt_size": 0}, "prompt_size must be at least 1"),
        ({"evaluation.batch": 0}, "evaluation: evaluation settings must be positive"),
        ({"budget_curve": "long"}, "budget_curve must be 'short' or 'full', got 'long'"),
        ({"stages": ("prepare", "train")}, r"stages \['train'\] do not exist; choose from"),
        ({"eta.control": 0.5}, "arm 'control' with eta=0.5"),
        ({"eta.distillable": -1.0}, "eta must be >= 0"),
        ({"dtype": "float8"}, r"dtype must be one of \('float32', 'bfloat16', 'float16'\), got 'float8'"),
        ({"remat": "some"}, "remat must be one of .*, got 'some'"),
        ({"roles.proxy.tokenizer": "words"}, "roles.proxy: tokenizer of a trained model must be one of"),
        ({"roles.proxy.phases": ()}, "roles.proxy: .* needs at least one phase"),
        ({"roles.proxy.prompt_style": "poem"}, "roles.proxy: prompt_style must be one of .*, got 'poem'"),
        ({"base_optimizer.name": "lion"}, "base_optimizer: optimizer 'lion' is not one of"),
        ({"calibration.steps": 0}, "calibration: steps must be at least 1"),
        ({"roles.proxy.weights": "int4"}, r"roles.proxy: weights must be one of .*, got 'int4'"),
        ({"students.bytes.weights": "int8"}, r"students.bytes.weights='int8': .* a student's are trained"),
        (
            {"roles.teacher.weights": "int8", "calibration.trainable": "params"},
            "roles.teacher.weights='int8' with calibration.trainable='params': .* train an adapter",
        ),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings("tiny", changes)


@pytest.mark.parametrize("change", [("eta", "best"), ("roles", None)])
def test_arms_and_roles(change):
    config = get_config()
    with config.unlocked():
        if change[0] == "eta":
            config.eta.best = 1.0
        else:
            del config.roles["proxy"]
    message = "eta names arms .*'best'" if change[0] == "eta" else r"roles \['proxy'\] are not given"
    with pytest.raises(ValueError, match=message):
        read_settings(config)


def test_unknown_pair():
    with pytest.raises(
        ValueError, match=r"pair 'gemma4' does not exist; choose from \['gemma3_12b', .*'tiny'\]"
    ):
        get_config("gemma4")
    assert load_config().get_config("").pair == "tiny"


@pytest.mark.parametrize("pair", PAIRS)
def test_smoke_values_apply(pair):
    config = get_config(pair, {"smoke": True})
    read = read_settings(config)
    assert config.smoke_values
    for path, _, smoke in config.smoke_values:
        value: typing.Any = read
        if path == "calibration.batch_size":
            value = read.calibration.prompts_per_step * read.calibration.rft.num_samples
        else:
            for name in path.split("."):
                value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        if path.endswith("phases"):
            value, smoke = [phase.steps for phase in value], [phase["steps"] for phase in smoke]
        assert value == (tuple(smoke) if isinstance(value, tuple) else smoke), path
    full = settings(pair)
    assert read.calibration.steps < full.calibration.steps
    assert config.calibration.steps == full.calibration.steps  # the config itself is not changed


def test_a_field_set_by_hand_survives_smoke():
    phase = {"steps": 7, "learning_rate": 0.1, "styles": (("terse", 1.0),)}
    changes = {"smoke": True, "distillation.steps": 33, "roles.teacher.phases": (phase,)}
    read = settings("tiny", changes)
    assert read.distillation.steps == 33 and read.distillation.samples == 64
    assert [part.steps for part in read.roles["teacher"].phases] == [7]


def test_budget_curve():
    assert settings().distillation.long_budget_steps == {}
    full = settings("tiny", {"budget_curve": "full"}).distillation
    assert full.budget_steps == {200: 0.5, 400: 1.0, 800: 2.0}
    assert full.long_budget_steps == {1600: 4.0, 3200: 8.0}


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_prints_a_plan(pair, capsys):
    config = get_config(pair, {"stages": ()})
    assert pipeline.run(config) is None
    plan = capsys.readouterr().out.rstrip("\n")
    assert plan == format_plan(read_settings(config))
    for text in (f"pair {pair}", "teacher", "proxy", "student_", "mesh: ", "GiB", "3 seeds"):
        assert text in plan
    if pair == "gemma3_12b":
        assert "fsdp=16" in plan and "(16 devices)" in plan and "11766.03M" in plan


def test_adapter_arithmetic_is_what_an_adapter_has():
    spec = ModelSpec("llama", 40, 16, 3, 4, 2, 6, 24, tie_embeddings=False)
    for targets in (TARGETS, ("attn",), ("mlp",)):
        config = AdapterConfig(rank=3, alpha=6.0, targets=targets)
        abstract = jax.eval_shape(lambda c=config: init_adapter(Decoder(spec), c, jax.random.key(0)))
        assert adapter_params(spec, config) == sum(leaf.size for leaf in jax.tree.leaves(abstract))


def test_memory_by_hand():
    """The tiny pair on data=2,fsdp=2,tensor=2; every number below is worked out from the config file."""
    read = settings("tiny", {"mesh": "data=2,fsdp=2,tensor=2", "remat": "full", "dtype": "bfloat16"})
    memory = calibration_memory(read)
    # A layer: attention 4 * 96 * 96, three matrices 96 * 256, two norms; embedding and head 259 * 96; final norm.
    teacher = 4 * (4 * 96 * 96 + 3 * 96 * 256 + 2 * 96) + 2 * 259 * 96 + 96
    proxy = 2 * (4 * 32 * 32 + 3 * 32 * 86 + 2 * 32) + 2 * 259 * 32 + 32
    adapter = 8 * (4 * (4 * (96 + 96) + 3 * (96 + 256)) + 96 + 259)
    assert memory == {
        "teacher weights": teacher * 2 / 4,
        "proxy weights": proxy * 2 / 4,
        "trained weights, gradient, two moments": 16 * adapter / 4,
        # keys and values, 4 layers, 128 rows over 4, 16 + 48 slots, width 96, 2 bytes, halved by tensor
        "key/value cache of the rollouts": 2 * 4 * 32 * 64 * 96 * 2 / 2,
        "saved activations of a micro-batch": 4 * 32 * 64 * 96 * 2,
        "attention scores of a micro-batch": 4 * 32 * 4 * 64 * 64 / 2,  # 4 heads, float32
        "logits of a chunk": 2 * 4 * 32 * 64 * 259 / 2,
        "logits of a chunk of reference scoring": 4 * 32 * 64 * 259 / 2,
    }
    # In 8 bits: each kernel number one byte, each output channel of it four (4 projections and 3 matrices a layer).
    kernels, channels = 4 * (4 * 96 * 96 + 3 * 96 * 256), 4 * (4 * 96 + 2 * 256 + 96)
    small = settings(
        "tiny", {"mesh": "data=2,fsdp=2,tensor=2", "dtype": "bfloat16", "roles.teacher.weights": "int8"}
    )
    assert (
        calibration_memory(small)["teacher weights"] == ((teacher - kernels) * 2 + kernels + 4 * channels) / 4
    )
    assert calibration_memory(small)["proxy weights"] == memory["proxy weights"]
    assert "M int8" in format_plan(small)
    scores = "attention scores of a micro-batch"
    for remat, layers in (("dots", 1), ("none", 4)):
        assert calibration_memory(dataclasses.replace(read, remat=remat))[scores] == layers * memory[scores]


@pytest.mark.parametrize(
    "spec", ["data", "data=0", "data=-2", "rows=2", "data=x", "data=-1,fsdp=-1", "data=2,data=3"]
)
def test_mesh_that_cannot_be_planned(spec):
    with pytest.raises(ValueError, match=f"mesh {spec!r}: "):
        mesh_sizes(spec)


def test_mesh_of_a_plan_needs_no_devices():
    assert mesh_sizes("fsdp=16, tensor=2") == {"data": 1, "fsdp": 16, "tensor": 2}
    assert mesh_sizes("data=-1,tensor=2") == {"data": 4, "fsdp": 1, "tensor": 2}
    assert mesh_sizes("data=-1,tensor=64")["data"] == 1


def test_published_models_have_their_published_sizes():
    exact = {"gemma3-270m": 268_098_176, "smollm2-135m": 134_515_008}
    assert {name: PRESETS[name].num_params for name in exact} == exact
    billions = {
        "gemma3-1b": 1.00,
        "gemma3-4b": 3.88,
        "gemma3-12b": 11.77,
        "qwen3-0.6b": 0.596,
        "qwen3-1.7b": 1.72,
    }
    billions |= {"qwen3-8b": 8.19}
    for name, size in billions.items():
        assert PRESETS[name].num_params / 1e9 == pytest.approx(size, abs=0.006), name
    assert set(PRESETS) == set(exact) | set(billions)


def test_a_config_is_not_changed_by_reading_it():
    config = get_config("tiny", {"smoke": True})
    before = config.to_json_best_effort()
    read_settings(config)
    assert config.to_json_best_effort() == before
    assert isinstance(config.smoke_values, tuple) and isinstance(config, config_dict.ConfigDict)


def test_a_data_task_after_the_pair(tmp_path):
    rows = [{"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(200)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"task.options.path": str(path), "task.options.columns.question": "problem"}
    read = settings("gemma3_270m,math_text", changes)
    assert read.task_options == {"path": str(path), "shots": 0, "columns": {"question": "problem"}}
    problem = make_task(read).problems("train", 1, 0)[0]
    assert make_task(read).score(problem, f"The answer is {problem.answer}", True) == 1.0


@pytest.mark.parametrize("arg", ["tiny,math_text", "gemma3_270m,maths"])
def test_a_data_task_that_does_not_fit_is_refused(arg):
    with pytest.raises(ValueError, match="may be followed by one of the tasks"):
        get_config(arg)


def other_config(file: str, arg: str):
    place = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module.get_config(arg)


def test_the_probes_take_a_data_task():
    config = other_config("probe", "gemma3_270m,multiple_choice")
    assert config.task.name == "multiple_choice" and "choices" in config.task.options.columns
    assert not config.eta and config.roles.proxy.source == config.students.student.source == "smollm2-135m"
    with pytest.raises(ValueError, match="may be followed by one of the tasks"):
        other_config("probe", "tiny,multiple_choice")


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("arg", ["tiny", "gemma3_270m"])
@pytest.mark.parametrize("file", ["probe", "attack"])
def test_the_other_configs_can_start(file, arg, smoke, capsys):
    config = other_config(file, arg)
    config.smoke, config.stages = smoke, ()
    assert pipeline.run(config) is None
    assert f"pair {arg}" in capsys.readouterr().out
    samples = read_settings(config).distillation.samples
    assert (samples < 100) == (smoke or (file, arg) == ("probe", "gemma3_270m"))
