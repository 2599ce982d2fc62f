"""How the probes are run: what a config's `probes` and `probe_suite` hold."""

from __future__ import annotations

import dataclasses

from distill_jax.probes.overconfidence import CONFIDENCES, Confidence

PROBES = ("tail_noise", "off_policy", "gap", "overconfidence", "self_correction", "decoding")


def choose_probes(text: str) -> tuple[str, ...]:
    """Probes of a config's `probes`: "none", "all", or names such as "gap,decoding"; in the order of `PROBES`.

    Raises:
      ValueError: a probe that does not exist.
    """
    if text in ("none", "all"):
        return PROBES if text == "all" else ()
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PROBES]
    if unknown:
        raise ValueError(f"probes names {unknown}; expected 'none', 'all', or some of {', '.join(PROBES)}")
    return tuple(probe for probe in PROBES if probe in names)


@dataclasses.dataclass(frozen=True)
class ProbeSuite:
    """Settings of the probes.

    Attributes:
      problems: validation problems that teacher and student answer: what the intervals are over.
      samples: the student's answers to each; the teacher gives one.
      temperature: of all of them.
      arms: teachers that are probed; () for the original and every calibrated one.
      kinds: kinds of student; () for all.
      distil: train the students that are missing, at the default budget; otherwise they must be there.
      frequent: how many of the most frequent tokens the tail probe sets apart.
      answer_mark: what stands before the final answer in a completion of the task.
      confidence: of the overconfidence probe, one of `probes.overconfidence.CONFIDENCES`. Not the probability of the
        answer's tokens by default: after its working, a model copies the answer, and is sure of that.
      unaligned_limit: largest share of texts that the tokenizers may fail to give back byte for byte; they are left
        out, and the probe says how many.
      batch_size, chunk: see `probes.pairs.ProbeConfig`.
    """

    problems: int = 64
    samples: int = 4
    temperature: float = 1.0
    arms: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    distil: bool = False
    frequent: int = 50
    answer_mark: str = "####"
    confidence: Confidence = "self_consistency"
    unaligned_limit: float = 0.5
    batch_size: int = 64
    chunk: int = 16

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "frequent", "batch_size", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}: probes read samples")
        if not self.answer_mark:
            raise ValueError("answer_mark must not be empty")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence must be one of {CONFIDENCES}, got {self.confidence!r}")
        if self.confidence == "self_consistency" and self.samples < 2:
            raise ValueError(
                f"confidence 'self_consistency' compares answers to one problem: samples must be 2 or more, got "
                f"{self.samples}"
            )
        if not 0.0 <= self.unaligned_limit < 1.0:
            raise ValueError(f"unaligned_limit is a share in [0, 1), got {self.unaligned_limit}")
