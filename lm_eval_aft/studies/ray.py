"""A study's jobs on a Ray cluster: each worker is an actor that keeps a model loaded.

The driver alone writes the ledger. A worker that can reach the driver's folder works there, so that another
can resume its job from the last epoch; the files of any other come back through Ray's object store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.studies.jobs import Done, Job, Schedule, Session, Store

logger = logging.getLogger(__name__)
SEEN = ".seen"  # holds a token by which a worker recognises the driver's folder


@dataclass(frozen=True)
class RayOptions:
    """How to use a cluster.

    Attributes:
        gpus, cpus: of each worker; fractions share a GPU. ``gpus`` of ``None``: 1 where there are any.
    """

    address: str | None = None  # as `ray.init` takes it; ``None`` starts a cluster on this machine
    workers: int | None = None  # how many actors; ``None``: as many as the cluster has room for
    gpus: float | None = None
    cpus: float = 1.0
    runtime_env: dict[str, Any] | None = None  # as `ray.init` takes it
    shared: bool = True  # whether workers may work in the driver's folder where they can reach it


def read_runtime_env(text: str | None) -> dict[str, Any] | None:
    """A runtime environment from JSON or from a YAML file.

    Raises:
        AFTError: neither.
    """
    if text is None:
        return None
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(Path(text).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AFTError(f"The runtime environment {text!r} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise AFTError(f"The runtime environment {text!r} is not a mapping.", "See Ray's `runtime_env`.")
    return found


class Worker:
    """What runs inside an actor."""

    def __init__(self, root: str, token: str, settings: dict[str, Any], shared: bool) -> None:
        from lm_eval_aft._util.process import quiet_libraries

        quiet_libraries()
        logging.getLogger("lm_eval_aft").setLevel(logging.WARNING)
        place = Path(root)
        self.sees = shared and _reads(place / SEEN) == token
        self._own = None if self.sees else tempfile.TemporaryDirectory(prefix="aft-bench-")
        self.store = Store(place if self._own is None else Path(self._own.name))
        self.session = Session(self.store, **settings)
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def ready(self) -> str:
        """Its name, once it has started."""
        return self.name

    def do(self, job: Job, files: dict[str, bytes]) -> Done:
        """Do a job; ``files`` are those of the driver's store that it can start from."""
        if not self.sees:
            _unpack(files, self.store.root)
        done = self.session.do(job)
        done.worker = self.name
        if not self.sees and not done.error:
            places = [self.store.baseline(job.key)]
            if job.kind == "cell":
                places = [self.store.vector(job.cell.vector_key), self.store.scores(job.key)]
            done.files = {}
            for place in places:
                done.files |= _pack(place, self.store.root)
        return done


class Ray:
    """Runs jobs on a Ray cluster; lost workers are replaced and their jobs done again."""

    def __init__(self, store: Store, settings: dict[str, Any], options: RayOptions) -> None:
        self.store, self.settings, self.options = store, settings, options
        self._token = secrets.token_hex(8)
        self._losses: dict[str, int] = {}

    def run(self, schedule: Schedule, begin: Callable[[Job], None], finish: Callable[[Done], None]) -> None:
        """See `lm_eval_aft.studies.runner.Executor`."""
        if not schedule.open:
            return
        ray = _ray()
        ours = not ray.is_initialized()
        if ours:
            self._connect(ray)
        (self.store.root / SEEN).write_text(self._token, encoding="utf-8")
        try:
            self._run(ray, schedule, begin, finish)
        finally:
            (self.store.root / SEEN).unlink(missing_ok=True)
            if ours:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        address = self.options.address or os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {"address": address}
        if address is None:  # a cluster on this machine, with room for the workers asked for
            wanted = math.ceil((self.options.workers or 1) * self.options.cpus)
            own = {
                "address": "local",
                "num_cpus": max(os.cpu_count() or 1, wanted),
                "include_dashboard": False,
            }
        try:
            ray.init(
                **own,
                runtime_env=self.options.runtime_env,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except Exception as error:  # Ray raises bare ones
            raise AFTError(
                f"Ray cannot be used: {str(error).strip().partition(chr(10))[0]}", "Check --ray-address."
            ) from error

    def _run(
        self, ray: Any, schedule: Schedule, begin: Callable[[Job], None], finish: Callable[[Done], None]
    ) -> None:
        idle = IdleActors(ray, self._maker(ray))
        models: dict[Any, str] = {}
        tasks: dict[Any, tuple[Any, Job]] = {}
        for _ in range(self._slots(ray, len(schedule.jobs))):
            idle.start()
        try:
            while schedule.open:
                for actor in list(idle.free):
                    job = schedule.take(models.get(actor, ""))
                    if job is None:
                        break
                    idle.free.remove(actor)
                    models[actor] = job.cell.model.name
                    begin(job)
                    tasks[actor.do.remote(job, self._files(job))] = (actor, job)
                if not tasks and not idle.coming:
                    raise AFTError(
                        "Jobs are left that no worker can start.", "This is a bug: please report it."
                    )
                (reference,), _ = ray.wait([*tasks, *idle.coming], num_returns=1)
                if reference in idle.coming:
                    idle.arrived(reference, alone=not tasks)
                    continue
                actor, job = tasks.pop(reference)
                try:
                    done: Done = ray.get(reference)
                except ray.exceptions.RayError as error:
                    models.pop(actor, None)
                    with contextlib.suppress(ray.exceptions.RayError):
                        ray.kill(actor)
                    idle.start()
                    self._lost(schedule, job, error, finish)
                    continue
                idle.free.append(actor)
                if done.files is not None:
                    self._keep(done.files)
                    done.files = None
                finish(done)
        finally:
            for actor in (*idle.free, *idle.coming.values(), *(actor for actor, _ in tasks.values())):
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor)

    def _maker(self, ray: Any) -> Callable[[], Any]:
        # Lost actors are replaced by hand: their job is known here, and must not be run twice.
        resources = {"num_cpus": self.options.cpus, "num_gpus": self._gpus(ray)}
        remote = ray.remote(Worker).options(**resources, max_restarts=0)
        arguments = (str(self.store.root), self._token, self.settings, self.options.shared)
        return lambda: remote.remote(*arguments)

    def _gpus(self, ray: Any) -> float:
        if self.options.gpus is not None:
            return self.options.gpus
        return 1.0 if ray.cluster_resources().get("GPU") else 0.0

    def _slots(self, ray: Any, jobs: int) -> int:
        """How many workers to start: as many as the cluster has room for, unless fewer were asked for."""
        there, gpus, cpus = ray.cluster_resources(), self._gpus(ray), self.options.cpus
        room = [there.get("CPU", 0) / cpus] if cpus else []
        room += [there.get("GPU", 0) / gpus] if gpus else []
        slots = int(min(room, default=1) + 1e-9)
        if slots < 1:
            raise AFTError(
                f"The Ray cluster has no slot of {cpus:g} CPUs and {gpus:g} GPUs.",
                "Ask for less with --cpus-per-worker and --gpus-per-worker.",
            )
        return min(slots, jobs, self.options.workers or slots)

    def _lost(self, schedule: Schedule, job: Job, error: Exception, finish: Callable[[Done], None]) -> None:
        self._losses[job.key] = self._losses.get(job.key, 0) + 1
        logger.warning("The worker of %s was lost (%s).", job.name, type(error).__name__)
        if self._losses[job.key] < LOSSES:
            schedule.give_back(job)
        else:
            finish(Done(job, f"{LOSSES} workers died while doing it, the last with {type(error).__name__}."))

    def _files(self, job: Job) -> dict[str, bytes]:
        """A finished vector that is still to be scored, for workers that cannot reach it."""
        if job.kind != "cell" or not self.store.trained(job.cell.vector_key):
            return {}
        return _pack(self.store.vector(job.cell.vector_key), self.store.root)

    def _keep(self, files: dict[str, bytes]) -> None:
        """Store a worker's files; each folder appears complete."""
        (self.store.root / "work").mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="ray-", dir=self.store.root / "work"))
        _unpack(files, work)
        for made in work.glob("*/*"):
            self.store.settle(made, self.store.root / made.relative_to(work))
        shutil.rmtree(work)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise AFTError("Ray is not installed.", "pip install 'lm-eval-aft[ray]'") from error
    return ray


def _reads(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _pack(folder: Path, root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _unpack(files: dict[str, bytes], root: Path) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


LOSSES = 3  # workers that may die over one job, or while starting, before it is given up


class IdleActors:
    """Ray's actors that have no job.

    Only started ones get a job: one that the cluster has no room for would keep it waiting for ever.

    Attributes:
        free: those that have started.
        coming: those that have not, by the reference that resolves when they have.
    """

    def __init__(self, ray: Any, make: Callable[[], Any]) -> None:
        self._ray, self._make = ray, make
        self.free: list[Any] = []
        self.coming: dict[Any, Any] = {}
        self._failed_starts = 0

    def start(self) -> None:
        """Start one more."""
        actor = self._make()
        self.coming[actor.ready.remote()] = actor

    def arrived(self, reference: Any, alone: bool) -> None:
        """An actor has started or failed to; ``alone``: no other is at work.

        Raises:
            AFTError: it failed to start, as all others did.
        """
        actor = self.coming.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts <= LOSSES:
                self.start()
            elif alone and not self.free and not self.coming:
                raise AFTError(
                    f"No worker could be started: {str(error).strip().rpartition(chr(10))[2]}",
                    "Check --runtime-env, and what is installed on the cluster's machines.",
                ) from error
        else:
            self.free.append(actor)
