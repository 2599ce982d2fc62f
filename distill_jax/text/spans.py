"""THE alignment kernel: two tokenizers meet on the bytes of the same text.

Each side gives the byte offset just after each of its tokens. A *span* is the finest stretch of text that
both sides cut out with whole tokens: its borders are the offsets at which both have a token end (the
intersection of the two boundary sets, so no token is ever cut). Summed over a span, log-probabilities of two
tokenizers can be compared:

    text      n a ï v e ␣ 1 2         span 0 = "naïve", span 1 = " 12"
    teacher   |---|---|---|-----|     ends 2 4 6 9       ids 0 0 0 1
    student   |-|---|-----|---|-|     ends 1 3 6 8 9     ids 0 0 0 1 1

What a span's number is: the log-probability of *that* token path given *that* token prefix, not the marginal
log-probability of its bytes. Both sides condition on the same bytes at the starts of spans alone, so
distributions may be compared there and nowhere else (`start_t`, `start_s`). Across tokenizers the one
comparable measure of length is the byte: bits per byte = -L / (ln 2 * bytes).

Shapes are static: S = min(Tt, Ts) + 1 holds every possible span and the tail after the last common border.
Everything works a row at a time (scatters and gathers are batched, never flattened over rows), so rows that
lie on different devices need no communication; nothing of size [B, T, S] is built. Cost: O(Tt log Ts + Ts).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from distill_jax.masked import zero_masked

GRAD_CHOICES = ("none", "student", "teacher", "both")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """The spans of B texts; `_t` is the teacher's side with Tt token slots, `_s` the student's with Ts.

    Span k < num_spans[b] ends at the k-th common border. Span num_spans[b] is the tail: the tokens after the
    last common border. They are summed like all others, but the tail is never valid.

    Attributes:
      id_t, id_s: i32[B, Tt], i32[B, Ts]; the span of each token. Absent tokens have S-1.
      num_spans: i32[B]; common borders.
      valid: bool[B, S]; closed, begun at the same byte on both sides, every token scored on both sides.
      start_t, start_s: i32[B, S]; slot of the span's first token, 0 where the span has none.
      count_t, count_s: i32[B, S]; tokens in the span, scored or not.
      bytes: i32[B, S]; width of the span in bytes, 0 from the tail on. With different origins the first
        span's width is counted from the later one.
      score_t, score_s: bool[B, Tt], bool[B, Ts]; tokens that are present and enter sums.
      scored_bytes_t, scored_bytes_s: i32[B]; bytes of those tokens.
    """

    id_t: jax.Array
    id_s: jax.Array
    num_spans: jax.Array
    valid: jax.Array
    start_t: jax.Array
    start_s: jax.Array
    count_t: jax.Array
    count_s: jax.Array
    bytes: jax.Array
    score_t: jax.Array
    score_s: jax.Array
    scored_bytes_t: jax.Array
    scored_bytes_s: jax.Array

    def coverage(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """How much of what is scored lies in valid spans, over the whole batch.

        Returns:
          "tokens_t", "tokens_s", "bytes_t", "bytes_s" -> (amount in valid spans, amount scored), f32[] both.
          Add these pairs over batches and divide once at the end.
        """

        def pair(inside: jax.Array, scored: jax.Array) -> tuple[jax.Array, jax.Array]:
            return zero_masked(inside, self.valid).sum().astype(jnp.float32), scored.sum().astype(jnp.float32)

        return {
            "tokens_t": pair(self.count_t, self.score_t),
            "tokens_s": pair(self.count_s, self.score_s),
            "bytes_t": pair(self.bytes, self.scored_bytes_t),
            "bytes_s": pair(self.bytes, self.scored_bytes_s),
        }


def align_spans(
    end_t: Any,
    end_s: Any,
    present_t: Any = None,
    present_s: Any = None,
    origin_t: Any = None,
    origin_s: Any = None,
    score_t: Any = None,
    score_s: Any = None,
) -> Spans:
    """Spans of two tokenisations of the same texts: the finest common coarsening of their cuts.

    With C the sorted intersection of the two sets of ends, a token that ends at e is in the span
    ``bisect_left(C, e)``. A token of no width (an end that repeats) stays in the span of the token before it.

    Under `jax.jit` shapes alone decide what is compiled. Everything is an integer: nothing is differentiated.

    Args:
      end_t, end_s: int[B, Tt], int[B, Ts]; byte offset just after each token, in the coordinate that both
        sides share (`Tokenizer.byte_ends`). Not decreasing over the present tokens of a row.
      present_t, present_s: bool[B, Tt], bool[B, Ts]; the token lies in that coordinate. False: padding (at
        either end), a special token of one side, the prompt. All True by default.
      origin_t, origin_s: int[B]; the first byte that the side covers, 0 by default. They differ when one side
        was truncated on the left; the first span is not valid then.
      score_t, score_s: bool[B, Tt], bool[B, Ts]; tokens that enter sums. A span that has a token outside is
        not valid. All present tokens by default.

    Returns:
      `Spans` with S = min(Tt, Ts) + 1.

    Raises:
      TypeError: ends or origins that are not integers, masks that are not booleans.
      ValueError: ends that are not [B, T], sides with different B, a mask or an origin of another shape.
    """
    end_t, end_s = _ends("end_t", end_t), _ends("end_s", end_s)
    if end_t.shape[0] != end_s.shape[0]:
        raise ValueError(
            f"end_t has {end_t.shape[0]} rows and end_s has {end_s.shape[0]}; expected the same texts in both"
        )
    present_t = _mask("present_t", present_t, end_t.shape)
    present_s = _mask("present_s", present_s, end_s.shape)
    return _align(
        end_t,
        end_s,
        present_t,
        present_s,
        _origin("origin_t", origin_t, end_t.shape[0]),
        _origin("origin_s", origin_s, end_s.shape[0]),
        present_t & _mask("score_t", score_t, end_t.shape),
        present_s & _mask("score_s", score_s, end_s.shape),
    )


def span_logprobs(
    spans: Spans,
    lp_t: Any,
    lp_s: Any,
    score_t: Any = None,
    score_s: Any = None,
    grad: Literal["none", "student", "teacher", "both"] = "none",
) -> tuple[jax.Array, jax.Array]:
    """L[b, k] = sum of lp[b, t] over the scored tokens t of span k, on each side.

    The tail (span `num_spans`) is summed as well, so that a row of L adds up to the row of lp; multiply by
    `spans.valid`, or by `valid_spans` if masks are given here, before comparing the sides.

    Args:
      spans: from `align_spans`.
      lp_t, lp_s: float[B, Tt], float[B, Ts]; log p(token t given the tokens before it), already shifted.
        What stands at tokens that are not scored is never used: NaN there reaches no value and no gradient.
      score_t, score_s: bool[B, Tt], bool[B, Ts]; sum these tokens alone. They narrow the masks of
        `align_spans` and cannot bring a token back. `valid_spans` tells which spans they leave whole.
      grad: which side is differentiated; the gradient of sum_k w_k L[k] by lp[t] is w[id[t]] at scored
        tokens, else 0. The other side gets `stop_gradient`.

    Returns:
      (L_t, L_s), f32[B, S] both; 0 where nothing is summed.

    Raises:
      TypeError: log-probabilities that are not floating point, masks that are not booleans.
      ValueError: shapes that are not those of the spans, or an unknown `grad`.
    """
    if grad not in GRAD_CHOICES:
        raise ValueError(f"grad must be one of {', '.join(map(repr, GRAD_CHOICES))}, got {grad!r}")
    lp_t, lp_s = _logprobs("lp_t", lp_t, spans.id_t.shape), _logprobs("lp_s", lp_s, spans.id_s.shape)
    if grad in ("none", "student"):
        lp_t = lax.stop_gradient(lp_t)
    if grad in ("none", "teacher"):
        lp_s = lax.stop_gradient(lp_s)
    mask_t, mask_s = _narrowed(spans, score_t, score_s)
    size = spans.valid.shape[1]
    # zero_masked before the sum, not after: 0 * NaN is NaN, and so is the gradient of such a product.
    return (
        _span_sum(zero_masked(lp_t, mask_t), spans.id_t, size),
        _span_sum(zero_masked(lp_s, mask_s), spans.id_s, size),
    )


def valid_spans(spans: Spans, score_t: Any = None, score_s: Any = None) -> jax.Array:
    """bool[B, S]: `spans.valid`, less the spans that have a token outside these masks.

    For masks that are known only after the alignment; `align_spans` given the same masks says the same.

    Args:
      spans: from `align_spans`.
      score_t, score_s: bool[B, Tt], bool[B, Ts]; as in `span_logprobs`.

    Raises:
      TypeError: masks that are not booleans.
      ValueError: masks that do not have the shape of the spans.
    """
    mask_t, mask_s = _narrowed(spans, score_t, score_s)
    size = spans.valid.shape[1]
    whole_t = _span_sum(mask_t.astype(jnp.int32), spans.id_t, size) == spans.count_t
    whole_s = _span_sum(mask_s.astype(jnp.int32), spans.id_s, size) == spans.count_s
    return spans.valid & whole_t & whole_s


# This and `_span_sum` are compiled on their own, so that calls outside of jit are few dispatches.
@jax.jit
def _align(
    end_t: jax.Array,
    end_s: jax.Array,
    present_t: jax.Array,
    present_s: jax.Array,
    origin_t: jax.Array,
    origin_s: jax.Array,
    score_t: jax.Array,
    score_s: jax.Array,
) -> Spans:
    size = min(end_t.shape[1], end_s.shape[1]) + 1
    # Absent tokens repeat the end before them: each row is sorted, and they make no border of their own.
    end_t = lax.cummax(jnp.where(present_t, end_t, -1), axis=1)
    end_s = lax.cummax(jnp.where(present_s, end_s, -1), axis=1)
    closes_t, closes_s = _closing_slots(end_t, end_s)
    num_spans = closes_t.sum(axis=1, dtype=jnp.int32)
    # The span of a token is the number of spans that closed before it.
    order_t = jnp.cumsum(closes_t, axis=1, dtype=jnp.int32) - closes_t
    order_s = jnp.cumsum(closes_s, axis=1, dtype=jnp.int32) - closes_s
    width_t = _widths(end_t, present_t, origin_t)
    width_s = _widths(end_s, present_s, origin_s)
    start_t, count_t, whole_t = _per_span(order_t, present_t, score_t, size)
    start_s, count_s, whole_s = _per_span(order_s, present_s, score_s, size)
    span = lax.broadcasted_iota(jnp.int32, (end_t.shape[0], size), 1)
    # A border is the end of a present token on both sides, so a closed span is never empty.
    closed = span < num_spans[:, None]
    same_begin = (span > 0) | (origin_t == origin_s)[:, None]
    # Closed spans are as wide on both sides, but for bytes before the student's origin that the teacher covers.
    late = jnp.where(span == 0, jnp.maximum(origin_s - origin_t, 0)[:, None], 0)
    width = _span_sum(width_t, order_t, size, indices_are_sorted=True) - late
    return Spans(
        id_t=jnp.where(present_t, order_t, size - 1),
        id_s=jnp.where(present_s, order_s, size - 1),
        num_spans=num_spans,
        valid=closed & same_begin & whole_t & whole_s,
        start_t=start_t,
        start_s=start_s,
        count_t=count_t,
        count_s=count_s,
        bytes=zero_masked(width, closed),
        score_t=score_t,
        score_s=score_s,
        scored_bytes_t=zero_masked(width_t, score_t).sum(axis=1),
        scored_bytes_s=zero_masked(width_s, score_s).sum(axis=1),
    )


def _closing_slots(end_t: jax.Array, end_s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bool[B, Tt], bool[B, Ts]: slots at which a span closes, the same number on both sides.

    A span closes at the last slot of a run of equal ends, if the other side has that end too. (The slot may
    be padding after the token that ends there; that changes no token's span.) The teacher's ends are looked up
    in the student's; where one is found, its place there closes too, so no second search is needed.
    """
    student_size = end_s.shape[1]
    # side="right" minus one: the last of the student's slots whose end is not after this one.
    search = functools.partial(jnp.searchsorted, side="right", method="scan")
    found = jax.vmap(search)(end_s, end_t) - 1
    shared = jnp.take_along_axis(end_s, jnp.maximum(found, 0), axis=1) == end_t
    is_last = jnp.pad(end_t[:, 1:] > end_t[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    closes_t = is_last & shared & (end_t >= 0)

    def mark(slots: jax.Array) -> jax.Array:
        return jnp.zeros(student_size, bool).at[slots].set(True, mode="drop")

    return closes_t, jax.vmap(mark)(jnp.where(closes_t, found, student_size))


def _widths(end: jax.Array, present: jax.Array, origin: jax.Array) -> jax.Array:
    """i32[B, T]: bytes of each token; 0 for absent ones. end: running maximum, i32[B, T]; origin: i32[B]."""
    before = jnp.concatenate([origin[:, None], jnp.maximum(end[:, :-1], origin[:, None])], axis=1)
    return jnp.where(present, jnp.maximum(end - before, 0), 0)


def _per_span(
    order: jax.Array, present: jax.Array, score: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """i32[B, size], i32[B, size], bool[B, size]: first slot and tokens of each span, and are all of them scored?

    order: non-decreasing span ids, i32[B, T].
    """
    count = _span_sum(present.astype(jnp.int32), order, size, indices_are_sorted=True)
    scored = _span_sum(score.astype(jnp.int32), order, size, indices_are_sorted=True)
    slot = lax.broadcasted_iota(jnp.int32, present.shape, 1)
    first = functools.partial(jax.ops.segment_min, num_segments=size, indices_are_sorted=True)
    start = jax.vmap(first)(jnp.where(present, slot, slot.shape[1]), order)
    return jnp.where(count > 0, start, 0), count, count == scored


@functools.partial(jax.jit, static_argnames=("size", "indices_are_sorted"))
def _span_sum(values: jax.Array, ids: jax.Array, size: int, indices_are_sorted: bool = False) -> jax.Array:
    """[B, size]: the sum of values [B, T] over the tokens of each span. Its gradient is one gather.

    The ids of `Spans` are not sorted in rows padded on the left (absent tokens have S-1), hence the default.
    """
    add = functools.partial(jax.ops.segment_sum, num_segments=size, indices_are_sorted=indices_are_sorted)
    return jax.vmap(add)(values, ids)


def _narrowed(spans: Spans, score_t: Any, score_s: Any) -> tuple[jax.Array, jax.Array]:
    """The masks of the alignment and those of a later call, both at once."""
    return (
        spans.score_t & _mask("score_t", score_t, spans.id_t.shape),
        spans.score_s & _mask("score_s", score_s, spans.id_s.shape),
    )


def _ends(name: str, value: Any) -> jax.Array:
    ends = _integers(name, value)
    if ends.ndim != 2 or ends.shape[1] == 0:
        raise ValueError(
            f"{name} must have the shape [B, T] with at least one token slot, got {list(ends.shape)}; give a "
            f"single text a batch dimension ({name}[None]), and an empty one a slot with present = False"
        )
    return ends


def _origin(name: str, value: Any, rows: int) -> jax.Array:
    if value is None:
        return jnp.zeros(rows, jnp.int32)
    origin = _integers(name, value)
    _check_shape(name, origin, (rows,))
    return origin


def _mask(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    if value is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(value)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be boolean, got {mask.dtype}; write {name} != 0 if it holds zeros and ones"
        )
    _check_shape(name, mask, shape)
    return mask


def _logprobs(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    logprobs = jnp.asarray(value)
    if not jnp.issubdtype(logprobs.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point log-probabilities, got {logprobs.dtype}")
    _check_shape(name, logprobs, shape)
    return logprobs.astype(jnp.float32)


def _integers(name: str, value: Any) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integer byte offsets, got {array.dtype}")
    return array.astype(jnp.int32)


def _check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)} of its side, got {list(array.shape)}")
