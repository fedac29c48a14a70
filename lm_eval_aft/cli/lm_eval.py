"""``aft lm-eval``: the stock command, for places where its plugin hook does not reach."""

from __future__ import annotations

import sys

import click

from lm_eval_aft.registration import MODEL_NAME


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
    from lm_eval_aft.private_names import borrowed, gone

    with borrowed("lm-eval: lm_eval.__main__.cli_evaluate"):
        from lm_eval.__main__ import cli_evaluate
    table = "lm-eval: lm_eval.models and lm_eval.api.registry.model_registry"
    with borrowed(table):
        from lm_eval import models  # noqa: F401 (importing it fills the table)
        from lm_eval.api.registry import model_registry
    if MODEL_NAME not in model_registry:
        raise gone(table, "the model was not taken into the table")
    saved = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = saved
