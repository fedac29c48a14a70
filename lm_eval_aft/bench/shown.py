"""A study's report as tables of texts: one place, so that every format shows the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lm_eval_aft.bench.claims import CellRow
from lm_eval_aft.bench.schedule import DONE, PRUNED
from lm_eval_aft.bench.table import BenchReport
from lm_eval_aft.reporting import cells, plots


@dataclass
class Shown:
    """A table as texts. ``tones`` gives the lines of an HTML table their colours."""

    title: str
    columns: list[str]
    lines: list[list[str]]
    intro: str = ""
    tones: list[str] = field(default_factory=list)


def summary(report: BenchReport) -> str:
    """The study in a few sentences."""
    states = {state: report.count(state) for state in dict.fromkeys(cell.state for cell in report.cells)}
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    rows = [cell.row for cell in report.cells if cell.row and cell.row.p_adjusted is not None]
    better, worse = (sum(row.verdict == word for row in rows) for word in ("better", "worse"))
    open_cells = sum(cell.state not in (DONE, PRUNED) and not cell.control for cell in report.cells)
    provisional = (
        f" Verdicts are provisional: {open_cells} cells are not finished, and will count in that family."
        if open_cells
        else ""
    )
    return (
        f"{len(report.cells)} cells: {told}. Of {len(rows)} vectors judged, {better} did better than the "
        f"frozen model, {worse} worse, and {len(rows) - better - worse} showed no detectable difference. A "
        f"verdict needs a Holm-adjusted p below {report.alpha} over all {report.family} comparisons of this "
        f"study; it speaks of one vector. Placebos and secondary metrics stand outside.{provisional}"
    )


def tables(report: BenchReport, brief: bool = False) -> list[Shown]:
    """Every table of the report, those with nothing to show left out; ``brief``: as a terminal has room."""
    made = [
        *_pivots(report),
        _brief(_cells(report)) if brief else _cells(report),
        _placebos(report),
        _averages("By model", "model", report.by_model),
        _averages("By task", "task", report.by_task),
        _methods(report),
        _seeds(report),
        _negative(report),
        _earlier(report),
    ]
    return [table for table in made if table.lines]


def _points(value: float | None) -> str:
    return "–" if value is None else cells.points(value / 100, True)


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{_points(low)} to {_points(high)}"


def _pivots(report: BenchReport) -> list[Shown]:
    found = []
    for pivot in report.pivots:
        lines = []
        for line in pivot["lines"]:
            texts = [line["model"]]
            for value in line["values"]:
                if value["points"] is None:
                    texts.append(", ".join(value["states"]))
                    continue
                marks = "▲" * value["better"] + "▼" * value["worse"]
                texts.append(f"{_points(value['points'])} {marks}".strip())
            lines.append(texts)
        sizes = [
            next((line["values"][i]["n"] for line in pivot["lines"] if line["values"][i]["n"]), "–")
            for i in range(len(pivot["tasks"]))
        ]
        columns = ["model", *(f"{task} (n = {n})" for task, n in zip(pivot["tasks"], sizes, strict=True))]
        intro = (
            "Mean difference from the frozen model over seeds, in points, on each task's primary metric; "
            "▲ ▼ one seed's vector better or worse after Holm."
        )
        found.append(Shown(f"Models × tasks: {pivot['method']}", columns, lines, intro))
    return found


_COLUMNS = [
    *("model", "task", "method", "seed", "layer", "metric", "n", "baseline", "steered", "difference"),
    *("95 % interval", "won / lost", "p", "p (Holm)", "detectable", "verdict"),
]


def _cells(report: BenchReport) -> Shown:
    lines, tones = [], []
    for each in report.cells:
        head = [each.model, each.task, each.method, str(each.seed)]
        if each.row is None:
            why = f": {each.why}" if each.why else ""
            lines.append([*head, *["–"] * (len(_COLUMNS) - 5), f"{each.state}{why}"])
            tones.append("none")
            continue
        texts = cells.row_cells(each.row)
        lines.append([*head, _layers(each), texts[1], *texts[3:12], _verdict(each, texts[12])])
        tones.append(plots.tone(each.row))
    return Shown("Every cell", _COLUMNS, lines, tones=tones)


def _brief(table: Shown) -> Shown:
    wanted = ["layer", "n", "baseline", "difference", "95 % interval", "p (Holm)", "verdict"]
    places = [_COLUMNS.index(name) for name in wanted]
    lines = [["/".join(line[:4]), *(line[place] for place in places)] for line in table.lines]
    return Shown(table.title, ["model/task/method/seed", *wanted], lines)


def _layers(each: CellRow) -> str:
    layers = each.vector.get("layers") or []
    return f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else ", ".join(map(str, layers))


def _verdict(each: CellRow, text: str) -> str:
    return f"{text}; {each.why}" if each.why and each.state == DONE else text


def _placebos(report: BenchReport) -> Shown:
    lines = []
    for each in report.cells:
        for row in each.others:
            if row.primary and row.kind == "placebo":
                texts = cells.row_cells(row)
                lines.append([each.name, row.run.rpartition(" ")[2], *texts[3:10]])
    return Shown("Placebos", ["cell", "placebo", *_COLUMNS[6:13]], lines)


def _averages(title: str, name: str, rows: list[dict[str, Any]]) -> Shown:
    columns = [name, "mean difference (points)", "cells", "better", "worse", "no detectable difference"]
    keys = ("cells", "better", "worse", "neither")
    lines = [[row["name"], _points(row["points"]), *(str(row[key]) for key in keys)] for row in rows]
    return Shown(title, columns, lines, "Controls are left out.")


def _methods(report: BenchReport) -> Shown:
    lines = []
    for row in [*report.methods, *report.contrasts]:
        name = f"{row['method']} − {row['against']}" if "against" in row else row["method"]
        interval = _interval(row["low"], row["high"])
        if row["low"] is None:
            interval = f"no claim: {row['why']}"
        lines.append([name, str(row["pairs"]), str(row["seeds"]), _points(row["mean"]), interval])
    columns = ["method", "models × tasks", "seeds", "mean difference (points)", "95 % interval"]
    intro = (
        "What may be said of a method: the mean over models and tasks, seed by seed, and its interval over "
        "seeds and documents; models and tasks are these. Where seeds were pruned, failed or are to be done, "
        "each model and task counts with those it has, and there is no interval."
    )
    return Shown("Methods", columns, lines, intro)


def _seeds(report: BenchReport) -> Shown:
    lines = []
    for row in report.seeds:
        mean = cells.points(row["mean"], row["share"])
        interval = cells.interval(row["low"], row["high"], row["share"])
        lines.append([row["run"], row["task"], str(row["seeds"]), mean, interval])
    columns = ["model / method", "task", "seeds", "mean difference (points)", "95 % interval over seeds"]
    return Shown("Over seeds", columns, lines)


def _negative(report: BenchReport) -> Shown:
    lines = []
    for row in report.negative:
        change = row["selection_change"]
        left_out = f"{len(row['pruned'])} further seed(s) not run" if row["pruned"] else "–"
        whole = "every method gave up on this model and task" if row["whole_pair"] else "this method only"
        selection = "–" if change is None else f"{change:+.4f}"
        lines.append([row["name"], row["why"], selection, _points(row["points"]), whole, left_out])
    columns = ["cell", "why", "selection score (nats)", "difference (points)", "scope", "pruned"]
    return Shown("Negative results", columns, lines)


def _earlier(report: BenchReport) -> Shown:
    lines = []
    for row in report.earlier:
        theirs = f"{_points(float(row['points']))} (n = {row['n'] or 'not told'})"
        n = " or ".join(map(str, row["our_n"]))
        ours = "–" if row["ours"] is None else f"{_points(row['ours'])} (n = {n}, {row['cells']} cells)"
        best = _points(row["best"])
        lines.append(
            [
                row["model"] or "any",
                row["task"] or "any",
                row["method"],
                theirs,
                ours,
                best,
                row["note"] or "–",
            ]
        )
    columns = ["model", "task", "method", "earlier study", "here, mean", "here, best cell", "its note"]
    intro = (
        "The earlier study chose its vectors on documents it reported, so its figures are not results by the "
        f"rules kept here; points against its own baselines. {report.earlier_note}"
    )
    return Shown("The earlier study's figures", columns, lines, intro)
