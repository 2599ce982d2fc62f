"""A whole GRPO step, and its ratio to what the machine's matrix products and memory allow.

    python -m benchmarks.grpo_step               # all parameters, then an adapter, then with a reference pass

The shape: a random Llama of 6.8 M parameters in float32, 8 prompts of 32 tokens x 8 samples, completions of 64 tokens
all of full length, temperature 1, one optimiser step a rollout. A step is the rollout, the reward of its ids on the
host, group advantages and the update. The bound counts the multiplications of each part at the rate of a large matrix
product: one forward pass a token decoded, three for an update of all weights (forward, gradients of activations,
gradients of weights), two and the adapter's own products for an adapter.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import SMALL_LLAMA, pass_bound_s
from benchmarks.timing import Timing, machine, matmul_bound_gflops, memory_bound_gbs
from distill_jax.models.adapter import AdapterConfig, adapter_scale, init_adapter
from distill_jax.models.decoder import Decoder, init_params
from distill_jax.optimizer import OptimizerConfig, make_optimizer
from distill_jax.rft.advantages import group_normalise
from distill_jax.rft.losses import KLAnchor
from distill_jax.rft.step import RftBatch, RftConfig, init_rft_state, make_rft_step
from distill_jax.rft.texts import plain_scores
from distill_jax.sampling import SamplingConfig, make_sampler, row_keys

ADAPTER = AdapterConfig(rank=8, alpha=16.0)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Q prompts of P tokens, G samples of T tokens each."""

    prompts: int = 8
    samples: int = 8
    prompt_size: int = 32
    completion_size: int = 64

    @property
    def rows(self) -> int:
        return self.prompts * self.samples


def rollout_bound_s(shape: Shape) -> float:
    """Prefill of the prompts, and one step of all rows for each further token."""
    prefill = pass_bound_s(SMALL_LLAMA, 4, shape.prompts, shape.prompt_size, 0)
    steps = range(shape.completion_size - 1)
    return prefill + sum(pass_bound_s(SMALL_LLAMA, 4, shape.rows, 1, shape.prompt_size + t) for t in steps)


def forward_bound_s(shape: Shape) -> float:
    """One pass over all rows with the logits of their completion tokens."""
    tokens = shape.prompt_size + shape.completion_size
    embedding = SMALL_LLAMA.vocab_size * SMALL_LLAMA.d_model
    further_logits = shape.rows * (shape.completion_size - 1) * 2 * embedding / matmul_bound_gflops() / 1e9
    return pass_bound_s(SMALL_LLAMA, 4, shape.rows, tokens, 0) + further_logits


def steps(
    trainable: str, with_reference: bool, shape: Shape, repeats: int, micro_batches: int
) -> dict[str, Timing]:
    """Seconds of the parts of `repeats` steps; the first two, which compile, are left out."""
    module = Decoder(SMALL_LLAMA)
    params = init_params(module, jax.random.key(0))
    config = RftConfig(
        num_samples=shape.samples,
        kl=KLAnchor("k1", "reward", 0.04 if with_reference else 0.0),
        micro_batches=micro_batches,
    )
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4, warmup_steps=0, final_fraction=0.5), 1000)
    is_adapter = trainable == "adapter"
    scale = float(adapter_scale(ADAPTER)) if is_adapter else 1.0
    step = make_rft_step(module, config, optimizer, trainable=trainable, scale=scale)
    state = init_rft_state(
        init_adapter(module, ADAPTER, jax.random.key(1)) if is_adapter else params, optimizer
    )
    sampler = make_sampler(
        module, SamplingConfig(shape.samples, shape.completion_size), buckets=(shape.prompt_size,)
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, SMALL_LLAMA.vocab_size, (shape.prompts, shape.prompt_size), dtype=np.int32)
    lengths = np.full(shape.prompts, shape.prompt_size)
    normalise = jax.jit(functools.partial(group_normalise, num_samples=shape.samples))
    seconds: dict[str, list[float]] = {"rollout": [], "reference": [], "update": [], "step": []}
    for index in range(repeats + 2):
        marks = [time.perf_counter()]

        def mark(value: Any, marks: list[float] = marks) -> None:
            jax.block_until_ready(value)
            marks.append(time.perf_counter())

        keys = row_keys(jax.random.key(index), shape.rows)
        policy = (params, state.trainable) if is_adapter else (state.trainable, None)
        batch = sampler(policy[0], prompts, lengths, keys, adapter=policy[1], scale=scale)
        mark(batch)
        lp_reference = plain_scores(module, params, batch.sequences) if with_reference else batch.lp
        mark(lp_reference)
        ids = np.asarray(batch.sequences.completion)
        assert np.asarray(batch.sequences.completion_length).min() == shape.completion_size
        advantages = normalise(jnp.asarray((ids % 2 == 0).mean(axis=1), jnp.float32))
        rft_batch = RftBatch(batch.sequences, advantages, lp_reference, batch.lp)
        state, metrics = step(state, params if is_adapter else None, rft_batch)
        mark((state, metrics))
        if index >= 2:
            for name, begin, end in (
                ("rollout", 0, 1),
                ("reference", 1, 2),
                ("update", 2, 3),
                ("step", 0, 3),
            ):
                seconds[name].append(marks[end] - marks[begin])
    assert abs(float(metrics["ratio_max"]) - 1) < 1e-3, "the sampler and the step disagree"
    return {name: Timing.of(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each kind (default: 7)")
    parser.add_argument("--micro-batches", type=int, default=1, help="pieces of an update (default: 1)")
    arguments = parser.parse_args()
    shape = Shape()
    print(machine())
    print(f"matrix products {matmul_bound_gflops():.0f} GFLOP/s, memory {memory_bound_gbs():.1f} GB/s")
    forward, rollout = forward_bound_s(shape), rollout_bound_s(shape)
    for name, trainable, with_reference in (
        ("all parameters", "params", False),
        ("all parameters, with a reference pass", "params", True),
        ("adapter of rank 8, with a reference pass", "adapter", True),
    ):
        timings = steps(trainable, with_reference, shape, arguments.repeats, arguments.micro_batches)
        bounds = {
            "rollout": rollout,
            "reference": forward if with_reference else 0.0,
            "update": forward * (3 if trainable == "params" else 2),
        }
        bounds["step"] = sum(bounds.values())
        print(name)
        for part, timing in timings.items():
            if bounds[part]:
                ratio = timing.median / bounds[part]
                print(f"  {part:9s} {timing}; bound {bounds[part]:.3g} s; time / bound {ratio:.2f}")


if __name__ == "__main__":
    main()
