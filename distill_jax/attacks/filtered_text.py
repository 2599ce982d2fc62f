"""Attacks that keep the good part of the teacher's text: right by a verifier, not degenerate, easy for the student."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from distill_jax.attacks.attack import Attack, Knob
from distill_jax.attacks.tools import Query, Text, Tools

REPEATS = 8  # a text that says the same four characters (or more) this often in a row is degenerate
SHARED = 0.9  # share of the texts that must end alike before the common end is taken for boilerplate


def best_of(tools: Tools, seed: int, *, samples: int, pick: str = "first") -> list[Text]:
    """Of `samples` answers to every problem one that the verifier calls right; problems without one are left out.

    pick: "first" right one, or the "likeliest" under the student itself, per byte.
    """
    rounds = [tools.ask(Query(sample=sample)) for sample in range(samples)]
    texts = [text for answers in zip(*rounds, strict=True) for text in answers]
    right = [text for text, good in zip(texts, tools.verified(texts), strict=True) if good]
    surprise = tools.nats_per_byte(right) if pick == "likeliest" else np.zeros(len(right))
    best: dict[int, int] = {}
    for place, text in enumerate(right):
        if text.problem not in best or surprise[place] < surprise[best[text.problem]]:
            best[text.problem] = place
    return [right[place] for place in best.values()]


def filtered(tools: Tools, seed: int, *, keep: float) -> list[Text]:
    """Cuts a common end off, drops degenerate texts, keeps the share `keep` that the student finds least surprising."""
    texts = [text for text in cut_shared_end(tools.ask(Query())) if not is_degenerate(text.completion)]
    texts = drop_odd_scripts(texts)
    surprise = tools.nats_per_byte(texts)
    kept = np.argsort(surprise, kind="stable")[: int(np.ceil(keep * len(texts)))]
    return [texts[place] for place in sorted(kept) if np.isfinite(surprise[place])]


def cut_shared_end(texts: Sequence[Text], share: float = SHARED) -> list[Text]:
    """The texts without the longest end of whole words that at least `share` of them have in common.

    Whole words: the bracket that closes "(A)" and "(B)" belongs to the answers. An end that is all there is of some
    text is left alone: it would be the answer of a task with one answer.
    """
    if not texts:
        return []
    needed = int(np.ceil(share * len(texts)))
    end = ""
    candidates = collections.Counter(text.completion[-1:] for text in texts)
    while True:
        best, count = candidates.most_common(1)[0]
        if count < needed or len(best) <= len(end):
            break
        end = best
        candidates = collections.Counter(
            text.completion[-len(end) - 1 :] for text in texts if text.completion.endswith(end)
        )
    words = re.search(r"\s", end)
    end = end[words.start() :] if words else ""
    if not end.strip() or any(text.completion == end for text in texts):
        return list(texts)
    return [
        dataclasses.replace(text, completion=text.completion[: -len(end)])
        if text.completion.endswith(end)
        else text
        for text in texts
    ]


def is_degenerate(completion: str, repeats: int = REPEATS) -> bool:
    """Whether a stretch of 1 to 16 characters stands at least `repeats` times in a row (4 characters long at least)."""
    for period in range(1, min(16, len(completion) // repeats) + 1):
        shifted = np.frombuffer(completion.encode("utf-32-le"), np.uint32)
        same = shifted[period:] == shifted[:-period]
        run = longest_run(same)
        if run >= period * (repeats - 1) and run + period >= 4 * repeats:
            return True
    return False


def longest_run(flags: np.ndarray) -> int:
    """Length of the longest run of true values."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return int((ends[1::2] - ends[::2]).max(initial=0))


def drop_odd_scripts(texts: Sequence[Text]) -> list[Text]:
    """Leaves out texts outside ASCII where nine in ten of the others are inside it."""
    plain = [text.completion.isascii() for text in texts]
    if sum(plain) < SHARED * len(plain):
        return list(texts)
    return [text for text, ascii_only in zip(texts, plain, strict=True) if ascii_only]


VERIFIED = Attack(
    "A2",
    "best of n, verified",
    "Asks several times, keeps one answer a problem that a verifier calls right.",
    "text",
    1,
    select=best_of,
    knobs=(
        Knob("n=4-easiest", 4.0, {"samples": 4, "pick": "likeliest"}),
        Knob("n=1", 1.0, {"samples": 1}),
        Knob("n=16-easiest", 16.0, {"samples": 16, "pick": "likeliest"}),
        Knob("n=4", 4.0, {"samples": 4}),
    ),
    short=2,
    needs=("verifier",),
)
FILTERED = Attack(
    "A3",
    "filtered text",
    "Cuts boilerplate, drops degenerate texts, keeps those that the student itself finds likely.",
    "text",
    1,
    select=filtered,
    knobs=(
        Knob("keep=0.99", select={"keep": 0.99}),
        Knob("keep=0.5", select={"keep": 0.5}),
        Knob("keep=0.9", select={"keep": 0.9}),
        Knob("keep=0.1", select={"keep": 0.1}),
    ),
    short=3,
)
ATTACKS = (VERIFIED, FILTERED)
