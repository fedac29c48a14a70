"""What ``aft bench --dry-run`` prints: cells, steps, operations, hours and memory, model by model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import print_table

if TYPE_CHECKING:
    from lm_eval_aft.bench.matrix import Cell
    from lm_eval_aft.bench.study import BenchStudy
    from lm_eval_aft.training.rates import Spent
    from lm_eval_aft.training.roofline import Device

GIB = 2**30


@dataclass
class _Shown:
    """Lines of the two tables, and what the notes below them tell.

    Attributes:
        rows: by model, task and method.
        models: by model.
        shipped: models whose shape is known here and was not read.
        assumed: tasks whose lengths are only guessed.
    """

    rows: list[tuple[str, ...]] = field(default_factory=list)
    models: list[tuple[str, ...]] = field(default_factory=list)
    shipped: list[str] = field(default_factory=list)
    assumed: set[str] = field(default_factory=set)


def print_plan(study: BenchStudy, output: Path | None, only: Sequence[str], plan_for: str) -> None:
    """Print what a study would do and cost; nothing is loaded, trained or written."""
    from tqdm import tqdm

    from lm_eval_aft.bench.driver import study_cells
    from lm_eval_aft.training.rates import Spent
    from lm_eval_aft.training.roofline import DEVICES, this_cpu

    cells = [cell for cell in study_cells(study) if cell.matches(only)]
    device = this_cpu() if plan_for == "cpu" else DEVICES[plan_for]
    shots, shown, whole = _shots(study), _Shown(), Spent()
    kinds = dict.fromkeys((cell.model.name, cell.task.name, cell.method.name) for cell in cells)
    with tqdm(total=len(kinds), desc="planning", unit="kind", leave=False, disable=None) as bar:
        for entry in study.models:
            if own := [cell for cell in cells if cell.model.name == entry.name]:
                whole += _plan_model(own, shots, device, shown, bar)
    columns = ("model", "task", "method", "cells", "candidates", "steps", "operations", "hours")
    print_table(f"Study {study.name} (nothing was run)", columns, shown.rows)
    heads = ("model", "parameters", "dtype", "cells", "weights", "above", "GiB in all", "fits")
    title = f"By model on {device.name}; memory in GiB, baselines included"
    print_table(title, (*heads, "operations", "hours"), shown.models)
    _print_notes(study, cells, _finished(cells, output), shown, device, whole)


def _plan_model(own: Sequence[Cell], shots: Any, device: Device, shown: _Shown, bar: Any) -> Spent:
    """What a model's cells and baselines take."""
    from lm_eval_aft.bench.cost import Paper
    from lm_eval_aft.bench.shapes import find_shape
    from lm_eval_aft.training.rates import Spent

    name = own[0].model.name
    shape = find_shape(own[0].model)
    if shape.shipped:
        shown.shipped.append(name)
    paper = Paper(shape, device)
    total, costs = Spent(), []
    for task, method in dict.fromkeys((cell.task.name, cell.method.name) for cell in own):
        bar.set_postfix_str(f"{name}/{task}/{method}")
        same = [cell for cell in own if (cell.task.name, cell.method.name) == (task, method)]
        cost = paper.cost(same[0], shots(same[0]))
        spent = cost.whole * len(same)
        total += spent
        costs.append((cost, same[0]))
        if paper.assumed(same[0]):
            shown.assumed.add(task)
        numbers = (f"{len(same) * n:,}" for n in (cost.candidates, cost.steps))
        shown.rows.append((name, task, method, str(len(same)), *numbers, *_spent(spent)))
        bar.update()
    for cell in {cell.baseline_key: cell for cell in own}.values():
        total += paper.baseline(cell, shots(cell))
    most, cell = max(costs, key=lambda each: each[0].peak_bytes)
    budget = paper.fitting_budget(cell, shots(cell))
    fits = "yes" if budget == paper.budget else f"in {budget:,} tokens" if budget else "NO"
    memory = (most.weight_bytes, most.peak_bytes, most.weight_bytes + most.peak_bytes)
    gibibytes = (f"{each / GIB:.1f}" for each in memory)
    size, dtype = f"{most.parameters / 1e9:.3g} B", str(shape.dtype).removeprefix("torch.")
    shown.models.append((name, size, dtype, str(len(own)), *gibibytes, fits, *_spent(total)))
    return total


def _spent(spent: Spent) -> tuple[str, str]:
    hours = spent.seconds / 3600
    return f"{spent.flops:.3g}", f"{hours:.1f}" if hours >= 0.95 else f"{hours:.2g}"


def _print_notes(
    study: BenchStudy,
    cells: Sequence[Cell],
    finished: int,
    shown: _Shown,
    device: Device,
    whole: Spent,
) -> None:
    baselines, (operations, hours) = len({cell.baseline_key for cell in cells}), _spent(whole)
    click.echo(
        f"{len(cells)} cells ({finished} finished), {baselines} baselines, "
        f"{len({cell.model.name for cell in cells})} models loaded once each: "
        f"{operations} floating-point operations and {hours} hours at most, "
        "retries aside."
    )
    click.echo(
        f"{device.name} is taken to reach {device.flops / 1e12:.3g} TFLOP/s and "
        f"{device.bandwidth / 1e9:.3g} GB/s; documents' lengths are those in "
        "lm_eval_aft/training/known_models.py. Generated answers count as if they were read, which takes as "
        "many operations and less time. Out of memory, training goes on in passes of fewer tokens; a budget "
        "beside `fits` is one at which it would."
    )
    if shown.shipped:
        models = ", ".join(shown.shipped)
        click.echo(f"Not read from the Hub: shapes of {models} are numbers shipped for estimates.")
    if shown.assumed:
        click.echo(f"Lengths of {', '.join(sorted(shown.assumed))} are not known: taken as typical.")
    if study.prune:
        click.echo("Pruning may leave out seeds of what stays behind its baseline after all retries.")


def _finished(cells: Sequence[Cell], output: Path | None) -> int:
    from lm_eval_aft.bench.store import LEDGER, Ledger

    if output is None or not (output / LEDGER).exists():
        return 0
    ledger = Ledger(output / LEDGER, mend=False)
    return sum(cell.key in ledger.outcomes for cell in cells)


def _shots(study: BenchStudy) -> Any:
    """Examples in a cell's prompts: what the study says, else what the task's file says."""
    from lm_eval_aft.harness import find_definition, read_definition

    known: dict[str, int] = {}
    with contextlib.chdir(study.data) if study.data else contextlib.nullcontext():
        for entry in study.tasks:
            path = find_definition(entry.task, study.include_path)
            config = read_definition(path) if path else {}
            known[entry.name] = int(config.get("num_fewshot") or 0)
    return lambda cell: (
        known[cell.task.name] if cell.plan.prompts.num_fewshot is None else cell.plan.prompts.num_fewshot
    )
