"""Further proxies and learning ones in a run's settings: which models there are, what is refused, what is planned."""

from __future__ import annotations

import pytest

from distill_jax.pipeline.checks import batch_rows
from distill_jax.pipeline.plan import calibration_memory
from distill_jax.pipeline.prepare import all_roles, further_proxies
from distill_jax.pipeline.settings import Settings, read_settings
from tests.pipeline.tiny_run import load_config


def settings(pair: str = "tiny", **changes: object) -> Settings:
    config = load_config().get_config(pair)
    config.update_from_flattened_dict(changes)
    return read_settings(config)


def test_further_proxies_are_models_of_an_ensemble_alone() -> None:
    alone, ensemble = settings(), settings(**{"calibration.ensemble": "min"})
    assert further_proxies(alone) == {}
    assert set(all_roles(ensemble)) - set(all_roles(alone)) == {"proxy_bpe"}
    assert all_roles(ensemble)["proxy_bpe"].tokenizer == "bpe" != ensemble.roles["proxy"].tokenizer
    # Not the weights of the student that the guard is tried on.
    seeds = {name: role.seed for name, role in all_roles(ensemble).items()}
    assert len(set(seeds.values())) == len(seeds)


def test_an_ensemble_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`proxies` names none beside roles.proxy"):
        settings("gemma3_270m", **{"calibration.ensemble": "mean"})


def test_a_proxy_of_8_bits_cannot_learn() -> None:
    changes = {"roles.proxy.weights": "int8"}
    assert settings(**changes).roles["proxy"].weights == "int8"
    with pytest.raises(ValueError, match=r"roles.proxy: weights='int8' with calibration.proxy='learning'"):
        settings(**changes, **{"calibration.proxy": "learning"})


def test_a_learning_proxy_has_a_batch_and_takes_memory() -> None:
    static, learning = (
        settings(),
        settings(**{"calibration.proxy": "learning", "calibration.ensemble": "min"}),
    )
    assert batch_rows(learning)["calibration.proxy_batch"] == 64
    assert "calibration.proxy_batch" not in batch_rows(static)
    name = "learning proxy: weights, gradient, two moments"
    weights = sum(role.spec.num_params for role in (learning.roles["proxy"], learning.proxies["bpe"]))
    assert calibration_memory(learning)[name] == 16 * weights
    assert name not in calibration_memory(static)
    assert (
        learning.calibration.proxy_optimizer.name == "muon" and learning.calibration.judged_by == "learning"
    )
