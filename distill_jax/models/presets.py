"""Published models in numbers, so that a run can be planned before their weights are at hand.

Source: the config.json that each model is published with.
"""

from __future__ import annotations

from distill_jax.models.spec import ModelSpec, RopeScaling


def _gemma3(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, *, window: int, long: bool = False
) -> ModelSpec:
    """Gemma 3: every sixth layer is global; the larger ones stretch global positions by 8."""
    return ModelSpec(
        family="gemma3",
        vocab_size=262_208 if long else 262_144,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=256,
        d_ff=d_ff,
        rope_theta=1_000_000.0,
        rope_theta_local=10_000.0,
        sliding_window=window,
        layer_is_local=tuple((layer + 1) % 6 != 0 for layer in range(n_layers)),
        norm_offset=1.0,
        qk_norm=True,
        post_norms=True,
        embed_scale=True,
        activation="gelu_tanh",
        query_scale=256**-0.5,
        rope_scaling=RopeScaling("linear", 8.0) if long else None,
        max_context=131_072 if long else 32_768,
    )


def _qwen3(d_model: int, n_layers: int, n_heads: int, d_ff: int, *, tied: bool) -> ModelSpec:
    return ModelSpec(
        family="qwen3",
        vocab_size=151_936,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=128,
        d_ff=d_ff,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tie_embeddings=tied,
        max_context=40_960,
    )


PRESETS: dict[str, ModelSpec] = {
    "smollm2-135m": ModelSpec(
        "llama", 49_152, 576, 30, 9, 3, 64, 1536, rope_theta=100_000.0, norm_eps=1e-5, max_context=8192
    ),
    "gemma3-270m": _gemma3(640, 18, 4, 1, 2048, window=512),
    "gemma3-1b": _gemma3(1152, 26, 4, 1, 6912, window=512),
    "gemma3-4b": _gemma3(2560, 34, 8, 4, 10_240, window=1024, long=True),
    "gemma3-12b": _gemma3(3840, 48, 16, 8, 15_360, window=1024, long=True),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tied=False),
}
