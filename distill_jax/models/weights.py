"""The name table: every parameter of the decoder, under its path here, in Hugging Face files and in GGUF
files.

One table serves loading, saving and adapter export, so a name or a layout can't differ between the
directions. Files hold one matrix [out, in] a layer; the decoder holds one stacked array [layers, *in, *out]
with heads as their own dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from distill_jax.models.decoder import Decoder, abstract_params
from distill_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter.

    path: its place in the parameter tree; under "layers" it is stacked, the layer first.
    hf, gguf: its name in files, with "{}" where the number of the layer stands.
    inputs: number of input dimensions of a kernel; 0 for what isn't a matrix product (embedding, bias, norm).
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    inputs: int = 0

    @property
    def is_stacked(self) -> bool:
        return self.path[0] == "layers"

    def layer_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one layer of a parameter of this shape."""
        return shape[1:] if self.is_stacked else shape

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in files of one layer of a parameter of this shape."""
        shape = self.layer_shape(shape)
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return shape if self.path[-1] == "embedding" else (math.prod(shape),)

    def from_stored(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One layer from its layout in files; `shape` is the parameter's."""
        return (array.T if self.inputs else array).reshape(self.layer_shape(shape))

    def to_stored(self, layer: np.ndarray) -> np.ndarray:
        """One layer, contiguous, in the layout of files. Inverse of `from_stored`."""
        if self.inputs:
            fan_in = math.prod(layer.shape[: self.inputs])
            layer = layer.reshape(fan_in, -1).T
        elif self.path[-1] != "embedding":
            layer = layer.reshape(-1)
        return np.ascontiguousarray(layer)


def weights_of(spec: ModelSpec) -> tuple[Weight, ...]:
    """Every parameter that a decoder with this spec has."""

    def layer(path: str, hf: str, gguf: str, inputs: int = 0) -> Weight:
        return Weight(("layers", *path.split(".")), f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", inputs)

    table = [Weight(("embed", "embedding"), "model.embed_tokens.weight", "token_embd.weight")]
    for name in ("q", "k", "v"):
        table.append(
            layer(f"attn.{name}.kernel", f"self_attn.{name}_proj.weight", f"attn_{name}.weight", inputs=1)
        )
        if spec.qkv_bias:
            table.append(layer(f"attn.{name}.bias", f"self_attn.{name}_proj.bias", f"attn_{name}.bias"))
    table.append(layer("attn.o.kernel", "self_attn.o_proj.weight", "attn_output.weight", inputs=2))
    if spec.qk_norm:
        for name in ("q", "k"):
            table.append(
                layer(f"attn.{name}_norm.scale", f"self_attn.{name}_norm.weight", f"attn_{name}_norm.weight")
            )
    for name in ("gate", "up", "down"):
        table.append(layer(f"mlp.{name}.kernel", f"mlp.{name}_proj.weight", f"ffn_{name}.weight", inputs=1))
    table.append(layer("attn_norm.scale", "input_layernorm.weight", "attn_norm.weight"))
    if spec.post_norms:
        # The same Hugging Face name means another norm here than in models without post norms.
        table.append(
            layer("post_attn_norm.scale", "post_attention_layernorm.weight", "post_attention_norm.weight")
        )
        table.append(layer("mlp_norm.scale", "pre_feedforward_layernorm.weight", "ffn_norm.weight"))
        table.append(
            layer("post_mlp_norm.scale", "post_feedforward_layernorm.weight", "post_ffw_norm.weight")
        )
    else:
        table.append(layer("mlp_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight"))
    table.append(Weight(("final_norm", "scale"), "model.norm.weight", "output_norm.weight"))
    if not spec.tie_embeddings:
        table.append(Weight(("head", "kernel"), "lm_head.weight", "output.weight", inputs=1))
    return tuple(table)


def get_at(tree: Any, path: Iterable[str]) -> Any:
    """The node at a path of a nested dictionary."""
    for name in path:
        tree = tree[name]
    return tree


def nest_at(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A nested dictionary that holds one value at a path."""
    for name in reversed(path):
        value = {name: value}
    return value


def check_stored(
    module: Decoder,
    found: dict[str, tuple[int, ...]],
    source: str,
    name_of: Callable[[Weight], str],
    allowed: Callable[[str], bool],
) -> None:
    """Compares the names and shapes in a file with what the module needs, before any of them is used.

    Args:
      found: name -> shape [out, in] of everything in the file.
      source: the file, for messages.
      name_of: which of a weight's names the file uses.
      allowed: whether a name that no parameter has may be there.

    Raises:
      ValueError: lists missing names, unexpected names, and shapes that differ.
    """
    expected: dict[str, tuple[int, ...]] = {}
    shapes = abstract_params(module)
    for weight in weights_of(module.spec):
        shape = weight.stored_shape(get_at(shapes, weight.path).shape)
        for index in range(module.spec.n_layers if weight.is_stacked else 1):
            expected[name_of(weight).format(index)] = shape
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not allowed(name)]
    differing = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source}: the weights are not those of a {module.spec.family} model with {module.spec.n_layers} layers, "
            f"d_model {module.spec.d_model} and vocabulary {module.spec.vocab_size}; {'; '.join(problems)}"
        )


def _some(names: list[str], limit: int = 8) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
