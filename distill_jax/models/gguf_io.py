"""GGUF files -> `ModelSpec` and dequantised parameters.

Three things differ from Hugging Face's weights: Llama's rows of Q and K are permuted, Gemma's norm scales
carry their offset, and Llama 3's rope scaling is a table of divisors. Source: the converter of llama.cpp,
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize

from distill_jax.models.assembly import assemble_params
from distill_jax.models.decoder import Decoder, Params, rotary_frequencies
from distill_jax.models.families import GLOBAL, LOCAL, spec_from_config
from distill_jax.models.gguf_file import GGUFFile
from distill_jax.models.spec import ModelSpec, RopeScaling
from distill_jax.models.weights import Weight, check_stored, weights_of

# Llama files keep pairs of rotated dimensions side by side, everybody else keeps them half a head apart.
_PERMUTED = ("llama",)
# In llama.cpp's enumeration of sizes only these two scale queries by the width of the model; files don't say
# so.
_QUERY_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
_HF_ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"


def gguf_spec(file: GGUFFile) -> ModelSpec:
    """`ModelSpec` from the metadata, by way of the fields of a config.json.

    Raises:
      ValueError: an architecture or a setting that is not supported; names it.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in _HF_ARCHITECTURE:
        raise ValueError(
            f"{file.path}: architecture {architecture!r} is not supported; expected one of {sorted(_HF_ARCHITECTURE)}"
        )

    def number(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{file.path}: metadata {architecture}.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
            raise ValueError(
                f"{file.path}: metadata {architecture}.{key} must be a positive number, got {value!r}"
            )
        return value

    if metadata.get(f"{architecture}.expert_count"):
        raise ValueError(f"{file.path}: mixtures of experts ({architecture}.expert_count) are not supported")
    width, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise ValueError(
                f"{file.path}: {architecture}.{key} = {number(key)} is not supported; expected {head_dim}"
            )
    layers = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if number("block_count") != layers:
        raise ValueError(
            f"{file.path}: {architecture}.block_count says {number('block_count')} layers, the tensors are those "
            f"of {layers}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: the tensor 'token_embd.weight' is missing")
    config: dict[str, Any] = {
        "architectures": [_HF_ARCHITECTURE[architecture]],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": number("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4),
    }
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": number("rope.scaling.factor")}
    if architecture.startswith("gemma"):
        by_width = (architecture, layers) in _QUERY_SCALED_BY_WIDTH
        config["query_pre_attn_scalar"] = width // heads if by_width else head_dim
        config |= _gemma_fields(metadata, architecture)
    elif metadata.get(f"{architecture}.attention.sliding_window"):
        raise ValueError(
            f"{file.path}: {architecture}.attention.sliding_window is not supported in GGUF files"
        )
    try:
        spec = spec_from_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: {error} (metadata as the fields of a config.json)") from None
    if _ROPE_FREQUENCIES in file.tensors:
        spec = dataclasses.replace(spec, rope_scaling=_llama3_scaling(file, spec))
    return spec


def _gemma_fields(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Windows and soft caps; what a file leaves out is what its architecture always has, as the family's defaults."""
    fields = {
        "sliding_window": metadata.get(f"{architecture}.attention.sliding_window"),
        "rope_local_base_freq": metadata.get(f"{architecture}.rope.freq_base_swa"),
        "attn_logit_softcapping": metadata.get(f"{architecture}.attn_logit_softcapping"),
        "final_logit_softcapping": metadata.get(f"{architecture}.final_logit_softcapping"),
    }
    pattern = metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        fields["layer_types"] = [LOCAL if local else GLOBAL for local in pattern.tolist()]
    else:
        fields["sliding_window_pattern"] = pattern
    return {key: value for key, value in fields.items() if value is not None}


def _llama3_scaling(file: GGUFFile, spec: ModelSpec) -> RopeScaling:
    """The scaling behind a table of frequency divisors, which is all that a GGUF file keeps of Llama 3's rope
    scaling.

    Every Llama 3.x has low_freq_factor 1, high_freq_factor 4 and an original context of 8192, so the largest
    divisor is the factor; a table that these numbers don't reproduce is refused.
    """
    divisors = file.read(_ROPE_FREQUENCIES)
    scaling = RopeScaling("llama3", float(divisors.max()))
    expected = rotary_frequencies(spec.head_dim, spec.rope_theta, None) / rotary_frequencies(
        spec.head_dim, spec.rope_theta, scaling
    )
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{file.path}: {_ROPE_FREQUENCIES} is not Llama 3's rope scaling, which is all that is supported"
        )
    return scaling


def read_gguf_params(file: GGUFFile, module: Decoder, weights: str = "full") -> Params:
    """The parameter tree of a decoder built from `gguf_spec(file)`, dequantised, in the module's
    `param_dtype`; with weights="int8" the layers' kernels in 8 bits.

    Raises:
      ValueError: missing, unexpected or wrongly shaped tensors, or a block format that can't be dequantised.
    """
    for kind in {tensor.kind for tensor in file.tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            names = [tensor.name for tensor in file.tensors.values() if tensor.kind == kind]
            raise ValueError(
                f"{file.path}: block format {kind.name} (of {names[0]!r} and {len(names) - 1} more tensors) can't be "
                "dequantised by the installed gguf package; use a file in another format, such as Q8_0 or F16"
            ) from None
    found = {tensor.name: tensor.shape for tensor in file.tensors.values()}
    check_stored(
        module, found, str(file.path), lambda weight: weight.gguf, lambda name: name == _ROPE_FREQUENCIES
    )
    spec = module.spec
    permuted = file.metadata["general.architecture"] in _PERMUTED

    def fetch(weight: Weight, layer: int) -> np.ndarray:
        value = file.read(weight.gguf.format(layer))
        if permuted and weight.path[-2:] in (("q", "kernel"), ("k", "kernel")):
            value = unpermute(value, spec.n_heads if weight.path[-2] == "q" else spec.n_kv_heads)
        # Files carry the scale that is applied; we keep, as Hugging Face does, what is added to the offset.
        return value - np.float32(spec.norm_offset) if weight.path[-1] == "scale" else value

    layers = (
        (weight, index, fetch(weight, index))
        for weight in weights_of(spec)
        for index in range(spec.n_layers if weight.is_stacked else 1)
    )
    return assemble_params(module, layers, weights)


def unpermute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, D] from Llama's interleaved order of rotated pairs to half-split order."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
