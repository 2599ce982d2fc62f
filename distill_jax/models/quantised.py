"""Frozen weights in 8 bits: the layers' kernels as int8 and one float32 scale an output channel, by the package qwix.

    s[n] = max_k |w[k, n]| / 127.5        q = round(w / s) in -128..127        w ~ q s,  |w - q s| <= s / 2

Weights alone: activations keep their dtype. A kernel is widened inside the program that uses it and again in its
backward pass, one layer at a time, so what lies on the device is int8 throughout. Embedding, head, biases and norms
stay as they are: they are a small part of a large model, and errors in the head go straight into the logits.

Source: weight-only quantisation with channelwise scales by the largest magnitude, github.com/google/qwix (0.1.8).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.mesh import named_sharding
from distill_jax.models.spec import ModelSpec

WEIGHTS = ("full", "int8")


def check_weights(weights: str) -> None:
    """Raises ValueError for what is not one of `WEIGHTS`, and for "int8" without the package that does it."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    if weights == "int8" and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            "weights='int8' needs the package 'qwix', which is not installed; run: pip install distill_jax[int8]"
        )


def _qwix() -> Any:
    return importlib.import_module("qwix")  # optional, so never at the top of a file


def is_quantised(leaf: Any) -> bool:
    """Whether a kernel is one of `quantise`."""
    return hasattr(leaf, "qvalue")


def has_quantised(params: Any) -> bool:
    """Whether any kernel of a parameter tree is."""
    return any(map(is_quantised, jax.tree.leaves(params, is_leaf=is_quantised)))


def quantise(
    kernel: jax.Array, inputs: int, axes: tuple[str | None, ...] | None = None, mesh: Mesh | None = None
) -> Any:
    """A stacked kernel in 8 bits.

    Args:
      kernel: [L, *in, *out], floating.
      inputs: number of input dimensions.
      axes, mesh: logical axes of the kernel and where it lies; both parts are cut as the kernel is.

    Returns:
      qwix.QArray with qvalue: i8[L, *in, *out] and scale: f32[L, 1, ..., *out].
    """
    channels = (0, *range(1 + inputs, kernel.ndim))
    shardings = None
    if mesh is not None:
        assert axes is not None
        of_scale = tuple(name if place in channels else None for place, name in enumerate(axes))
        shardings = (named_sharding(mesh, axes), named_sharding(mesh, of_scale))
    qvalue, scale = _split(channels, shardings)(kernel)
    return _qwix().QArray(qvalue, scale)


@functools.cache
def _split(channels: tuple[int, ...], shardings: Any) -> Any:
    def split(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = kernel.astype(jnp.float32)  # a scale in 16 bits would be an error of its own
        array = _qwix().quantize(whole, jnp.int8, channelwise_axes=channels)
        return array.qvalue, array.scale

    return jax.jit(split, out_shardings=shardings)


def dequantise(kernel: Any) -> jax.Array:
    """f32, of the kernel's shape."""
    return _qwix().dequantize(kernel)


def kernel_bytes(spec: ModelSpec) -> int:
    """Bytes of the layers' kernels in 8 bits, scales included, by arithmetic."""
    d, heads, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    channels = heads + 2 * kv + d + 2 * spec.d_ff + d
    return kernel_count(spec) + 4 * spec.n_layers * channels


def kernel_count(spec: ModelSpec) -> int:
    """Numbers in the layers' kernels."""
    attention = spec.d_model * spec.head_dim * (2 * spec.n_heads + 2 * spec.n_kv_heads)
    return spec.n_layers * (attention + 3 * spec.d_model * spec.d_ff)


def weight_bytes(spec: ModelSpec, dtype: str, weights: str) -> int:
    """Bytes of a model's weights in `dtype`, its layers' kernels in 8 bits with weights="int8"."""
    width = jnp.dtype(dtype).itemsize
    if weights == "full":
        return spec.num_params * width
    return (spec.num_params - kernel_count(spec)) * width + kernel_bytes(spec)
