"""``aft eval``: baseline, vectors and placebos on the same tasks."""

from __future__ import annotations

import os
from pathlib import Path

import click

from lm_eval_aft.cli.offline import offline_option
from lm_eval_aft.cli.options import ended, parse_model_args
from lm_eval_aft.quiet import quiet_libraries
from lm_eval_aft.termination import Terminated, terminable


@click.command(
    "eval",
    context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True},
)
@offline_option
@click.option("--model", required=True, help="Hub name or local folder of the base model, or `demo`.")
@click.option(
    "--vector", "vectors", multiple=True, help="Folder, library name, Hub id or expression; may repeat."
)
@click.option("--library", type=click.Path(path_type=Path), help="Library that names come from.")
@click.option(
    "--route",
    "routes",
    multiple=True,
    help="Let a router pick each document's vector: task, keyword, keyword:TABLE.yaml, constant:NAME; "
    "may repeat.",
)
@click.option("--tasks", required=True, help="Harness tasks, comma-separated.")
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
@click.option("--resume", is_flag=True, help="Keep the runs that are in the output folder, score the others.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def evaluate(
    model: str,
    vectors: tuple[str, ...],
    library: Path | None,
    routes: tuple[str, ...],
    tasks: str,
    output: Path,
    placebo: str,
    answer_only: bool,
    all_seeds: bool,
    device: str | None,
    dtype: str | None,
    model_args: str | None,
    resume: bool,
    flags: tuple[str, ...],
) -> None:
    """Score the baseline and steered model with lm-eval, and compare them pair by pair.

    Log-likelihoods of the baseline, all vectors and placebos are found in one go. Writes ordinary
    lm-eval result folders: OUTPUT/baseline, OUTPUT/steered/NAME, OUTPUT/placebo/NAME and
    OUTPUT/answer-only/NAME (those are compared among themselves only). A router's run is
    OUTPUT/steered/routed-ROUTER; `steered_by` in its samples names each document's vector. Flags after
    `--` go to lm-eval unchanged.

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
    from lm_eval_aft.cli.report import print_report
    from lm_eval_aft.evaluation import evaluate_pair

    try:
        with terminable():
            runs = evaluate_pair(
                model,
                vectors,
                [name.strip() for name in tasks.split(",")],
                output,
                placebo=placebo,
                all_seeds=all_seeds,
                answer_only=answer_only,
                library=library,
                routes=routes,
                model_args=parse_model_args(model_args, device=device, dtype=dtype),
                flags=flags,
                resume=resume,
            )
    except (KeyboardInterrupt, Terminated) as end:
        ended(end, output)
    if int(os.environ.get("RANK", "0")) == 0:
        from lm_eval_aft.reporting.report import build_report
        from lm_eval_aft.reporting.results import read_run

        found = [read_run(output / run.name, run.name, run.name.partition("/")[0]) for run in runs]
        print_report(build_report(found))
        click.echo(f"Results lie in {output}; `aft report {output} -o FOLDER` writes the full report.")
