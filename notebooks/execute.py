"""Executes the notebooks and saves them with their outputs: ``python notebooks/execute.py [NAME ...]``.

Outputs are made as small and as lasting as they can be: what went to standard error (progress bars, warnings), times
and versions of the kernel are left out; nothing is saved if an absolute path stands in a cell or an output.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb")))
# A slash that begins a word and is followed by more of a path; not a URL, not a closing tag, not "a / b".
_ABSOLUTE = re.compile(r"(?<![\w.:/<])/(?:[\w.-]+/)+[\w.-]*|(?<![\w/])[A-Z]:\\\w")


def execute(
    name: str, folder: Path, variables: Mapping[str, str], timeout: int = 3600
) -> nbformat.NotebookNode:
    """Runs one notebook from its first cell to its last in a kernel of its own.

    Args:
      name: of a notebook in this folder, without ".ipynb".
      folder: the kernel's current folder.
      variables: environment, added to this process's own.
      timeout: seconds a cell.

    Returns:
      The notebook with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised; says which and how.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    search = os.pathsep.join(filter(None, [str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search, "TOKENIZERS_PARALLELISM": "false", **variables}
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return notebook


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leaves out standard error, the text beside an image, and the kernel's versions; joins pieces of one stream."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata = {}
        kept: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            elif {"image/png", "text/html"} & set(output.get("data", {})):
                output.data.pop("text/plain", None)
                output.metadata = {}
            kept.append(output)
        cell.outputs = kept
    return notebook


def absolute_paths(notebook: nbformat.NotebookNode) -> list[str]:
    """Every absolute path in a cell or a text output."""
    found: list[str] = []
    for cell in notebook.cells:
        texts = [cell.source]
        for output in cell.get("outputs", ()):
            texts += [output.get("text", ""), *output.get("traceback", ())]
            texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
        found += [match.group() for text in texts for match in _ABSOLUTE.finditer(text)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser("python notebooks/execute.py", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="notebooks, without .ipynb; all by default")
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument(
        "--run", default="", help="folder of a finished run, to take its models instead of training them"
    )
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in NAMES:
            print(f"error: there is no notebook {name!r}; choose from {', '.join(NAMES)}", file=sys.stderr)
            return 2
        run = str(Path(given.run).absolute()) if given.run else ""
        with tempfile.TemporaryDirectory() as home:  # every checkpoint is new: nothing "was finished before"
            variables = {"NOTEBOOK_SIZE": given.size, "NOTEBOOK_RUN": run, "NOTEBOOK_HOME": home}
            notebook = strip(execute(name, FOLDER, variables))
        paths = absolute_paths(notebook)
        if paths:
            print(
                f"error: {name} holds absolute paths: {sorted(set(paths))}; it was not saved", file=sys.stderr
            )
            return 1
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: saved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
