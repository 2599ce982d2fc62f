"""The folder of a run: its config, its environment, and which stages are finished."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import config_dict

import distill_jax
from distill_jax.checkpoint import NO_ROOM, DiskFullError, read_json, write_json

# May differ between two starts of one run: they do not change any result.
_FREE_FIELDS = (
    *("stages", "at_once", "budget_curve", "attacks", "attack_suite"),
    *("probes", "probe_suite", "dial", "study"),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def plain_config(config: config_dict.ConfigDict) -> dict[str, Any]:
    """The config as JSON types."""
    return json.loads(json.dumps(config.to_dict(), default=list))


def open_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Creates the folder with config.json and environment.json, or checks that it belongs to this config.

    Raises:
      ValueError: the folder is the work of another config; the message shows every difference.
      FileExistsError: the folder is not empty and holds no run.
    """
    path = workdir / "config.json"
    if path.exists():
        difference = _difference(_flatten(read_json(path)), _flatten(config))
        if difference:
            raise ValueError(
                f"{workdir} is the run of another config; nothing was changed. Differences (there -> here):\n  "
                + "\n  ".join(difference)
                + "\nGive the same config to go on, or another --workdir."
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise FileExistsError(
            f"{workdir} is not empty and holds no run (no config.json); give another --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "environment.json", environment())
    write_json(path, config)


def environment() -> dict[str, Any]:
    """Versions and devices."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "devices": [f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"],
        "processes": jax.process_count(),
        "packages": {"distill_jax": distill_jax.__version__}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if not prefix and name in _FREE_FIELDS:
            continue
        if not prefix and name == "smoke_values":  # those of free fields are as free as they are
            value = [row for row in value if row[0].partition(".")[0] not in _FREE_FIELDS]
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    absent = "(absent)"
    return [
        f"{name}: {there.get(name, absent)} -> {here.get(name, absent)}"
        for name in sorted({*there, *here})
        if there.get(name, absent) != here.get(name, absent)
    ]


def is_done(workdir: Path, stage: str) -> bool:
    """Whether this stage's result stands."""
    return (workdir / "stages" / f"{stage}.json").exists()


@contextlib.contextmanager
def stage_clock(workdir: Path, stage: str, more: bool = False) -> Iterator[None]:
    """Runs a stage and marks it as finished, with its seconds; the time of interrupted starts is added up.

    more: a stage that each start goes on with adds to the time of the finished starts too.
    """
    started = time.monotonic()
    partial = workdir / "stages" / f".{stage}.partial.json"
    before = read_json(partial)["wall_clock_s"] if partial.exists() else 0.0
    if more and is_done(workdir, stage):
        before += read_json(workdir / "stages" / f"{stage}.json")["wall_clock_s"]
    try:
        yield
    except BaseException:
        # A disk that is full for the stage is full for this file too: its error must not hide the first one.
        with contextlib.suppress(OSError):
            write_json(partial, {"wall_clock_s": before + time.monotonic() - started})
        raise
    write_json(workdir / "stages" / f"{stage}.json", {"wall_clock_s": before + time.monotonic() - started})
    partial.unlink(missing_ok=True)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines, whole or not at all: an existing file stays as it was until the new one is complete.

    Raises:
      ValueError: a NaN or an infinity. DiskFullError: no room. In both cases the existing file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise DiskFullError(
                f"disk is full while saving {path}; what was finished before is intact; free space and start again"
            ) from error
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads what `write_rows` wrote."""
    # Not splitlines(): a text may hold U+2028 and the like, which JSON does not escape.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
