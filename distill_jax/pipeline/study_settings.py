"""Which further teachers are made to learn what a probe predicts: what a config's `study` holds."""

from __future__ import annotations

import dataclasses

from distill_jax.pipeline.probe_settings import choose_probes

MODES = ("distillable", "undistillable")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Teachers beside those of the run, and the students that are trained on all of them.

    Attributes:
      modes, eta: every mode is calibrated at every strength.
      seeds: calibrations of each; their seeds follow the run's own.
      controls: calibrations of the task alone (eta = 0), each with a seed of its own: what calibrated teachers are told
        apart from.
      calibration_steps: of each; 0 for those of the run.
      kind: kind of student; "" for the first one.
      student_seeds: students of each teacher.
      samples, student_steps: of a student; 0 for those of `distillation`.
      problems: test problems at most that teacher and students answer.
      positions: of the dial's first curve, that are looked at too where the dial has been turned with students of the
        same sizes.
      probes: see `choose_probes`.
    """

    modes: tuple[str, ...] = MODES
    eta: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    seeds: int = 1
    controls: int = 4
    calibration_steps: int = 0
    kind: str = ""
    student_seeds: int = 1
    samples: int = 0
    student_steps: int = 0
    problems: int = 256
    positions: tuple[float, ...] = (-1.0, -0.25, -0.1, 0.1, 0.25)
    probes: str = "all"

    def __post_init__(self) -> None:
        for name in ("modes", "eta", "positions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        unknown = sorted(set(self.modes) - set(MODES))
        if unknown:
            raise ValueError(
                f"modes names {unknown}; expected some of {MODES} (controls are asked for by `controls`)"
            )
        for name in ("modes", "eta"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names one twice: {getattr(self, name)}")
        if any(not eta > 0 for eta in self.eta):
            raise ValueError(f"eta must hold positive strengths, got {self.eta}; the direction is the mode")
        if min(self.seeds, self.student_seeds, self.problems) < 1:
            raise ValueError(
                "seeds, student_seeds and problems must be at least 1; "
                f"got {self.seeds}, {self.student_seeds}, {self.problems}"
            )
        if min(self.controls, self.calibration_steps, self.samples, self.student_steps) < 0:
            raise ValueError(
                "controls, calibration_steps, samples and student_steps must be at least 0; "
                f"got {self.controls}, {self.calibration_steps}, {self.samples}, {self.student_steps}"
            )
        if not choose_probes(self.probes):
            raise ValueError("probes='none' leaves nothing to study; choose some")
