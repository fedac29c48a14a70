"""The report of a study: every cell, averages and intervals over cells, as data, tables and files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from lm_eval_aft import __version__
from lm_eval_aft._util.pages import RenderedTable, csv_text, json_text, render_template, write_formats
from lm_eval_aft._util.process import now
from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.compare import SELECTED, VerdictRow
from lm_eval_aft.evaluation.report import over_seeds
from lm_eval_aft.evaluation.stats import ALPHA, BETTER, WORSE, holm, seeds_interval, verdict
from lm_eval_aft.steering.methods import DEFAULT_METHOD
from lm_eval_aft.steering.vector_file import norm_text
from lm_eval_aft.studies.config import EARLIER_STUDY, BenchStudy
from lm_eval_aft.studies.jobs import DONE, FAILED, PRUNED, Schedule, StudyCell, given_up


@dataclass
class BenchReport:
    """Everything in the report.

    Attributes:
        by_model, by_task: averages over cells, controls left out.
        methods: per method the mean over its models and tasks, seed by seed, with an interval.
    """

    title: str
    created: str
    version: str
    cells: list[CellRow]
    family: int  # how many comparisons Holm's correction covers
    alpha: float
    pivots: list[dict[str, Any]]  # per method a table of models × tasks, mean difference over seeds
    by_model: list[dict[str, Any]]
    by_task: list[dict[str, Any]]
    seeds: list[dict[str, Any]]  # per model, task and method with at least 3 seeds, the mean and its interval
    methods: list[dict[str, Any]]
    contrasts: list[dict[str, Any]]  # methods against the first one, seed by seed
    negative: list[dict[str, Any]]  # models and tasks that were given up
    earlier: list[dict[str, Any]]  # the earlier study's figures beside ours
    earlier_note: str
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def count(self, state: str) -> int:
        """How many cells are in a state."""
        return sum(cell.state == state for cell in self.cells)


def build_study_report(study: BenchStudy, schedule: Schedule) -> BenchReport:
    """The report of what the ledger has of the study as it is now."""
    rows = [_cell_row(cell, schedule) for cell in schedule.cells]
    family = _adjust(rows, schedule.cells)
    judged = [row for row in rows if row.points is not None and not row.control]
    notes = dict.fromkeys(f"{row.name}: {note}" for row in rows for note in row.notes)
    return BenchReport(
        title=f"Study {study.name}",
        created=now(),
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
        earlier_note=EARLIER_STUDY[study.earlier]["note"] if study.earlier else "",
        notes=_shortened(list(notes)),
    )


def _cell_row(cell: StudyCell, schedule: Schedule) -> CellRow:
    state = schedule.states[cell.name]
    outcome = schedule.ledger.outcomes.get(cell.key) if state == DONE else None
    own = (cell.name, cell.model.name, cell.task.name, cell.method.name, cell.seed, cell.control)
    if outcome is None:
        whys = {
            FAILED: str(schedule.ledger.failures.get(cell.key, {}).get("error", "")),
            PRUNED: "its first seed was no better than the baseline after all retries",
        }
        return CellRow(*own, state, whys.get(state, ""))
    own_name = "" if cell.task.name == cell.task.task else f"{cell.task.name}/"
    name = f"{cell.model.name}/{own_name}{cell.method.name}-seed-{cell.seed}"
    rows = []
    for each in outcome["rows"]:
        placebo = f" {each['run']}" if each["run"].startswith("placebo/") else ""
        rows.append(VerdictRow(**each | {"run": name + placebo}))
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


def _distinct(rows: Sequence[CellRow]) -> list[VerdictRow]:
    """Primary shares of the cells; a vector that several seeds came to is there once."""
    shares = [each for each in rows if each.row and each.row.share]
    same = _grouped(shares, lambda each: (*each.series, each.vector["sha256"]))
    return [each.row for each, *_ in same.values() if each.row]


def _adjust(rows: Sequence[CellRow], cells: Sequence[StudyCell]) -> int:
    """Holm over all cells; the same vector on the same documents is one comparison."""
    same: dict[tuple[str, str], list[tuple[CellRow, VerdictRow]]] = {}
    for each, cell in zip(rows, cells, strict=True):
        if each.row is None:
            continue
        each.row = replace(each.row, p_adjusted=None, family=False)
        if not each.control and each.row.verdict != SELECTED:
            same.setdefault((each.vector["sha256"], cell.baseline_key), []).append((each, each.row))
    adjusted = holm([twins[0][1].p_value for twins in same.values()])
    for twins, p in zip(same.values(), adjusted, strict=True):
        for each, row in twins:
            call = verdict(p, row.difference, row.higher_is_better)
            each.row = replace(row, p_adjusted=p, family=each is twins[0][0], verdict=call)
    return len(same)


def _pivots(rows: Sequence[CellRow]) -> list[dict[str, Any]]:
    models, tasks, methods = (
        list(dict.fromkeys(getattr(row, part) for row in rows)) for part in ("model", "task", "method")
    )
    series = _grouped(rows, lambda row: row.series)

    def lines(method: str) -> list[dict[str, Any]]:
        return [
            {"model": model, "values": [_pivot_cell(series[model, task, method]) for task in tasks]}
            for model in models
        ]

    return [{"method": method, "tasks": tasks, "lines": lines(method)} for method in methods]


def _pivot_cell(own: Sequence[CellRow]) -> dict[str, Any]:
    values = [row.points for row in own if row.points is not None]
    verdicts = [row.row.verdict for row in own if row.row]
    return {
        "points": statistics.fmean(values) if values else None,
        "n": next((row.row.n for row in own if row.row), None),
        "seeds": len(values),
        "better": verdicts.count(BETTER),
        "worse": verdicts.count(WORSE),
        "states": sorted({row.state for row in own}),
    }


def _negative(rows: Sequence[CellRow]) -> list[dict[str, Any]]:
    """Series whose training gave up, and whether every method did on that model and task."""
    gave_up = [row for row in rows if row.state == DONE and row.why]
    found = []
    for row in gave_up:
        pair = [each for each in rows if (each.model, each.task) == (row.model, row.task)]
        finished = [each for each in pair if each.state == DONE]
        lost = {e.method for e in finished} - {each.method for each in finished if not each.why}
        pruned = [each.name for each in pair if each.state == PRUNED and each.method == row.method]
        found.append(
            {"name": row.name, "model": row.model, "task": row.task, "method": row.method, "why": row.why}
            | {"points": row.points, "selection_change": row.vector.get("selection_change")}
            | {"pruned": pruned, "whole_pair": lost >= {e.method for e in pair if not e.control}}
        )
    return found


def _shortened(notes: Iterable[str], most: int = 40) -> list[str]:
    """One line for a note that many cells share."""
    same = _grouped(notes, lambda note: note.partition(": ")[2]).values()
    found = [each[0] if len(each) == 1 else f"{len(each)} cells, the first {each[0]}" for each in same]
    return found[:most] + ([f"... and {len(found) - most} more kinds of notes."] if found[most:] else [])


# What may be claimed over cells: averages, intervals over seeds, the earlier study's figures beside ours.

LEAST_SEEDS = 3
_T = TypeVar("_T")
_K = TypeVar("_K")


def _grouped(items: Iterable[_T], key: Callable[[_T], _K]) -> dict[_K, list[_T]]:
    """Items by key, in the order in which the keys first occur."""
    found: dict[_K, list[_T]] = {}
    for each in items:
        found.setdefault(key(each), []).append(each)
    return found


@dataclass
class CellRow:
    """A cell's row of the report.

    Attributes:
        row: its primary metric, the p-value adjusted over all cells; ``None`` unless it is done.
        others: its other metrics and its placebos, outside Holm's family.
    """

    name: str
    model: str
    task: str
    method: str
    seed: int
    control: bool
    state: str  # ``done``, ``failed``, ``pruned``, ``to do`` or ``left out`` (by ``--only``)
    why: str = ""  # why it failed or was pruned; for a finished cell, why its training gave up
    row: VerdictRow | None = None
    others: list[VerdictRow] = field(default_factory=list)
    vector: dict[str, Any] = field(default_factory=dict)  # what the vector is and how it was chosen
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def series(self) -> tuple[str, str, str]:
        """What it shares with the other seeds."""
        return (self.model, self.task, self.method)

    @property
    def points(self) -> float | None:
        """Difference in percentage points; ``None`` without one or where the metric is not a share."""
        return 100 * self.row.difference if self.row and self.row.share else None


def averages(rows: Sequence[CellRow], key: Callable[[CellRow], str]) -> list[dict[str, Any]]:
    """Per key the mean over model, task and method, each of them a mean over its seeds."""
    found = []
    for name, own in _grouped(rows, key).items():
        series = _grouped(own, lambda row: row.series).values()
        verdicts = [row.row.verdict for row in own if row.row]
        better, worse = verdicts.count(BETTER), verdicts.count(WORSE)
        mean = statistics.fmean(statistics.fmean(row.points or 0.0 for row in each) for each in series)
        found.append(
            {"name": name, "points": mean, "cells": len(own), "better": better, "worse": worse}
            | {"neither": len(own) - better - worse}
        )
    return found


@dataclass(frozen=True)
class Series:
    """A method on one model and task, seed by seed."""

    points: Mapping[int, float]  # of each seed that is finished
    error: float  # standard error of a seed's points, over documents; the mean over seeds
    vectors: int  # how many different ones its seeds came to


def _by_pair(rows: Sequence[CellRow], method: str) -> dict[tuple[str, str], Series]:
    """A method's series by model and task, without those whose primary metric is not a share."""
    own = _grouped([row for row in rows if row.method == method], lambda row: (row.model, row.task))
    return {
        pair: Series(
            {row.seed: row.points for row in each if row.points is not None},
            statistics.fmean([_error(row.row) for row in each if row.row] or [0.0]),
            len({row.vector.get("sha256") for row in each if row.row}),
        )
        for pair, each in own.items()
        if all(row.row is None or row.row.share for row in each)
    }


def _error(row: VerdictRow) -> float:
    """Standard error of a row's difference, in points, from its 95 % interval."""
    return 100 * (row.high - row.low) / (2 * 1.96) if row.low is not None and row.high is not None else 0.0


def mean_of_pairs(
    series: Sequence[tuple[Mapping[int, float], int]], seeds: Sequence[int], error: float, missing: str
) -> dict[str, Any]:
    """Mean over pairs of model and task, seed by seed, with its 95 % interval where a claim may be made.

    ``why`` says why no claim may be made. Pruned pairs are those that did badly: a mean without them would
    say nothing about the method, so each pair counts with the seeds that it has.

    Args:
        series: of each pair, points by seed, and how many distinct vectors its seeds came to.
        error: standard error of the mean over documents.
        missing: what is said of pairs without any seed.
    """
    values = [points for points, _ in series if points]
    if not values:
        return {}
    partial = sum(any(seed not in each for seed in seeds) for each in values)
    why = ""
    if partial:
        why = f"{partial} of them without every seed"
    elif len(seeds) < LEAST_SEEDS:
        why = f"fewer than {LEAST_SEEDS} seeds"
    elif max(vectors for _, vectors in series) == 1:
        why = "every seed makes the same vector"
    elif len(values) < len(series):
        why = missing.format(len(series) - len(values))
    mean = statistics.fmean(statistics.fmean(each.values()) for each in values)
    found: dict[str, Any] = {"seeds": len(seeds), "pairs": len(values), "low": None, "high": None}
    found |= {"mean": mean, "why": why}
    if not why:
        means = [statistics.fmean(each[seed] for each in values) for seed in seeds]
        found["low"], found["high"] = seeds_interval(means, 1.96 * error)
    return found


def _documents(rows: Sequence[CellRow], method: str) -> float:
    """Standard error over documents of a method's mean over models and tasks.

    Models answer a task's documents alike, so their errors are taken as correlated; those of different
    tasks as independent.
    """
    errors: dict[str, list[float]] = {}
    for (_, task), each in _by_pair(rows, method).items():
        if each.points:
            errors.setdefault(task, []).append(each.error)
    total = sum(map(len, errors.values()))
    return math.hypot(*(sum(each) for each in errors.values())) / total if total else 0.0


def method_means(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """Each method's mean over its models and tasks, as a claim about the method and not one vector."""
    found = []
    for name in (method.name for method in study.methods):
        series = [(each.points, each.vectors) for each in _by_pair(rows, name).values()]
        if means := mean_of_pairs(series, study.seeds, _documents(rows, name), "{} more without any seed"):
            found.append({"method": name} | means)
    return found


def contrasts(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """Each method against the first one: models, tasks and seeds that both finished."""
    first, *others = [method.name for method in study.methods]
    before, found = _by_pair(rows, first), []
    for name in others:
        both = [(after, before[pair]) for pair, after in _by_pair(rows, name).items() if pair in before]
        series = [
            ({s: a.points[s] - b.points[s] for s in a.points if s in b.points}, max(a.vectors, b.vectors))
            for a, b in both
        ]
        error = math.hypot(_documents(rows, name), _documents(rows, first))
        if means := mean_of_pairs(series, study.seeds, error, "not all of them in both"):
            found.append({"method": name, "against": first} | means)
    return found


def beside_earlier(rows: Sequence[CellRow], study: BenchStudy) -> list[dict[str, Any]]:
    """The earlier study's figures, each with the mean of ours on the same model, task and method."""
    pretrained = {entry.name: entry.pretrained for entry in study.models}
    harness = {entry.name: entry.task for entry in study.tasks}
    shared = study.recipe.get("method", DEFAULT_METHOD)
    kinds = {entry.name: entry.settings.get("method", shared) for entry in study.methods}
    found = []
    for given in EARLIER_STUDY[study.earlier]["figures"] if study.earlier else ():
        quoted = {"model": "", "task": "", "method": "", "points": 0, "n": None, "note": ""} | given
        ours = [
            (row.points, row.row.n)
            for row in rows
            if row.points is not None
            and row.row
            and not row.control
            and kinds[row.method] == quoted["method"]
            and quoted["model"] in ("", pretrained[row.model])
            and quoted["task"] in ("", harness[row.task])
        ]
        values = [points for points, _ in ours]
        found.append(
            quoted
            | {"ours": statistics.fmean(values) if values else None, "best": max(values, default=None)}
            | {"cells": len(values), "our_n": sorted({n for _, n in ours})}
        )
    return found


# The report as tables of finished texts, the same for every format.


def summary(report: BenchReport) -> str:
    """The study in a few sentences."""
    states = {state: report.count(state) for state in dict.fromkeys(cell.state for cell in report.cells)}
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    rows = [cell.row for cell in report.cells if cell.row and cell.row.p_adjusted is not None]
    better, worse = (sum(row.verdict == word for row in rows) for word in ("better", "worse"))
    open_cells = sum(cell.state not in (DONE, PRUNED) and not cell.control for cell in report.cells)
    provisional = (
        f" Verdicts are provisional: {open_cells} cells are not finished, and will count among them."
        if open_cells
        else ""
    )
    return (
        f"{len(report.cells)} cells: {told}. Of {len(rows)} vectors judged, {better} did better than the "
        f"frozen model, {worse} worse, and {len(rows) - better - worse} showed no detectable difference. A "
        f"verdict needs a Holm-adjusted p below {report.alpha} over all {report.family} comparisons of this "
        f"study; it is about one vector. Placebos and secondary metrics are not among them.{provisional}"
    )


def study_tables(report: BenchReport, brief: bool = False) -> list[RenderedTable]:
    """Every table of the report that has rows; ``brief``: with the columns that a terminal has room for."""
    made = [
        *_pivot_tables(report),
        _brief(_cells(report)) if brief else _cells(report),
        _placebos(report),
        _averages("By model", "model", report.by_model),
        _averages("By task", "task", report.by_task),
        _methods(report),
        _seeds(report),
        _negative_table(report),
        _earlier(report),
    ]
    return [table for table in made if table.lines]


def _points(value: float | None) -> str:
    return "–" if value is None else formatting.points(value / 100, True)


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{_points(low)} to {_points(high)}"


def _pivot_tables(report: BenchReport) -> list[RenderedTable]:
    def text(value: dict[str, Any]) -> str:
        if value["points"] is None:
            return ", ".join(value["states"])
        return f"{_points(value['points'])} {'▲' * value['better']}{'▼' * value['worse']}".strip()

    intro = (
        "Mean difference from the frozen model over seeds, in points, on each task's primary metric; "
        "▲ ▼ one seed's vector better or worse after Holm."
    )
    found = []
    for pivot in report.pivots:
        columns = ["model"]
        for task, *values in zip(pivot["tasks"], *(line["values"] for line in pivot["lines"]), strict=True):
            columns.append(f"{task} (n = {next((each['n'] for each in values if each['n']), '–')})")
        lines = [[line["model"], *map(text, line["values"])] for line in pivot["lines"]]
        found.append(RenderedTable(f"Models × tasks: {pivot['method']}", columns, lines, intro))
    return found


_ROW_COLUMNS = [name for name in formatting.COLUMNS if name not in ("task", "run")]
_HEADINGS = ["won / lost" if name == "wins / losses" else name for name in _ROW_COLUMNS]
_COLUMNS = ["model", "task", "method", "seed", "layer", "norm", *_HEADINGS]


def _cells(report: BenchReport) -> RenderedTable:
    lines, tones = [], []
    for each in report.cells:
        head = [each.model, each.task, each.method, str(each.seed)]
        if each.row is None:
            state = f"{each.state}: {each.why}" if each.why else each.state
            lines.append([*head, *["–"] * (len(_COLUMNS) - 5), state])
            tones.append("none")
            continue
        first, *texts, verdict_text = formatting.row_cells(each.row, _ROW_COLUMNS)
        layers = each.vector.get("layers") or []
        shown = f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else ", ".join(map(str, layers))
        if each.why and each.state == DONE:
            verdict_text = f"{verdict_text}; {each.why}"
        norm = each.vector.get("norm")
        length = "–" if norm is None else norm_text(norm, each.vector.get("norm_share"), ".3g")
        lines.append([*head, shown, length, first, *texts, verdict_text])
        tones.append(formatting.tone(each.row))
    intro = "Norms in brackets are shares of the median norm of the hidden states at the vector's layer."
    told = intro if any("%" in line[5] for line in lines) else ""
    return RenderedTable("Every cell", _COLUMNS, lines, told, tones=tones)


def _brief(table: RenderedTable) -> RenderedTable:
    wanted = ["layer", "n", "baseline", "difference", "95 % interval", "p (Holm)", "verdict"]
    places = [_COLUMNS.index(name) for name in wanted]
    lines = [["/".join(line[:4]), *(line[place] for place in places)] for line in table.lines]
    return RenderedTable(table.title, ["model/task/method/seed", *wanted], lines)


def _placebos(report: BenchReport) -> RenderedTable:
    lines = [
        [each.name, row.run.rpartition(" ")[2], *formatting.row_cells(row, _ROW_COLUMNS[1:8])]
        for each in report.cells
        for row in each.others
        if row.primary and row.kind == "placebo"
    ]
    return RenderedTable("Placebos", ["cell", "placebo", *_HEADINGS[1:8]], lines)


def _averages(title: str, name: str, rows: list[dict[str, Any]]) -> RenderedTable:
    columns = [name, "mean difference (points)", "cells", "better", "worse", "no detectable difference"]
    keys = ("cells", "better", "worse", "neither")
    lines = [[row["name"], _points(row["points"]), *(str(row[key]) for key in keys)] for row in rows]
    return RenderedTable(title, columns, lines, "Controls are left out.")


def _methods(report: BenchReport) -> RenderedTable:
    lines = [
        [
            f"{row['method']} − {row['against']}" if "against" in row else row["method"],
            str(row["pairs"]),
            str(row["seeds"]),
            _points(row["mean"]),
            f"no claim: {row['why']}" if row["low"] is None else _interval(row["low"], row["high"]),
        ]
        for row in [*report.methods, *report.contrasts]
    ]
    columns = ["method", "models × tasks", "seeds", "mean difference (points)", "95 % interval"]
    intro = (
        "What may be claimed about a method: the mean over these models and tasks, seed by seed, with its "
        "interval over seeds and documents. Where seeds were pruned, failed or are still to be done, each "
        "model and task counts with those it has, and there is no interval."
    )
    return RenderedTable("Methods", columns, lines, intro)


def _seeds(report: BenchReport) -> RenderedTable:
    lines = [
        [
            *(row["run"], row["task"], str(row["seeds"]), formatting.points(row["mean"], row["share"])),
            formatting.interval(row["low"], row["high"], row["share"]),
        ]
        for row in report.seeds
    ]
    columns = ["model / method", "task", "seeds", "mean difference (points)", "95 % interval over seeds"]
    return RenderedTable("Over seeds", columns, lines)


def _negative_table(report: BenchReport) -> RenderedTable:
    lines = [
        [
            row["name"],
            row["why"],
            "–" if row["selection_change"] is None else f"{row['selection_change']:+.4f}",
            _points(row["points"]),
            "every method gave up on this model and task" if row["whole_pair"] else "this method only",
            f"{len(row['pruned'])} further seed(s) not run" if row["pruned"] else "–",
        ]
        for row in report.negative
    ]
    columns = ["cell", "why", "selection score (nats)", "difference (points)", "scope", "pruned"]
    return RenderedTable("Negative results", columns, lines)


def _earlier(report: BenchReport) -> RenderedTable:
    lines = []
    for row in report.earlier:
        n = " or ".join(map(str, row["our_n"]))
        ours = "–" if row["ours"] is None else f"{_points(row['ours'])} (n = {n}, {row['cells']} cells)"
        theirs = f"{_points(float(row['points']))} (n = {row['n'] or 'not told'})"
        model, task, note = row["model"] or "any", row["task"] or "any", row["note"] or "–"
        lines.append([model, task, row["method"], theirs, ours, _points(row["best"]), note])
    columns = ["model", "task", "method", "earlier study", "here, mean", "here, best cell", "its note"]
    intro = (
        "The earlier study chose its vectors on documents that it reported, so by the rules of this report "
        f"its figures are not results. Points are against its own baselines. {report.earlier_note}"
    )
    return RenderedTable("The earlier study's figures", columns, lines, intro)


# A study's report as files. No number is computed here.


def write_study_report(report: BenchReport, folder: Path) -> list[Path]:
    """Write ``report.md``, ``.html``, ``.json`` and ``.csv``; each appears whole or not at all."""
    context = {"report": report, "summary": summary(report), "tables": study_tables(report)}
    texts = {
        suffix: render_template("lm_eval_aft.studies", f"study.{suffix}.j2", **context)
        for suffix in ("md", "html")
    }
    return write_formats(
        texts | {"json": json_text(report.to_dict()), "csv": study_csv(report)}, folder, "report"
    )


_CELL_COLUMNS = ("model", "task", "method", "seed", "control", "state", "why")
_VECTOR_COLUMNS = (
    *("sha256", "layers", "norm", "epoch", "selection_change", "retries", "pruned", "train", "norm_share"),
)


def study_csv(report: BenchReport) -> str:
    """A line for each metric of each cell, with full precision; no times, so that equal studies are equal."""
    columns = [*_CELL_COLUMNS, *(each.name for each in fields(VerdictRow) if each.name != "task")]
    rows = []
    for each in report.cells:
        own = {key: getattr(each, key) for key in _CELL_COLUMNS}
        vector = {key: each.vector.get(key) for key in _VECTOR_COLUMNS}
        for row in [each.row, *each.others] if each.row else [None]:
            rows.append((asdict(row) if row else {}) | own | vector)
    return csv_text([*columns, *_VECTOR_COLUMNS], rows)
