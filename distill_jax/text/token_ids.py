"""Token ids that know their vocabulary, and what a tokenizer carries besides it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex, overload


class TokenIds(list):
    """Token ids (ints) and the hash of the vocabulary that they belong to; slices and sums keep it."""

    vocabulary_hash: str

    def __init__(self, ids: Iterable[int] = (), vocabulary_hash: str = ""):
        super().__init__(ids)
        self.vocabulary_hash = vocabulary_hash

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return TokenIds(item, self.vocabulary_hash) if isinstance(index, slice) else item

    def __add__(self, other: Iterable[int]) -> TokenIds:  # type: ignore[override]
        """Joins ids of one vocabulary; ids of another raise ValueError, plain ints are taken as they are."""
        refuse_other_vocabulary(other, self.vocabulary_hash, "the ids before them belong")
        return TokenIds([*self, *other], self.vocabulary_hash)


def refuse_other_vocabulary(ids: Any, vocabulary_hash: str, owner: str) -> None:
    """Raises ValueError when ids carry another hash than `vocabulary_hash`; ids without a hash pass."""
    got = getattr(ids, "vocabulary_hash", vocabulary_hash)
    if got != vocabulary_hash:
        raise ValueError(
            f"these token ids belong to the vocabulary {got[:12] or '(none)'}, but {owner} to "
            f"{vocabulary_hash[:12] or '(none)'}; decode them with the tokenizer that made them, and encode "
            "the text again"
        )


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer carries besides its vocabulary.

    Attributes:
      bos_id, eos_id, pad_id: ids of the beginning of sequence, end of sequence and padding; None where there is none.
      eos_ids: further ids that end a completion (end of turn).
      add_bos: whether the model wants the beginning-of-sequence token before a prompt.
      chat_template: the jinja2 template of the model's chat format.
      vocab_size: rows of the model's embedding where it is padded beyond the tokenizer; None where it is not.
      further: what else its files say to other libraries (the longest input, the side of padding); written again.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None
    vocab_size: int | None = None
    further: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def special_ids(self) -> frozenset[int]:
        """Ids that are not text. Those of `eos_ids` may be: a model may end its turn with a line break."""
        return frozenset(index for index in (self.bos_id, self.eos_id, self.pad_id) if index is not None)
