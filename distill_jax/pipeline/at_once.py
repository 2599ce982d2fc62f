"""Independent pieces of a stage, several at a time.

The step of a very small model does not fill a machine: most of it is overhead, on one core. Two such trainings side by
side then take little longer than one. Every piece has its own keys, data and folder, so the results are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait


class KeyedLocks:
    """A lock for each key, made at its first use: what several pieces share is made once, and nothing else waits."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[Hashable, threading.Lock] = {}

    def __call__(self, key: Hashable) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())


def run_at_once(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Runs every job, at most `workers` at a time, begun in the order given; 1 runs them here, one after another.

    Raises:
      The first exception of a job: those that have begun are waited for, the others are not begun.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            for future in running:
                future.cancel()
    for future in running:  # in the order of the jobs: of several errors, the same one each time
        if not future.cancelled():
            future.result()
