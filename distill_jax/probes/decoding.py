"""Does the student's local decoding break: repetition, loops, answers without an end?

Of the student's texts and, as a standard, of the teacher's to the same questions, both counted in the student's tokens:

    repeated    4-grams of tokens that stood in the text before (rep-4, arXiv 1908.04319)
    loops       texts with a stretch of an exact period p <= 32: x[i] = x[i-p] for at least 3 further periods, and the
                whole stretch 12 tokens or longer
    surprises   spans to which the teacher gives less than exp(-10): what no reader would write next
    no_end      texts that were not closed (`ended` is False); truncated: those that reached the limit of tokens
    unparsable  texts that no answer could be read out of

each per 1000 tokens and as a share of texts, and two measures of variety: distinct-2 (distinct token pairs / pairs,
arXiv 1510.03055) and the compression ratio (bytes / bytes after zlib; higher is more repetitive).

Source: the symptom, *Distillation Traps and Guards*, arXiv 2604.18963, section 6.5; the measures as cited.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping

import numpy as np

from distill_jax.models.model import Model
from distill_jax.probes.pairs import ProbeConfig, excluded_note, likelihoods
from distill_jax.probes.subjects import Subject, as_subject
from distill_jax.probes.texts import TextPair, Texts, prompt_index
from distill_jax.probes.values import Bootstrap, Value, sum_by

RATE = (0.0, 1.0)
LONGEST_PERIOD, FURTHER_PERIODS, SHORTEST_LOOP = 32, 3, 12
SURPRISE_NATS = 10.0


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What `measure` found, keyed by event: "repeated", "loops", "surprises", "no_end", and where it is known
    "truncated" and "unparsable".

    Attributes:
      per_1k: events per 1000 tokens of the student's texts.
      per_response: share of the student's texts with at least one.
      excess: per_response of the student's texts minus that of the teacher's, paired by prompt.
      distinct_2, compression: "student", "teacher".
      notes: what could not be measured.
    """

    per_1k: Mapping[str, Value]
    per_response: Mapping[str, Value]
    excess: Mapping[str, Value]
    distinct_2: Mapping[str, Value]
    compression: Mapping[str, Value]
    notes: tuple[str, ...] = ()


def measure(
    teacher: Model | Subject,
    student: Model | Subject,
    batch: TextPair,
    *,
    config: ProbeConfig | None = None,
    limit: int | None = None,
) -> Decoding:
    """Measures the student's decoding against the teacher's.

    Args:
      teacher: is surprised, or not.
      student: gives the tokens in which everything is counted.
      batch: both models' answers to the same questions; `answers` tells what is unparsable.
      config: see `ProbeConfig`.
      limit: the most tokens that the student was allowed; tells truncated texts from those that just lack an end.

    Raises:
      ValueError: what `pairs.encode_pair` raises.
    """
    teacher, student, config = as_subject(teacher), as_subject(student), config or ProbeConfig()
    indices, prompts = prompt_index(batch.teacher, batch.student)
    bootstrap = Bootstrap(prompts, config.resamples, config.seed)
    notes: list[str] = []
    events: dict[str, dict[str, np.ndarray]] = {}
    tokens: dict[str, np.ndarray] = {}
    distinct, compression = {}, {}
    for name, index in zip(("teacher", "student"), indices, strict=True):
        texts = getattr(batch, name)
        ids = [np.array(row, np.int64) for row in _student_ids(student, texts)]
        tokens[name] = np.array([len(row) for row in ids])
        spans = likelihoods(teacher, student, texts, config)
        notes += excluded_note(spans.excluded, f"of the {name}'s texts")
        surprising = (spans.lp_t < -SURPRISE_NATS).astype(np.float64)
        events[name] = {
            "repeated": np.array([repeated_ngrams(row) for row in ids]),
            "loops": np.array([float(in_loop(row)) for row in ids]),
            "surprises": sum_by(spans.row, surprising, len(texts)),
            "no_end": (~texts.ended).astype(np.float64),
        }
        if limit is not None and name == "student":
            events[name]["truncated"] = (~texts.ended & (tokens[name] >= limit)).astype(np.float64)
        if texts.answers is not None:
            events[name]["unparsable"] = np.array([float(answer is None) for answer in texts.answers])
        varied, pairs = np.array([_distinct(row, 2) for row in ids]).T
        distinct[name] = bootstrap.ratio(sum_by(index, varied, prompts), sum_by(index, pairs, prompts))
        # Empty texts compress to eight bytes of header: they would count as the most varied.
        plain = texts.bytes
        packed = np.array([len(zlib.compress(text.encode(), 9)) if text else 0 for text in texts.completions])
        compression[name] = bootstrap.ratio(sum_by(index, plain, prompts), sum_by(index, packed, prompts))
    if not tokens["student"].any():
        notes.append("all of the student's texts are empty: there are no tokens to count by")
    if batch.student.answers is None:
        notes.append("unparsable answers are not counted: the student's texts carry no answers")
    index_t, index_s = indices
    rows_t, rows_s = (sum_by(index, np.ones(len(index)), prompts) for index in indices)
    shares = {event: sum_by(index_s, count > 0, prompts) for event, count in events["student"].items()}
    standards = {event: sum_by(index_t, count > 0, prompts) for event, count in events["teacher"].items()}
    return Decoding(
        per_1k={
            event: bootstrap.ratio(
                sum_by(index_s, 1000.0 * count, prompts), sum_by(index_s, tokens["student"], prompts)
            )
            for event, count in events["student"].items()
        },
        per_response={event: bootstrap.ratio(share, rows_s, RATE) for event, share in shares.items()},
        excess={
            event: bootstrap.difference((share, rows_s), (standards[event], rows_t), (-1.0, 1.0))
            for event, share in shares.items()
            if event in standards
        },
        distinct_2=distinct,
        compression=compression,
        notes=tuple(notes),
    )


def _student_ids(student: Subject, texts: Texts) -> list[list[int]]:
    """The student's tokens of each text, without an end of sequence: as sampled where they were."""
    tokenizer = student.tokenizer
    if texts.ids is not None and {ids.vocabulary_hash for ids in texts.ids} == {tokenizer.vocabulary_hash}:
        return [list(ids[:-1] if end else ids) for ids, end in zip(texts.ids, texts.ended, strict=True)]
    return [list(ids) for ids in tokenizer.encode_batch(texts.completions, continuation=True)]


def _distinct(ids: np.ndarray, n: int) -> tuple[int, int]:
    """(distinct n-grams, n-grams) of ids i64[T]."""
    count = max(len(ids) - n + 1, 0)
    return len({tuple(ids[i : i + n].tolist()) for i in range(count)}), count


def repeated_ngrams(ids: np.ndarray, n: int = 4) -> int:
    """How many n-grams of ids i64[T] stood in them before."""
    distinct, count = _distinct(ids, n)
    return count - distinct


def in_loop(ids: np.ndarray) -> bool:
    """Whether ids i64[T] hold a stretch of an exact period; see the head of this file."""
    for period in range(1, min(LONGEST_PERIOD, len(ids) // (FURTHER_PERIODS + 1)) + 1):
        same = ids[period:] == ids[:-period]
        # Lengths of runs of True: distances between the places where there is none.
        breaks = np.concatenate([[-1], np.flatnonzero(~same), [len(same)]])
        run = int(np.diff(breaks).max()) - 1
        if run >= max(FURTHER_PERIODS * period, SHORTEST_LOOP - period):
            return True
    return False
