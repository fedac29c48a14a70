"""A report as Markdown, JSON, CSV and one HTML page. No number is computed here."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_aft.reporting import cells, plots
from lm_eval_aft.reporting.formats import json_text, write_formats
from lm_eval_aft.reporting.report import Report
from lm_eval_aft.reporting.verdicts import Row


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
    names = [each.name for each in fields(Row)]
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
    by_task: dict[str, list[Row]] = {}
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
        "columns": cells.COLUMNS,
        "table": [(row, cells.row_cells(row)) for row in report.rows],
        "blocks": cells.blocks(report.rows),
        "verdicts": [row for row in report.rows if row.primary and row.kind == "steered"],
        "answer_only": [(pair, cells.answer_only_cells(pair)) for pair in report.answer_only],
        "fields": list(names),
        "cells": cells,
        "tone": plots.tone,
    }


@cache
def _environment(escaped: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lm_eval_aft.reporting"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
