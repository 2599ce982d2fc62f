"""A run with the probes and the dial that several tests read; none of them changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill_jax import pipeline
from tests.pipeline.probed_run import one_device, probing


@pytest.fixture(scope="package")
def probed(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """(workdir, summary): two teachers probed, and the dial turned between them."""
    workdir = tmp_path_factory.mktemp("probed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_mesh", one_device)
        summary = pipeline.run(probing(), workdir)
    assert summary is not None
    return workdir, summary
