"""Writes docs/families.md and docs/tasks.md: what works, by which way, and what is refused with which words.

Every line is the outcome of a trial (tests/support) that compares with code of transformers and lm-eval
alone; a wrong number or an exception stops the line, and the program ends with 1. The tests run the same
trials and compare with the pages. Needs the development tools, and torchao for one line.

    OMP_NUM_THREADS=1 python scripts/support_tables.py families
    OMP_NUM_THREADS=1 python scripts/support_tables.py tasks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers

from lm_eval_aft.harness.tasks import environment_asked_once
from tests.support import tables

T = TypeVar("T")


def collect(
    names: list[str], trial: Callable[[str, Path], T], row: Callable[..., T], keep: Path | None, only: bool
) -> list[T]:
    """Outcomes in order; ends the program after the last if any failed.

    What ``keep`` holds from an earlier run is not tried again, and what is found is added to it. With
    ``only`` there are no trials: what it does not hold is left out.
    """
    kept = [json.loads(line) for line in keep.read_text().splitlines()] if keep and keep.exists() else []
    known = {each["name"]: row(**each) for each in kept}
    rows, failed = [], []
    described: list[str] = []
    for name in names:
        if name in known:
            rows.append(known[name])
            continue
        if only:
            continue
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder, environment_asked_once(described):
            try:
                rows.append(trial(name, Path(folder)))
                said = getattr(rows[-1], "verdict", "")
                if keep:
                    with keep.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(rows[-1])) + "\n")  # type: ignore[call-overload]
            except Exception:  # a fault of the package, whatever it is
                failed.append(name)
                said = "FAILED\n" + traceback.format_exc()
        print(f"{time.process_time() - started:5.1f} s  {name}: {said}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} failed, nothing was written: {', '.join(failed)}")
    return rows


def missing(names: Iterable[str], rows: Iterable[Any], wanted: list[str]) -> list[str]:
    """What has no outcome, unless only some were wanted."""
    return [] if wanted else sorted({*names} - {row.name for row in rows})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=["families", "tasks"])
    parser.add_argument("names", nargs="*", help="only these; nothing is written then")
    parser.add_argument("--keep", type=Path, help="file to keep outcomes in, and to go on from")
    parser.add_argument("--kept-only", action="store_true", help="write the page of what is kept so far")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.which == "families":
        from tests.support.subjects import SUBJECTS, tried
        from tests.support.trial import Row

        rows = collect(args.names or list(SUBJECTS), tried, Row, args.keep, args.kept_only)
        page, text = tables.FAMILIES, tables.families_page(rows, missing(SUBJECTS, rows, args.names))
    else:
        from tests.support.task_trial import CASES, TaskRow, tried_task

        task_rows = collect(args.names or list(CASES), tried_task, TaskRow, args.keep, args.kept_only)
        page, text = tables.TASKS, tables.tasks_page(task_rows, missing(CASES, task_rows, args.names))
    if args.names:
        print(text)
    else:
        page.write_text(text)
        print(f"wrote {page}")


if __name__ == "__main__":
    main()
