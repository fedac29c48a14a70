"""What one worker does: it holds a model, trains cells and scores them."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_aft.bench.matrix import Cell
from lm_eval_aft.bench.store import Store
from lm_eval_aft.errors import AFTError

if TYPE_CHECKING:
    from lm_eval_aft.lm import AFTLM
    from lm_eval_aft.training.plan import TrainingPlan


@dataclass(frozen=True)
class Job:
    """A piece of work: a baseline to score, or a cell to train and score.

    Attributes:
        kind: ``baseline`` or ``cell``.
        key: its address.
        cell: the cell; of a baseline, the first that needs it.
    """

    kind: str
    key: str
    cell: Cell

    @property
    def name(self) -> str:
        """What progress calls it."""
        if self.kind == "cell":
            return self.cell.name
        return f"{self.cell.model.name}/{self.cell.task.name}/baseline"


@dataclass
class Done:
    """How a job ended.

    Attributes:
        error: why it failed, in words; ``""`` when it did not.
        trace: where in the code, for errors nobody foresaw.
        seconds: by part: ``load``, ``train``, ``score``.
        worker: who did it.
        files: what it made, where the worker's disk is not the driver's: path in the store -> contents.
    """

    job: Job
    error: str = ""
    trace: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    worker: str = "local"
    files: dict[str, bytes] | None = None


class Session:
    """One model in memory at a time, and the work done with it.

    Attributes:
        loads: how many models were loaded so far.
    """

    def __init__(self, store: Store, *, device: str | None, batch_size: str, data: str | None) -> None:
        self.store = store
        self.device, self.batch_size, self.data = device, batch_size, data
        self.loads = 0
        self._name = ""
        self._lm: AFTLM | None = None
        self._documents: dict[Any, Any] = {}
        self._known: list[str] = []  # what lm-eval's results say of this machine

    def do(self, job: Job) -> Done:
        """Carry out a job; what goes wrong is told in the answer."""
        done = Done(job)
        try:
            with contextlib.chdir(self.data) if self.data else contextlib.nullcontext():
                lm = self._timed(done, "load", self.model, job.cell)
                if job.kind == "baseline":
                    self._timed(done, "score", self._baseline, lm, job)
                else:
                    self._timed(done, "train", self._train, lm, job.cell)
                    self._timed(done, "score", self._score, lm, job.cell)
        except AFTError as error:
            done.error = f"{error.what} {error.hint}".strip()
        except SystemExit as error:
            if error.code != 2:  # 2 is how lm-eval refuses a flag; anything else ends this process
                raise
            done.error = f"lm-eval refused its settings (exit status {error.code})."
        except Exception as error:  # one cell's trouble must not end a long study
            done.error = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            done.trace = traceback.format_exc()
        return done

    @staticmethod
    def _timed(done: Done, part: str, work: Any, *arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return work(*arguments)
        finally:
            done.seconds[part] = round(time.monotonic() - started, 2)

    def model(self, cell: Cell) -> AFTLM:
        """The cell's model; another one leaves memory first."""
        from lm_eval_aft.lm import AFTLM

        entry = cell.model
        if self._lm is None or self._name != entry.name:
            self._lm = None
            self._documents.clear()
            self._lm = AFTLM(
                entry.pretrained,
                **{"device": self.device, "softmax_dtype": "float32", **entry.model_args},
                batch_size=self.batch_size,
            )
            self._name = entry.name
            self.loads += 1
        self._lm.steer(None)
        return self._lm

    def _train(self, lm: AFTLM, cell: Cell) -> None:
        """Train in a folder that a killed run goes on from; the finished one gets its place."""
        from lm_eval_aft.training.prepared import prepare
        from lm_eval_aft.training.train import run
        from lm_eval_aft.vector import FILE_NAME

        if self.store.trained(cell.vector_key):
            return
        work = self.store.work("vector", cell.vector_key)
        if not (work / FILE_NAME).exists():
            prepared = prepare(lm, cell.plan, self._documents)
            work.parent.mkdir(parents=True, exist_ok=True)
            run(prepared, work, resume=True, progress=False, picture=False)
        self.store.settle(work, self.store.vector(cell.vector_key))

    def _baseline(self, lm: AFTLM, job: Job) -> None:
        from lm_eval_aft.runs import Run

        place = self.store.baseline(job.key)
        if not place.exists():
            self._scored(lm, job.cell, [(Run("baseline"), ".")], self.store.work("baseline", job.key), place)

    def _score(self, lm: AFTLM, cell: Cell) -> None:
        """The steered run, and random directions beside it where the study wants some."""
        from lm_eval_aft.runs import plan_runs

        place = self.store.scores(cell.key)
        if place.exists():
            return
        spec = str(self.store.vector(cell.vector_key))
        placebo = f"random:{cell.placebos}" if cell.placebos else "none"
        states = plan_runs([spec], placebo)[1:]
        folders = ["steered", *(f"placebo/random-{i}" for i in range(cell.placebos))]
        runs = list(zip(states, folders, strict=True))
        self._scored(lm, cell, runs, self.store.work("scores", cell.key), place)

    def _scored(
        self, lm: AFTLM, cell: Cell, runs: Sequence[tuple[Any, str]], work: Path, place: Path
    ) -> None:
        from lm_eval_aft.evaluation import read_flags, score
        from lm_eval_aft.harness import environment_asked_once, task_manager_for

        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        task = cell.task.task
        config = read_flags([task], work, flags_of(cell.plan, cell.task.limit, self.batch_size))
        manager = task_manager_for([task], cell.plan.include_path)
        described = {"pretrained": cell.model.pretrained, "softmax_dtype": "float32", **cell.model.model_args}
        for run, folder in runs:
            lm.steer(run.vector)
            # A bar for each of a study's thousand parts would hide how the whole goes.
            with contextlib.redirect_stderr(io.StringIO()), environment_asked_once(self._known):
                score(lm, run, config, manager, work / folder, described)
        lm.steer(None)
        self.store.settle(work, place)


def flags_of(plan: TrainingPlan, limit: int | None, batch_size: str) -> list[str]:
    """lm-eval's flags for the prompts that a plan trains with."""
    flags = ["--batch_size", batch_size, *plan.prompts.flags()]
    if limit is not None:
        flags += ["--limit", str(limit)]
    if plan.include_path:
        flags += ["--include_path", plan.include_path[0]]
    return flags
