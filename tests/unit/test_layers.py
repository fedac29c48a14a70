"""The house's order: what may import what, read from the source and held against CONTRIBUTING."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "lm_eval_aft"
# A method of the vector's that is convenient to have there: `vector.applied_to(model)`.
EXCEPTIONS = {("vector", "steering")}


def is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST) -> set[str]:
    """Modules that run when the code does, wherever in it they are imported."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if is_for_types_alone(child):
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            found |= {child.module, *(f"{child.module}.{alias.name}" for alias in child.names)}
        elif isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        else:
            found |= imported(child)
    return found


@cache
def rooms() -> dict[str, set[str]]:
    """Each top-level module or folder, and the other ones it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if path == ROOT / PACKAGE / "__init__.py":
            continue  # public names, loaded on demand
        room = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        names = {
            name.split(".")[1]
            for name in imported(ast.parse(path.read_text()))
            if name.startswith(f"{PACKAGE}.")
        }
        found.setdefault(room, set()).update(names - {room, "__version__"})
    return {room: {name for name in names if name in found} for room, names in found.items()}


def below(room: str) -> set[str]:
    """All that a room needs, directly or not."""
    found: set[str] = set()
    left = [room]
    while left:
        here = left.pop()
        new = {name for name in rooms()[here] - found if (here, name) not in EXCEPTIONS}
        found |= new
        left += new
    return found


def chain() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    match = re.search(r"Imports run downwards only.*?`(cli →[^`]+)`", text, re.DOTALL)
    assert match
    return [part.strip() for part in match.group(1).split("→")]


def test_the_rooms_form_no_circle() -> None:
    graph = {
        room: {name for name in names if (room, name) not in EXCEPTIONS} for room, names in rooms().items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises where there is one
    assert set(order) == set(graph)
    assert len(order) > 30


@pytest.mark.parametrize("place", range(1, len(chain())))
def test_imports_run_downwards(place: int) -> None:
    order = chain()
    assert not below(order[place]) & set(order[:place])


@pytest.mark.parametrize("room", ["steering", "packing", "vector", "backbone", "methods"])
def test_the_engine_knows_nothing_of_the_harness(room: str) -> None:
    for name in {room, *below(room)}:
        paths = [ROOT / PACKAGE / f"{name}.py", *sorted((ROOT / PACKAGE / name).rglob("*.py"))]
        for path in paths:
            if path.exists():
                assert not {
                    n for n in imported(ast.parse(path.read_text())) if n.split(".")[0] == "lm_eval"
                }, path


def test_statistics_stand_alone() -> None:
    names = imported(ast.parse((ROOT / PACKAGE / "reporting/stats.py").read_text()))
    assert not {name for name in names if name.startswith(PACKAGE)}
