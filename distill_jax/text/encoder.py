"""Text to ids over a `tokenizers` tokenizer, without the two ways in which text goes wrong there.

Special tokens: text never yields one, a prompt does. Phantom space: text that goes on behind other text has none.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence

import tokenizers

from distill_jax.text.byte_tables import SPACE_MARKER, component_states


class Encoder:
    """Encodes with a backend that it owns.

    Attributes:
      backend: the `tokenizers` tokenizer.
      has_prefix_space: whether it puts a phantom space before the text (SentencePiece's add_dummy_prefix and its like).
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]):
        """Args: the backend; the ids that are not text."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.has_prefix_space = adds_prefix_space(backend)
        first = next(component_states(backend.normalizer), {"type": None})
        self._prepends_first = first["type"] == "Prepend"
        self._special_ids = special_ids
        self._lock = threading.Lock()  # guards the one switch that is turned, encode_special_tokens

    def encode_texts(self, texts: Sequence[str], continuation: bool) -> list[list[int]]:
        """Ids of texts, free of special tokens (but for the unknown token of a vocabulary that cannot spell a text).

        Raises:
          TypeError: not texts.
          ValueError: lone surrogates, which are no text.
        """
        for index, text in enumerate(texts):
            _check_text(text, index)
        backend = self.backend
        if continuation:
            backend = self._continuation_backend
        elif self._prepends_first:
            # The same ids, but for texts with user-defined tokens: there the normalizer sees, and would put its space
            # before, each part between them.
            backend, texts = self._continuation_backend, [text and f" {text}" for text in texts]
        with self._lock:
            backend.encode_special_tokens = True
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [self._without_specials(encoding.ids) for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: the names of special tokens in it are those tokens; nothing is added.

        Raises: as `encode_texts`.
        """
        _check_text(text, 0)
        with self._lock:
            self.backend.encode_special_tokens = False
            return self.backend.encode(text, add_special_tokens=False).ids

    def _without_specials(self, ids: list[int]) -> list[int]:
        """Spells out, character by character, the special tokens that merges have built out of plain text."""
        if self._special_ids.isdisjoint(ids):
            return ids
        unknown = getattr(self.backend.model, "unk_token", None)
        spelled: list[int] = []
        for index in ids:
            piece = self.backend.id_to_token(index) or ""
            if index not in self._special_ids or piece == unknown or len(piece) == 1:
                spelled.append(index)
                continue
            for character in piece.replace(SPACE_MARKER, " "):
                spelled += self._continuation_backend.encode(character, add_special_tokens=False).ids
        return spelled

    @functools.cached_property
    def _continuation_backend(self) -> tokenizers.Tokenizer:
        """The backend without the phantom space; the same ids for everything else."""
        if not self.has_prefix_space:
            return self.backend
        state = json.loads(self.backend.to_str())
        state["normalizer"] = _without_prefix(state["normalizer"], "normalizers")
        state["pre_tokenizer"] = _without_prefix(state["pre_tokenizer"], "pretokenizers")
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        backend.encode_special_tokens = True
        return backend


def adds_prefix_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether encoding puts a phantom space before the text."""
    for state in (*component_states(backend.normalizer), *component_states(backend.pre_tokenizer)):
        if state["type"] == "Prepend":
            return True
        if state["type"] == "Metaspace" and state.get("prepend_scheme", "always") != "never":
            return True
        if state["type"] == "ByteLevel" and state.get("add_prefix_space", False):
            return True
    return False


def _without_prefix(state: dict | None, inner: str) -> dict | None:
    """The state of a normalizer or pre-tokenizer with whatever puts a space before the text switched off."""
    if state is None or state["type"] == "Prepend":
        return None
    if inner in state:
        parts = [_without_prefix(part, inner) for part in state[inner]]
        return {**state, inner: [part for part in parts if part is not None]}
    if state["type"] == "Metaspace":
        return {**state, "prepend_scheme": "never"}
    if state["type"] == "ByteLevel":
        return {**state, "add_prefix_space": False}
    return state


def _check_text(text: object, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected text, got {type(text).__name__} at position {index}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text at position {index} is not valid Unicode: {error}") from None
