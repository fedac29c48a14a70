"""``train-vector``, also ``aft train``: its options, its dry run, and what it prints at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.process import Terminated, is_main_process, quiet_libraries, terminable
from lm_eval_aft.cli.options import (
    LateHelp,
    PlainCommand,
    ended,
    log_option,
    offline_option,
    parse_model_args,
    parse_pairs,
    print_table,
)
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector_file import norm_text
from lm_eval_aft.training.objectives import CHOICE_LOSSES, CONTROLS, OBJECTIVES

if TYPE_CHECKING:
    from lm_eval_aft.harness.examples import PromptSettings
    from lm_eval_aft.steering.vector import SteeringVector
    from lm_eval_aft.training.cost import Estimate
    from lm_eval_aft.training.recipe import Stage
    from lm_eval_aft.training.run import TrainingResult
    from lm_eval_aft.training.setup import Prepared
    from lm_eval_aft.training.sweep import SweepResult


def _criterion_help() -> str:
    from lm_eval_aft.training.selection import CRITERIA, DEFAULT_CRITERION

    return f"What makes one candidate better: {', '.join(CRITERIA)}.  [default: {DEFAULT_CRITERION}]"


@click.command("train-vector", cls=PlainCommand, context_settings={"help_option_names": ["-h", "--help"]})
@offline_option
@click.option("--model", required=True, help="Hub name, local folder or GGUF file of a causal LM, or `demo`.")
@click.option(
    "--task",
    required=True,
    multiple=True,
    help="Harness task with a training split (`aft tasks --trainable`), or all that a pattern, group, tag, "
    "YAML file or folder names; may repeat: one vector for several tasks of one type, mixed evenly, the "
    "document numbers below being totals.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the vector, card and ledger.")
@click.option(
    "--protocol",
    help="Recipe: onepass, adaptive, full, rapid, optimized or maximum; --dry-run shows its numbers.  "
    "[default: onepass; adaptive for methods that depend on the hidden state, or with --lr and the like]",
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
    type=click.Choice(list(OBJECTIVES)),
    help=f"{'; '.join(f'{name}: {kind.help}' for name, kind in OBJECTIVES.items())}.  "
    "[default: choice or lm, by the task's type]",
)
@click.option(
    "--metric",
    help="choice: what an option's score means: acc (its log-likelihood), acc_norm (that per character), "
    "acc_bytes (per byte) or both (the mean of acc and acc_norm); rft: the metric that marks answers.  "
    "[default: acc_norm, acc or acc_bytes, as the task reports]",
)
@click.option(
    "--choice-loss",
    type=click.Choice(CHOICE_LOSSES),
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
    type=click.Choice(CONTROLS),
    help="Train a placebo instead: a random direction, permuted labels, or others' answers.",
)
@click.option(
    "--method",
    default="static",
    show_default=True,
    help=f"What is added to the hidden states: {', '.join(METHODS)}; `aft methods` explains them.",
)
@click.option(
    "--positions",
    default="all",
    show_default=True,
    help="Tokens steered: all, prompt, last (of the prompt) or generated; onepass: auto chooses.",
)
@click.option(
    "--calibrate", is_flag=True, help="Choose the finished vector's coefficient on the selection split."
)
@click.option(
    "--norm-cap", type=float, help="Largest norm, as a share of the median residual norm at its layer."
)
@click.option(
    "--lr",
    help="Adam's learning rate, or several to search. 0.003r,0.01r: relative to the hidden states, so that "
    "a step moves the vector by about 0.3 % or 1 % of their median norm; 1e-3: in the model's own units.",
)
@click.option(
    "--l2", help="Lambda of lambda * ||v||^2, or several to search; 0.001r: v measured as --lr 0.001r does."
)
@click.option("--epochs", type=int, help="The most epochs of a finalist.")
@click.option("--min-epochs", type=int, help="Epochs before --patience may stop it.")
@click.option("--patience", type=int, help="Epochs without gain before a stop; 0: never.")
@click.option("--clip", type=float, help="Largest gradient norm, measured as --lr is; 0: no limit.")
@click.option("--batch-size", type=int, help="Documents per optimiser step.")
@click.option(
    "--share-fewshot",
    type=int,
    help="Documents whose prompts show the same few-shot examples: faster; 1: each its own.",
)
@click.option("--rungs", help="Search rounds TRAIN:SELECTION:EPOCHS:KEEP,...; none: train everything fully.")
@click.option("--finalists", type=int, help="How many settings of the search are trained fully.")
@click.option("--lengths", help="onepass: lengths to try, as shares of the median residual norm.")
@click.option("--refine", type=int, help="onepass: the most steps on the gradient of all documents.")
@click.option("--regression/--no-regression", default=None, help="Stop a finalist worse than the baseline.")
@click.option("--criterion", cls=LateHelp, late_help=_criterion_help)
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
@click.option(
    "--metadata",
    "task_metadata",
    help="As lm-eval's --metadata, for tasks that need it: KEY=VALUE,... or a JSON object.",
)
@log_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
@click.option("--dry-run", is_flag=True, help="Print the plan and its sizes; train nothing, write nothing.")
def train_vector(**options: Any) -> None:
    """Fit a steering vector on a harness task's training split.

    Trains every layer, chooses layer and length (or learning rate and epoch) on documents held out from the
    training split, and never looks at the evaluation split, except to drop documents that occur in
    both. Score the result with `aft eval`, or with stock lm_eval.

    \b
    Protocols (every number can be changed by its flag):
      onepass    no optimiser: one backward pass gives every layer's direction, a search the layer and
                 the length, and quasi-Newton steps refine the best (methods static and all-layers)
      adaptive   every layer x 5 learning rates, thinned out by successive halving; then 4 penalties;
                 the last two with 3 seeds for 3 to 10 epochs
      full       every layer x 5 learning rates x 3 seeds to the end, nothing thinned out
      rapid      25-75 % depth, every other layer, 50 documents, 3 epochs, one seed
      optimized  20-80 % depth, 3 epochs a layer, then the best one for up to 10
      maximum    every layer with 3 seeds for up to 10 epochs, stopped when worse than the baseline

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
        with terminable():
            _train(options, output, dry_run)
    except (KeyboardInterrupt, Terminated) as end:
        ended(end, output)


def _train(options: dict[str, Any], output: Path | None, dry_run: bool) -> None:
    quiet_libraries()
    from lm_eval_aft._util.model_source import model_source
    from lm_eval_aft.training import run
    from lm_eval_aft.training.recipe import TrainingPlan
    from lm_eval_aft.training.setup import load_model, prepare

    folder_options = {name: options.pop(name) for name in ("resume", "overwrite", "log")}
    given = parse_model_args(
        options.pop("model_args"), device=options.pop("device"), dtype=options.pop("dtype")
    )
    model, model_args = model_source(options.pop("model"), given)
    plan = TrainingPlan.of(**plan_settings(options))
    click.echo(f"Loading {model} ...", err=True)
    if dry_run:
        _dry_run(prepare(load_model(model, model_args), plan))
        return
    result = run.train_vector(model, plan, output, model_args=model_args, **folder_options)
    if is_main_process():
        print_result(result, model)


def _dry_run(prepared: Prepared) -> None:
    from lm_eval_aft.training.run import cost

    rows = [(key, str(value)) for key, value in prepared.summary().items()]
    print_table("Plan (nothing was trained)", ("setting", "value"), rows)
    print_stages(prepared.stages())
    click.echo("Measuring ...", err=True)
    print_cost(cost(prepared), retries=True)
    if (rft := prepared.plan.rft) is not None:
        click.echo(
            f"That is one of at most {rft.rounds} rounds with one kept answer per problem; a round "
            f"keeps up to {rft.samples} times as many. Sampling comes on top."
        )


# Options that commands share with `train-vector`, and the plan's settings from them.


def training_options(*names: str) -> Callable[[Any], Any]:
    """Give a command these options of `train-vector`, with the same help."""
    known = {option.name: option for option in train_vector.params}

    def add(command: click.Command) -> click.Command:
        command.params += [known[name] for name in names]
        return command

    return add


def plan_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `TrainingPlan.of` from options of `train-vector`; those not given are left out.

    Raises:
        AFTError: an option that cannot be read.
    """
    from lm_eval_aft.harness.examples import PROMPTS
    from lm_eval_aft.training.recipe import parse_numbers, parse_rates, parse_rungs

    parsers: dict[str, Callable[[str], Any]] = {
        "lr": parse_rates,
        "l2": parse_rates,
        "lengths": parse_numbers,
        "rungs": parse_rungs,
        "task_metadata": lambda text: parse_pairs(text, "metadata"),
    }
    settings: dict[str, Any] = {
        name: parsers[name](value) if name in parsers else value
        for name, value in options.items()
        if value is not None and name not in (*PROMPTS, "include_path")
    }
    include_path = tuple(options.get("include_path") or ())
    return settings | {"prompts": _prompts(options), "include_path": include_path}


def _prompts(options: Mapping[str, Any]) -> PromptSettings:
    from lm_eval_aft.harness.examples import PROMPTS, PromptSettings  # torch

    return PromptSettings(**{name: options[name] for name in PROMPTS if options.get(name) is not None})


def scoring_flags(options: Mapping[str, Any]) -> list[str]:
    """The same prompts and metadata as flags of ``lm_eval run``."""
    flags = _prompts(options).flags()
    if options.get("task_metadata"):
        flags += ["--metadata", json.dumps(parse_pairs(str(options["task_metadata"]), "metadata"))]
    for folder in options.get("include_path") or ():
        flags += ["--include_path", str(folder)]
    return flags


# What train-vector prints: the plan's stages, and the results of a run.


def print_result(result: TrainingResult, model: str) -> None:
    """The results of a run, and how to score its vector."""
    from lm_eval_aft.harness.commands import vector_command

    if result.sweep is None:
        _print_rounds(result.vector.metadata["rft"])
        chose = f"layer {next(iter(result.vector.layers))}"
    else:
        _print_sweep(result, result.sweep)
        chose = f"layer {result.sweep.chosen.layer}, seed {result.sweep.finalist.seed}"
    click.echo(f"Chose {chose}, on these very documents: the numbers above are not results.")
    dropped = result.counts["evaluation_overlap"]
    if dropped:
        click.echo(f"Dropped {dropped} training document(s) that also occur in the evaluation split.")
    if unusable := result.counts.get("unusable"):
        click.echo(f"Dropped {unusable} document(s) without a usable gold answer or with too little text.")
    click.echo(f"Wrote {result.folder} ({result.seconds:.0f} s, engine: {result.engine}). Score it:")
    meta = result.vector.metadata
    meta = {**meta, "base_model": {**meta["base_model"], "name": model}}
    click.echo(f"  {vector_command(meta, str(result.folder), f'{result.folder}-results')}")


def _print_rounds(rft: dict[str, Any]) -> None:
    table = rft["table"]
    sizes = list(table[0]["pass_at"])
    rows = [
        (
            str(each["round"] or "baseline"),
            f"{each['kept']} of {each['tried']}" if "kept" in each else "",
            f"{each['solved']} of {each['problems_tried']}" if "kept" in each else "",
            str(each.get("layer", "")),
            f"{each['greedy']:.1%}",
            *(f"{each['pass_at'][k]:.1%}" for k in sizes),
        )
        for each in table
    ]
    columns = ("round", "answers kept", "problems solved", "layer", "greedy", *(f"pass@{k}" for k in sizes))
    title = (
        f"Selection split, {table[0]['problems']} problems: {rft['metric']} after {rft['filter']}; "
        f"pass@k at temperature {rft['temperature']:g}"
    )
    print_table(title, columns, rows, rft["best_round"])
    if not rft["best_round"]:
        click.echo("A negative result: no round does better than the baseline. Round 1's vector is kept.")


def _print_sweep(result: TrainingResult, sweep: SweepResult) -> None:
    baseline = sweep.baseline
    chosen = sweep.finalist.chosen
    hidden = ("layer", "norm", "share", "refined", "lr_absolute")
    settings = [name for name in chosen if name not in hidden]
    empty = [""] * (len(settings) + 2)
    rows = [("baseline", "", f"{baseline.score:.4f}", "", f"{baseline.accuracy:.1%}", *empty)]
    mark = 0
    for place, layer in enumerate(sweep.layers, start=1):
        ordered = sorted(layer.candidates, key=lambda c: c.seed)
        norms = "/".join(norm_text(c.norm(best=True), c.relative_norm(best=True), ".2f") for c in ordered)
        best = ordered[0].chosen
        shown = [each if isinstance(each := best[name], str) else f"{each:g}" for name in settings]
        if "lr_absolute" in best:
            shown[settings.index("lr")] += f" ({best['lr_absolute']:.3g})"
        rows.append(
            (
                str(layer.layer),
                f"{layer.stage} ({layer.baseline.n})",
                f"{layer.score:.4f}",
                f"{layer.change:+.4f}",
                f"{layer.accuracy:.1%}",
                *shown,
                "/".join(str(c.chosen.get("refined", c.best_epoch)) for c in ordered),
                norms,
            )
        )
        mark = place if layer is sweep.chosen else mark
    steps = "refined" if "refined" in chosen else "best epoch"
    columns = ["layer", "stage (docs)", "cross-entropy", "change", "accuracy", *settings, steps, "norm"]
    title = f"Selection split, {baseline.n} documents: means over seeds; change against the same documents"
    print_table(title, columns, rows, mark)
    if sweep.finalist.relative_norm(best=True) is not None:
        click.echo("Norms in brackets are shares of the median norm of the hidden states at the layer.")
    _print_calibration(result.vector)
    own = sweep.finalist.best_score.tasks if sweep.finalist.best_score else {}
    for task, score in own.items():
        before = baseline.tasks[task]
        click.echo(
            f"{task}: cross-entropy {before.score:.4f} -> {score.score:.4f}, "
            f"accuracy {before.accuracy:.1%} -> {score.accuracy:.1%}, {score.n} documents."
        )
    if result.screen:
        found = result.screen.get("rank_correlation")
        agrees = "" if found is None else f"; rank correlation with the sweep {found:+.2f}"
        click.echo(
            f"The screen put the layers in the order {', '.join(map(str, result.screen['order']))}{agrees}."
        )
    if sweep.pruned:
        click.echo(f"A negative result: {sweep.pruned}.")
    elif not sweep.chosen.improves:
        click.echo("No layer improved on the baseline: expect no gain from this vector.")


def _print_calibration(vector: SteeringVector) -> None:
    found = vector.metadata.get("calibration")
    if not found:
        return
    rows = [(f"{c:g}", f"{score:.4f}", f"{accuracy:.1%}") for c, score, accuracy, _ in found["curve"]]
    if rows:
        mark = [row[0] for row in found["curve"]].index(found["coefficient"])
        title = "Coefficients on the selection split (0 is the baseline)"
        print_table(title, ("coefficient", "cross-entropy", "accuracy"), rows, mark)
    cap = f", at most {found['cap']:.3g} by the norm cap" if found["cap"] is not None else ""
    click.echo(f"The vector's coefficient is {found['coefficient']:g}{cap}.")


def print_stages(stages: Sequence[Stage]) -> None:
    """A plan's stages as a table."""
    rows = [
        tuple(map(str, (s.name, s.candidates, s.train, s.selection, s.epochs, s.keep, s.documents)))
        for s in stages
    ]
    columns = ("stage", "candidates", "train docs", "selection docs", "epochs", "keep", "candidate-docs")
    print_table("Stages, at most", columns, rows)


def print_cost(expected: Estimate, retries: bool = False) -> None:
    """The cost of a run; ``retries``: it may start some candidates again, which is not counted."""
    aside = " (retries aside)" if retries else ""
    ends = [duration(expected.seconds if each is None else each) for each in (expected.least, expected.most)]
    spread = "" if ends[0] == ends[1] else f" ({ends[0]} to {ends[1]}, as candidates stop early or not)"
    click.echo(
        f"About {duration(expected.seconds)} on this machine as it is now{aside}{spread}, "
        f"{expected.flops:.3g} floating-point operations at most, "
        f"{expected.peak_bytes / 2**20:,.0f} MiB above the loaded weights."
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    train_vector()
