"""Calibrate a teacher in both directions, distil students from it, show the knob.

    python launch/tpu_run.py --config=configs/calib_guard.py[:PAIR[,TASK]] --workdir=DIR [--config.FIELD=VALUE ...]

PAIR names the models:

tiny (default)  everything from nothing: a 0.49M-parameter teacher (byte-level BPE), a 0.04M proxy and two kinds of
                0.04M students (bytes, BPE) on chain_arithmetic. Two CPU cores; --config.smoke=True
                shows every stage quickly and proves nothing.
gemma3_270m     teacher Gemma 3 270M, proxy and student SmolLM2-135M (other family, other kind of tokenizer), task
                reasoning-gym. Needs the demo-models packages. Full size: one 16 GiB accelerator;
                --config.smoke=True: two CPU cores and 16 GiB.
gemma3_12b      Gemma 3 12B / 4B / 1B, the trio of arXiv 2604.18963. 16 TPU v5e chips by arithmetic, not run; one host;
                weights from folders of yours.
qwen3_8b        Qwen3 8B / 1.7B / 0.6B, the other trio; the same.

TASK replaces the task of a pair of published models by one on your data, given by --config.task.options.path (a JSONL
file, a prepared tensorflow-datasets or a Hugging Face datasets folder) with .dataset (a configured data set) or the
.columns of your own:

math_text        judged by math-verify
multiple_choice  judged by the letter or text of the option
instructions     judged by a sequence classifier, --config.task.options.reward_model=FOLDER

--config.stages="()" prints the plan (models, mesh, batches, memory) and runs nothing.
--config.budget_curve=full adds 4x and 8x the student budget with one seed, to see where a guard breaks.
"""

from typing import Any

from ml_collections import config_dict

from distill_jax.models.adapter import AdapterConfig
from distill_jax.models.presets import PRESETS
from distill_jax.models.spec import ModelSpec
from distill_jax.optimizer import OptimizerConfig
from distill_jax.pipeline.attack_settings import AttackSuite
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.probe_settings import ProbeSuite
from distill_jax.pipeline.settings import (
    STAGES,
    Distillation,
    Evaluation,
    Phase,
    Role,
    to_config,
    with_full_values,
)
from distill_jax.rft.config import CalibrationConfig
from distill_jax.rft.losses import KLAnchor
from distill_jax.rft.step import RftConfig
from distill_jax.students.train import StudentConfig
from distill_jax.tasks import SPLITS

ETA = {
    "control": 0.0,
    "distillable": 0.5,
    "undistillable": 0.5,
}  # strength of each calibrated arm; control is 0


# Task on data of the user's own -> the columns that it can read.
DATA_TASKS = {
    "math_text": ("question", "answer", "working"),
    "multiple_choice": ("question", "answer", "choices", "labels"),
    "instructions": ("question", "answer", "context"),
}


def get_config(arg: str = "tiny") -> config_dict.ConfigDict:
    """The config of a pair. `smoke_values` says what smoke mode changes; a field that you set yourself stays."""
    pairs = {"tiny": _tiny, "gemma3_270m": _gemma3_270m, "gemma3_12b": _gemma3_12b, "qwen3_8b": _qwen3_8b}
    pair, _, task = (arg or "tiny").partition(",")
    if pair not in pairs:
        raise ValueError(f"pair {pair!r} does not exist; choose from {sorted(pairs)}")
    if task and (task not in DATA_TASKS or pair == "tiny"):
        raise ValueError(
            f"{arg!r}: a pair of published models may be followed by one of the tasks {sorted(DATA_TASKS)}; "
            "models that are trained in the run have a task of their own"
        )
    config = config_dict.ConfigDict()
    config.pair = pair
    config.seed = 0  # of everything: base models, calibration, students
    config.stages = STAGES  # in order; finished ones are skipped; () prints the plan
    config.smoke = False  # every stage at a size that proves nothing
    config.budget_curve = "short"  # "full": larger student budgets with one seed
    config.mesh = "data=-1"  # sizes of data, fsdp, tensor; -1 is the rest of the devices
    config.dtype = "float32"  # of weights and computation
    config.at_once = 1  # base models, arms, cells, positions: how many are worked on side by side
    config.remat = "dots"  # "none", "dots" or "full": what the backward pass computes again
    config.eta = config_dict.ConfigDict(ETA)
    config.attacks = "none"  # "tier1", or ids such as "A1,A3": see configs/attack.py
    config.attack_suite = to_config(AttackSuite())
    config.probes = "none"  # "all", or names such as "gap,decoding"
    config.probe_suite = to_config(ProbeSuite())
    config.dial = to_config(DialConfig())  # off while it names no arm
    config.proxies = config_dict.ConfigDict()  # beside roles.proxy, used with calibration.ensemble alone
    config.bpe_vocab_size = 512  # at most; of BPE tokenizers that are trained in the run
    config.base_optimizer = to_config(OptimizerConfig("muon", 0.01, warmup_steps=20, weight_decay=0.05))
    smoke = pairs[pair](config)
    if task:
        _data_task(config, task)
    config.smoke_values = with_full_values(config, smoke)  # (field, full value, smoke value)
    return config


def _fill(
    config: config_dict.ConfigDict,
    roles: dict[str, Role],
    students: dict[str, Role],
    calibration: CalibrationConfig,
    distillation: Distillation,
    evaluation: Evaluation,
) -> None:
    config.roles = to_config(roles)
    config.students = to_config(students)
    config.calibration = to_config(calibration)
    # A batch is said in rows: it must divide by the rollouts of a prompt.
    config.calibration.batch_size = calibration.prompts_per_step * calibration.rft.num_samples
    del config.calibration.prompts_per_step
    # How prompts are written belongs to each role.
    del config.calibration.prompt_style, config.calibration.proxy_prompt_style
    config.distillation = to_config(distillation)
    config.evaluation = to_config(evaluation)


def _tiny(config: config_dict.ConfigDict) -> dict[str, Any]:
    def spec(layers: int, width: int, heads: int, wide: int) -> ModelSpec:
        # The vocabulary is what the run's tokenizer turns out to have.
        return ModelSpec(
            "llama", 259, width, layers, heads, heads, width // heads, wide, tie_embeddings=False
        )

    # A style that the teacher masters and that is beyond a small student for a long time (two operations a step),
    # learned first, then written as often as the easy one. The gold text has the same mix.
    mix = (("explicit", 0.5), ("folded", 0.5))
    teacher = Role(
        "train",
        spec(4, 96, 4, 256),
        tokenizer="bpe",
        phases=(
            Phase(3000, 0.01, (("explicit", 0.4), ("folded", 0.6)), (4, 6), 32),
            Phase(300, 0.003, mix, (4, 6), 32),
        ),
        prompt_style="raw",
    )
    small = {
        "phases": (Phase(600, 0.01, (("explicit", 6.0), ("result_first", 1.0), ("terse", 1.0)), (1, 4)),)
    }
    proxy = Role("train", spec(2, 32, 2, 86), "bytes", prompt_style="raw", seed=1, **small)
    students = {
        "bytes": Role("train", spec(2, 32, 2, 86), "bytes", prompt_style="raw", seed=2, **small),
        "bpe": Role("train", spec(2, 32, 2, 86), "bpe", prompt_style="raw", seed=3, **small),
    }
    config.task = config_dict.create(
        name="chain_arithmetic",
        options=config_dict.create(
            operations=(4, 6),
            gold_styles=config_dict.create(**dict(mix)),
        ),
    )
    calibration = CalibrationConfig(
        steps=40,
        prompts_per_step=16,
        rft=RftConfig(num_samples=8, kl=KLAnchor("k1", "reward", 0.02), logit_chunk=64),
        adapter=AdapterConfig(rank=8, alpha=16.0, targets=("attn", "mlp", "head")),
        optimizer=OptimizerConfig("adamw", 1e-3, warmup_steps=0, final_fraction=1.0),
        prompt_sizes=(16,),
        completion_size=48,
        proxy_prompt_sizes=(16,),
        proxy_completion_sizes=(56,),
        # Between styles the gap differs by several nats a byte, within one by a few tenths: that is noise.
        calibration_floor=1.0,
        validation_problems=512,  # a floor of 1 point needs them
        validation_batch=256,
        validation_every=5,
        floor_patience=8,  # accuracy dips while the style changes, and comes back
        rollouts_every=10,
        checkpoint_every=10,
        # For --config.calibration.proxy=learning: as the students learn, for a part of their steps.
        proxy_optimizer=OptimizerConfig("muon", 0.005, 5, weight_decay=0.05),
    )
    distillation = Distillation(
        samples=2048,
        steps=400,
        training=StudentConfig(
            batch_size=64, optimizer=OptimizerConfig("muon", 0.005, 20, weight_decay=0.05)
        ),
        prompt_size=16,
        completion_size=48,
        long_budgets=(4.0, 8.0),
    )
    _fill(config, {"teacher": teacher, "proxy": proxy}, students, calibration, distillation, Evaluation())
    # For --config.calibration.ensemble=min (or mean, max): the same small model with the other kind of tokenizer.
    further = Role("train", spec(2, 32, 2, 86), "bpe", prompt_style="raw", seed=4, **small)
    config.proxies = to_config({"bpe": further})
    config.at_once = 2  # each of these steps fills one core
    config.probes = "all"
    config.probe_suite.frequent = 5  # of a vocabulary of a few dozen tokens that occur
    config.dial = to_config(
        DialConfig("distillable", other="undistillable", kind="bpe", samples=1024, steps=200)
    )
    short = to_config((Phase(40, 0.01, mix, (4, 6), 32),))
    return {
        # Enough to write text; less, and the bytes of a sample are no text that the proxy could read.
        "roles.teacher.phases": to_config((Phase(150, 0.01, mix, (4, 6), 32),)),
        "roles.proxy.phases": short,
        "proxies.bpe.phases": short,
        "students.bytes.phases": short,
        "students.bpe.phases": short,
        "calibration.steps": 2,
        "calibration.unscorable_limit": 0.5,
        "calibration.validation_problems": 32,
        "calibration.validation_batch": 32,
        "distillation.samples": 64,
        "distillation.steps": 10,
        "evaluation.problems": 64,
        "evaluation.batch": 64,
        "probe_suite.problems": 16,
        "probe_suite.samples": 2,
        "attack_suite.search_problems": 32,
        "dial.scales": (-1.0, 0.0, 1.0),
        "dial.weights": (0.0, 1.0),
        "dial.samples": 64,
        "dial.steps": 10,
        "dial.problems": 32,
    }


def _loaded(
    teacher: Role, proxy: Role, student: Role, prompt: int, completion: int
) -> tuple[dict[str, Role], dict[str, Role], CalibrationConfig, Distillation]:
    """The full-size setting that all pairs of published models share."""
    calibration = CalibrationConfig(
        steps=100,
        prompts_per_step=32,
        rft=RftConfig(
            num_samples=8, clip_high=0.28, kl=KLAnchor("k1", "reward", 0.02), micro_batches=8, logit_chunk=32
        ),
        adapter=AdapterConfig(rank=32, alpha=64.0),
        optimizer=OptimizerConfig("adamw", 1e-4, warmup_steps=5, final_fraction=1.0),
        prompt_sizes=(prompt // 2, prompt),
        completion_size=completion,
        proxy_prompt_sizes=(prompt, 2 * prompt),
        proxy_completion_sizes=(completion, 2 * completion),
        validation_problems=256,
        validation_every=10,
        rollouts_every=10,
        checkpoint_every=10,
    )
    distillation = Distillation(
        samples=8192,
        steps=1000,
        training=StudentConfig(
            batch_size=32,
            optimizer=OptimizerConfig("adamw", 2e-4, warmup_steps=50),
            trainable="adapter",
            adapter=AdapterConfig(rank=64, alpha=128.0),
            logit_chunk=32,
            checkpoint_every=200,
        ),
        prompt_size=2 * prompt,
        completion_size=2 * completion,
        long_budgets=(4.0, 8.0),
    )
    return {"teacher": teacher, "proxy": proxy}, {"student": student}, calibration, distillation


_SMOKE = {
    "calibration.steps": 2,
    "calibration.unscorable_limit": 0.2,
    "calibration.batch_size": 16,
    "calibration.rft.num_samples": 4,
    "calibration.rft.micro_batches": 4,
    "calibration.validation_problems": 16,
    "calibration.validation_batch": 16,
    "calibration.validation_every": 2,
    "distillation.samples": 32,
    "distillation.steps": 4,
    "distillation.budgets": (1.0,),
    "distillation.training.batch_size": 4,
    "evaluation.problems": 32,
    "evaluation.batch": 32,
    "attack_suite.search_problems": 16,
}


def _reasoning_gym(config: config_dict.ConfigDict, dataset: str, shots: int) -> None:
    config.task = config_dict.create(
        name="reasoning_gym", options=config_dict.create(dataset=dataset, shots=shots)
    )


def _data_task(config: config_dict.ConfigDict, task: str) -> None:
    text, number = config_dict.placeholder(str), config_dict.placeholder(int)
    options = config_dict.create(path="", dataset=text, shots=0, max_prompt_bytes=number, instruction=text)
    options.update(data_dir=text, require_end=config_dict.placeholder(bool))
    for name, keys in (("columns", DATA_TASKS[task]), ("splits", SPLITS)):
        options[name] = config_dict.create(**{key: config_dict.placeholder(str) for key in keys})
    if task == "math_text":
        options.answer_mark = config_dict.placeholder(str)
    if task == "multiple_choice":  # where the probes and the attacks find the answer of a completion
        config.probe_suite.answer_mark = config.attack_suite.answer_mark = "Answer:"
    if task == "instructions":
        options.update(reward_model="", centre=0.0, spread=1.0)
        config.calibration.correct_at = 0.5  # of a score that the reward model gives, squashed to 0 to 1
    config.task = config_dict.create(name=task, options=options)


def _gemma3_270m(config: config_dict.ConfigDict) -> dict[str, Any]:
    smollm2 = Role("smollm2-135m", PRESETS["smollm2-135m"], prompt_style="raw")
    teacher = Role("gemma3-270m", PRESETS["gemma3-270m"], prompt_style="raw")
    _reasoning_gym(config, "chain_sum", 2)
    config.task.options.update(min_terms=2, max_terms=4, min_digits=1, max_digits=2)
    config.remat = "full"
    roles, students, calibration, distillation = _loaded(teacher, smollm2, smollm2, 128, 48)
    _fill(config, roles, students, calibration, distillation, Evaluation(batch=64))
    config.distillation.prompt_size, config.distillation.completion_size = 160, 64
    return _SMOKE | {"distillation.seeds": 2, "evaluation.problems": 16, "evaluation.batch": 16}


def _gemma3_12b(config: config_dict.ConfigDict) -> dict[str, Any]:
    return _trio(
        config, "gemma-3-12b-it", "gemma-3-1b-it", "gemma-3-4b-it", "gemma3-12b", "gemma3-1b", "gemma3-4b"
    )


def _qwen3_8b(config: config_dict.ConfigDict) -> dict[str, Any]:
    return _trio(config, "Qwen3-8B", "Qwen3-0.6B", "Qwen3-1.7B", "qwen3-8b", "qwen3-0.6b", "qwen3-1.7b")


def _trio(config: config_dict.ConfigDict, *names: str) -> dict[str, Any]:
    """names: the sources of teacher, proxy and student, then their presets."""
    roles = [
        Role(source, PRESETS[preset], prompt_style="chat")
        for source, preset in zip(names[:3], names[3:], strict=True)
    ]
    _reasoning_gym(config, "gsm_symbolic", 0)
    config.task.options.stop_texts = ()  # their answers have blank lines, and an end
    config.mesh, config.dtype, config.remat = "fsdp=16", "bfloat16", "full"
    _fill(config, *_loaded(roles[0], roles[1], roles[2], 512, 512), Evaluation(batch=128))
    return _SMOKE | {"distillation.training.batch_size": 16}
