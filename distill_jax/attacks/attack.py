"""What an attack is: a frozen entry that names its access, its budget, its data, its student recipe and its knobs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from distill_jax.attacks.tools import Text, Tools

# What an attacker sees of the teacher, from less to more: its answers; with them the probabilities of their tokens
# and of the k best; likelihoods or distributions on any text that the attacker sends; the weights.
ACCESS = ("text", "top-k", "logits", "weights")
LOSSES = ("cross_entropy", "top_k", "spans", "logits", "on_policy", "policy_gradient")
ON_GIVEN_TEXT = LOSSES[:3]  # what these need of a teacher is known for a text before training

Select = Callable[..., list[Text]]
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.=_-]*")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the student is trained on the texts of an attack.

    Attributes:
      loss: "cross_entropy" on the texts; or a divergence to the teacher's distribution: "top_k", "logits" (all of it),
        "on_policy" (on the student's own rollouts), "policy_gradient" (sampled-token reverse KL), "spans" (across
        tokenizers).
      learning_rate, steps: multiples of the run's own.
      options: of the loss.
    """

    loss: str = "cross_entropy"
    learning_rate: float = 1.0
    steps: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"recipe: loss must be one of {LOSSES}, got {self.loss!r}")
        if min(self.learning_rate, self.steps) <= 0:
            raise ValueError(f"recipe: learning_rate and steps must be positive multiples, got {self}")


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting of an attack.

    Attributes:
      name: also a folder's name.
      queries: teacher texts asked for, as a multiple of the run's samples.
      select: options of the attack's `select`. recipe: fields of the attack's recipe that differ.
    """

    name: str
    queries: float = 1.0
    select: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _SAFE_NAME.fullmatch(self.name):
            raise ValueError(f"a knob's name is a folder's name: letters, digits and .=_-, got {self.name!r}")
        if self.queries < 0:
            raise ValueError(f"knob {self.name}: queries must be at least 0, got {self.queries}")


DEFAULT_KNOBS = (Knob("default"),)
SUPERVISED = Recipe()


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack of the suite.

    Attributes:
      id: "A2"; the folder of its students. name: two or three words. sentence: what it does, in one sentence.
      access: what it sees of the teacher, of `ACCESS`.
      tier: 1 runs with every suite, 2 is the least for a claim, 3 is for a paper.
      select: (tools, seed, **options) -> texts to train on; None for a view.
      recipe: of the student.
      knobs: settings that are tried; a short grid takes the first `short` of them.
      needs: what the attacker has beside the teacher: "verifier" (marks completions), "gold" (clean completions),
        "rewriter" (another model).
      uses_teacher: False for what any copier could do without it; such an attack cannot fail on a bad teacher.
      view: where the answer is read off, for an entry that trains nothing of its own.
    """

    id: str
    name: str
    sentence: str
    access: str
    tier: int
    select: Select | None = None
    recipe: Recipe = SUPERVISED
    knobs: tuple[Knob, ...] = DEFAULT_KNOBS
    short: int = 1
    needs: tuple[str, ...] = ()
    uses_teacher: bool = True
    view: str = ""

    def __post_init__(self) -> None:
        if self.access not in ACCESS:
            raise ValueError(f"{self.id}: access must be one of {ACCESS}, got {self.access!r}")
        if self.tier not in (1, 2, 3):
            raise ValueError(f"{self.id}: tier must be 1, 2 or 3, got {self.tier}")
        if (self.select is None) != bool(self.view):
            raise ValueError(f"{self.id}: an attack has a select function, or is a view of others; not both")
        names = [knob.name for knob in self.knobs]
        if not names or len(set(names)) < len(names) or not 1 <= self.short <= len(names):
            raise ValueError(f"{self.id}: knobs need distinct names and 1 <= short <= {len(names)}: {names}")
        for knob in self.knobs:
            self.recipe_of(knob)

    def grid(self, size: str) -> tuple[Knob, ...]:
        """The knobs of a "short" or a "full" grid."""
        if size not in ("short", "full"):
            raise ValueError(f"grid must be 'short' or 'full', got {size!r}")
        return self.knobs[: self.short] if size == "short" else self.knobs

    def knob(self, name: str) -> Knob:
        """The knob of this name."""
        return next(knob for knob in self.knobs if knob.name == name)

    def recipe_of(self, knob: Knob) -> Recipe:
        """The recipe with a knob's changes."""
        return dataclasses.replace(self.recipe, **knob.recipe)

    def texts(self, knob: Knob, tools: Tools, seed: int) -> list[Text]:
        """The training texts of one student seed under a knob."""
        assert self.select is not None
        return self.select(tools, seed, **knob.select)
