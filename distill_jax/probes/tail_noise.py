"""How much of the KL is tail? And is it the tail of the most frequent tokens?

For prefix s, teacher p = pi_T(.|s), student q = pi_S(.|s), with the non-negative terms
``d_v = p_v log(p_v / q_v) - p_v + q_v`` whose sum is the exact KL:

    KL_k(s)        = sum of d_v over the k outcomes that p finds most probable     (reverse: by q, with p and q swapped)
    tail share(k)  = 1 - sum_s KL_k(s) / sum_s KL_V(s)

The trap: much of the signal lies where the teacher's probabilities are noise, above all at tokens that are everywhere
(articles, commas); it shows as a share of the frequent tokens that grows with k. Plain partial sums of p log(p/q) would
not do: they have both signs, and a truncated one may exceed the whole.

Source: the trap, *Distillation Traps and Guards*, arXiv 2604.18963, section 4; the terms are the generalised KL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models.model import Model
from distill_jax.probes.distributions import kl_terms, positions
from distill_jax.probes.pairs import ProbeConfig, excluded_note
from distill_jax.probes.subjects import BYTE_OUTCOMES, Subject, as_subject, same_vocabulary
from distill_jax.probes.texts import Texts, prompt_index
from distill_jax.probes.values import Bootstrap, Value, sum_by, undefined

HEADS = (16, 64)  # ranks at which the tail's share is reported


@dataclasses.dataclass(frozen=True)
class TailNoise:
    """What `measure` found. Curves are keyed by k, "1", "2", "4", ... and the number of outcomes.

    Attributes:
      unit: "token", or "byte" across vocabularies. outcomes: V, or 258.
      positions: how many distributions were compared.
      forward_kl, reverse_kl: KL(p || q), KL(q || p), nats a position.
      forward_curve, reverse_curve: KL_k, nats a position.
      forward_tail, reverse_tail: tail share at 16 and 64.
      teacher_tail_mass: the teacher's probability beyond its 16 and 64 most probable outcomes.
      frequent_share: "16", "all": share of KL_16 and of KL_V at positions that go on with one of the most frequent
        types of these texts.
      frequent_growth: the second over the first; above 1, the frequent types' share grows with k. Undefined where the
        texts have no other types.
      top_fifth_share: share of a text's KL in the fifth of its positions that has most, mean over texts.
      notes: what could not be measured.
    """

    unit: str
    outcomes: int
    positions: int
    forward_kl: Value
    reverse_kl: Value
    forward_curve: Mapping[str, Value]
    reverse_curve: Mapping[str, Value]
    forward_tail: Mapping[str, Value]
    reverse_tail: Mapping[str, Value]
    teacher_tail_mass: Mapping[str, Value]
    frequent_share: Mapping[str, Value]
    frequent_growth: Value
    top_fifth_share: Value
    notes: tuple[str, ...] = ()


def ranks_of(outcomes: int) -> tuple[int, ...]:
    """1, 2, 4, ... below the number of outcomes, and that number."""
    powers = [1 << i for i in range(outcomes.bit_length()) if 1 << i < outcomes]
    return (*powers, outcomes)


@dataclasses.dataclass(frozen=True)
class TailTerms:
    """The reduction: sorted once by p and once by q, then added up between the ranks.

    Returns f32[B, c, len(ranks)] of KL_k forward and reverse, and the teacher's mass of its k most probable outcomes.
    """

    ranks: tuple[int, ...]

    def __call__(self, lp: jax.Array, lq: jax.Array) -> dict[str, jax.Array]:
        forward, mass = self._cumulative(lp, kl_terms(lp, lq), jnp.exp(lp))
        (reverse,) = self._cumulative(lq, kl_terms(lq, lp))
        return {"forward": forward, "reverse": reverse, "mass": mass}

    def _cumulative(self, by: jax.Array, *terms: jax.Array) -> tuple[jax.Array, ...]:
        # Ties keep the order of the vocabulary (a stable sort), so the result is one whatever the mesh.
        _, *ordered = jax.lax.sort((-by, *terms), dimension=-1, num_keys=1, is_stable=True)
        edges = list(zip((0, *self.ranks[:-1]), self.ranks, strict=True))
        return tuple(
            jnp.cumsum(jnp.stack([x[..., a:b].sum(-1) for a, b in edges], axis=-1), axis=-1) for x in ordered
        )


def measure(
    teacher: Model | Subject,
    student: Model | Subject,
    batch: Texts,
    *,
    config: ProbeConfig | None = None,
    frequent: int = 50,
) -> TailNoise:
    """Measures the tail along these texts: the teacher's, for what off-policy distillation sees, or the student's.

    Args:
      teacher, student: models on one mesh.
      batch: texts, each row a prefix at every token.
      config: see `ProbeConfig`.
      frequent: how many of the most frequent types are set apart.

    Raises:
      ValueError: frequent < 1, or what `pairs.encode_pair` raises.
    """
    if frequent < 1:
        raise ValueError(f"frequent must be at least 1, got {frequent}")
    teacher, student, config = as_subject(teacher), as_subject(student), config or ProbeConfig()
    outcomes = min(teacher.model.spec.vocab_size, student.model.spec.vocab_size)
    ranks = ranks_of(outcomes if same_vocabulary(teacher, student) else BYTE_OUTCOMES)
    found = positions(teacher, student, batch, TailTerms(ranks), config)
    (index,), prompts = prompt_index(batch)
    prompt = index[found.row]
    bootstrap = Bootstrap(prompts, config.resamples, config.seed)
    forward, reverse, mass = (
        sum_by(prompt, np.asarray(found.values[name], np.float64), prompts)
        for name in ("forward", "reverse", "mass")
    )
    count = sum_by(prompt, np.ones(len(prompt)), prompts)
    at = {head: next(i for i, rank in enumerate(ranks) if rank >= min(head, ranks[-1])) for head in HEADS}

    def tail(sums: np.ndarray) -> dict[str, Value]:
        whole = sums[:, -1]
        return {str(head): bootstrap.ratio(whole - sums[:, i], whole) for head, i in at.items()}

    share, growth, notes = _frequent(
        found.target, found.values["forward"], prompt, at[16], frequent, bootstrap
    )
    if not len(found.row):
        notes = ("there is no position to compare: all completions are empty and did not end",)
    return TailNoise(
        unit=found.unit,
        outcomes=found.outcomes,
        positions=len(found.row),
        forward_kl=bootstrap.ratio(forward[:, -1], count),
        reverse_kl=bootstrap.ratio(reverse[:, -1], count),
        forward_curve={str(k): bootstrap.ratio(forward[:, i], count) for i, k in enumerate(ranks)},
        reverse_curve={str(k): bootstrap.ratio(reverse[:, i], count) for i, k in enumerate(ranks)},
        forward_tail=tail(forward),
        reverse_tail=tail(reverse),
        teacher_tail_mass={
            str(head): bootstrap.ratio(np.maximum(count - mass[:, i], 0.0), count) for head, i in at.items()
        },
        frequent_share=share,
        frequent_growth=growth,
        top_fifth_share=_top_fifth(found.row, found.values["forward"][:, -1], index, bootstrap),
        notes=(*notes, *excluded_note(found.excluded, "texts")),
    )


def _frequent(
    target: np.ndarray,
    forward: np.ndarray,
    prompt: np.ndarray,
    at16: int,
    frequent: int,
    bootstrap: Bootstrap,
) -> tuple[dict[str, Value], Value, tuple[str, ...]]:
    """Share of the most frequent types in KL_16 and in KL_V, and the growth from one to the other."""
    types, inverse, counts = np.unique(target, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(types), bool)
    # Ties by id: the order of the texts must not choose.
    chosen[np.lexsort((types, -counts))[:frequent]] = True
    of_frequent = chosen[inverse.reshape(-1)] if len(target) else np.zeros(0, bool)
    pairs = {}
    for name, column in (("16", forward[:, at16]), ("all", forward[:, -1])):
        column = np.asarray(column, np.float64)
        part = sum_by(prompt, np.where(of_frequent, column, 0.0), bootstrap.prompts)
        pairs[name] = (part, sum_by(prompt, column, bootstrap.prompts))
    share = {name: bootstrap.ratio(*pair) for name, pair in pairs.items()}
    (part16, whole16), (part, whole) = pairs["16"], pairs["all"]

    def growth(weights: np.ndarray) -> np.ndarray:
        return (part @ weights) / (whole @ weights) / ((part16 @ weights) / (whole16 @ weights))

    note = f"the texts have {len(types)} types in all, so the {frequent} most frequent ones are everything"
    if len(types) <= frequent:
        return share, undefined(int((whole > 0).sum())), (note,)
    return share, bootstrap.estimate(growth, int((whole > 0).sum())), ()


def _top_fifth(row: np.ndarray, kl: np.ndarray, index: np.ndarray, bootstrap: Bootstrap) -> Value:
    """Mean over texts of the share of KL in the largest fifth of positions (rounded up)."""
    shares, of = [], []
    for text in np.unique(row):
        own = np.sort(np.asarray(kl[row == text], np.float64))[::-1]
        if own.sum() > 0:
            shares.append(own[: -(-len(own) // 5)].sum() / own.sum())
            of.append(index[text])
    prompt = np.array(of, np.int64)
    counts = sum_by(prompt, np.ones(len(prompt)), bootstrap.prompts)
    return bootstrap.ratio(sum_by(prompt, np.array(shares), bootstrap.prompts), counts)
