"""The part of a completion in which its answer is looked for; shared by everything that reads answers."""

from __future__ import annotations

from collections.abc import Sequence

_THINKING, _THOUGHT = "<think>", "</think>"


def answer_part(completion: str, stop_texts: Sequence[str] = ()) -> str:
    """The completion without `<think>...</think>`, and up to the first stop text (leading white space aside).

    Thinking that has no end, because the length limit came first, is no answer: "".

    Args:
      completion: what the model wrote.
      stop_texts: where a model that never ends by itself has begun something else.
    """
    text = completion.rpartition(_THOUGHT)[2].lstrip()
    if _THINKING in text:
        text = text.partition(_THINKING)[0]
    return before_stop(text, stop_texts)


def before_stop(text: str, stop_texts: Sequence[str]) -> str:
    """`text` up to the first stop text; one in the leading white space ends nothing."""
    blank = len(text) - len(text.lstrip())
    return text[: min((found for stop in stop_texts if (found := text.find(stop, blank)) >= 0), default=None)]
