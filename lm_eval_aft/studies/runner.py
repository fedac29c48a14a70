"""A whole study from beginning to end: plan, work, ledger, report, and the progress shown meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lm_eval_aft import __version__
from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.process import now
from lm_eval_aft._util.tracking import Trackers
from lm_eval_aft.evaluation import formatting as text
from lm_eval_aft.studies.config import BenchStudy
from lm_eval_aft.studies.jobs import (
    DONE,
    LEFT_OUT,
    PRUNED,
    Done,
    Job,
    Schedule,
    Session,
    Store,
    assess,
    build_cells,
)
from lm_eval_aft.studies.report import BenchReport, build_study_report, write_study_report


def run_study(
    study: BenchStudy,
    source: Path,
    store: Store,
    executor: Executor,
    *,
    resume: bool = False,
    only: Sequence[str] = (),
    progress: StudyProgress | None = None,
    trackers: Trackers | None = None,
) -> BenchReport:
    """Run the cells of a study that are not finished, and write its report into the store's folder.

    Args:
        source: the study's file; a copy of it is kept beside the results.
        only: patterns of cells to work on; finished others stay in the report.
        trackers: get every finished cell, those of an earlier call too.

    Raises:
        AFTError: the folder cannot be used, no cell matches ``only``, or no worker can be started. Cells
            that fail do not stop the others; they are in the report, with the reason.
    """
    cells = build_cells(study)
    if not any(cell.matches(only) for cell in cells):
        raise AFTError(
            f"No cell of the study fits {', '.join(only)}.",
            f"Cells are named MODEL/TASK/METHOD/seed-N, for example {cells[0].name}.",
        )
    shown = progress or StudyProgress(quiet=True)
    with _writing(store), store.opened(resume) as ledger:
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(source, store.root / "study.yaml")
        cells = build_cells(study, ledger.outcomes) if ledger.outcomes else cells
        if trackers:
            ledger.listener = partial(_log_cell, trackers)
            trackers.settings({"file": str(source), **study.model_dump(by_alias=True)})
            for line in ledger.outcomes.values():
                ledger.listener(line)
        ledger.append(event="start", time=now(), version=__version__, cells=len(cells), only=list(only))
        schedule = Schedule(cells, store, ledger, prune=study.prune, only=only)
        _recover(schedule, store)
        with shown.over(schedule):
            executor.run(schedule, shown.begin, lambda done: _finish(schedule, store, done, shown))
        if all(state in (DONE, PRUNED) for state in schedule.states.values()):
            shutil.rmtree(store.root / "work", ignore_errors=True)  # else a later call may resume from it
        report = build_study_report(study, schedule)
        write_study_report(report, store.root)
    return report


def _log_cell(trackers: Trackers, line: dict[str, Any]) -> None:
    """Log a line of a study's ledger: a finished cell's comparisons (p not adjusted for the other cells)."""
    if line.get("event") != "cell":
        return
    numbers: dict[str, Any] = {f"{line['name']}/seconds": sum((line.get("seconds") or {}).values())}
    for row in line.get("rows") or ():
        numbers |= text.row_numbers(row | {"p_adjusted": None}, f"{line['name']}/")
    trackers.log(numbers)


@contextlib.contextmanager
def _writing(store: Store) -> Iterator[None]:
    """A full or read-only disk ends a study with one message; what is finished stays."""
    try:
        yield
    except OSError as error:
        raise AFTError(
            f"Cannot write into {store.root}: {error.strerror or error}.",
            "Free some space or choose another folder, and continue with --resume.",
        ) from error


def _finish(schedule: Schedule, store: Store, done: Done, shown: StudyProgress) -> None:
    outcome: dict[str, Any] | None = None
    if not done.error and done.job.kind == "cell":
        try:
            outcome = assess(done.job.cell, store)
            if not any(row["primary"] for row in outcome["rows"]):
                raise AFTError(
                    "None of the task's metrics has a value for each document.", "Choose another task."
                )
        except AFTError as error:
            done.error, outcome = error.one_line, None
            # Set aside, so that --resume makes them anew.
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
    """Enter cells in the ledger that were scored just before a killed run could."""
    for job in [job for job in schedule.jobs if job.kind == "cell"]:
        whole = store.scores(job.key).exists() and store.baseline(job.cell.baseline_key).exists()
        if whole and store.trained(job.cell.vector_key):
            with contextlib.suppress(AFTError):
                outcome = assess(job.cell, store)
                schedule.jobs.remove(job)
                schedule.running.append(job)
                schedule.finish(Done(job), outcome)


# What does a study's jobs: this process, or workers of a Ray cluster (`lm_eval_aft.studies.ray`).


class Executor(Protocol):
    """Takes jobs from a schedule until none is left."""

    def run(self, schedule: Schedule, begin: Callable[[Job], None], finish: Callable[[Done], None]) -> None:
        """Do every job; ``begin`` and ``finish`` are called in the process that calls this.

        Raises:
            AFTError: no worker can be started, or they keep dying.
        """


class Local:
    """Does one job after the other in this process."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, schedule: Schedule, begin: Callable[[Job], None], finish: Callable[[Done], None]) -> None:
        """See `Executor`."""
        model = ""
        while (job := schedule.take(model)) is not None:
            model = job.cell.model.name
            begin(job)
            finish(self.session.do(job))


# What a running study prints: a live table in a terminal, a line per cell elsewhere.


class StudyProgress:
    """Shows the progress of a study; with ``quiet``, nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
        self._live: Live | None = None
        self._schedule: Schedule | None = None
        self._started = time.monotonic()
        self._before = 0

    @contextmanager
    def over(self, schedule: Schedule) -> Iterator[None]:
        """Show this schedule while the block runs."""
        self._schedule, self._started = schedule, time.monotonic()
        self._before = self._settled()
        if self.quiet or not self.console.is_terminal:
            yield
            return
        with Live(self.table(), console=self.console, refresh_per_second=2) as self._live:
            yield
            self._live.update(self.table())

    def begin(self, job: Job) -> None:
        """A job was given to a worker."""
        self._update()

    def finished(self, done: Done, outcome: dict[str, Any] | None) -> None:
        """A job has ended."""
        self._update()
        if self.quiet or self._live is not None or self._schedule is None:
            return
        seconds = f"{sum(done.seconds.values()):.0f} s"
        if done.error:
            told = f"failed: {done.error}"
        elif outcome is None:
            told = f"scored, {seconds}"
        else:
            told = f"{_result(outcome)}, {seconds}"
        print(f"[{self._settled()}/{len(self._asked())}] {done.job.name}: {told}", flush=True)

    def table(self) -> Table:
        """Models × tasks: settled cells of all, and what runs now."""
        schedule = self._schedule
        assert schedule is not None
        tasks = list(dict.fromkeys(cell.task.name for cell in schedule.cells))
        running = {(job.cell.model.name, job.cell.task.name) for job in schedule.running}
        settled, asked = self._settled(), self._asked()
        elapsed = time.monotonic() - self._started
        done = settled - self._before
        left = f", about {(len(asked) - settled) * elapsed / done / 60:.0f} min left" if done else ""
        table = Table(
            title=f"{settled} of {len(asked)} cells, {elapsed / 60:.1f} min{left}",
            title_justify="left",
        )
        table.add_column("model")
        for task in tasks:
            table.add_column(task, justify="right")
        for model in dict.fromkeys(cell.model.name for cell in schedule.cells):
            line = [model]
            for task in tasks:
                own = [c for c in schedule.cells if c.model.name == model and c.task.name == task]
                states = [schedule.states[cell.name] for cell in own]
                ended = sum(state in _SETTLED for state in states)
                failed = states.count("failed")
                line.append(
                    f"{ended}/{len(own)}"
                    + (f" [red]{failed} failed[/red]" if failed else "")
                    + (" [bold]…[/bold]" if (model, task) in running else "")
                )
            table.add_row(*line)
        if schedule.running:
            table.caption = f"now: {', '.join(job.name for job in schedule.running)}"
        return table

    def _update(self) -> None:
        if self._live is not None:
            self._live.update(self.table())

    def _asked(self) -> list[str]:
        """The states of all cells but those that ``--only`` leaves out."""
        states = self._schedule.states.values() if self._schedule else ()
        return [state for state in states if state != LEFT_OUT]

    def _settled(self) -> int:
        return sum(state in _SETTLED for state in self._asked())


_SETTLED = ("done", "failed", "pruned")


def _result(outcome: dict[str, Any]) -> str:
    row = next(row for row in outcome["rows"] if row["primary"])
    layers = ", ".join(map(str, outcome["vector"]["layers"]))
    unit = " points" if row["share"] else ""
    return (
        f"{text.score(row['baseline'], row['share'])} → {text.score(row['steered'], row['share'])} "
        f"({text.points(row['difference'], row['share'])}{unit}, n = {row['n']}), layer {layers}"
    )
