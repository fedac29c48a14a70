"""``train-vector``, also ``aft train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import parse_model_args, print_table, quiet_libraries
from lm_eval_aft.errors import AFTError

if TYPE_CHECKING:
    from lm_eval_aft.training.train import TrainingResult


@click.command("train-vector", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="Hub name or local folder of a causal LM, or `demo`.")
@click.option("--task", required=True, help="Harness task with a training split (`aft tasks --trainable`).")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the vector, card and ledger.")
@click.option("--layers", default="all", show_default=True, help="all, or like 3,5-8,25%-75%:2 (from 0).")
@click.option("--seeds", default=3, show_default=True, help="How many seeds each layer is trained with.")
@click.option("--first-seed", default=0, show_default=True, help="The first of them.")
@click.option("--train-docs", type=int, help="Documents gradients see.  [default: up to 500]")
@click.option("--selection-docs", type=int, help="Documents choices are made on.  [default: up to 500]")
@click.option("--train-split", help="Split both are carved from.  [default: the task's training split]")
@click.option("--num-fewshot", type=int, help="Examples in each prompt.  [default: the task's own]")
@click.option("--apply-chat-template", is_flag=True, help="Prompt through the tokenizer's chat template.")
@click.option("--system-instruction", help="System instruction put before every prompt.")
@click.option(
    "--fewshot-as-multiturn/--fewshot-as-text", default=None, help="Examples as chat turns, or as one text."
)
@click.option("--objective", type=click.Choice(["choice", "lm"]), help="[default: by the task's type]")
@click.option("--metric", type=click.Choice(["acc", "acc_norm"]), help="What an option's score means.")
@click.option(
    "--control",
    type=click.Choice(["random", "shuffled", "format"]),
    help="Train a placebo instead: a random direction, permuted labels, or others' answers.",
)
@click.option("--lr", default=1e-3, show_default=True, help="Adam's learning rate.")
@click.option("--l2", default=0.0, show_default=True, help="Lambda of lambda * ||v||^2.")
@click.option("--epochs", default=10, show_default=True, help="The most epochs.")
@click.option("--patience", default=3, show_default=True, help="Epochs without gain before a stop; 0: never.")
@click.option("--clip", default=1.0, show_default=True, help="Largest gradient norm; 0: no limit.")
@click.option("--batch-size", default=1, show_default=True, help="Documents per optimiser step.")
@click.option("--device", help="cuda, cuda:1, cpu, ...  [default: cuda where there is one]")
@click.option("--dtype", help="float32, bfloat16, float16.  [default: the checkpoint's]")
@click.option("--model-args", help="Further arguments of lm-eval's hf model: revision=...,peft=...")
@click.option("--include-path", multiple=True, help="Folder with your own task YAMLs; may repeat.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
@click.option("--dry-run", is_flag=True, help="Print the plan and its sizes; train nothing, write nothing.")
def train_vector(**options: Any) -> None:
    """Fit a steering vector on a harness task's training split.

    Trains every layer with several seeds, chooses layer and epoch on documents held out from the
    training split, and never looks at the evaluation split, except to drop documents that occur in
    both. Score the result with `aft eval`, or with stock lm_eval.

    \b
    Examples:
      train-vector --model EleutherAI/pythia-160m --task arc_challenge --output arc
      train-vector --model Qwen/Qwen1.5-0.5B-Chat --task gsm8k --apply-chat-template \\
                   --device cuda --dtype bfloat16 --output gsm8k
      train-vector --model demo --task aft_demo_choice --output demo-vector
    """
    from_user = options.pop
    dry_run, output = from_user("dry_run"), from_user("output")
    if output is None and not dry_run:
        raise AFTError("No output folder was given.", "Add --output FOLDER, or --dry-run to see the plan.")
    quiet_libraries()
    from lm_eval_aft.lm import AFTLM
    from lm_eval_aft.training.examples import PromptSettings
    from lm_eval_aft.training.fit import Recipe
    from lm_eval_aft.training.plan import TrainingPlan, prepare
    from lm_eval_aft.training.train import check_output, run

    resume, overwrite = from_user("resume"), from_user("overwrite")
    if output is not None and not dry_run:
        check_output(output, resume=resume, overwrite=overwrite)
    prompts = PromptSettings(
        **{
            key: from_user(key)
            for key in ("num_fewshot", "apply_chat_template", "system_instruction", "fewshot_as_multiturn")
        }
    )
    recipe = Recipe(
        lr=from_user("lr"),
        l2=from_user("l2"),
        epochs=from_user("epochs"),
        patience=from_user("patience") or None,
        clip=from_user("clip") or None,
        batch_size=from_user("batch_size"),
    )
    model = from_user("model")
    arguments = parse_model_args(
        from_user("model_args"), device=from_user("device"), dtype=from_user("dtype")
    )
    plan = TrainingPlan(
        prompts=prompts, recipe=recipe, include_path=tuple(from_user("include_path")), **options
    )
    click.echo(f"Loading {model} ...", err=True)
    prepared = prepare(AFTLM(model, **arguments), plan)
    if dry_run:
        rows = [(key, str(value)) for key, value in prepared.summary().items()]
        print_table("Plan (nothing was trained)", ("setting", "value"), rows)
        return
    try:
        result = run(prepared, output, resume=resume)
    except KeyboardInterrupt:
        click.echo(
            f"\nInterrupted. Finished epochs are kept: go on with --resume --output {output}.", err=True
        )
        raise SystemExit(130) from None
    _print_result(result, model, plan.include_path)


def _print_result(result: TrainingResult, model: str, include_path: tuple[str, ...]) -> None:
    baseline, vector = result.sweep.baseline, result.vector
    rows = [("baseline", f"{baseline.score:.4f}", "", f"{baseline.accuracy:.1%}", "", "")]
    mark = 0
    for place, layer in enumerate(result.sweep.layers, start=1):
        epochs = "/".join(str(c.best_epoch) for c in sorted(layer.candidates, key=lambda c: c.seed))
        norms = "/".join(
            f"{float(c.best.norm()):.2f}"
            for c in sorted(layer.candidates, key=lambda c: c.seed)
            if c.best is not None
        )
        change = f"{layer.score - baseline.score:+.4f}"
        rows.append((str(layer.layer), f"{layer.score:.4f}", change, f"{layer.accuracy:.1%}", epochs, norms))
        mark = place if layer is result.sweep.chosen else mark
    columns = ("layer", "cross-entropy", "change", "accuracy", "best epoch", "norm")
    print_table(f"Selection split, {baseline.n} documents: means over seeds", columns, rows, mark)
    chosen = result.sweep.chosen
    if chosen.score >= baseline.score:
        click.echo("No layer improved on the baseline: expect no gain from this vector.")
    click.echo(
        f"Chose layer {chosen.layer}, seed {result.sweep.finalist.seed}, on these very documents: "
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
