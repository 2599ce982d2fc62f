"""Make the reference scores of `goldens/` with torch and transformers. Run by hand, never by the tests.

    python make_goldens.py

The files here were made with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, in float32 with eager attention:
small random classifiers, FAMILY/{config.json,model.safetensors,golden.npz}. Every row is scored alone, so no padding
takes part in the reference.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

HERE = Path(__file__).parent / "goldens"
BASE = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    num_labels=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LENGTHS = (9, 3, 1, 12)


def main() -> None:
    torch.manual_seed(0)
    # An untied head, as the 8B models have it, and a tied one; neither is stored.
    for name, model in (
        ("llama", LlamaForSequenceClassification(LlamaConfig(**BASE))),
        ("qwen3", Qwen3ForSequenceClassification(Qwen3Config(**BASE, head_dim=8, tie_word_embeddings=True))),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0 if parameter.ndim > 1 else 1.0, 0.3)
        model.save_pretrained(HERE / name)
        model = AutoModelForSequenceClassification.from_pretrained(
            HERE / name, attn_implementation="eager"
        ).eval()
        tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
        scores = np.zeros(len(LENGTHS), np.float32)
        for row, length in enumerate(LENGTHS):
            tokens[row, :length] = np.random.default_rng(row).integers(3, 48, length)
            with torch.no_grad():
                ids = torch.tensor(tokens[None, row, :length].astype(np.int64))
                scores[row] = model(ids).logits[0, 0].item()
        np.savez(
            HERE / name / "golden.npz", tokens=tokens, lengths=np.array(LENGTHS, np.int32), scores=scores
        )
        print(name, scores)


if __name__ == "__main__":
    main()
