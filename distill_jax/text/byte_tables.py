"""The byte table of a vocabulary: which bytes of text each token id stands for.

Two tokenizers meet on bytes, so the table has to be exact: a token that holds part of a multi-byte character has
exactly those bytes, a byte-fallback piece `<0xE6>` is one byte, the marker `▁` is a space, and a special token is no
text at all (zero bytes).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

SPACE_MARKER = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: character -> byte.

    The printable characters of Latin-1 stand for themselves; the other 68 bytes take the characters from U+0100 on,
    in order (Radford et al. 2019, the released `encoder.py` defines it).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


def component_states(component: Any) -> Iterator[dict]:
    """The JSON states of a normalizer, pre-tokenizer, decoder or post-processor, those inside a sequence one by one."""
    if component is None:
        return
    pending = [json.loads(component.__getstate__())]
    while pending:
        state = pending.pop(0)
        inner = next(
            (state[key] for key in ("normalizers", "pretokenizers", "decoders") if key in state), None
        )
        if inner is None:
            yield state
        else:
            pending = list(inner) + pending


def vocabulary_kind(backend: tokenizers.Tokenizer, where: object) -> str:
    """How the pieces of a `tokenizers` tokenizer spell bytes.

    Returns:
      "bytes" (256 single bytes and specials), "byte_level" (GPT-2's alphabet) or "sentencepiece" (`▁` is a space).

    Raises:
      ValueError: another kind, whose pieces do not carry their spaces (WordPiece, end-of-word suffixes).
    """
    decoders = {state["type"] for state in component_states(backend.decoder)}
    if "ByteLevel" in decoders:
        return "bytes" if backend.get_vocab_size(with_added_tokens=False) == 256 else "byte_level"
    marker = any(
        state["type"] == "Metaspace" or state.get("pattern") == {"String": SPACE_MARKER}
        for state in component_states(backend.decoder)
    )
    if marker:
        return "sentencepiece"
    raise ValueError(
        f"the tokenizer of {where} has the decoder {sorted(decoders) or None}; expected byte-level BPE (decoder "
        "ByteLevel) or SentencePiece pieces (decoder Metaspace, or Replace of ▁ by a space), because token pieces "
        "that do not carry their spaces (WordPiece) have no exact byte ends"
    )


def piece_bytes(backend: tokenizers.Tokenizer, kind: str, special_ids: frozenset[int]) -> list[bytes]:
    """The bytes of every id: b"" for special tokens and for ids that no token has.

    Args:
      backend: the tokenizer.
      kind: what `vocabulary_kind` said.
      special_ids: ids that are not text.

    Raises:
      ValueError: a byte-level piece uses a character outside the byte alphabet.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    added = backend.get_added_tokens_decoder()
    if kind == "sentencepiece":
        byte_fallback = any(state["type"] == "ByteFallback" for state in component_states(backend.decoder))
        for piece, index in vocabulary.items():
            match = _BYTE_PIECE.fullmatch(piece) if byte_fallback else None
            table[index] = bytes.fromhex(match[1]) if match else piece.replace(SPACE_MARKER, " ").encode()
    else:
        alphabet = byte_level_alphabet()
        for piece, index in vocabulary.items():
            if index in added:
                table[index] = (
                    piece.encode()
                )  # added tokens are written as they are, not in the byte alphabet
                continue
            try:
                table[index] = bytes([alphabet[character] for character in piece])
            except KeyError as error:
                raise ValueError(
                    f"token {index}, {piece!r}, has the character {error.args[0]!r}, which is not in the byte-level "
                    "alphabet; the vocabulary is malformed, or it is not a byte-level one"
                ) from None
    for index in special_ids:
        table[index] = b""
    return table


def hash_vocabulary(kind: str, table: list[bytes], special_ids: frozenset[int]) -> str:
    """sha256 (hex) over the kind, the bytes of every id, and which ids are special.

    Equal hashes mean that an id is the same text in both; how text is cut into ids is not part of it.
    """
    digest = hashlib.sha256()
    digest.update(f"distill_jax vocabulary 1\n{kind}\n{len(table)}\n".encode())
    digest.update(np.array([len(piece) for piece in table], "<u4").tobytes())
    digest.update(b"".join(table))
    digest.update(np.array(sorted(special_ids), "<u4").tobytes())
    return digest.hexdigest()
