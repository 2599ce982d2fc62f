"""The tokenizer of a GGUF file: its `tokenizer.*` fields as a `tokenizers` tokenizer."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from distill_jax.text.byte_tables import SPACE_MARKER, byte_level_alphabet
from distill_jax.text.gguf_reader import FastGGUFReader, gguf_value, open_gguf
from distill_jax.text.sentencepiece_vocabulary import PieceType, sentencepiece_bpe
from distill_jax.text.token_ids import TokenizerSettings

# How the published tokenizers cut text into words before merging; part of the vocabulary like the merges themselves.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("gpt-2", "gpt2", "default")
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_WORDS = {
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "tekken": _TEKKEN_WORDS,
}
# Vocabularies that take a whole word that is a token as that token, whether merges lead to it or not.
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")


def read_gguf_vocabulary(path: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """Reads the tokenizer of a GGUF file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is truncated or malformed, or its vocabulary is of a kind that is not supported.
    """
    reader = open_gguf(path)
    model = gguf_value(reader, "tokenizer.ggml.model", str, path)
    pieces = gguf_value(reader, "tokenizer.ggml.tokens", str, path)
    if model is None or not isinstance(pieces, list) or not pieces:
        raise ValueError(
            f"{path} has no tokenizer (fields tokenizer.ggml.model and .tokens); read the tokenizer from elsewhere, "
            "a Hugging Face folder for instance"
        )
    types = gguf_value(reader, "tokenizer.ggml.token_type", int, path) or [int(PieceType.NORMAL)] * len(
        pieces
    )
    settings = _settings(reader, path, len(pieces), default_add_bos=model == "llama")
    try:
        if model == "gpt2":
            return _byte_level(reader, path, pieces, types), settings
        if model == "llama":
            return _sentencepiece(reader, path, pieces, types), settings
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    raise ValueError(
        f"{path} has the tokenizer model {model!r}; expected 'gpt2' (byte-level BPE) or 'llama' (SentencePiece)"
    )


def _settings(
    reader: FastGGUFReader, path: Path, vocab_size: int, default_add_bos: bool
) -> TokenizerSettings:
    def token_id(name: str) -> int | None:
        index = gguf_value(reader, f"tokenizer.ggml.{name}_token_id", int, path)
        if index is not None and not 0 <= index < vocab_size:
            raise ValueError(
                f"{path} has the {name} token id {index}, outside its vocabulary of {vocab_size}"
            )
        return index

    add_bos = gguf_value(reader, "tokenizer.ggml.add_bos_token", int, path)
    end_of_turn = token_id("eot")
    return TokenizerSettings(
        bos_id=token_id("bos"),
        eos_id=token_id("eos"),
        pad_id=token_id("padding"),
        eos_ids=() if end_of_turn is None else (end_of_turn,),
        add_bos=default_add_bos if add_bos is None else bool(add_bos),
        chat_template=gguf_value(reader, "tokenizer.chat_template", str, path),
    )


def _byte_level(
    reader: FastGGUFReader, path: Path, pieces: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    merges = gguf_value(reader, "tokenizer.ggml.merges", str, path)
    if merges is None:
        raise ValueError(f"{path} has a byte-level vocabulary without merges (field tokenizer.ggml.merges)")
    if len(types) != len(pieces) or len(set(pieces)) != len(pieces):
        raise ValueError(
            f"{path} has {len(pieces)} token pieces, {len(set(pieces))} different ones, and {len(types)} token types; "
            "expected as many of each"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    broken = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if broken is not None:
        raise ValueError(f"{path} has the merge {broken!r}; expected two pieces with one space between them")
    name = gguf_value(reader, "tokenizer.ggml.pre", str, path) or "default"
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    missing = next((m for m in pairs if not (set(m) | {"".join(m)}) <= vocabulary.keys()), None)
    if missing is not None:
        raise ValueError(f"{path} merges {missing}, of which a piece is not in its vocabulary")
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=name in _WHOLE_WORDS_FIRST)
    )
    backend.pre_tokenizer = _pre_tokenizer(name, path)
    backend.decoder = decoders.ByteLevel()
    alphabet = byte_level_alphabet().keys()
    added = []
    for piece, kind in zip(pieces, types, strict=True):
        # A piece outside the byte alphabet cannot come from bytes: a marker, however the file has typed it.
        marker = kind in (PieceType.CONTROL, PieceType.UNKNOWN) or not set(piece) <= alphabet
        if marker or kind == PieceType.USER_DEFINED:
            special = marker and kind != PieceType.USER_DEFINED
            added.append(AddedToken(piece, special=special, normalized=False))
    backend.add_tokens(added)
    return backend


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _GPT2:
        return gpt2_words
    if name in _DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_words])
    if name in _WORDS:
        words = pre_tokenizers.Split(Regex(_WORDS[name]), behavior="isolated")
        only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, only_bytes])
    known = sorted({*_GPT2, *_DIGITS_THEN_GPT2, *_WORDS})
    raise ValueError(
        f"{path} has the pre-tokenizer {name!r} (field tokenizer.ggml.pre); known are {', '.join(known)}. Read the "
        "tokenizer from the model's Hugging Face folder instead"
    )


def _sentencepiece(
    reader: FastGGUFReader, path: Path, pieces: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    scores = gguf_value(reader, "tokenizer.ggml.scores", float, path)
    if scores is None:
        raise ValueError(
            f"{path} has a SentencePiece vocabulary without scores (field tokenizer.ggml.scores)"
        )
    prefix_space = gguf_value(reader, "tokenizer.ggml.add_space_prefix", int, path)
    unknown_id = gguf_value(reader, "tokenizer.ggml.unknown_token_id", int, path)
    if unknown_id is not None and not 0 <= unknown_id < len(pieces):
        raise ValueError(
            f"{path} has the unknown token id {unknown_id}, outside its vocabulary of {len(pieces)}"
        )
    return sentencepiece_bpe(
        [piece.replace(" ", SPACE_MARKER) for piece in pieces],  # Gemma's runs of spaces are stored as spaces
        scores,
        types,
        unknown_id=unknown_id,
        # llama.cpp's default for this kind of vocabulary, for files that do not say
        prefix_space=True if prefix_space is None else bool(prefix_space),
        where=path,
    )
