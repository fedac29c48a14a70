"""The demo's figures: vectors, their placebos, and each vector on the other task.

    python scripts/demo_study.py --output demo-study

trains a vector on each demo task; five controls with permuted labels (multiple choice) and one with others'
answers (sums); draws twenty random directions per vector; scores them all with lm-eval on both evaluation
splits and prints one table; intervals as in method_study.py. About twenty minutes on one core. Finished
training is kept: run it again to go on.
"""

from __future__ import annotations

from pathlib import Path

import click
from method_study import interval, outcomes

from lm_eval_aft import SteeringVector, load_vector, train_vector
from lm_eval_aft.cli.options import quiet_libraries
from lm_eval_aft.evaluation import evaluate_pair
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.reporting.stats import mcnemar_exact
from lm_eval_aft.training.controls import random_like

CHOICE, MATH = "aft_demo_choice", "aft_demo_math"
# As `make demo`. The penalty keeps the vector short, the middle layers are the less sensitive ones: random
# directions of its norm then do neither good nor harm on average (placebo_study.py).
RECIPE = {
    "protocol": "maximum",
    "layers": "25%-75%",
    "lr": 1e-2,
    "l2": 0.02,
    "epochs": 4,
    "batch_size": 4,
}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="demo-study", show_default=True)
@click.option("--controls", default=5, show_default=True, help="Permuted-label runs.")
@click.option("--draws", default=20, show_default=True, help="Random directions.")
def main(output: Path, controls: int, draws: int) -> None:
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
        for seed in range(draws):
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
        report(scores, task, names)


def report(scores: Path, task: str, names: list[str]) -> None:
    """Print each vector's difference from the baseline, and the mean of each kind of placebo."""
    before = outcomes(scores / "baseline", task)
    click.echo(f"\n{task}, n = {len(before)}, baseline {sum(before) / len(before):.2%}")
    rows = {}
    for name in names:
        after = outcomes(scores / "steered" / name, task)
        rows[name] = row = [a - b for a, b in zip(after, before, strict=True)]
        won, lost = row.count(1.0), row.count(-1.0)
        click.echo(
            f"  {name:20s} {sum(after) / len(after):7.2%}  {100 * (won - lost) / len(after):+6.2f} points"
            f"  {won}/{lost} won/lost  p = {mcnemar_exact(won, lost):.2g}"
        )
    for kind in ("choice-random", "math-random", "choice-shuffled"):
        group = [row for name, row in rows.items() if name.startswith(kind)]
        mean, low, high = interval(group)
        _, lowest, highest = interval(group, documents=True)
        click.echo(
            f"  mean of {len(group)} {kind}: {mean:+.2f} [{low:+.2f}, {high:+.2f}], "
            f"over documents too [{lowest:+.2f}, {highest:+.2f}]"
        )


if __name__ == "__main__":
    main()
