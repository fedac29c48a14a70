"""The output folder of an evaluation: what was asked of it, what it lacks, what in it is whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.library import Library
from lm_eval_aft.library.files import sha256
from lm_eval_aft.library.header import FILE_NAME
from lm_eval_aft.runs import Run
from lm_eval_aft.vector import canonical_json, replacing

# The note of what was asked.
ASKED = ".asked.json"


def begun(folder: Path) -> Path:
    """Where a run's results are written until they are whole; see `is_begun`."""
    return folder.with_name(f".{folder.name}.scoring")


def is_begun(name: str) -> bool:
    """Whether a folder of that name holds results being written, or left by a process that died."""
    # A leading dot alone says nothing: lm-eval calls ../models/m's folder ..__models__m.
    return name.startswith(".") and name.endswith(".scoring")


def lacking(
    folder: Path, runs: Sequence[Run], asked: dict[str, Any], shelf: str | None, resume: bool
) -> tuple[list[Run], str]:
    """The runs that an output folder lacks, and what to note there of what was asked of it.

    Raises:
        AFTError: it holds some already and is not to be resumed, or was asked something else.
    """
    asked = {**asked, "runs": {run.name: _depends_on(run, shelf) for run in runs}}
    asked = json.loads(json.dumps(asked, default=str))
    taken = [run.name for run in runs if (folder / run.name).exists()]
    if taken and not resume:
        raise AFTError(
            f"{folder} already holds {', '.join(taken)}.",
            "Choose another output folder, or keep them and score what is missing with --resume.",
        )
    if taken:
        before = _read_asked(folder)
        differing = [key for key in sorted(asked) if key != "runs" and asked[key] != before.get(key)]
        known = before.get("runs", {})
        differing += [name for name in taken if asked["runs"][name] != known.get(name, "not recorded")]
        if differing:
            raise AFTError(
                f"What is in {folder} was asked otherwise: {', '.join(differing)} differ.",
                "Give the same arguments again, or choose another output folder.",
            )
        asked["runs"] = known | asked["runs"]
    return [run for run in runs if run.name not in taken], canonical_json(asked)


def note_asked(folder: Path, note: str) -> None:
    """Write what `lacking` gave."""
    with replacing(folder / ASKED) as temporary:
        temporary.write_text(note, encoding="utf-8")


def _read_asked(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("runs"), dict) else {}


def _depends_on(run: Run, shelf: str | None) -> Any:
    """What steers a run: the vector's digest; for a router its table's and the library's."""
    if run.route is None:
        return run.vector.digest() if run.vector else None
    library, table = Library(shelf), Path(run.route.partition(":")[2])
    found: dict[str, Any] = {name: sha256(library.path(name) / FILE_NAME) for name in library.names()}
    return {"route": run.route, "table": sha256(table) if table.is_file() else None, "vectors": found}


def whole(folder: Path, samples: dict[str, int]) -> bool:
    """Whether a folder holds a results file and so many samples of each task, to the last byte."""
    found = list(folder.rglob("results_*.json"))
    try:
        for path in found:
            json.loads(path.read_bytes())
            for task, count in samples.items():
                stamp = path.stem.removeprefix("results_")
                lines = path.with_name(f"samples_{task}_{stamp}.jsonl").read_bytes().splitlines(keepends=True)
                if len(lines) != count or not all(line.endswith(b"\n") for line in lines):
                    return False
    except (OSError, ValueError):
        return False
    return bool(found)
