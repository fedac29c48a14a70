"""The report of a study as plain data: every cell, and what may be said over cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from lm_eval_aft import __version__
from lm_eval_aft.bench.claims import CellRow, averages, beside_earlier, contrasts, method_means
from lm_eval_aft.bench.earlier import NOTES
from lm_eval_aft.bench.matrix import Cell
from lm_eval_aft.bench.schedule import DONE, PRUNED, Schedule, given_up
from lm_eval_aft.bench.study import BenchStudy
from lm_eval_aft.reporting.notes import over_seeds
from lm_eval_aft.reporting.stats import ALPHA, BETTER, WORSE, holm, verdict
from lm_eval_aft.reporting.verdicts import SELECTED, Row


@dataclass
class BenchReport:
    """Everything a reader is told.

    Attributes:
        family: how many comparisons Holm's correction covers.
        pivots: per method a table of models × tasks, mean difference over seeds.
        by_model, by_task: averages over cells, controls left out.
        seeds: per model, task and method with at least 3 seeds, the mean and its interval.
        methods: per method the mean over its models and tasks, seed by seed, with an interval.
        contrasts: methods against the first one, seed by seed.
        negative: pairs of model and task that were given up.
        earlier: the earlier study's figures beside ours.
    """

    title: str
    created: str
    version: str
    cells: list[CellRow]
    family: int
    alpha: float
    pivots: list[dict[str, Any]]
    by_model: list[dict[str, Any]]
    by_task: list[dict[str, Any]]
    seeds: list[dict[str, Any]]
    methods: list[dict[str, Any]]
    contrasts: list[dict[str, Any]]
    negative: list[dict[str, Any]]
    earlier: list[dict[str, Any]]
    earlier_note: str
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def count(self, state: str) -> int:
        """How many cells are in a state."""
        return sum(cell.state == state for cell in self.cells)


def build_report(study: BenchStudy, schedule: Schedule) -> BenchReport:
    """The report of what is in the ledger, for the study as it is now."""
    rows = [_cell_row(cell, schedule) for cell in schedule.cells]
    family = _adjust(rows, schedule.cells)
    judged = [row for row in rows if row.points is not None and not row.control]
    notes = dict.fromkeys(f"{row.name}: {note}" for row in rows for note in row.notes)
    return BenchReport(
        title=f"Study {study.name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        cells=rows,
        family=family,
        alpha=ALPHA,
        pivots=_pivots(rows),
        by_model=averages(judged, lambda row: row.model),
        by_task=averages(judged, lambda row: row.task),
        seeds=over_seeds(_distinct(rows)),
        methods=method_means(rows, study),
        contrasts=contrasts(rows, study),
        negative=_negative(rows),
        earlier=beside_earlier(rows, study),
        earlier_note=NOTES.get(study.earlier, ""),
        notes=_shortened(list(notes)),
    )


def _cell_row(cell: Cell, schedule: Schedule) -> CellRow:
    state = schedule.states[cell.name]
    outcome = schedule.ledger.outcomes.get(cell.key) if state == DONE else None
    own = (cell.name, cell.model.name, cell.task.name, cell.method.name, cell.seed, cell.control)
    if outcome is None:
        why = str(schedule.ledger.failures.get(cell.key, {}).get("error", "")) if state == "failed" else ""
        if state == PRUNED:
            why = "its first seed was no better than the baseline after all retries"
        return CellRow(*own, state, why)
    rows = [Row(**each) for each in outcome["rows"]]
    for row in rows:
        own_name = "" if cell.task.name == cell.task.task else f"{cell.task.name}/"
        row.run = f"{cell.model.name}/{own_name}{cell.method.name}-seed-{cell.seed}" + (
            f" {row.run}" if row.run.startswith("placebo/") else ""
        )
    steered = [row for row in rows if "placebo/" not in row.run]
    primary = next((row for row in steered if row.primary), None)
    return CellRow(
        *own,
        state,
        given_up(outcome),
        primary,
        [row for row in rows if row is not primary],
        outcome["vector"],
        outcome.get("notes") or [],
        round(sum((outcome.get("seconds") or {}).values()), 1),
    )


def _distinct(rows: Sequence[CellRow]) -> list[Row]:
    """Primary shares of the cells, one and the same vector of several seeds once."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for each in rows:
        if each.row and each.row.share:
            found.setdefault((each.model, each.task, each.method, each.vector["sha256"]), each.row)
    return list(found.values())


def _adjust(rows: Sequence[CellRow], cells: Sequence[Cell]) -> int:
    """Holm over all cells; one and the same vector on the same documents is one comparison."""
    same: dict[tuple[str, str], list[Row]] = {}
    for each, cell in zip(rows, cells, strict=True):
        row = each.row
        if row is None:
            continue
        row.p_adjusted, row.family = None, False
        if each.control or row.verdict == SELECTED:
            continue
        same.setdefault((each.vector["sha256"], cell.baseline_key), []).append(row)
    adjusted = holm([twins[0].p_value for twins in same.values()])
    for twins, p in zip(same.values(), adjusted, strict=True):
        for row in twins:
            row.p_adjusted, row.family = p, row is twins[0]
            row.verdict = verdict(p, row.difference, row.higher_is_better)
    return len(same)


def _pivots(rows: Sequence[CellRow]) -> list[dict[str, Any]]:
    tasks = list(dict.fromkeys(row.task for row in rows))
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        lines = []
        for model in dict.fromkeys(row.model for row in rows):
            line: list[dict[str, Any] | None] = []
            for task in tasks:
                own = [r for r in rows if (r.model, r.task, r.method) == (model, task, method)]
                values = [row.points for row in own if row.points is not None]
                verdicts = [row.row.verdict for row in own if row.row]
                line.append(
                    {
                        "points": statistics.fmean(values) if values else None,
                        "n": next((row.row.n for row in own if row.row), None),
                        "seeds": len(values),
                        "better": verdicts.count(BETTER),
                        "worse": verdicts.count(WORSE),
                        "states": sorted({row.state for row in own}),
                    }
                )
            lines.append({"model": model, "values": line})
        found.append({"method": method, "tasks": tasks, "lines": lines})
    return found


def _negative(rows: Sequence[CellRow]) -> list[dict[str, Any]]:
    """Series whose training gave up, and whether every method did on that model and task."""
    gave_up = [row for row in rows if row.state == DONE and row.why]
    found = []
    for row in gave_up:
        sisters = [each for each in rows if (each.model, each.task) == (row.model, row.task)]
        finished = [each for each in sisters if each.state == DONE]
        lost = {e.method for e in finished} - {each.method for each in finished if not each.why}
        pruned = [each.name for each in sisters if each.state == PRUNED and each.method == row.method]
        found.append(
            {"name": row.name, "model": row.model, "task": row.task, "method": row.method, "why": row.why}
            | {"points": row.points, "selection_change": row.vector.get("selection_change")}
            | {"pruned": pruned, "whole_pair": lost >= {e.method for e in sisters if not e.control}}
        )
    return found


def _shortened(notes: Iterable[str], most: int = 40) -> list[str]:
    """One line for what is said of many cells."""
    texts: dict[str, list[str]] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        texts.setdefault(text, []).append(name)
    found = [
        f"{names[0]}: {text}" if len(names) == 1 else f"{len(names)} cells, the first {names[0]}: {text}"
        for text, names in texts.items()
    ]
    return (
        found if len(found) <= most else [*found[:most], f"... and {len(found) - most} more kinds of notes."]
    )
