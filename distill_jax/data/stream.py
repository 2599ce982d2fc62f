"""Batches in an order that a checkpoint can name by one number.

The order is grain's: every pass over the data has its own permutation, a function of the seed, and element i of
the endless sequence is known without walking there. Batch `step` is elements step * size .. of that sequence, so
a run that goes on at a step sees what it would have seen, and no row is lost or seen twice across the cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import grain

Item = TypeVar("Item", covariant=True)


class Indexed(Protocol[Item]):
    """What can be read at any place: a list, or a source of `sources`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


class ExampleStream(Generic[Item]):
    """Endless batches of a data set, and this process's part of each.

    Process p of n has the elements p, p + n, p + 2 n ... of the sequence, so the n parts of a batch make up the same
    batch for every n: a run may go on with another number of processes.

        stream = ExampleStream(problems, 16, seed=0)
        for step in range(resumed_step, steps):
            batch = stream[step]

    Args:
      source: rows by index.
      batch_size: rows of a whole batch, of all processes together.
      seed: of the order.
      process_index, process_count: which part is read here. Left alone, every process reads the whole batch, which
        is what `mesh.place_batch` takes: it cuts the rows that a process is given out of a batch that all of them hold.

    Raises:
      ValueError: an empty source, a batch below 1, or one that the processes cannot share equally.
    """

    def __init__(
        self,
        source: Indexed[Item],
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if len(source) < 1:
            raise ValueError("there are no rows to make batches of")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"a batch of {batch_size} rows cannot be shared equally by {process_count} processes; choose a "
                "multiple of their number"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
        order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        part = order[process_index::process_count] if process_count > 1 else order
        self._batches = part.batch(batch_size // process_count, batch_fn=list)

    def __getitem__(self, step: int) -> list[Item]:
        """This process's rows of batch `step`."""
        return self._batches[step]

    def iterate(self, step: int = 0, prefetch: int = 2) -> Iterator[list[Item]]:
        """Batches from `step` on, read ahead by threads.

        Args:
          step: where to begin.
          prefetch: batches that are read before they are asked for.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        batches = iter(self._batches.to_iter_dataset(options))
        batches.set_state({"next_index": step})
        return batches
