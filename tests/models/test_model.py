"""`Model.logits`: padding, and bad tokens refused at the door."""

from __future__ import annotations

import numpy as np
import pytest

from distill_jax.models.model import load_model
from tests.models.small_models import GOLDENS, answers


def test_padding_changes_nothing():
    model, golden = load_model(GOLDENS / "gemma3_text"), answers("gemma3_text")
    padded = golden["tokens"].copy()
    padded[0, 30:] = 99
    logits = model.logits(padded, lengths=[30, 48])
    assert np.abs(logits[0, :30] - golden["logits"][0, :30]).max() < 1e-5
    assert np.abs(logits[1] - golden["logits"][1]).max() < 1e-5


@pytest.mark.parametrize(
    "tokens, lengths, message",
    [
        ([1, 2, 3], None, r"shape \[B, T\]"),
        ([[1.0, 2.0]], None, "integers"),
        ([[]], None, r"shape \[B, T\]"),
        ([[1, 128]], None, r"0..127, got 1..128"),
        ([[1, -1]], None, r"got -1..1"),
        ([[1, 2]], [3], r"1..2, got \[3\]"),
        ([[1, 2]], [0], r"1..2, got \[0\]"),
        ([[1, 2]], [1, 1], r"1 numbers in 1..2"),
    ],
)
def test_bad_tokens_are_refused(tokens, lengths, message):
    model = load_model(GOLDENS / "llama")
    with pytest.raises(ValueError, match=message):
        model.logits(tokens, lengths)
