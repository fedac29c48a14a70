"""Charts as inline SVG: no files, no scripts, colours from the page's style sheet.

Every chart is 360 units wide, so that its text is readable on a phone. Colours come from class names
(``base``, ``good``, ``bad``, ``none``, ``plac``), for light and dark mode alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.compare import VerdictRow

WIDTH = 360
ROW = 40


def _text(kind: str, x: float | str, y: float | str, text: str, anchor: str = "") -> str:
    anchored = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{kind}" x="{x}" y="{y}"{anchored}>{escape(text)}</text>'


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
    ticks = _ticks(low_end, min(1.0, top * 1.05) if first.share else top * 1.05)
    start, end = min(low_end, ticks[0]), max(top, ticks[-1])
    height = ROW * len(bars) + 26

    def x(value: float) -> float:
        return 6 + (value - start) / (end - start) * (WIDTH - 12)

    parts = [_grid(ticks, x, height - 20, 100 if first.share else 1, "%" if first.share else "")]
    for i, (name, value, low, high, kind) in enumerate(bars):
        y = ROW * i
        text = formatting.score(value, first.share)
        parts += [_text("label", 6, y + 14, _clip(name, 38)), _text("value", WIDTH - 6, y + 14, text, "end")]
        parts.append(
            f'<rect class="fill {kind}" x="{x(0):.1f}" y="{y + 20}" rx="2" height="13" '
            f'width="{max(0.0, x(value) - x(0)):.1f}"/>'
        )
        parts.append(_whisker(x, low, high, y + 26.5))
    label = f"Scores on {first.task}: " + ", ".join(
        f"{n} {formatting.score(v, first.share)}" for n, v, *_ in bars
    )
    return _svg(height, label, parts)


def difference_plot(rows: Sequence[VerdictRow]) -> str:
    """Difference to the baseline of each row, with its paired 95 % interval."""
    factor = 100 if all(row.share for row in rows) else 1
    ends = [factor * v for row in rows for v in (row.low, row.high, row.difference) if v is not None]
    reach = max([abs(end) for end in ends] + [1e-9]) * 1.06
    ticks = [t for t in _ticks(-reach, reach) if abs(t) <= reach]
    height = ROW * len(rows) + 26

    def x(value: float) -> float:
        return 6 + (value + reach) / (2 * reach) * (WIDTH - 12)

    parts = [_grid(ticks, x, height - 20, 1, "", signed=True)]
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - 20}"/>')
    several = len({row.task for row in rows}) > 1
    for i, row in enumerate(rows):
        y = ROW * i
        name = f"{row.task} · {row.run}" if several else row.run
        text = formatting.points(row.difference, row.share)
        parts += [_text("label", 6, y + 14, _clip(name, 40)), _text("value", WIDTH - 6, y + 14, text, "end")]
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
        f"{row.task} {row.run} {formatting.points(row.difference, row.share)}" for row in rows
    )
    return _svg(height, label, parts)


def layer_curve(vector: dict[str, Any]) -> str:
    """Selection score (cross-entropy, nats) of every trained layer, against the baseline's."""
    layers = vector["layers"]
    values = [each["score"] for each in layers]
    baseline = (vector["baseline"] or {}).get("score")
    series = [([(each["layer"], each["score"]) for each in layers], "curve none", True)]
    marks = [(each["layer"], each["score"]) for each in layers if each["chosen"]]
    return _lines(
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
    return _lines(
        series, [], baseline, "epoch", f"Selection cross-entropy of {len(series)} candidates by epoch"
    )


def _lines(
    series: Sequence[tuple[list[tuple[float, float]], str, bool]],
    marks: Sequence[tuple[float, float]],
    baseline: float | None,
    axis: str,
    label: str,
) -> str:
    height, left, bottom = 220, 44, 36
    points = [point for line, _, _ in series for point in line if all(map(math.isfinite, point))]
    ys = [y for _, y in points] + ([baseline] if baseline is not None else [])
    # Diverged candidates must not compress the others.
    ceiling = max(baseline * 1.5 if baseline else 0.0, sorted(ys)[int(0.9 * (len(ys) - 1))])
    ticks = _ticks(min(ys), min(max(ys), ceiling))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], min(max(ys), ceiling))
    first, last = min(p[0] for p in points), max(p[0] for p in points)

    def x(value: float) -> float:
        return left + 8 + (value - first) / ((last - first) or 1) * (WIDTH - left - 20)

    def y(value: float) -> float:
        return 18 + (high - min(value, high)) / ((high - low) or 1) * (height - bottom - 22)

    wholes = list(dict.fromkeys(round(t) for t in _ticks(first, last) if first <= round(t) <= last))
    parts = []
    for tick in ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 4}" y1="{at}" y2="{at}"/>')
        parts.append(_text("tick", left - 6, f"{y(tick) + 4:.1f}", f"{tick:g}", "end"))
    parts += [_text("tick", f"{x(whole):.1f}", height - 20, str(whole), "middle") for whole in wholes]
    parts.append(_text("tick", f"{(left + WIDTH) / 2:.0f}", height - 4, axis, "middle"))
    if baseline is not None:
        at = f"{y(baseline):.1f}"
        parts.append(f'<line class="reference" x1="{left}" x2="{WIDTH - 4}" y1="{at}" y2="{at}"/>')
        parts.append(_text("tick", WIDTH - 6, f"{y(baseline) - 4:.1f}", "no vector", "end"))
    for line, kind, dots in series:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line if math.isfinite(b))
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if dots:
            tone_name = kind.split()[-1]
            parts += [
                f'<circle class="fill {tone_name}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6"/>' for a, b in line
            ]
    parts += [f'<circle class="fill good" cx="{x(a):.1f}" cy="{y(b):.1f}" r="6"/>' for a, b in marks]
    return _svg(height, label, parts)


def _grid(
    ticks: Sequence[float], x: Any, height: float, factor: float, unit: str, signed: bool = False
) -> str:
    parts = []
    for tick in ticks:
        at = x(tick)
        anchor = "start" if at < 20 else "end" if at > WIDTH - 20 else "middle"
        number = f"{factor * tick:+g}" if signed and tick else f"{factor * tick:g}"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}"/>')
        parts.append(_text("tick", f"{at:.1f}", height + 16, f"{number.replace('-', '−')}{unit}", anchor))
    return "".join(parts)


def _whisker(x: Any, low: float | None, high: float | None, y: float) -> str:
    if low is None or high is None:
        return ""
    a, b = x(low), x(high)
    return f'<path class="whisker" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8M{b:.1f} {y - 4}v8"/>'


def _ticks(low: float, high: float) -> list[float]:
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


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(part for part in parts if part)}</svg>"
    )
