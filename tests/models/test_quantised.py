"""Kernels in 8 bits: errors of weights and logits, gradients of an adapter, bytes, placement, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from distill_jax.models.adapter import AdapterConfig, merge_adapter
from distill_jax.models.decoder import Decoder, apply, init_params, unembed
from distill_jax.models.layers import Projection
from distill_jax.models.model import Model, load_model, save_model
from distill_jax.models.quantised import dequantise, has_quantised, is_quantised, quantise, weight_bytes
from distill_jax.models.spec import ModelSpec
from tests.models.small_models import GOLDENS, answers, exact_adapter

ADAPTER = AdapterConfig(rank=2, alpha=2.0)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def widened(params):
    """The same tree with kernels in float32 again."""
    return jax.tree.map(
        lambda leaf: dequantise(leaf) if is_quantised(leaf) else leaf, params, is_leaf=is_quantised
    )


@pytest.mark.parametrize(("shape", "inputs"), [((2, 16, 3, 4), 1), ((2, 3, 4, 16), 2), ((2, 12, 20), 1)])
def test_each_weight_is_off_by_half_a_step_of_its_channel_at_most(shape, inputs):
    rng = np.random.default_rng(0)
    # Channels of very different sizes, one of zeros: with one scale for all, the small ones would vanish.
    kernel = rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, shape[1 + inputs :])
    kernel[..., 0] = 0.0
    kernel = kernel.astype(np.float32)
    array = quantise(jnp.asarray(kernel), inputs)
    over = tuple(range(1, 1 + inputs))
    scale = np.abs(kernel).max(over, keepdims=True) / 127.5
    scale[scale == 0] = 1.0
    assert array.qvalue.dtype == jnp.int8 and array.scale.dtype == jnp.float32
    np.testing.assert_allclose(array.scale, scale, rtol=1e-6)
    error = np.abs(kernel - np.asarray(dequantise(array)))
    # 127.5 s is rounded to one part in 2^24 a few times: some 1e-4 of half an s.
    assert (error <= scale / 2 * (1 + 2e-4)).all()
    assert error.max() > 0
    by_hand, below = np.round(kernel / scale), np.abs(kernel / scale) < 127.4
    # The largest of a channel lies on a half, 127.5, and may go either way; no other may.
    assert 0.5 < below.mean() < 1.0
    np.testing.assert_array_equal(np.asarray(array.qvalue)[below], by_hand[below])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2"])
def test_logits_stay_close(name):
    """A weight drawn from a normal distribution, the largest of 32 about 2 standard deviations, is off by some 0.5% of
    one (s / sqrt(12)), so each product is; 7 products in each of 3 or 4 layers add up to about 2.5%, independent as
    they are. Twice that is the tolerance; a scale that belonged to another channel would give 100%."""
    tokens = answers(name)["tokens"]
    exact = np.asarray(load_model(GOLDENS / name).logits(tokens))
    rounded = np.asarray(load_model(GOLDENS / name, weights="int8").logits(tokens))
    relative = np.sqrt(((exact - rounded) ** 2).mean()) / exact.std()
    assert 0.001 < relative < 0.05


def test_bytes_are_a_quarter_where_the_layers_are_the_model(tmp_path):
    spec = ModelSpec(
        "llama", vocab_size=16, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=256
    )
    module = Decoder(spec)
    folder = save_model(Model(spec, init_params(module, jax.random.key(0)), None, module), tmp_path / "m")
    full, small = load_model(folder), load_model(folder, weights="int8")
    assert 0.25 < bytes_of(small.params) / bytes_of(full.params) < 0.29
    for model, weights in ((full, "full"), (small, "int8")):
        assert bytes_of(model.params) == weight_bytes(spec, "float32", weights)
    half = load_model(folder, dtype="bfloat16", weights="int8")
    assert bytes_of(half.params) == weight_bytes(spec, "bfloat16", "int8")
    # Rounded once, from the source: not from what bfloat16 had left of it.
    kernel = half.params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel.qvalue, small.params["layers"]["mlp"]["up"]["kernel"].qvalue)
    assert kernel.scale.dtype == jnp.float32
    tokens = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(half.logits(tokens), small.logits(tokens), atol=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_values_and_scales_are_cut_as_the_kernel_is(name, mesh_cube):
    tokens = np.concatenate([answers(name)["tokens"]] * 2)
    single = load_model(GOLDENS / name, weights="int8")
    sharded = load_model(GOLDENS / name, mesh_cube, weights="int8")
    jax.tree.map(np.testing.assert_array_equal, sharded.params, single.params)
    q, o = (sharded.params["layers"]["attn"][name]["kernel"] for name in "qo")
    assert q.qvalue.sharding.spec == jax.P(None, "fsdp", "tensor", None)
    assert q.scale.sharding.spec == jax.P(None, None, "tensor", None)
    assert o.qvalue.sharding.spec == jax.P(None, "tensor", None, "fsdp")
    assert o.scale.sharding.spec == jax.P(None, None, None, "fsdp")
    np.testing.assert_allclose(sharded.logits(tokens), single.logits(tokens), atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gradients_of_an_adapter_are_those_on_the_same_weights_in_float32(remat):
    model = load_model(GOLDENS / "gemma3_text", weights="int8")
    module = model.module.clone(remat=remat)
    tokens = answers("gemma3_text")["tokens"][:, :8]
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), tokens.shape)

    @jax.jit
    def gradient(params, adapter):
        def loss(adapter):
            hidden, _ = apply(module, params, tokens, positions, tokens >= 0, adapter=adapter)
            return jax.nn.logsumexp(unembed(module, params, hidden, adapter=adapter)).sum()

        return jax.grad(loss)(adapter)

    adapter = exact_adapter(module, ADAPTER)
    ours, theirs = gradient(model.params, adapter), gradient(widened(model.params), adapter)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(other).max() > 1e-4
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_backward_pass_keeps_the_8_bits():
    """What is saved between forward and backward pass is the kernel as it lies there, not what it was widened to."""
    layer = Projection((16,), (32,), ("embed",), ("mlp",))
    kernel = jax.tree.map(
        lambda leaf: leaf[0], quantise(jax.random.normal(jax.random.key(0), (1, 16, 32)), 1)
    )
    x = jax.random.normal(jax.random.key(1), (3, 16))

    def saved(kernel):
        _, back = jax.vjp(lambda x: layer.apply({"params": {"kernel": kernel}}, x, jnp.float32(1)), x)
        return {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(back)}

    assert ((16, 32), "float32") in saved(dequantise(kernel))  # the test can see it
    assert ((16, 32), "int8") in saved(kernel) and ((16, 32), "float32") not in saved(kernel)


def test_an_adapter_alone_is_saved_and_nothing_else(tmp_path):
    full, small = load_model(GOLDENS / "llama"), load_model(GOLDENS / "llama", weights="int8")
    assert has_quantised(small.params) and not has_quantised(full.params)
    adapter = exact_adapter(small.module, ADAPTER)
    with pytest.raises(ValueError, match=r"in 8 bits.*load it with weights='full'"):
        save_model(small, tmp_path / "merged", adapter)
    with pytest.raises(ValueError, match="in 8 bits"):
        save_model(small, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"not merged into weights of 8 bits \(layers.attn"):
        merge_adapter(small.params, adapter, 1.0)
    assert not list(tmp_path.iterdir())
    folders = [
        save_model(model, tmp_path / name, adapter, merge=False)
        for name, model in (("full", full), ("small", small))
    ]
    low, same = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert low.keys() == same.keys() and all((low[name] == same[name]).all() for name in low)
    assert json.loads((folders[0] / "adapter_config.json").read_text())["r"] == 2


def test_other_widths_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"weights must be one of \('full', 'int8'\), got 'int4'"):
        load_model(GOLDENS / "llama", weights="int4")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qwix" else found(name))
    with pytest.raises(
        ValueError, match=r"'qwix', which is not installed; run: pip install distill_jax\[int8\]"
    ):
        load_model(GOLDENS / "llama", weights="int8")
    assert dataclasses.is_dataclass(load_model(GOLDENS / "llama"))  # needs no such package
