"""Reading a WORKDIR: what is missing is skipped, what is broken is an error with its place."""

from __future__ import annotations

import numpy as np
import pytest

from distill_jax.report.records import Outcomes, align, pair, read_results, write_bytes
from tests.report.synthetic import WORKING, write_lines, write_workdir


def test_matrix_is_aligned_by_problem_and_seed(tmp_path):
    for seed, order in ((3, [2, 0, 1]), (1, [0, 1, 2])):
        rows = [
            {"budget": 1.0, "decoding": "greedy", "problem": p, "correct": int(p == seed % 3)} for p in order
        ]
        write_lines(
            tmp_path / "students" / "original" / "sft" / "byte" / f"seed{seed}" / "predictions.jsonl", rows
        )
    outcomes = read_results(tmp_path).students["original", "sft", "byte"][1.0, "greedy"]
    assert outcomes.problems == (0, 1, 2) and outcomes.seeds == (1, 3)
    np.testing.assert_array_equal(outcomes.correct, [[0, 1, 0], [1, 0, 0]])


def test_problems_without_every_seed_are_left_out_and_noted():
    notes = []
    outcomes = align({0: {1: 1.0, 2: 0.0}, 1: {2: 1.0, 3: 1.0}}, "cell", notes)
    assert outcomes.problems == (2,) and notes == ["cell: 2 of 3 problems lack a seed and are left out"]
    assert (
        align({0: {1: 1.0}, 1: {2: 1.0}}, "cell", notes) is None and "no test problem in common" in notes[-1]
    )


def test_pair_takes_common_problems_and_seeds():
    first = Outcomes((1, 2, 3), (0, 1), np.array([[1, 2, 3], [4, 5, 6]]))
    second = Outcomes((2, 3, 4), (1, 2), np.array([[7, 8, 9], [10, 11, 12]]))
    one, other = pair(first, second)
    np.testing.assert_array_equal(one, [[5, 6]])
    np.testing.assert_array_equal(other, [[7, 8]])
    disjoint = Outcomes((2, 3), (7,), np.array([[1, 0]]))
    one, other = pair(first, disjoint)
    assert one.shape == (2, 2) and other.shape == (1, 2)
    assert pair(first, Outcomes((9,), (0,), np.array([[1]]))) is None


def test_several_samples_of_one_problem_are_averaged(tmp_path):
    rows = [{"decoding": "sample", "problem": 0, "correct": correct} for correct in (1, 0, 1, 1)]
    write_lines(tmp_path / "arms" / "control" / "evaluation.jsonl", rows)
    np.testing.assert_array_equal(read_results(tmp_path).teachers["control", "sample"].correct, [[0.75]])


def test_last_step_of_the_rollouts_counts(tmp_path):
    write_workdir(tmp_path, {}, {"original": 0.9}, problems=8)
    assert {row["step"] for row in read_results(tmp_path).rollouts["original"]} == {30}


def test_last_line_cut_off_is_left_out_and_noted(tmp_path):
    write_workdir(tmp_path, {}, {"control": 0.9}, problems=8)
    path = tmp_path / "arms" / "control" / "metrics.jsonl"
    whole = len(read_results(tmp_path).metrics["control"])
    path.write_text(path.read_text() + '{"step": 31, "rew', encoding="utf-8")
    results = read_results(tmp_path)
    assert len(results.metrics["control"]) == whole
    assert results.notes == ["metrics.jsonl of control: the last line is cut off and was left out"]


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"decoding": "greedy", "problem": 0}\n', "line 1: .*missing correct"),
        ("[1]\n", "line 1"),
        (
            '{"broken\n{"decoding": "greedy", "problem": 0, "correct": 1}\n',
            "line 1: expected one JSON object",
        ),
        ('{"decoding": "beam", "problem": 0, "correct": 1}\n', "greedy, sample, got 'beam'"),
        ('{"decoding": "greedy", "problem": 0, "correct": 3}\n', r"correct in \[0, 1\]"),
        ('{"decoding": "greedy", "problem": 0, "correct": 1, "budget": -1}\n', "budget"),
    ],
)
def test_broken_file_is_an_error_that_names_its_place(tmp_path, line, message):
    path = tmp_path / "arms" / "original" / "evaluation.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_results(tmp_path)
    assert "evaluation.jsonl" in str(caught.value)


def test_broken_stage_and_seed_folder_are_errors(tmp_path):
    write_workdir(tmp_path, {"original": WORKING["original"]}, {}, kinds=("byte",), seeds=1, problems=8)
    (tmp_path / "students/original/sft/byte/seed0").rename(tmp_path / "students/original/sft/byte/seedling")
    with pytest.raises(ValueError, match="seed<number>, got 'seedling'"):
        read_results(tmp_path)
    (tmp_path / "students/original/sft/byte/seedling").rename(tmp_path / "students/original/sft/byte/seed0")
    (tmp_path / "stages" / "distil.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"distil\.json: expected"):
        read_results(tmp_path)


def test_workdir_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_results(tmp_path / "nowhere")


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "report" / "index.html", b"old")

    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill_jax.report.records.os.fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and [item.name for item in path.parent.iterdir()] == ["index.html"]
