"""The cells of a study: what each depends on, which jobs are left, and doing one."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
import traceback
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import LOCK, JsonLines, exclusive_dir
from lm_eval_aft.evaluation.compare import compare_runs, judge, not_finite, require_comparable
from lm_eval_aft.evaluation.provenance import read_vector_info
from lm_eval_aft.evaluation.report import warnings
from lm_eval_aft.evaluation.results import ScoredRun, read_run
from lm_eval_aft.harness.identity import digest, model_identity, task_identity
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.studies.config import BenchStudy, MethodEntry, ModelEntry, TaskEntry, require_plain
from lm_eval_aft.training.recipe import TrainingPlan

if TYPE_CHECKING:
    from lm_eval_aft.lm import AFTLM

# Part of every key: to be raised when the same settings no longer give the same result.
CELL_FORMAT = "aft-bench/1"


@dataclass(frozen=True)
class StudyCell:
    """One model, task, method and seed."""

    model: ModelEntry
    task: TaskEntry
    method: MethodEntry
    seed: int
    plan: TrainingPlan
    placebos: int
    vector_key: str  # digest of what the vector depends on: model, task and training plan
    baseline_key: str  # digest of what the baseline's scores depend on: model, task, prompts and limit
    key: str  # digest of what the cell's result depends on: both of these, and the number of placebos

    @property
    def name(self) -> str:
        """What ``--only`` is matched against."""
        return f"{self.model.name}/{self.task.name}/{self.method.name}/seed-{self.seed}"

    @property
    def series(self) -> tuple[str, str, str]:
        """What it shares with the other seeds."""
        return (self.model.name, self.task.name, self.method.name)

    @property
    def control(self) -> bool:
        """Whether it is a placebo by design, which gets no verdict."""
        return self.plan.control is not None

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether its name, or one part of it, matches one of the patterns; without patterns, yes."""
        texts = [self.name, *self.name.split("/")]
        return not patterns or any(fnmatchcase(text, pattern) for pattern in patterns for text in texts)


def build_cells(study: BenchStudy, finished: Container[str] = (), *, hashed: bool = True) -> list[StudyCell]:
    """Every cell of the study, model by model, task by task.

    Looked up from the study's ``data`` folder, as what lies there belongs to the tasks' identities.

    Args:
        finished: keys of cells whose results are there. Version 0.1's keys depend on where a task's Python
            functions lie; tasks with such results keep them.
        hashed: read the contents of models and tasks, which takes seconds a gigabyte. Without, keys tell the
            cells apart and name no results.

    Raises:
        AFTError: a task that the harness does not have.
    """
    cells = _build_cells(study, absolute=False, hashed=hashed)
    if not finished:
        return cells
    earlier = _build_cells(study, absolute=True)
    kept = {cell.task.name for cell in earlier if cell.key in finished}
    return [old if old.task.name in kept else new for old, new in zip(earlier, cells, strict=True)]


def _build_cells(study: BenchStudy, absolute: bool, hashed: bool = True) -> list[StudyCell]:
    with contextlib.chdir(study.data or "."):
        require_plain([entry.task for entry in study.tasks], study.include_path)
        models: dict[str, Any] = {each.name: [each.pretrained, each.model_args] for each in study.models}
        tasks: dict[str, Any] = {each.name: each.task for each in study.tasks}
        if hashed:
            models = {name: model_identity(*named) for name, named in models.items()}
            tasks = {
                name: task_identity(task, study.include_path, absolute=absolute)
                for name, task in tasks.items()
            }
    cells, placebos = [], study.evaluation.placebos
    for model, task, method, seed in product(study.models, study.tasks, study.methods, study.seeds):
        plan = study.plan(model, task, method, seed)
        made = {key: value for key, value in plan.to_dict().items() if key != "include_path"}
        about = [CELL_FORMAT, models[model.name], tasks[task.name]]
        vector_key = digest([*about, made])
        asked = [task.limit, asdict(plan.prompts), *([plan.task_metadata] if plan.task_metadata else [])]
        baseline_key = digest([*about, *asked])
        key = digest([vector_key, baseline_key, placebos])
        cells.append(StudyCell(model, task, method, seed, plan, placebos, vector_key, baseline_key, key))
    return cells


# The folder of a study: finished vectors and scores by their keys, work in progress, one ledger.

STUDY_LEDGER = "ledger.jsonl"


class Store:
    """Where a study's results lie.

    ``vectors/KEY``, ``baselines/KEY`` and ``scores/KEY``, with the keys of `StudyCell`, are complete or not
    there: they are made under ``work/`` and renamed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def vector(self, key: str) -> Path:
        """Folder of a finished training run."""
        return self.root / "vectors" / key

    def baseline(self, key: str) -> Path:
        """Folder of a baseline's results."""
        return self.root / "baselines" / key

    def scores(self, key: str) -> Path:
        """Folder of a cell's results."""
        return self.root / "scores" / key

    def work(self, kind: str, key: str) -> Path:
        """Folder in which something is being made."""
        return self.root / "work" / f"{kind}-{key}"

    def trained(self, key: str) -> bool:
        """Whether a vector is finished."""
        return (self.vector(key) / FILE_NAME).is_file()

    @staticmethod
    def settle(made: Path, place: Path) -> None:
        """Move something finished to its place."""
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # made twice, by a worker that was given up and was not dead
            shutil.rmtree(made)
            return
        made.rename(place)

    def set_aside(self, place: Path) -> None:
        """Move something damaged to ``errors``."""
        aside = self.root / "errors" / f"{place.parent.name}-{place.name}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)

    @contextmanager
    def opened(self, resume: bool) -> Iterator[StudyLedger]:
        """The study's ledger, while other processes are kept out of the folder.

        Raises:
            AFTError: the folder holds a study and ``resume`` is not set, or something else; or another
                process works in it.
        """
        path = self.root / STUDY_LEDGER
        foreign = self.root.is_dir() and any(each.name != LOCK for each in self.root.iterdir())
        if foreign and not path.exists():
            raise AFTError(
                f"The output folder {self.root} is not empty, and no study wrote what is in it.",
                "Choose another folder.",
            )
        if path.exists() and not resume:
            raise AFTError(
                f"The output folder {self.root} holds a study already.",
                "Continue with --resume (what is finished is kept, also where the study file was changed), "
                "or choose another folder.",
            )
        with exclusive_dir(self.root):
            path.touch()
            yield StudyLedger(path)


class StudyLedger(JsonLines):
    """``ledger.jsonl``: one line per finished cell, and what else happened.

    Attributes:
        outcomes: lines of finished cells, by key.
        failures: lines of jobs that failed and were not finished since, by key.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, dict[str, Any]] = {}
        for line in self.read():
            self._note(line)

    def append(self, **line: Any) -> None:
        """Add one line."""
        super().append(**line)
        self._note(line)

    def _note(self, line: dict[str, Any]) -> None:
        key = str(line.get("key"))
        if line.get("event") == "cell":
            self.outcomes[key] = line
            self.failures.pop(key, None)
        elif line.get("event") == "failed":
            self.failures[key] = line


# Which jobs are left, in which order, and which can start now.

TO_DO, RUNNING, DONE, FAILED, PRUNED, LEFT_OUT = "to do", "running", "done", "failed", "pruned", "left out"


class Schedule:
    """The jobs of a study.

    A baseline is one job for all cells that share it, and comes before them. With pruning, a method's
    other seeds wait for its first one on the same model and task; else which of them are pruned would
    depend on which worker is faster.

    Attributes:
        states: cell name -> one of the states above.
    """

    def __init__(
        self,
        cells: Sequence[StudyCell],
        store: Store,
        ledger: StudyLedger,
        *,
        prune: bool,
        only: Sequence[str] = (),
    ) -> None:
        self.cells, self.store, self.ledger, self.prune = list(cells), store, ledger, prune
        self.states: dict[str, str] = {}
        self._leads: dict[tuple[str, str, str], StudyCell] = {}
        for cell in self.cells:
            self._leads.setdefault(cell.series, cell)
            known = cell.key in ledger.outcomes and store.scores(cell.key).exists()
            self.states[cell.name] = DONE if known else TO_DO if cell.matches(only) else LEFT_OUT
        self.jobs = self._jobs()
        self.running: list[Job] = []
        self._settle_pruned()

    def _jobs(self) -> list[Job]:
        jobs: dict[str, Job] = {}
        for cell in self.cells:
            if self.states[cell.name] != TO_DO:
                continue
            if not self.store.baseline(cell.baseline_key).exists():
                jobs.setdefault(cell.baseline_key, Job("baseline", cell.baseline_key, cell))
            # Two names for the same settings are one job.
            jobs.setdefault(cell.key, Job("cell", cell.key, cell))
        return list(jobs.values())

    @property
    def open(self) -> bool:
        """Whether any job is left or running."""
        return bool(self.jobs or self.running)

    def take(self, model: str = "") -> Job | None:
        """A job that can start now, of this model if possible, else of the model with fewest workers."""
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
        """The worker of this job is lost: it has to be done again."""
        self.running.remove(job)
        self.jobs.insert(0, job)
        self._mark(job, TO_DO)

    def finish(self, done: Done, outcome: dict[str, Any] | None) -> None:
        """Note how a job ended; ``outcome`` is a cell's, see `assess`."""
        job = done.job
        self.running.remove(job)
        common = {"name": job.name, "key": job.key, "seconds": done.seconds, "worker": done.worker}
        if done.error:
            self.ledger.append(event="failed", **common, kind=job.kind, error=done.error)
            if job.kind == "baseline":
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
        baselines = {each.key for each in (*self.jobs, *self.running) if each.kind == "baseline"}
        lead = self._leads[job.cell.series]
        follows = self.prune and lead is not job.cell and not job.cell.control
        waits = follows and self.states[lead.name] in (TO_DO, RUNNING)
        return job.cell.baseline_key not in baselines and not waits

    def _settle_pruned(self) -> None:
        for cell in self.cells if self.prune else ():
            lead = self._leads[cell.series]
            # (A placebo that is no better than the baseline does what it should.)
            waiting = cell is not lead and not cell.control and self.states[cell.name] in (TO_DO, LEFT_OUT)
            if waiting and given_up(self.ledger.outcomes.get(lead.key)):
                self.states[cell.name] = PRUNED
                self.jobs = [job for job in self.jobs if job.kind != "cell" or job.cell is not cell]

    def _mark(self, job: Job, state: str) -> None:
        if job.kind == "cell":
            for cell in self.cells:
                if cell.key == job.key:
                    self.states[cell.name] = state


def given_up(outcome: dict[str, Any] | None) -> str:
    """Why training gave up a cell's model and task, or ``""``."""
    return str(((outcome or {}).get("vector") or {}).get("pruned") or "")


# What one worker does: it keeps a model loaded, trains cells and scores them.


@dataclass(frozen=True)
class Job:
    """A baseline to score, or a cell to train and score."""

    kind: str  # ``baseline`` or ``cell``
    key: str  # the cell's key or baseline key
    cell: StudyCell  # the cell; for a baseline, the first that needs it

    @property
    def name(self) -> str:
        """What messages call it."""
        cell = self.cell
        return cell.name if self.kind == "cell" else f"{cell.model.name}/{cell.task.name}/baseline"


@dataclass
class Done:
    """How a job ended.

    Attributes:
        files: what it made, where the worker's disk is not the driver's: path in the store -> contents.
    """

    job: Job
    error: str = ""  # why it failed; ``""`` when it did not
    trace: str = ""  # the traceback of an unexpected error
    seconds: dict[str, float] = field(default_factory=dict)  # by part: ``load``, ``train``, ``score``
    worker: str = "local"  # name of the worker that did it
    files: dict[str, bytes] | None = None


class Session:
    """Does jobs with one model in memory at a time.

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
        """Do a job; errors are reported in the answer."""
        done = Done(job)
        try:
            with contextlib.chdir(self.data or "."):
                lm = self._timed(done, "load", self.model, job.cell)
                if job.kind == "baseline":
                    self._timed(done, "score", self._baseline, lm, job)
                else:
                    self._timed(done, "train", self._train, lm, job.cell)
                    self._timed(done, "score", self._score, lm, job.cell)
        except AFTError as error:
            done.error = error.one_line
        except SystemExit as error:
            if error.code != 2:  # 2 is how lm-eval refuses a flag; anything else ends this process
                raise
            done.error = f"lm-eval refused its settings (exit status {error.code})."
        except Exception as error:  # one failing cell must not end a long study
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

    def model(self, cell: StudyCell) -> AFTLM:
        """The cell's model; another one is unloaded first."""
        from lm_eval_aft.engine.checks import require_finite
        from lm_eval_aft.lm import AFTLM

        entry = cell.model
        if self._lm is None or self._name != entry.name:
            self._lm = None
            self._documents.clear()
            lm = AFTLM(
                entry.pretrained,
                **{"device": self.device, "softmax_dtype": "float32", **entry.model_args},
                batch_size=self.batch_size,
            )
            require_finite(lm)
            lm.require_finite = True
            self._lm, self._name = lm, entry.name
            self.loads += 1
        self._lm.steer(None)
        return self._lm

    def _train(self, lm: AFTLM, cell: StudyCell) -> None:
        """Train in a folder that a killed run resumes from, and move the finished one to its place."""
        from lm_eval_aft.training.run import run
        from lm_eval_aft.training.setup import prepare

        if self.store.trained(cell.vector_key):
            return
        work = self.store.work("vector", cell.vector_key)
        if not (work / FILE_NAME).exists():
            prepared = prepare(lm, cell.plan, self._documents)
            work.parent.mkdir(parents=True, exist_ok=True)
            run(prepared, work, resume=True, progress=False, picture=False)
        self.store.settle(work, self.store.vector(cell.vector_key))

    def _baseline(self, lm: AFTLM, job: Job) -> None:
        from lm_eval_aft.evaluation.run import PlannedRun

        runs = [(PlannedRun("baseline"), ".")]
        self._scored(lm, job.cell, runs, self.store.work("baseline", job.key), self.store.baseline(job.key))

    def _score(self, lm: AFTLM, cell: StudyCell) -> None:
        """The steered run, and random directions beside it where the study asks for some."""
        from lm_eval_aft.evaluation.run import plan_runs

        spec = str(self.store.vector(cell.vector_key))
        placebo = f"random:{cell.placebos}" if cell.placebos else "none"
        states = plan_runs([spec], placebo)[1:]
        folders = ["steered", *(f"placebo/random-{i}" for i in range(cell.placebos))]
        runs = list(zip(states, folders, strict=True))
        self._scored(lm, cell, runs, self.store.work("scores", cell.key), self.store.scores(cell.key))

    def _scored(
        self, lm: AFTLM, cell: StudyCell, runs: Sequence[tuple[Any, str]], work: Path, place: Path
    ) -> None:
        from lm_eval_aft.evaluation.run import read_flags, score
        from lm_eval_aft.harness.tasks import environment_asked_once, task_manager_for

        if place.exists():
            return
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        task = cell.task.task
        config = read_flags([task], work, flags_of(cell.plan, cell.task.limit, self.batch_size))
        described = {"pretrained": cell.model.pretrained, "softmax_dtype": "float32", **cell.model.model_args}
        # As lm-eval does: tasks that build their documents for a model are given it.
        metadata = {**described, **(cell.plan.task_metadata or {})}
        manager = task_manager_for([task], cell.plan.include_path, metadata)
        for run, folder in runs:
            lm.steer(run.vector)
            # A progress bar for each of a study's thousand jobs would hide the study's own.
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


# The result of a finished cell: its scores against its baseline's, and what its vector is.


def assess(cell: StudyCell, store: Store) -> dict[str, Any]:
    """Compare a cell's scores with its baseline's, document by document.

    Returns plain values: ``rows`` (`VerdictRow`; p-values not yet adjusted for the other cells), ``vector``
    (what it is and how it was chosen), ``notes``.

    Raises:
        AFTError: scores or vector damaged or missing, runs that are not comparable, or answers that are no
            finite numbers.
    """
    baseline = read_run(store.baseline(cell.baseline_key), "baseline", "baseline")
    place = store.scores(cell.key)
    kind = "placebo" if cell.control else "steered"
    runs = [_named(read_run(place / "steered", "steered", kind), store.vector(cell.vector_key))]
    runs += [
        read_run(folder, f"placebo/{folder.name}", "placebo") for folder in sorted(place.glob("placebo/*"))
    ]
    comparisons = []
    for run in runs:
        require_comparable(baseline, run)
        if run is runs[0] and (unfit := not_finite(baseline, run)):
            raise AFTError(f"{unfit[0]}")
        comparisons += [(run, each) for each in compare_runs(baseline, run)]
    infos = {run.name: read_vector_info(run) for run in runs}
    rows = judge(baseline, comparisons, infos)
    return {
        "rows": [asdict(row) for row in rows],
        "vector": _vector(SteeringVector.load(store.vector(cell.vector_key))),
        "notes": warnings(baseline, runs, list(infos.values()), rows),
    }


def _named(run: ScoredRun, vector: Path) -> ScoredRun:
    """The run with its vector where it lies now: a study's folder may have been moved."""
    for each in run.tasks.values():
        each.results["config"]["model_args"]["vector"] = str(vector)
    return run


def _vector(vector: SteeringVector) -> dict[str, Any]:
    facts = vector.metadata
    selection, protocol = facts.get("selection") or {}, facts.get("protocol") or {}
    chosen, baseline = (selection.get(key) or {} for key in ("vector", "baseline"))
    return {
        "sha256": vector.digest(),
        "layers": list(vector.layers),
        "depth": facts.get("num_hidden_layers"),
        "norm": vector.norm(),
        "norm_share": vector.share(),
        "epoch": facts.get("epoch"),
        "chosen": protocol.get("chosen"),
        "selection_change": chosen.get("score", 0.0) - baseline.get("score", 0.0),
        "retries": protocol.get("retries_used", 0),
        "pruned": protocol.get("pruned") or _no_round(facts.get("rft") or {}),
        "engine": facts.get("engine"),
        "train": (facts.get("splits") or {}).get("train"),
    }


def _no_round(rft: dict[str, Any]) -> str:
    return "no round of rejection sampling beat the baseline" if rft.get("best_round") == 0 else ""
