"""Kills, full disks and other faults at random moments; what was interrupted goes on, nothing may be lost.

    OMP_NUM_THREADS=1 python scripts/inject_faults.py --times 50

A job (a training, an evaluation, a study, vectors added to a library) is run once undisturbed. Then, again
and again, it is begun in a process of its own, a fault strikes at a random moment, and it is taken up again;
what it comes to is compared with the undisturbed run: vectors and ledgers by their bytes (times apart),
evaluations by every answer and score. Faults: `kill` (SIGKILL), `term` (SIGTERM: exit code 143), `disk` (no
file may grow beyond a random size), `space` (a tmpfs of random size; needs the right to mount), `readonly`
(likewise), `clock` (the wall clock jumps about), `second` (another process on the same folder is refused).

A fault is `lost` when the job cannot be taken up, comes to something else, leaves strange files, or fails in
any other way than by one clear message. The last line printed is the count as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DONE, REFUSED, BROKEN = 0, 3, 4
MOST = 5  # kills injected for each that is to strike
HUNG = 1800.0  # seconds; machines may be busy
FORK = multiprocessing.get_context("fork")  # the children have torch and the model already
FAULTS = ("kill", "term", "disk", "space", "readonly", "clock", "second")


@dataclass(frozen=True)
class Job:
    """Something that takes a while and writes into a folder.

    Attributes:
        work: does it, or goes on with it.
        outcome: what of the folder must be the same however often it was interrupted.
        faults: those that make sense for it.
    """

    name: str
    work: Callable[[Path], None]
    outcome: Callable[[Path], Any]
    faults: tuple[str, ...] = FAULTS


# Two cells of one model and task, and a baseline.
STUDY = """
models: [demo]
tasks: [aft_demo_choice]
methods: [static, {name: placebo, control: random}]
seeds: 1
recipe: {protocol: rapid, layers: "1", train_docs: 8, selection_docs: 8, epochs: 1, batch_size: 4, lr: 1.0e-2}
evaluation: {limit: 16, batch_size: 16}
"""


@dataclass
class Count:
    """What was injected and what became of it."""

    injected: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    resumed: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


# Jobs -----------------------------------------------------------------------------------------------------


def jobs(scratch: Path) -> list[Job]:
    """The jobs; a further command is one more row here."""
    from lm_eval_aft import AFTError
    from lm_eval_aft._util.process import terminable
    from lm_eval_aft.evaluation.run import evaluate_pair
    from lm_eval_aft.library.store import Library
    from lm_eval_aft.lm import AFTLM
    from lm_eval_aft.studies.config import read_bench_study
    from lm_eval_aft.studies.jobs import Session, Store
    from lm_eval_aft.studies.runner import Local, run_study
    from lm_eval_aft.training.run import train_vector

    lm = AFTLM("demo", device="cpu", batch_size=16)
    plan: dict[str, Any] = {
        "protocol": "adaptive",
        "lr": (1e-3, 1e-2),
        "l2": (0.0, 1e-2),
        "seeds": 2,
        "layers": "1-2",
        "train_docs": 16,
        "selection_docs": 16,
        "epochs": 2,
        "batch_size": 4,
        "retries": 0,
        "progress": False,
    }

    def train(folder: Path) -> None:
        with terminable():
            if not (folder / "vector.safetensors").exists():
                train_vector(lm, "aft_demo_choice", folder, resume=True, **plan)

    def evaluate(folder: Path) -> None:
        options: dict[str, Any] = {"placebo": "random:1", "flags": ["--limit", "24", "--batch_size", "16"]}
        tasks = ["aft_demo_choice", "aft_demo_math"]
        with terminable():
            evaluate_pair("demo", str(scratch / "vector"), tasks, folder, resume=True, **options)

    def add(folder: Path) -> None:
        with terminable():
            for number in range(3):
                Library(folder).add(scratch / "vector", f"math/number-{number}", replace=True)

    study = scratch / "study.yaml"
    study.write_text(STUDY)

    def bench(folder: Path) -> None:
        store = Store(folder)
        worker = Local(Session(store, device="cpu", batch_size="16", data=None))
        with terminable():
            report = run_study(read_bench_study(study), study, store, worker, resume=True)
        failed = [cell for cell in report.cells if cell.state == "failed"]
        if failed:
            raise AFTError(str(failed[0].why), "Go on with --resume.")

    train(scratch / "vector")
    return [
        Job("train", train, vector_outcome),
        Job("eval", evaluate, scores_outcome),
        Job("bench", bench, study_outcome),
        # Adding takes no lock: several processes may add at once.
        Job("vectors add", add, library_outcome, ("kill", "term", "disk", "space", "readonly", "clock")),
    ]


def vector_outcome(folder: Path) -> Any:
    """The files' names, every vector's tensors and the ledger without times."""
    from safetensors.numpy import load_file

    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    vectors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        vectors[str(path.relative_to(folder))] = {k: v.tobytes() for k, v in load_file(path).items()}
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return names, vectors, [{k: v for k, v in line.items() if k != "time"} for line in lines]


def study_outcome(folder: Path) -> Any:
    """Every vector's tensors, every score of every document, and the table."""
    vectors = {}
    for path in sorted(folder.glob("vectors/*")):
        vectors[path.name] = vector_outcome(path)[1]
    scores = {
        path.name: scores_outcome(path)
        for part in ("scores", "baselines")
        for path in sorted(folder.glob(f"{part}/*"))
    }
    return vectors, scores, (folder / "report.csv").read_text()


def scores_outcome(folder: Path) -> Any:
    """Every document's answers and scores in every run, and the scores of the tasks."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json*")):
        run = path.relative_to(folder).parent.parts[:2] if path.parent != folder else (path.name,)
        if path.name.startswith("samples_"):
            task = path.name[len("samples_") :].rpartition("_")[0]
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            # Log-likelihoods may differ by rounding with what else is scored in the same pass.
            found[f"{run} {task}"] = [
                {k: _rounded(v) for k, v in row.items() if k not in ("doc", "arguments")} for row in rows
            ]
        elif path.name.startswith("results_"):
            found[f"{run} results"] = json.loads(path.read_text())["results"]
        else:
            found[str(run)] = path.read_text()
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    with contextlib.suppress(TypeError, ValueError):
        return round(float(value), 3)
    return value


def library_outcome(folder: Path) -> Any:
    """All files of all vectors, which must be sound."""
    from lm_eval_aft.library.files import damage
    from lm_eval_aft.library.store import Library

    library = Library(folder)
    if any(damage(library.path(name)) for name in library.names()):
        raise ValueError("the library is damaged")
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _set_aside(folder, path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names if path.name != ".index.json"}


def _set_aside(folder: Path, path: Path) -> bool:
    """A dead process's folder: the next adding an hour later deletes it; no listing shows it."""
    return path.relative_to(folder).parts[0].startswith((".adding-", ".replaced-", ".removed-"))


# Faults ---------------------------------------------------------------------------------------------------


def child(job: Job, folder: Path, before: Callable[[], None], words: Path) -> None:
    """The process that is struck: it ends with what became of the job."""
    from lm_eval_aft import AFTError

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = io.StringIO()
    code = DONE
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            before()
            job.work(folder)
        except AFTError as error:
            code = REFUSED
            output.write(error.format_message())
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            code = BROKEN
            traceback.print_exc(file=output)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    words.write_text(output.getvalue(), encoding="utf-8")
    os._exit(code)


def begun(job: Job, folder: Path, words: Path, before: Callable[[], None] = lambda: None) -> Any:
    """Start the job in a process of its own."""
    process = FORK.Process(target=child, args=(job, folder, before, words))
    process.start()
    return process


def ended(process: Any, allowed: tuple[int, ...], words: Path) -> int:
    """Wait for it; anything but these exit codes is a failure."""
    process.join(HUNG)
    if process.exitcode is None:
        process.kill()
        raise ValueError(f"it hung for {HUNG:.0f} seconds")
    if process.exitcode not in allowed:
        told = words.read_text(encoding="utf-8")[-1500:] if words.exists() else ""
        raise ValueError(f"exit code {process.exitcode} instead of {allowed}: {told}")
    return int(process.exitcode)


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes there."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def strike(job: Job, fault: str, place: Path, seconds: float, longest: int, rng: random.Random) -> bool:
    """Begin the job, let the fault strike, take it up again; whether the fault stopped anything.

    Leaves what the job came to in ``place/out``.
    """
    folder, words = place / "out", place / "words"
    if fault in ("kill", "term"):
        process = begun(job, folder, words)
        time.sleep(rng.uniform(0, seconds))
        os.kill(process.pid, signal.SIGKILL if fault == "kill" else signal.SIGTERM)
        code = ended(process, (DONE, -signal.SIGKILL if fault == "kill" else 143, -signal.SIGTERM), words)
        stopped = code != DONE
    elif fault == "disk":
        limit = rng.randrange(longest)

        def before() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        stopped = ended(begun(job, folder, words, before), (DONE, REFUSED), words) == REFUSED
    elif fault in ("space", "readonly"):
        total = sum(path.stat().st_size for path in (place.parent / "whole").rglob("*") if path.is_file())
        with mounted(place / "disk", rng.randrange(4096, max(8192, total)) if fault == "space" else 0):
            inner = place / "disk" / "out"
            if fault == "readonly":
                inner.mkdir()
                subprocess.run(["mount", "-o", "remount,ro", str(place / "disk")], check=True)
            stopped = ended(begun(job, inner, words), (DONE, REFUSED), words) == REFUSED
            if inner.exists():
                shutil.copytree(inner, folder)
    elif fault == "clock":
        now, jumps = time.time(), itertools.count()

        def before() -> None:
            time.time = lambda: now + rng.uniform(-1, 1) * 1e9 + next(jumps)

        ended(begun(job, folder, words, before), (DONE,), words)
        stopped = True
    else:
        process = begun(job, folder, words)
        time.sleep(rng.uniform(0.05, 0.5) * seconds)
        alive = process.is_alive()
        code = ended(begun(job, folder, place / "other"), (DONE, REFUSED), place / "other")
        told = (place / "other").read_text(encoding="utf-8")
        ended(process, (DONE, REFUSED), words)
        stopped = alive and code == REFUSED and "Another process is writing into" in told
        if alive and not stopped and code == REFUSED:
            raise ValueError(f"the second process said: {told[-500:]}")
    ended(begun(job, folder, words), (DONE,), words)
    return stopped


def undisturbed(job: Job, place: Path) -> tuple[float, Any, int]:
    """How long the job takes, what it comes to, and the length of its longest file."""
    words = place / "words"
    for folder in (place / "first", place / "whole"):  # the first one pays for what is loaded late
        began = time.monotonic()
        ended(begun(job, folder, words), (DONE,), words)
        seconds = time.monotonic() - began
    wanted = job.outcome(place / "whole")
    if job.outcome(place / "first") != wanted:
        raise SystemExit(f"inject_faults: two undisturbed runs of {job.name} differ")
    longest = max(path.stat().st_size for path in (place / "whole").rglob("*") if path.is_file())
    return seconds, wanted, longest


def run(
    job: Job,
    fault: str,
    times: int,
    place: Path,
    whole: tuple[float, Any, int],
    count: Count,
    rng: random.Random,
) -> None:
    """Inject one kind of fault into one job so many times; kills until so many found it at work."""
    key, started = f"{job.name}: {fault}", time.monotonic()
    for number in itertools.count():
        done = count.struck[key] if fault == "kill" else number
        if done >= times or number >= MOST * times:
            break
        trial = place / f"{fault}-{number}"
        trial.mkdir()
        count.injected[key] += 1
        try:
            count.struck[key] += strike(job, fault, trial, whole[0], whole[2], rng)
            if job.outcome(trial / "out") != whole[1]:
                raise ValueError("it came to something else")
            count.resumed[key] += 1
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            count.lost.append(f"{key} {number}: {error}")
            print(f"LOST {count.lost[-1]}", flush=True)
        else:
            shutil.rmtree(trial)
    print(
        f"{key}: {count.injected[key]} injected, {count.struck[key]} stopped the job, "
        f"{count.resumed[key]} came to the same ({time.monotonic() - started:.0f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--times", type=int, default=50, help="kills per job that find it at work (default 50)"
    )
    parser.add_argument("--others", type=int, help="other faults per job and kind (default: a fifth of it)")
    parser.add_argument("--jobs", default="train,eval,bench,vectors add", help="comma-separated")
    parser.add_argument("--faults", default=",".join(FAULTS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    others = max(1, options.times // 5) if options.others is None else options.others
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval_aft._util.process import quiet_libraries

    quiet_libraries()
    rng, count = random.Random(options.seed), Count()
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    for job in jobs(scratch):
        if job.name not in options.jobs.split(","):
            continue
        place = scratch / job.name.replace(" ", "-")
        place.mkdir()
        whole = undisturbed(job, place)
        for fault in options.faults.split(","):
            if fault in job.faults:
                times = options.times if fault == "kill" else others
                run(job, fault, times, place, whole, count, rng)
    if not count.lost:
        shutil.rmtree(scratch)
    told = {"injected": count.injected, "stopped": count.struck, "resumed": count.resumed}
    totals = {name: sum(each.values()) for name, each in told.items()}
    print(json.dumps({**totals, "lost": len(count.lost), "by_kind": told}))
    sys.exit(1 if count.lost else 0)


if __name__ == "__main__":
    main()
