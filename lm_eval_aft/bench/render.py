"""A study's report as Markdown, HTML, JSON and CSV. No number is computed here."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_aft.bench.shown import summary, tables
from lm_eval_aft.bench.table import BenchReport
from lm_eval_aft.reporting import plots
from lm_eval_aft.reporting.formats import json_text, write_formats
from lm_eval_aft.reporting.verdicts import Row


def write_report(report: BenchReport, folder: Path) -> list[Path]:
    """Write ``report.md``, ``.html``, ``.json`` and ``.csv``; each appears whole or not at all."""
    texts = {
        "md": to_markdown(report),
        "html": to_html(report),
        "json": to_json(report),
        "csv": to_csv(report),
    }
    return write_formats(texts, folder, "report")


def to_json(report: BenchReport) -> str:
    """Everything, with full precision."""
    return json_text(report.to_dict())


_FACTS = ("sha256", "layers", "norm", "epoch", "selection_change", "retries", "pruned", "train")


def to_csv(report: BenchReport) -> str:
    """A line for each metric of each cell, with full precision; no times, so that equal studies are equal."""
    stream = io.StringIO()
    own = ["model", "task", "method", "seed", "control", "state", "why"]
    names = [each.name for each in fields(Row) if each.name != "task"]
    writer = csv.DictWriter(stream, [*own, *names, *_FACTS], lineterminator="\n")
    writer.writeheader()
    for each in report.cells:
        told = {key: getattr(each, key) for key in own}
        facts = {key: each.vector.get(key) for key in _FACTS}
        for row in [each.row, *each.others] if each.row else [None]:
            values = {key: value for key, value in asdict(row).items() if key != "task"} if row else {}
            writer.writerow(told | values | facts)
    return stream.getvalue()


def to_markdown(report: BenchReport) -> str:
    """Tables to paste into a paper's appendix."""
    return str(_template("study.md.j2", False).render(**_context(report)))


def to_html(report: BenchReport) -> str:
    """One page that needs nothing else."""
    style = (Path(plots.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    return str(_template("study.html.j2", True).render(**_context(report), style=style))


def _context(report: BenchReport) -> dict[str, Any]:
    return {"report": report, "summary": summary(report), "tables": tables(report)}


@cache
def _template(name: str, escaped: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lm_eval_aft.bench"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
