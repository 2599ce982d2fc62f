"""A calibration on each kind of data-set task: mathematics, multiple choice, and open text with a reward model."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from distill_jax.models.decoder import Decoder, init_params
from distill_jax.models.model import Model
from distill_jax.models.spec import ModelSpec
from distill_jax.rewards.terms import RewardTerm
from distill_jax.rft.calibrate import calibrate
from distill_jax.tasks import get_task
from distill_jax.text.tokenizers import Tokenizer
from tests.rewards.small_classifier import write_classifier
from tests.rft.tiny_calibration import CONFIG
from tests.tasks import dataset_files

SIZES = {"prompt_sizes": (192,), "proxy_prompt_sizes": (192,), "proxy_completion_sizes": (24,)}


def bytes_model(seed):
    spec = ModelSpec("llama", 259, 16, 1, 2, 2, 8, 32)
    module = Decoder(spec)
    return Model(spec, init_params(module, jax.random.key(seed)), Tokenizer.bytes_tokenizer(), module)


@pytest.mark.parametrize("kind", ["math_text", "multiple_choice", "instructions"])
def test_calibration(kind, tmp_path):
    dataset = {"math_text": "gsm8k", "multiple_choice": "super_gpqa", "instructions": "dolly"}[kind]
    options = {"path": str(getattr(dataset_files, dataset)(tmp_path / "data")), "dataset": dataset}
    if kind == "instructions":
        judge = str(write_classifier(tmp_path / "judge"))
        options |= {"reward_model": judge, "batch_size": 4, "sizes": (192,)}
    rewards = (RewardTerm("length", soft_bytes=4, hard_bytes=12),)
    config = dataclasses.replace(
        CONFIG, **SIZES, steps=1, unscorable_limit=1.0, correct_at=0.5, validation_problems=3, rewards=rewards,
        validation_batch=3,
    )  # fmt: skip
    task = get_task(kind, **options)
    result = calibrate(bytes_model(0), bytes_model(1), task, "undistillable", 0.5, config, tmp_path / "run")
    assert result.steps == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[1]["verifier_failures"] == 0 and 0 <= rows[1]["reward_length"] <= 1
    if kind == "instructions":
        assert 0 < rows[1]["reward_task"] < 1 and rows[1]["reward_task_std"] > 0
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").open()]
    assert rollouts and all(np.isfinite(row["reward"]) for row in rollouts)
