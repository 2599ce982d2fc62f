"""Data sets on disk, as splits of rows that can be read at any place. Nothing is fetched from a network.

    FILE.jsonl                    JSON lines: one split, "train"
    FOLDER with *.jsonl           a split a file; train-00000-of-00002.jsonl and the like are joined; one file
                                  that is named after no split is "train"
    tfds:NAME                     a data set of tensorflow-datasets that was prepared on this machine
    FOLDER with dataset_info.json and array_record files    the same, by its folder
    FOLDER of `datasets.save_to_disk`, or with *.parquet    by the package `datasets`, where it is installed

Rows are dictionaries of plain Python values: bytes are decoded, arrays become lists.
"""

from __future__ import annotations

import array
import functools
import importlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

Row = dict[str, Any]
TFDS_PREFIX = "tfds:"
_SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "dev"}
_PEEKED = 1024  # bytes: where a file is one array, its first sign is "["
_SHARD = re.compile(r"(.+?)-\d+-of-\d+(-[0-9a-f]{8,})?$")


class DataError(ValueError):
    """A data set that cannot be read, or does not hold what is wanted."""


class RowSource(Protocol):
    """One split. name: for messages."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class JsonLines:
    """Rows of files with one JSON object a line, read where they stand.

    Args:
      paths: the files, one after the other.

    Raises:
      DataError: no such file, or one JSON array in place of lines.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self._paths = tuple(paths)
        self._file, self._start, self._line = array.array("q"), array.array("q"), array.array("q")
        for number, path in enumerate(self._paths):
            if not path.is_file():
                raise DataError(f"there is no file {path}")
            with path.open("rb") as lines:
                if lines.read(_PEEKED).lstrip().startswith(b"["):
                    raise DataError(
                        f"{path} holds one JSON array; expected one JSON object a line. To convert it: "
                        f"jq -c '.[]' {path.name} > {path.stem}.jsonl"
                    )
                lines.seek(0)
                place = 0
                for line_number, line in enumerate(lines, 1):
                    if line.strip():
                        self._file.append(number)
                        self._start.append(place)
                        self._line.append(line_number)
                    place += len(line)
        self._handles = threading.local()  # one place in a file a thread; readers may be many

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int, /) -> Row:
        number = self._file[index]
        handles: dict[int, BinaryIO] = vars(self._handles).setdefault("files", {})
        if number not in handles:
            handles[number] = self._paths[number].open("rb")
        handles[number].seek(self._start[index])
        line = handles[number].readline()
        where = f"{self._paths[number]}, line {self._line[index]}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} holds a {type(row).__name__}; expected one JSON object a line")
        return row


class _Converted:
    """Rows of another library's split, as plain values."""

    def __init__(self, name: str, split: Any) -> None:
        self.name, self._split = name, split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int, /) -> Row:
        return plain(self._split[int(index)])


def plain(value: Any) -> Any:
    """The value with bytes as text, arrays as lists, and mappings and sequences as dictionaries and lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class Splits(Mapping[str, RowSource]):
    """Splits by name; each is opened when it is first asked for."""

    def __init__(self, where: str, openers: Mapping[str, Callable[[], RowSource]]) -> None:
        self.where = where
        self._openers, self._open = dict(openers), dict[str, RowSource]()

    def __getitem__(self, split: str) -> RowSource:
        if split not in self._openers:
            raise DataError(
                f"{self.where} has no split {split!r}; it has {', '.join(sorted(self._openers)) or 'none'}"
            )
        if split not in self._open:
            self._open[split] = self._openers[split]()
            if not len(self._open[split]):
                raise DataError(f"the split {split!r} of {self.where} is empty; give another, or fill it")
        return self._open[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)

    def __contains__(self, split: object) -> bool:  # Mapping's own would open it
        return split in self._openers


def open_dataset(path: str | os.PathLike[str], data_dir: str | None = None) -> Splits:
    """The splits of a data set.

    Args:
      path: a file, a folder, or "tfds:NAME" (also "tfds:NAME/CONFIG"); see the docstring of this module.
      data_dir: of "tfds:NAME": where it was prepared; by default tensorflow-datasets' own place.

    Raises:
      DataError: nothing there, or nothing that can be read; says what was expected.
    """
    text = os.fspath(path)
    if text.startswith(TFDS_PREFIX):
        return _tfds_by_name(text.removeprefix(TFDS_PREFIX), data_dir)
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix not in (".jsonl", ".json"):
            raise DataError(f"{place}: a data set in one file is JSON lines (.jsonl)")
        return Splits(str(place), {"train": lambda: JsonLines([place])})
    if not place.is_dir():
        raise DataError(
            f"there is no data set at {text!r}: expected a .jsonl file, a folder, or tfds:NAME; nothing is downloaded, "
            "so fetch it first"
        )
    lines = sorted(place.glob("*.jsonl"))
    if lines:
        by_split: dict[str, list[Path]] = {}
        for file in lines:
            by_split.setdefault(_split_name(file), []).append(file)
        if len(by_split) == 1 and not by_split.keys() & _SPLIT_NAMES:
            by_split = {"train": lines}  # published as one file under the name of the data set
        openers = {split: functools.partial(JsonLines, files) for split, files in by_split.items()}
        return Splits(str(place), openers)
    names = {entry.name for entry in place.iterdir()}
    parquet = sorted(place.rglob("*.parquet"))
    if names & {"dataset_dict.json", "state.json"} or parquet:
        return _hugging_face(place, parquet)
    if "dataset_info.json" in names:
        tfds = importlib.import_module("tensorflow_datasets")
        return _tfds_splits(tfds.builder_from_directory(place), str(place))
    raise DataError(
        f"{place} holds no data set: expected *.jsonl, *.parquet, a folder of datasets.save_to_disk, or one that "
        f"tensorflow-datasets prepared; it holds {', '.join(sorted(names)[:8]) or 'nothing'}"
    )


def _split_name(file: Path) -> str:
    """The split that a file belongs to: its name, without the number of a shard."""
    shard = _SHARD.fullmatch(file.stem)
    return shard[1] if shard else file.stem


def _tfds_by_name(name: str, data_dir: str | None) -> Splits:
    tfds = importlib.import_module("tensorflow_datasets")
    # Without TensorFlow the package does not list the data sets of some of its modules until they are imported.
    module = f"tensorflow_datasets.text.{name.partition('/')[0]}"
    if importlib.util.find_spec(module) is not None:
        importlib.import_module(module)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise DataError(
            f"tensorflow-datasets knows no data set {name!r} here; give the folder of a prepared one instead"
        ) from error
    if not builder.data_path.exists():
        raise DataError(
            f"the data set {name!r} is not prepared in {builder.data_path}; where there is a network, run "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare(), and give data_dir"
        )
    return _tfds_splits(builder, f"tfds:{name}")


def _tfds_splits(builder: Any, where: str) -> Splits:
    file_format = getattr(builder.info.file_format, "value", builder.info.file_format)
    if file_format != "array_record":
        raise DataError(
            f"{where} was prepared as {file_format}, which only TensorFlow reads; prepare it again with "
            "file_format='array_record'"
        )

    def opener(split: str) -> Callable[[], RowSource]:
        return lambda: _Converted(f"{where}, split {split}", builder.as_data_source(split=split))

    return Splits(where, {split: opener(split) for split in builder.info.splits})


def _hugging_face(place: Path, parquet: Sequence[Path]) -> Splits:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{place} is a folder of the package 'datasets', which is not installed: pip install datasets, or write "
            "the splits as JSON lines (Dataset.to_json)"
        )
    datasets: Any = importlib.import_module("datasets")
    if parquet:
        files: dict[str, list[str]] = {}
        folders: dict[str, set[str]] = {}
        for file in parquet:
            files.setdefault(_split_name(file), []).append(str(file))
            folders.setdefault(_split_name(file), set()).add(str(file.parent.relative_to(place)))
        for split, places in folders.items():
            if len(places) > 1:  # parts of a data set that are no shards of one another
                raise DataError(
                    f"{place} has a split {split!r} in several folders ({', '.join(sorted(places))}); give the path "
                    "of the one that is meant"
                )
        # Read as files: no script that lies beside them is run.
        loaded = {
            split: datasets.Dataset.from_parquet(names, split=split, keep_in_memory=True)
            for split, names in files.items()
        }
    else:
        found = datasets.load_from_disk(str(place))
        loaded = dict(found) if isinstance(found, Mapping) else {"train": found}

    def opener(split: str) -> Callable[[], RowSource]:
        return lambda: _Converted(f"{place}, split {split}", loaded[split])

    return Splits(str(place), {split: opener(split) for split in loaded})
