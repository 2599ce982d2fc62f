"""The layout of token batches, slot by slot."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from distill_jax.sequences import Sequences, pack_prompts, pack_sequences, slot_positions
from distill_jax.text.token_ids import TokenIds


def packed() -> Sequences:
    return pack_sequences([[5, 6], [7, 8, 9]], [[1, 2, 3], [4]], prompt_size=3, completion_size=4, pad_id=99)


def test_layout() -> None:
    sequences = packed()
    np.testing.assert_array_equal(sequences.tokens, [[5, 6, 99, 1, 2, 3, 99], [7, 8, 9, 4, 99, 99, 99]])
    np.testing.assert_array_equal(sequences.prompt_length, [2, 3])
    np.testing.assert_array_equal(sequences.completion_length, [3, 1])
    np.testing.assert_array_equal(sequences.completion, [[1, 2, 3, 99], [4, 99, 99, 99]])
    assert (sequences.prompt_size, sequences.completion_size) == (3, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(sequences)} == {np.dtype(np.int32)}


def test_positions_leave_the_gap_out() -> None:
    # Row 0: slots 0 1 are the prompt, slot 2 is the gap, the completion goes on at position 2.
    positions = packed().positions()
    np.testing.assert_array_equal(positions, [[0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]])
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(slot_positions(np.array([1, 2]), 3, 5), [[0, 1, 2, 1, 2], [0, 1, 2, 2, 3]])


def test_validity_comes_from_lengths_and_not_from_the_padding_id() -> None:
    expected = [[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(packed().valid(), np.array(expected, bool))
    np.testing.assert_array_equal(packed().completion_mask, np.array(expected, bool)[:, 3:])
    same_id = pack_sequences([[0, 0]], [[0]], prompt_size=3, completion_size=2, pad_id=0)
    np.testing.assert_array_equal(same_id.valid(), [[True, True, False, True, False]])


def test_positions_of_real_tokens_count_up_without_holes() -> None:
    sequences = packed()
    for positions, valid, p, t in zip(
        np.asarray(sequences.positions()), np.asarray(sequences.valid()), [2, 3], [3, 1], strict=True
    ):
        np.testing.assert_array_equal(positions[valid], np.arange(p + t))


def test_jit_keeps_the_static_fields_static() -> None:
    out = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s))(packed())
    assert (out.prompt_size, out.vocabulary_hash) == (3, "")
    np.testing.assert_array_equal(out.tokens, packed().tokens + 1)


def test_rows_may_fill_their_slots_and_completions_may_be_empty() -> None:
    sequences = pack_sequences([[1, 2]], [[]], prompt_size=2, completion_size=1)
    np.testing.assert_array_equal(sequences.tokens, [[1, 2, 0]])
    assert not np.asarray(sequences.completion_mask).any()


def test_no_rows_at_all() -> None:
    sequences = pack_sequences([], [], prompt_size=2, completion_size=3)
    assert sequences.tokens.shape == (0, 5) and sequences.completion_length.shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1, 2, 3]], [[1]], "prompt 0 has 3 tokens, expected 1 to 2"),
        ([[1], []], [[1], [1]], "prompt 1 has 0 tokens, expected 1 to 2"),
        ([[1], [1]], [[1], [1, 2, 3, 4]], "completion 1 has 4 tokens, expected at most 3"),
        ([[1], [1]], [[1]], "got 2 prompts and 1 completions"),
    ],
)
def test_what_does_not_fit_is_refused(prompts: list, completions: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_sequences(prompts, completions, prompt_size=2, completion_size=3)


def test_the_vocabulary_is_kept_and_two_are_refused() -> None:
    one, other = "1" * 16, "2" * 16
    sequences = pack_sequences([TokenIds([1], one)], [TokenIds([2], one)], 1, 1)
    assert sequences.vocabulary_hash == one
    assert pack_sequences([TokenIds([1], one)], [[2]], 1, 1).vocabulary_hash == one  # plain ids claim nothing
    with pytest.raises(ValueError, match="2 vocabularies"):
        pack_sequences([TokenIds([1], one)], [TokenIds([2], other)], 1, 1)


def test_prompts_alone() -> None:
    tokens, lengths = pack_prompts([[3], [4, 5]], 3, pad_id=-1)
    np.testing.assert_array_equal(tokens, [[3, -1, -1], [4, 5, -1]])
    np.testing.assert_array_equal(lengths, [1, 2])
