"""The ten invariants of the alignment kernel, and its agreement with the oracle, on generated rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.text.spans import GRAD_CHOICES, Spans, align_spans, span_logprobs, valid_spans
from tests.text.span_oracle import Expected, Side, expected_spans

ROWS, SLOTS_T, SLOTS_S = 2, 30, 27
GARBAGE_LP = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30])


@st.composite
def sides(draw: st.DrawFn, cuts: list[int], slots: int) -> Side:
    """One tokenizer's row over a text that it cuts at these bytes: truncated, with specials, zero widths, padding."""
    first = draw(st.integers(0, min(2, len(cuts))))
    last = draw(st.integers(0, min(2, len(cuts) - first)))
    origin = cuts[first - 1] if first else 0
    end = cuts[first : len(cuts) - last]
    present = [True] * len(end)
    for _ in range(draw(st.integers(0, 2))):  # tokens of no width
        slot = draw(st.integers(0, len(end)))
        end.insert(slot, end[slot - 1] if slot else origin)
        present.insert(slot, True)
    for _ in range(draw(st.integers(0, 2))):  # special tokens of this side alone
        slot = draw(st.integers(0, len(end)))
        end.insert(slot, draw(st.integers(-3, 40)))
        present.insert(slot, False)
    left = draw(st.integers(0, slots - len(end)))
    padding = draw(st.integers(-3, 40))
    end = [padding] * left + end + [padding] * (slots - len(end) - left)
    present = [False] * left + present + [False] * (slots - len(present) - left)
    score = draw(st.just([True] * slots) | st.lists(st.booleans(), min_size=slots, max_size=slots))
    # Eighths, so that sums are exact in any order.
    eighths = draw(st.lists(st.integers(-64, 0), min_size=slots, max_size=slots))
    garbage = draw(GARBAGE_LP)
    lp = [n / 8 if p and s else garbage for n, p, s in zip(eighths, present, score, strict=True)]
    return Side(end, present, score, lp, origin)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Side, Side]:
    """(teacher, student) over one text of up to 23 bytes, cut by both sides at bytes, inside of characters too."""
    size = len(draw(st.text(max_size=8)).encode()[:23])
    choice = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    cuts_t = [byte + 1 for byte, cut in enumerate(choice) if cut & 1 or byte + 1 == size]
    cuts_s = [byte + 1 for byte, cut in enumerate(choice) if cut & 2 or byte + 1 == size]
    return draw(sides(cuts_t, SLOTS_T)), draw(sides(cuts_s, SLOTS_S))


BATCHES = st.lists(rows(), min_size=ROWS, max_size=ROWS)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """One side of a batch as arrays."""

    end: np.ndarray
    present: np.ndarray
    score: np.ndarray
    lp: np.ndarray
    origin: np.ndarray


def arguments(batch: list[Side]) -> Arguments:
    return Arguments(
        np.array([side.end for side in batch], np.int32),
        np.array([side.present for side in batch]),
        np.array([side.score for side in batch]),
        np.array([side.lp for side in batch], np.float32),
        np.array([side.origin for side in batch], np.int32),
    )


@jax.jit
def _align_and_sum(t: dict[str, Any], s: dict[str, Any]) -> tuple[Spans, jax.Array, jax.Array]:
    spans = align_spans(
        t["end"], s["end"], t["present"], s["present"], t["origin"], s["origin"], t["score"], s["score"]
    )
    return spans, *span_logprobs(spans, t["lp"], s["lp"])


def align_and_sum(t: Arguments, s: Arguments) -> tuple[Spans, np.ndarray, np.ndarray]:
    return jax.tree.map(np.asarray, _align_and_sum(vars(t), vars(s)))


def align_batch(batch: list[tuple[Side, Side]]) -> tuple[Spans, np.ndarray, np.ndarray]:
    return align_and_sum(arguments([t for t, _ in batch]), arguments([s for _, s in batch]))


def assert_row(spans: Spans, row: int, expected: Expected) -> None:
    got = {field.name: getattr(spans, field.name)[row] for field in dataclasses.fields(spans)}
    assert got["num_spans"] == expected.num_spans
    np.testing.assert_array_equal(got["valid"], expected.valid)
    np.testing.assert_array_equal(got["bytes"], expected.bytes)
    for suffix, side in (("t", expected.teacher), ("s", expected.student)):
        np.testing.assert_array_equal(got[f"id_{suffix}"], side.ids)
        np.testing.assert_array_equal(got[f"start_{suffix}"], side.start)
        np.testing.assert_array_equal(got[f"count_{suffix}"], side.count)


@hypothesis.given(BATCHES)
def test_agrees_with_the_oracle(batch: list[tuple[Side, Side]]) -> None:
    spans, logprob_t, logprob_s = align_batch(batch)
    for row, (teacher, student) in enumerate(batch):
        expected = expected_spans(teacher, student)
        assert_row(spans, row, expected)
        np.testing.assert_array_equal(logprob_t[row], np.float32(expected.teacher.logprob))
        np.testing.assert_array_equal(logprob_s[row], np.float32(expected.student.logprob))


@hypothesis.given(BATCHES)
def test_invariant_1_span_sums_add_up_to_the_row(batch: list[tuple[Side, Side]]) -> None:
    _, *logprobs = align_batch(batch)
    for row, pair in enumerate(batch):
        for side, logprob in zip(pair, logprobs, strict=True):
            scored = [lp for lp, p, s in zip(side.lp, side.present, side.score, strict=True) if p and s]
            assert logprob[row].sum() == sum(scored)


@hypothesis.given(BATCHES)
def test_invariant_2_ids_step_by_at_most_one(batch: list[tuple[Side, Side]]) -> None:
    spans, _, _ = align_batch(batch)
    for row, pair in enumerate(batch):
        for side, ids in zip(pair, (spans.id_t[row], spans.id_s[row]), strict=True):
            present = ids[np.array(side.present)]
            assert set(np.diff(present)) <= {0, 1}
            assert present.size == 0 or present[0] == 0
            assert (ids[~np.array(side.present)] == spans.valid.shape[1] - 1).all()


@hypothesis.given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.data())
def test_invariant_3_identical_tokenisations_give_one_span_a_token(
    widths: list[int], data: st.DataObject
) -> None:
    count = len(widths)
    end = np.cumsum(widths).tolist()
    mask = [True] * count
    lp = [
        [n / 8 for n in data.draw(st.lists(st.integers(-64, 0), min_size=count, max_size=count))]
        for _ in "ts"
    ]

    def side(slots: int, lp: list[float]) -> Side:
        rest = slots - count
        return Side(end + [0] * rest, mask + [False] * rest, mask + [False] * rest, lp + [0.0] * rest)

    spans, *logprobs = align_batch([(side(SLOTS_T, lp[0]), side(SLOTS_S, lp[1]))] * ROWS)
    assert spans.num_spans[0] == count

    def begins_with(array: np.ndarray, values: list[Any]) -> bool:
        return array[0, :count].tolist() == values

    assert begins_with(spans.id_t, list(range(count))) and begins_with(spans.id_s, list(range(count)))
    assert begins_with(spans.count_t, [1] * count) and begins_with(spans.count_s, [1] * count)
    assert begins_with(spans.valid, mask) and begins_with(spans.bytes, widths)
    assert begins_with(logprobs[0], lp[0]) and begins_with(logprobs[1], lp[1])


@hypothesis.given(BATCHES)
def test_invariant_4_swapping_the_sides_swaps_the_outputs(batch: list[tuple[Side, Side]]) -> None:
    spans, logprob_t, logprob_s = align_batch(batch)
    swapped, swapped_t, swapped_s = align_batch([(student, teacher) for teacher, student in batch])
    for field in dataclasses.fields(Spans):
        other = {"_t": "_s", "_s": "_t"}
        name = field.name[:-2] + other[field.name[-2:]] if field.name[-2:] in other else field.name
        np.testing.assert_array_equal(getattr(spans, field.name), getattr(swapped, name))
    np.testing.assert_array_equal(logprob_t, swapped_s)
    np.testing.assert_array_equal(logprob_s, swapped_t)


@hypothesis.given(BATCHES)
def test_invariant_5_valid_spans_cover_the_same_bytes(batch: list[tuple[Side, Side]]) -> None:
    spans, _, _ = align_batch(batch)
    for row, (teacher, student) in enumerate(batch):
        for k in np.flatnonzero(spans.valid[row]):
            interval_t, interval_s = (
                covered_bytes(side, ids, k)
                for side, ids in ((teacher, spans.id_t[row]), (student, spans.id_s[row]))
            )
            assert interval_t == interval_s
            assert interval_t[1] - interval_t[0] == spans.bytes[row, k]


def covered_bytes(side: Side, ids: np.ndarray, span: int) -> tuple[int, int]:
    """From the end of the token before the span's first token to the end of its last."""
    present = [slot for slot, here in enumerate(side.present) if here]
    ends = [side.origin, *(side.end[slot] for slot in present)]
    inside = [n for n, slot in enumerate(present) if ids[slot] == span]
    return ends[inside[0]], ends[inside[-1] + 1]


@hypothesis.given(rows(), st.data())
def test_invariant_6_a_cut_adds_a_span_exactly_where_the_other_side_has_one(
    pair: tuple[Side, Side], data: st.DataObject
) -> None:
    teacher, student = pair
    present = [slot for slot, here in enumerate(teacher.present) if here]
    begins = dict(zip(present, [teacher.origin, *(teacher.end[slot] for slot in present)], strict=False))
    places = [(slot, byte) for slot in present for byte in range(begins[slot] + 1, teacher.end[slot])]
    free = [slot for slot, here in enumerate(teacher.present) if not here and slot > max(present, default=-1)]
    hypothesis.assume(places and free)
    slot, byte = data.draw(st.sampled_from(places))

    def insert(values: list[Any], value: Any) -> list[Any]:
        """The token becomes two, and the row loses a slot of padding."""
        return [*values[:slot], value, *values[slot:]][: len(values)]

    cut = Side(
        insert(teacher.end, byte),
        insert(teacher.present, True),
        insert(teacher.score, teacher.score[slot]),
        insert(teacher.lp, teacher.lp[slot]),
        teacher.origin,
    )
    spans, _, _ = align_batch([pair, (cut, student)])
    added = int(byte in student.ends())
    assert spans.num_spans[1] - spans.num_spans[0] == added
    if not added:
        for name in ("valid", "bytes", "id_s", "start_s", "count_s"):
            np.testing.assert_array_equal(*getattr(spans, name))


@hypothesis.given(BATCHES)
def test_invariant_7_never_more_spans_than_tokens(batch: list[tuple[Side, Side]]) -> None:
    spans, _, _ = align_batch(batch)
    for row, pair in enumerate(batch):
        assert spans.num_spans[row] <= min(sum(side.present) for side in pair)
        assert spans.valid[row].sum() <= spans.num_spans[row] < spans.valid.shape[1]


@hypothesis.given(BATCHES, GARBAGE_LP)
def test_invariant_8_what_is_masked_reaches_neither_values_nor_gradients(
    batch: list[tuple[Side, Side]], garbage: float
) -> None:
    t, s = arguments([t for t, _ in batch]), arguments([s for _, s in batch])
    mask_t, mask_s = t.present & t.score, s.present & s.score

    def filled(value: float) -> list[np.ndarray]:
        pair = np.where(mask_t, t.lp, np.float32(value)), np.where(mask_s, s.lp, np.float32(value))
        _, *logprobs = align_and_sum(dataclasses.replace(t, lp=pair[0]), dataclasses.replace(s, lp=pair[1]))
        return [*logprobs, *squares_gradient(vars(t), vars(s), *pair)]

    for clean, dirty in zip(filled(0.0), filled(garbage), strict=True):
        assert np.isfinite(dirty).all()
        np.testing.assert_array_equal(clean, dirty)


@jax.jit
def squares_gradient(
    t: dict[str, Any], s: dict[str, Any], lp_t: Any, lp_s: Any
) -> tuple[jax.Array, jax.Array]:
    """Gradient of the squared differences over the valid spans, by both sides."""

    def loss(lp_t: jax.Array, lp_s: jax.Array) -> jax.Array:
        spans = align_spans(
            t["end"], s["end"], t["present"], s["present"], t["origin"], s["origin"], t["score"], s["score"]
        )
        logprob_t, logprob_s = span_logprobs(spans, lp_t, lp_s, grad="both")
        return (jnp.square(logprob_t - logprob_s) * spans.valid).sum()

    return jax.grad(loss, argnums=(0, 1))(lp_t, lp_s)


@hypothesis.given(BATCHES, st.integers(0, 2**31), st.sampled_from(GRAD_CHOICES))
def test_invariant_9_the_gradient_is_a_gather_on_the_chosen_side(
    batch: list[tuple[Side, Side]], seed: int, grad: str
) -> None:
    t, s = arguments([t for t, _ in batch]), arguments([s for _, s in batch])
    size = min(SLOTS_T, SLOTS_S) + 1
    weights = np.random.default_rng(seed).standard_normal((2, ROWS, size)).astype(np.float32)
    gradient_t, gradient_s = WEIGHTED_GRADIENT[grad](vars(t), vars(s), weights, t.lp, s.lp)
    for row, pair in enumerate(batch):
        expected = expected_spans(*pair)
        for side, spans, weight, gradient, name in (
            (pair[0], expected.teacher, weights[0], gradient_t, "teacher"),
            (pair[1], expected.student, weights[1], gradient_s, "student"),
        ):
            scored = np.array(side.present) & np.array(side.score) & (grad in (name, "both"))
            np.testing.assert_array_equal(gradient[row], np.where(scored, weight[row, spans.ids], 0))


def weighted_gradient(grad: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Gradient of sum_k w_k L[k] over both sides, by both log-probabilities."""

    def loss(lp_t: Any, lp_s: Any, t: dict[str, Any], s: dict[str, Any], weights: Any) -> jax.Array:
        spans = align_spans(t["end"], s["end"], t["present"], s["present"])
        logprob_t, logprob_s = span_logprobs(spans, lp_t, lp_s, t["score"], s["score"], grad)
        return (weights[0] * logprob_t).sum() + (weights[1] * logprob_s).sum()

    gradient = jax.grad(loss, argnums=(0, 1))
    return jax.jit(lambda t, s, weights, lp_t, lp_s: gradient(lp_t, lp_s, t, s, weights))


WEIGHTED_GRADIENT = {grad: weighted_gradient(grad) for grad in GRAD_CHOICES}


@hypothesis.given(BATCHES, st.integers(0, 7), st.integers(0, 7))
def test_invariant_10_padding_changes_nothing_but_shapes(
    batch: list[tuple[Side, Side]], left_t: int, left_s: int
) -> None:
    def padded(side: Side, left: int) -> Side:
        right = 7 - left
        return Side(
            [99] * left + side.end + [7] * right,
            [False] * left + side.present + [False] * right,
            [True] * left + side.score + [True] * right,
            [float("nan")] * left + side.lp + [float("nan")] * right,
            side.origin,
        )

    spans, *logprobs = align_batch(batch)
    wide, *wide_logprobs = align_batch([(padded(t, left_t), padded(s, left_s)) for t, s in batch])
    size = spans.valid.shape[1]
    for name in ("valid", "bytes", "count_t", "count_s"):
        np.testing.assert_array_equal(getattr(wide, name)[:, :size], getattr(spans, name))
        assert not getattr(wide, name)[:, size:].any()
    for name in ("num_spans", "scored_bytes_t", "scored_bytes_s"):
        np.testing.assert_array_equal(getattr(wide, name), getattr(spans, name))
    for before, after in zip(logprobs, wide_logprobs, strict=True):
        np.testing.assert_array_equal(after[:, :size], before)
        assert not after[:, size:].any()
    for suffix, left, present in (
        ("t", left_t, np.array([t.present for t, _ in batch])),
        ("s", left_s, np.array([s.present for _, s in batch])),
    ):
        ids, wide_ids = getattr(spans, f"id_{suffix}"), getattr(wide, f"id_{suffix}")
        np.testing.assert_array_equal(wide_ids[:, left : left + ids.shape[1]][present], ids[present])
        start, count = getattr(spans, f"start_{suffix}"), getattr(spans, f"count_{suffix}")
        wide_start = getattr(wide, f"start_{suffix}")[:, :size]
        np.testing.assert_array_equal(wide_start, np.where(count > 0, start + left, 0))


@hypothesis.given(BATCHES)
def test_masks_given_late_say_the_same_as_masks_given_early(batch: list[tuple[Side, Side]]) -> None:
    t, s = arguments([t for t, _ in batch]), arguments([s for _, s in batch])
    early, *early_logprobs = align_and_sum(t, s)
    valid, *logprobs = late_masks(vars(t), vars(s))
    np.testing.assert_array_equal(valid, early.valid)
    np.testing.assert_array_equal(logprobs, early_logprobs)


@jax.jit
def late_masks(t: dict[str, Any], s: dict[str, Any]) -> tuple[jax.Array, ...]:
    spans = align_spans(t["end"], s["end"], t["present"], s["present"], t["origin"], s["origin"])
    masks = t["score"], s["score"]
    return valid_spans(spans, *masks), *span_logprobs(spans, t["lp"], s["lp"], *masks)


@hypothesis.given(BATCHES)
def test_coverage_counts_what_lies_in_valid_spans(batch: list[tuple[Side, Side]]) -> None:
    spans, _, _ = align_batch(batch)
    tokens, scored, covered, scored_bytes = 0, 0, 0, 0
    for teacher, student in batch:
        expected = expected_spans(teacher, student)
        begin = teacher.origin
        for slot, k in enumerate(expected.teacher.ids):
            if not teacher.present[slot]:
                continue
            width, begin = teacher.end[slot] - begin, teacher.end[slot]
            if teacher.score[slot]:
                scored, scored_bytes = scored + 1, scored_bytes + width
                if expected.valid[k]:
                    tokens, covered = tokens + 1, covered + width
    coverage = spans.coverage()
    assert [int(x) for x in coverage["tokens_t"]] == [tokens, scored]
    assert [int(x) for x in coverage["bytes_t"]] == [covered, scored_bytes]
