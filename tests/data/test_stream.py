"""Batches by step: every row once a pass, whatever the cut, the resume and the number of processes."""

from __future__ import annotations

import collections
import itertools

import pytest

from distill_jax.data import ExampleStream

ROWS = [f"row {number}" for number in range(24)]


def whole(step, seed=3, size=6):
    return ExampleStream(ROWS, size, seed)[step]


def test_every_pass_has_every_row_once_in_an_order_of_its_own():
    first, second = ([row for step in steps for row in whole(step)] for steps in (range(4), range(4, 8)))
    assert sorted(first) == sorted(second) == sorted(ROWS)
    assert first != second and first != ROWS
    assert [whole(step, seed=4) for step in range(4)] != [whole(step) for step in range(4)]


@pytest.mark.parametrize("size", [5, 7])
def test_batches_that_do_not_divide_the_rows_lose_none_at_the_end_of_a_pass(size):
    """24 rows in batches of 5 or 7: after lcm(24, size) rows every one was seen equally often."""
    seen = collections.Counter(row for step in range(24) for row in whole(step, size=size))
    assert set(seen.values()) == {size} and len(seen) == 24


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_each_batch(processes):
    for step in (0, 3, 9):
        parts = [ExampleStream(ROWS, 6, 3, index, processes)[step] for index in range(processes)]
        assert {len(part) for part in parts} == {6 // processes}
        merged = [row for rows in zip(*parts, strict=True) for row in rows]
        assert merged == whole(step)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("cut", [1, 5])
def test_a_resume_sees_every_row_of_the_pass_once(before, after, cut):
    """Killed after `cut` steps, gone on with another number of processes, in the middle of a pass."""
    seen = collections.Counter[str]()
    for processes, steps in ((before, range(cut)), (after, range(cut, 8))):
        for index in range(processes):
            stream = ExampleStream(ROWS, 6, 3, index, processes)
            batches = stream.iterate(steps.start)
            for batch in itertools.islice(batches, len(steps)):
                seen.update(batch)
    assert seen == dict.fromkeys(ROWS, 2)  # two passes


def test_iterating_gives_what_indexing_gives():
    stream = ExampleStream(ROWS, 6, 3, 1, 2)
    assert list(itertools.islice(stream.iterate(2), 5)) == [stream[step] for step in range(2, 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2, 0), "no rows"),
        ((ROWS, 0, 0), "a batch of 0 rows"),
        ((ROWS, 6, 0, 0, 4), "a batch of 6 rows cannot be shared equally by 4 processes"),
        ((ROWS, 6, 0, 2, 2), "process_index must be in 0..1, got 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExampleStream(*arguments)
