"""``aft eval`` and ``aft report``: score baseline, vectors and placebos, and compare them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from lm_eval_aft._util.process import Terminated, is_main_process, quiet_libraries, terminable
from lm_eval_aft.cli.options import (
    LateHelp,
    ended,
    log_option,
    offline_option,
    parse_model_args,
    print_table,
)

if TYPE_CHECKING:
    from lm_eval_aft.evaluation.report import Report


def _route_help() -> str:
    from lm_eval_aft.library.routers import ROUTERS

    specs = ", ".join(router.usage for router in ROUTERS.values())
    return f"Let a router pick each document's vector: {specs}; may repeat."


@click.command("eval", context_settings={"ignore_unknown_options": True})
@offline_option
@click.option("--model", required=True, help="Hub name, folder or GGUF file of the base model, or `demo`.")
@click.option(
    "--vector", "vectors", multiple=True, help="Folder, library name, Hub id or expression; may repeat."
)
@click.option("--library", type=click.Path(path_type=Path), help="Library that names come from.")
@click.option("--route", "routes", multiple=True, cls=LateHelp, late_help=_route_help)
@click.option(
    "--tasks",
    required=True,
    help="As `lm_eval --tasks`: names, patterns, groups, tags or YAML files, comma-separated, or a folder.",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder for the result folders."
)
@click.option("--placebo", default="none", show_default=True, help="random:N scores N random directions too.")
@click.option(
    "--answer-only",
    is_flag=True,
    help="Score baseline and vectors once more with every question removed: a gain that stays is "
    "answer style. Multiple-choice and log-likelihood tasks only.",
)
@click.option("--all-seeds", is_flag=True, help="Score the other finalists under each vector's seeds/ too.")
@click.option("--device", help="cuda, cuda:1, cpu, ...  [default: cuda where there is one]")
@click.option("--dtype", help="float32, bfloat16, float16.  [default: the checkpoint's]")
@click.option(
    "--model-args",
    help="Further arguments of `--model aft`: revision=...,peft=...; coefficient= and positions= replace "
    "those of every vector.",
)
@log_option
@click.option("--resume", is_flag=True, help="Keep the runs that are in the output folder; score the others.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def evaluate(tasks: str, output: Path, model_args: str | None, log: tuple[str, ...], **options: Any) -> None:
    """Score the baseline and steered model with lm-eval, and compare them pair by pair.

    Log-likelihoods of the baseline, all vectors and placebos are computed together. Writes ordinary
    lm-eval result folders: OUTPUT/baseline, OUTPUT/steered/NAME, OUTPUT/placebo/NAME and
    OUTPUT/answer-only/NAME (compared only with each other). A router's run is
    OUTPUT/steered/routed-ROUTER; `steered_by` in its samples names each document's vector. Flags after
    `--` are passed to lm-eval unchanged.

    \b
    Examples:
      aft eval --model EleutherAI/pythia-160m --vector arc --tasks arc_challenge --output results
      aft eval --model demo --vector v --tasks aft_demo_choice --placebo random:3 --output r \\
               -- --limit 200 --batch_size 16
      aft eval --model M --vector arc --tasks arc_challenge --answer-only --output results
      aft eval --model M --library LIB --vector math/word_problems --route task --route keyword \\
               --tasks gsm8k,arc_challenge --output routed
    """
    quiet_libraries()
    from lm_eval_aft._util.tracking import Trackers
    from lm_eval_aft.evaluation.run import evaluate_pair

    trackers = Trackers(log, output)
    try:
        with terminable():
            arguments = parse_model_args(model_args, device=options.pop("device"), dtype=options.pop("dtype"))
            names = [name.strip() for name in tasks.split(",")]
            runs = evaluate_pair(tasks=names, output=output, model_args=arguments, **options)
    except (KeyboardInterrupt, Terminated) as end:
        ended(end, output)
    if is_main_process():
        from lm_eval_aft.evaluation.formatting import row_numbers
        from lm_eval_aft.evaluation.report import build_report
        from lm_eval_aft.evaluation.results import read_run

        found = [read_run(output / run.name, run.name, run.name.partition("/")[0]) for run in runs]
        report = build_report(found)
        print_report(report)
        with trackers:
            trackers.settings({"tasks": names, "model_args": arguments, **options})
            for row in report.rows:
                trackers.log(row_numbers(asdict(row)))
        words = f"aft report {shlex.quote(str(output))} -o FOLDER"
        click.echo(f"Results are in {output}; `{words}` writes the full report.")


# ``aft report``: two or more runs, compared document by document.


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report.md, .json, .csv and .html.",
)
@click.option(
    "--force", is_flag=True, help="Compare runs even if their settings differ; every output then says how."
)
@click.option(
    "--flips",
    default=20,
    show_default=True,
    type=click.IntRange(min=0),
    help="How many won and how many lost documents to show in full for every task.",
)
@click.option("--leaderboard", is_flag=True, help="Print the Open LLM Leaderboard v1's three rows instead.")
@click.option("--card", is_flag=True, help="Add the results to the README.md of each vector folder.")
def report(
    folders: tuple[Path, ...], output: Path | None, force: bool, flips: int, leaderboard: bool, card: bool
) -> None:
    """Compare runs with a baseline run, pair by pair.

    FOLDERS is one folder written by `aft eval`, or the baseline's result folder followed by others,
    as lm-eval writes them with --output_path and --log_samples, by any model type. Runs with different
    questions or settings are refused.

    \b
    Examples:
      aft report results -o results/report
      aft report results/baseline results/steered/arc other/run
    """
    from lm_eval_aft.evaluation.report import compare

    found = compare(*folders, force=force, flips=flips)
    paths = []
    if output is not None:
        from lm_eval_aft.evaluation.render import write_report

        paths = write_report(found, output)
    if leaderboard:
        print_leaderboard(found)
    else:
        print_report(found)
    if card:
        from lm_eval_aft.evaluation.render import update_cards

        paths = [*paths, *update_cards(found)]
    if paths:
        click.echo(f"Written: {', '.join(map(str, paths))}")


def print_report(found: Report) -> None:
    """Print every metric of every run, grouped by task, and all warnings."""
    from rich.table import Table

    from lm_eval_aft.evaluation import formatting
    from lm_eval_aft.evaluation.render import tables

    _print_banner(found)
    table = Table(title="Against the baseline, document by document", title_justify="left")
    for name in ("task, run", *formatting.BLOCK):
        table.add_column(
            name, justify="left" if name in ("task, run", "verdict") else "right", overflow="fold"
        )
    for first, block in formatting.blocks(found.rows):
        head = f"[bold]{escape(f'{first.task} {formatting.metric_name(first.metric, first.filter)}')}[/bold]"
        note = "" if first.primary else " (secondary)"
        table.add_section()
        table.add_row(head + note, formatting.COLUMNS["baseline"](first), *[""] * 6, f"n = {first.n}")
        for row in block:
            *texts, verdict = formatting.row_cells(row, formatting.BLOCK.values())
            colour = {"better": "[green]", "worse": "[red]"}.get(row.verdict, "")
            table.add_row(f"  {escape(row.run)}", *texts, colour + verdict)
    # Without a terminal rich assumes 80 columns and cuts cells; log files have room.
    if found.rows:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for each in tables(found):
        print_table(each.title, each.columns, each.lines)
        for line in filter(None, (*each.notes, each.intro)):
            click.echo(line)
    for line in found.warnings:
        click.echo(f"Note: {line}")
    if not found.rows:
        return
    tests = ", ".join(dict.fromkeys(f"{row.test} p and {row.interval} interval" for row in found.rows))
    click.echo(
        f"{tests}. A verdict needs a Holm-adjusted p below {found.alpha}, over {found.family} comparison(s): "
        "one primary metric per task and vector."
    )


def print_leaderboard(found: Report) -> None:
    """Print the leaderboard's three tasks, their settings and the calibration."""
    from lm_eval_aft.evaluation.render import leaderboard_table

    _print_banner(found)
    table = leaderboard_table(found)
    print_table(table.title, table.columns, table.lines)
    for note in table.notes:
        click.echo(note)


def _print_banner(found: Report) -> None:
    for line in found.banner:
        click.secho(
            f"FORCED COMPARISON, the runs have different questions or settings: {line}", fg="red", bold=True
        )
