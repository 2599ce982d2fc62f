"""GGUF: the same weights as the safetensors they were converted from, and every kind of damaged file.

The files are written with the `gguf` package from the small models of `goldens/`, with the changes that llama.cpp's
converter makes. The permutation here is that converter's formula, not the inverse of ours.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from distill_jax.models.decoder import Decoder, rotary_frequencies
from distill_jax.models.gguf_file import read_gguf
from distill_jax.models.gguf_io import gguf_spec, read_gguf_params
from distill_jax.models.model import Model, load_model
from distill_jax.models.spec import ModelSpec, RopeScaling
from distill_jax.text.tokenizers import Tokenizer
from tests.models.small_models import GOLDENS, answers, stored_weights

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
CONVERTED = {"llama": "llama", "llama3": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
CONVERTED |= {"gemma3_text": "gemma3", "gemma3": "gemma3"}


def converted_name(name: str, architecture: str) -> str:
    module, _, kind = name.rpartition(".")
    names = GEMMA_NAMES if architecture.startswith("gemma") else NAMES
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{names[module]}.{kind}"
    return f"{names[module]}.{kind}"


def converted_tensors(name: str, spec: ModelSpec) -> dict[str, np.ndarray]:
    architecture = CONVERTED[name]
    tensors = {}
    for key, value in stored_weights(GOLDENS / name).items():
        key = key.removeprefix("language_model.")
        if key.startswith(("vision_tower", "multi_modal_projector")):
            continue
        if architecture == "llama" and (".q_proj." in key or ".k_proj." in key):
            heads = spec.n_heads if ".q_proj." in key else spec.n_kv_heads
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1
        tensors[converted_name(key, architecture)] = np.ascontiguousarray(value)
    if spec.rope_scaling is not None and spec.rope_scaling.kind == "llama3":
        plain = rotary_frequencies(spec.head_dim, spec.rope_theta, None)
        tensors["rope_freqs.weight"] = np.asarray(
            plain / rotary_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
        )
    return tensors


def write_gguf(
    path: Path,
    name: str,
    spec: ModelSpec,
    kinds: dict[str, Kind] | None = None,
    settings: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file of a small model; `settings` adds metadata under the architecture, None values leave one out."""
    architecture = CONVERTED[name]
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, object] = {
        "embedding_length": spec.d_model,
        "feed_forward_length": spec.d_ff,
        "block_count": spec.n_layers,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "context_length": spec.max_context,
        "rope.freq_base": spec.rope_theta,
        "attention.sliding_window": spec.sliding_window,
        "attn_logit_softcapping": spec.attn_logit_softcap,
        "final_logit_softcapping": spec.final_logit_softcap,
    }
    if spec.rope_scaling is not None and spec.rope_scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": spec.rope_scaling.factor}
    for key, value in (values | (settings or {})).items():
        if value is None:
            continue
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](f"{architecture}.{key}", value)
    for key, value in (converted_tensors(name, spec) if tensors is None else tensors).items():
        kind = (kinds or {}).get(key, Kind.F32)
        writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> Model:
    file = read_gguf(path)
    spec = gguf_spec(file)
    module = Decoder(spec)
    return Model(spec, read_gguf_params(file, module), None, module)


@pytest.mark.parametrize("name", sorted(CONVERTED))
def test_a_converted_model_is_the_same_model(name, tmp_path):
    model = load_model(GOLDENS / name)
    spec, settings = model.spec, {}
    if (
        name == "llama3"
    ):  # Llama's files keep no more than the divisors; only the released settings can be told from them
        spec = dataclasses.replace(spec, rope_scaling=RopeScaling("llama3", 8.0))
    if name == "gemma3_text":  # not the family's usual pattern, so the file spells it out
        settings["attention.sliding_window_pattern"] = list(spec.layer_is_local)
    if name.startswith("gemma"):  # the files have no query scale: it follows from the architecture
        spec = dataclasses.replace(spec, query_scale=None)
    again = load(write_gguf(tmp_path / "model.gguf", name, spec, settings=settings))
    assert again.spec == spec
    # Adding and taking away Gemma's 1 rounds.
    tolerance = 2e-7 if name.startswith("gemma") else 0.0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), again.params, model.params
    )


def test_a_llama_file_gives_the_logits_of_transformers(tmp_path):
    golden = answers("llama")
    model = load(write_gguf(tmp_path / "model.gguf", "llama", load_model(GOLDENS / "llama").spec))
    assert np.abs(np.asarray(model.logits(golden["tokens"])) - golden["logits"]).max() < 1e-5


def test_kernels_in_8_bits_are_those_of_the_folder(tmp_path):
    folder = load_model(GOLDENS / "llama", weights="int8")
    file = read_gguf(write_gguf(tmp_path / "model.gguf", "llama", folder.spec))
    params = read_gguf_params(file, Decoder(folder.spec), "int8")
    jax.tree.map(np.testing.assert_array_equal, params, folder.params)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
def test_block_formats_are_dequantised(kind, tmp_path):
    model = load_model(GOLDENS / "llama")
    tensors = converted_tensors("llama", model.spec)
    key = "blk.1.ffn_down.weight"
    again = load(write_gguf(tmp_path / "model.gguf", "llama", model.spec, kinds={key: kind}))
    expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[key], kind), kind)
    ours = np.asarray(again.params["layers"]["mlp"]["down"]["kernel"][1]).T
    np.testing.assert_array_equal(ours, expected.reshape(tensors[key].shape))
    assert 0 < np.abs(ours - tensors[key]).max() < 0.2
    np.testing.assert_array_equal(
        again.params["layers"]["mlp"]["down"]["kernel"][0], model.params["layers"]["mlp"]["down"]["kernel"][0]
    )


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    spec = load_model(GOLDENS / "llama").spec
    settings = {"a.list": [1, 2, 3], "some.words": ["x", "ÿ", ""], "a.float": 0.25, "a.negative": [-1, 2]}
    path = write_gguf(tmp_path / "model.gguf", "llama", spec, settings=settings)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
            np.testing.assert_array_equal(ours.metadata[key], field.contents())
    assert len(ours.metadata) == len(theirs.fields) - 3
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.size, mine.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))


def test_the_query_scale_of_the_largest_gemma_is_by_width(tmp_path):
    """Gemma 3 27B (62 layers) scales queries by d_model / n_heads; nothing in the file says so."""
    spec = ModelSpec("gemma3", 128, 48, 62, 2, 1, 16, 8, sliding_window=4, layer_is_local=(True,) * 62)
    tensors = {f"blk.{layer}.attn_norm.weight": np.ones(48, np.float32) for layer in range(62)}
    tensors["token_embd.weight"] = np.zeros((128, 48), np.float32)
    path = write_gguf(tmp_path / "model.gguf", "gemma3", spec, tensors=tensors)
    assert gguf_spec(read_gguf(path)).query_scale == pytest.approx(24**-0.5)


# ------------------------------------------------------------------------------------------------ damaged input


def test_every_truncation_is_refused_with_its_sizes(tmp_path):
    spec = load_model(GOLDENS / "llama").spec
    path = write_gguf(tmp_path / "model.gguf", "llama", spec)
    whole = path.read_bytes()
    data_start = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    # Every cut through the header, then some through the weights.
    for size in [*range(4, data_start, 7), data_start, data_start + 999, len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"model.gguf is truncated.*has {size} bytes"):
            read_gguf(path)
    for size in (0, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a GGUF file"):
            read_gguf(path)


def test_no_damaged_byte_of_the_header_escapes_as_another_error(tmp_path):
    """Whatever one byte of the header turns into, the file loads or is refused with a ValueError."""
    spec = load_model(GOLDENS / "llama").spec
    path = write_gguf(tmp_path / "model.gguf", "llama", spec)
    whole = path.read_bytes()
    data_start = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    refused = 0
    for position in range(0, data_start, 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            load(path)
        except ValueError:
            refused += 1
    assert refused > 100


def test_an_unknown_version_or_block_format_is_named(tmp_path):
    spec = load_model(GOLDENS / "llama").spec
    path = write_gguf(tmp_path / "model.gguf", "llama", spec)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(ValueError, match="version 1 is not supported"):
        read_gguf(path)
    # name, rank 1, size 32, kind 0 (F32) -> kind 999
    entry = b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0)
    assert whole.count(entry) == 1
    path.write_bytes(whole.replace(entry, b"output_norm.weight" + struct.pack("<IQI", 1, 32, 999)))
    with pytest.raises(ValueError, match=r"'output_norm.weight' has block format number 999"):
        read_gguf(path)
    path.write_bytes(whole.replace(entry, b"output_norm.weight" + struct.pack("<IQI", 1, 32, Kind.I32)))
    with pytest.raises(ValueError, match=r"block format I32 \(of 'output_norm.weight'"):
        load(path)


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    spec = load_model(GOLDENS / "llama").spec
    tensors = converted_tensors("llama", spec)
    del tensors["blk.1.attn_norm.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    path = write_gguf(tmp_path / "model.gguf", "llama", spec, tensors=tensors)
    with pytest.raises(ValueError, match=r"missing: blk.1.attn_norm.weight; unexpected: blk.0.attn_q.bias"):
        load(path)
    del tensors["token_embd.weight"]
    path = write_gguf(tmp_path / "other.gguf", "llama", spec, tensors=tensors)
    with pytest.raises(ValueError, match=r"'token_embd.weight' is missing"):
        load(path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"expert_count": 8}, "expert_count"),
        ({"rope.dimension_count": 4}, "rope.dimension_count = 4"),
        ({"attention.value_length": 4}, "attention.value_length = 4"),
        ({"attention.sliding_window": 16}, "sliding_window"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": 5}, "block_count says 5 layers, the tensors are those of 3"),
        ({"attention.head_count": "four"}, "attention.head_count must be a positive number, got 'four'"),
        ({"feed_forward_length": 0}, "feed_forward_length must be a positive number, got 0"),
        ({"attention.head_count_kv": 3}, "n_kv_heads 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_change_the_computation_are_refused_by_name(settings, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", load_model(GOLDENS / "llama").spec, settings=settings)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_other_rope_divisors_and_architectures_are_refused(tmp_path):
    spec = load_model(GOLDENS / "llama").spec
    tensors = converted_tensors("llama", spec) | {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}
    path = write_gguf(tmp_path / "model.gguf", "llama", spec, tensors=tensors)
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not Llama 3's"):
        load(path)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported"):
        load(tmp_path / "other.gguf")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_gguf(tmp_path / "nowhere.gguf")


def test_load_model_takes_a_file_and_another_tokenizer(tmp_path):
    """Without a tokenizer in the file, one can be given."""
    model = load_model(GOLDENS / "llama")
    path = write_gguf(tmp_path / "model.gguf", "llama", model.spec)
    with pytest.raises(ValueError, match="no tokenizer"):
        load_model(path)
    with pytest.raises(ValueError, match="embedding only 128"):
        load_model(path, tokenizer=Tokenizer.bytes_tokenizer())
