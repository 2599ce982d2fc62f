"""Temporary memory and time of the gradient of a log-probability loss: all logits at once, and in chunks.

    python -m benchmarks.logprob_memory

The memory is what the compiler reports for the compiled gradient, without arguments and results, beside the size
of one float32 array of logits [B, T, V]. Two shapes: a wide vocabulary on one thin layer, where logits are all
that counts, and a 6-layer model with a small vocabulary, where activations count as well, although layers are
recomputed too (remat "full").
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.timing import machine, measure_together
from distill_jax.logprobs import score_completions
from distill_jax.metrics import format_table
from distill_jax.models.decoder import Decoder, Params, apply, init_params, unembed
from distill_jax.models.spec import ModelSpec
from distill_jax.sequences import Sequences

SHAPES: dict[str, tuple[ModelSpec, int, int, int, tuple[int, ...]]] = {
    # name: (model, rows B, prompt P, completion T, chunk sizes)
    "wide vocabulary": (
        ModelSpec(
            "llama", vocab_size=32000, d_model=256, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, d_ff=64
        ),
        *(4, 1, 256),
        (128, 64, 32, 8),
    ),
    "small Llama": (
        ModelSpec(
            "llama", vocab_size=2048, d_model=256, n_layers=6, n_heads=8, n_kv_heads=8, head_dim=32, d_ff=1024
        ),
        *(64, 32, 64),
        (32, 16, 8),
    ),
}


def full_loss(module: Decoder, params: Params, sequences: Sequences) -> jax.Array:
    """Sum of the completions' log-probabilities from one array of logits (prompts without padding)."""
    hidden, _ = apply(module, params, sequences.tokens, sequences.positions(), sequences.valid())
    logits = unembed(module, params, hidden[:, sequences.prompt_size - 1 : -1])
    return jnp.take_along_axis(jax.nn.log_softmax(logits), sequences.completion[..., None], axis=-1).sum()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    for name, (spec, rows, prompt, completion, chunks) in SHAPES.items():
        module = Decoder(spec, remat="full")
        params = init_params(module, jax.random.key(0))
        tokens = jax.random.randint(jax.random.key(1), (rows, prompt + completion), 0, spec.vocab_size)
        sequences = Sequences(tokens, jnp.full(rows, prompt), jnp.full(rows, completion), prompt)

        def chunked(chunk: int, module: Decoder = module) -> Callable[[Params, Sequences], jax.Array]:
            return lambda p, s: score_completions(module, p, s, chunk=chunk).lp.sum()

        losses = {"all at once": lambda p, s, module=module: full_loss(module, p, s)}
        losses |= {f"chunks of {chunk}": chunked(chunk) for chunk in chunks}
        compiled = {
            label: jax.jit(jax.value_and_grad(loss)).lower(params, sequences).compile()
            for label, loss in losses.items()
        }
        timings = measure_together(
            {label: lambda f=f: f(params, sequences) for label, f in compiled.items()},  # noqa: B023
            repeats=arguments.repeats,
        )
        logits_bytes = rows * completion * spec.vocab_size * 4
        table = []
        for label, function in compiled.items():
            temporary = function.memory_analysis().temp_size_in_bytes
            table.append(
                (
                    label,
                    f"{temporary / 2**20:.0f} MiB",
                    f"{temporary / logits_bytes:.2f}",
                    str(timings[label]),
                    f"{timings[label].median / timings['all at once'].median:.2f}",
                )
            )
        print(f"\n{name}: B {rows}, P {prompt}, T {completion}, D {spec.d_model}, V {spec.vocab_size}")
        print(f"one float32 array of logits: {logits_bytes / 2**20:.0f} MiB")
        print(format_table(table, ("logits", "temporaries", "/ one array", "time", "/ all at once")))


if __name__ == "__main__":
    main()
