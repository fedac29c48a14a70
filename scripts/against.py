"""An old checkout against this one, in turns: what `bench_*.py --against` runs.

    OMP_NUM_THREADS=1 python scripts/against.py OLD                       # every kind of work, three minutes
    OMP_NUM_THREADS=1 python scripts/against.py OLD --only scoring --rounds 30

Two worker processes, one a checkout, stay alive and speak JSON over pipes; one works while the other waits,
and who comes first alternates. They use nothing but the package's public functions and commands, so any
released version can be the old one. Compared are the medians of process CPU time, and what was computed.

The last line is one JSON object: for every kind of work the ratio new / old of the medians, the quartiles of
the rounds' ratios, and the largest difference of the numbers computed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Kinds of work, and how many rounds of each take about half a minute.
KINDS = {"startup": 4, "training": 10, "scoring": 15, "generation": 20, "export": 10, "plan": 4}
COMMANDS = {  # of "startup": each in a fresh interpreter
    "python": ["-c", "pass"],
    "import": ["-c", "import lm_eval_aft"],
    "help": ["-m", "lm_eval_aft.cli.main", "--help"],
    "import of the model": ["-c", "import lm_eval_aft.lm"],
}
STUDY = """
models: [EleutherAI/pythia-70m]
tasks: [hellaswag, {task: arc_challenge, num_fewshot: 5}]
methods: [static, caa]
"""


def spent(who: int = resource.RUSAGE_SELF) -> float:
    """CPU seconds of this process, or of the children it waited for."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


# What a worker does. Each function prepares, and returns the work of one round, which returns numbers.


def training(folder: Path) -> Callable[[], list[float]]:
    from lm_eval_aft import train_vector
    from lm_eval_aft.lm import AFTLM

    lm = AFTLM("demo", device="cpu")
    settings = {"protocol": "maximum", "layers": "1,2", "lr": 1e-2, "l2": 0.0, "epochs": 2, "seeds": 1}
    sizes = {"train_docs": 48, "selection_docs": 64, "batch_size": 4, "retries": 0}

    def work() -> list[float]:
        result = train_vector(lm, "aft_demo_choice", **settings, **sizes, progress=False)
        (layer,) = result.vector.layers.values()
        return list(map(float, layer))

    return work


def _lm() -> Any:
    import torch

    from lm_eval_aft import SteeringVector
    from lm_eval_aft.lm import AFTLM

    lm = AFTLM("demo", device="cpu", batch_size=16)
    size = int(lm.model.config.hidden_size)
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(0))
    lm.steer(SteeringVector({1: numbers / numbers.norm()}))
    return lm


def _prompts(count: int) -> list[str]:
    words = "a cat sees two red boxes and then three blue ones near the old house by the river".split()
    return [" ".join(words[(i * 7 + j * 3) % len(words)] for j in range(20 + i % 30)) for i in range(count)]


def scoring(folder: Path) -> Callable[[], list[float]]:
    from lm_eval.api.instance import Instance

    lm = _lm()
    options = (" a box", " the river", " two cats", " nothing at all")
    asked = [
        Instance("loglikelihood", {}, (prompt, option), 0, ("bench", number, 1))
        for number, prompt in enumerate(_prompts(100))
        for option in options
    ]
    return lambda: [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]


def generation(folder: Path) -> Callable[[], list[float]]:
    from lm_eval.api.instance import Instance

    lm = _lm()
    settings = {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False, "temperature": 0.0}
    asked = [
        Instance("generate_until", {}, (prompt, dict(settings)), 0, ("bench", number, 1))
        for number, prompt in enumerate(_prompts(32))
    ]

    def work() -> list[float]:
        return [float(ord(c)) for text in lm.generate_until(asked, disable_tqdm=True) for c in text]

    return work


def export(folder: Path) -> Callable[[], list[float]]:
    from lm_eval_aft import train_vector

    settings = {"protocol": "rapid", "layers": "1", "epochs": 1, "train_docs": 8, "selection_docs": 8}
    train_vector("demo", "aft_demo_choice", folder / "vector", **settings, progress=False)
    numbers = itertools.count()

    def work() -> list[float]:
        output = str(folder / f"merged-{next(numbers)}")
        _command("export", str(folder / "vector"), "--to", "merged", "--output", output)
        shutil.rmtree(output)
        return []

    return work


def _command(*words: str) -> str:
    from click.testing import CliRunner

    from lm_eval_aft.cli.main import aft

    done = CliRunner().invoke(aft, list(words))
    if done.exit_code:
        raise SystemExit(f"aft {' '.join(words)}: {done.output}")
    return done.output


def plan(folder: Path) -> Callable[[], list[float]]:
    study = folder / "study.yaml"
    study.write_text(STUDY)

    def work() -> list[float]:
        output = _command("bench", str(study), "--dry-run", "--plan-for", "80gb")
        return [float(word) for word in output.split() if word.replace(".", "").isdigit()]

    return work


WORK = {"training": training, "scoring": scoring, "generation": generation, "export": export, "plan": plan}


def serve(kind: str, root: Path) -> None:
    """The worker: for every line it reads, one round; it answers with CPU seconds and numbers."""
    import lm_eval_aft

    if not Path(lm_eval_aft.__file__).resolve().is_relative_to(root):
        raise SystemExit(f"{lm_eval_aft.__file__} was imported, which is not below {root}.")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    with tempfile.TemporaryDirectory() as folder:
        work = WORK[kind](Path(folder))
        for _ in sys.stdin:
            before = spent()
            numbers = work()
            print(json.dumps([spent() - before, numbers]), file=answers, flush=True)


# The other side.


class Worker:
    """A checkout's process."""

    def __init__(self, kind: str, root: Path) -> None:
        self.command = [sys.executable, __file__, "--serve", kind, "--root", str(root)]
        self.environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        self.kind, self.root = kind, root

    def __enter__(self) -> Worker:
        if self.kind != "startup":
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.kind != "startup":
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                self.process.stdin.close()
            self.process.wait(60)

    def round(self) -> tuple[dict[str, float], list[float]]:
        """CPU seconds by part, and numbers."""
        if self.kind == "startup":
            return {name: self._start(command) for name, command in COMMANDS.items()}, []
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The worker of {self.root} ended: {' '.join(self.command)}")
        seconds, numbers = json.loads(line)
        return {self.kind: seconds}, numbers

    def _start(self, command: list[str]) -> float:
        before = spent(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *command], env=self.environment, check=True, stdout=subprocess.DEVNULL, cwd="/"
        )
        return spent(resource.RUSAGE_CHILDREN) - before


def compare(kind: str, old: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """One record for each part of a kind of work."""
    times: dict[str, list[tuple[float, float]]] = {}
    apart: float | None = None
    with Worker(kind, old) as before, Worker(kind, ROOT) as after:
        for number in range(-1, rounds):  # the first warms up
            found = {}
            for worker in (before, after) if number % 2 else (after, before):
                found[worker] = worker.round()
            (olds, numbers), (news, others) = found[before], found[after]
            if len(numbers) != len(others):
                apart = float("inf")
            elif numbers:
                apart = max(apart or 0.0, *(abs(a - b) for a, b in zip(numbers, others, strict=True)))
            if number >= 0:
                for part, seconds in olds.items():
                    times.setdefault(part, []).append((seconds, news[part]))
    for part, pairs in times.items():
        first, second = (statistics.median(side) for side in zip(*pairs, strict=True))
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        yield {
            "name": part,
            "old_seconds": round(first, 4),
            "new_seconds": round(second, 4),
            "ratio": round(second / first, 4),
            "paired_ratio_quartiles": [round(each, 4) for each in (low, middle, high)],
            "rounds": len(pairs),
            "max_abs_diff": apart,
        }


def main(kinds: list[str], old: Path, rounds: int | None = None) -> None:
    """Compare, show a line for each, and print the JSON object."""
    old = old.resolve()
    if not (old / "lm_eval_aft" / "__init__.py").is_file():
        raise SystemExit(f"{old} is not the root of a checkout: it has no lm_eval_aft.")
    found = []
    for kind in kinds:
        for record in compare(kind, old, max(2, rounds or KINDS[kind])):
            found.append(record)
            low, middle, high = record["paired_ratio_quartiles"]
            print(
                f"{record['name']:20s} {record['old_seconds']:8.3f} s -> {record['new_seconds']:8.3f} s   "
                f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                file=sys.stderr,
                flush=True,
            )
    print(json.dumps({"against": str(old), "compared": found}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="root of the old checkout")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, help="of each kind of work")
    parser.add_argument("--serve", choices=list(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.root.resolve())
    elif options.old is None:
        parser.error("name the old checkout")
    else:
        main(options.only, options.old, options.rounds)
