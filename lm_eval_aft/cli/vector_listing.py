"""Vectors of a library as lines of text that a terminal can show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.library.names import printable

if TYPE_CHECKING:
    from lm_eval_aft.library.entry import Entry


def cells(entry: Entry) -> list[str]:
    """The columns of one row of `aft vectors list`."""
    if entry.error:
        return [entry.name, "damaged", *["–"] * 6]
    change = entry.selection.get("score")
    model = (entry.base_model or "–").rstrip("/").rpartition("/")[2]
    task = ", ".join(entry.tasks) or "–"
    made = (entry.created or "–")[:10]
    version = entry.versions.get("lm-eval-aft")
    return [
        entry.name,
        str(entry.hidden_size),
        ", ".join(map(str, entry.layers)),
        f"{task} (placebo: {entry.control})" if entry.control else task,
        model,
        "–" if change is None else f"{change:+.4f}",
        "; ".join(result_text(row) for row in entry.results[:3]) or "–",
        f"{made}, {version}" if version else made,
    ]


def print_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain columns: a rich table of a thousand rows takes longer than reading the library."""
    lines = [columns, *(list(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


def as_json_text(value: Any) -> str:
    """JSON that steers no terminal: of what cannot be printed only the line breaks between fields stay."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def result_text(row: dict[str, str]) -> str:
    """A row of a card's results table in one line."""
    return f"{row['task']} {row['metric']} {row['difference']} {row['95 % interval']}"
