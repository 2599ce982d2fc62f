"""rollouts.jsonl: samples of what the policy writes, for people to read and for the report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distill_jax.rft.judgement import Judgement
from distill_jax.rft.rollout import Rollouts, Scored


class RolloutLog:
    """Appends rows; on a resume the rows after the checkpoint are dropped, because they will be written again."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[str] = []
        if path.exists() and resume_step is not None:
            # Not splitlines: a completion may hold U+2028 and other signs that it would split at. What stands after the
            # last newline is a row that a kill cut off.
            *whole, _ = path.read_text(encoding="utf-8").split("\n")
            kept = [f"{line}\n" for line in whole if json.loads(line)["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(
        self,
        step: int,
        rollouts: Rollouts,
        scored: Scored,
        judgement: Judgement,
        count: int,
        style_of: Callable[[str], str | None] | None,
    ) -> None:
        """Writes `count` rows spread over the batch, so that many prompts are seen."""
        gaps = np.asarray(judgement.gap_per_byte)
        for row in np.unique(np.linspace(0, len(rollouts.texts) - 1, count).round().astype(int)):
            text = rollouts.texts[row]
            line = {
                "step": step,
                "prompt": rollouts.problems[row].prompt,
                "answer": rollouts.problems[row].answer,
                "completion": text,
                "reward": float(scored.task.rewards[row]),
                "gap_per_byte": float(gaps[row]) if scored.scorable[row] else None,
                "style": style_of(text) if style_of is not None else None,
            }
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> RolloutLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
