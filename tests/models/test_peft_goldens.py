"""Adapter folders opened by `peft` itself: goldens/make_peft_goldens.py asked it for the logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from distill_jax.models.model import load_model, save_model
from tests.models.small_models import GOLDENS, PEFT_ADAPTERS, PEFT_SCALE, answers, exact_adapter


@pytest.mark.parametrize("name", PEFT_ADAPTERS)
def test_the_folder_is_the_one_that_peft_was_given(name, tmp_path):
    model, config = load_model(GOLDENS / name), PEFT_ADAPTERS[name]
    adapter = exact_adapter(model.module, config)
    path = save_model(model, tmp_path / "peft", adapter, PEFT_SCALE, merge=False, adapter_config=config)
    given = GOLDENS / name / "peft"
    assert {file.name for file in path.iterdir()} == {file.name for file in given.iterdir()} - {"golden.npz"}
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text("utf-8")) for folder in (path, given)
    )
    assert ours == theirs
    tensors, given_tensors = (load_file(folder / "adapter_model.safetensors") for folder in (path, given))
    assert tensors.keys() == given_tensors.keys()
    for key, value in given_tensors.items():
        assert tensors[key].dtype == value.dtype
        np.testing.assert_array_equal(tensors[key], value)


@pytest.mark.parametrize("name", PEFT_ADAPTERS)
def test_logits_are_those_of_peft(name, tmp_path):
    model, config = load_model(GOLDENS / name), PEFT_ADAPTERS[name]
    adapter = exact_adapter(model.module, config)
    golden = dict(np.load(GOLDENS / name / "peft" / "golden.npz"))
    logits = model.logits(golden["tokens"], adapter=adapter, scale=PEFT_SCALE, adapter_config=config)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    merged = save_model(model, tmp_path / "merged", adapter, PEFT_SCALE, adapter_config=config)
    np.testing.assert_allclose(
        load_model(merged).logits(golden["tokens"]), golden["logits"], rtol=0, atol=1e-4
    )
    # The adapter is no small thing here: neither without it nor at another scale would the logits agree.
    assert np.abs(answers(name)["logits"] - golden["logits"]).max() > 1.0
    other = model.logits(golden["tokens"], adapter=adapter, scale=1.0, adapter_config=config)
    assert np.abs(other - golden["logits"]).max() > 0.1
