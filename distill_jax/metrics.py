"""What a person sees of a run: metrics as JSON lines and TensorBoard events, a bar with the time left, a table.

Of several processes only the first writes and prints; the others may call everything here and nothing happens.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

PLAIN_INTERVAL_S = 20.0  # between two lines of progress when there is no terminal to draw a bar on


class MetricWriter:
    """Appends rows of numbers to `DIRECTORY/metrics.jsonl` and to TensorBoard events in `DIRECTORY/tensorboard`.

    Every row is on disk when `write` returns, so a kill loses at most the row that was being written. On a resume the
    rows after the checkpoint are dropped, because the loop is about to write them again.
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int | None = None) -> None:
        """Opens the files.

        Args:
          directory: the folder, created when missing.
          resume_step: step of the checkpoint that the loop goes on from: rows up to it stay, later ones and a half
            last row go. None starts from nothing: all rows go.
        """
        self._file: IO[str] | None = None
        self._events: SummaryWriter | None = None
        if jax.process_index() != 0:
            return
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        _truncate_rows(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        first = 0 if resume_step is None else resume_step + 1
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=first, write_to_disk=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row, `{"step": step, **values}`.

        Args:
          step: the training step.
          values: name -> number (Python, numpy or a jax scalar). NaN and infinities become null in the JSON line, which
            has no word for them; TensorBoard shows them.

        Raises:
          ValueError: the name "step", or a value that is not one number.
        """
        if self._file is None or self._events is None:
            return
        numbers = {name: _number(name, value) for name, value in values.items()}
        row = {"step": int(step)} | {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._events.add_scalar(name, value, int(step))

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()
        self._file = self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Progress:
    """A progress bar with the time left; without a terminal, a plain line now and then and one at the end.

    with Progress(total=100, label="calibrate/control", start=step) as progress:
        progress.update(loss=0.1)
    """

    def __init__(self, total: int, label: str, start: int = 0, stream: IO[str] | None = None) -> None:
        """Starts the clock.

        Args:
          total: number of steps in all.
          label: what is going on.
          start: steps that were done in an earlier run; they do not count for the speed.
          stream: where to write, standard error by default.
        """
        self._stream = sys.stderr if stream is None else stream
        self._quiet = jax.process_index() != 0
        self._total, self._label = total, label
        self._done, self._numbers = start, ""
        self._bar: tqdm | None = None
        self._printed_at = self._started_at = time.monotonic()
        self._started_with: int | None = None  # steps done when the clock of the speed was started
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm(total=total, desc=label, initial=start, file=self._stream, dynamic_ncols=True)

    def update(self, n: int = 1, **numbers: float) -> None:
        """Counts `n` more steps and shows `numbers`, as name=value with four digits."""
        self._done += n
        self._numbers = " ".join(f"{name}={float(value):.4g}" for name, value in numbers.items())
        now = time.monotonic()
        first = self._started_with is None
        if first:  # the first step compiles: the time left is reckoned from the steps after it
            self._started_at, self._started_with = now, self._done
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers, refresh=False)
            self._bar.update(n)
        elif first or now - self._printed_at >= PLAIN_INTERVAL_S:
            self._print_line(now)

    def close(self) -> None:
        """Ends the bar, or prints the last line."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._print_line(time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _print_line(self, now: float) -> None:
        if self._quiet:
            return
        parts = [f"{self._label}: {self._done}/{self._total}"]
        left = self._total - self._done
        measured = 0 if self._started_with is None else self._done - self._started_with
        if measured > 0 and left > 0:
            parts.append(f"{tqdm.format_interval((now - self._started_at) / measured * left)} left")
        if self._numbers:
            parts.append(self._numbers)
        print(", ".join(parts), file=self._stream, flush=True)
        self._printed_at = now


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Lays rows out in columns: text to the left, numbers to the right.

    Args:
      rows: cells are text, integers, floats (shown with three decimals) or None (shown as a dash).
      headers: one for each column.

    Returns:
      The table, a line under the headers, without a newline at the end.

    Raises:
      ValueError: a row of another length than the headers.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, but there are {len(headers)} headers: {list(row)}")
    columns = []
    for index, header in enumerate(headers):
        values = [row[index] for row in rows]
        texts = [header, *map(_cell, values)]
        width = max(map(len, texts))
        numeric = all(value is None or isinstance(value, int | float | np.number) for value in values)
        texts = [text.rjust(width) if numeric and values else text.ljust(width) for text in texts]
        columns.append([texts[0], "-" * width, *texts[1:]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float | np.floating) else str(value)


def _number(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError('a metric must not be called "step", which is the row\'s own number')
    array = np.asarray(value)
    if array.size != 1 or not (array.dtype.kind in "fiub" or array.dtype == jax.numpy.bfloat16):
        raise ValueError(f"metric {name!r} must be one number, got {value!r}")
    return float(array.reshape(()))


def _truncate_rows(path: Path, last_step: int | None) -> None:
    """Keeps the whole rows up to `last_step`, none when it is None; the file is replaced in one rename."""
    if not path.exists():
        return
    kept = []
    if last_step is not None:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the row that a kill cut off
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
