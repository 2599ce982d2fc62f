"""Make the reference answers of this folder with torch and transformers. Run by hand, never by the tests.

    python make_goldens.py small                               one small random model a family
    python make_goldens.py real smollm2-135m PATH.gguf         a real model: SmolLM2-135M-Instruct.Q4_1.gguf
    python make_goldens.py real gemma3-270m PATH.gguf          a real model: gemma-3-270m-q4_k_m.gguf

The files here were made with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, gguf 0.19.0, numpy 2.4.6,
in float32 with eager attention. `small` writes FAMILY/{config.json,model*.safetensors,golden.npz}; `real`
writes NAME.npz.

The weights of the small models are random in *every* parameter: biases and norm weights are zeros and ones in
a new model, and a loader that drops or misplaces them would not be seen. Windows and the context at which
llama3 scaling bends the frequencies are smaller than the test sequence for the same reason.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
VOCABULARY = 128
BASE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE: dict[str, Any] = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
GEMMA3_TEXT: dict[str, Any] = BASE | dict(
    num_hidden_layers=4,
    num_key_value_heads=1,
    head_dim=16,
    sliding_window=6,
    query_pre_attn_scalar=24,
    tie_word_embeddings=True,
)
VISION = dict(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def small_models():
    """{folder: (model class, config)}; each covers what is particular to its family."""
    return {
        # SmolLM2 and Llama 2: tied head, one head width for everything.
        "llama": (LlamaForCausalLM, LlamaConfig(**BASE, tie_word_embeddings=True, rms_norm_eps=1e-5)),
        # Llama 3.x: frequency-dependent rope scaling, own head, head width that is not hidden / heads.
        "llama3": (
            LlamaForCausalLM,
            LlamaConfig(**BASE, tie_word_embeddings=False, head_dim=16, rope_parameters=LLAMA3_ROPE),
        ),
        "mistral": (MistralForCausalLM, MistralConfig(**BASE, tie_word_embeddings=False, sliding_window=7)),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config(**BASE, tie_word_embeddings=True)),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**BASE, tie_word_embeddings=False, head_dim=16)),
        # Caps low enough that they bend the scores of a small model.
        "gemma2": (
            Gemma2ForCausalLM,
            Gemma2Config(
                **BASE,
                head_dim=16,
                sliding_window=5,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                query_pre_attn_scalar=24,
            ),
        ),
        "gemma3_text": (
            Gemma3ForCausalLM,
            Gemma3TextConfig(
                **GEMMA3_TEXT,
                layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            ),
        ),
        # The 4B and 12B checkpoints: text inside a model of images, linear rope scaling on global layers,
        # shards.
        "gemma3": (
            Gemma3ForConditionalGeneration,
            Gemma3Config(
                text_config=GEMMA3_TEXT
                | dict(
                    num_hidden_layers=6,
                    intermediate_size=24,
                    rope_parameters={
                        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    },
                ),
                vision_config=VISION,
                mm_tokens_per_image=1,
                image_token_index=127,
                boi_token_index=125,
                eoi_token_index=126,
            ),
        ),
    }


def randomise(model, seed):
    """Give every parameter random values of a size that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight"):
                value.copy_(value + 0.2 * noise)
            elif value.ndim == 1:
                value.copy_(0.2 * noise)
            elif "embed_tokens" in name:
                value.copy_(0.15 * noise)  # small, or a tied model only repeats its input
            else:
                gain = 0.8 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.2
                value.copy_(noise * gain / value.shape[-1] ** 0.5)


def greedy(model, ids, count):
    """The greedy continuation by full passes, and the smallest gap between the best and the second logit."""
    sequence, gaps = list(ids), []
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([sequence]), use_cache=False, logits_to_keep=1).logits[
                0, -1
            ]
            best = torch.topk(logits, 2).values
            gaps.append(float(best[0] - best[1]))
            sequence.append(int(logits.argmax()))
    return np.array(sequence[len(ids) :], np.int32), min(gaps)


def make_small():
    for index, (name, (model_class, config)) in enumerate(small_models().items()):
        config._attn_implementation = "eager"
        model = model_class(config).eval().float()
        randomise(model, seed=10 + index)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size="60KB" if name == "gemma3" else "5GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        for file in folder.iterdir():
            file.chmod(0o644)
        rng = np.random.default_rng(index)
        tokens = rng.integers(3, 120, size=(2, 48)).astype(np.int32)
        # Saved in float32, computed in float64, so that the reference's own rounding does not use up the
        # tolerance.
        model.double()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
        prompt = tokens[0, :20]
        continuation, gap = greedy(model, prompt, 12)
        np.savez_compressed(
            folder / "golden.npz",
            tokens=tokens,
            logits=logits.astype(np.float32),
            prompt=prompt,
            continuation=continuation,
        )
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"{name}: {size} bytes, logits std {logits.std():.2f}, greedy {continuation.tolist()}, least gap {gap:.1e}"
        )


PARAGRAPH = (
    "The lighthouse keeper counted the ships that passed each night and wrote the number in a worn ledger. On the "
    "first night he saw twelve, on the second he saw nine, and on the third the fog was so thick that he saw none at "
    "all. "
    "He wondered whether anybody would ever read what he had written. In winter the sea froze along the shore and "
    "the children of the village walked out on the ice; in summer they dived for coins that the travellers threw. "
)
LONG_TEXT = " ".join(
    PARAGRAPH.replace("twelve", str(12 + 7 * i)).replace("nine", str(9 + 5 * i)).replace("winter", month)
    for i, month in enumerate(
        ["winter", "January", "February", "March", "April", "May", "June", "July", "August"]
    )
)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
REAL_PROMPTS = {
    "smollm2-135m": [
        CHAT.format("What is 12 + 7? Answer step by step."),
        CHAT.format("Name the capital of France and one river that flows through it."),
        "def fibonacci(n):\n    ",
    ],
    "gemma3-270m": [
        "Question: What is 3 + 4?\nAnswer: 3 + 4 = 7\n\nQuestion: What is 12 + 7?\nAnswer:",
        "The capital of France is",
        "def fibonacci(n):\n    ",
    ],
}
REAL_LENGTH = {"smollm2-135m": 192, "gemma3-270m": 640}
TOP = 64


def make_real(name, path):
    path = Path(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    print(model.config)
    length = REAL_LENGTH[name]
    tokens = np.array(tokenizer(LONG_TEXT)["input_ids"][:length], np.int32)
    assert len(tokens) == length, len(tokens)
    # A few early positions, then evenly spread ones: for Gemma most of them lie beyond the 512-token window.
    positions = np.unique(np.concatenate([[0, 1, 7], np.linspace(31, length - 1, 18).astype(int)])).astype(
        np.int32
    )
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.tensor(tokens[None], dtype=torch.long), use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[0, torch.tensor(positions, dtype=torch.long)]).float()
        top = torch.topk(logits, TOP)
        normaliser = torch.logsumexp(logits, dim=-1)
    answer = dict(
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        tokens=tokens,
        positions=positions,
        top_ids=top.indices.numpy().astype(np.int32),
        top_logits=top.values.numpy(),
        normaliser=normaliser.numpy(),
        mean_logit=logits.mean(dim=-1).numpy(),
    )
    for index, text in enumerate(REAL_PROMPTS[name]):
        prompt = np.array(tokenizer(text)["input_ids"], np.int32)
        continuation, gap = greedy(model, prompt, 24)
        print(json.dumps([text, prompt.tolist(), tokenizer.decode(continuation), f"least gap {gap:.1e}"]))
        answer[f"prompt_{index}"], answer[f"continuation_{index}"] = prompt, continuation
    np.savez_compressed(HERE / f"{name}.npz", **answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["small", "real"])
    parser.add_argument("name", nargs="?")
    parser.add_argument("path", nargs="?")
    arguments = parser.parse_args()
    if arguments.kind == "small":
        make_small()
    else:
        make_real(arguments.name, arguments.path)
