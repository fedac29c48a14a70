"""What a running study shows: a table that stays up to date in a terminal, a line per cell elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lm_eval_aft.bench.schedule import LEFT_OUT
from lm_eval_aft.reporting import cells as text

if TYPE_CHECKING:
    from lm_eval_aft.bench.schedule import Schedule
    from lm_eval_aft.bench.work import Done, Job


class Progress:
    """Shows how far a study is.

    Args:
        quiet: show nothing.
    """

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
        """Models × tasks: cells settled of all, with what runs now."""
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
        """The states of the cells that are to be done now, or were before."""
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
