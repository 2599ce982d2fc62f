"""Small data sets on disk in every form that `distill_jax.data` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Row = Mapping[str, Any]


def write_lines(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class LocalMath(tfds.core.GeneratorBasedBuilder):
    """A data set of tensorflow-datasets that is prepared without a network and without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: dict[str, Any] = {}  # noqa: RUF012  nothing is fetched, so no list of checksums is looked for

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "question": tfds.features.Text(),
                "answer": tfds.features.Text(),
                "choices": tfds.features.Sequence(
                    {"text": tfds.features.Text(), "size": tfds.features.Scalar(np.int64)}
                ),
            }
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(40), "test": self._generate_examples(5, 100)}

    def _generate_examples(self, count: int, start: int = 0) -> Any:
        for number in range(start, start + count):
            choices = [{"text": "é", "size": number}, {"text": "b", "size": 2}]
            yield number, {"question": f"{number} + 1?", "answer": f"#### {number + 1}", "choices": choices}


def prepare_tfds(data_dir: Path, file_format: str = "array_record") -> Path:
    """Prepares `LocalMath`; returns its folder."""
    builder = LocalMath(data_dir=str(data_dir), file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_path)
