"""A batch in pieces of rows, so that what a model computes for all rows never exists at one time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.mesh import axis_size, constrain
from distill_jax.sequences import Sequences


def split_rows(x: jax.Array, pieces: int, mesh: Mesh | None) -> jax.Array:
    """[B, ...] -> [pieces, B / pieces, ...] with row b in piece b % pieces.

    Rows are sharded in contiguous blocks. Taking every pieces-th row takes as many from each block, so each
    device keeps working on its own rows; cutting the batch into contiguous pieces would move them.
    """
    x = jnp.swapaxes(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 0, 1)
    return constrain(x, mesh, (None, "batch") + (None,) * (x.ndim - 2))


def join_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """[pieces, B / pieces, ...] -> [B, ...]: undoes `split_rows`."""
    x = jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
    return constrain(x, mesh, ("batch",) + (None,) * (x.ndim - 1))


def count_pieces(rows: int, most: int, mesh: Mesh | None) -> int:
    """The smallest number of equal pieces of at most `most` rows that the mesh can share out.

    Where `most` is less than one row a device, a piece has one row a device.
    """
    shards = 1 if mesh is None else axis_size(mesh, "batch")
    if rows % shards:
        return 1  # not shared out by rows at all
    wanted = min(-(-rows // most), rows // shards)
    return next(n for n in range(max(wanted, 1), rows // shards + 1) if (rows // shards) % n == 0)


def map_rows(
    score: Callable[[Sequences], jax.Array], sequences: Sequences, pieces: int, mesh: Mesh | None
) -> jax.Array:
    """`score` of all rows, [B, ...], computed one piece after the other; inside jit.

    Args:
      score: rows -> an array with the same leading dimension, each row by itself.
      sequences: B rows.
      pieces: divides B; see `count_pieces`.
      mesh: of the model; rows keep their devices.
    """
    if pieces == 1:
        return score(sequences)
    split = jax.tree.map(lambda x: split_rows(jnp.asarray(x), pieces, mesh), sequences)
    return join_rows(jax.lax.map(score, split), mesh)
