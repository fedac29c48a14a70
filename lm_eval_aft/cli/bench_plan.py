"""What ``aft bench --dry-run`` prints: cells, steps, operations and memory, model by model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import print_table

if TYPE_CHECKING:
    from lm_eval_aft.bench.matrix import Cell
    from lm_eval_aft.bench.study import BenchStudy

GIB = 2**30


def print_plan(
    study: BenchStudy, output: Path | None, only: Sequence[str], device: str | None, tflops: float | None
) -> None:
    """Print what a study would do and cost; nothing is loaded, trained or written."""
    from lm_eval_aft.bench.cost import Paper
    from lm_eval_aft.bench.driver import study_cells
    from lm_eval_aft.bench.shapes import find_shape
    from lm_eval_aft.training.trajectory import DEFAULT_TOKEN_BUDGET, TOKEN_BUDGET

    cells = [cell for cell in study_cells(study) if cell.matches(only)]
    finished = _finished(cells, output)
    budget = TOKEN_BUDGET.get((device or "cuda").partition(":")[0], DEFAULT_TOKEN_BUDGET)
    shots = _shots(study)
    rows, models, whole, shipped, assumed = [], [], 0.0, [], set[str]()
    for entry in study.models:
        own = [cell for cell in cells if cell.model.name == entry.name]
        if not own:
            continue
        shape = find_shape(entry)
        if shape.shipped:
            shipped.append(entry.name)
        paper = Paper(shape, budget)
        total, peak = 0.0, 0
        for task, method in dict.fromkeys((cell.task.name, cell.method.name) for cell in own):
            same = [cell for cell in own if (cell.task.name, cell.method.name) == (task, method)]
            cost = paper.cost(same[0], shots(same[0]))
            flops = len(same) * (cost.train_flops + cost.score_flops)
            total, peak = total + flops, max(peak, cost.peak_bytes)
            assumed |= {task} if paper.assumed(same[0]) else set()
            numbers = (f"{len(same) * n:,}" for n in (cost.candidates, cost.steps))
            rows.append((entry.name, task, method, str(len(same)), *numbers, f"{flops:.3g}"))
        baselines = {cell.baseline_key: cell for cell in own}
        total += sum(paper.baseline_flops(cell, shots(cell)) for cell in baselines.values())
        whole += total
        weights = paper.weights / GIB
        memory = (f"{weights:.1f}", f"{peak / GIB:.1f}", f"{weights + peak / GIB:.1f}")
        dtype = str(shape.dtype).removeprefix("torch.")
        size = f"{paper.parameters / 1e9:.3g} B"
        models.append(
            (entry.name, size, dtype, str(len(own)), *memory, f"{total:.3g}", *_hours(total, tflops))
        )
    columns = ("model", "task", "method", "cells", "candidates", "steps", "operations")
    print_table(f"Study {study.name} (nothing was run)", columns, rows)
    hours = ("hours",) if tflops else ()
    heads = ("model", "parameters", "dtype", "cells", "weights", "above", "GiB in all", "operations", *hours)
    print_table("By model; memory in GiB, baselines included", heads, models)
    _print_notes(study, cells, finished, shipped, sorted(assumed), budget, whole, tflops)


def _print_notes(
    study: BenchStudy,
    cells: Sequence[Cell],
    finished: int,
    shipped: Sequence[str],
    assumed: Sequence[str],
    budget: int,
    whole: float,
    tflops: float | None,
) -> None:
    baselines = len({cell.baseline_key for cell in cells})
    click.echo(
        f"{len(cells)} cells ({finished} finished), {baselines} baselines, "
        f"{len({cell.model.name for cell in cells})} models loaded once each: {whole:.3g} floating-point "
        "operations at most, retries aside."
    )
    if tflops:
        click.echo(f"About {whole / (tflops * 1e12) / 3600:.1f} hours at {tflops:g} TFLOP/s sustained.")
    click.echo(
        f"Passes of at most {budget:,} tokens ({'a CPU' if budget < 10_000 else 'a GPU'}; --device decides), "
        "documents of the lengths in lm_eval_aft/training/known_models.py."
    )
    if shipped:
        click.echo(
            f"Not read from the Hub: shapes of {', '.join(shipped)} are numbers shipped for estimates."
        )
    if assumed:
        click.echo(f"Lengths of {', '.join(assumed)} are not known: taken as typical.")
    if study.prune:
        click.echo("Pruning may leave out seeds of what stays behind its baseline after all retries.")


def _hours(flops: float, tflops: float | None) -> tuple[str, ...]:
    return (f"{flops / (tflops * 1e12) / 3600:.1f}",) if tflops else ()


def _finished(cells: Sequence[Cell], output: Path | None) -> int:
    from lm_eval_aft.bench.store import LEDGER, Ledger

    if output is None or not (output / LEDGER).exists():
        return 0
    ledger = Ledger(output / LEDGER, mend=False)
    return sum(cell.key in ledger.outcomes for cell in cells)


def _shots(study: BenchStudy) -> Any:
    """Examples in a cell's prompts: what the study says, else what the task's file says."""
    from lm_eval.tasks._yaml_loader import load_yaml

    from lm_eval_aft.harness import find_definition

    known: dict[str, int] = {}
    with contextlib.chdir(study.data) if study.data else contextlib.nullcontext():
        for entry in study.tasks:
            path = find_definition(entry.task, study.include_path)
            config = load_yaml(path, resolve_func=False, recursive=True) if path else {}
            known[entry.name] = int(config.get("num_fewshot") or 0)
    return lambda cell: (
        known[cell.task.name] if cell.plan.prompts.num_fewshot is None else cell.plan.prompts.num_fewshot
    )
