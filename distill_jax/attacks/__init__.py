"""Attackers: everything a reasonable copier of a teacher tries, one declarative entry each, and the suite's own tests.

An attack says what it may see (`access`), what it spends (queries and student steps, as multiples of the run's own),
how it makes its training texts (`select`, a pure function on the host) and how the student is trained on them
(`Recipe`). Its knobs are chosen on validation problems and its result is reported on test problems. What an attack can
do to the world is `Tools`: ask the teacher, score with the student's own likelihood, ask the verifier.

    registry.choose("tier1")      the entries of a tier, or of a list of ids
    controls.CONTROLS             sham defences that the suite must break, and a teacher that must defeat it

Sources: the matrix follows published attacks on distillation defences; each entry's sentence says what it does.
Adaptive evaluation: Carlini et al., arXiv 1902.06705; planted weaknesses: Zimmermann et al., arXiv 2206.13991.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("attack", "controls", "registry", "tools")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
