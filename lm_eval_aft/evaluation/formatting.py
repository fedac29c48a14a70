"""How scores and comparisons are shown: numbers, the cells of tables, and charts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval_aft._util.pages import WIDTH, grid_lines, round_ticks, shortened, svg_chart, svg_text
from lm_eval_aft.evaluation.compare import AnswerOnlyRow, VerdictRow


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


# Charts.

ROW = 40


def tone(row: VerdictRow) -> str:
    """The colour class of a comparison."""
    if row.kind == "placebo":
        return "plac"
    return {"better": "good", "worse": "bad"}.get(row.verdict, "none")


def score_bars(rows: Sequence[VerdictRow]) -> str:
    """Scores of one task and metric: the baseline's bar, then one per run, with 95 % intervals."""
    first = rows[0]
    bars = [("baseline", first.baseline, first.baseline_low, first.baseline_high, "base")]
    bars += [(row.run, row.steered, row.steered_low, row.steered_high, tone(row)) for row in rows]
    top = max([high or value for _, value, _, high, _ in bars] + [1e-9])
    low_end = min([0.0, *(low if low is not None else value for _, value, low, _, _ in bars)])
    ticks = round_ticks(low_end, min(1.0, top * 1.05) if first.share else top * 1.05)
    start, end = min(low_end, ticks[0]), max(top, ticks[-1])
    height = ROW * len(bars) + 26

    def x(value: float) -> float:
        return 6 + (value - start) / (end - start) * (WIDTH - 12)

    parts = [grid_lines(ticks, x, height - 20, 100 if first.share else 1, "%" if first.share else "")]
    for i, (name, value, low, high, kind) in enumerate(bars):
        y = ROW * i
        text = score(value, first.share)
        parts += [
            svg_text("label", 6, y + 14, shortened(name, 38)),
            svg_text("value", WIDTH - 6, y + 14, text, "end"),
        ]
        parts.append(
            f'<rect class="fill {kind}" x="{x(0):.1f}" y="{y + 20}" rx="2" height="13" '
            f'width="{max(0.0, x(value) - x(0)):.1f}"/>'
        )
        parts.append(_whisker(x, low, high, y + 26.5))
    label = f"Scores on {first.task}: " + ", ".join(f"{n} {score(v, first.share)}" for n, v, *_ in bars)
    return svg_chart(height, label, parts)


def difference_plot(rows: Sequence[VerdictRow]) -> str:
    """Difference to the baseline of each row, with its paired 95 % interval."""
    factor = 100 if all(row.share for row in rows) else 1
    ends = [factor * v for row in rows for v in (row.low, row.high, row.difference) if v is not None]
    reach = max([abs(end) for end in ends] + [1e-9]) * 1.06
    ticks = [t for t in round_ticks(-reach, reach) if abs(t) <= reach]
    height = ROW * len(rows) + 26

    def x(value: float) -> float:
        return 6 + (value + reach) / (2 * reach) * (WIDTH - 12)

    parts = [grid_lines(ticks, x, height - 20, 1, "", signed=True)]
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - 20}"/>')
    several = len({row.task for row in rows}) > 1
    for i, row in enumerate(rows):
        y = ROW * i
        name = f"{row.task} · {row.run}" if several else row.run
        text = points(row.difference, row.share)
        parts += [
            svg_text("label", 6, y + 14, shortened(name, 40)),
            svg_text("value", WIDTH - 6, y + 14, text, "end"),
        ]
        low = None if row.low is None else factor * row.low
        high = None if row.high is None else factor * row.high
        if low is not None and high is not None:
            parts.append(
                f'<line class="span {tone(row)}" x1="{x(low):.1f}" x2="{x(high):.1f}" '
                f'y1="{y + 27}" y2="{y + 27}"/>'
            )
        parts.append(
            f'<circle class="fill {tone(row)}" cx="{x(factor * row.difference):.1f}" cy="{y + 27}" r="5"/>'
        )
    label = "Difference to the baseline: " + ", ".join(
        f"{row.task} {row.run} {points(row.difference, row.share)}" for row in rows
    )
    return svg_chart(height, label, parts)


def _whisker(x: Any, low: float | None, high: float | None, y: float) -> str:
    if low is None or high is None:
        return ""
    a, b = x(low), x(high)
    return f'<path class="whisker" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8M{b:.1f} {y - 4}v8"/>'
