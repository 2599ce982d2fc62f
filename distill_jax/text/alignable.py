"""Whether two tokenizers can meet on bytes: both have to give a text back byte for byte."""

from __future__ import annotations

from collections.abc import Sequence

from distill_jax.text.tokenizers import Tokenizer


def alignable(
    tokenizer_t: Tokenizer, tokenizer_s: Tokenizer, texts: Sequence[str], continuation: bool = False
) -> float:
    """Rate of texts that both tokenizers reproduce byte for byte.

    rate = mean over texts of [bytes_t(ids_t(text)) = utf8(text) = bytes_s(ids_s(text))].

    Args:
      tokenizer_t, tokenizer_s: teacher and student, in any order.
      texts: what is going to be aligned: rollouts, or a sample of the task's texts.
      continuation: the texts go on behind prompts (see `Tokenizer.encode`).

    Returns:
      The rate in [0, 1].

    Raises:
      ValueError: no texts.
    """
    return 1.0 - len(_changed(tokenizer_t, tokenizer_s, texts, continuation)) / len(texts)


def check_alignable(
    tokenizer_t: Tokenizer,
    tokenizer_s: Tokenizer,
    texts: Sequence[str],
    limit: float = 0.01,
    continuation: bool = False,
) -> float:
    """`alignable`, refusing a pair of tokenizers that change more than `limit` of the texts.

    Args:
      tokenizer_t, tokenizer_s, texts, continuation: as in `alignable`.
      limit: the largest share of texts that may be left out of the alignment.

    Returns:
      The rate of texts that can be aligned.

    Raises:
      ValueError: no texts; or more than `limit` cannot be aligned, with the first of them and the place in it.
    """
    changed = _changed(tokenizer_t, tokenizer_s, texts, continuation)
    rate = len(changed) / len(texts)
    if rate > limit:
        at, tokenizer = changed[0]
        expected = texts[at].encode()
        got = tokenizer.token_bytes(tokenizer.encode(texts[at], continuation), continuation)
        pairs = enumerate(zip(expected, got, strict=False))
        byte = next((place for place, (a, b) in pairs if a != b), min(len(expected), len(got)))
        raise ValueError(
            f"the tokenizers cannot be aligned: {len(changed)} of {len(texts)} texts ({rate:.1%}, the limit is "
            f"{limit:.1%}) are not given back byte for byte. The first is text {at}, which {tokenizer!r} changes at "
            f"byte {byte}: expected {expected[byte : byte + 24]!r}, got {got[byte : byte + 24]!r}, behind "
            f"{expected[max(0, byte - 24) : byte]!r}. Normalise the texts beforehand, or take another tokenizer"
        )
    return 1.0 - rate


def _changed(
    tokenizer_t: Tokenizer, tokenizer_s: Tokenizer, texts: Sequence[str], continuation: bool
) -> list[tuple[int, Tokenizer]]:
    """(index, tokenizer) of every text that a tokenizer changes; the first of the two that does."""
    if not len(texts):
        raise ValueError("no texts to check; give a sample of those that are going to be aligned")
    changed: dict[int, Tokenizer] = {}
    for tokenizer in (tokenizer_t, tokenizer_s):
        for index, ids in enumerate(tokenizer.encode_batch(texts, continuation)):
            if tokenizer.token_bytes(ids, continuation) != texts[index].encode():
                changed.setdefault(index, tokenizer)
    return sorted(changed.items(), key=lambda item: item[0])
