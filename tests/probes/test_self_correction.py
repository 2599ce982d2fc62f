"""Self-correction: rates by hand, repairs planted in a model that writes, markers found under their spans."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from distill_jax.probes import self_correction
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.self_correction import Corrections, continue_after, force_wrong_step
from distill_jax.probes.texts import Texts
from tests.probes.bigram_models import EOS, bigram, letter_tokenizer, probabilities, random_table, uniform

CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200)
QUESTIONS = ("a", "b", "ba", "ab")
MARKER = "e"  # the word by which these models announce a revision


def judged(texts: list[str], ended: np.ndarray) -> Texts:
    """A text is right if it holds a revision and then "c"."""
    return Texts(QUESTIONS, texts, ended, correct=[MARKER + "c" in text for text in texts])


def chain(*steps: str) -> np.ndarray:
    """A model that goes on from each step's first letter to its second ("." is the end)."""
    table = uniform()
    for first, second in steps:
        table["abcdef".index(first), EOS if second == "." else "abcdef".index(second)] = 1e4
    return table


REPAIRS, GIVES_UP = chain("de", "ec", "c."), chain("d.")


def run(student: np.ndarray, base: np.ndarray | None) -> Corrections:
    """Every answer is cut after the wrong step "d" and continued."""
    prefixes = ["d"] * 4
    texts = {}
    for name, table in (("forced", student), ("base_forced", base)):
        if table is not None:
            texts[name] = judged(*continue_after(bigram(table), QUESTIONS, prefixes, max_new_tokens=4))
    own = Texts(QUESTIONS, ("ab", "ae", "b", ""), [True] * 4)
    teacher = Texts(QUESTIONS, ("dec", "a", "dec", "b"), [True] * 4)
    base_texts = {} if base is None else {"base_texts": own}
    return Corrections(tuple(prefixes), texts=own, teacher_texts=teacher, **texts, **base_texts)


def test_a_planted_collapse_is_found() -> None:
    collapsed = self_correction.measure(
        bigram(REPAIRS), bigram(GIVES_UP), run(GIVES_UP, REPAIRS), config=CONFIG, markers=MARKER
    )
    assert collapsed.repair_rate["student"].mean == 0.0 and collapsed.repair_rate["base"].mean == 1.0
    assert collapsed.repair_relative.mean == 0.0
    kept = self_correction.measure(
        bigram(REPAIRS), bigram(REPAIRS), run(REPAIRS, REPAIRS), config=CONFIG, markers=MARKER
    )
    assert kept.repair_relative.mean == 1.0 and kept.notes == ()
    # To the student that gives up, the marker is a surprise that it is not to the teacher.
    assert collapsed.marker_bits["student"].mean > 5 > 0.1 > collapsed.marker_bits["teacher"].mean


def test_continuations_are_whole_completions() -> None:
    texts, ended = continue_after(bigram(REPAIRS), QUESTIONS, ["d"] * 4, max_new_tokens=4)
    assert texts == ["dec"] * 4 and ended.all()
    with pytest.raises(ValueError, match="got 4 questions and 1 prefixes"):
        continue_after(bigram(REPAIRS), QUESTIONS, ["d"], max_new_tokens=4)


@pytest.mark.parametrize("merged", [False, True])
def test_markers_by_hand(merged: bool) -> None:
    """The student's own texts hold one marker in 5 tokens. On the teacher's, "e" is a span of its own."""
    teacher, student = random_table(1), random_table(2)
    p, q = probabilities(teacher), probabilities(student)
    other = bigram(student, tokenizer=letter_tokenizer("ab")) if merged else bigram(student)
    result = self_correction.measure(
        bigram(teacher), other, run(REPAIRS, None), config=CONFIG, markers=MARKER
    )
    tokens = 4 if merged else 5  # "ab" is one token of the merged vocabulary
    assert result.marker_rate["student"].mean == pytest.approx(1000 / tokens)
    assert result.marker_bits["teacher"].mean == pytest.approx(-np.log2(p[3, 4]), rel=1e-4)
    assert result.marker_bits["student"].mean == pytest.approx(-np.log2(q[3, 4]), rel=1e-4)
    assert result.repair_relative.mean is None and set(result.repair_rate) == {"student"}


def test_nothing_to_score_is_said() -> None:
    batch = run(GIVES_UP, GIVES_UP)
    plain = dataclasses.replace(batch, teacher_texts=Texts(QUESTIONS, ("a", "b", "", ""), [False] * 4))
    result = self_correction.measure(
        bigram(uniform()), bigram(uniform()), plain, config=CONFIG, markers=MARKER
    )
    assert result.marker_bits["student"].mean is None and result.repair_relative.mean is None
    assert result.repair_rate["student"].mean == 0.0
    assert result.notes == (
        "the teacher's texts hold no revision marker: there is nothing to score them on",
        "the undistilled student repairs nothing either: there is no rate to compare with",
    )


def test_a_wrong_step_is_forced() -> None:
    trace = "6+4=0 0*6=0 0-4=6 #### 6"
    for seed in range(5):
        forced = force_wrong_step(trace, seed)
        assert forced is not None and forced[:4] == "6+4=" and len(forced) == 5 and forced[4] != "0"
    assert force_wrong_step("3 * 14 = 42. 42 + 1 = 43", 0)[:-1] == "3 * 14 = 4"
    assert force_wrong_step("only 1 = 1") is None and force_wrong_step("") is None


def test_the_default_markers() -> None:
    pattern = re.compile(self_correction.MARKERS, re.IGNORECASE)
    assert pattern.findall("Wait, that is off. Let me recheck: actually 4. Hmm") == [
        "Wait", "Let me recheck", "actually", "Hmm",
    ]  # fmt: skip
    assert not pattern.findall("The waiter was awaited; factually, a checkbook.")


def test_refuses_rows_that_do_not_belong_together() -> None:
    batch = run(REPAIRS, None)
    with pytest.raises(ValueError, match="completion 0 of forced does not begin with its forced prefix 'x'"):
        dataclasses.replace(batch, prefixes=("x",) * 4)
    with pytest.raises(ValueError, match=r"forced needs one judged row .* 1 prefixes, got 4 rows, judged"):
        dataclasses.replace(batch, prefixes=("d",))
    with pytest.raises(ValueError, match="base_forced and base_texts go together"):
        dataclasses.replace(batch, base_texts=batch.texts)
    other = Texts(("f",) * 4, batch.forced.completions, [True] * 4, correct=[True] * 4)
    with pytest.raises(ValueError, match="must answer the same questions"):
        dataclasses.replace(batch, base_forced=other, base_texts=batch.texts)
