"""Instructions without one right answer, judged by a reward model: Dolly, Vicuna questions, data sets of that form.

    get_task("instructions", dataset="dolly", path="data/dolly", reward_model="models/skywork-reward-v2")

The reward is sigmoid((score - centre) / spread) of the reward model's score, in [0, 1]: half where the score is
`centre`. A calibration config says with `correct_at` from which reward on an answer counts as correct.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from distill_jax.data.sources import Row
from distill_jax.rewards.answer_part import before_stop
from distill_jax.rewards.reward_model import RewardModel, check_source
from distill_jax.tasks.base import Problem
from distill_jax.tasks.rows import Asked, RowTask, column

STOP_TEXTS = ("\nQuestion:",)


class Instructions(RowTask):
    """Instructions, with a context and a written answer where the data set has them.

    Args:
      path, dataset, columns, splits, pool, shots, instruction, max_prompt_bytes, data_dir: see `RowTask`. Columns:
        "question", "context", "answer"; the last two may be empty, or absent.
      reward_model: the sequence classifier that judges, a folder or hf://ORGANISATION/NAME; loaded when there is
        something to judge.
      centre, spread: score with the reward one half, and how far from it the reward is 0.73.
      dtype, batch_size, sizes: see `RewardModel.load`; `use_mesh` says where it lies.
      require_end: score 0 when the model did not end by itself.
      stop_texts: a completion is judged up to the first of these.

    Attributes:
      failures: answers that the reward model could not score; they score 0.

    Raises:
      ValueError: no reward model at that place, a spread that is not positive, or what `RowTask` raises.
    """

    name = "instructions"
    roles = ("question", "context", "answer")
    required = ("question",)

    def __init__(
        self,
        path: str,
        reward_model: str,
        dataset: str = "",
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
        pool: Sequence[str] | None = None,
        shots: int = 0,
        instruction: str = "",
        max_prompt_bytes: int | None = None,
        data_dir: str | None = None,
        centre: float = 0.0,
        spread: float = 1.0,
        dtype: str = "float32",
        batch_size: int = 16,
        sizes: Sequence[int] = (512, 1024, 2048),
        require_end: bool = False,
        stop_texts: Sequence[str] = STOP_TEXTS,
    ) -> None:
        if not spread > 0:
            raise ValueError(f"spread must be positive, got {spread}")
        check_source(reward_model)
        self._source, self._dtype, self._batch_size = reward_model, dtype, batch_size
        self._sizes, self._centre, self._spread = tuple(sizes), centre, spread
        self._require_end, self.stop_texts = require_end, tuple(stop_texts)
        self._mesh: Mesh | None = None
        self._loading = threading.Lock()
        self._model: RewardModel | None = None
        super().__init__(path, dataset, columns, splits, pool, shots, instruction, max_prompt_bytes, data_dir)

    @property
    def failures(self) -> int:
        return 0 if self._model is None else self._model.failures

    def use_mesh(self, mesh: Mesh) -> None:
        """Puts the reward model on a mesh, before the first answer is judged."""
        self._mesh = mesh

    def _read(self, row: Row, where: str) -> Asked:
        texts = {}
        for role in ("context", "answer"):
            name = self.entry.columns.get(role)
            texts[role] = "" if name is None else str(column(row, name, where) or "").strip()
        question = self._text(row, "question", where)
        if texts["context"]:
            question = f"{question}\n\n{texts['context']}"
        return Asked(question, texts["answer"], texts["answer"], {"question": question})

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """The reward of one answer; `score_batch` is much faster for many."""
        return self.score_batch([problem], [completion], [ended])[0]

    def score_batch(
        self, problems: Sequence[Problem], completions: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        """Rewards of answers, judged in batches."""
        with self._loading:  # several cells of a run may judge at once
            if self._model is None:
                self._model = RewardModel.load(
                    self._source, self._mesh, self._dtype, self._batch_size, self._sizes
                )
        # The judge sees the question alone, not the worked examples before it.
        questions = [problem.metadata["question"] for problem in problems]
        scores = self._model(questions, [self._cut(text) for text in completions])
        rewards = 1.0 / (1.0 + np.exp(-(scores.astype(np.float64) - self._centre) / self._spread))
        return [
            0.0 if np.isnan(reward) or (self._require_end and not end) else float(reward)
            for reward, end in zip(rewards, ended, strict=True)
        ]

    def _cut(self, completion: str) -> str:
        return before_stop(completion.lstrip(), self.stop_texts).strip()
