"""Losses across tokenizers: reference values, the one-tokenizer case, gradients, missing scores, padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.students import cross_tokenizer
from distill_jax.students.cross_tokenizer import (
    alm,
    alm_terms,
    binary_cross_entropy,
    binary_kl,
    log1mexp,
    policy_gradient,
    span_advantages,
    token_advantages,
    uld_distance,
)
from distill_jax.text.spans import align_spans

TEACHER, STUDENT = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.5, 0.3, 0.2])

# "naïve 12", whose ï has two bytes: the teacher cuts na|ï|ve| 12, the student n|a + half an ï|the other half + ve| 1|2.
# The spans are "naïve" and " 12".
END_T, END_S = jnp.array([[2, 4, 6, 9]]), jnp.array([[1, 3, 6, 8, 9]])
LP_T, LP_S = jnp.array([[-1.0, -2.0, -0.5, -0.7]]), jnp.array([[-0.3, -4.0, -0.2, -0.6, -0.2]])


def naive():
    return align_spans(END_T, END_S)


def same_tokens(lengths, size):
    """Spans of texts whose tokens are the same on both sides, one byte each."""
    ends = jnp.broadcast_to(jnp.arange(1, size + 1)[None, :], (len(lengths), size))
    present = jnp.arange(size)[None, :] < jnp.array(lengths)[:, None]
    return align_spans(ends, ends, present, present), present


def random_lp(seed, shape):
    return -jax.random.exponential(jax.random.key(seed), shape)


def test_log1mexp_keeps_its_digits_at_both_ends():
    x = np.array([-1e-6, -1e-3, -0.5, -np.log(2), -0.7, -5.0, -40.0, -200.0])
    got = log1mexp(jnp.array(x, jnp.float32))
    np.testing.assert_allclose(
        got, np.log(-np.expm1(np.float32(x).astype(np.float64))), rtol=2e-6, atol=1e-17
    )
    slope = jax.grad(lambda x: log1mexp(x).sum())(jnp.array(x, jnp.float32))
    exact = np.exp(x) / np.expm1(x)  # d log(1 - e^x) / dx
    np.testing.assert_allclose(slope, exact, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("tau", "cross_entropy", "kl"), [(1.0, 0.8276773, 0.1698601), (100.0, 0.0588300, 0.0030530)]
)
def test_reference_values_of_one_span(tau, cross_entropy, kl):
    """L_T = -1, L_S = -2."""
    a, b = jnp.float32(-1 / tau - 1e-6), jnp.float32(-2 / tau - 1e-6)
    np.testing.assert_allclose(binary_cross_entropy(a, b), cross_entropy, atol=6e-7)
    np.testing.assert_allclose(binary_kl(a, b), kl, atol=1e-7)
    np.testing.assert_allclose(binary_cross_entropy(a, b) - binary_cross_entropy(a, a), kl, atol=1e-7)
    np.testing.assert_allclose(alm_terms(jnp.float32(-1), jnp.float32(-2), tau=tau), tau * kl, atol=1e-5)


def test_tau_is_a_knob_of_shape():
    """Times tau, value and gradient converge: (a - b) + a log(b / a), with the slope a / b - 1."""
    value, slope = jax.value_and_grad(lambda x: alm_terms(jnp.float32(-1), x, tau=1000.0))(jnp.float32(-2))
    np.testing.assert_allclose(value, 0.3065063, atol=2e-6)
    np.testing.assert_allclose(
        alm_terms(jnp.float32(-1), jnp.float32(-2), tau=1e5, eps=1e-12), 0.3068528, atol=2e-5
    )
    np.testing.assert_allclose(slope, -0.5, rtol=3e-3)


def test_the_other_divergences_of_one_span():
    """tau = 1: p = e^-1, q = e^-2, written out."""
    p, q = np.exp(-1.0), np.exp(-2.0)
    expected = {
        "kl": p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)),
        "reverse_kl": q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)),
        "total_variation": p - q,
        "absolute": 1.0,
    }
    assert set(expected) == set(cross_tokenizer.ALM_KINDS)
    for kind, value in expected.items():
        got = alm_terms(jnp.float32(-1), jnp.float32(-2), kind=kind, tau=1.0, eps=1e-9)
        np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=kind)
    np.testing.assert_allclose(
        alm_terms(jnp.float32(-1), jnp.float32(-2), kind="absolute", tau=50.0), 1.0, rtol=1e-4
    )


@pytest.mark.parametrize("kind", cross_tokenizer.ALM_KINDS)
@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0])
def test_equal_likelihoods_cost_nothing_and_pull_nowhere(kind, tau):
    totals = jnp.array([0.0, -1e-7, -0.01, -3.0, -80.0, -3000.0])
    value = alm_terms(totals, totals, kind=kind, tau=tau)
    np.testing.assert_array_equal(value, jnp.zeros(6))
    slope = jax.grad(lambda x: alm_terms(totals, x, kind=kind, tau=tau).sum())(totals)
    np.testing.assert_allclose(slope, np.zeros(6), atol=1e-3)
    far = jax.value_and_grad(lambda x: alm_terms(totals, x, kind=kind, tau=tau).sum())(totals[::-1])
    assert all(jnp.isfinite(leaf).all() for leaf in far) and far[0] > 0


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "total_variation"])
def test_gradient_is_that_of_finite_differences(kind):
    def loss(x):
        return alm_terms(jnp.float32(-3), x, kind=kind, tau=4.0)

    for student in (-5.0, -1.0):
        slope = jax.grad(loss)(jnp.float32(student))
        rise = (loss(jnp.float32(student + 0.02)) - loss(jnp.float32(student - 0.02))) / 0.04
        np.testing.assert_allclose(slope, rise, rtol=2e-3)
        assert (slope > 0) == (student > -3)


def test_alm_is_on_spans():
    """Spans "naïve" (-3.5 against -4.5) and " 12" (-.7 against -.8)."""
    total, count = alm(naive(), LP_T, LP_S, tau=5.0)
    by_hand = alm_terms(jnp.array([-3.5, -0.7]), jnp.array([-4.5, -0.8]), tau=5.0)
    np.testing.assert_allclose(total, by_hand.sum(), rtol=1e-5)
    assert float(count) == 2
    again, tokens = alm(naive(), LP_T, LP_S, tau=5.0, unit="token")
    assert float(again) == float(total) and float(tokens) == 5


def test_alm_trains_the_student_alone_and_each_token_of_a_span_alike():
    slope_t, slope_s = jax.grad(lambda t, s: alm(naive(), t, s, tau=5.0)[0], (0, 1))(LP_T, LP_S)
    np.testing.assert_array_equal(slope_t, jnp.zeros((1, 4)))
    per_span = jax.grad(lambda x: alm_terms(jnp.array([-3.5, -0.7]), x, tau=5.0).sum())(
        jnp.array([-4.5, -0.8])
    )
    np.testing.assert_allclose(slope_s[0], per_span[jnp.array([0, 0, 0, 1, 1])], rtol=1e-4)


@pytest.mark.parametrize("kind", cross_tokenizer.ALM_KINDS)
def test_alm_on_tokens_of_one_tokenizer_is_the_divergence_of_each_token(kind):
    spans, mask = same_tokens([4, 2], 5)
    lp_t, lp_s = random_lp(0, (2, 5)), random_lp(1, (2, 5))
    expected = jnp.where(mask, alm_terms(lp_t, lp_s, kind=kind, tau=3.0), 0).sum()
    for unit in cross_tokenizer.ALM_UNITS:
        total, count = alm(spans, lp_t, lp_s, kind=kind, tau=3.0, unit=unit)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert float(count) == 6


def test_sampled_reverse_kl_on_tokens_of_one_tokenizer_is_that_of_each_token():
    spans, mask = same_tokens([4, 2], 5)
    lp_t, lp_s = random_lp(0, (2, 5)), random_lp(1, (2, 5))
    on_spans, known_spans = span_advantages(spans, lp_t, lp_s)
    on_tokens, known = token_advantages(lp_t, lp_s, mask)
    np.testing.assert_array_equal(known_spans, known)
    np.testing.assert_allclose(on_spans, on_tokens, rtol=1e-6)
    np.testing.assert_allclose(on_tokens, jnp.where(mask, lp_t - lp_s, 0), rtol=1e-6)


def test_every_token_of_a_span_gets_the_whole_difference():
    advantages, known = span_advantages(naive(), LP_T, LP_S)
    np.testing.assert_allclose(advantages, [[1.0, 1.0, 1.0, 0.1, 0.1]], rtol=1e-5)
    assert known.all()


def test_a_missing_score_has_no_advantage():
    """NaN, or -inf where a service returns that: not 0, which would push the student up on what was not scored."""
    for missing in (jnp.nan, -jnp.inf):
        lp_t = LP_T.at[0, 1].set(missing)
        advantages, known = span_advantages(naive(), lp_t, LP_S)
        np.testing.assert_allclose(advantages, [[0, 0, 0, 0.1, 0.1]], rtol=1e-5)
        assert known.tolist() == [[False, False, False, True, True]]
        total, count = alm(naive(), lp_t, LP_S, tau=5.0)
        np.testing.assert_allclose(total, alm_terms(jnp.float32(-0.7), jnp.float32(-0.8), tau=5.0), rtol=1e-4)
        assert float(count) == 1
        slope = jax.grad(lambda s, lp_t=lp_t: alm(naive(), lp_t, s, tau=5.0)[0])(LP_S)
        assert slope[0, :3].tolist() == [0, 0, 0] and (slope[0, 3:] != 0).all()
        on_tokens, known = token_advantages(lp_t, LP_T - 1, jnp.ones((1, 4), bool))
        np.testing.assert_allclose(on_tokens, [[1, 0, 1, 1]])
        assert known.tolist() == [[True, False, True, True]]


def test_advantages_are_constants():
    def loss(lp_s):
        advantages, known = span_advantages(naive(), LP_T, lp_s)
        return policy_gradient(lp_s, advantages, known)[0]

    np.testing.assert_allclose(jax.grad(loss)(LP_S), -span_advantages(naive(), LP_T, LP_S)[0], rtol=1e-6)


def test_expected_policy_gradient_is_the_gradient_of_the_reverse_kl():
    """Over all three words of the student, each weighted by how often it is drawn."""
    logits = jnp.log(STUDENT)

    def sampled(logits):
        lp_s = jax.nn.log_softmax(logits)[:, None]  # one row a word
        advantages, known = token_advantages(jnp.log(TEACHER)[:, None], lp_s, jnp.ones((3, 1), bool))
        return policy_gradient(lp_s, advantages * STUDENT[:, None], known)[0]

    np.testing.assert_allclose(jax.grad(sampled)(logits), [-0.21425254, 0.09402968, 0.12022287], atol=1e-6)


def test_padding_reaches_neither_value_nor_gradient():
    spans, mask = same_tokens([3, 2], 4)

    def dirty(lp):
        return jnp.where(mask, lp, jnp.nan)

    lp_t, lp_s = random_lp(0, (2, 4)), random_lp(1, (2, 4))

    def losses(lp_t, lp_s):
        advantages, known = span_advantages(spans, lp_t, lp_s)
        on_tokens = token_advantages(lp_t, lp_s, mask)
        return (
            alm(spans, lp_t, lp_s, tau=3.0)[0]
            + policy_gradient(lp_s, advantages, known)[0]
            + policy_gradient(lp_s, *on_tokens)[0]
        )

    clean = jax.value_and_grad(losses, 1)(lp_t, lp_s)
    got = jax.value_and_grad(losses, 1)(dirty(lp_t), dirty(lp_s))
    np.testing.assert_array_equal(got[0], clean[0])
    np.testing.assert_array_equal(got[1], clean[1])
    assert (got[1][~mask] == 0).all() and (got[1][mask] != 0).all()


def test_empty_completions_are_exactly_nothing():
    spans, _ = same_tokens([0, 0], 4)
    empty = jnp.full((2, 4), jnp.nan)
    (total, count), slope = jax.value_and_grad(lambda s: alm(spans, empty, s), has_aux=True)(empty)
    assert float(total) == float(count) == 0 and (slope == 0).all()
    advantages, known = span_advantages(spans, empty, empty)
    assert (advantages == 0).all() and not known.any()
    assert [float(x) for x in policy_gradient(empty, advantages, known)] == [0, 0]


def test_uld_reference_value_and_its_variants():
    np.testing.assert_allclose(uld_distance(TEACHER, STUDENT), 0.4, rtol=1e-6)
    np.testing.assert_allclose(uld_distance(TEACHER, STUDENT, top_k=1), 0.4, rtol=1e-6)  # .2 and a tail of .2
    four = jnp.array([0.05, 0.6, 0.15, 0.2])
    np.testing.assert_allclose(uld_distance(four, STUDENT), 0.1 + 0.1 + 0.05 + 0.05, rtol=1e-6)
    np.testing.assert_allclose(uld_distance(STUDENT, four), 0.3, rtol=1e-6)
    np.testing.assert_allclose(uld_distance(four, STUDENT, top_k=2), 0.1 + 0.1 + 0.0, atol=1e-7)
    np.testing.assert_allclose(uld_distance(four, STUDENT, top_k=3), 0.1 + 0.1 + 0.05 + 0.05, atol=1e-7)


def test_top_k_never_exceeds_the_whole_distance():
    keys = jax.random.split(jax.random.key(0))
    p = jax.nn.softmax(2 * jax.random.normal(keys[0], (64, 9)))
    q = jax.nn.softmax(jax.random.normal(keys[1], (64, 7)))
    whole = uld_distance(p, q)
    for top_k in range(1, 9):
        assert (uld_distance(p, q, top_k) <= whole + 1e-6).all()
    np.testing.assert_array_equal(uld_distance(p, q, 9), whole)
    np.testing.assert_array_equal(uld_distance(p, q, 99), whole)


def test_uld_is_blind_to_permutations():
    """A teacher with permuted labels is at distance 0, although its KL is 1.168: why this is a baseline only."""
    permuted = TEACHER[jnp.array([2, 1, 0])]
    assert float(uld_distance(TEACHER, permuted)) == 0
    np.testing.assert_allclose((TEACHER * jnp.log(TEACHER / permuted)).sum(), 1.168, atol=5e-4)


def test_uld_gradient():
    """Each probability is pulled towards the teacher's of the same rank; the last two ranks are above theirs."""
    np.testing.assert_array_equal(jax.grad(uld_distance, 1)(TEACHER, STUDENT), [-1, 1, 1])
    np.testing.assert_array_equal(jax.grad(uld_distance, 1)(TEACHER, STUDENT, 1), [-2, 0, 0])
    logits = jnp.log(STUDENT)
    slope = jax.grad(lambda x: uld_distance(TEACHER, jax.nn.softmax(x)))(logits)
    np.testing.assert_allclose(slope, 0.5 * 2 * jnp.array([-0.5, 0.3, 0.2]), rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(uld_distance, 1)(STUDENT, STUDENT), jnp.zeros(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alm(naive(), LP_T, LP_S, kind="jsd"), "kind must be one of 'kl'"),
        (lambda: alm(naive(), LP_T, LP_S, tau=0.0), "tau and eps must be positive"),
        (lambda: alm(naive(), LP_T, LP_S, unit="byte"), "unit must be one of 'span', 'token'"),
        (lambda: alm(naive(), LP_S, LP_T), "lp_t must have the shape"),
        (lambda: uld_distance(TEACHER, STUDENT, -1), "top_k must be at least 0"),
        (lambda: uld_distance(TEACHER[None], STUDENT), "paired one to one"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
