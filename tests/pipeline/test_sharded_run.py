"""The stages of a run on eight devices give what they give on one: placement is not allowed to be part of a result."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from distill_jax import pipeline
from distill_jax.checkpoint import load_tree
from distill_jax.mesh import make_mesh
from distill_jax.models.adapter import AdapterConfig, init_adapter
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import read_settings
from tests.pipeline.tiny_run import smallest

ARMS = ("control", "distillable")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(workdir on one device, workdir on eight); the second starts from the models of the first."""
    folder = tmp_path_factory.mktemp("sharded")
    one, eight = folder / "one", folder / "eight"
    config = smallest({"stages": ("prepare",), "evaluation.rollouts": 8})  # rows that eight devices divide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_mesh", lambda spec: make_mesh("data=1", devices=jax.devices()[:1]))
        pipeline.run(config, one)
        shutil.copytree(one, eight)
        config.stages = ("calibrate", "distil", "evaluate")
        pipeline.run(config, one)
        patch.setattr(pipeline, "make_mesh", lambda spec: make_mesh("data=4,fsdp=2"))
        pipeline.run(config, eight)
    return one, eight


def rows(path):
    return [json.loads(line) for line in path.open()]


@pytest.mark.parametrize("arm", ARMS)
def test_calibration(runs, arm):
    settings = read_settings(smallest())
    mesh = make_mesh("data=1", devices=jax.devices()[:1])
    module = load_role(settings, mesh, runs[0], "teacher").module
    config: AdapterConfig = settings.calibration.adapter
    like = init_adapter(module, config, jax.random.key(0))
    adapters = [load_tree(run / "arms" / arm / "adapter", like) for run in runs]
    moved = [
        float(np.abs(np.asarray(after) - np.asarray(before)).max())
        for after, before in zip(jax.tree.leaves(adapters[0]), jax.tree.leaves(like), strict=True)
    ]
    assert max(moved) > 1e-4  # the run did something
    for first, second in zip(*map(jax.tree.leaves, adapters), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
    for first, second in zip(*(rows(run / "arms" / arm / "metrics.jsonl") for run in runs), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"seconds"}:
            assert first[name] == pytest.approx(second[name], abs=1e-4), name


@pytest.mark.parametrize("arm", ("original", *ARMS))
def test_texts_and_answers(runs, arm):
    paths = [f"students/{arm}/texts_seed0.jsonl", f"arms/{arm}/evaluation.jsonl"]
    paths += [f"students/{arm}/sft/bytes/seed{seed}/predictions.jsonl" for seed in range(3)]
    for path in paths:
        assert rows(runs[0] / path) == rows(runs[1] / path), path
