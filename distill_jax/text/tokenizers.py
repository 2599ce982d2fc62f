"""One facade over every tokenizer: ids that know their vocabulary, and exact byte ends.

Whatever a tokenizer was read from (a Hugging Face folder, GGUF, a SentencePiece `.model`, training), it is a
`tokenizers` tokenizer and a byte table here. Text comes from the table alone: `decode` is the UTF-8 of `token_bytes`,
and `byte_ends` are the running widths of the same bytes, so a text and its byte ends cannot disagree.

There are two ways into ids, kept apart because a model's text must never turn into its control tokens: `encode` takes
text and yields text tokens only, even for a text that spells `<eos>`; `encode_prompt` takes a rendered prompt, in which
the names of special tokens are those tokens.

Where a tokenizer puts a phantom space before its text (Llama 2, Mistral), `continuation=True` says that the text goes
on behind other text, as a completion goes on behind its prompt: no phantom is added, and none is subtracted.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from distill_jax.text import folders, gguf_vocabulary, sentencepiece_vocabulary, training
from distill_jax.text.byte_tables import hash_vocabulary, piece_bytes, vocabulary_kind
from distill_jax.text.encoder import Encoder
from distill_jax.text.token_ids import TokenIds, TokenizerSettings, refuse_other_vocabulary

__all__ = ["TokenIds", "Tokenizer", "TokenizerSettings"]

# Names under which released models end a turn. Where one is a special token of the vocabulary, it ends a completion.
END_OF_TURN_NAMES = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>",
)  # fmt: skip

# What every byte table is checked on when it is built, against the decoder of the tokenizer itself.
_CHECK_TEXTS = ("a b", "Two  spaces,\ttabs\nand 1 + 23 = 24.", "naïve 漢字 🙂 e\u0301")


class Tokenizer:
    """Text to token ids and back, with exact bytes.

    Made by the constructors `from_folder`, `from_tokenizer_json`, `from_gguf`, `from_sentencepiece`,
    `bytes_tokenizer` and `train_bpe`.

    Attributes:
      kind: "byte_level", "sentencepiece" or "bytes".
      vocab_size: ids are 0 .. vocab_size - 1.
      vocabulary_hash: sha256 over kind, the bytes of every id, and which ids are special.
      settings: special ids, chat template and so on; the most used are properties too.
      eos_ids: all ids that end a completion, ascending: eos, those of `settings`, and special tokens named so.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: TokenizerSettings, *, where: object = "this program"
    ):
        """Wraps a `tokenizers` tokenizer, which belongs to the facade from here on.

        Args:
          backend: the tokenizer.
          settings: special ids, chat template and so on.
          where: what it was read from, for messages.

        Raises:
          ValueError: pieces without exact bytes, special ids outside the vocabulary, a vocab_size that is too
            small, or a byte table that the tokenizer's own decoder contradicts.
        """
        self._where = where
        self.settings = settings
        self.kind = vocabulary_kind(backend, where)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._own_size = max(vocabulary.values(), default=-1) + 1
        named = (*sorted(settings.special_ids()), *settings.eos_ids)
        outside = [index for index in named if not 0 <= index < self._own_size]
        if outside:
            raise ValueError(
                f"the special token ids {outside} of {where} are outside its vocabulary of {self._own_size} ids"
            )
        marked = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        unknown = vocabulary.get(getattr(backend.model, "unk_token", None) or "")
        special_ids = settings.special_ids() | marked | ({unknown} if unknown is not None else set())
        turn_ends = special_ids & {vocabulary[name] for name in END_OF_TURN_NAMES if name in vocabulary}
        eos = () if settings.eos_id is None else (settings.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(sorted({*turn_ends, *settings.eos_ids, *eos}))
        self._pieces = piece_bytes(backend, self.kind, special_ids)
        self._special = np.ones(self._own_size, bool)
        self._special[list(vocabulary.values())] = False
        self._special[list(special_ids)] = True
        # Before the padding: a model with spare rows in its embedding still speaks the same vocabulary.
        self.vocabulary_hash = hash_vocabulary(self.kind, self._pieces, special_ids)
        self._pad_tables(settings.vocab_size)
        self._encoder = Encoder(backend, special_ids)
        self._check_table()

    def _pad_tables(self, vocab_size: int | None) -> None:
        """Sizes the tables to the model's embedding; spare ids are legal, special, and no text."""
        self.vocab_size = self._own_size if vocab_size is None else vocab_size
        if self.vocab_size < self._own_size:
            raise ValueError(
                f"vocab_size {vocab_size} is smaller than the {self._own_size} ids of {self._where}; the tokenizer and "
                "the model do not belong together"
            )
        spare = self.vocab_size - self._own_size
        self._pieces = self._pieces[: self._own_size] + [b""] * spare
        self._special = np.concatenate([self._special[: self._own_size], np.ones(spare, bool)])
        self._widths = np.array([len(piece) for piece in self._pieces], np.int32)

    def _check_table(self) -> None:
        """Compares the byte table with the backend's own decoder on a few texts."""
        for text in _CHECK_TEXTS:
            ids = self.encode(text)
            theirs = self.backend.decode(list(ids), skip_special_tokens=True)
            if not self.special_mask(ids).any() and self.decode(ids).lstrip(" ") != theirs.lstrip(" "):
                raise ValueError(
                    f"the byte table of {self._where} disagrees with its decoder: {self.decode(ids)!r} against "
                    f"{theirs!r}; its decoder does something that exact byte ends cannot express"
                )

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, {self.vocabulary_hash[:12]})"

    # ---------------------------------------------------------------------------------------------- constructors

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a Hugging Face folder: `tokenizer.json` or `tokenizer.model`, and the configs beside it.

        `tokenizer_config.json` gives special tokens, `add_bos_token` and the chat template (`chat_template.jinja` too),
        `generation_config.json` further end-of-turn ids.

        Raises:
          FileNotFoundError: no such folder, or no tokenizer in it.
          ValueError: a malformed file, named in the message.
        """
        return cls(*folders.read_folder(Path(path)), where=path)

    @classmethod
    def from_tokenizer_json(
        cls, path: str | os.PathLike[str], settings: TokenizerSettings | None = None
    ) -> Tokenizer:
        """Reads one `tokenizer.json`.

        Args:
          path: the file.
          settings: what the file does not say. None: the beginning of sequence as its post-processor has it, no more.

        Raises:
          FileNotFoundError, ValueError: no such file, or not a tokenizer.json.
        """
        backend = folders.read_backend(Path(path))
        return cls(backend, settings or folders.post_processor_settings(backend), where=path)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads the vocabulary of a GGUF file: byte-level BPE (`gpt2`) or SentencePiece (`llama`).

        Raises:
          FileNotFoundError: no such file.
          ValueError: truncated or malformed, or a vocabulary or pre-tokenizer that is not supported.
        """
        return cls(*gguf_vocabulary.read_gguf_vocabulary(Path(path)), where=path)

    @classmethod
    def from_sentencepiece(cls, path: str | os.PathLike[str], add_bos: bool = True) -> Tokenizer:
        """Reads a SentencePiece `.model` file (BPE).

        Args:
          path: the file.
          add_bos: whether the model wants a beginning-of-sequence token; the file does not say, Llama and Mistral do.

        Raises:
          FileNotFoundError: no such file.
          ValueError: malformed, or of a type that is not supported.
        """
        return cls(*sentencepiece_vocabulary.read_sentencepiece(Path(path), add_bos), where=path)

    @classmethod
    def bytes_tokenizer(cls) -> Tokenizer:
        """One token a byte (id = byte), then pad 256, bos 257, eos 258; no BOS is put before a prompt."""
        return cls(*training.bytes_vocabulary(), where="bytes_tokenizer()")

    @classmethod
    def train_bpe(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        individual_digits: bool = True,
        single_symbols: str = "",
        min_frequency: int = 2,
    ) -> Tokenizer:
        """Trains a byte-level BPE tokenizer; the same texts give the same tokenizer.

        Ids: pad 0, bos 1, eos 2, the 256 bytes, then merged pieces in the order in which they were learned.

        Args:
          texts: the corpus.
          vocab_size: the most ids, at least 259; fewer when the corpus has no more pairs to merge.
          individual_digits: whether each digit stays a token of its own (the way of SmolLM2 and Llama).
          single_symbols: characters that, too, stay tokens of their own, "+-=" for instance.
          min_frequency: how often a pair has to occur to be merged.

        Raises:
          ValueError: vocab_size below 259, or single_symbols beyond ASCII.
        """
        trained = training.train_byte_level(
            texts, vocab_size, individual_digits, single_symbols, min_frequency
        )
        return cls(*trained, where="train_bpe(...)")

    def with_vocab_size(self, vocab_size: int) -> Tokenizer:
        """The same tokenizer for a model whose embedding has `vocab_size` rows.

        Spare rows get ids that are legal and no text. Ids without a row may be special added tokens only, such as
        the image placeholder in the tokenizer of a text model; they are left out, and no text gets them.

        Raises:
          ValueError: ids without a row that are text, or that the tokenizer needs (beginning or end of sequence).
        """
        if vocab_size < self._own_size:
            return Tokenizer(self._cut_backend(vocab_size), self.settings, where=self._where)
        padded = copy.copy(self)  # shares the encoder and its lock
        padded.settings = dataclasses.replace(self.settings, vocab_size=vocab_size)
        padded._pad_tables(vocab_size)
        return padded

    def _cut_backend(self, vocab_size: int) -> tokenizers.Tokenizer:
        added = self.backend.get_added_tokens_decoder()
        beyond = [index for index in self.backend.get_vocab().values() if index >= vocab_size]
        if not all(index in added and added[index].special for index in beyond):
            raise ValueError(
                f"the tokenizer has {self._own_size} tokens, but the model's embedding only {vocab_size} rows; they do "
                "not belong together: put the model's own tokenizer beside its weights"
            )
        state = json.loads(self.backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `from_folder` and transformers read."""
        folders.write_folder(Path(folder), self.backend, self.settings)

    # ------------------------------------------------------------------------------------------------ properties

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers` tokenizer underneath; to look at, not to change."""
        return self._encoder.backend

    @property
    def bos_id(self) -> int | None:
        return self.settings.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.settings.eos_id

    @property
    def pad_id(self) -> int:
        """Id to fill padding with: the tokenizer's own, else eos, else 0. Masks come from lengths, never from it."""
        candidates = (self.settings.pad_id, self.settings.eos_id, 0)
        return next(index for index in candidates if index is not None)

    @property
    def chat_template(self) -> str | None:
        return self.settings.chat_template

    def id_to_token(self, index: int) -> str | None:
        """The written form of an id (`▁the`, `<eos>`), None for a spare id."""
        return self.backend.id_to_token(index)

    def token_to_id(self, token: str) -> int | None:
        """The id of a written form, None when the vocabulary has none."""
        return self.backend.token_to_id(token)

    # -------------------------------------------------------------------------------------------------- encoding

    def encode(self, text: str, continuation: bool = False) -> TokenIds:
        """Ids of a text: no special tokens, no BOS; a text that spells `<eos>` gives its letters.

        A few texts do not come back: those with a byte that a byte-level vocabulary lacks (0x04 in SmolLM2's), with a
        literal `▁` in SentencePiece, or that the tokenizer normalises. `alignable` tells them by their bytes.

        Args:
          text: any text.
          continuation: the text goes on behind other text, so no phantom space is put before it.

        Raises:
          TypeError: not a text.
          ValueError: lone surrogates, which are no text.
        """
        return self.encode_batch([text], continuation)[0]

    def encode_batch(self, texts: Sequence[str], continuation: bool = False) -> list[TokenIds]:
        """`encode` for many texts at once, on all cores."""
        rows = self._encoder.encode_texts(texts, continuation)
        return [TokenIds(ids, self.vocabulary_hash) for ids in rows]

    def encode_prompt(self, text: str) -> TokenIds:
        """Ids of a rendered prompt: names of special tokens are parsed, BOS is in front exactly once where wanted.

        Args:
          text: what `chat.render_prompt` gives, or plain text.

        Raises:
          TypeError, ValueError: as `encode`.
        """
        ids = self._encoder.encode_prompt(text)
        if self.settings.add_bos and self.bos_id is not None:
            start = next((at for at, index in enumerate(ids) if index != self.bos_id), len(ids))
            ids = [self.bos_id, *ids[start:]]  # whether the template wrote none, one or two
        return TokenIds(ids, self.vocabulary_hash)

    # -------------------------------------------------------------------------------------------------- decoding

    def token_bytes(self, ids: Sequence[int], continuation: bool = False) -> bytes:
        """The bytes of the text of ids: specials give none, the phantom space is left out.

        Args:
          ids: token ids of this vocabulary.
          continuation: the ids go on behind other text (a completion), so their first space is real.

        Raises:
          ValueError, TypeError: see `check`.
        """
        array = self.check(ids)
        data = b"".join([self._pieces[index] for index in array.tolist()])
        return data[self._phantom(array, continuation)[1] :]

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        """The text of ids: `token_bytes` as UTF-8, special tokens skipped.

        Bytes that are not UTF-8 (a character cut in two by the length limit, say) become U+FFFD; only then has the text
        other bytes than `token_bytes`.
        """
        return self.token_bytes(ids, continuation).decode("utf-8", errors="replace")

    def byte_ends(self, ids: Sequence[int], continuation: bool = False) -> np.ndarray:
        """i32[len(ids)]: number of bytes of the text up to and including each token.

        end[i] = sum_{j <= i} width(ids[j]), minus the phantom space from its token on. Special tokens have width 0.
        Monotone; the last entry is len(token_bytes(ids)).

        Args:
          ids: token ids of this vocabulary.
          continuation: the ids go on behind other text (a completion), so their first space is real.

        Raises:
          ValueError, TypeError: see `check`.
        """
        array = self.check(ids)
        ends = np.cumsum(self._widths[array], dtype=np.int32)
        first, width = self._phantom(array, continuation)
        ends[first:] -= width
        return ends

    def _phantom(self, array: np.ndarray, continuation: bool) -> tuple[int, int]:
        """(index of the token that carries the phantom space, its width: 0 or 1)."""
        textual = np.flatnonzero(self._widths[array])
        if continuation or not self._encoder.has_prefix_space or not len(textual):
            return 0, 0
        first = int(textual[0])
        return first, int(self._pieces[array[first]].startswith(b" "))

    def special_mask(self, ids: Sequence[int]) -> np.ndarray:
        """bool[len(ids)]: True where an id is no text (special tokens and spare ids).

        Raises:
          ValueError, TypeError: see `check`.
        """
        return self._special[self.check(ids)]

    def check(self, ids: Sequence[int]) -> np.ndarray:
        """i64[len(ids)]: the ids as an array, if they can be ids of this vocabulary.

        Args:
          ids: `TokenIds`, or any one-dimensional sequence of whole numbers.

        Raises:
          ValueError: ids of another vocabulary, outside 0 .. vocab_size - 1, or not one-dimensional.
          TypeError: not whole numbers.
        """
        refuse_other_vocabulary(ids, self.vocabulary_hash, f"{self!r} belongs")
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"expected the token ids of one sequence, got an array of shape {array.shape}")
        if not len(array):
            return np.zeros(0, np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"token ids must be whole numbers, got {array.dtype}")
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(
                f"token id {array[at]} at position {at} is outside 0 .. {self.vocab_size - 1} of {self!r}; cut padding "
                "off, and take ids from this tokenizer or its model"
            )
        return array.astype(np.int64)
