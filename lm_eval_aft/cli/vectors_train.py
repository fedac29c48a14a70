"""``aft vectors train-set``: a whole library from a study file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.alone import alone_in
from lm_eval_aft.cli.offline import offline_option
from lm_eval_aft.cli.options import ended, parse_model_args, print_table
from lm_eval_aft.cli.vectors_share import library_option
from lm_eval_aft.errors import AFTError
from lm_eval_aft.quiet import quiet_libraries
from lm_eval_aft.termination import Terminated, terminable

if TYPE_CHECKING:
    from lm_eval_aft.train_set import TrainSet


@click.command("train-set", context_settings={"help_option_names": ["-h", "--help"]})
@offline_option
@click.argument("study", type=click.Path(path_type=Path, dir_okay=False))
@library_option
@click.option("--model", help="Hub name or local folder of the base model.  [default: the study's]")
@click.option("--resume", is_flag=True, help="Go on with what a former call began.")
@click.option("--dry-run", is_flag=True, help="Print the plan; train nothing.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents per task in the cross-scores.")
@click.option("--no-scores", is_flag=True, help="Train only; no cross-scores.")
@click.option(
    "--batch-size", default="16", show_default=True, help="Of the cross-scores, as lm-eval takes it."
)
@click.option("--device", help="cuda, cuda:1, cpu, ...  [default: cuda where there is one]")
@click.option("--dtype", help="float32, bfloat16, float16.  [default: as `aft train` and `aft eval`]")
@click.option("--model-args", help="Further arguments of lm-eval's hf model: revision=...")
def train_set(
    study: Path,
    library: Path | None,
    model: str | None,
    resume: bool,
    dry_run: bool,
    limit: int | None,
    no_scores: bool,
    batch_size: str,
    device: str | None,
    dtype: str | None,
    model_args: str | None,
) -> None:
    """Train every vector of a study file into a library, then score each on each task.

    STUDY is a YAML file: `vectors` maps CATEGORY/NAME to a task, or to a mapping with the task and any
    setting of `aft train` (protocol, seeds, train_docs, ...; limit for its scores); `defaults` holds
    for all; `unavailable` says what is missing for others. A vector is trained on its task's training
    split and scored on the evaluation splits; scores land in the library as cross-scores.md and
    .json. Ctrl-C or a crash loses little: --resume goes on.

    \b
    Examples:
      aft vectors train-set scripts/studies/library.yaml --model EleutherAI/pythia-160m \\
          --library lib --dry-run
      aft vectors train-set mine.yaml --model demo --library lib --limit 200
      aft vectors train-set mine.yaml --model demo --library lib --limit 200 --resume

    \b
    A study:
      defaults: {protocol: rapid, train_docs: 50}
      vectors:
        math/word_problems: gsm8k
        logic/analogy: {task: arc_challenge, protocol: adaptive, seeds: 3}
      scores: {limit: 200}
    """
    quiet_libraries()
    from lm_eval_aft.library import Library
    from lm_eval_aft.study import read_study
    from lm_eval_aft.train_set import TrainSet

    plan = read_study(study)
    base = model or plan.model
    if base is None:
        raise AFTError(f"The study {study} names no model.", "Give one with --model.")
    shelf = Library(library)
    arguments = parse_model_args(model_args, device=device, dtype=dtype)
    job = TrainSet(plan, shelf, base, arguments)
    if dry_run:
        _print_plan(job)
        return
    if not resume:
        job.check_fresh()
    try:
        with terminable(), alone_in(job.folder):
            failed = job.train(say=click.echo)
            for name, needs in plan.unavailable.items():
                click.echo(f"{name}: not trainable. {needs}")
            if not no_scores and len(failed) < len(plan.entries):
                _score(job, limit, arguments, batch_size)
    except (KeyboardInterrupt, Terminated) as end:
        ended(end)
    if failed:
        raise AFTError(
            f"{len(failed)} of {len(plan.entries)} vectors were not trained: {', '.join(failed)}.",
            "The reasons stand above; put them right and go on with --resume.",
        )


def _score(job: TrainSet, limit: int | None, arguments: dict[str, Any], batch_size: str) -> None:
    """Score every vector on every task, and print and write the table."""
    from lm_eval_aft.reporting.cross_scores import NOTE, TABLE, cross_score, table

    flags = ["--batch_size", batch_size]
    rows = cross_score(
        job.study, job.library, job.model, limit=limit, model_args=arguments, flags=flags, say=click.echo
    )
    columns, lines = table(rows)
    print_table("Cross-scores", columns, lines)
    click.echo(f"{NOTE}\nWritten: {job.library.root / TABLE}.md and .json")


def _print_plan(job: TrainSet) -> None:
    rows = []
    for standing in job.standings():
        entry, plan = standing.entry, standing.entry.plan()
        changed = {
            k: v for k, v in entry.settings.items() if k not in ("protocol", "include_path", "prompts")
        }
        settings = ", ".join(f"{key}={value}" for key, value in changed.items()) or "–"
        rows.append((entry.name, entry.task, plan.protocol.name, settings, standing.state))
    columns = ("vector", "task", "protocol", "settings", "state")
    print_table(f"Plan for {job.model} (nothing was trained)", columns, rows)
    for name, needs in job.study.unavailable.items():
        click.echo(f"{name}: not trainable. {needs}")
