"""Methods, training sizes and placebos on the demo tasks: one table.

    OMP_NUM_THREADS=1 python scripts/method_study.py --output method-study

trains every method on 50, 100, 400 and 2,000 documents of each demo task (two layers, two learning rates,
thinned out; three seeds of the best), the controls, and scores all of them, the baseline and a few-shot
prompt with lm-eval on the evaluation split. About half an hour on one core; what is finished is kept.

Placebos have two intervals. The first is over draws (or seeds) and speaks of these 1,100 documents. The
second lets the documents vary too: the variances of the mean over draws and over documents are added, which
for two crossed samples errs on the wide side (as in Owen 2007, The pigeonhole bootstrap).
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from scipy.stats import t as student

from lm_eval_aft import SteeringVector, train_vector
from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.evaluation.run import evaluate_pair
from lm_eval_aft.evaluation.stats import mcnemar_exact
from lm_eval_aft.harness.tasks import tasks_path
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.training.recipe import Rung
from lm_eval_aft.training.setup import random_like

TASKS = {
    "aft_demo_choice": ("acc_norm", "none", "shuffled"),
    "aft_demo_math": ("exact_match", "strict-match", "format"),
}
SEEDS = 3
# The same for every method: two learning rates tried on each layer, then the best with all seeds. The layers
# are those of the protocol `rapid`: at block 0 vectors come out long enough for a random direction to gain
# something too (placebo_study.py).
RECIPE: dict[str, Any] = {
    "protocol": "adaptive",
    "layers": "25%-75%",
    "lr": (2e-3, 1e-2),
    "min_epochs": 1,
    "batch_size": 4,
    "finalists": 1,
    "seeds": SEEDS,
    "retries": 0,
    "progress": False,
}
# The penalty of `make demo` keeps short what is added everywhere. Methods that read h have none: on them it
# weighs on every parameter, a router's too, which is no measure of length (drab-strong then barely learns).
L2 = 0.02
# Sums have one continuation with many scored tokens, questions one right option out of four.
SELECTION = {"aft_demo_choice": 300, "aft_demo_math": 100}
EPOCHS = {"aft_demo_choice": 6, "aft_demo_math": 3}


def sized(task: str, size: int, method: str = "static") -> dict[str, Any]:
    """The part of the recipe that depends on the task, the training size and the method.

    The search sees up to 250, then 500 documents; the epochs keep the longest runs near 500 steps.
    """
    rungs = tuple(Rung(min(1.0, seen / size), part, 1, 1 / 2) for seen, part in ((250, 1 / 2), (500, 1)))
    epochs = min(EPOCHS[task], max(1, 2000 // size))
    own = {"method": method, "l2": L2 if METHODS[method].constant else 0.0}
    return {**own, "train_docs": size, "selection_docs": SELECTION[task], "rungs": rungs, "epochs": epochs}


def trained(lm: AFTLM, output: Path, task: str, name: str, **settings: Any) -> list[str]:
    """The files of a setting's finalists, one per seed; trained unless they are there."""
    files = [output / "vectors" / f"{task}-{name}-seed-{seed}.safetensors" for seed in range(SEEDS)]
    if not all(file.exists() for file in files):
        lm.steer(None)
        folder = output / "runs" / f"{task}-{name}"
        found = train_vector(lm, task, folder, overwrite=True, **{**RECIPE, **settings})
        click.echo(f"  {task} {name}: layer {sorted(found.vector.layers)}, {found.seconds:.0f} s")
        for seed, file in enumerate(files):
            found.finalists[seed].save(file)
    return [str(file) for file in files]


def scored(output: Path, task: str, name: str, vectors: Sequence[str], *flags: str) -> Path:
    """The folder of the runs of these vectors and the baseline; scored unless it is there."""
    folder = output / "scores" / f"{task}-{name}"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        evaluate_pair("demo", vectors, [task], partial, flags=["--batch_size", "32", *flags])
        partial.rename(folder)
    return folder


def prompted(output: Path, task: str, shots: int) -> tuple[str, str]:
    """The task with so many examples in each prompt, and the folder that defines it.

    The demo's tasks fix theirs at 0, which lm-eval's --num_fewshot does not override.
    """
    folder = output / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    (original,) = Path(tasks_path()).rglob(f"{task}.yaml")
    name = f"{task}_{shots}shot"
    text = f"include: {original.resolve()}\ntask: {name}\nnum_fewshot: {shots}\n"
    (folder / f"{name}.yaml").write_text(text)
    return name, str(folder)


def outcomes(folder: Path, task: str) -> list[float]:
    """Right (1) or wrong (0) on the task's primary metric, in document order."""
    metric, filter_name, _ = next(value for name, value in TASKS.items() if task.startswith(name))
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    kept = sorted((s for s in samples if s["filter"] == filter_name), key=lambda s: s["doc_id"])
    return [float(sample[metric]) for sample in kept]


def interval(differences: Sequence[Sequence[float]], documents: bool = False) -> tuple[float, float, float]:
    """Mean in points and its 95 % t interval over seeds or draws; with ``documents``, over both.

    Args:
        differences: per vector, each document's outcome minus the baseline's.
    """
    gains = [100 * statistics.fmean(row) for row in differences]
    mean, spread = statistics.fmean(gains), statistics.variance(gains) / len(gains)
    if documents:
        shares = [100 * statistics.fmean(column) for column in zip(*differences, strict=True)]
        spread += statistics.variance(shares) / len(shares)
    half = float(student.ppf(0.975, len(gains) - 1)) * spread**0.5
    return mean, mean - half, mean + half


def line(folder: Path, task: str, name: str, files: Sequence[str]) -> dict[str, Any]:
    """Print and return how a setting's vectors do against the baseline, in points."""
    before = outcomes(folder / "baseline", task)
    rows, gains, p_values = [], [], []
    for file in files:
        after = outcomes(folder / "steered" / Path(file).stem, task)
        rows.append([a - b for a, b in zip(after, before, strict=True)])
        won, lost = rows[-1].count(1.0), rows[-1].count(-1.0)
        gains.append(100 * (won - lost) / len(before))
        p_values.append(mcnemar_exact(won, lost))
    shown = " ".join(f"{gain:+.1f}" for gain in gains[:SEEDS])
    _, low, high = interval(rows, documents=True)
    if name.startswith(("random", "shuffled", "format")):
        shown = f"{min(gains):+.1f} to {max(gains):+.1f}; over documents too [{low:+.2f}, {high:+.2f}]"
    mean, *bounds = interval(rows)
    span = ", ".join(f"{bound:+6.2f}" for bound in bounds)
    click.echo(f"  {name:22s} {mean:+7.2f} [{span}]  {shown}  p {min(p_values):.2g} to {max(p_values):.2g}")
    return {
        "task": task,
        "setting": name,
        "n": len(before),
        "gains": gains,
        "p": p_values,
        "wide": [low, high],
    }


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="method-study", show_default=True)
@click.option("--sizes", default="50,100,400,2000", show_default=True, help="Training documents.")
@click.option("--draws", default=20, show_default=True, help="Random directions.")
@click.option("--methods", default=",".join(METHODS), show_default=True, help="static among them.")
@click.option("--tasks", default=",".join(TASKS), show_default=True)
def main(output: Path, sizes: str, draws: int, methods: str, tasks: str) -> None:
    """Train and score every method and control on the demo tasks; print one table."""
    quiet_libraries()
    lm = AFTLM("demo", device="cpu", batch_size=32)
    numbers = [int(size) for size in sizes.split(",")]
    rows: list[dict[str, Any]] = []
    for task in tasks.split(","):
        spoiled = TASKS[task][2]
        files: dict[str, list[str]] = {}
        for size in numbers:
            for method in methods.split(","):
                name = f"{method}-{size}"
                files[name] = trained(lm, output, task, name, **sized(task, size, method))
        control_size = numbers[min(1, len(numbers) - 1)]
        name = f"{spoiled}-{control_size}"
        files[name] = trained(lm, output, task, name, control=spoiled, **sized(task, control_size))
        base = SteeringVector.load(files[f"static-{control_size}"][0])
        files[f"random-{control_size}"] = [
            str(random_like(base, seed).save(output / "vectors" / f"{task}-random-{seed}.safetensors"))
            for seed in range(draws)
        ]
        folder = scored(output, task, "all", [file for group in files.values() for file in group])
        before = outcomes(folder / "baseline", task)
        share = statistics.fmean(before)
        click.echo(f"\n{task}, n = {len(before)}, baseline {share:.2%}; gains in points, mean [95 % of mean]")
        for shots in (2, 4):
            name, path = prompted(output, task, shots)
            vector = files[f"static-{control_size}"][:1]
            prompt = outcomes(scored(output, name, "all", vector, "--include_path", path) / "baseline", name)
            won = sum(a > b for a, b in zip(prompt, before, strict=True))
            lost = sum(a < b for a, b in zip(prompt, before, strict=True))
            gain, p = 100 * (won - lost) / len(before), mcnemar_exact(won, lost)
            click.echo(f"  {f'{shots}-shot prompt':22s} {gain:+7.2f}  p {p:.2g}")
            rows.append({"task": task, "setting": name, "n": len(before), "gains": [gain], "p": [p]})
        rows += [line(folder, task, name, group) for name, group in files.items()]
        (output / "table.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
