"""What pyproject.toml declares, what is pinned, and what is installed agree.

``constraints.txt`` holds the releases that ``make setup`` installs, ``constraints-oldest.txt`` those of
``make test-oldest``; ``make setup`` leaves a copy of the one it used in the environment.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
NEWEST, OLDEST = ROOT / "constraints.txt", ROOT / "constraints-oldest.txt"
PYTHONS = ("3.11", "3.12", "3.13")
# The Makefile pins torch, by TORCH and OLDEST_TORCH, and torch its own GPU libraries.
OF_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def pins(text: str, python: str) -> dict[str, Version]:
    """Version of every package pinned for a Python version on this kind of machine."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pinned = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (exact,) = requirement.specifier
            assert exact.operator == "=="
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"{name} is pinned twice for Python {python}"
            pinned[name] = Version(exact.version)
    return pinned


def declared(without: str = "") -> dict[str, Requirement]:
    """Every direct dependency of pyproject.toml: extras', groups' but for one, the build backend's."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    lists = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *(group for name, group in project["dependency-groups"].items() if name != without),
    ]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, (each for texts in lists for each in texts)):
        name = canonicalize_name(requirement.name)
        if name != "lm-eval-aft":
            assert found.setdefault(name, requirement).specifier == requirement.specifier, name
    assert len(found) > 30
    return found


def torch_pin(variable: str) -> Version:
    """What a variable of the Makefile makes pip install for torch."""
    (version,) = re.findall(rf"^{variable} \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M)
    return Version(version)


def floor(requirement: Requirement) -> Version:
    floors = [each.version for each in requirement.specifier if each.operator == ">="]
    assert len(floors) == 1, f"{requirement} has no floor"
    return Version(floors[0])


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_range(python: str) -> None:
    pinned = {**pins(NEWEST.read_text(), python), "torch": torch_pin("TORCH")}
    outside = [
        name
        for name, requirement in declared().items()
        if name not in pinned or not requirement.specifier.contains(pinned[name])
    ]
    assert outside == [], "run `make lock`"


def test_the_oldest_environment_is_that_of_the_floors() -> None:
    pinned = {**pins(OLDEST.read_text(), PYTHONS[0]), "torch": torch_pin("OLDEST_TORCH")}
    # The site is built with the newest releases alone.
    floors = {name: floor(requirement) for name, requirement in declared(without="docs").items()}
    assert {name: pinned.get(name) for name in floors} == floors, "run `make lock`"


@pytest.mark.parametrize("file", [NEWEST, OLDEST], ids=lambda file: file.stem)
def test_pins_name_no_index_and_nothing_of_torchs(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if "://" in line or line.startswith("-")] == []
    assert [name for name in pins("\n".join(lines), PYTHONS[0]) if OF_TORCH.match(name)] == []


def test_what_the_canary_leaves_out_is_there() -> None:
    (listed,) = re.findall(r"^OURS_ALONE = \\\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    files = re.findall(r"[\w/]+\.py", listed)
    assert len(files) == len(set(files)) > 20
    assert [file for file in files if not (ROOT / file).is_file()] == []


def needed() -> set[str]:
    """Names of installed packages that this one and its development tools need, at any remove."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    ahead = [Requirement(each) for each in project["dependency-groups"]["dev"]]
    ahead += [Requirement(each) for each in project["project"]["dependencies"]]
    seen: set[tuple[str, str]] = set()
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen and not OF_TORCH.match(name):
                seen.add((name, extra))
                further = map(Requirement, distribution(name).requires or [])
                ahead += [
                    each for each in further if each.marker is None or each.marker.evaluate({"extra": extra})
                ]
    return {name for name, _ in seen} | {"pip"}


def test_the_environment_holds_the_pinned_versions() -> None:
    made_from = Path(sys.prefix, ".installed")
    if not made_from.exists() or not made_from.read_text():
        pytest.skip("this environment was not made from pinned versions")
    pinned = pins(made_from.read_text(), "{}.{}".format(*sys.version_info))
    installed = {name: Version(distribution(name).version) for name in needed()}
    assert installed == {name: pinned.get(name) for name in installed}
