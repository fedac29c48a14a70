"""``train-vector``, also ``aft train``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import parse_model_args, print_table, quiet_libraries
from lm_eval_aft.errors import AFTError

if TYPE_CHECKING:
    from lm_eval_aft.training.protocols import Stage
    from lm_eval_aft.training.train import TrainingResult
    from lm_eval_aft.vector import SteeringVector


@click.command("train-vector", context_settings={"help_option_names": ["-h", "--help"]})
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
@click.option("--objective", type=click.Choice(["choice", "lm"]), help="[default: by the task's type]")
@click.option(
    "--metric",
    type=click.Choice(["acc", "acc_norm", "both"]),
    help="What an option's score means: its log-likelihood, that per character, or the mean of both "
    "losses and of both scores.  [default: acc_norm where the task reports it]",
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
    Examples:
      train-vector --model EleutherAI/pythia-160m --task arc_challenge --output arc
      train-vector --model Qwen/Qwen1.5-0.5B-Chat --task gsm8k --apply-chat-template \\
                   --device cuda --dtype bfloat16 --output gsm8k
      train-vector --model demo --task aft_demo_choice --output demo-vector
      train-vector --model gpt2 --task arc_easy --task arc_challenge --num-fewshot 0 --output arc
      train-vector --model gpt2 --task arc_easy --protocol maximum --lr 1e-2 --dry-run
      accelerate launch -m lm_eval_aft.cli.train --model gpt2 --task arc_easy --output arc
    """
    from_user = options.pop
    dry_run, output = from_user("dry_run"), from_user("output")
    if output is None and not dry_run:
        raise AFTError("No output folder was given.", "Add --output FOLDER, or --dry-run to see the plan.")
    quiet_libraries()
    from lm_eval_aft.lm import AFTLM
    from lm_eval_aft.training.examples import PromptSettings
    from lm_eval_aft.training.plan import TrainingPlan, prepare
    from lm_eval_aft.training.precision import to_training_dtype
    from lm_eval_aft.training.protocols import parse_numbers, parse_rungs
    from lm_eval_aft.training.train import check_output, cost, run

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
        rows = [(key, str(value)) for key, value in prepared.summary().items()]
        print_table("Plan (nothing was trained)", ("setting", "value"), rows)
        _print_stages(prepared.stages())
        click.echo("Measuring a few documents ...", err=True)
        expected = cost(prepared)
        click.echo(
            f"At most about {_duration(expected.seconds)} on this machine as it is now (retries aside), "
            f"{expected.flops:.3g} floating-point operations, "
            f"{expected.peak_bytes / 2**20:,.0f} MiB above the loaded weights."
        )
        return
    try:
        result = run(prepared, output, resume=resume)
    except KeyboardInterrupt:
        click.echo(
            f"\nInterrupted. Finished epochs are kept: go on with --resume --output {output}.", err=True
        )
        raise SystemExit(130) from None
    if leads:
        _print_result(result, model, plan.include_path)


def _print_result(result: TrainingResult, model: str, include_path: tuple[str, ...]) -> None:
    sweep, vector = result.sweep, result.vector
    baseline = sweep.baseline
    rows = [("baseline", "", f"{baseline.score:.4f}", "", f"{baseline.accuracy:.1%}", "", "", "", "")]
    mark = 0
    for place, layer in enumerate(sweep.layers, start=1):
        ordered = sorted(layer.candidates, key=lambda c: c.seed)
        norms = "/".join(f"{c.norm(best=True):.2f}" for c in ordered)
        _, lr, l2 = ordered[0].setting
        rows.append(
            (
                str(layer.layer),
                f"{layer.stage} ({layer.baseline.n})",
                f"{layer.score:.4f}",
                f"{layer.change:+.4f}",
                f"{layer.accuracy:.1%}",
                f"{lr:g}",
                f"{l2:g}",
                "/".join(str(c.best_epoch) for c in ordered),
                norms,
            )
        )
        mark = place if layer is sweep.chosen else mark
    columns = "layer|stage (docs)|cross-entropy|change|accuracy|lr|l2|best epoch|norm".split("|")
    title = f"Selection split, {baseline.n} documents: means over seeds; change against the same documents"
    print_table(title, columns, rows, mark)
    _print_calibration(vector)
    own = sweep.finalist.best_score.tasks if sweep.finalist.best_score else {}
    for task, score in own.items():
        before = baseline.tasks[task]
        click.echo(
            f"{task}: cross-entropy {before.score:.4f} -> {score.score:.4f}, "
            f"accuracy {before.accuracy:.1%} -> {score.accuracy:.1%}, {score.n} documents."
        )
    if result.screen:
        click.echo(
            f"The screen put the layers in the order {', '.join(map(str, result.screen['order']))}"
            + (
                f"; rank correlation with the sweep {result.screen['rank_correlation']:+.2f}."
                if "rank_correlation" in result.screen
                else "."
            )
        )
    if sweep.pruned:
        click.echo(f"A negative result: {sweep.pruned}.")
    elif sweep.chosen.score >= baseline.score:
        click.echo("No layer improved on the baseline: expect no gain from this vector.")
    click.echo(
        f"Chose layer {sweep.chosen.layer}, seed {sweep.finalist.seed}, on these very documents: "
        "the numbers above are not results."
    )
    dropped = result.counts["evaluation_overlap"]
    if dropped:
        click.echo(f"Dropped {dropped} training document(s) that also occur in the evaluation split.")
    click.echo(f"Wrote {result.folder} ({result.seconds:.0f} s, engine: {result.engine}). Score it:")
    own_tasks = f" -- --include_path {include_path[0]}" if include_path else ""
    click.echo(
        f"  aft eval --model {model} --vector {result.folder} "
        f"--tasks {vector.metadata['task']} --output {result.folder}-results{own_tasks}"
    )


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


def _print_stages(stages: Sequence[Stage]) -> None:
    rows = [
        (
            s.name,
            str(s.candidates),
            str(s.train),
            str(s.selection),
            str(s.epochs),
            str(s.keep),
            str(s.documents),
        )
        for s in stages
    ]
    columns = ("stage", "candidates", "train docs", "selection docs", "epochs", "keep", "candidate-docs")
    print_table("Stages, at most", columns, rows)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    train_vector()
