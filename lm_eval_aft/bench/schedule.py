"""What is left to do, in which order, and who may do it now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval_aft.bench.matrix import Cell
from lm_eval_aft.bench.store import Ledger, Store
from lm_eval_aft.bench.work import Done, Job

TO_DO, RUNNING, DONE, FAILED, PRUNED, LEFT_OUT = "to do", "running", "done", "failed", "pruned", "left out"


class Schedule:
    """The jobs of a study.

    A baseline is one job for all cells that share it, and comes before them. With pruning, a method's
    other seeds wait for its first one on the same model and task: were they given to workers at once,
    what is pruned would hang on who is faster.

    Attributes:
        states: cell name -> how far it is.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        store: Store,
        ledger: Ledger,
        *,
        prune: bool,
        only: Sequence[str] = (),
    ) -> None:
        self.cells, self.store, self.ledger, self.prune = list(cells), store, ledger, prune
        self.states: dict[str, str] = {}
        self._leads: dict[tuple[str, str, str], Cell] = {}
        for cell in self.cells:
            self._leads.setdefault(cell.series, cell)
            known = cell.key in ledger.outcomes and store.scores(cell.key).exists()
            self.states[cell.name] = DONE if known else TO_DO if cell.matches(only) else LEFT_OUT
        self.jobs = self._jobs()
        self.running: list[Job] = []
        self.errors: dict[str, str] = {}  # of baselines, by key
        self._settle_pruned()

    def _jobs(self) -> list[Job]:
        jobs: dict[str, Job] = {}
        for cell in self.cells:
            if self.states[cell.name] != TO_DO:
                continue
            if not self.store.baseline(cell.baseline_key).exists():
                jobs.setdefault(cell.baseline_key, Job("baseline", cell.baseline_key, cell))
            # Two names for one and the same setting are one job.
            jobs.setdefault(cell.key, Job("cell", cell.key, cell))
        return list(jobs.values())

    @property
    def open(self) -> bool:
        """Whether anything is to be done or being done."""
        return bool(self.jobs or self.running)

    def take(self, model: str = "") -> Job | None:
        """A job that can be done now, of this model if there is one; else of the model fewest work on."""
        ready = [job for job in self.jobs if self._ready(job)]
        if not ready:
            return None
        own = [job for job in ready if job.cell.model.name == model]
        busy = [job.cell.model.name for job in self.running]
        chosen = own[0] if own else min(ready, key=lambda job: busy.count(job.cell.model.name))
        self.jobs.remove(chosen)
        self.running.append(chosen)
        self._mark(chosen, RUNNING)
        return chosen

    def give_back(self, job: Job) -> None:
        """Whoever had this job is gone: it is to be done again."""
        self.running.remove(job)
        self.jobs.insert(0, job)
        self._mark(job, TO_DO)

    def finish(self, done: Done, outcome: dict[str, Any] | None) -> None:
        """Note how a job ended; ``outcome`` is a cell's, see `lm_eval_aft.bench.assess`."""
        job = done.job
        self.running.remove(job)
        common = {"name": job.name, "key": job.key, "seconds": done.seconds, "worker": done.worker}
        if done.error:
            self.ledger.append(event="failed", **common, kind=job.kind, error=done.error)
            if job.kind == "baseline":
                self.errors[job.key] = done.error
                self._fail_without_baseline(job.key, done)
            self._mark(job, FAILED)
        elif job.kind == "baseline":
            self.ledger.append(event="baseline", **common)
        else:
            self.ledger.append(event="cell", **common, **(outcome or {}))
            self._mark(job, DONE)
        self._settle_pruned()

    def _fail_without_baseline(self, key: str, done: Done) -> None:
        for job in [job for job in self.jobs if job.kind == "cell" and job.cell.baseline_key == key]:
            self.jobs.remove(job)
            self.ledger.append(
                event="failed", name=job.name, key=job.key, kind="cell", error=f"no baseline: {done.error}"
            )
            self._mark(job, FAILED)

    def _ready(self, job: Job) -> bool:
        if job.kind == "baseline":
            return True
        if any(
            other.kind == "baseline" and other.key == job.cell.baseline_key
            for other in (*self.jobs, *self.running)
        ):
            return False
        lead = self._leads[job.cell.series]
        return (
            not self.prune
            or lead is job.cell
            or job.cell.control
            or self.states[lead.name] not in (TO_DO, RUNNING)
        )

    def _settle_pruned(self) -> None:
        if not self.prune:
            return
        for cell in self.cells:
            lead = self._leads[cell.series]
            if cell is lead or self.states[cell.name] not in (TO_DO, LEFT_OUT):
                continue
            if cell.control:  # one that fails behaves as a placebo should
                continue
            if given_up(self.ledger.outcomes.get(lead.key)):
                self.states[cell.name] = PRUNED
                self.jobs = [job for job in self.jobs if job.kind != "cell" or job.cell is not cell]

    def _mark(self, job: Job, state: str) -> None:
        if job.kind == "cell":
            for cell in self.cells:
                if cell.key == job.key:
                    self.states[cell.name] = state


def given_up(outcome: dict[str, Any] | None) -> str:
    """Why a cell's model and task were given up in training, or ``""``."""
    return str(((outcome or {}).get("vector") or {}).get("pruned") or "")
