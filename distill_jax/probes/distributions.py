"""Two models' distributions along a text, reduced on the device: nothing of size [B, T, V] exists.

**One vocabulary.** Exact: the next-token distributions before every token. (If one embedding has spare rows, both are
over the common ids, renormalised.)

**Two vocabularies.** Only at the starts of spans, as distributions of the same events: the *next byte*. A token says
more than its first byte, but what it says next is not an event of the other model: "t" may still become "the". Summed
over the tokens that begin with a byte, both models give that byte's probability (given the tokens before it), and the
end of the text is one more outcome. By the data processing inequality such a KL is a lower bound of one over longer
continuations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.mesh import constrain, place_batch
from distill_jax.models.decoder import Decoder, Params, apply, unembed
from distill_jax.probes.pairs import ProbeConfig, encode_pair
from distill_jax.probes.subjects import BYTE_OUTCOMES, Subject, byte_classes, row_batches, rows_on_device
from distill_jax.probes.texts import Texts
from distill_jax.sequences import Sequences

# A byte that no token of a vocabulary begins with would make a KL infinite; it counts as this probable instead.
FLOOR = 1e-30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """One model's share of a comparison.

    params, adapter, scale: as in `models.decoder.apply`. sequences: B rows. slots: i32[B, S], completion tokens whose
    distributions are compared. classes: i32[V], outcome of each token; None: a token is its own outcome.
    """

    params: Params
    adapter: Params | None
    scale: Any
    sequences: Sequences
    slots: Any
    classes: Any


# f32[B, c, K] log-probabilities of teacher and student over K outcomes -> a pytree of [B, c, ...]; hashable, so that
# equal reductions share one compilation.
Reduction = Callable[[jax.Array, jax.Array], Any]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def compare_distributions(
    modules: tuple[Decoder, Decoder],
    outcomes: int,
    reduction: Reduction,
    chunk: int,
    teacher: Side,
    student: Side,
) -> Any:
    """`reduction` of the two distributions at each compared position.

    Args:
      modules: of teacher and student.
      outcomes: K.
      reduction: see `Reduction`.
      chunk: positions of a row whose logits exist at one time.
      teacher, student: with the same B and S.

    Returns:
      The reduction's pytree, [B, S, ...]. Positions that hold nothing to compare hold anything; mask them.
    """
    hidden = tuple(_hidden_before(m, side) for m, side in zip(modules, (teacher, student), strict=True))
    size = teacher.slots.shape[1]
    count = math.ceil(size / chunk)
    width = math.ceil(size / count)

    def split(x: jax.Array, module: Decoder) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * width - size), (0, 0)))
        x = jnp.moveaxis(x.reshape(x.shape[0], count, width, x.shape[2]), 1, 0)
        return constrain(x, module.mesh, (None, "batch", None, None))

    def reduce(pieces: tuple[jax.Array, jax.Array]) -> Any:
        logprobs = [
            _outcome_logprobs(
                unembed(module, side.params, piece, adapter=side.adapter, scale=side.scale),
                side.classes,
                outcomes,
            )
            for module, side, piece in zip(modules, (teacher, student), pieces, strict=True)
        ]
        return reduction(*logprobs)

    reduced = jax.lax.map(reduce, (split(hidden[0], modules[0]), split(hidden[1], modules[1])))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * width, *x.shape[3:])[:, :size], reduced
    )


def _hidden_before(module: Decoder, side: Side) -> jax.Array:
    """[B, S, D]: the hidden state that predicts the completion token in each of the side's slots."""
    sequences = jax.tree.map(jnp.asarray, side.sequences)
    valid = sequences.valid()
    tokens = jnp.where(valid, sequences.tokens, 0)
    hidden, _ = apply(
        module, side.params, tokens, sequences.positions(), valid, adapter=side.adapter, scale=side.scale
    )
    # Token 0 is predicted by the prompt's last token, which stands before the prompt's padding.
    before = jnp.where(
        side.slots == 0, sequences.prompt_length[:, None] - 1, sequences.prompt_size + side.slots - 1
    )
    return jnp.take_along_axis(hidden, before[..., None], axis=1)


def _outcome_logprobs(logits: jax.Array, classes: jax.Array | None, outcomes: int) -> jax.Array:
    """f32[B, c, K] from logits [B, c, V]: by class where there are classes, else over the first K ids."""
    if classes is None:
        return jax.nn.log_softmax(logits[..., :outcomes], axis=-1)
    probability = jnp.moveaxis(jax.nn.softmax(logits, axis=-1), -1, 0)
    mass = jax.ops.segment_sum(probability, classes, num_segments=outcomes)
    return jnp.log(jnp.maximum(jnp.moveaxis(mass, 0, -1), FLOOR))


def kl_terms(lp: jax.Array, lq: jax.Array) -> jax.Array:
    """d_v = p_v log(p_v / q_v) - p_v + q_v >= 0; their sum over all outcomes is KL(p || q), partial sums only rise.

    (The generator of the generalised KL, Csiszar 1975; raw p log(p/q) has terms of both signs.) lp, lq: [..., K].
    """
    p, q = jnp.exp(lp), jnp.exp(lq)
    return jnp.maximum(p * (lp - lq) - p + q, 0.0)


@dataclasses.dataclass(frozen=True)
class Positions:
    """The compared positions of N texts, in one list.

    Attributes:
      row: i64[M], the text of each; place: f64[M], where in it, 0 at its first compared position, 1 at its last.
      target: i64[M], the outcome that the text goes on with there: a token id, or a byte.
      values: the reduction's pytree, [M, ...].
      unit: "token" or "byte", what the outcomes are. outcomes: how many.
      excluded: bool[N], texts that the tokenizers do not give back.
    """

    row: np.ndarray
    place: np.ndarray
    target: np.ndarray
    values: Any
    unit: str
    outcomes: int
    excluded: np.ndarray


def positions(
    teacher: Subject, student: Subject, texts: Texts, reduction: Reduction, config: ProbeConfig
) -> Positions:
    """Compares the two models' next-token (across vocabularies: next-byte) distributions along texts.

    Raises:
      ValueError: models on different meshes, texts that cannot be aligned or do not fit; see `encode_pair`.
    """
    pair = encode_pair(teacher, student, texts, config)
    subjects, same = (teacher, student), pair.spans is None
    sizes = [subject.model.spec.vocab_size for subject in subjects]
    outcomes = min(sizes) if same else BYTE_OUTCOMES
    classes = [None if same else byte_classes(subject) for subject in subjects]
    pieces = []
    batches = row_batches(len(texts), config.batch_size, teacher)
    for rows in batches:
        sides = []
        for at, subject in enumerate(subjects):
            slots = pair.slots[at][rows]
            sequences = rows_on_device(pair.encoded[at].sequences, rows, subject)
            if subject.model.mesh is not None:
                slots = place_batch(slots, subject.model.mesh)
            sides.append(
                Side(subject.model.params, subject.adapter, subject.multiplier, sequences, slots, classes[at])
            )
        modules = (teacher.model.module, student.model.module)
        pieces.append(
            jax.device_get(
                compare_distributions(modules, outcomes, reduction, config.chunk, sides[0], sides[1])
            )
        )
    values = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(texts)][pair.valid], *pieces)
    row, slot = np.nonzero(pair.valid)
    order = np.cumsum(pair.valid, axis=1)[row, slot] - 1
    last = pair.valid.sum(axis=1)[row] - 1
    completion = pair.encoded[0].sequences.tokens[:, pair.encoded[0].sequences.prompt_size :]
    target = np.asarray(completion)[row, pair.slots[0][row, slot]]
    if not same:
        target = byte_classes(teacher)[target]
    return Positions(
        row,
        order / np.maximum(last, 1),
        target.astype(np.int64),
        values,
        "token" if same else "byte",
        outcomes,
        pair.excluded,
    )
