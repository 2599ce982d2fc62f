"""Real data sets of reasoning_gym through the task: prompts, splits, extraction, scores and failures."""

from __future__ import annotations

import inspect
import logging
import re

import pytest
from reasoning_gym.factory import DATASETS as RG_DATASETS

from distill_jax.rewards.functions import LimitedFunction
from distill_jax.tasks import SPLITS, get_task, reasoning_gym, reasoning_gym_scorer
from distill_jax.tasks.reasoning_gym import INSTRUCTION, RUNS_ANSWERS, STOP_TEXTS, extract_answer
from distill_jax.tasks.scoring import score_all

# With working; an expression; a multi-line answer; text; JSON; a partial score; none of these.
DATASETS = [
    "gsm_symbolic",
    "chain_sum",
    "binary_matrix",
    "spell_backward",
    "group_anagrams",
    "word_sorting",
    "syllogism",
]


def of(dataset, **options):
    return get_task("reasoning_gym", dataset=dataset, allow_evaluation=dataset in RUNS_ANSWERS, **options)


def test_scorers_that_run_what_a_model_wrote_are_refused():
    """The list is what the installed package does, so that a new version cannot bring one in unseen."""
    code = re.compile(r"(?<!literal_)\b(eval|exec|parse_expr|sympify)\(")
    runs = {
        name for name, (cls, _) in RG_DATASETS.items() if code.search(inspect.getsource(cls.score_answer))
    }
    assert runs - {"number_sorting"} == RUNS_ANSWERS  # that one evaluates the data set's own answer
    for dataset in RUNS_ANSWERS:
        with pytest.raises(ValueError, match=f"{dataset}' runs the answer that a model wrote as Python code"):
            get_task("reasoning_gym", dataset=dataset)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("shots", [0, 2])
def test_gold_scores_one_and_nothing_scores_zero(dataset, shots):
    task = of(dataset, shots=shots)
    for problem in task.problems("test", 8, seed=0):
        assert problem.gold.endswith(f"#### {problem.answer}")
        assert task.score(problem, problem.gold, ended=False) == 1.0
        assert (
            task.score(problem, f"{problem.gold}\n\nQuestion: another\nAnswer:\n#### 0", ended=False) == 1.0
        )
        assert task.score(problem, "", ended=True) == 0.0
        assert task.score(problem, "I do not know", ended=True) == 0.0
    assert task.failures == 0


@pytest.mark.parametrize("dataset", ["gsm_symbolic", "chain_sum"])
def test_splits_are_disjoint_deterministic_and_free_of_repeats(dataset):
    task, again = (get_task("reasoning_gym", dataset=dataset) for _ in range(2))
    draws = {(split, seed): task.problems(split, 40, seed) for split in SPLITS for seed in range(2)}
    for (split, seed), problems in draws.items():
        assert problems[:10] == again.problems(split, 10, seed)
        assert [problem.index for problem in problems] == list(range(40))
        if split != "train":
            assert len({problem.prompt for problem in problems}) == 40
    prompts = {split: {p.prompt for seed in range(2) for p in draws[split, seed]} for split in SPLITS}
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not prompts[one] & prompts[other]
    assert draws["test", 0] != draws["test", 1]


def test_a_small_data_set_does_not_leak_and_runs_dry_with_an_error():
    # One-digit sums of two terms: 200 questions.
    task = get_task("reasoning_gym", dataset="chain_sum", max_terms=2, max_digits=1)
    prompts = {
        split: {p.prompt for p in task.problems(split, 30, seed=0)} for split in ("validation", "test")
    }
    assert not prompts["validation"] & prompts["test"]
    assert not prompts["test"] & {p.prompt for p in task.problems("train", 500, seed=0)}
    with pytest.raises(ValueError, match="data set 'chain_sum': 150 distinct problems of the split 'test'"):
        task.problems("test", 150, seed=0)


def test_splits_do_not_depend_on_the_presentation():
    plain = get_task("reasoning_gym", dataset="chain_sum")
    shown = get_task("reasoning_gym", dataset="chain_sum", shots=2, instruction="Answer.")
    for one, other in zip(plain.problems("test", 5, 0), shown.problems("test", 5, 0), strict=True):
        assert one.metadata == other.metadata


def test_prompt_without_examples():
    problem = get_task("reasoning_gym", dataset="chain_sum").problems("train", 1, seed=0)[0]
    expression = problem.metadata["entry"]["metadata"]["expression"]
    question = f"State the final answer to the following arithmetic problem: {expression} ="
    assert problem.prompt == f"{question}\n{INSTRUCTION}\n"
    assert problem.gold == f"{expression} = {problem.answer}\n#### {problem.answer}"
    assert int(problem.answer) == eval(expression)


def test_prompt_with_examples():
    task = get_task("reasoning_gym", dataset="chain_sum", shots=2, max_terms=2)
    train = task.problems("train", 300, seed=0)
    instruction, first, second, question = train[0].prompt.split("\n\n")
    assert instruction == INSTRUCTION
    entry = train[0].metadata["entry"]
    assert question == f"Question: {entry['question']}\nAnswer:\n"
    for example in (first, second):
        asked, gold = example.removeprefix("Question: ").split("\nAnswer:\n")
        expression = asked.split(": ")[1].removesuffix(" =")
        assert gold == f"{expression} = {eval(expression)}\n#### {eval(expression)}"
        # Its answer stands in every prompt, so it may be neither drawn for training nor tested on.
        assert asked not in {problem.metadata["entry"]["question"] for problem in train}
        assert asked not in {
            problem.metadata["entry"]["question"] for problem in task.problems("test", 100, seed=0)
        }
    assert first != second


def test_working_is_kept_and_holds_no_blank_line():
    problems = get_task("reasoning_gym", dataset="gsm_symbolic").problems("train", 200, seed=0)
    assert all(problem.gold.count("####") == 1 for problem in problems)
    assert all("\n\n" not in problem.gold for problem in problems)
    assert sum(problem.gold.count("\n") for problem in problems) > 300  # several lines each


@pytest.mark.parametrize(
    ("completion", "reference", "answer"),
    [
        # every mark, and which one wins
        ("4 + 3 = 7 #### 7", "7", "7"),
        ("#### 3 and then #### 7", "7", "7"),
        ("<answer>1</answer> no, <answer> 7 </answer>", "7", "7"),
        ("#### 3 <answer>7</answer>", "7", "7"),
        ("The answer is 3. #### 7", "7", "7"),
        ("the final Answer is: 7", "7", "7"),
        ("Answer: 7.", "7", "7"),
        ("Answer: 3. No, the answer is 7", "7", "7"),
        ("so 4 plus 3 makes 7 in all", "7", "7"),
        ("3 + 4 = 7 ####", "7", "7"),  # nothing after the mark
        ("no idea", "7", None),
        ("", "7", None),
        ("a cat or 2 dogs", "cat", None),  # a last number is an answer to a question for a number only
        # numbers
        ("#### $1,250 a week", "1250", "1250"),
        ("#### -12", "-12", "-12"),
        ("it is 9-12", "12", "12"),  # a difference, not a negative number
        ("#### 0.5", "0.5", "0.5"),
        ("#### .5", "0.5", ".5"),
        ("12 - 5 = 7.", "7", "7"),
        ("#### 7 8 9", "7", "7"),  # no credit for a list of guesses
        ("#### 12a", "12", "12a"),
        ("#### 1/2", "1", "1/2"),
        # texts
        ("The answer is a cat.", "a cat", "a cat"),
        ("The answer is a cat.", "A cat.", "a cat."),
        ("#### cat\nand so on", "cat", "cat"),
        ("####\n\tcat  ", "cat", "cat"),
        ("#### 1 2\n3 4\n", "1 2\n3 4", "1 2\n3 4"),
        ('#### {"a": 1,\n"b": 2}', None, '{"a": 1,\n"b": 2}'),
        # where a base model goes on
        ("#### 7\n\nQuestion: what?\nAnswer: 8", "7", "7"),
        ("#### 7\nQuestion: what?\n#### 8", "7", "7"),
        ("\n\n#### 7", "7", "7"),
        ("7\n\n8", "7", "7"),
    ],
)
def test_extraction(completion, reference, answer):
    assert extract_answer(completion, reference) == answer


def test_thinking_is_no_answer():
    assert extract_answer("<think>12 apples?\n\nNo.</think>\n\n#### 16", "16", stop_texts=()) == "16"
    assert extract_answer("<think>12 apples? #### 12", "16") is None


def test_stop_texts_are_an_option():
    assert STOP_TEXTS == ("\n\n", "\nQuestion:")
    completion = "First paragraph 3.\n\nSecond paragraph.\n#### 7"
    assert extract_answer(completion, "7") == "3"
    assert extract_answer(completion, "7", stop_texts=()) == "7"
    task = get_task("reasoning_gym", dataset="chain_sum", stop_texts=("STOP",))
    problem = task.problems("test", 1, seed=0)[0]
    assert task.score(problem, f"well\n\n#### {problem.answer} STOP #### 0", ended=False) == 1.0


def test_require_end():
    task = get_task("reasoning_gym", dataset="chain_sum", require_end=True)
    problem = task.problems("test", 1, seed=0)[0]
    assert task.score(problem, problem.gold, ended=True) == 1.0
    assert task.score(problem, problem.gold, ended=False) == 0.0


def test_partial_scores_are_kept():
    task = get_task("reasoning_gym", dataset="gsm_symbolic")
    problem = task.problems("test", 1, seed=0)[0]
    wrong = task.score(problem, f"#### {float(problem.answer) + 1}", ended=True)
    assert 0 < wrong < 1  # the data set pays a little for a number


@pytest.fixture
def odd_task(monkeypatch):
    """A task whose scorer is `odd_scorer`, with half a second for each answer."""
    scorers = LimitedFunction(
        "tests.tasks.odd_scorer:score", reasoning_gym_scorer.PARAMETERS, seconds=0.5, workers=1
    )
    monkeypatch.setattr(reasoning_gym, "_scorers", lambda seconds, workers: scorers)
    yield get_task("reasoning_gym", dataset="chain_sum")
    scorers.close()


def test_a_failing_scorer_counts_and_does_not_stop(odd_task, caplog):
    """It raises, hangs, gives no number; one sample each."""
    problem = odd_task.problems("test", 1, seed=0)[0]
    answers = [f"#### {number}" for number in (1, 2, 3, 4, 5, 6, 13, 1)]
    with caplog.at_level(logging.WARNING):
        scores, raised = score_all(odd_task, [problem] * 8, answers, [True] * 8)
    assert scores == [0.0] * 6 + [0.25, 0.0] and raised == 0
    assert odd_task.failures == 7
    assert len(caplog.records) == 1 and "chain_sum" in caplog.text


def test_scores_stay_between_zero_and_one(odd_task):
    problem = odd_task.problems("test", 1, seed=0)[0]
    answers = [f"#### {number}" for number in (11, 12, 13, 14)]
    assert odd_task.score_batch([problem] * 4, answers, [True] * 4) == [1.0, 0.0, 0.25, 1.0]
    assert odd_task.failures == 0


def test_entries_that_their_own_scorer_rejects_are_left_out(monkeypatch):
    task = get_task("reasoning_gym", dataset="chain_sum")
    monkeypatch.setattr(task._scorer, "score_answer", lambda answer, entry: 0.99)
    with pytest.raises(ValueError, match=r"problems of the split 'train'.*in all could not be used"):
        task.problems("train", 1, seed=0)


def test_a_data_set_without_reference_answers():
    task = get_task("reasoning_gym", dataset="graph_color", min_num_vertices=3, max_num_vertices=4)
    problem = task.problems("test", 1, seed=0)[0]
    assert (problem.answer, problem.gold) == ("", "")
    colouring = problem.metadata["entry"]["metadata"]["possible_answer"]
    text = ", ".join(f'"{vertex}": {colour}' for vertex, colour in colouring.items())
    assert task.score(problem, f"#### {{{text}}}", ended=True) == 1.0
    with pytest.raises(
        ValueError, match="'graph_color' has no reference answers to make examples of; use shots=0"
    ):
        get_task("reasoning_gym", dataset="graph_color", shots=2)


def test_dataset_options_reach_the_data_set():
    task = get_task("reasoning_gym", dataset="chain_sum", min_terms=4, max_terms=4, max_digits=1)
    for problem in task.problems("train", 20, seed=0):
        assert problem.metadata["entry"]["metadata"]["num_terms"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "gsm_symbolik"}, "no data set 'gsm_symbolik'.*did you mean 'gsm_symbolic'.*chain_sum"),
        (
            {"dataset": "chain_sum", "max_term": 3},
            "no option 'max_term'.*shots.*'chain_sum': min_terms, max_terms",
        ),
        ({"dataset": "chain_sum", "max_terms": 0}, "'chain_sum' rejects its configuration"),
        ({"dataset": "chain_sum", "seed": 3}, "seed: given to `problems`"),
        ({"dataset": "chain_sum", "shots": -1}, "shots must be a whole number >= 0"),
        ({"dataset": "chain_sum", "stop_texts": "\n\n"}, "stop_texts must be a sequence"),
        ({"dataset": "chain_sum", "stop_texts": ("",)}, "stop_texts must be a sequence"),
        ({"dataset": "composite"}, "'composite' rejects its configuration"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("reasoning_gym", **options)
