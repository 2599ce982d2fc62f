"""Models of a run that are named on the hub: found in the cache, and refused before anything is written."""

from __future__ import annotations

import huggingface_hub
import pytest

from distill_jax.models.model import load_model
from distill_jax.pipeline.prepare import check_sources, role_spec
from distill_jax.pipeline.settings import read_settings
from tests.models.hub_cache import put_in_cache
from tests.models.small_models import GOLDENS
from tests.pipeline.tiny_run import smallest


def test_roles_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    put_in_cache(tmp_path / "hub", "some-org/small", GOLDENS / "llama")
    config = smallest({"roles.teacher.source": "hf://some-org/small"})
    settings = read_settings(config)
    check_sources(settings)
    assert role_spec(settings, tmp_path, "teacher") == load_model(GOLDENS / "llama").spec
    config.roles.proxy.source = "hf://some-org/gone"
    with pytest.raises(FileNotFoundError, match="proxy: 'hf://some-org/gone' is not in the cache"):
        check_sources(read_settings(config))
    assert role_spec(read_settings(config), tmp_path, "proxy") == settings.roles["proxy"].spec
    config.roles.proxy.source = "hf://gone"
    with pytest.raises(ValueError, match="proxy: a model on the hub is named"):
        check_sources(read_settings(config))
