"""Samples of the long programs in ``scripts``: random faults, and a soak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def last_line(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_faults_lose_nothing() -> None:
    faults = "kill,term,disk,clock,second"  # mounting needs rights that not everybody has
    found = last_line("inject_faults.py", "--times", "2", "--others", "1", "--faults", faults, "--seed", "7")
    assert found["lost"] == 0
    # Four jobs: two kills that strike, one each of three others; three jobs know a second process.
    assert found["injected"] == found["resumed"] >= 4 * 2 + 4 * 3 + 3
    kills = {kind: n for kind, n in found["by_kind"]["stopped"].items() if kind.endswith(": kill")}
    assert len(kills) == 4
    assert set(kills.values()) == {2}


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_fifty_kills_lose_nothing() -> None:
    found = last_line("inject_faults.py", "--times", "50", "--faults", "kill,term,disk,clock,second")
    assert found["lost"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_grows_in_a_short_soak() -> None:
    found = last_line("soak.py", "--minutes", "0.5", "--least", "8")
    for name in ("hooks", "models", "open_files", "threads", "temporary_files"):
        assert found[name]["growth"] == 0, found
    assert found["refused"] == 5 * found["cycles"]
    assert found["scored"] == 3 * found["cycles"]
