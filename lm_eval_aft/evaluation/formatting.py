"""How numbers and tables are written, for every report and file format of the package."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_aft._util.files import replacing
from lm_eval_aft.evaluation.compare import VerdictRow
from lm_eval_aft.evaluation.report import AnswerOnlyRow


def metric_name(metric: str, filter_name: str) -> str:
    """The metric, with its filter unless that is lm-eval's default.

    >>> metric_name("acc_norm", "none"), metric_name("exact_match", "strict-match")
    ('acc_norm', 'exact_match,strict-match')
    """
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def score(value: float | None, share: bool) -> str:
    """A score; shares in percent.

    >>> score(0.25, share=True), score(3.5, share=False)
    ('25.00 %', '3.5000')
    """
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if share else f"{value:.4f}"


def points(value: float | None, share: bool) -> str:
    """A difference with its sign; differences of shares in percentage points.

    >>> points(0.125, share=True), points(-0.5, share=False)
    ('+12.50', '−0.5000')
    """
    if value is None:
        return "–"
    text = f"{100 * value if share else value:+.{2 if share else 4}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def interval(low: float | None, high: float | None, share: bool) -> str:
    """The interval of a difference; see `points`."""
    return "–" if low is None or high is None else f"{points(low, share)} to {points(high, share)}"


def p_text(value: float | None) -> str:
    """A p-value: two digits, or four if it is small."""
    if value is None:
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def with_error(value: float, error: float | None, share: bool) -> str:
    """A score and its standard error, as in lm-eval's own table, but shares in percent."""
    if error is None:
        return score(value, share)
    return f"{100 * value:.2f} ± {100 * error:.2f} %" if share else f"{value:.4f} ± {error:.4f}"


# A comparison's columns and their cells, for every table and format. Tables name those they show.
COLUMNS: dict[str, Callable[[VerdictRow], str]] = {
    "task": lambda row: row.task,
    "metric": lambda row: metric_name(row.metric, row.filter),
    "run": lambda row: row.run,
    "n": lambda row: str(row.n),
    "baseline": lambda row: with_error(row.baseline, row.baseline_stderr, row.share),
    "steered": lambda row: with_error(row.steered, row.steered_stderr, row.share),
    "difference": lambda row: points(row.difference, row.share),
    "95 % interval": lambda row: interval(row.low, row.high, row.share),
    "wins / losses": lambda row: f"{row.wins} / {row.losses}",
    "p": lambda row: p_text(row.p_value),
    "p (Holm)": lambda row: p_text(row.p_adjusted),
    "detectable": lambda row: "–" if row.mde is None else f"±{score(row.mde, row.share).removesuffix(' %')}",
    "verdict": lambda row: row.verdict or ("placebo" if row.kind == "placebo" else "secondary"),
}
# Headings of the table of `blocks`, whose lines belong to one task and metric, and the columns below them.
BLOCK = {
    "score": "steered",
    "difference": "difference",
    "95 % interval": "95 % interval",
    "won / lost": "wins / losses",
    "p": "p",
    "Holm": "p (Holm)",
    "detectable": "detectable",
    "verdict": "verdict",
}
_WITHOUT = {
    "baseline without question": "baseline",
    "difference without question": "difference",
    "95 % interval without": "95 % interval",
    "p without": "p",
}
# Columns of a vector with the questions and without them.
ANSWER_ONLY_COLUMNS = ("task", "metric", "run", "n", "difference", "95 % interval", "p", *_WITHOUT)


def row_cells(row: VerdictRow, names: Iterable[str] = tuple(COLUMNS)) -> list[str]:
    """A comparison's cells in some of the ``COLUMNS``, by default all."""
    return [COLUMNS[name](row) for name in names]


def row_numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers of a `VerdictRow`'s fields for a tracker: ``TASK/METRIC/RUN/baseline`` and so on.

    Args:
        prefix: goes before the task.
    """
    place = f"{prefix}{row['task']}/{metric_name(row['metric'], row['filter'])}/{row['run']}"
    names = ("baseline", "steered", "difference", "low", "high", "p_value", "p_adjusted", "n")
    return {f"{place}/{name}": row[name] for name in names}


def answer_only_cells(pair: AnswerOnlyRow) -> list[str]:
    """A vector's cells with and without the questions, in the order of ``ANSWER_ONLY_COLUMNS``."""
    row, without = pair.with_question, pair.without_question
    return [
        *row_cells(row, ANSWER_ONLY_COLUMNS[:3]),
        *row_cells(without, ["n"]),
        *row_cells(row, ANSWER_ONLY_COLUMNS[4:7]),
        *row_cells(without, _WITHOUT.values()),
    ]


def blocks(rows: Sequence[VerdictRow]) -> list[tuple[VerdictRow, list[VerdictRow]]]:
    """Rows grouped by task and metric, each task's primary metric first.

    Each group comes with one of its rows, for what they share: the baseline's score and the number of
    documents. Rows on other documents (of forced comparisons) form a group of their own.
    """
    found: dict[tuple[Any, ...], list[VerdictRow]] = {}
    for row in rows:
        found.setdefault((row.task, row.metric, row.filter, row.n, row.baseline), []).append(row)
    ordered = sorted(found.values(), key=lambda block: (block[0].task, not block[0].primary))
    return [(block[0], block) for block in ordered]


# Tables and whole reports as text: the one place that writes Markdown, HTML, CSV and JSON.


@dataclass(frozen=True)
class RenderedTable:
    """A table of finished texts, the same for the terminal, Markdown and HTML.

    Attributes:
        title: its heading.
        lines: one sequence of cells for each row, as long as ``columns``.
        intro: a sentence or two above the table.
        notes: remarks below the table.
        tones: for each row, the class that colours it in HTML (see `plots.tone`); empty for none.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    intro: str = ""
    notes: Sequence[str] = ()
    tones: Sequence[str] = ()


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    r"""A Markdown table without a final newline; pipes, backslashes and newlines in cells are escaped.

    >>> print(markdown_table(["task", "score"], [["a|b", "25 %"]]))
    | task | score |
    |---|---|
    | a\|b | 25 % |
    """
    rows = [[_markdown_cell(text) for text in line] for line in (columns, *lines)]
    texts = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([texts[0], "|" + "---|" * len(columns), *texts[1:]])


def _markdown_cell(text: Any) -> str:
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a header line and numbers in full precision; ``None`` and missing values are empty.

    >>> csv_text(["task", "p"], [{"task": "arc", "p": 0.1}, {"task": "gsm8k", "p": None}])
    'task,p\\narc,0.1\\ngsm8k,\\n'

    Raises:
        ValueError: a row has a key that is no column.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def json_text(value: Any) -> str:
    """JSON with full precision; NaN and infinities, which it does not know, as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_template(package: str, name: str, **context: Any) -> str:
    """Fill in a Jinja template; one called ``*.html.j2`` escapes what is put into it.

    Templates may use `markdown_table`, and include or extend those of this package: ``page.html.j2`` (a
    whole page with its style sheet; blocks ``eyebrow`` and ``main``) and ``tables.html.j2`` (macro
    ``table``, for a `RenderedTable`).

    Args:
        package: the dotted package whose folder ``templates`` holds the template.
    """
    text: str = _environment(package).get_template(name).render(**context)
    return text


@cache
def _environment(package: str) -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["markdown_table"] = markdown_table
    return environment


def write_formats(texts: Mapping[str, str], folder: Path, name: str) -> list[Path]:
    """Write ``name.SUFFIX`` for each suffix and its text; each file appears complete or not at all.

    Raises:
        AFTError: the folder cannot be written.
    """
    written = []
    for suffix, text in texts.items():
        written.append(folder / f"{name}.{suffix}")
        with replacing(written[-1]) as temporary:
            # Documents may hold half of a surrogate pair, which is no text.
            temporary.write_text(text, encoding="utf-8", errors="replace")
    return written
