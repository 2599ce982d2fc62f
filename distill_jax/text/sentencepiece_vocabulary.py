"""SentencePiece vocabularies as `tokenizers` tokenizers: from a `.model` file, or from pieces and scores (GGUF)."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2  # made by protoc: its names are there at run time only
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from distill_jax.text.byte_tables import SPACE_MARKER
from distill_jax.text.token_ids import TokenizerSettings


class PieceType(enum.IntEnum):
    """SentencePiece's types of pieces; GGUF's `token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def merges_from_scores(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies, best first.

    SentencePiece joins, again and again, the neighbours whose joined piece has the highest score. As a list of merges
    that is every cut of every piece into two pieces, by descending score of the whole. User-defined pieces come first:
    SentencePiece takes them whole before it merges anything. Control, unknown, unused and byte pieces take no part, so
    no text can be merged into one.

    Args:
      pieces, scores, types: of every id; types as in `PieceType`.

    Returns:
      Pairs (left, right). Cuts of one piece: the longest left side first.
    """
    textual = {
        piece
        for piece, kind in zip(pieces, types, strict=True)
        if kind in (PieceType.NORMAL, PieceType.USER_DEFINED)
    }
    order = sorted(
        (index for index, piece in enumerate(pieces) if len(piece) > 1 and piece in textual),
        key=lambda index: (types[index] != PieceType.USER_DEFINED, -scores[index]),
    )
    merges = []
    for index in order:
        piece = pieces[index]
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in textual:
                right = piece[cut:]
                if right in textual:
                    merges.append((left, right))
    return merges


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unknown_id: int | None,
    prefix_space: bool,
    where: object,
) -> tokenizers.Tokenizer:
    """A SentencePiece BPE vocabulary as a `tokenizers` tokenizer.

    Args:
      pieces: every piece, spaces as `▁`; the index is the id.
      scores, types: of every piece; types as in `PieceType`.
      unknown_id: id of the unknown piece, if there is one.
      prefix_space: whether a space is put before every text (`add_dummy_prefix`).
      where: the file, for messages.

    Raises:
      ValueError: lists of different lengths, or a piece that occurs twice.
    """
    if not len(pieces) == len(scores) == len(types):
        raise ValueError(
            f"{where} has {len(pieces)} token pieces, {len(scores)} scores and {len(types)} token types; expected as "
            "many of each"
        )
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        twice = next(piece for index, piece in enumerate(pieces) if vocabulary[piece] != index)
        raise ValueError(f"{where} has the token piece {twice!r} more than once")
    byte_fallback = any(kind == PieceType.BYTE for kind in types)
    model = models.BPE(
        vocab=vocabulary,
        merges=merges_from_scores(pieces, scores, types),
        unk_token=None if unknown_id is None else pieces[unknown_id],
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    backend = tokenizers.Tokenizer(model)
    prefix: list = [normalizers.Prepend(SPACE_MARKER)] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE_MARKER)])
    steps: list = [decoders.Replace(SPACE_MARKER, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    special = (PieceType.CONTROL, PieceType.UNKNOWN)
    backend.add_tokens(
        [
            AddedToken(piece, special=kind in special, normalized=False)
            for piece, kind in zip(pieces, types, strict=True)
            # SentencePiece looks for pieces once spaces are ▁: one that is stored with a space is never found.
            if kind in special or (kind == PieceType.USER_DEFINED and " " not in piece)
        ]
    )
    return backend


def read_sentencepiece(path: Path, add_bos: bool) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """Reads a `.model` file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: malformed, a model type other than BPE, a normalizer that rewrites characters, or spaces at the
        ends of pieces.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no SentencePiece model at {path}")
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is truncated, or not a SentencePiece model ({error})") from error
    if not proto.pieces:
        raise ValueError(f"{path} is not a SentencePiece model: it has no pieces")
    trainer = proto.trainer_spec
    normalizer = proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(f"{path} writes spaces at the ends of pieces, or unescaped; expected ▁ in front")
    if normalizer.precompiled_charsmap:
        raise ValueError(
            f"{path} rewrites characters ({normalizer.name or 'a rule of its own'}), so texts do not come back "
            "byte for byte; expected the normalization rule 'identity'"
        )
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type)
        raise ValueError(
            f"{path} is a SentencePiece model of type {kind}; expected BPE. Convert it to a tokenizer.json with "
            "transformers, and read that"
        )
    pieces = [piece.piece for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    prefix_space = normalizer.add_dummy_prefix
    backend = sentencepiece_bpe(
        pieces,
        [piece.score for piece in proto.pieces],
        types,
        unknown_id=next((index for index, kind in enumerate(types) if kind == PieceType.UNKNOWN), None),
        prefix_space=prefix_space,
        where=path,
    )
    if normalizer.remove_extra_whitespaces:
        ends, runs = Regex(r"\A +| +\z"), Regex(" {2,}")
        trims = [normalizers.Replace(ends, ""), normalizers.Replace(runs, " ")]
        backend.normalizer = normalizers.Sequence([*trims, backend.normalizer])

    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    bos_id = vocabulary.get(trainer.bos_piece) if trainer.bos_id >= 0 else None
    eos_id = vocabulary.get(trainer.eos_piece) if trainer.eos_id >= 0 else None
    pad_id = vocabulary.get(trainer.pad_piece) if trainer.pad_id >= 0 else None
    settings = TokenizerSettings(
        bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, add_bos=add_bos and bos_id is not None
    )
    return backend, settings
