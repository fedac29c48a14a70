"""A report as Markdown, JSON, CSV, one HTML page and model cards; nothing is computed here."""

from __future__ import annotations

from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import exists
from lm_eval_aft._util.pages import (
    RenderedTable,
    csv_text,
    json_text,
    layer_curve,
    render_template,
    training_curves,
    write_formats,
)
from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.compare import OPTION_SCORES, VerdictRow
from lm_eval_aft.evaluation.formatting import interval, metric_name, points, score
from lm_eval_aft.evaluation.report import Report


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write ``report.md``, ``.json``, ``.csv`` and ``.html``; each appears complete or not at all.

    Raises:
        AFTError: the folder cannot be written.
    """
    texts = {"md": to_markdown(report), "json": json_text(report.to_dict())}
    return write_formats(texts | {"csv": to_csv(report), "html": to_html(report)}, folder, "report")


def to_csv(report: Report) -> str:
    """The rows in full precision, answer-only ones last; forced comparisons are marked in every line."""
    columns = [*(each.name for each in fields(VerdictRow)), "banner"]
    rows = [*report.rows, *(pair.without_question for pair in report.answer_only)]
    return csv_text(columns, (asdict(row) | {"banner": " | ".join(report.banner)} for row in rows))


def to_markdown(report: Report) -> str:
    """Tables for a pull request or a paper's appendix."""
    return render_template("lm_eval_aft.evaluation", "report.md.j2", **_context(report))


def to_html(report: Report) -> str:
    """One self-contained page, without scripts, for light mode, dark mode and print."""
    by_task: dict[str, list[VerdictRow]] = {}
    for row in report.rows:
        if row.primary:
            by_task.setdefault(row.task, []).append(row)
    charts = {
        "scores": [(task, formatting.score_bars(rows)) for task, rows in by_task.items()],
        "differences": {task: formatting.difference_plot(rows) for task, rows in by_task.items()},
        "points": {task: rows[0].share for task, rows in by_task.items()},
        "layers": {v["run"]: layer_curve(v) for v in report.vectors if len(v["layers"]) > 1},
        "training": {
            v["run"]: training_curves(v)
            for v in report.vectors
            if any(len(curve["points"]) > 1 for curve in v["curves"])
        },
    }
    return render_template("lm_eval_aft.evaluation", "report.html.j2", **_context(report), charts=charts)


def _context(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "lines": map(formatting.row_cells, report.rows),
        "blocks": formatting.blocks(report.rows),
        "verdicts": [row for row in report.rows if row.primary and row.kind == "steered"],
        "tables": tables(report),
        "leaderboard": leaderboard_table(report),
        "settings": settings_table(report),
        "cells": formatting,
        "tone": formatting.tone,
        "option_scores": OPTION_SCORES,
    }


def tables(report: Report) -> list[RenderedTable]:
    """The report's tables below its verdicts, without empty ones."""
    makers = (_not_finite, _untested, _answer_only, _by_route, _over_seeds)
    return [table for make in makers if (table := make(report)).lines]


def _not_finite(report: Report) -> RenderedTable:
    lines = [
        (each.task, each.run, f"{'some' if each.n is None else each.n} of {each.of}", each.cause)
        for each in report.not_finite
    ]
    columns = ("task", "run", "documents", "cause")
    return RenderedTable("Not assessable: answers that are no finite numbers", columns, lines)


def _untested(report: Report) -> RenderedTable:
    lines = [
        (row["task"], row["metric"], row["run"], f"{row['baseline']:.4f}", f"{row['steered']:.4f}")
        for row in (*report.corpus, *report.groups)
    ]
    return RenderedTable("Scores without a test", ("task", "metric", "run", "baseline", "steered"), lines)


def _answer_only(report: Report) -> RenderedTable:
    return RenderedTable(
        "Without the question",
        formatting.ANSWER_ONLY_COLUMNS,
        [formatting.answer_only_cells(pair) for pair in report.answer_only],
        report.answer_only_wording,
        [
            f"{pair.with_question.task}, {pair.with_question.run}: {pair.meaning}"
            for pair in report.answer_only
        ],
    )


def _by_route(report: Report) -> RenderedTable:
    columns = ("task", "metric", "run", "vector", "n", "baseline", "steered", "difference")
    lines = [
        (
            row["task"],
            metric_name(row["metric"], row["filter"]),
            row["run"],
            f"{row['route']} (trained on this task)" if row["own"] else row["route"],
            f"{row['n']} ({100 * row['n'] / row['of']:.1f} %)",
            score(row["baseline"], row["share"]),
            score(row["steered"], row["share"]),
            points(row["difference"], row["share"]),
        )
        for row in report.routes
    ]
    return RenderedTable("By route", columns, lines)


def _over_seeds(report: Report) -> RenderedTable:
    lines = []
    for row in report.seeds:
        bounds = interval(row["low"], row["high"], row["share"])
        lines.append((row["run"], row["task"], str(row["seeds"]), points(row["mean"], row["share"]), bounds))
    columns = ("vector", "task", "seeds", "mean difference", "95 % interval")
    return RenderedTable("Over seeds", columns, lines)


def leaderboard_table(report: Report) -> RenderedTable:
    """The leaderboard's three tasks, their settings and the calibration."""
    lines = []
    for each in report.leaderboard:
        same = "yes" if each["same_settings"] else f"no: {', '.join(each['deviations'])}"
        published = "–" if each["published"] is None else f"{each['published']:.2f} %"
        if each["calibration"] is not None:
            published += f" ({points(each['calibration'] / 100, True)})"
        head = (each["task"], f"{each['num_fewshot']}-shot {each['metric']}")
        own = [
            (
                row["run"],
                score(row["baseline"], True),
                score(row["steered"], True),
                row["verdict"] or row["kind"],
            )
            for row in each["rows"]
        ]
        lines += [(*head, *cells, same, published) for cells in own or [("–",) * 4]]
    columns = (
        *("task", "setting", "run", "baseline", "steered", "verdict", "same settings"),
        "published (this baseline)",
    )
    return RenderedTable(
        "Open LLM Leaderboard v1 settings", columns, lines, notes=[report.leaderboard_wording]
    )


def settings_table(report: Report) -> RenderedTable:
    """Every setting of every run, a column for each run."""
    values = [column["values"] for column in report.settings]
    lines = [(name, *(own.get(name, "–") for own in values)) for name in dict.fromkeys(chain(*values))]
    return RenderedTable("Settings", ("", *(column["run"] for column in report.settings)), lines)


# Results of a report, added to the model card of their vector.


def update_cards(report: Report) -> list[Path]:
    """Write the results into the ``README.md`` of every vector folder in a report; return these files.

    Forced comparisons, runs without the questions, and vectors selected on these documents have no results
    to add. A vector has no card if it has changed since it was scored, was scored with another coefficient
    or other positions than its own, or is a single file.

    Raises:
        AFTError: no vector of the report has a folder, or a card cannot be written.
    """
    from lm_eval_aft.steering.vector import SteeringVector
    from lm_eval_aft.training.artifacts import write_card

    written = []
    for described in report.vectors:
        folder = Path(described["path"])
        # There are facts only if the vector could be read and is the one that was scored.
        if not (exists(folder) and folder.is_dir()) or not described["facts"].get("task"):
            continue
        vector = SteeringVector.load(folder)
        facts = described["facts"]
        if (vector.coefficient, vector.positions) != (facts["coefficient"], facts["positions"]):
            continue
        write_card(folder, vector, card_results(report, described["run"]))
        written.append(folder / "README.md")
    if not written:
        raise AFTError(
            "No vector of these runs is in a folder written by train-vector.",
            "Run the report where the vectors' paths are valid, on runs with their own coefficients and "
            "positions, or leave out --card.",
        )
    return written


def card_results(report: Report, run: str) -> list[dict[str, Any]]:
    """A run's rows as a model card shows them: plain values and finished texts."""
    if report.banner or any(each["answer_only"] for each in report.runs if each["name"] == run):
        return []
    excluded = {
        row.task for row in report.rows if row.run == run and row.verdict.startswith("not assessable")
    }
    settings: dict[str, str] = next(c["values"] for c in report.settings if c["run"] == run)
    return [
        {
            "task": row.task,
            "dataset": report.datasets.get(row.task),
            "metric": formatting.COLUMNS["metric"](row),
            "num_fewshot": settings.get(f"{row.task}: n-shot", ""),
            "n": row.n,
            "value": row.steered,
            **report.dataset_parts.get(row.task, {}),
            "against": {
                "baseline": row.baseline,
                "difference": row.difference,
                "interval": [row.low, row.high],
                "p": row.p_value if row.p_adjusted is None else row.p_adjusted,
                "n": row.n,
            },
            **{name: formatting.COLUMNS[name](row) for name in ("baseline", "steered", "difference")},
            "interval": formatting.COLUMNS["95 % interval"](row),
            "p": formatting.p_text(row.p_value if row.p_adjusted is None else row.p_adjusted),
            "verdict": formatting.COLUMNS["verdict"](row),
        }
        for row in report.rows
        if row.run == run and row.task not in excluded
    ]
