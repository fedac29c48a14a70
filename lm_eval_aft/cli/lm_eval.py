"""``aft lm-eval``: the stock command, for places where its plugin hook does not reach."""

from __future__ import annotations

import sys

import click


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-eval with `--model aft` known to it; all arguments are its own.

    \b
    Example:
      aft lm-eval run --model aft --model_args pretrained=gpt2,vector=v --tasks hellaswag
    """
    from lm_eval.__main__ import cli_evaluate

    saved = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = saved
