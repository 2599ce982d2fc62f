"""`ModelSpec`: what a decoder of any supported family is, in numbers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that a model was trained on (global layers only).

    kind "linear": all frequencies divided by `factor`. kind "llama3": low frequencies divided by `factor`, high ones
    kept, smooth in between (wave lengths compared with `original_context`).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"RoPE scaling {self.kind!r} is not supported; expected 'linear' or 'llama3'")
        if self.factor <= 0:
            raise ValueError(f"RoPE scaling factor must be positive, got {self.factor}")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
      family: "llama", "mistral", "qwen2", "qwen3", "gemma2" or "gemma3".
      layer_is_local: one bool a layer, True where attention sees only `sliding_window` positions; empty = all global.
      rope_theta_local: RoPE base of local layers (None: the same as global).
      norm_offset: what is added to a stored norm scale before use (Gemma: 1).
      query_scale: factor on queries (None: head_dim ** -0.5).
      post_norms: norms also after attention and MLP, before the residual sum (Gemma 2 and 3).
      embed_scale: embeddings multiplied by sqrt(d_model) (Gemma).
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10000.0
    rope_theta_local: float | None = None
    sliding_window: int | None = None
    layer_is_local: tuple[bool, ...] = ()
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: bool = False
    activation: str = "silu"
    tie_embeddings: bool = True
    query_scale: float | None = None
    qkv_bias: bool = False
    attn_logit_softcap: float | None = None
    final_logit_softcap: float | None = None
    rope_scaling: RopeScaling | None = None
    max_context: int = 8192

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelSpec.{name} must be at least 1, got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide by n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(
                f"activation {self.activation!r} is not supported; expected 'silu' or 'gelu_tanh'"
            )
        if self.layer_is_local and len(self.layer_is_local) != self.n_layers:
            raise ValueError(
                f"layer_is_local has {len(self.layer_is_local)} entries for {self.n_layers} layers"
            )
        if any(self.layer_is_local) and not self.sliding_window:
            raise ValueError("layer_is_local names local layers, but sliding_window is not set")

    @property
    def num_params(self) -> int:
        """Number of weights, embeddings included, by arithmetic."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.n_heads + 2 * self.n_kv_heads)
        if self.qk_norm:
            attention += 2 * self.head_dim
        norms = self.d_model * (4 if self.post_norms else 2)
        layer = attention + 3 * self.d_model * self.d_ff + norms
        head = 0 if self.tie_embeddings else self.vocab_size * self.d_model
        return self.vocab_size * self.d_model + self.n_layers * layer + self.d_model + head
