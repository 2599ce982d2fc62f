"""One linen decoder for every family, as pure functions: `apply`, `unembed`, `init_params`, `init_cache`.

Layers are stacked and scanned (compile time and HLO do not grow with depth); the key/value cache goes in and comes out
explicitly, so a call is a pure function and can stand inside `lax.while_loop`. Differences between families are fields
of `ModelSpec`; local and global layers share one scanned body and differ by a scanned flag.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.mesh import constrain, place
from distill_jax.models.layers import Embedding, Projection, RMSNorm, rotary_frequencies, rotate
from distill_jax.models.spec import ModelSpec

Params = Any

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Large and finite: a row that may attend to nothing (padding) gets a uniform softmax instead of NaN.
MASKED_SCORE = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of past slots. k, v: [L, B, S, K, H]; positions: i32[B, S]; valid: bool[B, S]."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Attendable:
    """What every layer shares: rotary tables and masks, for global and for local layers."""

    sin: jax.Array  # f32[2, B, T, H/2]; index 0 global, 1 local
    cos: jax.Array
    mask: jax.Array  # bool[2, B, T, S]
    slot: jax.Array  # i32[], first cache slot of this call


class Attention(nn.Module):
    """Grouped-query attention over the tokens of this call, or over a cache."""

    spec: ModelSpec
    mesh: Mesh | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        layer: jax.Array,
        is_local: jax.Array,
        shared: _Attendable,
        scale: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        spec = self.spec
        n, k_heads, h = spec.n_heads, spec.n_kv_heads, spec.head_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name: str, heads: int, axis: str) -> jax.Array:
            out = ((heads, h), ("embed",), (axis, "head_dim"))
            layer_ = Projection((spec.d_model,), *out, use_bias=spec.qkv_bias, name=name, **types)  # type: ignore[arg-type]
            return layer_(x, scale)

        q, k, v = (
            project("q", n, "heads"),
            project("k", k_heads, "kv_heads"),
            project("v", k_heads, "kv_heads"),
        )
        if spec.qk_norm:
            q = RMSNorm(h, spec.norm_eps, spec.norm_offset, name="q_norm", **types)(q)
            k = RMSNorm(h, spec.norm_eps, spec.norm_offset, name="k_norm", **types)(k)
        which = is_local.astype(jnp.int32)
        sin, cos = shared.sin[which], shared.cos[which]
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)

        if cache is not None:
            keys, values = cache
            start = (layer, 0, shared.slot, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), start)
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), start)
            cache = (keys, values)
            k = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)

        query_scale = spec.query_scale if spec.query_scale is not None else h**-0.5
        b, t = q.shape[:2]
        q = (q * query_scale).astype(self.dtype).reshape(b, t, k_heads, n // k_heads, h)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k.astype(self.dtype), preferred_element_type=jnp.float32)
        if spec.attn_logit_softcap is not None:
            scores = jnp.tanh(scores / spec.attn_logit_softcap) * spec.attn_logit_softcap
        scores = jnp.where(shared.mask[which][:, None, None], scores, MASKED_SCORE)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v.astype(self.dtype)).reshape(b, t, n, h)
        out = Projection((n, h), (spec.d_model,), ("heads", "head_dim"), ("embed",), name="o", **types)  # type: ignore[arg-type]
        return out(mixed, scale), cache


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    spec: ModelSpec
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        spec = self.spec
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        wide = ((spec.d_model,), (spec.d_ff,), ("embed",), ("mlp",))
        gate = Projection(*wide, name="gate", **types)(x, scale)  # type: ignore[arg-type]
        up = Projection(*wide, name="up", **types)(x, scale)  # type: ignore[arg-type]
        act = jax.nn.silu(gate) if spec.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        narrow = ((spec.d_ff,), (spec.d_model,), ("mlp",), ("embed",))
        return Projection(*narrow, name="down", **types)(act * up, scale)  # type: ignore[arg-type]


class Layer(nn.Module):
    """Attention and MLP with their norms; the body of the scan over layers."""

    spec: ModelSpec
    mesh: Mesh | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, tuple[jax.Array, jax.Array] | None],
        scanned: tuple[jax.Array, jax.Array],
        shared: _Attendable,
        scale: jax.Array,
    ) -> tuple[tuple[jax.Array, tuple[jax.Array, jax.Array] | None], None]:
        x, cache = carry
        layer, is_local = scanned
        spec, types = self.spec, {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str, value: jax.Array) -> jax.Array:
            return RMSNorm(spec.d_model, spec.norm_eps, spec.norm_offset, name=name, **types)(value)

        attention = Attention(spec, self.mesh, name="attn", **types)
        out, cache = attention(norm("attn_norm", x), cache, layer, is_local, shared, scale)
        x = x + (norm("post_attn_norm", out) if spec.post_norms else out)
        out = MLP(spec, name="mlp", **types)(norm("mlp_norm", x), scale)
        x = x + (norm("post_mlp_norm", out) if spec.post_norms else out)
        return (constrain(x, self.mesh, ("batch", None, None)), cache), None


class Decoder(nn.Module):
    """The decoder. Use the functions of this file; this class only holds what they need.

    Attributes:
      spec: the model in numbers.
      mesh: where activations are constrained to; None leaves it to the compiler.
      dtype: compute dtype by name; norms, attention scores, softmax and logits are float32 whatever it is.
      param_dtype: dtype of new parameters.
      remat: "none", "full" (save only layer inputs) or "dots" (save matrix products without batch dimensions).
    """

    spec: ModelSpec
    mesh: Mesh | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def setup(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is not one of {sorted(REMAT_POLICIES)}")
        spec, dtype, param_dtype = self.spec, jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)
        init = nn.initializers.normal(spec.d_model**-0.5)
        self.embed = Embedding(spec.vocab_size, spec.d_model, self.mesh, init, param_dtype)
        body = Layer
        if self.remat != "none":
            body = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        self.layers = nn.scan(
            body,
            variable_axes={"params": 0, "adapter": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=spec.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(spec, self.mesh, dtype, param_dtype)
        self.final_norm = RMSNorm(spec.d_model, spec.norm_eps, spec.norm_offset, dtype, param_dtype)
        if not spec.tie_embeddings:
            self.head = Projection(
                (spec.d_model,),
                (spec.vocab_size,),
                ("embed",),
                ("vocab",),
                dtype=dtype,
                param_dtype=param_dtype,
                out_dtype=jnp.float32,
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: Cache | None,
        slot: jax.Array,
        scale: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        spec = self.spec
        x = self.embed(tokens).astype(self.dtype)
        if spec.embed_scale:
            x = x * jnp.asarray(spec.d_model**0.5, x.dtype)
        x = constrain(x, self.mesh, ("batch", None, None))

        key_positions, key_valid = positions, valid
        if cache is not None:
            key_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, slot))
            key_valid = jax.lax.dynamic_update_slice(cache.valid, valid, (0, slot))
        shared = _attendable(spec, positions, key_positions, key_valid, slot)
        is_local = jnp.array(spec.layer_is_local or (False,) * spec.n_layers)
        kv = None if cache is None else (cache.k, cache.v)
        (x, kv), _ = self.layers((x, kv), (jnp.arange(spec.n_layers), is_local), shared, scale)
        if cache is not None and kv is not None:
            cache = Cache(kv[0], kv[1], key_positions, key_valid)
        return self.final_norm(x), cache

    def unembed(self, hidden: jax.Array, scale: jax.Array) -> jax.Array:
        if self.spec.tie_embeddings:
            logits = self.embed.attend(hidden, jnp.dtype(self.dtype))
        else:
            logits = self.head(hidden, scale)
        if self.spec.final_logit_softcap is not None:
            logits = jnp.tanh(logits / self.spec.final_logit_softcap) * self.spec.final_logit_softcap
        return logits

    def initialise(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter once."""
        ones = jnp.ones_like(tokens)
        hidden, _ = self(tokens, ones, ones == 1, None, jnp.int32(0), jnp.float32(0))
        return self.unembed(hidden, jnp.float32(0))


def _attendable(
    spec: ModelSpec, positions: jax.Array, key_positions: jax.Array, key_valid: jax.Array, slot: jax.Array
) -> _Attendable:
    """Rotary tables and masks of this call, [global, local] stacked."""
    frequencies = [rotary_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)]
    distance = positions[:, :, None] - key_positions[:, None, :]
    masks = [key_valid[:, None, :] & (distance >= 0)]
    if any(spec.layer_is_local):
        assert spec.sliding_window is not None
        theta = spec.rope_theta_local if spec.rope_theta_local is not None else spec.rope_theta
        local_scaling = spec.rope_scaling if spec.rope_theta_local is None else None
        frequencies.append(rotary_frequencies(spec.head_dim, theta, local_scaling))
        masks.append(masks[0] & (distance < spec.sliding_window))
    angles = positions.astype(jnp.float32)[None, :, :, None] * jnp.stack(frequencies)[:, None, None, :]
    return _Attendable(jnp.sin(angles), jnp.cos(angles), jnp.stack(masks), slot)


def _boxed(module: Decoder) -> Params:
    return jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32), method="initialise"), jax.random.key(0)
    )["params"]


def abstract_params(module: Decoder) -> Params:
    """The parameter tree as ShapeDtypeStructs (with shardings when the module has a mesh)."""
    shapes = nn.meta.unbox(_boxed(module))
    return shapes if module.mesh is None else place(shapes, param_axes(module), module.mesh)


def param_axes(module: Decoder) -> Params:
    """The parameter tree with a tuple of logical axes for each leaf."""
    return jax.tree.map(
        lambda box: box.names, _boxed(module), is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def init_params(module: Decoder, key: jax.Array) -> Params:
    """New random parameters, made on the mesh by one jitted call."""

    def init(key: jax.Array) -> Params:
        return nn.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32), method="initialise")["params"])

    shardings = None
    if module.mesh is not None:
        shardings = jax.tree.map(lambda s: s.sharding, abstract_params(module))
    return jax.jit(init, out_shardings=shardings)(key)


def _variables(params: Params, adapter: Params | None) -> dict[str, Params]:
    return {"params": params} if adapter is None else {"params": params, "adapter": adapter}


def apply(
    module: Decoder,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
    cache: Cache | None = None,
    slot: int | jax.Array = 0,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states after the final norm.

    Args:
      tokens, positions: i32[B, T]; valid: bool[B, T], which of them are real.
      adapter: low-rank adapter tree; `scale` multiplies its product (see `adapter.adapter_scale`).
      cache: keys and values of earlier calls; this call's go into slots slot..slot+T-1, and attention sees every valid
        slot whose position is not after the query's (and inside the window on local layers).

    Returns:
      (hidden: dtype[B, T, D], the new cache or None).
    """
    if tokens.ndim != 2 or tokens.shape != positions.shape or tokens.shape != valid.shape:
        raise ValueError(
            "tokens, positions and valid must have one shape [B, T]; got "
            f"{tokens.shape}, {positions.shape}, {valid.shape}"
        )
    variables = _variables(params, adapter)
    slot_, scale_ = jnp.asarray(slot, jnp.int32), jnp.asarray(scale, jnp.float32)
    return module.apply(variables, tokens, positions, valid, cache, slot_, scale_)


def unembed(
    module: Decoder,
    params: Params,
    hidden: jax.Array,
    *,
    adapter: Params | None = None,
    scale: float | jax.Array = 1.0,
) -> jax.Array:
    """f32[..., V] logits of hidden states [..., D], soft cap applied."""
    variables = _variables(params, adapter)
    return module.apply(variables, hidden, jnp.asarray(scale, jnp.float32), method="unembed")


def init_cache(module: Decoder, batch: int, size: int) -> Cache:
    """An empty cache of `size` slots for `batch` rows, in the compute dtype."""
    spec = module.spec
    shape = (spec.n_layers, batch, size, spec.n_kv_heads, spec.head_dim)
    axes = (None, "batch", None, "kv_heads", None)
    k = constrain(jnp.zeros(shape, module.dtype), module.mesh, axes)
    v = constrain(jnp.zeros(shape, module.dtype), module.mesh, axes)
    return Cache(k, v, jnp.zeros((batch, size), jnp.int32), jnp.zeros((batch, size), bool))
