"""Texts as a model sees them: its own prompt, its own tokens, its own byte ends; and the scores it gives them.

The same completion has to be put before several models. Each gets the question in its own prompt style, and
the text encoded by its own tokenizer, as a continuation of that prompt. What the models share is the text
itself, so byte ends are counted from its first byte. A completion that ended has one more unit, the end of
sequence: another id for each model, but the same event, so it stands for one sentinel byte after the text on
every side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from distill_jax.logprobs import score_completions
from distill_jax.mesh import place_batch
from distill_jax.models.decoder import Decoder, Params
from distill_jax.models.model import Model
from distill_jax.rft.micro_batches import map_rows
from distill_jax.sequences import Sequences, pack_sequences
from distill_jax.tasks.base import Problem
from distill_jax.text.chat import render_answered, render_prompt
from distill_jax.text.token_ids import TokenIds
from distill_jax.text.tokenizers import Tokenizer

PROMPT_STYLES = ("raw", "auto", "plain", "chat")
_SENTINEL = "SENTINEL"  # an answer that no template holds


@dataclasses.dataclass(frozen=True)
class EncodedTexts:
    """Completions in one vocabulary, ready to be scored and aligned.

    Attributes:
      sequences: prompts and completions; a row that is not `usable` holds an empty completion.
      byte_ends: i32[B, T], bytes of the text up to and including each token; the end of sequence adds one.
      usable: bool[B], the ids give the text back byte for byte, and fit.
      does_not_fit: bool[B], not usable because prompt or completion is longer than the largest size.
    """

    sequences: Sequences
    byte_ends: np.ndarray
    usable: np.ndarray
    does_not_fit: np.ndarray


def encode_prompts(
    tokenizer: Tokenizer, questions: Sequence[str], style: str = "auto", system: str | None = None
) -> list[TokenIds]:
    """The prompt of each question in this model's style.

    Args:
      tokenizer: the model's.
      questions: `Problem.prompt` of each row.
      style: "raw" (the question is the prompt, for base models that were trained on it), or a style of
        `render_prompt`.
      system: text before the question; not with "raw".

    Raises:
      ValueError: an unknown style, a system text with "raw", or what `render_prompt` raises.
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"prompt style must be one of {PROMPT_STYLES}, got {style!r}")
    if style != "raw":
        rendered = [render_prompt(tokenizer, question, style, system) for question in questions]
    elif system is None:
        rendered = list(questions)
    else:
        raise ValueError("the prompt style 'raw' is the question alone and takes no system text")
    return [tokenizer.encode_prompt(text) for text in rendered]


def pick_size(longest: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `longest`, else the largest; few sizes mean few compilations."""
    return next((size for size in sorted(sizes) if size >= longest), max(sizes))


def end_of_text_id(tokenizer: Tokenizer, style: str) -> int:
    """What this model ends an answer with: in a chat the id that its template writes after an answer, else the end
    of sequence.

    Raises:
      ValueError: the tokenizer has no end of sequence, or a template that fails.
    """
    if not tokenizer.eos_ids:
        raise ValueError(f"{tokenizer!r} has no end-of-sequence token, so it cannot score the end of a text")
    if style in ("auto", "chat") and tokenizer.chat_template:
        # Not what the template's source names: it may name ends of other turns, of a call of a tool for one.
        after = render_answered(tokenizer, "?", _SENTINEL).rpartition(_SENTINEL)[2]
        names = {index: tokenizer.id_to_token(index) for index in tokenizer.eos_ids}
        places = {index: after.find(name) for index, name in names.items() if name and name in after}
        if places:
            return min(places, key=lambda index: places[index])
    return tokenizer.eos_ids[0] if tokenizer.eos_id is None else tokenizer.eos_id


def check_prompt_lengths(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    style: str,
    system: str | None,
    sizes: Sequence[int],
    setting: str,
) -> None:
    """Raises ValueError when the prompt of a problem is longer than the largest of `sizes`.

    Args:
      style, system: see `encode_prompts`.
      sizes: slots of prompts; setting: what they are called where the user sets them.
    """
    questions = [problem.prompt for problem in problems]
    lengths = [len(prompt) for prompt in encode_prompts(tokenizer, questions, style, system)]
    longest = max(lengths, default=0)
    if longest > max(sizes):
        over = sum(length > max(sizes) for length in lengths)
        raise ValueError(
            f"{over} of {len(lengths)} prompts are longer than the largest of {setting}={tuple(sizes)}, the longest "
            f"has {longest} tokens: {questions[lengths.index(longest)][:80]!r}...; give a larger size, or leave long "
            "questions out (the option max_prompt_bytes of tasks that read data sets)"
        )


def encode_completions(
    tokenizer: Tokenizer,
    prompts: Sequence[TokenIds],
    texts: Sequence[str],
    ended: Sequence[bool] | np.ndarray,
    *,
    end_id: int,
    prompt_sizes: Sequence[int],
    completion_sizes: Sequence[int],
) -> EncodedTexts:
    """Encodes the *text* of completions for a model that may not have written them.

    Args:
      tokenizer: of the model that shall score them.
      prompts: its prompts, one a row.
      texts: completions.
      ended: bool[B], rows that end in an end of sequence.
      end_id: that model's id for it (`end_of_text_id`).
      prompt_sizes, completion_sizes: slots to choose from; the smallest that holds every row that fits the
        largest.

    Raises:
      ValueError: different numbers of rows.
    """
    if not len(prompts) == len(texts) == len(ended):
        raise ValueError(
            f"got {len(prompts)} prompts, {len(texts)} texts and {len(ended)} ends, one a row expected"
        )
    ids = tokenizer.encode_batch(texts, continuation=True)
    same = np.array(
        [tokenizer.token_bytes(row, True) == text.encode() for row, text in zip(ids, texts, strict=True)],
        bool,
    )
    lengths = np.array([len(row) + bool(end) for row, end in zip(ids, ended, strict=True)])
    prompt_lengths = np.array([len(prompt) for prompt in prompts])
    fits = (lengths <= max(completion_sizes)) & (prompt_lengths <= max(prompt_sizes)) & (prompt_lengths > 0)
    usable = same & fits
    prompt_size = pick_size(max(prompt_lengths[usable], default=1), prompt_sizes)
    size = pick_size(max(lengths[usable], default=1), completion_sizes)
    completions, kept_prompts = [], []
    byte_ends = np.zeros((len(texts), size), np.int32)
    for row, (row_ids, end) in enumerate(zip(ids, ended, strict=True)):
        completion: list[int] = []
        if usable[row]:
            ends = tokenizer.byte_ends(row_ids, continuation=True)
            byte_ends[row, : len(ends)] = ends
            completion = list(row_ids)
            if end:
                byte_ends[row, len(ends)] = len(texts[row].encode()) + 1
                completion.append(end_id)
        completions.append(TokenIds(completion, tokenizer.vocabulary_hash))
        kept_prompts.append(prompts[row] if usable[row] else TokenIds([end_id], tokenizer.vocabulary_hash))
    sequences = pack_sequences(kept_prompts, completions, prompt_size, size, tokenizer.pad_id)
    return EncodedTexts(sequences, byte_ends, usable, ~fits)


@functools.partial(jax.jit, static_argnames=("module", "chunk", "pieces"))
def plain_scores(
    module: Decoder,
    params: Params,
    sequences: Sequences,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    chunk: int = 64,
    pieces: int = 1,
) -> jax.Array:
    """f32[B, T]: log p of completion tokens under the model's own softmax; compiled once for each shape.

    `pieces` of the rows go through the model one after the other, see `micro_batches.map_rows`.
    """

    def score(rows: Sequences) -> jax.Array:
        return score_completions(module, params, rows, adapter=adapter, scale=scale, chunk=chunk).lp

    return map_rows(score, sequences, pieces, module.mesh)


@dataclasses.dataclass(frozen=True)
class TextScores:
    """How likely a model finds texts.

    Attributes:
      lp: f32[N], log-probability of each text in nats, its end of sequence included where it ended; 0 where
        not usable.
      tokens: i32[N], tokens that were scored.
      bytes: i32[N], bytes of the text.
      usable: bool[N]; the others must be masked.
    """

    lp: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    usable: np.ndarray


def score_texts(
    model: Model,
    questions: Sequence[str],
    texts: Sequence[str],
    ended: Sequence[bool] | np.ndarray,
    *,
    prompt_sizes: Sequence[int],
    completion_sizes: Sequence[int],
    batch_size: int = 64,
    style: str = "auto",
    system: str | None = None,
    adapter: Params | None = None,
    scale: float = 1.0,
    chunk: int = 64,
) -> TextScores:
    """Scores any texts with any model, in batches of one size.

    Args:
      model: with its tokenizer.
      questions, texts, ended: one a row; the question is put into the model's own prompt style.
      prompt_sizes, completion_sizes: see `encode_completions`.
      batch_size: rows on the device at a time; the last batch is filled up, so that nothing is compiled for
        it.
      style, system: see `encode_prompts`.
      adapter, scale: see `models.decoder.apply`.

    Raises:
      ValueError: no tokenizer, or what encoding raises.
    """
    tokenizer = require_tokenizer(model, "the model")
    end_id = end_of_text_id(tokenizer, style)
    prompts = encode_prompts(tokenizer, questions, style, system)
    parts = []
    for start in range(0, len(texts), batch_size):
        rows = [min(row, len(texts) - 1) for row in range(start, start + batch_size)]
        encoded = encode_completions(
            tokenizer,
            [prompts[row] for row in rows],
            [texts[row] for row in rows],
            [ended[row] for row in rows],
            end_id=end_id,
            prompt_sizes=prompt_sizes,
            completion_sizes=completion_sizes,
        )
        lp = plain_scores(model.module, model.params, put(encoded.sequences, model), adapter, scale, chunk)
        parts.append((lp.sum(axis=1), encoded.sequences.completion_length, encoded.usable))
    sums, tokens, usable = (
        np.concatenate([np.asarray(part[i]) for part in parts])[: len(texts)] if parts else np.zeros(0)
        for i in range(3)
    )
    return TextScores(
        sums, tokens, np.array([len(text.encode()) for text in texts], np.int32), usable.astype(bool)
    )


def put(tree: Sequences, model: Model) -> Sequences:
    """Host rows on the model's mesh."""
    return tree if model.mesh is None else place_batch(tree, model.mesh)


def require_tokenizer(model: Model, role: str) -> Tokenizer:
    """The model's tokenizer. Raises ValueError when it came without one."""
    if model.tokenizer is None:
        raise ValueError(f"{role} has no tokenizer; load it with load_model(..., tokenizer=...)")
    return model.tokenizer
