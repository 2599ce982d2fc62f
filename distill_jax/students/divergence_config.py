"""What a student's loss is made of: which divergence, on which ids, and its weight beside the cross-entropy."""

from __future__ import annotations

import dataclasses
import math

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
SUPPORTS = ("full", "teacher_topk", "student_topk", "union")
TAILS = ("bucket", "bregman", "renormalise")
# A weight that is nearer to 0 or 1 can't be told from it in float32.
_CLOSEST = 1e-6


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence between the teacher's p and the student's q at one position; formulas in `students.divergences`.

    Attributes:
      kind: one of KINDS.
      beta: of "jsd", in [0, 1]: the teacher's weight in the mixture (the convention of TRL). 0 is the forward KL and 1
        the reverse KL, exactly; just beside the ends the divergence itself vanishes, see `normalize_beta`.
      normalize_beta: divides "jsd" by beta (1 - beta), so that beta moves the shape and not the step size: the ends
        become limits, and the middle 4 times the JSD.
      skew: of the skewed kinds, in (0, 1): how much of the other distribution is mixed in (alpha of DistiLLM).
      support: "full"; or the `top_k` most probable ids of the teacher, of the student, or of either. The forward KL
        wants the teacher's, the reverse KL the student's: mass that the student has outside of the teacher's costs
        next to nothing. A stored teacher (`students.targets`) has its own ids only.
      top_k: k of a top-k support, at least 1; 0 with "full".
      tail: what becomes of the ids outside a top-k support. "bucket" joins them into one more id; "bregman" leaves
        them out, and compares what is left without normalising it; "renormalise" compares the two distributions given
        that the id lies in the support, and is blind to how probable that is. With "full", "bucket".
      temperature: both logits are divided by it in the loss. (That of sampling belongs to the sampler.)
      temperature_squared: multiplies by temperature^2, which keeps gradients as large as at temperature 1.
      entry_clip: most that one id adds, in nats; None for no limit. Each id adds something >= 0, so a clipped sum is
        >= 0 too.

    Raises:
      ValueError: a field out of range, or set where the kind or the support has no use for it.
    """

    kind: str = "forward_kl"
    beta: float | None = None
    normalize_beta: bool = False
    skew: float | None = None
    support: str = "full"
    top_k: int = 0
    tail: str = "bucket"
    temperature: float = 1.0
    temperature_squared: bool = True
    entry_clip: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("support", self.support, SUPPORTS),
            ("tail", self.tail, TAILS),
        ):
            if value not in known:
                raise ValueError(f"divergence {name} must be one of {known}, got {value!r}")
        self._check_shape()
        if self.support == "full":
            if self.top_k or self.tail != "bucket":
                raise ValueError(
                    f"support 'full' has no top_k and leaves no tail, got top_k={self.top_k} and tail={self.tail!r}; "
                    "choose 'teacher_topk', 'student_topk' or 'union', or leave both at their defaults"
                )
        elif self.top_k < 1:
            raise ValueError(f"support {self.support!r} needs a top_k of at least 1, got {self.top_k}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"the loss temperature must be a positive number, got {self.temperature}")
        if self.entry_clip is not None and not self.entry_clip > 0:
            raise ValueError(f"entry_clip must be positive, or None for no limit, got {self.entry_clip}")

    def _check_shape(self) -> None:
        """beta with "jsd" alone, skew with the skewed kinds alone."""
        if self.kind == "jsd":
            if self.beta is None or not (self.beta in (0, 1) or _CLOSEST <= self.beta <= 1 - _CLOSEST):
                raise ValueError(
                    f"kind 'jsd' needs a beta in [0, 1], and within the ends at least {_CLOSEST} from them, got "
                    f"{self.beta}"
                )
        elif self.beta is not None or self.normalize_beta:
            raise ValueError(
                f"kind {self.kind!r} has no beta, got beta={self.beta} and normalize_beta={self.normalize_beta}; "
                "choose kind 'jsd'"
            )
        if self.kind.startswith("skew"):
            if self.skew is None or not _CLOSEST <= self.skew <= 1 - _CLOSEST:
                raise ValueError(
                    f"kind {self.kind!r} needs a skew in [{_CLOSEST}, {1 - _CLOSEST}], got {self.skew}; "
                    f"without skew, choose {self.kind.removeprefix('skew_')!r}"
                )
        elif self.skew is not None:
            raise ValueError(f"kind {self.kind!r} has no skew, got {self.skew}; choose a skewed kind")


@dataclasses.dataclass(frozen=True)
class StudentLoss:
    """cross_entropy * mean over tokens of -log q(token) + weight * mean over tokens of divergence(p, q), in nats.

    Attributes:
      cross_entropy: weight of the cross-entropy of the given text, >= 0.
      weight: of the divergence, >= 0.
      divergence: what `weight` multiplies; None exactly where that is 0.

    Raises:
      ValueError: a negative weight, no positive one, or a divergence without weight or weight without divergence.
    """

    cross_entropy: float = 1.0
    weight: float = 0.0
    divergence: Divergence | None = None

    def __post_init__(self) -> None:
        weights = (self.cross_entropy, self.weight)
        if not all(w >= 0 and math.isfinite(w) for w in weights) or not any(weights):
            raise ValueError(f"a student's loss needs weights >= 0, one of them positive, got {weights}")
        if (self.divergence is None) != (self.weight == 0):
            raise ValueError(
                f"a divergence needs a weight, and a weight a divergence, got weight={self.weight} and "
                f"divergence={self.divergence}"
            )
