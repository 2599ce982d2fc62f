"""Losses against the published numbers; KL anchors by exact enumeration of a three-word vocabulary."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.rft import losses
from distill_jax.rft.losses import KLAnchor, aggregate, clipped_surrogate, clipped_terms, importance_ratio

POLICY = np.array([0.5, 0.3, 0.2])
REFERENCE = np.array([0.7, 0.2, 0.1])
GRADIENT_REVERSE = [-0.21425254, 0.09402968, 0.12022287]
GRADIENT_FORWARD = [-0.2, 0.1, 0.1]
LOGITS = jnp.log(jnp.array(POLICY, jnp.float32))


def ones(*shape):
    return jnp.ones(shape, bool)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.5, 1, -1.2), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8), (1.1, 1, -1.1)],
)
def test_clip(ratio, advantage, loss):
    got = clipped_terms(jnp.array([[ratio]]), jnp.array([[float(advantage)]]), 0.2, 0.2)
    np.testing.assert_allclose(got, [[loss]], rtol=1e-6)


def test_clip_higher_lets_the_ratio_rise_further():
    got = clipped_terms(jnp.array([[1.27, 1.5, 0.7]]), jnp.array([[1.0, 1.0, -1.0]]), 0.2, 0.28)
    np.testing.assert_allclose(got, [[-1.27, -1.28, 0.8]], rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [(1.5, 1, False), (1.5, -1, True), (0.5, 1, True), (0.5, -1, False), (1.0, 1, True), (1.0, -1, True)],
)
def test_clip_stops_the_gradient_only_on_the_pessimistic_side(ratio, advantage, has_gradient):
    lp_old, advantages = jnp.zeros((1, 1)), jnp.array([float(advantage)])
    gradient = jax.grad(lambda lp: clipped_surrogate(lp, lp_old, advantages, ones(1, 1))[0])(
        jnp.log(jnp.array([[ratio]]))
    )
    # d(-r A)/d lp = -r A
    np.testing.assert_allclose(gradient, [[-ratio * advantage if has_gradient else 0.0]], rtol=1e-6)


def test_aggregations_of_uneven_lengths():
    """Lengths 2 and 6, A = +1 and -1, ratio 1."""
    mask = jnp.arange(6)[None, :] < jnp.array([2, 6])[:, None]
    lp = jnp.full((2, 6), -1.0)
    advantages = jnp.array([1.0, -1.0])
    expected = {"grpo": (0.0, 2), "dapo": (0.5, 8), "dr_grpo": (0.25, 16), "gspo": (0.0, 2), "rloo": (2.0, 2)}
    for algorithm, (loss, count) in expected.items():
        limit = 8 if algorithm == "dr_grpo" else None
        got = clipped_surrogate(lp, lp, advantages, mask, algorithm=algorithm, max_tokens=limit)
        assert float(got[1]) == count, algorithm
        np.testing.assert_allclose(got[0] / got[1], loss, atol=1e-7, err_msg=algorithm)


def test_sums_and_counts_of_parts_are_those_of_the_whole():
    lengths = jnp.array([1, 5, 3, 2])
    mask = jnp.arange(5)[None, :] < lengths[:, None]
    terms = jax.random.normal(jax.random.key(0), (4, 5))
    for algorithm in losses.ALGORITHMS:
        limit = 7 if algorithm == "dr_grpo" else None
        whole = np.array(aggregate(terms, mask, algorithm, limit))
        parts = [aggregate(terms[i : i + 1], mask[i : i + 1], algorithm, limit) for i in range(4)]
        np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5, err_msg=algorithm)


def test_empty_rows_count_nowhere():
    mask = jnp.array([[True, True], [False, False]])
    terms = jnp.array([[1.0, 3.0], [jnp.nan, jnp.nan]])
    assert [float(x) for x in aggregate(terms, mask, "grpo")] == [2.0, 1.0]


def test_sequence_ratio():
    delta = jnp.array([[0.1, -0.2, 0.3, 9.9]])
    mask = jnp.array([[True, True, True, False]])
    ratio = importance_ratio(delta, jnp.zeros((1, 4)), mask, "gspo")
    np.testing.assert_allclose(ratio[0, :3], [1.0689391] * 3, rtol=1e-6)
    tokens = importance_ratio(delta, jnp.zeros((1, 4)), mask)
    np.testing.assert_allclose(tokens[0, :3], [1.1052, 0.8187, 1.3499], atol=5e-5)
    np.testing.assert_allclose(np.prod(tokens[0, :3]), 1.2214028, rtol=1e-6)


def test_sequence_ratio_has_the_gradient_of_the_sequence_form():
    """min(r_i A, clip(r_i) A) with r_i = exp(mean(lp - lp_old)), written out."""
    key_lp, key_old = jax.random.split(jax.random.key(1))
    lp, lp_old = jax.random.normal(key_lp, (3, 4)) * 0.1, jax.random.normal(key_old, (3, 4)) * 0.1
    mask = jnp.arange(4)[None, :] < jnp.array([4, 2, 3])[:, None]
    advantages = jnp.array([1.0, -2.0, 0.5])

    def written_out(lp):
        mean = jnp.where(mask, lp - lp_old, 0).sum(1) / mask.sum(1)
        ratio = jnp.exp(mean)
        return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.97, 1.04) * advantages).sum()

    def ours(lp):
        return clipped_surrogate(
            lp, lp_old, advantages, mask, algorithm="gspo", clip_low=0.03, clip_high=0.04
        )[0]

    np.testing.assert_allclose(ours(lp), written_out(lp), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(lp), jax.grad(written_out)(lp), rtol=1e-5, atol=1e-7)


def test_on_policy_gradient_is_the_policy_gradient():
    lp = jnp.log(jnp.array([[0.5, 0.2], [0.9, 0.3]]))
    advantages = jnp.array([2.0, -1.0])
    gradient = jax.grad(lambda x: clipped_surrogate(x, lp, advantages, ones(2, 2), algorithm="rloo")[0])(lp)
    np.testing.assert_allclose(gradient, [[-2, -2], [1, 1]], rtol=1e-6)


def test_padding_reaches_neither_value_nor_gradient():
    mask = jnp.array([[True, False]])
    clean, dirty = jnp.array([[-0.3, 0.0]]), jnp.array([[-0.3, jnp.nan]])
    anchor = KLAnchor("ratio_k3", "loss", 0.5)

    def loss(lp, other):
        surrogate = clipped_surrogate(lp, other, jnp.array([1.0]), mask)[0]
        return surrogate + losses.anchor_terms(anchor, lp, other, other - 0.1, mask).sum()

    for a, b in itertools.product((clean, dirty), repeat=2):
        np.testing.assert_array_equal(loss(a, b), loss(clean, clean))
        np.testing.assert_array_equal(jax.grad(loss)(a, b), jax.grad(loss)(clean, clean))


def expectation(estimator):
    """Mean and variance of estimator(lp, lp_reference) over the policy's three words."""
    mask = ones(1, 3)
    values = np.asarray(
        estimator(jnp.log(jnp.array(POLICY[None])), jnp.log(jnp.array(REFERENCE[None])), mask)
    )[0]
    mean = (POLICY * values).sum()
    return mean, (POLICY * (values - mean) ** 2).sum()


@pytest.mark.parametrize(
    ("estimator", "mean", "variance"),
    [
        (losses.k1, 0.0920328502, 0.19355),
        (losses.k2, 0.1010090, 0.00497),
        (losses.k3, 0.0920328502, 0.00257),
    ],
)
def test_kl_estimators(estimator, mean, variance):
    got = expectation(estimator)
    np.testing.assert_allclose(got[0], mean, rtol=2e-6)
    np.testing.assert_allclose(got[1], variance, atol=6e-6)


def expected_gradient(term):
    """Gradient on the logits of E_v[term(lp(v), lp_old(v), lp_reference(v))], v drawn from a fixed policy."""

    def loss(logits):
        lp = jax.nn.log_softmax(logits)[None]
        lp_old = jax.lax.stop_gradient(lp)
        weight = jnp.exp(lp_old)
        return (weight * term(lp, lp_old, jnp.log(jnp.array(REFERENCE, jnp.float32))[None])).sum()

    return jax.grad(loss)(LOGITS)


def with_anchor(anchor):
    """Terms of a batch whose task advantage is 0: what is left is the anchor, in whichever place it acts."""

    def term(lp, lp_old, lp_reference):
        mask = ones(*lp.shape)
        advantages = losses.anchor_reward(anchor, lp_old, lp_reference, mask)
        surrogate = clipped_terms(importance_ratio(lp, lp_old, mask), advantages, 0.2, 0.2)
        return surrogate + losses.anchor_terms(anchor, lp, lp_old, lp_reference, mask)

    return term


@pytest.mark.parametrize("pair", [("k1", "reward"), ("k2", "loss"), ("ratio_k3", "loss")])
def test_legal_anchors_have_the_gradient_of_the_reverse_kl(pair):
    got = expected_gradient(with_anchor(KLAnchor(*pair, coefficient=1.0)))
    np.testing.assert_allclose(got, GRADIENT_REVERSE, atol=2e-6)
    np.testing.assert_allclose(
        expected_gradient(with_anchor(KLAnchor(*pair, coefficient=0.3))), 0.3 * got, atol=1e-6
    )
    np.testing.assert_array_equal(
        expected_gradient(with_anchor(KLAnchor(*pair, coefficient=0.0))), np.zeros(3)
    )


def test_why_the_other_pairs_are_refused():
    mask = ones(1, 3)
    k1_loss = expected_gradient(lambda lp, old, ref: losses.k1(lp, ref, mask))
    np.testing.assert_allclose(k1_loss, np.zeros(3), atol=1e-6)
    k3_loss = expected_gradient(lambda lp, old, ref: losses.k3(lp, ref, mask))
    np.testing.assert_allclose(k3_loss, GRADIENT_FORWARD, atol=1e-6)
    k2_reward = expected_gradient(
        lambda lp, old, ref: (
            importance_ratio(lp, old, mask) * jax.lax.stop_gradient(losses.k2(old, ref, mask))
        )
    )
    np.testing.assert_allclose(k2_reward, [-0.0222, -0.0056, 0.0278], atol=5e-5)
    k3_reward = expected_gradient(
        lambda lp, old, ref: (
            importance_ratio(lp, old, mask) * jax.lax.stop_gradient(losses.k3(old, ref, mask))
        )
    )
    np.testing.assert_allclose(k3_reward, [-0.0143, -0.0060, 0.0202], atol=6e-5)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("k1", "loss"), "zero in expectation"),
        (("k3", "loss"), "the other direction"),
        (("k2", "reward"), "not that of the KL"),
        (("k3", "reward"), "not that of the KL"),
        (("ratio_k3", "reward"), "has to be differentiated"),
        (("k4", "loss"), "no such estimator"),
        (("k1", "elsewhere"), "no such estimator or place"),
    ],
)
def test_illegal_anchors_say_why(pair, reason):
    with pytest.raises(ValueError, match=reason):
        KLAnchor(*pair)


def test_negative_anchor_is_refused():
    with pytest.raises(ValueError, match="must be >= 0"):
        KLAnchor(coefficient=-1.0)


def test_clamps_hold_and_are_counted():
    lp = jnp.array([[-1.0, -60.0, -1.0, -60.0]])
    reference = jnp.array([[-1.1, -1.0, -60.0, -1.0]])
    mask = jnp.array([[True, True, True, False]])
    np.testing.assert_allclose(losses.k1(lp, reference, mask), [[0.1, -20.0, 20.0, 0.0]], rtol=1e-5)
    third = losses.k3(lp, reference, mask)
    assert float(third[0, 1]) == losses.K3_LIMIT and float(third[0, 3]) == 0.0 and jnp.all(third >= 0)
    assert [float(x) for x in losses.clamped_terms(lp, reference, mask)] == [2.0, 3.0]


def test_clip_fraction():
    ratio = jnp.array([[0.7, 0.9, 1.25, 1.3, 9.0]])
    mask = jnp.array([[True, True, True, True, False]])
    assert [float(x) for x in losses.clip_fraction(ratio, mask, 0.2, 0.28)] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregate(jnp.ones((1, 1)), ones(1, 1), "a2c"), "algorithm must be one of"),
        (lambda: aggregate(jnp.ones((1, 1)), ones(1, 1), "dr_grpo"), "max_tokens"),
        (
            lambda: clipped_surrogate(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(3), ones(2, 3)),
            r"advantages must be f32\[B\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
