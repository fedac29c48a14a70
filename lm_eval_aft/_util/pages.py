"""Tables, charts and whole pages as text: the one place that writes Markdown, HTML, SVG, CSV and JSON.

Charts are inline SVG: no files, no scripts, colours from the page's style sheet. Every chart is 360 units
wide, so that its text is readable on a phone. Colours come from class names (``base``, ``good``, ``bad``,
``none``, ``plac``), for light and dark mode alike.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from lm_eval_aft._util.files import replacing

WIDTH = 360


@dataclass(frozen=True)
class RenderedTable:
    """A table of finished texts, the same for the terminal, Markdown and HTML.

    Attributes:
        title: its heading.
        lines: one sequence of cells for each row, as long as ``columns``.
        intro: a sentence or two above the table.
        notes: remarks below the table.
        tones: for each row, the class that colours it in HTML, as ``good``; empty for none.
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
    whole page with its style sheet; blocks ``eyebrow``, ``meta`` and ``main``) and ``tables.html.j2`` (macro
    ``table``, for a `RenderedTable`).

    Args:
        package: the dotted package whose folder ``templates`` holds the template.
    """
    text: str = _environment(package).get_template(name).render(**context)
    return text


def html_table(table: RenderedTable) -> str:
    """A table as HTML without a page around it, as notebooks show it; every text is escaped.

    >>> "<b>" in html_table(RenderedTable("Vector", ["task", "<b>"], [["arc", "1"]]))
    False
    """
    return render_template("lm_eval_aft._util", "notebook.html.j2", table=table)


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


# Charts, and what they are made of.


def svg_text(kind: str, x: float | str, y: float | str, text: str, anchor: str = "") -> str:
    """A line of text at a place; ``anchor`` as SVG's ``text-anchor``."""
    anchored = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{kind}" x="{x}" y="{y}"{anchored}>{escape(text)}</text>'


def svg_chart(height: float, label: str, parts: Sequence[str]) -> str:
    """A whole chart; ``label`` is what screen readers say of it."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(part for part in parts if part)}</svg>"
    )


def shortened(text: str, length: int) -> str:
    """The text, or its end after an ellipsis."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or above ``low`` to at or below ``high``, about five of them."""
    span = max(high - low, 1e-9)
    raw = span / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw), 10 * size)
    first = math.ceil(low / step - 1e-9)
    found: list[float] = []
    while (first + len(found)) * step <= high + 1e-9 * span:
        found.append(round((first + len(found)) * step, 10))
    return found or [low, high]


def grid_lines(
    ticks: Sequence[float], x: Any, height: float, factor: float, unit: str, signed: bool = False
) -> str:
    """Vertical lines at round numbers, with the numbers below; ``x`` maps a number to its place."""
    parts = []
    for tick in ticks:
        at = x(tick)
        anchor = "start" if at < 20 else "end" if at > WIDTH - 20 else "middle"
        number = f"{factor * tick:+g}" if signed and tick else f"{factor * tick:g}"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}"/>')
        parts.append(svg_text("tick", f"{at:.1f}", height + 16, f"{number.replace('-', '−')}{unit}", anchor))
    return "".join(parts)


def line_chart(
    series: Sequence[tuple[list[tuple[float, float]], str, bool]],
    marks: Sequence[tuple[float, float]],
    baseline: float | None,
    axis: str,
    label: str,
    whole: bool = False,
) -> str:
    """Lines over numbers.

    Args:
        series: for each line its points, its class, and whether each point has a dot.
        marks: points with a large dot.
        baseline: a dashed line, called "no vector".
        whole: show the highest values too; else they are cut off where they would compress the others.
    """
    height, left, bottom = 220, 44, 36
    points = [point for line, _, _ in series for point in line if all(map(math.isfinite, point))]
    ys = [y for _, y in points] + ([baseline] if baseline is not None else [])
    # Diverged candidates must not compress the others.
    ceiling = max(ys) if whole else max((baseline or 0.0) * 1.5, sorted(ys)[int(0.9 * (len(ys) - 1))])
    ticks = round_ticks(min(ys), min(max(ys), ceiling))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], min(max(ys), ceiling))
    first, last = min(p[0] for p in points), max(p[0] for p in points)

    def x(value: float) -> float:
        return left + 8 + (value - first) / ((last - first) or 1) * (WIDTH - left - 20)

    def y(value: float) -> float:
        return 18 + (high - min(value, high)) / ((high - low) or 1) * (height - bottom - 22)

    wholes = list(dict.fromkeys(round(t) for t in round_ticks(first, last) if first <= round(t) <= last))
    parts = []
    for tick in ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 4}" y1="{at}" y2="{at}"/>')
        parts.append(svg_text("tick", left - 6, f"{y(tick) + 4:.1f}", f"{tick:g}", "end"))
    parts += [svg_text("tick", f"{x(whole):.1f}", height - 20, str(whole), "middle") for whole in wholes]
    parts.append(svg_text("tick", f"{(left + WIDTH) / 2:.0f}", height - 4, axis, "middle"))
    if baseline is not None:
        at = f"{y(baseline):.1f}"
        parts.append(f'<line class="reference" x1="{left}" x2="{WIDTH - 4}" y1="{at}" y2="{at}"/>')
        parts.append(svg_text("tick", WIDTH - 6, f"{y(baseline) - 4:.1f}", "no vector", "end"))
    for line, kind, dots in series:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line if math.isfinite(b))
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if dots:
            tone_name = kind.split()[-1]
            parts += [
                f'<circle class="fill {tone_name}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6"/>' for a, b in line
            ]
    parts += [f'<circle class="fill good" cx="{x(a):.1f}" cy="{y(b):.1f}" r="6"/>' for a, b in marks]
    return svg_chart(height, label, parts)


def layer_curve(vector: dict[str, Any]) -> str:
    """Selection score (cross-entropy, nats) of every trained layer, against the baseline's."""
    layers = vector["layers"]
    values = [each["score"] for each in layers]
    baseline = (vector["baseline"] or {}).get("score")
    series = [([(each["layer"], each["score"]) for each in layers], "curve none", True)]
    marks = [(each["layer"], each["score"]) for each in layers if each["chosen"]]
    return line_chart(
        series, marks, baseline, "layer (block whose output is steered)",
        f"Selection cross-entropy by layer, from {min(values):.3f} to {max(values):.3f} nats",
    )  # fmt: skip


def training_curves(vector: dict[str, Any]) -> str:
    """Selection score of every candidate by epoch; the chosen one stands out."""
    ordered = sorted(vector["curves"], key=lambda curve: curve["chosen"])
    series = [
        (
            [(point["epoch"], point["score"]) for point in curve["points"]],
            "curve good" if curve["chosen"] else "curve faint",
            bool(curve["chosen"]),
        )
        for curve in ordered
    ]
    baseline = (vector["baseline"] or {}).get("score")
    return line_chart(
        series, [], baseline, "epoch", f"Selection cross-entropy of {len(series)} candidates by epoch"
    )


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], tuple[float, str]],
    chosen: tuple[int, int] | None,
    axes: tuple[str, str],
    label: str,
) -> str:
    """A table of coloured cells, for numbers of which lower ones are better and 0 is neither.

    Args:
        rows, columns: their names.
        cells: by row and column, the number and what is said of it when the pointer is over it.
        chosen: the cell with a frame.
        axes: what rows and columns are.
    """
    left, top, size = 40, 20, 18
    wide = (WIDTH - left - 4) / len(columns)
    values = [value for value, _ in cells.values()]
    # What helps sets the scale: a length that ruins the model must not pale everything else.
    reach = max([-value for value in values if value < 0] or map(abs, values), default=0.0) or 1.0
    parts = [svg_text("tick", 4, 12, axes[0])]
    parts += [svg_text("tick", left - 8, top + size * i + 13, name, "end") for i, name in enumerate(rows)]
    for (i, j), (value, told) in sorted(cells.items()):
        at, y = left + wide * j, top + size * i
        strength = 0.65 * min(1.0, abs(value) / reach) ** 0.5
        parts.append(
            f'<g><title>{escape(told)}</title><rect class="cell {"good" if value < 0 else "bad"}" '
            f'x="{at:.1f}" y="{y}" width="{wide - 1:.1f}" height="{size - 1}" fill-opacity="{strength:.3f}"/>'
        )
        if wide >= 26:
            number = f"{value:+.2f}".replace("-", "−").replace("0.", ".", 1)
            parts.append(svg_text("cellnumber", f"{at + wide / 2:.1f}", y + 12.5, number, "middle"))
        parts.append("</g>")
    if chosen:
        at, y = left + wide * chosen[1], top + size * chosen[0]
        parts.append(
            f'<rect class="frame" x="{at:.1f}" y="{y}" width="{wide - 1:.1f}" height="{size - 1}" rx="2"/>'
        )
    below = top + size * len(rows) + 14
    every = math.ceil(6.8 * max(map(len, columns)) / wide)  # no label overlaps the next
    parts += [
        svg_text("tick", f"{left + wide * (j + 0.5):.1f}", below, name, "middle")
        for j, name in enumerate(columns)
        if j % every == 0
    ]
    parts.append(svg_text("tick", f"{(left + WIDTH) / 2:.0f}", below + 16, axes[1], "middle"))
    return svg_chart(below + 22, label, parts)
