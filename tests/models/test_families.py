"""config.json -> ModelSpec and back: published files, both generations of field names, and what must be refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from distill_jax.models.families import FAMILIES, config_from_spec, spec_from_config
from distill_jax.models.spec import ModelSpec, RopeScaling

GOLDENS = Path(__file__).parent / "goldens"
FOLDERS = sorted(path.name for path in GOLDENS.iterdir() if (path / "config.json").is_file())

# Fields of published config.json files that bear on the computation, as the files have them.
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# Most of the text model is left to the defaults of transformers here.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
PUBLISHED = [
    # (file, what the publisher says its number of parameters is)
    (SMOLLM2_135M, 134_515_008),
    (LLAMA_3_2_1B, 1_235_814_400),
    (MISTRAL_7B, 7_241_732_096),
    (QWEN2_5_0_5B, 494_032_768),
    (QWEN3_8B, 8_190_735_360),
    (GEMMA_2_2B, 2_614_341_888),
    (GEMMA_3_1B, 999_885_952),
]


def golden_config(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / name / "config.json").read_text())


@pytest.mark.parametrize(
    "config, num_params", PUBLISHED, ids=lambda value: value["model_type"] if isinstance(value, dict) else ""
)
def test_published_files_have_the_published_number_of_parameters(config, num_params):
    assert spec_from_config(config).num_params == num_params


def test_llama3_scaling_is_read_from_the_old_field():
    assert spec_from_config(LLAMA_3_2_1B).rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def test_mistral_window_is_on_all_layers_and_null_means_none():
    spec = spec_from_config(MISTRAL_7B)
    assert (spec.sliding_window, spec.layer_is_local) == (4096, (True,) * 32)
    spec = spec_from_config(MISTRAL_7B | {"sliding_window": None})
    assert (spec.sliding_window, spec.layer_is_local) == (None, ())


def test_qwen_window_counts_only_when_it_is_switched_on():
    assert spec_from_config(QWEN2_5_0_5B).sliding_window is None
    spec = spec_from_config(QWEN2_5_0_5B | {"use_sliding_window": True, "max_window_layers": 20})
    assert spec.sliding_window == 32768
    assert spec.layer_is_local == (False,) * 20 + (True,) * 4


def test_gemma2_alternates_and_a_null_soft_cap_is_none():
    spec = spec_from_config(GEMMA_2_2B)
    assert spec.layer_is_local == (True, False) * 13
    assert (spec.attn_logit_softcap, spec.final_logit_softcap) == (50.0, 30.0)
    spec = spec_from_config(GEMMA_2_2B | {"attn_logit_softcapping": None})
    assert (spec.attn_logit_softcap, spec.final_logit_softcap) == (None, 30.0)


def test_gemma3_with_images_takes_what_the_file_leaves_out_from_the_defaults():
    spec = spec_from_config(GEMMA_3_4B)
    assert (spec.vocab_size, spec.n_heads, spec.n_kv_heads, spec.head_dim) == (262208, 8, 4, 256)
    assert (spec.rope_theta, spec.rope_theta_local) == (1e6, 1e4)
    assert spec.rope_scaling == RopeScaling("linear", 8.0)
    assert spec.sliding_window == 1024
    assert spec.layer_is_local == tuple((i + 1) % 6 != 0 for i in range(34))
    assert spec.tie_embeddings and spec.embed_scale and spec.post_norms and spec.norm_offset == 1.0


def test_query_scale_that_is_not_by_head_width():
    # Gemma 3 27B: scaled by d_model / n_heads = 5376 / 32, not by the head width of 128.
    spec = spec_from_config(GEMMA_3_1B | {"query_pre_attn_scalar": 168, "head_dim": 128})
    assert spec.query_scale == pytest.approx(168**-0.5)
    assert spec_from_config(GEMMA_3_1B).query_scale is None


def test_both_generations_of_field_names_mean_the_same():
    new = golden_config("gemma3")["text_config"] | {"architectures": ["Gemma3ForCausalLM"]}
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
    old |= {"sliding_window_pattern": 6}
    assert spec_from_config(old) == spec_from_config(new)

    new = golden_config("llama3")
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    scaling = dict(new["rope_parameters"])
    old |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert spec_from_config(old) == spec_from_config(new)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_we_write_transformers_reads_as_the_same_model(name):
    spec = spec_from_config(golden_config(name))
    written = config_from_spec(spec)
    assert spec_from_config(written) == spec
    theirs = transformers.AutoConfig.for_model(written["model_type"]).from_dict(dict(written))
    again = theirs.to_dict() | {"architectures": written["architectures"]}
    assert spec_from_config(again) == spec


@pytest.mark.parametrize(
    "base, change, named",
    [
        (SMOLLM2_135M, {"attention_bias": True}, "attention_bias"),
        (
            SMOLLM2_135M,
            {"residual_multiplier": 0.2, "clip_qkv": 8},
            "clip_qkv = 8, residual_multiplier = 0.2 is",
        ),
        (QWEN3_8B, {"attn_output_gate": True}, "attn_output_gate"),
        (SMOLLM2_135M, {"mlp_bias": True}, "mlp_bias"),
        (SMOLLM2_135M, {"hidden_act": "relu"}, "relu"),
        (SMOLLM2_135M, {"num_local_experts": 8}, "num_local_experts"),
        (SMOLLM2_135M, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (SMOLLM2_135M, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (SMOLLM2_135M, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (SMOLLM2_135M, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (SMOLLM2_135M, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (SMOLLM2_135M, {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (SMOLLM2_135M, {"vocab_size": None}, "vocab_size"),
        (QWEN3_8B, {"attention_bias": True}, "attention_bias"),
        (QWEN3_8B, {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN3_8B, {"layer_types": ["chunked_attention"] * 36}, "chunked_attention"),
        (QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}, "sliding_window"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_3_1B, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
        (
            GEMMA_3_1B,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention",
        ),
        (SMOLLM2_135M, {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        (SMOLLM2_135M, {"architectures": None, "model_type": "gpt2"}, "gpt2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_change_the_computation_is_refused_by_name(base, change, named):
    spec_from_config(base)
    with pytest.raises(ValueError, match=named):
        spec_from_config(base | change)


def test_fields_without_effect_are_passed_over():
    plain = spec_from_config(SMOLLM2_135M)
    more = {"transformers.js_config": {"kv_cache_dtype": {}}, "_name_or_path": "x", "pretraining_tp": 1}
    more |= {
        "rope_interleaved": False,
        "attn_output_gate": None,
        "unsloth_version": "2026.1",
        "use_cache": True,
    }
    assert spec_from_config(SMOLLM2_135M | more) == plain


def test_a_spec_that_no_architecture_computes_is_not_written():
    spec = spec_from_config(golden_config("llama"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot have.*sliding_window.*qk_norm"):
        config_from_spec(
            dataclasses.replace(spec, qk_norm=True, sliding_window=4, layer_is_local=(True,) * spec.n_layers)
        )
    with pytest.raises(ValueError, match="no Hugging Face architecture"):
        config_from_spec(dataclasses.replace(spec, family="rwkv"))
    with pytest.raises(ValueError, match="query_scale"):
        gemma = spec_from_config(golden_config("gemma3_text"))
        config_from_spec(dataclasses.replace(gemma, query_scale=0.3))


def test_every_family_writes_a_minimal_spec():
    """A model trained from nothing has a spec with few fields set; its family can save it."""
    for name, family in FAMILIES.items():
        spec = ModelSpec(name, 64, 16, 2, 2, 1, 8, 32, **family.traits)
        if name.startswith("gemma"):
            spec = dataclasses.replace(spec, activation="gelu_tanh")
        assert spec_from_config(config_from_spec(spec)).num_params == spec.num_params
