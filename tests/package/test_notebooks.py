"""The notebooks in ``examples/``: they run, and what is committed of their outputs is clean."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.support.scripts import load_script

notebooks = load_script("notebooks")
NAMES = ["quickstart", "real_model"]


def outputs(notebook: Any) -> list[list[Any]]:
    """Those of each code cell."""
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[set[str]]:
    """The kinds of tables and pictures of each code cell."""
    return [{kind for each in cell for kind in each.get("data", {})} for cell in outputs(notebook)]


def test_all_notebooks_are_tested() -> None:
    assert sorted(path.stem for path in notebooks.EXAMPLES.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole_and_tell_nothing_of_a_machine(name: str) -> None:
    notebook = notebooks.load(name)
    nbformat.validate(notebook)
    assert {"text/html", "image/png"} <= set().union(*kinds(notebook))
    assert notebooks.told_of_the_machine(notebook) == []
    assert notebooks.cleaned(notebooks.load(name)) == notebook
    every = [each.output_type for cell in outputs(notebook) for each in cell]
    assert set(every) <= {"stream", "execute_result", "display_data"}
    assert (notebooks.EXAMPLES / f"{name}.ipynb").stat().st_size < 400_000


def test_what_belongs_to_a_machine_is_found_and_cleaned() -> None:
    cell = nbformat.v4.new_code_cell("f()")
    table = {"text/html": "<table>", "text/plain": "Report(created='2026-01-01T10:00:00')"}
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="WARNING /tmp/x"),
        nbformat.v4.new_output("stream", name="stdout", text="one\n"),
        nbformat.v4.new_output("stream", name="stdout", text="two\n"),
        nbformat.v4.new_output("execute_result", data=table, execution_count=7),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert len(notebooks.told_of_the_machine(notebook)) == 2
    cleaned = notebooks.cleaned(notebook)
    (found,) = outputs(cleaned)
    assert [each.output_type for each in found] == ["stream", "execute_result"]
    assert found[0].text == "one\ntwo\n"
    assert (found[1].data, found[1].execution_count) == ({"text/html": "<table>"}, 1)
    assert notebooks.told_of_the_machine(cleaned) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_start_runs() -> None:
    done = notebooks.cleaned(notebooks.execute("quickstart", 900))
    assert kinds(done) == kinds(notebooks.load("quickstart"))
    assert notebooks.told_of_the_machine(done) == []
    assert "<td>better</td>" in json.dumps(outputs(done))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_pretrained_model_runs(
    real_model: Callable[[str], Path], data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFT_MODELS", os.fspath(real_model("smollm2-135m-instruct").parent))
    monkeypatch.setenv("AFT_TEST_DATA", str(data_root))
    done = notebooks.cleaned(notebooks.execute("real_model", 3600))
    assert kinds(done) == kinds(notebooks.load("real_model"))
    assert notebooks.told_of_the_machine(done) == []
