"""Two models on one text: where they can be compared, and how likely each finds the text.

**One vocabulary.** Exact: every token of the completion, in both models.

**Two vocabularies.** The models have read the same bytes only at the borders of spans (`text.spans`). Distributions are
compared at the starts of spans (see `distributions`), likelihoods on spans, in nats; a text's length is its bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from distill_jax.logprobs import score_completions
from distill_jax.models.decoder import Decoder, Params
from distill_jax.probes.subjects import Encoded, Subject, encode, row_batches, rows_on_device, same_vocabulary
from distill_jax.probes.texts import Texts
from distill_jax.sequences import Sequences
from distill_jax.text.spans import Spans, align_spans, span_logprobs


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How a probe is computed.

    Attributes:
      batch_size: rows on the device at a time, rounded up to what the mesh divides.
      chunk: positions of a row whose logits exist at one time.
      unaligned_limit: largest share of texts that two tokenizers may fail to give back byte for byte.
      resamples, seed: of the bootstrap.

    Raises:
      ValueError: a number outside its range.
    """

    batch_size: int = 16
    chunk: int = 16
    unaligned_limit: float = 0.01
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.unaligned_limit < 1.0:
            raise ValueError(f"unaligned_limit is a share in [0, 1), got {self.unaligned_limit}")


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """encoded: of teacher and student. spans: None in one vocabulary. slots: i32[N, S] a side; valid: bool[N, S],
    compared positions; excluded: bool[N], texts left out."""

    encoded: tuple[Encoded, Encoded]
    spans: Spans | None
    slots: tuple[np.ndarray, np.ndarray]
    valid: np.ndarray
    excluded: np.ndarray


def encode_pair(teacher: Subject, student: Subject, texts: Texts, config: ProbeConfig) -> EncodedPair:
    """Both models' tokens of the texts, and the slots at which they can be compared.

    Raises:
      ValueError: models on different meshes; more than `unaligned_limit` of the texts are not given back byte for
        byte; or what `encode` raises.
    """
    if teacher.model.mesh != student.model.mesh:
        raise ValueError(
            "teacher and student lie on different meshes; load both with load_model(..., mesh=mesh) on one mesh"
        )
    one = encode(teacher, texts, "the teacher"), encode(student, texts, "the student")
    lengths = [np.asarray(side.sequences.completion_length) for side in one]
    present = [
        np.arange(side.ends.shape[1])[None, :] < length[:, None]
        for side, length in zip(one, lengths, strict=True)
    ]
    if same_vocabulary(teacher, student):
        # The student's rows are the same ids behind its own prompt.
        slots = np.broadcast_to(np.arange(one[0].ends.shape[1], dtype=np.int32)[None, :], one[0].ends.shape)
        return EncodedPair(one, None, (slots, slots), present[0], np.zeros(len(texts), bool))
    usable = one[0].faithful & one[1].faithful
    changed = np.flatnonzero(~usable)
    if len(changed) > config.unaligned_limit * len(texts):
        row = int(changed[0])
        who = teacher if not one[0].faithful[row] else student
        raise ValueError(
            f"{len(changed)} of {len(texts)} texts (the limit is {config.unaligned_limit:.1%}) cannot be aligned: "
            f"their tokens do not give the text back byte for byte. The first is row {row}, "
            f"{texts.completions[row][:40]!r}, in {who.tokenizer!r}. Leave such texts out, or raise unaligned_limit"
        )
    spans = align_spans(one[0].ends, one[1].ends, *(mask & usable[:, None] for mask in present))
    spans = jax.tree.map(np.asarray, spans)
    return EncodedPair(one, spans, (spans.start_t, spans.start_s), spans.valid, ~usable)


@dataclasses.dataclass(frozen=True)
class Scores:
    """lp, entropy: f64[N, T] of each token, nats, 0 in padding."""

    lp: np.ndarray
    entropy: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
    module: Decoder, chunk: int, params: Params, adapter: Params | None, scale: Any, sequences: Sequences
) -> tuple[jax.Array, jax.Array]:
    scores = score_completions(module, params, sequences, adapter=adapter, scale=scale, chunk=chunk)
    return scores.lp, scores.entropy


def score(subject: Subject, encoded: Encoded, config: ProbeConfig) -> Scores:
    """One model's log-probability of every token, and the entropy of the distribution that it was in."""
    model, count = subject.model, len(encoded.ends)
    parts = [
        jax.device_get(
            _scores(
                model.module,
                config.chunk,
                model.params,
                subject.adapter,
                subject.multiplier,
                rows_on_device(encoded.sequences, rows, subject),
            )
        )
        for rows in row_batches(count, config.batch_size, subject)
    ]
    lp, entropy = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return Scores(lp, entropy)


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """What two models give to the same texts; spans are single tokens where the vocabulary is one.

    Attributes:
      row: i64[M], text of each span. begin, end: i64[M], its bytes in the completion; an end of sequence lies one
        byte beyond the text.
      lp_t, lp_s: f64[M], log-probability of each span, nats.
      excluded: bool[N], texts that the tokenizers do not give back.
    """

    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    lp_t: np.ndarray
    lp_s: np.ndarray
    excluded: np.ndarray


def likelihoods(teacher: Subject, student: Subject, texts: Texts, config: ProbeConfig) -> Likelihoods:
    """Scores every span of texts with both models.

    Raises:
      ValueError: see `encode_pair`.
    """
    pair = encode_pair(teacher, student, texts, config)
    lp_t, lp_s = (
        score(subject, encoded, config).lp
        for subject, encoded in zip((teacher, student), pair.encoded, strict=True)
    )
    row, slot = np.nonzero(pair.valid)
    if pair.spans is None:
        ends = pair.encoded[0].ends
        begins = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
    else:
        lp_t, lp_s = (np.asarray(x) for x in span_logprobs(pair.spans, lp_t, lp_s))
        ends = np.cumsum(np.asarray(pair.spans.bytes), axis=1)
        begins = ends - np.asarray(pair.spans.bytes)
    begin, end = (x[row, slot].astype(np.int64) for x in (begins, ends))
    of_teacher, of_student = (x[row, slot].astype(np.float64) for x in (lp_t, lp_s))
    return Likelihoods(row, begin, end, of_teacher, of_student, pair.excluded)


def excluded_note(excluded: np.ndarray, what: str) -> tuple[str, ...]:
    """A note about texts that were left out, if any were."""
    if not excluded.any():
        return ()
    count = f"{int(excluded.sum())} of {len(excluded)} {what}"
    return (f"{count} were left out: the tokenizers do not give them back byte for byte",)
