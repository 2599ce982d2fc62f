"""The parameter tree from the layers of a file, one at a time, straight into the shardings of the mesh.

What is stacked over layers is made on the devices, empty, and each layer is written to its place there as it is read;
the host holds the layer that is on its way and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from distill_jax.mesh import place
from distill_jax.models.decoder import Decoder, Params, abstract_params, param_axes
from distill_jax.models.quantised import quantise
from distill_jax.models.weights import Weight, get_at, nest_at


def assemble_params(
    module: Decoder, stored: Iterable[tuple[Weight, int, np.ndarray]], weights: str = "full"
) -> Params:
    """The parameter tree of a decoder.

    Args:
      module: its `param_dtype` is the dtype of the result and its mesh, if any, where it is put.
      stored: every (weight, layer, that layer in the layout of files), each once and in any order: the order of the
        files keeps reading sequential. Any floating dtypes; they are cast on the device. Consumed one by one.
      weights: "int8" keeps the layers' kernels in 8 bits (see `quantised`); a layer is on the device in full only
        while it is made, in float32, so that it is rounded once.

    Raises:
      ShardingError: a dimension that the mesh does not divide (before anything is read).
    """
    shapes, axes = abstract_params(module), param_axes(module)
    if module.mesh is not None:
        place(shapes, axes, module.mesh)
    found: dict[tuple[str, ...], Any] = {}
    for weight, index, array in stored:
        layer = weight.from_stored(array, get_at(shapes, weight.path).shape)
        layout = get_at(axes, weight.path)
        if not weight.is_stacked:
            found[weight.path] = _put(module, weight, layer, layout).astype(module.param_dtype)
            continue
        piece = _put(module, weight, layer[None], layout)
        if weights == "int8" and weight.inputs:
            piece = quantise(piece, weight.inputs, layout, module.mesh)
        else:
            piece = piece.astype(module.param_dtype)
        if weight.path not in found:
            found[weight.path] = jax.tree.map(functools.partial(_empty, module.spec.n_layers), piece)
        written = jax.tree.map(functools.partial(_written, index), found[weight.path], piece)
        # Transfers are asynchronous and keep what they read from: without a wait the host would hold many layers.
        found[weight.path] = jax.block_until_ready(written)
    return _nested(found)


def _put(module: Decoder, weight: Weight, array: np.ndarray, layout: tuple[str | None, ...]) -> jax.Array:
    if module.mesh is None:
        return jnp.asarray(array)
    return get_at(place(nest_at(weight.path, array), nest_at(weight.path, layout), module.mesh), weight.path)


def _empty(n_layers: int, piece: jax.Array) -> jax.Array:
    return jnp.zeros((n_layers, *piece.shape[1:]), piece.dtype, device=piece.sharding)


def _written(index: int, stack: jax.Array, piece: jax.Array) -> jax.Array:
    return _writer(stack.sharding)(stack, piece, index)


@functools.cache
def _writer(sharding: Sharding) -> Any:
    def write(stack: jax.Array, piece: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, piece, index, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _nested(found: dict[tuple[str, ...], Any]) -> Params:
    params: dict[str, Any] = {}
    for path, value in found.items():
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return params
