"""Repeated wall-clock measurements, and the machine's own bounds to compare them with.

Every benchmark prints the same three things: median and spread, a ratio to something that ran in the same
process, and a ratio to what the machine could do at best.

    print(machine())
    ours, plain = measure_together({"ours": f, "plain": g}, repeats=7).values()
    print(f"{ours}; {plain.median / ours.median:.1f} times as fast as plain")
    print(f"{bytes_moved / ours.median / 1e9 / memory_bound_gbs():.0%} of the memory bandwidth")
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: minimum, median and maximum over the repeats."""

    min: float
    median: float
    max: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The summary of one number of seconds for each repeat."""
        return cls(min(seconds), statistics.median(seconds), max(seconds), len(seconds))

    def __str__(self) -> str:
        scale, unit = (1.0, "s") if self.median >= 1 else (1e3, "ms") if self.median >= 1e-3 else (1e6, "µs")
        low, middle, high = (value * scale for value in (self.min, self.median, self.max))
        return f"{middle:.3g} {unit} ({low:.3g} to {high:.3g}, {self.repeats} repeats)"


def measure_together(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 7, warmup: int = 2, at_least: float = 0.0
) -> dict[str, Timing]:
    """Times several functions in turns, so that a change in the machine's load hits all of them alike.

    Args:
      functions: name -> function without arguments. What it returns is waited for (`jax.block_until_ready`).
      repeats: measurements of each function.
      warmup: calls of each function before the first measurement; compilation belongs here.
      at_least: seconds that one measurement lasts; short functions are called again until then.

    Returns:
      Name -> seconds a call.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            calls, begin = 0, time.perf_counter()
            while True:
                jax.block_until_ready(function())
                calls += 1
                elapsed = time.perf_counter() - begin
                if elapsed >= at_least:
                    break
            seconds[name].append(elapsed / calls)
    return {name: Timing.of(values) for name, values in seconds.items()}


def measure(function: Callable[[], Any], repeats: int = 7, warmup: int = 2, at_least: float = 0.0) -> Timing:
    """Times one function; the arguments are those of `measure_together`."""
    return measure_together({"": function}, repeats, warmup, at_least)[""]


def machine() -> str:
    """One line: what the numbers below it were measured on."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_processor()}, {cores} cores; jax {jax.__version__}, {jax.device_count()} x {device.device_kind} "
        f"({device.platform}); Python {platform.python_version()}; load {os.getloadavg()[0]:.1f}"
    )


def _processor() -> str:
    """The processor's name; Linux keeps it in /proc/cpuinfo, elsewhere `platform` knows something."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def matmul_bound_gflops(size: int = 1024, dtype: str = "float32") -> float:
    """GFLOP/s of a square matrix product on the first device: the bound for work made of matrix products.

    Args:
      size: rows and columns.
      dtype: what is multiplied, e.g. "float32" or "bfloat16".
    """
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / measure(lambda: product(x, x), at_least=0.1).min / 1e9


@functools.cache
def memory_bound_gbs(size_mib: int = 256) -> float:
    """GB/s of b + 3 c over float32 arrays of this size (two reads, one write): the bound for moving bytes.

    The result takes the place of a donated input: fresh pages would be timed otherwise.
    """
    count = size_mib * 2**20 // 4
    triad = jax.jit(lambda b, c: b + 3.0 * c, donate_argnums=0)
    c = jnp.ones(count, jnp.float32)
    held = [jnp.ones(count, jnp.float32)]

    def step() -> jax.Array:
        held[0] = triad(held[0], c)
        return held[0]

    return 3 * 4 * count / measure(step, at_least=0.1).min / 1e9


@functools.cache
def dispatch_bound_s() -> float:
    """Seconds that a jitted function costs which does nothing: the bound for very small work."""
    nothing = jax.jit(lambda x: x + 1.0)
    one = jnp.zeros(())
    return measure(lambda: nothing(one), at_least=0.05).min
