"""A run's settings: frozen dataclasses, and the way from a `ConfigDict` to them and back.

Config files build a `ConfigDict` with `to_config`, so that every field can be set on the command line; the pipeline
reads it back with `from_config`, where each dataclass checks its own values.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from distill_jax.attacks import registry
from distill_jax.attacks.attack import Attack
from distill_jax.models.decoder import REMAT_POLICIES
from distill_jax.models.model import DTYPES
from distill_jax.models.quantised import WEIGHTS
from distill_jax.models.spec import ModelSpec
from distill_jax.optimizer import OptimizerConfig
from distill_jax.pipeline.attack_settings import AttackSuite
from distill_jax.pipeline.dial_settings import DialConfig
from distill_jax.pipeline.probe_settings import ProbeSuite, choose_probes
from distill_jax.pipeline.study_settings import StudyConfig
from distill_jax.rft.config import CalibrationConfig, check_arm
from distill_jax.rft.texts import PROMPT_STYLES
from distill_jax.students.train import StudentConfig

STAGES = ("prepare", "calibrate", "distil", "evaluate", "report")
ARMS = ("original", "control", "distillable", "undistillable")
TEACHER_ARMS = ARMS[1:]
TOKENIZERS = ("bytes", "bpe")
DEFAULT_TRAINING = StudentConfig()
DEFAULT_SUITE = AttackSuite()
DEFAULT_PROBES = ProbeSuite()
DEFAULT_DIAL = DialConfig()


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a base model's training: `steps` batches of traces in a mix of styles, at a peak `learning_rate`.

    operations: fewest and most operations of its problems.
    """

    steps: int
    learning_rate: float
    styles: tuple[tuple[str, float], ...]
    operations: tuple[int, int] = (3, 5)
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class Role:
    """A model of the run.

    Attributes:
      source: "train" makes it in the run, from `spec`, `tokenizer` and `phases`; anything else goes to `load_model`
        (a folder, a .gguf file, the name of a demo model, or "hf://ORGANISATION/NAME[@REVISION]" on the hub).
      spec: for "train", and for the plan of a loaded model whose files are not at hand.
      tokenizer: for "train": "bytes" or "bpe" (byte-level BPE, trained on the teacher's corpus).
      phases: of training, in order.
      prompt_style: "raw", "plain", "chat" or "auto" (see `texts.encode_prompts`).
      seed: added to the run's seed for this role's weights and corpus.
      weights: "int8" keeps the layers' kernels of a model that stays frozen in 8 bits: of the proxy, and of a teacher
        of which an adapter is trained (see `models.quantised`). Exports are made from the source in full.
    """

    source: str
    spec: ModelSpec
    tokenizer: str = "bytes"
    phases: tuple[Phase, ...] = ()
    prompt_style: str = "auto"
    seed: int = 0
    weights: str = "full"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {WEIGHTS}, got {self.weights!r}")
        if self.source == "train" and self.tokenizer not in TOKENIZERS:
            raise ValueError(
                f"tokenizer of a trained model must be one of {TOKENIZERS}, got {self.tokenizer!r}"
            )
        if self.source == "train" and not self.phases:
            raise ValueError("a model with source='train' needs at least one phase of training")
        if self.prompt_style not in PROMPT_STYLES:
            raise ValueError(f"prompt_style must be one of {PROMPT_STYLES}, got {self.prompt_style!r}")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What every student gets.

    Attributes:
      samples: texts that each student seed is trained on.
      steps: the default budget, in batches; fixed before looking at any result.
      budgets: multiples of `steps` that are trained.
      long_budgets: more of them, with one seed, in a run with budget_curve="full".
      seeds: students a cell; a seed draws its own problems, texts and order.
      training: see `StudentConfig`.
      temperature: of the teacher's samples.
      prompt_size, completion_size: slots of a student's prompts and completions.
    """

    samples: int = 2048
    steps: int = 400
    budgets: tuple[float, ...] = (0.5, 1.0, 2.0)
    long_budgets: tuple[float, ...] = ()
    seeds: int = 3
    training: StudentConfig = DEFAULT_TRAINING
    temperature: float = 1.0
    prompt_size: int = 16
    completion_size: int = 48

    def __post_init__(self) -> None:
        if min(self.samples, self.steps, self.seeds) < 1:
            raise ValueError(f"samples, steps and seeds must be at least 1, got {self}")
        if 1.0 not in self.budgets or list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] <= 0:
            raise ValueError(
                f"budgets must be ascending multiples of steps, 1.0 among them; got {self.budgets}"
            )
        long = list(self.long_budgets)
        if long != sorted(set(long)) or any(multiple <= self.budgets[-1] for multiple in long):
            raise ValueError(f"long_budgets {self.long_budgets} must ascend, above budgets {self.budgets}")
        if len(self.budget_steps) < len(self.budgets):
            raise ValueError(f"steps={self.steps} are too few to tell the budgets {self.budgets} apart")
        for name in ("prompt_size", "completion_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def budget_steps(self) -> dict[int, float]:
        """Steps -> multiple of the default budget, trained with all seeds."""
        return {max(1, round(self.steps * multiple)): multiple for multiple in self.budgets}

    @property
    def long_budget_steps(self) -> dict[int, float]:
        """Steps -> multiple of the default budget, trained with one seed."""
        return {round(self.steps * multiple): multiple for multiple in self.long_budgets}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """problems: held-out test problems; batch: of them decoded at a time (for each student, of all seeds together);
    temperature: of the sampled decoding beside the greedy one; rollouts: kept for the report."""

    problems: int = 512
    batch: int = 512
    temperature: float = 1.0
    rollouts: int = 128

    def __post_init__(self) -> None:
        if min(self.problems, self.batch, self.rollouts) < 1 or self.temperature <= 0:
            raise ValueError(f"evaluation settings must be positive, got {self}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of a run. See configs/calib_guard.py for what each field is for."""

    pair: str
    seed: int
    stages: tuple[str, ...]
    mesh: str
    dtype: str
    remat: str
    task: str
    task_options: Mapping[str, Any]
    roles: Mapping[str, Role]
    students: Mapping[str, Role]
    eta: Mapping[str, float]
    calibration: CalibrationConfig
    distillation: Distillation
    evaluation: Evaluation
    base_optimizer: OptimizerConfig
    bpe_vocab_size: int
    at_once: int = 1
    attacks: tuple[Attack, ...] = ()
    attack_suite: AttackSuite = DEFAULT_SUITE
    probes: tuple[str, ...] = ()
    probe_suite: ProbeSuite = DEFAULT_PROBES
    dial: DialConfig = DEFAULT_DIAL
    study: StudyConfig | None = None
    proxies: Mapping[str, Role] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"stages {unknown} do not exist; choose from {STAGES}, or () to print the plan")
        if set(self.eta) - set(TEACHER_ARMS):
            raise ValueError(f"eta names arms {sorted(self.eta)}; expected some of {TEACHER_ARMS}")
        for arm, eta in self.eta.items():
            check_arm(arm, eta)
        missing = {"teacher", "proxy"} - set(self.roles)
        if missing:
            raise ValueError(f"roles {sorted(missing)} are not given")
        if self.calibration.ensemble is not None and not self.proxies:
            raise ValueError(
                f"calibration.ensemble={self.calibration.ensemble!r} puts several proxies together, but `proxies` "
                "names none beside roles.proxy; add a role to it, or leave the ensemble out"
            )
        for name, role in {"roles.proxy": self.roles["proxy"], **self.proxies}.items():
            if role.weights != "full" and self.calibration.proxy == "learning":
                raise ValueError(
                    f"{name}: weights={role.weights!r} with calibration.proxy='learning': weights of 8 bits are frozen "
                    "and cannot learn; set 'full'"
                )
        for name, role in self.students.items():
            if role.weights != "full":
                raise ValueError(
                    f"students.{name}.weights={role.weights!r}: weights of 8 bits are frozen, and a student's are"
                    " trained (some attacks ask for their gradient in any case); set 'full'"
                )
        teacher = self.roles["teacher"]
        if teacher.weights != "full" and self.calibration.trainable != "adapter":
            raise ValueError(
                f"roles.teacher.weights={teacher.weights!r} with calibration.trainable={self.calibration.trainable!r}: "
                "weights of 8 bits are frozen; train an adapter (trainable='adapter'), or set weights to 'full'"
            )
        for name, value, choices in (
            ("dtype", self.dtype, DTYPES),
            ("remat", self.remat, tuple(REMAT_POLICIES)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        if self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {self.at_once}")

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms of this run in the order of the report: the original teacher and every arm with an eta."""
        return tuple(arm for arm in ARMS if arm == "original" or arm in self.eta)


def to_config(value: Any) -> Any:
    """A dataclass (and what it holds) as a ConfigDict whose every field can be set; None becomes a placeholder."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        fields = config_dict.ConfigDict()
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            fields[field.name] = _placeholder(hints[field.name]) if item is None else to_config(item)
        return fields
    if isinstance(value, Mapping):
        return config_dict.ConfigDict({name: to_config(item) for name, item in value.items()})
    if isinstance(value, tuple):
        return tuple(
            dataclasses.asdict(item)
            if dataclasses.is_dataclass(item) and not isinstance(item, type)
            else item
            for item in value
        )
    return value


def _placeholder(hint: Any) -> Any:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    kind = kinds[0] if kinds else str
    return config_dict.placeholder(kind if kind in (int, float, str, bool) else object)


def from_config(kind: type, config: Any, where: str) -> Any:
    """The dataclass `kind` from a ConfigDict or mapping.

    Raises:
      ValueError: a field that `kind` does not have, or a value that it refuses; the message starts with `where`.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(config) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown fields {unknown}; expected some of {sorted(hints)}")
    values = {name: _value(hints[name], config[name], f"{where}.{name}") for name in config}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, item: Any, where: str) -> Any:
    if item is None:
        return None
    kinds = [hint, *typing.get_args(hint)]
    for kind in kinds:
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if isinstance(item, Mapping | config_dict.ConfigDict):
                return from_config(kind, item, where)
            if isinstance(item, tuple | list):
                return tuple(from_config(kind, part, f"{where}[{i}]") for i, part in enumerate(item))
    if isinstance(item, list | tuple):
        return tuple(tuple(part) if isinstance(part, list) else part for part in item)
    return item


def with_full_values(
    config: config_dict.ConfigDict, smoke: Mapping[str, Any]
) -> tuple[tuple[str, Any, Any], ...]:
    """(field, full value, smoke value) of every field that smoke mode changes; field is a dotted path."""
    return tuple(
        (path, _plain_value(_get(config, path)), _plain_value(value)) for path, value in smoke.items()
    )


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config


def _plain_value(value: Any) -> Any:
    """Tuples and mappings as JSON has them, so that a value can be compared with one that was read back."""
    if isinstance(value, Mapping | config_dict.ConfigDict):
        return {name: _plain_value(item) for name, item in value.items()}
    return [_plain_value(item) for item in value] if isinstance(value, tuple | list) else value


def apply_modes(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """A copy with `smoke` and `budget_curve` worked in. A field that was set by hand keeps its value.

    Raises:
      ValueError: budget_curve is neither "short" nor "full".
    """
    if config.budget_curve not in ("short", "full"):
        raise ValueError(f"budget_curve must be 'short' or 'full', got {config.budget_curve!r}")
    config = config.copy_and_resolve_references()
    config.unlock()
    if config.smoke:
        for path, full, smoke in config.smoke_values:
            parent, _, name = path.rpartition(".")
            place = _get(config, parent)
            if _plain_value(place[name]) == _plain_value(full):
                del place[name]  # a tuple may be replaced by one of other types
                place[name] = tuple(smoke) if isinstance(smoke, list) else smoke
    if config.budget_curve == "short":
        config.distillation.long_budgets = ()
    return config


def read_settings(config: config_dict.ConfigDict) -> Settings:
    """Settings of a whole config, checked; see `apply_modes` for smoke and budget_curve.

    Raises:
      ValueError: anything that a dataclass refuses, a batch_size below 1, and a group size that does not divide it.
    """
    config = apply_modes(config)
    calibration = config.calibration.to_dict()
    batch, group = calibration.pop("batch_size"), calibration["rft"]["num_samples"]
    if batch < 1:
        raise ValueError(f"calibration.batch_size must be at least 1, got {batch}")
    if group < 1 or batch % group:
        raise ValueError(
            f"calibration.batch_size={batch} does not divide by calibration.rft.num_samples={group} rollouts a "
            "prompt; choose a batch that is a multiple of the group"
        )
    calibration["prompts_per_step"] = batch // group
    return Settings(
        pair=config.pair,
        seed=config.seed,
        stages=tuple(config.stages),
        mesh=config.mesh,
        dtype=config.dtype,
        remat=config.remat,
        task=config.task.name,
        task_options=_plain(config.task.options),
        roles={name: from_config(Role, role, f"roles.{name}") for name, role in config.roles.items()},
        students={
            name: from_config(Role, role, f"students.{name}") for name, role in config.students.items()
        },
        eta=dict(config.eta),
        calibration=from_config(CalibrationConfig, calibration, "calibration"),
        distillation=from_config(Distillation, config.distillation, "distillation"),
        evaluation=from_config(Evaluation, config.evaluation, "evaluation"),
        base_optimizer=from_config(OptimizerConfig, config.base_optimizer, "base_optimizer"),
        bpe_vocab_size=config.bpe_vocab_size,
        at_once=config.get("at_once", 1),
        attacks=tuple(registry.choose(config.get("attacks", "none"))),
        attack_suite=from_config(AttackSuite, config.get("attack_suite", {}), "attack_suite"),
        probes=choose_probes(config.get("probes", "none")),
        probe_suite=from_config(ProbeSuite, config.get("probe_suite", {}), "probe_suite"),
        dial=from_config(DialConfig, config.get("dial", {}), "dial"),
        proxies={
            name: from_config(Role, role, f"proxies.{name}")
            for name, role in config.get("proxies", {}).items()
        },
        study=from_config(StudyConfig, config.study, "study") if "study" in config else None,
    )


def _plain(options: config_dict.ConfigDict) -> dict[str, Any]:
    """Options as keyword arguments; placeholders that nobody filled in, and groups of nothing else, are left out."""
    plain = {
        name: _plain(value) if isinstance(value, config_dict.ConfigDict) else value
        for name, value in options.items()
    }
    return {name: value for name, value in plain.items() if value is not None and value != {}}
