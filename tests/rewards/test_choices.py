"""Answers to multiple-choice questions as models write them; each case was written by hand."""

from __future__ import annotations

import time

import pytest

from distill_jax.rewards.choices import extract_choice

OPTIONS = ("London", "Paris", "a new town", "New York", "New York City")

CASES = [
    ("B", 1),
    ("b", 1),
    ("(B)", 1),
    ("B.", 1),
    ("B. Paris", 1),
    ("B) Paris", 1),
    ("**B**", 1),
    ("Paris", 1),
    ("paris.", 1),
    ("Answer: B", 1),
    ("**Answer:** (B) Paris", 1),
    ("**Answer: B**", 1),
    ("The answer is B.", 1),
    ("The correct answer is (b).", 1),
    ("The answer is Paris.", 1),
    ("The answer is **B. Paris**, since it is the capital.", 1),
    ("The correct option is B because it is the capital of France.", 1),
    ("The best choice would be option B.", 1),
    ("Final answer: $\\boxed{B}$", 1),
    ("\\boxed{\\text{(B)}}", 1),
    ("\\boxed{B. \\text{Paris}}", 1),
    ("It lies on the Seine.\n#### B", 1),
    ("<answer>B</answer>", 1),
    ("<think>A? The answer is A.</think>\nB", 1),
    ("Answer: A. Wait, that is in England. Answer: B", 1),
    ("London is in England, so (B) is the correct answer.", 1),
    ("Let us think step by step.\nThe capital of France is on the Seine.\n\nB", 1),
    ("B\n\nParis has been the capital since 987.", 1),
    ("The answer is: New York City", 4),
    ("The answer is New York.", 3),
    ("答案是 B", 1),
    ("\u7b54\u6848\uff1aB", 1),
    ("The answer is A because it is large.", 0),
    ("Answer: a new town", 2),
    ("Answer: A new town is meant here.", 2),
    ("My answer is that nobody can know.", None),
    ("The answer is A or B.", None),
    ("The answer is both A and B.", None),
    ("Answer: A; B; C; D", None),
    ("#### B | C", None),
    ("A good question! I would have to look it up.", None),
    ("Answer: G", None),
    ("I am not sure.", None),
    # What is said of another option after the answer, or before it, chooses nothing.
    ("The answer is B. Option A is incorrect.", 1),
    ("Answer: B\n\nOption A is wrong. Option D: also wrong.", 1),
    ("Therefore, the correct option is B.\n\nOption D is not right because it is in America.", 1),
    ("Option B is correct, option A is wrong.", 1),
    ("Option A (London) is wrong. I would take option B.", 1),
    ("Option A: in England.\nOption B: in France.\nOption D: in America.\nB is correct.", 1),
    ("#### A. London\nIn England.\n#### D. New York\nIn America.\nThe answer is B.", 1),
    ("Option A is wrong.", None),
    ("<think>The answer is A", None),
    ("<think>A?", None),
    ("\\boxed{\\text{Paris}}", 1),
    ("The answer is \\(B\\).", 1),
    ("Answer - B", 1),
    ("I think it's B.", 1),
    ("Therefore, B.", 1),
    ("B is the answer", 1),
    ("Neither A nor D is correct. The correct one is B.", 1),
    ("\u7b54\u6848\uff1a\uff08B\uff09", 1),
    ("Answer\uff1aB", 1),
    ("Answer: *B*", 1),
    ("The answer is probably B.", 1),
    ("The answer is most likely (B).", 1),
    ("B. Paris\n\nOption A is for England.", 1),
    ("B\n\nLondon lies in England. Option D refers to America.", 1),
    ("B. Paris\n\nA is accurate about England only.", 1),
    ("The answer is B.\n\nThe wrong answer A is a city too.", 1),
    ("A. London\nB. Paris\nI would choose option B.", 1),
    ("I'd go with B.", 1),
    ("The answer is not A.", None),
    ("I don't think A is correct. Paris it is. So it must be B.", 1),
    ("If A is correct, then 2 = 3, a contradiction. So it must be B.", 1),
    ("It is unlikely that A is right.\nB", 1),
    ("", None),
]


@pytest.mark.parametrize(("completion", "expected"), CASES)
def test_extract_choice(completion, expected):
    assert extract_choice(completion, OPTIONS) == expected


def test_text_behind_a_stop_text_is_not_read():
    assert extract_choice("B\n\nQuestion: next?\nAnswer: C", OPTIONS, ("\nQuestion:",)) == 1


@pytest.mark.parametrize("unit", ["\n", " ", "answer ", "Option B ", "####", "\\boxed{", "(A ", "A is ", "*"])
def test_texts_of_a_model_that_has_lost_its_way_are_read_in_no_time(unit):
    """Regular expressions that go back over what they read would take minutes, and a thread cannot stop them."""
    text = "Option B" + unit * (24_000 // len(unit)) + "x"
    started = time.process_time()
    extract_choice(text, OPTIONS)
    assert time.process_time() - started < 5.0


def test_numbers_as_options():
    """A number that is an option's text is not confused with a longer one."""
    assert extract_choice("The answer is 12.", ["1", "12", "-12", "1.2"]) == 1
    assert extract_choice("The answer is -12.", ["1", "12", "-12", "1.2"]) == 2
