"""Chunked scoring against full logits row by row: values, gradients, memory, sharding."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax.logprobs import CompletionScores, process_logits, score_completions, token_logprobs
from distill_jax.mesh import place, place_batch
from distill_jax.models.adapter import AdapterConfig, adapter_axes, init_adapter
from distill_jax.models.decoder import Decoder, Params, apply, init_params, param_axes, unembed
from distill_jax.models.model import Model
from distill_jax.models.spec import ModelSpec
from distill_jax.sequences import Sequences, pack_sequences
from distill_jax.text.token_ids import TokenIds
from distill_jax.text.tokenizers import Tokenizer

SPEC = ModelSpec("llama", vocab_size=52, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
UNTIED = dataclasses.replace(SPEC, tie_embeddings=False)
ADAPTER = AdapterConfig(rank=2, alpha=4.0, targets=("attn", "mlp", "head"))


def random_sequences(rows: int = 4, prompt_size: int = 5, completion_size: int = 11) -> Sequences:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 52, n).tolist() for n in rng.integers(1, prompt_size + 1, rows)]
    lengths = [completion_size, 0, *rng.integers(1, completion_size + 1, rows - 2)]
    completions = [rng.integers(0, 52, n).tolist() for n in lengths]
    return pack_sequences(prompts, completions, prompt_size, completion_size)


def random_adapter(module: Decoder) -> Params:
    adapter = init_adapter(module, ADAPTER, jax.random.key(7))
    return jax.tree.map(lambda x: x + 0.1, adapter)  # b is zero in a new one


def full_scores(
    module: Decoder, params: Params, sequences: Sequences, temperature: float = 1.0, **adapter: Params
) -> CompletionScores:
    """The oracle: each row alone, without padding or gap, full logits."""
    lp = np.zeros((len(sequences.tokens), sequences.completion_size))
    entropy = np.zeros_like(lp)
    for row in range(len(lp)):
        p, t = int(sequences.prompt_length[row]), int(sequences.completion_length[row])
        start = sequences.prompt_size
        ids = np.concatenate([sequences.tokens[row, :p], sequences.tokens[row, start : start + t]])[None, :]
        positions = np.arange(p + t, dtype=np.int32)[None, :]
        hidden, _ = apply(module, params, ids, positions, np.ones_like(ids, bool), **adapter)
        logits = unembed(module, params, hidden, **adapter)[0]
        logits = np.asarray(logits, np.float64) / temperature
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i in range(t):
            lp[row, i] = logprobs[p + i - 1, ids[0, p + i]]
            entropy[row, i] = -np.sum(np.exp(logprobs[p + i - 1]) * logprobs[p + i - 1])
    return CompletionScores(lp, entropy)


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_scores_equal_full_logits_row_by_row(chunk: int) -> None:
    module = Decoder(UNTIED)
    params, adapter, sequences = (
        init_params(module, jax.random.key(0)),
        random_adapter(module),
        random_sequences(),
    )
    low_rank = {"adapter": adapter, "scale": 0.5}
    got = score_completions(module, params, sequences, temperature=0.7, chunk=chunk, **low_rank)
    expected = full_scores(module, params, sequences, temperature=0.7, **low_rank)
    np.testing.assert_allclose(got.lp, expected.lp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert (np.asarray(got.lp)[~np.asarray(sequences.completion_mask)] == 0).all()
    assert (np.asarray(got.entropy)[~np.asarray(sequences.completion_mask)] == 0).all()


def full_logits_sum(module: Decoder, params: Params, sequences: Sequences, **adapter: Params) -> jax.Array:
    """Sum of completion log-probabilities from logits [B, P+T, V] in one piece."""
    sequences = jax.tree.map(jnp.asarray, sequences)
    positions, valid = sequences.positions(), sequences.valid()
    hidden, _ = apply(module, params, sequences.tokens, positions, valid, **adapter)
    logprobs = jax.nn.log_softmax(unembed(module, params, hidden, **adapter))
    slots = jnp.arange(sequences.completion_size)[None, :] + sequences.prompt_size - 1
    slots = slots.repeat(len(positions), 0).at[:, 0].set(sequences.prompt_length - 1)
    predicted = jnp.take_along_axis(logprobs, slots[..., None], axis=1)
    lp = jnp.take_along_axis(predicted, sequences.completion[..., None], axis=2)[..., 0]
    return jnp.where(sequences.completion_mask, lp, 0.0).sum()


def test_chunked_gradients_equal_full_gradients() -> None:
    module = Decoder(UNTIED)
    params, adapter, sequences = (
        init_params(module, jax.random.key(0)),
        random_adapter(module),
        random_sequences(),
    )

    def loss(chunk: int | None, params: Params, adapter: Params) -> jax.Array:
        if chunk is None:
            return full_logits_sum(module, params, sequences, adapter=adapter, scale=2.0)
        return score_completions(module, params, sequences, adapter=adapter, scale=2.0, chunk=chunk).lp.sum()

    value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, None), (0, 1)))(params, adapter)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    for chunk in (3, 64):
        got_value, got = jax.jit(jax.value_and_grad(functools.partial(loss, chunk), (0, 1)))(params, adapter)
        np.testing.assert_allclose(got_value, value, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, gradient)


def test_padding_may_hold_anything() -> None:
    module = Decoder(SPEC)
    params, sequences = init_params(module, jax.random.key(0)), random_sequences()
    score = jax.jit(jax.value_and_grad(lambda p, s: score_completions(module, p, s, chunk=2).lp.sum()))
    value, gradient = score(params, sequences)
    for padding in (-1, 51, 52, 2**30):
        tokens = np.where(np.asarray(sequences.valid()), sequences.tokens, padding)
        got_value, got = score(params, dataclasses.replace(sequences, tokens=tokens))
        assert got_value == value
        jax.tree.map(np.testing.assert_array_equal, got, gradient)


def test_truncated_distributions_score_every_token() -> None:
    """In the support: as `process_logits` says; outside: finite, under the support widened by the token."""
    module = Decoder(SPEC)
    params, sequences = init_params(module, jax.random.key(0)), random_sequences()
    plain = score_completions(module, params, sequences)
    truncated = score_completions(module, params, sequences, top_k=20, top_p=0.6, chunk=4)
    mask = np.asarray(sequences.completion_mask)
    assert np.isfinite(truncated.lp).all()
    assert (np.asarray(truncated.lp > plain.lp) == mask).all()
    row, size = 0, sequences.prompt_size
    hidden, _ = apply(
        module, params, sequences.tokens, np.asarray(sequences.positions()), np.asarray(sequences.valid())
    )
    logits = unembed(module, params, hidden[row, size : size + 10])
    targets = sequences.tokens[row, size + 1 :]
    expected = process_logits(logits, top_k=20, top_p=0.6)[np.arange(10), targets]
    inside = np.isfinite(expected)
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(truncated.lp[row, 1:][inside], expected[inside], rtol=1e-5, atol=1e-6)


def test_gradient_memory_is_far_below_one_array_of_logits() -> None:
    spec = dataclasses.replace(SPEC, vocab_size=16384)
    module = Decoder(spec)
    params = init_params(module, jax.random.key(0))
    rows, prompt, completion = 4, 8, 64
    full = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, prompt + completion), jnp.int32)
    sequences = Sequences(tokens, full, full, prompt)
    logits_bytes = rows * completion * spec.vocab_size * 4

    def temporary_bytes(loss: object) -> int:
        return jax.jit(jax.grad(loss)).lower(params, sequences).compile().memory_analysis().temp_size_in_bytes

    whole = temporary_bytes(lambda p, s: full_logits_sum(module, p, s))
    chunked = temporary_bytes(lambda p, s: score_completions(module, p, s, chunk=2).lp.sum())
    with_entropy = temporary_bytes(
        lambda p, s: sum(x.sum() for x in jax.tree.leaves(score_completions(module, p, s, chunk=2)))
    )
    assert whole > logits_bytes
    assert max(chunked, with_entropy) < logits_bytes / 3


def test_sharded_equals_unsharded_and_logits_stay_cut(mesh_cube: Mesh, mesh_single: Mesh) -> None:
    spec = dataclasses.replace(UNTIED, vocab_size=512)
    sequences = random_sequences(rows=8, completion_size=16)
    host = Decoder(spec)
    params, adapter = init_params(host, jax.random.key(0)), random_adapter(host)
    results = []
    for mesh in (mesh_cube, mesh_single):
        module = Decoder(spec, mesh)
        placed = place(params, param_axes(module), mesh)
        placed_adapter = place(adapter, adapter_axes(module, ADAPTER), mesh, "adapter")
        batch = place_batch(sequences, mesh)

        def loss(params: Params, adapter: Params, batch: Sequences, module: Decoder = module) -> tuple:
            scores = score_completions(module, params, batch, adapter=adapter, chunk=8)
            return scores.lp.sum() + scores.entropy.sum(), scores

        compiled = (
            jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(placed, placed_adapter, batch).compile()
        )
        results.append((compiled(placed, placed_adapter, batch), compiled.as_text()))
    (sharded, text), (single, _) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), sharded, single)
    # One chunk's logits on one device: 8/4 rows x 8 tokens x 512/2 ids. No collective moves an array of logits.
    gathers = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-(?:gather|to-all)(?:-start)?\(", text)
    assert gathers
    with_tokens_and_ids = [
        shape for shape in gathers if {"512", "256"} & set(shape.split(",")) and "8" in shape.split(",")
    ]
    assert not with_tokens_and_ids


@pytest.fixture(scope="module")
def byte_model() -> Model:
    tokenizer = Tokenizer.bytes_tokenizer()
    spec = dataclasses.replace(SPEC, vocab_size=tokenizer.vocab_size)
    module = Decoder(spec)
    return Model(spec, init_params(module, jax.random.key(0)), tokenizer, module)


def test_token_logprobs_equal_the_model_logits(byte_model: Model) -> None:
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (3, 7), 0, 256))
    lengths = np.array([7, 1, 4])
    config = AdapterConfig(rank=2, alpha=4.0)
    adapter = jax.tree.map(lambda x: x + 0.1, init_adapter(byte_model.module, config, jax.random.key(7)))
    dial = {"adapter": adapter, "scale": 0.5, "adapter_config": config}
    logprobs = jax.nn.log_softmax(byte_model.logits(tokens, lengths, **dial))
    expected = np.zeros((3, 7))
    for row in range(3):
        for t in range(1, lengths[row]):
            expected[row, t] = logprobs[row, t - 1, tokens[row, t]]
    garbage = np.where(np.arange(7)[None, :] < lengths[:, None], tokens, -9)
    got = token_logprobs(byte_model, garbage, lengths, chunk=4, **dial)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert token_logprobs(byte_model, [[5]], [1]).tolist() == [[0.0]]


def test_token_logprobs_takes_ids_of_its_own_vocabulary_only(byte_model: Model) -> None:
    assert byte_model.tokenizer is not None
    ids = byte_model.tokenizer.encode("abcd")
    assert token_logprobs(byte_model, [ids, ids], [4, 2]).shape == (2, 4)
    with pytest.raises(ValueError, match="belong to the vocabulary"):
        token_logprobs(byte_model, [TokenIds(ids, "another")], [4])


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2], [2], r"tokens must be \[B, T\] and lengths \[B\]"),
        ([[1, 2]], [2, 2], r"tokens must be \[B, T\] and lengths \[B\]"),
        ([[1, 2]], [3], r"lengths must be in 1\.\.2, got 3\.\.3"),
        ([[1, 2]], [0], r"lengths must be in 1\.\.2, got 0\.\.0"),
        ([[1, 300]], [2], r"token ids must be in 0\.\.258"),
        ([[1, -1]], [2], r"token ids must be in 0\.\.258"),
    ],
)
def test_token_logprobs_refuses_bad_input(
    byte_model: Model, tokens: list, lengths: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_logprobs(byte_model, tokens, lengths)


def test_score_completions_refuses_bad_input() -> None:
    module, sequences = Decoder(SPEC), random_sequences()
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        score_completions(module, {}, sequences, chunk=0)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        score_completions(module, {}, sequences, temperature=0.0)
    with pytest.raises(ValueError, match="no completion slots"):
        score_completions(module, {}, dataclasses.replace(sequences, prompt_size=16))
