"""The tests of the suite itself: sham defences that it must break, and a teacher that must defeat all of it.

An evaluation whose attacks fail because they are broken looks like a strong defence. So the suite runs beside every
evaluation against weaknesses that were planted (the "active tests" of Zimmermann et al., arXiv 2206.13991), and its
verdict counts only if it finds them; and against a teacher from which nothing can be learned, where an attack that
succeeds would mean that our own evaluation leaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from distill_jax.attacks.attack import ON_GIVEN_TEXT, Attack, Knob
from distill_jax.attacks.tools import Text

GARBAGE = " %% 7"  # the number is for scorers that read the last one
RECOVERED = 0.9  # share of the clean gain that an attack must recover from a sham defence
# The same where only distributions are honest: after a swapped word they are not quite those of its own texts.
READ = 0.75
SWAPPED = 0.75  # share of the words that are swapped
LEAKED = 0.1  # share of the clean gain above which a teacher without labels has taught something

Corrupt = Callable[[Sequence[Text], int], list[Text]]


def append_garbage(texts: Sequence[Text], seed: int) -> list[Text]:
    """The same few bytes after every text: they must make its answer wrong, which the suite checks for each task."""
    return [dataclasses.replace(text, completion=text.completion + GARBAGE) for text in texts]


def permute_labels(texts: Sequence[Text], seed: int) -> list[Text]:
    """Every text under the prompt of another problem: one cycle through all, so that none stays where it was."""
    if len(texts) < 2:
        raise ValueError(f"labels of {len(texts)} texts cannot be permuted; expected at least 2")
    order = np.random.default_rng([seed, 33]).permutation(len(texts))
    moved: list[Text] = list(texts)
    for place, source in zip(order, np.roll(order, 1), strict=True):
        moved[place] = dataclasses.replace(
            texts[place],
            completion=texts[source].completion,
            ended=texts[source].ended,
            asked=texts[source].prompt,
        )
    return moved


def swap_words(texts: Sequence[Text], seed: int) -> list[Text]:
    """Three words in four become another text's word of the same shape (digits for digits, letters for letters).

    What is said is wrong, how it is said is not: the teacher still knows what it would write after each of these
    beginnings. (After words in random order it does not, and there its distributions teach nobody.)
    """
    shaped: dict[str, list[str]] = {}
    for text in texts:
        for word in text.completion.split(" "):
            shaped.setdefault(_shape(word), []).append(word)
    rng = np.random.default_rng([seed, 22])

    def other(word: str) -> str:
        words = shaped[_shape(word)]
        return words[rng.integers(len(words))] if rng.random() < SWAPPED else word

    return [
        dataclasses.replace(text, completion=" ".join(other(word) for word in text.completion.split(" ")))
        for text in texts
    ]


def _shape(word: str) -> str:
    return "".join("0" if c.isdecimal() else "a" if c.isalpha() else c for c in word)


@dataclasses.dataclass(frozen=True)
class Control:
    """A planted weakness, or a teacher without information.

    Attributes:
      id, name, sentence: as of an attack.
      expect: "recover" (the best of `attacks` must recover at least `RECOVERED` of the clean gain), "fail" (no attack
        that uses the teacher may gain `LEAKED` of it above the untrained student, and above one that always says the
        same) or "monotone" (judged on the other arms; trains nothing).
      arm: name of its teacher, made of the original one by `corrupt`; "" for none.
      corrupt: (texts, seed) -> texts that this teacher gives away. Its distributions are those of the original one,
        under the prompt that was really asked.
      attacks: with "recover", ids of those that must.
      threshold: of the recovered gap.
    """

    id: str
    name: str
    sentence: str
    expect: str
    arm: str = ""
    corrupt: Corrupt | None = None
    attacks: tuple[str, ...] = ()
    threshold: float = RECOVERED


CONTROLS = (
    Control(
        "P1",
        "sham defence",
        "The original teacher with the same garbage after every text: A3 or A5 must recover at least 90 %.",
        "recover",
        "sham",
        append_garbage,
        attacks=("A3", "A5"),
    ),
    Control(
        "P2",
        "text-only defence",
        "Words swapped between texts, honest distributions: an attack that reads these must recover at least 75 %.",
        "recover",
        "swapped",
        swap_words,
        attacks=("A7", "A7b", "A8", "A8b", "A10b"),
        threshold=READ,
    ),
    Control(
        "P3",
        "permuted labels",
        "Every text stands under another problem: no attack may learn from it, or the evaluation itself leaks.",
        "fail",
        "permuted",
        permute_labels,
        threshold=LEAKED,
    ),
    Control(
        "P4",
        "monotonicity",
        "The best attack with more access or more data is not worse than the best with less, beyond its interval.",
        "monotone",
        threshold=0.0,
    ),
)


def judges(control: Control, attack: Attack) -> bool:
    """Whether an attack is run on the teacher of a control.

    One that is expected to defeat every attack is spared those that would learn without it (from clean texts, from the
    task alone, from the weights themselves, from a verifier: of ten possible answers it finds the right one among ten
    random texts), and those that ask it about texts that it has not written: its answers to these would be honest.
    """
    if attack.select is None or not attack.uses_teacher:
        return False
    if control.expect == "recover":
        return attack.id in control.attacks
    informed = attack.access == "weights" or bool({"gold", "verifier"} & set(attack.needs))
    return control.expect == "fail" and attack.recipe.loss in ON_GIVEN_TEXT and not informed


def grid(control: Control, attack: Attack, size: str) -> tuple[Knob, ...]:
    """The knobs that are run on a control's teacher.

    One that is expected to defeat every attack is spared working that the student wrote itself: a student may get
    better at what it can do already by learning from its own finished texts, whatever the teacher says.

    One that spoils texts is to be read through these texts. A student that writes all texts itself never meets them,
    and the distributions are the clean teacher's: a recovered gap of 1, whatever the attack can do.
    """
    knobs = attack.grid(size)
    if control.expect == "fail":
        return tuple(knob for knob in knobs if knob.select.get("working") != "own")
    if control.corrupt is swap_words:
        return tuple(knob for knob in knobs if attack.recipe_of(knob).options.get("student_share") != 1.0)
    return knobs


ARMS = {control.arm: control for control in CONTROLS if control.arm}
