"""``aft bench``, ``aft search`` and ``aft transfer``: many training runs from one command."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.process import Terminated, quiet_libraries, terminable
from lm_eval_aft.cli.options import ended, log_option, parse_model_args, print_table
from lm_eval_aft.cli.train import plan_settings, print_cost, print_stages, scoring_flags, training_options

if TYPE_CHECKING:
    from lm_eval_aft.studies.config import BenchStudy
    from lm_eval_aft.studies.jobs import Store, StudyCell
    from lm_eval_aft.studies.planner import CostEstimator
    from lm_eval_aft.studies.report import BenchReport
    from lm_eval_aft.studies.runner import Executor
    from lm_eval_aft.studies.search import Point
    from lm_eval_aft.studies.simulated_device import Device
    from lm_eval_aft.training.cost import Spent


@click.command("bench")
@click.argument("study", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path), help="Folder for vectors, scores, ledger, report.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue in a folder that holds a study; finished cells that the file still asks for are kept.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    help="Run only cells whose name MODEL/TASK/METHOD/seed-N, or a part of it, matches; may repeat.",
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
    help="Run in this process, or on a Ray cluster (pip install 'lm-eval-aft[ray]').",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Ray: how many.  [default: as many as there is room for]"
)
@click.option(
    "--ray-address", "address", help="Ray: cluster to join (auto, ray://host:10001).  [default: a local one]"
)
@click.option(
    "--gpus-per-worker", "gpus", type=float, help="Ray: GPUs of each worker, may be 0.5.  [default: 1 if any]"
)
@click.option(
    "--cpus-per-worker", "cpus", type=float, default=1.0, show_default=True, help="Ray: CPUs of each worker."
)
@click.option("--ray-runtime-env", "runtime_env", help="Ray: runtime environment, JSON or a YAML file.")
@log_option
def bench(
    study: Path,
    output: Path | None,
    resume: bool,
    only: tuple[str, ...],
    dry_run: bool,
    plan_for: str,
    device: str | None,
    executor: str,
    log: tuple[str, ...],
    **ray: Any,
) -> None:
    """Run a study: every model on every task with every method and seed, and one report.

    STUDY is a YAML file; those under scripts/studies are examples. A cell trains a vector on its
    task's training split and scores it, document by document against the frozen model, on the
    evaluation split. Each model is loaded once and each baseline scored once. Finished results are
    stored under a digest of everything they depend on, so --resume continues after any interruption,
    and after a change of the file only the cells that it affects are run again.

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
    logging.getLogger("lm_eval_aft").setLevel(logging.WARNING)  # a cell has one line of its own
    from lm_eval_aft.studies.config import read_bench_study

    plan = read_bench_study(study)
    if dry_run:
        print_plan(plan, output, only, plan_for)
        return
    if output is None:
        raise AFTError("No output folder was given.", "Add --output FOLDER, or --dry-run to see the plan.")
    from lm_eval_aft._util.tracking import Trackers
    from lm_eval_aft.studies.jobs import Store
    from lm_eval_aft.studies.runner import StudyProgress, run_study

    store = Store(output)
    try:
        with terminable(), Trackers(log, output) as trackers:
            report = run_study(
                plan,
                study,
                store,
                _executor(executor, plan, store, device, ray),
                resume=resume,
                only=only,
                progress=StudyProgress(),
                trackers=trackers,
            )
    except (KeyboardInterrupt, Terminated) as end:
        ended(end, output)
    _print_report(report, output)
    failed = [cell for cell in report.cells if cell.state == "failed"]
    if failed:
        raise AFTError(
            f"{len(failed)} of {len(report.cells)} cells failed; {failed[0].name}: {failed[0].why}",
            "The report has all reasons; fix them and continue with --resume.",
        )


def _executor(name: str, plan: BenchStudy, store: Store, device: str | None, ray: dict[str, Any]) -> Executor:
    settings: dict[str, Any] = {"device": device, "batch_size": plan.evaluation.batch_size, "data": plan.data}
    if name == "ray":
        from lm_eval_aft.studies.ray import Ray, RayOptions, read_runtime_env

        options = RayOptions(**ray | {"runtime_env": read_runtime_env(ray["runtime_env"])})
        return Ray(store, settings, options)
    from lm_eval_aft.studies.jobs import Session
    from lm_eval_aft.studies.runner import Local

    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if option.name in ray and given:
            raise AFTError(f"{option.opts[0]} is an option for Ray.", "Add --executor ray.")
    return Local(Session(store, **settings))


def _print_report(report: BenchReport, output: Path) -> None:
    from lm_eval_aft.studies.report import study_tables, summary

    for table in study_tables(report, brief=True):
        print_table(table.title, table.columns, table.lines)
    click.echo(summary(report))
    for note in report.notes:
        click.echo(f"Note: {note}")
    click.echo(f"Written: {output}/report.md, .html, .json and .csv")


# What ``aft bench --dry-run`` prints: cells, steps, operations, hours and memory, model by model.


def print_plan(study: BenchStudy, output: Path | None, only: Sequence[str], plan_for: str) -> None:
    """Print what a study would run and cost; nothing is loaded, trained or written."""
    from tqdm import tqdm

    from lm_eval_aft.studies.jobs import build_cells
    from lm_eval_aft.studies.planner import CostEstimator, find_shape
    from lm_eval_aft.studies.simulated_device import DEVICES, this_cpu
    from lm_eval_aft.training.cost import Spent

    finished = _finished(output)
    cells = [cell for cell in build_cells(study, finished, hashed=bool(finished)) if cell.matches(only)]
    device = this_cpu() if plan_for == "cpu" else DEVICES[plan_for]
    shots, whole, shipped = _shots(study), Spent(), []
    rows: list[tuple[str, ...]] = []
    models: list[tuple[str, ...]] = []
    kinds = dict.fromkeys((cell.model.name, cell.task.name, cell.method.name) for cell in cells)
    with tqdm(total=len(kinds), desc="planning", unit="kind", leave=False, disable=None) as bar:
        for entry in study.models:
            if own := [cell for cell in cells if cell.model.name == entry.name]:
                shape = find_shape(entry)
                shipped += [entry.name] if shape.shipped else []
                more, line, spent = _plan_model(own, CostEstimator(shape, device), shots, bar)
                rows += more
                models.append(line)
                whole += spent
    columns = ("model", "task", "method", "cells", "candidates", "steps", "operations", "hours")
    print_table(f"Study {study.name} (nothing was run)", columns, rows)
    heads = ("model", "parameters", "dtype", "cells", "weights", "above", "GiB in all", "fits")
    title = f"By model on {device.name}; memory in GiB, baselines included"
    print_table(title, (*heads, "operations", "hours"), models)
    _print_notes(study, cells, sum(cell.key in finished for cell in cells), shipped, device, whole)


def _plan_model(
    own: Sequence[StudyCell], estimator: CostEstimator, shots: Any, bar: Any
) -> tuple[list[tuple[str, ...]], tuple[str, ...], Spent]:
    """A model's rows by task and method, its row among the models, and what it takes with its baselines."""
    from lm_eval_aft.training.cost import Spent

    rows, total, plans = [], Spent(), []
    for task, method in dict.fromkeys((cell.task.name, cell.method.name) for cell in own):
        bar.set_postfix_str(f"{own[0].model.name}/{task}/{method}")
        same = [cell for cell in own if (cell.task.name, cell.method.name) == (task, method)]
        plan = estimator.plan(same[0], shots(same[0]))
        spent = estimator.spent(same[0], shots(same[0])) * len(same)
        total += spent
        plans.append((plan, same[0]))
        numbers = (f"{len(same) * n:,}" for n in (plan.candidates, plan.steps))
        rows.append((own[0].model.name, task, method, str(len(same)), *numbers, *_spent(spent)))
        bar.update()
    for cell in {cell.baseline_key: cell for cell in own}.values():
        total += estimator.baseline(cell, shots(cell))
    most, cell = max(plans, key=lambda each: each[0].peak_bytes)
    budget = estimator.fitting_budget(cell, shots(cell))
    fits = "yes" if budget == estimator.budget else f"in {budget:,} tokens" if budget else "NO"
    gibibytes = (f"{each / 2**30:.1f}" for each in (most.weight_bytes, most.peak_bytes, most.total_bytes))
    size, dtype = f"{most.parameters / 1e9:.3g} B", str(estimator.shape.dtype).removeprefix("torch.")
    line = (own[0].model.name, size, dtype, str(len(own)), *gibibytes, fits, *_spent(total))
    return rows, line, total


def _spent(spent: Spent) -> tuple[str, str]:
    hours = spent.seconds / 3600
    return f"{spent.flops:.3g}", f"{hours:.1f}" if hours >= 0.95 else f"{hours:.2g}"


def _print_notes(
    study: BenchStudy,
    cells: Sequence[StudyCell],
    finished: int,
    shipped: Sequence[str],
    device: Device,
    whole: Spent,
) -> None:
    from lm_eval_aft.studies.planner import TASK_SIZES

    baselines, (operations, hours) = len({cell.baseline_key for cell in cells}), _spent(whole)
    click.echo(
        f"{len(cells)} cells ({finished} finished), {baselines} baselines, "
        f"{len({cell.model.name for cell in cells})} models loaded once each: "
        f"{operations} floating-point operations and {hours} hours at most, "
        "retries aside."
    )
    click.echo(
        f"{device.name} is assumed to reach {device.flops / 1e12:.3g} TFLOP/s and "
        f"{device.bandwidth / 1e9:.3g} GB/s; documents' lengths are those in "
        "lm_eval_aft/studies/known_models.yaml. Generated answers are counted as if they were read, which "
        "takes as many operations and less time. When training runs out of memory it continues with passes "
        "of fewer tokens; `fits` gives the number of tokens at which it would fit."
    )
    if shipped:
        click.echo(f"Not read from the Hub: shapes of {', '.join(shipped)} are those in the same file.")
    if assumed := sorted({cell.task.name for cell in cells if cell.task.task not in TASK_SIZES}):
        click.echo(f"Lengths of {', '.join(assumed)} are not known: taken as typical.")
    if study.prune:
        click.echo("Pruning may leave out seeds where no retry beats the baseline.")


def _finished(output: Path | None) -> Collection[str]:
    """Keys of the cells whose results a study's folder has."""
    from lm_eval_aft.studies.jobs import STUDY_LEDGER, StudyLedger

    there = output is not None and (output / STUDY_LEDGER).exists()
    return StudyLedger(output / STUDY_LEDGER).outcomes if output and there else ()


def _shots(study: BenchStudy) -> Any:
    """From a cell to the number of examples in its prompts, by the study or else the task's file."""
    from lm_eval_aft.harness.tasks import find_definition, read_definition

    known: dict[str, int] = {}
    with contextlib.chdir(study.data or "."):
        for entry in study.tasks:
            path = find_definition(entry.task, study.include_path)
            config = read_definition(path) if path else {}
            known[entry.name] = int(config.get("num_fewshot") or 0)
    return lambda cell: (
        known[cell.task.name] if cell.plan.prompts.num_fewshot is None else cell.plan.prompts.num_fewshot
    )


# ``aft search``: layer, learning rate, epochs and penalty of a vector.

SHOWN = 20  # rows of the table in the terminal


@contextlib.contextmanager
def _continued_by_the_same_command() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nInterrupted. What is finished is kept: the same command continues.", err=True)
        raise SystemExit(130) from None


@training_options(
    *("train_docs", "selection_docs", "train_split", "first_seed", "num_fewshot", "apply_chat_template"),
    *("system_instruction", "metric", "method", "positions", "device", "dtype", "model_args", "include_path"),
    "task_metadata",
)
@click.command("search")
@click.option("--model", required=True, help="Hub name, local folder or GGUF file of a causal LM, or `demo`.")
@click.option("--task", required=True, help="Harness task with a training split.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder; what it already holds is kept."
)
@click.option(
    "--strategy",
    type=click.Choice(["grid", "optuna"]),
    default="grid",
    show_default=True,
    help="grid: every combination, in one sweep; optuna: --trials settings within the same bounds.",
)
@click.option(
    "--trials", type=click.IntRange(min=1), default=20, show_default=True, help="Settings that optuna tries."
)
@click.option(
    "--layers",
    default="10%,20%,30%,40%,50%,60%,70%,80%,90%",
    show_default=True,
    help="As `train-vector --layers`; percentages are of the depth.",
)
@click.option(
    "--lr",
    default="0.003r,0.01r,0.03r,0.1r",
    show_default=True,
    help="Learning rates: shares of the residual scale, or numbers, as in 1e-4,1e-3.",
)
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
    and all numbers of epochs are read off one training run. Optuna (an extra) proposes settings by TPE.
    Writes OUTPUT/search.jsonl (a line per setting), search.md, and OUTPUT/winner, an ordinary
    vector folder. The same command continues a search, optuna's with more --trials too.

    \b
    Examples:
      aft search --model EleutherAI/pythia-160m --task arc_challenge --output search
      aft search --model demo --task aft_demo_choice --layers all --lr 2e-3,1e-2 --epochs 1,2,4 \\
                 --l2 0,0.02 --batch-size 4 --train-docs 100 --output s
      aft search --model M --task gsm8k --strategy optuna --trials 40 --lr 1e-4,1e-2 --output o
    """
    quiet_libraries()
    from lm_eval_aft._util.model_source import model_source
    from lm_eval_aft.harness.commands import vector_command
    from lm_eval_aft.steering.vector import SteeringVector
    from lm_eval_aft.studies.search import WINNER, Search, Space
    from lm_eval_aft.training.recipe import parse_rates
    from lm_eval_aft.training.run import cost

    arguments = parse_model_args(
        options.pop("model_args"), device=options.pop("device"), dtype=options.pop("dtype")
    )
    model, arguments = model_source(model, arguments)
    space = Space(layers, parse_rates(lr), _whole(epochs), parse_rates(l2))
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
    with _continued_by_the_same_command():
        points = job.run(prepared, say=click.echo)
    _print_points(points, output, f"{strategy} search: {model}, {task}")
    meta = SteeringVector.load(output / WINNER).metadata
    meta = {**meta, "base_model": {**meta["base_model"], "name": model}}
    click.echo(f"The winner is {output / WINNER}. Score it:")
    click.echo(f"  {vector_command(meta, str(output / WINNER), 'RESULTS')}")


def _print_points(points: Sequence[Point], output: Path, title: str) -> None:
    """Write the whole table, print the best of it."""
    from lm_eval_aft.studies.search import POINT_COLUMNS, SEARCH_NOTE, search_rows, write_search_table

    written = write_search_table(points, output, title)
    print_table(title, POINT_COLUMNS, search_rows(points)[:SHOWN], 0)
    if len(points) > SHOWN:
        click.echo(f"... and {len(points) - SHOWN} more in {written}.")
    click.echo(SEARCH_NOTE.format(count=len(points)))
    if points[0].change >= 0:
        click.echo("No setting improved on the baseline: expect no gain from this vector.")


def _whole(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise AFTError(f"Cannot read the epochs {text!r}.", "Write whole numbers: 5,10,20.") from error


# ``aft transfer``: every vector on every task.


@training_options(
    *("protocol", "layers", "seeds", "first_seed", "train_docs", "selection_docs", "num_fewshot"),
    *("apply_chat_template", "system_instruction", "metric", "method", "lr", "l2", "epochs", "patience"),
    *("batch_size", "rungs", "finalists", "retries", "device", "dtype", "model_args", "include_path"),
    "task_metadata",
)
@click.command("transfer")
@click.option("--model", required=True, help="Hub name, folder or GGUF file of the base model, or `demo`.")
@click.option("--tasks", required=True, help="Harness tasks, comma-separated: scored on, and trained on.")
@click.option(
    "--vector",
    "vectors",
    multiple=True,
    metavar="NAME=VECTOR",
    help="An existing vector, under the name of its task; may repeat. With any of these only the given "
    "vectors are scored, unless --train-missing.",
)
@click.option("--train-missing", is_flag=True, help="Train vectors for the tasks that --vector leaves out.")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder; what it already holds is kept.",
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
    OUTPUT/vectors, results to OUTPUT/scores, a folder per task. The same command continues a run.
    Flags after `--` go to lm-eval unchanged.

    \b
    Examples:
      aft transfer --model EleutherAI/pythia-160m --tasks arc_easy,arc_challenge,hellaswag \\
                   --output transfer -- --limit 500
      aft transfer --model demo --tasks aft_demo_choice,aft_demo_math --protocol optimized --output t
      aft transfer --model M --tasks arc_easy,hellaswag --vector arc_easy=runs/arc --output t
    """
    quiet_libraries()
    from lm_eval_aft.evaluation.matrix import MATRIX_NOTE, table, write_matrix
    from lm_eval_aft.studies.train_set import Transfer

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
    with _continued_by_the_same_command():
        matrix = job.run(say=click.echo)
    written = write_matrix(matrix, output)
    columns, lines = table(matrix)
    print_table(f"Transfer: {model}", columns, lines)
    click.echo(MATRIX_NOTE.format(family=matrix.family))
    for task, why in matrix.failed.items():
        click.echo(f"No vector was trained on {task}: {why}")
    click.echo(f"Written: {', '.join(str(path) for path in written)}")
    if matrix.failed:
        raise AFTError(
            f"No vector could be trained on {', '.join(matrix.failed)}.",
            "The reasons are printed above; the same command tries again.",
        )
