"""Functions that may raise, hang or take the memory of the machine, called so that each costs one sample at most.

A thread cannot be stopped, and a signal reaches the main thread alone, so the calls are made in child
processes: whatever a call does, its process can be killed. Children are started as programs, not forked, for
a process that has used JAX must not be forked.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import os
import pickle
import queue
import select
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

_LOADING_SECONDS = 300.0  # importing sympy, or a user's own module, on a busy machine
_LARGEST_REPLY = 1 << 20  # bytes; a number, or what was raised
_GRACE_SECONDS = 2.0  # the kernel's alarm in the child comes first
LEAST_MEMORY_BYTES = 64 << 20

_log = logging.getLogger(__name__)


class CallFailed(Exception):
    """One call gave no number: it raised, took too long, or its process died."""


class _Child:
    """One process; started at its first call, and again after it died."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self._command, self._seconds = list(command), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._takes: tuple[str, ...] = ()

    def start(self) -> None:
        """Raises ValueError when the function cannot be loaded."""
        if self._process is not None:
            return
        # The child must find what this process would find, and leave the accelerator alone.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "JAX_PLATFORMS": "cpu",
        }
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        try:
            kind, value = self._receive(_LOADING_SECONDS, _LOADING_SECONDS)
        except CallFailed as error:
            raise ValueError(
                f"{self._command[3]!r} could not be loaded in a child process: {error}"
            ) from error
        if kind == "refused":
            self.stop()
            raise ValueError(value)
        self._takes = value

    def call(self, arguments: Mapping[str, Any]) -> float:
        """Raises CallFailed."""
        try:
            self.start()
        except ValueError as error:  # it could be loaded before
            raise CallFailed(str(error)) from error
        assert self._process is not None and self._process.stdin is not None
        try:
            request = pickle.dumps({name: arguments[name] for name in self._takes})
        except Exception as error:
            raise CallFailed(f"its arguments cannot be sent to another process: {error!r}") from error
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except OSError as error:
            self.stop()
            raise CallFailed(f"its process had died: {error}") from error
        kind, value = self._receive(self._seconds, self._seconds + _GRACE_SECONDS)
        if kind == "exhausted":
            self.stop()  # what the call left in memory would cost the next ones too
            raise CallFailed(f"it needed more memory than memory_bytes={value}")
        if kind == "raised":
            raise CallFailed(f"it raised {value}")
        if not math.isfinite(value):
            raise CallFailed(f"it gave {value}")
        return value

    def stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was still to be written goes nowhere
                    pipe.close()  # type: ignore[union-attr]
            process.wait()

    def _receive(self, limit: float, patience: float) -> tuple[str, Any]:
        """A reply; CallFailed when there is none after `limit` (the child's own) or `patience` (ours) seconds."""
        started = time.monotonic()
        try:
            (size,) = struct.unpack(">Q", self._read(8, started + patience))
            if size > _LARGEST_REPLY:  # the function wrote to a pipe that is not its own
                raise ValueError(f"a reply of {size} bytes")
            return pickle.loads(self._read(size, started + patience))
        except Exception:  # whatever stands there, it is no reply
            waited = time.monotonic() - started
            self.stop()
            why = (
                f"it took more than {limit:g} s"
                if waited >= 0.99 * limit
                else "its process died or spoke nonsense"
            )
            raise CallFailed(why) from None

    def _read(self, size: int, deadline: float) -> bytes:
        """So many bytes of the child's output; EOFError when it ends before, TimeoutError when they do not come."""
        assert self._process is not None and self._process.stdout is not None
        pipe, found = self._process.stdout.fileno(), b""
        while len(found) < size:
            if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                raise TimeoutError
            part = os.read(pipe, size - len(found))
            if not part:
                raise EOFError
            found += part
        return found


def _stop_all(children: Sequence[_Child]) -> None:
    for child in children:
        child.stop()


class LimitedFunction:
    """A Python function by import path, called on many arguments at once, a few processes at a time.

        equal = LimitedFunction("my_rewards:score", names=("completion", "answer"), seconds=2.0)
        equal([{"completion": "4", "answer": "4"}])  # [1.0]

    Works from any thread. The function is loaded in the children alone: what it changes there is not seen
    here, and it keeps what it has loaded between calls.

    Args:
      path: "module:function".
      names: what each call offers; the function takes those that its parameters are named after.
      seconds: wall-clock time of one call.
      workers: processes.
      memory_bytes: that each may allocate, what it has imported included; None sets no limit. A call that asks for more
        gives no number, and the next one gets a new process.

    Attributes:
      failures: calls that gave no finite number.

    Raises:
      ValueError: the function cannot be loaded, or takes other parameters (see `worker.load_function`).
    """

    def __init__(
        self,
        path: str,
        names: Sequence[str],
        *,
        seconds: float = 5.0,
        workers: int = 2,
        memory_bytes: int | None = None,
    ) -> None:
        if not seconds > 0 or workers < 1:
            raise ValueError(f"seconds must be above 0 and workers at least 1, got {seconds} and {workers}")
        if memory_bytes is not None and memory_bytes < LEAST_MEMORY_BYTES:
            raise ValueError(
                f"memory_bytes must be at least {LEAST_MEMORY_BYTES}, less does not even hold Python; "
                f"got {memory_bytes}"
            )
        self.path, self.failures = path, 0
        limits = (repr(float(seconds)), str(memory_bytes or 0))
        command = (sys.executable, "-m", "distill_jax.rewards.worker", path, ",".join(names), *limits)
        children = [_Child(command, seconds) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in children:
            self._idle.put(child)
        self._workers = workers
        self.close = weakref.finalize(self, _stop_all, children)  # also when it is forgotten, and at exit
        children[0].start()

    def __call__(self, calls: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The function's value for each call, in order; None where there is none."""
        with concurrent.futures.ThreadPoolExecutor(min(self._workers, max(len(calls), 1))) as pool:
            results = list(pool.map(self._one, calls))
        for arguments, result in zip(calls, results, strict=True):
            if isinstance(result, CallFailed):
                if not self.failures:
                    _log.warning(
                        "%s failed on %r: %s; later failures are only counted", self.path, arguments, result
                    )
                self.failures += 1
        return [None if isinstance(result, CallFailed) else result for result in results]

    def _one(self, arguments: Mapping[str, Any]) -> float | CallFailed:
        child = self._idle.get()
        try:
            return child.call(arguments)
        except CallFailed as error:
            return error
        finally:
            self._idle.put(child)
