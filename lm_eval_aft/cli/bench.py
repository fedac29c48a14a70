"""``aft bench``: a whole study from one file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import ended, print_table
from lm_eval_aft.errors import AFTError
from lm_eval_aft.quiet import quiet_libraries
from lm_eval_aft.termination import Terminated, terminable

if TYPE_CHECKING:
    from lm_eval_aft.bench.executors import Executor
    from lm_eval_aft.bench.store import Store
    from lm_eval_aft.bench.study import BenchStudy
    from lm_eval_aft.bench.table import BenchReport


@click.command("bench", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("study", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path), help="Folder for vectors, scores, ledger, report.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on in a folder that holds a study: what is finished and still asked for is kept.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    help="Work on cells whose name MODEL/TASK/METHOD/seed-N, or a part of it, fits; may repeat.",
)
@click.option("--dry-run", is_flag=True, help="Print cells, steps, hours and memory; run nothing.")
@click.option(
    "--plan-for",
    type=click.Choice(["24gb", "80gb", "cpu"]),
    default="80gb",
    show_default=True,
    help="With --dry-run: the device: an RTX 4090, an A100, or this machine's processor.",
)
@click.option("--device", help="cuda, cuda:1, cpu, ...  [default: cuda where there is one]")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Do the work in this process, or on a Ray cluster (pip install 'lm-eval-aft[ray]').",
)
@click.option("--workers", type=click.IntRange(min=1), help="Ray: how many.  [default: one per slot]")
@click.option("--ray-address", help="Ray: cluster to join (auto, ray://host:10001).  [default: a local one]")
@click.option("--gpus-per-worker", type=float, help="Ray: GPUs of a slot, may be 0.5.  [default: 1 if any]")
@click.option("--cpus-per-worker", type=float, default=1.0, show_default=True, help="Ray: CPUs of a slot.")
@click.option("--ray-runtime-env", help="Ray: runtime environment, JSON or a YAML file.")
def bench(
    study: Path,
    output: Path | None,
    resume: bool,
    only: tuple[str, ...],
    dry_run: bool,
    plan_for: str,
    device: str | None,
    executor: str,
    **ray: Any,
) -> None:
    """Run a study: every model on every task with every method and seed, and one report.

    STUDY is a YAML file; those under scripts/studies are examples. A cell trains a vector on its
    task's training split and scores it, document by document against the frozen model, on the
    evaluation split. Each model is loaded once and each baseline scored once. What is finished is
    kept under the address of everything it depends on, so --resume goes on after any interruption,
    and after a change of the file only the cells that it touches are run again.

    \b
    Examples:
      aft bench scripts/studies/rapid.yaml --dry-run --plan-for 24gb
      aft bench scripts/studies/rapid.yaml --output rapid --device cuda
      aft bench scripts/studies/rapid.yaml --output rapid --resume --only 'pythia-*'
      aft bench scripts/studies/full.yaml --output full --executor ray --gpus-per-worker 0.5

    \b
    A study:
      models: [EleutherAI/pythia-160m, {pretrained: Qwen/Qwen1.5-0.5B, dtype: bfloat16}]
      tasks: [arc_challenge, {task: hellaswag, num_fewshot: 10, limit: 500}]
      methods: [static, {name: placebo, control: shuffled}]
      seeds: 3
      recipe: {protocol: maximum, train_docs: 100}
    """
    quiet_libraries()
    logging.getLogger("lm_eval_aft").setLevel(logging.WARNING)  # what is said of each cell, said once each
    from lm_eval_aft.bench.study import read_bench

    plan = read_bench(study)
    if dry_run:
        from lm_eval_aft.cli.bench_plan import print_plan

        print_plan(plan, output, only, plan_for)
        return
    if output is None:
        raise AFTError("No output folder was given.", "Add --output FOLDER, or --dry-run to see the plan.")
    from lm_eval_aft.bench.driver import run_study
    from lm_eval_aft.bench.progress import Progress
    from lm_eval_aft.bench.store import Store

    store = Store(output)
    try:
        with terminable():
            report = run_study(
                plan,
                study,
                store,
                _executor(executor, plan, store, device, ray),
                resume=resume,
                only=only,
                progress=Progress(),
            )
    except (KeyboardInterrupt, Terminated) as end:
        ended(end, output)
    _print_report(report, output)
    failed = [cell for cell in report.cells if cell.state == "failed"]
    if failed:
        raise AFTError(
            f"{len(failed)} of {len(report.cells)} cells failed; {failed[0].name}: {failed[0].why}",
            "The report tells all reasons; put them right and go on with --resume.",
        )


def _executor(name: str, plan: BenchStudy, store: Store, device: str | None, ray: dict[str, Any]) -> Executor:
    from lm_eval_aft.bench.executors import Local
    from lm_eval_aft.bench.work import Session

    if name == "local":
        given = [key for key, value in ray.items() if value is not None and key != "cpus_per_worker"]
        if given:
            flag = given[0].replace("_", "-")
            raise AFTError(f"--{flag} is for Ray.", "Add --executor ray.")
        return Local(Session(store, device=device, batch_size=plan.batch_size, data=plan.data))
    from lm_eval_aft.bench.ray_workers import Ray, RayOptions, read_runtime_env

    options = RayOptions(
        address=ray["ray_address"],
        workers=ray["workers"],
        gpus=ray["gpus_per_worker"],
        cpus=ray["cpus_per_worker"],
        runtime_env=read_runtime_env(ray["ray_runtime_env"]),
    )
    return Ray(store, {"device": device, "batch_size": plan.batch_size, "data": plan.data}, options)


def _print_report(report: BenchReport, output: Path) -> None:
    from lm_eval_aft.bench.shown import summary, tables

    for table in tables(report, brief=True):
        print_table(table.title, table.columns, table.lines)
    click.echo(summary(report))
    for note in report.notes:
        click.echo(f"Note: {note}")
    click.echo(f"Written: {output}/report.md, .html, .json and .csv")
