"""Metric files that survive a kill and a resume, progress with and without a terminal, tables."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from distill_jax import metrics
from distill_jax.metrics import MetricWriter, Progress, format_table


def read_rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_events(directory: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every scalar event, by the framing of a TFRecord: length, crc, payload, crc."""
    found = []
    for file in sorted((directory / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_rows_are_on_disk_at_once_as_json_and_events(tmp_path: Path) -> None:
    with MetricWriter(tmp_path / "arm") as writer:
        writer.write(
            1, {"loss": 0.5, "reward": jnp.float32(2), "skipped": np.int32(3), "half": jnp.bfloat16(0.25)}
        )
        assert read_rows(tmp_path / "arm") == [
            {"step": 1, "loss": 0.5, "reward": 2.0, "skipped": 3.0, "half": 0.25}
        ]
        writer.write(2, {"loss": float("nan"), "ratio": np.inf})
    assert read_rows(tmp_path / "arm")[1] == {"step": 2, "loss": None, "ratio": None}
    events = read_events(tmp_path / "arm")
    assert (1, "loss", 0.5) in events and (1, "skipped", 3.0) in events and (2, "ratio", np.inf) in events


@pytest.mark.parametrize("value", ["0.5", None, [1.0, 2.0], np.ones(3), 1j])
def test_a_value_that_is_not_one_number_is_named(tmp_path: Path, value: object) -> None:
    with (
        MetricWriter(tmp_path) as writer,
        pytest.raises(ValueError, match="metric 'loss' must be one number"),
    ):
        writer.write(1, {"loss": value})
    assert read_rows(tmp_path) == []


def test_the_name_step_is_taken(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match='"step"'):
        writer.write(1, {"step": 2.0})


def test_a_resume_drops_the_rows_that_will_be_written_again(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a kill in the middle of a row
    with MetricWriter(tmp_path, resume_step=3) as writer:
        assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
        writer.write(4, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 9.0),
    ]
    with MetricWriter(tmp_path) as writer:  # no checkpoint stood: the loop begins again
        writer.write(1, {"loss": 7.0})
    assert read_rows(tmp_path) == [{"step": 1, "loss": 7.0}]


def test_a_killed_process_leaves_every_row_it_wrote(tmp_path: Path) -> None:
    program = f"""
import os, signal
from distill_jax.metrics import MetricWriter
writer = MetricWriter({str(tmp_path)!r})
for step in range(50):
    writer.write(step, {{"loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(50))


def test_only_the_first_process_writes_and_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with MetricWriter(tmp_path / "arm") as writer, Progress(3, "label", stream=stream) as progress:
        writer.write(1, {"loss": 1.0})
        progress.update(loss=1.0)
    assert not (tmp_path / "arm").exists() and stream.getvalue() == ""


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def test_without_a_terminal_a_line_comes_now_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Progress(10, "calibrate/control", start=4, stream=stream) as progress:
        clock.now += 60  # the first step compiles, and does not count for the time left
        progress.update(loss=0.123456)
        for _ in range(3):
            clock.now += 15
            progress.update(loss=0.5)
        progress.update(n=2, loss=0.25)
    assert stream.getvalue().splitlines() == [
        "calibrate/control: 5/10, loss=0.1235",
        "calibrate/control: 7/10, 00:45 left, loss=0.5",
        "calibrate/control: 10/10, loss=0.25",
    ]


def test_on_a_terminal_there_is_a_bar_with_the_time_left() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(4, "students", start=1, stream=stream) as progress:
        for _ in range(3):
            progress.update(loss=0.5)
    shown = stream.getvalue()
    assert "students:  25%" in shown and "1/4 [" in shown
    last = shown.split("\r")[-1]
    assert "students: 100%" in last and "4/4 [" in last and "<00:00" in last and "loss=0.5" in last


def test_a_table_is_aligned() -> None:
    table = format_table(
        [["original", 0.71849, 512, None], ["undistillable", np.float32(0.25), 8, "breaks at 2x"]],
        ["arm", "accuracy", "n", "note"],
    )
    assert table.splitlines() == [
        "arm            accuracy    n  note",
        "-------------  --------  ---  ------------",
        "original          0.718  512  -",
        "undistillable     0.250    8  breaks at 2x",
    ]
    assert format_table([], ["arm", "n"]).splitlines() == ["arm  n", "---  -"]
    with pytest.raises(ValueError, match="a row has 1 cells, but there are 2 headers"):
        format_table([["a"]], ["arm", "n"])
