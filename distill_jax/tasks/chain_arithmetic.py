"""Chains of one-digit arithmetic, worked out from left to right modulo 10, in several styles of working.

    prompt      6+4*6-4-5?\\n
    completion  6+4=0 0*6=0 0-4=6 6-5=1 #### 1

There is no precedence: every step takes the value so far, applies one operation and keeps the last digit. The
operators +, -, * are drawn 2 : 2 : 1; the operand of + and - is any digit, that of * one of 2, 3, 4, 6, 7, 8,
9 (a factor 0, 1 or 5 would forget much or do nothing). There are 10 * 27^n questions with n operations.

The answer is easy to check and the same trace can be written in many styles, some of which a small student
learns at once and some hardly at all: what a distillability knob can move. Every style is a pure function of
the chain.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from distill_jax.tasks.base import (
    Problem,
    Split,
    check_draw,
    did_you_mean,
    gather,
    stable_hash,
    task_rng,
    unit_hash,
)

ANSWER_MARK = "####"
FILLER_WORDS = ("ok", "hmm", "so", "then", "now", "well", "next", "right")

_STEPS = tuple(
    [f"+{d}" for d in range(10)] + [f"-{d}" for d in range(10)] + [f"*{d}" for d in (2, 3, 4, 6, 7, 8, 9)]
)
_STEP_PROBABILITY = np.array([0.4 / 10] * 10 + [0.4 / 10] * 10 + [0.2 / 7] * 7)
_OPERATION: dict[str, Callable[[int, int], int]] = {
    "+": lambda value, operand: (value + operand) % 10,
    "-": lambda value, operand: (value - operand) % 10,
    "*": lambda value, operand: (value * operand) % 10,
}
_AFTER = {step: [_OPERATION[step[0]](value, int(step[1])) for value in range(10)] for step in _STEPS}
_CIPHER = str.maketrans("0123456789+-*=", "ABCDEFGHIJ~!@.")
_BLOCK = 4096  # fixed, so that the first n problems do not depend on how many are asked for


class Chain(NamedTuple):
    """A worked chain: `steps` such as ("+4", "*6"), `values` the start and the value after every step."""

    steps: tuple[str, ...]
    values: tuple[int, ...]

    @classmethod
    def work_out(cls, start: int, steps: tuple[str, ...]) -> Chain:
        """Applies the steps to the start, modulo 10."""
        values = [start]
        for step in steps:
            values.append(_AFTER[step][values[-1]])
        return cls(steps, tuple(values))

    @property
    def prompt(self) -> str:
        return f"{self.values[0]}{''.join(self.steps)}?\n"

    @property
    def answer(self) -> str:
        return str(self.values[-1])


def _transitions(chain: Chain) -> Iterator[tuple[int, str, int]]:
    """(value before, step, value after) of every step."""
    return zip(chain.values[:-1], chain.steps, chain.values[1:], strict=True)


def _written_steps(chain: Chain) -> list[str]:
    return [f"{before}{step}={after}" for before, step, after in _transitions(chain)]


def explicit(chain: Chain) -> str:
    """Every operation with its result: `6+4=0 0*6=0 0-4=6 6-5=1`."""
    return " ".join(_written_steps(chain))


def filler(chain: Chain) -> str:
    """Explicit, with a word that means nothing before every step: `ok 6+4=0 hmm 0*6=0 so 0-4=6 now 6-5=1`.

    The words look random to a model: they are a hash of the prompt.
    """
    code = stable_hash(chain.prompt, "filler")
    words = [FILLER_WORDS[(code >> (3 * place % 63)) & 7] for place in range(len(chain.steps))]
    return " ".join(f"{word} {step}" for word, step in zip(words, _written_steps(chain), strict=True))


def cipher(chain: Chain) -> str:
    """Explicit in other letters, digits as A to J and `+-*=` as `~!@.`: `G~E.A A@G.A A!E.G G!F.B`.

    Merely unfamiliar: a student learns the new tables in a few hundred steps.
    """
    return explicit(chain).translate(_CIPHER)


def result_first(chain: Chain) -> str:
    """Every result before its operation: `0<6+4 0<0*6 6<0-4 1<6-5`.

    A result has to be known before its operation has been written down.
    """
    return " ".join(f"{after}<{before}{step}" for before, step, after in _transitions(chain))


def terse(chain: Chain) -> str:
    """The results alone: `| 0 0 6 1`. The operands have to be looked up in the question."""
    return "| " + " ".join(map(str, chain.values[1:]))


def _folded(chain: Chain, width: int) -> str:
    ends = [min(first + width, len(chain.steps)) for first in range(0, len(chain.steps), width)]
    return " ".join(
        f"{chain.values[first]}{''.join(chain.steps[first:end])}={chain.values[end]}"
        for first, end in itertools.pairwise([0, *ends])
    )


def folded(chain: Chain) -> str:
    """Two operations in a written step: `> 6+4*6=0 0-4-5=1`; the last step of an odd chain has one.

    The model has to do one operation unwritten, which takes a small student far longer to learn.
    """
    return f"> {_folded(chain, 2)}"


def folded3(chain: Chain) -> str:
    """Three operations in a written step: `>> 6+4*6-4=6 6-5=1`; the last step has what is left."""
    return f">> {_folded(chain, 3)}"


def direct(chain: Chain) -> str:
    """No working at all: the completion is `#### 1`."""
    return ""


class Style(NamedTuple):
    """How a trace is written, and the shape by which such a trace is recognised (right or wrong)."""

    write: Callable[[Chain], str]
    pattern: re.Pattern[str]


def _repeated(step: str) -> re.Pattern[str]:
    return re.compile(f"{step}( {step})*")


_DIGIT, _APPLY = "[0-9]", "[-+*][0-9]"
STYLES: dict[str, Style] = {
    "explicit": Style(explicit, _repeated(f"{_DIGIT}{_APPLY}={_DIGIT}")),
    "filler": Style(filler, _repeated(f"({'|'.join(FILLER_WORDS)}) {_DIGIT}{_APPLY}={_DIGIT}")),
    "cipher": Style(cipher, _repeated(r"[A-J][~!@][A-J]\.[A-J]")),
    "result_first": Style(result_first, _repeated(f"{_DIGIT}<{_DIGIT}{_APPLY}")),
    "terse": Style(terse, re.compile(rf"\|( {_DIGIT})+")),
    "folded": Style(folded, re.compile(f">( {_DIGIT}({_APPLY}){{1,2}}={_DIGIT})+")),
    "folded3": Style(folded3, re.compile(f">>( {_DIGIT}({_APPLY}){{1,3}}={_DIGIT})+")),
    "direct": Style(direct, re.compile("")),
}


def complete(chain: Chain, style: str) -> str:
    """The whole completion of a chain in a style: its trace, then ` #### ` and the answer."""
    return f"{STYLES[style].write(chain)} {ANSWER_MARK} {chain.answer}".lstrip()


def style_of(completion: str) -> str:
    """Tells the style of a completion by the shape of what stands before `####`.

    Returns:
      A key of `STYLES`, whether the trace is right or not; "other" for a trace of no single style, and for
      one without working and without `####`.
    """
    trace, mark, _ = completion.partition(ANSWER_MARK)
    trace = trace.strip()
    if not trace and not mark:
        return "other"
    return next((name for name, style in STYLES.items() if style.pattern.fullmatch(trace)), "other")


def corpus(
    count: int,
    seed: int,
    styles: Mapping[str, float],
    operations: tuple[int, int] = (3, 5),
    split: Split = "train",
) -> list[tuple[str, str]]:
    """Draws worked examples to train on: (prompt, completion), every trace right.

    Args:
      count: how many.
      seed: of the draw; the same arguments give the same corpus.
      styles: weight of each style of `STYLES`; they need not sum to 1.
      operations: fewest and most operations of a chain, each number equally likely.
      split: where the prompts come from. A base model or a student trained on anything but "train" would have
        seen the problems that it is tested on.

    Raises:
      ValueError: a style that does not exist, weights that are no mix, or a bad draw (see `Task.problems`).
    """
    check_draw(split, count, seed)
    names, weights = _mix(styles, "styles")
    rng = task_rng(seed, f"chain_arithmetic corpus {split}")
    chains = _draw(rng, _operations(operations), split, count)
    drawn = rng.choice(len(names), size=count, p=weights).tolist()
    return [(chain.prompt, complete(chain, names[style])) for chain, style in zip(chains, drawn, strict=True)]


class ChainArithmetic:
    """The task of this module.

    Args:
      operations: fewest and most operations of a problem.
      gold_styles: weight of each style in the gold completions; which one a problem gets is a hash of its
        prompt.

    Raises:
      ValueError: an empty range of operations, an unknown style, or weights that are no mix.
    """

    name = "chain_arithmetic"
    failures = 0  # the verifier compares text and cannot fail
    answer_mark = ANSWER_MARK

    def __init__(self, operations: tuple[int, int] = (3, 5), gold_styles: Mapping[str, float] | None = None):
        self.operations = _operations(operations)
        gold_styles = {"explicit": 0.6, "folded": 0.4} if gold_styles is None else gold_styles
        self._styles, weights = _mix(gold_styles, "gold_styles")
        self._thresholds = np.cumsum(weights)

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """See `Task.problems`. `metadata` holds "operations", their number, and "style", that of the gold."""
        check_draw(split, count, seed)
        chains = _draw(task_rng(seed, f"{self.name} problems {split}"), self.operations, split, count)
        return [self._problem(index, chain) for index, chain in enumerate(chains)]

    def _problem(self, index: int, chain: Chain) -> Problem:
        place = int(np.searchsorted(self._thresholds, unit_hash(chain.prompt, "gold style"), side="right"))
        style = self._styles[min(place, len(self._styles) - 1)]  # the weights may sum to a little less than 1
        metadata = {"operations": len(chain.steps), "style": style}
        return Problem(chain.prompt, chain.answer, complete(chain, style), index, metadata)

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """1 when the text has one `####`, the answer alone follows it, and the model ended; else 0.

        White space around the answer is allowed. The working is not looked at.
        """
        parts = completion.split(ANSWER_MARK)
        return float(bool(ended) and len(parts) == 2 and parts[1].strip() == problem.answer)


def _draw(rng: np.random.Generator, operations: tuple[int, int], split: Split, count: int) -> list[Chain]:
    chains = ((chain.prompt, chain) for chain in _chains(rng, operations))
    return gather(
        chains, split, count, what=f"chain_arithmetic with {operations[0]} to {operations[1]} operations"
    )


def _chains(rng: np.random.Generator, operations: tuple[int, int]) -> Iterator[Chain]:
    """Endless chains; the random numbers come a block at a time, or they would take most of the time."""
    fewest, most = operations
    while True:
        lengths = rng.integers(fewest, most, endpoint=True, size=_BLOCK).tolist()
        starts = rng.integers(10, size=_BLOCK).tolist()
        rows = rng.choice(len(_STEPS), size=(_BLOCK, most), p=_STEP_PROBABILITY).tolist()
        for length, start, row in zip(lengths, starts, rows, strict=True):
            yield Chain.work_out(start, tuple([_STEPS[step] for step in row[:length]]))


def _operations(operations: tuple[int, int]) -> tuple[int, int]:
    pair = tuple(operations) if isinstance(operations, tuple | list) else ()
    if len(pair) != 2 or not all(type(bound) is int for bound in pair) or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"operations must be two whole numbers, 1 <= fewest <= most, not {operations!r}")
    return pair[0], pair[1]


def _mix(styles: Mapping[str, float], argument: str) -> tuple[list[str], np.ndarray]:
    """Names and probabilities of the styles that have a weight."""
    mix = dict(styles.items())
    for name, weight in mix.items():
        if name not in STYLES:
            raise ValueError(
                f"{argument}: no style {name!r}{did_you_mean(name, STYLES)}; styles: {', '.join(STYLES)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{argument}: the weight of {name!r} must be a number >= 0, not {weight!r}")
    mix = {name: float(weight) for name, weight in mix.items() if weight > 0}
    if not mix:
        raise ValueError(f"{argument} must give a positive weight to at least one of: {', '.join(STYLES)}")
    weights = np.array(list(mix.values()))
    return list(mix), weights / weights.sum()
