"""``aft tasks`` and ``aft tasks-path``."""

from __future__ import annotations

import click

from lm_eval_aft.cli.options import print_table
from lm_eval_aft.errors import AFTError
from lm_eval_aft.quiet import quiet_libraries


@click.command("tasks", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--trainable", is_flag=True, help="Only tasks train-vector can train on.")
@click.option("--include-path", multiple=True, help="Folder with your own task YAMLs; may repeat.")
@click.argument("pattern", default="*")
def tasks(trainable: bool, include_path: tuple[str, ...], pattern: str) -> None:
    """List harness tasks: splits, output type and metrics. PATTERN is a name with * and ?.

    \b
    Examples:
      aft tasks --trainable 'arc*'
      aft tasks gsm8k
    """
    quiet_libraries()
    from lm_eval_aft.harness import list_tasks

    found = [task for task in list_tasks(pattern, include_path) if task.trainable or not trainable]
    if not found:
        raise AFTError(f"No task matches {pattern!r}.", "Use * for any text, as in 'arc*'.")
    rows = [
        (
            task.name,
            task.training_split or "-",
            task.evaluation_split or "-",
            task.output_type,
            ", ".join(task.metrics),
        )
        for task in found
    ]
    print_table(f"{len(rows)} tasks", ("task", "training", "evaluation", "output type", "metrics"), rows)


@click.command("tasks-path", context_settings={"help_option_names": ["-h", "--help"]})
def tasks_path_command() -> None:
    """Print the folder of the tasks shipped here, for lm_eval's --include_path."""
    from lm_eval_aft.harness import tasks_path

    click.echo(tasks_path())
