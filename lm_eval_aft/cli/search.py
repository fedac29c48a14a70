"""``aft search``: layer, learning rate, epochs and penalty of a vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import parse_model_args, print_table
from lm_eval_aft.cli.shared import plan_settings, training_options
from lm_eval_aft.cli.training_report import print_cost, print_stages
from lm_eval_aft.errors import AFTError
from lm_eval_aft.quiet import quiet_libraries

if TYPE_CHECKING:
    from lm_eval_aft.bench.points import Point

SHOWN = 20  # lines of the table in the terminal


@training_options(
    *("train_docs", "selection_docs", "train_split", "first_seed", "num_fewshot", "apply_chat_template"),
    *("system_instruction", "metric", "method", "positions", "device", "dtype", "model_args", "include_path"),
)
@click.command("search", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="Hub name or local folder of a causal LM, or `demo`.")
@click.option("--task", required=True, help="Harness task with a training split.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder; what is there is kept."
)
@click.option(
    "--strategy",
    type=click.Choice(["grid", "optuna"]),
    default="grid",
    show_default=True,
    help="grid: every combination, in one sweep; optuna: --trials draws within the same bounds.",
)
@click.option("--trials", type=click.IntRange(min=1), default=20, show_default=True, help="Of optuna.")
@click.option(
    "--layers",
    default="10%,20%,30%,40%,50%,60%,70%,80%,90%",
    show_default=True,
    help="As `train-vector --layers`; percentages are of the depth.",
)
@click.option("--lr", default="1e-4,5e-4,1e-3,2e-3", show_default=True, help="Learning rates.")
@click.option("--epochs", default="5,10,15,20", show_default=True, help="Numbers of epochs.")
@click.option("--l2", default="0", show_default=True, help="Lambdas of lambda * ||v||^2.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Of every setting.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Per step.")
@click.option("--dry-run", is_flag=True, help="Print what it would cost; train nothing.")
def search(
    model: str,
    task: str,
    output: Path,
    strategy: str,
    trials: int,
    layers: str,
    lr: str,
    epochs: str,
    l2: str,
    seeds: int,
    batch_size: int,
    dry_run: bool,
    **options: Any,
) -> None:
    """Search layer, learning rate, epochs and L2 penalty on the selection split.

    The evaluation split is never read. A grid is one sweep: all settings share the frozen passes,
    and numbers of epochs are stops of one training. Optuna (an extra) proposes settings by TPE.
    Writes OUTPUT/search.jsonl (a line per setting), search.md, and OUTPUT/winner, an ordinary
    vector folder. Called again, it goes on; optuna with more --trials too.

    \b
    Examples:
      aft search --model EleutherAI/pythia-160m --task arc_challenge --output search
      aft search --model demo --task aft_demo_choice --layers all --lr 2e-3,1e-2 --epochs 1,2,4 \\
                 --l2 0,0.02 --batch-size 4 --train-docs 100 --output s
      aft search --model M --task gsm8k --strategy optuna --trials 40 --lr 1e-4,1e-2 --output o
    """
    quiet_libraries()
    from lm_eval_aft.bench.search import WINNER, Search, Space
    from lm_eval_aft.training.protocols import parse_numbers
    from lm_eval_aft.training.train import cost

    arguments = parse_model_args(
        options.pop("model_args"), device=options.pop("device"), dtype=options.pop("dtype")
    )
    space = Space(layers, parse_numbers(lr), _whole(epochs), parse_numbers(l2))
    job = Search(
        model, task, output, space, strategy, trials, seeds, batch_size, plan_settings(options), arguments
    )
    click.echo(f"Loading {model} ...", err=True)
    prepared = job.prepare()
    if dry_run:
        if strategy == "grid":
            print_stages(prepared.stages())
            print_cost(cost(prepared))
        else:
            click.echo(f"{trials} trials of at most {max(space.epochs)} epochs, {seeds} seed(s) each.")
        return
    try:
        points = job.run(prepared, say=click.echo)
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What is finished is kept: the same command goes on.", err=True)
        raise SystemExit(130) from None
    _print_points(points, output, f"{strategy} search: {model}, {task}")
    click.echo(f"The winner is {output / WINNER}. Score it:")
    click.echo(f"  aft eval --model {model} --vector {output / WINNER} --tasks {task} --output RESULTS")


def _print_points(points: Sequence[Point], output: Path, title: str) -> None:
    """Write the whole table, print the best of it."""
    from lm_eval_aft.bench.points import COLUMNS, NOTE, table, write_table

    written = write_table(points, output, title)
    print_table(title, COLUMNS, table(points)[:SHOWN], 0)
    if len(points) > SHOWN:
        click.echo(f"... and {len(points) - SHOWN} more in {written}.")
    click.echo(NOTE.format(count=len(points)))
    if points[0].change >= 0:
        click.echo("No setting improved on the baseline: expect no gain from this vector.")


def _whole(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise AFTError(f"Cannot read the epochs {text!r}.", "Write whole numbers: 5,10,20.") from error
