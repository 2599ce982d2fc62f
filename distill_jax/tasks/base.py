"""What a task is, how its splits are kept apart, and the registry of tasks by name."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import numpy as np

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prompt with what is needed to score a completion of it.

    Attributes:
      prompt: the text given to the model, before any chat template.
      answer: the reference answer alone; empty when the task knows a verifier but no answer.
      gold: a whole completion that the task scores 1, to learn from; empty when there is no answer.
      index: position in the list that it was drawn into.
      metadata: what the task's own `score` needs, and facts for reports.
    """

    prompt: str
    answer: str
    gold: str
    index: int
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """Problems in three splits, and an exact verifier.

    Attributes:
      name: the name in the registry.
      failures: how many completions the verifier itself could not judge (it raised); each of them scored 0.
    """

    name: str
    failures: int

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """Draws `count` problems of a split: a function of (split, count, seed) and the task's options alone.

        A question belongs to one split for ever, whatever the seed. "validation" and "test" repeat no
        question;
        "train" may.

        Raises:
          ValueError: the split does not exist, or has fewer distinct questions than `count`.
        """
        ...

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """Reward in [0, 1] of a completion; `ended`: the model closed it with an end-of-sequence token."""
        ...


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task that judges many completions better together: in several processes, or on an accelerator."""

    def score_batch(
        self, problems: Sequence[Problem], completions: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        """`score` of each row."""
        ...


@runtime_checkable
class MeshTask(Task, Protocol):
    """A task that judges with a model of its own."""

    def use_mesh(self, mesh: Any) -> None:
        """Puts the model on a mesh, before the first completion is judged."""
        ...


TASKS: dict[str, str | Callable[..., Task]] = {
    # name -> "module:class", imported at the first use because a task may need a large package, or the class
    # itself.
    "chain_arithmetic": "distill_jax.tasks.chain_arithmetic:ChainArithmetic",
    "instructions": "distill_jax.tasks.instructions:Instructions",
    "math_text": "distill_jax.tasks.math_text:MathText",
    "multiple_choice": "distill_jax.tasks.multiple_choice:MultipleChoice",
    "reasoning_gym": "distill_jax.tasks.reasoning_gym:ReasoningGym",
}


def get_task(name: str, **options: Any) -> Task:
    """Builds a task of the registry.

    Args:
      name: a key of `TASKS`.
      **options: keyword arguments of the task's constructor.

    Raises:
      ValueError: no task has this name, or the task has no such option, or needs one that is missing.
    """
    if name not in TASKS:
        raise ValueError(
            f"there is no task {name!r}{did_you_mean(name, TASKS)}; tasks: {', '.join(sorted(TASKS))}"
        )
    entry = TASKS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = cast(Callable[..., Task], getattr(importlib.import_module(module), attribute))
    parameters = inspect.signature(entry).parameters.values()
    # A task that takes any keyword (reasoning_gym hands them to a data set) checks them itself.
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    unknown = [] if open_ended else sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"task {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"its options: {', '.join(known) or 'none'}"
        )
    missing = [
        p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in options
    ]
    if missing:
        raise ValueError(f"task {name!r} needs the option {', '.join(map(repr, missing))}")
    return entry(**options)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """ " (did you mean 'a' or 'b'?)" for an error message; empty when nothing is close."""
    close = difflib.get_close_matches(str(word), list(words), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def stable_hash(text: str, purpose: str) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every run; another purpose gives other bits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little")


def unit_hash(text: str, purpose: str) -> float:
    """`stable_hash` as a number in [0, 1), uniform over texts."""
    return (stable_hash(text, purpose) >> 11) * 2.0**-53


def split_of(text: str, held_out: float = 0.2) -> Split:
    """The one split that a question belongs to: a hash of its text, so no draw can move it.

    Args:
      text: the question.
      held_out: share of all questions kept from training, half for "validation" and half for "test".
    """
    place = unit_hash(text, "split")
    if place >= held_out:
        return "train"
    return "validation" if place < held_out / 2 else "test"


def check_draw(split: str, count: int, seed: int) -> None:
    """Checks the arguments of `Task.problems`.

    Raises:
      ValueError: the split does not exist, or count or seed is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    for what, value in (("count", count), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise ValueError(f"{what} must be a whole number >= 0, not {value!r}")


def task_rng(seed: int, purpose: str) -> np.random.Generator:
    """A random stream of its own for every (seed, purpose)."""
    return np.random.default_rng([seed, stable_hash(purpose, "rng")])


def gather(
    candidates: Iterable[tuple[str, Item | None]],
    split: Split,
    count: int,
    *,
    what: str,
    held_out: float = 0.2,
    distinct: bool | None = None,
    patience: int = 50_000,
) -> list[Item]:
    """Takes the first `count` candidates that belong to a split.

    Args:
      candidates: (question, item) pairs without end; the question alone decides about the split and about
        repeats. An item of None means that the candidate cannot be used.
      split, count: what is wanted.
      what: the task's name, for the error message.
      held_out: as in `split_of`; the same for all draws of a task, or its splits would overlap.
      distinct: whether no question may come twice; by default in the held-out splits only.
      patience: give up after so many candidates in a row that bring nothing.

    Raises:
      ValueError: the split ran dry. Questions are drawn, not enumerated, so a few rare ones may be left when
        it does.
    """
    distinct = split != "train" if distinct is None else distinct
    found: list[Item] = []
    seen: set[str] = set()
    idle = unusable = 0
    for text, item in candidates if count else ():
        idle += 1
        if split_of(text, held_out) == split and not (distinct and text in seen):
            if item is None:
                unusable += 1
            else:
                idle = 0
                found.append(item)
                if distinct:
                    seen.add(text)
        if len(found) == count:
            break
        if idle >= patience:
            raise ValueError(
                f"{what}: {count} {'distinct ' * distinct}problems of the split {split!r} were asked for, "
                f"but after {len(found)} of them {patience} draws brought no other ({unusable} in all could "
                "not be used); ask for fewer, or choose options with more problems"
            )
    return found
