"""Cross-tokenizer alignment: texts to span sums, and the kernel alone.

    python -m benchmarks.align [--sequences 1000] [--tokens 256] [--repeats 7] [--kernel-only]

Part 1, a real pair of tokenizers: encode the same texts with both, take byte ends, align. Texts are docstrings of the
standard library and sums with characters outside of ASCII, in pieces of 256 tokens of the student. Encoding is the
bound of this part: any aligner has to do it.

Part 2, the kernel on generated rows: spans and sums forward (every field of `Spans` is written), and the gradient
by both sides (nothing but the gradient is). The bound is reading the arguments and writing the results once, at
the memory bandwidth measured in the same run.

Beside both stand two ways without any of this library, checked to find as many spans: a plain Python walk with two
pointers, and `numpy.intersect1d`, which finds the borders and sums nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# One thread, so that the figures can be compared from machine to machine; a value set outside is kept.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Timing, dispatch_bound_s, machine, measure_together, memory_bound_gbs
from distill_jax.models.packages import PACKAGE_MODELS, find_package_model
from distill_jax.text.spans import Spans, align_spans, span_logprobs
from distill_jax.text.tokenizers import Tokenizer

KERNEL_SHAPES = ((32, 512), (32, 2048), (8, 8192))  # (B, T)


@jax.jit
def forward(end_t, end_s, present_t, present_s, lp_t, lp_s) -> tuple[Spans, jax.Array, jax.Array]:
    spans = align_spans(end_t, end_s, present_t, present_s)
    return spans, *span_logprobs(spans, lp_t, lp_s)


@jax.jit
def forward_backward(end_t, end_s, present_t, present_s, lp_t, lp_s) -> tuple[jax.Array, jax.Array]:
    """Gradient of the squared differences of span sums by both sides' log-probabilities."""

    def loss(lp_t: jax.Array, lp_s: jax.Array) -> jax.Array:
        spans = align_spans(end_t, end_s, present_t, present_s)
        logprob_t, logprob_s = span_logprobs(spans, lp_t, lp_s, grad="both")
        return (jnp.square(logprob_t - logprob_s) * spans.valid).sum()

    return jax.grad(loss, argnums=(0, 1))(lp_t, lp_s)


def walk(
    end_t: list[int], end_s: list[int], lp_t: list[float], lp_s: list[float]
) -> list[tuple[float, float]]:
    """The plain way: two pointers, a span closed where the ends agree, sums of both sides on the way."""
    spans = []
    t = s = 0
    sum_t = sum_s = 0.0
    while t < len(end_t) and s < len(end_s):
        border_t, border_s = end_t[t], end_s[s]
        if border_t <= border_s:
            sum_t += lp_t[t]
            t += 1
        if border_s <= border_t:
            sum_s += lp_s[s]
            s += 1
        if border_t == border_s:
            while t < len(end_t) and end_t[t] == border_t:  # tokens of no width stay with the token before
                sum_t += lp_t[t]
                t += 1
            while s < len(end_s) and end_s[s] == border_s:
                sum_s += lp_s[s]
                s += 1
            spans.append((sum_t, sum_s))
            sum_t = sum_s = 0.0
    return spans


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(ends i32[B, T], presence bool[B, T]), right-padded to a multiple of 64."""
    size = -(-max(len(row) for row in rows) // 64) * 64
    ends, present = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
    for index, row in enumerate(rows):
        ends[index, : len(row)] = row
        present[index, : len(row)] = True
    return ends, present


def texts_of_the_standard_library() -> str:
    """Docstrings, read from the sources and never imported, between sums with characters outside of ASCII."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    rng = np.random.default_rng(0)
    for x, y in rng.integers(0, 999, (2000, 2)):
        texts.append(
            f"Question: what is {x} × {y} + 1? Answer: {x} × {y} = {x * y}, so {x * y + 1} – café 数学."
        )
    texts = [text for text in texts if len(text) > 80]
    return "\n".join(texts[index] for index in rng.permutation(len(texts)))


def benchmark_texts(
    teacher: Tokenizer, student: Tokenizer, sequences: int, tokens: int, repeats: int
) -> None:
    """Part 1."""
    ids = student.encode(texts_of_the_standard_library())
    count = min(sequences, len(ids) // tokens)
    texts = [student.decode(ids[index * tokens : (index + 1) * tokens]) for index in range(count)]

    def encode(tokenizer: Tokenizer) -> list[np.ndarray]:
        return [tokenizer.byte_ends(row) for row in tokenizer.encode_batch(texts)]

    def align(rows_t: list[np.ndarray], rows_s: list[np.ndarray]) -> tuple[Spans, jax.Array, jax.Array]:
        (end_t, present_t), (end_s, present_s) = padded(rows_t), padded(rows_s)
        zeros = np.zeros(end_t.shape, np.float32), np.zeros(end_s.shape, np.float32)
        return forward(end_t, end_s, present_t, present_s, *zeros)

    rows_t, rows_s = encode(teacher), encode(student)
    lists = [
        (t.tolist(), s.tolist(), [0.0] * len(t), [0.0] * len(s)) for t, s in zip(rows_t, rows_s, strict=True)
    ]
    spans, _, _ = align(rows_t, rows_s)
    if spans.num_spans.tolist() != [len(walk(*row)) for row in lists]:
        raise AssertionError("the kernel and the plain walk disagree about the number of spans")
    timings = measure_together(
        {
            "encode, teacher": lambda: teacher.encode_batch(texts),
            "encode, student": lambda: student.encode_batch(texts),
            "encode both, byte ends, align": lambda: align(encode(teacher), encode(student)),
            "pad, copy and align": lambda: align(rows_t, rows_s),
            "plain Python walk": lambda: [walk(*row) for row in lists],
            "numpy.intersect1d": lambda: [np.intersect1d(t, s) for t, s in zip(rows_t, rows_s, strict=True)],
        },
        repeats,
    )
    coverage = {name: float(inside / scored) for name, (inside, scored) in spans.coverage().items()}
    one_to_one = float(((spans.count_t == 1) & (spans.count_s == 1) & spans.valid).sum() / spans.valid.sum())
    print(
        f"{count} texts of {tokens} student tokens, {np.mean([len(row) for row in rows_t]):.1f} teacher tokens; "
        f"{float(spans.num_spans.mean()):.1f} spans a text, {one_to_one:.1%} one to one; "
        f"coverage {coverage['bytes_t']:.4f} of bytes, {coverage['tokens_t']:.4f} of tokens"
    )
    print_timings(timings)
    whole, ours = timings["encode both, byte ends, align"], timings["pad, copy and align"]
    bound = timings["encode, teacher"].median + timings["encode, student"].median
    print(f"  encoding both alone is {bound / whole.median:.0%} of the whole (its bound)")
    print(
        f"  the alignment is {timings['plain Python walk'].median / ours.median:.1f} times as fast as the walk,"
    )
    print(f"  {timings['numpy.intersect1d'].median / ours.median:.1f} times as fast as numpy.intersect1d")


def generated_rows(rows: int, tokens: int) -> tuple[np.ndarray, ...]:
    """(end_t, end_s, present_t, present_s, lp_t, lp_s): 70 % of the ends are common to both sides."""
    rng = np.random.default_rng(0)
    common = round(0.7 * tokens)
    end_t, end_s = np.empty((2, rows, tokens), np.int32)
    for row in range(rows):
        places = 1 + rng.permutation(5 * tokens)
        end_t[row] = np.sort(places[:tokens])
        end_s[row] = np.sort(np.concatenate([places[:common], places[tokens : 2 * tokens - common]]))
    present = np.ones((rows, tokens), bool)
    lp_t, lp_s = -rng.random((2, rows, tokens), np.float32)
    return end_t, end_s, present, present, lp_t, lp_s


def benchmark_kernel(rows: int, tokens: int, repeats: int) -> None:
    """Part 2, one shape."""
    arguments = generated_rows(rows, tokens)
    on_device = jax.device_put(arguments)
    end_t, end_s, _, _, lp_t, lp_s = arguments
    lists = list(zip(end_t.tolist(), end_s.tolist(), lp_t.tolist(), lp_s.tolist(), strict=True))
    spans, logprob_t, _ = forward(*on_device)
    for row, sides in enumerate(lists):
        expected = np.array([sum_t for sum_t, _ in walk(*sides)], np.float32)
        np.testing.assert_allclose(logprob_t[row, : len(expected)], expected, rtol=1e-5, atol=1e-6)
    timings = measure_together(
        {
            "forward": lambda: forward(*on_device),
            "forward and backward": lambda: forward_backward(*on_device),
            "plain Python walk": lambda: [walk(*row) for row in lists],
            "numpy.intersect1d": lambda: [np.intersect1d(t, s) for t, s in zip(end_t, end_s, strict=True)],
        },
        repeats,
        at_least=0.05,
    )
    print(f"B = {rows}, T = {tokens} on both sides, {float(spans.num_spans.mean()):.0f} spans a row")
    print_timings(timings)
    for name, function in (("forward", forward), ("forward and backward", forward_backward)):
        moved = sum(array.nbytes for array in jax.tree.leaves((arguments, function(*on_device))))
        bound = max(moved / 1e9 / memory_bound_gbs(), dispatch_bound_s())
        median = timings[name].median
        print(
            f"  {name}: {timings['plain Python walk'].median / median:.1f} times as fast as the walk, "
            f"{timings['numpy.intersect1d'].median / median:.1f} times as fast as numpy.intersect1d; "
            f"{median / bound:.0f} times the bound of {bound * 1e6:.0f} µs ({moved / 1e6:.2f} MB moved once)"
        )


def print_timings(timings: dict[str, Timing]) -> None:
    for name, timing in timings.items():
        print(f"  {name:32s} {timing}")


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """A demo model's name or the path of a GGUF file."""
    path = find_package_model(name_or_path) if name_or_path in PACKAGE_MODELS else Path(name_or_path)
    return Tokenizer.from_gguf(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"{' or '.join(sorted(PACKAGE_MODELS))}, or the path of a GGUF file"
    parser.add_argument("--teacher", default="gemma3-270m", help=names)
    parser.add_argument("--student", default="smollm2-135m", help=names)
    parser.add_argument("--sequences", type=int, default=1000, help="texts of part 1")
    parser.add_argument("--tokens", type=int, default=256, help="student tokens a text")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernel-only", action="store_true", help="part 2 alone; needs no tokenizers")
    options = parser.parse_args()
    print(machine())
    print(
        f"memory bandwidth {memory_bound_gbs():.1f} GB/s, an empty jitted call {dispatch_bound_s() * 1e6:.0f} µs"
    )
    if not options.kernel_only:
        print(f"\nteacher {options.teacher}, student {options.student}")
        tokenizers = load_tokenizer(options.teacher), load_tokenizer(options.student)
        benchmark_texts(*tokenizers, options.sequences, options.tokens, options.repeats)
    for rows, tokens in KERNEL_SHAPES:
        print()
        benchmark_kernel(rows, tokens, options.repeats)


if __name__ == "__main__":
    main()
