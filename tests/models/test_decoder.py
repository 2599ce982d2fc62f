"""The decoder against itself: sharded and not, with and without a cache, rematerialised or not, padded or not."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax.mesh import ShardingError, make_mesh, place, place_batch
from distill_jax.models.decoder import (
    Decoder,
    Params,
    abstract_params,
    apply,
    init_cache,
    init_params,
    param_axes,
    rotary_frequencies,
    rotate,
    unembed,
)
from distill_jax.models.spec import ModelSpec, RopeScaling
from distill_jax.sequences import Sequences, pack_sequences
from distill_jax.students.step import cross_entropy

LLAMA = ModelSpec(
    "llama",
    vocab_size=48,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    d_ff=32,
    tie_embeddings=False,
)
GEMMA = dataclasses.replace(
    LLAMA,
    family="gemma3",
    norm_offset=1.0,
    qk_norm=True,
    post_norms=True,
    embed_scale=True,
    activation="gelu_tanh",
    tie_embeddings=True,
    layer_is_local=(True, False),
    sliding_window=3,
    rope_theta_local=100.0,
)
BOTH = pytest.mark.parametrize("spec", [LLAMA, GEMMA], ids=["llama", "gemma3"])


def random_params(spec: ModelSpec) -> Params:
    """Random everywhere, norm scales too, so that a forgotten one is seen."""
    params = init_params(Decoder(spec), jax.random.key(0))
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(noise))
    return jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), params, keys)


def random_sequences() -> Sequences:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 48, n).tolist() for n in (5, 1, 3, 2)]
    completions = [rng.integers(0, 48, n).tolist() for n in (2, 6, 0, 4)]
    return pack_sequences(prompts, completions, prompt_size=5, completion_size=6)


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(module: Decoder, params: Params, sequences: Sequences) -> jax.Array:
    return apply(module, params, sequences.tokens, sequences.positions(), sequences.valid())[0]


def row_alone(module: Decoder, params: Params, sequences: Sequences, row: int) -> jax.Array:
    """The oracle: [p+t, D], the row's real tokens without padding, gap or cache."""
    ids = np.asarray(sequences.tokens)[row][np.asarray(sequences.valid())[row]][None]
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    return apply(module, params, ids, positions, np.ones_like(ids, bool))[0][0]


@BOTH
def test_sharded_is_unsharded(spec: ModelSpec, mesh_cube: Mesh, mesh_single: Mesh) -> None:
    params, results = random_params(spec), []

    for mesh in (mesh_cube, mesh_single):
        module = Decoder(spec, mesh)

        def run(
            params: Params, batch: Sequences, module: Decoder = module
        ) -> tuple[jax.Array, jax.Array, Params]:
            def loss(params: Params) -> jax.Array:
                total, count = cross_entropy(module, params, batch, chunk=4)
                return total / count

            return hidden_of(module, params, batch), *jax.value_and_grad(loss)(params)

        placed = place(params, param_axes(module), mesh)
        results.append(jax.jit(run)(placed, place_batch(random_sequences(), mesh)))
    (cube_hidden, cube_loss, cube_grads), (hidden, loss, grads) = results
    assert len(cube_hidden.sharding.device_set) == 8 and len(hidden.sharding.device_set) == 1
    valid = np.asarray(random_sequences().valid())
    np.testing.assert_allclose(np.asarray(cube_hidden)[valid], np.asarray(hidden)[valid], atol=1e-5)
    np.testing.assert_allclose(cube_loss, loss, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cube_grads, grads)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads)), "every parameter takes part"


def test_new_parameters_are_the_same_on_every_mesh(mesh_cube: Mesh, mesh_single: Mesh) -> None:
    cube = init_params(Decoder(LLAMA, mesh_cube), jax.random.key(3))
    single = init_params(Decoder(LLAMA, mesh_single), jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cube, single)
    q = cube["layers"]["attn"]["q"]["kernel"]  # [L, D, N, H]: D over fsdp, N over tensor
    assert q.addressable_shards[0].data.shape == (2, 8, 2, 4)


def test_heads_that_do_not_divide_are_refused_by_name() -> None:
    module = Decoder(LLAMA, make_mesh("data=2,tensor=4"))
    with pytest.raises(ShardingError, match=r"\['layers'\]\['attn'\]\['k'\]\['kernel'\].*'kv_heads'.*size 2"):
        init_params(module, jax.random.key(0))


@BOTH
def test_rows_in_a_batch_are_rows_alone(spec: ModelSpec) -> None:
    module, params, sequences = Decoder(spec), random_params(spec), random_sequences()
    hidden, valid = np.asarray(hidden_of(module, params, sequences)), np.asarray(sequences.valid())
    for row in range(4):
        np.testing.assert_allclose(
            hidden[row][valid[row]], row_alone(module, params, sequences, row), atol=1e-5
        )


@BOTH
def test_what_stands_in_padding_does_not_matter(spec: ModelSpec) -> None:
    module, params, sequences = Decoder(spec), random_params(spec), random_sequences()
    valid = np.asarray(sequences.valid())
    other = dataclasses.replace(sequences, tokens=np.where(valid, sequences.tokens, 47))
    assert (np.asarray(other.tokens) != np.asarray(sequences.tokens)).any()
    a, b = (np.asarray(hidden_of(module, params, s)) for s in (sequences, other))
    np.testing.assert_array_equal(a[valid], b[valid])
    assert np.isfinite(a).all(), "rows of padding hold finite numbers"


@BOTH
def test_a_cache_changes_nothing(spec: ModelSpec) -> None:
    """Prefill of padded prompts, then calls of 2, 1, 1, 1, 1 tokens; longer than the window of 3."""
    module, params, sequences = Decoder(spec), random_params(spec), random_sequences()
    positions, valid = sequences.positions(), sequences.valid()
    cache, parts, slot = init_cache(module, 4, 11), [], 0
    for size in (5, 2, 1, 1, 1, 1):
        now = slice(slot, slot + size)
        hidden, cache = apply(
            module,
            params,
            sequences.tokens[:, now],
            positions[:, now],
            valid[:, now],
            cache=cache,
            slot=slot,
        )
        parts.append(np.asarray(hidden))
        slot += size
    assert cache is not None and cache.k.shape == (2, 4, 11, 2, 4)
    np.testing.assert_array_equal(cache.valid, valid)
    for row, real in enumerate(np.asarray(valid)):
        expected = row_alone(module, params, sequences, row)
        np.testing.assert_allclose(np.concatenate(parts, axis=1)[row][real], expected, atol=1e-5)


@pytest.mark.parametrize(("changed", "seen"), [(4, True), (3, False)])
def test_a_local_layer_sees_itself_and_two_before(changed: int, seen: bool) -> None:
    spec = dataclasses.replace(GEMMA, n_layers=1, layer_is_local=(True,))
    module, params = Decoder(spec), random_params(spec)
    tokens, positions = np.full((1, 7), 5, np.int32), np.arange(7, dtype=np.int32)[None]
    other = tokens.copy()
    other[0, changed] = 6
    a, b = (apply(module, params, t, positions, np.ones((1, 7), bool))[0][0, 6] for t in (tokens, other))
    assert (np.abs(a - b).max() > 1e-4) == seen


@BOTH
def test_no_token_sees_the_future(spec: ModelSpec) -> None:
    module, params = Decoder(spec), random_params(spec)
    tokens, positions = np.arange(7, dtype=np.int32)[None], np.arange(7, dtype=np.int32)[None]
    other = tokens.copy()
    other[0, 4] = 40
    a, b = (apply(module, params, t, positions, np.ones((1, 7), bool))[0][0] for t in (tokens, other))
    np.testing.assert_array_equal(a[:4], b[:4])
    assert np.abs(a[4:] - b[4:]).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_no_gradient(remat: str) -> None:
    params, sequences, grads = random_params(GEMMA), random_sequences(), {}
    for name in ("none", remat):
        module = Decoder(GEMMA, remat=name)

        def grad(params: Params, module: Decoder = module) -> Params:
            return jax.grad(lambda p: jnp.sin(hidden_of(module, p, sequences)).mean())(params)

        assert ("remat" in str(jax.make_jaxpr(grad)(params))) == (name != "none")
        grads[name] = jax.jit(grad)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads[remat], grads["none"])


def test_an_unknown_remat_is_refused() -> None:
    with pytest.raises(ValueError, match=r"remat 'some' is not one of \['dots', 'full', 'none'\]"):
        abstract_params(Decoder(LLAMA, remat="some"))


def test_shapes_that_differ_are_refused() -> None:
    tokens = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"one shape \[B, T\]; got \(2, 3\), \(2, 4\), \(2, 3\)"):
        apply(Decoder(LLAMA), {}, tokens, np.zeros((2, 4), np.int32), np.ones((2, 3), bool))


@BOTH
def test_bfloat16_computes_near_float32_with_float32_logits(spec: ModelSpec) -> None:
    params, sequences = random_params(spec), random_sequences()
    logits = {}
    for dtype in ("bfloat16", "float32"):
        module = Decoder(spec, dtype=dtype)
        hidden = hidden_of(module, params, sequences)
        assert hidden.dtype == jnp.dtype(dtype)
        logits[dtype] = unembed(module, params, hidden)
        assert logits[dtype].dtype == jnp.float32
    error = np.abs(logits["bfloat16"] - logits["float32"])[np.asarray(sequences.valid())]
    assert np.isfinite(error).all()
    assert 0 < error.mean() < 0.05 * np.abs(logits["float32"]).mean()


def test_new_parameters_in_bfloat16() -> None:
    params = init_params(Decoder(LLAMA, dtype="bfloat16", param_dtype="bfloat16"), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_soft_caps_bound_the_logits() -> None:
    capped = dataclasses.replace(LLAMA, final_logit_softcap=0.5)
    params, hidden = random_params(LLAMA), 10 * jax.random.normal(jax.random.key(0), (3, 16))
    logits = np.asarray(unembed(Decoder(LLAMA), params, hidden))
    assert np.abs(logits).max() > 2
    np.testing.assert_allclose(
        unembed(Decoder(capped), params, hidden), 0.5 * np.tanh(logits / 0.5), atol=1e-6
    )


@pytest.mark.parametrize(
    "spec",
    [
        LLAMA,
        GEMMA,
        dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True),
        dataclasses.replace(GEMMA, qkv_bias=True, tie_embeddings=False, n_layers=3, layer_is_local=()),
        dataclasses.replace(LLAMA, n_heads=2, n_kv_heads=1, head_dim=10, qk_norm=True),
    ],
)
def test_number_of_parameters_by_arithmetic_is_the_trees(spec: ModelSpec) -> None:
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(abstract_params(Decoder(spec)))]
    assert spec.num_params == sum(sizes)


def test_number_of_parameters_by_hand() -> None:
    # Embedding and head 48*16 each; a layer: q, o 16*4*4 each, k, v 16*2*4 each, MLP 3*16*32, two norms of 16.
    assert LLAMA.num_params == 2 * 768 + 2 * (2 * 256 + 2 * 128 + 1536 + 32) + 16


def test_linear_scaling_stretches_every_position() -> None:
    frequencies = rotary_frequencies(8, 10000.0, RopeScaling("linear", factor=4.0))
    np.testing.assert_allclose(frequencies, np.array([1, 0.1, 0.01, 0.001]) / 4, rtol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    scaling = RopeScaling(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    expected, kinds = [], []
    for i in range(32):
        frequency = 500000.0 ** (-2 * i / 64)
        wave = 2 * np.pi / frequency
        if wave < 8192 / 4:
            kinds.append("kept")
        elif wave > 8192 / 1:
            kinds.append("stretched")
            frequency /= 8
        else:
            kinds.append("between")
            part = (8192 / wave - 1) / (4 - 1)
            frequency = (1 - part) * frequency / 8 + part * frequency
        expected.append(frequency)
    assert set(kinds) == {"kept", "between", "stretched"}
    np.testing.assert_allclose(rotary_frequencies(64, 500000.0, scaling), expected, rtol=2e-5)


def test_rotation_is_multiplication_by_a_complex_number_of_length_one() -> None:
    rng = np.random.default_rng(0)
    x, angle = rng.normal(size=(2, 3, 2, 8)).astype(np.float32), rng.normal(size=(2, 3, 4))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, :, None]
    got = rotate(jnp.asarray(x), jnp.sin(jnp.asarray(angle)), jnp.cos(jnp.asarray(angle)))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
