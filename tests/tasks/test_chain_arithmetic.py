"""Every style against a trace worked out by hand, and what must hold for all chains."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.tasks import SPLITS, get_task, split_of
from distill_jax.tasks.chain_arithmetic import FILLER_WORDS, STYLES, Chain, complete, corpus, style_of

# 6+4 = 10 -> 0;  0*6 = 0;  0-4 = -4 -> 6;  6-5 = 1.      7-9 = -2 -> 8;  8*8 = 64 -> 4;  4+9 = 13 -> 3.
FOUR = Chain.work_out(6, ("+4", "*6", "-4", "-5"))
THREE = Chain.work_out(7, ("-9", "*8", "+9"))
ONE = Chain.work_out(3, ("*7",))

TRACES = [
    (FOUR, "explicit", "6+4=0 0*6=0 0-4=6 6-5=1 #### 1"),
    (FOUR, "cipher", "G~E.A A@G.A A!E.G G!F.B #### 1"),
    (FOUR, "result_first", "0<6+4 0<0*6 6<0-4 1<6-5 #### 1"),
    (FOUR, "terse", "| 0 0 6 1 #### 1"),
    (FOUR, "folded", "> 6+4*6=0 0-4-5=1 #### 1"),
    (FOUR, "folded3", ">> 6+4*6-4=6 6-5=1 #### 1"),
    (FOUR, "direct", "#### 1"),
    (THREE, "explicit", "7-9=8 8*8=4 4+9=3 #### 3"),
    (THREE, "cipher", "H!J.I I@I.E E~J.D #### 3"),
    (THREE, "result_first", "8<7-9 4<8*8 3<4+9 #### 3"),
    (THREE, "terse", "| 8 4 3 #### 3"),
    (THREE, "folded", "> 7-9*8=4 4+9=3 #### 3"),
    (THREE, "folded3", ">> 7-9*8+9=3 #### 3"),
    (THREE, "direct", "#### 3"),
    (ONE, "explicit", "3*7=1 #### 1"),
    (ONE, "folded", "> 3*7=1 #### 1"),
    (ONE, "folded3", ">> 3*7=1 #### 1"),
]

steps = st.one_of(
    st.builds("{}{}".format, st.sampled_from("+-"), st.integers(0, 9)),
    st.builds("*{}".format, st.sampled_from([2, 3, 4, 6, 7, 8, 9])),
)
chains = st.builds(Chain.work_out, st.integers(0, 9), st.lists(steps, min_size=1, max_size=24).map(tuple))
every_style = pytest.mark.parametrize("style", STYLES)


@pytest.mark.parametrize(("chain", "style", "completion"), TRACES)
def test_traces_by_hand(chain, style, completion):
    assert complete(chain, style) == completion
    assert style_of(completion) == style


def test_prompt_and_answer_by_hand():
    assert (FOUR.prompt, FOUR.answer) == ("6+4*6-4-5?\n", "1")
    assert (THREE.prompt, THREE.answer) == ("7-9*8+9?\n", "3")


@given(chains)
def test_value_is_what_python_computes_with_brackets(chain):
    expression = "(" * len(chain.steps) + str(chain.values[0]) + "".join(f"{step})" for step in chain.steps)
    assert int(chain.answer) == eval(expression) % 10


@given(chains)
def test_filler_is_explicit_with_a_word_before_every_step(chain):
    words = complete(chain, "filler").split()
    assert words[1::2] == [*complete(chain, "explicit").split()[:-2], chain.answer]
    assert set(words[:-2:2]) <= set(FILLER_WORDS)


def test_filler_words_differ_and_are_equally_frequent():
    words = [
        word
        for _, completion in corpus(2000, 0, {"filler": 1}, operations=(4, 4))
        for word in completion.split()[:-2:2]
    ]
    assert len(words) == 8000
    for word in FILLER_WORDS:
        assert words.count(word) == pytest.approx(1000, abs=120)  # four standard deviations


@every_style
@given(chains)
def test_every_style_is_recognised_and_ends_with_the_answer(style, chain):
    completion = complete(chain, style)
    assert style_of(completion) == style
    assert completion.endswith(f"#### {chain.answer}")
    assert completion.count("####") == 1


@pytest.mark.parametrize(
    ("completion", "style"),
    [
        ("6+4=9 #### 9", "explicit"),  # wrong, but still that style
        ("6+4=0 G~E.A #### 0", "other"),  # two styles in a trace
        ("6+4=0  0*6=0 #### 0", "other"),  # a double space
        ("6+4*6=0 0-4-5=1 #### 1", "other"),  # folded without its mark
        ("> 6+4*6-4=6 #### 6", "other"),  # three operations are too many for folded
        ("explicit #### 1", "other"),
        ("6+4=0 0*6=0", "explicit"),  # cut off
        ("", "other"),
        (" #### 4", "direct"),
    ],
)
def test_style_of_what_models_write(completion, style):
    assert style_of(completion) == style


@every_style
@given(chains)
def test_score_of_right_and_wrong(style, chain):
    task = get_task("chain_arithmetic", gold_styles={style: 1})
    problem = task._problem(0, chain)
    assert problem.metadata == {"operations": len(chain.steps), "style": style}
    assert task.score(problem, problem.gold, ended=True) == 1.0
    assert task.score(problem, problem.gold, ended=False) == 0.0
    for digit in set("0123456789") - {problem.answer}:
        assert task.score(problem, problem.gold[:-1] + digit, ended=True) == 0.0


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("#### 1", 1.0),
        ("whatever stands here #### 1\n", 1.0),
        ("####1", 1.0),
        ("1", 0.0),
        ("####", 0.0),
        ("#### 11", 0.0),
        ("#### 1.", 0.0),
        ("#### 1 #### 1", 0.0),
        ("##### 1", 0.0),
        ("#### one", 0.0),
        ("#### \uff11", 0.0),  # a full-width digit
    ],
)
def test_score_needs_exactly_one_mark_and_the_digit(completion, score):
    task = get_task("chain_arithmetic")
    assert task.score(task._problem(0, FOUR), completion, ended=True) == score


def test_problems_are_deterministic_and_a_longer_draw_starts_with_the_shorter():
    task = get_task("chain_arithmetic")
    for split in SPLITS:
        problems = task.problems(split, 5000, seed=3)
        assert problems[:50] == get_task("chain_arithmetic").problems(split, 50, seed=3)
        assert [problem.index for problem in problems] == list(range(5000))
        assert problems[:50] != task.problems(split, 50, seed=4)


def test_splits_share_no_prompt_and_held_out_prompts_do_not_repeat():
    task = get_task("chain_arithmetic", operations=(1, 3))
    prompts = {
        split: [problem.prompt for seed in range(3) for problem in task.problems(split, 300, seed)]
        for split in SPLITS
    }
    assert not set(prompts["test"]) & set(prompts["train"])
    assert not set(prompts["validation"]) & set(prompts["train"])
    assert not set(prompts["test"]) & set(prompts["validation"])
    for split in ("validation", "test"):
        assert len(set(prompts[split][:300])) == 300


def test_operations_and_operands():
    problems = get_task("chain_arithmetic", operations=(2, 4)).problems("train", 6000, seed=0)
    steps = [step for problem in problems for step in re.findall(r"[-+*]\d", problem.prompt)]
    lengths = [problem.metadata["operations"] for problem in problems]
    assert {length: lengths.count(length) for length in (2, 3, 4)} == pytest.approx(
        {2: 2000, 3: 2000, 4: 2000}, rel=0.1
    )
    shares = {operator: sum(step[0] == operator for step in steps) / len(steps) for operator in "+-*"}
    assert shares == pytest.approx({"+": 0.4, "-": 0.4, "*": 0.2}, abs=0.02)
    assert {step[1] for step in steps if step[0] == "*"} == set("2346789")
    assert {step[1] for step in steps if step[0] == "+"} == set("0123456789")
    assert {problem.prompt[0] for problem in problems} == set("0123456789")


def test_gold_styles_follow_the_mix_and_the_prompt_alone():
    task = get_task("chain_arithmetic", gold_styles={"explicit": 3, "terse": 0, "folded": 1})
    problems = task.problems("train", 4000, seed=0)
    styles = [style_of(problem.gold) for problem in problems]
    assert styles.count("explicit") / 4000 == pytest.approx(0.75, abs=0.03)
    assert set(styles) == {"explicit", "folded"}
    assert styles == [problem.metadata["style"] for problem in problems]
    default = get_task("chain_arithmetic").problems("test", 1000, seed=0)
    assert sum(problem.metadata["style"] == "explicit" for problem in default) / 1000 == pytest.approx(
        0.6, abs=0.06
    )
    again = {
        problem.prompt: problem.gold
        for problem in get_task("chain_arithmetic").problems("test", 1000, seed=1)
    }
    shared = [problem for problem in default if problem.prompt in again]
    assert all(again[problem.prompt] == problem.gold for problem in shared)


def test_corpus_is_right_mixed_and_from_training():
    mix = {"explicit": 0.3, "filler": 0.2, "folded": 0.5}
    rows = corpus(4000, 7, mix, operations=(1, 4))
    assert rows == corpus(4000, 7, mix, operations=(1, 4))
    assert rows != corpus(4000, 8, mix, operations=(1, 4))
    assert {split_of(prompt) for prompt, _ in rows} == {"train"}
    styles = [style_of(completion) for _, completion in rows]
    assert {style: styles.count(style) / 4000 for style in mix} == pytest.approx(mix, abs=0.03)
    for prompt, completion in rows:
        steps = tuple(re.findall(r"[-+*]\d", prompt))
        chain = Chain.work_out(int(prompt[0]), steps)
        assert (chain.prompt, complete(chain, style_of(completion))) == (prompt, completion)
    held_out = corpus(100, 7, mix, split="validation")
    assert {split_of(prompt) for prompt, _ in held_out} == {"validation"}


def test_corpus_never_holds_a_problem_of_the_held_out_splits():
    trained = {prompt for prompt, _ in corpus(20_000, 0, {"direct": 1}, operations=(1, 2))}
    task = get_task("chain_arithmetic", operations=(1, 2))
    for split in ("validation", "test"):
        assert not trained & {problem.prompt for problem in task.problems(split, 300, seed=0)}


def test_more_problems_than_there_are():
    task = get_task("chain_arithmetic", operations=(1, 1))  # 270 prompts
    everything = [f"{start}{step}?\n" for start in range(10) for step in _all_steps()]
    there_are = sum(split_of(prompt) == "test" for prompt in everything)
    assert {problem.prompt for problem in task.problems("test", there_are, seed=0)} == {
        prompt for prompt in everything if split_of(prompt) == "test"
    }
    with pytest.raises(
        ValueError, match=rf"1 to 1 operations: {there_are + 1} distinct problems of the split 'test'"
    ):
        task.problems("test", there_are + 1, seed=0)
    assert len(task.problems("train", 1000, seed=0)) == 1000  # training may repeat


def _all_steps() -> list[str]:
    return [f"{operator}{digit}" for operator in "+-" for digit in range(10)] + [
        f"*{digit}" for digit in "2346789"
    ]


@pytest.mark.parametrize("operations", [(0, 3), (4, 3), (3,), 3, (1.0, 2), "35", None])
def test_bad_operations(operations):
    with pytest.raises(ValueError, match="operations must be two whole numbers"):
        get_task("chain_arithmetic", operations=operations)
    with pytest.raises(ValueError, match="operations must be two whole numbers"):
        corpus(1, 0, {"explicit": 1}, operations=operations)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"foldd": 1}, "no style 'foldd'.*did you mean 'folded'.*styles: explicit, filler"),
        ({"folded": -1}, "weight of 'folded' must be a number >= 0, not -1"),
        ({"folded": float("nan")}, "weight of 'folded' must be a number >= 0, not nan"),
        ({"folded": 0.0}, "positive weight to at least one"),
        ({}, "positive weight to at least one"),
    ],
)
def test_bad_mixes(mix, message):
    with pytest.raises(ValueError, match=f"gold_styles.*{message}"):
        get_task("chain_arithmetic", gold_styles=mix)
    with pytest.raises(ValueError, match=f"^styles.*{message}"):
        corpus(1, 0, mix)
