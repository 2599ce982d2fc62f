"""Workdirs and summaries that several tests of the report read; none of them changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill_jax.report import summarise
from tests.report.synthetic import CONFIG, ENVIRONMENT, FAILING, SETTING, TEACHERS, write_workdir


@pytest.fixture(scope="package")
def working(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A finished run whose claims all hold: (workdir, summary)."""
    workdir = write_workdir(tmp_path_factory.mktemp("working"))
    return workdir, summarise(workdir, CONFIG, ENVIRONMENT, SETTING, resamples=1000)


@pytest.fixture(scope="package")
def failing(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A finished run whose claims about students fail, and whose undistillable teacher lost accuracy."""
    teachers = {**TEACHERS, "undistillable": 0.95}
    workdir = write_workdir(tmp_path_factory.mktemp("failing"), FAILING, teachers)
    return workdir, summarise(workdir, CONFIG, ENVIRONMENT, SETTING, resamples=1000)
