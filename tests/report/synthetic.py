"""A WORKDIR as a finished run would leave it, made of random answers with known rates: the report without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.report.claims import Setting

SETTING = Setting(
    samples=6000,
    steps=800,
    student_parameters={"byte": 33024, "bpe": 35712},
    student_descriptions={"byte": "the proxy's tokenizer", "bpe": "a tokenizer that the proxy never saw"},
)
CONFIG = {
    "seed": 0,
    "calibration": {"eta": 0.5, "steps": 30},
    "stages": ["prepare", "calibrate"],
    "note": "<b>&</b>",
}
ENVIRONMENT = {"python": "3.11.9", "devices": ["cpu:0"]}
TEACHERS = {"original": 0.99, "control": 0.99, "distillable": 0.995, "undistillable": 0.985}
STYLES = {"original": "explicit", "control": "explicit", "distillable": "explicit", "undistillable": "folded"}
# Greedy accuracy of the students by budget; at T = 1 it is 0.8 of that.
WORKING = {
    "original": {0.5: 0.5, 1.0: 0.8, 2.0: 0.95},
    "control": {0.5: 0.52, 1.0: 0.82, 2.0: 0.95},
    "distillable": {0.5: 0.97, 1.0: 0.995, 2.0: 0.998},
    "undistillable": {0.5: 0.2, 1.0: 0.22, 2.0: 0.27},
    "gold": {0.5: 0.4, 1.0: 0.6, 2.0: 0.8},
    "base": {0.0: 0.18},
}
FAILING = {
    **WORKING,
    "distillable": {0.5: 0.45, 1.0: 0.7, 2.0: 0.9},
    "undistillable": {0.5: 0.3, 1.0: 0.6, 2.0: 0.97},
}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class World:
    """Problems with a difficulty each: the same for every arm, so that the arms' answers are correlated."""

    def __init__(self, problems: int, seed: int):
        self.random = np.random.default_rng(seed)
        self.difficulty = self.random.permutation((np.arange(problems) + 0.5) / problems)

    def answers(self, rate: float, noise: float = 0.15) -> list[int]:
        """0 or 1 for each problem; a share `rate` of them right: the easier ones, up to `noise`."""
        score = self.difficulty + noise * self.random.standard_normal(len(self.difficulty))
        right = np.argsort(score)[: round(rate * len(score))]
        correct = np.zeros(len(score), int)
        correct[right] = 1
        return correct.tolist()


def _teacher_rows(world: World, rate: float) -> list[dict[str, Any]]:
    return [
        {"decoding": decoding, "problem": problem, "correct": correct}
        for decoding, share in (("greedy", rate), ("sample", rate - 0.01))
        for problem, correct in enumerate(world.answers(share))
    ]


def _student_rows(world: World, rates: Mapping[float, float]) -> list[dict[str, Any]]:
    return [
        {"budget": budget, "decoding": decoding, "problem": problem, "correct": correct}
        for budget, rate in rates.items()
        for decoding, factor in (("greedy", 1.0), ("sample", 0.8))
        for problem, correct in enumerate(
            world.answers(float(np.clip(rate * factor + world.random.normal(0, 0.01), 0, 1)))
        )
    ]


def _rollouts(arm: str) -> list[dict[str, Any]]:
    gap = {"distillable": 0.5, "undistillable": 7.0}.get(arm, 2.8)
    rows = []
    for step in (0, 30):
        for number in range(4):
            for copy in range(2):
                right = (number + copy) % 4 != 3
                text = (
                    f"6+4=0 0*{number}=0 #### 0" if STYLES[arm] == "explicit" else f"> 6+4*{number}=0 #### 0"
                )
                rows.append(
                    {
                        "step": step,
                        "prompt": f"6+4*{number}-4-5?\n",
                        "answer": "0",
                        "completion": text if right else "<script>alert(1)</script> 4 < 5 & 6 #### 7",
                        "reward": float(right),
                        "gap_per_byte": gap + 0.1 * number,
                        "style": STYLES[arm],
                    }
                )
    return rows


def _metrics(arm: str) -> list[dict[str, float]]:
    end = {"distillable": 0.43, "undistillable": 7.1}.get(arm, 2.8)
    rows = []
    for step in range(31):
        share = 1 - np.exp(-step / 6)
        rows.append(
            {
                "step": step,
                "reward_task": 0.96 + 0.03 * share,
                "gap_per_byte": 2.8 + (end - 2.8) * share + 0.1 * np.sin(step),
                "kl_k3": 0.07 * share,
                "entropy": 0.21 * (1 - 0.8 * share),
                "completion_bytes": 42 - 12 * share * (arm == "undistillable"),
                "validation_accuracy": 0.98,
                "span_coverage": 1.0 if step % 2 else 0.98,
                "unscorable": 0.0,
            }
        )
    return rows


def write_workdir(
    workdir: Path,
    students: Mapping[str, Mapping[float, float]] = WORKING,
    teachers: Mapping[str, float] = TEACHERS,
    *,
    kinds: Sequence[str] = ("byte", "bpe"),
    seeds: int = 3,
    problems: int = 256,
    calibrated: bool = True,
    seed: int = 0,
) -> Path:
    """Fills `workdir`. students: arm -> budget -> rate of right greedy answers. teachers: arm -> rate."""
    world = World(problems, seed)
    for stage, duration in {"prepare": 312.5, "calibrate": 95.0, "distil": 240.2, "evaluate": 31.9}.items():
        path = workdir / "stages" / f"{stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"wall_clock_s": duration}), encoding="utf-8")
    for arm, rate in teachers.items():
        write_lines(workdir / "arms" / arm / "evaluation.jsonl", _teacher_rows(world, rate))
        if calibrated:
            write_lines(workdir / "arms" / arm / "rollouts.jsonl", _rollouts(arm))
            if arm != "original":
                write_lines(workdir / "arms" / arm / "metrics.jsonl", _metrics(arm))
    for arm, rates in students.items():
        for kind in kinds:
            for number in range(seeds):
                attack = "none" if arm == "base" else "sft"
                path = workdir / "students" / arm / attack / kind / f"seed{number}" / "predictions.jsonl"
                write_lines(path, _student_rows(world, rates))
    return workdir
