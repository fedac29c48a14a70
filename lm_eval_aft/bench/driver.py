"""A whole study from beginning to end: plan, work, ledger, report."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval_aft import __version__
from lm_eval_aft.bench.assess import assess
from lm_eval_aft.bench.executors import Executor
from lm_eval_aft.bench.matrix import Cell, build_cells
from lm_eval_aft.bench.progress import Progress
from lm_eval_aft.bench.render import write_report
from lm_eval_aft.bench.schedule import DONE, PRUNED, Schedule
from lm_eval_aft.bench.store import Store
from lm_eval_aft.bench.study import BenchStudy
from lm_eval_aft.bench.table import BenchReport, build_report
from lm_eval_aft.bench.work import Done
from lm_eval_aft.errors import AFTError
from lm_eval_aft.training.record import now


def study_cells(study: BenchStudy) -> list[Cell]:
    """The study's cells, looked up from its ``data`` folder."""
    with contextlib.chdir(study.data) if study.data else contextlib.nullcontext():
        return build_cells(study)


def run_study(
    study: BenchStudy,
    source: Path,
    store: Store,
    executor: Executor,
    *,
    resume: bool = False,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> BenchReport:
    """Do what is left of a study, and write its report into the store's folder.

    Args:
        source: the study's file; a copy of it is kept beside the results.
        only: patterns of cells to work on; what others were found to be is kept in the report.

    Raises:
        AFTError: the folder cannot be used, no cell fits ``only``, or no worker can be had. Cells that
            fail do not stop the others; they are in the report, with the reason.
    """
    cells = study_cells(study)
    if not any(cell.matches(only) for cell in cells):
        raise AFTError(
            f"No cell of the study fits {', '.join(only)}.",
            f"Cells are named MODEL/TASK/METHOD/seed-N, for example {cells[0].name}.",
        )
    shown = progress or Progress(quiet=True)
    with _writing(store), store.opened(resume) as ledger:
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(source, store.root / "study.yaml")
        ledger.append(event="start", time=now(), version=__version__, cells=len(cells), only=list(only))
        schedule = Schedule(cells, store, ledger, prune=study.prune, only=only)
        _recover(schedule, store)
        with shown.over(schedule):
            executor.run(schedule, shown.begin, lambda done: _finish(schedule, store, done, shown))
        if all(state in (DONE, PRUNED) for state in schedule.states.values()):
            shutil.rmtree(store.root / "work", ignore_errors=True)  # else somebody may go on from there
        report = build_report(study, schedule)
        write_report(report, store.root)
    return report


@contextlib.contextmanager
def _writing(store: Store) -> Iterator[None]:
    """A full or read-only disk ends a study in one message; what is finished stays."""
    try:
        yield
    except OSError as error:
        raise AFTError(
            f"Cannot write into {store.root}: {error.strerror or error}.",
            "Make room or choose another folder, and go on with --resume.",
        ) from error


def _finish(schedule: Schedule, store: Store, done: Done, shown: Progress) -> None:
    outcome: dict[str, Any] | None = None
    if not done.error and done.job.kind == "cell":
        try:
            outcome = assess(done.job.cell, store)
            if not any(row["primary"] for row in outcome["rows"]):
                raise AFTError(
                    "None of the task's metrics has a value for each document.", "Choose another task."
                )
        except AFTError as error:
            done.error, outcome = f"{error.what} {error.hint}".strip(), None
            # Not to be found damaged again: with --resume they are made anew.
            for place in (store.scores(done.job.key), store.baseline(done.job.cell.baseline_key)):
                if str(place) in done.error and place.exists():
                    store.set_aside(place)
    if done.trace:
        place = store.root / "errors" / f"{done.job.key}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(done.trace, encoding="utf-8")
        done.error += f" (traceback in {place})"
    schedule.finish(done, outcome)
    shown.finished(done, outcome)


def _recover(schedule: Schedule, store: Store) -> None:
    """Take up cells that were scored just before a sudden death, and not yet written down."""
    for job in [job for job in schedule.jobs if job.kind == "cell"]:
        whole = store.scores(job.key).exists() and store.baseline(job.cell.baseline_key).exists()
        if whole and store.trained(job.cell.vector_key):
            with contextlib.suppress(AFTError):
                outcome = assess(job.cell, store)
                schedule.jobs.remove(job)
                schedule.running.append(job)
                schedule.finish(Done(job), outcome)
