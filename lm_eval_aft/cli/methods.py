"""``aft methods``."""

from __future__ import annotations

import click

from lm_eval_aft.cli.options import print_table
from lm_eval_aft.methods import METHODS


@click.command("methods", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--hidden-size", type=click.IntRange(1), default=1024, show_default=True, help="Width d.")
@click.option("--layers", type=click.IntRange(1), default=24, show_default=True, help="Blocks n.")
def methods(hidden_size: int, layers: int) -> None:
    """List the interventions that train-vector can fit: what each adds to h, and its parameters.

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
    click.echo("Those that add the same everywhere can be summed, and baked into plain checkpoints.")
