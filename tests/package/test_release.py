"""What a release says of itself agrees: version, changelog, citation, workflows and links of pages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm_eval_aft import __version__

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def strings(value: Any) -> list[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings(each)]
    if isinstance(value, list):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    released = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.M)
    assert released[0] == (__version__, str(citation["date-released"]))
    assert citation["version"] == __version__
    assert sorted(released, key=lambda each: each[1], reverse=True) == released
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert "version" not in project  # hatchling reads it from the package


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


# The files below `.github` lie in checkouts, not in the source distribution.


@pytest.mark.skipif(not WORKFLOWS, reason="not a checkout")
def test_workflows_run_targets_that_there_are_under_the_versions_declared() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", read("Makefile"), re.M))
    project = tomllib.loads(read("pyproject.toml"))["project"]
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert project["requires-python"] == f">={declared[0]}"
    called, pythons = set(), {}
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert set(workflow) >= {"name", True, "permissions", "jobs"}, path.name  # YAML reads `on` as true
        for name, job in workflow["jobs"].items():
            assert "timeout-minutes" in job, (path.name, name)
            matrix = job.get("strategy", {}).get("matrix", {})
            rows = [*matrix.get("include", ()), *({"python": each} for each in matrix.get("python", ()))]
            setups = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
            used = [step["with"]["python-version"] for step in setups]
            if used == ["${{ matrix.python }}"]:
                used = [row["python"] for row in rows]
            pythons[path.stem, name] = used
            text = " ".join(strings(job["steps"]) + [row.get("target", "") for row in rows])
            called |= {each["target"] for each in rows if "target" in each}
            called |= set(re.findall(r"make ([a-z][a-z-]*)", text))
    assert called <= targets
    assert {"setup", "check", "test", "test-oldest", "test-newest", "docs", "dist"} <= called
    assert pythons["check", "check"] == declared
    assert {each for used in pythons.values() for each in used} <= set(declared)


@pytest.mark.skipif(not WORKFLOWS, reason="not a checkout")
def test_workflows_use_actions_by_their_commits() -> None:
    uses = {text for path in WORKFLOWS for text in re.findall(r"uses: (.+)", path.read_text())}
    assert len(uses) > 4
    assert [each for each in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", each)] == []


@pytest.mark.skipif(not FORMS, reason="not a checkout")
def test_issue_forms_ask_for_the_doctors_report() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in FORMS}
    del forms["config"]
    assert len(forms) == 2
    for form in forms.values():
        required = {
            each["id"]: each["attributes"]["label"]
            for each in form["body"]
            if each.get("validations", {}).get("required")
        }
        assert "`aft doctor`" in required["doctor"]


@pytest.mark.skipif(not (ROOT / ".pre-commit-config.yaml").exists(), reason="not a checkout")
def test_the_hooks_run_the_pinned_linter() -> None:
    hooks = {each["repo"]: each for each in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    (ruff,) = re.findall(r"^ruff==(\S+)$", read("constraints.txt"), re.M)
    assert hooks["https://github.com/astral-sh/ruff-pre-commit"]["rev"] == f"v{ruff}"


def test_the_image_has_the_makefiles_torch() -> None:
    (pinned,) = re.findall(r"^TORCH \?= (\S+)$", read("Makefile"), re.M)
    (built,) = re.findall(r'^ARG TORCH="(\S+) --index-url https://\S+"$', read("Dockerfile"), re.M)
    assert built == pinned
    assert 'CMD ["make", "demo"]' in read("Dockerfile")
