"""Divergences at a position: published values, a float64 oracle, exact zeros, the tails, zero probabilities."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.students.divergence_config import KINDS, SUPPORTS, TAILS, Divergence, StudentLoss
from distill_jax.students.divergences import stored_divergence, token_divergence
from distill_jax.students.targets import TopKTargets, log_mass_outside, log_probabilities

P, Q = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2]
FOUR = [0.6, 0.2, 0.15, 0.05]
OWN = {"jsd": {"beta": 0.3}, "skew_forward_kl": {"skew": 0.2}, "skew_reverse_kl": {"skew": 0.2}}


def every_config():
    """Each kind with each support and tail, and what else changes the formula."""
    for kind in KINDS:
        own = OWN.get(kind, {})
        yield Divergence(kind, **own)
        yield Divergence(kind, **own, temperature=2.0, entry_clip=0.05)
        for support, tail in [
            *(("teacher_topk", tail) for tail in TAILS),
            ("student_topk", "bucket"),
            ("union", "bucket"),
        ]:
            yield Divergence(kind, **own, support=support, top_k=2, tail=tail, temperature=1.5)
    for beta in (0.0, 1e-6, 0.5, 1 - 1e-6, 1.0):
        yield Divergence("jsd", beta=beta)
    yield Divergence("jsd", beta=0.2, normalize_beta=True, temperature=3.0, temperature_squared=False)


def name_of(config):
    changed = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    return ",".join(changed) or config.kind


CONFIGS = list(every_config())
EVERY = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


def log(probabilities):
    return jnp.log(jnp.array(probabilities, jnp.float32))


def value(p, q, kind="forward_kl", **options):
    return float(token_divergence(log(p), log(q), Divergence(kind, **options)))


@functools.cache
def compiled(config):
    """(values f32[N], gradient in the student's logits) of N positions."""

    def total(student, teacher):
        values = token_divergence(teacher, student, config)
        return values.sum(), values

    return jax.jit(jax.value_and_grad(total, has_aux=True))


ROWS, SIZE = 8, 6


def value_and_gradient(config, teacher, student):
    """Filled up to [ROWS, SIZE], so that a config is compiled once."""
    rows, size = teacher.shape
    filled = [np.zeros((ROWS, SIZE), np.float32) for _ in range(2)]
    for target, logits in zip(filled, (student, teacher), strict=True):
        target[:rows, :size], target[:rows, size:] = logits, -np.inf
    (_, values), gradient = compiled(config)(*filled)
    return np.asarray(values)[:rows], np.asarray(gradient)[:rows, :size]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "forward_kl"}, 0.0851228260),
        ({"kind": "reverse_kl"}, 0.0920328502),
        ({"kind": "jsd", "beta": 0.0}, 0.0851228260),
        ({"kind": "jsd", "beta": 0.1}, 0.0076946877),
        ({"kind": "jsd", "beta": 0.5}, 0.0219011790),
        ({"kind": "jsd", "beta": 0.9}, 0.0081847558),
        ({"kind": "jsd", "beta": 1.0}, 0.0920328502),
        ({"kind": "skew_forward_kl", "skew": 0.1}, 0.0695779665),
        ({"kind": "skew_reverse_kl", "skew": 0.1}, 0.0728275335),
        ({"kind": "total_variation"}, 0.2),
        ({"kind": "forward_kl", "temperature": 2.0}, 0.0982971906),
        ({"kind": "forward_kl", "temperature": 2.0, "temperature_squared": False}, 0.0245742977),
        ({"kind": "reverse_kl", "temperature": 2.0, "temperature_squared": False}, 0.0246472600),
        ({"kind": "jsd", "beta": 0.5, "temperature": 2.0, "temperature_squared": False}, 0.0061374837),
        ({"kind": "jsd", "beta": 0.5, "normalize_beta": True}, 4 * 0.0219011790),
        ({"kind": "jsd", "beta": 0.0, "normalize_beta": True}, 0.0851228260),
        ({"kind": "jsd", "beta": 1.0, "normalize_beta": True}, 0.0920328502),
        ({"kind": "jsd", "beta": 0.01, "normalize_beta": True}, 0.0843061 / 0.99),
        ({"kind": "jsd", "beta": 0.99, "normalize_beta": True}, 0.0909990 / 0.99),
    ],
)
def test_published_values(options, expected):
    np.testing.assert_allclose(value(P, Q, **options), expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("kind", "p", "q", "truncated", "renormalised", "bregman", "bucket", "full"),
    [
        ("forward_kl", P, Q, 0.1544375, 0.0538142, 0.0544375, 0.0851228, 0.0851228),
        ("reverse_kl", P, Q, -0.0465966, None, 0.0534034, 0.0920329, 0.0920329),
        ("forward_kl", FOUR, [0.5, 0.3, 0.1, 0.1], 0.0282999, 0.0353749, 0.0282999, 0.0282999, 0.0544623),
        ("forward_kl", FOUR, [0.65, 0.25, 0.06, 0.04], -0.0926543, None, 0.0073457, 0.0459751, 0.0559465),
    ],
)
def test_published_values_on_the_top_two(kind, p, q, truncated, renormalised, bregman, bucket, full):
    top = {"support": "teacher_topk", "top_k": 2}
    got = {tail: value(p, q, kind, tail=tail, **top) for tail in ("bucket", "bregman", "renormalise")}
    np.testing.assert_allclose(
        [got["bregman"], got["bucket"], value(p, q, kind)], [bregman, bucket, full], atol=3e-7
    )
    if renormalised is not None:
        np.testing.assert_allclose(got["renormalise"], renormalised, atol=3e-7)
    # The plain truncated sum, which may be negative, is what the Bregman form has without its linear part.
    inside = (sum(p[:2]) - sum(q[:2])) * (1 if kind == "forward_kl" else -1)
    np.testing.assert_allclose(got["bregman"] + inside, truncated, atol=3e-7)


def test_a_tail_of_one_id_is_exact():
    got = value([0.9, 0.1], [0.6, 0.4], "reverse_kl", support="teacher_topk", top_k=1)
    np.testing.assert_allclose(got, 0.311239, rtol=2e-6)


def test_clipped_entries_stay_positive():
    """Clipping plain terms at .05 would give -.170 here."""
    p, q = [0.9, 0.05, 0.05], [0.1, 0.45, 0.45]
    np.testing.assert_allclose(value(p, q), 1.758, atol=5e-4)
    np.testing.assert_allclose(value(p, q, entry_clip=0.05), 0.15, rtol=1e-6)


def oracle(teacher, student, config):
    """Float64, from the definitions: the support as a set, the rest as one more id, plain sums."""
    p, q = (
        np.exp(x / config.temperature - np.log(np.exp(x / config.temperature).sum()))
        for x in (teacher, student)
    )

    def best(x):
        return set(np.argsort(-x)[: config.top_k].tolist())

    supports = {
        "full": set(range(len(p))),
        "teacher_topk": best(p),
        "student_topk": best(q),
        "union": best(p) | best(q),
    }
    ids = sorted(supports[config.support])
    rest = [i for i in range(len(p)) if i not in ids]
    if config.tail == "bucket":
        p, q = (np.append(x[ids], [x[rest].sum()] if rest else []) for x in (p, q))
    else:
        p, q = p[ids], q[ids]
    if config.tail == "renormalise":
        p, q = p / p.sum(), q / q.sum()

    def kl(a, b):
        return a * np.log(a / b) - a + b

    beta, skew = config.beta, config.skew
    if config.kind == "jsd" and beta in (0, 1):
        terms = kl(p, q) if beta == 0 else kl(q, p)
    elif config.kind == "jsd":
        mixture = beta * p + (1 - beta) * q
        terms = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
        terms = terms / (beta * (1 - beta)) if config.normalize_beta else terms
    else:
        terms = {
            "forward_kl": lambda: kl(p, q),
            "reverse_kl": lambda: kl(q, p),
            "skew_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
            "skew_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
            "total_variation": lambda: abs(p - q) / 2,
        }[config.kind]()
    if config.entry_clip is not None:
        terms = np.minimum(terms, config.entry_clip)
    return terms.sum() * (config.temperature**2 if config.temperature_squared else 1)


def random_logits(seed, rows=3, size=SIZE):
    rng = np.random.default_rng(seed)
    teacher, student = rng.normal(0, 2, (2, rows, size))
    return teacher.astype(np.float32), student.astype(np.float32)


@EVERY
def test_value_and_gradient_are_those_of_the_definition(config):
    teacher, student = random_logits(0)
    values, gradient = value_and_gradient(config, teacher, student)
    small = 1e-6
    for row in range(len(teacher)):
        exact = [x[row].astype(np.float64) for x in (teacher, student)]
        np.testing.assert_allclose(values[row], oracle(*exact, config), rtol=1e-4, atol=1e-6)
        for i in range(teacher.shape[1]):
            step = small * np.eye(teacher.shape[1])[i]
            slope = (
                oracle(exact[0], exact[1] + step, config) - oracle(exact[0], exact[1] - step, config)
            ) / (2 * small)
            np.testing.assert_allclose(gradient[row, i], slope, rtol=1e-3, atol=2e-6)
    # As many directions as leave the distribution as it is: none moves the value.
    np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=2e-6)


@EVERY
def test_equal_models_have_no_divergence_and_no_gradient(config):
    teacher, _ = random_logits(1, rows=ROWS)
    teacher[0, :4] = -np.inf
    teacher[1] *= 100
    values, gradient = value_and_gradient(config, teacher, teacher)
    assert (values == 0).all() and (gradient == 0).all()


@EVERY
def test_zero_probabilities_leave_everything_finite(config):
    teacher, student = random_logits(2, rows=5)
    teacher[0, :3] = student[1, :3] = -np.inf  # of one alone
    teacher[2, :3] = student[2, 3:] = -np.inf  # nothing in common
    teacher[3], student[3] = 1e3 * teacher[3], -1e3 * student[3]  # zeros in float32
    teacher[4, 2:], student[4, 2:] = -np.inf, -np.inf
    values, gradient = value_and_gradient(config, teacher, student)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    assert (values > -1e-6).all()
    assert (gradient[4, 2:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_neither_can_produce_do_not_count(kind):
    teacher, student = random_logits(3)
    config = Divergence(kind, **OWN.get(kind, {}))
    teacher[:, 4:] = student[:, 4:] = -np.inf
    values, gradient = value_and_gradient(config, teacher, student)
    assert (gradient[:, 4:] == 0).all()
    for row in range(len(teacher)):
        exact = [x[row, :4].astype(np.float64) for x in (teacher, student)]
        np.testing.assert_allclose(values[row], oracle(*exact, config), rtol=1e-4, atol=1e-6)


LOGITS = st.lists(
    st.lists(st.floats(-15, 15, width=32), min_size=SIZE, max_size=SIZE), min_size=ROWS, max_size=ROWS
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", SUPPORTS[1:])
@hypothesis.settings(max_examples=20)
@hypothesis.given(LOGITS, LOGITS)
def test_zero_bregman_bucket_full_are_in_this_order(kind, support, teacher, student):
    own = OWN.get(kind, {})
    configs = [Divergence(kind, **own, support=support, top_k=2, tail=tail) for tail in ("bregman", "bucket")]
    logits = [np.array(x, np.float32) for x in (teacher, student)]
    chain = [
        np.zeros(ROWS),
        *(value_and_gradient(c, *logits)[0] for c in (*configs, Divergence(kind, **own))),
    ]
    for lower, upper in itertools.pairwise(chain):
        assert (lower <= upper + 2e-6 * (1 + abs(upper))).all()


def test_small_tails_keep_their_mass():
    """In float32, 1 - P is 0 here."""
    teacher, student = np.array([[0.0, -20.0, -21.0]]), np.array([[0.0, -30.0, -31.0]])
    config = Divergence("forward_kl", support="teacher_topk", top_k=1)
    values, gradient = value_and_gradient(config, teacher.astype(np.float32), student.astype(np.float32))
    mass = np.exp(-20.0) + np.exp(-21.0)
    np.testing.assert_allclose(values, oracle(teacher[0], student[0], config), atol=1e-9)
    np.testing.assert_allclose(gradient[0, 1:].sum(), -mass, rtol=1e-3)


def test_ties_are_all_in_the_support():
    teacher, student = np.float32([[2, 2, 0, -1]]), np.float32([[1, 0, 1, 0]])
    one, two = (
        value_and_gradient(Divergence(support="teacher_topk", top_k=k, tail="bregman"), teacher, student)
        for k in (1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_teacher_is_a_constant():
    teacher, student = random_logits(4)
    for config in (Divergence("reverse_kl"), Divergence(support="union", top_k=2)):
        gradient = jax.grad(lambda t, s, c=config: token_divergence(t, s, c).sum())(teacher, student)
        assert (np.asarray(gradient) == 0).all(), config


def stored(logits, top_k, temperature):
    lp = log_probabilities(jnp.asarray(logits), temperature)
    best, ids = jax.lax.top_k(lp, top_k)
    inside = jax.nn.one_hot(ids, lp.shape[-1]).sum(-2) > 0
    normaliser = jax.nn.logsumexp(logits / temperature, axis=-1)
    return TopKTargets(ids, best, log_mass_outside(lp, inside), normaliser, temperature, lp.shape[-1])


STORED = [c for c in CONFIGS if c.support == "teacher_topk"]


@pytest.mark.parametrize("config", STORED, ids=name_of)
def test_a_stored_teacher_gives_the_same(config):
    teacher, student = random_logits(5)

    @jax.jit
    def results(teacher, student):
        """For 2, 4 and 6 stored ids, and for the student that is the teacher."""
        found = []
        for kept, model in [(2, student), (4, student), (6, student), (2, teacher)]:
            targets = stored(teacher, kept, config.temperature)
            value, back = jax.vjp(lambda s, t=targets: stored_divergence(t, s, config), model)
            found.append((value, back(jnp.ones_like(value))[0]))
        return found

    *got, equal = results(teacher, student)
    for pair in got:
        for one, expected in zip(pair, value_and_gradient(config, teacher, student), strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)
    # The last bit may differ from that of another program; the slope of a total variation then is one of its two.
    value, gradient = map(np.asarray, equal)
    assert abs(value).max() < 1e-6 and (config.kind == "total_variation" or abs(gradient).max() < 1e-6)


def test_the_tail_of_another_temperature_does_not_follow():
    """At temperature 2 the top two of FOUR have .4226 and .2440; no function of those at 1 and the rest gives it."""
    targets = stored(np.log(np.float32([FOUR])), 2, 2.0)
    np.testing.assert_allclose(np.exp(targets.lp[0]), [0.4226, 0.2440], atol=5e-5)
    with pytest.raises(ValueError, match=r"stored at temperature 2\.0, the divergence is at 1\.0"):
        stored_divergence(targets, jnp.zeros((1, 4)), Divergence(support="teacher_topk", top_k=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"support": "union", "top_k": 2},
            "wants support 'union' with top_k=2; use 'teacher_topk' with at most 2",
        ),
        ({"support": "teacher_topk", "top_k": 3}, "its own 2 most probable ids"),
        ({}, "wants support 'full'"),
    ],
)
def test_a_stored_teacher_has_no_other_ids(options, message):
    targets = stored(np.log(np.float32([FOUR])), 2, 1.0)
    with pytest.raises(ValueError, match=message):
        stored_divergence(targets, jnp.zeros((1, 4)), Divergence(**options))


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match="need the cross-tokenizer losses"):
        token_divergence(jnp.zeros(4), jnp.zeros(5), Divergence())
    targets = stored(np.log(np.float32([FOUR])), 2, 1.0)
    with pytest.raises(ValueError, match="normalised over 4 ids, the student's logits have 5"):
        stored_divergence(targets, jnp.zeros((1, 5)), Divergence(support="teacher_topk", top_k=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "kind must be one of .* got 'kl'"),
        ({"support": "topk"}, "support must be one of .* got 'topk'"),
        ({"tail": "drop"}, "tail must be one of .* got 'drop'"),
        ({"kind": "jsd"}, r"needs a beta in \[0, 1\].* got None"),
        ({"kind": "jsd", "beta": 1.5}, r"needs a beta in \[0, 1\].* got 1.5"),
        ({"kind": "jsd", "beta": 1e-9}, "at least 1e-06 from them"),
        ({"beta": 0.5}, "'forward_kl' has no beta"),
        ({"normalize_beta": True}, "'forward_kl' has no beta"),
        ({"kind": "skew_forward_kl"}, "needs a skew in .* got None; without skew, choose 'forward_kl'"),
        ({"kind": "skew_reverse_kl", "skew": 0.0}, "needs a skew in .* choose 'reverse_kl'"),
        ({"skew": 0.1}, "'forward_kl' has no skew"),
        ({"top_k": 4}, "support 'full' has no top_k"),
        ({"tail": "bregman"}, "leaves no tail"),
        ({"support": "union"}, "needs a top_k of at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"entry_clip": 0.0}, "entry_clip must be positive"),
    ],
)
def test_illegal_combinations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_entropy": -1.0}, "weights >= 0"),
        ({"cross_entropy": 0.0}, "one of them positive"),
        ({"weight": 1.0}, "a weight a divergence"),
        ({"divergence": Divergence()}, "a divergence needs a weight"),
    ],
)
def test_illegal_weights_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StudentLoss(**options)
