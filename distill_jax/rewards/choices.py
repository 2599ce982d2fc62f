"""Which option of a multiple-choice question did a completion choose?

Models say it in many ways: `B`, `(B) Paris`, `**Answer: B**`, `\\boxed{\\text{B}}`, `The answer is Paris.` The
last mark of the strongest kind counts, since models correct themselves; a completion that names two options
where it should name one chose none. What is said of an option in passing ("Option A is wrong") chooses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from distill_jax.rewards.answer_part import answer_part

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TAGGED = re.compile(r"<answer>([^<]*)", re.DOTALL | re.IGNORECASE)
_VERB = r"(?:is|would be|should be|must be)\b"
_LEADS = (
    r"(?:\s*[:=]|\s+[-\u2013\u2014](?=\s))?\s*"
    r"(?:(?:therefore|thus|clearly|simply|indeed|definitely|actually|probably|most likely|likely)\s+)?"
    r"(?:option\b|choice\b|letter\b)?\s*[:=]?\s*"
)
_ANNOUNCED = re.compile(
    rf"\b(?:answer\b(?:\s+(?:here|to (?:this|the) question))?(?:\s+{_VERB})?|(?:choice|option)\s+{_VERB}"
    rf"|(?:correct|right|best)\s+(?:one|response|statement)\s+{_VERB}"
    rf"|I(?:'d|'ll| would| will)?\s+(?:choose|pick|select|go (?:with|for)|take)\b(?:\s+the\s+answer\b)?){_LEADS}"
    r"|答案(?:是|为)?\s*:?\s*",
    re.IGNORECASE,
)
# Before an option, or the word "answer": what follows is not chosen.
_DENIED = re.compile(
    r"(?:\b(?:neither|nor|not|wrong|incorrect|false|other|whether|if|unlikely)|n't(?:\s+(?:think|believe|say))?)"
    r"\s+(?:that\s+)?(?:option\s+|choice\s+)?$",
    re.IGNORECASE,
)
_DECLARED = re.compile(
    r"(?<![\w'])\(?([A-Z])\)?[.:]?(?:\s*\([^()]*\))?\s+is\s+(?:clearly\s+)?(?:the\s+)?(?:most\s+|single\s+)?"
    r"(?:correct|right|best|appropriate|accurate|answer)\b"
    r"(?=\s*(?:$|[.,;:!)]|(?:answer|option|choice|one|response|here|because|since|as|for this)\b))"
    r"|\b(?:[Ii]t(?:'s| is| must be)|[Tt]herefore|[Tt]hus|[Hh]ence|[Ss]o),?\s+\(?([A-Z])\)?\s*(?:[.!]|$)",
    re.MULTILINE,
)
_NAMED = re.compile(r"\b(?:choice|option)\b\s*[:=]?\s*", re.IGNORECASE)
# What follows an option that is spoken of, and not chosen.
_REFUSED = re.compile(
    r"[)\]}]?\s*[:,]?\s*(?:\([^()]*\)\s*)?(?:(?:is|are|was|looks?|seems?|would be|also|clearly|thus|therefore)\s+)*"
    r"(?:not\b|isn't\b|cannot\b|can't\b|wrong\b|incorrect\b|false\b|in error\b|ruled out\b)",
    re.IGNORECASE,
)
# A letter, alone or in brackets, that is no part of a word.
_LETTER = re.compile(r"[\s(\[\"'“{]*([A-Za-z])(?![\w'’])[)\]}]?")
_SECOND = re.compile(r"\s*(?:[,;|/&]|\bor\b|\band\b)\s*(?:or\s+|and\s+)?\(?([A-Z])\)?(?![\w'’])")
_DECORATION = re.compile(
    r"\*\*|__|`|\$|\\[()\[\]]|\\(?:text|textbf|mathrm|mathbf|textit)\s*(?=\{)"
    r"|(?<![\w*)])\*(?=[(\w])|(?<=[\w.)])\*(?![\w*(])"  # one star on the outside of a word
)
_SPACES = re.compile(r"[^\S\n]+")
_LINES = re.compile(r"\n(?: ?\n)+ ?")
_NEAR = 40  # characters before a mark that can deny it
_TAIL = 1000  # characters after a mark that are read: what a model wrote may hold thousands of marks
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
# After "A" or "I", which are words too, only these make it a letter.
_GOES_ON = re.compile(r"\s*(?:$|[\n.,:;)\]}\"'”(!-]|(?:because|since|as|for|is|or|and)\b)")


def extract_choice(completion: str, options: Sequence[str], stop_texts: Sequence[str] = ()) -> int | None:
    """The index of the option that a completion chose, None when it chose none, or more than one.

    Read is `answer_part`: without thinking, up to the first stop text. The first of these that is there decides, and
    of several of a kind the last:

    1. `<answer>...</answer>`, `\\boxed{...}`, and, where no later answer is announced, what follows `####`;
    2. what follows "answer", with or without "is" and a colon, or "option is", "choice would be", "I would choose";
    3. "B is correct", "it is B.", "therefore, B.";
    4. a last or first line that is nothing but a choice: `B`, `(B)`, `B. Paris`, `Paris`;
    5. "option B", unless it is called wrong.

    A choice is a letter of the options (a small one only in brackets or alone), or an option's text.

    Args:
      completion: what the model wrote.
      options: texts of the options; the first has the letter A.
      stop_texts: where a model that never ends by itself has begun something else.
    """
    text = answer_part(completion, stop_texts).translate(_FULL_WIDTH).strip()
    for marks in (map(_plain, _strong_marks(text)), _after(_ANNOUNCED, text), _declared(text)):
        for tail in reversed(list(marks)):
            choice = _choice_at_start(tail, options)
            if choice is not None:
                return choice if choice >= 0 else None
    lines = [line for line in _plain(text).splitlines() if line.strip()]
    for line in (*lines[-1:], *lines[:1]):
        choice = _whole_line(line, options)
        if choice is not None:
            return choice
    for tail in reversed(list(_named(text))):
        choice = _choice_at_start(tail, options)
        if choice is not None:
            return choice if choice >= 0 else None
    return None


def _plain(text: str) -> str:
    """Without marks of bold type, code and mathematics, and with one space, two line breaks, where there are many."""
    return _LINES.sub("\n\n", _SPACES.sub(" ", _DECORATION.sub("", text)))


def _strong_marks(text: str) -> Iterator[str]:
    yield from _TAGGED.findall(text)
    yield from _BOXED.findall(text)
    marked = list(filter(str.strip, text.split("####")[1:]))
    # Four of these signs are a heading as well: an answer that is announced further down is the answer.
    if marked and not _ANNOUNCED.search(_plain(marked[-1].strip().partition("\n")[2])):
        yield from marked


def _after(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    plain = _plain(text)
    for match in pattern.finditer(plain):
        if not _DENIED.search(plain[max(match.start() - _NEAR, 0) : match.start()]):
            yield plain[match.end() : match.end() + _TAIL]


def _declared(text: str) -> Iterator[str]:
    plain = _plain(text)
    for match in _DECLARED.finditer(plain):
        if not _DENIED.search(plain[max(match.start() - _NEAR, 0) : match.start()]):
            yield match[1] or match[2]


def _named(text: str) -> Iterator[str]:
    """What follows "option" or "choice", where the option is not called wrong."""
    for tail in _after(_NAMED, text):
        match = _LETTER.match(tail)
        if match is None or not _REFUSED.match(tail[match.end() :]):
            yield tail


def _choice_at_start(tail: str, options: Sequence[str]) -> int | None:
    """The option that a text begins with; -1 when it begins with several, None with none."""
    match = _LETTER.match(tail)
    if match:
        letter, rest = match[1], tail[match.end() :]
        enclosed = match[0].strip()[:1] in "([{" or not tail[match.end() :].strip(" .)\n")
        is_letter = (
            letter.isupper() and (letter not in "AI" or enclosed or _GOES_ON.match(rest))
        ) or enclosed
        index = LETTERS.index(letter.upper())
        if is_letter and index < len(options):
            second = _SECOND.match(rest)
            several = second is not None and LETTERS.index(second[1]) < len(options) and second[1] != letter
            return -1 if several else index
    return _option_text(tail.partition("\n")[0], options)


def _option_text(line: str, options: Sequence[str]) -> int | None:
    """The one option whose text this line is, or begins with; the longest where one begins with another."""
    said = _words(line)
    found = [
        (len(words), index)
        for index, option in enumerate(options)
        if (words := _words(option)) and said[: len(words)] == words
    ]
    longest = max(found, default=None)
    if longest is None or [size for size, _ in found].count(longest[0]) > 1:
        return None
    return longest[1]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+|[^\w\s.,;:!?(){}\"'“”]", text.lower())


def _whole_line(line: str, options: Sequence[str]) -> int | None:
    """The option that a line consists of: a letter, a letter and a text, or an option's text."""
    match = re.fullmatch(r"\s*(?:[-*>]\s*)?\(?([A-Za-z])(?:\)|\.|:|(?=\s*$))\s*(.*)", line)
    if match and LETTERS.index(match[1].upper()) < len(options):
        index = LETTERS.index(match[1].upper())
        if not match[2].strip() or _words(match[2])[: len(_words(options[index]))] == _words(options[index]):
            return index
        return index if match[1].isupper() and _option_text(match[2], options) is None else None
    said = _words(line)
    same = [index for index, option in enumerate(options) if said and said == _words(option)]
    return same[0] if len(same) == 1 else None
