"""How the attack suite is run: what a config's `attack_suite` holds."""

from __future__ import annotations

import dataclasses

from distill_jax.attacks.controls import ARMS as CONTROL_ARMS

_RESERVED = ("gold", "base", "original", "control", "distillable", "undistillable", *CONTROL_ARMS)


@dataclasses.dataclass(frozen=True)
class AttackSuite:
    """Settings of the suite; which attacks run is the config's `attacks`.

    Attributes:
      grid: "short" or "full" knob grids.
      arms: teachers that are attacked; () for the original and every calibrated one.
      folders: more teachers, "NAME=FOLDER,NAME=FOLDER": model folders or .gguf files, asked in the teacher's prompt
        style.
      kinds: kinds of student; () for all.
      clean: the arm that recovered gaps are measured against.
      controls: run the positive controls, which gate the verdict.
      search_problems: validation problems that knobs, and the worst attack, are chosen on.
      margin: accuracy that a teacher may lose and still count as not inferior.
      answer_mark: what stands before the final answer in a completion of the task.
      rewriter: a model folder, for attacks that need a rewriter; "" for none.
    """

    grid: str = "short"
    arms: tuple[str, ...] = ()
    folders: str = ""
    kinds: tuple[str, ...] = ()
    clean: str = "original"
    controls: bool = True
    search_problems: int = 256
    margin: float = 0.01
    answer_mark: str = "####"
    rewriter: str = ""

    def __post_init__(self) -> None:
        if self.grid not in ("short", "full"):
            raise ValueError(f"grid must be 'short' or 'full', got {self.grid!r}")
        if self.search_problems < 1:
            raise ValueError(f"search_problems must be at least 1, got {self.search_problems}")
        if not 0.0 < self.margin < 1.0:
            raise ValueError(f"margin must lie between 0 and 1, got {self.margin}")
        if not self.answer_mark:
            raise ValueError("answer_mark must not be empty")
        self.model_folders()

    def model_folders(self) -> dict[str, str]:
        """Arm -> model folder, of `folders`.

        Raises:
          ValueError: a part that is not NAME=FOLDER, or a name that is taken.
        """
        found: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in self.folders.split(","))):
            name, _, folder = part.partition("=")
            if not name.isidentifier() or not folder:
                raise ValueError(f"folders: expected NAME=FOLDER, got {part!r}")
            if name in _RESERVED or name in found:
                raise ValueError(f"folders: the name {name!r} is taken; choose another")
            found[name] = folder
        return found
