"""Two models on one text: distributions and likelihoods against numbers from written-down tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from distill_jax.models.decoder import Decoder, abstract_params
from distill_jax.models.model import Model
from distill_jax.models.spec import ModelSpec
from distill_jax.probes.distributions import Side, compare_distributions, kl_terms, positions
from distill_jax.probes.off_policy import both_directions
from distill_jax.probes.pairs import ProbeConfig, likelihoods
from distill_jax.probes.subjects import END, OTHER, Subject, byte_classes
from distill_jax.probes.tail_noise import TailTerms, ranks_of
from distill_jax.probes.texts import Texts
from distill_jax.sequences import Sequences
from tests.probes.bigram_models import EOS, V, bigram, letter_tokenizer, probabilities, random_table

TEACHER, STUDENT = random_table(1), random_table(2)
CONFIG = ProbeConfig(batch_size=4, chunk=4, resamples=200)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def test_one_vocabulary_is_compared_token_by_token() -> None:
    texts = Texts(("fa", "b"), ("bc", ""), [True, True])
    found = positions(bigram(TEACHER), bigram(STUDENT), texts, both_directions, CONFIG)
    p, q = probabilities(TEACHER), probabilities(STUDENT)
    before = [0, 1, 2, 1]  # "a", "b", "c" of row 0, and the "b" that row 1 asks about
    assert found.row.tolist() == [0, 0, 0, 1] and found.unit == "token" and found.outcomes == V
    assert found.target.tolist() == [1, 2, EOS, EOS]
    assert found.place.tolist() == [0.0, 0.5, 1.0, 0.0]
    np.testing.assert_allclose(found.values["forward"], [kl(p[i], q[i]) for i in before], rtol=1e-4)
    np.testing.assert_allclose(found.values["reverse"], [kl(q[i], p[i]) for i in before], rtol=1e-4)
    spans = likelihoods(bigram(TEACHER), bigram(STUDENT), texts, CONFIG)
    steps = [(0, 1), (1, 2), (2, EOS), (1, EOS)]
    np.testing.assert_allclose(spans.lp_t, [np.log(p[step]) for step in steps], rtol=1e-4)
    np.testing.assert_allclose(spans.lp_s, [np.log(q[step]) for step in steps], rtol=1e-4)
    assert spans.begin.tolist() == [0, 1, 2, 0] and spans.end.tolist() == [1, 2, 3, 1]


def test_two_vocabularies_are_compared_on_bytes_and_spans() -> None:
    """Student ids: letters 0..5, "ab" 6, end 7. "abc" is ab|c|end for it, and a|b|c|end for the teacher."""
    student = bigram(STUDENT, tokenizer=letter_tokenizer("ab"))
    texts = Texts(("f",), ("abc",), [True])
    found = positions(bigram(TEACHER), student, texts, both_directions, CONFIG)
    p, q = probabilities(TEACHER), probabilities(STUDENT)
    assert found.unit == "byte" and found.target.tolist() == [ord("a"), ord("c"), END]
    expected = []
    for row_p, row_q in ((p[5], q[5]), (p[1], q[6]), (p[2], q[2])):  # before "ab", before "c", before the end
        next_p = [*row_p[:6], row_p[EOS], row_p[7]]
        next_q = [row_q[0] + row_q[6], *row_q[1:6], row_q[7], 1e-30]  # no id of the student's is no text
        expected.append(kl(np.array(next_p), np.array(next_q)))
    np.testing.assert_allclose(found.values["forward"], expected, rtol=1e-4)
    spans = likelihoods(bigram(TEACHER), student, texts, CONFIG)
    np.testing.assert_allclose(spans.lp_t, np.log([p[5, 0] * p[0, 1], p[1, 2], p[2, EOS]]), rtol=1e-4)
    np.testing.assert_allclose(spans.lp_s, np.log([q[5, 6], q[6, 2], q[2, 7]]), rtol=1e-4)
    assert spans.begin.tolist() == [0, 2, 3] and spans.end.tolist() == [2, 3, 4]


def test_next_bytes_say_no_more_than_next_tokens() -> None:
    """Data processing: the KL of byte classes is at most that of tokens, for the same two rows."""
    tokens = positions(
        bigram(TEACHER), bigram(STUDENT), Texts(("a",), ("",), [True]), both_directions, CONFIG
    )
    merged = {"tokenizer": letter_tokenizer("ab")}
    classes = byte_classes(bigram(TEACHER, **merged))
    mass = [np.bincount(classes, probabilities(table)[0], minlength=258) for table in (TEACHER, STUDENT)]
    kept = mass[0] > 0
    assert 0 < kl(mass[0][kept], mass[1][kept]) < tokens.values["forward"][0]


def test_byte_classes() -> None:
    assert byte_classes(bigram(TEACHER)).tolist() == [*b"abcdef", END, OTHER]
    assert byte_classes(bigram(TEACHER, tokenizer=letter_tokenizer("ab"))).tolist() == [*b"abcdefa", END]


def test_sampled_ids_are_scored_as_they_were_sampled() -> None:
    tokenizer = letter_tokenizer("ab")
    subject, other = bigram(TEACHER, tokenizer=tokenizer), bigram(STUDENT, tokenizer=tokenizer)
    p = probabilities(TEACHER)
    text = Texts(("f",), ("ab",), [True])
    np.testing.assert_allclose(
        likelihoods(subject, other, text, CONFIG).lp_t, np.log([p[5, 6], p[6, 7]]), rtol=1e-4
    )
    ids = type(tokenizer.encode("a"))([0, 1, 7], tokenizer.vocabulary_hash)
    sampled = Texts(("f",), ("ab",), [True], ids=(ids,))
    lp_t = likelihoods(subject, other, sampled, CONFIG).lp_t
    np.testing.assert_allclose(lp_t, np.log([p[5, 0], p[0, 1], p[1, 7]]), rtol=1e-4)
    # A model of another vocabulary encodes the text, and the spans meet on its bytes.
    spans = likelihoods(subject, bigram(STUDENT), sampled, CONFIG)
    np.testing.assert_allclose(spans.lp_t, np.log([p[5, 0], p[0, 1], p[1, 7]]), rtol=1e-4)


def test_embeddings_of_two_sizes_share_their_common_ids() -> None:
    """Spare rows of one embedding are left out of both, and what remains is renormalised."""
    wide = random_table(3, 12)
    found = positions(bigram(wide), bigram(STUDENT), Texts(("a",), ("",), [True]), both_directions, CONFIG)
    expected = kl(probabilities(wide[:, :8])[0], probabilities(STUDENT)[0])
    assert found.outcomes == 8
    np.testing.assert_allclose(found.values["forward"], [expected], rtol=1e-4)


def test_the_dial_of_an_adapter_reaches_the_comparison() -> None:
    teacher = bigram(TEACHER)
    a = jnp.ones((V, 1)) / np.sqrt(V)  # hidden states are sqrt(V) times a one, so A gives 1 after any token
    b = jnp.asarray(np.linspace(-1.0, 1.0, V)[None, :], jnp.float32)
    turned = Subject(teacher.model, {"head": {"a": a, "b": b}}, scale=2.0, style="raw")
    found = positions(teacher, turned, Texts(("a",), ("",), [True]), both_directions, CONFIG)
    p = probabilities(TEACHER)[0]
    q = p * np.exp(2.0 * np.linspace(-1.0, 1.0, V))
    np.testing.assert_allclose(found.values["forward"], [kl(p, q / q.sum())], rtol=1e-4)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (3, 5), (16, 64)])
def test_batches_and_chunks_change_nothing(batch_size: int, chunk: int) -> None:
    texts = Texts(
        ("a", "bc", "d", "e"), ("bcbcbc", "", "abcdefabcdefabcdefa", "f"), [True, False, True, False]
    )
    expected = positions(bigram(TEACHER), bigram(STUDENT), texts, both_directions, CONFIG)
    got = positions(bigram(TEACHER), bigram(STUDENT), texts, both_directions, ProbeConfig(batch_size, chunk))
    assert got.row.tolist() == expected.row.tolist() == [0] * 7 + [2] * 20 + [3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.values, expected.values)


def test_a_vocabulary_of_262k_stays_chunked() -> None:
    """The compiled program for two such models needs far less than one array of logits; nothing is run."""
    vocab_size, rows, prompt, completion = 262_144, 4, 8, 64
    spec = ModelSpec("llama", vocab_size, 8, 1, 2, 2, 4, 8)
    module = Decoder(spec)
    tokens = jax.ShapeDtypeStruct((rows, prompt + completion), jnp.int32)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    slots = jax.ShapeDtypeStruct((rows, completion), jnp.int32)
    logits_bytes = rows * completion * vocab_size * 4
    for classes, outcomes in ((None, vocab_size), (jax.ShapeDtypeStruct((vocab_size,), jnp.int32), 258)):
        side = Side(abstract_params(module), None, 1.0, Sequences(tokens, row, row, prompt), slots, classes)
        reduction = TailTerms(ranks_of(outcomes))
        lowered = compare_distributions.lower((module, module), outcomes, reduction, 1, side, side)
        assert lowered.compile().memory_analysis().temp_size_in_bytes < logits_bytes / 3


def test_sharded_equals_single(mesh_cube: Mesh, mesh_single: Mesh) -> None:
    texts = Texts(("a", "b", "c"), ("bcbcabdef", "fed", ""), [True, False, True])
    merged = letter_tokenizer("ab")
    for other in (letter_tokenizer(), merged):
        results = [
            (
                positions(pair[0], pair[1], texts, both_directions, CONFIG).values,
                likelihoods(pair[0], pair[1], texts, CONFIG).lp_s,
            )
            for pair in (
                (bigram(TEACHER, mesh), bigram(STUDENT, mesh, other)) for mesh in (mesh_cube, mesh_single)
            )
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_kl_terms_are_not_negative_and_add_up() -> None:
    p, q = probabilities(TEACHER), probabilities(STUDENT)
    terms = np.asarray(kl_terms(jnp.log(p), jnp.log(q)))
    assert terms.min() >= 0
    np.testing.assert_allclose(terms.sum(-1), [kl(p[i], q[i]) for i in range(V)], rtol=1e-4)


def test_refuses_what_cannot_be_compared(mesh_single: Mesh) -> None:
    teacher, student = bigram(TEACHER), bigram(STUDENT, tokenizer=letter_tokenizer("ab"))
    with pytest.raises(ValueError, match=r"1 of 2 texts .* cannot be aligned.*The first is row 1, 'axb'"):
        likelihoods(teacher, student, Texts(("a", "a"), ("ab", "axb"), [True, True]), CONFIG)
    kept = likelihoods(
        teacher, student, Texts(("a", "a"), ("ab", "axb"), [True, True]), ProbeConfig(unaligned_limit=0.5)
    )
    assert kept.excluded.tolist() == [False, True] and set(kept.row) == {0}
    with pytest.raises(ValueError, match="different meshes"):
        likelihoods(teacher, bigram(STUDENT, mesh_single), Texts(("a",), ("b",), [True]), CONFIG)
    with pytest.raises(
        ValueError, match="row 0 is '', which gives no token in the teacher's prompt style 'raw'"
    ):
        likelihoods(teacher, teacher, Texts(("",), ("b",), [True]), CONFIG)
    with pytest.raises(ValueError, match=r"row 0 has 1 \+ 9001 tokens, but the teacher's context is 8192"):
        likelihoods(teacher, teacher, Texts(("a",), ("b" * 9000,), [True]), CONFIG)
    with pytest.raises(ValueError, match="a model without a tokenizer cannot be probed"):
        Subject(Model(teacher.model.spec, teacher.model.params, None, teacher.model.module))
    with pytest.raises(ValueError, match="prompt style must be one of"):
        Subject(teacher.model, style="loud")
    with pytest.raises(ValueError, match="takes no system text"):
        Subject(teacher.model, style="raw", system="be brief")
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        ProbeConfig(chunk=0)
    with pytest.raises(ValueError, match="unaligned_limit is a share"):
        ProbeConfig(unaligned_limit=1.0)
