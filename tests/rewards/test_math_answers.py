"""Mathematical answers in the forms that models write; a comparison that never ends costs one sample."""

from __future__ import annotations

import pytest

from distill_jax.rewards.math_answers import MathVerifier, final_answer

CASES = [
    ("72", "48 + 24 = 72, so she sold 72 clips.\n#### 72", 1.0),
    ("72", "The answer is 72.", 1.0),
    ("72", "So in all \\boxed{72}", 1.0),
    ("72", "72 is less than 73, so the answer is 73.", 0.0),
    ("72", "#### 7", 0.0),
    ("1250", "#### $1,250", 1.0),
    ("1/2", "the answer is $\\frac{1}{2}$", 1.0),
    ("\\frac{1}{2}", "x = 0.5", 1.0),
    ("\\frac{1}{2}", "\\boxed{50\\%}", 1.0),
    ("\\sqrt{2}", "\\boxed{\\sqrt2}", 1.0),
    ("x^2+2x+1", "\\boxed{(x+1)^2}", 1.0),
    ("(1, 2)", "\\boxed{(1,2)}", 1.0),
    ("-3", "#### -3", 1.0),
    ("-3", "#### 3", 0.0),
    ("5", "", 0.0),
    ("5", "I do not know.", 0.0),
    # The form that the prompt asks for, with answers that are more than a number.
    ("(3,4)", "#### (3, 4)", 1.0),
    ("x^2+1", "#### 1 + x^2", 1.0),
    ("2\\sqrt{3}", "#### 2 \\sqrt{3}", 1.0),
    ("3x+2", "#### 2+3x", 1.0),
    ("\\{1,2\\}", "#### {2, 1}", 1.0),
    ("y=2x+1", "#### y = 2x + 1", 1.0),
    ("12\\pi", "#### 12\u03c0", 1.0),
    ("\\frac{3}{4}", "#### \\frac{3}{4}", 1.0),
    ("72", "#### 72 cm", 1.0),
    ("72", "#### 72 clips", 1.0),
    # One number is not told by a formula or a list in which it stands.
    ("2", "#### (1, 2)", 0.0),
    ("1", "#### x^2 + 1", 0.0),
    ("5", "#### 5x", 0.0),
    ("5", "#### 3 or 5", 0.0),
    ("5", "#### 1, 2, 3, 4, 5", 0.0),
    # Headings, currencies, thinking.
    ("72", "#### Final Answer\n\n72", 1.0),
    ("72", "#### Step 3: Add\n48 + 24 = 72\n\n\\boxed{72}", 1.0),
    ("18", "The total is \\$18.", 1.0),
    ("5", "<think>\nmaybe \\boxed{4}</think>\n\\boxed{5}", 1.0),
    ("5", "<think>maybe #### 5", 0.0),
    # The number of the line is the answer, not one in the words behind it.
    ("18", "#### 18 dollars per week for 4 weeks", 1.0),
    ("4", "#### 18 dollars per week for 4 weeks", 0.0),
    ("18", "#### 18 (since 9 + 9)", 1.0),
    ("9", "#### 18 (since 9 + 9)", 0.0),
    ("18", "#### 18 m^2", 1.0),
    ("18", "#### $18 km/h", 1.0),
    ("3", "#### 3 or 5", 0.0),
    ("5", "#### 5 x", 0.0),
    ("0.5", "#### 1/2 of the cake", 1.0),
    # Who corrects himself is judged by his last box, who boxes the parts of one answer by all.
    ("5", "\\boxed{3}. Wait, that is wrong.\n\\boxed{5}", 1.0),
    ("3", "\\boxed{3}. Wait, that is wrong.\n\\boxed{5}", 0.0),
    ("1, 2", "\\boxed{1}, \\boxed{2}", 1.0),
    # As one writes without LaTeX.
    ("\\sqrt{2}", "#### \u221a2", 1.0),
    ("2\\sqrt{3}", "#### 2 sqrt(3)", 1.0),
    ("12\\pi", "#### 12 pi", 1.0),
    ("3/2", "#### 1 1/2", 1.0),
]


def test_answers_in_many_forms():
    answers, completions, expected = zip(*CASES, strict=True)
    verifier = MathVerifier(seconds=30)
    assert list(zip(completions, verifier(answers, completions), strict=True)) == list(
        zip(completions, expected, strict=True)
    )
    assert verifier.failures == 0


def test_what_cannot_be_judged_counts_as_wrong_and_is_counted():
    verifier = MathVerifier(seconds=1.0, workers=1)
    hopeless = "\\boxed{9^{9^{9^{9}}}!}"  # a number that no memory holds
    assert verifier(["3", "", "3"], [hopeless, "\\boxed{4}", "\\boxed{3}"]) == [0.0, 0.0, 1.0]
    assert verifier.failures == 2


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("a\n#### 4\nmore", "4"),
        ("#### 3 no, #### 4", "4"),
        ("two lines\n3", "two lines\n3"),
        ("so 4\n####", "so 4\n"),
        ("\n\nit is 4\n\nQuestion: 5", "it is 4"),
    ],
)
def test_final_answer(completion, expected):
    assert final_answer(completion, ("\n\n", "\nQuestion:")) == expected
