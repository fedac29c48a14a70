"""Methods, training sizes and placebos on the demo tasks: one table.

    OMP_NUM_THREADS=1 python scripts/method_study.py --output method-study

trains every method on 50, 100, 400 and 2,000 documents of each demo task (every layer, two learning rates,
thinned out; three seeds of the best), the controls, and scores all of them, the baseline and a few-shot
prompt with lm-eval on the evaluation split. About an hour on one core; what is finished is kept.
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
from lm_eval_aft.cli.options import quiet_libraries
from lm_eval_aft.evaluation import evaluate_pair
from lm_eval_aft.harness import tasks_path
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.methods import METHODS
from lm_eval_aft.reporting.stats import mcnemar_exact
from lm_eval_aft.training.controls import random_like

TASKS = {
    "aft_demo_choice": ("acc_norm", "none", "shuffled"),
    "aft_demo_math": ("exact_match", "strict-match", "format"),
}
SEEDS = 3
# The same for every method: two learning rates tried on every layer, then the best with all seeds.
RECIPE: dict[str, Any] = {
    "protocol": "adaptive",
    "lr": (2e-3, 1e-2),
    "l2": 0.0,
    "epochs": 6,
    "batch_size": 4,
    "finalists": 1,
    "seeds": SEEDS,
    "retries": 0,
    "selection_docs": 300,
    "progress": False,
}


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


def interval(values: Sequence[float]) -> str:
    """Mean and its 95 % t interval over seeds or draws."""
    mean = statistics.fmean(values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+7.2f} [{mean - half:+7.2f}, {mean + half:+7.2f}]"


def line(folder: Path, task: str, name: str, files: Sequence[str]) -> dict[str, Any]:
    """Print and return how a setting's vectors do against the baseline, in points."""
    before = outcomes(folder / "baseline", task)
    gains, p_values = [], []
    for file in files:
        after = outcomes(folder / "steered" / Path(file).stem, task)
        won = sum(a > b for a, b in zip(after, before, strict=True))
        lost = sum(a < b for a, b in zip(after, before, strict=True))
        gains.append(100 * (won - lost) / len(before))
        p_values.append(mcnemar_exact(won, lost))
    shown = " ".join(f"{gain:+.1f}" for gain in gains[:SEEDS])
    click.echo(f"  {name:22s} {interval(gains)}  seeds {shown}  largest p {max(p_values):.2g}")
    return {"task": task, "setting": name, "n": len(before), "gains": gains, "p": p_values}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="method-study", show_default=True)
@click.option("--sizes", default="50,100,400,2000", show_default=True, help="Training documents.")
@click.option("--draws", default=20, show_default=True, help="Random directions.")
def main(output: Path, sizes: str, draws: int) -> None:
    """Train and score every method and control on the demo tasks; print one table."""
    quiet_libraries()
    lm = AFTLM("demo", device="cpu", batch_size=32)
    numbers = [int(size) for size in sizes.split(",")]
    rows: list[dict[str, Any]] = []
    for task, (_, _, spoiled) in TASKS.items():
        files: dict[str, list[str]] = {}
        for size in numbers:
            for method in METHODS:
                name = f"{method}-{size}"
                # Enough steps for few documents, and no more than needed for many.
                epochs = 6 if size < 1000 else 2
                own = {"method": method, "train_docs": size, "epochs": epochs, "min_epochs": 1}
                files[name] = trained(lm, output, task, name, **own)
        control_size = numbers[min(1, len(numbers) - 1)]
        name = f"{spoiled}-{control_size}"
        files[name] = trained(lm, output, task, name, control=spoiled, train_docs=control_size)
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
