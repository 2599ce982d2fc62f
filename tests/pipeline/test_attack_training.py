"""Every recipe of the suite trains real (tiny) students: on texts, on distributions, across tokenizers, on rollouts."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import pipeline
from distill_jax.attacks.controls import permute_labels
from distill_jax.attacks.registry import ATTACKS
from distill_jax.attacks.tools import Query
from distill_jax.logprobs import score_completions
from distill_jax.mesh import make_mesh
from distill_jax.pipeline import attack_arms, attack_training
from distill_jax.pipeline.attack_budget import budget
from distill_jax.pipeline.attack_cells import inapplicable
from distill_jax.pipeline.attack_programs import on_policy_program
from distill_jax.pipeline.attack_settings import AttackSuite
from distill_jax.pipeline.attack_tools import Student, encode_rows, unit_gradient
from distill_jax.pipeline.attack_training import train_students
from distill_jax.pipeline.prepare import load_role
from distill_jax.pipeline.settings import read_settings, to_config
from distill_jax.rft.texts import put
from distill_jax.students.targets import make_targets
from distill_jax.students.train import _program
from tests.pipeline.tiny_run import smallest

attack_stage = importlib.import_module("distill_jax.pipeline.attack")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A bench on a run as it is after the stage calibrate."""
    workdir = tmp_path_factory.mktemp("bench") / "run"
    config = smallest({"stages": ("prepare", "calibrate"), "distillation.seeds": 1})
    mesh = make_mesh("data=-1", devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_mesh", lambda spec: mesh)
        pipeline.run(config, workdir)
    with config.unlocked():
        config.attack_suite = to_config(AttackSuite(search_problems=8))
    bench = attack_stage.make_bench(read_settings(config), mesh, workdir)
    return dataclasses.replace(bench, rewriter=lambda texts: list(texts))


@pytest.fixture(scope="module")
def stranger(bench):
    """A student with another tokenizer than the teacher's."""
    role = bench.settings.students["bytes"]
    return Student("bytes", load_role(bench.settings, bench.mesh, bench.workdir, "student_bytes"), role)


@pytest.fixture(scope="module")
def twin(bench):
    """A student with the teacher's tokenizer: the teacher's own weights, moved a little."""
    role = bench.settings.roles["teacher"]
    model = load_role(bench.settings, bench.mesh, bench.workdir, "teacher")
    params = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    return Student("twin", dataclasses.replace(model, params=params), role)


def moved(bench, arm, attack, knob, student):
    """How far the student's weights moved, and the texts it was given."""
    entry = ATTACKS[attack]
    trees, base, counts = train_students(bench, arm, entry, entry.knob(knob), student, [0])
    assert base is None
    leaves = [
        np.abs(np.asarray(new[0]) - np.asarray(old)).max()
        for new, old in zip(jax.tree.leaves(trees), jax.tree.leaves(student.model.params), strict=True)
    ]
    assert np.isfinite(leaves).all()
    return max(leaves), counts[0]


@pytest.mark.parametrize(
    ("attack", "knob"),
    [
        ("A7", "k=16-T=2"),
        ("A7b", "text=0.5-T=2"),
        ("A8", "beta=0.5-lambda=0.5"),
        ("A8b", "lambda=1"),
        ("A10b", "text=0"),
    ],
)
def test_distributions_of_one_tokenizer(bench, twin, attack, knob):
    distance, counts = moved(bench, "distillable", attack, knob, twin)
    assert distance > 0 and counts["kept"] > 0


@pytest.mark.parametrize(
    ("attack", "knob"), [("A8b", "lambda=0.5"), ("A10b", "text=0.5"), ("A4", "b=3-clean=64")]
)
def test_likelihoods_across_tokenizers(bench, stranger, attack, knob):
    distance, counts = moved(bench, "distillable", attack, knob, stranger)
    assert distance > 0 and counts["kept"] > 0


def test_weights_that_are_known_are_changed_before_the_teacher_is_asked(bench, monkeypatch):
    """The dial turns the adapter around; retraining moves it; the released arm stays as it is."""
    asked = []

    def write(settings, arm, problems, **options):
        asked.append(arm)
        return [{"prompt": p.prompt, "completion": "#### 0", "ended": True} for p in problems]

    monkeypatch.setattr(attack_arms, "decode_texts", write)
    for weights in ("released", "dial=-0.25", "retrained=20"):
        bench.teachers.ask("distillable", 7, Query(weights=weights))
    released, turned, retrained = asked
    assert turned.scale == -0.25 * released.scale and turned.adapter is not None
    for before, after in zip(jax.tree.leaves(released.adapter), jax.tree.leaves(turned.adapter), strict=True):
        np.testing.assert_array_equal(before, after)
    distance = max(
        np.abs(np.asarray(new) - np.asarray(old)).max()
        for new, old in zip(
            jax.tree.leaves(retrained.adapter), jax.tree.leaves(released.adapter), strict=True
        )
    )
    assert retrained.scale == released.scale and 0 < distance < np.inf
    bench.teachers.ask("distillable", 7, Query(weights="dial=-0.25"))
    assert len(asked) == 3  # the answer is kept


def test_what_cannot_be_run_says_why(bench, stranger, twin):
    def why(attack, knob, student, arm="distillable"):
        return inapplicable(bench, ATTACKS[attack], ATTACKS[attack].knob(knob), student, arm)

    assert why("A7", "k=16-T=1", stranger) == "teacher and student have different vocabularies"
    assert why("A7", "k=16-T=1", twin) == ""
    assert "no system text" in why("A13", "french", stranger)
    assert why("A12", "dial=-1", stranger, "original") == "no adapter to turn around"
    assert why("A12", "dial=-1", stranger) == ""
    without = dataclasses.replace(bench, rewriter=None)
    assert "no rewriter" in inapplicable(
        without, ATTACKS["A6"], ATTACKS["A6"].knob("all"), stranger, "original"
    )


def test_an_attack_that_finds_nothing_leaves_the_student_as_it_was(bench, stranger):
    """The twin of the base student: no text, no step."""
    entry = dataclasses.replace(ATTACKS["A1"], select=lambda tools, seed: [])
    trees, _, counts = train_students(bench, "original", entry, entry.knob("rate=1"), stranger, [0, 1])
    assert counts == [{"kept": 0, "dropped": 0}] * 2
    for new, old in zip(jax.tree.leaves(trees), jax.tree.leaves(stranger.model.params), strict=True):
        np.testing.assert_array_equal(new, np.stack([old, old]))


def test_one_seed_without_text_does_not_stop_the_other(bench, stranger):
    ordinary = ATTACKS["A1"]
    entry = dataclasses.replace(ordinary, select=lambda tools, seed: [] if seed == 0 else tools.ask(Query()))
    trees, _, counts = train_students(bench, "original", entry, entry.knob("rate=1"), stranger, [0, 1])
    assert counts[0]["kept"] == 0 < counts[1]["kept"]
    first = jax.tree.leaves(trees)[0]
    np.testing.assert_array_equal(first[0], jax.tree.leaves(stranger.model.params)[0])
    assert np.abs(np.asarray(first[1] - first[0])).max() > 0


def test_rows_under_the_prompt_that_was_asked(bench, stranger):
    """A teacher without labels is scored on the prompt that it was given, its students see the other."""
    texts = bench.teachers.ask("original", 0, Query())
    asked = permute_labels(texts, 0)
    seen, _ = encode_rows(bench.settings, stranger, asked)
    given, _ = encode_rows(bench.settings, stranger, asked, as_asked=True)
    np.testing.assert_array_equal(seen.sequences.completion, given.sequences.completion)
    size = seen.sequences.prompt_size
    assert (seen.sequences.tokens[:, :size] != given.sequences.tokens[:, :size]).any(axis=1).mean() > 0.5


def test_the_tools_of_an_attacker(bench, stranger):
    tools = bench.tools("original", stranger, 0)
    gold = tools.gold()
    assert tools.verified(gold).all() and not tools.verified(permute_labels(gold, 0)).all()
    surprise = tools.nats_per_byte(gold)
    assert surprise.shape == (16,) and (surprise > 0).all()
    own = tools.own(gold[3:5], 2, 0)
    assert [text.problem for text in own] == [3, 3, 4, 4] and own == tools.own(gold, 2, 0)[6:10]
    train = {text.prompt for text in gold}
    assert len(tools.holdout(4)) == 4 and tools.gold(1)[0].problem == 16
    assert {text.prompt for text in tools.ask(Query())} == train


def test_gain_is_the_directional_derivative(bench, stranger):
    """Against a finite difference of the weights; and bfloat16 weights, which such a step would not move, agree."""
    tools = bench.tools("original", stranger, 0)
    gold, holdout = tools.gold(), tools.holdout(8)
    gain = tools.gain(gold, holdout)
    model, chunk = stranger.model, bench.settings.distillation.training.logit_chunk
    clean, rows = (
        put(encode_rows(bench.settings, stranger, some)[0].sequences, model) for some in (holdout, gold)
    )
    direction = unit_gradient(model.module, model.params, clean, chunk)

    def mean_logprob(step):
        moved = jax.tree.map(lambda weight, move: weight + step * move, model.params, direction)
        lp = score_completions(model.module, moved, rows, chunk=chunk).lp
        return np.asarray(lp.sum(axis=1) / rows.completion_length)

    np.testing.assert_allclose(gain, (mean_logprob(1e-2) - mean_logprob(-1e-2)) / 2e-2, rtol=0.02, atol=2e-3)
    assert tools.gain(holdout, holdout).mean() > 0
    half = dataclasses.replace(
        model,
        module=dataclasses.replace(model.module, dtype="bfloat16", param_dtype="bfloat16"),
        params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params),
    )
    coarse = bench.tools("original", dataclasses.replace(stranger, model=half), 0).gain(gold, holdout)
    assert np.corrcoef(coarse, gain)[0, 1] > 0.95


def test_cells_that_train_alike_share_one_program(bench, twin):
    """Rates, texts, seeds and teachers are arguments of it."""
    moved(bench, "original", "A1", "rate=1", twin)
    moved(bench, "original", "A8", "beta=1-lambda=1", twin)
    made = _program.cache_info().misses, on_policy_program.cache_info().misses
    moved(bench, "distillable", "A1", "rate=2", twin)
    moved(bench, "distillable", "A8", "beta=1-lambda=0.5", twin)
    assert (_program.cache_info().misses, on_policy_program.cache_info().misses) == made


def test_the_teacher_is_scored_under_its_own_prompts(bench, twin):
    """A student in another style: stored distributions are those of the teacher's own rows, others are refused."""
    chatty = dataclasses.replace(twin, role=dataclasses.replace(twin.role, prompt_style="plain"))
    sizes = dataclasses.replace(bench.settings.distillation, prompt_size=64)  # such prompts are longer
    bench = dataclasses.replace(bench, settings=dataclasses.replace(bench.settings, distillation=sizes))
    texts = bench.teachers.ask("original", 0, Query())
    seen, usable = encode_rows(bench.settings, chatty, texts)
    assert usable.all()
    asked, _ = encode_rows(bench.settings, chatty, texts, as_asked=True)
    ordinary, _ = encode_rows(bench.settings, twin, texts)
    np.testing.assert_array_equal(asked.sequences.tokens, ordinary.sequences.tokens)
    np.testing.assert_array_equal(asked.sequences.completion, seen.sequences.completion)
    scored = []

    def watch(teacher, sequences, *arguments, **options):
        scored.append(sequences)
        return make_targets(teacher, sequences, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attack_training, "make_targets", watch)
        moved(bench, "original", "A7", "k=16-T=1", chatty)
    np.testing.assert_array_equal(scored[0].tokens, asked.sequences.tokens)
    for attack, knob in (("A7b", "text=0.5"), ("A8", "beta=0-lambda=1")):
        why = inapplicable(bench, ATTACKS[attack], ATTACKS[attack].knob(knob), chatty, "original")
        assert "different prompt styles" in why
    assert not inapplicable(bench, ATTACKS["A7"], ATTACKS["A7"].knob("k=16-T=1"), chatty, "original")


def test_budget_counts_what_the_teacher_scores(bench):
    """16 samples, 4 steps of 8 rows at full length: A8 takes half the steps."""
    for knob, queries in (("beta=0-lambda=1", 1 + 2 * 8 / 16), ("beta=0-lambda=0.5", 1 + 8 / 16)):
        spent = budget(bench.settings, ATTACKS["A8"], ATTACKS["A8"].knob(knob))
        assert spent == {"queries": queries, "steps": 0.5}
    assert budget(bench.settings, ATTACKS["A2"], ATTACKS["A2"].knob("n=4")) == {"queries": 4.0, "steps": 1.0}
