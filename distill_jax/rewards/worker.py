"""The child process of `functions.LimitedFunction`: loads one function and calls it until its input ends.

    python -m distill_jax.rewards.worker MODULE:FUNCTION NAME,NAME,... SECONDS MEMORY_BYTES

Requests are pickles on standard input, replies on standard output, each after its length in eight bytes. A call
that takes too long is ended by the kernel: the alarm has its default action, which kills the process whatever it
is doing, so a loop in C code or a function that catches every exception cannot outlive its time. The parent
starts another child.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any


def load_function(path: str, names: Sequence[str]) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The function that "module:function" names, and which of `names` it takes.

    Args:
      path: "module:function"; the function may be an attribute of an attribute ("module:Class.method").
      names: keyword arguments that it can be given. One with `**anything` takes them all.

    Raises:
      ValueError: no such form, module or function, a module that cannot be imported, something that cannot be
        called, or a parameter that nothing can be given to.
    """
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(
            f"a function is named as 'module:function', such as 'my_rewards:score'; got {path!r}"
        )
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path!r}: there is no module {error.name!r}; start in its folder, or put that on PYTHONPATH"
        ) from error
    except Exception as error:
        hint = "; give it more memory_bytes" if isinstance(error, MemoryError) else ""
        raise ValueError(f"{path!r}: importing {module_name} failed with {error!r}{hint}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            close = difflib.get_close_matches(name, dir(found), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{path!r}: {module_name} has no {name!r}{hint}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, expected a function")
    parameters = inspect.signature(found).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and (parameter.default is parameter.empty or parameter.name in names)
    ]
    unknown = [name for name in needed if name not in names]
    if unknown:
        raise ValueError(
            f"{path!r} needs the parameter {unknown[0]!r}; it can be given, by name: {', '.join(names)}"
        )
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return found, tuple(names) if takes_all else tuple(needed)


def serve(path: str, names: Sequence[str], seconds: float, memory_bytes: int) -> None:
    """Replies ("ready", names it takes) or ("refused", why), then to each request ("value", float) or ("raised", why).

    Args:
      path, names: see `load_function`.
      seconds: wall-clock time of a call.
      memory_bytes: that this process may allocate; 0 sets no limit. ("exhausted", memory_bytes) for a call beyond it.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not stand among the replies

    def reply(*what: Any) -> None:
        data = pickle.dumps(what)
        replies.write(struct.pack(">Q", len(data)) + data)
        replies.flush()

    if memory_bytes:
        # Memory that can be written, not address space: libraries reserve far more of that than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    try:
        function, taken = load_function(path, names)
    except ValueError as error:
        return reply("refused", str(error))
    reply("ready", taken)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        try:
            arguments = pickle.load(requests)
        except EOFError:
            return None
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            answer: tuple[str, Any] = ("value", float(function(**arguments)))
        except MemoryError:
            answer = ("exhausted", memory_bytes)
        except BaseException as error:  # SystemExit among them: one call is not the process's to end
            answer = ("raised", f"{type(error).__name__}: {str(error)[:1000]}")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a function may have set its own
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(*answer)


if __name__ == "__main__":
    _, function_path, offered, limit, memory = sys.argv
    serve(function_path, offered.split(","), float(limit), int(memory))
