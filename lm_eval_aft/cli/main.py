"""The ``aft`` group of commands."""

from __future__ import annotations

import click

from lm_eval_aft import __version__
from lm_eval_aft.cli.bench import bench
from lm_eval_aft.cli.doctor import doctor
from lm_eval_aft.cli.evaluate import evaluate
from lm_eval_aft.cli.export import export, import_
from lm_eval_aft.cli.lm_eval import lm_eval
from lm_eval_aft.cli.methods import methods
from lm_eval_aft.cli.offline import offline_option
from lm_eval_aft.cli.plain_errors import PlainGroup
from lm_eval_aft.cli.report import report
from lm_eval_aft.cli.search import search
from lm_eval_aft.cli.tasks import tasks, tasks_path_command
from lm_eval_aft.cli.train import train_vector
from lm_eval_aft.cli.transfer import transfer
from lm_eval_aft.cli.vectors import vectors


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
