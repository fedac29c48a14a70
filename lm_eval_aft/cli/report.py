"""``aft report``: two or more runs, compared document by document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from lm_eval_aft.cli.options import print_table


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("steered", nargs=-1, required=True, type=click.Path(path_type=Path))
def report(baseline: Path, steered: tuple[Path, ...]) -> None:
    """Compare runs with a baseline run, pair by pair.

    Takes folders that lm_eval wrote with --output_path and --log_samples, by any model type. Runs
    that were not asked exactly the same questions are refused. Prints, for each task and metric, n,
    both scores, the difference in points, documents won and lost, and the exact McNemar p.

    \b
    Example:
      aft report results/baseline results/steered
    """
    print_comparison([(folder, folder.name) for folder in (baseline, *steered)])


def print_comparison(folders: Sequence[tuple[Path, str]]) -> None:
    """Print every run against the first one."""
    from lm_eval_aft.reporting.results import compare_runs, read_run

    baseline, *others = [read_run(folder, name) for folder, name in folders]
    rows = [
        (
            c.task,
            c.metric,
            c.run,
            str(c.paired.n),
            f"{c.paired.baseline:.2%}",
            f"{c.paired.steered:.2%}",
            f"{100 * c.paired.difference:+.2f}",
            f"{c.paired.wins}/{c.paired.losses}",
            f"{c.paired.p_value:.2g}",
        )
        for c in sorted(compare_runs(baseline, others), key=lambda c: (c.task, c.metric))
    ]
    columns = ("task", "metric", "run", "n", "baseline", "steered", "points", "wins/losses", "McNemar p")
    print_table("Against the baseline, document by document", columns, rows)
