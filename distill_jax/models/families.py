"""Hugging Face's config.json <-> `ModelSpec`, for every supported family.

Reading accepts the fields of transformers 5 (`rope_parameters`, `layer_types`) and those of older files
(`rope_theta`, `rope_scaling`, `rope_local_base_freq`, `sliding_window_pattern`). A field whose value would
change the computation and that the decoder does not implement is an error that names it: a model must never
load and then be quietly wrong.

Sources: the configuration classes of transformers 5.24; Llama 3 herd of models, arXiv 2407.21783; Mistral 7B,
2310.06825; Qwen2, 2407.10671; Qwen3, 2505.09388; Gemma 2, 2408.00118; Gemma 3, 2503.19786.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill_jax.models.config_fields import unknown_fields
from distill_jax.models.spec import ModelSpec, RopeScaling

LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """What the families differ in.

    architecture, model_type: how config.json names it, also when we write one.
    traits: fields of `ModelSpec` that are fixed for the family.
    defaults: what transformers fills in; published files leave out fields that equal them (Gemma 3 4B omits
      its vocabulary and its numbers of heads).
    """

    architecture: str
    model_type: str
    traits: Mapping[str, Any]
    defaults: Mapping[str, Any]


_GEMMA_TRAITS = {"norm_offset": 1.0, "post_norms": True, "embed_scale": True}
_GEMMA_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", {}, {"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        {},
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", {"qkv_bias": True}, _QWEN_DEFAULTS),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", {"qk_norm": True}, _QWEN_DEFAULTS | {"head_dim": 128}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        _GEMMA_TRAITS,
        _GEMMA_DEFAULTS
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA_TRAITS | {"qk_norm": True},
        _GEMMA_DEFAULTS
        | {
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
    ),
}
_MODEL_TYPES = {family.model_type: name for name, family in FAMILIES.items()} | {"gemma3": "gemma3"}
_ARCHITECTURES = {family.architecture: name for name, family in FAMILIES.items()} | {
    "Gemma3ForConditionalGeneration": "gemma3"
}

# Fields that the decoder does not implement: any other value than these changes what the model computes.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),  # in transformers this also puts a bias on the output projection
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def family_of(config: Mapping[str, Any]) -> str:
    """The family's key in `FAMILIES`; ValueError with what is supported when it is none of them."""
    architectures = config.get("architectures") or []
    for architecture in architectures:
        if architecture in _ARCHITECTURES:
            return _ARCHITECTURES[architecture]
    model_type = config.get("model_type")
    if not architectures and model_type in _MODEL_TYPES:
        return _MODEL_TYPES[str(model_type)]
    raise ValueError(
        f"config.json: architecture {architectures or model_type!r} is not supported; "
        f"supported are {sorted(_ARCHITECTURES)}"
    )


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """`ModelSpec` of a config.json (for Gemma 3 with images: of its `text_config`).

    Raises:
      ValueError: unsupported architecture, a missing field, or a value that the decoder does not implement;
        names it.
    """
    name = family_of(config)
    family = FAMILIES[name]
    text = dict(config.get("text_config") or config)
    # A null means "not given" throughout, except where null is a choice of its own: no window, no soft cap.
    fields = {
        key: value for key, value in text.items() if value is not None or key in ("sliding_window", *_CAPS)
    }
    fields = {**family.defaults, **fields}
    _refuse_unsupported(name, fields)

    def need(key: str) -> int:
        if key not in fields:
            raise ValueError(f"config.json of a {name} model: field {key!r} is missing")
        return int(fields[key])

    n_layers, n_heads = need("num_hidden_layers"), need("num_attention_heads")
    head_dim = int(fields.get("head_dim") or need("hidden_size") // n_heads)
    window, is_local = _windows(name, fields, n_layers)
    rope_theta, rope_theta_local, scaling = _rope(name, fields)
    query_scale = None
    if "query_pre_attn_scalar" in fields and fields["query_pre_attn_scalar"] != head_dim:
        query_scale = float(fields["query_pre_attn_scalar"]) ** -0.5
    tied = fields.get("tie_word_embeddings", False)
    if "text_config" in config and config.get("tie_word_embeddings") is not None:
        tied = config["tie_word_embeddings"]
    return ModelSpec(
        family=name,
        vocab_size=need("vocab_size"),
        d_model=need("hidden_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(fields.get("num_key_value_heads", n_heads)),
        head_dim=head_dim,
        d_ff=need("intermediate_size"),
        rope_theta=rope_theta,
        rope_theta_local=rope_theta_local,
        sliding_window=window,
        layer_is_local=is_local,
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        activation=_activation(name, fields),
        tie_embeddings=bool(tied),
        query_scale=query_scale,
        attn_logit_softcap=_optional_float(fields.get("attn_logit_softcapping")),
        final_logit_softcap=_optional_float(fields.get("final_logit_softcapping")),
        rope_scaling=scaling,
        max_context=need("max_position_embeddings"),
        **family.traits,
    )


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


def _refuse_unsupported(name: str, fields: Mapping[str, Any]) -> None:
    for key, allowed in _NEUTRAL.items():
        if key in fields and fields[key] not in allowed:
            raise ValueError(
                f"config.json of a {name} model: {key} = {fields[key]!r} is not supported (it changes the computation)"
            )
    unknown = unknown_fields(fields, set(_NEUTRAL))
    if unknown:
        given = ", ".join(f"{key} = {fields[key]!r}" for key in unknown)
        raise ValueError(
            f"config.json of a {name} model: {given} is not known here and may change the computation; where you are "
            "sure that it does not, take it out of config.json"
        )
    if not name.startswith("gemma") and any(fields.get(key) is not None for key in _CAPS):
        raise ValueError(f"config.json of a {name} model: soft caps {_CAPS} belong to Gemma models only")


def _activation(name: str, fields: Mapping[str, Any]) -> str:
    """Gemma's `hidden_activation` wins over `hidden_act`, which in old files names a function never used."""
    given = fields.get("hidden_activation") or fields.get("hidden_act", "silu")
    if given not in _ACTIVATIONS:
        raise ValueError(
            f"config.json of a {name} model: activation {given!r} is not supported; "
            f"expected one of {sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[given]


def _windows(name: str, fields: Mapping[str, Any], n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers are local); (None, ()) when every layer sees everything."""
    window = fields.get("sliding_window")
    if name.startswith("qwen") and not fields["use_sliding_window"]:
        window = None
    types = fields.get("layer_types")
    if types is not None:
        unknown = sorted(set(types) - {LOCAL, GLOBAL})
        if unknown or len(types) != n_layers:
            raise ValueError(
                f"config.json of a {name} model: layer_types must be {n_layers} times {LOCAL!r} or {GLOBAL!r}, "
                f"got {len(types)} entries{f' with {unknown}' if unknown else ''}"
            )
        is_local = tuple(kind == LOCAL for kind in types)
    elif name == "mistral":
        is_local = (window is not None,) * n_layers
    elif name.startswith("qwen"):
        is_local = tuple(window is not None and i >= fields["max_window_layers"] for i in range(n_layers))
    elif name.startswith("gemma"):
        pattern = int(fields.get("_sliding_window_pattern", fields["sliding_window_pattern"]))
        is_local = tuple((i + 1) % pattern != 0 for i in range(n_layers))
    else:
        is_local = ()
    if not any(is_local):
        return None, ()
    if window is None:
        raise ValueError(f"config.json of a {name} model has layers of {LOCAL!r} but no sliding_window")
    return int(window), is_local


def _rope(name: str, fields: Mapping[str, Any]) -> tuple[float, float | None, RopeScaling | None]:
    """(base of global layers, base of local layers or None = the same, scaling of global layers)."""
    theta = float(fields.get("rope_theta", 10000.0))
    local_theta = _optional_float(fields.get("rope_local_base_freq") if name == "gemma3" else None)
    everywhere = dict(fields.get("rope_parameters") or {})
    by_layer_type = {kind: everywhere.pop(kind) or {} for kind in (GLOBAL, LOCAL) if kind in everywhere}
    if everywhere and by_layer_type:
        raise ValueError(
            f"config.json of a {name} model: rope_parameters mixes layer types with {sorted(everywhere)}"
        )
    if everywhere and name == "gemma3":
        raise ValueError(f"config.json of a gemma3 model: rope_parameters must name {GLOBAL!r} and {LOCAL!r}")
    rope = dict(fields.get("rope_scaling") or by_layer_type.get(GLOBAL) or everywhere)
    theta = float(rope.get("rope_theta", (by_layer_type.get(GLOBAL) or everywhere).get("rope_theta", theta)))
    local = dict(by_layer_type.get(LOCAL, {}))
    if local:
        local_theta = float(local.get("rope_theta", theta if local_theta is None else local_theta))
        kind = local.get("rope_type", local.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"config.json of a {name} model: rope type {kind!r} on {LOCAL} layers is not supported"
            )
    return theta, local_theta, _rope_scaling(name, rope, fields)


def _rope_scaling(name: str, rope: Mapping[str, Any], fields: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"config.json of a {name} model: partial_rotary_factor is not supported")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"config.json of a {name} model: rope type {kind!r} is not supported; expected default, linear or llama3"
        )
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    missing = [key for key in needed if key not in rope]
    if missing:
        raise ValueError(f"config.json of a {name} model: rope type {kind!r} needs {missing}")
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope.get("original_max_position_embeddings", fields["max_position_embeddings"])),
    )


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """config.json of a spec, without token ids and dtype. Inverse of `spec_from_config`.

    Positions are written with the names that transformers 4 had: version 5 reads them too.

    Raises:
      ValueError: the spec has a feature that its family's architecture cannot express; names the fields.
    """
    if spec.family not in FAMILIES:
        raise ValueError(
            f"family {spec.family!r} has no Hugging Face architecture; expected one of {sorted(FAMILIES)}"
        )
    family = FAMILIES[spec.family]
    activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[spec.activation]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_embeddings,
        "max_position_embeddings": spec.max_context,
        "attention_dropout": 0.0,
    }
    is_gemma = spec.family.startswith("gemma")
    config["hidden_activation" if is_gemma else "hidden_act"] = activation
    if is_gemma:
        # A whole number in every release (and by transformers' types); any other scale is found out below.
        config["query_pre_attn_scalar"] = (
            spec.head_dim if spec.query_scale is None else round(spec.query_scale**-2)
        )
        config["attn_logit_softcapping"] = spec.attn_logit_softcap
        config["final_logit_softcapping"] = spec.final_logit_softcap
    config |= _window_fields(spec)
    canonical = _canonical(spec)
    if spec.family == "gemma3" and canonical.rope_theta_local is not None:
        config["rope_local_base_freq"] = canonical.rope_theta_local
    if spec.rope_scaling is not None:
        scaling: dict[str, Any] = {"rope_type": spec.rope_scaling.kind, "factor": spec.rope_scaling.factor}
        if spec.rope_scaling.kind == "llama3":
            scaling["low_freq_factor"] = spec.rope_scaling.low_freq_factor
            scaling["high_freq_factor"] = spec.rope_scaling.high_freq_factor
            scaling["original_max_position_embeddings"] = spec.rope_scaling.original_context
        config["rope_scaling"] = scaling
    read_back = _canonical(spec_from_config(config))
    lost = [
        f"{field.name} = {ours!r} (the architecture computes {theirs!r})"
        for field in dataclasses.fields(ModelSpec)
        if (ours := getattr(canonical, field.name)) != (theirs := getattr(read_back, field.name))
    ]
    if lost:
        raise ValueError(f"a {family.architecture} cannot have {'; '.join(lost)}")
    return config


def _canonical(spec: ModelSpec) -> ModelSpec:
    """One of the specs that compute the same: settings of local layers only where there are any, and spelled out."""
    if not any(spec.layer_is_local):
        return dataclasses.replace(spec, layer_is_local=(), sliding_window=None, rope_theta_local=None)
    if spec.rope_theta_local is None and spec.rope_scaling is None:
        return dataclasses.replace(spec, rope_theta_local=spec.rope_theta)
    return spec


def _window_fields(spec: ModelSpec) -> dict[str, Any]:
    window = spec.sliding_window if any(spec.layer_is_local) else None
    types = [LOCAL if local else GLOBAL for local in spec.layer_is_local] or [GLOBAL] * spec.n_layers
    if spec.family == "mistral":
        return {"sliding_window": window}
    if spec.family.startswith("qwen"):
        return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types}
    if spec.family.startswith("gemma"):
        return {"sliding_window": window, "layer_types": types}
    return {}
