"""What may be said over cells: averages, intervals over seeds, the earlier study's figures beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Series:
    """A method on one model and task, seed by seed.

    Attributes:
        points: of each seed that is finished.
        error: standard error of a seed's points, over documents; the mean over seeds.
        vectors: how many different ones its seeds came to.
    """

    points: Mapping[int, float]
    error: float
    vectors: int


def _by_pair(rows: Sequence[CellRow], method: str) -> dict[tuple[str, str], Series]:
    """A method's series by model and task; without those whose primary metric is no share."""
    own: dict[tuple[str, str], list[CellRow]] = {}
    for row in rows:
        if row.method == method:
            own.setdefault((row.model, row.task), []).append(row)
    return {
        pair: Series(
            {row.seed: row.points for row in each if row.points is not None},
            statistics.fmean([_error(row.row) for row in each if row.row] or [0.0]),
            len({row.vector.get("sha256") for row in each if row.row}),
        )
        for pair, each in own.items()
        if all(row.row is None or row.row.share for row in each)
    }


def _error(row: Row) -> float:
    """Standard error of a row's difference, in points, from its 95 % interval."""
    return 100 * (row.high - row.low) / (2 * 1.96) if row.low is not None and row.high is not None else 0.0


def _over_seeds(
    series: Sequence[Mapping[int, float]], seeds: Sequence[int], vectors: int, error: float
) -> dict[str, Any]:
    """Mean over pairs seed by seed, then over seeds with its 95 % interval, where a claim may be made.

    The seeds share their documents, so a t interval over seeds alone would miss what these documents
    have by chance: half widths over seeds and over documents are added as squares.
    ``why`` says why no claim may be made. Pairs that were pruned are those that did badly: a mean without
    them would say nothing of the method, so each counts with the seeds that it has.

    Args:
        series: points by seed, of each pair that has any.
        vectors: most different ones that a pair's seeds came to.
        error: standard error of the mean over documents.
    """
    whole = [each for each in series if all(seed in each for seed in seeds)]
    found: dict[str, Any] = {"seeds": len(seeds), "pairs": len(series), "low": None, "high": None}
    found["mean"] = statistics.fmean(statistics.fmean(each.values()) for each in series)
    if len(whole) < len(series):
        return found | {"why": f"{len(series) - len(whole)} of them without every seed"}
    if len(seeds) < LEAST_SEEDS:
        return found | {"why": f"fewer than {LEAST_SEEDS} seeds"}
    if vectors == 1:
        return found | {"why": "every seed makes the same vector"}
    means = [statistics.fmean(each[seed] for each in series) for seed in seeds]
    half = math.hypot(float(stdtrit(len(means) - 1, 0.975)) * (mean_stderr(means) or 0.0), 1.96 * error)
    return found | {"low": found["mean"] - half, "high": found["mean"] + half, "why": ""}


def _documents(rows: Sequence[CellRow], method: str) -> float:
    """Standard error over documents of a method's mean over models and tasks.

    Models answer a task's documents alike, so their errors are not taken to cancel; those of different
    tasks are.
    """
    errors: dict[str, list[float]] = {}
    for (_, task), each in _by_pair(rows, method).items():
        if each.points:
            errors.setdefault(task, []).append(each.error)
    total = sum(map(len, errors.values()))
    return math.hypot(*(sum(each) for each in errors.values())) / total if total else 0.0


def method_means(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """Each method over its models and tasks: what the method does, not one vector."""
    found = []
    for method in study.methods:
        series = _by_pair(rows, method.name).values()
        values = [each.points for each in series if each.points]
        if values:
            vectors = max(each.vectors for each in series)
            means = _over_seeds(values, study.seeds, vectors, _documents(rows, method.name))
            missing = len(series) - len(values)
            if missing and not means["why"]:
                means |= {"low": None, "high": None, "why": f"{missing} more without any seed"}
            found.append({"method": method.name} | means)
    return found


def contrasts(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """Each method against the first one: models, tasks and seeds that both finished."""
    first, *others = [method.name for method in study.methods]
    before, found = _by_pair(rows, first), []
    for name in others:
        after = _by_pair(rows, name)
        both = [(after[pair], before[pair]) for pair in after if pair in before]
        values = [{s: a.points[s] - b.points[s] for s in a.points if s in b.points} for a, b in both]
        if any(values):
            vectors = max(max(a.vectors, b.vectors) for a, b in both)
            error = math.hypot(_documents(rows, name), _documents(rows, first))
            means = _over_seeds([each for each in values if each], study.seeds, vectors, error)
            if not all(values) and not means["why"]:
                means |= {"low": None, "high": None, "why": "not all of them in both"}
            found.append({"method": name, "against": first} | means)
    return found


def beside_earlier(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """The earlier study's figures, each with the mean of ours on the same model, task and method."""
    pretrained = {entry.name: entry.pretrained for entry in study.models}
    harness = {entry.name: entry.task for entry in study.tasks}
    shared = study.recipe.get("method", DEFAULT_METHOD)
    kinds = {entry.name: entry.settings.get("method", shared) for entry in study.methods}
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
