"""Run the notebooks in ``examples/`` and keep their outputs, without what belongs to one machine.

    python scripts/notebooks.py [NAME ...]

Of the outputs stay what is printed, tables and pictures; messages of libraries and plain-text copies of
tables go. A path of this machine or a time in what stays is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
OF_A_MACHINE = re.compile(r"/(root|home|tmp|Users|mnt|work|var)/|\d\d:\d\d:\d\d|object at 0x")


def load(name: str) -> Any:
    """A notebook of ``examples/`` by its name."""
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def execute(name: str, seconds: int) -> Any:
    """The notebook, run where it lies with this checkout's package; a cell that fails is an error.

    Args:
        seconds: the longest that one cell may take.
    """
    notebook = load(name)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(EXAMPLES)}},
    ).execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    return notebook


def cleaned(notebook: Any) -> Any:
    """The notebook without what only this run has."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, start=1):
        cell.execution_count, cell.metadata = number, {}
        printed = "".join(each.text for each in cell.outputs if each.get("name") == "stdout")
        kept = [each for each in cell.outputs if each.output_type != "stream"]
        for output in kept:
            output.metadata = {}
            if "execution_count" in output:
                output.execution_count = number
            if len(output.data) > 1:
                output.data.pop("text/plain", None)
        first = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if printed else []
        cell.outputs = first + kept
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def told_of_the_machine(notebook: Any) -> list[str]:
    """Paths, times and addresses in a notebook's outputs; pictures are not read."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = {kind: text for kind, text in output.get("data", {}).items() if "image/" not in kind}
            text = json.dumps([data, output.get("text", "")])
            found += [text[max(0, m.start() - 40) : m.end() + 40] for m in OF_A_MACHINE.finditer(text)]
    return found


def main() -> None:
    names = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", default=names, choices=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one cell")
    given = parser.parse_args()
    for name in given.names:
        notebook = cleaned(execute(name, given.timeout))
        if found := told_of_the_machine(notebook):
            raise SystemExit(f"{name} tells of this machine: {found}")
        nbformat.write(notebook, EXAMPLES / f"{name}.ipynb")


if __name__ == "__main__":
    main()
