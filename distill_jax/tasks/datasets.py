"""The data sets that are configured, each a declarative entry: which column holds what, and which split is what.

A name here goes into the option `dataset` of its task, the place of its files into `path`:

    get_task("math_text", dataset="gsm8k", path="data/gsm8k")

`columns` of the task replaces any of the names, so a data set of the same kind needs no entry:

    get_task("math_text", path="mine.jsonl", columns={"question": "problem", "answer": "solution"})

Sources: the data sets' cards, huggingface.co/datasets/{openai/gsm8k, open-r1/Big-Math-RL-Verified-Processed,
tau/commonsense_qa, TIGER-Lab/MMLU-Pro, m-a-p/SuperGPQA, databricks/databricks-dolly-15k}; the Vicuna questions
are `question.jsonl` of github.com/lm-sys/FastChat (vicuna_bench).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.tasks.base import Split


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a data set is read.

    Attributes:
      task: which task it belongs to.
      columns: role -> column; a dot goes into a nested object ("choices.text"), a number into a list ("turns.0").
      splits: ours -> its own, where it has one that serves.
      pool: its splits that ours without one are drawn from, each question by the hash of its text.
      where: column -> the only values that are wanted.
      answer_mark: of mathematics: the answer is what follows this mark in the answer's column.
    """

    task: str
    columns: Mapping[str, str]
    splits: Mapping[Split, str] = dataclasses.field(default_factory=dict)
    pool: Sequence[str] = ("train",)
    where: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    answer_mark: str = ""


_BIG_MATH = {"question": "prompt", "answer": "solution"}

DATASETS: dict[str, Entry] = {
    "gsm8k": Entry(
        "math_text",
        {"question": "question", "answer": "answer"},
        splits={"test": "test"},
        answer_mark="####",
    ),
    # Quintiles of the share of problems that Llama 3.1 8B solves, each a folder; level 5 has the lowest share.
    "big_math_level_4": Entry("math_text", _BIG_MATH),
    "big_math_level_5": Entry("math_text", _BIG_MATH),
    # The labels of its own test split are not published.
    "commonsense_qa": Entry(
        "multiple_choice",
        {"question": "question", "choices": "choices.text", "labels": "choices.label", "answer": "answerKey"},
        splits={"test": "validation"},
    ),
    # Its validation split is 70 worked examples.
    "mmlu_pro": Entry(
        "multiple_choice",
        {"question": "question", "choices": "options", "answer": "answer_index"},
        pool=("test",),
    ),
    "super_gpqa": Entry(
        "multiple_choice", {"question": "question", "choices": "options", "answer": "answer_letter"}
    ),
    "dolly": Entry("instructions", {"question": "instruction", "context": "context", "answer": "response"}),
    # 80 questions in one file, without answers, to test with and not to train on.
    "vicuna": Entry("instructions", {"question": "turns.0"}, splits={"test": "train"}, pool=()),
}
