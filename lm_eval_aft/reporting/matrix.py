"""A matrix of vectors and tasks, and the same as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_aft.reporting import cells
from lm_eval_aft.reporting.formats import json_text, write_formats

NAME = "transfer"
MARKS = {"better": " ▲", "worse": " ▼"}
NOTE = (
    "Points against the baseline on each task's evaluation split, primary metric, with 95 % intervals; "
    "* the task the vector was trained on; ▲ ▼ better or worse by an exact test, Holm-adjusted over the "
    "{family} cells of the matrix. Random directions are outside that family."
)


@dataclass(frozen=True)
class Cell:
    """One vector on one task, on the task's primary metric.

    Attributes:
        vector: its name, the task it was trained on where it was trained here.
        own: whether the vector was trained on this task.
        placebo: a random direction; outside Holm's family.
        difference, low, high: steered minus baseline, paired, with its 95 % interval.
        p: exact; ``p_adjusted`` by Holm over all vectors and tasks of the matrix.
        share: whether the metric is a share, shown in percent.
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
    """The outcome: vectors in rows, tasks in columns.

    Attributes:
        family: how many cells Holm's correction covers.
        failed: tasks that no vector could be trained on, and why.
    """

    model: str
    tasks: tuple[str, ...]
    cells: tuple[Cell, ...]
    family: int
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def vectors(self) -> list[str]:
        """Row names, placebos last."""
        ordered = sorted(self.cells, key=lambda cell: cell.placebo)
        return list(dict.fromkeys(cell.vector for cell in ordered))

    def at(self, vector: str, task: str) -> Cell | None:
        """The cell of a vector and a task, if there is one."""
        return next((c for c in self.cells if (c.vector, c.task) == (vector, task)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def write_matrix(matrix: Matrix, folder: Path) -> list[Path]:
    """Write ``transfer.png``, ``.md``, ``.json`` and ``.csv``; each appears whole or not at all.

    Raises:
        AFTError: the folder cannot be written.
    """
    from lm_eval_aft.reporting.heatmap import draw_matrix  # matplotlib

    picture = folder / f"{NAME}.png"
    draw_matrix(matrix, picture)
    texts = {"md": to_markdown(matrix), "json": json_text(matrix.to_dict()), "csv": to_csv(matrix)}
    return [picture, *write_formats(texts, folder, NAME)]


def table(matrix: Matrix) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: the baseline's scores, then each vector's differences."""
    first = by_task(matrix)
    scores = [cells.score(c.baseline, c.share) if (c := first.get(task)) else "–" for task in matrix.tasks]
    lines = [["baseline", *scores]]
    for vector in matrix.vectors:
        lines.append([vector, *(_text(matrix.at(vector, task)) for task in matrix.tasks)])
    return ["vector", *(_head(task, first.get(task)) for task in matrix.tasks)], lines


def to_markdown(matrix: Matrix) -> str:
    """The picture, the matrix, and every cell's numbers."""
    columns, lines = table(matrix)
    text = [f"# Transfer between tasks: {matrix.model}", "", f"![Heat map of the matrix]({NAME}.png)", ""]
    text += [*_markdown(columns, lines), "", NOTE.format(family=matrix.family), ""]
    text += [f"No vector was trained on {task}: {why}" for task, why in matrix.failed.items()]
    heads = ["vector", "task", "metric", "n", "baseline", "steered", "difference", "95 % interval"]
    heads += ["wins / losses", "p", "p (Holm)", "verdict"]
    return "\n".join([*text, "", *_markdown(heads, [_numbers(cell) for cell in matrix.cells]), ""])


def to_csv(matrix: Matrix) -> str:
    """One line per cell."""
    stream = io.StringIO()
    rows = matrix.to_dict()["cells"]
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _head(task: str, cell: Cell | None) -> str:
    return task if cell is None else f"{task} ({cells.metric_name(cell.metric, cell.filter)}, n = {cell.n})"


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    change = cells.points(cell.difference, cell.share)
    bounds = cells.interval(cell.low, cell.high, cell.share)
    return f"{change} ({bounds}){MARKS.get(cell.verdict, '')}{' *' if cell.own else ''}"


def _numbers(cell: Cell) -> list[str]:
    return [
        cell.vector,
        cell.task,
        cells.metric_name(cell.metric, cell.filter),
        str(cell.n),
        cells.score(cell.baseline, cell.share),
        cells.score(cell.steered, cell.share),
        cells.points(cell.difference, cell.share),
        cells.interval(cell.low, cell.high, cell.share),
        f"{cell.wins} / {cell.losses}",
        cells.p_text(cell.p),
        cells.p_text(cell.p_adjusted),
        cell.verdict or "placebo",
    ]


def _markdown(columns: list[str], lines: list[list[str]]) -> list[str]:
    rows = [columns, ["---"] * len(columns), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]


def by_task(matrix: Matrix) -> Mapping[str, Cell]:
    return {cell.task: cell for cell in reversed(matrix.cells)}
