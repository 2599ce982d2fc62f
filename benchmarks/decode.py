"""Decoding speed, and its ratio to what the machine's matrix products and memory allow.

    python -m benchmarks.decode                        # 64 sampled rows (8 prompts x 8) of a random Llama, 6.8 M
    python -m benchmarks.decode --model smollm2-135m   # greedy, batch 1 and 16, real weights

Every row is decoded to its full length. A step cannot be faster than reading the weights and the filled part of
the cache once, nor than its multiplications at the rate of a large matrix product; prefill likewise.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

from benchmarks.timing import machine, matmul_bound_gflops, measure, memory_bound_gbs
from distill_jax.models.decoder import Decoder, Params, init_params
from distill_jax.models.model import load_model
from distill_jax.models.spec import ModelSpec
from distill_jax.sampling import SamplingConfig, make_sampler, row_keys

SMALL_LLAMA = ModelSpec(
    "llama", vocab_size=2048, d_model=256, n_layers=6, n_heads=8, n_kv_heads=8, head_dim=32, d_ff=1024
)


def pass_bound_s(spec: ModelSpec, itemsize: int, rows: int, tokens: int, past: int) -> float:
    """The least seconds for one forward pass of `tokens` tokens a row behind `past` cached ones, last logits only."""
    embedding = spec.vocab_size * spec.d_model
    layers = spec.num_params - embedding * (1 if spec.tie_embeddings else 2)
    context = past + (tokens + 1) / 2  # slots that a token attends to, on average
    attention = 4 * spec.n_layers * spec.n_heads * spec.head_dim * context
    flops = rows * (tokens * (2 * layers + attention) + 2 * embedding)
    cache = 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * past * rows
    moved = itemsize * (layers + embedding + cache)
    return max(flops / matmul_bound_gflops() / 1e9, moved / memory_bound_gbs() / 1e9)


def report(
    name: str,
    module: Decoder,
    params: Params,
    prompts: int,
    config: SamplingConfig,
    prompt_size: int,
    repeats: int,
) -> None:
    """Times whole rollouts, prefill included, as a user calls them."""
    spec, rows, new = module.spec, prompts * config.num_samples, config.max_new_tokens
    sampler = make_sampler(module, config, buckets=(prompt_size,))
    ids = np.random.default_rng(0).integers(10, spec.vocab_size, (prompts, prompt_size), dtype=np.int32)
    lengths, keys = np.full(prompts, prompt_size), row_keys(jax.random.key(0), rows)
    timing = measure(lambda: sampler(params, ids, lengths, keys), repeats=repeats)
    itemsize = jax.tree.leaves(params)[0].dtype.itemsize
    prefill = pass_bound_s(spec, itemsize, prompts, prompt_size, 0)
    steps = sum(pass_bound_s(spec, itemsize, rows, 1, prompt_size + t) for t in range(new - 1))
    bound = prefill + steps
    print(
        f"{name}: {prompts} prompts of {prompt_size} tokens x {config.num_samples} samples, {new} new tokens"
    )
    print(f"  rollout {timing}; {rows * new / timing.median:,.0f} tokens/s")
    print(
        f"  bound {bound:.3g} s (prefill {prefill:.2g}, {new - 1} steps {steps:.3g}); "
        f"time / bound {timing.median / bound:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a name or path for load_model; without it, the small random Llama")
    parser.add_argument("--dtype", default="float32", help="of the loaded model's weights (default: float32)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows, for a loaded model")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode (default: 64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default: 32)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    print(f"matrix products {matmul_bound_gflops():.0f} GFLOP/s, memory {memory_bound_gbs():.1f} GB/s")
    if arguments.model is None:
        module = Decoder(SMALL_LLAMA)
        config = SamplingConfig(num_samples=8, max_new_tokens=arguments.new)
        params = init_params(module, jax.random.key(0))
        report("small Llama, sampled", module, params, 8, config, arguments.prompt, arguments.repeats)
        return
    model = load_model(arguments.model, dtype=arguments.dtype)
    config = SamplingConfig(num_samples=1, max_new_tokens=arguments.new, temperature=0.0)
    for batch in arguments.batch:
        name = f"{arguments.model} {arguments.dtype}, greedy, batch {batch}"
        report(name, model.module, model.params, batch, config, arguments.prompt, arguments.repeats)


if __name__ == "__main__":
    main()
