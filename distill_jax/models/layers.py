"""What layers are made of: projections with low-rank adapters, RMS norms, the embedding table, rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.mesh import constrain
from distill_jax.models.quantised import dequantise, is_quantised
from distill_jax.models.spec import RopeScaling


def _expand(weight: jax.Array, like: jax.Array) -> jax.Array:
    """Leading dimensions of size 1, so that `weight` lines up with the last dimensions of `like`."""
    return weight.reshape((1,) * (like.ndim - weight.ndim) + weight.shape)


class Projection(nn.Module):
    """x[..., *in] -> y[..., *out]; with an adapter: y + scale * (x a) b, the product a b never being built.

    The kernel may be one of `quantised.quantise`: frozen, and widened here. The operands are of `dtype`, and so is y
    unless `out_dtype` says otherwise.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        n_in, n_out = len(self.in_shape), len(self.out_shape)
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(n_in)),
            out_axis=tuple(range(n_in, n_in + n_out)),
        )
        kernel = self.param(
            "kernel",
            nn.with_partitioning(init, self.in_axes + self.out_axes),
            self.in_shape + self.out_shape,
            self.param_dtype,
        )

        out_dtype = self.dtype if self.out_dtype is None else self.out_dtype

        def contract(value: jax.Array, weight: jax.Array, dims: int) -> jax.Array:
            # As one matrix product: with more dimensions XLA on CPU computes parts of the backward pass again into
            # transposed copies (1.65 times the time of a training step).
            lead, out = value.shape[: value.ndim - dims], weight.shape[dims:]
            rows = value.astype(self.dtype).reshape(math.prod(lead), -1)
            kernel = weight.astype(self.dtype).reshape(rows.shape[1], -1)
            return jnp.matmul(rows, kernel, preferred_element_type=out_dtype).reshape(*lead, *out)

        if is_quantised(kernel):
            # Checkpointed, so that a backward pass keeps the 8 bits and not what they were widened to.
            wide = jax.checkpoint(lambda x, kernel: contract(x, dequantise(kernel), n_in), prevent_cse=False)
            y = wide(x, kernel)
        else:
            y = contract(x, kernel, n_in)
        if self.has_variable("adapter", "a"):
            low = contract(x, self.get_variable("adapter", "a"), n_in)
            delta = contract(low, self.get_variable("adapter", "b"), 1)
            y = y + delta * scale.astype(out_dtype)
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_partitioning(nn.initializers.zeros, self.out_axes),
                self.out_shape,
                self.param_dtype,
            )
            y = y + _expand(bias.astype(out_dtype), y)
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale), computed in float32."""

    size: int
    eps: float
    offset: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def init(_key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jnp.full(shape, 1.0 - self.offset, dtype)

        scale = self.param("scale", nn.with_partitioning(init, ("norm",)), (self.size,), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        weight = self.offset + scale.astype(jnp.float32)
        return (normed * _expand(weight, normed)).astype(self.dtype)


class Embedding(nn.Module):
    """Token embeddings [V, D]: looked up by id, and the output head of a tied model."""

    vocab_size: int
    d_model: int
    mesh: Mesh | None
    initializer: Any
    param_dtype: Any

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            nn.with_partitioning(self.initializer, ("vocab", "embed")),
            (self.vocab_size, self.d_model),
            self.param_dtype,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Gathered over fsdp before the look-up, as every other weight is; else the compiler would replicate the rows.
        return jnp.take(constrain(self.embedding, self.mesh, ("vocab", None)), tokens, axis=0)

    def attend(self, hidden: jax.Array, dtype: Any) -> jax.Array:
        table = self.embedding.astype(dtype)
        return jnp.einsum("...d,vd->...v", hidden.astype(dtype), table, preferred_element_type=jnp.float32)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """f32[H/2] angular frequencies theta^(-2i/H), stretched by `scaling`."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotary embedding, halves convention. x: [B, T, heads, H]; sin, cos: f32[B, T, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = sin[:, :, None, :], cos[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
