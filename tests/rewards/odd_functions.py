"""Functions for the child processes of `test_functions.py`: good ones, and every way to be a bad one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time

NOT_A_FUNCTION = 3
SEEN: list[str] = []


def length(completion: str) -> float:
    print("printing must not disturb the replies")
    return float(len(completion))


def pick(completion: str, answer: str = "", **others: object) -> float:
    return float(completion == answer) + len(others)


def misbehave(completion: str) -> float:
    """What the completion says."""
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "exit":
        sys.exit(3)
    if completion == "die":
        os._exit(7)
    if completion == "hang":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                continue
    if completion == "hang in C":
        ctypes.pythonapi.PyGILState_Ensure()  # keeps the interpreter from ever running another thread's code
        ctypes.CDLL(None).sleep(60)
    if completion == "write everywhere":
        for descriptor in range(3, 20):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"no reply at all")
    if completion == "memory":
        return float(len(bytearray(3 << 30)))
    if completion == "infinite":
        return float("inf")
    if completion == "text":
        return "one"  # type: ignore[return-value]
    SEEN.append(completion)
    return float(len(SEEN))


def needs_more(completion: str, teacher: str) -> float:
    return 0.0
