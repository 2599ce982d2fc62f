"""The command line of the main job: what reaches the pipeline, and how wrong input ends. The pipeline is a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Runs launch/tpu_run.py as a script, with a pipeline that prints what it was given.
PROGRAM = """
import runpy, sys, types
import jax

def run(config, workdir):
    if config.steps < 0:
        raise ValueError(f"config.steps must be at least 0, got {config.steps}")
    if config.steps > 100:
        raise KeyError("a bug of ours")
    print(config.pair, config.steps, workdir, jax.device_count(), jax.config.values["jax_compilation_cache_dir"])
    config.added_later = 1

stand_in = types.ModuleType("distill_jax.pipeline")
stand_in.run = run
import distill_jax
distill_jax.pipeline = sys.modules["distill_jax.pipeline"] = stand_in
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

CONFIG = """
from ml_collections import ConfigDict

def get_config(pair="tiny"):
    if pair not in ("tiny", "big"):
        raise ValueError(f"there is no pair {pair!r}; choose from tiny, big")
    return ConfigDict({"pair": pair, "steps": 3})
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.py").write_text(CONFIG)
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "launch" / "tpu_run.py"), *arguments]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_config_pair_override_and_devices_reach_the_pipeline(tmp_path: Path) -> None:
    result = launch(tmp_path, "--config=config.py:big", "--config.steps=7", "--workdir=w", "--cpu_devices=3")
    assert result.stdout.split() == ["big", "7", "w", "3", str(tmp_path / "xla")]
    # the config is locked: a field that a stage invents is an error, not a silent addition
    assert result.returncode == 1 and "added_later" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=config.py", "--config.stepz=7"],
            """unknown config field 'stepz'\nDid you mean "steps" """,
        ),
        (["--config=config.py", "--config.steps=many"], "flag --config.steps=many: invalid literal for int"),
        (["--config=config.py:huge"], "there is no pair 'huge'; choose from tiny, big"),
        (["--config=missing.py"], "No such file or directory: 'missing.py'"),
        (
            ["--config=config.py", "steps=7"],
            "unexpected arguments ['steps=7']; flags are written --name=value",
        ),
        (["--config=config.py", "--config.steps=-1"], "config.steps must be at least 0, got -1"),
        ([], "--config must have a value"),
    ],
)
def test_wrong_input_is_one_clear_error_without_a_trace(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = launch(tmp_path, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "last_line"),
    [
        (["--config.steps=-1", "--traceback"], "ValueError: config.steps must be at least 0, got -1"),
        (["--config.steps=101"], "KeyError: 'a bug of ours'"),
    ],
)
def test_a_trace_is_shown_when_asked_for_and_for_bugs(
    tmp_path: Path, arguments: list[str], last_line: str
) -> None:
    result = launch(tmp_path, "--config=config.py", *arguments)
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == last_line
