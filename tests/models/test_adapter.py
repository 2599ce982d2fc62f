"""Adapters: applied beside the weights, merged into them, scaled by one number, cut as their kernels are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax.mesh import place
from distill_jax.models.adapter import (
    AdapterConfig,
    adapter_axes,
    adapter_scale,
    blend_adapters,
    init_adapter,
    merge_adapter,
)
from distill_jax.models.decoder import Decoder, Params, apply, init_params, param_axes, unembed
from distill_jax.models.spec import ModelSpec

UNTIED = ModelSpec(
    "qwen2",
    vocab_size=48,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_ff=40,
    qkv_bias=True,
    tie_embeddings=False,
)
TIED = dataclasses.replace(UNTIED, tie_embeddings=True)
ALL = AdapterConfig(rank=2, alpha=6.0, targets=("attn", "mlp", "head"))
TOKENS = np.random.default_rng(0).integers(0, 48, (4, 7)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(
    module: Decoder, params: Params, adapter: Params | None = None, scale: float | jax.Array = 1.0
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (4, 7))
    valid = jnp.ones((4, 7), bool)
    hidden, _ = apply(module, params, TOKENS, positions, valid, adapter=adapter, scale=scale)
    return unembed(module, params, hidden, adapter=adapter, scale=scale)


def random_adapter(module: Decoder, config: AdapterConfig) -> Params:
    """B is zero in a new adapter; here it is random."""
    adapter = init_adapter(module, config, jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(adapter)))
    tree = jax.tree.unflatten(jax.tree.structure(adapter), list(keys))
    return jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), adapter, tree)


def test_a_new_adapter_changes_nothing_and_has_a_gradient() -> None:
    module = Decoder(UNTIED)
    params = init_params(module, jax.random.key(0))
    adapter = init_adapter(module, ALL, jax.random.key(1))
    np.testing.assert_allclose(logits_of(module, params, adapter, 3.0), logits_of(module, params), atol=1e-6)
    grads = jax.jit(jax.grad(lambda a: jnp.sin(logits_of(module, params, a)).sum()))(adapter)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # B is zero, so at first only B learns.
        assert (np.abs(grad).max() > 1e-3) == (path[-1].key == "b"), path


def test_shapes_follow_the_kernels_inputs_and_outputs() -> None:
    adapter = init_adapter(Decoder(UNTIED), ALL, jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, adapter)
    assert shapes["layers"]["attn"]["q"] == {"a": (2, 16, 2), "b": (2, 2, 4, 6)}
    assert shapes["layers"]["attn"]["v"] == {"a": (2, 16, 2), "b": (2, 2, 2, 6)}
    assert shapes["layers"]["attn"]["o"] == {"a": (2, 4, 6, 2), "b": (2, 2, 16)}
    assert shapes["layers"]["mlp"]["down"] == {"a": (2, 40, 2), "b": (2, 2, 16)}
    assert shapes["head"] == {"a": (16, 2), "b": (2, 48)}
    assert set(adapter["layers"]["attn"]) == {"q", "k", "v", "o"}
    mlp_only = init_adapter(Decoder(UNTIED), AdapterConfig(1, 1.0, ("mlp",)), jax.random.key(0))
    assert set(mlp_only) == {"layers"} and set(mlp_only["layers"]) == {"mlp"}


def test_new_a_has_variance_one_over_fan_in() -> None:
    spec = dataclasses.replace(UNTIED, d_model=64, n_heads=8, n_kv_heads=8, head_dim=16)
    adapter = init_adapter(Decoder(spec), AdapterConfig(32, 1.0), jax.random.key(0))["layers"]
    # 2 * 64 * 32 and 2 * 128 * 32 draws: the standard error of a deviation is about 1%.
    assert np.std(adapter["attn"]["q"]["a"]) == pytest.approx(64**-0.5, rel=0.06)
    assert np.std(adapter["attn"]["o"]["a"]) == pytest.approx(128**-0.5, rel=0.06)


def test_merging_one_matrix_by_hand() -> None:
    params = {
        "head": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.zeros(2)},
        "rest": jnp.ones(1),
    }
    adapter = {"head": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[10.0, 100.0]])}}
    merged = merge_adapter(params, adapter, 0.5)
    np.testing.assert_allclose(merged["head"]["kernel"], [[6.0, 52.0], [13.0, 104.0]])
    assert merged["rest"] is params["rest"] and merged["head"]["bias"] is params["head"]["bias"]
    np.testing.assert_allclose(params["head"]["kernel"], [[1, 2], [3, 4]])


@pytest.mark.parametrize("target", [("attn",), ("mlp",), ("head",), ("attn", "mlp", "head")])
def test_merged_is_applied(target: tuple[str, ...]) -> None:
    module, config = Decoder(UNTIED), AdapterConfig(2, 6.0, target)
    params, adapter = init_params(module, jax.random.key(0)), random_adapter(module, config)
    plain = logits_of(module, params)
    for scale in (-1.0, 0.0, 0.5, 2.0):
        applied = logits_of(module, params, adapter, scale)
        merged = logits_of(module, merge_adapter(params, adapter, scale))
        np.testing.assert_allclose(applied, merged, atol=1e-5)
        assert (np.abs(applied - plain).max() > 1e-2) == (scale != 0)


def test_the_attention_output_adapter_sums_over_heads_and_their_width() -> None:
    module, config = Decoder(UNTIED), AdapterConfig(2, 6.0, ("attn",))
    params, adapter = init_params(module, jax.random.key(0)), random_adapter(module, config)
    low = adapter["layers"]["attn"]["o"]
    merged = merge_adapter(params, adapter, 0.7)["layers"]["attn"]["o"]["kernel"]
    delta = 0.7 * np.einsum("lnhr,lrd->lnhd", low["a"], low["b"])
    np.testing.assert_allclose(merged, params["layers"]["attn"]["o"]["kernel"] + delta, atol=1e-6)


def test_merging_keeps_the_dtype_of_the_weights() -> None:
    module = Decoder(UNTIED, param_dtype="bfloat16")
    params, adapter = init_params(module, jax.random.key(0)), random_adapter(module, ALL)
    merged = merge_adapter(params, adapter, 1.0)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_sharded_is_unsharded(mesh_cube: Mesh, mesh_single: Mesh) -> None:
    params, adapter = init_params(Decoder(UNTIED), jax.random.key(0)), random_adapter(Decoder(UNTIED), ALL)
    results = []
    for mesh in (mesh_cube, mesh_single):
        module = Decoder(UNTIED, mesh)
        placed = place(params, param_axes(module), mesh)
        low = place(adapter, adapter_axes(module, ALL), mesh, "adapter")
        results.append(jax.jit(lambda p, a, m=module: logits_of(m, p, a, 0.5))(placed, low))
        new = init_adapter(module, ALL, jax.random.key(1))
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding.spec, b.sharding.spec), new, low)
        pieces = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, low)
        if mesh is mesh_cube:  # D over fsdp, heads and the vocabulary over tensor, the rank whole
            assert pieces["layers"]["attn"]["q"] == {"a": (2, 8, 2), "b": (2, 2, 2, 6)}
            assert pieces["layers"]["attn"]["o"] == {"a": (2, 2, 6, 2), "b": (2, 2, 8)}
            assert pieces["head"] == {"a": (8, 2), "b": (2, 24)}
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_the_dial_is_one_traced_number() -> None:
    module = Decoder(UNTIED)
    params, adapter = init_params(module, jax.random.key(0)), random_adapter(module, ALL)
    traces = []

    @jax.jit
    def run(scale: jax.Array) -> jax.Array:
        traces.append(scale)
        return logits_of(module, params, adapter, scale)

    outputs = [run(adapter_scale(ALL, knob)) for knob in (0.0, 0.25, 1.0)]
    assert len(traces) == 1
    np.testing.assert_allclose(outputs[0], logits_of(module, params), atol=1e-6)
    np.testing.assert_allclose(
        outputs[2], logits_of(module, params, adapter, 3.0), atol=1e-5
    )  # alpha / rank = 3
    assert np.abs(outputs[1] - outputs[2]).max() > 1e-2


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of loops and inner calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


def test_the_product_a_b_is_never_built() -> None:
    module = Decoder(UNTIED)
    params, adapter = init_params(module, jax.random.key(0)), random_adapter(module, ALL)
    # Elements of the kernels of a layer, of a stack of layers, and of the head; none is an activation's size.
    sizes = {n * layers for n in (16 * 4 * 6, 16 * 2 * 6, 16 * 40) for layers in (1, 2)} | {16 * 48}

    def built(function: Any) -> list[int]:
        jaxpr = jax.make_jaxpr(function)(params, adapter).jaxpr
        made = [v.aval.size for e in equations(jaxpr) if e.primitive.name == "dot_general" for v in e.outvars]
        assert made, "the matrix products inside the scan are seen"
        return [size for size in made if size in sizes]

    assert built(lambda p, a: logits_of(module, p, a, 0.5)) == []
    assert (
        len(built(lambda p, a: logits_of(module, merge_adapter(p, a, 0.5)))) == 8
    )  # what this test looks for


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match="'head' needs an untied head"):
        init_adapter(Decoder(TIED), ALL, jax.random.key(0))
    with pytest.raises(ValueError, match="'head' needs an untied head"):
        adapter_axes(Decoder(TIED), ALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, "rank must be at least 1, got 0"),
        ({"rank": 1, "alpha": 1.0, "targets": ("attn", "embed")}, r"targets must be some of .*'embed'"),
        ({"rank": 1, "alpha": 1.0, "targets": ()}, "targets must be some of"),
    ],
)
def test_bad_configs_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**arguments)


def test_a_blend_of_adapters_is_the_blend_of_their_products() -> None:
    """W + s (.3 A1 B1 - 1.2 A2 B2), adapters of different ranks; mixing the factors would be another model."""
    module = Decoder(UNTIED)
    params = init_params(module, jax.random.key(0))
    one = random_adapter(module, ALL)
    two = jax.tree.map(lambda x: jnp.cos(3.0 * x), random_adapter(module, dataclasses.replace(ALL, rank=3)))
    blend = blend_adapters([(one, 0.3), (two, -1.2)])
    assert blend["layers"]["attn"]["o"]["a"].shape == (2, 4, 6, 5) and blend["head"]["b"].shape == (5, 48)
    merged = merge_adapter(merge_adapter(params, one, 0.3 * 0.5), two, -1.2 * 0.5)
    direct = merge_adapter(params, blend, 0.5)
    for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(
        logits_of(module, params, blend, 0.5), logits_of(module, merged), rtol=2e-4, atol=2e-4
    )
    alone = blend_adapters([(one, 1.0)])
    assert all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (alone, one)), strict=True))


def test_adapters_that_cannot_be_blended() -> None:
    module = Decoder(UNTIED)
    one = init_adapter(module, ALL, jax.random.key(0))
    two = init_adapter(module, dataclasses.replace(ALL, targets=("attn",)), jax.random.key(0))
    with pytest.raises(ValueError, match="different kernels"):
        blend_adapters([(one, 1.0), (two, 1.0)])
    with pytest.raises(ValueError, match="parts is empty"):
        blend_adapters([])
