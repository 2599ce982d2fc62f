"""One setting for every test: eight CPU devices, exact float32, no silent broadcasting, and compilations kept on disk.

Everything that changes a JAX backend stands before the first look at a device, so it is at the top of this file.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Eight host devices are eight threads already, and pytest-xdist runs several processes: one compute thread each keeps
# them from fighting over the cores. Without workers, the backend takes the cores that it finds.
if IN_WORKER:
    os.environ.setdefault("PJRT_NPROC", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Nearly all of a test's time is compilation, and half of that is LLVM's optimiser, which small models have no use for.
# XLA's own passes are the same at every level; what has to be exact must be so at each of them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers warn otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download must fail at once
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import pytest
from jax.sharding import Mesh

REPOSITORY = Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first example compiles
    max_examples=50,
    derandomize=IN_CI,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests whose model package is not installed; in CI a missing package is an error.

    A test that reads real weights says so with ``@pytest.mark.needs("import_name_of_the_package")``.
    """
    missing: dict[str, list[pytest.Item]] = {}
    for item in items:
        for mark in item.iter_markers("needs"):
            absent = [package for package in mark.args if importlib.util.find_spec(package) is None]
            if absent:
                missing.setdefault(absent[0], []).append(item)
    if not missing:
        return
    names = ", ".join(sorted(missing))
    if IN_CI:
        raise pytest.UsageError(
            f"the tests need packages that are not installed: {names} (see MODELS in the Makefile)"
        )
    left_out = {item.nodeid for group in missing.values() for item in group}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]
    config.stash.setdefault(MISSING_PACKAGES, set()).update(missing)


MISSING_PACKAGES = pytest.StashKey[set[str]]()


def pytest_report_collectionfinish(config: pytest.Config) -> str | list[str]:
    """Says which model packages were missing, so that a deselected test does not go unnoticed."""
    missing = config.stash.get(MISSING_PACKAGES, set())
    return [f"left out: tests that need {name} (see MODELS in the Makefile)" for name in sorted(missing)]


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs() -> Iterator[None]:
    """Every program that a CPU backend keeps holds memory maps, and a process may have only so many of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def mesh_cube() -> Mesh:
    """The mesh ``data=2,fsdp=2,tensor=2`` on eight CPU devices."""
    from distill_jax.mesh import make_mesh

    return make_mesh("data=2,fsdp=2,tensor=2")


@pytest.fixture(scope="session")
def mesh_single() -> Mesh:
    """The mesh ``data=1`` on one CPU device: what everything sharded is compared with."""
    from distill_jax.mesh import make_mesh

    return make_mesh("data=1", devices=jax.devices()[:1])
