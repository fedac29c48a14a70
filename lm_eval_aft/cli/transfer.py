"""``aft transfer``: every vector on every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lm_eval_aft.cli.options import parse_model_args, print_table
from lm_eval_aft.cli.shared import plan_settings, scoring_flags, training_options
from lm_eval_aft.errors import AFTError
from lm_eval_aft.quiet import quiet_libraries


@training_options(
    *("protocol", "layers", "seeds", "first_seed", "train_docs", "selection_docs", "num_fewshot"),
    *("apply_chat_template", "system_instruction", "metric", "method", "lr", "l2", "epochs", "patience"),
    *("batch_size", "rungs", "finalists", "retries", "device", "dtype", "model_args", "include_path"),
)
@click.command(
    "transfer",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--model", required=True, help="Hub name or local folder of the base model, or `demo`.")
@click.option("--tasks", required=True, help="Harness tasks, comma-separated: scored on, and trained on.")
@click.option(
    "--vector",
    "vectors",
    multiple=True,
    metavar="NAME=VECTOR",
    help="A vector that is there already, under the name of its task; may repeat. With any of these "
    "only the vectors given are scored, unless --train-missing.",
)
@click.option("--train-missing", is_flag=True, help="Train vectors for the tasks that --vector leaves out.")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder; what is there is kept.",
)
@click.option("--placebo", default="none", show_default=True, help="random:N scores N random directions too.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def transfer(
    model: str,
    tasks: str,
    vectors: tuple[str, ...],
    train_missing: bool,
    output: Path,
    placebo: str,
    flags: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a vector on each task and score each vector on every task.

    Writes OUTPUT/transfer.png (a heat map), .md, .json and .csv: paired differences from the
    baseline with 95 % intervals, and exact tests Holm-adjusted over the whole matrix. Vectors go to
    OUTPUT/vectors, results to OUTPUT/scores, a folder per task. Called again, it keeps what is there.
    Flags after `--` go to lm-eval unchanged.

    \b
    Examples:
      aft transfer --model EleutherAI/pythia-160m --tasks arc_easy,arc_challenge,hellaswag \\
                   --output transfer -- --limit 500
      aft transfer --model demo --tasks aft_demo_choice,aft_demo_math --protocol optimized --output t
      aft transfer --model M --tasks arc_easy,hellaswag --vector arc_easy=runs/arc --output t
    """
    quiet_libraries()
    from lm_eval_aft.bench.transfer import Transfer
    from lm_eval_aft.reporting.matrix import NOTE, table, write_matrix

    arguments = parse_model_args(
        options.pop("model_args"), device=options.pop("device"), dtype=options.pop("dtype")
    )
    given = {}
    for each in vectors:
        name, sign, spec = each.partition("=")
        if not (sign and name and spec):
            raise AFTError(f"Cannot read --vector {each!r}.", "Write NAME=VECTOR, as in arc_easy=runs/arc.")
        if name in given:
            raise AFTError(f"Two vectors are named {name}.", "Name each differently.")
        given[name] = spec
    asked = tuple(name.strip() for name in tasks.split(","))
    job = Transfer(
        model, asked, output, given, plan_settings(options), arguments, placebo,
        (*scoring_flags(options), *flags), train=not given or train_missing,
    )  # fmt: skip
    try:
        matrix = job.run(say=click.echo)
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What is finished is kept: the same command goes on.", err=True)
        raise SystemExit(130) from None
    written = write_matrix(matrix, output)
    columns, lines = table(matrix)
    print_table(f"Transfer: {model}", columns, lines)
    click.echo(NOTE.format(family=matrix.family))
    for task, why in matrix.failed.items():
        click.echo(f"No vector was trained on {task}: {why}")
    click.echo(f"Written: {', '.join(str(path) for path in written)}")
    if matrix.failed:
        raise AFTError(
            f"No vector could be trained on {', '.join(matrix.failed)}.",
            "The reasons stand above; the same command tries again.",
        )
