"""What may be said over cells: averages, intervals over seeds, the earlier study's figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scipy.special import stdtrit

from lm_eval_aft.bench.earlier import TABLES
from lm_eval_aft.bench.study import BenchStudy
from lm_eval_aft.methods import DEFAULT as DEFAULT_METHOD
from lm_eval_aft.reporting.stats import BETTER, WORSE, mean_stderr
from lm_eval_aft.reporting.verdicts import Row

LEAST_SEEDS = 3


@dataclass
class CellRow:
    """A cell's line in the table.

    Attributes:
        state: ``done``, ``failed``, ``pruned``, ``to do`` or ``left out`` (by ``--only``).
        why: why it failed or was pruned; of a finished cell, why its training gave up.
        row: its primary metric, the p-value adjusted over all cells; ``None`` unless it is done.
        others: its other metrics and its placebos, outside Holm's family.
        vector: what the vector is and how it was chosen.
    """

    name: str
    model: str
    task: str
    method: str
    seed: int
    control: bool
    state: str
    why: str = ""
    row: Row | None = None
    others: list[Row] = field(default_factory=list)
    vector: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def points(self) -> float | None:
        """Difference in percentage points; ``None`` where there is none or the metric is no share."""
        return 100 * self.row.difference if self.row and self.row.share else None


def averages(rows: Sequence[CellRow], key: Callable[[CellRow], str]) -> list[dict[str, Any]]:
    """Per key the mean over model, task and method, each of them a mean over its seeds."""
    found = []
    for name in dict.fromkeys(map(key, rows)):
        own = [row for row in rows if key(row) == name]
        series: dict[tuple[str, str, str], list[float]] = {}
        for row in own:
            series.setdefault((row.model, row.task, row.method), []).append(row.points or 0.0)
        verdicts = [row.row.verdict for row in own if row.row]
        better, worse = verdicts.count(BETTER), verdicts.count(WORSE)
        mean = statistics.fmean(statistics.fmean(values) for values in series.values())
        found.append(
            {"name": name, "points": mean, "cells": len(own), "better": better, "worse": worse}
            | {"neither": len(own) - better - worse}
        )
    return found


Means = dict[tuple[str, str], list[float]]


def _by_pair(rows: Sequence[CellRow], method: str, seeds: Sequence[int]) -> Means:
    """A method's points, seed by seed, for each model and task that every seed finished."""
    at = {(r.model, r.task, r.seed): r.points for r in rows if r.method == method and r.points is not None}
    pairs = dict.fromkeys((model, task) for model, task, _ in at)
    return {p: [at[*p, s] for s in seeds] for p in pairs if all((*p, seed) in at for seed in seeds)}


def _over_seeds(values: Sequence[Sequence[float]], pairs: int) -> dict[str, Any]:
    """Mean over pairs seed by seed, then over seeds with its 95 % t interval; none with fewer than 3 seeds.

    Args:
        values: a row for each pair, a column for each seed.
    """
    means = [statistics.fmean(column) for column in zip(*values, strict=True)]
    error = mean_stderr(means)
    found: dict[str, Any] = {"seeds": len(means), "pairs": pairs, "mean": statistics.fmean(means)}
    found |= {"low": None, "high": None}
    if len(means) >= LEAST_SEEDS and error is not None:
        half = float(stdtrit(len(means) - 1, 0.975)) * error
        found |= {"low": found["mean"] - half, "high": found["mean"] + half}
    return found


def method_means(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """Each method over its models and tasks: what the method does, not one vector."""
    found = []
    for method in study.methods:
        values = _by_pair(rows, method.name, study.seeds)
        if values:
            found.append({"method": method.name} | _over_seeds(list(values.values()), len(values)))
    return found


def contrasts(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """Each method against the first one, on the models and tasks that both finished with every seed."""
    first, *others = [method.name for method in study.methods]
    before, found = _by_pair(rows, first, study.seeds), []
    for name in others:
        after = _by_pair(rows, name, study.seeds)
        both = [pair for pair in after if pair in before]
        if both:
            values = [[a - b for a, b in zip(after[p], before[p], strict=True)] for p in both]
            found.append({"method": name, "against": first} | _over_seeds(values, len(both)))
    return found


def beside_earlier(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """The earlier study's figures, each with the mean of ours on the same model, task and method."""
    pretrained = {entry.name: entry.pretrained for entry in study.models}
    harness = {entry.name: entry.task for entry in study.tasks}
    kinds = {entry.name: entry.settings.get("method", DEFAULT_METHOD) for entry in study.methods}
    found = []
    for quoted in TABLES.get(study.earlier, ()):
        ours = [
            row
            for row in rows
            if not row.control
            and row.points is not None
            and kinds[row.method] == quoted.method
            and quoted.model in ("", pretrained[row.model])
            and quoted.task in ("", harness[row.task])
        ]
        values = [row.points for row in ours if row.points is not None]
        found.append(
            asdict(quoted)
            | {"ours": statistics.fmean(values) if values else None, "best": max(values, default=None)}
            | {"cells": len(values), "our_n": sorted({row.row.n for row in ours if row.row})}
        )
    return found
