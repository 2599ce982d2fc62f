"""Completions as another model sees them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from distill_jax.logprobs import token_logprobs
from distill_jax.rft.texts import encode_completions, encode_prompts, end_of_text_id, score_texts
from distill_jax.text.tokenizers import Tokenizer
from tests.rft.tiny_calibration import letter_tokenizer, make_model

BYTES = Tokenizer.bytes_tokenizer()
SIZES = {"prompt_sizes": (4, 8), "completion_sizes": (4, 6)}


def encode(texts, ended, tokenizer=BYTES):
    prompts = encode_prompts(tokenizer, ["ab"] * len(texts), "raw")
    return encode_completions(tokenizer, prompts, texts, ended, end_id=tokenizer.eos_id, **SIZES)


def test_end_of_sequence_is_a_token_and_one_byte_beyond_the_text():
    encoded = encode(["aé", "b"], [True, False])
    assert encoded.sequences.completion_length.tolist() == [4, 1]
    assert encoded.sequences.completion[0].tolist() == [0x61, 0xC3, 0xA9, 258]
    assert encoded.byte_ends[0].tolist() == [1, 2, 3, 4]
    assert encoded.byte_ends[1, 0] == 1
    assert encoded.usable.all()
    assert encoded.sequences.prompt_size == 4 and encoded.sequences.vocabulary_hash == BYTES.vocabulary_hash


def test_size_is_the_smallest_that_holds_the_rows_that_fit():
    encoded = encode(["abcd", "abcdefgh", "abcde"], [False, False, True])
    assert encoded.usable.tolist() == [True, False, True]
    assert encoded.does_not_fit.tolist() == [False, True, False]
    assert encoded.sequences.completion_size == 6
    assert encoded.sequences.completion_length.tolist() == [4, 0, 6]
    assert encode(["abcd"], [False]).sequences.completion_size == 4


def test_text_that_the_tokenizer_changes_is_not_usable():
    encoded = encode(["ab", "axb"], [True, True], letter_tokenizer())
    assert encoded.usable.tolist() == [True, False] and not encoded.does_not_fit.any()


def test_scores_are_those_of_each_text_alone():
    proxy = make_model("proxy")
    questions, texts, ended = ["ab", "c", "ab"], ["dd", "abca", ""], [True, False, True]
    scores = score_texts(proxy, questions, texts, ended, style="raw", batch_size=2, **SIZES)
    for row, (question, text, end) in enumerate(zip(questions, texts, ended, strict=True)):
        ids = [*question.encode(), *text.encode(), *([258] if end else [])]
        lp = token_logprobs(proxy, [ids], [len(ids)])[0, len(question) :]
        np.testing.assert_allclose(scores.lp[row], lp.sum(), rtol=1e-5)
        assert scores.tokens[row] == len(lp)
    assert scores.bytes.tolist() == [2, 4, 0] and scores.usable.all()


def test_no_texts_have_no_scores():
    scores = score_texts(make_model("proxy"), [], [], [], style="raw", **SIZES)
    assert scores.lp.shape == scores.usable.shape == (0,)


def test_end_of_a_turn_is_what_the_template_writes():
    template = "{% for m in messages %}<bos>{{ m['content'] }}<pad>{% endfor %}"
    settings = BYTES.settings.__class__(
        pad_id=256, bos_id=257, eos_id=258, eos_ids=(256,), chat_template=template
    )
    chat = Tokenizer(BYTES._encoder.backend, settings)
    assert end_of_text_id(chat, "chat") == end_of_text_id(chat, "auto") == 256
    assert end_of_text_id(chat, "raw") == 258
    assert end_of_text_id(BYTES, "auto") == 258
    # A template may name the end of something else first: of a call of a tool, where there is one.
    template = "{% if tools %}<pad>{% endif %}{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}"
    both = dataclasses.replace(settings, eos_ids=(256, 258), chat_template=template)
    assert end_of_text_id(Tokenizer(BYTES._encoder.backend, both), "chat") == 258


def test_bad_input():
    with pytest.raises(ValueError, match="prompt style must be one of"):
        encode_prompts(BYTES, ["a"], "bare")
    with pytest.raises(ValueError, match="takes no system text"):
        encode_prompts(BYTES, ["a"], "raw", "be brief")
    with pytest.raises(ValueError, match="one a row expected"):
        encode(["a", "b"], [True])
