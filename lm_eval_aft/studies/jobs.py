"""The cells of a study: what each depends on, what is left to do, and doing it."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonlines

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import LOCK, exclusive_dir
from lm_eval_aft.evaluation.compare import compare_runs, judge, require_comparable
from lm_eval_aft.evaluation.report import warnings
from lm_eval_aft.evaluation.results import ScoredRun, read_run
from lm_eval_aft.evaluation.vector_info import read_vector_info
from lm_eval_aft.harness.identity import digest, model_identity, task_identity
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.studies.config import BenchStudy, MethodEntry, ModelEntry, TaskEntry
from lm_eval_aft.training.recipe import TrainingPlan

if TYPE_CHECKING:
    from lm_eval_aft.lm import AFTLM

# Part of every address: to be raised when the same settings no longer mean the same result.
CELL_FORMAT = "aft-bench/1"


@dataclass(frozen=True)
class StudyCell:
    """One model, task, method and seed.

    Attributes:
        vector_key: address of the vector: model, task and training plan.
        baseline_key: address of the baseline's scores: model, task, prompts and limit.
        key: address of the cell's result: both of these, and the number of placebos.
    """

    model: ModelEntry
    task: TaskEntry
    method: MethodEntry
    seed: int
    plan: TrainingPlan
    placebos: int
    vector_key: str
    baseline_key: str
    key: str

    @property
    def name(self) -> str:
        """What it is called, and what ``--only`` looks at."""
        return f"{self.model.name}/{self.task.name}/{self.method.name}/seed-{self.seed}"

    @property
    def series(self) -> tuple[str, str, str]:
        """What its sisters of other seeds share with it."""
        return (self.model.name, self.task.name, self.method.name)

    @property
    def control(self) -> bool:
        """Whether it is a placebo by design, which no verdict is asked of."""
        return self.plan.control is not None

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether its name, or one part of it, fits one of the patterns; without patterns, yes."""
        texts = [self.name, *self.name.split("/")]
        return not patterns or any(fnmatchcase(text, pattern) for pattern in patterns for text in texts)


def build_cells(study: BenchStudy) -> list[StudyCell]:
    """Every cell of the study, model by model, task by task.

    To be called in the study's ``data`` folder: what lies there belongs to the tasks' identities.

    Raises:
        AFTError: a task that the harness does not have.
    """
    models = {entry.name: model_identity(entry.pretrained, entry.model_args) for entry in study.models}
    tasks = {entry.name: task_identity(entry.task, study.include_path) for entry in study.tasks}
    _require_known(study, [entry.task for entry in study.tasks if "config" not in tasks[entry.name]])
    cells = []
    for model in study.models:
        for task in study.tasks:
            for method in study.methods:
                for seed in study.seeds:
                    plan = study.plan(model, task, method, seed)
                    made = {key: value for key, value in plan.to_dict().items() if key != "include_path"}
                    about = [CELL_FORMAT, models[model.name], tasks[task.name]]
                    vector_key = digest([*about, made])
                    baseline_key = digest([*about, task.limit, asdict(plan.prompts)])
                    key = digest([vector_key, baseline_key, study.evaluation.placebos])
                    own = (model, task, method, seed, plan, study.evaluation.placebos)
                    cells.append(StudyCell(*own, vector_key, baseline_key, key))
    return cells


def _require_known(study: BenchStudy, unknown: list[str]) -> None:
    if not unknown:
        return
    from lm_eval_aft.harness.tasks import check_names, full_index

    check_names(unknown, full_index(study.include_path))  # tells the nearest names
    raise AFTError(
        f"{', '.join(unknown)}: a group of tasks, or one without a file of its own.",
        "A cell is trained and scored on one plain task: name its members one by one.",
    )


# The folder of a study: finished vectors and scores by their addresses, work in progress, one ledger.

STUDY_LEDGER = "ledger.jsonl"


class Store:
    """Where a study's results lie.

    ``vectors/KEY``, ``baselines/KEY`` and ``scores/KEY`` are whole or not there: they are made under
    ``work/`` and renamed. The keys are those of `lm_eval_aft.studies.jobs.StudyCell`.
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
        """Take something damaged out of the way, to ``errors``."""
        aside = self.root / "errors" / f"{place.parent.name}-{place.name}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)

    @contextmanager
    def opened(self, resume: bool) -> Iterator[StudyLedger]:
        """The study's ledger, for this process alone.

        Raises:
            AFTError: the folder holds a study and ``resume`` is not set, or something else; or another
                process is at it.
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
                "Go on with --resume (what is finished is kept, also where the study file was changed), or "
                "choose another folder.",
            )
        with exclusive_dir(self.root):
            path.touch()
            yield StudyLedger(path)


class StudyLedger:
    """``ledger.jsonl``: one line per finished cell, and what else happened; written by one process."""

    def __init__(self, path: Path, mend: bool = True) -> None:
        self.path = path
        if mend:
            self._mend()
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, dict[str, Any]] = {}
        with jsonlines.open(path) as reader:
            for line in reader.iter(type=dict, skip_invalid=True):
                self._read(line)

    def append(self, **line: Any) -> None:
        """Add one line."""
        with jsonlines.open(self.path, "a") as writer:
            writer.write(line)
        self._read(line)

    def _read(self, line: dict[str, Any]) -> None:
        if line.get("event") == "cell":
            self.outcomes[str(line.get("key"))] = line
            self.failures.pop(str(line.get("key")), None)
        elif line.get("event") == "failed":
            self.failures[str(line.get("key"))] = line

    def _mend(self) -> None:
        """Drop a last line that sudden death cut short: the next one would be glued to it."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with self.path.open("r+b") as stream:
                stream.truncate(data.rfind(b"\n") + 1)


# What is left to do, in which order, and who may do it now.

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
        """Note how a job ended; ``outcome`` is a cell's, see `lm_eval_aft.studies.jobs`."""
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


# What one worker does: it holds a model, trains cells and scores them.


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
    cell: StudyCell

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

    def model(self, cell: StudyCell) -> AFTLM:
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

    def _train(self, lm: AFTLM, cell: StudyCell) -> None:
        """Train in a folder that a killed run goes on from; the finished one gets its place."""
        from lm_eval_aft.steering.vector_file import FILE_NAME
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

        place = self.store.baseline(job.key)
        if not place.exists():
            self._scored(
                lm, job.cell, [(PlannedRun("baseline"), ".")], self.store.work("baseline", job.key), place
            )

    def _score(self, lm: AFTLM, cell: StudyCell) -> None:
        """The steered run, and random directions beside it where the study wants some."""
        from lm_eval_aft.evaluation.run import plan_runs

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
        self, lm: AFTLM, cell: StudyCell, runs: Sequence[tuple[Any, str]], work: Path, place: Path
    ) -> None:
        from lm_eval_aft.evaluation.run import read_flags, score
        from lm_eval_aft.harness.tasks import environment_asked_once, task_manager_for

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


# How a finished cell came out: its scores against its baseline's, and what its vector is.


def assess(cell: StudyCell, store: Store) -> dict[str, Any]:
    """Compare a cell's scores with its baseline's, document by document.

    Returns plain values: ``rows`` (see `lm_eval_aft.evaluation.compare.VerdictRow`; p-values not
    yet adjusted for the other cells), ``vector`` (what it is and how it was chosen), ``notes``.

    Raises:
        AFTError: scores or vector damaged or missing, or runs that were not asked the same.
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
