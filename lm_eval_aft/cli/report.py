"""``aft report``: two or more runs, compared document by document."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape

from lm_eval_aft.cli.options import print_table

if TYPE_CHECKING:
    from lm_eval_aft.reporting.report import Report


@click.command("report", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report.md, .json, .csv and .html.",
)
@click.option("--force", is_flag=True, help="Compare runs that differ; every output then says how.")
@click.option(
    "--flips",
    default=20,
    show_default=True,
    type=click.IntRange(min=0),
    help="Documents to tell in full, each way, for every task.",
)
@click.option("--leaderboard", is_flag=True, help="Print the Open LLM Leaderboard v1's three rows instead.")
@click.option("--card", is_flag=True, help="Add the results to the README.md of each vector folder.")
def report(
    folders: tuple[Path, ...], output: Path | None, force: bool, flips: int, leaderboard: bool, card: bool
) -> None:
    """Compare runs with a baseline run, pair by pair.

    FOLDERS is one folder written by `aft eval`, or the baseline's result folder followed by others,
    as lm-eval writes them with --output_path and --log_samples, by any model type. Runs that were
    not asked exactly the same questions are refused.

    \b
    Examples:
      aft report results -o results/report
      aft report results/baseline results/steered/arc other/run
    """
    from lm_eval_aft.reporting.report import compare

    found = compare(*folders, force=force, flips=flips)
    if leaderboard:
        print_leaderboard(found)
    else:
        print_report(found)
    if output is not None:
        from lm_eval_aft.reporting.render import write_report

        paths = write_report(found, output)
        click.echo(f"Written: {', '.join(map(str, paths))}")
    if card:
        from lm_eval_aft.reporting.cards import update_cards

        for path in update_cards(found):
            click.echo(f"Written: {path}")


def print_report(found: Report) -> None:
    """Print every metric of every run under its task, and all warnings."""
    from rich.table import Table

    from lm_eval_aft.reporting import cells

    _print_banner(found)
    table = Table(title="Against the baseline, document by document", title_justify="left")
    names = ("task, run", "score", "difference", "95 % interval", "won / lost", "p", "Holm", "detectable")
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for first, block in cells.blocks(found.rows):
        head = f"[bold]{escape(f'{first.task} {cells.metric_name(first.metric, first.filter)}')}[/bold]"
        note = "" if first.primary else " (secondary)"
        table.add_section()
        table.add_row(head + note, block[0][1][4], *[""] * 6, f"n = {first.n}")
        for row, texts in block:
            colour = {"better": "green", "worse": "red"}.get(row.verdict, "")
            verdict = f"[{colour}]{texts[-1]}[/{colour}]" if colour else texts[-1]
            table.add_row(f"  {escape(row.run)}", *texts[5:-1], verdict)
    # Without a terminal rich assumes 80 columns and cuts cells; logs have room.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if found.routes:
        rows = [cells.route_cells(row) for row in found.routes]
        print_table("By route", cells.ROUTE_COLUMNS, rows)
    if found.answer_only:
        rows = [cells.answer_only_cells(pair) for pair in found.answer_only]
        print_table("Without the question", cells.ANSWER_ONLY_COLUMNS, rows)
        for pair in found.answer_only:
            click.echo(f"{pair.with_question.task}, {pair.with_question.run}: {pair.meaning}")
        click.echo(found.answer_only_wording)
    for line in found.warnings:
        click.echo(f"Note: {line}")
    tests = ", ".join(dict.fromkeys(f"{row.test} p and {row.interval} interval" for row in found.rows))
    click.echo(
        f"{tests}. A verdict needs a Holm-adjusted p below {found.alpha}, over {found.family} comparison(s): "
        "one primary metric per task and vector."
    )


def print_leaderboard(found: Report) -> None:
    """Print the leaderboard's three rows, their settings and the calibration."""
    from lm_eval_aft.reporting.cells import points, score

    _print_banner(found)
    rows = []
    for each in found.leaderboard:
        same = "yes" if each["same_settings"] else f"no: {', '.join(each['deviations'])}"
        published = "–" if each["published"] is None else f"{each['published']:.2f} %"
        if each["calibration"] is not None:
            published += f" ({points(each['calibration'] / 100, True)})"
        setting = f"{each['num_fewshot']}-shot {each['metric']}"
        for row in each["rows"] or [None]:
            own = (
                [row["run"], score(row["baseline"], True), score(row["steered"], True)] if row else ["–"] * 3
            )
            verdict = (row["verdict"] or row["kind"]) if row else "–"
            rows.append((each["task"], setting, *own, verdict, same, published))
    columns = (
        *("task", "setting", "run", "baseline", "steered", "verdict", "same settings"),
        "published (this baseline)",
    )
    print_table("Open LLM Leaderboard v1 settings", columns, rows)
    click.echo(found.leaderboard_wording)


def _print_banner(found: Report) -> None:
    for line in found.banner:
        click.secho(f"FORCED COMPARISON, the runs were not asked the same: {line}", fg="red", bold=True)
