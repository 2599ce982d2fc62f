"""What a student is compared with: a teacher that is run beside it, or a teacher's top ids from a file.

A file is made once and read by every student. It holds, for every completion token, the teacher's k most probable ids
with their log-probabilities *at the temperature of the loss*, and the mass of all other ids: neither follows from the
same numbers at another temperature.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill_jax.logprobs import completion_states, map_token_chunks
from distill_jax.mesh import place_batch
from distill_jax.models.decoder import Decoder, Params, unembed
from distill_jax.sequences import Sequences

# exp of it is 0 in float32, no real logit comes near it, and its products with probabilities stay finite.
LOG_ZERO = -1e4

_FORMAT = "distill_jax top-k targets 1"
_ARRAYS = ("ids", "lp", "tail_lp", "logsumexp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher that is run beside the student, on the same tokens.

    Attributes:
      module: the teacher's decoder.
      params, adapter, scale: as in `models.decoder.apply`; a calibrated teacher is a model and an adapter at its scale.
      vocabulary_hash: of the teacher's tokenizer; must be that of the sequences.
    """

    module: Decoder = dataclasses.field(metadata={"static": True})
    params: Params
    adapter: Params | None = None
    scale: float | jax.Array = 1.0
    vocabulary_hash: str = dataclasses.field(default="", metadata={"static": True})

    def check(self, sequences: Sequences) -> None:
        """Raises ValueError when the sequences are of another vocabulary."""
        _check_vocabulary(sequences, self.vocabulary_hash)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKTargets:
    """A teacher's k most probable ids at every completion token of B rows; what lies in padding has no meaning.

    Attributes:
      ids: i32[B, T, K], the most probable first.
      lp: f32[B, T, K], their log-probabilities at `temperature`; LOG_ZERO for a probability of 0.
      tail_lp: f32[B, T], log of the mass of all other ids; LOG_ZERO if there is none.
      logsumexp: f32[B, T], log sum_v exp(logit_v / temperature): lp + logsumexp are the logits over the temperature.
      temperature: of the distribution.
      vocab_size: V, ids that the distribution is over.
      vocabulary_hash: of the tokenizer that the ids belong to.
    """

    ids: jax.Array
    lp: jax.Array
    tail_lp: jax.Array
    logsumexp: jax.Array
    temperature: float = dataclasses.field(metadata={"static": True})
    vocab_size: int = dataclasses.field(metadata={"static": True})
    vocabulary_hash: str = dataclasses.field(default="", metadata={"static": True})

    def check(self, sequences: Sequences) -> None:
        """Raises ValueError when the sequences are of another vocabulary or shape."""
        _check_vocabulary(sequences, self.vocabulary_hash)
        rows, size = sequences.tokens.shape[0], sequences.completion_size
        if self.tail_lp.shape != (rows, size):
            raise ValueError(
                f"the stored teacher has {self.tail_lp.shape} completion tokens, the sequences ({rows}, {size}); take "
                "the targets of the same rows"
            )


def log_probabilities(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature), f32[..., V], at least LOG_ZERO. What is stored and what it is compared with
    both come from here, so that equal logits give equal numbers."""
    return jnp.maximum(jax.nn.log_softmax(logits.astype(jnp.float32) * (1 / temperature), axis=-1), LOG_ZERO)


def log_mass_outside(lp: jax.Array, inside: jax.Array) -> jax.Array:
    """f32[...]: log of the mass of the ids that are not `inside`, at least LOG_ZERO.

    Summed where it lies: 1 - (mass inside) would lose what is below 1e-7.
    """
    return jnp.maximum(jax.nn.logsumexp(jnp.where(inside, LOG_ZERO, lp), axis=-1), LOG_ZERO)


def make_targets(
    teacher: Teacher,
    sequences: Sequences,
    top_k: int,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    batch_size: int = 16,
    chunk: int = 64,
) -> TopKTargets:
    """The teacher's `TopKTargets` of all completion tokens, by one jitted function for all batches.

    Args:
      teacher: see `Teacher`.
      sequences: N rows (numpy leaves).
      top_k: K, ids a token; file and memory take 8 K + 8 bytes a token.
      temperature: that of the loss, > 0.
      vocab_size: ids that count, those of the teacher's embedding by default; the smaller embedding's when the two
        models pad one vocabulary to different sizes.
      batch_size: rows at one time.
      chunk: tokens of a row whose logits exist at one time.

    Returns:
      Numpy leaves, [N, T, K] and [N, T].

    Raises:
      ValueError: no rows, a size out of range, a temperature that is not positive, another vocabulary.
    """
    teacher.check(sequences)
    rows, most = len(sequences.tokens), teacher.module.spec.vocab_size
    size = most if vocab_size is None else vocab_size
    if not 1 <= size <= most or not 1 <= top_k <= size:
        raise ValueError(
            f"expected 1 <= top_k <= vocab_size <= {most} (the teacher's embedding), got top_k={top_k} and "
            f"vocab_size={vocab_size}"
        )
    if rows < 1 or batch_size < 1 or chunk < 1 or not temperature > 0:
        raise ValueError(
            f"expected at least one row, batch_size and chunk >= 1 and temperature > 0, got {rows} rows, "
            f"batch_size={batch_size}, chunk={chunk}, temperature={temperature}"
        )
    parts = []
    for first in range(0, rows, batch_size):
        # The last batch is filled up with its last row: one shape, one compilation.
        taken = np.minimum(np.arange(first, first + batch_size), rows - 1)
        batch = jax.tree.map(lambda leaf, taken=taken: np.asarray(leaf)[taken], sequences)
        if teacher.module.mesh is not None:
            batch = place_batch(batch, teacher.module.mesh)
        parts.append(jax.device_get(_score(teacher, batch, top_k, temperature, size, chunk)))
    ids, lp, tail_lp, logsumexp = (_host_join(pieces, rows) for pieces in zip(*parts, strict=True))
    return TopKTargets(ids, lp, tail_lp, logsumexp, temperature, size, sequences.vocabulary_hash)


def _host_join(pieces: tuple[Any, ...], rows: int) -> Any:
    """The first `rows` rows of all pieces, on the host: a store may be larger than a device."""
    return np.concatenate(pieces)[:rows]


@functools.partial(jax.jit, static_argnames=("top_k", "temperature", "size", "chunk"))
def _score(
    teacher: Teacher, sequences: Sequences, top_k: int, temperature: float, size: int, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """ids, lp, tail_lp, logsumexp of `TopKTargets`."""
    module, params = teacher.module, teacher.params
    low_rank: dict[str, Any] = {"adapter": teacher.adapter, "scale": teacher.scale}
    hidden, _ = completion_states(module, params, sequences, **low_rank)

    def best(hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        logits = unembed(module, params, hidden, **low_rank)[..., :size]
        lp = log_probabilities(logits, temperature)
        largest, ids = jax.lax.top_k(lp, top_k)
        inside = jnp.put_along_axis(jnp.zeros(lp.shape, bool), ids, True, axis=-1, inplace=False)
        return ids, largest, log_mass_outside(lp, inside), jax.nn.logsumexp(logits / temperature, axis=-1)

    return map_token_chunks(best, (hidden,), chunk, module.mesh)


def save_targets(path: str | os.PathLike[str], targets: TopKTargets, sequences: Sequences) -> None:
    """Writes a safetensors file, whole or not at all; its header says which rows it belongs to.

    Raises:
      ValueError: the targets are not of these sequences' vocabulary or shape.
    """
    targets.check(sequences)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    arrays = {name: np.ascontiguousarray(getattr(targets, name)) for name in _ARRAYS}
    header = {
        "format": _FORMAT,
        "temperature": repr(float(targets.temperature)),
        "vocab_size": str(targets.vocab_size),
        "vocabulary_hash": targets.vocabulary_hash,
        "rows": _digest(sequences),
    }
    try:
        save_file(arrays, temporary, metadata=header)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_targets(path: str | os.PathLike[str], sequences: Sequences) -> TopKTargets:
    """Reads what `save_targets` wrote, for the same rows in the same order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a damaged or foreign file, or one of another vocabulary, shape, or of other rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no targets at {path}; make them with make_targets and save_targets"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header, names = file.metadata() or {}, set(file.keys())
            arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); make the targets again"
        ) from error
    if header.get("format") != _FORMAT or set(arrays) != set(_ARRAYS):
        raise ValueError(
            f"{path} holds {sorted(names)} in format {header.get('format')!r}, expected {sorted(_ARRAYS)} in "
            f"{_FORMAT!r}; make the targets again"
        )
    targets = TopKTargets(
        **arrays,
        temperature=float(header["temperature"]),
        vocab_size=int(header["vocab_size"]),
        vocabulary_hash=header["vocabulary_hash"],
    )
    targets.check(sequences)
    if header["rows"] != _digest(sequences):
        raise ValueError(
            f"{path} belongs to other rows, or to the same in another order; give the sequences it was made from, "
            "or make the targets again"
        )
    return targets


def _digest(sequences: Sequences) -> str:
    """Of the rows and their order; what lies in padding does not count."""
    tokens = np.where(np.asarray(sequences.valid()), np.asarray(sequences.tokens), 0).astype("<i4")
    lengths = np.stack([np.asarray(sequences.prompt_length), np.asarray(sequences.completion_length)])
    layout = f"{tokens.shape} {sequences.prompt_size}".encode()
    return hashlib.sha256(layout + tokens.tobytes() + lengths.astype("<i4").tobytes()).hexdigest()


def _check_vocabulary(sequences: Sequences, vocabulary_hash: str) -> None:
    if sequences.vocabulary_hash != vocabulary_hash:
        raise ValueError(
            f"the sequences are ids of the vocabulary {sequences.vocabulary_hash[:12] or '(none)'}, the teacher's is "
            f"{vocabulary_hash[:12] or '(none)'}; models of different vocabularies "
            "need the cross-tokenizer losses"
        )
