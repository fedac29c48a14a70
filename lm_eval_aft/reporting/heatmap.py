"""A matrix of vectors and tasks as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lm_eval_aft.reporting import cells
from lm_eval_aft.reporting.matrix import MARKS, Cell, Matrix, by_task
from lm_eval_aft.vector import replacing


def draw_matrix(matrix: Matrix, path: Path) -> None:
    """The heat map: blue where a vector helps, red where it harms, its own task framed.

    Colours are of the difference in points, the same scale for all tasks; a metric that is no share has
    numbers and no colour. Cells without a verdict are set in grey.
    """
    vectors, tasks, first = matrix.vectors, matrix.tasks, by_task(matrix)
    shares = [abs(cell.difference) * 100 for cell in matrix.cells if cell.share]
    most = max([1.0, *shares])
    norm = TwoSlopeNorm(0.0, -most, most)
    longest = max(len(name) for name in vectors)
    size = (2.1 * len(tasks) + 0.09 * longest + 2.4, 0.72 * len(vectors) + 2.4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours: Any = ScalarMappable(norm, "RdBu")
    for y, vector in enumerate(vectors):
        for x, task in enumerate(tasks):
            cell = matrix.at(vector, task)
            up = 1 if cell is None or cell.higher_is_better else -1
            shade = colours.to_rgba(up * 100 * cell.difference) if cell and cell.share else "#f3f4f6"
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white", linewidth=2))
            if cell is not None:
                _write_cell(axes, x, y, cell, shade)
            if cell is not None and cell.own:
                frame = (x + 0.025, y + 0.035), 0.95, 0.93
                axes.add_patch(Rectangle(*frame, fill=False, edgecolor="black", linewidth=2))
    axes.set(xlim=(0, len(tasks)), ylim=(len(vectors), 0), ylabel="vector trained on")
    labels = [_label(task, first.get(task)) for task in tasks]
    axes.set_xticks([x + 0.5 for x in range(len(tasks))], labels, fontsize=9)
    axes.set_yticks([y + 0.5 for y in range(len(vectors))], vectors, fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(colours, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("points better (blue) or worse (red)", fontsize=9)
    figure.suptitle(f"{matrix.model}: points against the baseline, 95 % interval", fontsize=11)
    note = f"Framed: own task. Bold: exact test, Holm-adjusted over {matrix.family} cells, p < 0.05."
    figure.supxlabel(note, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _write_cell(axes: Any, x: int, y: int, cell: Cell, shade: Any) -> None:
    """The difference and its interval, in what can be read on the shade."""
    dark = not isinstance(shade, str) and 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
    told = cell.verdict in MARKS
    ink = "white" if dark else "black" if told else "#4b5563"
    factor, digits = (100, 1) if cell.share else (1, 3)
    number = f"{factor * cell.difference:+.{digits}f}".replace("-", "−")
    weight = "bold" if told else "normal"
    axes.text(x + 0.5, y + 0.4, number, ha="center", va="center", color=ink, fontsize=12, weight=weight)
    if cell.low is not None and cell.high is not None:
        bounds = f"{factor * cell.low:+.{digits}f} to {factor * cell.high:+.{digits}f}".replace("-", "−")
        axes.text(x + 0.5, y + 0.72, bounds, ha="center", va="center", color=ink, fontsize=8)


def _label(task: str, cell: Cell | None) -> str:
    if cell is None:
        return task
    metric = cells.metric_name(cell.metric, cell.filter)
    return f"{task}\n{metric}, n = {cell.n:,}\nbaseline {cells.score(cell.baseline, cell.share)}"
