"""Data sets on disk: rows at any place, and what is said when they cannot be read."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import sys

import pytest

from distill_jax.data import DataError, open_dataset
from distill_jax.data.sources import JsonLines
from tests.data.prepared import prepare_tfds, write_lines

ROWS = [{"question": f"{n}\u2028?", "answer": "é" * n} for n in range(30)]


def test_json_lines_at_any_place(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", ROWS)
    path.write_text("\n" + path.read_text() + "\n\n")  # empty lines are no rows
    splits = open_dataset(path)
    assert list(splits) == ["train"] and "test" not in splits
    source = splits["train"]
    assert len(source) == 30 and [source[i] for i in (29, 0, 7)] == [ROWS[29], ROWS[0], ROWS[7]]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, range(30))) == ROWS


def test_a_folder_of_splits_and_shards(tmp_path):
    write_lines(tmp_path / "train-00000-of-00002.jsonl", ROWS[:4])
    write_lines(tmp_path / "train-00001-of-00002.jsonl", ROWS[4:6])
    write_lines(tmp_path / "test.jsonl", ROWS[6:9])
    splits = open_dataset(tmp_path)
    assert {name: [row for row in splits[name]] for name in splits} == {"train": ROWS[:6], "test": ROWS[6:9]}
    with pytest.raises(DataError, match="has no split 'dev'; it has test, train"):
        splits["dev"]


def test_one_array_in_place_of_lines_is_refused_with_what_to_do(tmp_path):
    """The other form that data sets are published in."""
    (tmp_path / "rows.json").write_text('\n[\n  {"question": "1+1", "answer": "2"}\n]\n')
    with pytest.raises(DataError, match=r"one JSON array; .*jq -c '\.\[\]' rows.json > rows.jsonl"):
        open_dataset(tmp_path / "rows.json")["train"]


def test_a_folder_with_one_file_that_is_named_after_the_data_set(tmp_path):
    """As Dolly, SuperGPQA and the Vicuna questions are published."""
    write_lines(tmp_path / "databricks-dolly-15k.jsonl", ROWS)
    assert {name: len(rows) for name, rows in open_dataset(tmp_path).items()} == {"train": len(ROWS)}
    write_lines(tmp_path / "test.jsonl", ROWS)
    assert set(open_dataset(tmp_path)) == {"databricks-dolly-15k", "test"}


def test_lines_that_are_no_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2\n[3]\n')
    source = JsonLines([path])
    assert source[0] == {"a": 1}
    with pytest.raises(DataError, match=r"bad.jsonl, line 3 is not JSON"):
        source[1]
    with pytest.raises(DataError, match=r"bad.jsonl, line 4 holds a list; expected one JSON object"):
        source[2]
    with pytest.raises(IndexError):
        source[3]


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"no data set at .*nothing is downloaded"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match=r"one file is JSON lines"):
        open_dataset(write_lines(tmp_path / "a.csv", ROWS[:1]))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"the split 'train' of .*empty.jsonl is empty"):
        open_dataset(tmp_path / "empty.jsonl")["train"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no data set: expected .* it holds notes.txt"):
        open_dataset(other)


def test_tensorflow_datasets_without_tensorflow(tmp_path):
    """Prepared by the test, read by its folder; bytes come as text and arrays as lists."""
    splits = open_dataset(prepare_tfds(tmp_path))
    assert {name: len(splits[name]) for name in splits} == {"train": 40, "test": 5}
    rows = sorted((splits["test"][i] for i in range(5)), key=lambda row: row["question"])
    assert rows[0] == {
        "question": "100 + 1?",
        "answer": "#### 101",
        "choices": {"text": ["é", "b"], "size": [100, 2]},
    }
    json.dumps(rows)
    assert "tensorflow" not in sys.modules


def test_tensorflow_datasets_by_name(tmp_path):
    with pytest.raises(DataError, match=r"'gsm8k' is not prepared in .*download_and_prepare"):
        open_dataset("tfds:gsm8k", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="knows no data set 'no_such_data'"):
        open_dataset("tfds:no_such_data", data_dir=str(tmp_path))
    prepare_tfds(tmp_path)
    splits = open_dataset("tfds:local_math", data_dir=str(tmp_path))  # its class is known to this process
    assert len(splits["train"]) == 40


def test_other_formats_of_tensorflow_datasets_are_refused(tmp_path):
    folder = prepare_tfds(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        DataError, match="prepared as tfrecord, which only TensorFlow reads; prepare it again"
    ):
        open_dataset(folder)


def test_hugging_face_folders_need_their_package(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.setattr("distill_jax.data.sources.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="'datasets', which is not installed: pip install datasets, or write"):
        open_dataset(tmp_path)


@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
    """The package, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return datasets


def test_what_datasets_saved_to_disk(tmp_path, datasets):
    rows = [{"question": f"{n}?", "choices": {"label": ["A", "B"], "text": ["x", str(n)]}} for n in range(9)]
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=whole.select(range(6)), test=whole.select(range(6, 9))).save_to_disk(
        str(tmp_path / "splits")
    )
    splits = open_dataset(tmp_path / "splits")
    assert {name: list(splits[name]) for name in splits} == {"train": rows[:6], "test": rows[6:]}
    whole.save_to_disk(str(tmp_path / "one"))
    assert [row for row in open_dataset(tmp_path / "one")["train"]] == rows


def test_parquet_files_as_the_hub_has_them(tmp_path, datasets):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    parts = {
        "train-00000-of-00002": ROWS[:3],
        "train-00001-of-00002": ROWS[3:5],
        "test-00000-of-00001-0f3b1c2d4e5a6b7c": ROWS[5:9],
    }
    for name, rows in parts.items():
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{name}.parquet"))
    splits = open_dataset(tmp_path / "hub")
    assert {name: list(splits[name]) for name in splits} == {"train": ROWS[:5], "test": ROWS[5:9]}
    (tmp_path / "hub" / "socratic").mkdir()
    shutil.copy(folder / "train-00000-of-00002.parquet", tmp_path / "hub" / "socratic")
    with pytest.raises(
        DataError, match=r"a split 'train' in several folders \(data, socratic\); give the path"
    ):
        open_dataset(tmp_path / "hub")
