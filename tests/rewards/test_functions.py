"""Functions in child processes: values in order, and each way to misbehave costs one sample."""

from __future__ import annotations

import gc
import os
import pathlib
import threading
import time

import pytest

from distill_jax.rewards.functions import LimitedFunction

ODD = "tests.rewards.odd_functions"
NAMES = ("prompt", "completion", "answer")


def calls(*completions):
    return [{"prompt": "p", "completion": text, "answer": "a"} for text in completions]


def alive(process_ids):
    return [pid for pid in process_ids if os.path.exists(f"/proc/{pid}")]


def children():
    own = os.getpid()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == own:
                found.append(int(entry))
    return found


def test_values_come_in_order_and_parameters_by_name():
    assert LimitedFunction(f"{ODD}:length", NAMES, workers=2)(calls("a", "", "abc")) == [1.0, 0.0, 3.0]
    assert LimitedFunction(f"{ODD}:pick", NAMES)(calls("a", "b")) == [2.0, 1.0]  # `prompt` among the others


def test_each_failure_costs_its_own_sample(caplog):
    function = LimitedFunction(f"{ODD}:misbehave", NAMES, seconds=1.0, workers=1, memory_bytes=2 << 30)
    bad = ("raise", "exit", "die", "hang", "hang in C", "write everywhere", "memory", "infinite", "text")
    started = time.monotonic()
    values = function(calls("first", *bad, "last"))
    assert time.monotonic() - started < 60
    assert values == [1.0, *[None] * len(bad), 1.0]  # the last one's process is new
    assert function.failures == len(bad)
    assert [record.message.count("KeyError") for record in caplog.records] == [1]  # only the first is told


def test_a_call_that_takes_too_much_memory_is_lost_and_counted(caplog):
    function = LimitedFunction(f"{ODD}:misbehave", NAMES, workers=1, memory_bytes=1 << 30)
    values = function(calls("x", "x", "memory", "x", "x"))
    assert values == [1.0, 2.0, None, 1.0, 2.0]  # the call after it has a new process
    assert function.failures == 1
    assert "it needed more memory than memory_bytes=1073741824" in caplog.text


def test_time_limit_works_in_a_thread():
    function = LimitedFunction(f"{ODD}:misbehave", NAMES, seconds=0.5)
    values = []
    thread = threading.Thread(target=lambda: values.extend(function(calls("hang", "x"))))
    thread.start()
    thread.join(30)
    assert values == [None, 1.0]


def test_children_are_gone_with_the_function():
    before = set(children())
    function = LimitedFunction(f"{ODD}:length", NAMES, workers=2)
    function(calls("a", "b", "c"))
    own = set(children()) - before
    assert own
    del function
    gc.collect()
    assert not alive(own)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("score", "named as 'module:function'.*got 'score'"),
        ("no_such_module:score", "no module 'no_such_module'; start in its folder"),
        (f"{ODD}:lenght", "has no 'lenght' .did you mean 'length'"),
        (f"{ODD}:NOT_A_FUNCTION", "is a int, expected a function"),
        (
            f"{ODD}:needs_more",
            "needs the parameter 'teacher'; it can be given, by name: prompt, completion, answer",
        ),
    ],
)
def test_functions_that_cannot_be_loaded(path, message):
    with pytest.raises(ValueError, match=message):
        LimitedFunction(path, NAMES)


def test_bad_limits():
    with pytest.raises(ValueError, match="seconds must be above 0"):
        LimitedFunction(f"{ODD}:length", NAMES, seconds=0)
    with pytest.raises(ValueError, match=r"memory_bytes must be at least 67108864.* got 1000"):
        LimitedFunction(f"{ODD}:length", NAMES, memory_bytes=1000)
