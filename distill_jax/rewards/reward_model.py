"""Open text scored by a reward model: a sequence classifier that reads the question with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from distill_jax.models.classifier import Classifier, load_classifier
from distill_jax.models.hub import is_hub_name, split_name
from distill_jax.sequences import pack_prompts
from distill_jax.text.chat import render_answered


def check_source(source: str) -> None:
    """Looks at where a reward model shall be read from, without reading it.

    Raises:
      ValueError: neither a Hugging Face folder nor a name on the hub.
    """
    if is_hub_name(source):
        split_name(source)
    elif not (Path(source).expanduser() / "config.json").is_file():
        raise ValueError(
            f"reward_model: there is no config.json in {source!r}; expected the Hugging Face folder of a sequence "
            "classifier with one label, or its name on the hub (hf://ORGANISATION/NAME)"
        )


class RewardModel:
    """Scores of answers, in batches of one number of rows and few lengths.

    The answer stands in the model's own chat template, behind its question. An answer gets no score (NaN) when
    the conversation is longer than the largest size, or when it spells a control token of the reward model:
    the template would take that for the end of a turn, and everything after it for the user's praise.

    Args:
      classifier: see `load_classifier`.
      batch_size: rows on the device at a time; divides by the mesh's data x fsdp. The last batch is filled up.
      sizes: lengths in tokens; a batch has the smallest that holds its longest row.
      system: text before the question.

    Attributes:
      failures: answers without a score.

    Raises:
      ValueError: a size or batch below 1.
    """

    def __init__(
        self,
        classifier: Classifier,
        batch_size: int = 16,
        sizes: Sequence[int] = (512, 1024, 2048),
        system: str | None = None,
    ) -> None:
        if batch_size < 1 or not sizes or min(sizes) < 1:
            raise ValueError(f"batch_size and sizes must be at least 1, got {batch_size} and {tuple(sizes)}")
        self.classifier, self.failures = classifier, 0
        self._batch_size, self._sizes, self._system = batch_size, sorted(sizes), system

    @classmethod
    def load(
        cls,
        path: str | Path,
        mesh: Mesh | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        sizes: Sequence[int] = (512, 1024, 2048),
    ) -> RewardModel:
        """The reward model of a Hugging Face folder; see `load_classifier` for what it raises."""
        return cls(load_classifier(path, mesh, dtype), batch_size, sizes)

    def __call__(self, questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """f32[N]: the raw score of each answer to its question, any real number; NaN where there is none."""
        tokenizer = self.classifier.tokenizer
        encoded = []
        for question, answer in zip(questions, answers, strict=True):
            conversation = tokenizer.encode_prompt(render_answered(tokenizer, question, answer, self._system))
            own = list(tokenizer.encode_prompt(answer))
            start = int(tokenizer.settings.add_bos and own[:1] == [tokenizer.bos_id])
            spelled = tokenizer.special_mask(own[start:]).any()
            fits = 1 <= len(conversation) <= self._sizes[-1]
            encoded.append(conversation if fits and not spelled else None)
        scores = np.full(len(encoded), np.nan, np.float32)
        # Rows of like length together: a batch is as long as its longest row.
        order = sorted(
            (row for row, ids in enumerate(encoded) if ids is not None),
            key=lambda row: len(encoded[row] or ()),
        )
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            filled = [encoded[row] or () for row in rows + rows[-1:] * (self._batch_size - len(rows))]
            size = next(size for size in self._sizes if size >= len(filled[-1]))
            tokens, lengths = pack_prompts(filled, size, tokenizer.pad_id)
            scores[rows] = np.asarray(self.classifier.scores(tokens, lengths))[: len(rows)]
        self.failures += int(np.isnan(scores).sum())
        return scores
