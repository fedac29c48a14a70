"""The ``aft`` group of commands, and the small ones: ``doctor``, ``methods``, ``tasks``, ``lm-eval``."""

from __future__ import annotations

import json
import sys
import time

import click

from lm_eval_aft import __version__
from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.cli.evaluate import evaluate, report
from lm_eval_aft.cli.export import export, import_
from lm_eval_aft.cli.options import PlainGroup, offline_option, print_table
from lm_eval_aft.cli.studies import bench, search, transfer
from lm_eval_aft.cli.train import train_vector
from lm_eval_aft.cli.vectors import vectors
from lm_eval_aft.registration import MODEL_NAME
from lm_eval_aft.steering.methods import METHODS


@click.command("doctor")
@click.option("--family", "families", multiple=True, help="Only this family; may repeat. Default: all.")
@click.option("--device", default="cpu", show_default=True, help="Where the tiny models run, e.g. cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of text.")
@click.pass_context
def doctor(context: click.Context, families: tuple[str, ...], device: str, as_json: bool) -> None:
    """Print what is installed, and check that steering gives the right answers with it.

    Prints versions, devices, how lm-eval finds `--model aft`, and which private names of other libraries are
    not as this version needs them. Then a tiny random model of each common family is scored and generates,
    plain and steered, and every answer is compared with passes that use no cache. Nothing is downloaded; it
    takes about a minute on one core.

    \b
    fast ways  how questions were scored: prefixed and packed read a context once, trimmed computes
               logits where they are needed, resumed starts at the vector's layer
    right      the same answers as the plain passes
    slower     a fast way was not taken, and why
    refused    an error says that it cannot be done
    WRONG      another answer: do not trust scores or texts of this kind with these versions

    The exit code is 1 where an answer is wrong (or a part fails), else 0: a slower way is not an error.
    Paste the output into a bug report.

    \b
    Examples:
      aft doctor
      aft doctor --family llama --device cuda
      aft doctor --json > doctor.json
    """
    quiet_libraries()
    from lm_eval_aft.evaluation.doctor import devices, examine
    from lm_eval_aft.evaluation.self_check import FAMILIES

    for family in families:
        if family not in FAMILIES:
            raise AFTError(f"--family {family!r} is not known.", f"Use one of: {', '.join(FAMILIES)}.")
    if device.partition(":")[0] not in devices():
        raise AFTError(f"There is no device {device!r} here.", f"Use one of: {', '.join(devices())}.")
    began = time.monotonic()

    def progress(what: str) -> None:
        click.echo(f"{time.monotonic() - began:5.1f} s  {what}", err=True)

    report = examine(families, device, progress)
    progress("done")
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    context.exit(1 if report.bad else 0)


@click.command("methods")
@click.option("--hidden-size", type=click.IntRange(1), default=1024, show_default=True, help="Width d.")
@click.option("--layers", type=click.IntRange(1), default=24, show_default=True, help="Blocks n.")
def methods(hidden_size: int, layers: int) -> None:
    """List the interventions that train-vector can fit: what each adds to h, and how many parameters it has.

    \b
    Examples:
      aft methods --hidden-size 512 --layers 6
      train-vector --model demo --task aft_demo_choice --method drab --output gated
    """
    rows = [
        (
            method.name,
            f"h + {method.formula}",
            method.count,
            f"{method.parameters(hidden_size, layers):,}",
            "yes" if method.constant else "no",
        )
        for method in METHODS.values()
    ]
    title = f"Methods at hidden size d = {hidden_size}, n = {layers} layers"
    print_table(title, ("method", "adds", "parameters", "number", "can be exported"), rows)
    click.echo("Those that add the same vector everywhere can be summed, and merged into plain checkpoints.")


@click.command("tasks")
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
    from lm_eval_aft.harness.tasks import list_tasks

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


@click.command("tasks-path")
def tasks_path_command() -> None:
    """Print the folder of the tasks that this package ships, for lm_eval's --include_path."""
    from lm_eval_aft.harness.tasks import tasks_path

    click.echo(tasks_path())


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval with `--model aft` registered; all arguments are lm-eval's own.

    \b
    Example:
      aft lm-eval run --model aft --model_args pretrained=gpt2,vector=v --tasks hellaswag
    """
    from lm_eval_aft._util.private_names import borrowed, gone

    with borrowed("lm-eval: lm_eval.__main__.cli_evaluate"):
        from lm_eval.__main__ import cli_evaluate
    table = "lm-eval: lm_eval.models and lm_eval.api.registry.model_registry"
    with borrowed(table):
        from lm_eval import models  # noqa: F401 (importing it fills the table)
        from lm_eval.api.registry import model_registry
    if MODEL_NAME not in model_registry:
        raise gone(table, "the model is not in the table")
    saved = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = saved


@click.group(cls=PlainGroup, context_settings={"help_option_names": ["-h", "--help"]})
@offline_option
@click.version_option(__version__, package_name="lm-eval-aft")
def aft() -> None:
    """Activation Fine-Tuning for lm-evaluation-harness.

    Train one steering vector on a task's training split, score it on the evaluation split with
    stock lm_eval, and see whether it made a difference.

    \b
      aft train --model EleutherAI/pythia-160m --task arc_challenge --output arc
      aft eval  --model EleutherAI/pythia-160m --vector arc --tasks arc_challenge --output results
    """


aft.add_command(train_vector, "train")
aft.add_command(evaluate)
aft.add_command(report)
aft.add_command(doctor)
aft.add_command(export)
aft.add_command(import_)
aft.add_command(bench)
aft.add_command(lm_eval)
aft.add_command(methods)
aft.add_command(search)
aft.add_command(tasks)
aft.add_command(tasks_path_command)
aft.add_command(transfer)
aft.add_command(vectors)

if __name__ == "__main__":
    aft()
