"""What must not matter: the order of rows, how much padding there is, how rows are batched, and the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax.probes import (
    decoding,
    gap,
    off_policy,
    overconfidence,
    self_correction,
    subjects,
    tail_noise,
)
from distill_jax.probes.pairs import ProbeConfig
from distill_jax.probes.results import to_json
from distill_jax.probes.self_correction import Corrections
from distill_jax.probes.subjects import Subject
from distill_jax.probes.texts import TextPair, Texts
from tests.probes.bigram_models import bigram, letter_tokenizer, random_table

CONFIG = ProbeConfig(batch_size=8, chunk=8, resamples=100)
STUDENT_TEXTS = Texts(
    questions=("a", "a", "b", "b", "ca", "ca"),
    completions=("abc", "", "fedabab", "cd", "bebeb", "a"),
    ended=np.array([True, True, False, True, False, True]),
    correct=np.array([True, False, False, True, True, False]),
    answers=("1", None, "2", "2", None, "3"),
    answer_starts=np.array([1, -1, 3, 0, 2, 0]),
)
TEACHER_TEXTS = Texts(("a", "b", "ca"), ("abe", "cab", "e"), np.array([True, False, True]))


def reordered(texts: Texts, order: np.ndarray) -> Texts:
    columns = {}
    for field in dataclasses.fields(Texts):
        column = getattr(texts, field.name)
        columns[field.name] = None if column is None else [column[i] for i in order]
    return Texts(**columns)


def measure_all(teacher: Subject, student: Subject, shuffle: bool, config: ProbeConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    order_s, order_t = rng.permutation(6), rng.permutation(3)
    own = reordered(STUDENT_TEXTS, order_s) if shuffle else STUDENT_TEXTS
    of_teacher = reordered(TEACHER_TEXTS, order_t) if shuffle else TEACHER_TEXTS
    pair = TextPair(of_teacher, own)
    prefixes = tuple(text[:1] for text in own.completions)
    corrections = Corrections(prefixes, own, own, of_teacher, own, own)
    options: dict[str, Any] = {"config": config}
    results = (
        tail_noise.measure(teacher, student, own, frequent=2, **options),
        off_policy.measure(teacher, student, pair, **options),
        gap.measure(teacher, student, pair, **options),
        overconfidence.measure(teacher, student, own, base=student, base_batch=own, **options),
        self_correction.measure(teacher, student, corrections, markers="e", **options),
        decoding.measure(teacher, student, pair, limit=5, **options),
    )
    return {result["probe"]: result for result in map(to_json, results)}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys() and len(got) == 6
    for probe, result in got.items():
        assert result["facts"] == expected[probe]["facts"] and result["notes"] == expected[probe]["notes"]
        assert result["metrics"].keys() == expected[probe]["metrics"].keys()
        for metric, value in result["metrics"].items():
            other = expected[probe]["metrics"][metric]
            numbers, others = ([x["mean"], *x["ci95"]] for x in (value, other))
            assert value["n"] == other["n"] and [x is None for x in numbers] == [x is None for x in others]
            pairs = [(a, b) for a, b in zip(numbers, others, strict=True) if a is not None]
            for a, b in pairs:
                assert a == pytest.approx(b, rel=1e-4, abs=1e-5), (probe, metric)


def models(merged: bool) -> Callable[[Mesh | None], tuple[Subject, Subject]]:
    tokenizer = letter_tokenizer("ab") if merged else letter_tokenizer()
    return lambda mesh: (bigram(random_table(1), mesh), bigram(random_table(2), mesh, tokenizer))


@pytest.mark.parametrize("merged", [False, True])
def test_order_padding_and_batches(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows shuffled, 24 slots where there were 16, four rows at a time and five positions of them."""
    teacher, student = models(merged)(None)
    expected = measure_all(teacher, student, False, CONFIG)
    monkeypatch.setattr(subjects, "_SIZE_STEP", 24)
    config = dataclasses.replace(CONFIG, batch_size=4, chunk=5)
    assert_same(measure_all(teacher, student, True, config), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_sharding(merged: bool, mesh_cube: Mesh, mesh_single: Mesh) -> None:
    single, cube = (measure_all(*models(merged)(mesh), False, CONFIG) for mesh in (mesh_single, mesh_cube))
    assert_same(cube, single)
