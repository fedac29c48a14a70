"""The demo's figures: vectors, their placebos, and each vector on the other task.

    python scripts/demo_study.py --output demo-study

trains a vector on each demo task; five controls with permuted labels (multiple choice) and one with others'
answers (sums); draws five random directions per vector; scores them all with lm-eval on both evaluation
splits and prints one table. About half an hour on one core. Finished training is kept: run it again to go on.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from lm_eval_aft import SteeringVector, load_vector, train_vector
from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.evaluation.run import evaluate_pair
from lm_eval_aft.evaluation.stats import mcnemar_exact
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training.setup import random_like

CHOICE, MATH = "aft_demo_choice", "aft_demo_math"
PRIMARY = {CHOICE: ("acc_norm", "none"), MATH: ("exact_match", "strict-match")}
# As `make demo`. The penalty keeps the vector short: random directions of its norm then disturb less.
RECIPE = {"protocol": "maximum", "lr": 1e-2, "l2": 0.02, "epochs": 4, "batch_size": 4}


def outcomes(folder: Path, task: str) -> list[float]:
    """Right (1) or wrong (0) on the task's primary metric, in document order."""
    metric, filter_name = PRIMARY[task]
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    kept = sorted((s for s in samples if s["filter"] == filter_name), key=lambda s: s["doc_id"])
    return [float(sample[metric]) for sample in kept]


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="demo-study", show_default=True)
@click.option("--controls", default=5, show_default=True, help="Permuted-label runs and random directions.")
def main(output: Path, controls: int) -> None:
    """Train and score the demo's vectors and placebos; print one table."""
    quiet_libraries()
    lm = AFTLM("demo", device="cpu", batch_size=32)

    def trained(name: str, task: str, seeds: int = 3, **settings: object) -> SteeringVector:
        folder = output / "vectors" / name
        if not (folder / "vector.safetensors").exists():
            click.echo(f"training {name}")
            sizes = {"train_docs": 300, "selection_docs": 500, "seeds": seeds}
            lm.steer(None)
            train_vector(lm, task, folder, overwrite=True, **RECIPE, **sizes, **settings)
        return load_vector(folder)

    names = ["choice", "math"]
    vectors = {"choice": trained("choice", CHOICE), "math": trained("math", MATH)}
    for name, vector in vectors.items():
        for seed in range(controls):
            names.append(f"{name}-random-{seed}")
            random_like(vector, seed).save(output / "vectors" / names[-1])
    for seed in range(controls):
        names.append(f"choice-shuffled-{seed}")
        trained(names[-1], CHOICE, seeds=1, control="shuffled", first_seed=seed)
    names.append("math-format")
    trained(names[-1], MATH, seeds=1, control="format")

    scores = output / "scores"
    if not scores.exists():
        folders = [str(output / "vectors" / name) for name in names]
        evaluate_pair("demo", folders, [CHOICE, MATH], scores, flags=["--batch_size", "32"])
    for task in (CHOICE, MATH):
        before = outcomes(scores / "baseline", task)
        share = sum(before) / len(before)
        click.echo(f"\n{task}, {', '.join(PRIMARY[task])}, n = {len(before)}, baseline {share:.2%}")
        for name in names:
            after = outcomes(scores / "steered" / name, task)
            won = sum(a > b for a, b in zip(after, before, strict=True))
            lost = sum(a < b for a, b in zip(after, before, strict=True))
            click.echo(
                f"  {name:20s} {sum(after) / len(after):7.2%}  {100 * (won - lost) / len(after):+6.2f} points"
                f"  {won}/{lost} won/lost  p = {mcnemar_exact(won, lost):.2g}"
            )


if __name__ == "__main__":
    main()
