"""The calibration reward, its gate on correctness, and credit by span."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.rft.calibration import (
    SpanTerms,
    calibration_reward,
    gate_within_correct,
    likelihood_gap,
    span_credit,
)
from distill_jax.text.spans import align_spans

LP_REFERENCE = jnp.array([-4.0, -2.0, -9.0])
LP_PROXY = jnp.array([-12.0, -3.0, -5.0])
BYTES = jnp.array([8, 2, 4])


def test_reward_by_hand():
    """gap = (l_0 - l_C) / bytes = 8/8, 1/2, -4/4."""
    undistillable, spans = calibration_reward(LP_REFERENCE, LP_PROXY, BYTES, "undistillable")
    np.testing.assert_allclose(undistillable, [1.0, 0.5, -1.0])
    assert spans is None
    distillable, _ = calibration_reward(LP_REFERENCE, LP_PROXY, BYTES, "distillable")
    np.testing.assert_array_equal(distillable, -undistillable)


def test_units():
    tokens, tokens_proxy = jnp.array([2, 2, 3]), jnp.array([4, 1, 5])
    per_token = likelihood_gap(LP_REFERENCE, LP_PROXY, tokens, "per_token", size_proxy=tokens_proxy)
    np.testing.assert_allclose(per_token, [-2 + 3, -1 + 3, -3 + 1])
    np.testing.assert_allclose(likelihood_gap(LP_REFERENCE, LP_PROXY, None, "sum"), [8, 1, -4])


def test_empty_text_has_the_size_one():
    got = likelihood_gap(jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([0]))
    np.testing.assert_allclose(got, [2.0])


def test_token_scores_are_added_up():
    tokens = jnp.array([[-1.0, -3.0, 0.0], [-2.0, 0.0, 0.0], [-4.0, -4.0, -1.0]])
    got, _ = calibration_reward(tokens, LP_PROXY, BYTES, "undistillable")
    np.testing.assert_allclose(got, [1.0, 0.5, -1.0])


def test_the_reward_is_a_constant():
    def loss(reference, proxy):
        return calibration_reward(reference, proxy, BYTES, "distillable")[0].sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(LP_REFERENCE, LP_PROXY):
        np.testing.assert_array_equal(gradient, np.zeros(3))


# The text "naïve 12": ends of two tokenizers, spans "naïve" and " 12".
END_T, END_S = jnp.array([[2, 4, 6, 9]]), jnp.array([[1, 3, 6, 8, 9]])
LP_T, LP_S = jnp.array([[-1.0, -2.0, -0.5, -0.7]]), jnp.array([[-0.3, -4.0, -0.2, -0.6, -0.1]])


def test_terms_of_spans_by_hand_and_their_sum():
    spans = align_spans(END_T, END_S)
    reward, terms = calibration_reward(LP_T, LP_S, jnp.array([9]), "undistillable", spans=spans)
    np.testing.assert_allclose(terms.reward[0, :2], [(-3.5 + 4.5) / 9, 0.0], atol=1e-7)
    np.testing.assert_allclose(terms.share[0, :2], [6 / 9, 3 / 9])
    np.testing.assert_allclose(terms.reward.sum(axis=1), reward, atol=1e-7)
    np.testing.assert_allclose(terms.share.sum(axis=1), [1.0])
    _, plain = calibration_reward(LP_T, LP_S, None, "distillable", "sum", spans=spans)
    np.testing.assert_allclose(plain.reward[0, :2], [-1.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(plain.share, np.zeros_like(plain.share))


def test_terms_of_spans_are_constants():
    spans = align_spans(END_T, END_S)

    def loss(reference, proxy):
        terms = calibration_reward(reference, proxy, jnp.array([9]), "distillable", spans=spans)[1]
        return (terms.reward * jnp.arange(1.0, 6.0)[None, :]).sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(LP_T, LP_S):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_tail_that_cannot_be_aligned_has_no_term():
    # The student's side stops at byte 8, inside " 12".
    spans = align_spans(END_T, END_S, present_s=jnp.array([[True, True, True, True, False]]))
    _, terms = calibration_reward(LP_T, LP_S, jnp.array([9]), "undistillable", spans=spans)
    np.testing.assert_allclose(terms.reward[0], [1 / 9, 0, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(terms.share[0], [1, 0, 0, 0, 0])


def test_gate():
    """Wrong rollouts get the worst value of the correct ones; a group without one gets nothing."""
    reward = jnp.array([5.0, 1.0, 2.0, 9.0, 3.0, 4.0])
    correct = jnp.array([False, True, True, False, False, False])
    gated, known = gate_within_correct(reward, correct, 3)
    np.testing.assert_array_equal(gated, [1, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(known, [True] * 3 + [False] * 3)


def test_gate_with_rows_that_could_not_be_scored():
    reward = jnp.array([jnp.nan, 1.0, 2.0, jnp.nan])
    correct = jnp.array([True, True, True, False])
    gated, known = gate_within_correct(reward, correct, 4, jnp.array([False, True, True, False]))
    np.testing.assert_array_equal(known, [False, True, True, True])  # a wrong row needs no score of its own
    np.testing.assert_array_equal(gated[1:], [1.0, 2.0, 1.0])


def test_gate_leaves_all_correct_groups_alone():
    reward = jax.random.normal(jax.random.key(0), (8,))
    gated, known = gate_within_correct(reward, jnp.ones(8, bool), 4)
    np.testing.assert_array_equal(gated, reward)
    assert known.all()


def test_span_credit_by_hand():
    """Two rollouts of two spans; rate = mean of the rewards (.3 and .1) = .2."""
    terms = SpanTerms(jnp.array([[0.1, 0.2], [0.3, -0.2]]), jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    id_t = jnp.array([[0, 0, 1], [0, 1, 1]])
    token_mask = jnp.array([[True, True, True], [True, True, False]])
    reward = terms.reward.sum(axis=1)
    credit, known = span_credit(terms, id_t, reward, jnp.ones(2, bool), token_mask, 2)
    np.testing.assert_allclose(credit[0], [0.1, 0.1, 0.2 - 0.1], atol=1e-6)
    np.testing.assert_allclose(credit[1], [-0.1, -0.2 - 0.15, 0.0], atol=1e-6)
    np.testing.assert_array_equal(known, token_mask)


def test_span_credit_starts_with_the_credit_of_the_sequence():
    key_terms, key_share = jax.random.split(jax.random.key(1))
    share = jax.nn.softmax(jax.random.normal(key_share, (6, 5)))
    terms = SpanTerms(jax.random.normal(key_terms, (6, 5)), share)
    reward = terms.reward.sum(axis=1)
    id_t = jnp.broadcast_to(jnp.arange(5)[None], (6, 5))
    credit, _ = span_credit(terms, id_t, reward, jnp.ones(6, bool), jnp.ones((6, 5), bool), 3)
    rate = np.asarray(reward).reshape(2, 3).mean(axis=1).repeat(3)
    np.testing.assert_allclose(credit[:, 0], reward - rate, atol=1e-5)


def test_rows_without_spans_of_their_own_get_one_credit_for_all_tokens():
    terms = SpanTerms(jnp.array([[0.1, 0.2], [9.0, 9.0]]), jnp.full((2, 2), 0.5))
    id_t = jnp.array([[0, 1], [0, 1]])
    reward = jnp.array([0.3, 0.1])  # the second row is wrong and gated
    own = jnp.array([True, False])
    credit, _ = span_credit(terms, id_t, reward, own, jnp.ones((2, 2), bool), 2)
    np.testing.assert_allclose(credit[1], [-0.1, -0.1], atol=1e-6)
    masked, known = span_credit(terms, id_t, reward, own, jnp.ones((2, 2), bool), 2, jnp.array([True, False]))
    np.testing.assert_array_equal(masked[1], [0, 0])
    assert not known[1].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration_reward(LP_REFERENCE, LP_PROXY, BYTES, "control"), "mode must be one of"),
        (lambda: likelihood_gap(LP_REFERENCE, LP_PROXY, BYTES, "per_word"), "units must be one of"),
        (lambda: likelihood_gap(LP_REFERENCE, LP_PROXY, None), "needs size"),
        (lambda: likelihood_gap(LP_REFERENCE, LP_PROXY, BYTES, "sum"), "takes no size"),
        (lambda: likelihood_gap(LP_REFERENCE, LP_PROXY, BYTES, "per_token"), "needs size_proxy"),
        (lambda: likelihood_gap(LP_REFERENCE, LP_PROXY, BYTES, size_proxy=BYTES), "takes no size_proxy"),
        (lambda: likelihood_gap(LP_REFERENCE, LP_PROXY[:2], BYTES), "one log-probability a row"),
        (lambda: likelihood_gap(LP_REFERENCE, LP_PROXY, BYTES[:2]), "size has shape"),
        (
            lambda: calibration_reward(
                LP_REFERENCE[:1], LP_PROXY[:1], BYTES[:1], "distillable", spans=align_spans(END_T, END_S)
            ),
            "log-probabilities of tokens",
        ),
        (
            lambda: calibration_reward(
                LP_T,
                LP_S,
                jnp.array([4]),
                "distillable",
                "per_token",
                size_proxy=jnp.array([5]),
                spans=align_spans(END_T, END_S),
            ),
            "credit by span",
        ),
        (lambda: gate_within_correct(LP_REFERENCE, jnp.ones(3, bool), 2), "whole groups"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
