"""Byte-level vocabularies made here: one token a byte, and BPE trained inside a run."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from distill_jax.text.byte_tables import byte_level_alphabet
from distill_jax.text.token_ids import TokenizerSettings

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_SPECIALS = [AddedToken(name, special=True, normalized=False) for name in (PAD, BOS, EOS)]


def bytes_vocabulary() -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """256 bytes under their own value, then pad 256, bos 257, eos 258.

    It is written as a byte-level BPE without merges, so that a saved folder opens in transformers as well.
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_level_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_SPECIALS)
    return backend, TokenizerSettings(pad_id=256, bos_id=257, eos_id=258)


def train_byte_level(
    texts: Iterable[str], vocab_size: int, individual_digits: bool, single_symbols: str, min_frequency: int
) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """Byte-level BPE (Sennrich et al. 2016, on GPT-2's byte alphabet and word expression).

    Args:
      texts: the corpus.
      vocab_size: the most ids.
      individual_digits: cut around every digit before merging, so that it stays a token of its own.
      single_symbols: ASCII characters to cut around in the same way.
      min_frequency: how often a pair has to occur to be merged.

    Raises:
      ValueError: vocab_size below 259, or single_symbols beyond ASCII.
    """
    smallest = len(_SPECIALS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {smallest} ids are the 256 bytes, pad, bos and eos; "
            "take a larger one, or bytes_tokenizer()"
        )
    if not single_symbols.isascii():
        raise ValueError(
            f"single_symbols {single_symbols!r} must be ASCII: others are several bytes, not one token"
        )
    cuts: list = []
    if individual_digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if single_symbols:
        # Spelled as code points: no character has a meaning of its own inside the brackets.
        members = "".join(f"\\x{{{ord(symbol):X}}}" for symbol in sorted(set(single_symbols)))
        cuts.append(pre_tokenizers.Split(Regex(f"[{members}]"), behavior="isolated"))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend, TokenizerSettings(pad_id=0, bos_id=1, eos_id=2)
