"""Tasks on data sets: every configured format, disjoint splits, prompts, scores, and data that does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distill_jax.data import DataError
from distill_jax.rewards.reward_model import RewardModel
from distill_jax.tasks import SPLITS, get_task, split_of
from distill_jax.tasks.datasets import DATASETS
from distill_jax.tasks.scoring import score_all
from tests.data.prepared import prepare_tfds, write_lines
from tests.rewards.small_classifier import write_classifier
from tests.tasks import dataset_files
from tests.tasks.dataset_files import COUNT

WRITERS = {name: getattr(dataset_files, name) for name in DATASETS if hasattr(dataset_files, name)}
WRITERS |= {"big_math_level_4": dataset_files.big_math, "big_math_level_5": dataset_files.big_math}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return str(write_classifier(tmp_path_factory.mktemp("judge") / "model"))


def make(name, folder, judge, **options):
    task = DATASETS[name].task
    if task == "instructions":
        options |= {"reward_model": judge, "batch_size": 4, "sizes": (128,)}
    return get_task(task, dataset=name, path=str(WRITERS[name](folder)), **options)


def prompts(task, split, count, seed=0):
    return [problem.prompt for problem in task.problems(split, count, seed)]


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"vicuna"}))
def test_every_configured_data_set(name, tmp_path, judge):
    """Splits share no question, and the gold completion of every problem scores 1 (where there is a right answer)."""
    task = make(name, tmp_path, judge)
    size = {split: len(task._places(split)) for split in SPLITS}
    pool = COUNT - (name.startswith("big_math"))
    assert size["train"] > size["validation"] > 0 and size["test"] > 0
    own = DATASETS[name].splits
    assert sum(size[split] for split in SPLITS if split not in own) == pool
    found = {split: set(prompts(task, split, size[split])) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [size[split] for split in SPLITS]
    assert not found["train"] & found["validation"] and not found["train"] & found["test"]
    assert not found["validation"] & found["test"]
    problems = task.problems("test", size["test"], 1)
    rewards, raised = score_all(task, problems, [p.gold for p in problems], [True] * len(problems))
    assert raised == task.failures == 0
    if DATASETS[name].task == "instructions":
        assert all(0 < reward < 1 for reward in rewards)
    else:
        assert rewards == [1.0] * len(problems)
        wrong = "Answer: nobody knows" if DATASETS[name].task == "multiple_choice" else "#### -5"
        assert score_all(task, problems, [wrong] * len(problems), [True] * len(problems))[0] == [0.0] * len(
            problems
        )


def test_gsm8k_by_hand(tmp_path, judge):
    task = make("gsm8k", tmp_path, judge)
    problem = next(p for p in task.problems("test", 10, 0) if "1003" in p.prompt)
    assert problem.prompt == (
        "Tom has 1003 pens and gets 2 more. How many has he?\n"
        'Think step by step. End with "#### " and the answer.\n'
    )
    assert (problem.answer, problem.gold) == (
        "1,005",
        "He has 1003 and gets 2, so 1003 + 2 = 1005.\n#### 1,005",
    )
    assert [task.score(problem, text, True) for text in ("\\boxed{1005}", "#### 1005.0", "#### 1006")] == [
        1,
        1,
        0,
    ]
    strict = make("gsm8k", tmp_path, judge, require_end=True)
    assert [strict.score(problem, "#### 1005", end) for end in (True, False)] == [1.0, 0.0]


def test_multiple_choice_by_hand(tmp_path, judge):
    problem = make("commonsense_qa", tmp_path, judge).problems("test", 8, 0)[0]
    number = problem.metadata["options"][0].removeprefix("place ")
    assert problem.prompt == (
        f"Where would you put thing {number}?\nA. place {number}\nB. home\nC. a shop\nD. the sea\nE. a zoo\n"
        'End with "Answer: " and the letter of the right option.\n'
    )
    assert (problem.answer, problem.gold) == ("B", "Answer: B")
    task = make("commonsense_qa", tmp_path, judge)
    said = ("At home, so (B).\n**B**", "home", "C", "B\nQuestion: next\nAnswer: C")
    assert [task.score(problem, text, False) for text in said] == [1, 1, 0, 1]


def test_own_splits_that_share_questions(tmp_path):
    """Ten training questions stand in the test split as well, and validation is drawn from the training rows."""
    for name, numbers in (("train", range(200)), ("test", range(190, 230))):
        write_lines(tmp_path / f"{name}.jsonl", [{"question": f"{n}?", "answer": str(n)} for n in numbers])
    splits = {"train": "train", "test": "test"}
    task = get_task("math_text", path=str(tmp_path), splits=splits)
    test = {problem.answer for problem in task.problems("test", 40, 0)}
    validation = {problem.answer for problem in task.problems("validation", 5, 0)}
    train = {problem.answer for problem in task.problems("train", 1000, 0)}
    assert len(test) == 40 and not train & test and not train & validation and not validation & test
    assert len(train) > 100
    own = get_task("math_text", path=str(tmp_path), splits={**splits, "validation": "test"})
    assert len(own.problems("test", 40, 0)) == 40
    with pytest.raises(DataError, match="leaves no question for the split 'validation'"):
        own.problems("validation", 1, 0)  # all of them are test questions


@pytest.mark.parametrize("answer", [2, "2"])
def test_labels_that_are_numbers(tmp_path, answer):
    """The label 2 is the first option here; as a place it would be the third."""
    rows = [{"q": f"{n}?", "o": ["x", "y", "z"], "l": [2, 3, 4], "a": answer} for n in range(200)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "choices": "o", "labels": "l", "answer": "a"}
    task = get_task("multiple_choice", path=str(path), columns=columns)
    assert task.problems("train", 1, 0)[0].answer == "A"
    if answer == 2:
        del columns["labels"]
        plain = get_task("multiple_choice", path=str(path), columns=columns)
        assert plain.problems("train", 1, 0)[0].answer == "C"


def test_labels_and_options_of_different_number_are_refused(tmp_path):
    rows = [{"q": "?", "o": ["x", "y"], "l": ["A", "B", "C"], "a": "C"}] * 40
    columns = {"question": "q", "choices": "o", "labels": "l", "answer": "a"}
    with pytest.raises(DataError, match="3 labels for 2 options"):
        get_task(
            "multiple_choice", path=str(write_lines(tmp_path / "d.jsonl", rows)), columns=columns
        ).problems("train", 1, seed=0)


def test_worked_examples(tmp_path, judge):
    task = make("super_gpqa", tmp_path, judge, shots=2)
    problems = task.problems("train", 40, 0)
    head, _, rest = problems[0].prompt.partition("\n\n")
    assert head == 'End with "Answer: " and the letter of the right option.'
    examples = rest.split("\n\n")[:-1]
    assert len(examples) == 2 and all(e.endswith("\nAnswer:\nAnswer: B") for e in examples)
    shown = {example.partition("\n")[0].removeprefix("Question: ") for example in examples}
    own = {problem.prompt.rpartition("Question: ")[2].partition("\n")[0] for problem in problems}
    assert len(shown) == 2 and not shown & own
    assert all(problem.prompt.startswith(f"{head}\n\n{examples[0]}") for problem in problems)


def test_vicuna_tests_and_does_not_train(tmp_path, judge):
    task = make("vicuna", tmp_path, judge)
    problems = task.problems("test", 8, 0)
    assert sorted(p.prompt for p in problems) == [f"How can I improve skill {n}?\n" for n in range(8)]
    assert problems[0].gold == ""
    with pytest.raises(DataError, match="no rows for the split 'train': it serves test only"):
        task.problems("train", 1, 0)


def test_open_text_is_scored_in_batches_by_the_reward_model(tmp_path, judge):
    task = make("dolly", tmp_path, judge, centre=0.5, spread=2.0)
    problems = task.problems("validation", 5, 0)
    texts = ["Kiwi.", "No.", "A pear\nQuestion: and", "x" * 200, "A pear"]
    rewards, _ = score_all(task, problems, texts, [True] * 5)
    raw = RewardModel.load(judge, batch_size=1, sizes=(128,))(
        [p.prompt.rstrip("\n") for p in problems], ["Kiwi.", "No.", "A pear", "x" * 200, "A pear"]
    )
    assert np.isnan(raw).tolist() == [False, False, False, True, False]
    expected = np.where(np.isnan(raw), 0.0, 1 / (1 + np.exp(-(raw - 0.5) / 2.0)))
    np.testing.assert_allclose(rewards, expected, atol=1e-5)
    assert task.failures == 1
    np.testing.assert_allclose(task.score(problems[0], "Kiwi.", True), expected[0], atol=1e-5)
    question = next(p for p in problems if "baskets" in p.prompt).metadata["question"]
    assert question.startswith("Name ") and "\n\nThere are " in question


def test_draws(tmp_path, judge):
    """Held-out questions come once; training goes on in passes of other orders; seeds differ."""
    task = make("gsm8k", tmp_path, judge)
    size = len(task._places("train"))
    drawn = prompts(task, "train", 2 * size)
    assert set(drawn[:size]) == set(drawn[size:]) and len(set(drawn)) == size and drawn[:size] != drawn[size:]
    assert prompts(task, "train", 5) == drawn[:5] != prompts(task, "train", 5, seed=1)
    assert [p.index for p in task.problems("train", 3, 0)] == [0, 1, 2]
    with pytest.raises(ValueError, match="11 problems of the split 'test' were asked for, there are 10"):
        task.problems("test", 11, 0)


def test_the_hash_decides_where_the_data_set_has_no_split(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [{"question": f"q{n}", "answer": "1"} for n in range(100)])
    task = get_task("math_text", path=str(path), instruction="")
    for split in SPLITS:
        expected = {f"q{n}\n" for n in range(100) if split_of(f"q{n}") == split}
        assert set(prompts(task, split, len(expected))) == expected


def test_held_out_questions_are_not_trained_on(tmp_path):
    """Nor are their copies in other capitals and white space; a question that comes twice counts once."""
    rows = [{"question": f"How much is it {n}?", "answer": "1"} for n in range(50)]
    copies = [{"question": f" how  much is IT {n}?", "answer": "1"} for n in range(50)]
    write_lines(tmp_path / "train.jsonl", [*rows, *copies])
    write_lines(tmp_path / "test.jsonl", rows[:20])
    task = get_task("math_text", path=str(tmp_path), splits={"test": "test"}, instruction="")
    held_out = set(prompts(task, "test", 20))
    train, validation = (
        {t.lower() for t in prompts(task, s, len(task._places(s)))} for s in ("train", "validation")
    )
    assert not {t.lower() for t in held_out} & train
    assert not train & validation and len(train) == len(task._places("train"))


def test_tensorflow_datasets_as_a_task(tmp_path):
    task = get_task(
        "math_text",
        path=str(prepare_tfds(tmp_path)),
        splits={"test": "test"},
        answer_mark="####",
        instruction="",
    )
    (problem,) = [p for p in task.problems("test", 5, 0) if p.prompt == "102 + 1?\n"]
    assert problem.answer == "103" and task.score(problem, "It is 103.", True) == 1.0


def test_columns_of_your_own(tmp_path):
    rows = [{"q": {"text": f"{n}+1"}, "a": [n, n + 1], "how": "count on"} for n in range(30)]
    path = str(write_lines(tmp_path / "mine.jsonl", rows))
    task = get_task("math_text", path=path, columns={"question": "q.text", "answer": "a.1", "working": "how"})
    problem = task.problems("train", 1, 0)[0]
    assert problem.gold == f"count on\n#### {problem.answer}"


def refused(tmp_path, message, rows=({"question": "q", "answer": "1"},) * 3, **options):
    path = str(write_lines(tmp_path / "mine.jsonl", rows))
    with pytest.raises(ValueError, match=message):
        get_task(**({"name": "math_text", "path": path} | options)).problems("train", 1, 0)


def test_missing_column(tmp_path):
    refused(
        tmp_path,
        r"mine.jsonl, row 0 has no column 'question' .did you mean 'questions'..; it has questions, answer; say which",
        rows=[{"questions": "q", "answer": "1"}],
    )
    refused(tmp_path, r"row 0 has no column 'answer.value'", columns={"answer": "answer.value"})


def test_values_that_make_no_sense(tmp_path):
    refused(tmp_path, r"\(question\) should hold text, got None", rows=[{"question": None, "answer": "1"}])
    refused(tmp_path, r"nothing follows '####' in the answer '1'; set answer_mark", answer_mark="####")
    choice = {"name": "multiple_choice", "columns": {"choices": "c"}}
    row = {"question": "q", "answer": "B", "c": ["x", "y"]}
    refused(tmp_path, r"'c' should list 2 to 26 options, got \['x'\]", rows=[row | {"c": ["x"]}], **choice)
    refused(tmp_path, r"the answer 'Z' is neither a number below 2", rows=[row | {"answer": "Z"}], **choice)
    refused(tmp_path, r"columns must say which column holds 'choices'", name="multiple_choice")


def test_splits_without_rows(tmp_path, judge):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").write_text("")
    refused(tmp_path, "the split 'train' of .*empty is empty", path=str(tmp_path / "empty"))
    refused(tmp_path, "has no split 'dev'; it has train", splits={"train": "dev"})
    refused(tmp_path, "leaves no question for the split 'train'.*now 3", rows=[{"question": "long", "answer": "1"}],
            max_prompt_bytes=3)  # fmt: skip


def test_options_that_do_not_exist(tmp_path):
    refused(
        tmp_path,
        "has no data set 'gsm8'.did you mean 'gsm8k'|no data set 'gsm8' .did you mean",
        dataset="gsm8",
    )
    refused(
        tmp_path,
        "columns names .'prompt'.; expected some of question, answer, working",
        columns={"prompt": "q"},
    )
    refused(tmp_path, "splits names .'dev'.; expected some of train, validation, test", splits={"dev": "dev"})
    refused(tmp_path, "shots must be a whole number >= 0, not -1", shots=-1)
    refused(tmp_path, "no config.json in 'nowhere'", name="instructions", reward_model="nowhere")
    refused(tmp_path, "hf://nobody", name="instructions", reward_model="hf://nobody")
    refused(tmp_path, "spread must be positive", name="instructions", reward_model="nowhere", spread=0)


def test_long_questions_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"question": "q" * n, "answer": "1"} for n in range(1, 41)]
    task = get_task("math_text", path=str(write_lines(tmp_path / "m.jsonl", rows)), max_prompt_bytes=30)
    assert max(len(p.partition("\n")[0]) for p in prompts(task, "train", 30)) <= 30
    assert "10 questions are longer than max_prompt_bytes=30" in caplog.text


def test_problems_are_plain(tmp_path, judge):
    """They are written into files and sent to child processes."""
    for name in ("gsm8k", "mmlu_pro", "dolly"):
        json.dumps([p.metadata for p in make(name, tmp_path / name, judge).problems("train", 3, 0)])
