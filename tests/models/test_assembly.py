"""Weights go from their files to the devices one layer at a time."""

from __future__ import annotations

import tracemalloc

import jax
import numpy as np
import pytest

from distill_jax.mesh import ShardingError
from distill_jax.models.assembly import assemble_params
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.model import Model, load_model, save_model
from distill_jax.models.spec import ModelSpec
from distill_jax.models.weights import get_at, weights_of

SPEC = ModelSpec("llama", 300, 128, 16, 4, 4, 32, 1024, tie_embeddings=False)


def layers_of(params, spec):
    for weight in weights_of(spec):
        value = np.asarray(get_at(params, weight.path))
        for index in range(spec.n_layers if weight.is_stacked else 1):
            yield weight, index, weight.to_stored(value[index] if weight.is_stacked else value)


def test_the_host_holds_less_than_a_shard_and_a_layer(tmp_path):
    """What numpy and the safetensors reader allocate; arrays on the devices are not Python's memory."""
    module = Decoder(SPEC)
    params = init_params(module, jax.random.key(0))
    layer = sum(leaf[0].nbytes for leaf in jax.tree.leaves(params["layers"]))
    folder = save_model(Model(SPEC, params, None, module), tmp_path / "m", max_shard_bytes=layer)
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) >= SPEC.n_layers
    load_model(folder)  # what is compiled once does not count
    tracemalloc.start()
    try:
        loaded = load_model(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    one_parameter = params["layers"]["mlp"]["gate"]["kernel"].nbytes
    assert peak < shard + layer < one_parameter


def test_any_order_gives_the_same_parameters(mesh_cube):
    params = init_params(Decoder(SPEC), jax.random.key(0))
    stored = list(layers_of(params, SPEC))
    np.random.default_rng(0).shuffle(stored)
    for mesh in (None, mesh_cube):
        again = assemble_params(Decoder(SPEC, mesh), stored)
        jax.tree.map(np.testing.assert_array_equal, again, params)
    up = again["layers"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == jax.P(None, "fsdp", "tensor")


def test_a_mesh_that_does_not_divide_is_found_before_anything_is_read(mesh_cube):
    def unread():
        raise AssertionError("a layer was read")
        yield

    odd = ModelSpec("llama", 300, 24, 2, 3, 3, 8, 16)
    with pytest.raises(ShardingError, match="heads"):
        assemble_params(Decoder(odd, mesh_cube), unread())


@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_every_floating_dtype_is_cast_on_the_way(stored):
    params = init_params(Decoder(SPEC), jax.random.key(0))
    layers = ((weight, index, array.astype(stored)) for weight, index, array in layers_of(params, SPEC))
    module = Decoder(SPEC, None, "bfloat16", param_dtype="bfloat16")
    again = assemble_params(module, layers)

    def compare(ours, theirs):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(ours, np.asarray(theirs).astype(stored).astype(ours.dtype))

    jax.tree.map(compare, again, params)
