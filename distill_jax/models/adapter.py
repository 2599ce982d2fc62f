"""Low-rank adapters: W + scale * A B, kept beside the weights and scaled by one number.

Source: LoRA, arXiv 2106.09685. A is random, B is zero, so a new adapter changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.mesh import place
from distill_jax.models.decoder import Decoder, Params, abstract_params, param_axes
from distill_jax.models.quantised import is_quantised

TARGETS = ("attn", "mlp", "head")
# Number of input dimensions of each kernel (the leading "layers" dimension not counted).
_INPUT_DIMENSIONS = {"o": 2}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """rank: R; alpha: the product A B is multiplied by alpha / rank; targets: any of "attn", "mlp", "head"."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("attn", "mlp")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter rank must be at least 1, got {self.rank}")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise ValueError(f"adapter targets must be some of {TARGETS}, got {self.targets}")


def adapter_scale(config: AdapterConfig, knob: float | jax.Array = 1.0) -> float | jax.Array:
    """What the decoder multiplies A B by when the dial stands at `knob`: knob * alpha / rank."""
    return knob * config.alpha / config.rank


def _kernels(module: Decoder, config: AdapterConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path of each adapted projection -> its kernel's shape."""
    if "head" in config.targets and module.spec.tie_embeddings:
        raise ValueError("adapter target 'head' needs an untied head; this model's head is its embedding")
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(module)):
        names = tuple(key.key for key in path)
        if names[-1] == "kernel" and any(target in names for target in config.targets):
            found[names[:-1]] = leaf.shape
    return found


def _split(path: tuple[str, ...]) -> tuple[int, int]:
    """(number of stacked dimensions, number of input dimensions) of a kernel."""
    return int(path[0] == "layers"), _INPUT_DIMENSIONS.get(path[-1], 1)


def _nest(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def init_adapter(module: Decoder, config: AdapterConfig, key: jax.Array) -> Params:
    """A new adapter: {"layers": {"attn": {"q": {"a": [L, D, R], "b": [L, R, N, H]}, ...}}}, f32.

    A is normal with variance 1 / fan_in, B zero. Made on the module's mesh.

    Raises:
      ValueError: target "head" on a model whose head is its embedding.
      ShardingError: a dimension does not divide by the mesh axes it is laid on.
    """

    def init(key: jax.Array) -> Params:
        flat: dict[tuple[str, ...], Any] = {}
        for index, (path, shape) in enumerate(_kernels(module, config).items()):
            stacked, inputs = _split(path)
            layers, fan_in, out = (
                shape[:stacked],
                shape[stacked : stacked + inputs],
                shape[stacked + inputs :],
            )
            draw = jax.random.normal(
                jax.random.fold_in(key, index), (*layers, *fan_in, config.rank), jnp.float32
            )
            flat[(*path, "a")] = draw / math.sqrt(math.prod(fan_in))
            flat[(*path, "b")] = jnp.zeros((*layers, config.rank, *out), jnp.float32)
        return _nest(flat)

    if module.mesh is None:
        return jax.jit(init)(key)
    abstract = place(jax.eval_shape(init, key), adapter_axes(module, config), module.mesh, "adapter")
    return jax.jit(init, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))(key)


def adapter_axes(module: Decoder, config: AdapterConfig) -> Params:
    """The adapter tree with logical axes; A and B are cut as the kernel's own input and output dimensions are."""
    axes_of = param_axes(module)
    flat: dict[tuple[str, ...], Any] = {}
    for path in _kernels(module, config):
        node = axes_of
        for name in path:
            node = node[name]
        stacked, inputs = _split(path)
        axes = node["kernel"]
        flat[(*path, "a")] = (*axes[: stacked + inputs], "rank")
        flat[(*path, "b")] = (*axes[:stacked], "rank", *axes[stacked + inputs :])
    return _nest(flat)


def merge_adapter(params: Params, adapter: Params, scale: float | jax.Array) -> Params:
    """params with every adapted kernel replaced by kernel + scale * A B, in the kernel's dtype.

    Raises:
      ValueError: a kernel in 8 bits.
    """

    def merge(path: tuple[str, ...], node: Params, low: Params) -> Params:
        if "a" in low and "b" in low:
            kernel, a, b = node["kernel"], low["a"], low["b"]
            if is_quantised(kernel):
                raise ValueError(
                    f"an adapter is not merged into weights of 8 bits ({'.'.join(path)}): the sum would be rounded "
                    "again; load the model with weights='full' and merge into that"
                )
            stacked, _ = _split(path)
            rank = a.shape[-1]
            layers = kernel.shape[:stacked]
            a2 = a.reshape(*layers, -1, rank)
            b2 = b.reshape(*layers, rank, -1)
            delta = (jnp.asarray(scale, jnp.float32) * (a2 @ b2)).reshape(kernel.shape)
            return {**node, "kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}
        return {**node, **{name: merge((*path, name), node[name], low[name]) for name in low}}

    return merge((), params, adapter)


def blend_adapters(parts: Sequence[tuple[Params, float]]) -> Params:
    """One adapter whose product A B is sum_i w_i A_i B_i, exactly: ranks are put side by side, [A_1, A_2, ...] and
    [w_1 B_1; w_2 B_2; ...].

    Mixing the factors themselves would add cross terms A_i B_j: (w A_1 + v A_2)(w B_1 + v B_2).

    Args:
      parts: (adapter of `init_adapter`, its weight w_i); the ranks may differ, the adapted kernels may not.

    Returns:
      An adapter whose rank is the sum of theirs, to be applied with the multiplier that they share.

    Raises:
      ValueError: no parts, or adapters of different kernels.
    """
    if not parts:
        raise ValueError("parts is empty; expected at least one adapter with its weight")
    trees = [adapter for adapter, _ in parts]
    if len({jax.tree.structure(tree) for tree in trees}) > 1:
        raise ValueError("the adapters belong to different kernels; they must be made with the same targets")

    def join(path: tuple[Any, ...], *leaves: jax.Array) -> jax.Array:
        names = tuple(key.key for key in path)
        if names[-1] == "a":
            return jnp.concatenate(leaves, axis=-1)
        weighted = [weight * leaf for leaf, (_, weight) in zip(leaves, parts, strict=True)]
        return jnp.concatenate(weighted, axis=_split(names)[0])

    return jax.tree_util.tree_map_with_path(join, *trees)
