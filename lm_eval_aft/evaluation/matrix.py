"""A matrix of vectors × tasks, as Markdown, JSON, CSV and a heat map."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lm_eval_aft._util.files import replacing
from lm_eval_aft._util.pages import csv_text, json_text, markdown_table, write_formats
from lm_eval_aft.evaluation import formatting

MATRIX_NAME = "transfer"
MARKS = {"better": " ▲", "worse": " ▼"}
MATRIX_NOTE = (
    "Points against the baseline on each task's evaluation split, primary metric, with 95 % intervals; "
    "* the task the vector was trained on; ▲ ▼ better or worse by an exact test, Holm-adjusted over the "
    "{family} cells of the matrix. Random directions are outside that family."
)


@dataclass(frozen=True)
class MatrixCell:
    """One vector on one task, on the task's primary metric.

    Attributes:
        vector: its name; if it was trained here, that of its task.
        own: whether the vector was trained on this task.
        placebo: whether it is a random direction, outside Holm's family.
        difference, low, high: steered minus baseline, paired, with its 95 % interval.
        p: exact; ``p_adjusted`` by Holm over all vectors and tasks of the matrix.
        share: whether all scores are between 0 and 1, shown in percent.
    """

    vector: str
    task: str
    own: bool
    placebo: bool
    metric: str
    filter: str
    n: int
    baseline: float
    steered: float
    difference: float
    low: float | None
    high: float | None
    wins: int
    losses: int
    p: float
    p_adjusted: float | None
    verdict: str
    higher_is_better: bool
    share: bool


@dataclass(frozen=True)
class Matrix:
    """Vectors in rows, tasks in columns.

    Attributes:
        family: how many cells Holm's correction covers.
        failed: tasks that no vector could be trained on, and why.
    """

    model: str
    tasks: tuple[str, ...]
    cells: tuple[MatrixCell, ...]
    family: int
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def vectors(self) -> list[str]:
        """Row names, placebos last."""
        ordered = sorted(self.cells, key=lambda cell: cell.placebo)
        return list(dict.fromkeys(cell.vector for cell in ordered))

    def at(self, vector: str, task: str) -> MatrixCell | None:
        """The cell of a vector and a task, if there is one."""
        return next((c for c in self.cells if (c.vector, c.task) == (vector, task)), None)

    def baseline(self, task: str) -> MatrixCell | None:
        """Any cell of a task, for what they share: metric, documents, the baseline's score."""
        return next((cell for cell in self.cells if cell.task == task), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def write_matrix(matrix: Matrix, folder: Path) -> list[Path]:
    """Write ``transfer.png``, ``.md``, ``.json`` and ``.csv``; each appears complete or not at all.

    Raises:
        AFTError: the folder cannot be written.
    """
    picture = folder / f"{MATRIX_NAME}.png"
    draw_matrix(matrix, picture)
    texts = {"md": to_markdown(matrix), "json": json_text(matrix.to_dict()), "csv": to_csv(matrix)}
    return [picture, *write_formats(texts, folder, MATRIX_NAME)]


def table(matrix: Matrix) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: the baseline's scores, then each vector's differences."""
    first = [matrix.baseline(task) for task in matrix.tasks]
    columns = [
        f"{task} ({formatting.metric_name(cell.metric, cell.filter)}, n = {cell.n})" if cell else task
        for task, cell in zip(matrix.tasks, first, strict=True)
    ]
    lines = [["baseline", *(formatting.score(cell.baseline, cell.share) if cell else "–" for cell in first)]]
    for vector in matrix.vectors:
        lines.append([vector, *(_text(matrix.at(vector, task)) for task in matrix.tasks)])
    return ["vector", *columns], lines


def to_markdown(matrix: Matrix) -> str:
    """The picture, the matrix, and every cell's numbers."""
    columns, lines = table(matrix)
    text = [
        f"# Transfer between tasks: {matrix.model}",
        "",
        f"![Heat map of the matrix]({MATRIX_NAME}.png)",
        "",
    ]
    text += [markdown_table(columns, lines), "", MATRIX_NOTE.format(family=matrix.family), ""]
    text += [f"No vector was trained on {task}: {why}" for task, why in matrix.failed.items()]
    heads = ["vector", "task", "metric", "n", "baseline", "steered", "difference", "95 % interval"]
    heads += ["wins / losses", "p", "p (Holm)", "verdict"]
    return "\n".join([*text, "", markdown_table(heads, map(_numbers, matrix.cells)), ""])


def to_csv(matrix: Matrix) -> str:
    """One line per cell."""
    return csv_text([each.name for each in fields(MatrixCell)], map(asdict, matrix.cells))


def _text(cell: MatrixCell | None) -> str:
    if cell is None:
        return "–"
    change = formatting.points(cell.difference, cell.share)
    bounds = formatting.interval(cell.low, cell.high, cell.share)
    return f"{change} ({bounds}){MARKS.get(cell.verdict, '')}{' *' if cell.own else ''}"


def _numbers(cell: MatrixCell) -> list[str]:
    return [
        cell.vector,
        cell.task,
        formatting.metric_name(cell.metric, cell.filter),
        str(cell.n),
        formatting.score(cell.baseline, cell.share),
        formatting.score(cell.steered, cell.share),
        formatting.points(cell.difference, cell.share),
        formatting.interval(cell.low, cell.high, cell.share),
        f"{cell.wins} / {cell.losses}",
        formatting.p_text(cell.p),
        formatting.p_text(cell.p_adjusted),
        cell.verdict or "placebo",
    ]


# The heat map.


def draw_matrix(matrix: Matrix, path: Path) -> None:
    """The heat map: blue where a vector helps, red where it harms, its own task framed.

    The colour is the difference in points, on one scale for all tasks; metrics that are not shares have
    numbers but no colour. Cells without a verdict have grey text.
    """
    vectors, tasks = matrix.vectors, matrix.tasks
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
                dark = cell.share and _dark(shade)
                _write_cell(axes, x, y, cell, dark)
                if cell.own:
                    frame, edge = ((x + 0.025, y + 0.035), 0.95, 0.93), "white" if dark else "black"
                    axes.add_patch(Rectangle(*frame, fill=False, edgecolor=edge, linewidth=2.5))
    axes.set(xlim=(0, len(tasks)), ylim=(len(vectors), 0), ylabel="vector trained on")
    labels = [_label(task, matrix.baseline(task)) for task in tasks]
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


def _dark(shade: Any) -> bool:
    """Whether white is easier to read on a colour than black (luma, ITU-R BT.601)."""
    return bool(0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5)


def _write_cell(axes: Any, x: int, y: int, cell: MatrixCell, dark: bool) -> None:
    """The difference and its interval."""
    significant = cell.verdict in MARKS
    ink = "white" if dark else "black" if significant else "#4b5563"
    factor, digits = (100, 1) if cell.share else (1, 3)
    number = f"{factor * cell.difference:+.{digits}f}".replace("-", "−")
    weight = "bold" if significant else "normal"
    axes.text(x + 0.5, y + 0.4, number, ha="center", va="center", color=ink, fontsize=12, weight=weight)
    if cell.low is not None and cell.high is not None:
        bounds = f"{factor * cell.low:+.{digits}f} to {factor * cell.high:+.{digits}f}".replace("-", "−")
        axes.text(x + 0.5, y + 0.72, bounds, ha="center", va="center", color=ink, fontsize=8)


def _label(task: str, cell: MatrixCell | None) -> str:
    if cell is None:
        return task
    metric = formatting.metric_name(cell.metric, cell.filter)
    return f"{task}\n{metric}, n = {cell.n:,}\nbaseline {formatting.score(cell.baseline, cell.share)}"
