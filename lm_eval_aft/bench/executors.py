"""Who does a study's work: this process, or workers of a Ray cluster (`lm_eval_aft.bench.ray_workers`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lm_eval_aft.bench.schedule import Schedule
from lm_eval_aft.bench.work import Done, Job, Session

NAMES = ("local", "ray")


class Executor(Protocol):
    """Takes jobs from a schedule until none is left."""

    def run(self, schedule: Schedule, begin: Callable[[Job], None], finish: Callable[[Done], None]) -> None:
        """Do every job; ``begin`` and ``finish`` are called in the process that calls this.

        Raises:
            AFTError: no worker can be had, or they keep dying.
        """


class Local:
    """One job after the other, in this process."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, schedule: Schedule, begin: Callable[[Job], None], finish: Callable[[Done], None]) -> None:
        """See `Executor`."""
        model = ""
        while (job := schedule.take(model)) is not None:
            model = job.cell.model.name
            begin(job)
            finish(self.session.do(job))
