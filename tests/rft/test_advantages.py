"""Group advantages against the published numbers, and what must hold for any rewards."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.rft.advantages import combine, group_normalise, saturated_groups, whiten

TASK = jnp.array([1.0, 1.0, 0.0, 0.0])
ALL_RIGHT = jnp.ones(4)
CALIBRATION = jnp.array([0.02, -0.01, 0.03, -0.02])


@pytest.mark.parametrize(
    ("rewards", "ddof", "eps", "expected"),
    [
        ([1, 0, 0, 1], 1, 1e-4, [0.86587543, -0.86587543, -0.86587543, 0.86587543]),
        ([1, 0, 0, 1], 0, 0.0, [1.0, -1.0, -1.0, 1.0]),
        ([1] + [0] * 7, 1, 1e-4, [2.47417] + [-0.35345] * 7),
        ([1] + [0] * 7, 0, 0.0, [2.6457513] + [-0.3779645] * 7),
    ],
)
def test_reference_values(rewards, ddof, eps, expected):
    got = group_normalise(jnp.array(rewards, jnp.float32), len(rewards), ddof=ddof, eps=eps)
    np.testing.assert_allclose(got, expected, rtol=2e-6 if ddof == 0 else 1e-5)


def test_separate_normalisation_keeps_eta():
    """Normalised apart, added and whitened over the batch, against added and then normalised."""
    apart = combine(TASK, CALIBRATION, 0.1, 4, ddof=1, whiten_batch=True).total
    np.testing.assert_allclose(apart, [0.92412, 0.79923, -0.75760, -0.96575], atol=1e-5)
    together = group_normalise(TASK + 0.1 * CALIBRATION, 4, ddof=1)
    np.testing.assert_allclose(together, [0.86847, 0.86327, -0.86154, -0.87020], atol=1e-5)


def test_all_right_group():
    apart = combine(ALL_RIGHT, CALIBRATION, 0.1, 4, ddof=1).total
    np.testing.assert_allclose(apart, [0.06275, -0.06275, 0.10458, -0.10458], atol=1e-5)
    np.testing.assert_allclose(apart * 5, combine(ALL_RIGHT, CALIBRATION, 0.5, 4, ddof=1).total, rtol=1e-5)
    centred = combine(ALL_RIGHT, CALIBRATION, 0.1, 4, scale="none").total
    np.testing.assert_allclose(centred, [0.0015, -0.0015, 0.0025, -0.0025], atol=1e-7)
    # Added first, eta has no say: this is the defect that is avoided.
    together = group_normalise(ALL_RIGHT + 0.1 * CALIBRATION, 4, ddof=1)
    np.testing.assert_allclose(together, [0.60472, -0.60472, 1.00787, -1.00787], atol=2e-4)


def test_parts_are_reported_without_eta():
    parts = combine(TASK, CALIBRATION, 0.3, 4)
    np.testing.assert_allclose(parts.total, parts.task + 0.3 * parts.calibration, rtol=1e-6)
    np.testing.assert_allclose(parts.task, [1, 1, -1, -1], rtol=1e-3)
    np.testing.assert_array_equal(combine(TASK, CALIBRATION, 0.0, 4).total, parts.task)


def test_floor_keeps_a_vanishing_gap_small():
    tiny = CALIBRATION * 1e-6
    assert jnp.abs(group_normalise(tiny, 4, eps=0.0)).max() > 1
    floored = group_normalise(tiny, 4, eps=0.0, floor=0.01)
    np.testing.assert_allclose(floored, (tiny - tiny.mean()) / 0.01, rtol=1e-5)
    # A spread above the floor does not feel it.
    free = group_normalise(CALIBRATION, 4)
    np.testing.assert_array_equal(group_normalise(CALIBRATION, 4, floor=0.01), free)


def test_leave_one_out():
    rewards = jnp.array([3.0, 1.0, 2.0, 5.0, 5.0, 8.0])
    expected = [3 - 1.5, 1 - 2.5, 2 - 2.0, 5 - 6.5, 5 - 6.5, 8 - 5.0]
    np.testing.assert_allclose(group_normalise(rewards, 3, scale="leave_one_out"), expected, rtol=1e-6)


def test_masked_entries_enter_no_statistic():
    rewards = jnp.array([1.0, jnp.nan, 3.0, 5.0, 7.0, 7.0, 7.0, 9.0])
    mask = jnp.array([True, False, True, True, True, True, True, True])
    got = group_normalise(rewards, 4, eps=0.0, mask=mask)
    np.testing.assert_allclose(got[:4], np.array([-2, 0, 0, 2]) / np.sqrt(8 / 3), rtol=1e-6)
    np.testing.assert_allclose(got[4:], np.array([-1, -1, -1, 3]) / np.sqrt(3), rtol=1e-6)
    np.testing.assert_array_equal(group_normalise(rewards, 4, mask=jnp.zeros(8, bool)), np.zeros(8))


def test_token_credit_is_normalised_over_all_tokens_of_the_group():
    credit = jnp.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0], [0.0, 0.0, 0.0], [4.0, 4.0, 4.0]])
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
    got = group_normalise(credit, 2, eps=0.0, mask=mask)
    std = np.sqrt(2 / 3)
    np.testing.assert_allclose(got[:2], [[-1 / std, 0, 0], [1 / std, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(got[2:], [[-1] * 3, [1] * 3], rtol=1e-6)


def test_token_credit_adds_to_the_task_advantage_of_its_row():
    credit = jnp.arange(8.0).reshape(4, 2)
    parts = combine(TASK, credit, 0.5, 4)
    assert parts.total.shape == (4, 2)
    np.testing.assert_allclose(
        parts.total - 0.5 * parts.calibration, np.repeat(parts.task[:, None], 2, 1), rtol=1e-6
    )


@hypothesis.given(
    st.lists(st.floats(-5, 5, width=32, allow_subnormal=False), min_size=12, max_size=12),
    st.sampled_from([2, 3, 4, 6]),
    st.floats(0.125, 8, width=32),
    st.floats(-3, 3, width=32, allow_subnormal=False),
)
def test_invariants(values, num_samples, factor, shift):
    rewards = jnp.array(values, jnp.float32)
    got = np.asarray(group_normalise(rewards, num_samples, eps=1e-4)).reshape(-1, num_samples)
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-3)  # centred in each group
    assert np.all(got.std(axis=1) <= 1 + 1e-4)
    # A task reward on another scale ranks as before, up to eps in the deviation.
    scaled = np.asarray(group_normalise(factor * rewards + shift, num_samples, eps=1e-4)).reshape(
        -1, num_samples
    )
    wide = np.asarray(rewards).reshape(-1, num_samples).std(axis=1) > 0.1
    np.testing.assert_allclose(scaled[wide], got[wide], atol=2e-2)


def test_groups_do_not_see_each_other():
    first, second = jnp.array([1.0, 0.0, 0.5]), jnp.array([10.0, 20.0, 40.0])
    both = group_normalise(jnp.concatenate([first, second]), 3)
    np.testing.assert_array_equal(both[:3], group_normalise(first, 3))
    np.testing.assert_array_equal(both[3:], group_normalise(second, 3))


def test_whitening_is_over_the_batch():
    total = combine(TASK, CALIBRATION, 0.5, 4).total
    whitened = combine(TASK, CALIBRATION, 0.5, 4, whiten_batch=True).total
    np.testing.assert_allclose(whitened, whiten(total), rtol=1e-6)
    np.testing.assert_allclose([whitened.mean(), whitened.std()], [0, 1], atol=1e-3)


def test_advantages_are_constants():
    gradient = jax.grad(lambda r: (group_normalise(r, 4) * jnp.arange(4.0)).sum())(CALIBRATION)
    np.testing.assert_array_equal(gradient, np.zeros(4))


def test_saturated_groups():
    assert [float(x) for x in saturated_groups(jnp.array([1.0, 1, 0, 0, 1, 0]), 2)] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_normalise(jnp.ones(6), 4), "does not hold whole groups of num_samples=4"),
        (lambda: group_normalise(jnp.ones(6), 1), "at least 2"),
        (lambda: group_normalise(jnp.ones(4), 2, scale="max"), "scale must be one of"),
        (lambda: group_normalise(jnp.ones(4), 2, ddof=2), "ddof must be 0"),
        (lambda: group_normalise(jnp.ones(4), 2, mask=jnp.ones(3, bool)), "mask has shape"),
        (lambda: combine(TASK, CALIBRATION, -0.5, 4), "eta must be >= 0"),
        (lambda: combine(TASK, jnp.ones((4, 3)), 0.5, 4, whiten_batch=True), "credit='sequence'"),
        (lambda: combine(TASK, jnp.ones(8), 0.5, 4), "rows of calibration"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
