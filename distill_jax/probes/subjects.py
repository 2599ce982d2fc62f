"""A model under examination, and texts as that model reads them: its prompt style, its tokens, its byte ends."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from distill_jax.mesh import axis_size, place_batch
from distill_jax.models.adapter import AdapterConfig
from distill_jax.models.decoder import Params
from distill_jax.models.model import Model, multiplier
from distill_jax.probes.texts import Texts
from distill_jax.sequences import Sequences, pack_sequences
from distill_jax.text.chat import render_prompt
from distill_jax.text.tokenizers import Tokenizer

STYLES = ("raw", "auto", "plain", "chat")
_SIZE_STEP = 16  # token slots are a multiple of this: batches of about one length share a compilation

# Outcomes of the next byte: its 256 values, the end of the text, and tokens that are no text.
END, OTHER, BYTE_OUTCOMES = 256, 257, 258


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its adapter, the dial, and the way in which it is asked.

    Attributes:
      model: with its tokenizer.
      adapter: low-rank adapter tree, None for the bare model.
      scale: the dial s with `adapter_config` (s * alpha / rank is applied); without it, the whole multiplier.
      style: "raw" (the question is the prompt), or a style of `chat.render_prompt`: "auto", "plain", "chat".
      system: text before the question; not with "raw".

    Raises:
      ValueError: no tokenizer, an unknown style, a system text with "raw".
    """

    model: Model
    adapter: Params | None = None
    scale: float = 1.0
    adapter_config: AdapterConfig | None = None
    style: str = "auto"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.model.tokenizer is None:
            raise ValueError(
                "a model without a tokenizer cannot be probed; load it with load_model(..., tokenizer=...)"
            )
        if self.style not in STYLES:
            raise ValueError(f"prompt style must be one of {STYLES}, got {self.style!r}")
        if self.style == "raw" and self.system is not None:
            raise ValueError("the prompt style 'raw' is the question alone and takes no system text")

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    @property
    def multiplier(self) -> float | jax.Array:
        """What the adapter's product is multiplied by."""
        return multiplier(self.scale, self.adapter_config)

    def prompt_text(self, question: str) -> str:
        """The question in this model's style."""
        if self.style == "raw":
            return question
        return render_prompt(self.tokenizer, question, self.style, self.system)

    def end_id(self) -> int:
        """The id that ends an answer: what the chat template closes a turn with, else the end of sequence.

        Raises:
          ValueError: the tokenizer has none.
        """
        tokenizer = self.tokenizer
        if not tokenizer.eos_ids:
            raise ValueError(
                f"{tokenizer!r} has no end-of-sequence token, so it cannot score that a text ended; pass ended = False"
            )
        if self.style in ("auto", "chat") and tokenizer.chat_template is not None:
            names = {index: tokenizer.id_to_token(index) for index in tokenizer.eos_ids}
            for index, name in names.items():
                if name and name in tokenizer.chat_template:
                    return index
        return tokenizer.eos_ids[0] if tokenizer.eos_id is None else tokenizer.eos_id


def as_subject(model: Model | Subject) -> Subject:
    """A bare model is asked in the style "auto"."""
    return model if isinstance(model, Subject) else Subject(model)


def same_vocabulary(teacher: Subject, student: Subject) -> bool:
    """Whether a token id means the same to both."""
    return teacher.tokenizer.vocabulary_hash == student.tokenizer.vocabulary_hash


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Texts in one vocabulary.

    Attributes:
      sequences: N rows in the layout of `distill_jax.sequences`.
      ends: i32[N, T], bytes of the text up to and including each token; the end of sequence adds one.
      faithful: bool[N], the ids give the completion back byte for byte; only such rows can be aligned with
        another vocabulary.
    """

    sequences: Sequences
    ends: np.ndarray
    faithful: np.ndarray


def encode(subject: Subject, texts: Texts, role: str) -> Encoded:
    """Every row as this model reads it. Sampled ids of its vocabulary are kept as they are.

    Raises:
      ValueError: an empty prompt, a text longer than the model's context, or (from `Subject`) no end of sequence.
    """
    tokenizer = subject.tokenizer
    prompt_of = {
        question: tokenizer.encode_prompt(subject.prompt_text(question)) for question in set(texts.questions)
    }
    sampled = texts.ids is not None and {ids.vocabulary_hash for ids in texts.ids} == {
        tokenizer.vocabulary_hash
    }
    rows = [] if sampled else tokenizer.encode_batch(texts.completions, continuation=True)
    end_id = subject.end_id() if texts.ended.any() and not sampled else -1
    completions, ends, faithful = [], [], np.zeros(len(texts), bool)
    for row, text in enumerate(texts.completions):
        if sampled:
            assert texts.ids is not None
            whole = list(texts.ids[row])
            inner = whole[:-1] if texts.ended[row] else whole
        else:
            inner = list(rows[row])
            whole = [*inner, end_id] if texts.ended[row] else inner
        inner_ends = tokenizer.byte_ends(inner, continuation=True)
        width = int(inner_ends[-1]) if len(inner) else 0
        ends.append(np.concatenate([inner_ends, np.full(len(whole) - len(inner), width + 1, np.int32)]))
        faithful[row] = (
            tokenizer.token_bytes(inner, True) == text.encode() and not tokenizer.special_mask(inner).any()
        )
        completions.append(whole)
    prompts = [list(prompt_of[question]) for question in texts.questions]
    _check_context(subject, prompts, completions, texts, role)
    prompt_size, size = _size(max(map(len, prompts))), _size(max(map(len, completions)))
    sequences = pack_sequences(prompts, completions, prompt_size, size, tokenizer.pad_id)
    padded = np.zeros((len(texts), size), np.int32)
    for row, own in enumerate(ends):
        padded[row, : len(own)] = own
    return Encoded(sequences, padded, faithful)


def _size(longest: int) -> int:
    return max(1, -(-longest // _SIZE_STEP)) * _SIZE_STEP


def _check_context(
    subject: Subject, prompts: list[list[int]], completions: list[list[int]], texts: Texts, role: str
) -> None:
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError(
                f"the question of row {row} is {texts.questions[row]!r}, which gives no token in {role}'s prompt style "
                f"{subject.style!r}; a model needs at least one token to go on from"
            )
        if len(prompt) + len(completion) > subject.model.spec.max_context:
            raise ValueError(
                f"row {row} has {len(prompt)} + {len(completion)} tokens, but {role}'s context is "
                f"{subject.model.spec.max_context}; leave it out or shorten it"
            )


def byte_classes(subject: Subject) -> np.ndarray:
    """i32[V]: the first byte of each token; `END` for what ends a text, `OTHER` for what is no text."""
    return _byte_classes(subject.tokenizer, subject.model.spec.vocab_size)


@functools.lru_cache(maxsize=8)
def _byte_classes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    every = range(tokenizer.vocab_size)
    ends = tokenizer.byte_ends(every, continuation=True).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1]])
    data = np.frombuffer(tokenizer.token_bytes(every, continuation=True) + b"\0", np.uint8).astype(np.int32)
    classes = np.full(vocab_size, OTHER, np.int32)
    classes[: tokenizer.vocab_size] = np.where(ends > begins, data[begins], OTHER)
    classes[list(tokenizer.eos_ids)] = END
    return classes


def rows_on_device(sequences: Sequences, rows: np.ndarray, subject: Subject) -> Sequences:
    """These rows of host sequences, on the model's mesh."""
    part = dataclasses.replace(
        sequences,
        tokens=sequences.tokens[rows],
        prompt_length=sequences.prompt_length[rows],
        completion_length=sequences.completion_length[rows],
    )
    return part if subject.model.mesh is None else place_batch(part, subject.model.mesh)


def row_batches(count: int, batch_size: int, subject: Subject) -> list[np.ndarray]:
    """Row numbers of each device batch: all of one size that the mesh divides, the last filled up with the last row."""
    shards = 1 if subject.model.mesh is None else axis_size(subject.model.mesh, "batch")
    size = -(-min(batch_size, count) // shards) * shards
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
