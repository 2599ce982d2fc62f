"""How the dial is turned: what a config's `dial` holds."""

from __future__ import annotations

import dataclasses

SCALES = (-1.0, -0.5, -0.25, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 1.5)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class DialConfig:
    """Positions of the dial, and the students that are trained at each.

    Attributes:
      arm: whose adapter is scaled; "" leaves the dial alone.
      scales: positions, 0 (the original teacher: what all others are measured against) among them.
      other: an arm whose adapter the second curve begins at, ending at that of `arm`; "" for no second curve.
      weights: positions of the second curve: at w the weights of the teacher are moved by (1 - w) times what the
        adapter of `other` moves them by, and w times what that of `arm` does.
      kind: kind of student; "" for the first one.
      seeds: students at each position.
      samples, steps: of a student; 0 for those of `distillation`.
      problems: test problems at most that teacher and students answer.
      floor: accuracy that a teacher may lose against position 0 before a position counts as broken.
    """

    arm: str = ""
    scales: tuple[float, ...] = SCALES
    other: str = ""
    weights: tuple[float, ...] = WEIGHTS
    kind: str = ""
    seeds: int = 1
    samples: int = 0
    steps: int = 0
    problems: int = 256
    floor: float = 0.01

    def __post_init__(self) -> None:
        for name in ("scales", "weights"):
            positions = tuple(float(position) for position in getattr(self, name))
            if list(positions) != sorted(set(positions)) or len(positions) < 2:
                raise ValueError(f"{name} must be two or more ascending numbers, got {positions}")
            object.__setattr__(self, name, positions)
        if 0.0 not in self.scales:
            raise ValueError(
                f"scales must hold 0, the original teacher that all others are compared with; got {self.scales}"
            )
        if min(self.seeds, self.problems) < 1 or min(self.samples, self.steps) < 0:
            raise ValueError(
                f"seeds and problems must be at least 1, samples and steps at least 0; got {self.seeds}, "
                f"{self.problems}, {self.samples}, {self.steps}"
            )
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(f"floor is a share in [0, 1), got {self.floor}")
        if self.other and (not self.arm or self.other == self.arm):
            raise ValueError(f"other={self.other!r} needs another arm in `arm`, got {self.arm!r}")
