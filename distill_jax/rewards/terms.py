"""Rewards by name: what a config says about them, and the objects that give them.

A calibration adds to the task's reward any number of these, each normalised inside its group by itself:

    advantage = GN(task) + sum of weight * GN(reward) + eta * GN(calibration)

    RewardTerm("length", weight=0.1, soft_bytes=400, hard_bytes=800)
    RewardTerm("form", weight=0.1, source="marked")
    RewardTerm("function", source="my_rewards:politeness")
    RewardTerm("reward_model", source="models/skywork-reward-v2-llama-3.2-1b")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from distill_jax.rewards.functions import LEAST_MEMORY_BYTES, LimitedFunction
from distill_jax.rewards.reward_model import RewardModel, check_source
from distill_jax.rewards.shaping import form_pattern, length_reward
from distill_jax.rewards.worker import load_function

KINDS = ("length", "form", "function", "reward_model")
# What a user's own function may have as parameters, by name.
FUNCTION_NAMES = ("prompt", "completion", "answer", "ended", "metadata")


@dataclasses.dataclass(frozen=True)
class Answered:
    """One completion of one problem.

    Attributes:
      prompt, answer, metadata: of the problem.
      completion: the text; ended: the model closed it with an end of sequence.
    """

    prompt: str
    answer: str
    completion: str
    ended: bool
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Reward(Protocol):
    """Scores completions.

    Attributes:
      name: under which it is logged.
      failures: completions that got no reward.
    """

    name: str

    @property
    def failures(self) -> int: ...

    def __call__(self, rows: Sequence[Answered]) -> np.ndarray:
        """f32[B], any real number; NaN where there is none."""
        ...


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One reward of a config.

    Attributes:
      kind: "length", "form", "function" or "reward_model".
      weight: of its normalised advantage; the task's own has 1.
      name: in the logs, the kind by default.
      source: of "form", one of `shaping.FORMS` or a regular expression for the whole completion; of "function",
        "module:function" with parameters out of `FUNCTION_NAMES`, returning a number; of "reward_model", a folder or
        "hf://ORGANISATION/NAME[@REVISION]".
      soft_bytes, hard_bytes: of "length": full reward up to, none from.
      seconds, workers: of "form" and "function": time of one call, and processes.
      memory_bytes: of "form" and "function": what a process may allocate, its imports included; a call that needs more
        costs its sample, as one that takes too long does. The default stops what would take the machine with it.
      batch_size, sizes: of "reward_model": rows at a time, and lengths in tokens.

    Raises:
      ValueError: an unknown kind, a weight that is not positive, a source or limits that the kind cannot use.
    """

    kind: str
    weight: float = 1.0
    name: str = ""
    source: str = ""
    soft_bytes: int = 0
    hard_bytes: int = 0
    seconds: float = 5.0
    workers: int = 2
    memory_bytes: int = 8 << 30
    batch_size: int = 16
    sizes: tuple[int, ...] = (512, 1024, 2048)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of a reward must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight of the reward {self.kind!r} must be positive, got {self.weight}")
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "name", self.name or self.kind)
        if not self.name.isidentifier():
            raise ValueError(f"name of a reward must be one word of letters, digits and _, got {self.name!r}")
        if self.memory_bytes < LEAST_MEMORY_BYTES:
            raise ValueError(
                f"memory_bytes of the reward {self.kind!r} must be at least {LEAST_MEMORY_BYTES}, less does not even "
                f"hold Python; got {self.memory_bytes}"
            )
        if self.kind == "length":
            length_reward(np.zeros(0), self.soft_bytes, self.hard_bytes)
        elif self.kind == "form":
            form_pattern(self.source)

    def check_source(self) -> None:
        """Looks at what `source` names: imports a function, or looks for a model's files.

        Not done when a term is made: a config that is only read must not run anybody's code.

        Raises:
          ValueError: there is no such thing, or it cannot be used.
        """
        if self.kind == "function":
            load_function(self.source, FUNCTION_NAMES)
        elif self.kind == "reward_model":
            check_source(self.source)


def check_terms(terms: Sequence[RewardTerm]) -> tuple[RewardTerm, ...]:
    """The terms; ValueError when two have one name."""
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "task" in names or "calibration" in names:
        raise ValueError(
            f"names of rewards must be different, and not 'task' or 'calibration'; got {names}; set `name`"
        )
    return tuple(terms)


def make_rewards(
    terms: Sequence[RewardTerm], mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[Reward, ...]:
    """The rewards of a config, ready to be called.

    Args:
      terms: see `RewardTerm`.
      mesh, dtype: of reward models.

    Raises:
      ValueError, FileNotFoundError: a function or a model that cannot be loaded; two terms of one name.
    """
    for term in check_terms(terms):
        term.check_source()
    return tuple(_MAKERS[term.kind](term, mesh, dtype) for term in terms)


class _Length:
    failures = 0  # there is nothing that could fail

    def __init__(self, term: RewardTerm, mesh: Mesh | None, dtype: str) -> None:
        self.name, self._soft, self._hard = term.name, term.soft_bytes, term.hard_bytes

    def __call__(self, rows: Sequence[Answered]) -> np.ndarray:
        return length_reward(np.array([len(row.completion.encode()) for row in rows]), self._soft, self._hard)


class _Limited:
    """A function in child processes; `arguments` are those of one row."""

    def __init__(self, term: RewardTerm, path: str, names: Sequence[str]) -> None:
        self.name = term.name
        self._function = LimitedFunction(
            path, names, seconds=term.seconds, workers=term.workers, memory_bytes=term.memory_bytes
        )

    @property
    def failures(self) -> int:
        return self._function.failures

    def _call(self, arguments: Sequence[Mapping[str, Any]]) -> np.ndarray:
        values = self._function(arguments)
        return np.array([np.nan if value is None else value for value in values], np.float32)


class _Form(_Limited):
    def __init__(self, term: RewardTerm, mesh: Mesh | None, dtype: str) -> None:
        super().__init__(term, "distill_jax.rewards.shaping:matches", ("pattern", "completion"))
        self._pattern = form_pattern(term.source)

    def __call__(self, rows: Sequence[Answered]) -> np.ndarray:
        formed = self._call([{"pattern": self._pattern, "completion": row.completion} for row in rows])
        return np.where([row.ended for row in rows], formed, np.where(np.isnan(formed), formed, 0.0))


class _Function(_Limited):
    def __init__(self, term: RewardTerm, mesh: Mesh | None, dtype: str) -> None:
        super().__init__(term, term.source, FUNCTION_NAMES)

    def __call__(self, rows: Sequence[Answered]) -> np.ndarray:
        return self._call([{name: getattr(row, name) for name in FUNCTION_NAMES} for row in rows])


class _Model:
    def __init__(self, term: RewardTerm, mesh: Mesh | None, dtype: str) -> None:
        self.name = term.name
        self._model = RewardModel.load(term.source, mesh, dtype, term.batch_size, term.sizes)

    @property
    def failures(self) -> int:
        return self._model.failures

    def __call__(self, rows: Sequence[Answered]) -> np.ndarray:
        return self._model([row.prompt for row in rows], [row.completion for row in rows])


_MAKERS: dict[str, Callable[[RewardTerm, Mesh | None, str], Reward]] = {
    "length": _Length,
    "form": _Form,
    "function": _Function,
    "reward_model": _Model,
}
