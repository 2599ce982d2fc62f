"""A calibration on frozen weights of 8 bits: only the adapter changes, a kill costs nothing, an export is in full."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from distill_jax import pipeline
from distill_jax.checkpoint import load_tree, save_tree
from distill_jax.export import export_arm
from distill_jax.mesh import make_mesh
from distill_jax.models.adapter import adapter_scale, init_adapter
from distill_jax.models.model import load_model, save_model
from distill_jax.models.quantised import has_quantised
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import read_settings
from distill_jax.rft.calibrate import calibrate
from tests.models.small_models import stored_weights
from tests.pipeline.tiny_run import smallest
from tests.rft.tiny_calibration import CONFIG, Letters, make_model

SHORT = dataclasses.replace(CONFIG, steps=3)


class Killed(Exception):
    pass


@functools.cache
def in_8_bits(role, folder):
    model = make_model(role)
    source = save_model(dataclasses.replace(model, tokenizer=None), folder / role)
    return load_model(source, tokenizer=model.tokenizer, weights="int8")


def test_only_the_adapter_changes_and_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    teacher, proxy = (in_8_bits(role, tmp_path) for role in ("teacher", "proxy"))
    assert has_quantised(teacher.params) and has_quantised(proxy.params)
    before = jax.tree.map(np.array, teacher.params)

    def run(name, **options):
        return calibrate(teacher, proxy, Letters(), "distillable", 0.5, SHORT, tmp_path / name, **options)

    moved = []

    def kill(step, metrics):
        moved.append(metrics["grad_norm"])
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        run("killed", on_step=kill)
    assert len(moved) == 3 and max(moved) > 0
    result, undisturbed = run("killed"), run("undisturbed")
    jax.tree.map(np.testing.assert_array_equal, result.trainable, undisturbed.trainable)
    jax.tree.map(np.testing.assert_array_equal, teacher.params, before)

    whole = dataclasses.replace(SHORT, trainable="params")
    with pytest.raises(ValueError, match=r"trainable='params'.*8 bits.*weights='full'"):
        calibrate(teacher, proxy, Letters(), "distillable", 0.5, whole, tmp_path / "whole")


def test_a_run_and_its_exports(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "make_mesh", lambda spec: make_mesh(spec, devices=jax.devices()[:1]))
    config = smallest(
        {"stages": ("prepare", "calibrate"), "roles.teacher.weights": "int8", "roles.proxy.weights": "int8"}
    )
    workdir = tmp_path / "run"
    pipeline.run(config, workdir)
    settings, mesh = read_settings(config), make_mesh("data=1", devices=jax.devices()[:1])
    teacher = load_role(settings, mesh, workdir, "teacher")
    assert has_quantised(teacher.params)
    assert not has_quantised(load_role(settings, mesh, workdir, "student_bytes").params)

    adapter = settings.calibration.adapter
    place = workdir / "arms" / "distillable" / "adapter"
    tree = load_tree(place, init_adapter(teacher.module, adapter, jax.random.key(0)))
    # As after an update that helped: the tiny run may keep the adapter it began with.
    tree = jax.tree.map(lambda leaf: leaf + 0.1, tree)
    save_tree(place, tree, overwrite=True)
    source = workdir / "models" / "teacher"
    original, off = (
        stored_weights(source),
        stored_weights(export_arm(workdir, "distillable", tmp_path / "off", scale=0.0)),
    )
    assert all(off[name].tobytes() == original[name].tobytes() for name in original)
    on = export_arm(workdir, "distillable", tmp_path / "on")
    tokens = np.random.default_rng(0).integers(3, 250, (2, 12))
    expected = load_model(source).logits(tokens, adapter=tree, scale=adapter_scale(adapter))
    np.testing.assert_allclose(load_model(on).logits(tokens), expected, atol=1e-4)
    assert "8 bits" in (on / "README.md").read_text()
