"""The order of the rooms: what may import what, read from the source and held against CONTRIBUTING."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "lm_eval_aft"
ROOMS = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")} - {"demo"}


def imported(node: ast.AST) -> set[str]:
    """All that is imported anywhere: at the top, inside functions, and for type checkers alone."""
    found: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "an import is written in full"
            found |= {f"{child.module}.{alias.name}" for alias in child.names}
        elif isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
    return found


@cache
def modules() -> dict[str, set[str]]:
    """Each module of the package, and those others it imports.

    The package's own ``__init__`` is left out: it loads its public names on demand.
    """
    paths = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts).removesuffix(".__init__")] = path
    del paths[PACKAGE]

    def module_of(name: str) -> str:
        while name and name not in paths:
            name = name.rpartition(".")[0]
        return name

    found = {}
    for module, path in paths.items():
        names = {module_of(name) for name in imported(ast.parse(path.read_text()))}
        found[module] = names - {module, ""}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def below(module: str) -> set[str]:
    """All that a module needs, directly or not."""
    found: set[str] = set()
    left = [module]
    while left:
        new = modules()[left.pop()] - found
        found |= new
        left += new
    return found


def chain() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    match = re.search(r"Imports run downwards only.*?`(cli →[^`]+)`", text, re.DOTALL)
    assert match
    return [part.strip() for part in match.group(1).split("→")]


def test_the_modules_form_no_circle() -> None:
    order = list(TopologicalSorter(modules()).static_order())  # raises where there is one
    assert set(order) == set(modules())
    assert len(order) > 30


def test_the_chain_names_every_room() -> None:
    assert {*chain(), "export"} == ROOMS | {"lm"}


@pytest.mark.parametrize("place", range(1, len(chain())))
def test_imports_run_downwards(place: int) -> None:
    order = chain()
    for module, names in modules().items():
        if room(module) == order[place]:
            assert not {name for name in names if room(name) in order[:place]}, module


def test_export_stands_on_the_library() -> None:
    for module, names in modules().items():
        if room(module) == "export":
            allowed = {"export", "library", "steering", "_util", "demo"}
            assert {room(name) for name in names} <= allowed, module
        elif room(module) != "cli":
            assert "export" not in {room(name) for name in names}, module


@pytest.mark.parametrize(
    "module",
    [
        *sorted(name for name in modules() if name.startswith(f"{PACKAGE}.steering")),
        f"{PACKAGE}.engine.batching",
    ],
)
def test_steering_and_batching_know_nothing_of_the_harness(module: str) -> None:
    # The table of other libraries' private names looks each of them up when it is asked to.
    for name in {module, *below(module)} - {f"{PACKAGE}._util.private_names"}:
        path = ROOT / f"{name.replace('.', '/')}.py"
        source = path if path.exists() else path.with_suffix("") / "__init__.py"
        names = imported(ast.parse(source.read_text()))
        assert not {each for each in names if each.split(".")[0] == "lm_eval"}, name


def test_statistics_stand_alone() -> None:
    names = imported(ast.parse((ROOT / PACKAGE / "evaluation/stats.py").read_text()))
    assert not {name for name in names if name.startswith(PACKAGE)}
