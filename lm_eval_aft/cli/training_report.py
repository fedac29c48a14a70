"""What train-vector prints: the plan's stages, and how a finished run came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import print_table

if TYPE_CHECKING:
    from lm_eval_aft.training.estimate import Estimate
    from lm_eval_aft.training.protocols import Stage
    from lm_eval_aft.training.sweep import SweepResult
    from lm_eval_aft.training.train import TrainingResult
    from lm_eval_aft.vector import SteeringVector


def print_result(result: TrainingResult, model: str, include_path: tuple[str, ...]) -> None:
    """How a run came out, and how to score its vector."""
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
    click.echo(f"Wrote {result.folder} ({result.seconds:.0f} s, engine: {result.engine}). Score it:")
    own_tasks = f" -- --include_path {include_path[0]}" if include_path else ""
    click.echo(
        f"  aft eval --model {model} --vector {result.folder} "
        f"--tasks {result.vector.metadata['task']} --output {result.folder}-results{own_tasks}"
    )


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
    _print_calibration(result.vector)
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


def print_cost(expected: Estimate, retries: bool = False) -> None:
    """What a run would take; ``retries``: it may start some candidates again, which is not counted."""
    aside = " (retries aside)" if retries else ""
    click.echo(
        f"At most about {duration(expected.seconds)} on this machine as it is now{aside}, "
        f"{expected.flops:.3g} floating-point operations, "
        f"{expected.peak_bytes / 2**20:,.0f} MiB above the loaded weights."
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
