"""Any data set of the package `reasoning_gym`, with its own scorer.

    get_task("reasoning_gym", dataset="chain_sum", shots=2, max_terms=3)

The package generates questions without end and grades answers; this module makes splits of them, asks for the
answer in one fixed form, and finds it in what a model wrote. For an instruction-tuned model (`shots=0`) the
prompt is

    {question}
    End with "#### " and the answer.

and for a base model, which continues text instead of following instructions, worked examples of the training
split:

    End with "#### " and the answer.

    Question: {question of an example}
    Answer:
    {its gold completion}

    Question: {question}
    Answer:

The gold completion holds the working where the data set has one (gsm_symbolic), else the finished expression
(chain_sum: `4 + 3 - 2 = 5` and `#### 5`), else a sentence with the answer. A few entries are rejected by
their own scorer even with their own answer (gsm_symbolic with a negative one); they are left out, since no
model could score.

A few data sets of the package (in 0.1.25: word_ladder, ransom_note, isomorphic_strings, knight_swap,
polynomial_multiplication) walk over Python sets while they make a question. Set PYTHONHASHSEED to draw the
same questions from them in another process; their splits are disjoint in any case.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS, create_dataset

from distill_jax.rewards.answer_part import answer_part
from distill_jax.rewards.functions import LimitedFunction
from distill_jax.tasks import reasoning_gym_scorer
from distill_jax.tasks.base import Problem, Split, check_draw, did_you_mean, gather, split_of, stable_hash

INSTRUCTION = 'End with "#### " and the answer.'
STOP_TEXTS = ("\n\n", "\nQuestion:")

# Data sets whose scorer hands the answer to eval, or to sympy's parser, which does.
RUNS_ANSWERS = frozenset(
    (
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    )
)
_HELD_OUT = 0.5  # of all questions: one has to be generated to learn its split, and some take long
_CHUNK = 256  # entries of one seed; fixed, since a few data sets generate other entries for another size
_PATIENCE = 5_000
_MEMORY_BYTES = 4 << 30  # of a process that verifies, its imports included
_SHOT_POOL = 8  # every prompt carries the examples, so they are the shortest of so many times their number

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANNOUNCED = re.compile(r"answer\s*(?:is\b:?|:)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w./])-?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?!\w|[./][0-9])")


def extract_answer(
    completion: str, reference: str | None, stop_texts: Sequence[str] = STOP_TEXTS
) -> str | None:
    """Finds the answer in a completion.

    It is looked for in `answer_part`: without thinking, up to the first stop text. The answer is the first that
    is not empty of: what the last `<answer>...</answer>` holds; what follows the last `####`; what follows
    the last
    "answer is" or "Answer:"; and, when the reference is a number, the last number. From what follows a mark,

    - a number is taken when the reference is one: the first, without commas (`$1,250 a week` -> `1250`);
    - otherwise the first line, without a final full stop, unless the reference has one;
    - or all lines, when the reference has several or there is no reference.

    Args:
      completion: what the model wrote.
      reference: the right answer, only to know its form; None when the data set has none.
      stop_texts: where a model that never ends by itself has begun something else.

    Returns:
      The answer, or None when there is none.
    """
    text = answer_part(completion, stop_texts)
    is_number = reference is not None and _NUMBER.fullmatch(reference.strip()) is not None
    candidates = [
        *_TAGGED.findall(text)[-1:],
        *text.split("####")[1:][-1:],
        *_ANNOUNCED.split(text)[1:][-1:],
    ]
    for candidate in filter(str.strip, candidates):
        if is_number and (number := _NUMBER.search(candidate)):
            return number[0].replace(",", "")
        if reference is None or "\n" in reference.strip():
            return candidate.strip()
        line = candidate.strip().partition("\n")[0].rstrip()
        return line if reference.rstrip().endswith(".") else line.removesuffix(".")
    numbers = _NUMBER.findall(text) if is_number else []
    return numbers[-1].replace(",", "") if numbers else None


class _Worked(NamedTuple):
    """An entry of a data set, and a completion that scores 1 (empty when there is no reference answer)."""

    entry: dict[str, Any]
    gold: str

    @property
    def question(self) -> str:
        return self.entry["question"].strip()


class ReasoningGym:
    """One data set of `reasoning_gym` as a task.

    Args:
      dataset: its name, such as "gsm_symbolic" or "chain_sum".
      shots: worked examples before every question; they come from the training split and are not drawn again.
      instruction: the line that says how to give the answer; `extract_answer` reads other forms too.
      stop_texts: see `extract_answer`. Use () for a model whose working has blank lines and that ends by
        itself.
      require_end: score 0 when the model did not end by itself. A base model never does.
      allow_evaluation: take a data set of `RUNS_ANSWERS`, whose scorer hands the answer to Python's eval (or to sympy's
        parser, which does): a model, or whoever trained it, can then run code here.
      seconds, workers: time of one verification, and processes that verify.
      **dataset_config: fields of the data set's configuration, such as `max_terms` of chain_sum.

    Attributes:
      failures: completions on which the data set's scorer raised, took too long or gave no finite number; they score
        0.

    Raises:
      ValueError: no such data set or field, a configuration that the data set rejects, or examples of a data
        set without reference answers.
    """

    name = "reasoning_gym"

    def __init__(
        self,
        dataset: str,
        shots: int = 0,
        instruction: str = INSTRUCTION,
        stop_texts: Sequence[str] = STOP_TEXTS,
        require_end: bool = False,
        allow_evaluation: bool = False,
        seconds: float = 10.0,
        workers: int = 2,
        **dataset_config: Any,
    ):
        if isinstance(stop_texts, str) or not all(stop_texts):
            raise ValueError(f"stop_texts must be a sequence of texts that are not empty, not {stop_texts!r}")
        if not isinstance(shots, int) or shots < 0:
            raise ValueError(f"shots must be a whole number >= 0, not {shots!r}")
        _check_config(dataset, dataset_config)
        if dataset in RUNS_ANSWERS and not allow_evaluation:
            raise ValueError(
                f"the scorer of reasoning_gym's {dataset!r} runs the answer that a model wrote as Python code; use "
                "another data set, or, for models that you trust as you trust code, allow_evaluation=True"
            )
        self.dataset = dataset
        self.failures = 0
        self._config = dataset_config
        self._instruction = instruction
        self.stop_texts = tuple(stop_texts)
        self._require_end = require_end
        self._limits = (float(seconds), workers)
        self._scorer = self._entries(seed=0)
        self._shots: list[_Worked] = []  # none to keep out while they are drawn
        pool = self._draw("train", _SHOT_POOL * shots, "shots", distinct=True)
        self._shots = sorted(pool, key=lambda shot: len(shot.question) + len(shot.gold))[:shots]
        if not all(shot.gold for shot in self._shots):
            raise ValueError(
                f"data set {dataset!r} has no reference answers to make examples of; use shots=0"
            )

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """See `Task.problems`; the question alone decides the split. `metadata`: "dataset" and its "entry".

        `answer` and `gold` are empty where the data set has no reference answer (there are many right ones).
        """
        check_draw(split, count, seed)
        return [
            Problem(
                prompt=self._prompt(worked.question),
                answer=worked.entry["answer"] or "",
                gold=worked.gold,
                index=index,
                metadata={"dataset": self.dataset, "entry": worked.entry},
            )
            for index, worked in enumerate(self._draw(split, count, f"problems {seed}"))
        ]

    def score(self, problem: Problem, completion: str, ended: bool) -> float:
        """The data set's own score of the extracted answer, which may be partial; 0 when there is no answer."""
        return self.score_batch([problem], [completion], [ended])[0]

    def score_batch(
        self, problems: Sequence[Problem], completions: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        """`score` of each row, several at a time.

        Scorers are third-party code that parses whatever a model wrote (as numbers, JSON, formulas): one text that they
        did not foresee, and on which they raise, hang, or give no finite number, counts in `failures` and scores 0.
        """
        scores = [0.0] * len(problems)
        calls: dict[int, dict[str, Any]] = {}
        for row, (problem, completion, end) in enumerate(zip(problems, completions, ended, strict=True)):
            entry = problem.metadata["entry"]
            answer = extract_answer(completion, entry["answer"], self.stop_texts)
            if answer is not None and (end or not self._require_end):
                config = {"seed": 0, "size": _CHUNK, **self._config}
                calls[row] = {"dataset": self.dataset, "config": config, "entry": entry, "answer": answer}
        found = _scorers(*self._limits)(list(calls.values())) if calls else []
        for row, score in zip(calls, found, strict=True):
            self.failures += score is None
            scores[row] = min(max(score or 0.0, 0.0), 1.0)
        return scores

    def _prompt(self, question: str) -> str:
        if not self._shots:
            return f"{question}\n{self._instruction}\n"
        examples = "".join(f"Question: {shot.question}\nAnswer:\n{shot.gold}\n\n" for shot in self._shots)
        return f"{self._instruction}\n\n{examples}Question: {question}\nAnswer:\n"

    def _draw(self, split: Split, count: int, purpose: str, distinct: bool | None = None) -> list[_Worked]:
        candidates = self._candidates(split, purpose)
        what = f"reasoning_gym data set {self.dataset!r}"
        return gather(
            candidates, split, count, what=what, held_out=_HELD_OUT, distinct=distinct, patience=_PATIENCE
        )

    def _candidates(self, split: Split, purpose: str) -> Iterator[tuple[str, _Worked | None]]:
        shown = {shot.question for shot in self._shots}
        for chunk in itertools.count():
            # 31 bits, because the package adds the index, and some data sets seed numpy with the sum.
            entries = self._entries(stable_hash(f"{self.dataset} {split} {purpose} {chunk}", "dataset") >> 33)
            for index in range(_CHUNK):
                entry = entries[index]
                question = entry["question"].strip()
                wanted = split_of(question, _HELD_OUT) == split and question not in shown
                yield question, self._work_out(entry) if wanted else None

    def _entries(self, seed: int) -> ProceduralDataset:
        try:
            return create_dataset(self.dataset, seed=seed, size=_CHUNK, **self._config)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"reasoning_gym data set {self.dataset!r} rejects its configuration: {error}"
            ) from error

    def _work_out(self, entry: dict[str, Any]) -> _Worked | None:
        """The entry with the first completion that its own scorer accepts; None when it accepts none."""
        if entry["answer"] is None:
            return _Worked(entry, gold="")
        for gold in _gold_completions(entry):
            answer = extract_answer(gold, entry["answer"], self.stop_texts)
            if answer is not None and self._scorer.score_answer(answer, entry) == 1:
                return _Worked(entry, gold)
        return None


@functools.lru_cache(maxsize=2)
def _scorers(seconds: float, workers: int) -> LimitedFunction:
    """Shared by all tasks with these limits: its processes take seconds to start."""
    path, names = reasoning_gym_scorer.PATH, reasoning_gym_scorer.PARAMETERS
    return LimitedFunction(path, names, seconds=seconds, workers=workers, memory_bytes=_MEMORY_BYTES)


def _gold_completions(entry: dict[str, Any]) -> Iterator[str]:
    answer, metadata = entry["answer"], entry.get("metadata", {})
    if isinstance(working := metadata.get("answer_cot"), str) and "####" in working:
        yield re.sub(r"\n\s*\n", "\n", working.strip())
    expression = metadata.get("expression")
    if isinstance(expression, str) and f"{expression} =" in entry["question"]:
        yield f"{expression} = {answer}\n#### {answer}"
    if "\n" not in answer.strip():
        yield f"The answer is {answer}.\n#### {answer}"
    yield f"#### {answer}"


def _check_config(dataset: str, config: dict[str, Any]) -> None:
    if dataset not in DATASETS:
        raise ValueError(
            f"reasoning_gym has no data set {dataset!r}{did_you_mean(dataset, DATASETS)}; data sets: "
            f"{', '.join(sorted(DATASETS))}"
        )
    fields = [
        field.name for field in dataclasses.fields(DATASETS[dataset][1]) if field.name not in ("seed", "size")
    ]
    if reserved := sorted({"seed", "size"} & set(config)):
        raise ValueError(
            f"{' and '.join(reserved)}: given to `problems`, as seed and count, and not to the data set"
        )
    if unknown := sorted(set(config) - set(fields)):
        raise ValueError(
            f"task 'reasoning_gym' has no option {', '.join(map(repr, unknown))}; its options: dataset, "
            "shots, instruction, stop_texts, require_end, allow_evaluation, seconds, workers, and those of "
            f"the data set {dataset!r}: {', '.join(fields) or 'none'}"
        )
