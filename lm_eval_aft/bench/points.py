"""Settings tried in a search, and what they came to on the selection split."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonlines

from lm_eval_aft.training.ledger import LEDGER as TRAINING_LEDGER
from lm_eval_aft.vector import replacing


@dataclass(frozen=True)
class Point:
    """One setting and what it came to on the selection split.

    Attributes:
        depth: the layer as a share of the depth, 0 the first block and 1 the last.
        score: mean over seeds of the best epoch's temperature-fitted cross-entropy, within ``epochs``.
        change: difference from the baseline; negative is better.
        best_epoch: of each seed; none where one diverged, and then the score is infinite.
    """

    layer: int
    depth: float
    lr: float
    l2: float
    epochs: int
    score: float
    change: float
    accuracy: float
    best_epoch: tuple[int, ...]
    trial: int | None = None

    def order(self) -> tuple[float, float, int]:
        """Sorts better points first; at equal scores the one that trained less."""
        return (self.score, -self.accuracy, self.epochs)


def read_points(folder: Path, epochs: Sequence[int], depth: int, trial: int | None = None) -> list[Point]:
    """The settings of a finished run, from its ledger, each at each number of epochs.

    Settings in which a seed diverged are left out.
    """
    found: dict[tuple[int, float, float], dict[int, list[dict[str, Any]]]] = {}
    with jsonlines.open(folder / TRAINING_LEDGER) as reader:
        for line in reader.iter(type=dict, skip_invalid=True):
            if line.get("event") == "epoch" and line["stage"] == "final":
                setting = (line["layer"], line["lr"], line["l2"])
                found.setdefault(setting, {}).setdefault(line["seed"], []).append(line)
    seeds = max((len(by_seed) for by_seed in found.values()), default=0)
    points = []
    for (layer, lr, l2), by_seed in found.items():
        for most in epochs:
            best = [
                min(lines[:most], key=lambda e: (e["score"], -e["accuracy"]))
                for lines in by_seed.values()
                if len(lines) >= most
            ]
            if len(best) < seeds:
                continue
            score = statistics.fmean(each["score"] for each in best)
            baseline = best[0]["baseline"]
            points.append(
                Point(
                    layer,
                    layer / max(1, depth - 1),
                    lr,
                    l2,
                    most,
                    score,
                    score - baseline,
                    statistics.fmean(each["accuracy"] for each in best),
                    tuple(each["epoch"] for each in best),
                    trial,
                )
            )
    return points


def write_ledger(points: Iterable[Point], path: Path) -> None:
    """One line per setting."""
    with replacing(path) as temporary, jsonlines.open(temporary, "w") as writer:
        writer.write_all(asdict(point) for point in points)


def read_ledger(path: Path) -> list[Point]:
    """Settings written one by one; a line cut short by sudden death is passed over."""
    if not path.exists():
        return []
    with jsonlines.open(path) as reader:
        lines = list(reader.iter(type=dict, skip_invalid=True))
    return [Point(**{**line, "best_epoch": tuple(line["best_epoch"])}) for line in lines]


COLUMNS = ("layer", "depth", "lr", "l2", "epochs", "cross-entropy", "change", "accuracy", "best epoch")


def table(points: Sequence[Point]) -> list[list[str]]:
    """Lines in the order of `COLUMNS`, best first."""
    return [
        [
            str(point.layer),
            f"{point.depth:.0%}",
            f"{point.lr:.3g}",
            f"{point.l2:g}",
            str(point.epochs),
            f"{point.score:.4f}",
            f"{point.change:+.4f}",
            f"{point.accuracy:.1%}",
            "/".join(map(str, point.best_epoch)),
        ]
        for point in sorted(points, key=Point.order)
    ]


NOTE = (
    "On the selection split, carved from the training split: these numbers chose the vector and are no "
    "results. The best of {count} looks better than it is; score the winner on the evaluation split."
)


def write_table(points: Sequence[Point], folder: Path, title: str) -> Path:
    """``search.md``: all points, best first."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *table(points)]
    lines = [
        f"# {title}",
        "",
        NOTE.format(count=len(points)),
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    path = folder / "search.md"
    with replacing(path) as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path
