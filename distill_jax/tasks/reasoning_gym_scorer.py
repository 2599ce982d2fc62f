"""The scorers of reasoning_gym, called in a process of their own (see `rewards.functions`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import create_dataset

PATH = f"{__name__}:score"
PARAMETERS = ("dataset", "config", "entry", "answer")

_made: dict[str, ProceduralDataset] = {}


def score(dataset: str, config: Mapping[str, Any], entry: dict[str, Any], answer: str) -> float:
    """The data set's own score of an answer.

    Args:
      dataset, config: its name, and all fields of its configuration that are not left at their defaults.
      entry: the problem as the data set made it.
      answer: what was extracted from a completion.
    """
    key = f"{dataset} {config!r}"
    if key not in _made:
        _made[key] = create_dataset(dataset, **config)
    return float(_made[key].score_answer(answer, entry))
