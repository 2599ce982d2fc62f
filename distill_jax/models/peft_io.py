"""Adapters as the package PEFT reads them.

Source: PEFT's LoRA checkpoint format (peft 0.17).
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from distill_jax.models.decoder import Decoder, Params
from distill_jax.models.hf_io import find_adapted, save_tensors, write_json
from distill_jax.models.origin import Origin
from distill_jax.models.weights import weights_of


def write_peft_adapter(folder: Path, module: Decoder, adapter: Params, scale: float, origin: Origin) -> None:
    """Writes an adapter as PEFT reads it: adapter_config.json and adapter_model.safetensors.

    PEFT multiplies B A by lora_alpha / r, so lora_alpha = scale * r.

    Args:
      adapter: low-rank adapter tree; scale: the whole multiplier of A B.
      origin: of the model that it belongs to, which PEFT loads it on.

    Raises:
      ValueError: modules of different ranks, which PEFT's one `r` can't say.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks, targets = set(), []
    for weight in weights_of(module.spec):
        low = find_adapted(adapter, weight.path[:-1])
        if low is None or weight.path[-1] != "kernel":
            continue
        a, b = (np.asarray(jax.device_get(low[name])) for name in ("a", "b"))
        rank = a.shape[-1]
        ranks.add(rank)
        module_name = weight.hf.removesuffix(".weight")
        targets.append(module_name.rsplit(".", 1)[-1])
        for index in range(module.spec.n_layers if weight.is_stacked else 1):
            stored = f"base_model.model.{_their_name(module_name.format(index), origin)}"
            a_layer, b_layer = (a[index], b[index]) if weight.is_stacked else (a, b)
            tensors[f"{stored}.lora_A.weight"] = np.ascontiguousarray(a_layer.reshape(-1, rank).T)
            tensors[f"{stored}.lora_B.weight"] = np.ascontiguousarray(b_layer.reshape(rank, -1).T)
    if len(ranks) != 1:
        raise ValueError(f"a PEFT adapter has one rank, this one has {sorted(ranks)}")
    (rank,) = ranks
    save_tensors(tensors, folder / "adapter_model.safetensors")
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": origin.hub_name or None,
            **({"revision": origin.revision} if origin.revision else {}),
            "r": rank,
            "lora_alpha": scale * rank,
            "lora_dropout": 0.0,
            # The vision tower has modules of the same names, so there the whole path is said.
            "target_modules": (
                rf".*\.language_model\..*\.({'|'.join(targets)})" if origin.is_wrapped else targets
            ),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


def _their_name(module_name: str, origin: Origin) -> str:
    if origin.is_wrapped and module_name.startswith("model."):
        return "model.language_model." + module_name.removeprefix("model.")
    return module_name
