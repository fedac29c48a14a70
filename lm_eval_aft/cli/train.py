"""``train-vector``, also ``aft train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.alone import alone_in
from lm_eval_aft.cli.offline import offline_option
from lm_eval_aft.cli.options import ended, parse_model_args, print_table
from lm_eval_aft.cli.plain_errors import PlainCommand
from lm_eval_aft.cli.training_report import print_cost, print_result, print_stages
from lm_eval_aft.errors import AFTError
from lm_eval_aft.quiet import quiet_libraries
from lm_eval_aft.termination import Terminated, terminable

if TYPE_CHECKING:
    from lm_eval_aft.training.prepared import Prepared


@click.command("train-vector", cls=PlainCommand, context_settings={"help_option_names": ["-h", "--help"]})
@offline_option
@click.option("--model", required=True, help="Hub name or local folder of a causal LM, or `demo`.")
@click.option(
    "--task",
    required=True,
    multiple=True,
    help="Harness task with a training split (`aft tasks --trainable`); may repeat: one vector for "
    "several tasks of one type, mixed evenly, the document numbers below being totals.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the vector, card and ledger.")
@click.option(
    "--protocol",
    default="adaptive",
    show_default=True,
    help="Recipe: rapid, optimized, maximum, adaptive or full; --dry-run shows its numbers.",
)
@click.option("--layers", help="all, or like 3,5-8,25%-75%:2 (from 0).  [default: by protocol, as below]")
@click.option("--seeds", type=int, help="How many seeds each finalist is trained with.")
@click.option("--first-seed", default=0, show_default=True, help="The first of them.")
@click.option("--train-docs", type=int, help="Documents gradients see.")
@click.option("--selection-docs", type=int, help="Documents choices are made on.")
@click.option("--train-split", help="Split both are carved from.  [default: the task's training split]")
@click.option("--num-fewshot", type=int, help="Examples in each prompt.  [default: the task's own]")
@click.option("--apply-chat-template", is_flag=True, help="Prompt through the tokenizer's chat template.")
@click.option("--system-instruction", help="System instruction put before every prompt.")
@click.option(
    "--fewshot-as-multiturn/--fewshot-as-text", default=None, help="Examples as chat turns, or as one text."
)
@click.option(
    "--objective",
    type=click.Choice(["choice", "lm", "rft"]),
    help="choice: the right option; lm: the gold answer; rft: the model's own right answers.  "
    "[default: choice or lm, by the task's type]",
)
@click.option(
    "--metric",
    help="choice: what an option's score means: acc (its log-likelihood), acc_norm (that per character; the "
    "default where the task reports it) or both (the mean); rft: the task's metric that marks answers.",
)
@click.option(
    "--choice-loss",
    type=click.Choice(["cross-entropy", "margin"]),
    help="What training minimises over options; margin: the right one should lead by --margin nats. "
    "Choices are made on cross-entropy either way.  [default: cross-entropy]",
)
@click.option("--margin", type=float, help="Lead in nats that --choice-loss margin asks for.  [default: 1]")
@click.option(
    "--label-smoothing",
    type=float,
    help="Share of the cross-entropy's target spread over all options, to curb overconfidence.  [default: 0]",
)
@click.option("--rft-samples", type=int, help="Answers sampled per problem and round.  [default: 8]")
@click.option("--rft-rounds", type=int, help="The most rounds of sampling and training.  [default: 3]")
@click.option("--rft-temperature", type=float, help="Of sampling: higher is more varied.  [default: 0.7]")
@click.option("--rft-filter", help="The task's filter whose marks count.  [default: its first]")
@click.option(
    "--control",
    type=click.Choice(["random", "shuffled", "format"]),
    help="Train a placebo instead: a random direction, permuted labels, or others' answers.",
)
@click.option(
    "--method",
    default="static",
    show_default=True,
    help="How the intervention is parametrised; `aft methods` lists them.",
)
@click.option(
    "--positions",
    default="all",
    show_default=True,
    help="Tokens steered: all, prompt, last (of the prompt) or generated.",
)
@click.option(
    "--calibrate", is_flag=True, help="Choose the finished vector's coefficient on the selection split."
)
@click.option(
    "--norm-cap", type=float, help="Largest norm, as a share of the median residual norm at its layer."
)
@click.option("--lr", help="Adam's learning rate, or several to search: 1e-4,1e-3,1e-2.")
@click.option("--l2", help="Lambda of lambda * ||v||^2, or several to search.")
@click.option("--epochs", type=int, help="The most epochs of a finalist.")
@click.option("--min-epochs", type=int, help="Epochs before --patience may stop it.")
@click.option("--patience", type=int, help="Epochs without gain before a stop; 0: never.")
@click.option("--clip", type=float, help="Largest gradient norm; 0: no limit.")
@click.option("--batch-size", type=int, help="Documents per optimiser step.")
@click.option(
    "--share-fewshot",
    type=int,
    help="Documents whose prompts show the same few-shot examples: faster; 1: each its own.",
)
@click.option("--rungs", help="Search rounds TRAIN:SELECTION:EPOCHS:KEEP,...; none: train everything fully.")
@click.option("--finalists", type=int, help="How many settings of the search are trained fully.")
@click.option("--regression/--no-regression", default=None, help="Stop a finalist worse than the baseline.")
@click.option("--retries", type=int, help="New starts when nothing beats the baseline.")
@click.option(
    "--screen",
    default="off",
    show_default=True,
    help="One backward pass ranks all layers first: order reports how well it foretold; N keeps N.",
)
@click.option("--device", help="cuda, cuda:1, cpu, ...  [default: cuda where there is one]")
@click.option("--dtype", help="float32, bfloat16, float16.  [default: bfloat16 where it is fast]")
@click.option("--model-args", help="Further arguments of lm-eval's hf model: revision=...,peft=...")
@click.option("--include-path", multiple=True, help="Folder with your own task YAMLs; may repeat.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
@click.option("--dry-run", is_flag=True, help="Print the plan and its sizes; train nothing, write nothing.")
def train_vector(**options: Any) -> None:
    """Fit a steering vector on a harness task's training split.

    Trains every layer, chooses layer, learning rate and epoch on documents held out from the
    training split, and never looks at the evaluation split, except to drop documents that occur in
    both. Score the result with `aft eval`, or with stock lm_eval.

    \b
    Protocols (every number can be changed by its flag):
      rapid      25-75 % depth, every other layer, 50 documents, 3 epochs, one seed
      optimized  20-80 % depth, 3 epochs a layer, then the best one for up to 10
      maximum    every layer with 3 seeds for up to 10 epochs, stopped when worse than the baseline
      adaptive   every layer x 5 learning rates, thinned out by successive halving; then 4 penalties;
                 the last two with 3 seeds for 3 to 10 epochs
      full       every layer x 5 learning rates x 3 seeds to the end, nothing thinned out

    \b
    Objective rft (rejection-sampling fine-tuning), for tasks whose answers are generated:
      1. sample --rft-samples answers to each training problem, at first from the plain model
      2. keep those the task's own filter and metric mark right, each wording once
      3. train on them as lm trains on gold answers, and evaluate on the selection split
      4. again, sampling with the vector of the round before, while greedy accuracy there rises
    It strengthens what the model sometimes gets right already; it cannot begin where nothing is.

    \b
    Examples:
      train-vector --model EleutherAI/pythia-160m --task arc_challenge --output arc
      train-vector --model Qwen/Qwen1.5-0.5B-Chat --task gsm8k --apply-chat-template \\
                   --device cuda --dtype bfloat16 --output gsm8k
      train-vector --model demo --task aft_demo_choice --output demo-vector
      train-vector --model gpt2 --task arc_easy --task arc_challenge --num-fewshot 0 --output arc
      train-vector --model demo --task aft_demo_math --objective rft --protocol optimized --output own
      train-vector --model gpt2 --task arc_easy --protocol maximum --lr 1e-2 --dry-run
      accelerate launch -m lm_eval_aft.cli.train --model gpt2 --task arc_easy --output arc
    """
    dry_run, output = options.pop("dry_run"), options.pop("output")
    if output is None and not dry_run:
        raise AFTError("No output folder was given.", "Add --output FOLDER, or --dry-run to see the plan.")
    try:
        with terminable(), alone_in(None if dry_run else output):
            _train(options, output, dry_run)
    except (KeyboardInterrupt, Terminated) as end:
        ended(end, output)


def _train(options: dict[str, Any], output: Path | None, dry_run: bool) -> None:
    from_user = options.pop
    quiet_libraries()
    from lm_eval_aft.lm import AFTLM
    from lm_eval_aft.training.examples import PromptSettings
    from lm_eval_aft.training.folder import check_output
    from lm_eval_aft.training.plan import TrainingPlan
    from lm_eval_aft.training.precision import to_training_dtype
    from lm_eval_aft.training.prepared import prepare
    from lm_eval_aft.training.protocols import parse_numbers, parse_rungs
    from lm_eval_aft.training.train import run

    resume, overwrite = from_user("resume"), from_user("overwrite")
    leads = int(os.environ.get("RANK", "0")) == 0  # of several processes one looks and speaks
    if output is not None and not dry_run and leads:
        check_output(output, resume=resume, overwrite=overwrite)
    prompts = PromptSettings(
        **{
            key: from_user(key)
            for key in ("num_fewshot", "apply_chat_template", "system_instruction", "fewshot_as_multiturn")
        }
    )
    for name, parse in (("lr", parse_numbers), ("l2", parse_numbers), ("rungs", parse_rungs)):
        if options[name] is not None:
            options[name] = parse(options[name])
    model = from_user("model")
    arguments = parse_model_args(
        from_user("model_args"), device=from_user("device"), dtype=from_user("dtype")
    )
    plan = TrainingPlan.of(prompts=prompts, include_path=tuple(from_user("include_path")), **options)
    click.echo(f"Loading {model} ...", err=True)
    lm = AFTLM(model, **arguments)
    if "dtype" not in arguments:
        to_training_dtype(lm.model)
    prepared = prepare(lm, plan)
    if dry_run:
        _dry_run(prepared)
        return
    result = run(prepared, output, resume=resume)
    if leads:
        print_result(result, model, plan.include_path)


def _dry_run(prepared: Prepared) -> None:
    from lm_eval_aft.training.train import cost

    rows = [(key, str(value)) for key, value in prepared.summary().items()]
    print_table("Plan (nothing was trained)", ("setting", "value"), rows)
    print_stages(prepared.stages())
    click.echo("Measuring a few documents ...", err=True)
    print_cost(cost(prepared), retries=True)
    if (rft := prepared.plan.rft) is not None:
        click.echo(
            f"That is one of at most {rft.rounds} rounds with one kept answer per problem; a round "
            f"keeps up to {rft.samples} times as many. Sampling comes on top."
        )


if __name__ == "__main__":
    train_vector()
