"""Tasks whose questions are rows of a data set: columns, splits and prompts; what an answer is worth is the task's.

Which split a question belongs to: where the data set has a split of its own for it, that one; else the hash of
the question's text decides (`base.split_of`). A question of a held-out split that stands in the training rows
too, as it stands or with other white space or capitals, is left out of training.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from distill_jax.data.sources import DataError, Row, RowSource, Splits, open_dataset
from distill_jax.tasks.base import (
    SPLITS,
    Problem,
    Split,
    check_draw,
    did_you_mean,
    split_of,
    stable_hash,
    task_rng,
)
from distill_jax.tasks.datasets import DATASETS, Entry

_SHOT_POOL = 8  # every prompt carries the examples, so they are the shortest of so many times their number
_DEFAULT_COLUMNS = {"question": "question", "answer": "answer"}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row as its task reads it. See `Problem` for answer, gold and metadata."""

    question: str
    answer: str = ""
    gold: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def column(row: Row, path: str, where: str) -> Any:
    """The value of a column; a dot goes into a nested object, a number into a list.

    Raises:
      DataError: there is none; names the columns that are there.
    """
    value: Any = row
    for name in path.split("."):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(
                f"{where} has no column {path!r}{did_you_mean(path, row)}; it has {', '.join(row) or 'none'}; say "
                "which column to read with the option columns"
            ) from None
    return value


class RowTask(abc.ABC):
    """What tasks on data sets share. A task gives `name`, `roles`, `_read` and `score`.

    Args:
      path: the data set's place, see `data.sources`.
      dataset: an entry of `DATASETS` of this task; empty for columns of your own.
      columns: role -> column, replaces those of the entry.
      splits: ours -> the data set's own, replaces those of the entry.
      pool: its splits that the others are drawn from; by default the entry's, or "train".
      shots: worked examples before every question, of the training split, and not drawn again.
      instruction: a line after the question (or, with examples, before them).
      max_prompt_bytes: longer questions are left out; None keeps all.
      data_dir: see `data.sources.open_dataset`.

    Raises:
      ValueError: as `DataError` what reading raises; a data set of another task, unknown roles or splits.
    """

    name = ""
    roles: tuple[str, ...] = ("question", "answer")
    required: tuple[str, ...] = ("question", "answer")

    def __init__(
        self,
        path: str,
        dataset: str = "",
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
        pool: Sequence[str] | None = None,
        shots: int = 0,
        instruction: str = "",
        max_prompt_bytes: int | None = None,
        data_dir: str | None = None,
    ) -> None:
        self.entry = self._entry(dataset, dict(columns or {}), dict(splits or {}), pool)
        if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
            raise ValueError(f"shots must be a whole number >= 0, not {shots!r}")
        self._instruction, self._max_bytes = instruction, max_prompt_bytes
        self._data: Splits = open_dataset(path, data_dir)
        self._rows: dict[Split, list[tuple[RowSource, int]]] = {}
        self._shots: list[Asked] = []
        if shots:
            drawn = itertools.islice(self._draw("train", seed=0), _SHOT_POOL * shots)
            self._shots = sorted(drawn, key=lambda shot: len(shot.question) + len(shot.gold))[:shots]
            if len(self._shots) < shots or not all(shot.gold for shot in self._shots):
                raise ValueError(
                    f"{self._data.where}: {shots} worked examples need as many training rows with answers; use shots=0"
                )
            shown = {_key(shot.question) for shot in self._shots}
            kept = [place for place in self._rows["train"] if _key(self._ask(*place).question) not in shown]
            self._rows["train"] = self._some(kept, "train")

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """See `Task.problems`: training rows in passes, each in an order of its own; held-out ones once.

        Raises:
          ValueError: a held-out split with fewer questions than `count`; what reading a row raises.
        """
        check_draw(split, count, seed)
        drawn = list(itertools.islice(self._draw(split, seed), count))
        if len(drawn) < count:
            raise ValueError(
                f"{self._data.where}: {count} problems of the split {split!r} were asked for, there are {len(drawn)}; "
                "ask for fewer"
            )
        return [
            Problem(self._prompt(asked.question), asked.answer, asked.gold, index, dict(asked.metadata))
            for index, asked in enumerate(drawn)
        ]

    @abc.abstractmethod
    def _read(self, row: Row, where: str) -> Asked:
        """A row as this task sees it. Raises DataError when a column is missing or makes no sense."""

    def _text(self, row: Row, role: str, where: str) -> str:
        """The text of a column, stripped. Raises DataError when there is none."""
        value = column(row, self.entry.columns[role], where)
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise DataError(
                f"{where}: the column {self.entry.columns[role]!r} ({role}) should hold text, got {value!r:.60}"
            )
        return str(value).strip()

    def _prompt(self, question: str) -> str:
        tail = f"\n{self._instruction}" if self._instruction else ""
        if not self._shots:
            return f"{question}{tail}\n"
        examples = "".join(f"Question: {shot.question}\nAnswer:\n{shot.gold}\n\n" for shot in self._shots)
        head = f"{self._instruction}\n\n" if self._instruction else ""
        return f"{head}{examples}Question: {question}\nAnswer:\n"

    def _entry(
        self, dataset: str, columns: dict[str, str], splits: dict[str, str], pool: Sequence[str] | None
    ) -> Entry:
        known = sorted(name for name, entry in DATASETS.items() if entry.task == self.name)
        if dataset and dataset not in known:
            raise ValueError(
                f"task {self.name!r} has no data set {dataset!r}{did_you_mean(dataset, known)}; it has "
                f"{', '.join(known)}; leave dataset out to read columns of your own"
            )
        given = {role: name for role, name in _DEFAULT_COLUMNS.items() if role in self.required}
        entry = DATASETS[dataset] if dataset else Entry(self.name, given)
        merged = {**entry.columns, **columns}
        for what, names, allowed in (("columns", merged, self.roles), ("splits", splits, SPLITS)):
            unknown = sorted(set(names) - set(allowed))
            if unknown:
                raise ValueError(f"{what} names {unknown}; expected some of {', '.join(allowed)}")
        missing = [role for role in self.required if role not in merged]
        if missing:
            raise ValueError(f"columns must say which column holds {', '.join(map(repr, missing))}")
        return dataclasses.replace(
            entry,
            columns=merged,
            splits={**entry.splits, **cast(dict[Split, str], splits)},
            pool=entry.pool if pool is None else tuple(pool),
        )

    def _draw(self, split: Split, seed: int) -> Iterator[Asked]:
        places = self._places(split)
        rng = task_rng(seed, f"{self.name} {split}")
        for _ in itertools.count() if split == "train" else range(1):
            for place in rng.permutation(len(places)).tolist():
                yield self._ask(*places[place])

    def _ask(self, source: RowSource, index: int) -> Asked:
        return self._read(source[index], f"{source.name}, row {index}")

    def _places(self, split: Split) -> list[tuple[RowSource, int]]:
        """Where the rows of a split stand. Every question is read once for it."""
        if split not in self._rows:
            own, pool = dict(self.entry.splits), self.entry.pool
            if split not in own and not pool:
                raise DataError(
                    f"{self._data.where} has no rows for the split {split!r}: it serves {', '.join(own)} only; "
                    "train on another data set"
                )
            # A question that stands in several of the data set's own splits is in the test split, then in validation.
            first: tuple[Split, ...] = () if split == "test" and split in own else ("test", "validation")
            names = tuple(own[name] for name in first if name in own and name != split)
            taken = {_key(asked.question) for _, asked in self._candidates(names)}
            # What is drawn by the hash shares its rows with others that are, and with an own train that is in the pool.
            drawn = split not in own or (split == "train" and own["train"] in pool)
            places = self._unique(
                (
                    (place, asked)
                    for place, asked in self._candidates((own[split],) if split in own else pool)
                    if not drawn or self._hashed(asked.question) == split
                ),
                taken,
            )
            self._rows[split] = self._some(places, split)
        return self._rows[split]

    def _hashed(self, question: str) -> Split:
        """The split that the hash gives a question of the pool, among those without a split of their own."""
        wanted = split_of(_normalised(question))
        return "train" if wanted in self.entry.splits else wanted

    def _candidates(self, names: Sequence[str]) -> Iterator[tuple[tuple[RowSource, int], Asked]]:
        too_long = 0
        for name in names:
            source = self._data[name]
            for index in range(len(source)):
                row, where = source[index], f"{source.name}, row {index}"
                if all(column(row, key, where) in values for key, values in self.entry.where.items()):
                    asked = self._read(row, where)
                    if self._max_bytes is not None and len(asked.question.encode()) > self._max_bytes:
                        too_long += 1
                    else:
                        yield (source, index), asked
        if too_long:
            _log.warning(
                "%s: %d questions are longer than max_prompt_bytes=%d and were left out",
                self._data.where,
                too_long,
                self._max_bytes,
            )

    @staticmethod
    def _unique(
        candidates: Iterator[tuple[tuple[RowSource, int], Asked]], seen: set[int]
    ) -> list[tuple[RowSource, int]]:
        """The first row of every question that is not in `seen`."""
        places = []
        for place, asked in candidates:
            key = _key(asked.question)
            if key not in seen:
                seen.add(key)
                places.append(place)
        return places

    def _some(self, places: list[tuple[RowSource, int]], split: Split) -> list[tuple[RowSource, int]]:
        if not places:
            raise DataError(
                f"{self._data.where} leaves no question for the split {split!r}; give the data set more rows, or a "
                f"split of its own for it (the option splits), or a larger max_prompt_bytes (now {self._max_bytes})"
            )
        return places


def _normalised(question: str) -> str:
    return " ".join(question.lower().split())


def _key(question: str) -> int:
    """64 bits that are the same for questions that differ in white space and capitals only."""
    return stable_hash(_normalised(question), "question")
