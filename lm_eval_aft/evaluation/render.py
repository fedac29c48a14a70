"""A report as Markdown, JSON, CSV, one HTML page and model cards. No number is computed here."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.evaluation import formatting, plots
from lm_eval_aft.evaluation.compare import VerdictRow
from lm_eval_aft.evaluation.formatting import json_text, write_formats
from lm_eval_aft.evaluation.report import Report


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write ``report.md``, ``.json``, ``.csv`` and ``.html``; each appears whole or not at all.

    Raises:
        AFTError: the folder cannot be written.
    """
    texts = {
        "md": to_markdown(report),
        "json": to_json(report),
        "csv": to_csv(report),
        "html": to_html(report),
    }
    return write_formats(texts, folder, "report")


def to_json(report: Report) -> str:
    """Everything, with full precision."""
    return json_text(report.to_dict())


def to_csv(report: Report) -> str:
    """The rows with full precision, answer-only ones last; a forced comparison says so in every line."""
    stream = io.StringIO()
    names = [each.name for each in fields(VerdictRow)]
    writer = csv.DictWriter(stream, [*names, "banner"], lineterminator="\n")
    writer.writeheader()
    for row in (*report.rows, *(pair.without_question for pair in report.answer_only)):
        writer.writerow(asdict(row) | {"banner": " | ".join(report.banner)})
    return stream.getvalue()


def to_markdown(report: Report) -> str:
    """Tables to paste into a pull request or a paper's appendix."""
    return str(_environment(escaped=False).get_template("report.md.j2").render(**_context(report)))


def to_html(report: Report) -> str:
    """One page that needs nothing else: no network, no scripts; light, dark and print."""
    by_task: dict[str, list[VerdictRow]] = {}
    for row in report.rows:
        if row.primary:
            by_task.setdefault(row.task, []).append(row)
    charts = {
        "scores": [(task, plots.score_bars(rows)) for task, rows in by_task.items()],
        "differences": {task: plots.difference_plot(rows) for task, rows in by_task.items()},
        "points": {task: rows[0].share for task, rows in by_task.items()},
        "layers": {v["run"]: plots.layer_curve(v) for v in report.vectors if len(v["layers"]) > 1},
        "training": {
            v["run"]: plots.training_curves(v)
            for v in report.vectors
            if any(len(curve["points"]) > 1 for curve in v["curves"])
        },
    }
    template = _environment(escaped=True).get_template("report.html.j2")
    return str(template.render(**_context(report), charts=charts))


def _context(report: Report) -> dict[str, Any]:
    names: dict[str, None] = {}
    for column in report.settings:
        names |= dict.fromkeys(column["values"])
    return {
        "report": report,
        "columns": formatting.COLUMNS,
        "table": [(row, formatting.row_cells(row)) for row in report.rows],
        "blocks": formatting.blocks(report.rows),
        "verdicts": [row for row in report.rows if row.primary and row.kind == "steered"],
        "answer_only": [(pair, formatting.answer_only_cells(pair)) for pair in report.answer_only],
        "fields": list(names),
        "cells": formatting,
        "tone": plots.tone,
    }


@cache
def _environment(escaped: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lm_eval_aft.evaluation"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


# Results of a report, added to the model card of the vector they speak of.


def update_cards(report: Report) -> list[Path]:
    """Rewrite ``README.md`` of every vector folder in a report with its results; return the files.

    Runs compared by force, or without the questions, and vectors selected on these documents bring no
    results. A vector that is no longer the one that was scored, was scored at another coefficient or at
    other positions than its own, or is a lone file, has no card to fill.

    Raises:
        AFTError: no vector of the report has a folder, or a card cannot be written.
    """
    from lm_eval_aft.steering.vector import SteeringVector
    from lm_eval_aft.training.artifacts import write_card

    written = []
    for described in report.vectors:
        folder = Path(described["path"])
        # Facts are there only when the vector was read and is the one that was scored.
        if not folder.is_dir() or not described["facts"].get("task"):
            continue
        vector = SteeringVector.load(folder)
        facts = described["facts"]
        if (vector.coefficient, vector.positions) != (facts["coefficient"], facts["positions"]):
            continue
        write_card(folder, vector, card_results(report, described["run"]))
        written.append(folder / "README.md")
    if not written:
        raise AFTError(
            "No vector of these runs lies in a folder written by train-vector.",
            "Run the report where the vectors' paths hold, on scores at their own coefficients, or leave out "
            "--card.",
        )
    return written


def card_results(report: Report, run: str) -> list[dict[str, Any]]:
    """A run's rows as a card shows them: plain values and ready-made cells."""
    bare = any(each["answer_only"] for each in report.runs if each["name"] == run)
    if report.banner or bare:
        return []
    barred = {row.task for row in report.rows if row.run == run and row.verdict.startswith("not assessable")}
    settings: dict[str, str] = next(c["values"] for c in report.settings if c["run"] == run)
    return [
        {
            "task": row.task,
            "dataset": report.datasets.get(row.task),
            "metric": formatting.metric_name(row.metric, row.filter),
            "num_fewshot": settings.get(f"{row.task}: n-shot", ""),
            "n": row.n,
            "value": row.steered,
            "baseline": formatting.with_error(row.baseline, row.baseline_stderr, row.share),
            "steered": formatting.with_error(row.steered, row.steered_stderr, row.share),
            "difference": formatting.points(row.difference, row.share),
            "interval": formatting.interval(row.low, row.high, row.share),
            "p": formatting.p_text(row.p_value if row.p_adjusted is None else row.p_adjusted),
            "verdict": formatting.row_cells(row)[-1],
        }
        for row in report.rows
        if row.run == run and row.task not in barred
    ]
