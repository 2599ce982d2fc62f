"""A ring of old rows: a fixed number of them, the oldest overwritten first. Pure functions of arrays."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """rows: any tree of arrays with a leading [N]; written: i32[], rows ever pushed."""

    rows: Any
    written: jax.Array

    @property
    def size(self) -> int:
        """N"""
        return jax.tree.leaves(self.rows)[0].shape[0]


def init_replay(example: Any, size: int) -> Replay:
    """An empty ring for rows like those of `example`, a batch of arrays with a leading [B].

    Raises:
      ValueError: the ring is smaller than the batch, so that a push would overwrite itself.
    """
    rows = jax.tree.leaves(example)[0].shape[0]
    if size < rows:
        raise ValueError(f"a ring of {size} rows cannot hold one batch of {rows}; make it at least as large")
    empty = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), example)
    return Replay(empty, jnp.int32(0))


@jax.jit
def push_rows(replay: Replay, batch: Any) -> Replay:
    """The ring with the rows of a batch written over its oldest."""
    count = jax.tree.leaves(batch)[0].shape[0]
    slots = (replay.written + jnp.arange(count)) % replay.size
    rows = jax.tree.map(lambda ring, leaf: ring.at[slots].set(leaf), replay.rows, batch)
    return Replay(rows, replay.written + count)


@functools.partial(jax.jit, static_argnames=("count",))
def draw_rows(replay: Replay, key: jax.Array, count: int) -> Any:
    """`count` rows drawn uniformly, with replacement, from those that were written; at least one must have been."""
    filled = jnp.minimum(replay.written, replay.size)
    chosen = jax.random.randint(key, (count,), 0, filled)
    return jax.tree.map(lambda ring: ring[chosen], replay.rows)
