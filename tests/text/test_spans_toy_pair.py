"""The alignment kernel end to end: two tokenizers trained here, byte ends from their pieces, the oracle beside it.

One tokenizer is byte-level BPE, the other BPE over characters with byte fallback, the marker for spaces and its phantom
prefix (as SentencePiece models have them). Nothing of distill_jax reads the pieces: that is what makes the pieces of a
span, joined, a check of the offsets themselves.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from distill_jax.text.spans import align_spans, span_logprobs
from tests.text.span_oracle import Side, expected_spans

TEXTS = [
    "naïve 12",
    "The quick brown fox jumps over the lazy dog; 3 × 14 = 42.",
    "数学の問題を解く。答えは 42 です。",
    "Слон и café, e\u0301tude — 1234567890",
    "emoji 🙂👍🏽 family 👨‍👩‍👧 flag 🇪🇺 done",
    "def f(x):\n\treturn  x ** 2  # squares, naïvely\n",
    "नमस्ते दुनिया, مرحبا بالعالم",
    "aaaaaaaa bbbb  aaaa",
]
SLOTS = max(len(text.encode()) for text in TEXTS) + 1


@pytest.fixture(scope="module")
def pair() -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """(byte-level with few merges, characters with byte fallback), trained on half of the texts."""
    corpus = TEXTS[:5] * 3
    byte_level = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    fallback = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=False))
    fallback.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    fallback.decoder = decoders.Metaspace()
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    fallback.train_from_iterator(
        corpus[:2],
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=byte_tokens, limit_alphabet=24, show_progress=False
        ),
    )
    return byte_level, fallback


# GPT-2's table: printable Latin-1 stands for itself, the other bytes for the characters from 256 on, in order.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}


def byte_level_pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[bytes]:
    return [bytes(BYTE_OF[char] for char in piece) for piece in tokenizer.encode(text).tokens]


def fallback_pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[bytes]:
    """The pieces' bytes; the phantom space of the first one is taken off."""
    pieces = []
    for piece in tokenizer.encode(text).tokens:
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        pieces.append(bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode())
    assert pieces[0].startswith(b" ")
    return [pieces[0][1:], *pieces[1:]]


def row(pieces: list[bytes], seed: int) -> Side:
    """A right-padded row with log-probabilities in eighths, so that sums are exact."""
    rest = SLOTS - len(pieces)
    lp = (-np.random.default_rng(seed).integers(0, 64, SLOTS) / 8).tolist()
    end = np.cumsum([len(piece) for piece in pieces]).tolist()
    present = [True] * len(pieces) + [False] * rest
    return Side(end + [0] * rest, present, [True] * SLOTS, lp)


def test_both_reproduce_the_text_and_fall_back_to_bytes(
    pair: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer],
) -> None:
    for text in TEXTS:
        assert b"".join(byte_level_pieces(pair[0], text)) == text.encode()
        assert b"".join(fallback_pieces(pair[1], text)) == text.encode()
    assert "<0xF0>" in pair[1].encode(TEXTS[4]).tokens


def test_spans_of_two_tokenizers_hold_the_same_bytes(
    pair: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer],
) -> None:
    pieces = [(byte_level_pieces(pair[0], text), fallback_pieces(pair[1], text)) for text in TEXTS]
    sides = [(row(t, 2 * n), row(s, 2 * n + 1)) for n, (t, s) in enumerate(pieces)]
    teachers, students = zip(*sides, strict=True)
    spans = align_spans(
        [t.end for t in teachers],
        [s.end for s in students],
        np.array([t.present for t in teachers]),
        np.array([s.present for s in students]),
    )
    logprob_t, logprob_s = span_logprobs(
        spans, np.array([t.lp for t in teachers], np.float32), np.array([s.lp for s in students], np.float32)
    )
    for n, (text, (teacher, student)) in enumerate(zip(TEXTS, sides, strict=True)):
        expected = expected_spans(teacher, student)
        assert spans.num_spans[n] == expected.num_spans >= 1
        np.testing.assert_array_equal(spans.valid[n], expected.valid)
        np.testing.assert_array_equal(spans.bytes[n], expected.bytes)
        np.testing.assert_array_equal(spans.id_t[n], expected.teacher.ids)
        np.testing.assert_array_equal(spans.id_s[n], expected.student.ids)
        np.testing.assert_array_equal(logprob_t[n], np.float32(expected.teacher.logprob))
        np.testing.assert_array_equal(logprob_s[n], np.float32(expected.student.logprob))
        assert np.asarray(spans.bytes[n])[np.asarray(spans.valid[n])].sum() == len(text.encode())
        for k in range(expected.num_spans):
            joined = [
                b"".join(piece for piece, span in zip(side, ids, strict=False) if span == k)
                for side, ids in zip(pieces[n], (spans.id_t[n].tolist(), spans.id_s[n].tolist()), strict=True)
            ]
            assert joined[0] == joined[1] and len(joined[0]) == spans.bytes[n, k]
    # Which merges are learned of equally frequent ones is left to chance, so a short text may be one token of one side.
    assert (np.asarray(spans.num_spans) > 1).any()
    counts = np.stack([spans.count_t, spans.count_s])[:, np.asarray(spans.valid)]
    assert (counts[0] != counts[1]).any() and (counts > 1).all(axis=0).any()  # they do cut differently
