"""What a model's folder says besides the arithmetic: it goes along when the model, or an adapter for it, is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.models.hf_io import read_json
from distill_jax.models.hub import is_hub_name, split_name

_GENERATION = "generation_config.json"
_NOT_KEPT = ("transformers_version", "_from_model_config")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
      hub_name, revision: "ORGANISATION/NAME" and the revision asked for, of a model that was named by its place on the
        hub; "" and None of others, whose place on this machine is nobody's business.
      is_wrapped: it is the text model inside a model of images and text, where other libraries find its layers under
        "model.language_model".
      generation: settings for sampling out of generation_config.json, without token ids.
    """

    hub_name: str = ""
    revision: str | None = None
    is_wrapped: bool = False
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_origin(folder: Path, source: str) -> Origin:
    """The origin of the model in a folder; `source`: how the user named it.

    Raises:
      FileNotFoundError, ValueError: no config.json, or a file that is no JSON object.
    """
    generation = read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    name, revision = split_name(source) if is_hub_name(source) else ("", None)
    return Origin(
        name,
        revision,
        "text_config" in read_json(folder / "config.json"),
        {
            key: value
            for key, value in generation.items()
            if key not in _NOT_KEPT and not key.endswith("_token_id")
        },
    )
