"""The settings of a calibration run, checked when they are made."""

from __future__ import annotations

import dataclasses

from distill_jax.models.adapter import AdapterConfig
from distill_jax.optimizer import OptimizerConfig
from distill_jax.rewards.terms import RewardTerm, check_terms
from distill_jax.rft.advantages import SCALES
from distill_jax.rft.calibration import ENSEMBLES, UNITS
from distill_jax.rft.step import TRAINABLE, RftConfig
from distill_jax.rft.texts import PROMPT_STYLES

ARMS = ("control", "distillable", "undistillable")
PROXIES = ("static", "learning")
DEFAULT_RFT = RftConfig()
DEFAULT_ADAPTER = AdapterConfig(rank=8, alpha=16.0)
DEFAULT_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, final_fraction=0.1)
DEFAULT_PROXY_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=5, final_fraction=0.1)
# Which division of the group's deviations belongs to an algorithm.
_SCALE_OF = {"dr_grpo": "none", "rloo": "leave_one_out"}


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """One calibration run. Defaults are those of the design; shapes must fit the models and the task.

    Attributes:
      steps: updates at most (one batch of rollouts each).
      prompts_per_step: Q; a batch has Q * rft.num_samples rows.
      updates_per_batch: optimiser steps on one batch; more than one makes the later ones off-policy
        (clipped).
      rft, adapter, optimizer: see their classes. The rate falls over the run: once the style has converged, what is
        left to learn from is noise.
      trainable: "adapter", or "params" for full fine-tuning.

      units: of the calibration reward: "per_byte", "per_token" or "sum".
      numerator: whose likelihood the proxy's is compared with: "reference" or "current" (the policy that
        wrote the text).
      credit: "sequence", one advantage a rollout, or "span", one a token.
      within_correct: the calibration reward ranks correct rollouts only.
      correct_at: smallest task reward that counts as correct.
      advantage_scale: "std", "none", "leave_one_out"; None: what the algorithm asks for.
      advantage_eps, advantage_ddof: see `advantages.group_normalise`.
      calibration_floor: smallest deviation of the calibration reward that is divided by, in its units.
      whiten: whiten the summed advantages over the batch.
      rewards: beside the task's own, each normalised by itself and added with its weight.

      proxy: "static": the proxy stays as it was given. "learning": before the first update and every proxy_every
        steps it is trained on what the teacher writes now, as an attacker would, so that the calibration reward pays
        only for text that stays costly after learning; see `proxy_training`.
      proxy_steps, proxy_batch, proxy_optimizer: such a training; batches of rows.
      proxy_restart: each training starts from the given proxy (a best response from scratch), or goes on.
      proxy_buffer: newest rollouts, in rows, that it is trained on.
      proxy_rollouts: "all" of them, or the "correct" ones.
      best_by: the proxies whose gap chooses the best checkpoint, "static" or "learning"; None: those that pay, see
        `judged_by`.
      ensemble: with several proxies, how their gaps (each in its own tokens) make one, see
        `calibration.proxy_weights`; None: there is one proxy.
      answer_utility: weight of the answer-utility reward, see `answer_utility`; 0: it is not computed. Normalised in
        its group by itself, ranked within the correct rollouts if the gap is; logged and not added in the control arm.
      answer_floor: smallest deviation of it that is divided by, in nats a byte.

      prompt_style, proxy_prompt_style, system: see `texts.encode_prompts`.
      prompt_sizes, completion_size: slots of the teacher's prompts (buckets) and completions.
      proxy_prompt_sizes, proxy_completion_sizes: the proxy's (buckets).
      unscorable_limit: largest share of the original teacher's texts that the proxy cannot score (not byte
        for byte the same, or longer than its largest size); above, the run does not start.

      train_problems: problems to draw prompts from, shuffled anew in each pass.
      validation_problems, validation_every, validation_batch: a fixed set, how often (in steps), and prompts
        at a time.
      utility_floor: how far greedy validation accuracy may fall below the original's.
      floor_patience: stop after so many validations in a row below the floor.
      entropy_floor: stop when the mean entropy (nats a token) falls below; 0: never.
      length_ceiling: stop when completions are longer than this multiple of the first batch's mean bytes;
        None: never.
      stop_when_converged: stop when the objective has not risen by min_improvement (in its units) for
        `patience` validations in a row. After the style has converged, what is left to normalise is noise.

      rollouts_every, rollouts_kept: how often sample rollouts are saved, and how many.
      checkpoint_every: in steps; a killed run goes on from there.

    Raises:
      ValueError: a value out of range or a combination that makes no sense, named.
    """

    steps: int = 30
    prompts_per_step: int = 16
    updates_per_batch: int = 1
    rft: RftConfig = DEFAULT_RFT
    adapter: AdapterConfig = DEFAULT_ADAPTER
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER
    trainable: str = "adapter"

    units: str = "per_byte"
    numerator: str = "reference"
    credit: str = "sequence"
    within_correct: bool = True
    correct_at: float = 1.0
    advantage_scale: str | None = None
    advantage_eps: float = 1e-4
    advantage_ddof: int = 0
    calibration_floor: float = 0.01
    whiten: bool = False
    rewards: tuple[RewardTerm, ...] = ()

    proxy: str = "static"
    proxy_every: int = 5
    proxy_steps: int = 100
    proxy_batch: int = 64
    proxy_optimizer: OptimizerConfig = DEFAULT_PROXY_OPTIMIZER
    proxy_restart: bool = True
    proxy_buffer: int = 512
    proxy_rollouts: str = "all"
    best_by: str | None = None
    ensemble: str | None = None
    answer_utility: float = 0.0
    answer_floor: float = 0.1

    prompt_style: str = "auto"
    proxy_prompt_style: str = "auto"
    system: str | None = None
    prompt_sizes: tuple[int, ...] = (32, 64, 128, 256)
    completion_size: int = 128
    proxy_prompt_sizes: tuple[int, ...] = (32, 64, 128, 256)
    proxy_completion_sizes: tuple[int, ...] = (128, 256)
    unscorable_limit: float = 0.01

    train_problems: int = 4096
    validation_problems: int = 128
    validation_every: int = 5
    validation_batch: int = 64
    utility_floor: float = 0.01
    floor_patience: int = 1
    entropy_floor: float = 0.0
    length_ceiling: float | None = None
    stop_when_converged: bool = False
    patience: int = 2
    min_improvement: float = 0.01

    rollouts_every: int = 5
    rollouts_kept: int = 16
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_sizes", "proxy_prompt_sizes", "proxy_completion_sizes"):
            sizes = tuple(getattr(self, name))
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name} must be sizes of at least 1, got {sizes}")
            object.__setattr__(self, name, sizes)
        object.__setattr__(self, "rewards", check_terms(self.rewards))
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("unscorable_limit", "utility_floor", "correct_at"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must be in [0, 1], got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.length_ceiling is not None and not self.length_ceiling > 1:
            raise ValueError(
                f"length_ceiling is a multiple of the first length, above 1; got {self.length_ceiling}"
            )
        if self.credit == "span" and (self.whiten or self.units == "per_token"):
            raise ValueError("credit='span' works with units 'per_byte' or 'sum' and without whitening")
        if self.best_by == "learning" and self.proxy != "learning":
            raise ValueError("best_by='learning' needs proxy='learning': a static proxy has no other gap")
        if self.ensemble is not None and self.units == "per_token":
            raise ValueError(
                "an ensemble compares proxies that may have other tokenizers; use units 'per_byte' or 'sum'"
            )
        if self.advantage_eps == 0 and self.advantage_scale in (None, "std"):
            raise ValueError(
                "advantage_eps must be positive: groups in which all rewards are equal divide by it"
            )
        rows = self.prompts_per_step * self.rft.num_samples
        if rows % self.rft.micro_batches:
            raise ValueError(
                f"a batch of {rows} rows (prompts_per_step={self.prompts_per_step} x rft.num_samples="
                f"{self.rft.num_samples}) does not divide into rft.micro_batches={self.rft.micro_batches}; choose a "
                "number of micro-batches that divides the rows"
            )
        if self.train_problems < self.prompts_per_step:
            raise ValueError(
                f"train_problems={self.train_problems} is less than prompts_per_step={self.prompts_per_step}"
            )

    @property
    def normalisation(self) -> str:
        """`advantage_scale`, or what the algorithm asks for."""
        return self.advantage_scale or _SCALE_OF.get(self.rft.algorithm, "std")

    @property
    def judged_by(self) -> str:
        """`best_by`, or the kind of proxy that pays: "static" or "learning"."""
        return self.best_by or self.proxy


_POSITIVE = (
    "steps",
    "prompts_per_step",
    "updates_per_batch",
    "completion_size",
    "train_problems",
    "validation_problems",
    "validation_every",
    "validation_batch",
    "floor_patience",
    "patience",
    "rollouts_every",
    "rollouts_kept",
    "checkpoint_every",
    "proxy_every",
    "proxy_steps",
    "proxy_batch",
    "proxy_buffer",
)
_NOT_NEGATIVE = (
    "calibration_floor",
    "advantage_eps",
    "entropy_floor",
    "min_improvement",
    "answer_utility",
    "answer_floor",
)
_CHOICES: dict[str, tuple[object, ...]] = {
    "trainable": TRAINABLE,
    "units": UNITS,
    "numerator": ("reference", "current"),
    "credit": ("sequence", "span"),
    "advantage_scale": (None, *SCALES),
    "advantage_ddof": (0, 1),
    "proxy": PROXIES,
    "proxy_rollouts": ("all", "correct"),
    "best_by": (None, *PROXIES),
    "ensemble": (None, *ENSEMBLES),
    "prompt_style": PROMPT_STYLES,
    "proxy_prompt_style": PROMPT_STYLES,
}


def check_arm(arm: str, eta: float) -> None:
    """Raises ValueError for an unknown arm, a negative eta, or an arm whose name contradicts eta."""
    if arm not in ARMS:
        raise ValueError(
            f"arm must be one of {ARMS}, got {arm!r} ('original' is the teacher itself: nothing to run)"
        )
    if not eta >= 0:
        raise ValueError(f"eta must be >= 0, got {eta}; the direction is the arm")
    if (eta == 0) != (arm == "control"):
        raise ValueError(f"arm {arm!r} with eta={eta}: 'control' is the arm with eta=0, and the only one")
